"""Teaches a policy on many small networks, so that it can decide for others without a search.

The reward of a whole plan says little about one of its fifty decisions, and what a network is worth
at best is not seen in the state. Both are settled by comparing: an episode is played by a
reference (LAMP's rule as it is seen in the state, or a policy taught before); then it is played
again with one other decision, the reference deciding all that follows. As everything is
deterministic, the difference of the two values is exactly what that decision was worth there. The
agent learns it as the reward of an episode of one step: its Q values are advantages over the
reference, in any network, and a policy that is greedy in them is the reference improved by one
step of policy iteration. PPO imitates the better decision of each pair.

`collect` writes a file of such lessons per network (those that are there are kept), `teach` a
policy:

    python benchmarks/pretraining.py collect --folder lessons --networks 100
    python benchmarks/pretraining.py teach --folder lessons --agent dqn --output policy.npz
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
from random_networks import Drawn, draw, tiny_network

import rl_sparsity_tf as rls
from rl_sparsity_tf.agents.configs import AgentConfig, build_agent
from rl_sparsity_tf.agents.demonstrations import heuristic_plan
from rl_sparsity_tf.agents.policies import CONSTRUCT, INTERFACES, SavedPolicy
from rl_sparsity_tf.environment.layer_environment import LayerEnvironment
from rl_sparsity_tf.environment.network import CompressedNetwork
from rl_sparsity_tf.environment.reward import Outcome
from rl_sparsity_tf.files import replacing
from rl_sparsity_tf.layers.operations import Operation
from rl_sparsity_tf.search.episodes import RELATIVE_GAIN, Episodes, LoopSettings

from tf_agents.trajectories import time_step as ts  # isort: skip

_BUCKETS = (8, 8, 12, 16)
_LAMP = INTERFACES[CONSTRUCT].features.index("bucket_lamp")
_CHUNK = 512
# What an operation is taken to lose where it was not tried: keep, prune, quantize, shuffle.
_DOUBT = (0.05, 0.02, 0.02, 0.05)

Chooser = Callable[[Any], int]


@dataclasses.dataclass(frozen=True, eq=False)
class Lessons:
    """Decisions and what they were worth.

    Attributes:
        states: Shape `(lessons, features)`.
        legal: Shape `(lessons, operations)`.
        actions: Shape `(lessons,)`.
        gains: Value of the plan with this decision less that of the reference's own.
        points: Number of the decision point, within the network; lessons of one point share the
            state.
    """

    states: np.ndarray
    legal: np.ndarray
    actions: np.ndarray
    gains: np.ndarray
    points: np.ndarray

    def save(self, path: Path) -> None:
        """Writes a .npz file."""
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, **dataclasses.asdict(self))

    @classmethod
    def load(cls, path: Path) -> Lessons:
        """Reads what [save][] wrote."""
        with np.load(path, allow_pickle=False) as file:
            return cls(**{field.name: file[field.name] for field in dataclasses.fields(cls)})


def by_rule(time_step: Any) -> int:
    """LAMP's choice as the state shows it; everything that lives is quantized."""
    state, legal = time_step.observation["state"], time_step.observation["legal"]
    wish = Operation.PRUNE if state[_LAMP] < 0.5 else Operation.QUANTIZE
    order = (wish, Operation.QUANTIZE, Operation.KEEP, Operation.PRUNE)
    return int(next(operation for operation in order if legal[operation]))


def smooth_value(network: CompressedNetwork) -> Callable[[Outcome], float]:
    """The default reward of a network, its accuracy smoothed by the loss, which is less noisy."""
    reward = rls.Reward()

    def value(outcome: Outcome) -> float:
        by_loss = float(np.exp(min(0.0, network.dense.loss - outcome.loss)))
        retention = 0.5 * (outcome.retention + by_loss)
        return reward(dataclasses.replace(outcome, retention=retention), None)

    return value


class Player:
    """Plays episodes on a network, from the start or from a decision on.

    Args:
        network: The network.
        buckets: Decisions per kernel.
        choose: The reference.
        by_magnitude: How the weights of a layer are ordered, as in
            [order_by_magnitude][rl_sparsity_tf.search.episodes.Episodes.order_by_magnitude].
    """

    def __init__(
        self, network: CompressedNetwork, buckets: int, choose: Chooser, by_magnitude: bool
    ):
        self.network = network
        settings = LoopSettings(
            agent=rls.Random(), reward=rls.Reward(), buckets=buckets, seed=0, warm_start=False
        )
        episodes = Episodes(settings, network)
        episodes.centre(heuristic_plan(network, "lamp"))
        episodes.order_by_magnitude(by_magnitude)
        self.environments = episodes.environments
        self._choose = choose
        self._value = smooth_value(network)

    def play(self, choose: Chooser | None = None) -> tuple[float, list[tuple[int, Any, Any]]]:
        """An episode: its value, and the points (environment, state to return to, time step)."""
        self.network.reset()
        visited: list[tuple[int, Any, Any]] = []
        for index, environment in enumerate(self.environments):
            environment.commit()
            time_step = environment.reset()
            while not time_step.is_last():
                visited.append((index, environment.get_state(), time_step))
                time_step = environment.step(np.int32((choose or self._choose)(time_step)))
        return self._value(self.network.outcome), visited

    def go_on(self, index: int, state: Any, action: int) -> float:
        """The value if an action is taken at a point, and the reference decides all the rest."""
        environment = self.environments[index]
        environment.set_state(state)
        time_step = environment.step(np.int32(action))
        while True:
            while not time_step.is_last():
                time_step = environment.step(np.int32(self._choose(time_step)))
            index += 1
            if index == len(self.environments):
                return self._value(self.network.outcome)
            environment = self.environments[index]
            environment.commit()
            time_step = environment.reset()


def collect(drawn: Drawn, choose: Chooser, rng: Any, points: int) -> Lessons:
    """Lessons of one network.

    Args:
        drawn: The network.
        choose: The reference.
        rng: Draws where other decisions are tried.
        points: Decision points to try them at: two thirds in the reference's own episode, the
            others in episodes that left it before.
    """
    player = Player(drawn.network, int(rng.choice(_BUCKETS)), choose, bool(rng.integers(2)))
    rows: list[tuple[np.ndarray, np.ndarray, int, float, int]] = []

    def lesson(time_step: Any, action: int, gain: float, point: int) -> None:
        seen = time_step.observation
        rows.append((seen["state"], seen["legal"], action, gain, point))

    def try_others(point: int, visit: tuple[int, Any, Any], reference: float) -> None:
        index, state, time_step = visit
        legal = time_step.observation["legal"]
        own = choose(time_step)
        others = [int(one) for one in np.flatnonzero(legal) if one != own]
        # Keep and Shuffle are seldom worth it.
        likely = [one for one in others if one in (Operation.PRUNE, Operation.QUANTIZE)]
        rare = [one for one in others if one not in likely and rng.random() < 0.15]
        for action in likely + rare:
            lesson(time_step, action, player.go_on(index, state, action) - reference, point)

    value, visited = player.play()
    for point, (_, _, time_step) in enumerate(visited):
        lesson(time_step, choose(time_step), 0.0, point)
    chances = np.array([_interest(time_step) for _, _, time_step in visited])
    count = min(int((chances > 0).sum()), -(-points * 2 // 3))
    if count:
        for point in rng.choice(len(visited), count, replace=False, p=chances / chances.sum()):
            try_others(int(point), visited[point], value)
    for extra in range(points - count):
        share = rng.uniform(0.05, 0.3)

        def stray(time_step: Any, share: float = share) -> int:
            legal = np.flatnonzero(time_step.observation["legal"][:3])
            return int(rng.choice(legal)) if rng.random() < share else choose(time_step)

        _, strayed = player.play(stray)
        chances = np.array([_interest(time_step) for _, _, time_step in strayed])
        if not chances.any():
            continue
        visit = strayed[int(rng.choice(len(strayed), p=chances / chances.sum()))]
        own = choose(visit[2])
        reference = player.go_on(visit[0], visit[1], own)
        point = len(visited) + extra
        lesson(visit[2], own, 0.0, point)
        try_others(point, visit, reference)
    columns = list(zip(*rows, strict=True))
    kinds = (np.float32, np.int32, np.int32, np.float32, np.int32)
    return Lessons(*(np.array(c, kind) for c, kind in zip(columns, kinds, strict=True)))


def _interest(time_step: Any) -> float:
    """Decisions close to LAMP's threshold are tried more often; forced ones never."""
    seen = time_step.observation
    if np.count_nonzero(seen["legal"]) < 2:
        return 0.0
    return 0.15 + float(np.exp(-abs(seen["state"][_LAMP] - 0.5) / 0.15))


# -- learning ------------------------------------------------------------------------------------


def agent_config(name: str) -> AgentConfig:
    """The agent that learns from lessons: rewards come at once, and every lesson is kept."""
    if name == "ppo":
        return rls.PPO(num_epochs=1, learning_rate=1e-3)
    return rls.DQN(
        n_step=1, learning_rate=1e-3, batch_size=256, train_steps=100, replay_capacity=60_000
    )


def searching_config(name: str) -> AgentConfig:
    """The agent that a search goes on with: its defaults."""
    return rls.PPO() if name == "ppo" else rls.DQN()


def teach(
    name: str, lessons: Sequence[Lessons], *, rounds: int, margin: float, seed: int = 0
) -> SavedPolicy:
    """A policy of what the lessons say.

    Args:
        name: `"dqn"` or `"ppo"`.
        lessons: The lessons of all networks.
        rounds: Trainings (DQN) or passes (PPO) over all lessons.
        margin: What another decision than the reference's has to gain at least.
        seed: Of the agent.
    """
    agent = build_agent(agent_config(name), *specs(), seed=seed)
    rng = np.random.default_rng(seed)
    rows = _with_doubts(_joined(lessons))
    gains = rows.gains - margin * (rows.gains != 0)
    chosen = np.arange(len(gains)) if name == "dqn" else _best_of_points(rows, gains)
    for _ in range(rounds if name == "ppo" else 1):
        order = rng.permutation(chosen)
        order = order[: len(order) // _CHUNK * _CHUNK] if name == "ppo" else order
        for start in range(0, len(order), _CHUNK):
            for row in order[start : start + _CHUNK]:
                _record(agent, rows, int(row), gains[row])
            agent.end_episode()
    if name == "dqn":
        for _ in range(rounds):
            row = int(rng.integers(len(gains)))
            _record(agent, rows, row, gains[row])
            agent.end_episode()
    return SavedPolicy.of(searching_config(name), agent)


def _record(agent: Any, rows: Lessons, row: int, gain: float) -> None:
    """One lesson as an episode of one step."""
    seen = {"state": rows.states[row], "legal": rows.legal[row]}
    agent.step(ts.restart(seen), action=int(rows.actions[row]))
    reward = np.float32(np.clip(RELATIVE_GAIN * gain, -1.0, 1.0))
    agent.observe(ts.termination(seen, reward))


def _with_doubts(rows: Lessons) -> Lessons:
    """Adds what was not tried as a loss, so that nothing is preferred that nothing is known of.

    Deep Q-learning from demonstrations has a loss for it (Hester et al. 2018, "Deep Q-learning
    from demonstrations", arXiv 1704.03732): what the demonstrator did not do is worth a margin
    less. Here it is a lesson like the others.
    """
    tried: dict[int, set[int]] = {}
    first: dict[int, int] = {}
    for row, point in enumerate(rows.points):
        tried.setdefault(int(point), set()).add(int(rows.actions[row]))
        first.setdefault(int(point), row)
    found, actions, gains = [], [], []
    for point, row in first.items():
        for action in np.flatnonzero(rows.legal[row]):
            if int(action) not in tried[point]:
                found.append(row)
                actions.append(int(action))
                gains.append(-_DOUBT[int(action)])
    return Lessons(
        np.concatenate([rows.states, rows.states[found]]),
        np.concatenate([rows.legal, rows.legal[found]]),
        np.concatenate([rows.actions, np.array(actions, np.int32)]),
        np.concatenate([rows.gains, np.array(gains, np.float32)]),
        np.concatenate([rows.points, rows.points[found]]),
    )


def _best_of_points(rows: Lessons, gains: np.ndarray) -> np.ndarray:
    """The best lesson of every point that others were tried at, or that left no choice to doubt."""
    best: dict[int, int] = {}
    for row, point in enumerate(rows.points):
        if point not in best or gains[row] > gains[best[point]]:
            best[int(point)] = row
    return np.array(sorted(best.values()))


def _joined(lessons: Sequence[Lessons]) -> Lessons:
    points, start = [], 0
    for one in lessons:
        points.append(one.points + start)
        start += int(one.points.max()) + 1
    names = ("states", "legal", "actions", "gains")
    arrays = [np.concatenate([getattr(one, name) for one in lessons]) for name in names]
    return Lessons(*arrays, np.concatenate(points))


def specs() -> tuple[Any, Any]:
    """The specs of every layer's environment, which are all alike."""
    network = tiny_network()
    environment = LayerEnvironment(network, network.kernels[0].path)
    return environment.time_step_spec(), environment.action_spec()


def judge(policy: SavedPolicy, lessons: Sequence[Lessons]) -> dict[str, float]:
    """What a policy would gain per decision that was tried, on lessons it was not taught.

    Returns:
        Mean gain of its choices, of the best choices (those of hindsight), and the share of points
        where it leaves the reference.
    """
    agent = build_agent(policy.agent, *specs())
    agent.set_policy_arrays(policy.weights)
    found, best, left = [], [], []
    for one in lessons:
        for point in np.unique(one.points):
            rows = np.flatnonzero(one.points == point)
            if len(rows) < 2:
                continue
            tried = np.zeros_like(one.legal[rows[0]])
            tried[one.actions[rows]] = 1
            seen = {"state": one.states[rows[0]], "legal": tried}
            action = agent.act(ts.restart(seen))
            gains = {int(one.actions[row]): float(one.gains[row]) for row in rows}
            found.append(gains[action])
            best.append(max(gains.values()))
            left.append(float(gains[action] != 0))
    return {
        "gain": float(np.mean(found)),
        "of hindsight": float(np.mean(best)),
        "left": float(np.mean(left)),
        "points": len(found),
    }


def files_in(folder: Path) -> Iterator[Path]:
    yield from sorted(folder.glob("network-*.npz"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("step", choices=("collect", "teach"))
    parser.add_argument("--folder", type=Path, required=True, help="of the lessons")
    parser.add_argument("--networks", type=int, default=100)
    parser.add_argument("--first", type=int, default=0, help="seed of the first network")
    parser.add_argument("--points", type=int, default=30, help="decisions to doubt per network")
    parser.add_argument("--reference", help="a policy, in place of LAMP's rule")
    parser.add_argument("--agent", choices=("dqn", "ppo"), default="dqn")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--margin", type=float, default=0.002)
    parser.add_argument("--left-out", type=float, default=0.2, help="share of networks to judge on")
    parser.add_argument("--output", type=Path, help="the policy")
    options = parser.parse_args()
    if options.step == "collect":
        options.folder.mkdir(exist_ok=True)
        choose: Chooser = by_rule
        if options.reference:
            policy = SavedPolicy.load(options.reference)
            agent = build_agent(policy.agent, *specs())
            agent.set_policy_arrays(policy.weights)
            choose = agent.act
        for seed in range(options.first, options.first + options.networks):
            path = options.folder / f"network-{seed:05d}.npz"
            if path.exists():
                continue
            started = time.monotonic()
            drawn = draw(seed)
            ready = time.monotonic()
            rng = np.random.default_rng([seed, 1])
            lessons = collect(drawn, choose, rng, options.points)
            lessons.save(path)
            gains = lessons.gains[lessons.gains != 0]
            print(
                f"{seed} {drawn.name}, sparsity {drawn.target.value:.3f}: {len(gains)} trials, "
                f"gains {np.quantile(gains, [0, 0.5, 0.9, 1]).round(4).tolist()}, "
                f"{ready - started:.0f} + {time.monotonic() - ready:.0f} s",
                flush=True,
            )
        return
    lessons = [Lessons.load(path) for path in files_in(options.folder)]
    apart = round(len(lessons) * options.left_out)
    policy = teach(
        options.agent,
        lessons[apart:],
        rounds=options.rounds,
        margin=options.margin,
    )
    for name, part in (("taught", lessons[apart:]), ("left out", lessons[:apart])):
        if part:
            print(name, judge(policy, part))
    if options.output:
        policy.save(options.output, overwrite=True)


if __name__ == "__main__":
    main()
