"""Holding back warnings that are nobody's to mend here, and what libraries do to logging."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator


@contextlib.contextmanager
def quiet_tensorflow() -> Iterator[None]:
    """Holds back TensorFlow's warnings of deprecated calls in TF-Agents and of new functions.

    Every search makes models and traces their functions once; TensorFlow takes the fresh
    functions for retracing. Saving a SavedModel prints a line about assets. The logger's level is
    put back afterwards, and the rest of logging with it, see [logging_kept][]. Works as a
    decorator, too.
    """
    logger = logging.getLogger("tensorflow")
    level = logger.level
    with logging_kept():
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)


@contextlib.contextmanager
def logging_kept() -> Iterator[None]:
    """Leaves the process's logging as the caller configured it. Works as a decorator, too.

    A message through absl configures the root logger where nobody has, so that everything in the
    process is printed twice from then on; TensorFlow, when it saves, fixes the level of absl's
    logger.
    """
    root, absl = logging.getLogger(), logging.getLogger("absl")
    level = absl.level
    # What Python itself prints through where nothing is configured: no message gets lost, or is
    # printed in another form.
    stand_in = None if root.handlers else logging.lastResort or logging.NullHandler()
    if stand_in is not None:
        root.addHandler(stand_in)
    try:
        yield
    finally:
        if stand_in is not None:
            root.removeHandler(stand_in)
        absl.setLevel(level)
