"""Scores of a Keras model and of its .tflite file, by the loss and metrics it is compiled with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tensorflow as tf
import tf_keras as keras

from rl_sparsity_tf.data.batches import Batch, evaluation_data, inputs_of
from rl_sparsity_tf.data.metrics import (
    Evaluator,
    Metric,
    Score,
    choose_metric,
    search_compile_arguments,
)
from rl_sparsity_tf.errors import VerificationError
from rl_sparsity_tf.layers.copy_checks import check_figures
from rl_sparsity_tf.layers.signature import flat_inputs
from rl_sparsity_tf.layers.wrapping import strip
from rl_sparsity_tf.tflite.prediction import run_rows

_BATCH_SIZE = 256


def score_model(model: keras.Model, batches: list[Batch], metric: Metric) -> Score:
    """Scores a plain model; it is compiled for the search's metric on a copy."""
    judge = _judge(model)
    check_figures(model, judge, batches[0])
    return Evaluator(judge, metric)(batches)


def score_tflite(path: Path, model: keras.Model, batches: list[Batch], metric: Metric) -> Score:
    """Scores a .tflite file with the loss and metrics that a Keras model is compiled with.

    The file computes outputs only: losses that the model adds by itself (regularizers, `add_loss`)
    are those of the Keras model on the same rows.
    """
    inputs = flat_inputs(model, inputs_of(batches))
    outputs = run_rows(path, inputs, batch_size=_BATCH_SIZE, xnnpack=True)
    judge = _judge(model)
    judge.reset_metrics()
    logs: dict[str, Any] = {}
    start = 0
    for x, y, weights in batches:
        rows = len(tf.nest.flatten(x)[0])
        part = [tf.constant(output[start : start + rows]) for output in outputs]
        logs = _step(judge, (x, y, weights), part)
        start += rows
    loss = float(logs["loss"])
    return Score(metric=float(logs.get(metric.name, loss)), loss=loss)


def _step(judge: keras.Model, batch: Batch, outputs: list[tf.Tensor]) -> dict[str, tf.Tensor]:
    """The model's own `test_step`, of which its call gives the outputs of a file."""
    call = judge.call

    def replaced(*arguments: Any, **options: Any) -> Any:
        # Keras's own adds losses. The file lists its outputs; the model arranges them.
        return tf.nest.pack_sequence_as(call(*arguments, **options), outputs)

    vars(judge)["call"] = replaced  # below Keras's attribute tracking
    try:
        return judge.test_step(batch)
    finally:
        del vars(judge)["call"]


def compare_scores(
    path: Path, model: keras.Model, test_data: Any, lost: float
) -> dict[str, float | str]:
    """Scores a file and its Keras model on the same data.

    Args:
        path: The file.
        model: The model, compiled.
        test_data: Data as `evaluate` takes it.
        lost: How much of an accuracy the file may lose.

    Returns:
        `{"metric": its name, "keras": the model's figure, "tflite": the file's}`.

    Raises:
        ModelError: If the model is not compiled.
        DataError: If the data does not fit it.
        VerificationError: If the file loses more of an accuracy than is allowed.
    """
    batches = evaluation_data(test_data, model, "test_data")
    judge = _judge(model)
    metric = choose_metric(judge, batches[0])
    check_figures(model, judge, batches[0])
    ours = Evaluator(judge, metric)(batches).metric
    theirs = score_tflite(path, model, batches, metric).metric
    if metric.is_accuracy and theirs < ours - lost:
        raise VerificationError(
            f"The exported file has {metric.name} {theirs:.4f} on test_data, the Keras model "
            f"{ours:.4f}. Expected at most {lost:g} less. Give representative_data like the data "
            "the model was trained on, or choose another quantization."
        )
    return {"metric": metric.name, "keras": ours, "tflite": theirs}


def _judge(model: keras.Model) -> keras.Model:
    """A copy that computes the loss and the metrics as the search does."""
    search_compile_arguments(model, 1e-3)  # says in words what is missing
    judge = strip(model)
    judge.compile(**search_compile_arguments(judge, 1e-3))
    return judge
