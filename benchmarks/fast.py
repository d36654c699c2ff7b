"""How accurate are int8 files of half, or a third, of the dense int8 file's time?

ResNet-8 and a DS-CNN are trained on images, and brought to a share of their int8 file's latency in
LiteRT on this machine: by the search (`Target(latency=...)`, with a table of the layers measured
first), and by its contenders, with the same fine-tuning: uniform and global channel pruning by
magnitude and by the scales of batch normalization, the numbers of channels of least layer error,
random search at as many evaluated plans; and the same network with fewer channels everywhere,
trained from the start for the epochs of both trainings. All files are timed in turns with the dense
one. Prints a row per contender: test accuracy of the file and its share of the time, mean and range
over the seeds. Rows are kept in a CSV file, and not run again.

    python benchmarks/fast.py --dataset fashion_mnist --seeds 3 --results fast.csv
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
from networks import build, train
from rows import append

import rl_sparsity_tf as rls
from rl_sparsity_tf.channels.widths import widths_of
from rl_sparsity_tf.data.datasets import Data, load_dataset
from rl_sparsity_tf.search.comparison import CONTENDERS, compare

import tf_keras as keras  # isort: skip  (after the package, which asks for Keras 2)

RIVALS = (
    "uniform",
    "global_magnitude",
    "uniform_gamma",
    "global_gamma",
    "dynamic_programming",
    "random_search",
)
FIELDS = (
    *("network", "seed", "share", "contender"),
    *("accuracy", "latency", "spread", "predicted", "detail"),
)
OURS, DENSE, NARROW = "search", "dense int8", "narrower from the start"


class Rows:
    """The rows measured so far, in a CSV file."""

    def __init__(self, path: Path):
        self._path = path
        self.rows: list[dict[str, str]] = []
        if path.exists():
            with path.open(newline="") as file:
                self.rows = list(csv.DictReader(file))

    def has(self, *key: object) -> bool:
        """Whether a row is there: of a network, seed, share and contender."""
        return any(
            tuple(row[name] for name in FIELDS[:4]) == tuple(map(str, key)) for row in self.rows
        )

    def add(self, *values: object) -> None:
        """Adds a row to the file."""
        row = dict(zip(FIELDS, map(str, values), strict=True))
        append(self._path, row)
        self.rows.append(row)
        print(
            " ".join(
                f"{value:.4f}" if isinstance(value, float) else str(value) for value in values
            ),
            file=sys.stderr,
            flush=True,
        )


def exported(model: keras.Model, data: Data, folder: Path, name: str) -> tuple[Path, float]:
    """A model's int8 file and its test accuracy."""
    path = folder / f"{name}.tflite"
    rls.export_tflite(model, path, "int8", representative_data=data.x_train[:512], overwrite=True)
    found = rls.predict_tflite(path, data.x_test).argmax(1)
    return path, float((found == data.y_test).mean())


def narrowed(name: str, data: Data, table: rls.LatencyTable, share: float) -> float | None:
    """The largest factor on all widths with which the network is predicted to be fast enough."""
    limit = share * table.predict(widths_of(build(name, data)))
    for width in np.arange(0.99, 0.05, -0.01):
        if table.predict(widths_of(build(name, data, width))) <= limit:
            return float(width)
    return None


def run(options: argparse.Namespace, name: str, seed: int, data: Data, rows: Rows) -> None:
    """All rows of a network and seed."""
    cache = options.results.parent / f"{options.results.stem}-{name}-{seed}.keras"
    if not cache.exists():
        train(name, data, seed=seed, epochs=options.epochs).save(cache)
    model = keras.models.load_model(cache)
    place = options.results.parent / f"{options.results.stem}-{name}.json"
    if not place.exists():
        rls.measure_latency(model, quantization="int8").save(place)
    table = rls.LatencyTable.load(place)
    with tempfile.TemporaryDirectory() as folder:
        dense, accuracy = exported(model, data, Path(folder), "dense")
        if not rows.has(name, seed, 1.0, DENSE):
            rows.add(name, seed, 1.0, DENSE, accuracy, 1.0, 0.0, 1.0, "")
        for share in options.shares:
            if not rows.has(name, seed, share, OURS):
                try:
                    for row in searched(options, model, data, seed, share, table):
                        rows.add(name, seed, share, *row)
                except rls.TargetError as error:
                    rows.add(name, seed, share, OURS, "", "", "", "", str(error))
            if not rows.has(name, seed, share, NARROW):
                width = narrowed(name, data, table, share)
                if width is None:
                    rows.add(name, seed, share, NARROW, "", "", "", "", "no width is that fast")
                    continue
                epochs = options.epochs + options.finetune_epochs
                small = train(name, data, seed=seed, epochs=epochs, width=width)
                path, accuracy = exported(small, data, Path(folder), "narrow")
                timing = rls.benchmark_tflite(path, dense)
                rows.add(
                    name,
                    seed,
                    share,
                    NARROW,
                    accuracy,
                    timing.ratio,
                    timing.spread,
                    table.predict(widths_of(small)) / table.predict(widths_of(model)),
                    f"x{width:.2f}",
                )


def searched(
    options: argparse.Namespace,
    model: keras.Model,
    data: Data,
    seed: int,
    share: float,
    table: rls.LatencyTable,
) -> Iterator[tuple[Any, ...]]:
    """The rows of the search and of those that share its conditions."""
    compressor = rls.Compressor(
        model, rls.Target(latency=share), options.agent, seed=seed, latency_table=table
    )
    result = compressor.search(
        (data.x_train, data.y_train),
        validation_data=(data.x_validation, data.y_validation),
        test_data=(data.x_test, data.y_test),
        episodes=options.episodes,
        finetune_epochs=options.finetune_epochs,
        quantization="int8",
        verbose=0,
    )
    found = result.metrics["compressed"]
    detail = f"{found['proposed_by']}; {result.metrics['search']['evaluations']} plans"
    ours = (OURS, *figures(found), detail)
    for name in options.rivals:
        title = CONTENDERS[name].removesuffix(" int8")
        try:
            (entry,) = compare(compressor, [name], 0)
        except rls.RLSparsityError as error:  # a network that training did not bring back
            yield title, "", "", "", "", str(error)[:160]
            continue
        yield title, *figures(entry), f"{entry['evaluations']} plans"
    yield ours  # last: where it is, all are


def figures(entry: dict[str, Any]) -> tuple[Any, ...]:
    """What a row says of a contender."""
    names = ("tflite_accuracy", "latency", "latency_spread", "predicted_latency")
    return tuple(entry[name] for name in names)


def report(options: argparse.Namespace, rows: Rows) -> None:
    """Prints a table per network and share."""

    def over(values: list[str], form: str) -> str:
        numbers = [float(value) for value in values if value not in ("", "None")]
        if not numbers:
            return "no file" if values and not any(values) else "not measured"
        text = f"{np.mean(numbers):{form}}"
        if len(numbers) > 1:
            text += f" ({min(numbers):{form}} to {max(numbers):{form}})"
        return text

    names = [OURS, *(CONTENDERS[name].removesuffix(" int8") for name in RIVALS), NARROW]
    for network in options.networks:
        dense = [
            r["accuracy"] for r in rows.rows if (r["network"], r["contender"]) == (network, DENSE)
        ]
        print(f"\n{network}, dense int8 {over(dense, '.4f')}\n")
        print(
            "| contender | "
            + " | ".join(f"accuracy at {s:.0%} | time" for s in options.shares)
            + " |"
        )
        print("|---|" + "---|---|" * len(options.shares))
        for name in names:
            cells = []
            for share in options.shares:
                key = (network, str(share), name)
                found = [r for r in rows.rows if (r["network"], r["share"], r["contender"]) == key]
                cells.append(over([r["accuracy"] for r in found], ".4f"))
                measured = [r["latency"] for r in found if r["latency"] not in ("", "None")]
                predicted = over([r["predicted"] for r in found], ".2f")
                cells.append(over(measured, ".2f") if measured else f"{predicted} (predicted)")
            print(f"| {name} | " + " | ".join(cells) + " |")


def main() -> None:
    """Runs what is missing, and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="fashion_mnist")
    parser.add_argument("--networks", nargs="+", default=["resnet-8", "ds-cnn"])
    parser.add_argument("--shares", nargs="+", type=float, default=[0.5, 0.3])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=10_000, help="training rows")
    parser.add_argument("--epochs", type=int, default=12, help="of the dense networks")
    parser.add_argument("--finetune-epochs", type=int, default=6)
    parser.add_argument("--episodes", type=int, default=12)
    parser.add_argument("--agent", default="dqn")
    parser.add_argument("--rivals", nargs="+", choices=RIVALS, default=RIVALS)
    parser.add_argument("--results", type=Path, default=Path("fast.csv"))
    options = parser.parse_args()
    rows = Rows(options.results)
    data = load_dataset(options.dataset, limit=options.rows)
    for seed in range(options.seeds):
        for name in options.networks:
            run(options, name, seed, data, rows)
    report(options, rows)


if __name__ == "__main__":
    main()
