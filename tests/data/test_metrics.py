"""Choosing the metric, and evaluating without retracing."""

import numpy as np
import pytest
import tensorflow as tf
import tf_keras as keras

import rl_sparsity_tf as rls
from rl_sparsity_tf.data.batches import evaluation_data
from rl_sparsity_tf.data.metrics import Evaluator, Metric, choose_metric, search_compile_arguments
from rl_sparsity_tf.layers.copying import compile_arguments

ROWS = 23
losses, metrics = keras.losses, keras.metrics


def x_of():
    return np.random.default_rng(0).normal(size=(ROWS, 4)).astype(np.float32)


def network(units=3, activation="softmax"):
    initializer = keras.initializers.GlorotUniform(seed=1)
    return keras.Sequential(
        [
            keras.layers.Input((4,)),
            keras.layers.Dense(units, activation, kernel_initializer=initializer),
        ]
    )


def sparse():
    return np.arange(ROWS) % 3


def one_hot():
    return np.eye(3, dtype=np.float32)[sparse()]


def binary():
    return (np.arange(ROWS) % 2).astype(np.float32)[:, None]


def regression():
    return np.random.default_rng(1).normal(size=(ROWS, 1)).astype(np.float32)


CASES = {
    "sparse probabilities": (3, "softmax", "sparse_categorical_crossentropy", sparse),
    "sparse logits": (3, None, losses.SparseCategoricalCrossentropy(from_logits=True), sparse),
    "one-hot probabilities": (3, "softmax", "categorical_crossentropy", one_hot),
    "one-hot logits": (3, None, losses.CategoricalCrossentropy(from_logits=True), one_hot),
    "binary probabilities": (1, "sigmoid", "binary_crossentropy", binary),
    "binary logits": (1, None, losses.BinaryCrossentropy(from_logits=True), binary),
}


def prepared(model, *data, batch_size=8):
    return evaluation_data(data, model, "validation_data", batch_size=batch_size)


@pytest.mark.parametrize("case", CASES)
def test_classifiers_without_a_metric_get_their_accuracy(case):
    units, activation, loss, labels = CASES[case]
    model = network(units, activation)
    model.compile("sgd", loss)
    arguments = search_compile_arguments(model, 0.01)
    assert not compile_arguments(model).get("metrics")  # the user's model stays as it is
    assert isinstance(arguments["optimizer"], keras.optimizers.Adam)
    copy = keras.models.clone_model(model)
    copy.set_weights(model.get_weights())
    copy.compile(**arguments)
    batches = prepared(copy, x_of(), labels())
    metric = choose_metric(copy, batches[0])
    assert metric == Metric("accuracy", higher_is_better=True)
    assert metric.is_accuracy
    outputs, y = model.predict(x_of(), verbose=0), labels()
    if units == 1:
        right = (outputs > (0.5 if activation else 0.0)) == (y > 0.5)
    else:
        right = outputs.argmax(-1) == sparse()
    assert Evaluator(copy, metric)(batches).metric == pytest.approx(right.mean(), abs=1e-6)


@pytest.mark.parametrize("loss", ["mse", "mae", losses.Huber(), "hinge"])
def test_regression_is_judged_by_its_loss_or_its_own_metric(loss):
    model = network(1, None)
    model.compile("sgd", loss)
    model.compile(**search_compile_arguments(model, 0.01))
    batch = prepared(model, x_of(), regression())[0]
    assert choose_metric(model, batch) == Metric("loss", higher_is_better=False)
    model.compile("sgd", loss, metrics=["mae", "mse"])
    model.compile(**search_compile_arguments(model, 0.01))
    metric = choose_metric(model, batch)
    assert metric == Metric("mae", higher_is_better=False)
    assert not metric.is_accuracy


@pytest.mark.parametrize(
    ("labels", "metric"),
    [
        (binary(), Metric("accuracy", True)),
        (np.full((ROWS, 1), 0.3, np.float32), Metric("loss", False)),
    ],
)
def test_shares_are_judged_by_the_loss_as_no_accuracy_counts_them(labels, metric):
    model = network(1, "sigmoid")
    model.compile("sgd", "binary_crossentropy")
    model.compile(**search_compile_arguments(model, 0.01))
    batch = prepared(model, x_of(), labels)[0]
    assert choose_metric(model, batch) == metric
    assert choose_metric(model, batch, "accuracy") == Metric("accuracy", True)


def two_outputs():
    inputs = keras.Input((4,))
    outputs = [
        keras.layers.Dense(3, "softmax", name="kind")(inputs),
        keras.layers.Dense(1, name="size")(inputs),
    ]
    return keras.Model(inputs, outputs)


def test_several_outputs():
    model = two_outputs()
    model.compile(
        "sgd",
        {"kind": "sparse_categorical_crossentropy", "size": "mse"},
        metrics={"kind": "accuracy", "size": "mae"},
    )
    model.compile(**search_compile_arguments(model, 0.01))
    batches = prepared(model, x_of(), {"kind": sparse(), "size": regression()})
    # One output's metric would let the search ruin the other: by default the loss of all counts.
    assert choose_metric(model, batches[0]) == Metric("loss", higher_is_better=False)
    assert choose_metric(model, batches[0], "kind_accuracy") == Metric("kind_accuracy", True)
    assert choose_metric(model, batches[0], "size_mae") == Metric("size_mae", False)
    with pytest.raises(rls.ArgumentError, match="Did you mean 'kind_accuracy'"):
        choose_metric(model, batches[0], "kind_acuracy")
    # Per-output losses are no metrics of their own: without metrics, the total loss counts.
    model.compile("sgd", ["sparse_categorical_crossentropy", "mse"])
    model.compile(**search_compile_arguments(model, 0.01))
    assert choose_metric(model, batches[0]) == Metric("loss", higher_is_better=False)


NAMES = {
    "top_k_categorical_accuracy": True,
    "val_auc": True,
    "precision_1": True,
    "recall": True,
    "mean_io_u": None,
    "binary_io_u": None,
    "f1_score": True,
    "cosine_similarity": True,
    "r2_score": True,
    "dice": True,
    "mean_absolute_error": False,
    "root_mean_squared_error": False,
    "mean_squared_logarithmic_error": False,
    "kullback_leibler_divergence": False,
    "binary_crossentropy": False,
    "hinge": False,
    "perplexity": False,
    "quality": None,
}


class Named(metrics.Mean):
    def update_state(self, y_true, y_pred, sample_weight=None):
        return super().update_state(tf.reduce_mean(y_pred))


@pytest.mark.parametrize("name", NAMES)
def test_directions_are_told_from_names_or_asked_for(name):
    model = network(1, None)
    model.compile("sgd", "mse", metrics=[Named(name=name)])
    batch = prepared(model, x_of(), regression())[0]
    assert choose_metric(model, batch, (name, "max")) == Metric(name, True)
    assert choose_metric(model, batch, (name, "min")) == Metric(name, False)
    if NAMES[name] is None:
        with pytest.raises(rls.ArgumentError, match=rf"Pass metric=\('{name}', 'max'\)"):
            choose_metric(model, batch)
    else:
        assert choose_metric(model, batch) == Metric(name, NAMES[name])


def test_wrong_metrics_and_labels():
    model = network()
    with pytest.raises(rls.ModelError, match="is not compiled with a loss"):
        search_compile_arguments(model, 0.01)
    model.compile("sgd", "sparse_categorical_crossentropy", metrics=["accuracy"])
    batch = prepared(model, x_of(), sparse())[0]
    with pytest.raises(rls.ArgumentError, match=r"no known direction\. Expected 'max' or 'min'"):
        choose_metric(model, batch, ("accuracy", "up"))
    with pytest.raises(rls.ArgumentError, match="'f1' is not among the model's metrics"):
        choose_metric(model, batch, "f1")
    assert choose_metric(model, batch, "loss") == Metric("loss", higher_is_better=False)
    wide = (tf.constant(x_of()), tf.zeros((ROWS, 5)), None)
    with pytest.raises(rls.DataError, match=r"cannot be computed.*Expected labels in the form"):
        choose_metric(model, wide)
    # What was tried on a batch leaves nothing behind in the metrics.
    model.reset_metrics()
    choose_metric(model, batch)
    assert all(float(variable) == 0 for metric in model.metrics for variable in metric.variables)


@pytest.mark.parametrize(
    ("case", "weighted", "name"),
    [
        ("sparse probabilities", False, "accuracy"),
        ("sparse probabilities", True, "mean_squared_error"),
        ("one-hot logits", True, "accuracy"),
        ("binary logits", False, "accuracy"),
    ],
)
def test_evaluator_equals_evaluate_with_a_ragged_last_batch(case, weighted, name):
    units, activation, loss, labels = CASES[case]
    model = network(units, activation)
    model.compile("sgd", loss, metrics=["accuracy"], weighted_metrics=[metrics.MeanSquaredError()])
    data = (x_of(), labels())
    if weighted:
        data = (*data, np.random.default_rng(2).uniform(0, 2, ROWS).astype(np.float32))
    batches = prepared(model, *data)
    assert len(batches[-1][0]) == 7
    score = Evaluator(model, Metric(name, True))(batches)
    weights = data[2] if weighted else None
    expected = model.evaluate(
        data[0], data[1], sample_weight=weights, batch_size=8, verbose=0, return_dict=True
    )
    assert score.metric == pytest.approx(expected[name], rel=1e-6)
    assert score.loss == pytest.approx(expected["loss"], rel=1e-6)


def test_evaluator_neither_retraces_nor_remembers():
    model = network()
    model.compile("sgd", "sparse_categorical_crossentropy", metrics=["accuracy"])
    batches = prepared(model, x_of(), sparse())
    evaluator = Evaluator(model, choose_metric(model, batches[0]))
    first = evaluator(batches)
    traces = evaluator.function.experimental_get_tracing_count()
    for _ in range(5):
        assert evaluator(batches) == first
    assert evaluator.function.experimental_get_tracing_count() == traces == 2  # two shapes
    model.layers[0].kernel.assign(-model.layers[0].kernel)
    assert evaluator(batches) != first  # the trace reads the variables, not their values


@pytest.mark.parametrize(
    ("higher", "value", "dense", "expected"),
    [
        (True, 0.45, 0.9, 0.5),
        (True, 0.95, 0.9, 1.0),
        (True, 0.0, 0.0, 1.0),
        (True, -0.5, 0.0, 0.0),
        (True, float("nan"), 0.9, 0.0),
        (True, -0.3, 0.9, 0.0),
        (False, 2.0, 1.0, 0.5),
        (False, 0.5, 1.0, 1.0),
        (False, 0.0, 1.0, 1.0),
        (False, float("inf"), 1.0, 0.0),
    ],
)
def test_retention(higher, value, dense, expected):
    assert Metric("figure", higher).retention(value, dense) == expected


def test_better_follows_the_direction():
    assert Metric("accuracy", True).better(0.9, 0.8)
    assert Metric("loss", False).better(0.8, 0.9)
    assert not Metric("loss", False).better(0.8, 0.8)
    assert Metric("loss", False).to_dict() == {"name": "loss", "higher_is_better": False}
    assert not Metric("accuracy_loss", False).is_accuracy
