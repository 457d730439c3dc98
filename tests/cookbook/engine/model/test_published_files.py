"""What is written from a published folder has all of its tensors, for every family of models."""

from __future__ import annotations

import json
from pathlib import Path

import families
import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from cookbook import ServiceClient
from cookbook.engine.model.published_files import ChangedFiles, PublishedFiles
from cookbook.export.chat_format import find_chat_format
from cookbook.export.merged_folder import write_merged
from cookbook.runs.find import find_trained_model
from cookbook.types import AdamParams, Datum, ModelInput
from cookbook.utils import pretrained

SOME = ["qwen3_5_moe", "llava", "deepseek_v4", "kimi_k25", "smollm3"]
"""Stacked experts and heads that transformers ignores, other names, both, and a tied head."""


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: weight for file in folder.glob("*.safetensors") for name, weight in load_file(file).items()}


def kinds(folder: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (weight.shape, weight.dtype) for name, weight in tensors(folder).items()}


@pytest.mark.cases(2)
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in SOME else pytest.mark.slow) for name in families.FAMILIES],
)
def test_changed_parameters_are_written_as_the_published_tensors_that_transformers_makes_them_of(
    name: str, tmp_path: Path
) -> None:
    folder = families.save(name, tmp_path / "published")
    before = families.load(folder)
    published = PublishedFiles(folder, pretrained.empty_causal_lm(pretrained.load_config(folder)))
    values = {key: weight.detach() + 1 for key, weight in before.named_parameters(remove_duplicate=False)}
    changed = ChangedFiles(
        published,
        {
            key: lambda value=value: value  # type: ignore[misc]
            for key, value in values.items()
            if key in published.parameters
        },
    )
    families.save(name, tmp_path / "changed")
    outline = {key: changed.outline_of(key, published.dtype_of(key), {}) for key in changed.names}
    changed.write(tmp_path / "changed", outline, "50GB")
    assert kinds(tmp_path / "changed") == kinds(folder)
    for key, weight in families.load(tmp_path / "changed").named_parameters():
        assert torch.equal(weight, values[key]), key
    old, new = tensors(folder), tensors(tmp_path / "changed")
    loaded = {key for key in new if not torch.equal(new[key], old[key])}
    assert loaded == {key for key in new if changed.is_changed(key)}
    extra = families.FAMILIES[name].extra_tensor
    assert extra is None or (extra in new and extra not in loaded)


@pytest.mark.cases(1)
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in SOME[:2] else pytest.mark.slow) for name in families.FAMILIES],
)
def test_a_merged_export_has_each_published_tensor_and_the_logits_of_base_and_adapter(
    name: str, tmp_path: Path
) -> None:
    folder = families.save(name, tmp_path / "published")
    service = ServiceClient(checkpoint_dir=tmp_path / "checkpoints")
    client = service.create_lora_training_client(str(folder), rank=4, seed=0)
    ids = np.random.default_rng(0).integers(3, 300, 24)
    for _ in range(3):
        client.forward_backward([Datum(ModelInput.from_ints(ids[:-1]), {"target_tokens": ids[1:]})])
        client.optim_step(AdamParams(learning_rate=1e-2)).result()
    path = client.save_state("trained").result().path
    service.close()
    source = find_trained_model(path)
    (tmp_path / "merged").mkdir()
    write_merged(source, find_chat_format(source), tmp_path / "merged", "auto", "1MB")
    found, expected = kinds(tmp_path / "merged"), kinds(folder)
    assert expected.items() <= found.items()
    tied = families.make(name).all_tied_weights_keys  # the adapter changes some of them alone
    assert all(key in tied or key.endswith("lm_head.weight") for key in found.keys() - expected.keys())
    architecture = [
        json.loads((one / "config.json").read_text("utf-8"))["architectures"]
        for one in (folder, tmp_path / "merged")
    ]
    assert architecture[0] == architecture[1]
    base = families.load(folder)
    before = base(input_ids=torch.tensor([ids])).logits
    adapted = PeftModel.from_pretrained(base, path)(input_ids=torch.tensor([ids])).logits
    merged = families.load(tmp_path / "merged")(input_ids=torch.tensor([ids])).logits
    torch.testing.assert_close(merged, adapted, rtol=1e-3, atol=1e-4)
    assert (merged - before).abs().max() > 0.01


@pytest.mark.slow
def test_a_full_fine_tune_has_the_tensors_the_class_and_the_files_of_the_published_folder(
    tmp_path: Path,
) -> None:
    folder = families.save("qwen3_5_moe", tmp_path / "published")
    (folder / "processor_config.json").write_text(
        '{"auto_map": {"AutoProcessor": "code.P"}, "size": 3}', "utf-8"
    )
    service = ServiceClient(checkpoint_dir=tmp_path / "checkpoints")
    client = service.create_lora_training_client(str(folder), rank=0)
    ids = np.random.default_rng(0).integers(3, 300, 12)
    client.forward_backward([Datum(ModelInput.from_ints(ids[:-1]), {"target_tokens": ids[1:]})])
    client.optim_step(AdamParams(learning_rate=1e-2)).result()
    weights = {name: weight.detach() for name, weight in client._trainer.adapter.weights.items()}
    path = Path(client.save_weights_for_sampler("full").result().path)
    service.close()
    assert kinds(path) == kinds(folder)
    old, new = tensors(folder), tensors(path)
    kept = {name for name in new if torch.equal(new[name], old[name])}
    assert {name for name in new if "visual" in name or name.startswith("mtp")} <= kept
    found = dict(families.load(path).named_parameters())
    assert all(torch.equal(found[name], weight) for name, weight in weights.items())
    assert not any("visual" in name for name in weights)
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["Qwen3_5MoeForConditionalGeneration"]
    assert json.loads((path / "processor_config.json").read_text(encoding="utf-8")) == {"size": 3}
    media = [json.loads((one / "preprocessor_config.json").read_text("utf-8")) for one in (folder, path)]
    assert media[0] == media[1] != {}


@pytest.mark.slow
def test_a_vocabulary_that_is_smaller_than_the_embeddings_stays_in_the_config(tmp_path: Path) -> None:
    folder = families.save("mllama", tmp_path / "published")
    rows = len(families.load(folder).get_input_embeddings().weight)
    service = ServiceClient(checkpoint_dir=tmp_path / "checkpoints")
    client = service.create_lora_training_client(str(folder), rank=0)
    path = Path(client.save_weights_for_sampler("full").result().path)
    service.close()
    configs = [families.load(one).config.get_text_config() for one in (folder, path)]
    assert configs[0].vocab_size == configs[1].vocab_size < rows
    assert kinds(path) == kinds(folder)


@pytest.mark.slow
def test_a_checkpoint_in_8_bits_is_dequantised_and_a_full_fine_tune_of_it_is_saved_without(
    tmp_path: Path,
) -> None:
    folder, truth = (families.save("deepseek_v3", tmp_path / name) for name in ("fp8", "plain"))
    stored, dequantised = {}, {}
    for key, weight in tensors(folder).items():
        stored[key] = dequantised[key] = weight
        if weight.ndim == 2 and "_proj" in key and not key.endswith("eh_proj.weight"):
            scale = weight.abs().max() / 448
            stored[key] = (weight / scale).to(torch.float8_e4m3fn)
            stored[f"{key}_scale_inv"] = scale.view(1, 1)
            dequantised[key] = stored[key].float() * scale
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    save_file(dequantised, truth / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    ids = list(range(3, 30))
    service = ServiceClient(device="cpu", checkpoint_dir=tmp_path / "checkpoints")

    def logprobs(path: Path) -> torch.Tensor:
        logits = families.load(path)(input_ids=torch.tensor([ids])).logits[0, :-1]
        return logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]

    client = service.create_lora_training_client(str(folder), rank=0)
    path = Path(client.save_weights_for_sampler("full").result().path)
    for found in (
        service.create_sampling_client(base_model=str(folder)),
        service.create_sampling_client(model_path=path),
    ):
        scored = torch.tensor(found.compute_logprobs(ModelInput.from_ints(ids)).result()[1:])
        torch.testing.assert_close(scored, logprobs(truth), rtol=0, atol=1e-4)
    service.close()
    assert "quantization_config" not in json.loads((path / "config.json").read_text(encoding="utf-8"))
    torch.testing.assert_close(logprobs(path), logprobs(truth), rtol=0, atol=1e-4)
