"""Tests that tokens added to a model's vocabulary are trained, saved, sampled and read again by PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import families
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cookbook import AdamParams, Datum, LoraConfig, ModelInput, SamplingParams, ServiceClient
from cookbook.errors import CheckpointError, ConfigError

NEW = ("<sku>", "<|tool x|>")
SETTINGS = AdamParams(1e-2, eps=1e-6)


@pytest.fixture(scope="module", params=["tied", "untied", "padded"])
def base(request: pytest.FixtureRequest, tiny_qwen3: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Returns a model with a tied or its own head, or with more rows than its tokenizer has tokens."""
    folder = tmp_path_factory.mktemp("base") / request.param
    tokenizer = AutoTokenizer.from_pretrained(tiny_qwen3)
    model = AutoModelForCausalLM.from_pretrained(tiny_qwen3)
    model.config.tie_word_embeddings = request.param != "untied"
    torch.manual_seed(3)
    weight = torch.randn_like(model.lm_head.weight) * 0.3
    model.model.embed_tokens.weight = torch.nn.Parameter(weight)
    model.lm_head.weight = torch.nn.Parameter(weight if request.param != "untied" else weight.flip(0))
    model.resize_token_embeddings(len(tokenizer) + (7 if request.param == "padded" else 0))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def data(tokenizer: Any) -> list[Datum]:
    ids = [
        5,
        9,
        *tokenizer.convert_tokens_to_ids(list(NEW)),
        7,
        *tokenizer.convert_tokens_to_ids(list(NEW)),
        9,
    ]
    return [Datum(ModelInput.from_ints(ids[:-1]), {"target_tokens": ids[1:]})]


def logprobs(client: Any, tokenizer: Any) -> list[float]:
    output = client.forward(data(tokenizer)).result()
    found: list[float] = output.loss_fn_outputs[0]["logprobs"].tolist()
    return found


@torch.no_grad()
def logprobs_in_transformers(model: Any, tokenizer: Any) -> list[float]:
    (datum,) = data(tokenizer)
    targets = datum.loss_fn_inputs["target_tokens"].tolist()  # type: ignore[union-attr]
    logits = model.eval()(torch.tensor([datum.model_input.to_ints()])).logits[0]
    return [float(row[token]) for row, token in zip(logits.log_softmax(-1), targets, strict=True)]


@pytest.mark.slow
def test_added_tokens_begin_as_the_mean_and_are_trained_and_loaded_by_peft(base: str, tmp_path: Path) -> None:
    with_service = ServiceClient(device="cpu", checkpoint_dir=tmp_path)
    client = with_service.create_training_client(base, LoraConfig(4, seed=0, add_tokens=NEW))
    tokenizer = client.get_tokenizer()
    assert tokenizer("a <sku>b<|tool x|>")["input_ids"].count(tokenizer.convert_tokens_to_ids("<sku>")) == 1
    plain = AutoModelForCausalLM.from_pretrained(base)
    plain.resize_token_embeddings(max(len(tokenizer), plain.config.vocab_size), mean_resizing=False)
    ids, size = tokenizer.convert_tokens_to_ids(list(NEW)), len(AutoTokenizer.from_pretrained(base))
    with torch.no_grad():
        for module in (plain.get_input_embeddings(), plain.get_output_embeddings()):
            module.weight[ids] = module.weight[:size].mean(0)
    assert logprobs(client, tokenizer) == pytest.approx(logprobs_in_transformers(plain, tokenizer), abs=1e-4)
    for _ in range(4):
        client.forward_backward(data(tokenizer))
        client.optim_step(SETTINGS).result()
    after = logprobs(client, tokenizer)
    assert sum(after) > sum(logprobs_in_transformers(plain, tokenizer)) + 1
    folder = Path(client.save_state("a").result().path)
    saved = AutoTokenizer.from_pretrained(folder)
    assert saved.get_vocab() == tokenizer.get_vocab()
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(max(len(saved), model.config.vocab_size))  # with random rows
    adapted = peft.PeftModel.from_pretrained(model, str(folder))
    assert logprobs_in_transformers(adapted, saved) == pytest.approx(after, abs=1e-4)
    sampler = with_service.create_sampling_client(model_path=folder)
    scored = sampler.compute_logprobs(ModelInput.from_ints([5, 9, *ids, 7, *ids, 9])).result()
    assert scored[1:] == pytest.approx(after, abs=1e-4)
    params = SamplingParams(max_tokens=8, temperature=0, stop=[])
    greedy = sampler.sample(ModelInput.from_ints([5, 9]), 1, params).result().sequences[0].tokens
    expected = adapted.eval().generate(
        input_ids=torch.tensor([[5, 9]]), max_new_tokens=8, do_sample=False, eos_token_id=None
    )
    assert greedy == expected[0, 2:].tolist()
    with_service.close()


@pytest.mark.slow
def test_a_run_with_added_tokens_resumes_to_the_bit(base: str, tmp_path: Path) -> None:
    service = ServiceClient(device="cpu", checkpoint_dir=tmp_path)
    client = service.create_training_client(base, LoraConfig(4, seed=0, add_tokens=NEW))
    tokenizer = client.get_tokenizer()
    for step in range(4):
        client.forward_backward(data(tokenizer))
        client.optim_step(SETTINGS).result()
        if step == 1:
            middle = client.save_state("middle").result().path
    resumed = service.create_training_client_from_state_with_optimizer(middle)
    assert resumed.get_tokenizer().get_vocab() == tokenizer.get_vocab()
    for _ in range(2):
        resumed.forward_backward(data(tokenizer))
        resumed.optim_step(SETTINGS).result()
    assert logprobs(resumed, tokenizer) == logprobs(client, tokenizer)
    service.close()


@pytest.mark.slow
def test_a_full_fine_tune_with_added_tokens_is_a_model_with_their_rows(base: str, tmp_path: Path) -> None:
    service = ServiceClient(device="cpu", checkpoint_dir=tmp_path)
    client = service.create_training_client(base, LoraConfig(0, seed=0, add_tokens=NEW))
    tokenizer = client.get_tokenizer()
    for _ in range(2):
        client.forward_backward(data(tokenizer))
        client.optim_step(SETTINGS).result()
    folder = client.save_state("a").result().path
    saved = AutoTokenizer.from_pretrained(folder)
    assert saved.get_vocab() == tokenizer.get_vocab()
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.vocab_size == model.get_input_embeddings().weight.shape[0] >= len(saved)
    expected = logprobs(client, tokenizer)
    assert logprobs_in_transformers(model, saved) == pytest.approx(expected, abs=1e-4)
    again = service.create_training_client_from_state(folder)
    assert logprobs(again, again.get_tokenizer()) == pytest.approx(expected, abs=1e-5)
    service.close()


@pytest.mark.slow
def test_a_token_that_the_tokenizer_has_keeps_its_row_and_is_trained(base: str, tmp_path: Path) -> None:
    service = ServiceClient(device="cpu", checkpoint_dir=tmp_path)
    known = AutoTokenizer.from_pretrained(base).convert_ids_to_tokens(9)
    client = service.create_training_client(base, LoraConfig(4, seed=0, add_tokens=(known, *NEW)))
    assert client.get_tokenizer().convert_tokens_to_ids(known) == 9
    other = service.create_training_client(base, LoraConfig(4, seed=0, add_tokens=NEW))
    tokenizer = other.get_tokenizer()
    assert logprobs(client, tokenizer) == pytest.approx(logprobs(other, tokenizer), abs=1e-5)
    folder = Path(client.save_state("a").result().path)
    rows = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["trainable_token_indices"]
    assert all(9 in indices for indices in rows.values())
    service.close()


@pytest.mark.slow
def test_clients_with_and_without_added_tokens_share_no_model(base: str, tmp_path: Path) -> None:
    service = ServiceClient(device="cpu", checkpoint_dir=tmp_path)
    client = service.create_training_client(base, LoraConfig(4, seed=0, add_tokens=NEW))
    folder = client.save_state("a").result().path
    plain = service.create_training_client(base, LoraConfig(4, seed=0))
    with pytest.raises(CheckpointError, match=r"adds the tokens \['<sku>', .* this client's model \[\]"):
        plain.create_sampling_client(folder)
    service.close()


@pytest.mark.slow
def test_a_model_whose_embeddings_and_head_cannot_be_resized_together_gets_the_rows_it_has(
    tmp_path: Path,
) -> None:
    base = str(families.save("mllama", tmp_path / "base"))  # 373 tokens, 384 logits and 392 embeddings
    service = ServiceClient(device="cpu", checkpoint_dir=tmp_path / "checkpoints")
    client = service.create_training_client(base, LoraConfig(4, add_tokens=NEW))
    client.forward_backward(data(client.get_tokenizer())).result()
    many = tuple(f"<new {i}>" for i in range(12))
    with pytest.raises(ConfigError, match="needs row 384 .* has 392 and 384 rows"):
        service.create_training_client(base, LoraConfig(4, add_tokens=many))
    service.close()


@pytest.mark.parametrize("tokens", [("<a>", "<a>"), ("",), (" x",), (3,)])
def test_tokens_that_no_tokenizer_can_have_are_refused(base: str, tokens: Any) -> None:
    service = ServiceClient(device="cpu")
    with pytest.raises(ConfigError, match="add_tokens"):
        service.create_training_client(base, LoraConfig(4, add_tokens=tokens))
    service.close()
