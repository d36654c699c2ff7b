"""Do the agents learn? A real network whose plans can all be evaluated.

A network of two dense layers on handwritten digits, four buckets each: every sequence of
operations is played, recovered by least squares and evaluated, so that the best plan is known. Then
every agent searches, without demonstrations, until it evaluates that plan. Random decisions that
never repeat a plan need half of all plans on average.

    python benchmarks/learning.py --seeds 20

Prints, as a Markdown table, how many distinct plans each agent evaluated until then: in how many
seeds at most half of all, the median, and the range.
"""

from __future__ import annotations

import argparse
import os
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow as tf

import rl_sparsity_tf as rls
from rl_sparsity_tf.agents.configs import AgentConfig
from rl_sparsity_tf.data.batches import evaluation_data, training_data
from rl_sparsity_tf.data.datasets import load_digits_data
from rl_sparsity_tf.environment.network import CompressedNetwork
from rl_sparsity_tf.environment.reward import Reward, bounded
from rl_sparsity_tf.search.episodes import Episodes, LoopSettings

import tf_keras as keras  # isort: skip

AGENTS: dict[str, AgentConfig] = {"dqn": rls.DQN(), "ppo": rls.PPO(), "random": rls.Random()}
_REWARD = Reward()


def small_network(seed: int, sparsity: float, hidden: int) -> CompressedNetwork:
    """A trained network of two dense layers."""
    data = load_digits_data(seed=seed)
    keras.utils.set_random_seed(seed)
    model = keras.Sequential(
        [
            keras.layers.Input((8, 8, 1)),
            keras.layers.Flatten(),
            keras.layers.Dense(hidden, activation="relu", name="hidden"),
            keras.layers.Dense(10, activation="softmax", name="classes"),
        ]
    )
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    model.fit(data.x_train, data.y_train, epochs=30, verbose=0)
    return CompressedNetwork(
        model,
        training_data((data.x_train, data.y_train), model, batch_size=128, seed=seed),
        evaluation_data((data.x_validation, data.y_validation), model, "validation"),
        target=rls.Target(sparsity=sparsity),
        recovery=rls.Recovery(method="least_squares"),
        seed=seed,
    )


def episodes(network: CompressedNetwork, agent: AgentConfig, buckets: int, seed: int) -> Episodes:
    """Search episodes from the beginning."""
    network.reset()
    network.seen.clear()
    settings = LoopSettings(
        agent=agent, reward=_REWARD, buckets=buckets, seed=seed, warm_start=False
    )
    return Episodes(settings, network)


def all_values(network: CompressedNetwork, buckets: int) -> list[float]:
    """The value of every plan, by playing every sequence of decisions."""
    played = episodes(network, rls.Random(), buckets, 0)
    values: list[float] = []
    while not played.tree.exhausted:
        known = network.evaluations
        played.play()
        played.agent.discard_episode()
        if network.evaluations > known:
            values.append(bounded(_REWARD, network.outcome, None))
    return values


def evaluations_to(
    network: CompressedNetwork, agent: AgentConfig, buckets: int, seed: int, best: float
) -> int:
    """Distinct plans that an agent evaluates until one has the best value."""
    played = episodes(network, agent, buckets, seed)
    while not played.tree.exhausted:
        words = np.random.SeedSequence([seed, network.evaluations]).generate_state(1)
        tf.random.set_seed(int(words[0]))
        played.play()
        value = bounded(_REWARD, network.outcome, None)
        if value >= best:
            return network.evaluations
        played.learn(value)
    raise AssertionError("every plan was evaluated, but the best was not among them")


def main() -> None:
    """Plays every plan, then lets the agents search."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--first-seed", type=int, default=0, help="of the agents")
    parser.add_argument("--network-seed", type=int, default=0)
    parser.add_argument("--agents", nargs="+", choices=AGENTS, default=list(AGENTS))
    parser.add_argument("--buckets", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=24)
    parser.add_argument("--sparsity", type=float, default=0.5)
    options = parser.parse_args()
    network = small_network(options.network_seed, options.sparsity, options.hidden)
    values = all_values(network, options.buckets)
    best, half = max(values), len(values) / 2
    print(
        f"{len(values)} plans; values {min(values):.3f} to {best:.3f}, median "
        f"{np.median(values):.3f}\n"
    )
    print("| agent | within half of the plans | median | least | most |")
    print("|---|---|---|---|---|")
    for name in options.agents:
        counts = []
        for seed in range(options.first_seed, options.first_seed + options.seeds):
            started = time.monotonic()
            counts.append(evaluations_to(network, AGENTS[name], options.buckets, seed, best))
            print(
                f"{name}, seed {seed}: {counts[-1]} ({time.monotonic() - started:.0f} s)",
                file=sys.stderr,
                flush=True,
            )
        within = sum(count <= half for count in counts)
        print(
            f"| {name} | {within} of {len(counts)} | {np.median(counts):.0f} | {min(counts)} | "
            f"{max(counts)} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
