"""How much to take from a kernel: goals around what the rest of the budget, or a plan, asks for."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Sequence

import numpy as np

from rl_sparsity_tf.allocation.budgets import CostBudget, KernelState
from rl_sparsity_tf.environment.network import CompressedNetwork

FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
"""The goals' densities, as multiples of what the budget or a plan leaves; hardest first."""

NEAR = (0.5, 0.8, 1.0, 1.25, 2.0)
"""The same where a good plan is known, and others near it are wanted."""

# Levels that clip to the same goal: the one nearest to the average speaks for them.
_PREFERRED = sorted(range(len(FACTORS)), key=lambda level: abs(level - FACTORS.index(1.0)))
_SHARES = 256


@dataclasses.dataclass(frozen=True)
class Goals:
    """The goals that a kernel can be given.

    Attributes:
        amounts: Weights to prune at every level, int64 of shape `(len(FACTORS),)`.
        legal: 1 for every level that may be chosen, int32 of the same shape.
        size: Weights of the kernel.
    """

    amounts: np.ndarray
    legal: np.ndarray
    size: int

    def share(self, level: int) -> float:
        """The share of the kernel's weights to prune at a level."""
        return int(self.amounts[level]) / self.size


def mean_density(network: CompressedNetwork, undecided: Sequence[int]) -> float:
    """The share of the undecided kernels' weights that may live if all give the same share.

    Args:
        network: The network.
        undecided: Indices of the kernels that nothing was decided about.

    Returns:
        A number in [0, 1]; 0 as well where pruning alike cannot meet the target.
    """
    budget = network.budget
    total = sum(network.kernels[index].size for index in undecided)
    if not isinstance(budget, CostBudget):
        return 1.0 - min(1.0, budget.missing / max(total, 1))
    states = network.states()

    def met(step: int) -> bool:
        for index in undecided:
            wanted = round(step / _SHARES * network.kernels[index].size)
            states[index] = _opened(network, index, min(wanted, int(budget.capacity[index])))
        return budget.expected(states) <= budget.limit

    return 1.0 - bisect.bisect_left(range(_SHARES), True, key=met) / _SHARES


def density_of(
    network: CompressedNetwork,
    index: int,
    undecided: Sequence[int],
    mean: float,
    reference: np.ndarray,
) -> float:
    """A kernel's share of what may live if the undecided kernels keep a plan's proportions.

    Args:
        network: The network.
        index: The kernel.
        undecided: All undecided kernels, this one included.
        mean: What [mean_density][] says.
        reference: The plan's densities, one per kernel of the network, each above 0.

    Returns:
        A number in [0, 1]; the plan's own density as long as all decisions were the plan's.
    """
    sizes = np.array([float(network.kernels[one].size) for one in undecided])
    planned = float((sizes * reference[list(undecided)]).sum() / sizes.sum())
    return float(min(1.0, reference[index] * mean / planned))


def goals_of(
    network: CompressedNetwork,
    index: int,
    undecided: Sequence[int],
    density: float,
    factors: Sequence[float] = FACTORS,
) -> Goals:
    """The goals of one undecided kernel.

    A level's density is its factor times the one given, clipped to what the kernel can give and to
    what is still missing. Levels after which the others could not meet the target are illegal;
    so are all but one of those that clip to the same goal. If none is left, the one that comes
    closest to the target is legal.

    Args:
        network: The network.
        index: The kernel.
        undecided: All undecided kernels, this one included.
        density: What [mean_density][] says, or [density_of][].
        factors: As many as [FACTORS][].

    Example:
        >>> goals_of(network, 0, [0, 1], 0.1).amounts  # of 100 weights, 150 in both, 135 missing
        array([97, 95, 90, 80, 60])
    """
    budget, size = network.budget, network.kernels[index].size
    most = min(int(budget.capacity[index]), _needed(network, index))
    densities = np.minimum(1.0, np.array(factors) * density)
    amounts = np.clip(np.round((1.0 - densities) * size).astype(np.int64), 0, most)
    short = np.array([_short_of(network, index, undecided, int(a)) for a in amounts])
    legal = np.zeros(len(FACTORS), np.int32)
    for level in _PREFERRED:
        new = not (amounts[legal > 0] == amounts[level]).any()
        legal[level] = new and short[level] <= 0
    if not legal.any():
        legal[min(_PREFERRED, key=lambda level: short[level])] = 1
    return Goals(amounts, legal, size)


def pressure(network: CompressedNetwork, undecided: Sequence[int]) -> float:
    """Weights still to prune / those that the undecided kernels can still give."""
    missing, room = network.budget.missing, network.budget.room(undecided)
    return missing / room if room else float(missing > 0)


def _opened(network: CompressedNetwork, index: int, pruned: int) -> KernelState:
    """A kernel with so much pruned, the rest of which may still become integers."""
    return KernelState(pruned, network.kernels[index].size - pruned, False, False)


def _needed(network: CompressedNetwork, index: int) -> int:
    """Weights of a kernel after which nothing more has to go, or all that it can give."""
    budget = network.budget
    if not isinstance(budget, CostBudget):
        return budget.missing
    states, most = network.states(), int(budget.capacity[index])

    def met(pruned: int) -> bool:
        states[index] = _opened(network, index, pruned)
        return budget.expected(states) <= budget.limit

    return bisect.bisect_left(range(most), True, key=met)


def _short_of(
    network: CompressedNetwork, index: int, undecided: Sequence[int], amount: int
) -> float:
    """How far the target stays out of reach if so much goes of a kernel; 0 or less: it does not."""
    budget = network.budget
    if not isinstance(budget, CostBudget):
        return budget.missing - amount - budget.room([one for one in undecided if one != index])
    states, costs = network.states(), []
    for integers in (True, False):
        states[index] = KernelState(amount, 0, kept=not integers, quantized=integers)
        costs.append(budget.least(states))
    return min(costs) - budget.limit - budget.slack
