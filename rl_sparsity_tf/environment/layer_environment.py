"""The environment of one layer: an episode decides its buckets, one operation after the other."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rl_sparsity_tf.allocation.budgets import CostBudget
from rl_sparsity_tf.environment._tf_agents import array_spec, py_environment, types
from rl_sparsity_tf.environment._tf_agents import time_step as ts
from rl_sparsity_tf.environment.buckets import bucket_edges, near_edges, split_buckets
from rl_sparsity_tf.environment.features import FEATURES, BucketView, Feature, lower_bounds, observe
from rl_sparsity_tf.environment.network import CompressedNetwork, Snapshot
from rl_sparsity_tf.environment.reward import Outcome, Reward, RewardFunction, bounded
from rl_sparsity_tf.errors import ArgumentError
from rl_sparsity_tf.layers.operations import Operation, stored_as_integers

# A kernel that hardly loses anything is decided on like any other.
_LEAST_CENTRE = 0.05


@dataclasses.dataclass(frozen=True)
class _State:
    network: Snapshot
    statistics: Any
    position: int
    buckets: list[np.ndarray]
    saliency: np.ndarray
    edges: np.ndarray
    goal: float
    current: ts.TimeStep


class NetworkEnvironment(py_environment.PyEnvironment):
    """What the environments of a network share: their specs, and how a step is paid.

    `features` are those of the state, `action` is the name of the `actions` that there are.
    """

    def __init__(
        self,
        network: CompressedNetwork,
        reward: RewardFunction | None,
        features: Sequence[Feature],
        actions: int,
        action: str,
    ):
        super().__init__(handle_auto_reset=False)
        if not isinstance(network, CompressedNetwork):
            raise ArgumentError(
                f"network={network!r} is a {type(network).__name__}. Expected a CompressedNetwork, "
                "made of a model, its data and a target."
            )
        self.network = network
        self.reward: RewardFunction = reward if reward is not None else Reward()
        self.illegal_actions = 0
        bounded_spec = array_spec.BoundedArraySpec
        self._action_spec = bounded_spec((), np.int32, minimum=0, maximum=actions - 1, name=action)
        self._observation_spec = {
            "state": bounded_spec(
                (len(features),),
                np.float32,
                minimum=lower_bounds(features),
                maximum=np.ones(len(features), np.float32),
                name="state",
            ),
            "legal": bounded_spec((actions,), np.int32, minimum=0, maximum=1, name="legal"),
        }
        self._reward_spec = bounded_spec((), np.float32, minimum=-1.0, maximum=1.0, name="reward")

    def action_spec(self) -> types.NestedArraySpec:
        """A scalar int32 from 0."""
        return self._action_spec

    def observation_spec(self) -> types.NestedArraySpec:
        """The state and the legal actions."""
        return self._observation_spec

    def reward_spec(self) -> types.NestedArraySpec:
        """A float32 in [-1, 1]."""
        return self._reward_spec

    def _reset(self) -> ts.TimeStep:
        self._begin()
        return ts.restart(self._observe(), reward_spec=self._reward_spec)

    def _step(self, action: types.NestedArray) -> ts.TimeStep:
        if self._current_time_step is None or self._current_time_step.is_last():
            return self.reset()
        previous = self.network.outcome
        outcome, ended = self._execute(int(action))
        reward = np.float32(self._worth(outcome, previous))
        observation = self._observe()
        if ended:
            return ts.termination(observation, reward)
        return ts.transition(observation, reward, discount=1.0)

    def _worth(self, outcome: Outcome, previous: Outcome) -> float:
        """What a step is paid, in [-1, 1]."""
        return bounded(self.reward, outcome, previous)

    def _begin(self) -> None:
        """Undoes what the last episode decided."""
        raise NotImplementedError

    def _execute(self, action: int) -> tuple[Outcome, bool]:
        """Carries out an action; returns what came of it, and whether the episode has ended."""
        raise NotImplementedError

    def _observe(self) -> dict[str, np.ndarray]:
        raise NotImplementedError


class LayerEnvironment(NetworkEnvironment):
    """Compresses one kernel of a network, bucket by bucket.

    An episode walks the kernel's buckets from the least to the most salient. The action is one
    [Operation][rl_sparsity_tf.Operation] for the bucket at hand; the network then recovers and is
    evaluated. Resetting undoes the episode: the network goes back to where it was when the
    environment was made or [commit][] was called last.

    The observation is a dict:

    * `"state"`: float32 of shape `(STATE_SIZE,)`, see `describe_state`;
    * `"legal"`: int32 of shape `(4,)`, 1 for every operation that is allowed. Prune stops being
      so when the target is met, and becomes the only one when the rest of the network could not
      meet it otherwise. An illegal action is executed as Keep (as Prune where only that is legal)
      and counted in `illegal_actions`.

    Args:
        network: The network being compressed; environments of the same network share it.
        kernel: Path of the kernel.
        reward: What an outcome is worth.
        buckets: Decisions per kernel at most.
        later: Kernels that are decided after this one; by default, those behind it.
        evaluate: Whether the last step evaluates the network, where the recovery leaves that to
            the end (least squares).

    Attributes:
        goal: Share of the kernel's weights that is to be pruned, as the state shows it; by default
            the target's. [aim][] sets it and cuts the buckets there.
        illegal_actions: How many actions were not legal.

    Example:
        >>> from rl_sparsity_tf.data.batches import evaluation_data, training_data
        >>> from rl_sparsity_tf.environment.network import CompressedNetwork
        >>> network = CompressedNetwork(
        ...     model,
        ...     training_data((x, y), model, batch_size=32),
        ...     evaluation_data((x_val, y_val), model, "validation_data"),
        ...     target=rls.Target(sparsity=0.9),
        ... )
        >>> env = rls.LayerEnvironment(network, "hidden/kernel")
        >>> time_step = env.reset()
        >>> time_step = env.step(int(rls.Operation.PRUNE))
        >>> time_step.observation["legal"].shape  # keep, prune, quantize, shuffle
        (4,)
    """

    def __init__(
        self,
        network: CompressedNetwork,
        kernel: str,
        *,
        reward: RewardFunction | None = None,
        buckets: int = 8,
        later: list[str] | None = None,
        evaluate: bool = True,
    ):
        if isinstance(buckets, bool) or not isinstance(buckets, int) or buckets < 1:
            raise ArgumentError(f"buckets={buckets!r} cannot be used. Expected an integer above 0.")
        super().__init__(network, reward, FEATURES, len(Operation), "operation")
        self.kernel = kernel
        self.index = network.index_of(kernel)
        self.evaluate = evaluate
        self.grouping = network.groupings[kernel]
        self._count = buckets
        behind = [other.path for other in network.kernels[self.index + 1 :]]
        self.later = behind if later is None else later
        self.retarget()
        self._buckets: list[np.ndarray] = []
        self._saliency = np.zeros(0)
        self._position = 0

    def retarget(self) -> None:
        """Follows the network to another budget: its goal, and buckets cut around that.

        The number of decisions stays the same.
        """
        self.goal = self.network.budget.pruned_share
        self._base: Snapshot | None = None
        self.centre(None)

    @property
    def later(self) -> list[str]:
        """Kernels that are decided after this one."""
        return [self.network.kernels[index].path for index in self._later]

    @later.setter
    def later(self, paths: list[str]) -> None:
        self._later = [self.network.index_of(path) for path in paths]

    def centre(self, share: float | None, near: bool = False) -> None:
        """Cuts the buckets around a share of the groups to prune, from the next reset on.

        Args:
            share: For instance that of the best plan known, so that the plan is among those that
                can be decided on, and others close to it; None for the target's.
            near: Whether only densities near that are looked for.
        """
        if share is None or not _LEAST_CENTRE <= share < 1.0:
            share = max(self.network.budget.pruned_share, self.network.decisions.least_share)
            near = False
        self._cut(share, near_edges if near else bucket_edges)

    def aim(self, goal: float, near: bool = False) -> None:
        """Sets the goal of the episodes to come, and cuts their buckets so that an edge lies there.

        Args:
            goal: Share of the kernel's weights to prune; with 0 the buckets are cut around the
                target's.
            near: Whether only densities near the goal are looked for.
        """
        self.goal = goal
        if goal > 0:
            self._cut(goal, near_edges if near else bucket_edges)
        else:
            self.centre(None)

    def _cut(self, share: float, edges: Callable[..., np.ndarray] = bucket_edges) -> None:
        self._edges = edges(self.grouping.count, self._count, share)
        self._first_buckets: list[np.ndarray] = []

    def forget(self) -> None:
        """To be called when groups are ordered by another saliency."""
        self._first_buckets = []

    @property
    def steps(self) -> int:
        """Decisions in an episode."""
        return len(self._edges) - 1

    @property
    def bucket_span(self) -> tuple[float, float]:
        """Start and width of the bucket at hand, as shares of the groups in order of saliency."""
        start, end = self._edges[min(self._position, self.steps - 1) :][:2]
        return float(start) / self.grouping.count, float(end - start) / self.grouping.count

    @property
    def decisions(self) -> list[tuple[str, np.ndarray]]:
        """The episode's decisions so far, as the kernel, and flat indices of the groups.

        Groups handed on to the next bucket are in both; the later decision is theirs.
        """
        return [(self.kernel, groups) for groups in self._buckets[: self._position]]

    def commit(self) -> None:
        """Makes the network as it is now what `reset()` goes back to."""
        self._base = self.network.snapshot()

    def _begin(self) -> None:
        if self._base is None:
            self.commit()
        assert self._base is not None
        self.network.restore(self._base)
        self.network.measure()
        if self.network.least_squares is None or not self._first_buckets:
            self._saliency = self.network.saliency(self.kernel)
            self._first_buckets = split_buckets(self._saliency, self._edges)
        # Without training the weights are the same in every episode.
        self._buckets = list(self._first_buckets)
        self._position = 0

    def _execute(self, action: int) -> tuple[Outcome, bool]:
        outcome = self._decide(Operation(action))
        self._position += 1
        ended = self._position == self.steps
        return self.network.finish() if ended and self.evaluate else outcome, ended

    def _decide(self, operation: Operation) -> Outcome:
        legal = self._legal()
        if not legal[operation]:
            self.illegal_actions += 1
            fallbacks = (Operation.KEEP, Operation.PRUNE, Operation.QUANTIZE, Operation.SHUFFLE)
            operation = next(fallback for fallback in fallbacks if legal[fallback])
        groups = self._buckets[self._position]
        if operation != Operation.PRUNE:
            return self.network.decide(self.kernel, groups, operation)
        # The bucket that meets the target (or the kernel's floor) is split: only its least
        # salient groups go, and the others are decided with the next bucket.
        count = self._prunable(groups)
        if count < len(groups) and self._position + 1 < self.steps:
            following = self._buckets[self._position + 1]
            self._buckets[self._position + 1] = np.concatenate([groups[count:], following])
        elif count < len(groups):
            left = groups[count:]
            self.network.decide(self.kernel, left, self._like_the_others(left))
        return self.network.decide(self.kernel, groups[:count], Operation.PRUNE)

    def _like_the_others(self, left: np.ndarray) -> Operation:
        """What to do with groups left over at the end: not what would make a kernel mixed."""
        budget, decided = self.network.budget, self.network.decided[self.kernel]
        operations = self.network.operations[self.kernel]
        if isinstance(budget, CostBudget) and not (operations[decided] == Operation.KEEP).any():
            lives = decided & (operations != Operation.PRUNE)
            lives.reshape(-1)[left] = True
            live = float(self.grouping.sizes[lives].sum())
            integers = self.network.kernels[self.index].spec.exports_int8
            integers = integers and budget.integers_pay(self.index, live)
        else:
            integers = stored_as_integers(operations[decided])
        return Operation.QUANTIZE if integers else Operation.KEEP

    def _prunable(self, groups: np.ndarray) -> int:
        """How many of the groups, least salient first, may go: to the target, above the floor."""
        budget = self.network.budget
        sizes = self.grouping.sizes.reshape(-1)[groups]
        gone = np.cumsum(sizes)
        if isinstance(budget, CostBudget):
            to_target = self._needed(budget, groups)
        else:
            to_target = int((gone - sizes < budget.missing).sum())
        rest = int(budget.capacity[self.index] - budget.pruned[self.index])
        # The group that crosses the floor may go too: capacities are counted in weights, not
        # groups, and leave at least the largest group.
        return min(to_target, int((gone - sizes < rest).sum()))

    def _needed(self, budget: CostBudget, groups: np.ndarray) -> int:
        """How many of the groups have to go before the limit is met, or all of them."""
        network, states = self.network, self.network.states()

        def within(count: int) -> bool:
            states[self.index] = network.state_after(self.kernel, groups[:count], Operation.PRUNE)
            return budget.expected(states) <= budget.limit

        if not within(len(groups)):
            return len(groups)
        return bisect.bisect_left(range(len(groups)), True, key=within)

    def _room(self) -> int:
        """Weights that can still be pruned, the buckets before this one staying as they are."""
        budget = self.network.budget
        if self.grouping.group == "element":
            ahead = sum(len(groups) for groups in self._buckets[self._position :])
        else:
            sizes = self.grouping.sizes.reshape(-1)
            ahead = sum(int(sizes[groups].sum()) for groups in self._buckets[self._position :])
        rest = int(budget.capacity[self.index] - budget.pruned[self.index])
        return min(ahead, rest) + budget.room(self._later)

    def _legal(self) -> np.ndarray:
        budget, groups = self.network.budget, self._buckets[self._position]
        legal = np.ones(len(Operation), np.int32)
        prunable = self._prunable(groups)
        legal[Operation.PRUNE] = prunable > 0
        legal[Operation.SHUFFLE] = self.network.decisions.shuffles and self.grouping.pairs > 0
        legal[Operation.QUANTIZE] = self.network.kernels[self.index].spec.exports_int8
        if isinstance(budget, CostBudget):
            return self._within_limit(budget, groups, prunable, legal)
        # The buckets behind are more salient: to prune them for the sake of this one is no way.
        if legal[Operation.PRUNE] and budget.missing > budget.room(self._later):
            legal[:] = 0
            legal[Operation.PRUNE] = 1
        return legal

    def _within_limit(
        self, budget: CostBudget, groups: np.ndarray, prunable: int, legal: np.ndarray
    ) -> np.ndarray:
        """Leaves the operations after which the cost can still be brought to its limit."""
        network = self.network
        states = network.states()
        sizes = {}
        for operation in np.flatnonzero(legal):
            chosen = groups[:prunable] if operation == Operation.PRUNE else groups
            state = network.state_after(self.kernel, chosen, Operation(operation))
            # As above: if this bucket stays, so do those behind.
            states[self.index] = state if operation == Operation.PRUNE else state.surviving
            sizes[operation] = budget.least(states)
        allowed = budget.limit + budget.slack
        within = [operation for operation, size in sizes.items() if size <= allowed]
        # Rounding alone can leave none: then the one that comes closest.
        within = within or [min(sizes, key=lambda operation: sizes[operation])]
        result = np.zeros(len(Operation), np.int32)
        result[within] = 1
        return result

    def _observe(self) -> dict[str, np.ndarray]:
        position = min(self._position, self.steps - 1)
        missing = self.network.budget.missing
        groups = self._buckets[position]
        room = self._room()
        bucket = BucketView(
            position=position,
            count=self.steps,
            groups=groups,
            saliency=self._saliency,
            pressure=missing / room if room else float(missing > 0),
            goal=self.goal,
        )
        legal = np.ones(len(Operation), np.int32)
        if self._position < self.steps:
            legal = self._legal()
        return {"state": observe(self.network, self.kernel, bucket), "legal": legal}

    def get_state(self) -> Any:
        """Everything needed to come back to this point of the episode with `set_state`."""
        return _State(
            self.network.snapshot(),
            self.network.statistics,
            self._position,
            list(self._buckets),
            self._saliency,
            self._edges,
            self.goal,
            self._current_time_step,
        )

    def set_state(self, state: Any) -> None:
        """Comes back to a point saved with `get_state`."""
        self.network.restore(state.network)
        self.network.statistics = state.statistics
        self._position = state.position
        self._buckets = list(state.buckets)
        self._saliency = state.saliency
        self._edges, self.goal = state.edges, state.goal
        self._first_buckets = []
        self._current_time_step = state.current
