"""The densities and precisions of least error under a target, by dynamic programming.

The [database][rl_sparsity_tf.allocation.layer_errors] says what every kernel loses at every
density; a knapsack chooses one entry per kernel. Frantar & Alistarh 2022, "SPDY: Accurate pruning
with speedup guarantees", arXiv 2201.13096, with weights or bytes in place of milliseconds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tf_keras as keras

from rl_sparsity_tf.allocation import ranking as ranks
from rl_sparsity_tf.allocation import size_costs
from rl_sparsity_tf.allocation.budget import Budget
from rl_sparsity_tf.allocation.budgets import CostBudget
from rl_sparsity_tf.allocation.channel_decisions import ChannelDecisions
from rl_sparsity_tf.allocation.channel_programming import propose_channels
from rl_sparsity_tf.allocation.knapsack import (
    POWER,
    Choice,
    Cost,
    cheapest,
    densest,
    fill,
    weights_cost,
)
from rl_sparsity_tf.allocation.layer_errors import (
    FLOAT,
    KernelErrors,
    levels,
    measure,
    most_salient,
)
from rl_sparsity_tf.allocation.problem import PlanRequest
from rl_sparsity_tf.allocation.size_budget import KernelCosts, SizeBudget
from rl_sparsity_tf.allocation.storage import Storage
from rl_sparsity_tf.allocation.target import Target
from rl_sparsity_tf.data.batches import training_data
from rl_sparsity_tf.environment.network import CompressedNetwork
from rl_sparsity_tf.errors import DataError
from rl_sparsity_tf.export.repeatability import check_repeatable
from rl_sparsity_tf.layers.export_modes import has_int4
from rl_sparsity_tf.layers.kernel_selection import Patterns
from rl_sparsity_tf.layers.kernels import Kernel, count_weights
from rl_sparsity_tf.layers.plan import CompressionPlan
from rl_sparsity_tf.layers.wrapping import wrap, wrapped_kernels
from rl_sparsity_tf.quiet import quiet_tensorflow
from rl_sparsity_tf.training.layer_problem import LayerProblem
from rl_sparsity_tf.training.least_squares import closed_form
from rl_sparsity_tf.training.preparation import prepare_for_short_recovery

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
    r"""The allocation that loses least by the errors of the single layers.

    At about twenty densities every kernel is pruned and fitted to give back the dense layer's
    outputs on the data; \(e_k\) is the energy of what is left of the difference, over that of the
    outputs. The densities of least \(\sum_k \sqrt{e_k}\) that meet the target follow by dynamic
    programming (Frantar & Alistarh 2022, "SPDY", arXiv 2201.13096). Within a kernel the groups
    are ranked by magnitude or by what they add to the outputs, whichever fits better. Layers that
    cannot be fitted (other than dense, convolutional and depthwise ones) count by the energy of
    their weights.

    The arguments are those of every function of this [module][rl_sparsity_tf.baselines]; data is
    needed. For targets in bytes with `quantize`, each kernel is stored as floats or as integers,
    whichever leads to less error in all; with `bits=4` the integers may have 8 or 4 bits.

    Example:
        >>> plan = rls.baselines.dynamic_programming(model, (x_train, y_train), sparsity=0.9)
    """
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
    with quiet_tensorflow():
        sizes = [grouping.sizes for grouping in request.groupings.values()]
        _, elements = count_weights(request.model)
        goal = request.target.sparsity
        # Refuses a sparsity out of reach before anything is computed.
        with request.selection.explained():
            budget = Budget(0.0 if goal is None else goal, elements, sizes)
        problems = _problems(request, data)
        if goal is not None:
            allowed = sum(int(size.sum()) for size in sizes) - budget.wanted
            database = _measured(request, problems, [FLOAT], 1.0 - goal, allowed)
            choice = cheapest(database, weights_cost, allowed) or densest(database)
            return request.plan(choice.scores(database, sizes))
        return _within_bytes(request, problems, sizes)


def propose(network: CompressedNetwork) -> CompressionPlan:
    """The plan of [dynamic_programming][] for a network that is searched."""
    (plan,) = propose_all(network, (POWER,))
    return plan


def propose_all(network: CompressedNetwork, powers: Sequence[float]) -> list[CompressionPlan]:
    """Plans of [dynamic_programming][] for a network that is searched, from one database.

    The errors are those of the network's own least-squares problems, and its state stays as it
    is. What lives is stored as integers where that works; under a budget of bytes, where it leads
    to less error in all.

    Args:
        network: The network; without least squares all kernels count by their weights.
        powers: The powers of the layers' errors that are summed, see
            [cheapest][rl_sparsity_tf.allocation.knapsack.cheapest]. None is best for every network.

    Returns:
        A complete plan per power, which meets the target; no floor is held beyond a group per
        kernel.
    """
    if isinstance(network.decisions, ChannelDecisions):
        return propose_channels(network, powers)
    kernels, groupings, budget = network.kernels, network.groupings, network.budget
    problems = {} if network.least_squares is None else network.least_squares.problems
    sizes = [groupings[kernel.path].sizes for kernel in kernels]
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
    choices = [cheapest(database, cost, allowed, power) or densest(database) for power in powers]
    return [_as_plan(network, choice, choice.scores(database, sizes)) for choice in choices]


def _as_plan(
    network: CompressedNetwork, choice: Choice, scores: Sequence[np.ndarray]
) -> CompressionPlan:
    """A choice's plan, filled up to the budget."""
    kernels, budget = network.kernels, network.budget
    sizes = [network.groupings[kernel.path].sizes for kernel in kernels]
    ranking = ranks.Ranking(scores, sizes)
    if not isinstance(budget, CostBudget):
        live = ranking.live(budget.wanted)
        return network.storage.plan_from_live(kernels, live)
    live, _ = fill(
        ranking,
        lambda alive: cost_of(network, alive, choice.bits) <= budget.limit,
        choice.pruned(sizes),
    )
    return network.storage.plan_at(kernels, live, choice.bits)


def cost_of(
    network: CompressedNetwork, live: Sequence[np.ndarray], bits: Mapping[str, int]
) -> float:
    """What a network costs in which some groups live, by its budget."""
    budget = network.budget
    assert isinstance(budget, CostBudget)
    sizes = [network.groupings[kernel.path].sizes for kernel in network.kernels]
    pruned = [float(size[~alive].sum()) for size, alive in zip(sizes, live, strict=True)]
    return budget.total(pruned, [bits[kernel.path] < FLOAT for kernel in network.kernels])


# ---------------------------------------------------------------------- of a plain model


def _problems(request: PlanRequest, data: Any) -> Mapping[str, LayerProblem]:
    """The least-squares problems of a model's kernels on data."""
    train = training_data(data, request.model, batch_size=_BATCH, pool_size=_BATCHES)
    check_repeatable(request.model, train.pool[0][0])
    paths = request.selection.paths
    wrapped = wrap(request.model, group=request.group, include=paths)
    prepare_for_short_recovery(wrapped)
    return closed_form(wrapped, wrapped_kernels(wrapped), request.groupings, train).problems


def _measured(
    request: PlanRequest,
    problems: Mapping[str, LayerProblem],
    bits: Sequence[int],
    density: float,
    allowed: int | None = None,
) -> dict[str, KernelErrors]:
    return measure(
        request.kernels,
        request.groupings,
        {kernel.path: kernel.matrix() for kernel in request.kernels},
        problems,
        bits=bits,
        density=density,
        most=None if allowed is None else dict.fromkeys(request.groupings, float(allowed)),
    )


class _File:
    """What the file of a request's plan costs, by the size model and the trained weights."""

    def __init__(self, request: PlanRequest):
        self._request = request
        self._sizes = size_costs.size_model_for(request.model, request.target)
        kind = request.target.kind
        self._field = "raw" if kind == "tflite_bytes" else "gzip"
        self.limit = request.target.value * (1.0 - size_costs.MARGINS[kind])
        self._matrices = {kernel.path: kernel.matrix() for kernel in request.kernels}

    def _value(self, kernel: Kernel, alive: np.ndarray) -> np.ndarray:
        mask = self._request.groupings[kernel.path].expand_numpy(alive)
        pruned = np.where(mask, self._matrices[kernel.path], 0.0).astype(np.float32)
        return kernel.spec.from_matrix_numpy(pruned, kernel.shape)

    def total(self, live: Sequence[np.ndarray], bits: Mapping[str, int]) -> float:
        """Bytes of the file in which some groups live."""
        pairs = zip(self._request.kernels, live, strict=True)
        values = {kernel.path: self._value(kernel, alive) for kernel, alive in pairs}
        return float(getattr(self._sizes.file_size(values, bits), self._field))

    def kernel(self, kernel: Kernel, alive: np.ndarray, bits: int) -> float:
        """Bytes of one kernel of which some groups live."""
        size = self._sizes.kernel_size(
            kernel.path, self._value(kernel, alive), bits, compressed=self._field == "gzip"
        )
        return float(getattr(size, self._field))


def _within_bytes(
    request: PlanRequest, problems: Mapping[str, LayerProblem], sizes: Sequence[np.ndarray]
) -> CompressionPlan:
    file = _File(request)
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
    database = {
        kernel.path: _without_int4(one, kernel)
        for kernel, one in zip(
            request.kernels, _measured(request, problems, precisions, density).values(), strict=True
        )
    }
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
        live = ranks.Ranking(choice.scores(database, sizes), sizes).live(choice.pruned(sizes))
        over = file.total(live, choice.bits) - file.limit
        # Tensors stored dense get no smaller by some zeros more, so that the least excess would
        # cost every kernel half of its weights.
        if over <= 0:
            break
        allowed -= over
    live, reached = fill(
        ranks.Ranking(choice.scores(database, sizes), sizes),
        lambda alive: file.total(alive, choice.bits) <= file.limit,
        choice.pruned(sizes),
    )
    if not reached:  # says in words what can be
        return request.plan(choice.scores(database, sizes))
    return Storage(request.group).plan_at(request.kernels, live, choice.bits)


def _without_int4(errors: KernelErrors, kernel: Kernel) -> KernelErrors:
    """Takes four bits out where the quantizer has no such form."""
    if 4 not in errors.errors or has_int4(kernel.spec.kind):
        return errors
    left = {bits: found for bits, found in errors.errors.items() if bits != 4}
    return dataclasses.replace(errors, errors=left)


def _budget_cost(costs: Mapping[str, KernelCosts]) -> Cost:
    def cost(path: str, live: np.ndarray, bits: int) -> np.ndarray:
        return np.array([costs[path].cost(float(one), bits < FLOAT) for one in live])

    return cost


def affordable(costs: KernelCosts, limit: float) -> float:
    """Weights of a kernel that may live if all others are gone."""
    lives = np.linspace(1.0, float(costs.live[-1]), 512)
    return float(max((n for n in lives if costs.least(float(n), True) <= limit), default=1.0))
