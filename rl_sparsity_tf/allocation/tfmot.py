"""TFMOT's magnitude pruning as its documentation teaches it: a baseline that trains by itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras as keras

from rl_sparsity_tf._compat import TFMOT, KerasVersionError, seeing_tf_keras
from rl_sparsity_tf.allocation import ranking
from rl_sparsity_tf.allocation.problem import PlanRequest
from rl_sparsity_tf.allocation.target import Target
from rl_sparsity_tf.checks import check_count
from rl_sparsity_tf.console import without_traces
from rl_sparsity_tf.data.batches import TrainingData, training_data
from rl_sparsity_tf.data.extremes import check_weights
from rl_sparsity_tf.data.metrics import search_compile_arguments
from rl_sparsity_tf.errors import (
    DataError,
    MissingDependencyError,
    ModelError,
    TargetError,
    one_line,
)
from rl_sparsity_tf.layers.copying import copy_compile_state
from rl_sparsity_tf.layers.kernels import Kernel
from rl_sparsity_tf.layers.plan import CompressionPlan
from rl_sparsity_tf.layers.rules import Patterns
from rl_sparsity_tf.layers.structure import is_graph
from rl_sparsity_tf.layers.wrapping import strip
from rl_sparsity_tf.training.mask_training import default_epochs

# What TFMOT's guide begins with, where the end is not below it.
INITIAL_SPARSITY = 0.5
# Steps between updates of the masks: TFMOT's default, but in short trainings no fewer updates
# than the eight that its guide's example comes to.
_FREQUENCY, _UPDATES = 100, 8
_LEARNING_RATE = 1e-3
# Groups of layers that TFMOT does not prune: behind every other score.
_LAST = 1e300


def tfmot(
    model: keras.Model,
    data: Any,
    target: Target | None = None,
    *,
    sparsity: float | None = None,
    epochs: int | None = None,
    batch_size: int = 128,
    quantize: bool | None = None,
    bits: int = 8,
    seed: int = 0,
    include: Patterns | None = None,
    exclude: Patterns | None = None,
) -> CompressionPlan:
    """What TFMOT's `prune_low_magnitude` leaves after a training of its own.

    Done as TFMOT's guide does it: every layer alike, from 50 % to the final sparsity by a
    `PolynomialDecay` (Zhu and Gupta 2017, "To prune, or not to prune", arXiv 1710.01878) that ends
    with the training, Adam at its default rate, `UpdatePruningStep`, `strip_pruning`. The plan
    prunes what is zero after it. Layers that TFMOT cannot prune stay dense, and the others are
    pruned further, so that the whole model has the sparsity asked for.

    Of a target in bytes the sparsity is the least that fits by the size model with the same
    density in every layer; TFMOT's training may make the weights compress a little differently.

    Args:
        model: A built and compiled Sequential or functional model; it is not changed.
        data: Training data as `fit` takes it.
        target: What to reach; or `sparsity`, short for `Target(sparsity=...)`.
        sparsity: Share of all weights of rank >= 2 to prune.
        epochs: Epochs of training; by default about 1,500 steps.
        batch_size: Rows in a batch, where the data is not batched already.
        quantize: Whether what lives is quantized, where TFLite can hold it as integers. By default
            for targets in bytes, and not for a sparsity.
        bits: 8 or 4, the grid of what is quantized.
        seed: Order of the rows, and TensorFlow's global seed while it trains.
        include: What alone is pruned, see [baselines][rl_sparsity_tf.baselines].
        exclude: What is not pruned. TFMOT prunes all kernels of a layer or none.

    Returns:
        A plan of single weights (TFMOT's own unit).

    Raises:
        ArgumentError: If an argument cannot be used.
        DataError: If there is no data, or it does not fit the model.
        MissingDependencyError: If TFMOT is not installed.
        ModelError: If TFMOT cannot prune the model, or the training ends in NaN.
        TargetError: If the target cannot be reached.

    Example:
        >>> plan = rls.baselines.tfmot(model, (x, y), sparsity=0.8, epochs=4)
    """
    request = PlanRequest.of(
        model,
        target,
        sparsity=sparsity,
        quantize=quantize,
        bits=bits,
        include=include,
        exclude=exclude,
    )
    for name, value, least in (("batch_size", batch_size, 1), ("seed", seed, 0)):
        check_count(name, value, least)
    if epochs is not None:
        check_count("epochs", epochs, 1)
    if data is None:
        raise DataError(
            "tfmot was given no data, which it trains on. Pass data=(x, y) or a dataset as fit "
            "takes them; lamp needs no data."
        )
    load_tfmot()
    with without_traces():
        # A shuffled dataset's order also depends on the global seed at the time it is made.
        tf.random.set_seed(seed)
        train = training_data(data, request.model, batch_size=batch_size, seed=seed)
        return prune_with_tfmot(request, train, epochs=epochs or default_epochs(train)).plan


@dataclasses.dataclass(frozen=True, kw_only=True)
class TfmotResult:
    """What TFMOT's training gave: the model, its zeros as a plan, and how many were asked for.

    The model's pruning wrappers are stripped, and it is compiled as the original.
    """

    model: keras.Model
    plan: CompressionPlan
    pruned: int


def prune_with_tfmot(
    request: PlanRequest,
    train: TrainingData,
    *,
    epochs: int,
    pruned: int | None = None,
    learning_rate: float = _LEARNING_RATE,
) -> TfmotResult:
    """Prunes and trains with TFMOT, from the weights of a request's model.

    The request is of single weights. At least `pruned` of them go, by default what its target asks
    for. `learning_rate` is Adam's. A MissingDependencyError says that TFMOT is not installed, a
    ModelError that it cannot prune the model or that the training ends in NaN, a TargetError that
    it cannot prune so many weights.
    """
    pruning = load_tfmot()
    if not is_graph(request.model):
        raise ModelError(
            f"Model {request.model.name!r} is a {type(request.model).__name__}, and TFMOT prunes "
            "Sequential and functional models only. Build it with keras.Model(inputs, outputs); "
            "the other baselines take it as it is."
        )
    arguments = search_compile_arguments(request.model, learning_rate)
    copy = strip(request.model)  # TFMOT puts the layers themselves into its wrappers
    prunable = _Prunable(pruning, request.selection.kernels(copy))
    if not prunable.kernels:
        raise ModelError(
            f"TFMOT can prune none of the kernels {[k.path for k in request.kernels]} of model "
            f"{request.model.name!r}. Expected a layer such as Dense or Conv2D that is not inside "
            "another one; the other baselines take the model as it is."
        )
    if pruned is None:
        pruned = _wanted(request, prunable)
    final = final_sparsity([kernel.size for kernel in prunable.kernels], pruned)
    steps = (train.steps or len(train.pool)) * epochs
    frequency = max(1, min(_FREQUENCY, steps // _UPDATES))
    schedule = pruning.PolynomialDecay(
        initial_sparsity=min(INITIAL_SPARSITY, final),
        final_sparsity=final,
        begin_step=0,
        # The last step at which the masks are updated: with the last step of training in its
        # place, the decay would stop short of the final sparsity.
        end_step=steps - steps % frequency,
        frequency=frequency,
    )
    try:
        model = pruning.prune_low_magnitude(
            copy, pruning_schedule=schedule, pruning_policy=prunable
        )
    except ValueError as error:
        raise ModelError(
            f"TFMOT cannot prune the model {request.model.name!r} ({one_line(error)}). Expected "
            "Sequential and functional models, with no subclassed one inside; the other baselines "
            "take the model as it is."
        ) from error
    # The wrappers have names of their own, by which losses of several outputs are not given.
    model.output_names = list(request.model.output_names)
    model.compile(**arguments)
    model.fit(train.dataset, epochs=epochs, verbose=0, callbacks=[pruning.UpdatePruningStep()])
    trained = strip(pruning.strip_pruning(model))
    check_weights(trained)
    copy_compile_state(request.model, trained)
    live = [kernel.matrix() != 0 for kernel in request.selection.kernels(trained)]
    return TfmotResult(model=trained, plan=request.plan_from_live(live), pruned=pruned)


def final_sparsity(sizes: Sequence[int], pruned: int) -> float:
    """The least sparsity at which TFMOT prunes so many weights of tensors of some sizes.

    TFMOT rounds to whole weights in every tensor, and keeps at least one. If the tensors do not
    have so many to give, a TargetError says how many.
    """
    low, high = 0.0, float(np.nextafter(np.float32(1), np.float32(0)))
    if pruned > _pruned_at(sizes, high):
        raise TargetError(
            f"{pruned} weights are to be pruned, but the layers that TFMOT can prune have only "
            f"{_pruned_at(sizes, high)} to give. Expected a lower sparsity or a larger file; the "
            "other baselines prune layers that TFMOT leaves alone."
        )
    if pruned <= 0:
        return low
    for _ in range(32):
        middle = float(np.float32((low + high) / 2))
        if _pruned_at(sizes, middle) >= pruned:
            high = middle
        else:
            low = middle
    return high


def _pruned_at(sizes: Sequence[int], sparsity: float) -> int:
    """Weights that TFMOT prunes, computed in float32 as it does."""
    share = np.float32(1) - np.float32(sparsity)
    return sum(size - max(1, int(np.round(np.float32(size) * share))) for size in sizes)


class _Prunable:
    """Which layers TFMOT prunes; stands in for its PruningPolicy, which is to be subclassed.

    A layer is pruned if TFMOT supports it and all that TFMOT would prune of it is a kernel. The
    `wanted` kernels are of a model that may be changed.
    """

    def __init__(self, pruning: Any, wanted: Sequence[Kernel]):
        self._layers: set[int] = set()
        self.kernels: list[Kernel] = []
        owned: dict[int, list[Kernel]] = {}
        for kernel in wanted:
            owned.setdefault(id(kernel.layer), []).append(kernel)
        for kernels in owned.values():
            layer = kernels[0].layer
            pruned = {id(weight) for weight in _pruned_weights(pruning, layer)}
            found = [kernel for kernel in kernels if id(kernel.variable) in pruned]
            if pruned and len(found) == len(pruned):
                self._layers.add(id(layer))
                self.kernels += found

    def allow_pruning(self, layer: keras.layers.Layer) -> bool:
        """Whether a layer is pruned; TFMOT asks this."""
        return id(layer) in self._layers

    def ensure_model_supports_pruning(self, model: keras.Model) -> None:
        """Does nothing: what is not supported is left alone."""


def _pruned_weights(pruning: Any, layer: keras.layers.Layer) -> list[tf.Variable]:
    """What TFMOT prunes of a layer: nothing of those it does not know."""
    try:
        wrapper = pruning.prune_low_magnitude(layer)
    except ValueError:
        return []
    return list(wrapper.layer.get_prunable_weights())


def _wanted(request: PlanRequest, prunable: _Prunable) -> int:
    """Weights to prune for a request's target."""
    if request.target.sparsity is not None:
        return request.wanted
    paths = {kernel.path for kernel in prunable.kernels}
    scores = ranking.scores("uniform", request.kernels, request.groupings, request.originals)
    for kernel, score in zip(request.kernels, scores, strict=True):
        if kernel.path not in paths:
            score[:] = _LAST
    # If the layers that TFMOT prunes cannot reach the size, these are more than they have to give.
    return request.plan(scores).count_operations()["prune"]


def load_tfmot() -> Any:
    """TFMOT's pruning module, imported only when it is needed.

    A MissingDependencyError tells the user how to install it.
    """
    try:
        with seeing_tf_keras(TFMOT):
            from tensorflow_model_optimization.sparsity import keras as pruning
    except KerasVersionError:
        raise
    except ImportError as error:
        raise MissingDependencyError(
            f"The baseline tfmot needs TFMOT, which could not be imported ({one_line(error)}). "
            "Install it with: pip install tensorflow-model-optimization. The other baselines do "
            "without."
        ) from error
    return pruning
