"""Trials of sizes: what a file has to hold, what a trial came to, and which size is next."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from rl_sparsity_tf.allocation.target import Target
from rl_sparsity_tf.checks import check_count, check_flag
from rl_sparsity_tf.data.metrics import Metric
from rl_sparsity_tf.environment.curriculum import Constant, Curriculum
from rl_sparsity_tf.errors import ArgumentError

# Sizes that differ by no more than this factor are not told apart.
_CLOSE = 1.02
# Metrics are sums of float32.
_ROUNDING = 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Requirement:
    """What the metric of a file has to be.

    Attributes:
        metric: The metric.
        dense: The dense model's, on the validation data.
        drop: How much worse a file's may be.

    Example:
        >>> Requirement(metric=Metric("accuracy", True), dense=0.9, drop=0.02).holds(0.88)
        True
    """

    metric: Metric
    dense: float
    drop: float

    def lost(self, value: float) -> float:
        """How much worse a figure is than the dense model's."""
        return self.dense - value if self.metric.higher_is_better else value - self.dense

    def holds(self, value: float) -> bool:
        """Whether a figure is good enough; one that is no number is not."""
        return self.lost(value) <= self.drop + _ROUNDING


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial:
    """What the search at one size came to.

    Attributes:
        limit: Bytes that the file might have.
        tflite_bytes: Bytes that it has; None if fine-tuning left none within the limit.
        validation_metric: The file's own metric on all rows of the validation data, run in LiteRT.
        held: Whether that is good enough.
        proposed_by: Who proposed its plan.
        plan: The plan as the search found it, as JSON.
    """

    limit: int
    tflite_bytes: int | None
    validation_metric: float | None
    held: bool
    proposed_by: str
    plan: str

    def __post_init__(self) -> None:
        sizes = [self.limit] if self.tflite_bytes is None else [self.limit, self.tflite_bytes]
        for size in sizes:
            check_count("a trial's bytes", size, 1)
        check_flag("held", self.held)
        judged = isinstance(self.validation_metric, int | float)
        if self.held and (self.tflite_bytes is None or not judged):
            raise ArgumentError(
                f"A trial of {self.limit} bytes is said to have held, and has no file or no "
                "metric. Expected both."
            )

    def to_dict(self) -> dict[str, Any]:
        """The trial as metrics.json lists it."""
        values = dataclasses.asdict(self)
        del values["plan"]
        return values


def check_alone(target: Target, curriculum: Curriculum) -> Curriculum:
    """The curriculum, if it goes with the target.

    Raises:
        ArgumentError: If the target is searched for at several sizes, a curriculum of its own.
    """
    if target.max_accuracy_drop is not None and not isinstance(curriculum, Constant):
        raise ArgumentError(
            f"curriculum={curriculum.name!r} does not go with Target(max_accuracy_drop="
            f"{target.value:g}), which is searched for at one size after the other. Leave "
            "curriculum out, or give a size: Target(tflite_bytes=50_000)."
        )
    return curriculum


def next_limit(smallest: int, largest: int, trials: Sequence[Trial]) -> int | None:
    """The middle, on a logarithmic scale, between what failed and what held.

    Args:
        smallest: Bytes of the smallest file in reach.
        largest: Bytes of the dense int8 file.
        trials: The trials so far.

    Returns:
        Bytes, or None if what is left between the two is not worth a trial.

    Example:
        >>> next_limit(1_000, 100_000, [])
        10000
    """
    low = max([smallest, *(trial.limit for trial in trials if not trial.held)])
    held = [trial.tflite_bytes for trial in trials if trial.held]
    high = min([largest, *(size for size in held if size is not None)])
    return None if high <= low * _CLOSE else round(math.sqrt(low * high))
