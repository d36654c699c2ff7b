from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from environment_check import RULES, EnvironmentCheckError, check_environment
from tf_agents.environments import py_environment
from tf_agents.specs import array_spec
from tf_agents.trajectories import time_step as ts

from rl_sparsity_tf.environment import _tf_agents  # noqa: F401  (TF-Agents with Keras 2)
from rl_sparsity_tf.errors import ArgumentError

_spec = importlib.util.spec_from_file_location(
    "toy_environments", Path(__file__).parents[1] / "helpers" / "toy_environments.py"
)
toy = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(toy)


class Fixed(toy.ContextualEnvironment):
    """A correct environment without any randomness; the broken ones below derive from it."""

    def __init__(self) -> None:
        super().__init__(varied=False)


@pytest.mark.parametrize("varied", [False, True])
def test_correct_environment_passes(varied: bool) -> None:
    env = toy.ContextualEnvironment(varied=varied)
    report = check_environment(env)
    assert report.rules == RULES
    assert report.longest_episode == toy.STEPS
    assert report.steps == 3 * toy.STEPS
    assert report.illegal_actions > 0
    assert -1 <= report.min_reward < report.max_reward <= 1
    assert str(report).startswith("environment ok: 8 rules held over 3 episodes (18 steps")
    assert int(env.current_time_step().step_type) == 0


def test_the_check_is_repeatable() -> None:
    reports = [check_environment(Fixed(), seed=4) for _ in range(2)]
    assert reports[0] == reports[1]


class FloatAction(Fixed):
    def action_spec(self) -> Any:
        return array_spec.BoundedArraySpec((), np.float32, 0, 3)


class ActionFromOne(Fixed):
    def action_spec(self) -> Any:
        return array_spec.BoundedArraySpec((), np.int32, 1, 4)


class NoMask(Fixed):
    def observation_spec(self) -> Any:
        return super().observation_spec()["state"]


class UnboundedState(Fixed):
    def observation_spec(self) -> Any:
        return {
            **super().observation_spec(),
            "state": array_spec.ArraySpec((toy.CONTEXTS + 1,), np.float32),
        }


class HugeBounds(Fixed):
    def observation_spec(self) -> Any:
        low, high = np.finfo(np.float32).min, np.finfo(np.float32).max
        spec = array_spec.BoundedArraySpec((toy.CONTEXTS + 1,), np.float32, low, high)
        return {**super().observation_spec(), "state": spec}


class MatrixState(Fixed):
    def observation_spec(self) -> Any:
        spec = array_spec.BoundedArraySpec((2, 2), np.float32, 0, 1)
        return {**super().observation_spec(), "state": spec}


class ShortMask(Fixed):
    def observation_spec(self) -> Any:
        spec = array_spec.BoundedArraySpec((3,), np.int32, 0, 1)
        return {**super().observation_spec(), "legal": spec}


class Endless(Fixed):
    def _step(self, action: Any) -> ts.TimeStep:
        self.position = 0
        return ts.transition(self.observation(), np.float32(0))


class ChangedState(Fixed):
    """Lets a subclass spoil the state shown at the third step."""

    def spoil(self, state: np.ndarray) -> np.ndarray:
        return state

    def observation(self) -> dict[str, np.ndarray]:
        shown = super().observation()
        return {**shown, "state": self.spoil(shown["state"])} if self.position == 3 else shown


class NanState(ChangedState):
    def spoil(self, state: np.ndarray) -> np.ndarray:
        state[2] = np.nan
        return state


class StateOutOfBounds(ChangedState):
    def spoil(self, state: np.ndarray) -> np.ndarray:
        return state + np.float32(1.5)


class Float64State(ChangedState):
    def spoil(self, state: np.ndarray) -> np.ndarray:
        return state.astype(np.float64)


class NothingLegal(Fixed):
    def observation(self) -> dict[str, np.ndarray]:
        shown = super().observation()
        if self.position == toy.STEPS:
            shown["legal"][:] = 0
        return shown


class ChangedReward(Fixed):
    value: Any = np.float32(0)

    def _step(self, action: Any) -> ts.TimeStep:
        step = super()._step(action)
        return step._replace(reward=self.value) if self.position == 3 else step


class NanReward(ChangedReward):
    value = np.float32(np.nan)


class LargeReward(ChangedReward):
    value = np.float32(1.25)


class NarrowRewardSpec(ChangedReward):
    value = np.float32(-0.9)

    def reward_spec(self) -> Any:
        return array_spec.BoundedArraySpec((), np.float32, -0.8, 1.0)


class Float64Reward(ChangedReward):
    value = np.float64(0.5)


class StaysAtTheEnd(Fixed):
    def _step(self, action: Any) -> ts.TimeStep:
        if self.done:
            return self.current_time_step()
        return super()._step(action)


class NotReset(Fixed):
    """The first episode earns differently from all that follow an old one."""

    def __init__(self) -> None:
        super().__init__()
        self.plays = 0

    def _reset(self) -> ts.TimeStep:
        self.plays += 1
        return super()._reset()

    def _step(self, action: Any) -> ts.TimeStep:
        step = super()._step(action)
        if step.is_first():
            return step
        return step._replace(reward=np.float32(1.0 / (1 + self.plays)))


class OtherLength(NotReset):
    def _step(self, action: Any) -> ts.TimeStep:
        step = Fixed._step(self, action)
        if self.position == 3 - self.plays % 2 and not step.is_first():
            self.done = True
            return ts.termination(self.observation(), np.float32(0))
        return step


class NoState(Fixed):
    def get_state(self) -> Any:
        raise NotImplementedError


class NoSetState(Fixed):
    def set_state(self, state: Any) -> None:
        raise NotImplementedError


class ForgetfulState(Fixed):
    """Rewards depend on the sum so far, which is not part of the state."""

    def _step(self, action: Any) -> ts.TimeStep:
        step = super()._step(action)
        if step.is_first():
            return step
        return step._replace(reward=np.float32(np.tanh(self.total)))

    def get_state(self) -> Any:
        state = super().get_state()
        del state["total"]
        return state


class IllegalCrashes(Fixed):
    def _step(self, action: Any) -> ts.TimeStep:
        if not self.done and not self.masks[self.position][int(action)]:
            raise KeyError("no such operation")
        return super()._step(action)


BROKEN = [
    (FloatAction, r"action spec is .*expected one scalar int32 counted from 0.*Return Bounded"),
    (ActionFromOne, r"action spec is .*counted from 0"),
    (NoMask, r"expected a dict of 'state' and 'legal'.*Return both"),
    (UnboundedState, r"'state' is unbounded.*Scale it into"),
    (HugeBounds, r"'state' is unbounded.*Scale it into"),
    (MatrixState, r"'state' is float32 of shape \(2, 2\).*Flatten"),
    (ShortMask, r"'legal' is int32 of shape \(3,\); expected int32 of shape \(4,\).*one 0 or 1"),
    (Endless, r"did not end within 1000 steps.*ts\.termination"),
    (NanState, r"observation\['state'\] is not finite at \[2\].*division"),
    (StateOutOfBounds, r"observation\['state'\] leaves its bounds.*np\.clip"),
    (Float64State, r"observation\['state'\] is float64 .*the spec says float32.*Convert"),
    (NothingLegal, r"legal mask is \[0, 0, 0, 0\] at step type 2.*Keep one action"),
    (NanReward, r"reward is nan; expected one finite number in \[-1, 1\].*Scale"),
    (LargeReward, r"reward is 1\.25; expected one finite number in \[-1, 1\]"),
    (NarrowRewardSpec, r"reward is -0\.[89]\d*; .*in \[-0\.8, 1\]"),
    (Float64Reward, r"validate_py_environment refuses.*Make the arrays returned agree"),
    (StaysAtTheEnd, r"step\(\) after the LAST time step returned step type 2.*self\.reset\(\)"),
    (NotReset, r"Two resets followed by the same actions gave a different reward.*_reset restarts"),
    (OtherLength, r"Two resets .* gave \d and then \d time steps; expected the same"),
    (NoState, r"get_state\(\) or set_state\(\) is not implemented.*Return a copy"),
    (NoSetState, r"get_state\(\) or set_state\(\) is not implemented.*Return a copy"),
    (ForgetfulState, r"after set_state\(get_state\(\)\) gave a different reward.*Put copies"),
    (IllegalCrashes, r"raised KeyError.*illegal by the mask.*Execute an illegal action as Keep"),
]


@pytest.mark.parametrize(("broken", "message"), BROKEN, ids=[b.__name__ for b, _ in BROKEN])
def test_broken_environment_is_refused_with_advice(broken: type, message: str) -> None:
    with pytest.raises(EnvironmentCheckError, match=f"(?s){message}"):
        check_environment(broken())


@pytest.mark.parametrize("env", [object(), None])
def test_something_else_is_refused(env: Any) -> None:
    with pytest.raises(ArgumentError, match="expected an unbatched tf_agents PyEnvironment"):
        check_environment(env)


def test_batched_environment_is_refused() -> None:
    class Batched(Fixed):
        @property
        def batched(self) -> bool:
            return True

    assert issubclass(Batched, py_environment.PyEnvironment)
    with pytest.raises(ArgumentError, match="unbatched"):
        check_environment(Batched())


@pytest.mark.parametrize("setting", [{"episodes": 0}, {"max_steps": 0.5}, {"episodes": True}])
def test_numbers_are_checked(setting: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match="expected an integer of at least 1"):
        check_environment(Fixed(), **setting)
