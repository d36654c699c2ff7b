"""A run's folder as plain values, and what may be believed of them.

The files may come from anywhere. What is of another type than it should be, or not finite, is taken
for missing, so that a section of the report is left out and nothing else happens.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rl_sparsity_tf.errors import FileError, RunError, one_line, printable
from rl_sparsity_tf.files import as_path

_LARGEST_FILE = 2**27
_MOST_EPISODES = 100_000
_MOST_DIGITS = 20
# Larger numbers are no sizes, counts or scores, and their differences leave the doubles.
_LARGEST = 1e15
_LONGEST_TEXT = 2_000


def number(value: Any) -> float | None:
    """A finite number of sensible size; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) and abs(value) <= _LARGEST else None


def whole(value: Any) -> int | None:
    """A number that counts something; None for anything else."""
    found = number(value)
    return int(found) if found is not None and found >= 0 and found == int(found) else None


def text(value: Any, longest: int = _LONGEST_TEXT) -> str | None:
    """A text that only stands there, shortened where it is endless; None for anything else."""
    if not isinstance(value, str):
        return None
    return printable(value[:longest]) + ("..." if len(value) > longest else "")


def fields(value: Any) -> Mapping[str, Any]:
    """A mapping of names; empty for anything else."""
    if not isinstance(value, Mapping):
        return {}
    return {key: one for key, one in value.items() if isinstance(key, str)}


def entries(value: Any) -> list[Mapping[str, Any]]:
    """The mappings of a list."""
    return [fields(one) for one in value if isinstance(one, Mapping)] if _is_list(value) else []


def numbers(value: Any) -> list[float] | None:
    """A list of numbers; None for anything else, or if one is none."""
    found = [number(one) for one in value] if _is_list(value) else [None]
    return None if None in found else [one for one in found if one is not None]


def texts(value: Any) -> list[str]:
    """The texts of a list."""
    found = [text(one) for one in value] if _is_list(value) else []
    return [one for one in found if one]


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def read_run(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads what a report shows of a run, finished or cut off.

    Returns a dict of `name` (of the folder), `metrics`, `plan`, `channels`, `details`, `manifest`
    and `history`, None for what is not there, and `problems`: why a file cannot be used, by name.
    Nothing in them is checked but that they are JSON (the journal and history.csv: rows).

    Raises ArgumentError if it is no path, FileError if the folder cannot be read, and RunError if
    it holds no run, or its metrics.json is damaged.
    """
    folder = as_path("directory", directory, "the folder of a run")
    if not folder.is_dir():
        raise RunError(
            f"{str(folder)!r} is no folder. Expected the folder of a run, which "
            "Compressor(directory=...), result.save(...) or rl-sparsity compress --output made."
        )
    problems: dict[str, str] = {}
    found: dict[str, Any] = {"name": folder.resolve().name, "problems": problems}
    for name in ("metrics", "manifest", "plan", "channels", "details"):
        found[name] = _document(folder / f"{name}.json", problems)
    if found["metrics"] is None and "metrics.json" in problems:
        raise RunError(
            f"The metrics.json in {str(folder)!r} cannot be used ({problems['metrics.json']}). Put "
            "a copy of it back, or remove it to have a report of what else is there."
        )
    if found["metrics"] is None and found["manifest"] is None:
        raise RunError(
            f"The folder {str(folder)!r} holds no run: it has no metrics.json and no "
            "manifest.json that can be read. Expected what Compressor(directory=...), "
            "result.save(...) or rl-sparsity compress --output made."
        )
    found["history"] = _history(folder, problems)
    return found


def _content(path: Path) -> str | None:
    """The text of a file; None if there is none."""
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise ValueError("it is no regular file")
        with open(path, "rb") as file:
            content = file.read(_LARGEST_FILE + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise FileError(
            f"{str(path)!r} cannot be read ({one_line(error)}). Give a folder whose files this "
            "user may read."
        ) from error
    if len(content) > _LARGEST_FILE:
        raise ValueError(f"it has more than {_LARGEST_FILE:,} bytes")
    return content.decode("utf-8")


def _document(path: Path, problems: dict[str, str]) -> Mapping[str, Any] | None:
    try:
        content = _content(path)
        return None if content is None else _parsed(content)
    except (ValueError, RecursionError) as error:
        if isinstance(error, FileError):
            raise
        problems[path.name] = one_line(error)
        return None


def _parsed(content: str) -> Mapping[str, Any]:
    found = json.loads(content, parse_constant=lambda _: None, parse_int=_integer)
    if not isinstance(found, dict):
        raise ValueError("it is no JSON object")
    return found


def _integer(digits: str) -> int | None:
    return int(digits) if len(digits) <= _MOST_DIGITS else None


def _history(folder: Path, problems: dict[str, str]) -> list[Mapping[str, Any]]:
    """The journal's whole lines, or else the rows of history.csv."""
    try:
        journal, table = _content(folder / "journal.jsonl"), _content(folder / "history.csv")
    except FileError:
        raise
    except ValueError as error:
        problems["history"] = one_line(error)
        return []
    rows: list[Mapping[str, Any]] = []
    for line in (journal or "").splitlines()[:_MOST_EPISODES]:
        try:
            rows.append(_parsed(line))
        except (ValueError, RecursionError):  # torn, as where a run was cut off: what is before it
            break
    if rows or not table:
        return rows
    try:
        return [_row(one) for one in csv.DictReader(io.StringIO(table))][:_MOST_EPISODES]
    except csv.Error as error:
        problems["history.csv"] = one_line(error)
        return []


def _row(cells: Mapping[Any, Any]) -> Mapping[str, Any]:
    return {name: _cell(cell) for name, cell in cells.items() if isinstance(name, str)}


def _cell(cell: Any) -> Any:
    if cell in ("True", "False"):
        return cell == "True"
    try:
        return float(cell)
    except (TypeError, ValueError):
        return cell
