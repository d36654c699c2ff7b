"""The child process that runs a file in TensorFlow Lite for Microcontrollers.

Started by [micro_runtime][rl_sparsity_tf.export.micro_runtime] as `python -m
rl_sparsity_tf.export.micro_process` with one JSON request as its argument, because the runtime ends
the process it runs in where others raise an error. It writes one JSON object per line and flushes
each, so that what was being tried when it died is known.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

# Arenas are tried in steps of TFLM's alignment.
STEP = 16


def smallest_arena(say: Callable[..., None], path: str, low: int, high: int) -> None:
    """Bisects for the smallest arena that the runtime can plan the file in.

    `low` is an arena that is too small, `high` one that may be large enough; nothing is bisected if
    it is not. `say` writes a line of reply.
    """
    content = Path(path).read_bytes()
    if not _fits(say, content, high):
        return
    while high - low > STEP:
        middle = (low + high) // 2 // STEP * STEP
        if middle <= low:
            return
        if _fits(say, content, middle):
            high = middle
        else:
            low = middle


def run(
    say: Callable[..., None],
    path: str,
    arena: int,
    inputs: str,
    outputs: str,
    count: int,
    reset: bool,
) -> None:
    """Runs rows one by one in an arena of so many bytes.

    `inputs` is an .npz file with the rows of each of the file's inputs, as the file stores them;
    `outputs` is the .npz file to write, with `count` outputs in the file's order. `reset` says
    whether what the file keeps from call to call is reset before each of them.
    """
    interpreter = _interpreter(Path(path).read_bytes(), arena)
    with np.load(inputs, allow_pickle=False) as arrays:
        rows = [arrays[f"input_{index}"] for index in range(len(arrays.files))]
    results: list[list[np.ndarray]] = []
    for row in range(len(rows[0])):
        if reset:
            interpreter.reset()
        for index, array in enumerate(rows):
            interpreter.set_input(array[row : row + 1], index)
        interpreter.invoke()
        # Copies: the arrays look into the arena, which the next call overwrites.
        results.append([np.array(interpreter.get_output(index)) for index in range(count)])
    named: dict[str, Any] = {
        f"output_{index}": np.concatenate(values)
        for index, values in enumerate(zip(*results, strict=True))
    }
    np.savez(outputs, **named)
    say(done=True)


def _fits(say: Callable[..., None], content: bytes, arena: int) -> bool:
    say(trying=arena)
    try:
        _interpreter(content, arena)
    except RuntimeError as error:
        say(arena=arena, fits=False, message=str(error))
        return False
    say(arena=arena, fits=True)
    return True


def _interpreter(content: bytes, arena: int) -> Any:
    from tflite_micro import runtime

    return runtime.Interpreter.from_bytes(content, arena_size=arena)


def main() -> None:
    """Carries out the request in the first argument."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    # What the runtime prints must not get between the replies.
    os.dup2(2, 1)

    def say(**values: Any) -> None:
        replies.write(json.dumps(values) + "\n")
        replies.flush()

    request = json.loads(sys.argv[1])
    commands: dict[str, Callable[..., None]] = {"arena": smallest_arena, "run": run}
    command = commands[request.pop("command")]
    try:
        import tflite_micro
    except ImportError as error:
        say(missing=str(error))
        return
    say(version=str(tflite_micro.__version__))
    command(say, **request)


if __name__ == "__main__":
    main()
