"""One layer of every class that can be compressed, for the table of the documentation."""

from collections.abc import Callable

import tf_keras as keras

from rl_sparsity_tf.layers.support import MODES, support_report

L = keras.layers
SEQUENCE, IMAGE, VOLUME = (12, 32), (12, 12, 32), (8, 8, 8, 8)

# What is fed, and the layer; large enough for the converter's dynamic range to take an interest.
LAYERS: dict[str, tuple[tuple[int, ...], Callable[[], keras.layers.Layer]]] = {
    "Dense": ((64,), lambda: L.Dense(64)),
    "EinsumDense": (SEQUENCE, lambda: L.EinsumDense("abc,cde->abde", (None, 8, 16))),
    "MultiHeadAttention": (SEQUENCE, lambda: L.MultiHeadAttention(2, 32)),
    "Embedding": ((12,), lambda: L.Embedding(100, 32)),
    "LSTM": (SEQUENCE, lambda: L.LSTM(64)),
    "LSTM(unroll=True)": (SEQUENCE, lambda: L.LSTM(64, unroll=True)),
    "GRU": (SEQUENCE, lambda: L.GRU(64)),
    "SimpleRNN": (SEQUENCE, lambda: L.SimpleRNN(64)),
    "ConvLSTM2D": ((4, 12, 12, 8), lambda: L.ConvLSTM2D(32, 3)),
    "Conv1D": (SEQUENCE, lambda: L.Conv1D(64, 3)),
    "Conv2D": (IMAGE, lambda: L.Conv2D(64, 3)),
    "Conv3D": (VOLUME, lambda: L.Conv3D(16, 3)),
    "DepthwiseConv1D": ((24, 128), lambda: L.DepthwiseConv1D(9)),
    "DepthwiseConv2D": ((12, 12, 128), lambda: L.DepthwiseConv2D(3)),
    "SeparableConv1D": ((24, 128), lambda: L.SeparableConv1D(64, 9)),
    "SeparableConv2D": ((12, 12, 128), lambda: L.SeparableConv2D(64, 3)),
    "Conv1DTranspose": (SEQUENCE, lambda: L.Conv1DTranspose(64, 3)),
    "Conv2DTranspose": (IMAGE, lambda: L.Conv2DTranspose(64, 3)),
    "Conv3DTranspose": (VOLUME, lambda: L.Conv3DTranspose(16, 3)),
    "LocallyConnected1D": (SEQUENCE, lambda: L.LocallyConnected1D(16, 3)),
    "LocallyConnected2D": ((8, 8, 8), lambda: L.LocallyConnected2D(16, 3)),
}
HEADER = ["layer", "kernel", "axes", "scale", *(f'`"{mode}"`' for mode in MODES)]


def layer_rows() -> list[list[str]]:
    """The rows of the table, as the package's own report has them."""
    rows = []
    for name, (shape, make) in LAYERS.items():
        inputs = keras.Input(shape)
        layer = make()
        attention = isinstance(layer, L.MultiHeadAttention)
        model = keras.Model(inputs, layer(inputs, inputs) if attention else layer(inputs))
        for kernel in support_report(model)[-1].kernels:
            attribute = kernel.path.partition("/")[2]
            stored = [kernel.stored[mode] for mode in MODES]
            rows.append([name, attribute, kernel.layout, kernel.scales, *stored])
    return rows
