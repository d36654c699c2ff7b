"""Which groups of a learnable mask live: selected by score, with every kernel's sparsity held."""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from rl_sparsity_tf.masks import magnitude, select_live
from rl_sparsity_tf.operations import permute
from rl_sparsity_tf.wrapper import CompressionWrapper


def mask_scores(wrapper: CompressionWrapper, attribute: str) -> np.ndarray:
    """What a kernel's mask is selected by: the group's magnitude plus its logit.

    A hard concrete mask is selected by its logits alone.
    """
    state, grouping = wrapper.state(attribute), wrapper.grouping(attribute)
    logits = state["mask_logits"].numpy()
    if wrapper.mask == "hard_concrete":
        return logits
    matrix = wrapper.spec(attribute).to_matrix_numpy(np.asarray(wrapper.variable(attribute)))
    if "swaps" in state:
        matrix = permute(tf.constant(matrix), state["swaps"] > 0, grouping).numpy()
    squares = grouping.sum_numpy(np.square(matrix, dtype=np.float64))
    return magnitude(matrix, squares, grouping.sizes) + logits


def update_masks(wrapper: CompressionWrapper) -> None:
    """Lets learnable masks follow their scores, with each kernel's sparsity held."""
    for attribute in wrapper.kernels:
        state = wrapper.state(attribute)
        if "mask_logits" not in state or float(state["mask_frozen"]) > 0:
            continue
        sizes = wrapper.grouping(attribute).sizes
        scores, live = mask_scores(wrapper, attribute), state["mask"].numpy() > 0
        # Groups compete with groups of their own size: a short tail block that made way for a
        # full one would raise the sparsity with every selection.
        for size in np.unique(sizes):
            same = sizes == size
            if live[same].any():
                pruned = int(size * (~live[same]).sum())
                live[same] = select_live(scores[same], sizes[same], pruned)
        state["mask"].assign(live.astype(np.float32))


def freeze_masks(wrapper: CompressionWrapper) -> None:
    """Holds learnable masks as they are from now on."""
    for attribute in wrapper.kernels:
        state = wrapper.state(attribute)
        if "mask_frozen" in state:
            state["mask_frozen"].assign(1.0)
