"""Selecting what lives, hard concrete gates, and masks that learn."""

import dataclasses

import numpy as np
import pytest
import tensorflow as tf
import tf_keras as keras
from hypothesis import given, settings
from hypothesis import strategies as st
from zoo import ZOO, inputs_for

import rl_sparsity_tf as rls
from rl_sparsity_tf.layers.groups import GROUPS, Grouping
from rl_sparsity_tf.layers.kernels import find_kernels, sparsity_of
from rl_sparsity_tf.layers.operations import MASKS, hard_concrete_sample, magnitude, select_live
from rl_sparsity_tf.layers.plan import CompressionPlan, KernelRule
from rl_sparsity_tf.layers.rules import resolve
from rl_sparsity_tf.layers.wrapping import plan_of, wrappers_of
from rl_sparsity_tf.training.mask_training import (
    _without_smallest,
    freeze_masks,
    grown,
    start_gates,
    update_masks,
)

modest = settings(max_examples=50, deadline=None)


# ---------------------------------------------------------------------------- select_live


@modest
@given(st.integers(1, 60), st.integers(0, 70), st.integers(0, 2**31), st.integers(1, 12))
def test_select_live_prunes_exactly_as_many_even_with_ties(groups, wanted, seed, levels):
    scores = np.random.default_rng(seed).integers(0, levels, groups).astype(float)
    live = select_live(scores, np.ones(groups, np.int64), wanted)
    assert (~live).sum() == min(wanted, groups - 1)
    if not live.all():
        assert scores[~live].max() <= scores[live].min()
        # Among equals the first go: whoever lives at the border stands behind who is pruned.
        border = scores[~live].max()
        tied = np.flatnonzero(scores == border)
        assert (np.diff(live[tied].astype(int)) >= 0).all()


@modest
@given(st.lists(st.integers(1, 16), min_size=1, max_size=40), st.integers(0, 700), st.integers(0))
def test_select_live_with_groups_of_several_sizes(sizes, wanted, seed):
    sizes = np.array(sizes)
    scores = np.random.default_rng(seed % 2**32).normal(size=sizes.size)
    live = select_live(scores, sizes, wanted)
    assert live.any()
    pruned = sizes[~live].sum()
    assert pruned >= wanted or live.sum() == 1
    if not live.all():  # the smallest number of groups: without the last it is missed
        last = np.where(live, -np.inf, scores).argmax()
        assert pruned - sizes[last] < wanted
        assert scores[~live].max() < scores[live].min()


def test_select_live_keeps_the_shape_and_the_best():
    live = select_live(np.array([[3.0, 1.0], [2.0, 5.0]]), np.ones((2, 2)), 99)
    np.testing.assert_array_equal(live, [[False, False], [False, True]])
    assert select_live(np.array([[0.0]]), np.ones((1, 1)), 1).all()


@modest
@given(st.integers(1, 80), st.integers(0, 79), st.integers(0, 2**31), st.integers(1, 12))
def test_the_quick_selection_agrees_with_the_sorted_one(groups, count, seed, levels):
    scores = np.random.default_rng(seed).integers(0, levels, groups).astype(np.float32)
    count = min(count, groups - 1)
    expected = select_live(scores, np.ones(groups, np.int64), count)
    np.testing.assert_array_equal(_without_smallest(scores, count), expected)


def test_the_sparsity_is_held_even_where_training_diverged():
    scores = np.full((4, 5), np.nan, np.float32)
    assert (~_without_smallest(scores, 7)).sum() == 7
    scores[0, 0] = 1.0
    assert (~_without_smallest(scores, 7)).sum() == 7


def test_magnitude_is_relative_to_the_kernel():
    grouping = Grouping("block4", 6, 2)
    matrix = np.random.default_rng(0).normal(size=(6, 2))
    sums = grouping.sum_numpy(np.square(matrix))
    one = magnitude(matrix, sums, grouping.sizes)
    np.testing.assert_allclose(magnitude(matrix * 1e-3, sums * 1e-6, grouping.sizes), one)
    assert np.average(one**2, weights=grouping.sizes) == pytest.approx(1.0)
    np.testing.assert_array_equal(magnitude(matrix * 0, sums * 0, grouping.sizes), sums * 0)


# ---------------------------------------------------------------------------- hard concrete


@pytest.mark.parametrize("log_alpha", [-6.0, -2.5, 0.0, 1.0, 2.5, 6.0])
def test_hard_concrete_gates_follow_the_closed_form(log_alpha):
    tf.random.set_seed(7)
    count = 200_000
    values = hard_concrete_sample(tf.fill((count,), log_alpha)).numpy()
    assert values.min() >= 0
    assert values.max() <= 1

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    # Louizos et al. 2018, equation 12 and its mirror image.
    beta, gamma, zeta = 2 / 3, -0.1, 1.1
    closed = sigmoid(-log_alpha + beta * np.log(-gamma / zeta))
    opened = sigmoid(log_alpha - beta * np.log((1 - gamma) / (zeta - 1)))
    for share, expected in ((values == 0, closed), (values == 1, opened)):
        deviation = np.sqrt(expected * (1 - expected) / count)
        assert abs(share.mean() - expected) < 5 * deviation + 1e-5
    # The mean gate is 1 - integral of the distribution function; by quadrature of its inverse.
    u = (np.arange(100_000) + 0.5) / 100_000
    stretched = sigmoid((np.log(u / (1 - u)) + log_alpha) / beta) * (zeta - gamma) + gamma
    assert values.mean() == pytest.approx(np.clip(stretched, 0, 1).mean(), abs=0.004)


def test_hard_concrete_gates_are_differentiable_and_finite():
    tf.random.set_seed(1)
    logits = tf.linspace(-50.0, 50.0, 2001)
    with tf.GradientTape() as tape:
        tape.watch(logits)
        total = tf.reduce_sum(hard_concrete_sample(logits))
    gradient = tape.gradient(total, logits).numpy()
    assert np.isfinite(gradient).all()
    assert (gradient >= 0).all()
    assert (gradient > 0).any()


# ---------------------------------------------------------------------------- masks that learn


def learnable(mask, group="element", sparsity=0.5, name="dense", quantize=False):
    tf.random.set_seed(2)  # the gates are drawn from TensorFlow's global generator
    model = ZOO[name]()
    plan = CompressionPlan([KernelRule("*", sparsity, group=group, quantize=quantize)])
    return model, rls.wrap(model, plan, mask=mask, train_masks=True)


def masks_of(wrapped):
    return {
        f"{wrapper.name}/{attribute}": wrapper.state(attribute)["mask"].numpy()
        for wrapper in wrappers_of(wrapped)
        for attribute in wrapper.kernels
        if "mask" in wrapper.state(attribute)
    }


def pruned_weights(wrapped):
    return {
        f"{wrapper.name}/{attribute}": int(
            wrapper.grouping(attribute).sizes[wrapper.state(attribute)["mask"].numpy() == 0].sum()
        )
        for wrapper in wrappers_of(wrapped)
        for attribute in wrapper.kernels
    }


def data_for(model, rows=64):
    x = inputs_for(model, rows)
    return x, np.random.default_rng(1).integers(0, model.output_shape[-1], rows)


class Watch(keras.callbacks.Callback):
    """Notes the masks after every step (behind MaskTraining in the list)."""

    def __init__(self):
        super().__init__()
        self.masks, self.pruned = [], []

    def on_train_batch_end(self, batch, logs=None):
        self.masks.append(masks_of(self.model))
        self.pruned.append(pruned_weights(self.model))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mask", "group", "name"),
    [
        ("straight_through", "element", "dense"),
        ("straight_through", "block4", "separable"),
        ("straight_through", "channel", "residual"),
        ("hard_concrete", "element", "dense"),
        ("hard_concrete", "block4", "dense"),
    ],
)
def test_masks_learn_with_the_sparsity_held_and_are_frozen_at_the_end(mask, group, name):
    model, wrapped = learnable(mask, group, name=name)
    # The logits of hard concrete gates start at +-2.5 and have to cross.
    rate = 0.3 if mask == "hard_concrete" else 0.05
    wrapped.compile(keras.optimizers.Adam(rate), "sparse_categorical_crossentropy")
    before, start = pruned_weights(wrapped), masks_of(wrapped)
    watch, training = Watch(), rls.MaskTraining(every=2, freeze_after=0.6)
    x, y = data_for(model)
    wrapped.fit(x, y, batch_size=8, epochs=5, verbose=0, callbacks=[training, watch])
    assert training.frozen
    steps = len(watch.masks)
    assert steps == 40
    assert all(pruned == before for pruned in watch.pruned)
    for masks in watch.masks:
        assert all(np.isin(values, (0.0, 1.0)).all() for values in masks.values())
    moved = {path for masks in watch.masks for path in masks if (masks[path] != start[path]).any()}
    assert moved  # the masks did learn
    revived = any(
        ((masks[path] == 1) & (start[path] == 0)).any() for masks in watch.masks for path in masks
    )
    assert revived  # and what was pruned came back
    frozen_from = int(0.6 * steps)
    for masks in watch.masks[frozen_from:]:
        for path, values in masks.items():
            np.testing.assert_array_equal(values, watch.masks[frozen_from][path])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("group", "name"), [("element", "dense"), ("block4", "separable"), ("channel", "residual")]
)
def test_gradual_masks_fall_to_the_plans_sparsity_by_a_cubic(group, name):
    model, wrapped = learnable("straight_through", group, sparsity=0.75, name=name)
    wrapped.compile(keras.optimizers.Adam(0.01), "sparse_categorical_crossentropy")
    planned, totals = pruned_weights(wrapped), masks_of(wrapped)
    watch, training = Watch(), rls.MaskTraining(every=1, freeze_after=0.5, gradual=True)
    x, y = data_for(model)
    wrapped.fit(x, y, batch_size=8, epochs=5, verbose=0, callbacks=[training, watch])
    steps = len(watch.pruned)
    assert steps == 40
    for path, final in planned.items():
        shares = [pruned[path] / final for pruned in watch.pruned]
        assert shares == sorted(shares)  # what is pruned rises
        for step, share in enumerate(shares, 1):
            expected = 1.0 - (1.0 - min(1.0, step / (0.5 * steps))) ** 3
            # Within a group; groups are up to a sixth of these small kernels.
            group_share = 1.5 * totals[path].size ** -1 / 0.75 if group == "element" else 0.35
            assert share == pytest.approx(expected, abs=max(0.02, group_share))
        assert shares[0] < 0.5
        assert shares[-1] == 1.0
    assert pruned_weights(wrapped) == planned


@modest
@given(st.integers(1, 30), st.integers(1, 5), st.floats(0, 1), st.integers(0, 2**31))
def test_masks_grow_by_a_share_of_what_is_pruned(inputs, outputs, share, seed):
    for kind in ("element", "block4"):
        grouping = Grouping(kind, inputs, outputs)
        live = np.random.default_rng(seed).random(grouping.shape) < 0.4
        grows = grown(live, grouping, share)
        assert (grows | ~live).all()  # what lives stays
        if kind == "element":
            assert (~live).sum() - (~grows).sum() == round(share * (~live).sum())
        assert grown(live, grouping, 1.0).all()
        np.testing.assert_array_equal(grown(live, grouping, 0.0), live)


@pytest.mark.slow
@pytest.mark.parametrize("mask", MASKS)
def test_learned_masks_are_exactly_zero_or_one_at_inference(mask):
    model, wrapped = learnable(mask)
    x, y = data_for(model)
    wrapped.fit(x, y, batch_size=16, epochs=1, verbose=0, callbacks=[rls.MaskTraining(every=1)])
    for wrapper in wrappers_of(wrapped):
        live = wrapper.state("kernel")["mask"].numpy() > 0
        effective = wrapper.effective_kernel("kernel").numpy()
        latent = wrapper.layer.kernel.numpy()
        np.testing.assert_array_equal(effective, np.where(live, latent, 0))
    np.testing.assert_array_equal(wrapped(x[:9]), rls.strip(wrapped)(x[:9]))


def gradients(wrapped, x, y):
    tf.random.set_seed(3)
    with tf.GradientTape() as tape:
        loss = wrapped.compute_loss(x, tf.constant(y), wrapped(x, training=True), None)
    return dict(
        zip(
            [variable.name for variable in wrapped.trainable_variables],
            tape.gradient(loss, wrapped.trainable_variables),
            strict=True,
        )
    )


@pytest.mark.parametrize("mask", MASKS)
def test_pruned_groups_receive_gradients(mask):
    model, wrapped = learnable(mask)
    found = gradients(wrapped, *data_for(model))
    for wrapper in wrappers_of(wrapped):
        pruned = wrapper.state("kernel")["mask"].numpy() == 0
        logits = found[wrapper.state("kernel")["mask_logits"].name].numpy()
        # A hard concrete gate has a gradient where it is drawn strictly between 0 and 1.
        assert (logits[pruned] != 0).any()
        if mask == "straight_through":
            assert (found[wrapper.layer.kernel.name].numpy()[pruned] != 0).any()


def test_fixed_masks_give_pruned_groups_no_gradient():
    model = ZOO["dense"]()
    wrapped = rls.wrap(model, CompressionPlan([KernelRule("*", 0.5)]))
    found = gradients(wrapped, *data_for(model))
    assert not any("logits" in name for name in found)
    for wrapper in wrappers_of(wrapped):
        pruned = wrapper.state("kernel")["mask"].numpy() == 0
        assert (found[wrapper.layer.kernel.name].numpy()[pruned] == 0).all()


@pytest.mark.parametrize("mask", MASKS)
def test_a_pruned_group_whose_score_rises_comes_back(mask):
    _, wrapped = learnable(mask)
    wrapper = wrappers_of(wrapped)[0]
    state = wrapper.state("kernel")
    pruned = np.argwhere(state["mask"].numpy() == 0)[0]
    logits = state["mask_logits"].numpy()
    logits[tuple(pruned)] = 50.0
    state["mask_logits"].assign(logits)
    before = pruned_weights(wrapped)
    update_masks(wrapper)
    assert state["mask"].numpy()[tuple(pruned)] == 1
    assert pruned_weights(wrapped) == before
    freeze_masks(wrapper)
    state["mask_logits"].assign(-logits)
    update_masks(wrapper)
    assert state["mask"].numpy()[tuple(pruned)] == 1


def test_hard_concrete_gates_start_by_magnitude_and_open_as_the_plan_says():
    _, wrapped = learnable("hard_concrete", sparsity=0.8)
    wrapper = wrappers_of(wrapped)[0]
    state, weights = wrapper.state("kernel"), np.abs(wrapper.layer.kernel.numpy())
    live = state["mask"].numpy() > 0
    start_gates(wrapper)
    logits = state["mask_logits"].numpy()
    assert (logits[live] >= 0).all()
    assert (logits[~live] <= 0).all()
    assert (np.argsort(logits, axis=None) == np.argsort(weights, axis=None)).all()
    # What is drawn in training is about as dense as what is evaluated.
    drawn = [wrapper.effective_kernel("kernel", training=True).numpy() != 0 for _ in range(20)]
    assert np.mean(drawn) < live.mean() + 0.35
    state["mask_logits"].assign(logits + 0.1)
    start_gates(wrapper)  # trained ones are left alone
    np.testing.assert_allclose(state["mask_logits"], logits + 0.1, rtol=1e-6)


def test_gates_start_as_the_plan_says_where_magnitudes_say_otherwise():
    _, wrapped = learnable("hard_concrete", "block4")
    wrapper = wrappers_of(wrapped)[0]
    state = wrapper.state("kernel")
    live = np.random.default_rng(0).permuted(state["mask"].numpy())
    state["mask"].assign(live)
    start_gates(wrapper)
    before = pruned_weights(wrapped)
    assert (np.sign(state["mask_logits"]) * (live - 0.5) >= 0).all()
    update_masks(wrapper)
    assert pruned_weights(wrapped) == before


def recovered_support(mask, group):
    """Trains the logits alone on what a network of known support computes."""
    rng = np.random.default_rng(3)
    weights = (rng.uniform(0.5, 1.5, (12, 6)) * rng.choice([-1, 1], (12, 6))).astype(np.float32)
    model = keras.Sequential(
        [keras.layers.Input((12,)), keras.layers.Dense(6, use_bias=False, name="dense")]
    )
    model.set_weights([weights])
    model.compile("sgd", "mse")
    plan = resolve(CompressionPlan([KernelRule("*", 0.5, group=group)]), model)
    entry = plan.kernels["dense/kernel"]
    support = rng.permuted(entry.operations.reshape(-1)).reshape(entry.operations.shape)
    start = rng.permuted(entry.operations.reshape(-1)).reshape(entry.operations.shape)
    keep = entry.grouping.expand_numpy(support == rls.Operation.KEEP)
    x = rng.normal(size=(256, 12)).astype(np.float32)
    y = x @ (weights * keep)
    plan = CompressionPlan([dataclasses.replace(entry, operations=start)])
    tf.random.set_seed(0)
    wrapped = rls.wrap(model, plan, mask=mask, train_masks=True)
    wrapper = wrappers_of(wrapped)[0]
    wrapper.layer.trainable = False
    assert [variable.name for variable in wrapped.trainable_variables] == [
        wrapper.state("kernel")["mask_logits"].name
    ]
    wrapped.compile(keras.optimizers.Adam(0.05), "mse")
    training = rls.MaskTraining(every=2, freeze_after=0.9)
    wrapped.fit(x, y, batch_size=32, epochs=24, verbose=0, callbacks=[training])
    np.testing.assert_array_equal(wrapper.layer.kernel, weights)
    assert (start != support).sum() >= 6
    found = plan_of(wrapped).kernels["dense/kernel"].operations
    return (found == support).mean()


@pytest.mark.parametrize("group", ["element", "block4"])
@pytest.mark.parametrize("mask", MASKS)
def test_logits_alone_find_a_known_support(mask, group):
    assert recovered_support(mask, group) == 1.0


@pytest.mark.parametrize("mask", MASKS)
def test_without_the_gradient_of_the_logits_the_support_is_not_found(mask, monkeypatch):
    import rl_sparsity_tf.layers.operations as operations
    import rl_sparsity_tf.layers.wrapper as wrapper

    straight, sample = operations.mask_weights_straight_through, wrapper.hard_concrete_sample

    def cut(logits):
        return tf.stop_gradient(logits) + 0.0 * logits

    monkeypatch.setattr(
        operations,
        "mask_weights_straight_through",
        lambda matrix, hard, logits, grouping: straight(matrix, hard, cut(logits), grouping),
    )
    monkeypatch.setattr(wrapper, "hard_concrete_sample", lambda logits: sample(cut(logits)))
    assert recovered_support(mask, "element") < 0.8


def test_frozen_hard_concrete_masks_are_not_sampled_any_more():
    _, wrapped = learnable("hard_concrete")
    wrapper = wrappers_of(wrapped)[0]
    draws = [wrapper.effective_kernel("kernel", training=True).numpy() for _ in range(2)]
    assert (draws[0] != draws[1]).any()
    freeze_masks(wrapper)
    frozen = wrapper.effective_kernel("kernel", training=True)
    np.testing.assert_array_equal(frozen, wrapper.effective_kernel("kernel", training=False))


@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("mask", MASKS)
def test_the_plan_after_learning_gives_the_same_zeros_when_applied_again(mask, group):
    model, wrapped = learnable(mask, group, sparsity=0.4, quantize=True)
    wrapped.compile(keras.optimizers.Adam(0.05), "sparse_categorical_crossentropy")
    planned = plan_of(wrapped)
    x, y = data_for(model)
    training = rls.MaskTraining(every=1)
    wrapped.fit(x, y, batch_size=8, epochs=2, verbose=0, callbacks=[training])
    learned, stripped = plan_of(wrapped), rls.strip(wrapped)
    assert learned.sparsity == planned.sparsity
    for path, kernel in learned.kernels.items():
        assert kernel.exported_bits == planned.kernels[path].exported_bits
    again = rls.strip(rls.wrap(stripped, CompressionPlan.from_json(learned.to_json())))
    for one, other in zip(stripped.get_weights(), again.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    from_scratch = rls.strip(rls.wrap(model, learned))
    for one, other in zip(find_kernels(stripped), find_kernels(from_scratch), strict=True):
        pruned = learned.kernels[one.path].operations == rls.Operation.PRUNE
        zeros = one.grouping(group).expand_numpy(pruned)
        assert (one.matrix()[zeros] == 0).all()
        assert (other.matrix()[zeros] == 0).all()
    assert sparsity_of(stripped) >= 0.38


# ---------------------------------------------------------------------------- MaskTraining


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every": 0}, "every=0 cannot be used. Expected an integer above 0"),
        ({"every": True}, "every=True"),
        ({"every": 1.5}, "every=1.5"),
        ({"freeze_after": 1.1}, "freeze_after=1.1 cannot be used. Expected a share from 0 to 1"),
        ({"freeze_after": "end"}, "freeze_after='end'"),
        ({"gradual": 1}, "gradual=1"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(rls.ArgumentError, match=message):
        rls.MaskTraining(**arguments)


def test_freezing_by_epoch_where_the_steps_are_not_known():
    model, wrapped = learnable("straight_through")
    x, y = data_for(model, 32)
    stream = tf.data.Dataset.from_generator(
        lambda: iter([(x, y)]),
        output_signature=(tf.TensorSpec((None, 13)), tf.TensorSpec((None,), tf.int64)),
    )
    training = rls.MaskTraining(every=1, freeze_after=0.5)
    frozen = []
    note = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: frozen.append(training.frozen)
    )
    wrapped.fit(stream, epochs=4, verbose=0, callbacks=[training, note])
    assert frozen[-1]
    assert not frozen[0]
