"""Whether rows are what a .tflite file takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


class InputError(ValueError):
    """The rows received are not what a file takes."""


def check_rows(inputs: Sequence[dict[str, Any]], arrays: Sequence[np.ndarray]) -> None:
    """Raises unless there is one array per input, of its shape and of a type that can be stored.

    LiteRT itself resizes an input without a word to whatever it is given, and computes.

    Args:
        inputs: What LiteRT says of the file's inputs, each with its name.
        arrays: The rows received.

    Raises:
        InputError: Naming the input, what was received and what was expected.
    """
    if len(inputs) != len(arrays):
        names = [details["name"] for details in inputs]
        raise InputError(
            f"The file has {len(inputs)} inputs {names}, received {len(arrays)}. Expected one "
            "array per input."
        )
    for details, array in zip(inputs, arrays, strict=True):
        name, dtype = details["name"], np.dtype(details["dtype"])
        wanted = tuple(int(size) for size in details["shape_signature"][1:])
        fits = len(wanted) == array.ndim - 1 and all(
            want in (-1, have) for want, have in zip(wanted, array.shape[1:], strict=True)
        )
        if not fits:
            sizes = ["rows", *("any" if size < 0 else str(size) for size in wanted)]
            hint = " The first axis counts the rows: x[None] is one." * (array.shape == wanted)
            raise InputError(
                f"inputs has the shape {array.shape} for the file's input {name!r}. Expected "
                f"({', '.join(sizes)}).{hint}"
            )
        if array.dtype.kind == "f" and dtype.kind != "f" and not details["quantization"][0]:
            raise InputError(
                f"inputs has the type {array.dtype} for the file's input {name!r}. Expected "
                f"{dtype}: x.astype({dtype.name!r}) if these are whole numbers."
            )
        if array.dtype.kind in "iu" and dtype.kind in "iu" and not details["quantization"][0]:
            low, high, limits = int(array.min()), int(array.max()), np.iinfo(dtype)
            if low < limits.min or high > limits.max:
                raise InputError(
                    f"inputs has numbers from {low} to {high} for the file's input {name!r}. "
                    f"Expected {dtype}: numbers from {limits.min} to {limits.max}."
                )
