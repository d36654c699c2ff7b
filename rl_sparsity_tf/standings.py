"""Where every group of a network stands against what the target would leave: unit-free scores.

A heuristic ranks all groups of a network, and the target says how far down the ranking pruning
goes. The score there is the heuristic's threshold; a score s against the threshold t, as
s / (s + t), says the same in every network: below a half the heuristic would prune the group.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from rl_sparsity_tf.network import CompressedNetwork

NAMES = ("lamp", "global_magnitude", "output_price")
"""LAMP's and the magnitudes' scores, and what a weight adds to its layer's outputs."""


class Standings:
    """The standings of all groups of a dense network; each score is computed when first asked for.

    Args:
        network: The network; its budget says how much is to be pruned.

    Example:
        >>> Standings(network).of("lamp", "dense/kernel")[groups].mean() < 0.5  # LAMP prunes them
        True
    """

    def __init__(self, network: CompressedNetwork):
        self._network = network
        self._found: dict[str, dict[str, np.ndarray]] = {}

    def of(self, name: str, path: str) -> np.ndarray:
        """The standings of a kernel's groups by one of [NAMES][]: values in [0, 1], flat."""
        if name not in self._found:
            self._found[name] = self._compare(name)
        return self._found[name][path]

    def _compare(self, name: str) -> dict[str, np.ndarray]:
        network = self._network
        scores = output_prices(network) if name == "output_price" else network.scores(name)
        assert scores is not None
        sizes = [network.groupings[kernel.path].sizes for kernel in network.kernels]
        limit = threshold(scores, sizes, network.budget.wanted)
        return {
            kernel.path: _against(score.reshape(-1), limit).astype(np.float32)
            for kernel, score in zip(network.kernels, scores, strict=True)
        }


def output_prices(network: CompressedNetwork) -> list[np.ndarray]:
    r"""What every group adds to the energy of its layer's outputs, per weight.

    \(w^2 E[x^2]\) summed over the group's weights, over the energy of the layer's outputs and the
    number of weights; for kernels whose outputs are not known (and without least squares)
    \(w^2\) over the energy of the weights.
    """
    found = []
    for kernel in network.kernels:
        grouping = network.groupings[kernel.path]
        squares = np.square(network.originals[kernel.path], dtype=np.float64)
        fits = network.least_squares
        problem = None if fits is None else fits.problems.get(kernel.path)
        energy = float(squares.sum())
        # A set of tied channels is no kernel of one layer, even where it goes by its name.
        if problem is not None and problem.grouping.shape == grouping.shape:
            squares = squares * problem.input_energy
            energy = problem.energy
        found.append(grouping.sum_numpy(squares) / grouping.sizes / max(energy, 1e-30))
    return found


def threshold(scores: Sequence[np.ndarray], sizes: Sequence[np.ndarray], wanted: int) -> float:
    """The lowest score that lives when groups are pruned in this order until enough are gone.

    Args:
        scores: For every kernel one score per group.
        sizes: The weights of each, same shapes.
        wanted: Weights to prune at least.
    """
    flat = np.concatenate([score.reshape(-1) for score in scores])
    weights = np.concatenate([size.reshape(-1) for size in sizes])
    if (weights == weights[0]).all():  # counting is several times faster than sorting
        place = min(-(-wanted // int(weights[0])), len(flat) - 1)
        return float(np.partition(flat, place)[place])
    order = np.argsort(flat, kind="stable")
    place = int(np.searchsorted(np.cumsum(weights[order]), wanted)) + 1 if wanted > 0 else 0
    return float(flat[order[min(place, len(order) - 1)]])


def _against(scores: np.ndarray, limit: float) -> np.ndarray:
    total = scores + limit
    return np.divide(scores, total, out=np.full_like(scores, 0.5), where=total > 0)
