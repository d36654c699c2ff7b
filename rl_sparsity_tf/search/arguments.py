"""What a search is called with, checked, and what it decides on."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras as keras

from rl_sparsity_tf.agents.policies import IMPROVE, STRATEGIES
from rl_sparsity_tf.allocation.channel_decisions import ChannelDecisions, removable_channels
from rl_sparsity_tf.allocation.decisions import KernelDecisions
from rl_sparsity_tf.allocation.size_budget import bytes_for
from rl_sparsity_tf.allocation.target import Target
from rl_sparsity_tf.callbacks import check_callbacks, check_keras_callbacks
from rl_sparsity_tf.channels.latency_measurement import measure_latency
from rl_sparsity_tf.channels.latency_table import LatencyTable
from rl_sparsity_tf.channels.widths import widths_of
from rl_sparsity_tf.checks import check_count, check_flag, check_share
from rl_sparsity_tf.data.batches import TrainingData
from rl_sparsity_tf.data.weights import weight_table
from rl_sparsity_tf.errors import (
    ArgumentError,
    DataError,
    RunError,
    TargetError,
    check_choice,
    one_line,
)
from rl_sparsity_tf.export.arguments import QUANTIZATIONS
from rl_sparsity_tf.layers.groups import GROUPS
from rl_sparsity_tf.layers.operations import MASKS
from rl_sparsity_tf.layers.rules import KernelSelection
from rl_sparsity_tf.search.run_directory import LATEST, TIMES, RunDirectory
from rl_sparsity_tf.search.storage_choice import INT4
from rl_sparsity_tf.training.mask_training import DISTILLATION, FineTuning, default_epochs
from rl_sparsity_tf.training.recovery import Recovery

AUTO = "auto"
"""Groups and bits of every kernel as the bytes of a target want them."""

SHUFFLES = ("neighbours", "channels")
"""How Shuffle moves weights, see [Compressor][rl_sparsity_tf.Compressor]."""

_log = logging.getLogger(__name__)


def group_for(
    model: keras.Model,
    target: Target,
    group: str | None,
    selection: KernelSelection | None = None,
) -> str:
    """The kind of groups that a search decides on.

    By default it decides on all kernels that are not frozen. Raises ArgumentError if the kind is
    not known or cannot meet the target, and TargetError if the target needs channels to be removed,
    and none can be.
    """
    if group is None:
        by_kernel = AUTO if target.tflite_bytes is not None else "element"
        group = "channel" if target.needs_channels else by_kernel
    check_choice("group", group, (*GROUPS, AUTO))
    if group == AUTO and not target.in_bytes:
        raise ArgumentError(
            f"group='auto' does not go with Target({target.kind}={target.value:g}): it weighs ways "
            "to store kernels by the bytes that they take. Expected Target(tflite_bytes=...), "
            "Target(gzip_bytes=...) or Target(max_accuracy_drop=...), or one of the other groups."
        )
    if not target.needs_channels:
        return group
    if group != "channel":
        raise ArgumentError(
            f"Target({target.kind}={target.value:g}) does not go with group={group!r}: zeros save "
            "no multiplications, only whole channels that are removed do. Leave group out, or "
            "pass group='channel'."
        )
    selection = KernelSelection.of(model) if selection is None else selection
    if not removable_channels(model, selection):
        with selection.explained():
            raise TargetError(
                f"Target({target.kind}={target.value:g}) cannot be met: no channel of the model "
                f"{model.name!r} can be removed. rl_sparsity_tf.describe_groups(model) says why "
                "each has to stay; Target(sparsity=...) or Target(tflite_bytes=...) can be met by "
                "zeros."
            )
    return group


def table_for(
    target: Target, table: LatencyTable | str | os.PathLike[str] | None
) -> LatencyTable | None:
    """The table of a target of latency, read if it is given as a file.

    Raises ArgumentError if the target is another, or the table is none.
    """
    if table is None:
        return None
    if target.kind != "latency":
        raise ArgumentError(
            f"latency_table was given, but Target({target.kind}=...) does not need it. Leave it "
            "out, or give Target(latency=0.5)."
        )
    if isinstance(table, str | os.PathLike):
        return LatencyTable.load(table)
    if not isinstance(table, LatencyTable):
        raise ArgumentError(
            f"latency_table={table!r} is a {type(table).__name__}. Expected a LatencyTable, as "
            "rl_sparsity_tf.measure_latency(model) returns, or the path of its JSON file."
        )
    return table


def check_shuffle(shuffle: str, group: str) -> str:
    """How Shuffle moves weights; raises ArgumentError if the kind of groups does not allow it."""
    check_choice("shuffle", shuffle, SHUFFLES)
    if shuffle == "channels" and group not in ("block4", "block16"):
        raise ArgumentError(
            f"shuffle='channels' does not go with group={group!r}: the order of channels only "
            "matters to blocks. Pass group='block4' or group='block16', or leave shuffle out."
        )
    return shuffle


def check_int4(int4: str | None, group: str) -> str:
    """Which kernels may be stored in 4 bits, if the kind of groups leaves that open.

    Raises ArgumentError if the kind of groups does not go with what was asked for.
    """
    if int4 is None:
        return "fast" if group == AUTO else "none"
    check_choice("int4", int4, INT4)
    if group != AUTO:
        raise ArgumentError(
            f"int4={int4!r} does not go with group={group!r}, where every kernel has 8 bits. Pass "
            "group='auto', which chooses the bits, or leave int4 out."
        )
    return int4


def check_strategy(strategy: str, *, group: str, recovery: Recovery, hierarchy: bool) -> str:
    """What an episode is; raises ArgumentError if something else that was asked for forbids it."""
    check_choice("strategy", strategy, STRATEGIES)
    if strategy != IMPROVE:
        return strategy
    conflicts = {
        "hierarchy=True": (hierarchy, "the order of layers is no decision in it"),
        "group='channel'": (group == "channel", "its rankings are of weights and blocks"),
        f"recovery={recovery.method!r}": (
            recovery.method not in (None, "least_squares"),
            "its rankings are made in a fitted network",
        ),
    }
    for what, (given, why) in conflicts.items():
        if given:
            raise ArgumentError(
                f"strategy={strategy!r} does not go with {what}: {why}. Leave one of them out."
            )
    return strategy


def decisions_for(
    model: keras.Model,
    target: Target,
    group: str,
    table: LatencyTable | None,
    quantization: str,
    shuffle: str = "neighbours",
    selection: KernelSelection | None = None,
) -> KernelDecisions:
    """What is decided on: channels, or groups of single kernels.

    Channels of a model whose graph is not known, or that all have to stay, are decided kernel by
    kernel: they become zero, and stay in the file. The log says so. By default the layers' times
    are measured for a target of latency, and all kernels that are not frozen are decided on. Raises
    ArgumentError if the table was made for another quantization.
    """
    if group != "channel":
        if group == AUTO:  # several networks will need the sizes
            sizes = bytes_for(model, target)
            return KernelDecisions("element", sizes=sizes, selection=selection)
        return KernelDecisions(group, shuffles=shuffle == "neighbours", selection=selection)
    if not removable_channels(model, selection):
        _log.warning(
            "No channel of %r can be removed (describe_groups says why), so that pruned channels "
            "become zero, and stay in the file.",
            model.name,
        )
        return KernelDecisions(group, selection=selection)
    if target.kind != "latency":
        return ChannelDecisions(selection=selection)
    if table is None:
        table = measure_latency(model, quantization=quantization)
    elif table.quantization != quantization:
        raise ArgumentError(
            f"The latency table is of quantization={table.quantization!r} files, but the search "
            f"exports quantization={quantization!r}. Pass search(quantization="
            f"{table.quantization!r}), or a table of the other."
        )
    return ChannelDecisions(table, selection)


def kept_table(model: keras.Model, target: Target, run: RunDirectory | None) -> LatencyTable | None:
    """The times that a run which is continued measured: measured again they would be others.

    The names of the model's layers may be others now. Raises RunError if the times are missing or
    damaged.
    """
    if run is None or not run.resumed or target.kind != "latency":
        return None
    arrays = run.load_checkpoint(TIMES)
    if arrays is None:
        if run.has_checkpoint(LATEST) and not run.any_versions:
            raise RunError(
                f"The run in {str(run.path)!r} lacks the times of the layers that it measured. "
                "Measured again they would be others, and the search would not end in the same "
                "bits. Put a copy of checkpoints/times.npz back, pass any_versions=True to go on "
                "all the same, or pass overwrite=True to start the run again."
            )
        return None
    try:
        table = LatencyTable.from_dict(json.loads(str(arrays["table"])))
        layers = zip(widths_of(model), table.layers.values(), strict=True)
        table = dataclasses.replace(table, layers=dict(layers))
        table.check(model)
    except Exception as error:  # whatever may be in a file
        raise run.unreadable(TIMES, one_line(error)) from error
    return table


def keep_table(decisions: KernelDecisions, run: RunDirectory | None) -> None:
    """Keeps the times that a search was given or has measured, for when it is cut off."""
    table = decisions.table if isinstance(decisions, ChannelDecisions) else None
    if run is not None and table is not None and not run.has_checkpoint(TIMES):
        run.save_checkpoint(TIMES, {"table": np.array(json.dumps(table.to_dict()))})


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """What `Compressor.search` takes beside the data, which says what each is; its defaults.

    The weights of classes are a list once they are checked.
    """

    episodes: int = 24
    batch_size: int = 128
    finetune_epochs: int | None = None
    mask: str = "straight_through"
    distillation: float = DISTILLATION
    quantization: str = "plan"
    validation_rows: int = 2000
    class_weight: Any = None
    unroll: bool = False
    finalists: int = 3
    dataset: str | None = None
    overwrite: bool = False
    any_versions: bool = False
    callbacks: Any = None
    finetune_callbacks: Any = None
    verbose: int = 1

    def checked(
        self, target: Target, validation_data: object, *, least_episodes: int
    ) -> SearchOptions:
        """Raises unless a search can be called with these; gives them with the checked values.

        `least_episodes` is what there have to be where no sizes are searched; the validation data
        is as yet unread. Raises ArgumentError if an argument cannot be used, and DataError if there
        is no validation data.
        """
        sizes_searched = target.max_accuracy_drop is not None
        check_count("episodes", self.episodes, 1 if sizes_searched else least_episodes)
        check_count("batch_size", self.batch_size, 1)
        check_count("validation_rows", self.validation_rows, 1)
        if self.finetune_epochs is not None:
            check_count("finetune_epochs", self.finetune_epochs, 0)
        check_count("finalists", self.finalists, 1)
        check_choice("mask", self.mask, MASKS)
        check_choice("quantization", self.quantization, QUANTIZATIONS)
        if self.dataset is not None and not isinstance(self.dataset, str):
            raise ArgumentError(
                f"dataset={self.dataset!r} is a {type(self.dataset).__name__}. Expected the name "
                "of the data as text, or None; the data itself is passed as train."
            )
        check_flag("overwrite", self.overwrite)
        if target.in_bytes and self.quantization != "plan":
            raise ArgumentError(
                f"quantization={self.quantization!r} does not go with a target in bytes, which is "
                "counted for the files that the plan decides on. Leave quantization out, or give "
                "Target(sparsity=...)."
            )
        if not isinstance(self.verbose, int | np.integer) or self.verbose not in (0, 1, 2):
            raise ArgumentError(f"verbose={self.verbose!r} is not known. Expected 0, 1 or 2.")
        if validation_data is None:
            raise DataError(
                "There is no validation_data, which the reward is computed from. Pass "
                "validation_data=(x, y) that the model was not trained on."
            )
        check_flag("any_versions", self.any_versions)
        return dataclasses.replace(
            self,
            distillation=check_share("distillation", self.distillation),
            class_weight=weight_table(self.class_weight),
            unroll=check_flag("unroll", self.unroll),
            callbacks=check_callbacks(self.callbacks),
            finetune_callbacks=check_keras_callbacks(self.finetune_callbacks),
        )

    def resolved(self, train: TrainingData) -> SearchOptions:
        """With the epochs and the batch size that the data comes to."""
        epochs = self.finetune_epochs
        return dataclasses.replace(
            self,
            finetune_epochs=default_epochs(train) if epochs is None else epochs,
            batch_size=len(tf.nest.flatten(train.pool[0])[0]),
        )

    def to_dict(self) -> dict[str, Any]:
        """What the search's bits depend on, as a run's manifest has it."""
        others = ("dataset", "overwrite", "any_versions", "verbose", "callbacks")
        values = {name: value for name, value in vars(self).items() if name not in others}
        # Runs from before there were any do not name them.
        names = [type(one).__qualname__ for one in self.finetune_callbacks or ()]
        return {**values, "finetune_callbacks": names or None}

    @property
    def training(self) -> FineTuning:
        """How finished plans are trained, once the epochs are known."""
        assert self.finetune_epochs is not None
        return FineTuning(
            epochs=self.finetune_epochs,
            mask=self.mask,
            distillation=self.distillation,
            callbacks=self.finetune_callbacks or (),
        )
