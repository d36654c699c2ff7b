"""How much rows count: class weights as sample weights, and sample weights checked."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from rl_sparsity_tf.checks import is_number, is_whole
from rl_sparsity_tf.data.labels import Output
from rl_sparsity_tf.errors import ArgumentError, DataError

_EXAMPLE = "Expected a dict with a number for every class, for example {0: 1.0, 1: 5.0}"


def weight_table(class_weight: Any) -> list[float] | None:
    """Checks a `class_weight`, `{class: weight}` as `fit` takes it, as far as no model is needed.

    Returns the weights by class; None stays None. Raises `ArgumentError` if it is no such dict.
    """
    if class_weight is None:
        return None
    if not isinstance(class_weight, dict):
        hint = ""
        if isinstance(class_weight, list | tuple | np.ndarray):
            hint = " A list of weights becomes one with dict(enumerate(weights))."
        raise ArgumentError(
            f"class_weight={class_weight!r} is a {type(class_weight).__name__}. {_EXAMPLE}.{hint}"
        )
    keys = list(class_weight)
    if not all(map(is_whole, keys)) or sorted(keys) != list(range(len(keys))) or not keys:
        raise ArgumentError(
            f"class_weight has the keys {keys}. Expected the classes 0, 1, 2, ... without a gap."
        )
    weights = []
    for key in range(len(keys)):
        value = class_weight[key]
        if not is_number(value) or not 0 <= float(value) < float("inf"):
            raise ArgumentError(
                f"class_weight[{key}]={value!r} cannot be used. Expected a finite number of at "
                "least 0."
            )
        weights.append(float(value))
    if not any(weights):
        raise ArgumentError(
            "class_weight is 0 for every class, so nothing would be learned. Expected a positive "
            "number for at least one."
        )
    return weights


class ClassWeights:
    """Turns labels into the sample weights that a [weight_table][] stands for.

    Raises `ArgumentError` if the model has several outputs, or another number of classes.
    """

    def __init__(self, table: list[float], outputs: tuple[Output, ...] | None):
        if outputs is None or len(outputs) != 1:
            raise ArgumentError(
                "class_weight was given for a model with several outputs. Expected a model with "
                "one; pass sample weights as train=(x, y, {output name: weights}) instead."
            )
        self._output = outputs[0]
        self._table = table
        kind, classes = self._output.kind, self._output.classes
        if kind == "binary":
            classes = 2 if classes == 1 else classes
        elif kind not in ("sparse", "categorical"):
            classes = None
        if classes is not None and classes != len(table):
            raise ArgumentError(
                f"class_weight has {len(table)} classes; the model has {classes}. Expected the "
                f"keys 0 to {classes - 1}."
            )

    def __call__(self, y: Any, weights: Any) -> tf.Tensor:
        """Sample weights of some labels, multiplied with those given, if any."""
        if isinstance(y, dict | list | tuple):
            (y,) = y.values() if isinstance(y, dict) else y
        if isinstance(weights, dict | list | tuple):
            (weights,) = weights.values() if isinstance(weights, dict) else weights
        classes, ignored = self._classes(tf.convert_to_tensor(y))
        table = tf.constant(self._table, tf.float32)
        found = tf.gather(table, tf.clip_by_value(classes, 0, len(self._table) - 1))
        if ignored is not None:
            found = tf.where(ignored, tf.ones_like(found), found)
        if weights is None:
            return found
        given = tf.cast(weights, tf.float32)
        while given.shape.rank < found.shape.rank:
            given = given[..., None]
        while found.shape.rank < given.shape.rank:
            found = found[..., None]
        return given * found

    def check(self, y: Any, name: str, first_row: int = 0) -> None:
        """Raises `DataError`, naming the row, unless each has one class and the class a weight."""
        if isinstance(y, dict | list | tuple):
            (y,) = y.values() if isinstance(y, dict) else y
        if self._in_columns(y):
            rows = np.abs(y.sum(-1, dtype=np.float64) - 1) > 1e-3
            if self._output.kind != "categorical" and rows.any():
                row = first_row + int(np.nonzero(rows)[0][0])
                raise DataError(
                    f"{name} has several labels, or none, in row {row}, so class_weight does not "
                    "say how much it counts. Expected one class per row; pass sample weights as "
                    "train=(x, y, weights) instead."
                )
            return
        wrong = y != np.round(y) if y.dtype.kind == "f" else np.zeros(y.shape, bool)
        wrong |= (y < 0) | (y >= len(self._table))
        if self._output.ignored is not None:
            wrong &= y != self._output.ignored
        if wrong.any():
            place = np.argwhere(wrong)[0]
            raise DataError(
                f"{name} has the label {y[tuple(place)]:.6g} in row {first_row + int(place[0])}, "
                f"which class_weight has no weight for. Expected the classes 0 to "
                f"{len(self._table) - 1}, or no class_weight."
            )

    def _in_columns(self, y: Any) -> bool:
        # Keras takes every last axis for one of classes; with a sparse loss it is one of steps.
        if self._output.kind == "sparse" or len(y.shape) < 2:
            return False
        last = y.shape[-1] if y.shape[-1] is not None else self._output.classes
        return last != 1

    def _classes(self, y: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor | None]:
        if self._in_columns(y):
            return tf.argmax(y, -1, output_type=tf.int32), None
        # Labels (rows, steps) of a sparse loss keep their last axis, even if there is one step.
        ids = len(self._output.shape or ()) if self._output.kind == "sparse" else 1
        if y.shape.rank > ids:
            y = tf.squeeze(y, -1)
        ignored = None
        if self._output.ignored is not None:
            ignored = tf.equal(tf.cast(y, tf.int64), self._output.ignored)
        if y.dtype.is_floating:
            y = tf.round(y)
        return tf.cast(y, tf.int32), ignored


def _broadcasts(shape: tuple[int, ...], steps: tuple[int | None, ...]) -> bool:
    # Keras adds or removes one last axis; anything further apart it multiplies along wrong axes.
    if len(shape) == len(steps) + 1 and shape[-1] == 1:
        shape = shape[:-1]
    elif len(shape) == len(steps) - 1:
        shape = (*shape, 1)
    return len(shape) == len(steps) and all(
        have == 1 or want in (None, have) for have, want in zip(shape, steps, strict=True)
    )


class SampleWeightCheck:
    """Checks sample weights batch by batch; some have to be positive at the end."""

    def __init__(self, name: str):
        self._name = name
        self._seen: dict[str, bool] = {}

    def __call__(self, weights: np.ndarray, output: Output, first_row: int = 0) -> None:
        """Raises `DataError` if the weights' shape does not fit the output, or one is negative."""
        shape = weights.shape[1:]
        steps = output.shape[:-1] if output.shape else ()
        if output.shape is not None and not _broadcasts(shape, steps):
            wanted = f"a number per row and step, {steps}" if steps else "one number per row"
            raise DataError(
                f"{self._name} has sample weights of shape {shape} per row{output.words}. Expected "
                f"{wanted}. Weights of classes are passed as class_weight."
            )
        if (weights < 0).any():
            place = np.argwhere(weights < 0)[0]
            raise DataError(
                f"{self._name} has the sample weight {weights[tuple(place)]:.6g}{output.words} in "
                f"row {first_row + int(place[0])}. Expected numbers of at least 0."
            )
        self._seen[output.words] = self._seen.get(output.words, False) or bool(weights.any())

    def finish(self) -> None:
        """Raises `DataError`, naming the output, if all weights of an output were 0."""
        for words, positive in self._seen.items():
            if not positive:
                raise DataError(
                    f"{self._name} has only sample weights of 0{words}, so no row counts. Expected "
                    "a positive number for at least one."
                )
