"""Checks of arguments that several calls share: what was received, what was expected."""

from __future__ import annotations

import math

import numpy as np

from rl_sparsity_tf.errors import ArgumentError


def check_type(name: str, value: object, expected: type, example: str) -> None:
    """Raises unless a value is of a type."""
    if not isinstance(value, expected):
        raise ArgumentError(
            f"{name}={value!r} is a {type(value).__name__}. Expected a {expected.__name__}, for "
            f"example {example}."
        )


def check_flag(name: str, value: object) -> bool:
    """Raises unless a value is True or False."""
    if not isinstance(value, bool | np.bool_):
        raise ArgumentError(f"{name}={value!r} cannot be used. Expected True or False.")
    return bool(value)


def check_count(name: str, value: object, smallest: int) -> int:
    """Raises unless a value is a whole number of at least `smallest`."""
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not whole or int(value) < smallest:  # type: ignore[call-overload]
        raise ArgumentError(
            f"{name}={value!r} cannot be used. Expected a whole number of at least {smallest}."
        )
    return int(value)  # type: ignore[call-overload]


def check_share(name: str, value: object) -> float:
    """Raises unless a value is a number from 0 to 1."""
    number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not 0.0 <= value <= 1.0:  # type: ignore
        raise ArgumentError(f"{name}={value!r} cannot be used. Expected a share from 0 to 1.")
    return float(value)  # type: ignore[arg-type]
