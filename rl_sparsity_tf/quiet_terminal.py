"""A terminal without what the libraries say of themselves while they are imported and used."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet_terminal() -> Iterator[None]:
    """Keeps the libraries' own chatter off the terminal while they are imported and used."""
    loggers = [logging.getLogger(name) for name in ("tensorflow", "absl")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _import_silently()
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _import_silently() -> None:
    # While TensorFlow is loaded its C++ side writes to file descriptor 2 whatever the log level
    # is; gym, which TF-Agents imports, greets on sys.stderr. Both only on the first import.
    if "tensorflow" in sys.modules:
        return
    level = os.environ.get("TF_CPP_MIN_LOG_LEVEL")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    try:
        with _descriptor_silenced(2), contextlib.redirect_stderr(io.StringIO()):
            # What is missing is said by the module that needs it.
            with contextlib.suppress(ImportError):
                import tensorflow  # noqa: F401
            with contextlib.suppress(ImportError):
                import gym  # noqa: F401
    finally:
        if level is None:
            del os.environ["TF_CPP_MIN_LOG_LEVEL"]


@contextlib.contextmanager
def _descriptor_silenced(descriptor: int) -> Iterator[None]:
    try:
        kept = os.dup(descriptor)
    except OSError:  # closed, as under some service managers: nothing to silence
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)
    try:
        yield
    finally:
        os.dup2(kept, descriptor)
        os.close(kept)
