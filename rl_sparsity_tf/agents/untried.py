"""Which decisions lead to plans that were not tried yet: a tree of the sequences taken so far."""

from __future__ import annotations

import dataclasses

import numpy as np

_MOST_ACTIONS = 63
"""As bits of a number they have to be saved."""


@dataclasses.dataclass
class _Node:
    """A point of an episode: what was legal there, what followed, and whether all of it did."""

    legal: np.ndarray | None = None
    following: dict[int, _Node] = dataclasses.field(default_factory=dict)
    exhausted: bool = False


class Untried:
    """Keeps episodes from repeating one another.

    An episode is a sequence of actions. A decision is exhausted once every sequence that begins
    with it was played; the others are offered, so that each episode ends in a plan that was not
    evaluated, as long as there is one. A search whose policy has settled then goes on with what
    the policy likes next, instead of paying for the same plan again.

    Example:
        >>> untried = Untried()
        >>> untried.restart()
        >>> action = agent.step(time_step, allowed=untried.offer(time_step.observation["legal"]))
        >>> untried.take(action)
        >>> untried.finish()
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
        """The legal actions that lead to something new; all of them where none does.

        Args:
            legal: 1 for every legal action.
        """
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
    def from_array(cls, rows: np.ndarray) -> Untried:
        """Reads what [to_array][] gave.

        Raises:
            ValueError: If it is no such array.
        """
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
