"""Training and validation data in every form that fit takes, and every way to get it wrong."""

import numpy as np
import pytest
import tensorflow as tf
import tf_keras as keras

import rl_sparsity_tf as rls
from rl_sparsity_tf.data import batches as data_module
from rl_sparsity_tf.data.batches import evaluation_data, inputs_of, sample_rows, training_data

ROWS = 22


@pytest.fixture(scope="module")
def model():
    return keras.Sequential([keras.layers.Input((3,)), keras.layers.Dense(2)])


@pytest.fixture(scope="module")
def two_inputs():
    inputs = [keras.Input((3,), name="left"), keras.Input((2, 2), name="right")]
    flat = [inputs[0], keras.layers.Flatten()(inputs[1])]
    return keras.Model(inputs, keras.layers.Dense(2)(keras.layers.Concatenate()(flat)))


def x_of(rows=ROWS):
    return np.arange(rows * 3, dtype=np.float32).reshape(rows, 3)


def y_of(rows=ROWS):
    return np.arange(rows) % 2


class Batches(keras.utils.Sequence):
    """Three batches, the last one shorter."""

    def __init__(self, weights=False, length=3, only_x=False, raises=-1, narrow=-1, weighted=-1):
        super().__init__()
        self.weights, self.length, self.only_x = weights, length, only_x
        self.raises, self.narrow, self.weighted = raises, narrow, weighted

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        rows = slice(index * 8, min(ROWS, index * 8 + 8))
        batch = (x_of()[rows], y_of()[rows])
        if index == self.raises:
            raise OSError("gone")
        if self.only_x:
            return batch[0]
        if index == self.narrow:
            return batch[0][:, :2], batch[1]
        weighted = self.weights or index == self.weighted
        return (*batch, np.ones(ROWS)[rows]) if weighted else batch


FORMS = {
    "arrays": lambda: (x_of(), y_of()),
    "weights": lambda: (x_of(), y_of(), np.linspace(0, 1, ROWS)),
    "no weights": lambda: (x_of(), y_of(), None),
    "lists": lambda: (x_of().tolist(), y_of().tolist()),
    "float64": lambda: (x_of().astype(np.float64), y_of()),
    "tensors": lambda: (tf.constant(x_of()), tf.constant(y_of())),
    "dataset": lambda: tf.data.Dataset.from_tensor_slices((x_of(), y_of())).batch(8),
    "weighted dataset": lambda: tf.data.Dataset.from_tensor_slices(
        (x_of(), y_of(), np.ones(ROWS, np.float32))
    ).batch(8),
    "Sequence": lambda: Batches(),
    "weighted Sequence": lambda: Batches(weights=True),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_all_rows_in_order_for_evaluation(model, form):
    batches = evaluation_data(FORMS[form](), model, "validation_data", batch_size=8)
    assert [len(x) for x, _, _ in batches] == [8, 8, 6]
    np.testing.assert_array_equal(inputs_of(batches), x_of())
    np.testing.assert_array_equal(np.concatenate([y for _, y, _ in batches]), y_of())
    weighted = form.startswith("weight")
    assert all((weights is not None) == weighted for _, _, weights in batches)
    if form == "weights":
        together = np.concatenate([weights for _, _, weights in batches])
        np.testing.assert_allclose(together, np.linspace(0, 1, ROWS), rtol=1e-6)
    for x, _, weights in batches:
        assert x.dtype == tf.float32
        if weights is not None:
            assert weights.dtype == tf.float32


@pytest.mark.parametrize("form", FORMS)
def test_every_form_trains(model, form):
    data = training_data(FORMS[form](), model, batch_size=8)
    assert data.steps == 3
    assert {len(x) for x, _, _ in data.pool} == {8}
    assert data.batch(0) is data.batch(len(data.pool))
    rows = np.concatenate([batch[0] for batch in data.dataset])
    np.testing.assert_array_equal(rows[np.argsort(rows[:, 0])], x_of())
    for x, y, _ in data.pool:  # labels stay with their rows
        np.testing.assert_array_equal(y, (x.numpy()[:, 0] / 3).astype(int) % 2)


def test_training_rows_are_shuffled_by_the_seed(model):
    def pools(seed):
        data = training_data((x_of(), y_of()), model, batch_size=4, seed=seed)
        return np.concatenate([x for x, _, _ in data.pool])

    np.testing.assert_array_equal(pools(1), pools(1))
    assert (pools(1) != pools(2)).any()
    assert len(pools(1)) == 20  # equally shaped: the ragged rest is left out
    few = training_data((x_of(), y_of()), model, batch_size=4, pool_size=2)
    assert len(few.pool) == 2
    assert few.steps == 6


def test_epochs_are_reshuffled_and_complete(model):
    data = training_data((x_of(), y_of()), model, batch_size=8)
    dataset = data.dataset
    epochs = [np.concatenate([batch[0] for batch in dataset]) for _ in range(2)]
    assert (epochs[0] != epochs[1]).any()
    np.testing.assert_array_equal(*[epoch[np.argsort(epoch[:, 0])] for epoch in epochs])


def test_fewer_rows_than_a_batch(model):
    data = training_data((x_of(3), y_of(3)), model, batch_size=128)
    assert [len(x) for x, _, _ in data.pool] == [3]
    assert data.steps == 1


def test_endless_and_unknown_datasets(model):
    rows = tf.data.Dataset.from_tensor_slices((x_of(), y_of()))
    endless = training_data(rows.repeat().batch(8), model, pool_size=5)
    assert (endless.steps, len(endless.pool), len(list(endless.dataset))) == (5, 5, 5)
    unknown = training_data(rows.filter(lambda x, y: y == 0).batch(4), model)
    assert unknown.steps == 3
    assert [len(x) for x, _, _ in unknown.pool] == [4, 4]
    # Its size is known from now on, so that fit can tell how far it is.
    assert int(unknown.dataset.cardinality()) == len(list(unknown.dataset)) == 3


def generated(*columns, batch=8, signature=True):
    """A dataset of unknown size, and how many batches were asked of it so far."""
    asked = []

    def batches():
        for start in range(0, len(columns[0]), batch):
            asked.append(start)
            yield tuple(column[start : start + batch] for column in columns)

    types = [
        tf.TensorSpec((None,) * column.ndim if signature else None, column.dtype)
        for column in columns
    ]
    return tf.data.Dataset.from_generator(batches, output_signature=tuple(types)), asked


@pytest.mark.parametrize("signature", [True, False])
def test_generators_are_read_once_and_counted(model, signature):
    data, asked = generated(x_of(), y_of(), batch=2, signature=signature)
    prepared = training_data(data, model)
    assert prepared.steps == 11
    # Its end was seen once; after that its beginning, to see that it begins anew.
    assert asked[:12] == [*range(0, ROWS, 2), 0]
    assert asked.count(ROWS - 2) == 1
    rows = np.concatenate([x for x, _, _ in evaluation_data(data, model, "validation_data")])
    np.testing.assert_array_equal(rows, x_of())


def test_known_sizes_are_read_once(model):
    data, asked = generated(x_of(), y_of())
    known = data.apply(tf.data.experimental.assert_cardinality(3))
    assert training_data(known, model, pool_size=1).steps == 3
    assert asked == [0, 8, 16]


def test_unknown_datasets_that_go_on_count_as_endless(model, monkeypatch):
    monkeypatch.setattr(data_module, "ENDLESS_BATCHES", 7)

    def batches():
        while True:
            yield x_of(4), y_of(4)

    signature = (tf.TensorSpec((None, 3), tf.float32), tf.TensorSpec((None,), tf.int64))
    data = tf.data.Dataset.from_generator(batches, output_signature=signature)
    endless = training_data(data, model, pool_size=5)
    assert (endless.steps, len(endless.pool), len(list(endless.dataset))) == (5, 5, 5)
    message = (
        r"unknown size that has not ended after 7 batches\. .*\.take\(batches\), or give its size"
    )
    with pytest.raises(rls.DataError, match=message):
        evaluation_data(data, model, "validation_data")
    assert len(evaluation_data(data.take(6), model, "validation_data")) == 6
    sized = data.take(8).apply(tf.data.experimental.assert_cardinality(8))
    assert len(evaluation_data(sized, model, "validation_data")) == 8


def test_large_unknown_datasets_are_not_kept_for_ever(model, monkeypatch):
    monkeypatch.setattr(data_module, "_ENDLESS_BYTES", 200)
    data, _ = generated(x_of(), y_of())
    with pytest.raises(rls.DataError, match="has not ended after 2 batches"):
        evaluation_data(data, model, "test_data")
    assert training_data(data, model).steps == 3


def test_datasets_that_can_be_read_only_once(model):
    once = iter([(x_of(), y_of())])
    signature = (tf.TensorSpec((None, 3), tf.float32), tf.TensorSpec((None,), tf.int64))
    data = tf.data.Dataset.from_generator(lambda: once, output_signature=signature)
    with pytest.raises(rls.DataError, match=r"read only once: the second time it is empty\. Expec"):
        training_data(data, model)


def test_padded_batches_of_several_lengths():
    model = keras.Sequential([keras.layers.Input((None, 3)), keras.layers.GlobalMaxPool1D()])

    def batches():
        for length in (4, 6, 6, 5):
            yield np.ones((2, length, 3), np.float32), np.zeros(2, np.int64)

    signature = (tf.TensorSpec((None, None, 3), tf.float32), tf.TensorSpec((None,), tf.int64))
    data = tf.data.Dataset.from_generator(batches, output_signature=signature)
    prepared = training_data(data, model)
    assert prepared.steps == len(list(prepared.dataset)) == 4
    assert [x.shape[1] for x, _, _ in prepared.pool] == [6, 6]  # the most frequent length
    with pytest.raises(
        rls.DataError, match=r"shapes .*4, 3.* in batch 0 .*6, 3.* in batch 1\. .*pad"
    ):
        evaluation_data(data, model, "validation_data")


@pytest.fixture(scope="module")
def fixed():
    return keras.Sequential([keras.layers.Input(batch_shape=(4, 3)), keras.layers.Dense(2)])


FIXED_FORMS = {
    "arrays": lambda rows: (x_of(rows), y_of(rows)),
    "fitting batches": lambda rows: dataset(x_of(rows), y_of(rows), batch=4),
    "other batches": lambda rows: dataset(x_of(rows), y_of(rows), batch=5),
    "generator": lambda rows: generated(x_of(rows), y_of(rows), batch=5)[0],
    "endless": lambda rows: dataset(x_of(rows), y_of(rows), batch=5).repeat(),
}


@pytest.mark.parametrize("form", FIXED_FORMS)
def test_models_that_fix_the_rows_per_call(fixed, form):
    data = training_data(FIXED_FORMS[form](22), fixed, pool_size=3)
    assert {len(x) for x, _, _ in data.pool} == {len(x) for x, _ in data.dataset} == {4}
    assert data.steps == len(list(data.dataset)) == (3 if form == "endless" else 5)
    if form == "endless":
        return
    batches = evaluation_data(FIXED_FORMS[form](20), fixed, "validation_data")
    assert [len(x) for x, _, _ in batches] == [4] * 5
    np.testing.assert_array_equal(inputs_of(batches), x_of(20))
    assert [len(x) for x, _, _ in sample_rows(batches, 10, fixed=4)] == [4, 4]
    assert [len(x) for x, _, _ in sample_rows(batches, 1, fixed=4)] == [4]
    message = r"has 22 rows; the model takes exactly 4 per call\. .*multiple of 4: leave out 2 rows"
    with pytest.raises(rls.DataError, match=message):
        evaluation_data(FIXED_FORMS[form](22), fixed, "validation_data")
    with pytest.raises(rls.DataError, match=r"exactly 4 per call|at least 4 rows, which the model"):
        training_data(FIXED_FORMS[form](3), fixed)


def test_subclassed_models(two_inputs):
    class Subclassed(keras.Model):
        def call(self, inputs):
            return inputs["left"] + inputs["right"]

    own = Subclassed()
    data = ({"left": x_of(), "right": x_of()}, y_of())
    with pytest.raises(rls.ModelError, match=r"is not built: its input shape is unknown\. Call it"):
        training_data(data, own)
    own(data[0])
    assert training_data(data, own, batch_size=8).steps == 3
    assert len(evaluation_data(data, own, "validation_data", batch_size=8)) == 3
    with pytest.raises(rls.DataError, match=r"lacks the inputs \['right'\]. Expected a dict with"):
        training_data(({"left": x_of()}, y_of()), own)
    with pytest.raises(
        rls.DataError, match=r"has 1 inputs; the model takes 2: \['left', 'right'\]"
    ):
        training_data((x_of(), y_of()), own)


class Frame:
    """Looks like a pandas DataFrame: no array, but gives one."""

    def __init__(self, array):
        self.array = array

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self.array, dtype)


def test_whatever_numpy_can_read(model):
    batches = evaluation_data((Frame(x_of()), Frame(y_of())), model, "validation_data")
    np.testing.assert_array_equal(inputs_of(batches), x_of())


def test_a_sequence_keeps_its_batch_size(model):
    assert [len(x) for x, _, _ in training_data(Batches(), model).pool] == [8, 8]


@pytest.mark.parametrize("prepare", [training_data, evaluation_data])
def test_several_inputs_as_dict_list_or_dataset(two_inputs, prepare):
    left, right = x_of(), np.ones((ROWS, 2, 2), np.float32)
    name = () if prepare is training_data else ("validation_data",)
    named = {"left": left, "right": right}
    forms = [
        (named, y_of()),
        ([left, right], y_of()),
        ((left, right), y_of()),
        tf.data.Dataset.from_tensor_slices((named, y_of())).batch(8),
        tf.data.Dataset.from_tensor_slices(((left, right), y_of())).batch(8),
    ]
    for data in forms:
        prepared = prepare(data, two_inputs, *name, batch_size=8)
        batch = prepared.pool[0] if prepare is training_data else prepared[0]
        assert two_inputs(batch[0]).shape == (8, 2)
    together = inputs_of(evaluation_data((named, y_of()), two_inputs, "x", batch_size=8))
    np.testing.assert_array_equal(together["left"], left)


def test_several_outputs(model):
    y = {"a": y_of(), "b": x_of()}
    batches = evaluation_data((x_of(), y), model, "validation_data", batch_size=8)
    assert batches[0][1]["b"].shape == (8, 3)


def test_integer_inputs_stay_integers(model):
    images = np.ones((ROWS, 3), np.uint8)
    assert evaluation_data((images, y_of()), model, "x")[0][0].dtype == tf.uint8


# ---------------------------------------------------------------------------- errors


def broken(row, value=np.nan):
    x = x_of()
    x[row, 1] = value
    return x


def dataset(*columns, batch=8):
    return tf.data.Dataset.from_tensor_slices(columns).batch(batch)


def generator_function():
    yield x_of(), y_of()


def raising(error):
    def batches():
        yield x_of(), y_of()
        raise error

    signature = (tf.TensorSpec((None, 3), tf.float32), tf.TensorSpec((None,), tf.int64))
    return tf.data.Dataset.from_generator(batches, output_signature=signature)


WRONG = {
    "no tuple": (lambda: [x_of(), y_of()], "is a list of 2. Expected \\(x, y\\)"),
    "one": (lambda: (x_of(),), "is a tuple of 1"),
    "four": (lambda: (x_of(),) * 4, "is a tuple of 4"),
    "array": (lambda: x_of(), "is a ndarray"),
    "none": (lambda: None, "is a NoneType"),
    "no labels": (lambda: (x_of(), None), "holds None in place of x or y"),
    "text": (lambda: ("images", y_of()), "holds str that is no array of numbers"),
    "strings": (lambda: (np.array([["a", "b", "c"]]), y_of(1)), "no array of numbers"),
    "scalar": (lambda: (3.0, y_of()), "holds float that is no array"),
    "ragged": (
        lambda: (np.array([[1.0], [1.0, 2.0]], dtype=object), y_of(2)),
        "holds ndarray that is no array of numbers",
    ),
    "ragged list": (lambda: ([[1.0], [1.0, 2.0]], y_of(2)), "holds list that is no array"),
    "nan": (lambda: (broken(21), y_of()), "holds 1 values that are NaN or infinite"),
    "infinite": (lambda: (broken(0, np.inf), y_of()), "remove or replace those rows"),
    "nan labels": (lambda: (x_of(), y_of() * np.nan), "holds 22 values that are NaN"),
    "rows": (lambda: (x_of(), y_of(7)), r"has arrays of \[7, 22\] rows.*as many labels"),
    "weights": (lambda: (x_of(), y_of(), np.ones(3)), r"arrays of \[3, 22\] rows"),
    "empty": (lambda: (x_of(0), y_of(0)), "is empty. Expected at least one row"),
    "width": (lambda: (x_of().T, y_of(3)), r"shape \(22,\) per row; the model takes \(3,\)"),
    "no batch axis": (lambda: (x_of()[0], y_of(3)), r"shape \(\) per row; the model takes \(3,\)"),
    "inputs": (lambda: ((x_of(), x_of()), y_of()), "has 2 inputs; the model takes 1"),
    "dataset of x": (
        lambda: tf.data.Dataset.from_tensor_slices(x_of()).batch(8),
        "is a dataset of elements.*as_supervised=True",
    ),
    "dataset of dicts": (
        lambda: tf.data.Dataset.from_tensor_slices({"image": x_of(), "label": y_of()}),
        "for TFDS, pass as_supervised=True",
    ),
    "unbatched dataset": (
        lambda: tf.data.Dataset.from_tensor_slices((x_of(), y_of())),
        r"shape \(\) per row; the model takes \(3,\).*\.batch\(32\)",
    ),
    "empty dataset": (lambda: dataset(x_of(), y_of()).take(0), "Expected at least one batch"),
    "nan dataset": (lambda: dataset(broken(21), y_of()), "filter or replace those rows"),
    "share": (lambda: 0.2, r"is the number 0\.2; .*validation_split .*split the rows yourself"),
    "generator": (
        lambda: ((x, y) for x, y in [(x_of(), y_of())]),
        r"is a generator, which can be read only once.*from_generator, or write a keras.*Sequence",
    ),
    "iterator": (lambda: iter([(x_of(), y_of())]), "is a list_iterator, which can be read only"),
    "generator function": (lambda: generator_function, "is a function, which can be read only"),
    "swapped": (
        lambda: (y_of(), x_of()),
        r"shape \(\) per row; the model takes \(3,\)\. The labels have that shape: x and y look sw",
    ),
    "list of rows": (
        lambda: ([np.ones(3)] * 5, y_of(5)),
        r"arrays of \[3, 5\] rows.*one array with np\.stack",
    ),
    "unbatched open dataset": (
        lambda: dataset(x_of(), y_of()).map(lambda x, y: (x, y[0])),
        r"single numbers in place of rows\. Expected batches: add \.batch\(32\)",
    ),
    "dict keys": (
        lambda: dataset(x_of(), y_of()).map(lambda x, y: {"image": x, "label": y}),
        r"dataset of dicts with the keys \['image', 'label'\].*map\(lambda row: \(row",
    ),
    "autoencoder": (lambda: dataset(x_of()).map(lambda x: x), r"map\(lambda x: \(x, x\)\)"),
    "none in a dataset": (
        lambda: dataset(x_of(), y_of()).map(lambda x, y: (x, None)),
        "holds None in place of x or y",
    ),
    "ragged dataset": (
        lambda: dataset(x_of(), y_of()).map(lambda x, y: (tf.RaggedTensor.from_tensor(x), y)),
        r"holds a RaggedTensor\. Expected dense tensors: \.to_tensor\(\)",
    ),
    "text dataset": (
        lambda: dataset(x_of(), y_of()).map(lambda x, y: (tf.strings.as_string(x), y)),
        "holds text. Expected numbers",
    ),
    "rows in a dataset": (
        lambda: dataset(x_of(), y_of()).map(lambda x, y: (x, y[:5])),
        r"arrays of \[5, 8\] rows",
    ),
    "generator raising": (
        lambda: raising(ValueError("no such image\nas 7")),
        r"could not be read: batch 1 raises ValueError: no such image\. Expected a dataset that",
    ),
    "file missing": (
        lambda: tf.data.TextLineDataset("nowhere.csv").map(lambda line: (x_of(), y_of())),
        r"could not be read: batch 0 raises NotFoundError: nowhere\.csv; No such file or dir",
    ),
    "Sequence raising": (
        lambda: Batches(raises=1),
        r"could not be read: batch 1 raises OSError: gone\. Expected a Sequence",
    ),
    "Sequence of x": (lambda: Batches(only_x=True), r"has batches of type ndarray \(batch 0\)"),
    "Sequence of several shapes": (
        lambda: Batches(narrow=2),
        r"has batches that do not fit together: ValueError: .*pad them to one length",
    ),
    "Sequence of several structures": (
        lambda: Batches(weighted=2),
        "has batches that do not fit together",
    ),
    "empty Sequence": (lambda: Batches(length=0), "is empty. Expected at least one batch"),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("name", ["train", "validation_data"])
def test_data_that_cannot_be_used(model, case, name):
    make, message = WRONG[case]
    arguments = (make(), model)
    prepare = training_data
    if name != "train":
        arguments, prepare = (*arguments, name), evaluation_data
    with pytest.raises(rls.DataError, match=rf"(?s)^{name} .*{message}|^{name} {message}"):
        prepare(*arguments)


def test_endless_data_cannot_be_evaluated(model):
    with pytest.raises(rls.DataError, match=r"infinite dataset.*end it with \.take\(batches\)"):
        evaluation_data(dataset(x_of(), y_of()).repeat(), model, "validation_data")


def test_missing_named_inputs(two_inputs):
    with pytest.raises(rls.DataError, match=r"lacks the inputs \['right'\].*received \['left'\]"):
        evaluation_data(({"left": x_of()}, y_of()), two_inputs, "validation_data")


def test_hints_for_forgotten_axes():
    images = keras.Sequential([keras.layers.Input((8, 8, 1)), keras.layers.Flatten()])
    with pytest.raises(rls.DataError, match=r"Add the channel axis: x\[\.\.\., None\]"):
        training_data((np.zeros((ROWS, 8, 8), np.float32), y_of()), images)
    unbatched = tf.data.Dataset.from_tensor_slices((np.zeros((ROWS, 8, 8, 1)), y_of()))
    with pytest.raises(rls.DataError, match=r"The batch axis is missing: x\[None\]"):
        training_data(unbatched, images)


def test_open_axes_take_any_size():
    text = keras.Sequential([keras.layers.Input((None, 4)), keras.layers.GlobalAveragePooling1D()])
    batches = evaluation_data((np.zeros((5, 9, 4)), y_of(5)), text, "validation_data")
    assert batches[0][0].shape == (5, 9, 4)


@pytest.mark.parametrize("weighted", [False, True])
def test_sampled_rows_keep_inputs_labels_and_weights_together(model, weighted):
    y = np.arange(ROWS)
    columns = (x_of(), y, y / 100) if weighted else (x_of(), y)
    batches = evaluation_data(columns, model, "validation_data", batch_size=8)
    drawn = sample_rows(batches, 9, seed=1, batch_size=4)
    assert [len(batch[1]) for batch in drawn] == [4, 4, 1]
    labels = np.concatenate([batch[1] for batch in drawn])
    assert len(set(labels)) == 9
    np.testing.assert_array_equal(inputs_of(drawn), x_of()[labels])
    if weighted:
        weights = np.concatenate([batch[2] for batch in drawn])
        np.testing.assert_allclose(weights, labels / 100, rtol=1e-6)
    else:
        assert all(batch[2] is None for batch in drawn)
    again = sample_rows(batches, 9, seed=1, batch_size=4)
    np.testing.assert_array_equal(labels, np.concatenate([batch[1] for batch in again]))
    assert sample_rows(batches, ROWS) is batches


def test_rows_are_sampled_from_every_input(two_inputs):
    x = {"left": x_of(), "right": np.arange(ROWS * 4, dtype=np.float32).reshape(ROWS, 2, 2)}
    batches = evaluation_data((x, np.arange(ROWS)), two_inputs, "validation_data", batch_size=8)
    (drawn,) = sample_rows(batches, 5)
    np.testing.assert_array_equal(drawn[0]["left"], x["left"][drawn[1]])
    np.testing.assert_array_equal(drawn[0]["right"], x["right"][drawn[1]])


def test_every_training_on_arrays_sees_the_rows_in_the_same_order():
    model = keras.Sequential([keras.layers.Input((1,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    rows = np.arange(20, dtype=np.float32)[:, None]
    data = training_data((rows, rows), model, batch_size=8, seed=3)
    orders = []
    for _ in range(2):
        dataset = data.dataset
        orders.append([np.concatenate([x for x, _ in dataset]).ravel() for _ in range(2)])
    np.testing.assert_array_equal(orders[0], orders[1])
    assert (orders[0][0] != orders[0][1]).any()  # but shuffled anew in every epoch
