"""The rows that calibrate and check an exported file."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
import tf_keras as keras

from rl_sparsity_tf.data.calibration import collect_rows
from rl_sparsity_tf.errors import ArgumentError, DataError
from rl_sparsity_tf.layers.structure import input_specs, random_rows

layers = keras.layers


def two_inputs():
    first, second = keras.Input((4,), name="zz"), keras.Input((6,), name="aa")
    return keras.Model([first, second], layers.Concatenate()([first, second]))


def test_representative_data_comes_in_many_forms():
    model = keras.Sequential([layers.Input((3,), name="x"), layers.Dense(2)])
    specs = input_specs(model)
    x, y = np.arange(12, dtype=np.float64).reshape(4, 3), np.zeros(4)
    forms = [
        x,
        (x,),
        {"x": x},
        [x[:2], x[2:]],
        [(x[:2], y[:2]), (x[2:], y[2:])],
        (row for row in (x[:3], x[3:])),
        tf.data.Dataset.from_tensor_slices((x, y)).batch(3),
        tf.data.Dataset.from_tensor_slices(x),
        tf.data.Dataset.from_tensor_slices((x, y)).batch(2).repeat(),
    ]
    for form in forms:
        (rows,) = collect_rows(form, specs, 4)
        np.testing.assert_array_equal(rows, x.astype(np.float32))
        assert rows.dtype == np.float32
    both = input_specs(two_inputs())
    for function in (
        lambda: x,
        lambda: ([row[None]] for row in x),
        lambda size=2: ([x[at : at + size]] for at in (0, 2)),
        lambda *_, **__: ({"x": row[None]} for row in x),
        lambda: (("serving_default", {"x": row[None]}) for row in x),
        lambda: iter([x[:0], x]),
    ):
        (rows,) = collect_rows(function, specs, 4)
        np.testing.assert_array_equal(rows, x.astype(np.float32))
    pair = (np.zeros((5, 4)), np.ones((5, 6)))
    for form in (pair, {"zz": pair[0], "aa": pair[1]}, [(pair, np.zeros(5))]):
        assert [rows.shape for rows in collect_rows(form, both, 3)] == [(3, 4), (3, 6)]


def of_nothing():
    return
    yield


def of_rows(x, size):
    yield x[:size]


def failing():
    raise OSError("the disk is gone")


def endless(batch, read):
    while True:
        read.append(1)
        yield batch


def test_functions_that_give_no_batches_are_refused():
    specs = input_specs(keras.Sequential([layers.Input((3,), name="x"), layers.Dense(2)]))
    for function, message in (
        (
            of_rows,
            r"the function of_rows, which asks for \['x', 'size'\]\. .*lambda: of_rows\(\.\.\.\)",
        ),
        (of_nothing, "has no rows"),
        (lambda: None, r"returns None\. Expected one that yields .*yield \[x\[i : i \+ 1\]\]"),
        (failing, r"function failing raises OSError: the disk is gone\. Expected one that yields"),
        (
            lambda: iter([[np.zeros((2, 4))]]),
            r"a list of \['ndarray\(2, 4\)'\]; the model's inputs",
        ),
        (lambda: (failing() for _ in "a"), r"batch 0 raises OSError: the disk is gone"),
        (list, r"The data received is type;"),
    ):
        with pytest.raises(DataError, match=message):
            collect_rows(function, specs, 4)
    # No more is read than is needed, even if it never ends.
    for batch, count in ((np.zeros((2, 3)), 2), (np.zeros((0, 3)), 4)):
        read = []
        if count == 2:
            assert len(collect_rows(lambda b=batch, r=read: endless(b, r), specs, 4)[0]) == 4
        else:
            with pytest.raises(DataError, match="has no rows"):
                collect_rows(lambda b=batch, r=read: endless(b, r), specs, 4)
        assert len(read) == count


def test_representative_data_that_does_not_fit_is_refused():
    specs = input_specs(keras.Sequential([layers.Input((3,), name="x"), layers.Dense(2)]))
    with pytest.raises(DataError, match=r"ndarray\(4, 2\); the model's inputs are 'x' \(None, 3\)"):
        collect_rows(np.zeros((4, 2)), specs, 4)
    with pytest.raises(DataError, match="a mapping with the keys"):
        collect_rows({"y": np.zeros((4, 3))}, specs, 4)
    with pytest.raises(DataError, match="received is a tuple of"):
        collect_rows([(np.zeros((4, 2)),)], specs, 4)
    with pytest.raises(DataError, match="has no rows"):
        collect_rows(np.zeros((0, 3)), specs, 4)
    for wrong, advice in (
        (np.zeros(3), r"batches, with or without targets\. The batch axis is missing: x\[None\]"),
        ([np.zeros((3, 4, 1))], r"Take the last axis off: x\[\.\.\., 0\]|targets\.$"),
        ({"y": np.zeros((4, 3))}, r"Expected one of 'x'\."),
        ([(np.zeros((4, 1, 3)), np.zeros(4))], r"Reshape it: x\.reshape\(-1, 3\)\.$"),
    ):
        with pytest.raises(DataError, match=advice):
            collect_rows(wrong, specs, 4)
    with pytest.raises(DataError, match="contains NaN"):
        collect_rows(np.full((1, 3), np.nan), specs, 4)


def test_random_ids_stay_within_the_vocabulary():
    inputs = keras.Input((50,), dtype="int32")
    model = keras.Model(inputs, layers.Embedding(7, 2)(inputs))
    (ids,) = random_rows(model, input_specs(model), 4)
    assert set(ids.reshape(-1)) == set(range(7))
    floats = keras.Sequential([layers.Input((50,)), layers.Embedding(7, 2)])
    (ids,) = random_rows(floats, input_specs(floats), 4)
    assert set(ids.reshape(-1)) == set(range(7))
    assert ids.dtype == np.float32

    class Words(keras.Model):
        def __init__(self):
            super().__init__()
            self.table = [layers.Embedding(5, 2)]

        def call(self, inputs):
            return self.table[0](inputs)

    words = Words()
    words(np.zeros((2, 50), np.int32))
    (ids,) = random_rows(words, input_specs(words), 4)
    assert set(ids.reshape(-1)) == set(range(5))
    text = keras.Input((1,), dtype="string")
    with pytest.raises(ArgumentError, match="is of type string"):
        random_rows(model, input_specs(keras.Model(text, layers.Flatten()(text))), 4)
