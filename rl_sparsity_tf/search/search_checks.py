"""Checks of what `search` is called with, before any data is looked at."""

from __future__ import annotations

import numpy as np

from rl_sparsity_tf.allocation.target import Target
from rl_sparsity_tf.checks import check_count, check_flag
from rl_sparsity_tf.errors import ArgumentError, DataError, check_choice
from rl_sparsity_tf.export.export import QUANTIZATIONS
from rl_sparsity_tf.layers.masks import MASKS


def check_search(
    target: Target,
    *,
    episodes: int,
    least_episodes: int,
    batch_size: int,
    validation_rows: int,
    finetune_epochs: int | None,
    finalists: int,
    mask: str,
    quantization: str,
    dataset: str | None,
    overwrite: bool,
    verbose: int,
    validation_data: object,
) -> None:
    """Raises unless a search can be called with these arguments.

    Args:
        target: The compressor's target.
        episodes: Of the search.
        least_episodes: What there have to be, where no sizes are searched.
        batch_size: Rows in a batch.
        validation_rows: Rows that plans are evaluated on.
        finetune_epochs: Epochs of the final fine-tuning, if they are given.
        finalists: Plans that are fine-tuned.
        mask: How masks learn.
        quantization: How the result is exported.
        dataset: Name of the data.
        overwrite: Whether a run may be replaced.
        verbose: What is printed.
        validation_data: The validation data, as yet unread.

    Raises:
        ArgumentError: If an argument cannot be used.
        DataError: If there is no validation data.
    """
    sizes_searched = target.max_accuracy_drop is not None
    check_count("episodes", episodes, 1 if sizes_searched else least_episodes)
    check_count("batch_size", batch_size, 1)
    check_count("validation_rows", validation_rows, 1)
    if finetune_epochs is not None:
        check_count("finetune_epochs", finetune_epochs, 0)
    check_count("finalists", finalists, 1)
    check_choice("mask", mask, MASKS)
    check_choice("quantization", quantization, QUANTIZATIONS)
    if dataset is not None and not isinstance(dataset, str):
        raise ArgumentError(
            f"dataset={dataset!r} is a {type(dataset).__name__}. Expected the name of the "
            "data as text, or None; the data itself is passed as train."
        )
    check_flag("overwrite", overwrite)
    if target.in_bytes and quantization != "plan":
        raise ArgumentError(
            f"quantization={quantization!r} does not go with a target in bytes, which is "
            "counted for the files that the plan decides on. Leave quantization out, or give "
            "Target(sparsity=...)."
        )
    if not isinstance(verbose, int | np.integer) or verbose not in (0, 1, 2):
        raise ArgumentError(f"verbose={verbose!r} is not known. Expected 0, 1 or 2.")
    if validation_data is None:
        raise DataError(
            "There is no validation_data, which the reward is computed from. Pass "
            "validation_data=(x, y) that the model was not trained on."
        )
