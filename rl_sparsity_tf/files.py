"""Files on disk: written in one step and never half there; JSON read strictly.

What the system refuses is turned into a [FileError][rl_sparsity_tf.FileError] here and
nowhere else: [as_file][] looks before something is read, [check_new_file][] and [check_room][]
before something is worked for that is to be written, and [replacing][], [writing][] and
[scratch_folder][] say what went wrong all the same.
"""

from __future__ import annotations

import contextlib
import errno
import gzip
import hashlib
import json
import math
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rl_sparsity_tf.errors import (
    ArgumentError,
    FileError,
    FileExistsRLSparsityError,
    PlanError,
    RLSparsityError,
    one_line,
)

PACKAGE_PARENT = Path(__file__).resolve().parent.parent
"""The folder that holds the package, for child processes to import it from."""

# What a place must have room for where nobody says how much will be written.
LEAST_ROOM = 2**16
# Temporary names are longer than those they become, which may be as long as the system allows.
_STEM, _SUFFIX = 32, 16
_MENDS = {
    errno.ENOSPC: "Free some space there, or choose a place that has more",
    errno.EDQUOT: "Free some of your quota there, or choose another place",
    errno.EFBIG: "Raise the limit of a file's size (ulimit -f unlimited)",
    errno.EACCES: "Choose a place that this user has the right to",
    errno.EPERM: "Choose a place that this user has the right to",
    errno.EROFS: "Choose a place that can be written to",
    errno.ENAMETOOLONG: "Choose a shorter name",
    errno.ELOOP: "It is a link that leads back to itself: remove it, or choose another name",
    errno.EMFILE: "Close files, or raise the limit of open ones (ulimit -n)",
    errno.EIO: "Look whether the device is in order",
}
# Libraries say these in errors of their own kinds.
_IN_WORDS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


# ----------------------------------------------------------------------------- before any work


def as_path(name: str, value: Any, expected: str) -> Path:
    """Turns an argument into a path; errors say what was expected.

    Raises `ArgumentError` if it is no path, and `FileError` if the system does not let one look
    what is there.
    """
    if not isinstance(value, str | os.PathLike):
        raise ArgumentError(f"{name}={value!r} is a {type(value).__name__}. Expected {expected}.")
    text = os.fspath(value)
    if not text:
        raise ArgumentError(f"{name}='' names nothing. Expected {expected}.")
    try:
        if "\0" in text:
            raise ValueError("a NUL character")
        os.fsencode(text)
    except ValueError as error:
        raise ArgumentError(
            f"{name}={text!r} has a character that no file's name can have. Expected {expected}."
        ) from error
    path = Path(value)
    _look(path)
    return path


def as_file(name: str, value: Any, expected: str) -> Path:
    """Turns an argument into the path of something to read, and tries to.

    That nothing is there, or a folder, is for the caller to say. Raises `ArgumentError` if it is no
    path, and `FileError` if it is no regular file, may not be read, or is a link to nothing.
    """
    path = as_path(name, value, expected)
    found = _look(path)
    if found is None:
        if path.is_symlink():
            raise FileError(
                f"{str(path)!r} is a link to {os.readlink(path)!r}, which does not exist. Expected "
                f"{expected}."
            )
        return path
    if not stat.S_ISDIR(found.st_mode) and not stat.S_ISREG(found.st_mode):
        raise FileError(
            f"{str(path)!r} is a device, a pipe or a socket. Expected {expected}: a regular file."
        )
    with reading(path, expected):
        if path.is_dir():
            os.listdir(path)
        else:
            with path.open("rb") as file:
                file.read(1)
    return path


@contextlib.contextmanager
def reading(path: Path, expected: str) -> Iterator[None]:
    """Says in words what the system has against reading a path.

    Raises `FileError` if the body raises an `OSError`.
    """
    try:
        yield
    except OSError as error:
        mend = f"Give {expected} that this user may read"
        raise _refusal(error, path, "cannot be read", mend) from error


def check_new_file(path: str | os.PathLike[str], overwrite: bool = False) -> Path:
    """Checks that a file can be written, before any work is done for it.

    Raises `ArgumentError` if there is no path, the parent folder is missing or the path is a
    folder, `FileError` if the system does not let a file be written there, and
    `FileExistsRLSparsityError` if the file exists and `overwrite` is false.
    """
    path = as_path("path", path, "the name of a file to write")
    found = _look(path)
    if found is not None and stat.S_ISDIR(found.st_mode):
        raise ArgumentError(f"{str(path)!r} is a folder. Expected the name of a file to write.")
    if found is not None and not stat.S_ISREG(found.st_mode):
        raise FileError(
            f"{str(path)!r} is a device, a pipe or a socket. Expected the name of a regular file "
            "to write."
        )
    parent = _linked(path).parent
    if not parent.is_dir():
        raise ArgumentError(
            f"The folder {str(parent)!r} does not exist. Create it first, or choose another "
            f"place for {path.name!r}."
        )
    if found is not None and not overwrite:
        raise FileExistsRLSparsityError(
            f"{str(path)!r} exists already. Choose another name, or pass overwrite=True."
        )
    check_room(parent, for_=path)
    return path


def check_folder(path: str | os.PathLike[str], room: int = LEAST_ROOM) -> Path:
    """Checks that a folder can be written to, or made if it is missing, before any work.

    `room` bytes at least will be written there. Raises `ArgumentError` if there is no path, it is a
    file, or the parent folder is missing, and `FileError` if the system does not let files be
    written there.
    """
    path = as_path("directory", path, "the path of a folder to write to")
    if path.exists() and not path.is_dir():
        raise ArgumentError(f"{str(path)!r} is a file. Expected a folder to write to.")
    if path.is_symlink() and not path.exists():
        raise FileError(
            f"{str(path)!r} is a link to {os.readlink(path)!r}, which does not exist. Create that "
            "folder, or choose another place."
        )
    parent = path.absolute().parent
    if not parent.is_dir():
        raise ArgumentError(
            f"The folder {str(parent)!r} does not exist. Create it first, or choose another "
            f"place for {path.name!r}."
        )
    check_room(path if path.is_dir() else parent, room, for_=path)
    return path


def check_room(folder: Path, room: int = LEAST_ROOM, *, for_: Path | None = None) -> None:
    """Raises `FileError` unless `room` bytes can be written in a folder; leaves nothing there.

    The folder exists. The error says what the system says of writing `for_`, by default the folder.
    """
    name = folder / f".try-{secrets.token_hex(8)}"
    try:
        # Not tempfile: it tries ten thousand names where the folder refuses all of them.
        handle = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            _reserve(handle, max(room, LEAST_ROOM))
        finally:
            os.close(handle)
            os.unlink(name)
    except OSError as error:
        raise _refusal(error, folder if for_ is None else for_, "cannot be written") from error


def _reserve(handle: int, room: int) -> None:
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(handle, 0, room)
        except OSError as error:
            # Not every file system can set bytes aside; that says nothing of how many there are.
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
        else:
            return
    left = LEAST_ROOM
    while left:  # a write may stop at a limit without a word, and the next one raises
        left -= os.write(handle, bytes(left))
    os.fsync(handle)  # some file systems notice only then that they are full


def _look(path: Path) -> os.stat_result | None:
    """What is at a path; None if nothing is."""
    try:
        return os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise _refusal(error, path, "cannot be used") from error


def _linked(path: Path) -> Path:
    """Where a file is written: a link stays, and what it leads to is replaced."""
    return Path(os.path.realpath(path)) if path.is_symlink() else path


# ------------------------------------------------------------------------------- during the work


@contextlib.contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Says in words what the system has against writing to a path.

    Raises `FileError` if the body raises an `OSError`, or any error that means a lack of room.
    """
    try:
        yield
    except Exception as error:
        reason = _reason(error)
        if reason is None:
            raise
        raise _refusal(reason, Path(path), "cannot be written") from error


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a temporary name beside `path`; on success the file there becomes `path`.

    On an exception the temporary file is removed and whatever was at `path` stays. A link stays a
    link. Raises `FileError` if the system does not let the file be written.
    """
    shown, path = path, _linked(Path(path))
    stem, suffix = path.stem[:_STEM], path.suffix if len(path.suffix) <= _SUFFIX else ""
    temporary = path.parent / f".{stem}-{secrets.token_hex(8)}{suffix}"
    with writing(shown):
        # The mode any new file has; the system looks at the umask, which only a change can read.
        os.close(os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666))
        try:
            yield temporary
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def scratch_folder(prefix: str = "rl_sparsity_") -> Iterator[Path]:
    """A temporary folder, which goes in the end with all that is in it.

    Raises `FileError` if there is no room for it, or for what is to be written there.
    """
    folder = new_scratch_folder(prefix)
    try:
        yield folder
    except Exception as error:
        reason = _reason(error)
        if isinstance(error, FileError) and error.errno and str(folder) in str(error):
            reason = OSError(error.errno, os.strerror(error.errno))
        if reason is None or not str(reason.filename or folder).startswith(str(folder)):
            raise
        raise _no_scratch(reason, folder.parent) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def new_scratch_folder(prefix: str) -> Path:
    """A temporary folder that the caller removes; raises as [scratch_folder][] does."""
    place = Path("TMPDIR")
    try:
        place = Path(tempfile.gettempdir())
        return Path(tempfile.mkdtemp(prefix=prefix))
    except OSError as error:
        raise _no_scratch(error, place) from error


def _no_scratch(error: OSError, place: Path) -> FileError:
    return _refusal(
        error,
        place,
        "(the folder for temporary files) cannot be written",
        "Set TMPDIR to another folder, or free some space",
    )


def _reason(error: BaseException) -> OSError | None:
    """The system's error in an error; None if it has none, or is told already."""
    if isinstance(error, FileError):
        return None
    if isinstance(error, OSError) and not isinstance(error, RLSparsityError):
        return error
    said = str(error)
    for number in _IN_WORDS:
        if os.strerror(number) in said:
            return OSError(number, os.strerror(number))
    return None


def _refusal(error: OSError, path: Path, what: str, mend: str | None = None) -> FileError:
    number = error.errno
    if number is None:  # of a library that has the number in its text only
        number = next((n for n in _IN_WORDS if os.strerror(n) in str(error)), None)
    reason = one_line(error) if number is None else os.strerror(number)
    mend = mend or _MENDS.get(number or 0, "Choose another place")
    elsewhere = ""
    if error.filename and not os.fspath(error.filename).startswith(str(path.parent)):
        elsewhere = f" (at {os.fspath(error.filename)!r})"
    refusal = FileError(f"{str(path)!r} {what}: {reason}{elsewhere}. {mend}.")
    refusal.errno = number
    return refusal


# ---------------------------------------------------------------------------------------- content


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


# More digits than any number that is written here; a double's have 17, a 64-bit integer's 19.
_MOST_DIGITS = 20


def parse_strict(text: Any) -> Any:
    """Parses a str of JSON, of finite numbers and objects without a name twice.

    Raises `ValueError` if it is no JSON (then a `json.JSONDecodeError`), or holds a number that is
    not finite or has too many digits, or an object with a name twice; `TypeError` if it is no text;
    and `RecursionError` if it is nested too deeply.

    Example:
        >>> parse_strict('{"a": 1, "a": 2}')
        Traceback (most recent call last):
        ...
        ValueError: the name 'a' is there twice
    """
    return json.loads(
        text,
        parse_constant=_refuse,
        parse_float=_finite,
        parse_int=_short,
        object_pairs_hook=_once,
    )


def _refuse(text: str) -> Any:
    raise ValueError(f"{text} is no finite number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:_MOST_DIGITS]} is no finite number")
    return value


def _short(text: str) -> int:
    if len(text) > _MOST_DIGITS:
        raise ValueError(f"the number {text[:_MOST_DIGITS]}... has {len(text)} digits")
    return int(text)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(
            f"the name {next(n for n in names if names.count(n) > 1)!r} is there twice"
        )
    return values


def read_text(path: Path) -> str:
    """Reads a plan's file; raises `PlanError` if it is missing or no text."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(
            f"The plan {str(path)!r} cannot be read ({error}). Expected a JSON file written by "
            "plan.save."
        ) from error


def parse_json(text: Any) -> Any:
    """Parses a plan's text; raises `PlanError` if it is no JSON.

    `RecursionError` comes through if it is nested too deeply.
    """
    try:
        return parse_strict(text)
    except json.JSONDecodeError as error:
        raise PlanError(
            f"The plan is not valid JSON (line {error.lineno}, column {error.colno}: "
            f"{error.msg}). Mend that place, or write the plan again with plan.save(path)."
        ) from error
    except (TypeError, ValueError) as error:  # no text; bytes of none; endless digits, NaN
        raise PlanError(
            f"The plan's text cannot be read ({error}). Expected a str of JSON, as plan.to_json() "
            "returns it."
        ) from error
