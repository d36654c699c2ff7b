"""Checks of batches before anything is trained: inputs, labels and sample weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras as keras

from rl_sparsity_tf.checks import fits, shape_advice
from rl_sparsity_tf.data.extremes import LargeRowFinder, LargeRows
from rl_sparsity_tf.data.labels import Output, check_labels, model_outputs, per_output
from rl_sparsity_tf.data.weights import ClassWeights, SampleWeightCheck
from rl_sparsity_tf.errors import DataError
from rl_sparsity_tf.layers.structure import InputSpec, specs_of

Batch = tuple[Any, Any, Any]
"""`(x, y, sample_weight or None)`, each a tensor or a structure of tensors."""


class BatchCheck:
    """Checks the batches of one data set one after the other; errors call it by its name.

    Labels are checked once the model is compiled. `table` holds class weights, if there are any;
    [class_weights][] is made from them.
    """

    def __init__(self, model: keras.Model, name: str, table: list[float] | None = None):
        self.rows = 0
        self.class_weights: ClassWeights | None = None
        self._model = model
        self._name = name
        self._table = table
        self._outputs: tuple[Output, ...] | None = None
        self._weight_check = SampleWeightCheck(name)
        self._first = True
        self._large = LargeRowFinder(name)

    def __call__(self, batch: Batch) -> None:
        """Raises `DataError` if a batch cannot be used; rows are numbered across batches."""
        x, y, weights = batch
        check_batch(batch, self._model, self._name)
        rows = row_count(batch, self._name)
        if self._first:
            self._first = False
            self._outputs = model_outputs(self._model, x, self._name)
            if self._table is not None:
                self.class_weights = ClassWeights(self._table, self._outputs)
        if self._outputs is not None and getattr(self._model, "loss", None):
            labels = per_output(y, self._outputs, self._name, "labels")
            for part, output in zip(labels, self._outputs, strict=True):
                check_labels(
                    None if part is None else np.asarray(part), output, self._name, self.rows
                )
            if weights is not None:
                parts = per_output(
                    weights, self._outputs, self._name, "sample weights", shared=True
                )
                for part, output in zip(parts, self._outputs, strict=True):
                    if part is not None:
                        self._weight_check(np.asarray(part), output, self.rows)
        if self.class_weights is not None:
            plain = tf.nest.map_structure(np.asarray, y)
            self.class_weights.check(plain, self._name, self.rows)
        self._large(batch, self.rows)
        self.rows += rows

    @property
    def large(self) -> LargeRows:
        """The rows with large numbers, whose loss has to be tried."""
        return self._large.found

    def shapes(self, batch: Batch) -> None:
        """Checks nothing but the shapes of a batch's inputs."""
        check_batch(batch, self._model, self._name)

    def finish(self) -> None:
        """Raises where something is only wrong of all batches together."""
        self._weight_check.finish()

    def weighted(self, x: Any, y: Any, weights: Any = None) -> Batch:
        """The same rows, their weights multiplied with those of their classes."""
        if self.class_weights is None:
            return x, y, weights
        return x, y, self.class_weights(y, weights)


def check_batch(batch: Batch, model: keras.Model, name: str) -> None:
    """Raises `DataError` unless a batch's inputs have the shapes that the model takes.

    Raises `ModelError` if the model was never called or built.
    """
    x, y, _ = batch
    specs = specs_of(model)
    names = [spec.name for spec in specs]
    if isinstance(x, dict):
        missing = [key for key in names if key not in x]
        if missing:
            raise DataError(
                f"{name} lacks the inputs {missing}. Expected a dict with {names}, "
                f"received {sorted(x)}."
            )
        parts = [x[key] for key in names]
    else:
        parts = list(x) if isinstance(x, list | tuple) else [x]
    if len(parts) != len(specs):
        raise DataError(
            f"{name} has {len(parts)} inputs; the model takes {len(specs)}: {names}. Pass them as "
            "a list or a dict in the x of (x, y); rows that are a list of arrays become one array "
            "with np.stack."
        )
    for part, spec in zip(parts, specs, strict=True):
        received = tuple(np.shape(part))
        if not fits(received[1:], spec.shape) or not received:
            which = f" for the input {spec.name!r}" if len(specs) > 1 else ""
            raise DataError(
                f"{name} has inputs of shape {received[1:]} per row{which}; the model takes "
                f"{spec.shape}.{_hint(received, spec, y, len(specs))}"
            )


def _hint(received: tuple[int, ...], spec: InputSpec, y: Any, inputs: int) -> str:
    advice = shape_advice(received, spec.shape)
    one = inputs == 1 and not isinstance(y, dict | list | tuple)
    if not advice and one and fits(np.shape(y)[1:], spec.shape):
        return " The labels have that shape: x and y look swapped. Expected (x, y)."
    return advice


def row_count(arrays: Batch, name: str) -> int:
    """The number of rows that all parts of a batch share.

    Raises `DataError` if they do not, or if there are none.
    """
    parts = [array for array in tf.nest.flatten(arrays) if array is not None]
    lengths = {len(array) if np.ndim(array) else -1 for array in parts}
    if -1 in lengths:
        raise DataError(
            f"{name} has single numbers in place of rows. Expected batches: add .batch(32) to the "
            "dataset."
        )
    if len(lengths) != 1:
        raise DataError(
            f"{name} has arrays of {sorted(lengths)} rows. Expected as many labels (and sample "
            "weights) as inputs; rows that are a list of arrays become one array with np.stack."
        )
    (rows,) = lengths
    if rows == 0:
        raise DataError(f"{name} is empty. Expected at least one row.")
    return rows
