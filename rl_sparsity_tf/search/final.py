"""The final: from the best plans to the finished model, held to its target in the real file."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Container, Iterable, Sequence
from pathlib import Path
from typing import cast

import numpy as np
import tensorflow as tf
import tf_keras as keras

from rl_sparsity_tf.allocation.channel_decisions import ChannelDecisions
from rl_sparsity_tf.allocation.channel_programming import cost_of_plan, pruned_to
from rl_sparsity_tf.allocation.size_budget import formats_for
from rl_sparsity_tf.allocation.target import Target
from rl_sparsity_tf.callbacks import MEASURING
from rl_sparsity_tf.channels.costs import count_macs
from rl_sparsity_tf.channels.latency_table import LatencyTable
from rl_sparsity_tf.channels.shrinking import shrink_with_report
from rl_sparsity_tf.channels.units import element_plan, only_pruned
from rl_sparsity_tf.channels.widths import widths_of
from rl_sparsity_tf.console import SearchProgress
from rl_sparsity_tf.data.batches import count_rows
from rl_sparsity_tf.data.metrics import Score
from rl_sparsity_tf.environment.candidates import PROPOSED, Candidate
from rl_sparsity_tf.environment.network import evaluate_plan
from rl_sparsity_tf.environment.reward import Outcome
from rl_sparsity_tf.errors import ExportError, TargetError
from rl_sparsity_tf.export.export import export_tflite
from rl_sparsity_tf.export.report import ExportReport
from rl_sparsity_tf.files import scratch_folder
from rl_sparsity_tf.layers.kernels import count_weights, find_kernels, walk
from rl_sparsity_tf.layers.operations import Operation
from rl_sparsity_tf.layers.plan import CompressionPlan, KernelPlan
from rl_sparsity_tf.layers.rules import prune_by_magnitude
from rl_sparsity_tf.layers.wrapping import strip, wrap
from rl_sparsity_tf.search.finishing import (
    Finished,
    RemovedChannels,
    Task,
    all_quantized,
    finish,
)
from rl_sparsity_tf.search.heats import run_heats, winner
from rl_sparsity_tf.tflite.timing import Timing, benchmark_tflite

_log = logging.getLogger(__name__)

_ATTEMPTS = 6
# How much further than the overshoot the second attempt goes; every one after it goes twice as far
# as the one before, because what a sparse tensor needs beside its values does not shrink with them.
_EXTRA_BYTES = 0.02
_LEAST = 0.1
_LARGE_STEP = 0.7


def finish_within(task: Task, candidate: Candidate) -> Finished:
    """Finishes a candidate, and if its file is too large, a more pruned form of it.

    The search keeps to the size by a model of it. Fine-tuning changes the weights, and with them
    how well they compress: where the real file is larger than the target, every kernel gives up its
    smallest groups in proportion, and is fine-tuned again. A target of sparsity is met by the plan
    itself. Raises TargetError if the file is still too large after a few attempts.
    """
    target, reached = task.target, []
    for _ in range(_ATTEMPTS):
        finished = finish(
            task.model,
            candidate,
            task.figures,
            training=task.training,
            quantization=task.quantization,
            formats=formats_for(target),
            progress=task.progress,
        )
        report = finished.exported.report
        # A file in another storage than was asked for has another size, whatever is pruned.
        if target.sparsity is not None or finished.exported.failure or report is None:
            return finished
        size = size_held(report, target)
        if size <= target.value:
            return finished
        reached.append(size)
        # A dense tensor gets no smaller by some zeros more: then larger steps are needed.
        stuck = len(reached) > 1 and size > 0.995 * reached[-2]
        most = _LARGE_STEP if stuck else 1.0
        share = share_to_keep(report, target, len(reached), most, kernels=candidate.plan.kernels)
        candidate = dataclasses.replace(
            candidate, plan=pruned_further(finished.model, finished.plan, share)
        )
    raise TargetError(
        f"Target({target.kind}={int(target.value)}) was missed: after fine-tuning the file had "
        f"{' then '.join(map(str, reached))} bytes. Expected a larger target, or a coarser group, "
        "whose zeros compress better."
    )


def size_held(report: ExportReport, target: Target) -> int:
    """The bytes of a file that a target in bytes is about."""
    return report.tflite_bytes if target.kind == "tflite_bytes" else report.gzip_bytes


def share_to_keep(
    report: ExportReport,
    target: Target,
    attempts: int,
    most: float = 1.0,
    *,
    kernels: Container[str],
) -> float:
    """The share of its living weights that a file which is too large may keep, `most` at most.

    Only some kernels can shrink (`kernels` has their paths); of the gzipped file they are taken to
    be the same share. The target is in bytes; `attempts` counts the files that were too large by
    now, this one among them.
    """
    size = size_held(report, target)
    held = sum(tensor.bytes for tensor in report.tensors if tensor.kernel in kernels)
    reducible = size * held / report.tflite_bytes
    over = (size - target.value) / max(reducible, 1.0)
    return float(np.clip(1.0 - over - _EXTRA_BYTES * 2 ** (attempts - 1), _LEAST, most))


def pruned_further(model: keras.Model, plan: CompressionPlan, share: float) -> CompressionPlan:
    """Prunes the smallest living groups of every kernel.

    Of its living weights only `share` may stay. The model is the one that the plan was applied to:
    its weights decide what is small. The groups that are not pruned keep their operations.
    """
    entries = []
    for kernel in find_kernels(model):
        entry = plan.kernels.get(kernel.path)
        if entry is None:
            continue
        density = (1.0 - entry.sparsity) * share
        live = prune_by_magnitude(kernel.matrix(), entry.grouping, 1.0 - density)
        operations = np.where(live, entry.operations, Operation.PRUNE).astype(np.uint8)
        # Groups that were pruned have no magnitude, so none of them comes back.
        operations[entry.operations == Operation.PRUNE] = Operation.PRUNE
        entries.append(dataclasses.replace(entry, operations=operations))
    return CompressionPlan(entries)


_ANY = 1e6
# Plans of others that are tried in place of one that had to be pruned further.
_ALTERNATIVES = 4
# How much further than the overshoot the next attempt goes.
_EXTRA = 0.01
# Of a measured time, what the target may be missed by: less is noise.
_TIME_TOLERANCE = 0.02


def finish_candidate(
    task: Task, candidate: Candidate, others: Sequence[tuple[str, CompressionPlan]] = ()
) -> Finished:
    """Fine-tunes and exports a candidate, whatever was decided on.

    Pruned channels are removed first: what is trained and exported is the small model. What it
    takes (bytes, multiplications, time) hardly depends on its weights, so the target is held to
    before the training.

    `others` are names and plans to fall back on, the best first, where the candidate had to be
    pruned further and one of them, which had not, promises more; for channels only. Raises
    TargetError if the target is still missed after a few attempts to prune further.
    """
    if not isinstance(task.network.decisions, ChannelDecisions):
        return finish_within(task, candidate)
    unmeasured = ""
    try:
        with task.progress.phase(MEASURING, "removing channels, and measuring what is left"):
            candidate, small, timing = _best_held(task, candidate, others)
    except ExportError as error:  # what was searched for is not lost with a file
        timing = None
        small = _Small(*without_channels(task.model, task.network.decisions, candidate))
        unmeasured = f"the target was not held to, because no file could be measured: {error}"
    finished = finish(
        small.model,
        small.candidate,
        task.figures,
        training=task.training,
        quantization=task.quantization,
        formats=formats_for(task.target),
        teacher=task.model,
        progress=task.progress,
    )
    plan = task.network.decisions.kernel_plan(candidate.plan)
    removed = _removed(task, finished.model, plan, timing)
    if unmeasured:
        exported = dataclasses.replace(finished.exported, failure=unmeasured)
        warnings = (*finished.warnings, unmeasured)
        finished = dataclasses.replace(finished, exported=exported, warnings=warnings)
    return dataclasses.replace(finished, channels=removed, candidate=candidate)


@dataclasses.dataclass(frozen=True)
class _Small:
    """A model without the channels that a candidate prunes, and what is left of the candidate."""

    model: keras.Model
    candidate: Candidate


def without_channels(
    model: keras.Model, decisions: ChannelDecisions, candidate: Candidate
) -> tuple[keras.Model, Candidate]:
    """Removes the channels that a candidate prunes, at the weights it was evaluated with.

    The candidate's plan is of the decisions' units. Gives the small model, and the candidate for
    it: how its kernels are stored, and its weights.
    """
    decided = {path: entry.operations for path, entry in candidate.plan.kernels.items()}
    selection = decisions.selected(model)
    kernels = selection.kernels(model)
    operations = decisions.operations(decided, [kernel.path for kernel in kernels])
    pruned = {path: only_pruned(chosen) for path, chosen in operations.items()}
    wrapped = wrap(model, element_plan(kernels, pruned))
    candidate.put_weights(wrapped)
    small, _ = shrink_with_report(strip(wrapped), held=selection.left)
    outputs = decisions.kernel_plan(candidate.plan).kernels
    entries = []
    for kernel in selection.kernels(small):
        chosen = outputs[kernel.path].operations
        chosen = chosen[chosen != Operation.PRUNE]
        count = kernel.spec.matrix_shape(kernel.shape)[1]
        if len(chosen) != count:  # more was found dead, or a channel of a layer had to stay
            kept = Operation.KEEP if (chosen == Operation.KEEP).any() else Operation.QUANTIZE
            chosen = np.full(count, kept, np.uint8)
        layout = kernel.spec.layout
        entries.append(
            KernelPlan(kernel.path, kernel.shape, layout, "channel", 8, chosen.reshape(1, -1))
        )
    weights = {path: layer.get_weights() for path, layer in walk(small)}
    return small, dataclasses.replace(candidate, plan=CompressionPlan(entries), weights=weights)


def _best_held(
    task: Task, candidate: Candidate, others: Sequence[tuple[str, CompressionPlan]]
) -> tuple[Candidate, _Small, Timing | None]:
    """The candidate as it meets the target, or what is better than what is left of it."""
    steps = task.network.recovery.steps
    best, failure = None, None
    tried = [candidate.plan]
    try:
        best = _held(task, candidate)
    except TargetError as error:
        failure = error
    for name, plan in others:
        untouched = best is not None and best[0].plan in tried
        if untouched or len(tried) > _ALTERNATIVES:
            break
        if plan in tried:
            continue
        tried.append(plan)
        outcome = evaluate_plan(task.network, plan, steps)
        if best is not None and _promise(outcome) <= _promise(best[0].outcome):
            continue
        other = Candidate.of(task.network, candidate.value, PROPOSED, name)
        try:
            held = _held(task, other)
        except TargetError:
            continue
        if best is None or _promise(held[0].outcome) > _promise(best[0].outcome):
            best = held
    if best is None:
        assert failure is not None
        raise failure
    return best


def _promise(outcome: Outcome) -> tuple[float, float]:
    return outcome.retention, -outcome.loss


def _held(task: Task, candidate: Candidate) -> tuple[Candidate, _Small, Timing | None]:
    """A candidate whose small model meets the target, pruned further if it has to be."""
    decisions = cast(ChannelDecisions, task.network.decisions)
    reached = []
    value = task.target.value
    wanted = 1.0 - value if task.target.kind == "sparsity" else value
    with scratch_folder() as folder:
        ruler = _Ruler(task, folder)
        for _ in range(_ATTEMPTS):
            small = _Small(*without_channels(task.model, decisions, candidate))
            found, timing = ruler.measure(small)
            if found <= wanted * (1.0 + 1e-9):
                return candidate, small, timing
            reached.append(found)
            # What is predicted may be off: the same share less than is predicted for this plan.
            limit = cost_of_plan(task.network, candidate.plan) * wanted / found * (1.0 - _EXTRA)
            plan = pruned_to(task.network, candidate.plan, limit)
            if plan == candidate.plan:
                break
            steps = task.network.recovery.steps
            evaluate_plan(task.network, plan, steps)
            candidate = dataclasses.replace(
                candidate,
                plan=plan,
                weights=task.network.latent_weights(),
                outcome=task.network.outcome,
            )
    shown = " then ".join(f"{one:.4g}" for one in reached)
    raise TargetError(
        f"Target({task.target.kind}={value:g}) was missed: without the pruned channels {shown} was "
        f"left, and {wanted:g} is wanted. Expected a target that is easier to meet."
    )


class _Ruler:
    """Measures what is left of small models, in the unit of the target."""

    def __init__(self, task: Task, folder: Path):
        self._task, self._folder = task, folder

    def measure(self, small: _Small) -> tuple[float, Timing | None]:
        kind, model = self._task.target.kind, self._task.model
        if kind == "sparsity":
            left = count_weights(small.model)[1] / count_weights(model)[1]
            return left, None
        if kind == "macs":
            return count_macs(small.model) / count_macs(model), None
        if kind == "latency":
            timing = self.time(small.model, small.candidate.plan)
            if timing.ratio is None:
                return predicted_latency(self._task, small.model), timing
            return timing.ratio / (1.0 + _TIME_TOLERANCE), timing
        _, raw, gzipped = self._export(small.model, small.candidate.plan, "small")
        return float(raw if kind == "tflite_bytes" else gzipped), None

    def time(self, model: keras.Model, plan: CompressionPlan) -> Timing:
        """Times a model's file in turns with the dense one's, in the same quantization."""
        dense, path = self._task.model, self._folder / "dense.tflite"
        if not self._task.dense:
            self._export(dense, all_quantized(dense), "dense")
            self._task.dense.append(path.read_bytes())
        path.write_bytes(self._task.dense[0])
        return benchmark_tflite(self._export(model, plan, "small")[0], path, runs=30)

    def _export(
        self, model: keras.Model, plan: CompressionPlan, name: str
    ) -> tuple[Path, int, int]:
        path = self._folder / f"{name}.tflite"
        report = export_tflite(
            model,
            path,
            self._task.quantization,
            plan=plan,
            representative_data=self._task.figures.representative(model),
            overwrite=True,
            # It is measured, not used: before the training its outputs may say next to nothing.
            tolerance=_ANY,
        )
        return path, report.tflite_bytes, report.gzip_bytes


def predicted_latency(task: Task, small: keras.Model) -> float:
    """A small model's share of the dense model's time, by the table of its layers."""
    table = cast(LatencyTable, cast(ChannelDecisions, task.network.decisions).table)
    return float(table.predict(widths_of(small)) / table.predict(widths_of(task.model)))


def _removed(
    task: Task, small: keras.Model, plan: CompressionPlan, timing: Timing | None
) -> RemovedChannels:
    try:
        macs: float | None = count_macs(small) / count_macs(task.model)
    except TargetError:  # images of any size
        macs = None
    table = cast(ChannelDecisions, task.network.decisions).table
    return RemovedChannels(
        plan=plan,
        macs=macs,
        predicted_latency=None if table is None else predicted_latency(task, small),
        latency=None if timing is None else timing.ratio,
        latency_spread=None if timing is None else timing.spread,
    )


def play_final(
    task: Task,
    finalists: Iterable[Candidate],
    others: Sequence[tuple[str, CompressionPlan]],
    progress: SearchProgress,
    *,
    places: int,
    seed: int,
) -> tuple[Finished, Candidate]:
    """Fine-tunes and exports the finalists, each from the same seed of TensorFlow's generator.

    The finalists come the best first; of equal plans the first counts. Heats decide with which
    masks they begin, and who is trained to the end, as if `places` of them were: see
    [run_heats][rl_sparsity_tf.search.heats.run_heats]. `others` are plans to fall back on, see
    [finish_candidate][rl_sparsity_tf.search.final.finish_candidate].

    Gives the finished model that is best on all of the validation data, and the candidate it was
    made of: see [winner][]. One that misses the target is out; one whose file failed, and is stored
    in another way or not there at all, wins only where there is no other. Raises TargetError if all
    of them miss the target: what was said of the first.
    """
    found: list[tuple[Finished, Candidate]] = []
    missed: TargetError | None = None
    distinct: list[Candidate] = []
    for one in finalists:
        if all(one.plan != other.plan for other in distinct):
            distinct.append(one)
    starts, places = run_heats(task, distinct, progress, places=places, seed=seed)
    for number, start in enumerate(starts[: places + 1]):  # one more if one comes to nothing
        if sum(not _shortfall(finished) for finished, _ in found) == places:
            break
        candidate = start.candidate
        what = "another plan" if number else "the best plan"
        progress.say(f"{what} ({start}):")
        tf.random.set_seed(seed)
        try:
            finished = finish_candidate(task, candidate, others)
        except TargetError as error:
            missed = missed or error
            continue
        for warning in finished.warnings:
            progress.say(f"warning: {warning}")
        found.append((finished, finished.candidate or candidate))
    if not found:
        assert missed is not None
        raise missed
    figures = task.figures
    least = min(_shortfall(finished) for finished, _ in found)
    found = [one for one in found if _shortfall(one[0]) == least]
    scores = [finished.validation for finished, _ in found]
    finished, best = found[winner(scores, figures.metric, count_rows(figures.validation))]
    warning = far_below(task, finished.validation)
    if warning:
        _log.warning("%s", warning)
        progress.say(f"warning: {warning}")
        finished = dataclasses.replace(finished, warnings=(*finished.warnings, warning))
    return finished, best


def far_below(task: Task, found: Score) -> str:
    """What to say of a result that is hardly worth having; nothing of others.

    That is one with less than half of what the dense network's figure is above chance (of an
    accuracy, one of as many classes as the model has outputs; else 0), or an error of more than
    twice the dense one's.
    """
    metric, dense = task.figures.metric, task.network.dense
    if metric.higher_is_better:
        chance = 0.0
        shape = getattr(task.model, "output_shape", None)
        if metric.is_accuracy and isinstance(shape, tuple) and shape and shape[-1]:
            chance = 1.0 / max(2, shape[-1])
        enough = found.metric - chance >= 0.5 * (dense.metric - chance)
    else:
        enough = found.metric <= 2.0 * dense.metric or dense.metric < 0
    if enough:
        return ""
    return (
        f"the result is far below the dense model on the validation data ({metric.name} "
        f"{dense.metric:.4g} -> {found.metric:.4g}): choose a target that leaves more, more "
        "finetune_epochs, or more training data"
    )


def _shortfall(finished: Finished) -> int:
    """0 for the file that was asked for, 1 for one in another storage, 2 for none."""
    exported = finished.exported
    return 2 if exported.report is None else int(bool(exported.failure))
