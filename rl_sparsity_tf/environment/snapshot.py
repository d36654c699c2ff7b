"""What a network is at one moment of a search."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from rl_sparsity_tf.environment.reward import Outcome

if TYPE_CHECKING:
    from rl_sparsity_tf.environment.network import CompressedNetwork


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """Everything that a decision changes: to go back to, or to save.

    Attributes:
        weights: Weights of the wrapped model, masks and grids included; None where decisions do
            not train, and they follow from the operations.
        optimizer: The optimizer's variables.
        operations: Operations by kernel path.
        decided: Per kernel and group, whether it has been decided.
        errors: The autoencoder's error per kernel, as of the kernel's last decision.
        output_errors: How far each layer's outputs move, as of the kernel's last decision.
        pruned: Weights pruned per kernel.
        clock: Training steps taken.
        outcome: The last outcome.
    """

    weights: list[np.ndarray] | None
    optimizer: list[np.ndarray]
    operations: dict[str, np.ndarray]
    decided: dict[str, np.ndarray]
    errors: dict[str, float]
    output_errors: dict[str, float]
    pruned: np.ndarray
    clock: int
    outcome: Outcome

    @classmethod
    def of(cls, network: CompressedNetwork) -> Snapshot:
        """Copies what a network is now."""
        trained = network.least_squares is None
        return cls(
            weights=[one.numpy() for one in network.model.weights] if trained else None,
            optimizer=[one.numpy() for one in network.model.optimizer.variables],
            operations={path: value.copy() for path, value in network.operations.items()},
            decided={path: value.copy() for path, value in network.decided.items()},
            errors=dict(network.errors),
            output_errors=dict(network.output_errors),
            pruned=network.budget.pruned.copy(),
            clock=network.clock,
            outcome=network.outcome,
        )
