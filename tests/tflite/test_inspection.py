"""What is said about .tflite files, and whether it is so."""

from __future__ import annotations

import gzip
import json
import re

import numpy as np
import pytest
import tensorflow as tf
import tf_keras as keras
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter
from tflite_files import QUANTIZED, SPARSE, convert, pack, tables, with_zeros

import rl_sparsity_tf as rls
from rl_sparsity_tf.cli import main
from rl_sparsity_tf.errors import ArgumentError, ExportError
from rl_sparsity_tf.export.report import tensor_reports
from rl_sparsity_tf.layers.plan import KernelRule
from rl_sparsity_tf.tflite.inspection import inspect_tflite, short_name
from rl_sparsity_tf.tflite.reading import read_flat_model
from rl_sparsity_tf.tflite.xnnpack import SparseClusters

layers = keras.layers
UNPACKED = "DENSIFY: unpacked at load, no faster"
DENSE = "dense: zeros are multiplied like any number"


def dense_model(units=(32, 6), inputs=64):
    return keras.Sequential([layers.Input((inputs,)), *(layers.Dense(n) for n in units)])


def largest(path):
    return inspect_tflite(path).tensors[0]


# ---------------------------------------------------------------------- what is counted


def test_the_table_of_a_small_file(tmp_path):
    inputs = keras.Input((4,), name="x")
    model = keras.Model(inputs, layers.Dense(3, name="d")(inputs), name="m")
    kernel = np.array([[1, 0, 2], [0, 0, 3], [4, 0, 0], [0, 5, 6]], np.float32)
    model.set_weights([kernel, np.ones(3, np.float32)])
    path = convert(model, tmp_path / "m.tflite")
    changed = tables(path)
    for index, name in enumerate(["x", "bias", "d/MatMul", "out"]):
        changed.subgraphs[0].tensors[index].name = name
    pack(changed, path)
    lines: list[str] = []
    inspection = inspect_tflite(path)
    inspection.summary(lines.append)
    size, zipped = path.stat().st_size, len(gzip.compress(path.read_bytes(), 9, mtime=0))
    names = {t.name: t.shape for t in read_flat_model(path).tensors}
    assert sorted(names.values()) == [(1, 3), (1, 4), (3,), (3, 4)]
    head = "Graph  Tensor                   Shape  Type     Format      Zeros  Bytes"
    rule = "-" * len(head + "  Read by          Kernel")
    (kernel_name,) = (name for name, shape in names.items() if shape == (3, 4))
    assert lines == [
        f"{path}: {size:,} bytes ({zipped:,} after gzip)",
        rule,
        head + "  Read by          Kernel",
        rule,
        f"0      {kernel_name.ljust(23)}  3x4    float32  dense   6 (50.0%)     48  "
        "FULLY_CONNECTED  [1]",
        "       1 others (rank 0 and 1)" + " " * 40 + "12",
        rule,
        f"[1] {DENSE}",
        "",
        "Zeros: 50.0% of 12 weights of rank 2 and more",
        "Bytes of constants by type: float32 60",
        "Operators: FULLY_CONNECTED 1",
        "Kinds: 1 builtin; custom: none; flex: none",
        "Input x: float32 ?x4",
        "Output out: float32 ?x3",
        "Batch size: any; subgraphs: 1; signatures: serving_default",
    ]


def test_totals_leave_shapes_out_and_count_shared_buffers_once(tmp_path):
    model = keras.Sequential(
        [layers.Input((6, 6, 2)), layers.ZeroPadding2D(2), layers.Conv2D(3, 3), layers.Conv2D(3, 3)]
    )
    path = convert(with_zeros(model, 0.5), tmp_path / "m.tflite")
    kernels = [layer.kernel.numpy() for layer in model.layers[1:]]
    inspection = inspect_tflite(path)
    assert inspection.elements == sum(kernel.size for kernel in kernels)
    assert inspection.zeros == sum(np.sum(kernel == 0) for kernel in kernels)
    assert inspection.bytes_by_dtype["int32"] == 32
    (paddings,) = [tensor for tensor in inspection.tensors if tensor.dtype == "int32"]
    assert paddings.exploited == "PAD reads it as it is, zeros save nothing"
    changed = tables(path)
    graph = changed.subgraphs[0]
    biases = [t for t in graph.tensors if len(t.shape) == 1]
    before = inspection.bytes_by_dtype["float32"]
    copy = schema.TensorT()
    copy.__dict__.update(biases[0].__dict__)
    graph.tensors.append(copy)
    again = inspect_tflite(pack(changed, path))
    assert again.other_tensors == inspection.other_tensors + 1
    assert again.bytes_by_dtype["float32"] == before


def test_inputs_outputs_quantization_and_a_fixed_batch(tmp_path):
    path = convert(with_zeros(dense_model(), 0.5), tmp_path / "i.tflite", QUANTIZED, integer=True)
    (given,) = inspect_tflite(path).inputs
    assert (given.dtype, given.shape) == ("int8", (-1, 64))
    assert given.scale is not None
    assert given.scale > 0
    fixed = keras.Sequential([layers.Input(batch_shape=(4, 3)), layers.Dense(2)])
    inspection = inspect_tflite(convert(fixed, tmp_path / "f.tflite"))
    assert inspection.batch_size == 4
    assert inspection.outputs[0].scale is None


def test_four_bit_weights_are_unpacked(tmp_path):
    path = convert(with_zeros(dense_model(), 0.5), tmp_path / "m.tflite", QUANTIZED)
    model = tables(path)
    (tensor,) = [t for t in model.subgraphs[0].tensors if t.type == schema.TensorType.INT8]
    tensor.type = schema.TensorType.INT4
    # Low halves 0, high halves 1.
    model.buffers[tensor.buffer].data = np.full(32 * 64 // 2, 0x10, np.uint8)
    inspection = inspect_tflite(pack(model, path))
    (found,) = [tensor for tensor in inspection.tensors if tensor.dtype == "int4"]
    assert (found.bytes, found.zeros, found.elements) == (1024, 1024, 2048)
    assert found.exploited.startswith("hybrid kernel (activations quantized on the fly)")


def test_files_with_loops_signatures_and_custom_operators(tmp_path):
    class Two(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec([2, 3])])
        def first(self, x):
            return {"y": tf.while_loop(lambda v: tf.reduce_sum(v) < 9.0, lambda v: v + 1.0, [x])[0]}

        @tf.function(input_signature=[tf.TensorSpec([2, 3, 3])])
        def second(self, x):
            return {"y": tf.linalg.det(x)}

    module = Two()
    converter = tf.lite.TFLiteConverter.from_concrete_functions(
        [module.first.get_concrete_function(), module.second.get_concrete_function()], module
    )
    converter.target_spec.supported_ops = [
        tf.lite.OpsSet.TFLITE_BUILTINS,
        tf.lite.OpsSet.SELECT_TF_OPS,
    ]
    path = tmp_path / "m.tflite"
    path.write_bytes(converter.convert())
    inspection = inspect_tflite(path)
    assert inspection.subgraphs == 4
    assert inspection.operators["WHILE"] == 1
    assert inspection.operators_by_kind["flex"] == ("FlexMatrixDeterminant",)
    assert inspection.batch_size == 2
    lines: list[str] = []
    inspection.summary(lines.append)
    assert any("flex: FlexMatrixDeterminant" in line for line in lines)
    with pytest.raises(ExportError, match=r"has TensorFlow operators \(FlexMatrixDeterminant\)"):
        rls.benchmark_tflite(path)


def test_names_are_shortened_from_the_front():
    assert short_name("a/b;c/d") == "a/b"
    assert short_name("") == "(no name)"
    assert short_name("model/" * 8 + "block/conv/Conv2D").endswith("model/block/conv/Conv2D")
    assert short_name("x" * 50) == "..." + "x" * 33


# ---------------------------------------------------------------------- what kernels exploit


def test_integer_and_hybrid_and_dequantized_weights(tmp_path):
    model = with_zeros(dense_model(), 0.5)
    path = tmp_path / "m.tflite"
    like_any = ": zeros are multiplied like any number"
    assert largest(convert(model, path)).exploited == DENSE
    assert largest(convert(model, path, QUANTIZED, integer=True)).exploited == (
        "integer kernel" + like_any
    )
    assert largest(convert(model, path, QUANTIZED)).exploited == (
        "hybrid kernel (activations quantized on the fly)" + like_any
    )
    half = largest(convert(model, path, QUANTIZED, types=[tf.float16]))
    assert half.operators == ("DEQUANTIZE", "FULLY_CONNECTED")
    assert half.exploited == "float16 weights dequantized before a float kernel" + like_any


def test_weight_only_integers_are_dequantized(tmp_path):
    model = with_zeros(dense_model(), 0.5)
    path = tmp_path / "m.tflite"
    plan = rls.CompressionPlan([KernelRule("*", 0.5, quantize=True)])
    report = rls.export_tflite(rls.strip(rls.wrap(model, plan)), path, plan=plan)
    assert {tensor.format for tensor in report.tensors} == {"dense"}
    assert largest(path).exploited.startswith("int8 weights dequantized before a float kernel")


@pytest.mark.parametrize("layer", [keras.layers.Conv2D(8, 3), keras.layers.DepthwiseConv2D(3)])
def test_xnnpack_leaves_convolutions_in_4_bits_alone(layer, tmp_path):
    model, path = keras.Sequential([keras.layers.Input((6, 6, 4)), layer]), tmp_path / "m.tflite"
    said = {}
    for bits in (8, 4):
        plan = rls.CompressionPlan([KernelRule("*", 0.0, quantize=True, bits=bits)])
        rls.export_tflite(rls.wrap(model, plan), path, overwrite=True)
        said[bits] = largest(path).exploited
        interpreter = Interpreter(str(path))
        interpreter.allocate_tensors()
        # What LiteRT does with the file, which the sentence tells: XNNPACK's part is a DELEGATE.
        names = [one["op_name"] for one in interpreter._get_ops_details()]
        assert ("DELEGATE" in names) == (bits == 8)
    start, end = "int{} weights dequantized before a float kernel", ": zeros are multiplied"
    assert said[8].startswith(start.format(8) + end)
    assert said[4].startswith(start.format(4) + " slower than XNNPACK's" + end)


def test_sparse_weights_behind_densify(tmp_path):
    model, path = with_zeros(dense_model(), 0.5), tmp_path / "m.tflite"
    found = largest(convert(model, path, SPARSE))
    assert (found.format, found.operators) == ("CSR", ("DENSIFY", "FULLY_CONNECTED"))
    assert found.exploited.startswith(UNPACKED)
    assert found.exploited.endswith("no, because only 1x1 convolutions have a sparse kernel")
    assert largest(convert(model, path, SPARSE, QUANTIZED)).exploited == (
        f"{UNPACKED}; hybrid kernel (activations quantized on the fly); XNNPACK refuses the file"
    )


def test_native_blocks_and_their_traps(tmp_path):
    path = tmp_path / "m.tflite"
    native = "native block kernel (1x{}): zero blocks are skipped"
    model = with_zeros(dense_model(), 0.8, 4)
    assert largest(convert(model, path, SPARSE)).exploited == native.format(4)
    # 62 inputs: the last two belong to no block.
    cut = tables(path)
    (weights,) = [t for t in cut.subgraphs[0].tensors if list(t.shape) == [32, 64]]
    weights.shape = [32, 66]
    assert inspect_tflite(pack(cut, path)).tensors[0].exploited == (
        native.format(4) + "; wrong: the last 2 of 66 inputs, no multiple of 4, are dropped"
    )
    model = with_zeros(dense_model(), 0.8, 16)
    integer = convert(model, path, SPARSE, QUANTIZED, integer=True)
    assert largest(integer).exploited == native.format(16)
    (hybrid,) = [
        tensor.exploited
        for tensor in inspect_tflite(convert(model, path, SPARSE, QUANTIZED)).tensors
        if tensor.dtype == "int8"
    ]
    assert hybrid == native.format(16) + (
        " without XNNPACK; wrong with XNNPACK, which takes it for dense"
    )


def without_densify(path):
    model = tables(path)
    graph = model.subgraphs[0]
    densify = schema.BuiltinOperator.DENSIFY
    codes = [max(c.builtinCode, c.deprecatedBuiltinCode) for c in model.operatorCodes]
    unpacked = {
        op.outputs[0]: op.inputs[0] for op in graph.operators if codes[op.opcodeIndex] == densify
    }
    graph.operators = [op for op in graph.operators if codes[op.opcodeIndex] != densify]
    for operator in graph.operators:
        operator.inputs = [unpacked.get(index, index) for index in operator.inputs]
    return pack(model, path)


def test_sparse_weights_that_nothing_unpacks(tmp_path):
    path = convert(with_zeros(dense_model(), 0.5), tmp_path / "m.tflite", SPARSE)
    found = largest(without_densify(path))
    assert found.operators == ("FULLY_CONNECTED",)
    assert found.exploited == (
        "native CSR kernel without XNNPACK; wrong with XNNPACK, which takes it for dense"
    )
    model = keras.Sequential([layers.Input((6, 6, 3)), layers.Conv2D(4, 3)])
    path = convert(with_zeros(model, 0.5), path, SPARSE)
    assert largest(without_densify(path)).exploited == (
        "no kernel of CONV_2D reads float32 CSR: wrong or refused"
    )


def test_tables_are_looked_up_and_unread_constants_named(tmp_path):
    model = keras.Sequential([layers.Input((5,)), layers.Embedding(40, 8), layers.Flatten()])
    path = convert(model, tmp_path / "m.tflite")
    assert largest(path).exploited == "GATHER looks rows up, nothing is multiplied"
    changed = tables(path)
    changed.subgraphs[0].operators = []
    assert largest(pack(changed, path)).exploited == "read by no operator"
    (index,) = [i for i, t in enumerate(changed.subgraphs[0].tensors) if list(t.shape) == [40, 8]]
    changed.subgraphs[0].outputs = [index]
    assert largest(pack(changed, path)).exploited == "returned as an output"
    changed.subgraphs[0].tensors[index].externalBuffer = 1
    assert "external" in {tensor.format for tensor in inspect_tflite(pack(changed, path)).tensors}


def test_operators_without_the_inputs_they_need_are_told(tmp_path):
    model = keras.Sequential([layers.Input((6, 6, 3)), layers.Conv2D(4, 3)])
    path = convert(with_zeros(model, 0.5), tmp_path / "m.tflite", SPARSE)
    changed = tables(path)
    changed.subgraphs[0].operators[-1].inputs = list(changed.subgraphs[0].operators[0].outputs)
    assert largest(pack(changed, path)).exploited == (
        "unknown: an operator around it has not the inputs it should have"
    )


def test_zeros_are_counted_under_scales_of_an_unknown_layout(tmp_path):
    path = convert(with_zeros(dense_model(), 0.5), tmp_path / "m.tflite", QUANTIZED)
    zeros = next(t.zeros for t in inspect_tflite(path).tensors if t.dtype == "int8")
    changed = tables(path)
    for tensor in changed.subgraphs[0].tensors:
        if tensor.type == schema.TensorType.INT8:
            tensor.quantization.scale = [0.5] * 7
            tensor.quantization.zeroPoint = [0] * 7
    inspection = inspect_tflite(pack(changed, path))
    assert [t.zeros for t in inspection.tensors if t.dtype == "int8"] == [zeros]


def cluster_model(
    *, channels=3, stride=2, pad=True, zeros=0.8, middle=None, pool=True, stem=3, pointwise=1
):
    padding = "valid" if pad else "same"
    return with_zeros(
        keras.Sequential(
            [
                layers.Input((16, 16, channels)),
                *([layers.ZeroPadding2D(1)] if pad else []),
                layers.Conv2D(8, stem, strides=stride, padding=padding, activation="relu"),
                layers.Conv2D(32, 1, strides=pointwise, activation="relu", name="point"),
                layers.DepthwiseConv2D(3, padding="same"),
                *([] if middle is None else [middle]),
                layers.Conv2D(32, 1),
                *([layers.GlobalAveragePooling2D()] if pool else []),
            ]
        ),
        zeros,
    )


def verdicts(path):
    """What is said of the 1x1 convolutions."""
    found = [tensor for tensor in inspect_tflite(path).tensors if tensor.shape[1:3] == (1, 1)]
    return {tensor.exploited for tensor in found if tensor.operators[-1] == "CONV_2D"}


def test_a_sparse_cluster_is_recognised(tmp_path):
    path = convert(cluster_model(), tmp_path / "m.tflite", SPARSE)
    assert verdicts(path) == {
        "XNNPACK sparse cluster: yes, zeros are skipped on ARM; elsewhere no faster"
    }
    depthwise = next(t for t in inspect_tflite(path).tensors if t.shape == (1, 3, 3, 32))
    assert depthwise.exploited == (
        f"{UNPACKED}. XNNPACK sparse cluster: no, because only 1x1 convolutions have a sparse "
        "kernel"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"channels": 4}, r"CONV_2D 3x3 reads 4 channels, not 3$"),
        ({"stride": 1}, r"CONV_2D 3x3 has stride 1x1, not 2x2$"),
        ({"pad": False}, r"CONV_2D 3x3 is not padded by 1 on every side$"),
        ({"stem": 5}, r"CONV_2D 5x5 has no channels-first form$"),
        ({"zeros": 0.6}, r"1x1 convolutions have 6\d\.\d% zeros, more than two thirds are needed$"),
        ({"pool": False}, r"because the cluster does not end in a global average pooling$"),
        ({"pointwise": 2}, r"CONV_2D 1x1 has stride 2x2$"),
        ({"middle": layers.Softmax()}, r"SOFTMAX has no channels-first form$"),
        (
            {"middle": layers.DepthwiseConv2D(3, 2, "same", name="half")},
            r"DEPTHWISE_CONV_2D 3x3 is not padded",
        ),
    ],
    ids=["channels", "stride", "same", "kernel", "zeros", "end", "stride-1x1", "op", "depthwise"],
)
def test_the_first_condition_that_fails_is_named(tmp_path, changes, reason):
    path = convert(cluster_model(**changes), tmp_path / "m.tflite", SPARSE)
    found = verdicts(path)
    assert all("XNNPACK sparse cluster: no, because " in sentence for sentence in found)
    assert any(re.search(reason, sentence) for sentence in found), found


def test_files_that_are_wrong_on_arm_are_told(tmp_path):
    path = convert(cluster_model(middle=layers.Softmax()), tmp_path / "m.tflite", SPARSE)
    assert any("computed wrongly on ARM, where XNNPACK breaks the ch" in s for s in verdicts(path))
    right = convert(cluster_model(), tmp_path / "right.tflite", SPARSE)
    assert not any("ARM, where" in sentence for sentence in verdicts(right))


def test_a_dense_file_switches_no_cluster_on(tmp_path):
    path = convert(cluster_model(), tmp_path / "m.tflite")
    assert verdicts(path) == {
        f"{DENSE}. XNNPACK sparse cluster: no, because no tensor is stored sparse, which is what "
        "switches it on"
    }


def test_a_residual_sum_and_a_squeeze_may_stand_in_a_cluster(tmp_path):
    inputs = keras.Input((16, 16, 3))
    x = layers.Conv2D(8, 3, strides=2)(layers.ZeroPadding2D(1)(inputs))
    y = layers.Conv2D(8, 1, activation="relu")(x)
    z = layers.Conv2D(8, 1)(layers.Add()([x, y]))
    gate = layers.Conv2D(8, 1, activation="sigmoid")(
        layers.GlobalAveragePooling2D(keepdims=True)(z)
    )
    outputs = layers.GlobalAveragePooling2D()(layers.Multiply()([z, gate]))
    model = with_zeros(keras.Model(inputs, outputs), 0.8)
    flat = read_flat_model(convert(model, tmp_path / "m.tflite", SPARSE))
    clusters = SparseClusters(flat)
    convolutions = [operator for operator in flat.operators if operator.name == "CONV_2D"]
    assert [clusters.obstacle(operator) for operator in convolutions] == [
        "only 1x1 convolutions have a sparse kernel",
        *[None] * 3,
    ]


# ---------------------------------------------------------------------- where it is shown


def test_reports_of_exports_say_the_same(tmp_path):
    path = convert(with_zeros(dense_model(), 0.5), tmp_path / "m.tflite", SPARSE)
    flat = read_flat_model(path)
    reports = {report.name: report for report in tensor_reports(flat.tensors, {}, flat)}
    for tensor in inspect_tflite(path).tensors:
        report = reports[tensor.name]
        for field in ("shape", "dtype", "zeros", "format", "bytes", "exploited"):
            assert getattr(report, field) == getattr(tensor, field)
    assert {report.exploited for report in tensor_reports(flat.tensors, {})} == {""}


def test_the_command_prints_a_table_or_json(tmp_path, capsys):
    path = convert(with_zeros(dense_model(), 0.5), tmp_path / "m.tflite", SPARSE)
    assert main(["inspect", str(path)]) == 0
    assert f"[1] {UNPACKED}" in capsys.readouterr().out
    assert main(["inspect", str(path), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == inspect_tflite(path).to_dict()
    assert printed["tensors"][0]["format"] == "CSR"
    assert printed["sparsity"] == pytest.approx(0.5, abs=0.1)


def test_files_that_cannot_be_inspected_are_refused_in_one_line(tmp_path, capsys):
    path = tmp_path / "m.tflite"
    with pytest.raises(ArgumentError, match="There is no file"):
        inspect_tflite(path)
    path.write_bytes(b"PK\x03\x04 something else")
    assert main(["inspect", str(path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("rl-sparsity inspect: ")
    assert said.count("\n") == 1
    whole = convert(with_zeros(dense_model(), 0.5), path, SPARSE).read_bytes()
    for length in (20, len(whole) // 3, len(whole) // 2, len(whole) - 40):
        path.write_bytes(whole[:length])
        with pytest.raises(ExportError, match=r"damaged"):
            inspect_tflite(path)
