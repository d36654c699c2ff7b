"""Training that also follows the outputs of a teacher, usually the dense model."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras as keras

from rl_sparsity_tf.checks import check_share
from rl_sparsity_tf.data.checks import Batch
from rl_sparsity_tf.data.labels import loss_kind
from rl_sparsity_tf.errors import ArgumentError
from rl_sparsity_tf.layers.copying import compile_arguments
from rl_sparsity_tf.layers.wrapping import strip

_log = logging.getLogger(__name__)

# Losses that compare labels and outputs of one kind, in one unit: the teacher's outputs can take
# the place of the labels.
_SYMMETRIC = {
    "mean_squared_error",
    "mean_absolute_error",
    "mean_absolute_percentage_error",
    "mean_squared_logarithmic_error",
    "huber",
    "log_cosh",
}
_VARIANCE_BATCHES = 8


@contextlib.contextmanager
def distilled(
    student: keras.Model, teacher: keras.Model | None, share: float, batches: list[Batch]
) -> Iterator[None]:
    """Lets `student.fit` learn from a teacher, too, while the context is open.

    The loss becomes `(1 - share) * compiled loss + share * distance`, where the compiled loss
    includes regularisation, and the distance follows the loss of each output:

    - crossentropies of classes: crossentropy with the teacher's probabilities (temperature 1);
    - binary crossentropies: binary crossentropy with the teacher's probabilities;
    - square, absolute and similar errors: the same error, with the teacher's outputs as labels;
    - anything else: mean square error over the variance of the teacher's outputs.

    Outputs without a loss do not count; loss weights, sample weights, masks of sequences and
    labels that a loss ignores count as in the compiled loss. The logs show the compiled loss. A
    model whose class has a `train_step` of its own keeps it, and learns without the teacher.

    A copy of the teacher is called, so that not even the states of recurrent layers change. The
    variance is that of its outputs on the first of the batches. An ArgumentError tells the user of
    a share outside 0 to 1, and of a teacher whose outputs have other shapes than the student's.
    """
    check_share("distillation", share)
    if teacher is None or share == 0:
        yield
        return
    if not isinstance(teacher, keras.Model):
        raise ArgumentError(
            f"teacher is a {type(teacher).__name__}. Expected a tf_keras model, for example the "
            "one that was wrapped."
        )
    if type(student).train_step is not keras.Model.train_step:
        _log.info(
            "%s has a train_step of its own, which is kept: it learns without a teacher.",
            type(student).__name__,
        )
        yield
        return
    step = _DistillingStep(student, strip(teacher), float(share), batches)
    # Keras looks the method up on the model; below its attribute tracking nothing is left behind.
    vars(student)["train_step"] = step
    student.train_function = None
    try:
        yield
    finally:
        del vars(student)["train_step"]
        student.train_function = None


class _DistillingStep:
    """Keras's `train_step`, with the distance to a teacher in the loss."""

    def __init__(
        self, student: keras.Model, teacher: keras.Model, share: float, batches: list[Batch]
    ):
        self._student, self._teacher, self._share = student, teacher, share
        inputs = [batch[0] for batch in batches[:_VARIANCE_BATCHES]]
        teachings = [teacher(x, training=False) for x in inputs]
        _check_outputs(teachings[0], student(inputs[0], training=False))
        self._names = _names(student, teachings[0])
        count = len(self._names)
        arguments = compile_arguments(student) or {}
        self._losses = _spread(arguments.get("loss"), self._names)
        weights = arguments.get("loss_weights")
        self._loss_weights = [1.0 if w is None else w for w in _spread(weights, self._names)]
        flat = [tf.nest.flatten(outputs) for outputs in teachings]
        self._distances = [
            None if loss is None else _Distance(loss, [outputs[index] for outputs in flat])
            for index, loss in zip(range(count), self._losses, strict=True)
        ]

    def __call__(self, data: Any) -> dict[str, tf.Tensor]:
        student = self._student
        x, y, weights = keras.utils.unpack_x_y_sample_weight(data)
        wanted = tf.nest.map_structure(tf.stop_gradient, self._teacher(x, training=False))
        with tf.GradientTape() as tape:
            outputs = student(x, training=True)
            loss = (1.0 - self._share) * student.compute_loss(x, y, outputs, weights)
            loss += self._share * self._distance(wanted, outputs, y, weights)
        student.optimizer.minimize(loss, student.trainable_variables, tape=tape)
        return student.compute_metrics(x, y, outputs, weights)

    def _distance(self, wanted: Any, outputs: Any, y: Any, weights: Any) -> tf.Tensor:
        parts = zip(
            self._distances,
            self._loss_weights,
            tf.nest.flatten(wanted),
            tf.nest.flatten(outputs),
            _spread(y, self._names),
            _spread(weights, self._names),
            strict=True,
        )
        return tf.add_n(
            [
                factor * distance(target, output, distance.weights(output, labels, weight))
                for distance, factor, target, output, labels, weight in parts
                if distance is not None and labels is not None
            ]
        )


class _Distance(keras.losses.Loss):
    """How far an output is from the teacher's, in the way of the loss compiled for it."""

    def __init__(self, loss: Any, teachings: list[tf.Tensor]):
        is_object = isinstance(loss, keras.losses.Loss)
        super().__init__(reduction=loss.reduction if is_object else keras.losses.Reduction.AUTO)
        name, kind, self._ignored = loss_kind(loss)
        settings = loss.get_config() if is_object and kind not in ("custom", "none") else {}
        logits, axis = bool(settings.get("from_logits", False)), settings.get("axis", -1)
        self._function: Callable[[tf.Tensor, tf.Tensor], tf.Tensor]
        if kind in ("sparse", "categorical"):
            self._function = lambda wanted, output: keras.losses.categorical_crossentropy(
                tf.nn.softmax(wanted, axis) if logits else wanted, output, logits, axis=axis
            )
        elif kind == "binary":
            self._function = lambda wanted, output: keras.losses.binary_crossentropy(
                tf.sigmoid(wanted) if logits else wanted, output, logits
            )
        elif name in _SYMMETRIC:
            self._function = loss.call if is_object else keras.losses.get(loss)
        else:
            variance = _variance(teachings)
            self._function = lambda wanted, output: (
                keras.losses.mean_squared_error(wanted, output) / variance
            )

    def call(self, y_true: tf.Tensor, y_pred: tf.Tensor) -> tf.Tensor:
        """The distance per row (or step, or pixel)."""
        return self._function(tf.cast(y_true, y_pred.dtype), y_pred)

    def weights(self, output: tf.Tensor, labels: Any, weights: Any) -> Any:
        """Sample weights that are 0 where the loss ignores the label.

        Keras's losses leave out the masked steps of a sequence by themselves.
        """
        if self._ignored is None:
            return weights
        labels = tf.convert_to_tensor(labels)
        if labels.shape.rank == output.shape.rank:
            labels = tf.squeeze(labels, -1)
        regarded = tf.cast(labels != tf.cast(self._ignored, labels.dtype), tf.float32)
        if weights is None:
            return regarded
        weights = tf.cast(weights, tf.float32)
        while weights.shape.rank < regarded.shape.rank:
            weights = weights[..., tf.newaxis]
        return weights * regarded


def _variance(outputs: list[tf.Tensor]) -> float:
    """Mean variance of an output's features over all rows; 1 where it is constant."""
    rows = [np.asarray(part, np.float64) for part in outputs]
    features = rows[0].shape[-1] if rows[0].ndim > 1 else 1
    found = float(np.concatenate([part.reshape(-1, features) for part in rows]).var(axis=0).mean())
    return found if np.isfinite(found) and found > 0 else 1.0


def _check_outputs(teaching: Any, output: Any) -> None:
    found, expected = (
        tf.nest.map_structure(lambda part: tuple(part.shape[1:]), each)
        for each in (teaching, output)
    )
    if found != expected:
        raise ArgumentError(
            f"The teacher's outputs are {found} per row, the model's {expected}. Expected a "
            "teacher with the same outputs, for example the model that was wrapped."
        )


def _names(model: keras.Model, outputs: Any) -> list[str | None]:
    """Names of the outputs in the order in which they are flattened."""
    flat = tf.nest.flatten(outputs)
    if isinstance(outputs, dict) and len(outputs) == len(flat):
        return sorted(outputs)
    names = list(getattr(model, "output_names", None) or ())
    return names if len(names) == len(flat) else [None] * len(flat)


def _spread(values: Any, names: list[str | None]) -> list[Any]:
    """Sorts losses, labels or weights to the outputs, as Keras does; one alone is for all."""
    if isinstance(values, dict):
        if len(names) == 1:
            return list(values.values())[:1]
        return [values.get(name) for name in names]
    if isinstance(values, list | tuple):
        return [*values, *[None] * len(names)][: len(names)]
    return [values] * len(names)
