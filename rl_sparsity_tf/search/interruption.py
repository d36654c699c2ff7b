"""Ctrl-C in a search: the first one lets the present episode end, the second does not."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType


class Interruption:
    """While it is open, the first Ctrl-C is noted and does nothing else.

    The second raises `KeyboardInterrupt` at once, as does any at other times. Only in the main
    thread, which signals are handled in, and where Python's own handler is set: one of the caller's
    stays. What was there is put back.

    Args:
        told: Called when the first Ctrl-C is noted.

    Attributes:
        requested: Whether there was one.

    Example:
        >>> with Interruption() as interruption:
        ...     while not interruption.requested:
        ...         play_an_episode()
    """

    def __init__(self, told: Callable[[], None] | None = None):
        self.requested = False
        self._told = told
        self._open = False

    def __enter__(self) -> Interruption:
        main = threading.current_thread() is threading.main_thread()
        if main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._note)
            self._open = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._open:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            self._open = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        if self._told is not None:
            # The signal may have come in the middle of writing to the same stream.
            with contextlib.suppress(RuntimeError):
                self._told()
