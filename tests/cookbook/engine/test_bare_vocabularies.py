"""Tests a model without pad, bos and eos tokens, and one with more rows than its tokenizer has tokens."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from tiny_tokenizer import make_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from cookbook import models
from cookbook.chat.session import ChatSession
from cookbook.clients.service import ServiceClient
from cookbook.engine.sampling.stop_rule import StopRule
from cookbook.export import export
from cookbook.export.config import ExportConfig
from cookbook.types import AdamParams, Datum, ModelInput, SamplingParams
from renderers import get_renderer

NUM_ROWS = 640
PROMPT = [40, 41, 42]


@pytest.fixture(scope="module")
def bare(make_model_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model that names no special token. Half of what it samples is beyond its tokenizer."""
    folder = make_model_folder(
        tmp_path_factory.mktemp("bare"), vocab_size=NUM_ROWS, pad_token_id=None, eos_token_id=None
    )
    tokenizer = make_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert {config.get(f"{name}_token_id") for name in ("pad", "bos", "eos")} == {None}
    assert models.get_tokenizer(str(folder)).special_tokens_map == {}
    return str(folder)


@pytest.fixture(scope="module")
def trained(bare: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A client after a step on tokens of which some are beyond the tokenizer."""
    client = ServiceClient(checkpoint_dir=tmp_path_factory.mktemp("runs")).create_lora_training_client(
        bare, rank=4, seed=0
    )
    client.forward_backward([_datum()], "cross_entropy")
    client.optim_step(AdamParams(learning_rate=0.02)).result()
    return client


@pytest.fixture(scope="module")
def saved(trained: Any) -> str:
    return str(trained.save_weights_for_sampler("bare").result().path)


def _datum() -> Datum:
    tokens = [*PROMPT, *np.random.default_rng(0).integers(0, NUM_ROWS, 30).tolist()]
    assert max(tokens) >= len(make_tokenizer())
    return Datum(ModelInput.from_ints(tokens[:-1]), {"target_tokens": tokens[1:]})


def _plain(bare: str, saved: str) -> Any:
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(bare), saved).eval()


def test_tokens_beyond_the_tokenizer_are_trained_as_in_plain_transformers(
    bare: str, trained: Any, saved: str
) -> None:
    datum = _datum()
    (output,) = trained.forward([datum], "cross_entropy").result().loss_fn_outputs
    tokens = [*datum.model_input.to_ints(), int(datum.loss_fn_inputs["target_tokens"].to_numpy()[-1])]
    with torch.no_grad():
        scores_TV = _plain(bare, saved)(torch.tensor([tokens[:-1]])).logits[0].log_softmax(-1)
    expected = scores_TV.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
    torch.testing.assert_close(output["logprobs"].to_torch(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_sampling_has_the_tokens_of_generate_also_those_beyond_the_tokenizer(
    bare: str, trained: Any, saved: str
) -> None:
    """Nothing ends such a text but its length."""
    sampler = trained.save_weights_and_get_sampling_client()
    params = SamplingParams(max_tokens=24, temperature=0.0)
    (sequence,) = sampler.sample(ModelInput.from_ints(PROMPT), 1, params).result().sequences
    expected = _plain(bare, saved).generate(
        input_ids=torch.tensor([PROMPT]), max_new_tokens=24, do_sample=False
    )
    assert list(sequence.tokens) == expected[0, len(PROMPT) :].tolist()
    assert sequence.stop_reason == "length"
    assert max(sequence.tokens) >= len(make_tokenizer())


def test_a_reply_with_unknown_tokens_is_the_text_of_the_others(bare: str, trained: Any) -> None:
    tokenizer = models.get_tokenizer(bare)
    renderer = get_renderer(models.recommended_renderer(bare), tokenizer)
    assert renderer.get_stop_sequences() == [tokenizer.convert_tokens_to_ids("<|im_end|>")]
    session = ChatSession(
        trained.save_weights_and_get_sampling_client(), renderer, SamplingParams(max_tokens=20, seed=1), 256
    )
    for question in ("Hello there", "one two"):
        turn = session.ask(question)
        shown = "".join(delta.text for delta in turn)
        reply = turn.conclude()
        assert reply.num_tokens == 20
        assert reply.message["content"] == shown + reply.rest
    hello = tokenizer.encode("Hello there")
    message, ended = renderer.parse_response([hello[0], 500, *hello[1:], 600, 2])
    assert message["content"] == "Hello there"
    assert not ended


def test_a_stop_string_is_found_behind_tokens_that_a_tokenizer_refuses_to_decode() -> None:
    """As tokenizers do that are not of the package `tokenizers`."""
    words = {"one": 0, " two": 1, " three": 2}

    class Tokenizer:
        def __len__(self) -> int:
            return len(words)

        def get_vocab(self) -> dict[str, int]:
            return words

        def decode(self, tokens: list[int]) -> str:
            return "".join(list(words)[token] for token in tokens)

    base: Any = SimpleNamespace(tokenizer=Tokenizer())
    rule = StopRule(base, SamplingParams(stop=["two three"]))
    assert not rule.is_met([0, 1, 7])
    assert rule.is_met([0, 1, 7, 2])


def test_ids_beyond_a_gap_in_a_vocabulary_are_text_as_well(tmp_path: Path) -> None:
    """A tokenizer whose largest id is above the number of its tokens."""
    make_tokenizer().save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    spec = json.loads(path.read_text(encoding="utf-8"))
    word = max(spec["model"]["vocab"], key=spec["model"]["vocab"].__getitem__)
    spec["model"]["vocab"][word] = 500
    path.write_text(json.dumps(spec), encoding="utf-8")
    tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) < 500
    message, ended = get_renderer("chat_template", tokenizer).parse_response([500, 2])
    assert message["content"] == tokenizer.decode([500]) != ""
    assert ended


def test_a_merged_export_names_the_tokens_that_end_a_reply_and_pad(
    bare: str, trained: Any, saved: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "merged"
    asyncio.run(export.main(ExportConfig(checkpoint=saved, to=str(folder), format="merged")))
    model = AutoModelForCausalLM.from_pretrained(folder)
    end = AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids("<|im_end|>")
    assert model.generation_config.eos_token_id == model.generation_config.pad_token_id == end
    assert model.get_input_embeddings().num_embeddings == NUM_ROWS
    tokens_1T = torch.tensor([_datum().model_input.to_ints()])
    with torch.no_grad():
        found, expected = model(tokens_1T).logits, _plain(bare, saved)(tokens_1T).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_base_model_without_a_template_or_special_tokens_ends_at_the_text_of_the_next_turn(
    bare: str, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(bare, tmp_path / "base"))
    (folder / "chat_template.jinja").unlink()
    tokenizer = models.get_tokenizer(str(folder))
    assert models.recommended_renderer(str(folder)) == "role_colon"
    renderer = get_renderer("role_colon", tokenizer)
    assert renderer.get_stop_sequences() == ["\n\nUser:"]
    prompt = renderer.build_generation_prompt([{"role": "user", "content": "Hello"}]).to_ints()
    assert max(prompt) < len(tokenizer)
    end = tokenizer.encode("eight\n\nUser:")
    message, ended = renderer.parse_response([500, *end])
    assert message["content"] == "eight"
    assert ended
