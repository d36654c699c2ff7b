"""Plans of known heuristics, played as episodes that an agent learns from."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from rl_sparsity_tf.buckets import saliency_of
from rl_sparsity_tf.environment import LayerEnvironment
from rl_sparsity_tf.network import CompressedNetwork
from rl_sparsity_tf.operations import Operation

# Edges are rounded to whole groups; a bucket that only begins below the density is left alone.
_TOLERANCE = 0.1


@dataclasses.dataclass(frozen=True)
class Demonstration:
    """A heuristic's densities, turned into actions.

    Attributes:
        name: Who proposes the plan.
        densities: Share of groups that should live, by kernel path.
    """

    name: str
    densities: Mapping[str, float]

    def action(self, environment: LayerEnvironment, time_step: Any) -> int:
        """Prunes the buckets below the density, stores the others as integers where that works.

        A bucket in which the density falls is pruned, and the kernels that come later keep more
        for it: large kernels usually come first, and their leftovers would empty small ones.

        Args:
            environment: The layer's environment.
            time_step: Its present time step.

        Returns:
            A legal operation.
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


def demonstrate(network: CompressedNetwork) -> list[Demonstration]:
    """The demonstrations for a network: uniform and LAMP densities."""
    return [
        Demonstration("uniform", uniform_densities(network)),
        Demonstration("lamp", lamp_densities(network)),
    ]


def uniform_densities(network: CompressedNetwork) -> dict[str, float]:
    """The same density in every kernel."""
    sizes = sum(kernel.size for kernel in network.kernels)
    density = max(0.0, 1.0 - network.budget.wanted / sizes)
    return {kernel.path: density for kernel in network.kernels}


def lamp_densities(network: CompressedNetwork) -> dict[str, float]:
    """Densities by layer-adaptive magnitude scores (Lee et al. 2021, arXiv 2010.07611).

    The score of a group is its squared norm over the sum of those of its kernel that are at least
    as large (equation 2); the groups of lowest score in the whole network go.
    """
    scores, sizes, owners = [], [], []
    for index, kernel in enumerate(network.kernels):
        grouping = network.groupings[kernel.path]
        weights = grouping.sizes.reshape(-1)
        squares = saliency_of(network.originals[kernel.path], grouping) ** 2 * weights
        order = np.argsort(-squares, kind="stable")
        score = np.empty_like(squares)
        score[order] = squares[order] / np.maximum(np.cumsum(squares[order]), 1e-30)
        scores.append(score)
        sizes.append(weights)
        owners.append(np.full(len(score), index))
    order = np.argsort(np.concatenate(scores), kind="stable")
    gone = np.cumsum(np.concatenate(sizes)[order])
    pruned = order[: int((gone - np.concatenate(sizes)[order] < network.budget.wanted).sum())]
    counts = np.bincount(np.concatenate(owners)[pruned], minlength=len(network.kernels))
    return {
        kernel.path: 1.0 - float(count) / network.groupings[kernel.path].count
        for kernel, count in zip(network.kernels, counts, strict=True)
    }
