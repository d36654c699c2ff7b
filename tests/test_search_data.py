"""Searches on the tasks and data forms that people have, and refusals of what cannot work."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
import tf_keras as keras
from tiny_search import (
    TRAIN,
    VALIDATION,
    compressor,
    quick_autoencoder,
    rows,
    search,
    trained,
    untrained,
)

import rl_sparsity_tf as rls
from rl_sparsity_tf.errors import ArgumentError, DataError, ModelError, TargetError

layers = keras.layers


@pytest.fixture(scope="module", autouse=True)
def _quick():
    with quick_autoencoder():
        yield


def network(outputs: int, activation: str | None, loss, metrics=None) -> keras.Model:
    keras.utils.set_random_seed(2)
    model = keras.Sequential(
        [layers.Input((6,)), layers.Dense(8, "relu"), layers.Dense(outputs, activation)]
    )
    model.compile("adam", loss, metrics=metrics)
    return model


def regression():
    x, _ = rows(64)
    y = x[:, :1] - 2 * x[:, 1:2]
    weights = np.linspace(0.5, 1.5, 64).astype(np.float32)
    return network(1, None, "mse"), (x, y, weights), (x[:32], y[:32])


def one_hot():
    x, y = rows(64)
    hot = np.eye(3, dtype=np.float32)[y]
    model = network(3, "softmax", "categorical_crossentropy", ["accuracy"])
    return model, (x, hot), (x[:32], hot[:32])


def logits_from_datasets():
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    train = tf.data.Dataset.from_tensor_slices(TRAIN).batch(32)
    validation = tf.data.Dataset.from_tensor_slices(VALIDATION).batch(16)
    return network(3, None, loss), train, validation


def binary_logits():
    x, y = rows(64)
    loss = keras.losses.BinaryCrossentropy(from_logits=True)
    y = (y == 0).astype(np.float32)[:, None]
    return network(1, None, loss), (x, y), (x[:32], y[:32])


def two_named_inputs():
    left, right = keras.Input((6,), name="left"), keras.Input((4,), name="right")
    joined = layers.Concatenate()([layers.Dense(5, "relu")(left), right])
    model = keras.Model([left, right], layers.Dense(3, "softmax")(joined))
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    x, y = rows(64)
    # The dict's order is not the model's.
    given = {"right": x[:, :4] * 2, "left": x}
    part = {name: value[:32] for name, value in given.items()}
    return model, (given, y), (part, y[:32])


TASKS = {
    "regression with sample weights": (regression, "loss", False),
    "one-hot labels": (one_hot, "accuracy", True),
    "logits from tf.data": (logits_from_datasets, "accuracy", True),
    "binary logits": (binary_logits, "accuracy", True),
    "two named inputs": (two_named_inputs, "accuracy", True),
}


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_every_kind_of_task_can_be_searched(task, capfd):
    make, metric, higher = TASKS[task]
    model, train, validation = make()
    one = compressor(model, "random", recovery=rls.Recovery(method="none"))
    result = search(
        one,
        train=train,
        validation_data=validation,
        test_data=validation,
        episodes=1,
        finetune_epochs=1,
    )
    metrics = result.metrics
    assert metrics["metric"] == {"name": metric, "higher_is_better": higher}
    compressed = metrics["compressed"]
    assert compressed["sparsity"] >= 0.6
    # Validation and test data are the same here, and the file follows the model.
    assert compressed["metric"] == pytest.approx(compressed["validation_metric"])
    assert compressed["tflite_metric"] == pytest.approx(compressed["metric"], abs=0.1)
    if metric == "accuracy":
        assert compressed["accuracy"] == compressed["metric"]
        assert 0.0 <= compressed["accuracy"] <= 1.0
    else:
        assert compressed["accuracy"] is compressed["validation_accuracy"] is None
        x, y = validation
        error = float(np.mean((result.model.predict(x, verbose=0) - y) ** 2))
        assert compressed["metric"] == pytest.approx(error, rel=1e-4)
    # verbose=0 is silent, on the terminal too.
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "rl_sparsity" not in captured.err


def test_a_function_replaces_the_reward():
    seen = []

    def closeness(outcome, previous):
        seen.append(previous is None)
        return -outcome.reconstruction_error

    one = compressor(trained(), "random", reward=closeness)
    result = search(one, episodes=2, finetune_epochs=0)
    errors = [entry["reconstruction_error"] for entry in result.history]
    assert [entry["reward"] for entry in result.history] == [-error for error in errors]
    assert result.candidate.episode == int(np.argmin(errors))
    assert seen.count(True) == 2


# -- refusals ------------------------------------------------------------------------------------


@pytest.fixture
def untouchable(monkeypatch):
    def trained_too_early(*_, **__):
        raise AssertionError("something was trained before the arguments were checked")

    model = trained()
    monkeypatch.setattr(keras.Model, "fit", trained_too_early)
    monkeypatch.setattr(keras.Model, "train_step", trained_too_early)
    return model


def uncompiled() -> keras.Model:
    return keras.models.clone_model(untrained())


class Subclassed(keras.Model):
    def call(self, inputs):
        return inputs


WRONG_MODELS = {
    "no model": (lambda: "model.keras", r"Received str from module .*Expected a tf_keras model"),
    "subclass": (Subclassed, r"is a subclass of tf_keras\.Model .*Expected a Sequential or func"),
    "unbuilt": (lambda: keras.Sequential([layers.Dense(3)]), r"is not built.*model\.build\("),
}


@pytest.mark.parametrize("case", WRONG_MODELS)
def test_wrong_models_are_refused(case):
    make, message = WRONG_MODELS[case]
    with pytest.raises(ModelError, match=message):
        rls.Compressor(make())


WRONG_OPTIONS = {
    "target": ({"target": 0.9}, r"target=0\.9 is a float\. Expected a Target, for example rls\.T"),
    "agent": ({"agent": "dqm"}, r"agent='dqm' is not known\. .*Did you mean 'dqn'\?"),
    "agent class": ({"agent": rls.PPO}, r"agent=PPO is a class; .*Write PPO\(\)"),
    "agent object": ({"agent": 3}, r"agent=3 is a int; expected 'dqn', 'ppo', 'random' or a"),
    "group": ({"group": "block5"}, r"group='block5' is not known\. Expected one of 'element'"),
    "seed": ({"seed": -1}, r"seed=-1 cannot be used\. Expected a whole number of at least 0"),
    "seed type": ({"seed": 1.5}, r"seed=1\.5 cannot be used"),
    "reward": ({"reward": "accuracy"}, r"reward='accuracy' cannot be called\. Expected rls\.Rew"),
    "recovery": ({"recovery": "none"}, r"recovery='none' is a str\. Expected a Recovery"),
    "buckets": ({"buckets": 0}, r"buckets=0 cannot be used\. Expected a whole number of at least"),
}


@pytest.mark.parametrize("case", WRONG_OPTIONS)
def test_wrong_options_of_the_compressor_are_refused(case):
    options, message = WRONG_OPTIONS[case]
    with pytest.raises(ArgumentError, match=message):
        rls.Compressor(trained(), **options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "least_square"}, r"Recovery\(method\)='least_square' is not known"),
        ({"steps": -1}, r"Recovery\(steps=-1\) cannot be used\. Expected an integer of at least"),
        ({"learning_rate": 0}, r"Recovery\(learning_rate=0\) cannot be used\. Expected a posit"),
    ],
)
def test_wrong_recoveries_are_refused(arguments, message):
    with pytest.raises(ArgumentError, match=message):
        rls.Recovery(**arguments)


X, Y = TRAIN
WRONG_SEARCHES = {
    "episodes": ({"episodes": 0}, r"episodes=0 cannot be used.*at least 1"),
    "episodes type": ({"episodes": True}, r"episodes=True cannot be used"),
    "batch_size": ({"batch_size": 0}, r"batch_size=0 cannot be used"),
    "validation_rows": ({"validation_rows": 0}, r"validation_rows=0 cannot be used"),
    "finetune_epochs": ({"finetune_epochs": -1}, r"finetune_epochs=-1 cannot be used"),
    "quantization": ({"quantization": "int4"}, r"quantization='int4' is not known\. Expected one"),
    "verbose": ({"verbose": 3}, r"verbose=3 is not known\. Expected 0, 1 or 2"),
    "no validation": ({"validation_data": None}, r"no validation_data.*Pass validation_data=\("),
    "no labels": ({"train": X}, r"train is a ndarray\. Expected \(x, y\)"),
    "rows": ({"train": (X, Y[:5])}, r"train has arrays of \[5, 96\] rows"),
    "empty": ({"train": (X[:0], Y[:0])}, r"train is empty"),
    "NaN": ({"train": (X * np.nan, Y)}, r"train holds 576 values that are NaN or infinite"),
    "shape": (
        {"validation_data": (X[:, :5], Y)},
        r"validation_data has inputs of shape \(5,\) per row; the model takes \(6,\)",
    ),
    "test data": ({"test_data": (X, None)}, r"test_data holds None in place of x or y"),
    "labels": (
        {"validation_data": (X, np.eye(3)[Y])},
        r"loss and metrics cannot be computed on the data: .*Expected labels in the form",
    ),
}


@pytest.mark.parametrize("case", WRONG_SEARCHES)
def test_wrong_arguments_of_search_are_refused_before_training(case, untouchable):
    arguments, message = WRONG_SEARCHES[case]
    with pytest.raises((ArgumentError, DataError), match=message):
        search(compressor(untouchable), **arguments)


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("f1", r"metric='f1' is not among the model's metrics\. Expected one of 'loss', 'acc"),
        (("accuracy", "up"), r"metric=\('accuracy', 'up'\) has no known direction"),
    ],
)
def test_wrong_metrics_are_refused_before_training(metric, message, untouchable):
    with pytest.raises(ArgumentError, match=message):
        search(compressor(untouchable, metric=metric))


def test_a_target_out_of_reach_names_the_best(untouchable, tmp_path):
    one = compressor(
        untouchable, target=rls.Target(sparsity=0.9), group="channel", directory=tmp_path / "run"
    )
    # Every kernel keeps a channel: 6 of 48 weights and 8 of 24.
    best = int((72 - 6 - 8) / 72 * 1e4) / 1e4
    with pytest.raises(TargetError, match=rf"Expected a sparsity of at most {best}\.") as caught:
        search(one)
    assert "needs 65 of 72 weights pruned, but only 58 can be" in str(caught.value)
    assert not (tmp_path / "run").exists()
    reachable = rls.Target(sparsity=best)
    assert rls.Compressor(untouchable, reachable, group="channel").target.sparsity == best


def test_a_model_without_a_loss_is_refused_before_training(untouchable):
    with pytest.raises(ModelError, match="compile"):
        search(compressor(uncompiled()))


def test_a_model_with_nothing_to_compress_is_refused(untouchable):
    model = keras.Sequential([layers.Input((6,)), layers.LayerNormalization()])
    model.compile("adam", "mse")
    with pytest.raises(ModelError, match=r"no layer that can be compressed.*describe_support"):
        search(compressor(model), train=(X, X), validation_data=(X, X))


@pytest.mark.parametrize("place", ["file", "nowhere/run"])
def test_an_impossible_directory_is_refused_before_training(place, tmp_path, untouchable):
    (tmp_path / "file").write_text("")
    with pytest.raises(ArgumentError, match=r"is a file\. Expected a folder|does not exist\. Cre"):
        search(compressor(untouchable, directory=tmp_path / place))


def test_plans_are_evaluated_on_a_sample_and_the_result_on_everything():
    one = compressor(trained(), agent="random", recovery=rls.Recovery(method="none"))
    result = search(one, episodes=1, finetune_epochs=0, validation_rows=7)
    assert one.last is not None
    assert sum(len(batch[1]) for batch in one.last.network.validation) == 7
    sevenths = result.history[0]["validation_metric"] * 7
    assert sevenths == pytest.approx(round(sevenths), abs=1e-4)
    whole = result.metrics["compressed"]["validation_metric"]
    scored = result.model.evaluate(*VALIDATION, verbose=0)[1]
    assert whole == pytest.approx(scored, abs=1e-6)
