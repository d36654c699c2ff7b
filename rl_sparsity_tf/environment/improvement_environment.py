"""The environment of whole plans: a step changes one thing of the best plan so far.

Every action is a whole plan that meets the target, so that an episode can end anywhere. Building a
plan bucket by bucket, an agent finds out at the end alone what its first decisions were worth; here
it finds out at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from rl_sparsity_tf.allocation.density_plans import PlanSpace
from rl_sparsity_tf.checks import check_count
from rl_sparsity_tf.environment.candidates import plan_of
from rl_sparsity_tf.environment.features import (
    against,
    print_features,
    state_of,
    static_features,
)
from rl_sparsity_tf.environment.layer_environment import NetworkEnvironment
from rl_sparsity_tf.environment.moves import (
    ACTIONS,
    ALPHA,
    BETAS,
    IMPROVEMENT_FEATURES,
    KINDS,
    MOVES,
    OF_A_SLOT,
    OF_ALL,
    OF_THE_NETWORK,
    SLOTS,
    Move,
    Neighbours,
)
from rl_sparsity_tf.environment.network import CompressedNetwork, evaluate_plan
from rl_sparsity_tf.environment.reranking import RELEASE, can_rerank
from rl_sparsity_tf.environment.reward import Outcome, RewardFunction, bounded
from rl_sparsity_tf.errors import ArgumentError
from rl_sparsity_tf.layers.plan import CompressionPlan

# By which a kernel becomes denser or sparser; the next is taken where all moves were tried.
_FACTORS = (1.5, 1.2, 2.0, 1.1)
# What an improvement of the value is multiplied by: near a good plan they are small.
_SCALE = 10.0
# Of a kernel's living groups, those whose worth says what the next move costs or gives.
_MARGIN = 0.25
_OF_ONE = ("rank", "denser", "sparser")


@dataclasses.dataclass
class _Position:
    """The best plan so far, and what is known of the moves from it."""

    plan: CompressionPlan
    value: float
    outcome: Outcome
    near: Neighbours
    views: list[dict[str, float]]  # what is seen of every kernel
    possible: dict[int, list[int]]  # the moves that there are of each, of all together at -1
    tried: set[tuple[int, int]]  # a kernel, of which -1 is all, and a move
    passes: int
    known: _Known

    def copy(self) -> _Position:
        return dataclasses.replace(self, tried=set(self.tried), known=self.known.copy())


@dataclasses.dataclass
class _Known:
    """What moves have given so far, from whatever plan."""

    waiting: int = 0
    changed: dict[tuple[int, str], float] = dataclasses.field(default_factory=dict)
    counts: dict[str, list[int]] = dataclasses.field(  # moves and improvements
        default_factory=lambda: {kind: [0, 0] for kind in KINDS}
    )

    def copy(self) -> _Known:
        counts = {kind: list(pair) for kind, pair in self.counts.items()}
        return _Known(self.waiting, dict(self.changed), counts)

    def note(self, index: int, kind: str, gain: float, improved: bool) -> None:
        kind = "rank_all" if index < 0 and kind == "rank" else kind
        self.changed[index, kind] = gain
        self.counts[kind][0] += 1
        self.counts[kind][1] += improved
        self.waiting = 0 if improved else self.waiting + 1


class ImprovementEnvironment(NetworkEnvironment):
    """Improves a whole plan of a network, one move at a time.

    The action is `slot * 5 + move`. Slot 0 is all kernels together, eight more hold those kernels
    whose masks look most in need of another ranking and that have moves left. The moves are three
    rankings of the masks in context (see `rls.baselines.hill_climbing`); of a kernel, two changes
    of density, which the other kernels pay for or gain from; and of all kernels together, to let
    weights without an effect make room for others. The target is met by every plan. A step
    evaluates the plan behind its move. Its reward is by how much the best plan's value rose, times
    ten, at most 1; what is better is kept, and the next move starts there. Resetting undoes the
    episode: it goes back to the plan that the environment began with, or [commit][] was called at.

    The observation is a dict:

    * `"state"`: float32 of shape `(218,)`, see `describe_improvement_state`;
    * `"legal"`: int32 of shape `(45,)`, 1 for every move that was not tried from this plan. An
      illegal action is executed as the first legal one and counted in `illegal_actions`.

    Args:
        network: The network being compressed; its recovery is least squares.
        reward: What an outcome is worth.
        start: The plan to begin with, of the network's kernels; by default LAMP's.
        moves: Steps of an episode.
        quantize: Whether what comes to life is quantized.

    Attributes:
        begun: Whether there was a reset since the plan to begin with was set.
        illegal_actions: How many actions were not legal.

    Raises:
        ArgumentError: If the network is none, or its masks cannot be ranked anew.

    Example:
        >>> from rl_sparsity_tf.data.batches import evaluation_data, training_data
        >>> from rl_sparsity_tf.environment.network import CompressedNetwork
        >>> network = CompressedNetwork(
        ...     model,
        ...     training_data((x, y), model, batch_size=32),
        ...     evaluation_data((x_val, y_val), model, "validation_data"),
        ...     target=rls.Target(sparsity=0.9),
        ... )
        >>> env = rls.ImprovementEnvironment(network)
        >>> time_step = env.reset()
        >>> time_step = env.step(1)  # the masks of all kernels, ranked anew
        >>> env.plan  # the best so far
        CompressionPlan(...)
    """

    def __init__(
        self,
        network: CompressedNetwork,
        *,
        reward: RewardFunction | None = None,
        start: CompressionPlan | None = None,
        moves: int = 8,
        quantize: bool = True,
    ):
        super().__init__(network, reward, IMPROVEMENT_FEATURES, ACTIONS, "slot_and_move")
        if not can_rerank(network):
            raise ArgumentError(
                f"The network recovers by {network.recovery.method!r}, in groups of "
                f"{network.decisions.group!r}. Expected least squares and no whole channels (and "
                "no training step of the model's own), where masks can be ranked in context; a "
                "LayerEnvironment takes any."
            )
        check_count("moves", moves, 1)
        self.moves, self._quantize = moves, quantize
        self._gain, self._taken = 0.0, 0
        self._slots: list[int] = []
        self._static: list[dict[str, float]] = []
        self.start_from(start)

    def start_from(self, plan: CompressionPlan | None) -> None:
        """Takes another plan to begin with, from the next reset on, and forgets all it knows.

        It is to be called as well where the network's budget is another.

        Args:
            plan: A plan of the network's kernels; None is LAMP's.
        """
        self._start = plan
        self._committed: _Position | None = None
        self._now: _Position | None = None
        self._saved: tuple[set[tuple[int, int]], int, _Known] = set(), 0, _Known()
        self.begun = False

    def commit(self) -> None:
        """Makes the best plan so far the one that episodes begin with."""
        if self._now is not None:
            self._committed = self._now.copy()

    @property
    def plan(self) -> CompressionPlan:
        """The best plan so far; there is one from the first reset on."""
        return self._position.plan

    @property
    def value(self) -> float:
        """What the reward says of it, in [-1, 1]."""
        return self._position.value

    @property
    def slots(self) -> list[str]:
        """The kernels to choose from, in the slots from 1 on."""
        return [self.network.kernels[index].path for index in self._slots]

    @property
    def _everyone(self) -> range:
        return range(len(self.network.kernels))

    @property
    def _position(self) -> _Position:
        if self._now is None:
            raise ArgumentError("There is no plan yet. Expected env.reset() before.")
        return self._now

    def _begin(self) -> None:
        self._taken, self.begun = 0, True
        if self._committed is None:
            plan = self._start or self._lamp()
            outcome = evaluate_plan(self.network, plan)
            tried, passes, known = self._saved
            value = bounded(self.reward, outcome, None)
            self._committed = self._at(plan, value, outcome, tried, passes, known)
        self._now = self._committed.copy()

    def _at(
        self,
        plan: CompressionPlan,
        value: float,
        outcome: Outcome,
        tried: set[tuple[int, int]],
        passes: int,
        known: _Known,
    ) -> _Position:
        """Looks at what is next to a plan, which the network was evaluated with last."""
        network, near = self.network, Neighbours(self.network, self._quantize)
        if not self._static:
            self._static = [static_features(network, index) for index in self._everyone]
        views = [self._seen_of(index, near, outcome) for index in self._everyone]
        kernels = enumerate(network.kernels)
        possible = {index: _numbers(MOVES, near.moves(kernel.path)) for index, kernel in kernels}
        possible[-1] = _numbers(OF_ALL, near.of_all())
        return _Position(plan, value, outcome, near, views, possible, tried, passes, known)

    def _lamp(self) -> CompressionPlan:
        space = PlanSpace(self.network, self._quantize)
        return space.plan_of(space.live(space.lamp_scores()))

    def _execute(self, action: int) -> tuple[Outcome, bool]:
        legal = self._legal()
        if not legal[action]:
            self.illegal_actions += 1
            action = int(np.argmax(legal))
        slot, number = divmod(action, len(MOVES))
        index = self._slots[slot - 1] if slot else -1
        now = self._position
        now.tried.add((index, number))
        kernel = None if index < 0 else self.network.kernels[index].path
        factor = _FACTORS[now.passes % len(_FACTORS)]
        made = OF_ALL[number] if index < 0 else MOVES[number]
        move = dataclasses.replace(made, kernel=kernel, factor=factor)
        outcome = evaluate_plan(self.network, now.near.plan(move))
        value = bounded(self.reward, outcome, None)
        self._gain = value - now.value
        improved = (value, -outcome.loss) > (now.value, -now.outcome.loss)
        now.known.note(index, move.kind, self._gain, improved)
        if improved:
            self._now = self._at(self.network.plan, value, outcome, set(), 0, now.known)
        self._taken += 1
        return outcome, self._taken >= self.moves

    def _worth(self, outcome: Outcome, previous: Outcome) -> float:
        return float(np.clip(_SCALE * self._gain, 0.0, 1.0))

    # ------------------------------------------------------------------ observing

    def _left(self, index: int) -> list[int]:
        """The numbers of the moves of a kernel, or of all (-1), that were not tried from here."""
        now = self._position
        return [number for number in now.possible[index] if (index, number) not in now.tried]

    def _legal(self) -> np.ndarray:
        legal = np.zeros((1 + SLOTS, len(MOVES)), np.int32)
        for slot, index in enumerate([-1, *self._slots]):
            legal[slot, self._left(index)] = 1
        if not legal.any():  # a mask has to allow something, where nothing can be moved, too
            legal[0, 0] = 1
        return legal.reshape(-1)

    def _observe(self) -> dict[str, np.ndarray]:
        now = self._position
        if not any(self._left(index) for index in (-1, *self._everyone)):
            # Other steps of density are next to the plan, too; its rankings were tried.
            now.passes += 1
            now.tried = {(i, n) for i, n in now.tried if i < 0 or MOVES[n].kind == "rank"}
        left = [index for index in self._everyone if self._left(index)]
        self._slots = sorted(left, key=lambda index: (-now.views[index]["need"], index))[:SLOTS]
        seen = {f"slot_0_{name}": value for name, value in self._seen_of_all().items()}
        for slot, index in enumerate(self._slots, 1):
            before = {f"{kind}_before": self._before(index, kind) for kind in _OF_ONE}
            mine = now.views[index] | before
            seen |= {f"slot_{slot}_{name}": value for name, value in mine.items()}
        seen |= self._seen_of_network()
        names = (feature.name for feature in IMPROVEMENT_FEATURES)
        values = {name: seen.get(name, 0.0) for name in names}
        return {"state": state_of(IMPROVEMENT_FEATURES, values), "legal": self._legal()}

    def _before(self, index: int, kind: str) -> float:
        return _SCALE * self._position.known.changed.get((index, kind), 0.0)

    def _seen_of_network(self) -> dict[str, float]:
        network, outcome, known = self.network, self._position.outcome, self._position.known
        rates = {
            f"{kind}_succeeds": (good + 0.5) / (moves + 1)
            for kind, (moves, good) in known.counts.items()
        }
        return rates | {
            "target": outcome.target_sparsity,
            "density": _log_share(1.0 - outcome.sparsity),
            "retention": outcome.retention,
            "loss_ratio": against(network.dense.loss, outcome.loss),
            "kernels": float(np.log2(len(network.kernels))) / 8,
            "waiting": known.waiting / (known.waiting + 8),
        }

    def _seen_of_all(self) -> dict[str, float]:
        """The first slot's features: the kernels' means, by their shares of the weights."""
        views = self._position.views
        shares = np.array([view["share"] for view in views])
        names = [one.name for one in OF_A_SLOT if one.name in views[0]]
        means = {n: float(shares @ [view[n] for view in views]) for n in names}
        before = {
            "rank_before": self._before(-1, "rank_all"),
            "denser_before": self._before(-1, "release"),
        }
        return means | before | {"share": 1.0, "present": 1.0}

    def _seen_of(self, index: int, near: Neighbours, outcome: Outcome) -> dict[str, float]:
        """What is seen of a kernel in a plan, whatever was tried next to it."""
        network = self.network
        path, live = network.kernels[index].path, near.live[index]
        sizes = network.groupings[path].sizes
        density = float(live.mean())
        whole = 1.0 - outcome.sparsity
        view = dict.fromkeys((one.name for one in OF_A_SLOT), 0.0) | {
            name: value for name, value in self._static[index].items() if name in _NAMES
        }
        view |= {
            "density": _log_share(density),
            "relative_density": against(density, whole),
            "reconstruction_error": network.errors[path],
            "output_error": network.output_errors[path],
            "unfed": _without_life(live),
            "need": 0.0,
        }
        if path not in near.context.paths or live.all() or not live.any():
            return view
        view["unread"] = near.context.unread(path)
        worth = near.context.scores(path, ALPHA, 0.5) * sizes
        alive, gone = np.sort(worth[live]), np.sort(worth[~live])[::-1]
        few = max(1, round(_MARGIN * alive.size))
        total = float(alive.sum())
        view["lost"] = float(gone.sum()) / max(total + float(gone.sum()), 1e-30)
        view["gained"] = against(float(gone[:few].sum()), total)
        view["paid"] = float(alive[:few].sum()) / max(total, 1e-30)
        present = near.context.operations[path]
        for beta in BETAS:
            ranked = near.context.ranked(path, ALPHA, beta)
            view[f"churn_{beta:g}"] = float((ranked != present).sum()) / (2.0 * alive.size)
        view["need"] = view["share"] ** 0.5 * (view["churn_0.5"] + view["lost"])
        return view

    # ------------------------------------------------------------------ going back

    def get_state(self) -> Any:
        """Everything needed to come back to this point of the episode with `set_state`."""
        now = self._position.copy()
        numbers = self._gain, self._taken, list(self._slots)
        return self.network.snapshot(), now, numbers, self._current_time_step

    def set_state(self, state: Any) -> None:
        """Comes back to a point saved with `get_state`."""
        snapshot, now, (self._gain, self._taken, slots), self._current_time_step = state
        self.network.restore(snapshot)
        self._now, self._slots = now.copy(), list(slots)

    def to_arrays(self) -> dict[str, np.ndarray]:
        """The best plan and what is known of the moves from it, to be saved; nothing is pickled."""
        now = self._now
        tried, passes, known = (now.tried, now.passes, now.known) if now else self._saved
        plan = now.plan if now else self._start
        changed = [(i, KINDS.index(kind), gain) for (i, kind), gain in known.changed.items()]
        return {
            "plan": np.array(plan.to_json() if plan else ""),
            "begun": np.array(self.begun),
            "tried": np.array(sorted(tried), np.int64).reshape(-1, 2),
            "passes": np.array(passes),
            "waiting": np.array(known.waiting),
            "changed": np.array(changed, np.float64).reshape(-1, 3),
            "counts": np.array([known.counts[kind] for kind in KINDS], np.int64),
            "illegal_actions": np.array(self.illegal_actions),
        }

    def set_arrays(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Goes on from what [to_arrays][] gave.

        Raises ValueError, KeyError or TypeError if the arrays are none of this environment's, and
        PlanError if they hold no plan.
        """
        tried, changed, counts = arrays["tried"], arrays["changed"], arrays["counts"]
        passes, waiting, illegal = (
            int(arrays[name]) for name in ("passes", "waiting", "illegal_actions")
        )
        shapes = [one.shape[1:] for one in (tried, changed)] == [(2,), (3,)]
        if not shapes or counts.shape != (len(KINDS), 2) or min(passes, waiting, illegal) < 0:
            raise ValueError("the moves that were tried are none")
        kernels = len(self.network.kernels)
        known = all(-1 <= i < kernels and 0 <= n < len(MOVES) for i, n in tried.tolist())
        ranges = np.isfinite(changed).all() and all(
            -1 <= i < kernels and 0 <= k < len(KINDS) for i, k, _ in changed.tolist()
        )
        if not known or not ranges or (counts < 0).any() or (counts[:, 1] > counts[:, 0]).any():
            raise ValueError("the moves that were tried are of another network")
        text = str(arrays["plan"])
        # The plan is evaluated at the next reset: its budget need not be the network's yet.
        self.start_from(plan_of(text, self.network) if text else None)
        gains = {(int(i), KINDS[int(k)]): float(gain) for i, k, gain in changed.tolist()}
        pairs = dict(zip(KINDS, counts.tolist(), strict=True))
        self._saved = {(i, n) for i, n in tried.tolist()}, passes, _Known(waiting, gains, pairs)
        self.begun, self.illegal_actions = bool(arrays["begun"]), illegal


def describe_improvement_state(
    state: Sequence[float] | np.ndarray | None = None, print_fn: Callable[[str], None] = print
) -> None:
    """Prints the features of [ImprovementEnvironment][rl_sparsity_tf.ImprovementEnvironment].

    Without a state those of one slot stand for all nine.

    Args:
        state: A state as found in an observation's `"state"`, whose values are printed too.
        print_fn: Called with every line.

    Raises:
        ArgumentError: If the state has another size.

    Example:
        >>> rls.describe_improvement_state()
         # feature                      range    meaning
         0 target                       [0, 1]   the sparsity that is wanted
        ...
    """
    one = [dataclasses.replace(feature, name=f"slot_k_{feature.name}") for feature in OF_A_SLOT]
    features = [*OF_THE_NETWORK, *one] if state is None else IMPROVEMENT_FEATURES
    print_features(features, state, print_fn)


_NAMES = {one.name for one in OF_A_SLOT}


def opened(left: list[tuple[float, float] | None], legal: np.ndarray) -> int | None:
    """The next action of a schedule of rankings that is legal, which leaves it; None at its end."""
    while left:
        powers = left.pop(0)
        action = len(BETAS) if powers is RELEASE else BETAS.index(powers[1])
        if legal[action]:
            return action
    return None


def _numbers(moves: Sequence[Move], found: Sequence[Move]) -> list[int]:
    """The numbers of those moves that were found, of whatever kernel and factor."""
    there = {(move.kind, move.beta) for move in found}
    return [number for number, move in enumerate(moves) if (move.kind, move.beta) in there]


def _log_share(share: float) -> float:
    return 1.0 + float(np.log2(max(share, 2.0**-16))) / 16


def _without_life(live: np.ndarray) -> float:
    """The share of a kernel's outputs (its groups' last axis) without a group that lives."""
    return float(1.0 - live.reshape(-1, live.shape[-1]).any(axis=0).mean())
