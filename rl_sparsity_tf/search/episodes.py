"""Search episodes of one level and of two: every bucket of every kernel is decided once."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np

from rl_sparsity_tf.agents.base import Agent
from rl_sparsity_tf.agents.configs import AgentConfig, build_agent
from rl_sparsity_tf.agents.demonstrations import Demonstration, random_demonstration
from rl_sparsity_tf.agents.exploration import DecisionTree, ReturnThenExplore
from rl_sparsity_tf.agents.policies import CONSTRUCT, IMPROVE, INTERFACES, SavedPolicy
from rl_sparsity_tf.agents.relaxation import Relaxation
from rl_sparsity_tf.environment.curriculum import Constant, Curriculum
from rl_sparsity_tf.environment.improvement_environment import ImprovementEnvironment, opened
from rl_sparsity_tf.environment.layer_environment import LayerEnvironment
from rl_sparsity_tf.environment.network import CompressedNetwork
from rl_sparsity_tf.environment.reranking import SCHEDULE
from rl_sparsity_tf.environment.reward import RewardFunction
from rl_sparsity_tf.environment.selection_environment import GOALS, LayerSelectionEnvironment
from rl_sparsity_tf.layers.plan import CompressionPlan

RELATIVE_GAIN = 10.0
"""What a value less a policy's own is multiplied by, before it is learned: plans that are worth
comparing hardly differ otherwise. The result is clipped to [-1, 1]."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """What the episodes of a search depend on beside the network.

    Attributes:
        reward: What an outcome is worth.
        buckets: Decisions per kernel and episode.
        seed: Seed of the agent and of every episode.
        warm_start: Whether the plans of heuristics are evaluated and demonstrated first.
        finalists: How many plans go into the final, at most one of each proposer.
        curriculum: How the target rises over the episodes.
        policy: What the agent has learned elsewhere, if anything.
        hierarchy: Whether a second agent chooses the order of the kernels and their goals.
        strategy: `"construct"`, where an episode decides every bucket, or `"improve"`, where it
            makes one move from the best plan so far.
    """

    agent: AgentConfig
    reward: RewardFunction
    buckets: int
    seed: int
    warm_start: bool
    finalists: int = 1
    curriculum: Curriculum = dataclasses.field(default_factory=Constant)
    policy: SavedPolicy | None = None
    hierarchy: bool = False
    strategy: str = CONSTRUCT


class SearchEpisodes(abc.ABC):
    """What a loop plays: episodes that end with a whole plan, which the agent learns from.

    Attributes:
        agent: That decides.
        shown: Whether the agent can be shown plans, and buckets are cut near the best of them.
        reference: What values are learned relative to.
    """

    agent: Agent
    shown = True
    reference = 0.0

    @property
    @abc.abstractmethod
    def illegal_actions(self) -> int:
        """Actions so far that were not legal."""

    @property
    @abc.abstractmethod
    def decisions(self) -> int:
        """Decisions per kernel in an episode, rounded up: how often a kernel may recover."""

    @abc.abstractmethod
    def centre(self, plan: CompressionPlan, near: bool = False) -> None:
        """Has the next episodes look around a plan, with `near` not far from it."""

    @abc.abstractmethod
    def begin_anew(self) -> None:
        """Lets decisions that were played be played again: they lead to other plans now."""

    @abc.abstractmethod
    def retarget(self, anew: bool = True) -> None:
        """Follows the network to another budget; what the agent has learned stays with it.

        `anew` is whether the decisions that were played before may be played again.
        """

    @abc.abstractmethod
    def play(self, demonstration: Demonstration | None = None) -> float:
        """Plays an episode, and gives the sum of its rewards; the network is left with its plan.

        A demonstration decides in place of the agent.
        """

    @abc.abstractmethod
    def learn(self, value: float) -> dict[str, float]:
        """Lets the agent learn from the episode played last, whose plan was worth so much.

        Losses are by name.
        """

    @abc.abstractmethod
    def get_state(self) -> dict[str, np.ndarray]:
        """Everything to go on from, as arrays."""

    @abc.abstractmethod
    def set_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Goes on from what [get_state][] gave."""


class Episodes(SearchEpisodes):
    """Plays search episodes, the smallest kernel first, and lets the agent learn from them.

    No two episodes take the same decisions, as long as others are left. `reference` is what values
    are learned relative to, if the agent begins with a policy.
    """

    def __init__(self, settings: LoopSettings, network: CompressedNetwork):
        self.network = network
        # The last kernel takes what the others have left of the budget. A large one hardly notices;
        # a small one would be emptied by a step of its neighbour.
        kernels = sorted(network.kernels, key=lambda kernel: kernel.size)
        self.environments = [
            LayerEnvironment(
                network,
                kernel.path,
                reward=settings.reward,
                buckets=settings.buckets,
                later=[one.path for one in kernels[place + 1 :]],
                evaluate=kernel is kernels[-1],
            )
            for place, kernel in enumerate(kernels)
        ]
        first = self.environments[0]
        self.agent = build_agent(
            settings.agent, first.time_step_spec(), first.action_spec(), seed=settings.seed
        )
        self._policy = settings.policy
        if settings.policy is not None:
            self.agent.set_policy_arrays(settings.policy.weights)
        self.reference = 0.0
        self.tree = DecisionTree()
        self._returning = ReturnThenExplore(np.random.default_rng([settings.seed, 3]))
        self._relaxation: Relaxation | None = None
        if getattr(settings.agent, "relaxed_reward", 0.0):
            self._relaxation = Relaxation(network, reward=settings.reward, seed=settings.seed)
            cast(Any, self.agent).attach(self._relaxation)
        self._demonstrated = False
        self._played = list(self.environments)

    def centre(self, plan: CompressionPlan, near: bool = False) -> None:
        """Cuts the buckets of all kernels so that a plan's densities are among the choices.

        With `near` the other choices are to be near those.
        """
        for environment in self.environments:
            environment.centre(plan.kernels[environment.kernel].sparsity, near)

    def begin_anew(self) -> None:
        """Lets decisions that were played be played again: they lead to other plans now."""
        self.tree = DecisionTree()
        self._returning.forget()

    def retarget(self, anew: bool = True) -> None:
        """Follows the network to another budget; what the agent has learned stays with it.

        `anew` is whether the decisions that were played before may be played again.
        """
        for environment in self.environments:
            environment.retarget()
        if anew:
            self.begin_anew()

    @property
    def illegal_actions(self) -> int:
        """Actions so far that were not legal."""
        return sum(environment.illegal_actions for environment in self.environments)

    @property
    def decisions(self) -> int:
        """Decisions per kernel in an episode, rounded up."""
        return -(-sum(one.steps for one in self.environments) // len(self.environments))

    def play(self, demonstration: Demonstration | None = None) -> float:
        """Plays an episode, and gives the sum of its rewards; the network is left with its plan.

        A demonstration decides in place of the agent.
        """
        self.network.reset()
        self.tree.restart()
        self._demonstrated = demonstration is not None
        demonstration = demonstration or self._random_densities()
        self._returning.restart(sum(environment.steps for environment in self.environments))
        total = sum(self._play_layer(one, demonstration) for one in self.environments)
        self.tree.finish()
        return total

    def _random_densities(self) -> Demonstration | None:
        """What an agent that learns from any behaviour begins with, if it was shown nothing.

        Random decisions of single buckets make plans that say little: nearly every kernel has some
        group that is kept, and is stored as floats.
        """
        if not self.agent.off_policy or not self._returning.free:
            return None
        return random_demonstration(self.network, self._returning.generator)

    def _play_layer(
        self, environment: LayerEnvironment, demonstration: Demonstration | None
    ) -> float:
        environment.commit()
        time_step = environment.reset()
        total = 0.0
        while not time_step.is_last():
            forced = None
            if demonstration is not None:
                forced = demonstration.action(environment, time_step)
            action = self._decide(self.agent, time_step, forced)
            time_step = environment.step(np.int32(action))
            self.agent.observe(time_step)
            total += float(time_step.reward)
        return total

    def play_policy(self) -> list[int]:
        """Plays the plan that the policy of the settings likes best, and gives the actions.

        Nothing is learned from it. The network is left with the plan, evaluated.
        """
        assert self._policy is not None
        state = self.agent.get_state()
        self.agent.set_policy_arrays(self._policy.weights)
        self.network.reset()
        actions = []
        for environment in self.environments:
            environment.commit()
            time_step = environment.reset()
            while not time_step.is_last():
                actions.append(self.agent.act(time_step))
                time_step = environment.step(np.int32(actions[-1]))
        self.agent.set_state(state)
        return actions

    def order_by_magnitude(self, wanted: bool) -> None:
        """Lets the least salient groups be those of least magnitude, or those as layers need it.

        If wanted, magnitude decides in all kernels.
        """
        self.network.decisions.by_magnitude = wanted
        self.network.group_ranks.forget()
        for environment in self.environments:
            environment.forget()

    def begin_with(self, actions: Sequence[int], value: float) -> None:
        """Explores from these actions, as from the best episode so far.

        Their plan is worth `value`.
        """
        self._returning.restart(len(actions))
        for action in actions:
            self._returning.take(action)
        self._returning.finish(value, demonstrated=True)

    def _decide(self, agent: Agent, time_step: Any, forced: int | None) -> int:
        """An agent's action, or the one it is given, that leads to something new if it can."""
        allowed = self.tree.offer(time_step.observation["legal"])
        if forced is None and agent.off_policy:
            allowed = self._returning.offer(allowed)
        action = agent.step(time_step, action=forced, allowed=allowed)
        self._returning.take(action)
        self.tree.take(action)
        return action

    def learn(self, value: float) -> dict[str, float]:
        """Lets the agent learn from the episode played last, whose plan was worth so much.

        Losses are by name.
        """
        self._returning.finish(value, self._demonstrated)
        return self._learn(value)

    def _learn(self, value: float | Sequence[float]) -> dict[str, float]:
        if self._relaxation is not None and not self._demonstrated:
            self._relaxation.follow([d for env in self._played for d in env.decisions])
        if self._policy is not None:
            value = float(np.clip(RELATIVE_GAIN * (np.mean(value) - self.reference), -1.0, 1.0))
        if self.network.least_squares is None:
            return self.agent.end_episode(bonus=value)
        # The steps were paid by estimates, which must not count in the end.
        return self.agent.end_episode(worth=value)

    def get_state(self) -> dict[str, np.ndarray]:
        """Everything to go on from, as arrays."""
        return {
            **{f"agent:{key}": value for key, value in self.agent.get_state().items()},
            "untried": self.tree.to_array(),
            **self._returning.get_state(),
            "reference": np.array(self.reference),
            "illegal_actions": np.array([one.illegal_actions for one in self.environments]),
        }

    def set_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Goes on from what [get_state][] gave.

        Raises AgentStateError if it is the state of another agent, and ValueError, KeyError or
        TypeError if it is none of these episodes.
        """
        counts, reference = state["illegal_actions"], float(state["reference"])
        whole = counts.dtype.kind == "i" and counts.shape == (len(self.environments),)
        if not whole or (counts < 0).any() or not -1.0 <= reference <= 1.0:
            raise ValueError("the counts of illegal actions or the policy's value do not fit")
        self.agent.set_state(
            {key.removeprefix("agent:"): v for key, v in state.items() if key.startswith("agent:")}
        )
        self.tree = DecisionTree.from_array(state["untried"])
        self._returning.set_state(state)
        self.reference = reference
        for environment, count in zip(self.environments, counts, strict=True):
            environment.illegal_actions = int(count)


INTRINSIC = 1.0
"""What the lower level pays for missing its goal, per share of the kernel's weights."""

_SELECTOR = "selector:"


def make_episodes(settings: LoopSettings, network: CompressedNetwork) -> SearchEpisodes:
    """The episodes of a search: moves from plan to plan, or decisions in one level or in two."""
    if settings.strategy == IMPROVE:
        return ImprovementEpisodes(settings, network)
    return (HierarchicalEpisodes if settings.hierarchy else Episodes)(settings, network)


class HierarchicalEpisodes(Episodes):
    """Plays search episodes in which the order of the layers is a decision, too.

    The higher level chooses the next kernel and the share of it to prune, see
    [LayerSelectionEnvironment][rl_sparsity_tf.LayerSelectionEnvironment]. The lower level is the
    agent of [Episodes][rl_sparsity_tf.search.episodes.Episodes]: it sees the goal, its buckets are
    cut there, and it is paid the plan's value less [INTRINSIC][] times what it missed the goal by.
    The higher level is paid the plan's value. Both are of the configured kind.

    Attributes:
        selection: The environment of the higher level.
        selector: Its agent; `agent` is that of the lower level.
        misses: Of the last episode, kernel by kernel in the order played: how far the share that
            was pruned is from the goal.
    """

    def __init__(self, settings: LoopSettings, network: CompressedNetwork):
        super().__init__(settings, network)
        self.selection = LayerSelectionEnvironment(
            network, reward=settings.reward, play_layer=self._play_kernel
        )
        self.selector = build_agent(
            _of_the_selector(settings.agent),
            self.selection.time_step_spec(),
            self.selection.action_spec(),
            seed=int(np.random.SeedSequence([settings.seed, 2]).generate_state(1)[0]),
        )
        self.misses: list[float] = []
        self._near = False
        self._total = 0.0
        self._demonstration: Demonstration | None = None

    def centre(self, plan: CompressionPlan, near: bool = False) -> None:
        """Puts the goals around a plan's densities; the buckets are cut at the goals.

        With `near` only densities near those are looked for.
        """
        densities = {path: 1.0 - entry.sparsity for path, entry in plan.kernels.items()}
        self.selection.centre(densities, near)
        self._near = near

    def retarget(self, anew: bool = True) -> None:
        """Follows the network to another budget; what both agents have learned stays with them.

        `anew` is whether the decisions that were played before may be played again.
        """
        super().retarget(anew)
        self.selection.retarget()
        self._near = False

    @property
    def illegal_actions(self) -> int:
        """Actions so far that were not legal, of both levels."""
        return super().illegal_actions + self.selection.illegal_actions

    def play(self, demonstration: Demonstration | None = None) -> float:
        """Plays an episode; the network is left with its plan.

        A demonstration decides in place of both agents. Gives the sum of the lower level's rewards.
        """
        self.tree.restart()
        self._demonstrated = demonstration is not None
        self._demonstration = demonstration = demonstration or self._random_densities()
        self._played, self.misses, self._total = [], [], 0.0
        self._returning.restart(
            sum(one.steps for one in self.environments) + len(self.environments)
        )
        time_step = self.selection.reset()
        while not time_step.is_last():
            forced = None
            if demonstration is not None:
                # Random densities come in a random order; heuristics have none.
                count = 1 if self._demonstrated else len(self.selection.slots)
                slot = int(self._returning.generator.integers(count))
                forced = demonstrated_selection(self.selection, demonstration, slot)
            action = self._decide(self.selector, time_step, forced)
            time_step = self.selection.step(np.int32(action))
            self.selector.observe(time_step)
        self.tree.finish()
        return self._total

    def _play_kernel(self, path: str, goal: float) -> None:
        environment = self._environment_of(path)
        environment.later = self.selection.undecided
        environment.evaluate = not environment.later
        environment.aim(goal, self._near)
        self._total += self._play_layer(environment, self._demonstration)
        self._played.append(environment)
        self.misses.append(abs(self._pruned_share(environment) - goal))

    def _environment_of(self, path: str) -> LayerEnvironment:
        # They are not in the network's order.
        return next(one for one in self.environments if one.kernel == path)

    def _pruned_share(self, environment: LayerEnvironment) -> float:
        size = self.network.kernels[environment.index].size
        return int(self.network.budget.pruned[environment.index]) / size

    def learn(self, value: float) -> dict[str, float]:
        """Lets both agents learn from the episode played last, whose plan was worth so much.

        Losses are by name; those of the higher level begin with `selection_`.
        """
        self._returning.finish(value, self._demonstrated)
        losses = self._learn([value - INTRINSIC * miss for miss in self.misses])
        above = self.selector.end_episode(worth=value)
        return {**losses, **{f"selection_{name}": loss for name, loss in above.items()}}

    def get_state(self) -> dict[str, np.ndarray]:
        """Everything to go on from, as arrays."""
        above = self.selector.get_state()
        return {
            **super().get_state(),
            **{f"{_SELECTOR}{key}": value for key, value in above.items()},
            "illegal_selections": np.array(self.selection.illegal_actions),
        }

    def set_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Goes on from what [get_state][] gave."""
        super().set_state(state)
        above = {k.removeprefix(_SELECTOR): v for k, v in state.items() if k.startswith(_SELECTOR)}
        self.selector.set_state(above)
        self.selection.illegal_actions = int(state["illegal_selections"])


def demonstrated_selection(
    environment: LayerSelectionEnvironment, demonstration: Demonstration, slot: int = 0
) -> int:
    """The action that shows a heuristic's densities: a slot, and its goal nearest to them.

    The environment is at a time step that is not the last; the action is legal.
    """
    wanted = 1.0 - demonstration.densities[environment.slots[slot]]
    legal = environment.current_time_step().observation["legal"]
    goals, first = environment.goals(slot), slot * GOALS
    return min(
        (first + level for level in range(GOALS) if legal[first + level]),
        key=lambda action: abs(goals[action - first] - wanted),
    )


def _of_the_selector(config: AgentConfig) -> AgentConfig:
    """The relaxed reward is about operations: there is no gradient by the choice of a layer."""
    if getattr(config, "relaxed_reward", 0.0):
        return dataclasses.replace(config, relaxed_reward=0.0)  # type: ignore[call-arg]
    return config


_ENVIRONMENT = "environment:"


class ImprovementEpisodes(SearchEpisodes):
    """Plays one move from the best plan per episode, and lets the agent learn what it was worth.

    The moves of all kernels come first, as in a search by hill climbing; then the agent decides.

    Attributes:
        environment: Of whole plans; it remembers the best.
    """

    shown = False

    def __init__(self, settings: LoopSettings, network: CompressedNetwork):
        self.environment = ImprovementEnvironment(network, reward=settings.reward, moves=1)
        self.agent = build_agent(
            _of_the_selector(settings.agent),
            self.environment.time_step_spec(),
            self.environment.action_spec(),
            seed=settings.seed,
            slots=INTERFACES[IMPROVE].slots,
        )
        if settings.policy is not None:
            self.agent.set_policy_arrays(settings.policy.weights)
        self._opening = list(SCHEDULE)
        self._recorded = False

    @property
    def illegal_actions(self) -> int:
        """Actions so far that were not legal."""
        return self.environment.illegal_actions

    @property
    def decisions(self) -> int:
        """A whole plan is one."""
        return 1

    def centre(self, plan: CompressionPlan, near: bool = False) -> None:
        """Starts from a plan, unless the search has left its first one already."""
        if not self.environment.begun:
            self.environment.start_from(plan)

    def begin_anew(self) -> None:
        """Forgets the best plan and what was tried next to it."""
        self.environment.start_from(None)
        self._opening = list(SCHEDULE)

    def retarget(self, anew: bool = True) -> None:
        """Follows the network to another budget; what the agent has learned stays with it.

        `anew` is whether another plan is to be improved.
        """
        if anew:
            self.begin_anew()

    def play(self, demonstration: Demonstration | None = None) -> float:
        """Makes a move; the network is left with the plan behind it."""
        self.environment.commit()
        time_step = self.environment.reset()
        forced = opened(self._opening, time_step.observation["legal"])
        # What a policy is paid for what it did not choose is no experience of its own.
        self._recorded = forced is None or self.agent.off_policy
        if forced is not None and not self._recorded:
            return float(self.environment.step(np.int32(forced)).reward)
        action = self.agent.step(time_step, action=forced)
        time_step = self.environment.step(np.int32(action))
        self.agent.observe(time_step)
        return float(time_step.reward)

    def learn(self, value: float) -> dict[str, float]:
        """Lets the agent learn from the move; it is paid by what the best plan gained."""
        return self.agent.end_episode() if self._recorded else {}

    def get_state(self) -> dict[str, np.ndarray]:
        """Everything to go on from, as arrays."""
        environment = self.environment.to_arrays()
        return {
            **{f"agent:{key}": value for key, value in self.agent.get_state().items()},
            **{f"{_ENVIRONMENT}{key}": value for key, value in environment.items()},
            "opening": np.array(len(self._opening)),
        }

    def set_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Goes on from what [get_state][] gave.

        Raises AgentStateError if it is the state of another agent, and ValueError, KeyError or
        TypeError if it is none of these episodes.
        """
        opening = int(state["opening"])
        if not 0 <= opening <= len(SCHEDULE):
            raise ValueError(f"{opening} rankings are said to be left")
        mine = {k.removeprefix(_ENVIRONMENT): v for k, v in state.items() if _ENVIRONMENT in k}
        self.environment.set_arrays(mine)
        self.agent.set_state(
            {key.removeprefix("agent:"): v for key, v in state.items() if key.startswith("agent:")}
        )
        self._opening = list(SCHEDULE)[len(SCHEDULE) - opening :]
