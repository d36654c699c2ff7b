"""What a report says of every kernel: what became of it, and what else it could have been."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from rl_sparsity_tf.report.drawing import SHAPES, frame, line, mark
from rl_sparsity_tf.report.maps import OPERATIONS, Decoded, decoded, draw
from rl_sparsity_tf.report.reading import entries, fields, number, numbers, text, whole
from rl_sparsity_tf.report.words import DASH, TIMES, brief_bytes, count, share

_MOST_DRAWN = 200
_MANY = 24
_MOST_WAYS, _MOST_LEVELS = 12, 1_000
# What is below is as good as nothing, and would take most of a chart.
_LEAST_ERROR = 1e-4
_STORED = {
    "element": "single weights",
    "block4": "blocks of 4",
    "block16": "blocks of 16",
    "channel": "channels",
    "2:4": "2:4",
}


# ---------------------------------------------------------------------- the table


def kernels(
    run: Mapping[str, Any], plan: Sequence[Decoded] | None = None
) -> list[dict[str, Any]] | None:
    """Every kernel's figures; None if no plan can be read. `plan` is the run's, if it was read."""
    stored = _stored(run)
    rows = []
    for one in decoded(run.get("plan")) if plan is None else plan:
        tensors = stored.get(one.path, [])
        sizes = [number(tensor.get("bytes")) for tensor in tensors]
        known = [size for size in sizes if size is not None]
        types = sorted({text(tensor.get("dtype"), 20) or "?" for tensor in tensors})
        formats = sorted({text(tensor.get("format"), 30) or "?" for tensor in tensors})
        rows.append(
            {
                "path": one.path,
                "shape": f" {TIMES} ".join(map(str, one.shape)),
                "group": _STORED.get(one.group, one.group),
                "size": one.size,
                "density": one.living / one.size,
                "weights": dict(zip(OPERATIONS, one.weights, strict=True)),
                "bits": one.exported_bits,
                "type": "/".join(types) or f"{one.exported_bits} bits",
                "format": "/".join(formats),
                "before": 4 * one.size,
                "after": sum(known) if known and len(known) == len(sizes) else None,
            }
        )
    return rows or None


def _stored(run: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    """The file's tensors, by the kernel that they hold."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for tensor in entries(fields(fields(run.get("details")).get("file")).get("tensors")):
        path = text(tensor.get("kernel"))
        if path:
            found.setdefault(path, []).append(tensor)
    return found


# ---------------------------------------------------------------------- alternatives


@dataclasses.dataclass(frozen=True)
class Way:
    """One way to store a kernel, at several numbers of living weights or channels."""

    group: str
    bits: int
    live: list[float]
    errors: list[float]
    costs: list[float] | None

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> Way | None:
        """Reads a way; None if it is none."""
        group, bits = text(entry.get("group"), 20), whole(entry.get("bits"))
        live, errors = numbers(entry.get("live")), numbers(entry.get("errors"))
        costs = numbers(entry.get("costs"))
        if group is None or bits is None or not live or not errors or len(live) > _MOST_LEVELS:
            return None
        good = len(live) == len(errors) and (costs is None or len(costs) == len(live))
        rising = all(a < b for a, b in itertools.pairwise(live))
        if not good or not rising or live[0] <= 0 or min(errors) < 0:
            return None
        return cls(group, bits, live, errors, costs)

    @property
    def name(self) -> str:
        """How it is called."""
        kind = _STORED.get(self.group, self.group)
        if self.group == "channel":
            return kind
        return f"{kind}, {'float32' if self.bits == 32 else f'{self.bits} bits'}"

    def reaches(self, live: float) -> bool:
        """Whether it was measured at so many weights."""
        return self.live[0] <= live * 1.02 and live <= self.live[-1] * 1.02

    def error(self, live: float) -> float:
        """The error with so many, linear in their logarithm between those measured."""
        return _between(math.log(live), [math.log(one) for one in self.live], self.errors)

    def cost(self, live: float) -> float | None:
        """The cost with so many."""
        return None if self.costs is None else _between(live, self.live, self.costs)


def _between(value: float, places: Sequence[float], values: Sequence[float]) -> float:
    if value <= places[0]:
        return values[0]
    for a, b, low, high in zip(places, places[1:], values, values[1:], strict=False):
        if value <= b:
            return low + (high - low) * (value - a) / (b - a)
    return values[-1]


@dataclasses.dataclass(frozen=True)
class Chosen:
    """What a kernel became: living weights (or channels) of all, and how they are stored."""

    path: str
    live: float
    size: float
    group: str
    bits: int


def reasons(run: Mapping[str, Any], chosen: Chosen) -> dict[str, Any] | None:
    """What a kernel would have lost, and cost, otherwise; None if that was not measured."""
    known = fields(fields(run.get("details")).get("alternatives"))
    listed = {text(path): ways for path, ways in fields(known.get("kernels")).items()}.get(
        chosen.path
    )
    ways = [way for way in map(Way.of, entries(listed)[:_MOST_WAYS]) if way is not None]
    channels = known.get("unit") == "channels"
    if not ways or chosen.live <= 0:
        return None
    # Searches for a sparsity measure floats only: what lives is the same.
    same = [way for way in ways if way.group == chosen.group]
    own = [way for way in same if way.bits == chosen.bits] or same or ways
    taken = own[0]
    rows = []

    def row(name: str, way: Way, live: float, kind: str = "") -> None:
        rows.append(
            {
                "name": name,
                "live": count(live),
                "density": share(min(1.0, live / chosen.size)),
                "cost": _priced(way.cost(live), channels),
                "error": _percent(way.error(live)),
                "kind": kind,
            }
        )

    word = "channels" if channels else "weights"
    row("chosen", taken, chosen.live, "chosen")
    for name, live in (
        (f"half as many {word}", _half(chosen)),
        (f"twice as many {word}", 2 * chosen.live),
    ):
        if taken.reaches(live) and live <= chosen.size and live != chosen.live:
            row(name, taken, live)
    for way in ways:
        if way is not taken:
            live = min(max(chosen.live, way.live[0]), way.live[-1])
            row(way.name, way, live)
    return {
        "rows": rows,
        "has_cost": any(one["cost"] != DASH for one in rows),
        "cost_name": "network" if channels else "bytes",
        "unit": word,
        "sentence": _sentence(taken, chosen, channels),
        "rounded": f"Measured before rounding to {chosen.bits} bits."
        if taken.bits != chosen.bits and not channels
        else "",
        "chart": _errors(ways, taken, chosen, channels),
        "legend": [
            {"name": way.name, "look": min(n, len(SHAPES) - 1)} for n, way in enumerate(ways)
        ]
        if len(ways) > 1
        else [],
    }


def _priced(cost: float | None, channels: bool) -> str:
    return DASH if cost is None else share(cost) if channels else count(cost)


def _percent(error: float) -> str:
    return f"{100 * error:.3g} %" if error >= _LEAST_ERROR else "< 0.01 %"


def _half(chosen: Chosen) -> float:
    half = chosen.live / 2
    return max(1.0, float(round(half))) if chosen.group == "channel" else half


def _sentence(way: Way, chosen: Chosen, channels: bool) -> str:
    """The neighbours of what was chosen, in words."""
    here, half = way.error(chosen.live), _half(chosen)
    who = "the layers that read them" if channels else "its outputs"
    parts = []
    if way.reaches(half) and half < chosen.live:
        saved = _apart(way, chosen.live, half, channels)
        parts.append(
            f"With half as many {who} would be off by {_percent(way.error(half))} of their "
            f"energy in place of {_percent(here)}{saved and f', for {saved} less'}"
        )
    twice = min(2 * chosen.live, chosen.size)
    if way.reaches(twice) and twice > 1.05 * chosen.live:
        paid = _apart(way, twice, chosen.live, channels)
        parts.append(
            f"{'with' if parts else 'With'} {'twice as many' if twice < chosen.size else 'all'} by "
            f"{_percent(way.error(twice))}{paid and f', for {paid} more'}"
        )
    return "; ".join(parts) + "." if parts else ""


def _apart(way: Way, more: float, less: float, channels: bool) -> str:
    costs = way.cost(more), way.cost(less)
    if costs[0] is None or costs[1] is None or costs[0] <= costs[1]:
        return ""
    apart = costs[0] - costs[1]
    return (
        f"{100 * apart:.2g} points of the network's cost" if channels else f"{count(apart)} bytes"
    )


def _errors(ways: Sequence[Way], taken: Way, chosen: Chosen, channels: bool) -> str:
    """Error over cost, a line for every way; the chosen place is marked."""
    priced = all(way.costs is not None for way in ways)
    drawn = []
    for way in ways:
        costs = way.costs if priced and way.costs is not None else way.live
        pairs = zip(costs, way.errors, strict=True)
        drawn.append([(x, max(y, _LEAST_ERROR)) for x, y in pairs if x > 0])
    cost = taken.cost(chosen.live) if priced else chosen.live
    here = (cost or chosen.live, max(taken.error(chosen.live), _LEAST_ERROR))
    unit = "channels" if channels else "weights"
    name = f"living {unit}"
    if priced:
        name = "cost of the whole network" if channels else "bytes in the file"
    chart = frame(
        [*(point for way in drawn for point in way), here],
        x_name=name,
        y_name="error of the layer's outputs",
        x_text=(lambda v: f"{100 * v:.3g} %")
        if priced and channels
        else brief_bytes
        if priced
        else (lambda v: f"{v:,.4g}"),
        y_text=lambda v: f"{100 * v:.3g} %",
        width=440,
        height=230,
        x_log=not (priced and channels),
        y_log=True,
    )
    parts = []
    for place, points in enumerate(drawn):
        look = min(place, len(SHAPES) - 1)
        placed = [(chart.x.at(x), chart.y.at(y)) for x, y in points]
        parts.append(line(placed, f"s{look}"))
        parts += [mark(x, y, SHAPES[look], f"c{look}", size=2.2) for x, y in placed]
    parts.append(mark(chart.x.at(here[0]), chart.y.at(here[1]), "ring", "here", "chosen", 7))
    return chart.svg(f"error of {chosen.path}", parts)


# ---------------------------------------------------------------------- the cards


def cards(run: Mapping[str, Any], plan: Sequence[Decoded] | None = None) -> dict[str, Any] | None:
    """A map of every kernel and the reasons for it; None if there is neither.

    `plan` is the run's, if it was read.
    """
    plan = decoded(run.get("plan")) if plan is None else plan
    removed = decoded(run.get("channels"))
    drawn = (removed or plan)[:_MOST_DRAWN]
    after = {row["path"]: row for row in kernels(run, plan) or []}
    cells = 8192 if len(drawn) <= _MANY else 2048
    found = []
    for kernel in drawn:
        row = after.get(kernel.path)
        picture = draw(kernel, cells)
        why = reasons(run, _chosen(kernel))
        found.append(
            {
                "path": kernel.path,
                "shape": f" {TIMES} ".join(map(str, kernel.shape)),
                "facts": _facts(kernel, row),
                "map": picture.drawing,
                "note": picture.note,
                "why": why,
            }
        )
    if not found:
        return None
    return {
        "kernels": found,
        "left": max(0, len(removed or plan) - len(found)),
        "channels": bool(removed),
        "explained": any(one["why"] for one in found),
        "open": len(found) <= 12,
    }


def _chosen(kernel: Decoded) -> Chosen:
    if kernel.group == "channel" and kernel.operations.shape[0] == 1:
        outputs = kernel.operations.shape[1]
        living = int((kernel.operations != OPERATIONS.index("prune")).sum())
        return Chosen(kernel.path, living, outputs, "channel", kernel.exported_bits)
    return Chosen(kernel.path, kernel.living, kernel.size, kernel.group, kernel.exported_bits)


def _facts(kernel: Decoded, row: Mapping[str, Any] | None) -> str:
    parts = [f"{share(kernel.living / kernel.size)} kept", _STORED.get(kernel.group, kernel.group)]
    parts.append("float32" if kernel.exported_bits == 32 else f"{kernel.exported_bits} bits")
    if row is not None and row["after"] is not None:
        parts.append(f"{count(4 * kernel.size)} → {count(row['after'])} bytes")
    return " · ".join(parts)
