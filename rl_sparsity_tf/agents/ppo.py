"""Proximal policy optimisation by TF-Agents' `PPOClipAgent`.

PPO has no constraint splitter: illegal actions are masked inside the actor, by a
`MaskSplitterNetwork` that passes the mask on to the projection. Observations must not be
normalised by the agent, because that would normalise the mask as well.

Actions are sampled here, from the distribution of TF-Agents' own policy, with the agent's NumPy
generator (see `_dqn` for why).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras as keras
from numpy.typing import NDArray
from tf_agents.agents.ppo import ppo_clip_agent
from tf_agents.networks import (
    actor_distribution_network,
    mask_splitter_network,
    value_network,
)
from tf_agents.trajectories import trajectory
from tf_agents.utils import common

from rl_sparsity_tf.agents import tf_agent
from rl_sparsity_tf.agents.base import Transition
from rl_sparsity_tf.agents.configs import PPO, SlotShape
from rl_sparsity_tf.agents.slots import SlotProjection
from rl_sparsity_tf.errors import AgentStateError
from rl_sparsity_tf.randomness import python_and_numpy_random_kept

RelaxedLoss = Callable[[NDArray[Any], NDArray[Any], NDArray[Any], int], tuple[float, NDArray[Any]]]
"""`(logits, legal, actions, step) -> (loss, gradient by the logits)`, a row for each decision of a
search episode. Agents know nothing of networks: the caller brings it, e.g. a `Relaxation`."""

_RELAXED_EPSILON = 1e-2

# Imitation ends when an action has a probability of 0.95 on average: an episode of some dozens of
# decisions then leaves the demonstration at one or two of them.
_CONFIDENT, _IMITATION_STEPS = 0.05, 200

Row = dict[str, NDArray[Any]]
"""One search episode as arrays over time; the keys are those of `_FIELDS`."""

_FIELDS = (
    "step_type",
    "state",
    "legal",
    "action",
    "logits",
    "value",
    "next_step_type",
    "reward",
    "discount",
)


def build(
    config: PPO, time_step_spec: Any, action_spec: Any, seed: int, slots: SlotShape | None = None
) -> PPOAgent:
    """Builds the agent; called by `build_agent`."""
    with python_and_numpy_random_kept():
        return PPOAgent(config, time_step_spec, action_spec, seed, slots)


class PPOAgent(tf_agent.TFAgent):
    """TF-Agents' clipped PPO agent with masked actions."""

    name = "ppo"

    def __init__(
        self,
        config: PPO,
        time_step_spec: Any,
        action_spec: Any,
        seed: int,
        slots: SlotShape | None = None,
    ) -> None:
        time_step_spec, action_spec, n_features, n_actions = tf_agent.checked_specs(
            time_step_spec, action_spec
        )
        super().__init__(n_features=n_features, n_actions=n_actions, seed=seed)
        self.config = config
        tf.random.set_seed(seed)
        state_spec = time_step_spec.observation["state"]
        if slots is None:
            inside: dict[str, Any] = {"fc_layer_params": config.hidden_layers}
        else:
            inside = {
                "fc_layer_params": (),
                "discrete_projection_net": lambda spec: SlotProjection(
                    spec, slots, config.hidden_layers, "tanh"
                ),
            }
        inner_actor = actor_distribution_network.ActorDistributionNetwork(
            state_spec, action_spec, activation_fn=keras.activations.tanh, **inside
        )
        inner_value = value_network.ValueNetwork(
            state_spec,
            fc_layer_params=config.hidden_layers,
            activation_fn=keras.activations.tanh,
        )
        actor, value = (
            mask_splitter_network.MaskSplitterNetwork(
                tf_agent.split_observation,
                network,
                passthrough_mask=passthrough,
                input_tensor_spec=time_step_spec.observation,
            )
            for network, passthrough in ((inner_actor, True), (inner_value, False))
        )
        optimizer = keras.optimizers.Adam(config.learning_rate)
        self.tf_agent = ppo_clip_agent.PPOClipAgent(
            time_step_spec,
            action_spec,
            optimizer=optimizer,
            actor_net=actor,
            value_net=value,
            importance_ratio_clipping=config.clip_ratio,
            lambda_value=config.gae_lambda,
            discount_factor=config.discount,
            entropy_regularization=config.entropy,
            # The epochs are run by _learn, so that the graph holds one and not num_epochs of them.
            num_epochs=1,
            use_gae=True,
            use_td_lambda_return=True,
            normalize_rewards=False,
            normalize_observations=False,
            gradient_clipping=0.5,
            compute_value_and_advantage_in_train=False,
            update_normalizers_in_train=False,
            train_step_counter=tf.Variable(0, dtype=tf.int64),
        )
        for network, heads in ((inner_actor, 1 if slots is None else 2), (inner_value, 1)):
            tf_agent.initialise(network.variables, self._generator, last_scale=0.1, heads=heads)
        self.tf_agent.initialize()
        trainable = tf_agent.unique_variables(
            inner_actor.trainable_variables, inner_value.trainable_variables
        )
        optimizer.build(trainable)
        self._variables = tf_agent.unique_variables(
            trainable, self.tf_agent.variables, optimizer.variables
        )
        self._policy_variables = trainable
        # An optimizer of its own: Adam's moments would mix two gradients of unlike size. A gradient
        # that is all but 0 must not become a full step, as it would with Adam's usual epsilon.
        rate = config.learning_rate * config.relaxed_reward
        follower = keras.optimizers.Adam(rate, epsilon=_RELAXED_EPSILON)
        self._relaxed_loss: RelaxedLoss | None = None
        self._relaxed_steps = 0
        if config.relaxed_reward:
            follower.build(inner_actor.trainable_variables)
            self._variables += follower.variables
        self._waiting: list[Row] = []
        self._length = 0
        collect_policy = self.tf_agent.collect_policy

        def evaluate(state: tf.Tensor, legal: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            step = collect_policy.distribution(tf_agent.time_step_of(state, legal))
            return step.info["dist_params"]["logits"], step.info["value_prediction"]

        def train(experience: trajectory.Trajectory) -> tuple[tf.Tensor, ...]:
            losses = self.tf_agent.train(experience).extra
            return (
                losses.policy_gradient_loss,
                losses.value_estimation_loss,
                losses.entropy_regularization_loss,
            )

        def imitate(state: tf.Tensor, legal: tf.Tensor, action: tf.Tensor) -> tf.Tensor:
            time_steps = tf_agent.time_step_of(state, legal)
            with tf.GradientTape() as tape:
                distribution, _ = actor(time_steps.observation, time_steps.step_type, ())
                loss = -tf.reduce_mean(distribution.log_prob(action))
            weights = actor.trainable_variables
            optimizer.apply_gradients(zip(tape.gradient(loss, weights), weights, strict=True))
            return loss

        def all_logits(state: tf.Tensor) -> tf.Tensor:
            time_steps = tf_agent.time_step_of(
                state, tf.ones((tf.shape(state)[0], n_actions), tf.int32)
            )
            distribution, _ = actor(time_steps.observation, time_steps.step_type, ())
            return distribution.logits_parameter()

        def follow(state: tf.Tensor, gradient: tf.Tensor) -> None:
            with tf.GradientTape() as tape:
                logits = all_logits(state)
            weights = actor.trainable_variables
            gradients = tape.gradient(logits, weights, output_gradients=gradient)
            follower.apply_gradients(zip(gradients, weights, strict=True))

        self._policy = common.function(evaluate)
        self._preprocess = common.function(self.tf_agent.preprocess_sequence)
        self._train = common.function(train)
        self._imitate = common.function(imitate)
        self._logits = common.function(all_logits, reduce_retracing=True)
        self._follow = common.function(follow, reduce_retracing=True)
        self._functions = (
            self._policy,
            self._preprocess,
            self._train,
            self._imitate,
            self._logits,
            self._follow,
        )

    def attach(self, relaxed_loss: RelaxedLoss) -> None:
        """Says what `PPO(relaxed_reward=...)` is to follow; needed before the first episode ends.

        That is `(logits, legal, actions, step) -> (loss, gradient)`, for instance a
        `relaxation.Relaxation`. `step` counts the calls, over saving and loading too.
        """
        self._relaxed_loss = relaxed_loss

    def _evaluate(
        self, state: NDArray[np.float32], legal: NDArray[np.int32]
    ) -> tuple[NDArray[np.float64], dict[str, NDArray[np.float32]]]:
        logits, value = self._policy(tf.constant(state[None]), tf.constant(legal[None]))
        info = {"logits": logits.numpy()[0], "value": value.numpy()[0]}
        return info["logits"].astype(np.float64), info

    def _probabilities(
        self, preferences: NDArray[np.float64], legal: NDArray[np.int32]
    ) -> NDArray[np.float64]:
        masked = np.where(legal > 0, preferences, -np.inf)
        weights = np.exp(masked - masked.max())
        return weights / weights.sum()

    def _learn(self, transitions: list[Transition]) -> dict[str, float]:
        if any(transition.forced for transition in transitions):
            return self._learn_by_imitation(transitions)
        if self.config.relaxed_reward and self._relaxed_loss is None:
            raise AgentStateError(
                f"PPO(relaxed_reward={self.config.relaxed_reward!r}) has no loss to follow; "
                "expected agent.attach(Relaxation(network)) before the first end_episode(). Set "
                "relaxed_reward=0 to learn from the sampled reward only."
            )
        self._waiting.append(_row(transitions))
        losses = self._update()
        if self.config.relaxed_reward and self._relaxed_loss is not None:
            losses |= self._learn_by_relaxation(transitions, self._relaxed_loss)
        return losses

    def _update(self) -> dict[str, float]:
        """PPO's own training, once enough episodes are waiting."""
        if len(self._waiting) < self.config.episodes_per_update:
            return {}
        # Rows keep the longest length seen, so that an unusually short one retraces nothing.
        self._length = max(self._length, *(len(row["action"]) for row in self._waiting), 0)
        experience = self._preprocess(_batch(self._waiting, self._length))
        losses = [self._train(experience) for _ in range(self.config.num_epochs)]
        self._waiting = []
        names = ("policy_loss", "value_loss", "entropy_loss")
        return dict(zip(names, np.mean(losses, axis=0).tolist(), strict=True))

    def _learn_by_relaxation(
        self, transitions: list[Transition], relaxed_loss: RelaxedLoss
    ) -> dict[str, float]:
        """Follows the gradient of the relaxed reward in the states of the search episode."""
        legal = np.stack([t.legal for t in transitions])
        states = tf.constant(np.stack([t.state for t in transitions]))
        actions = np.array([t.action for t in transitions], np.int32)
        losses = []
        for _ in range(self.config.num_epochs):
            logits = self._logits(states).numpy()
            loss, gradient = relaxed_loss(logits, legal, actions, self._relaxed_steps)
            self._relaxed_steps += 1
            # A draw that makes the network overflow says nothing, and would ruin the policy.
            if np.isfinite(loss) and np.isfinite(gradient).all():
                self._follow(states, tf.constant(gradient, tf.float32))
                losses.append(loss)
        return {"relaxed_loss": float(np.mean(losses))} if losses else {}

    def _learn_by_imitation(self, transitions: list[Transition]) -> dict[str, float]:
        """Makes forced actions likelier; they say nothing about what the policy would have done."""
        forced = [transition for transition in transitions if transition.forced]
        arrays = (
            tf.constant(np.stack([t.state for t in forced])),
            tf.constant(np.stack([t.legal for t in forced])),
            tf.constant([t.action for t in forced], tf.int32),
        )
        losses: list[float] = []
        while len(losses) < _IMITATION_STEPS and (not losses or losses[-1] > _CONFIDENT):
            losses.append(float(self._imitate(*arrays)))
        return {"imitation_loss": losses[-1]}

    def _arrays(self) -> dict[str, NDArray[Any]]:
        rows = {
            f"waiting/{i}/{field}": row[field]
            for i, row in enumerate(self._waiting)
            for field in _FIELDS
        }
        if self.config.relaxed_reward:
            rows["relaxed_steps"] = np.array(self._relaxed_steps)
        return {**super()._arrays(), "length": np.array(self._length), **rows}

    def _set_arrays(self, state: Mapping[str, NDArray[Any]]) -> None:
        super()._set_arrays(state)
        self._length = int(state["length"])
        if self.config.relaxed_reward:
            self._relaxed_steps = int(state["relaxed_steps"])
        self._waiting = []
        while f"waiting/{len(self._waiting)}/action" in state:
            prefix = f"waiting/{len(self._waiting)}/"
            row = {field: np.array(state.get(prefix + field)) for field in _FIELDS}
            self._check_row(row)
            self._waiting.append(row)

    def _check_row(self, row: Row) -> None:
        shapes = {"state": (self.n_features,), "legal": (self.n_actions,)}
        shapes["logits"] = shapes["legal"]
        floats = ("state", "logits", "value", "reward", "discount")
        good = row["action"].size > 0 and all(
            value.dtype == (np.float32 if field in floats else np.int32)
            and value.shape == (len(np.atleast_1d(row["action"])), *shapes.get(field, ()))
            and np.isfinite(value).all()
            for field, value in row.items()
        )
        if not good or not (0 <= row["action"].min() <= row["action"].max() < self.n_actions):
            raise AgentStateError(
                "The state has an episode waiting to be learned from that does not fit; expected "
                f"arrays of equal length for {', '.join(_FIELDS)}. Build the agent from the "
                "configuration and the environment that saved it."
            )


def _row(transitions: list[Transition]) -> Row:
    """One search episode's transitions over time, and one closing frame.

    Nothing is put between its environment episodes: their last discount is treated as 0 by
    TF-Agents, so the observation that follows is never looked at. TF-Agents drops the last frame.
    """
    frames = [*transitions, tf_agent.closing_transition(transitions[-1])]
    row: Row = {
        field: np.stack([np.asarray(getattr(frame, field)) for frame in frames])
        for field in ("step_type", "state", "legal", "action", "next_step_type")
    }
    for field in ("logits", "value"):
        row[field] = np.stack([frame.info[field] for frame in frames]).astype(np.float32)
    for field in ("reward", "discount"):
        row[field] = np.array([getattr(frame, field) for frame in frames], np.float32)
    return {
        key: value.astype(np.int32) if value.dtype == np.int64 else value
        for key, value in row.items()
    }


def _batch(rows: list[Row], length: int) -> trajectory.Trajectory:
    """Rows stacked as (episodes, length, ...), shorter ones repeating their closing frame."""
    arrays = {}
    for field in _FIELDS:
        padded = [
            np.concatenate([r[field], r[field][-1:].repeat(length, 0)])[:length] for r in rows
        ]
        arrays[field] = tf.constant(np.stack(padded))
    return trajectory.Trajectory(
        step_type=arrays["step_type"],
        observation={"state": arrays["state"], "legal": arrays["legal"]},
        action=arrays["action"],
        policy_info={
            "dist_params": {"logits": arrays["logits"]},
            "value_prediction": arrays["value"],
        },
        next_step_type=arrays["next_step_type"],
        reward=arrays["reward"],
        discount=arrays["discount"],
    )
