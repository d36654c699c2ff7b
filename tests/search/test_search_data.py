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
    episodes_of,
    quick_search,
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
    with quick_search():
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


def binary_logits():
    x, y = rows(64)
    loss = keras.losses.BinaryCrossentropy(from_logits=True)
    y = (y == 0).astype(np.float32)[:, None]
    return network(1, None, loss), (x, y), (x[:32], y[:32])


def several_numbers():
    x, _ = rows(64)
    return network(2, None, "huber", ["mae"]), (x, x[:, :2]), (x[:32], x[:32, :2])


def several_labels():
    x, _ = rows(64)
    y = (x[:, :3] > 0).astype(np.float32)
    model = network(3, "sigmoid", "binary_crossentropy", ["binary_accuracy"])
    return model, (x, y), (x[:32], y[:32])


def sequence_labels():
    x, _ = rows(64)
    x = x.reshape(64, 3, 2)
    y = (x[..., 0] > x[..., 1]).astype(np.int64)
    model = keras.Sequential(
        [layers.Input((3, 2)), layers.Dense(8, "relu"), layers.Dense(2, "softmax")]
    )
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model, (x, y), (x[:32], y[:32])


def named_inputs_and_outputs():
    left, right = keras.Input((6,), name="left"), keras.Input((4,), name="right")
    joined = layers.Concatenate()([layers.Dense(5, "relu")(left), right])
    outputs = [
        layers.Dense(3, "softmax", name="kind")(joined),
        layers.Dense(1, name="size")(joined),
    ]
    model = keras.Model([left, right], outputs)
    model.compile(
        "adam",
        {"kind": "sparse_categorical_crossentropy", "size": "mse"},
        metrics={"kind": "accuracy"},
    )
    x, y = rows(64)
    given = {"right": x[:, :4] * 2, "left": x}
    labels = {"size": x[:, 0], "kind": y}
    data = tf.data.Dataset.from_tensor_slices((given, labels))
    return model, data.batch(16), data.take(32).batch(8)


def generators():
    def batches(count):
        x, y = rows(64)
        return lambda: ((x[i : i + 16], y[i : i + 16]) for i in range(0, count, 16))

    signature = (tf.TensorSpec((None, 6), tf.float32), tf.TensorSpec((None,), tf.int64))
    train, validation = (
        tf.data.Dataset.from_generator(batches(count), output_signature=signature)
        for count in (64, 32)
    )
    return network(3, "softmax", "sparse_categorical_crossentropy"), train, validation


def fixed_batches():
    x, y = rows(64)
    model = keras.Sequential(
        [
            layers.Input(batch_shape=(8, 6)),
            layers.Dense(8, "relu"),
            layers.Dense(3, "softmax"),
        ]
    )
    model.compile("adam", "sparse_categorical_crossentropy")
    return model, (x[:60], y[:60]), (x[:32], y[:32])


TASKS = {
    "regression with sample weights": (regression, "loss", False),
    "one-hot labels": (one_hot, "accuracy", True),
    "binary logits": (binary_logits, "accuracy", True),
    "several numbers": (several_numbers, "mae", False),
    "several labels": (several_labels, "binary_accuracy", True),
    "labels of steps": (sequence_labels, "accuracy", True),
    "named inputs and outputs": (named_inputs_and_outputs, "loss", False),
    "datasets of unknown size": (generators, "accuracy", True),
    "a fixed batch size": (fixed_batches, "accuracy", True),
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
    if metric.endswith("accuracy"):
        assert compressed["accuracy"] == compressed["metric"]
        assert 0.0 <= compressed["accuracy"] <= 1.0
    else:
        assert compressed["accuracy"] is compressed["validation_accuracy"] is None
        columns = validation if isinstance(validation, tuple) else (validation,)
        figures = result.model.evaluate(*columns, verbose=0, return_dict=True)
        assert compressed["metric"] == pytest.approx(figures[metric], rel=1e-4)
    # verbose=0 is silent, on the terminal too.
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "rl_sparsity" not in captured.err


@pytest.mark.slow
def test_class_weights_reach_recovery_and_fine_tuning_but_no_score(monkeypatch):
    seen = []
    model, plain_fit = trained(), keras.Model.fit

    def fit(self, x=None, *args, **options):
        if isinstance(x, tf.data.Dataset):
            seen.extend((y.numpy(), weights.numpy()) for _, y, weights in x)
        return plain_fit(self, x, *args, **options)

    monkeypatch.setattr(keras.Model, "fit", fit)
    table = {0: 1.0, 1: 0.0, 2: 3.0}
    one = compressor(model, "random")
    search(one, episodes=1, finetune_epochs=1, class_weight=table)
    assert one.last is not None
    data = one.last.figures.train
    pool = [(y.numpy(), weights.numpy()) for _, y, weights in data.pool]
    assert len(pool) == 3
    assert seen
    for y, weights in (*pool, *seen):
        np.testing.assert_array_equal(weights, [table[label] for label in y])
    assert all(weights is None for _, _, weights in one.last.figures.validation)


@pytest.mark.slow
def test_a_run_continues_only_with_the_same_class_weights(tmp_path):
    options = {"directory": tmp_path / "run", "recovery": rls.Recovery(method="none")}
    weights = {0: 1.0, 1: 2.0, 2: 3.0}
    first = episodes_of(
        compressor(trained(), "random", **options), episodes=1, class_weight=weights
    )
    with pytest.raises(FileExistsError, match=r"differs in class_weight \(\[1"):
        search(compressor(trained(), "random", **options), episodes=1)
    again = {2: 3, 1: 2, 0: 1}  # the same in another order
    journal = episodes_of(
        compressor(trained(), "random", **options), episodes=1, class_weight=again
    )
    assert journal == first


@pytest.mark.slow
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
    "subclass": (Subclassed, r"is not built: .*Call it once on data, call model"),
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
    "recovery": ({"recovery": "nothing"}, r"Recovery\(method\)='nothing' is not known\. Expected"),
    "buckets": ({"buckets": 0}, r"buckets=0 cannot be used\. Expected a whole number of at least"),
}


@pytest.mark.slow
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
        r"validation_data has labels of shape \(3,\) per row; .*categorical_crossentropy, or y\.",
    ),
    "all labels": (
        {"train": (X, np.append(Y[:-1], 3))},
        r"train has the label 3 in row 95; the model's output has 3 classes\. Expected integers fr",
    ),
    "class_weight": ({"class_weight": {0: 1, 2: 2}}, r"class_weight has the keys \[0, 2\]\. Expec"),
    "classes": ({"class_weight": {0: 1, 1: 2}}, r"class_weight has 2 classes; the model has 3"),
    "share": ({"validation_data": 0.2}, r"validation_data is the number 0\.2; .*split the rows"),
    "no validation labels": ({"validation_data": X}, r"validation_data is a ndarray\. Expected"),
    "swapped": ({"train": (Y, X)}, r"x and y look swapped"),
    "sample weights": ({"train": (X, Y, 0.0 * Y)}, r"only sample weights of 0, so no row counts"),
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
    # One channel is left between the layers: 6 weights that make it and 3 that read it, of 72.
    with pytest.raises(TargetError, match=r"pays, 0\.125 of the dense network's cost is left"):
        search(one)
    assert not (tmp_path / "run").exists()


def test_a_sparsity_out_of_reach_names_the_best(untouchable, tmp_path):
    one = compressor(
        untouchable, target=rls.Target(sparsity=0.99), group="block4", directory=tmp_path / "run"
    )
    # Every kernel keeps a block of 4 weights.
    best = int((72 - 4 - 4) / 72 * 1e4) / 1e4
    with pytest.raises(TargetError, match=rf"Expected a sparsity of at most {best}\.") as caught:
        search(one)
    assert "needs 72 of 72 weights pruned, but only 64 can be" in str(caught.value)
    assert not (tmp_path / "run").exists()
    reachable = rls.Target(sparsity=best)
    assert rls.Compressor(untouchable, reachable, group="block4").target.sparsity == best


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


@pytest.mark.slow
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
