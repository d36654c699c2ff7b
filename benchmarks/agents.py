"""Do the agents find better plans than chance? DQN, PPO and a random policy, equal evaluations.

Every agent searches the demo's network on the same data with the same budget of episodes, without
demonstrations, then its best plan is fine-tuned and exported. Prints one row per seed and agent
and the mean over the seeds, as a Markdown table. The validation value is the reward of the best
plan found, which is what the agents maximise; the test figures are of the .tflite file itself.

    python benchmarks/agents.py --dataset digits --seeds 3 --episodes 20
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np

import rl_sparsity_tf as rls
from rl_sparsity_tf.datasets import load_dataset
from rl_sparsity_tf.demo import base_network, search_data, train_base

FIELDS = (
    "agent",
    "seed",
    "value",
    "mean_value_last_5",
    "dense_accuracy",
    "tflite_accuracy",
    "tflite_bytes",
    "gzip_bytes",
    "evaluations",
    "seconds",
)


def run(
    dataset: str, agent: str, seed: int, episodes: int, sparsity: float, recovery: str | None
) -> dict[str, object]:
    """One search from a network trained with the same seed."""
    data = load_dataset(dataset, seed=seed)
    model = base_network(data.input_shape, data.num_classes, seed)
    batch_size = 64 if len(data.x_train) < 10_000 else 128
    train_base(model, data, batch_size)
    started = time.monotonic()
    compressor = rls.Compressor(
        model,
        rls.Target(sparsity=sparsity),
        agent=agent,
        seed=seed,
        warm_start=False,
        recovery=recovery,
    )
    result = compressor.search(
        **search_data(data), episodes=episodes, batch_size=batch_size, verbose=0
    )
    compressed = result.metrics["compressed"]
    return {
        "agent": agent,
        "seed": seed,
        "value": result.candidate.value,
        "mean_value_last_5": float(np.mean([entry["reward"] for entry in result.history[-5:]])),
        "dense_accuracy": result.metrics["dense"]["accuracy"],
        "tflite_accuracy": compressed["tflite_accuracy"],
        "tflite_bytes": compressed["tflite_bytes"],
        "gzip_bytes": compressed["gzip_bytes"],
        "evaluations": result.metrics["search"]["evaluations"],
        "seconds": time.monotonic() - started,
    }


def main() -> None:
    """Runs all cells, printing rows as they finish."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--episodes", type=int, default=20)
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--recovery", choices=("least_squares", "finetune", "none"))
    parser.add_argument("--csv", type=Path, help="file to append rows to")
    options = parser.parse_args()
    rows: list[dict[str, object]] = []
    for seed in range(options.seeds):
        for agent in ("dqn", "ppo", "random"):
            row = run(
                options.dataset,
                agent,
                seed,
                options.episodes,
                options.sparsity,
                options.recovery,
            )
            rows.append(row)
            print(row, file=sys.stderr, flush=True)
            if options.csv:
                new = not options.csv.exists()
                with open(options.csv, "a", newline="") as file:
                    writer = csv.DictWriter(file, FIELDS)
                    if new:
                        writer.writeheader()
                    writer.writerow(row)
    print(
        "| agent | value of the best plan | mean value, last 5 episodes | .tflite accuracy (dense) "
        "| bytes | gzip bytes | plans evaluated |\n|---|---|---|---|---|---|---|"
    )
    for agent in ("dqn", "ppo", "random"):
        mine = [row for row in rows if row["agent"] == agent]

        def over(field: str, digits: int, mine: list[dict[str, object]] = mine) -> str:
            values = [float(row[field]) for row in mine]  # type: ignore[arg-type]
            spread = f" ({min(values):.{digits}f} to {max(values):.{digits}f})"
            return f"{np.mean(values):.{digits}f}{spread}"

        dense = np.mean([float(row["dense_accuracy"]) for row in mine])  # type: ignore[arg-type]
        print(
            f"| {agent} | {over('value', 3)} | {over('mean_value_last_5', 3)} "
            f"| {over('tflite_accuracy', 4)} ({dense:.4f}) | {over('tflite_bytes', 0)} "
            f"| {over('gzip_bytes', 0)} | {over('evaluations', 0)} |"
        )


if __name__ == "__main__":
    main()
