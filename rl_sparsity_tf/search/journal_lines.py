"""Lines of a journal, each with a checksum that the line before goes into."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rl_sparsity_tf.files import sha256_of

# An entry takes about a kilobyte.
LONGEST = 2**20
"""Bytes of a line at most."""
_SEAL = re.compile(rb', "checksum": "([0-9a-f]{16})"\}')
_SEAL_LENGTH = len(', "checksum": "0123456789abcdef"}')


def sealed(entry: Mapping[str, Any], before: str) -> tuple[str, str]:
    """An entry as a line.

    Args:
        entry: JSON values.
        before: The checksum of the line before, or what the journal begins with.

    Returns:
        The line without its end, and its checksum.

    Example:
        >>> line, checksum = sealed({"episode": 0}, "")
    """
    text = json.dumps(entry)
    checksum = _checksum(text.encode(), before)
    return f'{text[:-1]}, "checksum": "{checksum}"}}', checksum


def seal_of(line: bytes) -> str:
    """The checksum that a line says it has; empty if it says none."""
    found = _SEAL.fullmatch(line.rstrip(b"\n")[-_SEAL_LENGTH:])
    return found.group(1).decode() if found else ""


def entry_of(line: bytes, before: str | None) -> dict[str, Any]:
    """Reads a line.

    Args:
        line: The line, with or without its end.
        before: The checksum of the line before; None where lines have none.

    Raises:
        ValueError: Saying what is wrong with it.
    """
    line = line.removesuffix(b"\n")
    if len(line) > LONGEST:
        raise ValueError(f"it has more than {LONGEST:,} bytes")
    if before is not None:
        checksum = seal_of(line)
        if not checksum:
            raise ValueError("it does not end with a checksum")
        line = line[:-_SEAL_LENGTH] + b"}"
        if _checksum(line, before) != checksum:
            raise ValueError("it does not have the checksum that it says")
    try:
        entry = json.loads(line)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(entry, dict):
        raise ValueError("it is no JSON object")
    return entry


def read_lines(path: Path, count: int) -> list[bytes]:
    """Reads the first lines of a file, as many as there are of those wanted.

    Args:
        path: The file.
        count: Lines wanted.
    """
    lines: list[bytes] = []
    with open(path, "rb") as file:
        while len(lines) < count and (line := file.readline(LONGEST + 2)):
            lines.append(line)
    return lines


def _checksum(line: bytes, before: str) -> str:
    return sha256_of(before.encode(), line)[:16]
