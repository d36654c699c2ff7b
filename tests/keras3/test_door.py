"""Every public function takes Keras 3 models; what gives models gives Keras 3 back."""

import json
import subprocess
import sys
import zipfile

import keras as keras3
import numpy as np
import pytest
import tf_keras as keras

import rl_sparsity_tf as rls
from rl_sparsity_tf.data.batches import evaluation_data, training_data
from rl_sparsity_tf.environment.network import CompressedNetwork
from rl_sparsity_tf.keras3 import loading
from rl_sparsity_tf.keras3.door import admitted
from rl_sparsity_tf.search.run_directory import model_fingerprint

layers = keras3.layers


def rows(count=64, seed=0):
    return np.random.default_rng(seed).normal(size=(count, 8, 8, 1)).astype("float32")


def predicted(model):
    return model.predict(rows(), verbose=0)


@pytest.fixture(scope="module")
def model():
    keras3.utils.set_random_seed(0)
    made = keras3.Sequential(
        [
            layers.Input((8, 8, 1)),
            layers.Conv2D(8, 3, padding="same", use_bias=False, name="conv"),
            layers.BatchNormalization(name="norm"),
            layers.ReLU(),
            layers.Conv2D(8, 3, padding="same", activation="relu", name="second"),
            layers.GlobalAveragePooling2D(),
            layers.Dense(3, activation="softmax", name="classes"),
        ]
    )
    made.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    return made


@pytest.fixture(scope="module")
def plan(model):
    return rls.baselines.lamp(model, sparsity=0.5)


def test_plans_name_the_kernels_of_the_users_model(plan):
    assert list(plan.kernels) == ["conv/kernel", "second/kernel", "classes/kernel"]


def test_wrapped_models_are_tf_keras_and_stripped_ones_keras_3(model, plan):
    wrapped = rls.wrap(model, plan)
    assert isinstance(wrapped, keras.Model)
    assert not isinstance(wrapped, keras3.Model)
    small = rls.strip(wrapped)
    assert isinstance(small, keras3.Sequential)
    np.testing.assert_allclose(predicted(small), predicted(wrapped), atol=1e-5)
    zeros = sum(
        int((np.asarray(weight) == 0).sum()) for weight in small.weights if len(weight.shape) > 1
    )
    pruned = (entry.weights_under(rls.Operation.PRUNE) for entry in plan.kernels.values())
    assert zeros == sum(pruned)
    assert small.compiled
    assert [one.name for one in small.layers] == [one.name for one in model.layers]


def test_stripping_a_plain_model_copies_it(model):
    copy = rls.strip(model)
    assert copy is not model
    assert isinstance(copy, keras3.Sequential)
    np.testing.assert_allclose(predicted(copy), predicted(model), atol=1e-6)


def test_channels_are_removed_from_a_keras_3_model(model):
    live = {0: [True] * 3 + [False] * 5}
    masked = rls.mask_channels(model, live)
    assert isinstance(masked, keras3.Sequential)
    small = rls.shrink(masked)
    assert isinstance(small, keras3.Sequential)
    assert small.get_layer("conv").filters == 3
    assert small.count_params() < model.count_params()
    np.testing.assert_allclose(predicted(small), predicted(masked), atol=1e-5)


def test_descriptions_and_counts_take_keras_3(model):
    lines = []
    rls.describe_support(model, print_fn=lines.append)
    rls.describe_groups(model, print_fn=lines.append)
    assert any("conv" in line for line in lines)
    assert rls.count_macs(model) == 8 * 8 * 9 * 8 + 8 * 8 * 9 * 8 * 8 + 8 * 3
    assert rls.widths_of(model)["conv"].outputs == 8
    assert len(rls.find_groups(model)) == 3
    permuted = rls.permute_channels(model, group="block4")
    assert isinstance(permuted, keras3.Sequential)
    assert len(rls.permutation_report(model, permuted, group="block4")) == 3


def test_a_keras_3_model_is_exported_and_so_is_its_wrapped_copy(model, plan, tmp_path):
    report = rls.export_tflite(model, tmp_path / "dense.tflite", "none")
    of_file = rls.predict_tflite(tmp_path / "dense.tflite", rows())
    np.testing.assert_allclose(of_file, predicted(model), atol=1e-4)
    small = rls.export_tflite(rls.wrap(model, plan), tmp_path / "wrapped.tflite")
    assert report.tflite_bytes > 0
    assert small.tflite_bytes > 0
    rls.export_micro(model, tmp_path / "model.h", representative_data=rows())
    assert (tmp_path / "model.h").stat().st_size > 0


# ---------------------------------------------------------------------- files


def test_files_of_keras_3_are_loaded(model, tmp_path):
    model.save(tmp_path / "model.keras")
    loaded = rls.load_model(tmp_path / "model.keras")
    assert isinstance(loaded, keras3.Sequential)
    assert loaded.compiled
    np.testing.assert_array_equal(predicted(loaded), predicted(model))


@keras3.saving.register_keras_serializable("tests")
class Registered(layers.Layer):
    def call(self, x):
        return x


class Unregistered(layers.Layer):
    def call(self, x):
        return x


def saved(path, *inner):
    keras3.Sequential([layers.Input((4,)), *inner]).save(path)
    return path


def changed(path, change):
    """The file with its configuration changed as text."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    members["config.json"] = change(members["config.json"].decode()).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def test_registered_classes_and_functions_of_keras_pass(tmp_path):
    parts = [Registered(), layers.Dense(3, activation="silu"), layers.Dropout(0.1)]
    x = keras3.Input((4,))
    y = layers.Dense(4, kernel_regularizer="l2", activation=keras3.ops.relu)(x) + x[:, :1]
    keras3.Model(x, keras3.ops.relu(y)).save(tmp_path / "graph.keras")
    assert rls.load_model(saved(tmp_path / "model.keras", *parts)).count_params() == 15
    assert rls.load_model(tmp_path / "graph.keras").count_params() == 20


@pytest.mark.parametrize("name", ["os", "subprocess", "keras.utils", "keras.src.utils.io_utils"])
def test_classes_from_elsewhere_are_refused(tmp_path, name):
    path = saved(tmp_path / "model.keras", layers.Dense(3, name="mine"))
    before = '"module": "keras.layers", "class_name": "Dense"'
    after = f'"module": "{name}", "class_name": "Popen"'
    changed(path, lambda text: text.replace(before, after))
    with pytest.raises(rls.ModelError, match=rf"'mine' is of the class 'Popen' .* '{name}'"):
        rls.load_model(path)


def test_functions_that_do_not_compute_are_refused(tmp_path):
    path = saved(tmp_path / "model.keras", layers.Dense(3, activation="relu"))
    stored = {"module": "keras.utils", "class_name": "function", "config": "get_file"}
    after = f'"activation": {json.dumps(stored)}'
    changed(path, lambda text: text.replace('"activation": "relu"', after))
    with pytest.raises(rls.ModelError, match=r"function 'get_file' of the module 'keras\.utils'"):
        rls.load_model(path)


def test_python_code_and_other_files_are_refused(tmp_path):
    path = saved(tmp_path / "lambda.keras", layers.Lambda(lambda x: x * 2, name="twice"))
    with pytest.raises(rls.ModelError, match=r"'twice' is a Lambda, which runs Python code"):
        rls.load_model(path)
    assert rls.load_model(path, trusted=True)(np.ones((1, 4)))[0, 0] == 2
    words = {"class_name": "StringLookup", "module": "keras.layers", "registered_name": None}
    config = {**words, "config": {"name": "words", "vocabulary": "/etc/passwd"}}
    assert "reads the file '/etc/passwd'" in next(loading.foreign_parts(config))
    opened = {**words, "class_name": "TFSMLayer", "config": {"name": "x", "filepath": "/tmp/x"}}
    assert "'x' is a TFSMLayer, which runs or opens" in next(loading.foreign_parts(opened))


def test_a_class_that_is_not_registered_is_named(tmp_path):
    path = saved(tmp_path / "model.keras", Unregistered(name="mine"))
    with pytest.raises(rls.ModelError, match=r"'mine' is of the class 'Unregistered' .*register"):
        rls.load_model(path)


def test_a_damaged_file_of_keras_3_is_refused(model, tmp_path):
    model.save(tmp_path / "model.keras")
    content = (tmp_path / "model.keras").read_bytes()
    (tmp_path / "model.keras").write_bytes(content[: len(content) // 2])
    with pytest.raises(rls.ModelError, match="is truncated"):
        rls.load_model(tmp_path / "model.keras")


# ---------------------------------------------------------------------- a whole search


class Batches(keras3.utils.PyDataset):
    def __init__(self, x, y, **kwargs):
        super().__init__(**kwargs)
        self.x, self.y = x, y

    def __len__(self):
        return len(self.x) // 16

    def __getitem__(self, index):
        rows_ = slice(16 * index, 16 * index + 16)
        return self.x[rows_], self.y[rows_]


def labelled(count, seed):
    x = rows(count, seed)
    return x, (x.mean((1, 2, 3)) > 0).astype(int) + (x[:, 0, 0, 0] > 0)


def searched(model, target, directory=None):
    x, y = labelled(96, 1)
    compressor = rls.Compressor(model, target, agent="random", directory=directory)
    return compressor.search(
        Batches(x, y), validation_data=labelled(64, 2), episodes=1, finetune_epochs=1, verbose=0
    )


def test_a_search_hands_keras_3_back_and_saves_it(model, tmp_path):
    result = searched(model, rls.Target(sparsity=0.6), tmp_path / "run")
    assert isinstance(result.model, keras3.Sequential)
    assert result.model.compiled
    result.export_tflite(tmp_path / "model.tflite")
    of_file = rls.predict_tflite(tmp_path / "model.tflite", rows())
    np.testing.assert_allclose(of_file, predicted(result.model), atol=1e-2)
    rls.export_tflite(result, tmp_path / "again.tflite", representative_data=rows())
    stored = keras3.saving.load_model(tmp_path / "run" / "model.keras")
    np.testing.assert_array_equal(predicted(stored), predicted(result.model))
    result.summary(print_fn=lambda line: None)


def test_environments_take_keras_3(model):
    network = CompressedNetwork(
        model,
        training_data(labelled(64, 1), model, batch_size=32),
        evaluation_data(labelled(64, 2), model, "validation_data"),
        target=rls.Target(sparsity=0.5),
    )
    assert network.kernels[0].path == "conv/kernel"
    assert network.dense.loss == pytest.approx(model.evaluate(*labelled(64, 2), verbose=0)[0], 1e-4)


def test_a_run_that_was_cut_off_knows_its_keras_3_model_again():
    x = keras3.Input((8, 8, 1))
    y = keras3.ops.relu(layers.Conv2D(4, 3)(x)) * 0.5
    model = keras3.Model(x, layers.Dense(3, activation="softmax")(layers.Flatten()(y + 1.0)))
    model.compile("adam", "sparse_categorical_crossentropy")
    first, again = (model_fingerprint(admitted(model)) for _ in range(2))
    assert first == again
    model.get_layer(index=1).kernel.assign(np.zeros((3, 3, 1, 4)))
    assert model_fingerprint(admitted(model)) != first


def test_a_search_is_not_lost_where_its_model_cannot_be_handed_back(model, monkeypatch):
    def fails(*_):
        raise rls.ModelError("The copy differs.")

    monkeypatch.setattr("rl_sparsity_tf.search.result.handed_back", fails)
    result = searched(model, rls.Target(sparsity=0.6))
    assert isinstance(result.model, keras.Model)
    warning = "the model is handed back as one of tf_keras: ModelError: The copy differs"
    assert warning in result.metrics["warnings"]


def test_a_search_of_channels_hands_back_a_narrower_model(model):
    result = searched(model, rls.Target(macs=0.6))
    assert isinstance(result.model, keras3.Sequential)
    assert result.model.count_params() < model.count_params()
    assert rls.count_macs(result.model) <= 0.6 * rls.count_macs(model)


_USER = """
import os, sys
import tensorflow as tf
from tensorflow import keras
import rl_sparsity_tf as rls
import numpy as np
assert keras.__version__.startswith("3.") and "TF_USE_LEGACY_KERAS" not in os.environ
model = keras.Sequential([
    keras.layers.Input((6,)), keras.layers.Dense(16, activation="relu"),
    keras.layers.Dense(3, activation="softmax"),
])
model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
x = np.random.default_rng(0).normal(size=(128, 6)).astype("float32")
y = (x[:, 0] > 0).astype(int) + (x[:, 1] > 0)
model.fit(x, y, epochs=2, verbose=0)
model.save(sys.argv[1] + "/dense.keras")
result = rls.Compressor(model, rls.Target(sparsity=0.5), agent="dqn").search(
    (x, y), validation_data=(x, y), episodes=1, finetune_epochs=1, verbose=0
)
assert isinstance(result.model, keras.Model)
result.export_tflite(sys.argv[1] + "/model.tflite")
of_file = rls.predict_tflite(sys.argv[1] + "/model.tflite", x)
gap = np.abs(of_file - result.model.predict(x, verbose=0)).max()
assert gap < 0.05, gap
assert "TF_USE_LEGACY_KERAS" not in os.environ
result.model.save(sys.argv[1] + "/small.keras")
"""
_WITHOUT_US = """
import sys, keras
model = keras.saving.load_model(sys.argv[1] + "/small.keras")
assert model.compiled and "rl_sparsity_tf" not in sys.modules and "tf_keras" not in sys.modules
"""


@pytest.mark.slow
def test_the_imports_that_users_have_and_no_variable(tmp_path):
    environment = {"PATH": "/usr/bin:/bin", "TF_CPP_MIN_LOG_LEVEL": "3"}
    for script in (_USER, _WITHOUT_US):
        command = [sys.executable, "-c", script, str(tmp_path)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
    x, y = np.ones((64, 6), "float32"), np.arange(64) % 3
    np.savez(tmp_path / "data.npz", x_train=x, y_train=y, x_validation=x, y_validation=y)
    command = [sys.executable, "-m", "rl_sparsity_tf.cli", "compress"]
    command += [str(tmp_path / "dense.keras"), "--data", str(tmp_path / "data.npz")]
    command += ["--output", str(tmp_path / "run"), "--episodes", "1", "--finetune-epochs", "1"]
    command += ["--target-sparsity", "0.5"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert isinstance(keras3.saving.load_model(tmp_path / "run" / "model.keras"), keras3.Model)
