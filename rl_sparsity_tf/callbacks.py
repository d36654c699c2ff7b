"""What a search tells others while it is at work, and how they can end it in time.

Callbacks are given to [search][rl_sparsity_tf.Compressor.search]:

    >>> log = rls.callbacks.CSVLogger("episodes.csv")
    >>> patience = rls.callbacks.EarlyStopping(patience=6)
    >>> result = compressor.search(
    ...     (x, y), validation_data=(x_val, y_val), callbacks=[log, patience], verbose=0
    ... )

A search is told as a row of phases, which may lie within each other. Their names are constants of
this module: `MEASURING` (bytes and times of the layers), `PREPARING` (the network that plans are
put on), `DENSE_FILES` (the dense model's files), `STORAGE` (groups and bits of every kernel),
`WARM_START` (plans that are evaluated before the episodes), `EPISODES`, `RERANKING` (masks of the
best plans), `HEATS` (short trainings), `FINE_TUNING`, `EXPORT`, `SAVING` (figures and files
of the result), and `TRIAL` around those of one size that is tried for
`Target(max_accuracy_drop=...)`. `DATA` (checks of the data) is shown on the
terminal alone, as it comes before the search begins.
"""

from __future__ import annotations

import csv
import inspect
import io
import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rl_sparsity_tf.checks import check_count, is_number
from rl_sparsity_tf.errors import (
    ArgumentError,
    FileExistsRLSparsityError,
    MissingDependencyError,
    one_line,
)
from rl_sparsity_tf.files import as_path, check_new_file, write_text, writing
from rl_sparsity_tf.randomness import python_and_numpy_random_kept

__all__ = ["CSVLogger", "Callback", "EarlyStopping", "TensorBoard", "TimeLimit"]

DATA = "data"
MEASURING = "measuring"
PREPARING = "preparing"
DENSE_FILES = "dense_files"
STORAGE = "storage"
WARM_START = "warm_start"
EPISODES = "episodes"
RERANKING = "reranking"
HEATS = "heats"
FINE_TUNING = "fine_tuning"
EXPORT = "export"
TRIAL = "trial"
SAVING = "saving"

PHASES: Mapping[str, str] = {
    DATA: "checking the data",
    MEASURING: "measuring what layers take",
    PREPARING: "preparing the network",
    DENSE_FILES: "exporting the dense model",
    STORAGE: "choosing groups and bits for every kernel",
    WARM_START: "evaluating the plans of known heuristics",
    EPISODES: "searching",
    RERANKING: "ranking the weights of the best plans anew",
    HEATS: "training several starts for a short time",
    FINE_TUNING: "fine-tuning",
    EXPORT: "exporting",
    TRIAL: "trying a size",
    SAVING: "writing the result down",
}
"""What the phases are called, and how the terminal names them by default."""

STAGE, ALL = "stage", "all"
"""Which episodes a callback wants no more of: those of the present target, or any."""


class Callback:
    """What is told of a search: derive from it, and write those of its methods that you need.

    They are called in the search's own thread, one callback after the other, in the order of the
    list. `logs` is a dict of the callback's own: changing it changes nothing. An exception ends the
    search, reaches the caller as it is, and leaves a run directory that the same call continues.

    What callbacks draw from Python's and NumPy's global generators does not change a search. Do not
    draw from TensorFlow's: `np.random.default_rng()` and `tf.random.Generator` are your own.

    Example:
        >>> class Best(rls.callbacks.Callback):
        ...     def on_episode_end(self, episode, logs):
        ...         if logs["improved"]:
        ...             print(f"episode {episode}: {logs['metric']:.3f}")
        >>> best = Best()
    """

    _asked = ""

    def stop_stage(self) -> None:
        """Asks for no more episodes under the present target; the search goes on behind them.

        With a curriculum the next stage follows, with `Target(max_accuracy_drop=...)` the next
        size; else it is the same as [stop_episodes][]. At least one episode is played.
        """
        self._asked = self._asked or STAGE

    def stop_episodes(self) -> None:
        """Asks for no more episodes at all: the best plan so far is fine-tuned and exported.

        A stage before the full target, or a size that is being tried, is not lost: the best plan is
        pruned further to the full target, and the size is finished. At least one episode is played.
        """
        self._asked = ALL

    @property
    def asked(self) -> str:
        """What it has asked for: `"stage"`, `"all"`, or nothing."""
        return self._asked

    def heard(self, everything: bool = False) -> None:
        """To be called by the search, which has read [asked][]."""
        if everything or self._asked == STAGE:
            self._asked = ""

    def on_search_begin(self, logs: dict[str, Any]) -> None:
        """A search begins, or goes on; its data was checked.

        Args:
            logs: `resumed` (whether a run directory is continued), `episode` (of the next episode,
                from 0), `episodes` (how many there are in all), `history` (what `on_episode_end`
                was given before, with `episode`, without `plan`, `best_value` and `bytes`),
                `seconds` (what these episodes took), `agent`, `seed`, `target` (as a dict) and
                `directory` (a path as text, or None).
        """

    def on_search_end(self, logs: dict[str, Any]) -> None:
        """The search is over, in whichever way.

        Args:
            logs: `result` (the [Result][rl_sparsity_tf.Result], None after an exception), `error`
                (the exception, or None) and `seconds` (since its beginning in this process).
        """

    def on_phase_begin(self, phase: str, logs: dict[str, Any]) -> None:
        """A phase begins, perhaps within another.

        Args:
            phase: Its name, one of the constants of `rls.callbacks`.
            logs: `text` (as the terminal shows it) and `total` (episodes, epochs, plans or starts
                in it; None if that is not known).
        """

    def on_phase_end(self, phase: str, logs: dict[str, Any]) -> None:
        """A phase has ended, without an exception.

        Args:
            phase: Its name, one of the constants of `rls.callbacks`.
            logs: `text` and `seconds`.
        """

    def on_episode_end(self, episode: int, logs: dict[str, Any]) -> None:
        """An episode was played, learned from, and saved if there is a run directory.

        Args:
            episode: Its number, from 0; a search that is continued counts on.
            logs: `value` (what the reward says of its plan, from -1 to 1), `best_value` (the best
                so far under the present target, heuristics' plans included), `metric` and `loss`
                (on the search's rows of the validation data), `sparsity`, `bytes` (of the file, as
                predicted; None unless the target is in bytes or an accuracy's drop), `proposed_by`,
                `improved` (whether it is the best), `losses` (of the agent, by name; empty where
                nothing was trained), `operations` (weights by the operation on them),
                `illegal_actions` and `evaluations` (so far), `stored_bits`,
                `reconstruction_error`, `step_rewards`, `seconds`, and `plan` (the
                [CompressionPlan][rl_sparsity_tf.CompressionPlan]). Under a curriculum also `stage`,
                and with an accuracy's drop `trial` and `limit`.
        """

    def on_evaluation(self, logs: dict[str, Any]) -> None:
        """A whole plan that had not been evaluated before was.

        That of an episode is told just before its `on_episode_end`. One that is met again is not
        told again. What the final changes in its plans is not told.

        Args:
            logs: `evaluation` (how many distinct plans were evaluated so far, the decisions within
                an episode included where a recovery trains after each of them), `value`, `metric`,
                `loss`, `sparsity`, `bytes` and `proposed_by` as in `on_episode_end`, and `episode`
                (None for plans that no episode proposed).
        """

    def on_trial_end(self, trial: int, logs: dict[str, Any]) -> None:
        """A size was tried, for `Target(max_accuracy_drop=...)`.

        Args:
            trial: Its number, from 1; 0 is the dense int8 file.
            logs: `limit` (bytes that the file might have), `tflite_bytes` and `validation_metric`
                of the file (None if there is none of that size), `held` (whether that is good
                enough) and `proposed_by`.
        """


class EarlyStopping(Callback):
    """Ends the episodes once they bring nothing: the final follows, with the best plan so far.

    Values of the episodes' own plans are compared, from the first episode of the present target on;
    with `Target(max_accuracy_drop=...)` and in a curriculum it ends the episodes of one size or
    stage. A search that is continued is judged by all its episodes.

    Args:
        patience: Episodes in a row without a better value after which there are no more.
        min_delta: What a value has to be better by; values lie between -1 and 1.

    Raises:
        ArgumentError: If a number cannot be used.

    Example:
        >>> patience = rls.callbacks.EarlyStopping(patience=6, min_delta=1e-3)
    """

    def __init__(self, patience: int = 6, min_delta: float = 0.0):
        self.patience = check_count("patience", patience, 1)
        if not is_number(min_delta) or not math.isfinite(min_delta) or min_delta < 0:
            raise ArgumentError(
                f"min_delta={min_delta!r} cannot be used. Expected a number of at least 0, such as "
                "1e-3."
            )
        self.min_delta = float(min_delta)
        self._best, self._waited = -math.inf, 0
        self._target: Any = None

    def on_search_begin(self, logs: dict[str, Any]) -> None:
        """Looks back at the episodes of a search that is continued."""
        self._best, self._waited, self._target = -math.inf, 0, None
        for entry in logs["history"]:
            self._note(entry)
        if self._waited >= self.patience:
            self.stop_stage()

    def on_episode_end(self, episode: int, logs: dict[str, Any]) -> None:
        """Counts the episodes without a better value."""
        self._note(logs)
        if self._waited >= self.patience:
            self.stop_stage()

    def _note(self, logs: Mapping[str, Any]) -> None:
        target = (logs.get("trial"), logs.get("stage"))
        if target != self._target:
            self._target, self._best, self._waited = target, -math.inf, 0
        if logs["value"] > self._best + self.min_delta:
            self._best, self._waited = logs["value"], 0
        else:
            self._waited += 1


class TimeLimit(Callback):
    """Ends the episodes after a time: the final follows, with the best plan so far.

    The time runs from the beginning of the search, and ends with the episode that it is reached in;
    the final takes its own time on top. A search that is continued has what its episodes have left
    of it. How many episodes there are depends on the machine and what else it does, so the same
    call may not give the same result.

    Args:
        seconds: The time, above 0.

    Raises:
        ArgumentError: If that is no such number.

    Example:
        >>> limit = rls.callbacks.TimeLimit(seconds=600)
    """

    def __init__(self, seconds: float):
        if not is_number(seconds) or not math.isfinite(seconds) or seconds <= 0:
            raise ArgumentError(
                f"seconds={seconds!r} cannot be used. Expected a number above 0, such as 600."
            )
        self.seconds = float(seconds)
        self._end = math.inf

    def on_search_begin(self, logs: dict[str, Any]) -> None:
        """Starts the clock."""
        self._end = time.monotonic() + self.seconds - logs["seconds"]
        self._look()

    def on_phase_begin(self, phase: str, logs: dict[str, Any]) -> None:
        """Looks at the clock."""
        self._look()

    def on_episode_end(self, episode: int, logs: dict[str, Any]) -> None:
        """Looks at the clock."""
        self._look()

    def on_phase_end(self, phase: str, logs: dict[str, Any]) -> None:
        """Looks at the clock."""
        self._look()

    def _look(self) -> None:
        if time.monotonic() >= self._end:
            self.stop_episodes()


class CSVLogger(Callback):
    """Writes a line per episode to a CSV file, on the disk before the next episode begins.

    The columns are those of `COLUMNS`; what does not apply is empty. A search that is continued
    continues the file; a new one replaces what an earlier one wrote.

    Args:
        path: The file; its folder has to be there.

    Raises:
        ArgumentError: If no file can be written there.
        FileExistsRLSparsityError: When a search begins, if there is a file which is no such table.

    Example:
        >>> log = rls.callbacks.CSVLogger("episodes.csv")
    """

    COLUMNS = (
        *("episode", "trial", "limit", "stage", "proposed_by", "value", "best_value", "metric"),
        *("loss", "sparsity", "bytes", "improved", "evaluations", "seconds"),
    )

    def __init__(self, path: str | os.PathLike[str]):
        self.path = check_new_file(path, overwrite=True)

    def on_search_begin(self, logs: dict[str, Any]) -> None:
        """Begins the file, or keeps of it what will not be played again."""
        kept: list[Mapping[str, Any]] = [
            row for row in self._rows() if int(row["episode"]) < logs["episode"]
        ]
        known = {int(row["episode"]) for row in kept}
        missing = [entry for entry in logs["history"] if entry["episode"] not in known]
        rows = sorted([*kept, *missing], key=lambda row: int(row["episode"]))
        write_text(self.path, _csv(self.COLUMNS, rows, head=True))

    def on_episode_end(self, episode: int, logs: dict[str, Any]) -> None:
        """Adds a line."""
        row = _csv(self.COLUMNS, [{"episode": episode, **logs}])
        with writing(self.path), open(self.path, "a", encoding="utf-8", newline="") as file:
            file.write(row)

    def _rows(self) -> list[dict[str, str]]:
        if not self.path.exists():
            return []
        try:
            with open(self.path, encoding="utf-8", newline="") as file:
                table = csv.DictReader(file)
                # What a kill cut off has fewer cells, and its episode is in the history.
                rows = [row for row in table if None not in row.values()]
                if tuple(table.fieldnames or ()) == self.COLUMNS:
                    return [row for row in rows if row["episode"].isdecimal()]
        except (OSError, ValueError, csv.Error) as error:
            raise self._foreign(one_line(error)) from error
        raise self._foreign("it has other columns")

    def _foreign(self, why: str) -> FileExistsRLSparsityError:
        return FileExistsRLSparsityError(
            f"{str(self.path)!r} is no table of a CSVLogger ({why}), and is left as it is. Choose "
            "another path, or remove it."
        )


def _csv(columns: Sequence[str], rows: Iterable[Mapping[str, Any]], head: bool = False) -> str:
    text = io.StringIO()
    table = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    if head:
        table.writeheader()
    table.writerows(rows)
    return text.getvalue()


class TensorBoard(Callback):
    """Writes the search to event files that TensorBoard shows.

    Steps are episodes. `search/...` has value, best value, the metric, loss, sparsity and, if they
    are known, bytes; `agent/...` the agent's losses, `sparsity/...` every kernel, and
    `operations/...` the share of the weights under each operation. `evaluation/...` has value and
    metric of every plan, by the number of the evaluation; `seconds/...` what phases took. A search
    that is continued goes on in another file of the same folder.

    Args:
        log_dir: Folder of the event files; it is made if it is missing.

    Raises:
        ArgumentError: If it is no path.
        MissingDependencyError: When a search begins, if TensorBoard is not installed.

    Example:
        >>> board = rls.callbacks.TensorBoard("logs")  # then: tensorboard --logdir logs
    """

    def __init__(self, log_dir: str | os.PathLike[str]):
        self.log_dir = as_path("log_dir", log_dir, "the path of a folder")
        self._writer: Any = None
        self._phases = 0

    def on_search_begin(self, logs: dict[str, Any]) -> None:
        """Opens an event file."""
        try:
            import tensorboard  # noqa: F401
        except ImportError as error:
            raise MissingDependencyError(
                "rls.callbacks.TensorBoard writes its figures with the package tensorboard, which "
                "is not installed. Install it with `pip install tensorboard`, or leave the "
                "callback out."
            ) from error
        import tensorflow as tf

        with writing(self.log_dir):
            self.log_dir.mkdir(parents=True, exist_ok=True)
            self._writer = tf.summary.create_file_writer(os.fspath(self.log_dir))
        self._phases = 0

    def on_phase_end(self, phase: str, logs: dict[str, Any]) -> None:
        """Writes how long it took."""
        self._phases += 1
        self._write(self._phases, {f"seconds/{phase}": logs["seconds"]})

    def on_evaluation(self, logs: dict[str, Any]) -> None:
        """Writes what the plan is worth."""
        figures = {f"evaluation/{name}": logs[name] for name in ("value", "metric", "sparsity")}
        self._write(logs["evaluation"], figures)

    def on_episode_end(self, episode: int, logs: dict[str, Any]) -> None:
        """Writes the episode's figures."""
        names = ("value", "best_value", "metric", "loss", "sparsity", "bytes")
        figures = {f"search/{name}": logs[name] for name in names if logs[name] is not None}
        figures |= {f"agent/{name}": loss for name, loss in logs["losses"].items()}
        figures |= {f"sparsity/{k.path}": k.sparsity for k in logs["plan"].kernels.values()}
        weights = sum(logs["operations"].values())
        for name, count in logs["operations"].items():
            figures[f"operations/{name}"] = count / weights
        self._write(episode, figures)
        self._writer.flush()

    def on_search_end(self, logs: dict[str, Any]) -> None:
        """Closes the file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _write(self, step: int, figures: Mapping[str, float]) -> None:
        import tensorflow as tf

        with writing(self.log_dir), self._writer.as_default():
            for name, value in figures.items():
                tf.summary.scalar(name, value, step=step)


class Listeners:
    """The callbacks of one search, told one after the other."""

    def __init__(self, callbacks: Sequence[Callback] = ()):
        self._callbacks = tuple(callbacks)
        self._begun: list[Callback] = []
        self._started = 0.0

    def __bool__(self) -> bool:
        """Whether anybody listens by now."""
        return bool(self._begun)

    def begin(self, logs: Mapping[str, Any]) -> None:
        """Tells that the search begins; what callbacks asked for in another is forgotten."""
        self._started = time.monotonic()
        for callback in self._callbacks:
            callback.heard(everything=True)
            self._begun.append(callback)
            with python_and_numpy_random_kept():
                callback.on_search_begin(dict(logs))

    def tell(self, hook: str, *arguments: Any) -> None:
        """Calls a method of all callbacks; the last argument is their logs."""
        *first, logs = arguments
        for callback in self._begun:
            with python_and_numpy_random_kept():
                getattr(callback, hook)(*first, dict(logs))

    def end(self, result: Any, error: BaseException | None) -> None:
        """Tells all that the search is over, even if one of them fails.

        The first exception of theirs is raised, unless the search itself has ended in one.
        """
        seconds = time.monotonic() - self._started
        failures = []
        for callback in self._begun:
            try:
                with python_and_numpy_random_kept():
                    callback.on_search_end({"result": result, "error": error, "seconds": seconds})
            except Exception as failure:
                failures.append(failure)
        self._begun = []
        if failures and error is None:
            raise failures[0]

    @property
    def asked(self) -> str:
        """What episodes the callbacks want no more of: `"stage"`, `"all"`, or nothing.

        What they asked of a stage is told once.
        """
        found = {callback.asked for callback in self._begun}
        for callback in self._begun:
            callback.heard()
        return ALL if ALL in found else STAGE if STAGE in found else ""


def check_callbacks(callbacks: Any) -> tuple[Callback, ...]:
    """The callbacks of a search; raises ArgumentError unless all are of this package."""
    found = _listed("callbacks", callbacks, "rls.callbacks.EarlyStopping(patience=6)")
    for one in found:
        if not isinstance(one, Callback):
            hint = ""
            if _keras_of(one):
                hint = " Keras's own go to the final fine-tuning: finetune_callbacks=[...]."
            raise ArgumentError(
                f"callbacks has a {type(one).__name__}, which is no rls.callbacks.Callback. "
                f"Expected instances of classes that derive from it.{hint}"
            )
    return found


def check_keras_callbacks(callbacks: Any) -> tuple[Any, ...]:
    """The callbacks of a final fine-tuning; raises ArgumentError unless all are of Keras 2."""
    name = "finetune_callbacks"
    found = _listed(name, callbacks, "tf_keras.callbacks.TerminateOnNaN()")
    for one in found:
        keras = _keras_of(one)
        if keras == "tf_keras":
            continue
        hint = ""
        if keras:
            hint = " This one is of Keras 3, which the fine-tuning does not run on."
        elif isinstance(one, Callback):
            hint = " Those of rls.callbacks go to callbacks=[...]."
        raise ArgumentError(
            f"{name} has a {type(one).__name__}, which is no tf_keras.callbacks.Callback.{hint} "
            "Expected callbacks of tf_keras, such as tf_keras.callbacks.TerminateOnNaN()."
        )
    return found


def _listed(name: str, callbacks: Any, example: str) -> tuple[Any, ...]:
    if callbacks is None:
        return ()
    if not isinstance(callbacks, list | tuple):
        raise ArgumentError(
            f"{name} is a {type(callbacks).__name__}. Expected a list: {name}=[{example}]."
        )
    for one in callbacks:
        if inspect.isclass(one):
            raise ArgumentError(
                f"{name} has the class {one.__name__}. Expected an instance, made by calling it, "
                f"for example {example}."
            )
    return tuple(callbacks)


def _keras_of(value: Any) -> str:
    """`"keras"` for a callback of Keras 3, `"tf_keras"` for one of Keras 2, else nothing."""
    for base in type(value).__mro__:
        package = base.__module__.partition(".")[0]
        if base.__name__ == "Callback" and package in ("keras", "tf_keras"):
            return package
    return ""
