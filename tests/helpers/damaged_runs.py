"""Run directories that are damaged: machinery, and the whole campaign.

As a script it damages many and prints what came of it, which takes a while:

    python tests/helpers/damaged_runs.py 1000
"""

from __future__ import annotations

import collections
import contextlib
import functools
import itertools
import json
import os
import shutil
import sys
import tempfile
import traceback
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import rl_sparsity_tf  # noqa: F401

import numpy as np
import pytest
import tiny_search as tiny
from interrupted_runs import KINDS, compared, quick, same_names

import rl_sparsity_tf as rls
from rl_sparsity_tf.search import accuracy_search
from rl_sparsity_tf.search import compressor as search_module
from rl_sparsity_tf.search.accuracy_search import AccuracySearch
from rl_sparsity_tf.search.loop import SearchLoop
from rl_sparsity_tf.search.run_directory import RunDirectory
from rl_sparsity_tf.search.run_files import write_arrays


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
                # How a trial is fine-tuned makes no difference to what is in the folder.
                untrained = {"finetune_epochs": 0} if kind == "accuracy drop" else {}
                with _seeded(seed), pytest.raises(tiny.StoppedError):
                    KINDS[kind](folder, **untrained)
        self._loop, self._run, self._sizes = made["loop"], made["run"], made.get("sizes")
        self._full = self._loop.network.budget
        self.whole = self.resumed(self.folder)

    def resumed(self, folder: Path) -> dict[str, Any]:
        """What a resumed run comes to, up to its last episode; nothing if it begins again."""
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
            again = SearchLoop(loop.settings, network, run)
            found: dict[str, Any] = {}
            progress = search_module.SearchProgress(run.arguments["episodes"], "accuracy", 0)
            if self._sizes is not None:
                values, options = self._sizes
                sizes = AccuracySearch(values[0], again, run, *values[3:], **options)
                count = min(accuracy_search.MOST_TRIALS, run.arguments["episodes"])
                sizes._resume([run.arguments["episodes"] * n // count for n in range(count + 1)])
                best = sizes._best.to_arrays() if sizes._best else {}
                found["trials"] = [repr(one) for one in sizes.trials], _raw(best)
                found["others"] = [(name, plan.to_json()) for name, plan in sizes._others]
                found["finalists"] = [_raw(one.to_arrays()) for one in again.finalists]
                found["state"] = _raw(again.episodes.get_state())
                if not again.done and not sizes.trials:
                    return {}  # it begins again, which takes a search
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
        tiny.strip_seals(folder)
    what = f"{mutation.__name__} {mutation(folder, rng, bench.others)}"
    same_names()
    try:
        outcome = compared(bench.resumed(folder) or bench.whole, bench.whole)
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


if __name__ == "__main__":
    with quick():
        print(dict(mutate_campaign(int(sys.argv[1]))))
