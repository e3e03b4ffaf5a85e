"""What an evaluation found: as data, as a table, as files."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from statistics import mean
from typing import TYPE_CHECKING, ClassVar

from convexprune.evaluation.rows import DistributionRow, NoiseRow
from convexprune.evaluation.stored import Stored
from convexprune.files.texts import Json
from convexprune.report.tables import layer_table

if TYPE_CHECKING:
    from rich.table import Table

Row = DistributionRow | NoiseRow
WIDE = 120  # characters of a terminal from which on all columns are shown
_COLUMNS = {  # in their order: whether on wide terminals alone
    "score": False,
    "of parent": False,
    "of control": True,
    "worst class": True,
    "ECE": False,
    "agreement": False,
    "control's": True,
    "distance": False,
    "on mistakes": True,
    "confidence": True,
}


@dataclass(frozen=True)
class Evaluation(Stored):
    """What is known of a network beyond its accuracy.

    Attributes:
        rows: A row a distribution, the nominal one first.
        noise: A row a radius; empty where no noise was wanted.
        notices: What was left out or done otherwise than wanted, as sentences.
        provenance: What it was made with: seed, corruptions, severities, noise, metric, dtype, device, threads,
            versions.
        seconds: For everything, with what was evaluated together.
        parent: The same of the parent, if it was given.
        control: The same of the control.
    """

    kind: ClassVar[str] = "evaluation"
    rows: tuple[DistributionRow, ...]
    noise: tuple[NoiseRow, ...]
    notices: tuple[str, ...]
    provenance: Json
    seconds: float
    parent: "Evaluation | None" = None
    control: "Evaluation | None" = None

    @property
    def nominal(self) -> DistributionRow:
        """The row of the data as they are."""
        return self.rows[0]

    @property
    def corrupted_score(self) -> float | None:
        """The mean of the scores under corruptions; None without any."""
        known = [row.score for row in self.rows[1:] if row.score is not None]
        return mean(known) if known else None

    def to_dict(self) -> dict[str, object]:
        """Plain data, with the samples' outcomes packed."""
        near = {"parent": self.parent, "control": self.control}
        return {
            "rows": [row.to_dict() for row in self.rows],
            "noise": [row.to_dict() for row in self.noise],
            "notices": list(self.notices),
            "provenance": self.provenance,
            "seconds": self.seconds,
            **{name: None if other is None else other.to_dict() for name, other in near.items()},
        }

    @classmethod
    def from_dict(cls, data: Json) -> "Evaluation":
        """What ``to_dict`` described."""
        near = {name: None if data[name] is None else cls.from_dict(data[name]) for name in ("parent", "control")}
        rows = tuple(DistributionRow.from_dict(row) for row in data["rows"])
        noise = tuple(NoiseRow.from_dict(row) for row in data["noise"])
        return cls(rows, noise, tuple(data["notices"]), data["provenance"], data["seconds"], **near)

    def records(self) -> list[dict[str, object]]:
        """All figures in the long format: one a row, with the network, distribution, radius or class that it is of."""
        networks = {"model": self, "parent": self.parent, "control": self.control}
        return [{"network": name} | own for name, found in networks.items() if found for own in found.own_records()]

    def own_records(self) -> Iterator[dict[str, object]]:
        """Those of the network itself."""
        return chain.from_iterable(row.records() for row in chain[DistributionRow | NoiseRow](self.rows, self.noise))

    def table(self, width: int = 140) -> "Table":
        """A rich table, a row a distribution and a radius of noise, without the columns that are all empty.

        On a terminal of less than 120 characters columns are fewer.
        """
        found = [*self._cells(), *self._noise_cells()]
        allowed = [heading for heading, wide in _COLUMNS.items() if not wide or width >= WIDE]
        used = [heading for heading in allowed if any(cells.get(heading) for _, cells in found)]
        rows = [[title, *(cells.get(heading) or "–" for heading in used)] for title, cells in found]
        return layer_table(self.notices, ["distribution", *used], rows, list(self._caption(used)), width)

    def _cells(self) -> Iterator[tuple[str, dict[str, str]]]:
        """The title of each distribution, and what stands in its row, by heading."""
        for number, row in enumerate(self.rows):
            near = (None if one is None else one.rows[number] for one in (self.parent, self.control))
            own = {
                "worst class": shown(f"{{:.1%}} ({row.worst_class})", row.worst_accuracy),
                "ECE": shown("{:.3f}", row.calibration_error),
                "on mistakes": shown(f"{{:.1%}} of {row.mistakes}", row.accuracy_on_mistakes),
                "confidence": shown("{:.1%}", row.confidence_on_mistakes),
            }
            yield row.title, self._compared(row, *near) | own

    def _noise_cells(self) -> Iterator[tuple[str, dict[str, str]]]:
        """Likewise of each radius."""
        for number, row in enumerate(self.noise):
            near = (None if one is None else one.noise[number] for one in (self.parent, self.control))
            yield row.title, self._compared(row, *near)

    def _compared(self, row: Row, parent: Row | None, control: Row | None) -> dict[str, str]:
        """The figures that distributions and noise have both, beside those of the other networks."""
        form = score_form(self)
        return {
            "score": shown(form, row.score),
            "of parent": shown(form, parent.score if parent else None),
            "of control": shown(form, control.score if control else None),
            "agreement": shown("{:.1%}", row.agreement),
            "control's": shown("{:.1%}", control.agreement if control else None),
            "distance": shown("{:.3f}", row.distance),
        }

    def _caption(self, used: Sequence[str]) -> Iterator[str]:
        """What the columns are."""
        yield f"{self.nominal.samples:,} samples; score: {self.provenance.get('metric') or 'accuracy'}"
        if "agreement" in used:
            yield "agreement, distance: with the parent's predictions, to its softmax outputs"
        if "on mistakes" in used:
            yield "on mistakes: accuracy on the samples that the parent has wrong; confidence: mean, there"


def score_form(found: Evaluation) -> str:
    """How scores are written: accuracies in percent, a metric as a number."""
    return "{:.1%}" if found.provenance.get("metric") is None else "{:.4g}"


def shown(form: str, value: float | None) -> str:
    """A figure as text; empty where it is not known."""
    return "" if value is None else form.format(value)
