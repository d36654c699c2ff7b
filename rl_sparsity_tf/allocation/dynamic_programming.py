"""The densities and precisions of least error under a target, by dynamic programming.

The [database][rl_sparsity_tf.allocation.layer_errors] says what every kernel loses at every
density; a knapsack chooses one entry per kernel. Frantar & Alistarh 2022, "SPDY: Accurate pruning
with speedup guarantees", arXiv 2201.13096, with weights or bytes in place of milliseconds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tf_keras as keras

from rl_sparsity_tf.allocation import ranking as ranks
from rl_sparsity_tf.allocation.alternatives import Alternative, note
from rl_sparsity_tf.allocation.budgets import CostBudget
from rl_sparsity_tf.allocation.channel_decisions import ChannelDecisions
from rl_sparsity_tf.allocation.channel_programming import propose_channels
from rl_sparsity_tf.allocation.layer_errors import (
    FLOAT,
    KernelErrors,
    levels,
    measure,
    most_salient,
)
from rl_sparsity_tf.allocation.problem import PlanRequest, Problem, RequestFile, meet, sizes_of
from rl_sparsity_tf.allocation.size_budget import KernelCosts, SizeBudget
from rl_sparsity_tf.allocation.target import Target
from rl_sparsity_tf.console import without_traces
from rl_sparsity_tf.data.batches import training_data
from rl_sparsity_tf.errors import DataError
from rl_sparsity_tf.export.verification import check_repeatable
from rl_sparsity_tf.layers.kernel_spec import has_int4
from rl_sparsity_tf.layers.plan import CompressionPlan
from rl_sparsity_tf.layers.rules import Patterns
from rl_sparsity_tf.layers.wrapping import wrap, wrapped_kernels
from rl_sparsity_tf.training.layer_problem import LayerProblem
from rl_sparsity_tf.training.least_squares import closed_form
from rl_sparsity_tf.training.preparation import prepare_for_short_recovery

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

    `errors` and `costs` have a value per entry for every kernel. Returns the index of every
    kernel's entry, or None if even the cheapest are too expensive.

    What the cheapest entries leave of the limit is cut into at most `units` units, and costs are
    rounded up to whole ones: the limit is never passed. Whole numbers are counted one by one if the
    units suffice, which is exact.

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
    """An entry of the database for every kernel: living weights, and 32, 8 or 4 bits, by path."""

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

    The power p is a half by default, because it is the norms of errors that add up on the way
    through a network, at worst. Roots were measured to be the better measure, too: Fashion-MNIST,
    validation loss after recovery with \(p = 1/2\) and \(p = 1\); LeNet-300-100 at sparsities of
    0.9, 0.97 and 0.99: 0.364 and 0.367, 0.479 and 0.534, 0.761 and 0.767; LeNet-5 at 0.9 and 0.97:
    0.475 and 0.486, 0.773 and 0.809. A fourth is better in places (0.673 for the last), and worse
    in others (1.280 at 0.99).
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


DYNAMIC_PROGRAMMING = "dynamic_programming"
"""Who proposes what is proposed here, in histories and figures."""

POWERS = (1.0, 0.5, 0.25)
"""Of the layers' errors, see [propose_all][]: no power gives the best plan for every network."""

_BATCH, _BATCHES = 64, 64
# To choose entries whose sum the whole file keeps to, kernel by kernel being an estimate.
_ATTEMPTS = 4


def dynamic_programming(
    model: keras.Model,
    data: Any = None,
    target: Target | None = None,
    *,
    sparsity: float | None = None,
    group: str = "element",
    quantize: bool | None = None,
    bits: int = 8,
    include: Patterns | None = None,
    exclude: Patterns | None = None,
) -> CompressionPlan:
    """`rls.baselines.dynamic_programming` without a ranking anew, which takes a network."""
    request = PlanRequest.of(
        model,
        target,
        sparsity=sparsity,
        group=group,
        quantize=quantize,
        bits=bits,
        include=include,
        exclude=exclude,
    )
    if data is None:
        raise DataError(
            "dynamic_programming was given no data, which it measures the layers' outputs on. "
            "Pass data=(x, y) or a dataset as fit takes them; lamp needs no data."
        )
    with without_traces():
        if request.target.sparsity is None:
            return _within_bytes(request, layer_problems(request, data))
        # Refuses a sparsity out of reach before anything is computed.
        with request.selection.explained():
            allowed = float(sum(size.sum() for size in request.sizes) - request.wanted)
        density, most = 1.0 - request.target.sparsity, dict.fromkeys(request.groupings, allowed)
        pieces = (
            request.kernels,
            request.groupings,
            request.originals,
            layer_problems(request, data),
        )
        database = measure(*pieces, density=density, most=most)
        choice = cheapest(database, weights_cost, allowed) or densest(database)
        return request.plan(choice.scores(database, request.sizes))


def propose(network: Problem) -> CompressionPlan:
    """The plan of [dynamic_programming][] for a network that is searched."""
    (plan,) = propose_all(network, (POWER,))
    return plan


def propose_all(network: Problem, powers: Sequence[float]) -> list[CompressionPlan]:
    """Plans of [dynamic_programming][] for a network that is searched, from one database.

    The errors are those of the network's own least-squares problems, and its state stays as it is;
    without least squares all kernels count by their weights. What lives is stored as integers where
    that works; under a budget of bytes, where it leads to less error in all.

    There is a complete plan for every power of the layers' errors (see
    [cheapest][rl_sparsity_tf.allocation.dynamic_programming.cheapest]), because none is best for
    every network. Each meets the target; no floor is held beyond a group per kernel.
    """
    if isinstance(network.decisions, ChannelDecisions):
        return propose_channels(network, powers)
    kernels, groupings, budget = network.kernels, network.groupings, network.budget
    problems = {} if network.least_squares is None else network.least_squares.problems
    sizes = sizes_of(network)
    costs: dict[str, KernelCosts] = {}
    allowed = float(sum(size.sum() for size in sizes) - budget.wanted)
    most = dict.fromkeys(groupings, allowed)
    cost: Cost = weights_cost
    if isinstance(budget, SizeBudget):
        costs = dict(zip(groupings, budget.costs, strict=True))
        allowed = budget.limit - budget.fixed
        most = {path: affordable(one, allowed) for path, one in costs.items()}
        cost = _budget_cost(costs)
    database = measure(
        kernels,
        groupings,
        network.originals,
        problems,
        bits={p: [FLOAT, network.storage.of(p).bits] if costs else [FLOAT] for p in groupings},
        density=1.0 - budget.goal,
        most=most,
    )
    for kernel in kernels:
        group, one = network.storage.of(kernel.path).group, database[kernel.path]
        prices = {b: cost(kernel.path, one.live, b) if costs else None for b in one.errors}
        ways = [Alternative(group, b, one.live, one.errors[b], prices[b]) for b in one.errors]
        note(network, kernel.path, ways)
    choices = [cheapest(database, cost, allowed, power) or densest(database) for power in powers]
    return [_as_plan(network, choice, choice.scores(database, sizes)) for choice in choices]


def _as_plan(network: Problem, choice: Choice, scores: Sequence[np.ndarray]) -> CompressionPlan:
    """A choice's plan, filled up to the budget."""
    live, _ = meet(network, scores, lambda _: choice.bits, choice.pruned(sizes_of(network)))
    if isinstance(network.budget, CostBudget):
        return network.storage.plan_at(network.kernels, live, choice.bits)
    return network.storage.plan_from_live(network.kernels, live)


# ---------------------------------------------------------------------- of a plain model


def layer_problems(request: PlanRequest, data: Any) -> Mapping[str, LayerProblem]:
    """The least-squares problems of a model's kernels on data."""
    train = training_data(data, request.model, batch_size=_BATCH, pool_size=_BATCHES)
    check_repeatable(request.model, train.pool[0][0])
    paths = request.selection.paths
    wrapped = wrap(request.model, group=request.group, include=paths)
    prepare_for_short_recovery(wrapped)
    return closed_form(wrapped, wrapped_kernels(wrapped), request.groupings, train).problems


def _within_bytes(request: PlanRequest, problems: Mapping[str, LayerProblem]) -> CompressionPlan:
    file, sizes = RequestFile(request), request.sizes
    whole = [np.ones(size.shape, bool) for size in sizes]
    fixed = file.total(whole, {}) - sum(
        file.kernel(kernel, alive, FLOAT)
        for kernel, alive in zip(request.kernels, whole, strict=True)
    )
    precisions = [FLOAT]
    if request.quantize:
        precisions += [8] if request.bits == 8 else [8, 4]
    # What the size leaves of a network of one density, roughly: a weight and its place.
    least = max(1, min(precisions) // 8) + 1
    share = (file.limit - fixed) / (least * sum(int(size.sum()) for size in sizes))
    density = float(np.clip(share, 0.01, 0.5))
    pieces = (request.kernels, request.groupings, request.originals, problems)
    # The quantizer has no form of four bits for some kinds of kernels.
    bits_of = {
        kernel.path: [one for one in precisions if one != 4 or has_int4(kernel.spec.kind)]
        for kernel in request.kernels
    }
    database = measure(*pieces, bits=bits_of, density=density)
    table = {
        (kernel.path, bits): np.maximum.accumulate(
            [
                file.kernel(kernel, most_salient(database[kernel.path].saliency, count), bits)
                for count in levels(database[kernel.path].saliency.size)
            ]
        )
        for kernel in request.kernels
        for bits in database[kernel.path].errors
    }

    def cost(path: str, live: np.ndarray, bits: int) -> np.ndarray:
        return np.interp(live, database[path].live, table[path, bits])

    allowed = file.limit - fixed
    for _ in range(_ATTEMPTS):
        choice = cheapest(database, cost, allowed) or densest(database)
        ranking = ranks.Ranking(choice.scores(database, sizes), sizes)
        live = ranking.live(choice.pruned(sizes))
        over = file.total(live, choice.bits) - file.limit
        # Tensors stored dense get no smaller by some zeros more, so that the least excess would
        # cost every kernel half of its weights.
        if over <= 0:
            break
        allowed -= over
    live, reached = ranking.least_pruned(
        lambda alive: file.total(alive, choice.bits) <= file.limit, choice.pruned(sizes)
    )
    if not reached:  # says in words what can be
        return request.plan(choice.scores(database, sizes))
    return request.storage.plan_at(request.kernels, live, choice.bits)


def _budget_cost(costs: Mapping[str, KernelCosts]) -> Cost:
    def cost(path: str, live: np.ndarray, bits: int) -> np.ndarray:
        return np.array([costs[path].cost(float(one), bits < FLOAT) for one in live])

    return cost


def affordable(costs: KernelCosts, limit: float) -> float:
    """Weights of a kernel that may live if all others are gone."""
    lives = np.linspace(1.0, float(costs.live[-1]), 512)
    return float(max((n for n in lives if costs.least(float(n), True) <= limit), default=1.0))
