"""Learnable masks: the hard concrete distribution and the selection that holds a density."""

from __future__ import annotations

import numpy as np
import tensorflow as tf

MASKS = ("straight_through", "hard_concrete")
"""How a learnable mask gets its gradient."""

# Temperature and stretch limits recommended by Louizos et al. 2018, section 4.
_BETA, _GAMMA, _ZETA = 2.0 / 3.0, -0.1, 1.1


def hard_concrete_sample(logits: tf.Tensor) -> tf.Tensor:
    r"""Samples mask values from the hard concrete distribution, differentiable in the logits.

    \(s = \sigma((\log u - \log(1-u) + \log\alpha)/\beta)\), \(\bar s = s(\zeta-\gamma)+\gamma\),
    \(z = \min(1, \max(0, \bar s))\): equations 10 to 11 of Louizos et al. 2018, "Learning sparse
    neural networks through L0 regularization", arXiv 1712.01312.

    Args:
        logits: \(\log\alpha\), any shape.

    Returns:
        Values in [0, 1] of the same shape; 0 and 1 have positive probability.
    """
    u = tf.random.uniform(tf.shape(logits), 1e-6, 1.0 - 1e-6, dtype=logits.dtype)
    s = tf.sigmoid((tf.math.log(u) - tf.math.log1p(-u) + logits) / _BETA)
    return tf.clip_by_value(s * (_ZETA - _GAMMA) + _GAMMA, 0.0, 1.0)


def select_live(scores: np.ndarray, sizes: np.ndarray, weights_to_prune: int) -> np.ndarray:
    """Chooses the groups that live: prunes those of lowest score until enough weights are gone.

    Args:
        scores: One score per group, any shape; ties go to the group that comes first.
        sizes: Weights per group, same shape.
        weights_to_prune: Weights to prune at least; the smallest number of groups that reaches it
            is pruned, and at least one group lives.

    Returns:
        Booleans of the same shape, True where the group lives.

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

    Args:
        matrix: Kernel, shape `(inputs, outputs)`.
        group_sums: Sum of squares per group.
        sizes: Weights per group, same shape.

    Returns:
        Saliencies of the groups' shape; 1 is average, and all 0 for a kernel of zeros.
    """
    overall = float(np.sqrt(np.mean(np.square(matrix, dtype=np.float64))))
    return np.sqrt(group_sums / sizes) / (overall if overall > 0 else 1.0)
