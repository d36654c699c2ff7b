"""How small is the smallest file that holds an accuracy, by the groups that are searched?

Networks are trained on Fashion-MNIST and compressed with `Target(max_accuracy_drop=0.01)`: in
single weights at 8 bits, with groups and bits chosen at every size (`group="auto"`), and with those
where 4 bits are only allowed if they cost no time (`int4="fast"`).

    python benchmarks/accuracy_drop.py --networks lenet-300-100 lenet-5 --seeds 3

Rows are kept in a CSV file, and not run again. Prints the bytes of the file as a share of the dense
int8 file's, and what it loses against the dense model on the validation data, which it was chosen
by, and on test data, in points; mean and range over the seeds.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
from networks import NETWORKS, train
from rows import append

import rl_sparsity_tf as rls
from rl_sparsity_tf.data.datasets import load_dataset

import tf_keras as keras  # isort: skip

GROUPS: dict[str, dict[str, str]] = {
    "element": {"group": "element"},
    "auto": {"group": "auto", "int4": "all"},
    "auto, fast": {"group": "auto", "int4": "fast"},
}


def searched(options: argparse.Namespace, name: str, seed: int, groups: str) -> dict[str, Any]:
    """The row of one search."""
    data = load_dataset("fashion_mnist", seed=seed, limit=options.rows)
    place = options.results.parent / f"{options.results.stem}-{name}-{seed}.keras"
    if not place.exists():
        train(name, data, seed=seed, epochs=options.epochs).save(place)
    model = keras.models.load_model(place)
    target = rls.Target(max_accuracy_drop=options.drop)
    result = rls.Compressor(model, target, seed=seed, **GROUPS[groups]).search(
        (data.x_train, data.y_train),
        validation_data=(data.x_validation, data.y_validation),
        test_data=(data.x_test, data.y_test),
        episodes=options.episodes,
        finetune_epochs=options.finetune_epochs,
        verbose=0,
    )
    metrics = result.metrics
    dense, found = metrics["dense_int8"], metrics["compressed"]
    held = [one for one in metrics["search"]["trials"] if one["held"]]
    smallest = min(held, key=lambda one: one["tflite_bytes"])
    return {
        "network": name,
        "seed": seed,
        "groups": groups,
        "bytes": found["tflite_bytes"],
        "share": found["tflite_bytes"] / dense["tflite_bytes"],
        "validation_lost": metrics["search"]["dense_validation_metric"]
        - smallest["validation_metric"],
        "test_lost": metrics["dense"]["metric"] - found["tflite_accuracy"],
        "proposed_by": found["proposed_by"],
        "seconds": metrics["search"]["seconds"],
    }


def read(path: Path) -> list[dict[str, str]]:
    """The rows so far."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def over(rows: list[dict[str, str]], name: str, scale: float, form: str) -> str:
    """Mean and range of a figure."""
    values = [scale * float(row[name]) for row in rows]
    text = f"{np.mean(values):{form}}"
    return text if len(values) == 1 else f"{text} ({min(values):{form}} to {max(values):{form}})"


def main() -> None:
    """Runs what is missing, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--networks", nargs="+", choices=NETWORKS, default=["lenet-300-100", "lenet-5"])
    add("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    add("--seeds", type=int, default=3)
    add("--drop", type=float, default=0.01)
    add("--rows", type=int, default=20_000, help="training rows")
    add("--epochs", type=int, default=8, help="of the dense networks")
    add("--finetune-epochs", type=int, default=4)
    add("--episodes", type=int, default=24)
    add("--results", type=Path, default=Path("accuracy_drop.csv"))
    options = parser.parse_args()
    for seed in range(options.seeds):
        for name in options.networks:
            for groups in options.groups:
                key = (name, str(seed), groups)
                if any(
                    (r["network"], r["seed"], r["groups"]) == key for r in read(options.results)
                ):
                    continue
                row = searched(options, name, seed, groups)
                append(options.results, row)
                print(*row.values(), file=sys.stderr, flush=True)
    head = ("network", "groups", "bytes", "share of dense int8, %")
    head += ("lost, validation", "lost, test", "seconds", "seeds")
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    rows = read(options.results)
    for name in options.networks:
        for groups in options.groups:
            mine = [r for r in rows if (r["network"], r["groups"]) == (name, groups)]
            if not mine:
                continue
            cells = [name, groups, over(mine, "bytes", 1, ",.0f"), over(mine, "share", 100, ".1f")]
            cells += [over(mine, f"{part}_lost", 100, ".2f") for part in ("validation", "test")]
            cells += [f"{np.mean([float(r['seconds']) for r in mine]):.0f}", str(len(mine))]
            print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
