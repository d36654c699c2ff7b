"""What a command shows on the terminal: progress and tables, and no chatter of the libraries."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

from rich import box
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

    Its lines have as many characters as the terminal at most; `width` where there is none.
    """
    text = io.StringIO()
    console = _plain_console(text, terminal_width(width))
    console.print(table)
    return [printable(line) for line in text.getvalue().rstrip().split("\n")]


def fitted_lines(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    right: Collection[str],
    spare: Sequence[str],
    width: int,
) -> list[str]:
    """The lines of a table about named things, the first column, that fits the terminal.

    Numbers, in the columns to the `right`, are never cut. Where the terminal is too narrow, columns
    that say the same of everything become a line below the table, the frame goes, and so do `spare`
    columns, one by one, until names have enough room. `width` counts where there is no terminal.
    """
    room = terminal_width(width)
    table = _table(title, columns, rows, right)
    if len(rows) < 2 or _natural_width(table) <= room:
        return table_lines(table, width)
    values = {name: [row[i] for row in rows] for i, name in enumerate(columns)}
    alike = {name: v[0] for name, v in values.items() if v[0] and len(set(v)) == 1}
    kept, left_out = [name for name in columns if name not in alike], []
    names = max(map(len, values[columns[0]]))
    for name in ("", *spare):
        if name in kept:
            kept.remove(name)
            left_out.append(name)
        shown = list(zip(*(values[one] for one in kept), strict=True))
        table = _table(title, kept, shown, right, framed=False)
        if _natural_width(table) - names + min(names, _NAME) <= room:
            break
    lines = [line.rstrip() for line in table_lines(table, width)]
    if alike:
        said = ", ".join(f"{name}: {value}" for name, value in alike.items())
        lines.append(f"the same for all ({said})")
    if left_out:
        lines.append(f"left out, as the terminal is narrow: {', '.join(left_out)}")
    return lines


# Characters that names of kernels have at least, before other columns are left out for them.
_NAME = 28
_NARROWEST = 40


def terminal_width(otherwise: int) -> int:
    """Characters in a line of the terminal; `otherwise` where there is none."""
    return max(_NARROWEST, shutil.get_terminal_size((otherwise, 24)).columns)


def _table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    right: Collection[str],
    *,
    framed: bool = True,
) -> Table:
    look: dict[str, Any] = {"title": title, "title_justify": "left"}
    if not framed:
        look |= {"box": box.SIMPLE_HEAD, "padding": (0, 1, 0, 0), "show_edge": False}
    table = Table(**look)
    for i, name in enumerate(columns):
        widest = max((len(row[i]) for row in rows), default=0)
        numbers = name in right
        table.add_column(
            name,
            justify="right" if numbers else "left",
            overflow="fold",
            min_width=widest if numbers else None,
        )
    for row in rows:
        table.add_row(*row)
    return table


def _natural_width(table: Table) -> int:
    console = _plain_console(io.StringIO(), _WIDE)
    return console.measure(table).maximum


_WIDE = 10_000


def _plain_console(text: io.StringIO, width: int) -> Console:
    return Console(file=text, width=width, color_system=None, markup=False, emoji=False)


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
