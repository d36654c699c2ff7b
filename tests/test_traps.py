"""Files that compute wrongly or abort without an error, and that the exporter writes none of.

Every test makes a file that falls into the trap, to show that it is still there, and looks at what
the exporter and the choice of sparse formats do instead. A trap that LiteRT has mended fails here:
then the rule against it can go.
"""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
import tf_keras as keras
import tflite_files as files
import zoo
from ai_edge_litert import schema_py_generated as schema

from rl_sparsity_tf.errors import ArgumentError, VerificationError
from rl_sparsity_tf.export.export import export_tflite
from rl_sparsity_tf.export.verification import TOLERANCES, verify_outputs
from rl_sparsity_tf.tflite.integer_storage import IntegerForm, integer_form, store_dequantized
from rl_sparsity_tf.tflite.reading import read_flat_model
from rl_sparsity_tf.tflite.recipes import operator_entry, quantize_file, scope_of
from rl_sparsity_tf.tflite.sparse_storage import choose_formats, sparsify_file, why_dense
from rl_sparsity_tf.tflite.worker import ConversionWorker, WorkerError

layers = keras.layers


@pytest.fixture(scope="module")
def worker():
    with ConversionWorker() as child:
        yield child


def dense(inputs=64, block=4, outputs=32):
    model = keras.Sequential([layers.Input((inputs,)), layers.Dense(outputs)])
    return files.with_zeros(model, 0.9, block)


def rows(model, count=8):
    shape = (count, *model.input_shape[1:])
    return np.random.default_rng(3).normal(size=shape).astype(np.float32)


def verified(worker, path, model, mode="dynamic"):
    x = rows(model)
    return verify_outputs(worker, path, [x], [model.predict(x, verbose=0)], TOLERANCES[mode])


def weights_of(path):
    flat = read_flat_model(path)
    return flat, [t for t in flat.tensors if t.constant and len(t.shape) > 1]


def formats_in(path):
    return {tensor.format for tensor in weights_of(path)[1]}


def test_float16_blocks_are_not_a_number(worker, tmp_path):
    model = dense()
    path = files.convert(
        model, tmp_path / "m.tflite", files.QUANTIZED, files.SPARSE, types=[tf.float16]
    )
    assert "block 1x4" in formats_in(path)
    with pytest.raises(VerificationError):
        verified(worker, path, model, "float16")
    for formats in ("raw", "gzip"):
        report = export_tflite(model, tmp_path / f"{formats}.tflite", "float16", formats=formats)
        assert not any("stored dense" in note for note in report.notes)
        flat, weights = weights_of(report.path)
        for weight in weights:
            if weight.sparse:
                assert {reader.name for reader in flat.consumers(weight)} == {"DENSIFY"}


@pytest.mark.parametrize(("block", "stored"), [(16, "block 1x16"), (1, "CSR")])
def test_sparse_weights_of_dynamic_kernels_fail_under_xnnpack(worker, block, stored, tmp_path):
    model = dense(128, block)
    path = files.convert(model, tmp_path / "m.tflite", files.QUANTIZED, files.SPARSE)
    assert stored in formats_in(path)
    with pytest.raises(VerificationError, match=r"\(with XNNPACK|does not run"):
        verified(worker, path, model)
    plain = files.convert(model, tmp_path / "plain.tflite", files.QUANTIZED)
    flat, (weight,) = weights_of(plain)
    assert "FULLY_CONNECTED" in (why_dense(flat, weight) or "")
    assert set(choose_formats(flat, "raw").values()) == {"dense"}
    export_tflite(model, tmp_path / "ours.tflite", "dynamic", formats="raw")
    assert formats_in(tmp_path / "ours.tflite") == {"dense"}


def test_integer_dense_layers_do_not_take_densified_weights(worker, tmp_path):
    model = dense(block=1)
    path = files.convert(model, tmp_path / "m.tflite", files.QUANTIZED, files.SPARSE, integer=True)
    assert formats_in(path) == {"CSR"}
    with pytest.raises(VerificationError, match="does not run in LiteRT"):
        verified(worker, path, model, "int8")
    x = rows(model, 64)
    export_tflite(model, tmp_path / "ours.tflite", "int8", formats="raw", representative_data=x)
    assert formats_in(tmp_path / "ours.tflite") == {"dense"}


def test_blocks_drop_the_inputs_that_fill_none(worker, tmp_path):
    model = dense(62)
    kernel = model.layers[-1].kernel
    kernel.assign(tf.concat([kernel[:60], tf.ones((2, 32))], axis=0))  # the ragged end matters
    path = files.convert(model, tmp_path / "m.tflite", files.SPARSE)
    with pytest.raises(VerificationError, match="differs from Keras"):
        verified(worker, path, model, "none")
    plain = files.convert(model, tmp_path / "plain.tflite")
    _, (weight,) = weights_of(plain)
    key = (weight.subgraph, weight.index)
    with pytest.raises(ArgumentError, match="62 is no multiple of 4, and the runtimes drop"):
        sparsify_file(plain, tmp_path / "s.tflite", {key: "block"})
    report = export_tflite(model, tmp_path / "ours.tflite", "none", formats="raw")
    assert formats_in(report.path) == {"CSR"}


def test_four_bit_weights_are_never_sparse(tmp_path):
    model = dense(block=1)
    path = tmp_path / "m.tflite"
    export_tflite(model, path, "none")
    flat, (weight,) = weights_of(path)
    form = integer_form(flat, weight, 4)
    assert form is not None
    store_dequantized(path, path, [(weight, form)])
    flat, (weight,) = weights_of(path)
    assert weight.dtype == "int4"
    assert why_dense(flat, weight) == "DENSIFY cannot read int4"
    with pytest.raises(ArgumentError, match=r"DENSIFY cannot read int4\. Leave it dense"):
        sparsify_file(path, path, {(weight.subgraph, weight.index): "csr"})


def test_the_quantizer_leaves_buffers_where_plain_readers_see_none(tmp_path):
    from litert_quantizer import quantizer

    model = dense(600, 1, 500)  # the quantizer does so from 256 KiB
    path = tmp_path / "m.tflite"
    export_tflite(model, path, "none")
    flat, (weight,) = weights_of(path)
    entries = [
        {"key": "d", "bits": 8, "operators": [operator_entry(flat, o)]}
        for o in flat.consumers(weight)
    ]
    ours = tmp_path / "ours.tflite"
    result = quantize_file(str(path), str(ours), entries)
    raw = quantizer.Quantizer(str(path), result["recipe"]).quantize(enable_progress_report=False)

    def largest(content):
        buffers = schema.ModelT.InitFromPackedBuf(content, 0).buffers
        return max(0 if buffer.data is None else len(buffer.data) for buffer in buffers)

    assert largest(bytes(raw.quantized_model)) < 600 * 500
    assert largest(ours.read_bytes()) == 600 * 500


def test_four_bit_rows_are_fetched_wrongly_under_xnnpack(worker, tmp_path):
    inputs = layers.Input((5,), dtype="int32")
    model = keras.Model(inputs, layers.Embedding(40, 32)(inputs))
    path = tmp_path / "m.tflite"
    export_tflite(model, path, "none")
    flat, (table,) = weights_of(path)
    fetched = IntegerForm(bits=4, axis=None, fetched=True)
    store_dequantized(path, path, [(table, fetched)])
    x = zoo.inputs_for(model, 8)
    with pytest.raises(VerificationError):
        verify_outputs(worker, path, [x], [model.predict(x, verbose=0)], TOLERANCES["plan4"])
    assert integer_form(flat, table, 4) == IntegerForm(bits=4, axis=None, fetched=False)


def test_static_matrix_products_use_one_scale_for_all_columns(worker, tmp_path):
    model = keras.Sequential([layers.Input((6, 4)), layers.LocallyConnected1D(8, 3)])
    kernel = model.layers[-1].kernel
    kernel.assign(kernel * tf.constant([1.0, 2.0, 4.0, 8.0] * 2))
    path = tmp_path / "m.tflite"
    export_tflite(model, path, "none")
    flat = read_flat_model(path)
    (product,) = [o for o in flat.operators if o.name == "BATCH_MATMUL"]
    entry = {"key": "k", "bits": 8, "operators": [operator_entry(flat, product)]}
    assert scope_of(flat, product) == entry["operators"][0]["scope"]
    x = rows(model, 32)
    result = quantize_file(str(path), str(tmp_path / "q.tflite"), [entry], "static", [])
    assert list(result["float"]) == ["k"]
    wrong = static_product(path, product, flat, x)
    target = tmp_path / "wrong.tflite"
    target.write_bytes(wrong)
    with pytest.raises((VerificationError, WorkerError)):
        verify_outputs(worker, target, [x], [model.predict(x, verbose=0)], TOLERANCES["plan"])


def static_product(path, product, flat, x):
    """What the quantizer makes of a BATCH_MATMUL if asked."""
    from ai_edge_litert.interpreter import Interpreter
    from litert_quantizer import quantizer

    maker = quantizer.Quantizer(str(path))
    maker.add_static_config(
        f"^{scope_of(flat, product)}$".replace("(", r"\("), "BATCH_MATMUL", 8, 8
    )
    runner = Interpreter(model_path=str(path))
    ((key, signature),) = runner.get_signature_list().items()
    ranges = maker.calibrate({key: [{signature["inputs"][0]: x}]}, num_threads=1)
    return bytes(maker.quantize(ranges, enable_progress_report=False).quantized_model)
