"""Model files: what loads, and what is refused before Keras opens it."""

import json
import shutil
import zipfile

import h5py
import numpy as np
import pytest
import tensorflow as tf
import tf_keras as keras

from rl_sparsity_tf.errors import ModelError
from rl_sparsity_tf.layers.loading import load_model

FORMATS = ["model.keras", "model.h5", "folder"]


def small_model(*extra):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((4,))
    outputs = keras.layers.Dense(3, activation="relu")(inputs)
    for layer in extra:
        outputs = layer(outputs)
    return keras.Model(inputs, keras.layers.Dense(2)(outputs))


def rows():
    return np.linspace(-1, 1, 20, dtype=np.float32).reshape(5, 4)


def rewrite_keras_config(path, change):
    """Edits config.json of a .keras file; everything else is copied."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    config = json.loads(members["config.json"])
    change(config)
    members["config.json"] = json.dumps(config).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)


def refusal(path, **kwargs):
    with pytest.raises(ModelError) as info:
        load_model(path, **kwargs)
    message = str(info.value)
    assert "\n" not in message
    return message


@keras.saving.register_keras_serializable(package="rl_sparsity_tf_tests")
class RegisteredScale(keras.layers.Layer):
    def call(self, inputs):
        return inputs * 2.0


class UnregisteredScale(keras.layers.Layer):
    def build(self, input_shape):
        self.scale = self.add_weight("scale", shape=())

    def call(self, inputs):
        return inputs * self.scale


@pytest.mark.parametrize("name", FORMATS)
def test_a_saved_model_predicts_the_same(tmp_path, name):
    model = small_model()
    model.save(tmp_path / name)
    loaded = load_model(tmp_path / name)
    assert isinstance(loaded, keras.Model)
    np.testing.assert_array_equal(
        loaded.predict(rows(), verbose=0), model.predict(rows(), verbose=0)
    )


@pytest.mark.parametrize("name", FORMATS)
def test_a_compiled_model_comes_back_compiled_and_an_uncompiled_one_does_not(tmp_path, name):
    model = small_model()
    model.save(tmp_path / f"plain_{name}")
    assert getattr(load_model(tmp_path / f"plain_{name}"), "loss", None) is None
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.save(tmp_path / name)
    assert load_model(tmp_path / name).loss is not None


@pytest.mark.parametrize("name", FORMATS)
def test_tensorflow_functions_in_a_functional_model_load(tmp_path, name):
    inputs = keras.Input((4,))
    outputs = tf.reshape(tf.nn.relu(inputs) + 1.0, (-1, 2, 2))[:, 0]
    outputs = keras.layers.Activation(tf.nn.silu)(outputs)
    model = keras.Model(inputs, tf.math.reduce_mean(outputs, axis=1))
    model.save(tmp_path / name)
    np.testing.assert_array_equal(load_model(tmp_path / name)(rows()), model(rows()))


@pytest.mark.parametrize("name", FORMATS)
def test_a_registered_class_of_the_user_loads(tmp_path, name):
    small_model(RegisteredScale()).save(tmp_path / name)
    layers = load_model(tmp_path / name).layers
    assert any(isinstance(layer, RegisteredScale) for layer in layers)


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_a_pruned_model_of_the_optimization_toolkit_loads(tmp_path, name):
    from toolkit import tfmot

    model = tfmot.sparsity.keras.prune_low_magnitude(small_model())
    model.save(tmp_path / name)
    loaded = load_model(tmp_path / name)
    np.testing.assert_array_equal(loaded(rows()), model(rows()))


@pytest.mark.parametrize("name", FORMATS)
def test_a_lambda_is_refused_and_never_run(tmp_path, name):
    witness = tmp_path / "witness"
    path = str(witness)
    layer = keras.layers.Lambda(lambda x, path=path: (open(path, "w").close(), x)[1], name="hook")
    small_model(layer).save(tmp_path / name)
    witness.unlink(missing_ok=True)
    message = refusal(tmp_path / name)
    assert "Lambda" in message
    assert "trusted=True" in message
    assert not witness.exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_a_lambda_loads_when_the_file_is_trusted(tmp_path, name):
    model = small_model(keras.layers.Lambda(lambda x: x * 3.0))
    model.save(tmp_path / name)
    np.testing.assert_allclose(load_model(tmp_path / name, trusted=True)(rows()), model(rows()))


def test_a_lambda_inside_a_wrapper_inside_a_model_is_refused(tmp_path):
    inner = keras.Sequential(
        [keras.layers.TimeDistributed(keras.layers.Lambda(lambda x: x), input_shape=(2, 3))]
    )
    keras.Sequential([inner]).save(tmp_path / "model.h5")
    assert "Lambda" in refusal(tmp_path / "model.h5")


def test_bytecode_in_another_layer_than_lambda_is_refused(tmp_path):
    small_model().save(tmp_path / "model.keras")

    def change(config):
        config["config"]["layers"][1]["config"]["residual_fn_type"] = "lambda"

    rewrite_keras_config(tmp_path / "model.keras", change)
    assert "stores a Python function as code" in refusal(tmp_path / "model.keras")


def test_a_lambda_hidden_behind_its_registered_name_is_refused(tmp_path):
    small_model().save(tmp_path / "model.keras")

    def change(config):
        config["config"]["layers"][1].update(class_name="Harmless", registered_name="Lambda")

    rewrite_keras_config(tmp_path / "model.keras", change)
    assert "Lambda" in refusal(tmp_path / "model.keras")


@pytest.mark.parametrize(
    ("module", "function"),
    [
        ("os", "system"),
        ("builtins", "exec"),
        ("keras_evil", "relu"),
        ("tensorflow.python.lib.io.file_io", "delete_recursively"),
        ("tf_keras.src.activations", "os.system"),
    ],
)
def test_a_function_of_a_foreign_module_is_refused(tmp_path, module, function):
    small_model().save(tmp_path / "model.keras")

    def change(config):
        config["config"]["layers"][1]["config"]["activation"] = {
            "module": module,
            "class_name": "function",
            "config": function,
            "registered_name": function,
        }

    rewrite_keras_config(tmp_path / "model.keras", change)
    message = refusal(tmp_path / "model.keras")
    assert f"the function '{function}' of the module '{module}'" in message


@pytest.mark.parametrize("symbol", ["io.write_file", "py_function", "print", "no_such_thing"])
def test_a_layer_that_calls_tensorflow_outside_its_mathematics_is_refused(tmp_path, symbol):
    inputs = keras.Input((4,))
    keras.Model(inputs, tf.nn.relu(inputs)).save(tmp_path / "model.keras")

    def change(config):
        config["config"]["layers"][1]["config"]["function"] = symbol

    rewrite_keras_config(tmp_path / "model.keras", change)
    assert f"calls tf.{symbol}" in refusal(tmp_path / "model.keras")


def test_a_class_method_of_a_foreign_class_is_refused(tmp_path):
    small_model().save(tmp_path / "model.keras")

    def change(config):
        config["config"]["layers"][1].update(
            class_name="ClassMethod",
            config={"name": "x", "cls_symbol": "io.TFRecordWriter", "method_name": "write"},
        )

    rewrite_keras_config(tmp_path / "model.keras", change)
    assert "calls tf.io.TFRecordWriter.write" in refusal(tmp_path / "model.keras")


def test_a_class_of_a_foreign_module_is_refused_before_its_module_is_imported(
    tmp_path, monkeypatch
):
    (tmp_path / "brings_code.py").write_text(
        f"open({str(tmp_path / 'witness')!r}, 'w').close()\nclass Evil: pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    small_model().save(tmp_path / "model.keras")

    def change(config):
        config["config"]["layers"][1].update(
            module="brings_code", class_name="Evil", registered_name="Evil"
        )

    rewrite_keras_config(tmp_path / "model.keras", change)
    message = refusal(tmp_path / "model.keras")
    assert "the class 'Evil' of the module 'brings_code'" in message
    assert "register_keras_serializable" in message
    assert not (tmp_path / "witness").exists()


def test_an_unregistered_class_is_refused_in_every_format(tmp_path):
    model = small_model(UnregisteredScale())
    model.save(tmp_path / "model.keras")
    assert "'UnregisteredScale' of the module" in refusal(tmp_path / "model.keras")
    model.save(tmp_path / "model.h5")
    assert "UnregisteredScale" in refusal(tmp_path / "model.h5")
    model.save(tmp_path / "folder")
    message = refusal(tmp_path / "folder")
    assert "the class 'UnregisteredScale'; this class, or a function it uses, is not" in message
    assert "register_keras_serializable" in message


def test_a_saved_model_whose_graph_writes_files_is_refused(tmp_path):
    target = str(tmp_path / "written")

    @keras.saving.register_keras_serializable(package="rl_sparsity_tf_tests")
    class Writer(keras.layers.Layer):
        def call(self, inputs):
            with tf.control_dependencies([tf.io.write_file(target, "x")]):
                return tf.identity(inputs)

    small_model(Writer()).save(tmp_path / "folder")
    assert "the operation WriteFile" in refusal(tmp_path / "folder")


def test_a_wrapped_model_of_ours_loads(tmp_path):
    from rl_sparsity_tf.layers.wrapper import CompressionWrapper

    model = keras.Sequential([keras.Input((4,)), CompressionWrapper(keras.layers.Dense(3))])
    for name in FORMATS:
        model.save(tmp_path / name)
        loaded = load_model(tmp_path / name)
        assert isinstance(loaded.layers[0], CompressionWrapper)
        np.testing.assert_array_equal(loaded(rows()), model(rows()))


def test_a_missing_path_is_named(tmp_path):
    message = refusal(tmp_path / "nowhere.keras")
    assert "There is no file or folder" in message
    assert "nowhere.keras" in message
    assert ".keras or .h5 file, or a SavedModel folder" in message


def test_a_folder_that_is_no_saved_model_is_refused(tmp_path):
    assert "has no saved_model.pb" in refusal(tmp_path)


def test_an_exported_saved_model_is_refused(tmp_path):
    small_model().export(tmp_path / "exported")
    message = refusal(tmp_path / "exported")
    assert "model.export(), tf.saved_model.save() or Keras 3" in message
    assert "with `import tf_keras as keras`, or from Keras 3 as a .keras" in message


def test_h5_files_of_keras_3_are_refused(tmp_path):
    small_model().save(tmp_path / "model.h5")
    with h5py.File(tmp_path / "model.h5", "r+") as file:
        file.attrs["keras_version"] = "3.8.0"
    message = refusal(tmp_path / "model.h5", trusted=True)
    assert "was written by Keras 3.8.0" in message
    assert "save the model again as model.keras" in message


@pytest.mark.parametrize("name", ["model.keras", "model.h5"])
@pytest.mark.parametrize("share", [0.2, 0.6, 0.97])
def test_a_truncated_file_is_refused(tmp_path, name, share):
    path = tmp_path / name
    small_model().save(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    assert "truncated" in refusal(path)


def test_damaged_weights_in_a_zip_are_refused(tmp_path):
    path = tmp_path / "model.keras"
    small_model().save(path)
    data = bytearray(path.read_bytes())
    middle = data.index(b"\x89HDF") + 2000
    data[middle] ^= 0xFF
    path.write_bytes(data)
    assert "bad checksum of model.weights.h5" in refusal(path)


def test_a_damaged_saved_model_is_refused(tmp_path):
    small_model().save(tmp_path / "folder")
    broken = shutil.copytree(tmp_path / "folder", tmp_path / "broken")
    (broken / "keras_metadata.pb").write_bytes(b"\xff\xff\xff")
    assert "damaged" in refusal(broken)
    broken = shutil.copytree(tmp_path / "folder", tmp_path / "broken_graph")
    (broken / "saved_model.pb").write_bytes(b"\xff\xff\xff")
    assert "damaged" in refusal(broken)
    broken = shutil.copytree(tmp_path / "folder", tmp_path / "no_weights")
    shutil.rmtree(broken / "variables")
    assert "Keras cannot build the model" in refusal(broken)


def test_a_zip_without_a_config_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "model.keras", "w") as archive:
        archive.writestr("readme.txt", "hello")
    assert "without a config.json" in refusal(tmp_path / "model.keras")


def test_a_file_of_weights_only_is_refused(tmp_path):
    small_model().save_weights(tmp_path / "w.h5")
    message = refusal(tmp_path / "w.h5")
    assert "holds weights but no model" in message
    assert "model.load_weights" in message


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("model.tflite", b"\x1c\0\0\0TFL3rest", "a TFLite file"),
        ("model.onnx", b"\x08\x07\x12\x04", "an ONNX file"),
        ("model.pt", b"PK\x03\x04rest", "a PyTorch file"),
        ("model.pth", b"\x80\x02rest", "a PyTorch file"),
        ("graph.pb", b"\x08\x01", "one file of a SavedModel"),
        ("model.zip", b"PK\x03\x04rest", "not called .keras"),
        ("model.h5", b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        ("model.h5", b"<html>", "damaged or mislabelled"),
        ("model.keras", b"", "is empty"),
        ("model.xyz", b"abc", "of an unknown format (.xyz)"),
    ],
)
def test_a_foreign_file_is_named_for_what_it_seems_to_be(tmp_path, name, content, found):
    (tmp_path / name).write_bytes(content)
    message = refusal(tmp_path / name)
    assert found in message
    assert "Expected a .keras or .h5 file" in message


def test_an_unknown_loss_is_explained(tmp_path):
    def my_loss(y_true, y_pred):
        return tf.reduce_mean(y_true - y_pred)

    model = small_model()
    model.compile("sgd", my_loss)
    model.save(tmp_path / "model.h5")
    message = refusal(tmp_path / "model.h5")
    assert "Keras cannot build the model" in message
    assert "register_keras_serializable" in message


def test_a_file_that_holds_a_lone_layer_is_refused(tmp_path):
    path = tmp_path / "model.keras"
    keras.Sequential([keras.layers.Flatten(input_shape=(4,))]).save(path)

    def change(config):
        layer = config["config"]["layers"][1]
        config.clear()
        config.update(layer)

    rewrite_keras_config(path, change)
    assert "holds a Flatten, not a model" in refusal(path)
