"""Measures tokens per second of the OpenAI endpoint against `transformers serve`.

    python -m benchmarks.server_tokens --peer OTHER/bin/transformers [--model FOLDER] [--clients 1 8]

Both servers run in processes of their own with the same model in the same dtype, and answer the same chats
with greedy tokens through OpenAI's client. The sides run in turns, so that other load of the machine falls on
both; the other server computes nothing meanwhile. A round of N clients sends N requests at once, whole or as
a stream, and its tokens are those of the replies. The texts of both sides are compared.

`--peer` is the command of an environment with `transformers[serving]`; `--continuous-batching` starts it with
that option. Without it, this server is measured alone.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import openai

from cookbook import embedded, models
from cookbook.utils.network import LOOPBACK, free_port

TOPICS = (
    "the sea", "an old bridge", "a train at night", "the number seven", "bread", "winter", "a lost key",
    "maps",
)  # fmt: skip
_SECONDS_TO_START = 120.0


@dataclass(frozen=True)
class ServerSide:
    """A server, and the name of the model there."""

    name: str
    address: str
    model: str


@dataclass(frozen=True)
class TimedReply:
    text: str
    num_tokens: int
    seconds_to_first: float
    """Until the first text of a stream; until the reply otherwise."""


async def ask(client: Any, side: ServerSide, topic: str, num_tokens: int, stream: bool) -> TimedReply:
    started = time.perf_counter()
    content = f"Write a long story about {topic}, with many characters and places."
    asked = {
        "model": side.model,
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,
        "max_tokens": num_tokens,
    }
    if not stream:
        reply = await client.chat.completions.create(**asked)
        assert reply.usage is not None
        seconds = time.perf_counter() - started
        return TimedReply(reply.choices[0].message.content or "", reply.usage.completion_tokens, seconds)
    text, count, first = "", 0, None
    options = {"include_usage": True}
    async for chunk in await client.chat.completions.create(**asked, stream=True, stream_options=options):
        for choice in chunk.choices:
            if choice.delta.content and first is None:
                first = time.perf_counter() - started
            text += choice.delta.content or ""
        if chunk.usage is not None:
            count = chunk.usage.completion_tokens
    return TimedReply(text, count, first or 0.0)


async def one_round(
    side: ServerSide, num_clients: int, num_tokens: int, stream: bool
) -> tuple[float, list[TimedReply]]:
    """Returns the seconds until the last reply has ended, and the replies."""
    async with openai.AsyncOpenAI(base_url=f"{side.address}/v1", api_key="none", timeout=300) as client:
        started = time.perf_counter()
        asked = [
            ask(client, side, TOPICS[number % len(TOPICS)], num_tokens, stream)
            for number in range(num_clients)
        ]
        replies = await asyncio.gather(*asked)
        return time.perf_counter() - started, replies


@contextmanager
def running(name: str, command: Sequence[str], port: int, model: str) -> Iterator[ServerSide]:
    """Starts a server, and stops it after the body."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://{LOOPBACK}:{port}"
    try:
        deadline = time.monotonic() + _SECONDS_TO_START
        while True:
            if process.poll() is not None:
                raise SystemExit(f"{name} ended with {process.returncode}: {' '.join(command)}")
            try:
                httpx.get(f"{address}/health", timeout=5)  # any answer will do
                break
            except httpx.TransportError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)
        yield ServerSide(name, address, model)
    finally:
        process.terminate()
        process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--peer", help="command `transformers` of another environment")
    parser.add_argument("--model", default=embedded.MODEL_NAME, help="name or folder")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=32, help="of a reply")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--continuous-batching", action="store_true", help="an option of the peer")
    options = parser.parse_args()
    folder = models.model_location(options.model)
    with ExitStack() as stack:
        ours, theirs = free_port(), free_port()
        command = [sys.executable, "-m", "recipes.serve", f"model_name={options.model}", f"port={ours}"]
        command += [f"folder={stack.enter_context(tempfile.TemporaryDirectory())}"]
        sides = [stack.enter_context(running("recipes.serve", command, ours, options.model))]
        if options.peer is not None:
            command = [options.peer, "serve", folder, "--port", str(theirs), "--host", LOOPBACK]
            command += ["--continuous-batching"] * options.continuous_batching
            sides.append(stack.enter_context(running("transformers serve", command, theirs, folder)))
        compare(sides, options.clients, options.tokens, options.rounds)


def compare(sides: Sequence[ServerSide], clients: Sequence[int], num_tokens: int, num_rounds: int) -> None:
    """Prints the medians of the rounds, after one that is not counted."""
    for side in sides:
        asyncio.run(one_round(side, 1, 8, True))
    for num_clients in clients:
        for stream in (False, True):
            rates: dict[str, list[float]] = {side.name: [] for side in sides}
            firsts: dict[str, list[float]] = {side.name: [] for side in sides}
            texts: dict[str, list[str]] = {}
            for _ in range(num_rounds):
                for side in sides:
                    seconds, replies = asyncio.run(one_round(side, num_clients, num_tokens, stream))
                    rates[side.name].append(sum(one.num_tokens for one in replies) / seconds)
                    firsts[side.name].append(statistics.median(one.seconds_to_first for one in replies))
                    texts[side.name] = [one.text for one in replies]
            what = f"{num_clients} client{'s'[: num_clients > 1]}, {'streamed' if stream else 'whole'}"
            parts = [
                f"{name} {statistics.median(rates[name]):.1f} tokens/s"
                + (f", first text after {1000 * statistics.median(firsts[name]):.0f} ms" if stream else "")
                for name in rates
            ]
            print(f"{what}: {'; '.join(parts)} (medians of {num_rounds} rounds)", flush=True)
            given = [*texts.values()]
            num_equal = sum(len({*replies}) == 1 for replies in zip(*given, strict=True))
            if len(given) > 1:
                print(f"  {num_equal} of {num_clients} texts are the same on both sides", flush=True)


if __name__ == "__main__":
    main()
