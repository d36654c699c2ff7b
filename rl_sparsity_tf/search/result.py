"""What a search returns, and the figures of a run: the content of metrics.json, format 1."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tf_keras as keras

from rl_sparsity_tf.agents.policies import SavedPolicy
from rl_sparsity_tf.allocation.alternatives import alternatives_of
from rl_sparsity_tf.allocation.size_budget import formats_for
from rl_sparsity_tf.console import fitted_lines, printing
from rl_sparsity_tf.data.metrics import Metric, Score
from rl_sparsity_tf.environment.candidates import Candidate
from rl_sparsity_tf.environment.network import CompressedNetwork
from rl_sparsity_tf.errors import ArgumentError, FileExistsRLSparsityError, ModelError, one_line
from rl_sparsity_tf.export.arguments import check_path
from rl_sparsity_tf.export.export import export_tflite
from rl_sparsity_tf.export.report import ExportReport, TensorReport
from rl_sparsity_tf.export.verification import score_model
from rl_sparsity_tf.files import check_new_file, replacing, write_text, writing
from rl_sparsity_tf.keras3.door import handed_back
from rl_sparsity_tf.layers.kernels import find_kernels, sparsity_of
from rl_sparsity_tf.layers.operations import Operation
from rl_sparsity_tf.layers.plan import CompressionPlan
from rl_sparsity_tf.report.page import REPORT, render_fragment, render_report
from rl_sparsity_tf.search.early_files import DenseFiles
from rl_sparsity_tf.search.finishing import Exported, Figures, Finished, RemovedChannels, Task
from rl_sparsity_tf.search.run_directory import RESULT_FILES, check_directory
from rl_sparsity_tf.search.run_files import versions
from rl_sparsity_tf.tflite.recipes import check_recipe_path, recipe_path, replacing_with_recipe

if TYPE_CHECKING:
    from rl_sparsity_tf.keras3.graph import Conversion
    from rl_sparsity_tf.search.loop import SearchLoop

_log = logging.getLogger(__name__)


class Result:
    """A compressed model with everything that is known of it.

    Attributes:
        model: The compressed model, plain Keras, compiled as the original; of Keras 3 if that was.
        plan: The plan with the final masks.
        metrics: The figures, as written to metrics.json.
        details: What a report shows beside the figures, as written to details.json: the file's
            tensors and its verification, the alternatives that were measured for each kernel, the
            plans that were evaluated beside the episodes' own, and versions of libraries.
        history: One dict per search episode.
        candidate: The plan as the search found it, before the final fine-tuning.
        channels: What was removed, if whole channels were decided: the plan of the original
            model's channels, and shares of multiplications and time. The model does not have them
            any more, and `plan` says how the kernels that are left are stored.
        report: The report of the .tflite file; None if none was verified. The search is not lost
            with it: `metrics["warnings"]` says what went wrong.
        formats: Whether the file may hold sparse tensors, see `export_tflite`.
        policy: What the agent had learned in the end; None after a search in two levels.

    Example:
        >>> report = result.export_tflite("model.tflite", overwrite=True)
        >>> result.plan.sparsity >= 0.9
        True
        >>> result.save("run")  # model, plan, file, figures and history
    """

    def __init__(
        self,
        task: Task,
        loop: SearchLoop,
        finished: Finished,
        candidate: Candidate,
        metrics: dict[str, Any],
        details: dict[str, Any],
        origin: Conversion | None = None,
        manifest: Mapping[str, Any] | None = None,
    ):
        settings, agent = loop.settings, loop.episodes.agent
        self._tf_keras: keras.Model = finished.model
        self.model: Any = self._handed_back(origin, metrics)
        self.plan: CompressionPlan = finished.plan
        self.channels: RemovedChannels | None = finished.channels
        self.metrics = metrics
        self.details = details
        self._manifest = manifest
        self.history = loop.history
        self.candidate = candidate
        self.report: ExportReport | None = finished.exported.report
        self.figures: Figures = task.figures
        self.formats = formats_for(task.target)
        self.policy = (
            None if settings.hierarchy else SavedPolicy.of(settings.agent, agent, settings.strategy)
        )
        self._tflite = finished.exported.content
        self._quantization = self.report.quantization if self.report else task.quantization

    def _handed_back(self, origin: Conversion | None, metrics: dict[str, Any]) -> Any:
        """The model as Keras 3, if that came in; a search is not lost where that fails."""
        try:
            return handed_back(self._tf_keras, origin)
        except ModelError as error:
            warning = f"the model is handed back as one of tf_keras: {one_line(error, 400)}"
            _log.warning("%s", warning)
            metrics["warnings"] = [*metrics.get("warnings", ()), warning]
            return self._tf_keras

    def __repr__(self) -> str:
        compressed = self.metrics["compressed"]
        return (
            f"Result(sparsity={compressed['sparsity']:.4f}, "
            f"tflite_bytes={compressed['tflite_bytes']}, "
            f"validation_metric={compressed['validation_metric']:.4f})"
        )

    def export_tflite(
        self,
        path: str | os.PathLike[str],
        quantization: str | None = None,
        *,
        overwrite: bool = False,
        batch_size: int | None = None,
        unroll: bool = False,
        stateful: bool = False,
        compute: str = "weight_only",
        formats: str | None = None,
        sparse_inference: str | None = None,
    ) -> ExportReport:
        """Writes the verified .tflite file, or makes one in another mode.

        Args:
            path: Where to write.
            quantization: A mode of `export_tflite`; by default the file that the search made.
            overwrite: Whether an existing file may be replaced.
            batch_size: Fixes the batch size of the file, as `export_tflite` does.
            unroll: Writes recurrent layers without a loop, as `export_tflite` does.
            stateful: Lets LSTM layers keep their state between calls, as `export_tflite` does.
            compute: How the plan's integers compute, as in `export_tflite`.
            formats: Whether tensors may be stored sparse, as in `export_tflite`; by default as the
                target of the search wants it.
            sparse_inference: `"arm"` for a file whose zeros XNNPACK skips on ARM, as in
                `export_tflite`.

        Returns:
            The file's report.
        """
        report, content = self.report, self._tflite
        same = quantization in (None, self._quantization) and compute == "weight_only"
        same = (
            same
            and formats in (None, self.formats)
            and not (unroll or stateful or sparse_inference)
        )
        if same and report and content and batch_size in (None, report.batch_size):
            target = check_path(path, overwrite)
            check_recipe_path(target, overwrite)
            with replacing_with_recipe(target, report.recipe) as temporary:
                temporary.write_bytes(content)
            return dataclasses.replace(report, path=os.fspath(path))
        return export_tflite(
            self._tf_keras,
            path,
            quantization or self._quantization,
            plan=self.plan,
            representative_data=self.figures.representative(self._tf_keras),
            overwrite=overwrite,
            batch_size=batch_size,
            unroll=unroll,
            stateful=stateful,
            compute=compute,
            formats=self.formats if formats is None else formats,
            sparse_inference=sparse_inference,
        )

    def save(self, directory: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Writes the model, its file and plan, and all figures, as files and as a page.

        They are model.keras, model.tflite, plan.json, metrics.json, history.csv, details.json and
        report.html. Beside model.tflite comes model.recipe.json, if LiteRT's quantizer had a part
        in it; and channels.json, the plan of the original model's channels, if channels were
        decided.

        Args:
            directory: A folder; made if it is missing.
            overwrite: Whether files of these names may be replaced.

        Raises:
            FileExistsRLSparsityError: If one of the files is there and `overwrite` is false.
        """
        folder = check_directory(directory)
        present = [name for name in RESULT_FILES if (folder / name).exists()]
        if present and not overwrite:
            raise FileExistsRLSparsityError(
                f"The folder {str(folder)!r} already holds {present}. Choose another folder, or "
                "pass overwrite=True."
            )
        with writing(folder):
            folder.mkdir(exist_ok=True)
        self.write_files(folder)

    def save_policy(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Writes what the agent has learned, to start the search of another network from.

        Args:
            path: A .npz file.
            overwrite: Whether it may be replaced.

        Raises:
            ArgumentError: If the agent was random, the search had two levels, or the path cannot
                be written to.
            FileExistsRLSparsityError: If the file exists and `overwrite` is false.

        Example:
            >>> result.save_policy("policy.npz")
            >>> again = rls.Compressor(model, rls.Target(sparsity=0.8), policy="policy.npz")
        """
        if self.policy is None:
            raise ArgumentError(
                "A policy decides alone. With hierarchy=True there are two agents, of which none "
                "can do that. Expected a search without it to save the policy of."
            )
        self.policy.save(path, overwrite=overwrite)

    def save_report(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Writes the run as one HTML page, which loads nothing: figures, curve, layers and reasons.

        Every run in a directory has one, `report.html`, from its end on.

        Args:
            path: The file to write.
            overwrite: Whether it may be replaced.

        Raises:
            ArgumentError: If the path cannot be written to.
            FileExistsRLSparsityError: If the file exists and `overwrite` is false.

        Example:
            >>> result.save_report("report.html")
        """
        place = check_new_file(path, overwrite)
        write_text(place, render_report(self.to_run()))

    def to_run(self) -> dict[str, Any]:
        """What reports and plots show, as `read_run` gives it of a run's folder."""
        channels = None if self.channels is None else self.channels.plan.to_dict()
        return {
            "name": None,
            "problems": {},
            "metrics": self.metrics,
            "plan": self.plan.to_dict(),
            "channels": channels,
            "details": self.details,
            "manifest": self._manifest,
            "history": self.history,
        }

    def _repr_html_(self) -> str:
        """Headline, table and curve, for a notebook."""
        return render_fragment(self.to_run())

    def write_files(self, folder: Path) -> None:
        """Writes the result's files, each in one step; metrics.json last."""
        with replacing(folder / "model.keras") as temporary:
            self.model.save(temporary)
        file = folder / "model.tflite"
        if self.report is not None and self._tflite is not None:
            with replacing_with_recipe(file, self.report.recipe) as temporary:
                temporary.write_bytes(self._tflite)
        else:  # what an earlier result has left would be taken for this one's
            file.unlink(missing_ok=True)
            recipe_path(file).unlink(missing_ok=True)
        write_text(folder / "plan.json", self.plan.to_json())
        if self.channels is not None:
            write_text(folder / "channels.json", self.channels.plan.to_json())
        write_text(folder / "history.csv", self._history_csv())
        write_text(folder / "details.json", json.dumps(self.details, indent=1) + "\n")
        self._write_page(folder)
        write_text(folder / "metrics.json", json.dumps(self.metrics, indent=2) + "\n")

    def _write_page(self, folder: Path) -> None:
        """Writes the report; what was searched for is not lost where that fails."""
        try:
            page = render_report(self.to_run() | {"name": folder.name})
        except Exception as error:
            warning = f"{REPORT} was not written, because it failed: {one_line(error)}"
            _log.warning("%s", warning)
            self.metrics["warnings"] = [*self.metrics.get("warnings", ()), warning]
            (folder / REPORT).unlink(missing_ok=True)
        else:
            write_text(folder / REPORT, page)

    def _history_csv(self) -> str:
        text = io.StringIO()
        first = self.history[0] if self.history else {}
        names = [key for key in first if key not in ("operations", "losses")]
        counts = [operation.name.lower() for operation in Operation]
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow([*names, *counts])
        for entry in self.history:
            row = [entry[name] for name in names]
            writer.writerow([*row, *(entry["operations"][name] for name in counts)])
        return text.getvalue()

    def _channel_line(self) -> str:
        assert self.channels is not None
        macs, latency = self.channels.macs, self.channels.latency
        parts = [] if macs is None else [f"{macs:.4f} of the multiplications"]
        if latency is not None:
            parts.append(f"{latency:.4f} of the dense file's time (measured)")
        elif self.channels.predicted_latency is not None:
            parts.append(
                f"{self.channels.predicted_latency:.4f} of the dense file's time (predicted; not "
                f"measured, as the samples scatter by {self.channels.latency_spread or 0:.0%})"
            )
        return "left: " + ", ".join(parts or ["see channels.json"])

    def summary(self, print_fn: Callable[[str], Any] = print) -> None:
        """Prints, for every kernel, what was done to it and what it costs in the file.

        Args:
            print_fn: Called with every line.
        """
        print_fn = printing(print_fn)
        stored: dict[str, list[TensorReport]] = {}
        for tensor in self.report.tensors if self.report else ():
            if tensor.kernel:  # several tensors may hold one: the gates of an LSTM
                stored.setdefault(tensor.kernel, []).append(tensor)
        figures = ["keep", "prune", "quantize", "shuffle", "sparsity"]
        figures += ["bits", "bytes before", "bytes after"]
        rows = []
        for kernel in find_kernels(self._tf_keras):
            entry = self.plan.kernels.get(kernel.path)
            tensors = stored.get(kernel.path, [])
            counts = [
                str(entry.weights_under(operation)) if entry else "-" for operation in Operation
            ]
            row = [kernel.path, "x".join(map(str, kernel.shape)), *counts]
            row.append(f"{entry.sparsity:.4f}" if entry else "0")
            row.append("/".join(sorted({tensor.dtype for tensor in tensors})) or "?")
            row.append(f"{kernel.size * 4:,}")
            row.append(f"{sum(tensor.bytes for tensor in tensors):,}" if tensors else "?")
            rows.append(row)
        compressed, dense = self.metrics["compressed"], self.metrics["dense"]
        for line in fitted_lines(
            "Compressed model",
            ["kernel", "shape", *figures],
            rows,
            right=["shape", *figures],
            spare=["bytes before", "shape", "keep", "shuffle"],
            width=130,
        ):
            print_fn(line)
        sizes = (
            f"file {dense['tflite_bytes']:,} -> {compressed['tflite_bytes']:,} bytes, gzipped "
            f"{dense['gzip_bytes']:,} -> {compressed['gzip_bytes']:,}"
            if self.report
            else "no file"
        )
        print_fn(f"sparsity {compressed['sparsity']:.4f} of all weights; {sizes}")
        if self.channels is not None:
            print_fn(self._channel_line())
        for reason, paths in self.metrics["search"].get("left_alone", {}).items():
            print_fn(f"left alone ({reason}): {', '.join(paths)}")
        if "slow_int4" in self.metrics["search"]:
            print_fn(f"note: {self.metrics['search']['slow_int4']['note']}")
        print_fn(f"plan proposed by {self.candidate.found_by}")
        name = self.metrics["metric"]["name"]
        print_fn(f"validation {name} {compressed['validation_metric']:.4f}")
        if compressed["metric"] is not None:
            of_file = compressed["tflite_metric"]
            print_fn(
                f"test {name}: dense {dense['metric']:.4f}, compressed {compressed['metric']:.4f}, "
                f".tflite {'-' if of_file is None else format(of_file, '.4f')}"
            )
        warnings = self.metrics.get("warnings", [])
        for warning in warnings:
            print_fn(f"warning: {warning}")
        for note in self.report.notes if self.report else ():
            if note not in warnings:
                print_fn(f"note: {note}")


FORMAT_VERSION = 1


def build_metrics(
    task: Task,
    loop: SearchLoop,
    finished: Finished,
    candidate: Candidate,
    dense: DenseFiles,
    *,
    seconds: float,
    dataset: str | None,
    search: Mapping[str, Any],
) -> dict[str, Any]:
    """Gathers the figures of a run: the document that `metrics.json` holds.

    Figures named `accuracy` and `metric` are on the test data and null without it; for a model
    whose metric is not an accuracy, `accuracy` is null. `tflite_...` are of the file itself, run in
    LiteRT; those of `dense_int8` too. Where channels were removed, `macs` and `predicted_latency`
    are shares of the dense model's, and `latency` that of its file's time, measured here; null if
    it was not. Sizes are null where no file was verified, and `warnings` says why; the result's own
    warnings come on top.

    `evaluations` counts distinct plans; `search` is what else is said of the search.
    """
    report = finished.exported.report
    model, metric, test = task.model, task.figures.metric, task.figures.test
    dense_test = score_model(model, test, metric) if test else None
    return {
        "format_version": FORMAT_VERSION,
        "dataset": dataset,
        "agent": loop.settings.agent.name,
        "seed": loop.settings.seed,
        "metric": metric.to_dict(),
        "dense": {**_figures(metric, dense_test), **_sizes(dense.float32)},
        "dense_int8": {**_figures(metric, dense.int8.test), **_sizes(dense.int8)},
        "compressed": {
            **_figures(metric, finished.test),
            **_figures(metric, finished.validation, "validation_"),
            **_figures(metric, finished.exported.test, "tflite_"),
            "sparsity": sparsity_of(finished.model, model),
            **_sizes(finished.exported),
            "max_abs_difference": None if report is None else report.max_abs_difference,
            "batch_size": None if report is None else report.batch_size,
            "proposed_by": candidate.proposed_by,
            **_channels(finished),
        },
        "search": {
            "episodes": loop.done,
            "evaluations": loop.evaluations,
            "seconds": seconds,
            "operations": finished.plan.count_operations(),
            **search,
        },
        "baselines": [],
        "warnings": list(dict.fromkeys([*dense.warnings, *finished.warnings])),
    }


def build_details(
    task: Task, loop: SearchLoop, finished: Finished, candidate: Candidate
) -> dict[str, Any]:
    """Gathers what a report shows beside the figures: the document that `details.json` holds."""
    report = finished.exported.report
    file = None if report is None else report.to_dict()
    hidden = ("path", "recipe")  # the first is of a scratch folder, the second has its own file
    return {
        "format_version": FORMAT_VERSION,
        "versions": versions(),
        "file": file and {name: value for name, value in file.items() if name not in hidden},
        "alternatives": alternatives_of(task.network, candidate.plan),
        "considered": loop.considered,
    }


def baseline_entry(
    name: str, model: keras.Model, finished: Finished, metric: Metric, evaluations: int
) -> dict[str, Any]:
    """The figures of a baseline, as metrics.json lists them."""
    return {
        "name": name,
        **_figures(metric, finished.test),
        **_figures(metric, finished.validation, "validation_"),
        **_figures(metric, finished.exported.test, "tflite_"),
        **_sizes(finished.exported),
        "sparsity": sparsity_of(finished.model, model),
        "evaluations": evaluations,
        **_channels(finished),
        **({"warnings": list(finished.warnings)} if finished.warnings else {}),
    }


def _channels(finished: Finished) -> dict[str, float | None]:
    return {} if finished.channels is None else finished.channels.to_dict()


def _figures(metric: Metric, score: Score | None, prefix: str = "") -> dict[str, float | None]:
    value = None if score is None else score.metric
    return {
        f"{prefix}accuracy": value if metric.is_accuracy else None,
        f"{prefix}metric": value,
    }


def _sizes(exported: Exported) -> dict[str, int | None]:
    report = exported.report
    return {
        "tflite_bytes": None if report is None else report.tflite_bytes,
        "gzip_bytes": None if report is None else report.gzip_bytes,
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinishedSearch(Task):
    """A search that has returned; its network keeps its cached data and traced functions.

    Attributes:
        plain: The network of single weights at 8 bits, where the search chose another storage by
            itself; else the searched one.
    """

    plain: CompressedNetwork
    loop: SearchLoop
    result: Result
    episodes: int
