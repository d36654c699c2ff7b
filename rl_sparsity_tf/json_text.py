"""JSON of this package's own files, read strictly: what it does not write, it does not take."""

from __future__ import annotations

import json
import math
from typing import Any

# More digits than any number that is written here; a double's have 17, a 64-bit integer's 19.
_MOST_DIGITS = 20


def parse_strict(text: Any) -> Any:
    """Parses JSON of finite numbers and objects without a name twice.

    Args:
        text: A str of JSON.

    Raises:
        ValueError: If it is no JSON (then a `json.JSONDecodeError`), or holds a number that is not
            finite or has too many digits, or an object with a name twice.
        TypeError: If it is no text.
        RecursionError: If it is nested too deeply.

    Example:
        >>> parse_strict('{"a": 1, "a": 2}')
        Traceback (most recent call last):
        ...
        ValueError: the name 'a' is there twice
    """
    return json.loads(
        text,
        parse_constant=_refuse,
        parse_float=_finite,
        parse_int=_short,
        object_pairs_hook=_once,
    )


def _refuse(text: str) -> Any:
    raise ValueError(f"{text} is no finite number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:_MOST_DIGITS]} is no finite number")
    return value


def _short(text: str) -> int:
    if len(text) > _MOST_DIGITS:
        raise ValueError(f"the number {text[:_MOST_DIGITS]}... has {len(text)} digits")
    return int(text)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(
            f"the name {next(n for n in names if names.count(n) > 1)!r} is there twice"
        )
    return values
