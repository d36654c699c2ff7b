"""An autoencoder of weights: how far have a kernel's weights left what the network learned?"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras as keras

CHUNK = 32
_BATCH = 128
_WIDTHS = (CHUNK, 48, 12, 48, CHUNK)


@functools.lru_cache(maxsize=1)
def _network(strategy: tf.distribute.Strategy) -> tuple[keras.Model, list[np.ndarray], Any]:
    """The network that all autoencoders are trained in, one after the other, Adam's start, a step.

    Its training is traced once in a process: that takes longer than a training does. The step takes
    chunks as they are given and as they are wanted, both of shape `(rows, 32)`.
    """
    with strategy.scope():
        layers = [
            keras.layers.Dense(units, activation, dtype="float32", name=f"layer_{number}")
            for number, (units, activation) in enumerate(
                zip(_WIDTHS[1:], ("tanh", None, "tanh", None), strict=True)
            )
        ]
        given = keras.layers.Input((CHUNK,), name="chunks")
        model = keras.Sequential([given, *layers], name="autoencoder")
        model.compile(keras.optimizers.Adam(3e-3), "mse")
        model.optimizer.build(model.trainable_variables)

    def step(given: tf.Tensor, wanted: tf.Tensor) -> None:
        strategy.run(model.train_step, args=((given, wanted),))

    rows = tf.TensorSpec((None, CHUNK), tf.float32)
    started = [variable.numpy() for variable in model.optimizer.variables]
    return model, started, tf.function(step, input_signature=[rows, rows])


def _deviation(matrix: np.ndarray) -> float:
    # The squares of tiny weights are zero in single precision.
    return float(matrix.std()) or float(matrix.std(dtype=np.float64))


class WeightAutoencoder:
    """A denoising autoencoder trained on the chunks of the original kernels.

    Every kernel, viewed as `(inputs, outputs)`, is scaled by its own standard deviation and cut
    into chunks of 32 weights along the inputs. The network learns to give the original chunk back
    from one in which some weights are missing (Vincent et al. 2008, "Extracting and composing
    robust features with denoising autoencoders"). The error of a kernel is then measured between
    the reconstruction from its present weights and its original weights. At most `max_chunks`
    chunks of all kernels are trained on, and `measured_chunks` of each are measured.

    Example:
        >>> autoencoder = WeightAutoencoder({"dense/kernel": weights})
        >>> autoencoder.error("dense/kernel", pruned_weights)  # in [0, 1)
    """

    def __init__(
        self,
        kernels: Mapping[str, np.ndarray],
        *,
        seed: int = 0,
        epochs: int = 12,
        max_chunks: int = 4096,
        measured_chunks: int = 512,
    ):
        rng = np.random.default_rng(seed)
        self._scales = {path: _deviation(matrix) or 1.0 for path, matrix in kernels.items()}
        self._drawn: dict[str, Any] = {}
        self._originals = {path: self._chunks(path, kernels[path]) for path in kernels}
        chunks = np.concatenate(list(self._originals.values()))
        if len(chunks) > max_chunks:
            chunks = chunks[rng.choice(len(chunks), max_chunks, replace=False)]
        self._layers = self._train(chunks, rng, epochs)
        for path, all_chunks in self._originals.items():
            drawn: Any = slice(None)
            if len(all_chunks) > measured_chunks:
                drawn = np.sort(rng.choice(len(all_chunks), measured_chunks, replace=False))
            self._drawn[path] = drawn
            self._originals[path] = all_chunks[drawn]
        self._floors = {
            path: self._distance(chunks, chunks) for path, chunks in self._originals.items()
        }

    def _chunks(self, path: str, matrix: np.ndarray) -> np.ndarray:
        flat = (matrix.T / self._scales[path]).reshape(-1).astype(np.float32)
        return np.pad(flat, (0, -flat.size % CHUNK)).reshape(-1, CHUNK)

    def _train(self, chunks: np.ndarray, rng: np.random.Generator, epochs: int) -> list[np.ndarray]:
        model, untrained, step = _network(tf.distribute.get_strategy())
        weights = []
        for inputs, units in itertools.pairwise(_WIDTHS):
            initializer = keras.initializers.GlorotUniform(seed=int(rng.integers(2**31)))
            weights += [initializer((inputs, units)).numpy(), np.zeros(units, np.float32)]
        model.set_weights(weights)
        for variable, value in zip(model.optimizer.variables, untrained, strict=True):
            variable.assign(value)
        repeated = np.tile(chunks, (-(-1024 // len(chunks)), 1))
        for _ in range(epochs):
            order = rng.permutation(len(repeated))
            kept = rng.random(repeated.shape) > 0.1
            given, wanted = (repeated * kept)[order], repeated[order]
            # Keras's fit prepares a pipeline and callbacks for an epoch of a few milliseconds.
            for start in range(0, len(order), _BATCH):
                step(given[start : start + _BATCH], wanted[start : start + _BATCH])
        return model.get_weights()

    def reconstruct(self, chunks: np.ndarray) -> np.ndarray:
        """Passes chunks of shape `(n, 32)` through the network (in NumPy: it is tiny)."""
        w1, b1, w2, b2, w3, b3, w4, b4 = self._layers
        code = np.tanh(chunks @ w1 + b1) @ w2 + b2
        return np.tanh(code @ w3 + b3) @ w4 + b4

    def _distance(self, present: np.ndarray, original: np.ndarray) -> float:
        difference = self.reconstruct(present) - original
        return float(np.mean(np.square(difference, dtype=np.float64)))

    def error(self, path: str, matrix: np.ndarray) -> float:
        """How much worse a kernel is reconstructed than it was originally.

        The weights have the shape `(inputs, outputs)`. The error is `d / (1 + d)` in [0, 1), where
        d is the mean square error in units of the original kernel's variance, beyond that of the
        original weights. It is 0 for the original weights, and 1 where the weights are too large
        for that or not finite.
        """
        with np.errstate(over="ignore", invalid="ignore"):
            present = self._chunks(path, np.asarray(matrix))[self._drawn[path]]
            distance = self._distance(present, self._originals[path])
        if not (np.isfinite(present).all() and np.isfinite(distance)):
            return 1.0
        excess = max(0.0, distance - self._floors[path])
        return excess / (1.0 + excess)
