"""A plan's JSON before it is a plan: read from a file and parsed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rl_sparsity_tf.errors import PlanError
from rl_sparsity_tf.json_text import parse_strict


def read_text(path: Path) -> str:
    """Reads a plan's file.

    Raises:
        PlanError: If it is missing or no text.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(
            f"The plan {str(path)!r} cannot be read ({error}). Expected a JSON file written by "
            "plan.save."
        ) from error


def parse_json(text: Any) -> Any:
    """Parses a plan's text.

    Raises:
        PlanError: If it is no JSON.
        RecursionError: If it is nested too deeply.
    """
    try:
        return parse_strict(text)
    except json.JSONDecodeError as error:
        raise PlanError(
            f"The plan is not valid JSON (line {error.lineno}, column {error.colno}: "
            f"{error.msg}). Mend that place, or write the plan again with plan.save(path)."
        ) from error
    except (TypeError, ValueError) as error:  # no text; bytes of none; endless digits, NaN
        raise PlanError(
            f"The plan's text cannot be read ({error}). Expected a str of JSON, as plan.to_json() "
            "returns it."
        ) from error
