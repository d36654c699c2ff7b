"""Dead channels are removed, and the model computes what it did."""

import numpy as np
import pytest
import tensorflow as tf
import tf_keras as keras
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from same_outputs import assert_same, random_rows, randomize
from zoo import layers

import rl_sparsity_tf as rls
from rl_sparsity_tf.channels.groups import find_groups
from rl_sparsity_tf.channels.shrinking import shrink, shrink_with_report
from rl_sparsity_tf.channels.units import mask_channels
from rl_sparsity_tf.errors import ArgumentError, ModelError


def masks_for(model, rng, share=0.5):
    live = {}
    for group in find_groups(model):
        if group.frozen is None:
            live[group.index] = rng.random(group.size) < share
            live[group.index][rng.integers(group.size)] = True
    return live


def assert_sizes(model, small, live):
    """Every group has as many channels as its mask leaves, the others all of theirs."""
    expected = [live.get(g.index, np.ones(g.size, bool)).sum() for g in find_groups(model)]
    assert [group.size for group in find_groups(small)] == expected


# Random graphs.


BLOCKS = "conv strided residual concat separable separable_layer transposed nested pool pad".split()


@st.composite
def recipes(draw):
    """What a small network for images is made of; Keras draws names, so it is built later."""
    return {
        "padding": draw(st.sampled_from(["same", "valid"])),
        "bias": draw(st.booleans()),
        "norm": draw(st.booleans()),
        "activation": draw(st.sampled_from(["relu", "relu6", "sigmoid", "tanh"])),
        "blocks": draw(st.lists(st.sampled_from(BLOCKS), min_size=1, max_size=3)),
        "flatten": draw(st.booleans()),
        "seed": draw(st.integers(0, 1000)),
    }


def network_of(recipe):
    """A network of blocks as people use them."""
    padding, bias = recipe["padding"], recipe["bias"]

    def act(x):
        x = layers.BatchNormalization()(x) if recipe["norm"] else x
        if recipe["activation"] == "relu6":
            return layers.ReLU(max_value=6)(x)
        return layers.Activation(recipe["activation"])(x)

    def conv(x, channels, stride=1, kernel=3, padding=padding):
        return act(layers.Conv2D(channels, kernel, stride, padding=padding, use_bias=bias)(x))

    def residual(x):
        y = conv(x, 4, padding="same")
        y = layers.Conv2D(x.shape[-1], 3, padding="same", use_bias=bias)(y)
        return act(layers.Add()([x, y]))

    def nested(x):
        inputs = keras.Input(x.shape[1:])
        return keras.Model(inputs, residual(conv(inputs, 3, kernel=1)))(x)

    def separable(x):
        depthwise = layers.DepthwiseConv2D(3, padding=padding, depth_multiplier=2, use_bias=bias)
        return conv(act(depthwise(x)), 5, kernel=1)

    blocks = {
        "conv": lambda x: conv(x, 5),
        "strided": lambda x: conv(x, 4, stride=2),
        "residual": residual,
        "concat": lambda x: layers.Concatenate()([x, conv(x, 3, padding="same")]),
        "separable": separable,
        "separable_layer": lambda x: act(layers.SeparableConv2D(4, 2, use_bias=bias)(x)),
        "transposed": lambda x: act(layers.Conv2DTranspose(3, 2, use_bias=bias)(x)),
        "nested": nested,
        "pool": lambda x: layers.MaxPooling2D(2, 1, padding="same")(x),
        "pad": lambda x: layers.ZeroPadding2D(1)(x),
    }
    inputs = keras.Input((9, 9, 2))
    x = conv(inputs, 4)
    for name in recipe["blocks"]:
        x = blocks[name](x) if x.shape[1] > 2 else x
    if recipe["flatten"]:
        x = act(layers.Dense(6)(layers.Flatten()(x)))
    else:
        x = layers.GlobalAveragePooling2D()(x)
    return randomize(keras.Model(inputs, layers.Dense(5)(x)), recipe["seed"])


quick = settings(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@pytest.mark.slow
@settings(quick, max_examples=20)
@given(recipes(), st.integers(0, 1000), st.sampled_from([0.3, 0.6]))
def test_masked_networks_compute_the_same(recipe, seed, share):
    model = network_of(recipe)
    live = masks_for(model, np.random.default_rng(seed), share)
    masked = mask_channels(model, live)
    small = shrink(masked)
    assert_sizes(model, small, live)
    assert_same(masked, small, 128)
    if not all(mask.all() for mask in live.values()):
        assert small.count_params() < model.count_params()
    assert shrink_with_report(small)[1].removed == 0


@pytest.mark.slow
@settings(quick, max_examples=20)
@given(recipes(), st.integers(0, 1000))
def test_networks_with_zeros_anywhere_compute_the_same(recipe, seed):
    """Columns, rows and gammas of zero, beside biases that are not."""
    model, rng = network_of(recipe), np.random.default_rng(seed)
    for weight in model.weights[:-2]:
        if "kernel" in weight.name or "gamma" in weight.name:
            axis = rng.integers(1, 3) if len(weight.shape) > 1 else 1
            value = np.moveaxis(weight.numpy(), -axis, -1)
            value[..., rng.random(value.shape[-1]) < 0.5] = 0
            weight.assign(np.moveaxis(value, -1, -axis))
    small, report = shrink_with_report(model)
    assert report.weights_after == small.count_params()
    assert (report.removed > 0) == (small.count_params() < model.count_params())
    x = random_rows(model, 128)
    expected = np.asarray(model(x))
    scale = max(np.ptp(expected), np.abs(expected).max())
    assert np.abs(np.asarray(small(x)) - expected).max() <= 1e-5 * scale
    assert shrink_with_report(small)[1].removed == 0


# The networks of the measurements.


def resnet_8():
    inputs = keras.Input((16, 16, 1))

    def conv(x, channels, stride):
        x = layers.Conv2D(channels, 3, stride, padding="same", use_bias=False)(x)
        return layers.ReLU()(layers.BatchNormalization()(x))

    x = conv(inputs, 16, 1)
    for channels, stride in ((16, 1), (32, 2), (64, 2)):
        y = conv(x, channels, stride)
        y = layers.Conv2D(channels, 3, padding="same", use_bias=False)(y)
        y = layers.BatchNormalization()(y)
        if stride > 1:
            x = layers.Conv2D(channels, 1, stride, padding="same")(x)
        x = layers.ReLU()(layers.Add()([x, y]))
    x = layers.GlobalAveragePooling2D()(x)
    model = keras.Model(inputs, layers.Dense(10, activation="softmax", name="classes")(x))
    return randomize(model)


@pytest.fixture(scope="module")
def resnet():
    """A ResNet-8 and the same with every other channel of every group set to zero."""
    model = resnet_8()
    groups = [group for group in find_groups(model) if group.frozen is None]
    live = {group.index: np.arange(group.size) % 2 == 0 for group in groups}
    return model, live, mask_channels(model, live)


def test_a_resnet_at_half_its_channels(resnet):
    model, live, masked = resnet
    assert len(live) == 6
    small, report = shrink_with_report(masked)
    convolutions = [layer.filters for layer in small.layers if hasattr(layer, "filters")]
    assert sorted(convolutions) == [8, 8, 8, 16, 16, 16, 32, 32, 32]
    assert report.removed == 3 * (8 + 16 + 32)
    assert report.weights_after == small.count_params() < 0.27 * report.weights_before
    x = random_rows(model, 1024)
    expected, found = np.asarray(masked(x)), np.asarray(small(x))
    assert np.abs(found - expected).max() <= 1e-5
    assert (found.argmax(-1) == expected.argmax(-1)).all()
    assert len(set(expected.argmax(-1))) > 1  # else equal classes would mean nothing


@pytest.mark.slow
def test_the_exported_file_is_smaller(resnet, tmp_path):
    _, _, masked = resnet
    paths = [tmp_path / "masked.tflite", tmp_path / "small.tflite"]
    for path, model in zip(paths, (masked, shrink(masked)), strict=True):
        rls.export_tflite(model, path, quantization="none", formats="dense")
    files = [path.stat().st_size for path in paths]
    assert files[1] < 0.4 * files[0]


# Constants go into biases.


def chain(first, *rest, shape=(7, 7, 2)):
    return randomize(keras.Sequential([layers.Input(shape), first, *rest]))


def kill(layer, channels, value=None):
    """Sets columns of a kernel to zero, and their biases to a value."""
    kernel = np.array(layer.kernel)
    kernel[..., channels] = 0
    layer.kernel.assign(kernel)
    if value is not None:
        bias = np.array(layer.bias)
        bias[channels] = value
        layer.bias.assign(bias)


@pytest.mark.parametrize("activation", ["linear", "relu", "sigmoid", "tanh", "elu"])
def test_a_dense_layer_takes_up_a_constant(activation):
    model = chain(layers.Dense(6, activation=activation), layers.Dense(4), shape=(5,))
    kill(model.layers[0], [1, 4], 0.7)
    small = shrink(model)
    assert small.layers[0].units == 4
    assert_same(model, small)
    assert not np.allclose(small.layers[1].bias, model.layers[1].bias)


@pytest.mark.parametrize(
    ("reader", "after"),
    [
        (layers.Conv2D(4, 3, padding="valid"), 4),
        (layers.Conv2D(4, 1, padding="same"), 4),
        (layers.SeparableConv2D(4, 3), 4),
        (layers.Conv2D(4, 3, padding="same", name="reader"), 6),
        (layers.SeparableConv2D(4, 3, padding="same", name="reader"), 6),
        (layers.Conv2D(4, 3, use_bias=False, name="reader"), 6),
        (layers.Conv2DTranspose(4, 3, name="reader"), 6),
    ],
)
def test_a_convolution_takes_up_a_constant_where_that_is_exact(reader, after):
    copy = type(reader).from_config(reader.get_config())
    model = chain(layers.Conv2D(6, 3, name="first"), copy, layers.GlobalAveragePooling2D())
    kill(model.layers[0], [1, 4], 0.7)
    small, report = shrink_with_report(model)
    assert small.layers[0].filters == after
    assert_same(model, small)
    assert report.removed == 6 - after
    if isinstance(copy, layers.Conv2D | layers.Conv2DTranspose) and after == 6:
        why = "sees less of it at the borders" if copy.use_bias else "has no bias to take it up"
        assert report.layers[0].reason == f"some are constant (0.7), but reader {why}"
    # A constant of zero needs no bias and has no borders.
    kill(model.layers[0], [1, 4], 0.0)
    small = shrink(model)
    assert small.layers[0].filters == 4
    assert_same(model, small)


def test_a_beta_is_a_constant_whatever_the_kernel():
    model = chain(
        layers.Conv2D(6, 3), layers.BatchNormalization(), layers.ReLU(), layers.Conv2D(4, 3)
    )
    norm = model.layers[1]
    norm.gamma.assign([1, 0, 2, 0, 1, 1])
    norm.beta.assign([1, 0.5, 1, -0.5, 1, 1])
    small = shrink(model)
    assert small.layers[0].filters == 4
    np.testing.assert_array_equal(small.layers[1].gamma, [1, 2, 1, 1])
    assert_same(model, small)


def test_constants_go_through_all_that_lies_between():
    model = chain(
        layers.Conv2D(6, 3),
        layers.BatchNormalization(),
        layers.LeakyReLU(0.3),
        layers.DepthwiseConv2D(2, depth_multiplier=2),
        layers.PReLU(shared_axes=[1, 2]),
        layers.UpSampling2D(),
        layers.Cropping2D(1),
        layers.AveragePooling2D(2, padding="same"),
        layers.Rescaling(2.0, 0.3),
        layers.Flatten(),
        layers.BatchNormalization(),
        layers.Dense(4),
    )
    kill(model.layers[0], [0, 5], -0.4)
    small = shrink(model)
    assert small.layers[0].filters == 4
    assert small.layers[3].depthwise_kernel.shape == (2, 2, 4, 2)
    assert_same(model, small, 256)


def test_zeros_in_a_depthwise_kernel_kill_a_channel_before():
    model = chain(layers.Conv2D(6, 3), layers.DepthwiseConv2D(3), layers.Conv2D(4, 1))
    kernel = np.array(model.layers[1].depthwise_kernel)
    kernel[:, :, [2, 3]] = 0
    model.layers[1].depthwise_kernel.assign(kernel)
    small = shrink(model)
    assert small.layers[0].filters == 4
    assert_same(model, small, 256)


def test_padding_makes_borders_of_constants():
    model = chain(layers.Conv2D(6, 3), layers.ZeroPadding2D(1), layers.Conv2D(4, 3))
    kill(model.layers[0], [1], 0.7)
    small = shrink(model)
    assert small.layers[0].filters == 6
    kill(model.layers[0], [1], 0.0)
    assert shrink(model).layers[0].filters == 5


# What nothing reads is dead.


def test_what_nothing_reads_is_removed_and_what_only_that_read():
    model = chain(layers.Dense(6), layers.Dense(5, activation="relu"), layers.Dense(4), shape=(3,))
    _, second, third = model.layers
    third.kernel.assign(np.where(np.arange(5)[:, None] < 2, 0, third.kernel))
    kernel = np.array(second.kernel)
    kernel[3, 2:] = 0  # channel 3 is read by the two units alone that nothing reads
    second.kernel.assign(kernel)
    small, report = shrink_with_report(model)
    assert (small.layers[0].units, small.layers[1].units) == (5, 3)
    assert [(layer.before, layer.after) for layer in report.layers] == [(6, 5), (5, 3), (4, 4)]
    assert_same(model, small)


def shortcut():
    inputs = keras.Input((6, 6, 2))
    x = layers.Conv2D(5, 3, padding="same", name="stem")(inputs)
    y = layers.Conv2D(4, 3, padding="same", activation="relu", name="inner")(x)
    y = layers.Conv2D(5, 3, padding="same", name="outer")(y)
    x = layers.GlobalAveragePooling2D()(layers.Add()([x, y]))
    return randomize(keras.Model(inputs, layers.Dense(4, name="head")(x)))


def test_a_sum_needs_zeros_in_all_that_is_added():
    model = shortcut()
    kill(model.get_layer("outer"), [1, 2], 0.0)
    assert shrink_with_report(model)[1].removed == 0
    kill(model.get_layer("stem"), [2, 3], 0.0)
    small, report = shrink_with_report(model)
    assert {layer.path: layer.after for layer in report.layers} == {
        "stem": 4,
        "inner": 4,
        "outer": 4,
        "head": 4,
    }
    assert_same(model, small)


def test_a_channel_that_is_read_only_to_make_itself_is_dead():
    model = shortcut()
    head = np.array(model.get_layer("head").kernel)
    head[2] = 0
    model.get_layer("head").kernel.assign(head)
    inner = np.array(model.get_layer("inner").kernel)
    inner[:, :, 2, 1:] = 0  # channel 2 goes into the first inner channel alone,
    model.get_layer("inner").kernel.assign(inner)
    outer = np.array(model.get_layer("outer").kernel)
    outer[:, :, 0, [0, 1, 3, 4]] = 0  # which goes into channel 2 alone
    model.get_layer("outer").kernel.assign(outer)
    small = shrink(model)
    sizes = [small.get_layer(name).filters for name in ("stem", "inner", "outer")]
    assert sizes == [4, 3, 4]
    assert_same(model, small)


@pytest.mark.parametrize("value", [0.0, 0.7])
def test_a_channel_of_every_layer_stays(value):
    model = chain(layers.Conv2D(6, 3), layers.Conv2D(5, 3), layers.Flatten(), layers.Dense(4))
    kill(model.layers[1], slice(None), value)
    small, report = shrink_with_report(model)
    assert [layer.after for layer in report.layers] == [1, 1, 4]
    assert report.layers[0].reason == "a layer keeps at least one channel"
    # The outputs are the same constants.
    x = random_rows(model, 64)
    np.testing.assert_allclose(np.asarray(small(x)), np.asarray(model(x)), atol=1e-5)


def test_a_part_of_a_concatenation_keeps_a_channel():
    inputs = keras.Input((5,))
    parts = [layers.Dense(3, name=name)(inputs) for name in "ab"]
    model = randomize(keras.Model(inputs, layers.Dense(4)(layers.Concatenate()(parts))))
    kill(model.get_layer("a"), slice(None), 0.4)
    small = shrink(model)
    assert [small.get_layer(name).units for name in "ab"] == [1, 3]
    assert_same(model, small)


# What comes back is a model like the one given.


def nested(kind):
    if kind == "functional":
        entry = keras.Input((6, 6, 5), name="entry")
        y = layers.Conv2D(5, 3, padding="same", name="conv")(entry)
        inner = keras.Model(entry, layers.Add()([entry, y]), name="inner")
    else:
        first = {"input_shape": (6, 6, 5)} if kind == "shape" else {}
        inner = keras.Sequential(
            [layers.Conv2D(5, 3, name="conv", **first), layers.ReLU()], name="inner"
        )
    inputs = keras.Input((6, 6, 2), name="image")
    x = inner(layers.Conv2D(5, 1, activation="relu", name="stem")(inputs))
    x = layers.Dense(4, name="head")(layers.GlobalAveragePooling2D()(x))
    return randomize(keras.Model(inputs, x, name="outer"))


@pytest.mark.parametrize("kind", ["functional", "sequential", "shape"])
def test_models_inside_models_shrink_and_are_saved(kind, tmp_path):
    model = nested(kind)
    live = masks_for(model, np.random.default_rng(0))
    masked = mask_channels(model, live)
    small = shrink(masked)
    assert_sizes(model, small, live)
    inner = small.get_layer("inner")
    assert type(inner) is type(model.get_layer("inner"))
    assert inner.input_shape[-1] == live[0].sum() < 5
    assert_same(masked, small, 256)
    path = tmp_path / "small.keras"
    small.save(path)
    loaded = keras.models.load_model(path)
    x = random_rows(model, 8)
    np.testing.assert_array_equal(np.asarray(loaded(x)), np.asarray(small(x)))


def test_everything_else_is_as_it_was():
    model = chain(
        layers.Dense(6, activation="relu", name="a", kernel_regularizer="l2"),
        layers.BatchNormalization(name="norm"),
        layers.Dense(4, name="b"),
        shape=(5,),
    )
    model.compile(keras.optimizers.Adam(0.02), "mse", metrics=["mae"])
    model.get_layer("a").trainable = False
    model.get_layer("norm").trainable = False
    kill(model.layers[0], [1, 4], 0.0)
    weights, config = model.get_weights(), model.get_config()
    small = shrink(model)
    assert model.get_config() == config
    for before, after in zip(weights, model.get_weights(), strict=True):
        np.testing.assert_array_equal(before, after)
    assert type(small) is keras.Sequential
    assert [layer.name for layer in small.layers] == ["a", "norm", "b"]
    assert [layer.trainable for layer in small.layers] == [False, False, True]
    assert small.layers[0].kernel_regularizer is not None
    assert small.optimizer.learning_rate.numpy() == pytest.approx(0.02)
    small.fit(random_rows(model, 8), np.zeros((8, 4)), verbose=0)
    unchanged = shrink(small)
    assert unchanged is not small
    assert unchanged.count_params() == small.count_params()


def test_a_frozen_model_and_mixed_precision_stay_so():
    keras.mixed_precision.set_global_policy("mixed_float16")
    try:
        model = chain(layers.Dense(6, name="a"), layers.Dense(4), shape=(5,))
    finally:
        keras.mixed_precision.set_global_policy("float32")
    model.compile("sgd", "mse")
    model.trainable = False
    kill(model.layers[0], [1, 4], 0.0)
    small = shrink(model)
    assert small.layers[0].units == 4
    assert small.trainable_weights == []
    assert [layer.compute_dtype for layer in small.layers] == ["float16"] * 2
    assert isinstance(small.optimizer, keras.mixed_precision.LossScaleOptimizer)
    assert keras.mixed_precision.global_policy().name == "float32"


class Own(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.hidden, self.head = layers.Dense(5), layers.Dense(3)

    def call(self, inputs):
        return self.head(self.hidden(inputs))


def test_a_subclassed_model_is_copied_as_it_is():
    model = Own(name="own")
    x = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
    model(x)
    kill(model.hidden, [0, 1], 0.0)
    expected = np.asarray(model(x))
    copy, report = shrink_with_report(model)
    assert copy is not model
    np.testing.assert_array_equal(np.asarray(copy(x)), expected)
    assert (report.layers, report.removed) == ((), 0)
    assert report.weights_before == report.weights_after == model.count_params()
    assert report.notes[0].startswith("own: Own is a subclassed model, whose layers' order")


def test_layers_that_cannot_be_made_smaller_are_left():
    start = keras.initializers.Constant(np.zeros(6))
    model = chain(layers.Dense(6, bias_initializer=start), layers.Dense(4), shape=(5,))
    kill(model.layers[0], [1], 0.0)
    copy, report = shrink_with_report(model)
    assert copy.layers[0].units == 6
    assert "its smaller layers cannot be put together" in report.notes[-1]
    assert_same(model, copy)


def test_layers_of_a_class_that_is_not_known_keep_their_channels():
    model = chain(
        layers.Dense(6, name="a"), layers.LayerNormalization(), layers.Dense(4), shape=(5,)
    )
    kill(model.layers[0], [1], 0.0)
    copy, report = shrink_with_report(model)
    assert copy.layers[0].units == 6
    assert "LayerNormalization, whose channels are not followed" in report.layers[0].reason
    assert report.layers[0].reason in report.notes[0]
    assert_same(model, copy)


def test_the_table_says_what_was_removed():
    model = chain(layers.Dense(6, name="a"), layers.Dense(4, name="b"), shape=(5,))
    kill(model.layers[0], [1, 4], 0.0)
    lines = []
    shrink(model, print_fn=lines.append)
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]
    assert ["a", "6", "4", ""] in rows
    assert ["b", "4", "4", "the model's outputs stay"] in rows
    assert lines[-1] == "64 weights before, 44 after"


def test_nothing_is_printed_unless_asked(capsys):
    shrink(chain(layers.Dense(6), layers.Dense(4), shape=(5,)))
    assert capsys.readouterr().out == ""


# Masks.


def test_a_mask_sets_all_weights_of_a_channel_to_zero():
    model = chain(
        layers.Conv2D(3, 3),
        layers.BatchNormalization(name="full"),
        layers.DepthwiseConv2D(3, depth_multiplier=2),
        layers.BatchNormalization(scale=False, name="plain"),
        layers.Conv2D(4, 3),
    )
    before = {weight.name: weight.numpy() for weight in model.weights}
    masked = mask_channels(model, {0: [True, False, True]})
    zeros = {
        w.name.split(":")[0]: np.flatnonzero((w.numpy() == 0).all(tuple(range(len(w.shape) - 1))))
        for w in masked.weights
        if len(w.shape) != 4
    }
    assert zeros["full/gamma"].tolist() == zeros["full/beta"].tolist() == [1]
    assert zeros["full/moving_mean"].tolist() == zeros["full/moving_variance"].tolist() == []
    assert zeros["plain/beta"].tolist() == zeros["plain/moving_mean"].tolist() == [2, 3]
    first, _, depthwise, _, last = masked.layers
    assert not np.any(first.kernel[..., 1])
    assert not np.any(first.bias[1])
    assert not np.any(depthwise.depthwise_kernel[:, :, 1])
    assert not np.any(depthwise.bias[2:4])
    assert np.all(last.kernel != 0)
    for weight in model.weights:
        np.testing.assert_array_equal(weight, before[weight.name])
    small = shrink(masked)
    assert small.layers[0].filters == 2
    assert_same(masked, small, 128)


@pytest.mark.parametrize(
    ("live", "message"),
    [
        ({7: [True]}, r"live names group 7. Expected the index of one of the 2 groups"),
        (
            {0: [True]},
            r"group 0 has shape \(1,\) and type bool. Expected one bool for each of its 6",
        ),
        ({0: [1.0] * 6}, r"type float64. Expected one bool for each"),
        ({0: [False] * 6}, r"group 0 leaves no channel. Expected at least one True"),
        ({1: [True] * 4}, r"Group 1 is frozen: the model's outputs stay. Leave it out"),
    ],
)
def test_masks_that_do_not_fit_are_refused(live, message):
    model = chain(layers.Dense(6), layers.Dense(4), shape=(5,))
    with pytest.raises(ArgumentError, match=message):
        mask_channels(model, live)


@pytest.mark.parametrize("call", [shrink, lambda model: mask_channels(model, {})])
def test_wrapped_and_other_models_are_refused(call):
    wrapped = rls.wrap(chain(layers.Dense(6), layers.Dense(4), shape=(5,)))
    with pytest.raises(
        ModelError, match=r"wrapped; .* plain one. Call rl_sparsity_tf.strip\(model"
    ):
        call(wrapped)
    with pytest.raises(ModelError, match="is not built"):
        call(keras.Sequential([layers.Dense(5)]))
    with pytest.raises(ModelError, match="Expected a tf_keras model"):
        call("model.keras")


def with_operations():
    """What people write without layers: sums, scales, clips, means and reshapes."""
    inputs = layers.Input((6, 6, 2))
    x = layers.Conv2D(6, 3, padding="same")(inputs)
    y = tf.nn.relu(layers.Conv2D(6, 1)(x))
    x = tf.nn.relu6(0.5 * x + y)
    gate = tf.reduce_mean(x, [1, 2])
    gate = layers.Dense(4, activation="relu")(gate)
    gate = layers.Dense(6, activation="sigmoid")(gate)
    x = x * layers.Reshape((1, 1, 6))(gate)
    x = tf.concat([x, tf.clip_by_value(layers.Conv2D(3, 1)(x), 0.0, 1.0)], -1)
    x = layers.Reshape((36, 9))(x)
    x = layers.Conv1D(5, 2, activation="relu")(x)
    outputs = layers.Dense(4)(layers.Flatten()(x))
    return randomize(keras.Model(inputs, outputs))


@pytest.mark.parametrize("seed", range(4))
def test_operations_in_place_of_layers_are_followed(seed):
    model = with_operations()
    groups = find_groups(model)
    assert [group.size for group in groups if group.frozen is None] == [6, 4, 3, 5]
    live = masks_for(model, np.random.default_rng(seed))
    masked = mask_channels(model, live)
    small = shrink(masked)
    assert_same(masked, small, rows=256)
    assert_sizes(model, small, live)
