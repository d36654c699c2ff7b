"""The network that scores every slot's actions alike, and agents that decide with it."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
from tf_agents.specs import array_spec
from tf_agents.trajectories import time_step as ts

import rl_sparsity_tf as rls
from rl_sparsity_tf.agents.configs import SlotShape, build_agent
from rl_sparsity_tf.agents.slots import SlotScores

SHAPE = SlotShape(shared=2, slots=4, features=3)
ACTIONS = 8  # two of every slot
SMALL = {
    "dqn": rls.DQN(hidden_layers=(16,), train_steps=20, batch_size=16, learning_rate=1e-2),
    "ppo": rls.PPO(hidden_layers=(16,), num_epochs=10, episodes_per_update=4),
}


def specs():
    state = array_spec.BoundedArraySpec((14,), np.float32, -1.0, 1.0, "state")
    legal = array_spec.BoundedArraySpec((ACTIONS,), np.int32, 0, 1, "legal")
    action = array_spec.BoundedArraySpec((), np.int32, 0, ACTIONS - 1, "action")
    return ts.time_step_spec({"state": state, "legal": legal}), action


def shuffled(state, order):
    own = state[:, 2:].reshape(len(state), 4, 3)[:, order]
    return np.concatenate([state[:, :2], own.reshape(len(state), -1)], 1)


def test_scores_follow_their_slots_to_other_places():
    layer = SlotScores(SHAPE, ACTIONS, (5, 4), "relu")
    state = np.random.default_rng(0).normal(size=(6, 14)).astype(np.float32)
    scores = layer(state).numpy()
    assert scores.shape == (6, ACTIONS)
    order = [0, 3, 1, 2]  # the first has actions of its own
    moved = layer(shuffled(state, order)).numpy()
    np.testing.assert_allclose(moved.reshape(6, 4, 2), scores.reshape(6, 4, 2)[:, order], rtol=1e-5)
    # As large as for one slot.
    one = 5 * 5 + 5 + 5 * 4 + 4 + 4 * 2 + 2
    assert sum(weight.numpy().size for weight in layer.weights) == one + 4 * 2 + 2


def test_without_hidden_layers_scores_are_linear_and_the_first_slot_has_its_own():
    layer = SlotScores(SHAPE, ACTIONS, (), "relu")
    state = np.random.default_rng(0).normal(size=(6, 14)).astype(np.float32)
    scores = layer(state).numpy().reshape(6, 4, 2)
    first, first_bias, others, others_bias = (weight.numpy() for weight in layer.weights)
    for slot in range(4):
        seen = np.concatenate([state[:, :2], state[:, 2 + 3 * slot : 5 + 3 * slot]], 1)
        kernel, bias = (others, others_bias) if slot else (first, first_bias)
        np.testing.assert_allclose(scores[:, slot], seen @ kernel + bias, rtol=1e-5, atol=1e-6)


class Bandit:
    """One step: the second action of the slot whose first feature is 1 is right."""

    def __init__(self):
        self.rng = np.random.default_rng(0)

    def reset(self):
        state = self.rng.uniform(-1, 1, 14).astype(np.float32)
        self.right = int(self.rng.integers(3))  # the last slot is empty, and never right here
        state[2::3] = 0.0
        state[2 + 3 * self.right] = 1.0
        legal = np.array([1] * 6 + [0] * 2, np.int32)
        self.seen = {"state": state, "legal": legal}
        return ts.restart(self.seen)

    def step(self, action):
        return ts.termination(self.seen, np.float32(action == 2 * self.right + 1))


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_agents_learn_what_holds_in_all_slots(name):
    agent = build_agent(SMALL[name], *specs(), seed=1, slots=SHAPE)
    env = Bandit()
    for _ in range(80):
        time_step = env.reset()
        agent.observe(env.step(agent.step(time_step)))
        agent.end_episode()
    found = [float(env.step(agent.act(env.reset())).reward) for _ in range(40)]
    assert np.mean(found) > 0.9  # by chance 1/6
    # Also where it was never right before.
    state = np.zeros(14, np.float32)
    state[2 + 9] = 1.0
    legal = np.ones(ACTIONS, np.int32)
    assert agent.act(ts.restart({"state": state, "legal": legal})) == 7
    traced = agent.tracing_count()
    agent.observe(env.step(agent.step(env.reset())))
    agent.end_episode()
    assert agent.tracing_count() == traced


@pytest.mark.parametrize("name", ["dqn", "ppo"])
def test_weights_follow_from_the_seed_and_states_carry_over(name):
    one, two, other = (
        build_agent(SMALL[name], *specs(), seed=seed, slots=SHAPE) for seed in (1, 1, 2)
    )
    for mine, theirs in zip(one.policy_arrays(), two.policy_arrays(), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    same = all(
        np.array_equal(a, b)
        for a, b in zip(one.policy_arrays(), other.policy_arrays(), strict=True)
    )
    assert not same
    other.set_state(one.get_state())
    step = Bandit().reset()
    assert other.act(step) == one.act(step)


def test_a_state_that_cannot_be_cut_so_is_refused():
    with pytest.raises(rls.ArgumentError, match=r"does not fit a state of 14 features and 8 act"):
        build_agent("dqn", *specs(), slots=SlotShape(shared=3, slots=4, features=3))
    with pytest.raises(rls.ArgumentError, match=r"Expected 14 features, and as many actions"):
        build_agent("random", *specs(), slots=SlotShape(shared=2, slots=3, features=4))


def test_masks_hold():
    agent = build_agent(SMALL["ppo"], *specs(), seed=1, slots=SHAPE)
    env = Bandit()
    tf.random.set_seed(0)
    actions = {agent.act(env.reset(), explore=True) for _ in range(60)}
    assert actions <= set(range(6))
    assert len(actions) > 3
