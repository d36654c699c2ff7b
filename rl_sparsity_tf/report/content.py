"""What a report says: headline, comparison, curve, verification, how to repeat it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rl_sparsity_tf.report.drawing import SHAPES, Frame, frame, labelled, line, mark
from rl_sparsity_tf.report.maps import MOST_KERNELS, listed
from rl_sparsity_tf.report.reading import (
    entries,
    fields,
    number,
    text,
    texts,
    whole,
)

DASH, TIMES = "\N{EN DASH}", "\N{MULTIPLICATION SIGN}"
_MOST_POINTS, _MOST_ROWS, _MOST_WARNINGS = 4_000, 200, 100
_COLOURS = 7
_LONG = 11
# Plans far below the best would press all others into a line.
_CLIPPED = 2.0
# Files that differ by less are the same, as far as the width of a chart shows.
_SAME_SIZE = 1.02


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


def target_words(manifest: Mapping[str, Any], metric: str) -> str:
    """The target of a run in words; empty if it is not known."""
    target = fields(fields(manifest.get("arguments")).get("target"))
    found = {name: number(value) for name, value in target.items()}
    words = {
        "sparsity": lambda v: f"{share(v)} of the weights zero",
        "tflite_bytes": lambda v: f"a file of at most {count(v)} bytes",
        "gzip_bytes": lambda v: f"at most {count(v)} bytes after gzip",
        "macs": lambda v: f"at most {share(v)} of the multiplications",
        "latency": lambda v: f"at most {share(v)} of the dense file's time",
        "max_accuracy_drop": lambda v: (
            f"the smallest file that loses {v:g} of validation {metric} at most"
        ),
    }
    return "; ".join(words[n](v) for n, v in found.items() if n in words and v is not None)


# ---------------------------------------------------------------------- headline


def headline(run: Mapping[str, Any]) -> dict[str, Any]:
    """The page's title, one sentence, and the figures that matter most."""
    metrics, manifest = fields(run.get("metrics")), fields(run.get("manifest"))
    compressed, measure = fields(metrics.get("compressed")), Measure.of(metrics)
    dataset = text(metrics.get("dataset"), 80) or text(
        fields(manifest.get("arguments")).get("dataset"), 80
    )
    title = f"Compression of a model on {dataset}" if dataset else "Compression of a model"
    found = {
        "title": title,
        "target": target_words(manifest, measure.name),
        "name": text(run.get("name"), 120),
    }
    if not compressed:
        return found | _unfinished(run)
    return found | {"cards": _cards(metrics, compressed, measure), "unfinished": ""}


def _cards(
    metrics: Mapping[str, Any], compressed: Mapping[str, Any], measure: Measure
) -> list[dict[str, str]]:
    dense = fields(metrics.get("dense"))
    cards = []

    def card(value: str, name: str, note: str = "") -> None:
        size = "long" if len(value) > _LONG else ""
        cards.append({"value": value, "name": name, "note": note, "size": size})

    before, after = number(dense.get("tflite_bytes")), number(compressed.get("tflite_bytes"))
    if before and after:
        card(
            f"{before / after:.2f}{TIMES}",
            "smaller file" if after <= before else "of the dense file's size",
            f"{count(before)} → {count(after)} bytes",
        )
    packed = number(dense.get("gzip_bytes")), number(compressed.get("gzip_bytes"))
    if packed[0] and packed[1]:
        note = f"{count(packed[0])} → {count(packed[1])} bytes"
        card(f"{packed[0] / packed[1]:.2f}{TIMES}", "smaller after gzip", note)
    was, now = measure.value(dense), measure.value(compressed)
    if was is not None and now is not None:
        lost = was - now if measure.higher_is_better else now - was
        word = "lost" if lost > 0 else "gained" if lost < 0 else "no change"
        card(
            measure.difference(lost),
            f"of {measure.words} {word}" if lost else f"of {measure.words}: no change",
            f"{measure.written(was)} → {measure.written(now)}",
        )
    elif now is not None:
        card(measure.written(now), measure.words)
    latency, predicted = (
        number(compressed.get("latency")),
        number(compressed.get("predicted_latency")),
    )
    if latency:
        spread = number(compressed.get("latency_spread"))
        note = "measured here, in turns with the dense file"
        card(
            f"{1 / latency:.2f}{TIMES}",
            "faster" if latency <= 1 else "of the dense speed",
            note + (f"; samples scatter by {share(spread, 0)}" if spread else ""),
        )
    elif predicted:
        card(
            f"{1 / predicted:.2f}{TIMES}",
            "faster",
            "predicted by the table of layers, not measured",
        )
    zeros = number(compressed.get("sparsity"))
    if zeros is not None:
        card(share(zeros), "of the weights are zero or gone")
    macs = number(compressed.get("macs"))
    if macs is not None:
        card(share(macs), "of the multiplications left")
    who = text(compressed.get("proposed_by"), 60)
    if who:
        agent = text(metrics.get("agent"), 60)
        note = "the agent of the search" if who == agent else f"the search's agent was {agent}"
        card(who.replace("_", " "), "proposed the plan", note if agent else "")
    return cards


def _unfinished(run: Mapping[str, Any]) -> dict[str, Any]:
    history, arguments = (
        entries(run.get("history")),
        fields(fields(run.get("manifest")).get("arguments")),
    )
    wanted = whole(arguments.get("episodes"))
    of = "" if wanted is None else f" of {wanted}"
    cards = [{"value": f"{len(history)}{of}", "name": "episodes played", "note": "", "size": ""}]
    rewards = [(number(one.get("reward")), one) for one in history]
    known = [(value, one) for value, one in rewards if value is not None]
    if known:
        value, best = max(known, key=lambda pair: pair[0])
        who = text(best.get("proposed_by"), 60) or "the agent"
        cards.append(
            {"value": f"{value:.4f}", "name": "best value so far", "note": f"by {who}", "size": ""}
        )
        metric, zeros = number(best.get("validation_metric")), number(best.get("sparsity"))
        if metric is not None:
            note = "before fine-tuning" + ("" if zeros is None else f", at {share(zeros)} zeros")
            cards.append(
                {
                    "value": f"{metric:.4g}",
                    "name": "its validation metric",
                    "note": note,
                    "size": "",
                }
            )
    return {
        "cards": cards,
        "unfinished": "This run is not finished: it was cut off, or is still at work. Called with "
        "the same arguments, the search goes on from here.",
    }


def warnings(run: Mapping[str, Any]) -> list[str]:
    """What went wrong, in the run's own words, and files that cannot be used."""
    metrics = fields(run.get("metrics"))
    found = texts(metrics.get("warnings"))
    for one in entries(metrics.get("baselines"))[:_MOST_ROWS]:
        name = text(one.get("name"), 60) or "a contender"
        found += [f"{name}: {words}" for words in texts(one.get("warnings"))]
    given = len(listed(run.get("plan")))
    if given > MOST_KERNELS:
        found.append(f"the plan names {given:,} kernels, of which {MOST_KERNELS:,} are shown")
    for name, why in fields(run.get("problems")).items():
        found.append(f"{text(name)} cannot be used: {text(why)}")
    return list(dict.fromkeys(found))[:_MOST_WARNINGS]


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
    for one in entries(metrics.get("baselines"))[:_MOST_ROWS]:
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


# ---------------------------------------------------------------------- the file


def trials(run: Mapping[str, Any]) -> dict[str, Any] | None:
    """The sizes that were tried where a drop in accuracy was the target."""
    metrics = fields(run.get("metrics"))
    search, measure = fields(metrics.get("search")), Measure.of(metrics)
    rows = []
    for one in entries(search.get("trials"))[:_MOST_ROWS]:
        held = one.get("held")
        words = measure.written(number(one.get("validation_metric")))
        rows.append(
            [
                count(number(one.get("limit"))),
                count(number(one.get("tflite_bytes"))),
                words,
                text(one.get("proposed_by"), 60) or DASH,
                "held" if held is True else "too much lost" if held is False else DASH,
            ]
        )
    if not rows:
        return None
    wanted = number(search.get("dense_validation_metric"))
    return {
        "columns": ["bytes at most", "bytes", f"validation {measure.name}", "plan of", ""],
        "rows": rows,
        "dense": None if wanted is None else measure.written(wanted),
    }


def verification(run: Mapping[str, Any]) -> dict[str, Any] | None:
    """How close the file is to Keras, what its kernels exploit, and notes on it."""
    compressed = fields(fields(run.get("metrics")).get("compressed"))
    file = fields(fields(run.get("details")).get("file"))
    rows: list[tuple[str, str]] = []

    def row(name: str, value: Any, written: Callable[[Any], str]) -> None:
        if value is not None:
            rows.append((name, written(value)))

    apart = number(compressed.get("max_abs_difference"))
    span, tolerance = number(file.get("output_range")), number(file.get("tolerance"))
    row("Stored as", text(file.get("quantization"), 40), str)
    row("Largest difference to Keras's outputs", apart, lambda v: f"{v:.3g}")
    row("Range of that output", span, lambda v: f"{v:.3g}")
    row("Difference allowed, of the range", tolerance, lambda v: f"{v:g}")
    row("Rows with the same top-1 as Keras", number(file.get("top1_agreement")), share)
    if compressed and "batch_size" in compressed:
        size = whole(compressed.get("batch_size"))
        rows.append(("Batch size", "any" if size is None else str(size)))
    if apart is None:
        return None
    return {"rows": rows, "notes": texts(file.get("notes"))}


def exploited(run: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """What the file's kernels make of their zeros and types, by sentence; None if unknown."""
    found: dict[str, list[str]] = {}
    for tensor in entries(fields(fields(run.get("details")).get("file")).get("tensors")):
        sentence, kernel = text(tensor.get("exploited")), text(tensor.get("kernel"), 200)
        if sentence and kernel and kernel not in found.setdefault(sentence, []):
            found[sentence].append(kernel)
    return [{"sentence": s, "kernels": kernels} for s, kernels in found.items()] or None


def reproduction(run: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the run was called with, and with which versions."""
    manifest, metrics = fields(run.get("manifest")), fields(run.get("metrics"))
    arguments, versions = fields(manifest.get("arguments")), fields(manifest.get("versions"))
    versions = versions or fields(fields(run.get("details")).get("versions"))
    given = [(str(text(name, 60)), _written(value)) for name, value in arguments.items()]
    given = [(name, value) for name, value in given if value]
    if not given:
        given = [(n, _written(metrics.get(n))) for n in ("agent", "seed") if n in metrics]
    known = [(str(text(name, 60)), text(value, 120) or "") for name, value in versions.items()]
    known = [(name, value) for name, value in known if value]
    if not given and not known:
        return None
    return {"arguments": given, "versions": known}


def _written(value: Any) -> str:
    """An argument in words; those that were left out are not named."""
    if value is None or value is False or value == []:
        return ""
    if isinstance(value, Mapping):
        parts = [f"{text(n, 60)}={_written(v)}" for n, v in fields(value).items() if v is not None]
        return ", ".join(parts)[:600]
    if isinstance(value, list | tuple):
        return ", ".join(_written(one) for one in value[:20])[:600]
    if isinstance(value, bool | int | float):
        return f"{value}"[:40]
    return text(value, 200) or ""
