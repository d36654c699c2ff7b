"""Permutes a model's channels, so that blocks and N:M patterns keep more of what weighs much.

The outputs of a layer can be put in another order if the inputs of the layers that read them are
put in the same: the model computes what it did. But blocks of consecutive inputs then hold other
weights together, so that pruning by blocks, or to an N:M pattern, leaves more magnitude.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import tf_keras as keras
from rich.table import Table

from rl_sparsity_tf.channels.graph import ChannelGraph, has_graph
from rl_sparsity_tf.channels.groups import check_plain
from rl_sparsity_tf.channels.permutation import Goal, Reader, Search, rows_of, squares_of
from rl_sparsity_tf.channels.steps import Depthwise, Mix
from rl_sparsity_tf.checks import check_count
from rl_sparsity_tf.data.extremes import check_weights
from rl_sparsity_tf.errors import ArgumentError
from rl_sparsity_tf.layers.kernel_selection import EXCLUDED, KernelSelection, Patterns
from rl_sparsity_tf.layers.kernels import find_kernels
from rl_sparsity_tf.layers.wrapping import strip
from rl_sparsity_tf.tables import table_lines

_WIDTH = 100


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
        model: A built, plain `tf_keras` model; it is not changed. A subclassed one, whose graph is
            not known, is copied as it is.
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
        >>> model = rls.permute_channels(model, group="2:4")
        >>> wrapped = rls.wrap(model, rls.baselines.n_m(model, pattern="2:4"))
    """
    check_plain(model, "permute_channels")
    check_weights(model)
    goal = Goal.of(group, sparsity)
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
        >>> rls.permutation_report(model, permuted, group="2:4", print_fn=print)
    """
    goal = Goal.of(group, sparsity)
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


def _find_order(graph: ChannelGraph, goal: Goal, rng: np.random.Generator) -> np.ndarray:
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
            [Reader(matrices[index], rows, goal, rng, len(numbers)) for index, rows in found],
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
