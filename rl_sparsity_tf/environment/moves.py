"""Moves from one whole plan to another: what a search that improves a plan chooses from, and sees.

A plan is in a network that is fitted to it. A move changes one thing: which groups of a kernel
live, ranked anew in this network ([Context][rl_sparsity_tf.environment.reranking.Context]), or how
many, where all other kernels pay for it or gain from it, so that the target is met by every plan;
or all weights without an effect make room for others. Building a plan anew is a long way to a
better one; next to a good plan there are many (compare Chen & Tian 2019, "Learning to perform local
rewriting for combinatorial optimization", arXiv 1810.00337).
"""

from __future__ import annotations

import dataclasses

from rl_sparsity_tf.allocation.density_plans import PlanSpace, shares
from rl_sparsity_tf.environment.features import NETWORK_FEATURES, SLOT_FEATURES, Feature
from rl_sparsity_tf.environment.network import CompressedNetwork
from rl_sparsity_tf.environment.reranking import Context
from rl_sparsity_tf.layers.operations import Operation
from rl_sparsity_tf.layers.plan import CompressionPlan

FACTOR = 1.5
"""A kernel becomes denser or sparser by this factor, relative to the others, if none is given."""
ALPHA = 0.5
"""The power of what outputs matter, in rankings."""
BETAS = (0.0, 0.5, 1.0)
"""The powers of the inputs' energies that are tried."""


@dataclasses.dataclass(frozen=True)
class Move:
    """One change of a whole plan.

    Attributes:
        kind: `"rank"`, `"denser"`, `"sparser"`; or `"release"`, of all kernels together.
        kernel: The path of the kernel that is changed; None ranks all of them.
        beta: The power of the inputs' energies in a ranking.
        factor: By which the kernel becomes denser or sparser, relative to the others.
    """

    kind: str
    kernel: str | None = None
    beta: float = 0.5
    factor: float = FACTOR


SLOTS = 8
"""Kernels that moves can be chosen of at a time, beside all together."""

_RANKINGS = tuple(Move("rank", beta=beta) for beta in BETAS)
MOVES = (*_RANKINGS, Move("denser"), Move("sparser"))
"""The moves of a kernel."""

OF_ALL = (*_RANKINGS, Move("release"))
"""The moves of all kernels together."""

ACTIONS = (1 + SLOTS) * len(MOVES)

# All kernels together have four moves, and a fifth action that is never legal.
MOVE_NAMES = (
    *(f"all_{move.kind}" + (f"_{move.beta:g}" if move.kind == "rank" else "") for move in OF_ALL),
    "all_none",
    *(move.kind + (f"_{move.beta:g}" if move.kind == "rank" else "") for move in MOVES),
)
"""What the actions of the first slot, and of any other, are called."""

KINDS = ("rank_all", "release", "rank", "denser", "sparser")

_ELSEWHERE = {one.name: one for one in (*SLOT_FEATURES, *NETWORK_FEATURES)}
OF_A_SLOT: tuple[Feature, ...] = (
    Feature("present", 0, "1 if the slot holds a kernel (the first: all), else 0, as what follows"),
    *(_ELSEWHERE[name] for name in ("share", "fan_in", "fan_out", "sensitivity", "depth")),
    *(_ELSEWHERE[name] for name in ("convolution", "depthwise")),
    Feature("density", 0, "1 + log2(share of its groups that live) / 16"),
    Feature("relative_density", 0, "that share d against the network's m: d/(d+m)"),
    Feature("reconstruction_error", 0, "autoencoder's error on the weights that the plan leaves"),
    Feature("output_error", 0, "how far the layer's outputs move before the fit"),
    Feature("unread", 0, "share of the outputs that the loss does not depend on any more"),
    Feature("unfed", 0, "share of the outputs without a weight that lives"),
    *(Feature(f"churn_{b:g}", 0, f"share that a ranking with beta {b:g} replaces") for b in BETAS),
    Feature("lost", 0, "what the pruned groups are worth, of all groups"),
    Feature("gained", 0, "what the best pruned groups g are worth, of the living ones l: g/(g+l)"),
    Feature("paid", 0, "what the worst living groups are worth, of the living ones"),
    Feature("rank_before", -1, "what the last ranking here changed the value by, times 10"),
    Feature("denser_before", -1, "the same of the last move to be denser (all: of releasing)"),
    Feature("sparser_before", -1, "the same of the last move to be sparser"),
)
OF_THE_NETWORK: tuple[Feature, ...] = (
    _ELSEWHERE["target"],
    Feature("density", 0, "1 + log2(share of the weights that live) / 16"),
    *(_ELSEWHERE[name] for name in ("retention", "loss_ratio")),
    Feature("kernels", 0, "log2(kernels) / 8"),
    Feature("waiting", 0, "moves n since the last improvement: n / (n + 8)"),
    *(Feature(f"{k}_succeeds", 0, "(improvements + 1/2) / (moves + 1), of these") for k in KINDS),
)

IMPROVEMENT_FEATURES: tuple[Feature, ...] = (
    *OF_THE_NETWORK,
    *(
        dataclasses.replace(one, name=f"slot_{slot}_{one.name}")
        for slot in range(1 + SLOTS)
        for one in OF_A_SLOT
    ),
)
"""The features of the state, in order; every value lies in [low, 1]."""

IMPROVEMENT_STATE_SIZE = len(IMPROVEMENT_FEATURES)

SLOT_SHAPE = (len(OF_THE_NETWORK), 1 + SLOTS, len(OF_A_SLOT))
"""Features of the network, slots, and features of a slot: how a state is cut."""


class Neighbours:
    """The plans that are one move away from the plan a network was evaluated with last.

    With `quantize`, what lives is stored as integers where that works.

    Example:
        >>> near = Neighbours(network, quantize=True)
        >>> evaluate_plan(network, near.plan(Move("rank")))
        >>> near.renew()  # if that was better
    """

    def __init__(self, network: CompressedNetwork, quantize: bool):
        self._network, self._quantize = network, quantize
        self.renew()

    def renew(self) -> None:
        """Goes to the plan that the network was evaluated with last."""
        self.context = Context(self._network)
        # Anew, so that the plans next to this one do not depend on those before it.
        self._space = PlanSpace(self._network, self._quantize)
        operations = self.context.operations
        self.live = [operations[k.path] != Operation.PRUNE for k in self._network.kernels]
        self._released = self.context.released()
        scores = {p: self.context.scores(p, ALPHA, 0.5) for p in self.context.paths}
        self._space.prefer(self.live, scores)

    def of_all(self) -> list[Move]:
        """The moves of all kernels together that can change something."""
        found = [Move("rank", None, beta) for beta in BETAS] if self.context.paths else []
        return found if self._released is None else [*found, Move("release")]

    def moves(self, kernel: str) -> list[Move]:
        """The moves of a kernel that can change something."""
        index = self._network.index_of(kernel)
        alive = self.live[index]
        found = []
        if kernel in self.context.paths and alive.any() and not alive.all():
            found += [Move("rank", kernel, beta) for beta in BETAS]
        if not alive.all():
            found.append(Move("denser", kernel))
        if alive.sum() > 1:
            found.append(Move("sparser", kernel))
        return found

    def plan(self, move: Move) -> CompressionPlan:
        """The plan behind a move; it meets the target.

        Raises TargetError if a budget of bytes cannot be met without integers.
        """
        if move.kind == "release":
            assert self._released is not None
            return self._released
        if move.kernel is None:
            return self.context.plan(ALPHA, move.beta)
        if move.kind == "rank":
            return self.context.plan(ALPHA, move.beta, [move.kernel])
        self._space.look_near(self.live)
        ratios = shares(self.live)
        index = self._network.index_of(move.kernel)
        ratios[index] *= move.factor if move.kind == "denser" else 1.0 / move.factor
        return self._space.plan_of(self._space.live(self._space.scores(ratios)))
