"""Writes a model as a SavedModel with one signature, so that converting needs none of its code."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tensorflow as tf
import tf_keras as keras

from rl_sparsity_tf.errors import ExportError
from rl_sparsity_tf.quiet import quiet_tensorflow


def flat_model(model: keras.Model) -> keras.Model:
    """The same layers and tensors with flat lists of inputs and outputs, in Keras's order."""
    # The name ends up in the file's tensor names: Keras's own would count up from call to call.
    return keras.Model(list(model.inputs), list(model.outputs), name="model")


def write_saved_model(model: keras.Model, folder: Path, batch_size: int | None) -> None:
    """Traces a model in inference mode and saves the trace.

    Args:
        model: A built Sequential or functional model.
        folder: The folder to write.
        batch_size: Rows per call; None leaves it open.

    Raises:
        ExportError: If the model cannot be traced with this batch size.

    The signature's arguments are `input_0`, `input_1`, ... and its results `output_0`, ..., in
    Keras's order.
    """
    flat = flat_model(model)

    def call(*inputs: tf.Tensor) -> dict[str, tf.Tensor]:
        outputs = tf.nest.flatten(flat(list(inputs), training=False))
        return {f"output_{index}": output for index, output in enumerate(outputs)}

    signature = [
        tf.TensorSpec([batch_size, *tensor.shape[1:]], tensor.dtype, name=f"input_{index}")
        for index, tensor in enumerate(model.inputs)
    ]
    try:
        concrete = tf.function(call, input_signature=signature).get_concrete_function()
        module = tf.Module()
        # Every variable the trace reads, also those that a custom layer does not track.
        module.captured = list(concrete.graph.variables)
        with quiet_tensorflow():
            tf.saved_model.save(module, str(folder), signatures=concrete)
    except (ValueError, TypeError, AssertionError, tf.errors.OpError) as error:
        lines = str(error).strip().splitlines()
        raise ExportError(
            f"Model {model.name!r} cannot be traced for batches of "
            f"{'any size' if batch_size is None else batch_size}: {lines[-1] if lines else error}. "
            "Check that it runs on such a batch: model(x, training=False)."
        ) from error


def reference_outputs(
    model: keras.Model, inputs: Sequence[np.ndarray], batch_size: int | None
) -> list[np.ndarray]:
    """Runs the Keras model itself, outside any trace.

    Args:
        model: The model.
        inputs: One array of rows per input.
        batch_size: Rows per call, or None for all at once. The last batch is filled up with copies
            of its last row.

    Returns:
        One float or integer array per output.
    """
    flat = flat_model(model)
    rows = len(inputs[0])
    size = batch_size or rows
    parts: list[list[np.ndarray]] = []
    for start in range(0, rows, size):
        count = min(size, rows - start)
        # Repeating the last row keeps a fixed batch size full.
        taken = np.minimum(np.arange(start, start + size), rows - 1)
        outputs = flat([tf.constant(array[taken]) for array in inputs], training=False)
        parts.append([np.asarray(output)[:count] for output in tf.nest.flatten(outputs)])
    return [np.concatenate(pieces) for pieces in zip(*parts, strict=True)]
