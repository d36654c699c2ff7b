"""The operations of a kernel as a picture: one cell per group, or per block of groups."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from rl_sparsity_tf.report.drawing import compact, svg
from rl_sparsity_tf.report.reading import fields, text, whole

OPERATIONS = ("keep", "prune", "quantize", "shuffle")
"""What a group may become, as plans call it."""

_LIVING = (0, 2, 3)
_PRUNE = 1
_BLOCKS = {"element": 1, "2:4": 1, "block4": 4, "block16": 16}
_MOST_GROUPS = 2**26
_MOST_AXES = 16
_LEVELS = 5


@dataclasses.dataclass(frozen=True, eq=False)
class Decoded:
    """A kernel's entry of a plan.

    Attributes:
        operations: Indices of [OPERATIONS][], uint8 of shape `(rows, outputs)`.
        weights: Numbers of weights under each operation.
        group: Kind of groups.
        bits: Bits of quantized groups; 32 if there are none.
    """

    path: str
    shape: tuple[int, ...]
    group: str
    bits: int
    operations: np.ndarray
    weights: tuple[int, ...]

    @property
    def size(self) -> int:
        """All its weights."""
        return sum(self.weights)

    @property
    def living(self) -> int:
        """Weights that are not pruned."""
        return self.size - self.weights[_PRUNE]

    @property
    def exported_bits(self) -> int:
        """Bits of a stored weight: 32 where some are kept as floats."""
        return 32 if self.weights[0] or self.weights[3] else self.bits


def decode(entry: Mapping[str, Any]) -> Decoded | None:
    """Reads a kernel's entry; None if it is none, or too large to be drawn."""
    path, layout, group = text(entry.get("path")), entry.get("layout"), entry.get("group")
    given = entry.get("shape")
    shape = [whole(one) for one in given] if isinstance(given, list) else []
    bits = whole(entry.get("bits"))
    if path is None or not isinstance(layout, str) or not isinstance(group, str) or bits is None:
        return None
    if not shape or len(shape) > _MOST_AXES or len(layout) != len(shape) or not all(shape):
        return None
    sizes = {
        kind: math.prod(n or 0 for n, a in zip(shape, layout, strict=True) if a == kind)
        for kind in "io"
    }
    inputs, outputs = sizes["i"], sizes["o"]
    block = inputs if group == "channel" else _BLOCKS.get(group, 0)
    if inputs * outputs != math.prod(n or 0 for n in shape) or not block:
        return None
    rows = -(-inputs // block)
    if rows * outputs > _MOST_GROUPS:
        return None
    flat = _operations(entry, rows * outputs)
    if flat is None:
        return None
    operations = flat.reshape(rows, outputs)
    column = np.full(rows, block, np.int64)
    column[-1] = inputs - block * (rows - 1)
    weights = tuple(int(((operations == n).sum(axis=1) * column).sum()) for n in range(4))
    return Decoded(path, tuple(n or 0 for n in shape), group, bits, operations, weights)


def _operations(entry: Mapping[str, Any], count: int) -> np.ndarray | None:
    default, runs = entry.get("default", "keep"), entry.get("exceptions", [])
    if default not in OPERATIONS or not isinstance(runs, list):
        return None
    flat = np.full(count, OPERATIONS.index(default), np.uint8)
    for run in runs:
        if not isinstance(run, list) or len(run) != 3 or run[2] not in OPERATIONS:
            return None
        start, length = whole(run[0]), whole(run[1])
        if start is None or length is None or start + length > count:
            return None
        flat[start : start + length] = OPERATIONS.index(run[2])
    return flat


def decoded(plan: Any) -> list[Decoded]:
    """The kernels of a plan's JSON that can be read, in order."""
    found = fields(plan).get("kernels")
    listed = found if isinstance(found, list) else []
    return [one for one in map(decode, map(fields, listed)) if one is not None]


@dataclasses.dataclass(frozen=True)
class Map:
    """A kernel's picture, and what a cell of it stands for."""

    drawing: str
    note: str


def draw(kernel: Decoded, cells: int = 8192, width: float = 460) -> Map:
    """Draws a kernel, `cells` at most; the longer side lies.

    A cell is coloured by what most of its living groups become, the stronger the more of them live;
    where nothing does it is left empty.
    """
    grid, turned = kernel.operations, kernel.operations.shape[0] > kernel.operations.shape[1]
    if turned:
        grid = grid.T
    tall, wide = _steps(grid.shape, cells)
    counts = np.stack([_summed(grid == one, tall, wide) for one in _LIVING])
    sizes = _summed(np.ones(grid.shape, bool), tall, wide)
    rows, columns = sizes.shape
    share = counts.sum(axis=0) / sizes
    level = np.ceil(_LEVELS * np.sqrt(share)).astype(int)
    kind = np.argmax(counts, axis=0)
    side = min(20.0, max(2.0, math.floor(2 * width / columns) / 2))
    high = max(side, 22.0) if rows == 1 else side
    parts = [f'<path class="empty" d="M0 0h{compact(side * columns)}v{compact(high * rows)}H0z"/>']
    for index, operation in enumerate(_LIVING):
        for one in range(1, _LEVELS + 1):
            runs = _runs((kind == index) & (level == one), side, high)
            if runs:
                strength = "" if one == _LEVELS else f' fill-opacity="{0.15 + 0.85 * one / 5:.2f}"'
                name = OPERATIONS[operation]
                parts.append(f'<path class="op-{name}"{strength} d="{runs}"/>')
    label = f"operations of {kernel.path}"
    along = (
        "inputs run to the right, outputs down"
        if turned
        else "outputs run to the right, inputs down"
    )
    if kernel.group == "channel":
        along = "one cell per channel"
    note = along if tall * wide == 1 else f"a cell is {tall} x {wide} groups; {along}"
    return Map(svg(side * columns, high * rows, parts, label, "map"), note)


def _steps(shape: tuple[int, ...], cells: int) -> tuple[int, int]:
    """Groups that a cell is high and wide."""
    rows, columns = shape
    step = max(1, math.ceil(math.sqrt(rows * columns / cells)))
    tall = 1 if rows <= 16 else min(step, max(1, rows // 8))
    wide = max(step, math.ceil(columns * math.ceil(rows / tall) / cells), math.ceil(columns / 256))
    return max(
        tall, math.ceil(rows / 128)
    ), 1 if rows * columns <= cells and columns <= 256 else wide


def _summed(marked: np.ndarray, tall: int, wide: int) -> np.ndarray:
    """How many are marked in every cell."""
    rows = np.add.reduceat(marked.astype(np.int32), np.arange(0, marked.shape[0], tall), axis=0)
    return np.add.reduceat(rows, np.arange(0, marked.shape[1], wide), axis=1)


def _runs(cells: np.ndarray, side: float, high: float) -> str:
    """The path of some cells, those beside each other as one."""
    parts = []
    for row, marked in enumerate(cells):
        edges = np.flatnonzero(np.diff(np.concatenate([[0], marked.astype(np.int8), [0]])))
        for start, end in edges.reshape(-1, 2):
            across = compact(side * (end - start))
            place = f"M{compact(side * start)} {compact(high * row)}"
            parts.append(f"{place}h{across}v{compact(high)}h-{across}z")
    return "".join(parts)
