"""What a network costs by how many of its channels live: weights, multiplications, bytes, time."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tf_keras as keras

from rl_sparsity_tf.channels.graph import ChannelGraph, PlacedStep
from rl_sparsity_tf.channels.groups import check_graph
from rl_sparsity_tf.channels.latency_table import LatencyTable
from rl_sparsity_tf.channels.steps import Depthwise, Mix
from rl_sparsity_tf.channels.units import ChannelUnit
from rl_sparsity_tf.channels.widths import LayerWidths
from rl_sparsity_tf.errors import TargetError
from rl_sparsity_tf.export.size_model import KernelBytes
from rl_sparsity_tf.keras3.door import takes_keras_3
from rl_sparsity_tf.layers.kernels import find_kernels


@dataclasses.dataclass(frozen=True, eq=False)
class ChannelCounts:
    """How many channels lie along something, by the shares of the units' channels that live.

    Attributes:
        fixed: Channels that stay, shape `(things,)`.
        shares: Channels of every unit, shape `(units, things)`.
    """

    fixed: np.ndarray
    shares: np.ndarray

    @classmethod
    def of(cls, channels: Sequence[np.ndarray], units: Sequence[ChannelUnit]) -> ChannelCounts:
        """Counts channels given as the graph's numbers; those of frozen units are fixed."""
        shares = np.zeros((len(units), len(channels)))
        for index, unit in enumerate(units):
            if unit.frozen is None:
                shares[index] = [np.isin(some, unit.numbers).sum() for some in channels]
        return cls(np.array([len(some) for some in channels]) - shares.sum(0), shares)

    def __call__(self, live: np.ndarray) -> np.ndarray:
        """The counts, `(..., things)`, at living shares of units' channels, `(..., units)`."""
        return self.fixed + live @ self.shares


class ChannelCosts:
    """The cost of every kernel as a product of the channels it reads and makes.

    Methods take as `live` the shares of the units' channels that live, shape `(..., units)`. `taps`
    are the weights of every kernel per pair of channels (depthwise: per channel). Multiplications
    can be counted where a model's images have fixed sizes.
    """

    def __init__(self, model: keras.Model, graph: ChannelGraph, units: Sequence[ChannelUnit]):
        self._places = [p for p in graph.placed if isinstance(p.step, Mix | Depthwise)]
        self._units = list(units)
        self._inputs = ChannelCounts.of([graph.channels[p.inputs[0]] for p in self._places], units)
        self._outputs = ChannelCounts.of(
            [graph.channels[p.outputs[0]] for p in self._places], units
        )
        self._depthwise = np.array([isinstance(p.step, Depthwise) for p in self._places], bool)
        self.paths = [f"{p.path}/{p.step.kernel}" for p in self._places]  # type: ignore[attr-defined]
        kernels = {kernel.path: kernel for kernel in find_kernels(model)}
        followed = set(self.paths)
        self._others = [kernel for path, kernel in kernels.items() if path not in followed]
        self.taps = np.array([_taps(place) for place in self._places])
        self._owners = np.full(len(self._places), -1)
        for index, unit in enumerate(units):
            for member in unit.members:
                if member.kernel.path in followed and member.kernel.spec.exports_int8:
                    self._owners[self.paths.index(member.kernel.path)] = index

    def _products(self, live: np.ndarray) -> np.ndarray:
        """Pairs of channels of every kernel (depthwise: channels), shape `(..., kernels)`."""
        made = self._outputs(live)
        return np.where(self._depthwise, made, self._inputs(live) * made)

    def weights(self, live: np.ndarray) -> np.ndarray:
        """Weights of all kernels, shape `(...)`."""
        others = sum(kernel.size for kernel in self._others)
        return self._products(live) @ self.taps + others

    def macs(self, live: np.ndarray) -> np.ndarray:
        """Multiply-accumulates of one example, shape `(...)`."""
        others, places = self._computed
        return self._products(live) @ (self.taps * places) + others

    @functools.cached_property
    def _computed(self) -> tuple[int, np.ndarray]:
        """Multiplications in kernels that are not followed, and how often others are used."""
        others = sum(k.size * _positions(k.layer, "input") for k in self._others)
        sides = [
            "input" if "Transpose" in type(p.step.layer).__name__ else "output"
            for p in self._places
        ]
        layers = [place.step.layer for place in self._places]
        return others, np.array([_positions(*pair) for pair in zip(layers, sides, strict=True)])

    def bytes(self, sizes: KernelBytes) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
        """The bytes of a file without its dead channels, every tensor dense.

        The function takes the shares of the units' channels that live, shape `(..., units)`, and
        whether a unit's kernels are stored as integers, `(units,)`; it returns bytes, `(...)`.
        """
        kernels = {m.kernel.path: m.kernel for unit in self._units for m in unit.members}
        values = {path: kernel.value() for path, kernel in kernels.items()}

        def stored(path: str, bits: int) -> float:
            if path not in kernels:
                return 0.0
            return sizes.kernel(path, values[path], bits if kernels[path].spec.exports_int8 else 32)

        as_floats = np.array([stored(path, 32) for path in self.paths])
        as_integers = np.array([stored(path, 8) for path in self.paths])
        fixed = sizes.file(values, {}) - as_floats.sum()
        whole = self._products(np.ones(len(self._units)))

        def total(live: np.ndarray, integers: np.ndarray) -> np.ndarray:
            chosen = (self._owners >= 0) & integers[self._owners]
            each = np.where(chosen, as_integers, as_floats)
            return fixed + (self._products(live) / whole) @ each

        return total


def _taps(place: PlacedStep) -> int:
    kernel = getattr(place.step.layer, place.step.kernel)  # type: ignore[attr-defined]
    if isinstance(place.step, Depthwise):
        return math.prod(int(size) for size in kernel.shape[:-2])
    assert isinstance(place.step, Mix)
    inputs, outputs = place.step.matrices().shape[1:]
    return math.prod(int(size) for size in kernel.shape) // (inputs * outputs)


def _positions(layer: Any, side: str) -> int:
    """Places of a layer's input or output at which its kernel is used, per example.

    An open size raises a TargetError that tells the user to build the model with a fixed one.
    """
    try:
        shape = getattr(layer, f"{side}_shape")
    except AttributeError:  # called several times, at shapes that differ
        shape = getattr(layer, f"get_{side}_shape_at")(0)
    shape = shape[0] if isinstance(shape, list) else shape
    if any(size is None for size in shape[1:-1]):
        raise TargetError(
            f"The layer {layer.name!r} has an {side} of shape {shape}, so that its multiplications "
            "cannot be counted. Expected a model whose images or sequences have a fixed size: "
            "build it with Input(shape=(height, width, channels))."
        )
    return math.prod(shape[1:-1])


@takes_keras_3
def count_macs(model: keras.Model) -> int:
    """Counts the multiply-accumulates of one example in a model's kernels.

    Those of dense, convolutional and depthwise layers are exact; a recurrent layer counts its
    kernels once per time step.

    Args:
        model: A built, plain model with a graph, of Keras 3 or `tf_keras`.

    Raises:
        ModelError: If the model is not built, is wrapped, or has no graph.
        TargetError: If the sizes of its images or sequences are not fixed.

    Example:
        >>> small = rls.shrink(rls.mask_channels(model, {0: [True, False] * 8}))
        >>> rls.count_macs(model), rls.count_macs(small)
        (26240, 13440)
    """
    check_graph(model, "count_macs")
    costs = ChannelCosts(model, ChannelGraph(model), [])
    return int(costs.macs(np.zeros(0)))


def latency_of(
    table: LatencyTable, model: keras.Model, units: Sequence[ChannelUnit]
) -> Callable[[np.ndarray], np.ndarray]:
    """The predicted milliseconds as a function of what lives.

    The function takes the shares of the units' channels that live, shape `(..., units)`, and
    returns times of shape `(...)`. A table of another model raises an ArgumentError.
    """
    table.check(model)
    chains = LayerWidths(model).chains
    inputs = ChannelCounts.of([chain.channels_in for chain in chains], units)
    outputs = ChannelCounts.of([chain.channels_out for chain in chains], units)

    def milliseconds(live: np.ndarray) -> np.ndarray:
        # Shares are between whole channels, and every layer keeps one.
        counted = (np.maximum(np.rint(count(live)), 1) for count in (inputs, outputs))
        read, made = (widths.astype(np.int64) for widths in counted)
        total = np.full(live.shape[:-1], table.overhead_ms)
        for index, chain in enumerate(chains):
            total = total + table.layer_ms(chain.path, read[..., index], made[..., index])
        return total

    return milliseconds
