"""No sequence of decisions is played twice, as long as others are left."""

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from rl_sparsity_tf.agents.exploration import DecisionTree

modest = settings(max_examples=40, deadline=None)


def play(tree, legal_after, rng):
    """Plays one episode of random allowed actions; `legal_after` says what follows a sequence."""
    tree.restart()
    taken = []
    while (legal := legal_after(tuple(taken))) is not None:
        allowed = tree.offer(np.array(legal))
        assert set(np.flatnonzero(allowed)) <= set(np.flatnonzero(legal))
        taken.append(int(rng.choice(np.flatnonzero(allowed))))
        tree.take(taken[-1])
    tree.finish()
    return tuple(taken)


def two_steps(taken):
    """Three actions, then two of four; after the last first action only one."""
    if len(taken) == 2:
        return None
    if not taken:
        return [1, 0, 1, 1]
    return [0, 0, 0, 1] if taken == (3,) else [1, 1, 0, 0]


ALL = {*itertools.product((0, 2), (0, 1)), (3, 3)}


@modest
@given(st.integers(0, 2**31))
def test_every_sequence_is_played_exactly_once(seed):
    tree, rng = DecisionTree(), np.random.default_rng(seed)
    played = [play(tree, two_steps, rng) for _ in ALL]
    assert set(played) == ALL
    assert tree.exhausted


@modest
@given(st.integers(0, 2**31))
def test_when_nothing_is_left_everything_legal_is_offered(seed):
    tree, rng = DecisionTree(), np.random.default_rng(seed)
    for _ in ALL:
        assert not tree.exhausted
        play(tree, two_steps, rng)
    assert play(tree, two_steps, rng) in ALL


@modest
@given(st.integers(0, 2**31), st.integers(0, len(ALL)))
def test_what_was_saved_and_read_offers_the_same(seed, count):
    rng = np.random.default_rng(seed)
    tree = DecisionTree()
    for _ in range(count):
        play(tree, two_steps, rng)
    read = DecisionTree.from_array(tree.to_array())
    assert read.exhausted == tree.exhausted
    one, other = (np.random.default_rng(seed) for _ in range(2))
    for _ in range(len(ALL)):
        assert play(read, two_steps, one) == play(tree, two_steps, other)
    np.testing.assert_array_equal(read.to_array(), tree.to_array())


def test_nothing_played_is_an_empty_array():
    assert DecisionTree().to_array().shape == (0, 3)
    assert not DecisionTree.from_array(DecisionTree().to_array()).exhausted


def test_a_sequence_that_was_forced_counts_like_any_other():
    tree = DecisionTree()
    tree.restart()
    for action in (3, 3):
        tree.offer(np.array(two_steps((3,) if tree._actions else ())))
        tree.take(action)
    tree.finish()
    tree.restart()
    assert tree.offer(np.array([1, 0, 1, 1])).tolist() == [1, 0, 1, 0]
