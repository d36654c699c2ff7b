"""Counts what is decided against the target, in weights or in a cost, and keeps it in reach."""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Sequence
from typing import Self

import numpy as np

from rl_sparsity_tf.errors import TargetError
from rl_sparsity_tf.layers.operations import Operation

# A kernel's floor, as a share of the density that the target leaves on average.
_FLOOR_SHARE = 0.1


@dataclasses.dataclass(frozen=True)
class KernelState:
    """How far a kernel is decided.

    `pruned` and `undecided` count weights; `kept` (at full precision) and `quantized` say whether
    some group is.
    """

    pruned: int
    undecided: int
    kept: bool
    quantized: bool

    @property
    def integers(self) -> bool:
        """Whether the kernel is stored as integers by now."""
        return self.quantized and not self.kept and self.undecided == 0

    @property
    def surviving(self) -> KernelState:
        """The state if nothing more is pruned, and all that can be is stored as integers."""
        integers = not self.kept and (self.quantized or self.undecided > 0)
        return dataclasses.replace(self, undecided=0, quantized=integers)

    @classmethod
    def of(cls, sizes: np.ndarray, decided: np.ndarray, operations: np.ndarray) -> KernelState:
        """Reads it from what was decided, one entry per group."""
        return cls(
            pruned=int(sizes[decided & (operations == Operation.PRUNE)].sum()),
            undecided=int(sizes[~decided].sum()),
            kept=bool((decided & (operations == Operation.KEEP)).any()),
            quantized=bool((decided & (operations == Operation.QUANTIZE)).any()),
        )


class Budget:
    """Counts what has been pruned against the target, and says what is still allowed.

    The wall: what lives is legal only if the kernels still to come can meet the target; and once it
    is met nothing more is pruned. What a kernel can give ends at its floor: a tenth of the density
    that the target leaves on average, at least one group. Without it, weights kept in early kernels
    could be paid for by all but emptying a later one, which nothing recovers from. Where that floor
    would put the target out of reach, it is one group. A target that is out of reach even so raises
    a TargetError that names the best that can be reached.

    Args:
        goal: Sparsity to reach, at least 0 and below 1.
        elements: All weights of rank >= 2, those in skipped layers included.
        sizes: For every kernel the weights of each of its groups.
    """

    def __init__(self, goal: float, elements: int, sizes: Sequence[np.ndarray]):
        self.goal = goal
        self.elements = elements
        self._sizes = list(sizes)
        self.totals = np.array([int(size.sum()) for size in sizes], np.int64)
        # Rounded first: 0.9 * 10 is 9.000000000000002 in some orders of operations.
        self.wanted = math.ceil(round(goal * elements, 6))
        density = (1.0 - goal) * _FLOOR_SHARE
        self.capacity = self._capacity(sizes, density)
        if int(self.capacity.sum()) < self.wanted:
            self.capacity = self._capacity(sizes, 0.0)
        self.pruned = np.zeros(len(sizes), np.int64)
        reachable = int(self.capacity.sum())
        if reachable < self.wanted:
            best = math.floor(reachable / max(elements, 1) * 1e4) / 1e4
            raise TargetError(
                f"A sparsity of {goal} needs {self.wanted} of {elements} weights "
                f"pruned, but only {reachable} can be: the other weights are in layers that cannot "
                "be compressed, or are the one group that every kernel keeps. Expected a sparsity "
                f"of at most {best}."
            )

    @staticmethod
    def _capacity(sizes: Sequence[np.ndarray], density: float) -> np.ndarray:
        return np.array(
            [int(s.sum() - max(s.max(), math.ceil(round(density * s.sum(), 6)))) for s in sizes],
            np.int64,
        )

    def eased(self, share: float) -> Budget:
        """The budget of a part of the way to this one, with nothing pruned yet.

        `share` is above 0 and at most 1. A sparsity is that share of the goal; the limit of a cost
        lies so far from what the cheapest unpruned network costs.
        """
        return Budget(share * self.goal, self.elements, self._sizes)

    def reset(self) -> None:
        """Forgets what has been pruned."""
        self.pruned[:] = 0

    @property
    def missing(self) -> int:
        """Weights that must still be pruned."""
        return max(0, self.wanted - int(self.pruned.sum()))

    @property
    def progress(self) -> float:
        """Share of the target that is met, in [0, 1]."""
        return min(1.0, float(self.pruned.sum()) / self.wanted) if self.wanted else 1.0

    @property
    def sparsity(self) -> float:
        """Share of all weights that are pruned."""
        return float(self.pruned.sum()) / self.elements

    @property
    def pruned_share(self) -> float:
        """Share of every kernel's groups that go if all are pruned alike."""
        return self.goal

    def room(self, later: Sequence[int]) -> int:
        """Weights that the given kernels can still give."""
        rest = self.capacity[list(later)] - self.pruned[list(later)]
        return int(np.maximum(rest, 0).sum())

    def saved(self, states: Sequence[KernelState]) -> float | None:
        """Share of what was to be saved that is; None where the sparsity says it all."""
        return None

    def stored_share(self, states: Sequence[KernelState]) -> float:
        """What the kernels take to store, over what they take in the dense float32 network."""
        shares = np.where([state.integers for state in states], 0.25, 1.0)
        return float((self.totals * shares).sum() / self.totals.sum())

    def integers_pay(self, index: int, live: float) -> bool:
        """Whether a kernel with so many living weights costs no more as integers."""
        return True


class CostBudget(Budget, abc.ABC):
    """A budget that is met when a cost is within its limit.

    A decision is legal only if the cost can still be brought to the limit; and nothing more is
    pruned once it is within it with all that lives stored as cheaply as can be.

    Attributes:
        slack: What a cost may be above the limit by the rounding of sums.
        name: The target as the user gave it, for errors.
    """

    limit: float
    slack: float
    name: str

    @abc.abstractmethod
    def limited(self, limit: float, name: str | None = None) -> Self:
        """The same costs under another limit, with nothing pruned yet.

        `name` is what errors call the target, by default as here. A limit that cannot be reached
        raises a TargetError.
        """

    @property
    @abc.abstractmethod
    def smallest(self) -> float:
        """The least that the network can be brought to, no floors being held."""

    @property
    def unpruned(self) -> float:
        """What the network costs with nothing pruned, everything stored as cheaply as can be."""
        return self.expected([KernelState(0, int(total), False, False) for total in self.totals])

    def eased(self, share: float) -> CostBudget:
        """The budget of a part of the way to this one, with nothing pruned yet."""
        start = self.unpruned
        # A limit that integers alone meet is no way at all.
        return self.limited(max(self.limit, start + share * (self.limit - start)))

    @abc.abstractmethod
    def least(self, states: Sequence[KernelState]) -> float:
        """The least cost that the undecided groups leave within reach."""

    @abc.abstractmethod
    def expected(self, states: Sequence[KernelState]) -> float:
        """The cost if nothing more is pruned and all that can be is stored as integers."""

    @abc.abstractmethod
    def total(
        self, pruned: Sequence[float] | np.ndarray, integers: Sequence[bool] | np.ndarray
    ) -> float:
        """The cost of a whole plan.

        For every kernel, `pruned` counts weights and `integers` says whether it is stored so.
        """

    def saved(self, states: Sequence[KernelState]) -> float:
        """Share of what was to be saved that is: 1 once the cost is within its limit."""
        integers = [state.integers for state in states]
        start = self.total(np.zeros(len(states)), np.zeros(len(states), bool))
        now = self.total([state.pruned for state in states], integers)
        wanted = start - self.limit
        return float(np.clip((start - now) / wanted, 0.0, 1.0)) if wanted > 0 else 1.0
