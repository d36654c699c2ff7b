"""Sparse formats for the constants of a finished .tflite file, chosen tensor by tensor.

TensorFlow's own pass makes every tensor with enough zeros sparse, whether the file gets smaller or
not and whether or not the runtimes can read it. Here a tensor becomes sparse only where that saves
bytes, and only where LiteRT gives the same results with and without XNNPACK; see [why_dense][].
"""

from __future__ import annotations

import collections
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from rl_sparsity_tf.errors import ArgumentError, check_choice
from rl_sparsity_tf.files import replacing
from rl_sparsity_tf.tflite.editing import FileEditor, make_operator, read_instead
from rl_sparsity_tf.tflite.reading import FlatModel, FlatOperator, FlatTensor, read_flat_model
from rl_sparsity_tf.tflite.sparse_encoding import SparseEncoding, encode_sparse

FORMATS = ("dense", "csr", "block")
TARGETS = ("raw", "gzip")

# The one block FULLY_CONNECTED multiplies with float weights without densifying them.
BLOCK = 4
# From this version on XNNPACK leaves FULLY_CONNECTED to the kernel that knows sparse weights; in an
# earlier one it reads the stored values as a dense matrix, without an error.
_SPARSE_FULLY_CONNECTED = 8
_DENSIFY = schema.BuiltinOperator.DENSIFY
_FULLY_CONNECTED = schema.BuiltinOperator.FULLY_CONNECTED

# The operators behind a DENSIFY that were seen to compute the same in LiteRT with and without
# XNNPACK. Others may do as well.
_FLOAT_READERS = (
    *("FULLY_CONNECTED", "CONV_2D", "DEPTHWISE_CONV_2D", "TRANSPOSE_CONV", "CONV_3D"),
    *("GATHER", "PRELU", "UNIDIRECTIONAL_SEQUENCE_LSTM"),
)
# Behind DENSIFY and DEQUANTIZE: those that XNNPACK takes whatever the batch size. What it leaves to
# the other kernels reads memory that nobody has filled.
_DEQUANTIZED_READERS = ("FULLY_CONNECTED", "CONV_2D", "DEPTHWISE_CONV_2D")
_INTEGER_READERS = ("CONV_2D", "DEPTHWISE_CONV_2D")

# Bytes that tables, vectors and offsets take beside the data, as measured: for the tensor and for
# each of its dimensions, in the file and in what is left of them after gzip.
_TABLES = {("densify", "raw"): 272, ("native", "raw"): 150}
_TABLES |= {("densify", "gzip"): 140, ("native", "gzip"): 80}
_PER_DIMENSION = {"raw": 14, "gzip": 12}
# What a tensor has to save to be worth it: buffers are aligned, and one stream of gzip compresses
# values and indices together a little worse than each by itself.
_WORTHWHILE_BYTES = 32
_WORTHWHILE_SHARE = {"raw": 0.0, "gzip": 0.03}


def choose_formats(flat: FlatModel, target: str = "raw") -> dict[tuple[int, int], str]:
    """Chooses the format of every weight: the smallest that the runtimes compute rightly with.

    The target says what is to be small: `"raw"`, the file, or `"gzip"`, the compressed file. What
    is smaller raw is often larger compressed, because zeros compress well. Any other raises an
    ArgumentError.

    Every dense constant of rank 2 or more gets, by (subgraph, index), `"dense"`; `"csr"`, every
    value with its index; or `"block"`, runs of 4 values with one index.

    Example:
        >>> formats = choose_formats(read_flat_model("model.tflite"), "raw")
        >>> sparsify_file("model.tflite", "smaller.tflite", formats)
    """
    check_choice("target", target, TARGETS)
    sharing: dict[int, list[FlatTensor]] = {}
    for tensor in flat.tensors:
        if tensor.constant:
            sharing.setdefault(tensor.buffer, []).append(tensor)
    formats: dict[tuple[int, int], str] = {}
    for tensors in sharing.values():
        chosen = smallest_format(flat, tensors, target)
        for tensor in tensors:
            if len(tensor.shape) > 1 and not tensor.sparse:
                formats[tensor.subgraph, tensor.index] = chosen
    return dict(sorted(formats.items()))


def why_dense(flat: FlatModel, tensor: FlatTensor) -> str | None:
    """Says in plain words why a constant must not become sparse.

    None means that the runtimes compute rightly with a sparse one.
    """
    readers = flat.consumers(tensor)
    if not tensor.constant or tensor.raw is None or tensor.variable:
        return "the file does not hold its values"
    if len(tensor.shape) < 2 or not tensor.elements:
        return "it is no weight: sparse formats are for at least two dimensions"
    graph = flat.graphs[tensor.subgraph] if flat.graphs else None
    if not readers or (graph and tensor.index in (*graph.inputs, *graph.outputs)):
        return "no operator reads it, or it is an output"
    if tensor.dtype not in ("float32", "float16", "int8"):
        return f"DENSIFY cannot read {tensor.dtype}"
    if any(reader.kind != "builtin" for reader in readers):
        return "an operator that is not TFLite's own reads it"
    names = {reader.name for reader in readers}
    if names == {"DEQUANTIZE"}:
        return _why_not_dequantized(flat, readers)
    if tensor.dtype == "float32":
        return _unknown(names - set(_FLOAT_READERS), "")
    if tensor.dtype == "float16" or not names <= {*_INTEGER_READERS, "GATHER"}:
        return _unknown(names, f" with {tensor.dtype} weights")
    for reader in readers:
        fed = flat.tensor(reader.subgraph, reader.inputs[0])
        if reader.name != "GATHER" and fed.dtype != "int8":
            return f"XNNPACK refuses a hybrid {reader.name} (int8 weights, {fed.dtype} inputs)"
    return None


def encode(tensor: FlatTensor, tensor_format: str) -> SparseEncoding:
    """Encodes a dense constant as `"csr"` or `"block"`, just as [sparsify_file][] does."""
    assert tensor.raw is not None
    if tensor_format == "block":
        return encode_sparse(tensor.raw, block=BLOCK)
    # Which dimension is compressed last decides on the number of segments and on the width of the
    # indices; the runtimes follow any order.
    last = encode_sparse(tensor.raw)
    first = encode_sparse(tensor.raw, order=(*range(1, len(tensor.shape)), 0))
    return min(last, first, key=lambda encoding: encoding.data_bytes)


def saved_bytes(
    flat: FlatModel, tensor: FlatTensor, tensor_format: str, target: str = "raw"
) -> int:
    """Bytes that a file gets smaller by when a dense constant becomes sparse; negative if it grows.

    No other tensor may share the constant's buffer. With the target `"raw"` the number is exact but
    for the alignment (some 20 bytes); with `"gzip"` the tensor is compressed both ways, which is an
    estimate for a whole file.
    """
    encoding = encode(tensor, tensor_format)
    parts = (encoding.values, encoding.segments, encoding.indices)
    data = _size(b"".join(part.tobytes() for part in parts), target)
    tables = _tables(flat, tensor, tensor_format, target)
    return _dense_bytes(tensor, target) - data - tables


def is_native(flat: FlatModel, tensor: FlatTensor, tensor_format: str) -> bool:
    """Whether kernels multiply with the sparse tensor as it is, so that it is never densified."""
    return (
        tensor_format == "block"
        and tensor.dtype == "float32"
        and all(_can_be_native(flat, tensor, reader) for reader in flat.consumers(tensor))
    )


def sparsify_file(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    formats: Mapping[tuple[int, int], str],
) -> None:
    """Writes a .tflite file with the constants given in sparse formats.

    In front of what reads a sparse tensor comes one DENSIFY operator, which restores the values
    when the file is loaded; float blocks of FULLY_CONNECTED do without. Tensors that are sparse
    already, the metadata and the signatures stay as they are, and so does a file in which nothing
    is to become sparse. The same arguments give the same bytes. Run it last: what rewrites its file
    may write tables twice that it shares.

    Buffers that lie behind the flatbuffer of `source` are moved into it; `output` may be `source`.
    The formats are by (subgraph, index), as [choose_formats][] returns them, and what is left out
    stays dense.

    An ArgumentError is raised if a format or a tensor is not known, or the runtimes would refuse it
    or compute wrongly with it; an ExportError if the file is damaged.
    """
    flat = read_flat_model(source)
    chosen = _checked(flat, formats)
    content = Path(source).read_bytes()
    if chosen:
        store = _SparseStore(content)
        for tensor in chosen:
            name = formats[tensor.subgraph, tensor.index]
            store.make_sparse(tensor, name, native=is_native(flat, tensor, name))
        content = store.packed()
    with replacing(Path(output)) as temporary:
        temporary.write_bytes(content)


class _SparseStore:
    """The constants of a file, becoming sparse one by one."""

    def __init__(self, content: bytes):
        self._editor = FileEditor(content)
        self._users = collections.Counter(
            tensor.buffer for graph in self._editor.model.subgraphs for tensor in graph.tensors
        )
        self._encoded: dict[tuple[int, str, tuple[int, ...]], tuple[int, Any]] = {}
        self._operators: dict[int, list[Any]] = {}

    def make_sparse(self, tensor: FlatTensor, tensor_format: str, *, native: bool) -> None:
        graph = self._editor.model.subgraphs[tensor.subgraph]
        stored = graph.tensors[tensor.index]
        key = (stored.buffer, tensor_format, tensor.shape)
        if key not in self._encoded:
            encoding = encode(tensor, tensor_format)
            number = self._place(stored.buffer, encoding.values)
            self._encoded[key] = number, _Shared(encoding.parameters())
        stored.buffer, stored.sparsity = self._encoded[key]
        if native:
            sparse = self._editor.code(
                _FULLY_CONNECTED, _SPARSE_FULLY_CONNECTED, _SPARSE_FULLY_CONNECTED
            )
            for operator in graph.operators:
                if tensor.index in operator.inputs:
                    operator.opcodeIndex = sparse
            return
        dense = self._editor.add_tensor(graph, b"densify_%d" % tensor.index, stored)
        if stored.quantization is not None:
            # Scales and zero points take 12 bytes per channel: both tensors point to one table.
            shared = _Shared(stored.quantization)
            stored.quantization = graph.tensors[dense].quantization = shared
        read_instead(graph, tensor.index, dense)
        densify = make_operator(
            self._editor.code(_DENSIFY, 1), [tensor.index], dense, schema.DensifyOptionsT()
        )
        self._operators.setdefault(tensor.subgraph, []).append(densify)

    def packed(self) -> bytes:
        for number, operators in self._operators.items():
            graph = self._editor.model.subgraphs[number]
            graph.operators = [*operators, *graph.operators]
        return self._editor.packed()

    def _place(self, number: int, values: np.ndarray) -> int:
        """Stores values in a tensor's buffer, or in a new one if a dense tensor still needs it."""
        taken = [key for key in self._encoded if key[0] == number]
        if self._users[number] > 1 or taken:
            return self._editor.add_buffer(values)
        self._editor.model.buffers[number].data = np.frombuffer(values.tobytes(), np.uint8)
        return number


class _Shared:
    """A table that several others point to: it is written once."""

    def __init__(self, table: Any):
        self._table = table
        self._packed: tuple[Any, int] | None = None

    def Pack(self, builder: Any) -> int:  # noqa: N802
        """Writes the table, or returns where it is; the name is the schema's."""
        if self._packed is None or self._packed[0] is not builder:
            self._packed = (builder, self._table.Pack(builder))
        return self._packed[1]


def _checked(flat: FlatModel, formats: Mapping[tuple[int, int], str]) -> list[FlatTensor]:
    """The tensors that are to become sparse, in the file's order."""
    known = {(tensor.subgraph, tensor.index): tensor for tensor in flat.tensors}
    for key, tensor_format in formats.items():
        if key not in known:
            raise ArgumentError(
                f"formats names tensor {key!r}, which the file does not have. Expected (subgraph, "
                "index) as choose_formats returns it for this very file."
            )
        check_choice(f"formats[{key!r}]", tensor_format, FORMATS)
    chosen = []
    for key, tensor in sorted(known.items()):
        tensor_format = formats.get(key, "dense")
        if tensor_format == "dense" or tensor.sparse:
            continue
        reason = why_dense(flat, tensor)
        if reason is None and tensor_format == "block" and tensor.shape[-1] % BLOCK:
            reason = (
                f"its last axis of {tensor.shape[-1]} is no multiple of {BLOCK}, and the runtimes "
                "drop the rest"
            )
        if reason is not None:
            raise ArgumentError(
                f"Tensor {key!r} ({tensor.name}, {tensor.dtype} of shape {tensor.shape}) cannot be "
                f"stored as {tensor_format!r}: {reason}. Leave it dense."
            )
        chosen.append(tensor)
    return chosen


def smallest_format(flat: FlatModel, tensors: list[FlatTensor], target: str) -> str:
    """The best format of tensors that share a buffer, `"dense"` if none saves enough."""
    first = tensors[0]
    alike = all((other.shape, other.dtype) == (first.shape, first.dtype) for other in tensors)
    if not alike or any(tensor.sparse or why_dense(flat, tensor) for tensor in tensors):
        return "dense"
    saved = {"dense": 0}
    for tensor_format in FORMATS[1:]:
        if tensor_format == "csr" or first.shape[-1] % BLOCK == 0:
            # The dense values are there once, the tables once for every tensor.
            tables = sum(_tables(flat, each, tensor_format, target) for each in tensors[1:])
            saved[tensor_format] = saved_bytes(flat, first, tensor_format, target) - tables
    best = max(saved, key=lambda name: saved[name])
    least = _WORTHWHILE_BYTES + _WORTHWHILE_SHARE[target] * _dense_bytes(first, target)
    return best if saved[best] >= least else "dense"


def _tables(flat: FlatModel, tensor: FlatTensor, tensor_format: str, target: str) -> int:
    way = "native" if is_native(flat, tensor, tensor_format) else "densify"
    return _TABLES[way, target] + _PER_DIMENSION[target] * len(tensor.shape)


def _dense_bytes(tensor: FlatTensor, target: str) -> int:
    assert tensor.raw is not None
    return _size(tensor.raw.tobytes(), target)


def _size(content: bytes, target: str) -> int:
    return len(zlib.compress(content, 9)) if target == "gzip" else len(content)


def _why_not_dequantized(flat: FlatModel, readers: tuple[FlatOperator, ...]) -> str | None:
    graph = flat.graphs[readers[0].subgraph] if flat.graphs else None
    names: set[str] = set()
    for reader in readers:
        floats = flat.tensor(reader.subgraph, reader.outputs[0])
        behind = flat.consumers(floats)
        if graph and floats.index in graph.outputs:
            return "the file returns its dequantised values"
        names |= {each.name if each.kind == "builtin" else "CUSTOM" for each in behind}
    return _unknown(names - set(_DEQUANTIZED_READERS), " behind DEQUANTIZE")


def _unknown(names: set[str], where: str) -> str | None:
    if not names:
        return None
    return (
        f"{' and '.join(sorted(names))}{where} refuses it, computes wrongly with it under XNNPACK, "
        "or was not tried"
    )


def _can_be_native(flat: FlatModel, tensor: FlatTensor, reader: FlatOperator) -> bool:
    if reader.name != "FULLY_CONNECTED" or reader.inputs.index(tensor.index) != 1:
        return False
    return flat.tensor(reader.subgraph, reader.inputs[0]).dtype == "float32"
