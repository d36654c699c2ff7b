"""Sparse formats in .tflite files: what becomes sparse, and that both runtimes still agree."""

from __future__ import annotations

import gzip

import flatbuffers
import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter, OpResolverType

from rl_sparsity_tf.errors import ArgumentError
from rl_sparsity_tf.tflite.editing import FileEditor
from rl_sparsity_tf.tflite.reading import read_flat_model
from rl_sparsity_tf.tflite.sparse_storage import (
    choose_formats,
    saved_bytes,
    sparsify_file,
    why_dense,
)

TYPES = schema.TensorType
OPTIONS = {
    "FULLY_CONNECTED": schema.FullyConnectedOptionsT,
    "CONV_2D": schema.Conv2DOptionsT,
    "DEPTHWISE_CONV_2D": schema.DepthwiseConv2DOptionsT,
    "TRANSPOSE_CONV": schema.TransposeConvOptionsT,
    "GATHER": schema.GatherOptionsT,
    "DEQUANTIZE": schema.DequantizeOptionsT,
}


class Network:
    """A .tflite model put together operator by operator, its batch size open."""

    def __init__(self, *shape, dtype="float32"):
        self.graph, self.model = schema.SubGraphT(), schema.ModelT()
        self.graph.tensors, self.graph.operators = [], []
        self.model.version, self.model.subgraphs = 3, [self.graph]
        self.model.buffers, self.model.operatorCodes = [schema.BufferT()], []
        self.last = self.tensor((1, *shape), dtype, scale=[0.1] if dtype == "int8" else None)
        self.graph.tensors[0].shapeSignature = [-1, *shape]

    def tensor(self, shape, dtype, values=None, scale=None, axis=0, buffer=None):
        tensor = schema.TensorT()
        tensor.shape, tensor.type = list(shape), getattr(TYPES, dtype.upper())
        tensor.name, tensor.buffer = b"t%d" % len(self.graph.tensors), buffer or 0
        if scale is not None:
            tensor.quantization = schema.QuantizationParametersT()
            tensor.quantization.scale, tensor.quantization.zeroPoint = scale, [0] * len(scale)
            tensor.quantization.quantizedDimension = axis
        if values is not None:
            stored = schema.BufferT()
            stored.data = np.frombuffer(values.tobytes(), np.uint8)
            self.model.buffers.append(stored)
            tensor.buffer = len(self.model.buffers) - 1
        self.graph.tensors.append(tensor)
        return len(self.graph.tensors) - 1

    def add(self, name, inputs, shape, dtype="float32", **options):
        code = schema.OperatorCodeT()
        code.builtinCode = code.deprecatedBuiltinCode = getattr(schema.BuiltinOperator, name)
        # 4-bit weights and per-channel scales need the later ones; any reader of files has these.
        code.version = {"DEQUANTIZE": 5, "FULLY_CONNECTED": 5, "CONV_2D": 3}.get(name, 3)
        self.model.operatorCodes.append(code)
        operator = schema.OperatorT()
        operator.opcodeIndex = len(self.model.operatorCodes) - 1
        operator.inputs = inputs
        operator.outputs = [self.tensor(shape, dtype, scale=[0.5] if dtype == "int8" else None)]
        operator.builtinOptions = OPTIONS[name]()
        operator.builtinOptionsType = getattr(
            schema.BuiltinOptions, OPTIONS[name].__name__.removesuffix("T")
        )
        for option, value in options.items():
            setattr(operator.builtinOptions, option, value)
        self.graph.operators.append(operator)
        return operator.outputs[0]

    def weight(self, values, dtype="float32", *, dequantize=False, axis=0):
        """A constant, behind DEQUANTIZE if asked for."""
        scale = None
        if dtype.startswith("int"):
            scale = [0.02] * values.shape[axis]
        index = self.tensor(values.shape, dtype, values, scale, axis)
        if dequantize:
            index = self.add("DEQUANTIZE", [index], values.shape)
        return index

    def dense(self, index, shape, dtype="float32"):
        self.last = self.add("FULLY_CONNECTED", [self.last, index, -1], (1, shape[0]), dtype)
        return self

    def conv(self, index, out, name="CONV_2D", dtype="float32", **options):
        steps = {"strideW": 1, "strideH": 1, "padding": schema.Padding.SAME, **options}
        if name != "TRANSPOSE_CONV":
            steps |= {"dilationWFactor": 1, "dilationHFactor": 1}
        # Convolutions want a bias, in units of input scale * weight scale where they are integers.
        whole = dtype == "int8"
        bias = np.zeros(out, np.int32 if whole else np.float32)
        added = self.tensor((out,), str(bias.dtype), bias, [0.1 * 0.02] * out if whole else None)
        self.last = self.add(name, [self.last, index, added], (1, 5, 5, out), dtype, **steps)
        return self

    def save(self, path):
        self.graph.inputs, self.graph.outputs = [0], [self.last]
        builder = flatbuffers.Builder(64)
        builder.Finish(self.model.Pack(builder), file_identifier=b"TFL3")
        path.write_bytes(FileEditor(bytes(builder.Output())).packed())
        return path


def sparse(shape, density=0.1, seed=0, dtype="float32", block=1):
    """Random weights, of which whole blocks along the last axis are zero."""
    generator = np.random.default_rng(seed)
    values = generator.normal(size=shape)
    if dtype == "int8":
        # A value that happens to be rounded to zero would change the density asked for.
        values = np.where(np.abs(values) < 0.02, 1, np.clip(np.round(values * 40), -127, 127))
    used = generator.random((*shape[:-1], -(-shape[-1] // block))) < density
    return (values * np.repeat(used, block, axis=-1)[..., : shape[-1]]).astype(dtype)


def run(path, xnnpack):
    """Outputs for batches of 2, 5 and 1 rows from one interpreter."""
    resolver = OpResolverType.AUTO if xnnpack else OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    interpreter = Interpreter(
        model_path=str(path), experimental_op_resolver_type=resolver, num_threads=1
    )
    into = interpreter.get_input_details()[0]
    output = interpreter.get_output_details()[0]["index"]
    generator = np.random.default_rng(1)
    outputs = []
    for rows in (2, 5, 1):
        interpreter.resize_tensor_input(into["index"], [rows, *into["shape"][1:]])
        interpreter.allocate_tensors()
        x = generator.normal(size=(rows, *into["shape"][1:])) * (
            9 if into["dtype"] == np.int8 else 1
        )
        if into["dtype"] == np.int32:
            x = generator.integers(0, 9, size=x.shape)
        interpreter.set_tensor(into["index"], x.astype(into["dtype"]))
        for _ in range(2):
            interpreter.invoke()
            outputs.append(interpreter.get_tensor(output).astype(np.float32).reshape(-1))
    return np.concatenate(outputs)


def constants(path):
    """The weights: constants of rank 2 or more."""
    tensors = read_flat_model(path).tensors
    return [tensor for tensor in tensors if tensor.constant and len(tensor.shape) > 1]


def operators(path):
    return [operator.name for operator in read_flat_model(path).operators]


def assert_equal_outputs(dense, other):
    for xnnpack in (False, True):
        expected = run(dense, xnnpack)
        assert np.ptp(expected) > 0
        np.testing.assert_allclose(run(other, xnnpack), expected, rtol=1e-5, atol=1e-5)


def networks():
    """Networks whose one weight may be sparse, with the shape of that weight."""
    for kind, dtype, behind in [
        ("float32", "float32", False),
        ("weight-only int8", "int8", True),
        ("float16", "float16", True),
    ]:
        shape = (24, 64)
        network = Network(64)
        weight = network.weight(sparse(shape, dtype=dtype), dtype, dequantize=behind)
        yield f"dense {kind}", network.dense(weight, shape), shape
        shape = (24, 3, 3, 16)
        network = Network(5, 5, 16)
        weight = network.weight(sparse(shape, dtype=dtype), dtype, dequantize=behind)
        yield f"conv {kind}", network.conv(weight, 24), shape
        shape = (1, 3, 3, 96)
        network = Network(5, 5, 96)
        weight = network.weight(sparse(shape, dtype=dtype), dtype, dequantize=behind, axis=3)
        depthwise = network.conv(weight, 96, "DEPTHWISE_CONV_2D", depthMultiplier=1)
        yield f"depthwise {kind}", depthwise, shape
    network = Network(3, dtype="int32")
    table = network.weight(sparse((40, 32)))
    network.last = network.add("GATHER", [table, network.last], (1, 3, 32))
    yield "embedding", network, (40, 32)
    network = Network(5, 5, 16, dtype="int8")
    weight = network.weight(sparse((24, 3, 3, 16), dtype="int8"), "int8")
    yield "conv int8", network.conv(weight, 24, dtype="int8"), (24, 3, 3, 16)


NETWORKS = {name: (network, shape) for name, network, shape in networks()}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_compressed_weight_gives_the_same_outputs_in_both_runtimes(name, tmp_path):
    network, shape = NETWORKS[name]
    dense, smaller = network.save(tmp_path / "dense.tflite"), tmp_path / "sparse.tflite"
    formats = choose_formats(read_flat_model(dense))
    assert list(formats.values()) == ["csr"]
    sparsify_file(dense, smaller, formats)
    assert smaller.stat().st_size < dense.stat().st_size
    (before,), (after,) = constants(dense), constants(smaller)
    assert after.sparse
    assert (after.shape, after.dtype, after.name) == (shape, before.dtype, before.name)
    np.testing.assert_array_equal(after.raw, before.raw)
    np.testing.assert_array_equal(after.scales, before.scales)
    assert operators(smaller) == ["DENSIFY", *operators(dense)]
    assert_equal_outputs(dense, smaller)


@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "embedding"])
def test_a_block_gives_the_same_outputs_in_both_runtimes(name, tmp_path):
    network, _ = NETWORKS[name]
    dense, smaller = network.save(tmp_path / "dense.tflite"), tmp_path / "sparse.tflite"
    (key,) = choose_formats(read_flat_model(dense))
    sparsify_file(dense, smaller, {key: "block"})
    assert constants(smaller)[0].format == "block 1x4"
    # Only float32 blocks of FULLY_CONNECTED have kernels of their own.
    native = name == "dense float32"
    assert ("DENSIFY" in operators(smaller)) != native
    assert_equal_outputs(dense, smaller)


def test_native_blocks_take_the_version_that_xnnpack_leaves_alone(tmp_path):
    network, _ = NETWORKS["dense float32"]
    dense, smaller = network.save(tmp_path / "dense.tflite"), tmp_path / "sparse.tflite"
    (key,) = choose_formats(read_flat_model(dense))
    sparsify_file(dense, smaller, {key: "block"})
    model = schema.ModelT.InitFromPackedBuf(smaller.read_bytes(), 0)
    (operator,) = model.subgraphs[0].operators
    assert model.operatorCodes[operator.opcodeIndex].version == 8


def test_empty_rows_and_a_weight_of_zeros_alone_still_run(tmp_path):
    values = sparse((24, 64))
    values[:8] = 0
    network = Network(64)
    network.dense(network.weight(values), (24, 64))
    network.dense(network.weight(np.zeros((32, 24), np.float32)), (32, 24))
    shape = (16, 32)
    network.dense(network.weight(sparse(shape)), shape)
    path = network.save(tmp_path / "dense.tflite")
    keys = list(choose_formats(read_flat_model(path)))
    for name in ("csr", "block"):
        smaller = tmp_path / f"{name}.tflite"
        sparsify_file(path, smaller, dict.fromkeys(keys, name))
        assert all(tensor.sparse for tensor in constants(smaller))
        for xnnpack in (False, True):
            np.testing.assert_array_equal(run(smaller, xnnpack), run(path, xnnpack))


def trap(kind):
    """Networks that LiteRT refuses, or computes wrongly, with a sparse weight."""
    if kind == "int4":
        network = Network(64)
        packed = np.zeros(24 * 32, np.int8)
        index = network.tensor((24, 64), "int4", packed, [0.1] * 24)
        return network.dense(network.add("DEQUANTIZE", [index], (24, 64)), (24, 64))
    if kind == "hybrid conv":
        network = Network(5, 5, 16)
        return network.conv(network.weight(sparse((24, 3, 3, 16), dtype="int8"), "int8"), 24)
    if kind == "transposed conv":
        network = Network(5, 5, 16)
        values = sparse((24, 3, 3, 16), dtype="int8")
        weight = network.weight(values, "int8", dequantize=True)
        sizes = network.tensor((4,), "int32", np.array([1, 5, 5, 24], np.int32))
        network.last = network.add(
            "TRANSPOSE_CONV", [sizes, weight, network.last], (1, 5, 5, 24), strideW=1, strideH=1
        )
        return network
    if kind == "float16 embedding":
        network = Network(3, dtype="int32")
        table = network.weight(sparse((40, 64), dtype="float16"), "float16", dequantize=True)
        network.last = network.add("GATHER", [table, network.last], (1, 3, 64))
        return network
    inner = "int8" if kind == "int8 dense" else "float32"
    network = Network(64, dtype=inner)
    values = sparse((24, 64), dtype="int8")
    return network.dense(network.weight(values, "int8"), (24, 64), inner)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("int4", "DENSIFY cannot read int4"),
        ("int8 dense", "FULLY_CONNECTED with int8 weights refuses it"),
        ("hybrid dense", "FULLY_CONNECTED with int8 weights refuses it"),
        ("hybrid conv", "XNNPACK refuses a hybrid CONV_2D"),
        ("transposed conv", "TRANSPOSE_CONV behind DEQUANTIZE refuses it, computes wrongly"),
        ("float16 embedding", "GATHER behind DEQUANTIZE refuses it, computes wrongly"),
    ],
)
def test_traps_stay_dense_and_are_refused(kind, reason, tmp_path):
    path = trap(kind).save(tmp_path / "m.tflite")
    flat = read_flat_model(path)
    for target in ("raw", "gzip"):
        assert set(choose_formats(flat, target).values()) == {"dense"}
    (key,) = choose_formats(flat)
    assert reason in why_dense(flat, flat.tensor(*key))
    with pytest.raises(ArgumentError, match=rf"cannot be stored as 'csr'.*{reason}.*Leave it dens"):
        sparsify_file(path, tmp_path / "out.tflite", {key: "csr"})
    assert not (tmp_path / "out.tflite").exists()


def test_blocks_that_do_not_fit_and_unknown_names_are_refused(tmp_path):
    network = Network(30)
    path = network.dense(network.weight(sparse((24, 30))), (24, 30)).save(tmp_path / "m.tflite")
    flat = read_flat_model(path)
    (key,) = choose_formats(flat)
    out = tmp_path / "out.tflite"
    with pytest.raises(ArgumentError, match=r"last axis of 30 is no multiple of 4.*Leave it dense"):
        sparsify_file(path, out, {key: "block"})
    with pytest.raises(ArgumentError, match=r"formats names tensor \(0, 99\).*choose_formats"):
        sparsify_file(path, out, {(0, 99): "csr"})
    with pytest.raises(ArgumentError, match=r"'coo' is not known. Expected one of 'dense'"):
        sparsify_file(path, out, {key: "coo"})
    with pytest.raises(ArgumentError, match="target='zip' is not known"):
        choose_formats(flat, "zip")


def shapes_and_densities():
    for seed, shape in enumerate([(10, 100), (100, 300), (48, 784), (300, 70)]):
        for density in (0.02, 0.1, 0.3, 0.6):
            for dtype in ("float32", "int8"):
                yield shape, density, dtype, seed


def test_predicted_bytes_are_those_of_the_file(tmp_path):
    dense, smaller = tmp_path / "dense.tflite", tmp_path / "sparse.tflite"
    errors = []
    for shape, density, dtype, seed in shapes_and_densities():
        network = Network(shape[1])
        values = sparse(shape, density, seed, dtype)
        network.dense(network.weight(values, dtype, dequantize=dtype == "int8"), shape).save(dense)
        flat = read_flat_model(dense)
        (key,) = choose_formats(flat)
        for name in ("csr", "block"):
            if name == "block" and shape[1] % 4:
                continue
            sparsify_file(dense, smaller, {key: name})
            real = smaller.stat().st_size
            saved = saved_bytes(flat, flat.tensor(*key), name)
            predicted = dense.stat().st_size - saved
            errors.append(abs(predicted - real) / max(real, 5000))
    assert max(errors) < 0.01, errors


@pytest.mark.parametrize("target", ["raw", "gzip"])
def test_no_file_grows_and_each_target_is_served_best_by_its_own_choice(target, tmp_path):
    dense = tmp_path / "dense.tflite"
    totals = dict.fromkeys(("dense", "raw", "gzip"), 0)
    for shape, density, dtype, seed in list(shapes_and_densities())[::3]:
        network = Network(shape[1])
        values = sparse(shape, density, seed, dtype)
        network.dense(network.weight(values, dtype, dequantize=dtype == "int8"), shape).save(dense)
        sizes = {"dense": size(dense, target)}
        for chosen in ("raw", "gzip"):
            path = tmp_path / f"{chosen}.tflite"
            sparsify_file(dense, path, choose_formats(read_flat_model(dense), chosen))
            sizes[chosen] = size(path, target)
        assert sizes[target] <= sizes["dense"], (shape, density, dtype)
        for name, value in sizes.items():
            totals[name] += value
    other = "gzip" if target == "raw" else "raw"
    assert totals[target] < totals[other]
    assert totals[target] < totals["dense"]


def size(path, target):
    content = path.read_bytes()
    return len(content) if target == "raw" else len(gzip.compress(content, 9, mtime=0))


def test_few_zeros_stay_dense_and_runs_become_blocks(tmp_path):
    for density, block, expected in [(0.9, 1, "dense"), (0.1, 1, "csr"), (0.1, 4, "block")]:
        network = Network(64)
        weight = network.weight(sparse((48, 64), density, block=block))
        path = network.dense(weight, (48, 64)).save(tmp_path / "m.tflite")
        assert list(choose_formats(read_flat_model(path)).values()) == [expected]


def test_the_order_with_the_narrower_indices_is_taken(tmp_path):
    network = Network(784)
    values = sparse((100, 784))
    path = network.dense(network.weight(values), (100, 784)).save(tmp_path / "m.tflite")
    out = tmp_path / "out.tflite"
    sparsify_file(path, out, choose_formats(read_flat_model(path)))
    # Row numbers fit a byte, column numbers need two.
    used = np.count_nonzero(values)
    assert constants(out)[0].index_bytes == used + 2 * 785
    assert_equal_outputs(path, out)


def test_sparsifying_repeats_and_leaves_what_is_sparse(tmp_path):
    network, _ = NETWORKS["conv weight-only int8"]
    path = network.save(tmp_path / "m.tflite")
    formats = choose_formats(read_flat_model(path))
    first, second, third = (tmp_path / f"{name}.tflite" for name in "abc")
    sparsify_file(path, first, formats)
    sparsify_file(path, second, formats)
    assert first.read_bytes() == second.read_bytes()
    assert choose_formats(read_flat_model(first)) == {}
    sparsify_file(first, third, formats)
    assert first.read_bytes() == third.read_bytes()
    sparsify_file(path, path, formats)
    assert path.read_bytes() == first.read_bytes()


def sharing(tmp_path):
    """Two equal layers whose weights are two tensors with one buffer."""
    network = Network(64)
    first = network.weight(sparse((64, 64)))
    buffer = network.graph.tensors[first].buffer
    network.dense(first, (64, 64))
    network.dense(network.tensor((64, 64), "float32", buffer=buffer), (64, 64))
    return network.save(tmp_path / "m.tflite")


def test_a_shared_buffer_stays_shared_or_stays_for_the_dense_one(tmp_path):
    path, both, one = sharing(tmp_path), tmp_path / "both.tflite", tmp_path / "one.tflite"
    formats = choose_formats(read_flat_model(path))
    assert list(formats.values()) == ["csr", "csr"]
    sparsify_file(path, both, formats)
    assert len({tensor.buffer for tensor in constants(both)}) == 1
    assert operators(both).count("DENSIFY") == 2
    assert_equal_outputs(path, both)
    sparsify_file(path, one, dict(list(formats.items())[:1]))
    assert [tensor.sparse for tensor in constants(one)] == [True, False]
    assert_equal_outputs(path, one)


def test_one_densify_serves_all_readers(tmp_path):
    network = Network(64)
    weight = network.weight(sparse((64, 64)))
    path = network.dense(weight, (64, 64)).dense(weight, (64, 64)).save(tmp_path / "m.tflite")
    out = tmp_path / "out.tflite"
    sparsify_file(path, out, choose_formats(read_flat_model(path)))
    assert operators(out) == ["DENSIFY", "FULLY_CONNECTED", "FULLY_CONNECTED"]
    assert_equal_outputs(path, out)


def test_metadata_and_signatures_stay(tmp_path):
    network, _ = NETWORKS["dense float32"]
    model = schema.ModelT.InitFromPackedBuf(network.save(tmp_path / "m.tflite").read_bytes(), 0)
    entry, note = schema.MetadataT(), schema.BufferT()
    note.data = np.frombuffer(b"made by a test", np.uint8)
    model.buffers.append(note)
    entry.name, entry.buffer = b"note", len(model.buffers) - 1
    signature, given, result = schema.SignatureDefT(), schema.TensorMapT(), schema.TensorMapT()
    given.name, given.tensorIndex = b"x", 0
    result.name, result.tensorIndex = b"y", int(model.subgraphs[0].outputs[0])
    signature.inputs, signature.outputs = [given], [result]
    signature.signatureKey, signature.subgraphIndex = b"serving_default", 0
    model.metadata, model.signatureDefs = [entry], [signature]
    builder = flatbuffers.Builder(64)
    builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
    path, out = tmp_path / "m.tflite", tmp_path / "out.tflite"
    path.write_bytes(FileEditor(bytes(builder.Output())).packed())
    sparsify_file(path, out, choose_formats(read_flat_model(path)))
    kept = schema.ModelT.InitFromPackedBuf(out.read_bytes(), 0)
    assert bytes(kept.buffers[kept.metadata[0].buffer].data) == b"made by a test"
    x = np.random.default_rng(0).normal(size=(3, 64)).astype(np.float32)
    answers = [
        Interpreter(model_path=str(file)).get_signature_runner("serving_default")(x=x)["y"]
        for file in (path, out)
    ]
    np.testing.assert_allclose(answers[1], answers[0], rtol=1e-6)
