"""Replies to fixed prompts, to watch a model change."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import chz

from cookbook import models
from cookbook.errors import ConfigError
from cookbook.eval.evaluators import EvaluatorBuilder, SamplingClientEvaluator
from cookbook.types import SamplingParams
from renderers import Renderer, get_renderer

if TYPE_CHECKING:
    from cookbook.sampling_client import SamplingClient

logger = logging.getLogger(__name__)


class SamplesEvaluator(SamplingClientEvaluator):
    """Logs one reply to each prompt."""

    def __init__(self, renderer: Renderer, prompts: Sequence[str], params: SamplingParams) -> None:
        self._renderer = renderer
        self._prompts = prompts
        self._params = params

    async def __call__(self, sampling_client: SamplingClient) -> dict[str, float]:
        replies = await asyncio.gather(*(self._reply(sampling_client, prompt) for prompt in self._prompts))
        for prompt, reply in zip(self._prompts, replies, strict=True):
            logger.info("  user: %s\n  assistant: %s", prompt, reply)
        return {}

    async def _reply(self, sampling_client: SamplingClient, prompt: str) -> str:
        model_input = self._renderer.build_generation_prompt([{"role": "user", "content": prompt}])
        response = await sampling_client.sample_async(model_input, 1, self._params)
        message, _ = self._renderer.parse_response(response.sequences[0].tokens)
        calls = [
            json.dumps(call.get("function"), ensure_ascii=False) for call in message.get("tool_calls") or []
        ]
        return "\n".join([str(message.get("content") or ""), *calls]).strip()


@chz.chz
class SamplesEvaluatorBuilder(EvaluatorBuilder):
    """Shows the model's replies to fixed prompts."""

    model_name: str = chz.field(doc="model whose tokenizer is used")
    renderer_name: str | None = chz.field(default=None, doc="chat format; default: chosen from the model")
    system_prompt: str | None = chz.field(default=None, doc="put before every prompt")
    prompts: list[str] = chz.field(
        default_factory=lambda: ["What is the capital of Japan?", "How do I make a cup of tea?"],
        doc="what the user says",
    )
    max_tokens: int = chz.field(default=64, doc="tokens of a reply at most")
    temperature: float = chz.field(default=0.0, doc="0 takes the likeliest token")

    @chz.validate
    def _check(self) -> None:
        if self.max_tokens < 1 or self.temperature < 0:
            raise ConfigError(
                f"max_tokens={self.max_tokens} and temperature={self.temperature} cannot be sampled with. "
                f"Use max_tokens >= 1 and temperature >= 0."
            )

    def __call__(self) -> SamplesEvaluator:
        renderer_name = self.renderer_name or models.recommended_renderer(self.model_name)
        renderer = get_renderer(renderer_name, models.get_tokenizer(self.model_name), self.system_prompt)
        stop: list[Any] = list(renderer.get_stop_sequences())
        params = SamplingParams(max_tokens=self.max_tokens, temperature=self.temperature, stop=stop)
        return SamplesEvaluator(renderer, self.prompts, params)
