"""A chat in the browser: one page, and the completions of OpenAI's API that it talks to.

GET  /                      the page, which loads nothing from elsewhere
GET  /v1/models             the models that reply
POST /v1/chat/completions   a reply, whole or as server-sent events

It listens on loopback. A request must name the address that it was sent to, so that a page of another site
cannot use it, and must be JSON.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from cookbook.chat.session import Replier
from cookbook.errors import CookbookError, RequestError, describe
from cookbook.utils import json_files
from cookbook.utils.json_files import JsonOrigin
from cookbook.utils.network import LOOPBACK, refusal_of_page

logger = logging.getLogger(__name__)

PAGE = Path(__file__).with_name("page") / "chat.html"
MAX_BYTES = 2**22
"""The size of a request that is read."""
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'"
_SHAPE: Mapping[str, Any] = {
    "model": str,
    "messages": list[Mapping[str, Any]],
    "stream": bool | None,
    "temperature": float | int | None,
    "top_p": float | int | None,
    "max_tokens": int | None,
    "tools": list[Mapping[str, Any]] | None,
}


class ChatServer(ThreadingHTTPServer):
    """Serves models by their labels. `address` is what to open in a browser."""

    daemon_threads = True

    def __init__(self, title: str, models: Mapping[str, Replier], port: int = 0) -> None:
        self.title = title
        self.models = models
        super().__init__((LOOPBACK, port), _Handler)

    @property
    def address(self) -> str:
        return f"http://{LOOPBACK}:{self.server_address[1]}/"

    def describe(self) -> dict[str, Any]:
        """Returns the answer of /v1/models, with what the page shows beside OpenAI's keys."""
        return {
            "object": "list",
            "title": self.title,
            "data": [
                {
                    "id": label,
                    "object": "model",
                    "temperature": model.params.temperature,
                    "top_p": model.params.top_p,
                    "max_tokens": model.max_tokens,
                    "system_prompt": model.renderer.system_prompt,
                }
                for label, model in self.models.items()
            ],
        }

    def events(self, request: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Yields the chunks of a reply. Raises RequestError or RendererError for one that cannot be given."""
        model = self.models.get(request["model"])
        if model is None:
            raise RequestError(f"There is no model {request['model']!r}. Models: {', '.join(self.models)}.")
        wanted = {key: request[key] for key in ("temperature", "top_p") if request.get(key) is not None}
        params = replace(model.params, **wanted)
        messages: Sequence[Any] = request["messages"]
        about = {"object": "chat.completion.chunk", "model": request["model"], "created": int(time.time())}

        def chunk(delta: Mapping[str, Any], reason: str | None = None) -> dict[str, Any]:
            return {**about, "choices": [{"index": 0, "delta": delta, "finish_reason": reason}]}

        turn = model.reply_to(messages, request.get("tools"), params, request.get("max_tokens"))
        try:
            for delta in turn:
                yield chunk({delta.field: delta.text})
        except GeneratorExit:
            turn.close()
            raise
        reply = turn.complete()
        if reply.rest:
            yield chunk({"content": reply.rest})
        calls = list(reply.message.get("tool_calls") or [])
        if calls:
            yield chunk({"tool_calls": [{"index": number, **call} for number, call in enumerate(calls)]})
        end = "length" if reply.stop_reason in ("length", "context") else "stop"
        yield chunk({}, "tool_calls" if calls else end)


class _Handler(BaseHTTPRequestHandler):
    server: ChatServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if not self._is_for_us():
            return
        if self.path == "/":
            self._answer(200, PAGE.read_bytes(), "text/html; charset=utf-8")
        elif self.path == "/v1/models":
            self._answer_json(200, self.server.describe())
        else:
            self._fail(404, f"There is no {self.path}.")

    def do_POST(self) -> None:
        if not self._is_for_us():
            return
        declared = self.headers.get("Content-Length") or ""
        length = int(declared) if declared.isdecimal() else 0
        if not 0 < length <= MAX_BYTES or "json" not in (self.headers.get("Content-Type") or ""):
            self.close_connection = True
            self._fail(400, f"Send JSON of at most {MAX_BYTES:,} bytes.")
            return
        body = self.rfile.read(length)
        if self.path != "/v1/chat/completions":
            self._fail(404, f"There is no {self.path}.")
            return
        try:
            origin = JsonOrigin("the request", RequestError, "")
            request = json_files.object_of(body.decode(), origin)
            json_files.check(request, _SHAPE, origin)
            events = self.server.events(request)
            first = next(events)
            rest = () if request.get("stream") else tuple(events)
        except (CookbookError, ValueError) as error:
            self._fail(400, describe(error) if isinstance(error, CookbookError) else str(error))
            return
        if request.get("stream"):
            self._stream(first, events)
        else:
            self._answer_json(200, _whole([first, *rest]))

    def _stream(self, first: dict[str, Any], events: Iterator[dict[str, Any]]) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        try:
            self._send_event(json.dumps(first))
            for event in events:
                self._send_event(json.dumps(event))
            self._send_event("[DONE]")
        except (BrokenPipeError, ConnectionResetError):
            events.close()  # type: ignore[attr-defined]  # the page stopped the reply
        except CookbookError as error:
            self._send_event(json.dumps({"error": {"message": describe(error)}}))

    def _send_event(self, text: str) -> None:
        self.wfile.write(f"data: {text}\n\n".encode())
        self.wfile.flush()

    def _is_for_us(self) -> bool:
        """Refuses what a page of another site sends."""
        refusal = refusal_of_page(self.headers.get("Host", ""), self.headers.get("Origin"))
        if refusal is not None:
            self.close_connection = True
            self._fail(403, refusal)
        return refusal is None

    def _fail(self, status: int, message: str) -> None:
        self._answer_json(status, {"error": {"message": message}})

    def _answer_json(self, status: int, value: Any) -> None:
        self._answer(status, json.dumps(value).encode(), "application/json")

    def _answer(self, status: int, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Security-Policy", _POLICY)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        logger.debug(format, *args)


def _whole(events: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the reply that the chunks add up to."""
    message: dict[str, Any] = {"role": "assistant", "content": ""}
    for event in events:
        for key, value in event["choices"][0]["delta"].items():
            message[key] = message.get(key, "" if isinstance(value, str) else []) + value
    last = events[-1]
    choice = {"index": 0, "message": message, "finish_reason": last["choices"][0]["finish_reason"]}
    return {
        "object": "chat.completion",
        "model": last["model"],
        "created": last["created"],
        "choices": [choice],
    }
