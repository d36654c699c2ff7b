"""The search in two levels: goals from above, met below, and the same contract as in one level."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tf_keras as keras
from tiny_search import (
    DQN,
    PPO,
    SPARSITY,
    TRAIN,
    VALIDATION,
    compressor,
    episodes_of,
    figures_of,
    interrupt,
    journal_of,
    quick_search,
    search,
    trained,
)

import rl_sparsity_tf as rls
from rl_sparsity_tf.agents.demonstrations import Demonstration, heuristic_plan
from rl_sparsity_tf.cli import main
from rl_sparsity_tf.console import SearchProgress
from rl_sparsity_tf.data.batches import evaluation_data, training_data
from rl_sparsity_tf.environment.features import FEATURES
from rl_sparsity_tf.environment.network import CompressedNetwork
from rl_sparsity_tf.environment.selection_environment import GOALS
from rl_sparsity_tf.errors import FileExistsRLSparsityError
from rl_sparsity_tf.search.arguments import decisions_for
from rl_sparsity_tf.search.episodes import (
    INTRINSIC,
    Episodes,
    HierarchicalEpisodes,
    LoopSettings,
    demonstrated_selection,
    make_episodes,
)
from rl_sparsity_tf.search.loop import SearchLoop

FIRST, LAST = "first/kernel", "last/kernel"
STEPS_OF_AN_EPISODE = 6  # two kernels, three buckets each
AGENTS = {"dqn": DQN, "ppo": PPO, "random": rls.Random()}


@pytest.fixture(scope="module", autouse=True)
def _quick():
    with quick_search():
        yield


def build(method="least_squares", target=None, group="element"):
    model = trained()
    target = target or rls.Target(sparsity=SPARSITY)
    return CompressedNetwork(
        model,
        training_data(TRAIN, model, batch_size=32),
        evaluation_data(VALIDATION, model, "validation_data"),
        target=target,
        decisions=decisions_for(model, target, group, None, "plan", "neighbours"),
        recovery=rls.Recovery(method=method, **({"steps": 1} if method == "finetune" else {})),
    )


@pytest.fixture(scope="module")
def fitted() -> CompressedNetwork:
    return build()


@pytest.fixture(scope="module")
def tuned() -> CompressedNetwork:
    return build("finetune")


def settings_of(agent=DQN, **options) -> LoopSettings:
    given = {"reward": rls.Reward(), "buckets": 6, "seed": 3, "warm_start": False}
    return LoopSettings(agent=agent, **{**given, "hierarchy": True, **options})


def episodes_on(network, agent=DQN, **options) -> HierarchicalEpisodes:
    found = make_episodes(settings_of(agent, **options), network)
    assert isinstance(found, HierarchicalEpisodes)
    return found


def watched(agent) -> list:
    """Every search episode's transitions as the agent learns from them."""
    seen, learn = [], agent._learn

    def watch(transitions):
        seen.append(transitions)
        return learn(transitions)

    agent._learn = watch
    return seen


def sums_of(transitions) -> list[float]:
    """What the rewards of each environment episode add up to."""
    sums, total = [], 0.0
    for transition in transitions:
        total += transition.reward
        if transition.next_step_type == 2:
            sums.append(total)
            total = 0.0
    return sums


# -- episodes ------------------------------------------------------------------------------------


def test_one_level_is_the_default(fitted):
    found = make_episodes(settings_of(hierarchy=False), fitted)
    assert type(found) is Episodes


@pytest.mark.slow
@pytest.mark.parametrize("agent", AGENTS)
@pytest.mark.parametrize("recovery", ["fitted", "tuned"])
def test_every_kernel_is_decided_once_and_the_target_met(agent, recovery, request):
    network = request.getfixturevalue(recovery)
    episodes = episodes_on(network, AGENTS[agent])
    orders = set()
    for _ in range(6):
        total = episodes.play()
        assert np.isfinite(total)
        order = [environment.kernel for environment in episodes._played]
        assert sorted(order) == [FIRST, LAST]
        orders.add(tuple(order))
        assert all(network.decided[path].all() for path in order)
        assert network.budget.pruned.sum() == network.budget.wanted
        losses = episodes.learn(rls.Reward()(network.outcome, None))
        assert all(np.isfinite(loss) for loss in losses.values())
    assert episodes.illegal_actions == 0
    assert len(orders) == 2  # the order is a decision
    if agent != "random":
        name = {"dqn": "td_loss", "ppo": "policy_loss"}[agent]
        assert {name, f"selection_{name}"} <= set(losses)


def test_the_lower_level_sees_its_goal_and_has_an_edge_there(fitted):
    episodes, seen = episodes_on(fitted, "random"), []
    names = [feature.name for feature in FEATURES]
    play = episodes._play_layer

    def watch(environment, demonstration):
        environment.commit()
        state = environment.reset().observation["state"]
        shares = environment._edges / environment.grouping.count
        seen.append((environment.goal, state[names.index("goal")], shares, environment.later))
        return play(environment, demonstration)

    episodes._play_layer = watch
    for _ in range(4):
        episodes.play()
        episodes.learn(0.0)
    assert len({goal for goal, *_ in seen}) > 2
    for goal, shown, shares, _ in seen:
        assert shown == pytest.approx(goal)
        if 0.25 < goal < 0.75:  # else the edge is moved so that every bucket holds a group
            assert np.abs(shares - goal).min() < 1e-9
    assert [len(later) for *_, later in seen] == [1, 0] * 4


def test_only_the_last_kernel_played_evaluates(fitted):
    fitted.seen.clear()
    episodes = episodes_on(fitted, "random")
    counts = []
    play = episodes._play_layer
    episodes._play_layer = lambda *given: (play(*given), counts.append(fitted.evaluations))[0]
    for number in range(5):
        episodes.play()
        episodes.learn(0.0)
        before = counts[2 * number - 1] if number else 0
        assert counts[2 * number] == before
        assert counts[2 * number + 1] in (before, before + 1)
    assert counts[-1] >= 3


def test_no_two_episodes_take_the_same_decisions(fitted):
    episodes = episodes_on(fitted, "random", buckets=3)
    sequences = set()
    for _ in range(12):
        episodes.play()
        sequences.add(episodes.tree._played[-1].tobytes())
        episodes.learn(0.0)
    assert len(sequences) == 12


# -- what is learned from ------------------------------------------------------------------------


def test_the_lower_level_pays_for_what_it_missed_its_goal_by(fitted):
    episodes = episodes_on(fitted, "random")
    below, above = watched(episodes.agent), watched(episodes.selector)
    for value in (0.5, -0.25):
        episodes.play()
        goals = [one.goal for one in episodes._played]  # an environment keeps its last goal
        sizes = {FIRST: 48, LAST: 24}
        expected = [
            value - INTRINSIC * abs((fitted.plan.kernels[one.kernel].sparsity) - goal)
            for one, goal in zip(episodes._played, goals, strict=True)
        ]
        pruned = [fitted.budget.pruned[one.index] / sizes[one.kernel] for one in episodes._played]
        assert episodes.misses == pytest.approx(np.abs(np.subtract(pruned, goals)))
        episodes.learn(value)
        assert sums_of(below[-1]) == pytest.approx(expected)
        assert sum(sums_of(above[-1])) == pytest.approx(value)
        assert len(above[-1]) == 2


def test_where_every_decision_is_evaluated_the_difference_is_a_bonus(tuned):
    episodes = episodes_on(tuned, "random")
    below, above = watched(episodes.agent), watched(episodes.selector)
    episodes.play()
    plain = [t.reward for t in episodes.agent._episode if t.next_step_type == 2]
    episodes.learn(0.25)
    ends = [t.reward for t in below[-1] if t.next_step_type == 2]
    bonuses = [0.25 - INTRINSIC * miss for miss in episodes.misses]
    assert ends == pytest.approx(np.clip(np.add(plain, bonuses), -1, 1))
    assert sum(sums_of(above[-1])) == pytest.approx(0.25)


def test_a_goal_that_is_met_costs_nothing(fitted):
    episodes = episodes_on(fitted)
    below = watched(episodes.agent)
    density = {FIRST: 1 - 29 / 48, LAST: 1 - 15 / 24}  # the target's share of both
    episodes.play(Demonstration("uniform", density))
    assert episodes.misses == pytest.approx([0.0, 0.0])
    episodes.learn(0.75)
    assert sums_of(below[-1]) == pytest.approx([0.75, 0.75])


# -- demonstrations ------------------------------------------------------------------------------


@pytest.mark.parametrize("agent", ["dqn", "ppo"])
def test_demonstrations_force_both_levels(agent, fitted):
    episodes = episodes_on(fitted, AGENTS[agent])
    below, above = watched(episodes.agent), watched(episodes.selector)
    episodes.play(Demonstration("skewed", {FIRST: 0.2, LAST: 0.8}))
    losses = episodes.learn(0.5)
    assert all(transition.forced for transition in below[-1] + above[-1])
    # The slots' order, and the goal nearest to the density: 20 % of the last, the rest follows.
    assert [one.kernel for one in episodes._played] == [LAST, FIRST]
    assert above[-1][0].action // GOALS == 0
    assert episodes._played[1].goal == pytest.approx(39 / 48)
    assert fitted.budget.pruned.tolist() == [39, 5]
    if agent == "ppo":
        assert {"imitation_loss", "selection_imitation_loss"} <= set(losses)


@pytest.mark.parametrize("density", [0.05, 0.3, 0.4, 1.0])
def test_the_nearest_legal_goal_is_shown(density, fitted):
    episodes = episodes_on(fitted)
    episodes.selection.reset()
    action = demonstrated_selection(
        episodes.selection, Demonstration("one", {LAST: density, FIRST: 0.4})
    )
    legal = episodes.selection.current_time_step().observation["legal"][:GOALS]
    goals = np.where(legal > 0, episodes.selection.goals(0), np.inf)
    assert abs(goals[action] - (1 - density)) == np.abs(goals - (1 - density)).min()


@pytest.mark.slow
def test_a_warm_start_shows_a_third(fitted):
    loop = SearchLoop(settings_of(warm_start=True), fitted)
    below = watched(loop.episodes.agent)
    loop.run(6, SearchProgress(6, "accuracy", 0))
    names = [entry["proposed_by"] for entry in loop.history]
    assert "dqn" not in names[:2]
    assert all(transition.forced for transition in below[0] + below[1])
    assert not any(transition.forced for transition in below[2])
    assert names[2:] == ["dqn"] * 4
    assert [entry["illegal_actions"] for entry in loop.history] == [0] * 6


# -- the gradient through the masks --------------------------------------------------------------


@pytest.mark.slow
def test_the_relaxed_reward_follows_the_order_of_play(fitted):
    config = rls.PPO(hidden_layers=(8,), num_epochs=1, relaxed_reward=1.0)
    episodes = episodes_on(fitted, config)
    assert episodes.agent.config.relaxed_reward == 1.0
    assert episodes.selector.config == rls.PPO(hidden_layers=(8,), num_epochs=1)
    followed = []
    follow = episodes._relaxation.follow
    episodes._relaxation.follow = lambda decisions: (followed.append(decisions), follow(decisions))
    orders = set()
    for _ in range(6):
        episodes.play()
        order = [one.kernel for one in episodes._played]
        losses = episodes.learn(0.5)
        assert [path for path, _ in followed[-1]] == [path for path in order for _ in range(6)]
        assert np.isfinite(losses["relaxed_loss"])
        orders.add(tuple(order))
    assert len(orders) == 2


# -- other targets -------------------------------------------------------------------------------


def wide() -> keras.Model:
    keras.utils.set_random_seed(5)
    stack = [keras.layers.Input((6,))]
    stack += [keras.layers.Dense(width, "relu", name=f"dense_{width}") for width in (16, 12, 10)]
    model = keras.Sequential([*stack, keras.layers.Dense(3, "softmax", name="last")])
    model.compile("adam", "sparse_categorical_crossentropy", ["accuracy"])
    model.fit(*TRAIN, epochs=3, verbose=0)
    return model


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "group"),
    [(rls.Target(tflite_bytes=5600), "element"), (rls.Target(macs=0.4), "channel")],
    ids=["bytes", "macs"],
)
def test_targets_of_cost_are_held_in_every_episode(target, group):
    model = wide()
    network = CompressedNetwork(
        model,
        training_data(TRAIN, model, batch_size=32),
        evaluation_data(VALIDATION, model, "validation_data"),
        target=target,
        decisions=decisions_for(model, target, group, None, "plan", "neighbours"),
    )
    episodes, budget = episodes_on(network, "random"), network.budget
    for _ in range(6):
        episodes.play()
        pruned = [state.pruned for state in network.states()]
        integers = [state.quantized and not state.kept for state in network.states()]
        assert budget.total(pruned, integers) <= budget.limit + budget.slack
        assert all(decided.all() for decided in network.decided.values())
        episodes.learn(0.0)
    assert episodes.illegal_actions == 0


# -- keeping, repeating, going on ----------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("agent", AGENTS)
def test_a_state_goes_on_in_the_same_bits(agent, fitted):
    def on(episodes, count):
        trail = []
        for _ in range(count):
            episodes.play()
            trail.append(fitted.plan.to_json())
            trail.append(episodes.learn(rls.Reward()(fitted.outcome, None)))
        return trail

    one = episodes_on(fitted, AGENTS[agent])
    on(one, 3)
    saved = {key: value.copy() for key, value in one.get_state().items()}
    expected = on(one, 3)
    other = episodes_on(fitted, AGENTS[agent], seed=8)
    other.set_state(saved)
    assert on(other, 3) == expected
    different = episodes_on(fitted, AGENTS[agent], seed=8)
    assert on(different, 3) != expected


def test_the_levels_draw_from_different_streams(fitted):
    episodes = episodes_on(fitted, "random")
    assert episodes.agent._generator.random() != episodes.selector._generator.random()


@pytest.mark.slow
@pytest.mark.parametrize("agent", ["dqn", "ppo"])
def test_nothing_is_traced_again(agent, fitted):
    episodes, counts = episodes_on(fitted, AGENTS[agent]), []
    for _ in range(4):
        episodes.play()
        episodes.learn(0.5)
        agents = (episodes.agent, episodes.selector)
        counts.append([fitted.tracing_count(), *(one.tracing_count() for one in agents)])
    assert counts[-1] == counts[1]  # from the second episode on the replay is large enough


@pytest.mark.slow
def test_a_search_cut_off_in_an_episode_ends_in_the_same_bits(tmp_path):
    options = {"recovery": "least_squares", "agent": PPO}
    one = compressor(trained(), directory=tmp_path / "whole", hierarchy=True, **options)
    whole = search(one, finetune_epochs=0)
    cut = compressor(trained(), directory=tmp_path / "cut", hierarchy=True, **options)
    interrupt(cut, after=2 * STEPS_OF_AN_EPISODE + 3, finetune_epochs=0)
    assert len(journal_of(tmp_path / "cut")) == 2
    with pytest.raises(
        FileExistsRLSparsityError, match=r"differs in hierarchy \(True, now False\)"
    ):
        search(compressor(trained(), directory=tmp_path / "cut", **options), finetune_epochs=0)
    again = compressor(trained(), directory=tmp_path / "cut", hierarchy=True, **options)
    resumed = search(again, finetune_epochs=0)
    assert figures_of(resumed.history) == figures_of(whole.history)
    assert resumed.plan.to_json() == whole.plan.to_json()
    for one, other in zip(whole.model.get_weights(), resumed.model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    files = [(tmp_path / name / "model.tflite").read_bytes() for name in ("whole", "cut")]
    assert files[0] == files[1]


@pytest.mark.slow
def test_the_search_ends_in_a_result_that_meets_the_target(tmp_path):
    one = compressor(trained(), directory=tmp_path / "run", hierarchy=True)
    result = search(one, finetune_epochs=0)
    pruned = result.plan.count_operations()["prune"]
    assert pruned == int(np.ceil(SPARSITY * 72))
    assert result.candidate.value >= max(entry["reward"] for entry in result.history)
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["arguments"]["hierarchy"] is True
    two = compressor(trained(), directory=tmp_path / "same", hierarchy=True)
    same = episodes_of(two, finetune_epochs=0)
    assert figures_of(same) == figures_of(result.history)


@pytest.mark.parametrize("given", [[], ["--hierarchy"]])
def test_the_command_line_passes_it_on(given, tmp_path, monkeypatch):
    asked = []

    def stopping(*_, **options):
        asked.append(options["hierarchy"])
        raise rls.ArgumentError("that is enough")

    monkeypatch.setattr("rl_sparsity_tf.search.compressor.Compressor", stopping)
    trained().save(tmp_path / "model.keras")
    command = ["compress", str(tmp_path / "model.keras"), "--dataset", "digits"]
    assert main([*command, "--output", str(tmp_path / "run"), *given]) == 2
    assert asked == [bool(given)]


@pytest.mark.parametrize("near", [False, True])
def test_a_plan_that_the_goals_lie_around_can_be_played(fitted, near):
    """Its densities are among the choices of both levels, to a group of each kernel."""
    episodes = episodes_on(fitted)
    fitted.reset()
    plan = heuristic_plan(fitted, "erk")
    episodes.centre(plan, near)
    episodes.play(Demonstration.of("erk", plan))
    played = fitted.plan
    for path, entry in plan.kernels.items():
        groups = fitted.groupings[path].count
        assert played.kernels[path].sparsity == pytest.approx(entry.sparsity, abs=2.5 / groups)
    assert all(miss <= 2.5 / 24 for miss in episodes.misses)
