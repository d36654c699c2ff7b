"""Layers of tf_keras for layers of Keras 3: of the same class, or running the layer itself."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import keras as keras3
import numpy as np
import tensorflow as tf
import tf_keras as keras

from rl_sparsity_tf.keras3.configs import NoCounterpartError, QuantizedError, config_of


def on_tensorflow() -> bool:
    """Whether Keras 3 computes with TensorFlow in this process."""
    return bool(keras3.backend.backend() == "tensorflow")


def array_of(value: Any) -> np.ndarray:
    """A weight or tensor of Keras 3, on any backend."""
    return np.asarray(keras3.ops.convert_to_numpy(value))


# Classes that the user's parts in this process are of, which need not be registered: copies of the
# layers below are made of configurations.
_OWN_CLASSES: dict[str, type] = {}


def _own_classes(part: Any) -> dict[str, type]:
    inside = part._flatten_layers() if isinstance(part, keras3.layers.Layer) else [part]
    classes = {type(one) for one in inside}
    return {one.__name__: one for one in classes if not one.__module__.startswith("keras.")}


@keras.utils.register_keras_serializable("rl_sparsity_tf")
class Keras3Part(keras.layers.Layer):
    """A Keras 3 layer or operation inside a tf_keras model, run as it is.

    Its variables are the weights of this layer: it and its copies are trained as others are, but
    nothing in it is compressed.

    Args:
        part: The layer or operation, or its configuration as `keras.saving` writes it.
        reason: Why it is no layer of tf_keras.
    """

    def __init__(self, part: Any, reason: str = "", **kwargs: Any):
        super().__init__(**kwargs)
        self.keras_3_reason = reason
        if isinstance(part, dict):
            part = keras3.saving.deserialize_keras_object(part, custom_objects=_OWN_CLASSES)
        else:
            _OWN_CLASSES.update(_own_classes(part))
        # Past tf_keras's tracking, which would take a Keras 3 layer for one of its own.
        object.__setattr__(self, "part", part)
        self._takes_training = False
        if isinstance(part, keras3.layers.Layer):
            self._takes_training = "training" in inspect.signature(part.call).parameters
            self.part_variables = [variable.value for variable in part.weights]

    def call(self, *args: Any, training: Any = None, **kwargs: Any) -> Any:
        """Runs the part; a mode that is not known yet counts as inference."""
        if self._takes_training:
            kwargs["training"] = bool(training) if not tf.is_tensor(training) else False
        return self.part(*args, **kwargs)

    def get_config(self) -> dict[str, Any]:
        """The part by its own configuration."""
        part = keras3.saving.serialize_keras_object(self.part)
        return {**super().get_config(), "part": part, "reason": self.keras_3_reason}


def native(layer: Any) -> keras.layers.Layer:
    """A tf_keras layer that computes what a layer of Keras's own computes, without its weights.

    Raises `NoCounterpartError` where there is none.
    """
    cls3 = type(layer)
    if getattr(layer, "quantization_mode", None):
        raise QuantizedError(f"{layer.name} is quantized already ({layer.quantization_mode})")
    if not is_builtin(layer):
        raise NoCounterpartError(f"{cls3.__name__} is no class of Keras's own")
    if cls3.__name__ in _SPECIAL:
        return _SPECIAL[cls3.__name__](layer)
    return _same_class(layer)


def is_builtin(layer: Any) -> bool:
    """Whether a layer's class is one of `keras.layers`."""
    return getattr(keras3.layers, type(layer).__name__, None) is type(layer)


def _same_class(layer: Any) -> keras.layers.Layer:
    cls2 = getattr(keras.layers, type(layer).__name__, None)
    if cls2 is None:
        raise NoCounterpartError(f"tf_keras has no {type(layer).__name__}")
    return cls2.from_config(config_of(type(layer), cls2, layer.get_config()))


# Layers that need more than a configuration.
_SPECIAL: dict[str, Callable[[Any], keras.layers.Layer]] = {}


def _special(*names: str) -> Callable[..., Any]:
    def register(function: Callable[[Any], keras.layers.Layer]) -> Callable[..., Any]:
        _SPECIAL.update(dict.fromkeys(names, function))
        return function

    return register


@_special("SpectralNormalization")
def _spectral(layer: Any) -> keras.layers.Layer:
    # The one place where tf_keras itself says tf.keras, and so fails where that is Keras 3.
    raise NoCounterpartError(f"tf_keras's {type(layer).__name__} works only where tf.keras is it")


@_special("Lambda")
def _lambda(layer: Any) -> keras.layers.Layer:
    if not on_tensorflow():
        raise NoCounterpartError("a Lambda computes with another backend than TensorFlow")
    return keras.layers.Lambda(layer.function, arguments=layer.arguments, name=layer.name)


@_special("Normalization")
def _normalization(layer: Any) -> keras.layers.Layer:
    mean, variance = array_of(layer.mean), array_of(layer.variance)
    # Keras 3 spreads both over the axes of its input; tf_keras wants those of `axis` alone.
    kept = _from_the_end(layer.axis, mean.ndim)
    shape = [size for index, size in enumerate(mean.shape) if index - mean.ndim in kept]
    return keras.layers.Normalization(
        axis=layer.axis if layer.axis else None,
        mean=mean.reshape(shape).tolist(),
        variance=variance.reshape(shape).tolist(),
        invert=layer.invert,
        name=layer.name,
    )


def _from_the_end(axes: Any, rank: int) -> set[int]:
    axes = axes or ()
    axes = axes if isinstance(axes, list | tuple) else [axes]
    return {axis if axis < 0 else axis - rank for axis in axes}


@_special("StringLookup", "IntegerLookup", "TextVectorization")
def _lookup(layer: Any) -> keras.layers.Layer:
    kind = type(layer).__name__
    left_out = {"vocabulary", "idf_weights", "vocabulary_size", "oov_method", "salt", "dtype"}
    left_out.add("has_input_vocabulary")
    if kind != "IntegerLookup":  # Keras 3 says float32 of these, whatever they give back
        left_out.add("vocabulary_dtype")
    config = {key: value for key, value in layer.get_config().items() if key not in left_out}
    cls2 = getattr(keras.layers, kind)
    made = cls2.from_config(config_of(type(layer), cls2, config))
    words = layer.get_vocabulary(include_special_tokens=False)
    inner = getattr(layer, "_lookup_layer", layer)
    if getattr(inner, "output_mode", "") == "tf_idf":
        made.set_vocabulary(words, idf_weights=array_of(inner.idf_weights)[-len(words) :])
    else:
        made.set_vocabulary(words)
    return made


@_special("Discretization")
def _discretization(layer: Any) -> keras.layers.Layer:
    config = config_of(type(layer), keras.layers.Discretization, layer.get_config())
    if config.get("bin_boundaries") is not None:
        config.pop("num_bins", None)
    config.pop("dtype", None)
    return keras.layers.Discretization(**config)


@_special("MultiHeadAttention")
def _attention(layer: Any) -> keras.layers.Layer:
    # Its from_config in tf_keras wants shapes that Keras 3 keeps elsewhere.
    cls2 = keras.layers.MultiHeadAttention
    return cls2(**config_of(type(layer), cls2, layer.get_config()))


@_special("RNN")
def _rnn(layer: Any) -> keras.layers.Layer:
    config = {k: v for k, v in layer.get_config().items() if k not in ("cell", "cells")}
    config = config_of(type(layer), keras.layers.RNN, config)
    return keras.layers.RNN(_cell(layer.cell), **config)


def _cell(cell: Any) -> keras.layers.Layer:
    if type(cell) is keras3.layers.StackedRNNCells:
        cells = [_cell(one) for one in cell.cells]
        return keras.layers.StackedRNNCells(cells, name=cell.name)
    return native(cell)
