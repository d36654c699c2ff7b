"""Searches, from the wrapped copy to the .tflite file, of models that are not tidy."""

import numpy as np
import pytest
import tensorflow as tf
import tf_keras as keras
from tiny_search import compressor, episodes_of, figures_of, quick_search, search

import rl_sparsity_tf as rls
from rl_sparsity_tf.layers.kernels import find_kernels, sparsity_of

L = keras.layers


def signals(rows, seed=0):
    """Three classes of sequences: which of three channels is loud."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 3, rows)
    x = rng.normal(size=(rows, 5, 3)).astype(np.float32)
    x[np.arange(rows), :, y] += 1.5
    return x, y


TRAIN, VALIDATION, TEST = signals(96), signals(60, 1), signals(40, 2)


@pytest.fixture(scope="module", autouse=True)
def _quick():
    with quick_search():
        yield


def classifier(model):
    model.compile(keras.optimizers.Adam(1e-2), "sparse_categorical_crossentropy", ["accuracy"])
    model.fit(*TRAIN, epochs=3, verbose=0)
    return model


def run(model, train=TRAIN, validation=VALIDATION, test=TEST, quantization="plan", **options):
    one = compressor(model, "random", recovery=rls.Recovery(method="finetune", steps=1), buckets=2)
    return search(
        one,
        train=train,
        validation_data=validation,
        test_data=test,
        episodes=1,
        quantization=quantization,
        **{"finetune_epochs": 1, **options},
    )


def sequences(*layers):
    return classifier(
        keras.Sequential([L.Input((5, 3)), *layers, L.Dense(3, activation="softmax")])
    )


class Encoder(keras.Model):
    """A subclassed model with layers in a list, and a nested one in an attribute."""

    def __init__(self, units=8):
        super().__init__()
        self.body = [L.Dense(units, activation="relu") for _ in range(2)]
        self.head = keras.Sequential([L.Flatten(), L.Dense(3, activation="softmax")])

    def call(self, x):
        for layer in self.body:
            x = layer(x)
        return self.head(x)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "batch_size"),
    [
        (lambda: sequences(L.SimpleRNN(6, dropout=0.2, recurrent_dropout=0.2)), 1),
        (lambda: sequences(L.TimeDistributed(L.Dense(4)), L.Flatten()), None),
        (lambda: classifier(Encoder()), None),
    ],
    ids=["recurrent", "time_distributed", "subclassed"],
)
def test_a_search_ends_with_a_verified_file(make, batch_size):
    model = make()
    before = model.get_weights()
    result = run(model)
    figures = result.metrics["compressed"]
    assert type(result.model) is type(model)
    assert figures["batch_size"] == batch_size
    assert figures["sparsity"] == pytest.approx(sparsity_of(result.model))
    assert 0.6 <= figures["sparsity"] < 0.7
    assert figures["tflite_metric"] == pytest.approx(figures["metric"], abs=0.03)
    assert list(result.plan.kernels) == [kernel.path for kernel in find_kernels(model)]
    for now, then in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(now, then)


@pytest.mark.slow
def test_an_unrolled_search_stores_the_kernels_of_an_lstm_as_integers(monkeypatch):
    model = sequences(L.LSTM(6))
    result = run(model, unroll=True, finetune_epochs=0)
    assert result.metrics["compressed"]["batch_size"] is None
    (layer,) = [layer for layer in result.model.layers if isinstance(layer, L.LSTM)]
    assert layer.unroll
    assert not model.layers[0].unroll
    for kernel in find_kernels(result.model):
        assert kernel.spec.exports_int8


@pytest.mark.slow
def test_unrolling_what_does_not_recur_is_refused_before_training():
    with pytest.raises(rls.ArgumentError, match="has no recurrent layer"):
        run(classifier(Encoder()), unroll=True)
    with pytest.raises(rls.ArgumentError, match="unroll='yes' cannot be used"):
        run(sequences(L.LSTM(6)), unroll="yes")


class TwoHeads(keras.Model):
    """Takes and returns dicts."""

    def __init__(self):
        super().__init__()
        self.body = L.Dense(8, activation="relu")
        self.digit = L.Dense(3, activation="softmax")
        self.level = L.Dense(1)

    def call(self, inputs):
        x = self.body(inputs["signal"])
        return {"digit": self.digit(x), "level": self.level(x)}


@pytest.mark.slow
def test_the_file_of_a_model_with_dicts_is_scored_by_all_its_outputs():
    def rows(data):
        x, y = data
        return {"signal": x[:, 0]}, {"digit": y, "level": y.astype(np.float32)[:, None]}

    model = TwoHeads()
    model.compile("adam", {"digit": "sparse_categorical_crossentropy", "level": "mse"})
    model.fit(*rows(TRAIN), epochs=2, verbose=0)
    result = run(model, rows(TRAIN), rows(VALIDATION), rows(TEST), quantization="none")
    assert result.metrics["metric"] == {"name": "loss", "higher_is_better": False}
    figures = result.metrics["compressed"]
    assert figures["tflite_metric"] == pytest.approx(figures["metric"], rel=1e-4)
    expected = result.model.evaluate(*rows(TEST), verbose=0)
    assert figures["metric"] == pytest.approx(np.ravel(expected)[0], rel=1e-4)


@pytest.mark.slow
def test_an_autoencoder_from_a_dataset_is_judged_by_its_loss():
    def pairs(data):
        x = data[0].reshape(len(data[0]), 15)
        return tf.data.Dataset.from_tensor_slices((x, x)).batch(20)

    model = keras.Sequential([L.Input((15,)), L.Dense(6, activation="relu"), L.Dense(15)])
    model.compile("adam", "mse")
    model.fit(pairs(TRAIN), epochs=2, verbose=0)
    result = run(model, pairs(TRAIN), pairs(VALIDATION), pairs(TEST))
    figures = result.metrics["compressed"]
    assert figures["accuracy"] is None
    assert figures["tflite_metric"] == pytest.approx(figures["metric"], rel=0.02)
    assert figures["metric"] < 10


@pytest.mark.slow
def test_mixed_precision_is_searched_as_it_is_and_exported_in_float32():
    kept = keras.mixed_precision.Policy("mixed_float16")
    model = sequences(L.Flatten(), L.Dense(8, activation="relu", dtype=kept))
    result = run(model)
    hidden = result.model.layers[-2]
    assert hidden.dtype_policy.name == kept.name
    figures = result.metrics["compressed"]
    assert figures["tflite_metric"] == pytest.approx(figures["metric"], abs=0.05)
    assert any("computes in float32" in note for note in result.report.notes)


@pytest.mark.slow
def test_the_recovery_of_a_recurrent_network_is_deterministic(tmp_path):
    model = sequences(L.SimpleRNN(6, dropout=0.5, recurrent_dropout=0.5))
    recovery = rls.Recovery(method="finetune", steps=1)
    data = {"train": TRAIN, "validation_data": VALIDATION, "episodes": 1}
    first, second = (
        episodes_of(
            compressor(model, "random", recovery=recovery, directory=tmp_path / name), **data
        )
        for name in ("first", "second")
    )
    assert figures_of(first) == figures_of(second)


class Silent(keras.Model):
    """A test_step of its own that does not say the loss."""

    def test_step(self, data):
        return {"score": tf.constant(1.0)}


def test_a_test_step_without_a_loss_is_refused():
    inputs = keras.Input((5, 3))
    outputs = L.Dense(3, activation="softmax")(L.Flatten()(inputs))
    model = Silent(inputs, outputs)
    model.compile("adam", "sparse_categorical_crossentropy")
    with pytest.raises(rls.ModelError, match=r"test_step of Silent returns \['score'\] and no"):
        run(model)
