"""What a run's folder holds: its manifest, lock, journal and checkpoints."""

from __future__ import annotations

import contextlib
import errno
import importlib.metadata
import io
import json
import logging
import math
import os
import platform
import re
import socket
import stat
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from rl_sparsity_tf.errors import RunError
from rl_sparsity_tf.files import replacing, sha256_of

FORMAT_VERSION = 2
UNSEALED = 1
"""The format before lines and checkpoints had checksums; its runs are continued in it."""
_NEWER = frozenset(
    "batch_size latency_table rows architecture compiled reward_code frozen_layers".split()
)
"""What runs of that format do not say."""
_ID = re.compile(r"[0-9a-f]{32}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_LARGEST_MANIFEST = 2**26
_MOST_SHOWN = 8
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
# What TensorFlow and NumPy take the numbers of threads from, where nothing else says.
_VARIABLES = (
    "OMP_NUM_THREADS",
    "TF_NUM_INTEROP_THREADS",
    "TF_NUM_INTRAOP_THREADS",
    "TF_ENABLE_ONEDNN_OPTS",
)


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
    found |= {name: os.environ.get(name, "") for name in _VARIABLES}
    found["gpus"] = str(len(tf.config.list_physical_devices("GPU")))
    return found


def read_manifest(path: Path) -> dict[str, Any]:
    """Reads a manifest.

    Raises ValueError if it is none (RecursionError where it is nested too deeply), and OSError if
    it cannot be read.
    """
    with open(path, "rb") as file:
        content = file.read(_LARGEST_MANIFEST + 1)
    if len(content) > _LARGEST_MANIFEST:
        raise ValueError(f"it has more than {_LARGEST_MANIFEST:,} bytes")
    found = json.loads(content.decode("utf-8"))
    if not isinstance(found, dict) or "format_version" not in found:
        raise ValueError("it is no object with a format_version")
    if found["format_version"] in (FORMAT_VERSION, UNSEALED):
        for name in ("arguments", "fingerprints", "versions"):
            if not isinstance(found.get(name), dict):
                raise ValueError(f"it has no {name}")
    return found


def id_of(manifest: Mapping[str, Any], is_sealed: bool) -> str:
    """What the run's lines and checkpoints are sealed with; nothing in a run of format 1.

    Raises ValueError if it is no id, or there should be none.
    """
    found = manifest.get("id", "")
    if not is_sealed and not found:
        return ""
    if not is_sealed or not isinstance(found, str) or not _ID.fullmatch(found):
        raise ValueError(f"its id is {short(found)}")
    return found


def differences_of(
    found: Mapping[str, Any], wanted: Mapping[str, Any], is_sealed: bool
) -> list[str]:
    """In what a call differs from the run of a manifest: names, and where readable both values.

    `wanted` has the call's `arguments` and `fingerprints` as JSON gives them back; `is_sealed` is
    whether the run says everything that this version does. Of descriptions the places that differ
    are named, `"architecture.layers 2.config.activation"`.
    """
    names: list[str] = []
    for part in ("arguments", "fingerprints"):
        mine, theirs = wanted[part], found[part]
        for key in sorted(set(mine) | set(theirs)):
            old, new = theirs.get(key), mine.get(key)
            if not is_sealed and key not in theirs and (key in _NEWER or not new):
                continue
            if part == "arguments":
                names += [] if _same(old, new) else [f"{key} ({short(old)}, now {short(new)})"]
            else:
                names += _changes(key, old, new)
    shown = names[:_MOST_SHOWN]
    return shown + ([f"{len(names) - len(shown)} more"] if len(names) > len(shown) else [])


def _changes(name: str, old: Any, new: Any) -> list[str]:
    """Where two descriptions differ; of digests only that they do."""
    if _same(old, new):
        return []
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(set(old) | set(new))
        return [c for key in keys for c in _changes(f"{name}.{key}", old.get(key), new.get(key))]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = enumerate(zip(old, new, strict=True), 1)
        return [c for n, (a, b) in pairs for c in _changes(f"{name} {n}", a, b)]
    digests = all(isinstance(one, str) and _DIGEST.fullmatch(one) for one in (old, new))
    return [name if digests else f"{name} ({short(old)}, now {short(new)})"]


def _same(old: Any, new: Any) -> bool:
    return bool(old == new) or json.dumps(old, sort_keys=True) == json.dumps(new, sort_keys=True)


def short(value: Any) -> str:
    """A value from a file, fit to be quoted."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK_FILE = ".lock"
"""The file that is locked; removed when the lock is released."""

# Network file systems answer with the last of these.
_HELD = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
_HOLDER = re.compile(r"process \d+ on [\w.-]{1,100}")

_log = logging.getLogger(__name__)


class RunLock:
    """A lock on a folder, by `flock` on a file in it.

    The kernel releases it with the process, however that ends, so that a file that is left behind
    means nothing. What the file says of its holder is only shown. Where the file system knows no
    such locks there is a warning, and on Windows nothing: keeping two processes apart is up to the
    user there.

    Example:
        >>> lock = RunLock(Path("run"))
        >>> lock.acquire()
        >>> lock.release()
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._path = folder / LOCK_FILE
        self._file: int | None = None

    @property
    def held(self) -> bool:
        """Whether this object has the lock."""
        return self._file is not None

    def acquire(self) -> None:
        """Takes the lock, at once or not at all; a dead process's is free.

        Raises RunError if another process (or another search of this one) has it, or the folder
        cannot be written to.
        """
        while fcntl is not None and self._file is None:
            descriptor = self._open()
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in _HELD:
                    holder = _holder(descriptor)
                    os.close(descriptor)
                    raise RunError(
                        f"The folder {str(self._folder)!r} is in use by another search{holder}. "
                        "Wait until that has ended, or choose another folder."
                    ) from None
                _log.warning(
                    "The file system of %r has no locks (%s): make sure that no other process "
                    "uses the folder.",
                    str(self._folder),
                    error,
                )
            if _is_at(descriptor, self._path):
                self._file = descriptor
                with contextlib.suppress(OSError):
                    os.ftruncate(descriptor, 0)
                    os.pwrite(descriptor, f"process {os.getpid()} on {_host()}\n".encode(), 0)
            else:  # its holder removed it in between
                os.close(descriptor)

    def _open(self) -> int:
        # A link in its place must not make us write to another file.
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
        try:
            descriptor = os.open(self._path, flags, 0o666)
        except OSError as error:
            raise RunError(
                f"The folder {str(self._folder)!r} cannot be locked ({error.strerror}: "
                f"{LOCK_FILE}). Expected a folder that can be written to, and no other file of "
                "that name in it."
            ) from error
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise RunError(
                f"The folder {str(self._folder)!r} cannot be locked: {LOCK_FILE} is no file. "
                "Remove it, or choose another folder."
            )
        return descriptor

    def release(self) -> None:
        """Gives the lock back, if it is held."""
        if self._file is None:
            return
        descriptor, self._file = self._file, None
        try:
            # Removed while it is locked: whoever has opened it before sees that it is gone.
            with contextlib.suppress(OSError):
                self._path.unlink(missing_ok=True)
        finally:
            os.close(descriptor)


def _holder(descriptor: int) -> str:
    with contextlib.suppress(OSError):
        text = os.pread(descriptor, 200, 0).decode("utf-8", "replace").strip()
        if _HOLDER.fullmatch(text):
            return f" ({text})"
    return ""


def _host() -> str:
    return re.sub(r"[^\w.-]", "", socket.gethostname())[:100] or "this machine"


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except OSError:
        return False


# An entry takes about a kilobyte.
LONGEST = 2**20
"""Bytes of a line at most."""
_SEAL = re.compile(rb', "checksum": "([0-9a-f]{16})"\}')
_SEAL_LENGTH = len(', "checksum": "0123456789abcdef"}')


def sealed(entry: Mapping[str, Any], before: str) -> tuple[str, str]:
    """An entry of JSON values as a line without its end, and the line's checksum.

    `before` is the checksum of the line before, or what the journal begins with.

    Example:
        >>> line, checksum = sealed({"episode": 0}, "")
    """
    text = json.dumps(entry)
    checksum = _checksum(text.encode(), before)
    return f'{text[:-1]}, "checksum": "{checksum}"}}', checksum


def seal_of(line: bytes) -> str:
    """The checksum that a line says it has; empty if it says none."""
    found = _SEAL.fullmatch(line.rstrip(b"\n")[-_SEAL_LENGTH:])
    return found.group(1).decode() if found else ""


def entry_of(line: bytes, before: str | None) -> dict[str, Any]:
    """Reads a line, with or without its end.

    `before` is the checksum of the line before; None where lines have none. Raises ValueError,
    saying what is wrong with it.
    """
    line = line.removesuffix(b"\n")
    if len(line) > LONGEST:
        raise ValueError(f"it has more than {LONGEST:,} bytes")
    if before is not None:
        checksum = seal_of(line)
        if not checksum:
            raise ValueError("it does not end with a checksum")
        line = line[:-_SEAL_LENGTH] + b"}"
        if _checksum(line, before) != checksum:
            raise ValueError("it does not have the checksum that it says")
    try:
        entry = json.loads(line)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(entry, dict):
        raise ValueError("it is no JSON object")
    return entry


def read_lines(path: Path, count: int) -> list[bytes]:
    """Reads the first lines of a file, as many as there are of those wanted."""
    lines: list[bytes] = []
    with open(path, "rb") as file:
        while len(lines) < count and (line := file.readline(LONGEST + 2)):
            lines.append(line)
    return lines


def _checksum(line: bytes, before: str) -> str:
    return sha256_of(before.encode(), line)[:16]


CHECKSUM = "checksum"
_KINDS = "biufSU"


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray], seal: str | None) -> None:
    """Writes arrays of numbers and text to a .npz file, in one step.

    `seal` goes into the checksum beside them; None makes a file without one.
    """
    named: dict[str, Any] = dict(arrays)
    if seal is not None:
        named[CHECKSUM] = np.array(_digest(arrays, seal))
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **named)


def read_arrays(path: Path, seal: str | None) -> dict[str, np.ndarray]:
    """Reads what [write_arrays][] wrote.

    No more memory is taken than the file has bytes, whatever it claims. `seal` is what it was
    written with; None is for a file without a checksum, whose weights have to be finite instead.
    What an agent has learned always has to. Raises ValueError if it is anything else, and OSError
    if it cannot be read.
    """
    size = path.stat().st_size
    arrays: dict[str, np.ndarray] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if sum(member.file_size for member in members) > size:
                raise ValueError("it claims to hold more bytes than it has")
            for member in members:
                name = member.filename.removesuffix(".npy")
                if member.compress_type != zipfile.ZIP_STORED or name in arrays:
                    raise ValueError(f"{name!r} is compressed or there twice")
                arrays[name] = _array(name, archive.read(member))
    except (OSError, ValueError):
        raise
    except Exception as error:  # zipfile and the parser of headers each have their own
        raise ValueError(f"{type(error).__name__}: {error}") from error
    if seal is not None:
        found = arrays.pop(CHECKSUM, None)
        if found is None or str(found) != _digest(arrays, seal):
            raise ValueError("it does not have the checksum that it says, or is of another run")
    _check_finite(arrays, weights=seal is None)
    return arrays


def _array(name: str, content: bytes) -> np.ndarray:
    file = io.BytesIO(content)
    version = np.lib.format.read_magic(file)
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    shape, fortran, dtype = readers[version](file)
    if dtype.kind not in _KINDS:
        raise ValueError(f"{name!r} is of type {dtype}, where numbers and text are expected")
    left = content[file.tell() :]
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != len(left):
        raise ValueError(f"{name!r} has {len(left)} bytes for the shape {shape}")
    if not dtype.itemsize:  # empty text
        if shape:
            raise ValueError(f"{name!r} holds nothing in the shape {shape}")
        return np.zeros((), dtype)
    array: np.ndarray = np.frombuffer(bytearray(left), dtype)
    return array.reshape(shape, order="F" if fortran else "C")


def _digest(arrays: Mapping[str, np.ndarray], seal: str) -> str:
    chunks = [seal.encode()]
    for name in sorted(arrays):
        value = np.asarray(arrays[name])
        chunks.append(f"\n{name} {value.dtype.str} {value.shape}\n".encode())
        chunks.append(np.ascontiguousarray(value).tobytes())
    return sha256_of(*chunks)


def _check_finite(arrays: Mapping[str, np.ndarray], weights: bool) -> None:
    for name, value in arrays.items():
        # A search may have evaluated a network that diverged.
        learned = "variables/" in name
        checked = learned or (weights and name.startswith(("weights:", "held:weights:")))
        if checked and value.dtype.kind == "f" and not np.isfinite(value).all():
            raise ValueError(f"{name!r} holds {int((~np.isfinite(value)).sum())} NaN or infinite")
