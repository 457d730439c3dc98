"""A conversation with a model: its history, and replies that come as they are sampled."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, TypeAlias

from cookbook.errors import RequestError
from cookbook.types import ModelInput, SamplingParams
from renderers import Message, Renderer
from renderers.streaming import Delta

if TYPE_CHECKING:
    from cookbook.clients.sampling import SamplingClient

StopReason: TypeAlias = Literal["stop", "length", "context", "interrupted"]
"""Why a reply ended: as the model meant it, at `max_tokens`, at the end of its context, or by `conclude`."""

MIN_ROOM = 4
"""A part of the context, one in so many, is kept for the reply: older messages go for it."""


@dataclass(frozen=True)
class Reply:
    message: Message
    rest: str
    """Content that no delta had: markup that turned out to be text, as where a reply is cut off."""
    stop_reason: StopReason
    num_tokens: int


class Conversation:
    """Messages so far, and the model that answers them.

    The oldest messages are forgotten, whole exchanges at a time, where the model's context would
    leave less than a quarter of it, or than `max_tokens`, for a reply.
    """

    def __init__(
        self, client: SamplingClient, renderer: Renderer, params: SamplingParams, context_length: int
    ) -> None:
        """`params` say how to sample; what ends a reply is the renderer's to say."""
        self._client = client
        self.renderer = renderer
        self.messages: list[Message] = []
        self._context_length = context_length
        self.max_tokens = params.max_tokens or context_length
        self._params = replace(params, stop=renderer.get_stop_sequences() or None)
        self._num_turns = 0

    def ask(self, text: str) -> Turn:
        """Puts a question. The conversation has it, and what was answered, once the turn is concluded.

        Raises RequestError for a message that is longer than the model's context, and RendererError for
        one that the format has no place for.
        """
        messages, prompt = self._fit([*self.messages, {"role": "user", "content": text}])
        params = replace(
            self._params,
            max_tokens=min(self.max_tokens, self._context_length - len(prompt)),
            seed=None if self._params.seed is None else self._params.seed + self._num_turns,
        )
        self._num_turns += 1
        return Turn(self, messages, prompt, params)

    def reset(self) -> None:
        self.messages.clear()

    def _fit(self, messages: Sequence[Message]) -> tuple[list[Message], ModelInput]:
        room = min(self.max_tokens, self._context_length // MIN_ROOM)
        kept = list(messages)
        while True:
            prompt = self.renderer.build_generation_prompt(kept)
            next_question = next(
                (i for i, message in enumerate(kept) if i and message["role"] == "user"), None
            )
            if len(prompt) <= self._context_length - room or next_question is None:
                break
            kept = kept[next_question:]
        if len(prompt) >= self._context_length:
            raise RequestError(
                f"The message makes a prompt of {len(prompt):,} tokens, and the model reads "
                f"{self._context_length:,}. Shorten it."
            )
        return kept, prompt


class Turn:
    """A question, and its reply as it comes: iterate, then `conclude`."""

    def __init__(
        self,
        conversation: Conversation,
        messages: list[Message],
        prompt: ModelInput,
        params: SamplingParams,
    ) -> None:
        self._conversation = conversation
        self._messages = messages
        self._parser = conversation.renderer.parse_stream()
        self._stream = conversation._client.stream(prompt, params)
        self._num_tokens = 0
        self._shown = ""

    @property
    def num_forgotten(self) -> int:
        """Messages that had to go for this one."""
        return len(self._conversation.messages) + 1 - len(self._messages)

    def __iter__(self) -> Iterator[Delta]:
        for token in self._stream:
            self._num_tokens += 1
            for delta in self._parser.feed([token]):
                if delta.field == "content":
                    self._shown += delta.text
                yield delta

    def conclude(self, interrupted: bool = False) -> Reply:
        """Enters question and reply into the conversation.

        Of an interrupted reply what was shown of it stays; where that is nothing, the question goes too.
        """
        stop_reason: StopReason = "interrupted"
        if interrupted:
            self._stream.close()
        else:
            stop_reason = self._stream.result().stop_reason
            if stop_reason == "length" and self._num_tokens < self._conversation.max_tokens:
                stop_reason = "context"
        message, _ = self._parser.finish()
        content = str(message.get("content") or "")
        if not interrupted or content or message.get("reasoning_content"):
            self._conversation.messages = [*self._messages, message]
        rest = content[len(self._shown) :] if content.startswith(self._shown) else ""
        return Reply(message, rest, stop_reason, self._num_tokens)
