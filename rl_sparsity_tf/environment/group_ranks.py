"""Where every group of a network stands against what is still to be pruned: unit-free scores.

A heuristic ranks all groups of a network, and the target says how far down the ranking pruning
goes. The score there is the heuristic's threshold; a score s against the threshold t, as
s / (s + t), says the same in every network: below a half the heuristic would prune the group.
The threshold follows what was decided: it is the one that prunes what is still missing among the
groups that are not decided yet, so that who goes by it meets the target however others decided.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from rl_sparsity_tf.allocation.problem import Problem

NAMES = ("lamp", "global_magnitude", "output_price")
"""LAMP's and the magnitudes' scores, and what a weight adds to its layer's outputs."""

# Halvings of the range that a threshold is looked for in.
_HALVINGS = 24


class Ranked(Problem, Protocol):
    """A problem that knows what was decided of it, and ranks its groups."""

    @property
    def decided(self) -> Mapping[str, np.ndarray]:
        """Per kernel and group, whether it was decided on."""

    def saliency(self, path: str) -> np.ndarray:
        """What a kernel's groups are pruned by, the least salient first; flat."""

    def scores(self, name: str) -> list[np.ndarray] | None:
        """Scores of all groups by a heuristic, lowest first; None if it has nothing to rank by."""


@dataclasses.dataclass(frozen=True, eq=False)
class Ranks:
    """A kernel's groups in the order in which they are decided on, and their scores.

    How many groups of a kernel go is the ranking's business; which of them go first is decided by
    their saliency, which may be another one. So the scores are dealt out in its order.

    Attributes:
        scores: Scores of all groups, flat: the least salient group has the lowest.
        order: Their indices, the least salient first.
        ordered: The scores in that order, ascending.
        sizes: The groups' weights in that order.
    """

    scores: np.ndarray
    order: np.ndarray
    ordered: np.ndarray
    sizes: np.ndarray

    @classmethod
    def of(cls, scores: np.ndarray, saliency: np.ndarray, sizes: np.ndarray) -> Ranks:
        """Sorts the groups of a kernel; all arguments have one value per group, in any shape.

        `sizes` are the groups' weights.
        """
        order = np.argsort(saliency, axis=None, kind="stable")
        ordered = np.sort(np.asarray(scores, np.float64), axis=None)
        dealt = np.empty_like(ordered)
        dealt[order] = ordered
        return cls(dealt, order, ordered, sizes.reshape(-1)[order])

    def undecided(self, decided: np.ndarray) -> np.ndarray:
        """Weights of the undecided groups up to each place of the order."""
        return np.cumsum(self.sizes * ~decided.reshape(-1)[self.order])


class GroupRanks:
    """The ranks of the groups of a network; each ranking is made when first asked for.

    The network's budget says how much is still to be pruned.

    Example:
        >>> GroupRanks(network).of("lamp", "dense/kernel", groups).mean() < 0.5  # LAMP prunes them
        True
    """

    def __init__(self, network: Ranked):
        self._network = network
        self._ranks: dict[str, dict[str, Ranks]] = {}
        self._saliency: dict[str, np.ndarray] = {}

    def of(self, name: str, path: str, groups: np.ndarray | None = None) -> np.ndarray:
        """The ranks of some groups of a kernel by one of [NAMES][].

        `groups` are flat indices, by default of all. They are in [0, 1], one per group; 1
        where nothing more is to be pruned.
        """
        scores = self._ranks_of(name)[path].scores
        return _against(scores if groups is None else scores[groups], self.threshold(name))

    def forget(self) -> None:
        """To be called when groups are ordered by another saliency."""
        self._ranks.clear()
        self._saliency.clear()

    def threshold(self, name: str) -> float:
        """The score below which undecided groups have to go; 0 where none has."""
        network, ranks = self._network, self._ranks_of(name)
        missing = network.budget.missing
        if missing <= 0:
            return 0.0
        room = network.budget.capacity - network.budget.pruned
        curves: list[Curve] = [
            (ranks[path].ordered, ranks[path].undecided(decided), int(most))
            for (path, decided), most in zip(network.decided.items(), room, strict=True)
            if most > 0 and not decided.all()
        ]
        return threshold(curves, missing)

    def _saliency_of(self, path: str) -> np.ndarray:
        if path not in self._saliency:
            self._saliency[path] = self._network.saliency(path)
        return self._saliency[path]

    def _ranks_of(self, name: str) -> dict[str, Ranks]:
        if name not in self._ranks:
            network = self._network
            if name == "output_price":
                scores: Sequence[np.ndarray] | None = output_prices(network)
            else:
                scores = network.scores(name)
            assert scores is not None
            self._ranks[name] = {
                kernel.path: Ranks.of(
                    score, self._saliency_of(kernel.path), network.groupings[kernel.path].sizes
                )
                for kernel, score in zip(network.kernels, scores, strict=True)
            }
        return self._ranks[name]


def output_prices(network: Ranked) -> list[np.ndarray]:
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
        found.append(grouping.sum_numpy(squares) / grouping.sizes / max(energy, 1e-300))
    return found


Curve = tuple[np.ndarray, np.ndarray, int]
"""A kernel's scores in ascending order, the weights that go with each of them and all below, and
how many it can give at most."""


def threshold(curves: Sequence[Curve], wanted: int) -> float:
    """The first score that stays when so many weights go, the lowest scores first.

    There is a curve per kernel; groups that do not count add no weights. `wanted` is weights,
    above 0, and whole groups go. Where nothing stays, the score is the largest there is.
    """
    low, high = -1.0, max((float(ordered[-1]) for ordered, _, _ in curves), default=0.0)
    for _ in range(_HALVINGS):
        middle = 0.5 * (low + high)
        gone = sum(_gone(curve, _place(curve, middle)) for curve in curves)
        low, high = (low, middle) if gone >= wanted else (middle, high)
    # What is left between the two is sorted, with the first that stays of every kernel.
    gone, scores, sizes = 0, [np.zeros(0)], [np.zeros(0, np.int64)]
    for curve in curves:
        ordered, weights, most = curve
        start, end = _place(curve, low), _place(curve, high)
        gone += _gone(curve, start)
        before = int(weights[start - 1]) if start else 0
        last = int(np.searchsorted(weights, weights[end - 1] if end else 0, side="right"))
        found = weights[start : last + 1]
        counts = np.diff(found, prepend=before) > 0
        scores.append(ordered[start : last + 1][counts])
        sizes.append(np.diff(np.minimum(found, most), prepend=min(before, most))[counts])
    values = np.concatenate(scores)
    if not len(values):
        return high
    order = np.argsort(values, kind="stable")
    place = int(np.searchsorted(gone + np.cumsum(np.concatenate(sizes)[order]), wanted))
    return float(values[order[min(place + 1, len(order) - 1)]])


def _place(curve: Curve, score: float) -> int:
    return int(np.searchsorted(curve[0], score, side="right"))


def _gone(curve: Curve, place: int) -> int:
    return min(int(curve[1][place - 1]), int(curve[2])) if place else 0


def _against(scores: np.ndarray, limit: float) -> np.ndarray:
    total = scores + limit
    return np.divide(scores, total, out=np.full_like(scores, 0.5), where=total > 0)
