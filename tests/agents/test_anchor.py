"""Episodes return to the best sequence of decisions known, and leave it at a few."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl_sparsity_tf.agents.exploration import Anchor

ALL = np.ones(4, np.int32)
STEPS = 12
FREE = [[0, 1, 2, 3]] * STEPS


def played(anchor, actions, value):
    anchor.restart(len(actions))
    for action in actions:
        anchor.take(action)
    anchor.finish(value)


def ready(seed=0, actions=tuple([2] * STEPS)):
    """An anchor whose best sequence is known, past its first episodes."""
    anchor = Anchor(np.random.default_rng(seed))
    played(anchor, actions, 0.5)
    for value in (0.1, 0.2, 0.1, 0.2, 0.1):
        played(anchor, [0] * len(actions), value)
    return anchor


def asked(anchor, policy=1, steps=STEPS, allowed=ALL):
    """What an episode offers; the policy takes its action where it may."""
    anchor.restart(steps)
    found = []
    for _ in range(steps):
        found.append(np.flatnonzero(anchor.offer(allowed)).tolist())
        anchor.take(policy if policy in found[-1] else found[-1][0])
    return found


def returned_to(anchor):
    """The actions that are offered alone."""
    return {offered[0] for _ in range(20) for offered in asked(anchor) if len(offered) == 1}


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31))
def test_what_is_returned_to_is_the_best_sequence(seed):
    best = np.random.default_rng(seed).integers(0, 4, STEPS).tolist()
    anchor = ready(seed, best)
    for _ in range(20):
        for place, offered in enumerate(asked(anchor)):
            others = [action for action in range(4) if action != best[place]]
            assert offered in ([best[place]], others, [0, 1, 2, 3])


def test_most_episodes_return_and_leave_at_one_or_two_decisions():
    anchor = ready()
    episodes = [asked(anchor) for _ in range(2000)]
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
    anchor = Anchor(np.random.default_rng(0))
    for number in range(6):
        assert anchor.free
        assert asked(anchor) == FREE
        anchor.finish(float(number))
    assert not anchor.free


def test_after_a_demonstration_no_episode_is_free():
    anchor = Anchor(np.random.default_rng(0))
    anchor.restart(STEPS)
    for _ in range(STEPS):
        anchor.take(2)
    anchor.finish(0.5, demonstrated=True)
    assert not anchor.free
    assert returned_to(anchor) == {2}


def test_an_action_that_may_not_be_taken_is_left_to_the_policy():
    anchor, only = ready(), np.array([1, 1, 0, 1])
    for _ in range(20):
        assert asked(anchor, allowed=only) == [[0, 1, 3]] * STEPS


def test_a_sequence_of_another_length_is_not_returned_to():
    anchor = ready()
    for _ in range(20):
        assert asked(anchor, steps=STEPS + 1) == [*FREE, FREE[0]]


def test_a_worse_episode_does_not_replace_the_best_and_a_better_one_does():
    anchor = ready()
    played(anchor, [3] * STEPS, 0.4)
    assert returned_to(anchor) == {2}
    played(anchor, [3] * STEPS, 0.6)
    assert returned_to(anchor) == {3}


def test_after_forgetting_nothing_is_returned_to():
    anchor = ready()
    anchor.forget()
    assert all(asked(anchor) == FREE for _ in range(20))


@pytest.mark.parametrize("episodes", [0, 1, 5])
def test_what_was_saved_goes_on_alike(episodes):
    anchor = ready(3) if episodes else Anchor(np.random.default_rng(3))
    for _ in range(episodes):
        asked(anchor)
        anchor.finish(0.0)
    other = Anchor(np.random.default_rng(99))
    other.set_state(anchor.get_state())
    for value in (0.1, 0.7, 0.2, 0.3):
        assert asked(anchor) == asked(other)
        anchor.finish(value)
        other.finish(value)
