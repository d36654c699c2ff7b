"""Which method gives the most accurate .tflite file within a budget of bytes?

Networks are trained on images and compressed to shares of the bytes of their own dense int8 file
(`Target(tflite_bytes=...)`): by the search with each agent, in one configuration for all of them
(`int4="all"`, and the defaults), and by its contenders, with single weights at 8 bits and
the same epochs and exporter; those that search evaluate as many plans as the search has episodes.
The search fine-tunes three or four plans, and validation data decides; contenders one. What
is "ours without agent" is the plan of dynamic programming for the storage that the search chose;
"ours-dqn fast" is a search with `int4="fast"`, the default, for files as fast as the dense one.
Budgets below 1.3 times the smallest file within reach are left out. Test accuracy, bytes, gzipped
bytes and milliseconds per call (left empty where the samples scatter too much) are of the files,
the validation accuracy of compressed ones is of their models. Rows are kept in a CSV file, and not
run again; a line says so where this machine trains another dense network with the same seed than
theirs. `--files` keeps the files, to be timed when the machine is idle. `--report` prints what is
there: a table per network, the search's accuracy minus that of each cell's best contender, and,
where matplotlib is there, a plot of accuracy over bytes.

    python benchmarks/quality.py --dataset fashion_mnist --seeds 3 --results quality.csv
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import os
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from networks import NETWORKS, train
from quality_tables import (
    COMPARED,
    CONTENDERS,
    FAST,
    FLOAT,
    INT8,
    OURS,
    RANDOM,
    STORED,
    Rows,
    plot,
    print_summary,
    print_tables,
    say,
)

import rl_sparsity_tf as rls
from rl_sparsity_tf.allocation.size_budget import size_budget
from rl_sparsity_tf.allocation.storage import Storage
from rl_sparsity_tf.data.datasets import Data, load_dataset
from rl_sparsity_tf.layers.kernels import count_weights, find_kernels
from rl_sparsity_tf.search import comparison
from rl_sparsity_tf.search.finishing import Finished, all_quantized

import tf_keras as keras  # isort: skip  (after the package, which asks for Keras 2)

SHARES = {
    "lenet-300-100": (0.4, 0.2, 0.12),
    "lenet-5": (0.4, 0.2, 0.12),
    "resnet-8": (0.7, 0.5, 0.4),
    "ds-cnn": (0.8, 0.65, 0.55),
}
_MARGIN = 1.3


def latency(path: Path, measured: bool = True) -> dict[str, float | None]:
    """What a row says of a file's time."""
    if not measured:
        return {}
    timing = rls.benchmark_tflite(path).file
    return {"latency_ms": timing.median_ms, "latency_spread": timing.spread}


def smallest(model: keras.Model, name: str) -> float:
    """Bytes with every kernel pruned to its last group, and stored in the smaller type."""
    kernels = find_kernels(model)
    generous = rls.Target(tflite_bytes=2**40)
    budget = size_budget(model, kernels, generous, Storage(), count_weights(model)[1])
    least = budget.fixed + sum(costs.least(1.0, True) for costs in budget.costs)
    say(f"{name}: smallest file within reach about {least:,.0f} bytes, {budget.fixed:,.0f} fixed")
    return least


def dense_network(options: argparse.Namespace, name: str, seed: int, data: Data) -> Path:
    """Where the trained network is kept."""
    stem = f"{options.results.stem}-{name}-{seed}"
    place = options.results.parent / f"{stem}.keras"
    if not place.exists():
        temporary = place.with_name(f"{stem}.{os.getpid()}.keras")
        train(name, data, seed=seed, epochs=options.epochs).save(temporary)
        temporary.replace(place)
    return place


def dense_rows(
    options: argparse.Namespace, name: str, seed: int, data: Data, model: keras.Model, rows: Rows
) -> int:
    """Adds the rows of the dense files; returns the bytes of the int8 one."""
    plan = all_quantized(model)
    files = {FLOAT: (model, "none", None), INT8: (rls.strip(rls.wrap(model, plan)), "plan", plan)}
    for title, (dense, mode, chosen) in files.items():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "dense.tflite"
            example = data.x_train[:512]
            report = rls.export_tflite(dense, path, mode, plan=chosen, representative_data=example)
            parts = ((data.x_test, data.y_test), (data.x_validation, data.y_validation))
            accuracy, validation = (
                float((rls.predict_tflite(path, x).argmax(1) == y).mean()) for x, y in parts
            )
            key = (name, seed, 1.0, title)
            keep(options, key[:3], title, path.read_bytes())
            if rows.has(*key):
                rows.compare(*key, accuracy=accuracy, validation_accuracy=validation)
                continue
            sizes = {"bytes": report.tflite_bytes, "gzip_bytes": report.gzip_bytes}
            scores = {"accuracy": accuracy, "validation_accuracy": validation}
            rows.add(*key, **scores, **sizes, **latency(path, options.latency))
    return int(report.tflite_bytes)


def search(
    options: argparse.Namespace,
    model: keras.Model,
    data: Data,
    seed: int,
    budget: int,
    agent: str,
    group: str,
    episodes: int | None = None,
    epochs: int | None = None,
    int4: str = "all",
) -> tuple[rls.Compressor, Any]:
    """A search, in the one configuration that all networks and budgets get."""
    target = rls.Target(tflite_bytes=budget)
    bits = int4 if group == "auto" else None
    compressor = rls.Compressor(model, target, agent, group, seed=seed, int4=bits)
    result = compressor.search(
        (data.x_train, data.y_train),
        validation_data=(data.x_validation, data.y_validation),
        test_data=(data.x_test, data.y_test),
        episodes=options.episodes if episodes is None else episodes,
        finetune_epochs=options.finetune_epochs if epochs is None else epochs,
        verbose=0,
    )
    return compressor, result


def prepared(
    options: argparse.Namespace,
    model: keras.Model,
    data: Data,
    seed: int,
    budget: int,
    group: str = "element",
) -> rls.Compressor:
    """The conditions that contenders share: those of a search, which itself does not matter."""
    few = {"episodes": 1, "epochs": 0}
    compressor, _ = search(options, model, data, seed, budget, "random", group, **few)
    last = compressor.last
    assert last is not None
    training = dataclasses.replace(last.training, epochs=options.finetune_epochs)
    compressor.last = dataclasses.replace(last, training=training, plain=last.network)
    return compressor


def compared(
    compressor: rls.Compressor, name: str, evaluations: int
) -> tuple[dict[str, Any], bytes]:
    """A contender's figures, and its file, which `compare` does not keep."""
    files: list[bytes] = []
    entry_of = comparison.baseline_entry

    def noting(*arguments: Any) -> dict[str, Any]:
        files.extend(a.exported.content for a in arguments if isinstance(a, Finished))
        return entry_of(*arguments)

    with mock.patch.object(comparison, "baseline_entry", noting):
        (entry,) = comparison.compare(compressor, [name], 0, evaluations=evaluations)
    return entry, files[0]


def figures(options: argparse.Namespace, entry: dict[str, Any], content: bytes) -> dict[str, Any]:
    """What a row says of a finished file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.tflite"
        path.write_bytes(content)
        return {
            "accuracy": entry["tflite_accuracy"],
            "validation_accuracy": entry["validation_accuracy"],
            "bytes": len(content),
            "gzip_bytes": entry["gzip_bytes"],
            **latency(path, options.latency),
        }


def searched(
    options: argparse.Namespace,
    model: keras.Model,
    data: Data,
    seed: int,
    budget: int,
    agent: str,
    group: str,
    int4: str = "all",
) -> tuple[dict[str, Any], bytes]:
    """What the row of a search says, and the file."""
    _, result = search(options, model, data, seed, budget, agent, group, int4=int4)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.tflite"
        result.export_tflite(path)
        content = path.read_bytes()
    found, effort = result.metrics["compressed"], result.metrics["search"]
    row = {
        **figures(options, found, content),
        "seconds": effort["seconds"],
        "evaluations": effort["evaluations"],
        "detail": f"plan of {found['proposed_by']}",
    }
    return row, content


def keep(
    options: argparse.Namespace, key: tuple[str, int, float], name: str, content: bytes
) -> None:
    """Keeps a file, if that is wanted."""
    if options.files:
        network, seed, share = key
        options.files.mkdir(parents=True, exist_ok=True)
        stem = f"{network}-{seed}-{share:g}-{name.replace(' ', '-')}"
        (options.files / f"{stem}.tflite").write_bytes(content)


def cell(
    options: argparse.Namespace,
    place: Path,
    data: Data,
    key: tuple[str, int, float],
    budget: int,
    rows: Rows,
) -> None:
    """All rows of a network, seed and share."""
    missing = [name for name in options.contenders if not rows.has(*key, name)]
    seed, model = key[1], keras.models.load_model(place)
    agents = {name: (agent, "auto", "all") for name, agent in OURS.items()}
    agents[FAST] = ("dqn", "auto", "fast")
    agents[RANDOM] = ("random", "element", "all")
    for name in [name for name in missing if name in agents]:
        try:
            row, content = searched(options, model, data, seed, budget, *agents[name])
            keep(options, key, name, content)
        except rls.RLSparsityError as error:
            row = {"detail": str(error)[:200]}
        rows.add(*key, name, budget=budget, **row)
    waiting = {STORED: "dynamic_programming"} | dict(zip(COMPARED, COMPARED, strict=True))
    ready: dict[str, rls.Compressor] = {}
    for name in [name for name in missing if name in waiting]:
        group = "auto" if name == STORED else "element"
        started = time.monotonic()
        try:
            if group not in ready:
                ready[group] = prepared(options, model, data, seed, budget, group)
                # What a search of this kind needs, too, is part of its time.
                started = started if name == STORED else time.monotonic()
            entry, content = compared(ready[group], waiting[name], options.episodes)
            seconds = time.monotonic() - started
            row = {"seconds": seconds, "evaluations": entry["evaluations"]}
            row |= figures(options, entry, content)
            keep(options, key, name, content)
        except rls.RLSparsityError as error:
            row = {"seconds": time.monotonic() - started, "detail": str(error)[:200]}
        rows.add(*key, name, budget=budget, **row)


def run(options: argparse.Namespace, rows: Rows) -> None:
    """All rows that are missing."""
    for seed in range(*options.seeds):
        data = load_dataset(options.dataset, seed=seed, limit=options.rows)
        for name in options.networks:
            place = dense_network(options, name, seed, data)
            model = keras.models.load_model(place)
            dense = dense_rows(options, name, seed, data, model, rows)
            least = smallest(model, f"{name}, seed {seed}")
            for share in options.shares or SHARES[name]:
                budget = round(share * dense)
                if budget < _MARGIN * least:
                    say(f"{name}, {share:.0%}: left out, {budget:,} bytes are too near to that")
                    continue
                cell(options, place, data, (name, seed, share), budget, rows)
                keras.backend.clear_session()
                gc.collect()


def main() -> None:
    """Runs what is missing, and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--dataset", default="fashion_mnist")
    add("--networks", nargs="+", choices=NETWORKS, default=list(SHARES))
    add("--shares", nargs="+", type=float, help="of the dense int8 file; by default by network")
    add("--contenders", nargs="+", choices=CONTENDERS, default=CONTENDERS)
    add("--seeds", nargs="+", type=int, default=[3], help="how many, or first and last + 1")
    add("--rows", type=int, default=20_000, help="training rows")
    add("--epochs", type=int, default=8, help="of the dense networks")
    add("--finetune-epochs", type=int, default=4)
    add("--episodes", type=int, default=32)
    add("--no-latency", dest="latency", action="store_false", help="leaves the times empty")
    add("--results", type=Path, default=Path("quality.csv"))
    add("--files", type=Path, help="folder that keeps every .tflite file")
    add("--report", action="store_true", help="only prints and draws what is there")
    add("--plot", type=Path, help="a .png file")
    options = parser.parse_args()
    rows = Rows(options.results)
    if not options.report:
        options.results.parent.mkdir(parents=True, exist_ok=True)
        run(options, rows)
    print_tables(options.networks, rows)
    print_summary(options.networks, rows)
    if options.plot:
        plot(options.plot, options.networks, rows)


if __name__ == "__main__":
    main()
