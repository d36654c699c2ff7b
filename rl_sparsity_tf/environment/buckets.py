"""Cutting a kernel's groups into buckets of similar saliency."""

from __future__ import annotations

import itertools

import numpy as np

# Of the steps towards the edge: 1 would be a plain geometric row.
_NARROWING = 1.5
# Of the highest edge near a plan: its density over the plan's.
_REACH = 2.0


def bucket_edges(groups: int, buckets: int, sparsity: float) -> np.ndarray:
    """Where the buckets of a kernel begin, in groups sorted by saliency.

    One edge lies at the sparsity around which plans are looked for. Below it are five buckets in
    eight, smaller towards the edge: the share of groups at or above them falls geometrically, in
    steps that shrink as well, so that there are choices close by and far away. The others cut what
    lies beyond into equal parts.

    The edges increase from 0 to `groups`, `min(buckets, groups) + 1` of them: a kernel with fewer
    groups than buckets gets one per group.

    Example:
        >>> bucket_edges(1000, 8, 0.9)
        array([   0,  481,  708,  821,  877,  900,  933,  967, 1000])
    """
    count = min(buckets, groups)
    below = max(1, round(count * 5 / 8))
    density = 1.0 - sparsity
    shares = 1.0 - density ** (1.0 - (1.0 - np.arange(below + 1) / below) ** _NARROWING)
    beyond = sparsity + density * np.arange(1, count - below + 1) / max(1, count - below)
    edges = np.round(groups * np.concatenate([shares, beyond])).astype(np.int64)
    return _increasing(edges, groups)


def near_edges(groups: int, buckets: int, sparsity: float) -> np.ndarray:
    """Where the buckets of a kernel begin if a good plan is known, and others near it are wanted.

    The edges divide the density that a plan of this sparsity leaves by powers of the same factor,
    five in eight of them above it, the highest at twice the density; so the first and the last
    bucket are wide. There are as many as [bucket_edges][] gives.

    Example:
        >>> near_edges(1000, 8, 0.9)
        array([   0,  800,  832,  859,  881,  900,  916,  929, 1000])
    """
    count = min(buckets, groups)
    above = max(1, round(count * 5 / 8))
    powers = 1.0 - np.arange(count - 1) / max(1, above - 1)
    densities = np.minimum(1.0, (1.0 - sparsity) * _REACH**powers)
    edges = np.round(groups * (1.0 - np.concatenate([[1.0], densities, [0.0]]))).astype(np.int64)
    return _increasing(edges, groups)


def _increasing(edges: np.ndarray, groups: int) -> np.ndarray:
    """Moves edges as little as it takes for every bucket to hold at least one group."""
    count = len(edges) - 1
    edges[count] = groups
    for j in range(1, count):
        edges[j] = min(max(edges[j], edges[j - 1] + 1), groups - (count - j))
    return edges


def split_buckets(saliency: np.ndarray, edges: np.ndarray) -> list[np.ndarray]:
    """Flat group indices of every bucket, least salient first; ties by position."""
    order = np.argsort(saliency, kind="stable")
    return [order[a:b] for a, b in itertools.pairwise(edges)]
