"""The least-squares problem of one kernel: its rows of inputs, and the outputs to give back."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras as keras

from rl_sparsity_tf.errors import DataError
from rl_sparsity_tf.layers import operations as ops
from rl_sparsity_tf.layers.groups import Grouping
from rl_sparsity_tf.layers.kernel_spec import KernelSpec
from rl_sparsity_tf.layers.kernels import Kernel
from rl_sparsity_tf.layers.operations import constraint_of, project
from rl_sparsity_tf.training.ridge import fit_depthwise, fit_masked, round_with_feedback

_CONVOLUTION = keras.layers.Conv2D.call
_DEPTHWISE = (keras.layers.DepthwiseConv1D.call, keras.layers.DepthwiseConv2D.call)


@dataclasses.dataclass(frozen=True)
class RowSource:
    """Turns a layer's inputs into the rows that its kernel's matrix is multiplied with.

    Attributes:
        depthwise: Whether every channel has rows of its own: `(rows, positions, channels)` instead
            of `(rows, inputs)`.
        take: Draws at most so many rows, the same for equally shaped inputs.

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

    The layer comes unwrapped. At most `limit` rows are drawn among all images, places and time
    steps.
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


# Of an input's mean square, what rounding on the way to it may be: (1e-4)^2.
_ROUNDING = 1e-8


@dataclasses.dataclass(frozen=True)
class Moments:
    """What the rows say, and all that a fit needs of them.

    Attributes:
        mean: Mean of the rows, shape `(inputs,)`, or `(positions, channels)` for depthwise kernels;
            0 where the layer has no bias that could make up for it.
        gram: Second moments about the mean, shape `(inputs, inputs)` or
            `(channels, positions, positions)`.
        cross: Moments of the rows and the wanted outputs, shape `(inputs, outputs)`.
    """

    mean: np.ndarray
    gram: np.ndarray
    cross: np.ndarray

    @property
    def rounding(self) -> float:
        """What the rows' energy about their mean may be by rounding alone.

        Inputs that are constant but for that would be fitted with weights without bound.
        """
        about_mean = np.einsum("...kk->...k", self.gram).mean()
        return _ROUNDING * float(about_mean + np.mean(np.square(self.mean)))


@dataclasses.dataclass(frozen=True)
class _Calls:
    """The moments of so many rows of one call of a layer or several, and their outputs' mean."""

    rows: int
    moments: Moments
    output_mean: np.ndarray

    def plus(self, other: _Calls) -> _Calls:
        """Those of both, about the means of both."""
        rows = self.rows + other.rows
        share = self.rows / rows
        mean = share * self.moments.mean + (1.0 - share) * other.moments.mean
        output_mean = share * self.output_mean + (1.0 - share) * other.output_mean
        gram, cross = np.zeros_like(self.moments.gram), np.zeros_like(self.moments.cross)
        for part, one in ((share, self), (1.0 - share, other)):
            away, out = one.moments.mean - mean, one.output_mean - output_mean
            if away.ndim == 1:
                square, mixed = np.outer(away, away), np.outer(away, out)
            else:  # depthwise
                square = np.einsum("kc,lc->ckl", away, away)
                mixed = np.repeat(away, len(out) // away.shape[1], axis=1) * out
            gram += part * (one.moments.gram + square)
            cross += part * (one.moments.cross + mixed)
        return _Calls(rows, Moments(mean, gram, cross), output_mean)


# Ordinary activations are computed with as they are, in the unit 1.
_FAR = 2.0**30


def _unit(largest: float, far: float) -> float:
    """A power of two near a magnitude, or 1 if that is not far from it; changes no digit."""
    if largest == 0 or 1 / far <= largest <= far:
        return 1.0
    return float(np.ldexp(1.0, int(np.frexp(largest)[1])))


class LayerProblem:
    """One kernel's rows, wanted outputs and moments.

    The kernel has its trained weights, and the inputs are the layer's in the dense network. With
    `fixed`, kernel and bias stay as they were trained: nothing is fitted, and what is asked for
    says what masks and grids alone make of them. With `fixed_bias`, only the bias stays.
    """

    def __init__(
        self,
        kernel: Kernel,
        grouping: Grouping,
        source: RowSource,
        inputs: np.ndarray,
        *,
        ridge: float,
        fixed: bool = False,
        fixed_bias: bool = False,
    ):
        self.kernel = kernel
        self.grouping = grouping
        self._source = source
        self.ridge = ridge
        self.fixed = fixed
        self._constrained = constraint_of(kernel.variable) is not None
        self.original = kernel.matrix().astype(np.float32)
        layer: Any = kernel.layer
        adapts = getattr(layer, "use_bias", False) and not (fixed or fixed_bias)
        self.bias = layer.bias if adapts else None
        self._bias0 = None if self.bias is None else np.asarray(self.bias)
        self._later: _Calls | None = None
        self._first = self._call(source.take(inputs))
        self._join(self._first)

    def _call(self, rows: np.ndarray) -> _Calls:
        """Takes the rows' outputs for what is wanted; their moments."""
        with np.errstate(over="ignore", invalid="ignore"):  # what that means is said in words
            outputs = self._product(rows, self.original)
            self._output_mean = outputs.mean(axis=0, dtype=np.float64)
            if self.bias is None:
                self._output_mean = np.zeros_like(self._output_mean)
            self._wanted, self._wanted_unit = self._in_units(outputs - self._output_mean)
        return _Calls(len(rows), self._moments(rows), self._output_mean)

    def _join(self, calls: _Calls) -> None:
        self.dense, self._output_mean = calls.moments, calls.output_mean
        # Single precision will do for comparing errors, and takes half the time.
        self._energy_unit = _unit(float(self.dense.gram.max()), _FAR**2)
        self._gram32 = (self.dense.gram / self._energy_unit).astype(np.float32)
        least = 1e-30 * self._energy_unit
        self.energy = max(self._energy(self.original, self._gram32) * self._energy_unit, least)

    def regrouped(self, grouping: Grouping) -> LayerProblem:
        """The same problem of a kernel that is cut in another way; what is known stays shared."""
        other = copy.copy(self)
        other.grouping = grouping
        return other

    def add_call(self, inputs: np.ndarray) -> None:
        """Adds one more call of the layer to the problem, with its inputs in the dense network."""
        call = copy.copy(self)._call(self.take(inputs))
        self._later = call if self._later is None else self._later.plus(call)
        self._join(self._first.plus(self._later))

    def take(self, inputs: np.ndarray) -> np.ndarray:
        """The rows of the layer's inputs."""
        return self._source.take(inputs)

    def moments(self, rows: np.ndarray) -> Moments:
        """Computes the moments of rows taken from the same places as the dense network's.

        The rows are those of the layer's first call; later ones are the dense network's.
        """
        moments = self._moments(rows)
        if self._later is None:
            return moments
        first = dataclasses.replace(self._first, moments=moments)
        return first.plus(self._later).moments

    def _moments(self, rows: np.ndarray) -> Moments:
        count = len(rows)
        mean = rows.mean(axis=0, dtype=np.float64)
        if self.bias is None:
            mean = np.zeros_like(mean)
        with np.errstate(over="ignore", invalid="ignore"):
            centred, unit = self._in_units(rows - mean.astype(np.float32))
        squared, mixed = unit * unit, unit * self._wanted_unit
        if not self._source.depthwise:
            gram = (centred.T @ centred).astype(np.float64) / count * squared
            cross = (centred.T @ self._wanted).astype(np.float64) / count * mixed
            return Moments(mean, gram, cross)
        by_channel = centred.transpose(2, 1, 0)  # (channels, positions, rows)
        gram = (by_channel @ by_channel.transpose(0, 2, 1)).astype(np.float64) / count * squared
        channels = by_channel.shape[0]
        wanted = self._wanted.reshape(count, channels, -1).transpose(1, 0, 2)
        cross = (by_channel @ wanted).astype(np.float64) / count * mixed
        return Moments(mean, gram, cross.transpose(1, 0, 2).reshape(by_channel.shape[1], -1))

    def _in_units(self, values: np.ndarray) -> tuple[np.ndarray, float]:
        """Values in a unit that their products stay within single precision in, and the unit.

        Values that are not finite raise a DataError.
        """
        largest = max(float(values.max()), -float(values.min()))
        if not np.isfinite(largest):
            raise DataError(
                f"With the training data the layer {self.kernel.layer.name!r} is given, or gives, "
                "values beyond float32. Expected inputs of the scale that the model was trained "
                "on: scale them as for its training, or remove the rows with huge numbers."
            )
        unit = _unit(largest, _FAR)
        if unit != 1.0:
            values = np.ldexp(values, -int(np.log2(unit)))
        return values.astype(np.float32, copy=False), unit

    def _product(self, rows: np.ndarray, matrix: np.ndarray) -> np.ndarray:
        if not self._source.depthwise:
            return rows @ matrix
        channels = rows.shape[2]
        parts = matrix.reshape(matrix.shape[0], channels, -1).transpose(1, 0, 2)
        return (rows.transpose(2, 0, 1) @ parts).transpose(1, 0, 2).reshape(len(rows), -1)

    def _per_output(self, gram: np.ndarray) -> np.ndarray:
        """A depthwise kernel's Gram matrices, one per output."""
        return np.repeat(gram, self.grouping.outputs // gram.shape[0], axis=0)

    def _energy(self, matrix: np.ndarray, gram: np.ndarray) -> float:
        if not self._source.depthwise:
            # Rows that are zero everywhere take no part.
            used = np.flatnonzero(np.any(matrix != 0, axis=1))
            if 2 * len(used) < len(matrix):
                matrix, gram = matrix[used], gram[np.ix_(used, used)]
            return float(np.vdot(matrix, gram @ matrix))
        return float(np.einsum("ko,okl,lo->", matrix, self._per_output(gram), matrix))

    def error(self, matrix: np.ndarray) -> float:
        r"""How far the layer's outputs move if its kernel becomes another, without a forward pass.

        \(e = \mathrm{tr}(\Delta^T G \Delta) / \mathrm{tr}(W^T G W)\) with the Gram matrix G of the
        dense network's inputs (about their mean where there is a bias, which recovery adapts).

        The other kernel has the shape `(inputs, outputs)`. The result is `e / (1 + e)`, in [0, 1),
        or 1 if that kernel is not finite.
        """
        error = self.relative_error(matrix)
        return error / (1.0 + error) if np.isfinite(error) else 1.0

    def relative_error(self, matrix: np.ndarray) -> float:
        """The error as it is, before it is squeezed: energy of the change over the outputs' own."""
        change = np.asarray(matrix, np.float32) - self.original
        return self._energy(change, self._gram32) * self._energy_unit / self.energy

    @property
    def input_energy(self) -> np.ndarray:
        """Mean square of what every weight is multiplied with, shape `(inputs, outputs)` or 1."""
        return self.energy_of(self.dense)

    def energy_of(self, moments: Moments) -> np.ndarray:
        """[input_energy][] by other moments than those of the dense network."""
        if not self._source.depthwise:
            return np.diag(moments.gram)[:, None]
        return np.einsum("okk->ko", self._per_output(moments.gram))

    def fit(self, operations: np.ndarray, bits: int, moments: Moments) -> None:
        """Sets the kernel and bias to what gives the dense layer's outputs back best.

        There is one operation per group, and bits are 8 or 4, the grid of the quantized groups. The
        moments are those of the compressed network's rows.
        """
        if self.fixed:
            return
        grouping, spec = self.grouping, self.kernel.spec
        exact = self._fitted(operations, moments)
        weights = self._on_grid(exact, operations, bits, moments)
        live = grouping.expand_numpy(operations != ops.Operation.PRUNE)

        def permute(matrix: np.ndarray) -> np.ndarray:
            return self._permuted(matrix, operations)

        # Groups that are pruned keep what they were trained to, in case they come back.
        stays = exact if self._constrained else weights  # the constraint comes before the grid
        latent = permute(np.where(live, stays, permute(self.original)))
        self.kernel.variable.assign(spec.from_matrix_numpy(latent, self.kernel.shape))
        if self.bias is not None and self._bias0 is not None:
            shift = self._mean_product(moments.mean, weights)
            bias = self._bias0 + (self._output_mean - shift).astype(np.float32)
            self.bias.assign(project(self.bias, bias))

    def solve(self, operations: np.ndarray, bits: int, moments: Moments) -> np.ndarray:
        """The effective kernel that gives the dense layer's outputs back best; sets nothing.

        It is float32 of shape `(inputs, outputs)`, after permutation, and 0 where groups are
        pruned. The operations and bits are those of `fit`, the moments those of the rows that the
        layer is given.
        """
        exact = self._fitted(operations, moments)
        return self._on_grid(exact, operations, bits, moments)

    def _gram_of(self, moments: Moments) -> np.ndarray:
        return self._per_output(moments.gram) if self._source.depthwise else moments.gram

    def _fitted(self, operations: np.ndarray, moments: Moments) -> np.ndarray:
        """The effective kernel before it is rounded, as its constraint wants it."""
        live = self.grouping.expand_numpy(operations != ops.Operation.PRUNE)
        if self.fixed:
            weights = np.where(live, self._permuted(self.original, operations), np.float32(0))
        else:
            fit = fit_depthwise if self._source.depthwise else fit_masked
            gram = self._gram_of(moments)
            least = moments.rounding
            fitted = fit(gram, moments.cross, self.original, live, ridge=self.ridge, least=least)
            weights = fitted.astype(np.float32)
        return self._projected(weights, live) if self._constrained else weights

    def _on_grid(
        self, weights: np.ndarray, operations: np.ndarray, bits: int, moments: Moments
    ) -> np.ndarray:
        """An effective kernel with its quantized groups on the grid."""
        spec = self.kernel.spec
        grid = ops.grid_groups(operations)
        if grid.any():
            levels = 7.0 if bits == 4 else 127.0
            scale = ops.grid_scale(
                tf.constant(weights), tf.constant(levels), spec.per_output_scale, spec.gates
            ).numpy()
            on_grid = self.grouping.expand_numpy(grid)
            if self.fixed or self._constrained:  # to cancel others' errors may break it
                return _rounded(weights, scale, levels, on_grid)
            live = self.grouping.expand_numpy(operations != ops.Operation.PRUNE)
            gram = self._gram_of(moments)
            weights = round_with_feedback(weights, gram, scale, levels, on_grid, live)
        return weights

    def _projected(self, weights: np.ndarray, live: np.ndarray) -> np.ndarray:
        """What the kernel's constraint makes of an effective kernel; what is pruned stays 0."""
        kernel = self.kernel
        value = kernel.spec.from_matrix_numpy(weights, kernel.shape)
        projected = kernel.spec.to_matrix_numpy(project(kernel.variable, value))
        return np.where(live, projected, np.float32(0))

    def _permuted(self, matrix: np.ndarray, operations: np.ndarray) -> np.ndarray:
        swaps = ops.swaps_of(operations, self.grouping)
        if not swaps.any():
            return matrix
        return ops.permute(tf.constant(matrix), tf.constant(swaps), self.grouping).numpy()

    def _mean_product(self, mean: np.ndarray, weights: np.ndarray) -> np.ndarray:
        if not self._source.depthwise:
            return mean @ weights
        repeated = np.repeat(mean, self.grouping.outputs // mean.shape[1], axis=1)
        return (repeated * weights).sum(axis=0)

    def restore(self) -> None:
        """Puts the trained weights back."""
        self.kernel.variable.assign(
            self.kernel.spec.from_matrix_numpy(self.original, self.kernel.shape)
        )
        if self.bias is not None:
            self.bias.assign(self._bias0)


def _rounded(
    weights: np.ndarray, scale: np.ndarray, levels: float, on_grid: np.ndarray
) -> np.ndarray:
    step = np.where(scale > 0, scale, np.float32(1.0))
    integers = np.clip(np.rint(weights / step), -levels, levels)
    return np.where(on_grid, integers * step, weights).astype(np.float32)
