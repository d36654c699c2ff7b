"""Random densities meet the target, and are drawn as random search draws them."""

from types import SimpleNamespace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from rl_sparsity_tf.agents.demonstrations import random_demonstration


def network(sizes, share):
    kernels = [SimpleNamespace(size=size) for size in sizes]
    budget = SimpleNamespace(wanted=int(share * sum(sizes)))
    groupings = {f"kernel_{index}": None for index in range(len(sizes))}
    return SimpleNamespace(kernels=kernels, budget=budget, groupings=groupings)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 100_000), min_size=1, max_size=8),
    st.floats(0.0, 0.99),
    st.integers(0, 2**31),
)
def test_random_densities_meet_the_target(sizes, share, seed):
    one = network(sizes, share)
    found = random_demonstration(one, np.random.default_rng(seed))
    densities = np.array(list(found.densities.values()))
    assert list(found.densities) == list(one.groupings)
    assert ((densities >= 0) & (densities <= 1)).all()
    living = float((densities * sizes).sum())
    assert abs(living - (sum(sizes) - one.budget.wanted)) <= 1e-6 * sum(sizes)


def test_ratios_are_log_uniform_within_a_factor_of_eight_around_the_middle():
    rng, ratios = np.random.default_rng(0), []
    for _ in range(3000):
        # At a hundredth of the weights no density ends at 1.
        first, second = random_demonstration(network([500, 500], 0.99), rng).densities.values()
        ratios.append(np.log(first / second) / np.log(8))
    # The difference of two uniform numbers of [-1, 1]: triangular, variance 2/3.
    assert abs(np.mean(ratios)) < 0.05
    assert abs(np.var(ratios) - 2 / 3) < 0.05
    assert np.abs(ratios).max() <= 2.0
