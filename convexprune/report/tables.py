"""Tables as text: a row a layer, each on one line, within the width of the terminal."""

from collections import Counter
from collections.abc import Callable, Sequence
from io import StringIO
from itertools import accumulate
from shutil import get_terminal_size
from typing import TYPE_CHECKING

from convexprune.files.texts import visible

if TYPE_CHECKING:
    from rich.table import Table

_LEAST = 80  # characters that a terminal is taken to have at least
_GAP = 2  # characters between columns
_ROOM = 16  # characters that a layer's name gets at least, whatever the figures take


def as_text(table: Callable[[int], "Table"]) -> str:
    """A table, made for a width, as it looks on this terminal, at least 80 characters wide."""
    from rich.console import Console

    file = StringIO()
    console = Console(file=file, width=max(_LEAST, get_terminal_size().columns))
    console.print(table(console.width))
    return file.getvalue()


def layer_table(
    head: Sequence[str], headings: Sequence[str], rows: Sequence[Sequence[str]], caption: Sequence[str], width: int
) -> "Table":
    """A rich table whose first column names layers; names are shortened so that each row takes one line.

    Args:
        head: Lines above the table, as plain text.
        headings: One for each column.
        rows: Cells in the markup of rich; the first of each is a name, taken as it is.
        caption: Lines below the table, as plain text.
        width: Characters of the terminal.
    """
    from rich.box import SIMPLE_HEAD
    from rich.cells import cell_len
    from rich.table import Table
    from rich.text import Text

    columns = list(zip(*[[Text.from_markup(cell).plain for cell in cells[1:]] for cells in rows], strict=True))
    widths = [max(map(cell_len, (heading, *cells))) for heading, cells in zip(headings[1:], columns, strict=False)]
    names, prefix = short_names(
        [visible(cells[0], line=True) for cells in rows], max(_ROOM, width - sum(widths) - _GAP * len(widths))
    )
    lines = [*head, f"… at the start of a name stands for {prefix}"] if prefix else list(head)
    table = Table(
        title=Text(visible("\n".join(lines))) if lines else None,
        title_justify="left",
        title_style="none",
        caption=Text(visible("\n".join(caption))),
        caption_justify="left",
        box=SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, _GAP - 1, 0, 0),
        min_width=min(width, _LEAST),  # for the lines above and below it
    )
    table.add_column(headings[0], overflow="fold")  # the only one that may take several lines: figures are never cut
    for heading in headings[1:]:
        table.add_column(heading, justify="right", no_wrap=True)
    for name, cells in zip(names, rows, strict=True):
        table.add_row(Text(name), *map(visible, cells[1:]))
    return table


def short_names(names: Sequence[str], room: int) -> tuple[list[str], str]:
    """Qualified names within so many characters, and the common beginning that "…" stands for in them, or "".

    Names that fit are left alone. Else the beginning whose omission saves most is left out, up to a dot, and what is
    still too long loses characters in its middle. Where that would make two names alike, they stay whole.
    """
    if max(map(len, names), default=0) <= room:
        return list(names), ""
    shared = Counter(start for name in names for start in accumulate(part + "." for part in name.split(".")[:-1]))
    best = max(shared, key=lambda start: (len(start) - 1) * (shared[start] - 1), default="")
    prefix = best if shared[best] > 1 else ""
    cut = ["…" + name[len(prefix) :] if prefix and name.startswith(prefix) else name for name in names]
    short = [_without_middle(name, room) for name in cut]
    alike = Counter(short)
    return [name if alike[name] == 1 else whole for name, whole in zip(short, cut, strict=True)], prefix


def _without_middle(name: str, room: int) -> str:
    """The name with "…" in place of what is too much; of what is left two thirds are its end."""
    if len(name) <= room:
        return name
    start = (room - 1) // 3
    return f"{name[:start]}…{name[len(name) - (room - 1 - start) :]}"
