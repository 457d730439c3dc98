"""Tests of ServiceClient: how clients are created, and what is refused before anything is loaded."""

from __future__ import annotations

import asyncio
import gc
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from cookbook import (
    AdamParams,
    Datum,
    ModelInput,
    SamplingParams,
    ServiceClient,
    TrainingClient,
    embedded,
)
from cookbook.engine import checkpoint
from cookbook.engine.options import EngineOptions
from cookbook.errors import CheckpointError, ConfigError, ModelError, RequestError

ADAM = AdamParams(learning_rate=1e-2)
PROMPT = ModelInput.from_ints([5, 17, 31, 8])


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceClient]:
    service = ServiceClient(device="cpu", checkpoint_dir=tmp_path_factory.mktemp("checkpoints"))
    yield service
    service.close()


def steps(client: TrainingClient, seeds: range) -> list[float]:
    futures = []
    for seed in seeds:
        tokens = np.random.default_rng(seed).integers(3, 300, 12)
        datum = Datum(ModelInput.from_ints(tokens[:-1]), {"target_tokens": tokens[1:]})
        futures.append(client.forward_backward([datum]))
        client.optim_step(ADAM)
    return [future.result().loss for future in futures]


def files(path: str) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in Path(path).glob("*.safetensors")}


@pytest.mark.slow
def test_a_client_from_a_state_with_its_optimizer_resumes_bit_for_bit(
    service: ServiceClient, tiny_qwen3: str
) -> None:
    client = service.create_lora_training_client(
        tiny_qwen3, rank=4, seed=3, train_mlp=False, alpha=8.0, user_metadata={"owner": "me"}
    )
    steps(client, range(3))
    path = client.save_state("three").result().path
    resumed = service.create_training_client_from_state_with_optimizer(path)
    assert resumed.get_info().model_data.lora_rank == 4
    assert resumed.get_info().model_data.lora_alpha == 8.0
    assert resumed.get_info().user_metadata == {"owner": "me"}
    assert steps(resumed, range(3, 6)) == steps(client, range(3, 6))
    # Unseeded samples resume as well.
    params = SamplingParams(max_tokens=8, stop_token_ids=[0])
    drawn = [c.save_weights_and_get_sampling_client().sample(PROMPT, 2, params) for c in (client, resumed)]
    assert drawn[0].sequences == drawn[1].sequences
    assert files(resumed.save_state("resumed").result().path) == files(
        client.save_state("client").result().path
    )


@pytest.mark.slow
def test_a_client_from_a_state_without_optimizer_has_the_weights_and_a_new_optimizer(
    service: ServiceClient, tiny_qwen3: str
) -> None:
    client = service.create_lora_training_client(tiny_qwen3, rank=4, seed=3)
    steps(client, range(3))
    path = client.save_state("weights", overwrite=True).result().path
    fresh = asyncio.run(service.create_training_client_from_state_async(path, user_metadata={"owner": "you"}))
    assert fresh.get_info().user_metadata == {"owner": "you"}
    before = files(fresh.save_state("fresh", overwrite=True).result().path)
    assert before["adapter_model.safetensors"] == files(path)["adapter_model.safetensors"]
    steps(client, range(3, 4))
    steps(fresh, range(3, 4))
    after = [files(c.save_state("after", overwrite=True).result().path) for c in (client, fresh)]
    assert after[0]["adapter_model.safetensors"] != after[1]["adapter_model.safetensors"]


def test_a_sampler_of_a_path_samples_like_the_client_that_saved_it(
    service: ServiceClient, tiny_qwen3: str
) -> None:
    client = service.create_lora_training_client(tiny_qwen3, rank=4, seed=3)
    steps(client, range(2))
    path = client.save_weights_for_sampler("two").result().path
    expected = client.save_weights_and_get_sampling_client().compute_logprobs(PROMPT).result()
    of_path = service.create_sampling_client(path)
    steps(client, range(2, 3))
    assert of_path.compute_logprobs(PROMPT).result() == expected
    assert client.create_sampling_client(path).compute_logprobs(PROMPT).result() == expected
    both = service.create_sampling_client(model_path=path, base_model=tiny_qwen3)
    assert both.compute_logprobs(PROMPT).result() == expected
    assert client.save_weights_and_get_sampling_client().compute_logprobs(PROMPT).result() != expected


def test_a_sampler_of_a_base_model_samples_from_the_unmodified_model(
    service: ServiceClient, tiny_qwen3: str
) -> None:
    of_base = asyncio.run(service.create_sampling_client_async(base_model=tiny_qwen3))
    before = of_base.compute_logprobs(PROMPT).result()
    steps(service.create_lora_training_client(tiny_qwen3, rank=4, seed=3), range(2))
    assert of_base.compute_logprobs(PROMPT).result() == before
    with TemporaryServiceClient() as other:
        assert other.create_sampling_client(base_model=tiny_qwen3).compute_logprobs(PROMPT).result() == before


class TemporaryServiceClient:
    def __enter__(self) -> ServiceClient:
        self._service = ServiceClient(device="cpu")
        return self._service

    def __exit__(self, *_: object) -> None:
        self._service.close()


def test_one_model_under_two_names_is_loaded_once(
    service: ServiceClient, tiny_qwen3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plain PEFT folder names its base by its path, whatever name the user gives."""
    monkeypatch.chdir(Path(tiny_qwen3).parent)
    by_path = service.create_lora_training_client(tiny_qwen3, rank=1)
    for name in (f"./{Path(tiny_qwen3).name}", Path(tiny_qwen3).name, f"{tiny_qwen3}/"):
        by_name = service.create_lora_training_client(name, rank=1)
        assert by_name._engine is by_path._engine


@pytest.mark.parametrize("head", [[], ["lm_head"]])
def test_a_plain_peft_adapter_can_be_trained_on_and_sampled_from(
    service: ServiceClient, tiny_qwen3: str, tmp_path: Path, head: list[str]
) -> None:
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_qwen3),
        PeftLoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", *head]),
    )
    model.save_pretrained(tmp_path / "plain")
    client = service.create_training_client_from_state(tmp_path / "plain")
    assert client.get_info().lora_rank == 2
    sampler = service.create_sampling_client(tmp_path / "plain")
    assert (
        sampler.compute_logprobs(PROMPT).result()
        == client.save_weights_and_get_sampling_client().compute_logprobs(PROMPT).result()
    )
    steps(client, range(1))


@pytest.mark.slow
def test_a_damaged_checkpoint_creates_no_client_and_leaves_no_adapter(
    service: ServiceClient, tiny_qwen3: str, tmp_path: Path
) -> None:
    client = service.create_lora_training_client(tiny_qwen3, rank=4, seed=3)
    path = Path(client.save_state("sound").result().path)
    gc.collect()
    before = adapters(client)
    damaged = tmp_path / "damaged"
    shutil.copytree(path, damaged)
    weights = load_file(damaged / "adapter_model.safetensors")
    weights.popitem()
    (damaged / "state.json").unlink()
    save_file(weights, damaged / "adapter_model.safetensors")
    for create in (service.create_sampling_client, client.create_sampling_client):
        with pytest.raises(CheckpointError, match="does not fit"):
            create(damaged)
        with pytest.raises(CheckpointError, match="does not exist"):
            create(tmp_path / "none")
    assert adapters(client) == before
    with pytest.raises(CheckpointError, match="has no optimizer state"):
        service.create_training_client_from_state_with_optimizer(
            client.save_weights_for_sampler("weights-alone").result().path
        )


def adapters(client: TrainingClient) -> set[str]:
    return client._engine.submit(lambda: set(client._engine.base.adapters._peft.peft_config)).result()


def test_without_a_checkpoint_dir_every_training_client_has_its_own(
    tiny_qwen3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with TemporaryServiceClient() as service:
        paths = [
            Path(service.create_lora_training_client(tiny_qwen3, rank=1).save_state("name").result().path)
            for _ in range(2)
        ]
    assert paths[0] != paths[1]
    assert {path.parents[1] for path in paths} == {tmp_path / ".cookbook" / "checkpoints"}


def test_the_capabilities_name_the_embedded_model_and_the_devices(service: ServiceClient) -> None:
    capabilities = service.get_server_capabilities()
    assert capabilities.supported_models[0].model_name == embedded.MODEL_NAME
    assert capabilities.devices[0] == "cpu"


def test_a_rank_below_zero_is_refused(service: ServiceClient, tiny_qwen3: str) -> None:
    with pytest.raises(
        ConfigError, match="Invalid rank=-1: must be 1 to 16,384 for a LoRA, or 0 to train the model"
    ):
        service.create_lora_training_client(tiny_qwen3, rank=-1)


def test_a_full_fine_tune_refuses_the_options_of_lora_layers(service: ServiceClient, tiny_qwen3: str) -> None:
    with pytest.raises(ConfigError, match="rank=0 trains every weight"):
        service.create_lora_training_client(tiny_qwen3, rank=0, train_mlp=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "gpu"}, "device='gpu' is not a torch device. Use auto, cpu, cuda or cuda:0"),
        ({"device": "cuda:99"}, "device='cuda:99', but this machine has"),
        ({"dtype": "int8"}, "dtype='int8' is not supported. Use auto, float32, bfloat16, float16"),
    ],
)
def test_a_missing_device_or_dtype_is_refused(tiny_qwen3: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ServiceClient(**options).create_lora_training_client(tiny_qwen3)


def test_a_sampler_needs_a_path_or_a_model(service: ServiceClient) -> None:
    with pytest.raises(RequestError, match=r"Give model_path .* or base_model"):
        service.create_sampling_client()


def test_a_missing_model_is_refused_and_can_be_loaded_later(
    service: ServiceClient, tiny_qwen3: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match="neither a folder on this machine nor a hub id"):
        service.create_lora_training_client(str(tmp_path / "model"))
    shutil.copytree(tiny_qwen3, tmp_path / "model")
    service.create_lora_training_client(str(tmp_path / "model"), rank=1)


def test_a_service_s_metadata_is_saved_with_its_clients_and_checkpoints(
    tiny_qwen3: str, tmp_path: Path
) -> None:
    given = {"a": "b", "c": "d"}
    service = ServiceClient(given, "project", device="cpu", checkpoint_dir=tmp_path)
    given.clear()
    client = service.create_lora_training_client(tiny_qwen3, rank=1, user_metadata={"c": "e"})
    expected = {"a": "b", "c": "e", "project_id": "project"}
    assert client.get_info().user_metadata == expected
    path = client.save_state("saved").result().path
    assert checkpoint.read_info(path).user_metadata == expected
    again = service.create_training_client_from_state(path, tiny_qwen3, {"c": "f"})
    assert again.get_info().user_metadata == {**expected, "c": "f"}
    service.close()


def test_engine_options_are_not_accepted_by_position() -> None:
    with pytest.raises(RequestError, match=r"Invalid user_metadata='cpu': must map .* device="):
        ServiceClient("cpu")  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        ServiceClient({}, "project", "cpu")  # type: ignore[misc]


@pytest.mark.slow
def test_another_base_model_is_accepted_for_an_adapter_but_not_for_a_full_fine_tune(
    service: ServiceClient, tiny_qwen3: str, make_model_folder: Any, tmp_path: Path
) -> None:
    client = service.create_lora_training_client(tiny_qwen3, rank=2, seed=0)
    path = client.save_state("for-another-base").result().path
    other = str(make_model_folder(tmp_path / "longer", max_position_embeddings=512))
    assert service.create_training_client_from_state(path, other).get_info().model_name == other
    full = service.create_lora_training_client(tiny_qwen3, rank=0).save_state("full-of-its-own").result().path
    with pytest.raises(RequestError, match="which is a full fine-tune and has no base"):
        service.create_training_client_from_state(full, other)


def test_engine_options_are_given_by_name_or_in_one_object() -> None:
    options = EngineOptions(device="cpu", dtype="float32", max_tokens_per_microbatch=64)
    by_name = ServiceClient(device="cpu", dtype="float32", max_tokens_per_microbatch=64)
    in_one = ServiceClient(options=options)
    assert by_name._options == in_one._options == options
    with pytest.raises(ConfigError, match="options= and some of its parts by name"):
        ServiceClient(options=options, device="cpu")
