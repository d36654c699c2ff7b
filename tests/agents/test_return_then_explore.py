"""Episodes return to the best sequence of decisions known, and leave it at a few."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl_sparsity_tf.agents.exploration import ReturnThenExplore

ALL = np.ones(4, np.int32)
STEPS = 12
FREE = [[0, 1, 2, 3]] * STEPS


def played(explorer, actions, value):
    explorer.restart(len(actions))
    for action in actions:
        explorer.take(action)
    explorer.finish(value)


def ready(seed=0, actions=tuple([2] * STEPS)):
    """One whose best sequence is known, past its first episodes."""
    explorer = ReturnThenExplore(np.random.default_rng(seed))
    played(explorer, actions, 0.5)
    for value in (0.1, 0.2, 0.1, 0.2, 0.1):
        played(explorer, [0] * len(actions), value)
    return explorer


def asked(explorer, policy=1, steps=STEPS, allowed=ALL):
    """What an episode offers; the policy takes its action where it may."""
    explorer.restart(steps)
    found = []
    for _ in range(steps):
        found.append(np.flatnonzero(explorer.offer(allowed)).tolist())
        explorer.take(policy if policy in found[-1] else found[-1][0])
    return found


def returned_to(explorer):
    """The actions that are offered alone."""
    return {offered[0] for _ in range(20) for offered in asked(explorer) if len(offered) == 1}


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31))
def test_what_is_returned_to_is_the_best_sequence(seed):
    best = np.random.default_rng(seed).integers(0, 4, STEPS).tolist()
    explorer = ready(seed, best)
    for _ in range(20):
        for place, offered in enumerate(asked(explorer)):
            others = [action for action in range(4) if action != best[place]]
            assert offered in ([best[place]], others, [0, 1, 2, 3])


def test_most_episodes_return_and_leave_at_one_or_two_decisions():
    explorer = ready()
    episodes = [asked(explorer) for _ in range(2000)]
    returned = [one for one in episodes if one != FREE]
    assert 0.65 < len(returned) / len(episodes) < 0.75
    left = [sum(offered == [0, 1, 3] for offered in one) for one in returned]
    assert set(left) == {1, 2}
    # One in two has a second place, which is another one in all but a twelfth.
    assert 0.4 < np.mean(left) - 1 < 0.52
    free = [sum(offered == [0, 1, 2, 3] for offered in one) for one in returned]
    # It stays away for one decision more on average, as far as there are any left.
    assert 0.6 < np.mean(free) / np.mean(left) < 1.0


def test_the_first_episodes_are_free():
    explorer = ReturnThenExplore(np.random.default_rng(0))
    for number in range(6):
        assert explorer.free
        assert asked(explorer) == FREE
        explorer.finish(float(number))
    assert not explorer.free


def test_after_a_demonstration_no_episode_is_free():
    explorer = ReturnThenExplore(np.random.default_rng(0))
    explorer.restart(STEPS)
    for _ in range(STEPS):
        explorer.take(2)
    explorer.finish(0.5, demonstrated=True)
    assert not explorer.free
    assert returned_to(explorer) == {2}


def test_an_action_that_may_not_be_taken_is_left_to_the_policy():
    explorer, only = ready(), np.array([1, 1, 0, 1])
    for _ in range(20):
        assert asked(explorer, allowed=only) == [[0, 1, 3]] * STEPS


def test_a_sequence_of_another_length_is_not_returned_to():
    explorer = ready()
    for _ in range(20):
        assert asked(explorer, steps=STEPS + 1) == [*FREE, FREE[0]]


def test_a_worse_episode_does_not_replace_the_best_and_a_better_one_does():
    explorer = ready()
    played(explorer, [3] * STEPS, 0.4)
    assert returned_to(explorer) == {2}
    played(explorer, [3] * STEPS, 0.6)
    assert returned_to(explorer) == {3}


def test_after_forgetting_nothing_is_returned_to():
    explorer = ready()
    explorer.forget()
    assert all(asked(explorer) == FREE for _ in range(20))


@pytest.mark.parametrize("episodes", [0, 1, 5])
def test_what_was_saved_goes_on_alike(episodes):
    explorer = ready(3) if episodes else ReturnThenExplore(np.random.default_rng(3))
    for _ in range(episodes):
        asked(explorer)
        explorer.finish(0.0)
    other = ReturnThenExplore(np.random.default_rng(99))
    other.set_state(explorer.get_state())
    for value in (0.1, 0.7, 0.2, 0.3):
        assert asked(explorer) == asked(other)
        explorer.finish(value)
        other.finish(value)
