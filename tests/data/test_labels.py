"""Labels, class weights and sample weights against the compiled loss and the model's outputs."""

import numpy as np
import pytest
import tensorflow as tf
import tf_keras as keras

import rl_sparsity_tf as rls
from rl_sparsity_tf.data.batches import evaluation_data, training_data
from rl_sparsity_tf.data.labels import loss_kind, model_outputs
from rl_sparsity_tf.data.weights import weight_table

ROWS, CLASSES, STEPS = 12, 4, 5
losses = keras.losses
layers = keras.layers


def x_of(rows=ROWS):
    return np.random.default_rng(0).normal(size=(rows, 3)).astype(np.float32)


def ids():
    return np.arange(ROWS) % CLASSES


def hot():
    return np.eye(CLASSES, dtype=np.float32)[ids()]


def network(units=CLASSES, loss="mse"):
    model = keras.Sequential([layers.Input((3,)), layers.Dense(units)])
    model.compile("sgd", loss)
    return model


def sequence(units=CLASSES, loss="sparse_categorical_crossentropy"):
    """A class for every step, of sequences of any length."""
    model = keras.Sequential([layers.Input((None, 3)), layers.Dense(units)])
    model.compile("sgd", loss)
    return model


def two_outputs(loss=None, as_dict=False):
    given = keras.Input((3,))
    kind = layers.Dense(CLASSES, name="kind")(given)
    size = layers.Dense(1, name="size")(given)
    outputs = {"kind": kind, "size": size} if as_dict else [kind, size]
    model = keras.Model(given, outputs)
    model.compile("sgd", loss or {"kind": "sparse_categorical_crossentropy", "size": "mse"})
    return model


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(CLASSES)

    def call(self, inputs):
        return {"kind": self.dense(inputs), "size": self.dense(inputs)[:, :1]}


def with_label(y, row, value):
    y = np.array(y)
    y[row] = value
    return y


# -- what loss takes what ------------------------------------------------------------------------


class Mine(losses.CategoricalCrossentropy):
    """A subclass may take anything."""


def mean_squared_error(y_true, y_pred):  # a namesake of Keras's
    return tf.reduce_mean(y_pred)


@pytest.mark.parametrize(
    ("loss", "name", "kind"),
    [
        ("sparse_categorical_crossentropy", "sparse_categorical_crossentropy", "sparse"),
        (losses.SparseCategoricalCrossentropy(), "sparse_categorical_crossentropy", "sparse"),
        (losses.categorical_crossentropy, "categorical_crossentropy", "categorical"),
        (losses.BinaryFocalCrossentropy(), "binary_focal_crossentropy", "binary"),
        ("bce", "binary_crossentropy", "binary"),
        ("mse", "mean_squared_error", "regression"),
        (losses.Huber(), "huber", "regression"),
        ("log_cosh", "log_cosh", "regression"),
        (mean_squared_error, "mean_squared_error", "custom"),
        (Mine(), "categorical_crossentropy", "custom"),
        (lambda y, p: p, "<lambda>", "custom"),
        (None, None, "none"),
    ],
)
def test_only_losses_of_keras_are_recognised(loss, name, kind):
    found = loss_kind(loss)
    assert (found[0], found[1]) == (name, kind) or (kind == "custom" and found[1] == kind)


def test_outputs_are_described_without_running_the_model():
    (only,) = model_outputs(sequence(), np.zeros((2, STEPS, 3), np.float32), "x")
    assert (only.shape, only.classes, only.words) == ((None, CLASSES), CLASSES, "")
    kind, size = model_outputs(two_outputs(as_dict=True), x_of(), "x")
    assert (kind.name, kind.kind, kind.classes) == ("kind", "sparse", CLASSES)
    assert (size.name, size.loss, size.shape) == ("size", "mean_squared_error", (1,))
    own = Subclassed()
    own(x_of())
    own.compile("sgd", "mae")
    assert [output.name for output in model_outputs(own, x_of(), "x")] == ["kind", "size"]
    # A stateful layer keeps the state it has.
    recurrent = keras.Sequential(
        [layers.Input(batch_shape=(ROWS, STEPS, 3)), layers.LSTM(2, stateful=True)]
    )
    recurrent.compile("sgd", "mse")
    evaluation_data((np.ones((ROWS, STEPS, 3)), np.ones((ROWS, 2))), recurrent, "x")
    assert all(float(tf.reduce_sum(state)) == 0 for state in recurrent.layers[0].states)


# -- labels that fit -----------------------------------------------------------------------------

IGNORING = losses.SparseCategoricalCrossentropy(ignore_class=-1)
STEP_IDS = np.arange(ROWS * STEPS).reshape(ROWS, STEPS) % CLASSES
STEP_X = np.zeros((ROWS, STEPS, 3), np.float32)
PADDED = np.concatenate([np.eye(CLASSES)[STEP_IDS][:, :-1], np.zeros((ROWS, 1, CLASSES))], axis=1)
FITTING = {
    "ids": (lambda: network(loss="sparse_categorical_crossentropy"), ids()),
    "ids in a column": (lambda: network(loss="sparse_categorical_crossentropy"), ids()[:, None]),
    "ids as floats": (lambda: network(loss="sparse_categorical_crossentropy"), ids() * 1.0),
    "ignored": (lambda: network(loss=IGNORING), with_label(ids(), 2, -1)),
    "one-hot": (lambda: network(loss="categorical_crossentropy"), hot()),
    "soft": (lambda: network(loss="categorical_crossentropy"), hot() * 0.8 + 0.05),
    "binary": (lambda: network(1, "binary_crossentropy"), ids() % 2),
    "binary column": (lambda: network(1, "binary_crossentropy"), (ids() % 2 == 0)[:, None]),
    "several labels": (lambda: network(loss="binary_crossentropy"), np.ones((ROWS, CLASSES))),
    "numbers": (lambda: network(1), x_of()[:, 0]),
    "vectors": (lambda: network(3, losses.Huber()), x_of()),
    "steps": (sequence, STEP_IDS),
    "steps in a column": (sequence, STEP_IDS[..., None]),
    "one-hot steps, some padded": (
        lambda: sequence(loss=losses.CategoricalCrossentropy(from_logits=True)),
        PADDED,
    ),
    "custom": (lambda: network(loss=lambda y, p: p), np.full((ROWS, 9), 77)),
    "two outputs": (two_outputs, {"kind": ids(), "size": x_of()[:, 0]}),
    "two outputs in a list": (two_outputs, [ids(), x_of()[:, :1]]),
    "two outputs as a dict": (
        lambda: two_outputs(as_dict=True),
        {"size": x_of()[:, 0], "kind": ids()},
    ),
    "one output named": (lambda: network(1), {"dense": x_of()[:, 0]}),
    "an output without a loss": (
        lambda: two_outputs({"kind": "sparse_categorical_crossentropy"}),
        {"kind": ids()},
    ),
}


def of_the_model(model):
    return STEP_X if len(model.input_shape) == 3 else x_of()


@pytest.mark.parametrize("case", FITTING)
def test_labels_that_fit_the_loss(case):
    make, y = FITTING[case]
    model = make()
    data = (of_the_model(model), y)
    batches = evaluation_data(data, model, "validation_data", batch_size=8)
    assert len(batches) == 2
    if not case.startswith(("custom", "one output named")):
        assert np.isfinite(float(model.test_step(batches[0])["loss"]))
    dataset = tf.data.Dataset.from_tensor_slices(
        (data[0], tuple(y) if isinstance(y, list) else y)
    ).batch(8)
    assert training_data(dataset, model).steps == 2


# -- labels that do not --------------------------------------------------------------------------

SPARSE, HOT, BCE = (
    "sparse_categorical_crossentropy",
    "categorical_crossentropy",
    "binary_crossentropy",
)
WRONG = {
    "class out of range": (
        lambda: network(loss=SPARSE),
        with_label(ids(), [5, 9], 12),
        r"has the label 12 in row 5 \(and wrong ones in 1 more rows\); the model's output has 4 "
        r"classes\. Expected integers from 0 to 3\.",
    ),
    "negative": (lambda: network(loss=SPARSE), with_label(ids(), 7, -1), r"label -1 in row 7;"),
    "fractions": (
        lambda: network(loss=SPARSE),
        with_label(ids() * 1.0, 3, 0.5),
        r"the label 0\.5 in row 3",
    ),
    "not ignored": (lambda: network(loss=IGNORING), with_label(ids(), 2, -2), r"label -2 in row"),
    "one-hot for sparse": (
        lambda: network(loss=SPARSE),
        hot(),
        r"shape \(4,\) per row; .*\(4,\) per row and its loss is sparse_cat.*"
        r"use the loss categorical_crossentropy, or y\.argmax\(-1\)",
    ),
    "rows for sparse": (lambda: network(loss=SPARSE), x_of(), r"Expected one integer per row\."),
    "ids for steps": (sequence, ids(), r"Expected integers of shape \(None,\) per row"),
    "one sigmoid": (
        lambda: network(1, SPARSE),
        ids() % 2,
        r"label 1 in row 1 .*has 1 class\. .*use the loss binary_crossentropy",
    ),
    "ids for categorical": (
        lambda: network(loss=HOT),
        ids(),
        r"use the loss sparse_categorical_crossentropy, or tf_keras\.utils\.to_categorical\(y\)",
    ),
    "width": (lambda: network(loss=HOT), x_of(), r"Expected one-hot rows of shape \(4,\)\."),
    "negative share": (
        lambda: network(loss=HOT),
        with_label(hot(), 4, [-1, 1, 1, 0]),
        r"label -1 in row 4\. Expected one-hot rows or probabilities, which are at least 0",
    ),
    "several labels for categorical": (
        lambda: network(loss=HOT),
        with_label(hot(), 6, [1, 1, 0, 0]),
        r"in row 6 that sum to 2; the loss is categorical_c.*sigmoid outputs and the loss binary",
    ),
    "no label for categorical": (
        lambda: network(loss=HOT),
        with_label(hot(), 1, 0),
        r"in row 1 that sum to 0",
    ),
    "signs for binary": (
        lambda: network(1, BCE),
        np.where(ids() % 2, 1, -1),
        r"label -1 in row 0 .*Expected values from 0 to 1: \(y \+ 1\) / 2; the loss is binary",
    ),
    "counted from 1": (lambda: network(1, BCE), ids() % 2 + 1, r"y - 1 for labels 1 and 2"),
    "pixels": (
        lambda: network(3, BCE),
        with_label(np.zeros((ROWS, 3), np.uint8), 8, 255),
        r"label 255 in row 8\. .*y / 255 for pixels",
    ),
    "ids for several labels": (
        lambda: network(loss=BCE),
        ids(),
        r"For one class per row use softmax outputs and the loss sparse_categorical_cross.*; for "
        r"several, one column of 0 and 1 per label",
    ),
    "two columns for one": (
        lambda: network(1, BCE),
        np.eye(2)[ids() % 2],
        r"Expected the label of the second class alone: y\[:, 1\]",
    ),
    "wrong columns": (
        lambda: network(loss=BCE),
        np.ones((ROWS, 3)),
        r"Expected labels of shape \(4,\) per row\.",
    ),
    "one number for many": (
        lambda: network(3),
        x_of()[:, 0],
        r"shape \(\) per row; .*one number per row would be compared with every output",
    ),
    "a column for many": (lambda: network(3, "mae"), x_of()[:, :1], r"shape \(1,\) per row; .*"),
    "many for one": (lambda: network(1, "huber"), x_of(), r"Expected labels of shape \(1,\)"),
    "one of two outputs": (
        two_outputs,
        {"kind": with_label(ids(), 5, 4), "size": x_of()[:, 0]},
        r"has the label 4 for the output 'kind' in row 5; ",
    ),
    "labels of no output": (
        two_outputs,
        {"kind": ids(), "sizes": x_of()[:, 0]},
        r"has labels for \['sizes'\]; the model's outputs are \['kind', 'size'\]\. Expected a dict",
    ),
    "names for one output": (
        network,
        {"a": hot(), "b": hot()},
        r"has labels for \['a', 'b'\]; the model's outputs are one, without a name\. Expected an a",
    ),
    "one array for two": (
        two_outputs,
        ids(),
        r"has one array of labels; the model has 2 outputs\. Expected a dict with the names "
        r"\['kind', 'size'\], or a list",
    ),
    "three for two": (
        two_outputs,
        [ids()] * 3,
        r"has 3 arrays of labels; the model has 2 outputs\. Expected one array per output",
    ),
    "two for one": (network, [hot()] * 2, r"2 arrays of labels; the model has 1 output\. .*np\.st"),
    "an output left out": (
        two_outputs,
        {"kind": ids()},
        r"has no labels for the output 'size', whose loss is mean_squared_error\. .*compile the",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_labels_that_do_not_fit_the_loss(case):
    make, y, message = WRONG[case]
    model = make()
    x = of_the_model(model)
    with pytest.raises(rls.DataError, match=f"^validation_data .*{message}"):
        evaluation_data((x, y), model, "validation_data")
    with pytest.raises(rls.DataError, match=f"^train .*{message}"):
        training_data((x, y), model)


@pytest.mark.parametrize("prepare", [training_data, evaluation_data])
def test_all_batches_of_a_dataset_are_checked_and_rows_counted_through(prepare):
    y = with_label(ids(), 11, 12)
    dataset = tf.data.Dataset.from_tensor_slices((x_of(), y)).batch(4)
    name = () if prepare is training_data else ("validation_data",)
    with pytest.raises(rls.DataError, match=r"has the label 12 in row 11; the model's"):
        prepare(dataset, network(loss=SPARSE), *name)


@pytest.mark.parametrize("text", [["cat"] * ROWS, np.array(["cat"] * ROWS, object)])
def test_labels_that_are_text(text):
    message = r"has labels that are text, such as .*'cat'.*np\.unique\(y, return_inverse=True\)"
    with pytest.raises(rls.DataError, match=message):
        training_data((x_of(), np.array(text)), network())
    dataset = tf.data.Dataset.from_tensor_slices((x_of(), [str(t) for t in text])).batch(4)
    with pytest.raises(rls.DataError, match=r"has labels that are text\. Expected numbers"):
        training_data(dataset, network())


def test_a_model_that_cannot_be_called_on_the_data():
    class Fixed(keras.Model):
        def call(self, inputs):
            if inputs.dtype == tf.float32:
                return inputs
            raise ValueError("only float32\nis known here")

    model = Fixed()
    model(x_of())
    model.compile("sgd", "mse")
    with pytest.raises(rls.DataError, match=r"cannot be called on the inputs of train: .+\. Expec"):
        training_data((np.ones((ROWS, 3), np.int64), x_of()), model)


# -- weights -------------------------------------------------------------------------------------

TABLE = [0.5, 1.0, 2.0, 4.0]
WEIGHTED = {
    "ids": (lambda: network(loss=SPARSE), ids(), np.array(TABLE)[ids()]),
    "column": (lambda: network(loss=SPARSE), ids()[:, None], np.array(TABLE)[ids()]),
    "one-hot": (lambda: network(loss=HOT), hot(), np.array(TABLE)[ids()]),
    "one-hot, binary loss": (lambda: network(loss=BCE), hot(), np.array(TABLE)[ids()]),
    "steps": (sequence, STEP_IDS, np.array(TABLE)[STEP_IDS]),
    "binary": (lambda: network(1, BCE), (ids() % 2)[:, None], np.array(TABLE)[ids() % 2]),
    "custom": (lambda: network(loss=lambda y, p: p), ids() * 1.0, np.array(TABLE)[ids()]),
    "ignored": (
        lambda: network(loss=IGNORING),
        with_label(ids(), 0, -1),
        with_label(np.array(TABLE)[ids()], 0, 1),
    ),
}


def by_row(batches):
    """Weights by the first number of a row's inputs."""
    return {
        float(row.numpy().flat[0]): weight.numpy()
        for x, _, weights in batches
        for row, weight in zip(x, weights, strict=True)
    }


@pytest.mark.slow
@pytest.mark.parametrize("form", ["arrays", "weighted arrays", "dataset", "weighted generator"])
@pytest.mark.parametrize("case", WEIGHTED)
def test_class_weights_become_sample_weights(case, form):
    make, y, expected = WEIGHTED[case]
    model = make()
    table = TABLE[:2] if case == "binary" else TABLE
    x = of_the_model(model)
    x = x + np.arange(ROWS, dtype=x.dtype).reshape(-1, *[1] * (x.ndim - 1))
    columns = (x, y)
    if form.startswith("weighted"):
        own = np.linspace(1, 2, ROWS).astype(np.float32)
        columns = (x, y, own)
        expected = expected * own.reshape(-1, *[1] * (expected.ndim - 1))
    data = columns
    if not form.endswith("arrays"):
        data = tf.data.Dataset.from_tensor_slices(columns).batch(4)
    if form.endswith("generator"):  # which does not know how many axes there are
        batches = [tuple(np.asarray(part) for part in batch) for batch in data]
        types = tuple(part.dtype for part in batches[0])
        data = tf.data.Dataset.from_generator(lambda: iter(batches), output_types=types)
    prepared = training_data(data, model, batch_size=4, class_weight=table)
    found = by_row(prepared.pool)
    assert len(found) == ROWS
    for row, value in zip(x, expected, strict=True):
        np.testing.assert_allclose(found[float(row.flat[0])], value, rtol=1e-6)
    trained = by_row(prepared.dataset)
    for key, value in found.items():
        np.testing.assert_allclose(trained[key], value, rtol=1e-6)


def test_weighted_training_is_what_fit_does_with_class_weight():
    weights = dict(enumerate(TABLE))
    ours, keras_own = network(loss=SPARSE), network(loss=SPARSE)
    keras_own.set_weights(ours.get_weights())
    data = training_data((x_of(), ids()), ours, batch_size=ROWS, class_weight=TABLE)
    ours.fit(data.dataset, epochs=2, verbose=0)
    keras_own.fit(x_of(), ids(), batch_size=ROWS, epochs=2, class_weight=weights, verbose=0)
    for one, other in zip(ours.get_weights(), keras_own.get_weights(), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (np.ones(4), r"is a ndarray\. Expected a dict .*dict\(enumerate\(weights\)\)"),
        ("balanced", r"class_weight='balanced' is a str\. Expected a dict with a number for every"),
        ({1: 1.0, 2: 2.0}, r"has the keys \[1, 2\]\. Expected the classes 0, 1, 2, \.\.\. without"),
        ({"cat": 1.0}, r"has the keys \['cat'\]"),
        ({}, r"has the keys \[\]"),
        ({0: 1.0, 1: -1.0}, r"class_weight\[1\]=-1\.0 cannot be used\. Expected a finite number"),
        ({0: float("nan")}, r"class_weight\[0\]=nan cannot be used"),
        ({0: "1"}, r"class_weight\[0\]='1' cannot be used"),
        ({0: 0, 1: 0.0}, r"is 0 for every class, so nothing would be learned"),
    ],
)
def test_wrong_class_weights(weights, message):
    with pytest.raises(rls.ArgumentError, match=message):
        weight_table(weights)


def test_class_weights_in_any_order():
    assert weight_table({np.int64(1): 2, 0: np.float32(0.5)}) == [0.5, 2.0]
    assert weight_table(None) is None


@pytest.mark.parametrize(
    ("make", "y", "message"),
    [
        (
            two_outputs,
            [ids(), x_of()[:, 0]],
            r"for a model with several outputs\. .*sample weights",
        ),
        (
            lambda: network(3, SPARSE),
            ids() % 3,
            r"has 4 classes; the model has 3\. Expected the ke",
        ),
        (lambda: network(1, BCE), ids() % 2, r"has 4 classes; the model has 2\. .*keys 0 to 1"),
        (lambda: network(1), x_of()[:, 0], r"the label .* in row 0, which class_weight has no"),
        (lambda: network(1), ids() + 1, r"the label 4 in row 3, .*Expected the classes 0 to 3"),
        (lambda: network(loss=BCE), hot() * 0 + 1, r"several labels, or none, in row 0, so class"),
    ],
)
def test_class_weights_that_do_not_fit_the_data(make, y, message):
    with pytest.raises((rls.ArgumentError, rls.DataError), match=message):
        training_data((x_of(), y), make(), class_weight=TABLE)


ONES = np.ones(ROWS, np.float32)
SAMPLE_WEIGHTS = {
    "negative": (network, hot(), with_label(ONES, 3, -2), r"sample weight -2 in row 3\. Expected"),
    "all zero": (network, hot(), ONES * 0, r"only sample weights of 0, so no row counts"),
    "per class": (
        network,
        hot(),
        np.ones((ROWS, CLASSES)),
        r"sample weights of shape \(4,\) per row\. Expected one number per row\. .*class_weight",
    ),
    "steps": (
        sequence,
        STEP_IDS,
        np.ones((ROWS, STEPS, 2)),
        r"shape \(5, 2\) per row\. Expected a number per row and step, \(None,\)",
    ),
    "one output's": (
        two_outputs,
        [ids(), x_of()[:, 0]],
        {"kind": ONES, "size": ONES * 0},
        r"only sample weights of 0 for the output 'size'",
    ),
    "of no output": (
        two_outputs,
        [ids(), x_of()[:, 0]],
        {"kinds": ONES},
        r"sample weights for \['kinds'\]; the model's outputs are",
    ),
}


@pytest.mark.parametrize("case", SAMPLE_WEIGHTS)
def test_wrong_sample_weights(case):
    make, y, weights, message = SAMPLE_WEIGHTS[case]
    model = make()
    with pytest.raises(rls.DataError, match=f"^train has .*{message}"):
        training_data((of_the_model(model), y, weights), model)


@pytest.mark.parametrize(
    ("make", "y", "weights"),
    [
        (network, hot(), ONES[:, None]),
        (sequence, STEP_IDS, ONES),
        (sequence, STEP_IDS, np.ones((ROWS, STEPS))),
        (two_outputs, [ids(), x_of()[:, 0]], ONES),
        (two_outputs, [ids(), x_of()[:, 0]], {"kind": ONES}),
    ],
)
def test_sample_weights_that_fit(make, y, weights):
    model = make()
    data = training_data((of_the_model(model), y, weights), model)
    assert np.isfinite(float(model.train_step(data.pool[0])["loss"]))
