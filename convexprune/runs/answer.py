"""What is wanted of a layer, and what comes back: judged as it is stored, and judged again from a record."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, cast

import torch
from torch import Tensor

from convexprune.options import Options
from convexprune.report.report import LayerReport
from convexprune.runs.layer import Layer
from convexprune.runs.problem import Problem, StoppingRule
from convexprune.solvers.certificate import Certificate, Solution, Status, certify
from convexprune.solvers.certificate.solution import Seconds
from convexprune.solvers.methods.refit import UNSETTLED, refit_with_record
from convexprune.solvers.methods.solve import environment
from convexprune.solvers.programs import Gram, LayerProgram

KEPT = "as trained"
"""The status of trained weights that stay, since no better ones were found that keep the promise."""
REFITTED = "refitted"
"""The status of weights that keep the promise on a certified support, and no longer have the least ℓ1 norm."""
MASKED, MASKED_REFITTED = "masked", "masked, refitted"
"""The statuses of weights of which a score or a sample chose what stays."""
SAMPLED = ("sampled", "largest kept", "kept whole", "assumption fails")
"""The statuses of weights that a coreset is made of."""
ROUNDED = "rounded"
"""The status of weights whose certificate only held before they were rounded to the module's dtype."""
ENDS = (*map(str, Status), KEPT, REFITTED, ROUNDED, MASKED, MASKED_REFITTED, *SAMPLED)
"""All of them."""

# Certificates are sums in float64. What they are made of is not: a layer's inputs come from a forward in the model's
# dtype, and another device or number of threads adds these up in another order. So figures agree to many roundings of
# that dtype, and exactly where nothing was different.
_AGREEMENT = {torch.float64: 1e-9, torch.float32: 1e-5}
_HALF = 1e-3
_ROUNDING = 1e-9
_ORIGINAL = "fitted to the original network's inputs, as in parallel mode: in the pruned network other rows reach it"


@dataclass(frozen=True, eq=False)
class Answer:
    """What became of one group.

    Attributes:
        solution: Weights as the module now stores them, in the program's units, with their certificate.
        stored: Those weights as stored, in the module's dtype.
        radius: The set's radius in the units of Y; infinity where no error was allowed for.
        promised: What ‖σ(XU) − Y‖ is promised to be at most; infinity where nothing is.
        size: ‖Y‖_F; NaN without data, like the error.
        error: ‖σ(XU) − Y‖_F.
        samples: P.
        before: Nonzeros of the trained weights, the bias not counted.
        nonzeros: Of these.
        status: How it ended.
        notes: What a reader should know.
        path: Of a measured path its points: (eps and error relative to ‖Y‖_F, nonzeros without the bias).
        returned: How many of these weights are not zero where the trained ones are.
        original: As in ``Problem``.
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
        problem: Problem,
        status: str,
        notes: Sequence[str] = (),
        *,
        radius: float = math.inf,
        promised: float = math.inf,
        error: float | None = None,
        size: float | None = None,
    ) -> "Answer":
        """With all that follows from the weights; ``promised`` is without what they violate.

        ``error`` and ``size`` are those of the layer's outputs unless they are given.
        """
        violation, size = solution.certificate.violation, problem.size if size is None else size
        return cls(
            solution=solution,
            stored=stored,
            radius=radius,
            # A violation is relative to the radius, or to ‖Y‖ where there is none.
            promised=promised * (1 + violation) if radius else promised + violation * size,
            size=size,
            error=problem.error(solution.weights) if error is None else error,
            samples=problem.samples,
            before=int(problem.stored[: problem.rows].count_nonzero()),
            nonzeros=int(stored[: problem.rows].count_nonzero()),
            returned=int((stored[: problem.rows] * (problem.stored[: problem.rows] == 0)).count_nonzero()),
            status=status,
            notes=tuple(notes),
            original=problem.original,
        )


class Goal:
    """What is wanted of a layer: a frozen dataclass of plain numbers, which name the entry in a journal.

    Write ``solve_group``, or ``solve`` where the groups of a layer are answered together.

    Attributes:
        kind: What it is called in records.
        measured: Whether it is a measurement to allocate by, of which no certificate is kept and no row is made.
    """

    kind: ClassVar[str] = ""
    measured: ClassVar[bool] = False

    def solve(self, problems: Sequence[Problem], options: Options, watch: StoppingRule) -> tuple[Answer, ...]:
        """The answers to a layer, group by group."""
        return tuple(self.solve_group(problem, options, watch) for problem in problems)

    def solve_group(self, problem: Problem, options: Options, watch: StoppingRule) -> Answer:
        """The answer to one group."""
        raise NotImplementedError

    def judge(self, answers: Sequence[Answer], problems: Sequence[Problem], options: Options) -> tuple[Answer, ...]:
        """The answers with everything that can be recomputed from weights, multipliers and data, without a solver."""
        return tuple(
            self.judge_group(answer, problem, options) for answer, problem in zip(answers, problems, strict=True)
        )

    def judge_group(self, answer: Answer, problem: Problem, options: Options) -> Answer:
        """The answer to one group, recomputed."""
        raise NotImplementedError

    @property
    def allowed(self) -> float | None:
        """The eps that was allowed, if it was one."""
        return None

    def near(self, recorded: Mapping[str, object]) -> "Goal | None":
        """This goal with the numbers of a recorded key, if they differ by rounding alone, as on another machine."""
        own = self.to_dict()
        floats = {key: value for key, value in recorded.items() if isinstance(value, float) and hasattr(self, key)}
        for key, value in own.items():
            own[key] = list(value) if isinstance(value, tuple) else value
            if isinstance(value, float) and math.isclose(value, floats.get(key, math.nan), rel_tol=1e-5):
                own[key] = floats[key]
        return replace(self, **floats) if own == recorded else None  # type: ignore[type-var]

    def to_dict(self) -> dict[str, object]:
        """Plain data."""
        own: dict[str, object] = dataclasses.asdict(self)  # type: ignore[call-overload]
        return {"kind": self.kind} | own

    def __str__(self) -> str:
        raise NotImplementedError


def solve_limits(options: Options, watch: StoppingRule) -> dict[str, object]:
    """The limits of one solve, within the time that is left, and the solver's own options."""
    return {**options.limits, "time_limit": watch.left(), **(options.solver_options or {})}


def set_solver(problem: Problem, options: Options) -> object:
    """The solver that was named, or the faster of ours for a set program."""
    if options.solver is not None:
        return options.solver
    return "quadratic" if isinstance(problem.X, Gram) else "admm"


def refitted(program: LayerProgram, solution: Solution, stop: StoppingRule | None = None) -> Solution:
    """The same support with the weights that fit best on it; if it is stopped, the best so far."""
    weights, effective = refit_with_record(program, solution.weights != 0, stop)
    provenance = dict(solution.provenance)
    provenance["effective"] = dict(provenance.get("effective", {})) | effective
    certificate = certify(program, weights, solution.multipliers)
    return replace(solution, weights=weights, certificate=certificate, provenance=provenance)


def answered(
    program: LayerProgram,
    solution: Solution,
    problem: Problem,
    notes: Sequence[str] = (),
    *,
    radius: float = math.inf,
    promised: float = math.inf,
) -> Answer:
    """Round to what is stored, and judge that; without any weights where the module's dtype cannot hold them."""
    stored = problem.fold.undo(solution.weights.to(problem.dtype)).to(problem.stored.dtype)
    if not bool(stored.isfinite().all()):
        nothing = replace(solution, certificate=replace(solution.certificate, violation=math.inf))
        nan, status = torch.full_like(stored, math.nan), _status(solution, nothing.certificate)
        return Answer(nothing, nan, radius, promised, problem.size, math.nan, problem.samples, 0, 0, status)
    U = problem.fold.apply(stored.to(problem.dtype))
    certificate = solution.certificate
    if not torch.equal(U.to(solution.weights.dtype), solution.weights):
        certificate = certify(program, U, solution.multipliers)
    judged = replace(solution, weights=U, certificate=certificate)
    if short := solution.provenance.get("effective", {}).get(UNSETTLED):
        notes = [*notes, f"{short} of {U.shape[1]} neurons are short of the minimum of their loss"]
    return Answer.of(judged, stored, problem, _status(solution, certificate), notes, radius=radius, promised=promised)


def unproven(
    stored: Tensor,
    problem: Problem,
    method: str,
    seconds: float,
    options: Options,
    status: str,
    notes: Sequence[str] = (),
    *,
    ended: Status = Status.NO_BOUND,
    error: float | None = None,
    size: float | None = None,
) -> Answer:
    """Weights as stored, of which nothing is proven; ``error`` and ``size`` as in ``Answer.of``."""
    U = problem.fold.apply(stored.to(problem.dtype))
    certificate = Certificate(math.nan, -math.inf, math.inf, 0.0, 1.0)
    provenance = {"solver": method, "message": "", "effective": {}} | environment(U)
    provenance["limits"] = {"tol": options.tol, "feas_tol": options.feas_tol}
    solution = Solution(U, None, ended, certificate, (), 0, Seconds(0.0, seconds, 0.0), provenance)
    return Answer.of(solution, stored, problem, status, notes, error=error, size=size)


def _status(solution: Solution, certificate: Certificate) -> str:
    """The solution's status; "rounded" where only the weights before rounding were within the tolerances."""
    limits = solution.provenance["limits"]
    kept = certificate.within(limits["tol"], limits["feas_tol"])
    return ROUNDED if solution.status is Status.SOLVED and not kept else str(solution.status)


# Judging


def agreement(dtype: torch.dtype) -> float:
    """How far figures of one model may be apart, relative to what they are differences of."""
    return _AGREEMENT.get(dtype, _HALF)


def judged(
    answer: Answer, problem: Problem, program: LayerProgram, *, radius: float = math.inf, promised: float = math.inf
) -> Answer:
    """The answer with its certificate, errors and counts from the recorded weights and multipliers."""
    U = problem.fold.apply(answer.stored.to(problem.dtype))
    solution = replace(answer.solution, weights=U, certificate=_certificate(program, problem, U, answer))
    again = Answer.of(solution, answer.stored, problem, answer.status, answer.notes, radius=radius, promised=promised)
    return replace(again, path=answer.path)


def _certificate(program: LayerProgram, problem: Problem, U: Tensor, answer: Answer) -> Certificate:
    found, claim = certify(program, U, answer.solution.multipliers), answer.solution.certificate
    if isinstance(problem.X, Gram) and found.bound < claim.bound:
        # Multipliers of a Gram belong to a root of XᵀX, which other roundings may turn; the residual turns with it.
        own = certify(program, U)
        bound = min(own.bound, claim.bound)  # what is below a proven bound is proven
        if bound > found.bound:
            gap = max(0.0, own.value - bound) / own.scale if own.scale > 0 else 0.0
            return replace(own, bound=bound, gap=gap)
    return found


# Rows


def layer_row(layer: Layer, goal: Goal, answers: Sequence[Answer]) -> LayerReport:
    """The row of a layer from its groups' answers, which are added up."""
    certificates = [answer.solution.certificate for answer in answers]
    value, bound = sum(c.value for c in certificates), sum(c.bound for c in certificates)
    gap = math.inf if bound == -math.inf else max(0.0, value - bound) / (sum(c.scale for c in certificates) or 1.0)
    size = math.hypot(*(answer.size for answer in answers)) or 1.0
    scales = [answer.radius or answer.size for answer in answers]
    outside = math.hypot(*(c.violation * scale for c, scale in zip(certificates, scales, strict=True) if c.violation))
    statuses, good = [answer.status for answer in answers], (str(Status.SOLVED), str(Status.NO_BOUND), REFITTED)
    notes = [note for each in answers for note in (*([_ORIGINAL] * each.original), *each.notes)]
    return LayerReport(
        name=layer.name,
        shape=layer.shape,
        fit=layer.fit.name,
        norm=layer.norm_name,
        samples=answers[0].samples,
        nonzeros_before=sum(answer.before for answer in answers),
        nonzeros=sum(answer.nonzeros for answer in answers),
        output_error=math.hypot(*(answer.error for answer in answers)) / size,
        seconds=sum(answer.solution.seconds.total for answer in answers),
        status=next((status for status in statuses if status not in good), statuses[0]),
        goal=str(goal),
        eps=math.hypot(*(answer.radius for answer in answers)) / size,
        promised=math.hypot(*(answer.promised for answer in answers)) / size,
        value=value,
        bound=bound,
        gap=gap,
        violation=0.0 if not outside else outside / (math.hypot(*scales) or 1.0),
        iterations=max(answer.solution.iterations for answer in answers),
        notes=(*layer.notes, *dict.fromkeys(notes)),
        returned=sum(answer.returned for answer in answers),
        eps_allowed=goal.allowed,
    )


def with_extras(row: LayerReport, extra: Mapping[str, object]) -> LayerReport:
    """The row with further figures of its layer; notes come after its own."""
    notes = dict.fromkeys((*row.notes, *cast(Sequence[str], extra.get("notes", ()))))
    return replace(row, **{**extra, "notes": tuple(notes)})  # type: ignore[arg-type]
