"""Finds how replies end under a chat template: the tokens that the model must write behind its text.

They are the control tokens that the template prints both behind a last reply and behind an earlier one, up to
the tokenizer's end-of-text token. If it prints none behind a last reply, the model must write the first one
behind an earlier reply: GLM's template ends a reply only with the `<|user|>` of the next message. If it
prints none there either, the model must write the end-of-text token. Replies with tool calls may end
differently, and are tried separately.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from os.path import commonprefix
from typing import NamedTuple

from cookbook.errors import RendererError
from renderers.encoder import SENTINEL, Encoder
from renderers.jinja.template import CALL, Template, stand_in_for
from renderers.messages import PlainMessage

USER: PlainMessage = {"role": "user", "content": "x"}
REPLY: PlainMessage = {"role": "assistant", "content": SENTINEL}
_RESULT: PlainMessage = {"role": "tool", "content": "x", "name": "f", "tool_call_id": "call00001"}
_SENTINEL = re.compile(re.escape(SENTINEL) + r"(?:\d+;)?")


class Ending(NamedTuple):
    """How a reply ends."""

    written: str
    """What the model must write; it ends with the stop token."""
    stop: str
    """The token with which sampling ends."""
    printed: str
    """What the template prints there if the reply is the last message: `written` with more behind it, or
    white space in place of it."""

    @property
    def is_appended(self) -> bool:
        """Whether the template prints the end only in front of another message."""
        return not self.printed.startswith(self.written)


def control_at_start(text: str, encoder: Encoder) -> re.Match[str] | None:
    """Returns a match of the control token that a text begins with after white space: its group `stop`."""
    return re.match(rf"\s*(?P<stop>{encoder.control.pattern})", text)


def plain_ending(behind_last: str, behind_earlier: str, encoder: Encoder, eos: str | None) -> Ending:
    """Returns the end of a reply without tool calls, from what the template prints behind it.

    It is the end-of-text token if the template prints only white space behind a last reply, and words behind
    an earlier one (SOLAR's `### User:`).
    Raises RendererError if that has no control token, with which the model could learn to stop.
    """
    shared = _up_to_last_control(_common_start(behind_last, behind_earlier), encoder, eos)
    if shared is None and behind_last.strip():
        shared = control_at_start(behind_last, encoder)
    if shared is not None:
        return Ending(shared[0], shared["stop"], behind_last)
    following = control_at_start(behind_earlier, encoder)
    if not behind_last.strip() and following is None and eos in encoder.ids:
        return Ending(str(eos), str(eos), behind_last)
    if behind_last.strip() or following is None:
        raise RendererError(
            f"The chat template ends a reply with {(behind_last or behind_earlier)[:40]!r}, not with a "
            "special token of this tokenizer, so the model could not learn to stop. Use another template or "
            "renderer."
        )
    return Ending(following[0], following["stop"], behind_last)


def call_endings(template: Template, encoder: Encoder, eos: str | None) -> list[Ending]:
    """Returns the ends of replies with tool calls: with text or thinking beside the call, and without."""
    if not template.prints_calls:
        return []
    endings: list[Ending] = []
    inside = _controls_between_calls(template, encoder)
    for reply in _calling_replies():
        with suppress(RendererError):
            message, _ = stand_in_for(reply)
            begun = [template.adapted(USER), template.adapted(message)]
            last = _behind(template.trial(begun))
            earlier: list[str] = []
            for following in (_RESULT, USER):
                with suppress(RendererError):
                    earlier.append(_behind(template.trial([*begun, template.adapted(following)])))
            ending = _call_ending(last, earlier, encoder, eos, inside)
            if ending is not None and ending not in endings:
                endings.append(ending)
    return endings


def _calling_replies() -> Iterator[PlainMessage]:
    yield CALL
    yield {**CALL, "content": "x"}
    yield {**CALL, "content": "x", "reasoning_content": "x"}


def _behind(text: str) -> str:
    """Returns what follows the last sentinel of a text."""
    return text[[match.end() for match in _SENTINEL.finditer(text)][-1] :] if SENTINEL in text else text


def _call_ending(
    last: str, earlier: Sequence[str], encoder: Encoder, eos: str | None, inside: set[str]
) -> Ending | None:
    """Returns the end of a reply with calls, which is preceded by the markup that closes a call."""
    for behind in earlier or [last]:
        shared = _up_to_last_control(_common_start(last, behind), encoder, eos)
        if shared is not None and shared["stop"] not in inside:
            stop = shared["stop"]
            return Ending(stop, stop, last[shared.end() - len(stop) :])
    spaces = last[len(last.rstrip()) :]
    for behind in earlier:
        if behind.startswith(last.rstrip()):
            following = control_at_start(behind[len(last.rstrip()) :], encoder)
            if following is not None and following["stop"] not in inside:
                return Ending(following[0], following["stop"], spaces)
    return None


def _controls_between_calls(template: Template, encoder: Encoder) -> set[str]:
    """Returns the control tokens between two calls in one reply, which do not end it.

    There are none if the template prints each call as a turn with its own header.
    """
    two, _ = stand_in_for({**CALL, "tool_calls": [*CALL["tool_calls"], *CALL["tool_calls"]]})
    user = template.adapted(USER)
    with suppress(RendererError):
        header = template.trial([user], prompt=True).removeprefix(template.trial([user]))
        text = template.trial([user, template.adapted(two)])
        places = [match.start() for match in _SENTINEL.finditer(text)]
        between = text[places[0] : places[-1]] if len(places) > 1 else ""
        return {*encoder.control.findall(between)} if not header or header not in between else set()
    return set()


def _common_start(one: str, other: str) -> str:
    return commonprefix([one, other])  # noqa: RUF071 - of characters, not of paths


def _up_to_last_control(text: str, encoder: Encoder, eos: str | None) -> re.Match[str] | None:
    """Returns a match of the text up to its last control token, or up to the end-of-text token in it."""
    found = list(encoder.control.finditer(text))
    if not found:
        return None
    # Sampling stops at the first of these tokens.
    end = next(match for match in found if match[0] in (eos, found[-1][0])).end()
    return re.match(rf"(?s:.*?)(?P<stop>{encoder.control.pattern})\Z", text[:end])
