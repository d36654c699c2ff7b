"""Deep Q-learning by TF-Agents' `DqnAgent` and `DdqnAgent`.

Actions are sampled here, from the Q values of TF-Agents' own policy, with the agent's NumPy
generator: inside a traced `tf.function` TensorFlow's generator restarts the very same draws
whenever its global seed is set, whatever the seed, so exploration could be neither varied nor
resumed. Replay batches are drawn eagerly for the same reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras as keras
from numpy.typing import NDArray
from tf_agents.agents.dqn import dqn_agent
from tf_agents.networks import q_network, sequential
from tf_agents.replay_buffers import tf_uniform_replay_buffer
from tf_agents.trajectories import trajectory
from tf_agents.utils import common

from rl_sparsity_tf.agents import tf_agent
from rl_sparsity_tf.agents.base import LAST, Transition
from rl_sparsity_tf.agents.configs import DQN, SlotShape
from rl_sparsity_tf.agents.slots import SlotScores
from rl_sparsity_tf.randomness import python_and_numpy_random_kept, spin

# Share of the random actions that are uniformly random.
_UNIFORM = 0.2


def build(
    config: DQN, time_step_spec: Any, action_spec: Any, seed: int, slots: SlotShape | None = None
) -> DQNAgent:
    """Builds the agent; called by `build_agent`."""
    with python_and_numpy_random_kept():
        return DQNAgent(config, time_step_spec, action_spec, seed, slots)


class DQNAgent(tf_agent.TFAgent):
    """TF-Agents' (double) DQN agent with its uniform replay buffer."""

    name = "dqn"
    off_policy = True

    def __init__(
        self,
        config: DQN,
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
        self._held = 0, 0  # a random action, and how often it is still to be repeated
        tf.random.set_seed(seed)
        network = _network(config, time_step_spec.observation["state"], action_spec, slots)
        optimizer = keras.optimizers.Adam(config.learning_rate)
        boltzmann = config.exploration == "boltzmann"
        agent_class = dqn_agent.DdqnAgent if config.double else dqn_agent.DqnAgent
        self.tf_agent = agent_class(
            time_step_spec,
            action_spec,
            q_network=network,
            optimizer=optimizer,
            observation_and_action_constraint_splitter=tf_agent.split_observation,
            epsilon_greedy=None if boltzmann else self.epsilon,
            boltzmann_temperature=config.temperature if boltzmann else None,
            n_step_update=config.n_step,
            target_update_period=config.target_update_period,
            td_errors_loss_fn=common.element_wise_huber_loss,
            gamma=config.discount,
            train_step_counter=tf.Variable(0, dtype=tf.int64),
        )
        heads = 1 if slots is None else 2
        tf_agent.initialise(network.variables, self._generator, last_scale=0.1, heads=heads)
        self.tf_agent.initialize()
        self.replay = tf_uniform_replay_buffer.TFUniformReplayBuffer(
            self.tf_agent.collect_data_spec, batch_size=1, max_length=config.replay_capacity
        )
        optimizer.build(network.trainable_variables)
        self._variables = tf_agent.unique_variables(
            self.tf_agent.variables, optimizer.variables, self.replay.variables()
        )
        self._policy_variables = network.trainable_variables
        self._taught = False
        q_policy = self.tf_agent.policy.wrapped_policy

        def q_values(state: tf.Tensor, legal: tf.Tensor) -> tf.Tensor:
            return q_policy.distribution(tf_agent.time_step_of(state, legal)).action.logits

        def train(experience: trajectory.Trajectory) -> tf.Tensor:
            size = config.batch_size

            def one_step(i: tf.Tensor, total: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
                batch = tf.nest.map_structure(lambda t: t[i * size : (i + 1) * size], experience)
                return i + 1, total + self.tf_agent.train(batch).loss

            # A loop inside the graph: a call from Python per step costs more than the step.
            _, total = tf.while_loop(
                lambda i, _: i < config.train_steps,
                one_step,
                (tf.constant(0), tf.constant(0.0)),
                parallel_iterations=1,
            )
            return total / config.train_steps

        def add(frame: trajectory.Trajectory) -> None:
            self.replay.add_batch(frame)

        self._q_values = common.function(q_values)
        self._train = common.function(train)
        self._add = common.function(add)
        self._functions = (self._q_values, self._train, self._add)

    def _choose(
        self, preferences: NDArray[np.float64], legal: NDArray[np.int32], explore: bool
    ) -> int:
        config = self.config
        if not explore or config.exploration == "boltzmann" or not config.persistence:
            return super()._choose(preferences, legal, explore)
        action, left = self._held
        if left and legal[action]:
            self._held = action, left - 1
            return action
        self._held = 0, 0
        if self._generator.random() >= self.epsilon():
            return super()._choose(preferences, legal, explore=False)
        # What is worth less by far is tried less often.
        others = np.flatnonzero(legal)
        others = (
            others[others != super()._choose(preferences, legal, False)]
            if len(others) > 1
            else others
        )
        weights = np.exp((preferences[others] - preferences[others].max()) / config.temperature)
        weights = _UNIFORM / len(others) + (1.0 - _UNIFORM) * weights / weights.sum()
        action = int(others[spin(weights, self._generator)])
        self._held = action, int(self._generator.zipf(config.persistence)) - 1
        return action

    def _begin(self) -> None:
        self._held = 0, 0

    def epsilon(self) -> float:
        """The probability of a random action now."""
        if self._taught:
            return self.config.epsilon_end
        return self.config.epsilon(self.episodes)

    def set_policy_arrays(self, arrays: Sequence[NDArray[np.float32]]) -> None:
        """Begins with what another agent has learned."""
        super().set_policy_arrays(arrays)
        self.tf_agent.initialize()  # the target network follows
        self._taught = True

    def _arrays(self) -> dict[str, NDArray[Any]]:
        return {**super()._arrays(), "taught": np.array(self._taught)}

    def _set_arrays(self, state: Mapping[str, NDArray[Any]]) -> None:
        super()._set_arrays(state)
        self._taught = bool(state["taught"])

    def _evaluate(
        self, state: NDArray[np.float32], legal: NDArray[np.int32]
    ) -> tuple[NDArray[np.float64], dict[str, NDArray[np.float32]]]:
        values = self._q_values(tf.constant(state[None]), tf.constant(legal[None]))
        return values.numpy()[0].astype(np.float64), {}

    def _probabilities(
        self, preferences: NDArray[np.float64], legal: NDArray[np.int32]
    ) -> NDArray[np.float64]:
        masked = np.where(legal > 0, preferences, -np.inf)
        if self.config.exploration == "boltzmann":
            weights = np.exp((masked - masked.max()) / self.config.temperature)
            return weights / weights.sum()
        probabilities = self.epsilon() * (legal > 0) / np.count_nonzero(legal)
        probabilities[np.argmax(masked)] += 1.0 - self.epsilon()
        return probabilities

    def _learn(self, transitions: list[Transition]) -> dict[str, float]:
        for transition in transitions:
            self._add(_frame(transition))
            if transition.next_step_type == LAST:
                self._add(_frame(tf_agent.closing_transition(transition)))
        frames = self.config.n_step + 1
        if int(self.replay.num_frames()) <= frames:
            return {}
        tf.random.set_seed(int(self._generator.integers(2**31)))
        steps, size = self.config.train_steps, self.config.batch_size
        # One draw for all training steps: the buffer does not change between them.
        drawn, _ = self.replay.get_next(sample_batch_size=steps * size, num_steps=frames)
        return {"td_loss": float(self._train(drawn)), "epsilon": self.epsilon()}


def _network(config: DQN, state_spec: Any, action_spec: Any, slots: SlotShape | None) -> Any:
    if slots is None:
        return q_network.QNetwork(state_spec, action_spec, fc_layer_params=config.hidden_layers)
    actions = int(action_spec.maximum) + 1
    scores = SlotScores(slots, actions, config.hidden_layers, "relu")
    network = sequential.Sequential([scores], input_spec=state_spec)
    network.create_variables()
    return network


def _frame(transition: Transition) -> trajectory.Trajectory:
    """A transition as TF-Agents stores it: batch of one, the next observation in the next frame."""
    return trajectory.Trajectory(
        step_type=tf.constant([transition.step_type], tf.int32),
        observation={
            "state": tf.constant(transition.state[None]),
            "legal": tf.constant(transition.legal[None]),
        },
        action=tf.constant([transition.action], tf.int32),
        policy_info=(),
        next_step_type=tf.constant([transition.next_step_type], tf.int32),
        reward=tf.constant([transition.reward], tf.float32),
        discount=tf.constant([transition.discount], tf.float32),
    )
