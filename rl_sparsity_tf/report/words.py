"""Figures in words: the metric, sizes, shares."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from rl_sparsity_tf.report.reading import fields, number, text

DASH, TIMES = "\N{EN DASH}", "\N{MULTIPLICATION SIGN}"
MOST_ROWS = 200
"""Contenders and trials that are listed."""


@dataclasses.dataclass(frozen=True)
class Measure:
    """The metric of a run: how it is written, and which of its figures are shown."""

    name: str
    higher_is_better: bool
    is_accuracy: bool
    tested: bool

    @classmethod
    def of(cls, metrics: Mapping[str, Any]) -> Measure:
        """The metric of a metrics.json."""
        metric, compressed = fields(metrics.get("metric")), fields(metrics.get("compressed"))
        return cls(
            text(metric.get("name"), 60) or "metric",
            metric.get("higher_is_better") is not False,
            number(compressed.get("validation_accuracy")) is not None,
            number(compressed.get("metric")) is not None,
        )

    @property
    def words(self) -> str:
        """The metric and its data, `"test accuracy"`."""
        return f"{'test' if self.tested else 'validation'} {self.name}"

    def value(self, entry: Mapping[str, Any]) -> float | None:
        """A contender's figure: that of its file, or else of its model."""
        if not self.tested:
            return number(entry.get("validation_metric"))
        found = number(entry.get("tflite_metric"))
        return number(entry.get("metric")) if found is None else found

    def written(self, value: float | None) -> str:
        """A figure in words."""
        if value is None:
            return DASH
        return f"{100 * value:.2f} %" if self.is_accuracy else f"{value:.4g}"

    def difference(self, lost: float) -> str:
        """How much worse, in words; without a sign."""
        return f"{100 * abs(lost):.2f} points" if self.is_accuracy else f"{abs(lost):.4g}"


def count(value: float | None) -> str:
    """A whole number with its thousands."""
    return DASH if value is None else f"{value:,.0f}"


def brief_bytes(value: float) -> str:
    """Bytes on an axis."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g} B"


def share(value: float | None, digits: int = 1) -> str:
    """A share in per cent."""
    return DASH if value is None else f"{100 * value:.{digits}f} %"
