"""What a network's decisions have come to: the figures that rewards are computed from."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from rl_sparsity_tf.allocation.budgets import CostBudget
from rl_sparsity_tf.data.metrics import Score
from rl_sparsity_tf.environment.reward import Outcome
from rl_sparsity_tf.layers.operations import stored_as_integers

if TYPE_CHECKING:
    from rl_sparsity_tf.environment.network import CompressedNetwork


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


def retargeted(network: CompressedNetwork, outcome: Outcome) -> Outcome:
    """An outcome of the present decisions, by the budget that the network has now.

    What was measured does not depend on the target; how much of it is reached does.
    """
    budget, progress = network.budget, None
    if isinstance(budget, CostBudget):
        progress = budget.saved(network.states())
    return dataclasses.replace(outcome, target_sparsity=budget.goal, progress=progress)


def _stored_bits(network: CompressedNetwork) -> float:
    stored = 0.0
    for kernel in network.kernels:
        integers = stored_as_integers(network.operations[kernel.path])
        stored += kernel.size * (0.25 if integers else 1.0)
    return stored / sum(kernel.size for kernel in network.kernels)
