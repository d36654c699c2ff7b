"""Runs that are killed: machinery, and the whole campaign.

As a script it goes through everything and prints figures, which takes a while:

    python tests/helpers/interrupted_runs.py kill 4    # four moments of every kind of search
    python tests/helpers/interrupted_runs.py sigkill 5
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import rl_sparsity_tf  # noqa: F401

import channel_search as channels
import numpy as np
import plain_graphs
import pytest
import tf_keras as keras
import tiny_search as tiny

import rl_sparsity_tf as rls
from rl_sparsity_tf.search import accuracy_search
from rl_sparsity_tf.search import arguments as decision_choice
from rl_sparsity_tf.tflite.timing import FileTiming, Timing

# ------------------------------------------------------------------------------ kinds of runs


def _tiny(agent: Any, **options: Any) -> Callable[..., rls.Result]:
    episodes = options.pop("episodes", 4)

    def run(folder: Path, **more: Any) -> rls.Result:
        one = tiny.compressor(tiny.trained(), agent, directory=folder, **options)
        return tiny.search(one, episodes=episodes, finetune_epochs=1, **more)

    return run


def _wide(target: rls.Target, agent: Any = "random", **options: Any) -> Callable[..., rls.Result]:
    episodes = options.pop("episodes", 4)

    def run(folder: Path, **more: Any) -> rls.Result:
        one = tiny.compressor(tiny.wide(), agent, target=target, directory=folder, **options)
        arguments = {"train": tiny.WIDE_TRAIN, "validation_data": tiny.WIDE_VALIDATION, **more}
        return tiny.search(one, **{"episodes": episodes, "finetune_epochs": 1, **arguments})

    return run


def _channels(target: rls.Target, agent: Any = "random") -> Callable[..., rls.Result]:
    def run(folder: Path, **more: Any) -> rls.Result:
        one = channels.compressor(target, agent=agent, directory=folder)
        return channels.searched(
            one, **{"episodes": 3, "finetune_epochs": 1, "finalists": 2, **more}
        )

    return run


STAGED = rls.Staged(stages=(0.5, 1.0))
KINDS: dict[str, Callable[..., rls.Result]] = {
    "plain": _tiny(tiny.DQN),
    "long": _tiny(tiny.DQN, episodes=8),
    "ppo": _tiny(
        rls.PPO(hidden_layers=(8,), num_epochs=2, episodes_per_update=2),
        recovery="least_squares",
        warm_start=False,
    ),
    "hierarchy": _tiny(tiny.DQN, hierarchy=True, recovery="least_squares"),
    "curriculum": _tiny("random", curriculum=STAGED, recovery="least_squares"),
    "improve": _wide(
        rls.Target(sparsity=0.8), tiny.DQN, strategy="improve", recovery="least_squares", episodes=8
    ),
    "bytes": _wide(rls.Target(tflite_bytes=5000), recovery="least_squares"),
    "accuracy drop": _wide(rls.Target(max_accuracy_drop=0.1), recovery="none"),
    "macs": _channels(rls.Target(macs=0.4)),
    "latency": _channels(rls.Target(latency=0.5)),
}

MEASURED = [0]
"""How often layers were measured since [same_names][]."""


@contextlib.contextmanager
def quick() -> Iterator[None]:
    """Three trials of sizes; and times that are others when they are measured again."""

    def measured(model: keras.Model, quantization: str) -> rls.LatencyTable:
        table = channels.table_for(model, quantization)
        drawn = np.random.default_rng(MEASURED[0])
        MEASURED[0] += 1
        for layer in table.layers.values():
            times = layer.ms * drawn.uniform(0.5, 2.0, layer.ms.shape)
            object.__setattr__(layer, "ms", times)
        return table

    def timed(path: Any, against: Any, **_: Any) -> Timing:
        """A file's time goes by its size: this has to be the same again.

        What any file of these models has, whatever is pruned, takes no time.
        """
        times = [(os.path.getsize(one) - 4500) / 1e4 for one in (path, against)]
        file, dense = (
            FileTiming(path=str(one), samples_ms=(ms,) * 5)
            for one, ms in zip((path, against), times, strict=True)
        )
        return Timing(file=file, against=dense, threads=1, xnnpack=True, batch_size=1)

    with tiny.quick_search(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(accuracy_search, "MOST_TRIALS", 3)
        patch.setattr(decision_choice, "measure_latency", measured)
        patch.setattr("rl_sparsity_tf.search.final.benchmark_tflite", timed)
        yield


def bits_of(result: rls.Result, folder: Path) -> dict[str, Any]:
    """Everything that a search comes to, without the clock."""
    metrics = json.loads(json.dumps(result.metrics))
    metrics["search"].pop("seconds")
    return {
        "history": tiny.figures_of(result.history),
        "journal": tiny.figures_of(tiny.journal_of(folder)),
        "plan": (folder / "plan.json").read_text(),
        "metrics": metrics,
        "weights": [value.tobytes() for value in result.model.get_weights()],
        "tflite": (folder / "model.tflite").read_bytes(),
        "candidate": [value.tobytes() for value in result.candidate.to_arrays().values()],
    }


def same_names() -> None:
    """A new process counts names from the beginning; here it finds the same machine, too."""
    keras.backend.reset_uids()
    MEASURED[0] = 0


# ------------------------------------------------------------------------------ kills


class KilledError(BaseException):
    """In place of a death: nothing catches it, and no file is touched after it."""


class Killer:
    """Counts what is done to the files of a folder, and dies at one of them.

    Args:
        folder: The folder.
        at: Which of the operations; None to count them.
        after: Whether it dies behind it. Else what was not synced yet is lost in part.
    """

    def __init__(self, folder: Path, at: int | None = None, after: bool = False):
        self._folder, self._at, self._after = os.fspath(folder), at, after
        self.seen: list[str] = []
        self._dead = False

    @contextlib.contextmanager
    def watching(self) -> Iterator[Killer]:
        with pytest.MonkeyPatch.context() as patch:
            for name in ("fsync", "replace", "unlink", "mkdir"):
                patch.setattr(os, name, self._watched(name, getattr(os, name)))
            yield self

    def _watched(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def called(first: Any, *args: Any, **kwargs: Any) -> Any:
            path = os.readlink(f"/proc/self/fd/{first}") if name == "fsync" else os.fspath(first)
            if not str(path).startswith(self._folder) or str(path).endswith(".lock"):
                return real(first, *args, **kwargs)
            if self._dead:
                raise KilledError
            self.seen.append(f"{name} {Path(path).name}")
            if len(self.seen) - 1 != self._at:
                return real(first, *args, **kwargs)
            self._dead = True
            if self._after:
                real(first, *args, **kwargs)
            elif name == "fsync":  # nothing of it, half of it, or all but the last byte
                size = os.fstat(first).st_size
                os.truncate(path, max(0, (0, size // 2, size - 1)[len(self.seen) % 3]))
            raise KilledError

        return called


def killed(run: Callable[..., Any], folder: Path, at: int, after: bool) -> str | None:
    """Runs something until it dies; says at what, or None if it got to its end."""
    killer = Killer(folder, at, after)
    with killer.watching():
        try:
            run(folder)
        except KilledError:
            return f"{'after' if after else 'at'} {killer.seen[-1]}"
    return None


def moments(kind: str, folder: Path) -> tuple[dict[str, Any], int]:
    """The bits of a run that nobody interrupts, and the number of moments to kill it at."""
    same_names()
    killer = Killer(folder)
    with killer.watching():
        result = KINDS[kind](folder)
    return bits_of(result, folder), len(killer.seen)


def kill_campaign(kinds: list[str], each: int, seed: int = 0) -> collections.Counter[str]:
    """Kills runs of every kind at some moments, resumes them, and compares."""
    counts: collections.Counter[str] = collections.Counter()
    rng = np.random.default_rng(seed)
    for kind in kinds:
        with tempfile.TemporaryDirectory() as place:
            whole, number = moments(kind, Path(place) / "whole")
            chosen = np.sort(rng.choice(number, min(each, number), replace=False)).tolist()
            for place_of, at in enumerate(chosen):
                folder = Path(place) / f"cut {at}"
                after = bool(rng.integers(2))
                same_names()
                how = killed(KINDS[kind], folder, at, after)
                again = None
                if place_of % 3 == 2:  # and once more, while it is resumed
                    same_names()
                    again = killed(KINDS[kind], folder, int(rng.integers(12)), True)
                same_names()
                try:
                    outcome = compared(bits_of(KINDS[kind](folder), folder), whole)
                except rls.RLSparsityError as error:
                    outcome = f"refused: {error}"
                except Exception:
                    outcome = f"RAW: {traceback.format_exc()}"
                print(f"{kind}: {at}/{number} {how}; {again or ''}: {outcome}", flush=True)
                counts[outcome.split(":")[0]] += 1
    return counts


def compared(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    different = [name for name in wanted if found[name] != wanted[name]]
    return f"WRONG: {different}" if different else "same"


# ------------------------------------------------------------------------------ real kills

_CHILD = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path.insert(0, {tests!r})
import rl_sparsity_tf
import interrupted_runs, plain_graphs
if {plain!r}:
    plain_graphs.use_plain_graphs()
with interrupted_runs.quick():
    interrupted_runs.KINDS[{kind!r}](interrupted_runs.Path({folder!r}), verbose=2)
print("finished", flush=True)
"""


PYTHON = [sys.executable]


def environment() -> dict[str, str]:
    """What a process needs to find the package and the tests, and TensorFlow as users have it."""
    tests = os.path.dirname(os.path.abspath(__file__))
    # The tests' own level lets through what the command keeps off the terminal.
    kept = {name: v for name, v in os.environ.items() if name != "TF_CPP_MIN_LOG_LEVEL"}
    return {
        **kept,
        "PYTHONPATH": os.pathsep.join([os.path.dirname(os.path.dirname(tests)), tests]),
    }


def child(folder: Path, kind: str) -> subprocess.Popen[str]:
    """A process of its own that searches in a folder, as this one would."""
    tests = os.path.dirname(os.path.abspath(__file__))
    plain = plain_graphs.are_used()
    code = _CHILD.format(tests=tests, folder=os.fspath(folder), kind=kind, plain=plain)
    return subprocess.Popen(
        [*PYTHON, "-c", code],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def lines_of(folder: Path) -> int:
    with contextlib.suppress(OSError):
        return (folder / "journal.jsonl").read_bytes().count(b"\n")
    return 0


def until(process: subprocess.Popen[str], folder: Path, lines: int, limit: float = 600.0) -> None:
    """Waits until a run's journal has so many lines, or the process has ended."""
    deadline = time.monotonic() + limit
    while process.poll() is None and lines_of(folder) < lines:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def sigkill_campaign(kills: int) -> collections.Counter[str]:
    counts: collections.Counter[str] = collections.Counter()
    rng = np.random.default_rng(1)
    run = KINDS["long"]
    with tempfile.TemporaryDirectory() as place:
        same_names()
        whole = bits_of(run(Path(place) / "whole"), Path(place) / "whole")
        folder = Path(place) / "cut"
        for number in range(kills):
            process = child(folder, "long")
            until(process, folder, number + 1)
            time.sleep(float(rng.uniform(0, 0.3)))
            process.kill()
            process.communicate()
            print(f"SIGKILL with {lines_of(folder)} lines: exit code {process.returncode}")
            counts["killed"] += process.returncode == -signal.SIGKILL
        same_names()
        counts[compared(bits_of(run(folder), folder), whole).split(":")[0]] += 1
    return counts


def main(arguments: list[str]) -> None:
    number = int(arguments[1]) if len(arguments) > 1 else None
    with quick():
        if arguments[0] == "kill":
            print(dict(kill_campaign(arguments[2:] or list(KINDS), number or 4)))
        else:
            print(dict(sigkill_campaign(number or 5)))


if __name__ == "__main__":
    main(sys.argv[1:])
