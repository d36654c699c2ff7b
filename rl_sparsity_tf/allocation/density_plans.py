"""Plans of a network by the densities of its kernels, scaled to a target or pruned further."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from rl_sparsity_tf.allocation import ranking as ranks
from rl_sparsity_tf.allocation.budgets import CostBudget, KernelState
from rl_sparsity_tf.allocation.channel_budget import ChannelBudget
from rl_sparsity_tf.allocation.channel_programming import cost_of_plan, pruned_to
from rl_sparsity_tf.allocation.layer_errors import FLOAT
from rl_sparsity_tf.allocation.problem import Problem, cost_of, meet, sizes_of
from rl_sparsity_tf.errors import TargetError
from rl_sparsity_tf.layers.operations import Operation
from rl_sparsity_tf.layers.plan import CompressionPlan

# Densities of a random plan are up to this factor above or below the others' middle.
_SPREAD = 8.0
# Largest factor of a step from one plan to another.
_STEP = 2.0


class PlanSpace:
    """Turns densities into plans of a network that meet its target, and changes nothing of it.

    Within a kernel the least salient groups go first. With `quantize`, what lives is stored as
    integers where that works. `totals` are the weights of every kernel.
    """

    def __init__(self, network: Problem, quantize: bool):
        self._network = network
        kernels = network.kernels
        self._sizes = sizes_of(network)
        self.totals = np.array([float(size.sum()) for size in self._sizes])
        self._saliency = [
            # Of the trained weights: those of the moment may have recovered from another plan.
            network.decisions.saliency(
                kernel.path,
                network.originals[kernel.path],
                network.groupings[kernel.path],
                network.least_squares,
                1.0 - network.budget.pruned_share,
            ).reshape(network.groupings[kernel.path].shape)
            for kernel in kernels
        ]
        self._integers = [
            ranks.survivors(kernel, quantize) == Operation.QUANTIZE for kernel in kernels
        ]
        self._pruned = network.budget.wanted

    def prefer(
        self, live: Sequence[np.ndarray], saliency: Mapping[str, np.ndarray] | None = None
    ) -> None:
        """Ranks some groups above the others; within both, saliency decides.

        Of the kernels of some paths it can be given, with the shape of their groups.
        """
        for index, (kernel, alive) in enumerate(zip(self._network.kernels, live, strict=True)):
            mine = (saliency or {}).get(kernel.path, self._saliency[index])
            order = np.argsort(mine, axis=None, kind="stable")
            rank = np.empty(order.size)
            rank[order] = np.arange(order.size)
            self._saliency[index] = rank.reshape(alive.shape) + alive * order.size

    def look_near(self, live: Sequence[np.ndarray]) -> None:
        """Looks for the next plan around the number of weights that live in this one."""
        self._pruned = _pruned(self._sizes, live)

    def scores(self, ratios: np.ndarray) -> list[np.ndarray]:
        """Scores that give the kernels densities in proportion to ratios."""
        return [
            ranks.density_scores(saliency, size, float(ratio))
            for saliency, size, ratio in zip(self._saliency, self._sizes, ratios, strict=True)
        ]

    def live(self, scores: Sequence[np.ndarray]) -> list[np.ndarray]:
        """What lives when the target is just met.

        A budget of bytes that cannot be met without integers raises a TargetError.
        """
        budget = self._network.budget
        live, reached = meet(self._network, scores, self.bits, self._pruned)
        if isinstance(budget, CostBudget) and not reached:
            size = cost_of(self._network, live, self.bits(live))
            raise TargetError(
                f"The file would have about {size:,.0f} bytes with every kernel pruned to its "
                f"last group and stored as asked for; {budget.limit:,.0f} are left of the target "
                "after the size model's margin. Expected a larger target, or quantize=True."
            )
        self._pruned = _pruned(self._sizes, live)
        return live

    def bits(self, live: Sequence[np.ndarray]) -> dict[str, int]:
        """How the kernels are stored: as integers where that is wanted, possible, and no larger.

        The scales of a kernel with many outputs can cost more than a few integers save.
        """
        found = {}
        for index, (kernel, alive) in enumerate(zip(self._network.kernels, live, strict=True)):
            integers = self._integers[index]
            budget = self._network.budget
            if integers:
                integers = budget.integers_pay(index, float(self._sizes[index][alive].sum()))
            stored = self._network.storage.of(kernel.path).bits
            found[kernel.path] = stored if integers else FLOAT
        return found

    def plan_of(self, live: Sequence[np.ndarray]) -> CompressionPlan:
        """The plan in which some groups live."""
        return self._network.storage.plan_at(self._network.kernels, live, self.bits(live))

    def plan(self, ratios: np.ndarray) -> CompressionPlan:
        """The plan of densities in proportion to ratios."""
        return self.plan_of(self.live(self.scores(ratios)))

    def lamp_scores(self) -> list[np.ndarray]:
        """The scores of LAMP, by which a kernel's groups have the same order as by magnitude."""
        network = self._network
        return ranks.scores("lamp", network.kernels, network.groupings, network.originals)

    def step(self, densities: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Makes one kernel denser by a random factor, and takes the weights from another."""
        taker, giver = rng.choice(len(densities), 2, replace=False)
        factor = float(np.exp(rng.uniform(0.0, np.log(_STEP))))
        wanted = densities[taker] * self.totals[taker] * (factor - 1.0)
        room = (1.0 - densities[taker]) * self.totals[taker]
        # The giver keeps at least its share of the same factor.
        given = densities[giver] * self.totals[giver] * (1.0 - 1.0 / _STEP)
        amount = min(wanted, room, given)
        moved = densities.copy()
        moved[taker] += amount / self.totals[taker]
        moved[giver] -= amount / self.totals[giver]
        return moved


def random_ratios(generator: np.random.Generator, count: int) -> np.ndarray:
    """Ratios of a random plan's densities, log-uniform within a factor of 8 around the middle."""
    half = np.log(_SPREAD)
    return np.exp(generator.uniform(-half, half, count))


def shares(live: Sequence[np.ndarray]) -> np.ndarray:
    """Share of the groups of every kernel that live."""
    return np.array(ranks.densities(live))


Operations = Callable[[Sequence[np.ndarray]], list[np.ndarray]]
"""What is done to every group of every kernel, by what lives."""


def pruned_to_budget(network: Problem, plan: CompressionPlan) -> CompressionPlan | None:
    """Prunes a complete plan further until it meets a network's budget.

    What the plan prunes stays pruned. Every kernel gives up its least salient groups, so that their
    densities keep their proportions; of channels those go that lose least. What lives keeps its
    operation; where a limit of bytes lets more live with every kernel stored as floats or as
    integers, whichever is cheaper, it is stored so. The result is None if the limit of a cost
    cannot be met by pruning further. The network's state stays as it is.

    Example:
        >>> network.retarget(network.budget.eased(0.75))
        >>> pruned_to_budget(network, best_at_half_the_way)
    """
    budget = network.budget
    if isinstance(budget, ChannelBudget):
        return _channels(network, budget, plan)
    before = [plan.kernels[kernel.path].operations for kernel in network.kernels]
    alive = [operations != Operation.PRUNE for operations in before]
    space = PlanSpace(network, quantize=True)
    space.prefer(alive)
    sizes = sizes_of(network)
    ranking = ranks.Ranking(space.scores(shares(alive)), sizes, network.decisions.removable)

    def as_planned(live: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [np.where(*one, Operation.PRUNE) for one in zip(live, before, strict=True)]

    def cheapest(live: Sequence[np.ndarray]) -> list[np.ndarray]:
        left = [one & was for one, was in zip(live, alive, strict=True)]
        stays = [
            Operation.KEEP if b == FLOAT else Operation.QUANTIZE for b in space.bits(left).values()
        ]
        return [np.where(*one, Operation.PRUNE) for one in zip(left, stays, strict=True)]

    pruned = _pruned(sizes, alive)
    if not isinstance(budget, CostBudget):
        chosen = as_planned(ranking.live(max(budget.wanted, pruned)))
        return network.storage.plan(network.kernels, chosen)
    found = []
    for operations_of in (as_planned, cheapest):

        def fits(live: list[np.ndarray], operations_of: Operations = operations_of) -> bool:
            enough = _pruned(sizes, live) >= pruned
            return enough and _cost(budget, sizes, operations_of(live)) <= budget.limit

        live, reached = ranking.least_pruned(fits, pruned)
        if reached:
            found.append((_pruned(sizes, live), operations_of(live)))
    if not found:
        return None
    _, chosen = min(found, key=lambda one: one[0])
    return network.storage.plan(network.kernels, chosen)


def _pruned(sizes: Sequence[np.ndarray], live: Sequence[np.ndarray]) -> int:
    return sum(int(size[~one].sum()) for size, one in zip(sizes, live, strict=True))


def _cost(
    budget: CostBudget, sizes: Sequence[np.ndarray], operations: Sequence[np.ndarray]
) -> float:
    """What a complete plan costs, by its operations on every group."""
    states = [
        KernelState.of(size, np.ones(size.shape, bool), chosen)
        for size, chosen in zip(sizes, operations, strict=True)
    ]
    return budget.expected(states)


def _channels(
    network: Problem, budget: ChannelBudget, plan: CompressionPlan
) -> CompressionPlan | None:
    found = pruned_to(network, plan, budget.limit)
    return found if cost_of_plan(network, found) <= budget.limit + budget.slack else None
