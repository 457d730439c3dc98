"""Tests of the client of a vLLM server, against a stub with vLLM's interface that uses this engine.

The stub accepts no field that vLLM's CompletionRequest lacks, and answers in the format of vLLM's serving
code (0.33).
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from cookbook import ModelInput, SamplingClient, SamplingParams, ServiceClient
from cookbook.clients.vllm import VLLMSamplingClient
from cookbook.errors import CheckpointError, ClosedError, ModelError, RequestError

PROMPT = ModelInput.from_ints([5, 17, 31, 8])
NO_STOP = {"stop_token_ids": [10**6]}
FIELDS = {
    "model", "prompt", "max_tokens", "temperature", "top_p", "top_k", "seed", "stop", "stop_token_ids",
    "ignore_eos", "include_stop_str_in_output", "skip_special_tokens", "return_token_ids", "n", "logprobs",
    "prompt_logprobs", "stream",
}  # fmt: skip


class Server(ThreadingHTTPServer):
    def __init__(self, service: ServiceClient, base_model: str, takes_adapters: bool = True) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.service = service
        self.base_model = base_model
        self.clients: dict[str, SamplingClient] = {
            "base": service.create_sampling_client(base_model=base_model)
        }
        self.takes_adapters = takes_adapters

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        model = {"id": "base", "object": "model", "root": self.server.base_model, "max_model_len": 256}
        self.answer(200, {"object": "list", "data": [model]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path.endswith("_lora_adapter") and self.server.takes_adapters:
            if self.path == "/v1/load_lora_adapter":
                self.server.clients[body["lora_name"]] = self.server.service.create_sampling_client(
                    body["lora_path"]
                )
            else:
                del self.server.clients[body["lora_name"]]
            self.answer(200, "Success")
        elif self.path != "/v1/completions":
            self.answer(404, {"detail": "Not Found"})
        elif body["temperature"] < 0:
            error = {"message": "temperature must be non-negative", "type": "BadRequestError", "code": 400}
            self.answer(400, {"error": error})
        else:
            assert body.keys() <= FIELDS
            assert body["return_token_ids"]
            assert body["include_stop_str_in_output"]
            self.complete(body)

    def complete(self, body: dict[str, Any]) -> None:
        client = self.server.clients[body["model"]]
        assert body["ignore_eos"] or not (body["stop"] or body["stop_token_ids"])
        params = SamplingParams(
            max_tokens=body["max_tokens"],
            temperature=body["temperature"],
            top_p=body["top_p"],
            top_k=body["top_k"] or -1,
            seed=body["seed"],
            stop=body["stop"] or ([] if body["ignore_eos"] else None),
            stop_token_ids=body["stop_token_ids"] or None,
        )
        prompt = ModelInput.from_ints(body["prompt"])
        sequences = client.sample(prompt, body.get("n", 1), params).sequences
        choices: list[dict[str, Any]] = [
            {
                "index": index,
                "token_ids": sequence.tokens,
                "finish_reason": sequence.stop_reason,
                "logprobs": {"token_logprobs": sequence.logprobs} if "logprobs" in body else None,
            }
            for index, sequence in enumerate(sequences)
        ]
        if "prompt_logprobs" in body:
            scores = client.score(prompt).result()
            choices[0]["prompt_logprobs"] = [
                None if logprob is None else {str(token): {"logprob": logprob, "rank": 1 if is_argmax else 7}}
                for token, logprob, is_argmax in zip(
                    body["prompt"], scores.logprobs, scores.is_argmax, strict=True
                )
            ]
        if body.get("stream"):
            self.send_response(200)
            self.end_headers()
            (whole,) = choices
            for place, token in enumerate(whole["token_ids"]):
                is_last = place + 1 == len(whole["token_ids"])
                part = {
                    "index": 0,
                    "token_ids": [token],
                    "logprobs": {"token_logprobs": whole["logprobs"]["token_logprobs"][place : place + 1]},
                    "finish_reason": whole["finish_reason"] if is_last else None,
                }
                self.wfile.write(f"data: {json.dumps({'choices': [part]})}\n\n".encode())
            self.wfile.write(b"data: [DONE]\n\n")
        else:
            self.answer(200, {"choices": choices[::-1]})

    def answer(self, status: int, content: Any) -> None:
        payload = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceClient]:
    service = ServiceClient(device="cpu", checkpoint_dir=tmp_path_factory.mktemp("checkpoints"))
    yield service
    service.close()


@contextlib.contextmanager
def serving(server: Server) -> Iterator[Server]:
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def server(service: ServiceClient, tiny_qwen3: str) -> Iterator[Server]:
    with serving(Server(service, tiny_qwen3)) as server:
        yield server


@pytest.fixture(scope="module")
def checkpoint(service: ServiceClient, tiny_qwen3: str) -> Path:
    client = service.create_lora_training_client(tiny_qwen3, rank=4, seed=0)
    return Path(client.save_weights_for_sampler("adapter").result().path)


@pytest.mark.slow
@pytest.mark.parametrize("has_adapter", [False, True])
def test_it_answers_like_the_local_client(
    server: Server, service: ServiceClient, checkpoint: Path, has_adapter: bool
) -> None:
    here = (
        service.create_sampling_client(checkpoint)
        if has_adapter
        else service.create_sampling_client(base_model=server.base_model)
    )
    there = VLLMSamplingClient(server.url, checkpoint if has_adapter else None)
    for params in (
        SamplingParams(max_tokens=9, seed=3, temperature=0.8, top_k=40, top_p=0.9, stop_token_ids=[7]),
        SamplingParams(max_tokens=9, temperature=0, **NO_STOP),
        SamplingParams(max_tokens=9, seed=1, stop=[]),
        SamplingParams(seed=1, stop=["a", "e"]),
        SamplingParams(seed=1, stop=[40, 41, 42, 43, 44, 45]),
    ):
        expected = here.sample(PROMPT, 3, params, include_prompt_logprobs=True).result()
        found = there.sample(PROMPT, 3, params, include_prompt_logprobs=True).result()
        assert found.sequences == expected.sequences
        assert found.prompt_logprobs is not None
        assert expected.prompt_logprobs is not None
        assert found.prompt_logprobs[0] is None
        assert found.prompt_logprobs[1:] == pytest.approx(expected.prompt_logprobs[1:], rel=1e-5)
    assert there.score(PROMPT).result() == here.score(PROMPT).result()
    assert there.compute_logprobs(PROMPT).result() == here.compute_logprobs(PROMPT).result()
    assert there.get_tokenizer().get_vocab() == here.get_tokenizer().get_vocab()
    there.close()
    assert set(server.clients) == {"base"}, "the adapter is unloaded"


@pytest.mark.slow
def test_many_requests_run_at_the_same_time(server: Server) -> None:
    client = VLLMSamplingClient(server.url)

    async def ask() -> list[Any]:
        params = [SamplingParams(max_tokens=4, seed=seed, **NO_STOP) for seed in range(20)]
        return await asyncio.gather(*(client.sample_async(PROMPT, 1, each) for each in params))

    assert len({tuple(answer.sequences[0].tokens) for answer in asyncio.run(ask())}) > 1
    client.close()


def test_a_stream_yields_tokens(server: Server) -> None:
    client = VLLMSamplingClient(server.url)
    params = SamplingParams(max_tokens=9, seed=3, **NO_STOP)
    stream = client.stream(PROMPT, params)
    (expected,) = client.sample(PROMPT, 1, params).sequences
    assert list(stream) == expected.tokens
    assert stream.result() == expected
    with pytest.raises(RequestError, match="temperature must be non-negative"):
        list(client.stream(PROMPT, SamplingParams(temperature=-1, max_tokens=2)))
    client.close()


@pytest.mark.slow
def test_errors_of_the_server_are_reported(
    server: Server, service: ServiceClient, checkpoint: Path, tiny_qwen3: str
) -> None:
    with pytest.raises(ModelError, match=r"No vLLM server answers at http://127.0.0.1:9.*vllm serve"):
        VLLMSamplingClient("http://127.0.0.1:9")
    with pytest.raises(CheckpointError, match="does not exist"):
        VLLMSamplingClient(server.url, "/nowhere")
    with (
        serving(Server(service, tiny_qwen3, takes_adapters=False)) as refusing,
        pytest.raises(ModelError, match="VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"),
    ):
        VLLMSamplingClient(refusing.url, checkpoint)
    client = VLLMSamplingClient(server.url)
    with pytest.raises(RequestError, match=r"refused /v1/completions \(400\): temperature must be"):
        client.sample(PROMPT, 1, SamplingParams(temperature=-1, max_tokens=2)).result()
    with pytest.raises(RequestError, match="The prompt is empty"):
        client.sample(ModelInput.empty())
    with pytest.raises(RequestError, match="256 tokens, and the context length"):
        client.sample(ModelInput.from_ints([5] * 256))
    with pytest.raises(RequestError, match="does not support topk_prompt_logprobs"):
        client.sample(PROMPT, topk_prompt_logprobs=3)
    with pytest.raises(RequestError, match="does not support prompt_logprobs_last_n"):
        client.compute_logprobs(PROMPT, prompt_logprobs_last_n=1)
    client.close()


def test_every_method_of_a_closed_client_is_refused(server: Server) -> None:
    client = VLLMSamplingClient(server.url)
    client.close()
    client.close()
    for call in (client.sample, client.stream, client.compute_logprobs, client.score):
        with pytest.raises(ClosedError):
            call(PROMPT)
    for coroutine in (client.sample_async(PROMPT), client.score_async(PROMPT), client.get_tokenizer_async()):
        with pytest.raises(ClosedError):
            asyncio.run(coroutine)
    with pytest.raises(ClosedError):
        client.get_tokenizer()


@pytest.mark.parametrize("name", ["sample", "stream", "compute_logprobs", "score", "get_tokenizer"])
def test_its_methods_are_those_of_the_local_client(name: str) -> None:
    here, there = getattr(SamplingClient, name), getattr(VLLMSamplingClient, name)
    assert here is not there
    assert inspect.signature(here) == inspect.signature(there)
