"""Takes a .tflite file apart into the files of models that were converted side by side."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema

from rl_sparsity_tf.tflite.reading import AlignedBuffer, inline_buffers


def split_file(file: Path, counts: Sequence[int]) -> list[Path | None]:
    """Writes one file for every model that a file holds side by side.

    Converting many small models as one with many inputs takes a tenth of the time that converting
    them one by one does.

    The file's inputs are in Keras's order, and `counts` says for every model how many of them are
    its own, one model after the other. The new files lie beside the one given; None stands for a
    model of which no operator is left.
    """
    whole = schema.ModelT.InitFromPackedBuf(inline_buffers(file.read_bytes()), 0)
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
            path.write_bytes(_packed(whole, operators, inputs))
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


def _packed(whole: Any, operators: Sequence[Any], inputs: Sequence[int]) -> bytes:
    """A file with some of the operators of the first subgraph."""
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
    model.buffers = [AlignedBuffer()]
    for tensor in (tensor for some in model.subgraphs for tensor in some.tensors):
        data = whole.buffers[tensor.buffer].data
        tensor.buffer = 0
        if data is not None and len(data):
            buffer = AlignedBuffer()
            buffer.data = data
            tensor.buffer = len(model.buffers)
            model.buffers.append(buffer)
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
    return bytes(builder.Output())


def _numbers(values: Any) -> list[int]:
    return [] if values is None else [int(value) for value in np.asarray(values).ravel()]
