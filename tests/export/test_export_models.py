"""Exporting the models that people have: recurrent, subclassed, of other precision."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
import tf_keras as keras
import zoo
from fake_plans import plan_for

from rl_sparsity_tf.errors import ArgumentError, ExportError, VerificationError
from rl_sparsity_tf.export.export import export_tflite, predict_tflite
from rl_sparsity_tf.export.matching import kernel_variables, match_kernels
from rl_sparsity_tf.export.saved_model import conversion_error
from rl_sparsity_tf.export.verification import TOLERANCES, compare_outputs
from rl_sparsity_tf.layers.kernel_spec import INTEGER_MODES
from rl_sparsity_tf.layers.kernels import find_kernels
from rl_sparsity_tf.layers.structure import recurrent_layers
from rl_sparsity_tf.tflite.reading import read_tensors
from rl_sparsity_tf.tflite.worker import WorkerError, shared_worker

layers = keras.layers


def rows_for(model, count=12):
    rng = np.random.default_rng(0)
    return [
        rng.normal(size=(count, *tensor.shape[1:])).astype(np.float32) for tensor in model.inputs
    ]


def assert_same_as_keras(path, model, inputs=None, atol=1e-4):
    inputs = rows_for(model) if inputs is None else inputs
    outputs = predict_tflite(path, inputs)
    outputs = outputs if isinstance(outputs, list) else [outputs]
    expected = model(inputs if len(inputs) > 1 else inputs[0], training=False)
    for output, wanted in zip(outputs, tf.nest.flatten(expected), strict=True):
        np.testing.assert_allclose(output, np.asarray(wanted), atol=atol)


# Recurrent layers


def initial_state():
    inputs = keras.Input((5, 3))
    sequence, *states = layers.LSTM(4, return_sequences=True, return_state=True)(inputs)
    x = layers.LSTM(4, go_backwards=True)(sequence, initial_state=states)
    return keras.Model(inputs, layers.Dense(3)(x))


def shared_in_a_nested_model():
    recurrent = layers.GRU(4, name="shared")
    block = keras.Sequential([layers.Input((5, 3)), recurrent], name="block")
    inputs = keras.Input((5, 3))
    return keras.Model(inputs, layers.Add()([block(inputs), recurrent(-inputs)]))


class Recurrent(layers.Layer):
    """A layer of one's own around a recurrent one."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.inner = layers.GRU(4)

    def call(self, inputs):
        return self.inner(inputs) * 2.0


RECURRENT = {
    "lstm": lambda: zoo_like(layers.LSTM(4)),
    "recurrent_dropout": lambda: zoo_like(layers.LSTM(4, recurrent_dropout=0.5)),
    "gru": lambda: zoo_like(layers.GRU(4, reset_after=False)),
    "rnn": lambda: zoo_like(layers.RNN([layers.LSTMCell(4), layers.GRUCell(5)])),
    "bidirectional": lambda: zoo_like(
        layers.Bidirectional(layers.LSTM(4, return_sequences=True)),
        layers.Bidirectional(layers.SimpleRNN(3), merge_mode="sum"),
    ),
    "initial_state": initial_state,
    "shared": shared_in_a_nested_model,
    "custom": lambda: zoo_like(Recurrent()),
    "time_distributed": lambda: keras.Sequential(
        [layers.Input((2, 5, 3)), layers.TimeDistributed(layers.LSTM(4))]
    ),
}


def switches(layer):
    return layer.unroll, layer.stateful, getattr(layer, "_could_use_gpu_kernel", None)


def zoo_like(*recurrent):
    return keras.Sequential([layers.Input((5, 3)), *recurrent, layers.Dense(3)])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "unroll"),
    [
        *((name, False) for name in RECURRENT),
        *((name, True) for name in ("lstm", "rnn", "initial_state", "shared", "custom")),
    ],
)
def test_recurrent_models_are_exported_with_one_row_or_unrolled(name, unroll, tmp_path):
    model = RECURRENT[name]()
    kept = [switches(layer) for layer in recurrent_layers(model)]
    path = tmp_path / "m.tflite"
    report = export_tflite(model, path, "none", unroll=unroll)
    assert report.batch_size == (None if unroll else 1)
    assert any("1 row per call" in note for note in report.notes) != unroll
    assert_same_as_keras(path, model)
    assert [switches(layer) for layer in recurrent_layers(model)] == kept
    assert {t.kernel for t in report.tensors} - {None} == set(kernel_variables(model))


@pytest.mark.slow
def test_an_open_number_of_time_steps_and_masks_work_with_one_row(tmp_path):
    model = keras.Sequential(
        [
            layers.Input((None,), dtype="int32"),
            layers.Embedding(9, 4, mask_zero=True),
            layers.LSTM(4),
        ]
    )
    report = export_tflite(model, tmp_path / "m.tflite", "none")
    assert report.batch_size == 1
    with pytest.raises(ArgumentError, match="needs a fixed number of time steps"):
        export_tflite(model, tmp_path / "n.tflite", "none", unroll=True)


def test_a_stateful_layer_starts_afresh_and_keeps_its_state_in_keras(tmp_path):
    inputs = keras.Input((5, 3), batch_size=2)
    model = keras.Model(inputs, layers.GRU(4, stateful=True)(inputs))
    model(np.ones((2, 5, 3), np.float32))
    state = model.layers[1].states[0].numpy()
    report = export_tflite(model, tmp_path / "m.tflite", "none")
    assert report.batch_size == 2
    assert any("gru is stateful in Keras" in note for note in report.notes)
    np.testing.assert_array_equal(model.layers[1].states[0].numpy(), state)
    assert model.layers[1].stateful


def test_what_cannot_be_unrolled_is_named(tmp_path):
    path = tmp_path / "m.tflite"
    with pytest.raises(ArgumentError, match="has no recurrent layer"):
        export_tflite(zoo.dense(), path, "none", unroll=True)
    model = keras.Sequential([layers.Input((2, 4, 4, 1)), layers.ConvLSTM2D(2, 3)])
    with pytest.raises(ArgumentError, match=r"'conv_lstm2d' \(ConvLSTM2D\)"):
        export_tflite(model, path, "none", unroll=True)
    with pytest.raises(ArgumentError, match="unroll='yes'"):
        export_tflite(zoo_like(layers.GRU(4)), path, "none", unroll="yes")


def test_a_crash_over_recurrent_layers_names_them_and_the_way_out(tmp_path, monkeypatch):
    model = zoo_like(layers.Bidirectional(layers.GRU(4, name="steps")))
    x = np.zeros((4, 5, 3), np.float32)

    def crash(*_):
        raise WorkerError("The conversion process ended.", "died", "")

    monkeypatch.setattr(shared_worker(), "convert", crash)
    path = tmp_path / "m.tflite"
    with pytest.raises(ExportError, match=r"converter crashed .*'forward_steps' \(GRU\)") as caught:
        export_tflite(model, path, "int8", representative_data=x)
    assert "quantization='dynamic'" in str(caught.value)
    assert "unroll=True" in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    convolutional = keras.Sequential([layers.Input((2, 4, 4, 1)), layers.ConvLSTM2D(2, 3)])
    error = conversion_error(convolutional, "int8", WorkerError("", "died", ""))
    assert "unroll" not in str(error)


# Subclassed models


class Subclassed(keras.Model):
    """Takes and gives dicts, holds layers in a list, and owns a weight itself."""

    def __init__(self):
        super().__init__()
        self.blocks = [layers.Dense(6, activation="relu"), layers.Dense(4)]
        self.table = self.add_weight("table", (4, 5))

    def call(self, inputs):
        x = tf.concat([inputs["b"], inputs["a"]], axis=-1)
        for block in self.blocks:
            x = block(x)
        return {"y": x, "aux": (tf.matmul(x, self.table), None)}


def test_a_subclassed_model_with_dicts_is_exported(tmp_path):
    model = Subclassed()
    rng = np.random.default_rng(0)
    inputs = {
        "b": rng.normal(size=(6, 3)).astype(np.float32),
        "a": rng.normal(size=(6, 2)).astype(np.float32),
    }
    expected = model(inputs)
    path = tmp_path / "m.tflite"
    report = export_tflite(model, path, "none", representative_data=inputs)
    outputs = predict_tflite(path, [inputs["a"], inputs["b"]])
    np.testing.assert_allclose(outputs[0], expected["aux"][0], atol=1e-5)
    np.testing.assert_allclose(outputs[1], expected["y"], atol=1e-5)
    assert len({tensor.kernel for tensor in report.tensors} - {None}) == 3
    planned = export_tflite(model, path, plan=plan_for(model), overwrite=True)
    assert {tensor.dtype for tensor in planned.tensors if tensor.kernel} == {"int8"}


@pytest.mark.slow
def test_a_subclassed_recurrent_model_is_unrolled_too(tmp_path):
    class Tagger(keras.Model):
        def __init__(self):
            super().__init__()
            self.recurrent = layers.Bidirectional(layers.LSTM(4))
            self.head = layers.Dense(3)

        def call(self, inputs):
            return self.head(self.recurrent(inputs))

    model = Tagger()
    x = np.random.default_rng(0).normal(size=(3, 5, 2)).astype(np.float32)
    expected = model(x)
    for unroll in (False, True):
        path = tmp_path / f"{unroll}.tflite"
        assert export_tflite(model, path, "none", unroll=unroll).batch_size != unroll
        np.testing.assert_allclose(predict_tflite(path, x), expected, atol=1e-5)


# Precision


def mixed_model():
    inputs = keras.Input((3, 8))
    x = layers.MultiHeadAttention(2, 4)(inputs, inputs)
    x = layers.Bidirectional(layers.GRU(4, return_sequences=True, unroll=True))(x)
    block = keras.Sequential([layers.Input((3, 8)), layers.TimeDistributed(layers.Dense(5))])
    x = layers.BatchNormalization()(layers.LayerNormalization()(block(x)))
    return keras.Model(inputs, layers.Activation("softmax", dtype="float32")(layers.Flatten()(x)))


@pytest.fixture
def policy(request):
    before = keras.mixed_precision.global_policy()
    keras.mixed_precision.set_global_policy(request.param)
    yield request.param
    keras.mixed_precision.set_global_policy(before)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"], indirect=True)
def test_a_mixed_precision_model_is_exported_in_float32(policy, tmp_path):
    model = mixed_model()
    policies = [layer.dtype_policy.name for layer in model._flatten_layers()]
    assert policy in policies
    path = tmp_path / "m.tflite"
    report = export_tflite(model, path, plan=plan_for(model))
    assert any(f"the model's policy is {policy}" in note for note in report.notes)
    assert "int8" in {tensor.dtype for tensor in report.tensors if tensor.kernel}
    assert policies == [layer.dtype_policy.name for layer in model._flatten_layers()]
    export_tflite(model, path, "none", overwrite=True)
    # 16-bit sums in Keras, 32-bit ones in the file.
    assert_same_as_keras(path, model, atol=2e-2)


@pytest.mark.parametrize("policy", ["float64"], indirect=True)
def test_a_float64_model_is_rebuilt_in_float32(policy, tmp_path):
    model = mixed_model()
    assert {variable.dtype for variable in model.weights} == {tf.float64}
    path = tmp_path / "m.tflite"
    report = export_tflite(model, path, "none")
    assert any("the weights are float64 in Keras" in note for note in report.notes)
    assert keras.mixed_precision.global_policy().name == policy
    assert keras.backend.floatx() == "float32"
    assert_same_as_keras(path, model)


@pytest.mark.parametrize("policy", ["float64"], indirect=True)
def test_a_float64_model_that_cannot_be_rebuilt_is_refused(policy, tmp_path):
    class Plain(keras.Model):
        def __init__(self):
            super().__init__()
            self.head = layers.Dense(3)

        def call(self, inputs):
            return self.head(inputs)

    model = Plain()
    model(np.zeros((2, 4)))
    with pytest.raises(ExportError, match=rf"weights of type {policy}.*Build it with dtype"):
        export_tflite(model, tmp_path / "m.tflite", "none")

    class Fixed(layers.Dense):
        def __init__(self):
            super().__init__(3)

    model = keras.Sequential([layers.Input((4,)), Fixed()])
    with pytest.raises(ExportError, match="A float32 copy could not be made"):
        export_tflite(model, tmp_path / "m.tflite", "none")


# Outputs that are no class scores


def test_outputs_that_are_no_rows_are_refused(tmp_path):
    inputs = keras.Input((4,))
    model = keras.Model(inputs, tf.reduce_sum(layers.Dense(3)(inputs)))
    with pytest.raises(ExportError, match=r"Output 0 of model 'model' has the shape \(\)"):
        export_tflite(model, tmp_path / "m.tflite", "none")

    class Ragged(keras.Model):
        def call(self, inputs):
            return tf.RaggedTensor.from_tensor(inputs)

    ragged = Ragged()
    ragged(np.zeros((2, 4), np.float32))
    with pytest.raises(ExportError, match="output 0 is a RaggedTensor, not a dense tensor"):
        export_tflite(ragged, tmp_path / "m.tflite", "none")
    assert list(tmp_path.iterdir()) == []


def test_ids_given_as_floats_are_refused_in_int8(tmp_path):
    model = keras.Sequential([layers.Input((7,), name="words"), layers.Embedding(9, 2)])
    x = np.zeros((4, 7), np.float32)
    with pytest.raises(ArgumentError, match=r"input 'words' .* an Embedding's ids as floats"):
        export_tflite(model, tmp_path / "m.tflite", "int8", representative_data=x)


def test_only_one_of_ranking_and_difference_has_to_hold_in_int8():
    int8 = TOLERANCES["int8"]
    wanted = np.array([[0.0, 100.0], [100.0, 0.0]])
    compare_outputs([wanted * 0.1], [wanted], int8, "here")  # clipped, ranked alike
    level = np.array([[50.0, 51.0], [0.0, 100.0]])
    compare_outputs([level[:, ::-1] * [[1], [0]] + level * [[0], [1]]], [level], int8, "here")
    with pytest.raises(
        VerificationError, match=r"1 of the output range 100, and its largest value is"
    ):
        compare_outputs([wanted[::-1]], [wanted], int8, "here")
    flat = np.array([[10.0, 12.0], [12.0, 10.0], [0.0, 0.0]])
    with pytest.raises(VerificationError, match=r"in 33\.3% of the 3 rows\. Expected"):
        compare_outputs([flat[:, ::-1] * 2.0], [flat], int8, "here")


@pytest.mark.parametrize("quantization", ["none", "dynamic", "float16", "int8", "plan"])
@pytest.mark.parametrize("kind", ["autoencoder", "multi_label"])
def test_autoencoders_and_many_labels_are_exported_in_every_mode(kind, quantization, tmp_path):
    keras.utils.set_random_seed(0)
    last = layers.Dense(16) if kind == "autoencoder" else layers.Dense(16, activation="sigmoid")
    model = keras.Sequential([layers.Input((16,)), layers.Dense(64, activation="relu"), last])
    (x,) = rows_for(model, 64)
    export_tflite(
        model,
        tmp_path / "m.tflite",
        quantization,
        plan=plan_for(model) if quantization == "plan" else None,
        representative_data=x,
    )


# How kernels are stored


def single(layer, *shape, dtype="float32"):
    return keras.Sequential([layers.Input(shape, dtype=dtype), layer])


def attention():
    inputs = keras.Input((6, 32))
    return keras.Model(inputs, layers.MultiHeadAttention(4, 16)(inputs, inputs))


ALL_MODES = ("plan8", "plan4", "dynamic", "int8", "float16")
# (kind, unrolled, model, modes): few modes where converting takes long.
MEASURED = {
    "einsum_dense": (
        "fully_connected",
        False,
        lambda: single(layers.EinsumDense("abc,cde->abde", (None, 4, 16)), 6, 40),
        ALL_MODES,
    ),
    "time_distributed": (
        "fully_connected",
        False,
        lambda: single(layers.TimeDistributed(layers.Dense(32)), 6, 40),
        ALL_MODES,
    ),
    "attention": ("fully_connected", False, attention, ALL_MODES),
    "embedding": (
        "gather",
        False,
        lambda: single(layers.Embedding(64, 32), 7, dtype="int32"),
        ALL_MODES,
    ),
    "lstm": ("lstm", False, lambda: single(layers.LSTM(32), 3, 32), ALL_MODES),
    "bidirectional": (
        "lstm",
        False,
        lambda: single(layers.Bidirectional(layers.LSTM(32)), 3, 32),
        ("plan8", "dynamic"),
    ),
    "gru": (
        "recurrent_loop",
        False,
        lambda: single(layers.GRU(32), 3, 32),
        ("plan8", "plan4", "dynamic"),
    ),
    "unrolled_lstm": (
        "fully_connected",
        True,
        lambda: single(layers.LSTM(32), 3, 32),
        ("plan8", "int8"),
    ),
    "unrolled_gru": (
        "fully_connected",
        True,
        lambda: single(layers.GRU(32), 3, 32),
        ("plan8", "int8"),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MEASURED)
def test_kernels_are_stored_as_the_table_says(name, tmp_path):
    kind, unroll, make, modes = MEASURED[name]
    keras.utils.set_random_seed(0)
    model = make()
    if kind == "gather":
        shape = (16, *model.input_shape[1:])
        inputs = np.random.default_rng(0).integers(0, 64, shape, dtype=np.int32)
    else:
        (inputs,) = rows_for(model, 16)
    kernels = {path: variable.numpy() for path, variable in kernel_variables(model).items()}
    assert set(kernels) == {kernel.path for kernel in find_kernels(model)}
    assert min(kernel.size for kernel in kernels.values()) >= 1024
    for mode in modes:
        expected = INTEGER_MODES[kind][mode]
        path = tmp_path / f"{mode}.tflite"
        bits = {"plan8": 8, "plan4": 4}.get(mode)
        export_tflite(
            model,
            path,
            "plan" if bits else mode,
            plan=plan_for(model, bits) if bits else None,
            representative_data=inputs,
            unroll=unroll,
        )
        for kernel_path, held in match_kernels(kernels, read_tensors(path)).items():
            assert len(held) == expected.tensors, (mode, kernel_path)
            for match in held:
                # All these operators keep the outputs on the first axis.
                scales = {"none": 0, "tensor": 1, "channel": match.tensor.shape[0]}
                stored = (match.tensor.dtype, match.tensor.scales.size)
                assert stored == (expected.dtype, scales[expected.scales]), (mode, kernel_path)


@pytest.mark.parametrize("seed", [2, 3])
def test_kernels_of_one_input_are_told_apart_by_their_names(tmp_path, seed):
    """Up to one factor per channel they all fit each other; one has zeros that others lack."""
    inputs = keras.Input((4, 4, 1))
    x = inputs
    for name in ("one", "two", "three"):
        x = keras.layers.Conv2D(6, 1, use_bias=False, name=name)(x)
        x = keras.layers.BatchNormalization(name=f"norm_{name}")(x)
        x = keras.layers.ReLU()(x)
        x = keras.layers.Conv2D(1, 1, name=f"sum_{name}")(x)
    model = keras.Model(inputs, keras.layers.Flatten()(x))
    rng = np.random.default_rng(seed)
    for weight in model.weights:
        weight.assign(rng.uniform(0.5, 1.5, weight.shape))
    kernel = model.get_layer("two").kernel
    kernel.assign(kernel.numpy() * [1, 0, 1, 0, 1, 1])
    rows = rng.normal(size=(64, 4, 4, 1)).astype(np.float32)
    report = export_tflite(
        model, tmp_path / "m.tflite", "int8", representative_data=rows, tolerance=1.0
    )
    found = {tensor.kernel: tensor.zeros for tensor in report.tensors if tensor.kernel}
    assert found["two/kernel"] >= 2
    assert found["one/kernel"] == found["three/kernel"] == 0


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("quantization", ["none", "dynamic"])
def test_a_batch_norm_before_a_dense_layer_may_scale_its_inputs(quantization, outputs, tmp_path):
    """TFLite's converter multiplies the kernel's rows with its factors, which differ a lot here."""
    rng = np.random.default_rng(0)
    first, last = layers.Dense(16, "relu", name="first"), layers.Dense(outputs, name="last")
    norm = layers.BatchNormalization()
    model = keras.Sequential([layers.Input((6,)), first, norm, last])
    kernel = rng.normal(size=(16, outputs)) * (rng.random((16, outputs)) < 0.5)
    last.set_weights([kernel, rng.normal(size=outputs)])  # without a bias nothing is folded
    gamma, variance = np.exp(rng.uniform(-2, 2, 16)), np.exp(rng.uniform(-2, 2, 16))
    norm.set_weights([gamma, rng.normal(size=16), rng.normal(size=16), variance])
    rows = rng.normal(size=(50, 6)).astype(np.float32)
    path = tmp_path / "model.tflite"
    report = export_tflite(model, path, quantization, representative_data=rows)
    assert {tensor.kernel for tensor in report.tensors} >= {"first/kernel", "last/kernel"}
    (held,) = match_kernels({"last/kernel": kernel}, read_tensors(path))["last/kernel"]
    stored = held.values(kernel)
    assert not stored[kernel == 0].any()
    factors = gamma / np.sqrt(variance + norm.epsilon)
    np.testing.assert_allclose(stored, kernel * factors[:, None], atol=0.01 * np.abs(stored).max())
    # Another kernel of the same shape is not this one, whatever its inputs are scaled by.
    if outputs > 1:
        other = rng.normal(size=kernel.shape)
        assert not match_kernels({"last/kernel": other}, read_tensors(path))["last/kernel"]
