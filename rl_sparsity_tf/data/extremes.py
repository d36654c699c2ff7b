"""Numbers so large that what a network makes of them leaves float32, and what is said of them.

An infinite loss or gradient does not stop anything by itself: it spoils fits and weights without a
word, or the exported file in the end. So weights, rows and the dense network's loss are looked at
before a search begins.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras as keras

from rl_sparsity_tf.errors import DataError, ModelError

LARGEST_WEIGHT = 1e18
"""Squares of larger weights are beyond float32, and a sum of them sooner."""

# Rows below are not tried: no network that was trained on them leaves float32.
_LARGE = 1e9
_MOST_ROWS = 32
_TRAIN_AGAIN = (
    "Expected a trained model: train it again, with a smaller learning rate if the loss became "
    "NaN, or load a checkpoint from before."
)


def check_weights(model: keras.Model, *, exported: bool = False) -> None:
    """Raises `ModelError` if one of a model's weights holds NaN, infinite or huge values.

    If the model is only to be exported, constants among the weights, such as the mask of an
    attention, may be infinite, and weights as large as they like.
    """
    trained = {id(weight) for weight in model.trainable_weights}
    for weight in model.weights:
        if not weight.dtype.is_floating or 0 in weight.shape:
            continue
        nan = bool(tf.reduce_any(tf.math.is_nan(weight)))
        largest = float(tf.reduce_max(tf.abs(weight)))
        infinite = largest == np.inf and not (exported and id(weight) not in trained)
        huge = largest > LARGEST_WEIGHT and id(weight) in trained and not exported
        if nan or infinite or huge:
            ordinary = not (nan or infinite)
            holds = f"values up to {largest:.3g}" if ordinary else "NaN or infinite values"
            raise ModelError(
                f"The weight {weight.name!r} of model {model.name!r} holds {holds}. {_TRAIN_AGAIN}"
            )


@dataclasses.dataclass(frozen=True)
class LargeRows:
    """The rows of a data set with the largest numbers.

    `numbers` says which rows they are; `rows` holds each as a batch of one.
    """

    name: str
    numbers: list[int]
    rows: list[Any]


class LargeRowFinder:
    """Looks for rows with large numbers in batches, one after the other."""

    def __init__(self, name: str):
        self._name = name
        self._found: list[tuple[float, int, Any]] = []

    def __call__(self, batch: Any, first: int) -> None:
        """Looks through a batch whose rows are numbered from `first`."""
        sizes = [_sizes(part) for part in tf.nest.flatten(batch) if part is not None]
        large = [one for one in sizes if one is not None]
        if not large:
            return
        largest = np.max(large, axis=0)
        chosen = np.argsort(-largest, kind="stable")[:_MOST_ROWS]
        for row in chosen[largest[chosen] > _LARGE]:
            one = _take(batch, row)
            self._found.append((float(largest[row]), first + int(row), one))
        self._found = sorted(self._found, key=lambda found: (-found[0], found[1]))[:_MOST_ROWS]

    @property
    def found(self) -> LargeRows:
        """The largest rows so far, the largest first."""
        return LargeRows(self._name, [f[1] for f in self._found], [f[2] for f in self._found])


def check_training(model: keras.Model, large: LargeRows | None, fixed: int | None) -> None:
    """Raises `DataError`, naming the row, if a training step on a large row leaves float32.

    The model is a compiled copy. `large` is None where the large rows are not known; `fixed` is the
    number of rows that the model takes per call, if it fixes it.
    """
    if large is None:
        return

    @tf.function(reduce_retracing=True)
    def largest(x: Any, y: Any, weights: Any) -> tf.Tensor:
        with tf.GradientTape() as tape:
            loss = model.compute_loss(x, y, model(x, training=False), weights)
        gradients = tape.gradient(loss, model.trainable_variables)
        dense = [tf.convert_to_tensor(part) for part in gradients if part is not None]
        # Adam sums their squares.
        squares = [tf.reduce_max(tf.square(tf.cast(part, tf.float32))) for part in dense]
        return tf.reduce_max([tf.cast(tf.abs(loss), tf.float32), *squares])

    for number, row in zip(large.numbers, large.rows, strict=True):
        if not np.isfinite(largest(*_repeated(row, fixed or 1))):
            raise _too_large(large.name, number, row, "its training")


def check_loss(
    loss: float, batches: list[Any], name: str, evaluate: Callable[[list[Any]], Any], model: Any
) -> None:
    """Raises if the dense network's loss is no number, and says because of which row.

    It raises `DataError` if a row with large numbers is the reason, and `ModelError` if an ordinary
    row is. `loss` is that over all batches; `evaluate` computes a score of some.
    """
    if np.isfinite(loss):
        return
    first = 0
    for batch in batches:
        count = len(tf.nest.flatten(batch[0])[0])
        if not np.isfinite(evaluate([batch]).loss):
            break
        first += count
    else:  # only all together are too much
        raise _too_large(name, None, tf.nest.map_structure(np.asarray, batches), "its loss")
    rows = [_take(batch, row) for row in range(count)]
    faults = (row for row in range(count) if not _finite(evaluate, rows[row], count))
    number = next(faults, int(np.argmax([max(_largest(row)) for row in rows])))
    if max(_largest(rows[number])) > _LARGE:
        raise _too_large(name, first + number, rows[number], "its loss")
    inputs, labels = _largest(rows[number])
    weight = max(model.weights, key=lambda w: float(tf.reduce_max(tf.abs(tf.cast(w, tf.float32)))))
    raise ModelError(
        f"Model {model.name!r} has the loss {loss:g} on {name}, because of row {first + number}, "
        f"whose inputs (up to {inputs:.3g}) and labels (up to {labels:.3g}) are ordinary. Its "
        f"largest weight is {weight.name!r}. {_TRAIN_AGAIN}"
    )


def _finite(evaluate: Callable[[list[Any]], Any], row: Any, count: int) -> bool:
    return bool(np.isfinite(evaluate([_repeated(row, count)]).loss))


def _sizes(part: Any) -> np.ndarray | None:
    """The largest magnitude in every row; None if none of them can be large."""
    array = np.asarray(part)
    if array.dtype.kind not in "fiu" or array.dtype.itemsize < 4 or not array.size:
        return None
    rows = array.reshape(len(array), -1)
    if float(rows.max()) <= _LARGE and float(rows.min()) >= -_LARGE:
        return None
    return np.maximum(rows.max(axis=1).astype(np.float64), -rows.min(axis=1).astype(np.float64))


def _take(batch: Any, row: int) -> Any:
    return tf.nest.map_structure(
        lambda part: None if part is None else np.asarray(part)[row : row + 1], batch
    )


def _repeated(row: Any, count: int) -> Any:
    """A batch of copies of a row, as tensors."""
    return tf.nest.map_structure(
        lambda part: None if part is None else tf.constant(np.repeat(part, count, axis=0)), row
    )


def _largest(row: Any) -> tuple[float, float]:
    """The largest magnitudes among a row's inputs, and among its labels."""

    def largest(part: Any) -> float:
        arrays = [np.asarray(one) for one in tf.nest.flatten(part) if one is not None]
        numbers = [one for one in arrays if one.dtype.kind in "fiu" and one.size]
        return max((float(np.abs(one.astype(np.float64)).max()) for one in numbers), default=0.0)

    return largest(row[0]), largest(row[1:])


def _too_large(name: str, number: int | None, row: Any, what: str) -> DataError:
    where = "its rows together" if number is None else f"row {number}"
    if number is None:
        row = tuple(zip(*row, strict=True))
    inputs, labels = _largest(row)
    return DataError(
        f"{name} has numbers that are too large: with {where} (inputs up to {inputs:.3g}, labels "
        f"and weights up to {labels:.3g}) {what} leaves float32, which models compute in. Expected "
        "numbers of the scale that the model was trained on: scale them as for its training, or "
        "remove such rows."
    )
