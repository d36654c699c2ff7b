"""Integer constants with a DEQUANTIZE operator, for kernels that LiteRT's quantizer leaves float.

The quantizer knows no integer form of CONV_3D, GATHER and the fused LSTM, and no 4-bit form of some
others. Their float kernels do not care where a float tensor comes from, so the weights can be
stored as integers and restored by an operator of their own, as float16 files do. A runtime restores
a constant once, when the file is loaded. Rows of a table are fetched as integers and restored
afterwards, so that the table itself is never unpacked.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from rl_sparsity_tf.files import replacing
from rl_sparsity_tf.tflite.editing import FileEditor, make_operator, read_instead
from rl_sparsity_tf.tflite.reading import FlatModel, FlatTensor

# The operators seen to compute the same in LiteRT, with and without XNNPACK, on weights behind a
# DEQUANTIZE, and the axis of those weights that has a scale for each of its slices.
_SCALED_AXES = {
    "FULLY_CONNECTED": 0,
    "CONV_2D": 0,
    "DEPTHWISE_CONV_2D": 3,
    "TRANSPOSE_CONV": 0,
    "CONV_3D": 4,
    "CONV_3D_TRANSPOSE": 3,
    "UNIDIRECTIONAL_SEQUENCE_LSTM": 0,
}
_GATHER = "GATHER"
_TYPES = {8: schema.TensorType.INT8, 4: schema.TensorType.INT4}
_LEVELS = {8: 127, 4: 7}
# The lowest versions of the operators that have the types used here.
_DEQUANTIZE_VERSION = 6
_GATHER_VERSION = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class IntegerForm:
    """How a float constant is to be stored.

    Attributes:
        bits: 8 or 4.
        axis: The axis with one scale per slice; None for one scale.
        fetched: Whether operators fetch rows of it as integers, which are restored behind them.
    """

    bits: int
    axis: int | None
    fetched: bool


def integer_form(flat: FlatModel, tensor: FlatTensor, bits: int) -> IntegerForm | None:
    """Finds how a float32 constant can be stored as integers and restored by DEQUANTIZE.

    Bits are 8 or 4. There is no form, None, if an operator that was not tried reads the constant.
    """
    readers = flat.consumers(tensor)
    names = {reader.name if reader.kind == "builtin" else "CUSTOM" for reader in readers}
    outputs = flat.graphs[tensor.subgraph].outputs
    if len(names) != 1 or tensor.dtype != "float32" or tensor.raw is None or tensor.sparse:
        return None
    if tensor.index in outputs:
        return None
    name = names.pop()
    if name == _GATHER:
        rows = all(reader.inputs[0] == tensor.index for reader in readers)
        # GATHER has no 4-bit form that both runtimes share: the table is restored as a whole.
        returned = {reader.outputs[0] for reader in readers} & set(outputs)
        fetched = rows and bits == 8 and not returned
        return IntegerForm(bits=bits, axis=None, fetched=fetched)
    axis = _SCALED_AXES.get(name)
    if axis is None or axis >= len(tensor.shape):
        return None
    return IntegerForm(bits=bits, axis=axis, fetched=False)


def to_integers(values: np.ndarray, form: IntegerForm) -> tuple[np.ndarray, np.ndarray]:
    """Puts float32 weights on the symmetric grid that kernels are fine-tuned on.

    It gives the integers, and the scales: largest magnitude / 127 (or / 7) in float32. Weights that
    are on the grid already are restored bit for bit.
    """
    levels = np.float32(_LEVELS[form.bits])
    others = tuple(axis for axis in range(values.ndim) if axis != form.axis)
    largest = np.max(np.abs(values), axis=others, keepdims=True).astype(np.float32)
    scales = np.where(largest > 0, largest / levels, np.float32(1)).astype(np.float32)
    integers = np.clip(np.rint(values / scales), -levels, levels).astype(np.int8)
    return integers, scales.reshape(-1)


def store_dequantized(
    source: Path, output: Path, wanted: Sequence[tuple[FlatTensor, IntegerForm]]
) -> None:
    """Writes a file whose given float constants are integers behind DEQUANTIZE operators.

    The tensors are those of `source`, the forms those that [integer_form][] found for them.
    """
    integers = _IntegerStore(source.read_bytes())
    for tensor, form in wanted:
        integers.store(tensor, form)
    with replacing(output) as temporary:
        temporary.write_bytes(integers.packed())


def same_tensor(flat: FlatModel, tensor: FlatTensor) -> FlatTensor | None:
    """Finds a constant of one file in another that was made from it; None if it was changed."""
    for other in flat.tensors:
        if (other.subgraph, other.index) == (tensor.subgraph, tensor.index):
            values = other.raw, tensor.raw
            if other.dtype != tensor.dtype or values[0] is None or values[1] is None:
                return None
            return other if np.array_equal(values[0], values[1]) else None
    return None


class _IntegerStore:
    """The float constants of a file, becoming integers one by one."""

    def __init__(self, content: bytes):
        self._editor = FileEditor(content)
        self._encoded: dict[tuple[int, IntegerForm], tuple[int, np.ndarray]] = {}
        self._replaced: set[int] = set()

    def store(self, tensor: FlatTensor, form: IntegerForm) -> None:
        graph = self._editor.model.subgraphs[tensor.subgraph]
        stored = graph.tensors[tensor.index]
        key = (stored.buffer, form)
        if key not in self._encoded:
            assert tensor.raw is not None
            integers, scales = to_integers(tensor.raw, form)
            buffer = self._editor.add_buffer(pack_integers(integers, form.bits))
            self._encoded[key] = buffer, scales
        self._replaced.add(stored.buffer)
        stored.buffer, scales = self._encoded[key]
        if not form.fetched:
            restored = self._editor.add_tensor(graph, b"dequantized_%d" % tensor.index, stored)
        stored.type = _TYPES[form.bits]
        stored.quantization = _quantization(scales, form.axis)
        if form.fetched:
            self._restore_behind(graph, tensor.index, scales)
            return
        read_instead(graph, tensor.index, restored)
        graph.operators.insert(0, self._dequantize(tensor.index, restored))

    def packed(self) -> bytes:
        model = self._editor.model
        used = {tensor.buffer for graph in model.subgraphs for tensor in graph.tensors}
        for number in self._replaced - used:
            model.buffers[number].data = None
        return self._editor.packed()

    def _restore_behind(self, graph: Any, table: int, scales: np.ndarray) -> None:
        """Lets operators fetch integer rows, and puts a DEQUANTIZE behind each of them."""
        operators = []
        for operator in graph.operators:
            operators.append(operator)
            if operator.inputs is None or table not in operator.inputs:
                continue
            restored = int(operator.outputs[0])
            name = b"fetched_%d" % restored
            fetched = self._editor.add_tensor(graph, name, graph.tensors[restored])
            graph.tensors[fetched].type = schema.TensorType.INT8
            graph.tensors[fetched].quantization = _quantization(scales, None)
            operator.outputs = np.array([fetched], np.int32)
            operator.opcodeIndex = self._editor.code(schema.BuiltinOperator.GATHER, _GATHER_VERSION)
            operators.append(self._dequantize(fetched, restored))
        graph.operators = operators

    def _dequantize(self, source: int, output: int) -> Any:
        code = self._editor.code(schema.BuiltinOperator.DEQUANTIZE, _DEQUANTIZE_VERSION)
        return make_operator(code, [source], output, schema.DequantizeOptionsT())


def pack_integers(integers: np.ndarray, bits: int) -> np.ndarray:
    """The bytes of int8 values, or of 4-bit values two by two, the first in the lower half."""
    flat = integers.reshape(-1).view(np.uint8)
    if bits == 8:
        return flat
    flat = np.concatenate([flat, np.zeros(flat.size % 2, np.uint8)]) & 15
    packed: np.ndarray = flat[0::2] | (flat[1::2] << 4)
    return packed


def _quantization(scales: np.ndarray, axis: int | None) -> Any:
    parameters = schema.QuantizationParametersT()
    parameters.scale = scales
    parameters.zeroPoint = np.zeros(scales.size, np.int64)
    parameters.quantizedDimension = 0 if axis is None else axis
    return parameters
