"""What layers do to the channels of their inputs: mix them, scale them, pass them on, join them.

A layer is taken apart into steps. A step says which channels of its output belong to which of its
input's (one is removed with the other), which weights have an entry per channel, and which constant
comes out where a constant goes in.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import tensorflow as tf
import tf_keras as keras

Shape = tuple[int | None, ...]


class Ties(Protocol):
    """Keeps the channels of a model, by number, and which of them are one."""

    def fresh(self, count: int) -> np.ndarray:
        """Numbers of new channels."""

    def tie(self, first: np.ndarray, second: np.ndarray) -> None:
        """Makes channels one, pair by pair."""

    def freeze(self, channels: np.ndarray, reason: str) -> None:
        """Keeps channels from being removed."""


def weight(layer: keras.layers.Layer, attribute: str) -> np.ndarray | None:
    """A layer's weight in double precision, or None where the layer has none."""
    variable = getattr(layer, attribute, None)
    return None if variable is None else np.asarray(variable, np.float64)


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """A step that leaves channels and constants as they are (pooling, dropout).

    Attributes:
        layer: The layer that takes it.
    """

    layer: keras.layers.Layer

    def connect(self, inputs: Sequence[np.ndarray], ties: Ties) -> list[np.ndarray]:
        """The channels of the outputs."""
        return [inputs[0]]

    def constants(self, inputs: Sequence[np.ndarray], masked: np.ndarray) -> np.ndarray:
        """The constant that each channel of the output is, NaN where it is none.

        Args:
            inputs: The same of the inputs.
            masked: The channels of the output that count as set to zero wherever they have weights.
        """
        return inputs[0]

    def scaled(self) -> dict[str, str]:
        """Weights with one entry per channel on their last axis: attribute -> input or output."""
        return {}


@dataclasses.dataclass(frozen=True, eq=False)
class Mix(Step):
    """A kernel that makes new channels of all the channels that come in.

    Attributes:
        kernel: The kernel's attribute.
        input_axis: Its axis of input channels.
        output_axis: Its axis of output channels.
        borders: Whether the borders of an image see fewer inputs than its middle.
    """

    kernel: str = "kernel"
    input_axis: int = -2
    output_axis: int = -1
    borders: bool = False

    @property
    def bias(self) -> bool:
        """Whether a bias can take up what constant inputs contribute."""
        return getattr(self.layer, "bias", None) is not None

    def obstacle(self) -> str:
        """Why constants other than 0 cannot go into the bias; empty if they can."""
        if self.borders:
            return "sees less of it at the borders"
        return "" if self.bias else "has no bias to take it up"

    def matrices(self) -> np.ndarray:
        """The kernel as `(positions, inputs, outputs)`."""
        kernel = np.asarray(getattr(self.layer, self.kernel), np.float64)
        moved = np.moveaxis(kernel, (self.input_axis, self.output_axis), (-2, -1))
        return moved.reshape(-1, *moved.shape[-2:])

    def connect(self, inputs: Sequence[np.ndarray], ties: Ties) -> list[np.ndarray]:
        return [ties.fresh(self.matrices().shape[-1])]

    def constants(self, inputs: Sequence[np.ndarray], masked: np.ndarray) -> np.ndarray:
        matrices = self.matrices()
        usable = (inputs[0] == 0) if self.borders else ~np.isnan(inputs[0])
        values = np.where(usable, inputs[0], 0) @ matrices.sum(0)
        if self.bias:
            values = values + weight(self.layer, "bias")
        values[(matrices != 0).any(0)[~usable].any(0)] = np.nan
        return np.where(masked, 0, values)


@dataclasses.dataclass(frozen=True, eq=False)
class Depthwise(Step):
    """A kernel for every channel; channel c becomes channels c*m to c*m + m - 1."""

    kernel: str = "depthwise_kernel"
    bias: str = "bias"
    borders: bool = False

    def connect(self, inputs: Sequence[np.ndarray], ties: Ties) -> list[np.ndarray]:
        return [np.repeat(inputs[0], int(getattr(self.layer, self.kernel).shape[-1]))]

    def constants(self, inputs: Sequence[np.ndarray], masked: np.ndarray) -> np.ndarray:
        kernel = np.asarray(getattr(self.layer, self.kernel), np.float64)
        sums = kernel.reshape(-1, *kernel.shape[-2:]).sum(0).ravel()
        empty = ~kernel.reshape(-1, sums.size).any(0)
        given = np.repeat(inputs[0], kernel.shape[-1])
        usable = (given == 0) if self.borders else ~np.isnan(given)
        bias = weight(self.layer, self.bias) if self.bias else None
        values = np.where(usable, given, 0) * sums + (0 if bias is None else bias)
        return np.where(masked, 0, np.where(usable | empty, values, np.nan))

    def scaled(self) -> dict[str, str]:
        present = self.bias and getattr(self.layer, self.bias, None) is not None
        return {self.bias: "output"} if present else {}


@dataclasses.dataclass(frozen=True, eq=False)
class Normalize(Step):
    """Batch normalization with the statistics of training."""

    def constants(self, inputs: Sequence[np.ndarray], masked: np.ndarray) -> np.ndarray:
        layer = self.layer
        mean, gamma, beta = (weight(layer, name) for name in ("moving_mean", "gamma", "beta"))
        variance = weight(layer, "moving_variance")
        assert mean is not None
        assert variance is not None
        scale = np.ones_like(mean) if gamma is None else gamma
        if gamma is not None:
            scale = np.where(masked, 0, scale)
        shift = 0 if beta is None else np.where(masked, 0, beta)
        # Without gamma, what is masked keeps its value but for the mean and beta.
        mean = np.where(masked, 0, mean)
        given = np.where(scale == 0, mean, inputs[0])
        return scale * (given - mean) / np.sqrt(variance + layer.epsilon) + shift

    def scaled(self) -> dict[str, str]:
        names = ("gamma", "beta", "moving_mean", "moving_variance")
        return {name: "input" for name in names if getattr(self.layer, name) is not None}


@dataclasses.dataclass(frozen=True, eq=False)
class Elementwise(Step):
    """A function of every value by itself."""

    function: Callable[[Any], Any] = tf.identity

    def constants(self, inputs: Sequence[np.ndarray], masked: np.ndarray) -> np.ndarray:
        known = ~np.isnan(inputs[0])
        given = tf.constant(np.where(known, inputs[0], 0).astype(np.float32))
        values = np.asarray(self.function(given), np.float64)
        return np.where(known & np.isfinite(values), values, np.nan)


@dataclasses.dataclass(frozen=True, eq=False)
class Slopes(Step):
    """PReLU, whose slope for negative values may differ from place to place."""

    def constants(self, inputs: Sequence[np.ndarray], masked: np.ndarray) -> np.ndarray:
        alpha = weight(self.layer, "alpha")
        assert alpha is not None
        alpha = alpha.reshape(-1, alpha.shape[-1])
        slope = np.where((alpha == alpha[0]).all(0), alpha[0], np.nan)
        return np.where(inputs[0] >= 0, inputs[0], inputs[0] * slope)

    def scaled(self) -> dict[str, str]:
        return {"alpha": "input"} if self.layer.alpha.shape[-1] > 1 else {}


@dataclasses.dataclass(frozen=True, eq=False)
class Pad(Step):
    """Puts zeros, or other values than the image's, around it."""

    def constants(self, inputs: Sequence[np.ndarray], masked: np.ndarray) -> np.ndarray:
        return np.where(inputs[0] == 0, 0.0, np.nan)


@dataclasses.dataclass(frozen=True, eq=False)
class Unroll(Step):
    """Flatten: position p of channel c becomes channel p * channels + c."""

    positions: int = 1

    def connect(self, inputs: Sequence[np.ndarray], ties: Ties) -> list[np.ndarray]:
        return [np.tile(inputs[0], self.positions)]

    def constants(self, inputs: Sequence[np.ndarray], masked: np.ndarray) -> np.ndarray:
        return np.tile(inputs[0], self.positions)


@dataclasses.dataclass(frozen=True, eq=False)
class Merge(Step):
    """Channel c of every input goes into channel c; a single channel may go into all of them."""

    combine: Callable[[np.ndarray], np.ndarray] = np.sum

    def connect(self, inputs: Sequence[np.ndarray], ties: Ties) -> list[np.ndarray]:
        widest = max(inputs, key=len)
        for channels in inputs:
            if len(channels) == len(widest):
                ties.tie(widest, channels)
            else:
                ties.freeze(channels, f"{self.layer.name} reads it once for all channels")
        return [widest]

    def constants(self, inputs: Sequence[np.ndarray], masked: np.ndarray) -> np.ndarray:
        return self.combine(np.stack(np.broadcast_arrays(*inputs)))


@dataclasses.dataclass(frozen=True, eq=False)
class Join(Step):
    """Concatenation along the channels."""

    def connect(self, inputs: Sequence[np.ndarray], ties: Ties) -> list[np.ndarray]:
        return [np.concatenate(inputs)]

    def constants(self, inputs: Sequence[np.ndarray], masked: np.ndarray) -> np.ndarray:
        return np.concatenate(inputs)


@dataclasses.dataclass(frozen=True, eq=False)
class Opaque(Step):
    """What cannot be followed: all its channels stay.

    Attributes:
        reason: Why.
        sizes: Channels of every output; None where the channels are those of the input.
    """

    reason: str = ""
    sizes: tuple[int, ...] | None = None

    def connect(self, inputs: Sequence[np.ndarray], ties: Ties) -> list[np.ndarray]:
        outputs = list(inputs) if self.sizes is None else [ties.fresh(n) for n in self.sizes]
        for channels in (*inputs, *outputs):
            ties.freeze(channels, self.reason)
        return outputs

    def constants(self, inputs: Sequence[np.ndarray], masked: np.ndarray) -> np.ndarray:
        return np.full(masked.shape, np.nan)


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


def _dense(layer: Any, shape: Shape) -> list[Step]:
    return [Mix(layer), *_activation(layer, layer.activation)]


def _convolution(layer: Any, shape: Shape) -> list[Step]:
    if layer.groups > 1:
        raise NotFollowedError(f"{layer.name} is a convolution in {layer.groups} groups")
    return [Mix(layer, borders=_borders(layer)), *_activation(layer, layer.activation)]


def _transposed(layer: Any, shape: Shape) -> list[Step]:
    # Even in the middle, the places of the output see different parts of the kernel.
    mix = Mix(layer, input_axis=-1, output_axis=-2, borders=True)
    return [mix, *_activation(layer, layer.activation)]


def _depthwise(layer: Any, shape: Shape) -> list[Step]:
    return [Depthwise(layer, borders=_borders(layer)), *_activation(layer, layer.activation)]


def _separable(layer: Any, shape: Shape) -> list[Step]:
    depthwise = Depthwise(layer, bias="", borders=_borders(layer))
    return [depthwise, Mix(layer, "pointwise_kernel"), *_activation(layer, layer.activation)]


def _batch_norm(layer: Any, shape: Shape) -> list[Step]:
    if list(layer.axis) != [len(shape) - 1] or layer.renorm or layer._get_training_value is None:
        raise NotFollowedError(f"{layer.name} normalizes in a way that is not followed")
    return [Normalize(layer)]


def _prelu(layer: Any, shape: Shape) -> list[Step]:
    return [Slopes(layer)]


def _function_layer(layer: Any, shape: Shape) -> list[Step]:
    return _activation(layer, layer.activation)


def _elementwise(layer: Any, shape: Shape) -> list[Step]:
    return [Elementwise(layer, layer.call)]


def _rescaling(layer: Any, shape: Shape) -> list[Step]:
    if np.ndim(layer.scale) or np.ndim(layer.offset):
        raise NotFollowedError(f"{layer.name} keeps a list of numbers, one per channel")
    return [Elementwise(layer, layer.call)]


def _pass_on(layer: Any, shape: Shape) -> list[Step]:
    return [Step(layer)]


def _pad(layer: Any, shape: Shape) -> list[Step]:
    return [Pad(layer)]


def _upsample(layer: Any, shape: Shape) -> list[Step]:
    smooth = getattr(layer, "interpolation", "nearest") in ("nearest", "bilinear")
    return [Step(layer) if smooth else Pad(layer)]


def _flatten(layer: Any, shape: Shape) -> list[Step]:
    sizes = [size for size in shape[1:-1] if size is not None]
    if len(sizes) != len(shape) - 2:
        raise NotFollowedError(f"{layer.name} flattens axes of unknown size")
    return [Unroll(layer, int(np.prod(sizes, dtype=np.int64)))]


def _product(values: np.ndarray) -> np.ndarray:
    return np.where((values == 0).any(0), 0, np.prod(values, axis=0))


def _difference(values: np.ndarray) -> np.ndarray:
    return values[0] - values[1]


def _equal(values: np.ndarray) -> np.ndarray:
    return np.where((values == values[0]).all(0), values[0], np.nan)


def _merge(combine: Callable[[np.ndarray], np.ndarray]) -> Rule:
    return lambda layer, shape: [Merge(layer, combine)]


def _concatenate(layer: Any, shape: Shape) -> list[Step]:
    # Along another axis than the channels, channel c of every part is channel c of the whole.
    return [Join(layer) if layer.axis in (-1, len(shape) - 1) else Merge(layer, _equal)]


Rule = Callable[[Any, Shape], list[Step]]
_RULES: dict[type, Rule] = {
    _layers.Dense: _dense,
    _layers.BatchNormalization: _batch_norm,
    _layers.PReLU: _prelu,
    _layers.Activation: _function_layer,
    _layers.Rescaling: _rescaling,
    _layers.Flatten: _flatten,
    _layers.Concatenate: _concatenate,
    _layers.Add: _merge(lambda values: values.sum(0)),
    _layers.Subtract: _merge(_difference),
    _layers.Average: _merge(lambda values: values.mean(0)),
    _layers.Maximum: _merge(lambda values: values.max(0)),
    _layers.Minimum: _merge(lambda values: values.min(0)),
    _layers.Multiply: _merge(_product),
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
    """Takes a layer apart.

    Args:
        layer: A built layer that is no model.
        shapes: The shapes of its inputs, batch axis included.

    Returns:
        The steps, the first of which takes the inputs.

    Raises:
        NotFollowedError: With the reason, if the layer's channels cannot be followed.
    """
    rule, kind = _RULES.get(type(layer)), type(layer).__name__
    if rule is None:
        if kind in ("TFOpLambda", "SlicingOpLambda"):
            kind = "a TensorFlow operation (a layer such as Add is followed)"
        raise NotFollowedError(f"{layer.name} is {kind}, whose channels are not followed")
    if getattr(layer, "data_format", None) == "channels_first":
        raise NotFollowedError(f"{layer.name} has its channels first")
    if any(len(shape) < 2 or shape[-1] is None for shape in shapes):
        raise NotFollowedError(f"{layer.name} reads a tensor without a fixed number of channels")
    return rule(layer, shapes[0]) or [Step(layer)]
