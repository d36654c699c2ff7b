"""From the best plan to the finished model: learning masks, strip, export, figures."""

from __future__ import annotations

import dataclasses
import logging

import numpy as np
import tf_keras as keras

from rl_sparsity_tf.allocation.target import Target
from rl_sparsity_tf.callbacks import EXPORT, FINE_TUNING
from rl_sparsity_tf.console import SearchProgress, silent
from rl_sparsity_tf.data.batches import TrainingData, inputs_of
from rl_sparsity_tf.data.checks import Batch
from rl_sparsity_tf.data.metrics import Metric, Score
from rl_sparsity_tf.environment.candidates import Candidate
from rl_sparsity_tf.environment.network import CompressedNetwork
from rl_sparsity_tf.errors import ExportError
from rl_sparsity_tf.export.export import export_tflite
from rl_sparsity_tf.export.report import ExportReport
from rl_sparsity_tf.export.verification import score_on_all, score_tflite
from rl_sparsity_tf.files import scratch_folder
from rl_sparsity_tf.layers.copying import copy_compile_state
from rl_sparsity_tf.layers.kernels import find_kernels
from rl_sparsity_tf.layers.operations import Operation
from rl_sparsity_tf.layers.plan import CompressionPlan, KernelPlan
from rl_sparsity_tf.layers.structure import flat_inputs
from rl_sparsity_tf.layers.wrapping import plan_of, strip, wrap
from rl_sparsity_tf.training.mask_training import LEARNING_RATE, FineTuning, clear_pruned, finetune

_log = logging.getLogger(__name__)

_REPRESENTATIVE_ROWS = 512


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exported:
    """A model's .tflite file and its figures.

    Attributes:
        content: The file's bytes; None if there is no file.
        report: The export's report; None if there is no file.
        test: The file's own score on test data, run in LiteRT; None without test data.
        failure: Why the file is not the one that was asked for, or why there is none.
    """

    content: bytes | None
    report: ExportReport | None
    test: Score | None
    failure: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RemovedChannels:
    """What is gone from a model whose channels were removed.

    Attributes:
        plan: The channels that were pruned, and how the others are stored, by the kernels of the
            original model; `shrink(model, plan)` removes them from another copy.
        macs: Multiply-accumulates left, as a share; None where they cannot be counted.
        predicted_latency: The share of the dense model's time by the table of its layers; None
            without a table.
        latency: The share of the dense file's time, measured in turns with it; None if it was not
            asked for, or the samples scatter too much.
        latency_spread: How much they scatter: the larger interquartile range over the median.
    """

    plan: CompressionPlan
    macs: float | None = None
    predicted_latency: float | None = None
    latency: float | None = None
    latency_spread: float | None = None

    def to_dict(self) -> dict[str, float | None]:
        """The figures, as metrics.json lists them."""
        fields = ("macs", "predicted_latency", "latency", "latency_spread")
        return {name: getattr(self, name) for name in fields}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finished:
    """A fine-tuned, stripped and exported model; `model` is plain Keras again.

    Attributes:
        plan: The plan with the final masks.
        validation: Its score on validation data.
        test: Its score on test data, if there is any.
        channels: What was removed from the original model, if channels were.
        candidate: The plan that it was made of, if that need not be the one given: of channels,
            pruned further where that was needed, or another; or the one with which heats were won.
        warnings: What went wrong on the way.
    """

    model: keras.Model
    plan: CompressionPlan
    validation: Score
    test: Score | None
    exported: Exported
    channels: RemovedChannels | None = None
    candidate: Candidate | None = None
    warnings: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figures:
    """Data and metric that every contender is judged by."""

    train: TrainingData
    validation: list[Batch]
    test: list[Batch] | None
    metric: Metric

    def representative(self, model: keras.Model) -> tuple[np.ndarray, ...]:
        """Training inputs for calibration and verification, one array per input of a model."""
        rows = flat_inputs(model, inputs_of(self.train.pool[:4]))
        return tuple(part[:_REPRESENTATIVE_ROWS] for part in rows)

    def scores(self, model: keras.Model) -> tuple[Score, Score | None]:
        """A plain model's scores on the validation data and, if there is any, on the test data."""
        sets = [self.validation, self.test] if self.test else [self.validation]
        validation, *test = score_on_all(model, sets, self.metric)
        return validation, test[0] if test else None


class _Epochs(keras.callbacks.Callback):
    """Shows how many epochs of a training are done."""

    def __init__(self, progress: SearchProgress):
        super().__init__()
        self._progress = progress

    def on_epoch_end(self, epoch: int, logs: object = None) -> None:
        self._progress.step(epoch + 1, self.params["epochs"])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """What a candidate is finished for.

    Attributes:
        model: The original model.
        network: The network that was searched.
        dense: The dense model's file in that quantization, once it was needed.
        progress: Who is told what is being done.
    """

    model: keras.Model
    network: CompressedNetwork
    figures: Figures
    target: Target
    training: FineTuning
    quantization: str
    dense: list[bytes] = dataclasses.field(default_factory=list)
    progress: SearchProgress = dataclasses.field(default_factory=silent)


def finish(
    model: keras.Model,
    candidate: Candidate,
    figures: Figures,
    *,
    training: FineTuning,
    quantization: str,
    formats: str = "dense",
    teacher: keras.Model | None = None,
    progress: SearchProgress | None = None,
) -> Finished:
    """Fine-tunes a candidate with learning masks, strips it and exports it.

    The finished model's plan has the masks that were learned. What its file is where the one asked
    for fails, see [export_what_holds][]. `formats` is whether tensors may be stored sparse, see
    `export_tflite`; outputs are learned from the teacher, too, by default the model.
    """
    warnings: list[str] = []
    progress = progress or silent()
    watched = dataclasses.replace(training, callbacks=(_Epochs(progress), *training.callbacks))
    with progress.phase(FINE_TUNING, total=training.epochs):
        wrapped, _ = trained(model, candidate, figures, watched, warnings, teacher)
    for warning in warnings:
        _log.warning("%s", warning)
    plan = _complete(plan_of(wrapped), candidate.plan)
    stripped = strip(wrapped)
    with progress.phase(EXPORT):
        validation, test = figures.scores(stripped)
        exported = export_what_holds(stripped, plan, figures, quantization, formats)
    copy_compile_state(model, stripped)
    return Finished(
        model=stripped,
        plan=plan,
        validation=validation,
        test=test,
        exported=exported,
        warnings=(*warnings, *filter(None, [exported.failure])),
    )


def trained(
    model: keras.Model,
    candidate: Candidate,
    figures: Figures,
    training: FineTuning,
    warnings: list[str],
    teacher: keras.Model | None = None,
) -> tuple[keras.Model, Score]:
    """A candidate's wrapped model after fine-tuning, and its score on the validation data."""
    wrapped = wrap(model, candidate.plan, mask=training.mask, train_masks=True)
    # Weights first, operations after: hard concrete logits and grids do not depend on them.
    candidate.put_weights(wrapped)
    clear_pruned(wrapped)
    score = finetune(
        wrapped,
        figures.train,
        figures.validation,
        figures.metric,
        epochs=training.epochs,
        learning_rate=LEARNING_RATE,
        callbacks=training.callbacks,
        teacher=model if teacher is None else teacher,
        distillation=training.distillation,
        warnings=warnings,
    )
    return wrapped, score


def _complete(learned: CompressionPlan, planned: CompressionPlan) -> CompressionPlan:
    # Kernels that are kept whole carry no state to read a group kind from.
    return CompressionPlan(learned.kernels.get(path, k) for path, k in planned.kernels.items())


def export_and_score(
    model: keras.Model,
    plan: CompressionPlan | None,
    figures: Figures,
    quantization: str,
    formats: str = "dense",
) -> Exported:
    """Exports a model, verifies the file, and scores the file itself on test data."""
    with scratch_folder() as folder:
        path = folder / "model.tflite"
        report = export_tflite(
            model,
            path,
            quantization,
            plan=plan,
            representative_data=figures.representative(model),
            formats=formats,
        )
        test = score_tflite(path, model, figures.test, figures.metric) if figures.test else None
        return Exported(content=path.read_bytes(), report=report, test=test)


def export_what_holds(
    model: keras.Model,
    plan: CompressionPlan | None,
    figures: Figures,
    quantization: str,
    formats: str = "dense",
) -> Exported:
    """Exports a model as asked, or else in a storage that asks less of converter and runtimes.

    What a search has paid for is not lost with a file: after the storage that was asked for, the
    plan's integers with float activations are tried, and float32. It gives the first file that is
    verified, or none; `failure` says why it is not the one asked for. `formats` is whether tensors
    may be stored sparse.
    """
    reasons = []
    for mode in dict.fromkeys((quantization, "plan", "none")):
        try:
            exported = export_and_score(model, plan, figures, mode, formats)
        except ExportError as error:
            reasons.append(f"as {mode!r}: {' '.join(str(error).split())}")
            continue
        if not reasons:
            return exported
        assert exported.report is not None
        failure = f"the .tflite file is stored as {mode!r}, because it failed {'; '.join(reasons)}"
        _log.warning("%s", failure)
        report = dataclasses.replace(exported.report, notes=(*exported.report.notes, failure))
        return dataclasses.replace(exported, report=report, failure=failure)
    failure = f"there is no .tflite file, because it failed {'; '.join(reasons)}"
    _log.warning("%s", failure)
    return Exported(content=None, report=None, test=None, failure=failure)


def all_quantized(model: keras.Model) -> CompressionPlan:
    """The plan that stores every kernel as int8 and prunes nothing: the dense int8 file."""
    entries = []
    for kernel in find_kernels(model):
        if kernel.spec.exports_int8:
            grouping = kernel.grouping("channel")
            operations = np.full(grouping.shape, Operation.QUANTIZE, np.uint8)
            entries.append(
                KernelPlan(kernel.path, kernel.shape, kernel.spec.layout, "channel", 8, operations)
            )
    return CompressionPlan(entries)


def export_dense_int8(model: keras.Model, figures: Figures) -> Exported:
    """The input model with int8 weights, exported the same way as the compressed one."""
    plan = all_quantized(model)
    return export_and_score(strip(wrap(model, plan)), plan, figures, "plan")
