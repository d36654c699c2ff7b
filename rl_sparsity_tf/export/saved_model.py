"""Writes a model as a SavedModel with one signature, so that converting needs none of its code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras as keras

from rl_sparsity_tf.errors import ExportError
from rl_sparsity_tf.layers.signature import input_specs, is_graph, output_names, pack_inputs
from rl_sparsity_tf.quiet import quiet_tensorflow


def flat_call(model: keras.Model) -> Callable[[Sequence[Any]], list[tf.Tensor]]:
    """The model in inference mode as a function from a list to a list, in Keras's order.

    Outputs that are dicts are taken in the order of their sorted keys.
    """
    call = _call(model)

    def flat(inputs: Sequence[Any]) -> list[tf.Tensor]:
        # A subclassed model may leave an output out.
        return [output for output in tf.nest.flatten(call(inputs)) if output is not None]

    return flat


def _call(model: keras.Model) -> Callable[[Sequence[Any]], Any]:
    if not is_graph(model):
        return lambda inputs: model(pack_inputs(model, inputs), training=False)
    # The name ends up in the file's tensor names: Keras's own would count up.
    flat = keras.Model(list(model.inputs), list(model.outputs), name="model")
    return lambda inputs: flat(list(inputs), training=False)


def write_saved_model(model: keras.Model, folder: Path, batch_size: int | None) -> list[str]:
    """Traces a model in inference mode and saves the trace.

    Args:
        model: A built model, subclassed ones included.
        folder: The folder to write.
        batch_size: Rows per call; None leaves it open.

    Returns:
        The outputs' Keras names.

    Raises:
        ExportError: If the model cannot be traced with this batch size.

    The signature's arguments are `input_0`, `input_1`, ... and its results `output_0`, ..., in
    Keras's order.
    """
    names: list[str] = []
    structured = _call(model)

    def call(*inputs: tf.Tensor) -> dict[str, tf.Tensor]:
        structure = structured(inputs)
        names[:] = output_names(model, structure)
        outputs = [output for output in tf.nest.flatten(structure) if output is not None]
        for index, output in enumerate(outputs):
            if not isinstance(output, tf.Tensor):
                raise TypeError(f"output {index} is a {type(output).__name__}, not a dense tensor")
        return {f"output_{index}": output for index, output in enumerate(outputs)}

    signature = [
        tf.TensorSpec([batch_size, *spec.shape], spec.dtype, name=f"input_{index}")
        for index, spec in enumerate(input_specs(model))
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
    return names


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

    Raises:
        ExportError: If an output has no row per row of input.
    """
    flat = flat_call(model)
    rows = len(inputs[0])
    size = batch_size or rows
    parts: list[list[np.ndarray]] = []
    for start in range(0, rows, size):
        count = min(size, rows - start)
        # Repeating the last row keeps a fixed batch size full.
        taken = np.minimum(np.arange(start, start + size), rows - 1)
        outputs = flat([tf.constant(array[taken]) for array in inputs])
        for index, output in enumerate(outputs):
            if not len(output.shape) or output.shape[0] != size:
                raise ExportError(
                    f"Output {index} of model {model.name!r} has the shape {tuple(output.shape)} "
                    f"for {size} rows. Expected one row of output per row of input: leave "
                    "reductions over the batch out of the model."
                )
        parts.append([np.asarray(output)[:count] for output in outputs])
    return [np.concatenate(pieces) for pieces in zip(*parts, strict=True)]
