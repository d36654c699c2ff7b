"""A finished run's documents, made by hand: two kernels, two contenders, three episodes."""

from __future__ import annotations

import copy
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

METRICS = {
    "format_version": 1,
    "dataset": "digits",
    "agent": "dqn",
    "seed": 7,
    "metric": {"name": "accuracy", "higher_is_better": True},
    "dense": {"accuracy": 0.98, "metric": 0.98, "tflite_bytes": 40_000, "gzip_bytes": 36_000},
    "dense_int8": {"accuracy": 0.97, "metric": 0.97, "tflite_bytes": 10_000, "gzip_bytes": 9_000},
    "compressed": {
        "accuracy": 0.96,
        "metric": 0.96,
        "validation_accuracy": 0.965,
        "validation_metric": 0.965,
        "tflite_accuracy": 0.95,
        "tflite_metric": 0.95,
        "sparsity": 0.875,
        "tflite_bytes": 4_000,
        "gzip_bytes": 3_000,
        "max_abs_difference": 0.00125,
        "batch_size": None,
        "proposed_by": "lamp",
    },
    "search": {"episodes": 3, "evaluations": 8, "seconds": 12.5, "operations": {}},
    "baselines": [
        {
            "name": "uniform magnitude int8",
            "metric": 0.9,
            "tflite_metric": 0.91,
            "tflite_bytes": 4_100,
            "gzip_bytes": 3_100,
            "sparsity": 0.88,
            "evaluations": 1,
        },
        {
            "name": "LAMP int8",
            "metric": 0.93,
            "tflite_metric": 0.94,
            "tflite_bytes": 3_900,
            "gzip_bytes": 3_050,
            "sparsity": 0.88,
            "evaluations": 1,
            "warnings": ["stored otherwise"],
        },
    ],
    "warnings": ["the fine-tuning diverged"],
}
PLAN = {
    "format_version": 1,
    "kernels": [
        {
            "path": "conv/kernel",
            "shape": [3, 3, 2, 4],
            "layout": "iiio",
            "group": "element",
            "bits": 8,
            "default": "prune",
            "exceptions": [[0, 6, "quantize"], [70, 2, "quantize"]],
        },
        {
            "path": "dense/kernel",
            "shape": [10, 3],
            "layout": "io",
            "group": "block4",
            "bits": 32,
            "default": "prune",
            "exceptions": [[8, 1, "keep"]],
        },
    ],
}


def _way(group: str, bits: int, live: list[int], errors: list[float], costs: Any) -> dict[str, Any]:
    return {"group": group, "bits": bits, "live": live, "errors": errors, "costs": costs}


DETAILS = {
    "format_version": 1,
    "versions": {"python": "3.11.1"},
    "file": {
        "quantization": "plan",
        "tolerance": 0.01,
        "output_range": 12.5,
        "top1_agreement": 0.998,
        "notes": ["conv/kernel stays float"],
        "tensors": [
            {
                "kernel": "conv/kernel",
                "dtype": "int8",
                "bytes": 72,
                "format": "dense",
                "exploited": "dense: zeros are multiplied like any number",
            }
        ],
    },
    "alternatives": {
        "unit": "weights",
        "kernels": {
            "conv/kernel": [
                _way(
                    "element",
                    8,
                    [2, 4, 8, 16, 72],
                    [0.9, 0.5, 0.25, 0.1, 0.0],
                    [10, 20, 30, 40, 80],
                ),
                _way("element", 32, [4, 8, 16], [0.4, 0.2, 0.05], [40, 60, 100]),
            ]
        },
    },
    "considered": [
        {"what": "proposed", "before_episode": 0, "proposed_by": "lamp", "reward": 0.5},
        {"what": "proposed", "before_episode": 0, "proposed_by": "erk", "reward": 0.25},
        {"what": "ranked anew", "before_episode": 3, "proposed_by": "lamp", "reward": 0.75},
    ],
}


def _episode(number: int, reward: float, evaluations: int) -> dict[str, Any]:
    return {
        "episode": number,
        "proposed_by": "dqn",
        "reward": reward,
        "validation_metric": 0.9,
        "sparsity": 0.9,
        "evaluations": evaluations,
    }


HISTORY = [_episode(0, 0.125, 3), _episode(1, 0.625, 4), _episode(2, 0.5, 5)]
MANIFEST = {
    "format_version": 2,
    "arguments": {
        "target": {"tflite_bytes": 4_000},
        "seed": 7,
        "episodes": 3,
        "hierarchy": False,
        "agent": {"agent": "dqn", "learning_rate": 0.002},
    },
    "versions": {"tensorflow": "2.20.0", "OMP_NUM_THREADS": ""},
}


def made_run(**changed: Any) -> dict[str, Any]:
    """A run as read_run gives it; what is given replaces a document."""
    run = {
        "name": "run",
        "problems": {},
        "metrics": METRICS,
        "plan": PLAN,
        "channels": None,
        "details": DETAILS,
        "manifest": MANIFEST,
        "history": HISTORY,
    }
    return copy.deepcopy(run | changed)


def write_run(folder: Path, run: dict[str, Any]) -> Path:
    """Writes a run's documents as its folder has them."""
    folder.mkdir(exist_ok=True)
    for name in ("metrics", "plan", "channels", "details", "manifest"):
        if run[name] is not None:
            (folder / f"{name}.json").write_text(json.dumps(run[name]))
    (folder / "journal.jsonl").write_text("".join(json.dumps(e) + "\n" for e in run["history"]))
    return folder


_VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """An HTML page that is checked while it is read: every tag is closed, in order.

    Attributes:
        tags: Names of all elements.
        attributes: Names and values of all attributes.
        text: All text, in one line.
    """

    def __init__(self, page: str):
        super().__init__(convert_charrefs=True)
        self._open: list[str] = []
        self._words: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.page = page
        self.feed(page)
        self.close()
        assert not self._open, f"left open: {self._open}"
        for drawing in self.drawings:
            ElementTree.fromstring(drawing)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"an attribute twice: {names}"
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in _VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self._open, f"</{tag}> closes nothing"
        last = self._open.pop()
        assert last == tag, f"</{tag}> closes <{last}>"

    def handle_data(self, data: str) -> None:
        self._words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self._words).split())

    @property
    def drawings(self) -> list[str]:
        """The text of all SVG elements."""
        parts = self.page.split("<svg")[1:]
        return ["<svg" + part.partition("</svg>")[0] + "</svg>" for part in parts]

    def check_harmless(self) -> None:
        """Nothing is run, and nothing loaded."""
        assert not set(self.tags) & {"script", "iframe", "object", "embed", "img", "image", "use"}
        assert not [name for name, _ in self.attributes if name.startswith("on")]
        loading = {"src", "href", "xlink:href", "action", "data", "srcset", "poster"}
        loaded = {value for name, value in self.attributes if name in loading}
        assert loaded <= {"data:,"}
        styles = self.page.split("<style>")[1:]
        css = "".join(part.partition("</style>")[0] for part in styles)
        assert css
        assert "url(" not in css
        assert "@import" not in css
