"""The environment that chooses layers and goals, on real tiny networks."""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np
import pytest
import tf_keras as keras
from environment_check import bits, check_environment, legal_of, play
from hypothesis import given, settings
from hypothesis import strategies as st
from tf_agents.environments import utils as environment_utils
from tiny_search import quick_search

import rl_sparsity_tf as rls
from rl_sparsity_tf.agents.configs import build_agent
from rl_sparsity_tf.allocation.budgets import Budget, CostBudget
from rl_sparsity_tf.allocation.decisions import KernelDecisions
from rl_sparsity_tf.data.batches import evaluation_data, training_data
from rl_sparsity_tf.environment.features import (
    NETWORK_FEATURES,
    SELECTION_FEATURES,
    SELECTION_STATE_SIZE,
    SLOT_FEATURES,
    SLOTS,
    describe_selection_state,
)
from rl_sparsity_tf.environment.network import CompressedNetwork
from rl_sparsity_tf.environment.selection_environment import (
    ACTIONS,
    FACTORS,
    GOALS,
    NEAR,
    density_of,
    goals_of,
    mean_density,
)
from rl_sparsity_tf.errors import ArgumentError, TargetError

# Kernels of 6 x 8, 8 x 7, 7 x 5, 5 x 4, 4 x 6 and 6 x 3: 201 weights.
UNITS = (8, 7, 5, 4, 6, 3)
SIZES = (48, 56, 35, 20, 24, 18)
NAMES = [f"dense_{number}/kernel" for number in range(len(UNITS))]


@pytest.fixture(scope="module", autouse=True)
def _quick():
    with quick_search():
        yield
    network_of.cache_clear()


def model_of(units=UNITS) -> keras.Model:
    keras.utils.set_random_seed(3)
    stack = [keras.layers.Input((6,))]
    stack += [
        keras.layers.Dense(one, activation="tanh", name=f"dense_{number}")
        for number, one in enumerate(units[:-1])
    ]
    stack.append(keras.layers.Dense(units[-1], name=f"dense_{len(units) - 1}"))
    model = keras.Sequential(stack)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss, metrics=["accuracy"])
    return model


def build(group="element", method="none", units=UNITS, target=None, decisions=None):
    model, rng = model_of(units), np.random.default_rng(0)
    x, y = rng.normal(size=(48, 6)).astype(np.float32), rng.integers(0, 3, 48)
    return CompressedNetwork(
        model,
        training_data((x, y), model, batch_size=16),
        evaluation_data((x[:24], y[:24]), model, "validation_data"),
        target=target or rls.Target(sparsity=0.5),
        group=group,
        decisions=decisions,
        recovery=rls.Recovery(method=method, **({"steps": 1} if method == "finetune" else {})),
    )


@functools.cache
def network_of(group="element", method="none") -> CompressedNetwork:
    return build(group, method)


def environment(network=None, sparsity=0.5, **options) -> rls.LayerSelectionEnvironment:
    """A fresh environment on a network that is dense again."""
    network = network or network_of()
    if not isinstance(network.budget, CostBudget):
        network.target = rls.Target(sparsity=sparsity)
        sizes = [network.groupings[kernel.path].sizes for kernel in network.kernels]
        network.budget = Budget(sparsity, network.budget.elements, sizes)
    network.reset()
    return rls.LayerSelectionEnvironment(network, **options)


def seen(time_step) -> dict[str, float]:
    names = [feature.name for feature in SELECTION_FEATURES]
    return dict(zip(names, time_step.observation["state"].tolist(), strict=True))


# -- the contract --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("group", "method"),
    [
        ("block4", "none"),
        ("element", "least_squares"),
        ("element", "finetune"),
    ],
)
def test_it_passes_both_checks(group, method):
    env = environment(network_of(group, method), 0.4)
    environment_utils.validate_py_environment(
        env,
        episodes=1,
        observation_and_action_constraint_splitter=lambda o: (o["state"], o["legal"]),
    )
    report = check_environment(env, episodes=1)
    assert report.longest_episode == len(UNITS)
    assert {"determinism", "replay", "illegal_actions"} <= set(report.rules)


@pytest.mark.slow
def test_neither_actions_nor_states_depend_on_the_network():
    one, other = environment(), environment(build(units=(4, 3)))
    assert one.action_spec() == other.action_spec()
    assert one.observation_spec()["state"].shape == other.observation_spec()["state"].shape
    assert (one.action_spec().minimum, one.action_spec().maximum) == (0, SLOTS * len(FACTORS) - 1)
    agent = build_agent("dqn", one.time_step_spec(), one.action_spec())
    assert agent.act(one.reset()) in legal_of(one.current_time_step())
    assert agent.act(other.reset()) in legal_of(other.current_time_step())


def test_the_slots_hold_the_smallest_undecided_kernels():
    env = environment()
    env.reset()
    order = [NAMES[5], NAMES[3], NAMES[4], NAMES[2], NAMES[0], NAMES[1]]
    assert env.undecided == order
    assert env.slots == order[:4]
    env.step(np.int32(2 * GOALS + 2))  # the third slot
    assert env.slots == [NAMES[5], NAMES[3], NAMES[2], NAMES[0]]
    assert env.network.decided[NAMES[4]].all()
    assert not any(env.network.decided[path].any() for path in env.undecided)


def test_equal_kernels_come_in_the_order_of_the_network():
    env = environment(build(units=(6, 6, 6)))
    env.reset()
    assert env.slots == NAMES[:3]


def test_an_episode_decides_every_kernel_once_and_then_begins_again():
    env, played = environment(), []
    plain = env.play_layer
    env.play_layer = lambda path, goal: (played.append(path), plain(path, goal))
    first = env.reset()
    steps = play(env, lambda step: legal_of(step)[-1], first)
    assert sorted(played) == sorted(NAMES)
    assert all(env.network.decided[path].all() for path in NAMES)
    assert env.slots == []
    assert legal_of(steps[-1]) == list(range(ACTIONS))
    assert bits(env.step(np.int32(0))) == bits(first)


def test_empty_slots_are_zero_and_illegal():
    env = environment()
    step = play(env, lambda step: legal_of(step)[0])[3]  # three kernels are left
    env.reset()
    features = seen(step)
    assert [features[f"slot_{slot}_present"] for slot in range(SLOTS)] == [1, 1, 1, 0]
    assert all(features[f"slot_3_{feature.name}"] == 0 for feature in SLOT_FEATURES)
    assert max(legal_of(step)) < 3 * GOALS
    assert features["kernels_decided"] == 0.5
    assert features["weights_decided"] == pytest.approx((18 + 20 + 24) / sum(SIZES))


# -- goals ---------------------------------------------------------------------------------------


def test_goals_are_factors_on_the_density_that_the_budget_leaves():
    env = environment(sparsity=0.5)
    step = env.reset()
    # 101 of 201 weights have to go, so 100/201 live on average: 1 - 100/201 = 0.5025.
    assert seen(step)["mean_density"] == pytest.approx(100 / 201)
    # 18 weights: (1 - 25/201) 18 = 15.76, (1 - 50/201) 18 = 13.52, (1 - 100/201) 18 = 9.04,
    # (1 - 200/201) 18 = 0.09, 0.
    assert env.goals(0) == pytest.approx([16 / 18, 14 / 18, 9 / 18, 0, 0])
    # Of the two that prune nothing the one nearer to the average is offered.
    assert step.observation["legal"][:GOALS].tolist() == [1, 1, 1, 1, 0]


def test_what_was_taken_too_much_is_left_to_the_others():
    env = environment(sparsity=0.5)
    env.reset()
    step = env.step(np.int32(0))  # 16 of 18: 85 of the other 183 are missing
    assert env.network.budget.pruned[5] == 16
    assert seen(step)["mean_density"] == pytest.approx(1 - 85 / 183)
    assert env.slots[0] == NAMES[3]
    # (1 - 98/732) 20 = 17.3, (1 - 98/366) 20 = 14.6, (1 - 98/183) 20 = 9.3, 0, 0
    assert env.goals(0) == pytest.approx([17 / 20, 15 / 20, 9 / 20, 0, 0])
    assert step.observation["legal"][:GOALS].tolist() == [1, 1, 1, 1, 0]


def test_no_goal_asks_for_more_than_is_missing():
    env = environment(sparsity=0.05)
    env.reset()
    # Of 18 weights 13.7, 9.5, 1.0, 0 and 0, but 11 are missing in all.
    assert env.goals(0) == pytest.approx([11 / 18, 9 / 18, 1 / 18, 0, 0])
    step = env.step(np.int32(0))
    assert env.network.budget.missing == 0
    assert seen(step)["mean_density"] == 1.0
    assert legal_of(step) == [2, 7, 12, 17]  # nothing more, of any


def test_goals_that_leave_too_much_to_the_others_are_illegal():
    env = environment(sparsity=0.93)
    env.reset()
    # 187 of 201 are missing. The goal of four times the density that is left takes
    # (1 - 56/201) 35 = 25.2 of the 35 weights, and the others cannot give the rest.
    room = env.network.budget.room([index for index in range(6) if index != 2])
    least = env.network.budget.missing - room
    assert env.slots[3] == NAMES[2]
    amounts = [round(share * 35) for share in env.goals(3)]
    assert amounts == [34, 34, 33, 30, 25]
    assert amounts[-1] < least <= amounts[-2]
    legal = env.current_time_step().observation["legal"][3 * GOALS :]
    assert legal.tolist() == [0, 1, 1, 1, 0]


def test_the_last_kernel_gets_what_is_missing():
    env = environment(sparsity=0.5)
    last = play(env, lambda step: legal_of(step)[0])[-2]
    env.reset()
    assert sum(last.observation["legal"]) == 1


PLAN = (0.9, 0.3, 0.6, 0.5, 0.2, 0.8)


@pytest.mark.parametrize(("near", "factors"), [(False, FACTORS), (True, NEAR)])
def test_goals_lie_around_a_plan(near, factors):
    wanted = sum(round((1 - d) * size) for d, size in zip(PLAN, SIZES, strict=True))
    env = environment(sparsity=wanted / sum(SIZES))
    env.centre(dict(zip(NAMES, PLAN, strict=True)), near)
    middle = factors.index(1.0)

    def choose(step):
        slot = len(env.slots) - 1
        index = network_of().index_of(env.slots[slot])
        densities = 1 - np.array(env.goals(slot))
        expected = np.minimum(1, PLAN[index] * np.array(factors))
        # As long as all goals were the plan's; a weight more or less by rounding.
        assert abs(densities[middle] - expected[middle]) <= 1.5 / SIZES[index]
        legal = step.observation["legal"][slot * GOALS :][:GOALS]
        for level in np.flatnonzero(legal):
            if densities[level] < 1 - 1.5 / SIZES[index]:
                clipped = network_of().budget.capacity[index] / SIZES[index]
                lowest = max(expected[level], 1 - clipped)
                assert densities[level] >= lowest - 2.5 / SIZES[index]
        return slot * GOALS + middle

    play(env, choose)
    pruned = 1 - np.array(network_of().budget.pruned) / SIZES
    np.testing.assert_allclose(pruned, PLAN, atol=2.5 / min(SIZES))
    env.centre(None)
    env.reset()
    assert env.goals(0)[FACTORS.index(1.0)] == pytest.approx(wanted / sum(SIZES), abs=0.03)


def test_kernels_make_up_for_others_in_the_proportions_of_a_plan():
    network = network_of()
    reference = np.array(PLAN)
    sizes, undecided = np.array(SIZES, float), [1, 4, 5]
    planned = (sizes * reference)[undecided].sum() / sizes[undecided].sum()
    for mean in (planned, planned / 2, 0.01):
        found = [density_of(network, index, undecided, mean, reference) for index in undecided]
        np.testing.assert_allclose(found, reference[undecided] * mean / planned)
    assert density_of(network, 5, undecided, 1.0, reference) == 1.0


def test_where_no_goal_reaches_the_target_the_nearest_is_legal():
    network = network_of()
    env = environment(network, 0.9)
    env.reset()
    network.budget.capacity[:] = 20  # less than the target asks for
    goals = goals_of(network, 1, [1, 0], mean_density(network, [1, 0]))
    assert goals.legal.sum() == 1
    assert goals.amounts[goals.legal.argmax()] == goals.amounts.max() == 20


@pytest.mark.slow
@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1), sparsity=st.floats(0.02, 0.92))
def test_every_legal_goal_leaves_the_target_in_reach(seed, sparsity):
    network, rng = network_of(), np.random.default_rng(seed)
    env = environment(network, sparsity)
    step = env.reset()
    while not step.is_last():
        for action in legal_of(step):
            slot, level = divmod(action, GOALS)
            index = network.index_of(env.slots[slot])
            amount = round(env.goals(slot)[level] * SIZES[index])
            others = [network.index_of(path) for path in env.undecided if path != NAMES[index]]
            assert 0 <= amount <= min(network.budget.capacity[index], network.budget.missing)
            assert network.budget.missing - amount <= network.budget.room(others)
        step = env.step(np.int32(rng.choice(legal_of(step))))


@pytest.mark.slow
@pytest.mark.parametrize("group", ["block4", "channel"])
@settings(max_examples=16, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1), sparsity=st.floats(0.02, 0.9))
def test_any_legal_policy_meets_the_target_at_the_smallest_count(group, seed, sparsity):
    network, rng = network_of(group), np.random.default_rng(seed)
    try:
        env = environment(network, sparsity)
    except TargetError:
        return
    for step in play(env, lambda step: rng.choice(legal_of(step))):
        state = step.observation["state"]
        assert np.isfinite(state).all()
        assert (state >= 0).all()
        assert (state <= 1).all()
    budget = network.budget
    largest = max(int(network.groupings[path].sizes.max()) for path in NAMES)
    assert budget.wanted <= budget.pruned.sum() < budget.wanted + largest
    if group == "element":
        assert budget.pruned.sum() == budget.wanted
    assert (budget.pruned < SIZES).all()
    assert env.illegal_actions == 0


def test_by_default_the_least_salient_go_and_the_others_are_quantized():
    env = environment(sparsity=0.5)
    env.reset()
    env.step(np.int32(1))
    operations = env.network.operations[NAMES[5]].reshape(-1)
    order = np.argsort(env.network.saliency(NAMES[5]), kind="stable")
    assert (operations[order[:14]] == rls.Operation.PRUNE).all()
    assert (operations[order[14:]] == rls.Operation.QUANTIZE).all()


# -- targets of cost -----------------------------------------------------------------------------


class ByteBudget(CostBudget):
    """A weight costs 1 as an integer and 4 as a float; the file may have so much."""

    def __init__(self, limit, elements, sizes):
        self.limit, self.slack, self.name = limit, 1e-6, "bytes"
        super().__init__(0.5, elements, sizes)
        self.sizes = np.array([int(one.sum()) for one in sizes])

    def least(self, states):
        cost = 0.0
        for size, most, state in zip(self.sizes, self.capacity, states, strict=True):
            live = size - state.pruned - min(state.undecided, max(0, most - state.pruned))
            cost += live * (4 if state.kept else 1)
        return cost

    def expected(self, states):
        pairs = zip(self.sizes, states, strict=True)
        return float(sum((size - s.pruned) * (4 if s.kept else 1) for size, s in pairs))

    def total(self, pruned, integers):
        return float(((self.sizes - pruned) * np.where(integers, 1, 4)).sum())

    def stored_share(self, states):
        return self.expected(states) / (4 * self.sizes.sum())

    def limited(self, limit, name=None):
        raise NotImplementedError

    smallest = 0.0


class ByteDecisions(KernelDecisions):
    def __init__(self, limit):
        super().__init__("element")
        self.limit = limit

    def budget(self, model, kernels, target):
        sizes = [kernel.grouping("element").sizes for kernel in kernels]
        return ByteBudget(self.limit, sum(SIZES), sizes)


@pytest.mark.slow
def test_a_cost_is_shared_alike_and_kept_in_reach():
    network = build(decisions=ByteDecisions(100.0), target=rls.Target(tflite_bytes=10_000))
    env = environment(network)
    step = env.reset()
    # As integers 100 of 201 weights may live; the share is found to 1/256.
    assert seen(step)["mean_density"] == pytest.approx(100 / 201, abs=1 / 128)
    rng = np.random.default_rng(1)
    for _ in range(8):
        steps = [env.reset()]
        while not steps[-1].is_last():
            for action in legal_of(steps[-1]):
                slot, level = divmod(action, GOALS)
                index = network.index_of(env.slots[slot])
                states = network.states()
                amount = round(env.goals(slot)[level] * SIZES[index])
                states[index] = dataclasses.replace(
                    states[index], pruned=amount, undecided=0, quantized=True
                )
                assert network.budget.least(states) <= 100.0
            steps.append(env.step(np.int32(rng.choice(legal_of(steps[-1])))))
        # Everything that lives is an integer, so exactly so much has to go.
        assert network.budget.pruned.sum() == 101


# -- actions, rewards, and going back ------------------------------------------------------------


def test_an_illegal_action_is_counted_and_the_first_legal_one_is_taken():
    env = environment()
    step = env.reset()
    assert legal_of(step)[0] == 0
    assert not step.observation["legal"][4]
    env.step(np.int32(4))
    assert env.illegal_actions == 1
    assert env.network.budget.pruned.tolist() == [0, 0, 0, 0, 0, 16]


def test_the_reward_is_asked_with_the_outcomes_after_and_before():
    calls = []

    def reward(outcome, previous):
        calls.append((outcome, previous))
        return 7.0

    env = environment(reward=reward)
    layers = []
    env.play_layer = lambda path, goal: layers.append(decide(env.network, path, goal))
    steps = play(env, lambda step: legal_of(step)[0])
    assert [float(step.reward) for step in steps[1:]] == [1.0] * len(UNITS)
    assert calls[0][1].sparsity == 0
    assert [after for after, _ in calls[:-1]] == [before for _, before in calls[1:]]
    assert calls[-1][0].sparsity >= 0.5


def decide(network, path, goal):
    order = np.argsort(network.saliency(path), kind="stable")
    count = round(goal * len(order))
    network.decide(path, order[:count], rls.Operation.PRUNE)
    network.decide(path, order[count:], rls.Operation.KEEP)


def test_the_layer_is_played_by_what_was_given():
    calls = []
    env = environment()

    def play_layer(path, goal):
        calls.append((path, goal, env.undecided))
        decide(env.network, path, goal)

    env.play_layer = play_layer
    env.reset()
    env.step(np.int32(GOALS + 2))
    env.step(np.int32(1))
    assert calls[0][:2] == (NAMES[3], pytest.approx(10 / 20))
    assert calls[1][0] == NAMES[5]
    for path, _, later in calls:
        assert path not in later
    assert [len(later) for _, _, later in calls] == [5, 4]


def test_a_layer_that_was_not_played_to_its_end_is_named():
    env = environment(play_layer=lambda path, goal: None)
    env.reset()
    with pytest.raises(ArgumentError, match=r"play_layer\('dense_5/kernel', 0\.5\) left 18 groups"):
        env.step(np.int32(2))


def test_only_the_last_step_evaluates():
    network = network_of("element", "least_squares")
    env = environment(network)
    network.seen.clear()
    step, counts = env.reset(), []
    while not step.is_last():
        step = env.step(np.int32(legal_of(step)[0]))
        counts.append(network.evaluations)
    assert counts == [0] * (len(UNITS) - 1) + [1]


@pytest.mark.slow
def test_get_state_and_set_state_come_back_to_the_middle_of_an_episode():
    env = environment(network_of("element", "finetune"))
    env.reset()
    middle = env.step(np.int32(GOALS))
    state = env.get_state()
    first = [bits(step) for step in play(env, lambda step: legal_of(step)[-1], middle)]
    env.set_state(state)
    assert bits(env.current_time_step()) == bits(middle)
    assert env.undecided[0] == NAMES[5]
    assert [bits(s) for s in play(env, lambda step: legal_of(step)[-1], middle)] == first
    env.set_state(state)
    assert [bits(s) for s in play(env, lambda step: legal_of(step)[0], middle)] != first


# -- the state -----------------------------------------------------------------------------------


def test_features_have_unique_names_and_meanings():
    names = [feature.name for feature in SELECTION_FEATURES]
    assert len(set(names)) == len(names) == SELECTION_STATE_SIZE
    assert len(names) == SLOTS * len(SLOT_FEATURES) + len(NETWORK_FEATURES)
    assert all(feature.meaning and feature.low in (-1, 0) for feature in SELECTION_FEATURES)


def test_a_slot_tells_of_its_kernel():
    env = environment(sparsity=0.5)
    features = seen(env.reset())
    assert features["slot_0_share"] == features["slot_0_share_left"] == pytest.approx(18 / 201)
    assert features["slot_0_fan_in"] == pytest.approx(math.log2(7) / 16)
    assert features["slot_0_fan_out"] == pytest.approx(math.log2(4) / 16)
    assert features["slot_0_depth"] == 1
    assert features["slot_0_capacity"] == pytest.approx(17 / 18)
    assert features["slot_0_integers"] == 1
    # What the heuristic would prune, over all kernels, is what the target asks for.
    flat = np.concatenate([np.abs(matrix).reshape(-1) for matrix in env.network.originals.values()])
    limit = np.sort(flat)[101]
    share = float((np.abs(env.network.originals[NAMES[5]]) < limit).mean())
    assert features["slot_0_magnitude"] == pytest.approx(share, abs=1 / 18)
    assert features["retention"] == 1
    assert features["target"] == 0.5
    assert features["weights_decided"] == features["budget_progress"] == 0


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_the_state_is_bounded_for_any_figures(data):
    env = environment()
    env.reset()
    anything = st.floats(width=64)
    names = [field.name for field in dataclasses.fields(env.network.outcome)]
    figures = {name: data.draw(anything) for name in names}
    env.network.outcome = dataclasses.replace(env.network.outcome, **figures)
    state = env._observe()["state"]
    assert state.dtype == np.float32
    assert np.isfinite(state).all()
    assert (state >= 0).all()
    assert (state <= 1).all()


def test_describe_selection_state_prints_every_feature():
    lines = []
    state = np.linspace(0, 1, SELECTION_STATE_SIZE)
    describe_selection_state(state, lines.append)
    assert len(lines) == SELECTION_STATE_SIZE + 1
    for number, (feature, line) in enumerate(zip(SELECTION_FEATURES, lines[1:], strict=True)):
        assert line.split()[:2] == [str(number), feature.name]
        assert f" {state[number]:.3f}" in line
        assert line.endswith(feature.meaning)
    with pytest.raises(ArgumentError, match=r"has shape \(3,\)\. Expected .* without a batch axis"):
        rls.describe_selection_state(np.zeros(3))


# -- arguments -----------------------------------------------------------------------------------


def test_wrong_arguments_are_refused():
    with pytest.raises(ArgumentError, match=r"network=None is a NoneType\. Expected a Compressed"):
        rls.LayerSelectionEnvironment(None)
    with pytest.raises(ArgumentError, match=r"play_layer='fast' cannot be called\. Expected a fun"):
        rls.LayerSelectionEnvironment(network_of(), play_layer="fast")
