"""A sampling client of a vLLM server, for evaluations that are too large for this project's engine.

Install and start vLLM in its own environment, with the base model and room for adapters:

    VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve Qwen/Qwen3-0.6B --enable-lora --max-lora-rank 32

The server loads adapters from their folders, so it has to run on this machine or see the same files. Prompts
and completions are sent as token ids over its completions API; no text is tokenized. The field names are
those of vllm/entrypoints/openai/completion/protocol.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, ParamSpec, TypeVar

from cookbook import models
from cookbook.clients.futures import APIFuture, TokenStream
from cookbook.clients.sampling import SampleFuture, SamplingClient
from cookbook.engine import checkpoint
from cookbook.errors import (
    CheckpointError,
    ClosedError,
    CookbookError,
    ModelError,
    RequestError,
    TrainingError,
)
from cookbook.types import (
    ModelInput,
    PromptScores,
    SampledSequence,
    SampleResponse,
    SamplingParams,
    TensorData,
)

if TYPE_CHECKING:
    import httpx
    from transformers import PreTrainedTokenizerBase

P = ParamSpec("P")
R = TypeVar("R")

_REQUESTS_AT_A_TIME = 256
"""The number of requests that are sent at the same time. The server batches them; more would wait there."""


class VLLMSamplingClient(SamplingClient):
    """A `SamplingClient` whose model runs in a vLLM server.

    With `model_path`, an adapter's checkpoint, the server loads the adapter, and unloads it when this client
    is closed or garbage. Without it, the samples are those of the model that the server was started with.
    `tokenizer` names the model whose tokenizer `get_tokenizer` returns (default: the served model). A seed
    reproduces samples on one server, but not those of this project's engine.

    Raises ModelError if the server cannot be reached or accepts no adapters, and CheckpointError for a
    `model_path` that is not an adapter. Futures raise RequestError for what the server refuses.
    """

    def __init__(
        self,
        server_url: str,
        model_path: str | os.PathLike[str] | None = None,
        tokenizer: str | None = None,
    ) -> None:
        import httpx

        limits = httpx.Limits(max_connections=_REQUESTS_AT_A_TIME)
        self._server = httpx.Client(base_url=server_url.rstrip("/"), timeout=None, limits=limits)
        self._is_closed = False
        self._threads = ThreadPoolExecutor(_REQUESTS_AT_A_TIME, thread_name_prefix="vllm")
        served = _checked(self._server, "GET", "/v1/models").json()["data"][0]
        self._context_length: int = served["max_model_len"]
        self._model: str = served["id"]
        self._tokenizer_name = tokenizer or served["root"]
        if model_path is not None:
            self._model = _load_adapter(self._server, Path(model_path))
        adapter = None if model_path is None else self._model
        self._finalizer = weakref.finalize(self, _release, self._server, self._threads, adapter)

    def close(self) -> None:
        """Waits for pending requests, then makes the server unload the adapter. Later calls are refused."""
        self._is_closed = True
        self._threads.shutdown(wait=True)
        self._finalizer()

    def _submit_call(self, work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> Future[R]:
        self._check_open()
        try:
            return self._threads.submit(work, *args, **kwargs)
        except RuntimeError as error:  # the client was closed meanwhile, or the interpreter is exiting
            raise ClosedError(f"This sampling client accepts no more requests: {error}.") from error

    def _check_open(self) -> None:
        if self._is_closed:
            raise ClosedError("This sampling client was closed. Create a new one.")

    def sample(
        self,
        prompt: ModelInput,
        num_samples: int = 1,
        sampling_params: SamplingParams | None = None,
        include_prompt_logprobs: bool = False,
        topk_prompt_logprobs: int = 0,
        topk_sample_logprobs: int = 0,
        target_prompt_logprobs: TensorData | None = None,
        prompt_alt_tokens_k: int = 0,
        prompt_logprobs_last_n: int | None = None,
    ) -> SampleFuture:
        _refuse(
            topk_prompt_logprobs=topk_prompt_logprobs,
            topk_sample_logprobs=topk_sample_logprobs,
            target_prompt_logprobs=target_prompt_logprobs is not None,
            prompt_alt_tokens_k=prompt_alt_tokens_k,
            prompt_logprobs_last_n=prompt_logprobs_last_n is not None,
        )
        body = self._request(prompt, sampling_params or SamplingParams(), n=num_samples, logprobs=1)
        if include_prompt_logprobs:
            body["prompt_logprobs"] = 0

        def work() -> SampleResponse:
            choices = self._complete(body)
            logprobs = None
            if include_prompt_logprobs:
                logprobs = _scores(prompt.to_ints(), choices[0]["prompt_logprobs"]).logprobs
            return SampleResponse([_sequence(choice) for choice in choices], logprobs)

        return SampleFuture(self._submit_call(work))

    def stream(
        self, prompt: ModelInput, sampling_params: SamplingParams | None = None
    ) -> TokenStream[SampledSequence]:
        body = self._request(prompt, sampling_params or SamplingParams(), logprobs=1, stream=True)
        abandoned = threading.Event()
        job: Future[SampledSequence] = Future()
        stream: TokenStream[SampledSequence] = TokenStream(job, lambda sequence: sequence, abandoned.set)

        def work() -> None:
            try:
                job.set_result(self._stream(body, stream, abandoned))
            except BaseException as error:
                job.set_exception(error)

        self._submit_call(work)
        return stream

    def compute_logprobs(
        self, prompt: ModelInput, prompt_logprobs_last_n: int | None = None
    ) -> APIFuture[list[float | None]]:
        _refuse(prompt_logprobs_last_n=prompt_logprobs_last_n is not None)
        return APIFuture(self._submit_call(lambda: self._score(prompt).logprobs))

    def score(self, prompt: ModelInput) -> APIFuture[PromptScores]:
        return APIFuture(self._submit_call(self._score, prompt))

    def get_tokenizer(self) -> PreTrainedTokenizerBase:
        self._check_open()
        return models.get_tokenizer(self._tokenizer_name)

    # -- requests ---------------------------------------------------------------------------

    def _request(self, prompt: ModelInput, params: SamplingParams, **more: Any) -> dict[str, Any]:
        """Returns the body of a completion request. Raises RequestError for an empty or too long prompt."""
        tokens_T = prompt.to_ints()
        if not tokens_T:
            raise RequestError("The prompt is empty. Give at least one token.")
        room = self._context_length - len(tokens_T)
        if room < 1:
            raise RequestError(
                f"The prompt has {len(tokens_T)} tokens, and the context length of the server's model is "
                f"{self._context_length}. Use a prompt of at most {self._context_length - 1}."
            )
        stop: list[str | int] = [params.stop] if isinstance(params.stop, str) else list(params.stop or [])
        strings = [item for item in stop if isinstance(item, str)]
        token_ids = [int(item) for item in stop if not isinstance(item, str)]
        token_ids += params.stop_token_ids or []
        return {
            "model": self._model,
            "prompt": tokens_T,
            "max_tokens": room if params.max_tokens is None else params.max_tokens,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_k": max(params.top_k, 0),
            "seed": params.seed,
            "stop": strings,
            "stop_token_ids": token_ids,
            "ignore_eos": params.stop is not None or bool(token_ids),
            "include_stop_str_in_output": True,
            "skip_special_tokens": False,  # a stop string may be a special token
            "return_token_ids": True,
            **more,
        }

    def _complete(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        choices = _checked(self._server, "POST", "/v1/completions", body).json()["choices"]
        return sorted(choices, key=lambda choice: choice["index"])

    def _stream(
        self, body: dict[str, Any], stream: TokenStream[SampledSequence], abandoned: threading.Event
    ) -> SampledSequence:
        tokens: list[int] = []
        logprobs: list[float] = []
        reason = "length"
        with self._server.stream("POST", "/v1/completions", json=body) as response:
            if response.is_error:
                response.read()
                _raise_for(response)
            for choice in _events(response.iter_lines()):
                tokens += choice["token_ids"]
                logprobs += choice["logprobs"]["token_logprobs"] if choice["token_ids"] else []
                reason = choice["finish_reason"] or reason
                for token in choice["token_ids"]:
                    stream.put(token)
                if abandoned.is_set():
                    break  # the server notices the closed connection
        return SampledSequence(tokens, logprobs, "stop" if reason == "stop" else "length")

    def _score(self, prompt: ModelInput) -> PromptScores:
        body = self._request(prompt, SamplingParams(max_tokens=1), prompt_logprobs=0)
        return _scores(prompt.to_ints(), self._complete(body)[0]["prompt_logprobs"])


def _refuse(**given: int) -> None:
    """Raises RequestError for scores that a vLLM server is not asked for."""
    if names := [name for name, value in given.items() if value]:
        raise RequestError(
            f"A VLLMSamplingClient does not support {', '.join(names)}. Use a local SamplingClient."
        )


def _sequence(choice: dict[str, Any]) -> SampledSequence:
    reason = "stop" if choice["finish_reason"] == "stop" else "length"
    return SampledSequence(choice["token_ids"], choice["logprobs"]["token_logprobs"], reason)  # type: ignore[arg-type]


def _scores(tokens_T: list[int], found: list[dict[str, dict[str, Any]] | None]) -> PromptScores:
    """Returns a prompt's scores from vLLM's `prompt_logprobs`, dicts by token id for all but the first."""
    entries = [
        None if each is None else each[str(token)] for token, each in zip(tokens_T, found, strict=True)
    ]
    return PromptScores(
        [None if entry is None else entry["logprob"] for entry in entries],
        [None if entry is None else entry["rank"] == 1 for entry in entries],
    )


def _events(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """Yields the choices of a stream of server-sent events. Raises TrainingError if one is an error."""
    for line in lines:
        data = line.removeprefix("data:").strip()
        if data == "[DONE]":
            return
        if data:
            event = json.loads(data)
            if "error" in event:
                raise TrainingError(
                    f"The vLLM server ended the stream with an error: {event['error']['message']}"
                )
            yield from event["choices"]


def _load_adapter(server: httpx.Client, path: Path) -> str:
    """Makes the server load an adapter. Returns its name there, which no other client uses."""
    info = checkpoint.read_info(path)
    if info.lora.rank == 0:
        raise CheckpointError(
            f"Checkpoint {path} is a full model, not an adapter. Start a server with it: `vllm serve {path}`."
        )
    name = f"{path.name}-{secrets.token_hex(4)}"
    body = {"lora_name": name, "lora_path": str(path.expanduser().resolve())}
    _checked(server, "POST", "/v1/load_lora_adapter", body)
    return name


def _release(server: httpx.Client, threads: ThreadPoolExecutor, adapter: str | None) -> None:
    threads.shutdown(wait=False)
    if adapter is not None:
        with contextlib.suppress(CookbookError):  # the server may have ended, and the adapter with it
            _checked(server, "POST", "/v1/unload_lora_adapter", {"lora_name": adapter})
    server.close()


def _checked(
    server: httpx.Client, method: str, path: str, body: dict[str, Any] | None = None
) -> httpx.Response:
    import httpx

    try:
        response = server.request(method, path, json=body)
    except httpx.TransportError as error:
        raise ModelError(
            f"No vLLM server answers at {server.base_url}: {error}. Start one with "
            f"`VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve <model> --enable-lora`."
        ) from error
    if response.is_error:
        _raise_for(response)
    return response


def _raise_for(response: httpx.Response) -> NoReturn:
    path = response.request.url.path
    if response.status_code == 404 and path.endswith("_lora_adapter"):
        raise ModelError(
            "The vLLM server does not accept adapters. Start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 in "
            "its environment, --enable-lora, and a --max-lora-rank of at least the adapter's rank."
        )
    try:
        message = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = response.text
    raise RequestError(f"The vLLM server refused {path} ({response.status_code}): {message}")
