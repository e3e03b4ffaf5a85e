"""What an evaluation in a run's folder found, as a table and charts of its page."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from convexprune.evaluation import Evaluation, Series, load_evaluation
from convexprune.page.charts import as_svg, figure_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FILE = "evaluation.json"
_ROW, _FRAME = 0.26, 0.95  # inches of a row of a chart, and of all around the rows
_CLASSES = 20  # that are shown at most


def evaluated(folder: Path) -> dict[str, object] | None:
    """What the template shows of the folder's evaluation.json; None where there is none.

    Raises:
        DamagedFile: It was changed or cut short.
    """
    if not (folder / _FILE).exists():
        return None
    found = load_evaluation(folder / _FILE)
    table = found.table(width=200)
    one = found.parent if isinstance(found, Series) else found
    return {
        "headings": [str(column.header) for column in table.columns],
        "rows": list(zip(*(map(_plain, column.cells) for column in table.columns), strict=True)),
        "charts": _of_series(found) if isinstance(found, Series) else _of_one(found),
        "notices": one.notices,
        "samples": one.nominal.samples,
        "facts": str(table.caption).splitlines(),
    }


def _plain(cell: object) -> str:
    from rich.text import Text

    return cell.plain if isinstance(cell, Text) else Text.from_markup(str(cell)).plain


def _of_one(found: Evaluation) -> list[dict[str, str]]:
    """Scores by distribution and by class beside the parent's, and likeness under noise."""
    charts, parent = list[dict[str, str]](), found.parent
    scores = [row.score for row in found.rows if row.score is not None]
    if scores:
        parents = None if parent is None else [row.score or 0.0 for row in parent.rows]
        titles = [row.title for row in found.rows]
        charts.append(_chart("Scores by distribution", "", _bars(titles, scores, parents, "score")))
    own = {number: value for number, value in enumerate(found.nominal.classes or ()) if value is not None}
    if own:
        before = {} if parent is None else dict(enumerate(parent.nominal.classes or ()))
        lost = {number: (before.get(number) or 0.0) - value for number, value in own.items()}
        least = sorted(sorted(own, key=lambda number: -lost[number])[:_CLASSES])
        parents = [before[number] or 0.0 for number in least] if before else None
        which = "lost most" if before else "are least accurate"
        note = f"Of {len(own)} classes those that {which}." if len(own) > len(least) else "On the data as they are."
        bars = _bars([f"class {number}" for number in least], [own[number] for number in least], parents, "accuracy")
        charts.append(_chart("Accuracy by class", note, bars))
    return charts + _noise([("pruned", found)], found.control)


def _bars(titles: Sequence[str], own: Sequence[float], parents: Sequence[float] | None, what: str) -> "Figure":
    """A row a title, with the parent's figure behind the network's own."""
    figure, axes = figure_of(_FRAME + _ROW * len(titles))
    places = range(len(titles))
    if parents is not None:
        axes.barh(places, parents, 0.8, color="0.8", label="parent")
    axes.barh(places, own, 0.4, label="pruned")
    axes.set(yticks=places, yticklabels=titles, ylim=(len(titles) - 0.4, -0.6), xlabel=what)
    return figure


def _of_series(found: Series) -> list[dict[str, str]]:
    """Curves of the score against the ratio, the prune potential, and likeness under noise."""
    charts = list[dict[str, str]]()
    ordered = sorted(zip(found.ratios, found.evaluations, strict=True), key=lambda pair: pair[0])
    if found.parent.nominal.score is not None:
        figure, axes = figure_of(3.4)
        for category in dict.fromkeys(row.category for row in found.parent.rows):
            curve = [
                (ratio, mean(row.score or 0.0 for row in one.rows if row.category == category))
                for ratio, one in [(0.0, found.parent), *ordered]
            ]
            axes.plot(*zip(*curve, strict=True), ".-", label=category or "nominal")
        axes.set(xlabel="part of the weights that is gone", ylabel="score, mean of a category")
        charts.append(_chart("Scores against the ratio", "At 0 the parent.", figure))
        if len(ordered) > 1:
            charts += _potentials(found)
    return charts + _noise([(f"{ratio:.1%} gone", one) for ratio, one in ordered], found.control)


def _potentials(found: Series) -> list[dict[str, str]]:
    """The prune potential by distribution, and under noise by radius."""
    potential = found.prune_potential()
    titles, estimates = [*potential.distributions], [*potential.distributions.values()]
    figure, axes = figure_of(_FRAME + 0.8 * _ROW * len(titles))
    places = range(len(titles))
    axes.hlines(places, [each.low for each in estimates], [each.high for each in estimates], color="0.6", lw=3)
    axes.plot([each.value for each in estimates], places, "o", label="prune potential", clip_on=False)
    axes.axvline(potential.average.value, color="C1", linestyle="--", label="mean")
    limits = {"xlim": (0, 1), "ylim": (len(titles) - 0.4, -0.6)}
    axes.set(yticks=places, yticklabels=titles, xlabel="largest ratio at no loss", **limits)
    note = f"A loss of score below {potential.delta:g} counts as none; lines hold 95 % of resampled data."
    charts = [_chart("Prune potential", note, figure)]
    if potential.noise:
        figure, axes = figure_of(3.4)
        radii, estimates = [*potential.noise], [*potential.noise.values()]
        ends = [each.low for each in estimates], [each.high for each in estimates]
        axes.fill_between(radii, *ends, color="0.85", label="95 % of resampled data")
        axes.plot(radii, [each.value for each in estimates], ".-", label="prune potential")
        axes.set(xlabel="radius of the noise", ylabel="largest ratio at no loss", ylim=(0, 1))
        charts.append(_chart("Prune potential under noise", "Uniform noise on the inputs.", figure))
    return charts


def _noise(networks: Sequence[tuple[str, Evaluation]], control: Evaluation | None) -> list[dict[str, str]]:
    """The agreement with the parent under noise of each radius."""
    from matplotlib import colormaps

    if not networks[0][1].noise:
        return []
    figure, axes = figure_of(3.2 + 0.06 * len(networks))  # with room for the legend
    lines: list[tuple[str, Evaluation, dict[str, Any]]] = [
        (name, one, {"color": colormaps["viridis"](0.9 * number / len(networks)), "marker": "."})
        for number, (name, one) in enumerate(networks)
    ]
    lines += [] if control is None else [("control", control, {"color": "k", "linestyle": "--"})]
    for name, one, style in lines:
        axes.plot([row.radius for row in one.noise], [row.agreement for row in one.noise], label=name, **style)
    axes.set(xlabel="radius of the noise", ylabel="agreement with the parent", ylim=(None, 1.02))
    return [_chart("Likeness under noise", "The part of predictions that are the parent's.", figure)]


def _chart(title: str, note: str, figure: "Figure") -> dict[str, str]:
    return {"title": title, "alt": title, "note": note, "chart": as_svg(figure, above=True)}
