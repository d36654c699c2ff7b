r"""Masks in context: which weights of a kernel live, decided anew given what the others lost.

A plan's masks are chosen in the dense network. In the network that was fitted to the plan some
units are read by nobody any more, and some have to carry what others did. There every weight is
ranked by

\[ w^2 \, \mathrm{E}[x^2]^\beta \, (\mathrm{E}[g^2] / \overline{\mathrm{E}[g^2]} + 0.05)^\alpha \]

with the input x that it is multiplied with and the gradient g of the loss at the output it adds to:
the diagonal of the layer's second-order error (LeCun et al. 1990, "Optimal brain damage"), the
moments in powers that say how far they are trusted. As many groups live as before in every kernel.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras as keras

from rl_sparsity_tf.allocation.ranking import survivors
from rl_sparsity_tf.environment.network import CompressedNetwork
from rl_sparsity_tf.layers.kernels import Kernel
from rl_sparsity_tf.layers.operations import Operation
from rl_sparsity_tf.layers.plan import CompressionPlan
from rl_sparsity_tf.layers.wrapper import unwrapped
from rl_sparsity_tf.training.mask_training import largest_alike

SCHEDULE = ((0.5, 0.0), (0.5, 0.0), (0.5, 0.5), (0.5, 1.0))
"""The powers (alpha, beta) of the rankings that are tried one after the other."""

# Of training data, that the gradients are taken over.
_ROWS = 256
# Added to what outputs weigh, 1 on average: one that has no gradient here may have one elsewhere.
_LEAST_WEIGHT = 0.05


def can_rerank(network: CompressedNetwork) -> bool:
    """Whether a network's masks can be ranked anew.

    They cannot where nothing is fitted in closed form, where whole channels are decided, or where
    the model's class has a training step of its own, whose loss is not known.
    """
    own_step = type(network.model).train_step is not keras.Model.train_step
    fitted = network.least_squares is not None and network.decisions.group != "channel"
    return fitted and not own_step


def reranked(network: CompressedNetwork, alpha: float, beta: float) -> CompressionPlan:
    """The plan that a network was evaluated with last, its kernels' masks ranked anew.

    Kernels that are not fitted stay as they are, and so do those with shuffled groups. The network
    is left as it was.
    """
    operations = {path: value.copy() for path, value in network.operations.items()}
    with network.recovered() as squares:
        energies = {k.path: squares.input_energy(k.path) for k in network.kernels}
        fitted = [kernel for kernel in network.kernels if energies[kernel.path] is not None]
        weights = _output_weights(network, fitted)
        for kernel in fitted:
            present, energy = operations[kernel.path], energies[kernel.path]
            if kernel.path not in weights or energy is None:
                continue
            live = present != Operation.PRUNE
            if (present == Operation.SHUFFLE).any() or live.all() or not live.any():
                continue
            inputs = np.power(energy / max(float(energy.mean()), 1e-30), beta)
            outputs = np.power(weights[kernel.path] + _LEAST_WEIGHT, alpha)
            salient = np.square(kernel.matrix(), dtype=np.float64) * inputs * outputs
            grouping = network.groupings[kernel.path]
            scores = grouping.sum_numpy(salient) / grouping.sizes
            chosen = largest_alike(scores, live, grouping)
            # What comes back is stored as most of the kernel is.
            usual = survivors(kernel, bool((present == Operation.QUANTIZE).any()))
            new = np.where(chosen, np.where(live, present, usual), Operation.PRUNE)
            operations[kernel.path] = new.astype(np.uint8)
    return network.storage.plan(network.kernels, list(operations.values()))


def _output_weights(network: CompressedNetwork, kernels: Sequence[Kernel]) -> dict[str, np.ndarray]:
    """What outputs weigh in the loss: the mean squares of their gradients, 1 on average.

    By kernel path, shape `(outputs,)`.
    """
    sums: dict[str, np.ndarray] = {}
    rows = 0
    for batch in network.train.pool:
        if rows >= _ROWS:
            break
        rows += len(tf.nest.flatten(batch[0])[0])
        with tf.GradientTape() as tape, _tapped(kernels, tape) as taps:
            loss = _loss(network.model, *batch)
        flat = [(path, tap) for path, found in taps.items() for tap in found]
        gradients = tape.gradient(loss, [tap for _, tap in flat])
        for (path, _), gradient in zip(flat, gradients, strict=True):
            if gradient is not None:
                axes = tuple(range(len(gradient.shape) - 1))
                found = np.square(np.asarray(gradient, np.float64)).mean(axes)
                sums[path] = sums.get(path, 0.0) + found
    finite = {path: one for path, one in sums.items() if np.isfinite(one).all() and one.any()}
    return {path: one / one.mean() for path, one in finite.items()}


def _loss(model: keras.Model, x: Any, y: Any, weights: Any = None) -> tf.Tensor:
    return model.compute_loss(x, y, model(x, training=False), weights)


@contextlib.contextmanager
def _tapped(
    kernels: Sequence[Kernel], tape: tf.GradientTape
) -> Iterator[dict[str, list[tf.Tensor]]]:
    """Adds zeros to what goes into activations, which the tape follows, by kernel path."""
    taps: dict[str, list[tf.Tensor]] = {}
    layers = {kernel.path: unwrapped(kernel.layer) for kernel in kernels}
    before = {
        path: layer.activation
        for path, layer in layers.items()
        if callable(getattr(layer, "activation", None))
    }

    def tapped(path: str, activation: Any, outputs: tf.Tensor) -> tf.Tensor:
        zeros = tf.zeros_like(outputs)
        tape.watch(zeros)
        taps.setdefault(path, []).append(zeros)
        return activation(outputs + zeros)

    try:
        for path, activation in before.items():
            layers[path].activation = functools.partial(tapped, path, activation)
        yield taps
    finally:
        for path, activation in before.items():
            layers[path].activation = activation


@dataclasses.dataclass
class Rounds:
    """Which rankings are tried in turn: one that was no better is not tried a second time.

    Example:
        >>> for powers in (rounds := Rounds()):
        ...     rounds.better = improves(reranked(network, *powers))
    """

    better: bool = True

    def __iter__(self) -> Iterator[tuple[float, float]]:
        failed: set[tuple[float, float]] = set()
        for powers in SCHEDULE:
            if powers in failed:
                continue
            self.better = False
            yield powers
            if not self.better:
                failed.add(powers)
