"""Charts as inline SVG, light and dark: colours are those of the page's style sheet."""

import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import StringIO
from typing import TYPE_CHECKING, Any

from convexprune.report.page.saved import Curve, Trace

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SERIES = 8
"""Curves that a chart can hold, each in a colour of its own."""

# matplotlib wants colours, the page has variables: these stand for them, and nothing else is drawn in them.
_INK, _MUTED, _LINE, _ONE, _TWO = "#010203", "#010204", "#010205", "#010206", "#010207"
_HUES = tuple(f"#0102{16 + i:02x}" for i in range(SERIES))
_VARIABLES = {_INK: "ink", _MUTED: "muted", _LINE: "line", _ONE: "one", _TWO: "two"} | {
    hue: f"series-{i}" for i, hue in enumerate(_HUES)
}
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a layer may be called $x$
    "font.size": 10,
    "text.color": _INK,
    "axes.edgecolor": _LINE,
    "axes.labelcolor": _MUTED,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "xtick.color": _LINE,
    "ytick.color": _LINE,
    "xtick.labelcolor": _MUTED,
    "ytick.labelcolor": _MUTED,
    "grid.color": _LINE,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "lines.markersize": 3.5,
}
_WIDTH = 4.5  # inches


def bars(name: str, rows: Mapping[str, tuple[float, str]], limits: Mapping[str, float] | None = None) -> str:
    """Horizontal bars, the first on top.

    Args:
        name: What it shows, for those who do not see it; no two charts of a page may have the same.
        rows: By label, the length and the text at its end.
        limits: By label, where a tick marks what was allowed.
    """
    with _drawn(name, 0.45 + 0.23 * max(len(rows), 2)) as (figure, result):
        figure.set_layout_engine("constrained")  # labels are as long as names are
        axes = figure.subplots()
        places = range(len(rows))
        axes.barh(places, [length for length, _ in rows.values()], height=0.62, color=_ONE)
        marks = {place: limits[label] for place, label in enumerate(rows) if limits and label in limits}
        axes.plot(list(marks.values()), list(marks), "|", color=_TWO, markersize=10, markeredgewidth=1.8)
        widest = max([1e-12, *(length for length, _ in rows.values()), *marks.values()])
        for place, label in enumerate(rows):
            end = max(rows[label][0], marks.get(place, 0.0))
            axes.text(end + 0.02 * widest, place, rows[label][1], va="center", color=_INK)
        axes.set_yticks(places, [_short(label) for label in rows])
        axes.tick_params(axis="y", length=0, labelcolor=_INK)
        axes.spines["bottom"].set_visible(False)
        axes.set(xlim=(0, 1.22 * widest), xticks=[], ylim=(len(rows) - 0.4, -0.6))
    return result[0]


def convergence(name: str, trace: Trace, most: int = 120) -> str:
    """Gap and violation by iteration and by seconds, on a log scale down to a thousandth of the least tolerance.

    Args:
        name: As in ``bars``.
        trace: With at least one point.
        most: Points to draw; of longer traces every so many.
    """
    floor = 1e-3 * min([limit for limit in (trace.tol, trace.feas_tol) if limit], default=1e-6)
    stride = -(-len(trace.points) // most)
    points = [*trace.points[:-1:stride], trace.points[-1]]
    with _drawn(name, 1.9) as (figure, result):
        _margins(figure, left=0.115, wspace=0.08)
        for axes, number, label in zip(
            figure.subplots(1, 2, sharey=True), (0, 1), ("iteration", "seconds"), strict=True
        ):
            for column, colour, limit in ((2, _ONE, trace.tol), (3, _TWO, trace.feas_tol)):
                pairs = [(point[number], point[column]) for point in points if point[column]]
                axes.plot([x for x, _ in pairs], [y for _, y in pairs], "o-", color=colour, markeredgewidth=0)
                if limit:
                    axes.axhline(limit, color=colour, linewidth=0.8, dashes=(3, 3))
            axes.set(yscale="log", xlabel=label)
            axes.set_xlim(left=0)
            axes.set_ylim(bottom=max(floor, axes.get_ylim()[0]))
            axes.yaxis.set_major_formatter(lambda value, _: f"1e{round(math.log10(value))}")
            _calm(axes)
    return result[0]


def curves(name: str, found: Sequence[Curve], sizes: Mapping[str, int], chosen: Mapping[str, tuple[float, int]]) -> str:
    """The part of a layer's weights that is left against the layer's error, and where each layer ended.

    Args:
        name: As in ``bars``.
        found: At most ``SERIES`` of them.
        sizes: Weights of each layer.
        chosen: (error, nonzeros) of each layer as it is now.
    """
    with _drawn(name, 3.0) as (figure, result):
        _margins(figure, left=0.125)
        axes = figure.subplots()
        for curve, hue in zip(found, _HUES, strict=False):
            size = max(sizes[curve.layer], 1)
            points = sorted((error, nonzeros / size) for _, error, nonzeros in curve.points)
            axes.plot([x for x, _ in points], [100 * y for _, y in points], "o-", color=hue, markeredgewidth=0)
            if curve.layer in chosen:
                error, nonzeros = chosen[curve.layer]
                style: dict[str, Any] = {
                    "color": hue,
                    "markersize": 9,
                    "markerfacecolor": "none",
                    "markeredgewidth": 1.6,
                }
                axes.plot([error], [100 * nonzeros / size], "o", **style)
        axes.set(xlabel="output error of the layer, relative", ylabel="weights left, %")
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        _calm(axes)
    return result[0]


def _margins(figure: "Figure", **own: float) -> None:
    """Room for what is written at the sides: to measure it would take half of the time."""
    height = figure.get_figheight()
    figure.subplots_adjust(right=0.985, bottom=0.42 / height, top=1 - 0.08 / height, **own)


def _calm(axes: "Axes") -> None:
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    axes.minorticks_off()
    axes.tick_params(length=0)


@contextmanager
def _drawn(name: str, height: float) -> "Iterator[tuple[Figure, list[str]]]":
    """A figure, and the place where its SVG lies afterwards."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    # The salt makes ids the same in every run, and different from those of other charts in the page.
    style: Any = _STYLE | {"svg.hashsalt": name}
    with mpl.rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # only a label's width is measured: the browser has its own fonts
        figure, text = Figure((_WIDTH, height)), StringIO()
        result: list[str] = []
        yield figure, result
        none = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(text, format="svg", transparent=True, metadata=none)
    result.append(_inline(text.getvalue(), name))


def _inline(svg: str, name: str) -> str:
    """What a page needs of it: no prologue, no unused ids, variables for colours."""
    from markupsafe import escape

    body = svg[svg.index("<svg") :]
    used = set(re.findall(r"#([^\"')]+)[\"')]", body))
    body = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", body)
    width, height = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', body).groups()  # type: ignore[union-attr]
    head = f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(name)}">'
    body = head + body[body.index(">") + 1 :]
    body = body.replace("xlink:href=", "href=")
    # A style element would hold for the whole page, which has these rules and the fonts in its own.
    body = re.sub(r"<defs>\s*<style.*?</defs>|\s*<g>\s*</g>|<g/>|font-family: [^;]*; ", "", body, flags=re.DOTALL)
    for colour, variable in _VARIABLES.items():
        body = body.replace(colour, f"var(--{variable})")
    return re.sub(r"\n\s*", "\n", body)


def _short(label: str, most: int = 26) -> str:
    """Qualified names differ at their ends."""
    return label if len(label) <= most else f"…{label[1 - most :]}"
