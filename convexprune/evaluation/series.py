"""Networks pruned to several ratios by one method, against their parent; and several methods in one table."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from shutil import get_terminal_size
from statistics import mean
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from convexprune.evaluation.potential import Estimate, ExcessError, PrunePotential, excess_error, prune_potential
from convexprune.evaluation.results import WIDE, Evaluation, score_form, shown
from convexprune.evaluation.stored import Stored
from convexprune.files.texts import Json
from convexprune.files.weights import StrPath, existing, read
from convexprune.report.tables import layer_table
from convexprune.solvers.arrays import as_number, checked_count
from convexprune.solvers.errors import InvalidInput, InvalidTolerance

if TYPE_CHECKING:
    from rich.table import Table

RESAMPLES = 1000
_HEADINGS = ("ratio", "score", "ECE", "agreement", "corrupted", "worst", "its score", "agreement there")
_NARROW = 6  # of them that are shown on any terminal
_COMPARED = ("method", "nominal", "mean", "least", "excess error")
_SLOPE = _COMPARED.index("excess error")  # the column whose least is the best


@dataclass(frozen=True)
class Series(Stored):
    """Networks that one method pruned from one parent, on the same samples.

    Attributes:
        name: Of the method.
        ratios: Of each network the part of the parent's nonzero weights that is gone.
        evaluations: One a network, in this order.
        parent: That of the parent.
        control: That of the control, if there was one.
    """

    kind: ClassVar[str] = "series"
    name: str
    ratios: tuple[float, ...]
    evaluations: tuple[Evaluation, ...]
    parent: Evaluation
    control: Evaluation | None = None

    def prune_potential(self, delta: float = 0.005, *, resamples: int = RESAMPLES, seed: int = 0) -> PrunePotential:
        """On each distribution the largest ratio at no loss, its mean and its least, with bootstrap intervals.

        Args:
            delta: The loss of score that counts as none: of accuracy, 0.5 % (Liebenwein et al. 2021).
            resamples: How often samples are drawn again, jointly for all networks and distributions.
            seed: Of the draws.

        Raises:
            InvalidInput: There are fewer than two networks, or there were no labels.
            InvalidTolerance: ``delta`` is no number ≥ 0, or ``resamples`` or ``seed`` no count.
        """
        if not as_number("delta", delta) >= 0:
            raise InvalidTolerance(f"delta: expected a number ≥ 0, found {delta}")
        titles = [row.title for row in self.parent.rows]
        ratios = torch.tensor(self.ratios, dtype=torch.float64)
        outcomes = self._outcomes("the prune potential")
        drawn = (float(delta), *_checked(resamples, seed))
        found = prune_potential(outcomes, ratios, titles, *drawn)
        if not self.parent.noise:
            return found
        networks = [[row.by_image() for row in one.noise] for one in (self.parent, *self.evaluations)]
        under = torch.stack([torch.stack([means for means in rows if means is not None]) for rows in networks])
        radii = {str(row.radius): row.radius for row in self.parent.noise}
        by_radius = prune_potential(under, ratios, [*radii], *drawn).distributions
        return replace(found, noise={radii[title]: value for title, value in by_radius.items()})

    def excess_error(self, *, resamples: int = RESAMPLES, seed: int = 0) -> ExcessError:
        """What corruptions cost each network beyond what they cost the parent, and its regression on the ratio.

        Args:
            resamples: As in ``prune_potential``.
            seed: Likewise.

        Raises:
            InvalidInput: As ``prune_potential``; or there are no corruptions, or all ratios are 0.
        """
        outcomes = self._outcomes("the excess error")
        if len(self.parent.rows) < 2:
            raise InvalidInput("the excess error is the mean over corruptions, and none were evaluated")
        if not any(self.ratios):
            raise InvalidInput(
                "the excess error is regressed on the ratios, and all of them are 0: prune, or give ratios="
            )
        ratios = torch.tensor(self.ratios, dtype=torch.float64)
        return excess_error(outcomes, ratios, *_checked(resamples, seed))

    def _outcomes(self, what: str) -> Tensor:
        """Those of the parent, then of each network, on each distribution: [1 + M, D, samples]."""
        if len(self.evaluations) < 2:
            raise InvalidInput(
                f"{what} needs networks pruned to several ratios: expected at least two, found {len(self.evaluations)}"
            )
        known = [
            [row.outcomes for row in one.rows if row.outcomes is not None] for one in (self.parent, *self.evaluations)
        ]
        if not known[0]:
            raise InvalidInput(f"{what} compares scores, and there were no labels: evaluate on labelled data")
        return torch.stack([torch.stack([outcomes.tensor() for outcomes in rows]) for rows in known])

    def to_dict(self) -> dict[str, object]:
        """Plain data, with the samples' outcomes packed; parent and control are there once."""
        return {
            "name": self.name,
            "ratios": list(self.ratios),
            "evaluations": [replace(one, parent=None, control=None).to_dict() for one in self.evaluations],
            "parent": self.parent.to_dict(),
            "control": None if self.control is None else self.control.to_dict(),
        }

    @classmethod
    def from_dict(cls, data: Json) -> "Series":
        """What ``to_dict`` described."""
        parent = Evaluation.from_dict(data["parent"])
        control = None if data["control"] is None else Evaluation.from_dict(data["control"])
        own = [replace(Evaluation.from_dict(one), parent=parent, control=control) for one in data["evaluations"]]
        return cls(data["name"], tuple(data["ratios"]), tuple(own), parent, control)

    def records(self) -> list[dict[str, object]]:
        """All figures in the long format of ``Evaluation``, with the series and the ratio."""
        found: list[tuple[str, float | None, Evaluation]] = [("parent", 0.0, self.parent)]
        found += [("model", *pair) for pair in zip(self.ratios, self.evaluations, strict=True)]
        found += [] if self.control is None else [("control", None, self.control)]
        return [
            {"series": self.name, "network": network, "ratio": ratio} | own
            for network, ratio, one in found
            for own in one.own_records()
        ]

    def table(self, width: int = 140) -> "Table":
        """A rich table, a row a network, with the prune potential and the excess error below it."""
        networks = {"parent": self.parent}
        networks |= {f"{ratio:.3f}": one for ratio, one in zip(self.ratios, self.evaluations, strict=True)}
        networks |= {} if self.control is None else {"control": self.control}
        cells = [[name, *_cells(one)] for name, one in networks.items()]
        count = len(_HEADINGS) if width >= WIDE else _NARROW
        used = [place for place in range(count) if any(row[place] for row in cells)]
        rows = [[row[place] or "–" for place in used] for row in cells]
        head = [f"{self.name}: {self.parent.nominal.samples:,} samples", *self.parent.notices]
        return layer_table(head, [_HEADINGS[place] for place in used], rows, self._caption(), width)

    def _caption(self) -> list[str]:
        """What columns are; the prune potential and the excess error, or why there are none."""
        lines = ["agreement: the part of the parent's predictions that are the network's, too"]
        if len(self.parent.rows) > 1:
            lines.append("corrupted: the mean score under corruptions; worst: the one under which it is least")
        try:
            potential = self.prune_potential()
            lines.append(f"prune potential: mean {potential.average}, least {potential.minimum}")
            lines.append(f"excess error a ratio: {self.excess_error().slope}")
        except InvalidInput as error:
            lines.append(str(error))
        return lines


def compare(series: Iterable[Series], *, delta: float = 0.005, width: int | None = None) -> "Table":
    """A rich table, a row a method: prune potentials and excess errors, with the best of each column marked by *.

    Args:
        series: On the same distributions of the same samples, each with at least two networks.
        delta: As in ``Series.prune_potential``.
        width: Characters of the terminal, None for this one's; figures have their intervals from 120 on.

    Raises:
        InvalidInput: There is no series, they are of different distributions or samples, or as the figures' own.
    """
    found, width = list(series), get_terminal_size().columns if width is None else width
    if not found:
        raise InvalidInput("compare: expected at least one series, found none")
    seen = {tuple((row.title, row.samples) for row in one.parent.rows) for one in found}
    if len(seen) > 1:
        raise InvalidInput("compare: expected series of the same distributions and samples; evaluate them alike")
    columns: list[list[Estimate]] = []
    potentials = [one.prune_potential(delta) for one in found]
    columns.append([next(iter(each.distributions.values())) for each in potentials])
    if len(found[0].parent.rows) > 1:
        columns += [[each.average for each in potentials], [each.minimum for each in potentials]]
        columns.append([one.excess_error().slope for one in found])
    cells = [_marked(column, least=number == _SLOPE, wide=width >= WIDE) for number, column in enumerate(columns, 1)]
    rows = [[one.name, *texts] for one, *texts in zip(found, *cells, strict=True)]
    caption = [
        f"nominal, mean, least: the prune potential on the nominal distribution and over all (delta {delta:g})",
        "excess error: by which corruptions cost the pruned networks more than their parent, a unit of the ratio",
    ]
    return layer_table([], _COMPARED[: len(columns) + 1], rows, caption[: 1 + (len(columns) > 1)], width)


def _marked(column: Sequence[Estimate], least: bool, wide: bool) -> list[str]:
    """The texts of a column, with a star at the best of them."""
    best = (min if least else max)(each.value for each in column)
    return [f"{each if wide else f'{each.value:.3g}'}{' *' if each.value == best else ''}" for each in column]


def _cells(one: Evaluation) -> list[str]:
    """A network's row, without its name."""
    from rich.markup import escape

    nominal, others = one.nominal, one.rows[1:]
    scored = [(row.score, row.title) for row in others if row.score is not None]
    alike = [row.agreement for row in others if row.agreement is not None]
    form = score_form(one)
    return [
        shown(form, nominal.score),
        shown("{:.3f}", nominal.calibration_error),
        shown("{:.1%}", nominal.agreement),
        shown(form, one.corrupted_score),
        escape(min(scored)[1]) if scored else "",
        shown(form, min(scored)[0] if scored else None),
        shown("{:.1%}", mean(alike) if alike else None),
    ]


def _checked(resamples: int, seed: int) -> tuple[int, int]:
    return checked_count("resamples", resamples), checked_count("seed", seed, 0)


def load_evaluation(path: StrPath) -> Evaluation | Series:
    """Read what ``Evaluation.save`` or ``Series.save`` wrote; raises what ``load`` does."""
    kind = read(existing(path, (".json",))[0], _kind, "the JSON of an evaluation", "write it again with save(path)")
    return Series.load(path) if kind == Series.kind else Evaluation.load(path)


def _kind(path: Path) -> str:
    return str(json.loads(path.read_text(encoding="utf-8"))["kind"])
