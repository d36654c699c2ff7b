"""What layers, and operations in place of layers, do to channels, step by step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras as keras

from rl_sparsity_tf.channels.steps import (
    Depthwise,
    Elementwise,
    Join,
    Merge,
    Mix,
    Normalize,
    Opaque,
    Pad,
    Slopes,
    Step,
    Unroll,
)

Shape = tuple[int | None, ...]


class NotFollowedError(Exception):
    """Raised by rules; its text is the reason."""


_layers = keras.layers
_IDENTITIES = (None, keras.activations.linear, tf.identity)
_FUNCTIONS = tuple(
    getattr(module, name)
    for module in (keras.activations, tf.nn, tf)
    for name in (
        "relu relu6 leaky_relu sigmoid hard_sigmoid tanh elu selu gelu swish silu mish softplus "
        "softsign exponential"
    ).split()
    if hasattr(module, name)
)


def _activation(layer: keras.layers.Layer, function: Any) -> list[Step]:
    if any(function is known for known in _IDENTITIES):
        return []
    if any(function is known for known in _FUNCTIONS):
        return [Elementwise(layer, function)]
    if type(function) in _ACTIVATIONS:
        return [Elementwise(layer, function.call)]
    name = getattr(function, "__name__", type(function).__name__)
    why = "mixes channels" if "softmax" in name.lower() else "may mix channels"
    return [Opaque(layer, f"the activation {name} of {layer.name} {why}")]


def _borders(layer: keras.layers.Layer) -> bool:
    return layer.padding != "valid" and any(size > 1 for size in layer.kernel_size)


def _dense(layer: Any, _shape: Shape) -> list[Step]:
    return [Mix(layer), *_activation(layer, layer.activation)]


def _convolution(layer: Any, _shape: Shape) -> list[Step]:
    if layer.groups > 1:
        raise NotFollowedError(f"{layer.name} is a convolution in {layer.groups} groups")
    return [Mix(layer, borders=_borders(layer)), *_activation(layer, layer.activation)]


def _transposed(layer: Any, _shape: Shape) -> list[Step]:
    # Even in the middle, the places of the output see different parts of the kernel.
    mix = Mix(layer, input_axis=-1, output_axis=-2, borders=True)
    return [mix, *_activation(layer, layer.activation)]


def _depthwise(layer: Any, _shape: Shape) -> list[Step]:
    return [Depthwise(layer, borders=_borders(layer)), *_activation(layer, layer.activation)]


def _separable(layer: Any, _shape: Shape) -> list[Step]:
    depthwise = Depthwise(layer, bias="", borders=_borders(layer))
    return [depthwise, Mix(layer, "pointwise_kernel"), *_activation(layer, layer.activation)]


def _batch_norm(layer: Any, shape: Shape) -> list[Step]:
    if list(layer.axis) != [len(shape) - 1]:
        raise NotFollowedError(f"{layer.name} normalizes along another axis than the channels")
    if layer.renorm or layer.virtual_batch_size is not None or layer.adjustment is not None:
        raise NotFollowedError(f"{layer.name} normalizes by more than its moving statistics")
    return [Normalize(layer)]


def _prelu(layer: Any, _shape: Shape) -> list[Step]:
    return [Slopes(layer)]


def _function_layer(layer: Any, _shape: Shape) -> list[Step]:
    return _activation(layer, layer.activation)


def _elementwise(layer: Any, _shape: Shape) -> list[Step]:
    return [Elementwise(layer, layer.call)]


def _rescaling(layer: Any, _shape: Shape) -> list[Step]:
    if np.ndim(layer.scale) or np.ndim(layer.offset):
        raise NotFollowedError(f"{layer.name} keeps a list of numbers, one per channel")
    return [Elementwise(layer, layer.call)]


def _pass_on(layer: Any, _shape: Shape) -> list[Step]:
    return [Step(layer)]


def _pad(layer: Any, _shape: Shape) -> list[Step]:
    return [Pad(layer)]


def _upsample(layer: Any, _shape: Shape) -> list[Step]:
    smooth = getattr(layer, "interpolation", "nearest") in ("nearest", "bilinear")
    return [Step(layer) if smooth else Pad(layer)]


def _flatten(layer: Any, shape: Shape) -> list[Step]:
    sizes = [size for size in shape[1:-1] if size is not None]
    if len(sizes) != len(shape) - 2:
        raise NotFollowedError(f"{layer.name} flattens axes of unknown size")
    return [Unroll(layer, int(np.prod(sizes, dtype=np.int64)))]


def product(values: np.ndarray) -> np.ndarray:
    """The product of constants: 0 where one of them is 0, whatever the others are."""
    return np.where((values == 0).any(0), 0, np.prod(values, axis=0))


def difference(values: np.ndarray) -> np.ndarray:
    """The first constants less the second."""
    return values[0] - values[1]


def equal(values: np.ndarray) -> np.ndarray:
    """The constants where all are the same."""
    return np.where((values == values[0]).all(0), values[0], np.nan)


def _reshape(layer: Any, shape: Shape) -> list[Step]:
    target = tuple(layer.output_shape[1:])
    sizes = shape[1:-1]
    if None in target or None in sizes or target[-1] != shape[-1]:
        raise NotFollowedError(f"{layer.name} is a Reshape that does not keep the channels last")
    return [Step(layer)]


def _merge(combine: Callable[[np.ndarray], np.ndarray]) -> Rule:
    return lambda layer, _shape: [Merge(layer, combine)]


def _concatenate(layer: Any, shape: Shape) -> list[Step]:
    # Along another axis than the channels, channel c of every part is channel c of the whole.
    return [Join(layer) if layer.axis in (-1, len(shape) - 1) else Merge(layer, equal)]


Rule = Callable[[Any, Shape], list[Step]]
_RULES: dict[type, Rule] = {
    _layers.Dense: _dense,
    _layers.BatchNormalization: _batch_norm,
    _layers.PReLU: _prelu,
    _layers.Activation: _function_layer,
    _layers.Rescaling: _rescaling,
    _layers.Flatten: _flatten,
    _layers.Reshape: _reshape,
    _layers.Concatenate: _concatenate,
    _layers.Add: _merge(lambda values: values.sum(0)),
    _layers.Subtract: _merge(difference),
    _layers.Average: _merge(lambda values: values.mean(0)),
    _layers.Maximum: _merge(lambda values: values.max(0)),
    _layers.Minimum: _merge(lambda values: values.min(0)),
    _layers.Multiply: _merge(product),
}
_ACTIVATIONS = (_layers.ReLU, _layers.LeakyReLU, _layers.ELU, _layers.ThresholdedReLU)
_FAMILIES: tuple[tuple[Rule, str], ...] = (
    (_convolution, "Conv1D Conv2D Conv3D"),
    (_transposed, "Conv1DTranspose Conv2DTranspose Conv3DTranspose"),
    (_depthwise, "DepthwiseConv1D DepthwiseConv2D"),
    (_separable, "SeparableConv1D SeparableConv2D"),
    (_elementwise, " ".join(kind.__name__ for kind in _ACTIVATIONS)),
    (_pad, "ZeroPadding1D ZeroPadding2D ZeroPadding3D"),
    (_upsample, "UpSampling1D UpSampling2D UpSampling3D"),
    (
        _pass_on,
        "Dropout SpatialDropout1D SpatialDropout2D SpatialDropout3D GaussianNoise GaussianDropout "
        "AlphaDropout ActivityRegularization Cropping1D Cropping2D Cropping3D MaxPooling1D "
        "MaxPooling2D MaxPooling3D AveragePooling1D AveragePooling2D AveragePooling3D "
        "GlobalMaxPooling1D GlobalMaxPooling2D GlobalMaxPooling3D GlobalAveragePooling1D "
        "GlobalAveragePooling2D GlobalAveragePooling3D",
    ),
)
_RULES.update({getattr(_layers, name): rule for rule, names in _FAMILIES for name in names.split()})


def steps_of(layer: keras.layers.Layer, shapes: Sequence[Shape]) -> list[Step]:
    """Takes a built layer that is no model apart; the first of its steps takes the inputs.

    `shapes` include the batch axis. If the layer's channels cannot be followed, a NotFollowedError
    carries the reason.
    """
    rule, kind = _RULES.get(type(layer)), type(layer).__name__
    if rule is None:
        if kind == "SlicingOpLambda":
            kind = "a TensorFlow operation"
        raise NotFollowedError(f"{layer.name} is {kind}, whose channels are not followed")
    if getattr(layer, "data_format", None) == "channels_first":
        raise NotFollowedError(f"{layer.name} has its channels first")
    if any(len(shape) < 2 or shape[-1] is None for shape in shapes):
        raise NotFollowedError(f"{layer.name} reads a tensor without a fixed number of channels")
    return rule(layer, shapes[0]) or [Step(layer)]


_MERGES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "add": lambda values: values.sum(0),
    "subtract": difference,
    "multiply": product,
    "maximum": lambda values: values.max(0),
    "minimum": lambda values: values.min(0),
}
# Functions of every value by itself, also with a number beside it.
_ELEMENTWISE = frozenset(
    "relu relu6 leaky_relu elu selu gelu silu swish sigmoid tanh softplus softsign exp abs "
    "negative square truediv clip_by_value cast identity".split()
)
_REDUCTIONS = frozenset("reduce_mean reduce_max reduce_min".split())


def is_operation(layer: keras.layers.Layer) -> bool:
    """Whether a layer is one that Keras makes of an operation in a functional model."""
    return type(layer).__name__ == "TFOpLambda"


def operation_steps(node: Any, shapes: Sequence[Shape]) -> list[Step]:
    """Takes the call of an operation apart, given Keras's node of the call.

    `shapes` are those of the tensors of the model that it reads. If its channels cannot be
    followed, a NotFollowedError carries the reason.
    """
    layer = node.layer
    name = str(layer.symbol).rpartition(".")[2]
    if any(len(shape) < 2 or shape[-1] is None for shape in shapes):
        raise NotFollowedError(f"{layer.name} reads a tensor without a fixed number of channels")
    if len(shapes) > 1 and name in _MERGES:
        return [Merge(layer, _MERGES[name])]
    if name == "concat":
        given = (*node.call_args[1:], node.call_kwargs.get("axis"))
        joins = given[0] in (-1, len(shapes[0]) - 1)
        return [Join(layer) if joins else Merge(layer, equal)]
    numbers = all(np.ndim(value) == 0 for value in _constants(node))
    if len(shapes) == 1 and numbers and (name in _MERGES or name in _ELEMENTWISE):
        return [Elementwise(layer, _with_constants(node))]
    if name in _REDUCTIONS and _leaves_channels(node, len(shapes[0])):
        return [Step(layer)]
    raise NotFollowedError(
        f"{layer.name} is a TensorFlow operation ({layer.symbol}) whose channels are not followed"
    )


def _constants(node: Any) -> list[Any]:
    """What the operation reads beside tensors of the model."""
    given = [*node.call_args, *node.call_kwargs.values()]
    kept = [value for value in given if value is not None and not _is_symbolic(value)]
    return [value for value in kept if not isinstance(value, str | tf.DType)]


def _is_symbolic(value: Any) -> bool:
    return hasattr(value, "_keras_history")


def _with_constants(node: Any) -> Callable[[Any], Any]:
    """The operation as a function of the one tensor of the model that it reads."""

    def function(value: Any) -> Any:
        args, kwargs = tf.nest.map_structure(
            lambda one: value if _is_symbolic(one) else one, (node.call_args, node.call_kwargs)
        )
        return node.layer.function(*args, **kwargs)

    return function


def _leaves_channels(node: Any, rank: int) -> bool:
    """Whether a reduction is over other axes than the batch and the channels."""
    given = node.call_args[1] if len(node.call_args) > 1 else node.call_kwargs.get("axis")
    if given is None or _is_symbolic(given):
        return False
    axes = {int(axis) % rank for axis in np.ravel(given)}
    return not axes & {0, rank - 1}
