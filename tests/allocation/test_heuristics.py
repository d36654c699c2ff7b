"""Heuristics that make plans without a search: closed forms, properties, errors, real files."""

import dataclasses

import numpy as np
import pytest
import tf_keras as keras
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_search import TRAIN, VALIDATION, quick_search, trained, untrained
from zoo import ZOO

import rl_sparsity_tf as rls
from rl_sparsity_tf import baselines
from rl_sparsity_tf.agents import demonstrations
from rl_sparsity_tf.allocation import ranking as ranks
from rl_sparsity_tf.allocation.problem import PlanRequest
from rl_sparsity_tf.allocation.storage import Storage
from rl_sparsity_tf.data.batches import evaluation_data, training_data
from rl_sparsity_tf.environment.network import CompressedNetwork
from rl_sparsity_tf.layers.groups import GROUPS, Grouping
from rl_sparsity_tf.layers.kernels import count_weights, find_kernels, sparsity_of
from rl_sparsity_tf.layers.operations import Operation

L = keras.layers
NAMES = ranks.HEURISTICS


def net(*matrices):
    """Dense layers of the given kernels, without biases."""
    model = keras.Sequential([L.Input((len(matrices[0]),))])
    for matrix in matrices:
        model.add(L.Dense(np.shape(matrix)[1], use_bias=False))
    model.set_weights([np.array(matrix, np.float32) for matrix in matrices])
    model.compile("sgd", "mse")
    return model


def pruned(plan):
    """Where groups are pruned, kernel by kernel."""
    return [(e.operations == Operation.PRUNE).astype(int).tolist() for e in plan.kernels.values()]


def make(name, model, **options):
    data = TRAIN if name == "first_order" else None
    return getattr(baselines, name)(model, data, **options)


# ---------------------------------------------------------------------- closed forms

FIRST = [[1.0, -2.0, 3.0], [-4.0, 5.0, -6.0]]
SECOND = [[0.1], [0.2], [-30.0]]


def test_uniform_prunes_the_same_share_of_every_kernel():
    plan = baselines.uniform(net(FIRST, SECOND), sparsity=5 / 9)
    # Three of six; of three the nearest to 5/3 that fits the total.
    assert pruned(plan) == [[[1, 1, 1], [0, 0, 0]], [[1], [1], [0]]]


def test_global_magnitude_compares_across_kernels():
    plan = baselines.global_magnitude(net(FIRST, SECOND), sparsity=4 / 9)
    assert pruned(plan) == [[[1, 1, 0], [0, 0, 0]], [[1], [1], [0]]]


def test_lamp_weighs_a_group_against_those_that_outlive_it():
    model = net(FIRST, SECOND)
    request = PlanRequest.of(model, sparsity=0.5)
    matrices = {kernel.path: kernel.matrix() for kernel in request.kernels}
    first, second = ranks.scores("lamp", request.kernels, request.groupings, matrices)
    assert first == pytest.approx(
        np.array([[1 / 91, 4 / 90, 9 / 86], [16 / 77, 25 / 61, 1.0]]), rel=1e-6
    )
    rest = 900 + 0.04
    assert second == pytest.approx(np.array([[0.01 / (rest + 0.01)], [0.04 / rest], [1.0]]))
    # 0.2 goes before 1 and -2; the largest of each kernel never does.
    assert pruned(baselines.lamp(model, sparsity=3 / 9)) == [
        [[1, 0, 0], [0, 0, 0]],
        [[1], [1], [0]],
    ]
    assert pruned(baselines.lamp(model, sparsity=7 / 9)) == [
        [[1, 1, 1], [1, 1, 0]],
        [[1], [1], [0]],
    ]


def test_lamp_of_blocks_takes_squared_norms():
    # Five inputs: a full block and a tail of one; the tail of 3 outweighs four ones.
    model = net([[1.0, 5.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [3.0, 0.5]])
    request = PlanRequest.of(model, sparsity=0.5, group="block4")
    matrices = {kernel.path: kernel.matrix() for kernel in request.kernels}
    (score,) = ranks.scores("lamp", request.kernels, request.groupings, matrices)
    assert score == pytest.approx(np.array([[4 / 38, 1.0], [9 / 34, 0.25 / 38.25]]))


def test_erk_keeps_small_kernels_whole_and_rescales_the_others():
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(40, 30)), rng.normal(size=(30, 5))
    plan = baselines.erk(net(first, second), sparsity=0.5)
    # 675 weights live. The factor (40 + 30 + 30 + 5) e = 675 would give the second kernel a
    # density of 6.43 * 35 / 150 = 1.5: it is kept whole, and 525 are left for the first.
    large, small = plan.kernels.values()
    assert small.weights_under(Operation.PRUNE) == 0
    assert large.weights_under(Operation.KEEP) == 525
    kept = np.abs(first)[large.operations == Operation.KEEP].min()
    assert np.abs(first)[large.operations == Operation.PRUNE].max() <= kept


def iterative_erk(shapes, density):
    """Densities by the loop of the authors' code: cap, and compute the factor anew."""
    whole = set()
    while True:
        sizes = [int(np.prod(shape)) for shape in shapes]
        wanted = density * sum(sizes) - sum(sizes[i] for i in whole)
        rest = [i for i in range(len(shapes)) if i not in whole]
        ratios = {i: sum(shapes[i]) / sizes[i] for i in rest}
        factor = wanted / sum(ratios[i] * sizes[i] for i in rest)
        beyond = {i for i in rest if factor * ratios[i] > 1}
        if not beyond:
            return [1.0 if i in whole else factor * ratios[i] for i in range(len(shapes))]
        whole |= beyond


@pytest.mark.parametrize("sparsity", [0.2, 0.5, 0.8, 0.95])
def test_erk_follows_the_iterative_rule_of_the_paper(sparsity):
    model = ZOO["residual"]()
    plan = baselines.erk(model, sparsity=sparsity)
    shapes = [entry.shape for entry in plan.kernels.values()]
    assert {len(shape) for shape in shapes} == {2, 4}
    for entry, density in zip(
        plan.kernels.values(), iterative_erk(shapes, 1 - sparsity), strict=True
    ):
        assert (1 - entry.sparsity) * entry.size == pytest.approx(density * entry.size, abs=1.01)


@pytest.mark.parametrize("group", ["element", "channel"])
def test_first_order_is_the_gradient_times_the_weight(group):
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(50, 6)).astype("f"), rng.normal(size=(50, 4)).astype("f")
    matrix = rng.normal(size=(6, 4)).astype("f")
    plan = baselines.first_order(net(matrix), (x, y), sparsity=0.5, group=group)
    gradient = x.T @ (2 * (x @ matrix - y)) / y.size
    products = (gradient * matrix).sum(axis=0 if group == "channel" else (), keepdims=True)
    order = np.argsort(np.abs(products).reshape(-1))
    expected = np.zeros(order.size, int)
    expected[order[: order.size // 2]] = 1
    assert np.ravel(pruned(plan)[0]).tolist() == expected.tolist()


def test_first_order_reads_a_dataset_as_it_reads_arrays():
    import tensorflow as tf

    batched = tf.data.Dataset.from_tensor_slices(TRAIN).batch(32)
    one = baselines.first_order(trained(), TRAIN, sparsity=0.5)
    other = baselines.first_order(trained(), batched, sparsity=0.5)
    # 96 rows are a batch and a half of 64: the arrays' second half batch is left out.
    same = np.mean([a == b for a, b in zip(np.ravel(_flat(one)), _flat(other), strict=True)])
    assert same > 0.8


def _flat(plan):
    return np.concatenate([entry.operations.reshape(-1) for entry in plan.kernels.values()])


# ---------------------------------------------------------------------- selection


@st.composite
def networks(draw):
    """Scores and sizes of a few kernels, with ties and ragged blocks."""
    group = draw(st.sampled_from(GROUPS))
    seed = draw(st.integers(0, 10_000))
    rng = np.random.default_rng(seed)
    shapes = draw(
        st.lists(st.tuples(st.integers(1, 21), st.integers(1, 6)), min_size=1, max_size=4)
    )
    groupings = [Grouping(group, *shape) for shape in shapes]
    levels = draw(st.sampled_from([3, 10_000]))
    found = [rng.integers(0, levels, g.shape).astype(float) for g in groupings]
    return found, [g.sizes for g in groupings]


@settings(max_examples=200, deadline=None)
@given(networks(), st.floats(0, 1))
def test_the_fewest_groups_that_reach_the_target_go(network, share):
    scores, sizes = network
    ranking = ranks.Ranking(scores, sizes)
    wanted = round(share * ranking.reachable)
    live = ranking.live(wanted)
    assert all(alive.any() for alive in live)
    gone = [(s[~alive], size[~alive]) for s, alive, size in zip(scores, live, sizes, strict=True)]
    total = sum(size.sum() for _, size in gone)
    assert total >= wanted
    if wanted == 0:
        assert total == 0
        return
    last = max(score.max() for score, _ in gone if score.size)
    smallest = min(size[score == last].min() for score, size in gone if (score == last).any())
    largest = max(size[score == last].max() for score, size in gone if (score == last).any())
    assert total - largest < wanted
    assert smallest <= largest
    for score, alive in zip(scores, live, strict=True):
        # Whatever lives although it scores less is the group that its kernel keeps.
        assert (score[alive] < last).sum() <= (1 if alive.sum() == 1 else 0)


@settings(max_examples=200, deadline=None)
@given(networks(), st.floats(0, 1), st.floats(0, 1))
def test_no_kernel_gives_more_than_its_capacity(network, cap, share):
    scores, sizes = network
    capacity = [int(cap * (size.sum() - size.max())) for size in sizes]
    ranking = ranks.Ranking(scores, sizes, capacity)
    live = ranking.live(ranking.reachable)
    for score, alive, size, most in zip(scores, live, sizes, capacity, strict=True):
        assert size[~alive].sum() <= most
        # No group that would still fit was left out, but the one that the kernel keeps.
        others = alive.copy().reshape(-1)
        others[np.flatnonzero(score == score.max())[-1]] = False
        left = size.reshape(-1)[others]
        assert not left.size or size[~alive].sum() + left.min() > most
    wanted = round(share * ranking.reachable)
    live = ranks.select(scores, sizes, wanted, capacity)
    assert sum(size[~alive].sum() for alive, size in zip(live, sizes, strict=True)) >= wanted


def test_ties_go_to_what_comes_first():
    scores = [np.ones((2, 2)), np.ones((2, 2))]
    live = ranks.select(scores, [np.ones((2, 2), int)] * 2, 4)
    assert [alive.astype(int).tolist() for alive in live] == [[[0, 0], [0, 1]], [[0, 1], [1, 1]]]
    ragged = [np.array([[2, 2], [1, 1]])] * 2
    live = ranks.select(scores, ragged, 5)
    assert [alive.astype(int).tolist() for alive in live] == [[[0, 0], [0, 1]], [[1, 1], [1, 1]]]


def test_selecting_more_than_there_is_is_refused():
    with pytest.raises(
        rls.TargetError, match=r"4 weights are to be pruned.*give only 3 of their 4"
    ):
        ranks.select([np.ones((2, 2))], [np.ones((2, 2), int)], 4)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["uniform", "erk", "global_magnitude", "lamp", "first_order"]),
    st.sampled_from(GROUPS),
    st.randoms(use_true_random=False),
)
def test_permuting_the_outputs_permutes_the_plan(name, group, random):
    rng = np.random.default_rng(random.randint(0, 1000))
    kernels = find_kernels(NETWORK)
    groupings = {kernel.path: kernel.grouping(group) for kernel in kernels}
    matrices = {path: rng.normal(size=(g.inputs, g.outputs)) for path, g in groupings.items()}
    gradients = {path: rng.normal(size=(g.inputs, g.outputs)) for path, g in groupings.items()}
    orders = {path: rng.permutation(g.outputs) for path, g in groupings.items()}
    sizes = [grouping.sizes for grouping in groupings.values()]

    def live(values, slopes):
        found = ranks.scores(name, kernels, groupings, values, slopes)
        ranking = ranks.Ranking(found, sizes)
        return ranking.live(ranking.reachable // 2)

    def shuffled(values):
        return {path: value[:, orders[path]] for path, value in values.items()}

    before = live(matrices, gradients)
    after = live(shuffled(matrices), shuffled(gradients))
    for old, new, order in zip(before, after, orders.values(), strict=True):
        np.testing.assert_array_equal(old[:, order], new)


NETWORK = net(np.ones((13, 7)), np.ones((7, 5)))


def test_the_least_pruned_is_found_exactly_in_small_networks():
    scores = [np.arange(100.0).reshape(10, 10)]
    ranking = ranks.Ranking(scores, [np.ones((10, 10), int)])
    for limit in (0, 1, 37, 99):
        live, reached = ranking.least_pruned(lambda one, limit=limit: one[0].sum() <= 100 - limit)
        assert reached
        assert live[0].sum() == 100 - limit
    live, reached = ranking.least_pruned(lambda one: False)
    assert not reached
    assert live[0].sum() == 1


# ---------------------------------------------------------------------- plans


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_plan_is_wrapped_trained_and_stripped(name):
    model = trained()
    before = [weight.copy() for weight in model.get_weights()]
    plan = make(name, model, sparsity=0.7)
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
    assert list(plan.kernels) == ["first/kernel", "last/kernel"]
    wrapped = rls.wrap(model, plan)
    wrapped.fit(*TRAIN, epochs=1, verbose=0)
    stripped = rls.strip(wrapped)
    assert 0.7 <= sparsity_of(stripped) < 0.7 + 1 / 72
    for kernel in find_kernels(stripped):
        gone = plan.kernels[kernel.path].operations == Operation.PRUNE
        np.testing.assert_array_equal(kernel.matrix() == 0, gone)
    assert make(name, model, sparsity=0.7) == plan  # nothing is random


@pytest.mark.parametrize("group", GROUPS)
def test_skipped_layers_count_and_no_kernel_is_emptied(group):
    class Table(L.Embedding):
        """Not registered, so skipped: 40 weights."""

    model = keras.Sequential([L.Input((3,)), Table(10, 4), L.Flatten(), L.Dense(30), L.Dense(2)])
    assert count_weights(model)[1] == 40 + 360 + 60
    for name in ("uniform", "erk", "global_magnitude", "lamp"):
        plan = getattr(baselines, name)(model, target=rls.Target(sparsity=0.8), group=group)
        weights = sum(entry.weights_under(Operation.PRUNE) for entry in plan.kernels.values())
        largest = max(int(entry.grouping.sizes.max()) for entry in plan.kernels.values())
        assert 0.8 * 460 <= weights < 0.8 * 460 + largest
    with pytest.raises(rls.TargetError, match=r"A sparsity of 0.95 needs 437 of 460 weights"):
        baselines.uniform(model, sparsity=0.95, group=group)


def test_what_lives_is_quantized_where_tflite_can_hold_integers():
    model = trained()
    operations = set(np.unique(_flat(baselines.lamp(model, sparsity=0.5))))
    assert operations == {Operation.KEEP, Operation.PRUNE}
    plan = baselines.lamp(model, sparsity=0.5, quantize=True, bits=4)
    assert set(np.unique(_flat(plan))) == {Operation.QUANTIZE, Operation.PRUNE}
    assert {entry.exported_bits for entry in plan.kernels.values()} == {4}
    first, last = find_kernels(model)
    floating = dataclasses.replace(first.spec, exports_int8=False)
    kernels = [dataclasses.replace(first, spec=floating), last]
    live = [np.ones((6, 8), bool), np.ones((8, 3), bool)]
    mixed = Storage().plan_from_live(kernels, live)
    assert [entry.exported_bits for entry in mixed.kernels.values()] == [32, 8]


# ---------------------------------------------------------------------- bytes


@pytest.fixture(scope="module")
def sized():
    keras.utils.set_random_seed(3)
    model = keras.Sequential([L.Input((60,)), L.Dense(64, activation="relu"), L.Dense(3)])
    model.compile("adam", "mse")
    return model


# Dense, the file has 17.7 kB in float32 and 6.6 kB as int8.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "target", "quantize"),
    [
        ("lamp", rls.Target(tflite_bytes=4500), None),
        ("erk", rls.Target(gzip_bytes=3600), None),
        ("uniform", rls.Target(tflite_bytes=9000), False),
    ],
)
def test_the_real_file_fits_and_is_no_smaller_than_it_must(sized, tmp_path, name, target, quantize):
    plan = getattr(baselines, name)(sized, target=target, quantize=quantize)
    report = rls.export_tflite(
        rls.strip(rls.wrap(sized, plan)),
        tmp_path / "model.tflite",
        plan=plan,
        formats="raw" if target.kind == "tflite_bytes" else "gzip",
    )
    size = report.tflite_bytes if target.kind == "tflite_bytes" else report.gzip_bytes
    assert 0.93 * target.value < size <= target.value
    bits = {entry.exported_bits for entry in plan.kernels.values()}
    assert bits == ({32} if quantize is False else {8})


@pytest.mark.slow
def test_a_size_that_integers_meet_is_met_without_zeros(sized):
    plan = baselines.lamp(sized, target=rls.Target(tflite_bytes=7300))
    assert set(np.unique(_flat(plan))) == {Operation.QUANTIZE}


@pytest.mark.slow
@pytest.mark.parametrize(("quantize", "stored"), [(None, "integers"), (False, "floats")])
def test_a_size_out_of_reach_is_refused_with_one_that_is_not(sized, quantize, stored):
    with pytest.raises(rls.TargetError) as caught:
        baselines.lamp(sized, target=rls.Target(tflite_bytes=1_100), quantize=quantize)
    text = str(caught.value)
    assert text.startswith("Target(tflite_bytes=1_100) cannot be reached: with every kernel")
    assert f"stored as {stored}, the file would have about " in text
    least = int(text.split("about ")[1].split(" bytes")[0].replace(",", ""))
    plan = baselines.lamp(sized, target=rls.Target(tflite_bytes=least), quantize=quantize)
    assert sum((e.operations != Operation.PRUNE).sum() for e in plan.kernels.values()) < 40


# ---------------------------------------------------------------------- wrong calls


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({}, rls.ArgumentError, "target=None and sparsity=None. Expected exactly one"),
        (
            {"sparsity": 0.5, "target": rls.Target(sparsity=0.5)},
            rls.ArgumentError,
            "and sparsity=0.5. Expected exactly one of them",
        ),
        ({"target": 0.8}, rls.ArgumentError, "target=0.8 is a float. Expected a Target"),
        ({"sparsity": 1.0}, rls.ArgumentError, r"Target\(sparsity=1.0\) cannot be met"),
        ({"sparsity": 0.99}, rls.TargetError, "Expected a sparsity of at most 0.972"),
        ({"sparsity": 0.5, "group": "row"}, rls.ArgumentError, "group='row' is not known"),
        ({"sparsity": 0.5, "bits": 16}, rls.ArgumentError, "bits=16 cannot be used. Expected 8 or"),
        ({"sparsity": 0.5, "quantize": 8}, rls.ArgumentError, "quantize=8 cannot be used"),
    ],
)
def test_wrong_arguments_are_refused(options, error, text):
    with pytest.raises(error, match=text):
        baselines.lamp(trained(), **options)


def test_models_that_have_nothing_to_prune_are_refused():
    with pytest.raises(rls.ModelError, match=r"is wrapped already. Call rl_sparsity_tf.strip"):
        baselines.uniform(rls.wrap(trained()), sparsity=0.5)
    bare = keras.Sequential([L.Input((3,)), L.Activation("relu")])
    with pytest.raises(rls.ModelError, match="has no layer that can be compressed"):
        baselines.uniform(bare, sparsity=0.5)
    with pytest.raises(rls.ModelError, match="Expected a tf_keras model"):
        baselines.uniform("model.keras", sparsity=0.5)
    broken = net(FIRST, [[1.0], [np.nan], [2.0]])
    with pytest.raises(rls.ModelError, match=r"The weight 'dense\w*/kernel:0' .* holds NaN"):
        baselines.lamp(broken, sparsity=0.5)


def test_first_order_says_what_it_needs():
    with pytest.raises(rls.DataError, match=r"was given no data.*Pass data=\(x, y\)"):
        baselines.first_order(trained(), sparsity=0.5)
    bare = keras.models.clone_model(trained())
    with pytest.raises(rls.ModelError, match="is not compiled with a loss"):
        baselines.first_order(bare, TRAIN, sparsity=0.5)
    with pytest.raises(rls.DataError, match="train has the label 5"):
        baselines.first_order(trained(), (TRAIN[0], np.full(96, 5)), sparsity=0.5)
    x = np.ones((8, 2), np.float32)
    perfect = net(FIRST)
    with pytest.raises(rls.DataError, match=r"is zero in every kernel.*does not fit perfectly"):
        baselines.first_order(perfect, (x, perfect.predict(x, verbose=0)), sparsity=0.5)


def test_scores_by_an_unknown_heuristic_or_without_gradients_are_refused():
    kernels = find_kernels(NETWORK)
    with pytest.raises(
        rls.ArgumentError, match=r"heuristic='lam' is not known.*Did you mean 'lamp'"
    ):
        ranks.scores("lam", kernels, {}, {})
    groupings = {kernel.path: kernel.grouping("element") for kernel in kernels}
    matrices = {kernel.path: kernel.matrix() for kernel in kernels}
    with pytest.raises(rls.ArgumentError, match=r"'first_order' was given no gradients. Expected"):
        ranks.scores("first_order", kernels, groupings, matrices)


# ---------------------------------------------------------------------- in the search


def compressed(model, target, group="element"):
    with quick_search():
        return CompressedNetwork(
            model,
            training_data(TRAIN, model, batch_size=32),
            evaluation_data(VALIDATION, model, "validation_data"),
            target=target,
            group=group,
            recovery=rls.Recovery(method="none"),
        )


def test_the_search_is_proposed_what_users_get():
    model = trained()
    network = compressed(model, rls.Target(sparsity=0.6))
    proposed = demonstrations.proposals(network)
    assert [name for name, _ in proposed] == [
        name for name in ranks.HEURISTICS if name in dict(proposed)
    ]
    assert {"uniform", "lamp", "first_order"} <= set(dict(proposed))
    for name, plan in proposed:
        if name != "first_order":  # which saw other batches
            assert plan == make(name, model, sparsity=0.6, quantize=True)
        weights = sum(entry.weights_under(Operation.PRUNE) for entry in plan.kernels.values())
        assert weights == network.budget.wanted == 44
    for name, plan in proposed:
        shown = demonstrations.Demonstration.of(name, plan)
        assert shown.densities == {
            path: pytest.approx(1 - entry.weights_under(Operation.PRUNE) / entry.operations.size)
            for path, entry in plan.kernels.items()
        }


def test_heuristics_that_agree_are_shown_once():
    model = keras.Sequential([L.Input((6,)), L.Dense(3, activation="softmax")])
    model.compile("adam", "sparse_categorical_crossentropy")
    network = compressed(model, rls.Target(sparsity=0.5))
    proposed = [demonstrations.Demonstration.of(*one) for one in demonstrations.proposals(network)]
    assert [one.name for one in demonstrations.without_twins(proposed)] == ["uniform"]
    # The exact plans are two: the gradient orders the weights in another way.
    assert [name for name, _ in demonstrations.proposals(network)] == ["uniform", "first_order"]


def test_a_network_without_gradients_is_not_ranked_by_them():
    network = compressed(untrained(), rls.Target(sparsity=0.5))
    assert "first_order" in dict(demonstrations.proposals(network))
    network.dense_statistics = {
        path: dataclasses.replace(one, gradient=np.zeros_like(one.gradient))
        for path, one in network.dense_statistics.items()
    }
    assert "first_order" not in dict(demonstrations.proposals(network))


@pytest.mark.slow
def test_proposals_for_a_size_fit_it():
    keras.utils.set_random_seed(1)
    model = keras.Sequential([L.Input((6,)), L.Dense(300, activation="relu"), L.Dense(3)])
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    sizes = rls.SizeModel(model, "gzip")
    plans = [baselines.uniform(model, sparsity=share, quantize=True) for share in (0.05, 0.9)]
    large, small = (sizes.plan_size(plan).gzip for plan in plans)
    target = rls.Target(gzip_bytes=int(large + small) // 2)
    proposed = dict(demonstrations.proposals(compressed(model, target)))
    assert {"uniform", "erk", "lamp"} <= set(proposed)
    for plan in proposed.values():
        assert set(np.unique(_flat(plan))) == {Operation.QUANTIZE, Operation.PRUNE}
        assert 0.8 * target.value < sizes.plan_size(plan).gzip <= target.value
