"""A text that a chat template is given in place of a message's own, to record what it does with it.

It can be printed, joined, and asked or changed by a few methods of strings. All of that is recorded, and
whatever else is done to it ends the recording.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeAlias

Pieces: TypeAlias = "tuple[str | int, ...]"
"""A text: what the template spells itself, and values by their numbers."""

Action: TypeAlias = "tuple[Callable[..., str | int], Pieces, tuple[str, ...]]"
"""A method of strings, the text it is called on, and its arguments."""

_QUESTIONS = frozenset({"startswith", "endswith"})
_CHANGES = frozenset({"strip", "lstrip", "rstrip", "lower", "upper", "title", "capitalize"})


class Untraceable(Exception):
    """The template does what cannot be recorded."""


class Step:
    """One action and what follows it: a step for each answer to a question, or for None after a change.

    The last step has no action but the text, as a format and the numbers of the values in it; without a
    text the recording ended there. An open step is still to be recorded.
    """

    __slots__ = ("action", "following", "is_open", "text")

    def __init__(self) -> None:
        self.action: Action | None = None
        self.following: dict[bool | None, Step] = {}
        self.is_open = True
        self.text: tuple[str, tuple[int, ...]] | None = None

    def last_for(self, values: list[str]) -> Step | None:
        """The last step for these values, to which the changed ones are added; None if that is still open."""
        step = self
        while step.action is not None:
            method, pieces, arguments = step.action
            outcome = method(spelled(pieces, values), *arguments)
            if type(outcome) is str:
                values.append(outcome)
                answer = None
            else:
                answer = bool(outcome)
            if answer not in step.following:
                return None
            step = step.following[answer]
        return None if step.is_open else step


def spelled(pieces: Pieces, values: Sequence[str]) -> str:
    if len(pieces) == 1 and type(pieces[0]) is int:
        return values[pieces[0]]
    return "".join([piece if isinstance(piece, str) else values[piece] for piece in pieces])


class Recorder:
    """Records what becomes of the values under one template, as steps from the first one on."""

    def __init__(self, first: Step, values: Sequence[str]) -> None:
        self._step = first
        self._values = list(values)
        self._has_refused = False

    def refuse(self) -> NoReturn:
        """End the recording, even if the error is caught on its way."""
        self._has_refused = True
        raise Untraceable

    def act(self, name: str, pieces: Pieces, arguments: tuple[Any, ...] = ()) -> Any:
        """Call a method of strings on the text: the answer as a bool, or the changed text as a new value."""
        action: Action = (getattr(str, name), pieces, arguments)
        if any(type(argument) is not str for argument in arguments) or self._step.action not in (
            None,
            action,
        ):
            self.refuse()
        outcome = action[0](spelled(pieces, self._values), *arguments)
        self._step.action = action
        answer = None if isinstance(outcome, str) else bool(outcome)
        self._step = self._step.following.setdefault(answer, Step())
        if not isinstance(outcome, str):
            return answer
        self._values.append(outcome)
        return Traced(self, (len(self._values) - 1,))

    def end(self, printed: Pieces | None) -> None:
        """The template printed this, or cannot be recorded to its end."""
        self._step.is_open = False
        if printed is not None and not self._has_refused:
            form = ["%s" if isinstance(piece, int) else piece.replace("%", "%%") for piece in printed]
            numbers = tuple(piece for piece in printed if isinstance(piece, int))
            self._step.text = "".join(form), numbers


def _refuse(closed: Any, *_: object) -> Any:
    closed._recorder.refuse()


_refusal: Any = _refuse


class _Closed:
    """An object that refuses every question about itself."""

    __slots__ = ("_recorder",)

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    __str__ = __repr__ = __format__ = __bool__ = __hash__ = __eq__ = __ne__ = _refusal
    __len__ = __iter__ = __contains__ = __call__ = __add__ = __radd__ = _refusal
    # No `__getitem__`: `%` takes what has one for a mapping, and is content to use nothing of it.


class Traced(_Closed):
    """A text whose characters can only be seen through what is recorded."""

    __slots__ = ("pieces",)

    def __init__(self, recorder: Recorder, pieces: Pieces) -> None:
        super().__init__(recorder)
        self.pieces = pieces

    def method(self, name: str) -> Method:
        if name not in _QUESTIONS | _CHANGES:
            self._recorder.refuse()
        return Method(self._recorder, name, self.pieces)

    def __bool__(self) -> bool:
        return bool(self._recorder.act("__len__", self.pieces))

    def __contains__(self, text: object) -> bool:
        return bool(self._recorder.act("__contains__", self.pieces, (text,)))

    def __eq__(self, text: object) -> bool:
        return bool(self._recorder.act("__eq__", self.pieces, (text,)))

    def __ne__(self, text: object) -> bool:
        return not self == text

    __hash__ = _Closed.__hash__

    def __add__(self, after: object) -> Traced:
        return Traced(self._recorder, (*self.pieces, *self._pieces_of(after)))

    def __radd__(self, before: object) -> Traced:
        return Traced(self._recorder, (*self._pieces_of(before), *self.pieces))

    def _pieces_of(self, text: object) -> Pieces:
        if isinstance(text, Traced):
            return text.pieces
        return (text,) if type(text) is str else self._recorder.refuse()


class Method(_Closed):
    """A method of a traced text."""

    __slots__ = ("_name", "_pieces")

    def __init__(self, recorder: Recorder, name: str, pieces: Pieces) -> None:
        super().__init__(recorder)
        self._name = name
        self._pieces = pieces

    def __call__(self, *arguments: object) -> Any:
        return self._recorder.act(self._name, self._pieces, arguments)
