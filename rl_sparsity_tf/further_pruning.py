"""A plan of a network pruned further, until a tighter budget is met."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rl_sparsity_tf import allocation
from rl_sparsity_tf.channel_budget import ChannelBudget
from rl_sparsity_tf.channel_programming import cost_of_plan, pruned_to
from rl_sparsity_tf.cost_budget import CostBudget, KernelState
from rl_sparsity_tf.knapsack import fill
from rl_sparsity_tf.network import CompressedNetwork
from rl_sparsity_tf.operations import Operation
from rl_sparsity_tf.plan import CompressionPlan
from rl_sparsity_tf.plan_space import PlanSpace, shares


def pruned_to_budget(network: CompressedNetwork, plan: CompressionPlan) -> CompressionPlan | None:
    """Prunes a plan further until it meets a network's budget.

    What the plan prunes stays pruned. Every kernel gives up its least salient groups, so that
    their densities keep their proportions; of channels those go that lose least. What lives keeps
    its operation; where a limit of bytes cannot be met so, all of it is stored as integers.

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
    ranking = allocation.Ranking(space.scores(shares(alive)), sizes, network.decisions.removable)
    pruned = _pruned(sizes, alive)
    integers = [
        np.where(live, allocation.survivors(kernel, True), Operation.PRUNE)
        for kernel, live in zip(network.kernels, alive, strict=True)
    ]
    for stored in (before, integers):
        if isinstance(budget, CostBudget):
            live, reached = _within(network, budget, ranking, stored, pruned)
        else:
            live, reached = ranking.live(max(budget.wanted, pruned)), True
        if reached:
            chosen = [
                np.where(left, operations, Operation.PRUNE)
                for left, operations in zip(live, stored, strict=True)
            ]
            return allocation.plan_of_operations(network.kernels, network.group, chosen)
    return None


def _pruned(sizes: Sequence[np.ndarray], live: Sequence[np.ndarray]) -> int:
    return sum(int(size[~one].sum()) for size, one in zip(sizes, live, strict=True))


def _within(
    network: CompressedNetwork,
    budget: CostBudget,
    ranking: allocation.Ranking,
    stored: Sequence[np.ndarray],
    least: int,
) -> tuple[list[np.ndarray], bool]:
    """What lives when the cost is just within its limit, and whether it is."""
    sizes = [network.groupings[kernel.path].sizes for kernel in network.kernels]

    def fits(live: list[np.ndarray]) -> bool:
        if _pruned(sizes, live) < least:
            return False
        decided = [
            np.where(left, operations, Operation.PRUNE)
            for left, operations in zip(live, stored, strict=True)
        ]
        everything = [np.ones(size.shape, bool) for size in sizes]
        states = [KernelState.of(*one) for one in zip(sizes, everything, decided, strict=True)]
        return budget.expected(states) <= budget.limit

    return fill(ranking, fits, least)


def _channels(
    network: CompressedNetwork, budget: ChannelBudget, plan: CompressionPlan
) -> CompressionPlan | None:
    found = pruned_to(network, plan, budget.limit)
    return found if cost_of_plan(network, found) <= budget.limit + budget.slack else None
