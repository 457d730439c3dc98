"""A server that stands in front of another: it passes requests on, and later answers at once as that one did.

    python -m benchmarks.replayed_answers PORT_OF_THE_OTHER PORT

With answers that take no time, the time of a step over HTTP is that of the SDK. `POST /replay` switches from
passing on to replaying.
"""

from __future__ import annotations

import asyncio
import sys

from cookbook.utils.network import LOOPBACK

RESULTS = "/api/v1/retrieve_future"
DONE = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"

Key = tuple[str, bytes]


class ReplayedAnswers:
    """Keeps the last answer to each path, and to each request for a result."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._answers: dict[Key, bytes] = {}
        self._is_replaying = False

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answers the requests of a connection until it ends."""
        other_reader, other_writer = await asyncio.open_connection(LOOPBACK, self._port)
        try:
            while True:
                head, body = await _read_message(reader)
                path = head.split(b" ", 2)[1].decode()
                writer.write(await self._answer(path, head, body, other_reader, other_writer))
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the client or the other server closed the connection
        finally:
            other_writer.close()
            writer.close()

    async def _answer(
        self,
        path: str,
        head: bytes,
        body: bytes,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> bytes:
        if path == "/replay":
            self._is_replaying = True
            return DONE
        key = (path, body if path == RESULTS else b"")
        if self._is_replaying and key in self._answers:
            return self._answers[key]
        writer.write(head + body)
        await writer.drain()
        self._answers[key] = b"".join(await _read_message(reader))
        return self._answers[key]


async def _read_message(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    """Returns the head and the body of a request or an answer whose length is given."""
    head = await reader.readuntil(b"\r\n\r\n")
    for line in head.lower().split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name == b"transfer-encoding":
            raise ValueError("a message is sent in chunks")
        if name == b"content-length":
            return head, await reader.readexactly(int(value))
    return head, b""


async def main(other: int, port: int) -> None:
    server = await asyncio.start_server(ReplayedAnswers(other).serve, LOOPBACK, port, limit=2**24)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(*map(int, sys.argv[1:])))
