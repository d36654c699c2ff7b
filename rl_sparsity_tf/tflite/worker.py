"""The parent side of the conversion process: starts it, talks to it, survives its death.

Converters and runtimes can abort the process they run in, so they run in a child that is started on
first use, reused, restarted when it has died, and closed at exit.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rl_sparsity_tf.errors import ExportError
from rl_sparsity_tf.files import PACKAGE_PARENT, new_scratch_folder, scratch_folder

# Converting a large model takes minutes; a child that is silent for longer hangs.
TIMEOUT_SECONDS = 1800.0
_TAIL_LINES = 15
_CLOSE_SECONDS = 5.0
_LOG = "worker.log"


class WorkerError(ExportError):
    """The conversion process refused a request, died or did not answer.

    Attributes:
        reason: Name of the exception in the child, or "died" or "timeout".
        detail: Its message, or the end of what the child wrote.
        signal: Name of the signal that a child died of, if it was one.
    """

    def __init__(self, message: str, reason: str, detail: str, signal: str = "") -> None:
        super().__init__(message)
        self.reason = reason
        self.detail = detail
        self.signal = signal


class ConversionWorker:
    """A child process that answers conversion requests, one at a time.

    A child that does not answer within `timeout` seconds is killed.

    Example:
        >>> with ConversionWorker() as worker:
        ...     outputs = worker.run("model.tflite", [x], batch_size=32)
    """

    def __init__(self, timeout: float = TIMEOUT_SECONDS) -> None:
        self._timeout = timeout
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._process: subprocess.Popen[str] | None = None
        self._owner = os.getpid()
        # Of the child alone: what it leaves when it dies is found, and removed.
        self._folder: Path | None = None
        self._replies: queue.Queue[str | None] = queue.Queue()

    def __enter__(self) -> ConversionWorker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pid(self) -> int | None:
        """Process id of the child, None if it is not running."""
        running = self._process is not None and self._process.poll() is None
        return self._process.pid if self._process is not None and running else None

    def start(self) -> None:
        """Starts the child and its TensorFlow import, without waiting for either."""
        with self._lock:
            if self._ensure_started():
                self._send({"id": 0, "command": "warm"})

    def request(self, command: str, **arguments: Any) -> dict[str, Any]:
        """Sends a request and waits for its result.

        A WorkerError is raised if the child reports an error, dies or does not answer in time.
        """
        with self._lock:
            self._ensure_started()
            number = next(self._numbers)
            try:
                self._send({"id": number, "command": command, **arguments})
                reply = self._receive(number, command)
            except WorkerError:
                raise
            except BaseException:
                # Interrupted half-way, the child would answer the next request with this one's.
                self._kill()
                raise
        if not reply["ok"]:
            raise WorkerError(
                f"{command} failed: {reply['error']}: {reply['message']}",
                reply["error"],
                reply["message"],
            )
        return reply["result"]

    def convert(
        self,
        saved_model: str | os.PathLike[str],
        output: str | os.PathLike[str],
        quantization: str,
        representative: Sequence[np.ndarray] | None = None,
    ) -> None:
        """Converts a SavedModel to a .tflite file with builtin operators only."""
        with scratch_folder() as folder:
            rows = None
            if representative is not None:
                rows = os.path.join(folder, "representative.npz")
                save_inputs(rows, representative)
            self.request(
                "convert",
                saved_model=str(saved_model),
                output=str(output),
                quantization=quantization,
                representative=rows,
            )

    def run(
        self,
        path: str | os.PathLike[str],
        inputs: Sequence[np.ndarray],
        *,
        batch_size: int,
        xnnpack: bool = True,
        reset: bool = True,
        names: Sequence[str] | None = None,
    ) -> list[np.ndarray]:
        """Runs a .tflite file over all rows; returns its outputs in Keras's order.

        The arrays are in the order of the file's inputs, or for those with the names given. Without
        `reset` a file that keeps its state starts a call from where the last one ended.
        """
        with scratch_folder() as folder:
            rows, results = os.path.join(folder, "in.npz"), os.path.join(folder, "out.npz")
            save_inputs(rows, inputs)
            self.request(
                "run",
                path=os.path.abspath(path),
                inputs=rows,
                outputs=results,
                batch_size=batch_size,
                xnnpack=xnnpack,
                reset=reset,
                given=None if names is None else list(names),
            )
            return load_outputs(results)

    def time(
        self,
        paths: Sequence[str | os.PathLike[str]],
        *,
        index_limits: Sequence[int],
        runs: int,
        threads: int = 1,
        xnnpack: bool = True,
        batch_size: int = 1,
    ) -> list[list[float]]:
        """Times .tflite files in turns on random inputs; returns seconds per call, `runs` each."""
        result = self.request(
            "time",
            paths=[os.path.abspath(path) for path in paths],
            index_limits=list(index_limits),
            runs=runs,
            threads=threads,
            xnnpack=xnnpack,
            batch_size=batch_size,
        )
        return result["seconds"]

    def close(self) -> None:
        """Ends the child; a later request starts a new one."""
        if self._owner != os.getpid():
            return
        process = self._process
        if process is not None and process.poll() is None and process.stdin is not None:
            with contextlib.suppress(OSError):
                process.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_CLOSE_SECONDS)
        self._kill()

    def _ensure_started(self) -> bool:
        """Returns whether a new child had to be started."""
        if self._owner != os.getpid():
            # After a fork the pipes belong to the parent's conversations.
            self._process, self._folder, self._owner = None, None, os.getpid()
        if self._process is not None and self._process.poll() is None:
            return False
        self._kill()
        self._folder = new_scratch_folder("rl_sparsity_worker_")
        environment = _child_environment(self._folder)
        # Conversion needs no GPU, and must not take the memory of the one the parent trains on.
        environment["CUDA_VISIBLE_DEVICES"] = "-1"
        self._replies = queue.Queue()
        try:
            with open(self._folder / _LOG, "wb") as log:
                self._process = subprocess.Popen(
                    # -P: a file in the user's folder must not be imported in a module's place.
                    [
                        sys.executable,
                        "-P",
                        "-m",
                        "rl_sparsity_tf.tflite.worker_process",
                        self._folder,
                    ],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    env=environment,
                    encoding="utf-8",
                    # Ctrl-C is for the parent, which then ends the child itself.
                    start_new_session=True,
                )
        except OSError as error:
            self._kill()
            raise WorkerError(
                f"The conversion process could not be started with {sys.executable!r}: {error}. "
                "Export from a Python interpreter that can start itself.",
                "died",
                str(error),
            ) from error
        reader = threading.Thread(
            target=_forward_lines, args=(self._process.stdout, self._replies), daemon=True
        )
        reader.start()
        return True

    def _send(self, message: dict[str, Any]) -> None:
        process = self._process
        assert process is not None
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(message) + "\n")
            process.stdin.flush()
        except OSError as error:
            raise self._dead(message["command"]) from error

    def _receive(self, number: int, command: str) -> dict[str, Any]:
        while True:
            try:
                line = self._replies.get(timeout=self._timeout)
            except queue.Empty:
                self._kill_process()
                tail = self.tail()
                self._kill()
                raise WorkerError(
                    f"The conversion process did not finish {command!r} within "
                    f"{self._timeout:g} s and was ended. Try a smaller model or fewer rows. The "
                    f"last lines it wrote:\n{tail}",
                    "timeout",
                    tail,
                ) from None
            if line is None:
                raise self._dead(command)
            reply = json.loads(line)
            # The answer to the warming up of start() is nobody's.
            if reply["id"] == number:
                return reply

    def _dead(self, command: str) -> WorkerError:
        process = self._process
        assert process is not None
        # Its pipes have closed, so it is on its way out: let it name its own signal.
        self._kill_process(_CLOSE_SECONDS)
        code, tail, name = process.returncode, self.tail(), ""
        self._kill()
        if code < 0:
            with contextlib.suppress(ValueError):
                name = signal.Signals(-code).name
        how = f"signal {name}" if name else f"exit code {code}"
        return WorkerError(
            f"The conversion process ended unexpectedly ({how}) during {command!r}. Your program "
            "is not affected; the model probably has an operation that the converter or LiteRT "
            f"cannot handle. The last lines it wrote:\n{tail}",
            "died",
            tail,
            name,
        )

    def tail(self) -> str:
        """The last lines that the child wrote beside its answers."""
        log = None if self._folder is None else self._folder / _LOG
        if log is None or not log.exists():
            return ""
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(lines[-_TAIL_LINES:])

    def _kill_process(self, grace: float = 0.0) -> None:
        """Ends the child, after giving it `grace` seconds to end by itself."""
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(grace)
            if self._process.poll() is None:
                self._process.kill()
            self._process.wait()

    def _kill(self) -> None:
        self._kill_process()
        if self._process is not None:
            for stream in (self._process.stdin, self._process.stdout):
                if stream is not None:
                    with contextlib.suppress(OSError):
                        stream.close()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._process, self._folder = None, None


_worker = ConversionWorker()
atexit.register(_worker.close)


def shared_worker() -> ConversionWorker:
    """The process-wide worker that exports and predictions use."""
    return _worker


def start_worker() -> None:
    """Starts the conversion process early, so that its TensorFlow import overlaps other work.

    Example:
        >>> start_worker()
        >>> model.fit(x, y)  # meanwhile the child gets ready
        >>> export_tflite(model, "model.tflite", "none")
    """
    shared_worker().start()


def _child_environment(folder: Path) -> dict[str, str]:
    """The environment of a child that finds this package, and puts temporary files in a folder."""
    environment = dict(os.environ)
    parent = str(PACKAGE_PARENT)
    inherited = environment.get("PYTHONPATH")
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [parent, inherited]))
    return {**environment, **dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(folder))}


def save_inputs(path: str, arrays: Sequence[np.ndarray]) -> None:
    """Writes one array of rows per input, as the conversion process reads them."""
    named: dict[str, Any] = {
        f"input_{index}": np.asarray(array) for index, array in enumerate(arrays)
    }
    np.savez(path, **named)


def load_outputs(path: str) -> list[np.ndarray]:
    """Reads the rows of each output, as the conversion process writes them."""
    with np.load(path, allow_pickle=False) as arrays:
        return [arrays[f"output_{index}"] for index in range(len(arrays.files))]


def _forward_lines(stream: Any, replies: queue.Queue[str | None]) -> None:
    with contextlib.suppress(ValueError, OSError):
        for line in stream:
            replies.put(line)
    replies.put(None)
