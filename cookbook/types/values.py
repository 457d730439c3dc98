"""What all values have in common: copying, converting to and from mappings and JSON, as pydantic models do.

The types of the Tinker SDK are pydantic models, and programs call these methods on them.
"""

from __future__ import annotations

import base64
import copy
import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

import numpy as np

from cookbook.errors import RequestError


class Value:
    """A value with named fields: a dataclass, or a class that lists them in `_fields`."""

    __slots__ = ()

    @classmethod
    def _fields(cls) -> tuple[str, ...]:
        assert dataclasses.is_dataclass(cls)
        return tuple(field.name for field in dataclasses.fields(cls))

    @classmethod
    def model_validate(cls, value: Any) -> Self:
        """Returns the value itself if it is of this type, or a new one from a mapping of its fields.

        Raises RequestError for anything else, and for a field that there is not.
        """
        if isinstance(value, cls):
            return value
        if not isinstance(value, Mapping):
            raise RequestError(
                f"Invalid {cls.__name__} {value!r}: must be a {cls.__name__} or a mapping of its fields "
                f"({', '.join(cls._fields())})."
            )
        if unknown := [name for name in value if name not in cls._fields()]:
            raise RequestError(
                f"{cls.__name__} has no field {unknown[0]!r}. It has: {', '.join(cls._fields())}."
            )
        try:
            return cls(**value)
        except TypeError as error:
            raise RequestError(f"Invalid {cls.__name__}: {error}.") from error

    @classmethod
    def model_validate_json(cls, text: str | bytes) -> Self:
        return cls.model_validate(json.loads(text))

    def model_dump(
        self,
        *,
        mode: str = "python",
        include: Iterable[str] | None = None,
        exclude: Iterable[str] | None = None,
        exclude_none: bool = False,
    ) -> dict[str, Any]:
        """Returns the fields, and those of values in them, as dictionaries and lists.

        With `mode="json"` bytes are base64 text.
        """
        names = [name for name in self._fields() if include is None or name in set(include)]
        names = [name for name in names if exclude is None or name not in set(exclude)]
        dumped = {name: _dumped(getattr(self, name), mode, exclude_none) for name in names}
        return {name: value for name, value in dumped.items() if not (exclude_none and value is None)}

    def model_dump_json(self, *, indent: int | None = None, exclude_none: bool = False) -> str:
        return json.dumps(self.model_dump(mode="json", exclude_none=exclude_none), indent=indent)

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Returns a copy with the fields in `update` replaced. They are checked as in a new value."""
        fields = {name: getattr(self, name) for name in self._fields()}
        return type(self)(**{**(copy.deepcopy(fields) if deep else fields), **(update or {})})


def _dumped(value: Any, mode: str, exclude_none: bool) -> Any:
    if isinstance(value, Value):
        return value.model_dump(mode=mode, exclude_none=exclude_none)
    if isinstance(value, Mapping):
        return {key: _dumped(one, mode, exclude_none) for key, one in value.items()}
    if isinstance(value, np.ndarray):
        return value.tolist()
    if mode == "json" and isinstance(value, bytes):
        return base64.b64encode(value).decode("ascii")
    if mode == "json" and hasattr(value, "isoformat"):
        return value.isoformat()
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return [_dumped(one, mode, exclude_none) for one in value]
    return value
