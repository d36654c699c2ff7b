"""One network that scores the actions of every slot, for states that are made of slots.

What a move is worth for a kernel does not depend on the slot that the kernel is in: what is learned
of one kernel is known of all, and the network is as small as for one slot alone (compare Zaheer et
al. 2017, "Deep sets", arXiv 1703.06114).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf
import tf_keras as keras
from tf_agents.networks import categorical_projection_network

from rl_sparsity_tf.agents.configs import SlotShape


class SlotScores(keras.layers.Layer):
    """Scores actions slot by slot: `(batch, features) -> (batch, slots * actions of a slot)`.

    A state is cut by `shape`: features of the network first, then those of every slot. Every slot's
    hidden layers see the network's features beside its own. The first slot, which is all kernels
    together, has actions of its own, and so a last layer of its own. Without hidden layers the
    scores are linear in the features.
    """

    def __init__(
        self, shape: SlotShape, actions: int, hidden: Sequence[int], activation: str, **kwargs: Any
    ):
        super().__init__(**kwargs)
        self._shape = shape
        self._stack = [keras.layers.Dense(width, activation=activation) for width in hidden]
        self._first, self._others = (keras.layers.Dense(actions // shape.slots) for _ in range(2))

    def call(self, state: tf.Tensor, training: bool = False) -> tf.Tensor:
        """The scores of all actions."""
        shared, slots, features = self._shape.shared, self._shape.slots, self._shape.features
        own = tf.reshape(state[:, shared:], (-1, slots, features))
        common = tf.repeat(state[:, None, :shared], slots, axis=1)
        x = tf.concat([common, own], axis=2)
        for layer in self._stack:
            x = layer(x)
        scores = tf.concat([self._first(x[:, :1]), self._others(x[:, 1:])], axis=1)
        return tf.reshape(scores, (-1, slots * scores.shape[-1]))


class SlotProjection(categorical_projection_network.CategoricalProjectionNetwork):
    """TF-Agents' projection to a distribution over actions, with scores slot by slot for logits."""

    def __init__(
        self,
        sample_spec: Any,
        shape: SlotShape,
        hidden: Sequence[int],
        activation: str,
        name: str = "SlotProjection",
    ):
        super().__init__(sample_spec, name=name)
        actions = int(sample_spec.maximum - sample_spec.minimum + 1)
        self._projection_layer = SlotScores(shape, actions, hidden, activation, name="logits")
