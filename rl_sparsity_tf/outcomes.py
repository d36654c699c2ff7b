"""What a network's decisions have come to: the figures that rewards are computed from."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from rl_sparsity_tf.cost_budget import CostBudget
from rl_sparsity_tf.objective import Score
from rl_sparsity_tf.operations import stored_as_integers
from rl_sparsity_tf.reward import Outcome

if TYPE_CHECKING:
    from rl_sparsity_tf.network import CompressedNetwork


def outcome_of(network: CompressedNetwork, score: Score) -> Outcome:
    """The outcome of a network with its present decisions.

    Args:
        network: The network.
        score: Its score on validation data, or an estimate of it.
    """
    altered = sum(network.errors[kernel.path] * kernel.size for kernel in network.kernels)
    sizes = sum(kernel.size for kernel in network.kernels)
    budget, progress = network.budget, None
    if isinstance(budget, CostBudget):
        states = network.states()
        stored_bits, progress = budget.stored_share(states), budget.saved(states)
    else:
        stored_bits = _stored_bits(network)
    return Outcome(
        metric=score.metric,
        dense_metric=network.dense.metric,
        loss=score.loss,
        retention=network.metric.retention(score.metric, network.dense.metric),
        sparsity=budget.sparsity,
        target_sparsity=budget.goal,
        stored_bits=stored_bits,
        reconstruction_error=altered / sizes,
        output_error=float(np.mean(list(network.output_errors.values()))),
        progress=progress,
    )


def _stored_bits(network: CompressedNetwork) -> float:
    stored = 0.0
    for kernel in network.kernels:
        integers = stored_as_integers(network.operations[kernel.path])
        stored += kernel.size * (0.25 if integers else 1.0)
    return stored / sum(kernel.size for kernel in network.kernels)
