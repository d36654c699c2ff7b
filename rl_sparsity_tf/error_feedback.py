"""Rounding to the integer grid where every weight makes up for the rounding errors before it."""

from __future__ import annotations

import numpy as np

_BLOCK = 64


def round_with_feedback(
    weights: np.ndarray,
    gram: np.ndarray,
    scale: np.ndarray,
    levels: float,
    on_grid: np.ndarray,
    live: np.ndarray,
) -> np.ndarray:
    r"""Puts weights on a grid so that the layer's outputs change least.

    The inputs are taken from the strongest to the weakest. Each weight is moved by what cancels
    the output error of those before it, \(-\sum_{j<i} G_{ij} e_j / G_{ii}\), and is rounded then
    (where it is on the grid; the others take the full correction). The change of the outputs is
    \(e^T G e\), and no step makes it larger than plain rounding of that weight would. The idea is
    that of Frantar & Alistarh 2022, "Optimal brain compression", arXiv 2208.11580, with a plain
    coordinate step in place of the inverse Hessian, so that every output unit can have survivors
    of its own.

    The largest weight of a scale's range stays as it is: the grid follows from it.

    Args:
        weights: Fitted weights, shape `(inputs, outputs)`, 0 where nothing lives.
        gram: Shape `(inputs, inputs)`, or `(outputs, inputs, inputs)` for depthwise kernels.
        scale: Step of the grid, shape `(1, outputs)` or `(1, 1)`, float32.
        levels: Largest integer of the grid.
        on_grid: Booleans, shape `(inputs, outputs)`: weights that go on the grid.
        live: Booleans of the same shape: weights that are not pruned.

    Returns:
        Float32 of the same shape; on the grid every value is an integer times the scale.
    """
    exact = weights.astype(np.float32)
    rounded = exact.copy()
    step = np.broadcast_to(np.asarray(scale, np.float32), exact.shape)
    safe = np.where(step > 0, step, np.float32(1.0))
    pinned = np.abs(exact) >= safe * np.float32(levels) * np.float32(1.0 - 1e-6)
    free = live & ~pinned
    own = gram.ndim == 3
    diagonal = np.einsum("okk->ko", gram) if own else np.diag(gram)[:, None]
    order = np.argsort(-diagonal.mean(axis=1), kind="stable")
    inverse = np.where(diagonal > 0, 1.0 / np.where(diagonal > 0, diagonal, 1.0), 0.0)
    error = np.zeros(exact.shape)
    sorted_gram = None if own else gram[np.ix_(order, order)]
    errors = np.zeros(exact.shape)  # in the order of the sweep
    for start in range(0, len(order), _BLOCK):
        stop = min(start + _BLOCK, len(order))
        if sorted_gram is not None:
            before = sorted_gram[start:stop, :start] @ errors[:start]
        for place in range(start, stop):
            row = order[place]
            if sorted_gram is None:
                felt = np.einsum("ok,ko->o", gram[:, row], error)
            else:
                felt = before[place - start] + sorted_gram[place, start:place] @ errors[start:place]
            wanted = exact[row] - (felt * inverse[row]).astype(np.float32)
            integers = np.clip(np.rint(wanted / safe[row]), -levels, levels)
            value = np.where(on_grid[row], integers * safe[row], wanted)
            rounded[row] = np.where(free[row], value, exact[row])
            error[row] = errors[place] = rounded[row] - exact[row]
    return rounded
