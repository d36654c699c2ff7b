"""The default reward: bounded, ordered as it should be, and safe against any number."""

import dataclasses
import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rl_sparsity_tf as rls
from rl_sparsity_tf.environment.reward import Outcome, Reward, bounded

anything = st.floats()  # NaN and infinity included
outcomes = st.builds(Outcome, **{field.name: anything for field in dataclasses.fields(Outcome)})
weights = st.floats(0, 100)
rewards = st.builds(
    Reward,
    accuracy=st.floats(0.01, 100),
    sparsity=weights,
    size=weights,
    reconstruction=weights,
    gain=weights,
)
modest = settings(max_examples=50, deadline=None)


def outcome(**changes):
    return Outcome(
        **{
            "metric": 0.8,
            "dense_metric": 0.9,
            "loss": 0.5,
            "retention": 0.9,
            "sparsity": 0.4,
            "target_sparsity": 0.8,
            "stored_bits": 0.6,
            "reconstruction_error": 0.2,
            **changes,
        }
    )


@modest
@given(rewards, outcomes, st.none() | outcomes)
def test_finite_and_bounded_for_any_numbers(reward, now, before):
    value = reward(now, before)
    assert math.isfinite(value)
    assert -1 <= value <= 1
    assert -1 <= reward.value(now) <= 1
    assert reward(now, before) == value  # pure
    assert bounded(reward, now, before) == value


def test_the_formula():
    reward = Reward()
    # (1 * 0.9 + 0.2 * 0.5 + 0.3 * 0.4 - 0.1 * 0.2) / 1.6
    assert reward.value(outcome()) == pytest.approx(1.1 / 1.6)
    assert reward(outcome(), None) == pytest.approx(2 * 1.1 / 1.6 - 1)
    better = outcome(retention=0.95)
    assert reward(better, outcome()) == pytest.approx(4.0 * 0.05 / 1.6)


@modest
@given(rewards, st.floats(0, 1), st.floats(0, 1))
def test_better_networks_are_worth_more(reward, one, other):
    low, high = sorted((one, other))
    assert reward.value(outcome(retention=low)) <= reward.value(outcome(retention=high))
    assert reward.value(outcome(sparsity=low)) <= reward.value(outcome(sparsity=high))
    assert reward.value(outcome(stored_bits=low)) >= reward.value(outcome(stored_bits=high))
    assert reward.value(outcome(reconstruction_error=low)) >= reward.value(
        outcome(reconstruction_error=high)
    )
    same = outcome(retention=low)
    assert reward(same, same) == 0


def test_sparsity_beyond_the_target_earns_nothing_more():
    reward = Reward()
    assert reward.value(outcome(sparsity=0.8)) == reward.value(outcome(sparsity=0.99))
    assert reward.value(outcome(sparsity=0.8)) > reward.value(outcome(sparsity=0.7))
    # Also where nothing is wanted.
    assert math.isfinite(reward.value(outcome(target_sparsity=0.0, sparsity=0.0)))


def test_steps_add_up_to_the_change_of_value():
    reward = Reward(gain=1.0)
    path = [outcome(retention=value) for value in (1.0, 0.97, 0.6, 0.8)]
    steps = [reward(now, before) for before, now in itertools.pairwise(path)]
    assert sum(steps) == pytest.approx(reward.value(path[-1]) - reward.value(path[0]))


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Reward)])
@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf"), "1", None, True])
def test_wrong_weights(name, value):
    with pytest.raises(rls.ArgumentError, match=rf"Reward\({name}=.*finite number of at least 0"):
        Reward(**{name: value})


def test_all_weights_zero():
    with pytest.raises(rls.ArgumentError, match=r"All weights .* are 0.*Reward\(accuracy=1.0\)"):
        Reward(accuracy=0, sparsity=0, size=0, reconstruction=0)


def test_rewards_are_frozen_and_keyword_only():
    reward = Reward(accuracy=2.0)
    assert Reward(**reward.to_dict()) == reward
    with pytest.raises(dataclasses.FrozenInstanceError):
        reward.accuracy = 1.0
    with pytest.raises(TypeError):
        Reward(1.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        outcome().loss = 0.0


@pytest.mark.parametrize(
    ("given_value", "expected"),
    [(0.25, 0.25), (3, 1.0), (-math.inf, -1.0), (math.nan, 0.0), ("0.5", 0.5), (True, 1.0)],
)
def test_users_rewards_are_bounded(given_value, expected):
    assert bounded(lambda now, before: given_value, outcome(), None) == expected


@pytest.mark.parametrize("value", [None, "good", [1.0, 2.0]])
def test_users_rewards_must_be_numbers(value):
    with pytest.raises(rls.ArgumentError, match=r"reward function returned.*Expected a number"):
        bounded(lambda now, before: value, outcome(), outcome())
