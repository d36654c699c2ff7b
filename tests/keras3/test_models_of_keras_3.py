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


MODELS = (
    *(nested, shared, several, of_a_dict, masked, frozen, half, operations, custom, subclassed),
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


def test_a_loaded_model_is_handed_back_with_what_was_changed():
    model, x = nested()
    made = admitted(model)
    made.set_weights([value * 0.5 for value in made.get_weights()])
    back = handed_back(made, origin_of(made))
    np.testing.assert_allclose(flat(back(x))[0], flat(made(x))[0], atol=1e-6)
    assert np.abs(flat(back(x))[0] - flat(model(x))[0]).max() > 0.01


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
        "metrics": [["acc"]],
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
