"""What a search shows while it runs."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from rl_sparsity_tf.errors import printable


class SearchProgress:
    """Shows episode, reward, best value, metric, sparsity and the time left.

    Args:
        episodes: Episodes of the search.
        metric: Name of the metric shown.
        verbose: 0 is silent, 1 a live line (a line now and then where there is no terminal), 2 a
            line per episode.
        console: Where to write; by default standard output.
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
