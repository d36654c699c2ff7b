"""Budgets of bytes over made-up costs of kernels."""

import numpy as np

from rl_sparsity_tf.allocation.size_budget import KernelCosts, SizeBudget


def dense_costs(weights, integers=True):
    """A dense tensor: what lives does not matter."""
    live = np.array([1.0, weights])
    return KernelCosts(live, np.full(2, 4.0 * weights), np.full(2, 1.0 * weights + 12))


def sparse_costs(weights):
    """5 bytes a float, 2 an integer."""
    live = np.array([0.0, weights])
    return KernelCosts(live, 5.0 * live, 2.0 * live)


def budget(limit, costs, weights, fixed=100.0):
    sizes = [np.ones((count, 1), np.int64) for count in weights]
    return SizeBudget(limit, fixed, costs, sum(weights), sizes, f"Target(tflite_bytes={limit})")
