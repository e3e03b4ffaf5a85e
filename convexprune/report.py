"""What pruning did, as data, as a table, as JSON."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from io import StringIO
from shutil import get_terminal_size
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from convexprune.solvers import Certificate, LayerProgram, Solution, Status, certify
from convexprune.solvers.arrays import norm

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["LayerReport", "Report", "SkippedModule", "SolvedGroup", "layer_report"]


@dataclass(frozen=True)
class LayerReport:
    """One pruned layer; figures are of the weights as written into the model.

    Attributes:
        name: Qualified module name.
        shape: Of the module's weight.
        fit, eps: What was kept, and how closely, relative to ‖Y‖_F.
        samples: Rows of X (positions of a convolution count each).
        nonzeros_before, nonzeros: Entries of the module's weight that are not zero; the bias is not counted.
        value, bound, gap, violation: The certificate, groups of a convolution added up.
        output_error: ‖ŷ − Y‖_F/‖Y‖_F on the calibration data, after the ReLU where the fit stands before one.
        iterations: The solver's (the most that a group took).
        seconds: Set-up, solve and certificate.
        status: How the solve ended ("solved": certified within the tolerances; "rounded": certified, but no longer
            after rounding to the module's dtype).
    """

    name: str
    shape: tuple[int, ...]
    fit: str
    eps: float
    samples: int
    nonzeros_before: int
    nonzeros: int
    value: float
    bound: float
    gap: float
    violation: float
    output_error: float
    iterations: int
    seconds: float
    status: str


@dataclass(frozen=True)
class SkippedModule:
    """A module with weights that was left as it is, and why."""

    name: str
    kind: str
    reason: str


@dataclass(frozen=True)
class Report:
    """What ``prune_`` did.

    Attributes:
        layers: A row a pruned layer, in the model's order.
        skipped: Modules that hold weights and were not pruned, each with the reason.
        output_error: The network's own: ‖f̂(x) − f(x)‖_F/‖f(x)‖_F over the calibration data.
        samples: Calibration samples.
        seconds: For everything.
        provenance: Solver, options, tolerances, dtype, device, threads, versions.
        solutions: The solutions by layer name, one a group, if they were asked for.
    """

    layers: tuple[LayerReport, ...]
    skipped: tuple[SkippedModule, ...]
    output_error: float
    samples: int
    seconds: float
    provenance: Mapping[str, Any]
    solutions: Mapping[str, tuple[Solution, ...]] = field(default_factory=dict, repr=False)

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
        """Whether every layer's status is "solved"."""
        return all(row.status == str(Status.SOLVED) for row in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Plain data; solutions are left out."""
        plain = {name: value for name, value in vars(self).items() if name not in ("layers", "skipped", "solutions")}
        rows = {"layers": [asdict(row) for row in self.layers], "skipped": [asdict(module) for module in self.skipped]}
        totals = {"nonzeros_before": self.nonzeros_before, "nonzeros": self.nonzeros, "certified": self.certified}
        return rows | totals | plain

    def to_json(self) -> str:
        """``to_dict()`` as JSON."""
        return json.dumps(self.to_dict(), indent=2, default=str)

    def table(self, width: int = 140) -> "Table":
        """A rich table, a row a layer; the columns that matter least are left out below 120 characters."""
        from rich.table import Table

        table = Table(caption=self._caption(), caption_justify="left")
        wide = width >= _WIDE
        rows = [_cells(row) for row in self.layers]
        for number, (heading, always) in enumerate(_COLUMNS):
            if wide or always:
                table.add_column(heading, justify="left" if number == 0 else "right", no_wrap=True)
        for row in rows:
            table.add_row(*[cell for cell, (_, always) in zip(row, _COLUMNS, strict=True) if wide or always])
        return table

    def _caption(self) -> str:
        kept = f"{self.nonzeros:,} of {self.nonzeros_before:,} weights kept"
        lines = [f"{kept}; network output error {self.output_error:.4f} on {self.samples:,} samples"]
        lines += [f"not pruned: {module.name} ({module.kind}): {module.reason}" for module in self.skipped]
        return "\n".join(lines)

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(file=StringIO(), width=max(80, get_terminal_size().columns))
        console.print(self.table(console.width))
        text: str = console.file.getvalue()  # type: ignore[attr-defined]
        return text


_WIDE = 120
_COLUMNS = (
    ("layer", True),
    ("shape", False),
    ("fit", False),
    ("nonzeros", False),
    ("kept", True),
    ("ℓ1 value", False),
    ("gap", True),
    ("violation", True),
    ("error", True),
    ("its", True),
    ("seconds", True),
    ("status", True),
)  # (heading, whether it is shown on a narrow terminal too)


@dataclass(frozen=True, eq=False)
class SolvedGroup:
    """A group of a layer: its program, the solver's answer, and the weights [N, M] before and as written."""

    program: LayerProgram
    solution: Solution
    before: Tensor
    after: Tensor

    @property
    def certificate(self) -> Certificate:
        """Of the weights as written: rounding to the module's dtype counts."""
        if self.after.dtype == self.solution.weights.dtype:
            return self.solution.certificate
        return certify(self.program, self.after, self.solution.multipliers)

    def status(self, certificate: Certificate) -> str:
        """The solution's status; "rounded" where only the weights before rounding were within the tolerances."""
        limits = self.solution.provenance["limits"]
        kept = certificate.meets(limits["tol"], limits["feas_tol"])
        return "rounded" if self.solution.status is Status.SOLVED and not kept else str(self.solution.status)


def layer_report(name: str, layer: nn.Module, fit: str, eps: float, groups: Sequence[SolvedGroup]) -> LayerReport:
    """The row of a layer from its solved groups; ``fit`` is the fit's name, ``eps`` relative."""
    fan_in = groups[0].before.shape[0] - (layer.bias is not None)
    certificates = [group.certificate for group in groups]
    value, bound = sum(c.value for c in certificates), sum(c.bound for c in certificates)
    radii = [group.program.fit.scale for group in groups]
    outside = math.hypot(*(c.violation * radius for c, radius in zip(certificates, radii, strict=True)))
    statuses = [group.status(certificate) for group, certificate in zip(groups, certificates, strict=True)]
    weight = layer.get_parameter("weight")
    return LayerReport(
        name=name,
        shape=tuple(weight.shape),
        fit=fit,
        eps=eps,
        samples=groups[0].program.samples,
        nonzeros_before=sum(int(group.before[:fan_in].count_nonzero()) for group in groups),
        nonzeros=sum(int(group.after[:fan_in].count_nonzero()) for group in groups),
        value=value,
        bound=bound,
        gap=max(0.0, value - bound) / (sum(c.scale for c in certificates) or 1.0),
        violation=outside / (math.hypot(*radii) or 1.0),
        output_error=_output_error(fit, groups),
        iterations=max(group.solution.iterations for group in groups),
        seconds=sum(group.solution.seconds.total for group in groups),
        status=next((status for status in statuses if status != str(Status.SOLVED)), str(Status.SOLVED)),
    )


def _output_error(fit: str, groups: Sequence[SolvedGroup]) -> float:
    wrong, right = [], []
    for group in groups:
        Y = group.program.fit.Y
        Z = group.program.inputs.to(Y.dtype) @ group.after.to(Y.dtype)
        wrong.append(float(norm((Z if fit == "ball" else Z.clamp_(min=0)).sub_(Y))))
        right.append(float(norm(Y)))
    return math.hypot(*wrong) / (math.hypot(*right) or 1.0)


def _cells(row: LayerReport) -> list[str]:
    solved = row.status == str(Status.SOLVED)
    return [
        row.name,
        "×".join(map(str, row.shape)),
        f"{row.fit} {row.eps:g}",
        f"{row.nonzeros:,}",
        f"{row.nonzeros / max(row.nonzeros_before, 1):.1%}",
        f"{row.value:.6g}",
        f"{row.gap:.1e}",
        f"{row.violation:.1e}",
        f"{row.output_error:.4f}",
        f"{row.iterations}",
        f"{row.seconds:.1f}",
        row.status if solved else f"[red]{row.status}[/red]",
    ]
