"""One entry of the layer database per kernel: least error in all, within a limit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from rl_sparsity_tf.allocation import ranking as ranks
from rl_sparsity_tf.allocation.layer_errors import KernelErrors

# Entries put between two measured densities, and units that a budget is counted in.
_BETWEEN = 4
_UNITS_PER_KERNEL, _LEAST_UNITS, _MOST_UNITS = 256, 4096, 16384
# What a layer's output loses in the knapsack at most, so that one hopeless kernel does not decide.
LARGEST_ERROR = 1.0
POWER = 0.5
"""The power of the layers' errors that is summed."""

Cost = Callable[[str, np.ndarray, int], np.ndarray]
"""`(path, numbers of living weights, bits) -> cost`, ascending in the numbers."""


def knapsack(
    errors: Sequence[np.ndarray], costs: Sequence[np.ndarray], limit: float, units: int = 4096
) -> list[int] | None:
    """Chooses one entry per kernel: least sum of errors, with the sum of costs within a limit.

    What the cheapest entries leave of the limit is cut into units, and costs are rounded up to
    whole ones: the limit is never passed. Whole numbers are counted one by one if the units
    suffice, which is exact.

    Args:
        errors: For every kernel the error of each of its entries.
        costs: Their costs, same shapes.
        limit: What all may cost.
        units: Units to count in at most.

    Returns:
        The index of every kernel's entry, or None if even the cheapest are too expensive.

    Example:
        >>> knapsack([np.array([3.0, 0.0]), np.array([2.0, 0.0])], [np.array([0, 1])] * 2, 1)
        [1, 0]
    """
    least = [float(np.min(cost)) for cost in costs]
    spare = limit - sum(least)
    if spare < -1e-9 * max(1.0, abs(limit)):
        return None
    spare = max(spare, 0.0)
    unit = spare / units
    if spare <= units and all(np.array_equal(cost, np.rint(cost)) for cost in costs):
        unit, units = 1.0, int(spare + 1e-9)
    best = np.zeros(units + 1)  # by units that may be spent on the kernels so far
    chosen = []
    for error, cost, base in zip(errors, costs, least, strict=True):
        steps = np.asarray(cost, np.float64) - base
        # A hair below a whole unit, so that rounding does not add one.
        needed = np.ceil(steps / unit - 1e-7) if unit > 0 else np.where(steps > 0, np.inf, 0.0)
        found = np.full(units + 1, np.inf)
        index = np.zeros(units + 1, np.int32)
        for entry in np.flatnonzero(needed <= units):
            start = int(needed[entry])
            total = best[: units + 1 - start] + error[entry]
            better = total < found[start:]
            found[start:][better] = total[better]
            index[start:][better] = entry
        best = found
        chosen.append((index, needed))
    left, entries = units, []
    for index, needed in reversed(chosen):
        entries.append(int(index[left]))
        left -= int(needed[entries[-1]])
    return entries[::-1]


@dataclasses.dataclass(frozen=True)
class Choice:
    """An entry of the database for every kernel.

    Attributes:
        live: Living weights by path.
        bits: 32, 8 or 4 by path.
    """

    live: Mapping[str, float]
    bits: Mapping[str, int]

    def pruned(self, sizes: Sequence[np.ndarray]) -> int:
        """Weights that go."""
        return int(sum(float(size.sum()) for size in sizes) - sum(self.live.values()))

    def scores(
        self, database: Mapping[str, KernelErrors], sizes: Sequence[np.ndarray]
    ) -> list[np.ndarray]:
        """Scores by which the kernels have these densities, or others in proportion to them."""
        return [
            ranks.density_scores(database[path].saliency, size, self.live[path] / float(size.sum()))
            for path, size in zip(self.live, sizes, strict=True)
        ]


def cheapest(
    database: Mapping[str, KernelErrors], cost: Cost, limit: float, power: float = POWER
) -> Choice | None:
    r"""The entries of least \(\sum_k e_k^p\) within a limit; None if none are.

    Roots by default, because it is the norms of errors that add up on the way through a network,
    at worst. They were measured to be the better measure, too: Fashion-MNIST, validation loss after
    recovery with \(p = 1/2\) and \(p = 1\); LeNet-300-100 at sparsities of 0.9, 0.97 and 0.99:
    0.364 and 0.367, 0.479 and 0.534, 0.761 and 0.767; LeNet-5 at 0.9 and 0.97: 0.475 and 0.486,
    0.773 and 0.809. A fourth is better in places (0.673 for the last), and worse in others (1.280
    at 0.99).

    Args:
        database: What every kernel loses.
        cost: What the entries cost.
        limit: What all may cost.
        power: The power p of the errors.
    """
    entries = {path: _entries(one) for path, one in database.items()}
    errors = [
        np.concatenate([database[path].error(live, b) for b in bits]).clip(0, LARGEST_ERROR)
        ** power
        for path, (live, bits) in entries.items()
    ]
    costs = [
        np.concatenate([cost(path, live, b) for b in bits])
        for path, (live, bits) in entries.items()
    ]
    units = int(np.clip(_UNITS_PER_KERNEL * len(entries), _LEAST_UNITS, _MOST_UNITS))
    found = knapsack(errors, costs, limit, units)
    if found is None:
        return None
    places = {
        path: (live[entry % len(live)], bits[entry // len(live)])
        for (path, (live, bits)), entry in zip(entries.items(), found, strict=True)
    }
    return Choice(
        {path: float(live) for path, (live, _) in places.items()},
        {path: int(b) for path, (_, b) in places.items()},
    )


def densest(database: Mapping[str, KernelErrors]) -> Choice:
    """Everything, at the fewest bits: where to begin if the knapsack finds nothing."""
    return Choice(
        {path: float(one.live[-1]) for path, one in database.items()},
        {path: min(one.errors) for path, one in database.items()},
    )


def _entries(errors: KernelErrors) -> tuple[np.ndarray, list[int]]:
    """Numbers of living weights, some between those measured, and the precisions."""
    logs = np.log(errors.live)
    places = np.arange(0, len(logs) - 1 + 1e-9, 1 / _BETWEEN)
    live = np.rint(np.exp(np.interp(places, np.arange(len(logs)), logs)))
    return np.unique(live), list(errors.errors)


def weights_cost(_: str, live: np.ndarray, __: int) -> np.ndarray:
    """The cost where weights are counted: their number."""
    return live


def fill(
    ranking: ranks.Ranking, fits: Callable[[list[np.ndarray]], bool], pruned: float
) -> tuple[list[np.ndarray], bool]:
    """Looks for the fewest pruned weights that something accepts, from a guess on.

    Args:
        ranking: What goes first.
        fits: Whether what lives is accepted; pruning more is taken to help.
        pruned: The guess.

    Returns:
        What lives, and whether it is accepted: if nothing is, all that can be is pruned. The
        number of living weights is right to a 512th.
    """
    guess = int(np.clip(pruned, 0, ranking.reachable))
    step = max(1, (ranking.elements - guess) // 64)
    live = ranking.live(guess)
    accepted = fits(live)
    low = high = guess
    while accepted and low > 0:  # the best so far prunes `high`
        low = max(0, low - step)
        tried = ranking.live(low)
        if not fits(tried):
            break
        live, high, step = tried, low, 2 * step
    if accepted and high == 0:
        return live, True
    while not accepted and high < ranking.reachable:
        low, high = high, min(ranking.reachable, high + step)
        live = ranking.live(high)
        accepted, step = fits(live), 2 * step
    if not accepted:
        return live, False
    while high - low > max(1, (ranking.elements - high) // 512):
        middle = (low + high) // 2
        tried = ranking.live(middle)
        if fits(tried):
            live, high = tried, middle
        else:
            low = middle
    return live, True
