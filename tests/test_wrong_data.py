"""Data that a search cannot use: refused in words, before anything is trained or written."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import tensorflow as tf
from wrong_calls import (
    ALL_ONES,
    IMAGES,
    LABELS,
    ONE_HOT,
    Rows,
    X,
    Y,
    assert_refused,
    batches,
    failing,
    generator,
    images,
    searched,
    stateful,
    tiny_with,
    two_inputs,
    with_one,
)

import rl_sparsity_tf as rls

DATA = {
    "no channel axis": (
        searched(images, train=(IMAGES[..., 0], LABELS)),
        r"train has inputs of shape \(6, 6\) per row; the model takes \(6, 6, 1\)\..*x\[\.\.\., ",
    ),
    "no batch axis": (
        searched(images, train=(IMAGES[0], LABELS[:6])),
        r"train has inputs of shape \(6, 1\) per row; the model takes \(6, 6, 1\)\. The batch axis",
    ),
    "too few features": (
        searched(validation_data=(X[:, :5], Y)),
        r"validation_data has inputs of shape \(5,\) per row; the model takes \(6,\)\.",
    ),
    "one input of two": (
        searched(two_inputs, train=(X[:, :3], Y)),
        r"train has 1 inputs; the model takes 2: \['left', 'right'\]\. Pass them as a list or a d",
    ),
    "two inputs for one": (
        searched(train=([X, X], Y)),
        r"train has 2 inputs; the model takes 1.*one array with np\.stack",
    ),
    "a dict of other inputs": (
        searched(two_inputs, train=({"left": X[:, :3], "rihgt": X[:, 3:]}, Y)),
        r"train lacks the inputs \['right'\]\. Expected a dict with \['left', 'right'\], received",
    ),
    "one label array for two outputs": (
        searched(functools.partial(two_inputs, 2), train=((X[:, :3], X[:, 3:]), Y)),
        r"train has one array of labels; the model has 2 outputs\. Expected a dict with the names",
    ),
    "labels of another output": (
        searched(functools.partial(two_inputs, 2), train=((X[:, :3], X[:, 3:]), {"end_3": Y})),
        r"train has labels for \['end_3'\].*Expected a dict with these names",
    ),
    "x and y swapped": (searched(train=(Y, X)), r"x and y look swapped\. Expected \(x, y\)"),
    "NaN in x": (
        searched(train=(with_one(X, np.nan), Y)),
        r"train holds 1 values that are NaN or infinite\. Expected finite numbers: remove or",
    ),
    "infinity in validation": (
        searched(validation_data=(with_one(X, np.inf), Y)),
        r"validation_data holds 1 values that are NaN or infinite\. Expected finite numbers: rem",
    ),
    "NaN in the test's y": (
        searched(test_data=(X, with_one(Y, np.nan))),
        r"test_data holds 1 values that are NaN or infinite\. Expected finite numbers: remove",
    ),
    "NaN in sample weights": (
        searched(train=(X, Y, with_one(ALL_ONES, np.nan))),
        r"train holds 1 values that are NaN or infinite\. Expected finite numbers: remove or",
    ),
    "NaN in a dataset": (
        searched(train=lambda: batches(with_one(X, np.nan), Y)),
        r"train holds values that are NaN or infinite\. Expected finite numbers: filter or replace",
    ),
    "NaN in a dataset's weights": (
        searched(validation_data=lambda: batches(X, Y, with_one(ALL_ONES, np.nan))),
        r"validation_data holds values that are NaN or infinite\. Expected finite numbers: filter",
    ),
    "negative sample weight": (
        searched(train=(X, Y, with_one(ALL_ONES, -1.0))),
        r"train has the sample weight -1 in row 95\. Expected numbers of at least 0",
    ),
    "sample weights per class": (
        searched(train=(X, Y, np.ones((96, 3)))),
        r"train has sample weights of shape \(3,\) per row\. Expected one number per row\..*class_",
    ),
    "class too large": (
        searched(train=(X, with_one(Y, 3))),
        r"train has the label 3 in row 95; the model's output has 3 classes\. Expected .* 0 to 2",
    ),
    "class too large in a later batch": (
        searched(validation_data=lambda: batches(X, with_one(Y, 7, row=50))),
        r"validation_data has the label 7 in row 50; .* 3 classes\. Expected integers from 0 to 2",
    ),
    "labels from 1": (
        searched(train=(X, Y + 1), validation_data=(X, Y + 1)),
        r"train has the label 3 in row \d+ \(and wrong ones in \d+ more rows\).*from 0 to 2",
    ),
    "negative class": (
        searched(test_data=(X, with_one(Y, -1))),
        r"test_data has the label -1 in row 95; the model's output has 3 classes\. Expected",
    ),
    "fraction of a class": (
        searched(train=(X, with_one(Y, 0.5))),
        r"train has the label 0\.5 in row 95; .*Expected integers from 0 to 2",
    ),
    "one-hot for a sparse loss": (
        searched(train=(X, ONE_HOT)),
        r"labels of shape \(3,\) per row; .*loss categorical_crossentropy, or y\.argmax\(-1\)",
    ),
    "integers for a one-hot loss": (
        searched(functools.partial(tiny_with, "categorical_crossentropy")),
        r"train has labels of shape \(\) per row; .*sparse_categorical_crossentropy, or tf_keras",
    ),
    "one number for three outputs": (
        searched(functools.partial(tiny_with, "mse"), train=(X, Y[:, None] * 1.0)),
        r"train has labels of shape \(1,\) per row; .*would be compared with every output",
    ),
    "fewer labels than rows": (
        searched(train=(X, Y[:90])),
        r"train has arrays of \[90, 96\] rows\. Expected as many labels",
    ),
    "x of objects": (
        searched(train=(X.astype(object), Y)),
        r"train holds ndarray that is no array of numbers.*Expected \(x, y\) or",
    ),
    "x of text": (
        searched(train=(X.astype(str), Y)),
        r"train holds ndarray that is no array of numbers.*Expected \(x, y\) or",
    ),
    "y of text": (
        searched(train=(X, np.array(["cat", "dog", "owl"])[Y])),
        r"train has labels that are text, such as '\w+'\. Expected numbers.*np\.unique",
    ),
    "y of bytes": (
        searched(train=(X, np.array([b"cat", b"dog", b"owl"])[Y])),
        r"train has labels that are text, such as b'\w+'\. Expected numbers.*np\.unique",
    ),
    "complex x": (
        searched(train=(X + 1j, Y)),
        r"train has inputs that are complex\. Expected real numbers: .*x\.real, x\.imag",
    ),
    "complex y": (
        searched(validation_data=(X, Y + 1j)),
        r"validation_data has labels that are complex\. Expected real numbers: .*x\.real",
    ),
    "a dataset of complex x": (
        searched(train=lambda: batches(X + 1j, Y)),
        r"train has inputs that are complex\. Expected real numbers: .*x\.real, x\.imag",
    ),
    "x of records": (
        searched(train=(np.zeros(96, [("a", "f4"), ("b", "f4")]), Y)),
        r"train holds ndarray that is no array of numbers.*Expected \(x, y\) or",
    ),
    "x beyond float32": (
        searched(train=(with_one(X.astype(float), 1e300), Y)),
        r"train holds numbers beyond float32, .*such as 1e\+300\. Expected numbers up to 3\.4e\+38",
    ),
    "a dataset beyond float32": (
        searched(validation_data=lambda: batches(with_one(X.astype(float), -1e300), Y)),
        r"validation_data holds numbers beyond float32, .*such as -1e\+300\. Expected .*scale them",
    ),
    "no data": (searched(train=None), r"train is a NoneType\. Expected \(x, y\) or"),
    "a path for data": (searched(train="data.npz"), r"train is a str\. Expected \(x, y\) or"),
    "x alone": (searched(train=X), r"train is a ndarray\. Expected \(x, y\) or"),
    "a list": (searched(train=[X, Y]), r"train is a list of 2\. Expected \(x, y\) or"),
    "no validation": (
        searched(validation_data=None),
        r"There is no validation_data.*Pass validation_data=\(x, y\)",
    ),
    "a share for validation": (
        searched(validation_data=0.2),
        r"validation_data is the number 0\.2; .*Expected \(x, y\).*split the rows yourself",
    ),
    "validation without labels": (
        searched(validation_data=X),
        r"validation_data is a ndarray\. Expected \(x, y\) or",
    ),
    "empty validation": (
        searched(validation_data=(X[:0], Y[:0])),
        r"validation_data is empty\. Expected at least one row",
    ),
    "empty dataset": (
        searched(validation_data=lambda: batches(X, Y).take(0)),
        r"validation_data is empty\. Expected at least one batch",
    ),
    "endless validation": (
        searched(validation_data=lambda: batches(X, Y).repeat()),
        r"validation_data is an infinite dataset\. Expected a finite one: .*\.take\(batches\)",
    ),
    "dataset without batches": (
        searched(train=lambda: tf.data.Dataset.from_tensor_slices((X, Y))),
        r"train has inputs of shape \(\) per row; .*\.batch\(32\) on a dataset",
    ),
    "dataset of dicts": (
        searched(train=lambda: tf.data.Dataset.from_tensor_slices({"x": X, "y": Y}).batch(8)),
        r"train is a dataset of dicts with the keys \['x', 'y'\]\. Expected .*as_supervised=True",
    ),
    "a generator": (
        searched(train=lambda: generator()),
        r"train is a generator, which can be read only once\. Expected .*from_generator",
    ),
    "a generator function": (
        searched(train=generator),
        r"train is a function, which can be read only once\. Expected .*from_generator",
    ),
    "a dataset that raises": (
        searched(train=failing),
        r"train could not be read: batch 1 raises OSError: the disk is gone\. Expected a dataset",
    ),
    "an empty Sequence": (
        searched(train=lambda: Rows()),
        r"train is empty\. Expected at least one batch",
    ),
    "a Sequence that raises": (
        searched(validation_data=lambda: Rows(2)),
        r"validation_data could not be read: batch 0 raises KeyError: .*Expected a Sequence that",
    ),
    "too few rows for a fixed batch": (
        searched(stateful, train=(np.zeros((5, 5, 3), np.float32), np.zeros(5, int))),
        r"train has 5 rows; the model takes exactly 8 per call\. Expected at least that many",
    ),
    "a remainder of a fixed batch": (
        searched(
            stateful,
            train=(np.zeros((16, 5, 3), np.float32), np.zeros(16, int)),
            validation_data=(np.zeros((12, 5, 3), np.float32), np.zeros(12, int)),
        ),
        r"validation_data has 12 rows; the model takes exactly 8 per call\. .*leave out 4 rows",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", DATA)
def test_wrong_data_is_refused_before_any_work(case, files):
    call, pattern = DATA[case]
    assert_refused(call, files, rls.DataError, pattern)
