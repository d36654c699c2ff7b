"""Small networks of the kinds people have, for the tests. All are built and compiled."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import tf_keras as keras

layers = keras.layers


def _compiled(model: keras.Model, seed: int = 0) -> keras.Model:
    """Compiles, and gives every weight (biases and batch-norm statistics too) a random value."""
    rng = np.random.default_rng(seed)
    for layer in model.submodules:
        if isinstance(layer, layers.Layer) and layer.weights and not isinstance(layer, keras.Model):
            values = []
            for value in layer.get_weights():
                noise = rng.normal(0, 0.3, value.shape).astype(np.float32)
                values.append(np.abs(noise) + 0.5 if value.ndim == 1 else noise)
            layer.set_weights(values)
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def dense() -> keras.Model:
    return _compiled(
        keras.Sequential(
            [
                layers.Input((13,)),
                layers.Dense(17, activation="relu"),
                layers.Dropout(0.2),
                layers.Dense(5, activation="softmax"),
            ]
        )
    )


def residual() -> keras.Model:
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(6, 3, padding="same", use_bias=False)(inputs)
    x = layers.BatchNormalization()(x)
    x = layers.ReLU()(x)
    y = layers.Conv2D(6, 3, padding="same", use_bias=False)(x)
    y = layers.BatchNormalization()(y)
    x = layers.Add()([x, y])
    x = layers.Concatenate()([x, layers.Conv2D(5, 1)(x)])
    x = layers.GlobalAveragePooling2D()(x)
    return _compiled(keras.Model(inputs, layers.Dense(4, activation="softmax")(x)))


def separable() -> keras.Model:
    return _compiled(
        keras.Sequential(
            [
                layers.Input((8, 8, 2)),
                layers.DepthwiseConv2D(3, depth_multiplier=3, activation="relu"),
                layers.SeparableConv2D(7, 3, padding="same", activation="relu"),
                layers.MaxPooling2D(),
                layers.Flatten(),
                layers.Dense(4, activation="softmax"),
            ]
        )
    )


def conv1d() -> keras.Model:
    return _compiled(
        keras.Sequential(
            [
                layers.Input((20, 3)),
                layers.Conv1D(9, 5, activation="relu"),
                layers.SeparableConv1D(6, 3, activation="relu"),
                layers.GlobalMaxPooling1D(),
                layers.Dense(4, activation="softmax"),
            ]
        )
    )


def conv3d() -> keras.Model:
    return _compiled(
        keras.Sequential(
            [
                layers.Input((6, 6, 6, 1)),
                layers.Conv3D(5, 3, activation="relu"),
                layers.Flatten(),
                layers.Dense(4, activation="softmax"),
            ]
        )
    )


def transposed() -> keras.Model:
    return _compiled(
        keras.Sequential(
            [
                layers.Input((4, 4, 3)),
                layers.Conv2DTranspose(5, 3, strides=2, padding="same", activation="relu"),
                layers.GlobalAveragePooling2D(),
                layers.Dense(4, activation="softmax"),
            ]
        )
    )


def nested() -> keras.Model:
    block = keras.Sequential(
        [layers.Input((12,)), layers.Dense(12, activation="relu", name="shared_name")], name="block"
    )
    inputs = keras.Input((12,))
    x = layers.Dense(12, activation="relu", name="shared_name")(inputs)
    shared = layers.Dense(12, name="twice")
    x = layers.Add()([shared(block(x)), shared(x)])
    return _compiled(keras.Model(inputs, layers.Dense(4, activation="softmax")(x)))


ZOO: dict[str, Callable[[], keras.Model]] = {
    "dense": dense,
    "residual": residual,
    "separable": separable,
    "conv1d": conv1d,
    "conv3d": conv3d,
    "transposed": transposed,
    "nested": nested,
}


def inputs_for(model: keras.Model, rows: int, seed: int = 0) -> np.ndarray:
    shape = (rows, *model.input_shape[1:])
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)
