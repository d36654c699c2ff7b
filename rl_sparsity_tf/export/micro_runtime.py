"""Runs .tflite files in TensorFlow Lite for Microcontrollers (TFLM), where it is installed.

It needs the optional package `tflite-micro`. TFLM aborts where others raise, so its processes are
its own, and no other file is run in them.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from rl_sparsity_tf.files import scratch_folder
from rl_sparsity_tf.tflite.worker import ConversionWorker, WorkerError, load_outputs, save_inputs
from rl_sparsity_tf.tflite.worker_process import TflmMissingError

# The reference kernels are slow; a process that is silent for longer hangs.
_TIMEOUT_SECONDS = 600.0
_SHOWN_CHARACTERS = 300
# Arenas are tried in steps of TFLM's alignment.
_STEP = 16


class TflmError(RuntimeError):
    """TFLM cannot run a file; the text is what it wrote last."""


class TflmTimeoutError(TflmError):
    """TFLM gives no answer."""


def tflm_installed() -> bool:
    """Whether the package `tflite-micro` is there."""
    return importlib.util.find_spec("tflite_micro") is not None


def measure_arena(path: str | os.PathLike[str], high: int) -> tuple[int, str]:
    """Finds the smallest arena in which TFLM plans a file, and the version of the package.

    The arena is in bytes, a multiple of 16; `high` is one that is amply large. A TflmError is
    raised if TFLM does not take the file at all, a TflmMissingError if the package cannot be
    imported.
    """
    low, high = 0, -(-high // _STEP) * _STEP
    with ConversionWorker(_TIMEOUT_SECONDS) as worker:
        version = _ask(worker, "plan_tflm", path, arena=high)["version"]
        while (middle := (low + high) // 2 // _STEP * _STEP) > low:
            try:
                _ask(worker, "plan_tflm", path, arena=middle)
                high = middle
            except TflmTimeoutError:
                raise
            except TflmError:
                # Some arenas that are too small end the process instead of being refused.
                low = middle
    return high, version


def run_tflm(
    path: str | os.PathLike[str],
    arena: int,
    inputs: Sequence[np.ndarray],
    outputs: int,
    *,
    reset: bool = False,
) -> list[np.ndarray]:
    """Runs rows one by one in TFLM's reference kernels.

    The file has batch size 1, and the arena is in bytes. Inputs and results are one array of rows
    per input or output, in the file's order and as the file stores them. `reset` says whether what
    the file keeps from call to call is reset before each of them. A TflmError is raised if TFLM
    fails or dies, a TflmMissingError if the package cannot be imported.
    """
    with scratch_folder() as folder, ConversionWorker(_TIMEOUT_SECONDS) as worker:
        rows, results = os.path.join(folder, "in.npz"), os.path.join(folder, "out.npz")
        save_inputs(rows, inputs)
        options = {"inputs": rows, "outputs": results, "count": outputs, "reset": reset}
        _ask(worker, "run_tflm", path, arena=arena, **options)
        return load_outputs(results)


def _ask(
    worker: ConversionWorker, command: str, path: str | os.PathLike[str], **arguments: Any
) -> dict[str, Any]:
    try:
        return worker.request(command, path=os.path.abspath(path), **arguments)
    except WorkerError as error:
        if error.reason == TflmMissingError.__name__:
            raise TflmMissingError(error.detail) from error
        if error.reason == "timeout":
            raise TflmTimeoutError(f"no answer within {_TIMEOUT_SECONDS:g} s") from error
        words = _last_words(error.detail if error.reason == "died" else worker.tail())
        if error.signal:
            ended = f"its process ended with {error.signal}"
            raise TflmError(f"{ended} ({words})" if words else ended) from error
        raise TflmError(words or error.detail or "it gave no reason") from error


def _last_words(written: str) -> str:
    lines = [line.strip() for line in written.splitlines() if line.strip()]
    # A traceback ends in the error, and TFLM's own reason stands before it.
    reasons = [line for line in lines if not line.startswith(("File ", "Traceback", "^", "~"))]
    return "; ".join(dict.fromkeys(reasons[-3:]))[-_SHOWN_CHARACTERS:]
