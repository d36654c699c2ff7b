"""What happens to the channels of a tensor: they are mixed, scaled, passed on or joined.

A step says which channels of its output belong to which of its input's (one is removed with the
other), which weights have an entry per channel, and which constant comes out where one goes in.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import tensorflow as tf
import tf_keras as keras

from rl_sparsity_tf.layers.operations import constraint_of


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
    """A step that leaves channels and constants as they are (pooling, dropout)."""

    layer: keras.layers.Layer

    def connect(self, inputs: Sequence[np.ndarray], ties: Ties) -> list[np.ndarray]:
        """The channels of the outputs, by number."""
        return [inputs[0]]

    def constants(self, inputs: Sequence[np.ndarray], masked: np.ndarray) -> np.ndarray:
        """The constant that each channel of the output is, NaN where it is none.

        `inputs` says the same of the inputs. `masked` marks the channels of the output that count
        as set to zero wherever they have weights.
        """
        return inputs[0]

    def scaled(self) -> dict[str, str]:
        """Weights with one entry per channel on their last axis: attribute -> input or output."""
        return {}


@dataclasses.dataclass(frozen=True, eq=False)
class Mix(Step):
    """A kernel that makes new channels of all the channels that come in.

    `kernel` is the attribute of the layer that holds it; `borders` says whether the borders of an
    image see fewer inputs than its middle.
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
        if self.bias and constraint_of(self.layer.bias) is not None:
            return "has a constraint on the bias that would take it up"
        return "" if self.bias else "has no bias to take it up"

    def matrices(self) -> np.ndarray:
        """The kernel as `(positions, inputs, outputs)`."""
        kernel = np.asarray(getattr(self.layer, self.kernel), np.float64)
        moved = np.moveaxis(kernel, (self.input_axis, self.output_axis), (-2, -1))
        return moved.reshape(-1, *moved.shape[-2:])

    def connect(self, inputs: Sequence[np.ndarray], ties: Ties) -> list[np.ndarray]:
        """New channels, one per output of the kernel."""
        return [ties.fresh(self.matrices().shape[-1])]

    def constants(self, inputs: Sequence[np.ndarray], masked: np.ndarray) -> np.ndarray:
        """Outputs that read constants alone, or nothing."""
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
        """Every channel as often as it has kernels."""
        return [np.repeat(inputs[0], int(getattr(self.layer, self.kernel).shape[-1]))]

    def constants(self, inputs: Sequence[np.ndarray], masked: np.ndarray) -> np.ndarray:
        """Channels that are constant, or whose kernel is zero."""
        kernel = np.asarray(getattr(self.layer, self.kernel), np.float64)
        sums = kernel.reshape(-1, *kernel.shape[-2:]).sum(0).ravel()
        empty = ~kernel.reshape(-1, sums.size).any(0)
        given = np.repeat(inputs[0], kernel.shape[-1])
        usable = (given == 0) if self.borders else ~np.isnan(given)
        bias = weight(self.layer, self.bias) if self.bias else None
        values = np.where(usable, given, 0) * sums + (0 if bias is None else bias)
        return np.where(masked, 0, np.where(usable | empty, values, np.nan))

    def scaled(self) -> dict[str, str]:
        """The bias, if there is one."""
        present = self.bias and getattr(self.layer, self.bias, None) is not None
        return {self.bias: "output"} if present else {}


@dataclasses.dataclass(frozen=True, eq=False)
class Normalize(Step):
    """Batch normalization with the statistics of training."""

    def constants(self, inputs: Sequence[np.ndarray], masked: np.ndarray) -> np.ndarray:
        """Channels that are constant, or whose gamma is zero."""
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
        """Gamma, beta, mean and variance, as far as the layer has them."""
        names = ("gamma", "beta", "moving_mean", "moving_variance")
        return {name: "input" for name in names if getattr(self.layer, name) is not None}


@dataclasses.dataclass(frozen=True, eq=False)
class Elementwise(Step):
    """A function of every value by itself."""

    function: Callable[[Any], Any] = tf.identity

    def constants(self, inputs: Sequence[np.ndarray], masked: np.ndarray) -> np.ndarray:
        """The function of every constant."""
        known = ~np.isnan(inputs[0])
        given = tf.constant(np.where(known, inputs[0], 0).astype(np.float32))
        values = np.asarray(self.function(given), np.float64)
        return np.where(known & np.isfinite(values), values, np.nan)


@dataclasses.dataclass(frozen=True, eq=False)
class Slopes(Step):
    """PReLU, whose slope for negative values may differ from place to place."""

    def constants(self, inputs: Sequence[np.ndarray], masked: np.ndarray) -> np.ndarray:
        """Constants whose slope is the same everywhere."""
        alpha = weight(self.layer, "alpha")
        assert alpha is not None
        alpha = alpha.reshape(-1, alpha.shape[-1])
        slope = np.where((alpha == alpha[0]).all(0), alpha[0], np.nan)
        return np.where(inputs[0] >= 0, inputs[0], inputs[0] * slope)

    def scaled(self) -> dict[str, str]:
        """The slopes, unless all channels share them."""
        return {"alpha": "input"} if self.layer.alpha.shape[-1] > 1 else {}


@dataclasses.dataclass(frozen=True, eq=False)
class Pad(Step):
    """Puts zeros, or other values than the image's, around it."""

    def constants(self, inputs: Sequence[np.ndarray], masked: np.ndarray) -> np.ndarray:
        """Zeros alone stay constants."""
        return np.where(inputs[0] == 0, 0.0, np.nan)


@dataclasses.dataclass(frozen=True, eq=False)
class Unroll(Step):
    """Flatten: position p of channel c becomes channel p * channels + c."""

    positions: int = 1

    def connect(self, inputs: Sequence[np.ndarray], ties: Ties) -> list[np.ndarray]:
        """All channels, once for every position."""
        return [np.tile(inputs[0], self.positions)]

    def constants(self, inputs: Sequence[np.ndarray], masked: np.ndarray) -> np.ndarray:
        """All constants, once for every position."""
        return np.tile(inputs[0], self.positions)


@dataclasses.dataclass(frozen=True, eq=False)
class Merge(Step):
    """Channel c of every input goes into channel c; a single channel may go into all of them."""

    combine: Callable[[np.ndarray], np.ndarray] = np.sum

    def connect(self, inputs: Sequence[np.ndarray], ties: Ties) -> list[np.ndarray]:
        """Ties the channels of all inputs; an input of fewer, read for all channels, is frozen."""
        widest = max(inputs, key=len)
        for channels in inputs:
            if len(channels) == len(widest):
                ties.tie(widest, channels)
            else:
                ties.freeze(channels, f"{self.layer.name} reads it once for all channels")
        return [widest]

    def constants(self, inputs: Sequence[np.ndarray], masked: np.ndarray) -> np.ndarray:
        """What the constants of all inputs combine to."""
        return self.combine(np.stack(np.broadcast_arrays(*inputs)))


@dataclasses.dataclass(frozen=True, eq=False)
class Join(Step):
    """Concatenation along the channels."""

    def connect(self, inputs: Sequence[np.ndarray], ties: Ties) -> list[np.ndarray]:
        """The channels of one input after the other."""
        return [np.concatenate(inputs)]

    def constants(self, inputs: Sequence[np.ndarray], masked: np.ndarray) -> np.ndarray:
        """The constants of one input after the other."""
        return np.concatenate(inputs)


@dataclasses.dataclass(frozen=True, eq=False)
class Opaque(Step):
    """What cannot be followed: all its channels stay.

    `sizes` are the channels of every output; None where they are those of the input.
    """

    reason: str = ""
    sizes: tuple[int, ...] | None = None

    def connect(self, inputs: Sequence[np.ndarray], ties: Ties) -> list[np.ndarray]:
        """Freezes all channels."""
        outputs = list(inputs) if self.sizes is None else [ties.fresh(n) for n in self.sizes]
        for channels in (*inputs, *outputs):
            ties.freeze(channels, self.reason)
        return outputs

    def constants(self, inputs: Sequence[np.ndarray], masked: np.ndarray) -> np.ndarray:
        """No constant is known."""
        return np.full(masked.shape, np.nan)
