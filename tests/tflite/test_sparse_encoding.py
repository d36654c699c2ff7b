"""TFLite's sparse format: what is encoded comes back, in the smallest index types."""

from __future__ import annotations

import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema
from hypothesis import given, settings
from hypothesis import strategies as st

from rl_sparsity_tf.errors import ArgumentError, ExportError
from rl_sparsity_tf.tflite.sparse_encoding import decode_sparse, encode_sparse

DTYPES = ("float32", "float16", "int8", "int32")


@st.composite
def arrays(draw, multiple=1):
    shape = [*draw(st.lists(st.integers(1, 5), max_size=4)), draw(st.integers(1, 6)) * multiple]
    density = draw(st.sampled_from([0.0, 0.05, 0.5, 1.0]))
    generator = np.random.default_rng(draw(st.integers(0, 2**16)))
    values = generator.integers(-100, 100, shape) * (generator.random(shape) < density)
    if len(shape) > 1 and draw(st.booleans()):
        values[0] = 0
    return values.astype(draw(st.sampled_from(DTYPES)))


def decoded(encoding, values):
    parameters = encoding.parameters()
    return decode_sparse(encoding.values.tobytes(), values.shape, parameters, str(values.dtype))


def assert_same(actual, expected):
    assert actual.dtype == expected.dtype
    np.testing.assert_array_equal(actual, expected)


@settings(max_examples=150, deadline=None)
@given(arrays(), st.randoms(use_true_random=False))
def test_compressed_arrays_come_back_in_any_order(values, random):
    order = list(range(values.ndim))
    random.shuffle(order)
    encoding = encode_sparse(values, order=order)
    assert len(encoding.values) == max(1, np.count_nonzero(values))
    assert_same(decoded(encoding, values), values)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from([2, 4, 16]), st.data())
def test_blocks_come_back(block, data):
    values = data.draw(arrays(multiple=block))
    encoding = encode_sparse(values, block=block)
    assert len(encoding.values) % block == 0
    assert_same(decoded(encoding, values), values)


def test_rows_are_segments_and_columns_indices():
    values = np.array([[0, 5, 0, 6], [0, 0, 0, 0], [7, 0, 0, 0]], np.int8)
    encoding = encode_sparse(values)
    np.testing.assert_array_equal(encoding.values, [5, 6, 7])
    np.testing.assert_array_equal(encoding.segments, [0, 2, 2, 3])
    np.testing.assert_array_equal(encoding.indices, [1, 3, 0])
    assert encoding.data_bytes == 3 + 4 + 3
    turned = encode_sparse(values, order=(1, 0))
    np.testing.assert_array_equal(turned.values, [7, 5, 6])
    np.testing.assert_array_equal(turned.segments, [0, 1, 2, 2, 3])
    np.testing.assert_array_equal(turned.indices, [2, 0, 0])


def test_a_block_keeps_its_zeros():
    values = np.array([[0, 0, 0, 0, 1, 0, 0, 2], [0] * 8], np.float32)
    encoding = encode_sparse(values, block=4)
    np.testing.assert_array_equal(encoding.values, [1, 0, 0, 2])
    np.testing.assert_array_equal(encoding.segments, [0, 1, 1])
    np.testing.assert_array_equal(encoding.indices, [1])
    parameters = encoding.parameters()
    np.testing.assert_array_equal(parameters.traversalOrder, [0, 1, 2])
    np.testing.assert_array_equal(parameters.blockMap, [1])


def test_all_zeros_leave_a_buffer_that_is_not_empty():
    values = np.zeros((3, 4), np.float32)
    for block in (1, 4):
        encoding = encode_sparse(values, block=block)
        assert len(encoding.values) == block
        assert_same(decoded(encoding, values), values)


@pytest.mark.parametrize(
    ("columns", "used", "segments", "indices", "table"),
    [
        (256, 256, "uint16", "uint8", schema.Uint8VectorT),
        (257, 255, "uint8", "uint16", schema.Uint16VectorT),
        (65_536, 3, "uint8", "uint16", schema.Uint16VectorT),
        (65_537, 65_536, "int32", "int32", schema.Int32VectorT),
    ],
)
def test_indices_take_one_two_or_four_bytes(columns, used, segments, indices, table):
    values = np.zeros((1, columns), np.int8)
    values[0, -used:] = 1
    encoding = encode_sparse(values)
    assert (encoding.segments.dtype, encoding.indices.dtype) == (segments, indices)
    assert type(encoding.parameters().dimMetadata[1].arrayIndices) is table
    assert_same(decoded(encoding, values), values)


def test_four_bit_values_are_unpacked():
    encoding = encode_sparse(np.array([[0, 1, 0], [-8, 0, 7]], np.int8))
    values = decode_sparse(bytes([0x81, 0x07]), (2, 3), encoding.parameters(), "int4")
    assert_same(values, np.array([[0, 1, 0], [-8, 0, 7]], np.int8))


def test_several_compressed_levels_are_read():
    # Rows 0 and 2 of 3 are used, each with one column: only other writers make such files.
    parameters = encode_sparse(np.eye(2, dtype=np.int8)).parameters()
    rows, columns = parameters.dimMetadata
    rows.format = schema.DimensionType.SPARSE_CSR
    rows.arraySegments, rows.arrayIndices = schema.Uint8VectorT(), schema.Uint8VectorT()
    rows.arraySegments.values, rows.arrayIndices.values = [0, 2], [0, 2]
    values = decode_sparse(bytes([5, 6]), (3, 2), parameters, "int8")
    np.testing.assert_array_equal(values, [[5, 0], [0, 0], [0, 6]])
    assert columns.format == schema.DimensionType.SPARSE_CSR


@pytest.mark.parametrize(
    ("values", "arguments", "message"),
    [
        (np.float32(1), {}, "A single number has no sparse format. Give an array of rank 1"),
        (np.ones((2, 3)), {"order": (0, 0)}, r"order=\(0, 0\) .* Expected each of 0 to 1 once"),
        (np.ones((2, 3)), {"block": 0}, "block=0 cannot be used. Expected an integer of at least"),
        (np.ones((2, 4)), {"block": 2, "order": (1, 0)}, "cannot be used with blocks. Leave order"),
        (np.ones((2, 6)), {"block": 4}, "its last axis of 6 is no multiple of 4.*Choose another"),
    ],
)
def test_what_cannot_be_encoded_is_refused(values, arguments, message):
    with pytest.raises(ArgumentError, match=message):
        encode_sparse(np.asarray(values), **arguments)


def damaged(change):
    parameters = encode_sparse(np.eye(3, 4, dtype=np.int8)).parameters()
    change(parameters, parameters.dimMetadata[1])
    return parameters


def _set(name, values):
    def change(parameters, level):
        table = schema.Int32VectorT()
        table.values = np.asarray(values, np.int32)
        setattr(level, name, table)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("arraySegments", [0, 1]), "2 segments for 3 parents"),
        (_set("arraySegments", [0, 2, 1, 3]), "4 segments for 3 parents"),
        (_set("arraySegments", [0, 1, 2, 9]), "3 indices, 9 of them in segments"),
        (_set("arrayIndices", [0, 1, 4]), "index 4 along axis 1"),
        (_set("arrayIndices", [0, 1, -1]), "along axis 1"),
        (lambda sparsity, _: setattr(sparsity, "traversalOrder", [0, 2]), "a traversal order of"),
        (lambda sparsity, _: setattr(sparsity, "blockMap", [1]), "with blocks along"),
        (lambda sparsity, _: setattr(sparsity.dimMetadata[0], "denseSize", 4), "4 indices along"),
    ],
)
def test_parameters_that_contradict_themselves_are_refused(change, message):
    with pytest.raises(ExportError, match=f"{message}.*is damaged. Export it again"):
        decode_sparse(bytes(3), (3, 4), damaged(change), "int8")


def test_blocks_along_an_axis_that_is_not_there_are_refused():
    parameters = encode_sparse(np.ones((2, 4), np.int8), block=2).parameters()
    parameters.blockMap = [5]
    with pytest.raises(ExportError, match=r"blocks along \[5\]"):
        decode_sparse(bytes(8), (2, 4), parameters, "int8")


def test_a_wrong_number_of_values_and_an_unknown_type_are_refused():
    parameters = encode_sparse(np.eye(3, 4, dtype=np.int8)).parameters()
    with pytest.raises(ExportError, match="2 values for 3 places"):
        decode_sparse(bytes(2), (3, 4), parameters, "int8")
    with pytest.raises(ExportError, match="of 12 bytes cannot be read as 'variant'"):
        decode_sparse(bytes(12), (3, 4), parameters, "variant")
    with pytest.raises(ExportError, match="of 3 bytes cannot be read as 'float32'"):
        decode_sparse(bytes(3), (3, 4), parameters, "float32")
