"""The SDK copies a checkpoint into a new run of the server."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import httpx
import pytest
import tinker

import cookbook
from cookbook.errors import RequestError

Connect = Callable[[str], tinker.ServiceClient]


@pytest.mark.slow
def test_a_copy_is_another_checkpoint_with_the_same_weights(
    server: str, connect: Connect, tiny_qwen3: str
) -> None:
    service = connect(server)
    training = service.create_lora_training_client(tiny_qwen3, rank=2, seed=3).result()
    targets = tinker.TensorData([6, 7, 8], "int64", [3])
    datum = tinker.Datum(tinker.ModelInput.from_ints([5, 6, 7]), {"target_tokens": targets})
    training.forward_backward([datum], "cross_entropy")
    training.optim_step(tinker.AdamParams(learning_rate=1e-2)).result()
    source = training.save_state("one", ttl_seconds=7200).result().path
    expected = training.forward([datum], "cross_entropy").result().loss_fn_outputs[0]["logprobs"].tolist()

    rest = service.create_rest_client()
    copy = rest.copy_weights(source, "archive").result()
    assert copy.rpartition("/")[2] == "one"
    assert copy != source
    rest.delete_checkpoint_from_tinker_path(source).result()
    again = service.create_training_client_from_state_with_optimizer(copy)
    again_logprobs = again.forward([datum], "cross_entropy").result().loss_fn_outputs[0]["logprobs"]
    assert again_logprobs.tolist() == expected
    (run,) = rest.list_training_runs(project_id="archive").result().training_runs
    assert run.last_checkpoint is not None
    assert (run.last_checkpoint.tinker_path, run.last_checkpoint.expires_at) == (copy, None)

    soon = rest.copy_weights(copy, "archive", ttl_seconds=3600).result()
    (found,) = rest.list_checkpoints(soon.split("/")[2]).result().checkpoints
    assert found.expires_at is not None
    assert abs(found.expires_at - datetime.now(UTC) - timedelta(hours=1)) < timedelta(minutes=5)
    with pytest.raises(tinker.NotFoundError):
        rest.copy_weights(source, "archive").result()
    with pytest.raises(tinker.UnprocessableEntityError, match="weights_access_token is not supported"):
        rest.copy_weights(copy, "archive", weights_access_token="secret").result()


@pytest.mark.slow
def test_a_repeated_request_copies_once(server: str, connect: Connect, tiny_qwen3: str) -> None:
    training = connect(server).create_lora_training_client(tiny_qwen3, rank=1).result()
    source = training.save_weights_for_sampler("kept").result().path
    body, url = {"source_path": source, "destination_project_id": "p"}, f"{server}/api/v1/copy_weights"
    first, second = (
        httpx.post(url, json=body, headers={"X-Idempotency-Key": "one"}).json()["tinker_path"] for _ in "ab"
    )
    other = httpx.post(url, json=body, headers={"X-Idempotency-Key": "two"}).json()["tinker_path"]
    assert first == second != other
    refused = httpx.post(url, json={**body, "session_id": "s"})
    assert refused.status_code == 422
    assert "session_id" in refused.text


@pytest.mark.slow
def test_a_service_in_process_copies_unless_it_saves_in_one_folder(
    tiny_qwen3: str, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
    with cookbook.ServiceClient(project_id="mine", device="cpu") as own:
        path = own.create_lora_training_client(tiny_qwen3, rank=1).save_state("one").result().path
        source = own.create_rest_client().list_user_checkpoints().result().checkpoints[0].tinker_path
        copy = own.copy_weights(source).result()
        assert own.create_rest_client().get_weights_info_by_tinker_path(copy).result().lora_rank == 1
        assert copy not in (source, path)
    with cookbook.ServiceClient(device="cpu", checkpoint_dir=tmp_path_factory.mktemp("one")) as one:
        refused = one.copy_weights(source)
    with pytest.raises(RequestError, match="omit checkpoint_dir"):
        refused.result()
