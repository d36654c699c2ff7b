"""A plan of a network pruned further, until a tighter budget is met."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from rl_sparsity_tf.allocation import ranking as ranks
from rl_sparsity_tf.allocation.budgets import CostBudget, KernelState
from rl_sparsity_tf.allocation.channel_budget import ChannelBudget
from rl_sparsity_tf.allocation.channel_programming import cost_of_plan, pruned_to
from rl_sparsity_tf.allocation.density_plans import PlanSpace, shares
from rl_sparsity_tf.allocation.knapsack import fill
from rl_sparsity_tf.allocation.layer_errors import FLOAT
from rl_sparsity_tf.environment.network import CompressedNetwork
from rl_sparsity_tf.layers.operations import Operation
from rl_sparsity_tf.layers.plan import CompressionPlan

Operations = Callable[[Sequence[np.ndarray]], list[np.ndarray]]
"""What is done to every group of every kernel, by what lives."""


def pruned_to_budget(network: CompressedNetwork, plan: CompressionPlan) -> CompressionPlan | None:
    """Prunes a plan further until it meets a network's budget.

    What the plan prunes stays pruned. Every kernel gives up its least salient groups, so that
    their densities keep their proportions; of channels those go that lose least. What lives keeps
    its operation; where a limit of bytes lets more live with every kernel stored as floats or as
    integers, whichever is cheaper, it is stored so.

    Args:
        network: The network; its state stays as it is.
        plan: A complete plan for it.

    Returns:
        The plan, or None if a limit of bytes cannot be met by pruning it further.

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
    sizes = [network.groupings[kernel.path].sizes for kernel in network.kernels]
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

        live, reached = fill(ranking, fits, pruned)
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
    """What a complete plan costs."""
    states = [
        KernelState.of(size, np.ones(size.shape, bool), chosen)
        for size, chosen in zip(sizes, operations, strict=True)
    ]
    return budget.expected(states)


def _channels(
    network: CompressedNetwork, budget: ChannelBudget, plan: CompressionPlan
) -> CompressionPlan | None:
    found = pruned_to(network, plan, budget.limit)
    return found if cost_of_plan(network, found) <= budget.limit + budget.slack else None
