"""The forms in which users have their data: arrays, tf.data datasets and Keras Sequences."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras as keras

from rl_sparsity_tf._compat import is_keras_3
from rl_sparsity_tf.data.checks import Batch
from rl_sparsity_tf.errors import DataError

_FORMS = (
    "(x, y) or (x, y, sample_weight) of arrays, or a batched tf.data.Dataset of such tuples, "
    "as fit takes them"
)
_COLUMNS = ("inputs", "labels", "sample weights")


def as_arrays(data: Any, name: str) -> Batch:
    """Turns a tuple of arrays, lists or tensors into arrays `(x, y, sample_weight or None)`.

    Datasets and Sequences are for others to read. Raises `DataError` if it is no such tuple, or
    holds anything but finite numbers.
    """
    _check_form(data, name)

    def convert(part: Any, what: str = "inputs") -> np.ndarray:
        try:
            array = np.asarray(part)
        except ValueError:  # rows of unequal length
            array = np.asarray(None)
        if what == "labels" and array.dtype.kind in "OSU" and array.ndim and array.size:
            first = array.reshape(-1)[0]
            if isinstance(first, str | bytes):
                raise _text_labels(name, first.item() if isinstance(first, np.generic) else first)
        if array.dtype.kind == "c":
            raise _complex(name, what)
        # Of kind V is bfloat16, too, whose scalars are no np.void.
        if array.dtype.kind in "OSUMm" or array.dtype.type is np.void or array.ndim == 0:
            raise DataError(
                f"{name} holds {type(part).__name__} that is no array of numbers with one row per "
                f"example. Expected {_FORMS}."
            )
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise DataError(
                f"{name} holds {int((~np.isfinite(array)).sum())} values that are NaN or infinite. "
                "Expected finite numbers: remove or replace those rows."
            )
        if array.dtype.kind == "f" and array.dtype.itemsize > 4:
            array = _as_float32(array, name)
        return array

    parts = [
        None if part is None else _map(lambda one, what=what: convert(one, what), part)
        for part, what in zip(data, _COLUMNS, strict=False)
    ]
    x, y, weights = (*parts, None) if len(parts) == 2 else parts
    if x is None or y is None:
        raise DataError(f"{name} holds None in place of x or y. Expected {_FORMS}.")
    return x, y, weights


def as_rows(data: Any, name: str, batch_size: int) -> tuple[Any, int]:
    """Reads a Sequence, a tuple of lists and the like into arrays; leaves datasets as they are.

    Returns `(x, y, sample_weight or None)` or the dataset, and the rows in a batch: `batch_size`
    where the data does not say. Raises `DataError` if it cannot be used.
    """
    if isinstance(data, keras.utils.Sequence) or _is_py_dataset(data):
        data, batch_size = join_sequence(data, name)
    return data if isinstance(data, tf.data.Dataset) else as_arrays(data, name), batch_size


def _is_py_dataset(data: Any) -> bool:
    """Whether data is a `keras.utils.PyDataset`, what Keras 3 calls a Sequence."""
    module = sys.modules.get("keras")
    return is_keras_3(module) and isinstance(data, module.utils.PyDataset)  # type: ignore[union-attr]


def _check_form(data: Any, name: str) -> None:
    if hasattr(data, "__next__") or inspect.isgeneratorfunction(data):
        raise DataError(
            f"{name} is a {type(data).__name__}, which can be read only once. Expected {_FORMS}: "
            "make one with tf.data.Dataset.from_generator, or write a keras.utils.Sequence."
        )
    if isinstance(data, int | float):
        raise DataError(
            f"{name} is the number {data}; splitting off a share of the rows, as fit's "
            f"validation_split does, is not supported. Expected {_FORMS}: split the rows yourself."
        )
    if not isinstance(data, tuple) or len(data) not in (2, 3):
        received = type(data).__name__
        if isinstance(data, tuple | list):
            received = f"{received} of {len(data)}"
        raise DataError(f"{name} is a {received}. Expected {_FORMS}.")


def _text_labels(name: str, first: object) -> DataError:
    example = "" if first is None else f", such as {first!r}"
    return DataError(
        f"{name} has labels that are text{example}. Expected numbers: give every class one, for "
        "example with np.unique(y, return_inverse=True)[1]."
    )


def _complex(name: str, what: str) -> DataError:
    return DataError(
        f"{name} has {what} that are complex. Expected real numbers: give the real and the "
        "imaginary part as columns of their own, np.concatenate([x.real, x.imag], -1)."
    )


def _as_float32(array: np.ndarray, name: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        cast = array.astype(np.float32)
    lost = ~np.isfinite(cast)
    if lost.any():
        raise _beyond_float32(name, float(array[lost][0]))
    return cast


def _beyond_float32(name: str, value: float) -> DataError:
    return DataError(
        f"{name} holds numbers beyond float32, which models compute in, such as {value:.6g}. "
        f"Expected numbers up to {np.finfo(np.float32).max:.2g}: scale them, or remove those rows."
    )


def _map(function: Any, part: Any) -> Any:
    # A list or dict is a structure (several inputs or outputs) only if it holds arrays.
    if isinstance(part, dict):
        return {key: _map(function, value) for key, value in part.items()}
    arrays = isinstance(part, list | tuple) and part and all(np.ndim(v) > 0 for v in part)
    if arrays and (isinstance(part, tuple) or all(hasattr(value, "shape") for value in part)):
        return tuple(_map(function, value) for value in part)
    return function(part)


def check_elements(dataset: tf.data.Dataset, name: str) -> None:
    """Raises `DataError` unless a dataset's elements are tuples of dense tensors of numbers."""
    spec = dataset.element_spec
    if isinstance(spec, dict):
        raise DataError(
            f"{name} is a dataset of dicts with the keys {sorted(spec)}. Expected {_FORMS}: for "
            "TFDS, pass as_supervised=True; else dataset.map(lambda row: (row[...], row[...]))."
        )
    if not isinstance(spec, tuple) or len(spec) not in (2, 3):
        raise DataError(
            f"{name} is a dataset of elements {spec}. Expected {_FORMS}; for TFDS, pass "
            "as_supervised=True; for an autoencoder, dataset.map(lambda x: (x, x))."
        )
    for index, column in enumerate(spec):
        for part in tf.nest.flatten(column):
            if isinstance(part, tf.NoneTensorSpec) and index == 2:
                continue
            if isinstance(part, tf.NoneTensorSpec):
                raise DataError(f"{name} holds None in place of x or y. Expected {_FORMS}.")
            if not isinstance(part, tf.TensorSpec):
                raise DataError(
                    f"{name} holds a {type(part).__name__.removesuffix('Spec')}. Expected dense "
                    "tensors: .to_tensor() pads ragged ones, tf.sparse.to_dense fills sparse ones."
                )
            if part.dtype.is_complex:
                raise _complex(name, _COLUMNS[index])
            if part.dtype == tf.string and index == 1:
                raise _text_labels(name, None)
            if part.dtype == tf.string:
                raise DataError(f"{name} holds text. Expected numbers: {_FORMS}.")


def read_batches(dataset: tf.data.Dataset, name: str, expected: str) -> Iterator[Batch]:
    """Yields a dataset's batches once, each as `(x, y, sample_weight or None)`.

    Raises `DataError` if it is empty, not finite, or raises; `expected` says what it should have
    held, should it be empty.
    """
    iterator = None
    count = 0
    while True:
        try:
            iterator = iter(dataset) if iterator is None else iterator
            element = next(iterator)
        except StopIteration:
            break
        except Exception as error:  # whatever the user's pipeline raises
            raise DataError(
                f"{name} could not be read: batch {count} raises {reason_of(error)}. Expected a "
                "dataset that a loop runs through: for batch in dataset: pass."
            ) from error
        for part in tf.nest.flatten(element):
            finite = part is None or not part.dtype.is_floating
            if not finite and not bool(tf.reduce_all(tf.math.is_finite(part))):
                raise DataError(
                    f"{name} holds values that are NaN or infinite. Expected finite numbers: "
                    "filter or replace those rows."
                )
            if part is not None and part.dtype == tf.float64:
                _as_float32(part.numpy(), name)
        yield element if len(element) == 3 else (*element, None)
        count += 1
    if not count:
        raise DataError(f"{name} is empty. Expected {expected}.")


def reason_of(error: Exception) -> str:
    """What an error of the user's own code says, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = re.sub(r"^\{\{.*?\}\} *|\s*\[Op:.*$", "", lines[0]) if lines else ""
    # The name that a generator's own error has is in the text; others are named by their class.
    return text if re.match(r"\w+(Error|Exception): ", text) else f"{type(error).__name__}: {text}"


def join_sequence(sequence: keras.utils.Sequence, name: str) -> tuple[tuple[Any, ...], int]:
    """Joins the batches of a Sequence, `(x, y)` or `(x, y, sample_weight)`.

    Returns the same tuple of all rows, and the rows in its first batch. Raises `DataError` if it is
    empty, raises, or its batches do not fit together.
    """
    batches = []
    try:
        for index in range(len(sequence)):
            batches.append(sequence[index])
    except Exception as error:  # whatever the user's own class raises
        raise DataError(
            f"{name} could not be read: batch {len(batches)} raises {reason_of(error)}. Expected "
            "a Sequence that sequence[0] to sequence[len(sequence) - 1] can be read from."
        ) from error
    if not batches:
        raise DataError(f"{name} is empty. Expected at least one batch.")
    for index, batch in enumerate(batches):
        if not isinstance(batch, tuple) or len(batch) not in (2, 3):
            raise DataError(
                f"{name} has batches of type {type(batch).__name__} (batch {index}). Expected "
                "tuples (x, y) or (x, y, sample_weight)."
            )
    try:
        joined = tf.nest.map_structure(
            lambda *parts: None if parts[0] is None else np.concatenate(parts), *batches
        )
    except (ValueError, TypeError) as error:
        raise DataError(
            f"{name} has batches that do not fit together: {reason_of(error)}. Expected the same "
            "structure in all of them and rows of one shape: pad them to one length."
        ) from error
    return joined, len(tf.nest.flatten(batches[0])[0])
