"""Does a policy transfer? Learned on small networks, it decides for one it has never seen.

For every seed an agent plays episodes on three digits networks in turn, at two sparsities. Its
policy then compresses another network in one pass, without a search (zero-shot), against LAMP,
dynamic programming, and random plans; and it begins a search of that network, against one that
begins with nothing (both without the heuristics' demonstrations). The value is the reward of a plan
that was recovered by least squares and evaluated on validation data, as in the search.

    python benchmarks/transfer.py --agent dqn --seeds 3 --rounds 60 --episodes 40

With `--save policy.npz` the first seed's policy is written, for `Compressor(policy=...)`.
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

import rl_sparsity_tf as rls
from rl_sparsity_tf.agents import Agent, build_agent
from rl_sparsity_tf.data import evaluation_data, training_data
from rl_sparsity_tf.datasets import Data, load_dataset
from rl_sparsity_tf.demo import base_network, train_base
from rl_sparsity_tf.demonstrations import Demonstration, heuristic_plan, proposals
from rl_sparsity_tf.dynamic_programming import propose_all
from rl_sparsity_tf.environment import LayerEnvironment
from rl_sparsity_tf.network import CompressedNetwork
from rl_sparsity_tf.plan_evaluation import evaluate_plan
from rl_sparsity_tf.plan_search import search_randomly
from rl_sparsity_tf.policies import StoredPolicy, play
from rl_sparsity_tf.progress import SearchProgress
from rl_sparsity_tf.reward import Reward, bounded
from rl_sparsity_tf.search_loop import LoopSettings, SearchLoop

import tf_keras as keras  # isort: skip

# Hidden layers: widths of dense ones, or channels of convolutions before a dense one.
LEARNED_ON = {"mlp": (48,), "deep mlp": (96, 48, 32), "cnn": ("conv", 8, 16)}
SPARSITIES = (0.9, 0.97)
POWERS = (1.0, 0.5, 0.25)
MARKS = (1, 10, 20, 40)
BUCKETS, BATCH, RANDOM_PLANS = 8, 64, 40


def small_network(hidden: tuple[Any, ...], data: Data, seed: int) -> keras.Model:
    """An untrained network that is learned on."""
    layers = keras.layers
    keras.utils.set_random_seed(seed)
    stack = [layers.Input(data.input_shape)]
    if hidden[0] == "conv":
        for channels in hidden[1:]:
            stack += [layers.Conv2D(channels, 3, activation="relu"), layers.MaxPooling2D(2)]
        stack += [layers.Flatten()]
    else:
        stack += [layers.Flatten(), *(layers.Dense(n, activation="relu") for n in hidden)]
    model = keras.Sequential([*stack, layers.Dense(data.num_classes)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(2e-3), loss, metrics=["accuracy"])
    return model


def network_of(model: keras.Model, data: Data, sparsity: float, seed: int) -> CompressedNetwork:
    validation = (data.x_validation[:2000], data.y_validation[:2000])
    return CompressedNetwork(
        model,
        training_data((data.x_train, data.y_train), model, batch_size=BATCH, seed=seed),
        evaluation_data(validation, model, "validation_data"),
        target=rls.Target(sparsity=sparsity),
        seed=seed,
    )


def environments_of(network: CompressedNetwork) -> list[LayerEnvironment]:
    last = network.kernels[-1]
    return [
        LayerEnvironment(network, kernel.path, buckets=BUCKETS, evaluate=kernel is last)
        for kernel in network.kernels
    ]


def episode(
    agent: Agent,
    network: CompressedNetwork,
    environments: list[LayerEnvironment],
    shown: Demonstration | None,
) -> float:
    """One pass that the agent learns from, as the search plays it."""
    network.reset()
    for environment in environments:
        environment.commit()
        time_step = environment.reset()
        while not time_step.is_last():
            forced = None if shown is None else shown.action(environment, time_step)
            time_step = environment.step(np.int32(agent.step(time_step, action=forced)))
            agent.observe(time_step)
    value = bounded(Reward(), network.outcome, None)
    agent.end_episode(worth=value)
    return value


def learn(kind: str, data: Data, seed: int, rounds: int) -> StoredPolicy:
    """A policy of episodes on all small networks in turn; demonstrations are shown first."""
    schools = []
    for number, hidden in enumerate(LEARNED_ON.values()):
        model = small_network(hidden, data, seed + number)
        train_base(model, data, BATCH)
        for sparsity in SPARSITIES:
            network = network_of(model, data, sparsity, seed)
            shown = [Demonstration.of(name, plan) for name, plan in proposals(network)]
            shown += [Demonstration.of("dp", plan) for plan in propose_all(network, POWERS)]
            schools.append((network, environments_of(network), shown))
    config = {
        # Explores as long as a search of so many episodes would in proportion.
        "dqn": rls.DQN(epsilon_episodes=max(1, rounds * len(schools) // 2)),
        "ppo": rls.PPO(learning_rate=1e-3),
    }[kind]
    first = schools[0][1][0]
    agent = build_agent(config, first.time_step_spec(), first.action_spec(), seed=seed)
    for number in range(rounds):
        values = [
            episode(agent, network, environments, shown[number] if number < len(shown) else None)
            for network, environments, shown in schools
        ]
        if number % 10 == 9:
            print(f"  round {number + 1}: {np.mean(values):.4f}", file=sys.stderr, flush=True)
    policy = StoredPolicy.of(agent)
    assert policy is not None
    return policy


def zero_shot(policy: StoredPolicy, network: CompressedNetwork, seed: int) -> dict[str, float]:
    """Values of plans that need no search, and of the best of many random ones."""
    environments = environments_of(network)
    first = environments[0]
    agent = build_agent(policy.agent, first.time_step_spec(), first.action_spec(), seed=seed)

    def played() -> float:
        play(agent, environments, network)
        return bounded(Reward(), network.outcome, None)

    def of(plan: rls.CompressionPlan) -> float:
        return bounded(Reward(), evaluate_plan(network, plan), None)

    untrained = played()
    policy.put_into(agent)
    ours = played()
    dynamic = [of(plan) for plan in propose_all(network, POWERS)]
    each = [
        search_randomly(network, Reward(), 1, seed=number).value for number in range(RANDOM_PLANS)
    ]
    return {
        "policy, one pass": ours,
        "untrained policy, one pass": untrained,
        "LAMP": of(heuristic_plan(network, "lamp")),
        "dynamic programming (one plan)": dynamic[1],
        "dynamic programming (best of 3)": max(dynamic),
        "random plan (mean)": float(np.mean(each)),
        f"random plans (best of {RANDOM_PLANS})": max(each),
    }


def head_start(
    policy: StoredPolicy | None,
    config: rls.DQN | rls.PPO,
    network: CompressedNetwork,
    seed: int,
    episodes: int,
) -> dict[str, float]:
    """The best value after some episodes of a search."""
    network.reset()
    network.seen.clear()
    reward = Reward()
    settings = LoopSettings(
        agent=config, reward=reward, buckets=BUCKETS, seed=seed, warm_start=False
    )
    loop = SearchLoop(settings, network)
    best = -1.0
    if policy is not None:
        policy.begin(loop, network, reward, seed)
        assert loop.best is not None
        best = loop.best.value
    loop.run(episodes, SearchProgress(episodes, network.metric.name, 0))
    values = np.maximum.accumulate([best, *(entry["reward"] for entry in loop.history)])
    found = {f"after {mark}": float(values[mark]) for mark in MARKS if mark <= episodes}
    return {**found, "plans evaluated": float(loop.evaluations)}


def table(title: str, rows: list[dict[str, float]]) -> None:
    print(f"\n| {title} | mean | per seed |\n|---|---|---|")
    for name in rows[0]:
        values = [row[name] for row in rows]
        each = ", ".join(f"{value:.4f}" for value in values)
        print(f"| {name} | {np.mean(values):.4f} | {each} |")


def main() -> None:
    """Runs all seeds, printing rows as they finish."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--agent", default="dqn", choices=("dqn", "ppo"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=60, help="episodes on every small network")
    parser.add_argument("--episodes", type=int, default=40, help="of the searches of the new one")
    parser.add_argument("--sparsity", type=float, default=0.95, help="of the new network")
    parser.add_argument("--save", type=Path, help="where to write the first seed's policy")
    options = parser.parse_args()
    shots, cold, warm = [], [], []
    for seed in range(options.seeds):
        started = time.monotonic()
        data = load_dataset("digits", seed=seed)
        policy = learn(options.agent, data, seed, options.rounds)
        learned = time.monotonic() - started
        if options.save and seed == 0:
            policy.save(options.save, overwrite=True)
        model = base_network(data.input_shape, data.num_classes, seed)
        train_base(model, data, BATCH)
        network = network_of(model, data, options.sparsity, seed)
        shots.append(zero_shot(policy, network, seed))
        print(seed, shots[-1], file=sys.stderr, flush=True)
        plain = rls.DQN() if options.agent == "dqn" else rls.PPO()
        cold.append(head_start(None, plain, network, seed, options.episodes))
        warm.append(head_start(policy, plain, network, seed, options.episodes))
        print(
            seed, cold[-1], warm[-1], f"learning took {learned:.0f} s", file=sys.stderr, flush=True
        )
    table("value of a plan", shots)
    table("best value, begun with nothing", cold)
    table("best value, begun with the policy", warm)


if __name__ == "__main__":
    main()
