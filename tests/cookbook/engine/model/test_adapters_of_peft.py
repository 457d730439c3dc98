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
from peft_adapters import IDS, SETTINGS, load_with_peft, make_adapter, make_base
from safetensors.torch import load_file
from torch import Tensor

from cookbook import AdamParams, Datum, ModelInput, SamplingParams, ServiceClient
from cookbook.engine import checkpoint


@torch.no_grad()
def logprobs_with_peft(base: str, folder: Path) -> list[float]:
    logprobs = load_with_peft(base, folder)(torch.tensor([IDS])).logits[0].log_softmax(-1)
    return [float(logprobs[place, token]) for place, token in enumerate(IDS[1:])]


def steps_with_peft(base: str, folder: Path, num_steps: int, lr: float) -> dict[str, Tensor]:
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
    folder = tmp_path_factory.mktemp("base")
    return {kind: make_base(tiny_qwen3, folder / kind, kind == "tied") for kind in ("tied", "untied")}


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


@pytest.mark.cases(4)
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
    expected = steps_with_peft(base, folder, 3, lr=1e-2)
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


@pytest.mark.cases(2)
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
