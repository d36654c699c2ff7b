"""The environment of moves from plan to plan: its contract, its rewards, and what it shows."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from environment_check import check_environment, legal_of
from tf_agents.environments import utils as environment_utils
from tiny_search import quick_search, wide_network

import rl_sparsity_tf as rls
from rl_sparsity_tf.environment.moves import (
    ACTIONS,
    IMPROVEMENT_FEATURES,
    MOVES,
    SLOT_SHAPE,
    SLOTS,
)
from rl_sparsity_tf.environment.network import evaluate_plan
from rl_sparsity_tf.environment.reward import Reward, bounded
from rl_sparsity_tf.layers.operations import Operation

TARGET = rls.Target(sparsity=0.8)


@pytest.fixture(scope="module", autouse=True)
def _quick():
    with quick_search():
        yield
    network_of.cache_clear()


@functools.cache
def network_of(target=TARGET, group="element", method="least_squares"):
    return wide_network(target, group, method)


def seen(time_step):
    names = [feature.name for feature in IMPROVEMENT_FEATURES]
    return dict(zip(names, time_step.observation["state"].tolist(), strict=True))


def value_of(network, plan):
    return bounded(Reward(), evaluate_plan(network, plan), None)


def living(plan):
    return {path: entry.operations != Operation.PRUNE for path, entry in plan.kernels.items()}


# -- the contract --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("group", ["element", "block4"])
def test_it_passes_both_checks(group):
    env = rls.ImprovementEnvironment(network_of(group=group), moves=3)
    environment_utils.validate_py_environment(
        env,
        episodes=1,
        observation_and_action_constraint_splitter=lambda o: (o["state"], o["legal"]),
    )
    report = check_environment(env, episodes=2)
    assert report.longest_episode == 3
    assert {"determinism", "replay", "illegal_actions"} <= set(report.rules)


def test_a_state_is_cut_as_it_says():
    shared, slots, features = SLOT_SHAPE
    assert len(IMPROVEMENT_FEATURES) == shared + slots * features
    assert (slots, ACTIONS) == (1 + SLOTS, slots * len(MOVES))
    names = [feature.name for feature in IMPROVEMENT_FEATURES[shared:]]
    for slot in range(slots):
        mine = names[slot * features : (slot + 1) * features]
        assert [name.removeprefix(f"slot_{slot}_") for name in mine] == [
            name.removeprefix("slot_0_") for name in names[:features]
        ]
    assert len(set(names)) == len(names)


@pytest.mark.slow
def test_the_best_plan_is_kept_and_paid_for():
    network = network_of()
    env = rls.ImprovementEnvironment(network, moves=12)
    time_step = env.reset()
    assert env.slots == sorted(living(env.plan), key=lambda path: -_need(env, path))
    best = env.value
    assert best == value_of(network, env.plan)
    rng = np.random.default_rng(0)
    while not time_step.is_last():
        before, plan = env.value, env.plan
        action = int(rng.choice(legal_of(time_step)))
        time_step = env.step(action)
        value = bounded(Reward(), network.outcome, None)
        assert network.plan.sparsity >= TARGET.sparsity
        assert env.value == max(before, value)
        assert float(time_step.reward) == np.float32(np.clip(10 * (value - before), 0.0, 1.0))
        assert env.plan == (network.plan if value > before else plan) or value == before
        best = max(best, value)
        state = seen(time_step)
        assert (state["waiting"] == 0.0) == (env.plan != plan)
    assert env.value == best
    # What it has found is undone by a reset, unless it is committed.
    again = rls.ImprovementEnvironment(network, start=env.plan)
    again.reset()
    assert again.value == pytest.approx(env.value)
    found = env.plan
    env.reset()
    assert env.value <= best
    env.start_from(found)
    env.reset()
    env.commit()
    env.reset()
    assert env.plan == found


def _need(env, path):
    return env._position.views[env.network.index_of(path)]["need"]


@pytest.mark.slow
def test_moves_do_what_they_are_called():
    network = network_of()
    env = rls.ImprovementEnvironment(network, moves=1)
    env.reset()
    before, path = living(env.plan), env.slots[0]
    (other,) = set(before) - {path}
    for number, move in enumerate(MOVES):
        env.reset()
        env.step(len(MOVES) + number)
        after = living(network.plan)
        if move.kind == "rank":
            assert after[path].sum() == before[path].sum()
            np.testing.assert_array_equal(after[other], before[other])
        elif move.kind == "denser":
            assert after[path].mean() > before[path].mean()
            assert after[other].mean() < before[other].mean()
        else:
            assert after[path].mean() < before[path].mean()
            assert after[other].mean() > before[other].mean()
    env.reset()
    env.step(1)  # both ranked
    after = living(network.plan)
    assert {one: after[one].sum() for one in after} == {one: before[one].sum() for one in before}
    assert any((after[one] != before[one]).any() for one in after)


@pytest.mark.slow
def test_a_move_is_made_once_from_a_plan_and_then_with_another_factor():
    env = rls.ImprovementEnvironment(network_of(), moves=100, reward=lambda outcome, _: 0.0)
    # Of plans that are worth the same that of least loss is better: this one stays the best.
    time_step = env.reset()
    outcome = env._position.outcome
    env._position.outcome = rls.Outcome(**{**vars(outcome), "loss": -1.0})
    made, plans = [], []
    while env._position.passes == 0:
        action = int(legal_of(time_step)[0])
        slot, number = divmod(action, len(MOVES))
        made.append((env.slots[slot - 1] if slot else None, number))
        time_step = env.step(action)
        plans.append(env.network.plan)
    releases = env._position.near.of_all()[-1].kind == "release"
    assert len(set(made)) == len(made) == 3 + releases + 2 * len(MOVES)
    # The rankings were tried; only densities are left, with a smaller factor.
    left = {divmod(action, len(MOVES))[1] for action in legal_of(time_step)}
    assert left == {3, 4}
    env.step(int(legal_of(time_step)[0]))
    assert env.network.plan not in plans


def test_it_says_what_it_cannot_do():
    with pytest.raises(rls.ArgumentError, match=r"recovers by 'none', in groups of 'element'"):
        rls.ImprovementEnvironment(network_of(method="none"))
    with pytest.raises(rls.ArgumentError, match=r"moves=0"):
        rls.ImprovementEnvironment(network_of(), moves=0)
    env = rls.ImprovementEnvironment(network_of())
    with pytest.raises(rls.ArgumentError, match=r"There is no plan yet\. Expected env\.reset\(\)"):
        _ = env.plan


def test_the_features_are_described():
    lines = []
    rls.describe_improvement_state(print_fn=lines.append)
    assert len(lines) == 1 + SLOT_SHAPE[0] + SLOT_SHAPE[2]
    assert lines[1].split()[:2] == ["0", "target"]
    lines.clear()
    rls.describe_improvement_state(np.zeros(len(IMPROVEMENT_FEATURES)), lines.append)
    assert len(lines) == 1 + len(IMPROVEMENT_FEATURES)
    with pytest.raises(rls.ArgumentError, match=r"shape \(3,\). Expected \(218,\)"):
        rls.describe_improvement_state([0, 0, 0])


# -- saving --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_it_goes_on_from_arrays_in_the_same_bits():
    network = network_of()
    env = rls.ImprovementEnvironment(network, moves=1)
    assert not env.begun
    rng = np.random.default_rng(1)

    def played(one, count, rng):
        found = []
        for _ in range(count):
            one.commit()
            first = one.reset()
            last = one.step(int(rng.choice(legal_of(first))))
            steps = (first, last)
            found += [
                step.observation[key].tobytes() for step in steps for key in ("state", "legal")
            ]
            found.append((one.value, float(last.reward), network.plan.to_json()))
        return found

    played(env, 5, rng)
    saved, state = env.to_arrays(), rng.bit_generator.state
    assert all(value.dtype != object for value in saved.values())
    expected = played(env, 5, rng)
    again = rls.ImprovementEnvironment(network, moves=1)
    again.set_arrays(saved)
    assert again.begun
    rng.bit_generator.state = state
    assert played(again, 5, rng) == expected
    assert {key: value.tobytes() for key, value in again.to_arrays().items()} == {
        key: value.tobytes() for key, value in env.to_arrays().items()
    }


DAMAGES = {
    "tried": (np.array([[5, 0]]), "of another network"),
    "changed": (np.array([[0.0, 9.0, 0.0]]), "of another network"),
    "counts": (np.array([[1, 2], [0, 0], [0, 0], [0, 0], [0, 0]]), "of another network"),
    "passes": (np.array(-1), "that were tried are none"),
}


@pytest.mark.parametrize("key", DAMAGES)
def test_arrays_of_something_else_are_refused(key):
    env = rls.ImprovementEnvironment(network_of())
    wrong, message = DAMAGES[key]
    with pytest.raises(ValueError, match=message):
        env.set_arrays({**env.to_arrays(), key: wrong})
    assert not env.begun
