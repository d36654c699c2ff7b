r"""The numbers of channels of least error under a budget.

For kernels that are decided one by one a knapsack answers this
([dynamic_programming][rl_sparsity_tf.allocation.dynamic_programming]). What a layer with fewer
channels costs depends on the channels of the layer before it as well, so here \(\sum_u e_u^p +
\lambda\,cost\) is brought down unit by unit until no unit moves, and \(\lambda\) is found by
bisection.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from rl_sparsity_tf.allocation.channel_budget import ChannelBudget
from rl_sparsity_tf.allocation.channel_decisions import ChannelDecisions
from rl_sparsity_tf.allocation.problem import Problem
from rl_sparsity_tf.channels.units import ChannelUnit
from rl_sparsity_tf.layers.operations import Operation
from rl_sparsity_tf.layers.plan import CompressionPlan

_SWEEPS = 20
_BISECTIONS = 40
_LEVELS = 64
# Beyond this the outputs of a layer have nothing left of what they were.
_LARGEST_ERROR = 4.0


@dataclasses.dataclass(frozen=True, eq=False)
class ChannelProblem:
    """Numbers of channels, what they lose and what they cost.

    Attributes:
        losses: For every unit, with 0, 1, ... channels gone: what is lost.
        orders: For every unit, the channels in the order in which they go.
    """

    budget: ChannelBudget
    units: Sequence[ChannelUnit]
    losses: Sequence[np.ndarray]
    orders: Sequence[np.ndarray]

    @classmethod
    def of(cls, network: Problem, power: float = 1.0) -> ChannelProblem:
        """The problem of a network whose channels are decided."""
        budget, units = network.budget, network.kernels
        decisions = network.decisions
        assert isinstance(budget, ChannelBudget)
        assert isinstance(decisions, ChannelDecisions)
        losses, orders = [], []
        for unit in units:
            assert isinstance(unit, ChannelUnit)
            errors = decisions.errors(unit, network.least_squares)
            losses.append(np.minimum(errors.errors, _LARGEST_ERROR) ** power)
            orders.append(errors.order)
        return cls(budget, units, losses, orders)  # type: ignore[arg-type]

    @functools.cached_property
    def most(self) -> np.ndarray:
        """Channels that every unit can give at most."""
        return np.where(self.budget.able, self._counts - 1, 0)

    @functools.cached_property
    def _counts(self) -> np.ndarray:
        return np.array([unit.count for unit in self.units])

    @functools.cached_property
    def _integers(self) -> np.ndarray:
        return np.array([unit.spec.exports_int8 for unit in self.units])

    def costs(self, gone: np.ndarray) -> np.ndarray:
        """The cost with so many channels gone, shape `(..., units)` -> `(...)`."""
        return self.budget.cost.total(1.0 - gone / self._counts, self._integers)

    def loss(self, gone: np.ndarray) -> float:
        """What is lost in all."""
        return float(sum(loss[count] for loss, count in zip(self.losses, gone, strict=True)))

    # ------------------------------------------------------------------ solving

    def solve(self, limit: float, least: np.ndarray | None = None) -> np.ndarray:
        """The numbers of channels to remove, one per unit, of least loss within a limit.

        Of every unit at least `least` channels are gone. If nothing less is within the limit, all
        that can go does.
        """
        low, high = 0.0, 1.0
        least = np.zeros(len(self.units), np.int64) if least is None else least
        best = self.most
        while high < 1e12 and self.costs(self._descend(high, least)) > limit:
            low, high = high, high * 8.0
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            gone = self._descend(middle, least)
            if self.costs(gone) <= limit:
                high, best = middle, min(best, gone, key=self.loss)
            else:
                low = middle
            if high - low < 1e-4 * high:
                break
        return self.restore(best, limit, least)

    def _descend(self, price: float, least: np.ndarray) -> np.ndarray:
        """Lowers loss + price * cost, cost being a share of the dense network's."""
        gone = least.copy()
        for _ in range(_SWEEPS):
            before = gone.copy()
            for index in np.flatnonzero(self.budget.able):
                levels = self._levels(index, int(least[index]))
                tried = np.repeat(gone[None], len(levels), axis=0)
                tried[:, index] = levels
                value = self.losses[index][levels] + price * self.costs(tried) / self.budget.whole
                gone[index] = levels[int(np.argmin(value))]
            if (gone == before).all():
                break
        return gone

    def _levels(self, index: int, least: int) -> np.ndarray:
        most = max(int(self.most[index]), least)
        count = min(most - least + 1, _LEVELS)
        return np.unique(np.rint(np.linspace(least, most, count)).astype(np.int64))

    def restore(self, gone: np.ndarray, limit: float, least: np.ndarray) -> np.ndarray:
        """Brings channels back one by one, those that spare most for their cost, within a limit.

        Of those that are `gone`, as many as `least` says do not come back.
        """
        gone = gone.copy()
        while True:
            candidates = np.flatnonzero(gone > least)
            tried = np.repeat(gone[None], len(candidates), axis=0)
            tried[np.arange(len(candidates)), candidates] -= 1
            costs = self.costs(tried) if len(candidates) else np.zeros(0)
            fits = costs <= limit
            if not fits.any():
                return gone
            spared = np.array(
                [self.losses[i][gone[i]] - self.losses[i][gone[i] - 1] for i in candidates]
            )
            paid = np.maximum(costs - self.costs(gone), 1e-9 * self.budget.whole)
            gone = tried[int(np.argmax(np.where(fits, spared / paid, -np.inf)))]

    def live(self, gone: np.ndarray) -> list[np.ndarray]:
        """What lives with so many channels gone, one mask of shape `(1, channels)` per unit."""
        masks = []
        for order, count in zip(self.orders, gone, strict=True):
            mask = np.ones((1, len(order)), bool)
            mask[0, order[:count]] = False
            masks.append(mask)
        return masks


def propose_channels(network: Problem, powers: Sequence[float]) -> list[CompressionPlan]:
    """Plans of least error for a network whose channels are decided, one for every power.

    The powers are those of the units' errors that are summed; the network's state stays as it is.
    """
    plans = []
    for power in powers:
        problem = ChannelProblem.of(network, power)
        live = problem.live(problem.solve(problem.budget.limit))
        plans.append(plan_of_live(network, live))
    return plans


def pruned_to(network: Problem, plan: CompressionPlan, limit: float) -> CompressionPlan:
    """A plan of a network's units with more channels pruned, down to a cost.

    Channels that the plan prunes stay pruned; of the others those go that lose least.
    """
    problem = ChannelProblem.of(network)
    dead = [plan.kernels[unit.path].operations[0] == Operation.PRUNE for unit in problem.units]
    orders = [
        np.concatenate([order[gone[order]], order[~gone[order]]])
        for order, gone in zip(problem.orders, dead, strict=True)
    ]
    problem = dataclasses.replace(problem, orders=orders)
    # Costs may fall in steps, so that it is solved anew and not channel by channel.
    gone = problem.solve(limit, np.array([int(one.sum()) for one in dead]))
    return plan_of_live(network, problem.live(gone))


def cost_of_plan(network: Problem, plan: CompressionPlan) -> float:
    """What a plan of a network's units costs by its budget, as integers where that works."""
    problem = ChannelProblem.of(network)
    entries = [plan.kernels[unit.path].operations for unit in problem.units]
    return float(problem.costs(np.array([(one == Operation.PRUNE).sum() for one in entries])))


def plan_of_live(network: Problem, live: Sequence[np.ndarray]) -> CompressionPlan:
    """The plan in which some channels live, as integers where that works."""
    return network.storage.plan_from_live(network.kernels, live)
