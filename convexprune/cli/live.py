"""While a command runs: what it shows people and machines, and Ctrl-C."""

import logging
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from threading import Event
from types import FrameType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from convexprune.files.texts import visible

if TYPE_CHECKING:  # they load slowly
    from rich.progress import Progress

    from convexprune.solvers.certificate.solution import TracePoint

UNCERTIFIED, TIME_LIMIT, NOTHING_PRUNED, INTERRUPTED = 3, 4, 5, 130
"""Exit statuses beside 0, 1 for errors and 2 for misspelt commands."""

console = Console()
errors = Console(stderr=True)


class VisibleFormatter(logging.Formatter):
    """Log records without what would move the cursor."""

    def format(self, record: logging.LogRecord) -> str:
        """As text."""
        return visible(super().format(record))


def show_anything() -> None:
    """Write escapes for characters that the terminal's encoding does not have, in place of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def say(where: Console, text: str) -> None:
    """Print a text as it is, whatever it holds: names and paths are not ours."""
    where.print(visible(text), markup=False, highlight=False, soft_wrap=True)


def print_json(data: Mapping[str, object]) -> None:
    """One object on standard output; NaN and infinity become null."""
    from convexprune.files.weights import plain  # it imports torch, which --help need not wait for

    console.print_json(data=plain(data), ensure_ascii=True, default=str)


class Bars:
    """Two rows: the layers, and the solve that is running; ``progress`` and ``callback`` are for the library."""

    def __init__(self, shown: "Progress") -> None:
        self._shown = shown
        self._layers, self._solve = shown.add_task("", total=None), shown.add_task("", total=None, visible=False)
        self._total = 0

    def progress(self, stage: str, done: int, total: int) -> None:
        """The first row."""
        if stage == "capture":
            self._shown.update(self._layers, description=f"reading the data, {done} batches", total=None)
        elif not total == 1 < self._total:  # one layer of a cascade: its number among all is shown already
            self._total = total
            text = f"{escape(visible(stage, line=True))}, {done}/{total}"
            self._shown.update(self._layers, description=text, completed=done, total=total)
            self._shown.update(self._solve, visible=False)

    def callback(self, layer: str, point: "TracePoint") -> None:
        """The second row."""
        figures = f"iteration {point.iteration}, gap {point.gap:.1e}, violation {point.violation:.1e}"
        text = f"  {escape(visible(layer, line=True))}, {figures}"
        self._shown.update(self._solve, description=text, visible=True)


@contextmanager
def bars(console: Console) -> Iterator[Bars]:
    """Shown on the console while the body runs, if that is a terminal; gone afterwards."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn  # --help need not wait for it

    columns = (BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as shown:
        yield Bars(shown)


@contextmanager
def interruptible(notify: Callable[[], None]) -> Iterator[Event]:
    """The first SIGINT or SIGTERM sets the event and calls ``notify``, the second raises KeyboardInterrupt.

    For the main thread only.
    """
    interrupt = Event()

    def note(_number: int, _frame: FrameType | None) -> None:
        if interrupt.is_set():
            raise KeyboardInterrupt
        interrupt.set()
        notify()

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield interrupt
    finally:
        for number, handler in before.items():
            with suppress(TypeError):  # None: it was not set from Python, and cannot be put back from there
                signal.signal(number, handler)
