"""The rows that calibrate and check an exported file."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
import tf_keras as keras

from rl_sparsity_tf.errors import ArgumentError, DataError
from rl_sparsity_tf.samples import collect_rows, random_rows
from rl_sparsity_tf.signature import input_specs

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
    pair = (np.zeros((5, 4)), np.ones((5, 6)))
    for form in (pair, {"zz": pair[0], "aa": pair[1]}, [(pair, np.zeros(5))]):
        assert [rows.shape for rows in collect_rows(form, both, 3)] == [(3, 4), (3, 6)]


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
