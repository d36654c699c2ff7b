"""Models as C headers: what they hold, whether C takes them, and whether TFLM runs them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import types

import numpy as np
import pytest
import tensorflow as tf
import tf_keras as keras

import rl_sparsity_tf as rls
from rl_sparsity_tf.errors import (
    ArgumentError,
    ExportError,
    FileExistsRLSparsityError,
    ModelError,
    VerificationError,
)
from rl_sparsity_tf.export import micro
from rl_sparsity_tf.export.micro import export_micro
from rl_sparsity_tf.export.micro_arena import (
    Buffer,
    activation_buffers,
    estimate_arena,
    plan_buffers,
)
from rl_sparsity_tf.export.micro_header import (
    TFLM_OPERATORS,
    MicroPort,
    header_text,
    registering_method,
)
from rl_sparsity_tf.export.micro_runtime import TflmError, measure_arena, run_tflm, tflm_installed
from rl_sparsity_tf.layers.plan import CompressionPlan, KernelRule
from rl_sparsity_tf.tflite.inspection import inspect_tflite
from rl_sparsity_tf.tflite.reading import read_flat_model

layers = keras.layers
needs_tflm = pytest.mark.skipif(not tflm_installed(), reason="tflite-micro is not installed")
PORT = MicroPort(index=0, keras_index=0, shape=(1, 2), dtype="int8", scale=1.0, zero_point=-3)


def rows_for(model, count=48):
    rng = np.random.default_rng(0)
    return tuple(
        rng.normal(size=(count, *given.shape[1:])).astype(np.float32) for given in model.inputs
    )


def seeded(build):
    keras.utils.set_random_seed(3)
    return build()


def lenet():
    return keras.Sequential(
        [
            layers.Input((12, 12, 1)),
            layers.Conv2D(4, 3, padding="same", activation="relu"),
            layers.MaxPooling2D(),
            layers.Conv2D(8, 3, activation="relu"),
            layers.Flatten(),
            layers.Dense(16, activation="relu"),
            layers.Dense(5, activation="softmax"),
        ],
        name="lenet",
    )


def separable():
    inputs = x = keras.Input((12, 12, 3))
    x = layers.Conv2D(8, 3, 2, padding="same", use_bias=False)(x)
    x = layers.ReLU()(layers.BatchNormalization()(x))
    for _ in range(2):
        x = layers.ReLU()(layers.DepthwiseConv2D(3, padding="same")(x))
        x = layers.ReLU()(layers.Conv2D(8, 1)(x))
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, layers.Dense(4, activation="softmax")(x))


def residual():
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(8, 3, padding="same", activation="relu")(inputs)
    y = layers.Conv2D(8, 3, padding="same")(layers.Conv2D(8, 3, padding="same")(x))
    x = layers.ReLU()(layers.Add()([x, y]))
    return keras.Model(inputs, layers.Dense(4)(layers.GlobalAveragePooling2D()(x)))


def wide():
    """More structures than activations: the arena's tail decides."""
    return keras.Sequential(
        [layers.Input((16,)), layers.Dense(32, activation="relu"), layers.Dense(400)]
    )


def two_inputs():
    first, second = keras.Input((12,), name="zz"), keras.Input((6, 6, 2), name="aa")
    x = layers.GlobalAveragePooling2D()(layers.Conv2D(4, 3)(second))
    x = layers.Concatenate()([layers.Dense(4, activation="relu")(first), x])
    return keras.Model([first, second], [layers.Dense(3, activation="softmax")(x), x[:, :1]])


NETWORKS = [lenet, separable, residual, wide]


def array_of(header):
    """The bytes of the array in a header."""
    text = header.read_text().split("= {\n", 1)[1].partition("};")[0]
    return bytes(int(number) for number in text.replace("\n", "").split(",") if number.strip())


def tflite_of(header, folder):
    path = folder / "array.tflite"
    path.write_bytes(array_of(header))
    return path


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A folder with m.h, its report and its model."""
    folder = tmp_path_factory.mktemp("digits")
    model = seeded(lenet)
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    (x,) = rows_for(model)
    data = (x, model(x).numpy().argmax(1))
    return folder, export_micro(model, folder / "m.h", x, name="digits", test_data=data), model


# -------------------------------------------------------------------------------- the header


@pytest.mark.slow
def test_the_header_holds_an_integer_model_that_does_what_keras_does(digits, tmp_path):
    folder, report, model = digits
    (x,) = rows_for(model)
    file = tflite_of(folder / "m.h", tmp_path)
    found = inspect_tflite(file)
    assert found.tflite_bytes == report.tflite_bytes
    assert found.batch_size == 1
    assert {port.dtype for port in found.inputs + found.outputs} == {"int8"}
    assert {tensor.format for tensor in found.tensors} == {"dense"}
    assert "DENSIFY" not in found.operators
    assert sorted(found.operators) == list(report.operators)
    outputs = rls.predict_tflite(file, x)
    assert np.abs(outputs - model(x).numpy()).max() < 0.05
    text = (folder / "m.h").read_text()
    assert f"digits_input_scale = {found.inputs[0].scale:.9g}f;" in text
    assert f"digits_input_zero_point = {found.inputs[0].zero_point};" in text
    assert f"digits_arena_bytes = {report.arena_bytes} " in text
    assert report.export.tflite_bytes == report.tflite_bytes


PROGRAM = """
#include "m.h"
#include <stdio.h>
#include "m.h" /* the guard */
static unsigned char arena[digits_arena_bytes];
int main(void) {
  unsigned long sum = 0;
  for (int i = 0; i < digits_len; ++i) sum += digits[i];
  printf("%d %lu %d %d %d\\n", (int)sizeof(digits), sum, (int)((unsigned long)digits % 16),
         (int)sizeof(arena), digits_input_elements);
  return digits_input_scale > 0 ? 0 : 1;
}
"""
RESOLVER = """
#include "m.h"
#include <cstdio>
enum TfLiteStatus { kTfLiteOk, kTfLiteError };
struct Resolver {
  int added = 0;
  METHODS
};
int main() {
  Resolver resolver;
  if (!DIGITS_ADD_OPERATORS(resolver)) return 1;
  std::printf("%d %d", resolver.added, DIGITS_OPERATORS);
}
"""


@pytest.mark.parametrize(
    ("compiler", "standard", "file"),
    [("gcc", "c99", "p.c"), ("gcc", "c11", "p.c"), ("g++", "c++11", "p.cc")],
)
def test_c_and_cpp_compile_the_header(digits, tmp_path, compiler, standard, file):
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed")
    folder, report, _ = digits
    shutil.copy(folder / "m.h", tmp_path)
    content = array_of(folder / "m.h")
    (tmp_path / file).write_text(PROGRAM)
    strict = ["-Wall", "-Wextra", "-Wno-unused-variable", "-Werror", f"-std={standard}"]
    printed = _built(tmp_path, [compiler, *strict, file])
    expected = [len(content), sum(content), 0, report.arena_bytes, 144]
    assert [int(number) for number in printed.split()] == expected
    if compiler == "g++":
        methods = " ".join(
            f"TfLiteStatus {registering_method(name)}() {{ ++added; return kTfLiteOk; }}"
            for name in report.operators
        )
        (tmp_path / file).write_text(RESOLVER.replace("METHODS", methods))
        count = len(report.operators)
        assert _built(tmp_path, [compiler, *strict, file]) == f"{count} {count}"


def _built(folder, command):
    done = subprocess.run(
        [*command, "-o", "program"], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return subprocess.run(
        [folder / "program"], capture_output=True, text=True, check=True
    ).stdout.strip()


def test_what_a_user_has_named_cannot_break_the_header():
    text = header_text(
        "m",
        b"TFL3",
        model="a*/ #error \\\n??/ é",
        arena_bytes=16,
        arena_basis="",
        operators=["ADD"],
        inputs=[PORT],
        outputs=[PORT],
    )
    assert "a* / #error __? ?/ _: an int8 model" in text
    assert text.isascii()
    assert text.count("*/") == text.count("/*")
    # 1 would be an integer, and 1f is no number.
    assert "static const float m_input_scale = 1.0f;" in text
    assert "static const int m_output_zero_point = -3;" in text
    small = header_text(
        "m",
        b"TFL3",
        model="m",
        arena_bytes=16,
        arena_basis="",
        operators=["ADD"],
        inputs=[MicroPort(**{**vars(PORT), "scale": 1e-8})],
        outputs=[MicroPort(**{**vars(PORT), "dtype": "int32", "scale": None})],
    )
    assert "m_input_scale = 1e-08f;" in small
    assert "m_output_scale" not in small


def test_inputs_and_outputs_are_numbered_as_the_runtime_does(tmp_path):
    model = seeded(two_inputs)
    report = export_micro(model, tmp_path / "m.h", rows_for(model))
    flat = read_flat_model(tflite_of(tmp_path / "m.h", tmp_path))
    for ports, indices, given in (
        (report.inputs, flat.graphs[0].inputs, model.inputs),
        (report.outputs, flat.graphs[0].outputs, model.outputs),
    ):
        for port, index in zip(ports, indices, strict=True):
            assert (
                port.shape == flat.tensor(0, index).shape == (1, *given[port.keras_index].shape[1:])
            )
    assert {port.keras_index for port in report.inputs} == {0, 1}
    text = (tmp_path / "m.h").read_text()
    for port in report.inputs:
        shape = "x".join(map(str, port.shape))
        assert f"interpreter.input({port.index}): int8 {shape}, input {port.keras_index} of" in text
        assert f"model_input_{port.index}_scale = " in text


@pytest.mark.parametrize(
    ("operator", "method"),
    [
        ("CONV_2D", "AddConv2D"),
        ("DEPTHWISE_CONV_2D", "AddDepthwiseConv2D"),
        ("FULLY_CONNECTED", "AddFullyConnected"),
        ("UNIDIRECTIONAL_SEQUENCE_LSTM", "AddUnidirectionalSequenceLSTM"),
        ("BATCH_MATMUL", "AddBatchMatMul"),
        ("BATCH_TO_SPACE_ND", "AddBatchToSpaceNd"),
        ("CUMSUM", "AddCumSum"),
        ("PADV2", "AddPadV2"),
        ("L2_POOL_2D", "AddL2Pool2D"),
        ("SELECT_V2", "AddSelectV2"),
        ("RELU6", "AddRelu6"),
        ("LOG_SOFTMAX", "AddLogSoftmax"),
    ],
)
def test_methods_are_named_as_in_the_resolver(operator, method):
    assert operator in TFLM_OPERATORS
    assert registering_method(operator) == method


# --------------------------------------------------------------------------------- the models


@pytest.mark.slow
def test_search_results_wrapped_and_shrunk_models_are_taken(tmp_path):
    model = seeded(separable)
    x = rows_for(model)
    plain = export_micro(model, tmp_path / "a.h", x)
    plan = CompressionPlan([KernelRule("*", 0.5)])
    result = types.SimpleNamespace(model=rls.wrap(model, plan), plan=plan)
    wrapped = export_micro(result, tmp_path / "b.h", x)
    assert wrapped.operators == plain.operators
    kernels = [t for t in wrapped.export.tensors if t.kernel]
    assert sum(t.zeros for t in kernels) > 0.4 * sum(t.elements for t in kernels)
    first = model.layers[1]
    dead = [value.copy() for value in first.get_weights()]
    dead[0][..., :4] = 0
    first.set_weights(dead)
    batch_norm = model.layers[2]
    batch_norm.set_weights(
        [np.where(np.arange(8) < 4, 0, value) for value in batch_norm.get_weights()[:2]]
        + batch_norm.get_weights()[2:]
    )
    small = export_micro(rls.shrink(model), tmp_path / "c.h", x)
    assert small.tflite_bytes < plain.tflite_bytes


@pytest.mark.slow
def test_an_lstm_is_taken_and_keeps_its_state_only_on_request(tmp_path):
    model = seeded(
        lambda: keras.Sequential([layers.Input((5, 4)), layers.LSTM(6), layers.Dense(3)])
    )
    report = export_micro(model, tmp_path / "m.h", rows_for(model))
    assert {"UNIDIRECTIONAL_SEQUENCE_LSTM", "BROADCAST_TO"} <= set(report.operators)
    assert "Reset()" not in (tmp_path / "m.h").read_text()
    report = export_micro(model, tmp_path / "n.h", rows_for(model), stateful=True)
    assert "BROADCAST_TO" not in report.operators
    assert any("call interpreter.Reset() before every sequence" in note for note in report.notes)
    assert not any("reset_all_variables" in note for note in report.notes)
    assert "Reset()" in (tmp_path / "n.h").read_text()


@pytest.mark.slow
def test_ids_stay_integers(tmp_path):
    model = seeded(
        lambda: keras.Sequential(
            [
                layers.Input((6,), dtype="int32"),
                layers.Embedding(20, 4),
                layers.GlobalAveragePooling1D(),
                layers.Dense(3),
            ]
        )
    )
    x = np.random.default_rng(0).integers(0, 20, (32, 6)).astype(np.int32)
    report = export_micro(model, tmp_path / "m.h", x)
    assert report.inputs[0].dtype == "int32"
    assert "input 0 is int32, not int8: it holds ids" in report.notes
    assert "model_input_scale" not in (tmp_path / "m.h").read_text()


def test_the_report_prints_and_becomes_json(digits):
    report = digits[1]
    lines = []
    report.summary(lines.append)
    assert lines[1] == f"Model: {report.tflite_bytes:,} bytes of flash"
    assert lines[2].startswith(f"Arena: {report.arena_bytes:,} bytes of RAM (")
    assert any(re.match(r"On the test data: accuracy [01]\.\d+, Keras 1\.0000$", t) for t in lines)
    assert any("before June 2024 compute wrongly without an error" in line for line in lines)
    values = json.loads(json.dumps(report.to_dict()))
    assert values["inputs"][0]["shape"] == [1, 12, 12, 1]
    assert values["export"]["quantization"] == "int8"
    assert values["operators"] == list(report.operators)


# --------------------------------------------------------------------------------- what fails


def test_an_operator_that_tflm_lacks_is_named_with_a_way_out(tmp_path):
    model = seeded(
        lambda: keras.Sequential(
            [layers.Input((8,)), layers.Dense(6, activation=keras.activations.gelu)], name="gelus"
        )
    )
    with pytest.raises(
        ExportError,
        match=r"Model 'gelus' needs GELU, .* Replace the layers that use it \(GELU: use relu",
    ):
        export_micro(model, tmp_path / "m.h", rows_for(model))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_loops_without_an_integer_form_are_refused_and_unrolled_ones_taken(tmp_path):
    model = seeded(
        lambda: keras.Sequential(
            [layers.Input((3, 4)), layers.GRU(5, name="memory"), layers.Dense(3)]
        )
    )
    x = rows_for(model)
    with pytest.raises(
        ExportError, match=r"recurrent layers 'memory' \(GRU\) have no .* Pass unroll=True"
    ):
        export_micro(model, tmp_path / "m.h", x)
    assert export_micro(model, tmp_path / "m.h", x, unroll=True).operators


def test_what_the_converter_refuses_is_no_matter_of_the_mode(tmp_path):
    model = seeded(
        lambda: keras.Sequential(
            [layers.Input((4, 4)), layers.Lambda(lambda x: tf.linalg.inv(x))], name="inverse"
        )
    )
    with pytest.raises(
        ExportError,
        match=r"'inverse' cannot be int8 throughout, .* replace the layers that the converter",
    ):
        export_micro(model, tmp_path / "m.h", rows_for(model))


def test_wrong_arguments_are_refused_before_anything_is_done(tmp_path):
    model = seeded(lenet)
    x = rows_for(model)
    with pytest.raises(ArgumentError, match=r"ends in '\.tflite'\. Expected the name of a C head"):
        export_micro(model, tmp_path / "m.tflite", x)
    for name in ("int", "1model", "my-model", "a__b", "_m", "", 3):
        with pytest.raises(ArgumentError, match=r"cannot name an array in C and C\+\+"):
            export_micro(model, tmp_path / "m.h", x, name=name)
    with pytest.raises(ArgumentError, match=r"representative_data=None cannot be used"):
        export_micro(model, tmp_path / "m.h", None)
    with pytest.raises(ModelError):
        export_micro("model", tmp_path / "m.h", x)
    (tmp_path / "m.h").write_text("mine")
    with pytest.raises(FileExistsRLSparsityError, match="overwrite=True"):
        export_micro(model, tmp_path / "m.h", x)
    assert (tmp_path / "m.h").read_text() == "mine"
    fixed = keras.Sequential([layers.Input(batch_shape=(4, 3)), layers.Dense(2)], name="four")
    with pytest.raises(ArgumentError, match=r"'four' is built for batches of 4, and a microcont"):
        export_micro(fixed, tmp_path / "f.h", np.zeros((8, 3), np.float32))


# ----------------------------------------------------------------------------------- the arena


def test_buffers_share_memory_when_their_lifetimes_allow():
    chain = [Buffer(size=100, first=step, last=step + 1) for step in range(4)]
    assert plan_buffers(chain) == 2 * 112
    assert plan_buffers([]) == 0
    # The largest two touch; the third fits below the second, in the gap the first leaves.
    gap = [
        Buffer(size=64, first=0, last=1),
        Buffer(size=48, first=1, last=3),
        Buffer(size=32, first=2, last=3),
        Buffer(size=32, first=3, last=4),
    ]
    assert plan_buffers(gap) == 64 + 48
    # 32 at 0 and 32 at 32 end where the 48 at 64 begins.
    assert plan_buffers([*gap, Buffer(size=16, first=3, last=3)]) == 64 + 48 + 16


@pytest.mark.slow
def test_activations_live_from_their_maker_to_their_last_reader(tmp_path):
    model = seeded(residual)
    export_micro(model, tmp_path / "m.h", rows_for(model))
    flat = read_flat_model(tflite_of(tmp_path / "m.h", tmp_path))
    names = [operator.name for operator in flat.operators]
    assert names == ["CONV_2D"] * 3 + ["ADD", "MEAN", "FULLY_CONNECTED"]
    buffers = {(b.size, b.first, b.last) for b in activation_buffers(flat)}
    assert buffers == {
        (8 * 8 * 3, 0, 1),  # the input
        (8 * 8 * 8, 1, 4),  # waits for the sum
        (8 * 8 * 8, 2, 3),
        (8 * 8 * 8, 3, 4),
        (8 * 8 * 8, 4, 5),
        (8, 5, 6),
        (4 * 8, 5, 5),  # what MEAN adds up in
        (4, 6, 7),  # the output
    }
    assert plan_buffers(activation_buffers(flat)) == 3 * 512


def test_without_tflm_the_arena_is_estimated_and_said_to_be(tmp_path, monkeypatch):
    monkeypatch.setattr(micro, "tflm_installed", lambda: False)
    model = seeded(lenet)
    report = export_micro(model, tmp_path / "m.h", rows_for(model))
    assert not report.arena_measured
    assert report.arena_bytes == report.arena_estimate
    assert report.agreement is report.largest_step is None
    assert any(
        'pip install "rl_sparsity_tf[micro]" lets the next export measure it' in note
        for note in report.notes
    )
    assert "not measured" in (tmp_path / "m.h").read_text()
    flat = read_flat_model(tflite_of(tmp_path / "m.h", tmp_path))
    assert report.arena_bytes == estimate_arena(flat)
    lines = []
    report.summary(lines.append)
    assert any(line.endswith("bytes of RAM (estimated)") for line in lines)


@pytest.mark.slow
@needs_tflm
@pytest.mark.parametrize("build", NETWORKS)
def test_tflm_agrees_in_the_smallest_arena_and_the_estimate_is_near_it(tmp_path, build):
    model = seeded(build)
    report = export_micro(model, tmp_path / "m.h", rows_for(model))
    assert report.arena_measured
    assert 0.95 <= report.arena_estimate / report.arena_bytes < 1.2
    assert report.agreement > 0.9
    assert report.largest_step <= 1
    file = tflite_of(tmp_path / "m.h", tmp_path)
    zeros = [np.zeros((1, *report.inputs[0].shape[1:]), np.int8)]
    assert run_tflm(file, report.arena_bytes, zeros, 1)[0].shape == report.outputs[0].shape
    with pytest.raises(TflmError):
        run_tflm(file, report.arena_bytes - 16, zeros, 1)


@pytest.mark.slow
@needs_tflm
def test_another_result_in_tflm_is_an_error_and_more_than_a_step_a_note(tmp_path, monkeypatch):
    model = seeded(lenet)
    x = rows_for(model)

    def moved(by):
        def run(*arguments, **options):
            found = run_tflm(*arguments, **options)
            return [by(values.astype(int)).astype(np.int8) for values in found]

        monkeypatch.setattr(micro, "run_tflm", run)

    moved(lambda values: values[:, ::-1])
    with pytest.raises(VerificationError, match=r"exported file \(in TFLM\) differs from Keras"):
        export_micro(model, tmp_path / "m.h", x)
    assert not list(tmp_path.iterdir())
    moved(lambda values: np.clip(values + 3, -128, 127))
    report = export_micro(model, tmp_path / "m.h", x)
    assert report.largest_step == 3
    assert report.agreement == 0
    assert any("differ by up to 3 integer steps" in note for note in report.notes)


@needs_tflm
def test_what_tflm_does_not_take_is_an_error(tmp_path, monkeypatch):
    def aborted(*_):
        raise TflmError("its process ended with SIGABRT")

    monkeypatch.setattr(micro, "measure_arena", aborted)
    model = seeded(lenet)
    with pytest.raises(
        VerificationError, match=r"'lenet' runs in LiteRT as int8, .*: its process ended with SIGA"
    ):
        export_micro(model, tmp_path / "m.h", rows_for(model))
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------- a runtime that misbehaves

RUNTIME = """
import os
__version__ = "9.9"
class runtime:
    class Interpreter:
        @staticmethod
        def from_bytes(content, arena_size):
            if len(content) == 1:
                print("I take no such thing")
                os.abort()
            if arena_size < 5000:
                if arena_size // 16 % 2:
                    os.abort()
                raise RuntimeError("too small")
"""


def fake_runtime(folder, monkeypatch, text):
    (folder / "tflite_micro.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(folder))


def test_an_arena_is_found_although_some_attempts_end_the_process(tmp_path, monkeypatch):
    fake_runtime(tmp_path, monkeypatch, RUNTIME)
    (tmp_path / "m").write_bytes(b"model")
    assert measure_arena(tmp_path / "m", 60000) == (5008, "9.9")


def test_a_file_that_ends_every_process_is_an_error(tmp_path, monkeypatch):
    fake_runtime(tmp_path, monkeypatch, RUNTIME)
    (tmp_path / "m").write_bytes(b"1")
    with pytest.raises(TflmError, match=r"its process ended with SIGABRT \(I take no such thing"):
        measure_arena(tmp_path / "m", 60000)
    (tmp_path / "m").write_bytes(b"model")
    with pytest.raises(TflmError, match="too small"):
        measure_arena(tmp_path / "m", 4000)


def test_a_runtime_that_cannot_be_imported_is_as_good_as_none(tmp_path, monkeypatch):
    fake_runtime(tmp_path, monkeypatch, "raise ImportError('GLIBC_2.99 not found')")
    monkeypatch.setattr(micro, "tflm_installed", lambda: True)
    model = seeded(wide)
    report = export_micro(model, tmp_path / "m.h", rows_for(model))
    assert not report.arena_measured
    assert any("could not be imported (GLIBC_2.99 not found)" in note for note in report.notes)


def test_the_runtime_is_not_imported_here(tmp_path):
    assert tflm_installed() in (True, False)
    assert "tflite_micro" not in sys.modules
