"""Activations that tf_keras lacks, and TensorFlow's functions for operations of `keras.ops`.

tf_keras turns a TensorFlow function in a graph into a layer that the rest of the package can
follow, which it cannot with an operation of Keras 3.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras as keras3
import tensorflow as tf
import tf_keras as keras

# Keras 3's name of an activation -> tf_keras's name or function.
_ACTIVATIONS: dict[str, Any] = {}


def _activation(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    keras.utils.register_keras_serializable("rl_sparsity_tf")(function)
    _ACTIVATIONS[function.__name__.removesuffix("_3")] = function
    return function


@_activation
def hard_sigmoid_3(x: Any) -> Any:
    """Keras 2 means 0.2 x + 0.5 by this name."""
    return tf.nn.relu6(x + 3.0) / 6.0


@_activation
def hard_silu_3(x: Any) -> Any:
    """Also called hard_swish."""
    return x * tf.nn.relu6(x + 3.0) / 6.0


@_activation
def relu6_3(x: Any) -> Any:
    """A ReLU that ends at 6."""
    return tf.nn.relu6(x)


@_activation
def leaky_relu_3(x: Any) -> Any:
    """With the slope that Keras 3 gives it by default."""
    return tf.nn.leaky_relu(x, 0.2)


@_activation
def celu_3(x: Any) -> Any:
    """With alpha = 1."""
    return tf.maximum(x, 0.0) + tf.minimum(tf.math.expm1(x), 0.0)


@_activation
def glu_3(x: Any) -> Any:
    """One half of the channels gates the other."""
    a, b = tf.split(x, 2, axis=-1)
    return a * tf.sigmoid(b)


@_activation
def log_sigmoid_3(x: Any) -> Any:
    """The logarithm of the sigmoid."""
    return tf.math.log_sigmoid(x)


@_activation
def log_softmax_3(x: Any) -> Any:
    """The logarithm of the softmax over the last axis."""
    return tf.nn.log_softmax(x)


@_activation
def hard_tanh_3(x: Any) -> Any:
    """The identity between -1 and 1."""
    return tf.clip_by_value(x, -1.0, 1.0)


@_activation
def squareplus_3(x: Any) -> Any:
    """With b = 4."""
    return (x + tf.sqrt(x * x + 4.0)) / 2.0


@_activation
def tanh_shrink_3(x: Any) -> Any:
    """What tanh takes away."""
    return x - tf.tanh(x)


@_activation
def soft_shrink_3(x: Any) -> Any:
    """With a threshold of 0.5."""
    return tf.where(x > 0.5, x - 0.5, tf.where(x < -0.5, x + 0.5, tf.zeros_like(x)))


@_activation
def hard_shrink_3(x: Any) -> Any:
    """With a threshold of 0.5."""
    return tf.where(tf.abs(x) > 0.5, x, tf.zeros_like(x))


_ACTIVATIONS.update(silu="swish", swish="swish", hard_swish=hard_silu_3)


def activation(name: str) -> Any:
    """What tf_keras takes for an activation of Keras 3; None where there is nothing."""
    if name in _ACTIVATIONS:
        return _ACTIVATIONS[name]
    if getattr(keras.activations, name, None) is not None:
        return name
    # It computes with TensorFlow, too.
    on_tensorflow = keras3.backend.backend() == "tensorflow"
    return getattr(keras3.activations, name, None) if on_tensorflow else None


def _unary(function: Callable[[Any], Any]) -> Callable[..., Any]:
    return lambda _operation, x: function(x)


def _binary(function: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    return lambda _operation, a, b: function(a, b)


def _reduction(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(operation: Any, x: Any) -> Any:
        axis = list(operation.axis) if isinstance(operation.axis, tuple) else operation.axis
        return function(x, axis=axis, keepdims=operation.keepdims)

    return call


def _split(operation: Any, x: Any) -> Any:
    sections = operation.indices_or_sections
    return tf.split(x, sections, axis=operation.axis) if isinstance(sections, int) else None


def _reshape(operation: Any, x: Any) -> Any:
    return tf.reshape(x, [-1 if size is None else size for size in operation.newshape])


def _expand(operation: Any, x: Any) -> Any:
    return tf.expand_dims(x, operation.axis) if isinstance(operation.axis, int) else None


def _relu(operation: Any, x: Any) -> Any:
    slope, most, threshold = operation.negative_slope, operation.max_value, operation.threshold
    if threshold == 0 and not slope and most in (None, 6):
        return tf.nn.relu(x) if most is None else tf.nn.relu6(x)
    if threshold == 0 and most is None:
        return tf.nn.leaky_relu(x, slope)
    return keras.activations.relu(x, alpha=slope, max_value=most, threshold=threshold)


# Class of an operation -> a function of it and its arguments; None from it means that it cannot.
OPERATIONS: dict[str, Callable[..., Any]] = {
    "Add": _binary(lambda a, b: a + b),
    "Subtract": _binary(lambda a, b: a - b),
    "Multiply": _binary(lambda a, b: a * b),
    "TrueDivide": _binary(lambda a, b: a / b),
    "Divide": _binary(lambda a, b: a / b),
    "Power": _binary(tf.pow),
    "Maximum": _binary(tf.maximum),
    "Minimum": _binary(tf.minimum),
    "Matmul": _binary(tf.matmul),
    "Negative": _unary(tf.negative),
    "Absolute": _unary(tf.abs),
    "Abs": _unary(tf.abs),
    "Sqrt": _unary(tf.sqrt),
    "Rsqrt": _unary(tf.math.rsqrt),
    "Square": _unary(tf.square),
    "Exp": _unary(tf.exp),
    "Log": _unary(tf.math.log),
    "Relu": _unary(tf.nn.relu),
    "Relu6": _unary(tf.nn.relu6),
    "Sigmoid": _unary(tf.sigmoid),
    "Tanh": _unary(tf.tanh),
    "Silu": _unary(tf.nn.silu),
    "Softplus": _unary(tf.nn.softplus),
    "Selu": _unary(tf.nn.selu),
    "Softsign": _unary(tf.nn.softsign),
    "LogSigmoid": _unary(tf.math.log_sigmoid),
    "HardTanh": _unary(hard_tanh_3),
    "TanhShrink": _unary(tanh_shrink_3),
    "Squareplus": lambda operation, x: squareplus_3(x) if operation.b == 4 else None,
    "Celu": lambda operation, x: celu_3(x) if operation.alpha == 1.0 else None,
    "LogSoftmax": lambda operation, x: tf.nn.log_softmax(x, axis=operation.axis),
    "ReLU": _relu,
    "HardSigmoid": _unary(hard_sigmoid_3),
    "HardSilu": _unary(hard_silu_3),
    "StopGradient": _unary(tf.stop_gradient),
    "Mean": _reduction(tf.reduce_mean),
    "Sum": _reduction(tf.reduce_sum),
    "Max": _reduction(tf.reduce_max),
    "Min": _reduction(tf.reduce_min),
    "Prod": _reduction(tf.reduce_prod),
    "Gelu": lambda operation, x: tf.nn.gelu(x, approximate=operation.approximate),
    "LeakyRelu": lambda operation, x: tf.nn.leaky_relu(x, operation.negative_slope),
    "Elu": lambda operation, x: tf.nn.elu(x) if operation.alpha == 1.0 else None,
    "Softmax": lambda operation, x: tf.nn.softmax(x, axis=operation.axis),
    "Reshape": _reshape,
    "Transpose": lambda operation, x: tf.transpose(x, operation.axes),
    "ExpandDims": _expand,
    "Squeeze": lambda operation, x: tf.squeeze(x, operation.axis),
    "Concatenate": lambda operation, parts: tf.concat(parts, axis=operation.axis),
    "Stack": lambda operation, parts: tf.stack(parts, axis=operation.axis),
    "Split": _split,
    "GetItem": lambda _operation, x, key: x[key],
    "Clip": lambda operation, x: tf.clip_by_value(x, operation.x_min, operation.x_max),
    "Cast": lambda operation, x: tf.cast(x, operation.dtype),
}
