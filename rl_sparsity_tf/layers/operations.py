"""The four operations, as pure functions on kernels viewed as matrices; learnable masks.

A kernel is viewed as a matrix of shape `(inputs, outputs)` and cut into groups by a
[Grouping][rl_sparsity_tf.layers.groups.Grouping]. Its effective value is

    quantize(mask * permute(W))

with one decision per group. Everything here is vectorised, differentiable where that makes sense,
and gives the same bits eagerly and inside a `tf.function`.

Keras's constraints on kernels and biases, kept wherever weights are set beside training.

Training keeps them by itself: Keras's optimizers apply them to the variables after every step. What
is left is the kernel that the network computes with, `quantize(mask * permute(W))`, and the fits in
closed form.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras as keras

from rl_sparsity_tf.layers.groups import Grouping


class Operation(enum.IntEnum):
    """What is done to one group of weights.

    Example:
        >>> [operation.name for operation in rls.Operation]
        ['KEEP', 'PRUNE', 'QUANTIZE', 'SHUFFLE']
    """

    KEEP = 0
    """The group stays as it is, at full precision."""
    PRUNE = 1
    """The group's mask is 0."""
    QUANTIZE = 2
    """The group's weights are put on TFLite's symmetric integer grid."""
    SHUFFLE = 3
    """The group asks to swap contents with its neighbour along the inputs."""


def stored_as_integers(operations: np.ndarray) -> bool:
    """Whether a kernel is stored as integers: some group is quantized and none is kept."""
    quantized = (operations == Operation.QUANTIZE).any()
    return bool(quantized and not (operations == Operation.KEEP).any())


def grid_groups(operations: np.ndarray) -> np.ndarray:
    """Which groups are put on the integer grid, as booleans of the operations' shape.

    The quantized ones; and in a kernel that is stored as integers, because no living group is kept
    at full precision, every group.
    """
    if stored_as_integers(operations):
        return np.ones(operations.shape, bool)
    return operations == Operation.QUANTIZE


def swaps_of(operations: np.ndarray, grouping: Grouping) -> np.ndarray:
    """Finds which neighbours swap: pair `(2i, 2i+1)` does when exactly one of the two asks.

    Takes one [Operation][] per group, shape `grouping.shape`; returns booleans of shape
    `(grouping.pairs, outputs)`. A last group without a neighbour, or whose neighbour is a shorter
    tail block, stays where it is.
    """
    asks = np.asarray(operations) == Operation.SHUFFLE
    pairs = grouping.pairs
    return asks[0 : 2 * pairs : 2] != asks[1 : 2 * pairs : 2]


def permute(matrix: tf.Tensor, swaps: tf.Tensor, grouping: Grouping) -> tf.Tensor:
    """Swaps the contents of neighbouring groups; its own inverse.

    `swaps` holds booleans of shape `(grouping.pairs, outputs)`; `matrix` has shape
    `(inputs, outputs)`.
    """
    pairs, block = grouping.pairs, grouping.block
    if pairs == 0:
        return matrix
    head_rows = 2 * pairs * block
    # Reshaped where an index would do: that takes several operations, and this is traced often.
    head = matrix if head_rows == grouping.inputs else matrix[:head_rows]
    head = tf.reshape(head, (pairs, 2, block, grouping.outputs))
    asked = tf.reshape(swaps, (pairs, 1, 1, grouping.outputs))
    swapped = tf.where(asked, tf.reverse(head, axis=[1]), head)
    swapped = tf.reshape(swapped, (head_rows, grouping.outputs))
    if head_rows == grouping.inputs:
        return swapped
    return tf.concat([swapped, matrix[head_rows:]], axis=0)


def mask_weights(matrix: tf.Tensor, mask: tf.Tensor, grouping: Grouping) -> tf.Tensor:
    """Multiplies every group by its mask value; gradients of masked weights are masked too.

    `matrix` has shape `(inputs, outputs)`, `mask` shape `grouping.shape`.
    """
    return matrix * grouping.expand(tf.cast(mask, matrix.dtype))


def mask_weights_straight_through(
    matrix: tf.Tensor, mask: tf.Tensor, logits: tf.Tensor, grouping: Grouping
) -> tf.Tensor:
    r"""Masks the groups, and lets gradients pass as if the mask were not there.

    Forward: \(y = m \odot W\) with the hard mask \(m\). Backward:
    \(\partial L/\partial W = \partial L/\partial y\), also where \(m = 0\) (the "dense shadow
    weights" of Lin et al. 2020, "Dynamic model pruning with feedback", arXiv 2006.07253), and
    \(\partial L/\partial \ell_g = \sum_{i \in g} W_i \, \partial L/\partial y_i\) for the logit of
    group g (Bengio et al. 2013, arXiv 1308.3432), so that a pruned group can come back.

    `matrix` has shape `(inputs, outputs)`; the 0/1 `mask` and `logits` have shape `grouping.shape`.
    """

    @tf.custom_gradient
    def masked(
        weights: tf.Tensor, hard: tf.Tensor, _: tf.Tensor
    ) -> tuple[tf.Tensor, Callable[[tf.Tensor], tuple[tf.Tensor, None, tf.Tensor]]]:
        def gradient(upstream: tf.Tensor) -> tuple[tf.Tensor, None, tf.Tensor]:
            return upstream, None, grouping.reduce_sum(upstream * weights)

        return weights * grouping.expand(hard), gradient

    return masked(matrix, tf.cast(mask, matrix.dtype), tf.cast(logits, matrix.dtype))


def grid_scale(
    matrix: tf.Tensor, levels: tf.Tensor, per_output: bool = True, gates: int = 1
) -> tf.Tensor:
    """The step of TFLite's symmetric grid for a masked kernel: largest magnitude / levels.

    Args:
        matrix: Shape `(inputs, outputs)`.
        levels: Largest integer of the grid, scalar: 127 for int8, 7 for int4. Pass a variable or an
            input rather than a constant: graph optimisation turns a division by a constant into
            a multiplication, which rounds differently.
        per_output: One scale per output unit (convolutions, dense layers) or one per tensor.
        gates: Tensors that lie side by side in the matrix, where there is one scale per tensor.

    Returns:
        Scales of shape `(1, outputs)` or `(1, 1)`; 0 where all weights are 0.
    """
    largest = tf.reduce_max(tf.abs(matrix), axis=0, keepdims=True)
    if not per_output and gates > 1:
        parts = tf.reshape(largest, (gates, -1))
        parts = tf.broadcast_to(tf.reduce_max(parts, axis=1, keepdims=True), tf.shape(parts))
        largest = tf.reshape(parts, tf.shape(largest))
    elif not per_output:
        largest = tf.reduce_max(largest, keepdims=True)
    return largest / tf.cast(levels, matrix.dtype)


def quantize(
    matrix: tf.Tensor,
    on_grid: tf.Tensor,
    levels: tf.Tensor,
    grouping: Grouping,
    per_output: bool = True,
    gates: int = 1,
) -> tf.Tensor:
    r"""Puts chosen groups on TFLite's symmetric integer grid, with a straight-through gradient.

    Forward: \(s \cdot \mathrm{clip}(\mathrm{round}(W / s), -q, q)\) with \(q\) = `levels` and the
    scale \(s\) of [grid_scale][] taken over all weights of the scale's range, on the grid or not.
    Backward: identity. `matrix` is masked and has shape `(inputs, outputs)`; `on_grid` holds
    booleans of shape `grouping.shape`; the rest is as in [grid_scale][].
    """
    # Read outside: a custom gradient refuses trainable variables that are read inside it.
    q = tf.cast(tf.convert_to_tensor(levels), matrix.dtype)

    @tf.custom_gradient
    def rounded(
        weights: tf.Tensor,
    ) -> tuple[tf.Tensor, Callable[[tf.Tensor], tf.Tensor]]:
        scale = grid_scale(weights, q, per_output, gates)
        safe = tf.where(scale > 0, scale, tf.ones_like(scale))
        integers = tf.clip_by_value(tf.round(weights / safe), -q, q)
        chosen = grouping.expand(tf.cast(on_grid, weights.dtype)) > 0
        return tf.where(chosen, integers * safe, weights), lambda upstream: upstream

    return rounded(matrix)


MASKS = ("straight_through", "hard_concrete")
"""How a learnable mask gets its gradient."""

# Temperature and stretch limits recommended by Louizos et al. 2018, section 4.
_BETA, _GAMMA, _ZETA = 2.0 / 3.0, -0.1, 1.1


def hard_concrete_sample(logits: tf.Tensor) -> tf.Tensor:
    r"""Samples mask values from the hard concrete distribution, differentiable in the logits.

    \(s = \sigma((\log u - \log(1-u) + \log\alpha)/\beta)\), \(\bar s = s(\zeta-\gamma)+\gamma\),
    \(z = \min(1, \max(0, \bar s))\), with the logits \(\log\alpha\): equations 10 to 11 of Louizos
    et al. 2018, "Learning sparse neural networks through L0 regularization", arXiv 1712.01312. The
    values 0 and 1 have positive probability.
    """
    u = tf.random.uniform(tf.shape(logits), 1e-6, 1.0 - 1e-6, dtype=logits.dtype)
    s = tf.sigmoid((tf.math.log(u) - tf.math.log1p(-u) + logits) / _BETA)
    return tf.clip_by_value(s * (_ZETA - _GAMMA) + _GAMMA, 0.0, 1.0)


def select_live(scores: np.ndarray, sizes: np.ndarray, weights_to_prune: int) -> np.ndarray:
    """Chooses the groups that live: prunes those of lowest score until enough weights are gone.

    Scores and sizes (weights per group) have one shape, any; so have the booleans that are
    returned. Ties go to the group that comes first. The smallest number of groups that reaches
    `weights_to_prune` is pruned, and at least one group lives.

    Example:
        >>> select_live(np.array([[3.0, 1.0, 2.0]]), np.ones((1, 3)), 2)
        array([[ True, False, False]])
    """
    order = np.argsort(scores, axis=None, kind="stable")
    sizes_in_order = np.asarray(sizes).reshape(-1)[order]
    before = np.cumsum(sizes_in_order) - sizes_in_order
    pruned = before < weights_to_prune
    pruned[-1] = False
    live = np.ones(scores.size, bool)
    live[order] = ~pruned
    return live.reshape(scores.shape)


def magnitude(matrix: np.ndarray, group_sums: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Root mean square of every group, relative to that of the whole kernel.

    `matrix` has shape `(inputs, outputs)`; `group_sums` (sums of squares) and `sizes` (weights)
    have one value per group. 1 is average; all are 0 for a kernel of zeros.
    """
    overall = float(np.sqrt(np.mean(np.square(matrix, dtype=np.float64))))
    return np.sqrt(group_sums / sizes) / (overall if overall > 0 else 1.0)


Constraint = Callable[[tf.Tensor], tf.Tensor]


def constraint_of(variable: Any) -> Constraint | None:
    """A variable's constraint, if it has one."""
    return getattr(variable, "constraint", None)


def project(variable: Any, value: np.ndarray) -> np.ndarray:
    """The value that a variable's constraint makes of another, in the variable's shape."""
    constraint = constraint_of(variable)
    if constraint is None:
        return value
    return np.asarray(constraint(tf.constant(value)), value.dtype)


def holds_when_masked(constraint: Constraint | None, *, moved: bool = False) -> bool:
    """Whether what meets a constraint still meets it with some weights masked.

    With `moved`, weights change their places, too.
    """
    if constraint is None or type(constraint) is keras.constraints.NonNeg:
        return True
    return type(constraint) is keras.constraints.MaxNorm and not moved
