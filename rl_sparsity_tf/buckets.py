"""Cutting a kernel's groups into buckets of similar saliency."""

from __future__ import annotations

import itertools

import numpy as np

from rl_sparsity_tf.grouping import Grouping
from rl_sparsity_tf.masks import magnitude


def saliency_of(matrix: np.ndarray, grouping: Grouping) -> np.ndarray:
    """Root mean square of every group relative to the kernel's, flat.

    Args:
        matrix: Kernel, shape `(inputs, outputs)`.
        grouping: How it is cut.

    Returns:
        Float64 of shape `(grouping.count,)`.
    """
    squares = grouping.sum_numpy(np.square(matrix, dtype=np.float64))
    return magnitude(matrix, squares, grouping.sizes).reshape(-1)


def bucket_edges(groups: int, buckets: int, sparsity: float) -> np.ndarray:
    """Where the buckets of a kernel begin, in groups sorted by saliency.

    The share of groups at or above a bucket falls geometrically, so that the buckets become
    smaller towards the salient end, where the decisions are; about two of them lie beyond the
    density that the target leaves on average.

    Args:
        groups: Groups of the kernel.
        buckets: Buckets wanted; a kernel with fewer groups gets one per group.
        sparsity: The target.

    Returns:
        Increasing positions from 0 to `groups`, `min(buckets, groups) + 1` of them.

    Example:
        >>> bucket_edges(100, 4, 0.9)
        array([  0,  60,  84,  94, 100])
    """
    count = min(buckets, groups)
    if count < 3:
        return np.round(np.linspace(0, groups, count + 1)).astype(np.int64)
    ratio = np.clip(((1.0 - sparsity) / 2.0) ** (1.0 / max(1, count - 2)), 0.4, 0.85)
    edges = np.round(groups * (1.0 - ratio ** np.arange(count))).astype(np.int64)
    edges = np.append(edges, groups)
    for j in range(1, count):  # every bucket holds at least one group
        edges[j] = min(max(edges[j], edges[j - 1] + 1), groups - (count - j))
    return edges


def split_buckets(saliency: np.ndarray, edges: np.ndarray) -> list[np.ndarray]:
    """Flat group indices of every bucket, least salient first; ties by position."""
    order = np.argsort(saliency, kind="stable")
    return [order[a:b] for a, b in itertools.pairwise(edges)]
