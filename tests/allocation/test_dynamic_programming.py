"""Dynamic programming over a database of layers: closed forms, brute force, targets, errors."""

import itertools

import numpy as np
import pytest
import tf_keras as keras
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_search import TRAIN, VALIDATION, quick_search, trained

import rl_sparsity_tf as rls
from rl_sparsity_tf import baselines
from rl_sparsity_tf.allocation import dynamic_programming
from rl_sparsity_tf.allocation import ranking as ranks
from rl_sparsity_tf.allocation.dynamic_programming import cheapest, knapsack, weights_cost
from rl_sparsity_tf.allocation.layer_errors import FLOAT, KernelErrors, kernel_errors, levels
from rl_sparsity_tf.data.batches import evaluation_data, training_data
from rl_sparsity_tf.environment.network import CompressedNetwork, evaluate_plan
from rl_sparsity_tf.layers.groups import GROUPS, Grouping
from rl_sparsity_tf.layers.kernel_spec import KernelSpec
from rl_sparsity_tf.layers.kernels import sparsity_of
from rl_sparsity_tf.layers.operations import Operation

L = keras.layers
DENSE = KernelSpec.of_kind("kernel", "io", "fully_connected")


def compressed(model, target, group="element", recovery="least_squares", **data):
    with quick_search():
        return CompressedNetwork(
            model,
            training_data(data.get("train", TRAIN), model, batch_size=32),
            evaluation_data(data.get("validation", VALIDATION), model, "validation_data"),
            target=target,
            group=group,
            recovery=rls.Recovery(method=recovery),
        )


def pruned_weights(plan):
    return sum(entry.weights_under(Operation.PRUNE) for entry in plan.kernels.values())


# ---------------------------------------------------------------------- the knapsack


def brute_force(errors, costs, limit):
    """The least sum of errors of all combinations, or None."""
    sums = [
        sum(error[i] for error, i in zip(errors, entries, strict=True))
        for entries in itertools.product(*(range(len(error)) for error in errors))
        if sum(cost[i] for cost, i in zip(costs, entries, strict=True)) <= limit
    ]
    return min(sums, default=None)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 100_000), st.integers(1, 4), st.integers(0, 60))
def test_whole_costs_are_solved_exactly(seed, kernels, limit):
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, 6, kernels)
    errors = [rng.random(count) for count in counts]
    costs = [rng.integers(0, 30, count) for count in counts]
    found = knapsack(errors, costs, limit)
    best = brute_force(errors, costs, limit)
    if best is None:
        assert found is None
        return
    assert sum(cost[i] for cost, i in zip(costs, found, strict=True)) <= limit
    assert sum(error[i] for error, i in zip(errors, found, strict=True)) == pytest.approx(best)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 100_000), st.integers(1, 4))
def test_other_costs_stay_within_the_limit_and_lose_little(seed, kernels):
    rng = np.random.default_rng(seed)
    errors = [rng.random(5) for _ in range(kernels)]
    costs = [rng.random(5) * 1000 for _ in range(kernels)]
    limit = rng.random() * 1000 * kernels
    found = knapsack(errors, costs, limit)
    spare = limit - sum(cost.min() for cost in costs)
    if spare < 0:
        assert found is None
        return
    assert sum(cost[i] for cost, i in zip(costs, found, strict=True)) <= limit
    got = sum(error[i] for error, i in zip(errors, found, strict=True))
    # Rounding the costs up takes at most one of the 4,096 units per kernel.
    assert got <= brute_force(errors, costs, limit - spare * kernels / 4096) + 1e-12


def test_entries_are_chosen_between_levels_and_within_the_limit():
    live = np.array([1.0, 10.0, 100.0])
    steep = KernelErrors("magnitude", np.zeros((10, 10)), live, {32: np.array([0.9, 0.5, 0.0])})
    flat = KernelErrors("magnitude", np.zeros((10, 10)), live, {32: np.array([0.1, 0.05, 0.0])})
    choice = cheapest({"steep": steep, "flat": flat}, weights_cost, 60)
    assert choice.live["steep"] > 40 > 8 > choice.live["flat"]
    assert sum(choice.live.values()) <= 60
    assert cheapest({"steep": steep, "flat": flat}, weights_cost, 1.5) is None
    assert steep.error(np.sqrt(10.0)) == pytest.approx(0.7)


def test_lower_powers_spread_the_errors_less_evenly():
    # 12 weights for two kernels of ten: six for each (errors of 0.4), or all of one (0 and 0.8).
    live = np.arange(1.0, 11.0)
    errors = {32: np.interp(live, [2, 6, 10], [0.8, 0.4, 0.0])}
    database = {name: KernelErrors("magnitude", np.zeros((10, 1)), live, errors) for name in "ab"}
    even = cheapest(database, weights_cost, 12, power=2.0)
    assert set(even.live.values()) == {6}
    whole = cheapest(database, weights_cost, 12, power=0.5)
    assert sorted(whole.live.values()) == [1, 10]


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 2000), st.floats(0, 1), st.floats(0, 1), st.integers(0, 1000))
def test_filling_finds_the_fewest_pruned_from_any_guess(count, guess, share, seed):
    scores = [np.random.default_rng(seed).random((count, 1))]
    ranking = ranks.Ranking(scores, [np.ones((count, 1), int)])
    most = int(share * count)
    live, reached = ranking.least_pruned(lambda one: one[0].sum() <= most, guess * count)
    assert reached == (most >= 1)
    alive = int(live[0].sum())
    if reached:
        assert most * (1 - 1 / 512) - 1 < alive <= most
    else:
        assert alive == 1


# ---------------------------------------------------------------------- the database


def one_layer(matrix, rows, bias=False):
    """The least-squares problem of a dense layer on given rows."""
    model = keras.Sequential(
        [L.Input((len(matrix),)), L.Dense(np.shape(matrix)[1], use_bias=bias, name="only")]
    )
    weights = [np.array(matrix, np.float32)]
    model.set_weights([*weights, np.zeros(np.shape(matrix)[1])] if bias else weights)
    model.compile("sgd", "mse")
    data = (rows.astype(np.float32), np.zeros((len(rows), np.shape(matrix)[1]), np.float32))
    network = compressed(model, rls.Target(sparsity=0.5), train=data, validation=data)
    return network.least_squares.problems["only/kernel"]


def test_errors_of_independent_inputs_are_those_of_the_weights_that_go():
    # Each input is 1 in a row of its own: the Gram matrix is a diagonal.
    scales = np.array([1.0, 2.0, 0.1, 1.0])
    rows = np.repeat(np.diag(scales), 8, axis=0)
    matrix = np.array([[1.0], [2.0], [30.0], [4.0]])
    problem = one_layer(matrix, rows)
    found = kernel_errors(matrix.astype("f"), Grouping("element", 4, 1), DENSE, problem)
    felt = (matrix[:, 0] * scales) ** 2  # 1, 16, 9, 16
    assert found.criterion == "activation"
    assert np.argsort(found.saliency[:, 0]).tolist() in ([0, 2, 1, 3], [0, 2, 3, 1])
    assert found.live.tolist() == [1, 2, 3, 4]
    expected = [(felt.sum() - kept) / felt.sum() for kept in (16, 32, 41, 42)]
    assert found.errors[FLOAT] == pytest.approx(np.array(expected), abs=2e-3)


def test_the_fit_makes_up_for_what_goes_where_inputs_agree():
    rng = np.random.default_rng(0)
    first = rng.normal(size=(200, 1))
    rows = np.concatenate([first, first, rng.normal(size=(200, 1))], axis=1)
    problem = one_layer([[1.0], [1.0], [0.1]], rows)
    matrix = problem.original
    alive = np.array([[True], [False], [True]])
    chosen = np.where(alive, Operation.KEEP, Operation.PRUNE).astype(np.uint8)
    before = problem.kernel.matrix().copy()
    weights = problem.solve(chosen, 8, problem.dense)
    assert weights[:, 0] == pytest.approx([2.0, 0.0, 0.1], abs=5e-3)
    np.testing.assert_array_equal(problem.kernel.matrix(), before)  # nothing is set
    assert problem.relative_error(weights) < 1e-4
    assert problem.relative_error(np.where(alive, matrix, 0)) == pytest.approx(0.25, abs=0.05)
    problem.fit(chosen, 8, problem.dense)
    np.testing.assert_array_equal(np.where(alive, problem.kernel.matrix(), 0), weights)


def test_fewer_bits_and_fewer_weights_lose_more():
    rng = np.random.default_rng(1)
    problem = one_layer(rng.normal(size=(30, 8)), rng.normal(size=(300, 30)), bias=True)
    grouping = Grouping("element", 30, 8)
    found = kernel_errors(problem.original, grouping, DENSE, problem, bits=(32, 8, 4))
    whole, eight, four = (found.errors[bits] for bits in (32, 8, 4))
    for errors in (whole, eight, four):
        assert (np.diff(errors) <= 0).all()
    assert whole[-1] == pytest.approx(0, abs=1e-5)
    # On average, rounding adds a twelfth of the squared step for every weight.
    quantized = np.full(grouping.shape, Operation.QUANTIZE, np.uint8)
    rounded = problem.relative_error(problem.solve(quantized, 8, problem.dense))
    assert 0 < eight[-1] < 1e-3
    assert rounded == pytest.approx(eight[-1], rel=0.5)
    assert (eight > whole).all()
    assert (four[5:] > eight[5:]).all()  # a weight that is alone in its output is on the grid
    assert 50 < four[-1] / eight[-1] < 400  # by (127 / 7) ** 2, less what feedback saves


def test_kernels_without_a_fit_count_by_their_weights():
    matrix = np.array([[1.0, 2.0], [3.0, 4.0]], np.float32)
    spec = KernelSpec.of_kind("embeddings", "oi", "gather")
    found = kernel_errors(matrix, Grouping("element", 2, 2), spec, None, bits=(32, 8))
    assert found.criterion == "magnitude"
    assert found.live.tolist() == [1, 2, 3, 4]
    assert found.errors[32] == pytest.approx(np.array([14, 5, 1, 0]) / 30)
    step = 4 / 127  # one scale for the tensor
    assert found.errors[8][-1] == pytest.approx(4 * step**2 / 12 / 30, rel=1e-5)


@pytest.mark.parametrize("count", [1, 2, 7, 500, 200_000])
def test_levels_go_from_one_group_to_all(count):
    found = levels(count)
    assert found[0] == 1
    assert found[-1] == count
    assert len(found) == len(set(found)) <= 21
    if count > 1000:
        ratios = np.array(found[2:]) / found[1:-1]
        assert ratios == pytest.approx(np.full(len(ratios), ratios[0]), rel=0.02)


def test_convolutions_and_layers_that_cannot_be_fitted_are_weighed_together():
    model = keras.Sequential(
        [
            L.Input((8, 8, 3)),
            L.Conv2D(4, 3),
            L.DepthwiseConv2D(3),
            L.Conv2DTranspose(4, 2),
            L.Flatten(),
            L.Dense(3, activation="softmax"),
        ]
    )
    rng = np.random.default_rng(0)
    data = rng.normal(size=(64, 8, 8, 3)).astype(np.float32), rng.integers(0, 3, 64)
    plan = baselines.dynamic_programming(model, data, sparsity=0.6)
    total = sum(entry.size for entry in plan.kernels.values())
    assert len(plan.kernels) == 4
    assert pruned_weights(plan) == np.ceil(round(0.6 * total, 6))


# ---------------------------------------------------------------------- plans


@pytest.mark.parametrize("group", GROUPS)
def test_a_sparsity_is_met_by_the_fewest_groups(group):
    model = trained()
    before = [weight.copy() for weight in model.get_weights()]
    plan = baselines.dynamic_programming(model, TRAIN, sparsity=0.5, group=group)
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
    largest = max(int(entry.grouping.sizes.max()) for entry in plan.kernels.values())
    assert 36 <= pruned_weights(plan) < 36 + largest
    assert sparsity_of(rls.strip(rls.wrap(model, plan))) == pruned_weights(plan) / 72
    assert baselines.dynamic_programming(model, TRAIN, sparsity=0.5, group=group) == plan


@pytest.mark.slow
def test_what_no_one_listens_to_goes_first():
    # Half of the inputs are 0 in all of the data; their weights are the largest.
    rng = np.random.default_rng(0)
    model = keras.Sequential([L.Input((8,)), L.Dense(6, activation="relu"), L.Dense(2)])
    weights = model.get_weights()
    weights[0][:4] = 10.0
    model.set_weights(weights)
    model.compile("sgd", "mse")
    x = rng.normal(size=(64, 8)).astype(np.float32)
    x[:, :4] = 0.0
    plan = baselines.dynamic_programming(model, (x, np.zeros((64, 2))), sparsity=24 / 60)
    first = next(iter(plan.kernels.values()))
    gone = first.operations == Operation.PRUNE
    assert gone[:4].sum() >= 22
    assert gone[4:].sum() == 0
    assert pruned_weights(plan) == 24


def test_the_data_may_be_a_dataset_and_the_model_not_compiled():
    import tensorflow as tf

    model = keras.models.clone_model(trained())
    model.set_weights(trained().get_weights())
    batched = tf.data.Dataset.from_tensor_slices(TRAIN).batch(32)
    plan = baselines.dynamic_programming(model, batched, sparsity=0.5)
    assert pruned_weights(plan) == 36


def test_what_lives_is_quantized_on_request():
    plan = baselines.dynamic_programming(trained(), TRAIN, sparsity=0.5, quantize=True, bits=4)
    assert {entry.exported_bits for entry in plan.kernels.values()} == {4}
    plan = baselines.dynamic_programming(trained(), TRAIN, sparsity=0.5)
    assert {entry.exported_bits for entry in plan.kernels.values()} == {32}


# ---------------------------------------------------------------------- bytes


@pytest.fixture(scope="module")
def sized():
    keras.utils.set_random_seed(3)
    model = keras.Sequential([L.Input((60,)), L.Dense(64, activation="relu"), L.Dense(3)])
    model.compile("adam", "mse")
    return model


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(0)
    return rng.normal(size=(256, 60)).astype("f"), rng.normal(size=(256, 3)).astype("f")


# Dense, the file has 17.7 kB in float32 and 6.6 kB as int8.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "options", "bits"),
    [
        (rls.Target(tflite_bytes=4500), {}, {8}),
        (rls.Target(gzip_bytes=2800), {"bits": 4}, {4, 8}),
    ],
)
def test_the_real_file_fits_and_is_no_smaller_than_it_must(
    sized, rows, tmp_path, target, options, bits
):
    plan = baselines.dynamic_programming(sized, rows, target=target, **options)
    report = rls.export_tflite(
        rls.strip(rls.wrap(sized, plan)),
        tmp_path / "model.tflite",
        plan=plan,
        formats="raw" if target.kind == "tflite_bytes" else "gzip",
    )
    size = report.tflite_bytes if target.kind == "tflite_bytes" else report.gzip_bytes
    assert 0.93 * target.value < size <= target.value
    assert {entry.exported_bits for entry in plan.kernels.values()} <= bits | {32}
    margin = 0.99 if target.kind == "tflite_bytes" else 0.97
    sizes = rls.SizeModel(sized, "raw" if target.kind == "tflite_bytes" else "gzip")
    predicted = sizes.plan_size(plan)
    used = predicted.raw if target.kind == "tflite_bytes" else predicted.gzip
    assert 0.99 * margin * target.value < used <= margin * target.value + 1


@pytest.mark.slow
def test_a_size_out_of_reach_is_refused_as_by_the_others(sized, rows):
    target = rls.Target(tflite_bytes=1_100)
    with pytest.raises(rls.TargetError, match=r"tflite_bytes=1_100\) cannot be reached: with ev"):
        baselines.dynamic_programming(sized, rows, target=target)


# ---------------------------------------------------------------------- in the search


@pytest.mark.slow
def test_the_search_is_proposed_what_users_get():
    model = trained()
    network = compressed(model, rls.Target(sparsity=0.6))
    before = network.snapshot()
    plan = dynamic_programming.propose(network)
    assert pruned_weights(plan) == network.budget.wanted
    assert {entry.exported_bits for entry in plan.kernels.values()} == {8}
    after = network.snapshot()
    for path, operations in before.operations.items():
        np.testing.assert_array_equal(operations, after.operations[path])
    outcome = evaluate_plan(network, plan)
    assert outcome.sparsity == pytest.approx(44 / 72)
    # In a later state of the network it proposes the same.
    assert dynamic_programming.propose(network) == plan
    public = baselines.dynamic_programming(model, TRAIN, sparsity=0.6, quantize=True)
    same = [
        (one.operations == other.operations).mean()
        for one, other in zip(plan.kernels.values(), public.kernels.values(), strict=True)
    ]
    assert min(same) > 0.7  # the rows are others


def test_without_least_squares_weights_count():
    network = compressed(trained(), rls.Target(sparsity=0.6), recovery="none")
    plan = dynamic_programming.propose(network)
    assert pruned_weights(plan) == network.budget.wanted
    first = plan.kernels["first/kernel"].operations == Operation.PRUNE
    original = np.abs(network.originals["first/kernel"])
    assert original[first].max() < original[~first].min()


@pytest.mark.slow
def test_proposals_for_a_size_fit_it():
    keras.utils.set_random_seed(1)
    model = keras.Sequential([L.Input((6,)), L.Dense(300, activation="relu"), L.Dense(3)])
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    network = compressed(model, rls.Target(tflite_bytes=4000))
    plan = dynamic_programming.propose(network)
    used = rls.SizeModel(model, "raw").plan_size(plan).raw
    assert 0.95 * 4000 < used <= 4000
    assert {entry.exported_bits for entry in plan.kernels.values()} <= {8, 32}


# ---------------------------------------------------------------------- wrong calls


def test_dynamic_programming_says_what_it_needs():
    with pytest.raises(rls.DataError, match=r"was given no data, which it measures.*Pass data="):
        baselines.dynamic_programming(trained(), sparsity=0.5)
    with pytest.raises(rls.DataError, match="train"):
        baselines.dynamic_programming(trained(), (TRAIN[0][:, :2], TRAIN[1]), sparsity=0.5)
    with pytest.raises(rls.TargetError, match=r"Expected a sparsity of at most 0.972"):
        baselines.dynamic_programming(trained(), TRAIN, sparsity=0.99)
    with pytest.raises(rls.ArgumentError, match="Expected exactly one of them"):
        baselines.dynamic_programming(trained(), TRAIN)
