"""Checks of arguments and of shapes, with what to do about those that cannot be used."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeGuard

import numpy as np

from rl_sparsity_tf.errors import ArgumentError


def is_whole(value: object) -> TypeGuard[int]:
    """Whether a value is a whole number, of NumPy's too; True and False are none."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value is a real number, of NumPy's too; True and False are none."""
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)


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
    if not is_whole(value) or int(value) < smallest:
        raise ArgumentError(
            f"{name}={value!r} cannot be used. Expected a whole number of at least {smallest}."
        )
    return int(value)


def check_share(name: str, value: object) -> float:
    """Raises unless a value is a number from 0 to 1."""
    if not is_number(value) or not math.isfinite(value) or not 0.0 <= value <= 1.0:
        raise ArgumentError(f"{name}={value!r} cannot be used. Expected a share from 0 to 1.")
    return float(value)


_GREY, _COLOURS, _WITH_ALPHA = 1, 3, 4
_IMAGE_AXES = 3


def shape_advice(received: Sequence[int], wanted: Sequence[int | None], name: str = "x") -> str:
    """The call that turns an array into one of rows of the wanted shape, if one is likely meant.

    The shape received has the axis that counts rows, the wanted one has not; None is an open axis.
    Returns a sentence that begins with a space, or nothing. It calls the array by `name`.

    Example:
        >>> shape_advice((100, 64), (8, 8, 1))
        ' Reshape it: x.reshape(-1, 8, 8, 1).'
    """
    given, want = tuple(received), tuple(wanted)
    found = _missing_axis(given, want, name) or _order(given, want, name)
    found = found or _channels(given[1:], want, name) or _sizes(given, want, name)
    return f" {found}." if found else ""


def fits(shape: Sequence[int], wanted: Sequence[int | None]) -> bool:
    """Whether a shape agrees with one that may have open axes."""
    return len(shape) == len(wanted) and all(
        want is None or want == have for have, want in zip(shape, wanted, strict=True)
    )


def _missing_axis(given: tuple[int, ...], want: tuple[int | None, ...], name: str) -> str:
    row = given[1:]
    if fits(given, want):
        return f"The batch axis is missing: {name}[None], or .batch(32) on a dataset"
    if want[-1:] == (1,) and fits((*row, 1), want):
        return f"Add the channel axis: {name}[..., None]"
    if row[-1:] == (1,) and fits(row[:-1], want):
        return f"Take the last axis off: {name}[..., 0]"
    if want[-1:] == (1,) and len(want) > 1 and fits((*given, 1), want):
        return f"Add the batch and the channel axis: {name}[None, ..., None]"
    return ""


def _order(given: tuple[int, ...], want: tuple[int | None, ...], name: str) -> str:
    row = given[1:]
    if len(want) == 1 and len(given) == 2 and given[0] == want[0]:
        return f"The rows come first: {name}.T"
    if len(row) < 2 or len(row) != len(want):
        return ""
    if len(row) == 2:
        return f"Swap the axes: np.swapaxes({name}, 1, 2)" if fits(row[::-1], want) else ""
    if fits((*row[1:], row[0]), want):
        return f"The channels come last: np.moveaxis({name}, 1, -1)"
    if fits((row[-1], *row[:-1]), want):
        return f"The channels come first: np.moveaxis({name}, -1, 1)"
    return ""


def _channels(row: tuple[int, ...], want: tuple[int | None, ...], name: str) -> str:
    if len(want) != _IMAGE_AXES:
        return ""
    if want[-1] == _COLOURS and fits(row, want[:-1]):
        return f"Make three channels of one: np.repeat({name}[..., None], 3, -1)"
    if not fits(row[:-1], want[:-1]):
        return ""
    return {
        (_GREY, _COLOURS): f"Make three channels of one: np.repeat({name}, 3, -1)",
        (_COLOURS, _GREY): f"Make the images grey: tf.image.rgb_to_grayscale({name})",
        (_WITH_ALPHA, _COLOURS): f"Leave the alpha channel out: {name}[..., :3]",
    }.get((row[-1], want[-1]), "")  # type: ignore[arg-type]


def _sizes(given: tuple[int, ...], want: tuple[int | None, ...], name: str) -> str:
    row = given[1:]
    sizes = [size for size in want if size is not None]
    if len(sizes) != len(want):
        return ""
    elements = math.prod(sizes)
    # All rows in one axis, or a single one, as well as rows in too few or too many axes.
    if elements and elements in (math.prod(row), math.prod(given)):
        return f"Reshape it: {name}.reshape(-1, {', '.join(map(str, sizes))})"
    if len(row) == len(want) == _IMAGE_AXES and row[-1] == want[-1]:
        return f"Resize the images: tf.image.resize({name}, ({sizes[0]}, {sizes[1]}))"
    return ""
