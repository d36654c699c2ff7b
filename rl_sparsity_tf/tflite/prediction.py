"""Runs a .tflite file on the rows that a user gave, once they are known to fit it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from rl_sparsity_tf.errors import ArgumentError
from rl_sparsity_tf.tflite.worker import WorkerError, shared_worker
from rl_sparsity_tf.tflite.worker_process import InputError


def run_rows(
    path: str | os.PathLike[str], inputs: Any, *, batch_size: int, xnnpack: bool
) -> list[np.ndarray]:
    """Runs a file over all rows in the conversion process; gives its outputs in Keras's order.

    The inputs are an array of shape `(rows, ...)`, a list or tuple with one per input, or a dict of
    them by the inputs' names. A file with a fixed batch size uses its own. An ArgumentError tells
    the user of inputs that cannot be used or are not what the file takes, an ExportError that
    LiteRT cannot run the file.
    """
    names = [str(name) for name in inputs] if isinstance(inputs, Mapping) else None
    arrays = _arrays(list(inputs.values()) if isinstance(inputs, Mapping) else inputs)
    worker = shared_worker()
    try:
        return worker.run(path, arrays, batch_size=batch_size, xnnpack=xnnpack, names=names)
    except WorkerError as error:
        if error.reason != InputError.__name__:
            raise
        raise ArgumentError(error.detail) from error


def _arrays(inputs: Any) -> list[np.ndarray]:
    given = list(inputs) if isinstance(inputs, list | tuple) else [inputs]
    try:
        arrays = [np.asarray(array) for array in given]
    except ValueError as error:
        raise ArgumentError(
            "inputs has rows of unequal length. Expected an array of shape (rows, ...), or a list "
            "with one per input of the model: pad the rows to one length."
        ) from error
    for array in arrays:
        if array.dtype.kind not in "biuf":
            raise ArgumentError(
                f"inputs holds {array.dtype}. Expected arrays of integers or real numbers."
            )
    if not arrays or any(array.ndim == 0 or not len(array) for array in arrays):
        raise ArgumentError(
            f"inputs has the shapes {[array.shape for array in arrays]}. Expected at least one row "
            "(first axis) for every input."
        )
    if len({len(array) for array in arrays}) != 1:
        raise ArgumentError(
            f"inputs has {[len(array) for array in arrays]} rows. Expected one array per input of "
            "the model, all with the same number of rows; wrap a single input given as nested "
            "lists in numpy.array."
        )
    return arrays
