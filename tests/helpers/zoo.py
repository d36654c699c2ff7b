"""Small networks of the kinds people have, for the tests. All are built and compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras as keras

from rl_sparsity_tf.layers.structure import input_specs, pack_inputs

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


@keras.saving.register_keras_serializable("tests")
class Block(layers.Layer):
    """A transformer block: attention and a small network, each with a shortcut and a norm."""

    def __init__(self, units: int, heads: int, **kwargs: Any):
        super().__init__(**kwargs)
        self.units, self.heads = units, heads
        self.attention = layers.MultiHeadAttention(heads, units)
        self.network = keras.Sequential([layers.Dense(9, activation="relu"), layers.Dense(units)])
        self.norms = [layers.LayerNormalization(), layers.LayerNormalization()]
        self.dropout = layers.Dropout(0.1)

    def call(self, x: tf.Tensor, training: bool = False) -> tf.Tensor:
        x = self.norms[0](x + self.dropout(self.attention(x, x), training=training))
        return self.norms[1](x + self.network(x))

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "units": self.units, "heads": self.heads}


def _ending(*stack: layers.Layer) -> keras.Model:
    """A stack that ends in three classes; the first entry is the Input."""
    model = keras.Sequential([*stack, layers.Dense(3, activation="softmax", name="last")])
    return _compiled(model)


def words() -> keras.Model:
    return _ending(
        layers.Input((7,), dtype="int32"),
        layers.Embedding(20, 8, mask_zero=True),
        layers.LSTM(6, return_sequences=True),
        layers.GRU(5),
    )


def simple_rnn() -> keras.Model:
    return _ending(layers.Input((7, 4)), layers.SimpleRNN(5))


def stacked_cells() -> keras.Model:
    return _ending(
        layers.Input((7, 4)),
        layers.RNN([layers.LSTMCell(5), layers.GRUCell(4, reset_after=False)]),
    )


def bidirectional() -> keras.Model:
    return _ending(
        layers.Input((7, 4)),
        layers.Bidirectional(layers.LSTM(5, return_sequences=True)),
        layers.Bidirectional(layers.GRU(3), merge_mode="sum"),
    )


def time_distributed() -> keras.Model:
    step = keras.Sequential([layers.Dense(6), layers.Dense(2)])
    return _ending(
        layers.Input((7, 4)),
        layers.TimeDistributed(layers.Dense(5)),
        layers.TimeDistributed(step),
        layers.Flatten(),
    )


def einsum() -> keras.Model:
    return _ending(
        layers.Input((7, 4)),
        layers.EinsumDense("abc,cd->abd", output_shape=(None, 6)),
        layers.EinsumDense("abc,cde->abde", output_shape=(None, 3, 5), bias_axes="de"),
        layers.Flatten(),
    )


def attention() -> keras.Model:
    inputs = keras.Input((7, 8))
    x = layers.MultiHeadAttention(2, 4)(inputs, inputs)
    y = layers.MultiHeadAttention(3, 4, value_dim=5, output_shape=(8,))(x, value=inputs)
    x = layers.GlobalAveragePooling1D()(layers.Add()([x, y]))
    return _compiled(keras.Model(inputs, layers.Dense(3, activation="softmax", name="last")(x)))


def transformer() -> keras.Model:
    return _ending(
        layers.Input((7,), dtype="int32"),
        layers.Embedding(20, 8),
        Block(8, 2, name="block"),
        layers.GlobalAveragePooling1D(),
    )


def two_inputs() -> keras.Model:
    """An encoder whose final state a decoder starts from."""
    source, target = keras.Input((6, 4), name="source"), keras.Input((5, 4), name="target")
    _, *state = layers.LSTM(6, return_state=True)(source)
    x = layers.LSTM(6)(target, initial_state=state)
    outputs = layers.Dense(3, activation="softmax", name="last")(x)
    return _compiled(keras.Model([source, target], outputs))


def conv_lstm() -> keras.Model:
    return _ending(layers.Input((4, 6, 6, 2)), layers.ConvLSTM2D(3, 3), layers.Flatten())


def local() -> keras.Model:
    return _ending(
        layers.Input((9, 2)),
        layers.LocallyConnected1D(3, 3),
        layers.LocallyConnected1D(2, 3, implementation=2),
        layers.Flatten(),
    )


def local_2d() -> keras.Model:
    return _ending(
        layers.Input((6, 6, 2)),
        layers.LocallyConnected2D(3, 3),
        layers.LocallyConnected2D(2, 3, implementation=2),
        layers.Flatten(),
    )


def volumes() -> keras.Model:
    return _ending(
        layers.Input((3, 3, 3, 2)),
        layers.Conv3DTranspose(4, 3, activation="relu"),
        layers.Flatten(),
    )


def signals() -> keras.Model:
    return _ending(
        layers.Input((9, 3)),
        layers.Conv1DTranspose(4, 3, activation="relu"),
        layers.DepthwiseConv1D(3, depth_multiplier=2),
        layers.Flatten(),
    )


RECURRENT_ETC: dict[str, Callable[[], keras.Model]] = {
    "words": words,
    "simple_rnn": simple_rnn,
    "stacked_cells": stacked_cells,
    "bidirectional": bidirectional,
    "time_distributed": time_distributed,
    "einsum": einsum,
    "attention": attention,
    "transformer": transformer,
    "two_inputs": two_inputs,
    "conv_lstm": conv_lstm,
    "local": local,
    "local_2d": local_2d,
    "volumes": volumes,
    "signals": signals,
}
"""Layers within layers and the rest; kept apart, since every test over them takes its time."""

ZOO: dict[str, Callable[[], keras.Model]] = {
    "dense": dense,
    "residual": residual,
    "separable": separable,
    "conv1d": conv1d,
    "conv3d": conv3d,
    "transposed": transposed,
    "nested": nested,
}


def inputs_for(model: keras.Model, rows: int, seed: int = 0) -> Any:
    """Random inputs, packed as the model takes them; integers are below 20, zeros among them."""
    rng = np.random.default_rng(seed)
    arrays = []
    for spec in input_specs(model):
        shape = (rows, *spec.shape)
        whole = spec.dtype.startswith("int")
        array = rng.integers(0, 20, shape) if whole else rng.normal(size=shape)
        arrays.append(array.astype(spec.dtype))
    return pack_inputs(model, arrays)
