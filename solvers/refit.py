"""The best weights on a given support, for all neurons at once: one solve for the squared loss, Newton for ReLU's.

Given which weights may be nonzero, neurons are independent convex problems. Each step solves, for neuron m with support
S, the normal equations H_SS δ = −g_S of its local quadratic model: g = Xᵀh(XU) and H = XᵀX over the samples whose h_m
responds to a change (all of them for the squared loss, so that one step is the answer).
"""

from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch import Tensor

from convexprune.solvers.arrays import blocks_of, check_shape
from convexprune.solvers.errors import InvalidInput, SolverRefused
from convexprune.solvers.fits import SquaredLoss
from convexprune.solvers.fits.base import LossFit, TargetFit
from convexprune.solvers.program import LayerProgram

__all__ = ["Model", "Packed", "Point", "conjugate", "descend", "factored", "model_of", "packed", "refit"]

_ENTRIES = 2**22  # of the matrices that are factorised together
_RANK = 1e-7  # of the largest eigenvalue; smaller ones are taken for rounding
_CURVATURES = 50  # at most
_SLOW = 0.2  # the part of the last promise that the next may still make
_SETTLED = 1e-20  # of the loss, what a further step promises: rounding ends it first


def refit(program: LayerProgram, support: Tensor) -> Tensor:
    """Minimise ½‖h(XU)‖² over U that vanishes off the support: h = Z − Y, or the one-sided h of the ReLU fits.

    Where inputs depend on each other the minimiser is not unique: steps then use a curvature damped by 1e-12 of its
    diagonal (1e-6 in float32), which leaves the loss as small and chooses weights that are not large.

    Args:
        program: Its loss counts; of a set (``Ball``, ``ReluBall``) the loss of the same geometry; not its penalty.
        support: Boolean [N, M], the weights that may be nonzero.

    Returns:
        U [N, M] in the program's dtype.

    Raises:
        SolverRefused: A Net-Trim fit, whose ceiling is a constraint that a support may make infeasible.
        InvalidInput, ShapeMismatch: The support is not boolean, or not [N, M].
    """
    if not isinstance(support, Tensor) or support.dtype != torch.bool:
        raise InvalidInput(f"support: expected a boolean tensor, found {getattr(support, 'dtype', type(support))}")
    check_shape("support", support, program.shape, "the weights")
    reason = unfit(program)
    if reason:
        raise SolverRefused(f"refit cannot take this program: {reason}")
    support = support.to(program.inputs.device)
    linear = Quadratic(program)
    U = descend(linear, linear.at(linear.zeros()), support).weights
    model = model_of(program)
    if isinstance(model, OneSided):
        U = descend(model, model.at(U.to(program.dtype)), support).weights
    return U.to(program.dtype)


def unfit(program: LayerProgram) -> str | None:
    """Why there is no loss to refit, or None."""
    fit = program.fit
    if not isinstance(fit, TargetFit):
        return f"expected one of the fits of this library, found {type(fit).__name__}"
    if fit.seen() is not None:
        return f"{type(fit).__name__} has a ceiling, which a given support may not be able to keep; use ReluLoss"
    return None


@dataclass(frozen=True, eq=False)
class Point:
    """A loss around weights U [N, M]: its value [M] and gradient [N, M] neuron by neuron, and who responds."""

    weights: Tensor
    value: Tensor
    gradient: Tensor
    outputs: Tensor | None = None  # XU
    active: Tensor | None = None  # [P, M]: where h changes with XU

    def only(self, neurons: Tensor) -> "Point":
        """That of some neurons."""
        return Point(*(None if a is None else a[..., neurons] for a in self._fields()))  # type: ignore[arg-type]

    def put(self, neurons: Tensor, other: "Point") -> "Point":
        """This one with some neurons from another."""
        pairs = zip(self._fields(), other._fields(), strict=True)
        return Point(*(None if a is None else a.index_copy(a.ndim - 1, neurons, b) for a, b in pairs))  # type: ignore[arg-type]

    def _fields(self) -> tuple[Tensor | None, ...]:
        return self.weights, self.value, self.gradient, self.outputs, self.active


class Model(Protocol):
    """A loss on weights, neuron by neuron, with its local quadratic model."""

    factors: torch.dtype  # what curvatures are computed and factorised in; gradients decide what is right

    def only(self, neurons: Tensor) -> Self:
        """The loss of some neurons."""

    def at(self, U: Tensor) -> Point:
        """Value and gradient at U."""

    def curvature(self, at: Point, neurons: Tensor, rows: Tensor) -> Tensor:
        """[c, s, s], H of each of c neurons restricted to its inputs ``rows`` [c, s]."""

    def diagonal(self, at: Point) -> Tensor:
        """[N, M], the diagonals of H."""

    def move(self, at: Point, step: Tensor) -> Point:
        """U + t·step, t [M] such that no neuron's loss rises."""


class Quadratic:
    """½‖XU − Y‖² through XᵀX, XᵀY and ‖y_m‖² in float64."""

    ridge = 0.0

    def __init__(self, program: LayerProgram, factors: torch.dtype = torch.float64) -> None:
        self.factors = factors
        fit = program.fit
        assert isinstance(fit, TargetFit)  # noqa: S101 - unfit saw to it
        X, Y = program.inputs, fit.anchor
        N, M = program.shape
        self.gram, self.moment = X.new_zeros(N, N, dtype=torch.float64), X.new_zeros(N, M, dtype=torch.float64)
        self.square = X.new_zeros(M, dtype=torch.float64)
        for rows in blocks_of(X):
            x, y = X[rows].to(torch.float64), Y[rows].to(torch.float64)
            self.gram.addmm_(x.T, x)
            self.moment.addmm_(x.T, y)
            self.square += y.square().sum(0)

    def damped(self, ridge: float, centre: Tensor) -> "Quadratic":
        """The same plus ½ridge‖U − centre‖²."""
        new, centre = copy(self), centre.to(self.moment)
        new.ridge = self.ridge + ridge
        new.gram = self.gram + ridge * torch.eye(len(self.gram), dtype=self.gram.dtype, device=self.gram.device)
        new.moment, new.square = self.moment + ridge * centre, self.square + ridge * centre.square().sum(0)
        return new

    def only(self, neurons: Tensor) -> "Quadratic":
        """That of some neurons."""
        new = copy(self)
        new.moment, new.square = self.moment[:, neurons], self.square[neurons]
        return new

    def solution(self) -> Tensor:
        """Least squares of small norm: the minimiser without directions that rounding decides."""
        d = self.gram.diagonal().clamp(min=0).sqrt()[:, None]
        d = torch.where(d > 0, d, 1.0)
        values, vectors = torch.linalg.eigh(self.gram / d / d.T)
        inverse = torch.where(values > _RANK * values[-1], 1 / values.clamp(min=1e-300), 0.0)
        solution: Tensor = (vectors * inverse) @ (vectors.T @ (self.moment / d)) / d
        return solution

    def zeros(self) -> Tensor:
        """U = 0."""
        return torch.zeros_like(self.moment)

    def at(self, U: Tensor) -> Point:
        """½(uᵀGu − 2uᵀc + ‖y‖²) and Gu − c."""
        U = U.to(self.moment)
        gradient = self.gram @ U - self.moment
        value = ((U * (gradient - self.moment)).sum(0) + self.square) / 2
        return Point(U, value.clamp_(min=0), gradient)

    def curvature(self, at: Point, neurons: Tensor, rows: Tensor) -> Tensor:  # noqa: ARG002 - the same everywhere
        """Blocks of XᵀX."""
        gram = self.gram.to(self.factors)
        return gram[rows[:, :, None], rows[:, None, :]]

    def diagonal(self, at: Point) -> Tensor:
        """That of XᵀX."""
        return self.gram.diagonal()[:, None].expand_as(at.gradient)

    def move(self, at: Point, step: Tensor) -> Point:
        """A full step: the model is the loss."""
        return self.at(at.weights + step)


class OneSided:
    """½‖h(XU)‖² + ½ridge‖U − centre‖² of a one-sided h, from the samples."""

    def __init__(self, program: LayerProgram) -> None:
        fit = program.fit
        assert isinstance(fit, TargetFit)  # noqa: S101 - unfit saw to it
        program = program.to(program.dtype)
        self.inputs, self.fit = program.inputs, program.fit
        self.columns = self.inputs.T.contiguous()  # so that a few of them are found together in memory
        self.free = fit.unrestricted()
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

    def at(self, U: Tensor) -> Point:
        """½‖h‖² and Xᵀh, and what the ridge adds to them."""
        return self._point(U, self.inputs @ U)

    def _point(self, U: Tensor, Z: Tensor) -> Point:
        h = self.fit.residual(Z)
        gradient = self.columns @ h + self.ridge * (U - self.centre)
        return Point(U, self._value(U, h), gradient, Z, self.free | (h > 0))

    def _value(self, U: Tensor, h: Tensor) -> Tensor:
        value = h.square().sum(0, dtype=torch.float64) / 2
        return value + self.ridge / 2 * (U - self.centre).square().sum(0, dtype=torch.float64)

    def curvature(self, at: Point, neurons: Tensor, rows: Tensor) -> Tensor:
        """XᵀX of the samples that respond."""
        assert at.active is not None  # noqa: S101 - every Point made here has it
        grams = []
        for m, inputs in zip(neurons.tolist(), rows, strict=True):
            x = self.columns[inputs].index_select(1, at.active[:, m].nonzero()[:, 0])
            grams.append(x @ x.T)
        H = torch.stack(grams)
        H.diagonal(dim1=1, dim2=2).add_(self.ridge)
        return H

    def diagonal(self, at: Point) -> Tensor:
        """Columnwise sums of squares over the samples that respond."""
        assert at.active is not None  # noqa: S101
        return self.columns.square() @ at.active.to(self.inputs.dtype) + self.ridge

    def move(self, at: Point, step: Tensor) -> Point:
        """Halve each neuron's step until its loss falls by a part of what the slope promises; else stay."""
        assert at.outputs is not None  # noqa: S101
        step = step.to(at.weights)
        change, slope = self.inputs @ step, (at.gradient * step).sum(0, dtype=torch.float64)
        t = torch.ones_like(slope)
        for _ in range(20):
            h = self.fit.residual(at.outputs + change * t.to(change))
            rises = self._value(at.weights + step * t.to(step), h) > at.value + 1e-4 * t * slope
            if not bool(rises.any()):
                break
            t = torch.where(rises, t / 2, t)
        t = torch.where(rises, 0.0, t).to(change)
        return self._point(at.weights + step * t, at.outputs + change * t)


def model_of(program: LayerProgram) -> "Quadratic | OneSided":
    """The loss of the program's geometry."""
    fit = program.fit
    assert isinstance(fit, TargetFit)  # noqa: S101 - unfit saw to it
    loss: LossFit = fit.as_loss()
    return Quadratic(program, program.dtype) if isinstance(loss, SquaredLoss) else OneSided(program)


def descend(
    model: Model, at: Point, support: Tensor, settled: float = _SETTLED, neurons: Tensor | None = None
) -> Point:
    """Newton steps on the support until they promise nothing more; no neuron's loss ever rises.

    Args:
        model: The loss.
        at: Where to start; what is off the support is set to 0 first.
        support: Boolean [N, M].
        settled: A neuron is done once a step promises less than this part of its loss.
        neurons: Boolean [M], those to look at; None: all.
    """
    if bool((at.weights * ~support).count_nonzero()):
        at = model.at(at.weights * support)
    every = torch.ones_like(at.value, dtype=torch.bool) if neurons is None else neurons
    todo, floor = every.nonzero()[:, 0], settled * at.value.mean()
    for _ in range(_CURVATURES):
        if not len(todo):
            break
        few = model.only(todo)
        before = at.only(todo)
        after, promised = _chords(few, before, support[:, todo], settled, floor)
        at = after if len(todo) == len(at.value) else at.put(todo, after)
        # What no longer falls although a step promises it to is down to rounding.
        todo = todo[(promised > settled * after.value + floor) & (after.value < before.value)]
    return at


def _chords(model: Model, at: Point, support: Tensor, settled: float, floor: Tensor) -> tuple[Point, Tensor]:
    """Steps with one curvature for as long as each promises far less than the one before; the last promises [M]."""
    newton, last = _Newton.of(model, at, support), float("inf")
    while True:
        step = newton.step(at)
        promised = -(at.gradient * step).sum(0, dtype=torch.float64)
        at = model.move(at, step)
        total = float(promised.sum())
        if bool((promised <= settled * at.value + floor).all()) or not total < _SLOW * last:
            return at, promised
        last = total


def conjugate(model: Quadratic, at: Point, support: Tensor, steps: int = 20) -> Point:
    """Conjugate gradients on the support in place of factorisations: cheaper where supports are large, less exact."""
    H = model.gram.to(model.factors)
    d = H.diagonal().clamp(min=0).sqrt()[:, None]
    d = torch.where(d > 0, d, 1.0)
    at = model.at(at.weights * support)
    r = (-at.gradient.to(H) / d) * support
    V, p, size = torch.zeros_like(r), r, r.square().sum(0)
    for _ in range(steps):
        Hp = ((H @ (p / d)) / d) * support
        t = size / (p * Hp).sum(0).clamp(min=torch.finfo(H.dtype).tiny)
        V, r = V + t * p, r - t * Hp
        before, size = size, r.square().sum(0)
        p = r + size / before.clamp(min=torch.finfo(H.dtype).tiny) * p
    new = model.at(at.weights + (V / d).to(at.weights))
    return model.at(torch.where(new.value < at.value, new.weights, at.weights))


@dataclass(frozen=True, eq=False)
class _Newton:
    """The curvature of neurons on their supports, factorised, for as many steps as it serves."""

    parts: list[tuple["Packed", Tensor, Tensor]]

    @classmethod
    def of(cls, model: Model, at: Point, support: Tensor) -> "_Newton":
        parts = packed(support)
        return cls([(part, *factored(part.fill(model.curvature(at, part.neurons, part.rows)))) for part in parts])

    def step(self, at: Point) -> Tensor:
        """−H_SS⁻¹ g_S."""
        step = torch.zeros_like(at.gradient)
        for part, factor, d in self.parts:
            g = part.take(at.gradient).to(d) / d
            part.put(step, (-torch.cholesky_solve(g[:, :, None], factor)[:, :, 0] / d).to(step))
        return step


def factored(A: Tensor) -> tuple[Tensor, Tensor]:
    """Cholesky factors of A [c, s, s] scaled to a unit diagonal and slightly damped, and the scales [c, s]."""
    d = A.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt()
    d = torch.where(d > 0, d, 1.0)
    A = A / d[:, :, None] / d[:, None, :]
    damping = 1e-6 if A.dtype == torch.float32 else 1e-12
    while True:
        A.diagonal(dim1=1, dim2=2).add_(damping)
        factor, failed = torch.linalg.cholesky_ex(A)
        if not bool(failed.any()):
            return factor, d
        damping *= 100


@dataclass(frozen=True, eq=False)
class Packed:
    """Neurons [c] of similar support size, with the inputs in their supports: rows [c, s], valid [c, s]."""

    neurons: Tensor
    rows: Tensor
    valid: Tensor

    def fill(self, A: Tensor) -> Tensor:
        """A [c, s, s] with the identity where there is only padding."""
        if not bool(self.valid.all()):
            A = A * (self.valid[:, :, None] & self.valid[:, None, :])
        A.diagonal(dim1=1, dim2=2).add_(~self.valid)
        return A

    def take(self, B: Tensor) -> Tensor:
        """[c, s] in float64 out of B [N, M], 0 where there is only padding."""
        return B[self.rows, self.neurons[:, None]].to(torch.float64) * self.valid

    def put(self, B: Tensor, values: Tensor) -> None:
        """The other way."""
        neurons = self.neurons[:, None].expand_as(self.rows)
        B[self.rows[self.valid], neurons[self.valid]] = values[self.valid]


def packed(support: Tensor, extra: int = 0) -> Iterator[Packed]:
    """The neurons in the order of their support sizes, in parts whose [c, s + extra, s + extra] matrices stay small."""
    sizes, order = support.sum(0).sort(descending=True, stable=True)
    first = 0
    while first < len(order) and int(sizes[first]) > 0:
        s = int(sizes[first])
        neurons = order[first : first + max(1, _ENTRIES // (s + extra) ** 2)]
        first += len(neurons)
        inside = support.T[neurons]
        valid, rows = inside.to(torch.uint8).sort(dim=1, descending=True, stable=True)
        yield Packed(neurons, rows[:, :s], valid[:, :s].to(torch.bool))
