"""The networks that the benchmarks train and compress."""

from __future__ import annotations

import math
from typing import Any

import rl_sparsity_tf  # noqa: F401  (asks for Keras 2 before it is imported)
from rl_sparsity_tf.data.datasets import Data

import tf_keras as keras  # isort: skip

NETWORKS = ("lenet-300-100", "lenet-5", "resnet-8", "ds-cnn")


def build(name: str, data: Data, width: float = 1.0) -> keras.Model:
    """An untrained network for images.

    Args:
        name: `"lenet-300-100"` or `"lenet-5"` (LeCun et al. 1998, with ReLU and maximum pooling),
            `"resnet-8"` (three residual blocks of 16, 32 and 64 channels) or `"ds-cnn"` (a
            convolution and four depthwise separable ones of 64 channels), both as in the MLPerf
            Tiny benchmark but for the images.
        data: Gives the shapes.
        width: Factor on the channels of every convolution but those of `"lenet-5"`.
    """
    layers = keras.layers
    # The same names every time: tables of latency go by them.
    keras.backend.reset_uids()

    def wide(channels: int) -> int:
        return max(1, round(width * channels))

    inputs = keras.Input(data.input_shape)
    if name == "lenet-300-100":
        x = layers.Flatten()(inputs)
        x = layers.Dense(300, activation="relu", name="dense_300")(x)
        x = layers.Dense(100, activation="relu", name="dense_100")(x)
    elif name == "lenet-5":
        x = layers.Conv2D(6, 5, padding="same", activation="relu", name="conv_6")(inputs)
        x = layers.MaxPooling2D()(x)
        x = layers.Conv2D(16, 5, activation="relu", name="conv_16")(x)
        x = layers.Flatten()(layers.MaxPooling2D()(x))
        x = layers.Dense(120, activation="relu", name="dense_120")(x)
        x = layers.Dense(84, activation="relu", name="dense_84")(x)
    elif name == "ds-cnn":
        x = _convolution(inputs, wide(64), 2)
        for _ in range(4):
            x = layers.DepthwiseConv2D(3, padding="same", use_bias=False)(x)
            x = layers.ReLU()(layers.BatchNormalization(momentum=0.9)(x))
            x = _convolution(x, wide(64), 1, size=1)
        x = layers.GlobalAveragePooling2D()(x)
    else:
        x = _convolution(inputs, wide(16), 1)
        for full, stride in ((16, 1), (32, 2), (64, 2)):
            channels = wide(full)
            y = _convolution(x, channels, stride)
            y = layers.Conv2D(channels, 3, padding="same", use_bias=False)(y)
            y = layers.BatchNormalization(momentum=0.9)(y)
            if stride > 1:
                x = layers.Conv2D(channels, 1, stride, padding="same")(x)
            x = layers.ReLU()(layers.Add()([x, y]))
        x = layers.GlobalAveragePooling2D()(x)
    outputs = layers.Dense(data.num_classes, activation="softmax", name="classes")(x)
    return keras.Model(inputs, outputs, name=name.replace("-", "_"))


def _convolution(x: Any, channels: int, stride: int, size: int = 3) -> Any:
    layers = keras.layers
    x = layers.Conv2D(channels, size, stride, padding="same", use_bias=False)(x)
    # The moving statistics of short trainings must not lag behind.
    return layers.ReLU()(layers.BatchNormalization(momentum=0.9)(x))


def train(
    name: str, data: Data, *, seed: int, epochs: int, batch_size: int = 128, width: float = 1.0
) -> keras.Model:
    """A network trained with Adam and a rate that falls to 0."""
    keras.utils.set_random_seed(seed)
    model = build(name, data, width)
    steps = epochs * math.ceil(len(data.x_train) / batch_size)
    schedule = keras.optimizers.schedules.CosineDecay(2e-3, steps)
    model.compile(
        keras.optimizers.Adam(schedule), "sparse_categorical_crossentropy", metrics=["accuracy"]
    )
    model.fit(data.x_train, data.y_train, batch_size=batch_size, epochs=epochs, verbose=0)
    return model
