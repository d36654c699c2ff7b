"""Runs that are killed and run directories that are damaged: machinery, and the whole campaign.

As a script it goes through everything and prints figures, which takes a while:

    python tests/interrupted_runs.py kill      # kills searches of every kind, and resumes them
    python tests/interrupted_runs.py mutate 1000
    python tests/interrupted_runs.py sigkill 5
"""

from __future__ import annotations

import collections
import contextlib
import functools
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import rl_sparsity_tf  # noqa: F401  (before anything touches tf.keras)

import numpy as np
import pytest
import test_channel_search as channels
import tf_keras as keras
import tiny_search as tiny

import rl_sparsity_tf as rls
from rl_sparsity_tf import accuracy_search, decision_choice
from rl_sparsity_tf import search as search_module
from rl_sparsity_tf.accuracy_search import AccuracySearch
from rl_sparsity_tf.checkpoint_files import read_arrays, write_arrays
from rl_sparsity_tf.run_directory import RunDirectory
from rl_sparsity_tf.search_loop import SearchLoop
from rl_sparsity_tf.timing import FileTiming, Timing

# ------------------------------------------------------------------------------ kinds of runs


def _tiny(agent: Any, **options: Any) -> Callable[..., rls.Result]:
    episodes = options.pop("episodes", 4)

    def run(folder: Path, **more: Any) -> rls.Result:
        one = tiny.compressor(tiny.trained(), agent, directory=folder, **options)
        return tiny.search(one, episodes=episodes, finetune_epochs=1, **more)

    return run


def _wide(target: rls.Target, agent: Any = "random", **options: Any) -> Callable[..., rls.Result]:
    def run(folder: Path, **more: Any) -> rls.Result:
        one = tiny.compressor(tiny.wide(), agent, target=target, directory=folder, **options)
        arguments = {"train": tiny.WIDE_TRAIN, "validation_data": tiny.WIDE_VALIDATION, **more}
        return tiny.search(one, episodes=4, finetune_epochs=1, **arguments)

    return run


def _channels(target: rls.Target, agent: Any = "random") -> Callable[..., rls.Result]:
    def run(folder: Path, **more: Any) -> rls.Result:
        one = channels.compressor(target, agent=agent, directory=folder)
        return channels.searched(one, episodes=3, finetune_epochs=1, finalists=2, **more)

    return run


STAGED = rls.Staged(stages=(0.5, 1.0))
KINDS: dict[str, Callable[..., rls.Result]] = {
    "plain": _tiny(tiny.DQN),
    "ppo": _tiny(
        rls.PPO(hidden_layers=(8,), num_epochs=2, episodes_per_update=2),
        recovery="least_squares",
        warm_start=False,
    ),
    "hierarchy": _tiny(tiny.DQN, hierarchy=True, recovery="least_squares"),
    "curriculum": _tiny("random", curriculum=STAGED, recovery="least_squares"),
    "bytes": _wide(rls.Target(tflite_bytes=5000), recovery="least_squares"),
    "accuracy drop": _wide(rls.Target(max_accuracy_drop=0.1), recovery="none"),
    "macs": _channels(rls.Target(macs=0.4)),
    "latency": _channels(rls.Target(latency=0.5)),
}


@contextlib.contextmanager
def quick() -> Iterator[None]:
    """Three trials of sizes; and times that are never twice the same, as measured ones are."""
    drawn = np.random.default_rng(0)

    def measured(model: keras.Model, quantization: str) -> rls.LatencyTable:
        table = channels.table_for(model, quantization)
        for layer in table.layers.values():
            times = layer.ms * drawn.uniform(0.5, 2.0, layer.ms.shape)
            object.__setattr__(layer, "ms", times)
        return table

    def timed(path: Any, against: Any, **_: Any) -> Timing:
        """A file's time goes by its size: this has to be the same again."""
        times = [os.path.getsize(one) / 1e4 for one in (path, against)]
        file, dense = (
            FileTiming(path=str(one), samples_ms=(ms,) * 5)
            for one, ms in zip((path, against), times, strict=True)
        )
        return Timing(file=file, against=dense, threads=1, xnnpack=True, batch_size=1)

    with tiny.quick_search(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(accuracy_search, "MOST_TRIALS", 3)
        patch.setattr(decision_choice, "measure_latency", measured)
        patch.setattr("rl_sparsity_tf.channel_finishing.benchmark_tflite", timed)
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
    """A new process counts names from the beginning."""
    keras.backend.clear_session()


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
import interrupted_runs
with interrupted_runs.quick():
    interrupted_runs.sigkilled_run(interrupted_runs.Path({folder!r}), verbose=2)
print("finished", flush=True)
"""


def sigkilled_run(folder: Path, **more: Any) -> rls.Result:
    return _tiny(tiny.DQN, episodes=8)(folder, **more)


def child(folder: Path) -> subprocess.Popen[str]:
    """A process of its own that searches in a folder."""
    tests = os.path.dirname(os.path.abspath(__file__))
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join([os.path.dirname(tests), tests])
    return subprocess.Popen(
        [sys.executable, "-c", _CHILD.format(tests=tests, folder=os.fspath(folder))],
        env=environment,
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
    with tempfile.TemporaryDirectory() as place:
        same_names()
        whole = bits_of(sigkilled_run(Path(place) / "whole"), Path(place) / "whole")
        folder = Path(place) / "cut"
        for number in range(kills):
            process = child(folder)
            until(process, folder, number + 1)
            time.sleep(float(rng.uniform(0, 0.3)))
            process.kill()
            process.communicate()
            print(f"SIGKILL with {lines_of(folder)} lines: exit code {process.returncode}")
            counts["killed"] += process.returncode == -signal.SIGKILL
        same_names()
        counts[compared(bits_of(sigkilled_run(folder), folder), whole).split(":")[0]] += 1
    return counts


# ------------------------------------------------------------------------------ mutations


class Bench:
    """A run of a kind, stopped after some episodes, that is resumed quickly and often.

    Everything but the reading of the folder is made once: the network, and what a search of sizes
    is about.

    Args:
        kind: Of the run.
        place: A folder to work in.
        episodes: Episodes before it stops.
    """

    def __init__(self, kind: str, place: Path, episodes: int = 2):
        self.folder, self.work = place / "base", place / "work"
        self.others = [place / "again", place / "another"]
        made: dict[str, Any] = {}

        def caught(self: SearchLoop, *args: Any, **kwargs: Any) -> None:
            real(self, *args, **kwargs)
            made.setdefault("loop", self)

        def opened(self: RunDirectory, *args: Any, **kwargs: Any) -> None:
            made.setdefault("run", (args, kwargs))
            begun(self, *args, **kwargs)

        def tried(self: AccuracySearch, *args: Any, **kwargs: Any) -> None:
            made.setdefault("sizes", (args, kwargs))
            sizes(self, *args, **kwargs)

        real, begun, sizes = SearchLoop.__init__, RunDirectory.__init__, AccuracySearch.__init__
        for folder, seed in zip((self.folder, *self.others), (0, 0, 1), strict=True):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(SearchLoop, "__init__", caught)
                patch.setattr(RunDirectory, "__init__", opened)
                patch.setattr(AccuracySearch, "__init__", tried)
                patch.setattr(SearchLoop, "_episode", _stopping(SearchLoop._episode, episodes))
                same_names()
                with _seeded(seed), pytest.raises(tiny.StoppedError):
                    KINDS[kind](folder)
        self._loop, self._run, self._sizes = made["loop"], made["run"], made.get("sizes")
        self._full = self._loop.network.budget
        self.whole = self.resumed(self.folder)

    def resumed(self, folder: Path) -> dict[str, Any]:
        """What a resumed run comes to, up to its last episode; or its error."""
        args, kwargs = self._run
        loop, network = self._loop, self._loop.network
        network.reset()
        if network.budget is not self._full:
            network.retarget(self._full)
        network.seen, network.decisions.by_magnitude = set(), False
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.copytree(folder, self.work, symlinks=True)
        with RunDirectory(self.work, *args[1:], **kwargs) as run:
            run.start()
            again = SearchLoop(loop._settings, network, run)
            found: dict[str, Any] = {}
            progress = search_module.SearchProgress(run.arguments["episodes"], "accuracy", 0)
            if self._sizes is not None:
                values, options = self._sizes
                sizes = AccuracySearch(*values[:2], again, run, *values[4:], **options)
                count = min(accuracy_search.MOST_TRIALS, run.arguments["episodes"])
                sizes._resume([run.arguments["episodes"] * n // count for n in range(count + 1)])
                best = sizes._best.to_arrays() if sizes._best else {}
                found["trials"] = [repr(one) for one in sizes.trials], _raw(best)
                found["others"] = [(name, plan.to_json()) for name, plan in sizes._others]
                found["finalists"] = [_raw(one.to_arrays()) for one in again.finalists]
                found["state"] = _raw(again.episodes.get_state())
            else:
                again.run(run.arguments["episodes"], progress)
                found["finalists"] = [_raw(one.to_arrays()) for one in again.finalists]
                found["state"] = _raw(again.episodes.get_state())
                found["proposed"] = [(name, plan.to_json()) for name, plan in again.proposed]
            found["history"] = tiny.figures_of(again.history)
            found["seen"] = sorted(network.seen)
        return found


def _raw(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    return {key: (str(v.dtype), v.shape, v.tobytes()) for key, v in arrays.items()}


def _stopping(real: Callable[..., Any], episodes: int) -> Callable[..., Any]:
    def episode(self: SearchLoop, number: int) -> Any:
        if number >= episodes:
            raise tiny.StoppedError
        return real(self, number)

    return episode


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        real = rls.Compressor.__init__
        patch.setattr(
            rls.Compressor, "__init__", functools.partialmethod(_with_seed, real=real, seed=seed)
        )
        yield


def _with_seed(self: Any, *args: Any, real: Any, seed: int, **kwargs: Any) -> None:
    real(self, *args, **{**kwargs, "seed": seed})


def as_format_1(folder: Path) -> None:
    """Turns a run into what the version before checksums wrote."""
    manifest = json.loads((folder / "manifest.json").read_text())
    seal = manifest.pop("id")
    manifest["format_version"] = 1
    for name in ("batch_size", "latency_table"):
        manifest["arguments"].pop(name)
    for name in ("architecture", "compiled"):
        manifest["fingerprints"].pop(name)
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    entries = tiny.journal_of(folder)
    (folder / "journal.jsonl").write_text("".join(json.dumps(one) + "\n" for one in entries))
    for path in (folder / "checkpoints").glob("*.npz"):
        write_arrays(path, read_arrays(path, f"{seal} {path.stem}"), None)


Mutation = Callable[[Path, np.random.Generator, list[Path]], str]


def _any_file(folder: Path, rng: np.random.Generator, suffix: str = "") -> Path:
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name.endswith(suffix))
    return files[int(rng.integers(len(files)))]


def flip_a_bit(folder: Path, rng: np.random.Generator, others: list[Path]) -> str:
    path = _any_file(folder, rng)
    content = bytearray(path.read_bytes())
    for _ in range(int(rng.integers(1, 4)) if content else 0):
        content[int(rng.integers(len(content)))] ^= 1 << int(rng.integers(8))
    path.write_bytes(content)
    return path.name


def cut_off(folder: Path, rng: np.random.Generator, others: list[Path]) -> str:
    path = _any_file(folder, rng)
    os.truncate(path, int(rng.integers(path.stat().st_size + 1)))
    return path.name


def overwrite_a_stretch(folder: Path, rng: np.random.Generator, others: list[Path]) -> str:
    path = _any_file(folder, rng)
    content = bytearray(path.read_bytes())
    start = int(rng.integers(len(content) + 1))
    filling = (b"\0" * 64, rng.bytes(64), b"\x1b]0;title\x07" * 4)[int(rng.integers(3))]
    content[start : start + int(rng.integers(64))] = filling
    path.write_bytes(content)
    return path.name


def lose(folder: Path, rng: np.random.Generator, others: list[Path]) -> str:
    paths = sorted(folder.rglob("*"))
    path = paths[int(rng.integers(len(paths)))]
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    return path.name


def put_something_in_its_place(folder: Path, rng: np.random.Generator, others: list[Path]) -> str:
    paths = sorted(folder.rglob("*"))
    path = paths[int(rng.integers(len(paths)))]
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    what = int(rng.integers(5))
    if what == 0:
        path.mkdir()
    elif what == 1:
        path.symlink_to("/nowhere/at/all")
    elif what == 2:
        path.symlink_to(path.name)  # to itself
    elif what == 3:
        path.write_bytes(b"")
    else:
        path.write_bytes(rng.bytes(int(rng.integers(1, 2000))))
    return f"{path.name} {what}"


def add_something(folder: Path, rng: np.random.Generator, others: list[Path]) -> str:
    names = [".lock", "metrics.json", ".manifest-abcdefgh.json", "notes.txt", "model.keras"]
    names += ["checkpoints/finalist-9-dqn.npz", "checkpoints/.latest-abcd.npz", "plan.json"]
    path = folder / names[int(rng.integers(len(names)))]
    if rng.integers(2):
        path.mkdir()
    else:
        path.write_bytes(rng.bytes(20))
    return path.name


def take_anothers(folder: Path, rng: np.random.Generator, others: list[Path]) -> str:
    path = _any_file(folder, rng)
    other = others[int(rng.integers(len(others)))] / path.relative_to(folder)
    if not other.exists():  # a plan of another name
        other = _any_file(other.parent, rng, ".npz")
    shutil.copy(other, path)
    return f"{path.name} from {other.parent.name}"


def swap_files(folder: Path, rng: np.random.Generator, others: list[Path]) -> str:
    one, other = _any_file(folder, rng, ".npz"), _any_file(folder, rng)
    contents = one.read_bytes(), other.read_bytes()
    one.write_bytes(contents[1])
    other.write_bytes(contents[0])
    return f"{one.name} {other.name}"


_VALUES = [
    None,
    True,
    -1,
    0,
    3,
    10**9,
    10**400,
    1e300,
    float("nan"),
    "",
    "x",
    [],
    {},
    [[]],
    "\x1b[2J",
]


def _changed_json(value: Any, rng: np.random.Generator) -> Any:
    """One place of a document changed."""
    inside = isinstance(value, dict | list) and len(value) > 0 and rng.random() < 0.85
    if not inside:
        return _VALUES[int(rng.integers(len(_VALUES)))]
    keys = list(value) if isinstance(value, dict) else range(len(value))
    key = keys[int(rng.integers(len(keys)))]
    value = dict(value) if isinstance(value, dict) else list(value)
    if rng.random() < 0.15:
        del value[key]
    else:
        value[key] = _changed_json(value[key], rng)
    return value


def change_the_manifest(folder: Path, rng: np.random.Generator, others: list[Path]) -> str:
    path = folder / "manifest.json"
    path.write_text(json.dumps(_changed_json(json.loads(path.read_text()), rng)))
    return path.name


def change_the_journal(folder: Path, rng: np.random.Generator, others: list[Path]) -> str:
    path = folder / "journal.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    at, what = int(rng.integers(len(lines))), int(rng.integers(7))
    if what == 0:
        del lines[at]
    elif what == 1:
        lines.insert(at, lines[at])
    elif what == 2:
        lines.reverse()
    elif what == 3:
        lines[at] = json.dumps(_changed_json(json.loads(lines[at]), rng)) + "\n"
    elif what == 4:
        lines[at] = lines[at].replace("0.", "1.", 1)
    elif what == 5:
        lines[at] = "[" * 100_000 + "\n"
    else:
        lines[at] = "\n" + lines[at]
    path.write_text("".join(lines))
    return f"{path.name} {what}"


_STRANGE = {
    "NaN": lambda a: np.full(a.shape, np.nan, np.float32),
    "huge": lambda a: np.full(a.shape, 2**62, np.int64),
    "negative": lambda a: np.full(a.shape, -5, np.int64),
    "one more axis": lambda a: a[None],
    "longer": lambda a: np.concatenate([np.atleast_1d(a)] * 2),
    "empty": lambda a: np.atleast_1d(a)[:0],
    "text": lambda a: np.array("x" * 50),
    "upside down": lambda a: np.ascontiguousarray(np.atleast_1d(a)[::-1]),
    "other numbers": lambda a: a + 1 if a.dtype.kind in "if" else a,
    "complex": lambda a: np.zeros(a.shape, np.complex64),
    "objects": lambda a: np.array([{"a": 1}], object),
}


def change_a_checkpoint(
    folder: Path, rng: np.random.Generator, others: list[Path], seal: bool = False
) -> str:
    path = _any_file(folder, rng, ".npz")
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    names = [name for name in arrays if name != "checksum"]
    name, how = names[int(rng.integers(len(names)))], "lost"
    if rng.random() < 0.15:
        del arrays[name]
    else:
        how = list(_STRANGE)[int(rng.integers(len(_STRANGE) - seal))]
        arrays[name] = _STRANGE[how](arrays[name])
    if seal and arrays.pop("checksum", None) is not None:
        identity = json.loads((folder / "manifest.json").read_text())["id"]
        write_arrays(path, arrays, f"{identity} {path.stem}")
    else:
        np.savez(path, **arrays)
    return f"{path.name}: {name} {how}"


def forge_a_checkpoint(folder: Path, rng: np.random.Generator, others: list[Path]) -> str:
    """With a right checksum: nobody can tell that its values are others."""
    return change_a_checkpoint(folder, rng, others, seal=True)


def make_a_bomb(folder: Path, rng: np.random.Generator, others: list[Path]) -> str:
    path = _any_file(folder, rng, ".npz")
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (%d,), }"
    what = int(rng.integers(3))
    with zipfile.ZipFile(
        path, "w", zipfile.ZIP_DEFLATED if what else zipfile.ZIP_STORED
    ) as archive:
        text = header % (10 ** int(rng.integers(9, 15)))
        text += b" " * (63 - (len(text) + 10) % 64) + b"\n"
        body = b"" if what == 0 else b"\0" * 20_000_000
        magic = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little")
        archive.writestr("episodes.npy", magic + text + body)
    return f"{path.name} {what}"


def lose_checkpoints(folder: Path, rng: np.random.Generator, others: list[Path]) -> str:
    shutil.rmtree(folder / "checkpoints")
    return "checkpoints"


MUTATIONS: list[Mutation] = [
    flip_a_bit,
    cut_off,
    overwrite_a_stretch,
    lose,
    put_something_in_its_place,
    add_something,
    take_anothers,
    swap_files,
    change_the_manifest,
    change_the_journal,
    change_a_checkpoint,
    forge_a_checkpoint,
    make_a_bomb,
    lose_checkpoints,
]


def mutated(
    bench: Bench, mutation: Mutation, rng: np.random.Generator, place: Path, old: bool = False
) -> tuple[str, str]:
    """Damages a copy of a run and resumes it: what was done, and what came of it."""
    folder = place / "mutated"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(bench.folder, folder)
    if old:
        as_format_1(folder)
    what = f"{mutation.__name__} {mutation(folder, rng, bench.others)}"
    same_names()
    try:
        outcome = compared(bench.resumed(folder), bench.whole)
    except rls.RLSparsityError as error:
        outcome = f"refused: {type(error).__name__}: {error}"
    except Exception:
        outcome = f"RAW: {traceback.format_exc()}"
    if outcome.startswith("WRONG") and (mutation is forge_a_checkpoint or old):
        outcome = outcome.replace("WRONG", "forged")
    return what, outcome


def mutate_campaign(count: int, seed: int = 0) -> collections.Counter[str]:
    counts: collections.Counter[str] = collections.Counter()
    shares = {"curriculum": 0.5, "plain": 0.15, "ppo": 0.1, "hierarchy": 0.1, "accuracy drop": 0.15}
    for kind, share in shares.items():
        with tempfile.TemporaryDirectory() as place:
            bench = Bench(kind, Path(place))
            rng = np.random.default_rng([seed, len(kind)])
            cycle = itertools.cycle(MUTATIONS)
            for number in range(round(count * share)):
                old = number % 5 == 4
                mutation = next(cycle)
                if old and mutation is forge_a_checkpoint:
                    mutation = change_a_checkpoint
                what, outcome = mutated(bench, mutation, rng, Path(place), old)
                word = outcome.split(":")[0]
                counts[word] += 1
                if word in ("WRONG", "RAW", "forged"):
                    print(f"{kind} {'format 1 ' if old else ''}{what}: {outcome}", flush=True)
            print(kind, dict(counts), flush=True)
    return counts


def main(arguments: list[str]) -> None:
    command, number = arguments[0], int(arguments[1]) if len(arguments) > 1 else None
    with quick():
        if command == "kill":
            print(dict(kill_campaign(arguments[2:] or list(KINDS), number or 4)))
        elif command == "mutate":
            print(dict(mutate_campaign(number or 1000)))
        else:
            print(dict(sigkill_campaign(number or 5)))


if __name__ == "__main__":
    main(sys.argv[1:])
