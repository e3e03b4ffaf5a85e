"""What a preview tells, as data and as a table."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from convexprune.report.report import SkippedModule
from convexprune.report.tables import as_text, layer_table
from convexprune.runs.preview.pace import Pace

if TYPE_CHECKING:
    from rich.table import Table

_NARROW = ("layer", "goal", "P", "N×M", "data", "solver", "about")
_WIDE = 120


@dataclass(frozen=True)
class LayerPreview:
    """A layer that would be pruned.

    Attributes:
        name: Qualified module name.
        kind: The module's class.
        shape: Of its weight.
        fit: What is kept.
        norm: The BatchNorm that would be part of the program, or None.
        goal: What is asked.
        matrices: (P, N, M) of each group: X is [P, N] with a last column of ones where there is a bias, Y [P, M].
        gram: Whether X and Y are reduced to XᵀX and XᵀY as they come, so that memory does not grow with P.
        data_bytes: X and Y of all groups, or their products.
        solver_bytes: What the solver keeps beside them for the largest group.
        seconds: About; None for a solver of which nothing is known.
        notes: What a reader should know.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    fit: str
    norm: str | None
    goal: str
    matrices: tuple[tuple[int, int, int], ...]
    gram: bool
    data_bytes: int
    solver_bytes: int
    seconds: float | None
    notes: tuple[str, ...] = ()

    @property
    def groups(self) -> int:
        """How many programs the layer is."""
        return len(self.matrices)

    def cells(self) -> dict[str, str]:
        """Texts by column."""
        sizes = dict.fromkeys(f"{N:,}×{M:,}" for _, N, M in self.matrices)
        return {
            "layer": self.name,
            "kind": self.kind,
            "shape": "×".join(map(str, self.shape)),
            "groups": f"{self.groups}",
            "fit": self.fit,
            "norm": self.norm or "–",
            "goal": self.goal,
            "P": f"{max(P for P, _, _ in self.matrices):,}",
            "N×M": ", ".join(sizes),
            "as": "Gram" if self.gram else "samples",
            "data": _size(self.data_bytes),
            "solver": _size(self.solver_bytes),
            "about": _duration(self.seconds),
        }


@dataclass(frozen=True)
class Preview:
    """What a run would do.

    Attributes:
        layers: In the model's order.
        skipped: Modules that hold weights and would not be pruned, each with the reason.
        samples: Calibration samples.
        weights: Entries of the layers' weights, biases not counted.
        memory_bytes: About what the layer that needs most takes beside the model, one layer at a time.
        seconds: About, for everything; None if a layer's is not known.
        jobs: Layers at a time; ``seconds`` counts on as many free cores.
        pace: The speeds that were measured here.
        recipe: What is asked.
        notices: What a reader should know first.
    """

    layers: tuple[LayerPreview, ...]
    skipped: tuple[SkippedModule, ...]
    samples: int
    weights: int
    memory_bytes: int
    seconds: float | None
    jobs: int
    pace: Pace
    recipe: Mapping[str, Any]
    notices: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self) | {"layers": [asdict(row) | {"groups": row.groups} for row in self.layers]}

    def table(self, width: int = 140) -> "Table":
        """A rich table, a row a layer; the columns that matter least are left out below 120 characters."""
        from rich.markup import escape

        columns = list(self.layers[0].cells()) if width >= _WIDE and self.layers else _NARROW
        rows = [[row.name, *(escape(row.cells()[name]) for name in columns[1:])] for row in self.layers]
        return layer_table(self.notices, columns, rows, self._caption(), width)

    def _caption(self) -> list[str]:
        together = f" with {self.jobs} at a time" if self.jobs > 1 else ""
        lines = [
            f"{len(self.layers)} layers with {self.weights:,} weights, {self.samples:,} samples; about "
            f"{_duration(self.seconds)}{together}, within a factor of three if the machine stays as busy; about "
            f"{_size(self.memory_bytes)} for the layer that takes most"
        ]
        lines += [f"{row.name}: {note}" for row in self.layers for note in row.notes]
        return lines + [f"not pruned: {module.name} ({module.kind}): {module.reason}" for module in self.skipped]

    def __str__(self) -> str:
        return as_text(self.table)


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} GiB"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    if seconds < 90:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.2g} h"
