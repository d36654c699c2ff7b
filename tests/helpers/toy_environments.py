"""Small environments that keep the contract of the search's own, for testing agents."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
from tf_agents.environments import py_environment
from tf_agents.specs import array_spec
from tf_agents.trajectories import time_step as ts

N_ACTIONS = 4
CONTEXTS = 6
STEPS = 6


def reward_table() -> np.ndarray:
    """Reward of each action in each context: 1 for the best, at most 0.4 for the others."""
    generator = np.random.default_rng(7)
    table = generator.uniform(-0.6, 0.4, (CONTEXTS, N_ACTIONS)).astype(np.float32)
    table[np.arange(CONTEXTS), np.arange(CONTEXTS) % N_ACTIONS] = 1.0
    return table


class ContextualEnvironment(py_environment.PyEnvironment):
    """Six steps; the best action depends on the context shown, and some actions are illegal.

    With `varied=False` every episode shows the same contexts and masks. With `delayed=True` the
    mean of the rewards is paid at the last step, and nothing before it. An illegal action counts
    as action 0 and is counted.
    """

    def __init__(self, *, varied: bool = True, delayed: bool = False, seed: int = 0) -> None:
        super().__init__()
        self.table = reward_table()
        self.varied, self.delayed = varied, delayed
        self.illegal_actions = 0
        self.generator = np.random.default_rng(seed)
        self.position, self.total, self.done = 0, 0.0, True
        self._draw()

    def _draw(self) -> None:
        self.contexts = self.generator.integers(0, CONTEXTS, STEPS)
        self.masks = self.generator.integers(0, 2, (STEPS + 1, N_ACTIONS)).astype(np.int32)
        self.masks[np.arange(STEPS + 1), self.generator.integers(0, N_ACTIONS, STEPS + 1)] = 1

    def action_spec(self) -> array_spec.BoundedArraySpec:
        return array_spec.BoundedArraySpec((), np.int32, 0, N_ACTIONS - 1, name="action")

    def observation_spec(self) -> dict[str, array_spec.BoundedArraySpec]:
        return {
            "state": array_spec.BoundedArraySpec((CONTEXTS + 1,), np.float32, -1.0, 1.0),
            "legal": array_spec.BoundedArraySpec((N_ACTIONS,), np.int32, 0, 1),
        }

    def reward_spec(self) -> array_spec.BoundedArraySpec:
        return array_spec.BoundedArraySpec((), np.float32, -1.0, 1.0, name="reward")

    def observation(self) -> dict[str, np.ndarray]:
        state = np.zeros(CONTEXTS + 1, np.float32)
        if self.position < STEPS:
            state[self.contexts[self.position]] = 1.0
        state[-1] = self.position / STEPS
        return {"state": state, "legal": self.masks[self.position].copy()}

    def best_reward(self) -> float:
        """The most the current step can earn."""
        legal = self.masks[self.position] > 0
        return float(self.table[self.contexts[self.position]][legal].max())

    def _reset(self) -> ts.TimeStep:
        if self.varied:
            self._draw()
        self.position, self.total, self.done = 0, 0.0, False
        return ts.restart(self.observation())

    def _step(self, action: Any) -> ts.TimeStep:
        if self.done:
            return self.reset()
        action = int(action)
        if not 0 <= action < N_ACTIONS or not self.masks[self.position][action]:
            self.illegal_actions += 1
            action = 0
        earned = self.table[self.contexts[self.position], action]
        self.total += float(earned)
        self.position += 1
        self.done = self.position == STEPS
        if self.delayed:
            earned = np.float32(self.total / STEPS if self.done else 0.0)
        if self.done:
            return ts.termination(self.observation(), np.float32(earned))
        return ts.transition(self.observation(), np.float32(earned))

    def seed(self, seed: int) -> None:
        self.generator = np.random.default_rng(seed)

    def get_state(self) -> dict[str, Any]:
        names = ("contexts", "masks", "position", "total", "done", "generator")
        saved = {name: copy.deepcopy(getattr(self, name)) for name in names}
        return {**saved, "_current_time_step": self._current_time_step}

    def set_state(self, state: dict[str, Any]) -> None:
        for name, value in copy.deepcopy(state).items():
            setattr(self, name, value)


def play_search_episode(env: ContextualEnvironment, agent: Any, episodes: int = 4) -> float:
    """One search episode of several environment episodes; returns the sum of the rewards."""
    total = 0.0
    for _ in range(episodes):
        time_step = env.reset()
        while not time_step.is_last():
            time_step = env.step(agent.step(time_step))
            agent.observe(time_step)
            total += float(time_step.reward)
    return total


def greedy_share(agent: Any, *, episodes: int = 20, seed: int = 99) -> float:
    """What the best known actions earn, as a share of the most that could be earned."""
    env = ContextualEnvironment(seed=seed)
    earned = best = 0.0
    for _ in range(episodes):
        time_step = env.reset()
        while not time_step.is_last():
            best += env.best_reward()
            time_step = env.step(agent.act(time_step))
            earned += float(time_step.reward)
    return earned / best
