"""Reads .tflite files: every tensor of every subgraph, with its constant data dequantised.

The parsing itself is done by the schema classes that LiteRT ships; this module turns their tables
into small records and undoes the three ways in which a constant may be stored: quantized to
integers, two 4-bit values in a byte, or outside the flatbuffer.
"""

from __future__ import annotations

import dataclasses
import os
import struct
from pathlib import Path
from typing import Any

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema

from rl_sparsity_tf.errors import ArgumentError, ExportError

_IDENTIFIER = b"TFL3"
# Runtimes map the file and compute on the weights in place, so they want them aligned like this.
_ALIGNMENT = 16
_PACKED_BITS = {"int4": 4, "int2": 2}
_NUMPY_TYPES = {
    name: np.dtype(name)
    for name in (
        *("float16", "float32", "float64", "bool"),
        *("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    )
}


def _names_by_code(enumeration: type) -> dict[int, str]:
    return {code: name for name, code in vars(enumeration).items() if isinstance(code, int)}


_TYPE_NAMES = _names_by_code(schema.TensorType)
_OPERATOR_NAMES = _names_by_code(schema.BuiltinOperator)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class FlatTensor:
    """One tensor of a .tflite file.

    Attributes:
        subgraph: Index of the subgraph it belongs to.
        index: Its index in that subgraph.
        name: Its name in the file.
        shape: Its shape; an unknown batch size reads 1.
        dtype: TFLite's type name in lower case, such as "float32", "int8" or "int4".
        constant: Whether the file holds its values.
        stored_bytes: Size of the stored values in bytes (0 if not constant).
        raw: The stored values as integers or floats of shape `shape`, 4-bit values one per element;
            None if the tensor is not constant, is sparse, or has a type numpy does not have.
        scales: Quantization scales, one for the tensor or one per slice along `axis`; else empty.
        zero_points: Zero points, as many as `scales`.
        axis: The axis that `scales` run along.
        sparse: Whether the values are stored in TFLite's sparse format.
        variable: Whether it keeps its value from one call to the next.
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

    @property
    def quantized(self) -> bool:
        """Whether the stored integers stand for real values."""
        return self.scales.size > 0

    @property
    def elements(self) -> int:
        """Number of values."""
        return int(np.prod(self.shape, dtype=np.int64))

    def values(self) -> np.ndarray | None:
        """The constant's real values: (stored - zero point) * scale.

        Returns:
            A float array of shape `shape` for quantized and floating-point tensors, the stored
            integers for others, None where `raw` is None.
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
        subgraph: Index of the subgraph it belongs to.
        name: TFLite's name, such as "FULLY_CONNECTED".
        inputs: Indices of its input tensors in the subgraph; -1 for one left out.
        outputs: Indices of its output tensors.
    """

    subgraph: int
    name: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlatModel:
    """The tensors and operators of a .tflite file, over all subgraphs."""

    tensors: tuple[FlatTensor, ...]
    operators: tuple[FlatOperator, ...]

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


def read_tensors(path: str | os.PathLike[str]) -> list[FlatTensor]:
    """Reads the tensors of all subgraphs.

    Args:
        path: A .tflite file.

    Returns:
        The tensors in the file's order, activations included (they have no data).

    Raises:
        ArgumentError: If the file does not exist or is no .tflite file.
        ExportError: If it is damaged.

    Example:
        >>> for tensor in read_tensors("model.tflite"):
        ...     if tensor.constant:
        ...         print(tensor.name, tensor.shape, tensor.dtype)
    """
    return list(read_flat_model(path).tensors)


def read_flat_model(path: str | os.PathLike[str]) -> FlatModel:
    """Reads the tensors and operators of all subgraphs; raises as [read_tensors][] does."""
    path = Path(path)
    if not path.is_file():
        raise ArgumentError(f"There is no file {str(path)!r}. Give the path of a .tflite file.")
    content = path.read_bytes()
    model = _parse(content, str(path))
    tensors: list[FlatTensor] = []
    operators: list[FlatOperator] = []
    try:
        for number, graph in enumerate(model.subgraphs):
            for index, tensor in enumerate(graph.tensors):
                stored = _stored(model.buffers[tensor.buffer], content)
                tensors.append(_flat_tensor(number, index, tensor, stored))
            for operator in graph.operators or []:
                code = model.operatorCodes[operator.opcodeIndex]
                # Operators above 127 do not fit the deprecated field, older ones lack the new one.
                name = _OPERATOR_NAMES.get(max(code.builtinCode, code.deprecatedBuiltinCode))
                operators.append(
                    FlatOperator(
                        subgraph=number,
                        name=name or "UNKNOWN",
                        inputs=_integers(operator.inputs),
                        outputs=_integers(operator.outputs),
                    )
                )
    except (IndexError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(str(path), error) from error
    return FlatModel(tensors=tuple(tensors), operators=tuple(operators))


def inline_buffers(content: bytes) -> bytes:
    """Moves buffers that lie behind the flatbuffer into it.

    The LiteRT quantizer writes the buffers of larger models after the flatbuffer and leaves offsets
    in it, which readers that know the plain schema only take for empty buffers.

    Args:
        content: A .tflite file's bytes.

    Returns:
        The same model in one flatbuffer, its buffers aligned to 16 bytes.

    Raises:
        ArgumentError: If these are not the bytes of a .tflite file.
        ExportError: If they are damaged.
    """
    model = _parse(content, "the bytes given")
    buffers = []
    for buffer in model.buffers:
        aligned = _AlignedBuffer()
        aligned.data = _stored(buffer, content)
        buffers.append(aligned)
    model.buffers = buffers
    builder = flatbuffers.Builder(len(content) + 1024)
    builder.Finish(model.Pack(builder), file_identifier=_IDENTIFIER)
    return bytes(builder.Output())


class _AlignedBuffer(schema.BufferT):
    """A buffer that honours the schema's force_align, which the generated Python code ignores."""

    def Pack(self, builder: Any) -> Any:  # noqa: N802
        """Writes the buffer's table; the name is the schema's."""
        vector = None
        if self.data is not None and len(self.data):
            content = np.asarray(self.data, np.uint8).tobytes()
            builder.StartVector(1, len(content), _ALIGNMENT)
            builder.head -= len(content)
            builder.Bytes[builder.head : builder.head + len(content)] = content
            vector = builder.EndVector()
        schema.BufferStart(builder)
        if vector is not None:
            schema.BufferAddData(builder, vector)
        return schema.BufferEnd(builder)


def _parse(content: bytes, name: str) -> Any:
    if content[4:8] != _IDENTIFIER:
        raise ArgumentError(
            f"{name} is not a .tflite file: its bytes 4 to 8 are {content[4:8]!r}, expected "
            f"{_IDENTIFIER!r}. Give a file written by export_tflite or the TFLite converter."
        )
    try:
        return schema.ModelT.InitFromPackedBuf(content, 0)
    except (struct.error, TypeError, ValueError, IndexError, AttributeError) as error:
        raise _damaged(name, error) from error


def _damaged(name: str, error: Exception) -> ExportError:
    return ExportError(
        f"{name} starts like a .tflite file but cannot be read ({error}): it is damaged or was "
        "cut off. Export it again."
    )


def _stored(buffer: Any, content: bytes) -> np.ndarray | None:
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
    sparse = tensor.sparsity is not None
    return FlatTensor(
        subgraph=subgraph,
        index=index,
        name=(tensor.name or b"").decode("utf-8", "replace"),
        shape=shape,
        dtype=dtype,
        constant=stored is not None,
        stored_bytes=0 if stored is None else int(stored.size),
        raw=None if stored is None or sparse else _decode(stored, dtype, shape),
        scales=scales,
        zero_points=zero_points,
        axis=int(quantization.quantizedDimension) if quantization else 0,
        sparse=sparse,
        variable=bool(tensor.isVariable),
    )


def _decode(stored: np.ndarray, dtype: str, shape: tuple[int, ...]) -> np.ndarray | None:
    elements = int(np.prod(shape, dtype=np.int64))
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


def _integers(values: Any) -> tuple[int, ...]:
    return () if values is None else tuple(int(value) for value in values)


def _numbers(values: Any, dtype: type) -> np.ndarray:
    return np.zeros(0, dtype) if values is None else np.asarray(values, dtype).reshape(-1)
