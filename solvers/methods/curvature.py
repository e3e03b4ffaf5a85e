"""Losses as functions of weights: value, gradient and local quadratic model of each neuron.

A neuron's quadratic model has g = Xᵀh(XU) and H = XᵀX over the samples whose h responds to a change: all of them for
the squared loss, which therefore needs XᵀX, XᵀY and ‖y_m‖² alone.
"""

from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from convexprune.solvers.arrays import blocks_of
from convexprune.solvers.methods.normal import NormalMatrix
from convexprune.solvers.programs import LayerProgram, SquaredLoss
from convexprune.solvers.programs.fits import TargetFit

_TRIALS = 20  # of a step's length at most
_NEAR = 0.5  # of the slope at the start, where a length is good enough
_RANK = 1e-7  # of the largest eigenvalue; smaller ones are taken for rounding


@dataclass(frozen=True, eq=False)
class Point:
    """A loss around weights U [N, M]: its value [M] and gradient [N, M] neuron by neuron, and who responds."""

    weights: Tensor
    value: Tensor
    gradient: Tensor
    outputs: Tensor | None = None  # XU
    active: Tensor | None = None  # [P, M]: where h changes with XU
    settled: Tensor | None = None  # [M], after a descent: whether it came to its end

    def only(self, neurons: Tensor) -> "Point":
        """That of some neurons."""
        return Point(*(None if a is None else a[..., neurons] for a in self._fields()))  # type: ignore[arg-type]

    def put(self, neurons: Tensor, other: "Point") -> "Point":
        """This one with some neurons from another."""
        pairs = zip(self._fields(), other._fields(), strict=True)
        return Point(*(None if a is None else a.index_copy(a.ndim - 1, neurons, b) for a, b in pairs))  # type: ignore[arg-type]

    def _fields(self) -> tuple[Tensor | None, ...]:
        return self.weights, self.value, self.gradient, self.outputs, self.active


class Quadratic:
    """½‖XU − Y‖² through XᵀX, XᵀY and ‖y_m‖² in float64; curvatures are factorised in ``factors``."""

    ridge = 0.0

    def __init__(self, program: LayerProgram, factors: torch.dtype = torch.float64) -> None:
        self.factors = factors
        X, Y = program.inputs, program.fit.anchor
        N, M = program.shape
        self.gram, self.moment = NormalMatrix.of(X), X.new_zeros(N, M, dtype=torch.float64)
        self.square = X.new_zeros(M, dtype=torch.float64)
        for rows in blocks_of(X):
            x, y = X[rows].to(torch.float64), Y[rows].to(torch.float64)
            self.moment.addmm_(x.T, y)
            self.square += y.square().sum(0)

    def damped(self, ridge: float, centre: Tensor) -> "Quadratic":
        """The same plus ½ridge‖U − centre‖²."""
        new, centre = copy(self), centre.to(self.moment)
        new.ridge = self.ridge + ridge
        new.gram = self.gram.plus(ridge)
        new.moment, new.square = self.moment + ridge * centre, self.square + ridge * centre.square().sum(0)
        return new

    def only(self, neurons: Tensor) -> "Quadratic":
        """That of some neurons."""
        new = copy(self)
        new.moment, new.square = self.moment[:, neurons], self.square[neurons]
        return new

    def solution(self) -> Tensor:
        """Least squares of small norm: the minimiser without directions that rounding decides."""
        d = self.gram.lengths()
        values, vectors = self.gram.scaled(d).eigen()
        inverse = torch.where(values > _RANK * values.max(), 1 / values.clamp(min=1e-300), 0.0)
        solution: Tensor = (vectors * inverse) @ (vectors.T @ (self.moment / d)) / d
        return solution

    def at(self, U: Tensor) -> Point:
        """½(uᵀGu − 2uᵀc + ‖y‖²) and Gu − c."""
        U = U.to(self.moment)
        gradient = self.gram @ U - self.moment
        value = ((U * (gradient - self.moment)).sum(0) + self.square) / 2
        return Point(U, value.clamp_(min=0), gradient)

    def curvature(self, at: Point, neurons: Tensor, rows: Tensor, idle: Tensor | None = None) -> Tensor:  # noqa: ARG002
        """Blocks of XᵀX."""
        return self.gram.to(self.factors).block(rows)

    def diagonal(self, at: Point) -> Tensor:
        """That of XᵀX."""
        return self.gram.diagonal()[:, None].expand_as(at.gradient)

    def move(self, at: Point, step: Tensor) -> Point:
        """A full step: the model is the loss."""
        return self.at(at.weights + step)


class OneSided:
    """½‖h(XU)‖² + ½ridge‖U − centre‖² of a one-sided h, from the samples; exact: of h = ReLU(XU) − Y."""

    def __init__(self, program: LayerProgram, exact: bool = False) -> None:
        program = program.to(program.dtype)
        self.inputs, self.fit = program.inputs, program.fit
        self.columns = self.inputs.T.contiguous()  # so that a few of them are found together in memory
        self.free, self.exact = self.fit.unrestricted(), exact
        self.ridge, self.centre = 0.0, program.inputs.new_zeros(())
        self.factors = program.dtype

    def damped(self, ridge: float, centre: Tensor) -> "OneSided":
        """The same with a ridge."""
        new = copy(self)
        new.ridge, new.centre = ridge, centre.to(self.inputs)
        return new

    def only(self, neurons: Tensor) -> "OneSided":
        """That of some neurons."""
        if len(neurons) == self.fit.shape[1]:
            return self
        new = copy(self)
        new.fit, new.free = self.fit.map(lambda a: a[:, neurons]), self.free[:, neurons]
        new.centre = self.centre if self.centre.ndim == 0 else self.centre[:, neurons]
        return new

    def block(self, rows: slice) -> "OneSided":
        """That of some samples."""
        new = copy(self)
        new.inputs, new.columns = self.inputs[rows], self.columns[:, rows]
        new.fit, new.free = self.fit.map(lambda a: a[rows]), self.free[rows]
        return new

    def majorised(self, U: Tensor) -> Tensor:
        """Xᵀ(Z − h) at Z = XU: ½‖XU' − (Z − h)‖² bounds the loss from above, up to a constant."""
        Z = self.inputs @ U
        h = self._residual(Z)
        return self.inputs.T @ Z.sub_(h.mul_(Z > 0) if self.exact else h)

    def at(self, U: Tensor) -> Point:
        """½‖h‖² and Xᵀh, and what the ridge adds to them."""
        return self._point(U, self.inputs @ U)

    def _parts(self) -> Iterator[tuple[slice, "OneSided"]]:
        """Blocks of samples that a cache holds."""
        return ((rows, self.block(rows)) for rows in blocks_of(self.inputs, self.fit.shape[1]))

    def _point(self, U: Tensor, Z: Tensor) -> Point:
        value, gradient = self._ridge_value(U), self.ridge * (U - self.centre)
        active = torch.empty_like(self.free)
        for rows, part in self._parts():
            h = part._residual(Z[rows])
            active[rows] = Z[rows] > 0 if self.exact else part.free | (h > 0)
            gradient.addmm_(part.columns, h * active[rows])
            value += h.square_().sum(0).to(torch.float64) / 2
        return Point(U, value, gradient, Z, active)

    def _residual(self, Z: Tensor) -> Tensor:
        return Z.clamp(min=0).sub_(self.fit.anchor) if self.exact else self.fit.residual(Z)

    def _ridge_value(self, U: Tensor) -> Tensor:
        return self.ridge / 2 * (U - self.centre).square().sum(0, dtype=torch.float64)

    def curvature(self, at: Point, neurons: Tensor, rows: Tensor, idle: Tensor | None = None) -> Tensor:
        """[c, s, s], H of each of c neurons restricted to its inputs ``rows`` [c, s].

        Samples that do not respond count by ``idle`` [c] in [0, 1]. Where that is 1, the quadratic model bounds the
        loss from above, so that its minimiser never raises it.
        """
        assert at.active is not None  # noqa: S101 - every Point made here has it
        s, P = rows.shape[1], len(self.inputs)
        H = self.columns.new_empty(len(rows), s, s)
        # The same memory for every neuron: fresh pages would take as long as the products.
        gathered, kept = self.columns.new_empty(s, P), self.columns.new_empty(s * P)
        parts = [0.0] * len(rows) if idle is None else idle.tolist()
        for product, inputs, responds, part in zip(H, rows, at.active.T[neurons], parts, strict=True):
            torch.index_select(self.columns, 0, inputs, out=gathered)
            if part > 0:
                x = gathered.mul_(torch.where(responds, 1.0, part**0.5).to(gathered))
            else:
                samples = responds.nonzero()[:, 0]
                x = kept[: s * len(samples)].view(s, len(samples))
                torch.index_select(gathered, 1, samples, out=x)
            torch.mm(x, x.T, out=product)
        H.diagonal(dim1=1, dim2=2).add_(self.ridge)
        return H

    def diagonal(self, at: Point) -> Tensor:
        """[N, M], the diagonals of H: columnwise sums of squares over the samples that respond."""
        assert at.active is not None  # noqa: S101
        return self.columns.square() @ at.active.to(self.inputs.dtype) + self.ridge

    def move(self, at: Point, step: Tensor) -> Point:
        """Each neuron to about the lowest point of its segment from U to U + step; never higher than U."""
        assert at.outputs is not None  # noqa: S101
        step = step.to(at.weights)
        change, slope = self.inputs @ step, (at.gradient * step).sum(0, dtype=torch.float64)
        t, low, high = torch.ones_like(slope), torch.zeros_like(slope), torch.ones_like(slope)
        before, after, best, least = slope, slope, low, at.value
        for trial in range(_TRIALS):
            value, along = self._along(at, step, change, t)
            best, least = torch.where(value <= least, t, best), torch.minimum(value, least)
            near = (along.abs() <= _NEAR * slope.abs()) | ((along <= 0) & (t == 1))
            if bool((near & (value < at.value + 1e-4 * t * slope) | (slope >= 0)).all()):
                break
            falling = along < 0
            low, before = torch.where(falling, t, low), torch.where(falling, along, before)
            high, after = torch.where(falling, high, t), torch.where(falling, after, along)
            # Slopes are piecewise linear: a secant where that is reasonable, halves where it is not.
            part = (before / (before - after)).clamp(0.01, 0.99) if trial % 2 == 0 else torch.full_like(t, 0.5)
            t = low + (high - low) * part
        best = best.to(change)
        return self._point(at.weights + step * best, torch.addcmul(at.outputs, change, best, out=change))

    def _along(self, at: Point, step: Tensor, change: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The loss at U + t·step, and its derivative by t, [M] each."""
        assert at.outputs is not None  # noqa: S101
        U = at.weights + step * t.to(step)
        value, slope = self._ridge_value(U), self.ridge * ((U - self.centre) * step).sum(0, dtype=torch.float64)
        for rows, part in self._parts():
            Z = torch.addcmul(at.outputs[rows], change[rows], t.to(change))
            h = part._residual(Z)
            g = h * (Z > 0) if self.exact else h
            slope = slope + (g * change[rows]).sum(0).to(torch.float64)
            value += h.square_().sum(0).to(torch.float64) / 2
        return value, slope


Model: TypeAlias = Quadratic | OneSided
"""A loss on weights, neuron by neuron, with its local quadratic model."""


def model_of(program: LayerProgram, exact: bool = False, quadratic: Quadratic | None = None) -> Model:
    """The loss of the program's geometry; exact: the ReLU's own error in place of its convex bound.

    A quadratic model of the program that is there already is not made again.
    """
    fit = program.fit
    assert isinstance(fit, TargetFit)  # noqa: S101 - unfit saw to it
    if isinstance(fit.as_loss(), SquaredLoss):
        return quadratic or Quadratic(program, program.dtype)
    return OneSided(program, exact)
