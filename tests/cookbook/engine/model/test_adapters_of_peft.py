"""Tests that an adapter made with PEFT is continued, sampled from and saved as it is.

The truth is PEFT's own model on plain transformers: its logits, its gradients, and what it reads again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from cookbook import AdamParams, Datum, ModelInput, SamplingParams, ServiceClient
from cookbook.engine import checkpoint

IDS = [5, 9, 11, 42, 7, 3, 9, 60]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]

SETTINGS: dict[str, dict[str, Any]] = {
    "some modules": {"target_modules": ["q_proj", "down_proj"]},
    "one module by its full name": {"target_modules": ["model.layers.1.mlp.up_proj"]},
    "a regex": {"target_modules": r".*layers\.[01]\.(self_attn\.[qv]_proj|mlp\.up_proj)"},
    "all-linear": {"target_modules": "all-linear"},
    "excluded modules": {"target_modules": "all-linear", "exclude_modules": r".*layers\.0\.mlp.*"},
    "one layer": {"target_modules": ATTENTION, "layers_to_transform": [1], "layers_pattern": "layers"},
    "ranks and alphas by pattern": {
        "target_modules": [*ATTENTION, "up_proj"],
        "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\..*": 6},
        "alpha_pattern": {"v_proj": 3, r"model.layers.0.self_attn.o_proj": 20},
    },
    "rsLoRA": {"target_modules": ATTENTION, "use_rslora": True, "rank_pattern": {"k_proj": 3}},
    "DoRA": {"target_modules": [*ATTENTION, "down_proj"], "use_dora": True},
    "a head": {"target_modules": ["q_proj", "lm_head"]},
    "a LoRA on embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "a saved head": {"target_modules": ATTENTION, "modules_to_save": ["lm_head"]},
    "saved embeddings": {"target_modules": ATTENTION, "modules_to_save": ["embed_tokens"]},
    "saved embeddings and head": {
        "target_modules": ATTENTION,
        "modules_to_save": ["embed_tokens", "lm_head"],
    },
    "a saved norm": {"target_modules": ["q_proj"], "modules_to_save": ["input_layernorm"]},
    "trained tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [9, 3, 60]},
    "trained tokens by module": {
        "target_modules": ["q_proj"],
        "trainable_token_indices": {"embed_tokens": [9, 11], "lm_head": [9, 11]},
    },
}


def make_adapter(folder: Path, base: str, **settings: Any) -> Path:
    """Saves an adapter with PEFT none of whose weights is as it was initialised."""
    torch.manual_seed(1)
    config = peft.LoraConfig(**{"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, **settings})
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight += torch.randn_like(weight) * 0.2
    model.save_pretrained(folder)
    return folder


def load_with_peft(base: str, folder: Path, is_trainable: bool = False) -> Any:
    model = AutoModelForCausalLM.from_pretrained(base)
    return peft.PeftModel.from_pretrained(model, str(folder), is_trainable=is_trainable).eval()


@torch.no_grad()
def logprobs_with_peft(base: str, folder: Path) -> list[float]:
    logprobs = load_with_peft(base, folder)(torch.tensor([IDS])).logits[0].log_softmax(-1)
    return [float(logprobs[place, token]) for place, token in enumerate(IDS[1:])]


def sgd_steps_with_peft(base: str, folder: Path, num_steps: int, lr: float) -> dict[str, Tensor]:
    """Returns the weights after AdamW steps of PEFT's own model, by the names under which PEFT saves them."""
    model = load_with_peft(base, folder, is_trainable=True)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.0)
    for _ in range(num_steps):
        logits = model(torch.tensor([IDS[:-1]])).logits[0]
        torch.nn.functional.cross_entropy(logits, torch.tensor(IDS[1:]), reduction="sum").backward()
        optimizer.step()
        optimizer.zero_grad()
    saved = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: weight.detach() for name, weight in saved.items()}


@pytest.fixture(scope="module")
def bases(tiny_qwen3: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Returns a model whose head is tied to its embeddings, and one with its own head."""
    folders = {}
    for name, is_tied in (("tied", True), ("untied", False)):
        model = AutoModelForCausalLM.from_pretrained(tiny_qwen3)
        model.config.tie_word_embeddings = is_tied
        if not is_tied:
            torch.manual_seed(3)
            model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight) * 0.3)
        folder = tmp_path_factory.mktemp("base") / name
        model.save_pretrained(folder)
        for file in Path(tiny_qwen3).glob("token*"):
            (folder / file.name).write_bytes(file.read_bytes())
        folders[name] = str(folder)
    return folders


@pytest.fixture(scope="module")
def service() -> Any:
    service = ServiceClient(device="cpu")
    yield service
    service.close()


def cases(are_quick: set[str]) -> list[Any]:
    """Returns every setting on both kinds of models. All but the named ones are slow."""
    return [
        pytest.param(
            kind,
            settings,
            id=f"{name}-{kind}",
            marks=() if f"{name}-{kind}" in are_quick else pytest.mark.slow,
        )
        for name, settings in SETTINGS.items()
        for kind in ("untied", "tied")
    ]


@pytest.mark.parametrize(
    ("kind", "settings"),
    cases(
        {f"{name}-untied" for name in SETTINGS} | {"trained tokens-tied", "saved embeddings and head-tied"}
    ),
)
def test_an_adapter_of_peft_is_continued_as_peft_itself_would(
    bases: dict[str, str], service: ServiceClient, tmp_path: Path, kind: str, settings: dict[str, Any]
) -> None:
    base, folder = bases[kind], make_adapter(tmp_path / "adapter", bases[kind], **settings)
    client = service.create_training_client_from_state(folder, base_model=base)
    datum = Datum(ModelInput.from_ints(IDS[:-1]), {"target_tokens": IDS[1:]})
    before = client.forward([datum]).result().loss_fn_outputs[0]["logprobs"].tolist()
    assert before == pytest.approx(logprobs_with_peft(base, folder), abs=2e-4)
    for _ in range(3):
        client.forward_backward([datum])
        client.optim_step(AdamParams(1e-2, eps=1e-6)).result()
    saved = Path(client.save_state("a").result().path)
    expected = sgd_steps_with_peft(base, folder, 3, lr=1e-2)
    found = load_file(saved / checkpoint.ADAPTER_FILE)
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, atol=2e-3, rtol=1e-2)
    after = client.forward([datum]).result().loss_fn_outputs[0]["logprobs"].tolist()
    assert after != pytest.approx(before, abs=1e-3)
    assert after == pytest.approx(logprobs_with_peft(base, saved), abs=2e-4)
    was, now = (
        json.loads((one / "adapter_config.json").read_text(encoding="utf-8")) for one in (folder, saved)
    )
    for key in was.keys() - {"base_model_name_or_path", "inference_mode", "peft_version"}:
        assert now[key] == was[key], key
    client.close()


@pytest.mark.parametrize(
    ("kind", "settings"),
    cases(
        {"ranks and alphas by pattern-untied", "DoRA-tied", "saved embeddings-tied", "trained tokens-tied"}
    ),
)
def test_an_adapter_of_peft_is_sampled_from_with_its_own_distribution(
    bases: dict[str, str], service: ServiceClient, tmp_path: Path, kind: str, settings: dict[str, Any]
) -> None:
    base, folder = bases[kind], make_adapter(tmp_path / "adapter", bases[kind], **settings)
    sampler = service.create_sampling_client(model_path=folder, base_model=base)
    scored = sampler.compute_logprobs(ModelInput.from_ints(IDS)).result()
    assert scored[1:] == pytest.approx(logprobs_with_peft(base, folder), abs=2e-4)
    params = SamplingParams(max_tokens=6, temperature=0, stop=[])
    sequence = sampler.sample(ModelInput.from_ints(IDS), 1, params).result().sequences[0]
    with torch.no_grad():
        model, tokens = load_with_peft(base, folder), list(IDS)
        for token, logprob in zip(sequence.tokens, sequence.logprobs or [], strict=True):
            logprobs = model(torch.tensor([tokens])).logits[0, -1].log_softmax(-1)
            assert int(logprobs.argmax()) == token
            assert logprob == pytest.approx(float(logprobs[token]), abs=2e-4)
            tokens.append(token)
    sampler.close()
