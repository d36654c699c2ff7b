"""What a layer's kernel is multiplied with: rows of inputs, taken from the layer's own inputs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import tf_keras as keras

from rl_sparsity_tf.layers.kernel_spec import KernelSpec

_CONVOLUTION = keras.layers.Conv2D.call
_DEPTHWISE = (keras.layers.DepthwiseConv1D.call, keras.layers.DepthwiseConv2D.call)


@dataclasses.dataclass(frozen=True)
class RowSource:
    """Turns a layer's inputs into the rows that its kernel's matrix is multiplied with.

    Attributes:
        depthwise: Whether every channel has rows of its own: `(rows, positions, channels)`
            instead of `(rows, inputs)`.
        take: The function; it draws at most so many rows, the same for equally shaped inputs.

    Example:
        >>> source = row_source(keras.layers.Dense(3), spec, limit=1024)
        >>> source.take(np.ones((32, 5, 8), np.float32)).shape
        (160, 8)
    """

    depthwise: bool
    take: Callable[[np.ndarray], np.ndarray]


def row_source(
    layer: keras.layers.Layer, spec: KernelSpec, *, limit: int, seed: int = 0
) -> RowSource | None:
    """How the rows of a layer's kernel are found, or None where they can't be.

    Dense layers on any number of axes, convolutions without groups and depthwise convolutions are
    known, and subclasses that leave `call` as it is.

    Args:
        layer: The layer, unwrapped.
        spec: Its kernel.
        limit: Rows to take at most: drawn among all images, places and time steps.
        seed: Which.
    """
    call = type(layer).call
    if spec.attribute == "kernel" and call is keras.layers.Dense.call:
        return RowSource(False, lambda x: _dense_rows(x, limit, seed))
    if getattr(layer, "data_format", None) != "channels_last":
        return None
    window = _Window(layer)
    if spec.attribute == "kernel" and call is _CONVOLUTION and layer.groups == 1:
        return RowSource(False, lambda x: _flat(window.rows(x, limit, seed)))
    if spec.attribute == "depthwise_kernel" and call in _DEPTHWISE:
        return RowSource(True, lambda x: window.rows(x, limit, seed))
    return None


def _dense_rows(x: np.ndarray, limit: int, seed: int) -> np.ndarray:
    rows = x.reshape(-1, x.shape[-1])
    return rows[_draw(len(rows), limit, seed)]


def _flat(rows: np.ndarray) -> np.ndarray:
    return rows.reshape(len(rows), -1)


def _draw(count: int, limit: int, seed: int) -> Any:
    """Which of so many rows are taken."""
    if count <= limit:
        return slice(None)
    # Drawn with replacement above a size where a permutation would cost more than the fit.
    rng = np.random.default_rng([seed, count])
    if count > 32 * limit:
        return np.sort(rng.integers(0, count, limit))
    return np.sort(rng.choice(count, limit, replace=False))


class _Window:
    """The places of the input that every output of a convolution sees."""

    def __init__(self, layer: Any):
        self.rank: int = layer.rank
        self.size = tuple(layer.kernel_size)
        self.strides = tuple(layer.strides)
        self.dilation = tuple(layer.dilation_rate)
        self.padding: str = layer.padding

    def rows(self, x: np.ndarray, limit: int, seed: int) -> np.ndarray:
        """Rows of shape `(rows, positions, channels)`."""
        if x.ndim != self.rank + 2:  # Keras takes more leading axes
            x = x.reshape((-1, *x.shape[-self.rank - 1 :]))
        pads, outputs = [], []
        for size, kernel, stride, dilation in zip(
            x.shape[1:-1], self.size, self.strides, self.dilation, strict=True
        ):
            pad, output = self._axis(size, (kernel - 1) * dilation + 1, stride)
            pads.append(pad)
            outputs.append(output)
        if any(before or after for before, after in pads):
            x = np.pad(x, [(0, 0), *pads, (0, 0)])
        chosen = _draw(len(x) * math.prod(outputs), limit, seed)
        if isinstance(chosen, slice):
            chosen = np.arange(len(x) * math.prod(outputs))
        image, *places = np.unravel_index(chosen, (len(x), *outputs))
        corners = [place * stride for place, stride in zip(places, self.strides, strict=True)]
        offsets = np.stack(
            np.meshgrid(
                *(np.arange(k) * d for k, d in zip(self.size, self.dilation, strict=True)),
                indexing="ij",
            )
        ).reshape(self.rank, -1)
        seen = [corner[:, None] + offset for corner, offset in zip(corners, offsets, strict=True)]
        flat = np.ravel_multi_index(
            (np.broadcast_to(image[:, None], seen[0].shape), *seen), x.shape[:-1]
        )
        return x.reshape(-1, x.shape[-1])[flat]

    def _axis(self, size: int, reach: int, stride: int) -> tuple[tuple[int, int], int]:
        """Padding before and after, and the number of outputs, along one axis."""
        if self.padding == "same":
            outputs = -(-size // stride)
            total = max((outputs - 1) * stride + reach - size, 0)
            return (total // 2, total - total // 2), outputs
        before = reach - 1 if self.padding == "causal" else 0
        return (before, 0), (size + before - reach) // stride + 1
