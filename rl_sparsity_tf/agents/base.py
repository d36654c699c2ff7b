"""What every agent does, whatever it learns with: act, record, and hand episodes to training.

Nothing here imports TensorFlow: subclasses say how preferences over actions are computed and how
a recorded episode is learned from. A new agent is a module beside this one with a subclass of
[Agent][] and a function `build` (see `random`), and a configuration of the same name in `configs`.
"""

from __future__ import annotations

import abc
import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rl_sparsity_tf.claims import ArrayFileError, load_arrays
from rl_sparsity_tf.errors import AgentStateError, ArgumentError
from rl_sparsity_tf.files import as_file, reading, replacing
from rl_sparsity_tf.randomness import pack_generator, spin, unpack_generator

FIRST, MID, LAST = 0, 1, 2
"""TF-Agents' step types, as numbers."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Transition:
    """One step of an environment as the agent saw it."""

    state: NDArray[np.float32]
    """Observation before the action, shape (F,)."""
    legal: NDArray[np.int32]
    """1 for each legal action, shape (n_actions,)."""
    action: int
    """The action taken."""
    info: Mapping[str, NDArray[np.float32]]
    """What the policy knew when it acted, for its own training."""
    forced: bool
    """Whether the action was given by the caller instead of chosen by the policy."""
    step_type: int
    """FIRST or MID: the kind of time step acted on."""
    next_step_type: int
    """MID or LAST: the kind of time step that followed."""
    reward: float
    """In [-1, 1]."""
    discount: float
    """The environment's discount: 0 where the episode ended for good."""
    next_state: NDArray[np.float32]
    """Observation after the action, shape (F,)."""
    next_legal: NDArray[np.int32]
    """Legal actions after the action, shape (n_actions,)."""


_FORMAT_VERSION = 1


class Agent(abc.ABC):
    """Chooses operations, and learns from the rewards that follow.

    One *search episode* is a run of environment episodes, one after the other. For each of its
    time steps call `step`, act in the environment, and call `observe`; at its end call
    `end_episode`, which trains.

    Example:
        >>> time_step = env.reset()
        >>> while not time_step.is_last():
        ...     time_step = env.step(agent.step(time_step))
        ...     agent.observe(time_step)
        >>> losses = agent.end_episode()
    """

    name: str = ""
    """`"dqn"`, `"ppo"` or `"random"`."""

    off_policy: bool = False
    """Whether it learns what an action is worth from any behaviour, not its policy's alone."""

    def __init__(self, *, n_features: int, n_actions: int, seed: int) -> None:
        self.n_features = n_features
        self.n_actions = n_actions
        self.episodes = 0
        """Search episodes finished."""
        self._generator = np.random.default_rng(np.random.SeedSequence([seed, 1]))
        self._pending: dict[str, Any] | None = None
        self._episode: list[Transition] = []

    # -- acting ----------------------------------------------------------------------------------

    def act(self, time_step: Any, *, explore: bool = False) -> int:
        """Chooses a legal action for one unbatched time step without recording anything.

        `explore` samples as while collecting; otherwise the best action known is taken. Raises
        AgentStateError if the observation does not fit or no action is legal.
        """
        state, legal = self._observation(time_step)
        preferences, _ = self._evaluate(state, legal)
        return self._choose(preferences, legal, explore)

    def step(
        self,
        time_step: Any,
        *,
        explore: bool = True,
        action: int | None = None,
        allowed: NDArray[np.int32] | None = None,
    ) -> int:
        """Chooses an action for one unbatched time step and remembers it for `observe`.

        The time step is not the last of its episode. `explore` samples from the collecting policy;
        otherwise the best action known is taken. A given `action` is taken instead, so that the
        trajectory of a heuristic can be learned from: DQN keeps it in its replay buffer, PPO learns
        to imitate it. `allowed` is 1 for each legal action that may be chosen, shape (n_actions,),
        by default for all that are legal; what is learned of the state does not depend on it.
        Raises AgentStateError if called out of order, or if the observation does not fit.
        """
        if self._pending is not None:
            raise AgentStateError(
                "agent.step() was called twice in a row; expected agent.observe(next_time_step) "
                "after every step. Use agent.act() for actions that are not to be learned from."
            )
        kind = int(time_step.step_type)
        if kind == LAST:
            raise AgentStateError(
                "agent.step() received the LAST time step of an episode, where no action is left "
                "to take. Reset the environment and step from its first time step."
            )
        if kind == FIRST:
            self._begin()
        state, legal = self._observation(time_step)
        preferences, info = self._evaluate(state, legal)
        forced = action is not None
        if action is None:
            action = self._choose(preferences, legal if allowed is None else allowed, explore)
        elif not 0 <= action < self.n_actions or not legal[action]:
            raise AgentStateError(
                f"agent.step(action={action}) is not legal here; expected one of "
                f"{np.flatnonzero(legal).tolist()}. Leave action out to let the policy choose."
            )
        self._pending = {
            "state": state,
            "legal": legal,
            "action": int(action),
            "info": info,
            "forced": forced,
            "step_type": kind,
        }
        return int(action)

    def observe(self, next_time_step: Any) -> None:
        """Records what followed the last `step`.

        Raises AgentStateError if no `step` came before, or the reward or observation is not finite.
        """
        if self._pending is None:
            raise AgentStateError(
                "agent.observe() was called without agent.step() before it; expected one observe "
                "for every step."
            )
        reward = float(next_time_step.reward)
        if not np.isfinite(reward):
            raise AgentStateError(
                f"agent.observe() received the reward {reward}; expected a finite number in "
                "[-1, 1]. Look for a division by zero in the environment's reward."
            )
        next_state, next_legal = self._observation(next_time_step, last_is_fine=True)
        self._episode.append(
            Transition(
                **self._pending,
                next_step_type=int(next_time_step.step_type),
                reward=reward,
                discount=float(next_time_step.discount),
                next_state=next_state,
                next_legal=next_legal,
            )
        )
        self._pending = None

    def end_episode(
        self,
        bonus: float | Sequence[float] = 0.0,
        *,
        worth: float | Sequence[float] | None = None,
    ) -> dict[str, float]:
        """Ends the search episode: amends its rewards and learns from it.

        `bonus` is added to the reward of the last transition of every environment episode in this
        search episode; the sum is clipped to [-1, 1]. `worth` is, instead of a bonus, what the
        rewards of every environment episode shall add up to: the last takes the others back, which
        then shape learning but not which policy is best (Ng, Harada & Russell 1999), as long as
        nothing is discounted. Either may be a sequence, with a number for each environment episode
        in order.

        Losses are by name; there are none where nothing was trained this time. Raises
        AgentStateError if an environment episode is not finished or nothing was recorded, and
        ArgumentError if the bonus or the worth is not finite, or a sequence of wrong length.
        """
        for name, value in (("bonus", bonus), ("worth", 0.0 if worth is None else worth)):
            if not np.isfinite(value).all():
                raise ArgumentError(f"{name}={value!r}: expected a finite number, best in [-1, 1].")
        if self._pending is not None or not self._episode:
            raise AgentStateError(
                "agent.end_episode() was called "
                + ("between step() and observe()" if self._pending else "with nothing recorded")
                + "; expected one or more finished environment episodes before it."
            )
        if self._episode[-1].next_step_type != LAST:
            raise AgentStateError(
                "agent.end_episode() was called in the middle of an environment episode; play it "
                "to its LAST time step, or drop it with agent.discard_episode()."
            )
        count = sum(transition.next_step_type == LAST for transition in self._episode)
        bonuses, worths = _one_each("bonus", bonus, count), _one_each("worth", worth, count)
        transitions = []
        paid, ended = 0.0, 0
        for transition in self._episode:
            if transition.next_step_type != LAST:
                paid += transition.reward
            else:
                amended = float(np.clip(transition.reward + bonuses[ended], -1.0, 1.0))
                amended = amended if worth is None else worths[ended] - paid
                transition = dataclasses.replace(transition, reward=amended)
                paid, ended = 0.0, ended + 1
            transitions.append(transition)
        losses = self._learn(transitions)
        self._episode = []
        self.episodes += 1
        return losses

    def discard_episode(self) -> None:
        """Forgets what was recorded since the last `end_episode`."""
        self._pending = None
        self._episode = []

    # -- what subclasses fill in -----------------------------------------------------------------

    @abc.abstractmethod
    def _evaluate(
        self, state: NDArray[np.float32], legal: NDArray[np.int32]
    ) -> tuple[NDArray[np.float64], dict[str, NDArray[np.float32]]]:
        """Preferences over the actions (logits or Q values), and what training needs of them."""

    @abc.abstractmethod
    def _probabilities(
        self, preferences: NDArray[np.float64], legal: NDArray[np.int32]
    ) -> NDArray[np.float64]:
        """The probabilities to sample from while exploring; 0 for illegal actions."""

    def _begin(self) -> None:  # noqa: B027
        """Called at the first step of every environment episode."""

    @abc.abstractmethod
    def _learn(self, transitions: list[Transition]) -> dict[str, float]:
        """Trains on one search episode; losses are by name."""

    @abc.abstractmethod
    def tracing_count(self) -> int:
        """How often the agent's `tf.function`s have been traced so far, in total."""

    def _arrays(self) -> dict[str, NDArray[Any]]:
        """The subclass's part of `get_state`."""
        return {}

    def _set_arrays(self, state: Mapping[str, NDArray[Any]]) -> None:  # noqa: B027
        """Takes back what `_arrays` gave; the names and shapes have been checked."""

    # -- handing on what was learned -------------------------------------------------------------

    @abc.abstractmethod
    def policy_arrays(self) -> list[NDArray[np.float32]]:
        """The weights of the networks that decide (and of those that rate states), in order."""

    @abc.abstractmethod
    def set_policy_arrays(self, arrays: Sequence[NDArray[np.float32]]) -> None:
        """Begins with what another agent has learned; optimizer and replay stay as they are.

        A policy that knows something explores as one at the end of its schedule. Raises
        AgentStateError if the networks differ, or a search episode is under way.
        """

    # -- keeping ---------------------------------------------------------------------------------

    def get_state(self) -> dict[str, NDArray[Any]]:
        """Everything learned, as arrays: weights, optimizer, counters, generator, replay.

        Raises AgentStateError if a search episode is under way.
        """
        if self._pending is not None or self._episode:
            raise AgentStateError(
                "agent.get_state() was called in the middle of a search episode; call "
                "agent.end_episode() or agent.discard_episode() first."
            )
        return {
            "agent": np.array(self.name),
            "format_version": np.array(_FORMAT_VERSION),
            "episodes": np.array(self.episodes),
            "generator": pack_generator(self._generator),
            **{key: np.array(value) for key, value in self._arrays().items()},
        }

    def set_state(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Goes on from where `get_state` was called.

        Raises AgentStateError if the state is of another agent, configuration or specs.
        """
        kind = str(state["agent"]) if "agent" in state else "nothing known"
        version = int(state["format_version"]) if "format_version" in state else None
        if kind != self.name or version != _FORMAT_VERSION:
            raise AgentStateError(
                f"The state is of {kind!r}, format {version}; expected {self.name!r}, format "
                f"{_FORMAT_VERSION}. Build the agent from the configuration that saved it."
            )
        self._check_arrays(state)
        self.discard_episode()
        self.episodes = int(state["episodes"])
        self._generator = unpack_generator(state["generator"])
        self._set_arrays(state)

    def _check_arrays(self, state: Mapping[str, NDArray[Any]]) -> None:
        mine = {"episodes": np.array(0), "generator": pack_generator(self._generator)}
        for key, value in {**mine, **self._arrays()}.items():
            found = np.shape(state[key]) if key in state else None
            kind = np.asarray(state[key]).dtype if key in state else None
            # Episodes waiting to be learned from differ in number and length from state to state.
            if found != value.shape and not key.startswith("waiting/"):
                raise AgentStateError(
                    f"The state has {'no ' if found is None else ''}{key!r}"
                    + ("" if found is None else f" of shape {found}")
                    + f"; expected shape {value.shape}. Build the agent from the configuration "
                    "and the environment that saved it."
                )
            if kind != value.dtype and not key.startswith("waiting/"):
                raise AgentStateError(
                    f"The state has {key!r} of type {kind}; expected {value.dtype}. Build the "
                    "agent from the configuration and the environment that saved it."
                )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes `get_state` to a .npz file; an older file of that name is replaced at once."""
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.savez(file, **self.get_state())  # type: ignore[arg-type]

    def load(self, path: str | os.PathLike[str]) -> None:
        """Reads what `save` wrote.

        Raises AgentStateError if the file is damaged or of another agent, configuration or specs,
        and FileError if it cannot be read.
        """
        expected = "a file that the agent's save wrote"
        path = as_file("path", path, expected)
        with reading(path, expected):
            try:
                state = load_arrays(path)
            except ArrayFileError as error:
                raise AgentStateError(f"{str(path)!r} {error}. Expected {expected}.") from error
        self.set_state(state)

    # -- helpers ---------------------------------------------------------------------------------

    def _choose(
        self, preferences: NDArray[np.float64], legal: NDArray[np.int32], explore: bool
    ) -> int:
        if explore:
            return spin(self._probabilities(preferences, legal), self._generator)
        return int(np.argmax(np.where(legal > 0, preferences, -np.inf)))

    def _observation(
        self, time_step: Any, last_is_fine: bool = False
    ) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
        state = np.asarray(time_step.observation["state"], np.float32)
        legal = np.asarray(time_step.observation["legal"], np.int32)
        if state.shape != (self.n_features,) or legal.shape != (self.n_actions,):
            raise AgentStateError(
                f"The observation has a state of shape {state.shape} and a legal mask of shape "
                f"{legal.shape}; expected ({self.n_features},) and ({self.n_actions},), as in the "
                "specs the agent was built with."
            )
        if not np.isfinite(state).all():
            raise AgentStateError(
                f"The observation's state is not finite at {np.flatnonzero(~np.isfinite(state))}; "
                "expected finite numbers. Look for a division by zero in the environment's state."
            )
        if not legal.any() and not (last_is_fine and int(time_step.step_type) == LAST):
            raise AgentStateError(
                "The observation's legal mask allows no action; expected at least one 1. Keep one "
                "operation legal in every state."
            )
        return state, legal


def _one_each(name: str, values: float | Sequence[float] | None, count: int) -> list[float]:
    """A number for each environment episode, from one for all of them or a sequence."""
    numbers = np.asarray(0.0 if values is None else values, np.float64)
    if numbers.ndim and numbers.shape != (count,):
        raise ArgumentError(
            f"{name}={values!r} has {len(numbers)} numbers for {count} environment episodes; "
            "expected one for all of them, or one for each in order."
        )
    found: list[float] = np.broadcast_to(numbers, (count,)).tolist()
    return found
