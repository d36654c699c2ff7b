"""Evaluating a whole plan at once, whoever made it."""

from __future__ import annotations

from rl_sparsity_tf.environment.network import CompressedNetwork
from rl_sparsity_tf.environment.reward import Outcome
from rl_sparsity_tf.layers.plan import CompressionPlan


def evaluate_plan(network: CompressedNetwork, plan: CompressionPlan, steps: int = 0) -> Outcome:
    """Puts a plan on the dense network, lets it recover, and evaluates it once.

    Args:
        network: The network; it is left with the plan applied.
        plan: A plan with operations for every kernel, of the network's kind of groups.
        steps: Training steps per kernel, where the recovery is fine-tuning.

    Returns:
        The outcome after recovery.
    """
    network.reset()
    for kernel in network.kernels:
        operations = plan.kernels[kernel.path].operations
        network.assign(kernel.path, operations)
        if network.recovery.method == "finetune":
            network.train_steps(steps)
    return network.finish(evaluated=False)
