"""A quick search over channels of a tiny network."""

import functools

import numpy as np
import tf_keras as keras
from tiny_search import DQN, quick_search

import rl_sparsity_tf as rls
from rl_sparsity_tf.channels.latency_table import LatencyTable, LayerLatency
from rl_sparsity_tf.channels.widths import LayerWidths

layers = keras.layers


def images(count, seed):
    """Bars that lie or stand: two classes, and a third of dots."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 3, count)
    x = rng.normal(0, 0.4, (count, 8, 8, 1)).astype(np.float32)
    places = rng.integers(0, 8, count)
    for row, (label, place) in enumerate(zip(y, places, strict=True)):
        if label == 0:
            x[row, place, :, 0] += 2
        elif label == 1:
            x[row, :, place, 0] += 2
        else:
            x[row, ::3, ::3, 0] += 2
    return x, y


TRAIN, VALIDATION, TEST = images(192, 0), images(96, 1), images(96, 2)


def untrained():
    inputs = layers.Input((8, 8, 1))
    x = layers.Conv2D(8, 3, padding="same", use_bias=False, name="stem")(inputs)
    x = shortcut = layers.ReLU()(layers.BatchNormalization(momentum=0.8, name="norm")(x))
    x = layers.Conv2D(6, 3, padding="same", activation="relu", name="inner")(x)
    x = layers.Conv2D(8, 3, padding="same", name="outer")(x)
    x = layers.ReLU()(layers.Add(name="sum")([x, shortcut]))
    x = layers.DepthwiseConv2D(3, strides=2, name="depthwise")(x)
    x = layers.Flatten(name="flat")(x)
    x = layers.Dense(8, activation="relu", name="hidden")(x)
    outputs = layers.Dense(3, activation="softmax", name="classes")(x)
    model = keras.Model(inputs, outputs, name="bars")
    model.compile(
        keras.optimizers.Adam(5e-3), "sparse_categorical_crossentropy", metrics=["accuracy"]
    )
    return model


@functools.cache
def _weights():
    keras.utils.set_random_seed(5)
    model = untrained()
    model.fit(*images(512, 3), epochs=6, batch_size=32, verbose=0)
    return model.get_weights()


def trained():
    model = untrained()
    model.set_weights(_weights())
    return model


def compressor(target, **arguments):
    return rls.Compressor(trained(), target, **{"agent": DQN, "group": "channel", **arguments})


def searched(one, **arguments):
    with quick_search():
        return one.search(
            TRAIN,
            validation_data=VALIDATION,
            test_data=TEST,
            **{"episodes": 3, "finetune_epochs": 2, "batch_size": 32, "finalists": 1, "verbose": 0}
            | arguments,
        )


def table_for(model, quantization="plan"):
    """A table in which a layer takes as long as its channels in times those out."""
    layers_of = {}
    for chain in LayerWidths(model).chains:
        path, width = chain.path, chain.width
        inputs, outputs = np.array([1, width.inputs]), np.array([1, width.outputs])
        inputs, outputs = np.unique(inputs), np.unique(outputs)
        ms = inputs[:, None] * outputs[None] * 1e-3
        layers_of[path] = LayerLatency(kind=chain.kind, inputs=inputs, outputs=outputs, ms=ms)
    return LatencyTable(
        device="made by hand", quantization=quantization, threads=1, xnnpack=True, layers=layers_of
    )
