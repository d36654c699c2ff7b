"""How a kernel of a layer is viewed as a matrix, and how TFLite stores its kind.

How a .tflite file stores a kernel in each export mode, as measured.

Every row was measured with TensorFlow 2.21 and LiteRT 2.3: a model of one layer, whose kernels have
at least 1,024 elements, was exported in each mode by
[export_tflite][rl_sparsity_tf.export_tflite], verified with and without XNNPACK, and the
tensors that hold its kernels were read back. "plan8" and "plan4" are `quantization="plan"` with a
plan that quantizes every kernel to 8 or 4 bits. A row covers the layers whose kernels reach the
same operator:

| kind | layers |
|---|---|
| `fully_connected` | Dense, EinsumDense, TimeDistributed(Dense), MultiHeadAttention; with
`unroll=True` also LSTM, GRU and SimpleRNN, alone or in Bidirectional |
| `conv2d` | Conv1D, Conv2D, TimeDistributed(Conv2D), the pointwise kernel of SeparableConv1D/2D |
| `depthwise_conv2d` | DepthwiseConv1D/2D, the depthwise kernel of SeparableConv1D/2D |
| `transpose_conv` | Conv1DTranspose, Conv2DTranspose |
| `conv3d` | Conv3D, Conv3DTranspose |
| `gather` | Embedding |
| `batch_matmul` | LocallyConnected1D/2D |
| `lstm` | LSTM with a fixed batch size, alone or in Bidirectional: one tensor per gate |
| `recurrent_loop` | GRU and SimpleRNN with a fixed batch size |
| `conv_lstm` | ConvLSTM2D: one tensor per gate |
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import tensorflow as tf

from rl_sparsity_tf.errors import ArgumentError
from rl_sparsity_tf.layers.groups import Grouping


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredAs:
    """How a kernel is stored.

    Attributes:
        dtype: TFLite's type of the tensor, or "crash" if the converter crashes.
        scales: "channel" for one quantization scale per output channel, "tensor" for one per
            tensor, "none".
        tensors: How many tensors hold the kernel: one per gate of a fused LSTM.
    """

    dtype: str
    scales: str = "none"
    tensors: int = 1


def _row(plan8: str, plan4: str, dynamic: str, int8: str, tensors: int = 1) -> dict[str, StoredAs]:
    def stored(text: str) -> StoredAs:
        dtype, _, scales = text.partition("/")
        return StoredAs(dtype=dtype, scales=scales or "none", tensors=tensors)

    modes = {"plan8": plan8, "plan4": plan4, "dynamic": dynamic, "int8": int8, "float16": "float16"}
    return {mode: stored(text) for mode, text in modes.items()}


INTEGER_MODES: Mapping[str, Mapping[str, StoredAs]] = {
    "fully_connected": _row("int8/channel", "int4/channel", "int8/channel", "int8/channel"),
    "conv2d": _row("int8/channel", "int4/channel", "int8/channel", "int8/channel"),
    "depthwise_conv2d": _row("int8/channel", "int4/channel", "int8/channel", "int8/channel"),
    "transpose_conv": _row("int8/channel", "int4/channel", "int8/channel", "int8/channel"),
    "conv3d": _row("int8/channel", "int4/channel", "float32", "float32"),
    "gather": _row("int8/tensor", "int4/tensor", "int8/tensor", "int8/tensor"),
    "batch_matmul": _row("int8/channel", "int4/channel", "int8/tensor", "int8/tensor"),
    "lstm": _row("int8/channel", "int4/channel", "int8/tensor", "int8/tensor", tensors=4),
    "recurrent_loop": _row("int8/channel", "int4/channel", "int8/channel", "crash"),
    "conv_lstm": _row("int8/channel", "int4/channel", "int8/channel", "crash", tensors=4),
}


INT4_AS_FAST = ("fully_connected", "gather")
"""The kinds of kernels with which LiteRT is about as fast in 4 bits as in 8, if floats are made of
them when the file is loaded (`benchmarks/int4.py`)."""


def has_int4(kind: str | None) -> bool:
    """Whether a kernel of some kind can be stored in 4 bits; yes for those of no known kind."""
    return not kind or INTEGER_MODES[kind]["plan4"].dtype == "int4"


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
            [INTEGER_MODES][rl_sparsity_tf.layers.kernel_spec.INTEGER_MODES]; empty if not known.

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
        return kernel if kernel.shape == shape else tf.reshape(kernel, shape)

    def from_matrix(self, matrix: tf.Tensor, shape: Sequence[int]) -> tf.Tensor:
        """Undoes [to_matrix][] for a kernel of the given shape."""
        moved = tuple(shape[axis] for axis in self.axes)
        kernel = matrix if matrix.shape == moved else tf.reshape(matrix, moved)
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
