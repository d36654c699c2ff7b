"""The plans that are fine-tuned at the end: the best of every proposer, as far as there is room."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from rl_sparsity_tf.candidates import Candidate, is_better
from rl_sparsity_tf.reward import Outcome


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
        # The same plan twice would be trained twice.
        rest = [one for one in rest if one.plan != candidate.plan]
        self._kept = _best_first([*rest, candidate])[: self._room]


def _best_first(candidates: list[Candidate]) -> list[Candidate]:
    return sorted(candidates, key=lambda one: (-one.value, one.outcome.loss))
