r"""Which channels the layers reading them miss least, one after the other.

Removing the channels S that a kernel W reads, and fitting the others anew, moves its outputs by the
energy \(\mathrm{tr}(W_S^T [(G^{-1})_{SS}]^{-1} W_S)\), with G the Gram matrix of its inputs
(Hassibi & Stork 1993, "Second order derivatives for network pruning: Optimal brain surgeon", for
groups of weights). Channels go one by one, the one that costs least first, and kernel and inverse
are updated in between, as in Kurtic et al. 2023, "ZipLM", arXiv 2302.04089.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from rl_sparsity_tf.channels.units import ChannelUnit
from rl_sparsity_tf.training.layer_problem import LayerProblem
from rl_sparsity_tf.training.ridge import ridge_strength

# The inverse of a larger Gram matrix, and its updates, would take too long.
_MOST_INPUTS = 6144


@dataclasses.dataclass(frozen=True, eq=False)
class ChannelErrors:
    """What the layers behind a unit lose with every channel that goes.

    Attributes:
        order: The channels in the order in which they go.
        errors: With 0, 1, ... channels gone: the energy by which the outputs of the kernels that
            read them move after a fit, over the outputs' own, summed over those kernels; one entry
            for every number from 0 to all.
    """

    order: np.ndarray
    errors: np.ndarray

    @property
    def saliency(self) -> np.ndarray:
        """What every channel costs when its turn comes, as a root mean square of 1 in all."""
        costs = np.maximum.accumulate(np.diff(self.errors))
        placed = np.empty(len(costs))
        # Ranks on top keep the order where costs are equal.
        placed[self.order] = np.sqrt(costs) + 1e-9 * np.arange(len(costs))
        return placed / max(float(np.sqrt(np.mean(placed**2))), 1e-30)


def eliminate(unit: ChannelUnit, problems: Mapping[str, LayerProblem]) -> ChannelErrors:
    """Removes a unit's channels one by one, the one that its readers miss least first.

    `problems` are those of the kernels that can be fitted, by path. Without those of its readers,
    channels go by the energy of the weights that make them.
    """
    known = [(r, problems[r.kernel.path]) for r in unit.readers if r.kernel.path in problems]
    fits = [
        _Fit(problem.original, problem.dense.gram, problem.ridge, reader.rows, unit.count, energy)
        for reader, problem in known
        if problem.dense.gram.ndim == 2
        and len(problem.original) <= _MOST_INPUTS
        and (energy := problem.energy) > 0
    ]
    left = np.arange(unit.count)
    gone: list[int] = []
    errors = [0.0]
    if not fits:
        energies = np.square(unit.matrix(), dtype=np.float64).sum(axis=0)
        order = np.argsort(energies, kind="stable")
        shares = energies[order] / max(float(energies.sum()), 1e-30)
        return ChannelErrors(order, np.concatenate([[0.0], np.cumsum(shares)]))
    while len(left):
        costs = np.sum([fit.costs(left) for fit in fits], axis=0)
        chosen = int(np.argmin(costs))
        errors.append(errors[-1] + max(float(costs[chosen]), 0.0))
        gone.append(int(left[chosen]))
        left = np.delete(left, chosen)
        if len(left):
            for fit in fits:
                fit.remove(gone[-1])
    return ChannelErrors(np.array(gone), np.array(errors))


class _Fit:
    """One reading kernel while the channels it reads go."""

    def __init__(
        self,
        weights: np.ndarray,
        gram: np.ndarray,
        ridge: float,
        rows: np.ndarray,
        count: int,
        energy: float,
    ):
        strength = ridge_strength(np.diag(gram), ridge)
        self._inverse = np.linalg.inv(gram + strength * np.eye(len(gram)))
        self._weights = weights.astype(np.float64)
        self._energy = energy
        # A channel of a unit that is read in part has no rows here, and costs nothing.
        order = np.argsort(rows, kind="stable")
        order = order[rows[order] >= 0]
        self._rows = [order[rows[order] == channel] for channel in range(count)]

    def costs(self, channels: Sequence[int] | np.ndarray) -> np.ndarray:
        """What each of the channels would cost if it were the next to go."""
        rows = [self._rows[channel] for channel in channels]
        sizes = np.array([len(some) for some in rows])
        found = np.zeros(len(rows))
        for size in np.unique(sizes[sizes > 0]):
            same = np.flatnonzero(sizes == size)
            index = np.stack([rows[one] for one in same])
            blocks = self._inverse[index[:, :, None], index[:, None, :]]
            weights = self._weights[index]
            solved = np.linalg.solve(blocks, weights)
            found[same] = np.einsum("cko,cko->c", weights, solved)
        return found / self._energy

    def remove(self, channel: int) -> None:
        """Takes a channel out: the other rows are fitted, and its own become zero."""
        rows = self._rows[channel]
        if not len(rows):
            return
        across = self._inverse[:, rows]
        solved = np.linalg.solve(
            across[rows], np.concatenate([self._weights[rows], across.T], axis=1)
        )
        outputs = self._weights.shape[1]
        self._weights -= across @ solved[:, :outputs]
        self._inverse -= across @ solved[:, outputs:]
        # What is gone stays out of the others' way, and of rounding's.
        self._weights[rows] = 0.0
        self._inverse[rows] = 0.0
        self._inverse[:, rows] = 0.0
