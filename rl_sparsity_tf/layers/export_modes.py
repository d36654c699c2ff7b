"""How a .tflite file stores a kernel in each export mode, as measured.

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
from collections.abc import Mapping


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
