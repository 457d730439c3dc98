"""The parts that evaluators which talk to the model share: its chat format, and its replies."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import chz

from cookbook import models
from cookbook.errors import ConfigError
from cookbook.eval.evaluators import EvaluatorBuilder, RunContext
from cookbook.types import ModelInput, SamplingParams, StopReason
from renderers import Message, Renderer, get_renderer

if TYPE_CHECKING:
    from cookbook.clients.sampling import SamplingClient


@chz.chz
class ChatEvaluatorBuilder(EvaluatorBuilder):
    """Base of builders whose evaluators talk to the model. What they leave open, a run fills in."""

    model_name: str | None = chz.field(
        default=None, doc="model whose tokenizer is used; default: the one in training"
    )
    renderer_name: str | None = chz.field(default=None, doc="chat format; default: that of the run")
    system_prompt: str | None = chz.field(
        default=None, doc="put before every prompt; default: that of the run"
    )

    tools_in_system: bool | None = chz.field(
        default=None, doc="describe tools in the system message; default: as the run does"
    )

    def in_run(self, run: RunContext) -> ChatEvaluatorBuilder:
        if self.model_name not in (None, run.model_name):
            return self
        return chz.replace(
            self,
            model_name=run.model_name,
            renderer_name=self.renderer_name or run.renderer_name,
            system_prompt=run.system_prompt if self.system_prompt is None else self.system_prompt,
            tools_in_system=run.tools_in_system if self.tools_in_system is None else self.tools_in_system,
        )

    def make_renderer(self) -> Renderer:
        if self.model_name is None:
            raise ConfigError(
                f"{type(self).__name__} does not know the model. A run provides it; elsewhere give "
                "model_name=."
            )
        name = self.renderer_name or models.recommended_renderer(self.model_name)
        tokenizer = models.get_tokenizer(self.model_name)
        return get_renderer(name, tokenizer, self.system_prompt, bool(self.tools_in_system))


@chz.chz
class SamplingEvaluatorBuilder(ChatEvaluatorBuilder):
    """Adds how replies are drawn."""

    max_tokens: int = chz.field(default=64, doc="maximum number of tokens of a reply")
    temperature: float = chz.field(default=0.0, doc="sampling temperature; 0: greedy")
    top_p: float = chz.field(
        default=1.0, doc="nucleus sampling: draw from the most likely tokens with this total probability"
    )
    seed: int = chz.field(default=0, doc="seed of replies drawn with a temperature")

    @chz.validate
    def _check_sampling(self) -> None:
        if self.max_tokens < 1 or not 0 <= self.temperature < math.inf or not 0 < self.top_p <= 1:
            raise ConfigError(
                f"max_tokens={self.max_tokens}, temperature={self.temperature} and top_p={self.top_p} cannot "
                f"be sampled with. Use max_tokens >= 1, temperature >= 0 and 0 < top_p <= 1."
            )
        if self.seed < 0:
            raise ConfigError(f"Invalid seed={self.seed}: must be >= 0.")

    def sampling_params(self, renderer: Renderer) -> SamplingParams:
        stop: Any = renderer.get_stop_sequences() or None
        return SamplingParams(self.max_tokens, self.seed, stop, self.temperature, top_p=self.top_p)


# -- replies ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reply:
    """A reply of the model."""

    message: Message
    stop_reason: StopReason
    """`length` where `max_tokens` cut it off."""
    num_tokens: int
    """The one that ended it included."""

    @property
    def text(self) -> str:
        return text_of(self.message)


async def replies_to(
    sampling_client: SamplingClient,
    renderer: Renderer,
    prompts: Sequence[ModelInput],
    params: Sequence[SamplingParams],
    num_samples: int = 1,
) -> list[list[Reply]]:
    """`num_samples` replies to each prompt. All are asked for at once, so that they share batches."""
    responses = await asyncio.gather(
        *(
            sampling_client.sample_async(prompt, num_samples, own)
            for prompt, own in zip(prompts, params, strict=True)
        )
    )
    return [
        [
            Reply(renderer.parse_response(sequence.tokens)[0], sequence.stop_reason, len(sequence.tokens))
            for sequence in response.sequences
        ]
        for response in responses
    ]


def text_of(message: Mapping[str, Any]) -> str:
    """A message as one text: what it says, then its calls as JSON, a line each."""
    content = message.get("content") or ""
    if not isinstance(content, str):
        content = "".join(part.get("text", "") for part in content)
    calls = [_call_text(call.get("function") or {}) for call in message.get("tool_calls") or []]
    return "\n".join([part for part in (content.strip(), *calls) if part])


def _call_text(function: Mapping[str, Any]) -> str:
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        with contextlib.suppress(ValueError):  # a malformed call is shown as it was written
            arguments = json.loads(arguments)
    return json.dumps({"name": function.get("name"), "arguments": arguments}, ensure_ascii=False)
