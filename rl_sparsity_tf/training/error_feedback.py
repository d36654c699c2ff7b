"""Rounding to the integer grid where every weight makes up for the rounding errors before it."""

from __future__ import annotations

import numpy as np

_BLOCK = 64
# Where plain rounding moves the outputs by less (as a share of their energy), nothing is gained by
# feedback that the rest of the network would notice. int8 is about 3e-5, int4 1e-2.
NEGLIGIBLE = 1e-3
_SAMPLED_OUTPUTS = 32


def round_with_feedback(
    weights: np.ndarray,
    gram: np.ndarray,
    scale: np.ndarray,
    levels: float,
    on_grid: np.ndarray,
    live: np.ndarray,
    negligible: float = NEGLIGIBLE,
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
        negligible: Share of the outputs' energy below which plain rounding is left as it is.

    Returns:
        Float32 of the same shape; on the grid every value is an integer times the scale.
    """
    exact = weights.astype(np.float32)
    step = np.broadcast_to(np.asarray(scale, np.float32), exact.shape)
    safe = np.where(step > 0, step, np.float32(1.0))
    pinned = np.abs(exact) >= safe * np.float32(levels) * np.float32(1.0 - 1e-6)
    free = live & ~pinned
    integers = np.minimum(np.maximum(np.rint(exact / safe), -levels), levels)
    rounded = np.where(free & on_grid, integers * safe, exact)
    if _share_moved(exact, rounded, gram) < negligible:
        return rounded
    rounded = exact.copy()
    own = gram.ndim == 3
    diagonal = np.einsum("okk->ko", gram) if own else np.diag(gram)[:, None]
    order = np.argsort(-diagonal.mean(axis=1), kind="stable")
    inverse = np.where(diagonal > 0, 1.0 / np.where(diagonal > 0, diagonal, 1.0), 0.0)
    if own:
        _sweep_own(exact, rounded, gram, inverse, order, safe, levels, on_grid, free)
        return rounded
    # Everything in the order of the sweep, so that blocks are slices.
    sorted_gram = gram[np.ix_(order, order)]
    values, steps, chosen, may = exact[order], safe[order], on_grid[order], free[order]
    inverse, result = inverse[order], exact[order]
    errors = np.zeros(exact.shape)
    for start in range(0, len(order), _BLOCK):
        stop = min(start + _BLOCK, len(order))
        before = sorted_gram[start:stop, :start] @ errors[:start]
        for place in range(start, stop):
            felt = before[place - start] + sorted_gram[place, start:place] @ errors[start:place]
            wanted = values[place] - (felt * inverse[place]).astype(np.float32)
            integers = np.minimum(np.maximum(np.rint(wanted / steps[place]), -levels), levels)
            found = np.where(chosen[place], integers * steps[place], wanted)
            result[place] = np.where(may[place], found, values[place])
            errors[place] = result[place] - values[place]
    rounded[order] = result
    return rounded


def _share_moved(exact: np.ndarray, rounded: np.ndarray, gram: np.ndarray) -> float:
    """The error's share of the outputs' energy, on some of the outputs."""
    stride = -(-exact.shape[1] // _SAMPLED_OUTPUTS)
    error, signal = (rounded - exact)[:, ::stride], exact[:, ::stride]
    if gram.ndim == 3:
        moved, all_ = (np.einsum("ko,okl,lo->", a, gram[::stride], a) for a in (error, signal))
    else:
        moved, all_ = (np.vdot(a, gram @ a) for a in (error, signal))
    return float(moved) / float(all_) if all_ > 0 else 0.0


def _sweep_own(
    exact: np.ndarray,
    rounded: np.ndarray,
    gram: np.ndarray,
    inverse: np.ndarray,
    order: np.ndarray,
    safe: np.ndarray,
    levels: float,
    on_grid: np.ndarray,
    free: np.ndarray,
) -> None:
    """The sweep where every output has a Gram matrix of its own; writes to `rounded`."""
    error = np.zeros(exact.shape)
    for row in order:
        felt = np.einsum("ok,ko->o", gram[:, row], error)
        wanted = exact[row] - (felt * inverse[row]).astype(np.float32)
        integers = np.clip(np.rint(wanted / safe[row]), -levels, levels)
        value = np.where(on_grid[row], integers * safe[row], wanted)
        rounded[row] = np.where(free[row], value, exact[row])
        error[row] = rounded[row] - exact[row]
