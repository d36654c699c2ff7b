"""The run directory: manifest, journal and checkpoints, so that nothing paid for is lost."""

from __future__ import annotations

import contextlib
import json
import os
import re
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras as keras

from rl_sparsity_tf.errors import FileExistsRLSparsityError, RunError, one_line
from rl_sparsity_tf.files import (
    LEAST_ROOM,
    check_folder,
    check_room,
    replacing,
    sha256_of,
    write_text,
    writing,
)
from rl_sparsity_tf.layers.kernels import walk
from rl_sparsity_tf.search.run_files import (
    CHECKSUM,
    FORMAT_VERSION,
    LOCK_FILE,
    UNSEALED,
    RunLock,
    differences_of,
    entry_of,
    id_of,
    read_arrays,
    read_lines,
    read_manifest,
    seal_of,
    sealed,
    short,
    versions,
    write_arrays,
)


def model_fingerprint(model: keras.Model) -> str:
    """SHA-256 of a model's layers and weights, whatever Keras named them in this process."""
    chunks = []
    for _, layer in walk(model):
        chunks.append(type(layer).__name__.encode())
        for value in layer.get_weights():
            chunks += [f"{value.shape} {value.dtype}".encode(), value.tobytes()]
    return sha256_of(*chunks)


def bytes_of(model: keras.Model) -> int:
    """Bytes of a model's weights: what its run will write at least."""
    weights = model.weights if model.built else []
    return sum(weight.shape.num_elements() * weight.dtype.size for weight in weights)


def data_fingerprint(batches: Iterable[Any]) -> str:
    """SHA-256 of batches of tensors."""
    return sha256_of(*_chunks(batches))


def _chunks(batches: Iterable[Any]) -> Iterator[Any]:
    for part in tf.nest.flatten(list(batches)):
        if part is not None:
            array = np.ascontiguousarray(part)
            yield f"{array.shape} {array.dtype}".encode()
            yield array.reshape(-1).view(np.uint8)  # no copy


class RunDirectory:
    """One run's folder.

    Making the object only looks, so that a folder in the way is refused before any work; nothing is
    written or removed before [start][], but the lock of a run that is there. It is held until
    [close][], or the end of the `with` statement.

    The folder is made if it is missing; its parent must exist. An unfinished run of equal arguments
    (what the run was called with, as JSON gives it back) is continued; `resumed` says so.
    `fingerprints` are those of the model and the data, and descriptions of them as JSON.
    `overwrite` is whether a finished run, or one with other arguments, may be replaced;
    `any_versions`, whether a run that was begun with other versions of libraries, or on another
    kind of machine, may be continued. `sealed` is whether its lines and checkpoints have checksums,
    which runs of format 1 have not.

    Raises ArgumentError if the path is a file or its parent is missing, FileExistsRLSparsityError
    if the folder holds something else, and RunError if its files are damaged, another process uses
    it, or it was begun with other versions.

    Example:
        >>> with RunDirectory("run", {"seed": 0}, {"model": model_fingerprint(model)}) as run:
        ...     run.start()
        ...     run.append({"episode": 0})
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        arguments: Mapping[str, Any],
        fingerprints: Mapping[str, Any],
        overwrite: bool = False,
        *,
        any_versions: bool = False,
    ):
        self.path = Path(path)
        check_directory(self.path)
        self._journal = self.path / "journal.jsonl"
        self._checkpoints = self.path / "checkpoints"
        self._wanted = json.loads(
            json.dumps({"arguments": arguments, "fingerprints": fingerprints})
        )
        self.arguments: dict[str, Any] = self._wanted["arguments"]
        self._id = uuid.uuid4().hex
        self.sealed = True
        self.any_versions = any_versions
        self._lock = RunLock(self.path)
        self.resumed = False
        self._begun = _holds_anything(self.path)
        if self._begun:
            _check_is_run(self.path)
            _check_places(self._checkpoints, self._journal)
            self._lock.acquire()
            try:
                self.resumed = self._continues(self._wanted, overwrite)
            except BaseException:
                self.close()
                raise
        self._seal = ""  # of the journal's last line

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets others use the folder."""
        self._lock.release()

    def _continues(self, wanted: Mapping[str, Any], overwrite: bool) -> bool:
        if overwrite:
            return False
        try:
            found = read_manifest(self.path / "manifest.json")
            version = found["format_version"]
            known = version in (FORMAT_VERSION, UNSEALED)
            is_sealed = version != UNSEALED
            differences = differences_of(found, wanted, is_sealed) if known else []
            identity = id_of(found, is_sealed) if known else ""
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise RunError(
                f"The manifest in {str(self.path)!r} cannot be read ({one_line(error)}). Choose "
                "another folder, or pass overwrite=True to start the run again."
            ) from error
        _check_is_unfinished(self.path)
        if not known or differences:
            what = ", ".join(differences) or f"format_version {version!r}"
            raise FileExistsRLSparsityError(
                f"The folder {str(self.path)!r} holds an unfinished run that differs in {what}. "
                "Call with the same arguments to continue it, choose another folder, or pass "
                "overwrite=True to replace it."
            )
        self.sealed, self._id = is_sealed, identity
        if not self.any_versions:
            self._check_versions(found["versions"])
        return True

    def _check_versions(self, before: Mapping[str, Any]) -> None:
        now = versions()
        changed = [
            f"{name} ({short(before.get(name))}, now {short(now[name])})"
            for name in now
            if before.get(name) != now[name] and (name in before or self.sealed)
        ]
        if changed:
            raise RunError(
                f"The folder {str(self.path)!r} holds an unfinished run that was begun with other "
                f"versions: {', '.join(changed)}. Continued with these it would not end in the "
                "same bits. Go back to those to continue it, pass any_versions=True to go on all "
                "the same, choose another folder, or pass overwrite=True to replace it."
            )

    def start(self) -> None:
        """Makes the folder ready for writing; a run that is continued keeps what it has.

        Raises RunError if another process has begun a run there in the meantime, and FileError if
        the system does not let files be written there.
        """
        with writing(self.path):
            if not self._begun:
                self.path.mkdir(exist_ok=True)
                self._lock.acquire()
                if _holds_anything(self.path):
                    raise RunError(
                        f"Another process has just begun to write to {str(self.path)!r}. Choose "
                        "another folder, or call again when it has ended."
                    )
            for path in self.path.iterdir():
                if _is_leftover(path.name):
                    path.unlink(missing_ok=True)
            if not self.resumed:
                self._clear()
            self._checkpoints.mkdir(exist_ok=True)
            # Before an episode is paid for that could not be written down.
            with open(self._journal, "a", encoding="utf-8"):
                check_room(self._checkpoints)

    def _clear(self) -> None:
        # First what a run is continued from, so that nothing is ever continued from a mixture.
        (self._checkpoints / f"{LATEST}.npz").unlink(missing_ok=True)
        self.drop_checkpoints(keep=set())
        for old in (*RESULT_FILES, *OPTIONAL_FILES, "journal.jsonl"):
            (self.path / old).unlink(missing_ok=True)
        manifest = {
            "format_version": FORMAT_VERSION,
            "id": self._id,
            **self._wanted,
            "versions": versions(),
        }
        write_text(self.path / "manifest.json", json.dumps(manifest, indent=2) + "\n")
        # After the manifest: a folder that holds anything must say whose it is.
        self._checkpoints.mkdir(exist_ok=True)
        self._journal.touch()

    def manifest(self) -> dict[str, Any]:
        """What the run was begun with, and with which versions."""
        try:
            return read_manifest(self.path / "manifest.json")
        except (OSError, ValueError, RecursionError):  # removed or spoilt meanwhile
            return {**self._wanted, "versions": versions()}

    # ------------------------------------------------------------------ the journal

    def append(self, entry: Mapping[str, Any]) -> None:
        """Adds a line to the journal; it is on the disk when this returns."""
        line = json.dumps(entry)
        if self.sealed:
            line, self._seal = sealed(entry, self._before(self._seal))
        with writing(self._journal), open(self._journal, "a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())

    def read_journal(self, episodes: int) -> list[dict[str, Any]]:
        """Reads the first episodes' lines and forgets what is behind them.

        Lines behind the last checkpoint (a torn last line among them) are of work that will be done
        again. Raises RunError if the lines of those episodes are damaged; it names the first that
        is, and what is whole.
        """
        try:
            lines = read_lines(self._journal, episodes) if episodes else []
        except OSError as error:
            raise self._damaged(f"{one_line(error)}") from error
        entries: list[dict[str, Any]] = []
        faults: dict[int, str] = {}
        seal = ""
        for number, line in enumerate(lines):
            try:
                entries.append(entry_of(line, self._before(seal) if self.sealed else None))
                if entries[-1].get("episode") != number:
                    raise ValueError(f"it is not of episode {number + 1}")
            except ValueError as error:
                faults[number] = str(error)
            seal = seal_of(line)
        if len(lines) < episodes:
            faults[len(lines)] = "it is missing"
        if faults:
            first = min(faults)
            whole = [n + 1 for n in range(len(lines)) if n not in faults]
            raise self._damaged(
                f"line {first + 1} of {episodes}: {faults[first]}; {_spans(whole)} whole, and "
                f"{self._saved(episodes)}"
            )
        text = b"".join(line.removesuffix(b"\n") + b"\n" for line in lines)
        with replacing(self._journal) as temporary:
            temporary.write_bytes(text)
        self._seal = seal
        return entries

    def played(self) -> list[dict[str, Any]]:
        """The lines of the episodes that need not be played again, before they are checked.

        There are none where something cannot be read, which those who need it say.
        """
        with contextlib.suppress(RunError, OSError, KeyError, TypeError, ValueError):
            state = self.load_checkpoint(LATEST) if self.resumed else None
            if state is not None:
                lines = read_lines(self._journal, int(state["episodes"]))
                entries = [entry_of(line, None) for line in lines]
                return [{k: v for k, v in one.items() if k != CHECKSUM} for one in entries]
        return []

    def _before(self, seal: str) -> str:
        # So that no line of another run is taken for one of this.
        return f"{self._id} {seal}"

    def _damaged(self, how: str) -> RunError:
        return RunError(
            f"The journal in {str(self.path)!r} is damaged ({how}). Put a copy of journal.jsonl "
            "back, or pass overwrite=True to start the run again."
        )

    def _saved(self, episodes: int) -> str:
        """What is there beside the journal, in words."""
        plans = [path.stem for path in self._files() if path.stem.startswith("finalist-")]
        return f"checkpoints hold the agent after {episodes} episodes and {len(plans)} of its plans"

    # ------------------------------------------------------------------ checkpoints

    def _files(self) -> list[Path]:
        try:
            return sorted(self._checkpoints.glob("*.npz"))
        except OSError:
            return []

    def has_checkpoint(self, name: str) -> bool:
        """Whether a checkpoint is there."""
        return (self._checkpoints / f"{name}.npz").exists()

    def save_checkpoint(self, name: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Writes arrays as `checkpoints/name.npz`, in one step."""
        write_arrays(self._checkpoints / f"{name}.npz", arrays, self._seal_of(name))

    def load_checkpoint(self, name: str) -> dict[str, np.ndarray] | None:
        """Reads the arrays of a checkpoint; None if there is none.

        Raises RunError if the file is damaged, or is not this run's.
        """
        path = self._checkpoints / f"{name}.npz"
        try:
            return read_arrays(path, self._seal_of(name)) if os.path.lexists(path) else None
        except (OSError, ValueError) as error:
            raise self.unreadable(name, one_line(error)) from error

    def unreadable(self, name: str, why: str) -> RunError:
        """The error of a checkpoint that cannot be read; it quotes why."""
        path = self._checkpoints / f"{name}.npz"
        return RunError(
            f"The checkpoint {str(path)!r} cannot be read ({why}). Put a copy of it back, or pass "
            "overwrite=True to start the run again."
        )

    def _seal_of(self, name: str) -> str | None:
        # So that no file of another run, or by another name, is taken for this one.
        return f"{self._id} {name}" if self.sealed else None

    def drop_checkpoints(self, keep: set[str]) -> None:
        """Removes all checkpoints but some."""
        for path in self._checkpoints.glob("*.npz"):
            if path.stem not in keep:
                with writing(path):
                    path.unlink()

    def begin_again(self) -> None:
        """Forgets the episodes of a run whose checkpoints are gone: they are played again."""
        self.drop_checkpoints(keep={TIMES})
        self.read_journal(0)


LATEST = "latest"
"""The checkpoint that a run is continued from."""
TRIALS = "trials"
"""The checkpoint of what trials of a search over sizes came to; kept to the end."""
TIMES = "times"
"""The checkpoint of the layers' times that were measured before the search; kept to the end."""
RESULT_FILES = (
    *("model.keras", "model.tflite", "plan.json", "metrics.json", "history.csv"),
    *("details.json", "report.html"),
)
"""What a finished run adds to its folder."""
OPTIONAL_FILES = ("model.recipe.json", "channels.json")
"""What it adds if there is such a thing."""


def check_directory(path: str | os.PathLike[str], room: int = LEAST_ROOM) -> Path:
    """Raises unless a folder exists or can be made at `path`, with room for so many bytes."""
    return check_folder(path, room)


def check_unfinished(path: str | os.PathLike[str]) -> None:
    """Raises unless a run can begin or go on in a folder, as far as its arguments allow it.

    Raises ArgumentError if no folder can be made there, FileExistsRLSparsityError if it holds a
    finished run or something else, and RunError if another process uses it.
    """
    folder = check_directory(path)
    if _holds_anything(folder):
        _check_is_run(folder)
        _check_is_unfinished(folder)
        check_free(folder)


def check_free(folder: Path) -> None:
    """Raises RunError if another process, named if known, is at work in a run's folder."""
    if (folder / "manifest.json").is_file():
        lock = RunLock(folder)
        lock.acquire()
        lock.release()


def _check_is_run(folder: Path) -> None:
    if not (folder / "manifest.json").is_file():
        # Never delete what is not ours, not even when asked to overwrite.
        raise FileExistsRLSparsityError(
            f"The folder {str(folder)!r} is not empty and holds no run of this package. "
            "Choose another folder, or empty it."
        )


def _check_places(checkpoints: Path, journal: Path) -> None:
    for path, what in ((checkpoints, "folder"), (journal, "file")):
        right = path.is_dir() if what == "folder" else path.is_file()
        if os.path.lexists(path) and not right:
            raise RunError(
                f"{str(path)!r} is no {what}, as a run has there. Remove it, or choose another "
                "folder for the run."
            )


def _check_is_unfinished(folder: Path) -> None:
    if (folder / "metrics.json").exists():
        raise FileExistsRLSparsityError(
            f"The folder {str(folder)!r} holds a finished run. Choose another folder, or "
            "pass overwrite=True to replace it."
        )


_LEFTOVER = re.compile(
    r"\.try-[0-9a-f]{16}|"
    r"\.(?:manifest|journal|model|model\.recipe|plan|channels|history|metrics|details|report)"
    r"-(?:[0-9a-f]{16}|\w{8})\.\w+"
)


def _is_leftover(name: str) -> bool:
    """Whether a file is what a process that was killed had begun to write."""
    return _LEFTOVER.fullmatch(name) is not None


def _holds_anything(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    return any(path.name != LOCK_FILE and not _is_leftover(path.name) for path in folder.iterdir())


def _spans(numbers: list[int]) -> str:
    """`"lines 1 to 2 and 4 are"`, for `[1, 2, 4]`."""
    if not numbers:
        return "no line is"
    known = set(numbers)
    starts = [n for n in numbers if n - 1 not in known]
    ends = [n for n in numbers if n + 1 not in known]
    spans = [f"{a}" if a == b else f"{a} to {b}" for a, b in zip(starts, ends, strict=True)]
    text = " and ".join(filter(None, [", ".join(spans[:-1]), spans[-1]]))
    return f"line {text} is" if len(numbers) == 1 else f"lines {text} are"
