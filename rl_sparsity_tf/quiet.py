"""Holding back warnings that are nobody's to mend here."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator


@contextlib.contextmanager
def quiet_tensorflow() -> Iterator[None]:
    """Holds back TensorFlow's warnings of deprecated calls in TF-Agents and of new functions.

    Every search makes models and traces their functions once; TensorFlow takes the fresh
    functions for retracing. Saving a SavedModel prints a line about assets. The logger's level is
    put back afterwards. Works as a decorator, too.
    """
    logger = logging.getLogger("tensorflow")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
