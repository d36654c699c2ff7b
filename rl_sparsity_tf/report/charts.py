"""The models side by side, and the search's curve: what a page and plots show of both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rl_sparsity_tf.report.drawing import SHAPES, Frame, frame, labelled, line, mark
from rl_sparsity_tf.report.reading import entries, fields, number, text, whole
from rl_sparsity_tf.report.words import (
    DASH,
    MOST_ROWS,
    TIMES,
    Measure,
    brief_bytes,
    count,
    share,
)

_MOST_POINTS = 4_000
_COLOURS = 7
# Plans far below the best would press all others into a line.
_CLIPPED = 2.0
# Files that differ by less are the same, as far as the width of a chart shows.
_SAME_SIZE = 1.02


# ---------------------------------------------------------------------- comparison


def comparison(run: Mapping[str, Any]) -> dict[str, Any] | None:
    """Dense, dense int8, compressed and contenders: rows of a table, and a chart of them."""
    metrics = fields(run.get("metrics"))
    if not fields(metrics.get("compressed")):
        return None
    measure = Measure.of(metrics)
    rows = contenders(run)
    base = rows[0]["tflite_bytes"]
    shown = [row for row in rows if row["value"] is not None and row["bytes"]]
    front = pareto(shown, measure.higher_is_better)
    for row in rows:
        row["front"] = any(row is one for one in front)
        size = row["tflite_bytes"]
        row["cells"] = [
            measure.written(row["value"]),
            share(row["sparsity"]),
            count(size),
            DASH if not base or not size or row is rows[0] else f"{base / size:.2f}{TIMES}",
            count(row["gzip_bytes"]),
            count(row["evaluations"]),
        ]
    kind = rows[0]["kind"]
    return {
        "measure": measure,
        "rows": rows,
        "columns": [measure.words, "zeros", "bytes", "smaller", "gzip bytes", "plans evaluated"],
        "chart": _scatter(shown, front, measure, kind) if len(shown) > 1 else "",
        "kind": kind,
    }


def contenders(run: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Figures of the dense models, the compressed one and contenders, numbered from 1.

    `bytes` are those that a chart shows: of the file, or where these hardly differ, of the file
    after gzip; `kind` says which.
    """
    metrics = fields(run.get("metrics"))
    measure = Measure.of(metrics)
    compressed, search = fields(metrics.get("compressed")), fields(metrics.get("search"))
    given = [
        ("dense float32", fields(metrics.get("dense")), None, "dense"),
        ("dense int8", fields(metrics.get("dense_int8")), None, "dense"),
        ("compressed", compressed, search.get("evaluations"), "compressed"),
    ]
    for one in entries(metrics.get("baselines"))[:MOST_ROWS]:
        name = text(one.get("name"), 80) or "a contender"
        given.append((name, one, one.get("evaluations"), "baseline"))
    rows: list[dict[str, Any]] = []
    for place, (name, entry, evaluations, role) in enumerate(given, 1):
        figures = {
            key: number(entry.get(key)) for key in ("tflite_bytes", "gzip_bytes", "sparsity")
        }
        rows.append(
            {"number": place, "name": name, "role": role, "value": measure.value(entry)}
            | figures
            | {"evaluations": number(evaluations)}
        )
    sizes = [row["tflite_bytes"] for row in rows[1:] if row["tflite_bytes"]]
    packed = all(row["gzip_bytes"] for row in rows if row["tflite_bytes"])
    target = fields(fields(fields(run.get("manifest")).get("arguments")).get("target"))
    alike = len(sizes) > 1 and max(sizes) <= _SAME_SIZE * min(sizes)
    kind = "gzip_bytes" if packed and (alike or "gzip_bytes" in target) else "tflite_bytes"
    for row in rows:
        row["bytes"], row["kind"] = row[kind], kind
    return rows


def pareto(rows: Sequence[dict[str, Any]], higher_is_better: bool = True) -> list[dict[str, Any]]:
    """The rows than which none is both smaller and better, the smallest first.

    Example:
        >>> rows = [{"bytes": 2, "value": 0.9}, {"bytes": 3, "value": 0.8}]
        >>> pareto(rows)
        [{'bytes': 2, 'value': 0.9}]
    """
    sign = 1.0 if higher_is_better else -1.0
    front: list[dict[str, Any]] = []
    for row in sorted(rows, key=lambda one: (one["bytes"], -sign * one["value"])):
        if not front or sign * row["value"] > sign * front[-1]["value"]:
            front.append(row)
    return front


def _scatter(
    rows: Sequence[dict[str, Any]], front: Sequence[dict[str, Any]], measure: Measure, kind: str
) -> str:
    chart = frame(
        [(row["bytes"], row["value"]) for row in rows],
        x_name="bytes of the file after gzip" if kind == "gzip_bytes" else "bytes of the file",
        y_name=measure.words,
        x_text=brief_bytes,
        y_text=(lambda v: f"{100 * v:.3g} %") if measure.is_accuracy else (lambda v: f"{v:.3g}"),
        x_log=True,
        y_most=1.0 if measure.is_accuracy else None,
    )
    places = {row["number"]: _place(chart, row["bytes"], row["value"]) for row in rows}
    parts = [line([places[row["number"]] for row in front], "front", steps=True)]
    looks = {
        "dense": ("square", "c6"),
        "compressed": ("diamond", "c1"),
        "baseline": ("circle", "c0"),
    }
    for row in sorted(rows, key=lambda one: one["role"] == "compressed"):
        shape, colour = looks[row["role"]]
        figures = f"{measure.written(row['value'])}, {count(row['bytes'])} bytes"
        told = f"{row['number']}. {row['name']}: {figures}"
        size = 6.0 if row["role"] == "compressed" else 4.5
        parts.append(mark(*places[row["number"]], shape, colour, told, size))
    parts += labelled([(*places[row["number"]], str(row["number"])) for row in rows], chart)
    return chart.svg(f"{measure.words} over bytes", parts)


def _place(chart: Frame, x: float, y: float) -> tuple[float, float]:
    return chart.x.at(x), chart.y.at(y)


# ---------------------------------------------------------------------- the search's curve


def evaluated(run: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The plans that a run has evaluated, in order.

    Each is a dict of `x` (distinct plans evaluated by then), `value` (what the reward says of it),
    `by` (who proposed it), `stage` (values of different stages are not comparable), `best` (so far
    in its stage) and `episode` (from 1; None for plans of others).
    """
    history = entries(run.get("history"))
    search = fields(fields(run.get("metrics")).get("search"))
    noted = entries(fields(run.get("details")).get("considered"))
    before: dict[int, list[Mapping[str, Any]]] = {}
    for one in noted:
        place = whole(one.get("before_episode"))
        before.setdefault(len(history) if place is None else place, []).append(one)
    points: list[dict[str, Any]] = []
    last, stage = 0.0, 0
    for index, entry in enumerate([*history, None]):
        total = number((entry or search).get("evaluations"))
        end = max(last, (last + 1 if entry else last) if total is None else total)
        others = before.get(index, [])
        if entry is not None and index and _stage_of(entry) != _stage_of(history[index - 1]):
            stage += 1
        for place, one in enumerate(others, 1):
            x = last + (end - last) * place / (len(others) + 1)
            points.append(_point(one, x, stage, None))
        if entry is not None:
            points.append(_point(entry, end, stage, index + 1))
            last = end
    points = [one for one in points if one["value"] is not None]
    best: dict[int, float] = {}
    for one in points:
        best[one["stage"]] = max(best.get(one["stage"], one["value"]), one["value"])
        one["best"] = best[one["stage"]]
    return points


def _stage_of(entry: Mapping[str, Any]) -> tuple[Any, Any]:
    return number(entry.get("trial")), number(entry.get("stage"))


def _point(entry: Mapping[str, Any], x: float, stage: int, episode: int | None) -> dict[str, Any]:
    return {
        "x": x,
        "value": number(entry.get("reward")),
        "by": text(entry.get("proposed_by"), 40) or "?",
        "stage": stage,
        "episode": episode,
        "metric": number(entry.get("validation_metric")),
        "sparsity": number(entry.get("sparsity")),
    }


def curve(run: Mapping[str, Any]) -> dict[str, Any] | None:
    """The search: the value of every plan over distinct plans evaluated."""
    points = evaluated(run)
    if not points:
        return None
    found = {
        "evaluations": whole(fields(fields(run.get("metrics")).get("search")).get("evaluations")),
        "episodes": len(entries(run.get("history"))),
        "stages": points[-1]["stage"] + 1,
        "seconds": number(fields(fields(run.get("metrics")).get("search")).get("seconds")),
    }
    floor = _floor([one["value"] for one in points])
    found["below"] = sum(one["value"] < floor for one in points)
    step = -(-len(points) // _MOST_POINTS)
    points = points[::step]
    names = list(
        dict.fromkeys(one["by"] for one in sorted(points, key=lambda p: p["episode"] is None))
    )
    looks = {name: min(place, _COLOURS - 1) for place, name in enumerate(names)}
    chart = frame(
        [(one["x"], max(one["value"], floor)) for one in points],
        x_name="distinct plans evaluated",
        y_name="value (reward of the whole plan)",
        x_text=lambda v: f"{v:,.4g}",
        y_text=lambda v: f"{v:.3g}",
    )
    parts = []
    for stage in range(found["stages"] or 1):
        own = [one for one in points if one["stage"] == stage]
        if not own:
            continue
        steps = [_place(chart, one["x"], max(one["best"], floor)) for one in own]
        parts.append(line(steps, "best", steps=True))
        if stage:
            x = chart.x.at(own[0]["x"])
            parts.append(
                f'<path class="divide" d="M{x:.1f} {chart.y.end:.1f}V{chart.y.start:.1f}"/>'
            )
    for one in points:
        look = looks[one["by"]]
        when = f", episode {one['episode']}" if one["episode"] else ""
        told = f"{one['by']}{when}: {one['value']:.4f}"
        x, y = _place(chart, one["x"], max(one["value"], floor))
        faint = " faint" if one["value"] < floor else ""
        parts.append(mark(x, y, SHAPES[look], f"c{look}{faint}", told, 3.6))
    legend = [{"name": name, "mark": _legend(looks[name])} for name in names[:_COLOURS]]
    if len(names) > _COLOURS:
        legend[-1]["name"] = "others"
    return found | {"chart": chart.svg("value over plans evaluated", parts), "legend": legend}


def _floor(values: Sequence[float]) -> float:
    """What a curve shows at least: not all of a tenth of the plans that is far below the others."""
    low = sorted(values)[len(values) // 10]
    return low - _CLIPPED * max(max(values) - low, 1e-3)


def _legend(look: int) -> str:
    drawn = mark(7, 7, SHAPES[look], f"c{look}", size=4)
    return f'<svg class="key" viewBox="0 0 14 14" aria-hidden="true">{drawn}</svg>'
