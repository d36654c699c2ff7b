"""Which channels belong together, and why others stay."""

import numpy as np
import pytest
import tensorflow as tf
import tf_keras as keras
from zoo import layers

import rl_sparsity_tf as rls
from rl_sparsity_tf.channels.groups import describe_groups, find_groups
from rl_sparsity_tf.errors import ModelError


def paths(uses):
    return [use.path for use in uses]


def model_of(*stack, shape=(6, 6, 3)):
    """A stack between an input and a Dense layer without an activation."""
    return keras.Sequential([layers.Input(shape), *stack, layers.Dense(4, name="head")])


def test_a_chain_has_a_group_per_layer():
    model = model_of(
        layers.Conv2D(5, 3, padding="same", name="first", activation="relu"),
        layers.BatchNormalization(name="norm"),
        layers.MaxPooling2D(),
        layers.Conv2D(7, 3, use_bias=False, name="second"),
        layers.GlobalAveragePooling2D(),
    )
    first, second, head = find_groups(model)
    assert [group.index for group in (first, second, head)] == [0, 1, 2]
    assert (first.size, second.size, head.size) == (5, 7, 4)
    assert (first.frozen, second.frozen) == (None, None)
    assert head.frozen == "the model's outputs stay"
    (made,) = first.producers
    assert (made.path, made.bias, made.axis) == ("first/kernel", "first/bias", -1)
    assert made.variable is model.get_layer("first").kernel
    assert made.bias_variable is model.get_layer("first").bias
    assert second.producers[0].bias is None
    names = ("gamma", "beta", "moving_mean", "moving_variance")
    assert paths(first.followers) == [f"norm/{name}" for name in names]
    (read,) = first.consumers
    assert (read.path, read.axis) == ("second/kernel", -2)
    # Nine positions of five channels each, as KernelSpec views the kernel.
    np.testing.assert_array_equal(read.rows(2), np.arange(9) * 5 + 2)
    assert head.consumers == ()


def test_a_sum_makes_channels_one():
    inputs = keras.Input((6, 6, 3))
    x = layers.Conv2D(5, 3, padding="same", name="stem")(inputs)
    y = layers.Conv2D(8, 3, padding="same", name="inner")(x)
    y = layers.Conv2D(5, 3, padding="same", name="outer")(y)
    for merge in (layers.Add, layers.Subtract, layers.Average, layers.Maximum, layers.Multiply):
        z = layers.Dense(2)(layers.GlobalMaxPooling2D()(merge()([x, y])))
        shared, inner, _ = find_groups(keras.Model(inputs, z))
        assert paths(shared.producers) == ["stem/kernel", "outer/kernel"], merge
        assert paths(inner.producers) == ["inner/kernel"]
        assert (shared.size, inner.size) == (5, 8)
        assert shared.frozen is None


def test_a_sum_of_a_concatenation_ties_its_parts():
    inputs = keras.Input((4,))
    a, b = layers.Dense(2, name="a")(inputs), layers.Dense(3, name="b")(inputs)
    c = layers.Dense(5, name="c")(inputs)
    x = layers.Add()([layers.Concatenate()([a, b]), c])
    group, _ = find_groups(keras.Model(inputs, layers.Dense(2)(x)))
    assert group.size == 5
    found = {use.path: use.channels.tolist() for use in group.producers}
    assert found == {"a/kernel": [0, 1], "b/kernel": [2, 3, 4], "c/kernel": [0, 1, 2, 3, 4]}


def test_a_concatenation_keeps_groups_apart_and_counts_on():
    inputs = keras.Input((6, 6, 3))
    x = layers.Conv2D(2, 1, name="a")(inputs)
    y = layers.Conv2D(3, 1, name="b")(inputs)
    x = layers.BatchNormalization(name="norm")(layers.Concatenate()([x, inputs, y]))
    model = keras.Model(inputs, layers.Conv2D(2, 1, name="head")(x))
    a, b, _ = find_groups(model)
    assert (a.frozen, b.frozen) == (None, None)
    assert a.consumers[0].channels.tolist() == [0, 1, -1, -1, -1, -1, -1, -1]
    assert b.consumers[0].channels.tolist() == [-1, -1, -1, -1, -1, 0, 1, 2]
    assert b.followers[0].path == "norm/gamma"
    assert b.followers[0].channels.tolist() == [-1, -1, -1, -1, -1, 0, 1, 2]
    assert b.consumers[0].rows(1).tolist() == [6]


def test_a_concatenation_of_places_ties_channels():
    inputs = keras.Input((6, 3))
    x = [layers.Conv1D(4, 1, name=name)(inputs) for name in "ab"]
    x = layers.GlobalMaxPooling1D()(layers.Concatenate(axis=1)(x))
    group, _ = find_groups(keras.Model(inputs, layers.Dense(2)(x)))
    assert paths(group.producers) == ["a/kernel", "b/kernel"]


def test_flatten_reads_a_channel_at_every_place():
    model = model_of(layers.Conv2D(5, 3, name="conv"), layers.Flatten())
    group, _ = find_groups(model)
    (read,) = group.consumers
    rows = read.rows(3)
    assert rows.tolist() == [(h * 4 + w) * 5 + 3 for h in range(4) for w in range(4)]
    # What the rows say is what the network does.
    kernel = np.zeros((80, 4), np.float32)
    kernel[rows] = 1
    model.get_layer("head").kernel.assign(kernel)
    x = np.random.default_rng(0).normal(size=(2, 6, 6, 3)).astype(np.float32)
    channel = np.asarray(model.get_layer("conv")(x))[..., 3]
    np.testing.assert_allclose(np.asarray(model(x))[:, 0], channel.sum((1, 2)), rtol=1e-4)


def test_depthwise_kernels_follow_and_multiply():
    model = model_of(
        layers.Conv2D(3, 1, name="conv"),
        layers.DepthwiseConv2D(3, depth_multiplier=2, name="depthwise"),
        layers.PReLU(shared_axes=[1, 2], name="slopes"),
        layers.SeparableConv2D(5, 1, depth_multiplier=3, name="separable"),
        layers.GlobalMaxPooling2D(),
    )
    group, separable, _ = find_groups(model)
    assert group.size == 3
    found = {use.path: (use.axis, use.channels.tolist()) for use in group.followers}
    assert found == {
        "depthwise/depthwise_kernel": (-2, [0, 1, 2]),
        "depthwise/bias": (-1, [0, 0, 1, 1, 2, 2]),
        "slopes/alpha": (-1, [0, 0, 1, 1, 2, 2]),
        "separable/depthwise_kernel": (-2, [0, 0, 1, 1, 2, 2]),
    }
    (read,) = group.consumers
    assert read.path == "separable/pointwise_kernel"
    assert read.channels.tolist() == [c for c in range(3) for _ in range(6)]
    assert paths(separable.producers) == ["separable/pointwise_kernel"]
    assert separable.producers[0].bias == "separable/bias"


def test_transposed_kernels_have_their_axes_swapped():
    model = model_of(
        layers.Conv2DTranspose(5, 3, name="up"),
        layers.Conv2DTranspose(6, 3, name="again"),
        layers.GlobalMaxPooling2D(),
    )
    group, _, _ = find_groups(model)
    assert (group.producers[0].axis, group.consumers[0].axis) == (-2, -1)
    assert group.consumers[0].rows(1).tolist() == [p * 5 + 1 for p in range(9)]


def test_slopes_of_every_place_and_of_all_channels():
    model = model_of(
        layers.Conv2D(3, 1),
        layers.PReLU(name="everywhere"),
        layers.PReLU(shared_axes=[1, 2, 3], name="one"),
        layers.Flatten(),
    )
    group, _ = find_groups(model)
    assert paths(group.followers) == ["everywhere/alpha"]


def test_a_gate_is_tied_to_what_it_multiplies():
    inputs = keras.Input((6, 6, 3))
    x = layers.Conv2D(4, 3, activation="relu", name="conv")(inputs)
    gate = layers.GlobalAveragePooling2D(keepdims=True)(x)
    gate = layers.Conv2D(2, 1, activation="relu", name="squeeze")(gate)
    gate = layers.Conv2D(4, 1, activation="sigmoid", name="excite")(gate)
    x = layers.GlobalMaxPooling2D()(layers.Multiply()([x, gate]))
    group, squeeze, _ = find_groups(keras.Model(inputs, layers.Dense(3)(x)))
    assert paths(group.producers) == ["conv/kernel", "excite/kernel"]
    assert (group.frozen, squeeze.frozen) == (None, None)


def test_one_channel_for_all_stays():
    inputs = keras.Input((6, 6, 3))
    x = layers.Conv2D(4, 1, name="conv")(inputs)
    where = layers.Conv2D(1, 1, name="where")(x)
    x = layers.Multiply(name="times")([x, where])
    group, where, _ = find_groups(keras.Model(inputs, layers.Conv2D(2, 1)(x)))
    assert group.frozen is None
    assert where.frozen == "times reads it once for all channels"


def test_models_inside_models_are_followed():
    inner_in = keras.Input((6, 6, 4))
    y = layers.Conv2D(4, 3, padding="same", name="conv")(inner_in)
    inner = keras.Model(inner_in, layers.Add()([inner_in, y]), name="inner")
    inputs = keras.Input((6, 6, 3))
    x = inner(layers.Conv2D(4, 1, name="stem")(inputs))
    model = keras.Model(inputs, layers.Dense(2)(layers.GlobalMaxPooling2D()(x)))
    group, _ = find_groups(model)
    assert paths(group.producers) == ["stem/kernel", "inner/conv/kernel"]
    assert group.frozen is None


def test_a_layer_without_weights_may_be_called_twice():
    relu = layers.ReLU()
    model = model_of(
        layers.Dense(5, name="a"), relu, layers.Dense(6, name="b"), layers.Dropout(0.1), shape=(3,)
    )
    inputs = keras.Input((3,))
    x = relu(layers.Dense(6, name="b")(relu(layers.Dense(5, name="a")(inputs))))
    twice = keras.Model(inputs, layers.Dense(4, name="head")(x))
    for found in (model, twice):
        assert [group.frozen for group in find_groups(found)[:2]] == [None, None]


class Own(layers.Dense):
    """A class of the user's that derives from one that is known."""

    def call(self, inputs):
        return super().call(inputs[..., ::-1])


def twice(x):
    dense = layers.Dense(5, name="twice")
    return layers.Add()([dense(x), dense(layers.ReLU()(x))])


def both_ways(x):
    inner = keras.Sequential([layers.Input((5,)), layers.Dense(5)], name="inner")
    return inner(inner(x))


def in_a_dict(x):
    a = keras.Input((5,), name="a")
    inner = keras.Model({"a": a}, layers.ReLU()(a), name="named")
    return inner({"a": x})


def row_of(x):
    return layers.Lambda(lambda v: v[:, None])(x)


FROZEN = {
    "named is a model whose inputs and outputs are not a list": in_a_dict,
    "twice is called 2 times": twice,
    "inner is called 2 times": both_ways,
    "own is Own, whose channels are not followed": Own(4, name="own"),
    "norm is LayerNormalization, whose channels": layers.LayerNormalization(name="norm"),
    "turn is a Reshape that does not keep the channels last": layers.Reshape((5, 1), name="turn"),
    "turn is Permute, whose channels are not followed": lambda x: layers.Permute(
        (2, 1), name="turn"
    )(layers.Conv1D(5, 1)(layers.UpSampling1D(2)(row_of(x)))),
    "rnn is LSTM, whose channels are not followed": lambda x: layers.LSTM(3, name="rnn")(
        layers.Dense(5)(row_of(x))
    ),
    "any is Lambda, whose channels are not followed": layers.Lambda(lambda x: x + 1, name="any"),
    "is a TensorFlow operation (reverse) whose channels are not": lambda x: tf.reverse(x, [1]),
    "is a TensorFlow operation (math.add) whose channels": lambda x: tf.add(x, [1.0] * 5),
    "is a TensorFlow operation (math.reduce_mean)": lambda x: tf.reduce_mean(x, 1, True),
    "is a TensorFlow operation, whose channels are not followed": lambda x: x[:, ::-1],
    "the activation softmax of soft mixes channels": layers.Activation("softmax", name="soft"),
    "the activation <lambda> of f may mix": layers.Activation(lambda x: x * 2, name="f"),
    "keeps a list of numbers, one per channel": layers.Rescaling([1.0, 2.0, 3.0, 4.0, 5.0]),
    "drop is called with further arguments": lambda x: layers.Dropout(0.1, name="drop")(
        x, training=True
    ),
    "plus reads constants beside": lambda x: layers.Add(name="plus")([x, tf.ones((1, 5))]),
}


@pytest.mark.parametrize("reason", FROZEN)
def test_what_cannot_be_followed_stays(reason):
    inputs = keras.Input((3,))
    x = FROZEN[reason](layers.Dense(5, name="before")(inputs))
    model = keras.Model(inputs, layers.Dense(4)(layers.Flatten()(layers.Dense(3)(x))))
    frozen = [group.frozen or "" for group in find_groups(model)[:-1]]
    # Whatever reads the result is followed again; the layer before and after must stay.
    assert any(reason in text for text in frozen), frozen
    assert frozen[0]


FROZEN_IMAGES = {
    "groups is a convolution in 2 groups": layers.Conv2D(4, 1, groups=2, name="groups"),
    "normalizes along another axis": layers.BatchNormalization(axis=1),
    "normalizes by more than its moving statistics": layers.BatchNormalization(renorm=True),
    "pool has its channels first": layers.MaxPooling2D(data_format="channels_first", name="pool"),
}


@pytest.mark.parametrize("reason", FROZEN_IMAGES)
def test_what_cannot_be_followed_in_images_stays(reason):
    model = model_of(layers.Conv2D(4, 1), FROZEN_IMAGES[reason], layers.Flatten())
    assert reason in find_groups(model)[0].frozen


def test_flatten_of_an_open_size_stays():
    inputs = keras.Input((None, 3))
    x = layers.Flatten(name="flat")(layers.Conv1D(4, 1)(inputs))
    assert "flat flattens axes of unknown size" in find_groups(keras.Model(inputs, x))[0].frozen


def test_a_sum_with_the_input_stays():
    inputs = keras.Input((5,))
    x = layers.Add()([inputs, layers.Dense(5)(inputs)])
    group, _ = find_groups(keras.Model(inputs, layers.Dense(4)(x)))
    assert group.frozen == "the model's inputs stay"


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("activation", ["relu", "sigmoid"])
def test_zeros_that_become_another_constant_need_a_layer_that_takes_it_up(activation, padding):
    model = model_of(
        layers.Conv2D(5, 3, activation=activation),
        layers.Conv2D(5, 3, padding=padding, name="reader"),
        layers.GlobalMaxPooling2D(),
    )
    frozen = find_groups(model)[0].frozen
    if activation == "sigmoid" and padding == "same":
        assert frozen == "zeros become 0.5, and reader sees less of it at the borders"
    else:
        assert frozen is None


def test_zeros_that_become_another_constant_need_a_bias():
    model = model_of(
        layers.Dense(5, activation="sigmoid"),
        layers.Dense(6, use_bias=False, name="reader"),
        shape=(3,),
    )
    frozen = find_groups(model)[0].frozen
    assert frozen == "zeros become 0.5, and reader has no bias to take it up"


def test_the_table_names_groups_and_what_is_not_followed():
    lines = []
    model = model_of(
        layers.Dense(5, name="a"),
        layers.BatchNormalization(name="norm"),
        layers.Dense(6, name="b"),
        layers.LayerNormalization(name="mixing"),
        shape=(3,),
    )
    describe_groups(model, lines.append)
    assert lines[0].strip() == "Groups of channels"
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]
    assert ["0", "5", "a", "norm", "b", ""] in rows
    (row,) = [row for row in rows if row[0] == "1"]
    assert row[:5] == ["1", "6", "b", "", ""]
    assert row[5].startswith("mixing is LayerNormalization")
    expected = "mixing: mixing is LayerNormalization, whose channels are not followed"
    assert lines[-1] == expected


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(3)

    def call(self, inputs):
        return self.dense(inputs)


def test_a_subclassed_model_has_no_groups_that_are_known():
    model, lines = Subclassed(), []
    model(np.zeros((1, 4), np.float32))
    assert find_groups(model) == []
    describe_groups(model, lines.append)
    (line,) = lines
    assert "Subclassed is a subclassed model" in line
    assert "build it with keras.Model(inputs, outputs)" in line


@pytest.mark.parametrize("call", [find_groups, describe_groups])
def test_wrapped_and_other_models_are_refused(call):
    wrapped = rls.wrap(model_of(layers.Dense(5), shape=(3,)))
    with pytest.raises(ModelError, match=r"is wrapped; .* needs a plain one. Call rl_sparsity_tf"):
        call(wrapped)
    with pytest.raises(ModelError, match="is not built"):
        call(keras.Sequential([layers.Dense(5)]))
    with pytest.raises(ModelError, match="Expected a tf_keras model"):
        call("model.keras")
