"""A number that grows with the messages of a conversation, in the loops of a chat template.

What one iteration of a loop prints is printed again for a longer conversation if the iteration does not
depend on the number of messages. It may ask for it, though, and mostly to learn whether a message is the
last. So it is given a `Count`, which represents the number of messages plus a constant, reports what it
is compared with, and can be used in no other way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn, Protocol


class NotFollowed(Exception):
    """The template does what cannot be followed."""


class Follower(Protocol):
    """Is notified of what one iteration depends on."""

    def need(self, num_items: float) -> None:
        """The iteration would be the same for any list of at least so many items, and maybe no other."""


END = float("inf")
"""Any other number of items may change the iteration."""


class Count:
    """The number of items of a list plus a constant: `number` for the present list."""

    __slots__ = ("_constant", "_follower", "number")

    def __init__(self, follower: Follower, number: int, constant: int) -> None:
        self._follower = follower
        self.number = number
        self._constant = constant

    def __add__(self, other: object) -> Count:
        if type(other) is not int:
            raise NotFollowed
        return Count(self._follower, self.number + other, self._constant + other)

    __radd__ = __add__

    def __sub__(self, other: object) -> Any:
        if type(other) is Count:
            return self.number - other.number  # the number of items is in both
        if type(other) is not int:
            raise NotFollowed
        return self + -other

    def _compared(self, other: object, compare: Callable[[int, int], bool]) -> bool:
        if type(other) is Count:
            return compare(self.number, other.number)
        if type(other) is not int:
            raise NotFollowed
        # For any longer list the count is on the same side of the other number if it is above that already.
        self._follower.need(other - self._constant + 1 if self.number > other else END)
        return compare(self.number, other)

    def __eq__(self, other: object) -> bool:
        return self._compared(other, int.__eq__)

    def __ne__(self, other: object) -> bool:
        return self._compared(other, int.__ne__)

    def __lt__(self, other: object) -> bool:
        return self._compared(other, int.__lt__)

    def __le__(self, other: object) -> bool:
        return self._compared(other, int.__le__)

    def __gt__(self, other: object) -> bool:
        return self._compared(other, int.__gt__)

    def __ge__(self, other: object) -> bool:
        return self._compared(other, int.__ge__)

    def __bool__(self) -> bool:
        return self != 0

    def _refuse(self, *_: object) -> NoReturn:
        raise NotFollowed

    __hash__ = __int__ = __index__ = __float__ = __str__ = __repr__ = __format__ = _refuse
    __mul__ = __rmul__ = __truediv__ = __rtruediv__ = __floordiv__ = __rfloordiv__ = _refuse
    __mod__ = __rmod__ = __pow__ = __rpow__ = __rsub__ = __neg__ = __pos__ = __abs__ = _refuse
