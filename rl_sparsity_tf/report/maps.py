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
MOST_KERNELS = 2_000
"""Kernels that are looked at."""
_MOST_GROUPS, _MOST_IN_ALL = 2**26, 2**28
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
    if not all(map(_is_run, runs)):
        return None
    flat = np.full(count, OPERATIONS.index(default), np.uint8)
    if not runs:
        return flat
    given = [(run[0], run[1], OPERATIONS.index(run[2])) for run in runs]
    starts, lengths, kinds = np.array(given, np.int64).T
    ends = np.cumsum(lengths)
    # Runs that overlap could name far more groups than there are.
    if ends[-1] > count or (starts + lengths).max() > count:
        return None
    places = np.arange(ends[-1]) + np.repeat(starts - ends + lengths, lengths)
    flat[places] = np.repeat(kinds, lengths)
    return flat


def _is_run(run: Any) -> bool:
    return (
        isinstance(run, list)
        and len(run) == 3
        and type(run[0]) is type(run[1]) is int
        and 0 <= run[0] <= _MOST_GROUPS
        and 0 < run[1] <= _MOST_GROUPS
        and run[2] in OPERATIONS
    )


def decoded(plan: Any) -> list[Decoded]:
    """The kernels of a plan's JSON that can be read, in order, as far as there is room."""
    found: list[Decoded] = []
    groups = 0
    for entry in listed(plan)[:MOST_KERNELS]:
        one = decode(fields(entry))
        groups += one.operations.size if one else 0
        if groups > _MOST_IN_ALL:
            break
        found += [one] if one else []
    return found


def listed(plan: Any) -> list[Any]:
    """The entries of a plan's JSON, whatever they are."""
    found = fields(plan).get("kernels")
    return found if isinstance(found, list) else []


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
    tall, wide = _steps(grid.shape[::-1] if turned else grid.shape, cells)
    steps = (wide, tall) if turned else (tall, wide)
    counts = np.stack([_summed(grid == one, *steps) for one in _LIVING])
    sizes = np.outer(*map(_extents, grid.shape, steps))
    if turned:
        counts, sizes = counts.transpose(0, 2, 1), sizes.T
    rows, columns = sizes.shape
    share = counts.sum(axis=0) / sizes
    level = np.ceil(_LEVELS * np.sqrt(share)).astype(int)
    kind = np.argmax(counts, axis=0)
    # Coarse cells may leave more rows than columns.
    side = min(20.0, max(2.0, math.floor(2 * width / max(rows, columns)) / 2))
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
    if not marked.any():
        return np.zeros(
            [len(_extents(*one)) for one in zip(marked.shape, (tall, wide), strict=True)]
        )
    across = np.arange(0, marked.shape[1], wide)
    # Block by block, so that no copy of the whole is made.
    starts = range(0, len(marked), tall)
    return np.array(
        [np.add.reduceat(marked[n : n + tall].sum(axis=0, dtype=np.int64), across) for n in starts]
    )


def _extents(length: int, step: int) -> np.ndarray:
    """How many groups every cell has along an axis; the last may have fewer."""
    starts = np.arange(0, length, step)
    return np.minimum(length - starts, step)


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
