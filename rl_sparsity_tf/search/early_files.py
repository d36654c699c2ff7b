"""Files made before a search is paid for: what fails in them would fail after all the work."""

from __future__ import annotations

import dataclasses
import logging
from typing import NamedTuple

import tf_keras as keras

from rl_sparsity_tf.allocation.channel_decisions import ChannelDecisions
from rl_sparsity_tf.allocation.size_budget import formats_for
from rl_sparsity_tf.callbacks import EXPORT
from rl_sparsity_tf.console import SearchProgress
from rl_sparsity_tf.environment.candidates import Candidate
from rl_sparsity_tf.errors import ExportError, VerificationError
from rl_sparsity_tf.layers.kernels import count_weights
from rl_sparsity_tf.layers.wrapping import strip, wrap
from rl_sparsity_tf.search.finishing import (
    Exported,
    Figures,
    Task,
    export_and_score,
    export_dense_int8,
)

_log = logging.getLogger(__name__)

LONG_SEARCH = 100_000
"""Weights from which on a plan's file is tried before the episodes: those of smaller networks take
no longer than the trial is worth."""


class DenseFiles(NamedTuple):
    """The dense model's files, which the result is held against, and what went wrong by then."""

    float32: Exported
    int8: Exported
    warnings: list[str]


def dense_files(model: keras.Model, figures: Figures, quantization: str) -> DenseFiles:
    """Exports the dense model in float32 and int8, and tries the quantization that is asked for.

    Raises ExportError if the model cannot be converted as asked, or not even its float32 file does
    what it does.
    """
    warnings: list[str] = []
    try:
        dense = export_and_score(model, None, figures, "none")
    except VerificationError as error:
        raise VerificationError(
            f"No search was begun, because the file of model {model.name!r} as it is fails: {error}"
        ) from error
    try:
        dense_int8 = export_dense_int8(model, figures)
    except VerificationError as error:
        dense_int8 = Exported(content=None, report=None, test=None, failure=str(error))
        warnings.append(f"the dense model's int8 file fails: {error}")
    if quantization in ("int8", "dynamic", "float16"):
        try:
            export_and_score(model, None, figures, quantization)
        except VerificationError as error:
            warnings.append(f"the dense model's file as {quantization!r} fails: {error}")
    for warning in warnings:
        _log.warning("%s", warning)
    return DenseFiles(dense, dense_int8, warnings)


def check_early(
    task: Task, warnings: list[str], progress: SearchProgress, candidate: Candidate
) -> None:
    """Exports the first plan of a search that takes long, and says so if its file fails.

    Whole channels are not tried, as their files are measured in the course of the search. What went
    wrong is added to `warnings`. The candidate has the weights it was evaluated at.
    """
    whole_channels = isinstance(task.network.decisions, ChannelDecisions)
    if whole_channels or count_weights(task.model)[1] < LONG_SEARCH:
        return
    wrapped = wrap(task.model, candidate.plan)
    candidate.put_weights(wrapped)
    figures = dataclasses.replace(task.figures, test=None)
    formats = formats_for(task.target)
    try:
        with progress.phase(EXPORT, "exporting an early plan"):
            export_and_score(strip(wrapped), candidate.plan, figures, task.quantization, formats)
    except ExportError as error:
        warnings.append(
            f"the file of an early plan ({candidate.found_by}) fails, so the result's may have to "
            f"be stored otherwise: {' '.join(str(error).split())}"
        )
        _log.warning("%s", warnings[-1])
        progress.say(f"warning: {warnings[-1]}")
