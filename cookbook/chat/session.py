"""A chat session with a model, which streams replies as they are sampled."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, TypeAlias

from cookbook.errors import RequestError
from cookbook.types import ModelInput, SamplingParams
from renderers import Message, Renderer
from renderers.messages import Tool
from renderers.streaming import Delta

if TYPE_CHECKING:
    from cookbook.clients.sampling import SamplingClient

ReplyEnd: TypeAlias = Literal["stop", "length", "context", "interrupted"]
"""Why a reply ended: at a stop sequence, `max_tokens` or the context length, or by the user."""

REPLY_SHARE = 4
"""At most one part in this many of the context is reserved for the reply."""


@dataclass(frozen=True)
class ChatReply:
    """A complete reply of the model."""

    message: Message
    rest: str
    """Content that was in no delta: incomplete markup of a truncated reply, which is text."""
    stop_reason: ReplyEnd
    num_tokens: int


class Replier:
    """A model that replies to any messages, with its sampling settings."""

    def __init__(
        self, client: SamplingClient, renderer: Renderer, params: SamplingParams, context_length: int
    ) -> None:
        """The renderer's stop sequences replace those of `params`."""
        self._client = client
        self.renderer = renderer
        self._context_length = context_length
        self.max_tokens = params.max_tokens or context_length
        self.params = replace(params, stop=renderer.get_stop_sequences() or None)

    def reply_to(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] | None = None,
        params: SamplingParams | None = None,
        max_tokens: int | None = None,
    ) -> ReplyStream:
        """Returns the reply to read. Raises RequestError if the messages leave no room for one."""
        prompt = self.renderer.build_generation_prompt(messages, tools=tools)
        if len(prompt) >= self._context_length:
            raise RequestError(
                f"The messages result in a prompt of {len(prompt):,} tokens, and the context length is "
                f"{self._context_length:,}. Remove some."
            )
        room = min(max_tokens or self.max_tokens, self._context_length - len(prompt))
        return ReplyStream(
            self._client, self.renderer, prompt, replace(params or self.params, max_tokens=room)
        )


class ReplyStream:
    """A reply as it is sampled: iterate over it, then call `complete`."""

    def __init__(
        self, client: SamplingClient, renderer: Renderer, prompt: ModelInput, params: SamplingParams
    ) -> None:
        self._parser = renderer.parse_stream()
        self._stream = client.stream(prompt, params)
        self._num_tokens = 0
        self._shown = ""

    def __iter__(self) -> Iterator[Delta]:
        for token in self._stream:
            self._num_tokens += 1
            for delta in self._parser.feed([token]):
                if delta.field == "content":
                    self._shown += delta.text
                yield delta

    def close(self) -> None:
        """Stops the sampling."""
        self._stream.close()

    def complete(self, stop_reason: ReplyEnd | None = None) -> ChatReply:
        """Returns the complete reply. Without a `stop_reason` it is that of the sampler."""
        reason: ReplyEnd = self._stream.result().stop_reason if stop_reason is None else stop_reason
        message, _ = self._parser.finish()
        content = str(message.get("content") or "")
        rest = content[len(self._shown) :] if content.startswith(self._shown) else ""
        return ChatReply(message, rest, reason, self._num_tokens)


class ChatSession(Replier):
    """The messages of a chat so far, and the model that replies to them.

    The oldest exchanges are dropped while the context lacks room for a reply of `max_tokens` tokens, or of a
    quarter of the context if that is smaller.
    """

    def __init__(
        self, client: SamplingClient, renderer: Renderer, params: SamplingParams, context_length: int
    ) -> None:
        super().__init__(client, renderer, params, context_length)
        self.messages: list[Message] = []
        self._num_turns = 0

    def ask(self, text: str) -> Turn:
        """Returns the turn of a question. `Turn.conclude` adds question and reply to the messages.

        Raises RequestError if the question does not fit the model's context, and RendererError if the chat
        format does not support it.
        """
        messages, prompt = self._fit([*self.messages, {"role": "user", "content": text}])
        params = replace(
            self.params,
            max_tokens=min(self.max_tokens, self._context_length - len(prompt)),
            seed=None if self.params.seed is None else self.params.seed + self._num_turns,
        )
        self._num_turns += 1
        return Turn(self, messages, prompt, params)

    def reset(self) -> None:
        """Removes all messages."""
        self.messages.clear()

    def _fit(self, messages: Sequence[Message]) -> tuple[list[Message], ModelInput]:
        """Returns the newest messages that leave room for a reply, and their prompt."""
        room = min(self.max_tokens, self._context_length // REPLY_SHARE)
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
                f"The message results in a prompt of {len(prompt):,} tokens, and the context length is "
                f"{self._context_length:,}. Shorten it."
            )
        return kept, prompt


class Turn(ReplyStream):
    """A question and the reply to it: iterate over the reply as it is sampled, then call `conclude`."""

    def __init__(
        self,
        session: ChatSession,
        messages: list[Message],
        prompt: ModelInput,
        params: SamplingParams,
    ) -> None:
        self._session = session
        self._messages = messages
        super().__init__(session._client, session.renderer, prompt, params)

    @property
    def num_dropped(self) -> int:
        """The number of oldest messages that were dropped to make room."""
        return len(self._session.messages) + 1 - len(self._messages)

    def conclude(self, interrupted: bool = False) -> ChatReply:
        """Adds the question and the reply to the session, and returns the reply.

        An interrupted reply is kept up to the interruption; if it is empty, neither is added.
        """
        stop_reason: ReplyEnd = "interrupted"
        if interrupted:
            self._stream.close()
        else:
            stop_reason = self._stream.result().stop_reason
            if stop_reason == "length" and self._num_tokens < self._session.max_tokens:
                stop_reason = "context"
        reply = self.complete(stop_reason)
        message = reply.message
        if not interrupted or message.get("content") or message.get("reasoning_content"):
            self._session.messages = [*self._messages, message]
        return reply
