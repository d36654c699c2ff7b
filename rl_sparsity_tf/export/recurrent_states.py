"""The state that TFLite's fused LSTM keeps between calls, and how a file starts each call at zero.

The operator reads its state from variable tensors and leaves the new one there, so that a second
call goes on from where the first one ended; Keras starts every call at zero. An operator in front
of it that writes the initial values costs some hundred bytes and no time that can be measured.
BROADCAST_TO is the one that LiteRT, XNNPACK beside it, and TFLM all have for the types of a state:
TFLM's FILL knows no int16, and the ZEROS_LIKE of all of them no int8.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema

from rl_sparsity_tf.files import replacing
from rl_sparsity_tf.tflite.flat_model import FlatModel, FlatTensor
from rl_sparsity_tf.tflite.reading import AlignedBuffer, inline_buffers, read_flat_model

_VERSION = 2  # of BROADCAST_TO, the first that has int8
_BEHIND = 127  # in the old field, which is a byte, of operators that have their number in the new


def kept_states(flat: FlatModel) -> list[FlatTensor]:
    """The variable tensors that keep their values from one call to the next.

    Only the operators that read them write them.
    """
    written = {
        (operator.subgraph, index)
        for operator in flat.operators
        for index in operator.outputs
        if index not in operator.inputs
    }
    return [
        tensor
        for tensor in flat.tensors
        if tensor.variable and (tensor.subgraph, tensor.index) not in written
    ]


def start_at_zero(file: Path) -> None:
    """Lets every call of a file begin with the initial state; a file without state stays as it is.

    Args:
        file: A .tflite file, which is replaced.
    """
    states = kept_states(read_flat_model(file))
    if not states:
        return
    content = inline_buffers(file.read_bytes())
    rewriting = _Rewriting(schema.ModelT.InitFromPackedBuf(content, 0))
    for subgraph in sorted({state.subgraph for state in states}):
        rewriting.reset(subgraph, {s.index: s for s in states if s.subgraph == subgraph})
    with replacing(file) as temporary:
        temporary.write_bytes(rewriting.packed(len(content)))


class _Rewriting:
    """A .tflite file taken apart; constants that are alike are added once for a subgraph."""

    def __init__(self, model: Any):
        self._model = model
        self._added: dict[tuple[int, str, bytes], int] = {}
        code = schema.OperatorCodeT()
        code.builtinCode = schema.BuiltinOperator.BROADCAST_TO
        code.deprecatedBuiltinCode = _BEHIND
        code.version = _VERSION
        model.operatorCodes.append(code)
        self._code = len(model.operatorCodes) - 1

    def reset(self, subgraph: int, states: dict[int, FlatTensor]) -> None:
        """Puts a reset of each state in front of every operator that reads it."""
        graph = self._model.subgraphs[subgraph]
        operators = []
        for operator in graph.operators:
            read = () if operator.inputs is None else operator.inputs
            operators += [self._reset(subgraph, states[i]) for i in read if i in states]
            operators.append(operator)
        graph.operators = operators

    def packed(self, size: int) -> bytes:
        """The file's bytes."""
        buffers = []
        for buffer in self._model.buffers:
            aligned = AlignedBuffer()
            aligned.data = buffer.data
            buffers.append(aligned)
        self._model.buffers = buffers
        builder = flatbuffers.Builder(size)
        builder.Finish(self._model.Pack(builder), file_identifier=b"TFL3")
        return bytes(builder.Output())

    def _reset(self, subgraph: int, state: FlatTensor) -> Any:
        # An integer state is at zero where its integers are at the zero point.
        zero = int(state.zero_points[0]) if state.quantized else 0
        value = self._constant(subgraph, np.array([zero], state.dtype), state)
        shape = self._constant(subgraph, np.array(state.shape, np.int32), None)
        operator = schema.OperatorT()
        operator.opcodeIndex = self._code
        operator.inputs = np.array([value, shape], np.int32)
        operator.outputs = np.array([state.index], np.int32)
        operator.builtinOptionsType = schema.BuiltinOptions.BroadcastToOptions
        operator.builtinOptions = schema.BroadcastToOptionsT()
        return operator

    def _constant(self, subgraph: int, array: np.ndarray, like: FlatTensor | None) -> int:
        """Adds a vector, of the type and scale of another tensor if there is one."""
        graph = self._model.subgraphs[subgraph]
        scale = b"" if like is None else like.scales.tobytes()
        key = (subgraph, str(array.dtype), array.tobytes() + b":" + scale)
        if key not in self._added:
            buffer = schema.BufferT()
            buffer.data = np.frombuffer(array.tobytes(), np.uint8)
            self._model.buffers.append(buffer)
            tensor = schema.TensorT()
            tensor.name = b"initial_state_%d" % len(self._added)
            tensor.shape, tensor.hasRank = np.array(array.shape, np.int32), True
            tensor.buffer = len(self._model.buffers) - 1
            tensor.type = schema.TensorType.INT32
            if like is not None:
                stored = graph.tensors[like.index]
                tensor.type, tensor.quantization = stored.type, stored.quantization
            graph.tensors.append(tensor)
            self._added[key] = len(graph.tensors) - 1
        return self._added[key]
