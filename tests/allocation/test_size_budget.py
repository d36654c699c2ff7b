"""The budget of bytes: what is refused, and the wall that never lets the size slip out of reach."""

import numpy as np
import pytest
from byte_budgets import budget, dense_costs, sparse_costs
from hypothesis import given, settings
from hypothesis import strategies as st

from rl_sparsity_tf.allocation.budgets import KernelState
from rl_sparsity_tf.allocation.size_budget import KernelCosts
from rl_sparsity_tf.errors import TargetError


def scaled_costs(weights):
    """Integers bring a scale for every output: with few weights left floats are smaller."""
    live = np.array([0.0, weights])
    return KernelCosts(live, 5.0 * live, 2.0 * live + 40)


def float_costs(weights):
    live = np.array([0.0, weights])
    return KernelCosts(live, 5.0 * live, None)


def size_now(one, states):
    """The file with everything undecided at full precision."""
    return one.fixed + one.kernel_bytes(states)


def start(one):
    return [KernelState(0, int(total), False, False) for total in one.totals]


def test_dense_integers_need_no_pruning():
    one = budget(100 + 1012 + 512, [dense_costs(1000), dense_costs(500)], [1000, 500])
    assert one.goal == 0.0
    assert one.wanted == 0
    assert one.progress == 1.0
    assert one.least(start(one)) == pytest.approx(1624)
    assert size_now(one, start(one)) == pytest.approx(100 + 4 * 1500)


def test_sparse_integers_imply_a_sparsity():
    # 2 bytes a weight: 300 of 1,500 weights fit into 600 bytes.
    one = budget(700, [sparse_costs(1000), sparse_costs(500)], [1000, 500])
    assert one.goal == pytest.approx(0.8, abs=0.003)
    # A tenth of the density left on average is the floor of every kernel.
    assert one.least(start(one)) == pytest.approx(100 + 2 * 0.02 * 1500, rel=0.05)


def test_a_size_out_of_reach_is_refused_with_the_smallest_that_is_not():
    with pytest.raises(TargetError) as caught:
        budget(103, [sparse_costs(1000), sparse_costs(500)], [1000, 500])
    assert "Target(tflite_bytes=103) cannot be reached" in str(caught.value)
    assert "about 104 bytes" in str(caught.value)  # one weight of each kernel
    budget(104, [sparse_costs(1000), sparse_costs(500)], [1000, 500])


def test_kernels_that_cannot_be_integers_are_paid_for_as_floats():
    one = budget(100 + 5 * 1000, [float_costs(1000)], [1000])
    assert one.goal == 0.0
    assert one.least([KernelState(0, 0, False, True)]) == pytest.approx(5100)


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        (KernelState(0, 0, False, True), 2000),  # all quantized
        (KernelState(0, 0, True, True), 5000),  # mixed: float
        (KernelState(0, 0, True, False), 5000),  # kept
        (KernelState(500, 0, False, True), 1000),
        (KernelState(500, 0, True, False), 2500),
        (KernelState(0, 0, False, False), 5000),  # only shuffled
    ],
)
def test_what_is_decided_costs_what_it_is_stored_as(state, expected):
    one = budget(10_000, [sparse_costs(1000)], [1000])
    assert one.least([state]) == size_now(one, [state]) == pytest.approx(100 + expected)


KERNELS = st.lists(
    st.tuples(
        st.integers(4, 60),
        st.sampled_from([dense_costs, sparse_costs, scaled_costs, float_costs]),
    ),
    min_size=1,
    max_size=4,
)


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        (KernelState(90, 10, False, False), 5),  # nothing lives as yet: both types are open
        (KernelState(90, 5, False, True), 2 * 5 + 40),  # with the rest pruned it is integers
        (KernelState(90, 5, False, False), 5 * 5),  # shuffled groups alone are floats
        (KernelState(80, 10, True, True), 5 * 10),
    ],
)
def test_what_lives_decides_the_type_if_the_rest_is_pruned(state, expected):
    one = budget(145, [scaled_costs(100)], [100])  # nine weights as floats
    assert one.least([state]) == pytest.approx(100 + expected)


@pytest.mark.parametrize(
    ("state", "quantized"),
    [
        (KernelState(2, 3, False, False), True),  # those behind can be stored as integers
        (KernelState(2, 3, True, False), False),
        (KernelState(2, 0, False, True), True),
        (KernelState(2, 0, False, False), False),  # all that lives is shuffled
    ],
)
def test_what_survives_is_integers_only_if_something_can_be(state, quantized):
    assert state.surviving == KernelState(2, 0, state.kept, quantized)


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(KERNELS, st.floats(0.0, 1.0), st.randoms(use_true_random=False))
def test_an_action_that_keeps_the_size_in_reach_always_exists(kernels, tightness, random):
    weights = [count for count, _ in kernels]
    costs = [make(count) for count, make in kernels]
    generous = budget(1e9, costs, weights)
    most = size_now(generous, start(generous))
    smallest = budget_floor(costs, weights)
    limit = smallest + tightness * (most - smallest)
    one = budget(limit, costs, weights)
    states = start(one)
    for index in range(len(weights)):
        while states[index].undecided:
            count = min(states[index].undecided, random.randint(1, 9))
            choices = []
            for operation in ("keep", "prune", "quantize", "shuffle"):
                after = decide(one, states, index, count, operation)
                if after is not None and one.least(after) <= one.limit + 1e-6:
                    choices.append(after)
            assert choices
            states = random.choice(choices)
    assert size_now(one, states) <= one.limit + 1e-6


def budget_floor(costs, weights):
    return 100.0 + sum(cost.least(1, True) for cost in costs)


def decide(one, states, index, count, operation):
    state = states[index]
    if operation == "prune":
        count = min(count, int(one.capacity[index]) - state.pruned)
        if count <= 0:
            return None
    if operation == "quantize" and one.costs[index].integers is None:
        return None
    after = KernelState(
        state.pruned + (count if operation == "prune" else 0),
        state.undecided - count,
        state.kept or operation == "keep",
        state.quantized or operation == "quantize",
    )
    return [*states[:index], after, *states[index + 1 :]]
