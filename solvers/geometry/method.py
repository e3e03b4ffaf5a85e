"""Methods for the optimal weights of points: their base, and the published ones.

Source: L. G. Khachiyan, Rounding of polytopes in the real number model of computation, 1996; M. J. Todd and E. A.
Yıldırım, On Khachiyan's algorithm for the computation of minimum-volume enclosing ellipsoids, 2007.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol, TypeVar

import torch
from torch import Tensor

from convexprune.solvers.arrays import checked_positive
from convexprune.solvers.geometry.cloud import Cloud, factor
from convexprune.solvers.methods.interface import Limits, Proposal, Start, Watch
from convexprune.solvers.methods.iterative import Iterative
from convexprune.solvers.methods.packages import CVXPY
from convexprune.solvers.methods.registry import Registry

_DRIFT = 1e-8  # of a leverage from its own recomputation, relative: the updates start afresh beyond it
_EVERY = 50  # steps between two looks at the drift
_GROWTH = 1.5
_EACH = 1e-2  # of the total weight is spread evenly where some have none
_FIRST = 4.0
_SINGULAR = 1e-12  # a least eigenvalue relative to the largest: below it inverses have too few digits


class EllipsoidSolver(Protocol):
    """Anything that proposes weights u [n] for points: as ``Solver``, with a ``Cloud`` in the program's place."""

    def refuses(self, program: Cloud) -> str | None:
        """Why these points cannot be taken, or None."""

    def run(self, program: Cloud, limits: Limits, start: Start | None, watch: Watch) -> Proposal:
        """Find weights as good as the limits allow; ``Proposal.weights`` are u."""


ELLIPSOIDS: Registry[EllipsoidSolver] = Registry("convexprune.ellipsoid_solvers")
"""Solvers of ``lowner_ellipsoid``."""


@dataclass
class Weighted:
    """The state of a method: points, their weights u [n] with sum 1, and their leverages g [n]."""

    cloud: Cloud
    u: Tensor
    g: Tensor


State = TypeVar("State", bound=Weighted)


@dataclass(frozen=True)
class EllipsoidMethod(Iterative[Cloud, State]):
    """Base of methods that seek weights u [n], with Σu = 1, of largest log det Σ u_i q_i q_iᵀ.

    Write ``init`` and ``step``; where the state is not ``Weighted``, also ``own_gap`` and ``weights``.
    """

    def refuses(self, program: Cloud) -> str | None:  # noqa: ARG002 - most take any points
        """Why these points cannot be taken, or None."""
        return None

    def own_gap(self, state: State) -> float:
        """The gap as the method sees it, by default of the leverages g that the state holds."""
        return state.cloud.gap(float(state.g.max()))

    def weights(self, state: State) -> Tensor:
        """u [n], by default the state's."""
        return state.u

    def residuals(self, state: State) -> Mapping[str, float]:
        """The gap as the method sees it."""
        return {"gap": self.own_gap(state)}

    def finish(self, state: State) -> tuple[Tensor, None]:
        """u [n], and nothing else: the ellipsoid follows from them."""
        return self.weights(state), None

    def ready(self, state: State, limits: Limits) -> bool:
        """The certificate should close where the method's own gap is small enough."""
        return self.own_gap(state) <= limits.tol


def start_weights(cloud: Cloud, start: Start | None) -> Tensor:
    """The weights to start from, scaled to sum 1: uniform ones where none are given, half of each if M is singular."""
    uniform = torch.full((len(cloud),), 1 / len(cloud), dtype=torch.float64, device=cloud.points.device)
    if start is None:
        return uniform
    u = start.weights / start.weights.sum()
    values = torch.linalg.eigvalsh(cloud.moment(u))
    return u if float(values[0]) > _SINGULAR * float(values[-1]) else (u + uniform) / 2


@dataclass
class _Ascent(Weighted):
    inverse: Tensor  # M⁻¹ [D, D]
    steps: int = 0


@ELLIPSOIDS.register("khachiyan")
@dataclass(frozen=True)
class Khachiyan(EllipsoidMethod[_Ascent]):
    """Khachiyan's barycentric ascent: in each step the farthest point gains weight. O(nD) a step, O(D/ε) steps.

    With u ← (u + λe_j)/(1 + λ) the leverages and M⁻¹ change by a rank-one update; λ = (g_j − D)/((D − 1)g_j) makes
    log det largest. Weights of points that do not belong to the support shrink slowly.
    """

    default_max_iter: ClassVar[int] = 1_000_000

    def init(self, program: Cloud, start: Start | None) -> _Ascent:
        """Uniform weights, or those given."""
        state = _Ascent(program, start_weights(program, start), torch.empty(0), torch.empty(0))
        _refactor(state)
        return state

    def step(self, state: _Ascent) -> None:
        """Move weight to, or from, one point."""
        j = self._point(state)
        D, g = state.cloud.size, float(state.g[j])
        if D == 1:  # the farthest point is the answer
            state.u = torch.zeros_like(state.u).index_fill_(0, state.g.argmax(), 1.0)
            _refactor(state)
            return
        share = float(state.u[j])
        step = max((g - D) / ((D - 1) * g), -share) if g > 0 else -share
        q = state.cloud.rows(slice(j, j + 1))[0]
        state.steps += 1
        if state.steps % _EVERY == 0 and abs(float(q @ state.inverse @ q) - g) > _DRIFT * g:
            _refactor(state)
            return
        v = q @ state.inverse
        shrink = step / (1 + step * g)
        for block, z in state.cloud.mapped(v[:, None]):
            state.g[block] -= shrink * z[:, 0].square_()
        state.g *= 1 + step
        state.inverse = (1 + step) * (state.inverse - shrink * torch.outer(v, v))
        state.u[j] += step
        state.u.clamp_(min=0).div_(1 + step)

    def _point(self, state: _Ascent) -> int:
        return int(state.g.argmax())


@ELLIPSOIDS.register("wolfe-atwood")
@dataclass(frozen=True)
class WolfeAtwood(Khachiyan):
    """Khachiyan's ascent with away steps (Wolfe, Atwood, Todd and Yıldırım): linear convergence in the end.

    The nearest point of the support loses weight where that is farther from optimal than the farthest point.
    """

    def _point(self, state: _Ascent) -> int:
        far = int(state.g.argmax())
        near = int(torch.where(state.u > 0, state.g, torch.inf).argmin())
        return far if float(state.g[far] + state.g[near]) > 2 * state.cloud.size else near


def _refactor(state: _Ascent) -> None:
    """M⁻¹ and the leverages, afresh from u."""
    C = factor(state.cloud.moment(state.u))
    state.inverse, state.g = C @ C.T, state.cloud.leverages(C)


@dataclass
class _Scaled(Weighted):
    log_det: float
    power: float


@ELLIPSOIDS.register("multiplicative")
@dataclass(frozen=True)
class Multiplicative(EllipsoidMethod[_Scaled]):
    """The multiplicative algorithm: u_i ← u_i·g_i^p, scaled to sum 1, all points in every step.

    log det M(u) rises in every step with p = 1 (Titterington 1976, Silvey et al. 1978); p grows while it rises, and a
    step after which it falls is taken again with half of p. Fast for a large gap or support, slow to the end.

    Args:
        power: The largest p; 1 is the plain algorithm.
    """

    power: float = 8.0

    def __post_init__(self) -> None:
        checked_positive("power", self.power)

    def init(self, program: Cloud, start: Start | None) -> _Scaled:
        """Uniform weights, or those given; a point of weight 0 would keep it, so that each has a little."""
        u = start_weights(program, start)
        u = u if bool(u.all()) else torch.lerp(u, torch.full_like(u, 1 / len(u)), _EACH)
        C = factor(program.moment(u))
        return _Scaled(program, u, program.leverages(C), _log_det(C), min(_FIRST, self.power))

    def step(self, state: _Scaled) -> None:
        """One step that does not lower log det."""
        while True:
            u = state.u * state.g.clamp(min=0) ** state.power
            u = u / u.sum()
            C = factor(state.cloud.moment(u))
            log_det = _log_det(C)
            if log_det >= state.log_det or state.power <= min(1.0, self.power):
                break
            state.power = max(1.0, state.power / 2)
        state.u, state.g, state.log_det = u, state.cloud.leverages(C), log_det
        state.power = min(self.power, _GROWTH * state.power)


def _log_det(C: Tensor) -> float:
    """log det M of CCᵀ = M⁻¹."""
    return -2 * float(C.diagonal().log().sum())


@ELLIPSOIDS.register("cvxpy")
@dataclass(frozen=True)
class ReferenceEllipsoid(CVXPY):
    """The reference formulation solved by a conic solver that cvxpy has installed; for some thousand points, d ≤ 20.

    About the origin, {x : xᵀXx ≤ 1}: maximise log det X over X ⪰ 0 with a_iᵀXa_i ≤ 1. With a free centre,
    {x : ‖Bx + b‖ ≤ 1}: maximise log det B over B ⪰ 0 and b with ‖Ba_i + b‖ ≤ 1.

    Args:
        backend: cvxpy's name of the solver, such as "CLARABEL" or "SCS".
        settings: The backend's own options by its own names.
    """

    def refuses(self, program: Cloud) -> str | None:  # type: ignore[override]  # noqa: ARG002 - it takes any points
        """Why these points cannot be taken, or None; MissingExtra is raised where cvxpy is not installed."""
        installed = self.installed()
        return None if self.backend.upper() in installed else f"cvxpy has {installed}, not {self.backend!r}"

    def run(self, program: Cloud, limits: Limits, start: Start | None, watch: Watch) -> Proposal:  # type: ignore[override]  # noqa: ARG002
        """Build and solve; the weights are the multipliers of the points' constraints."""
        import cvxpy as cp

        began = time.perf_counter()
        A, r = program.rows(slice(None))[:, : program.rank].cpu().numpy(), program.rank
        shape, shift = cp.Variable((r, r), PSD=True), cp.Variable((1, r))
        if program.free:
            inside = cp.norm(A @ shape + cp.vstack([shift] * len(A)), axis=1) <= 1
        else:
            inside = cp.sum(cp.multiply(A @ shape, A), axis=1) <= 1
        problem = cp.Problem(cp.Maximize(cp.log_det(shape)), [inside])
        wanted = max(1e-12, 1e-4 * limits.tol)
        clarabel = dict.fromkeys(("tol_gap_abs", "tol_gap_rel", "tol_feas"), wanted)
        clarabel["max_step_fraction"] = 0.9  # with its own 0.99 it gives up on one cloud in three
        accuracy = {"CLARABEL": clarabel, "SCS": dict.fromkeys(("eps_abs", "eps_rel"), wanted)}
        proposal = self.solved(problem, limits, accuracy, time.perf_counter() - began)
        found = inside.dual_value
        found = found[0] if isinstance(found, list) else found
        u = torch.zeros(1) if found is None else torch.as_tensor(found, dtype=torch.float64).reshape(-1).clamp(min=0)
        if proposal.ended == "failed" or not (bool(u.isfinite().all()) and float(u.sum()) > 0):
            return replace(proposal, ended="failed")
        return replace(proposal, weights=(u / u.sum()).to(program.points.device))
