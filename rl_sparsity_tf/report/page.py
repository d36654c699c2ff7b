"""The page: templates filled with what a run's files say, everything escaped."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rl_sparsity_tf.errors import MissingDependencyError
from rl_sparsity_tf.files import check_new_file, write_text
from rl_sparsity_tf.report import charts, content, layers
from rl_sparsity_tf.report.maps import decoded
from rl_sparsity_tf.report.reading import read_run
from rl_sparsity_tf.version import __version__

if TYPE_CHECKING:
    import jinja2

REPORT = "report.html"
"""The report's name in a run's folder."""


@functools.cache
def _templates() -> jinja2.Environment:
    try:
        import jinja2
    except ImportError as error:
        raise MissingDependencyError(
            "Reports are made with Jinja2, which is not installed. Install it: pip install jinja2"
        ) from error
    folder = Path(__file__).parent
    found = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # What was drawn is escaped where it was drawn.
    found.filters["drawn"] = jinja2.utils.markupsafe.Markup
    found.globals["style"] = (folder / "style.css").read_text(encoding="utf-8")
    found.globals["version"] = __version__
    return found


def facts(run: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that the templates show of a run."""
    plan = decoded(run.get("plan"))
    return {
        "head": content.headline(run),
        "warnings": content.warnings(run),
        "comparison": charts.comparison(run),
        "curve": charts.curve(run),
        "trials": content.trials(run),
        "kernels": layers.kernels(run, plan),
        "cards": layers.cards(run, plan),
        "exploited": content.exploited(run),
        "verification": content.verification(run),
        "reproduction": content.reproduction(run),
    }


def render_report(run: Mapping[str, Any]) -> str:
    """The page of a run, as [read_run][rl_sparsity_tf.report.reading.read_run] gives it."""
    return _templates().get_template("page.html").render(facts(run))


def render_fragment(run: Mapping[str, Any]) -> str:
    """Headline, table and curve alone, for a notebook."""
    shown = {
        "head": content.headline(run),
        "warnings": content.warnings(run),
        "comparison": charts.comparison(run),
        "curve": charts.curve(run),
    }
    return _templates().get_template("fragment.html").render(shown)


def write_report(
    directory: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    overwrite: bool = False,
) -> Path:
    """Writes the report of a run's folder; returns where.

    By default that is `report.html` in the folder, in place of an earlier one. Raises what
    [read_run][rl_sparsity_tf.report.reading.read_run] does, and FileExistsRLSparsityError if there
    is another file at `output` and `overwrite` is false.
    """
    run = read_run(directory)
    place = Path(directory) / REPORT if output is None else output
    path = check_new_file(place, overwrite or output is None)
    write_text(path, render_report(run))
    return path
