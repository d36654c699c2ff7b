"""The environment above the layers: an episode chooses layer after layer, each with its goal."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from rl_sparsity_tf.allocation.budgets import CostBudget, KernelState
from rl_sparsity_tf.environment._tf_agents import time_step as ts
from rl_sparsity_tf.environment.features import (
    SELECTION_FEATURES,
    SLOTS,
    observe_selection,
    static_features,
)
from rl_sparsity_tf.environment.layer_environment import LayerEnvironment, NetworkEnvironment
from rl_sparsity_tf.environment.network import CompressedNetwork, Snapshot
from rl_sparsity_tf.environment.reward import Outcome, RewardFunction
from rl_sparsity_tf.errors import ArgumentError
from rl_sparsity_tf.layers.operations import Operation

FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
"""The goals' densities, as multiples of what the budget or a plan leaves; hardest first."""

NEAR = (0.5, 0.8, 1.0, 1.25, 2.0)
"""The same where a good plan is known, and others near it are wanted."""

# Levels that clip to the same goal: the one nearest to the average speaks for them.
_PREFERRED = sorted(range(len(FACTORS)), key=lambda level: abs(level - FACTORS.index(1.0)))
_SHARES = 256


@dataclasses.dataclass(frozen=True)
class Goals:
    """The goals that a kernel of `size` weights can be given.

    Attributes:
        amounts: Weights to prune at every level, int64 of shape `(len(FACTORS),)`.
        legal: 1 for every level that may be chosen, int32 of the same shape.
    """

    amounts: np.ndarray
    legal: np.ndarray
    size: int

    def share(self, level: int) -> float:
        """The share of the kernel's weights to prune at a level."""
        return int(self.amounts[level]) / self.size


def mean_density(network: CompressedNetwork, undecided: Sequence[int]) -> float:
    """The share of the undecided kernels' weights that may live if all give the same share.

    It is 0 as well where pruning alike cannot meet the target. `undecided` are the indices of the
    kernels that nothing was decided about.
    """
    budget = network.budget
    total = sum(network.kernels[index].size for index in undecided)
    if not isinstance(budget, CostBudget):
        return 1.0 - min(1.0, budget.missing / max(total, 1))
    states = network.states()

    def met(step: int) -> bool:
        for index in undecided:
            wanted = round(step / _SHARES * network.kernels[index].size)
            states[index] = _opened(network, index, min(wanted, int(budget.capacity[index])))
        return budget.expected(states) <= budget.limit

    return 1.0 - bisect.bisect_left(range(_SHARES), True, key=met) / _SHARES


def density_of(
    network: CompressedNetwork,
    index: int,
    undecided: Sequence[int],
    mean: float,
    reference: np.ndarray,
) -> float:
    """A kernel's share of what may live if the undecided kernels keep a plan's proportions.

    It is in [0, 1], and the plan's own density as long as all decisions were the plan's. The kernel
    is one of the undecided. `mean` is what [mean_density][] says; `reference` has the plan's
    densities, one per kernel of the network, each above 0.
    """
    sizes = np.array([float(network.kernels[one].size) for one in undecided])
    planned = float((sizes * reference[list(undecided)]).sum() / sizes.sum())
    return float(min(1.0, reference[index] * mean / planned))


def goals_of(
    network: CompressedNetwork,
    index: int,
    undecided: Sequence[int],
    density: float,
    factors: Sequence[float] = FACTORS,
) -> Goals:
    """The goals of one undecided kernel.

    A level's density is its factor times the one given, clipped to what the kernel can give and to
    what is still missing. Levels after which the others could not meet the target are illegal;
    so are all but one of those that clip to the same goal. If none is left, the one that comes
    closest to the target is legal.

    The kernel is one of the undecided. `density` is what [mean_density][] says, or [density_of][];
    there are as many factors as [FACTORS][].

    Example:
        >>> goals_of(network, 0, [0, 1], 0.1).amounts  # of 100 weights, 150 in both, 135 missing
        array([97, 95, 90, 80, 60])
    """
    budget, size = network.budget, network.kernels[index].size
    most = min(int(budget.capacity[index]), _needed(network, index))
    densities = np.minimum(1.0, np.array(factors) * density)
    amounts = np.clip(np.round((1.0 - densities) * size).astype(np.int64), 0, most)
    short = np.array([_short_of(network, index, undecided, int(a)) for a in amounts])
    legal = np.zeros(len(FACTORS), np.int32)
    for level in _PREFERRED:
        new = not (amounts[legal > 0] == amounts[level]).any()
        legal[level] = new and short[level] <= 0
    if not legal.any():
        legal[min(_PREFERRED, key=lambda level: short[level])] = 1
    return Goals(amounts, legal, size)


def pressure(network: CompressedNetwork, undecided: Sequence[int]) -> float:
    """Weights still to prune / those that the undecided kernels can still give."""
    missing, room = network.budget.missing, network.budget.room(undecided)
    return missing / room if room else float(missing > 0)


def _opened(network: CompressedNetwork, index: int, pruned: int) -> KernelState:
    """A kernel with so much pruned, the rest of which may still become integers."""
    return KernelState(pruned, network.kernels[index].size - pruned, False, False)


def _needed(network: CompressedNetwork, index: int) -> int:
    """Weights of a kernel after which nothing more has to go, or all that it can give."""
    budget = network.budget
    if not isinstance(budget, CostBudget):
        return budget.missing
    states, most = network.states(), int(budget.capacity[index])

    def met(pruned: int) -> bool:
        states[index] = _opened(network, index, pruned)
        return budget.expected(states) <= budget.limit

    return bisect.bisect_left(range(most), True, key=met)


def _short_of(
    network: CompressedNetwork, index: int, undecided: Sequence[int], amount: int
) -> float:
    """How far the target stays out of reach if so much goes of a kernel; 0 or less: it does not."""
    budget = network.budget
    if not isinstance(budget, CostBudget):
        return budget.missing - amount - budget.room([one for one in undecided if one != index])
    states, costs = network.states(), []
    for integers in (True, False):
        states[index] = KernelState(amount, 0, kept=not integers, quantized=integers)
        costs.append(budget.least(states))
    return min(costs) - budget.limit - budget.slack


PlayLayer = Callable[[str, float], Any]
"""`(kernel_path, goal)`: decides every group of a kernel; what it returns is not looked at."""

GOALS = len(FACTORS)
ACTIONS = SLOTS * GOALS

# Two buckets below the goal and two beyond: groups left over by a wall have where to go.
_BUCKETS = 4


@dataclasses.dataclass(frozen=True)
class _State:
    network: Snapshot
    undecided: list[int]
    current: ts.TimeStep


class LayerSelectionEnvironment(NetworkEnvironment):
    """Compresses a network kernel by kernel: which comes next, and how much goes of it.

    An episode decides every kernel once. The action is `slot * 5 + goal`: four slots hold the
    smallest kernels that are still undecided, in the order of the network where they are equal;
    the five goals are densities of 1/4, 1/2, 1, 2 and 4 times what the budget leaves on average
    to the undecided kernels. So neither actions nor states depend on the network's size, and a
    policy can be carried to another. Resetting goes back to the dense network.

    The observation is a dict:

    * `"state"`: float32 of shape `(SELECTION_STATE_SIZE,)`, see `describe_selection_state`;
    * `"legal"`: int32 of shape `(20,)`, 1 for every action that is allowed: not those of empty
      slots, of goals after which the others could not meet the target, nor of all but one of the
      goals that come to the same. An illegal action is executed as the first legal one and
      counted in `illegal_actions`.

    Args:
        network: The network being compressed.
        reward: What an outcome is worth.
        play_layer: Called as `play_layer(kernel_path, goal)` to decide the kernel chosen, `goal`
            being the share of its weights to prune; [undecided][] are then those that come later.
            By default the least salient groups are pruned to the goal and the others quantized,
            where int8 can be stored.

    Attributes:
        illegal_actions: How many actions were not legal.

    Raises:
        ArgumentError: If the network is none, or `play_layer` cannot be called.

    Example:
        >>> from rl_sparsity_tf.data.batches import evaluation_data, training_data
        >>> from rl_sparsity_tf.environment.network import CompressedNetwork
        >>> network = CompressedNetwork(
        ...     model,
        ...     training_data((x, y), model, batch_size=32),
        ...     evaluation_data((x_val, y_val), model, "validation_data"),
        ...     target=rls.Target(sparsity=0.9),
        ... )
        >>> env = rls.LayerSelectionEnvironment(network)
        >>> time_step = env.reset()
        >>> time_step = env.step(2)  # the smallest kernel, pruned as the target asks on average
    """

    def __init__(
        self,
        network: CompressedNetwork,
        *,
        reward: RewardFunction | None = None,
        play_layer: PlayLayer | None = None,
    ):
        super().__init__(network, reward, SELECTION_FEATURES, ACTIONS, "slot_and_goal")
        if play_layer is not None and not callable(play_layer):
            raise ArgumentError(
                f"play_layer={play_layer!r} cannot be called. Expected a function (kernel_path, "
                "goal) that decides the kernel, or None."
            )
        self.play_layer: PlayLayer = play_layer or self._prune_to_goal
        sizes = [kernel.size for kernel in network.kernels]
        self._order = sorted(range(len(sizes)), key=lambda index: (sizes[index], index))
        self.retarget()
        self._undecided = list(self._order)
        self._goals: list[Goals] = []

    def retarget(self) -> None:
        """Follows the network to another budget, by which its kernels look different."""
        kernels = range(len(self.network.kernels))
        self._static = [static_features(self.network, index) for index in kernels]
        self.centre(None)

    def centre(self, densities: Mapping[str, float] | None, near: bool = False) -> None:
        """Puts the goals of every kernel around a plan's density, from the next reset on.

        What was decided otherwise before is made up for by all that are left, in proportion.

        Args:
            densities: By kernel path; None for the same of all kernels.
            near: Whether only densities near those are looked for.
        """
        self._factors = NEAR if near else FACTORS
        self._reference: np.ndarray | None = None
        if densities is not None:
            kernels = self.network.kernels
            self._reference = np.array([max(densities[k.path], 1.0 / k.size) for k in kernels])

    def _density(self, index: int, mean: float) -> float:
        if self._reference is None:
            return mean
        return density_of(self.network, index, self._undecided, mean, self._reference)

    @property
    def undecided(self) -> list[str]:
        """Kernels that are still to be decided, the smallest first."""
        return [self.network.kernels[index].path for index in self._undecided]

    @property
    def slots(self) -> list[str]:
        """The kernels to choose from, four at most."""
        return self.undecided[:SLOTS]

    def goals(self, slot: int) -> list[float]:
        """The shares to prune that the goals of a slot mean, hardest first.

        Args:
            slot: Number of a slot that holds a kernel.
        """
        return [self._goals[slot].share(level) for level in range(GOALS)]

    def _begin(self) -> None:
        self.network.reset()
        self._undecided = list(self._order)

    def _execute(self, action: int) -> tuple[Outcome, bool]:
        legal = self._legal()
        if not legal[action]:
            self.illegal_actions += 1
            action = int(np.argmax(legal))
        slot, level = divmod(action, GOALS)
        path, goal = self.slots[slot], self._goals[slot].share(level)
        del self._undecided[slot]
        self.play_layer(path, goal)
        if not self.network.decided[path].all():
            raise ArgumentError(
                f"play_layer({path!r}, {goal:g}) left "
                f"{int((~self.network.decided[path]).sum())} groups undecided. Expected it to "
                "decide them all, for example by playing a LayerEnvironment to its end."
            )
        ended = not self._undecided
        return self.network.finish() if ended else self.network.outcome, ended

    def _prune_to_goal(self, path: str, goal: float) -> None:
        layer = LayerEnvironment(
            self.network,
            path,
            reward=self.reward,
            buckets=_BUCKETS,
            later=self.undecided,
            evaluate=False,
        )
        layer.aim(goal)
        layer.commit()
        time_step, count = layer.reset(), layer.grouping.count
        while not time_step.is_last():
            legal = time_step.observation["legal"]
            below = layer.bucket_span[0] * count + 0.5 < goal * count
            wishes = [Operation.QUANTIZE, Operation.KEEP, Operation.PRUNE]
            wishes = [Operation.PRUNE, *wishes] if below else wishes
            operation = next(wish for wish in wishes if legal[wish])
            time_step = layer.step(np.int32(operation))

    def _legal(self) -> np.ndarray:
        if not self._undecided:  # a mask has to allow something at the end of an episode, too
            return np.ones(ACTIONS, np.int32)
        legal = np.zeros((SLOTS, GOALS), np.int32)
        for slot, goals in enumerate(self._goals):
            legal[slot] = goals.legal
        return legal.reshape(-1)

    def _observe(self) -> dict[str, np.ndarray]:
        network, undecided = self.network, self._undecided
        density = mean_density(network, undecided)
        self._goals = [
            goals_of(network, index, undecided, self._density(index, density), self._factors)
            for index in undecided[:SLOTS]
        ]
        state = observe_selection(
            network, self._static, undecided, density, pressure(network, undecided)
        )
        return {"state": state, "legal": self._legal()}

    def get_state(self) -> Any:
        """Everything needed to come back to this point of the episode with `set_state`."""
        return _State(self.network.snapshot(), list(self._undecided), self._current_time_step)

    def set_state(self, state: Any) -> None:
        """Comes back to a point saved with `get_state`."""
        self.network.restore(state.network)
        self._undecided = list(state.undecided)
        self._current_time_step = state.current
        self._observe()
