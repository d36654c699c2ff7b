"""The final: the best plans of several proposers are fine-tuned, and validation data decides."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import tensorflow as tf

from rl_sparsity_tf.console import SearchProgress
from rl_sparsity_tf.data.batches import count_rows
from rl_sparsity_tf.data.metrics import Metric, Score
from rl_sparsity_tf.environment.candidates import Candidate
from rl_sparsity_tf.errors import TargetError
from rl_sparsity_tf.layers.plan import CompressionPlan
from rl_sparsity_tf.search.channel_finishing import Task, finish_candidate
from rl_sparsity_tf.search.finishing import Finished


def play_final(
    task: Task,
    finalists: Iterable[Candidate],
    others: Sequence[tuple[str, CompressionPlan]],
    progress: SearchProgress,
    *,
    seed: int,
) -> tuple[Finished, Candidate]:
    """Fine-tunes and exports every finalist, each from the same seed.

    Args:
        task: What they are finished for.
        finalists: The candidates, the best first; of equal plans the first counts.
        others: Plans to fall back on, see
            [finish_candidate][rl_sparsity_tf.search.channel_finishing.finish_candidate].
        progress: Where to say what is done.
        seed: Of TensorFlow's global generator.

    Returns:
        The finished model that is best on all of the validation data, and the candidate it was made
        of: see [winner][]. One that misses the target is out; one whose file failed, and is stored
        in another way or not there at all, wins only where there is no other.

    Raises:
        TargetError: If all of them miss the target: what was said of the first.
    """
    found: list[tuple[Finished, Candidate]] = []
    missed: TargetError | None = None
    plans: list[CompressionPlan] = []
    for candidate in finalists:
        if candidate.plan in plans:
            continue
        plans.append(candidate.plan)
        what = "the best plan" if len(plans) == 1 else "another plan"
        progress.say(f"fine-tuning {what} ({candidate.found_by}) and exporting it")
        tf.random.set_seed(seed)
        try:
            finished = finish_candidate(task, candidate, others)
        except TargetError as error:
            missed = missed or error
            continue
        for warning in finished.warnings:
            progress.say(f"warning: {warning}")
        found.append((finished, finished.candidate or candidate))
    if not found:
        assert missed is not None
        raise missed
    figures = task.figures
    least = min(_shortfall(finished) for finished, _ in found)
    found = [one for one in found if _shortfall(one[0]) == least]
    scores = [finished.validation for finished, _ in found]
    return found[winner(scores, figures.metric, count_rows(figures.validation))]


def _shortfall(finished: Finished) -> int:
    """0 for the file that was asked for, 1 for one in another storage, 2 for none."""
    exported = finished.exported
    return 2 if exported.report is None else int(bool(exported.failure))


def winner(scores: Sequence[Score], metric: Metric, rows: int) -> int:
    """Which of several scores on the same data is the best.

    An accuracy is a count of rows: what lies within its standard error of the best,
    sqrt(p (1 - p) / rows), is not told apart by it, and the loss, which says more of every row,
    decides. Of other metrics, only equal values are left to the loss.

    Args:
        scores: Of every finished model.
        metric: What is counted or measured.
        rows: Rows of the data.

    Returns:
        The place of the best, the first of equals.

    Example:
        >>> winner([Score(0.91, 0.4), Score(0.90, 0.3)], Metric("accuracy", True), rows=1000)
        1
    """
    best = math.nan
    for score in scores:
        if math.isnan(best) or metric.better(score.metric, best):
            best = score.metric
    margin = 0.0
    if metric.is_accuracy and rows > 0 and 0.0 <= best <= 1.0:
        margin = math.sqrt(best * (1.0 - best) / rows)
    near = [n for n, one in enumerate(scores) if abs(one.metric - best) <= margin]
    # None is near where every metric is NaN.
    return min(near or range(len(scores)), key=lambda n: (_number(scores[n].loss), n))


def _number(loss: float) -> float:
    return math.inf if math.isnan(loss) else loss
