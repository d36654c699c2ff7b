r"""Masks in context: which weights of a kernel live, decided anew given what the others lost.

A plan's masks are chosen in the dense network. In the network that was fitted to the plan some
units are read by nobody any more, and some have to carry what others did. There every weight is
ranked by

\[ w^2 \, \mathrm{E}[x^2]^\beta \, (\mathrm{E}[g^2] / \overline{\mathrm{E}[g^2]} + 0.05)^\alpha \]

with the input x that it is multiplied with and the gradient g of the loss at the output it adds to:
the diagonal of the layer's second-order error (LeCun et al. 1990, "Optimal brain damage"), the
moments in powers that say how far they are trusted. As many groups live as before in every kernel.

The errors of single layers, by which plans are made, do not see what other layers lose: half of a
plan's weights may lead to units that nothing reads, or come from units that are always 0. Releasing
them lets all kernels have more instead, in proportion.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras as keras

from rl_sparsity_tf.allocation.density_plans import PlanSpace, shares
from rl_sparsity_tf.allocation.ranking import saliency_of, survivors
from rl_sparsity_tf.environment.network import CompressedNetwork
from rl_sparsity_tf.layers.groups import Grouping
from rl_sparsity_tf.layers.kernels import Kernel
from rl_sparsity_tf.layers.operations import Operation
from rl_sparsity_tf.layers.plan import CompressionPlan
from rl_sparsity_tf.layers.wrapper import unwrapped
from rl_sparsity_tf.training.mask_training import largest_alike

RELEASE = None
"""In place of a ranking's powers: what has no effect is released."""

SCHEDULE = (RELEASE, RELEASE, (0.5, 0.0), (0.5, 0.0), (0.5, 0.5), (0.5, 1.0))
"""What is tried one after the other: rankings by their powers (alpha, beta), and releasing."""

# Of training data, that the gradients are taken over.
_ROWS = 256
# What outputs weigh at most, 1 on average, that nothing reads; and the energy of silent inputs.
_UNREAD, _SILENT = 1e-9, 1e-12
# The powers that what is released is ranked by, and what it is worth against the others.
_RELEASED_BY, _WORTHLESS = (0.5, 0.5), 1e-6
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


class Context:
    """What the weights of a network matter in the plan that it was evaluated with last.

    It is of the moment it is made in; the network is left as it was.

    Attributes:
        operations: The plan's operations, by kernel path.
    """

    def __init__(self, network: CompressedNetwork):
        self._network = network
        self.operations = {path: value.copy() for path, value in network.operations.items()}
        with network.recovered() as squares:
            found = {k.path: squares.input_energy(k.path) for k in network.kernels}
            energies = {path: energy for path, energy in found.items() if energy is not None}
            fitted = [kernel for kernel in network.kernels if kernel.path in energies]
            weights = _output_weights(network, fitted)
            self._outputs = {k.path: weights[k.path] for k in fitted if k.path in weights}
            self._inputs = {path: energies[path] for path in self._outputs}
            self._kernels = {k.path: k for k in fitted if k.path in self._outputs}
            self._weights = {path: np.array(k.matrix()) for path, k in self._kernels.items()}

    @property
    def paths(self) -> list[str]:
        """Of the kernels that can be ranked: fitted, and without shuffled groups."""
        return [p for p in self._outputs if not (self.operations[p] == Operation.SHUFFLE).any()]

    def unread(self, path: str) -> float:
        """The share of a kernel's outputs that the loss does not depend on any more."""
        return float((self._outputs[path] <= _UNREAD).mean())

    def scores(self, path: str, alpha: float, beta: float) -> np.ndarray:
        """What a kernel's groups matter per weight, with the shape of its groups."""
        energy = self._inputs[path]
        inputs = np.power(energy / max(float(energy.mean()), 1e-30), beta)
        outputs = np.power(self._outputs[path] + _LEAST_WEIGHT, alpha)
        grouping = self._network.groupings[path]
        squares = np.square(self._weights[path], dtype=np.float64)
        return grouping.sum_numpy(squares * inputs * outputs) / grouping.sizes

    def ranked(self, path: str, alpha: float, beta: float) -> np.ndarray:
        """A kernel's operations when as many groups live as before, those that matter most."""
        grouping = self._network.groupings[path]
        scores = self.scores(path, alpha, beta)
        return _by_scores(self._kernels[path], self.operations[path], grouping, scores)

    def read(self, path: str) -> np.ndarray:
        """Which groups of a kernel lead to outputs that the loss depends on."""
        return self._reaching(path, self._outputs[path] > _UNREAD)

    def effective(self, path: str) -> np.ndarray:
        """Which of them get something, too: inputs that are not silent."""
        energy = self._inputs[path]
        heard = energy > _SILENT * max(float(energy.mean()), 1e-30)
        return self._reaching(path, heard & (self._outputs[path] > _UNREAD))

    def _reaching(self, path: str, weights: np.ndarray) -> np.ndarray:
        grouping = self._network.groupings[path]
        all_of_them = np.broadcast_to(weights, self._weights[path].shape).astype(np.float64)
        found: np.ndarray = grouping.sum_numpy(all_of_them) > 0
        return found.reshape(grouping.shape)

    def released(self) -> CompressionPlan | None:
        """The plan in which living groups without an effect make room for others in all kernels.

        The kernels' densities keep the proportions of what is read: a kernel that hears nothing
        yet may hear something then. None if all groups have an effect, or shuffled ones stand in
        the way.
        """
        network, paths = self._network, set(self.paths)
        before = [self.operations[kernel.path] for kernel in network.kernels]
        live = [operations != Operation.PRUNE for operations in before]
        read, useful, scores = list(live), list(live), {}
        for number, (kernel, alive) in enumerate(zip(network.kernels, live, strict=True)):
            if kernel.path in paths:
                effective = self.effective(kernel.path)
                read[number] = _some(alive & self.read(kernel.path), alive)
                useful[number] = _some(alive & effective, read[number])
                worth = self.scores(kernel.path, *_RELEASED_BY).reshape(alive.shape)
                scores[kernel.path] = worth * np.where(effective, 1.0, _WORTHLESS)
        shuffled = any((operations == Operation.SHUFFLE).any() for operations in before)
        if shuffled or all((a == b).all() for a, b in zip(live, useful, strict=True)):
            return None
        quantized = any((operations == Operation.QUANTIZE).any() for operations in before)
        space = PlanSpace(network, quantized)
        space.prefer(useful, scores)
        space.look_near(live)
        return space.plan_of(space.live(space.scores(shares(read))))

    def plan(
        self, alpha: float, beta: float, paths: Sequence[str] | None = None
    ) -> CompressionPlan:
        """The plan with the kernels of some paths, by default all, ranked anew."""
        chosen = self.paths if paths is None else [path for path in self.paths if path in paths]
        operations = dict(self.operations)
        operations |= {path: self.ranked(path, alpha, beta) for path in chosen}
        return self._network.storage.plan(self._network.kernels, list(operations.values()))


def _some(wanted: np.ndarray, otherwise: np.ndarray) -> np.ndarray:
    """What is wanted, if it is anything at all: no kernel is emptied."""
    return wanted if wanted.any() else otherwise


def ranked_as_trained(network: CompressedNetwork, plan: CompressionPlan) -> CompressionPlan:
    """The plan with as many groups in every kernel, those of largest trained weights.

    Kernels with shuffled groups stay as they are. The plan is one of the network's.
    """
    operations = []
    for kernel in network.kernels:
        present, grouping = plan.kernels[kernel.path].operations, network.groupings[kernel.path]
        if not (present == Operation.SHUFFLE).any():
            scores = saliency_of(network.originals[kernel.path], grouping)
            present = _by_scores(kernel, present, grouping, scores.reshape(grouping.shape))
        operations.append(present)
    return network.storage.plan(network.kernels, operations)


def _by_scores(
    kernel: Kernel, present: np.ndarray, grouping: Grouping, scores: np.ndarray
) -> np.ndarray:
    """A kernel's operations when as many groups live as now, those of the highest scores.

    What comes back is stored as most of the kernel is.
    """
    live = present != Operation.PRUNE
    if live.all() or not live.any():
        return present
    usual = survivors(kernel, bool((present == Operation.QUANTIZE).any()))
    chosen = largest_alike(scores, live, grouping)
    return np.where(chosen, np.where(live, present, usual), Operation.PRUNE).astype(np.uint8)


def rank_anew(
    network: CompressedNetwork,
    restore: Callable[[], object],
    improves: Callable[[CompressionPlan], bool],
    most: int = len(SCHEDULE),
) -> None:
    """Releases what has no effect, and ranks all kernels anew, as long as the plan gets better.

    What was no better is not tried a second time.

    Args:
        network: That is ranked.
        restore: Evaluates the best plan, so that the network is fitted to it.
        improves: Evaluates a plan, and says whether it is the best now.
        most: Plans that are evaluated at most.
    """
    failed: set[tuple[float, float] | None] = set()
    context, tried, restored = None, 0, False
    for powers in SCHEDULE:
        if powers in failed or tried == most:
            continue
        if context is None:
            if not restored:
                restore()
            context, restored = Context(network), True
        plan = context.released() if powers is RELEASE else context.plan(*powers)
        if plan is None:
            failed.add(powers)
            continue
        tried += 1
        if improves(plan):
            context = None  # the network is fitted to the best plan now
        else:
            failed.add(powers)


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
