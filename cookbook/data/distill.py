"""Replies of a teacher behind an OpenAI-compatible server, as a data set to train a student on.

Every reply is appended to the file when it arrives, with the number of its prompt, so a run that was stopped
asks only for what is missing. Nothing of a reply is changed. Empty and truncated replies are counted, and not
kept.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from cookbook.data import formats
from cookbook.data.builders import open_sources
from cookbook.data.sources import BadRow
from cookbook.errors import DataError, ModelError
from cookbook.utils import jsonl

PLACE = "distilled"
"""The key of a written row that says which prompt and sample it is; no format of rows reads it."""
RETRIED = {408, 409, 429, 500, 502, 503, 504}
MAX_WAIT_SECONDS = 30.0

Message = dict[str, Any]


@dataclass(frozen=True)
class Asked:
    """A prompt, without a reply."""

    number: int
    messages: list[Message]
    tools: list[Any] | None

    @property
    def digest(self) -> str:
        """The first half of a SHA-256 of the prompt, by which a resumed run sees that it is the same."""
        text = json.dumps([self.messages, self.tools], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]


@dataclass
class DistillReport:
    """What was asked and received, in this run and those before it on the same file."""

    prompts: int = 0
    kept: int = 0
    kept_before: int = 0
    prompt_tokens: int = 0
    reply_tokens: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    """The number of replies that are not in the file, by the reason."""

    def lines(self) -> list[str]:
        asked = f"{self.prompts:,} prompts, {self.kept + self.kept_before:,} replies in the file"
        before = f", {self.kept_before:,} of them from before" if self.kept_before else ""
        tokens = f"  {self.prompt_tokens:,} tokens were read and {self.reply_tokens:,} written by the teacher"
        return [asked + before + ".", tokens + ", as it counts them.", *self._lost()]

    def _lost(self) -> list[str]:
        return [f"  {number:,} replies not kept: {reason}" for reason, number in self.dropped.most_common()]

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "dropped": dict(self.dropped)}


def read_prompts(dataset: str, system_prompt: str | None, limit: int | None) -> list[Asked]:
    """Returns the prompts of a data set: `prompt` (text or messages), or conversations without a last reply.

    Raises DataError, with the place, for a row without a prompt.
    """
    found: list[Asked] = []
    for source in open_sources(dataset, streaming=True, is_for_evaluation=True):
        for row in source.rows():
            if limit is not None and len(found) >= limit:
                return found
            if isinstance(row, BadRow):
                raise DataError(f"{row.place}: {row.reason}")
            for messages, tools in _prompts_of(row):
                if not messages:
                    raise DataError(f"{row.place}: there is no message to reply to.")
                if system_prompt is not None and messages[0].get("role") != "system":
                    messages = [{"role": "system", "content": system_prompt}, *messages]
                found.append(Asked(len(found), messages, tools))
    if not found:
        raise DataError(f"dataset={dataset} has no prompts.")
    return found[:limit]


def _prompts_of(row: Mapping[str, Any]) -> Iterator[tuple[list[Message], list[Any] | None]]:
    if isinstance(prompt := row.get("prompt"), str) and "completion" not in row:
        yield [{"role": "user", "content": prompt}], row.get("tools")
        return
    if isinstance(row.get("prompt"), list) and "completion" not in row:
        row = {"messages": row["prompt"], "tools": row.get("tools")}
    for conversation in formats.conversations_of(row, None):
        messages = [dict(message) for message in conversation.messages]
        while messages and messages[-1].get("role") == "assistant":
            messages.pop()
        yield messages, conversation.tools


@dataclass(frozen=True)
class Teacher:
    """A model behind an OpenAI-compatible server, and how it is sampled."""

    url: str
    model: str
    api_key: str | None
    settings: Mapping[str, Any]
    """Fields of the request beside model, messages and tools: temperature, max_tokens, ..."""
    max_retries: int

    async def reply(self, client: httpx.AsyncClient, asked: Asked) -> dict[str, Any]:
        """Returns the server's response. Raises ModelError after `max_retries` repetitions."""
        body = {"model": self.model, "messages": asked.messages, **self.settings}
        if asked.tools:
            body["tools"] = asked.tools
        problem = ""
        for attempt in range(self.max_retries + 1):
            if attempt:
                await asyncio.sleep(min(MAX_WAIT_SECONDS, 0.5 * 2**attempt))
            try:
                response = await client.post("chat/completions", json=body)
            except httpx.TransportError as error:
                problem = f"{type(error).__name__}: {error}"
                continue
            if response.status_code == 200:
                return _object(response, self.url)
            problem = f"status {response.status_code}: {response.text[:300]}"
            if response.status_code not in RETRIED:
                break
        raise ModelError(
            f"The teacher at {self.url} gave no reply to prompt {asked.number}. Last: {problem.rstrip('.')}."
        )


def _object(response: httpx.Response, url: str) -> dict[str, Any]:
    try:
        found = response.json()
        message = found["choices"][0]["message"]
    except (ValueError, KeyError, IndexError, TypeError):
        message = None
    if not isinstance(message, dict):
        raise ModelError(
            f"The server at {url} does not answer as OpenAI's chat completions: {response.text[:300]}"
        )
    return dict(found)


async def distill(
    teacher: Teacher,
    prompts: Sequence[Asked],
    to: Path,
    *,
    num_samples: int = 1,
    concurrency: int = 8,
    on_reply: Callable[[DistillReport], None] = lambda report: None,
) -> DistillReport:
    """Appends the replies that `to` lacks, in the order in which they arrive, and returns the report.

    Raises DataError if `to` holds replies to other prompts, and ModelError if the teacher fails; what
    arrived before that is kept.
    """
    report = DistillReport(prompts=len(prompts))
    known = _known(to, prompts)
    report.kept_before = len(known)
    todo = iter(
        [
            (asked, sample)
            for asked in prompts
            for sample in range(num_samples)
            if (asked.number, sample) not in known
        ]
    )
    headers = {} if teacher.api_key is None else {"Authorization": f"Bearer {teacher.api_key}"}
    base = teacher.url.rstrip("/") + "/"
    async with httpx.AsyncClient(base_url=base, headers=headers, timeout=600.0) as client:

        async def work() -> None:
            for asked, sample in todo:
                _keep(await teacher.reply(client, asked), asked, sample, to, report)
                on_reply(report)

        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(work())
    return report


def _known(to: Path, prompts: Sequence[Asked]) -> set[tuple[int, int]]:
    """Returns the prompts and samples that the file has. Raises DataError if they are of other prompts."""
    digests = {asked.number: asked.digest for asked in prompts}
    known = set()
    for number, row in enumerate(jsonl.read(to, {PLACE: {"prompt": int, "sample": int, "digest": str}}), 1):
        place = row[PLACE]
        if digests.get(place["prompt"], place["digest"]) != place["digest"]:
            raise DataError(
                f"line {number} of {to} is a reply to another prompt {place['prompt']} than dataset= has. "
                "Give another to=, or the prompts that the file was begun with."
            )
        known.add((place["prompt"], place["sample"]))
    return known


def _keep(response: dict[str, Any], asked: Asked, sample: int, to: Path, report: DistillReport) -> None:
    usage = response.get("usage") or {}
    report.prompt_tokens += int(usage.get("prompt_tokens") or 0)
    report.reply_tokens += int(usage.get("completion_tokens") or 0)
    choice = response["choices"][0]
    message = {key: value for key, value in choice["message"].items() if value not in (None, [], "")}
    if choice.get("finish_reason") == "length":
        report.dropped["the token limit cut them (max_tokens)"] += 1
        return
    if not (message.get("content") or message.get("tool_calls")):
        report.dropped["empty"] += 1
        return
    message = {"role": "assistant", "content": "", **message}
    row: dict[str, Any] = {"messages": [*asked.messages, message]}
    if asked.tools:
        row["tools"] = asked.tools
    row[PLACE] = {"prompt": asked.number, "sample": sample, "digest": asked.digest}
    jsonl.append(to, row)
    report.kept += 1
