"""The Löwner ellipsoid: the one of least volume around given points, with a proof of how small it is."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from convexprune.solvers.arrays import ArrayLike, as_real, blocks_of, check_finite, checked_count, checked_positive
from convexprune.solvers.certificate.certificate import Certificate
from convexprune.solvers.certificate.solution import Seconds, Solution, Status, TracePoint
from convexprune.solvers.errors import InvalidInput, ShapeMismatch, SolverRefused
from convexprune.solvers.geometry.cloud import Cloud, as_weights, inverse, log_content
from convexprune.solvers.geometry.method import ELLIPSOIDS, EllipsoidSolver
from convexprune.solvers.methods.interface import Limits, Proposal, Start
from convexprune.solvers.methods.solve import Callback, Judge, provenance

_NO_WEIGHT = 1e-12  # relative to the largest: rounding of an interior-point method's zeros


def certify_weights(cloud: Cloud, weights: Tensor, _: Tensor | None = None) -> Certificate:
    """Value, bound and gap of the ellipsoid that weights [n] give; infinite where their moment is singular.

    value: the logarithm of its volume. bound: no ellipsoid around the points (about the same origin, if that is given)
    has a smaller one. gap: max (a − c)ᵀS⁻¹(a − c)/r − 1, so that value − bound = (r/2) log(1 + gap). violation: 0.
    """
    r = cloud.rank
    if tuple(weights.shape) != (len(cloud),):
        raise ShapeMismatch(f"weights: expected [{len(cloud)}] from the solver, found shape {list(weights.shape)}")
    R = cloud.triangle(dual_weights(weights))
    largest = float(cloud.leverages(inverse(R)).max())
    if not math.isfinite(largest):
        return Certificate(math.inf, -math.inf, math.inf, 0.0, r / 2)
    gap = max(0.0, cloud.gap(largest))
    # The last row and column of a lifted moment are those of the constant 1: det M = det S.
    bound = float(R.diagonal().abs().log().sum()) + r / 2 * math.log(max(r, 1)) + log_unit_ball(r)
    if frame := cloud.frame:
        bound += log_content(frame.scale[:, None] * frame.back.T)
    return Certificate(bound + r / 2 * math.log1p(gap), bound, gap, 0.0, r / 2)


def dual_weights(weights: Tensor) -> Tensor:
    """u ≥ 0 with Σu = 1, without what is only rounding; all 0 where there is nothing finite and positive."""
    u = weights.to(torch.float64).clamp(min=0)
    u = torch.where(u > _NO_WEIGHT * u.max(), u, 0.0)
    total = float(u.sum())
    return u / total if 0 < total < math.inf else torch.zeros_like(u)


def log_unit_ball(r: int) -> float:
    """The logarithm of the volume of the unit ball in R^r."""
    return r / 2 * math.log(math.pi) - math.lgamma(r / 2 + 1)


Center = Literal["origin", "free"]
_ENDED = ("status", "trace", "iterations", "seconds", "provenance")  # that a solution shares with an ellipsoid


@dataclass(frozen=True, eq=False)
class Ellipsoid:
    """{c + Gv : ‖v‖ ≤ 1}, r-dimensional in R^d; its support function is h ↦ cᵀh + √(hᵀΣh) with Σ = GGᵀ.

    Attributes:
        center: c [d], float64, as all arrays here.
        generator: G [d, r], of full rank r.
        inverse: G⁺ [r, d], an inverse on the ellipsoid's span: G⁺G = I.
        precision: Relative rounding of the points that it was made of: so far from its span belongs to it.
    """

    center: Tensor
    generator: Tensor
    inverse: Tensor
    precision: float = field(default=torch.finfo(torch.float64).eps, kw_only=True)

    @property
    def rank(self) -> int:
        """r: the dimension."""
        return self.generator.shape[1]

    @property
    def shape(self) -> Tensor:
        """Σ = GGᵀ [d, d]: the ellipsoid is {x : (x − c)ᵀΣ⁺(x − c) ≤ 1} within its span."""
        return self.generator @ self.generator.T

    @property
    def log_volume(self) -> float:
        """The natural logarithm of its r-dimensional volume, the unit ball's included."""
        return log_unit_ball(self.rank) + log_content(self.generator)

    def transform(self, points: ArrayLike) -> Tensor:
        """v [k, r] of points [k, d]: coordinates in which the ellipsoid is the unit ball."""
        x = self._points(points)
        return torch.cat([(x[block].to(self.center) - self.center) @ self.inverse.T for block in blocks_of(x)])

    def norms(self, points: ArrayLike) -> Tensor:
        """Mahalanobis norms [k] of points [k, d] about the centre: at most 1 inside; inf outside the span."""
        return self._measured(points)[0]

    def contains(self, points: ArrayLike, tol: float = 1e-9) -> Tensor:
        """Whether each of the points [k, d] is inside, up to a relative ``tol`` and rounding: booleans [k]."""
        norms, rounding = self._measured(points)
        return norms <= 1 + tol + rounding

    def _measured(self, points: ArrayLike) -> tuple[Tensor, Tensor]:
        """Norms [k], and how far rounding of the centre, and of the products with G⁺, may take each."""
        x = self._points(points)
        precision = max(self.precision, torch.finfo(x.dtype).eps)
        size = torch.linalg.vector_norm(self.generator, dim=1)
        found = []
        for block in blocks_of(x):
            a = x[block].to(self.center)
            relative = a - self.center
            moved = torch.finfo(a.dtype).eps * (self.center.abs() + a.shape[1] * relative.abs())
            v = relative @ self.inverse.T
            norms = torch.linalg.vector_norm(v, dim=1)
            # What lies outside the span, beyond what rounding of the coordinates explains.
            allowed = _OFF_SPAN * precision**0.5 * (relative.abs() + self.center.abs() + size * (1 + norms[:, None]))
            outside = ((relative - v @ self.generator.T).abs() > allowed).any(1)
            rounding = torch.linalg.vector_norm(moved @ self.inverse.T.abs(), dim=1)
            found.append(torch.stack([norms.masked_fill(outside, torch.inf), rounding]))
        both = torch.cat(found, dim=1)
        return both[0], both[1]

    def axes(self) -> Tensor:
        """Semi-axes [r, d], longest first: c ± axis are the ends.

        Coordinates are known to 1e-16 of the longest axis: divide columns by their units where these differ by 1e6.
        """
        left, lengths, _ = torch.linalg.svd(self.generator, full_matrices=False)
        axes: Tensor = (left * lengths).T
        return axes

    def _points(self, points: ArrayLike) -> Tensor:
        x = check_finite("points", as_real("points", points))
        if x.ndim != 2 or x.shape[1] != len(self.center):
            raise ShapeMismatch(f"points: expected [k, {len(self.center)}], found shape {list(x.shape)}")
        return x


@dataclass(frozen=True, eq=False)
class LownerEllipsoid(Ellipsoid):
    """A small ellipsoid around points a_i [n, d], with the proof of how small it is.

    Attributes:
        about: "origin" or "free": whether c was given as 0.
        support: Indices [k] of the points with a dual weight, ascending: at the optimum the points on the boundary.
        weights: u [k] > 0 of these, Σu = 1.
        certificate: value: ``log_volume``; bound: a lower bound on that of every ellipsoid that holds the points;
            gap: max ‖a − c‖²_S/r − 1 with S = Σ u (a − c)(a − c)ᵀ, 0 at the optimum.
        status, trace, iterations, seconds, provenance: As in ``Solution``.
    """

    about: Center
    support: Tensor
    weights: Tensor
    certificate: Certificate
    status: Status
    trace: tuple[TracePoint, ...]
    iterations: int
    seconds: Seconds
    provenance: Mapping[str, Any]

    @property
    def log_volume(self) -> float:
        """The natural logarithm of its r-dimensional volume, the unit ball's included."""
        return self.certificate.value

    @property
    def volume_factor(self) -> float:
        """Its volume is at most this times the least possible: (1 + gap)^{r/2}."""
        return float(torch.tensor(self.rank / 2 * math.log1p(self.certificate.gap), dtype=torch.float64).exp())

    @property
    def radius_factor(self) -> float:
        """ρ such that the ellipsoid shrunk by ρ about its centre lies in the hull of the support (of ± the support).

        √(r(1 + gap)) about the origin, r(1 + gap) with a free centre (docs/ellipsoid.md has the proofs).
        """
        square = self.rank * (1 + self.certificate.gap)
        return math.sqrt(square) if self.about == "origin" else square

    def to_dict(self) -> dict[str, Any]:
        """Everything but the arrays, as plain data."""
        own = {name: getattr(self, name) for name in ("rank", "about", "log_volume", "volume_factor", "radius_factor")}
        ended: dict[str, Any] = {name: getattr(self, name) for name in ("certificate", *_ENDED)}
        solved = Solution(torch.empty(0), None, **ended).to_dict()
        del solved["nonzeros"], solved["shape"]
        return own | {"support": len(self.support)} | solved


_OFF_SPAN = 0.1  # times the square root of the precision: 1.5e-9 in float64, 3.5e-5 in float32


def lowner_ellipsoid(
    points: ArrayLike,
    tol: float = 1e-3,
    *,
    center: Center = "origin",
    weights: ArrayLike | None = None,
    max_passes: int | None = None,
    time_limit: float | None = None,
    callback: Callback | None = None,
    solver: str | EllipsoidSolver = "working-set",
    **options: Any,
) -> LownerEllipsoid:
    """The ellipsoid of least volume around points a_i [n, d], to a certified accuracy.

    About the origin (around ±a_i): with M = Σ u_i a_i a_iᵀ of weights u in the simplex and κ = max a_iᵀM⁻¹a_i, the
    ellipsoid {x : xᵀM⁻¹x ≤ κ} holds all the points and has at most (κ/r)^{r/2} times the least volume. A free centre
    is the same in one dimension more, for the points (a_i, 1).

    Args:
        points: A numpy array (memory-mapped ones included) or a tensor on any device, read in blocks, and judged and
            solved for in float64. They need not span R^d: the ellipsoid is that of their span.
        tol: The gap κ/r − 1 to reach: the log-volume is within (r/2)·log(1 + tol) of the least possible.
        center: "origin", or "free".
        weights: Dual weights u [n] ≥ 0 to start from.
        max_passes: Steps of the solver at most, each of which reads all the points about once (the multiplicative
            algorithm twice); None: its own default.
        time_limit: Seconds at most, judging included, after the two to six passes that look at the points first.
        callback: Called with a ``TracePoint`` each time that the solve is judged; a true answer stops it.
        solver: "working-set" (the default), "wolfe-atwood", "khachiyan", "multiplicative", "cvxpy", or an instance.
        **options: The solver's own.

    Raises:
        ShapeMismatch, EmptyInput, NonFinite: The points, or the weights, are no finite matrix of the right shape.
        InvalidInput: An unknown ``center``, negative weights, or none that is positive, no callback, or points that
            are farther apart, or closer together, than float64 can compute with.
        InvalidTolerance: tol or a limit outside its range.
        UnknownSolver, UnknownOption, MissingExtra, SolverRefused: As in ``solve``.
    """
    if not isinstance(center, str) or center not in ("origin", "free"):
        raise InvalidInput(f"center: expected 'origin' or 'free', found {center!r}")
    passes = None if max_passes is None else checked_count("max_passes", max_passes)
    limits = Limits(checked_positive("tol", tol), 0.0, passes, time_limit)
    name, method = ELLIPSOIDS.make(solver, options)
    began = time.perf_counter()
    cloud = Cloud.of(points, center == "free")
    reason = method.refuses(cloud)
    if reason:
        raise SolverRefused(f"solver {name!r} cannot take these points: {reason}. Choose another solver")
    start = None
    if weights is not None:
        u = as_weights(weights, len(cloud)).to(cloud.points.device)
        if not bool(u.any()):
            raise InvalidInput("weights: expected at least one positive number; leave them out to start evenly")
        u = u / u.max()  # so that no sum overflows
        start = Start(u / u.sum())
    judge = Judge(partial(certify_weights, cloud), limits, callback)
    framed, judge.began = judge.began - began, began
    nothing = torch.full((len(cloud),), torch.nan, dtype=torch.float64, device=cloud.points.device)
    if cloud.rank == 0:  # all points are the same: the ellipsoid is that point
        first = torch.arange(len(cloud), device=nothing.device) == 0
        proposal = Proposal(first.to(nothing), None, "own rule", 0, 0.0, "all points are one")
    else:
        proposal = method.run(cloud, limits, start, judge)
    proposal = replace(proposal, setup=proposal.setup + framed)
    made = provenance(name, method, cloud.points, limits, proposal)
    return _ellipsoid(cloud, center, judge.verdict(proposal, nothing, made))


def _ellipsoid(cloud: Cloud, center: Center, solution: Solution) -> LownerEllipsoid:
    """c [d], G [d, r] and G⁺ [r, d] from the weights' moment M, and what was judged; NaN where M is singular."""
    u, r, frame, certificate = dual_weights(solution.weights), cloud.rank, cloud.frame, solution.certificate
    assert frame is not None  # noqa: S101 - the caller's own points have one
    R, radius = cloud.triangle(u), math.sqrt(r * (1 + certificate.gap))
    y = torch.zeros(r, dtype=R.dtype, device=R.device)
    if cloud.free:  # RᵀR = Σ u (y, 1)(y, 1)ᵀ: the constant comes last
        y = (R.T @ R[:, -1])[:-1]
        # M = [[S + ccᵀ, c], [cᵀ, 1]] with S = Σ u yyᵀ − ccᵀ; with the constant first, its triangle has that of S below.
        R = torch.linalg.qr(R.roll(1, dims=1), mode="r").R[1:, 1:]
    if not math.isfinite(radius):  # volumes have logarithms of either sign: nothing is known of the least
        certificate, radius = replace(certificate, bound=-math.inf), math.nan
    ended: dict[str, Any] = {name: getattr(solution, name) for name in _ENDED}
    support = u.nonzero()[:, 0]
    return LownerEllipsoid(
        (frame.origin + (y[None] @ frame.back) * frame.scale)[0],
        radius * (R @ frame.back).T * frame.scale[:, None],
        ((frame.into / frame.scale[:, None]) @ inverse(R)).T / radius,
        center,
        support,
        u[support],
        certificate,
        precision=torch.finfo(cloud.points.dtype).eps,
        **ended,
    )
