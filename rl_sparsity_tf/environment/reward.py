"""The reward: what accuracy, sparsity, size and alteration are worth."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from rl_sparsity_tf.errors import ArgumentError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """The state of the network after a decision.

    Attributes:
        metric: The metric on validation data, after recovery.
        dense_metric: The same of the dense model.
        loss: The compiled loss on validation data.
        retention: How much of the dense model's metric is left, in [0, 1].
        sparsity: Share of all weights that are pruned.
        target_sparsity: The share that is wanted.
        progress: Share of the way to the target, in [0, 1]; None for that of the sparsity.
        stored_bits: Bits that the weights would be stored in, as a share of 32 each.
        reconstruction_error: How badly the autoencoder trained on the original weights
            reconstructs them from the present ones, in [0, 1].
        output_error: How far the outputs of the layers move by what was done to their kernels,
            before recovery: the mean over kernels, in [0, 1]. Known with least squares only, else
            0. There, metric, loss and retention are estimates from it until the end of a search
            episode, when the network is fitted and evaluated.

    Example:
        >>> def careful(outcome: rls.Outcome, previous: rls.Outcome | None) -> float:
        ...     return outcome.retention - 0.1 * (1 - outcome.reached)
        >>> compressor = rls.Compressor(model, rls.Target(sparsity=0.9), reward=careful)
    """

    metric: float
    dense_metric: float
    loss: float
    retention: float
    sparsity: float
    target_sparsity: float
    stored_bits: float
    reconstruction_error: float
    output_error: float = 0.0
    progress: float | None = None

    @property
    def reached(self) -> float:
        """Share of the way to the target, in [0, 1]."""
        if self.progress is not None:
            return self.progress
        return min(1.0, self.sparsity / max(self.target_sparsity, 1e-9))


RewardFunction = Callable[[Outcome, Outcome | None], float]
"""`(outcome, previous) -> reward`. `previous` is None at the end of a search episode, when the
reward for the finished network is asked for; it is added to the last step of every layer."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reward:
    r"""The default reward, in [-1, 1].

    The value of a network is the weighted mean

    \(v = (w_a \cdot retention + w_s \cdot progress + w_b (1 - bits) - w_r \cdot error) /
    (w_a + w_s + w_b + w_r)\)

    with progress the share of the way to the target: \(\min(1, s/s^*)\) of a sparsity, the share of
    the bytes, multiplications or milliseconds that were to be saved of other targets.

    A step earns `gain` times the change of value, so that every decision is paid for what it did;
    the finished network earns \(2v - 1\).

    Attributes:
        accuracy: Weight of the metric's retention, the primary goal.
        sparsity: Weight of the sparsity reached: dense networks are penalised.
        size: Weight of the bits saved by storing kernels as integers.
        reconstruction: Weight of the autoencoder's error: alteration is penalised.
        gain: Factor on a step's change of value.

    Example:
        >>> reward = rls.Reward(accuracy=2.0, reconstruction=0.0)
        >>> compressor = rls.Compressor(model, rls.Target(sparsity=0.9), reward=reward)
    """

    accuracy: float = 1.0
    sparsity: float = 0.2
    size: float = 0.3
    reconstruction: float = 0.1
    gain: float = 4.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not math.isfinite(value) or value < 0:
                raise ArgumentError(
                    f"Reward({field.name}={value!r}) cannot be used. Expected a finite number of "
                    "at least 0."
                )
        if self.accuracy + self.sparsity + self.size + self.reconstruction <= 0:
            raise ArgumentError(
                "All weights of the Reward are 0. Expected at least one above 0, for example "
                "Reward(accuracy=1.0)."
            )

    def value(self, outcome: Outcome) -> float:
        """The value of a network, in [-1, 1]."""
        total = (
            self.accuracy * _unit(outcome.retention)
            + self.sparsity * _unit(outcome.reached)
            + self.size * (1.0 - _unit(outcome.stored_bits))
            - self.reconstruction * _unit(outcome.reconstruction_error)
        )
        return total / (self.accuracy + self.sparsity + self.size + self.reconstruction)

    def __call__(self, outcome: Outcome, previous: Outcome | None) -> float:
        """The reward of a step, or (without `previous`) of a finished network."""
        if previous is None:
            return _clip(2.0 * self.value(outcome) - 1.0)
        return _clip(self.gain * (self.value(outcome) - self.value(previous)))

    def to_dict(self) -> dict[str, Any]:
        """The weights."""
        return dataclasses.asdict(self)


def resolve_reward(reward: RewardFunction | None) -> RewardFunction:
    """The reward function that was given, or the default.

    Raises ArgumentError if it cannot be called, or is a class.
    """
    if reward is None:
        return Reward()
    if isinstance(reward, type) or not callable(reward):
        wrong = "is a class" if isinstance(reward, type) else "cannot be called"
        raise ArgumentError(
            f"reward={reward!r} {wrong}. Expected rls.Reward(...) or a function "
            "(outcome, previous) -> float."
        )
    return reward


def bounded(reward: RewardFunction, outcome: Outcome, previous: Outcome | None) -> float:
    """Calls a reward function and keeps what it gives finite and in [-1, 1].

    Raises ArgumentError if it gives no number.
    """
    value = reward(outcome, previous)
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise ArgumentError(
            f"The reward function returned {value!r}. Expected a number, best in [-1, 1]."
        ) from error
    return _clip(number)


def _clip(value: float) -> float:
    return 0.0 if math.isnan(value) else min(1.0, max(-1.0, value))


def _unit(value: float) -> float:
    return 0.0 if math.isnan(value) else min(1.0, max(0.0, value))
