"""TFLite's sparse storage of constants: encoding, decoding and its size in bytes.

A sparse tensor is a tree of levels, one per dimension in the order of traversal. A dense level has
a child for every index; a compressed (CSR) level keeps for every parent the indices that are used:
parent p owns `indices[segments[p]:segments[p + 1]]`. The stored values are the leaves, in order. A
block adds a dense level inside one dimension, so that whole runs are stored or left out.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from rl_sparsity_tf.errors import ArgumentError, ExportError

# What a sparse tensor may unpack to: as much as this, or so many bytes per byte of the file.
_FREE_BYTES = 2**28
_RATIO = 1000
# TFLite's types that have no numpy type of their own: several values in a byte.
_PACKED_BITS = {"int4": 4, "int2": 2}
_VECTORS = (
    (np.uint8, schema.SparseIndexVector.Uint8Vector, schema.Uint8VectorT),
    (np.uint16, schema.SparseIndexVector.Uint16Vector, schema.Uint16VectorT),
    (np.int32, schema.SparseIndexVector.Int32Vector, schema.Int32VectorT),
)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class SparseEncoding:
    """A constant in TFLite's sparse format.

    Attributes:
        values: The stored values, in the order of traversal.
        order: The order of traversal, the block's dimension included.
        block: Length of the blocks along the last axis; 1 if there are none.
        sizes: Number of indices of each level.
        segments: Of the compressed level: where each parent's indices begin, and the end.
        indices: Of the compressed level: the indices that are used.
    """

    values: np.ndarray
    order: tuple[int, ...]
    block: int
    sizes: tuple[int, ...]
    segments: np.ndarray
    indices: np.ndarray

    @property
    def data_bytes(self) -> int:
        """Bytes of the values, the segments and the indices."""
        return self.values.nbytes + self.segments.nbytes + self.indices.nbytes

    def parameters(self) -> Any:
        """The schema's SparsityParametersT table."""
        compressed = len(self.sizes) - (2 if self.block > 1 else 1)
        levels = []
        for number, size in enumerate(self.sizes):
            level = schema.DimensionMetadataT()
            if number == compressed:
                level.format = schema.DimensionType.SPARSE_CSR
                level.arraySegmentsType, level.arraySegments = _vector(self.segments)
                level.arrayIndicesType, level.arrayIndices = _vector(self.indices)
            else:
                level.format = schema.DimensionType.DENSE
                level.denseSize = size
            levels.append(level)
        sparsity = schema.SparsityParametersT()
        sparsity.traversalOrder = np.asarray(self.order, np.int32)
        sparsity.dimMetadata = levels
        if self.block > 1:
            # The block's dimension subdivides the last axis.
            sparsity.blockMap = np.asarray([len(self.sizes) - 2], np.int32)
        return sparsity


def encode_sparse(
    values: np.ndarray, *, block: int = 1, order: Sequence[int] | None = None
) -> SparseEncoding:
    """Encodes an array with its last traversed dimension compressed.

    The array has rank 1 or more and is as it is stored (integers for quantized tensors). Runs of
    `block` values along the last axis are stored or left out as a whole. `order` is that in which
    the dimensions are traversed, by default as they are; blocks need the default. Indices and
    segments take 1, 2 or 4 bytes each, by their largest value.

    An ArgumentError is raised if the array has no axis, the order is no permutation of its axes, or
    the last axis is not a whole number of blocks.

    Example:
        >>> encoding = encode_sparse(np.array([[0, 5, 0], [0, 0, 7]], np.int8))
        >>> encoding.values, encoding.segments, encoding.indices
        (array([5, 7], dtype=int8), array([0, 1, 2], dtype=uint8), array([1, 2], dtype=uint8))
    """
    rank = values.ndim
    if rank == 0:
        raise ArgumentError(
            "A single number has no sparse format. Give an array of rank 1 or more."
        )
    order = tuple(range(rank)) if order is None else tuple(int(axis) for axis in order)
    if sorted(order) != list(range(rank)):
        raise ArgumentError(
            f"order={order} is not an order of the {rank} dimensions of shape {values.shape}. "
            f"Expected each of 0 to {rank - 1} once."
        )
    if block < 1:
        raise ArgumentError(f"block={block} cannot be used. Expected an integer of at least 1.")
    if block > 1 and order != tuple(range(rank)):
        raise ArgumentError(f"order={order} cannot be used with blocks. Leave order out.")
    if values.shape[-1] % block:
        # The runtimes compute shape // block, so the rest would be lost without a word.
        raise ArgumentError(
            f"Blocks of {block} do not fit shape {values.shape}: its last axis of "
            f"{values.shape[-1]} is no multiple of {block}, and runtimes drop the rest. Choose "
            "another block or none."
        )
    arranged = np.ascontiguousarray(np.transpose(values, order))
    width = arranged.shape[-1] // block
    parents = int(np.prod(arranged.shape[:-1], dtype=np.int64))
    blocks = arranged.reshape(parents, width, block)
    used = (blocks != 0).any(axis=2)
    if used.size and not used.any():
        # Runtimes take an empty buffer for a tensor that is no constant: store one zero.
        used[0, 0] = True
    sizes = (*arranged.shape[:-1], width)
    segments = np.concatenate([[0], np.cumsum(used.sum(axis=1, dtype=np.int64))])
    return SparseEncoding(
        values=blocks[used].reshape(-1),
        order=(*order, rank) if block > 1 else order,
        block=block,
        sizes=(*sizes, block) if block > 1 else sizes,
        segments=_narrow(segments),
        indices=_narrow(np.nonzero(used)[1]),
    )


def decode_sparse(raw: bytes, shape: Sequence[int], sparsity: Any, dtype: str) -> np.ndarray:
    """Decodes a sparse constant as the runtimes do.

    `sparsity` is the tensor's `SparsityParametersT`: any number of dense and compressed levels, and
    at most one block per dimension. `dtype` is TFLite's type name in lower case, such as "float32",
    "int8" or "int4". The array has the tensor's shape, 4-bit values as int8, and is zero where
    nothing is stored. Parameters that contradict themselves, the shape or the number of values
    raise an ExportError.
    """
    shape = tuple(int(size) for size in shape)
    stored = _stored_values(bytes(raw), dtype)
    check_size(shape, stored.itemsize, len(raw))
    order = [int(dimension) for dimension in _given(sparsity.traversalOrder)]
    levels = _given(sparsity.dimMetadata)
    block_of = [int(axis) for axis in _given(sparsity.blockMap)]
    rank = len(shape)
    # As in the runtimes, blocks are traversed inside the dimensions.
    fits = sorted(order[:rank]) == list(range(rank)) and sorted(order[rank:]) == list(
        range(rank, rank + len(block_of))
    )
    if not fits or len(levels) != len(order) or len(set(block_of)) != len(block_of):
        raise _contradiction(f"a traversal order of {order} with blocks along {block_of}", shape)
    if not set(block_of) <= set(range(rank)):
        raise _contradiction(f"blocks along {block_of}", shape)
    block_sizes = [1] * rank
    for number, axis in enumerate(block_of):
        block_sizes[axis] = int(levels[order.index(rank + number)].denseSize)
    strides = np.cumprod([1, *shape[:0:-1]], dtype=np.int64)[::-1]
    most = max(len(stored), *(_length(level.arraySegments) for level in levels), 1)
    places = np.zeros(1, np.int64)
    for dimension, level in zip(order, levels, strict=True):
        inner = dimension >= rank
        axis = block_of[dimension - rank] if inner else dimension
        step = int(strides[axis]) * (1 if inner else block_sizes[axis])
        limit = block_sizes[axis] if inner else shape[axis] // max(block_sizes[axis], 1)
        if level.format == schema.DimensionType.DENSE:
            if not 0 <= level.denseSize <= limit:
                raise _contradiction(f"{level.denseSize} indices along axis {axis}", shape)
            # Every place is followed by a segment or a value: known before they take memory.
            if len(places) * level.denseSize > most:
                found = f"{len(stored)} values for {len(places) * level.denseSize} places"
                raise _contradiction(found, shape)
            offsets = np.arange(level.denseSize, dtype=np.int64) * step
            places = (places[:, None] + offsets).reshape(-1)
        else:
            segments, indices = _indices(level.arraySegments), _indices(level.arrayIndices)
            counts = np.diff(segments)
            if len(counts) != len(places) or (counts < 0).any() or segments[0] != 0:
                raise _contradiction(f"{len(segments)} segments for {len(places)} parents", shape)
            if segments[-1] != len(indices):
                raise _contradiction(
                    f"{len(indices)} indices, {segments[-1]} of them in segments", shape
                )
            if len(indices) and not 0 <= indices.min() <= indices.max() < limit:
                raise _contradiction(f"index {indices.max()} along axis {axis}", shape)
            places = np.repeat(places, counts) + indices * step
    # A packed buffer's last byte may be half empty.
    spare = 8 // _PACKED_BITS[dtype] - 1 if dtype in _PACKED_BITS else 0
    if not 0 <= len(stored) - len(places) <= spare:
        raise _contradiction(f"{len(stored)} values for {len(places)} places", shape)
    dense = np.zeros(math.prod(shape), stored.dtype)
    dense[places] = stored[: len(places)]
    return dense.reshape(shape)


def check_size(shape: Sequence[int], itemsize: int, stored: int) -> None:
    """Raises if a sparse tensor would take far more memory than its file, or none at all.

    `itemsize` is the bytes of one value in memory, `stored` the bytes of the tensor in the file.
    The ExportError names both sizes.
    """
    shape = tuple(shape)
    if any(size < 0 for size in shape):
        raise _contradiction("a negative size", shape)
    claimed, allowed = math.prod(shape) * itemsize, max(_FREE_BYTES, _RATIO * stored)
    if claimed > allowed:
        raise ExportError(
            f"A sparse tensor of shape {shape} claims {claimed:,} bytes, of which {stored:,} are "
            f"stored. Expected at most {allowed:,}: the file is damaged. Export it again."
        )


def _length(vector: Any) -> int:
    return 0 if vector is None or vector.values is None else len(vector.values)


def _stored_values(raw: bytes, dtype: str) -> np.ndarray:
    if dtype in _PACKED_BITS:
        bits = _PACKED_BITS[dtype]
        shifts = np.arange(0, 8, bits, dtype=np.uint8)
        unsigned = (np.frombuffer(raw, np.uint8)[:, None] >> shifts) & (2**bits - 1)
        values = unsigned.reshape(-1).astype(np.int8)
        return np.where(values >= 2 ** (bits - 1), values - 2**bits, values).astype(np.int8)
    try:
        return np.frombuffer(raw, np.dtype(dtype))
    except (TypeError, ValueError) as error:
        raise ExportError(
            f"A sparse tensor of {len(raw)} bytes cannot be read as {dtype!r} ({error}): the file "
            "is damaged or newer than this package. Export it again."
        ) from error


def _contradiction(found: str, shape: tuple[int, ...]) -> ExportError:
    return ExportError(
        f"A sparse tensor of shape {shape} has {found}, which do not fit together: the file is "
        "damaged. Export it again."
    )


def _given(values: Any) -> list[Any]:
    return [] if values is None else list(values)


def _indices(vector: Any) -> np.ndarray:
    values = None if vector is None else vector.values
    # A vector that holds nothing is left out of the file.
    return np.zeros(0, np.int64) if values is None else np.asarray(values).astype(np.int64)


def _narrow(values: np.ndarray) -> np.ndarray:
    """Stores whole numbers in the narrowest of TFLite's three index types."""
    largest = int(values.max(initial=0))
    for kind, _, _ in _VECTORS[:-1]:
        if largest <= np.iinfo(kind).max:
            return values.astype(kind)
    return values.astype(np.int32)


def _vector(values: np.ndarray) -> tuple[int, Any]:
    for kind, code, table in _VECTORS:
        if values.dtype == kind:
            vector = table()
            vector.values = values
            return code, vector
    raise TypeError(values.dtype)
