"""Does the gradient through the masks help PPO? The same searches with and without it.

Every row searches the demo's network with the same data, seed and number of episodes, without
demonstrations and without the final fine-tuning: the value is the reward of a plan, which is what
both maximise. `weight` is `PPO(relaxed_reward=)`; 0 is plain PPO. Prints one row per seed and
weight, and the means as a Markdown table; seconds are given as a ratio to plain PPO's.

    python benchmarks/policy_gradient.py --dataset digits --seeds 3 --episodes 30
"""

from __future__ import annotations

import argparse
import os
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np

import rl_sparsity_tf as rls
from rl_sparsity_tf.agents.configs import build_agent
from rl_sparsity_tf.agents.relaxation import Relaxation
from rl_sparsity_tf.data.batches import evaluation_data, training_data
from rl_sparsity_tf.data.datasets import load_dataset
from rl_sparsity_tf.demo import base_network, train_base
from rl_sparsity_tf.environment.layer_environment import LayerEnvironment
from rl_sparsity_tf.environment.network import CompressedNetwork
from rl_sparsity_tf.environment.reward import Reward, bounded
from rl_sparsity_tf.training.recovery import Recovery


def network_for(dataset: str, seed: int, sparsity: float, recovery: str) -> CompressedNetwork:
    """The demo's network, trained and ready to be compressed."""
    data = load_dataset(dataset, seed=seed)
    model = base_network(data.input_shape, data.num_classes, seed)
    batch_size = 64 if len(data.x_train) < 10_000 else 128
    train_base(model, data, batch_size)
    validation = (data.x_validation[:2000], data.y_validation[:2000])
    return CompressedNetwork(
        model,
        training_data((data.x_train, data.y_train), model, batch_size=batch_size, seed=seed),
        evaluation_data(validation, model, "validation_data"),
        target=rls.Target(sparsity=sparsity),
        recovery=Recovery(method=recovery),
        seed=seed,
    )


def search(
    network: CompressedNetwork, weight: float, seed: int, episodes: int
) -> dict[str, float | int]:
    """Episodes as the search plays them; the figures of the row."""
    network.reset()
    network.seen.clear()
    reward = Reward()
    environments = [LayerEnvironment(network, kernel.path) for kernel in network.kernels]
    first = environments[0]
    config = rls.PPO(relaxed_reward=weight)
    agent = build_agent(config, first.time_step_spec(), first.action_spec(), seed=seed)
    started = time.monotonic()
    relaxation = Relaxation(network, reward=reward, seed=seed) if weight else None
    if relaxation is not None:
        agent.attach(relaxation)  # type: ignore[attr-defined]
    values, relaxed = [], []
    for _ in range(episodes):
        network.reset()
        decisions = []
        for environment in environments:
            environment.commit()
            time_step = environment.reset()
            while not time_step.is_last():
                before = network.decided[environment.kernel].copy()
                time_step = environment.step(np.int32(agent.step(time_step)))
                agent.observe(time_step)
                groups = np.flatnonzero(network.decided[environment.kernel] & ~before)
                decisions.append((environment.kernel, groups))
        values.append(bounded(reward, network.outcome, None))
        if relaxation is not None:
            relaxation.follow(decisions)
        relaxed.append(agent.end_episode(bonus=values[-1]).get("relaxed_loss", float("nan")))
    third = max(1, episodes // 3)
    return {
        "weight": weight,
        "seed": seed,
        "best": max(values),
        "first_third": float(np.mean(values[:third])),
        "last_third": float(np.mean(values[-third:])),
        "relaxed_first": float(np.mean(relaxed[:third])),
        "relaxed_last": float(np.mean(relaxed[-third:])),
        "evaluations": network.evaluations,
        "seconds": time.monotonic() - started,
    }


def main() -> None:
    """Runs all cells, printing rows as they finish."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--episodes", type=int, default=30)
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--recovery", default="finetune", choices=("finetune", "none"))
    parser.add_argument("--weights", type=float, nargs="+", default=[0.0, 0.3, 1.0])
    options = parser.parse_args()
    rows = []
    for seed in range(options.seeds):
        network = network_for(options.dataset, seed, options.sparsity, options.recovery)
        for weight in options.weights:
            rows.append(search(network, weight, seed, options.episodes))
            print(rows[-1], file=sys.stderr, flush=True)
    plain = [row["seconds"] for row in rows if row["weight"] == options.weights[0]]
    print(
        "| relaxed_reward | value of the best plan | mean value, first third | mean value, last "
        "third | plans evaluated | seconds, ratio |\n|---|---|---|---|---|---|"
    )
    for weight in options.weights:
        mine = [row for row in rows if row["weight"] == weight]

        def over(field: str, digits: int, mine: list[dict[str, float | int]] = mine) -> str:
            values = [row[field] for row in mine]
            spread = f" ({min(values):.{digits}f} to {max(values):.{digits}f})"
            return f"{np.mean(values):.{digits}f}{spread}"

        ratio = sum(row["seconds"] for row in mine) / sum(plain)
        print(
            f"| {weight} | {over('best', 3)} | {over('first_third', 3)} | {over('last_third', 3)} "
            f"| {over('evaluations', 0)} | {ratio:.2f} |"
        )


if __name__ == "__main__":
    main()
