"""Small networks of random shapes, trained in seconds: what policies are taught on."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np

import rl_sparsity_tf as rls
from rl_sparsity_tf.data.batches import evaluation_data, sample_rows, training_data
from rl_sparsity_tf.data.datasets import Data, load_dataset
from rl_sparsity_tf.environment.network import CompressedNetwork

import tf_keras as keras  # isort: skip  (after the package, which asks for Keras 2)

KINDS = ("mlp", "cnn", "residual", "separable")
DATA = ("digits", "fashion_mnist")
_ROWS = 6000
_EPOCHS = {"digits": 12, "fashion_mnist": 4}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drawn:
    """A network, its data, and what it is to be compressed to.

    Attributes:
        name: Kind, data and number of weights.
        model: The trained model.
        data: The data.
        target: The target.
        network: The network that takes decisions.
    """

    name: str
    model: keras.Model
    data: Data
    target: rls.Target
    network: CompressedNetwork


@functools.cache
def small_data(name: str) -> Data:
    """Digits, or 6,000 training images of another set at half their size."""
    if name == "digits":
        return load_dataset(name)
    data = load_dataset(name)
    rows = np.random.default_rng(0).permutation(len(data.x_train))[:_ROWS]
    return dataclasses.replace(
        data,
        name=f"{name}, small",
        x_train=_halved(data.x_train[rows]),
        y_train=data.y_train[rows],
        x_validation=_halved(data.x_validation),
        x_test=None,
        y_test=None,
        input_shape=(14, 14, 1),
    )


def _halved(images: np.ndarray) -> np.ndarray:
    rows, height, width, channels = images.shape
    pairs = images.reshape(rows, height // 2, 2, width // 2, 2, channels)
    return pairs.mean(axis=(2, 4)).astype(np.float32)


def draw_model(kind: str, shape: tuple[int, ...], classes: int, rng: Any) -> keras.Model:
    """An untrained network of random widths and depth.

    Args:
        kind: `"mlp"`, `"cnn"`, `"residual"` (with batch normalization) or `"separable"`
            (depthwise separable convolutions with batch normalization).
        shape: Shape of an image.
        classes: Number of classes.
        rng: Draws widths and depth.
    """
    layers = keras.layers
    inputs = x = keras.Input(shape)

    def width(low: int, high: int) -> int:
        return round(float(np.exp(rng.uniform(np.log(low), np.log(high)))))

    def normed(x: Any) -> Any:
        return layers.ReLU()(layers.BatchNormalization(momentum=0.9)(x))

    if kind == "mlp":
        x = layers.Flatten()(x)
        for _ in range(rng.integers(1, 4)):
            x = layers.Dense(width(16, 160), activation="relu")(x)
    elif kind == "cnn":
        for depth in range(rng.integers(1, 4)):
            x = layers.Conv2D(width(6, 32), 3, padding="same", activation="relu")(x)
            if depth < 2:
                x = layers.MaxPooling2D()(x)
        x = layers.Flatten()(x)
        if rng.random() < 0.7:
            x = layers.Dense(width(16, 96), activation="relu")(x)
    elif kind == "residual":
        channels = width(6, 20)
        x = normed(layers.Conv2D(channels, 3, 1 + int(shape[0] > 8), "same", use_bias=False)(x))
        for stride in rng.permutation([1, 2, 2])[: rng.integers(1, 4)]:
            channels = channels if stride == 1 else int(channels * rng.uniform(1, 2))
            y = normed(layers.Conv2D(channels, 3, int(stride), "same", use_bias=False)(x))
            y = layers.Conv2D(channels, 3, padding="same", use_bias=False)(y)
            y = layers.BatchNormalization(momentum=0.9)(y)
            if stride > 1 or x.shape[-1] != channels:
                x = layers.Conv2D(channels, 1, int(stride), "same")(x)
            x = layers.ReLU()(layers.Add()([x, y]))
        x = layers.GlobalAveragePooling2D()(x)
    else:
        x = normed(layers.Conv2D(width(8, 32), 3, 1 + int(shape[0] > 8), "same")(x))
        for _ in range(rng.integers(1, 4)):
            x = normed(layers.DepthwiseConv2D(3, padding="same", use_bias=False)(x))
            x = normed(layers.Conv2D(width(12, 48), 1, use_bias=False)(x))
        x = layers.GlobalAveragePooling2D()(x) if rng.random() < 0.6 else layers.Flatten()(x)
    outputs = layers.Dense(classes, activation="softmax")(x)
    return keras.Model(inputs, outputs)


def draw_target(rng: Any) -> rls.Target:
    """A sparsity from 0.5 to 0.97, densities falling geometrically."""
    return rls.Target(sparsity=1.0 - float(np.exp(rng.uniform(np.log(0.03), np.log(0.5)))))


def draw(
    seed: int, *, rows: int = 1000, target: Callable[[Any], rls.Target] = draw_target
) -> Drawn:
    """A trained network with a target, everything random following from a seed.

    Args:
        seed: The seed.
        rows: Validation rows.
        target: Draws the target.
    """
    rng = np.random.default_rng(seed)
    keras.backend.clear_session()
    keras.utils.set_random_seed(seed)
    name = DATA[int(rng.random() < 0.6)]
    data = small_data(name)
    kind = KINDS[rng.integers(len(KINDS))]
    model = draw_model(kind, data.input_shape, data.num_classes or 10, rng)
    model.compile(
        keras.optimizers.Adam(2e-3), "sparse_categorical_crossentropy", metrics=["accuracy"]
    )
    epochs = _EPOCHS[name] * (1 + (kind in ("residual", "separable")))
    model.fit(data.x_train, data.y_train, batch_size=64, epochs=epochs, verbose=0)
    drawn = target(rng)
    described = f"{kind} on {data.name}, {model.count_params()} weights"
    network = network_of(model, data, drawn, rows=rows, seed=seed)
    return Drawn(name=described, model=model, data=data, target=drawn, network=network)


def network_of(
    model: keras.Model, data: Data, target: rls.Target, *, rows: int = 2000, seed: int = 0
) -> CompressedNetwork:
    """The network that a search with this model, data and target would play on."""
    validation = evaluation_data((data.x_validation, data.y_validation), model, "validation_data")
    return CompressedNetwork(
        model,
        training_data((data.x_train, data.y_train), model, batch_size=128, seed=seed),
        sample_rows(validation, rows, seed=seed),
        target=target,
        seed=seed,
    )


def tiny_network() -> CompressedNetwork:
    """A network that is not trained: for the specs of its environments, which are all alike."""
    data = small_data("digits")
    model = keras.Sequential([keras.layers.Flatten(input_shape=(8, 8, 1)), keras.layers.Dense(10)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss, metrics=["accuracy"])
    return network_of(model, data, rls.Target(sparsity=0.5), rows=50)
