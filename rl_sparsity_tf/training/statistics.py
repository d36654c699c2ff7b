"""Activation and gradient statistics of all layers, in one pass over a stream of batches."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterable

import numpy as np
import tensorflow as tf
import tf_keras as keras

from rl_sparsity_tf.data.checks import Batch
from rl_sparsity_tf.layers.groups import Grouping
from rl_sparsity_tf.layers.kernels import Kernel
from rl_sparsity_tf.layers.wrapping import wrapped_kernels, wrappers_of


@dataclasses.dataclass(frozen=True)
class WeightMoments:
    """Variance and largest magnitude of a kernel's original weights."""

    variance: float
    largest: float

    @classmethod
    def of(cls, matrix: np.ndarray) -> WeightMoments:
        """Measures a kernel's matrix."""
        return cls(float(matrix.var()), float(np.abs(matrix).max()))


@dataclasses.dataclass(frozen=True)
class KernelStatistics:
    """What one pass over data says about a kernel and its layer, whose outputs are the activations.

    Attributes:
        activation_sparsity: Share of outputs that are exactly zero.
        gradient: Mean gradient of the loss by the kernel, viewed as `(inputs, outputs)`.
    """

    activation_mean: float
    activation_variance: float
    activation_sparsity: float
    gradient: np.ndarray

    @functools.cached_property
    def gradient_mean(self) -> float:
        """Mean of the gradient's entries."""
        return float(self.gradient.mean())

    @functools.cached_property
    def gradient_variance(self) -> float:
        """Variance of the gradient's entries."""
        return float(self.gradient.var())

    def first_order(self, weights: np.ndarray, grouping: Grouping) -> tuple[np.ndarray, np.ndarray]:
        """What the loss would change by, to first order, if groups went.

        The weights are viewed as `(inputs, outputs)`. Per group, flat, it gives the sum of
        |gradient * weight|, and the gradient by the group's mask, which is the sum of gradient *
        weight.
        """
        products = self.gradient * weights
        magnitudes = grouping.sum_numpy(np.abs(products)).reshape(-1)
        return magnitudes, grouping.sum_numpy(products).reshape(-1)


class StatisticsCollector:
    """Measures every wrapped layer of a compiled model in the same pass.

    Layers called several times count every call.
    """

    def __init__(self, model: keras.Model):
        self._model = model
        self._kernels = wrapped_kernels(model)
        self._wrappers = wrappers_of(model)
        self.function = tf.function(self._step)

    def _step(self, x: object, y: object, weights: object) -> tuple[tf.Tensor, list[tf.Tensor]]:
        variables = [kernel.variable for kernel in self._kernels]
        with contextlib.ExitStack() as stack:
            probes = [stack.enter_context(wrapper.probed()) for wrapper in self._wrappers]
            tape = stack.enter_context(tf.GradientTape(watch_accessed_variables=False))
            for variable in variables:
                tape.watch(variable)
            outputs = self._model(x, training=False)
            loss = self._model.compute_loss(x, y, outputs, weights)
        gradients = tape.gradient(loss, variables, unconnected_gradients="zero")
        moments = []
        for probe in probes:
            parts = [tf.reshape(tf.cast(part, tf.float32), [-1]) for part in probe]
            # A layer that the model holds but does not call says nothing.
            flat = tf.concat(parts, 0) if parts else tf.zeros(1)
            moments.append(
                tf.stack(
                    [
                        tf.reduce_mean(flat),
                        tf.reduce_mean(tf.square(flat)),
                        tf.reduce_mean(tf.cast(tf.equal(flat, 0.0), tf.float32)),
                    ]
                )
            )
        return tf.stack(moments), [tf.cast(tf.convert_to_tensor(g), tf.float32) for g in gradients]

    def __call__(self, batches: Iterable[Batch]) -> dict[str, KernelStatistics]:
        """Statistics by kernel path over some training batches, which must be equally shaped."""
        count = 0
        moments: np.ndarray = np.zeros(())
        gradients: list[np.ndarray] = []
        for batch in batches:
            one, parts = self.function(*batch)
            arrays = [part.numpy() for part in parts]
            moments = moments + one.numpy().astype(np.float64)
            gradients = [a + b for a, b in zip(gradients, arrays, strict=True)] if count else arrays
            count += 1
        row = {id(wrapper): index for index, wrapper in enumerate(self._wrappers)}
        result = {}
        for kernel, gradient in zip(self._kernels, gradients, strict=True):
            mean, square, zeros = (float(m) / count for m in moments[row[id(kernel.wrapper)]])
            result[kernel.path] = KernelStatistics(
                activation_mean=float(mean),
                activation_variance=max(0.0, square - mean**2) if square < np.inf else np.inf,
                activation_sparsity=float(zeros),
                gradient=_as_matrix(kernel, gradient / count),
            )
        return result


def _as_matrix(kernel: Kernel, gradient: np.ndarray) -> np.ndarray:
    return np.nan_to_num(kernel.spec.to_matrix_numpy(gradient), posinf=0.0, neginf=0.0)
