"""Times .tflite files in LiteRT, one beside the other, and says when the times mean nothing."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rl_sparsity_tf.console import printing
from rl_sparsity_tf.errors import ArgumentError, ExportError
from rl_sparsity_tf.tflite.reading import FlatModel, read_flat_model
from rl_sparsity_tf.tflite.worker import ConversionWorker, WorkerError

# Times that scatter more than this are not reported.
LARGEST_SPREAD = 0.1
# Quartiles of fewer samples are noise.
_FEWEST_RUNS = 5
# Operator -> position of the table that integer inputs select rows of.
_TABLES = {"GATHER": 0, "EMBEDDING_LOOKUP": 1}


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileTiming:
    """The times of one file.

    Attributes:
        path: The file.
        samples_ms: Milliseconds per call, one value per run.
    """

    path: str
    samples_ms: tuple[float, ...]

    @property
    def spread(self) -> float:
        """The interquartile range of the samples over their median."""
        low, median, high = np.percentile(self.samples_ms, [25, 50, 75])
        return float((high - low) / median)

    @property
    def median_ms(self) -> float | None:
        """Median milliseconds per call; None if the spread is above 10 %."""
        return float(np.median(self.samples_ms)) if self.spread <= LARGEST_SPREAD else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timing:
    """The result of [benchmark_tflite][rl_sparsity_tf.benchmark_tflite].

    Attributes:
        file: The times of the file.
        against: Those of the file it is compared with, or None.
        threads: Threads of the interpreters.
        xnnpack: Whether XNNPACK was used.
        batch_size: Rows per call.
    """

    file: FileTiming
    against: FileTiming | None
    threads: int
    xnnpack: bool
    batch_size: int

    @property
    def runs(self) -> int:
        """Number of samples of each file."""
        return len(self.file.samples_ms)

    @property
    def spread(self) -> float:
        """The larger of the files' spreads."""
        return max(timing.spread for timing in self._files())

    @property
    def ratio(self) -> float | None:
        """The file's median time over the other's; None without one or if a spread is too large."""
        if self.against is None or self.file.median_ms is None or self.against.median_ms is None:
            return None
        return self.file.median_ms / self.against.median_ms

    def to_dict(self) -> dict[str, Any]:
        """The timing as JSON-ready values; times and ratios that scatter too much are None."""
        files = [
            {"path": timing.path, "median_ms": timing.median_ms, "spread": timing.spread}
            for timing in self._files()
        ]
        return {
            "file": files[0],
            "against": files[1] if len(files) > 1 else None,
            "ratio": self.ratio,
            "spread": self.spread,
            "spread_is": "interquartile range / median",
            "largest_spread": LARGEST_SPREAD,
            "runs": self.runs,
            "threads": self.threads,
            "xnnpack": self.xnnpack,
            "batch_size": self.batch_size,
        }

    def summary(self, print_fn: Callable[[str], Any] = print) -> None:
        """Prints the medians, their ratio and the spread as a table.

        Args:
            print_fn: Called with every line.
        """
        print_fn = printing(print_fn)
        rows = [
            (timing.path, _shown(timing.median_ms, timing.spread, "ms")) for timing in self._files()
        ]
        if self.against is not None:
            rows.append(("ratio (first / second)", _shown(self.ratio, self.spread, "x")))
        width = max(len(title) for title, _ in rows)
        for title, text in rows:
            print_fn(f"{title.ljust(width)}  {text}")
        print_fn(
            f"Medians of {self.runs} runs{', interleaved' if self.against else ''}; "
            f"{self.threads} thread{'s' if self.threads > 1 else ''}, XNNPACK "
            f"{'on' if self.xnnpack else 'off'}, batch size {self.batch_size}"
        )
        print_fn("Spread: interquartile range / median. Above 10 % nothing counts as measured.")
        if self.spread > LARGEST_SPREAD:
            print_fn("Repeat it on a machine that does nothing else.")

    def _files(self) -> list[FileTiming]:
        return [self.file] if self.against is None else [self.file, self.against]


def benchmark_tflite(
    path: str | os.PathLike[str],
    against: str | os.PathLike[str] | None = None,
    *,
    runs: int = 50,
    threads: int = 1,
    xnnpack: bool = True,
    batch_size: int | None = None,
) -> Timing:
    """Times a .tflite file in LiteRT on this machine, alone or against another one.

    The files run in a process of their own, one interpreter each, in turns, after a warm-up, on
    random inputs. What is slow here need not be slow on another processor.

    Args:
        path: The file.
        against: A file to compare it with.
        runs: Samples per file, at least 5; each covers about 5 ms of calls.
        threads: Threads LiteRT may use.
        xnnpack: Whether LiteRT may use its XNNPACK delegate, as it does by default.
        batch_size: Rows per call; by default what the files fix, else 1.

    Returns:
        The times. A median whose spread is above 10 %, and a ratio with such a median, is None.

    Raises:
        ArgumentError: If a file is missing or no .tflite file, or an argument does not fit it.
        ExportError: If a file is damaged, has TensorFlow operators, or fails in LiteRT.

    Example:
        >>> timing = rls.benchmark_tflite("model.tflite", "dense.tflite")
        >>> share = timing.ratio  # 0.41: in 41 % of the other file's time
    """
    for name, value, least in (("runs", runs, _FEWEST_RUNS), ("threads", threads, 1)):
        _check_count(name, value, least)
    if batch_size is not None:
        _check_count("batch_size", batch_size, 1)
    paths = [str(path)] if against is None else [str(path), str(against)]
    models = [read_flat_model(file) for file in paths]
    for file, model in zip(paths, models, strict=True):
        flex = sorted({operator.name for operator in model.operators if operator.kind == "flex"})
        if flex:
            raise ExportError(
                f"{file} has TensorFlow operators ({', '.join(flex)}), which LiteRT cannot run. "
                "Convert the model with builtin operators only."
            )
    rows = _batch_size(paths, models, batch_size)
    try:
        with ConversionWorker() as worker:
            seconds = worker.time(
                paths,
                index_limits=[_index_limit(model) for model in models],
                runs=runs,
                threads=threads,
                xnnpack=xnnpack,
                batch_size=rows,
            )
    except WorkerError as error:
        if error.reason in ("died", "timeout"):
            raise
        used, other = ("with", "without") if xnnpack else ("without", "with")
        raise ExportError(
            f"LiteRT cannot run a file {used} XNNPACK: {error.detail.strip().rstrip('.')}. "
            "Expected a file with builtin operators and numeric inputs. Time it "
            f"{other} XNNPACK, or export the model again."
        ) from error
    timings = [
        FileTiming(path=file, samples_ms=tuple(1e3 * sample for sample in samples))
        for file, samples in zip(paths, seconds, strict=True)
    ]
    return Timing(
        file=timings[0],
        against=timings[1] if len(timings) > 1 else None,
        threads=threads,
        xnnpack=xnnpack,
        batch_size=rows,
    )


def _shown(value: float | None, spread: float, unit: str) -> str:
    if value is None:
        return f"not measured (spread {spread:.0%})"
    return f"{value:.4g} {unit} (spread {spread:.0%})"


def _check_count(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ArgumentError(f"{name}={value!r} cannot be used. Expected an integer >= {least}.")


def _batch_size(paths: Sequence[str], models: Sequence[FlatModel], asked: int | None) -> int:
    """The number of rows that all files can and shall be run with."""
    fixed = {file: _fixed_batch(model) for file, model in zip(paths, models, strict=True)}
    sizes = {size for size in fixed.values() if size is not None}
    if len(sizes | ({asked} if asked is not None else set())) > 1:
        listed = ", ".join(f"{file}: {size}" for file, size in fixed.items() if size is not None)
        wanted = "" if asked is None else f", batch_size={asked} was asked for"
        raise ArgumentError(
            f"The files fix the batch size ({listed}){wanted}. Expected one size for all: leave "
            "batch_size out, or export files with the same or an open batch size."
        )
    return next(iter(sizes), asked or 1)


def _fixed_batch(model: FlatModel) -> int | None:
    for index in model.graphs[0].inputs if model.graphs else ():
        tensor = model.tensor(0, index)
        if tensor.shape:
            size = (tensor.signature or tensor.shape)[0]
            return None if size < 0 else size
    return None


def _index_limit(model: FlatModel) -> int:
    """What integer inputs must stay below so that every table has the row they ask for."""
    limit = 2**31
    for operator in model.operators:
        if operator.name in _TABLES and len(operator.inputs) > 1:
            table = model.tensor(operator.subgraph, operator.inputs[_TABLES[operator.name]])
            axis = int(operator.options.get("axis", 0) or 0)
            if table.constant and -len(table.shape) <= axis < len(table.shape):
                limit = min(limit, table.shape[axis])
    return limit if limit < 2**31 else 2
