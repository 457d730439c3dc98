"""Renders every row of a source once, with several processes if it takes long, and stores the result."""

from __future__ import annotations

import json
import logging
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

import numpy as np

import renderers
from cookbook.data import processes
from cookbook.data.cache import RENDERED, cache_folder
from cookbook.data.conversation import TEMPLATE_KWARGS, Conversation
from cookbook.data.findings import count_findings
from cookbook.data.repeated import Decision, Paths, Repeated, Tree, grow, paths_of, weights_of, with_weights
from cookbook.data.selection import NOT_TRAINED
from cookbook.data.sources import BadRow, Chunk, Row, Source
from cookbook.data.sources.base import AnyRow, digest_of
from cookbook.data.store import BadRowNote, Block, Example, ExampleStore, StoreWriter, make_block, open_store
from cookbook.data.windows import windows
from cookbook.errors import CookbookError, DataError, describe
from cookbook.utils import files, notes
from cookbook.utils.notes import Note
from renderers import Message, TrainOnWhat

if TYPE_CHECKING:
    from renderers import Renderer

logger = logging.getLogger(__name__)

OnBadRow: TypeAlias = Literal["raise", "skip"]

_SECONDS_BETWEEN_MESSAGES = 10.0

_NEEDS_ASSISTANT = {
    TrainOnWhat.LAST_ASSISTANT_MESSAGE,
    TrainOnWhat.LAST_ASSISTANT_TURN,
    TrainOnWhat.ALL_ASSISTANT_MESSAGES,
}


_MANY_TURNS = 16
WINDOWS = "Long conversations cut into windows (on_long=window)"


class RenderedRow(NamedTuple):
    """The examples of a row, and the conversations that they are of."""

    examples: list[Example]
    conversations: list[Conversation]


_UNITS_OF_DATA = ("row", "document")
"""Units of the notes that describe the format and columns of a row."""


class RowRenderer:
    """Renders rows to examples, with the settings of one config."""

    def __init__(
        self,
        renderer: Renderer,
        train_on_what: TrainOnWhat,
        conversations_of: Callable[[Row], list[Conversation]],
        conversations_key: str | None,
        *,
        repeated: Repeated | None = None,
        merges_first: bool = False,
        window_length: int | None = None,
    ) -> None:
        """`conversations_key` identifies the result of `conversations_of` for a row; None if that is unknown.

        A row for which `conversations_of` raises is a bad row. `merges_first`: whether rows are likely to
        repeat history, which is then looked for before any is rendered. `window_length`: the tokens of a
        window where long conversations become windows.
        """
        self._renderer = renderer
        self.train_on_what = train_on_what
        self._conversations_of = conversations_of
        self._conversations_key = conversations_key
        self._window_length = window_length
        self.repeated = repeated
        self.merges_first = merges_first or repeated in ("merge", "raise")

    def __call__(self, row: Row) -> list[Example] | None:
        """Returns the examples of a row; None for a row to skip. Raises CookbookError for a bad row.

        Notes (`cookbook.utils.notes`) are not counted for a bad row; for a row to skip, those are that do
        not describe its format and columns.
        """
        rendered = self.render_row(row)
        return None if rendered is None else rendered.examples

    def render_row(self, row: Row) -> RenderedRow | None:
        """Returns the examples of a row with its conversations, as `__call__` does."""
        with notes.collected() as found:
            conversations = self.conversations(row)
            decisions = row.decisions or [None] * len(conversations)
            if row.decisions:  # what is not trained is counted by the decisions, over all conversations
                for note in [note for note in found if note.what == NOT_TRAINED]:
                    del found[note]
            examples: list[Example] = []
            for conversation, decision in zip(conversations, decisions, strict=True):
                if decision is not None and decision.is_merged:
                    notes.count("conversation", "repeated the beginning of another (repeated=merge)")
                    continue
                try:
                    built = self._render(conversation, decision)
                except RecursionError as error:
                    raise DataError("its values are nested too deeply to be rendered.") from error
                count_findings(conversation, self._renderer)
                examples += built
        if not conversations:
            notes.add({note: number for note, number in found.items() if note.noun not in _UNITS_OF_DATA})
            return None
        notes.add(found)
        return RenderedRow(examples, conversations)

    def conversations(self, row: Row) -> list[Conversation]:
        """Returns the conversations of a row. Raises CookbookError for a bad row."""
        try:
            return self._conversations_of(row)
        except CookbookError:
            raise
        except Exception as error:  # the user's code may raise anything
            raise DataError(f"conversations_of raised {type(error).__name__}: {error}") from error

    def _render(self, conversation: Conversation, decision: Decision | None) -> list[Example]:
        renderer = self._renderer.with_template_kwargs(conversation.template_kwargs or {})
        if conversation.text is not None:
            return [renderer.render_text(conversation.text)]
        if conversation.pair is not None and renderer.is_rendered(conversation.pair[0]):
            return [self._render_completion(conversation, *conversation.pair)]
        roles = [str(message.get("role")) for message in conversation.messages]
        if "assistant" not in roles and self.train_on_what in _NEEDS_ASSISTANT:
            raise DataError(f"no assistant message (roles: {', '.join(roles)}).")
        messages, mode = conversation.messages, self.train_on_what
        if conversation.is_rollout:
            trained = weights_of(messages, mode) if decision is None else decision.weights
            notes.count("conversation", "came from rollouts or logs")
            notes.count("trained turn", "came from them", number=len(trained))
        if decision is not None:
            for why, number in (
                ("trained in another conversation", decision.num_elsewhere),
                ("context in every conversation", decision.num_context),
            ):
                if number:
                    notes.count("turn", NOT_TRAINED, why, number)
            if not decision.weights:
                return []
            messages, mode = with_weights(messages, decision.weights, mode)
        limit = self._window_length
        if limit is None:
            return renderer.render_conversation(messages, mode, conversation.tools)
        weights = decision.weights if decision is not None else weights_of(messages, mode)

        def render(some: Sequence[Message], trained: Mapping[int, float]) -> list[Example]:
            return renderer.render_conversation(*with_weights(some, trained, mode), conversation.tools)

        # A format that rewrites history has an example for each turn: of many, the last one tells the length.
        has_many = len(weights) > _MANY_TURNS
        if not has_many or render(messages, {max(weights): 1.0})[-1].num_tokens <= limit:
            built = renderer.render_conversation(messages, mode, conversation.tools)
            if not weights or all(example.num_tokens <= limit for example in built):
                return built
        in_windows = windows(messages, weights, limit, render)
        notes.count("conversation", WINDOWS, "cut")
        notes.count("window", WINDOWS, "trained", len(in_windows))
        return in_windows

    def _render_completion(self, conversation: Conversation, prompt: str, completion: str) -> Example:
        """Returns the example of a pair whose prompt a chat template has already printed."""
        if self.train_on_what not in _NEEDS_ASSISTANT:
            raise DataError(
                "its prompt is already rendered, so it has no messages to choose by "
                f"train_on_what={self.train_on_what}. Its completion is trained with all_assistant_messages."
            )
        _check_prompt_holds_all(prompt, conversation)
        notes.count("row", "had a prompt that is already rendered; its completion is trained as it is")
        return self._renderer.render_completion(prompt, completion)

    def render(self, chunk: Chunk) -> Block:
        good: list[tuple[str, list[Example]]] = []
        bad: list[BadRowNote] = []
        conversations_R: list[Sequence[Conversation]] = []
        are_good_R: list[bool] = []
        with notes.collected() as found:
            for row in chunk.rows():
                rendered = None
                try:
                    if isinstance(row, BadRow):
                        raise DataError(row.reason)
                    rendered = self.render_row(row)
                except CookbookError as error:
                    bad.append(BadRowNote(row.place, reason_of(error)))
                conversations_R.append([] if rendered is None else rendered.conversations)
                are_good_R.append(rendered is not None)
                if rendered is not None:
                    good.append((row.place, rendered.examples))
        num_filtered = len(are_good_R) - len(good) - len(bad)
        paths = paths_of(conversations_R, self.train_on_what)
        return make_block(good, bad, num_filtered, found, paths, are_good_R)

    def read(self, chunk: Chunk) -> Paths:
        """Returns the paths of the conversations of some rows; bad rows have none."""
        paths = []
        with notes.collected():
            for row in chunk.rows():
                found = None
                if not isinstance(row, BadRow):
                    with suppress(CookbookError, RecursionError):  # reported when the row is rendered
                        found = paths_of([self.conversations(row)], self.train_on_what)
                paths.append(found or paths_of([[]], self.train_on_what))
        return Paths.concatenated(paths)

    def grow(self, paths: Paths, rows: Source | Sequence[str]) -> Tree:
        """Returns what becomes of conversations that share history. `rows` are their source, or their places.

        Raises DataError where they must not share any (`repeated=raise`).
        """
        tree = grow(paths, self.repeated)
        if self.repeated == "raise" and tree.twins:
            row_of_C = np.repeat(np.arange(len(paths.num_conversations_R)), paths.num_conversations_R)
            places = [
                next(rows.rows(number)).place if isinstance(rows, Source) else rows[number]
                for number in (int(row_of_C[conversation]) for conversation in next(iter(tree.twins.items())))
            ]
            others = f", as {len(tree.twins) - 1:,} others do" if len(tree.twins) > 1 else ""
            raise DataError(
                f"{places[0]} repeats the beginning of {places[1]}{others}. Train each turn once "
                "with repeated=merge, or keep them as they are with repeated=keep."
            )
        return tree

    def fingerprint(self) -> str | None:
        """Returns a string that changes whenever the examples of a row may change; None if it is unknown."""
        renderer, tokenizer = self._renderer, self._renderer.tokenizer
        is_ours = type(renderer).__module__.partition(".")[0] == renderers.__name__
        if not is_ours or self._conversations_key is None:
            return None
        options = {
            key: value
            for key, value in vars(renderer).items()
            if isinstance(value, str | int | float)
            and not isinstance(getattr(type(renderer), key, None), cached_property)
        }
        return digest_of(
            tokenizer.backend_tokenizer.to_str(),
            str(tokenizer.chat_template),
            str(sorted(tokenizer.special_tokens_map.items())),
            renderer.name,
            json.dumps(renderer.template_kwargs, sort_keys=True, default=str),
            str(sorted(options.items())),
            str(self.train_on_what),
            str((self.repeated, self._window_length)),
            self._conversations_key,
            _code_of_this_project(),
        )


def _check_prompt_holds_all(prompt: str, conversation: Conversation) -> None:
    """Raises DataError if a row has a system prompt, tools or template variables that its prompt lacks."""
    tools = conversation.tools or ()
    missing = [
        *("system prompt" for message in conversation.messages[:-2] if _text_of(message) not in prompt),
        *(f"tool `{tool['function']['name']}`" for tool in tools if tool["function"]["name"] not in prompt),
        *([TEMPLATE_KWARGS] if conversation.template_kwargs else ()),
    ]
    if missing:
        raise DataError(
            f"its prompt is already rendered, and the {missing[0]} of the row is not in it. Render the "
            f"prompt with it, or remove it from the row."
        )


def _text_of(message: Message) -> str:
    return str(message.get("content") or "").strip()


def render_source(
    source: Source,
    row_renderer: RowRenderer,
    on_bad_row: OnBadRow = "raise",
    num_proc: int | None = None,
    use_cache: bool = True,
) -> ExampleStore:
    """Returns the examples of a source, which are rendered or, if nothing has changed, read from the cache.

    With `on_bad_row="raise"` the first bad row raises DataError. `num_proc` is the number of processes; None
    means one, and all cores if it takes long. The examples are the same for any number.
    """
    fingerprint = row_renderer.fingerprint() if use_cache else None
    if fingerprint is None:
        return _render_to_temporary_folder(source, row_renderer, on_bad_row, num_proc)
    path = cache_folder() / RENDERED / digest_of(source.name, source.fingerprint(), fingerprint)
    store = open_store(path, source.name)
    if store is None:
        try:
            files.make_folder(path.parent)
            files.check_writable(path.parent)
            files.remove(path)
        except OSError as error:
            logger.warning("Rendered data cannot be kept for the next run: %s.", error)
            return _render_to_temporary_folder(source, row_renderer, on_bad_row, num_proc)
        _render(path, source, row_renderer, on_bad_row, num_proc)
        store = ExampleStore(path, source.name)
    if store.meta.num_bad_rows and on_bad_row == "raise":
        raise bad_row_error(*store.meta.bad_rows[0])
    return store


def _render_to_temporary_folder(
    source: Source, row_renderer: RowRenderer, on_bad_row: OnBadRow, num_proc: int | None
) -> ExampleStore:
    folder = tempfile.TemporaryDirectory(prefix="cookbook-")
    path = Path(folder.name) / "rendered"
    _render(path, source, row_renderer, on_bad_row, num_proc)
    return ExampleStore(path, source.name, folder)


def _render(
    path: Path, source: Source, row_renderer: RowRenderer, on_bad_row: OnBadRow, num_proc: int | None
) -> None:
    tree = None
    if row_renderer.merges_first:
        parts = list(processes.map_in_order(row_renderer.read, source.chunks(), num_proc))
        tree = row_renderer.grow(Paths.concatenated(parts), source)
        del parts
    with StoreWriter(path) as writer:
        _write(writer, source, row_renderer, on_bad_row, num_proc, tree)
        if tree is None:
            tree = row_renderer.grow(writer.paths(), source)
            if tree.decisions:  # some rows repeat others after all
                writer.restart()
                _write(writer, source, row_renderer, on_bad_row, num_proc, tree)
        writer.tree = tree
        if tree.num_kept:
            writer.meta.notes[Note("conversation", KEPT)] += tree.num_kept


KEPT = "repeated the beginning of another (repeated=keep)"


def _write(
    writer: StoreWriter,
    source: Source,
    row_renderer: RowRenderer,
    on_bad_row: OnBadRow,
    num_proc: int | None,
    tree: Tree | None,
) -> None:
    chunks: Iterable[Chunk] = source.chunks()
    if tree is not None and tree.decisions:
        chunks = _decided(chunks, tree)
    blocks = processes.map_in_order(row_renderer.render, chunks, num_proc)
    started = logged = time.perf_counter()
    of_all = "" if (total := source.num_rows()) is None else f" of {total:,}"
    for block in blocks:
        if block.bad_rows and on_bad_row == "raise":
            raise bad_row_error(*block.bad_rows[0])
        writer.append(block)
        now = time.perf_counter()
        if now - logged > _SECONDS_BETWEEN_MESSAGES:
            logged = now
            num_rows = writer.meta.num_rows_read
            speed = num_rows / (now - started)
            logger.info(
                "Rendering %s: %s%s rows, %.0f per second.", source.name, f"{num_rows:,}", of_all, speed
            )


def _decided(chunks: Iterable[Chunk], tree: Tree) -> Iterator[Chunk]:
    """The chunks, with what becomes of the conversations of their rows."""
    first = 0
    for chunk in chunks:
        yield DecidedChunk(chunk, tree.of_rows(first, first + len(chunk)))
        first += len(chunk)


@dataclass(frozen=True)
class DecidedChunk(Chunk):
    """Rows with decisions on their conversations, by their number in the chunk."""

    chunk: Chunk
    decisions: Mapping[int, list[Decision | None]]

    def __len__(self) -> int:
        return len(self.chunk)

    def rows(self) -> list[AnyRow]:
        rows = self.chunk.rows()
        for number, decisions in self.decisions.items():
            row = rows[number]
            if isinstance(row, Row):
                row.decisions = decisions
        return rows


# -- errors -----------------------------------------------------------------------------------


def reason_of(error: CookbookError) -> str:
    """Returns the message of an error without its type, to be printed after the place of a row."""
    return describe(error).removeprefix(f"{type(error).__name__}: ")


def bad_row_error(place: str, reason: str) -> DataError:
    return DataError(f"{place}: {reason}\nCorrect the row, or skip such rows with on_bad_row=skip.")


# -- fingerprints -----------------------------------------------------------------------------


@cache
def _code_of_this_project() -> str:
    """Returns a digest of the code that reads and renders rows, so that a new version renders them again."""
    folders = [Path(__file__).parent, Path(str(renderers.__file__)).parent]
    files = sorted(file for folder in folders for file in folder.rglob("*.py"))
    return digest_of(*(file.read_text(encoding="utf-8") for file in [*files, Path(notes.__file__)]))
