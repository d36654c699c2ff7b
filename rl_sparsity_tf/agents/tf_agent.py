"""What the learning agents share on TF-Agents' side: specs, weights, and their place in a state."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray
from tf_agents.specs import tensor_spec
from tf_agents.trajectories import time_step as ts

from rl_sparsity_tf.agents.base import FIRST, LAST, Agent, Transition
from rl_sparsity_tf.errors import AgentStateError, ArgumentError


def checked_specs(time_step_spec: Any, action_spec: Any) -> tuple[ts.TimeStep, Any, int, int]:
    """The specs as TensorFlow's, with the number of features and of actions.

    Raises ArgumentError if the observation is not `{"state", "legal"}` or the action no scalar
    integer from 0.
    """
    action = tensor_spec.from_spec(action_spec)
    scalar = isinstance(action, tensor_spec.BoundedTensorSpec) and action.shape.rank == 0
    if not scalar or not action.dtype.is_integer or int(action.minimum) != 0:
        raise ArgumentError(
            f"action_spec={action_spec!r}: expected one scalar integer counted from 0, such as "
            "BoundedArraySpec((), np.int32, minimum=0, maximum=3)."
        )
    n_actions = int(action.maximum) + 1
    time_step = tensor_spec.from_spec(time_step_spec)
    observation = getattr(time_step, "observation", None)
    if not isinstance(observation, dict) or set(observation) != {"state", "legal"}:
        raise ArgumentError(
            f"time_step_spec has the observation {observation!r}: expected a dict of 'state' and "
            "'legal'. Pass env.time_step_spec() of a LayerEnvironment, or of an environment "
            "that observes the same."
        )
    state, legal = observation["state"], observation["legal"]
    if state.shape.rank != 1 or state.dtype != tf.float32:
        raise ArgumentError(
            f"time_step_spec's 'state' is {state.dtype.name} of shape {state.shape}: expected "
            "float32 of shape (n_features,). Flatten and convert it in the environment."
        )
    if legal.shape.as_list() != [n_actions] or not legal.dtype.is_integer:
        raise ArgumentError(
            f"time_step_spec's 'legal' is {legal.dtype.name} of shape {legal.shape}: expected "
            f"int32 of shape ({n_actions},), one entry for each of the {n_actions} actions."
        )
    return time_step, action, int(state.shape[0]), n_actions


def split_observation(observation: Mapping[str, Any]) -> tuple[Any, Any]:
    """What the network sees, and which actions are legal."""
    return observation["state"], observation["legal"]


def initialise(
    variables: Sequence[tf.Variable],
    generator: np.random.Generator,
    last_scale: float,
    heads: int = 1,
) -> None:
    """Draws a network's weights: Glorot uniform kernels, zero biases, small kernels of its heads.

    Keras' own initialisers take their seeds from Python's global generator (or from a seed the
    user has set for Keras), so weights drawn by them would not follow from the agent's seed.
    """
    kernels = [variable for variable in variables if variable.shape.rank == 2]
    for variable in variables:
        if variable.shape.rank != 2:
            variable.assign(tf.zeros_like(variable))
            continue
        limit = float(np.sqrt(6.0 / sum(variable.shape)))
        scale = last_scale if any(variable is head for head in kernels[-heads:]) else 1.0
        drawn = generator.uniform(-limit, limit, tuple(variable.shape)) * scale
        variable.assign(drawn.astype(np.float32))


def time_step_of(state: tf.Tensor, legal: tf.Tensor) -> ts.TimeStep:
    """A batched time step in the middle of an episode, inside a `tf.function`."""
    ones = tf.ones([tf.shape(state)[0]], tf.float32)
    return ts.TimeStep(
        step_type=tf.cast(ones, tf.int32),
        reward=0.0 * ones,
        discount=ones,
        observation={"state": state, "legal": legal},
    )


def closing_transition(last: Transition) -> Transition:
    """The frame TF-Agents puts between two episodes: from the LAST step to the next FIRST one.

    Its action is never learned from; it is a legal one so that no probability is 0.
    """
    return Transition(
        state=last.next_state,
        legal=last.next_legal,
        action=int(np.argmax(last.next_legal)),
        info={key: np.zeros_like(value) for key, value in last.info.items()},
        forced=False,
        step_type=LAST,
        next_step_type=FIRST,
        reward=0.0,
        discount=1.0,
        next_state=last.next_state,
        next_legal=last.next_legal,
    )


class TFAgent(Agent):
    """An agent whose knowledge lies in TensorFlow variables."""

    _functions: Sequence[Any] = ()
    _variables: Sequence[tf.Variable] = ()

    _policy_variables: Sequence[tf.Variable] = ()

    def tracing_count(self) -> int:
        """How often the agent's `tf.function`s have been traced so far, in total."""
        return sum(function.experimental_get_tracing_count() for function in self._functions)

    def policy_arrays(self) -> list[NDArray[np.float32]]:
        """The weights of the networks that decide (and of those that rate states), in order."""
        return [variable.numpy() for variable in self._policy_variables]

    def set_policy_arrays(self, arrays: Sequence[NDArray[np.float32]]) -> None:
        """Begins with what another agent has learned."""
        if self._pending is not None or self._episode:
            raise AgentStateError(
                "agent.set_policy_arrays() was called in the middle of a search episode; call "
                "agent.end_episode() or agent.discard_episode() first."
            )
        found = [np.shape(array) for array in arrays]
        expected = [tuple(variable.shape) for variable in self._policy_variables]
        if found != expected:
            raise AgentStateError(
                f"agent.set_policy_arrays() received arrays of shapes {found}; expected "
                f"{expected}. Build the agent from the configuration that the policy was saved of."
            )
        for variable, array in zip(self._policy_variables, arrays, strict=True):
            variable.assign(array)

    def _arrays(self) -> dict[str, NDArray[Any]]:
        return {f"variables/{i}": v.numpy() for i, v in enumerate(self._variables)}

    def _set_arrays(self, state: Mapping[str, NDArray[Any]]) -> None:
        for i, variable in enumerate(self._variables):
            variable.assign(state[f"variables/{i}"])


def unique_variables(*groups: Iterable[tf.Variable]) -> list[tf.Variable]:
    """The variables of all groups in order, each once."""
    return list({id(variable): variable for group in groups for variable in group}.values())
