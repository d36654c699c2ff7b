"""What is advised for rows of another shape does make them fit."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from rl_sparsity_tf.checks import fits, shape_advice

# Received, with the rows' axis; wanted of a row; the advised call. None: nothing is advised.
ADVICE = [
    ((5, 64), (8, 8, 1), "x.reshape(-1, 8, 8, 1)"),
    ((64,), (8, 8, 1), "x.reshape(-1, 8, 8, 1)"),
    ((5, 8, 8, 1), (64,), "x.reshape(-1, 64)"),
    ((5, 8, 8), (8, 8, 1), "x[..., None]"),
    ((8, 8), (8, 8, 1), "x[None, ..., None]"),
    ((5, 8, 8), (None, None, 1), "x[..., None]"),
    ((8, 8, 1), (8, 8, 1), "x[None]"),
    ((6,), (6,), "x[None]"),
    ((5, 6, 1), (6,), "x[..., 0]"),
    ((5, 3, 8, 9), (8, 9, 3), "np.moveaxis(x, 1, -1)"),
    ((5, 3, 8, 9), (None, None, 3), "np.moveaxis(x, 1, -1)"),
    ((5, 8, 9, 3), (3, 8, 9), "np.moveaxis(x, -1, 1)"),
    ((5, 6, 4), (4, 6), "np.swapaxes(x, 1, 2)"),
    ((6, 5), (6,), "x.T"),
    ((5, 8, 8, 3), (8, 8, 1), "tf.image.rgb_to_grayscale(x)"),
    ((5, 8, 8, 1), (8, 8, 3), "np.repeat(x, 3, -1)"),
    ((5, 8, 8), (8, 8, 3), "np.repeat(x[..., None], 3, -1)"),
    ((5, 8, 8, 4), (8, 8, 3), "x[..., :3]"),
    ((5, 9, 9, 3), (8, 8, 3), "tf.image.resize(x, (8, 8))"),
    ((5, 7), (6,), None),
    ((5, 7), (None, 6), None),
    ((), (6,), None),
]


@pytest.mark.parametrize(("received", "wanted", "call"), ADVICE)
def test_the_advice_makes_the_rows_fit(received, wanted, call):
    found = shape_advice(received, wanted)
    if call is None:
        assert found == ""
        return
    text, _, code = found.partition(": ")
    assert text[0] == " "
    assert text[1].isupper()
    assert code.startswith(call)
    assert code.endswith(".")
    made = DOES[call](np.zeros(received, np.float32))
    assert fits(np.shape(made)[1:], wanted)


# The advised calls; eval has no place here.
DOES = {
    "x.reshape(-1, 8, 8, 1)": lambda x: x.reshape(-1, 8, 8, 1),
    "x.reshape(-1, 64)": lambda x: x.reshape(-1, 64),
    "x[..., None]": lambda x: x[..., None],
    "x[None, ..., None]": lambda x: x[None, ..., None],
    "x[None]": lambda x: x[None],
    "x[..., 0]": lambda x: x[..., 0],
    "np.moveaxis(x, 1, -1)": lambda x: np.moveaxis(x, 1, -1),
    "np.moveaxis(x, -1, 1)": lambda x: np.moveaxis(x, -1, 1),
    "np.swapaxes(x, 1, 2)": lambda x: np.swapaxes(x, 1, 2),
    "x.T": lambda x: x.T,
    "tf.image.rgb_to_grayscale(x)": tf.image.rgb_to_grayscale,
    "np.repeat(x, 3, -1)": lambda x: np.repeat(x, 3, -1),
    "np.repeat(x[..., None], 3, -1)": lambda x: np.repeat(x[..., None], 3, -1),
    "x[..., :3]": lambda x: x[..., :3],
    "tf.image.resize(x, (8, 8))": lambda x: tf.image.resize(x, (8, 8)),
}
