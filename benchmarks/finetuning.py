"""Which masks should the final fine-tuning train, and does a teacher help? LeNet-300-100.

A dense network is trained per seed, pruned by magnitude with equal densities or those of LAMP (Lee
et al. 2021, arXiv 2010.07611), and fine-tuned for the same epochs in six ways: with fixed masks,
straight-through masks and hard concrete masks, each with and without the dense network as teacher.
Prints test and validation accuracy (mean and range over the seeds) and seconds relative to fixed
masks without a teacher, as a Markdown table. Choose by validation accuracy.

    python benchmarks/finetuning.py --dataset fashion_mnist --seeds 3 --epochs 3 --sparsity 0.97
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow as tf
from rows import append

import rl_sparsity_tf as rls
from rl_sparsity_tf.data.batches import TrainingData, evaluation_data, training_data
from rl_sparsity_tf.data.datasets import Data, load_dataset
from rl_sparsity_tf.data.metrics import Evaluator, Metric
from rl_sparsity_tf.layers.plan import CompressionPlan
from rl_sparsity_tf.layers.rules import uniform_plan
from rl_sparsity_tf.training.mask_training import finetune

import tf_keras as keras  # isort: skip  (after the package, which asks for Keras 2)

MASKS = ("fixed", "straight_through", "hard_concrete")
ALLOCATIONS = ("uniform", "lamp")
ACCURACY = Metric("accuracy", True)


def dense_network(data: Data, seed: int, epochs: int, batch_size: int) -> keras.Model:
    """LeNet-300-100, trained with Adam and a rate that falls to 0."""
    keras.utils.set_random_seed(seed)
    model = keras.Sequential(
        [
            keras.layers.Input(data.input_shape),
            keras.layers.Flatten(),
            keras.layers.Dense(300, activation="relu"),
            keras.layers.Dense(100, activation="relu"),
            keras.layers.Dense(data.num_classes),
        ]
    )
    steps = epochs * math.ceil(len(data.x_train) / batch_size)
    model.compile(
        keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(1e-3, steps)),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    model.fit(data.x_train, data.y_train, batch_size=batch_size, epochs=epochs, verbose=0)
    return model


def run(
    model: keras.Model,
    plan: CompressionPlan,
    train: TrainingData,
    validation: Any,
    test: Any,
    mask: str,
    share: float,
    epochs: int,
    seed: int,
) -> dict[str, float]:
    """Fine-tunes one pruned network."""
    tf.random.set_seed(seed)
    if mask == "fixed":
        wrapped = rls.wrap(model, plan)
    else:
        wrapped = rls.wrap(model, plan, mask=mask, train_masks=True)
    started = time.monotonic()
    score = finetune(
        wrapped, train, validation, ACCURACY, epochs=epochs, teacher=model, distillation=share
    )
    seconds = time.monotonic() - started
    return {
        "validation": score.metric,
        "test": Evaluator(wrapped, ACCURACY)(test).metric,
        "seconds": seconds,
    }


def main() -> None:
    """Runs all cells, printing rows as they finish."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="fashion_mnist")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=3, help="of fine-tuning")
    parser.add_argument("--dense-epochs", type=int, default=8)
    parser.add_argument("--sparsity", type=float, default=0.97)
    parser.add_argument("--distillation", type=float, default=0.5)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--csv", type=Path, help="file to append rows to")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    dense: list[float] = []
    for seed in range(options.seeds):
        data = load_dataset(options.dataset, seed=seed)
        model = dense_network(data, seed, options.dense_epochs, options.batch_size)
        train = training_data(
            (data.x_train, data.y_train), model, batch_size=options.batch_size, seed=seed
        )
        validation = evaluation_data((data.x_validation, data.y_validation), model, "validation")
        test = evaluation_data((data.x_test, data.y_test), model, "test")
        dense.append(Evaluator(model, ACCURACY)(test).metric)
        for allocation in ALLOCATIONS:
            if allocation == "uniform":
                plan = uniform_plan(model, options.sparsity)
            else:
                plan = rls.baselines.lamp(model, sparsity=options.sparsity)
            for mask in MASKS:
                for share in (0.0, options.distillation):
                    row: dict[str, Any] = {
                        "allocation": allocation,
                        "mask": mask,
                        "distillation": share,
                        "seed": seed,
                    }
                    row |= run(
                        model, plan, train, validation, test, mask, share, options.epochs, seed
                    )
                    rows.append(row)
                    print(row, file=sys.stderr, flush=True)
                    if options.csv:
                        append(options.csv, row)
    report(rows, dense, options.distillation)


def report(rows: list[dict[str, Any]], dense: list[float], distillation: float) -> None:
    print(f"Dense: {np.mean(dense):.4f} ({min(dense):.4f} to {max(dense):.4f}) on test data.\n")
    print("| allocation | mask | distillation | test accuracy | validation accuracy | time |")
    print("|---|---|---|---|---|---|")

    def values(field: str, *cell: Any) -> np.ndarray:
        keys = ("allocation", "mask", "distillation")
        return np.array([row[field] for row in rows if tuple(row[k] for k in keys) == cell])

    for allocation in ALLOCATIONS:
        base = values("seconds", allocation, "fixed", 0.0)
        for mask in MASKS:
            for share in (0.0, distillation):
                cell = (allocation, mask, share)
                texts = [
                    f"{found.mean():.4f} ({found.min():.4f} to {found.max():.4f})"
                    for found in (values("test", *cell), values("validation", *cell))
                ]
                ratio = np.median(values("seconds", *cell) / base)
                name = mask.replace("_", " ")
                print(f"| {allocation} | {name} | {share:g} | {' | '.join(texts)} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
