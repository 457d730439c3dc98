"""Reads questions from a terminal or a pipe, and prints the replies as they are sampled."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from cookbook.chat.remote import RemoteSession, RemoteTurn
from cookbook.chat.session import ChatReply, ChatSession, Turn
from cookbook.chat.wrapping import WordWrap
from cookbook.errors import CookbookError, RequestError, describe
from cookbook.eval.chat import text_of
from cookbook.utils import jsonl
from cookbook.utils.consoles import undecodable_byte
from cookbook.utils.control_characters import visible, visible_line
from renderers.streaming import Delta

HELP = """\
/reset          remove all messages
/system TEXT    restart with another system prompt ("" for none); without TEXT: show it
/save FILE      append the conversation to FILE as a line of JSON, in the format of training data
/load FILE      continue the conversation in the last line of FILE
/base           also ask the base model from here on; once more: no longer
/exit           leave (or press Ctrl-D)
Ctrl-C stops a reply; what was printed of it stays in the conversation."""

BASE = "base"
"""The label of the base model."""

_DIM, _BOLD, _PLAIN = "\033[2m", "\033[1m", "\033[0m"


@dataclass(frozen=True)
class Speaker:
    """A model with its own chat session."""

    label: str
    session: ChatSession | RemoteSession


class Terminal:
    """An interactive chat. With a pipe each line is a question, and only replies go to standard output."""

    def __init__(self, stdin: IO[str], stdout: IO[str], stderr: IO[str]) -> None:
        self._in, self._out = stdin, stdout
        self._is_interactive = stdin.isatty()
        self._notes = stdout if self._is_interactive else stderr
        self._has_colour = self._is_interactive and stdout.isatty() and not os.environ.get("NO_COLOR")

    def talk(
        self, title: str, speakers: Sequence[Speaker], make_base: Callable[[], Speaker] | None = None
    ) -> None:
        """Chats until /exit or the end of the input. Prints errors; with a pipe it raises them."""
        speakers = list(speakers)
        self._make_base = make_base
        if self._is_interactive:
            self._note(f"{visible_line(title)}\n/help names the commands, Ctrl-D leaves.\n")
        for number, line in enumerate(self._lines(), 1):
            command = re.fullmatch(r"/([a-z]+)(?:\s+(.*))?", line)
            try:
                self._check_encoding(line, number)
                if command is None:
                    self._ask(line, speakers)
                elif command[1] in ("exit", "quit"):
                    return
                else:
                    self._run_command(command[1], (command[2] or "").strip(), speakers)
            except (CookbookError, OSError) as error:
                if not self._is_interactive:
                    raise
                self._note(describe(error))

    def _lines(self) -> Iterator[str]:
        if not self._is_interactive:
            yield from (line.strip() for line in self._in if line.strip())
            return
        import readline  # noqa: F401  gives input() a history and line editing

        # \001 and \002 enclose characters that the line editor must not count as visible.
        prompt = f"\001{_BOLD}\002you>\001{_PLAIN}\002 " if self._has_colour else "you> "
        while True:
            try:
                line = input(prompt).strip()
            except EOFError:
                self._put("\n")
                return
            except KeyboardInterrupt:
                self._note("\nCtrl-D or /exit leaves.")
                continue
            if line:
                yield line

    def _check_encoding(self, line: str, number: int) -> None:
        if (found := undecodable_byte(line)) is not None:
            byte, index = found
            raise RequestError(
                f"Question {number} is not UTF-8 text: byte 0x{byte:02x} at character "
                f"{index + 1}. Convert it, as with: iconv -f LATIN1 -t UTF-8"
            )

    # -- questions ----------------------------------------------------------------------------

    def _ask(self, question: str, speakers: Sequence[Speaker]) -> None:
        for speaker in speakers:
            try:
                turn = speaker.session.ask(question)
                if turn.num_dropped:
                    self._note(f"[The context is full: the oldest {turn.num_dropped} messages were dropped.]")
                if self._is_interactive or len(speakers) > 1:
                    self._put(
                        f"{_BOLD}{speaker.label}>{_PLAIN} " if self._has_colour else f"{speaker.label}> "
                    )
                was_stopped = self._say(turn, len(speaker.label) + 2)
            except KeyboardInterrupt:
                was_stopped = True
            if was_stopped and not self._is_interactive:
                raise KeyboardInterrupt
            if was_stopped:
                return
        if self._is_interactive:
            self._put("\n")

    def _say(self, turn: Turn | RemoteTurn, column: int = 0) -> bool:
        """Prints a reply as it is sampled, from a column on. Returns whether Ctrl-C stopped it."""
        printer = _ReplyPrinter(self, column)
        was_stopped = False
        try:
            for delta in turn:
                printer.write(delta)
        except KeyboardInterrupt:
            was_stopped = True
        reply = turn.conclude(was_stopped)
        printer.end(reply)
        if was_stopped:
            self._note("[stopped]")
        elif reply.stop_reason == "length":
            self._note(f"[truncated at max_tokens={reply.num_tokens}]")
        elif reply.stop_reason == "context":
            self._note("[truncated: the context is full]")
        return was_stopped

    # -- commands -----------------------------------------------------------------------------

    def _run_command(self, command: str, argument: str, speakers: list[Speaker]) -> None:
        match command:
            case "help":
                self._note(HELP)
            case "reset":
                for speaker in speakers:
                    speaker.session.reset()
                self._note("[The conversation is empty now.]")
            case "system":
                self._change_system_prompt(argument, speakers)
            case "save":
                self._save(argument, speakers)
            case "load":
                self._load(argument, speakers)
            case "base":
                self._toggle_base(speakers)
            case _:
                raise RequestError(
                    f"Unknown command /{command}. Commands: /reset /system /save /load /base /exit /help."
                )

    def _change_system_prompt(self, text: str, speakers: Sequence[Speaker]) -> None:
        if text:
            for speaker in speakers:
                speaker.session.renderer.system_prompt = text.strip("\"'") or None
                speaker.session.reset()
        prompt = speakers[0].session.renderer.system_prompt
        restarted = " The conversation restarts." if text else ""
        self._note(f"[System prompt: {prompt}{restarted}]" if prompt else f"[No system prompt.{restarted}]")

    def _toggle_base(self, speakers: list[Speaker]) -> None:
        """Adds the base model, with the conversation so far, or removes it."""
        if (base := next((one for one in speakers if one.label == BASE), None)) is not None:
            if len(speakers) == 1:
                raise RequestError("This is the base model itself.")
            speakers.remove(base)
            self._note("[The base model is no longer asked.]")
            return
        if self._make_base is None:
            raise RequestError("This is the base model itself: /base is for a checkpoint.")
        made = self._make_base()
        made.session.messages = list(speakers[0].session.messages)
        made.session.renderer.system_prompt = speakers[0].session.renderer.system_prompt
        speakers.insert(0, made)
        self._note("[The base model answers too, first.]")

    def _load(self, name: str, speakers: Sequence[Speaker]) -> None:
        if not name:
            raise RequestError("/load needs a file, such as /load chats.jsonl")
        path = Path(name).expanduser()
        if not path.is_file():
            raise RequestError(f"There is no file {visible_line(path)}.")
        rows = jsonl.read(path, {"messages": list[Mapping[str, Any]]})
        if not rows:
            raise RequestError(f"{visible_line(path)} is empty.")
        messages = [dict(message) for message in rows[-1]["messages"]]
        system = messages.pop(0) if messages and messages[0].get("role") == "system" else None
        for speaker in speakers:
            speaker.session.renderer.system_prompt = None if system is None else str(system["content"])
            speaker.session.messages = list(messages)  # type: ignore[arg-type]
        self._note(f"[Continuing a conversation of {len(messages)} messages.]")

    def _save(self, name: str, speakers: Sequence[Speaker]) -> None:
        if not name:
            raise RequestError("/save needs a file, such as /save chats.jsonl")
        path = Path(name).expanduser()
        lines = []
        for speaker in speakers:
            session = speaker.session
            system_prompt = session.renderer.system_prompt
            first = [{"role": "system", "content": system_prompt}] if system_prompt else []
            lines.append({"messages": [*first, *session.messages], "speaker": speaker.label})
        if not speakers[0].session.messages:
            raise RequestError("The conversation is empty, so there is nothing to save.")
        for line in lines:
            jsonl.append(path, line)
        self._note(f"[Appended to {visible_line(path)}: {len(speakers[0].session.messages)} messages.]")

    # -- writing ------------------------------------------------------------------------------

    def _put(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()

    def _note(self, text: str) -> None:
        """Prints text that is not part of a reply."""
        shown = visible(text)
        dimmed = self._has_colour and shown.startswith("[")
        self._notes.write(f"{_DIM}{shown}{_PLAIN}\n" if dimmed else f"{shown}\n")
        self._notes.flush()


class _ReplyPrinter:
    """Prints one reply. Reasoning is dimmed, or in parentheses without colours; a pipe omits it.

    On a terminal lines break between words.
    """

    def __init__(self, terminal: Terminal, column: int = 0) -> None:
        self._terminal = terminal
        self._is_reasoning = False
        self._wrap: WordWrap | None = None
        if terminal._is_interactive and terminal._out.isatty():
            self._wrap = WordWrap(shutil.get_terminal_size().columns, column)

    def _put(self, text: str) -> None:
        self._terminal._put(text if self._wrap is None else self._wrap.feed(text))

    def _put_control(self, text: str) -> None:
        """Prints what takes no room, behind all words before it."""
        self._terminal._put(text if self._wrap is None else self._wrap.finish() + text)

    def write(self, delta: Delta) -> None:
        terminal = self._terminal
        is_reasoning = delta.field == "reasoning_content"
        if is_reasoning and not terminal._is_interactive:
            return
        if is_reasoning and not self._is_reasoning:
            if terminal._has_colour:
                self._put_control(_DIM)
            else:
                self._put("(thinking: ")
        elif self._is_reasoning and not is_reasoning:
            self._end_reasoning()
        self._is_reasoning = is_reasoning
        self._put(visible(delta.text))

    def end(self, reply: ChatReply) -> None:
        """Prints what was in no delta: the tail of a truncated reply, and tool calls."""
        if self._is_reasoning:
            self._end_reasoning()
        content = str(reply.message.get("content") or "")
        calls = text_of({**reply.message, "content": ""})
        between = "\n" if content and calls else ""
        self._put(visible(f"{reply.rest}{between}{calls}\n"))

    def _end_reasoning(self) -> None:
        if self._terminal._has_colour:
            self._put_control(_PLAIN)
            self._put("\n")
        else:
            self._put(")\n")
