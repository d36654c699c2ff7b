"""From Keras to the converter: a SavedModel in float32, and what a failed conversion means."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras as keras

from rl_sparsity_tf.console import quiet_tensorflow
from rl_sparsity_tf.errors import ExportError
from rl_sparsity_tf.export.recurrent import can_unroll, looping_layers, names_of
from rl_sparsity_tf.layers.structure import (
    all_layers,
    input_specs,
    is_graph,
    output_names,
    pack_inputs,
)
from rl_sparsity_tf.tflite.worker import WorkerError

_SCALED = 1e-6


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
    """Traces a built model in inference mode and saves the trace; returns the outputs' Keras names.

    The model may be a subclassed one. The batch size None leaves the rows per call open. The
    signature's arguments are `input_0`, `input_1`, ... and its results `output_0`, ..., in Keras's
    order. An ExportError is raised if the model cannot be traced with this batch size.
    """
    names: list[str] = []
    structured = _call(model)

    def call(*inputs: tf.Tensor) -> dict[str, tf.Tensor]:
        structure = structured(inputs)
        names[:] = output_names(model, structure)
        outputs = [output for output in tf.nest.flatten(structure) if output is not None]
        _check_dense(outputs)
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
    except _CALL_ERRORS as error:
        raise _call_error(model, batch_size, error) from error
    return names


_CALL_ERRORS = (ValueError, TypeError, AssertionError, tf.errors.OpError)


def _check_dense(outputs: Sequence[Any]) -> None:
    for index, output in enumerate(outputs):
        if not isinstance(output, tf.Tensor):
            raise TypeError(f"output {index} is a {type(output).__name__}, not a dense tensor")


def _call_error(model: keras.Model, batch_size: int | None, error: Exception) -> ExportError:
    """Makes the error on a model that cannot be called, to be raised."""
    # Keras puts the arguments of the call behind the reason, TensorFlow its own node before it.
    text = re.sub(r"\{\{.*?\}\} ?", "", str(error).split("Call arguments received by")[0])
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    reason = (lines or [type(error).__name__])[-1].rstrip(".")
    return ExportError(
        f"Model {model.name!r} cannot be traced for batches of "
        f"{'any size' if batch_size is None else batch_size}: {reason}. "
        "Check that it runs on such a batch: model(x, training=False)."
    )


def reference_outputs(
    model: keras.Model, inputs: Sequence[np.ndarray], batch_size: int | None
) -> list[np.ndarray]:
    """Runs the Keras model itself, outside any trace.

    There is one array of rows per input, and one float or integer array per output. The batch size
    None takes all rows at once; else the last batch is filled up with copies of its last row. An
    ExportError is raised if the model cannot be called on such a batch, or an output has no row per
    row of input.
    """
    flat = flat_call(model)
    rows = len(inputs[0])
    size = batch_size or rows
    parts: list[list[np.ndarray]] = []
    for start in range(0, rows, size):
        count = min(size, rows - start)
        # Repeating the last row keeps a fixed batch size full.
        taken = np.minimum(np.arange(start, start + size), rows - 1)
        try:
            outputs = flat([tf.constant(array[taken]) for array in inputs])
            _check_dense(outputs)
        except _CALL_ERRORS as error:
            raise _call_error(model, size, error) from error
        for index, output in enumerate(outputs):
            if not len(output.shape) or output.shape[0] != size:
                raise ExportError(
                    f"Output {index} of model {model.name!r} has the shape {tuple(output.shape)} "
                    f"for {size} rows. Expected one row of output per row of input: leave "
                    "reductions over the batch out of the model."
                )
        parts.append([np.asarray(output)[:count] for output in outputs])
    return [np.concatenate(pieces) for pieces in zip(*parts, strict=True)]


def own_moves(
    model: keras.Model,
    inputs: Sequence[np.ndarray],
    expected: Sequence[np.ndarray],
    batch_size: int | None,
) -> list[float]:
    """How far a model's outputs move by themselves, where nothing but rounding changes.

    Its float inputs are scaled by 1 + 1e-6, and its float weights change in their last place: what
    a runtime rounds otherwise may move the outputs as far.

    `expected` are its outputs for the inputs. The result is the largest absolute change of each
    output, infinite if it is no number any more. The model's weights are as they were when this
    returns.
    """
    scaled = [
        (array * (1.0 + _SCALED)).astype(array.dtype) if array.dtype.kind == "f" else array
        for array in inputs
    ]
    changed = [reference_outputs(model, scaled, batch_size)]
    rng, kept = np.random.default_rng(0), model.get_weights()
    try:
        model.set_weights([_in_last_place(value, rng) for value in kept])
        changed.append(reference_outputs(model, inputs, batch_size))
    finally:
        model.set_weights(kept)
    moves = []
    for index, wanted in enumerate(expected):
        differences = [np.abs(outputs[index].astype(np.float64) - wanted) for outputs in changed]
        moved = max(float(np.max(one, initial=0.0)) for one in differences)
        moves.append(moved if np.isfinite(moved) else float("inf"))
    return moves


def _in_last_place(value: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Values that are up to one unit in the last place away, if they are floats."""
    if value.dtype.kind != "f":
        return value
    step = np.finfo(value.dtype).eps * rng.integers(-1, 2, value.shape)
    return (value * (1.0 + step)).astype(value.dtype)


_REASON_CHARACTERS = 300


def conversion_error(model: keras.Model, quantization: str, error: WorkerError) -> ExportError:
    """Makes the error that explains why a model could not be converted in a mode, to be raised.

    `error` is what the conversion process reported, or how it died.
    """
    text = error.detail
    loops = looping_layers(model)
    if error.reason == "died" and quantization == "int8" and loops:
        unrolled = ", or unroll=True, which exports them without a loop"
        if not can_unroll(model):
            unrolled = ""
        return ExportError(
            f"The TFLite converter crashed on model {model.name!r} with quantization='int8': it "
            f"has no integer form of the loops of its recurrent layers {names_of(loops)}. Your "
            "program is not affected and nothing was written. Pass quantization='dynamic' or "
            f"'plan'{unrolled}."
        )
    if error.reason in ("died", "timeout"):
        return ExportError(f"Model {model.name!r} could not be converted. {error}")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if "TensorList" in text:
        return ExportError(
            f"Model {model.name!r} loops over a list of tensors, as recurrent layers do, which "
            "TFLite's builtin operators take only with a fixed batch size. Pass batch_size=1."
        )
    lacking = sorted(set(re.findall(r"'tf\.(\w+)' op is neither a custom op nor a flex op", text)))
    lacking += [line for line in lines if line.startswith(("Flex ops:", "Custom ops:"))]
    if lacking:
        return ExportError(
            f"Model {model.name!r} uses operations that TFLite's builtins lack: "
            f"{', '.join(lacking)}. Replace the layers that use them; files with Select TF ops do "
            "not run in LiteRT."
        )
    # The converter ends its errors with a dump of the graph; its reason is on an "error:" line.
    reasons = [line.split("error: ", 1)[1] for line in lines if "error: " in line]
    reason = (reasons or lines or ["no reason given"])[-1][:_REASON_CHARACTERS]
    return ExportError(
        f"Model {model.name!r} could not be converted with quantization={quantization!r}: "
        f"{error.reason}: {reason}. Try quantization='none' to see whether the model or the "
        "quantization is the cause."
    )


_FLOAT32 = "float32"


@contextlib.contextmanager
def in_float32(model: keras.Model) -> Iterator[tuple[keras.Model, list[str]]]:
    """Gives a model that computes in float32, and notes on what was changed to get it.

    Layers of a mixed precision keep float32 variables and only compute in 16 bits: they compute in
    float32 while the context is open, which also reaches layers that cannot be rebuilt. Models
    whose variables are of another type (float64, float16) are rebuilt from their config.

    The model is as it was when the context ends. An ExportError is raised if variables are of
    another type and the model cannot be rebuilt.
    """
    others = _other_types(model)
    if others:
        note = f"computes in float32; the weights are {' and '.join(others)} in Keras"
        yield _rebuilt(model, others), [note]
        return
    mixed = [layer for layer in all_layers(model) if _computes_otherwise(layer)]
    policies = sorted({layer.dtype_policy.name for layer in mixed})
    kept = [(layer, layer.dtype_policy) for layer in mixed]
    try:
        for layer in mixed:
            layer._set_dtype_policy(_FLOAT32)
        notes = [
            f"computes in float32 and was compared with Keras in float32; the model's policy is "
            f"{' and '.join(policies)}"
        ]
        yield model, notes if mixed else []
    finally:
        for layer, policy in kept:
            layer._set_dtype_policy(policy)


def _other_types(model: keras.Model) -> list[str]:
    types = {variable.dtype for variable in model.variables}
    return sorted(dtype.name for dtype in types if dtype.is_floating and dtype != tf.float32)


def _computes_otherwise(layer: keras.layers.Layer) -> bool:
    # Integer policies belong to layers that make ids; None to layers that take what comes.
    name = layer.compute_dtype
    return name is not None and tf.as_dtype(name).is_floating and name != _FLOAT32


def _rebuilt(model: keras.Model, others: list[str]) -> keras.Model:
    advice = (
        f"Model {model.name!r} has weights of type {' and '.join(others)}, and TFLite's kernels "
        "compute in float32. Build it with dtype='float32' (keras.backend.set_floatx('float32')) "
        "and copy the weights with set_weights."
    )
    if not is_graph(model):
        raise ExportError(advice)
    classes = {type(layer).__name__: type(layer) for layer in all_layers(model)}
    try:
        with _float32_by_default():
            config = _with_float32(model.get_config())
            copy = type(model).from_config(config, custom_objects=classes)
            if not copy.inputs:
                copy.build(model.input_shape)
            copy.set_weights(
                [
                    value.astype(np.float32) if np.issubdtype(value.dtype, np.floating) else value
                    for value in model.get_weights()
                ]
            )
    except (ValueError, TypeError, NotImplementedError, AttributeError) as error:
        lines = str(error).strip().splitlines()
        raise ExportError(
            f"{advice} A float32 copy could not be made: {lines[0] if lines else error!r}"
        ) from error
    if any(
        variable.dtype.is_floating and variable.dtype != tf.float32 for variable in copy.weights
    ):
        raise ExportError(advice)
    return copy


def _with_float32(config: Any) -> Any:
    """A copy of a Keras config whose dtype policies are all float32, at any depth."""
    if isinstance(config, dict):
        return {
            key: _FLOAT32 if key == "dtype" and _is_floating_policy(value) else _with_float32(value)
            for key, value in config.items()
        }
    if isinstance(config, (list, tuple)):
        return type(config)(_with_float32(value) for value in config)
    return config


def _is_floating_policy(value: Any) -> bool:
    if isinstance(value, dict):
        value = value.get("config", {}).get("name", "")
    return isinstance(value, str) and value.removeprefix("mixed_") in (
        "float16",
        "bfloat16",
        "float64",
    )


@contextlib.contextmanager
def _float32_by_default() -> Iterator[None]:
    """Sublayers that a layer makes for itself follow the defaults, not the config."""
    floatx = keras.backend.floatx()
    keras.backend.set_floatx(_FLOAT32)
    # The policy follows the default type unless it was set by itself.
    policy = keras.mixed_precision.global_policy()
    own = policy.name != _FLOAT32
    try:
        if own:
            keras.mixed_precision.set_global_policy(_FLOAT32)
        yield
    finally:
        if own:
            keras.mixed_precision.set_global_policy(policy)
        keras.backend.set_floatx(floatx)
