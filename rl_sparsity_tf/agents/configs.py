"""The agents that choose operations: their configurations and the door to build them.

A configuration (`DQN`, `PPO`, `Random`) is plain data: it can be made, compared and written to a
manifest without TF-Agents. [build_agent][] turns one into an [Agent][], which runs TF-Agents'
own `DqnAgent`, `DdqnAgent` or `PPOClipAgent`. Swapping one for the other needs no other edit.
"""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import math
from typing import Any, ClassVar

from rl_sparsity_tf.agents.base import Agent
from rl_sparsity_tf.errors import ArgumentError, MissingDependencyError, check_choice
from rl_sparsity_tf.settings import NamedSettings


@dataclasses.dataclass(frozen=True, kw_only=True)
class AgentConfig(NamedSettings):
    """What the configurations share."""

    kind: ClassVar[str] = "agent"

    @classmethod
    def _instead(cls, key: str, known: list[str]) -> str:
        return _owner_of(key) or super()._instead(key, known)

    def policy_shapes(
        self, features: int, actions: int, slots: SlotShape | None = None
    ) -> list[tuple[int, ...]]:
        """Shapes of a policy's weights, in order; none for agents that do not learn.

        Args:
            features: Numbers in a state.
            actions: How many actions there are.
            slots: What the state is made of, if one network scores the actions of every slot.
        """
        return []

    def _number(
        self,
        name: str,
        low: float,
        high: float = math.inf,
        *,
        integer: bool = False,
        open_low: bool = False,
    ) -> None:
        """Checks that a field is a number of [low, high], or of (low, high]."""
        value = getattr(self, name)
        kind = int if integer else (int, float)
        fits = isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(value)
        if not fits or not low <= value <= high or (open_low and value == low):
            above = f"above {low}" if open_low else f"of at least {low}"
            below = "" if high == math.inf else f" and at most {high}"
            default = next(f.default for f in dataclasses.fields(self) if f.name == name)
            raise ArgumentError(
                f"{type(self).__name__}({name}={value!r}): expected "
                f"{'an integer' if integer else 'a number'} {above}{below}, "
                f"for instance {name}={default!r}."
            )

    def _hidden_layers(self) -> None:
        """Checks `hidden_layers` and turns a list, as JSON gives it, into a tuple."""
        sizes: Any = getattr(self, "hidden_layers", None)
        good = isinstance(sizes, list | tuple) and all(
            isinstance(size, int) and not isinstance(size, bool) and size >= 1 for size in sizes
        )
        if not good:
            raise ArgumentError(
                f"{type(self).__name__}(hidden_layers={sizes!r}): expected a sequence of layer "
                "widths, each an integer of at least 1, for instance hidden_layers=(64, 64); () "
                "decides linearly."
            )
        object.__setattr__(self, "hidden_layers", tuple(sizes))


@dataclasses.dataclass(frozen=True, kw_only=True)
class DQN(AgentConfig):
    """Deep Q-learning (Mnih et al. 2015), by default double (van Hasselt et al. 2016).

    Off-policy: every transition is kept and learned from many times, which suits searches of few
    episodes. The defaults were chosen for 10 to 60 search episodes of 20 to 60 steps.

    Raises:
        ArgumentError: If a setting is out of range.

    Example:
        >>> rls.DQN(learning_rate=1e-3, exploration="boltzmann").exploration
        'boltzmann'
    """

    name: ClassVar[str] = "dqn"

    learning_rate: float = 2e-3
    """Adam's step size, in (0, 1]."""

    hidden_layers: tuple[int, ...] = (64, 64)
    """Widths of the Q-network's hidden layers (ReLU)."""

    discount: float = 1.0
    """How much a reward one step later counts, in [0, 1]."""

    exploration: str = "epsilon"
    """`"epsilon"`: now and then a uniformly random legal action; `"boltzmann"`: softmax of Q."""

    epsilon_start: float = 1.0
    """Probability of a random action in the first search episode, in [0, 1]."""

    epsilon_end: float = 0.05
    """Probability of a random action after `epsilon_episodes`, in [0, `epsilon_start`]."""

    epsilon_episodes: int = 15
    """Search episodes over which epsilon falls linearly from start to end."""

    persistence: float = 2.0
    """How long a random action is repeated: n steps with a probability in proportion to
    n^-persistence, as long as it is legal, within an episode (Dabney et al. 2021, "Temporally-
    extended epsilon-greedy exploration", arXiv 2006.01782). 0 draws anew at every step."""

    temperature: float = 0.1
    """Boltzmann temperature, in units of reward; small is greedy. By it a random action is drawn,
    too, among those that are not the best one known."""

    replay_capacity: int = 10_000
    """Transitions kept; the oldest are overwritten."""

    batch_size: int = 64
    """Transitions per training step."""

    train_steps: int = 50
    """Training steps after each search episode."""

    target_update_period: int = 25
    """Training steps between two copies of the Q-network into the target network."""

    n_step: int = 3
    """Steps whose rewards are summed before the target network is asked. 1 learns fastest where
    every step has its own reward; the length of an episode where only its end is rewarded."""

    double: bool = True
    """Whether the online network chooses the action that the target network rates (DdqnAgent)."""

    def __post_init__(self) -> None:
        """Checks every setting."""
        self._number("learning_rate", 0, 1, open_low=True)
        self._hidden_layers()
        self._number("discount", 0, 1)
        check_choice("exploration", self.exploration, ("epsilon", "boltzmann"))
        self._number("epsilon_start", 0, 1)
        self._number("epsilon_end", 0, 1)
        if self.epsilon_end > self.epsilon_start:
            raise ArgumentError(
                f"DQN(epsilon_start={self.epsilon_start!r}, epsilon_end={self.epsilon_end!r}): "
                "expected exploration to fall, so epsilon_end at most epsilon_start. Swap the two."
            )
        self._number("epsilon_episodes", 1, integer=True)
        self._number("persistence", 0)
        if 0 < self.persistence <= 1:
            raise ArgumentError(
                f"DQN(persistence={self.persistence!r}): expected 0, or more than 1, where the "
                "durations have a distribution; for instance persistence=2.0."
            )
        self._number("temperature", 0, open_low=True)
        self._number("batch_size", 1, integer=True)
        self._number("train_steps", 1, integer=True)
        self._number("target_update_period", 1, integer=True)
        self._number("n_step", 1, integer=True)
        self._number("replay_capacity", 2, integer=True)
        if self.replay_capacity < self.n_step + 2:
            raise ArgumentError(
                f"DQN(replay_capacity={self.replay_capacity}, n_step={self.n_step}): expected "
                "room for more than one n-step sequence. Raise replay_capacity to at least "
                f"{self.n_step + 2}."
            )
        if not isinstance(self.double, bool):
            raise ArgumentError(f"DQN(double={self.double!r}): expected True or False.")

    def policy_shapes(
        self, features: int, actions: int, slots: SlotShape | None = None
    ) -> list[tuple[int, ...]]:
        """Shapes of the Q-network's weights: kernel and bias of every layer."""
        return _deciding_shapes(features, self.hidden_layers, actions, slots)

    def epsilon(self, episode: int) -> float:
        """The probability of a random action in search episode `episode` (from 0)."""
        progress = min(1.0, episode / self.epsilon_episodes)
        return self.epsilon_start + (self.epsilon_end - self.epsilon_start) * progress


@dataclasses.dataclass(frozen=True, kw_only=True)
class PPO(AgentConfig):
    """Proximal policy optimisation with the clipped objective (Schulman et al. 2017).

    On-policy: every `episodes_per_update` search episodes are learned from for `num_epochs` full
    passes and then dropped.

    Raises:
        ArgumentError: If a setting is out of range.

    Example:
        >>> rls.PPO(learning_rate=1e-3, clip_ratio=0.1).clip_ratio
        0.1
    """

    name: ClassVar[str] = "ppo"

    learning_rate: float = 3e-3
    """Adam's step size, in (0, 1]."""

    hidden_layers: tuple[int, ...] = (64, 64)
    """Widths of the hidden layers (tanh) of the actor and of the value network."""

    discount: float = 1.0
    """How much a reward one step later counts, in [0, 1]."""

    gae_lambda: float = 0.95
    """Generalised advantage estimation: 0 trusts the value network, 1 the rewards seen."""

    clip_ratio: float = 0.2
    """How far the probability of an action may move in one update, as a ratio, in (0, 1)."""

    entropy: float = 0.01
    """Weight of the entropy bonus; larger explores longer."""

    num_epochs: int = 20
    """Passes over the collected episodes per update."""

    episodes_per_update: int = 1
    """Search episodes collected before each update."""

    relaxed_reward: float = 0.0
    """Step size of the relaxed reward's gradient, as a multiple of `learning_rate`; 0 is off.
    After each search episode that the policy played, `num_epochs` more steps follow the loss
    itself through differentiable masks (see `relaxation.Relaxation`), on training data."""

    def __post_init__(self) -> None:
        """Checks every setting."""
        self._number("learning_rate", 0, 1, open_low=True)
        self._hidden_layers()
        self._number("discount", 0, 1)
        self._number("gae_lambda", 0, 1)
        self._number("clip_ratio", 0, 1, open_low=True)
        self._number("entropy", 0)
        self._number("num_epochs", 1, integer=True)
        self._number("episodes_per_update", 1, integer=True)
        self._number("relaxed_reward", 0)

    def policy_shapes(
        self, features: int, actions: int, slots: SlotShape | None = None
    ) -> list[tuple[int, ...]]:
        """Shapes of the weights of the actor, then of the value network."""
        actor = _deciding_shapes(features, self.hidden_layers, actions, slots)
        return actor + _layer_shapes(features, self.hidden_layers, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Random(AgentConfig):
    """Uniformly random legal actions: the baseline every learned policy has to beat.

    Example:
        >>> compressor = rls.Compressor(model, rls.Target(sparsity=0.9), agent=rls.Random())
    """

    name: ClassVar[str] = "random"


def _layer_shapes(inputs: int, hidden: tuple[int, ...], outputs: int) -> list[tuple[int, ...]]:
    sizes = (inputs, *hidden, outputs)
    return [shape for a, b in itertools.pairwise(sizes) for shape in ((a, b), (b,))]


def _deciding_shapes(
    features: int, hidden: tuple[int, ...], actions: int, slots: SlotShape | None
) -> list[tuple[int, ...]]:
    """Of a network that decides: of slots, with a last layer for the first and one for the rest."""
    if slots is None:
        return _layer_shapes(features, hidden, actions)
    shapes = _layer_shapes(slots.shared + slots.features, hidden, actions // slots.slots)
    return [*shapes, *shapes[-2:]]


_CONFIGS: dict[str, type[AgentConfig]] = {"dqn": DQN, "ppo": PPO, "random": Random}


def _owner_of(setting: str) -> str:
    """Says which agents have a setting; empty if none has."""
    owners = [
        config.__name__
        for config in _CONFIGS.values()
        if setting in {field.name for field in dataclasses.fields(config)}
    ]
    if not owners:
        return ""
    return f"It is one of {' and '.join(owners)}: leave it out, or use agent={owners[0].lower()!r}."


def config_from_dict(values: dict[str, Any]) -> AgentConfig:
    """The configuration that any agent's `to_dict` described.

    Raises ArgumentError if the agent or one of its settings is not known.

    Example:
        >>> config_from_dict({"agent": "ppo", "num_epochs": 5}).num_epochs
        5
    """
    name = check_choice("agent", values.get("agent"), _CONFIGS)
    return _CONFIGS[name].from_dict(values)


def resolve_config(agent: str | AgentConfig) -> AgentConfig:
    """The configuration meant by a name or by a configuration itself.

    Raises ArgumentError if the name is not known or the object is no configuration.
    """
    if isinstance(agent, str):
        return _CONFIGS[check_choice("agent", agent, _CONFIGS)]()
    if isinstance(agent, type) and issubclass(agent, AgentConfig):
        raise ArgumentError(
            f"agent={agent.__name__} is a class; expected an object. Write {agent.__name__}()."
        )
    if type(agent) not in _CONFIGS.values():
        raise ArgumentError(
            f"agent={agent!r} is a {type(agent).__name__}; expected 'dqn', 'ppo', 'random' or a "
            "configuration such as DQN(learning_rate=1e-3)."
        )
    return agent


@dataclasses.dataclass(frozen=True)
class SlotShape:
    """How a state is cut: features of all slots come first, then those of every slot.

    Actions are numbered slot by slot.
    """

    shared: int
    slots: int
    features: int


def build_agent(
    agent: str | AgentConfig,
    time_step_spec: Any,
    action_spec: Any,
    seed: int = 0,
    *,
    slots: SlotShape | None = None,
) -> Agent:
    """Builds an agent that has learned nothing yet, for environments of the given specs.

    Networks, exploration and replay draw from generators derived from `seed`. The replay draws from
    TensorFlow's global generator, whose seed is set here and before each training; Python's and
    NumPy's global generators are left as they were. The same seed (0 or more) and experience give
    the same actions.

    The observation must be a dict of `"state"` (float32, shape (F,)) and `"legal"` (int32, shape
    (n_actions,), 0 or 1), the action a scalar int32 from 0 to n_actions - 1. If the state is made
    of `slots`, one network scores the actions of every slot. Raises ArgumentError if the agent is
    not known or a spec does not fit, and MissingDependencyError if TF-Agents cannot be imported.

    Example:
        >>> agent = build_agent("dqn", env.time_step_spec(), env.action_spec(), seed=1)
        >>> action = agent.step(env.reset())
    """
    config = resolve_config(agent)
    if slots is not None:
        _check_slots(slots, time_step_spec, action_spec)
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise ArgumentError(f"seed={seed!r}: expected a non-negative integer, for instance seed=0.")
    try:
        importlib.import_module("rl_sparsity_tf.environment._tf_agents")
        module = importlib.import_module(f"rl_sparsity_tf.agents.{config.name}")
    except MissingDependencyError:
        raise
    except ImportError as error:
        raise MissingDependencyError(
            f"agent={config.name!r} needs TF-Agents, which could not be imported ({error}). "
            'Install it with: pip install "rl_sparsity_tf[rl]" on Python 3.11, or with: '
            "pip install --no-deps tf-agents==0.19.0 on other versions of Python."
        ) from error
    built: Agent = module.build(config, time_step_spec, action_spec, seed, slots)
    return built


def _check_slots(slots: SlotShape, time_step_spec: Any, action_spec: Any) -> None:
    found = int(time_step_spec.observation["state"].shape[0])
    actions = int(action_spec.maximum) + 1
    expected = slots.shared + slots.slots * slots.features
    if found != expected or actions % slots.slots:
        raise ArgumentError(
            f"slots={slots!r} does not fit a state of {found} features and {actions} actions. "
            f"Expected {expected} features, and as many actions for every slot."
        )
