"""The common parts of evaluators that sample replies: the chat format, sampling settings, and replies."""

from __future__ import annotations

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
from renderers import Message, get_renderer

if TYPE_CHECKING:
    from cookbook.clients.sampling import SamplingClient
    from renderers import Renderer


@chz.chz
class ChatEvaluatorBuilder(EvaluatorBuilder):
    """The base class of builders whose evaluators use a chat format. A run sets the fields that are None."""

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
    template_kwargs: Mapping[str, Any] | None = chz.field(
        default=None, doc="variables of the chat template; default: those of the run with its chat format"
    )

    add_tokens: list[str] = chz.field(
        default_factory=list, doc="tokens to add to the tokenizer; default: those of the run"
    )

    def in_run(self, run: RunContext) -> ChatEvaluatorBuilder:
        if self.model_name not in (None, run.model_name):
            return self
        if self.add_tokens not in ([], [*run.add_tokens]):
            raise ConfigError(
                f"{type(self).__name__} has add_tokens={self.add_tokens}, and the run has "
                f"add_tokens={[*run.add_tokens]}. Remove those of the evaluator."
            )
        is_own_format = self.renderer_name not in (None, run.renderer_name)
        inherited = None if is_own_format else run.template_kwargs
        return chz.replace(
            self,
            model_name=run.model_name,
            renderer_name=self.renderer_name or run.renderer_name,
            system_prompt=run.system_prompt if self.system_prompt is None else self.system_prompt,
            tools_in_system=run.tools_in_system if self.tools_in_system is None else self.tools_in_system,
            template_kwargs=inherited if self.template_kwargs is None else self.template_kwargs,
            add_tokens=[*run.add_tokens],
        )

    def make_renderer(self) -> Renderer:
        """Returns the renderer of the model and the chat format. Raises ConfigError without a model."""
        if self.model_name is None:
            raise ConfigError(
                f"{type(self).__name__} has no model_name. A run sets it; outside of a run pass model_name=."
            )
        name = self.renderer_name or models.recommended_renderer(self.model_name)
        tokenizer = models.get_tokenizer(self.model_name, tuple(self.add_tokens))
        return get_renderer(
            name, tokenizer, self.system_prompt, bool(self.tools_in_system), self.template_kwargs
        )


@chz.chz
class SamplingEvaluatorBuilder(ChatEvaluatorBuilder):
    """Adds the settings with which replies are sampled."""

    max_tokens: int = chz.field(default=64, doc="largest number of tokens of a reply")
    temperature: float = chz.field(default=0.0, doc="sampling temperature; 0 is greedy")
    top_p: float = chz.field(
        default=1.0, doc="sample from the most likely tokens with this total probability"
    )
    seed: int = chz.field(default=0, doc="seed of sampled replies")

    @chz.validate
    def _check_sampling(self) -> None:
        for name, is_valid, rule in (
            ("max_tokens", self.max_tokens >= 1, ">= 1"),
            ("temperature", 0 <= self.temperature < math.inf, "finite and >= 0"),
            ("top_p", 0 < self.top_p <= 1, "> 0 and <= 1"),
            ("seed", self.seed >= 0, ">= 0"),
        ):
            if not is_valid:
                raise ConfigError(f"Invalid {name}={getattr(self, name)}: must be {rule}.")

    def sampling_params(self, renderer: Renderer) -> SamplingParams:
        """Returns the sampling settings, with the stop sequences of `renderer`."""
        stop: Any = renderer.get_stop_sequences() or None
        return SamplingParams(self.max_tokens, self.seed, stop, self.temperature, top_p=self.top_p)


# -- replies ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reply:
    """A sampled reply."""

    message: Message
    stop_reason: StopReason
    """`length` if `max_tokens` truncated it."""
    num_tokens: int
    """The number of its tokens, including the stop token."""

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
    """Samples `num_samples` replies to each prompt. All are requested at once, so that they share batches."""
    import asyncio

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
    """Returns a message as one text: its content, then each tool call as a line of JSON."""
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
