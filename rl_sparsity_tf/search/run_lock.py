"""The lock of a run directory: one process at a time, released by the kernel when that dies."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import socket
import stat
from pathlib import Path

from rl_sparsity_tf.errors import RunError

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

    Args:
        folder: The folder.

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

        Raises:
            RunError: If another process (or another search of this one) has it, or the folder
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
