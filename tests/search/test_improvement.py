"""Searches whose episodes are moves from the best plan: whole, staged, in bytes, and resumed."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tiny_search as tiny
from tiny_search import (
    DQN,
    PPO,
    WIDE_TRAIN,
    WIDE_VALIDATION,
    compressor,
    quick_search,
    search,
    wide_network,
)

import rl_sparsity_tf as rls
from rl_sparsity_tf.agents.demonstrations import proposals
from rl_sparsity_tf.agents.policies import SavedPolicy
from rl_sparsity_tf.console import SearchProgress
from rl_sparsity_tf.environment.curriculum import Staged
from rl_sparsity_tf.environment.reward import Reward
from rl_sparsity_tf.search.episodes import ImprovementEpisodes, LoopSettings, make_episodes
from rl_sparsity_tf.search.loop import SearchLoop

TARGET = rls.Target(sparsity=0.85)


@pytest.fixture(scope="module", autouse=True)
def _quick():
    with quick_search():
        yield


def settings(agent, **options):
    given = {"reward": Reward(), "buckets": 3, "seed": 0, "warm_start": True, **options}
    return LoopSettings(agent=agent, strategy="improve", **given)


def played(agent, episodes, target=TARGET, **options):
    loop = SearchLoop(settings(agent, **options), wide_network(target))
    loop.run(episodes, SearchProgress(episodes, "accuracy", 0))
    return loop


@pytest.mark.slow
@pytest.mark.parametrize("agent", [DQN, PPO, rls.Random()], ids=["dqn", "ppo", "random"])
def test_an_episode_is_a_move_from_the_best_plan(agent):
    loop = played(agent, 9)
    assert isinstance(loop.episodes, ImprovementEpisodes)
    assert [entry["proposed_by"] for entry in loop.history] == [agent.name] * 9
    assert all(entry["sparsity"] >= TARGET.sparsity for entry in loop.history)
    # It starts with the best of the plans that were proposed, and never falls behind it.
    names = {name for name, _ in proposals(loop.network)}
    assert names <= {name for name, _ in loop.proposed} | {"previous_stage"}
    assert loop.episodes.environment.value <= loop.best.value
    assert loop.best.value >= max(entry["reward"] for entry in loop.history)
    known = loop.episodes.environment._position.known
    assert sum(moves for moves, _ in known.counts.values()) == 9
    assert known.counts["rank_all"][0] >= 3  # the first ones are
    # The first moves were not the policy's: of them it learns nothing unless it learns off-policy.
    learned = [bool(entry["losses"]) for entry in loop.history]
    assert not any(learned[:3]) or agent is DQN


@pytest.mark.slow
def test_the_policy_that_comes_with_the_package_chooses_moves_without_chance():
    policy = SavedPolicy.load("pretrained")
    loops = [played(policy.agent, 7, policy=policy, seed=seed) for seed in (0, 1)]
    rewards = [[entry["reward"] for entry in loop.history] for loop in loops]
    assert rewards[0] == rewards[1]
    others = [played(DQN, 7, seed=seed) for seed in (0, 1)]
    assert [entry["reward"] for entry in others[0].history] != rewards[0]


@pytest.mark.slow
def test_every_stage_of_a_curriculum_starts_from_the_stage_before():
    loop = played(rls.Random(), 8, curriculum=Staged(stages=(0.5, 1.0)))
    shares = [entry["sparsity"] for entry in loop.history]
    assert all(share < 0.7 for share in shares[:4])
    assert all(share >= TARGET.sparsity for share in shares[4:])
    assert loop.episodes.environment.plan.sparsity >= TARGET.sparsity


@pytest.fixture(scope="module")
def in_bytes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bytes") / "run"
    one = compressor(
        tiny.wide(),
        DQN,
        target=rls.Target(tflite_bytes=5000),
        directory=folder,
        strategy="improve",
        recovery="least_squares",
    )
    return one, search(
        one, train=WIDE_TRAIN, validation_data=WIDE_VALIDATION, episodes=6, finetune_epochs=1
    )


@pytest.mark.slow
def test_a_search_ends_with_a_file_of_the_bytes(in_bytes, tmp_path):
    one, result = in_bytes
    assert result.metrics["compressed"]["tflite_bytes"] <= 5000
    assert len(result.history) == 6
    manifest = json.loads((one.directory / "manifest.json").read_text())
    assert manifest["arguments"]["strategy"] == "improve"
    # What its agent has learned begins another search of moves.
    result.save_policy(tmp_path / "policy.npz")
    policy = rls.Compressor(tiny.wide(), policy=tmp_path / "policy.npz", strategy="improve").policy
    begun = make_episodes(settings(DQN, policy=policy), wide_network(TARGET)).agent.policy_arrays()
    for one, other in zip(begun, result.policy.weights, strict=True):
        np.testing.assert_array_equal(one, other)
    fresh = make_episodes(settings(DQN), wide_network(TARGET)).agent.policy_arrays()
    assert any((one != other).any() for one, other in zip(begun, fresh, strict=True))


@pytest.mark.slow
def test_accuracy_drops_are_searched_so_too():
    one = compressor(
        tiny.wide(),
        "random",
        target=rls.Target(max_accuracy_drop=0.1),
        strategy="improve",
        recovery="least_squares",
    )
    result = search(
        one, train=WIDE_TRAIN, validation_data=WIDE_VALIDATION, episodes=4, finetune_epochs=1
    )
    dense, compressed = result.metrics["search"], result.metrics["compressed"]
    assert compressed["validation_metric"] >= dense["dense_validation_metric"] - 0.1
    assert compressed["tflite_bytes"] < result.metrics["dense_int8"]["tflite_bytes"]


CONFLICTS = {
    "hierarchy": ({"hierarchy": True}, r"does not go with hierarchy=True: the order of layers"),
    "recovery": ({"recovery": "none"}, r"does not go with recovery='none': its rankings are made"),
    "channels": (
        {"target": rls.Target(macs=0.5), "recovery": None},
        r"does not go with group='channel'",
    ),
    "name": ({"strategy": "better"}, r"strategy='better'.*construct.*improve"),
}


@pytest.mark.parametrize("case", CONFLICTS)
def test_what_does_not_go_with_it_is_said_before_anything_runs(case):
    options, message = CONFLICTS[case]
    given = {"strategy": "improve", "recovery": "least_squares", **options}
    if "macs" in str(options.get("target")):
        given["target"] = rls.Target(macs=0.5)
    with pytest.raises(rls.ArgumentError, match=message):
        compressor(tiny.wide(), None, **given)
