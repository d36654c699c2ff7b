"""Can it be learned which move improves a plan? A rule from other networks, a bandit, chance.

Every small random network (see `random_networks.py`) gets a target so tight that plans lose
accuracy. From the best plan known, and from better ones, moves are tried without making them: what
each would have gained is a lesson. A linear rule for every kind of move is fitted to the lessons of
some networks: it predicts by what the state shows how much a move will improve. On networks that it
has not seen it then chooses the moves of a search, beside chance and a bandit that learns which
kinds of moves succeed (Thompson sampling), in the same environment, from the same plan, with the
same opening.

    python benchmarks/moves.py gather --folder lessons --networks 100
    python benchmarks/moves.py compare --folder lessons --networks 12 --first 5000
    python benchmarks/moves.py teach --folder lessons --output policy.npz

`teach` writes the rule as a policy: a Q-network without hidden layers. `compare` prints, for every
unseen network, the value at the start and after the moves, mean over the seeds, and at the end how
often each is ahead of chance.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import random_networks
from curves import by_bandit

import rl_sparsity_tf as rls
from rl_sparsity_tf.agents.policies import IMPROVE, SavedPolicy
from rl_sparsity_tf.allocation.dynamic_programming import POWERS, propose_all
from rl_sparsity_tf.environment.improvement_environment import opened
from rl_sparsity_tf.environment.moves import BETAS, IMPROVEMENT_STATE_SIZE, MOVES, SLOT_SHAPE
from rl_sparsity_tf.environment.network import CompressedNetwork, evaluate_plan
from rl_sparsity_tf.environment.reranking import SCHEDULE
from rl_sparsity_tf.environment.reward import Reward, bounded
from rl_sparsity_tf.errors import RLSparsityError

# Densities of the targets, and how much of the dense value may be left at the start.
_DENSITIES = 0.01, 0.15
_LOST = 0.03, 0.7
_RIDGE = 10.0
_SCALE = 10.0

Rule = Callable[[Any], np.ndarray]


def tight_target(rng: Any) -> rls.Target:
    low, high = np.log(_DENSITIES)
    return rls.Target(sparsity=1.0 - float(np.exp(rng.uniform(low, high))))


def networks(first: int, count: int) -> Iterator[tuple[int, str, CompressedNetwork, Any]]:
    """Seeds, names, networks and the best plans of dynamic programming for them."""
    found, seed = 0, first
    while found < count:
        try:
            drawn = random_networks.draw(seed, target=tight_target)
            network = drawn.network
            plans = propose_all(network, POWERS)
            values = [bounded(Reward(), evaluate_plan(network, plan), None) for plan in plans]
            start = plans[int(np.argmax(values))]
            lost = 1.0 - evaluate_plan(network, start).retention
            rls.ImprovementEnvironment(network)
        except RLSparsityError as error:
            print(f"{seed}: {str(error)[:100]}", file=sys.stderr)
        else:
            if _LOST[0] <= lost <= _LOST[1]:
                found += 1
                yield seed, f"{drawn.name}, {drawn.target.sparsity:.1%}", network, start
        seed += 1


def gather(folder: Path, first: int, count: int, rounds: int, moves: int) -> None:
    """Writes a file of lessons for every network that has none yet."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed, name, network, start in networks(first, count):
        path = folder / f"{seed}.npz"
        if path.exists():
            continue
        rng = np.random.default_rng(seed)
        env = rls.ImprovementEnvironment(network, start=start, moves=1)
        rows = []
        for _ in range(rounds):
            time_step = env.reset()
            seen = time_step.observation["state"]
            legal = np.flatnonzero(time_step.observation["legal"])
            before, gains = env.value, {}
            # All three rankings of all kernels, and others by chance.
            whole = [action for action in legal if action < len(MOVES)]
            others = rng.permutation([action for action in legal if action >= len(MOVES)])
            for action in [*whole, *others[: moves - len(whole)]]:
                env.reset()
                env.step(np.int32(action))
                value = bounded(Reward(), network.outcome, None)
                gains[int(action)] = value - before
                rows.append((seen, action, value - before))
            best = max(gains, key=lambda action: gains[action])
            if gains[best] <= 0:
                break
            env.reset()
            env.step(np.int32(best))
            env.commit()
        columns = list(zip(*rows, strict=True))
        np.savez_compressed(
            path,
            states=np.array(columns[0], np.float32),
            actions=np.array(columns[1], np.int32),
            gains=np.array(columns[2], np.float32),
        )
        print(f"{seed}: {name}: {len(rows)} lessons, value {env.value:.3f}", flush=True)


def kind_of(action: int) -> int:
    """The kind of a move: its number, rankings and releasing of all kernels being two more."""
    slot, number = divmod(action, len(MOVES))
    return number if slot else len(MOVES) + (number >= len(BETAS))


def inputs(state: np.ndarray, action: int) -> np.ndarray:
    """What a rule sees of a move: the network's features, its slot's, and a constant."""
    shared, _, features = SLOT_SHAPE
    slot, number = divmod(action, len(MOVES))
    own = state[shared + slot * features : shared + (slot + 1) * features]
    return np.concatenate([state[:shared], own, [1.0], np.eye(len(BETAS) + 2)[number]])


def weights_of(folder: Path) -> dict[int, np.ndarray]:
    """The weights of a linear rule for every kind of move, of all lessons in a folder."""
    sums: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    for path in sorted(folder.glob("*.npz")):
        with np.load(path, allow_pickle=False) as lessons:
            states, actions, gains = (lessons[key] for key in ("states", "actions", "gains"))
        for state, action, gain in zip(states, actions, gains, strict=True):
            x, y = inputs(state, int(action)), np.clip(_SCALE * gain, 0.0, 1.0)
            squares, products = sums.setdefault(
                kind_of(int(action)), (_RIDGE * np.eye(len(x)), np.zeros(len(x)))
            )
            squares += np.outer(x, x)
            products += y * x
    return {kind: np.linalg.solve(*pair) for kind, pair in sums.items()}


def fitted(folder: Path) -> Rule:
    """The rule that these weights are."""
    weights = weights_of(folder)
    # Of kinds without a lesson.
    unknown = np.zeros(len(inputs(np.zeros(IMPROVEMENT_STATE_SIZE), 0)))

    def rule(time_step: Any) -> np.ndarray:
        state = time_step.observation["state"]
        return np.array(
            [
                inputs(state, action) @ weights.get(kind_of(action), unknown) if legal else -np.inf
                for action, legal in enumerate(time_step.observation["legal"])
            ]
        )

    return rule


def teach(folder: Path, output: Path) -> None:
    """Writes the rule as a policy: a Q-network that is linear, as its lessons were.

    It goes on to learn slowly, and explores by what is still to be tried from a plan alone.
    """
    weights = weights_of(folder)
    shared, _, features = SLOT_SHAPE
    seen = shared + features
    arrays = []
    for slot in (0, 1):  # the first slot has a layer of its own
        kernel, bias = np.zeros((seen, len(MOVES))), np.zeros(len(MOVES))
        for number in range(len(MOVES)):
            found = weights.get(kind_of(slot * len(MOVES) + number))
            if found is not None:
                kernel[:, number] = found[:seen]
                bias[number] = found[seen] + found[seen + 1 + number]
        arrays += [kernel.astype(np.float32), bias.astype(np.float32)]
    agent = rls.DQN(hidden_layers=(), learning_rate=1e-4, epsilon_end=0.0)
    SavedPolicy(agent, arrays, IMPROVE).save(output, overwrite=True)


def played(network: CompressedNetwork, start: Any, moves: int, rule: Rule) -> float:
    """The best value after so many moves, all kernels ranked first."""
    env = rls.ImprovementEnvironment(network, start=start, moves=moves)
    time_step = env.reset()
    left = list(SCHEDULE)
    while not time_step.is_last():
        action = opened(left, time_step.observation["legal"])
        if action is None:
            action = int(np.argmax(rule(time_step)))
        time_step = env.step(np.int32(action))
    return env.value


def chance(seed: int) -> Rule:
    rng = np.random.default_rng([seed, 9])

    def rule(time_step: Any) -> np.ndarray:
        legal = time_step.observation["legal"]
        return np.where(legal > 0, rng.random(len(legal)), -np.inf)

    return rule


def compare(folder: Path, first: int, count: int, moves: int, seeds: int) -> None:
    """Prints what the three come to on networks of other seeds."""
    rule, ways = fitted(folder), ("chance", "bandit", "rule")
    table = []
    for _, name, network, start in networks(first, count):
        begun = bounded(Reward(), evaluate_plan(network, start), None)
        found = {
            "chance": [played(network, start, moves, chance(seed)) for seed in range(seeds)],
            "bandit": [by_bandit(network, start, moves, seed)[-1] for seed in range(seeds)],
            "rule": [played(network, start, moves, rule)],
        }
        table.append([float(np.mean(found[way])) for way in ways])
        figures = ", ".join(f"{way} {mean:.3f}" for way, mean in zip(ways, table[-1], strict=True))
        print(f"{name}: start {begun:.3f}, {figures}", flush=True)
    means = np.array(table)
    for column, way in enumerate(ways[1:], 1):
        gain = means[:, column] - means[:, 0]
        print(
            f"{way}: {(gain > 0).sum()} of {len(gain)} above chance, by {gain.mean():+.4f} on "
            f"average (standard error {gain.std(ddof=1) / np.sqrt(len(gain)):.4f})"
        )


def main() -> None:
    """Gathers lessons, or compares what was learned of them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("gather", "compare", "teach"))
    parser.add_argument("--folder", type=Path, default=Path("lessons"))
    parser.add_argument("--networks", type=int, default=100)
    parser.add_argument("--first", type=int, default=0, help="seed of the first network")
    parser.add_argument("--rounds", type=int, default=4, help="plans that moves are tried from")
    parser.add_argument("--moves", type=int, default=16, help="moves of each, or of a search")
    parser.add_argument("--seeds", type=int, default=3, help="of chance and the bandit")
    parser.add_argument("--output", type=Path, default=Path("policy.npz"))
    options = parser.parse_args()
    if options.what == "teach":
        teach(options.folder, options.output)
    elif options.what == "gather":
        gather(options.folder, options.first, options.networks, options.rounds, options.moves)
    else:
        compare(options.folder, options.first, options.networks, options.moves, options.seeds)


if __name__ == "__main__":
    main()
