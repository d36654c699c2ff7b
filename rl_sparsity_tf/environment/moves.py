"""Moves from one whole plan to another: what a search that improves a plan chooses from.

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
