"""What a command shows on the terminal: progress and tables, and no chatter of the libraries."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from rl_sparsity_tf.errors import printable
from rl_sparsity_tf.randomness import python_and_numpy_random_kept


class SearchProgress:
    """Shows episode, reward, best value, metric, sparsity and the time left.

    `verbose=0` is silent, 1 a live line (a line now and then where there is no terminal), 2 a line
    per episode. By default it writes to standard output.
    """

    def __init__(
        self, episodes: int, metric: str, verbose: int = 1, console: Console | None = None
    ):
        self._episodes = episodes
        self._metric = printable(metric)
        self._console = console or Console(highlight=False)
        self._live = verbose == 1 and self._console.is_terminal
        self._every = 1 if verbose == 2 else max(1, episodes // 8)
        self._verbose = verbose
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._started = time.monotonic()

    @contextlib.contextmanager
    def running(self, title: str) -> Iterator[SearchProgress]:
        """Shows the search's progress while the context is open."""
        self._started = time.monotonic()
        if not self._live:
            self.say(f"{title}: {self._episodes} episodes")
            yield self
            return
        self._progress = Progress(
            TextColumn("{task.description}", style="bold", markup=False),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}", markup=False),
            TimeRemainingColumn(),
            console=self._console,
        )
        with self._progress:
            self._task = self._progress.add_task(printable(title), total=self._episodes, figures="")
            yield self
        self._progress = None

    def update(
        self, episode: int, *, reward: float, best: float, metric: float, sparsity: float
    ) -> None:
        """Shows an episode that has ended (`episode` counts from 1)."""
        figures = (
            f"reward {reward:+.3f}  best {best:+.3f}  {self._metric} {metric:.4f}  "
            f"sparsity {sparsity:.3f}"
        )
        if self._progress is not None:
            self._progress.update(self._task, completed=episode, figures=figures)
        elif self._verbose and (episode % self._every == 0 or episode == self._episodes):
            spent = time.monotonic() - self._started
            left = spent / episode * (self._episodes - episode)
            self.say(f"episode {episode}/{self._episodes}  {figures}  {left:.0f} s left")

    def say(self, text: str) -> None:
        """Writes a line, unless silent."""
        if self._verbose:
            self._console.print(printable(text), soft_wrap=True, markup=False, emoji=False)


def table_lines(table: Table, width: int) -> list[str]:
    """A table drawn without colours; what stands in it is text, no markup.

    Its lines have `width` characters at most.
    """
    text = io.StringIO()
    console = Console(file=text, width=width, color_system=None, markup=False, emoji=False)
    console.print(table)
    return [printable(line) for line in text.getvalue().rstrip().split("\n")]


def printing(print_fn: Callable[[str], Any]) -> Callable[[str], Any]:
    """The function that lines are printed with, control characters in them written out."""
    return lambda line: print_fn(printable(line))


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


@contextlib.contextmanager
def without_traces() -> Iterator[None]:
    """Leaves the process's logging and random generators as the caller had them, and is quiet.

    What public functions that make or train models run in. Works as a decorator, too.
    """
    with quiet_tensorflow(), python_and_numpy_random_kept():
        yield


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
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
