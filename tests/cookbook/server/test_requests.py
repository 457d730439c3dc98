"""What the server does with requests that the SDK sends rarely, and with those of others."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import tinker
import zstandard
from tinker.proto import tinker_public_pb2 as pb
from waiting import wait_until

import cookbook
from cookbook.clients.service import ServiceClient
from cookbook.errors import ConfigError
from cookbook.server.options import ServerOptions
from cookbook.server.promises import Promise
from cookbook.server.serving import serving
from cookbook.server.sessions import Turns
from cookbook.server.store import CheckpointStore

KEY = "tml-" + "k" * 20


@pytest.fixture(scope="module")
def address(service: ServiceClient, tiny_qwen3: str, folder: Path) -> Iterator[str]:
    options = ServerOptions(
        [tiny_qwen3], folder, port=0, max_request_mib=0.05, poll_seconds=5.0, session_timeout_seconds=60.0
    )
    with serving(options, service) as address:
        yield address


@pytest.fixture
def http(address: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"{address}/api/v1", timeout=60) as client:
        yield client


@pytest.fixture
def session(http: httpx.Client) -> str:
    return str(created(http)["session_id"])


@pytest.fixture
def model(http: httpx.Client, session: str, tiny_qwen3: str) -> str:
    body = {
        "session_id": session, "model_seq_id": 0, "base_model": tiny_qwen3,
        "lora_config": {"rank": 2, "seed": 1},
    }  # fmt: skip
    return str(result(http, http.post("/create_model", json=body))["model_id"])


def created(http: httpx.Client, version: str = "0.38.0") -> Any:
    body = {"tags": [], "user_metadata": {}, "sdk_version": version}
    return http.post("/create_session", json=body).json()


def result(http: httpx.Client, answer: httpx.Response) -> Any:
    """Returns the result of the request that was answered with a promise."""
    assert answer.status_code == 200, answer.text
    found = http.post("/retrieve_future", json={"request_id": answer.json()["request_id"]})
    assert found.status_code == 200, found.text
    return found.content if "protobuf" in found.headers["content-type"] else found.json()


def pass_over(model: str, seq_id: int, target: int = 7) -> bytes:
    message = pb.ForwardBackwardRequest(model_id=model, seq_id=seq_id, loss_fn="cross_entropy")
    datum = message.data.add()
    datum.model_input.add().encoded_text.tokens = b"\5\0\0\0\6\0\0\0"
    targets = datum.loss_fn_inputs["target_tokens"]
    targets.dense, targets.dtype = bytes([6, *7 * [0], target, *7 * [0]]), pb.DTYPE_INT64
    return message.SerializeToString()


def send(http: httpx.Client, body: bytes, **headers: str) -> httpx.Response:
    kind = {"content-type": "application/x-protobuf", **headers}
    return http.post("/forward_backward", content=body, headers=kind)


def step(http: httpx.Client, model: str, seq_id: int) -> httpx.Response:
    body = {"model_id": model, "seq_id": seq_id, "adam_params": {"learning_rate": 1e-3}}
    return http.post("/optim_step", json=body)


def test_a_request_that_is_sent_again_is_run_once(http: httpx.Client, model: str) -> None:
    first = send(http, pass_over(model, 1))
    again = send(http, pass_over(model, 1))
    assert first.json() == again.json()
    once = result(http, step(http, model, 2))["metrics"]["grad_norm"]
    send(http, pass_over(model, 3))
    send(http, pass_over(model, 4))
    assert result(http, step(http, model, 5))["metrics"]["grad_norm"] > 1.5 * once  # two passes add up
    assert send(http, pass_over(model, 1)).json() == first.json()
    assert (
        http.post("/optim_step", json={"model_id": model, "seq_id": 1, "adam_params": {}}).status_code == 400
    )


@pytest.mark.slow
def test_requests_run_in_the_order_of_their_numbers(http: httpx.Client, model: str) -> None:
    later = [step(http, model, 4), send(http, pass_over(model, 3)), step(http, model, 2)]
    waiting = http.post("/retrieve_future", json={"request_id": later[0].json()["request_id"]})
    assert waiting.status_code == 408
    assert waiting.json()["queue_state"] == "active"
    first = send(http, pass_over(model, 1))
    for answer in (first, *later):
        result(http, answer)
    outputs = []
    for answer in (first, later[1]):
        message = pb.ForwardBackwardOutput()
        message.ParseFromString(result(http, answer))
        outputs.append(message.metrics["loss:sum"])
    assert outputs[1] < outputs[0]  # the step between the passes was taken between them


def test_bodies_are_limited_and_may_be_compressed(http: httpx.Client, model: str) -> None:
    compressed = zstandard.ZstdCompressor().compress
    result(http, send(http, compressed(pass_over(model, 1)), **{"content-encoding": "zstd"}))
    large = b"\0" * 2**20
    for body, headers in ((large, {}), (compressed(large), {"content-encoding": "zstd"})):
        answer = send(http, body, **headers)
        assert answer.status_code == 413
        assert "max_request_mib" in answer.json()["detail"]
    assert send(http, b"\xff\xff").status_code == 400
    assert send(http, b"no zstd", **{"content-encoding": "zstd"}).status_code == 400


def test_unknown_fields_and_settings_are_refused_by_name(
    http: httpx.Client, session: str, model: str, tiny_qwen3: str
) -> None:
    body = {"session_id": session, "model_seq_id": 7, "base_model": tiny_qwen3, "lora_config": {"rank": 2}}
    for changed, name in (
        ({"lora_config": {"rank": 2, "alpha": 3}}, "lora_config.alpha"),
        ({"lora_configs": {}}, "lora_configs"),
        ({"model_seq_id": None}, "model_seq_id"),
    ):
        answer = http.post("/create_model", json={**body, **changed})
        assert answer.status_code == 422
        assert name in answer.json()["detail"]
    for number, (changed, name) in enumerate(
        (
            ({"optimizer_config": {"type": "dimuon"}}, "dimuon"),
            ({"lora_config": {"rank": 0}}, "rank=0"),
            ({"lora_config": None}, "lora_config"),
            ({"base_model": "/etc"}, "does not serve '/etc'"),
            ({"user_metadata": {"a": 1}}, "user_metadata"),
        )
    ):
        answer = http.post("/create_model", json={**body, **changed, "model_seq_id": 10 + number})
        failed = result(http, answer)
        assert name in failed["error"]
        assert failed["category"] == "user"
    assert http.post("/publish", json={}).status_code == 404


@pytest.mark.cases(2)
@pytest.mark.parametrize("name", ["../out", "a/b", "", ".hidden", "..", "x" * 200, "sampler_weights"])
def test_names_of_checkpoints_cannot_leave_the_folder(
    http: httpx.Client, model: str, folder: Path, name: str
) -> None:
    before = sorted(path for path in folder.parent.rglob("*") if path.name == "state.json")
    body = {"model_id": model, "seq_id": 1, "path": name}
    assert "error" in result(http, http.post("/save_weights", json=body))
    assert sorted(path for path in folder.parent.rglob("*") if path.name == "state.json") == before
    for path in (
        f"tinker://{model}/weights/{name}",
        f"tinker://../{folder.name}/weights/{name}",
        "/etc",
        name,
    ):
        load = {"session_id": model[:16], "model_seq_id": 1, "path": path, "optimizer": False}
        assert "error" in result(http, http.post("/load_weights", json=load))
        info = http.post("/weights_info", json={"tinker_path": path})
        assert info.status_code in (404, 422)
        assert str(folder) not in info.text


def test_an_untested_major_version_is_refused(http: httpx.Client) -> None:
    answer = http.post("/client/config", json={"sdk_version": "1.0.0"})
    assert answer.status_code == 400
    assert "tested with tinker 0.38.0" in answer.json()["detail"]
    assert http.post("/client/config", json={"sdk_version": "0.38.0"}).status_code == 200
    assert "0.38.0" in created(http, "0.41.2")["warning_message"]
    assert "warning_message" not in created(http)


@pytest.mark.slow
def test_a_session_that_has_ended_frees_its_adapters_and_says_so(
    http: httpx.Client, service: ServiceClient, model: str, session: str
) -> None:
    engine = next(iter(service._engines.values()))
    clients = len(engine.clients)
    pending = step(http, model, 3)  # it waits for the requests before it
    assert http.post(f"/sessions/{session}/finish", json={"reason": {"type": "success"}}).status_code == 204
    gc.collect()
    wait_until(lambda: len(engine.clients) < clients)
    failed = http.post("/retrieve_future", json=pending.json() | {"model_id": None})
    body = {"request_id": pending.json()["request_id"]}
    failed = http.post("/retrieve_future", json=body)
    assert "There is no session" in failed.json()["error"]
    answer = step(http, model, 4)
    assert answer.status_code == 404
    assert "no session" in answer.json()["detail"]
    assert http.post("/session_heartbeat", json={"session_id": session}).status_code == 410


def test_checkpoints_survive_a_restart_and_their_client_does_not(
    service: ServiceClient,
    tiny_qwen3: str,
    tmp_path: Path,
    connect: Callable[[str], tinker.ServiceClient],
) -> None:
    options = ServerOptions([tiny_qwen3], tmp_path, port=0)
    with serving(options, service) as address:
        trained = connect(address).create_lora_training_client(tiny_qwen3, rank=2).result()
        path = trained.save_state("one", ttl_seconds=3600).result().path
        with pytest.raises(ConfigError, match="Another server"):
            CheckpointStore(tmp_path)
    with serving(options, service) as address:
        client = connect(address)
        rest = client.create_rest_client()
        (run,) = rest.list_training_runs().result().training_runs
        assert run.training_run_id == trained.model_id
        (saved,) = rest.list_checkpoints(trained.model_id).result().checkpoints
        assert saved.tinker_path == path
        assert saved.expires_at is not None
        assert (
            client.create_training_client_from_state_with_optimizer(path).result().get_info().lora_rank == 2
        )
        rest.delete_checkpoint_from_tinker_path(path).result()
        assert rest.list_checkpoints(trained.model_id).result().checkpoints == []
        with pytest.raises(tinker.NotFoundError, match="one"):
            client.create_sampling_client(path).result()


@pytest.mark.slow
def test_only_those_with_the_key_and_no_web_page_are_answered(
    service: ServiceClient, tiny_qwen3: str, tmp_path: Path, http: httpx.Client
) -> None:
    for headers in ({"host": "evil.example"}, {"origin": "https://evil.example"}, {"origin": "null"}):
        assert http.get("/healthz", headers=headers).status_code == 403
    with serving(ServerOptions([tiny_qwen3], tmp_path, port=0, api_key=KEY), service) as address:
        for headers, status in (
            ({}, 401),
            ({"x-api-key": "tml-wrong"}, 401),
            ({"x-api-key": KEY}, 200),
            ({"authorization": f"Bearer {KEY}"}, 200),
        ):
            for path in ("/api/v1/healthz", "/v1/models"):
                assert httpx.get(address + path, headers=headers).status_code == status
    assert KEY not in repr(ServerOptions([tiny_qwen3], tmp_path, api_key=KEY))
    for changed in ({"host": "0.0.0.0"}, {"api_key": "short"}, {"api_key": "tml-short"}):
        with pytest.raises(ConfigError, match="key"):
            ServerOptions([tiny_qwen3], tmp_path, **changed)


@pytest.mark.slow
def test_as_many_adapters_are_in_memory_and_requests_pending_as_the_options_say(
    service: ServiceClient, tiny_qwen3: str, tmp_path: Path
) -> None:
    options = ServerOptions([tiny_qwen3], tmp_path, port=0, max_adapters=1, max_pending=1)
    with serving(options, service) as address, httpx.Client(base_url=f"{address}/api/v1", timeout=60) as http:
        session = created(http)["session_id"]
        body = {"session_id": session, "base_model": tiny_qwen3, "lora_config": {"rank": 2}}
        model = result(http, http.post("/create_model", json={**body, "model_seq_id": 0}))["model_id"]
        refused = result(http, http.post("/create_model", json={**body, "model_seq_id": 1}))
        assert "max_adapters is 1" in refused["error"]
        assert step(http, model, 2).status_code == 200  # it waits for the first request
        assert step(http, model, 3).status_code == 429


def test_a_time_to_live_is_a_number_of_seconds(http: httpx.Client, model: str) -> None:
    result(http, http.post("/save_weights", json={"model_id": model, "seq_id": 1, "path": "one"}))
    path = f"/training_runs/{model}/checkpoints/weights/one/ttl"
    for wrong in ("soon", True, 0, 1.5, 10**12):
        answer = http.put(path, json={"ttl_seconds": wrong})
        assert answer.status_code == 422
        assert "ttl_seconds" in answer.json()["detail"]
    for seconds in (60, None):
        assert http.put(path, json={"ttl_seconds": seconds}).status_code == 204


def test_a_model_that_was_idle_waits_for_a_request_that_arrives_late() -> None:
    async def seconds() -> list[float]:
        turns = Turns()
        turns._missing_since -= 1000
        turns.put(1, Promise("optim_step", lambda: None), asyncio.Event().wait)  # type: ignore[arg-type]
        now = time.monotonic()
        found = [turns.seconds_missing(now), turns.seconds_missing(now + 500)]
        turns.close()
        return found

    found = asyncio.run(seconds())
    assert found[0] < 100 < 500 <= found[1] < 600


@pytest.mark.slow
def test_a_silent_client_is_forgotten(service: ServiceClient, tiny_qwen3: str, tmp_path: Path) -> None:
    options = ServerOptions([tiny_qwen3], tmp_path, port=0, session_timeout_seconds=0.5)
    with serving(options, service) as address, httpx.Client(base_url=f"{address}/api/v1") as http:
        session = created(http)["session_id"]
        assert http.post("/session_heartbeat", json={"session_id": session}).status_code == 200
        wait_until(lambda: session not in http.get("/sessions").json()["sessions"], 20)


def test_every_field_of_the_sdks_requests_is_known_here() -> None:
    """A new field of the SDK has to be honoured or refused: it shows here as a difference."""
    known = {
        tinker.types.CreateModelRequest: "base_model lora_config model_seq_id optimizer_config session_id "
        "type user_metadata",
        tinker.types.LoraConfig: "rank seed train_attn train_mlp train_unembed",
        tinker.types.LoadWeightsRequest: "base_model model_id model_seq_id optimizer optimizer_config path "
        "seq_id session_id type user_metadata weights_access_token",
        tinker.types.AdamParams: "beta1 beta2 eps grad_clip_norm learning_rate weight_decay",
        tinker.types.SaveWeightsRequest: "model_id overwrite path seq_id ttl_seconds type user_metadata",
        tinker.types.SaveWeightsForSamplerRequest: "kind model_id path sampling_session_seq_id seq_id "
        "ttl_seconds type user_metadata",
        tinker.types.SampleRequest: "base_model model_path num_samples prompt prompt_alt_tokens_k "
        "prompt_logprobs prompt_logprobs_last_n record_stability_info sampling_params sampling_session_id "
        "seq_id target_prompt_logprobs topk_prompt_logprobs topk_sample_logprobs type",
    }
    for kind, names in known.items():
        assert sorted(kind.model_fields) == names.split()
    fields = [field.name for field in pb.ForwardBackwardRequest.DESCRIPTOR.fields]
    assert sorted(fields) == [
        "data", "forward_only", "loss_fn", "loss_fn_config", "loss_fn_config_v2", "model_id", "seq_id",
    ]  # fmt: skip
    assert cookbook.AdamParams().__dict__.keys() >= set(tinker.types.AdamParams.model_fields)


@pytest.mark.slow
def test_requests_that_are_refused_leave_no_gap_in_the_order_of_their_model(
    http: httpx.Client, model: str
) -> None:
    refused = [
        ("/save_weights", {}),
        ("/save_weights_for_sampler", {}),
        ("/save_weights_for_sampler", {"sampling_session_seq_id": 1, "ttl_seconds": 60}),
        ("/optim_step", {"adam_params": {"learning_rate": "fast"}}),
    ]
    for number, (path, body) in enumerate(refused):
        answer = http.post(path, json={"model_id": model, "seq_id": number + 1, **body})
        assert answer.status_code == 422, answer.text
    step = {"model_id": model, "seq_id": len(refused) + 1, "adam_params": {}}
    assert "nothing to step on" in result(http, http.post("/optim_step", json=step))["error"]
