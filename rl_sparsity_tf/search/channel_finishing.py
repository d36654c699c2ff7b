"""From a plan of channels to the finished model: removed, held to the target, fine-tuned."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import tf_keras as keras

from rl_sparsity_tf.allocation.channel_decisions import ChannelDecisions
from rl_sparsity_tf.allocation.channel_programming import cost_of_plan, pruned_to
from rl_sparsity_tf.allocation.size_costs import formats_for
from rl_sparsity_tf.allocation.target import Target
from rl_sparsity_tf.channels.channel_plans import masks, only_pruned
from rl_sparsity_tf.channels.costs import count_macs
from rl_sparsity_tf.channels.latency_table import LatencyTable
from rl_sparsity_tf.channels.shrinking import shrink_with_report
from rl_sparsity_tf.channels.widths import widths_of
from rl_sparsity_tf.environment.candidates import PROPOSED, Candidate
from rl_sparsity_tf.environment.network import CompressedNetwork
from rl_sparsity_tf.environment.plan_evaluation import evaluate_plan
from rl_sparsity_tf.environment.reward import Outcome
from rl_sparsity_tf.errors import ExportError, TargetError
from rl_sparsity_tf.export.export import export_tflite
from rl_sparsity_tf.files import scratch_folder
from rl_sparsity_tf.layers.kernels import count_weights, walk
from rl_sparsity_tf.layers.operations import Operation
from rl_sparsity_tf.layers.plan import CompressionPlan, KernelPlan
from rl_sparsity_tf.layers.wrapping import strip, wrap
from rl_sparsity_tf.search.finishing import (
    Figures,
    Finished,
    RemovedChannels,
    all_quantized,
    finish,
)
from rl_sparsity_tf.search.size_enforcement import finish_within
from rl_sparsity_tf.tflite.timing import Timing, benchmark_tflite
from rl_sparsity_tf.training.mask_training import FineTuning

_ATTEMPTS = 6
_ANY = 1e6
# Plans of others that are tried in place of one that had to be pruned further.
_ALTERNATIVES = 4
# How much further than the overshoot the next attempt goes.
_EXTRA = 0.01
# Of a measured time, what the target may be missed by: less is noise.
_TIME_TOLERANCE = 0.02


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """What a candidate is finished for.

    Attributes:
        model: The original model.
        network: The network that was searched.
        figures: Data and metric.
        target: The target.
        training: The fine-tuning.
        quantization: How to export.
        dense: The dense model's file in that quantization, once it was needed.
    """

    model: keras.Model
    network: CompressedNetwork
    figures: Figures
    target: Target
    training: FineTuning
    quantization: str
    dense: list[bytes] = dataclasses.field(default_factory=list)


def finish_candidate(
    task: Task, candidate: Candidate, others: Sequence[tuple[str, CompressionPlan]] = ()
) -> Finished:
    """Fine-tunes and exports a candidate, whatever was decided on.

    Pruned channels are removed first: what is trained and exported is the small model. What it
    takes (bytes, multiplications, time) hardly depends on its weights, so the target is held to
    before the training.

    Args:
        task: What it is finished for.
        candidate: The plan and the weights to start from.
        others: Names and plans to fall back on, the best first, where the candidate had to be
            pruned further and one of them, which had not, promises more. For channels only.

    Raises:
        TargetError: If the target is still missed after a few attempts to prune further.
    """
    if not isinstance(task.network.decisions, ChannelDecisions):
        return finish_within(
            task.model,
            candidate,
            task.figures,
            task.target,
            training=task.training,
            quantization=task.quantization,
        )
    unmeasured = ""
    try:
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

    Args:
        model: The original model.
        decisions: What was decided on.
        candidate: A plan of its units.

    Returns:
        The small model, and the candidate for it: how its kernels are stored, and its weights.
    """
    decided = {path: entry.operations for path, entry in candidate.plan.kernels.items()}
    selection = decisions.selected(model)
    kernels = selection.kernels(model)
    operations = decisions.operations(decided, [kernel.path for kernel in kernels])
    pruned = {path: only_pruned(chosen) for path, chosen in operations.items()}
    wrapped = wrap(model, masks(kernels, pruned))
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
