"""Plans of known heuristics, played as episodes that an agent learns from."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from rl_sparsity_tf.allocation.density_plans import random_ratios
from rl_sparsity_tf.allocation.layer_errors import FLOAT
from rl_sparsity_tf.allocation.problem import meet
from rl_sparsity_tf.environment.layer_environment import LayerEnvironment
from rl_sparsity_tf.environment.network import CompressedNetwork
from rl_sparsity_tf.errors import ArgumentError
from rl_sparsity_tf.layers.operations import Operation
from rl_sparsity_tf.layers.plan import CompressionPlan

# Edges are rounded to whole groups; a bucket that only begins below the density is left alone.
_TOLERANCE = 0.1
# Of the factors that scale random densities to the target.
_HALVINGS = 40
# Densities that differ by no more than this are the same.
_EQUAL = 1e-6


@dataclasses.dataclass(frozen=True)
class Demonstration:
    """A heuristic's densities, turned into actions.

    Attributes:
        name: Who proposes the plan.
        densities: Share of groups that should live, by kernel path.
    """

    name: str
    densities: Mapping[str, float]

    @classmethod
    def of(cls, name: str, plan: CompressionPlan) -> Demonstration:
        """Takes the share of groups that a plan lets live, kernel by kernel."""
        return cls(name, {path: 1.0 - one.sparsity for path, one in plan.kernels.items()})

    def action(self, environment: LayerEnvironment, time_step: Any) -> int:
        """Prunes the buckets below the density, stores the others as integers where that works.

        A bucket in which the density falls is pruned, and the kernels that come later keep more for
        it: what is left over could empty a small one. The operation is always a legal one.
        """
        legal = time_step.observation["legal"]
        wanted = 1.0 - self.densities[environment.kernel]
        wish = Operation.QUANTIZE
        start, width = environment.bucket_span
        if start + _TOLERANCE * width < wanted:
            wish = Operation.PRUNE
        for operation in (wish, Operation.QUANTIZE, Operation.KEEP, Operation.PRUNE):
            if legal[operation]:
                return int(operation)
        return int(Operation.KEEP)


def random_demonstration(
    network: CompressedNetwork, generator: np.random.Generator, name: str = "random"
) -> Demonstration:
    """Random densities that meet the target, as random search draws them."""
    sizes = np.array([float(kernel.size) for kernel in network.kernels])
    ratios = random_ratios(generator, len(sizes))
    wanted = max(0.0, sizes.sum() - network.budget.wanted)
    low, high = 0.0, 1.0 / ratios.min()  # of the factor that scales them to the target
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if (sizes * np.minimum(1.0, middle * ratios)).sum() > wanted:
            high = middle
        else:
            low = middle
    densities = np.minimum(1.0, low * ratios).tolist()
    return Demonstration(name, dict(zip(network.groupings, densities, strict=True)))


def without_twins(demonstrations: Sequence[Demonstration]) -> list[Demonstration]:
    """The demonstrations without those whose densities are those of an earlier one."""
    found: list[Demonstration] = []
    for one in demonstrations:
        if not any(_alike(one.densities, other.densities) for other in found):
            found.append(one)
    return found


def proposals(network: CompressedNetwork) -> list[tuple[str, CompressionPlan]]:
    """The exact plans of the heuristics: which groups they prune, the others as integers.

    All are complete and meet the target; what proposes the same plan as an earlier one is left out.
    The network's budget says how much is pruned: the weights that a sparsity asks for, or as few as
    bring the file to its size by the budget's costs. Beyond the group that every kernel keeps no
    floor is held.
    """
    found: list[tuple[str, CompressionPlan]] = []
    for name, live in _heuristics(network):
        plan = network.storage.plan_from_live(network.kernels, live)
        if all(plan != other for _, other in found):
            found.append((name, plan))
    return found


def heuristic_plan(network: CompressedNetwork, name: str, quantize: bool = True) -> CompressionPlan:
    """The exact plan of one heuristic of `network.decisions.heuristics`.

    `quantize` is whether what lives is stored as integers. Raises ArgumentError if the heuristic
    cannot rank the network's groups, or misses the target.
    """
    for _, live in _heuristics(network, [name]):
        return network.storage.plan_from_live(network.kernels, live, quantize)
    raise ArgumentError(
        f"The heuristic {name!r} finds no plan: it has nothing to rank groups by, or cannot meet "
        "the target. Expected another heuristic or target."
    )


def _heuristics(
    network: CompressedNetwork, names: Sequence[str] | None = None
) -> Iterator[tuple[str, list[np.ndarray]]]:
    """What lives in the plan of every heuristic that meets the target."""
    stored = {
        kernel.path: network.storage.of(kernel.path).bits if kernel.spec.exports_int8 else FLOAT
        for kernel in network.kernels
    }
    for name in names or network.decisions.heuristics:
        scores = network.scores(name)
        if scores is None:
            continue
        live, reached = meet(network, scores, lambda _: stored)
        if reached:
            yield name, live


def _alike(one: Mapping[str, float], other: Mapping[str, float]) -> bool:
    return all(abs(one[path] - other[path]) <= _EQUAL for path in one)
