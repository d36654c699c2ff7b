"""A budget of bytes: what a network costs in the file, and what it can still be brought to."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from rl_sparsity_tf.allocation.budgets import CostBudget, KernelState
from rl_sparsity_tf.errors import TargetError

# The implied sparsity is looked for among this many densities.
_DENSITIES = 512


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
    nothing more is pruned once the file is small enough with all that lives as integers. Floors
    are those of the sparsity that the size implies when every kernel has the same density.

    Args:
        limit: Bytes that the file may have by the size model.
        fixed: Bytes of the file without its kernels.
        costs: What every kernel costs.
        elements: All weights of rank >= 2.
        sizes: For every kernel the weights of each of its groups.
        name: The target as the user gave it, for errors.

    Raises:
        TargetError: If the size cannot be reached, naming the smallest that can.
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
        self.totals: np.ndarray = np.array([int(size.sum()) for size in sizes], np.int64)
        # No kernel can give its last group.
        possible = float(self._capacity(sizes, 0.0).sum()) / elements
        super().__init__(min(self._implied_sparsity(elements), possible), elements, sizes)
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

    def _implied_sparsity(self, elements: int) -> float:
        """The least sparsity that meets the size if all kernels are integers of one density."""
        for density in np.linspace(1.0, 0.0, _DENSITIES, endpoint=False):
            lives = np.maximum(density * self.totals, 1)
            size = self.fixed + sum(
                costs.least(live, True) for costs, live in zip(self.costs, lives, strict=True)
            )
            if size <= self.limit:
                return float((1.0 - density) * self.totals.sum() / elements)
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
        integers = [s.quantized and not s.kept and s.undecided == 0 for s in states]
        return self.total(pruned, integers) - self.fixed
