"""How a kernel, viewed as a matrix, is cut into groups of weights."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import tensorflow as tf

from rl_sparsity_tf.errors import ArgumentError, check_choice

GROUPS = ("element", "block4", "block16", "channel")
"""The group kinds: one weight; 4 or 16 consecutive inputs of one output; a whole output channel."""

_BLOCKS = {"element": 1, "block4": 4, "block16": 16}


@dataclasses.dataclass(frozen=True)
class Grouping:
    """Groups of a kernel viewed as `(inputs, outputs)`: blocks along the inputs of one output.

    The groups form a grid of shape `(rows, outputs)`. Where the block size does not divide the
    inputs, the last block of every output is shorter.

    Attributes:
        group: One of `"element"`, `"block4"`, `"block16"`, `"channel"`.
        inputs: Rows of the kernel's matrix.
        outputs: Columns of the kernel's matrix.

    Example:
        >>> Grouping("block4", inputs=10, outputs=3).shape
        (3, 3)
    """

    group: str
    inputs: int
    outputs: int

    def __post_init__(self) -> None:
        check_choice("group", self.group, GROUPS)
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
        """Spreads one value per group over its weights.

        Args:
            grid: Shape `(rows, outputs)`.

        Returns:
            A tensor that broadcasts with `(inputs, outputs)`: that shape, or `(1, outputs)` for
            whole channels.
        """
        if self.block == 1 or self.rows == 1:
            return grid
        full = self.inputs // self.block
        head = tf.broadcast_to(grid[:full, tf.newaxis, :], (full, self.block, self.outputs))
        head = tf.reshape(head, (full * self.block, self.outputs))
        tail = self.inputs - full * self.block
        if tail == 0:
            return head
        return tf.concat([head, tf.broadcast_to(grid[full:], (tail, self.outputs))], axis=0)

    def reduce_sum(self, matrix: tf.Tensor) -> tf.Tensor:
        """Sums the weights of each group.

        Args:
            matrix: Shape `(inputs, outputs)`.

        Returns:
            A tensor of shape `(rows, outputs)`.
        """
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
