"""What a .tflite file consists of, as small records: tensors, operators, subgraphs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np


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
        raw: The stored values as integers or floats of shape `shape`, 4-bit values one per element,
            zeros that a sparse format leaves out put back; None if the tensor is not constant, lies
            in another file, or has a type numpy does not have.
        scales: Quantization scales, one for the tensor or one per slice along `axis`; else empty.
        zero_points: Zero points, as many as `scales`.
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
        """Number of values."""
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
        name: TFLite's name, such as "FULLY_CONNECTED"; a custom operator's own name.
        inputs: Indices of its input tensors in the subgraph; -1 for one left out.
        outputs: Indices of its output tensors.
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

    Attributes:
        tensors: All tensors, activations included.
        operators: All operators in the order they run.
        graphs: The subgraphs' inputs and outputs; the first subgraph is the model.
        signatures: Names of the signatures.
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
