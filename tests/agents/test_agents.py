from __future__ import annotations

import dataclasses
import importlib.util
import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from tf_agents.agents.dqn import dqn_agent
from tf_agents.agents.ppo import ppo_clip_agent
from tf_agents.specs import array_spec
from tf_agents.trajectories import time_step as ts

from rl_sparsity_tf.agents import base
from rl_sparsity_tf.agents.configs import (
    DQN,
    PPO,
    Random,
    build_agent,
    config_from_dict,
)
from rl_sparsity_tf.environment import _tf_agents  # noqa: F401  (TF-Agents with Keras 2)
from rl_sparsity_tf.errors import (
    AgentStateError,
    ArgumentError,
    MissingDependencyError,
)

_spec = importlib.util.spec_from_file_location(
    "toy_environments", Path(__file__).parents[1] / "helpers" / "toy_environments.py"
)
toy = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(toy)

SMALL = {
    "dqn": DQN(hidden_layers=(16,), train_steps=5, batch_size=8, replay_capacity=200),
    "ppo": PPO(hidden_layers=(16,), num_epochs=3),
    "random": Random(),
}


def build(agent: Any, env: Any, seed: int = 0) -> Any:
    return build_agent(agent, env.time_step_spec(), env.action_spec(), seed=seed)


def play(agent: Any, env: Any, search_episodes: int, steps: int = 2) -> list[float]:
    losses: list[float] = []
    for _ in range(search_episodes):
        toy.play_search_episode(env, agent, steps)
        losses += agent.end_episode().values()
    return losses


def actions_of(agent: Any, seed: int = 5) -> list[int]:
    """The actions of one exploring and one greedy episode, without learning."""
    env = toy.ContextualEnvironment(seed=seed)
    taken = []
    for explore in (True, False):
        time_step = env.reset()
        while not time_step.is_last():
            taken.append(agent.act(time_step, explore=explore))
            time_step = env.step(taken[-1])
    return taken


# -- configurations ------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [DQN(n_step=2), PPO(entropy=0.0), Random()])
def test_configuration_survives_json(config: Any) -> None:
    text = json.dumps(config.to_dict())
    assert type(config).from_dict(json.loads(text)) == config
    assert config_from_dict(json.loads(text)) == config


def test_configurations_are_frozen_and_keyword_only() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        DQN().discount = 0.5  # type: ignore[misc]
    with pytest.raises(TypeError):
        PPO(0.1)  # type: ignore[misc]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DQN(learning_rate=0), r"DQN\(learning_rate=0\): expected a number above 0"),
        (lambda: DQN(learning_rate="x"), r"learning_rate='x'\): expected a number"),
        (lambda: DQN(discount=1.5), r"discount=1.5\): expected a number of at least 0 and at mo"),
        (lambda: DQN(discount=float("nan")), r"discount=nan\): expected a number"),
        (lambda: DQN(batch_size=2.5), r"batch_size=2.5\): expected an integer of at least 1"),
        (lambda: DQN(train_steps=True), r"train_steps=True\): expected an integer"),
        (lambda: DQN(hidden_layers=(0,)), r"hidden_layers=\(0,\)\): expected a sequence of layer"),
        (lambda: PPO(hidden_layers=(8, 0)), r"hidden_layers=\(8, 0\)\): expected a sequence"),
        (lambda: PPO(hidden_layers=8), r"hidden_layers=8\): expected a sequence"),
        (lambda: DQN(exploration="epsilom"), "Did you mean 'epsilon'"),
        (lambda: DQN(epsilon_start=0.1, epsilon_end=0.2), "epsilon_end at most epsilon_start"),
        (lambda: DQN(replay_capacity=4, n_step=3), "Raise replay_capacity to at least 5"),
        (lambda: DQN(double=1), r"double=1\): expected True or False"),
        (lambda: PPO(clip_ratio=0), r"clip_ratio=0\): expected a number above 0 and at most 1"),
        (lambda: PPO(episodes_per_update=0), r"expected an integer of at least 1, for instance"),
        (
            lambda: DQN.from_dict({"agent": "ppo"}),
            r"agent='ppo'\. Expected those of 'dqn': use the",
        ),
        (lambda: DQN.from_dict({"discont": 1}), "no setting 'discont'.*Did you mean 'discount'"),
        (lambda: config_from_dict({}), "agent=None is not known"),
    ],
)
def test_bad_settings_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        make()


def test_epsilon_falls_linearly_and_stays() -> None:
    config = DQN(epsilon_start=1.0, epsilon_end=0.2, epsilon_episodes=4)
    assert [round(config.epsilon(i), 6) for i in (0, 1, 2, 4, 9)] == [1.0, 0.8, 0.6, 0.2, 0.2]


# -- building ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("agent", "message"),
    [
        ("dqm", "agent='dqm' is not known.*Did you mean 'dqn'"),
        (3, "agent=3 is a int; expected 'dqn', 'ppo', 'random' or a configuration"),
        (DQN, r"agent=DQN is a class; expected an object. Write DQN\(\)"),
    ],
)
def test_unknown_agents_are_refused(agent: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        build(agent, toy.ContextualEnvironment())


@pytest.mark.parametrize("seed", [-1, 0.5, True])
def test_bad_seed_is_refused(seed: Any) -> None:
    with pytest.raises(ArgumentError, match="expected a non-negative integer"):
        build("random", toy.ContextualEnvironment(), seed=seed)


def observation_spec(state: Any = None, legal: Any = None) -> Any:
    return ts.time_step_spec(
        {
            "state": state or array_spec.BoundedArraySpec((5,), np.float32, 0, 1),
            "legal": legal or array_spec.BoundedArraySpec((4,), np.int32, 0, 1),
        }
    )


@pytest.mark.parametrize("agent", ["dqn", "ppo", "random"])
@pytest.mark.parametrize(
    ("time_step_spec", "action_spec", "message"),
    [
        (observation_spec(), array_spec.BoundedArraySpec((), np.int32, 1, 4), "counted from 0"),
        (observation_spec(), array_spec.BoundedArraySpec((2,), np.int32, 0, 3), "one scalar int"),
        (
            ts.time_step_spec(array_spec.BoundedArraySpec((5,), np.float32, 0, 1)),
            array_spec.BoundedArraySpec((), np.int32, 0, 3),
            "expected a dict of 'state' and 'legal'",
        ),
        (
            observation_spec(state=array_spec.BoundedArraySpec((5, 2), np.float32, 0, 1)),
            array_spec.BoundedArraySpec((), np.int32, 0, 3),
            r"expected float32 of shape \(n_features,\)",
        ),
        (
            observation_spec(),
            array_spec.BoundedArraySpec((), np.int32, 0, 4),
            r"expected int32 of shape \(5,\)",
        ),
    ],
)
def test_unfitting_specs_are_refused(
    agent: str, time_step_spec: Any, action_spec: Any, message: str
) -> None:
    with pytest.raises(ArgumentError, match=message):
        build_agent(agent, time_step_spec, action_spec)


def test_missing_tf_agents_is_explained_when_an_agent_is_built(monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "tf_agents", None)
    monkeypatch.delitem(sys.modules, "rl_sparsity_tf.environment._tf_agents", raising=False)
    assert [config.name for config in (DQN(), PPO(), Random())] == ["dqn", "ppo", "random"]
    with pytest.raises(MissingDependencyError) as caught:
        build_agent("dqn", None, None)
    assert 'pip install "rl_sparsity_tf[rl]"' in str(caught.value)
    assert "pip install --no-deps tf-agents==0.19.0" in str(caught.value)


def test_agents_are_those_of_tf_agents() -> None:
    env = toy.ContextualEnvironment()
    assert type(build(SMALL["dqn"], env).tf_agent) is dqn_agent.DdqnAgent
    single = dataclasses.replace(SMALL["dqn"], double=False)
    assert type(build(single, env).tf_agent) is dqn_agent.DqnAgent
    assert type(build(SMALL["ppo"], env).tf_agent) is ppo_clip_agent.PPOClipAgent


@pytest.mark.slow
def test_global_generators_are_left_alone() -> None:
    env = toy.ContextualEnvironment()
    before = random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    for config in SMALL.values():
        play(build(config, env), env, 2)
    after = random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    assert after == before


# -- acting --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [*SMALL.values(), dataclasses.replace(SMALL["dqn"], exploration="boltzmann")],
    ids=[*SMALL, "boltzmann"],
)
def test_no_illegal_action_in_a_thousand_steps(config: Any) -> None:
    env = toy.ContextualEnvironment(seed=3)
    agent = build(config, env)
    for _ in range(7):  # 7 * 24 * 6 = 1,008 steps, learning in between
        toy.play_search_episode(env, agent, 24)
        agent.end_episode()
    toy.greedy_share(agent, episodes=5)
    assert env.illegal_actions == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", list(SMALL))
def test_same_seed_same_actions(name: str) -> None:
    runs, untrained = [], []
    for seed in (1, 1, 2):
        env = toy.ContextualEnvironment(seed=8)
        # What the user drew before must not matter.
        random.random()
        agent = build(SMALL[name], env, seed=seed)
        untrained.append([actions_of(agent) for _ in range(3)])
        if seed == 1:
            losses = play(agent, env, 3)
            runs.append((losses, actions_of(agent)))
    assert runs[0] == runs[1]
    assert untrained[0] == untrained[1] != untrained[2]


def exploring(**settings: Any) -> Any:
    config = dataclasses.replace(SMALL["dqn"], epsilon_start=1.0, epsilon_end=1.0, **settings)
    return build(config, toy.ContextualEnvironment())


def test_random_actions_are_held_for_as_long_as_the_zeta_distribution_says() -> None:
    agent, legal, lengths = exploring(persistence=2.0), np.ones(4, np.int32), []
    for _ in range(4000):
        agent._begin()
        agent._choose(np.zeros(4), legal, True)
        lengths.append(1 + agent._held[1])
    for length in (1, 2, 3):  # n^-2 over the sum of all, pi^2 / 6
        share = np.mean(np.array(lengths) == length)
        assert share == pytest.approx(6 / np.pi**2 / length**2, abs=0.03)


def test_a_held_action_is_repeated_while_it_is_legal_and_the_episode_lasts() -> None:
    agent, all_legal = exploring(), np.ones(4, np.int32)
    agent._held = 2, 3
    assert [agent._choose(np.zeros(4), all_legal, True) for _ in range(3)] == [2, 2, 2]
    agent._held = 2, 3
    assert agent._choose(np.zeros(4), np.array([1, 1, 0, 1], np.int32), True) != 2
    agent._held = 2, 1000
    agent._begin()
    chosen = {agent._choose(np.zeros(4), all_legal, True) for _ in range(200)}
    assert chosen == {1, 2, 3}  # the best action known is not random


def test_random_actions_that_are_far_worse_are_rarer() -> None:
    agent, values = exploring(persistence=2.0, temperature=0.1), np.array([1.0, 0.9, 0.8, -1.0])
    drawn = []
    for _ in range(4000):
        agent._begin()
        drawn.append(agent._choose(values, np.ones(4, np.int32), True))
    shares = np.bincount(drawn, minlength=4) / len(drawn)
    weights = np.exp(values[1:] / 0.1)
    expected = 0.2 / 3 + 0.8 * weights / weights.sum()
    np.testing.assert_allclose(shares, [0.0, *expected], atol=0.03)


def test_without_persistence_every_action_is_drawn_anew() -> None:
    agent = exploring(persistence=0.0)
    drawn = [agent._choose(np.zeros(4), np.ones(4, np.int32), True) for _ in range(2000)]
    np.testing.assert_allclose(np.bincount(drawn) / len(drawn), [0.25] * 4, atol=0.04)
    assert np.mean(np.diff(drawn) == 0) == pytest.approx(0.25, abs=0.04)


@pytest.mark.parametrize("wrong", [0.5, 1.0])
def test_a_persistence_without_a_distribution_is_refused(wrong: float) -> None:
    with pytest.raises(ArgumentError, match=rf"persistence={wrong}\): expected 0, or more than 1"):
        DQN(persistence=wrong)


def test_exploration_differs_from_episode_to_episode() -> None:
    env = toy.ContextualEnvironment(varied=False)
    agent = build("random", env)
    assert len({tuple(actions_of(agent)) for _ in range(5)}) == 5


def test_roulette_wheel_follows_the_probabilities() -> None:
    generator = np.random.default_rng(0)
    wheel = np.array([0.0, 0.25, 0.0, 0.75, 0.0])
    drawn = np.bincount([base.spin(wheel, generator) for _ in range(2000)], minlength=5)
    assert drawn[[0, 2, 4]].sum() == 0
    assert drawn[3] / 2000 == pytest.approx(0.75, abs=0.04)


def test_ball_on_the_edge_of_the_wheel_stays_legal() -> None:
    class Edge:
        def random(self) -> float:
            return 1.0

    assert base.spin(np.array([0.5, 0.5, 0.0]), Edge()) == 1  # type: ignore[arg-type]


def test_dqn_probabilities() -> None:
    env = toy.ContextualEnvironment()
    legal, q = np.array([1, 0, 1, 1], np.int32), np.array([0.1, 9.0, 0.5, 0.4])
    agent = build(dataclasses.replace(SMALL["dqn"], epsilon_start=0.3), env)
    np.testing.assert_allclose(agent._probabilities(q, legal), [0.1, 0, 0.8, 0.1])
    config = dataclasses.replace(SMALL["dqn"], exploration="boltzmann", temperature=0.2)
    weights = np.exp(q / 0.2) * legal
    np.testing.assert_allclose(
        build(config, env)._probabilities(q, legal), weights / weights.sum(), rtol=1e-12
    )


def test_ppo_probabilities_are_those_of_tf_agents() -> None:
    env = toy.ContextualEnvironment(seed=2)
    agent = build(SMALL["ppo"], env)
    step = env.reset()
    state, legal = step.observation["state"], step.observation["legal"]
    logits, _ = agent._evaluate(state, legal)
    batched = ts.restart({"state": state[None], "legal": legal[None]}, batch_size=1)
    theirs = agent.tf_agent.collect_policy.distribution(
        tf.nest.map_structure(tf.constant, batched)
    ).action.probs_parameter()
    np.testing.assert_allclose(agent._probabilities(logits, legal), theirs.numpy()[0], atol=1e-6)


def test_forced_actions_are_taken_and_checked() -> None:
    env = toy.ContextualEnvironment(seed=2)
    agent = build("random", env)
    step = env.reset()
    while step.observation["legal"].all():
        step = env.reset()
    illegal = int(np.flatnonzero(step.observation["legal"] == 0)[0])
    legal = int(np.flatnonzero(step.observation["legal"])[0])
    with pytest.raises(AgentStateError, match=rf"action={illegal}\) is not legal here.*Leave"):
        agent.step(step, action=illegal)
    assert agent.step(step, action=legal) == legal


def test_ppo_imitates_forced_actions() -> None:
    env = toy.ContextualEnvironment(varied=False)
    agent = build(PPO(hidden_layers=(16,), learning_rate=1e-2, num_epochs=60), env)
    step, teacher = env.reset(), []
    while not step.is_last():
        teacher.append(int(np.flatnonzero(step.observation["legal"])[-1]))
        step = env.step(agent.step(step, action=teacher[-1]))
        agent.observe(step)
    losses = [agent.end_episode()["imitation_loss"]]
    step, learned = env.reset(), []
    while not step.is_last():
        learned.append(agent.act(step))
        step = env.step(learned[-1])
    assert learned == teacher
    assert losses[0] > 0


# -- learning ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "episodes"),
    [
        (DQN(n_step=1), 10),
        (PPO(learning_rate=1e-3, num_epochs=30, episodes_per_update=2), 60),
    ],
    ids=["dqn", "ppo"],
)
def test_learns_what_is_best_in_each_context(config: Any, episodes: int) -> None:
    env = toy.ContextualEnvironment(seed=1)
    learner = build(config, env)
    play(learner, env, episodes, steps=8)
    # One evaluation moves by some percent from update to update, so several are averaged.
    shares = []
    for _ in range(5):
        play(learner, env, 2, steps=8)
        shares.append(toy.greedy_share(learner, episodes=10))
    assert np.mean(shares) >= 0.95, shares
    assert toy.greedy_share(build("random", env)) < 0.6


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dqn", "ppo"])
def test_nothing_is_traced_after_the_first_episode(name: str) -> None:
    env = toy.ContextualEnvironment()
    agent = build(SMALL[name], env)
    play(agent, env, 1)
    after_first = agent.tracing_count()
    assert after_first == 3
    play(agent, env, 4)
    assert agent.tracing_count() == after_first


def test_ppo_pads_shorter_search_episodes_instead_of_tracing_again() -> None:
    env = toy.ContextualEnvironment()
    agent = build(SMALL["ppo"], env)
    play(agent, env, 1, steps=3)
    losses = play(agent, env, 2, steps=2)
    assert agent.tracing_count() == 3
    assert np.isfinite(losses).all()


def test_ppo_trains_once_per_episodes_per_update() -> None:
    env = toy.ContextualEnvironment()
    agent = build(dataclasses.replace(SMALL["ppo"], episodes_per_update=3), env)
    sizes = []
    for _ in range(6):
        toy.play_search_episode(env, agent, 2)
        sizes.append(len(agent.end_episode()))
    assert sizes == [0, 0, 3, 0, 0, 3]


class OneStep(toy.ContextualEnvironment):
    """Environment episodes of exactly two steps with rewards known beforehand."""

    def __init__(self, rewards: list[tuple[float, float]]) -> None:
        super().__init__(varied=False)
        self.rewards = [reward for pair in rewards for reward in pair]

    def _reset(self) -> ts.TimeStep:
        self.position = 0
        return ts.restart(self.observation())

    def _step(self, action: Any) -> ts.TimeStep:
        self.position += 1
        reward = np.float32(self.rewards.pop(0))
        make = ts.termination if self.position == 2 else ts.transition
        return make(self.observation(), reward)


def play_two_step(agent: Any, rewards: list[tuple[float, float]]) -> None:
    env = OneStep(rewards)
    for _ in rewards:
        step = env.reset()
        while not step.is_last():
            step = env.step(agent.step(step))
            agent.observe(step)


def test_bonus_goes_to_the_last_transition_of_each_environment_episode() -> None:
    agent = build("random", toy.ContextualEnvironment())
    seen: list[Any] = []
    agent._learn = lambda transitions: seen.extend(transitions) or {}
    play_two_step(agent, [(0.25, 0.5), (-0.5, -0.25)])
    agent.end_episode(bonus=0.75)
    assert [t.reward for t in seen] == [0.25, 1.0, -0.5, 0.5]
    assert agent.episodes == 1


def test_the_worth_is_what_the_rewards_of_each_environment_episode_add_up_to() -> None:
    agent = build("random", toy.ContextualEnvironment())
    seen: list[Any] = []
    agent._learn = lambda transitions: seen.extend(transitions) or {}
    play_two_step(agent, [(0.25, 0.5), (-0.5, -0.25)])
    agent.end_episode(worth=0.125)
    assert [t.reward for t in seen] == [0.25, -0.125, -0.5, 0.625]
    with pytest.raises(ArgumentError, match=r"worth=nan: expected a finite number"):
        agent.end_episode(worth=float("nan"))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"bonus": [0.75, -1.0]}, [0.25, 1.0, -0.5, -1.0]),
        ({"worth": [0.5, -0.5]}, [0.25, 0.25, -0.5, 0.0]),
    ],
)
def test_each_environment_episode_can_be_worth_something_else(given, expected) -> None:
    agent = build("random", toy.ContextualEnvironment())
    seen: list[Any] = []
    agent._learn = lambda transitions: seen.extend(transitions) or {}
    play_two_step(agent, [(0.25, 0.5), (-0.5, -0.25)])
    (name,) = given
    with pytest.raises(ArgumentError, match=rf"{name}=\[0\.5\] has 1 numbers for 2 environment"):
        agent.end_episode(**{name: [0.5]})
    with pytest.raises(ArgumentError, match=rf"{name}=\[0\.5, nan\]: expected a finite number"):
        agent.end_episode(**{name: [0.5, float("nan")]})
    agent.end_episode(**given)
    assert [t.reward for t in seen] == expected


def test_ppo_advantages_stop_at_the_end_of_each_environment_episode() -> None:
    config = PPO(hidden_layers=(16,), discount=0.9, gae_lambda=0.8, num_epochs=1)
    agent = build(config, toy.ContextualEnvironment())
    seen: list[Any] = []
    original = agent._preprocess
    agent._preprocess = lambda batch: seen.append((batch, original(batch))) or seen[-1][1]
    play_two_step(agent, [(0.25, 0.5), (-0.5, -0.25)])
    agent.end_episode()
    batch, processed = seen[0]
    values = batch.policy_info["value_prediction"].numpy()[0]
    expected = []
    for start, rewards in ((0, (0.25, 0.5)), (2, (-0.5, -0.25))):
        last = rewards[1] - values[start + 1]
        first = rewards[0] + 0.9 * values[start + 1] - values[start]
        expected += [first + 0.9 * 0.8 * last, last]
    got = processed.policy_info["advantage"].numpy()[0]
    np.testing.assert_allclose(got, [*expected, 0.0], atol=1e-5)


def test_dqn_replay_holds_boundaries_that_are_not_learned_from() -> None:
    config = dataclasses.replace(SMALL["dqn"], discount=0.5, n_step=1)
    agent = build(config, toy.ContextualEnvironment())
    play_two_step(agent, [(0.25, 0.5), (-0.5, -0.25)])
    agent.end_episode()
    frames = agent.replay.gather_all()
    assert frames.step_type.numpy()[0].tolist() == [0, 1, 2, 0, 1, 2]
    assert frames.next_step_type.numpy()[0].tolist() == [1, 2, 0, 1, 2, 0]
    assert frames.reward.numpy()[0].tolist() == [0.25, 0.5, 0.0, -0.5, -0.25, 0.0]
    assert frames.discount.numpy()[0].tolist() == [1, 0, 1, 1, 0, 1]
    pairs = tf.nest.map_structure(lambda t: tf.stack([t[0, i : i + 2] for i in range(5)]), frames)
    errors = agent.tf_agent.loss(pairs).extra.td_error.numpy()
    observation = tf.nest.map_structure(lambda t: t[0], frames.observation)
    q = np.stack(
        [
            agent._evaluate(s, m)[0]
            for s, m in zip(observation["state"].numpy(), observation["legal"].numpy(), strict=True)
        ]
    )
    actions = frames.action.numpy()[0]
    taken = q[np.arange(6), actions]
    assert errors[1] == pytest.approx(0.5 - taken[1], abs=1e-5)
    assert errors[2] == 0.0  # the boundary
    assert errors[4] == pytest.approx(-0.25 - taken[4], abs=1e-5)


# -- order of calls ------------------------------------------------------------------------------


def test_calls_out_of_order_are_explained() -> None:
    env = toy.ContextualEnvironment()
    agent = build("random", env)
    with pytest.raises(AgentStateError, match="with nothing recorded"):
        agent.end_episode()
    with pytest.raises(AgentStateError, match=r"observe\(\) was called without agent.step"):
        agent.observe(env.reset())
    step = env.reset()
    action = agent.step(step)
    with pytest.raises(AgentStateError, match=r"step\(\) was called twice in a row"):
        agent.step(step)
    with pytest.raises(AgentStateError, match=r"between step\(\) and observe\(\)"):
        agent.end_episode()
    agent.observe(env.step(action))
    with pytest.raises(AgentStateError, match="in the middle of an environment episode"):
        agent.end_episode()
    with pytest.raises(AgentStateError, match="in the middle of a search episode"):
        agent.get_state()
    agent.discard_episode()
    assert agent.get_state()["episodes"] == 0
    with pytest.raises(AgentStateError, match="LAST time step of an episode"):
        agent.step(step._replace(step_type=np.int32(2)))
    with pytest.raises(ArgumentError, match="bonus=nan: expected a finite number"):
        agent.end_episode(bonus=float("nan"))


def test_unusable_time_steps_are_explained() -> None:
    env = toy.ContextualEnvironment()
    agent = build("random", env)
    good = env.reset()
    state, legal = good.observation["state"], good.observation["legal"]

    def shown(**changes: Any) -> ts.TimeStep:
        return good._replace(observation={"state": state, "legal": legal, **changes})

    with pytest.raises(AgentStateError, match=r"state of shape \(3,\).*expected \(7,\)"):
        agent.act(shown(state=state[:3]))
    with pytest.raises(AgentStateError, match=r"not finite at \[1\].*division by zero"):
        agent.act(shown(state=np.where(np.arange(7) == 1, np.nan, state)))
    with pytest.raises(AgentStateError, match="allows no action"):
        agent.act(shown(legal=0 * legal))
    agent.step(good)
    with pytest.raises(AgentStateError, match="the reward nan; expected a finite number"):
        agent.observe(good._replace(reward=np.float32(np.nan)))


# -- keeping -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [*SMALL.values(), dataclasses.replace(SMALL["ppo"], episodes_per_update=2)],
    ids=[*SMALL, "ppo-waiting"],
)
def test_saved_agent_goes_on_as_if_never_stopped(config: Any, tmp_path: Path) -> None:
    env = toy.ContextualEnvironment(seed=4)
    agent = build(config, env, seed=6)
    play(agent, env, 3)
    agent.save(tmp_path / "agent.npz")
    continued = play(agent, toy.ContextualEnvironment(seed=9), 3), actions_of(agent)
    restored = build(config, env, seed=0)
    restored.load(tmp_path / "agent.npz")
    assert restored.episodes == 3
    again = play(restored, toy.ContextualEnvironment(seed=9), 3), actions_of(restored)
    assert again == continued
    assert [file.name for file in tmp_path.iterdir()] == ["agent.npz"]


def test_state_holds_plain_arrays_that_later_training_does_not_change() -> None:
    env = toy.ContextualEnvironment()
    agent = build(SMALL["dqn"], env)
    state = agent.get_state()
    kept = {key: value.copy() for key, value in state.items()}
    play(agent, env, 2)
    assert all(value.dtype != object for value in state.values())
    assert all(np.array_equal(kept[key], state[key]) for key in kept)
    assert any(not np.array_equal(kept[key], v) for key, v in agent.get_state().items())


def test_a_damaged_file_of_a_state_is_refused(tmp_path: Path) -> None:
    agent = build(SMALL["dqn"], toy.ContextualEnvironment())
    agent.save(tmp_path / "agent.npz")
    content = (tmp_path / "agent.npz").read_bytes()
    (tmp_path / "agent.npz").write_bytes(content[: len(content) // 2])
    with pytest.raises(AgentStateError, match=r"agent\.npz' is truncated: its end is missing\."):
        agent.load(tmp_path / "agent.npz")


def test_foreign_states_are_refused() -> None:
    env = toy.ContextualEnvironment()
    dqn, ppo = build(SMALL["dqn"], env), build(SMALL["ppo"], env)
    with pytest.raises(AgentStateError, match="The state is of 'ppo', format 1; expected 'dqn'"):
        dqn.set_state(ppo.get_state())
    with pytest.raises(AgentStateError, match="The state is of 'nothing known', format None"):
        dqn.set_state({})
    wider = build(dataclasses.replace(SMALL["dqn"], hidden_layers=(17,)), env)
    with pytest.raises(AgentStateError, match=r"'variables/\d+' of shape .*; expected shape"):
        dqn.set_state(wider.get_state())
    short = dqn.get_state()
    del short["variables/0"]
    with pytest.raises(AgentStateError, match="has no 'variables/0'; expected shape"):
        dqn.set_state(short)
