"""Exploring from the best plan so far, and towards plans that were not tried yet.

Exploring from the best plan so far: first return to it, then leave it at a few decisions.

In a search of some dozens of episodes, an agent that explores by single random decisions hardly
ever sees what a small change of a good plan is worth: the random decisions that come with it ruin
the plan. So episodes follow the best sequence of decisions known, and the policy decides in between
(Ecoffet et al. 2021, "First return, then explore", arXiv 2004.12919). What is learned is learned
off policy, from what was done.
"""

from __future__ import annotations

import dataclasses
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


class ReturnThenExplore:
    """Remembers the best episode's actions, and says when to repeat them.

    The generator draws when to leave them.

    Example:
        >>> explorer.restart(steps)
        >>> action = agent.step(time_step, allowed=explorer.offer(allowed))
        >>> explorer.take(action)
        >>> explorer.finish(value)
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
        """To be called at the start of an episode of so many decisions."""
        self._taken, self._away = [], False
        self._returns = (
            not self.free and len(self._best) == steps and bool(self.generator.random() < _SHARE)
        )
        places = 1 + int(self.generator.random() < _SECOND)
        self._leaves = {int(place) for place in self.generator.integers(0, steps, places)}

    def offer(self, allowed: np.ndarray) -> np.ndarray:
        """Of the actions that may be taken (1 in `allowed`), those the agent may choose from here.

        That is only the best episode's action where it is returned to, all but that where it is
        left, and all that is allowed elsewhere and where that is none.
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

        Raises ValueError, KeyError or TypeError if it is no such state.
        """
        best, value = state["anchor:best"], float(state["anchor:value"])
        if best.dtype != np.int64 or best.ndim != 1 or (best < 0).any() or not value <= 1.0:
            raise ValueError(f"the best episode has the value {value} or no actions")
        self.generator = unpack_generator(state["anchor:generator"])
        self._best, self._value = best.tolist(), value
        self._episodes = int(state["anchor:episodes"])


_MOST_ACTIONS = 63
"""As bits of a number they have to be saved."""


@dataclasses.dataclass
class _Node:
    """A point of an episode: what was legal there, what followed, and whether all of it did."""

    legal: np.ndarray | None = None
    following: dict[int, _Node] = dataclasses.field(default_factory=dict)
    exhausted: bool = False


class DecisionTree:
    """Keeps episodes from repeating one another.

    An episode is a sequence of actions. A decision is exhausted once every sequence that begins
    with it was played; the others are offered, so that each episode ends in a plan that was not
    evaluated, as long as there is one. A search whose policy has settled then goes on with what
    the policy likes next, instead of paying for the same plan again.

    Example:
        >>> tree = DecisionTree()
        >>> tree.restart()
        >>> action = agent.step(time_step, allowed=tree.offer(time_step.observation["legal"]))
        >>> tree.take(action)
        >>> tree.finish()
    """

    def __init__(self) -> None:
        self._root = _Node()
        self._way: list[_Node] = [self._root]
        self._actions: list[int] = []
        self._played: list[np.ndarray] = []

    @property
    def exhausted(self) -> bool:
        """Whether every sequence was played."""
        return self._root.exhausted

    def restart(self) -> None:
        """To be called at the start of an episode."""
        self._way, self._actions = [self._root], []

    def offer(self, legal: np.ndarray) -> np.ndarray:
        """The legal actions (1) that lead to something new; all of them where none does."""
        node = self._way[-1]
        node.legal = np.asarray(legal, np.int32)
        done = [action for action, child in node.following.items() if child.exhausted]
        new = node.legal.copy()
        new[done] = 0
        return new if new.any() else node.legal

    def take(self, action: int) -> None:
        """Notes the action that followed."""
        self._way.append(self._way[-1].following.setdefault(int(action), _Node()))
        self._actions.append(int(action))

    def finish(self) -> None:
        """Notes that the episode has ended."""
        self._way[-1].exhausted = True
        for node in reversed(self._way[:-1]):
            assert node.legal is not None
            node.exhausted = all(
                action in node.following and node.following[action].exhausted
                for action in np.flatnonzero(node.legal)
            )
        rows = [(_bits(node.legal), a) for node, a in zip(self._way, self._actions, strict=False)]
        self._played.append(np.array(rows, np.int64).reshape(-1, 2))

    def to_array(self) -> np.ndarray:
        """The sequences played, to be saved: rows of episode, legal actions as bits, action."""
        rows = [
            np.column_stack([np.full(len(one), number), one])
            for number, one in enumerate(self._played)
        ]
        return np.concatenate([np.zeros((0, 3), np.int64), *rows])

    @classmethod
    def from_array(cls, rows: np.ndarray) -> DecisionTree:
        """Reads what [to_array][] gave; raises ValueError if the rows are no such array."""
        found = cls()
        if rows.dtype != np.int64 or rows.ndim != 2 or rows.shape[1] != 3:
            raise ValueError(f"sequences are of type {rows.dtype} and shape {rows.shape}")
        numbers = rows[:, 0]
        if (np.diff(numbers, prepend=-1) > 1).any() or (np.diff(numbers, prepend=0) < 0).any():
            raise ValueError("sequences are not numbered through")
        for row in np.split(rows, np.flatnonzero(np.diff(numbers)) + 1) if len(rows) else ():
            found.restart()
            for _, bits, action in row.tolist():
                if not 0 <= action < _MOST_ACTIONS or not bits >> action & 1 or bits < 0:
                    raise ValueError(f"sequences hold the action {action}, which was not legal")
                found.offer(
                    np.array([bits >> place & 1 for place in range(_MOST_ACTIONS)], np.int32)
                )
                found.take(action)
            found.finish()
        return found


def _bits(legal: np.ndarray | None) -> int:
    assert legal is not None
    return sum(1 << int(place) for place in np.flatnonzero(legal))
