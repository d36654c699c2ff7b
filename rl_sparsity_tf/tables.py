"""Tables of text, as lines to print."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.table import Table

from rl_sparsity_tf.errors import printable


def table_lines(table: Table, width: int) -> list[str]:
    """A table drawn without colours; what stands in it is text, no markup.

    Args:
        table: The table.
        width: Characters in a line at most.
    """
    text = io.StringIO()
    console = Console(file=text, width=width, color_system=None, markup=False, emoji=False)
    console.print(table)
    return [printable(line) for line in text.getvalue().rstrip().split("\n")]


def printing(print_fn: Callable[[str], Any]) -> Callable[[str], Any]:
    """The function that lines are printed with, control characters in them written out.

    Args:
        print_fn: Called with every line.
    """
    return lambda line: print_fn(printable(line))
