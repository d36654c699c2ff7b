"""Training and validation data in the forms that `fit` takes, checked and cut into batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras as keras

from rl_sparsity_tf.errors import DataError

Batch = tuple[Any, Any, Any]
"""`(x, y, sample_weight or None)`, each a tensor or a structure of tensors."""

_FORMS = (
    "(x, y) or (x, y, sample_weight) of arrays, or a batched tf.data.Dataset of such tuples, "
    "as fit takes them"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingData:
    """Training data, once as the user gave it and once as a pool of cached batches.

    Attributes:
        dataset: Batches for training epochs, reshuffled in every one.
        pool: Equally shaped batches kept in memory, for statistics and short recoveries.
        steps: Batches in an epoch, None if not known.
    """

    dataset: tf.data.Dataset
    pool: list[Batch]
    steps: int | None

    def batch(self, index: int) -> Batch:
        """The pool's batch of a running number, around and around."""
        return self.pool[index % len(self.pool)]


def training_data(
    data: Any, model: keras.Model, *, batch_size: int = 128, pool_size: int = 64, seed: int = 0
) -> TrainingData:
    """Prepares training data.

    Args:
        data: Arrays or a dataset, as `fit` takes them.
        model: The model it is for; its input shapes are checked.
        batch_size: Rows in a batch, where `data` is not batched already.
        pool_size: Batches kept in memory at most.
        seed: Order of the rows.

    Raises:
        DataError: If the data cannot be used.
    """
    if isinstance(data, keras.utils.Sequence):
        data = _concatenate(data, "train")
    if isinstance(data, tf.data.Dataset):
        _check_batched(data, "train")
        steps = int(data.cardinality())
        pool = list(_take(data, pool_size, "train"))
        check_batch(pool[0], model, "train")
        shapes = [_shapes(batch) for batch in pool]
        pool = [batch for batch, shape in zip(pool, shapes, strict=True) if shape == shapes[0]]
        # An endless dataset has no epoch; one pass over the pool stands for it.
        if steps == tf.data.INFINITE_CARDINALITY:
            return TrainingData(dataset=data.take(len(pool)), pool=pool, steps=len(pool))
        return TrainingData(dataset=data, pool=pool, steps=steps if steps > 0 else None)
    arrays = _arrays(data, "train")
    rows = _rows(arrays, "train")
    check_batch(_slice(arrays, slice(0, min(rows, 2))), model, "train")
    size = min(batch_size, rows)
    order = np.random.default_rng(seed).permutation(rows)
    count = min(pool_size, rows // size)
    pool = [_tensors(_slice(arrays, order[i * size : (i + 1) * size])) for i in range(count)]
    x, y, weights = arrays
    columns = (x, y) if weights is None else (x, y, weights)
    dataset = tf.data.Dataset.from_tensor_slices(columns)
    dataset = dataset.shuffle(min(rows, 100_000), seed=seed).batch(size)
    return TrainingData(dataset=dataset, pool=pool, steps=-(-rows // size))


def evaluation_data(
    data: Any, model: keras.Model, name: str, *, batch_size: int = 1024
) -> list[Batch]:
    """Prepares validation or test data: all of it, as cached batches.

    Args:
        data: Arrays or a finite dataset, as `evaluate` takes them.
        model: The model it is for.
        name: What to call the data in errors.
        batch_size: Rows in a batch, where `data` is not batched already.

    Raises:
        DataError: If the data cannot be used.
    """
    if isinstance(data, keras.utils.Sequence):
        data = _concatenate(data, name)
    if isinstance(data, tf.data.Dataset):
        _check_batched(data, name)
        if int(data.cardinality()) == tf.data.INFINITE_CARDINALITY:
            raise DataError(
                f"{name} is an infinite dataset. Expected a finite one: end it with .take(batches)."
            )
        batches = list(_take(data, None, name))
        check_batch(batches[0], model, name)
        return batches
    arrays = _arrays(data, name)
    rows = _rows(arrays, name)
    check_batch(_slice(arrays, slice(0, min(rows, 2))), model, name)
    return [
        _tensors(_slice(arrays, slice(start, start + batch_size)))
        for start in range(0, rows, batch_size)
    ]


def sample_rows(
    batches: list[Batch], rows: int, *, seed: int = 0, batch_size: int = 1024
) -> list[Batch]:
    """Draws rows from cached batches, without replacement.

    Args:
        batches: All batches.
        rows: Rows wanted; with no more than that, the batches are returned as they are.
        seed: Which rows.
        batch_size: Rows in the new batches.

    Returns:
        Batches of the rows drawn, in their old order.
    """
    total = sum(len(tf.nest.flatten(batch[0])[0]) for batch in batches)
    if total <= rows:
        return batches
    chosen = np.sort(np.random.default_rng(seed).choice(total, rows, replace=False))
    joined = tf.nest.map_structure(
        lambda *parts: None if parts[0] is None else np.concatenate([p.numpy() for p in parts]),
        *batches,
    )
    return [
        _tensors(_slice(joined, chosen[start : start + batch_size]))
        for start in range(0, rows, batch_size)
    ]


def inputs_of(batches: list[Batch]) -> Any:
    """The inputs of all batches in one array, or in one structure of arrays."""
    xs = [batch[0] for batch in batches]
    return tf.nest.map_structure(lambda *parts: np.concatenate([p.numpy() for p in parts]), *xs)


def check_batch(batch: Batch, model: keras.Model, name: str) -> None:
    """Raises unless a batch's inputs have the shapes that the model takes.

    Raises:
        DataError: Naming both shapes.
    """
    x = batch[0]
    if isinstance(x, dict):
        missing = [tensor_name for tensor_name in model.input_names if tensor_name not in x]
        if missing:
            raise DataError(
                f"{name} lacks the inputs {missing}. Expected a dict with {model.input_names}, "
                f"received {sorted(x)}."
            )
        parts = [x[tensor_name] for tensor_name in model.input_names]
    else:
        parts = list(x) if isinstance(x, list | tuple) else [x]
    if len(parts) != len(model.inputs):
        raise DataError(
            f"{name} has {len(parts)} inputs; the model takes {len(model.inputs)}: "
            f"{model.input_names}. Pass them as a list or a dict in the x of (x, y)."
        )
    for part, tensor in zip(parts, model.inputs, strict=True):
        expected = tuple(tensor.shape)[1:]
        received = tuple(np.shape(part))[1:]
        fits = len(expected) == len(received) and all(
            want in (None, have) for want, have in zip(expected, received, strict=True)
        )
        if not fits:
            hint = ""
            if expected == (*received, 1):
                hint = " Add the channel axis: x[..., None]."
            elif tuple(np.shape(part)) == expected:
                hint = " The batch axis is missing: x[None], or .batch(32) on a dataset."
            raise DataError(
                f"{name} has inputs of shape {received} per row; the model takes {expected}.{hint}"
            )


def _arrays(data: Any, name: str) -> Batch:
    if not isinstance(data, tuple) or len(data) not in (2, 3):
        received = type(data).__name__
        if isinstance(data, tuple | list):
            received = f"{received} of {len(data)}"
        raise DataError(f"{name} is a {received}. Expected {_FORMS}.")

    def convert(part: Any) -> np.ndarray:
        try:
            array = np.asarray(part)
        except ValueError:  # rows of unequal length
            array = np.asarray(None)
        if array.dtype.kind in "OSUMm" or array.ndim == 0:
            raise DataError(
                f"{name} holds {type(part).__name__} that is no array of numbers with one row per "
                f"example. Expected {_FORMS}."
            )
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise DataError(
                f"{name} holds {int((~np.isfinite(array)).sum())} values that are NaN or infinite. "
                "Expected finite numbers: remove or replace those rows."
            )
        if array.dtype == np.float64:
            array = array.astype(np.float32)
        return array

    parts = tuple(None if p is None else _map(convert, p) for p in data)
    x, y, weights = (*parts, None) if len(parts) == 2 else parts
    if x is None or y is None:
        raise DataError(f"{name} holds None in place of x or y. Expected {_FORMS}.")
    return x, y, weights


def _map(function: Any, part: Any) -> Any:
    # A list or dict is a structure (several inputs or outputs) only if it holds arrays.
    if isinstance(part, dict):
        return {key: _map(function, value) for key, value in part.items()}
    arrays = isinstance(part, list | tuple) and part and all(np.ndim(v) > 0 for v in part)
    if arrays and (isinstance(part, tuple) or all(hasattr(value, "shape") for value in part)):
        return tuple(_map(function, value) for value in part)
    return function(part)


def _rows(arrays: Batch, name: str) -> int:
    lengths = {len(array) for array in tf.nest.flatten(arrays) if array is not None}
    if len(lengths) != 1:
        raise DataError(
            f"{name} has arrays of {sorted(lengths)} rows. Expected as many labels (and sample "
            "weights) as inputs."
        )
    (rows,) = lengths
    if rows == 0:
        raise DataError(f"{name} is empty. Expected at least one row.")
    return rows


def _slice(arrays: Batch, rows: Any) -> Batch:
    x, y, weights = tf.nest.map_structure(
        lambda array: None if array is None else array[rows], arrays
    )
    return x, y, weights


def _tensors(arrays: Batch) -> Batch:
    x, y, weights = tf.nest.map_structure(
        lambda array: None if array is None else tf.constant(array), arrays
    )
    return x, y, weights


def _shapes(batch: Batch) -> list[Any]:
    return [None if part is None else tuple(part.shape) for part in tf.nest.flatten(batch)]


def _check_batched(dataset: tf.data.Dataset, name: str) -> None:
    spec = dataset.element_spec
    if not isinstance(spec, tuple) or len(spec) not in (2, 3):
        raise DataError(
            f"{name} is a dataset of elements {spec}. Expected {_FORMS}; for TFDS, pass "
            "as_supervised=True."
        )


def _take(dataset: tf.data.Dataset, count: int | None, name: str) -> Iterator[Batch]:
    if count is not None:
        dataset = dataset.take(count)
    empty = True
    for element in dataset:
        empty = False
        for part in tf.nest.flatten(element):
            if part.dtype.is_floating and not bool(tf.reduce_all(tf.math.is_finite(part))):
                raise DataError(
                    f"{name} holds values that are NaN or infinite. Expected finite numbers: "
                    "filter or replace those rows."
                )
        yield element if len(element) == 3 else (*element, None)
    if empty:
        raise DataError(f"{name} is empty. Expected at least one batch.")


def _concatenate(sequence: keras.utils.Sequence, name: str) -> tuple[Any, ...]:
    batches = [sequence[index] for index in range(len(sequence))]
    if not batches:
        raise DataError(f"{name} is empty. Expected at least one batch.")
    return tf.nest.map_structure(lambda *parts: np.concatenate(parts), *batches)
