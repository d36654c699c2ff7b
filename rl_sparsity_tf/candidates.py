"""Plans that were evaluated, with the weights they were evaluated at."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import tf_keras as keras

from rl_sparsity_tf.kernels import walk
from rl_sparsity_tf.network import CompressedNetwork
from rl_sparsity_tf.plan import CompressionPlan
from rl_sparsity_tf.reward import Outcome
from rl_sparsity_tf.wrapper import unwrapped

PROPOSED = -1
"""The episode of plans that were evaluated before the first."""


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A complete plan as the search found it.

    Attributes:
        plan: The plan; it meets the target.
        weights: The recovered weights of every layer by path, before operations are applied.
        outcome: Its outcome on validation data.
        value: What the reward says of the finished network.
        episode: The search episode that found it; -1 for a heuristic's plan, evaluated before.
        proposed_by: Who did, e.g. `"dqn"`.
    """

    plan: CompressionPlan
    weights: Mapping[str, list[np.ndarray]]
    outcome: Outcome
    value: float
    episode: int
    proposed_by: str

    @classmethod
    def of(
        cls, network: CompressedNetwork, value: float, episode: int, proposed_by: str
    ) -> Candidate:
        """Takes what a network is at the end of an episode."""
        weights = network.latent_weights()
        return cls(network.plan, weights, network.outcome, value, episode, proposed_by)

    @property
    def found_by(self) -> str:
        """Who proposed it, and when."""
        if self.episode == PROPOSED:
            return self.proposed_by
        return f"{self.proposed_by}, episode {self.episode + 1}"

    def put_weights(self, wrapped: keras.Model) -> None:
        """Sets a wrapped model's layers to the candidate's weights."""
        for path, layer in walk(wrapped):
            unwrapped(layer).set_weights(self.weights[path])

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Arrays to save: everything as numbers and text, nothing pickled."""
        arrays = {
            f"weights:{index}:{path}": value
            for path, values in self.weights.items()
            for index, value in enumerate(values)
        }
        arrays["plan"] = np.array(self.plan.to_json())
        arrays["layers"] = np.array(list(self.weights))
        arrays["outcome"] = np.array(list(dataclasses.asdict(self.outcome).values()), np.float64)
        arrays["value"] = np.array(self.value)
        arrays["episode"] = np.array(self.episode)
        arrays["proposed_by"] = np.array(self.proposed_by)
        return arrays

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Candidate:
        """Reads what [to_arrays][] gave."""
        weights: dict[str, list[np.ndarray]] = {str(path): [] for path in arrays["layers"]}
        for key, value in arrays.items():
            if key.startswith("weights:"):
                _, _, path = key.split(":", 2)
                weights[path].append(value)
        names = [field.name for field in dataclasses.fields(Outcome)]
        figures: dict[str, Any] = dict(zip(names, arrays["outcome"].tolist(), strict=True))
        if math.isnan(figures["progress"]):  # as None is saved
            figures["progress"] = None
        return cls(
            plan=CompressionPlan.from_json(str(arrays["plan"])),
            weights=weights,
            outcome=Outcome(**figures),
            value=float(arrays["value"]),
            episode=int(arrays["episode"]),
            proposed_by=str(arrays["proposed_by"]),
        )


def is_better(value: float, outcome: Outcome, than: Candidate | None) -> bool:
    """Whether a value is higher than a candidate's, or the same at a lower loss."""
    return than is None or (value, -outcome.loss) > (than.value, -than.outcome.loss)
