"""What an evaluation in a run's folder found, as a table and charts of its page."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from convexprune.evaluation import Evaluation, Series, load_evaluation
from convexprune.page.charts import as_svg, figure_of

_FILE = "evaluation.json"
_ROW = 0.17  # inches of a bar


def evaluated(folder: Path) -> dict[str, object] | None:
    """What the template shows of the folder's evaluation.json; None where there is none.

    Raises:
        DamagedFile: It was changed or cut short.
    """
    if not (folder / _FILE).exists():
        return None
    found = load_evaluation(folder / _FILE)
    table = found.table(width=200)
    headings = [str(column.header) for column in table.columns]
    rows = list(zip(*(map(str, column.cells) for column in table.columns), strict=True))
    charts = _of_series(found) if isinstance(found, Series) else _of_one(found)
    one = found.parent if isinstance(found, Series) else found
    return {
        "headings": headings,
        "rows": rows,
        "charts": charts,
        "notices": one.notices,
        "samples": one.nominal.samples,
        "facts": str(table.caption).splitlines(),
    }


def _of_one(found: Evaluation) -> list[dict[str, str]]:
    """Scores by distribution beside the parent's, and likeness under noise."""
    charts = []
    known = [(number, row) for number, row in enumerate(found.rows) if row.score is not None]
    if known:
        figure, axes = figure_of(0.9 + 2 * _ROW * len(known))
        places = range(len(known))
        axes.barh([place + 0.2 for place in places], [row.score or 0.0 for _, row in known], 0.4, label="pruned")
        if found.parent is not None:
            parents = [found.parent.rows[number].score or 0.0 for number, _ in known]
            axes.barh([place - 0.2 for place in places], parents, 0.4, color="0.7", label="parent")
        axes.set(yticks=places, yticklabels=[row.title for _, row in known], xlabel="score")
        axes.invert_yaxis()
        charts.append(_chart("Scores by distribution", "", as_svg(figure)))
    return charts + _noise([("pruned", found), *([("control", found.control)] if found.control else [])])


def _of_series(found: Series) -> list[dict[str, str]]:
    """Curves of the score against the ratio, the prune potential, and likeness under noise."""
    charts = []
    ordered = sorted(zip(found.ratios, found.evaluations, strict=True), key=lambda pair: pair[0])
    if found.parent.nominal.score is not None:
        figure, axes = figure_of(3.2)
        for category in dict.fromkeys(row.category for row in found.parent.rows):
            curve = [
                (ratio, mean(row.score or 0.0 for row in one.rows if row.category == category))
                for ratio, one in [(0.0, found.parent), *ordered]
            ]
            axes.plot(*zip(*curve, strict=True), ".-", label=category or "nominal")
        axes.set(xlabel="part of the weights that is gone", ylabel="score, mean of a category")
        charts.append(_chart("Scores against the ratio", "At 0 the parent.", as_svg(figure)))
        if len(found.evaluations) > 1:
            charts.append(_potential(found))
    networks = [(f"{ratio:.0%} gone", one) for ratio, one in ordered]
    return charts + _noise([*networks, *([("control", found.control)] if found.control else [])])


def _potential(found: Series) -> dict[str, str]:
    potential = found.prune_potential()
    titles, estimates = [*potential.distributions], [*potential.distributions.values()]
    figure, axes = figure_of(0.9 + 1.3 * _ROW * len(titles))
    values = [each.value for each in estimates]
    ends = [[max(0.0, e.value - e.low) for e in estimates], [max(0.0, e.high - e.value) for e in estimates]]
    axes.barh(range(len(titles)), values, 0.7, xerr=ends, ecolor="0.3", label="prune potential")
    axes.axvline(potential.average.value, color="C1", linestyle="--", label="mean")
    axes.set(yticks=range(len(titles)), yticklabels=titles, xlim=(0, 1), xlabel="largest ratio at no loss")
    axes.invert_yaxis()
    note = f"A loss below {potential.delta:.1%} counts as none; lines hold 95 % of resampled data."
    return _chart("Prune potential", note, as_svg(figure))


def _noise(networks: Sequence[tuple[str, Evaluation]]) -> list[dict[str, str]]:
    """The agreement with the parent under noise of each radius."""
    if not any(one.noise for _, one in networks):
        return []
    figure, axes = figure_of(3.2)
    for name, one in networks:
        style = "k--" if name == "control" else ".-"
        axes.plot([row.radius for row in one.noise], [row.agreement for row in one.noise], style, label=name)
    axes.set(xlabel="radius of the noise", ylabel="agreement with the parent", ylim=(None, 1.0))
    return [_chart("Likeness under noise", "The part of predictions that are the parent's.", as_svg(figure))]


def _chart(title: str, note: str, chart: str) -> dict[str, str]:
    return {"title": title, "alt": title, "note": note, "chart": chart}
