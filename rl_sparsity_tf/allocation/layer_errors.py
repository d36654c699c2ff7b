"""What every kernel loses at every density and precision: a database of layers.

For each kernel the error of its layer's outputs is measured at about twenty densities, after the
closed-form fit that would follow. Nothing is evaluated, and the network stays as it is. Frantar &
Alistarh 2022, "SPDY: Accurate pruning with speedup guarantees", arXiv 2201.13096.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import tensorflow as tf

from rl_sparsity_tf.layers import operations as ops
from rl_sparsity_tf.layers.groups import Grouping
from rl_sparsity_tf.layers.kernel_spec import KernelSpec
from rl_sparsity_tf.layers.kernels import Kernel
from rl_sparsity_tf.training.layer_problem import LayerProblem

FLOAT = 32
"""Bits of what is not quantized."""

# Neighbouring levels differ by a factor of 0.72.
_LEVELS, _LEAST_DENSITY = 20, 0.002


@dataclasses.dataclass(frozen=True, eq=False)
class KernelErrors:
    """What a kernel loses, by how many of its weights live.

    Attributes:
        criterion: How its groups are ranked: by `"magnitude"` or by `"activation"`.
        saliency: One value per group; the groups of least saliency go first.
        live: Numbers of living weights, ascending.
        errors: By bits per weight (32, 8, 4): energy of the change of the layer's outputs over
            that of the outputs, one per number; of the weights where the outputs are not known.
    """

    criterion: str
    saliency: np.ndarray
    live: np.ndarray
    errors: Mapping[int, np.ndarray]

    def error(self, live: np.ndarray | float, bits: int = FLOAT) -> np.ndarray:
        """The error with so many living weights, linear in their logarithm between levels."""
        return np.interp(np.log(live), np.log(self.live), self.errors[bits])


def measure(
    kernels: Sequence[Kernel],
    groupings: Mapping[str, Grouping],
    matrices: Mapping[str, np.ndarray],
    problems: Mapping[str, LayerProblem],
    *,
    bits: Sequence[int] | Mapping[str, Sequence[int]] = (FLOAT,),
    density: float = 0.1,
    most: Mapping[str, float] | None = None,
) -> dict[str, KernelErrors]:
    """Measures the database of a network, by path.

    `matrices` are the trained weights, viewed as `(inputs, outputs)`; `problems` are those of the
    kernels that can be fitted. `bits` are precisions, of all kernels or by path: 32, and 8 or 4 for
    those that TFLite can hold as integers. `density` is the one that is aimed at, where the ways to
    rank groups are compared. What is beyond `most` living weights is not measured, because dense
    kernels are the ones that take long to fit.
    """
    wanted = bits if isinstance(bits, Mapping) else {kernel.path: bits for kernel in kernels}
    return {
        kernel.path: kernel_errors(
            matrices[kernel.path],
            groupings[kernel.path],
            kernel.spec,
            problems.get(kernel.path),
            bits=[b for b in wanted[kernel.path] if b == FLOAT or kernel.spec.exports_int8],
            density=density,
            most=None if most is None else most[kernel.path],
        )
        for kernel in kernels
    }


def kernel_errors(
    matrix: np.ndarray,
    grouping: Grouping,
    spec: KernelSpec,
    problem: LayerProblem | None,
    *,
    bits: Sequence[int] = (FLOAT,),
    density: float = 0.1,
    most: float | None = None,
    counts: Sequence[int] | None = None,
) -> KernelErrors:
    """Measures one kernel; see [measure][].

    The first level beyond `most` living weights is the last. `counts` are the numbers of living
    groups to measure, ascending; by default [levels][].
    """
    chosen, saliency = best_saliency(matrix, grouping, problem, density)
    lives: list[int] = []
    errors: dict[int, list[float]] = {one: [] for one in bits}
    for count in counts or levels(grouping.count):
        if lives and most is not None and lives[-1] >= most:
            break
        alive = most_salient(saliency, count)
        lives.append(int(grouping.sizes[alive].sum()))
        fitted = _fitted(matrix, grouping, alive, FLOAT, problem)
        for one in bits:
            errors[one].append(_error_at(one, matrix, grouping, spec, alive, fitted, problem))
    return KernelErrors(
        chosen,
        saliency,
        np.array(lives, np.float64),
        {
            # More weights never hurt: what rises is noise of the fit.
            one: np.maximum.accumulate(np.array(found)[::-1])[::-1]
            for one, found in errors.items()
        },
    )


def best_saliency(
    matrix: np.ndarray, grouping: Grouping, problem: LayerProblem | None, density: float
) -> tuple[str, np.ndarray]:
    """The way to rank a kernel's groups that leaves the smaller error after a fit.

    Returns its name and the saliencies, see [saliencies][]. The trained weights are viewed as
    `(inputs, outputs)`; `density` is the share of the groups that live where the ways are compared.
    """
    criteria = saliencies(matrix, grouping, problem)
    aimed = int(np.clip(round(density * grouping.count), 1, grouping.count))

    def loss(name: str) -> float:
        alive = most_salient(criteria[name], aimed)
        weights = _fitted(matrix, grouping, alive, FLOAT, problem)
        return _error(matrix, weights, problem)

    # The first wins ties: whole kernels are the same whatever ranks them.
    some = len(criteria) > 1 and aimed < grouping.count
    chosen = min(criteria, key=loss) if some else next(iter(criteria))
    return chosen, criteria[chosen]


def levels(count: int) -> list[int]:
    """Numbers of living groups to measure: geometric, from one to all of them."""
    shares = np.geomspace(_LEAST_DENSITY, 1.0, _LEVELS)
    return sorted({1, *(max(1, round(count * share)) for share in shares)})


def saliencies(
    matrix: np.ndarray, grouping: Grouping, problem: LayerProblem | None
) -> dict[str, np.ndarray]:
    r"""The ways to rank a kernel's groups, by name.

    Magnitude is the mean of \(w^2\); activation, with the layer's inputs known, that of
    \(w^2 G_{ii}\), what a weight adds to its output (Sun et al. 2023, "A simple and effective
    pruning approach for large language models", arXiv 2306.11695). Both are compared in the whole
    kernel: compared within each output, as in that paper, the layers' errors are less and the
    networks worse (Fashion-MNIST, LeNet-300-100, 97 % sparsity: loss 0.52 in place of 0.48).
    """

    def mean(squares: np.ndarray) -> np.ndarray:
        return grouping.sum_numpy(squares) / grouping.sizes

    squares = np.square(matrix, dtype=np.float64)
    found = {"magnitude": mean(squares)}
    if problem is not None:
        found["activation"] = mean(squares * problem.input_energy)
    return found


def most_salient(saliency: np.ndarray, count: int) -> np.ndarray:
    """Marks so many groups of highest saliency; ties go to the last, as they are pruned first."""
    order = np.argsort(saliency, axis=None, kind="stable")
    alive = np.zeros(saliency.size, bool)
    alive[order[saliency.size - count :]] = True
    return alive.reshape(saliency.shape)


def _fitted(
    matrix: np.ndarray,
    grouping: Grouping,
    alive: np.ndarray,
    bits: int,
    problem: LayerProblem | None,
) -> np.ndarray:
    """The kernel after the fit, or as it was trained where there is none."""
    if problem is None:
        return np.where(grouping.expand_numpy(alive), matrix, 0.0)
    stays = ops.Operation.KEEP if bits == FLOAT else ops.Operation.QUANTIZE
    chosen = np.where(alive, stays, ops.Operation.PRUNE).astype(np.uint8)
    return problem.solve(chosen, min(bits, 8), problem.dense)


def _error_at(
    bits: int,
    matrix: np.ndarray,
    grouping: Grouping,
    spec: KernelSpec,
    alive: np.ndarray,
    fitted: np.ndarray,
    problem: LayerProblem | None,
) -> float:
    if bits == 4 and problem is not None:
        # Coarse enough for error feedback to matter, so it is run.
        return _error(matrix, _fitted(matrix, grouping, alive, 4, problem), problem)
    error = _error(matrix, fitted, problem)
    return error if bits == FLOAT else error + _rounding_error(bits, matrix, spec, fitted, problem)


def _error(matrix: np.ndarray, weights: np.ndarray, problem: LayerProblem | None) -> float:
    if problem is not None:
        error = problem.relative_error(weights)
        return error if np.isfinite(error) else 1.0
    change = np.square(matrix - weights, dtype=np.float64).sum()
    return float(change / max(np.square(matrix, dtype=np.float64).sum(), 1e-300))


def _rounding_error(
    bits: int,
    matrix: np.ndarray,
    spec: KernelSpec,
    weights: np.ndarray,
    problem: LayerProblem | None,
) -> float:
    """What rounding adds on average: a twelfth of the grid's squared step, for every weight."""
    largest = tf.constant(2.0 ** (bits - 1) - 1.0)
    values = tf.constant(weights.astype(np.float32))
    step = ops.grid_scale(values, largest, spec.per_output_scale, spec.gates).numpy()
    noise = np.where(weights != 0, np.square(step, dtype=np.float64) / 12.0, 0.0)
    if problem is None:
        return float(noise.sum() / max(np.square(matrix, dtype=np.float64).sum(), 1e-300))
    return float((noise * problem.input_energy).sum() / problem.energy)
