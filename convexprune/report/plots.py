"""Pictures, as PNG files."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from convexprune.solvers.errors import MissingExtra


def plot_accuracy(
    curves: Mapping[str, Sequence[tuple[float, float]]], dense: tuple[float, float], path: Path, title: str
) -> Path:
    """Accuracy against nonzero weights, a curve a method.

    Args:
        curves: By method, (nonzeros, accuracy in [0, 1]) pairs.
        dense: (nonzeros, accuracy) of the network before.
        path: The PNG to write.
        title: Above the picture.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtra(
            'pictures need matplotlib, which is not installed: pip install "convexprune[demo]"'
        ) from error
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.axhline(100 * dense[1], color="0.6", linestyle="--", label=f"dense, {dense[0]:,.0f} weights")
    for (method, points), marker in zip(curves.items(), "os^vD*", strict=False):
        x, y = zip(*sorted(points), strict=True)
        axes.plot(x, [100 * value for value in y], marker=marker, label=method)
    axes.set(xscale="log", xlabel="nonzero weights", ylabel="test accuracy, %", title=title)
    axes.grid(which="both", alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    return path
