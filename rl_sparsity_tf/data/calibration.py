"""Inputs for calibrating and checking an exported file: the user's rows, or seeded random ones."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras as keras

from rl_sparsity_tf.checks import fits, shape_advice
from rl_sparsity_tf.data.forms import reason_of
from rl_sparsity_tf.errors import DataError, did_you_mean
from rl_sparsity_tf.layers.structure import InputSpec


def collect_rows(data: object, specs: Sequence[InputSpec], max_rows: int) -> list[np.ndarray]:
    """Takes the first rows of the data a user gave, `max_rows` at most.

    The data is an array (one input), a tuple or list with one array per input, a mapping from input
    names to arrays, or an iterable of batches (a tf.data.Dataset, a generator), each batch being
    one of these or `(inputs, targets)`; or a function without arguments that returns any of these,
    as TFLite's `representative_dataset`. Iterables are read only as far as needed.

    Returns one array per input, of shape `(rows, ...)` and the input's type. Raises `DataError` if
    the data does not fit the inputs, is empty or not finite, or raises.
    """
    if callable(data) and not isinstance(data, Iterable | keras.layers.Layer | type):
        data = _returned(data)
    batches: list[list[np.ndarray]] = []
    whole = _as_inputs(data, specs)
    if whole is not None:
        batches.append(whole)
    elif isinstance(data, Iterable) and not isinstance(data, (np.ndarray, Mapping, str, bytes)):
        rows = 0
        # Every batch but an empty one has a row: a generator of those may never end.
        for batch in itertools.islice(_read(data), max_rows):
            inputs = _batch_inputs(batch, specs)
            if inputs is None:
                raise _misfit(batch, specs)
            batches.append(inputs)
            rows += len(inputs[0])
            if rows >= max_rows:
                break
    else:
        raise _misfit(data, specs)
    if not any(len(inputs[0]) for inputs in batches):
        raise DataError("representative_data has no rows. Give at least one row of inputs.")
    columns = [np.concatenate(parts)[:max_rows] for parts in zip(*batches, strict=True)]
    for spec, column in zip(specs, columns, strict=True):
        if np.issubdtype(column.dtype, np.floating) and not np.isfinite(column).all():
            raise DataError(
                f"representative_data for input {spec.name!r} contains NaN or infinite values. "
                "Expected finite numbers: clean the data first."
            )
    return columns


def _returned(function: Callable[[], Any]) -> Any:
    """What a function such as TFLite's `representative_dataset` gives."""
    name = getattr(function, "__name__", type(function).__name__)
    try:
        asked = [
            parameter.name
            for parameter in inspect.signature(function).parameters.values()
            if parameter.default is parameter.empty
            and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        ]
    except (TypeError, ValueError):  # written in C
        asked = []
    if asked:
        raise DataError(
            f"representative_data is the function {name}, which asks for {asked}. Expected one "
            f"without arguments that yields batches: lambda: {name}(...), with values for them."
        )
    try:
        given = function()
    except Exception as error:  # whatever the user's function raises
        raise DataError(
            f"representative_data could not be read: the function {name} raises "
            f"{reason_of(error)}. Expected one that yields batches: for batch in {name}(): pass."
        ) from error
    if given is None:
        raise DataError(
            f"representative_data is the function {name}, which returns None. Expected one that "
            "yields batches, a list with one array per input each: yield [x[i : i + 1]]."
        )
    return given


def _read(data: Iterable[Any]) -> Iterator[Any]:
    count = 0
    try:
        for batch in data:
            yield batch
            count += 1
    except Exception as error:  # whatever the user's generator or dataset raises
        raise DataError(
            f"representative_data could not be read: batch {count} raises {reason_of(error)}. "
            "Expected batches that a loop runs through: for batch in data: pass."
        ) from error


def _as_inputs(data: object, specs: Sequence[InputSpec]) -> list[np.ndarray] | None:
    """Reads `data` as one array of rows per input, or returns None if it is not that."""
    if isinstance(data, (np.ndarray, tf.Tensor)):
        arrays: list[Any] = [data]
    elif isinstance(data, Mapping):
        if set(data) != {spec.name for spec in specs}:
            return None
        arrays = [data[spec.name] for spec in specs]
    elif isinstance(data, (tuple, list)):
        arrays = list(data)
    else:
        return None
    if len(arrays) != len(specs) or not all(isinstance(a, (np.ndarray, tf.Tensor)) for a in arrays):
        return None
    rows = [np.asarray(array) for array in arrays]
    if not all(spec.accepts(row) for spec, row in zip(specs, rows, strict=True)):
        return None
    if len({len(row) for row in rows}) != 1:
        return None
    for spec, row in zip(specs, rows, strict=True):
        if row.dtype.kind in "OSUMmc":
            raise DataError(
                f"representative_data for input {spec.name!r} is of type {row.dtype}. Expected "
                f"numbers that can be cast to {spec.dtype}."
            )
    return [row.astype(spec.dtype) for spec, row in zip(specs, rows, strict=True)]


def _batch_inputs(batch: object, specs: Sequence[InputSpec]) -> list[np.ndarray] | None:
    if isinstance(batch, tuple) and len(batch) == 2 and isinstance(batch[0], str):
        batch = batch[1]  # of a signature's name and its inputs, as TFLite's generators may yield
    inputs = _as_inputs(batch, specs)
    if inputs is None and isinstance(batch, (tuple, list)) and batch:
        # (inputs, targets) or (inputs, targets, sample weights), as fit takes them.
        inputs = _as_inputs(batch[0], specs)
    if inputs is None:
        # A dataset that was not batched yields single rows.
        first = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
        for candidate in (batch, first):
            single = [candidate] if len(specs) == 1 else candidate
            if isinstance(single, (tuple, list)) and len(single) == len(specs):
                rows = [
                    np.asarray(row)[None]
                    for row in single
                    if isinstance(row, (np.ndarray, tf.Tensor))
                ]
                if inputs is None and len(rows) == len(specs):
                    inputs = _as_inputs(rows, specs)
    return inputs


def _misfit(data: object, specs: Sequence[InputSpec]) -> DataError:
    wanted = ", ".join(f"{spec.name!r} {(None, *spec.shape)} {spec.dtype}" for spec in specs)
    if isinstance(data, Mapping):
        got = f"a mapping with the keys {sorted(map(str, data))}"
    elif isinstance(data, (tuple, list)):
        got = f"a {type(data).__name__} of {[_describe(item) for item in data[:4]]}"
    else:
        got = _describe(data)
    return DataError(
        f"The data received is {got}; the model's inputs are {wanted}. Expected an array, a tuple "
        "with one array per input in that order (first axis: rows), a mapping from input names to "
        "arrays, or an iterable of such batches, with or without targets."
        f"{_advice(data, specs)}"
    )


def _advice(data: object, specs: Sequence[InputSpec]) -> str:
    """What to do with the first array that does not fit its input."""
    if isinstance(data, Mapping):
        unknown = [str(name) for name in data if name not in {spec.name for spec in specs}]
        if unknown:
            return " " + did_you_mean(unknown[0], [spec.name for spec in specs])
        arrays = [data.get(spec.name) for spec in specs]
    else:
        arrays = list(data) if isinstance(data, tuple | list) else [data]
    for spec, array in zip(specs, arrays, strict=False):
        shape = getattr(array, "shape", None)
        if shape is not None and None not in tuple(shape) and not fits(shape[1:], spec.shape):
            return shape_advice(tuple(shape), spec.shape)
    return ""


def _describe(item: object) -> str:
    shape = getattr(item, "shape", None)
    return type(item).__name__ if shape is None else f"{type(item).__name__}{tuple(shape)}"
