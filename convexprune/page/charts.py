"""Charts for pages: drawn by matplotlib, shown as data URIs of SVG."""

import base64
import io
from typing import TYPE_CHECKING

from convexprune.files.texts import visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def shown_name(name: str) -> str:
    """A layer's name as it is shown; a model that is a single layer has none."""
    return visible(str(name), line=True) or "(the model)"


def figure_of(height: float) -> "tuple[Figure, Axes]":
    """An empty figure of so many inches."""
    from matplotlib.figure import Figure

    figure = Figure((5, height), layout="constrained")
    axes = figure.subplots()
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    return figure, axes


def as_svg(figure: "Figure", above: bool = False) -> str:
    """The chart as a data URI, with its legend within, where most is free, or above it."""
    if above:
        figure.legend(loc="outside upper center", ncols=3)
    else:
        figure.axes[0].legend()
    svg = io.BytesIO()
    figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.getvalue()).decode()}"
