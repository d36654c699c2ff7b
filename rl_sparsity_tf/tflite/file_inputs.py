"""What a .tflite file takes, and whether rows are that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rl_sparsity_tf.errors import did_you_mean
from rl_sparsity_tf.shape_advice import fits, shape_advice


class InputError(ValueError):
    """The rows received are not what a file takes."""


def names_in_order(
    by_name: Mapping[str, dict[str, Any]], ports: Sequence[dict[str, Any]]
) -> list[str]:
    """A signature's names in the order of the file's inputs or outputs.

    LiteRT lists a signature by the alphabet; the ports of a file that `export_tflite` wrote are in
    Keras's order.

    Args:
        by_name: What LiteRT says of the signature's inputs, or outputs.
        ports: What it says of the file's, in their order.
    """
    places: dict[int, list[int]] = {}
    for place, details in enumerate(ports):
        places.setdefault(int(details["index"]), []).append(place)

    def place_of(name: str) -> int:
        # A file may put out one tensor twice.
        left = places.get(int(by_name[name]["index"]))
        return left.pop(0) if left else len(ports)

    return sorted(sorted(by_name), key=place_of)


def by_names(
    inputs: Sequence[str], names: Sequence[str], arrays: Sequence[np.ndarray]
) -> list[np.ndarray]:
    """Puts arrays that came with names into the order of the file's inputs.

    Raises:
        InputError: If there is not one array for every input.
    """
    unknown = [name for name in names if name not in inputs]
    if unknown:
        raise InputError(
            f"inputs has {unknown[0]!r}, which is no input of the file. "
            f"{did_you_mean(unknown[0], inputs)}"
        )
    missing = [name for name in inputs if name not in names]
    if missing:
        raise InputError(
            f"inputs lacks {missing}. Expected a dict with rows for every one of {list(inputs)}, "
            f"received {list(names)}."
        )
    return [arrays[names.index(name)] for name in inputs]


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
        sizes = details["shape_signature"][1:]
        wanted = tuple(None if size < 0 else int(size) for size in sizes)
        if array.ndim == 0 or not fits(array.shape[1:], wanted):
            axes = ["rows", *("any" if size is None else str(size) for size in wanted)]
            raise InputError(
                f"inputs has the shape {array.shape} for the file's input {name!r}. Expected "
                f"({', '.join(axes)}).{shape_advice(array.shape, wanted)}"
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
