"""Where groups stand against the score at which the target cuts."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_search import SPARSITY, TRAIN, VALIDATION, quick_autoencoder, trained

import rl_sparsity_tf as rls
from rl_sparsity_tf.data import evaluation_data, training_data
from rl_sparsity_tf.demonstrations import heuristic_plan
from rl_sparsity_tf.network import CompressedNetwork
from rl_sparsity_tf.operations import Operation
from rl_sparsity_tf.standings import NAMES, output_prices, threshold


@pytest.fixture(scope="module")
def network():
    model = trained()
    with quick_autoencoder():
        return CompressedNetwork(
            model,
            training_data(TRAIN, model, batch_size=32),
            evaluation_data(VALIDATION, model, "validation"),
            target=rls.Target(sparsity=SPARSITY),
            recovery=rls.Recovery(method="least_squares"),
        )


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.floats(0, 10), min_size=1, max_size=30),
    st.integers(1, 4),
    st.integers(0, 40),
)
def test_so_many_weights_score_below_the_threshold_and_no_more(scores, size, wanted):
    scores = np.array(scores)
    sizes = np.full(len(scores), size)
    limit = threshold([scores], [sizes], wanted)
    assert sizes[scores < limit].sum() < wanted + size  # whole groups go
    if wanted < sizes.sum():
        assert sizes[scores <= limit].sum() > wanted


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 30), st.integers(0, 40), st.integers(0, 2**31))
def test_counting_and_sorting_find_the_same_threshold(count, wanted, seed):
    rng = np.random.default_rng(seed)
    scores, sizes = rng.normal(size=count) ** 2, np.full(count, 2)
    uneven = sizes.copy()
    uneven[np.argmax(scores)] = 3  # the last to go, so that nothing before it changes
    if wanted < 2 * count - 2:
        assert threshold([scores], [sizes], wanted) == threshold([scores], [uneven], wanted)


@pytest.mark.parametrize("name", ["lamp", "global_magnitude"])
def test_what_stands_below_a_half_is_what_the_heuristic_prunes(network, name):
    plan = heuristic_plan(network, name)
    for kernel in network.kernels:
        pruned = plan.kernels[kernel.path].operations == Operation.PRUNE
        standing = network.standings.of(name, kernel.path).reshape(pruned.shape)
        # Every kernel keeps its best group, and the last may go beyond the threshold.
        assert (pruned != (standing < 0.5)).sum() <= 1


@pytest.mark.parametrize("name", NAMES)
def test_standings_are_bounded_and_rise_with_the_scores(network, name):
    for kernel in network.kernels:
        standing = network.standings.of(name, kernel.path)
        assert standing.shape == (network.groupings[kernel.path].count,)
        assert ((standing >= 0) & (standing <= 1)).all()
        weights = np.square(network.originals[kernel.path]).reshape(-1)
        if name != "output_price":
            assert (np.diff(standing[np.argsort(weights)]) >= -1e-6).all()


def test_prices_are_what_weights_add_to_the_outputs_by_hand(network):
    kernel = network.kernels[0]
    assert network.least_squares is not None
    problem = network.least_squares.problems[kernel.path]
    x = TRAIN[0] - TRAIN[0].mean(axis=0)
    energy = np.square(x @ network.originals[kernel.path]).mean(axis=0).sum()
    expected = np.square(network.originals[kernel.path]) * np.square(x).mean(axis=0)[:, None]
    np.testing.assert_allclose(output_prices(network)[0], expected / energy, rtol=1e-3)
    assert problem.energy == pytest.approx(energy, rel=1e-3)


def test_without_least_squares_prices_are_shares_of_the_weights_energy():
    model = trained()
    with quick_autoencoder():
        network = CompressedNetwork(
            model,
            training_data(TRAIN, model, batch_size=32),
            evaluation_data(VALIDATION, model, "validation"),
            target=rls.Target(sparsity=SPARSITY),
            recovery=rls.Recovery(method="none"),
        )
    for kernel, price in zip(network.kernels, output_prices(network), strict=True):
        squares = np.square(network.originals[kernel.path], dtype=np.float64)
        np.testing.assert_allclose(price, squares / squares.sum())
