"""Heats: short trainings decide whose plan, and with which masks, the long ones begin.

What a plan is worth after the fit says little of what training makes of it. Masks in context fit
best, and can train worst: many of their weights are small, and masks that learn let others take
their places. So the plans of the best proposers begin with their own masks and with those of the
largest trained weights; all are trained for an eighth of the epochs, and the best go on, from the
start (successive halving, Jamieson & Talwalkar 2016, "Non-stochastic best arm identification",
arXiv 1502.07943, in two rounds).
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Sequence

import tensorflow as tf

from rl_sparsity_tf.callbacks import HEATS
from rl_sparsity_tf.console import SearchProgress
from rl_sparsity_tf.data.batches import count_rows
from rl_sparsity_tf.data.metrics import Metric, Score
from rl_sparsity_tf.environment.candidates import Candidate
from rl_sparsity_tf.environment.network import CompressedNetwork, evaluate_plan
from rl_sparsity_tf.environment.reranking import can_rerank, ranked_as_trained
from rl_sparsity_tf.search.finishing import Task, trained

# Heats take no longer than one training, and no more starts than this are worth it.
_MOST_STARTS = 8
# With fewer epochs a heat would be as long as the training.
_LEAST_EPOCHS = 4
# Plans beside those that would be finished without heats.
_MORE = 2


@dataclasses.dataclass(frozen=True)
class Start:
    """From where a final training begins.

    Attributes:
        candidate: The plan, and the weights that were fitted to it.
        as_trained: Whether its masks are those of the largest trained weights, not the plan's own.
    """

    candidate: Candidate
    as_trained: bool = False

    def __str__(self) -> str:
        """Who proposed the plan, and which masks it has."""
        masks = ", masks of the largest weights" if self.as_trained else ""
        return self.candidate.found_by + masks


def has_heats(task: Task) -> bool:
    """Whether there are heats: not in short trainings, nor where channels are removed first."""
    training = task.training
    whole = task.network.decisions.group == "channel" or training.mask != "straight_through"
    return training.epochs >= _LEAST_EPOCHS and not whole


def entrants(task: Task, places: int) -> int:
    """How many plans a search keeps for the final, if so many were finished without heats."""
    return places + _MORE if places > 1 and has_heats(task) else places


def starts_of(network: CompressedNetwork, candidates: Sequence[Candidate]) -> list[Start]:
    """All starts of some candidates, those of the first candidates first, each plan once."""
    found: list[Start] = []
    plans = []
    for candidate in candidates:
        for one, as_trained in ((candidate, False), (_as_trained(network, candidate), True)):
            if one is not None and one.plan not in plans:
                plans.append(one.plan)
                found.append(Start(one, as_trained))
    return found


def _as_trained(network: CompressedNetwork, candidate: Candidate) -> Candidate | None:
    """A candidate with the masks of the largest trained weights, fitted; None if it has others.

    Plans of networks whose kernels are cut or stored in another way are left as they are.
    """
    entries = candidate.plan.kernels
    mine = network.plan.kernels
    alike = set(entries) == set(mine) and all(
        (one.group, one.bits, one.operations.shape)
        == (mine[path].group, mine[path].bits, mine[path].operations.shape)
        for path, one in entries.items()
    )
    if not alike or not can_rerank(network):
        return None
    plan = ranked_as_trained(network, candidate.plan)
    evaluate_plan(network, plan)
    return Candidate.of(network, candidate.value, candidate.episode, candidate.proposed_by)


def run_heats(
    task: Task, candidates: Sequence[Candidate], progress: SearchProgress, *, places: int, seed: int
) -> tuple[list[Start], int]:
    """The starts of the long trainings, the best first, and how many are to be finished.

    That is one fewer than there are places, which is what the heats take, but one at least. Where
    there are no heats, all places are taken by the first starts.
    """
    training = task.training
    if not training.epochs or task.network.decisions.group == "channel":
        return [Start(candidate) for candidate in candidates], places
    text = "fitting the masks of the largest weights"
    with progress.phase(HEATS, text) if has_heats(task) else contextlib.nullcontext():
        starts = starts_of(task.network, candidates)
    if not has_heats(task) or len(starts) < 2:
        return starts, places
    length = max(1, training.epochs // _MOST_STARTS)
    starts = starts[: min(_MOST_STARTS, training.epochs // length)]
    text = f"training {len(starts)} starts for {length} of {training.epochs} epochs"
    short = dataclasses.replace(training, epochs=length, callbacks=())
    scores: list[Score] = []
    with progress.phase(HEATS, text, len(starts)):
        for start in starts:
            tf.random.set_seed(seed)
            unheard: list[str] = []  # a training that short proves nothing
            scores.append(trained(task.model, start.candidate, task.figures, short, unheard)[1])
            progress.step(len(scores), len(starts))
    rows = count_rows(task.figures.validation)
    left, ordered = list(range(len(starts))), []
    while left:
        best = winner([scores[n] for n in left], task.figures.metric, rows)
        ordered.append(starts[left.pop(best)])
    return ordered, max(1, places - 1)


def winner(scores: Sequence[Score], metric: Metric, rows: int) -> int:
    """The place of the best of several scores on the same data, the first of equals.

    An accuracy is a count of rows: what lies within its standard error of the best,
    sqrt(p (1 - p) / rows), is not told apart by it, and the loss, which says more of every row,
    decides. Of other metrics, only equal values are left to the loss.

    Example:
        >>> winner([Score(0.91, 0.4), Score(0.90, 0.3)], Metric("accuracy", True), rows=1000)
        1
    """
    best = math.nan
    for score in scores:
        if math.isnan(best) or metric.better(score.metric, best):
            best = score.metric
    margin = metric.margin(best, rows)
    near = [n for n, one in enumerate(scores) if abs(one.metric - best) <= margin]
    # None is near where every metric is NaN.
    return min(near or range(len(scores)), key=lambda n: (_number(scores[n].loss), n))


def _number(loss: float) -> float:
    return math.inf if math.isnan(loss) else loss
