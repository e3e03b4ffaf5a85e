"""Tables as text."""

from collections.abc import Callable
from io import StringIO
from shutil import get_terminal_size
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["as_text"]


def as_text(table: Callable[[int], "Table"]) -> str:
    """A table, made for a width, as it looks on this terminal, at least 80 characters wide."""
    from rich.console import Console

    file = StringIO()
    console = Console(file=file, width=max(80, get_terminal_size().columns))
    console.print(table(console.width))
    return file.getvalue()
