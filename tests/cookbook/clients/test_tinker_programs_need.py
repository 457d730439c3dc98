"""What programs written for the Tinker SDK do with clients, values and checkpoints."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import pickle
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
import torch

import cookbook
from cookbook import (
    AdamParams,
    APIFuture,
    Datum,
    ImageChunk,
    ModelInput,
    ParsedCheckpointTinkerPath,
    RestClient,
    SamplingClient,
    SamplingParams,
    ServiceClient,
    TensorData,
    TrainingClient,
)
from cookbook.engine import checkpoint_root
from cookbook.engine.checkpoint_root import CheckpointRoot
from cookbook.errors import CheckpointError, ClosedError, ConfigError, RequestError, TrainingError
from cookbook.runs.checkpoints import CheckpointLog, read_records
from cookbook.runs.find import find_trained_model
from cookbook.types import EncodedTextChunk, PromptProvenanceSpan, SampledProvenanceSpan

PROMPT = ModelInput.from_ints([5, 17, 31, 8])
GREEDY = SamplingParams(max_tokens=4, temperature=0.0, stop=[])


class ServiceOfTinker(ServiceClient):
    _says_tinker_paths = True


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("HOME", str(folder))
    return folder


@pytest.fixture
def service() -> Iterator[ServiceClient]:
    with ServiceOfTinker(device="cpu") as service:
        yield service


@pytest.fixture
def client(service: ServiceClient, tiny_qwen3: str) -> TrainingClient:
    return service.create_lora_training_client(tiny_qwen3, rank=2, seed=0, user_metadata={"made": "here"})


def expire(run: Path, name: str) -> None:
    """Lets a checkpoint expire a minute ago."""
    path = run / name / "state.json"
    state = json.loads(path.read_text(encoding="utf-8"))
    state["expires_at"] = (datetime.now(UTC) - timedelta(minutes=1)).isoformat()
    path.write_text(json.dumps(state), encoding="utf-8")


# -- clients ------------------------------------------------------------------------------------


def test_clients_are_futures_of_themselves(client: TrainingClient) -> None:
    sampler = client.save_weights_and_get_sampling_client()
    for one in (client, sampler):
        assert isinstance(one, APIFuture)
        assert one.result(timeout=1) is one
        assert one.future().result() is one
        assert asyncio.run(one.coroutine()) is one
        assert asyncio.run(one.result_async()) is one
        assert one.done()


def test_a_future_answers_as_a_future_of_concurrent_futures_and_as_a_coroutine(
    client: TrainingClient,
) -> None:
    datum = Datum(PROMPT, {"target_tokens": [17, 31, 8, 9]})
    future = client.forward([datum])
    assert future.future().result(timeout=60) is future.result()
    assert asyncio.run(future.coroutine()) is future.result()
    failing = client.forward_backward_custom([datum], lambda data, logprobs: None)
    assert isinstance(failing.future().exception(timeout=60), TrainingError)


def test_a_service_takes_the_arguments_of_the_sdk_and_refuses_those_of_a_server(tiny_qwen3: str) -> None:
    with ServiceClient({"a": "b"}, "project", display_name="shown", api_key="tml-x", device="cpu") as service:
        client = service.create_lora_training_client(tiny_qwen3, rank=1)
        expected = {"a": "b", "project_id": "project", "display_name": "shown"}
        assert client.get_info().user_metadata == expected
        assert client.get_info().is_lora
        assert client.get_info().model_data.tokenizer_id == tiny_qwen3
        with pytest.raises(RequestError, match="weights_access_token is for checkpoints of other accounts"):
            client.load_state("x", "token")
    with pytest.raises(ClosedError):
        service.create_lora_training_client(tiny_qwen3)
    with pytest.raises(ClosedError):
        client.get_info()
    assert service.close("success").result() is None
    with pytest.raises(ConfigError, match=r"base_url='http://x' names a server"):
        ServiceClient(base_url="http://x")


def test_a_step_takes_its_settings_by_both_names_and_as_they_are_when_it_is_called(
    client: TrainingClient, service: ServiceClient, tiny_qwen3: str
) -> None:
    other = service.create_lora_training_client(tiny_qwen3, rank=2, seed=0)
    data = [Datum(PROMPT, {"target_tokens": [17, 31, 8, 9]})]
    params = AdamParams(learning_rate=1e-2)
    client.forward_backward(data)
    client.optim_step(optim_params=params)
    params.learning_rate = 5.0
    other.forward_backward(data)
    other.optim_step(adam_params=AdamParams(learning_rate=1e-2))
    assert client.forward(data).result().loss == other.forward(data).result().loss
    with pytest.raises(RequestError, match="one set of settings"):
        client.optim_step()
    params.learning_rate = -1.0
    with pytest.raises(RequestError, match="Invalid learning_rate"):
        client.optim_step(params)


@pytest.mark.slow
def test_an_empty_stop_turns_stopping_off(client: TrainingClient) -> None:
    sampler = client.save_weights_and_get_sampling_client()
    params = SamplingParams(max_tokens=40, seed=1, stop=[])
    assert len(sampler.sample(PROMPT, 1, params).result().sequences[0].tokens) == 40


@pytest.mark.slow
def test_sequences_have_ids_of_their_own(client: TrainingClient) -> None:
    sampler = client.save_weights_and_get_sampling_client()
    responses = [sampler.sample(PROMPT, 3, GREEDY).result() for _ in range(2)]
    ids = [one.sequence_id for response in responses for one in response.sequences]
    assert len(set(ids)) == 6
    assert all(ids)


def _sample(client: SamplingClient) -> list[int]:
    return client.sample(PROMPT, 1, GREEDY).result().sequences[0].tokens


@pytest.mark.slow
def test_a_sampling_client_is_itself_when_unpickled_here_and_samples_the_same_elsewhere(
    client: TrainingClient,
) -> None:
    client.forward_backward([Datum(PROMPT, {"target_tokens": [17, 31, 8, 9]})])
    client.optim_step(AdamParams(learning_rate=0.1)).result()
    sampler = client.save_weights_and_get_sampling_client()
    assert pickle.loads(pickle.dumps(sampler)) is sampler
    expected = _sample(sampler)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(_sample, (sampler,)) == expected
        handle = sampler.get_sampler_handle()
        assert pool.apply(_sample_by_handle, (handle,)) == expected
    with pytest.raises(RequestError, match="not a handle"):
        SamplingClient.from_sampler_handle("bm9uZQ==")
    assert sampler.get_base_model() == client.get_info().model_name


def _sample_by_handle(handle: str) -> list[int]:
    return _sample(SamplingClient.from_sampler_handle(handle))


# -- values -------------------------------------------------------------------------------------


def test_values_are_dumped_copied_and_made_from_mappings() -> None:
    params = SamplingParams(max_tokens=3, stop=["a"])
    dumped = params.model_dump(exclude_none=True)
    assert dumped["stop"] == ["a"]
    assert "seed" not in dumped
    assert SamplingParams.model_validate_json(params.model_dump_json()) == params
    changed = params.model_copy(update={"max_tokens": 4})
    assert (changed.max_tokens, params.max_tokens) == (4, 3)
    datum = Datum.model_validate(
        {"model_input": {"chunks": [{"type": "encoded_text", "tokens": [1, 2]}]}, "loss_fn_inputs": {}}
    )
    assert datum.model_input == ModelInput.from_ints([1, 2])
    assert datum.model_input.model_dump() == {"chunks": [{"tokens": [1, 2], "type": "encoded_text"}]}
    with pytest.raises(RequestError, match="SamplingParams has no field 'max_token'"):
        SamplingParams.model_validate({"max_token": 3})


def test_images_can_be_named_and_are_refused_by_name(client: TrainingClient) -> None:
    image = ImageChunk(data=b"abc", format="png", expected_tokens=7)
    assert ImageChunk.model_validate(image.model_dump(mode="json")) == image
    mixed = ModelInput(chunks=[EncodedTextChunk(tokens=[5]), image])
    assert mixed.length == 8
    with pytest.raises(RequestError, match=r"Chunk 1 of the model input is an ImageChunk, .* text only"):
        client.forward([Datum(mixed, {"target_tokens": [5]})])
    with pytest.raises(RequestError, match="ImageChunk"):
        client.save_weights_and_get_sampling_client().sample(mixed)


def test_a_list_of_chunks_can_be_cleared_afterwards() -> None:
    tokens, chunks = [1, 2], [EncodedTextChunk(tokens=[7])]
    chunk, whole = EncodedTextChunk(tokens=tokens), ModelInput(chunks=chunks)
    tokens.clear()
    chunks.clear()
    assert chunk.tokens == [1, 2]
    assert whole.to_ints() == [7]


@pytest.mark.parametrize("pad", [0, -1])
def test_sparse_tensors_are_those_of_torch(pad: int) -> None:
    dense = torch.full((5, 6), pad)
    dense[1, 2], dense[4, 0], dense[4, 5] = 9, 8, 7
    sparse = TensorData.from_torch_sparse(dense, pad_value=pad)
    expected = (dense - pad).to_sparse_csr()
    assert sparse.sparse_crow_indices == expected.crow_indices().tolist()
    assert sparse.sparse_col_indices == expected.col_indices().tolist()
    assert sparse.data == [9, 8, 7]
    assert torch.equal(sparse.to_torch(pad), dense)
    assert TensorData.model_validate(sparse.model_dump()) == sparse
    assert TensorData.from_torch_sparse(torch.arange(6).view(2, 3)).sparse_crow_indices is None
    with pytest.raises(RequestError, match="the column indices"):
        TensorData([1], "int64", [2, 2], [0, 1, 1], [2])


def test_provenance_covers_every_position_exactly() -> None:
    datum = Datum(ModelInput.from_ints([1, 2, 3]), {"target_tokens": [2, 3, 4]})
    prompt = PromptProvenanceSpan(sequence_id="a", length=2)
    sampled = SampledProvenanceSpan(sequence_id="a", length=1)
    named = datum.with_provenance([prompt, sampled], [prompt, sampled])
    assert named.loss_fn_input_spans == [prompt, sampled]
    assert named.loss_fn_inputs == datum.loss_fn_inputs
    with pytest.raises(RequestError, match="cover 2 positions, and it has 3"):
        datum.with_provenance([prompt], [prompt, sampled])
    with pytest.raises(RequestError, match="Give both"):
        Datum(datum.model_input, {}, [prompt, sampled])
    with pytest.raises(RequestError, match="sequence_id"):
        SampledProvenanceSpan(sequence_id="", length=1)


def test_errors_are_caught_by_the_names_of_the_sdk(client: TrainingClient) -> None:
    assert cookbook.TinkerError is cookbook.CookbookError
    with pytest.raises(cookbook.BadRequestError) as caught:
        client.forward([])
    assert (caught.value.status_code, caught.value.message) == (400, str(caught.value))
    with pytest.raises(cookbook.NotFoundError):
        client.load_state("/nowhere").result()
    with pytest.raises(cookbook.RequestFailedError):
        client.optim_step(AdamParams()).result()


# -- checkpoints ----------------------------------------------------------------------------------


def test_checkpoints_are_listed_described_and_removed_by_their_paths(
    client: TrainingClient, service: ServiceClient, home: Path, tiny_qwen3: str
) -> None:
    state = client.save_state("one", user_metadata={"more": "there"}).result().path
    sampler = client.save_weights_for_sampler("one", 3600).result().path
    assert state == f"tinker://{client.model_id}/weights/one"
    assert sampler == f"tinker://{client.model_id}/sampler_weights/one"
    assert (home / ".cookbook/checkpoints" / client.model_id / "one/state.json").is_file()
    parsed = ParsedCheckpointTinkerPath.from_tinker_path(sampler)
    assert (parsed.training_run_id, parsed.checkpoint_type) == (client.model_id, "sampler")

    rest = service.create_rest_client()
    (run,) = rest.list_training_runs().result().training_runs
    assert (run.training_run_id, run.base_model, run.lora_rank) == (client.model_id, tiny_qwen3, 2)
    found = rest.list_checkpoints(client.model_id).result().checkpoints
    assert {one.tinker_path for one in found} == {state, sampler}
    kinds = {one.checkpoint_type: one for one in found}
    assert kinds["training"].user_metadata == {"made": "here", "more": "there"}
    assert kinds["training"].expires_at is None
    assert kinds["sampler"].expires_at is not None
    assert asyncio.run(RestClient().list_user_checkpoints_async()).cursor.total_count == 2
    assert rest.get_weights_info_by_tinker_path(sampler).result().lora_rank == 2

    again = service.create_training_client_from_state_with_optimizer(state)
    assert again.get_info().lora_rank == 2
    service.create_sampling_client(model_path=sampler)
    rest.set_checkpoint_ttl_from_tinker_path(sampler, None).result()
    rest.delete_checkpoint(client.model_id, "weights/one").result()
    (left,) = rest.list_checkpoints(client.model_id).result().checkpoints
    assert (left.tinker_path, left.expires_at) == (sampler, None)
    with pytest.raises(CheckpointError, match="does not exist"):
        service.create_training_client_from_state(state)
    with pytest.raises(CheckpointError, match="no training run 'none'"):
        rest.delete_checkpoint("none", "weights/one").result()
    with pytest.raises(RequestError, match="publish_checkpoint_from_tinker_path is not supported"):
        rest.publish_checkpoint_from_tinker_path(sampler)


@pytest.mark.parametrize(
    "path",
    ["tinker://run/weights/../../x", "tinker://../weights/one", "tinker://run/one", "tinker://run/other/one"],
)
def test_a_path_does_not_lead_out_of_the_folder_of_checkpoints(path: str, home: Path) -> None:
    (home / ".cookbook/checkpoints/run").mkdir(parents=True)
    (home / ".cookbook/weights/one").mkdir(parents=True)
    with pytest.raises((CheckpointError, RequestError)):
        CheckpointRoot().folder(path)


def test_what_has_expired_is_removed_by_the_next_save_and_by_the_next_listing(
    client: TrainingClient, service: ServiceClient, home: Path
) -> None:
    run = home / ".cookbook/checkpoints" / client.model_id
    for name in ("old", "kept"):
        client.save_state(name, 3600 if name == "kept" else 60).result()
    (run / "mine").mkdir()
    expire(run, "old")
    client.save_weights_for_sampler("new", 60).result()
    assert sorted(path.name for path in run.iterdir()) == ["kept", "mine", "sampler_weights"]
    expire(run / "sampler_weights", "new")
    (left,) = RestClient().list_user_checkpoints().result().checkpoints
    assert left.checkpoint_id == "weights/kept"
    expire(run, "kept")
    with pytest.raises(CheckpointError, match="does not exist"):
        service.create_sampling_client(f"tinker://{client.model_id}/weights/kept")
    assert not (run / "kept").exists()
    assert (run / "mine").is_dir()


def test_a_link_is_not_followed_when_expired_checkpoints_are_removed(
    client: TrainingClient, home: Path, tmp_path: Path
) -> None:
    client.save_state("one", 60).result()
    run = home / ".cookbook/checkpoints" / client.model_id
    expire(run, "one")
    (run / "one").rename(tmp_path / "elsewhere")
    (run / "link").symlink_to(tmp_path / "elsewhere")
    checkpoint_root.remove_expired(run)
    assert (tmp_path / "elsewhere/state.json").is_file()


def test_weights_for_other_programs_are_files_that_can_be_downloaded_and_decrypted(
    client: TrainingClient,
) -> None:
    pyrage = pytest.importorskip("pyrage")
    plain = client.save_weights_external("plain").result().path
    identity = pyrage.x25519.Identity.generate()
    locked = client.save_weights_external("locked", 60, [str(identity.to_public())]).result().path
    rest = RestClient()
    urls, encrypted = (rest.get_external_weights_urls(path).result().urls for path in (plain, locked))
    assert set(urls) == {"adapter_config.json", "adapter_model.safetensors", "README.md"} & set(urls)
    assert set(encrypted) == {f"{name}.age" for name in urls}
    for name, url in urls.items():
        content = Path(encrypted[f"{name}.age"].removeprefix("file://")).read_bytes()
        assert pyrage.decrypt(content, [identity]) == Path(url.removeprefix("file://")).read_bytes()
    rest.delete_checkpoint_from_tinker_path(locked).result()


# -- checkpoints.jsonl ------------------------------------------------------------------------------


def test_a_run_s_records_have_the_keys_of_tinker_cookbook_and_may_be_moved(
    client: TrainingClient, tmp_path: Path, service: ServiceClient
) -> None:
    log = CheckpointLog(tmp_path / "run")
    folder = service._root.folder(client.save_state("one").result().path)
    for name in ("000001", "final"):
        path = tmp_path / "run/checkpoints" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(["cp", "-r", folder, path], check=True)
        log.add(name, str(path), 1, 0, 1)
    rows = [
        json.loads(line)
        for line in (tmp_path / "run/checkpoints.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert [(row["name"], row.get("final"), row["batch"], row["epoch"]) for row in rows] == [
        ("000001", None, 1, 0),
        ("final", True, 1, 0),
    ]
    assert {rows[1]["state_path"], rows[1]["sampler_path"]} == {str(tmp_path / "run/checkpoints/final")}
    service.create_training_client_from_state_with_optimizer(rows[1]["state_path"])
    (tmp_path / "run").rename(tmp_path / "moved")
    assert find_trained_model(str(tmp_path / "moved")).folder == tmp_path / "moved/checkpoints/final"


def test_records_of_tinker_cookbook_are_found_and_never_removed(
    client: TrainingClient, tmp_path: Path
) -> None:
    state = client.save_state("000002").result().path
    sampler = client.save_weights_for_sampler("final").result().path
    rows = [
        {"name": "000002", "batch": 2, "epoch": 0, "state_path": state, "note": "by a program"},
        {"name": "final", "batch": 4, "epoch": 1, "final": True, "step": 4, "sampler_path": sampler},
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "checkpoints.jsonl").write_text(text, encoding="utf-8")
    records = read_records(tmp_path / "checkpoints.jsonl")
    assert [(one.name, one.step, one.epoch, one.batch) for one in records] == [
        ("000002", 2, 0, 2),
        ("final", 4, 1, 4),
    ]
    found = find_trained_model(str(tmp_path))
    assert found.folder == Path(CheckpointRoot().folder(sampler))
    assert found.step == 4
    log = CheckpointLog(tmp_path, keep=1)
    path = tmp_path / "checkpoints/new"
    path.mkdir(parents=True)
    log.add("new", str(path), 5, 1, 1)
    assert [one.name for one in read_records(tmp_path / "checkpoints.jsonl")] == ["new"]
    assert Path(CheckpointRoot().folder(state)).is_dir()


# -- the name tinker ----------------------------------------------------------------------------------


PROGRAM = """
import importlib
import multiprocessing
import subprocess
import sys
import tinker
from tinker import types
from tinker.types.tensor_data import TensorData
from tinker.lib.public_interfaces import APIFuture
from tinker.lib.public_interfaces.rest_client import RestClient


def main():
    assert types.Datum is tinker.Datum and TensorData is tinker.TensorData
    with tinker.ServiceClient() as service:
        client = service.create_lora_training_client(base_model=sys.argv[1], rank=1).result()
        assert isinstance(client, tinker.TrainingClient)
        datum = types.Datum(types.ModelInput.from_ints([5, 6]), {"target_tokens": [6, 7]})
        client.forward_backward([datum], "cross_entropy").result()
        client.optim_step(types.AdamParams(learning_rate=1e-3)).result()
        print(client.save_state("x").result().path.split("/")[0], __name__)
    code = "import tinker; print(tinker.ServiceClient)"
    print(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print("in a pool:", pool.apply(name_of_service))
    try:
        importlib.import_module("tinker.proto")
    except ModuleNotFoundError as error:
        print(error)


def name_of_service():
    return tinker.ServiceClient.__name__


if __name__ == "__main__":
    main()
"""


@pytest.mark.slow
def test_a_program_runs_unchanged_under_the_name_tinker(tiny_qwen3: str, tmp_path: Path, home: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM, encoding="utf-8")
    command = [sys.executable, "-m", "recipes.tinker", str(tmp_path / "program.py"), tiny_qwen3]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("tinker: __main__\n")
    assert "The module tinker.proto of the Tinker SDK" in done.stdout
    assert "<class 'cookbook.clients.as_tinker.TinkerServiceClient'>\n" in done.stdout
    assert "in a pool: TinkerServiceClient\n" in done.stdout


@pytest.mark.slow
def test_the_sdk_is_not_replaced_once_it_is_imported() -> None:
    code = (
        "import sys, types, cookbook\n"
        "sys.modules['tinker'] = types.ModuleType('tinker'); sys.modules['tinker'].__file__ = 'x'\n"
        "cookbook.install_as_tinker()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ConfigError: The package tinker is imported already" in done.stderr


@pytest.mark.slow
def test_arrays_of_results_are_there_too(client: TrainingClient) -> None:
    sampler = client.save_weights_and_get_sampling_client()
    response = sampler.sample(PROMPT, 1, GREEDY, include_prompt_logprobs=True).result()
    assert response.sequences[0].tokens_np.tolist() == response.sequences[0].tokens
    assert np.isnan(response.prompt_logprobs_np[0])
    assert response.prompt_logprobs_np[1:].tolist() == pytest.approx(response.prompt_logprobs[1:])
