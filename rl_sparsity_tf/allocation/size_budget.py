"""A target in bytes: what kernels cost in the file, and which actions keep it within reach."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import tf_keras as keras

from rl_sparsity_tf.allocation.budgets import Budget, CostBudget, KernelState
from rl_sparsity_tf.allocation.storage import KernelStorage, Storage
from rl_sparsity_tf.allocation.target import Target
from rl_sparsity_tf.errors import TargetError
from rl_sparsity_tf.export.size_model import KernelBytes, SizeModel
from rl_sparsity_tf.layers.kernels import Kernel, count_weights
from rl_sparsity_tf.layers.rules import prune_by_magnitude

# The implied sparsity is looked for among this many densities.
_DENSITIES_TRIED = 512


@dataclasses.dataclass(frozen=True, eq=False)
class KernelCosts:
    """What a kernel costs in the file, by how many of its weights live.

    Attributes:
        live: Numbers of living weights, ascending.
        floats: Bytes with that many, stored as float32.
        integers: The same as int8; None if it cannot be stored so.
    """

    live: np.ndarray
    floats: np.ndarray
    integers: np.ndarray | None

    def cost(self, live: float, integers: bool) -> float:
        """Bytes with so many living weights."""
        stored = self.integers if integers and self.integers is not None else self.floats
        return float(np.interp(live, self.live, stored))

    def least(self, live: float, integers: bool) -> float:
        """Bytes in the cheaper of the two types, if integers are open to it."""
        return min(self.cost(live, False), self.cost(live, integers))


class SizeBudget(CostBudget):
    """A budget of bytes.

    The wall: a decision is legal only if the file can still be brought to its size, all undecided
    groups being pruned as far as the floors allow and those left stored in the smaller type; and
    nothing more is pruned once the file is small enough with all that lives as integers. Floors are
    those of the sparsity that the size implies when every kernel has the same density. A size that
    cannot be reached raises a TargetError that names the smallest that can.

    Args:
        limit: Bytes that the file may have by the size model.
        fixed: Bytes of the file without its kernels.
        elements: All weights of rank >= 2.
        sizes: For every kernel the weights of each of its groups.
    """

    def __init__(
        self,
        limit: float,
        fixed: float,
        costs: Sequence[KernelCosts],
        elements: int,
        sizes: Sequence[np.ndarray],
        name: str,
    ):
        self.limit, self.slack, self.name = limit, 0.5, name
        self.fixed = fixed
        self.costs = list(costs)
        # No kernel can give its last group.
        possible = float(self._capacity(sizes, 0.0).sum()) / elements
        implied = self._implied_sparsity(elements, sizes)
        super().__init__(min(implied, possible), elements, sizes)
        start = [KernelState(0, int(total), False, False) for total in self.totals]
        if self.least(start) > limit:
            self.capacity = self._capacity(sizes, 0.0)
        least = self.least(start)
        if least > limit:
            raise TargetError(
                f"{name} cannot be reached: with every kernel pruned to its last group and stored "
                f"as integers, the file would have about {math.ceil(least):,} bytes. Expected at "
                "least that many."
            )

    def limited(self, limit: float, name: str | None = None) -> SizeBudget:
        """The same costs under another limit, with nothing pruned yet."""
        name = self.name if name is None else name
        return SizeBudget(limit, self.fixed, self.costs, self.elements, self._sizes, name)

    @property
    def smallest(self) -> float:
        """The smallest file, in bytes: every kernel pruned to its last group, as integers."""
        lives = self.totals - self._capacity(self._sizes, 0.0)
        pairs = zip(self.costs, lives, strict=True)
        return self.fixed + sum(costs.least(float(live), True) for costs, live in pairs)

    def _implied_sparsity(self, elements: int, sizes: Sequence[np.ndarray]) -> float:
        """The least sparsity that meets the size if all kernels are integers of one density."""
        totals = np.array([int(size.sum()) for size in sizes], np.int64)
        for density in np.linspace(1.0, 0.0, _DENSITIES_TRIED, endpoint=False):
            lives = np.maximum(density * totals, 1)
            size = self.fixed + sum(
                costs.least(live, True) for costs, live in zip(self.costs, lives, strict=True)
            )
            if size <= self.limit:
                return float((1.0 - density) * totals.sum() / elements)
        return 1.0

    def least(self, states: Sequence[KernelState]) -> float:
        """The smallest file that the undecided groups leave within reach, in bytes."""
        return self._completed(states, prune=True)

    def expected(self, states: Sequence[KernelState]) -> float:
        """The file if nothing more is pruned and all that can be is stored as integers."""
        return self._completed(states, prune=False)

    def _completed(self, states: Sequence[KernelState], prune: bool) -> float:
        total = self.fixed
        for index, state in enumerate(states):
            room = max(0, int(self.capacity[index]) - state.pruned) if prune else 0
            stays = state.undecided - min(state.undecided, room)
            live = int(self.totals[index]) - state.pruned - state.undecided + stays
            if stays and not state.kept:
                total += self.costs[index].least(live, True)
            else:  # what lives has been decided, and with it the type
                total += self.costs[index].cost(live, state.quantized and not state.kept)
        return total

    def total(
        self, pruned: Sequence[float] | np.ndarray, integers: Sequence[bool] | np.ndarray
    ) -> float:
        """Bytes of the file."""
        triples = zip(self.costs, self.totals - np.asarray(pruned), integers, strict=True)
        return self.fixed + sum(costs.cost(float(live), whole) for costs, live, whole in triples)

    def integers_pay(self, index: int, live: float) -> bool:
        """Whether it is no larger: the scales of many outputs can cost more than integers save."""
        return self.costs[index].cost(live, True) <= self.costs[index].cost(live, False)

    def stored_share(self, states: Sequence[KernelState]) -> float:
        """What the kernels cost as they are, over what they cost in the dense float32 network."""
        dense = sum(
            costs.cost(float(total), False)
            for costs, total in zip(self.costs, self.totals, strict=True)
        )
        return self.kernel_bytes(states) / dense

    def kernel_bytes(self, states: Sequence[KernelState]) -> float:
        """What the kernels cost as they are, undecided groups at full precision."""
        pruned = [state.pruned for state in states]
        return self.total(pruned, [state.integers for state in states]) - self.fixed


_DENSITIES = (0.0, 0.005, 0.01, 0.02, 0.035, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.45, 0.6, 0.8, 1.0)
# What the size model may be off by: the raw size within 1 %; the gzipped one changes with the
# weights while they are trained.
MARGINS = {"tflite_bytes": 0.01, "gzip_bytes": 0.03}
"""Room left for what the model of the size does not know, by kind of target."""


def formats_for(target: Target) -> str:
    """The formats that files for a target may use (see `export_tflite`)."""
    raw = target.kind in ("tflite_bytes", "max_accuracy_drop")
    return "raw" if raw else "gzip" if target.kind == "gzip_bytes" else "dense"


def limit_of(target: Target) -> float:
    """Bytes that a file may have by the size model for a target in bytes."""
    return target.value * (1.0 - MARGINS[target.kind])


def bytes_for(model: keras.Model, target: Target) -> KernelBytes:
    """The bytes that a target counts, by a size model of the dense model."""
    sizes = SizeModel(model, formats_for(target), compressed=target.gzip_bytes is not None)
    return KernelBytes(sizes, target.kind)


def make_budget(
    model: keras.Model,
    kernels: list[Kernel],
    target: Target,
    storage: Storage,
    sizes: KernelBytes | None = None,
) -> Budget:
    """The budget of a target: in weights for a sparsity, else in bytes; see [size_budget][].

    A target that cannot be reached, or that is one for whole channels, raises a TargetError.
    """
    if target.needs_channels:
        raise TargetError(
            f"Target({target.kind}={target.value}) cannot be met by zeros among groups of "
            f"{storage.group!r}. Expected decisions on whole channels: pass group='channel'."
        )
    _, elements = count_weights(model)
    if target.sparsity is not None:
        weights = [storage.grouping(kernel).sizes for kernel in kernels]
        return Budget(target.sparsity, elements, weights)
    return size_budget(model, kernels, target, storage, elements, sizes)


def size_budget(
    model: keras.Model,
    kernels: Sequence[Kernel],
    target: Target,
    storage: Storage,
    elements: int,
    sizes: KernelBytes | None = None,
) -> SizeBudget:
    """The budget of a target in bytes.

    `model` is the dense one, `elements` are all its weights of rank >= 2, and `sizes` its bytes,
    found out if they are not given. A size that cannot be reached raises a TargetError, a model
    that cannot be converted an ExportError.
    """
    sizes = sizes or bytes_for(model, target)
    costs = [kernel_costs(sizes, kernel, storage.of(kernel.path)) for kernel in kernels]
    values = {kernel.path: kernel.value() for kernel in kernels}
    fixed = sizes.file(values, {}) - sum(sizes.kernel(*one) for one in values.items())
    return SizeBudget(
        limit_of(target),
        fixed,
        costs,
        elements,
        [storage.grouping(kernel).sizes for kernel in kernels],
        f"Target({target.kind}={target.value:,.0f})".replace(",", "_"),
    )


def kernel_costs(sizes: KernelBytes, kernel: Kernel, storage: KernelStorage) -> KernelCosts:
    """What a kernel costs at several densities, by its own weights."""
    matrix, grouping = kernel.matrix(), kernel.grouping(storage.group)
    lives: list[int] = []
    floats: list[float] = []
    integers: list[float] = []
    for density in _DENSITIES:
        alive = grouping.expand_numpy(prune_by_magnitude(matrix, grouping, 1.0 - density))
        pruned = kernel.spec.from_matrix_numpy(np.where(alive, matrix, 0.0), kernel.shape)
        pruned = pruned.astype(np.float32)
        live = int(alive.sum())
        if lives and live <= lives[-1]:
            continue
        lives.append(live)
        floats.append(sizes.kernel(kernel.path, pruned))
        if kernel.spec.exports_int8:
            integers.append(sizes.kernel(kernel.path, pruned, storage.bits))
    return KernelCosts(
        np.array(lives, np.float64),
        np.maximum.accumulate(np.array(floats)),
        np.maximum.accumulate(np.array(integers)) if integers else None,
    )


def predicted_bytes(budget: Budget, states: Sequence[KernelState]) -> int | None:
    """Bytes of the file that a whole plan leads to; None where the budget is of something else."""
    if not isinstance(budget, SizeBudget):
        return None
    pruned, integers = [one.pruned for one in states], [one.integers for one in states]
    return round(budget.total(pruned, integers))
