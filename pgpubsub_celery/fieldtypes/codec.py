"""What all codecs have in common: a codec, and the error that says which value did not fit.

Owns no type. Exists because an error deep in a value must name the path to it, at no cost while all is well.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterable
from typing import Any

SHOWN = 80
"""Characters of a value that an error shows."""


class MismatchError(Exception):
    """A value is not of its type, or JSON is not that of one. Never leaves `payload`."""

    def __init__(self, value: Any, expected: str, why: str = "") -> None:
        """`expected`: the type in words; `why`: more, in words."""
        super().__init__(expected)
        self.value = value
        self.expected = expected
        self.why = why
        self._steps: list[str] = []

    def under(self, step: str) -> MismatchError:
        """Note, on the way out, where the value is: `.price`, `[3]`."""
        self._steps.append(step)
        return self

    @property
    def path(self) -> str:
        """The steps that lead to the value, from the outermost: `.items[3].price`."""
        return "".join(reversed(self._steps))

    def __str__(self) -> str:
        return f"is {show(self.value)}: expected {self.expected}{f' ({self.why})' if self.why else ''}"


class MissingError(MismatchError):
    """A dataclass's field has no value."""

    def __str__(self) -> str:
        return f"is missing: expected {self.expected}"


class Codec:
    """Checks the values of one type, and turns them into JSON and back. Made once for each field."""

    rank = 5
    """Of several types with JSON of the same kind, the one of the lowest rank goes without a tag."""

    def __init__(self, expected: str, path: str, kinds: Iterable[str], key: Any = None) -> None:
        """`expected` and `path` name the type, shortly and in full; `key` is equal for the same type alone.

        `kinds`: what its JSON may be: null, bool, number, string, list, object, or an object with one key, as $text.
        """
        self.expected = expected
        self.path = path
        self.key: Any = path if key is None else key
        self.kinds = frozenset(kinds)
        self.tags = (expected, path)
        """What unions may have written before it, when the field was one."""

    def encode(self, value: Any, /) -> Any:
        """Return JSON for a value; MismatchError if it is not of the type."""
        raise NotImplementedError

    def decode(self, json: Any, /) -> Any:
        """Return the value of JSON; MismatchError if it is not the JSON of one."""
        raise NotImplementedError

    def exact(self, value: Any, /) -> bool:
        """Whether a value is of the type as it is, all the way down: nothing would be converted."""
        raise NotImplementedError


TAG = "$type"
VALUE = "value"


def kind_of(json: Any) -> str:
    """Return which of the kinds of JSON a value is."""
    if type(json) is dict and len(json) == 1:
        key = next(iter(json))
        return key if key.startswith("$") else "object"
    return _KINDS.get(type(json), "object")


_KINDS: dict[type, str] = {
    type(None): "null",
    bool: "bool",
    int: "number",
    float: "number",
    str: "string",
    list: "list",
    dict: "object",
}


class _Short(reprlib.Repr):
    """Representations that stay short, however large the value."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 3
        self.maxstring = self.maxother = self.maxlong = SHOWN

    def repr_bytes(self, x: bytes, level: int) -> str:
        return self.repr_str(x, level)  # type: ignore[arg-type]  # slices are all it needs

    def repr1(self, x: Any, level: int) -> str:
        try:
            return super().repr1(x, level)
        except Exception:  # noqa: BLE001 - a __repr__ of the user's, or an int of more digits than Python shows
            return f"<{type(x).__name__}>"


def show(value: Any) -> str:
    """Return a value in less than a line, with its type."""
    if value is None:
        return "None"
    text = " ".join(_Short().repr(value).split())
    if len(text) > SHOWN:
        text = f"{text[: SHOWN - 1]}…"
    return f"{text} ({type(value).__name__})"


def key_step(key: Any) -> str:
    """Return a dictionary's key as a step of a path."""
    text = _Short().repr(key)
    return f"[{text if len(text) <= SHOWN else text[: SHOWN - 1] + '…'}]"


def path_of(kind: type) -> str:
    """Return a class's path."""
    return f"{kind.__module__}.{kind.__qualname__}"
