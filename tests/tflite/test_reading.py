"""Reading .tflite files, and finding kernels in them."""

from __future__ import annotations

import flatbuffers
import numpy as np
import pytest
import tf_keras as keras
from ai_edge_litert import schema_py_generated as schema
from tflite_files import QUANTIZED, SPARSE, convert, pack, tables, with_zeros

from rl_sparsity_tf.errors import ArgumentError, ExportError, PlanError
from rl_sparsity_tf.export.matching import find_variable, kernel_variables, match_kernels
from rl_sparsity_tf.tflite.editing import FileEditor
from rl_sparsity_tf.tflite.reading import FlatTensor, read_flat_model, read_tensors

layers = keras.layers


def flat(values, **changes) -> FlatTensor:
    values = np.asarray(values)
    fields = {
        "subgraph": 0,
        "index": 0,
        "name": "t",
        "shape": values.shape,
        "dtype": str(values.dtype),
        "constant": True,
        "stored_bytes": values.nbytes,
        "raw": values,
        "scales": np.zeros(0, np.float32),
        "zero_points": np.zeros(0, np.float32),
        "axis": 0,
        "sparse": False,
        "variable": False,
    }
    return FlatTensor(**(fields | changes))


def file_with(tensor_type: int, shape, data: bytes, scale=None, *, outside: bool = False) -> bytes:
    """A .tflite file of one constant, its buffer in the flatbuffer or behind it."""
    tensor = schema.TensorT()
    tensor.name, tensor.shape, tensor.type, tensor.buffer = b"w", list(shape), tensor_type, 1
    if scale is not None:
        tensor.quantization = schema.QuantizationParametersT()
        tensor.quantization.scale = scale
        tensor.quantization.zeroPoint = [0] * len(scale)
    graph = schema.SubGraphT()
    graph.tensors, graph.inputs, graph.outputs, graph.operators = [tensor], [], [], []
    buffer = schema.BufferT()
    model = schema.ModelT()
    model.version, model.subgraphs, model.operatorCodes = 3, [graph], []
    model.buffers = [schema.BufferT(), buffer]

    def pack() -> bytes:
        builder = flatbuffers.Builder(64)
        builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
        return bytes(builder.Output())

    if not outside:
        buffer.data = np.frombuffer(data, np.uint8)
        return pack()
    buffer.offset, buffer.size = 2, len(data)
    buffer.offset = len(pack())
    return pack() + data


def test_four_bit_values_are_unpacked_low_half_first_and_dequantised(tmp_path):
    path = tmp_path / "m.tflite"
    # Nibbles 1, -1, 7, -8, 3, and one of padding.
    data = bytes([0xF1, 0x87, 0x03])
    path.write_bytes(file_with(schema.TensorType.INT4, [1, 5], data, [0.5]))
    (tensor,) = read_tensors(path)
    assert tensor.dtype == "int4"
    assert tensor.stored_bytes == 3
    np.testing.assert_array_equal(tensor.raw, [[1, -1, 7, -8, 3]])
    np.testing.assert_array_equal(tensor.values(), [[0.5, -0.5, 3.5, -4, 1.5]])


def test_scales_run_along_their_axis():
    tensor = flat(
        np.array([[1, 2], [3, 4]], np.int8),
        scales=np.array([1, 10], np.float32),
        zero_points=np.array([0, 1], np.float32),
        axis=1,
    )
    np.testing.assert_array_equal(tensor.values(), [[1, 10], [3, 30]])


def test_buffers_outside_the_flatbuffer_are_read_and_moved_into_it(tmp_path):
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    content = file_with(schema.TensorType.FLOAT32, (2, 3), values.tobytes(), outside=True)
    plain = schema.ModelT.InitFromPackedBuf(content, 0)
    assert plain.buffers[1].data is None
    path = tmp_path / "m.tflite"
    path.write_bytes(content)
    np.testing.assert_array_equal(read_tensors(path)[0].values(), values)
    inlined = FileEditor(content).packed()
    path.write_bytes(inlined)
    np.testing.assert_array_equal(read_tensors(path)[0].values(), values)
    buffer = schema.Model.GetRootAs(inlined).Buffers(1)
    assert buffer.Offset() == 0
    np.testing.assert_array_equal(buffer.DataAsNumpy().view(np.float32), values.reshape(-1))
    assert inlined.index(values.tobytes()) % 16 == 0


def test_a_file_that_is_missing_foreign_or_cut_off_is_refused(tmp_path):
    path = tmp_path / "m.tflite"
    with pytest.raises(ArgumentError, match="There is no file"):
        read_tensors(path)
    path.write_bytes(b"PK\x03\x04 something else")
    with pytest.raises(ArgumentError, match=r"is not a \.tflite file: its bytes 4 to 8"):
        read_tensors(path)
    values = np.ones(64, np.float32).tobytes()
    whole = file_with(schema.TensorType.FLOAT32, (64,), values)
    path.write_bytes(whole[: len(whole) // 4])
    with pytest.raises(ExportError, match=r"damaged or was cut off\. Export it again"):
        read_flat_model(path)
    outside = file_with(schema.TensorType.FLOAT32, (64,), values, outside=True)
    path.write_bytes(outside[:-8])
    with pytest.raises(ExportError, match="a buffer should end at byte"):
        read_flat_model(path)


def test_a_file_that_may_not_be_read_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "m.tflite"
    path.write_bytes(file_with(schema.TensorType.FLOAT32, (1,), bytes(4)))

    def refuse(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.read_bytes", refuse)
    with pytest.raises(ArgumentError, match=r"cannot be read: Permission denied\. Give a \.tflite"):
        read_tensors(path)


def dense_model(inputs=32):
    return keras.Sequential([layers.Input((inputs,)), layers.Dense(20), layers.Dense(6)])


@pytest.mark.parametrize(
    ("block", "formats"), [(1, {"CSR"}), (4, {"block 1x4"})], ids=["csr", "block"]
)
def test_sparse_dense_layers_are_decoded_to_the_weights_of_keras(tmp_path, block, formats):
    model = with_zeros(dense_model(), 0.6, block)
    path = convert(model, tmp_path / "m.tflite", SPARSE)
    found = [tensor for tensor in read_tensors(path) if tensor.constant and len(tensor.shape) > 1]
    assert {tensor.format for tensor in found} == formats
    kernels = [layer.kernel.numpy() for layer in model.layers]
    for tensor in found:
        (kernel,) = [kernel for kernel in kernels if kernel.T.shape == tensor.shape]
        np.testing.assert_array_equal(tensor.values(), kernel.T)
        assert tensor.zeros == np.sum(kernel == 0)
        assert 0 < tensor.index_bytes < tensor.stored_bytes < kernel.nbytes


def test_sparse_convolutions_are_decoded_to_the_weights_of_keras(tmp_path):
    model = keras.Sequential([layers.Input((6, 6, 5)), layers.Conv2D(4, 3, use_bias=False)])
    path = convert(with_zeros(model, 0.5), tmp_path / "m.tflite", SPARSE)
    (tensor,) = [tensor for tensor in read_tensors(path) if tensor.sparse]
    kernel = model.layers[0].kernel.numpy()
    np.testing.assert_array_equal(tensor.values(), kernel.transpose(3, 0, 1, 2))


def test_sparse_integers_are_decoded_and_dequantised(tmp_path):
    model = with_zeros(dense_model(), 0.6, 16)
    path = convert(model, tmp_path / "m.tflite", SPARSE, QUANTIZED, integer=True)
    tensor = next(tensor for tensor in read_tensors(path) if tensor.shape == (20, 32))
    assert (tensor.format, tensor.dtype) == ("block 1x16", "int8")
    kernel = model.layers[0].kernel.numpy().T
    np.testing.assert_array_equal(tensor.raw == 0, np.abs(kernel) < 0.5 * tensor.scales[:, None])
    assert np.abs(tensor.values() - kernel).max() < tensor.scales.max()


def test_operators_options_and_names_are_read(tmp_path):
    model = keras.Sequential([layers.Input((8, 8, 3)), layers.Conv2D(2, 3, strides=2, name="c")])
    flat = read_flat_model(convert(model, tmp_path / "m.tflite"))
    (operator,) = flat.operators
    assert (operator.name, operator.kind, operator.options["strideH"]) == ("CONV_2D", "builtin", 2)
    assert flat.signatures == ("serving_default",)
    (graph,) = flat.graphs
    assert flat.tensor(0, graph.inputs[0]).signature == (-1, 8, 8, 3)
    assert flat.tensor(0, graph.outputs[0]).shape == (1, 3, 3, 2)


def test_a_file_whose_operators_name_no_tensor_is_damaged(tmp_path):
    path = convert(dense_model(), tmp_path / "m.tflite")
    model = tables(path)
    model.subgraphs[0].operators[0].inputs = [0, 99, -1]
    with pytest.raises(ExportError, match=r"names tensor 99 of 5.*damaged"):
        read_flat_model(pack(model, path))
    model = tables(path)
    model.subgraphs[0].outputs = [-1]
    with pytest.raises(ExportError, match=r"The graph names tensor -1 of 5.*damaged"):
        read_flat_model(pack(model, path))


def test_a_tensor_of_another_file_is_constant_but_has_no_values(tmp_path):
    path = tmp_path / "m.tflite"
    path.write_bytes(file_with(schema.TensorType.FLOAT32, (2, 2), b""))
    model = tables(path)
    model.subgraphs[0].tensors[0].externalBuffer = 3
    (tensor,) = read_tensors(pack(model, path))
    assert (tensor.constant, tensor.format, tensor.zeros) == (True, "external", None)


@pytest.mark.parametrize(
    ("shape", "axes", "stored"),
    [
        ((5, 4), (1, 0), (4, 5)),
        ((3, 5, 4), (2, 0, 1), (4, 1, 3, 5)),
        ((3, 3, 5, 4), (3, 0, 1, 2), (4, 3, 3, 5)),
        ((3, 3, 4, 5), (2, 0, 1, 3), (4, 3, 3, 5)),
        ((3, 3, 4, 2), (0, 1, 2, 3), (1, 3, 3, 8)),
        ((2, 2, 2, 3, 4), (0, 1, 2, 3, 4), (2, 2, 2, 3, 4)),
        ((6, 2, 3), (1, 2, 0), (6, 6)),
    ],
    ids=["dense", "conv1d", "conv2d", "transposed", "depthwise", "conv3d", "einsum"],
)
def test_every_layout_is_found_and_brought_back(shape, axes, stored):
    kernel = np.random.default_rng(0).normal(size=shape)
    tensor = flat(np.transpose(kernel, axes).reshape(stored))
    (match,) = match_kernels({"k": kernel}, [tensor])["k"]
    np.testing.assert_array_equal(match.values(kernel), kernel)


def test_a_folded_batch_norm_of_any_sign_does_not_hide_a_kernel():
    rng = np.random.default_rng(1)
    kernels = {name: rng.normal(size=(3, 3, 4, 4)) for name in "abc"}
    factors = np.array([-2.0, 0.1, 0.0, 30.0])
    tensors = [flat(np.transpose(k * factors, (3, 0, 1, 2))) for k in kernels.values()]
    matches = match_kernels(kernels, tensors[::-1])
    for index, name in enumerate("abc"):
        assert matches[name][0].tensor is tensors[index]


def test_equal_kernels_may_share_a_tensor_and_strangers_match_nothing():
    rng = np.random.default_rng(2)
    kernel, stranger = rng.normal(size=(8, 6)), rng.normal(size=(8, 6))
    tensor = flat(kernel.T)
    matches = match_kernels({"a": kernel, "b": kernel, "c": stranger}, [tensor])
    assert matches["a"][0].tensor is tensor
    assert matches["b"][0].tensor is tensor
    assert matches["c"] == ()
    assert match_kernels({"zero": np.zeros((8, 6))}, [tensor])["zero"] == ()


def test_gates_are_found_one_by_one():
    kernel = np.random.default_rng(3).normal(size=(5, 12))
    tensors = [flat(kernel[:, start : start + 3].T) for start in (0, 3, 6, 9)]
    matches = match_kernels({"lstm": kernel}, tensors)["lstm"]
    assert [match.tensor for match in matches] == tensors
    for match in matches:
        np.testing.assert_array_equal(match.values(kernel), match.part(kernel))


def test_kernels_are_named_by_layer_path_through_nested_models():
    block = keras.Sequential(
        [layers.Input((6, 6, 2)), layers.SeparableConv2D(3, 2, name="sep")], name="block"
    )
    model = keras.Sequential([layers.Input((6, 6, 2)), block, layers.Dense(2, name="out")])
    assert list(kernel_variables(model)) == [
        "block/sep/depthwise_kernel",
        "block/sep/pointwise_kernel",
        "out/kernel",
    ]
    found = find_variable(model, "block/sep/pointwise_kernel")
    assert found is block.layers[-1].pointwise_kernel
    with pytest.raises(PlanError, match="Did you mean 'out/kernel'"):
        find_variable(model, "out/kernal")


def test_a_kernel_is_found_by_attribute_names_too():
    model = keras.Sequential([layers.Input((4, 3)), layers.LSTM(2, name="lstm")])
    cell = model.layers[0].cell
    assert find_variable(model, "lstm/cell/recurrent_kernel") is cell.recurrent_kernel
    assert list(kernel_variables(model)) == [
        "lstm/cell/kernel",
        "lstm/cell/recurrent_kernel",
    ]
