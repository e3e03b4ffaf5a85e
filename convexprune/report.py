"""What pruning did, as data, as a table, as JSON."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from convexprune.files import plain
from convexprune.solvers import Solution
from convexprune.tables import as_text

if TYPE_CHECKING:
    from rich.table import Table

    from convexprune.coresets.generalisation import GeneralisationBound
    from convexprune.nettrim.outcome import NetworkPromise

__all__ = ["LayerReport", "Report", "SkippedModule"]


@dataclass(frozen=True)
class LayerReport:
    """One layer of a pruned model; each method's row adds what it has to say.

    Attributes:
        name: Qualified module name.
        shape: Of the module's weight as it is now.
        samples: Rows of inputs that the layer saw (positions of a convolution count each).
        nonzeros_before, nonzeros: Entries of the module's weight that are not zero; the bias is not counted.
        output_error: Of the layer alone, on the calibration data; NaN without any.
        seconds: All that it took.
        status: How it ended.
    """

    name: str
    shape: tuple[int, ...]
    samples: int
    nonzeros_before: int
    nonzeros: int
    output_error: float
    seconds: float
    status: str

    columns: ClassVar[tuple[tuple[str, bool], ...]] = ()  # (heading, whether it is shown on a narrow terminal too)

    @property
    def certified(self) -> bool:
        """Whether what was promised of this layer holds."""
        raise NotImplementedError

    def cells(self) -> list[str]:
        """One text for each of the columns."""
        raise NotImplementedError

    def remarks(self) -> tuple[str, ...]:
        """What a reader should know, below the table."""
        return ()

    @property
    def kept(self) -> str:
        """The part of the weights that is left."""
        return f"{self.nonzeros / max(self.nonzeros_before, 1):.1%}"


@dataclass(frozen=True)
class SkippedModule:
    """A module with weights that was left as it is, and why."""

    name: str
    kind: str
    reason: str


@dataclass(frozen=True)
class Report:
    """What pruning a model did.

    Attributes:
        layers: A row a pruned layer, in the model's order.
        skipped: Modules that hold weights and were not pruned, each with the reason.
        output_error: The network's own: ‖f̂(x) − f(x)‖_F/‖f(x)‖_F over the calibration data; NaN without any.
        samples: Calibration samples.
        seconds: For everything.
        provenance: Method or solver, options, seed, tolerances, dtype, device, threads, versions.
        solutions: The solutions by layer name, one a group, if they were asked for.
        network: The bound on ``output_error``, by Net-Trim.
        generalisation: What is known of errors on new data, if labels were given to "corenet".
    """

    layers: tuple[LayerReport, ...]
    skipped: tuple[SkippedModule, ...]
    output_error: float
    samples: int
    seconds: float
    provenance: Mapping[str, Any]
    solutions: Mapping[str, tuple[Solution, ...]] = field(default_factory=dict, repr=False)
    generalisation: "GeneralisationBound | None" = None
    network: "NetworkPromise | None" = None

    @property
    def nonzeros_before(self) -> int:
        """Nonzero weights of the pruned layers before."""
        return sum(row.nonzeros_before for row in self.layers)

    @property
    def nonzeros(self) -> int:
        """Nonzero weights of the pruned layers now."""
        return sum(row.nonzeros for row in self.layers)

    @property
    def certified(self) -> bool:
        """Whether what was promised holds, of every layer and of the network, and the run came to its end."""
        finished = self.provenance.get("stopped") is None and not (self.samples and math.isnan(self.output_error))
        return finished and all(row.certified for row in self.layers) and (self.network is None or self.network.kept)

    def to_dict(self) -> dict[str, Any]:
        """Plain data; solutions are left out."""
        own = ("layers", "skipped", "solutions", "generalisation", "network")
        plain = {name: value for name, value in vars(self).items() if name not in own}
        rows = {"layers": [asdict(row) for row in self.layers], "skipped": [asdict(module) for module in self.skipped]}
        totals = {"nonzeros_before": self.nonzeros_before, "nonzeros": self.nonzeros, "certified": self.certified}
        bounds = {} if self.generalisation is None else {"generalisation": self.generalisation.to_dict()}
        bounds |= {} if self.network is None else {"network": asdict(self.network)}
        return rows | totals | plain | bounds

    def to_json(self) -> str:
        """``to_dict()`` as JSON; NaN and infinity, which it cannot express, become null."""
        return json.dumps(plain(self.to_dict()), indent=2, default=str)

    def table(self, width: int = 140) -> "Table":
        """A rich table, a row a layer; the columns that matter least are left out below 120 characters."""
        from rich.table import Table

        table = Table(caption=self._caption(), caption_justify="left", min_width=0 if self.layers else 80)
        wide = width >= _WIDE
        # A run may have been stopped before its first layer.
        columns = self.layers[0].columns if self.layers else (("layer", True),)
        for number, (heading, always) in enumerate(columns):
            if wide or always:
                name = number == 0  # the only one that may take several lines: figures are never cut
                table.add_column(heading, justify="left" if name else "right", no_wrap=not name, overflow="fold")
        for row in self.layers:
            table.add_row(*[cell for cell, (_, always) in zip(row.cells(), columns, strict=True) if wide or always])
        return table

    def _caption(self) -> str:
        kept = f"{self.nonzeros:,} of {self.nonzeros_before:,} weights kept"
        error = f"; network output error {self.output_error:.4f} on {self.samples:,} samples" if self.samples else ""
        promise = [] if self.network is None else [str(self.network)]
        lines = [kept + error, *promise, *(f"{row.name}: {note}" for row in self.layers for note in row.remarks())]
        lines += [] if self.generalisation is None else [str(self.generalisation)]
        lines += [f"not pruned: {module.name} ({module.kind}): {module.reason}" for module in self.skipped]
        return "\n".join(lines)

    def __str__(self) -> str:
        return as_text(self.table)


_WIDE = 120
