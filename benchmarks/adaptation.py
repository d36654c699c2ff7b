"""Do plans adapt to the data? Own plans against those found for other data.

The same architecture is trained on two data sets of equal shape: Fashion-MNIST, and handwritten
digits scaled to 28 by 28. A search finds a plan for each. Then every network is compressed by its
own plan, by the other one's densities (which groups go follows from its own weights), and by the
other one's masks as they are, with the same fine-tuning:

    python benchmarks/adaptation.py --seeds 3

Prints the kernels' densities and the test accuracies, mean and range over the seeds. Digits has
few images: one of its 359 test images is 0.28 points.
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
import tensorflow as tf
from networks import train
from rows import append

import rl_sparsity_tf as rls
from rl_sparsity_tf.allocation.density_plans import PlanSpace
from rl_sparsity_tf.data.datasets import Data, load_dataset
from rl_sparsity_tf.environment.candidates import Candidate
from rl_sparsity_tf.environment.network import evaluate_plan
from rl_sparsity_tf.environment.reward import bounded
from rl_sparsity_tf.layers.plan import CompressionPlan
from rl_sparsity_tf.search.final import finish_candidate
from rl_sparsity_tf.search.result import FinishedSearch

import tf_keras as keras  # isort: skip

KINDS = ("own plan", "densities of the other", "masks of the other")


def scaled_digits(seed: int, side: int = 28) -> Data:
    """Handwritten digits in the size of Fashion-MNIST."""
    data = load_dataset("digits", seed=seed)

    def scale(images: np.ndarray) -> np.ndarray:
        return np.asarray(tf.image.resize(images, (side, side)), np.float32)

    return Data(
        name="digits, 28 by 28",
        x_train=scale(data.x_train),
        y_train=data.y_train,
        x_validation=scale(data.x_validation),
        y_validation=data.y_validation,
        x_test=scale(data.x_test),
        y_test=data.y_test,
        input_shape=(side, side, 1),
        num_classes=data.num_classes,
    )


def searched(options: argparse.Namespace, data: Data, seed: int, epochs: int) -> FinishedSearch:
    """The search for a network trained on some data."""
    model = train(options.network, data, seed=seed, epochs=epochs)
    compressor = rls.Compressor(model, rls.Target(sparsity=options.sparsity), "dqn", seed=seed)
    compressor.search(
        (data.x_train, data.y_train),
        validation_data=(data.x_validation, data.y_validation),
        test_data=(data.x_test, data.y_test),
        episodes=options.episodes,
        finetune_epochs=max(1, round(options.finetune_steps * 128 / len(data.x_train))),
        finalists=1,
        verbose=0,
    )
    assert compressor.last is not None
    return compressor.last


def found_plan(search: FinishedSearch) -> CompressionPlan:
    """The best plan as it was searched for, before its masks learned."""
    best = search.loop.best
    assert best is not None
    return best.plan


def with_densities(search: FinishedSearch, plan: CompressionPlan) -> CompressionPlan:
    """A plan's densities, on the groups that a network's own weights rank first."""
    space = PlanSpace(search.network, quantize=True)
    ratios = np.array([1.0 - plan.kernels[k.path].sparsity for k in search.network.kernels])
    live = space.live(space.scores(ratios))
    bits = {kernel.path: 8 for kernel in search.network.kernels}
    return search.network.storage.plan_at(search.network.kernels, live, bits)


def accuracy(search: FinishedSearch, plan: CompressionPlan, seed: int) -> dict[str, float]:
    """Value after least squares and test accuracy of the fine-tuned file, for a plan."""
    outcome = evaluate_plan(search.network, plan)
    value = bounded(rls.Reward(), outcome, None)
    candidate = Candidate.of(search.network, value, 0, "benchmark")
    tf.random.set_seed(seed)
    finished = finish_candidate(search, candidate)
    assert finished.exported.test is not None
    return {"value": value, "accuracy": finished.exported.test.metric}


def run(options: argparse.Namespace, seed: int) -> list[dict[str, Any]]:
    """The rows of one seed."""
    searches = [
        searched(options, load_dataset("fashion_mnist", limit=options.rows, seed=seed), seed, 8),
        searched(options, scaled_digits(seed), seed, 40),
    ]
    names = ["fashion_mnist", "digits"]
    plans = [found_plan(search) for search in searches]
    rows = []
    for one, other in ((0, 1), (1, 0)):
        chosen = {
            KINDS[0]: plans[one],
            KINDS[1]: with_densities(searches[one], plans[other]),
            KINDS[2]: plans[other],
        }
        for kind, plan in chosen.items():
            densities = [f"{1.0 - entry.sparsity:.3f}" for entry in plan.kernels.values()]
            row = {"data": names[one], "seed": seed, "kind": kind, "densities": " ".join(densities)}
            row |= accuracy(searches[one], plan, seed)
            append(options.results, row)
            rows.append(row)
            print(*row.values(), file=sys.stderr, flush=True)
    return rows


def report(rows: list[dict[str, Any]]) -> None:
    """Prints the table."""
    print("| data | plan | densities, seed by seed | value | test accuracy, % |")
    print("|---|---|---|---|---|")
    for data in ("fashion_mnist", "digits"):
        for kind in KINDS:
            found = [row for row in rows if (row["data"], row["kind"]) == (data, kind)]
            if not found:
                continue
            cells = [data, kind, "; ".join(row["densities"] for row in found)]
            for name, factor, form in (("value", 1, ".3f"), ("accuracy", 100, ".1f")):
                values = [factor * float(row[name]) for row in found]
                cells.append(
                    f"{np.mean(values):{form}} ({min(values):{form}} to {max(values):{form}})"
                )
            print("| " + " | ".join(cells) + " |")


def main() -> None:
    """Runs the seeds that are missing, and prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--network", default="lenet-300-100")
    parser.add_argument("--sparsity", type=float, default=0.97)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--rows", type=int, default=20_000, help="of Fashion-MNIST")
    parser.add_argument("--episodes", type=int, default=24)
    parser.add_argument("--finetune-steps", type=int, default=600)
    parser.add_argument("--results", type=Path, default=Path("adaptation.csv"))
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    if options.results.exists():
        with options.results.open(newline="") as file:
            rows = list(csv.DictReader(file))
    done = {int(row["seed"]) for row in rows}
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        if seed not in done:
            rows += run(options, seed)
            keras.backend.clear_session()
    report(rows)


if __name__ == "__main__":
    main()
