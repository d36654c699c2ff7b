"""Under another backend of Keras 3 models go through numpy, or are refused with the reason."""

import importlib.util
import os
import subprocess
import sys

import keras as keras3
import pytest

from rl_sparsity_tf.errors import ModelError
from rl_sparsity_tf.keras3 import graph, parts, weights
from rl_sparsity_tf.keras3.door import admitted

layers = keras3.layers

_USER = """
import sys
import keras
import numpy as np
import rl_sparsity_tf as rls

backend = sys.argv[1]
assert keras.backend.backend() == backend
keras.utils.set_random_seed(0)
layers = keras.layers
x = keras.Input((6, 6, 2), name="image")
y = layers.Conv2D(8, 3, padding="same", use_bias=False)(x)
y = keras.ops.silu(layers.BatchNormalization()(y))
y = keras.ops.relu(layers.SeparableConv2D(8, 3, padding="same")(y) + y)
y = layers.GlobalAveragePooling2D()(layers.Dropout(0.2)(y))
image = keras.Model(x, layers.Dense(3, activation="softmax")(y))
image.compile(keras.optimizers.SGD(0.1), "sparse_categorical_crossentropy", metrics=["accuracy"])
a = np.random.default_rng(0).normal(size=(96, 6, 6, 2)).astype("float32")
b = (a.mean((1, 2, 3)) > 0).astype(int) + (a[:, 0, 0, 0] > 0)
if backend != "numpy":  # which does not train
    image.fit(a, b, epochs=2, verbose=0)

words = keras.Sequential([
    keras.Input((7,), dtype="int32"),
    layers.Embedding(9, 4, mask_zero=True),
    layers.Bidirectional(layers.LSTM(4, recurrent_activation="hard_sigmoid")),
    layers.Dense(2),
])
small = rls.strip(words)
ids = np.arange(28).reshape(4, 7) % 9
np.testing.assert_allclose(small.predict(ids, verbose=0), words.predict(ids, verbose=0), atol=1e-5)

wrapped = rls.wrap(image, rls.baselines.lamp(image, sparsity=0.5))
wrapped.fit(a, b, epochs=1, verbose=0)
small = rls.strip(wrapped)
assert isinstance(small, keras.Model) and small.compiled
np.testing.assert_allclose(small.predict(a, verbose=0), wrapped.predict(a, verbose=0), atol=1e-5)
result = rls.Compressor(image, rls.Target(sparsity=0.5), agent="random").search(
    (a, b), validation_data=(a, b), episodes=1, finetune_epochs=1, verbose=0
)
assert isinstance(result.model, keras.Model), type(result.model)
result.export_tflite(sys.argv[2], "none")
of_file = rls.predict_tflite(sys.argv[2], a)
np.testing.assert_allclose(of_file, result.model.predict(a, verbose=0), atol=1e-4)

for inner, reason in (
    (layers.Lambda(lambda x: x * 2, name="twice"), "'twice' could only run as it is (a Lambda"),
    (layers.RMSNormalization(name="rms"), "'rms' could only run as it is (tf_keras has no RMS"),
):
    try:
        rls.wrap(keras.Sequential([keras.Input((4,)), inner, layers.Dense(2)]))
    except rls.ModelError as error:
        assert reason in str(error), error
        assert f"needs Keras 3 on TensorFlow; KERAS_BACKEND is {backend}" in str(error), error
    else:
        raise AssertionError(inner)
"""


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["numpy", "jax", "torch"])
def test_models_of_other_backends_go_through_numpy(backend, tmp_path):
    needed = {"numpy": "jax"}.get(backend, backend)  # Keras's numpy backend imports it
    if importlib.util.find_spec(needed) is None:
        pytest.skip(f"{needed} is not installed")
    environment = {**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [sys.executable, "-c", _USER, backend, str(tmp_path / "model.tflite")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture
def elsewhere(monkeypatch):
    for module in (graph, parts, weights):
        monkeypatch.setattr(module, "on_tensorflow", lambda: False)
    monkeypatch.setattr(keras3.backend, "backend", lambda: "jax")


@pytest.mark.usefixtures("elsewhere")
def test_what_runs_as_it_is_needs_the_tensorflow_backend():
    reason = r"needs Keras 3 on TensorFlow; KERAS_BACKEND is jax\. Expected a model whose parts"
    lambdas = layers.Lambda(lambda x: x * 2, name="twice")
    model = keras3.Sequential([layers.Input((4,)), lambdas, layers.Dense(2)])
    with pytest.raises(ModelError, match=rf"its layer 'twice' could only run as .*{reason}"):
        admitted(model)
    x = layers.Input((4,))
    model = keras3.Model(x, keras3.ops.cumsum(layers.Dense(2)(x), axis=-1))
    with pytest.raises(ModelError, match=rf"its operation Cumsum could only run as .*{reason}"):
        admitted(model)


@keras3.saving.register_keras_serializable("tests_of_backends")
def own(*values):
    return keras3.ops.sum(keras3.ops.stack(values), 0)


@pytest.mark.usefixtures("elsewhere")
def test_functions_of_the_users_need_the_tensorflow_backend():
    model = keras3.Sequential([layers.Input((4,)), layers.Dense(2, activation=own, name="mine")])
    with pytest.raises(ModelError, match=r"'mine' could only run as it is \(its function '.*own'"):
        admitted(model)
    model = keras3.Sequential([layers.Input((4,)), layers.Dense(2)])
    compiled_with = (
        {"loss": own},
        {"loss": keras3.losses.Tversky()},
        {"loss": "mse", "metrics": [own]},
    )
    for compiled in compiled_with:
        model.compile("sgd", **compiled)
        with pytest.raises(ModelError, match=r"with '(own|tversky)'.*KERAS_BACKEND is jax"):
            admitted(model)
