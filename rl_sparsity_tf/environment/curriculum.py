"""Curricula: how the target rises over the episodes of a search."""

from __future__ import annotations

import abc
import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from rl_sparsity_tf.checks import is_number
from rl_sparsity_tf.errors import ArgumentError, check_choice
from rl_sparsity_tf.settings import NamedSettings

# Episodes of a step of a linear curriculum: one is a demonstration, two are the agent's own.
_STEP = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """The episodes from `start` up to, not including, `end` of a search, under one target.

    `share` is the share of the way to the full target; `notes` are added to the episodes' history.
    """

    start: int
    end: int
    share: float = 1.0
    notes: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def episodes(self) -> int:
        """How many episodes it has."""
        return self.end - self.start


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curriculum(NamedSettings, abc.ABC):
    """What the curricula share."""

    kind: ClassVar[str] = "curriculum"

    @abc.abstractmethod
    def shares(self, episodes: int) -> list[tuple[float, int]]:
        """The shares of the way to the target, and for how many episodes each.

        Args:
            episodes: Episodes of the search, at least 1.

        Returns:
            Pairs with 1 or more episodes each; the last share is 1.
        """

    def schedule(self, episodes: int) -> list[Stage]:
        """The stages of a search, which follow on one another; the last is the full target."""
        pairs = self.shares(episodes)
        ends = list(itertools.accumulate(count for _, count in pairs))
        return [
            Stage(start=end - count, end=end, share=share, notes={"stage": share})
            for (share, count), end in zip(pairs, ends, strict=True)
        ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Constant(Curriculum):
    """The full target in every episode.

    Example:
        >>> rls.Constant().shares(8)
        [(1.0, 8)]
    """

    name: ClassVar[str] = "constant"

    def shares(self, episodes: int) -> list[tuple[float, int]]:
        """All episodes at the full target."""
        return [(1.0, episodes)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear(Curriculum):
    """Raises the target in equal steps, one every three episodes.

    The last third of the episodes, rounded up and no fewer than a step, has the full target; what
    does not fill a step goes to it as well.

    Raises:
        ArgumentError: If `start` is no number above 0 and below 1.

    Example:
        >>> rls.Linear(start=0.5).shares(9)
        [(0.5, 3), (0.75, 3), (1.0, 3)]
    """

    name: ClassVar[str] = "linear"

    start: float = 0.5
    """Share of the way to the target that the search begins with, in (0, 1)."""

    def __post_init__(self) -> None:
        """Checks the start."""
        if not is_number(self.start) or not 0.0 < self.start < 1.0:
            raise ArgumentError(
                f"Linear(start={self.start!r}) cannot be used. Expected the share of the way to "
                "the target that the search begins with, above 0 and below 1, for instance 0.5; "
                "Constant() begins with all of it."
            )
        object.__setattr__(self, "start", float(self.start))

    def shares(self, episodes: int) -> list[tuple[float, int]]:
        """Steps of three episodes, and the rest at the full target."""
        # No step may have more episodes than the full target.
        steps = max(0, episodes - max(_STEP, math.ceil(episodes / 3))) // _STEP
        rising = [self.start + (1.0 - self.start) * step / steps for step in range(steps)]
        return [*((share, _STEP) for share in rising), (1.0, episodes - _STEP * steps)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Staged(Curriculum):
    """Raises the target in stages of one's own, which get equal numbers of episodes.

    What is left over goes to the last stage; with fewer episodes than stages all of them have the
    full target.

    Raises:
        ArgumentError: If the stages are not shares that rise to 1.

    Example:
        >>> rls.Staged(stages=(0.5, 0.75, 1.0)).shares(8)
        [(0.5, 2), (0.75, 2), (1.0, 4)]
    """

    name: ClassVar[str] = "staged"

    stages: tuple[float, ...] = (0.5, 0.75, 1.0)
    """Shares of the way to the target, rising, the last of them 1."""

    def __post_init__(self) -> None:
        """Checks the stages and turns a list, as JSON gives it, into a tuple."""
        given: Any = self.stages
        good = isinstance(given, Sequence) and not isinstance(given, str) and len(given) > 0
        good = good and all(is_number(share) and 0.0 < share <= 1.0 for share in given)
        if not good or list(given) != sorted(set(given)) or given[-1] != 1.0:
            raise ArgumentError(
                f"Staged(stages={given!r}) cannot be used. Expected shares of the way to the "
                "target, each above the one before and the last of them 1, for instance "
                "stages=(0.5, 0.75, 1.0)."
            )
        object.__setattr__(self, "stages", tuple(float(share) for share in given))

    def shares(self, episodes: int) -> list[tuple[float, int]]:
        """Equal numbers of episodes, and the rest at the full target."""
        each = episodes // len(self.stages)
        earlier = [(share, each) for share in self.stages[:-1] if each]
        return [*earlier, (1.0, episodes - each * len(earlier))]


_CURRICULA: dict[str, type[Curriculum]] = {one.name: one for one in (Constant, Linear, Staged)}


def resolve_curriculum(curriculum: str | Curriculum) -> Curriculum:
    """The curriculum meant by a name or by a configuration itself.

    Raises ArgumentError if the name is not known or the object is no curriculum.
    """
    if isinstance(curriculum, str):
        return _CURRICULA[check_choice("curriculum", curriculum, _CURRICULA)]()
    if isinstance(curriculum, type) and issubclass(curriculum, Curriculum):
        raise ArgumentError(
            f"curriculum={curriculum.__name__} is a class. Expected an object: write "
            f"{curriculum.__name__}()."
        )
    if type(curriculum) not in _CURRICULA.values():
        raise ArgumentError(
            f"curriculum={curriculum!r} is a {type(curriculum).__name__}. Expected 'constant', "
            "'linear', 'staged', or a configuration such as rls.Staged(stages=(0.5, 1.0))."
        )
    return curriculum
