"""Holding a target in bytes to the real file: what is too large is pruned further."""

from __future__ import annotations

import dataclasses
from collections.abc import Container

import numpy as np
import tf_keras as keras

from rl_sparsity_tf.allocation.size_costs import formats_for
from rl_sparsity_tf.allocation.target import Target
from rl_sparsity_tf.environment.candidates import Candidate
from rl_sparsity_tf.errors import TargetError
from rl_sparsity_tf.export.report import ExportReport
from rl_sparsity_tf.layers.kernels import find_kernels
from rl_sparsity_tf.layers.operations import Operation
from rl_sparsity_tf.layers.plan import CompressionPlan
from rl_sparsity_tf.layers.rules import prune_by_magnitude
from rl_sparsity_tf.search.finishing import Figures, Finished, finish
from rl_sparsity_tf.training.mask_training import FineTuning

_ATTEMPTS = 6
# How much further than the overshoot the second attempt goes; every one after it goes twice as far
# as the one before, because what a sparse tensor needs beside its values does not shrink with them.
_EXTRA = 0.02
_LEAST = 0.1
_LARGE_STEP = 0.7


def finish_within(
    model: keras.Model,
    candidate: Candidate,
    figures: Figures,
    target: Target,
    *,
    training: FineTuning,
    quantization: str,
) -> Finished:
    """Finishes a candidate, and if its file is too large, a more pruned form of it.

    The search keeps to the size by a model of it. Fine-tuning changes the weights, and with them
    how well they compress: where the real file is larger than the target, every kernel gives up
    its smallest groups in proportion, and is fine-tuned again.

    Args:
        model: The original model.
        candidate: The plan and the weights to start from.
        figures: Data and metric.
        target: The target; one of sparsity is met by the plan itself.
        training: The fine-tuning.
        quantization: How to export.

    Raises:
        TargetError: If the file is still too large after a few attempts.
    """
    formats = formats_for(target)
    reached: list[int] = []
    for _ in range(_ATTEMPTS):
        finished = finish(
            model, candidate, figures, training=training, quantization=quantization, formats=formats
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
    """The share of its living weights that a file which is too large may keep.

    Only some kernels can shrink; of the gzipped file they are taken to be the same share.

    Args:
        report: The file's report.
        target: A target in bytes.
        attempts: How many files were too large by now, this one among them.
        most: The share at most.
        kernels: Paths of the kernels that can shrink.
    """
    size = size_held(report, target)
    held = sum(tensor.bytes for tensor in report.tensors if tensor.kernel in kernels)
    reducible = size * held / report.tflite_bytes
    over = (size - target.value) / max(reducible, 1.0)
    return float(np.clip(1.0 - over - _EXTRA * 2 ** (attempts - 1), _LEAST, most))


def pruned_further(model: keras.Model, plan: CompressionPlan, share: float) -> CompressionPlan:
    """Prunes the smallest living groups of every kernel.

    Args:
        model: The model that the plan was applied to; its weights decide what is small.
        plan: The plan.
        share: Share of the living weights of every kernel that may stay.

    Returns:
        The plan with more groups pruned; the others keep their operations.
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
