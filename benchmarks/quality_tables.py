"""What `quality.py` measured: its rows, its tables and its plot."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rows import append

OURS = {"ours-dqn": "dqn", "ours-ppo": "ppo"}
FAST = "ours-dqn fast"
RANDOM = "random-policy"
STORED = "ours without agent"
COMPARED = (
    *("lamp", "dynamic_programming", "random_search", "tfmot"),
    *("hill_climbing", "erk", "global_magnitude", "uniform"),
)
CONTENDERS = (*OURS, FAST, STORED, RANDOM, *COMPARED)
FLOAT, INT8 = "dense float32", "dense int8"
KEY = ("network", "seed", "share", "contender")
FIELDS = (
    *(*KEY, "budget", "accuracy", "validation_accuracy", "bytes", "gzip_bytes"),
    *("latency_ms", "latency_spread", "seconds", "evaluations", "detail"),
)
Row = dict[str, str]


class Rows:
    """The rows measured so far, in a CSV file."""

    def __init__(self, path: Path):
        self._path = path
        self.rows: list[Row] = []
        if path.exists():
            with path.open(newline="") as file:
                self.rows = list(csv.DictReader(file))

    def has(self, *key: object) -> bool:
        """Whether a row is there: of a network, seed, share and contender."""
        return any(tuple(row[name] for name in KEY) == tuple(map(str, key)) for row in self.rows)

    def add(self, *key: object, **values: Any) -> None:
        """Adds a row to the file."""
        found = {**dict(zip(KEY, key, strict=True)), **values}
        row = {name: _text(found.get(name), name in KEY) for name in FIELDS}
        append(self._path, row)
        self.rows.append(row)
        say(*row.values())

    def compare(self, *key: object, **values: Any) -> None:
        """Says where a row has other figures: the same seed need not train the same network."""
        (row,) = where(self, **dict(zip(KEY, key, strict=True)))
        for name, value in values.items():
            if (here := _text(value, whole=False)) != row[name]:
                say(f"{key}: {name} is {here} here, and {row[name]} in the rows kept")


def _text(value: Any, whole: bool) -> str:
    """A cell; figures are rounded."""
    if value is None:
        return ""
    return f"{value:.5g}" if isinstance(value, float) and not whole else str(value)


def say(*words: object) -> None:
    """A line of progress."""
    print(*words, file=sys.stderr, flush=True)


def over(found: list[Row], name: str, scale: float = 1.0, form: str = ".2f") -> str:
    """Mean and range of a figure over the seeds."""
    numbers = [scale * float(row[name]) for row in found if row[name]]
    if not numbers:
        return "no file" if found else "-"
    text = f"{np.mean(numbers):{form}}"
    if len(numbers) > 1:
        text += f" ({min(numbers):{form}} to {max(numbers):{form}})"
    failed = len(found) - len(numbers)
    return f"{text}, {failed} failed" if failed else text


def mean(found: list[Row], name: str, form: str = ",.0f") -> str:
    """Mean of a figure over the seeds."""
    numbers = [float(row[name]) for row in found if row[name]]
    return f"{np.mean(numbers):{form}}" if numbers else "-"


def where(rows: Rows, **values: object) -> list[Row]:
    """The rows that have the values."""
    return [r for r in rows.rows if all(r[name] == str(v) for name, v in values.items())]


def print_tables(networks: Sequence[str], rows: Rows) -> None:
    """Prints a table per network, and one of what the search is ahead or behind."""
    for network in networks:
        here = where(rows, network=network)
        shares = sorted({float(r["share"]) for r in here} - {1.0}, reverse=True)
        print(f"\n**{network}**: test accuracy in %; bytes / gzipped; ms per call; seconds\n")
        print("| contender | " + " | ".join(f"{share:.0%}" for share in shares) + " |")
        print("|---" * (len(shares) + 1) + "|")
        for title in (FLOAT, INT8, *CONTENDERS):
            dense = title in (FLOAT, INT8)
            cells = []
            for share in (1.0,) if dense else shares:
                found = where(rows, network=network, share=share, contender=title)
                sizes = f"{mean(found, 'bytes')} / {mean(found, 'gzip_bytes')}"
                times = mean(found, "latency_ms", ".3f")
                times = "" if times == "-" else f"; {times} ms"
                effort = "" if dense else f"; {mean(found, 'seconds')} s"
                cells.append(f"{over(found, 'accuracy', 100)}; {sizes}{times}{effort}")
                if not found:
                    cells[-1] = "-"
            if any(text != "-" for text in cells):
                print(f"| {title} | " + " | ".join(cells * (len(shares) if dense else 1)) + " |")
    print("\nThe search minus each cell's best contender by test accuracy, in points\n")
    ours = (*OURS, FAST, STORED)
    print("| network | share | seed | best contender | " + " | ".join(ours) + " |")
    print("|---" * (4 + len(ours)) + "|")
    gaps: dict[str, list[float]] = {name: [] for name in ours}
    for network, share, seed, best in best_contenders(rows):
        cells = []
        for name in ours:
            found = where(rows, network=network, share=share, seed=seed, contender=name)
            gap = None
            if found and found[0]["accuracy"]:
                gap = 100 * (float(found[0]["accuracy"]) - float(best["accuracy"]))
                gaps[name].append(gap)
            cells.append("-" if gap is None else f"{gap:+.2f}")
        title = f"{best['contender']} {100 * float(best['accuracy']):.2f}"
        print(f"| {network} | {share} | {seed} | {title} | " + " | ".join(cells) + " |")
    ends = [
        f"{name} {np.mean(gap):+.2f}, {sum(one > 0 for one in gap)} of {len(gap)}"
        for name, gap in gaps.items()
        if gap
    ]
    if ends:
        print("\nmean, cells ahead: " + "; ".join(ends))


def print_summary(networks: Sequence[str], rows: Rows) -> None:
    """Prints one table: test accuracy in %, a line per network and budget."""
    here = [row for row in rows.rows if row["network"] in networks and row["share"] != "1.0"]
    names = [name for name in CONTENDERS if any(row["contender"] == name for row in here)]
    print("\nTest accuracy in %: mean, range, [seeds]\n")
    print(f"| network | budget | {INT8} | " + " | ".join(names) + " |")
    print("|---" * (3 + len(names)) + "|")
    for network in networks:
        mine = [row for row in here if row["network"] == network]
        for share in sorted({float(row["share"]) for row in mine}, reverse=True):
            dense = where(rows, network=network, share=1.0, contender=INT8)
            cells = [_short(where(rows, network=network, share=share, contender=n)) for n in names]
            print(f"| {network} | {share:.0%} | {_short(dense)} | " + " | ".join(cells) + " |")


def _short(found: list[Row]) -> str:
    """Mean and range of the accuracy, and of how many seeds."""
    text, count = over(found, "accuracy", 100, ".1f"), sum(bool(row["accuracy"]) for row in found)
    return f"{text} [{count}]" if count else text


def best_contenders(rows: Rows) -> Iterator[tuple[str, str, str, Row]]:
    """Every cell's network, share and seed, and its best contender's row."""
    for network, share, seed in dict.fromkeys(
        (r["network"], r["share"], r["seed"]) for r in rows.rows if r["share"] != "1.0"
    ):
        found = where(rows, network=network, share=share, seed=seed)
        found = [r for r in found if r["contender"] not in (*OURS, FAST, STORED) and r["accuracy"]]
        if found:
            yield network, share, seed, max(found, key=lambda r: float(r["accuracy"]))


def plot(path: Path, networks: Sequence[str], rows: Rows) -> None:
    """Draws accuracy over bytes, a panel per network."""
    try:
        import matplotlib
    except ImportError:
        say("matplotlib is not installed, so nothing is drawn")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    count = len(networks)
    figure, panels = pyplot.subplots(1, count, figsize=(5 * count, 4), squeeze=False)
    lines: dict[str, Any] = {}
    for panel, network in zip(panels[0], networks, strict=True):
        for number, title in enumerate((INT8, *CONTENDERS)):
            found = where(rows, network=network, contender=title)
            points = []
            for share in {r["share"] for r in found if r["accuracy"]}:
                part = [r for r in found if r["share"] == share and r["accuracy"]]
                points.append(
                    [np.mean([float(r[name]) for r in part]) for name in ("bytes", "accuracy")]
                )
            if points:
                marker = "o-" if title in OURS else "x--"
                style = {"label": title, "color": f"C{number}"}
                (line,) = panel.plot(*zip(*sorted(points), strict=True), marker, **style)
                lines.setdefault(title, line)
        panel.set(title=network, xlabel="bytes of the .tflite file", xscale="log")
    panels[0][0].set_ylabel("test accuracy")
    panels[0][-1].legend(lines.values(), lines, fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
