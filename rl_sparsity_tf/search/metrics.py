"""The figures of a run: the content of metrics.json, format 1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tf_keras as keras

from rl_sparsity_tf.data.metrics import Metric, Score
from rl_sparsity_tf.layers.kernels import sparsity_of
from rl_sparsity_tf.search.finishing import Exported, Finished

FORMAT_VERSION = 1


def build_metrics(
    *,
    model: keras.Model,
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
    warnings: Sequence[str] = (),
) -> dict[str, Any]:
    """Gathers the figures of a run.

    Figures named `accuracy` and `metric` are on the test data and null without it; for a model
    whose metric is not an accuracy, `accuracy` is null. `tflite_...` are of the file itself, run
    in LiteRT; those of `dense_int8` too. Where channels were removed, `macs` and
    `predicted_latency` are shares of the dense model's, and `latency` that of its file's time,
    measured here; null if it was not. Sizes are null where no file was verified, and `warnings`
    says why.

    Args:
        model: The model that was compressed.
        finished: The result.
        dense: The model's float32 file.
        dense_int8: Its int8 file.
        dense_test: Its score on test data.
        metric: The metric.
        agent: Name of the agent.
        seed: The search's seed.
        proposed_by: Who proposed the plan.
        episodes: Episodes of the search.
        evaluations: Distinct plans that it evaluated.
        seconds: Seconds that it took.
        dataset: Name of the data.
        warnings: What went wrong; the result's own come on top.

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
            "sparsity": sparsity_of(finished.model, model),
            **_sizes(finished.exported),
            "max_abs_difference": None if report is None else report.max_abs_difference,
            "batch_size": None if report is None else report.batch_size,
            "proposed_by": proposed_by,
            **_channels(finished),
        },
        "search": {
            "episodes": episodes,
            "evaluations": evaluations,
            "seconds": seconds,
            "operations": finished.plan.count_operations(),
        },
        "baselines": [],
        "warnings": list(dict.fromkeys([*warnings, *finished.warnings])),
    }


def baseline_entry(
    name: str, model: keras.Model, finished: Finished, metric: Metric, evaluations: int
) -> dict[str, Any]:
    """The figures of a baseline, as metrics.json lists them."""
    return {
        "name": name,
        **_figures(metric, finished.test),
        **_figures(metric, finished.validation, "validation_"),
        **_figures(metric, finished.exported.test, "tflite_"),
        **_sizes(finished.exported),
        "sparsity": sparsity_of(finished.model, model),
        "evaluations": evaluations,
        **_channels(finished),
        **({"warnings": list(finished.warnings)} if finished.warnings else {}),
    }


def _channels(finished: Finished) -> dict[str, float | None]:
    return {} if finished.channels is None else finished.channels.to_dict()


def _figures(metric: Metric, score: Score | None, prefix: str = "") -> dict[str, float | None]:
    value = None if score is None else score.metric
    return {
        f"{prefix}accuracy": value if metric.is_accuracy else None,
        f"{prefix}metric": value,
    }


def _sizes(exported: Exported) -> dict[str, int | None]:
    report = exported.report
    return {
        "tflite_bytes": None if report is None else report.tflite_bytes,
        "gzip_bytes": None if report is None else report.gzip_bytes,
    }
