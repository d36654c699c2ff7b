"""Tracing models of another precision in float32, which is what TFLite's kernels compute in."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras as keras

from rl_sparsity_tf.errors import ExportError
from rl_sparsity_tf.layers.signature import is_graph
from rl_sparsity_tf.layers.structure import all_layers

_FLOAT32 = "float32"


@contextlib.contextmanager
def in_float32(model: keras.Model) -> Iterator[tuple[keras.Model, list[str]]]:
    """Gives a model that computes in float32, and notes on what was changed to get it.

    Layers of a mixed precision keep float32 variables and only compute in 16 bits: they compute in
    float32 while the context is open, which also reaches layers that cannot be rebuilt. Models
    whose variables are of another type (float64, float16) are rebuilt from their config.

    Args:
        model: A built model. It is as it was when the context ends.

    Yields:
        The model or its float32 copy, and the notes.

    Raises:
        ExportError: If variables are of another type and the model cannot be rebuilt.
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
