"""The sections below the summary; each adds to ``left_out`` what it does not show."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from convexprune.report.page.charts import SERIES, bars, convergence, curves
from convexprune.report.page.maps import picture
from convexprune.report.page.numerals import figure, number, part
from convexprune.report.page.saved import Curve, Saved, Trace
from convexprune.report.page.words import layer_name

MOST_BARS, MOST_TRACES, MOST_MAPS = 60, 24, 24
"""The most layers in a chart of bars, among the traces, among the pictures."""

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Chart:
    """An SVG below a title; ``legend`` has (text, name of the colour)."""

    title: str
    svg: str
    note: str = ""
    legend: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Pictures:
    """A weight before and after, as data URIs; widths in parts of the wider one."""

    title: str
    note: str
    pair: tuple[tuple[str, str, float], ...]


def layer_bars(saved: Saved, left_out: list[str]) -> list[Chart]:
    """What is left of each layer, and its error with what is promised."""
    rows = _largest(saved.rows, MOST_BARS, lambda row: row["nonzeros_before"])
    _tell(left_out, "bars", rows, saved.rows, "the layers with most weights; the table has all")
    if not rows:
        return []
    left = {_label(row): row["nonzeros"] / max(row["nonzeros_before"], 1) for row in rows}
    whole = number(saved.report.get("nonzeros")), number(saved.report.get("nonzeros_before"))
    mean = whole[0] / whole[1] if whole[0] is not None and whole[1] else None
    found = [
        Chart(
            "Weights left",
            bars("Weights left by layer", {label: (value, part(value)) for label, value in left.items()}),
            "" if mean is None else f"of the weights that were not zero before; all layers together {part(mean)}",
        )
    ]
    errors = {_label(row): number(row.get("output_error")) for row in rows}
    limits = {_label(row): number(row.get("promised")) for row in rows}
    measured = {label: (error, figure(error)) for label, error in errors.items() if error is not None}
    if measured:
        promised = {label: limit for label, limit in limits.items() if limit is not None}
        note = "of each layer's outputs on the calibration data, relative"
        legend = (("measured", "one"), ("promised at most", "two")) if promised else ()
        found.append(Chart("Output error", bars("Output error by layer", measured, promised), note, legend))
    return found


def measured_paths(saved: Saved, left_out: list[str]) -> Chart | None:
    """What each layer would have cost at other errors."""
    rows = [row for row in saved.rows if row["name"] in saved.paths]
    shown = _largest(rows, SERIES, lambda row: row["nonzeros_before"])
    _tell(left_out, "measured paths", shown, rows, "the layers with most weights")
    if not shown:
        left_out.append(
            "no paths were measured in this run: a run measures them to allocate eps or a budget over layers"
        )
        return None
    found: list[Curve] = [saved.paths[row["name"]] for row in shown]
    sizes = {row["name"]: int(row["nonzeros_before"]) for row in shown}
    ends = {row["name"]: (number(row.get("output_error")), int(row["nonzeros"])) for row in shown}
    chosen = {name: (error, left) for name, (error, left) in ends.items() if error is not None}
    legend = tuple((_label(row), f"series-{i}") for i, row in enumerate(shown))
    return Chart("Weights left against error", curves("Measured paths", found, sizes, chosen), "", legend)


def traces(saved: Saved, left_out: list[str]) -> list[Chart]:
    """How the solves went."""
    every = [saved.traces[row["name"]] for row in saved.rows if row["name"] in saved.traces]
    drawn = [trace for trace in every if any(point[2] is not None for point in trace.points)]
    shown = _largest(drawn, MOST_TRACES, lambda trace: trace.points[-1][1])
    _tell(left_out, "convergence traces", shown, drawn, "the layers that took longest")
    if not every:
        left_out.append("no convergence traces: the folder has no journal of these layers")
    elif len(drawn) < len(every):
        left_out.append(f"convergence traces of {_layers(len(every) - len(drawn))}: a budget has no gap to trace")
    return [
        Chart(_title(trace), convergence(f"Convergence of {layer_name(trace.layer)}", trace), _course(trace))
        for trace in shown
    ]


def _title(trace: Trace) -> str:
    group = f", group {trace.group + 1} of {trace.groups}, which took longest" if trace.groups > 1 else ""
    return f"{layer_name(trace.layer)}{group}"


def _course(trace: Trace) -> str:
    iteration, seconds, *_ = trace.points[-1]
    return f"{trace.solver}: {iteration:,} iterations, {seconds:.2f} s"


def weight_maps(saved: Saved, left_out: list[str]) -> list[Pictures]:
    """|w| before and after."""
    if saved.extras is None:
        left_out.append("costs and weight maps: the folder has no extras.json, which save_extras writes")
        return []
    told, maps = saved.extras.data["maps"], saved.extras.maps
    numbered = _largest(list(enumerate(told)), MOST_MAPS, lambda pair: _entries(pair[1]["before"]))
    _tell(left_out, "weight maps", numbered, told, "the largest weights")
    found = []
    for place, row in numbered:
        before, after = (maps[f"{when}.{place}"] for when in ("before", "after"))
        widest = max(before.shape[1], after.shape[1], 1)
        cell = "×".join(str(side) for side in row["cell"])
        size = "a weight" if cell == "1×1" else f"{cell} weights"
        note = f"{row['before'][0]} outputs down, inputs across; a cell is {size}"
        pair = tuple(
            (when, picture(steps), round(100 * steps.shape[1] / widest, 2))
            for when, steps in (("before", before), ("after", after))
        )
        found.append(Pictures(str(row["name"]), note, pair))
    return found


def _layers(number: int) -> str:
    return "1 layer" if number == 1 else f"{number} layers"


def _label(row: Row) -> str:
    return layer_name(str(row["name"]))


def _entries(shape: Sequence[int]) -> int:
    total = 1
    for side in shape:
        total *= int(side)
    return total


def _largest(rows: Sequence[Any], most: int, size: Callable[[Any], float]) -> list[Any]:
    """The largest, in their own order."""
    chosen = sorted(range(len(rows)), key=lambda i: (-size(rows[i]), i))[:most]
    return [rows[i] for i in sorted(chosen)]


def _tell(left_out: list[str], what: str, shown: Sequence[Any], rows: Sequence[Any], which: str) -> None:
    if len(shown) < len(rows):
        left_out.append(f"{what} of {len(rows) - len(shown)} of {len(rows)} layers; shown are {which}")
