"""What is a policy worth on networks it has not seen? Without a search, and at the start of one.

`plans` compares the plan that a policy likes best (one pass, no search) with those of uniform
magnitude, LAMP, dynamic programming, the best of all heuristics, and LAMP's rule played in the
environment, on whose buckets the policy decides (the last two in either order of the weights, the
better plan being kept, as in a search): value (the search's reward) and validation
accuracy after least squares. `searches` begins a search with each policy and without one, and notes
the best value after so many distinct plans, those of the heuristics left out.

    python benchmarks/transfer.py plans --policy dqn=policy.npz --csv plans.csv
    python benchmarks/transfer.py searches --policy dqn=policy.npz --csv searches.csv

Rows that are in the file already are not measured again.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import networks
import numpy as np
from pretraining import by_rule
from random_networks import network_of
from rows import append

import rl_sparsity_tf as rls
from rl_sparsity_tf.agents.demonstrations import heuristic_plan, proposals
from rl_sparsity_tf.agents.policies import SavedPolicy
from rl_sparsity_tf.allocation.dynamic_programming import propose
from rl_sparsity_tf.console import SearchProgress
from rl_sparsity_tf.data.datasets import Data, load_dataset
from rl_sparsity_tf.environment.network import CompressedNetwork, evaluate_plan
from rl_sparsity_tf.search.episodes import Episodes, LoopSettings
from rl_sparsity_tf.search.loop import SearchLoop

import tf_keras as keras  # isort: skip

_EPOCHS = {"lenet-300-100": 4, "lenet-5": 4, "resnet-8": 3, "ds-cnn": 3}
_AFTER = (1, 5, 10, 20, 30)


def trained(name: str, data: Data, seed: int, folder: Path) -> keras.Model:
    """A trained network; its weights are kept in a folder."""
    path = folder / f"{name}-{data.name}-{seed}.weights.h5"
    if not path.exists():
        model = networks.train(name, data, seed=seed, epochs=_EPOCHS[name])
        model.save_weights(path)
    model = networks.build(name, data)
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    model.load_weights(path)
    return model


def episodes_of(network: CompressedNetwork, policy: SavedPolicy | None, buckets: int) -> Episodes:
    """Episodes with buckets around LAMP's densities."""
    agent = rls.Random() if policy is None else policy.agent
    settings = LoopSettings(
        agent=agent, reward=rls.Reward(), buckets=buckets, seed=0, warm_start=False, policy=policy
    )
    episodes = Episodes(settings, network)
    episodes.centre(heuristic_plan(network, "lamp"))
    return episodes


def plans(
    network: CompressedNetwork, policies: Mapping[str, SavedPolicy], buckets: int
) -> Iterator[dict[str, Any]]:
    """A row for every plan."""
    reward = rls.Reward()

    def row(method: str, started: float) -> dict[str, Any]:
        outcome = network.outcome
        return {
            "method": method,
            "value": reward(outcome, None),
            "accuracy": outcome.metric,
            "loss": outcome.loss,
            "dense_accuracy": outcome.dense_metric,
            "sparsity": outcome.sparsity,
            "seconds": time.monotonic() - started,
        }

    found = dict(proposals(network))
    best = None
    for name in ("uniform", "erk", "global_magnitude", "lamp", "first_order"):
        if name in found:
            started = time.monotonic()
            evaluate_plan(network, found[name])
            one = row(name, started)
            best = one if best is None or one["value"] > best["value"] else best
            if name in ("uniform", "lamp"):
                yield one
    started = time.monotonic()
    evaluate_plan(network, propose(network))
    one = row("dynamic_programming", started)
    yield one
    assert best is not None
    yield {**(one if one["value"] > best["value"] else best), "method": "best_heuristic"}
    for name, policy in {"rule": None, **policies}.items():
        started = time.monotonic()
        episodes = episodes_of(network, policy, buckets)
        played = []
        for by_magnitude in (False, True):  # as a search does
            episodes.order_by_magnitude(by_magnitude)
            if policy is None:
                play_rule(episodes)
            else:
                episodes.play_policy()
            played.append(row(name if policy is None else f"policy {name}", started))
        episodes.order_by_magnitude(False)
        yield max(played, key=lambda one: one["value"])


def play_rule(episodes: Episodes) -> None:
    """LAMP's rule in place of a policy."""
    episodes.network.reset()
    for environment in episodes.environments:
        environment.commit()
        time_step = environment.reset()
        while not time_step.is_last():
            time_step = environment.step(np.int32(by_rule(time_step)))


def searches(
    network: CompressedNetwork, policies: Mapping[str, SavedPolicy], episodes: int, seed: int
) -> Iterator[dict[str, Any]]:
    """A row for every search: the best value of the agent's own plans after some evaluations."""
    pairs: list[tuple[str, SavedPolicy | None, Any]] = [
        (f"{name} from {start}", policy if start == "policy" else None, policy.agent)
        for name, policy in policies.items()
        for start in ("nothing", "policy")
    ]
    for method, policy, agent in pairs:
        started = time.monotonic()
        network.reset()
        network.seen.clear()
        network.decisions.by_magnitude = False
        network.group_ranks.forget()
        settings = LoopSettings(
            agent=agent, reward=rls.Reward(), buckets=8, seed=seed, warm_start=True, policy=policy
        )
        loop = SearchLoop(settings, network)
        loop.run(episodes, SearchProgress(episodes, "accuracy", 0))
        values = [loop.episodes.reference] if policy is not None else []
        values += [e["reward"] for e in loop.history if e["proposed_by"] == agent.name]
        best = np.maximum.accumulate(values)
        heuristics = [e["reward"] for e in loop.history if e["proposed_by"] != agent.name]
        yield {
            "method": method,
            **{f"after_{n}": float(best[min(n, len(best)) - 1]) for n in _AFTER if n <= episodes},
            "returned": loop.best.value if loop.best else None,
            "proposed_by": loop.best.proposed_by if loop.best else None,
            "demonstrated": max(heuristics, default=float("nan")),
            "evaluations": loop.evaluations,
            "seconds": time.monotonic() - started,
        }


def table(rows: Sequence[Mapping[str, str]], columns: Sequence[str]) -> None:
    """Means over the seeds, and over all cells, as a Markdown table."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    cells = list(dict.fromkeys((row["network"], row["target"]) for row in rows))
    print(f"| network | sparsity | method | {' | '.join(columns)} | seeds |")
    print("|---" * (4 + len(columns)) + "|")
    for cell, method in itertools.product([*cells, ("all", "")], methods):
        mine = [
            row
            for row in rows
            if row["method"] == method and cell in (("all", ""), (row["network"], row["target"]))
        ]
        if not mine:
            continue
        shown = []
        for column in columns:
            values = [float(row[column]) for row in mine]
            spread = f" ± {np.std(values):.4f}" if cell[0] != "all" and len(values) > 1 else ""
            shown.append(f"{np.mean(values):.4f}{spread}")
        print(f"| {cell[0]} | {cell[1]} | {method} | {' | '.join(shown)} | {len(mine)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("plans", "searches"))
    parser.add_argument(
        "--policy", action="append", default=[], metavar="NAME=FILE", help="may be repeated"
    )
    parser.add_argument("--networks", default="lenet-300-100,lenet-5,resnet-8")
    parser.add_argument("--dataset", default="fashion_mnist")
    parser.add_argument("--sparsities", default="0.8,0.9,0.95")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--buckets", type=int, default=8, help="decisions per kernel (plans)")
    parser.add_argument("--episodes", type=int, default=30, help="of every search (searches)")
    parser.add_argument("--models", type=Path, default=Path("."), help="of trained weights")
    parser.add_argument("--csv", type=Path, required=True, help="rows; those in it are kept")
    options = parser.parse_args()
    policies = {
        name: SavedPolicy.load(path)
        for name, _, path in (one.partition("=") for one in options.policy)
    }
    data = load_dataset(options.dataset)
    done = _read(options.csv)
    cells = itertools.product(
        options.networks.split(","), range(options.seeds), options.sparsities.split(",")
    )
    for name, seed, target in cells:
        cell = {"network": name, "target": target, "seed": str(seed)}
        if any(all(row[key] == value for key, value in cell.items()) for row in done):
            continue
        model = trained(name, data, seed, options.models)
        # All of the validation rows for plans: they differ by less than 2,000 can tell.
        rows_used = len(data.x_validation) if options.what == "plans" else 2000
        wanted = rls.Target(sparsity=float(target))
        network = network_of(model, data, wanted, rows=rows_used, seed=seed)
        if options.what == "plans":
            rows = plans(network, policies, options.buckets)
        else:
            rows = searches(network, policies, options.episodes, seed)
        for row in list(rows):  # a cell is written as a whole, or measured again
            append(options.csv, {**cell, **row})
            print({**cell, **row}, file=sys.stderr, flush=True)
    if options.what == "plans":
        table(_read(options.csv), ("value", "accuracy"))
    else:
        columns = [f"after_{n}" for n in _AFTER if n <= options.episodes]
        table(_read(options.csv), (*columns, "returned"))


def _read(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


if __name__ == "__main__":
    main()
