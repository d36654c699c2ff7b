"""The reward, relaxed: how it changes with the probabilities of the operations, as a gradient.

The sampled reward says how good a plan was; it does not say which of its decisions were. The
masks are differentiable, so the loss of the network can say that: the gradient of the loss by
every group's operation, carried on to the probabilities that the policy gave to it. See
[Relaxation][rl_sparsity_tf.agents.relaxation.Relaxation].
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from rl_sparsity_tf.environment.network import CompressedNetwork
from rl_sparsity_tf.environment.reward import Reward
from rl_sparsity_tf.errors import ArgumentError
from rl_sparsity_tf.layers import operations as ops
from rl_sparsity_tf.layers.groups import Grouping
from rl_sparsity_tf.layers.kernels import Kernel
from rl_sparsity_tf.layers.operations import Operation

_ILLEGAL = -1e9
_SCALE_BATCHES = 8
_HIGHEST_PRICE = 30.0
_PRICE_STEPS = 40
_LEAST_LOG_PROBABILITY = -60.0


def gumbel_softmax(
    logits: tf.Tensor, chosen: tf.Tensor, uniform: tf.Tensor, temperature: float = 1.0
) -> tf.Tensor:
    r"""One-hot choices that gradients pass through (Jang et al. 2017, arXiv 1611.01144).

    Forward: \(\mathrm{onehot}(\arg\max_i (l_i + g_i))\) with Gumbel noise \(g\) (equation 1), where
    the draw has been made: the noise is drawn given its outcome (Paulus et al. 2021, arXiv
    2010.04838). Backward: as if it were \(\mathrm{softmax}((l + g) / \tau)\) (equation 2). The
    choices are exactly 0 and 1, in the shape of the logits.

    Args:
        logits: Shape `(decisions, operations)`.
        chosen: What was drawn, shape `(decisions,)`.
        uniform: Noise in (0, 1), shape of the logits.
        temperature: Small is closer to the hard choice, and noisier in its gradient.
    """
    hard = tf.one_hot(chosen, logits.shape[-1], dtype=logits.dtype)
    # The largest of the noisy logits is the first arrival of a Poisson process, whoever it is.
    fixed = tf.stop_gradient(tf.nn.log_softmax(logits))
    waits = -tf.math.log(uniform)
    first = tf.reduce_sum(hard * waits, axis=-1, keepdims=True)
    others = first + waits * tf.exp(-tf.maximum(fixed, _LEAST_LOG_PROBABILITY))
    noise = -tf.math.log(tf.where(hard > 0, first, others)) - fixed
    soft = tf.nn.softmax((logits - tf.reduce_logsumexp(logits, -1, True) + noise) / temperature)
    return hard + (soft - tf.stop_gradient(soft))


def relaxed_matrix(
    matrix: tf.Tensor, choices: tf.Tensor, grouping: Grouping, kernel: Kernel
) -> tf.Tensor:
    """`quantize(mask * permute(W))` with the operations given as one-hot choices.

    For hard choices it equals what the wrapper computes once the operations are assigned. The
    gradient by a choice says what its operation would change: `-W` for Prune, `Q(W) - W` for
    Quantize, `P(W) - W` for Shuffle, relative to Keep. The matrix is of shape `(inputs, outputs)`;
    the choices are of shape `(rows, outputs, 4)`, in the order of
    [Operation][rl_sparsity_tf.Operation]. The kernel has to be wrapped.
    Shape and dtype of the matrix stay.
    """
    assert kernel.wrapper is not None
    state = kernel.wrapper.state(kernel.spec.attribute)
    choices = tf.cast(choices, matrix.dtype)
    keep, prune, quantize, shuffle = tf.unstack(choices, axis=-1)
    if "swaps" in state:
        pairs = grouping.pairs
        one, other = shuffle[0 : 2 * pairs : 2], shuffle[1 : 2 * pairs : 2]
        # Exactly one of the two asks. The last row of an odd number of groups has no neighbour.
        swaps = tf.repeat(one * (1 - other) + other * (1 - one), 2, axis=0)
        swaps = tf.pad(swaps, [[0, grouping.rows - 2 * pairs], [0, 0]])
        swaps = grouping.expand(swaps)
        swapped = ops.permute(matrix, tf.ones((pairs, grouping.outputs), tf.bool), grouping)
        matrix = (1 - swaps) * matrix + swaps * swapped
    if "mask" in state:
        matrix = matrix * grouping.expand(1 - prune)
    if "on_grid" in state:
        # A kernel without a kept group is stored as integers, all of it.
        kept, asked = tf.reduce_any(keep > 0.5), tf.reduce_any(quantize > 0.5)
        whole = tf.logical_and(asked, tf.logical_not(kept))
        hard = tf.where(whole, tf.ones_like(quantize), quantize)
        on_grid = grouping.expand(quantize + tf.stop_gradient(hard - quantize))
        rounded = ops.quantize(
            matrix,
            tf.ones(grouping.shape, tf.bool),
            state["levels"],
            grouping,
            kernel.spec.per_output_scale,
            kernel.spec.gates,
        )
        matrix = (1 - on_grid) * matrix + on_grid * rounded
    return matrix


class Relaxation:
    r"""A loss of the policy's logits that stands in for the reward, and its gradient.

    The network computes with the operations drawn in the episode, as straight-through
    Gumbel-softmax choices ([gumbel_softmax][]) that are spread over each decision's groups. They
    are not drawn anew: without the environment's walls, most draws at a high sparsity would empty
    some kernel. The gradient is taken at a random point of the straight line from all Keep to
    those operations (integrated gradients, Sundararajan et al. 2017, arXiv 1703.01365): at its
    end, the network of an early episode is often one whose activations are all 0, which has no
    gradient. The loss is, with the weights \(w\) of the [Reward][rl_sparsity_tf.Reward],

    \((w_a \cdot excess + w_s \cdot |1 - s/s^*| + w_b \cdot bits) / (w_a + w_s + w_b)\).

    * *excess* is the compiled loss above the dense network's, as a share of what is lost when all
      kernels are 0: 0 is as good as dense, 1 knows nothing. (The ratio to the dense loss would
      depend on how far a model was overfitted: it can be all but 0.)
    * *s* is the expected sparsity, *bits* the expected share of the bits stored: a kernel counts
      8 bits per weight with the probability that none of its decisions is Keep and some are
      Quantize. A target in bytes is seen through these, not through the file's size.
    * The environment's action wall makes every plan meet the target, whatever the policy: to prune
      less here is to prune more there. So one number (a price, found by bisection) is added to all
      logits of Prune until the expected sparsity is the target, and its own gradient is taken into
      account. A decision that the wall left only Prune counts as if Keep had been legal, too: that
      is what pruning more elsewhere would buy. Without the price, pruning nothing would always look
      best.

    Data: batches of the search's training pool, one per step, in turn; neither the validation data
    that plans are compared on nor test data is touched. Weights: those that the network holds, i.e.
    as recovered in the episode. The autoencoder's error has no part in it.

    The network is left as it is. `integrated` takes the gradient on the way to the operations, and
    not at its end. The noise depends on the seed and the step only. Raises ArgumentError if the
    reward is a function of the user's, or the temperature is not above 0.

    Example:
        >>> relaxation = Relaxation(network, seed=1)
        >>> relaxation.follow([("dense/kernel", env_groups) for env_groups in buckets])
        >>> loss, gradient = relaxation(logits, legal, actions, step=0)
    """

    def __init__(
        self,
        network: CompressedNetwork,
        *,
        reward: object = None,
        temperature: float = 1.0,
        integrated: bool = True,
        seed: int = 0,
    ):
        self.reward = Reward() if reward is None else reward
        if not isinstance(self.reward, Reward):
            raise ArgumentError(
                f"PPO(relaxed_reward=...) received reward={reward!r}, which has no gradient. "
                "Expected rls.Reward(...): pass one, or leave relaxed_reward at 0."
            )
        number = isinstance(temperature, int | float) and not isinstance(temperature, bool)
        if not number or not 0 < temperature < float("inf"):
            raise ArgumentError(
                f"Relaxation(temperature={temperature!r}) cannot be used. Expected a number above "
                "0, for example 1.0."
            )
        self.network = network
        self.temperature = float(temperature)
        self.integrated = integrated
        self.seed = seed
        self._kernels = [kernel for kernel in network.kernels if kernel.wrapper is not None]
        self._shares = np.array([k.size for k in self._kernels], np.float32)
        self._shares /= self._shares.sum()
        self._integers = np.array([k.spec.exports_int8 for k in self._kernels], np.float32)
        self._steps = 0
        self._index: list[tf.Tensor] = []
        self._weights = self._owners = tf.zeros(0)
        self.function = tf.function(self._loss_and_gradient, reduce_retracing=True)
        self._dense, self._range = self._scale()

    def follow(self, decisions: Sequence[tuple[str, np.ndarray]]) -> None:
        """Says which groups each decision of the episode was about.

        A decision is a kernel's path and flat group indices; they come in order. Groups named twice
        (handed on to a later bucket) belong to the last decision that names them, groups never
        named are kept. Raises ArgumentError if the network has no such kernel.
        """
        place = {kernel.path: index for index, kernel in enumerate(self._kernels)}
        groupings = [self.network.groupings[kernel.path] for kernel in self._kernels]
        # Row 0 of the choices is Keep, for groups that nothing was decided about.
        index = [np.zeros(grouping.count, np.int32) for grouping in groupings]
        owners = np.zeros((len(self._kernels), len(decisions)), np.float32)
        for step, (path, groups) in enumerate(decisions):
            at = place[self.network.kernels[self.network.index_of(path)].path]
            index[at][groups] = step + 1
            owners[at, step] = 1.0
        weights = np.zeros(len(decisions) + 1)
        for one, grouping in zip(index, groupings, strict=True):
            weights += np.bincount(one, grouping.sizes.reshape(-1), len(decisions) + 1)
        self._steps = len(decisions)
        self._weights = tf.constant(weights[1:] / self.network.budget.elements, tf.float32)
        self._owners = tf.constant(owners)
        self._index = [
            tf.constant(one.reshape(grouping.shape))
            for one, grouping in zip(index, groupings, strict=True)
        ]

    def __call__(
        self, logits: np.ndarray, legal: np.ndarray, actions: np.ndarray, step: int
    ) -> tuple[float, np.ndarray]:
        """The loss at one point of the way to the operations, and its gradient by the logits.

        The logits are the policy's, before illegal operations are masked; they and `legal`, 1 for
        every legal operation, are of shape `(decisions, 4)`. The operations drawn are of shape
        `(decisions,)`. The running number `step` picks the batch and the noise. Raises
        ArgumentError if there is not one row per decision of [follow][].
        """
        if logits.shape != (self._steps, len(Operation)) or logits.shape != legal.shape:
            raise ArgumentError(
                f"Relaxation received logits of shape {logits.shape} and legal operations of shape "
                f"{legal.shape}. Expected ({self._steps}, {len(Operation)}), a row for every "
                "decision of the episode: call follow(decisions) with the same ones first."
            )
        loss, gradient = self.function(
            tf.constant(logits, tf.float32),
            tf.constant(_opened(legal)),
            tf.constant(actions, tf.int32),
            self._weights,
            self._owners,
            self._index,
            tf.constant([self.seed, step], tf.int64),
            tf.constant(max(self.network.budget.goal, 1e-9), tf.float32),
            *self.network.train.batch(step),
        )
        return float(loss), gradient.numpy()

    def tracing_count(self) -> int:
        """How often the function was traced, for tests of retracing."""
        return int(self.function.experimental_get_tracing_count())

    # ------------------------------------------------------------------ the loss

    def kernels_for(self, choices: tf.Tensor) -> dict[str, tf.Tensor]:
        """Every kernel's effective value in its own shape, by path.

        The choices are one row per decision of [follow][], shape `(decisions, 4)`.
        """
        values = self._kernels_for(choices, self._index)
        return dict(zip([kernel.path for kernel in self._kernels], values, strict=True))

    def _kernels_for(self, choices: tf.Tensor, index: Iterable[tf.Tensor]) -> list[tf.Tensor]:
        keep = tf.one_hot([int(Operation.KEEP)], len(Operation), dtype=choices.dtype)
        rows = tf.concat([keep, choices], axis=0)
        kernels = []
        for kernel, one in zip(self._kernels, index, strict=True):
            grouping = self.network.groupings[kernel.path]
            matrix = kernel.spec.to_matrix(tf.convert_to_tensor(kernel.variable))
            matrix = relaxed_matrix(matrix, tf.gather(rows, one), grouping, kernel)
            kernels.append(kernel.spec.from_matrix(matrix, kernel.shape))
        return kernels

    def _network_loss(self, kernels: Sequence[tf.Tensor], x: Any, y: Any, w: Any) -> tf.Tensor:
        model = self.network.model
        wrappers = {id(kernel.wrapper): kernel.wrapper for kernel in self._kernels}
        pairs = list(zip(self._kernels, kernels, strict=True))
        with contextlib.ExitStack() as stack:
            for key, wrapper in wrappers.items():
                assert wrapper is not None
                mine = {k.spec.attribute: v for k, v in pairs if id(k.wrapper) == key}
                stack.enter_context(wrapper.substituted(mine))
            outputs = model(x, training=False)
            return tf.cast(model.compute_loss(x, y, outputs, w), tf.float32)

    def _loss_and_gradient(
        self,
        logits: tf.Tensor,
        legal: tf.Tensor,
        actions: tf.Tensor,
        weights: tf.Tensor,
        owners: tf.Tensor,
        index: list[tf.Tensor],
        seed: tf.Tensor,
        goal: tf.Tensor,
        *batch: Any,
    ) -> tuple[tf.Tensor, tf.Tensor]:
        reward = self.reward
        assert isinstance(reward, Reward)
        with tf.GradientTape() as tape:
            tape.watch(logits)
            masked = tf.where(legal, logits, _ILLEGAL)
            sparsity = _expected_sparsity(masked, weights)
            missed = tf.abs(1.0 - sparsity / goal)
            met = _at_sparsity(masked, weights, goal)
            least = np.finfo(np.float32).tiny
            noise = tf.random.stateless_uniform(tf.shape(met), seed, minval=least)
            choices = gumbel_softmax(met, actions, noise, self.temperature)
            if self.integrated:
                point = tf.random.stateless_uniform((), seed + 1)
                keep = tf.one_hot(int(Operation.KEEP), len(Operation), dtype=choices.dtype)
                # The gradient by the choices is not scaled: it is that of the whole way.
                choices += tf.stop_gradient((1.0 - point) * (keep - choices))
            kernels = self._kernels_for(choices, index)
            excess = (self._network_loss(kernels, *batch) - self._dense) / self._range
            bits = self._expected_bits(tf.nn.softmax(met), owners)
            total = reward.accuracy * excess + reward.sparsity * missed + reward.size * bits
            total /= reward.accuracy + reward.sparsity + reward.size + 1e-9
        return total, tape.gradient(total, logits)

    def _expected_bits(self, probabilities: tf.Tensor, owners: tf.Tensor) -> tf.Tensor:
        def all_of(values: tf.Tensor) -> tf.Tensor:
            """The probability, per kernel, that something holds for all its decisions."""
            return tf.reduce_prod(tf.where(owners > 0, values[tf.newaxis], 1.0), axis=1)

        not_kept = 1.0 - probabilities[:, Operation.KEEP]
        neither = probabilities[:, Operation.PRUNE] + probabilities[:, Operation.SHUFFLE]
        integers = (all_of(not_kept) - all_of(neither)) * self._integers
        return tf.reduce_sum(self._shares * (1.0 - 0.75 * integers))

    def _scale(self) -> tuple[float, float]:
        """The dense network's loss, and how far it is from there to a network of zeros."""
        snapshot = self.network.snapshot()
        self.network.reset()

        @tf.function
        def scaled(factor: tf.Tensor, *batch: Any) -> tf.Tensor:
            variables = [tf.convert_to_tensor(kernel.variable) for kernel in self._kernels]
            kernels = [tf.cast(factor, value.dtype) * value for value in variables]
            return self._network_loss(kernels, *batch)

        batches = self.network.train.pool[:_SCALE_BATCHES]
        dense, empty = (
            float(np.mean([float(scaled(tf.constant(factor), *batch)) for batch in batches]))
            for factor in (1.0, 0.0)
        )
        self.network.restore(snapshot)
        # A network that is no better than one of zeros has no scale of its own but its loss.
        return dense, empty - dense if empty > dense else max(abs(dense), 1e-6)


def _opened(legal: np.ndarray) -> np.ndarray:
    """Legal operations as booleans, with Keep where the wall left only Prune."""
    opened = legal > 0
    forced = opened[:, Operation.PRUNE] & (opened.sum(axis=1) == 1)
    opened[forced, Operation.KEEP] = True
    return opened


def _expected_sparsity(logits: tf.Tensor, weights: tf.Tensor) -> tf.Tensor:
    return tf.reduce_sum(weights * tf.nn.softmax(logits)[:, Operation.PRUNE])


def _at_sparsity(logits: tf.Tensor, weights: tf.Tensor, goal: tf.Tensor | float) -> tf.Tensor:
    """Adds one number to all logits of Prune so that the expected sparsity is the goal."""
    prune = tf.one_hot(int(Operation.PRUNE), len(Operation), dtype=logits.dtype)
    fixed = tf.stop_gradient(logits)
    low, high = tf.constant(-_HIGHEST_PRICE), tf.constant(_HIGHEST_PRICE)
    for _ in range(_PRICE_STEPS):
        middle = (low + high) / 2
        enough = _expected_sparsity(fixed + middle * prune, weights) >= goal
        low, high = tf.where(enough, low, middle), tf.where(enough, middle, high)
    # One Newton step from the solution moves nothing, and has the gradient of the solution.
    sparsity = _expected_sparsity(logits + high * prune, weights)
    probability = tf.nn.softmax(fixed + high * prune)[:, Operation.PRUNE]
    slope = tf.reduce_sum(weights * probability * (1 - probability))
    price = high - (sparsity - tf.stop_gradient(sparsity)) / tf.maximum(slope, 1e-6)
    return logits + price * prune
