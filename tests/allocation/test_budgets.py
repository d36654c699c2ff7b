"""The target and the wall that keeps it in reach."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rl_sparsity_tf as rls
from rl_sparsity_tf.allocation.budgets import Budget
from rl_sparsity_tf.allocation.target import Target
from rl_sparsity_tf.layers.groups import GROUPS, Grouping


@pytest.mark.parametrize("sparsity", [0, 1, 1.5, -0.1, float("nan"), float("inf"), "0.9", True])
def test_wrong_targets(sparsity):
    with pytest.raises(rls.ArgumentError, match=r"Target\(sparsity=.*above 0 and below 1"):
        Target(sparsity=sparsity)


@pytest.mark.parametrize("name", ["tflite_bytes", "gzip_bytes"])
@pytest.mark.parametrize("value", [0, -5, 1.5, "50000", True, float("inf")])
def test_wrong_sizes(name, value):
    with pytest.raises(rls.ArgumentError, match=rf"Target\({name}=.*whole number of bytes"):
        Target(**{name: value})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, r"Target\(\) names no goals. Expected exactly one: Target\(sparsity=0.9\)"),
        ({"sparsity": None}, "names no goals"),
        (
            {"sparsity": 0.5, "gzip_bytes": 900},
            r"Target\(sparsity=0.5, gzip_bytes=900\) names 2 goals. Expected exactly one",
        ),
    ],
)
def test_a_target_is_one_goal(given, message):
    with pytest.raises(rls.ArgumentError, match=message):
        Target(**given)


def test_a_target_knows_its_goal():
    target = Target(gzip_bytes=np.int64(900))
    assert (target.kind, target.value, target.to_dict()) == ("gzip_bytes", 900, {"gzip_bytes": 900})
    assert type(target.value) is int


def test_targets_are_frozen_and_keyword_only():
    target = Target(sparsity=0.9)
    assert target.to_dict() == {"sparsity": 0.9}
    assert Target(**target.to_dict()) == target
    with pytest.raises(dataclasses.FrozenInstanceError):
        target.sparsity = 0.5
    with pytest.raises(TypeError):
        Target(0.9)


groupings = st.builds(Grouping, st.sampled_from(GROUPS), st.integers(1, 40), st.integers(1, 8))


@settings(max_examples=50, deadline=None)
@given(
    st.lists(groupings, min_size=1, max_size=5),
    st.floats(0.01, 0.99),
    st.integers(0, 200),
    st.integers(0, 2**31),
)
def test_a_walk_inside_the_wall_always_meets_the_target(cuts, sparsity, skipped, seed):
    """Prunes at random, obeying only what the budget says, and ends at the target."""
    sizes = [cut.sizes for cut in cuts]
    elements = sum(int(size.sum()) for size in sizes) + skipped
    try:
        budget = Budget(sparsity, elements, sizes)
    except rls.TargetError:
        best = sum(int(size.sum() - size.max()) for size in sizes)
        assert best < sparsity * elements
        return
    rng = np.random.default_rng(seed)
    assert budget.missing == budget.wanted
    assert budget.wanted - 1 < sparsity * elements + 1e-5
    for index, size in enumerate(sizes):
        later = range(index + 1, len(sizes))
        # Whatever the later kernels cannot give, this one must; more is up to chance.
        least = max(0, budget.missing - budget.room(later))
        assert least <= budget.room([index])
        most = min(budget.room([index]), budget.missing)
        budget.pruned[index] = rng.integers(least, most + 1)
        assert 0 <= budget.progress <= 1
        assert budget.sparsity == budget.pruned.sum() / elements
        assert budget.pruned[index] <= size.sum() - size.max()  # one group lives
    assert budget.missing == 0
    assert budget.progress == 1
    assert budget.room(range(len(sizes))) >= 0
    budget.reset()
    assert (budget.missing, budget.progress, budget.sparsity) == (budget.wanted, 0, 0)


def test_the_count_wanted_is_not_spoilt_by_floating_point():
    sizes = [np.ones((10, 10), np.int64)]
    assert Budget(0.9, 100, sizes).wanted == 90
    assert Budget(0.7, 100, sizes).wanted == 70  # 0.7 * 100 = 70.00000000000001
    assert Budget(0.701, 100, sizes).wanted == 71


def test_the_floor_is_a_tenth_of_the_average_density_while_that_is_in_reach():
    sizes = [np.ones((100, 10), np.int64), np.ones((100, 1), np.int64)]
    budget = Budget(0.8, 1100, sizes)
    assert budget.capacity.tolist() == [980, 98]
    # 0.86 of all means 0.946 of these two, which leaves 54 per thousand; the floor allows it.
    assert Budget(0.86, 1210, sizes).capacity.tolist() == [986, 98]
    # 0.905 of all means 0.996 of these two: in reach only with one group as the floor.
    assert Budget(0.905, 1210, sizes).capacity.tolist() == [999, 99]


def test_a_kernel_of_one_group_gives_nothing():
    budget = Budget(0.5, 110, [np.ones((100, 1)), np.full((1, 1), 10)])
    assert budget.capacity.tolist() == [95, 0]
    assert budget.room([1]) == 0


def test_targets_out_of_reach_name_the_best():
    sizes = [np.ones((10, 5), np.int64)]
    with pytest.raises(rls.TargetError) as caught:
        Budget(0.9, 100, sizes)
    message = str(caught.value)
    assert "needs 90 of 100 weights pruned, but only 49 can be" in message
    assert "Expected a sparsity of at most 0.49." in message
    assert Budget(0.49, 100, sizes).missing == 49


def test_nothing_is_missing_below_zero():
    budget = Budget(0.5, 10, [np.ones((10, 1), np.int64)])
    budget.pruned[0] = 9
    assert budget.missing == 0
    assert budget.progress == 1
    assert budget.room([0]) == 0
