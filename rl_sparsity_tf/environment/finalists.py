"""The plans that are fine-tuned at the end: the best of every proposer, as far as there is room."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator

from rl_sparsity_tf.environment.candidates import Candidate, is_better
from rl_sparsity_tf.environment.reward import Outcome

# Of the losses of one network that was computed in two ways.
_EQUAL = 1e-7


class Finalists:
    """Keeps the best plans of a search, one per proposer.

    What is best after a recovery in closed form is not always best after the fine-tuning, and the
    plans of one proposer are much alike. So the best plans of different ones go into a final,
    which the validation data decides.

    Args:
        room: How many to keep.
        kept: Those to begin with.

    Example:
        >>> finalists = Finalists(3)
        >>> if finalists.wants(value, outcome, "dqn"):
        ...     finalists.add(Candidate.of(network, value, episode, "dqn"))
        >>> finalists.best.value
    """

    def __init__(self, room: int, kept: Iterable[Candidate] = ()):
        self._room = room
        self._kept: list[Candidate] = []
        for candidate in kept:
            self.add(candidate)

    def __iter__(self) -> Iterator[Candidate]:
        return iter(self._kept)

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def best(self) -> Candidate | None:
        """The one of highest value, at equal values that of the lowest loss."""
        return self._kept[0] if self._kept else None

    def wants(self, value: float, outcome: Outcome, proposed_by: str) -> bool:
        """Whether a plan would be kept.

        Args:
            value: What it is worth.
            outcome: Its outcome.
            proposed_by: Its proposer.
        """
        own = next((one for one in self._kept if one.proposed_by == proposed_by), None)
        if own is not None:
            return is_better(value, outcome, own)
        return len(self._kept) < self._room or is_better(value, outcome, self._kept[-1])

    def add(self, candidate: Candidate) -> None:
        """Takes a plan in, in place of its proposer's or of the worst, if there is no room."""
        rest = [one for one in self._kept if one.proposed_by != candidate.proposed_by]
        # The same network twice would be trained twice: plans also differ in what makes no odds.
        twins = [_alike(one, candidate) for one in rest]
        best = _best_first([*itertools.compress(rest, twins), candidate])[0]
        others = [one for one, twin in zip(rest, twins, strict=True) if not twin]
        self._kept = _best_first([*others, best])[: self._room]


def _alike(one: Candidate, other: Candidate) -> bool:
    """Whether two plans lead to the same network, as far as its outcome tells."""
    if one.plan == other.plan:
        return True
    same_metric = one.outcome.metric == other.outcome.metric
    return same_metric and math.isclose(one.outcome.loss, other.outcome.loss, rel_tol=_EQUAL)


def _best_first(candidates: list[Candidate]) -> list[Candidate]:
    return sorted(candidates, key=lambda one: (-one.value, one.outcome.loss))
