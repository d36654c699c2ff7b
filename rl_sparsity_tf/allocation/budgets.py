"""Budgets of a cost that depends on what is decided: bytes, multiplications, milliseconds."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence
from typing import Self

import numpy as np

from rl_sparsity_tf.allocation.budget import Budget
from rl_sparsity_tf.layers.operations import Operation


@dataclasses.dataclass(frozen=True)
class KernelState:
    """How far a kernel is decided.

    Attributes:
        pruned: Weights pruned.
        undecided: Weights that nothing was decided for yet.
        kept: Whether some group is kept at full precision.
        quantized: Whether some group is quantized.
    """

    pruned: int
    undecided: int
    kept: bool
    quantized: bool

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


class CostBudget(Budget, abc.ABC):
    """A budget that is met when a cost is within its limit.

    A decision is legal only if the cost can still be brought to the limit; and nothing more is
    pruned once it is within it with all that lives stored as cheaply as can be.

    Attributes:
        limit: What the network may cost.
        slack: What a cost may be above it by the rounding of sums.
        name: The target as the user gave it, for errors.
    """

    limit: float
    slack: float
    name: str
    totals: np.ndarray

    @abc.abstractmethod
    def limited(self, limit: float, name: str | None = None) -> Self:
        """The same costs under another limit, with nothing pruned yet.

        Args:
            limit: What the network may cost.
            name: What errors call the target; by default as here.

        Raises:
            TargetError: If the limit cannot be reached.
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

        Args:
            pruned: Weights pruned in every kernel.
            integers: Whether it is stored as integers.
        """

    @abc.abstractmethod
    def stored_share(self, states: Sequence[KernelState]) -> float:
        """What the kernels take to store, over what they take in the dense float32 network."""

    def saved(self, states: Sequence[KernelState]) -> float:
        """Share of what was to be saved that is: 1 once the cost is within its limit."""
        integers = [s.quantized and not s.kept and s.undecided == 0 for s in states]
        start = self.total(np.zeros(len(states)), np.zeros(len(states), bool))
        now = self.total([state.pruned for state in states], integers)
        wanted = start - self.limit
        return float(np.clip((start - now) / wanted, 0.0, 1.0)) if wanted > 0 else 1.0

    def integers_pay(self, index: int, live: float) -> bool:
        """Whether a kernel with so many living weights costs no more as integers."""
        return True
