"""Rows of a benchmark, kept in a CSV file as they are measured."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def append(path: Path, row: Mapping[str, Any]) -> None:
    """Adds a row to a file, under a head of its names if the file is new.

    Args:
        path: The file.
        row: Values by name; those of one file have the same names.
    """
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        if new:
            writer.writeheader()
        writer.writerow(row)
