"""The hierarchy: choosing kernels and goals, meeting goals, and two agents that learn it."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_curriculum import built_for_bytes
from test_environment import build, legal_of, odd_model
from tf_agents.environments import utils as environment_utils
from tiny_search import DQN, PPO, TRAIN, VALIDATION, compressor, quick_autoencoder, trained

import rl_sparsity_tf as rls
from rl_sparsity_tf.cost_budget import CostBudget
from rl_sparsity_tf.curriculum import Staged
from rl_sparsity_tf.data import evaluation_data, training_data
from rl_sparsity_tf.environment import GOAL_WEIGHT, LayerEnvironment
from rl_sparsity_tf.episodes import ByChoice
from rl_sparsity_tf.layer_selection import (
    NETWORK_FEATURES,
    SLOT_FEATURES,
    Choice,
    LayerSelectionEnvironment,
)
from rl_sparsity_tf.network import CompressedNetwork
from rl_sparsity_tf.operations import Operation
from rl_sparsity_tf.progress import SearchProgress
from rl_sparsity_tf.run_directory import RunDirectory
from rl_sparsity_tf.search_loop import LoopSettings, SearchLoop
from rl_sparsity_tf.state import FEATURES

NONE = rls.Recovery(method="none")
LEAST_SQUARES = rls.Recovery(method="least_squares")


@pytest.fixture(scope="module")
def odd() -> dict[str, CompressedNetwork]:
    """Three kernels, on which nothing is recovered or fitted in closed form."""
    with quick_autoencoder():
        return {
            "element": build(odd_model(), "element", NONE, 0.7),
            "channel": build(odd_model(), "channel", NONE, 0.4),
            "fitted": build(odd_model(), "element", LEAST_SQUARES, 0.7),
        }


def tiny(target: rls.Target) -> CompressedNetwork:
    model = trained()
    with quick_autoencoder():
        return CompressedNetwork(
            model,
            training_data(TRAIN, model, batch_size=32),
            evaluation_data(VALIDATION, model, "validation_data"),
            target=target,
        )


@pytest.fixture(scope="module")
def network() -> CompressedNetwork:
    """Two kernels, fitted in closed form."""
    return tiny(rls.Target(sparsity=0.6))


@pytest.fixture(scope="module")
def sized() -> CompressedNetwork:
    """Two kernels and a target in bytes that needs zeros."""
    return built_for_bytes(4500)


def lower(network: CompressedNetwork, choose=None):
    """A lower level that decides by a function of the legal operations; the first by default."""
    choose = choose or (lambda legal: legal[0])

    def play(choice: Choice) -> LayerEnvironment:
        layer = LayerEnvironment(
            network,
            choice.kernel,
            buckets=3,
            later=list(choice.later),
            evaluate=not choice.later,
            goal=choice.goal,
        )
        step = layer.reset()
        while not step.is_last():
            step = layer.step(np.int32(choose(legal_of(step))))
        assert layer.illegal_actions == 0
        return layer

    return play


def selection(network: CompressedNetwork, choose=None, **options) -> LayerSelectionEnvironment:
    network.reset()
    return LayerSelectionEnvironment(network, lower(network, choose), **options)


def walk(env: LayerSelectionEnvironment, choose) -> list:
    steps = [env.reset()]
    while not steps[-1].is_last():
        steps.append(env.step(np.int32(choose(legal_of(steps[-1])))))
    return steps


# ---------------------------------------------------------------------- the contract


def test_it_is_an_environment_whatever_the_lower_level_does(odd):
    rng = np.random.default_rng(0)
    environment_utils.validate_py_environment(
        selection(odd["element"], rng.choice, slots=2),
        episodes=3,
        observation_and_action_constraint_splitter=lambda o: (o["state"], o["legal"]),
    )


@pytest.mark.parametrize("name", ["element", "channel", "fitted"])
def test_with_a_lower_level_that_repeats_it_passes_our_check(odd, name):
    report = rls.check_environment(selection(odd[name], slots=2), episodes=2)
    assert report.longest_episode == 3
    assert {"determinism", "replay", "illegal_actions"} <= set(report.rules)


def test_the_state_does_not_grow_with_the_network(odd, network):
    sizes = {selection(one).observation_spec()["state"].shape for one in (odd["element"], network)}
    assert sizes == {(len(NETWORK_FEATURES) + 4 * len(SLOT_FEATURES),)}
    env = selection(network)
    seen = dict(zip(env.feature_names, env.reset().observation["state"].tolist(), strict=True))
    assert len(set(env.feature_names)) == len(seen)
    assert [seen[f"slot_{n}_present"] for n in range(4)] == [1, 1, 0, 0]
    assert not any(value for name, value in seen.items() if name.startswith(("slot_2", "slot_3")))
    assert seen["target"] == pytest.approx(0.6)
    assert seen["slot_0_share"] == pytest.approx(48 / 72)
    assert (seen["slot_0_depth"], seen["slot_1_depth"]) == (0, 1)
    assert seen["beyond"] == seen["decided"] == seen["budget_progress"] == 0
    goals = [seen[f"slot_0_{name}_goal"] for name in ("least", "even", "most")]
    assert goals == sorted(goals)
    # The least salient go first, so that less magnitude is lost than weights.
    assert 0 < seen["slot_0_even_loss"] < seen["slot_0_even_goal"]


def test_slots_hold_the_next_kernels_in_order(odd):
    env = selection(odd["element"], slots=2)
    step = env.reset()
    paths = [kernel.path for kernel in odd["element"].kernels]
    assert env.candidates == paths[:2]
    assert step.observation["state"][env.feature_names.index("beyond")] == pytest.approx(1 / 3)
    env.step(np.int32(env.goals))  # slot 1
    assert env.candidates == [paths[0], paths[2]]
    assert env.network.decided[paths[1]].all()


# ---------------------------------------------------------------------- goals


def test_goals_lead_from_the_least_over_the_even_to_the_most(network):
    env = selection(network)
    env.reset()
    budget = network.budget
    for index, kernel in enumerate(network.kernels):
        levels = env.levels(kernel.path)
        assert (np.diff(levels) >= 0).all()
        least = max(0, budget.wanted - int(budget.capacity[1 - index]))
        assert levels[0] == pytest.approx(least / kernel.size)
        assert levels[-1] == pytest.approx(min(budget.wanted, budget.capacity[index]) / kernel.size)
        even = budget.capacity[index] / budget.capacity.sum() * budget.wanted / kernel.size
        assert levels[2] == pytest.approx(max(even, levels[0]))
        for level, goal in enumerate(levels):
            if env._legal()[index * 5 + level]:
                assert env.action_of(index, float(goal)) == index * 5 + level


def test_the_last_kernel_has_no_choice_left(network):
    env = selection(network)
    env.reset()
    step = env.step(np.int32(0))
    assert legal_of(step) == [0]
    (kernel,) = env.candidates
    goal = float(env.levels(kernel)[0])
    assert goal * network.kernels[1].size == pytest.approx(network.budget.missing)


def test_an_illegal_action_is_executed_as_a_slots_first_level_and_counted(network):
    env = selection(network)
    env.reset()
    env.step(np.int32(3 * 5 + 4))  # an empty slot
    assert env.candidates == [network.kernels[1].path]
    env.step(np.int32(4))  # the last kernel has one level
    assert env.illegal_actions == 2
    assert env.candidates == []


@pytest.mark.parametrize("name", ["element", "channel"])
@settings(max_examples=12, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1))
def test_the_wall_holds_in_any_order(odd, name, seed):
    network = odd[name]
    rng = np.random.default_rng(seed)
    weights = rng.dirichlet([0.3] * 4)

    def choose(legal):
        chances = weights[legal] + 1e-9
        return rng.choice(legal, p=chances / chances.sum())

    env = selection(network, choose)
    walk(env, rng.choice)
    budget = network.budget
    largest = max(int(one.sizes.max()) for one in network.groupings.values())
    assert budget.wanted <= budget.pruned.sum() < budget.wanted + largest
    assert all(pruned < k.size for pruned, k in zip(budget.pruned, network.kernels, strict=True))
    assert env.illegal_actions == 0


@settings(max_examples=6, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1))
def test_a_budget_of_bytes_holds_in_any_order(sized, seed):
    rng = np.random.default_rng(seed)
    env = selection(sized, rng.choice)
    walk(env, rng.choice)
    assert isinstance(sized.budget, CostBudget)
    assert sized.budget.expected(sized.states()) <= sized.budget.limit + sized.budget.slack


def test_goals_in_bytes_are_what_the_wall_allows(sized):
    env = selection(sized)
    env.reset()
    budget, kernel = sized.budget, sized.kernels[0]
    least, even, most = env._range(kernel.path)
    assert 0 <= least <= even <= most <= budget.capacity[0] / kernel.size + 1e-9
    order = np.argsort(sized.saliency(kernel.path))

    def reachable(pruned: int) -> bool:
        states = sized.states()
        states[0] = sized.state_after(kernel.path, order[:pruned], Operation.PRUNE)
        live = sized.state_after(kernel.path, order, Operation.QUANTIZE)
        states[0] = type(live)(pruned, 0, live.kept, live.quantized)
        return budget.least(states) <= budget.limit + budget.slack

    fewest = round(least * kernel.size)
    assert reachable(fewest)
    assert fewest == 0 or not reachable(fewest - 1)


# ---------------------------------------------------------------------- rewards


def test_a_step_earns_its_change_and_the_last_the_finished_network(odd):
    outcomes = []

    def reward(outcome, previous):
        outcomes.append((outcome, previous))
        return 0.25 if previous is None else 0.5

    network = odd["fitted"]
    steps = walk(selection(network, reward=reward), lambda legal: legal[-1])
    assert [float(step.reward) for step in steps[1:]] == [0.5, 0.5, 0.25]
    assert outcomes[1][1] == outcomes[0][0]
    assert outcomes[-1] == (network.outcome, None)


def test_a_goal_is_seen_and_paid_for_at_the_kernels_end(network):
    names = [feature.name for feature in FEATURES]
    path = network.kernels[0].path

    def episode(goal, **options):
        network.reset()
        layer = LayerEnvironment(
            network, path, buckets=3, reward=lambda *_: 0.25, goal=goal, evaluate=False, **options
        )
        steps = [layer.reset()]
        while not steps[-1].is_last():
            steps.append(layer.step(np.int32(Operation.PRUNE if len(steps) < 2 else 0)))
        return (
            layer,
            [
                [float(step.observation["state"][names.index(n)]) for n in ("goal", "goal_gap")]
                for step in steps
            ],
            [float(step.reward) for step in steps[1:]],
        )

    layer, seen, rewards = episode(None)
    assert seen == [[0.0, 0.0]] * 4
    assert rewards == [0.25] * 3
    assert layer.goal_gap == layer.goal_reward == 0.0
    reached = float(network.budget.pruned[0]) / network.kernels[0].size
    assert 0 < reached < 0.9
    layer, seen, rewards = episode(0.9)
    assert seen[0] == pytest.approx([0.9, 0.9])
    assert seen[-1] == pytest.approx([0.9, 0.9 - reached])
    assert rewards[:2] == [0.25] * 2
    assert rewards[2] == pytest.approx(0.25 - GOAL_WEIGHT * (0.9 - reached))
    assert episode(reached)[2] == pytest.approx([0.25] * 3)
    _, seen, rewards = episode(0.0, goal_weight=1.0)
    assert seen[-1] == pytest.approx([0.0, -reached])
    assert rewards[2] == pytest.approx(0.25 - reached)


# ---------------------------------------------------------------------- two agents


def loop_of(network: CompressedNetwork, run=None, **options) -> SearchLoop:
    network.seen.clear()
    options = {
        "agent": DQN,
        "buckets": 3,
        "seed": 2,
        "warm_start": False,
        "hierarchy": True,
        **options,
    }
    return SearchLoop(LoopSettings(reward=rls.Reward(), **options), network, run)


def sums_of(agent) -> list[list[float]]:
    """What the rewards of every environment episode add up to, search episode by episode."""
    learned: list[list[float]] = []
    learn = agent._learn

    def watch(transitions):
        sums, total = [], 0.0
        for transition in transitions:
            total += transition.reward
            assert abs(transition.reward) <= 3.0
            if transition.next_step_type == 2:
                sums.append(total)
                total = 0.0
        learned.append(sums)
        return learn(transitions)

    agent._learn = watch
    return learned


@pytest.mark.parametrize("agent", [DQN, PPO], ids=["dqn", "ppo"])
def test_both_agents_learn_from_the_value_and_the_lower_one_from_its_goals(network, agent):
    loop = loop_of(network, agent=agent, warm_start=True)
    player = loop.player
    assert isinstance(player, ByChoice)
    low, high = sums_of(player.agent), sums_of(player.selector)
    best = loop.run(5, SearchProgress(5, "accuracy", 0))
    assert len(loop.history) == len(low) == len(high) == 5
    for entry, lows, highs in zip(loop.history, low, high, strict=True):
        value = entry["reward"]
        assert highs == pytest.approx([value], abs=1e-5)
        missed = [abs(goal - reached) for _, goal, reached in entry["choices"]]
        expected = [(value - GOAL_WEIGHT * one) / (2.0 + GOAL_WEIGHT) for one in missed]
        assert lows == pytest.approx(expected, abs=1e-5)
        assert {path for path, _, _ in entry["choices"]} == set(network.groupings)
        assert entry["illegal_actions"] == 0
    assert any("selector_" in name for name in loop.history[-1]["losses"])
    assert best.value >= max(entry["reward"] for entry in loop.history)


def test_both_levels_play_a_demonstration(network):
    loop = loop_of(network, warm_start=True)
    loop.run(3, SearchProgress(3, "accuracy", 0))
    (shown,) = loop._demonstrations.values()
    entry = loop.history[0]
    assert entry["proposed_by"] == shown.name != DQN.name
    paths = [kernel.path for kernel in network.kernels]
    assert [path for path, _, _ in entry["choices"]] == paths
    network.reset()
    env = selection(network)
    env.reset()
    path, goal, reached = entry["choices"][0]
    levels = env.levels(path)
    wanted = 1.0 - shown.densities[path]
    nearest = np.argmin(np.abs(np.log(1 - levels) - np.log(1 - wanted)))
    assert goal == pytest.approx(levels[nearest])
    assert reached == pytest.approx(wanted, abs=0.35)  # as closely as three buckets allow


def test_with_training_as_recovery_the_last_step_is_paid_the_value():
    model = trained()
    with quick_autoencoder():
        network = CompressedNetwork(
            model,
            training_data(TRAIN, model, batch_size=32),
            evaluation_data(VALIDATION, model, "validation_data"),
            target=rls.Target(sparsity=0.6),
            recovery=rls.Recovery(method="finetune", steps=1),
        )
    loop = loop_of(network)
    learned = []
    loop.player.selector._learn = lambda transitions: learned.append(transitions) or {}
    loop.run(1, SearchProgress(1, "accuracy", 0))
    assert learned[0][-1].reward == pytest.approx(loop.history[0]["reward"])


@pytest.mark.parametrize("agent", [DQN, PPO], ids=["dqn", "ppo"])
def test_a_search_cut_off_goes_on_in_the_same_bits(network, tmp_path, agent):
    options = {"agent": agent, "curriculum": Staged(), "warm_start": agent is PPO}

    def opened(name: str) -> RunDirectory:
        run = RunDirectory(tmp_path / name, {"seed": 2}, {"model": "tiny"}, False)
        run.start()
        return run

    def figures(loop: SearchLoop) -> list:
        return [{k: v for k, v in entry.items() if k != "seconds"} for entry in loop.history]

    whole = loop_of(network, opened("whole"), **options)
    best = whole.run(7, SearchProgress(7, "accuracy", 0))
    for stop in (3, 4):  # in a stage, and at its end
        cut = loop_of(network, opened(f"cut_{stop}"), **options)
        play, played = cut.player.play, []

        def stopping(demonstration, play=play, played=played, stop=stop):
            if len(played) == stop:
                raise KeyboardInterrupt
            played.append(demonstration)
            play(demonstration)

        cut.player.play = stopping
        with pytest.raises(KeyboardInterrupt):
            cut.run(7, SearchProgress(7, "accuracy", 0))
        resumed = loop_of(network, opened(f"cut_{stop}"), **options)
        assert len(resumed.history) == stop
        again = resumed.run(7, SearchProgress(7, "accuracy", 0))
        assert figures(resumed) == figures(whole)
        assert again.plan == best.plan
        assert resumed.evaluations == whole.evaluations
        for name, one in whole.player.agents.items():
            other = resumed.player.agents[name].get_state()
            for key, value in one.get_state().items():
                np.testing.assert_array_equal(value, other[key], err_msg=f"{name} {key}")


def test_the_two_agents_have_seeds_of_their_own(network):
    states = [loop_of(network, seed=seed).player.agents for seed in (0, 0, 1)]
    generators = [
        {name: agent.get_state()["generator"].tolist() for name, agent in one.items()}
        for one in states
    ]
    assert generators[0] == generators[1]
    assert generators[0]["agent"] != generators[0]["selector"]
    assert generators[0]["selector"] != generators[2]["selector"]


# ---------------------------------------------------------------------- wrong calls


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"slots": 0}, "slots=0 cannot be used. Expected a whole number of at least 1."),
        ({"goals": 1}, "goals=1 cannot be used. Expected a whole number of at least 2."),
        ({"play": None}, "play=None cannot be called. Expected a function that decides the ker"),
        ({"network": 3}, "network=3 is a int. Expected a CompressedNetwork, made of a model"),
    ],
)
def test_wrong_arguments_are_refused(network, options, message):
    options = {"network": network, "play": print, **options}
    with pytest.raises(rls.ArgumentError, match=re.escape(message)):
        LayerSelectionEnvironment(options.pop("network"), options.pop("play"), **options)


def test_a_lower_level_that_does_not_decide_is_named(network):
    network.reset()
    env = LayerSelectionEnvironment(network, lambda choice: None)
    env.reset()
    with pytest.raises(rls.ArgumentError, match=r"left 48 groups of 'first/kernel' undecided\. Ex"):
        env.step(np.int32(0))


def test_a_network_that_is_decided_is_refused(network):
    env = selection(network)
    walk(env, lambda legal: legal[0])
    env.commit()
    with pytest.raises(rls.ArgumentError, match=r"Every kernel .* is decided already.*reset\(\)"):
        env.reset()
    network.reset()


@pytest.mark.parametrize("name", ["goal", "goal_weight"])
def test_goals_are_shares(network, name):
    with pytest.raises(rls.ArgumentError, match=rf"{name}=1\.5 cannot be used\. Expected a share"):
        LayerEnvironment(network, "first/kernel", **{name: 1.5})


def test_hierarchy_is_a_flag():
    with pytest.raises(rls.ArgumentError, match=r"hierarchy='yes' cannot be used\. Expected True"):
        compressor(trained(), hierarchy="yes")
    assert compressor(trained(), hierarchy=True).loop_settings().hierarchy is True
    assert compressor(trained()).loop_settings().hierarchy is False
