"""The network while it is being compressed: decisions go in, figures come out."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras as keras

from rl_sparsity_tf.allocation.budgets import Budget, KernelState
from rl_sparsity_tf.allocation.decisions import KernelDecisions
from rl_sparsity_tf.allocation.target import Target
from rl_sparsity_tf.data.batches import TrainingData
from rl_sparsity_tf.data.checks import Batch
from rl_sparsity_tf.data.extremes import check_loss, check_training, check_weights
from rl_sparsity_tf.data.metrics import Evaluator, Metric, Score, choose_metric
from rl_sparsity_tf.data.metrics import search_compile_arguments as search_arguments
from rl_sparsity_tf.environment.autoencoder import WeightAutoencoder
from rl_sparsity_tf.environment.group_ranks import GroupRanks
from rl_sparsity_tf.environment.reward import Outcome
from rl_sparsity_tf.errors import ArgumentError
from rl_sparsity_tf.files import sha256_of
from rl_sparsity_tf.keras3.door import takes_keras_3
from rl_sparsity_tf.layers.copy_checks import check_figures
from rl_sparsity_tf.layers.groups import Grouping
from rl_sparsity_tf.layers.kernels import Kernel, walk
from rl_sparsity_tf.layers.operations import Operation, constraint_of
from rl_sparsity_tf.layers.plan import CompressionPlan
from rl_sparsity_tf.layers.structure import fixed_batch
from rl_sparsity_tf.layers.wrapper import unwrapped
from rl_sparsity_tf.layers.wrapping import wrapped_kernels
from rl_sparsity_tf.training.least_squares import LeastSquares, closed_form
from rl_sparsity_tf.training.preparation import prepare_for_short_recovery
from rl_sparsity_tf.training.recovery import Recovery
from rl_sparsity_tf.training.statistics import KernelStatistics, StatisticsCollector, WeightMoments


def outcome_of(network: CompressedNetwork, score: Score) -> Outcome:
    """The outcome of the present decisions, by a score on validation data or an estimate of it."""
    altered = sum(network.errors[kernel.path] * kernel.size for kernel in network.kernels)
    sizes = sum(kernel.size for kernel in network.kernels)
    budget, states = network.budget, network.states()
    return Outcome(
        metric=score.metric,
        dense_metric=network.dense.metric,
        loss=score.loss,
        retention=network.metric.retention(score.metric, network.dense.metric),
        sparsity=budget.sparsity,
        target_sparsity=budget.goal,
        stored_bits=budget.stored_share(states),
        reconstruction_error=altered / sizes,
        output_error=float(np.mean(list(network.output_errors.values()))),
        progress=budget.saved(states),
    )


def retargeted(network: CompressedNetwork, outcome: Outcome) -> Outcome:
    """An outcome of the present decisions, by the budget that the network has now.

    What was measured does not depend on the target; how much of it is reached does.
    """
    goal, progress = network.budget.goal, network.budget.saved(network.states())
    return dataclasses.replace(outcome, target_sparsity=goal, progress=progress)


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """Everything that a decision changes: to go back to, or to save.

    Attributes:
        weights: Weights of the wrapped model, masks and grids included; None where decisions do
            not train, and they follow from the operations.
        operations: Operations by kernel path.
        decided: Per kernel and group, whether it has been decided.
        errors: The autoencoder's error per kernel, as of the kernel's last decision.
        output_errors: How far each layer's outputs move, as of the kernel's last decision.
        pruned: Weights pruned per kernel.
        clock: Training steps taken.
    """

    weights: list[np.ndarray] | None
    optimizer: list[np.ndarray]
    operations: dict[str, np.ndarray]
    decided: dict[str, np.ndarray]
    errors: dict[str, float]
    output_errors: dict[str, float]
    pruned: np.ndarray
    clock: int
    outcome: Outcome

    @classmethod
    def of(cls, network: CompressedNetwork) -> Snapshot:
        """Copies what a network is now."""
        trained = network.least_squares is None
        return cls(
            weights=[one.numpy() for one in network.model.weights] if trained else None,
            optimizer=[one.numpy() for one in network.model.optimizer.variables],
            operations={path: value.copy() for path, value in network.operations.items()},
            decided={path: value.copy() for path, value in network.decided.items()},
            errors=dict(network.errors),
            output_errors=dict(network.output_errors),
            pruned=network.budget.pruned.copy(),
            clock=network.clock,
            outcome=network.outcome,
        )


class EffectiveKernels:
    """The effective weights of wrapped kernels, by functions traced once per kernel."""

    def __init__(self, kernels: Sequence[Kernel]):
        self._kernels = {kernel.path: kernel for kernel in kernels}
        self._traced: dict[str, Any] = {
            kernel.path: tf.function(
                functools.partial(kernel.wrapper.effective_kernel, kernel.spec.attribute),
                # Only what a user wrote may branch on tensors; conversion takes longer than that.
                autograph=constraint_of(kernel.variable) is not None,
            )
            for kernel in kernels
            if kernel.wrapper is not None
        }
        self._known: dict[str, np.ndarray] = {}

    @property
    def functions(self) -> list[Any]:
        """The traced functions, for counting how often they were traced."""
        return list(self._traced.values())

    def matrix(self, path: str) -> np.ndarray:
        """A kernel's effective weights, viewed as `(inputs, outputs)`."""
        if path not in self._known:
            value = self._traced[path]().numpy()
            self._known[path] = self._kernels[path].spec.to_matrix_numpy(value)
        return self._known[path]

    def forget(self, path: str | None = None) -> None:
        """To be called when a kernel, or by default any of them, has changed."""
        if path is None:
            self._known.clear()
        else:
            self._known.pop(path, None)


_STATISTICS_BATCHES = 8


class CompressedNetwork:
    """A wrapped copy of a model that takes decisions and tells what they cost.

    Deterministic: the same decisions from the same snapshot give the same figures. For that, the
    copy's dropout and noise layers are switched off (a handful of recovery steps needs no
    regularisation) and training batches are taken by a running number.

    The model must be built and compiled, and is not changed. By default every kernel is decided on
    by itself, and the metric is the model's first; it may be a name, or a name and its direction.
    `seed` is the autoencoder's. `like` is another network of the same model, data and seed: what it
    has measured of the dense network is taken over.

    Raises ModelError if nothing can be compressed, or the model is not compiled or holds NaN;
    DataError if the data is so large that the loss or its gradients leave float32; and TargetError
    if the target is out of reach.
    """

    @takes_keras_3
    def __init__(
        self,
        model: keras.Model,
        train: TrainingData,
        validation: list[Batch],
        *,
        target: Target,
        group: str = "element",
        decisions: KernelDecisions | None = None,
        recovery: Recovery | None = None,
        metric: str | tuple[str, str] | None = None,
        seed: int = 0,
        like: CompressedNetwork | None = None,
    ):
        recovery = recovery or Recovery()
        search_arguments(model, recovery.learning_rate)  # says in words what is missing
        check_weights(model)
        self.target = target
        self.decisions = decisions or KernelDecisions(group)
        self.storage = self.decisions.storage
        self.model = self.decisions.wrap(model)
        prepare_for_short_recovery(self.model)
        self.model.compile(**search_arguments(self.model, recovery.learning_rate))
        self.train, self.validation = train, validation
        self.parts: list[Kernel] = wrapped_kernels(self.model)
        self.kernels: list[Kernel] = self.decisions.kernels(model, self.parts)
        self.recovery = recovery.resolved(self.parts, fixed_batch(model))
        self.groupings: dict[str, Grouping] = self.storage.groupings(self.kernels)
        self.budget: Budget = self.decisions.budget(model, self.kernels, target)
        self.metric: Metric = choose_metric(self.model, validation[0], metric)
        self._effective = EffectiveKernels(self.parts)
        self._evaluator = Evaluator(self.model, self.metric)
        self.dense: Score = like.dense if like else self._evaluator(validation)
        if like is None:
            name = "validation_data"
            check_loss(self.dense.loss, validation, name, self._evaluator, self.model)
            check_training(self.model, train.large, fixed_batch(model))
            check_figures(model, self.model, validation[0])
        self._collector = StatisticsCollector(self.model)
        if self.recovery.method == "finetune":
            self.model.optimizer.build(self.model.trainable_variables)
        self._train_function = tf.function(lambda *batch: self.model.train_step(batch))
        self.originals = {kernel.path: kernel.matrix().copy() for kernel in self.kernels}
        self.autoencoder: WeightAutoencoder = (
            like.autoencoder if like else WeightAutoencoder(self.originals, seed=seed)
        )
        self.original_moments = {p: WeightMoments.of(m) for p, m in self.originals.items()}
        self._first_order: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self.clock = 0  # training steps taken
        shapes = {path: grouping.shape for path, grouping in self.groupings.items()}
        self.operations = {p: np.full(s, Operation.KEEP, np.uint8) for p, s in shapes.items()}
        self.decided = {path: np.zeros(shape, bool) for path, shape in shapes.items()}
        self._states: dict[str, KernelState] = {}  # as far as they are asked for
        self.errors = dict.fromkeys(self.groupings, 0.0)
        self.output_errors = dict.fromkeys(self.groupings, 0.0)
        self.seen: set[str] = set()  # digests of the plans that were evaluated
        self.alternatives: dict[str, dict[tuple[str, int], Any]] = {}  # notes, see Problem
        self._known: dict[str, Outcome] = {}
        batches = [train.batch(one) for one in range(min(_STATISTICS_BATCHES, len(train.pool)))]
        self.dense_statistics: dict[str, KernelStatistics] = (
            like.dense_statistics if like else self.decisions.statistics(self._collector(batches))
        )
        self.statistics = self.dense_statistics
        self.least_squares: LeastSquares | None = None
        if self.recovery.method == "least_squares":
            groupings = self.decisions.part_storage.groupings(self.parts)
            pieces = (self.model, self.parts, groupings, train, fixed_batch(model))
            self.least_squares = closed_form(*pieces, ridge=self.recovery.ridge)
        self.group_ranks = GroupRanks(self)
        self.outcome = outcome_of(self, self.dense)
        self._start = self.snapshot()

    # ------------------------------------------------------------------ decisions

    def decide(self, path: str, groups: np.ndarray, operation: Operation) -> Outcome:
        """Applies one operation to some groups of a kernel, given by flat indices.

        The network then recovers by training steps and is evaluated; or, with least squares, its
        outcome is estimated from how far the layer's outputs move, until [finish][]. Keep changes
        nothing, so its outcome is the last one.
        """
        self.decided[path].reshape(-1)[groups] = True
        self.operations[path].reshape(-1)[groups] = operation
        self._states.pop(path, None)
        if operation == Operation.KEEP or len(groups) == 0:
            return self.outcome
        self._apply(path)
        if self.recovery.method == "finetune":
            self.train_steps(self.recovery.steps)
        self._measure_alteration(path)
        if self.least_squares is None:
            self.outcome = self.evaluate()
        else:
            moved = float(np.mean(list(self.output_errors.values())))
            self.outcome = outcome_of(self, self.metric.estimated(self.dense, moved))
        return self.outcome

    def assign(self, path: str, operations: np.ndarray) -> None:
        """Decides a whole kernel, without recovery or evaluation."""
        self.decided[path][:] = True
        self.operations[path][:] = operations
        self._states.pop(path, None)
        self._apply(path)
        self._measure_alteration(path)

    def _apply(self, path: str) -> None:
        self.budget.pruned[self.index_of(path)] = int(
            self.groupings[path].sizes[self.operations[path] == Operation.PRUNE].sum()
        )
        operations = self.decisions.operations(self.operations, self.decisions.affected(path))
        for part in self.parts:
            if part.path in operations:
                self._effective.forget(part.path)
                self._assign(part, operations[part.path])

    def _assign(self, part: Kernel, operations: np.ndarray) -> None:
        assert part.wrapper is not None
        storage = self.decisions.part_storage.of(part.path)
        part.wrapper.assign_operations(part.spec.attribute, operations, storage.bits)

    def _measure_alteration(self, path: str) -> None:
        self.errors[path] = self.autoencoder.error(path, self.effective_matrix(path))
        if self.least_squares is not None:
            self.output_errors[path] = self.decisions.moved(
                path, self._effective.matrix, self.least_squares
            )

    def finish(self, evaluated: bool = True) -> Outcome:
        """Recovers by least squares and evaluates, if that is the recovery.

        A plan that was evaluated before has the outcome it had then. With other recoveries,
        `evaluated` says whether the decisions have been evaluated already.
        """
        if self.least_squares is None:
            self.outcome = self.outcome if evaluated else self.evaluate()
            return self.outcome
        digest = self._digest()
        if digest not in self._known:
            # What is seen of the network does not depend on whether its plan was new.
            with self.recovered():
                self._known[digest] = self.evaluate()
        self.seen.add(digest)
        self.outcome = retargeted(self, self._known[digest])
        return self.outcome

    @contextlib.contextmanager
    def recovered(self) -> Iterator[LeastSquares]:
        """Has the fit of the present plan in the network while it is open."""
        self._recover()  # of the plan evaluated last, all is at hand
        try:
            assert self.least_squares is not None
            yield self.least_squares
        finally:
            self._undo_recovery()

    def _recover(self) -> None:
        assert self.least_squares is not None
        self._forget()
        operations = self._part_operations(self.operations)
        self.least_squares.recover(operations, self.decisions.part_storage.bits(operations))

    def _part_operations(self, decided: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return self.decisions.operations(decided, [part.path for part in self.parts])

    def _undo_recovery(self) -> None:
        if self.least_squares is not None:
            self.least_squares.reset()
            self._forget()

    def train_steps(self, steps: int) -> None:
        """Trains on the next batches of the pool, with the operations held."""
        self._forget()
        for _ in range(steps):
            self._train_function(*self.train.batch(self.clock))
            self.clock += 1

    def evaluate(self) -> Outcome:
        """Scores the network as it is on the validation data."""
        self.seen.add(self._digest())
        return outcome_of(self, self._evaluator(self.validation))

    def _digest(self) -> str:
        chunks = (value.tobytes() for value in self.operations.values())
        return sha256_of(self.storage.key(self.kernels), *chunks)

    def states(self) -> list[KernelState]:
        """How far every kernel is decided."""
        for path, grouping in self.groupings.items():
            if path not in self._states:
                pieces = (grouping.sizes, self.decided[path], self.operations[path])
                self._states[path] = KernelState.of(*pieces)
        return [self._states[path] for path in self.groupings]

    def state_after(self, path: str, groups: np.ndarray, operation: Operation) -> KernelState:
        """How far a kernel would be decided if some groups, by flat indices, got an operation."""
        decided, operations = self.decided[path].copy(), self.operations[path].copy()
        decided.reshape(-1)[groups] = True
        operations.reshape(-1)[groups] = operation
        return KernelState.of(self.groupings[path].sizes, decided, operations)

    @property
    def evaluations(self) -> int:
        """Distinct plans scored on validation data."""
        return len(self.seen)

    # ------------------------------------------------------------------ observing

    def index_of(self, path: str) -> int:
        """A kernel's place in the network."""
        if path in self.groupings:
            return list(self.groupings).index(path)
        raise ArgumentError(
            f"The network has no kernel {path!r}. Expected one of {list(self.groupings)}."
        )

    def effective_matrix(self, path: str) -> np.ndarray:
        """A kernel's present effective weights, viewed as `(inputs, outputs)`."""
        return self.decisions.matrix(path, self._effective.matrix)

    def _forget(self) -> None:
        """To be called when weights have changed."""
        self._effective.forget()
        if self.least_squares is None:
            self._first_order.clear()

    def latent_matrix(self, path: str) -> np.ndarray:
        """A kernel's present weights before operations are applied."""
        return self.kernels[self.index_of(path)].matrix()

    def saliency(self, path: str) -> np.ndarray:
        """What a kernel's groups are pruned by, the least salient first; flat, 1 is average."""
        matrix, grouping = self.latent_matrix(path), self.groupings[path]
        density = 1.0 - self.budget.pruned_share
        return self.decisions.saliency(path, matrix, grouping, self.least_squares, density)

    def scores(self, name: str) -> list[np.ndarray] | None:
        """Scores of all groups by a heuristic, lowest first; None if it has nothing to rank by."""
        gradients = {path: one.gradient for path, one in self.dense_statistics.items()}
        # A network that fits its data perfectly has no gradient to rank by.
        if name == "first_order" and not any(one.any() for one in gradients.values()):
            return None
        pieces = (self.kernels, self.groupings, self.originals, gradients)
        return self.decisions.scores(name, *pieces, self.least_squares)

    def first_order(self, path: str) -> tuple[np.ndarray, np.ndarray]:
        """Saliencies of all groups, from the last statistics and the present weights."""
        if path not in self._first_order:
            self._first_order[path] = self.statistics[path].first_order(
                self.latent_matrix(path), self.groupings[path]
            )
        return self._first_order[path]

    def measure(self) -> None:
        """Refreshes the activation and gradient statistics, on one training batch.

        With least squares nothing is trained on the way: they stay those of the dense network.
        """
        if self.least_squares is None:
            self._forget()
            batch = self.train.batch(self.clock)
            self.statistics = self.decisions.statistics(self._collector([batch]))

    @property
    def plan(self) -> CompressionPlan:
        """The decisions so far."""
        return self.storage.plan(self.kernels, list(self.operations.values()))

    # ------------------------------------------------------------------ going back

    def snapshot(self) -> Snapshot:
        """Copies everything that decisions change."""
        return Snapshot.of(self)

    def restore(self, snapshot: Snapshot) -> None:
        """Goes back to a snapshot."""
        self._forget()
        if snapshot.weights is None:
            self._undo(snapshot)
        for variable, value in zip(self.model.weights, snapshot.weights or [], strict=False):
            variable.assign(value)
        for variable, value in zip(self.model.optimizer.variables, snapshot.optimizer, strict=True):
            variable.assign(value)
        self.operations = {path: value.copy() for path, value in snapshot.operations.items()}
        self.decided = {path: value.copy() for path, value in snapshot.decided.items()}
        self._states.clear()
        self.errors = dict(snapshot.errors)
        self.output_errors = dict(snapshot.output_errors)
        self.budget.pruned[:] = snapshot.pruned
        self.clock = snapshot.clock
        self.outcome = snapshot.outcome

    def _undo(self, snapshot: Snapshot) -> None:
        """Goes back to the trained weights under a snapshot's operations."""
        self._undo_recovery()
        present = self._part_operations(self.operations)
        wanted = self._part_operations(snapshot.operations)
        for part in self.parts:
            if part.wrapper is not None and (wanted[part.path] != present[part.path]).any():
                self._assign(part, wanted[part.path])

    def reset(self) -> None:
        """Goes back to the dense network."""
        self.restore(self._start)

    def retarget(self, budget: Budget) -> None:
        """Goes back to the dense network, under another budget; what is known of plans stays so.

        The budget has to be made of the present one, with nothing pruned yet.
        """
        self.reset()
        self.budget = budget
        self.decisions.adopt(budget)
        self.group_ranks = GroupRanks(self)
        self.outcome = retargeted(self, self.outcome)
        self._start = self.snapshot()

    def tracing_count(self) -> int:
        """How often functions were traced, for tests of retracing."""
        own = [self._train_function, self._evaluator.function, self._collector.function]
        return sum(f.experimental_get_tracing_count() for f in [*own, *self._effective.functions])

    def latent_weights(self) -> Mapping[str, list[np.ndarray]]:
        """Recovered weights of every layer by name, before operations are applied."""
        if self.least_squares is not None:
            self._recover()  # of the plan evaluated last, all is at hand
        weights = {path: unwrapped(layer).get_weights() for path, layer in walk(self.model)}
        self._undo_recovery()
        return weights


def evaluate_plan(network: CompressedNetwork, plan: CompressionPlan, steps: int = 0) -> Outcome:
    """Puts a plan on the dense network, lets it recover, and evaluates it once.

    The plan has operations for every kernel, of the network's kind of groups; the network is left
    with it applied. `steps` are training steps per kernel, where the recovery is fine-tuning.
    """
    network.reset()
    for kernel in network.kernels:
        operations = plan.kernels[kernel.path].operations
        network.assign(kernel.path, operations)
        if network.recovery.method == "finetune":
            network.train_steps(steps)
    return network.finish(evaluated=False)
