"""Reads .tflite files: tensors, operators and subgraphs as small records, constants dequantised.

The parsing itself is done by the schema classes that LiteRT ships; this module turns their tables
into small records and undoes the four ways in which a constant may be stored: quantized to
integers, two 4-bit values in a byte, without its zeros, or outside the flatbuffer.
"""

from __future__ import annotations

import dataclasses
import math
import os
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from rl_sparsity_tf.errors import ArgumentError, ExportError
from rl_sparsity_tf.files import as_file, reading
from rl_sparsity_tf.tflite.sparse_encoding import check_size, decode_sparse


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class FlatTensor:
    """One tensor of a .tflite file.

    Attributes:
        index: Its index in its subgraph, by which operators name it.
        shape: Its shape; an unknown batch size reads 1.
        dtype: TFLite's type name in lower case, such as "float32", "int8" or "int4".
        constant: Whether the file holds its values.
        stored_bytes: Size of the stored values in bytes (0 if not constant).
        raw: The stored values as integers or floats of shape `shape`, 4-bit values one per element,
            zeros that a sparse format leaves out put back; None if the tensor is not constant, lies
            in another file, or has a type numpy does not have.
        scales: Quantization scales, one for the tensor or one per slice along `axis`; else empty.
        zero_points: As many as `scales`.
        axis: The axis that `scales` run along.
        sparse: Whether the values are stored in TFLite's sparse format.
        variable: Whether it keeps its value from one call to the next.
        format: How the constant is laid out: "dense", "CSR", "block 1x4" (of any size), "sparse"
            for other sparse layouts, or "external" if it lies in another file.
        index_bytes: Bytes of a sparse tensor's indices, which come on top of `stored_bytes`.
        buffer: Number of the file's buffer that holds the values; tensors may share one.
        signature: The shape with -1 for open dimensions; empty if all are fixed.
    """

    subgraph: int
    index: int
    name: str
    shape: tuple[int, ...]
    dtype: str
    constant: bool
    stored_bytes: int
    raw: np.ndarray | None
    scales: np.ndarray
    zero_points: np.ndarray
    axis: int
    sparse: bool
    variable: bool
    format: str = "dense"
    index_bytes: int = 0
    buffer: int = 0
    signature: tuple[int, ...] = ()

    @property
    def quantized(self) -> bool:
        """Whether the stored integers stand for real values."""
        return self.scales.size > 0

    @property
    def elements(self) -> int:
        """Number of values, those that a sparse format leaves out included."""
        return math.prod(self.shape)

    @property
    def zeros(self) -> int | None:
        """How many values are zero; None where they cannot be read."""
        along = self.shape[self.axis] if 0 <= self.axis < len(self.shape) else 0
        # Scales laid out in a way this module does not know leave the stored integers to count.
        known = self.scales.size in (0, 1, along)
        values = self.values() if known else self.raw
        return None if values is None else int(values.size - np.count_nonzero(values))

    def values(self) -> np.ndarray | None:
        """The constant's real values, of shape `shape`: (stored - zero point) * scale.

        They are floats for quantized and floating-point tensors, the stored integers for others,
        and None where `raw` is None.
        """
        if self.raw is None or not self.quantized:
            return self.raw
        scales, zero_points = self.scales, self.zero_points
        if scales.size > 1:
            along = [1] * len(self.shape)
            along[self.axis] = scales.size
            scales, zero_points = scales.reshape(along), zero_points.reshape(along)
        return (self.raw.astype(np.float32) - zero_points) * scales


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlatOperator:
    """One operator of a .tflite file.

    Attributes:
        name: TFLite's name, such as "FULLY_CONNECTED"; a custom operator's own name.
        inputs: Indices of its input tensors in the subgraph; -1 for one left out.
        outputs: Indices of its output tensors in the subgraph.
        kind: "builtin", "custom", or "flex" for TensorFlow operators inside a .tflite file.
        options: The builtin options by their names in the schema, such as "strideW".
    """

    subgraph: int
    name: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    kind: str = "builtin"
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlatGraph:
    """One subgraph's own inputs and outputs, as indices of its tensors."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlatModel:
    """The tensors and operators of a .tflite file, over all subgraphs.

    Activations are among the tensors. The operators are in the order they run. The first of
    `graphs` is the model.
    """

    tensors: tuple[FlatTensor, ...]
    operators: tuple[FlatOperator, ...]
    graphs: tuple[FlatGraph, ...] = ()
    signatures: tuple[str, ...] = ()

    def consumers(self, tensor: FlatTensor) -> tuple[FlatOperator, ...]:
        """The operators that read `tensor`."""
        return tuple(
            operator
            for operator in self.operators
            if operator.subgraph == tensor.subgraph and tensor.index in operator.inputs
        )

    def tensor(self, subgraph: int, index: int) -> FlatTensor:
        """The tensor with this index in this subgraph."""
        for tensor in self.tensors:
            if (tensor.subgraph, tensor.index) == (subgraph, index):
                return tensor
        raise KeyError((subgraph, index))


IDENTIFIER = b"TFL3"
_PACKED_BITS = {"int4": 4, "int2": 2}
_NUMPY_TYPES = {
    name: np.dtype(name)
    for name in (
        *("float16", "float32", "float64", "bool"),
        *("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    )
}


# The vector that names a table takes four bytes for it; several names may stand for one table.
_TABLE_BYTES = 4
# What the schema's classes and NumPy raise of damaged files.
_DAMAGE = (
    *(struct.error, TypeError, ValueError, LookupError, ArithmeticError, AttributeError),
    *(MemoryError, RecursionError),
)


def _names_by_code(enumeration: type) -> dict[int, str]:
    return {code: name for name, code in vars(enumeration).items() if isinstance(code, int)}


_TYPE_NAMES = _names_by_code(schema.TensorType)
_OPERATOR_NAMES = _names_by_code(schema.BuiltinOperator)


def read_tensors(path: str | os.PathLike[str]) -> list[FlatTensor]:
    """Reads the tensors of all subgraphs in the file's order, activations (without data) included.

    A file that does not exist or is no .tflite file raises an ArgumentError, a damaged one an
    ExportError.

    Example:
        >>> for tensor in read_tensors("model.tflite"):
        ...     if tensor.constant:
        ...         print(tensor.name, tensor.shape, tensor.dtype)
    """
    return list(read_flat_model(path).tensors)


def read_flat_model(path: str | os.PathLike[str]) -> FlatModel:
    """Reads the tensors and operators of all subgraphs; raises as [read_tensors][] does."""
    path = as_file("path", path, "a .tflite file")
    if not path.is_file():
        raise ArgumentError(f"There is no file {str(path)!r}. Give the path of a .tflite file.")
    with reading(path, "a .tflite file"):
        content = path.read_bytes()
    model = parse_model(content, str(path))
    _check_sparse(model, str(path), len(content))
    tensors: list[FlatTensor] = []
    operators: list[FlatOperator] = []
    graphs: list[FlatGraph] = []
    try:
        for number, graph in enumerate(model.subgraphs):
            graphs.append(
                FlatGraph(inputs=_integers(graph.inputs), outputs=_integers(graph.outputs))
            )
            count = len(_listed(graph.tensors))
            _check_indices("The graph", (*graphs[-1].inputs, *graphs[-1].outputs), range(count))
            for index, tensor in enumerate(_listed(graph.tensors)):
                stored = stored_in(model.buffers[tensor.buffer], content)
                tensors.append(_flat_tensor(number, index, tensor, stored))
            for operator in _listed(graph.operators):
                flat = _flat_operator(number, operator, model.operatorCodes)
                _check_indices(flat.name, (*flat.inputs, *flat.outputs), range(-1, count))
                operators.append(flat)
        signatures = tuple(_text(entry.signatureKey) for entry in _listed(model.signatureDefs))
    except ExportError:
        raise
    except _DAMAGE as error:
        raise _damaged(str(path), error) from error
    return FlatModel(
        tensors=tuple(tensors),
        operators=tuple(operators),
        graphs=tuple(graphs),
        signatures=signatures,
    )


def parse_model(content: bytes, name: str) -> Any:
    """A file's bytes as objects of the schema.

    Bytes that are not those of a .tflite file raise an ArgumentError, damaged ones an ExportError;
    both call them by `name`.
    """
    if content[4:8] != IDENTIFIER:
        raise ArgumentError(
            f"{name} is not a .tflite file: its bytes 4 to 8 are {content[4:8]!r}, expected "
            f"{IDENTIFIER!r}. Give a file written by export_tflite or the TFLite converter."
        )
    try:
        _check_tables(content)
        return schema.ModelT.InitFromPackedBuf(content, 0)
    except _DAMAGE as error:
        raise _damaged(name, error) from error


def _check_tables(content: bytes) -> None:
    """Raises if a file names more tables than it can hold.

    Tables may be named any number of times, and those in them as well: a file of a megabyte would
    unfold into billions.
    """
    model = schema.Model.GetRootAs(content)
    most = len(content) // _TABLE_BYTES
    count = model.BuffersLength() + model.OperatorCodesLength() + model.MetadataLength()
    for number in range(model.SignatureDefsLength()):
        signature = model.SignatureDefs(number)
        count += 1 + signature.InputsLength() + signature.OutputsLength()
        _check_count(count, most)
    for number in range(model.SubgraphsLength()):
        graph = model.Subgraphs(number)
        count += 1 + graph.TensorsLength() + graph.OperatorsLength()
        _check_count(count, most)
        for index in range(graph.TensorsLength()):
            tensor = graph.Tensors(index)
            sparsity = tensor.Sparsity()
            count += tensor.VariantTensorsLength()
            count += 0 if sparsity is None else sparsity.DimMetadataLength()
            _check_count(count, most)
    _check_count(count, most)


def _check_count(count: int, most: int) -> None:
    if count > most:
        raise ValueError(f"it names {count:,} tables and has room for {most:,}")


def _check_sparse(model: Any, name: str, stored: int) -> None:
    """Raises if a file's sparse tensors together would take far more memory than the file."""
    try:
        shapes = [
            _integers(tensor.shape)
            for graph in _listed(model.subgraphs)
            for tensor in _listed(graph.tensors)
            if tensor.sparsity is not None
        ]
    except _DAMAGE as error:
        raise _damaged(name, error) from error
    check_size([sum(math.prod(shape) for shape in shapes if min(shape, default=1) > 0)], 4, stored)


def _damaged(name: str, error: Exception) -> ExportError:
    return ExportError(
        f"{name} starts like a .tflite file but cannot be read ({error}): it is damaged or was "
        "cut off. Export it again."
    )


def stored_in(buffer: Any, content: bytes) -> np.ndarray | None:
    """The bytes of a buffer, which may lie behind the flatbuffer; None if it has none."""
    # Offset 1 is the converter's mark for "to be filled in", not a place in the file.
    if buffer.offset and buffer.offset > 1:
        if buffer.offset + buffer.size > len(content):
            missing = ValueError(f"a buffer should end at byte {buffer.offset + buffer.size}")
            raise _damaged("The file", missing)
        return np.frombuffer(content, np.uint8, buffer.size, buffer.offset)
    if buffer.data is None or len(buffer.data) == 0:
        return None
    return np.asarray(buffer.data, np.uint8)


def _flat_tensor(subgraph: int, index: int, tensor: Any, stored: np.ndarray | None) -> FlatTensor:
    dtype = _TYPE_NAMES.get(tensor.type, "unknown").lower()
    shape = _integers(tensor.shape)
    quantization = tensor.quantization
    scales = _numbers(quantization and quantization.scale, np.float32)
    zero_points = _numbers(quantization and quantization.zeroPoint, np.float32)
    if zero_points.size != scales.size:
        zero_points = np.zeros_like(scales)
    sparsity = tensor.sparsity
    # A positive number stands for a buffer in another file, which the runtime is given apart.
    external = bool(getattr(tensor, "externalBuffer", 0))
    raw = None
    if stored is not None and sparsity is not None:
        raw = decode_sparse(stored.tobytes(), shape, sparsity, dtype)
    elif stored is not None:
        raw = _decode(stored, dtype, shape)
    return FlatTensor(
        subgraph=subgraph,
        index=index,
        name=_text(tensor.name),
        shape=shape,
        dtype=dtype,
        constant=stored is not None or external,
        stored_bytes=0 if stored is None else int(stored.size),
        raw=raw,
        scales=scales,
        zero_points=zero_points,
        axis=int(quantization.quantizedDimension) if quantization else 0,
        sparse=sparsity is not None,
        variable=bool(tensor.isVariable),
        format="external" if external else _format(sparsity, shape),
        index_bytes=0 if sparsity is None else _index_bytes(sparsity),
        buffer=int(tensor.buffer),
        signature=_integers(tensor.shapeSignature),
    )


def _flat_operator(subgraph: int, operator: Any, codes: Any) -> FlatOperator:
    code = codes[operator.opcodeIndex]
    # Operators above 127 do not fit the deprecated field, older ones lack the new one.
    name = _OPERATOR_NAMES.get(max(code.builtinCode, code.deprecatedBuiltinCode), "UNKNOWN")
    kind = "builtin"
    if name == "CUSTOM":
        name = _text(code.customCode) or name
        kind = "flex" if name.startswith("Flex") else "custom"
    options = operator.builtinOptions
    return FlatOperator(
        subgraph=subgraph,
        name=name,
        inputs=_integers(operator.inputs),
        outputs=_integers(operator.outputs),
        kind=kind,
        options={} if options is None else dict(vars(options)),
    )


def _check_indices(reader: str, indices: tuple[int, ...], allowed: range) -> None:
    for index in indices:
        if index not in allowed:
            raise IndexError(f"{reader} names tensor {index} of {allowed.stop}")


def _format(sparsity: Any, shape: tuple[int, ...]) -> str:
    if sparsity is None:
        return "dense"
    levels = _listed(sparsity.dimMetadata)
    blocks = _integers(sparsity.blockMap)
    compressed = [level.format == schema.DimensionType.SPARSE_CSR for level in levels]
    if not blocks and sum(compressed) == 1 and compressed[-1]:
        return "CSR"
    if blocks == (len(shape) - 1,) and sum(compressed) == 1 and compressed[-2]:
        return f"block 1x{levels[-1].denseSize}"
    return "sparse"


def _index_bytes(sparsity: Any) -> int:
    vectors = [
        vector
        for level in _listed(sparsity.dimMetadata)
        for vector in (level.arraySegments, level.arrayIndices)
        if vector is not None and vector.values is not None
    ]
    return sum(np.asarray(vector.values).nbytes for vector in vectors)


def _decode(stored: np.ndarray, dtype: str, shape: tuple[int, ...]) -> np.ndarray | None:
    if any(size < 0 for size in shape):
        raise ValueError(f"a constant has the shape {shape}")
    elements = math.prod(shape)
    if dtype in _PACKED_BITS:
        return _unpack(stored, _PACKED_BITS[dtype])[:elements].reshape(shape)
    if dtype not in _NUMPY_TYPES:
        return None
    return np.frombuffer(stored.tobytes(), _NUMPY_TYPES[dtype])[:elements].reshape(shape)


def _unpack(stored: np.ndarray, bits: int) -> np.ndarray:
    """Unpacks signed values, the first in a byte's lowest bits."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    values = ((stored[:, None] >> shifts) & (2**bits - 1)).astype(np.int8).reshape(-1)
    return np.where(values >= 2 ** (bits - 1), values - 2**bits, values).astype(np.int8)


def _listed(values: Any) -> Any:
    return [] if values is None else values


def _text(name: Any) -> str:
    return (name or b"").decode("utf-8", "replace")


def _integers(values: Any) -> tuple[int, ...]:
    return () if values is None else tuple(int(value) for value in values)


def _numbers(values: Any, dtype: type) -> np.ndarray:
    return np.zeros(0, dtype) if values is None else np.asarray(values, dtype).reshape(-1)
