"""Changes .tflite files: taken apart into the schema's objects, changed, and written again."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema

from rl_sparsity_tf.tflite.reading import IDENTIFIER, parse_model, stored_in

# Runtimes map the file and compute on the weights in place, so they want them aligned like this.
_ALIGNMENT = 16
# The old field for an operator's number is a byte; those above have theirs in the new one only.
_LARGEST_OLD_CODE = 127


class FileEditor:
    """A .tflite file taken apart: `model` is what the schema's object API makes of it.

    Buffers that lie behind the flatbuffer are moved into it. The LiteRT quantizer writes those of
    larger models there and leaves offsets, which readers that know the plain schema only take for
    empty buffers.

    Bytes that are not those of a .tflite file raise an ArgumentError, damaged ones an ExportError.
    """

    def __init__(self, content: bytes):
        self.model = parse_model(content, "the bytes given")
        self.model.buffers = [_aligned(stored_in(each, content)) for each in self.model.buffers]

    def add_buffer(self, values: np.ndarray) -> int:
        """Stores the bytes of an array; returns the buffer's number."""
        self.model.buffers.append(_aligned(np.frombuffer(values.tobytes(), np.uint8)))
        return len(self.model.buffers) - 1

    def add_tensor(self, graph: Any, name: bytes, like: Any) -> int:
        """Adds a tensor of another's shape and type; returns its index in the subgraph."""
        tensor = schema.TensorT()
        tensor.name, tensor.shape, tensor.shapeSignature = name, like.shape, like.shapeSignature
        tensor.type, tensor.hasRank = like.type, like.hasRank
        graph.tensors.append(tensor)
        return len(graph.tensors) - 1

    def add_code(self, builtin: int, version: int) -> int:
        """Names an operator that the file is to use; returns the number operators have it by."""
        code = schema.OperatorCodeT()
        code.builtinCode, code.version = builtin, version
        code.deprecatedBuiltinCode = min(builtin, _LARGEST_OLD_CODE)
        self.model.operatorCodes.append(code)
        return len(self.model.operatorCodes) - 1

    def code(self, builtin: int, lowest: int, highest: int | None = None) -> int:
        """The number of an operator of one of the versions, added with the lowest if it is new."""
        for number, code in enumerate(self.model.operatorCodes):
            fits = lowest <= code.version and (highest is None or code.version <= highest)
            if code.builtinCode == builtin and fits:
                return number
        return self.add_code(builtin, lowest)

    def packed(self) -> bytes:
        """The file's bytes: one flatbuffer, its buffers aligned."""
        return _packed(self.model)


def make_operator(code: int, inputs: Sequence[int], output: int, options: Any) -> Any:
    """An operator with one output and options of the schema, such as `DensifyOptionsT`."""
    operator = schema.OperatorT()
    operator.opcodeIndex = code
    operator.inputs, operator.outputs = np.array(inputs, np.int32), np.array([output], np.int32)
    kind = type(options).__name__.removesuffix("T")
    operator.builtinOptionsType = getattr(schema.BuiltinOptions, kind)
    operator.builtinOptions = options
    return operator


def read_instead(graph: Any, old: int, new: int) -> None:
    """Lets every operator that reads one tensor read another."""
    for operator in graph.operators:
        if operator.inputs is not None:
            inputs = np.asarray(operator.inputs)
            operator.inputs = np.where(inputs == old, new, inputs).astype(np.int32)


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


def _aligned(data: np.ndarray | None) -> _AlignedBuffer:
    buffer = _AlignedBuffer()
    buffer.data = data
    return buffer


def _packed(model: Any) -> bytes:
    stored = sum(0 if each.data is None else len(each.data) for each in model.buffers)
    builder = flatbuffers.Builder(stored + 1024)
    builder.Finish(model.Pack(builder), file_identifier=IDENTIFIER)
    return bytes(builder.Output())


def split_file(file: Path, counts: Sequence[int]) -> list[Path | None]:
    """Writes one file for every model that a file holds side by side.

    Converting many small models as one with many inputs takes a tenth of the time that converting
    them one by one does.

    The file's inputs are in Keras's order, and `counts` says for every model how many of them are
    its own, one model after the other. The new files lie beside the one given; None stands for a
    model of which no operator is left.
    """
    whole = FileEditor(file.read_bytes()).model
    graph = whole.subgraphs[0]
    fed = _numbers(graph.inputs)
    pieces: list[Path | None] = []
    start = 0
    for number, count in enumerate(counts):
        inputs = fed[start : start + count]
        start += count
        operators = _operators_behind(graph, inputs)
        path = file.with_name(f"{file.stem}_{number}.tflite") if operators else None
        if path is not None:
            path.write_bytes(_packed(_piece(whole, operators, inputs)))
        pieces.append(path)
    return pieces


def _operators_behind(graph: Any, inputs: Sequence[int]) -> list[Any]:
    """The operators that compute on the inputs, and those that restore their constants."""
    reached = set(inputs)
    taken = set()
    for number, operator in enumerate(graph.operators):  # in the order they run
        if reached.intersection(_numbers(operator.inputs)):
            reached.update(_numbers(operator.outputs))
            taken.add(number)
    needed = {n for number in taken for n in _numbers(graph.operators[number].inputs)} - reached
    for number in reversed(range(len(graph.operators))):
        operator = graph.operators[number]
        if number not in taken and needed.intersection(_numbers(operator.outputs)):
            needed.update(_numbers(operator.inputs))
            taken.add(number)
    return [graph.operators[number] for number in sorted(taken)]


def _piece(whole: Any, operators: Sequence[Any], inputs: Sequence[int]) -> Any:
    """A model with some of the operators of the first subgraph."""
    graph = whole.subgraphs[0]
    made = {number for operator in operators for number in _numbers(operator.outputs)}
    used = {number for operator in operators for number in _numbers(operator.inputs)}
    order = sorted({*made, *used, *inputs} - {-1})
    place = {number: position for position, number in enumerate(order)} | {-1: -1}
    piece = copy.copy(graph)
    piece.tensors = [copy.copy(graph.tensors[number]) for number in order]
    piece.operators = []
    for operator in operators:
        moved = copy.copy(operator)
        for name in ("inputs", "outputs", "intermediates"):
            if getattr(operator, name) is not None:
                renamed = [place[number] for number in _numbers(getattr(operator, name))]
                setattr(moved, name, renamed)
        piece.operators.append(moved)
    piece.inputs = [place[number] for number in inputs]
    piece.outputs = [place[n] for n in _numbers(graph.outputs) if n in made]
    model = schema.ModelT()
    model.version = whole.version
    model.operatorCodes = whole.operatorCodes
    # The bodies of loops are other subgraphs, named by their numbers.
    others = [copy.copy(other) for other in whole.subgraphs[1:]]
    for other in others:
        other.tensors = [copy.copy(tensor) for tensor in other.tensors]
    model.subgraphs = [piece, *others]
    model.buffers = [_aligned(None)]
    for tensor in (tensor for some in model.subgraphs for tensor in some.tensors):
        buffer = whole.buffers[tensor.buffer]
        tensor.buffer = 0
        if buffer.data is not None and len(buffer.data):
            tensor.buffer = len(model.buffers)
            model.buffers.append(buffer)
    return model


def _numbers(values: Any) -> list[int]:
    return [] if values is None else [int(value) for value in np.asarray(values).ravel()]
