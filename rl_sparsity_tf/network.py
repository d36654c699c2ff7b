"""The network while it is being compressed: decisions go in, figures come out."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras as keras

from rl_sparsity_tf.autoencoder import WeightAutoencoder
from rl_sparsity_tf.budget import Budget
from rl_sparsity_tf.data import Batch, TrainingData
from rl_sparsity_tf.errors import ArgumentError, ModelError, check_choice
from rl_sparsity_tf.files import sha256_of
from rl_sparsity_tf.grouping import Grouping
from rl_sparsity_tf.kernels import Kernel, count_weights, find_kernels, walk
from rl_sparsity_tf.objective import Evaluator, Metric, Score, choose_metric
from rl_sparsity_tf.objective import search_compile_arguments as search_arguments
from rl_sparsity_tf.operations import Operation, stored_as_integers
from rl_sparsity_tf.plan import CompressionPlan, KernelPlan
from rl_sparsity_tf.reward import Outcome
from rl_sparsity_tf.size_budget import KernelState, SizeBudget
from rl_sparsity_tf.size_costs import size_budget
from rl_sparsity_tf.statistics import KernelStatistics, StatisticsCollector
from rl_sparsity_tf.sublayers import all_layers
from rl_sparsity_tf.target import Target
from rl_sparsity_tf.wrapper import unwrapped
from rl_sparsity_tf.wrapping import wrap

RECOVERIES = ("finetune", "none")
_STATISTICS_BATCHES = 8
# Four recovery steps renew two thirds of the moving statistics. At Keras's default of 0.99 they
# would describe the network before the decision, and every plan would score like chance.
_BATCH_NORM_MOMENTUM = 0.75


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recovery:
    """How the network recovers after a decision, before it is evaluated.

    Attributes:
        method: `"finetune"` (a few training steps) or `"none"`.
        steps: Training steps after every decision that changes the network.
        learning_rate: Of the Adam optimizer that takes them.
    """

    method: str = "finetune"
    steps: int = 4
    learning_rate: float = 1e-3

    def __post_init__(self) -> None:
        check_choice("Recovery(method)", self.method, RECOVERIES)
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 0:
            raise ArgumentError(
                f"Recovery(steps={self.steps!r}) cannot be used. Expected an integer of at least 0."
            )
        if not isinstance(self.learning_rate, int | float) or not 0 < self.learning_rate < 10:
            raise ArgumentError(
                f"Recovery(learning_rate={self.learning_rate!r}) cannot be used. Expected a "
                "positive number, for example 1e-3."
            )

    def to_dict(self) -> dict[str, Any]:
        """The recovery's fields."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """Everything that a decision changes: to go back to, or to save.

    Attributes:
        weights: Weights of the wrapped model, masks and grids included.
        optimizer: The optimizer's variables.
        operations: Operations by kernel path.
        decided: Per kernel and group, whether it has been decided.
        errors: The autoencoder's error per kernel, as of the kernel's last decision.
        pruned: Weights pruned per kernel.
        clock: Training steps taken.
        outcome: The last outcome.
    """

    weights: list[np.ndarray]
    optimizer: list[np.ndarray]
    operations: dict[str, np.ndarray]
    decided: dict[str, np.ndarray]
    errors: dict[str, float]
    pruned: np.ndarray
    clock: int
    outcome: Outcome


class CompressedNetwork:
    """A wrapped copy of a model that takes decisions and tells what they cost.

    Deterministic: the same decisions from the same snapshot give the same figures. For that, the
    copy's dropout and noise layers are switched off (a handful of recovery steps needs no
    regularisation) and training batches are taken by a running number.

    Args:
        model: A built and compiled model; it is not changed.
        train: Training data.
        validation: Validation batches.
        target: The target.
        group: Kind of groups.
        recovery: How to recover after a decision.
        metric: The metric's name, or its name and direction; by default the model's first.
        seed: Seed of the autoencoder.

    Raises:
        ModelError: If nothing can be compressed, the model is not compiled or holds NaN.
        TargetError: If the target is out of reach.
    """

    def __init__(
        self,
        model: keras.Model,
        train: TrainingData,
        validation: list[Batch],
        *,
        target: Target,
        group: str = "element",
        recovery: Recovery | None = None,
        metric: str | tuple[str, str] | None = None,
        seed: int = 0,
    ):
        self.recovery = recovery or Recovery()
        arguments = search_arguments(model, self.recovery.learning_rate)
        _check_finite(model)
        self.model = wrap(model, group=group)
        _prepare_for_short_recovery(self.model)
        self.model.compile(**arguments)
        self.group = group
        self.target = target
        self.train = train
        self.validation = validation
        self.kernels: list[Kernel] = find_kernels(self.model)
        if not self.kernels:
            raise ModelError(
                f"Model {model.name!r} has no layer that can be compressed. Expected at least one "
                "layer of a registered class; rl_sparsity_tf.describe_support(model) lists why "
                "each is skipped, and register_layer adds a class."
            )
        self.groupings: dict[str, Grouping] = {k.path: k.grouping(group) for k in self.kernels}
        _, elements = count_weights(model)
        self.budget = self._make_budget(model, elements)
        self.metric: Metric = choose_metric(self.model, validation[0], metric)
        self._effective = {
            kernel.path: tf.function(
                functools.partial(kernel.wrapper.effective_kernel, kernel.spec.attribute)
            )
            for kernel in self.kernels
            if kernel.wrapper is not None
        }
        self._evaluator = Evaluator(self.model, self.metric)
        self._collector = StatisticsCollector(self.model)
        self.model.optimizer.build(self.model.trainable_variables)
        self._train_function = tf.function(
            lambda x, y, weights: self.model.train_step((x, y, weights))
        )
        self.originals = {kernel.path: kernel.matrix().copy() for kernel in self.kernels}
        self.autoencoder = WeightAutoencoder(self.originals, seed=seed)
        self._clock = 0
        self.operations = {
            path: np.full(grouping.shape, Operation.KEEP, np.uint8)
            for path, grouping in self.groupings.items()
        }
        self.decided = {path: np.zeros(g.shape, bool) for path, g in self.groupings.items()}
        self.errors = dict.fromkeys(self.groupings, 0.0)
        self.seen: set[str] = set()  # digests of the plans that were evaluated
        self.dense: Score = self._evaluator(validation)
        self.statistics: dict[str, KernelStatistics] = self._collector(
            train.batch(index) for index in range(min(_STATISTICS_BATCHES, len(train.pool)))
        )
        self.dense_statistics = self.statistics
        self.outcome = self._outcome(self.dense)
        self._start = self.snapshot()

    def _make_budget(self, model: keras.Model, elements: int) -> Budget:
        sizes = [self.groupings[kernel.path].sizes for kernel in self.kernels]
        if self.target.sparsity is not None:
            return Budget(self.target.sparsity, elements, sizes)
        return size_budget(model, self.kernels, self.target, self.group, elements)

    # ------------------------------------------------------------------ decisions

    def decide(self, path: str, groups: np.ndarray, operation: Operation) -> Outcome:
        """Applies one operation to some groups of a kernel, recovers and evaluates.

        Args:
            path: The kernel's path.
            groups: Flat indices of the groups.
            operation: What to do with them.

        Returns:
            The network's outcome; for Keep, which changes nothing, the last one.
        """
        self.decided[path].reshape(-1)[groups] = True
        self.operations[path].reshape(-1)[groups] = operation
        if operation == Operation.KEEP or len(groups) == 0:
            return self.outcome
        index = self.index_of(path)
        self.budget.pruned[index] = int(
            self.groupings[path].sizes[self.operations[path] == Operation.PRUNE].sum()
        )
        kernel = self.kernels[index]
        assert kernel.wrapper is not None
        kernel.wrapper.assign_operations(kernel.spec.attribute, self.operations[path])
        if self.recovery.method == "finetune":
            self.train_steps(self.recovery.steps)
        self.errors[path] = self.autoencoder.error(path, self.effective_matrix(path))
        self.outcome = self.evaluate()
        return self.outcome

    def train_steps(self, steps: int) -> None:
        """Trains on the next batches of the pool, with the operations held."""
        for _ in range(steps):
            self._train_function(*self.train.batch(self._clock))
            self._clock += 1

    def evaluate(self) -> Outcome:
        """Scores the network as it is on the validation data."""
        self.seen.add(sha256_of(*(value.tobytes() for value in self.operations.values())))
        return self._outcome(self._evaluator(self.validation))

    def _outcome(self, score: Score) -> Outcome:
        altered = sum(self.errors[kernel.path] * kernel.size for kernel in self.kernels)
        sizes = sum(kernel.size for kernel in self.kernels)
        return Outcome(
            metric=score.metric,
            dense_metric=self.dense.metric,
            loss=score.loss,
            retention=self.metric.retention(score.metric, self.dense.metric),
            sparsity=self.budget.sparsity,
            target_sparsity=self.budget.goal,
            stored_bits=self._stored_bits(),
            reconstruction_error=altered / sizes,
        )

    def _stored_bits(self) -> float:
        if isinstance(self.budget, SizeBudget):
            return self.budget.kernel_bytes(self.states()) / self.budget.dense_kernel_bytes
        stored = 0.0
        for kernel in self.kernels:
            integers = stored_as_integers(self.operations[kernel.path])
            stored += kernel.size * (0.25 if integers else 1.0)
        return stored / sum(kernel.size for kernel in self.kernels)

    def states(self) -> list[KernelState]:
        """How far every kernel is decided."""
        return [self.state_after(kernel.path, None) for kernel in self.kernels]

    def state_after(
        self, path: str, groups: np.ndarray | None, operation: int = Operation.KEEP
    ) -> KernelState:
        """How far a kernel would be decided if some groups got an operation.

        Args:
            path: The kernel's path.
            groups: Flat indices of the groups; None for the kernel as it is.
            operation: What to do with them.
        """
        sizes = self.groupings[path].sizes
        decided, operations = self.decided[path], self.operations[path]
        if groups is not None:
            decided, operations = decided.copy(), operations.copy()
            decided.reshape(-1)[groups] = True
            operations.reshape(-1)[groups] = operation
        return KernelState(
            pruned=int(sizes[decided & (operations == Operation.PRUNE)].sum()),
            undecided=int(sizes[~decided].sum()),
            kept=bool((decided & (operations == Operation.KEEP)).any()),
            quantized=bool((decided & (operations == Operation.QUANTIZE)).any()),
        )

    @property
    def evaluations(self) -> int:
        """Distinct plans scored on validation data."""
        return len(self.seen)

    # ------------------------------------------------------------------ observing

    def index_of(self, path: str) -> int:
        """A kernel's place in the network."""
        for index, kernel in enumerate(self.kernels):
            if kernel.path == path:
                return index
        raise ArgumentError(
            f"The network has no kernel {path!r}. Expected one of "
            f"{[kernel.path for kernel in self.kernels]}."
        )

    def effective_matrix(self, path: str) -> np.ndarray:
        """A kernel's present effective weights, viewed as `(inputs, outputs)`."""
        kernel = self.kernels[self.index_of(path)]
        return kernel.spec.to_matrix_numpy(self._effective[path]().numpy())

    def latent_matrix(self, path: str) -> np.ndarray:
        """A kernel's present weights before operations are applied."""
        return self.kernels[self.index_of(path)].matrix()

    def measure(self) -> None:
        """Refreshes the activation and gradient statistics, on one training batch."""
        self.statistics = self._collector([self.train.batch(self._clock)])

    @property
    def plan(self) -> CompressionPlan:
        """The decisions so far."""
        return CompressionPlan(
            KernelPlan(
                kernel.path,
                kernel.shape,
                kernel.spec.layout,
                self.group,
                8,
                self.operations[kernel.path],
            )
            for kernel in self.kernels
        )

    # ------------------------------------------------------------------ going back

    def snapshot(self) -> Snapshot:
        """Copies everything that decisions change."""
        return Snapshot(
            weights=[variable.numpy() for variable in self.model.weights],
            optimizer=[variable.numpy() for variable in self.model.optimizer.variables],
            operations={path: value.copy() for path, value in self.operations.items()},
            decided={path: value.copy() for path, value in self.decided.items()},
            errors=dict(self.errors),
            pruned=self.budget.pruned.copy(),
            clock=self._clock,
            outcome=self.outcome,
        )

    def restore(self, snapshot: Snapshot) -> None:
        """Goes back to a snapshot."""
        for variable, value in zip(self.model.weights, snapshot.weights, strict=True):
            variable.assign(value)
        for variable, value in zip(self.model.optimizer.variables, snapshot.optimizer, strict=True):
            variable.assign(value)
        self.operations = {path: value.copy() for path, value in snapshot.operations.items()}
        self.decided = {path: value.copy() for path, value in snapshot.decided.items()}
        self.errors = dict(snapshot.errors)
        self.budget.pruned[:] = snapshot.pruned
        self._clock = snapshot.clock
        self.outcome = snapshot.outcome

    def reset(self) -> None:
        """Goes back to the dense network."""
        self.restore(self._start)

    def tracing_count(self) -> int:
        """How often the network's functions were traced, for tests of retracing."""
        functions = [self._train_function, self._evaluator.function, self._collector.function]
        functions += self._effective.values()
        return sum(function.experimental_get_tracing_count() for function in functions)

    def latent_weights(self) -> Mapping[str, list[np.ndarray]]:
        """Present weights of every layer by name, before operations are applied."""
        return {path: unwrapped(layer).get_weights() for path, layer in walk(self.model)}


def _check_finite(model: keras.Model) -> None:
    for weight in model.weights:
        if weight.dtype.is_floating and not bool(tf.reduce_all(tf.math.is_finite(weight))):
            raise ModelError(
                f"The weight {weight.name!r} of model {model.name!r} holds NaN or infinite values. "
                "Expected a trained model: train it again, with a smaller learning rate if the "
                "loss became NaN, or load a checkpoint from before."
            )


def _prepare_for_short_recovery(model: keras.Model) -> None:
    """Switches noise off, and lets batch-norm statistics follow within a few steps."""
    layers = keras.layers
    for layer in all_layers(model):
        # Recurrent cells; their layers only pass the rates on.
        if hasattr(layer, "recurrent_dropout") and not isinstance(layer, layers.RNN):
            layer.dropout = layer.recurrent_dropout = 0.0
        elif isinstance(layer, layers.Dropout | layers.GaussianDropout | layers.AlphaDropout):
            layer.rate = 0.0
        elif isinstance(layer, layers.GaussianNoise):
            layer.stddev = 0.0
        elif isinstance(layer, layers.BatchNormalization):
            layer.momentum = min(layer.momentum, _BATCH_NORM_MOMENTUM)
