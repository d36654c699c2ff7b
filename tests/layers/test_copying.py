"""Copies of layers and models that share nothing with the original."""

import threading

import numpy as np
import pytest
import tensorflow as tf
import tf_keras as keras
from zoo import layers

import rl_sparsity_tf as rls
from rl_sparsity_tf.errors import one_line
from rl_sparsity_tf.layers.copying import copy_layer, copy_weights
from rl_sparsity_tf.layers.kernels import find_kernels, sparsity_of
from rl_sparsity_tf.layers.plan import KernelRule
from rl_sparsity_tf.layers.rules import uniform_plan

LINKS = ("_inbound_nodes", "_outbound_nodes")


class Scaled(layers.Layer):
    """No get_config, and an argument that Keras cannot describe."""

    def __init__(self, function, factor=1.0, **kwargs):
        super().__init__(**kwargs)
        self.function, self.factor = function, factor
        self.dense = layers.Dense(5)

    def call(self, x):
        return self.factor * self.function(self.dense(x))


class Locked(Scaled):
    """Holds what Python cannot copy either."""

    def __init__(self, function, **kwargs):
        super().__init__(function, **kwargs)
        self.lock = threading.Lock()


def model_with(layer):
    inputs = keras.Input((4,))
    return keras.Model(inputs, layers.Dense(3, name="last")(layer(inputs)))


X = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)


@pytest.mark.parametrize(
    "make",
    [
        lambda: layers.Dense(3, "relu", kernel_regularizer=keras.regularizers.L2(0.1), name="mine"),
        lambda: layers.Conv2D(3, 2, dtype="float64", name="mine"),
        lambda: layers.Bidirectional(layers.LSTM(3, go_backwards=False), name="mine"),
        lambda: layers.RNN([layers.LSTMCell(2), layers.GRUCell(2)], name="mine"),
    ],
)
def test_layers_with_a_config_are_made_anew(make):
    layer = make()
    copied = copy_layer(layer)
    assert copied is not layer
    assert type(copied) is type(layer)
    assert copied.get_config() == layer.get_config()
    assert copied.name == "mine"


@pytest.mark.parametrize("policy", ["float64", "mixed_float16", "mixed_bfloat16"])
@pytest.mark.parametrize(
    "make", [lambda: layers.Dense(3), lambda: layers.LSTM(3), lambda: Scaled(tf.nn.relu)]
)
def test_the_policy_is_kept_and_the_global_one_restored(make, policy):
    before = keras.mixed_precision.global_policy()
    keras.mixed_precision.set_global_policy(policy)
    try:
        layer = make()
    finally:
        keras.mixed_precision.set_global_policy(before)
    copied = copy_layer(layer)
    assert copied.dtype_policy.name == policy
    assert keras.mixed_precision.global_policy() is before
    inner = getattr(copied, "dense", None)
    assert inner is None or inner.dtype_policy.name == policy


def test_the_global_policy_is_restored_after_an_error():
    before = keras.mixed_precision.global_policy()
    layer = Locked(tf.nn.relu, dtype="float64")
    with pytest.raises(rls.ModelError):
        copy_layer(layer)
    assert keras.mixed_precision.global_policy() is before


def test_layers_without_a_config_are_copied_by_python():
    model = model_with(Scaled(tf.nn.relu, factor=3.0, name="mine"))
    model.layers[1].dense.trainable = False
    links = [getattr(model.layers[1], name) for name in LINKS]
    wrapped = rls.wrap(model, rls.CompressionPlan([KernelRule("mine/dense/kernel", 0.5)]))
    stripped = rls.strip(wrapped)
    copied = stripped.layers[1]
    assert type(copied) is Scaled
    assert (copied.name, copied.factor, copied.dense.trainable) == ("mine", 3.0, False)
    assert copied.function is tf.nn.relu
    assert (copied.dense.kernel.numpy() == 0).sum() == 10
    np.testing.assert_array_equal(wrapped(X), stripped(X))
    np.testing.assert_array_equal(rls.strip(model)(X), model(X))
    # The original is where it was in its graph, and nothing of it is in the copy.
    assert [getattr(model.layers[1], name) for name in LINKS] == links
    assert all(links)
    keras.Model(model.inputs, model.layers[1].output)(X)
    ours = {id(weight) for weight in model.weights}
    assert not ours & {id(weight) for weight in stripped.weights + wrapped.weights}
    for node in copied._inbound_nodes:
        assert node.layer is copied


def test_training_a_copy_leaves_the_original_alone():
    model = model_with(Scaled(tf.nn.relu))
    model.compile("adam", "mse")
    before = [value.copy() for value in model.get_weights()]
    wrapped = rls.wrap(model)
    wrapped.fit(X, np.ones((5, 3)), verbose=0)
    for value, old in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(value, old)
    moved = zip(rls.strip(wrapped).get_weights(), before, strict=True)
    assert any(not np.array_equal(value, old) for value, old in moved)


def test_layers_that_cannot_be_copied_are_named():
    model = model_with(Locked(tf.nn.relu, name="mine"))
    links = [getattr(model.layers[1], name) for name in LINKS]
    message = r"The layer 'mine' of class Locked cannot be copied \(.*Give its class a get_config"
    with pytest.raises(rls.ModelError, match=message):
        rls.wrap(model)
    assert [getattr(model.layers[1], name) for name in LINKS] == links


def test_a_config_that_forgets_an_argument_is_an_error():
    class Forgetful(layers.Layer):
        def __init__(self, units=3, **kwargs):
            super().__init__(**kwargs)
            self.units = units

        def build(self, shape):
            self.kernel = self.add_weight("kernel", (shape[-1], self.units))

        def call(self, x):
            return x @ self.kernel

        def get_config(self):
            return super().get_config()

    inputs = keras.Input((4,))
    model = keras.Model(inputs, Forgetful(7)(inputs))
    message = r"has other weights \(\(4, 3\)\) than itself \(\(4, 7\)\)\. Give its class a get_conf"
    with pytest.raises(rls.ModelError, match=message):
        rls.wrap(model)


def test_copy_weights_freezes_what_is_frozen_layer_by_layer():
    source = layers.Bidirectional(layers.LSTM(3))
    source.build((None, 4, 2))
    source.backward_layer.cell.trainable = False
    destination = copy_layer(source)
    destination.build((None, 4, 2))
    copy_weights(source, destination)
    assert not destination.backward_layer.cell.trainable
    assert destination.forward_layer.cell.trainable
    assert len(destination.trainable_weights) == len(source.trainable_weights) == 3
    for one, other in zip(source.get_weights(), destination.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_layers_that_share_a_variable_are_refused():
    class Tied(layers.Layer):
        """Multiplies by the transposed kernel of another layer."""

        def __init__(self, other, **kwargs):
            super().__init__(**kwargs)
            self.other = other

        def call(self, x):
            return x @ tf.transpose(self.other.kernel)

    inputs = keras.Input((4,))
    dense = layers.Dense(3)
    model = keras.Model(inputs, Tied(dense)(dense(inputs)))
    assert len(find_kernels(model)) == 1
    with pytest.raises(rls.ModelError, match=r"share weights.*Share the whole layer instead"):
        rls.wrap(model)


def adapted(layer, data):
    layer.adapt(data)
    return layer


WORDS = np.array([["a d"], ["c b"], ["a zebra"]])
NUMBERS = np.random.default_rng(1).normal(5, 3, (40, 2)).astype(np.float32)


@pytest.mark.parametrize(
    ("make", "x"),
    [
        (lambda: [adapted(layers.Normalization(), NUMBERS)], NUMBERS),
        (
            lambda: [adapted(layers.Discretization(num_bins=4), NUMBERS), layers.Embedding(9, 3)],
            NUMBERS,
        ),
        (
            lambda: [
                adapted(layers.TextVectorization(output_sequence_length=3), ["a b", "c d a", "a"]),
                layers.Embedding(9, 3),
            ],
            WORDS,
        ),
        (lambda: [adapted(layers.StringLookup(output_mode="multi_hot"), ["a d", "x"])], WORDS),
        (
            lambda: [
                adapted(layers.TextVectorization(output_mode="tf_idf"), ["a b", "c d a", "a"]),
            ],
            WORDS,
        ),
    ],
)
def test_what_a_layer_has_adapted_to_is_kept(make, x):
    start = keras.Input(
        x.shape[1:], dtype=tf.as_dtype(x.dtype) if x.dtype.kind == "f" else "string"
    )
    model = keras.Sequential([start, *make(), layers.Flatten(), layers.Dense(3)])
    wrapped = rls.wrap(model)
    x = tf.constant(x)
    np.testing.assert_array_equal(wrapped(x), model(x))
    np.testing.assert_array_equal(rls.strip(wrapped)(x), model(x))
    assert np.ptp(model(x).numpy(), axis=0).all()
    assert 0 < sparsity_of(rls.strip(rls.wrap(model, uniform_plan(model, 0.1)))) < 0.7


@pytest.mark.parametrize("kind", [layers.LSTM, layers.SimpleRNN])
def test_stateful_layers_start_anew_in_a_copy(kind):
    model = keras.Sequential([keras.Input((3, 4), batch_size=2), kind(3, stateful=True)])
    x = np.ones((2, 3, 4), np.float32)
    first, second = model(x).numpy(), model(x).numpy()
    wrapped = rls.wrap(model)
    np.testing.assert_array_equal(wrapped(x), first)
    np.testing.assert_array_equal(wrapped(x), second)
    assert not np.array_equal(first, second)


class Hiding(layers.Layer):
    """Its layer is in a function, where Keras does not see it."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        dense = layers.Dense(3, name="hidden")
        self.function = lambda x: dense(x)

    def call(self, x):
        return self.function(x)


def hidden_layer():
    return model_with(Hiding())


def weight_of_another_layer():
    inputs = keras.Input((4,))
    dense = layers.Dense(3)
    return keras.Model(inputs, tf.matmul(dense(inputs), dense.kernel, transpose_b=True))


@pytest.mark.parametrize("call", [rls.wrap, rls.strip])
def test_weights_that_are_used_where_keras_does_not_track_them_are_refused(call):
    message = r"does not track where they are used \(.*hidden/kernel.*in the layer that owns it"
    with pytest.raises(rls.ModelError, match=message):
        call(hidden_layer())


@pytest.mark.parametrize("call", [rls.wrap, rls.strip])
def test_graphs_that_cannot_be_cloned_are_refused(call):
    message = r"cannot be rebuilt layer by layer \(.*Let it use weights only in the layers that own"
    with pytest.raises(rls.ModelError, match=message):
        call(weight_of_another_layer())


def test_one_line_is_an_errors_class_and_first_line():
    assert one_line(ValueError("first.\nsecond")) == "ValueError: first"
    assert one_line(KeyError()) == "KeyError"
    assert len(one_line(ValueError("x" * 999))) < 250
