r"""Permutes a model's channels, so that blocks and N:M patterns keep more of what weighs much.

The search is that of Pool and Yu 2021, "Channel permutations for N:M sparsity" (NeurIPS 34): greedy
swaps of two channels, and jumps out of local optima that are taken back unless they pay. For blocks
it needs a threshold. Be \(s_g\) the sum of squares of block g: the sum of the K largest blocks is
the least value over t of \(K t + \sum_g \max(0, s_g - t)\), so that with t held at the K-th largest
the blocks are independent of each other, as they are under a pattern. In both cases what a place in
a block gains by a channel with the square w is \(\max(T, w)\) up to a constant: T is the N-th
largest of the others in the block, or what the others lack to the threshold.

The outputs of a layer can be put in another order if the inputs of the layers that read them are
put in the same: the model computes what it did. But blocks of consecutive inputs then hold other
weights together, so that pruning by blocks, or to an N:M pattern, leaves more magnitude.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import tf_keras as keras
from rich.table import Table

from rl_sparsity_tf.channels.graph import ChannelGraph, has_graph
from rl_sparsity_tf.channels.groups import check_plain
from rl_sparsity_tf.channels.steps import Depthwise, Mix
from rl_sparsity_tf.checks import check_count, is_number
from rl_sparsity_tf.console import table_lines
from rl_sparsity_tf.data.extremes import check_weights
from rl_sparsity_tf.errors import ArgumentError, check_choice
from rl_sparsity_tf.keras3.door import returns_keras_3, takes_keras_3
from rl_sparsity_tf.layers.groups import PATTERNS, Grouping
from rl_sparsity_tf.layers.kernels import find_kernels
from rl_sparsity_tf.layers.operations import select_live
from rl_sparsity_tf.layers.rules import EXCLUDED, KernelSelection, Patterns
from rl_sparsity_tf.layers.wrapping import strip

PERMUTED = ("block4", "block16", *PATTERNS)
"""What channels can be permuted for."""

_SPARSITY = 0.8
# Work is bounded in numbers looked at, not in time, so that the result depends on the seed alone.
_NUMBERS = 2**18  # of a place's candidates at once; above it, columns are sampled
_WORK = 2**31  # per group of channels
_OVERHEAD = 2**10  # what a row of few numbers takes as long as
_JUMPS = 60
_TRIES = 16
_LEAST_GAIN = 1e-9
_ROUNDING = 1e-12
_TINY = 1e-300


def squares_of(matrix: np.ndarray) -> np.ndarray:
    """The squares of a matrix in double precision."""
    return np.square(matrix, dtype=np.float64)


@dataclasses.dataclass(frozen=True)
class PermutationGoal:
    """What a matrix will be pruned to. Matrices are of squares here.

    `group` is one of [PERMUTED][]; `sparsity` is the share of weights pruned by blocks, 0 for
    patterns.
    """

    group: str
    sparsity: float

    @classmethod
    def of(cls, group: str, sparsity: float | None) -> PermutationGoal:
        """Checks a user's arguments; an ArgumentError says which one cannot be used."""
        check_choice("group", group, PERMUTED)
        if group in PATTERNS:
            if sparsity is not None:
                raise ArgumentError(
                    f"sparsity={sparsity!r} was given with group={group!r}. Expected no sparsity: "
                    "the pattern says how much is pruned."
                )
            return cls(group, 0.0)
        if sparsity is None:
            return cls(group, _SPARSITY)
        if not is_number(sparsity) or not 0.0 < sparsity < 1.0:
            raise ArgumentError(
                f"sparsity={sparsity!r} cannot be used. Expected a number above 0 and below 1: the "
                "share of weights that will be pruned by blocks."
            )
        return cls(group, float(sparsity))

    def __str__(self) -> str:
        return self.group if self.group in PATTERNS else f"{self.group}, {self.sparsity:.0%} pruned"

    def kept(self, squares: np.ndarray) -> float:
        """Share of the squares' sum that stays."""
        grouping = Grouping(self.group, *squares.shape)
        total = squares.sum()
        live = grouping.largest(squares) if grouping.pattern else self._live(squares, grouping)
        return float((squares * grouping.expand_numpy(live)).sum() / total) if total > 0 else 1.0

    def _live(self, squares: np.ndarray, grouping: Grouping) -> np.ndarray:
        # As rules.prune_by_magnitude does, without the roots.
        wanted = int(np.ceil(round(self.sparsity * squares.size, 6)))
        means = grouping.sum_numpy(squares) / grouping.sizes
        return select_live(means, grouping.sizes, wanted)

    def threshold(self, squares: np.ndarray) -> float:
        """The least mean square of the blocks that stay (t above); patterns have none."""
        grouping = Grouping(self.group, *squares.shape)
        if grouping.pattern:
            return 0.0
        means = grouping.sum_numpy(squares) / grouping.sizes
        return float(means[self._live(squares, grouping)].min())

    def value(self, squares: np.ndarray, threshold: float) -> float:
        """What is kept, as far as it depends on the order with the threshold held."""
        grouping = Grouping(self.group, *squares.shape)
        if grouping.pattern:
            return self.kept(squares)
        beyond = grouping.sum_numpy(squares) - threshold * grouping.sizes
        return float(np.maximum(beyond, 0.0).sum() / max(squares.sum(), _TINY))

    def limits(self, squares: np.ndarray, threshold: float) -> np.ndarray:
        """What the square in every place must pass to add to what is kept (T above)."""
        grouping = Grouping(self.group, *squares.shape)
        if grouping.pattern:
            blocks = grouping.in_blocks(squares)
            ordered = -np.sort(-blocks, axis=1)
            ordered = np.pad(ordered, [(0, 0), (0, 1), (0, 0)])
            most = grouping.most[:, None]
            last, following = (
                np.take_along_axis(ordered, most + offset, axis=1) for offset in (-1, 0)
            )
            limits = np.where(blocks >= last, following, last)
            return limits.reshape(-1, squares.shape[1])[: len(squares)]
        lacking = threshold * grouping.sizes - grouping.sum_numpy(squares)
        return grouping.expand_numpy(lacking) + squares


def rows_of(channels: np.ndarray, numbers: np.ndarray, rows: int) -> np.ndarray:
    """Rows of a kernel's matrix that read channels: shape `(views, channels)`, -1 for none.

    A view is one position of the kernel, and one of the occurrences of a channel (Flatten has a
    channel once for every place).
    """
    places = [np.flatnonzero(channels == number) for number in numbers]
    table = np.full((max(map(len, places)), len(numbers)), -1)
    for column, found in enumerate(places):
        table[: len(found), column] = found
    starts = np.arange(0, rows, len(channels))[:, None, None]
    return np.where(table < 0, -1, table + starts).reshape(-1, len(numbers))


class PermutedReader:
    """A kernel that reads the channels of a group.

    `squares` are those of its matrix, `rows` its rows that read the channels (see [rows_of][]), and
    `size` is the number of channels. Where there are too many columns, `rng` samples them.
    """

    def __init__(
        self,
        squares: np.ndarray,
        rows: np.ndarray,
        goal: PermutationGoal,
        rng: np.random.Generator,
        size: int,
    ):
        self._squares, self._rows, self._goal = squares, rows, goal
        self._scale = 1.0 / max(float(squares.sum()), _TINY)
        of = Grouping(goal.group, *squares.shape)
        block = of.pattern[1] if of.pattern else of.block
        places = np.where(rows >= 0, rows // block, -1)
        # Views whose blocks divide the channels in the same way are looked at together.
        ways: dict[bytes, list[int]] = {}
        for view, some in enumerate(places):
            ways.setdefault(np.unique(some, return_inverse=True)[1].tobytes(), []).append(view)
        most = max(1, _NUMBERS // size)
        total = rows.shape[0] * squares.shape[1]
        chosen = np.arange(total) if total <= most else rng.choice(total, most, replace=False)
        views, outputs = np.divmod(chosen, squares.shape[1])
        self.parts = []
        for some in ways.values():
            mine = np.isin(views, some)
            same = places[some[0]][:, None] == places[some[0]]
            if mine.any() and not same.all():
                self.parts.append((rows[views[mine]].T, outputs[mine], same))

    def reordered(self, order: np.ndarray) -> np.ndarray:
        """The squares when channel `order[i]` goes to place i."""
        squares = self._squares.copy()
        there = self._rows >= 0
        squares[self._rows[there]] = self._squares[self._rows[:, order][there]]
        return squares

    def kept(self, order: np.ndarray) -> float:
        """Share of the squares' sum that stays in this order."""
        return self._goal.kept(self.reordered(order))

    def values(self) -> list[np.ndarray]:
        """For every part the channels' squares in its columns."""
        return [self._at(self._squares, *part) for part in self.parts]

    def threshold(self, order: np.ndarray) -> float:
        """The goal's threshold when the channels are in this order."""
        return self._goal.threshold(self.reordered(order))

    def value(self, order: np.ndarray, threshold: float) -> float:
        """The goal's value when the channels are in this order, with the threshold held."""
        return self._goal.value(self.reordered(order), threshold)

    def limits(self, order: np.ndarray, threshold: float) -> list[np.ndarray]:
        """For every part what channels must pass in every place."""
        limits = self._goal.limits(self.reordered(order), threshold)
        return [self._at(limits, *part) for part in self.parts]

    def _at(
        self, matrix: np.ndarray, rows: np.ndarray, outputs: np.ndarray, _: np.ndarray
    ) -> np.ndarray:
        return np.where(rows >= 0, matrix[rows, outputs], 0.0) * self._scale


class Search:
    """Looks for an order of a group's channels.

    `alike` has a number for every channel; only those of the same number can be exchanged. Jumps
    draw from `rng`.
    """

    def __init__(
        self, readers: Sequence[PermutedReader], alike: np.ndarray, rng: np.random.Generator
    ):
        self.readers, self._rng = readers, rng
        self._alike = alike
        self._values = [reader.values() for reader in readers]
        self._same = [part[2] for reader in readers for part in reader.parts]
        self._touch = np.logical_or.reduce(self._same)
        self._barred = alike[:, None] != alike
        self._left = _WORK

    def run(self) -> np.ndarray:
        """The best order found in which no kernel keeps less than in the present one."""
        identity = np.arange(len(self._alike))
        if not self._same or self._barred[~np.eye(len(identity), dtype=bool)].all():
            return identity
        floor = self._kept(identity)
        best, most = identity, floor.sum()

        def consider(order: np.ndarray) -> None:
            nonlocal best, most
            kept = self._kept(order)
            if (kept >= floor - _ROUNDING).all() and kept.sum() > most + _LEAST_GAIN:
                best, most = order, kept.sum()

        for start in self._starts():
            consider(start)
            consider(self._climb(start))
        for _ in range(_JUMPS):
            if self._left <= 0:
                break
            consider(self._climb(self._jump(best)))
        return best

    def _kept(self, order: np.ndarray) -> np.ndarray:
        return np.array([reader.kept(order) for reader in self.readers])

    def _starts(self) -> list[np.ndarray]:
        """The present order, and one sorted by magnitude."""
        weights = sum(part.sum(1) for parts in self._values for part in parts)
        identity = np.arange(len(self._alike))
        by_size = identity.copy()
        for kind in np.unique(self._alike):
            members = np.flatnonzero(self._alike == kind)
            by_size[members] = members[np.argsort(-weights[members], kind="stable")]
        return [identity, by_size]

    def _jump(self, order: np.ndarray) -> np.ndarray:
        """Swaps some channels at random."""
        order = order.copy()
        for _ in range(int(self._rng.integers(2, 7))):
            one = int(self._rng.integers(len(order)))
            others = np.flatnonzero(~self._barred[one])
            other = int(self._rng.choice(others))
            order[[one, other]] = order[[other, one]]
        return order

    def _climb(self, order: np.ndarray) -> np.ndarray:
        """Swaps channels as long as that pays."""
        most = self._kept(order).sum()
        while self._left > 0:
            thresholds = [reader.threshold(order) for reader in self.readers]
            found = self._swap(order.copy(), thresholds)
            kept = self._kept(found).sum()
            if kept <= most + _LEAST_GAIN:
                break
            order, most = found, kept
            if not any(thresholds):
                break
        return order

    def _swap(self, order: np.ndarray, thresholds: Sequence[float]) -> np.ndarray:
        """Swaps channels as long as that pays, with the thresholds held."""
        tables = [np.empty((len(order), len(order))) for _ in self._same]
        stale = np.arange(len(order))
        value = self._value(order, thresholds)
        while self._left > 0:
            self._refresh(tables, stale, order, thresholds)
            gains = self._gains(tables, order)
            for pairs in (self._together(gains), *self._one_by_one(gains)):
                tried = order.copy()
                for one, other in pairs:
                    tried[[one, other]] = tried[[other, one]]
                found = self._value(tried, thresholds)
                if found > value + _LEAST_GAIN:
                    break
            else:
                return order
            order, value = tried, found
            touched = [self._touch[one] | self._touch[other] for one, other in pairs]
            stale = np.flatnonzero(np.logical_or.reduce(touched))
        return order

    def _value(self, order: np.ndarray, thresholds: Sequence[float]) -> float:
        pairs = zip(self.readers, thresholds, strict=True)
        return sum(reader.value(order, threshold) for reader, threshold in pairs)

    def _together(self, gains: np.ndarray) -> list[tuple[int, int]]:
        """The best swaps, each in blocks of its own, so that the gains add up."""
        gains = gains.copy()
        pairs: list[tuple[int, int]] = []
        while True:
            one, other = map(int, np.unravel_index(np.argmax(gains), gains.shape))
            self._left -= gains.size
            if gains[one, other] <= _LEAST_GAIN:
                return pairs
            pairs.append((one, other))
            touched = self._touch[one] | self._touch[other]
            gains[touched], gains[:, touched] = 0.0, 0.0

    def _one_by_one(self, gains: np.ndarray) -> Iterator[list[tuple[int, int]]]:
        """The best swaps by themselves.

        Where columns are sampled, or blocks reach over from one position of a kernel to the next,
        gains are estimates, and those of several swaps may not add up.
        """
        upper = np.triu(gains, 1).ravel()
        for flat in np.argsort(-upper, kind="stable")[:_TRIES]:
            if upper[flat] <= 0.0:
                return
            one, other = divmod(int(flat), len(gains))
            yield [(one, other)]

    def _refresh(
        self,
        tables: list[np.ndarray],
        places: np.ndarray,
        order: np.ndarray,
        thresholds: Sequence[float],
    ) -> None:
        """Computes what every channel is worth in some places, for every part."""
        table = iter(tables)
        for reader, values, threshold in zip(self.readers, self._values, thresholds, strict=True):
            for value, limit in zip(values, reader.limits(order, threshold), strict=True):
                rows = next(table)
                for place in places:
                    rows[place] = np.maximum(limit[place], value).sum(1)
                self._left -= len(places) * (value.size + _OVERHEAD)

    def _gains(self, tables: list[np.ndarray], order: np.ndarray) -> np.ndarray:
        """What is gained by exchanging the channels of two places."""
        gains = np.zeros((len(order), len(order)))
        for table, same in zip(tables, self._same, strict=True):
            there = table[:, order]
            change = there + there.T - np.diag(there)[:, None] - np.diag(there)
            gains += np.where(same, 0.0, change)
        gains[self._barred] = 0.0
        return gains


_WIDTH = 100


@returns_keras_3
def permute_channels(
    model: keras.Model,
    *,
    group: str = "block16",
    sparsity: float | None = None,
    seed: int = 0,
    exclude: Patterns | None = None,
) -> keras.Model:
    """Puts channels in an order in which blocks or patterns along the inputs keep more magnitude.

    Kernels, biases, batch normalizations, depthwise kernels and slopes that make or follow channels
    are reordered with the kernels that read them. The model computes the same but for rounding, and
    no kernel keeps less than before, if each is pruned to the sparsity by its smallest blocks, or
    to the pattern. The model's inputs and outputs, and channels that cannot be followed, stay in
    their order.

    Args:
        model: A built, plain model of Keras 3 or `tf_keras`; it is not changed. A subclassed one,
            whose graph is not known, is copied as it is.
        group: `"block4"`, `"block16"` or `"2:4"`.
        sparsity: The sparsity that blocks will be pruned to, 0.8 by default. A pattern has its own.
        seed: Seed of the search.
        exclude: Layers or kernels that are left as they are: their names, paths, or patterns of
            them. Channels that they make, read or pass on stay in their order.

    Returns:
        A plain model, compiled as the model is.

    Raises:
        ArgumentError: If an argument cannot be used.
        ModelError: If the model is not built, is wrapped, holds NaN, or cannot be copied.

    Example:
        >>> permuted = rls.permute_channels(model, group="2:4")
        >>> wrapped = rls.wrap(permuted, rls.baselines.n_m(permuted, pattern="2:4"))
    """
    check_plain(model, "permute_channels")
    check_weights(model)
    goal = PermutationGoal.of(group, sparsity)
    seed = check_count("seed", seed, 0)
    permuted = strip(model)
    if has_graph(permuted):
        left = KernelSelection.of(permuted, exclude=exclude).left
        graph = ChannelGraph(
            permuted, {p: reason for p, reason in left.items() if reason == EXCLUDED}
        )
        _reorder(graph, _find_order(graph, goal, np.random.default_rng(seed)))
    return permuted


@dataclasses.dataclass(frozen=True)
class KeptMagnitude:
    """What pruning leaves of a kernel.

    Attributes:
        path: The kernel's path.
        before: Share of the sum of its squares that stays, before the channels are permuted.
        after: The same after.
    """

    path: str
    before: float
    after: float


@takes_keras_3
def permutation_report(
    model: keras.Model,
    permuted: keras.Model,
    *,
    group: str = "block16",
    sparsity: float | None = None,
    print_fn: Callable[[str], Any] | None = None,
) -> tuple[KeptMagnitude, ...]:
    """How much magnitude pruning leaves, before and after the channels were permuted.

    Args:
        model: The model before.
        permuted: What [permute_channels][] made of it.
        group: As it was given there.
        sparsity: As it was given there.
        print_fn: Called with every line of a table.

    Returns:
        One entry for every compressible kernel; those whose inputs stay as they are, too.

    Raises:
        ArgumentError: If an argument cannot be used, or the models do not have the same kernels.
        ModelError: If a model is not built or is wrapped.

    Example:
        >>> permuted = rls.permute_channels(model, group="2:4")
        >>> report = rls.permutation_report(model, permuted, group="2:4", print_fn=print)
        Share of magnitude kept (2:4)
        ...
    """
    goal = PermutationGoal.of(group, sparsity)
    kept = []
    for one in (model, permuted):
        check_plain(one, "permutation_report")
        matrices = {(kernel.path, kernel.shape): kernel.matrix() for kernel in find_kernels(one)}
        kept.append({key: goal.kept(squares_of(matrix)) for key, matrix in matrices.items()})
    before, after = kept
    if set(before) != set(after):
        path, shape = sorted(set(before) ^ set(after))[0]
        raise ArgumentError(
            f"Only one of the models has the kernel {path!r} of shape {shape}. Expected a model "
            "and what permute_channels made of it."
        )
    entries = tuple(KeptMagnitude(key[0], before[key], after[key]) for key in before)
    if print_fn is not None:
        print_fn(f"Share of magnitude kept ({goal})")
        table = Table()
        table.add_column("kernel", overflow="fold")
        for title in ("before", "after"):
            table.add_column(title, justify="right")
        for entry in entries:
            table.add_row(entry.path, f"{entry.before:.4f}", f"{entry.after:.4f}")
        for line in table_lines(table, _WIDTH):
            print_fn(line)
    return entries


# Which channels can be exchanged, and where they are read.


def _find_order(graph: ChannelGraph, goal: PermutationGoal, rng: np.random.Generator) -> np.ndarray:
    """For the place of every channel the number of the channel that goes there."""
    order = np.arange(len(graph.frozen))
    readers = [
        (graph.channels[place.inputs[0]], place.step.matrices())
        for place in graph.placed
        if isinstance(place.step, Mix)
    ]
    matrices = [squares_of(matrix.reshape(-1, matrix.shape[-1])) for _, matrix in readers]
    for numbers in graph.components():
        if graph.frozen[numbers].any():
            continue
        alike = _alike(graph, numbers)
        found = [
            (index, rows_of(channels, numbers, len(matrices[index])))
            for index, (channels, _) in enumerate(readers)
            if np.isin(channels, numbers).any()
        ]
        if not found:
            continue
        search = Search(
            [
                PermutedReader(matrices[index], rows, goal, rng, len(numbers))
                for index, rows in found
            ],
            alike,
            rng,
        )
        best = search.run()
        order[numbers] = numbers[best]
        for (index, _), reader in zip(found, search.readers, strict=True):
            matrices[index] = reader.reordered(best)
    return order


def _alike(graph: ChannelGraph, numbers: np.ndarray) -> np.ndarray:
    """Gives channels that can be exchanged with each other one number.

    They are in the same tensors, and as often: a concatenation's parts have channels of their own,
    even where a sum ties all of them.
    """
    position = np.zeros(len(graph.frozen), np.int64)
    position[numbers] = np.arange(1, len(numbers) + 1)
    counts = [
        np.bincount(position[channels], minlength=len(numbers) + 1)[1:]
        for channels in graph.channels
    ]
    return np.unique(np.stack(counts), axis=1, return_inverse=True)[1].reshape(-1)


# How an order is put into the weights.


def _reorder(graph: ChannelGraph, order: np.ndarray) -> None:
    for place in graph.placed:
        step, layer = place.step, place.step.layer
        before, after = (
            _taken(graph.channels[some[0]], order) for some in (place.inputs, place.outputs)
        )
        axes: dict[str, list[tuple[int, np.ndarray]]] = {}
        if isinstance(step, Mix):
            axes[step.kernel] = [(step.input_axis, before), (step.output_axis, after)]
            if step.bias:
                axes["bias"] = [(-1, after)]
        elif isinstance(step, Depthwise):
            axes[step.kernel] = [(-2, before)]
        for attribute, side in step.scaled().items():
            axes[attribute] = [(-1, before if side == "input" else after)]
        for attribute, some in axes.items():
            variable = getattr(layer, attribute)
            value = np.asarray(variable)
            for axis, taken in some:
                value = np.take(value, taken, axis)
            variable.assign(value)


def _taken(channels: np.ndarray, order: np.ndarray) -> np.ndarray:
    """For every place of a tensor the place its channel is taken from."""
    taken = np.empty(len(channels), np.int64)
    taken[np.argsort(order[channels], kind="stable")] = np.argsort(channels, kind="stable")
    return taken
