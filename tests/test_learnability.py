"""Do the agents learn? Of all plans of a small made-up problem, they find the best early."""

import itertools
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import pytest

pytest.importorskip("tf_agents")

from tf_agents.specs import array_spec
from tf_agents.trajectories import time_step as ts

from rl_sparsity_tf.agents import DQN, PPO, build_agent

KERNELS, BUCKETS, ACTIONS = 2, 2, 4
PLANS = list(itertools.product(range(ACTIONS), repeat=KERNELS * BUCKETS))
KEEP, PRUNE, QUANTIZE, SHUFFLE = range(4)
SEEDS = 3


def value(plan: tuple[int, ...]) -> float:
    """In [-1, 1]: what a network might be worth.

    Integers pay only in whole kernels, so that one decision alone does not show what it is worth;
    pruning costs accuracy, more of it in the second bucket, and much if both kernels are emptied.
    """
    total = 0.0
    for kernel in range(KERNELS):
        first, second = plan[kernel * BUCKETS : (kernel + 1) * BUCKETS]
        total += 0.4 * (first == PRUNE) - 0.3 * (second == PRUNE)
        total += 0.35 * (QUANTIZE in (first, second) and KEEP not in (first, second))
        total -= 0.15 * (SHUFFLE in (first, second))
        total -= 0.05 * (first == QUANTIZE) + 0.03 * kernel * (second == QUANTIZE)
    pruned = sum(action == PRUNE for action in plan)
    return float(np.clip(total - 0.5 * (pruned > 3) - 0.7, -1.0, 1.0))


VALUES = {plan: value(plan) for plan in PLANS}
BEST = max(VALUES.values())


def specs():
    observation = {
        "state": array_spec.BoundedArraySpec((len(shown(())),), np.float32, 0.0, 1.0),
        "legal": array_spec.BoundedArraySpec((ACTIONS,), np.int32, 0, 1),
    }
    reward = array_spec.BoundedArraySpec((), np.float32, -1.0, 1.0)
    action = array_spec.BoundedArraySpec((), np.int32, minimum=0, maximum=ACTIONS - 1)
    return ts.time_step_spec(observation, reward), action


def shown(actions: tuple[int, ...]) -> np.ndarray:
    """Where the episode stands, the shares of the operations so far, here and elsewhere."""
    place = len(actions)
    here = actions[place - place % BUCKETS :]
    state = [place / (KERNELS * BUCKETS), (place // BUCKETS) / KERNELS, (place % BUCKETS) / BUCKETS]
    for some in (here, actions):
        state += [some.count(action) / max(1, len(some)) for action in range(ACTIONS)]
    return np.array(state, np.float32)


def play(agent) -> tuple[int, ...]:
    """One search episode, of one environment episode per kernel, as the search plays it."""
    plan: tuple[int, ...] = ()
    for _ in range(KERNELS):
        for bucket in range(BUCKETS):
            step = {"state": shown(plan), "legal": np.ones(ACTIONS, np.int32)}
            before = ts.restart(step) if bucket == 0 else ts.transition(step, np.float32(0.0))
            plan += (agent.step(before),)
            after = {"state": shown(plan), "legal": np.ones(ACTIONS, np.int32)}
            ended = bucket + 1 == BUCKETS
            agent.observe((ts.termination if ended else ts.transition)(after, np.float32(0.0)))
    agent.end_episode(worth=VALUES[plan])
    return plan


def plans_until_best(agent, most: int) -> int:
    """How many distinct plans are evaluated until the best is; `most + 1` if it never is."""
    evaluated = set()
    for _ in range(2 * most):
        plan = play(agent)
        evaluated.add(plan)
        if VALUES[plan] == BEST:
            return len(evaluated)
        if len(evaluated) > most:
            break
    return most + 1


def test_the_best_plan_is_one_of_few():
    assert len(PLANS) == 256
    assert sum(one == BEST for one in VALUES.values()) == 1
    # Where no decision alone makes the dense plan better, a climber has nowhere to go.
    assert BEST > 0.5


@pytest.mark.parametrize("config", [DQN(), PPO()], ids=["dqn", "ppo"])
def test_the_best_plan_is_found_within_half_as_many_plans(config):
    agent = build_agent(config, *specs(), seed=0)
    counts = []
    for seed in range(SEEDS):
        # An agent of another seed, without tracing its functions once more.
        agent.set_state(build_agent(config, *specs(), seed=seed).get_state())
        counts.append(plans_until_best(agent, len(PLANS) // 2))
    assert max(counts) <= len(PLANS) // 2, counts
    # Chance needs half of them on average, and would pass the line above now and then.
    assert np.mean(counts) <= len(PLANS) // 3, counts


@pytest.mark.parametrize("config", [DQN(), PPO()], ids=["dqn", "ppo"])
def test_no_plan_is_played_twice(config):
    agent = build_agent(config, *specs(), seed=1)
    plans = [play(agent) for _ in range(40)]
    assert len(set(plans)) == 40
