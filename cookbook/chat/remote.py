"""A chat with a model of a server that speaks OpenAI's API, such as `recipes.serve`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cookbook.chat.session import ChatReply, ReplyEnd
from cookbook.errors import ConfigError, ModelError, RequestError
from cookbook.types import SamplingParams
from renderers import Message
from renderers.streaming import Delta

if TYPE_CHECKING:
    import httpx

API_KEY_VARIABLES = ("COOKBOOK_API_KEY", "OPENAI_API_KEY")
_SECONDS_TO_CONNECT = 10.0


@dataclass
class RemoteFormat:
    """What is set here of a chat format that the server renders."""

    system_prompt: str | None = None


class RemoteSession:
    """The messages of a chat so far, and the model of a server that replies to them."""

    def __init__(
        self, url: str, model: str | None, params: SamplingParams, system_prompt: str | None
    ) -> None:
        """Without a model's name it is the first that the server lists.

        Raises ConfigError for a URL without http://, ModelError if no server answers, and RequestError for
        what it refuses.
        """
        import httpx

        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"server={url} is not an address. Write it as http://127.0.0.1:8000/v1.")
        key = next(filter(None, map(os.environ.get, API_KEY_VARIABLES)), "none")
        timeout = httpx.Timeout(None, connect=_SECONDS_TO_CONNECT)
        headers = {"authorization": f"Bearer {key}"}
        self._http = httpx.Client(base_url=url.rstrip("/") + "/", headers=headers, timeout=timeout)
        self.messages: list[Message] = []
        self.renderer = RemoteFormat(system_prompt)
        self._params = params
        self._num_turns = 0
        self.model = model or str(self._first_model())

    def _first_model(self) -> Any:
        import httpx

        try:
            answer = self._http.get("models")
            _check(answer)
            return answer.json()["data"][0]["id"]
        except httpx.TransportError as error:
            raise ModelError(f"No server answers at {self._http.base_url}: {error}.") from error
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise ModelError(f"{self._http.base_url} lists no models as OpenAI's API does.") from error

    def ask(self, text: str) -> RemoteTurn:
        """Returns the turn of a question. `RemoteTurn.conclude` adds question and reply to the messages."""
        messages: list[Message] = [*self.messages, {"role": "user", "content": text}]
        prompt = self.renderer.system_prompt
        system: list[Message] = [{"role": "system", "content": prompt}] if prompt else []
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [*system, *messages],
            "stream": True,
            "temperature": self._params.temperature,
            "top_p": self._params.top_p,
            "max_tokens": self._params.max_tokens,
        }
        if self._params.seed is not None:
            body["seed"] = self._params.seed + self._num_turns
        self._num_turns += 1
        return RemoteTurn(self, messages, body)

    def reset(self) -> None:
        """Removes all messages."""
        self.messages.clear()


class RemoteTurn:
    """A question and the reply to it: iterate over the reply as it is sampled, then call `conclude`."""

    num_dropped = 0

    def __init__(self, session: RemoteSession, messages: list[Message], body: dict[str, Any]) -> None:
        self._session = session
        self._messages = messages
        self._body = body
        self._texts = {"reasoning_content": "", "content": ""}
        self._end = "stop"
        self._num_pieces = 0

    def __iter__(self) -> Iterator[Delta]:
        with self._session._http.stream("POST", "chat/completions", json=self._body) as answer:
            _check(answer)
            for line in answer.iter_lines():
                data = line.removeprefix("data:").strip()
                if not data or data == "[DONE]":
                    continue
                event = json.loads(data)
                if "error" in event:
                    raise RequestError(f"The server ended the reply: {event['error']['message']}")
                for choice in event["choices"]:
                    self._end = choice.get("finish_reason") or self._end
                    yield from self._deltas(choice["delta"])

    def _deltas(self, delta: dict[str, Any]) -> Iterator[Delta]:
        if delta.get("reasoning_content"):
            yield self._added(Delta("reasoning_content", delta["reasoning_content"]))
        if delta.get("content"):
            yield self._added(Delta("content", delta["content"]))
        for call in delta.get("tool_calls") or ():
            yield self._added(Delta("content", json.dumps(call["function"], ensure_ascii=False)))

    def _added(self, delta: Delta) -> Delta:
        self._num_pieces += 1
        self._texts[delta.field] += delta.text
        return delta

    def conclude(self, interrupted: bool = False) -> ChatReply:
        """Adds the question and the reply to the session, and returns the reply."""
        message: Message = {"role": "assistant", "content": self._texts["content"]}
        if self._texts["reasoning_content"]:
            message["reasoning_content"] = self._texts["reasoning_content"]
        if not interrupted or any(self._texts.values()):
            self._session.messages = [*self._messages, message]
        end: ReplyEnd = "interrupted" if interrupted else "length" if self._end == "length" else "stop"
        return ChatReply(message, "", end, self._num_pieces)


def _check(answer: httpx.Response) -> None:
    if not answer.is_error:
        return
    answer.read()
    try:
        message = answer.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = answer.text[:500]
    raise RequestError(f"The server refused {answer.request.url.path} ({answer.status_code}): {message}")
