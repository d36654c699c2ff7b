"""Keras's constraints on kernels and biases, kept wherever weights are set beside training.

Training keeps them by itself: Keras's optimizers apply them to the variables after every step. What
is left is the kernel that the network computes with, `quantize(mask * permute(W))`, and the fits in
closed form.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf
import tf_keras as keras

from rl_sparsity_tf.errors import ModelError, one_line

if TYPE_CHECKING:
    from rl_sparsity_tf.layers.kernels import Kernel

Constraint = Callable[[tf.Tensor], tf.Tensor]

_SEED = 0


def constraint_of(variable: Any) -> Constraint | None:
    """A variable's constraint, if it has one."""
    return getattr(variable, "constraint", None)


def project(variable: Any, value: np.ndarray) -> np.ndarray:
    """The value that a variable's constraint makes of another, in the variable's shape."""
    constraint = constraint_of(variable)
    if constraint is None:
        return value
    return np.asarray(constraint(tf.constant(value)), value.dtype)


def check_constraints(kernels: Iterable[Kernel]) -> None:
    """Raises unless kernels can be pruned and keep their constraints.

    Zeros have to stay zeros under a constraint. Seen by trying it: half of the weights are pruned.

    Raises:
        ModelError: Naming the kernel and its constraint.
    """
    for kernel in kernels:
        constraint = constraint_of(kernel.variable)
        if constraint is None:
            continue
        live = np.random.default_rng(_SEED).random(kernel.shape) < 0.5
        pruned = np.where(live, kernel.value(), 0.0).astype(np.float32)
        name = getattr(constraint, "__name__", type(constraint).__name__)
        try:
            met = np.asarray(constraint(tf.constant(pruned)))
        except Exception as error:
            raise ModelError(
                f"The constraint {name} of the kernel {kernel.path!r} cannot be computed "
                f"({one_line(error)}). Expected a function of a tensor in the kernel's shape; "
                f"exclude={kernel.path!r} leaves the kernel alone."
            ) from error
        if (met[~live] != 0).any() or not np.isfinite(met).all():
            raise ModelError(
                f"The kernel {kernel.path!r} has the constraint {name}, which makes other numbers "
                "of pruned weights, so that pruning and the constraint cannot hold at once. "
                "Expected a constraint that leaves zeros alone, such as MaxNorm, UnitNorm or "
                f"NonNeg: exclude={kernel.path!r} leaves the kernel alone, or build the layer "
                "without the constraint."
            )


def holds_when_masked(constraint: Constraint | None, *, moved: bool = False) -> bool:
    """Whether what meets a constraint still meets it with some weights masked.

    Args:
        constraint: The constraint, if there is one.
        moved: Whether weights change their places, too.
    """
    if constraint is None or type(constraint) is keras.constraints.NonNeg:
        return True
    return type(constraint) is keras.constraints.MaxNorm and not moved
