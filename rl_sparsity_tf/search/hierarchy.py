"""The search in two levels: one agent chooses layers and goals, another how to meet them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from rl_sparsity_tf.agents.configs import AgentConfig, build_agent
from rl_sparsity_tf.agents.demonstrations import Demonstration
from rl_sparsity_tf.environment.layer_environment import LayerEnvironment
from rl_sparsity_tf.environment.network import CompressedNetwork
from rl_sparsity_tf.environment.selection_environment import GOALS, LayerSelectionEnvironment
from rl_sparsity_tf.layers.plan import CompressionPlan
from rl_sparsity_tf.search.episodes import Episodes, LoopSettings

INTRINSIC = 1.0
"""What the lower level pays for missing its goal, per share of the kernel's weights."""

_SELECTOR = "selector:"


def make_episodes(settings: LoopSettings, network: CompressedNetwork) -> Episodes:
    """The episodes of a search, in one level or in two."""
    return (HierarchicalEpisodes if settings.hierarchy else Episodes)(settings, network)


class HierarchicalEpisodes(Episodes):
    """Plays search episodes in which the order of the layers is a decision, too.

    The higher level chooses the next kernel and the share of it to prune, see
    [LayerSelectionEnvironment][rl_sparsity_tf.LayerSelectionEnvironment]. The lower level is the
    agent of [Episodes][rl_sparsity_tf.search.episodes.Episodes]: it sees the goal, its buckets are
    cut there, and it is paid the plan's value less [INTRINSIC][] times what it missed the goal by.
    The higher level is paid the plan's value. Both are of the configured kind.

    Args:
        settings: Agents, reward and seed.
        network: The network.

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

        Args:
            plan: The plan.
            near: Whether only densities near those are looked for.
        """
        densities = {path: 1.0 - entry.sparsity for path, entry in plan.kernels.items()}
        self.selection.centre(densities, near)
        self._near = near

    def retarget(self, anew: bool = True) -> None:
        """Follows the network to another budget; what both agents have learned stays with them.

        Args:
            anew: Whether the decisions that were played before may be played again.
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

        Args:
            demonstration: What decides in place of both agents, if anything.

        Returns:
            The sum of the lower level's rewards.
        """
        self.untried.restart()
        self._demonstrated = demonstration is not None
        self._demonstration = demonstration = demonstration or self._random_densities()
        self._played, self.misses, self._total = [], [], 0.0
        self._anchor.restart(sum(one.steps for one in self.environments) + len(self.environments))
        time_step = self.selection.reset()
        while not time_step.is_last():
            forced = None
            if demonstration is not None:
                # Random densities come in a random order; heuristics have none.
                count = 1 if self._demonstrated else len(self.selection.slots)
                slot = int(self._anchor.generator.integers(count))
                forced = demonstrated_selection(self.selection, demonstration, slot)
            action = self._decide(self.selector, time_step, forced)
            time_step = self.selection.step(np.int32(action))
            self.selector.observe(time_step)
        self.untried.finish()
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
        """Lets both agents learn from the episode played last.

        Args:
            value: What its plan turned out to be worth.

        Returns:
            Losses by name; those of the higher level begin with `selection_`.
        """
        self._anchor.finish(value, self._demonstrated)
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

    Args:
        environment: The environment, at a time step that is not the last.
        demonstration: What to show.
        slot: Which of the slots.

    Returns:
        A legal action.
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
