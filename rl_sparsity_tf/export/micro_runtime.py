"""Runs .tflite files in TensorFlow Lite for Microcontrollers (TFLM), where it is installed.

It needs the optional package `tflite-micro`. TFLM aborts where others raise, so each request gets a
process of its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from rl_sparsity_tf.export.micro_process import STEP
from rl_sparsity_tf.files import scratch_folder
from rl_sparsity_tf.tflite.worker import child_environment, save_inputs

# The reference kernels are slow; a process that is silent for longer hangs.
_TIMEOUT_SECONDS = 600.0
_SHOWN_CHARACTERS = 300
# Deaths while bisecting; each one halves the interval, as any other answer does.
_MOST_DEATHS = 64
_SILENT = "it gave no reason"


class TflmError(RuntimeError):
    """TFLM cannot run a file; the text is what it wrote last."""


class TflmMissingError(RuntimeError):
    """The package is installed and cannot be imported; the text says why."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Replies:
    lines: list[dict[str, Any]]
    finished: bool
    said: str


def tflm_installed() -> bool:
    """Whether the package `tflite-micro` is there."""
    return importlib.util.find_spec("tflite_micro") is not None


def measure_arena(path: str | os.PathLike[str], high: int) -> tuple[int, str]:
    """Finds the smallest arena in which TFLM plans a file, and the version of the package.

    The arena is in bytes, a multiple of 16; `high` is one that is amply large. A TflmError is
    raised if TFLM does not take the file at all, a TflmMissingError if the package cannot be
    imported.
    """
    low, version = 0, ""
    high = -(-high // STEP) * STEP
    fitted = False
    for _ in range(_MOST_DEATHS):
        replies = _ask(
            {"command": "arena", "path": os.path.abspath(path), "low": low, "high": high}
        )
        trying = 0
        for line in replies.lines:
            version = line.get("version", version)
            trying = line.get("trying", trying)
            if line.get("fits"):
                high, fitted = line["arena"], True
            elif "fits" in line:
                low, trying = line["arena"], 0
        if not fitted:
            message = next((line["message"] for line in replies.lines if "message" in line), "")
            raise TflmError(replies.said or message or _SILENT)
        if replies.finished:
            return high, version
        # Some arenas that are too small end the process instead of being refused.
        low = max(low, trying if trying < high else 0)
        if high - low <= STEP:
            return high, version
    raise TflmError(replies.said or _SILENT)


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
    with scratch_folder() as folder:
        rows, results = os.path.join(folder, "in.npz"), os.path.join(folder, "out.npz")
        save_inputs(rows, inputs)
        replies = _ask(
            {
                "command": "run",
                "path": os.path.abspath(path),
                "arena": arena,
                "inputs": rows,
                "outputs": results,
                "count": outputs,
                "reset": reset,
            }
        )
        if not replies.finished:
            raise TflmError(replies.said or _SILENT)
        with np.load(results, allow_pickle=False) as arrays:
            return [arrays[f"output_{index}"] for index in range(outputs)]


def _ask(request: dict[str, Any]) -> _Replies:
    """Starts a process for one request and waits for its end."""
    try:
        with scratch_folder() as folder:
            done = subprocess.run(
                # -P: a file in the user's folder must not be imported in a module's place.
                [
                    sys.executable,
                    "-P",
                    "-m",
                    "rl_sparsity_tf.export.micro_process",
                    json.dumps(request),
                ],
                capture_output=True,
                encoding="utf-8",
                errors="replace",
                env=child_environment(folder),
                timeout=_TIMEOUT_SECONDS,
                stdin=subprocess.DEVNULL,
            )
    except subprocess.TimeoutExpired as error:
        raise TflmError(f"no answer within {_TIMEOUT_SECONDS:g} s") from error
    lines = []
    for text in done.stdout.splitlines():
        # The last line of a process that died may be torn.
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(text))
    for line in lines:
        if "missing" in line:
            raise TflmMissingError(line["missing"])
    return _Replies(lines=lines, finished=done.returncode == 0, said=_last_words(done))


def _last_words(done: subprocess.CompletedProcess[str]) -> str:
    written = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    # A traceback ends in the error, and TFLM's own reason stands before it.
    reasons = [line for line in written if not line.startswith(("File ", "Traceback", "^", "~"))]
    words = "; ".join(dict.fromkeys(reasons[-3:]))[-_SHOWN_CHARACTERS:]
    if done.returncode < 0:
        with contextlib.suppress(ValueError):
            name = signal.Signals(-done.returncode).name
            return f"its process ended with {name}" + (f" ({words})" if words else "")
    return words
