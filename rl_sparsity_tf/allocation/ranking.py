"""Which groups of a network go first: scores, and the selection by them.

Every heuristic here is one ranking of all groups of the network. A sparsity prunes the beginning
of it, so that one sorting answers for every sparsity.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from rl_sparsity_tf.errors import ArgumentError, TargetError, check_choice
from rl_sparsity_tf.layers.groups import Grouping
from rl_sparsity_tf.layers.kernels import Kernel
from rl_sparsity_tf.layers.operations import Operation, magnitude

HEURISTICS = ("uniform", "erk", "global_magnitude", "lamp", "first_order")
"""The names that [scores][] knows."""

# The least sparse plan is looked for to this share of the weights, or of those that live.
_STEPS, _STEPS_OF_LIVING = 1024, 512


def scores(
    name: str,
    kernels: Sequence[Kernel],
    groupings: Mapping[str, Grouping],
    matrices: Mapping[str, np.ndarray],
    gradients: Mapping[str, np.ndarray] | None = None,
) -> list[np.ndarray]:
    """Scores every group of a network by one of [HEURISTICS][]; those of lowest score go first.

    There is one float64 score per group, of the grouping's shape, for every kernel. `matrices` are
    the weights and `gradients` the loss's mean gradient by them, for `"first_order"`; both are by
    path and viewed as `(inputs, outputs)`. A name that is not known, or gradients that are needed
    and not given, raise an ArgumentError.
    """
    check_choice("heuristic", name, HEURISTICS)
    pairs = [(matrices[kernel.path], groupings[kernel.path]) for kernel in kernels]
    if name == "first_order":
        if gradients is None:
            raise ArgumentError(
                "heuristic='first_order' was given no gradients. Expected the gradient of the "
                "loss by every kernel, by path and viewed as (inputs, outputs)."
            )
        found = [gradients[kernel.path] for kernel in kernels]
        return [first_order_scores(*pair, g) for pair, g in zip(pairs, found, strict=True)]
    squares = [mean_squares(matrix, grouping) for matrix, grouping in pairs]
    if name == "global_magnitude":
        return squares
    sizes = [grouping.sizes for _, grouping in pairs]
    if name == "lamp":
        return [lamp_scores(*pair) for pair in zip(squares, sizes, strict=True)]
    ratios = [erk_ratio(kernel.shape) if name == "erk" else 1.0 for kernel in kernels]
    return [density_scores(*one) for one in zip(squares, sizes, ratios, strict=True)]


def mean_squares(matrix: np.ndarray, grouping: Grouping) -> np.ndarray:
    """Mean square of the weights of every group."""
    return grouping.sum_numpy(np.square(matrix, dtype=np.float64)) / grouping.sizes


def density_scores(saliency: np.ndarray, sizes: np.ndarray, ratio: float) -> np.ndarray:
    r"""Scores that give kernels densities in proportion to their ratios, none above 1.

    A group with a share \(q\) of its kernel's weights below it scores \(r / (1 - q)\). It lives at
    the threshold \(1/\epsilon\) if \(1 - q \le \epsilon r\), which leaves every kernel the density
    \(\min(1, \epsilon r)\): where \(\epsilon r\) would pass 1 the kernel is whole, and the others
    share what is left.

    `saliency`, of any shape, says what is pruned first within the kernel; `sizes`, of the same
    shape, are the weights per group; the ratio r is above 0.
    """
    order = np.argsort(saliency, axis=None, kind="stable")
    ordered = sizes.reshape(-1)[order]
    # The middle of the group, so that densities are rounded to the nearest group.
    above = 1.0 - (np.cumsum(ordered) - 0.5 * ordered) / ordered.sum()
    return _placed(order, ratio / above, saliency.shape)


def erk_ratio(shape: Sequence[int]) -> float:
    """Sum of a kernel's dimensions over their product (Evci et al. 2020, section 3)."""
    return sum(shape) / float(np.prod(shape, dtype=np.float64))


def lamp_scores(squares: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Squared norm of a group over the sum of those at least as large (Lee et al. 2021, eq. 2).

    `squares` are the groups' mean squares, `sizes` their weights, of the same shape.
    """
    norms = (squares * sizes).reshape(-1)
    order = np.argsort(norms, kind="stable")
    ordered = norms[order]
    beyond = np.cumsum(ordered[::-1])[::-1]
    values = np.divide(ordered, beyond, out=np.zeros_like(ordered), where=beyond > 0)
    return _placed(order, values, squares.shape)


def first_order_scores(matrix: np.ndarray, grouping: Grouping, gradient: np.ndarray) -> np.ndarray:
    """How much the loss changes, to first order, if a group becomes zero: |sum of g * w|."""
    return np.abs(grouping.sum_numpy(np.multiply(gradient, matrix, dtype=np.float64)))


def _placed(order: np.ndarray, values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Values in sorted order, put back to where they were sorted from."""
    placed = np.empty_like(values)
    placed[order] = values
    return placed.reshape(shape)


class Ranking:
    """All groups of a network in the order in which they are pruned.

    Every kernel keeps its group of highest score. Ties go to the kernel, and in it to the group,
    that comes first.

    Args:
        scores: For every kernel one score per group.
        sizes: For every kernel the weights of each group, same shapes.
        capacity: Weights that every kernel can give at most; by default all but that one group.

    Attributes:
        elements: All weights.
        reachable: Those that can be pruned.

    Example:
        >>> ranking = Ranking([np.array([[3.0, 1.0, 2.0]])], [np.ones((1, 3), int)])
        >>> ranking.live(1)
        [array([[ True, False,  True]])]
    """

    def __init__(
        self,
        scores: Sequence[np.ndarray],
        sizes: Sequence[np.ndarray],
        capacity: Sequence[int] | np.ndarray | None = None,
    ):
        self._shapes = [score.shape for score in scores]
        self._edges = np.cumsum([0, *(score.size for score in scores)])
        flat = np.concatenate([np.reshape(score, -1) for score in scores])
        weights = np.concatenate([np.reshape(size, -1) for size in sizes])
        able = np.ones(flat.size, bool)
        for index, (start, end) in enumerate(itertools.pairwise(self._edges)):
            able[end - 1 - np.argmax(flat[start:end][::-1])] = False
            if capacity is not None:
                within = able[start:end]
                within &= _within(flat[start:end], weights[start:end], within, capacity[index])
        self.elements = int(weights.sum())
        self.reachable = int(weights[able].sum())
        self._scores = np.where(able, flat, np.inf)
        # Groups of one size need not be sorted: counting them is enough.
        self._size = int(weights[0]) if (weights == weights[0]).all() else 0
        if not self._size:
            order = np.argsort(flat, kind="stable")
            self._order = order[able[order]]
            self._gone = np.cumsum(weights[self._order])

    def live(self, weights_to_prune: int) -> list[np.ndarray]:
        """What lives when so many weights go, or a few more: whole groups are pruned.

        A TargetError says that the kernels cannot give so many.
        """
        if weights_to_prune > self.reachable:
            raise TargetError(
                f"{weights_to_prune} weights are to be pruned, but the kernels can give only "
                f"{self.reachable} of their {self.elements}: every kernel keeps a group. Expected "
                "at most that many."
            )
        live = np.ones(int(self._edges[-1]), bool)
        if weights_to_prune > 0:
            live[self._first(weights_to_prune)] = False
        parts = np.split(live, self._edges[1:-1])
        return [part.reshape(shape) for part, shape in zip(parts, self._shapes, strict=True)]

    def _first(self, weights_to_prune: int) -> np.ndarray:
        """The groups that go: the shortest beginning of the ranking with enough weights."""
        if not self._size:
            return self._order[: int(np.searchsorted(self._gone, weights_to_prune)) + 1]
        count = -(-weights_to_prune // self._size)
        edge = np.partition(self._scores, count - 1)[count - 1]
        below = np.flatnonzero(self._scores < edge)
        ties = np.flatnonzero(self._scores == edge)
        return np.concatenate([below, ties[: count - below.size]])

    def least_pruned(
        self, fits: Callable[[list[np.ndarray]], bool], guess: float | None = None
    ) -> tuple[list[np.ndarray], bool]:
        """Looks by bisection for the fewest pruned groups that something accepts.

        Pruning more is taken to help. Returns what lives, and whether it is accepted: if nothing
        is, all that can be is pruned. The result is exact to one thousandth of the weights, below
        2,048 of them to one. With a `guess` of the weights to prune it is looked for around that,
        and is exact to a 512th of the weights that live.
        """
        low = high = 0 if guess is None else int(np.clip(guess, 0, self.reachable))
        step = self.reachable if guess is None else max(1, (self.elements - high) // 64)
        live = self.live(high)
        accepted = fits(live)
        while accepted and low > 0:  # the best so far prunes `high`
            low = max(0, low - step)
            tried = self.live(low)
            if not fits(tried):
                break
            live, high, step = tried, low, 2 * step
        while not accepted and high < self.reachable:
            low, high = high, min(self.reachable, high + step)
            live = self.live(high)
            accepted, step = fits(live), 2 * step
        while accepted and high - low > max(1, self._finest(high, guess)):
            middle = (low + high) // 2
            tried = self.live(middle)
            if fits(tried):
                high, live = middle, tried
            else:
                low = middle
        return live, accepted

    def _finest(self, pruned: int, guess: float | None) -> int:
        if guess is None:
            return self.elements // _STEPS
        return (self.elements - pruned) // _STEPS_OF_LIVING


def _within(scores: np.ndarray, sizes: np.ndarray, able: np.ndarray, capacity: int) -> np.ndarray:
    """The first of a kernel's groups that together have no more weights than its capacity."""
    order = np.argsort(scores, kind="stable")
    order = order[able[order]]
    chosen = np.zeros(scores.size, bool)
    # Largest groups that still fit first fill it up; the shorter ones at the ends fill the rest.
    for size in np.unique(sizes)[::-1]:
        left = order[~chosen[order] & (sizes[order] <= size)]
        room = int(capacity) - int(sizes[chosen].sum())
        chosen[left[np.cumsum(sizes[left]) <= room]] = True
    return chosen


def select(
    scores: Sequence[np.ndarray],
    sizes: Sequence[np.ndarray],
    weights_to_prune: int,
    capacity: Sequence[int] | np.ndarray | None = None,
) -> list[np.ndarray]:
    """Prunes the groups of lowest score in the whole network until enough weights are gone.

    Arguments, result and errors are those of [Ranking][] and its `live`.
    """
    return Ranking(scores, sizes, capacity).live(weights_to_prune)


def survivors(kernel: Kernel, quantize: bool) -> Operation:
    """What happens to the living groups of a kernel."""
    return Operation.QUANTIZE if quantize and kernel.spec.exports_int8 else Operation.KEEP


def densities(live: Sequence[np.ndarray]) -> list[float]:
    """Share of the groups of every kernel that live."""
    return [float(alive.mean()) for alive in live]


def saliency_of(matrix: np.ndarray, grouping: Grouping) -> np.ndarray:
    """Root mean square of every group relative to the kernel's, flat.

    The kernel has the shape `(inputs, outputs)`, the result `(grouping.count,)` in float64.
    """
    squares = grouping.sum_numpy(np.square(matrix, dtype=np.float64))
    return magnitude(matrix, squares, grouping.sizes).reshape(-1)
