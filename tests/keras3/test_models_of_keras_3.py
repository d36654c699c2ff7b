"""Models of Keras 3 become equal models of tf_keras, and come back as clones of the user's own."""

import keras as keras3
import numpy as np
import pytest
import tensorflow as tf
import tf_keras as keras

import rl_sparsity_tf as rls
from rl_sparsity_tf.errors import ModelError
from rl_sparsity_tf.keras3.door import admitted, compare, handed_back, is_keras_3_model, origin_of
from rl_sparsity_tf.keras3.parts import Keras3Part

layers = keras3.layers


def rows(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def nested():
    inner = keras3.Sequential([layers.Input((6,)), layers.Dense(6, activation="silu", name="d")])
    x = keras3.Input((6,))
    y = layers.Dense(6, name="d")(inner(x))  # the same name inside and outside
    return keras3.Model(x, inner(y)), rows(4, 6)


def shared():
    dense, x = layers.Dense(6, activation="gelu"), keras3.Input((6,))
    return keras3.Model(x, dense(dense(x)) + x), rows(4, 6)


def several():
    a, b = keras3.Input((6,), name="b"), keras3.Input((3,), name="a")
    joined = layers.Concatenate()([layers.Dense(4)(a), layers.Dense(4)(b)])
    heads = [layers.Dense(2, name="second")(joined), layers.Dense(3, name="first")(joined)]
    return keras3.Model([a, b], heads), [rows(4, 6), rows(4, 3)]


def of_a_dict():
    inputs = {"words": keras3.Input((5,), dtype="int32"), "number": keras3.Input((3,))}
    pooled = layers.GlobalAveragePooling1D()(
        layers.Embedding(9, 4, mask_zero=True)(inputs["words"])
    )
    joined = layers.Concatenate()([pooled, layers.Dense(4)(inputs["number"])])
    outputs = {"z": layers.Dense(2)(joined), "a": layers.Dense(1)(joined)}
    words = np.random.default_rng(0).integers(0, 9, (4, 5)).astype("int32")
    return keras3.Model(inputs, outputs), {"words": words, "number": rows(4, 3)}


def masked():
    x = keras3.Input((7,), dtype="int32")
    y = layers.Embedding(9, 4, mask_zero=True)(x)
    y = layers.MultiHeadAttention(2, 3)(y, y)
    y = layers.Bidirectional(layers.LSTM(4))(y)
    return keras3.Model(x, layers.Dense(2)(y)), np.arange(28).reshape(4, 7).astype("int32") % 9


def frozen():
    model = keras3.Sequential(
        [
            layers.Input((8, 8, 3)),
            layers.Conv2D(4, 3, name="held"),
            layers.BatchNormalization(),
            layers.Flatten(),
            layers.Dense(2),
        ]
    )
    model.layers[0].trainable = False
    return model, rows(4, 8, 8, 3)


def half():
    policy = "mixed_float16"
    return keras3.Sequential(
        [layers.Input((6,)), layers.Dense(8, dtype=policy), layers.Dense(3, dtype=policy)]
    ), rows(4, 6)


def operations():
    x = keras3.Input((6,))
    y = keras3.ops.relu(layers.Dense(6)(x)) * 0.5 + keras3.ops.sigmoid(x)
    y = keras3.ops.concatenate([y, keras3.ops.mean(y, axis=-1, keepdims=True)], axis=-1)
    return keras3.Model(x, keras3.ops.softmax(y[:, 1:])), rows(4, 6)


@keras3.saving.register_keras_serializable("tests")
class Scale(layers.Layer):
    """With a weight of its own: runs as a part."""

    def build(self, shape):
        self.factor = self.add_weight(shape=(shape[-1],), initializer="ones", name="factor")

    def call(self, x):
        return x * self.factor


@keras3.saving.register_keras_serializable("tests")
class Block(layers.Layer):
    """Made of layers alone: is taken apart."""

    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.units = units
        self.first = layers.Dense(units, activation="relu")
        self.second = layers.Dense(units)

    def build(self, shape):
        self.first.build(shape)
        self.second.build((*shape[:-1], self.units))

    def call(self, x):
        return x + self.second(self.first(x))

    def get_config(self):
        return {**super().get_config(), "units": self.units}


@keras3.saving.register_keras_serializable("tests")
class Subclassed(keras3.Model):
    def __init__(self, units=5, **kwargs):
        super().__init__(**kwargs)
        self.units = units
        self.hidden = layers.Dense(units, activation="relu")
        self.last = layers.Dense(2)

    def build(self, shape):
        self.hidden.build(shape)
        self.last.build((*shape[:-1], self.units))

    def call(self, x):
        return self.last(self.hidden(x))

    def get_config(self):
        return {**super().get_config(), "units": self.units}


def custom():
    x = keras3.Input((6,))
    return keras3.Model(x, Block(6, name="block")(Scale(name="scale")(x))), rows(4, 6)


def subclassed():
    model = Subclassed()
    x = rows(4, 6)
    model(x)
    return model, x


@keras3.saving.register_keras_serializable("tests")
class TakesMask(Block):
    def call(self, x, mask=None):
        return super().call(x)


def masked_blocks():
    x = keras3.Input((7,), dtype="int32")
    y = TakesMask(4, name="block")(layers.Embedding(9, 4, mask_zero=True)(x))
    return keras3.Model(x, layers.Flatten()(y)), np.arange(28).reshape(4, 7).astype("int32") % 9


def attending():
    x = keras3.Input((5, 4))
    y = layers.MultiHeadAttention(2, 3)(x, x)
    y = layers.TimeDistributed(layers.Dense(3))(layers.Bidirectional(layers.GRU(4))(y)[:, None])
    return keras3.Model(x, y), rows(4, 5, 4)


MODELS = (
    *(
        nested,
        masked_blocks,
        attending,
        shared,
        several,
        of_a_dict,
        masked,
        frozen,
        half,
        operations,
        custom,
        subclassed,
    ),
)


def flat(outputs):
    return [np.asarray(one) for one in tf.nest.flatten(outputs)]


@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_a_model_computes_the_same_in_tf_keras_and_back(make):
    model, x = make()
    before = [np.array(weight) for weight in model.weights]
    made = admitted(model)
    assert isinstance(made, keras.Model)
    back = handed_back(made, origin_of(made))
    assert type(back) is type(model)
    tolerance = 5e-3 if make is half else 1e-5
    inputs = [x[key] for key in sorted(x)] if isinstance(x, dict) else x
    expected = flat(model(x, training=False))
    for a, b, c in zip(expected, flat(made(inputs)), flat(back(x)), strict=True):
        np.testing.assert_allclose(b, a, atol=tolerance)
        np.testing.assert_allclose(c, a, atol=tolerance)
    for a, b in zip(before, model.weights, strict=True):
        np.testing.assert_array_equal(a, b)
    assert not {id(weight) for weight in model.weights} & {id(weight) for weight in back.weights}
    held = [layer.trainable for layer in back.layers]
    assert held == [layer.trainable for layer in model.layers]


def test_custom_layers_of_layers_are_taken_apart_and_others_run_as_they_are():
    made = admitted(custom()[0])
    kinds = [type(layer) for layer in made.layers]
    assert kinds.count(keras.layers.Dense) == 2
    assert kinds.count(Keras3Part) == 1
    assert origin_of(made).notes == {"scale": "Scale is no class of Keras's own"}
    lines = []
    rls.describe_support(custom()[0], print_fn=lines.append)
    assert "scale: runs as it is in Keras 3, and is not compressed: Scale is no class of" in str(
        lines
    )


ACTIVATIONS = (
    "celu elu exponential gelu hard_sigmoid hard_tanh leaky_relu log_sigmoid log_softmax relu "
    "relu6 selu sigmoid silu softmax softplus softsign squareplus tanh tanh_shrink"
).split()


def test_activations_that_are_called_become_functions_of_tensorflow():
    x = keras3.Input((6,))
    settings = {"max_value": 6}, {"negative_slope": 0.1}, {"threshold": 0.5, "max_value": 2}
    outputs = [getattr(keras3.activations, name)(x) for name in ACTIVATIONS]
    outputs += [keras3.activations.relu(x, **one) for one in settings]
    model = keras3.Model(x, outputs)
    made = admitted(model)
    assert not origin_of(made).notes
    inputs = 4 * rows(8, 6)
    for a, b in zip(flat(model(inputs)), flat(made(inputs)), strict=True):
        np.testing.assert_allclose(b, a, atol=1e-5, rtol=1e-5)


def test_channels_are_followed_through_an_activation_that_is_called():
    x = keras3.Input((6,))
    y = keras3.activations.relu(layers.Dense(8, name="wide")(x))
    (group,) = rls.find_groups(keras3.Model(x, layers.Dense(2)(y)))[:1]
    assert (group.size, group.frozen) == (8, None)


@keras3.saving.register_keras_serializable("tests")
class CallsTensorFlowInside(Block):
    def call(self, x):
        return tf.nn.relu(super().call(x))


@keras3.saving.register_keras_serializable("tests")
class NoisyBlock(Block):
    def call(self, x, training=None):
        y = super().call(x)
        return y * 2.0 if training else y


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (CallsTensorFlowInside, "the call() of CallsTensorFlowInside cannot be followed"),
        (NoisyBlock, "the call() of NoisyBlock does something else in training"),
    ],
)
def test_blocks_whose_call_is_no_graph_run_as_they_are(kind, reason):
    x = keras3.Input((6,))
    model = keras3.Model(x, layers.Dense(2)(kind(6, name="block")(layers.Dense(6)(x))))
    made = admitted(model)
    assert reason in origin_of(made).notes["block"]
    back = handed_back(made, origin_of(made))
    for other in (made, back):
        for training in (False, True):
            expected = flat(model(rows(4, 6), training=training))[0]
            got = flat(other(rows(4, 6), training=training))[0]
            np.testing.assert_allclose(got, expected, atol=1e-5)
    plan = rls.baselines.lamp(model, sparsity=0.2)
    assert len(plan.kernels) == 2
    assert isinstance(rls.strip(rls.wrap(model, plan)), keras3.Model)


@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_a_model_is_handed_back_with_what_was_changed(make):
    model, x = make()
    made = admitted(model)
    # Not everything: half of what is normalized is the same.
    values = [value * (0.5 + 0.1 * (i % 3)) for i, value in enumerate(made.get_weights())]
    made.set_weights(values)
    back = handed_back(made, origin_of(made))
    inputs = [x[key] for key in sorted(x)] if isinstance(x, dict) else x
    first = flat(model(x, training=False))
    for a, b, c in zip(first, flat(back(x)), flat(made(inputs)), strict=True):
        np.testing.assert_allclose(b, c, atol=5e-3 if make is half else 1e-5)
        assert np.abs(a - b).max() > 1e-3


class Unregistered(Scale):
    pass


class UnregisteredBlock(NoisyBlock):
    pass


def test_parts_of_classes_that_nobody_registered_are_copied():
    x = keras3.Input((6,))
    y = UnregisteredBlock(6, name="block")(Unregistered(name="scale")(layers.Dense(6)(x)))
    model = keras3.Model(x, layers.Dense(2)(y))
    wrapped = rls.wrap(model, rls.baselines.lamp(model, sparsity=0.2))
    small = rls.strip(wrapped)
    assert type(small.get_layer("scale")) is Unregistered
    np.testing.assert_allclose(flat(small(rows(4, 6)))[0], flat(wrapped(rows(4, 6)))[0], atol=1e-5)


# ---------------------------------------------------------------------- compile state


def classifier(**compiled):
    model = keras3.Sequential(
        [layers.Input((6,)), layers.Dense(8, activation="relu"), layers.Dense(3, "softmax")]
    )
    if compiled:
        model.compile(**compiled)
    return model


def own_loss(y, predicted):
    return tf.reduce_mean(tf.square(predicted - tf.one_hot(tf.cast(y, tf.int32), 3)), -1)


COMPILED = {
    "names": {
        "optimizer": "adam",
        "loss": "sparse_categorical_crossentropy",
        "metrics": ["accuracy"],
    },
    "objects": {
        "optimizer": keras3.optimizers.SGD(0.1, momentum=0.9),
        "loss": keras3.losses.SparseCategoricalCrossentropy(ignore_class=2),
        "metrics": [keras3.metrics.SparseTopKCategoricalAccuracy(2, name="top2")],
    },
    "functions": {
        "optimizer": keras3.optimizers.Adam(keras3.optimizers.schedules.CosineDecay(0.1, 100)),
        "loss": own_loss,
        "metrics": [keras3.metrics.sparse_categorical_accuracy],
    },
    "lists": {
        "optimizer": "rmsprop",
        "loss": ["sparse_categorical_crossentropy"],
        "metrics": ["acc"],
        "loss_weights": [0.5],
    },
}


@pytest.mark.parametrize("kind", COMPILED)
def test_compiled_models_are_scored_the_same_and_come_back_compiled(kind):
    model = classifier(**COMPILED[kind])
    made = admitted(model)
    back = handed_back(made, origin_of(made))
    x, y = rows(32, 6), np.arange(32) % 3
    expected = list(model.evaluate(x, y, verbose=0))
    np.testing.assert_allclose(made.evaluate(x, y, verbose=0), expected, rtol=1e-5)
    np.testing.assert_allclose(back.evaluate(x, y, verbose=0), expected, rtol=1e-5)
    assert type(made.optimizer).__name__ == type(model.optimizer).__name__
    assert type(back.optimizer) is type(model.optimizer)
    assert back.optimizer is not model.optimizer
    for one in (made, back):
        rate = np.asarray(one.optimizer.learning_rate)
        np.testing.assert_allclose(rate, np.asarray(model.optimizer.learning_rate))


def test_losses_and_metrics_by_the_names_of_outputs_go_to_the_same_outputs():
    x = keras3.Input((6,))
    heads = [Block(6, name="head")(x), keras3.ops.softmax(layers.Dense(3)(x))]
    model = keras3.Model(x, heads)
    first, second = model.output_names
    losses = {first: "mse", second: "sparse_categorical_crossentropy"}
    model.compile("sgd", losses, metrics={second: ["accuracy"]}, loss_weights={first: 2, second: 3})
    made = admitted(model)
    assert made.output_names == [first, second]
    y = {first: rows(32, 6, seed=1), second: np.arange(32) % 3}
    expected = model.evaluate(rows(32, 6), y, verbose=0, return_dict=True)
    got = made.evaluate(rows(32, 6), y, verbose=0, return_dict=True)
    assert got["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    accuracy = f"{second}_accuracy"
    assert got[accuracy] == pytest.approx(expected[accuracy])
    assert handed_back(made, origin_of(made)).output_names == [first, second]


class TrainsItself(keras3.Model):
    def train_step(self, data):
        return super().train_step(data)


def test_a_train_step_of_ones_own_is_said_to_be_left_out(caplog):
    x = keras3.Input((6,))
    model = TrainsItself(x, layers.Dense(3, "softmax")(x))
    model.compile("sgd", "sparse_categorical_crossentropy")
    made = admitted(model)
    assert "The train_step() of TrainsItself is not used while its copies are" in caplog.text
    assert type(handed_back(made, origin_of(made))) is TrainsItself


def test_a_learning_rate_schedule_goes_on_in_tf_keras():
    made = admitted(classifier(**COMPILED["functions"]))
    schedule = made.optimizer._learning_rate
    assert isinstance(schedule, keras.optimizers.schedules.CosineDecay)


def test_an_uncompiled_model_stays_uncompiled():
    made = admitted(classifier())
    assert getattr(made, "optimizer", None) is None
    assert not handed_back(made, origin_of(made)).compiled


@pytest.mark.skipif(not hasattr(keras3.optimizers, "Lamb"), reason="this Keras has no Lamb")
def test_an_optimizer_without_counterpart_becomes_adam_with_a_warning(caplog):
    model = classifier(optimizer=keras3.optimizers.Lamb(3e-3), loss="mse")
    made = admitted(model)
    assert type(made.optimizer).__name__ == "Adam"
    assert float(made.optimizer.learning_rate) == pytest.approx(3e-3)
    assert "tf_keras has no optimizer Lamb" in caplog.text
    assert type(handed_back(made, origin_of(made)).optimizer) is keras3.optimizers.Lamb


def test_a_metric_without_counterpart_is_refused_by_name():
    metric = keras3.metrics.ConcordanceCorrelation(name="agreement")
    model = classifier(optimizer="adam", loss="mse", metrics=[metric])
    with pytest.raises(ModelError, match=r"the metric 'agreement' \(ConcordanceCorr.* Expected a"):
        admitted(model)


def test_training_a_converted_model_is_training_the_original():
    x = rows(256, 6)
    y = (x[:, 0] > 0).astype(int) + (x[:, 1] > 0)
    compiled = {"optimizer": keras3.optimizers.SGD(0.1), "loss": "sparse_categorical_crossentropy"}
    model = classifier(**compiled)
    made = admitted(model)
    losses = [
        one.fit(x, y, epochs=1, batch_size=16, shuffle=False, verbose=0).history["loss"][0]
        for one in (model, made)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    for a, b in zip(model.get_weights(), made.get_weights(), strict=True):
        np.testing.assert_allclose(b, a, atol=1e-4)


def test_dropout_drops_in_training_and_not_at_inference():
    x = keras3.Input((50,))
    made = admitted(keras3.Model(x, layers.Dropout(0.5)(x)))
    ones = np.ones((4, 50), "float32")
    np.testing.assert_array_equal(made(ones, training=False), ones)
    assert np.mean(np.asarray(made(ones, training=True)) == 0) > 0.2


# ---------------------------------------------------------------------- refusals


class CallsTensorFlow(keras3.Model):
    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(3)

    def call(self, x):
        return tf.nn.relu(self.dense(x))


def test_a_call_that_cannot_be_followed_is_refused():
    model = CallsTensorFlow()
    model(rows(2, 6))
    with pytest.raises(ModelError, match=r"call\(\) of CallsTensorFlow cannot be followed"):
        admitted(model)


class DoublesInTraining(Subclassed):
    def call(self, x, training=None):
        y = super().call(x)
        return y * 2.0 if training else y


def test_a_call_that_computes_something_else_in_training_is_refused():
    model = DoublesInTraining()
    model(rows(2, 6))
    with pytest.raises(ModelError, match="converted to tf_keras, computes something else"):
        admitted(model)


class DropsInTraining(Subclassed):
    def __init__(self, units=5, **kwargs):
        super().__init__(units, **kwargs)
        self.drop = layers.Dropout(0.5)

    def call(self, x, training=False):
        y = self.hidden(x)
        if training:
            y = self.drop(y, training=training)
        return self.last(y)


def test_a_layer_that_is_called_in_training_only_is_kept_for_it():
    model = DropsInTraining(50)
    x = rows(4, 6)
    expected = flat(model(x))[0]
    made = admitted(model)
    np.testing.assert_allclose(made(x, training=False), expected, atol=1e-5)
    assert np.abs(made(x, training=True) - expected).max() > 0.01
    assert type(handed_back(made, origin_of(made))) is DropsInTraining


def test_a_model_that_is_not_built_is_refused():
    with pytest.raises(ModelError, match=r"is not built: call it once on data"):
        admitted(keras3.Sequential([layers.Dense(3)]))


def test_a_quantized_model_is_refused_by_its_layer():
    model = classifier()
    model.quantize("int8")
    with pytest.raises(ModelError, match=r"cannot be taken: .*(quantized already|dtype policy)"):
        admitted(model)


def test_a_model_that_computes_something_else_is_refused():
    model = classifier()
    made = admitted(model)
    compare(made, [rows(8, 6)])
    made.set_weights([value * 1.01 for value in made.get_weights()])
    with pytest.raises(ModelError, match=r"to tf_keras, computes something else: its output"):
        compare(made, [rows(8, 6)])


def test_only_models_of_keras_3_are_converted():
    model = keras.Sequential([keras.layers.Input((3,)), keras.layers.Dense(2)])
    assert admitted(model) is model
    assert not is_keras_3_model(model)
    assert is_keras_3_model(classifier())
    assert admitted("text") == "text"
