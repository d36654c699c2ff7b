"""A strict check of environments, with advice on what to mend.

TF-Agents' `validate_py_environment` compares time steps with their specs. It lets NaN through
unbounded specs, and says nothing about determinism, about saving and restoring, or about masks.
The search relies on all of these, so every environment is expected to pass this check.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rl_sparsity_tf.agents.base import FIRST
from rl_sparsity_tf.environment._tf_agents import array_spec, environment_utils, py_environment
from rl_sparsity_tf.errors import ArgumentError


class EnvironmentCheckError(AssertionError):
    """An environment breaks the contract that the agents rely on."""


REWARD_BOUNDS = (-1.0, 1.0)
"""What rewards are held to; a reward spec may narrow it."""

# Specs and endless episodes come before TF-Agents' own validation, which loops for ever on the
# latter; its messages come after ours, which say what to do.
RULES = (
    "specs",
    "episodes_end",
    "steps",
    "tf_agents_validation",
    "fresh_start",
    "determinism",
    "replay",
    "illegal_actions",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckReport:
    """What a successful check has seen."""

    episodes: int
    """Episodes played for the per-step rules."""
    steps: int
    """Steps played in them."""
    min_reward: float
    """Smallest reward seen."""
    max_reward: float
    """Largest reward seen."""
    longest_episode: int
    """Steps of the longest episode."""
    illegal_actions: int
    """Illegal actions tried; 0 if the masks seen forbade nothing."""
    rules: tuple[str, ...]
    """Names of the rules that held, in the order of checking."""

    def __str__(self) -> str:
        return (
            f"environment ok: {len(self.rules)} rules held over {self.episodes} episodes "
            f"({self.steps} steps, longest {self.longest_episode}), rewards from "
            f"{self.min_reward:.3g} to {self.max_reward:.3g}"
        )


def check_environment(
    env: py_environment.PyEnvironment,
    *,
    episodes: int = 3,
    seed: int = 0,
    max_steps: int = 1000,
) -> CheckReport:
    """Checks that an environment keeps the contract the agents and the search rely on.

    Runs TF-Agents' `validate_py_environment`, then checks: bounded specs; finite observations and
    rewards within bounds; a legal action in every time step; episodes that end; a fresh start
    after the last step; equal resets and actions giving bit-equal time steps; `get_state` and
    `set_state` replaying bit for bit; an illegal action doing no harm. An environment that draws
    at random may implement `seed(seed)`; it is called before each reset that has to be equal.

    Args:
        env: The environment; it is left freshly reset.
        episodes: Episodes to play with random legal actions.
        seed: Seed of these actions.
        max_steps: Steps after which an episode counts as endless.

    Returns:
        What was seen.

    Raises:
        ArgumentError: If `env` is no unbatched `PyEnvironment` or a number is below 1.
        EnvironmentCheckError: If a rule is broken; the message says how to mend it.

    Example:
        >>> print(check_environment(env))
        environment ok: 8 rules held over 3 episodes (18 steps, longest 6), rewards from -0.5 to 1
    """
    if not isinstance(env, py_environment.PyEnvironment) or env.batched:
        raise ArgumentError(
            f"env={type(env).__name__}: expected an unbatched tf_agents PyEnvironment. Derive your "
            "environment from tf_agents.environments.py_environment.PyEnvironment."
        )
    for name, value in (("episodes", episodes), ("max_steps", max_steps)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ArgumentError(f"{name}={value!r}: expected an integer of at least 1.")
    checker = _Checker(env, episodes, seed, max_steps)
    for rule in RULES:
        getattr(checker, rule)()
    env.reset()
    return CheckReport(
        episodes=episodes,
        steps=len(checker.rewards),
        min_reward=min(checker.rewards),
        max_reward=max(checker.rewards),
        longest_episode=checker.longest,
        illegal_actions=checker.illegal_tried,
        rules=RULES,
    )


def _split(observation: dict[str, Any]) -> tuple[Any, Any]:
    return observation["state"], observation["legal"]


def _fail(what: str, advice: str) -> EnvironmentCheckError:
    return EnvironmentCheckError(f"{what} {advice}")


class _Checker:
    """One method for each rule; each raises on the first breach."""

    def __init__(
        self, env: py_environment.PyEnvironment, episodes: int, seed: int, max_steps: int
    ) -> None:
        self.env, self.n_episodes, self.seed, self.max_steps = env, episodes, seed, max_steps
        self.generator = np.random.default_rng(seed)
        self.rewards: list[float] = []
        self.longest = 0
        self.illegal_tried = 0

    # -- rules, in the order in which they are checked -------------------------------------------

    def specs(self) -> None:
        """Specs are bounded and of the agreed form."""
        action = self.env.action_spec()
        scalar = isinstance(action, array_spec.BoundedArraySpec) and action.shape == ()
        if not scalar or action.dtype != np.int32 or int(action.minimum) != 0:
            raise _fail(
                f"The action spec is {action!r}; expected one scalar int32 counted from 0.",
                "Return BoundedArraySpec((), np.int32, minimum=0, maximum=n_actions - 1).",
            )
        observation = self.env.observation_spec()
        if not isinstance(observation, dict) or set(observation) != {"state", "legal"}:
            raise _fail(
                f"The observation spec is {observation!r}; expected a dict of 'state' and 'legal'.",
                "Return both as BoundedArraySpec; agents mask their actions by 'legal'.",
            )
        for key, spec in observation.items():
            bounded = isinstance(spec, array_spec.BoundedArraySpec)
            # A bound at the end of the dtype's range is how TF-Agents spells "no bound".
            if not bounded or np.any(np.abs(np.asarray([spec.minimum, spec.maximum], float)) > 1e6):
                raise _fail(
                    f"The observation spec of {key!r} is unbounded: {spec!r}.",
                    "Scale it into [-1, 1] or [0, 1] and return a BoundedArraySpec with these "
                    "bounds; unbounded specs let NaN and infinity through.",
                )
        state, legal = observation["state"], observation["legal"]
        if state.dtype != np.float32 or len(state.shape) != 1:
            raise _fail(
                f"The spec of 'state' is {state.dtype} of shape {state.shape}; expected float32 of "
                "shape (n_features,).",
                "Flatten the features and convert them with np.float32.",
            )
        self.n_actions = int(action.maximum) + 1
        if legal.dtype != np.int32 or legal.shape != (self.n_actions,):
            raise _fail(
                f"The spec of 'legal' is {legal.dtype} of shape {legal.shape}; expected int32 of "
                f"shape ({self.n_actions},).",
                "Return one 0 or 1 for each action of the action spec.",
            )

    def episodes_end(self) -> None:
        """Episodes reach a LAST time step."""
        for _ in range(self.n_episodes):
            step, count = self.env.reset(), 0
            while not step.is_last():
                if count >= self.max_steps:
                    raise _fail(
                        f"An episode did not end within {self.max_steps} steps.",
                        "Return ts.termination(...) at the last bucket, or raise max_steps if "
                        "episodes are meant to be longer.",
                    )
                step = self.env.step(self._random_action(step))
                count += 1
            self.longest = max(self.longest, count)

    def steps(self) -> None:
        """Every time step is finite, in bounds and leaves a legal action."""
        for _ in range(self.n_episodes):
            step = self.env.reset()
            self._check_step(step)
            while not step.is_last():
                step = self.env.step(self._random_action(step))
                self._check_step(step)
                self.rewards.append(float(step.reward))

    def tf_agents_validation(self) -> None:
        """TF-Agents' own validation passes."""
        try:
            environment_utils.validate_py_environment(
                self.env,
                episodes=self.n_episodes,
                observation_and_action_constraint_splitter=_split,
            )
        except ValueError as error:
            raise _fail(
                f"TF-Agents' validate_py_environment refuses the environment: {error}",
                "Make the arrays returned agree with the specs in dtype, shape and bounds.",
            ) from error

    def fresh_start(self) -> None:
        """After LAST, both step and reset begin a new episode."""
        for name in ("step", "reset"):
            self._play_on(self.env.reset())
            after = self.env.step(np.int32(0)) if name == "step" else self.env.reset()
            if int(after.step_type) != FIRST:
                raise _fail(
                    f"{name}() after the LAST time step returned step type "
                    f"{int(after.step_type)}; expected FIRST (0).",
                    "Remember that the episode has ended, and return self.reset() from _step then; "
                    "return ts.restart(...) from _reset.",
                )

    def determinism(self) -> None:
        """Equal resets and equal actions give bit-equal time steps."""
        first, actions = self._play()
        second, _ = self._play(actions)
        self._same(
            first,
            second,
            "Two resets followed by the same actions",
            "Draw random numbers from a generator that _reset restarts (or implement "
            "seed(seed)), and clear everything that _step has changed.",
        )

    def replay(self) -> None:
        """get_state and set_state bring a past moment back exactly."""
        self._seed()
        step = self.env.reset()
        length = max(1, self.longest)
        for _ in range(int(self.generator.integers(0, length))):
            following = self.env.step(self._random_action(step))
            if following.is_last():
                # Restoring the end would prove nothing, so go back to the start.
                self._seed()
                following = self.env.reset()
            step = following
        try:
            state = self.env.get_state()
            first, actions = self._play_on(step)
            self.env.set_state(state)
        except NotImplementedError as error:
            raise _fail(
                "get_state() or set_state() is not implemented.",
                "Return a copy of everything that _step reads or changes, and take it back.",
            ) from error
        second, _ = self._play_on(step, actions)
        self._same(
            first,
            second,
            "The same actions after set_state(get_state())",
            "Put copies of everything that _step reads or changes into the state, random "
            "generators included, and restore all of it.",
        )

    def illegal_actions(self) -> None:
        """An illegal action is survived and leaves a proper time step."""
        step = self.env.reset()
        for _ in range(self.n_episodes * max(1, self.longest)):
            if step.is_last():
                step = self.env.reset()
            illegal = np.flatnonzero(step.observation["legal"] == 0)
            action = illegal[0] if len(illegal) else np.flatnonzero(step.observation["legal"])[0]
            self.illegal_tried += int(len(illegal) > 0)
            try:
                step = self.env.step(np.int32(action))
            except Exception as error:
                raise _fail(
                    f"step({action}) raised {type(error).__name__}: {error}; the action was "
                    "illegal by the mask.",
                    "Execute an illegal action as Keep (0), and count it.",
                ) from error
            self._check_step(step)

    # -- helpers ---------------------------------------------------------------------------------

    def _seed(self) -> None:
        try:
            self.env.seed(self.seed)
        except NotImplementedError:
            return

    def _legal(self, step: Any) -> NDArray[np.int32]:
        legal = np.asarray(step.observation["legal"])
        if not np.isin(legal, (0, 1)).all() or not legal.any():
            raise _fail(
                f"The legal mask is {legal.tolist()} at step type {int(step.step_type)}; expected "
                "0s and 1s with at least one 1.",
                "Keep one action (Keep) legal in every time step, the LAST included: TF-Agents' "
                "policies are asked there as well.",
            )
        return legal

    def _random_action(self, step: Any) -> np.int32:
        return np.int32(self.generator.choice(np.flatnonzero(self._legal(step))))

    def _check_step(self, step: Any) -> None:
        for key, spec in self.env.observation_spec().items():
            value = np.asarray(step.observation[key])
            if value.dtype != spec.dtype or value.shape != spec.shape:
                raise _fail(
                    f"observation[{key!r}] is {value.dtype} of shape {value.shape}; the spec says "
                    f"{spec.dtype} of shape {spec.shape}.",
                    "Convert it with np.asarray(value, dtype), or correct the spec.",
                )
            if not np.isfinite(value).all():
                where = np.flatnonzero(~np.isfinite(value)).tolist()
                raise _fail(
                    f"observation[{key!r}] is not finite at {where}.",
                    "Look for a division by a variance or a count of 0, and for a logarithm of 0.",
                )
            if np.any(value < spec.minimum) or np.any(value > spec.maximum):
                raise _fail(
                    f"observation[{key!r}] leaves its bounds: it reaches from {value.min()} to "
                    f"{value.max()}, the spec allows {np.min(spec.minimum)} to "
                    f"{np.max(spec.maximum)}.",
                    "Squash it (np.tanh, x / (1 + x)) or clip it with np.clip.",
                )
        self._legal(step)
        spec = self.env.reward_spec()
        low, high = REWARD_BOUNDS
        if isinstance(spec, array_spec.BoundedArraySpec):
            low, high = (
                max(low, float(np.min(spec.minimum))),
                min(high, float(np.max(spec.maximum))),
            )
        reward = np.asarray(step.reward)
        if reward.shape != () or not np.isfinite(reward) or not low <= reward <= high:
            raise _fail(
                f"The reward is {reward}; expected one finite number in [{low:.6g}, {high:.6g}].",
                "Scale the reward and clip it with np.clip; replace what is undefined by the "
                "worst reward.",
            )

    def _play(self, actions: list[np.int32] | None = None) -> tuple[list[Any], list[np.int32]]:
        self._seed()
        step = self.env.reset()
        steps, actions = self._play_on(step, actions)
        return [copy.deepcopy(step), *steps], actions

    def _play_on(
        self, step: Any, actions: list[np.int32] | None = None
    ) -> tuple[list[Any], list[np.int32]]:
        """Plays to the end of the episode, with given actions or random ones."""
        steps: list[Any] = []
        taken: list[np.int32] = []
        while not step.is_last() and len(taken) < self.max_steps:
            if actions is not None and len(taken) >= len(actions):
                break
            action = actions[len(taken)] if actions is not None else self._random_action(step)
            step = self.env.step(action)
            taken.append(action)
            steps.append(copy.deepcopy(step))
        return steps, taken

    def _same(self, first: list[Any], second: list[Any], what: str, advice: str) -> None:
        if len(first) != len(second):
            raise _fail(
                f"{what} gave {len(first)} and then {len(second)} time steps; expected the same.",
                advice,
            )
        for number, (one, other) in enumerate(zip(first, second, strict=True)):
            pairs = {
                "step_type": (one.step_type, other.step_type),
                "reward": (one.reward, other.reward),
                "discount": (one.discount, other.discount),
                **{
                    f"observation[{key!r}]": (one.observation[key], other.observation[key])
                    for key in one.observation
                },
            }
            for name, (a, b) in pairs.items():
                if np.asarray(a).tobytes() != np.asarray(b).tobytes():
                    raise _fail(
                        f"{what} gave a different {name} at time step {number}: {a} and {b}; "
                        "expected the same bits.",
                        advice,
                    )


def legal_of(time_step: Any) -> list[int]:
    """The actions that an observation allows."""
    return np.flatnonzero(time_step.observation["legal"]).tolist()


def bits(time_step: Any) -> bytes:
    """All that a time step says, to compare it to the bit."""
    parts = (time_step.step_type, time_step.reward, time_step.discount)
    parts += (time_step.observation["state"], time_step.observation["legal"])
    return b"".join(np.asarray(part).tobytes() for part in parts)


def play(env: Any, choose: Callable[[Any], int], time_step: Any = None) -> list[Any]:
    """Plays an episode to its end; returns its time steps."""
    steps = [env.reset() if time_step is None else time_step]
    while not steps[-1].is_last():
        steps.append(env.step(np.int32(choose(steps[-1]))))
    return steps
