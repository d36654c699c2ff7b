"""Models that are random at inference, or that no file can compute, are refused at the door."""

from __future__ import annotations

import random

import numpy as np
import pytest
import tensorflow as tf
import tf_keras as keras

import rl_sparsity_tf as rls
from rl_sparsity_tf.export.verification import check_repeatable

layers = keras.layers
RNG = np.random.default_rng(0)
X = RNG.normal(size=(32, 6)).astype(np.float32)
Y = RNG.integers(0, 3, 32)


def model_of(*stack, shape=(6,), dtype=None):
    x = keras.Input(shape, dtype=dtype)
    h = x
    for layer in stack:
        h = layer(h)
    model = keras.Model(x, layers.Dense(3, activation="softmax")(h), name="mine")
    model.compile("adam", "sparse_categorical_crossentropy")
    return model


class AlwaysNoisy(layers.GaussianNoise):
    def call(self, inputs, training=None):
        return super().call(inputs, training=True)


class NumpyNoise(layers.Layer):
    def __init__(self, size=1.0, **options):
        super().__init__(**options)
        self.size = size

    def call(self, x):
        return x + self.size * np.random.normal(size=(6,)).astype(np.float32)  # noqa: NPY002


class OwnGenerator(layers.Layer):
    def build(self, shape):
        self.generator = tf.random.Generator.from_seed(1)
        super().build(shape)

    def call(self, x):
        return x + self.generator.normal(tf.shape(x))


class Counting(layers.Layer):
    def build(self, shape):
        self.calls = self.add_weight("calls", (), trainable=False, initializer="zeros")
        super().build(shape)

    def call(self, x):
        return x + self.calls.assign_add(1.0)


class DrawsForNothing(layers.Layer):
    def call(self, x):
        return x + 0.0 * tf.random.normal(tf.shape(x))


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__(name="mine")
        self.first, self.noise = layers.Dense(3), AlwaysNoisy(0.5, name="shaking")

    def call(self, x):
        return self.noise(self.first(x))


def subclassed():
    model = Subclassed()
    model(X[:1])
    return model


def dropout(h):
    return layers.Dropout(0.5, name="always")(h, training=True)


RANDOM = {
    "dropout": (lambda: model_of(dropout), r"its layer 'always' \(Dropout\) draws random numbers"),
    "nested dropout": (
        lambda: model_of(model_of(dropout), layers.Dense(4)),
        r"its layer 'always' \(Dropout\) draws",
    ),
    "two": (
        lambda: model_of(dropout, AlwaysNoisy(1.0, name="more")),
        r"its layers 'always' \(Dropout\), 'more' \(AlwaysNoisy\) draw random numbers",
    ),
    "an operation": (
        lambda: model_of(lambda h: h + tf.random.normal(tf.shape(h))),
        r"its layer 'tf.random.normal' \(TFOpLambda\) draws",
    ),
    "a Lambda": (
        lambda: model_of(layers.Lambda(lambda h: h + tf.random.uniform((6,)), name="my")),
        r"its layer 'my' \(Lambda\) draws",
    ),
    "subclassed": (subclassed, r"its layer 'shaking' \(AlwaysNoisy\) draws"),
    "NumPy": (lambda: model_of(NumpyNoise()), r"something in it is random, and two calls"),
    "a generator of its own": (
        lambda: model_of(OwnGenerator(name="own")),
        r"its layer 'own' \(OwnGenerator\) draws",
    ),
    "a generator of Keras's": (
        lambda: model_of(
            lambda h: layers.Dropout(0.5, rng_type="stateful", name="kept")(h, training=True)
        ),
        r"its layer 'kept' \(Dropout\) draws",
    ),
    "recurrent": (
        lambda: model_of(
            layers.Reshape((3, 2)),
            lambda h: layers.LSTM(4, dropout=0.5, name="lstm")(h, training=True),
        ),
        r"its layer 'lstm(_cell)?' \(LSTM(Cell)?\) draws",
    ),
}


@pytest.mark.parametrize("name", RANDOM)
def test_a_model_that_is_random_at_inference_is_refused_by_name(name):
    build, named = RANDOM[name]
    model = build()
    kept = random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    with pytest.raises(rls.ModelError, match=rf"Model 'mine' is random at inference: {named}"):
        check_repeatable(model, X)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == kept  # noqa: NPY002


def test_it_is_refused_before_any_work(tmp_path):
    model = model_of(layers.Dense(8), dropout)
    data = (X, Y)
    calls = {
        "search": lambda: rls.Compressor(
            model, rls.Target(sparsity=0.5), directory=tmp_path / "run"
        ).search(data, data, episodes=1, verbose=0),
        "a search of permuted channels": lambda: rls.Compressor(
            model, rls.Target(sparsity=0.5), group="block4", shuffle="channels"
        ).search(data, data, episodes=1, verbose=0),
        "dynamic programming": lambda: rls.baselines.dynamic_programming(model, data, sparsity=0.5),
        "hill climbing": lambda: rls.baselines.hill_climbing(
            model, data, sparsity=0.5, validation_data=data
        ),
        "export": lambda: rls.export_tflite(model, tmp_path / "m.tflite", "none"),
        "a header": lambda: rls.export_micro(model, tmp_path / "m.h", X),
    }
    for call in calls.values():
        with pytest.raises(rls.ModelError, match=r"is random at inference: its layer 'always'"):
            call()
    assert not list(tmp_path.iterdir())
    rls.strip(rls.wrap(model))  # computes nothing, so it still works


def test_what_only_looks_random_passes():
    rounding = model_of(NumpyNoise(1e-6))
    training_norm = model_of(lambda h: layers.BatchNormalization()(h, training=True))
    stateful = keras.Sequential(
        [layers.Input((3, 2), batch_size=4), layers.GRU(4, stateful=True), layers.Dense(2)]
    )
    rows = X[:, None].reshape(-1, 3, 2)
    stateful(rows[:4])
    for model, x in (
        (model_of(layers.Dropout(0.5), layers.GaussianNoise(1.0)), X),
        (model_of(DrawsForNothing()), X),
        (rounding, X),
        (model_of(Counting()), X),
        (training_norm, X),
        (stateful, rows),
    ):
        states = [state for layer in model.layers for state in getattr(layer, "states", [])]
        kept = [value.numpy() for value in (*model.weights, *states)]
        check_repeatable(model, x)
        for value, before in zip((*model.weights, *states), kept, strict=True):
            np.testing.assert_array_equal(value.numpy(), before)


LOOKUPS = {
    "integers": (lambda: layers.IntegerLookup(vocabulary=[3, 5], name="ids"), "int64"),
    "words": (lambda: layers.StringLookup(vocabulary=["a", "b"], name="words"), "string"),
    "categories": (
        lambda: layers.CategoryEncoding(4, output_mode="multi_hot", name="categories"),
        "int64",
    ),
    "hashes": (lambda: layers.Hashing(5, name="hashes"), "int64"),
    "text": (
        lambda: layers.TextVectorization(
            vocabulary=["a", "b"], output_sequence_length=4, name="text"
        ),
        "string",
    ),
}


@pytest.mark.parametrize("name", LOOKUPS)
def test_layers_that_look_up_or_hash_belong_in_front_of_the_model(name, tmp_path):
    build, dtype = LOOKUPS[name]
    layer = build()
    rest = [] if name == "categories" else [layers.Embedding(8, 4), layers.Flatten()]
    model = model_of(layer, *rest, shape=(1 if name == "text" else 4,), dtype=dtype)
    message = (
        rf"Model 'mine' has the preprocessing layer '{layer.name}' \({type(layer).__name__}\), "
        r"which .*Put it in front of the model, in the data pipeline: dataset\.map"
    )
    for call in (
        lambda: rls.Compressor(model, rls.Target(sparsity=0.5)),
        lambda: rls.export_tflite(model, tmp_path / "m.tflite", "none"),
        lambda: rls.export_micro(model, tmp_path / "m.h", X),
    ):
        with pytest.raises(rls.ModelError, match=message):
            call()
    said = []
    rls.describe_support(model, print_fn=said.append)
    assert f"{layer.name}: cannot be exported: put it in front of the model" in "\n".join(said)
    # What needs no file still works.
    assert rls.baselines.lamp(model, sparsity=0.5).kernels
    assert rls.strip(rls.wrap(model)).get_layer(layer.name)


def test_layers_that_only_compute_stay_in_the_model(tmp_path):
    scaled = layers.Normalization(mean=[0.0] * 6, variance=[2.0] * 6)
    binned = layers.Discretization(bin_boundaries=[-1.0, 0.0, 1.0])
    model = model_of(scaled, binned, layers.Embedding(4, 3), layers.Flatten())
    rls.export_tflite(model, tmp_path / "m.tflite", "none", representative_data=X)
    rls.Compressor(model, rls.Target(sparsity=0.5))
