"""What a plan without a search is wanted for, and how far a ranking is pruned to meet it."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import tf_keras as keras

from rl_sparsity_tf.allocation import ranking as ranks
from rl_sparsity_tf.allocation import size_budget
from rl_sparsity_tf.allocation.budgets import Budget, CostBudget
from rl_sparsity_tf.allocation.decisions import KernelDecisions
from rl_sparsity_tf.allocation.layer_errors import FLOAT
from rl_sparsity_tf.allocation.storage import Storage
from rl_sparsity_tf.allocation.target import Target
from rl_sparsity_tf.data.extremes import check_weights
from rl_sparsity_tf.errors import ArgumentError, ModelError, TargetError, check_choice
from rl_sparsity_tf.layers.groups import GROUPS, Grouping
from rl_sparsity_tf.layers.kernels import Kernel, check_constraints, count_weights
from rl_sparsity_tf.layers.operations import Operation
from rl_sparsity_tf.layers.plan import CompressionPlan
from rl_sparsity_tf.layers.rules import KernelSelection, Patterns
from rl_sparsity_tf.layers.wrapping import accepted, is_wrapped
from rl_sparsity_tf.training.least_squares import LeastSquares


class Problem(Protocol):
    """What plans are wanted for: kernels with their weights, and the budget that they have to meet.

    A network under compression is one; whoever proposes plans for it reads this and nothing else,
    and changes none of it but its notes.
    """

    @property
    def kernels(self) -> Sequence[Kernel]:
        """What is decided on, in order."""

    @property
    def groupings(self) -> Mapping[str, Grouping]:
        """How each kernel is cut, by path."""

    @property
    def originals(self) -> Mapping[str, np.ndarray]:
        """The dense kernels as `(inputs, outputs)`, by path."""

    @property
    def budget(self) -> Budget:
        """What is still to be pruned."""

    @property
    def storage(self) -> Storage:
        """How each kernel is stored in the file."""

    @property
    def decisions(self) -> KernelDecisions:
        """What a decision is about: kernels by themselves, or channels."""

    @property
    def least_squares(self) -> LeastSquares | None:
        """The layers' least-squares problems; None if plans recover otherwise."""

    @property
    def alternatives(self) -> dict[str, dict[tuple[str, int], Any]]:
        """Notes of what was measured: by path, then by group and bits, [Alternative][]s."""


def sizes_of(problem: Problem) -> list[np.ndarray]:
    """For every kernel the weights of each of its groups."""
    return [problem.groupings[kernel.path].sizes for kernel in problem.kernels]


def cost_of(problem: Problem, live: Sequence[np.ndarray], bits: Mapping[str, int]) -> float:
    """What a network costs in which some groups live, by its budget."""
    assert isinstance(problem.budget, CostBudget)
    pairs = zip(sizes_of(problem), live, strict=True)
    pruned = [float(size[~alive].sum()) for size, alive in pairs]
    return problem.budget.total(pruned, [bits[kernel.path] < FLOAT for kernel in problem.kernels])


def meet(
    problem: Problem,
    scores: Sequence[np.ndarray],
    bits: Callable[[Sequence[np.ndarray]], Mapping[str, int]],
    guess: float | None = None,
) -> tuple[list[np.ndarray], bool]:
    """What lives when the groups of lowest score go until the budget is met, and whether it is.

    `bits` are those of the kernels in which some groups live, by path, where the budget is a cost;
    a `guess` of the weights to prune makes that quicker. All that can go does if nothing less
    meets it.
    """
    budget = problem.budget
    ranking = ranks.Ranking(scores, sizes_of(problem), problem.decisions.removable)
    if not isinstance(budget, CostBudget):
        return ranking.live(budget.wanted), True

    def within(live: Sequence[np.ndarray]) -> bool:
        return cost_of(problem, live, bits(live)) <= budget.limit

    return ranking.least_pruned(within, guess)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class PlanRequest:
    """What a plan is wanted for, checked: what all baselines have in common.

    `kernels` are those that the selection lets be changed; `bits` is the grid of what is quantized.
    """

    model: keras.Model
    selection: KernelSelection
    kernels: Sequence[Kernel]
    target: Target
    group: str
    quantize: bool
    bits: int

    @classmethod
    def of(
        cls,
        model: keras.Model,
        target: Target | None = None,
        *,
        sparsity: float | None = None,
        group: str = "element",
        quantize: bool | None = None,
        bits: int = 8,
        include: Patterns | None = None,
        exclude: Patterns | None = None,
    ) -> PlanRequest:
        """Checks the arguments of a baseline.

        An argument that cannot be used raises an ArgumentError; a model that has nothing to
        compress, is wrapped, or holds NaN raises a ModelError.
        """
        model = accepted(model)
        if is_wrapped(model):
            raise ModelError(
                f"Model {model.name!r} is wrapped already. Call rl_sparsity_tf.strip(model) first."
            )
        target = _target(target, sparsity)
        check_choice("group", group, GROUPS)
        if quantize is None:
            quantize = target.sparsity is None
        if not isinstance(quantize, bool | np.bool_):
            raise ArgumentError(
                f"quantize={quantize!r} cannot be used. Expected True, False, or None: True for "
                "targets in bytes and False for a sparsity."
            )
        if isinstance(bits, bool) or bits not in (8, 4):
            raise ArgumentError(f"bits={bits!r} cannot be used. Expected 8 or 4.")
        selection = KernelSelection.of(model, include, exclude).check(model)
        selection.check_sparsity(model, target.sparsity)
        kernels = selection.kernels(model)
        check_constraints(kernels)
        check_weights(model)
        return cls(
            model=model,
            selection=selection,
            kernels=kernels,
            target=target,
            group=group,
            quantize=bool(quantize),
            bits=int(bits),
        )

    @functools.cached_property
    def groupings(self) -> dict[str, Grouping]:
        """How the kernels are cut, by path."""
        return self.storage.groupings(self.kernels)

    @functools.cached_property
    def originals(self) -> dict[str, np.ndarray]:
        """The kernels as `(inputs, outputs)`, by path."""
        return {kernel.path: kernel.matrix() for kernel in self.kernels}

    @property
    def sizes(self) -> list[np.ndarray]:
        """For every kernel the weights of each of its groups."""
        return [grouping.sizes for grouping in self.groupings.values()]

    @property
    def storage(self) -> Storage:
        """How the kernels are cut and stored."""
        return Storage(self.group, default_bits=self.bits)

    @property
    def wanted(self) -> int:
        """Weights that a sparsity prunes; a TargetError says that there are not so many to give."""
        assert self.target.sparsity is not None
        return Budget(self.target.sparsity, count_weights(self.model)[1], self.sizes).wanted

    def plan(self, scores: Sequence[np.ndarray]) -> CompressionPlan:
        """The plan that prunes the groups of lowest score until the target is met.

        There is one score per group for every kernel. A target that cannot be met raises a
        TargetError; one in bytes raises an ExportError if the model cannot be converted.
        """
        ranking = ranks.Ranking(scores, self.sizes)
        with self.selection.explained():
            if self.target.sparsity is None:
                live = self._within_bytes(ranking)
            else:
                live = ranking.live(self.wanted)
        return self.plan_from_live(live)

    def plan_from_live(self, live: Sequence[np.ndarray]) -> CompressionPlan:
        """The plan in which some groups live, quantized or kept as requested."""
        return self.storage.plan_from_live(self.kernels, live, self.quantize)

    def _within_bytes(self, ranking: ranks.Ranking) -> list[np.ndarray]:
        file = RequestFile(self)
        bits = {
            kernel.path: self.bits
            for kernel in self.kernels
            if ranks.survivors(kernel, self.quantize) == Operation.QUANTIZE
        }
        live, reached = ranking.least_pruned(lambda one: file.total(one, bits) <= file.limit)
        if not reached:
            kind, stored = self.target.kind, "integers" if self.quantize else "floats"
            name = f"Target({kind}={self.target.value:,.0f})".replace(",", "_")
            least = math.ceil(file.total(live, bits) / (1.0 - size_budget.MARGINS[kind]))
            raise TargetError(
                f"{name} cannot be reached: with every kernel pruned to its last group and stored "
                f"as {stored}, the file would have about {least:,} bytes. Expected at least that "
                "many."
            )
        return live


class RequestFile:
    """Predicts the bytes of the file that a request's plan would be exported to.

    `limit` is what they may come to.
    """

    def __init__(self, request: PlanRequest):
        self.limit = size_budget.limit_of(request.target)
        self._bytes = size_budget.bytes_for(request.model, request.target)
        self._request = request

    def total(self, live: Sequence[np.ndarray], bits: Mapping[str, int]) -> float:
        """Bytes of the file in which some groups live; `bits` are 32 where nothing is said."""
        pairs = zip(self._request.kernels, live, strict=True)
        values = {kernel.path: self._value(kernel, alive) for kernel, alive in pairs}
        return self._bytes.file(values, bits)

    def kernel(self, kernel: Kernel, alive: np.ndarray, bits: int) -> float:
        """Bytes of one kernel of which some groups live."""
        return self._bytes.kernel(kernel.path, self._value(kernel, alive), bits)

    def _value(self, kernel: Kernel, alive: np.ndarray) -> np.ndarray:
        mask = self._request.groupings[kernel.path].expand_numpy(alive)
        matrix = np.where(mask, self._request.originals[kernel.path], 0.0).astype(np.float32)
        return kernel.spec.from_matrix_numpy(matrix, kernel.shape)


def _target(target: Target | None, sparsity: float | None) -> Target:
    """The one of the two that was given."""
    if (target is None) == (sparsity is None):
        raise ArgumentError(
            f"Received target={target!r} and sparsity={sparsity!r}. Expected exactly one of them: "
            "sparsity=0.8, or target=rls.Target(tflite_bytes=50_000)."
        )
    if target is None:
        return Target(sparsity=sparsity)
    if not isinstance(target, Target):
        raise ArgumentError(
            f"target={target!r} is a {type(target).__name__}. Expected a Target, for example "
            "rls.Target(tflite_bytes=50_000), or sparsity=0.8."
        )
    if target.needs_channels:
        raise ArgumentError(
            f"Target({target.kind}={target.value:g}) is met by removing whole channels, which the "
            "baselines do not. Expected a sparsity or bytes; a search for the target evaluates the "
            "heuristics for channels first, and rl_sparsity_tf.compare runs them."
        )
    if target.kind == "max_accuracy_drop":
        raise ArgumentError(
            f"Target(max_accuracy_drop={target.value:g}) is met by trying files of several sizes, "
            "which only a search does. Expected a sparsity or bytes: Target(tflite_bytes=...) with "
            "the bytes of the file that a search found makes a baseline comparable to it."
        )
    return target
