"""What came of verifying a run, as data and as a table."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from convexprune.report.report import LayerReport
from convexprune.report.tables import as_text, layer_table

if TYPE_CHECKING:
    from rich.table import Table

_COLUMNS = ("layer", "asked", "status", "ℓ1 value", "bound", "gap", "violation", "error", "verdict")
_NARROW = ("layer", "gap", "violation", "error", "verdict")
_WIDE = 120


@dataclass(frozen=True)
class VerifiedLayer:
    """One entry of a run directory.

    Attributes:
        name: Of the layer.
        goal: What was asked of it.
        recorded: The row that the entry tells of; None where it cannot be read or posed.
        recomputed: The same from the recorded weights and multipliers, the model and the data; None likewise.
        differences: What is not as recorded; empty if all is.
    """

    name: str
    goal: str
    recorded: LayerReport | None
    recomputed: LayerReport | None
    differences: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether all that is recorded holds."""
        return not self.differences

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        rows = {
            name: row and asdict(row) for name, row in (("recorded", self.recorded), ("recomputed", self.recomputed))
        }
        return {"name": self.name, "goal": self.goal, "ok": self.ok, **rows, "differences": list(self.differences)}

    def cells(self) -> dict[str, str]:
        """Texts by column; figures are those recomputed."""
        texts = dict.fromkeys(_COLUMNS, "–") | {"layer": self.name, "asked": self.goal}
        if self.recorded is not None:
            texts["status"] = self.recorded.status
        if (row := self.recomputed) is not None:
            figures = {"ℓ1 value": f"{row.value:.6g}", "bound": f"{row.bound:.6g}", "violation": f"{row.violation:.1e}"}
            if row.gap < float("inf"):
                texts |= {**figures, "gap": f"{row.gap:.1e}"}
            texts["error"] = f"{row.output_error:.4f}"
        return texts | {"verdict": "as recorded" if self.ok else "[red]differs[/red]"}


@dataclass(frozen=True)
class Verification:
    """What was recomputed of a run directory.

    Attributes:
        layers: A row for each entry that the recipe leads to, in that order.
        missing: Layers that the recipe asks for and the run has not come to.
        unreached: Files of entries that the recipe does not lead to, and that say nothing about this run; or that come
            after one that cannot be used.
        results: What report.json and model.safetensors in the folder say otherwise; None where there are none, or
            where the entries themselves do not hold or are not complete.
        samples: Calibration samples.
        provenance: The fingerprints and the recipe that the run recorded.
    """

    layers: tuple[VerifiedLayer, ...]
    missing: tuple[str, ...]
    unreached: tuple[str, ...]
    results: tuple[str, ...] | None
    samples: int
    provenance: Mapping[str, Any]

    @property
    def ok(self) -> bool:
        """Whether everything that is recorded holds; a run that is not complete may well be in order."""
        return not self.unreached and not self.results and all(row.ok for row in self.layers)

    @property
    def complete(self) -> bool:
        """Whether no layer is missing."""
        return not self.missing

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        own = {"ok": self.ok, "complete": self.complete, "layers": [row.to_dict() for row in self.layers]}
        lists = {"missing": list(self.missing), "unreached": list(self.unreached), "results": self.results}
        return own | lists | {"samples": self.samples, "provenance": dict(self.provenance)}

    def table(self, width: int = 140) -> "Table":
        """A rich table, a row an entry; figures as recomputed, and below it all that differs."""
        columns = _COLUMNS if width >= _WIDE else _NARROW
        rows = [[row.cells()[name] for name in columns] for row in self.layers]
        return layer_table([], columns, rows, self._caption(), width)

    def _caption(self) -> list[str]:
        wrong = [row for row in self.layers if not row.ok]
        lines = [f"{len(self.layers) - len(wrong)} of {len(self.layers)} entries are as recorded"]
        lines += [f"{row.name}: {difference}" for row in wrong for difference in row.differences]
        lines += [f"not complete, nothing is recorded of: {', '.join(self.missing)}"] if self.missing else []
        if self.results is not None:
            lines += self.results or ["report.json and model.safetensors say what the entries say"]
        return lines + [f"not looked at, for the recipe does not lead there: {name}" for name in self.unreached]

    def __str__(self) -> str:
        return as_text(self.table)
