"""Fine-tuning with masks that learn: groups may come back, every kernel's sparsity is held."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras as keras

from rl_sparsity_tf.checks import check_flag, check_share
from rl_sparsity_tf.data.batches import TrainingData, count_rows
from rl_sparsity_tf.data.checks import Batch
from rl_sparsity_tf.data.metrics import Evaluator, Metric, Score, search_compile_arguments
from rl_sparsity_tf.errors import ArgumentError
from rl_sparsity_tf.layers.groups import Grouping
from rl_sparsity_tf.layers.operations import magnitude, permute
from rl_sparsity_tf.layers.structure import all_layers
from rl_sparsity_tf.layers.wrapper import CompressionWrapper
from rl_sparsity_tf.layers.wrapping import wrappers_of
from rl_sparsity_tf.training.distillation import distilled

# A hard concrete gate's logit at the start, per unit of relative magnitude from the border between
# living and pruned groups.
_GATE_SLOPE = 0.5


def magnitudes(wrapper: CompressionWrapper, attribute: str) -> np.ndarray:
    """Root mean square of a kernel's groups, before the mask, relative to the whole kernel's."""
    state, grouping = wrapper.state(attribute), wrapper.grouping(attribute)
    matrix = wrapper.spec(attribute).to_matrix_numpy(wrapper.variable(attribute).numpy())
    if "swaps" in state:
        matrix = permute(tf.constant(matrix), state["swaps"] > 0, grouping).numpy()
    if grouping.block == 1:  # the common case, and the one with the most groups
        overall = float(np.sqrt(np.mean(np.square(matrix), dtype=np.float64)))
        return np.abs(matrix) / np.float32(overall if overall > 0 else 1.0)
    squares = grouping.sum_numpy(np.square(matrix, dtype=np.float64))
    return magnitude(matrix, squares, grouping.sizes)


def mask_scores(wrapper: CompressionWrapper, attribute: str) -> np.ndarray:
    """What a kernel's mask is selected by: the group's magnitude plus its logit.

    A hard concrete mask is selected by its logits alone.
    """
    logits = wrapper.state(attribute)["mask_logits"].numpy()
    if wrapper.mask == "hard_concrete":
        return logits
    return magnitudes(wrapper, attribute) + logits


def update_masks(
    wrapper: CompressionWrapper, alike: Mapping[str, np.ndarray] | None = None
) -> None:
    """Lets learnable masks follow their scores, with each kernel's sparsity held.

    Under a pattern such as 2:4 every block of it holds its own. By attribute, `alike` marks as many
    groups as are to live, by default as many as do.
    """
    for attribute in wrapper.kernels:
        state = wrapper.state(attribute)
        if "mask_logits" not in state or float(state["mask_frozen"]) > 0:
            continue
        live = state["mask"].numpy() > 0 if alike is None else alike[attribute]
        chosen = largest_alike(mask_scores(wrapper, attribute), live, wrapper.grouping(attribute))
        state["mask"].assign(chosen.astype(np.float32))


def grown(live: np.ndarray, grouping: Grouping, share: float) -> np.ndarray:
    """Marks more groups: a share of those that do not live, of every size of group.

    Which ones says nothing. Under a pattern none are added.
    """
    grows = live.copy()
    if not grouping.pattern:
        for same in _by_size(grouping.sizes):
            pruned = np.flatnonzero(~live[same])
            part = grows[same].reshape(-1)
            part[pruned[: round(share * pruned.size)]] = True
            grows[same] = part.reshape(live[same].shape)
    return grows


def largest_alike(scores: np.ndarray, live: np.ndarray, grouping: Grouping) -> np.ndarray:
    """Marks as many groups as live now, those of the highest scores."""
    if grouping.pattern:
        return grouping.largest(scores, grouping.in_blocks(live).sum(1))
    live = live.copy()
    # Groups compete with groups of their own size: a short tail block that made way for a
    # full one would raise the sparsity with every selection.
    for same in _by_size(grouping.sizes):
        pruned = live[same].size - int(np.count_nonzero(live[same]))
        if pruned < live[same].size:
            live[same] = _without_smallest(scores[same], pruned)
    return live


def _by_size(sizes: np.ndarray) -> list[slice]:
    # Only the last block of every output can be shorter.
    if sizes[0, 0] == sizes[-1, 0]:
        return [slice(None)]
    return [slice(0, -1), slice(-1, None)]


def _without_smallest(scores: np.ndarray, count: int) -> np.ndarray:
    """Marks what stays without the `count` smallest; of equals the first go.

    The same as a stable sort would give, in a tenth of its time.
    """
    if count == 0:
        return np.ones(scores.shape, bool)
    flat = scores.reshape(-1)
    border = np.partition(flat, count - 1)[count - 1]
    if np.isnan(border):  # a diverged training: nothing compares, but the sparsity is held
        flat = np.arange(flat.size)
        border = count - 1
    live = ~(flat < border)
    ties = np.flatnonzero(flat == border)
    live[ties[: count - (flat.size - np.count_nonzero(live))]] = False
    return live.reshape(scores.shape)


def start_gates(wrapper: CompressionWrapper) -> None:
    """Gives hard concrete gates that were not trained yet a start by magnitude.

    `wrap` starts every gate equally far open or closed. With nearly all groups pruned the gates
    that are drawn open by chance then outnumber those that live, and the network that is trained
    is not the one that is evaluated. Here the open gates with large weights and the closed ones
    with small weights are nearly certain, and those at the border between the two undecided.

    Nothing is done unless the wrapper's masks learn as hard concrete gates and all logits are still
    as far from 0 as each other.
    """
    if wrapper.mask != "hard_concrete":
        return
    for attribute in wrapper.kernels:
        state = wrapper.state(attribute)
        if "mask_logits" not in state or np.ptp(np.abs(state["mask_logits"].numpy())) > 0:
            continue
        live = state["mask"].numpy() > 0
        if live.all() or not live.any():
            continue
        scores = magnitudes(wrapper, attribute)
        border = _borders(scores, live, wrapper.grouping(attribute))
        distance = _GATE_SLOPE * np.abs(scores - border)
        state["mask_logits"].assign(np.where(live, distance, -distance).astype(np.float32))


def _borders(scores: np.ndarray, live: np.ndarray, grouping: Grouping) -> np.ndarray:
    """The smallest score that lives if masks follow the scores, for every group."""
    if not grouping.pattern:
        pruned = live.size - np.count_nonzero(live)
        return np.partition(scores, pruned, axis=None)[pruned]
    ordered = np.sort(grouping.in_blocks(scores, fill=-np.inf), axis=1)
    of, counts = ordered.shape[1], grouping.in_blocks(live).sum(1)[:, None]
    last = np.take_along_axis(ordered, np.minimum(of - counts, of - 1), axis=1)
    return np.repeat(last[:, 0], of, axis=0)[: grouping.inputs]


def clear_pruned(wrapped: keras.Model) -> None:
    """Sets to 0 what straight-through masks hide, in every kernel whose masks learn.

    For plans whose living weights were fitted: what is pruned still has its trained weights, which
    are larger than the fitted ones, so that the masks would follow them before any training had
    said so. From 0 a group comes back only if training makes it grow.
    """
    for wrapper in wrappers_of(wrapped):
        if not wrapper.train_masks or wrapper.mask != "straight_through":
            continue
        for attribute in wrapper.kernels:
            state, grouping = wrapper.state(attribute), wrapper.grouping(attribute)
            if "mask" not in state:
                continue
            variable, spec = wrapper.variable(attribute), wrapper.spec(attribute)
            matrix = spec.to_matrix_numpy(variable.numpy())
            swaps = state["swaps"] > 0 if "swaps" in state else None
            if swaps is not None:
                matrix = permute(tf.constant(matrix), swaps, grouping).numpy()
            matrix = matrix * grouping.expand_numpy(state["mask"].numpy() > 0)
            if swaps is not None:  # swapping twice is back
                matrix = permute(tf.constant(matrix), swaps, grouping).numpy()
            variable.assign(spec.from_matrix_numpy(matrix, variable.shape))


def freeze_masks(
    wrapper: CompressionWrapper, chosen: Callable[[tf.Variable], bool] | None = None
) -> None:
    """Holds learnable masks as they are from now on, by default all of the wrapper's.

    `chosen` tells by their logits which of them.
    """
    for attribute in wrapper.kernels:
        state = wrapper.state(attribute)
        if "mask_frozen" in state and (chosen is None or chosen(state["mask_logits"])):
            state["mask_frozen"].assign(1.0)


_log = logging.getLogger(__name__)

DEFAULT_STEPS = 1500
DISTILLATION = 0.0
"""The teacher's share of the loss. With all labels at hand straight-through masks were no better
with a teacher (benchmarks/finetuning.py); fixed and hard concrete ones were, at 0.5."""
LEARNING_RATE = 2e-3
# Adam moves a pruned weight as far as a living one, whatever its gradient's scale: at 2e-3 the
# trained weights behind a straight-through mask grow back at random, and the masks follow them.
STRAIGHT_THROUGH_LEARNING_RATE = 1e-3
# As many of the pool's batches are enough for a mean and a variance.
_STATISTICS_BATCHES = 16
# Of the rate of a training that made the network worse, what a second one begins with.
_SLOWER = 0.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class FineTuning:
    """How finished plans are trained.

    Attributes:
        epochs: 0 leaves the weights as they are.
        mask: How masks learn, `"straight_through"` or `"hard_concrete"`.
        distillation: The dense model's share of the loss, from 0 to 1.
        callbacks: Keras's own, of whoever wants to watch or to end the training.
    """

    epochs: int
    mask: str = "straight_through"
    distillation: float = DISTILLATION
    callbacks: tuple[keras.callbacks.Callback, ...] = ()


class MaskTraining(keras.callbacks.Callback):
    """Lets the masks of a model wrapped with `train_masks=True` follow their scores.

    Every few steps each kernel's mask is set to the groups of highest score (the magnitude of the
    dense weights behind the mask plus the mask's logit), as many as before; for the last part of
    training the masks are frozen, so that the surviving weights settle (Lin et al. 2020, "Dynamic
    model pruning with feedback", arXiv 2006.07253). Masks of layers that are not trainable stay as
    they are.

    Args:
        every: Training steps between selections.
        freeze_after: Share of all steps after which the masks are frozen.
        gradual: Whether all groups live at first, and their number falls to the plan's by then: by
            the cubic schedule of Zhu & Gupta 2017, "To prune, or not to prune", arXiv 1710.01878,
            equation 1. For straight-through masks; others are as sparse as planned from the start.

    Example:
        >>> wrapped = rls.wrap(model, plan, train_masks=True)
        >>> history = wrapped.fit(x, y, epochs=5, verbose=0, callbacks=[rls.MaskTraining()])
        >>> learned = rls.plan_of(wrapped)
    """

    def __init__(self, every: int = 16, freeze_after: float = 0.7, gradual: bool = False):
        super().__init__()
        self.gradual = check_flag("gradual", gradual)
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ArgumentError(f"every={every!r} cannot be used. Expected an integer above 0.")
        self.every = every
        self.freeze_after = check_share("freeze_after", freeze_after)
        self.frozen = False
        self._step = 0
        self._share = 0.0
        self._wrappers: list[CompressionWrapper] = []
        self._planned: list[dict[str, np.ndarray]] = []

    def on_train_begin(self, logs: Any = None) -> None:
        """Starts counting, and gives untrained hard concrete gates their start."""
        self.frozen, self._step, self._share = False, 0, 0.0
        self._wrappers = wrappers_of(self.model)
        trained = {id(variable) for variable in self.model.trainable_variables}
        for wrapper in self._wrappers:
            start_gates(wrapper)
            freeze_masks(wrapper, lambda logits: id(logits) not in trained)
        self._planned = [
            {
                attribute: state["mask"].numpy() > 0
                for attribute in wrapper.kernels
                if "mask" in (state := wrapper.state(attribute))
            }
            for wrapper in self._wrappers
        ]
        if self.gradual:
            self._select()

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Freezes by epoch where the number of steps is not known."""
        if not self.params.get("steps"):
            self._freeze_at(epoch / self.params["epochs"])

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Selects or freezes."""
        self._step += 1
        steps = self.params.get("steps")
        if steps:
            self._freeze_at(self._step / (steps * self.params["epochs"]))
        if not self.frozen and self._step % self.every == 0:
            self._select()

    def _select(self) -> None:
        left = (1.0 - min(1.0, self._share / max(self.freeze_after, 1e-9))) ** 3
        for wrapper, planned in zip(self._wrappers, self._planned, strict=True):
            alike = None
            if self.gradual and wrapper.mask == "straight_through":
                alike = {a: grown(m, wrapper.grouping(a), left) for a, m in planned.items()}
            update_masks(wrapper, alike)

    def _freeze_at(self, share: float) -> None:
        self._share = share
        if not self.frozen and share >= self.freeze_after:
            if self.gradual:
                self._select()
            self.frozen = True
            for wrapper in self._wrappers:
                freeze_masks(wrapper)


def default_epochs(train: TrainingData) -> int:
    """Epochs that give about 1,500 steps: 3 to 60."""
    steps = train.steps or len(train.pool)
    return int(np.clip(math.ceil(DEFAULT_STEPS / steps), 3, 60))


def finetune(
    wrapped: keras.Model,
    train: TrainingData,
    validation: list[Batch],
    metric: Metric,
    *,
    epochs: int,
    learning_rate: float | None = None,
    callbacks: Sequence[keras.callbacks.Callback] = (),
    teacher: keras.Model | None = None,
    distillation: float = DISTILLATION,
    warnings: list[str] | None = None,
    gradual: bool = False,
) -> Score:
    """Trains a wrapped model, its masks included, and keeps the best epoch after they froze.

    Where validation data says that the training made the model worse, or nothing finite came out
    of it, it is trained again from the start at a tenth of the learning rate; where that is no
    better either, what is kept is the model from before it, as where only a loss is worse at the
    same accuracy.

    The model is wrapped with `train_masks=True` and trained in place; 0 epochs leave it as it is.
    The learning rate is Adam's first, which falls to 0 as a cosine: by default 2e-3, and 1e-3 for
    straight-through masks that learn. The teacher, usually the dense model, is not changed, and
    `distillation` is its share of the loss, from 0 to 1 (see
    [distilled][rl_sparsity_tf.training.distillation.distilled]). What went wrong is added to
    `warnings`, or goes to the log; an accuracy within its standard error is not wrong. The score is
    the validation score of what was kept.
    """
    if learning_rate is None:
        learns = any(w.train_masks and w.mask == "straight_through" for w in wrappers_of(wrapped))
        learning_rate = STRAIGHT_THROUGH_LEARNING_RATE if learns else LEARNING_RATE
    steps = (train.steps or len(train.pool)) * max(1, epochs)
    warning = ""
    for rate in (learning_rate, _SLOWER * learning_rate):
        arguments = search_compile_arguments(wrapped, rate)
        schedule = keras.optimizers.schedules.CosineDecay(rate, steps)
        arguments["optimizer"] = keras.optimizers.Adam(schedule)
        wrapped.compile(**arguments)
        evaluator = Evaluator(wrapped, metric)
        if not epochs:
            return evaluator(validation)
        masks = MaskTraining(gradual=gradual)
        keeper = _BestEpoch(evaluator, validation, masks, FreshStatistics(wrapped, train.pool))
        keeper.begin()
        with distilled(wrapped, teacher, distillation, train.pool):
            followers = [masks, keeper, *callbacks]
            wrapped.fit(train.dataset, epochs=epochs, verbose=0, callbacks=followers)
        score, failed = keeper.restore()
        if not failed:
            return score
        if not keeper.told_apart:
            _log.info("the fine-tuning brought nothing, so the weights from before it are kept")
            return score
        warning = warning or failed
    if warnings is None:
        _log.warning("%s", warning)
    else:
        warnings.append(warning)
    return score


class FreshStatistics:
    """Estimates a model's batch-norm statistics anew, as means over batches of training rows.

    Keras's moving statistics lag a hundred batches behind the weights, at its default momentum;
    short trainings end before they have followed. Frozen layers keep theirs.
    """

    def __init__(self, model: keras.Model, batches: Sequence[Batch]):
        self.layers = [
            layer
            for layer in all_layers(model)
            if isinstance(layer, keras.layers.BatchNormalization) and layer.trainable
        ]
        self._model, self._batches = model, batches[:_STATISTICS_BATCHES]
        self._function = tf.function(lambda x: model(x, training=True))

    def renew(self) -> None:
        """Sets the statistics of the present weights; nothing else of the model changes."""
        own = [id(v) for layer in self.layers for v in (layer.moving_mean, layer.moving_variance)]
        others = [v for v in self._model.non_trainable_variables if id(v) not in own]
        kept = [variable.numpy() for variable in others]
        momenta = [layer.momentum for layer in self.layers]
        found: list[list[list[np.ndarray]]] = []
        try:
            for layer in self.layers:
                layer.momentum = 0.0
            for batch in self._batches:
                self._function(batch[0])
                found.append([_moving(layer) for layer in self.layers])
        finally:
            for layer, momentum in zip(self.layers, momenta, strict=True):
                layer.momentum = momentum
        for number, layer in enumerate(self.layers):
            means = [
                np.mean(parts, axis=0)
                for parts in zip(*(one[number] for one in found), strict=True)
            ]
            layer.moving_mean.assign(means[0])
            layer.moving_variance.assign(means[1])
        for variable, value in zip(others, kept, strict=True):
            variable.assign(value)


def _moving(layer: Any) -> list[np.ndarray]:
    return [layer.moving_mean.numpy(), layer.moving_variance.numpy()]


class _BestEpoch(keras.callbacks.Callback):
    """Keeps the weights of the best epoch after the masks froze, and those from before them all.

    Attributes:
        told_apart: Whether the first weights were kept for more than a loss at the same accuracy.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        validation: list[Batch],
        masks: MaskTraining,
        statistics: FreshStatistics,
    ):
        super().__init__()
        self._evaluator, self._validation, self._masks = evaluator, validation, masks
        self._statistics = statistics
        self.told_apart = False
        self._before: tuple[Score, list[np.ndarray]] | None = None
        self._best: tuple[Score, list[np.ndarray]] | None = None

    def begin(self) -> None:
        """Takes score and weights from before the training, to be kept if no epoch is better."""
        self._before = self._present()
        self._evaluator.model.reset_states()  # an evaluation is no part of a stateful training

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if self._masks.frozen:
            self._consider()
        if not math.isfinite((logs or {}).get("loss", 0.0)):
            self.model.stop_training = True

    def _present(self) -> tuple[Score, list[np.ndarray]]:
        return self._evaluator(self._validation), self._evaluator.model.get_weights()

    def _consider(self) -> None:
        self._take(self._present())
        if self._statistics.layers:
            trained = self._evaluator.model.get_weights()
            self._statistics.renew()
            self._take(self._present())
            self._evaluator.model.set_weights(trained)

    def _take(self, found: tuple[Score, list[np.ndarray]]) -> None:
        if self._best is None or self._improves(found[0], self._best[0]):
            self._best = found

    def _improves(self, score: Score, best: Score) -> bool:
        if not _is_finite(best) or not _is_finite(score):
            return _is_finite(score)
        if score.metric == best.metric:
            return score.loss < best.loss
        return self._evaluator.metric.better(score.metric, best.metric)

    def _worse(self, score: Score, first: Score) -> bool:
        """Whether a score is worse than the first; accuracies alike are told apart by the loss."""
        if not _is_finite(first) or not _is_finite(score):
            return _is_finite(first)
        if self._alike(score, first):
            return score.loss > first.loss
        return self._improves(first, score)

    def _alike(self, score: Score, first: Score) -> bool:
        metric = self._evaluator.metric
        margin = metric.margin(first.metric, count_rows(self._validation))
        return metric.is_accuracy and abs(score.metric - first.metric) <= margin

    def restore(self) -> tuple[Score, str]:
        """Sets the best weights; returns their score, and what to say if they are the first."""
        if self._best is None:  # a single epoch of unknown length
            self._consider()
        assert self._best is not None
        assert self._before is not None
        (score, weights), (first, kept) = self._best, self._before
        if not self._worse(score, first):
            self._evaluator.model.set_weights(weights)
            return score, ""
        self._evaluator.model.set_weights(kept)
        self.told_apart = not self._alike(score, first)
        name = self._evaluator.metric.name
        figures = "" if name == "loss" else f", {name} {first.metric:.4g} -> {score.metric:.4g}"
        return first, (
            "the fine-tuning made the network worse on the validation data (loss "
            f"{first.loss:.4g} -> {score.loss:.4g}{figures}), so the weights from before it are "
            "kept: look at the training data and labels, or set another number of finetune_epochs"
        )


def _is_finite(score: Score) -> bool:
    return math.isfinite(score.metric) and math.isfinite(score.loss)
