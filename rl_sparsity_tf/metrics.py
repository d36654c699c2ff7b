"""The figures of a run: the content of metrics.json, format 1."""

from __future__ import annotations

from typing import Any

from rl_sparsity_tf.finishing import Exported, Finished
from rl_sparsity_tf.kernels import sparsity_of
from rl_sparsity_tf.objective import Metric, Score

FORMAT_VERSION = 1


def build_metrics(
    *,
    finished: Finished,
    dense: Exported,
    dense_int8: Exported,
    dense_test: Score | None,
    metric: Metric,
    agent: str,
    seed: int,
    proposed_by: str,
    episodes: int,
    evaluations: int,
    seconds: float,
    dataset: str | None = None,
) -> dict[str, Any]:
    """Gathers the figures of a run.

    Figures named `accuracy` and `metric` are on the test data and null without it; for a model
    whose metric is not an accuracy, `accuracy` is null. `tflite_...` are of the file itself, run
    in LiteRT; those of `dense_int8` too.

    Returns:
        The document that `metrics.json` holds.
    """
    report = finished.exported.report
    return {
        "format_version": FORMAT_VERSION,
        "dataset": dataset,
        "agent": agent,
        "seed": seed,
        "metric": metric.to_dict(),
        "dense": {**_figures(metric, dense_test), **_sizes(dense)},
        "dense_int8": {**_figures(metric, dense_int8.test), **_sizes(dense_int8)},
        "compressed": {
            **_figures(metric, finished.test),
            **_figures(metric, finished.validation, "validation_"),
            **_figures(metric, finished.exported.test, "tflite_"),
            "sparsity": sparsity_of(finished.model),
            **_sizes(finished.exported),
            "max_abs_difference": report.max_abs_difference,
            "batch_size": report.batch_size,
            "proposed_by": proposed_by,
        },
        "search": {
            "episodes": episodes,
            "evaluations": evaluations,
            "seconds": seconds,
            "operations": finished.plan.count_operations(),
        },
        "baselines": [],
    }


def baseline_entry(
    name: str, finished: Finished, metric: Metric, evaluations: int
) -> dict[str, Any]:
    """The figures of a baseline, as metrics.json lists them."""
    return {
        "name": name,
        **_figures(metric, finished.test),
        **_figures(metric, finished.validation, "validation_"),
        **_figures(metric, finished.exported.test, "tflite_"),
        **_sizes(finished.exported),
        "sparsity": sparsity_of(finished.model),
        "evaluations": evaluations,
    }


def _figures(metric: Metric, score: Score | None, prefix: str = "") -> dict[str, float | None]:
    value = None if score is None else score.metric
    return {
        f"{prefix}accuracy": value if metric.is_accuracy else None,
        f"{prefix}metric": value,
    }


def _sizes(exported: Exported) -> dict[str, int]:
    return {
        "tflite_bytes": exported.report.tflite_bytes,
        "gzip_bytes": exported.report.gzip_bytes,
    }
