"""One self-contained HTML page about a run, from what lies in its folder."""

import base64
import hashlib
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from torch import Tensor

from convexprune.errors import DamagedFile
from convexprune.files.texts import Json, visible
from convexprune.files.weights import StrPath, write_atomically
from convexprune.page.consistency import Results, read_results
from convexprune.page.extras import picture, read_extras
from convexprune.report.report import COLUMNS, Column, LayerReport
from convexprune.solvers import Status
from convexprune.solvers.errors import MissingExtra
from convexprune.targets import target_from_dict

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_TRACES, MOST_MAPS, MOST_PATHS = 24, 24, 8
"""The most layers that are shown among the traces, the pictures, and the paths."""

_POINTS = 120  # of a trace; of longer ones every so many are drawn
_ADVICE = {str(status): status.advice for status in Status} | {
    "rounded": "Certified before the weights were rounded to the module's dtype; after it the gap or the violation is "
    "beyond its tolerance. Prune in float32, or loosen tol or feas_tol.",
    "assumption fails": "What the guarantee rests on is listed below the table.",
}
_COLUMNS = (
    *COLUMNS[:-1],
    Column("promised", "most that the error may be", False, lambda r: f"{r.promised:.4g}" if _promises(r) else ""),
    Column("came back", "weights that were zero before", False, lambda r: f"{r.returned:,}" if r.returned else ""),
    COLUMNS[-1],
)
_T = TypeVar("_T")


def write_page(folder: StrPath, out: StrPath | None = None) -> Path:
    """Write one HTML file about a run, that needs nothing else: no script, font or picture from anywhere.

    The same folder gives the same page, byte for byte.

    Args:
        folder: Of the run, with report.json; the journal and extras.json are shown where they are.
        out: Where to write it; None: report.html in the folder.

    Returns:
        Where it was written.

    Raises:
        InvalidInput: The folder holds no report.json.
        OtherRun: Its journal is of another format.
        DamagedFile: A file in it is not what convexprune writes, or report.json is not what the others say.
        MissingExtra: jinja2 or matplotlib is not installed.
        OSError: The page cannot be written; what was there before still is.
    """
    try:
        import jinja2
        import matplotlib  # noqa: F401 - for the charts, before anything is read
    except ImportError as error:
        missing = f'the page needs {error.name}, which is not installed: pip install "convexprune[report]"'
        raise MissingExtra(missing) from error
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    own = (_name, _text, _digest, _scaled, _change, picture)
    environment.filters |= {function.__name__.lstrip("_"): function for function in own}
    template = environment.from_string((Path(__file__).parent / "page.html").read_text(encoding="utf-8"))
    results, extras = read_results(folder), read_extras(Path(folder))
    try:
        text = template.render(_view(results, extras))
    except (KeyError, TypeError, ValueError, AttributeError, jinja2.UndefinedError) as error:
        lacking = f"{folder}: report.json or extras.json lacks something ({error!r}); write it again"
        raise DamagedFile(lacking) from error
    return write_atomically(visible(text).encode(), Path(folder) / "report.html" if out is None else Path(out))


def _view(results: Results, extras: tuple[Json, dict[str, Tensor]] | None) -> dict[str, object]:
    """All that the template shows."""
    rows, left_out = results.checks.report.layers, list[str]()
    if extras is None:
        left_out.append("costs and weight maps: the folder has no extras.json, which save_extras writes")
    costs, maps = ({}, {}) if extras is None else extras
    numbered = list(enumerate(costs.get("maps", ())))
    promised = [row.promised for row in rows if _promises(row)]
    return {
        "results": results,
        "report": results.checks.report,
        "wanted": _wanted(results.checks.report.provenance),
        "advice": _ADVICE,
        "costs": costs and {"flops": None, "latency": None, **costs},
        "columns": [column for column in _COLUMNS if column is COLUMNS[0] or any(map(column.text, rows))],
        "largest": max((error for error in (*promised, *(row.output_error for row in rows)) if error > 0), default=1),
        "paths": _paths(results, left_out),
        "traces": _traces(results, left_out),
        "maps": maps,
        "shown": _most(numbered, MOST_MAPS, lambda pair: math.prod(pair[1]["before"]), left_out, "weight maps"),
        "left_out": left_out,
    }


def _wanted(provenance: Json) -> list[str]:
    """The target, and by which method and in which way it was to be reached."""
    target = [str(target_from_dict(provenance["target"]))] if "target" in provenance else []
    names = [name for name in ("method", "mode", "refit", "keep_zeros") if provenance.get(name)]
    return [*target, *(f"{name} {_text(provenance[name])}" for name in names)]


def _promises(row: LayerReport) -> bool:
    return math.isfinite(row.promised)


# Filters of the template


def _name(name: str) -> str:
    """A layer's name as it is shown; a model that is a single layer has none."""
    return visible(str(name), line=True) or "(the model)"


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
    """Gap and violation by iteration of each layer's last solve, that of the goal in its row."""
    goals = {row.name: row.goal for row in results.checks.report.layers}
    solved: dict[str, Sequence[Json]] = {}
    for data in results.records:
        name, groups = data["layer"], data["groups"]
        if name not in goals or not groups or any(group.get("path") for group in groups):
            continue
        if name not in solved or data["wanted"] == goals[name]:
            solved[name] = groups
    every = [(name, *_longest(solved[name])) for name in goals if name in solved]
    drawn = [solve for solve in every if any(math.isfinite(float(point["gap"])) for point in solve[2]["trace"])]
    if not every:
        left_out.append("no convergence traces: the folder has no journal of these layers")
    elif len(drawn) < len(every):
        left_out.append(f"convergence traces of {len(every) - len(drawn)} layers: a budget has no gap to trace")
    shown = _most(drawn, MOST_TRACES, lambda solve: float(solve[2]["trace"][-1]["seconds"]), left_out, "traces")
    return [_trace(name, group, solution) for name, group, solution in shown]


def _longest(groups: Sequence[Json]) -> tuple[str, Json]:
    """Of a layer's groups the one that took longest: which it is, and its solution."""
    times = [sum(map(float, group["solution"]["seconds"].values())) for group in groups]
    place = max(range(len(times)), key=times.__getitem__)
    which = f"group {place + 1} of {len(times)}, which took longest; " if len(times) > 1 else ""
    return which, groups[place]["solution"]


def _trace(name: str, group: str, solution: Json) -> dict[str, str]:
    points, provenance = solution["trace"], solution["provenance"]
    points = [*points[: -1 : -(-len(points) // _POINTS)], points[-1]]
    with _chart(f"Convergence of {_name(name)}", 2.2) as (axes, svg):
        for key, limit, colour in (("gap", "tol", "C0"), ("violation", "feas_tol", "C1")):
            values = [value if 0 < (value := float(point[key])) < math.inf else math.nan for point in points]
            axes.plot([point["iteration"] for point in points], values, ".-", color=colour, label=key)
            if most := provenance.get("limits", {}).get(limit):
                axes.axhline(float(most), color=colour, linewidth=0.8, linestyle="--")
        axes.set(yscale="log", xlabel="iteration")
        axes.legend()
    note = (
        f"{group}{provenance.get('solver', '')}: {points[-1]['iteration']:,} iterations, {points[-1]['seconds']:.2f} s"
    )
    return {"title": _name(name), "note": note, "svg": svg[0]}


def _paths(results: Results, left_out: list[str]) -> list[dict[str, str]]:
    """One chart: the part of a layer's weights that is left against its error, groups of a layer added up."""
    every = ((data["layer"], [group for group in data["groups"] if group.get("path")]) for data in results.records)
    measured = {name: groups for name, groups in every if groups}
    rows = [row for row in results.checks.report.layers if row.name in measured]
    shown = _most(rows, MOST_PATHS, lambda row: row.nonzeros_before, left_out, "measured paths")
    if not shown:
        left_out.append("no paths were measured: a run measures them to allocate eps or a budget over layers")
        return []
    with _chart("Measured paths", 3.2) as (axes, svg):
        for row in shown:
            groups, percent = measured[row.name], 100 / max(row.nonzeros_before, 1)
            sizes = [float(group["size"]) for group in groups]
            points = []
            for step in zip(*(group["path"] for group in groups), strict=True):
                missed = math.hypot(*(float(point[1]) * size for point, size in zip(step, sizes, strict=True)))
                points.append((missed / (math.hypot(*sizes) or 1.0), percent * sum(point[2] for point in step)))
            (line,) = axes.plot(*zip(*sorted(points), strict=True), ".-", label=_name(row.name))
            axes.plot([row.output_error], [percent * row.nonzeros], "o", mfc="none", ms=9, color=line.get_color())
        axes.set(xlabel="output error of the layer, relative", ylabel="weights left, %", xlim=(0, None), ylim=(0, None))
        axes.legend()
    return [{"title": "Weights left against error", "note": "A ring marks where a layer is now.", "svg": svg[0]}]


@contextmanager
def _chart(name: str, height: float) -> "Iterator[tuple[Axes, list[str]]]":
    """Axes to draw in, and where the SVG lies afterwards; no two charts of a page have the same name."""
    from markupsafe import escape
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    # The salt makes ids the same in every run; a layer may be called $x$, and the browser has its own fonts.
    style = {"svg.fonttype": "none", "svg.hashsalt": name, "text.parse_math": False, "font.size": 9}
    with rc_context(style), warnings.catch_warnings():  # type: ignore[arg-type]
        warnings.filterwarnings("ignore", "Glyph")
        figure, text, svg = Figure((5, height), layout="constrained"), StringIO(), list[str]()
        axes = figure.subplots()
        axes.grid(alpha=0.3)
        yield axes, svg
        none = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(text, format="svg", transparent=True, metadata=none)
    _, head, body = re.split(r"<svg([^>]*)>", text.getvalue(), maxsplit=1)
    body, box = body.replace("xlink:href=", "href="), re.findall(r'viewBox="[^"]*"', head)[0]
    used = set(re.findall(r"#([^\"')]+)[\"')]", body))
    body = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", body)
    svg.append(f'<svg {box} role="img" aria-label="{escape(name)}">{body}')


def _most(rows: Sequence[_T], most: int, size: Callable[[_T], float], left_out: list[str], what: str) -> list[_T]:
    """The largest, in their own order; of the others ``left_out`` tells."""
    if len(rows) > most:
        left_out.append(f"{what} of {len(rows) - most} of {len(rows)} layers; shown are the largest")
    chosen = sorted(range(len(rows)), key=lambda i: (-size(rows[i]), i))[:most]
    return [rows[i] for i in sorted(chosen)]
