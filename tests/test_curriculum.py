"""Curricula: what they ask for when, the easier budgets, and what a stage starts from."""

from __future__ import annotations

import re

import numpy as np
import pytest
import tf_keras as keras
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_search import DQN, TRAIN, compressor, quick_autoencoder, trained

import rl_sparsity_tf as rls
from rl_sparsity_tf.channel_budget import ChannelBudget
from rl_sparsity_tf.cost_budget import CostBudget
from rl_sparsity_tf.curriculum import Constant, Linear, Staged, resolve_curriculum
from rl_sparsity_tf.data import evaluation_data, training_data
from rl_sparsity_tf.decisions import KernelDecisions
from rl_sparsity_tf.demonstrations import Demonstration
from rl_sparsity_tf.environment import LayerEnvironment
from rl_sparsity_tf.network import CompressedNetwork
from rl_sparsity_tf.progress import SearchProgress
from rl_sparsity_tf.search_loop import LoopSettings, SearchLoop
from rl_sparsity_tf.size_budget import SizeBudget
from rl_sparsity_tf.stages import BEST_BEFORE, Stages, easier_budget


def built(
    target: rls.Target,
    decisions: KernelDecisions | None = None,
    model: keras.Model | None = None,
    data: tuple[np.ndarray, np.ndarray] = TRAIN,
) -> CompressedNetwork:
    model = model or trained()
    with quick_autoencoder():
        return CompressedNetwork(
            model,
            training_data(data, model, batch_size=32),
            evaluation_data(data, model, "validation_data"),
            target=target,
            decisions=decisions,
        )


def built_for_bytes(count: int) -> CompressedNetwork:
    """A network of 6.6 kB as int8; the tiny one is so small that zeros save nothing."""
    keras.utils.set_random_seed(3)
    layers = keras.layers
    model = keras.Sequential(
        [
            layers.Input((60,)),
            layers.Dense(64, activation="relu", name="first"),
            layers.Dense(3, activation="softmax", name="last"),
        ]
    )
    model.compile("adam", "sparse_categorical_crossentropy", ["accuracy"])
    rng = np.random.default_rng(0)
    data = rng.normal(size=(64, 60)).astype(np.float32), rng.integers(0, 3, 64)
    return built(rls.Target(tflite_bytes=count), model=model, data=data)


@pytest.fixture(scope="module")
def network() -> CompressedNetwork:
    return built(rls.Target(sparsity=0.8))


# ---------------------------------------------------------------------- what is asked for when


def shares(curriculum, episodes: int) -> list[float]:
    return [curriculum.share(episode, episodes) for episode in range(episodes)]


def test_the_shares_of_every_curriculum():
    assert shares(Constant(), 3) == [1.0] * 3
    assert shares(Staged(), 6) == [0.5, 0.5, 0.8, 0.8, 1.0, 1.0]
    assert shares(Staged(stages=(0.25, 1.0)), 3) == [0.25, 1.0, 1.0]
    assert shares(Linear(start=0.5, steps=2), 10) == [0.5] * 3 + [0.75] * 3 + [1.0] * 4
    assert shares(Linear(start=0.2, share_of_episodes=0.5, steps=4), 8) == pytest.approx(
        [0.2, 0.4, 0.6, 0.8] + [1.0] * 4
    )


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    episodes=st.integers(1, 60),
    curriculum=st.sampled_from(
        [Constant(), Staged(), Staged((0.1, 0.2, 0.3, 0.9, 1.0)), Linear(), Linear(0.9, 0.99, 30)]
    ),
)
def test_shares_rise_and_the_last_episode_asks_for_everything(episodes, curriculum):
    found = shares(curriculum, episodes)
    assert found == sorted(found)
    assert 0.0 < found[0] <= found[-1] == 1.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Linear(start=0.0), "Linear(start=0.0) cannot be used. Expected a share above 0"),
        (lambda: Linear(start=1.5), "Linear(start=1.5) cannot be used. Expected a share above 0 a"),
        (lambda: Linear(start="x"), "Linear(start='x') cannot be used. Expected a share above 0 a"),
        (lambda: Linear(share_of_episodes=1.0), "share_of_episodes=1.0) cannot be used. Expected"),
        (lambda: Linear(steps=0), "Linear(steps=0) cannot be used. Expected a whole number of at"),
        (lambda: Linear(steps=True), "Linear(steps=True) cannot be used. Expected a whole number"),
        (lambda: Staged(stages=()), "Staged(stages=()) cannot be used. Expected the stages' shar"),
        (lambda: Staged(stages=0.5), "Staged(stages=0.5) cannot be used. Expected the stages' sh"),
        (lambda: Staged(stages=(0.5, 0.8)), "(0.5, 0.8)) does not rise to 1. Expected every stag"),
        (lambda: Staged(stages=(0.8, 0.5, 1.0)), "does not rise to 1. Expected every stage above"),
        (lambda: Staged(stages=(-0.5, 1.0)), "stages=-0.5) cannot be used. Expected a share abov"),
        (lambda: resolve_curriculum("staget"), "staget"),
        (lambda: resolve_curriculum(Staged), "curriculum=Staged is a class; expected an object."),
        (lambda: resolve_curriculum(0.5), "curriculum=0.5 is a float. Expected 'constant', 'linea"),
    ],
)
def test_wrong_settings_are_refused(make, message):
    with pytest.raises(rls.ArgumentError, match=re.escape(message)):
        make()


def test_curricula_by_name_and_as_plain_data():
    assert resolve_curriculum(None) == Constant()
    assert resolve_curriculum("linear") == Linear()
    assert resolve_curriculum("staged") == Staged(stages=[0.5, 0.8, 1.0])
    assert Staged((0.5, 1)).to_dict() == {"curriculum": "staged", "stages": (0.5, 1)}
    one = compressor(trained(), curriculum="staged")
    assert one.loop_settings().curriculum == Staged()
    assert compressor(trained()).loop_settings().curriculum == Constant()


# ---------------------------------------------------------------------- budgets


def cost_now(network: CompressedNetwork) -> float:
    budget = network.budget
    assert isinstance(budget, CostBudget)
    return budget.expected(network.states())


@pytest.mark.parametrize("kind", ["sparsity", "bytes"])
def test_half_the_pruning_is_asked_for_and_met(network, kind):
    network = network if kind == "sparsity" else built_for_bytes(4500)
    whole = network.budget
    assert easier_budget(network, whole, 1.0) is whole
    half = network.budget = easier_budget(network, whole, 0.5)
    assert type(half) is type(whole)
    network.reset()
    if isinstance(whole, SizeBudget):
        unpruned = cost_now(network)
        assert whole.limit < unpruned
        assert half.limit == pytest.approx((unpruned + whole.limit) / 2)
    else:
        assert half.goal == pytest.approx(whole.goal / 2)
    for kernel in network.kernels:
        environment = LayerEnvironment(network, kernel.path, buckets=4)
        step = environment.reset()
        while not step.is_last():
            legal = step.observation["legal"]
            prune = legal[rls.Operation.PRUNE]
            step = environment.step(
                np.int32(rls.Operation.PRUNE if prune else rls.Operation.QUANTIZE)
            )
        assert environment.illegal_actions == 0
    if isinstance(half, SizeBudget):
        assert whole.limit < cost_now(network) <= half.limit + half.slack
    else:
        assert half.pruned.sum() == half.wanted == 29  # of 72, for 0.4
    network.budget = whole


def test_half_the_channels_are_asked_for():
    from rl_sparsity_tf.channel_decisions import ChannelDecisions

    network = built(rls.Target(macs=0.4), ChannelDecisions())
    whole = network.budget
    half = easier_budget(network, whole, 0.5)
    assert isinstance(whole, ChannelBudget)
    assert isinstance(half, ChannelBudget)
    assert half.limit == pytest.approx((whole.whole + whole.limit) / 2)
    assert half.goal == pytest.approx(whole.goal / 2)
    assert half.pruned_share < whole.pruned_share


# ---------------------------------------------------------------------- stages


def loop_of(network: CompressedNetwork, curriculum, **options) -> SearchLoop:
    network.seen.clear()
    options = {"agent": DQN, "buckets": 4, "seed": 2, "warm_start": False, **options}
    return SearchLoop(LoopSettings(reward=rls.Reward(), curriculum=curriculum, **options), network)


def test_only_plans_of_the_whole_target_are_returned(network):
    whole = network.budget
    loop = loop_of(network, Staged())
    best = loop.run(9, SearchProgress(9, "accuracy", 0))
    history = loop.history
    assert [entry["target_share"] for entry in history] == [0.5] * 3 + [0.8] * 3 + [1.0] * 3
    for entry in history:
        # Weights are whole, and what is wanted is rounded up.
        assert 0 <= entry["sparsity"] - 0.8 * entry["target_share"] < 1 / 72
    assert not any(entry["improved"] for entry in history[:6])
    assert best.value == max(entry["reward"] for entry in history[6:])
    assert best.outcome.target_sparsity == 0.8
    assert network.budget is whole
    assert loop.evaluations <= 9


def test_a_stage_begins_with_the_best_plan_of_the_one_before(network):
    loop = loop_of(network, Staged())
    loop.run(9, SearchProgress(9, "accuracy", 0))
    names = [entry["proposed_by"] for entry in loop.history]
    assert [index for index, name in enumerate(names) if name == BEST_BEFORE] == [3, 6]
    # With a warm start the first stage has a heuristic's plan to begin with.
    loop = loop_of(network, Staged(), warm_start=True)
    loop.run(9, SearchProgress(9, "accuracy", 0))
    names = [entry["proposed_by"] for entry in loop.history]
    assert names[0] not in (DQN.name, BEST_BEFORE)
    assert [index for index, name in enumerate(names) if name == BEST_BEFORE] == [3, 6]


def test_densities_are_scaled_in_proportion_to_meet_the_stage(network):
    stages = Stages(Staged((0.5, 1.0)), network)
    assert stages.enter(0, 4)
    assert not stages.final
    network.reset()
    first, last = network.kernels
    count = network.groupings[first.path].count
    network.decide(first.path, np.arange(count // 2), rls.Operation.PRUNE)
    stages.record(0.1)
    stages.record(0.3)
    stages.record(0.2)  # no better
    assert stages.best_value == 0.3
    assert not stages.enter(1, 4)
    assert stages.enter(2, 4)
    assert stages.final
    assert stages.best_value == -1.0
    shown = stages.demonstrations([], 2, 4)
    assert list(shown) == [2]
    assert shown[2].name == BEST_BEFORE
    densities = shown[2].densities
    # 0.5 and 1 before: the second kernel stays twice as dense.
    assert densities[last.path] / densities[first.path] == pytest.approx(2.0, rel=0.2)
    kept = sum(densities[kernel.path] * kernel.size for kernel in network.kernels)
    assert kept == pytest.approx(72 - network.budget.wanted)
    stages.leave()


def test_stages_go_on_from_their_arrays(network):
    known = [Demonstration("even", {kernel.path: 0.2 for kernel in network.kernels})]
    stages = Stages(Staged(), network)
    stages.enter(0, 9)
    network.reset()
    stages.record(0.5)
    stages.enter(3, 9)
    stages.record(0.25)
    shown = stages.demonstrations(known, 3, 9)
    stages.leave()
    other = Stages(Staged(), network)
    other.set_arrays(stages.to_arrays())
    assert other.enter(4, 9)  # in the middle of the stage
    assert other.best_value == 0.25
    assert other.demonstrations(known, 4, 9) == shown
    other.leave()
    boundary = Stages(Staged(), network)
    boundary.set_arrays(stages.to_arrays())
    assert boundary.enter(6, 9)  # what was the best is what was before
    assert boundary.best_value == -1.0
    boundary.leave()


def test_the_buckets_follow_the_stage(network):
    loop = loop_of(network, Staged((0.25, 1.0)))
    edges = []
    decide = loop.player._decide

    def watch(environment, demonstration):
        edges.append(environment._edges.tolist())
        decide(environment, demonstration)

    loop.player._decide = watch
    loop.run(2, SearchProgress(2, "accuracy", 0))
    assert edges[0] != edges[2]
    assert len(edges[0]) == len(edges[2])
