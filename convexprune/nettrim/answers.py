"""What is asked of a layer, and what comes back: judged as it is stored."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from convexprune.nettrim.posed import How, Posed
from convexprune.solvers import Gram, LayerProgram, Solution, Status, certify
from convexprune.solvers.certificate import Certificate
from convexprune.solvers.methods.refit import SHORT, refit_told

KEPT = "as trained"
"""The status of trained weights that stay, since no better ones were found that keep the promise."""
REFITTED = "refitted"
"""The status of weights that keep the promise on a certified support, and no longer have the least ℓ1 norm."""


@dataclass(frozen=True, eq=False)
class Answer:
    """What became of one group.

    Attributes:
        solution: Weights as the module now stores them, in the program's units, with their certificate.
        stored: Those weights as stored, in the module's dtype.
        radius: The set's radius in the units of Y; infinity for a budget.
        promised: What ‖σ(XU) − Y‖ is promised to be at most; infinity for a budget.
        size: ‖Y‖_F.
        error: ‖σ(XU) − Y‖_F.
        samples: P.
        before: Nonzeros of the trained weights, the bias not counted.
        nonzeros: Of these.
        status: How it ended: the solution's status, "rounded" where only rounding cost the certificate, or "as trained"
            where nothing better was found than the weights that were there.
        notes: What a reader should know.
        path: Of a measured path its points: (eps and error relative to ‖Y‖_F, nonzeros without the bias).
        returned: How many of these weights are not zero where the trained ones are.
        original: As in ``Posed``.
    """

    solution: Solution
    stored: Tensor
    radius: float
    promised: float
    size: float
    error: float
    samples: int
    before: int
    nonzeros: int
    status: str
    notes: tuple[str, ...] = ()
    path: tuple[tuple[float, float, int], ...] = ()
    returned: int = 0
    original: bool = False

    @classmethod
    def of(
        cls,
        solution: Solution,
        stored: Tensor,
        posed: Posed,
        radius: float,
        promised: float,
        status: str,
        notes: Sequence[str],
    ) -> "Answer":
        """With all that follows from the weights; ``promised`` is without what they violate."""
        violation = solution.certificate.violation
        return cls(
            solution=solution,
            stored=stored,
            radius=radius,
            # A violation is relative to the radius, or to ‖Y‖ where there is none.
            promised=promised * (1 + violation) if radius else promised + violation * posed.size,
            size=posed.size,
            error=posed.missed(solution.weights),
            samples=posed.samples,
            before=int(posed.stored[: posed.rows].count_nonzero()),
            nonzeros=int(stored[: posed.rows].count_nonzero()),
            returned=int((stored[: posed.rows] * (posed.stored[: posed.rows] == 0)).count_nonzero()),
            status=status,
            notes=tuple(notes),
            original=posed.original,
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything but the arrays, as plain data."""
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        own |= {"notes": list(self.notes), "path": [list(point) for point in self.path]}
        del own["stored"]
        return own | {"solution": self.solution.to_dict()}


class Goal(Protocol):
    """What is asked of a layer."""

    kind: ClassVar[str]

    def programs(self, posed: Posed, how: How) -> LayerProgram:
        """The program whose certificate counts."""

    def meet(self, posed: Posed, how: How) -> Answer:
        """Solve it."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""

    def __str__(self) -> str:
        """A word for tables."""


@dataclass(frozen=True)
class Plain:
    """Base of goals."""

    kind: ClassVar[str] = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {"kind": self.kind} | dataclasses.asdict(self)


def solver_for(posed: Posed, how: How) -> Any:
    """The solver asked for, or the faster of ours for a set program."""
    if how.solver is not None:
        return how.solver
    return "quadratic" if isinstance(posed.X, Gram) else "admm"


def refitted(program: LayerProgram, solution: Solution, stop: Callable[[], bool] | None = None) -> Solution:
    """The same support with the weights that fit best on it; if it is stopped, the best so far."""
    weights, told = refit_told(program, solution.weights != 0, stop)
    effective = dict(solution.provenance.get("effective", {})) | told
    certificate, provenance = certify(program, weights, solution.multipliers), dict(solution.provenance)
    return replace(solution, weights=weights, certificate=certificate, provenance=provenance | {"effective": effective})


def answered(
    program: LayerProgram, solution: Solution, posed: Posed, radius: float, promised: float, notes: Sequence[str]
) -> Answer:
    """Round to what is stored, and judge that; without any weights where the module's dtype cannot hold them."""
    stored = posed.fold.undo(solution.weights.to(posed.dtype)).to(posed.stored.dtype)
    if not bool(stored.isfinite().all()):
        nothing = replace(solution, certificate=replace(solution.certificate, violation=math.inf))
        nan, status = torch.full_like(stored, math.nan), _status(solution, nothing.certificate)
        return Answer(nothing, nan, radius, promised, posed.size, math.nan, posed.samples, 0, 0, status)
    U = posed.fold.apply(stored.to(posed.dtype))
    certificate = solution.certificate
    if not torch.equal(U.to(solution.weights.dtype), solution.weights):
        certificate = certify(program, U, solution.multipliers)
    status = _status(solution, certificate)
    judged = replace(solution, weights=U, certificate=certificate)
    if short := solution.provenance.get("effective", {}).get(SHORT):
        notes = [*notes, f"{short} of {U.shape[1]} neurons are short of the minimum of their loss"]
    return Answer.of(judged, stored, posed, radius, promised, status, notes)


def _status(solution: Solution, certificate: Certificate) -> str:
    """The solution's status; "rounded" where only the weights before rounding were within the tolerances."""
    limits = solution.provenance["limits"]
    kept = certificate.meets(limits["tol"], limits["feas_tol"])
    return "rounded" if solution.status is Status.SOLVED and not kept else str(solution.status)
