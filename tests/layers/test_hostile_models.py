"""Hostile model files: each is refused by this package, in one line, before Keras opens it."""

from __future__ import annotations

import shutil
import zipfile

import hostile_models as hostile
import numpy as np
import pytest
import tensorflow as tf
import tf_keras as keras

from rl_sparsity_tf.errors import ModelError, printable
from rl_sparsity_tf.layers.loading import load_model
from rl_sparsity_tf.layers.untrusted import reaches_out

KERAS = {
    **hostile.CONFIGS,
    **hostile.ARCHIVES,
    **{name: (hostile.in_hdf5(change), words) for name, (change, words) in hostile.HDF5.items()},
}
H5 = {name: (hostile.in_hdf5(change), words) for name, (change, words) in hostile.HDF5.items()}
CASES = [
    (file, name, *case)
    for file, cases in (("model.keras", KERAS), ("model.h5", H5), ("folder", hostile.FOLDERS))
    for name, case in cases.items()
]


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    """One small model in every format."""
    folder = tmp_path_factory.mktemp("honest")
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3), keras.layers.Dense(2)])
    for name in ("model.keras", "model.h5", "folder"):
        model.save(folder / name)
    return folder


def copied(honest, tmp_path, name):
    source, target = honest / name, tmp_path / name
    return shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)


def test_there_are_at_least_sixty():
    assert len(CASES) >= 60


@pytest.mark.parametrize(
    ("file", "name", "change", "words"), CASES, ids=[f"{file}: {name}" for file, name, *_ in CASES]
)
def test_a_hostile_file_is_refused_before_keras_opens_it(
    honest, tmp_path, monkeypatch, file, name, change, words
):
    path = copied(honest, tmp_path, file)
    change(path)
    monkeypatch.setattr(keras.models, "load_model", lambda *_, **__: pytest.fail("Keras opened it"))
    with pytest.raises(ModelError) as info:
        load_model(path)
    message = str(info.value)
    assert words in message
    assert message == printable(message)
    if name != hostile.NESTED:  # that is damage
        assert "was not opened" in message
        assert "trusted=True" in message


def test_weights_that_only_the_configuration_claims_take_no_memory(honest, tmp_path):
    path = copied(honest, tmp_path, "model.keras")
    hostile.setting(units=2**34)(path)
    with pytest.raises(ModelError, match=r"its layers claim 274,\d+,\d+,\d+ bytes of weights"):
        load_model(path)


def test_a_trusted_file_may_bring_all_that(honest, tmp_path):
    path = copied(honest, tmp_path, "model.keras")
    hostile.extra("more.bin")(path)
    hostile.setting(filename="x.txt", unknown=hostile.READ)(path)
    with pytest.raises(ModelError, match="Keras cannot build"):  # it knows no such settings
        load_model(path, trusted=True)
    shutil.copy(honest / "model.keras", path)
    hostile.extra("more.bin")(path)
    assert isinstance(load_model(path, trusted=True), keras.Model)


@pytest.mark.parametrize(
    "name", ["model.keras", "model.h5", pytest.param("folder", marks=pytest.mark.slow)]
)
def test_models_of_many_ordinary_parts_load(tmp_path, name):
    inputs = keras.Input((6, 4))
    rows = keras.layers.Bidirectional(keras.layers.GRU(2, return_sequences=True))(inputs)
    rows = keras.layers.TimeDistributed(keras.layers.Dense(4, keras.activations.gelu))(rows)
    rows = keras.layers.MultiHeadAttention(2, 2)(rows, rows)
    inner = keras.Sequential([keras.layers.Dense(3, "relu", kernel_regularizer="l2")], "inner")
    outputs = inner(tf.reduce_mean(rows, 1)[:, ::2] * 2.0)
    outputs = keras.layers.Dense(
        2,
        kernel_initializer=keras.initializers.HeNormal(seed=1),
        kernel_constraint=keras.constraints.MaxNorm(3),
        bias_regularizer=keras.regularizers.L1(0.1),
    )(outputs)
    model = keras.Model(inputs, outputs)
    rate = keras.optimizers.schedules.CosineDecay(0.1, 100)
    model.compile(
        keras.optimizers.AdamW(rate),
        keras.losses.CategoricalCrossentropy(from_logits=True),
        [keras.metrics.AUC(), "accuracy", keras.metrics.TopKCategoricalAccuracy(1)],
    )
    x = np.ones((2, 6, 4), np.float32)
    model.save(tmp_path / name)
    np.testing.assert_array_equal(load_model(tmp_path / name)(x), model(x))


def test_a_lookup_with_its_words_and_a_ragged_input_load(tmp_path):
    words = keras.Input((None,), dtype=tf.string, ragged=True)
    found = keras.layers.StringLookup(vocabulary=["a", "b"])(words)
    model = keras.Model(words, found.to_tensor())
    model.save(tmp_path / "model.keras")
    x = tf.ragged.constant([["a"], ["b", "c"]])
    np.testing.assert_array_equal(load_model(tmp_path / "model.keras")(x), model(x))


def test_an_archive_packed_again_loads(honest, tmp_path):
    path = copied(honest, tmp_path, "model.keras")
    hostile.write(path, hostile.members(path), zipfile.ZIP_DEFLATED)
    assert isinstance(load_model(path), keras.Model)


def test_operations_that_compute_stay_inside():
    for name in ("MatMul", "Conv2D", "ReadVariableOp", "While", "ShardedFilename", "RandomUniform"):
        assert not reaches_out(name)
