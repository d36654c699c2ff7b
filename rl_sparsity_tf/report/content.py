"""What a report says in words: headline, warnings, verification, how to repeat the run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rl_sparsity_tf.report.maps import MOST_KERNELS, listed
from rl_sparsity_tf.report.reading import entries, fields, number, text, texts, whole
from rl_sparsity_tf.report.words import DASH, MOST_ROWS, TIMES, Measure, count, share

_MOST_WARNINGS = 100
_LONG = 11


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
    for one in entries(metrics.get("baselines"))[:MOST_ROWS]:
        name = text(one.get("name"), 60) or "a contender"
        found += [f"{name}: {words}" for words in texts(one.get("warnings"))]
    slow_int4 = fields(fields(metrics.get("search")).get("slow_int4"))
    if note := text(slow_int4.get("note")):
        found.append(note)
    given = len(listed(run.get("plan")))
    if given > MOST_KERNELS:
        found.append(f"the plan names {given:,} kernels, of which {MOST_KERNELS:,} are shown")
    for name, why in fields(run.get("problems")).items():
        found.append(f"{text(name)} cannot be used: {text(why)}")
    return list(dict.fromkeys(found))[:_MOST_WARNINGS]


# ---------------------------------------------------------------------- the file


def trials(run: Mapping[str, Any]) -> dict[str, Any] | None:
    """The sizes that were tried where a drop in accuracy was the target."""
    metrics = fields(run.get("metrics"))
    search, measure = fields(metrics.get("search")), Measure.of(metrics)
    rows = []
    for one in entries(search.get("trials"))[:MOST_ROWS]:
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
