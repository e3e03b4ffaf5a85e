"""While a command runs: what the terminal shows, and Ctrl-C."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

__all__ = ["Bars", "Interrupt", "bars", "interruptible"]


class Bars:
    """Two rows: the layers, and the solve that is running; ``progress`` and ``callback`` are for the library."""

    def __init__(self, shown: Progress) -> None:
        self._shown = shown
        self._layers = shown.add_task("", total=None, count="", note="")
        self._solve = shown.add_task("", total=None, count="", note="", visible=False)
        self._total = 0

    def progress(self, stage: str, done: int, total: int) -> None:
        """The first row."""
        if stage == "capture":
            self._shown.update(self._layers, description="reading the data", count=f"{done} batches", total=None)
            return
        if total < self._total:  # one layer of a cascade: its number among all was told before
            return
        self._total = total
        self._shown.update(self._layers, description=stage, completed=done, total=total, count=f"{done}/{total}")
        self._shown.update(self._solve, visible=False)

    def callback(self, layer: str, point: Any) -> None:
        """The second row."""
        note = f"iteration {point.iteration}, gap {point.gap:.1e}, violation {point.violation:.1e}"
        self._shown.update(self._solve, description=f"  {layer}", note=note, visible=True)


@contextmanager
def bars(console: Console) -> Iterator[Bars]:
    """Shown on the console while the body runs, if that is a terminal; gone afterwards."""
    count, note = TextColumn("{task.fields[count]}"), TextColumn("{task.fields[note]}")
    columns = (TextColumn("{task.description}"), BarColumn(), count, TimeElapsedColumn(), note)
    with Progress(*columns, console=console, transient=True) as shown:
        yield Bars(shown)


class Interrupt:
    """Whether a signal asked to stop; to be called."""

    asked = False

    def __call__(self) -> bool:
        return self.asked


@contextmanager
def interruptible(tell: Callable[[], None]) -> Iterator[Interrupt]:
    """The first SIGINT or SIGTERM is only noted, and told; the second raises KeyboardInterrupt. Main thread only."""
    interrupt = Interrupt()

    def note(number: int, frame: FrameType | None) -> None:
        if interrupt.asked:
            raise KeyboardInterrupt
        interrupt.asked = True
        tell()

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield interrupt
    finally:
        for number, handler in before.items():
            with suppress(TypeError):  # None: it was not set from Python, and cannot be put back from there
                signal.signal(number, handler)
