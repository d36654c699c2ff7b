"""Fine-tuning with masks that learn: they may come back, every kernel's sparsity is held."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import tf_keras as keras

from rl_sparsity_tf.data import Batch, TrainingData
from rl_sparsity_tf.distillation import distilled
from rl_sparsity_tf.errors import ArgumentError
from rl_sparsity_tf.mask_selection import freeze_masks, start_gates, update_masks
from rl_sparsity_tf.objective import Evaluator, Metric, Score, search_compile_arguments
from rl_sparsity_tf.wrapper import CompressionWrapper
from rl_sparsity_tf.wrapping import wrappers_of

DEFAULT_STEPS = 1500
DISTILLATION = 0.0
"""The teacher's share of the loss. With all labels at hand straight-through masks were no better
with a teacher (benchmarks/finetuning.py); fixed and hard concrete ones were, at 0.5."""
LEARNING_RATE = 2e-3
# Adam moves a pruned weight as far as a living one, whatever its gradient's scale: at 2e-3 the
# weights behind a straight-through mask grow back at random, and the masks follow them.
STRAIGHT_THROUGH_LEARNING_RATE = 1e-3


@dataclasses.dataclass(frozen=True, kw_only=True)
class FineTuning:
    """How finished plans are trained.

    Attributes:
        epochs: Epochs; 0 leaves the weights as they are.
        mask: How masks learn, `"straight_through"` or `"hard_concrete"`.
        distillation: The dense model's share of the loss, from 0 to 1.
    """

    epochs: int
    mask: str = "straight_through"
    distillation: float = DISTILLATION


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

    Example:
        >>> wrapped = rls.wrap(model, plan, train_masks=True)
        >>> wrapped.fit(x, y, epochs=5, callbacks=[rls.MaskTraining()])
    """

    def __init__(self, every: int = 16, freeze_after: float = 0.7):
        super().__init__()
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ArgumentError(f"every={every!r} cannot be used. Expected an integer above 0.")
        if not isinstance(freeze_after, int | float) or not 0.0 <= freeze_after <= 1.0:
            raise ArgumentError(
                f"freeze_after={freeze_after!r} cannot be used. Expected a share from 0 to 1."
            )
        self.every = every
        self.freeze_after = freeze_after
        self.frozen = False
        self._step = 0
        self._wrappers: list[CompressionWrapper] = []

    def on_train_begin(self, logs: Any = None) -> None:
        """Starts counting, and gives untrained hard concrete gates their start."""
        self.frozen, self._step = False, 0
        self._wrappers = wrappers_of(self.model)
        trained = {id(variable) for variable in self.model.trainable_variables}
        for wrapper in self._wrappers:
            start_gates(wrapper)
            freeze_masks(wrapper, lambda logits: id(logits) not in trained)

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
            for wrapper in self._wrappers:
                update_masks(wrapper)

    def _freeze_at(self, share: float) -> None:
        if not self.frozen and share >= self.freeze_after:
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
    callbacks: list[keras.callbacks.Callback] | None = None,
    teacher: keras.Model | None = None,
    distillation: float = DISTILLATION,
) -> Score:
    """Trains a wrapped model, its masks included, and keeps the best epoch after they froze.

    Args:
        wrapped: A model wrapped with `train_masks=True`; trained in place.
        train: Training data.
        validation: Validation batches, which choose the epoch.
        metric: The metric to choose by.
        epochs: Epochs to train; 0 leaves the model as it is.
        learning_rate: First learning rate of Adam; it falls to 0 as a cosine. By default 2e-3, and
            1e-3 for straight-through masks that learn.
        callbacks: Further callbacks.
        teacher: A model whose outputs are learned, too, usually the dense one; it is not changed.
        distillation: The teacher's share of the loss, from 0 to 1 (see
            [distilled][rl_sparsity_tf.distillation.distilled]).

    Returns:
        The validation score of the epoch kept.
    """
    if learning_rate is None:
        learns = any(w.train_masks and w.mask == "straight_through" for w in wrappers_of(wrapped))
        learning_rate = STRAIGHT_THROUGH_LEARNING_RATE if learns else LEARNING_RATE
    steps = (train.steps or len(train.pool)) * max(1, epochs)
    arguments = search_compile_arguments(wrapped, learning_rate)
    schedule = keras.optimizers.schedules.CosineDecay(learning_rate, steps)
    arguments["optimizer"] = keras.optimizers.Adam(schedule)
    wrapped.compile(**arguments)
    evaluator = Evaluator(wrapped, metric)
    masks = MaskTraining()
    keeper = _BestEpoch(evaluator, validation, masks)
    followers = [masks, keeper, *(callbacks or [])]
    if epochs:
        with distilled(wrapped, teacher, distillation, train.pool):
            wrapped.fit(train.dataset, epochs=epochs, verbose=0, callbacks=followers)
    return keeper.restore()


class _BestEpoch(keras.callbacks.Callback):
    def __init__(self, evaluator: Evaluator, validation: list[Batch], masks: MaskTraining):
        super().__init__()
        self._evaluator, self._validation, self._masks = evaluator, validation, masks
        self._best: tuple[Score, list[np.ndarray]] | None = None

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if not self._masks.frozen:
            return
        score = self._evaluator(self._validation)
        if self._best is None or self._improves(score, self._best[0]):
            self._best = (score, self.model.get_weights())

    def _improves(self, score: Score, best: Score) -> bool:
        if score.metric == best.metric:
            return score.loss < best.loss
        return self._evaluator.metric.better(score.metric, best.metric)

    def restore(self) -> Score:
        if self._best is None:
            return self._evaluator(self._validation)
        score, weights = self._best
        self._evaluator.model.set_weights(weights)
        return score
