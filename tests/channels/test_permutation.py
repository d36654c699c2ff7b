"""Permuted channels: the same function, of which blocks and patterns keep more."""

import itertools

import numpy as np
import pytest
import tensorflow as tf
import tf_keras as keras
from hypothesis import given, settings
from hypothesis import strategies as st
from zoo import ZOO, _compiled, inputs_for, layers

import rl_sparsity_tf as rls
from rl_sparsity_tf.channels import permutation
from rl_sparsity_tf.channels.permutation import (
    PERMUTED,
    PermutationGoal,
    PermutedReader,
    Search,
    permutation_report,
    permute_channels,
    rows_of,
    squares_of,
)
from rl_sparsity_tf.errors import ArgumentError, ModelError
from rl_sparsity_tf.layers.kernels import find_kernels
from rl_sparsity_tf.layers.rules import prune_by_magnitude

modest = settings(max_examples=25, deadline=None)


@pytest.fixture(autouse=True)
def _few_jumps(monkeypatch):
    """Enough for small models."""
    monkeypatch.setattr(permutation, "_JUMPS", 5)


def stack(*some, shape=(6, 6, 3), seed=0):
    """A stack between an input and a Dense layer, with random weights."""
    model = keras.Sequential([layers.Input(shape), *some, layers.Dense(3, name="head")])
    return _compiled(model, seed)


def outputs(model, seed=0):
    found = model.predict(inputs_for(model, 8, seed), verbose=0)
    return found if isinstance(found, list) else [found]


def check(model, group="block4", sparsity=None, changed=True):
    """Permutes, and checks what must hold for every model; returns what was made."""
    before = [value.copy() for value in model.get_weights()]
    permuted = permute_channels(model, group=group, sparsity=sparsity)
    for one, other in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    for one, other in zip(outputs(model), outputs(permuted), strict=True):
        assert np.abs(one - other).max() <= 1e-5 * max(1e-3, np.ptp(one))
    moved = False
    for one, other in zip(before, permuted.get_weights(), strict=True):
        np.testing.assert_array_equal(np.sort(one, axis=None), np.sort(other, axis=None))
        moved |= not np.array_equal(one, other)
    assert moved == changed
    entries = permutation_report(model, permuted, group=group, sparsity=sparsity)
    assert [entry.path for entry in entries] == [kernel.path for kernel in find_kernels(model)]
    assert all(entry.after >= entry.before - 1e-9 for entry in entries)
    assert any(entry.after > entry.before + 1e-6 for entry in entries) == changed
    return permuted


def place_of(model, permuted, layer, attribute="bias"):
    """Where the entries of a vector went: entry i of the new one is entry `[i]` of the old."""
    old, new = (np.asarray(getattr(one.get_layer(layer), attribute)) for one in (model, permuted))
    return np.argmin(np.abs(new[:, None] - old), axis=1)


# ---------------------------------------------------------------------------- the same function


@pytest.mark.parametrize("group", PERMUTED)
@pytest.mark.parametrize("name", ["dense", "separable", "conv3d"])
def test_models_compute_the_same(name, group):
    check(ZOO[name](), group)


@pytest.mark.slow
@settings(max_examples=8, deadline=None)
@given(
    widths=st.tuples(st.integers(2, 9), st.integers(2, 9), st.integers(2, 9)),
    multiplier=st.integers(1, 2),
    group=st.sampled_from(PERMUTED),
    seed=st.integers(0, 99),
)
def test_random_graphs_compute_the_same(widths, multiplier, group, seed):
    """Sums, concatenations, depthwise kernels, slopes and Flatten at once."""
    keras.backend.reset_uids()
    one, two, three = widths
    inputs = keras.Input((4, 4, 2))
    x = layers.Conv2D(one, 3, padding="same", activation="sigmoid")(inputs)
    y = layers.Conv2D(two, 1)(inputs)
    joined = layers.Concatenate()([x, y])
    z = layers.Conv2D(one + two, 3, padding="same")(joined)
    z = layers.PReLU()(layers.Add()([joined, z]))
    z = layers.DepthwiseConv2D(2, depth_multiplier=multiplier)(z)
    z = layers.BatchNormalization()(z)
    z = layers.Dense(three, activation="tanh")(layers.Flatten()(z))
    model = _compiled(keras.Model(inputs, layers.Dense(3)(z)), seed)
    permuted = permute_channels(model, group=group, seed=seed)
    (old,), (new,) = outputs(model), outputs(permuted)
    assert np.abs(old - new).max() <= 1e-5 * np.ptp(old)
    for entry in permutation_report(model, permuted, group=group):
        assert entry.after >= entry.before - 1e-9


def test_statistics_and_slopes_move_with_their_channels():
    model = stack(
        layers.Conv2D(8, 3, use_bias=False, name="conv"),
        layers.BatchNormalization(name="norm"),
        layers.PReLU(name="slopes"),
        layers.DepthwiseConv2D(2, depth_multiplier=2, name="depthwise"),
        layers.GlobalAveragePooling2D(),
    )
    permuted = check(model)
    place = place_of(model, permuted, "norm", "gamma")
    assert sorted(place) == list(range(8))
    assert place.tolist() != list(range(8))
    for name in ("gamma", "beta", "moving_mean", "moving_variance"):
        assert place_of(model, permuted, "norm", name).tolist() == place.tolist()
    for layer, attribute, axis in (
        ("conv", "kernel", -1),
        ("slopes", "alpha", -1),
        ("depthwise", "depthwise_kernel", -2),
    ):
        old, new = (np.asarray(getattr(m.get_layer(layer), attribute)) for m in (model, permuted))
        np.testing.assert_array_equal(new, np.take(old, place, axis))
    # Both outputs of a depthwise kernel follow their channel.
    doubled = (2 * place[:, None] + [0, 1]).ravel()
    assert place_of(model, permuted, "depthwise").tolist() == doubled.tolist()
    old, new = (np.asarray(m.get_layer("head").kernel) for m in (model, permuted))
    np.testing.assert_array_equal(new, old[doubled])


def test_flatten_has_every_channel_in_every_place():
    model = stack(layers.Conv2D(8, 3, name="conv"), layers.Flatten())
    permuted = check(model)
    place = place_of(model, permuted, "conv")
    rows = (np.arange(16)[:, None] * 8 + place).ravel()
    old, new = (np.asarray(m.get_layer("head").kernel) for m in (model, permuted))
    np.testing.assert_array_equal(new, old[rows])


def test_residual_sums_move_together():
    inputs = keras.Input((4, 4, 3))
    x = layers.Conv2D(8, 1, name="one")(inputs)
    y = layers.Conv2D(8, 3, padding="same", name="two")(x)
    z = layers.GlobalAveragePooling2D()(layers.Add()([x, y]))
    model = _compiled(keras.Model(inputs, layers.Dense(3)(z)))
    permuted = check(model)
    place = place_of(model, permuted, "one").tolist()
    assert place_of(model, permuted, "two").tolist() == place
    assert place != list(range(8))


def test_the_parts_of_a_concatenation_keep_their_channels():
    inputs = keras.Input((6,))
    a, b = layers.Dense(8, name="a")(inputs), layers.Dense(8, name="b")(inputs)
    c = layers.Dense(16, name="c")(inputs)
    x = layers.Add()([layers.Concatenate()([a, b]), c])
    model = _compiled(keras.Model(inputs, layers.Dense(4)(x)))
    permuted = check(model)
    first, second = place_of(model, permuted, "a"), place_of(model, permuted, "b")
    both = place_of(model, permuted, "c")
    assert both.tolist() == [*first, *(8 + second)]
    assert both.tolist() != list(range(16))


def test_activations_that_keep_channels_from_being_emptied_do_not_matter():
    # Zeros become 0.5 behind a sigmoid, which borders see less of.
    model = stack(
        layers.Conv2D(8, 3, activation="sigmoid"),
        layers.Conv2D(4, 3, padding="same"),
        layers.GlobalMaxPooling2D(),
    )
    check(model)


def test_transposed_kernels_and_models_in_models():
    block = keras.Sequential([layers.Input((3, 3, 8)), layers.Conv2DTranspose(8, 3, name="up")])
    model = stack(layers.Conv2D(8, 2), block, layers.GlobalMaxPooling2D(), shape=(4, 4, 3))
    check(model)


def test_what_cannot_be_followed_stays():
    model = stack(layers.Dense(8), layers.LayerNormalization(), shape=(5,))
    check(model, changed=False)
    shared = layers.Dense(8)
    inputs = keras.Input((8,))
    twice = shared(layers.ReLU()(shared(inputs)))
    check(_compiled(keras.Model(inputs, layers.Dense(3)(twice))), changed=False)


def test_inputs_and_outputs_stay():
    inputs = keras.Input((8,))
    x = layers.Dense(8, name="seen")(inputs)
    model = _compiled(keras.Model(inputs, [x, layers.Dense(3)(x)]))
    check(model, changed=False)


def test_the_copy_is_compiled_as_the_model():
    permuted = permute_channels(ZOO["dense"]())
    assert permuted.loss == "sparse_categorical_crossentropy"
    permuted.fit(np.ones((4, 13)), np.zeros(4), verbose=0)


def test_a_model_without_a_graph_is_copied():
    class Plain(keras.Model):
        def __init__(self):
            super().__init__()
            self.first, self.last = layers.Dense(8), layers.Dense(3)

        def call(self, x):
            return self.last(self.first(x))

    model = Plain()
    model(np.ones((1, 5), np.float32))
    permuted = permute_channels(model)
    assert permuted is not model
    for one, other in zip(model.get_weights(), permuted.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


# ---------------------------------------------------------------------------- more is kept


def search_of(matrix, group, sparsity=None, seed=0, positions=1):
    """The search for a kernel that reads `len(matrix) / positions` channels."""
    count = len(matrix) // positions
    rng = np.random.default_rng(seed)
    rows = rows_of(np.arange(count), np.arange(count), len(matrix))
    reader = PermutedReader(
        squares_of(matrix), rows, PermutationGoal.of(group, sparsity), rng, count
    )
    return Search([reader], np.zeros(count, int), rng)


@pytest.mark.parametrize(("group", "sparsity"), [("2:4", None), ("block4", 0.5), ("block4", 0.8)])
def test_small_searches_find_the_best_of_all_orders(group, sparsity):
    matrix = np.random.default_rng(5).normal(size=(8, 5))
    search = search_of(matrix, group, sparsity)
    (reader,) = search.readers
    orders = [
        np.array([*first, *sorted(set(range(8)) - set(first))])
        for first in itertools.combinations(range(8), 4)
    ]
    best = max(reader.kept(order) for order in orders)
    assert best > reader.kept(np.arange(8)) + 1e-3
    assert reader.kept(search.run()) == pytest.approx(best)


@pytest.mark.parametrize("group", ["block4", "2:4"])
def test_channels_that_were_shuffled_are_found_again(group):
    # Four channels that are large for the same outputs belong into one block; under 2:4, where two
    # large ones of every block may stay, apart.
    matrix = np.kron(np.eye(4), np.ones((4, 6))) + 0.01
    if group == "2:4":
        matrix = matrix.reshape(4, 4, 24).transpose(1, 0, 2).reshape(16, 24)
    shuffled = matrix[np.random.default_rng(1).permutation(16)]
    search = search_of(shuffled, group, 0.75 if group == "block4" else None)
    (reader,) = search.readers
    kept = reader.kept(search.run())
    assert kept == pytest.approx(
        search_of(matrix, group, 0.75 if group == "block4" else None).readers[0].kept(np.arange(16))
    )
    assert kept > reader.kept(np.arange(16)) + 0.05


@modest
@given(
    st.sampled_from([("block4", 0.6), ("block16", 0.8), ("2:4", None)]),
    st.sampled_from([(32, 1), (30, 1), (16, 3), (8, 2)]),
    st.integers(0, 2**31),
)
def test_estimated_gains_are_what_a_swap_brings(goal, shape, seed):
    channels, positions = shape
    rng = np.random.default_rng(seed)
    search = search_of(rng.normal(size=(channels * positions, 3)), *goal, positions=positions)
    if not search._same:  # all channels are in one block
        return
    order = rng.permutation(channels)
    thresholds = [reader.threshold(order) for reader in search.readers]
    tables = [np.empty((channels, channels)) for _ in search._same]
    search._refresh(tables, np.arange(channels), order, thresholds)
    gains = search._gains(tables, order)
    value = search._value(order, thresholds)
    for one, other in rng.integers(0, channels, (12, 2)):
        swapped = order.copy()
        swapped[[one, other]] = order[[other, one]]
        gain = search._value(swapped, thresholds) - value
        # Blocks that reach over from one position to the next are only estimated.
        block = 16 if goal[0] == "block16" else 4
        if positions == 1 or channels % block == 0:
            assert gains[one, other] == pytest.approx(gain, abs=1e-12)


@modest
@given(st.sampled_from(["block4", "block16"]), st.integers(2, 60), st.integers(0, 2**31))
def test_what_is_kept_is_what_the_rule_keeps(group, inputs, seed):
    matrix = np.random.default_rng(seed).normal(size=(inputs, 4)).astype(np.float32)
    goal, grouping = PermutationGoal.of(group, 0.7), permutation.Grouping(group, inputs, 4)
    live = grouping.expand_numpy(prune_by_magnitude(matrix, grouping, 0.7))
    squares = squares_of(matrix)
    assert goal.kept(squares) == pytest.approx((squares * live).sum() / squares.sum())


def test_wide_kernels_are_sampled(monkeypatch):
    monkeypatch.setattr(permutation, "_NUMBERS", 24 * 10)
    matrix = np.random.default_rng(0).standard_t(3, size=(24, 40))
    search = search_of(matrix, "block4", 0.8)
    (reader,) = search.readers
    assert [value.shape for value in search._values[0]] == [(24, 10)]
    assert reader.kept(search.run()) > reader.kept(np.arange(24)) + 1e-3


def test_the_work_is_bounded(monkeypatch):
    matrix = np.random.default_rng(0).normal(size=(24, 40))
    whole = search_of(matrix, "block4", 0.8)
    whole.run()
    used = permutation._WORK - whole._left
    monkeypatch.setattr(permutation, "_WORK", used // 8)
    search = search_of(matrix, "block4", 0.8)
    assert sorted(search.run()) == list(range(24))
    assert used // 8 - search._left < used // 2


def test_no_reader_pays_for_another():
    identity, bitten = np.arange(8), 0
    orders = [
        np.array([*first, *sorted(set(range(8)) - set(first))])
        for first in itertools.combinations(range(8), 4)
    ]
    for seed in range(12):
        rng = np.random.default_rng(seed)
        rows, goal = rows_of(identity, identity, 8), PermutationGoal.of("block4", 0.5)
        readers = [
            PermutedReader(squares_of(rng.normal(size=(8, outputs))), rows, goal, rng, 8)
            for outputs in (9, 2)
        ]
        search = Search(readers, np.zeros(8, int), rng)
        floor, found = search._kept(identity), search._kept(search.run())
        assert (found >= floor - 1e-9).all()
        bitten += (search._kept(max(orders, key=lambda o: search._kept(o).sum())) < floor).any()
    assert bitten  # the best sum is not always allowed


def test_the_seed_decides():
    model = stack(layers.Dense(24, activation="relu"), layers.Dense(16), shape=(7,))
    one, again = (permute_channels(model, seed=3).get_weights() for _ in range(2))
    for value, same in zip(one, again, strict=True):
        np.testing.assert_array_equal(value, same)


def test_the_report_is_printed():
    model = stack(layers.Dense(16, name="made"), shape=(5,))
    permuted = permute_channels(model, group="2:4")
    lines = []
    entries = permutation_report(model, permuted, group="2:4", print_fn=lines.append)
    text = "\n".join(lines)
    assert "Share of magnitude kept (2:4)" in text
    for entry in entries:
        assert f"{entry.after:.4f}" in text
        assert entry.path in text
    permutation_report(model, permuted, sparsity=0.5, print_fn=lines.append)
    assert "(block16, 50% pruned)" in "\n".join(lines)


# ---------------------------------------------------------------------------- wrong calls


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"group": "channel"}, "group='channel' is not known. Expected one of 'block4'"),
        ({"group": "4:2"}, "group='4:2' is not known"),
        ({"sparsity": 1.0}, "sparsity=1.0 cannot be used. Expected a number above 0 and below 1"),
        ({"sparsity": 0}, "sparsity=0 cannot be used"),
        ({"sparsity": True}, "sparsity=True cannot be used"),
        ({"sparsity": "0.5"}, "sparsity='0.5' cannot be used"),
        ({"sparsity": float("nan")}, "sparsity=nan cannot be used"),
        (
            {"group": "2:4", "sparsity": 0.5},
            "sparsity=0.5 was given with group='2:4'. Expected no sparsity",
        ),
        ({"seed": -1}, "seed=-1 cannot be used. Expected a whole number of at least 0"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ArgumentError, match=message):
        permute_channels(ZOO["dense"](), **arguments)
    if "seed" not in arguments:
        with pytest.raises(ArgumentError, match=message):
            permutation_report(ZOO["dense"](), ZOO["dense"](), **arguments)


def test_wrong_models():
    wrapped = rls.wrap(ZOO["dense"]())
    with pytest.raises(ModelError, match=r"permute_channels needs a plain one. Call .*strip"):
        permute_channels(wrapped)
    with pytest.raises(ModelError, match="permutation_report needs a plain one"):
        permutation_report(ZOO["dense"](), wrapped)
    with pytest.raises(ModelError, match="is not built"):
        permute_channels(keras.Sequential([layers.Dense(3)]))
    with pytest.raises(ModelError, match=r"Received str. *|Expected a tf_keras model"):
        permute_channels("model.keras")
    broken = ZOO["dense"]()
    broken.layers[0].bias.assign(tf.fill((17,), np.nan))
    with pytest.raises(ModelError, match="holds NaN or infinite values"):
        permute_channels(broken)
    other = stack(layers.Dense(4, name="made"), shape=(5,))
    with pytest.raises(ArgumentError, match=r"Only one of the models has the kernel .*of shape"):
        permutation_report(ZOO["dense"](), other)
