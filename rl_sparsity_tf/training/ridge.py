"""Ridge regression on the surviving inputs of every output, and rounding that makes up errors."""

from __future__ import annotations

import numpy as np

EXACT_SURVIVORS = 1024
"""Output units with more surviving inputs than this are fitted by conjugate gradients."""

CHUNK_BYTES = 64 * 2**20
"""Memory that the systems solved at the same time may take."""

_QUIET = 0.1
_ITERATIONS = 64
_TOLERANCE = 1e-4
_LEAST_RIDGE = 1e-12


def ridge_strength(diagonal: np.ndarray, ridge: float) -> np.ndarray:
    """What is added to a Gram matrix's diagonal, relative to its mean along the last axis.

    Never nothing: inputs may depend on each other, and a layer may be given none but zeros. It
    scales as the inputs' squares do, so that a fit does not depend on their unit.
    """
    mean = np.mean(diagonal, axis=-1, dtype=np.float64)
    return np.where(mean > 0, max(ridge, _LEAST_RIDGE) * mean, 1.0)


def fit_masked(
    gram: np.ndarray,
    cross: np.ndarray,
    start: np.ndarray,
    live: np.ndarray,
    *,
    ridge: float,
    least: float = 0.0,
    chunk_bytes: int = CHUNK_BYTES,
    exact_survivors: int = EXACT_SURVIVORS,
) -> np.ndarray:
    r"""Fits every column of a kernel on the inputs that survive in it.

    For output unit o with surviving inputs S it solves the normal equations of ridge regression,

    \((G_{SS} + \lambda I)\, w_S = c_S + \lambda\, w^0_S\), with \(\lambda\) = `ridge` times the
    mean of G's diagonal: the weights that give back the wanted outputs best, kept near the ones
    that the network was trained to where the data says nothing.

    Units with the same survivors share one factorisation; the others are solved in batches of
    similar size. Above `exact_survivors` conjugate gradients run on all such units at once, where
    every step is one product with G.

    Args:
        gram: \(G = X^T X / n\), float64 of shape `(inputs, inputs)`.
        cross: \(X^T Y / n\), shape `(inputs, outputs)`.
        start: \(w^0\), shape `(inputs, outputs)`.
        live: Booleans, shape `(inputs, outputs)`.
        ridge: Strength of the ridge, unit-free.
        least: What \(\lambda\) is at least, in the unit of G: above what rounding leaves in it.
        chunk_bytes: Memory that the systems solved at the same time may take.
        exact_survivors: Above this many survivors conjugate gradients are used.

    Returns:
        Float64 of shape `(inputs, outputs)`, 0 where nothing lives.

    Example:
        >>> fit_masked(x.T @ x / len(x), x.T @ y / len(x), w, w != 0, ridge=1e-3)
    """
    weights = np.zeros(start.shape, np.float64)
    strength = max(float(ridge_strength(np.diag(gram), ridge)), least)
    # Weights are in single precision, which the strength itself may be beyond.
    mantissa, exponent = np.frexp(strength)
    wanted = cross + np.ldexp((float(mantissa) * start).astype(np.float64), int(exponent))
    survivors = live.sum(axis=0)
    large = np.flatnonzero(survivors > exact_survivors)
    if len(large):
        from_start = np.where(live[:, large], start[:, large], 0.0).astype(np.float64)
        residual = np.where(live[:, large], cross[:, large] - gram @ from_start, 0.0)
        found = _conjugate_gradients(gram, residual, live[:, large], strength)
        weights[:, large] = from_start + found
    small = np.flatnonzero((survivors > 0) & (survivors <= exact_survivors))
    patterns, owner = _patterns(live[:, small])
    shared = np.flatnonzero(np.bincount(owner) > 1)
    single = np.ones(len(small), bool)
    for pattern in shared:
        columns = small[owner == pattern]
        rows = np.flatnonzero(patterns[:, pattern])
        system = gram[np.ix_(rows, rows)] + strength * np.eye(len(rows))
        weights[np.ix_(rows, columns)] = np.linalg.solve(system, wanted[np.ix_(rows, columns)])
        single[owner == pattern] = False
    rest = small[single]
    rest = rest[np.argsort(survivors[rest], kind="stable")]
    at = 0
    while at < len(rest):
        end = _chunk_end(survivors[rest], at, chunk_bytes)
        columns = rest[at:end]
        _solve_batch(weights, gram, wanted, live, columns, strength)
        at = end
    return weights


def fit_depthwise(
    gram: np.ndarray,
    cross: np.ndarray,
    start: np.ndarray,
    live: np.ndarray,
    *,
    ridge: float,
    least: float = 0.0,
) -> np.ndarray:
    """[fit_masked][] where every output has inputs of its own.

    A channel that is all but dead says nothing that could be made louder: none has a ridge of less
    than a tenth of what the mean channel has.

    `gram` has the shape `(outputs, positions, positions)`, the other arrays and the float64 result
    `(positions, outputs)`. The ridge is relative to every output's own diagonal.
    """
    mask = live.T.astype(np.float64)
    weights = start.T * mask
    diagonal = np.einsum("okk->ok", gram)
    quiet = _QUIET * max(ridge, _LEAST_RIDGE) * float(diagonal.mean())
    strength = np.maximum(ridge_strength(diagonal, ridge), max(least, quiet))
    residual = (cross.T - np.einsum("okl,ol->ok", gram, weights)) * mask
    system = gram * mask[:, :, None] * mask[:, None, :]
    positions = np.arange(gram.shape[1])
    system[:, positions, positions] += np.where(mask > 0, strength[:, None], 1.0)
    return (weights + np.linalg.solve(system, residual[:, :, None])[:, :, 0]).T


def _patterns(live: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct columns of booleans, and which of them every column is."""
    packed = np.ascontiguousarray(np.packbits(live, axis=0).T)
    keys = packed.view([("", packed.dtype)] * packed.shape[1]).reshape(-1)
    _, first, owner = np.unique(keys, return_index=True, return_inverse=True)
    return live[:, first], owner.reshape(-1)


def _chunk_end(survivors: np.ndarray, at: int, chunk_bytes: int) -> int:
    """How far a batch of systems may go; all take the memory of the largest, which is the last."""
    end = at + 1
    while end < len(survivors):
        size = int(survivors[end])
        if (end + 1 - at) * size * size * 8 > chunk_bytes or size > 2 * int(survivors[at]) + 16:
            break
        end += 1
    return end


def _solve_batch(
    weights: np.ndarray,
    gram: np.ndarray,
    wanted: np.ndarray,
    live: np.ndarray,
    columns: np.ndarray,
    strength: float,
) -> None:
    size = int(live[:, columns].sum(axis=0).max())
    # The survivors of every column first, in their order; shorter columns are filled up with
    # others, which are cut out of the system below.
    index = np.argsort(~live[:, columns], axis=0, kind="stable")[:size].T
    chosen = np.take_along_axis(live[:, columns].T, index, axis=1)
    system = gram.take(index[:, :, None] * len(gram) + index[:, None, :])
    system *= chosen[:, :, None] & chosen[:, None, :]
    diagonal = np.arange(size)
    system[:, diagonal, diagonal] += np.where(chosen, strength, 1.0)
    right = wanted[index, columns[:, None]] * chosen
    found = np.linalg.solve(system, right[:, :, None])[:, :, 0]
    # A column's fillers are pruned rows of its own, which stay 0.
    weights[index, columns[:, None]] = found * chosen


def _conjugate_gradients(
    gram: np.ndarray, residual: np.ndarray, live: np.ndarray, strength: float
) -> np.ndarray:
    """Solves all columns at once, preconditioned by the diagonal."""
    mask = live.astype(np.float64)
    inverse = mask / (np.diag(gram) + strength)[:, None]
    found = np.zeros_like(residual)
    left = residual.copy()
    direction = inverse * left
    energy = (left * direction).sum(axis=0)
    wanted = _TOLERANCE**2 * energy
    for _ in range(_ITERATIONS):
        active = energy > wanted
        if not active.any():
            break
        step = mask * (gram @ direction) + strength * direction
        curvature = (direction * step).sum(axis=0)
        length = np.where(active, energy / np.where(curvature > 0, curvature, 1.0), 0.0)
        found += length * direction
        left -= length * step
        smoothed = inverse * left
        following = (left * smoothed).sum(axis=0)
        ratio = np.where(active, following / np.where(energy > 0, energy, 1.0), 0.0)
        direction = smoothed + ratio * direction
        energy = np.where(active, following, energy)
    return found


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
