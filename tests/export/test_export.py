"""Exporting, verifying and running .tflite files."""

from __future__ import annotations

import gzip
import json

import flatbuffers
import numpy as np
import pytest
import tensorflow as tf
import tf_keras as keras
import zoo
from ai_edge_litert import schema_py_generated as schema
from fake_plans import FakeKernelPlan, FakePlan, plan_for

from rl_sparsity_tf.data.metrics import Score
from rl_sparsity_tf.errors import (
    ArgumentError,
    DataError,
    ExportError,
    FileExistsRLSparsityError,
    ModelError,
    PlanError,
    VerificationError,
)
from rl_sparsity_tf.export import export
from rl_sparsity_tf.export.export import export_tflite, predict_tflite
from rl_sparsity_tf.export.matching import kernel_variables, match_kernels
from rl_sparsity_tf.export.saved_model import conversion_error
from rl_sparsity_tf.export.verification import TOLERANCES, compare_outputs, verify_zeros
from rl_sparsity_tf.tflite.reading import read_tensors
from rl_sparsity_tf.tflite.worker import WorkerError, shared_worker

layers = keras.layers


def prune(model, share=0.6):
    rng = np.random.default_rng(0)
    for variable in kernel_variables(model).values():
        value = variable.numpy()
        value[rng.random(value.shape) < share] = 0
        variable.assign(value)
    return model


def many_inputs():
    """Inputs and outputs whose names sort in another order than Keras's."""
    b, a = keras.Input((4,), name="zz"), keras.Input((6,), name="aa")
    x = layers.Concatenate()([layers.Dense(5, name="db")(b), layers.Dense(5, name="da")(a)])
    outputs = [layers.Dense(3, name="y")(x), layers.Dense(1, name="b")(x)]
    return keras.Model([b, a], outputs)


MODELS = {**zoo.ZOO, "many_inputs": many_inputs}


@pytest.mark.parametrize("name", MODELS)
def test_none_and_plan_match_keras_and_keep_every_zero(name, tmp_path):
    model = prune(MODELS[name]())
    before = [weight.copy() for weight in model.get_weights()]
    plain = export_tflite(model, tmp_path / "float.tflite", "none")
    assert plain.notes == ()
    assert {tensor.dtype for tensor in plain.tensors if tensor.kernel} == {"float32"}
    assert {t.kernel for t in plain.tensors} - {None} == set(kernel_variables(model))
    assert plain.max_abs_difference <= 1e-4 * plain.output_range
    planned = export_tflite(model, tmp_path / "plan.tflite", "plan", plan=plan_for(model))
    assert {t.dtype for t in planned.tensors if t.kernel} == {"int8"}
    # CONV_3D's integers are in no recipe.
    assert len(planned.notes) == (name == "conv3d")
    kernels = {path: variable.numpy() for path, variable in kernel_variables(model).items()}
    for report in (plain, planned):
        tensors = read_tensors(report.path)
        for path, held in match_kernels(kernels, tensors).items():
            zero = kernels[path] == 0
            assert zero.any()
            assert not held[0].values(kernels[path])[zero].any()
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


def test_a_mixed_plan_is_carried_out_kernel_by_kernel(tmp_path):
    model = zoo.residual()
    paths = list(kernel_variables(model))
    plan = plan_for(model, bits=32, **{paths[0]: 8, paths[1]: 4})
    report = export_tflite(model, tmp_path / "m.tflite", plan=plan)
    stored = {tensor.kernel: tensor.dtype for tensor in report.tensors if tensor.kernel}
    assert stored[paths[0]] == "int8"
    assert stored[paths[1]] == "int4"
    assert {stored[path] for path in paths[2:]} == {"float32"}
    assert report.tolerance == TOLERANCES["plan4"].difference


def test_what_cannot_be_an_integer_stays_float_and_is_noted(tmp_path):
    class Scaled(layers.Layer):
        """Multiplies by a weight that no dense layer owns."""

        def build(self, shape):
            self.factors = self.add_weight("factors", (shape[1], shape[2]))

        def call(self, inputs):
            return inputs * self.factors

    model = keras.Sequential([layers.Input((4, 6)), Scaled(name="own")])
    report = export_tflite(model, tmp_path / "m.tflite", plan=plan_for(model, bits=4))
    (note,) = report.notes
    assert "own/factors: stays float32 although the plan wants int4" in note
    assert "no MUL with 4-bit weights and float activations" in note


def test_equal_kernels_planned_differently_stay_float_and_are_noted(tmp_path):
    inputs = keras.Input((6,))
    twins = [layers.Dense(6, name=name, use_bias=False) for name in ("a", "b")]
    model = keras.Model(inputs, twins[0](layers.ReLU()(twins[1](inputs))))
    twins[0].set_weights(twins[1].get_weights())
    plan = plan_for(model, **{"a/kernel": 32})
    report = export_tflite(model, tmp_path / "m.tflite", plan=plan)
    assert "in one tensor with 'a/kernel', an equal kernel" in report.notes[0]


def test_large_buffers_end_up_inside_the_flatbuffer(tmp_path):
    model = keras.Sequential([layers.Input((600,)), layers.Dense(500, name="d")])
    path = tmp_path / "m.tflite"
    export_tflite(model, path, plan=plan_for(model))
    from ai_edge_litert import schema_py_generated as schema

    buffers = schema.ModelT.InitFromPackedBuf(path.read_bytes(), 0).buffers
    assert max(0 if b.data is None else len(b.data) for b in buffers) == 600 * 500
    assert not any(buffer.offset for buffer in buffers)


@pytest.mark.parametrize("quantization", ["dynamic", "float16", "int8"])
def test_converter_modes(quantization, tmp_path):
    model = prune(zoo.residual())
    x = zoo.inputs_for(model, 40)
    path = tmp_path / "m.tflite"
    report = export_tflite(model, path, quantization, representative_data=x)
    stored = {tensor.dtype for tensor in report.tensors if tensor.kernel}
    # Dynamic range leaves tensors of fewer than 1,024 elements alone.
    expected = {"dynamic": "float32", "float16": "float16", "int8": "int8"}
    assert stored == {expected[quantization]}
    probabilities = predict_tflite(path, x)
    assert probabilities.dtype == np.float32
    agreement = np.mean(probabilities.argmax(1) == model.predict(x, verbose=0).argmax(1))
    assert agreement >= 0.95
    # Integers are real values, too, which a quantized input has to convert.
    whole = np.round(2 * x)
    np.testing.assert_array_equal(
        predict_tflite(path, whole.astype(int)), predict_tflite(path, whole)
    )


def test_predict_follows_keras_order_over_partial_batches(tmp_path):
    model = many_inputs()
    rng = np.random.default_rng(0)
    x = [rng.normal(size=(11, size)).astype(np.float32) for size in (4, 6)]
    path = tmp_path / "m.tflite"
    export_tflite(model, path, "none")
    for xnnpack in (True, False):
        outputs = predict_tflite(path, x, batch_size=4, xnnpack=xnnpack)
        for output, expected in zip(outputs, model.predict(x, verbose=0), strict=True):
            np.testing.assert_allclose(output, expected, atol=1e-5)
    with pytest.raises(ArgumentError, match="The file has 2 inputs"):
        predict_tflite(path, x[0])


def test_the_report_is_a_table_and_json(tmp_path):
    model = zoo.dense()
    path = tmp_path / "m.tflite"
    report = export_tflite(model, path, "none")
    assert report.tflite_bytes == path.stat().st_size
    assert report.gzip_bytes == len(gzip.compress(path.read_bytes(), 9, mtime=0))
    assert json.loads(json.dumps(report.to_dict()))["tensors"][0]["shape"]
    lines: list[str] = []
    report.summary(print_fn=lines.append)
    assert any(line.startswith("dense/kernel") and "17x13" in line for line in lines)
    assert "Batch size: any" in lines
    assert f"File: {report.tflite_bytes:,} bytes ({report.gzip_bytes:,} after gzip)" in lines


def test_a_regression_has_no_top1(tmp_path):
    model = keras.Sequential([layers.Input((3,)), layers.Dense(1)])
    assert export_tflite(model, tmp_path / "m.tflite", "none").top1_agreement is None


def test_a_search_result_brings_its_plan(tmp_path):
    model = zoo.dense()
    result = type("Result", (), {"model": model, "plan": plan_for(model)})()
    report = export_tflite(result, tmp_path / "m.tflite")
    assert {tensor.dtype for tensor in report.tensors if tensor.kernel} == {"int8"}


def test_a_model_with_attributes_named_like_a_result_is_a_model(tmp_path):
    model = zoo.dense()
    model.model, model.plan = 1, 2
    with pytest.raises(ArgumentError, match="needs a plan"):
        export_tflite(model, tmp_path / "m.tflite")


def test_a_wrapped_model_is_stripped(tmp_path):
    from rl_sparsity_tf.layers.wrapping import strip, wrap

    wrapped = wrap(zoo.dense())
    path = tmp_path / "m.tflite"
    export_tflite(wrapped, path, "none")
    x = zoo.inputs_for(wrapped, 5)
    expected = strip(wrapped).predict(x, verbose=0)
    np.testing.assert_allclose(predict_tflite(path, x), expected, atol=1e-5)


@pytest.mark.slow
def test_a_recurrent_model_gets_a_batch_of_one_and_then_matches(tmp_path):
    model = prune(keras.Sequential([layers.Input((5, 3)), layers.LSTM(4), layers.Dense(3)]))
    path = tmp_path / "m.tflite"
    report = export_tflite(model, path, "none")
    assert report.batch_size == 1
    assert any("1 row per call" in note for note in report.notes)
    assert not any("reset_all_variables" in note for note in report.notes)
    x = np.random.default_rng(0).normal(size=(7, 5, 3)).astype(np.float32)
    np.testing.assert_allclose(predict_tflite(path, x), model.predict(x, verbose=0), atol=1e-5)
    asked = export_tflite(model, tmp_path / "n.tflite", "none", batch_size=2)
    assert asked.batch_size == 2
    assert not any("per call" in note for note in asked.notes)


def test_a_loop_of_ones_own_needs_a_fixed_batch():
    error = WorkerError("", "ConverterError", "TensorListReserve needs a static shape")
    assert "Pass batch_size=1" in str(conversion_error(zoo.dense(), "none", error))


def test_operations_without_a_builtin_are_named(tmp_path):
    inputs = keras.Input((4, 4))
    model = keras.Model(inputs, layers.Lambda(tf.linalg.det)(inputs))
    with pytest.raises(ExportError, match="MatrixDeterminant"):
        export_tflite(model, tmp_path / "m.tflite", "none")


def test_other_conversion_errors_give_the_reason_not_the_graph():
    model = zoo.dense()
    text = "loc(x): error: this went wrong\nmodule { ... }"
    error = conversion_error(model, "int8", WorkerError("", "ConverterError", text))
    assert "quantization='int8': ConverterError: this went wrong. Try" in str(error)
    flex = WorkerError("", "ConverterError", "Some ops are not supported\nFlex ops: FlexFoo\n")
    assert "builtins lack: Flex ops: FlexFoo." in str(conversion_error(model, "none", flex))


def test_a_mismatch_leaves_no_file_and_an_old_one_untouched(tmp_path, monkeypatch):
    model = zoo.dense()
    real = export.reference_outputs
    monkeypatch.setattr(
        export, "reference_outputs", lambda *a: [np.roll(out, 1, axis=1) for out in real(*a)]
    )
    with pytest.raises(VerificationError, match=r"clearly decided|differs from Keras"):
        export_tflite(model, tmp_path / "m.tflite", "none")
    assert list(tmp_path.iterdir()) == []
    old = tmp_path / "old.tflite"
    old.write_bytes(b"old")
    with pytest.raises(VerificationError):
        export_tflite(model, old, "none", overwrite=True)
    assert old.read_bytes() == b"old"


def test_a_file_damaged_after_conversion_is_not_delivered(tmp_path, monkeypatch):
    model = zoo.dense()
    convert = shared_worker().convert

    def damaged(saved_model, output, *rest):
        convert(saved_model, output, *rest)
        content = bytearray(output.read_bytes())
        kernel = next(iter(kernel_variables(model).values())).numpy().T.tobytes()
        start = bytes(content).index(kernel)
        content[start : start + len(kernel)] = np.ones(len(kernel) // 4, np.float32).tobytes()
        output.write_bytes(content)

    monkeypatch.setattr(shared_worker(), "convert", damaged)
    with pytest.raises(VerificationError):
        export_tflite(model, tmp_path / "m.tflite", "none")
    assert list(tmp_path.iterdir()) == []


def test_lost_zeros_are_found(tmp_path):
    model = zoo.dense()
    path = tmp_path / "m.tflite"
    export_tflite(model, path, "none")
    tensors = read_tensors(path)
    kernels = {name: variable.numpy() for name, variable in kernel_variables(model).items()}
    assert verify_zeros(kernels, match_kernels(kernels, tensors), tensors) == []
    kernels["dense/kernel"][2, 3] = 0
    with pytest.raises(VerificationError, match="1 of the 1 zeros of the kernel 'dense/kernel'"):
        verify_zeros(kernels, match_kernels(kernels, tensors), tensors)
    kernels["dense/kernel"][:] = 0
    with pytest.raises(VerificationError, match="no tensor of the exported file holds its values"):
        verify_zeros(kernels, match_kernels(kernels, tensors), tensors)
    notes = verify_zeros({"gone": np.zeros((2, 2))}, {"gone": ()}, tensors)
    assert "gone: not found in the file" in notes[0]


def test_outputs_are_compared_relative_to_their_range():
    wanted = [np.array([[0.0, 100.0], [50.0, 0.0]])]
    close = compare_outputs([wanted[0] + 0.005], wanted, TOLERANCES["none"], "here")
    assert close.output_range == 100
    assert close.top1_agreement == 1
    with pytest.raises(VerificationError, match=r"here\) differs from Keras by up to 0.02"):
        compare_outputs([wanted[0] + 0.02], wanted, TOLERANCES["none"], "here")
    with pytest.raises(VerificationError, match=r"is Keras's in 0\.0% of the 1 rows"):
        compare_outputs([wanted[0][::-1]], wanted, TOLERANCES["int8"], "here")
    with pytest.raises(VerificationError, match="contains NaN"):
        compare_outputs([wanted[0] * np.nan], wanted, TOLERANCES["none"], "here")
    with pytest.raises(VerificationError, match="Keras model's own output 0"):
        compare_outputs(wanted, [wanted[0] * np.nan], TOLERANCES["none"], "here")
    with pytest.raises(VerificationError, match="outputs of the shapes"):
        compare_outputs([wanted[0][:1]], wanted, TOLERANCES["none"], "here")


def test_arguments_are_checked_before_any_work(tmp_path, monkeypatch):
    def no_work(*_):
        raise AssertionError("work was begun")

    monkeypatch.setattr(export, "write_saved_model", no_work)
    model = zoo.dense()
    path = tmp_path / "m.tflite"
    with pytest.raises(ArgumentError, match="Did you mean 'dynamic'"):
        export_tflite(model, path, "dynamik")
    with pytest.raises(ArgumentError, match=r"ends in '\.lite'"):
        export_tflite(model, tmp_path / "m.lite", "none")
    with pytest.raises(ArgumentError, match=r"does not exist\. Create it first"):
        export_tflite(model, tmp_path / "no" / "m.tflite", "none")
    with pytest.raises(ArgumentError, match="is a folder"):
        export_tflite(model, tmp_path, "none")
    with pytest.raises(ArgumentError, match="needs a plan"):
        export_tflite(model, path)
    with pytest.raises(ArgumentError, match="needs representative_data"):
        export_tflite(model, path, "int8")
    with pytest.raises(ArgumentError, match="tolerance=-1"):
        export_tflite(model, path, "none", tolerance=-1)
    with pytest.raises(ArgumentError, match="batch_size=0"):
        export_tflite(model, path, "none", batch_size=0)
    with pytest.raises(ArgumentError, match="fewer than one batch of 8"):
        export_tflite(
            model, path, "int8", representative_data=zoo.inputs_for(model, 4), batch_size=8
        )
    with pytest.raises(ModelError, match="not built"):
        export_tflite(keras.Sequential([layers.Dense(2)]), path, "none")
    fixed = keras.Sequential([layers.Input((3,), batch_size=2), layers.Dense(2)])
    with pytest.raises(ArgumentError, match="Leave batch_size out"):
        export_tflite(fixed, path, "none", batch_size=1)
    wrong = FakePlan({"dense/kernel": FakeKernelPlan("dense/kernel", (1, 2), 8)})
    with pytest.raises(PlanError, match=r"gives the kernel 'dense/kernel' the shape \(1, 2\)"):
        export_tflite(model, path, plan=wrong)
    path.write_bytes(b"there")
    with pytest.raises(FileExistsRLSparsityError, match="pass overwrite=True"):
        export_tflite(model, path, "none")


def test_a_model_that_cannot_be_traced_says_so(tmp_path):
    inputs = keras.Input((4,))
    model = keras.Model(inputs, layers.Lambda(lambda x: tf.reshape(x, (2, 8)))(inputs))
    with pytest.raises(
        ExportError, match=r"cannot be traced for batches of 3: .*12 .*16.* Check that it runs"
    ):
        export_tflite(model, tmp_path / "m.tflite", "none", batch_size=3)


def test_predict_refuses_what_it_cannot_run(tmp_path):
    path = tmp_path / "m.tflite"
    with pytest.raises(ArgumentError, match="There is no file"):
        predict_tflite(path, np.zeros((1, 2)))
    path.write_bytes(b"not a model")
    with pytest.raises(ArgumentError, match=r"m\.tflite is not a \.tflite file: its bytes 4 to 8"):
        predict_tflite(path, np.zeros((1, 2)))
    model = keras.Sequential([layers.Input((2,)), layers.Dense(2)])
    export_tflite(model, path, "none", overwrite=True)
    unsigned = schema.ModelT.InitFromPackedBuf(path.read_bytes(), 0)
    unsigned.signatureDefs = []
    builder = flatbuffers.Builder(1024)
    builder.Finish(unsigned.Pack(builder), file_identifier=b"TFL3")
    (tmp_path / "unsigned.tflite").write_bytes(bytes(builder.Output()))
    with pytest.raises(ExportError, match=r"run failed: .*0 signatures, expected one"):
        predict_tflite(tmp_path / "unsigned.tflite", np.zeros((1, 2)))
    with pytest.raises(ArgumentError, match="at least one row"):
        predict_tflite(path, np.zeros((0, 2)))
    with pytest.raises(ArgumentError, match="same number of rows"):
        predict_tflite(path, [np.zeros((1, 2)), np.zeros((2, 2))])


@pytest.mark.slow
def test_an_abort_of_the_converter_reaches_the_caller_as_an_error(tmp_path):
    model = keras.Sequential([layers.Input((5, 3)), layers.GRU(4), layers.Dense(3)])
    x = np.zeros((4, 5, 3), np.float32)
    path = tmp_path / "m.tflite"
    # Full integer GRUs crash TensorFlow's converter.
    with pytest.raises(ExportError, match=r"converter crashed .*'gru' \(GRU\)"):
        export_tflite(model, path, "int8", representative_data=x)
    assert list(tmp_path.iterdir()) == []
    export_tflite(model, path, "int8", representative_data=x, unroll=True)


# ---------------------------------------------------------------------- scores on given data


def scored_model():
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 120)
    x = rng.normal(size=(120, 6)).astype(np.float32)
    x[np.arange(120), y] += 3
    model = keras.Sequential([layers.Input((6,)), layers.Dense(8, "relu"), layers.Dense(3)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.01), loss, metrics=["accuracy"])
    model.fit(x, y, epochs=8, verbose=0)
    return model, (x, y)


def test_the_file_is_scored_on_the_data_given(tmp_path):
    model, data = scored_model()
    report = export_tflite(model, tmp_path / "m.tflite", "none", test_data=data)
    expected = model.evaluate(*data, verbose=0)[1]
    assert report.scores == {
        "metric": "accuracy",
        "keras": pytest.approx(expected),
        "tflite": pytest.approx(expected),
    }
    lines = []
    report.summary(lines.append)
    assert f"On the test data: accuracy {expected:.4f}, Keras {expected:.4f}" in lines


def test_a_file_that_loses_accuracy_is_refused(tmp_path, monkeypatch):
    model, data = scored_model()

    def scored(path, model, batches, metric):
        return Score(metric=0.3, loss=1.0)

    monkeypatch.setattr("rl_sparsity_tf.export.verification.score_tflite", scored)
    with pytest.raises(VerificationError, match=r"accuracy 0.3000 on test_data, the Keras model"):
        export_tflite(model, tmp_path / "m.tflite", "none", test_data=data)
    assert not list(tmp_path.iterdir())


def test_scores_need_a_compiled_model_and_fitting_data(tmp_path):
    model, (x, y) = scored_model()
    with pytest.raises(DataError, match="test_data has inputs of shape"):
        export_tflite(model, tmp_path / "m.tflite", "none", test_data=(x[:, :5], y))
    plain = keras.models.clone_model(model)
    with pytest.raises(ModelError, match="not compiled"):
        export_tflite(plain, tmp_path / "m.tflite", "none", test_data=(x, y))
    assert not list(tmp_path.iterdir())
