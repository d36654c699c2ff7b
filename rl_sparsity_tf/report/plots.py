"""Plots of a run, on matplotlib's axes: `rls.plots`.

Each function takes a [Result][rl_sparsity_tf.Result] or a run's folder, draws on `ax` or on new
axes, and returns the axes. matplotlib comes with `pip install rl_sparsity_tf[plots]`.

Example:
    >>> axes = rls.plots.layers(result, show="bits")
    >>> axes.get_xlabel()
    'bits of a weight'
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from rl_sparsity_tf.errors import ArgumentError, MissingDependencyError, RunError, check_choice
from rl_sparsity_tf.report import charts
from rl_sparsity_tf.report import layers as kernels_of
from rl_sparsity_tf.report.maps import OPERATIONS, Decoded, decoded
from rl_sparsity_tf.report.reading import fields, read_run
from rl_sparsity_tf.report.words import Measure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Told apart by people who see fewer colours, too (Okabe and Ito).
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#666666")
_MARKS = ("o", "s", "^", "D", "x", "v", "P")
_OF_OPERATIONS = ("#d55e00", "#e9ecef", "#0072b2", "#009e73")
SHOWN = {
    "density": "share of weights that live",
    "bits": "bits of a weight",
    "bytes": "bytes in the file",
}
"""What [layers][] can show of every kernel."""


def history(run: Any, ax: Axes | None = None) -> Axes:
    """Draws the value of every plan over distinct plans evaluated, and the best so far as a line.

    Values of different stages of a search do not compare; each stage has a line of its own.

    Args:
        run: A result, or the folder of a run, finished or cut off.
        ax: Where to draw.

    Returns:
        The axes: first a line per stage, then points per proposer, with a legend.

    Raises:
        ArgumentError: If `run` is neither.
        RunError: If the folder holds no run, or no episode of it was played.
        MissingDependencyError: Without matplotlib.

    Example:
        >>> axes = rls.plots.history(result)
        >>> axes.figure.savefig("history.png")
    """
    _check_axes(ax)
    found = _run(run)
    points = charts.evaluated(found)
    if not points:
        raise RunError(
            "The run has no episode to draw. Expected the folder of a run that has played one, or "
            "a result."
        )
    axes = _axes(ax)
    for stage in dict.fromkeys(one["stage"] for one in points):
        own = [one for one in points if one["stage"] == stage]
        axes.plot(
            [one["x"] for one in own],
            [one["best"] for one in own],
            drawstyle="steps-post",
            color="black",
            label=None if stage else "best so far",
        )
    for place, name in enumerate(dict.fromkeys(one["by"] for one in points)):
        own = [one for one in points if one["by"] == name]
        axes.plot(
            [one["x"] for one in own],
            [one["value"] for one in own],
            linestyle="none",
            label=name,
            **_look(place),
        )
    axes.set(xlabel="distinct plans evaluated", ylabel="value (reward of the whole plan)")
    axes.legend()
    return axes


def pareto(run: Any, ax: Axes | None = None) -> Axes:
    """Draws the metric over bytes: dense, dense int8, compressed, contenders, and the front.

    Bytes are those of the file, or, where these hardly differ, of the file after gzip.

    Args:
        run: A result, or the folder of a finished run.
        ax: Where to draw.

    Returns:
        The axes: first the Pareto front as a line, then a point per model, with a legend.

    Raises:
        ArgumentError: If `run` is neither.
        RunError: If the folder holds no run, or the run has no figures yet.
        MissingDependencyError: Without matplotlib.

    Example:
        >>> axes = rls.plots.pareto(result)
    """
    _check_axes(ax)
    found = _run(run)
    rows = charts.contenders(found) if fields(found.get("metrics")) else []
    rows = [row for row in rows if row["value"] is not None and row["bytes"]]
    if not rows:
        raise RunError(
            "The run has no sizes and metrics to draw. Expected a run that is finished, with a "
            ".tflite file."
        )
    axes = _axes(ax)
    measure = Measure.of(fields(found.get("metrics")))
    front = charts.pareto(rows, measure.higher_is_better)
    axes.plot(
        [row["bytes"] for row in front],
        [row["value"] for row in front],
        drawstyle="steps-post",
        color="black",
        linestyle="--",
        label="Pareto front",
    )
    for place, row in enumerate(rows):
        ours = row["role"] == "compressed"
        axes.plot(
            [row["bytes"]],
            [row["value"]],
            linestyle="none",
            label=row["name"],
            markersize=10 if ours else 6,
            zorder=2 if ours else 3,  # around others that are as good and as large
            **_look(place),
        )
    packed = " after gzip" if rows[0]["kind"] == "gzip_bytes" else ""
    axes.set(xlabel=f"bytes of the file{packed}", ylabel=measure.words, xscale="log")
    axes.legend()
    return axes


def layers(run: Any, ax: Axes | None = None, *, show: str = "density") -> Axes:
    """Draws a bar for every kernel.

    Args:
        run: A result, or the folder of a finished run.
        ax: Where to draw.
        show: `"density"`, the share of weights that live; `"bits"` of a stored weight; or
            `"bytes"`: in the dense float32 file, and in the compressed one.

    Returns:
        The axes, the kernels in order from above.

    Raises:
        ArgumentError: If `run` or `show` is something else.
        RunError: If the folder holds no run, or the run no plan; for bytes, if it is not known how
            the kernels are stored.
        MissingDependencyError: Without matplotlib.

    Example:
        >>> axes = rls.plots.layers(result, show="bytes")
    """
    check_choice("show", show, SHOWN)
    _check_axes(ax)
    found = _run(run)
    rows = kernels_of.kernels(found)
    if rows is None:
        raise _no_plan()
    after = [row["after"] for row in rows]
    if show == "bytes" and None in after:
        raise RunError(
            "It is not known how many bytes the kernels take in the file. Expected a run with a "
            ".tflite file whose details.json can be read; show='density' needs none."
        )
    axes, places = _axes(ax), np.arange(len(rows))
    if show == "bytes":
        axes.barh(
            places - 0.2, [row["before"] for row in rows], 0.4, label="dense", color=_COLOURS[6]
        )
        axes.barh(places + 0.2, after, 0.4, label="compressed", color=_COLOURS[0])
        axes.set_xscale("log")
        axes.legend()
    else:
        axes.barh(places, [row[show] for row in rows], color=_COLOURS[0])
    axes.set_yticks(places, [row["path"] for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel(SHOWN[show])
    return axes


def operations(run: Any, kernel: str | None = None, ax: Axes | None = None) -> Axes:
    """Draws what became of every group of a kernel, as an image.

    Where whole channels were decided, kernels are those of the original model.

    Args:
        run: A result, or the folder of a finished run.
        kernel: The kernel's path; by default the largest kernel's.
        ax: Where to draw.

    Returns:
        The axes; the image's values are those of [Operation][rl_sparsity_tf.Operation], a row per
        group of inputs and a column per output.

    Raises:
        ArgumentError: If `run` is neither, or there is no such kernel.
        RunError: If the folder holds no run, or the run no plan.
        MissingDependencyError: Without matplotlib.

    Example:
        >>> axes = rls.plots.operations(result, "hidden/kernel")
    """
    _check_axes(ax)
    found = _run(run)
    named: dict[str, Decoded] = {
        one.path: one for one in decoded(found.get("channels")) or decoded(found.get("plan"))
    }
    if not named:
        raise _no_plan()
    chosen = max(named.values(), key=lambda one: one.size).path if kernel is None else kernel
    one = named[check_choice("kernel", chosen, named)]
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    axes = _axes(ax)
    axes.imshow(
        one.operations,
        cmap=ListedColormap(_OF_OPERATIONS),
        vmin=-0.5,
        vmax=len(OPERATIONS) - 0.5,
        aspect="auto",
        interpolation="nearest",
    )
    present = np.unique(one.operations)
    axes.legend(
        handles=[Patch(color=_OF_OPERATIONS[n], label=OPERATIONS[n]) for n in present],
        loc="upper center",  # below, where it hides no group
        bbox_to_anchor=(0.5, -0.12),
        ncols=len(OPERATIONS),
        frameon=False,
    )
    axes.set(title=one.path, xlabel="outputs", ylabel="groups of inputs")
    return axes


def _look(place: int) -> dict[str, Any]:
    return {
        "marker": _MARKS[place % len(_MARKS)],
        "color": _COLOURS[place % len(_COLOURS)],
    }


def _no_plan() -> RunError:
    return RunError(
        "The run has no plan that can be read. Expected a run that is finished, with its plan.json."
    )


def _check_axes(ax: Any) -> None:
    """Raises unless there is matplotlib, and axes are axes."""
    try:
        import matplotlib.axes
    except ImportError as error:
        raise MissingDependencyError(
            "Plots are drawn by matplotlib, which is not installed. Install it: pip install "
            "'rl_sparsity_tf[plots]'."
        ) from error
    if ax is not None and not isinstance(ax, matplotlib.axes.Axes):
        raise ArgumentError(
            f"ax={ax!r} is a {type(ax).__name__}. Expected matplotlib's Axes, as plt.subplots() "
            "makes them, or None for new ones."
        )


def _axes(ax: Axes | None) -> Axes:
    """New axes where none were given; only once it is known that there is something to draw."""
    import matplotlib.pyplot as plt

    return plt.subplots()[1] if ax is None else ax


def _run(run: Any) -> Mapping[str, Any]:
    """A run's documents, of a result or a folder."""
    given = getattr(run, "to_run", None)
    if callable(given):
        return given()
    if isinstance(run, str | os.PathLike):
        return read_run(run)
    raise ArgumentError(
        f"run={run!r} is a {type(run).__name__}. Expected the result of a search, or the folder of "
        "a run."
    )
