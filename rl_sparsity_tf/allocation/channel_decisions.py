"""Decisions on whole channels: every one masks all that is tied to it, and who reads it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import tf_keras as keras

from rl_sparsity_tf.allocation import ranking
from rl_sparsity_tf.allocation.budgets import Budget
from rl_sparsity_tf.allocation.channel_budget import ChannelBudget, ChannelCost
from rl_sparsity_tf.allocation.decisions import KernelDecisions, PartMatrix
from rl_sparsity_tf.allocation.ranking import saliency_of
from rl_sparsity_tf.allocation.size_budget import MARGINS, limit_of
from rl_sparsity_tf.allocation.storage import Storage
from rl_sparsity_tf.allocation.target import Target
from rl_sparsity_tf.channels.costs import ChannelCosts, latency_of
from rl_sparsity_tf.channels.elimination import ChannelErrors, eliminate
from rl_sparsity_tf.channels.graph import ChannelGraph, has_graph
from rl_sparsity_tf.channels.latency_table import LatencyTable
from rl_sparsity_tf.channels.units import ChannelUnit, UnitOperations, find_units
from rl_sparsity_tf.export.size_model import KernelBytes, SizeModel
from rl_sparsity_tf.layers.groups import Grouping
from rl_sparsity_tf.layers.kernels import Kernel
from rl_sparsity_tf.layers.operations import Operation
from rl_sparsity_tf.layers.plan import CompressionPlan
from rl_sparsity_tf.layers.rules import KernelSelection
from rl_sparsity_tf.layers.wrapping import wrap
from rl_sparsity_tf.training.least_squares import LeastSquares
from rl_sparsity_tf.training.statistics import KernelStatistics

CHANNEL_HEURISTICS = (
    "uniform_gamma",
    "global_gamma",
    "uniform_output_error",
    "global_output_error",
)
"""Heuristics for whole channels alone, see [ChannelDecisions.scores][]."""


class ChannelDecisions(KernelDecisions):
    """Decisions on sets of channels that can only be removed together.

    The wrapped kernels carry masks of single weights: a channel that is pruned has its column
    masked where it is made, and its rows where it is read. So whatever biases and normalizations
    make of it, nothing reads it any more, and [shrink][rl_sparsity_tf.shrink] removes it.

    The table is needed for targets of latency. Channels that kernels outside the selection make,
    read or pass on have to stay; by default it has all kernels that are not frozen. `units` are
    those of the wrapped copy.
    """

    # Buckets are cut at the share that the target means.
    least_share = 0.0
    heuristics = (*ranking.HEURISTICS, *CHANNEL_HEURISTICS)

    def __init__(self, table: LatencyTable | None = None, selection: KernelSelection | None = None):
        super().__init__("channel", shuffles=False, selection=selection)
        self.part_storage = Storage("element")
        self.table = table
        self.units: list[ChannelUnit] = []
        self._errors: dict[str, ChannelErrors] = {}
        self._capacity = np.zeros(0, np.int64)

    def wrap(self, model: keras.Model) -> keras.Model:
        """The wrapped copy, with masks of single weights."""
        used = (Operation.PRUNE, Operation.QUANTIZE)
        return wrap(model, operations=used, include=self.selected(model).paths)

    def kernels(self, model: keras.Model, parts: Sequence[Kernel]) -> list[Kernel]:
        """The sets of tied kernels."""
        self._graph = ChannelGraph(model, held=self.selected(model).left)
        self.units = find_units(self._graph, parts)
        self._unit = {unit.path: unit for unit in self.units}
        self._operations = UnitOperations(self.units)
        return list(self.units)

    def budget(self, model: keras.Model, kernels: list[Kernel], target: Target) -> Budget:
        """The budget of a target, whose floors limit from then on what rankings prune."""
        costs = ChannelCosts(model, self._graph, self.units)
        cost, limit = self._cost(model, costs, target)
        name = f"Target({target.kind}={target.value:g})"
        with self.selected(model).explained():
            budget = ChannelBudget(limit, cost, self.units, name)
        self.adopt(budget)
        return budget

    def adopt(self, budget: Budget) -> None:
        """Follows the network to another budget: its floors limit what rankings prune."""
        self._capacity = budget.capacity

    def _cost(
        self, model: keras.Model, costs: ChannelCosts, target: Target
    ) -> tuple[ChannelCost, float]:
        """What is counted, and what it may come to."""
        whole = np.ones(len(self.units))
        count: Callable[[np.ndarray], np.ndarray]
        if target.kind in MARGINS:
            sizes = SizeModel(model, compressed=target.gzip_bytes is not None)
            total = costs.bytes(KernelBytes(sizes, target.kind))
            return ChannelCost(total, integers=True), limit_of(target)
        if target.kind == "sparsity":
            count, share = costs.weights, 1.0 - target.value
        elif target.kind == "macs":
            count, share = costs.macs, target.value
        else:
            assert self.table is not None
            count, share = latency_of(self.table, model, self.units), target.value
        return ChannelCost(lambda live, _: count(live)), share * float(count(whole))

    def operations(
        self, decided: Mapping[str, np.ndarray], paths: Sequence[str]
    ) -> dict[str, np.ndarray]:
        """The operations on the single weights of some kernels."""
        return {path: self._operations.of(path, decided) for path in paths}

    def affected(self, path: str) -> Sequence[str]:
        """The kernels that make a unit's channels, and those that read them."""
        return self._operations.affected(path)

    def matrix(self, path: str, part_matrix: PartMatrix) -> np.ndarray:
        """The present effective weights of a unit."""
        unit = self._unit[path]
        return unit.stack({m.kernel.path: part_matrix(m.kernel.path) for m in unit.members})

    def statistics(self, parts: Mapping[str, KernelStatistics]) -> dict[str, KernelStatistics]:
        """Activations of the unit's first layer, gradients of all its kernels."""
        found = {}
        for unit in self.units:
            first = parts[unit.path]
            gradients = {m.kernel.path: parts[m.kernel.path].gradient for m in unit.members}
            found[unit.path] = KernelStatistics(
                activation_mean=first.activation_mean,
                activation_variance=first.activation_variance,
                activation_sparsity=first.activation_sparsity,
                gradient=unit.stack(gradients),
            )
        return found

    def moved(self, path: str, part_matrix: PartMatrix, fits: LeastSquares) -> float:
        """How far the outputs of the layers move that read a unit, or make what no one reads."""
        unit = self._unit[path]
        behind = [reader.kernel.path for reader in unit.readers]
        behind = behind or [member.kernel.path for member in unit.members]
        return float(np.mean([fits.error(one, part_matrix(one)) for one in behind]))

    def saliency(
        self,
        path: str,
        matrix: np.ndarray,
        grouping: Grouping,
        fits: LeastSquares | None,
        density: float,
    ) -> np.ndarray:
        """What the layers reading a channel lose without it; else the weights that make it."""
        unit = self._unit[path]
        if fits is None or unit.frozen:
            return saliency_of(matrix, grouping)
        return self.errors(unit, fits).saliency

    def errors(self, unit: ChannelUnit, fits: LeastSquares | None) -> ChannelErrors:
        """What goes first in a unit, and what it costs; found out once."""
        if unit.path not in self._errors:
            problems = {} if fits is None or unit.frozen else fits.problems
            self._errors[unit.path] = eliminate(unit, problems)
        return self._errors[unit.path]

    def scores(
        self,
        name: str,
        kernels: Sequence[Kernel],
        groupings: Mapping[str, Grouping],
        matrices: Mapping[str, np.ndarray],
        gradients: Mapping[str, np.ndarray],
        fits: LeastSquares | None,
    ) -> list[np.ndarray] | None:
        """Scores of all channels by a heuristic.

        Beside those for any groups there are `uniform_...` (the same share of every unit) and
        `global_...` (compared over the network): `gamma` by the scales of batch normalization
        (Liu et al. 2017, "Learning efficient convolutional networks through network slimming",
        arXiv 1708.06519), `output_error` by what the readers of a channel lose.
        """
        if name not in CHANNEL_HEURISTICS:
            return super().scores(name, kernels, groupings, matrices, gradients, fits)
        spread, _, criterion = name.partition("_")
        found = []
        for unit in self.units:
            shape = (1, unit.count)
            if unit.frozen:
                found.append(np.ones(shape))
                continue
            if criterion == "gamma":
                if unit.scale is None:
                    return None
                values = unit.scale
            else:
                values = self.errors(unit, fits).saliency
                if spread == "global":
                    errors = self.errors(unit, fits).errors
                    values = values * np.sqrt(errors[-1] / len(values))
            values = values.reshape(shape)
            sizes = np.full(shape, unit.shape[0])
            uniform = spread == "uniform"
            found.append(ranking.density_scores(values, sizes, 1.0) if uniform else values)
        return found

    def kernel_plan(self, plan: CompressionPlan) -> CompressionPlan:
        """The plan of the model's kernels that a plan of units means."""
        return self._operations.plan({path: one.operations for path, one in plan.kernels.items()})

    @property
    def removable(self) -> np.ndarray:  # type: ignore[override]
        """Weights that every unit can give at most: down to the budget's floors.

        Without floors the rankings that compare over the network empty a layer, which nothing
        recovers from.
        """
        return self._capacity


def removable_channels(
    model: keras.Model, selection: KernelSelection | None = None
) -> list[ChannelUnit]:
    """The sets of channels of a model that a search can decide on; empty if there are none.

    The selection is of its kernels that are decided on, by default all that are not frozen.
    """
    if not has_graph(model):
        return []
    selection = KernelSelection.of(model) if selection is None else selection
    graph = ChannelGraph(model, held=selection.left)
    units = find_units(graph, selection.kernels(model))
    return [unit for unit in units if unit.frozen is None and unit.count > 1]
