"""Which groups of a learnable mask live: selected by score, with every kernel's sparsity held."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import tensorflow as tf

from rl_sparsity_tf.layers.groups import Grouping
from rl_sparsity_tf.layers.masks import magnitude
from rl_sparsity_tf.layers.operations import permute
from rl_sparsity_tf.layers.wrapper import CompressionWrapper

# A hard concrete gate's logit at the start, per unit of relative magnitude from the border between
# living and pruned groups.
_GATE_SLOPE = 0.5


def magnitudes(wrapper: CompressionWrapper, attribute: str) -> np.ndarray:
    """Root mean square of a kernel's groups, before the mask, relative to the whole kernel's."""
    state, grouping = wrapper.state(attribute), wrapper.grouping(attribute)
    matrix = wrapper.spec(attribute).to_matrix_numpy(wrapper.variable(attribute).numpy())
    if "swaps" in state:
        matrix = permute(tf.constant(matrix), state["swaps"] > 0, grouping).numpy()
    if grouping.block == 1:  # the common case, and the one with the most groups
        overall = float(np.sqrt(np.mean(np.square(matrix), dtype=np.float64)))
        return np.abs(matrix) / np.float32(overall if overall > 0 else 1.0)
    squares = grouping.sum_numpy(np.square(matrix, dtype=np.float64))
    return magnitude(matrix, squares, grouping.sizes)


def mask_scores(wrapper: CompressionWrapper, attribute: str) -> np.ndarray:
    """What a kernel's mask is selected by: the group's magnitude plus its logit.

    A hard concrete mask is selected by its logits alone.
    """
    logits = wrapper.state(attribute)["mask_logits"].numpy()
    if wrapper.mask == "hard_concrete":
        return logits
    return magnitudes(wrapper, attribute) + logits


def update_masks(wrapper: CompressionWrapper) -> None:
    """Lets learnable masks follow their scores, with each kernel's sparsity held.

    Under a pattern such as 2:4 every block of it holds its own.
    """
    for attribute in wrapper.kernels:
        state = wrapper.state(attribute)
        if "mask_logits" not in state or float(state["mask_frozen"]) > 0:
            continue
        grouping = wrapper.grouping(attribute)
        scores, live = mask_scores(wrapper, attribute), state["mask"].numpy() > 0
        if grouping.pattern:
            counts = grouping.in_blocks(live).sum(1)
            state["mask"].assign(grouping.largest(scores, counts).astype(np.float32))
            continue
        # Groups compete with groups of their own size: a short tail block that made way for a
        # full one would raise the sparsity with every selection.
        for same in _by_size(grouping.sizes):
            pruned = live[same].size - np.count_nonzero(live[same])
            if pruned < live[same].size:
                live[same] = _without_smallest(scores[same], pruned)
        state["mask"].assign(live.astype(np.float32))


def _by_size(sizes: np.ndarray) -> list[slice]:
    # Only the last block of every output can be shorter.
    if sizes[0, 0] == sizes[-1, 0]:
        return [slice(None)]
    return [slice(0, -1), slice(-1, None)]


def _without_smallest(scores: np.ndarray, count: int) -> np.ndarray:
    """Marks what stays without the `count` smallest; of equals the first go.

    The same as a stable sort would give, in a tenth of its time.
    """
    if count == 0:
        return np.ones(scores.shape, bool)
    flat = scores.reshape(-1)
    border = np.partition(flat, count - 1)[count - 1]
    if np.isnan(border):  # a diverged training: nothing compares, but the sparsity is held
        flat = np.arange(flat.size)
        border = count - 1
    live = ~(flat < border)
    ties = np.flatnonzero(flat == border)
    live[ties[: count - (flat.size - np.count_nonzero(live))]] = False
    return live.reshape(scores.shape)


def start_gates(wrapper: CompressionWrapper) -> None:
    """Gives hard concrete gates that were not trained yet a start by magnitude.

    `wrap` starts every gate equally far open or closed. With nearly all groups pruned the gates
    that are drawn open by chance then outnumber those that live, and the network that is trained
    is not the one that is evaluated. Here the open gates with large weights and the closed ones
    with small weights are nearly certain, and those at the border between the two undecided.

    Args:
        wrapper: A wrapper; nothing is done unless its masks learn as hard concrete gates and all
            logits are still as far from 0 as each other.
    """
    if wrapper.mask != "hard_concrete":
        return
    for attribute in wrapper.kernels:
        state = wrapper.state(attribute)
        if "mask_logits" not in state or np.ptp(np.abs(state["mask_logits"].numpy())) > 0:
            continue
        live = state["mask"].numpy() > 0
        if live.all() or not live.any():
            continue
        scores = magnitudes(wrapper, attribute)
        border = _borders(scores, live, wrapper.grouping(attribute))
        distance = _GATE_SLOPE * np.abs(scores - border)
        state["mask_logits"].assign(np.where(live, distance, -distance).astype(np.float32))


def _borders(scores: np.ndarray, live: np.ndarray, grouping: Grouping) -> np.ndarray:
    """The smallest score that lives if masks follow the scores, for every group."""
    if not grouping.pattern:
        pruned = live.size - np.count_nonzero(live)
        return np.partition(scores, pruned, axis=None)[pruned]
    ordered = np.sort(grouping.in_blocks(scores, fill=-np.inf), axis=1)
    of, counts = ordered.shape[1], grouping.in_blocks(live).sum(1)[:, None]
    last = np.take_along_axis(ordered, np.minimum(of - counts, of - 1), axis=1)
    return np.repeat(last[:, 0], of, axis=0)[: grouping.inputs]


def freeze_masks(
    wrapper: CompressionWrapper, chosen: Callable[[tf.Variable], bool] | None = None
) -> None:
    """Holds learnable masks as they are from now on.

    Args:
        wrapper: Whose masks to hold.
        chosen: Which of them, by their logits; by default all.
    """
    for attribute in wrapper.kernels:
        state = wrapper.state(attribute)
        if "mask_frozen" in state and (chosen is None or chosen(state["mask_logits"])):
            state["mask_frozen"].assign(1.0)
