"""Where groups stand against the score at which the target cuts."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_search import SPARSITY, TRAIN, VALIDATION, quick_search, trained

import rl_sparsity_tf as rls
from rl_sparsity_tf.agents.demonstrations import heuristic_plan
from rl_sparsity_tf.data.batches import evaluation_data, training_data
from rl_sparsity_tf.environment.group_ranks import NAMES, Ranks, output_prices, threshold
from rl_sparsity_tf.environment.network import CompressedNetwork
from rl_sparsity_tf.layers.operations import Operation


@pytest.fixture(scope="module")
def network():
    model = trained()
    with quick_search():
        return CompressedNetwork(
            model,
            training_data(TRAIN, model, batch_size=32),
            evaluation_data(VALIDATION, model, "validation"),
            target=rls.Target(sparsity=SPARSITY),
            recovery=rls.Recovery(method="least_squares"),
        )


def curve(scores: np.ndarray, sizes: np.ndarray, most: int | None = None):
    """A kernel as `threshold` takes it."""
    ranks = Ranks.of(scores, scores, sizes)
    weights = ranks.undecided(np.zeros(len(scores), bool))
    return ranks.ordered, weights, int(sizes.sum()) if most is None else most


def sorted_threshold(kernels, wanted: int) -> float:
    """The definition: sort all, take away whole groups, and look at the first that stays."""
    rows = []
    for scores, sizes, most in kernels:
        given = 0
        for place in np.argsort(scores, kind="stable"):
            rows.append((scores[place], min(sizes[place], most - given)))
            given += rows[-1][1]
    rows.sort(key=lambda row: row[0])
    gone = np.cumsum([size for _, size in rows])
    place = int(np.searchsorted(gone, wanted))
    return float(rows[min(place + 1, len(rows) - 1)][0])


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.floats(0, 10), min_size=1, max_size=30),
    st.integers(1, 4),
    st.integers(1, 40),
)
def test_so_many_weights_score_below_the_threshold_and_no_more(scores, size, wanted):
    scores = np.array(scores)
    sizes = np.full(len(scores), size)
    limit = threshold([curve(scores, sizes)], wanted)
    assert sizes[scores < limit].sum() < wanted + size  # whole groups go
    if wanted < sizes.sum():
        assert sizes[scores <= limit].sum() > wanted


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 4), st.floats(0.01, 1.0), st.booleans(), st.integers(0, 2**31))
def test_halving_finds_what_sorting_finds_in_all_kernels_at_once(kernels, share, full, seed):
    rng = np.random.default_rng(seed)
    given_kernels = []
    for _ in range(kernels):
        count = int(rng.integers(1, 40))
        scores = rng.choice([rng.normal(size=count) ** 8, rng.integers(0, 4, count) / 1.0])
        sizes = rng.integers(1, 4, count)
        most = int(sizes.sum()) if full else int(rng.integers(1, sizes.sum() + 1))
        given_kernels.append((np.asarray(scores, float), sizes, most))
    wanted = max(1, int(share * sum(most for _, _, most in given_kernels)))
    found = threshold([curve(*one) for one in given_kernels], wanted)
    assert found == sorted_threshold(given_kernels, wanted)


def all_of(network, name, kernel):
    count = network.groupings[kernel.path].count
    standing = network.group_ranks.of(name, kernel.path)
    some = np.arange(count)[::2]
    np.testing.assert_array_equal(network.group_ranks.of(name, kernel.path, some), standing[some])
    return standing


@pytest.mark.parametrize("name", ["lamp", "global_magnitude"])
def test_as_much_stands_below_a_half_as_the_heuristic_prunes_and_the_least_salient(network, name):
    plan = heuristic_plan(network, name)
    for kernel in network.kernels:
        pruned = (plan.kernels[kernel.path].operations == Operation.PRUNE).sum()
        below = all_of(network, name, kernel) < 0.5
        # Every kernel keeps its best group, and the last may go beyond the threshold.
        assert abs(int(pruned) - int(below.sum())) <= 1
        first = np.argsort(network.saliency(kernel.path), kind="stable")[: below.sum()]
        assert below[first].all()


@pytest.mark.parametrize("name", NAMES)
def test_ranks_are_bounded_and_rise_with_the_saliency(network, name):
    for kernel in network.kernels:
        standing = all_of(network, name, kernel)
        assert standing.shape == (network.groupings[kernel.path].count,)
        assert ((standing >= 0) & (standing <= 1)).all()
        assert (np.diff(standing[np.argsort(network.saliency(kernel.path))]) >= 0).all()


def test_the_threshold_follows_what_was_decided(network):
    first, last = network.kernels
    network.reset()
    start = network.group_ranks.threshold("lamp")
    assert network.group_ranks.threshold("lamp") == start
    count = network.groupings[first.path].count
    # All of the first kernel stays: the other has to give what is missing, as far as it can.
    network.assign(first.path, np.full(network.groupings[first.path].shape, Operation.KEEP))
    assert network.group_ranks.threshold("lamp") > start
    network.reset()
    # More of the first kernel goes than LAMP would take: less has to go of the other.
    plan = np.full(count, Operation.PRUNE)
    plan[np.argmax(network.scores("lamp")[0])] = Operation.KEEP
    shape = network.groupings[first.path].shape
    network.assign(first.path, plan.reshape(shape))
    assert network.group_ranks.threshold("lamp") < start
    missing = network.budget.missing
    assert missing == 0 or (all_of(network, "lamp", last) < 0.5).sum() == missing
    everything = np.full(network.groupings[last.path].shape, Operation.PRUNE)
    network.assign(last.path, everything)
    assert network.group_ranks.threshold("lamp") == 0.0
    assert (all_of(network, "lamp", first) == 1.0).all()
    network.reset()


def test_where_magnitude_is_to_decide_heuristics_by_magnitude_are_met_exactly(network):
    network.decisions.by_magnitude = True
    network.group_ranks.forget()
    plan = heuristic_plan(network, "lamp")
    for kernel in network.kernels:
        pruned = plan.kernels[kernel.path].operations == Operation.PRUNE
        standing = network.group_ranks.of("lamp", kernel.path).reshape(pruned.shape)
        assert (pruned != (standing < 0.5)).sum() <= 1
    network.decisions.by_magnitude = False
    network.group_ranks.forget()


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
    with quick_search():
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
