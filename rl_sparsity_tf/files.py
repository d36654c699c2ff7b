"""Files on disk: written to a temporary name, synced and renamed, never half there."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rl_sparsity_tf.errors import ArgumentError, FileExistsRLSparsityError


def as_path(name: str, value: Any, expected: str) -> Path:
    """Turns an argument into a path.

    Args:
        name: The argument's name.
        value: What was given for it.
        expected: What should have been, for the error.

    Raises:
        ArgumentError: If it is no path.
    """
    if not isinstance(value, str | os.PathLike):
        raise ArgumentError(f"{name}={value!r} is a {type(value).__name__}. Expected {expected}.")
    return Path(value)


def check_new_file(path: str | os.PathLike[str], overwrite: bool = False) -> Path:
    """Checks that a file can be written, before any work is done for it.

    Raises:
        ArgumentError: If there is no path, the parent folder is missing or the path is a folder.
        FileExistsRLSparsityError: If the file exists and `overwrite` is false.
    """
    path = as_path("path", path, "the name of a file to write")
    if path.is_dir():
        raise ArgumentError(f"{str(path)!r} is a folder. Expected the name of a file to write.")
    if not path.parent.is_dir():
        raise ArgumentError(
            f"The folder {str(path.parent)!r} does not exist. Create it first, or choose another "
            f"place for {path.name!r}."
        )
    if path.exists() and not overwrite:
        raise FileExistsRLSparsityError(
            f"{str(path)!r} exists already. Choose another name, or pass overwrite=True."
        )
    return path


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a temporary name beside `path`; on success the file there becomes `path`.

    On an exception the temporary file is removed and whatever was at `path` stays.
    """
    path = Path(path)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        # mkstemp makes private files; give the result the mode any new file would have.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes a text file in one step."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def gzip_size(content: bytes) -> int:
    """Bytes of a file's content after gzip at its highest level."""
    return len(gzip.compress(content, compresslevel=9, mtime=0))


def sha256_of(*chunks: Any) -> str:
    """Hexadecimal SHA-256 of the chunks (bytes, or arrays of them), one after the other."""
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()
