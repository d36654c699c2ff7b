"""Counts what is pruned against the target, and keeps the target in reach."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from rl_sparsity_tf.errors import TargetError

# A kernel's floor, as a share of the density that the target leaves on average.
_FLOOR_SHARE = 0.1


class Budget:
    """Counts what has been pruned against the target, and says what is still allowed.

    The wall: what lives is legal only if the kernels still to come can meet the
    target; and once it is met nothing more is pruned. What a kernel can give ends at its floor:
    a tenth of the density that the target leaves on average, at least one group. Without it,
    weights kept in early kernels could be paid for by all but emptying a later one, which nothing
    recovers from. Where that floor would put the target out of reach, it is one group.

    Args:
        goal: Sparsity to reach, at least 0 and below 1.
        elements: All weights of rank >= 2, those in skipped layers included.
        sizes: For every kernel the weights of each of its groups.

    Raises:
        TargetError: If the target cannot be reached, naming the best that can.
    """

    def __init__(self, goal: float, elements: int, sizes: Sequence[np.ndarray]):
        self.goal = goal
        self.elements = elements
        self._sizes = list(sizes)
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

        Args:
            share: Share of the way, above 0 and at most 1. A sparsity is that share of the goal;
                the limit of a cost lies so far from what the cheapest unpruned network costs.
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
