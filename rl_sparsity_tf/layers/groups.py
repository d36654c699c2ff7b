"""How a kernel, viewed as a matrix, is cut into groups of weights."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import tensorflow as tf

from rl_sparsity_tf.errors import ArgumentError, check_choice

GROUPS = ("element", "block4", "block16", "channel")
"""The group kinds: one weight; 4 or 16 consecutive inputs of one output; a whole output channel."""

PATTERNS = ("2:4",)
"""Patterns "N:M": of M consecutive inputs of one output at most N live, of a shorter tail half."""

KINDS = (*GROUPS, *PATTERNS)
"""What a kernel's plan is written in: a kind of groups, or single weights that keep a pattern."""

_BLOCKS = {"element": 1, "block4": 4, "block16": 16, "2:4": 1}


@dataclasses.dataclass(frozen=True)
class Grouping:
    """Groups of a kernel viewed as `(inputs, outputs)`: blocks along the inputs of one output.

    The groups form a grid of shape `(rows, outputs)`. Where the block size does not divide the
    inputs, the last block of every output is shorter. `group` is one of [KINDS][]; the groups of a
    pattern are single weights.

    Example:
        >>> Grouping("block4", inputs=10, outputs=3).shape
        (3, 3)
    """

    group: str
    inputs: int
    outputs: int

    def __post_init__(self) -> None:
        check_choice("group", self.group, KINDS)
        if self.inputs < 1 or self.outputs < 1:
            raise ArgumentError(
                f"A kernel of {self.inputs} inputs and {self.outputs} outputs has no weights to "
                "group. Expected at least one of each."
            )

    @property
    def block(self) -> int:
        """Weights in a full group."""
        return _BLOCKS.get(self.group, self.inputs)

    @property
    def pattern(self) -> tuple[int, int] | None:
        """N and M of a pattern, None for other kinds of groups."""
        if self.group not in PATTERNS:
            return None
        most, of = self.group.split(":")
        return int(most), int(of)

    @property
    def rows(self) -> int:
        """Groups along the inputs."""
        return -(-self.inputs // self.block)

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of anything with one value per group."""
        return self.rows, self.outputs

    @property
    def count(self) -> int:
        """Number of groups."""
        return self.rows * self.outputs

    @property
    def pairs(self) -> int:
        """Pairs of full neighbouring groups along the inputs of one output."""
        return (self.inputs // self.block) // 2

    @functools.cached_property
    def sizes(self) -> np.ndarray:
        """Weights in each group, int64 of shape `(rows, outputs)`, read-only."""
        column = np.full(self.rows, self.block, np.int64)
        column[-1] = self.inputs - self.block * (self.rows - 1)
        return np.broadcast_to(column[:, None], self.shape)

    def expand(self, grid: tf.Tensor) -> tf.Tensor:
        """Spreads one value per group, shape `(rows, outputs)`, over its weights.

        The result broadcasts with `(inputs, outputs)`: it has that shape, or `(1, outputs)` for
        whole channels.
        """
        if self.block == 1 or self.rows == 1:
            return grid
        full = self.inputs // self.block
        head = grid if full == self.rows else grid[:full]
        head = tf.reshape(head, (full, 1, self.outputs))
        head = tf.broadcast_to(head, (full, self.block, self.outputs))
        head = tf.reshape(head, (full * self.block, self.outputs))
        tail = self.inputs - full * self.block
        if tail == 0:
            return head
        return tf.concat([head, tf.broadcast_to(grid[full:], (tail, self.outputs))], axis=0)

    def reduce_sum(self, matrix: tf.Tensor) -> tf.Tensor:
        """Sums the weights of each group: `(inputs, outputs)` becomes `(rows, outputs)`."""
        if self.block == 1:
            return matrix
        padded = tf.pad(matrix, [[0, self.rows * self.block - self.inputs], [0, 0]])
        return tf.reduce_sum(tf.reshape(padded, (self.rows, self.block, self.outputs)), axis=1)

    def sum_numpy(self, matrix: np.ndarray) -> np.ndarray:
        """[reduce_sum][] for NumPy arrays, without TensorFlow's overhead per call."""
        if self.block == 1:
            return matrix
        return np.add.reduceat(matrix, np.arange(0, self.inputs, self.block), axis=0)

    def expand_numpy(self, grid: np.ndarray) -> np.ndarray:
        """[expand][] for NumPy arrays, always to the full `(inputs, outputs)`."""
        return np.repeat(grid, self.block, axis=0)[: self.inputs]

    def in_blocks(self, matrix: np.ndarray, fill: float = 0.0) -> np.ndarray:
        """Cuts a matrix `(inputs, outputs)` into the blocks of a pattern: `(blocks, M, outputs)`.

        A shorter tail is filled up with `fill`.
        """
        of = self._pattern[1]
        short = -self.inputs % of
        if short:
            matrix = np.pad(matrix, [(0, short), (0, 0)], constant_values=fill)
        return matrix.reshape(-1, of, self.outputs)

    @functools.cached_property
    def most(self) -> np.ndarray:
        """How many weights of each block a pattern lets live, shape `(blocks, 1)`."""
        most, of = self._pattern
        counts = np.full((-(-self.inputs // of), 1), most, np.int64)
        counts[-1] = -(-(self.inputs - of * (len(counts) - 1)) * most // of)
        return counts

    def largest(self, scores: np.ndarray, counts: np.ndarray | None = None) -> np.ndarray:
        """Marks the weights of highest score in every block; of equals the first go.

        Scores and marks have shape `(inputs, outputs)`. `counts`, how many to mark, broadcasts to
        `(blocks, outputs)`; by default as many as the pattern lets live.
        """
        blocks = self.in_blocks(scores, fill=-np.inf)
        counts = self.most if counts is None else counts
        # Of a rank, not of a threshold, so that ties and NaN do not change how many live.
        ranks = np.argsort(np.argsort(blocks, axis=1, kind="stable"), axis=1)
        live = ranks >= blocks.shape[1] - np.broadcast_to(counts, blocks.shape[::2])[:, None]
        return live.reshape(-1, self.outputs)[: self.inputs]

    def check_pattern(self, live: np.ndarray, whole: bool = False) -> None:
        """Raises `ArgumentError` for the first block that keeps more than a pattern lets live.

        Groups without a pattern pass; with `whole`, so do blocks that nothing is pruned from.
        `live` has shape `(inputs, outputs)`.
        """
        if self.pattern is None:
            return
        counts = self.in_blocks(live).sum(1)
        wrong = counts > self.most
        if whole:
            wrong &= counts < self.in_blocks(np.ones_like(live)).sum(1)
        if wrong.any():
            block, output = np.argwhere(wrong)[0]
            first = int(block) * self._pattern[1]
            last = min(first + self._pattern[1], self.inputs) - 1
            raise ArgumentError(
                f"Inputs {first} to {last} of output {output} keep {counts[block, output]} "
                f"weights. Expected at most {self.most[block, 0]} for the pattern {self.group!r}; "
                "prune more of them, or use the group 'element'."
            )

    @property
    def _pattern(self) -> tuple[int, int]:
        if self.pattern is None:
            raise ArgumentError(
                f"The group {self.group!r} is no pattern. Expected one of {list(PATTERNS)}."
            )
        return self.pattern
