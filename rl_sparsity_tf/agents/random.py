"""Uniformly random legal actions: the baseline."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from rl_sparsity_tf.agents import tf_agent
from rl_sparsity_tf.agents.base import Transition
from rl_sparsity_tf.agents.configs import Random, SlotShape


def build(
    config: Random,
    time_step_spec: Any,
    action_spec: Any,
    seed: int,
    slots: SlotShape | None = None,  # noqa: ARG001  it has no network
) -> RandomAgent:
    """Builds the agent; called by `build_agent`."""
    return RandomAgent(config, time_step_spec, action_spec, seed)


class RandomAgent(tf_agent.TFAgent):
    """Draws each legal action with the same probability, also where it is asked for the best."""

    name = "random"

    def __init__(self, config: Random, time_step_spec: Any, action_spec: Any, seed: int) -> None:
        _, _, n_features, n_actions = tf_agent.checked_specs(time_step_spec, action_spec)
        super().__init__(n_features=n_features, n_actions=n_actions, seed=seed)
        self.config = config

    def _choose(
        self,
        preferences: NDArray[np.float64],
        legal: NDArray[np.int32],
        explore: bool,
    ) -> int:
        return super()._choose(preferences, legal, explore=True)

    def _evaluate(
        self,
        state: NDArray[np.float32],
        legal: NDArray[np.int32],
    ) -> tuple[NDArray[np.float64], dict[str, NDArray[np.float32]]]:
        return np.zeros(len(legal)), {}

    def _probabilities(
        self,
        preferences: NDArray[np.float64],
        legal: NDArray[np.int32],
    ) -> NDArray[np.float64]:
        return (legal > 0) / np.count_nonzero(legal)

    def _learn(self, transitions: list[Transition]) -> dict[str, float]:
        return {}
