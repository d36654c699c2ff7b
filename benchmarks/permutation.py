"""What does permuting channels bring, before pruning by blocks of 16 and to the pattern 2:4?

A dense network is trained per seed. Every kernel with at least two blocks of inputs is pruned by
magnitude to the same sparsity by blocks of 16, or to 2:4: once as it is, and once after
permute_channels. The two networks compute the same and are pruned by the same rule. Prints the
share of magnitude that stays (mean over the pruned kernels, and over those whose inputs could be
permuted), and the validation accuracy right after pruning and after a short fine-tuning with masks
that learn, as a Markdown table (mean and range over the seeds).

    python benchmarks/permutation.py --dataset fashion_mnist --seeds 3 --epochs 1
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow as tf
from networks import train
from rows import append

import rl_sparsity_tf as rls
from rl_sparsity_tf.channels.permutation import permutation_report, permute_channels
from rl_sparsity_tf.data.batches import evaluation_data, training_data
from rl_sparsity_tf.data.datasets import Data, load_dataset
from rl_sparsity_tf.data.metrics import Evaluator, Metric
from rl_sparsity_tf.layers.kernels import find_kernels
from rl_sparsity_tf.layers.plan import CompressionPlan, KernelRule
from rl_sparsity_tf.training.mask_training import finetune

import tf_keras as keras  # isort: skip  (after the package, which asks for Keras 2)

BLOCK = 16
ACCURACY = Metric("accuracy", True)
FIGURES = ("kept", "permutable", "pruned", "finetuned")


def pruned_paths(model: keras.Model) -> list[str]:
    """The kernels with at least two blocks of inputs: fewer would be whole channels."""
    return [k.path for k in find_kernels(model) if k.grouping("element").inputs >= 2 * BLOCK]


def plan_for(model: keras.Model, group: str, sparsity: float) -> CompressionPlan:
    """The same rule for every kernel that is pruned."""
    if group == "2:4":
        return CompressionPlan(KernelRule(path, pattern=group) for path in pruned_paths(model))
    return CompressionPlan(KernelRule(path, sparsity, group=group) for path in pruned_paths(model))


def run(
    name: str, data: Data, seed: int, options: argparse.Namespace, dense_epochs: int
) -> list[dict[str, Any]]:
    """All cells of one network and seed."""
    model = train(name, data, seed=seed, epochs=dense_epochs)
    rows = slice(0, options.rows)
    training = training_data((data.x_train[rows], data.y_train[rows]), model, seed=seed)
    validation = evaluation_data((data.x_validation, data.y_validation), model, "validation")
    dense = Evaluator(model, ACCURACY)(validation).metric
    found = []
    for group in (f"block{BLOCK}", "2:4"):
        goal = {"group": group, "sparsity": None if group == "2:4" else options.sparsity}
        started = time.perf_counter()
        permuted = permute_channels(model, **goal, seed=seed)
        seconds = time.perf_counter() - started
        paths = pruned_paths(model)
        kept = {entry.path: entry for entry in permutation_report(model, permuted, **goal)}
        # Rounding aside, the others' inputs stay in their order.
        changed = [path for path in paths if kept[path].after > kept[path].before + 1e-6]
        for which, one in (("before", model), ("after", permuted)):
            tf.random.set_seed(seed)
            wrapped = rls.wrap(one, plan_for(one, group, options.sparsity), train_masks=True)
            pruned = Evaluator(wrapped, ACCURACY)(validation).metric
            score = finetune(wrapped, training, validation, ACCURACY, epochs=options.epochs)
            found.append(
                {
                    "network": name,
                    "seed": seed,
                    "group": group,
                    "permuted": which == "after",
                    "dense": dense,
                    "kept": float(np.mean([getattr(kept[p], which) for p in paths])),
                    "permutable": float(np.mean([getattr(kept[p], which) for p in changed])),
                    "pruned": pruned,
                    "finetuned": score.metric,
                    "seconds": seconds,
                }
            )
            print(found[-1], file=sys.stderr, flush=True)
            if options.csv:
                append(options.csv, found[-1])
    return found


def report(rows: list[dict[str, Any]]) -> None:
    """Prints the table."""

    def text(some: list[dict[str, Any]], field: str) -> str:
        values = 100 * np.array([row[field] for row in some])
        return f"{values.mean():.1f} ({values.min():.1f} to {values.max():.1f})"

    print("| network | pruned | permuted | kept, % | kept where permuted, % ", end="")
    print("| accuracy pruned, % | fine-tuned, % |\n|---|---|---|---|---|---|---|")
    cells = dict.fromkeys((row["network"], row["group"], row["permuted"]) for row in rows)
    for cell in cells:
        some = [row for row in rows if (row["network"], row["group"], row["permuted"]) == cell]
        name, group, permuted = cell
        figures = " | ".join(text(some, field) for field in FIGURES)
        print(f"| {name} | {group} | {'yes' if permuted else 'no'} | {figures} |")
    for name in dict.fromkeys(row["network"] for row in rows):
        some = [row for row in rows if row["network"] == name]
        longest = max(row["seconds"] for row in some)
        print(
            f"\n{name}: dense {text(some, 'dense')} %; a permutation took at most {longest:.0f} s"
        )


def main() -> None:
    """Runs all cells, printing rows as they finish."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="fashion_mnist")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=1, help="of fine-tuning")
    parser.add_argument("--rows", type=int, default=20_000, help="of fine-tuning")
    parser.add_argument("--lenet-epochs", type=int, default=6, help="of the dense network")
    parser.add_argument("--resnet-epochs", type=int, default=3, help="of the dense network")
    parser.add_argument("--sparsity", type=float, default=0.8, help="of the blocks")
    parser.add_argument("--csv", type=Path, help="file to append rows to")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name, epochs in (
        ("lenet-300-100", options.lenet_epochs),
        ("resnet-8", options.resnet_epochs),
    ):
        for seed in range(options.seeds):
            data = load_dataset(options.dataset, seed=seed)
            rows += run(name, data, seed, options, epochs)
    report(rows)


if __name__ == "__main__":
    main()
