"""Models written as classes: found, wrapped, trained, stripped, or refused with a reason."""

import numpy as np
import pytest
import tensorflow as tf
import tf_keras as keras
from zoo import layers

import rl_sparsity_tf as rls
from rl_sparsity_tf.layers.kernels import find_kernels
from rl_sparsity_tf.layers.plan import KernelRule
from rl_sparsity_tf.layers.rules import uniform_plan
from rl_sparsity_tf.layers.wrapping import plan_of

X = np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32)


class Autoencoder(keras.Model):
    """Two Sequential parts in attributes."""

    def __init__(self, code=3):
        super().__init__()
        self.encoder = keras.Sequential([layers.Dense(5, "relu"), layers.Dense(code)])
        self.decoder = keras.Sequential([layers.Dense(5, "relu"), layers.Dense(6)])

    def call(self, x):
        return self.decoder(self.encoder(x))


class Residual(keras.Model):
    """Layers in lists, lists of lists, tuples and dicts."""

    def __init__(self, depth=2, units=6):
        super().__init__()
        self.blocks = [[layers.Dense(7, "relu"), layers.Dense(units)] for _ in range(depth)]
        self.norms = tuple(layers.BatchNormalization() for _ in range(depth))
        self.heads = {"mean": layers.Dense(2), "spread": layers.Dense(2, "softplus")}

    def call(self, x, training=False):
        for (first, second), norm in zip(self.blocks, self.norms, strict=True):
            x = norm(x + second(first(x)), training=training)
        return self.heads["mean"](x) + self.heads["spread"](x)


class Weighted(keras.Model):
    """Weights of its own, and plain attributes that its call depends on."""

    def __init__(self, power=1, activation=tf.nn.relu):
        super().__init__()
        self.power, self.activation = power, activation
        self.shift = {"by": [power, 0.5]}
        self.dense = layers.Dense(4)
        self.gain = self.add_weight(name="gain", shape=(4,), initializer="ones")
        self.steps = tf.Variable(0.0, trainable=False)

    def call(self, x):
        y = self.activation(self.dense(x)) * self.gain ** float(self.power)
        return y + self.shift["by"][0] + self.steps


class Outer(keras.Model):
    """A model class inside another, and one layer used twice."""

    def __init__(self):
        super().__init__()
        self.inner = Autoencoder(4)
        self.last = layers.Dense(6)

    def call(self, x):
        return self.last(self.inner(self.last(x)))


def called(model):
    model(X)
    return model


AUTOENCODER = ["encoder/dense", "encoder/dense_1", "decoder/dense_2", "decoder/dense_3"]
MODELS = {
    "autoencoder": (Autoencoder, AUTOENCODER),
    "residual": (Residual, ["dense", "dense_1", "dense_2", "dense_3", "dense_4", "dense_5"]),
    "weighted": (Weighted, ["dense"]),
    "outer": (
        Outer,
        [
            "autoencoder/encoder/0",
            "autoencoder/encoder/1",
            "autoencoder/decoder/0",
            "autoencoder/decoder/1",
            "dense_4",
        ],
    ),
}


def randomized(model, seed=0):
    """Random values everywhere, so that what a copy lacks shows."""
    rng = np.random.default_rng(seed)
    model.set_weights([np.abs(rng.normal(size=w.shape)) + 0.1 for w in model.get_weights()])
    return model


def made(name):
    return randomized(called(MODELS[name][0]()))


# ---------------------------------------------------------------------------- what works


@pytest.mark.parametrize("name", MODELS)
def test_kernels_are_found_through_the_attributes(name):
    expected = [path.replace("encoder/", "sequential/", 1) for path in MODELS[name][1]]
    expected = [path.replace("decoder/", "sequential_1/", 1) for path in expected]
    if name == "outer":  # a part of the model, described by its own attributes
        expected = MODELS[name][1]
    found = [kernel.path for kernel in find_kernels(made(name))]
    assert found == [f"{path}/kernel" for path in expected]


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_copies_are_of_the_same_class_and_share_nothing(name):
    model = made(name)
    model.compile(keras.optimizers.Adam(0.01), "mse", metrics=["mae"])
    weights = [value.copy() for value in model.get_weights()]
    attributes = dict(vars(model))
    outputs = model(X).numpy()
    plan = uniform_plan(model, 0.4, quantize=True)
    wrapped = rls.wrap(model, plan)
    assert type(wrapped) is type(model)
    assert wrapped.name == model.name
    assert plan_of(wrapped) == plan
    wrapped.fit(X, np.ones(outputs.shape), batch_size=4, verbose=0)
    stripped = rls.strip(wrapped)
    assert type(stripped) is type(model)
    np.testing.assert_array_equal(stripped(X), wrapped(X))
    assert stripped.metrics_names == ["loss", "mae"] or stripped.loss == "mse"
    for kernel in find_kernels(stripped):
        pruned = plan.kernels[kernel.path].operations == rls.Operation.PRUNE
        assert pruned.any()
        assert (kernel.matrix()[pruned] == 0).all()
    owned = {id(weight) for weight in model.weights}
    assert not owned & {id(weight) for weight in wrapped.weights + stripped.weights}
    # The original: same weights, same objects in the same attributes, same outputs.
    for value, old in zip(model.get_weights(), weights, strict=True):
        np.testing.assert_array_equal(value, old)
    assert {name: id(value) for name, value in vars(model).items()} == {
        name: id(value) for name, value in attributes.items()
    }
    np.testing.assert_array_equal(model(X), outputs)
    assert not any(isinstance(layer, rls.CompressionWrapper) for layer in model.submodules)


@pytest.mark.parametrize("name", MODELS)
def test_a_copy_with_everything_kept_computes_the_same_bits(name):
    model = made(name)
    wrapped = rls.wrap(model)
    np.testing.assert_array_equal(wrapped(X), model(X))
    np.testing.assert_array_equal(wrapped.predict_on_batch(X), model.predict_on_batch(X))
    np.testing.assert_array_equal(rls.strip(wrapped)(X), model(X))


@pytest.mark.parametrize("how", ["build", "call", "fit"])
def test_it_does_not_matter_how_the_model_was_built(how):
    model = Autoencoder(4)
    model.compile("sgd", "mse")
    if how == "build":
        model.build((None, 6))
    elif how == "call":
        model(X)
    else:
        model.fit(X, X, verbose=0)
    wrapped = rls.wrap(model, uniform_plan(model, 0.5))
    np.testing.assert_array_equal(rls.strip(wrapped)(X), wrapped(X))
    np.testing.assert_array_equal(rls.strip(model)(X), model(X))


def test_attributes_that_keras_cannot_describe_reach_the_copy():
    # One argument that has no description makes Keras leave out all of them.
    model = randomized(called(Weighted(power=3, activation=tf.nn.tanh)))
    model.power_was_seen = True
    for copy in (rls.wrap(model), rls.strip(model)):
        assert (copy.power, copy.shift, copy.power_was_seen) == (3, {"by": [3, 0.5]}, True)
        assert copy.shift is not model.shift
        np.testing.assert_array_equal(copy(X), model(X))


def test_weights_of_the_models_own_are_copied_and_trained():
    model = made("weighted")
    model.compile("adam", "mse")
    wrapped = rls.wrap(model)
    np.testing.assert_array_equal(wrapped.gain, model.gain)
    np.testing.assert_array_equal(wrapped.steps, model.steps)
    assert wrapped.gain is not model.gain
    wrapped.fit(X, np.ones((8, 4)), verbose=0)
    assert not np.array_equal(wrapped.gain, model.gain)
    np.testing.assert_array_equal(rls.strip(wrapped).gain, wrapped.gain)


def test_frozen_layers_stay_frozen():
    model = made("residual")
    model.blocks[0][1].trainable = False
    model.norms[1].trainable = False
    model.compile("adam", "mse")
    wrapped = rls.wrap(model)
    stripped = rls.strip(wrapped)
    assert [layer.trainable for layer in stripped.layers] == [
        layer.trainable for layer in model.layers
    ]
    assert not stripped.blocks[0][1].trainable
    assert len(wrapped.trainable_weights) == len(model.trainable_weights)
    model.trainable = False
    assert not rls.wrap(model).trainable_weights


def test_a_training_step_of_its_own_is_used():
    class Counting(Autoencoder):
        def __init__(self, code=3):
            super().__init__(code)
            self.calls = self.add_weight(name="calls", shape=(), trainable=False)

        def train_step(self, data):
            self.calls.assign_add(1.0)
            return super().train_step(data)

    model = called(Counting())
    model.calls.assign(5.0)
    model.compile("sgd", "mse")
    wrapped = rls.wrap(model)
    wrapped.fit(X, X, batch_size=4, verbose=0)
    stripped = rls.strip(wrapped)
    assert [float(m.calls) for m in (model, wrapped, stripped)] == [5.0, 7.0, 7.0]


def test_dictionaries_and_tuples_go_in_and_out():
    class Several(keras.Model):
        def __init__(self):
            super().__init__()
            self.left, self.right = layers.Dense(3), layers.Dense(3)

        def call(self, inputs):
            left, right = self.left(inputs["wide"]), self.right(inputs["narrow"])
            return {"sum": left + right, "both": (left, right)}

    inputs = {"wide": X, "narrow": X[:, :2]}
    model = Several()
    model(inputs)
    wrapped = rls.wrap(model, uniform_plan(model, 0.4))
    stripped = rls.strip(wrapped)
    tf.nest.map_structure(np.testing.assert_array_equal, wrapped(inputs), stripped(inputs))
    shapes = {kernel.path: kernel.shape for kernel in find_kernels(stripped)}
    assert shapes == {"dense/kernel": (6, 3), "dense_1/kernel": (2, 3)}


def test_one_layer_in_two_attributes_stays_one():
    class Twice(keras.Model):
        def __init__(self):
            super().__init__()
            self.first = layers.Dense(6)
            self.second = self.first

        def call(self, x):
            return self.second(tf.nn.relu(self.first(x)))

    model = called(Twice())
    wrapped = rls.wrap(model, uniform_plan(model, 0.5))
    stripped = rls.strip(wrapped)
    assert stripped.first is stripped.second
    assert len(find_kernels(stripped)) == 1
    np.testing.assert_array_equal(stripped(X), wrapped(X))


def test_a_class_inside_a_functional_model():
    inputs = keras.Input((6,))
    part = Residual(depth=1)
    model = keras.Model(inputs, layers.Dense(3)(part(inputs)))
    randomized(model)
    plan = rls.CompressionPlan([KernelRule("residual/blocks/*", 0.5)])
    wrapped = rls.wrap(model, plan)
    stripped = rls.strip(wrapped)
    assert type(stripped.layers[1]) is Residual
    assert len(stripped.layers[1].blocks) == 1
    zeros = {k.path: int((k.value() == 0).sum()) for k in find_kernels(stripped)}
    assert zeros["residual/blocks/0/0/kernel"] == zeros["residual/blocks/0/1/kernel"] == 21
    assert zeros["residual/heads/mean/kernel"] == 0
    np.testing.assert_array_equal(stripped(X), wrapped(X))


def test_stripped_models_keep_what_their_class_does(tmp_path):
    model = made("autoencoder")
    stripped = rls.strip(rls.wrap(model, uniform_plan(model, 0.5)))
    stripped.save_weights(tmp_path / "model.weights.h5")
    fresh = called(Autoencoder())
    fresh.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_array_equal(fresh(X), stripped(X))


# ---------------------------------------------------------------------------- what is refused


class NeedsArguments(keras.Model):
    def __init__(self, make):
        super().__init__()
        self.dense = make()

    def call(self, x):
        return self.dense(x)


class HiddenInAClosure(keras.Model):
    def __init__(self):
        super().__init__()
        dense = layers.Dense(3)
        self.function = lambda x: dense(x)

    def call(self, x):
        return self.function(x)


class HiddenInASet(keras.Model):
    def __init__(self):
        super().__init__()
        self.parts = {layers.Dense(6, name="hidden")}
        self.last = layers.Dense(3)

    def call(self, x):
        for part in self.parts:
            x = part(x)
        return self.last(x)


class OddKeys(keras.Model):
    def __init__(self):
        super().__init__()
        self.parts = {"a/b": layers.Dense(6, name="odd")}

    def call(self, x):
        return self.parts["a/b"](x)


class ReadsTheKernel(keras.Model):
    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(6)

    def call(self, x):
        return tf.matmul(self.dense(x), self.dense.kernel, transpose_b=True)


class OtherWeights(keras.Model):
    def __init__(self, size=3, function=None):
        super().__init__()
        self.dense = layers.Dense(3)
        self.table = self.add_weight(name="table", shape=(size,))

    def call(self, x):
        return self.dense(x) + tf.reduce_sum(self.table)


class OtherCompile(Autoencoder):
    def compile(self, optimizer, reconstruction_loss):
        super().compile(optimizer, loss=reconstruction_loss)


class Tied(keras.Model):
    """The decoder is the encoder transposed."""

    def __init__(self):
        super().__init__()
        self.encoder = layers.Dense(3)
        self.decoder = TransposedDense(self.encoder)

    def call(self, x):
        return self.decoder(self.encoder(x))


class TransposedDense(layers.Layer):
    def __init__(self, other, **kwargs):
        super().__init__(**kwargs)
        self.other = other

    def build(self, shape):
        self.kernel = self.other.kernel

    def call(self, x):
        return tf.matmul(x, self.kernel, transpose_b=True)


def compiled(model):
    model.compile("adam", reconstruction_loss="mse")
    return called(model)


REFUSED = {
    "never built": (Autoencoder, r"is not built.*Call it once on data"),
    "arguments": (
        lambda: called(NeedsArguments(lambda: layers.Dense(3))),
        r"cannot be rebuilt from its class NeedsArguments.*Give NeedsArguments a get_config\(\)",
    ),
    "set": (
        lambda: called(HiddenInASet()),
        r"does not track where they are used \(.*hidden/kernel.*not in sets or functions",
    ),
    "closure": (
        lambda: called(HiddenInAClosure()),
        r"\(HiddenInAClosure\) uses weights that Keras does not track.*Keep layers in attributes",
    ),
    "key": (
        lambda: called(OddKeys()),
        r"The layers \['odd'\].*by text keys without '/'.*Keep them in attributes of the model",
    ),
    "kernel": (
        lambda: called(ReadsTheKernel()),
        r"ReadsTheKernel \(AttributeError.*let its call\(\) use its layers only by calling them",
    ),
    "own weights": (
        lambda: called(OtherWeights(4, tf.nn.relu)),
        r"has other weights of its own.*Give OtherWeights a get_config\(\)",
    ),
    "compile": (
        lambda: compiled(OtherCompile()),
        r"compile\(\) of OtherCompile does not take Keras's arguments.*give the model uncompiled",
    ),
    "tied": (
        lambda: called(Tied()),
        r"share weights with each other \(2 weights, 4 in a copy\).*Share the whole layer instead",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_taken_apart_is_refused_with_advice(name):
    make, message = REFUSED[name]
    model = make()
    weights = [value.copy() for value in model.get_weights()] if model.built else []
    with pytest.raises(rls.ModelError, match=message):
        rls.wrap(model)
    for value, old in zip(model.get_weights() if weights else [], weights, strict=True):
        np.testing.assert_array_equal(value, old)


def test_mixed_precision_is_no_obstacle():
    before = keras.mixed_precision.global_policy()
    keras.mixed_precision.set_global_policy("mixed_bfloat16")
    try:
        model = called(Autoencoder())
    finally:
        keras.mixed_precision.set_global_policy(before)
    stripped = rls.strip(rls.wrap(model))
    assert stripped.compute_dtype == stripped.encoder.layers[0].compute_dtype == "bfloat16"
    np.testing.assert_array_equal(stripped(X), model(X))


def test_uncompiled_models_with_another_compile_are_taken():
    model = called(OtherCompile())
    assert type(rls.strip(rls.wrap(model))) is OtherCompile
