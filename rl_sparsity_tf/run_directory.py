"""The run directory: manifest, journal and checkpoints, so that nothing paid for is lost."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras as keras

from rl_sparsity_tf.errors import FileExistsRLSparsityError, RunError
from rl_sparsity_tf.files import (
    LEAST_ROOM,
    check_folder,
    check_room,
    replacing,
    sha256_of,
    write_text,
    writing,
)
from rl_sparsity_tf.kernels import walk

FORMAT_VERSION = 1
_PACKAGES = (
    "rl_sparsity_tf",
    "tensorflow",
    "tf-keras",
    "tf-agents",
    "tensorflow-probability",
    "numpy",
    "ai-edge-litert",
    "litert-quantizer",
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
    parts = [part for part in tf.nest.flatten(list(batches)) if part is not None]
    chunks = []
    for part in parts:
        array = np.ascontiguousarray(part)
        chunks += [f"{array.shape} {array.dtype}".encode(), array.tobytes()]
    return sha256_of(*chunks)


def versions() -> dict[str, str]:
    """Versions and thread counts that a bit-identical repetition depends on."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    found["cpus"] = str(os.cpu_count())
    found["inter_op_threads"] = str(tf.config.threading.get_inter_op_parallelism_threads())
    found["intra_op_threads"] = str(tf.config.threading.get_intra_op_parallelism_threads())
    return found


class RunDirectory:
    """One run's folder.

    Making the object only looks, so that a folder in the way is refused before any work; nothing
    is written or removed before [start][].

    Args:
        path: The folder; made if it is missing, its parent must exist.
        arguments: What the run was called with, as JSON values. A folder with an unfinished run
            of equal arguments is continued.
        fingerprints: Fingerprints of the model and the data.
        overwrite: Whether a finished run, or one with other arguments, may be replaced.

    Raises:
        ArgumentError: If the path is a file or its parent is missing.
        FileExistsRLSparsityError: If the folder holds something else.
        RunError: If its files are damaged.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        arguments: Mapping[str, Any],
        fingerprints: Mapping[str, str],
        overwrite: bool = False,
    ):
        self.path = Path(path)
        check_directory(self.path)
        self._journal = self.path / "journal.jsonl"
        self._checkpoints = self.path / "checkpoints"
        self._wanted = json.loads(
            json.dumps({"arguments": arguments, "fingerprints": fingerprints})
        )
        present = self.path.is_dir() and any(self.path.iterdir())
        self.resumed = present and self._continues(self._wanted, overwrite)

    def _continues(self, wanted: Mapping[str, Any], overwrite: bool) -> bool:
        _check_is_run(self.path)
        try:
            found = json.loads((self.path / "manifest.json").read_text(encoding="utf-8"))
            version = found["format_version"]
            differences = _differences(found, wanted)
        except (OSError, ValueError, KeyError, TypeError) as error:
            if overwrite:
                return False
            raise RunError(
                f"The manifest in {str(self.path)!r} cannot be read ({error}). Choose another "
                "folder, or pass overwrite=True to start the run again."
            ) from error
        if overwrite:
            return False
        _check_is_unfinished(self.path)
        if version != FORMAT_VERSION or differences:
            what = ", ".join(differences) or f"format_version {version}"
            raise FileExistsRLSparsityError(
                f"The folder {str(self.path)!r} holds an unfinished run that differs in {what}. "
                "Call with the same arguments to continue it, choose another folder, or pass "
                "overwrite=True to replace it."
            )
        return True

    def start(self) -> None:
        """Makes the folder ready for writing; a run that is continued keeps what it has."""
        with writing(self.path):
            if not self.resumed:
                self._clear()
            # Before an episode is paid for that could not be written down.
            with open(self._journal, "a", encoding="utf-8"):
                check_room(self._checkpoints)

    def _clear(self) -> None:
        self.path.mkdir(exist_ok=True)
        for old in (*RESULT_FILES, *OPTIONAL_FILES, "journal.jsonl"):
            (self.path / old).unlink(missing_ok=True)
        self.drop_checkpoints(keep=set())
        manifest = {"format_version": FORMAT_VERSION, **self._wanted, "versions": versions()}
        write_text(self.path / "manifest.json", json.dumps(manifest, indent=2) + "\n")
        # After the manifest: a folder that holds anything must say whose it is.
        self._checkpoints.mkdir(exist_ok=True)
        self._journal.touch()

    # ------------------------------------------------------------------ the journal

    def append(self, entry: Mapping[str, Any]) -> None:
        """Adds a line to the journal; it is on the disk when this returns."""
        with writing(self._journal), open(self._journal, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def read_journal(self, episodes: int) -> list[dict[str, Any]]:
        """Reads the first episodes' lines and forgets what is behind them.

        Lines behind the last checkpoint (a torn last line among them) are of work that will be
        done again.

        Raises:
            RunError: If the lines of those episodes are damaged.
        """
        try:
            lines = self._journal.read_text(encoding="utf-8").splitlines()[:episodes]
            entries = [json.loads(line) for line in lines]
            if [entry["episode"] for entry in entries] != list(range(episodes)):
                raise ValueError(f"expected episodes 0 to {episodes - 1}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(
                f"The journal in {str(self.path)!r} is damaged ({error}). Pass overwrite=True to "
                "start the run again."
            ) from error
        write_text(self._journal, "".join(line + "\n" for line in lines))
        return entries

    # ------------------------------------------------------------------ checkpoints

    def save_checkpoint(self, name: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Writes arrays as `checkpoints/name.npz`, in one step."""
        with (
            replacing(self._checkpoints / f"{name}.npz") as temporary,
            open(temporary, "wb") as file,
        ):
            np.savez(file, **dict(arrays))  # type: ignore[arg-type]

    def load_checkpoint(self, name: str) -> dict[str, np.ndarray] | None:
        """Reads the arrays of a checkpoint; None if there is none.

        Raises:
            RunError: If the file is damaged.
        """
        path = self._checkpoints / f"{name}.npz"
        if not path.exists():
            return None
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return {key: arrays[key] for key in arrays.files}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise RunError(
                f"The checkpoint {str(path)!r} cannot be read ({error}). Pass overwrite=True to "
                "start the run again."
            ) from error

    def drop_checkpoints(self, keep: set[str]) -> None:
        """Removes all checkpoints but some."""
        for path in self._checkpoints.glob("*.npz"):
            if path.stem not in keep:
                with writing(path):
                    path.unlink()


TRIALS = "trials"
"""The checkpoint of what trials of a search over sizes came to; kept to the end."""
RESULT_FILES = ("model.keras", "model.tflite", "plan.json", "metrics.json", "history.csv")
"""What a finished run adds to its folder."""
OPTIONAL_FILES = ("model.recipe.json", "channels.json")
"""What it adds if there is such a thing."""


def check_directory(path: str | os.PathLike[str], room: int = LEAST_ROOM) -> Path:
    """Raises unless a folder exists or can be made at `path`, with room for so many bytes."""
    return check_folder(path, room)


def check_unfinished(path: str | os.PathLike[str]) -> None:
    """Raises unless a run can begin or go on in a folder, as far as its arguments allow it.

    Raises:
        ArgumentError: If no folder can be made there.
        FileExistsRLSparsityError: If the folder holds a finished run or something else.
    """
    folder = check_directory(path)
    if folder.is_dir() and any(folder.iterdir()):
        _check_is_run(folder)
        _check_is_unfinished(folder)


def _check_is_run(folder: Path) -> None:
    if not (folder / "manifest.json").is_file():
        # Never delete what is not ours, not even when asked to overwrite.
        raise FileExistsRLSparsityError(
            f"The folder {str(folder)!r} is not empty and holds no run of this package. "
            "Choose another folder, or empty it."
        )


def _check_is_unfinished(folder: Path) -> None:
    if (folder / "metrics.json").exists():
        raise FileExistsRLSparsityError(
            f"The folder {str(folder)!r} holds a finished run. Choose another folder, or "
            "pass overwrite=True to replace it."
        )


def _differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    names = []
    for part in ("arguments", "fingerprints"):
        mine, theirs = wanted[part], found.get(part, {})
        for key in sorted(set(mine) | set(theirs)):
            if mine.get(key) != theirs.get(key):
                detail = f" ({theirs.get(key)!r}, now {mine.get(key)!r})"
                names.append(f"{key}{detail if part == 'arguments' else ''}")
    return names
