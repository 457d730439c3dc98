"""The endpoints of OpenAI's API: models, chat completions and completions, whole or streamed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from cookbook.errors import CookbookError, RendererError, RequestError, describe
from cookbook.server.bodies import read_body
from cookbook.server.choices import ChatChoice, Piece, ReplyChoice, TextChoice
from cookbook.server.named_models import LoadedModel, NamedModels
from cookbook.server.openai_requests import SamplingRequest, chat_request, completion_request
from cookbook.server.promises import Refusal
from cookbook.server.sampling_run import SamplingRun
from cookbook.server.state import ServerState
from cookbook.types import ModelInput, SampledSequence, SamplingParams
from renderers import Renderer

_SECONDS_BETWEEN_LOOKS = 0.25


class OpenAiApi:
    """The handlers of OpenAI's API."""

    def __init__(self, state: ServerState) -> None:
        self._state = state
        self._models = NamedModels(state)
        self._started = int(time.time())

    def routes(self) -> list[Route]:
        return [
            Route("/v1/models", self.list_models, methods=["GET"]),
            Route("/v1/models/{name:path}", self.get_model, methods=["GET"]),
            Route("/v1/chat/completions", self.chat_completions, methods=["POST"]),
            Route("/v1/completions", self.completions, methods=["POST"]),
        ]

    async def list_models(self, request: Request) -> Response:
        names = await asyncio.to_thread(self._models.names)
        return JSONResponse({"object": "list", "data": [self._card(name) for name in names]})

    async def get_model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in await asyncio.to_thread(self._models.names):
            raise Refusal(404, f"There is no model {name!r} on this server.")
        return JSONResponse(self._card(name))

    def _card(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self._started, "owned_by": "cookbook"}

    # -- chats and completions --------------------------------------------------------------

    async def chat_completions(self, request: Request) -> Response:
        asked = chat_request(await read_body(request, self._state.options.max_request_mib))
        model = await self._models.load(asked.sampling.model)
        with self._using(model):
            renderer = _with_kwargs(model.renderer, asked.template_kwargs)

            def build() -> ModelInput:
                with model.lock:
                    return renderer.build_generation_prompt(cast(Any, asked.messages), tools=asked.tools)

            prompt = await asyncio.to_thread(build)
            sampling = asked.sampling
            choices: list[ReplyChoice] = [
                ChatChoice(index, renderer, sampling.stop, sampling.with_logprobs, sampling.num_top)
                for index in range(sampling.num_choices)
            ]
            params = _with_stops(sampling, renderer.get_stop_sequences())
            run = SamplingRun(model.client, [prompt], sampling.num_choices, params, sampling.num_top)
            return await self._answer(request, run, choices, model, sampling, is_chat=True)

    async def completions(self, request: Request) -> Response:
        asked = completion_request(await read_body(request, self._state.options.max_request_mib))
        model = await self._models.load(asked.sampling.model)
        with self._using(model):
            tokenizer, ends = model.client.get_tokenizer(), model.client.get_end_tokens()

            def encode() -> list[ModelInput]:
                with model.lock:
                    return [
                        ModelInput.from_ints(tokenizer(one)["input_ids"] if isinstance(one, str) else one)
                        for one in asked.prompts
                    ]

            prompts = await asyncio.to_thread(encode)
            sampling = asked.sampling
            choices: list[ReplyChoice] = [
                TextChoice(index, tokenizer, ends, sampling.stop, sampling.with_logprobs, sampling.num_top)
                for index in range(sampling.num_choices * len(prompts))
            ]
            run = SamplingRun(
                model.client, prompts, sampling.num_choices, _with_stops(sampling, ends), sampling.num_top
            )
            return await self._answer(request, run, choices, model, sampling, is_chat=False)

    @contextlib.contextmanager
    def _using(self, model: LoadedModel) -> Iterator[None]:
        """Gives the model back if there is no answer, and turns errors of the request into refusals."""
        try:
            yield
        except BaseException as error:
            self._models.release(model)
            if isinstance(error, (RendererError, RequestError)):
                raise Refusal(400, str(error)) from error
            raise

    async def _answer(
        self,
        request: Request,
        run: SamplingRun,
        choices: list[ReplyChoice],
        model: LoadedModel,
        sampling: SamplingRequest,
        is_chat: bool,
    ) -> Response:
        await run.start(with_tokens=sampling.is_stream)
        kind = "chat.completion" if is_chat else "text_completion"
        head = {
            "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{secrets.token_hex(12)}",
            "object": f"{kind}.chunk" if is_chat and sampling.is_stream else kind,
            "created": int(time.time()),
            "model": sampling.model,
        }
        if sampling.is_stream:
            events = self._events(run, choices, head, sampling, model, is_chat)
            return StreamingResponse(events, media_type="text/event-stream")
        watch = asyncio.create_task(_close_if_gone(request, run))
        try:
            sequences = await run.results()
        finally:
            watch.cancel()

        def whole() -> list[Piece]:
            with model.lock:
                return [choice.whole(one) for choice, one in zip(choices, sequences, strict=True)]

        found = await asyncio.to_thread(whole)
        self._models.release(model)
        return JSONResponse({**head, "choices": found, "usage": _usage(run, sequences)})

    async def _events(
        self,
        run: SamplingRun,
        choices: list[ReplyChoice],
        head: Mapping[str, Any],
        sampling: SamplingRequest,
        model: LoadedModel,
        is_chat: bool,
    ) -> AsyncIterator[str]:
        """Yields the events of a stream. The client may leave before its end."""
        usage = {"usage": None} if sampling.includes_usage else {}
        try:
            if is_chat:
                first = {"role": "assistant", "content": ""}
                for index in range(len(choices)):
                    opening = {"index": index, "delta": first, "logprobs": None, "finish_reason": None}
                    yield _event({**head, "choices": [opening], **usage})
            async for batch in run.tokens():
                for index, token, logprob in batch:
                    for piece in choices[index].feed(token, logprob):
                        yield _event({**head, "choices": [piece], **usage})
            sequences = await run.results()
            for choice, sequence in zip(choices, sequences, strict=True):
                for piece in choice.end(sequence):
                    yield _event({**head, "choices": [piece], **usage})
            if sampling.includes_usage:
                yield _event({**head, "choices": [], "usage": _usage(run, sequences)})
        except CookbookError as error:
            yield _event({"error": {"message": describe(error), "type": "server_error"}})
        finally:
            run.close()
            self._models.release(model)
        yield "data: [DONE]\n\n"


def _event(value: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(value, separators=(',', ':'))}\n\n"


def _usage(run: SamplingRun, sequences: Sequence[SampledSequence]) -> dict[str, int]:
    prompt, completion = run.num_prompt_tokens, sum(len(one.tokens) for one in sequences)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _with_kwargs(renderer: Renderer, kwargs: Mapping[str, Any] | None) -> Renderer:
    """Returns the renderer with values for variables of its chat template."""
    if not kwargs:
        return renderer
    changed = renderer.with_template_kwargs({**renderer.template_kwargs, **kwargs})
    if unread := changed.unread_template_kwargs():
        raise Refusal(400, f"The chat template reads no {', '.join(unread)}. Omit it.")
    return changed


def _with_stops(sampling: SamplingRequest, ends: Sequence[int | str]) -> SamplingParams:
    """Returns the settings with the stop strings of the request, and what ends a text of the model."""
    strings = [*sampling.stop, *(one for one in ends if isinstance(one, str))]
    tokens = [one for one in ends if isinstance(one, int)]
    return replace(sampling.params, stop=strings, stop_token_ids=tokens)


async def _close_if_gone(request: Request, run: SamplingRun) -> None:
    """Ends the sampling if the client has gone."""
    while not await request.is_disconnected():
        await asyncio.sleep(_SECONDS_BETWEEN_LOOKS)
    run.close()
