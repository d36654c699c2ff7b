"""Do the agents beat searches that learn nothing, at equal evaluations?

The best reward so far against the number of distinct plans evaluated, for DQN and PPO, with and
without the demonstrations of heuristics and the hierarchy (and DQN under a curriculum, or without
Shuffle or Quantize among its operations), and where an episode is a move from the best plan
("moves": by DQN, PPO, chance, or a bandit that learns which kinds of moves succeed), beside random
densities, hill climbing from LAMP's plan, the plans of least layer error and hill climbing from the
best of those, all on the same network, validation rows, recovery (least squares) and reward.

    python benchmarks/curves.py --networks lenet-300-100 lenet-5 --seeds 3

Every run is a row of the CSV file as soon as it is finished, and is not run again. Prints a table
of the best reward after given numbers of evaluations, mean and range over the seeds, and with
--plot draws the curves.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow as tf
from networks import train
from rows import append

import rl_sparsity_tf as rls
from rl_sparsity_tf.agents.configs import AgentConfig
from rl_sparsity_tf.allocation.dynamic_programming import propose_all
from rl_sparsity_tf.console import SearchProgress
from rl_sparsity_tf.data.batches import evaluation_data, sample_rows, training_data
from rl_sparsity_tf.data.datasets import Data, load_dataset
from rl_sparsity_tf.environment.improvement_environment import opened
from rl_sparsity_tf.environment.layer_environment import LayerEnvironment
from rl_sparsity_tf.environment.moves import MOVES, SLOTS
from rl_sparsity_tf.environment.network import CompressedNetwork, evaluate_plan
from rl_sparsity_tf.environment.reranking import SCHEDULE
from rl_sparsity_tf.environment.reward import Reward, bounded
from rl_sparsity_tf.search.episodes import LoopSettings
from rl_sparsity_tf.search.loop import SearchLoop
from rl_sparsity_tf.search.plan_search import climb, search_randomly

import tf_keras as keras  # isort: skip

SEARCHES: dict[str, tuple[AgentConfig, dict[str, Any]]] = {
    "dqn": (rls.DQN(), {"warm_start": False}),
    "ppo": (rls.PPO(), {"warm_start": False}),
    "random policy": (rls.Random(), {"warm_start": False}),
    "dqn, warm": (rls.DQN(), {"warm_start": True}),
    "ppo, warm": (rls.PPO(), {"warm_start": True}),
    "dqn, hierarchy": (rls.DQN(), {"warm_start": False, "hierarchy": True}),
    "ppo, hierarchy": (rls.PPO(), {"warm_start": False, "hierarchy": True}),
    "dqn, hierarchy, warm": (rls.DQN(), {"warm_start": True, "hierarchy": True}),
    "ppo, hierarchy, warm": (rls.PPO(), {"warm_start": True, "hierarchy": True}),
    "dqn, linear curriculum": (rls.DQN(), {"warm_start": False, "curriculum": rls.Linear()}),
    "dqn, staged curriculum": (rls.DQN(), {"warm_start": False, "curriculum": rls.Staged()}),
    "dqn, moves": (rls.DQN(), {"warm_start": True, "strategy": "improve"}),
    "ppo, moves": (rls.PPO(), {"warm_start": True, "strategy": "improve"}),
    "random moves": (rls.Random(), {"warm_start": True, "strategy": "improve"}),
    "dqn without Shuffle": (rls.DQN(), {"warm_start": False}),
    "dqn without Quantize": (rls.DQN(), {"warm_start": False}),
}
WITHOUT = {
    "dqn without Shuffle": rls.Operation.SHUFFLE,
    "dqn without Quantize": rls.Operation.QUANTIZE,
}
OTHERS = (
    *("random densities", "hill climbing", "least layer error", "hill climbing from that"),
    "bandit moves",
)


def network_of(options: argparse.Namespace, name: str, seed: int, data: Data) -> CompressedNetwork:
    """The network that is searched, trained with the seed or read from beside the results."""
    cache = options.results.parent / f"{options.results.stem}-{name}-{seed}.keras"
    if not cache.exists():
        train(name, data, seed=seed, epochs=options.epochs).save(cache)
    model = keras.models.load_model(cache)
    budget = rls.Target(sparsity=options.sparsity)
    if options.bytes:
        budget = rls.Target(tflite_bytes=options.bytes)
    validation = evaluation_data((data.x_validation, data.y_validation), model, "validation")
    return CompressedNetwork(
        model,
        training_data((data.x_train, data.y_train), model, batch_size=128, seed=seed),
        sample_rows(validation, 2000, seed=seed),
        target=budget,
        recovery=rls.Recovery(method="least_squares"),
        seed=seed,
    )


def curve(network: CompressedNetwork, name: str, evaluations: int, seed: int) -> list[float]:
    """The best value after every evaluation of one search."""
    reward = Reward()
    network.reset()
    network.seen.clear()
    tf.random.set_seed(seed)
    if name == "random densities":
        return search_randomly(network, reward, evaluations, seed=seed).history
    if name == "hill climbing":
        return climb(network, reward, evaluations, seed=seed).history
    if name in OTHERS:
        plans = propose_all(network, (1.0, 0.5, 0.25))
        values = [bounded(reward, evaluate_plan(network, plan), None) for plan in plans]
        best = list(np.maximum.accumulate(values))
        if name == "least layer error":
            return best
        left, start = evaluations - len(best), plans[int(np.argmax(values))]
        if name == "bandit moves":
            return [*best, *by_bandit(network, start, left, seed)]
        climbed = climb(network, reward, left, seed=seed, start=start).history
        return [*best, *np.maximum(climbed, best[-1])]
    agent, flags = SEARCHES[name]
    settings = LoopSettings(
        agent=agent,
        reward=reward,
        buckets=8,
        seed=seed,
        **flags,
    )
    loop = _Recorded(settings, network)
    with forbidden(WITHOUT.get(name)):
        loop.run(evaluations, SearchProgress(evaluations, "loss", 0))
    if name in WITHOUT or name == "dqn":
        assert loop.best is not None
        done = {str(key): count for key, count in loop.best.plan.count_operations().items()}
        print(name, seed, f"accuracy {loop.best.outcome.metric:.4f}", done, file=sys.stderr)
    return loop.best_after[:evaluations]


def by_bandit(
    network: CompressedNetwork, start: rls.CompressionPlan, moves: int, seed: int
) -> list[float]:
    """The best value after every move; its kind is drawn by what kinds have improved so far.

    Thompson sampling of how often a kind of move succeeds; chance decides of which kernel it is.
    All kernels are ranked first, as the other searches do.
    """
    rng = np.random.default_rng([seed, 7])
    env = rls.ImprovementEnvironment(network, start=start, moves=moves)
    of_action = ["all"] * len(MOVES) + [move.kind for move in MOVES] * SLOTS
    kinds = {kind: [0.5, 0.5] for kind in of_action}
    time_step, found = env.reset(), []
    left = list(SCHEDULE)
    while not time_step.is_last():
        action = opened(left, time_step.observation["legal"])
        if action is None:
            legal = [int(one) for one in np.flatnonzero(time_step.observation["legal"])]
            drawn = {kind: rng.beta(*kinds[kind]) for kind in {of_action[one] for one in legal}}
            best = max(sorted(drawn), key=lambda kind: drawn[kind])
            action = int(rng.choice([one for one in legal if of_action[one] == best]))
        before = env.plan
        time_step = env.step(np.int32(action))
        kinds[of_action[action]][env.plan is before] += 1
        found.append(env.value)
    return found


@contextlib.contextmanager
def forbidden(operation: rls.Operation | None) -> Iterator[None]:
    """Takes an operation out of what agents may choose, where there is another."""
    legal = LayerEnvironment._legal

    def fewer(self: LayerEnvironment) -> np.ndarray:
        found = legal(self)
        if operation is not None and found.sum() > found[operation]:
            found[operation] = 0
        return found

    with mock.patch.object(LayerEnvironment, "_legal", fewer):
        yield


# The least that a plan can be worth.
_NO_PLAN = -1.0


class _Recorded(SearchLoop):
    """A search that notes the best value after every evaluation."""

    best_after: list[float]

    def _consider(self, value: float, episode: int, proposed_by: str) -> None:
        super()._consider(value, episode, proposed_by)
        if self._stage.share < 1.0:  # a plan for less than the target counts as none
            value = _NO_PLAN
        found = self.__dict__.setdefault("best_after", [])
        best = max([value, *found[-1:]])
        found.extend([best] * (self.evaluations - len(found)))


def main() -> None:
    """Runs what is missing, and prints the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dataset", default="fashion_mnist")
    parser.add_argument("--networks", nargs="+", default=["lenet-300-100", "lenet-5"])
    parser.add_argument("--searches", nargs="+", choices=[*SEARCHES, *OTHERS])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--rows", type=int, default=20_000, help="training rows")
    parser.add_argument("--epochs", type=int, default=8, help="of the dense networks")
    goal = parser.add_mutually_exclusive_group()
    goal.add_argument("--sparsity", type=float, default=0.97)
    goal.add_argument("--bytes", type=int, help="a target in bytes in place of the sparsity")
    parser.add_argument("--evaluations", type=int, default=64)
    parser.add_argument("--results", type=Path, default=Path("curves.csv"))
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    searches = options.searches or [*SEARCHES, *OTHERS]
    rows = read(options.results)
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        for name in options.networks:
            missing = [s for s in searches if (name, goal_of(options), str(seed), s) not in rows]
            if not missing:
                continue
            data = load_dataset(options.dataset, limit=options.rows, seed=seed)
            network = network_of(options, name, seed, data)
            for search in missing:
                started = time.monotonic()
                values = curve(network, search, options.evaluations, seed)
                row = {
                    "network": name,
                    "goal": goal_of(options),
                    "seed": seed,
                    "search": search,
                    "seconds": f"{time.monotonic() - started:.1f}",
                    "values": json.dumps([round(value, 5) for value in values]),
                }
                append(options.results, row)
                rows[name, goal_of(options), str(seed), search] = values
                print(name, seed, search, row["seconds"], values[-1], file=sys.stderr, flush=True)
    report(options, rows)
    if options.plot is not None:
        draw(options, rows)


def goal_of(options: argparse.Namespace) -> str:
    """The target, as rows name it."""
    return f"{options.bytes} bytes" if options.bytes else f"{options.sparsity:.0%} zeros"


# Of the values drawn, below the best.
_SHOWN = 0.1

Rows = dict[tuple[str, str, str, str], list[float]]


def read(path: Path) -> Rows:
    """The curves that are there, by network, goal, seed and search."""
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        return {
            (r["network"], r["goal"], r["seed"], r["search"]): json.loads(r["values"])
            for r in csv.DictReader(file)
        }


def found(rows: Rows, network: str, goal: str, search: str) -> list[list[float]]:
    """The curves of one search over the seeds."""
    return [v for (n, g, _, s), v in rows.items() if (n, g, s) == (network, goal, search)]


def report(options: argparse.Namespace, rows: Rows) -> None:
    """Prints a table per network: the best reward after so many evaluations."""
    counts = [n for n in (8, 16, 32, 64, 128, 256) if n <= options.evaluations]
    for network in options.networks:
        print(f"\n{network}, {goal_of(options)}: best reward after so many evaluated plans\n")
        print("| search | " + " | ".join(map(str, counts)) + " |")
        print("|---|" + "---|" * len(counts))
        for search in [*SEARCHES, *OTHERS]:
            curves = found(rows, network, goal_of(options), search)
            if not curves:
                continue
            cells = []
            for count in counts:
                values = [one[min(count, len(one)) - 1] for one in curves]
                spread = f"{np.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"
                cells.append("-" if min(values) == _NO_PLAN else spread)
            print(f"| {search} | " + " | ".join(cells) + " |")


def draw(options: argparse.Namespace, rows: Rows) -> None:
    """Draws the mean curves, a panel per network."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        1, len(options.networks), figsize=(7 * len(options.networks), 5), squeeze=False
    )
    for network, panel in zip(options.networks, panels[0], strict=True):
        names, best = [*SEARCHES, *OTHERS], _NO_PLAN
        for search, colour in zip(names, pyplot.cm.tab20(range(len(names))), strict=True):
            curves = found(rows, network, goal_of(options), search)
            if not curves:
                continue
            length = max(map(len, curves))
            full = [[*one, *[one[-1]] * (length - len(one))] for one in curves]
            style = "--" if search in OTHERS or search == "random policy" else "-"
            means = np.mean(full, axis=0)
            best = max(best, float(means[-1]))
            panel.plot(range(1, length + 1), means, style, label=search, color=colour)
        panel.set(title=f"{network}, {goal_of(options)}", xlabel="plans evaluated")
        panel.set_ylabel("best reward so far, mean over seeds")
        panel.set_ylim(best - _SHOWN, best + _SHOWN / 20)  # where they can be told apart
        panel.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(options.plot, dpi=120)


if __name__ == "__main__":
    main()
