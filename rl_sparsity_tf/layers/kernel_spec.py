"""How one kernel of a layer is viewed as a matrix."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from rl_sparsity_tf.errors import ArgumentError
from rl_sparsity_tf.layers.export_modes import INTEGER_MODES
from rl_sparsity_tf.layers.groups import Grouping


@dataclasses.dataclass(frozen=True)
class KernelSpec:
    """How one kernel of a layer class is viewed.

    Attributes:
        attribute: The layer's attribute that holds the variable, e.g. `"kernel"`, or the path to
            it through inner layers, e.g. `"cell/recurrent_kernel"`.
        layout: One letter per axis: `i` for axes that are summed over (inputs, kernel positions)
            and `o` for axes that number the output units. Dense is `"io"`, Conv2D `"iiio"`.
        per_output_scale: Whether TFLite keeps one quantization scale per output unit (else one
            per tensor, or per gate).
        exports_int8: Whether TFLite can hold the kernel as integers with float activations.
        gates: Matrices that lie side by side in the kernel (along its last axis) and that TFLite
            stores, and scales, one by one: 4 for an LSTM.
        kind: The operator of TFLite that reads the kernel, a key of
            [INTEGER_MODES][rl_sparsity_tf.layers.export_modes.INTEGER_MODES]; empty if not known.

    Example:
        >>> KernelSpec("kernel", "iioi").matrix_shape((3, 3, 8, 4))  # Conv2DTranspose
        (36, 8)
    """

    attribute: str
    layout: str
    per_output_scale: bool = True
    exports_int8: bool = True
    gates: int = 1
    kind: str = ""

    def __post_init__(self) -> None:
        if not self.layout or set(self.layout) - set("io") or "o" not in self.layout:
            raise ArgumentError(
                f"layout={self.layout!r} of kernel {self.attribute!r} cannot be used. Expected one "
                "letter per axis, 'i' for inputs and 'o' for outputs, with at least one 'o', for "
                "example 'io' for a dense kernel."
            )

    @classmethod
    def of_kind(cls, attribute: str, layout: str, kind: str) -> KernelSpec:
        """A kernel that TFLite stores, and scales, as was measured for its operator."""
        stored = INTEGER_MODES[kind]["plan8"]
        integers = stored.dtype == "int8"
        # Where weights alone are never stored as integers, the grid is the converter's own.
        scales = stored.scales if integers else INTEGER_MODES[kind]["dynamic"].scales
        per_output = scales != "tensor"
        return cls(
            attribute, layout, per_output, integers, 1 if per_output else stored.tensors, kind
        )

    @property
    def label(self) -> str:
        """The attribute as paths of plans and reports name it: without leading underscores."""
        return "/".join(step.lstrip("_") for step in self.attribute.split("/"))

    @property
    def scales(self) -> str:
        """What shares a quantization scale: `"per output"`, `"per gate"` or `"per tensor"`."""
        if self.per_output_scale:
            return "per output"
        return "per gate" if self.gates > 1 else "per tensor"

    @property
    def axes(self) -> tuple[int, ...]:
        """The transposition that brings the inputs first and the outputs last."""
        order = [axis for axis, letter in enumerate(self.layout) if letter == "i"]
        order += [axis for axis, letter in enumerate(self.layout) if letter == "o"]
        return tuple(order)

    def matrix_shape(self, shape: Sequence[int]) -> tuple[int, int]:
        """`(inputs, outputs)` of a kernel of the given shape."""
        if len(shape) != len(self.layout):
            raise ArgumentError(
                f"Kernel {self.attribute!r} has shape {tuple(shape)}, but its layout "
                f"{self.layout!r} describes {len(self.layout)} axes. Register the layer class with "
                "one letter per axis."
            )
        sizes = {"i": 1, "o": 1}
        for size, letter in zip(shape, self.layout, strict=True):
            sizes[letter] *= int(size)
        return sizes["i"], sizes["o"]

    def grouping(self, shape: Sequence[int], group: str) -> Grouping:
        """The groups of a kernel of the given shape."""
        return Grouping(group, *self.matrix_shape(shape))

    def to_matrix(self, kernel: tf.Tensor) -> tf.Tensor:
        """Views a kernel as `(inputs, outputs)`."""
        shape = self.matrix_shape(kernel.shape)
        if self.axes != tuple(range(len(self.axes))):
            kernel = tf.transpose(kernel, self.axes)
        return tf.reshape(kernel, shape)

    def from_matrix(self, matrix: tf.Tensor, shape: Sequence[int]) -> tf.Tensor:
        """Undoes [to_matrix][] for a kernel of the given shape."""
        kernel = tf.reshape(matrix, [shape[axis] for axis in self.axes])
        if self.axes != tuple(range(len(self.axes))):
            kernel = tf.transpose(kernel, np.argsort(self.axes))
        return kernel

    def to_matrix_numpy(self, kernel: np.ndarray) -> np.ndarray:
        """[to_matrix][] for NumPy arrays."""
        return np.transpose(kernel, self.axes).reshape(self.matrix_shape(kernel.shape))

    def from_matrix_numpy(self, matrix: np.ndarray, shape: Sequence[int]) -> np.ndarray:
        """[from_matrix][] for NumPy arrays."""
        kernel = matrix.reshape([shape[axis] for axis in self.axes])
        return np.ascontiguousarray(np.transpose(kernel, np.argsort(self.axes)))
