"""One self-contained HTML page about a run, from what lies in its folder."""

import base64
import hashlib
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from convexprune.errors import DamagedFile
from convexprune.files.texts import Json, visible
from convexprune.files.weights import StrPath, write_atomically
from convexprune.page.charts import as_svg, figure_of, shown_name
from convexprune.page.evaluated import evaluated
from convexprune.page.extras import picture, read_extras
from convexprune.report.report import COLUMNS
from convexprune.runs.results import Results, read_results
from convexprune.solvers import Status
from convexprune.solvers.errors import MissingExtra
from convexprune.targets import target_from_dict

MOST_TRACES, MOST_MAPS, MOST_PATHS = 24, 24, 8
"""The most layers that are shown among the traces, the pictures, and the paths."""

_POINTS = 120  # of a trace; of longer ones every so many are drawn
_ADVICE = {str(status): status.advice for status in Status} | {
    "rounded": "Certified before the weights were rounded to the module's dtype; after it the gap or the violation is "
    "beyond its tolerance. Prune in float32, or loosen tol or feas_tol.",
    "assumption fails": "What the guarantee rests on is listed below the table.",
}
# The salt makes ids the same in every run; a layer may be called $x$, and the browser has its own fonts.
_STYLE = {"svg.fonttype": "none", "svg.hashsalt": "page", "text.parse_math": False, "font.size": 9}
_T = TypeVar("_T")


def write_page(folder: StrPath, out: StrPath | None = None) -> Path:
    """Write one HTML file about a run, that needs nothing else: no script, font or picture from anywhere.

    The same folder gives the same page, byte for byte.

    Args:
        folder: Of the run, with report.json; the journal, extras.json and evaluation.json are shown where they are.
        out: Where to write it; None: report.html in the folder.

    Returns:
        Where it was written.

    Raises:
        InvalidInput: The folder holds no report.json.
        OtherRun: Its journal is of another format.
        DamagedFile: A file in it is not what convexprune writes, or was changed since.
        MissingExtra: jinja2 or matplotlib is not installed.
        OSError: The page cannot be written; what was there before still is.
    """
    try:
        import jinja2
        import matplotlib
    except ImportError as error:
        needed = f'the page needs {error.name}, which is not installed: pip install "convexprune[report]"'
        raise MissingExtra(needed) from error
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    own = (_text, _digest, _scaled, _change, picture)
    environment.filters |= {function.__name__.lstrip("_"): function for function in own} | {"name": shown_name}
    template = environment.from_string((Path(__file__).parent / "page.html").read_text(encoding="utf-8"))
    results, extras = read_results(folder), read_extras(Path(folder))
    try:
        with matplotlib.rc_context(_STYLE), warnings.catch_warnings():  # type: ignore[arg-type]
            warnings.filterwarnings("ignore", "Glyph")
            text = template.render(_view(results, extras) | {"evaluation": evaluated(Path(folder))})
    except (LookupError, TypeError, ValueError, AttributeError, jinja2.UndefinedError) as error:
        lacking = f"{folder}: report.json, extras.json or evaluation.json lacks something ({error!r}); write it again"
        raise DamagedFile(lacking) from error
    return write_atomically(visible(text).encode(), Path(folder) / "report.html" if out is None else Path(out))


def _view(results: Results, extras: tuple[Json, dict[str, Tensor]] | None) -> dict[str, object]:
    """All that the template shows."""
    rows, left_out = results.report.layers, list[str]()
    costs, maps = ({}, {}) if extras is None else extras
    maps_of = list(enumerate(costs.get("maps", ())))
    errors = [error for row in rows for error in (row.promised, row.output_error) if 0 < error < math.inf]
    return {
        "results": results,
        "report": results.report,
        "wanted": _wanted(results.report.provenance),
        "advice": _ADVICE,
        "costs": costs and {"flops": None, "latency": None, **costs},
        "columns": [column for column in COLUMNS if column is COLUMNS[0] or any(map(column.text, rows))],
        "largest": max(errors, default=1),
        "paths": _paths(results, left_out),
        "traces": _traces(results, left_out),
        "maps": maps,
        "shown": _most(maps_of, MOST_MAPS, lambda pair: math.prod(pair[1]["before"]), left_out, "weight maps"),
        "left_out": left_out,
    }


def _wanted(provenance: Json) -> list[str]:
    """The target, and by which method and in which way it was to be reached."""
    target = [str(target_from_dict(provenance["target"]))] if "target" in provenance else []
    names = [name for name in ("method", "mode", "refit", "keep_zeros") if provenance.get(name)]
    return [*target, *(f"{name} {_text(provenance[name])}" for name in names)]


# Filters of the template


def _text(value: object) -> str:
    """Plain data on a line."""
    if value in (None, [], {}, ""):
        return "–"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_text(item)}" for name, item in value.items())
    return ", ".join(map(_text, value)) if isinstance(value, list | tuple) else str(value)


def _digest(script: str) -> str:
    """What the policy knows a script by."""
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _scaled(value: float | None, unit: str) -> str:
    """1,066,440 as 1.07 M, with its unit."""
    from matplotlib.ticker import EngFormatter

    places = 0 if unit == "B" and (value or 0) < 1000 else 2
    return "–" if value is None else str(EngFormatter(unit, places)(value))


def _change(before: float | None, after: float | None, scatter: float = 0.0) -> str:
    """The relative change, or that there is none beyond the scatter."""
    if not before or after is None:
        return "–"
    ratio = after / before - 1
    return "no change" if abs(ratio) <= scatter or round(100 * ratio) == 0 else f"{ratio:+.0%}"


# Charts


def _traces(results: Results, left_out: list[str]) -> list[dict[str, str]]:
    """Gap and violation by iteration of each layer's last solve, that of the goal in its row; of groups the slowest."""
    goals = {row.name: row.goal for row in results.report.layers}
    solved: dict[str, Sequence[Json]] = {}
    for entry in results.entries:
        name, groups = entry["layer"], entry["groups"]
        measured = any(group.get("path") for group in groups)
        if name in goals and groups and not measured and (name not in solved or entry["wanted"] == goals[name]):
            solved[name] = sorted((group["solution"] for group in groups), key=_seconds)
    every = [(name, solved[name]) for name in goals if name in solved]
    drawn = [each for each in every if any(math.isfinite(float(point["gap"])) for point in each[1][-1]["trace"])]
    if not every:
        left_out.append("no convergence traces: the folder has no journal of these layers")
    elif len(drawn) < len(every):
        left_out.append(f"convergence traces of {len(every) - len(drawn)} layers: a budget has no gap to trace")
    return [_trace(*each) for each in _most(drawn, MOST_TRACES, lambda each: _seconds(each[1][-1]), left_out, "traces")]


def _seconds(solution: Json) -> float:
    return sum(map(float, solution["seconds"].values()))


def _trace(name: str, solutions: Sequence[Json]) -> dict[str, str]:
    points, provenance = solutions[-1]["trace"], solutions[-1]["provenance"]
    points = [*points[: -1 : -(-len(points) // _POINTS)], points[-1]]
    figure, axes = figure_of(2.2)
    for key, limit, colour in (("gap", "tol", "C0"), ("violation", "feas_tol", "C1")):
        values = [value if 0 < (value := float(point[key])) < math.inf else math.nan for point in points]
        axes.plot([point["iteration"] for point in points], values, ".-", color=colour, label=key)
        if most := provenance.get("limits", {}).get(limit):
            axes.axhline(float(most), color=colour, linewidth=0.8, linestyle="--")
    axes.set(yscale="log", xlabel="iteration")
    which = f"the slowest of {len(solutions)} groups; " if len(solutions) > 1 else ""
    spent = f"{points[-1]['iteration']:,} iterations, {points[-1]['seconds']:.2f} s"
    note = f"{which}{provenance.get('solver', '')}: {spent}"
    title = shown_name(name)
    return {"title": title, "alt": f"Convergence of {title}", "note": note, "chart": as_svg(figure)}


def _paths(results: Results, left_out: list[str]) -> list[dict[str, str]]:
    """One chart: the part of a layer's weights that is left against its error, groups of a layer added up."""
    every = ((entry["layer"], [group for group in entry["groups"] if group.get("path")]) for entry in results.entries)
    measured = {name: groups for name, groups in every if groups}
    rows = [row for row in results.report.layers if row.name in measured]
    shown = _most(rows, MOST_PATHS, lambda row: row.nonzeros_before, left_out, "measured paths")
    if not shown:
        left_out.append("no paths were measured: a run measures them to allocate eps or a budget over layers")
        return []
    figure, axes = figure_of(3.2)
    for row in shown:
        groups, percent = measured[row.name], 100 / max(row.nonzeros_before, 1)
        sizes = [float(group["size"]) for group in groups]
        points = []
        for step in zip(*(group["path"] for group in groups), strict=True):
            missed = math.hypot(*(float(point[1]) * size for point, size in zip(step, sizes, strict=True)))
            points.append((missed / (math.hypot(*sizes) or 1.0), percent * sum(point[2] for point in step)))
        (line,) = axes.plot(*zip(*sorted(points), strict=True), ".-", label=shown_name(row.name))
        axes.plot([row.output_error], [percent * row.nonzeros], "o", mfc="none", ms=9, color=line.get_color())
    axes.set(xlabel="output error of the layer, relative", ylabel="weights left, %", xlim=(0, None), ylim=(0, None))
    note = "A ring marks where a layer is now."
    return [{"title": "Weights left against error", "alt": "Measured paths", "note": note, "chart": as_svg(figure)}]


def _most(rows: Sequence[_T], most: int, size: Callable[[_T], float], left_out: list[str], what: str) -> list[_T]:
    """The largest, in their own order; of the others ``left_out`` tells."""
    if len(rows) > most:
        left_out.append(f"{what} of {len(rows) - most} of {len(rows)} layers; shown are the largest")
    chosen = sorted(range(len(rows)), key=lambda i: (-size(rows[i]), i))[:most]
    return [rows[i] for i in sorted(chosen)]
