"""What a command shows on the terminal, and takes from it: progress, tables, Ctrl-C; no chatter."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import shutil
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from types import FrameType, TracebackType
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
)
from rich.table import Column, Table
from rich.text import Text

from rl_sparsity_tf.callbacks import EPISODES, PHASES, Callback, Listeners
from rl_sparsity_tf.errors import printable
from rl_sparsity_tf.randomness import python_and_numpy_random_kept

# Phases that took longer say how long.
_WORTH_SAYING = 2.0


class _Clock(ProgressColumn):
    """The time that is left, where that can be told, and else the time that has passed."""

    def render(self, task: Task) -> Text:
        left = task.time_remaining if task.total else None
        passed = "" if left is None else " left"
        minutes, seconds = divmod(int((task.elapsed or 0.0) if left is None else left), 60)
        return Text(f"{minutes}:{seconds:02}{passed}", style="cyan")


class SearchProgress:
    """What a search is doing: shown on the terminal, and told to callbacks.

    The terminal shows the present phases, how far they are, the best value so far and the time
    left. `verbose=0` is silent, 1 a live display (a line per phase, and an episode's now and then,
    where there is no terminal), 2 a line per episode. By default it writes to standard output.
    """

    def __init__(
        self,
        episodes: int,
        metric: str = "",
        verbose: int = 1,
        console: Console | None = None,
        callbacks: Sequence[Callback] = (),
    ):
        self.metric = metric
        self.episodes = episodes
        self._console = console or Console(highlight=False)
        self._live = verbose == 1 and self._console.is_terminal
        self._every = 1 if verbose == 2 else max(1, episodes // 8)
        self._verbose = verbose
        self._progress: Progress | None = None
        self._tasks: list[TaskID] = []
        self._figures = ""
        self._started, self._done = time.monotonic(), 0
        self._listeners = Listeners(callbacks)
        self._evaluations = 0.0
        self._best = -math.inf

    # ------------------------------------------------------------------ the search

    @contextlib.contextmanager
    def searching(self, logs: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Tells callbacks that a search begins, and how it has ended.

        The result is to be put into the dict, as `"result"`.
        """
        # Plans that are evaluated on the way back to where a search was cut off are nothing new.
        self._evaluations = math.inf if logs["episode"] else 0.0
        end: dict[str, Any] = {"result": None}
        try:
            self._listeners.begin(logs)
            yield end
        except BaseException as error:
            self._listeners.end(None, error)
            raise
        self._listeners.end(end["result"], None)

    @property
    def asked(self) -> str:
        """What episodes callbacks want no more of: `"stage"`, `"all"`, or nothing."""
        return self._listeners.asked

    def evaluated(
        self, count: int | None, value: float, figures: Callable[[], dict[str, Any]]
    ) -> None:
        """Shows and tells of a plan, if it is the first evaluation of it.

        All its `figures` are asked for where somebody listens. `count` is how many distinct plans
        were evaluated by now; None for one more than before.
        """
        number = self._evaluations + 1 if count is None else count
        if number <= self._evaluations:
            return
        self._evaluations = number
        if value > self._best:
            self._best = value
            self._figures = f"best {self._best:+.3f}"
        if self._listeners:
            self._listeners.tell("on_evaluation", {"evaluation": int(number), **figures()})

    def target_changed(self, evaluations: int) -> None:
        """Values of other targets do not compare; so many distinct plans have been evaluated."""
        self._evaluations, self._best, self._figures = evaluations, -math.inf, ""

    def trial_ended(self, trial: int, logs: Mapping[str, Any]) -> None:
        """Tells of a size that was tried."""
        self._listeners.tell("on_trial_end", trial, logs)

    def episode_ended(
        self, entry: Mapping[str, Any], best: float, more: Callable[[], dict[str, Any]]
    ) -> None:
        """Shows and tells of an episode, by its line of the journal and what is not in it."""
        self.update(
            entry["episode"] + 1,
            reward=entry["reward"],
            best=best,
            metric=entry["validation_metric"],
            sparsity=entry["sparsity"],
        )
        if self._listeners:
            logs = episode_logs(entry)
            episode = logs.pop("episode")
            logs |= {"best_value": best, **more()}
            self._listeners.tell("on_episode_end", episode, logs)

    # ------------------------------------------------------------------ phases

    @contextlib.contextmanager
    def phase(
        self, name: str, text: str = "", total: int | None = None, done: int = 0
    ) -> Iterator[None]:
        """Shows and tells that a phase of [PHASES][] begins and ends; phases may be nested.

        It has `total` steps, of which some are done.
        """
        text = printable(text or PHASES[name])
        self._listeners.tell("on_phase_begin", name, {"text": text, "total": total})
        started = time.monotonic()
        with self._shown(text, total, done):
            yield
        seconds = time.monotonic() - started
        if seconds >= _WORTH_SAYING:
            figures = self._figures if self._live and name == EPISODES else ""
            short = text if self._live else f"  {name.replace('_', ' ')}"
            self.say(f"{short}: {seconds:.0f} s  {figures}".rstrip())
        self._listeners.tell("on_phase_end", name, {"text": text, "seconds": seconds})

    @contextlib.contextmanager
    def _shown(self, text: str, total: int | None, done: int) -> Iterator[None]:
        self._started, self._done = time.monotonic(), done
        if not self._live:
            self.say(text)
            yield
            return
        outermost = self._progress is None
        if self._progress is None:
            self._progress = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}", style="bold", markup=False),
                BarColumn(bar_width=20),
                TextColumn("{task.fields[count]}", markup=False),
                TextColumn("{task.fields[figures]}", markup=False),
                _Clock(Column(no_wrap=True)),
                console=self._console,
                transient=True,
            )
            self._progress.start()
        count = "" if total is None else f"{done}/{total}"
        fields: dict[str, Any] = {"count": count, "figures": self._figures}
        task = self._progress.add_task(text, total=total, completed=done, **fields)
        self._tasks.append(task)
        try:
            yield
        finally:
            self._tasks.pop()
            self._progress.remove_task(task)
            if outermost:
                self._progress.stop()
                self._progress = None

    def step(self, done: int, total: int) -> None:
        """Shows how far the innermost phase is."""
        if self._progress is not None:
            fields: dict[str, Any] = {"count": f"{done}/{total}", "figures": self._figures}
            self._progress.update(
                self._tasks[-1], completed=done, total=total, refresh=True, **fields
            )

    def update(
        self, episode: int, *, reward: float, best: float, metric: float, sparsity: float
    ) -> None:
        """Shows an episode that has ended (`episode` counts from 1)."""
        figures = (
            f"best {best:+.3f}  {printable(self.metric)} {metric:.4f}  sparsity {sparsity:.3f}"
        )
        if self._progress is not None:
            self._figures = figures
            self.step(episode, self.episodes)
            self._figures = f"best {best:+.3f}"
        elif self._verbose and (episode % self._every == 0 or episode == self.episodes):
            spent = time.monotonic() - self._started
            left = spent / max(1, episode - self._done) * (self.episodes - episode)
            figures = f"reward {reward:+.3f}  {figures}"
            self.say(f"episode {episode}/{self.episodes}  {figures}  {left:.0f} s left")

    def say(self, text: str) -> None:
        """Writes a line, unless silent."""
        if self._verbose:
            self._console.print(printable(text), soft_wrap=True, markup=False, emoji=False)


def silent() -> SearchProgress:
    """Progress that nobody is told of."""
    return SearchProgress(0, verbose=0)


def episode_logs(entry: Mapping[str, Any]) -> dict[str, Any]:
    """An episode's line of the journal in the words of callbacks."""
    logs = {name: value for name, value in entry.items() if name not in _JOURNAL}
    return logs | {new: entry[old] for old, new in _JOURNAL.items()}


_JOURNAL = {"reward": "value", "validation_metric": "metric", "validation_loss": "loss"}


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
    """Characters in a line of the terminal, or of `COLUMNS`; `otherwise` where there is none."""
    asked = os.environ.get("COLUMNS", "")
    if not asked.isdecimal() and not sys.stdout.isatty():
        return max(_NARROWEST, otherwise)  # what is printed goes into a file, or to a caller
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


class Interruption:
    """While it is open, the first Ctrl-C is noted and does nothing else.

    The second raises `KeyboardInterrupt` at once, as does any at other times. Only in the main
    thread, which signals are handled in, and where Python's own handler is set: one of the caller's
    stays. What was there is put back.

    The first Ctrl-C calls `told` when it is noted; `requested` is whether there was one.

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
