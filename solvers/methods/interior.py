"""Our interior point method: small programs, and those so tight that first-order methods need too many iterations."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from convexprune.solvers.methods.backends.conic import refusal
from convexprune.solvers.methods.backends.direct import ConicTask, RawSolution
from convexprune.solvers.methods.homogeneous import Cones, Embedding
from convexprune.solvers.methods.interface import Limits, Proposal, Start, Watch
from convexprune.solvers.methods.iterative import IterativeSolver
from convexprune.solvers.methods.normal import positive_or_one
from convexprune.solvers.methods.registry import register
from convexprune.solvers.programs import LayerProgram
from convexprune.solvers.programs.fits import TargetFit

_SMALL = 2**18  # P·N·M up to which it is quicker than many iterations of a first-order method
_SLACK = 0.2  # of the violation that the call tolerates: so much larger is the set that is solved for
_INFEASIBLE = 1e3  # κ over τ that tells of no solution
_FINE = 1e-12  # complementarity at which weights that should be 0 are left as they are, if that is nearer to the set
_CORRECTIONS = 3


@dataclass
class _State:
    program: LayerProgram  # in float64
    task: ConicTask
    parts: list[Embedding]
    start: Start | None

    @property
    def mu(self) -> float:  # the largest complementarity of the parts
        return max(part.mu for part in self.parts)


@register("interior")
@dataclass(frozen=True)
class Interior(IterativeSolver[_State]):
    """Our interior point method, for small programs and many digits: convex penalties and all fits of ours.

    It works in float64 on the conic form that ``clarabel`` gets too. Sets are taken a little larger, by a fifth of the
    violation that the call tolerates, so that even eps = 0 leaves room inside. Weights that multipliers hold at 0 are
    set to 0, and the others are moved by least squares to where the outputs are in the set.
    """

    default_max_iter: ClassVar[int] = 100
    first_judged: ClassVar[int] = 5
    packages: ClassVar[tuple[str, ...]] = ("scipy",)
    stage: ClassVar[str] = "interior point method"

    @staticmethod
    def suits(program: LayerProgram) -> bool:
        """Whether the program is of a kind and size that it is quick for."""
        P, (N, M) = program.samples, program.shape
        return P * N * M <= _SMALL and refusal(program) is None

    def refuses(self, program: LayerProgram) -> str | None:
        """Why this program cannot be taken, or None."""
        return refusal(program)

    def run(self, program: LayerProgram, limits: Limits, start: Start | None, watch: Watch) -> Proposal:
        """The loop, on a set that is larger by a fifth of the violation that is tolerated."""
        wide = program.to(torch.float64)
        assert isinstance(wide.fit, TargetFit)  # noqa: S101 - refuses saw to it
        fit = wide.fit.relaxed(_SLACK * limits.feas_tol * wide.fit.scale)
        return super().run(replace(wide, fit=fit), limits, start, watch)

    def init(self, program: LayerProgram, start: Start | None) -> _State:
        """The conic form, or forms."""
        task, parts = ConicTask(program, None), []
        for _, form in task.forms:
            cones = Cones(form.zero, form.nonneg, np.array(form.cones, dtype=int))
            parts.append(Embedding(form.P, form.q, form.A, form.b, cones))
        return _State(task.program, task, parts, start)

    def step(self, state: _State) -> None:
        """One for each part that is not done."""
        for part in state.parts:
            if not part.stuck:
                part.step()

    def done(self, state: _State) -> bool:
        """Whether rounding lets none of the parts go on."""
        return all(part.stuck for part in state.parts)

    def ready(self, state: _State, limits: Limits) -> bool:
        """From when on complementarity is as small as the tolerated gap."""
        return state.mu <= limits.tol

    def residuals(self, state: _State) -> Mapping[str, float]:
        """The largest of all parts."""
        values = [part.lacking() for part in state.parts]
        return {name: max(value[name] for value in values) for name in values[0]}

    def effective(self, state: _State) -> Mapping[str, Any]:  # noqa: ARG002
        """The precision, whatever the program's."""
        return {"iterate dtype": "torch.float64"}

    def finish(self, state: _State) -> tuple[Tensor, Tensor | None]:
        """Sparse weights and multipliers; where the parts tell of no solution, the multipliers that prove it."""
        impossible = [part.kappa > _INFEASIBLE * part.tau for part in state.parts]
        points = [part.ray() if ray else part.point() for part, ray in zip(state.parts, impossible, strict=True)]
        state.task.answers = [RawSolution(point, "own rule", 0, 0.0, "") for point in points]
        found = state.task.proposal({})
        assert found.weights is not None  # noqa: S101 - every part has an answer
        if any(impossible):
            start = None if state.start is None else state.start.weights.to(found.weights)
            return found.weights if start is None else start, found.multipliers
        zero = [form.zeros(*point[1:]) for (_, form), point in zip(state.task.forms, points, strict=True)]
        sparse = torch.where(torch.as_tensor(np.hstack(zero), device=found.weights.device), 0.0, found.weights)
        (U, distance), end = _corrected(state.program, sparse), self.done(state) or state.mu <= _FINE
        if end and distance > 0:
            full = _corrected(state.program, found.weights)
            U = full[0] if full[1] < distance else U
        return U, found.multipliers


def _corrected(program: LayerProgram, U: Tensor) -> tuple[Tensor, float]:
    """U moved by least squares, along its support, to where the outputs are in the set; how far they still are."""
    X, fit, support = program.inputs, program.fit, U != 0
    length = positive_or_one(torch.linalg.vector_norm(X, dim=0))
    scaled = X / length
    best, least = U, float("inf")
    for _ in range(_CORRECTIONS + 1):
        Z = X @ U
        sums = fit.sums(Z)
        distance = fit.distance(sums)
        if not distance < least:
            break
        best, least = U, distance
        if distance == 0:
            break
        inputs = scaled * support.T[:, None, :]
        move = torch.linalg.pinv(inputs, rtol=1e-10) @ fit.prox_residual(Z, sums, float("inf")).T[:, :, None]
        U = U - torch.where(support, move[:, :, 0].T / length[:, None], 0.0)
    return best, least
