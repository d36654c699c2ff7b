"""Plans that were evaluated, with the weights they were evaluated at.

The plans that are fine-tuned at the end: the best of every proposer, as far as there is room.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import tf_keras as keras

from rl_sparsity_tf.allocation.size_budget import predicted_bytes
from rl_sparsity_tf.environment.network import CompressedNetwork
from rl_sparsity_tf.environment.reward import Outcome
from rl_sparsity_tf.layers.kernels import walk
from rl_sparsity_tf.layers.plan import CompressionPlan, KernelPlan
from rl_sparsity_tf.layers.wrapper import unwrapped

PROPOSED = -1
"""The episode of plans that were evaluated before the first."""


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A complete plan that meets the target, as the search found it.

    Attributes:
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
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], network: CompressedNetwork) -> Candidate:
        """Reads what [to_arrays][] gave, for a network whose layers may have other names by now.

        Raises ValueError, KeyError or TypeError if the arrays are no candidate of the network, and
        PlanError if they hold no plan.
        """
        shapes = {
            path: [(weight.shape, weight.dtype) for weight in unwrapped(layer).get_weights()]
            for path, layer in walk(network.model)
        }
        before = [str(path) for path in arrays["layers"].tolist()]
        if len(before) != len(shapes):
            raise ValueError(f"it has the weights of {len(before)} layers, not of {len(shapes)}")
        weights: dict[str, list[np.ndarray]] = {}
        for old, (path, wanted) in zip(before, shapes.items(), strict=True):
            weights[path] = [arrays[f"weights:{index}:{old}"] for index in range(len(wanted))]
            if [(value.shape, value.dtype) for value in weights[path]] != wanted:
                raise ValueError(f"it has other weights for {path!r} than the model")
            if not all(np.isfinite(value).all() for value in weights[path]):
                raise ValueError(f"it has weights for {path!r} that are not finite")
        names = [field.name for field in dataclasses.fields(Outcome)]
        figures: dict[str, Any] = dict(zip(names, arrays["outcome"].tolist(), strict=True))
        if math.isnan(figures["progress"]):  # as None is saved
            figures["progress"] = None
        value = float(arrays["value"])
        if not -1.0 <= value <= 1.0:
            raise ValueError(f"it has the value {value}, which is not in [-1, 1]")
        return cls(
            plan=plan_of(str(arrays["plan"]), network),
            weights=weights,
            outcome=Outcome(**figures),
            value=value,
            episode=int(arrays["episode"]),
            proposed_by=str(arrays["proposed_by"]),
        )


def figures_of(
    network: CompressedNetwork, value: float, proposed_by: str, episode: int | None = None
) -> dict[str, Any]:
    """What callbacks are told of the network's plan, which was evaluated."""
    outcome = network.outcome
    return {
        "value": value,
        "metric": outcome.metric,
        "loss": outcome.loss,
        "sparsity": outcome.sparsity,
        "bytes": predicted_bytes(network.budget, network.states()),
        "proposed_by": proposed_by,
        "episode": episode,
    }


def plan_of(text: str, network: CompressedNetwork) -> CompressionPlan:
    """Reads a network's plan from JSON; the layers may have had other names then.

    How the network's kernels are cut and stored does not matter. Raises ValueError if the plan is
    of another network, and PlanError if it is none.
    """
    plan = CompressionPlan.from_json(text)
    entries = list(plan.kernels.values())
    found = [(entry.shape, entry.layout) for entry in entries if isinstance(entry, KernelPlan)]
    if found != [(kernel.shape, kernel.spec.layout) for kernel in network.kernels]:
        raise ValueError("it has a plan of other kernels than the network's")
    pairs = zip(entries, network.kernels, strict=True)
    return CompressionPlan(dataclasses.replace(entry, path=one.path) for entry, one in pairs)


def digests_of(array: np.ndarray) -> set[str]:
    """The digests of evaluated plans in a checkpoint; raises ValueError if they are none."""
    found = {bytes(one).decode("ascii") for one in array.tolist()} if array.ndim == 1 else {""}
    if not all(len(one) == 64 for one in found) or array.dtype != np.dtype("S64"):
        raise ValueError("the digests of its plans are none")
    return found


def is_better(value: float, outcome: Outcome, than: Candidate | None) -> bool:
    """Whether a value is higher than a candidate's, or the same at a lower loss."""
    return than is None or (value, -outcome.loss) > (than.value, -than.outcome.loss)


# Of the losses of one network that was computed in two ways.
_EQUAL = 1e-7


class Finalists:
    """Keeps the best plans of a search, one per proposer and no more than there is room for.

    What is best after a recovery in closed form is not always best after the fine-tuning, and the
    plans of one proposer are much alike. So the best plans of different ones go into a final, which
    the validation data decides.

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
        """Whether a plan of this value and outcome would be kept."""
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
