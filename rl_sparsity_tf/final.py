"""The final: the best plans of several proposers are fine-tuned, and validation data decides."""

from __future__ import annotations

from collections.abc import Sequence

import tensorflow as tf

from rl_sparsity_tf.candidates import Candidate
from rl_sparsity_tf.channel_finishing import Task, finish_candidate
from rl_sparsity_tf.errors import TargetError
from rl_sparsity_tf.finalists import Finalists
from rl_sparsity_tf.finishing import Finished
from rl_sparsity_tf.objective import Metric, Score
from rl_sparsity_tf.plan import CompressionPlan
from rl_sparsity_tf.progress import SearchProgress


def play_final(
    task: Task,
    finalists: Finalists,
    others: Sequence[tuple[str, CompressionPlan]],
    progress: SearchProgress,
    *,
    seed: int,
) -> tuple[Finished, Candidate]:
    """Fine-tunes and exports every finalist, each from the same seed.

    Args:
        task: What they are finished for.
        finalists: The candidates.
        others: Plans to fall back on, see
            [finish_candidate][rl_sparsity_tf.channel_finishing.finish_candidate].
        progress: Where to say what is done.
        seed: Of TensorFlow's global generator.

    Returns:
        The finished model that is best on all of the validation data, by the metric and then the
        loss, and the candidate it was made of. One that misses the target is out.

    Raises:
        TargetError: If all of them miss the target: what was said of the first.
    """
    found: tuple[Finished, Candidate] | None = None
    missed: TargetError | None = None
    for number, candidate in enumerate(finalists):
        what = "the best plan" if number == 0 else "another plan"
        progress.say(f"fine-tuning {what} ({candidate.found_by}) and exporting it")
        tf.random.set_seed(seed)
        try:
            finished = finish_candidate(task, candidate, others)
        except TargetError as error:
            missed = missed or error
            continue
        metric = task.figures.metric
        if found is None or _better(finished.validation, found[0].validation, metric):
            found = finished, finished.candidate or candidate
    if found is None:
        assert missed is not None
        raise missed
    return found


def _better(one: Score, other: Score, metric: Metric) -> bool:
    if one.metric == other.metric:
        return one.loss < other.loss
    return metric.better(one.metric, other.metric)
