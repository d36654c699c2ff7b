"""How much working memory a .tflite file takes on a microcontroller, estimated from the file alone.

TensorFlow Lite for Microcontrollers keeps everything in one arena. At its head lie the activations,
which share memory where their lifetimes allow: it places them greedily by size, as described by
Pisarchyk and Lee 2020, "Efficient Memory Management for Deep Neural Net Inference" (arXiv
2001.03288). At its tail lie the structures that stay: tensors, nodes, what kernels compute when
they are prepared. That part is modelled here on what the package tflite-micro was seen to use on a
64-bit machine, whose pointers are twice as long as a microcontroller's.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence

from rl_sparsity_tf.tflite.reading import FlatModel, FlatOperator, FlatTensor

ALIGNMENT = 16
# Bytes of the runtime's structures, as seen: the allocators and the graph; one tensor; one node
# with what its kernel keeps; the full description of an input or output; multiplier and shift of
# one channel.
_FIXED = 640
_PER_TENSOR = 24
_PER_OPERATOR = 168
_PER_PORT = 96
_PER_CHANNEL = 8
# While planning, head and tail also hold this for every tensor and every operator; while a kernel
# is prepared, the zero points of its channels and the descriptions of its tensors.
_PLANNING_PER_TENSOR = 36
_PLANNING_PER_BUFFER = 48
_PREPARING_PER_CHANNEL = 4
_PREPARING_PER_TENSOR = 96

_BYTES = {
    **dict.fromkeys(("int8", "uint8", "bool", "int4", "int2"), 1),
    **dict.fromkeys(("int16", "uint16", "float16"), 2),
    **dict.fromkeys(("int32", "uint32", "float32"), 4),
    **dict.fromkeys(("int64", "uint64", "float64"), 8),
}
# Kernels that add up in int32, as many numbers as they put out.
_ACCUMULATING = {"MEAN", "SUM", "TRANSPOSE_CONV"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Buffer:
    """So many bytes of memory, in use from the first step to the last, both included."""

    size: int
    first: int
    last: int


def plan_buffers(buffers: Iterable[Buffer]) -> int:
    """Places buffers so that those in use at the same time do not overlap.

    The largest is placed first, each in the first gap that takes it. Sizes are rounded up to 16
    bytes; the result is the bytes that all of them take together.

    Example:
        >>> plan_buffers([Buffer(size=32, first=0, last=1), Buffer(size=32, first=2, last=3)])
        32
    """
    placed: list[tuple[int, int, Buffer]] = []
    for buffer in sorted(buffers, key=lambda buffer: -buffer.size):
        size, offset = _aligned(buffer.size), 0
        for start, end, other in sorted(placed, key=lambda entry: entry[:2]):
            if other.first > buffer.last or buffer.first > other.last:
                continue
            if start - offset >= size:
                break
            offset = max(offset, end)
        placed.append((offset, offset + size, buffer))
    return max((end for _, end, _ in placed), default=0)


def activation_buffers(flat: FlatModel, subgraph: int = 0) -> list[Buffer]:
    """The activations of a subgraph and the memory its kernels add up in, with their lifetimes.

    Inputs are there from the start and outputs until the end. Constants stay in the file, and
    variables in memory of their own.
    """
    operators = [operator for operator in flat.operators if operator.subgraph == subgraph]
    tensors = {tensor.index: tensor for tensor in flat.tensors if tensor.subgraph == subgraph}
    graph = flat.graphs[subgraph]
    end = len(operators) + 1
    first = dict.fromkeys(graph.inputs, 0)
    last = dict.fromkeys(graph.outputs, end)
    buffers = []
    for step, operator in enumerate(operators, 1):
        for index in operator.outputs:
            first.setdefault(index, step)
            last.setdefault(index, step)
        for index in operator.inputs:
            last[index] = max(last.get(index, 0), step)
        scratch = _scratch(operator, tensors)
        if scratch:
            buffers.append(Buffer(size=scratch, first=step, last=step))
    for index, begin in first.items():
        tensor = tensors.get(index)
        if tensor is not None and not tensor.constant and not tensor.variable:
            until = max(last.get(index, begin), begin)
            buffers.append(Buffer(size=_size(tensor), first=begin, last=until))
    return buffers


def estimate_arena(flat: FlatModel) -> int:
    """Estimates the bytes of a file's arena in TFLM's reference kernels, a multiple of 16.

    They are the planned activations and the runtime's structures.

    Example:
        >>> estimate_arena(read_flat_model("model.tflite"))
        10480
    """
    head = kept = preparing = planning = 0
    for number, graph in enumerate(flat.graphs):
        tensors = [tensor for tensor in flat.tensors if tensor.subgraph == number]
        operators = [operator for operator in flat.operators if operator.subgraph == number]
        by_index = {tensor.index: tensor for tensor in tensors}
        buffers = activation_buffers(flat, number)
        # Subgraphs are called from one another, so their activations are there together.
        head += plan_buffers(buffers)
        planning += _PLANNING_PER_TENSOR * len(tensors) + _PLANNING_PER_BUFFER * len(buffers)
        kept += _PER_TENSOR * len(tensors) + _PER_OPERATOR * len(operators)
        kept += _PER_PORT * len({*graph.inputs, *graph.outputs})
        kept += sum(_aligned(_size(tensor)) for tensor in tensors if tensor.variable)
        for operator in operators:
            channels = _channels(operator, by_index)
            kept += _PER_CHANNEL * channels
            described = sum(index >= 0 for index in (*operator.inputs, *operator.outputs))
            passing = _PREPARING_PER_CHANNEL * channels + _PREPARING_PER_TENSOR * described
            preparing = max(preparing, kept + passing)
    return _aligned(_FIXED + max(kept + max(head, planning), preparing))


def _scratch(operator: FlatOperator, tensors: dict[int, FlatTensor]) -> int:
    outputs = [tensors[index] for index in operator.outputs if index in tensors]
    if operator.name in _ACCUMULATING:
        return 4 * sum(tensor.elements for tensor in outputs)
    if operator.name == "UNIDIRECTIONAL_SEQUENCE_LSTM" and outputs and outputs[0].shape:
        # Four gates in int16.
        return 8 * outputs[0].shape[-1]
    return 0


def _channels(operator: FlatOperator, tensors: dict[int, FlatTensor]) -> int:
    """The channels of an operator's weights, if they have a scale each."""
    weights: Sequence[int] = [
        tensors[index].scales.size
        for index in operator.inputs
        if index in tensors and tensors[index].constant and len(tensors[index].shape) > 1
    ]
    return max(weights, default=0)


def _size(tensor: FlatTensor) -> int:
    return math.prod(tensor.shape) * _BYTES.get(tensor.dtype, 4)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
