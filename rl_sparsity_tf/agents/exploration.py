"""Exploring from the best plan so far: first return to it, then leave it at a few decisions.

In a search of some dozens of episodes, an agent that explores by single random decisions hardly
ever sees what a small change of a good plan is worth: the random decisions that come with it ruin
the plan. So episodes follow the best sequence of decisions known, and the policy decides in between
(Ecoffet et al. 2021, "First return, then explore", arXiv 2004.12919). What is learned is learned
off policy, from what was done.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from rl_sparsity_tf.randomness import pack_generator, unpack_generator

# Share of the episodes that follow the best sequence.
_SHARE = 0.7
# Where such an episode is left: at one decision, or with this probability at two.
_SECOND = 0.5
# Once left, the policy decides on the next, too, with this probability.
_STAYS = 0.5
# Episodes without one at the beginning: the best of a few is no place to return to. Good ones that
# were demonstrated are.
_FREE = 6


class Anchor:
    """Remembers the best episode's actions, and says when to repeat them.

    Args:
        generator: Draws when to leave them.

    Attributes:
        generator: The same.

    Example:
        >>> anchor.restart(steps)
        >>> action = agent.step(time_step, allowed=anchor.offer(allowed))
        >>> anchor.take(action)
        >>> anchor.finish(value)
    """

    def __init__(self, generator: np.random.Generator):
        self.generator = generator
        self._best: list[int] = []
        self._value = -np.inf
        self._taken: list[int] = []
        self._episodes = 0
        self._returns = self._away = False
        self._leaves: set[int] = set()

    @property
    def free(self) -> bool:
        """Whether it is too early to return to anything."""
        return self._episodes < _FREE

    def restart(self, steps: int) -> None:
        """To be called at the start of an episode.

        Args:
            steps: Its decisions.
        """
        self._taken, self._away = [], False
        self._returns = (
            not self.free and len(self._best) == steps and bool(self.generator.random() < _SHARE)
        )
        places = 1 + int(self.generator.random() < _SECOND)
        self._leaves = {int(place) for place in self.generator.integers(0, steps, places)}

    def offer(self, allowed: np.ndarray) -> np.ndarray:
        """What the agent may choose from at this point.

        Args:
            allowed: 1 for every action that may be taken.

        Returns:
            Only the best episode's action where it is returned to, all but that where it is left,
            and all that is allowed elsewhere and where that is none.
        """
        if not self._returns:
            return allowed
        place = len(self._taken)
        best = np.arange(len(allowed)) == self._best[place]
        leaves = place in self._leaves
        self._away = leaves or (self._away and bool(self.generator.random() < _STAYS))
        if self._away and not leaves:
            return allowed
        offered = np.where(best != leaves, allowed, 0)
        return offered if offered.any() else allowed

    def take(self, action: int) -> None:
        """Notes the action that was taken."""
        self._taken.append(int(action))

    def finish(self, value: float, demonstrated: bool = False) -> None:
        """Notes what the episode was worth, and whether a heuristic played it."""
        self._episodes = max(self._episodes + 1, _FREE if demonstrated else 0)
        if value > self._value:
            self._best, self._value = self._taken, value

    def forget(self) -> None:
        """Forgets the best episode, whose value has no meaning any more."""
        self._best, self._value = [], -np.inf

    def get_state(self) -> dict[str, np.ndarray]:
        """Everything to go on from, as arrays."""
        return {
            "anchor:generator": pack_generator(self.generator),
            "anchor:best": np.array(self._best, np.int64),
            "anchor:value": np.array(self._value),
            "anchor:episodes": np.array(self._episodes),
        }

    def set_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Goes on from what [get_state][] gave.

        Raises:
            ValueError: If it is no such state; also KeyError and TypeError.
        """
        best, value = state["anchor:best"], float(state["anchor:value"])
        if best.dtype != np.int64 or best.ndim != 1 or (best < 0).any() or not value <= 1.0:
            raise ValueError(f"the best episode has the value {value} or no actions")
        self.generator = unpack_generator(state["anchor:generator"])
        self._best, self._value = best.tolist(), value
        self._episodes = int(state["anchor:episodes"])
