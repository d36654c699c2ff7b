"""Tables of text, as lines to print."""

from __future__ import annotations

import io

from rich.console import Console
from rich.table import Table


def table_lines(table: Table, width: int) -> list[str]:
    """A table drawn without colours.

    Args:
        table: The table.
        width: Characters in a line at most.
    """
    text = io.StringIO()
    Console(file=text, width=width, color_system=None).print(table)
    return text.getvalue().rstrip().splitlines()
