"""The best weights on a given support, for all neurons at once: one solve for the squared loss, Newton for ReLU's.

Given which weights may be nonzero, neurons are independent convex problems. Each step solves, for neuron m with support
S, the normal equations H_SS δ = −g_S of its local quadratic model (``curvature``).
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from convexprune.solvers.arrays import check_shape
from convexprune.solvers.errors import InvalidInput, NonFinite, SolverRefused
from convexprune.solvers.methods.curvature import Model, OneSided, Point, Quadratic, model_of
from convexprune.solvers.methods.normal import positive_or_one
from convexprune.solvers.programs import LayerProgram, NetTrimLoss, NetTrimSet
from convexprune.solvers.programs.claims import FITS, is_plain
from convexprune.solvers.programs.program import leveled, moderated

_log = logging.getLogger(__name__)
_ENTRIES = 2**22  # of the matrices that are factorised together
_CURVATURES = 200  # at most
_SHORT = 0.1  # of what a step promises, half of which it brings where the model is right: less, and the model changes
_LEAST_IDLE = 1e-10  # the least part of samples without response that counts, once they do
_SLOW = 0.2  # the part of the last promise that the next may still make
SETTLED = 1e-20  # of the loss, what a further step promises: rounding ends it first
UNSETTLED = "neurons short of their minimum"
"""What a provenance calls how many there are."""


def refit(program: LayerProgram, support: Tensor, stop: Callable[[], bool] | None = None) -> Tensor:
    """Minimise ½‖h(XU)‖² over U that vanishes off the support: h = Z − Y, or the one-sided h of the ReLU fits.

    No neuron ends worse than it began. One that has not come to its minimum after 200 curvatures, which is rare, is
    reported by a warning in the log. Where inputs depend on each other the minimiser is not unique: steps then use a
    curvature damped by 1e-12 of its diagonal (1e-6 in float32), which leaves the loss as small and chooses weights that
    are not large.

    Of the program its loss counts, of a set (``Ball``, ``ReluBall``) the loss of the same geometry; not its penalty.
    The support is a boolean [N, M], U [N, M] in the program's dtype; a true answer of ``stop``, called between steps,
    ends the search with the best weights so far.

    Raises:
        SolverRefused: A Net-Trim fit, whose ceiling is a constraint that a support may make infeasible; a fit that is
            not ours; or weights that a convex penalty with a domain of its own does not allow.
        InvalidInput, ShapeMismatch: The support is not boolean, or not [N, M].
    """
    return refit_with_record(program, support, stop)[0]


def refit_with_record(
    program: LayerProgram, support: Tensor, stop: Callable[[], bool] | None = None
) -> tuple[Tensor, dict[str, int]]:
    """As ``refit``; and for the provenance how many neurons have not come to their minimum, empty where all have."""
    if not isinstance(support, Tensor) or support.dtype != torch.bool:
        raise InvalidInput(f"support: expected a boolean tensor, found {getattr(support, 'dtype', type(support))}")
    check_shape("support", support, program.shape, "the weights")
    reason = unfit(program)
    if reason:
        raise SolverRefused(f"refit cannot take this program: {reason}")
    support, (program, d) = support.to(program.inputs.device), leveled(moderated(program)[0])
    linear = Quadratic(program)
    U, record = descend(linear, linear.at(torch.zeros_like(linear.moment)), support, stop=stop).weights, {}
    model = model_of(program, quadratic=linear)
    if isinstance(model, OneSided):
        at = descend(model, model.at(U.to(program.dtype)), support, stop=stop)
        U, left = at.weights, unsettled(at)
        if left and not (stop is not None and stop()):
            record = {UNSETTLED: left}
            message = "refit: %d of %d neurons have not reached the minimum of their loss after %d curvatures; "
            _log.warning(message + "their weights are the best found", left, len(at.value), _CURVATURES)
    if program.penalty.convex and not torch.equal(program.penalty.to(U).prox(U, 0.0), U):
        domain = f"the domain of {type(program.penalty).__name__}, which refit does not look at"
        raise SolverRefused(
            f"refit: the best weights on this support are outside of {domain}; solve the program on these inputs"
        )
    return (U / d.to(U)).to(program.dtype), record


def unsettled(at: Point) -> int:
    """How many neurons a descent has left before their minimum."""
    return 0 if at.settled is None else int((~at.settled).sum())


def unfit(program: LayerProgram) -> str | None:
    """Why there is no loss to refit, or None."""
    fit = program.fit
    if not is_plain(fit, FITS):
        return f"expected one of the fits of this library, found {type(fit).__name__}"
    if is_plain(fit, (NetTrimSet, NetTrimLoss)):
        return f"{type(fit).__name__} has a ceiling, which a given support may not be able to keep; use ReluLoss"
    return None


def descend(
    model: Model,
    at: Point,
    support: Tensor,
    settled: float = SETTLED,
    neurons: Tensor | None = None,
    stop: Callable[[], bool] | None = None,
) -> Point:
    """Newton steps on the support [N, M] until they promise nothing more; no neuron's loss ever rises.

    Where steps bring far less than they promise, samples that do not respond are counted in the curvature, too, by as
    small a part as serves (Levenberg and Marquardt's damping, in the metric of a bound from above on the loss). A
    neuron of those looked at [M] is done once a step promises less than the part ``settled`` of its loss; which came
    so far before the limit on curvatures, or a true answer of ``stop``, is in ``settled`` of what comes back.
    """
    if bool((at.weights * ~support).count_nonzero()):
        at = model.at(at.weights * support)
    every = torch.ones_like(at.value, dtype=torch.bool) if neurons is None else neurons
    todo, floor = every.nonzero()[:, 0], settled * at.value.mean()
    idle, rounding = torch.zeros_like(at.value), 4 * torch.finfo(at.weights.dtype).eps
    for _ in range(_CURVATURES):
        if not len(todo):
            break
        few, before = model.only(todo), at.only(todo)
        after, hoped, promised = _chords(few, before, support[:, todo], settled, floor, idle[todo])
        at = after if len(todo) == len(at.value) else at.put(todo, after)
        fall, part = before.value - after.value, idle[todo]
        pending = promised > settled * after.value + floor
        # What does not fall as its bound from above does is down to rounding, and so is too small a promise.
        pending &= (fall > 0) | ((part < 1) & (hoped > rounding * after.value))
        more, less = (100 * part).clamp(_LEAST_IDLE, 1), torch.where(part > _LEAST_IDLE, part / 10, 0)
        idle[todo] = torch.where(fall < _SHORT * hoped, more, less)
        todo = todo[pending]
        if stop is not None and stop():
            break
    return replace(at, settled=torch.ones_like(every).index_fill(0, todo, False))


def _chords(
    model: Model, at: Point, support: Tensor, settled: float, floor: Tensor, idle: Tensor
) -> tuple[Point, Tensor, Tensor]:
    """Steps with one curvature for as long as each promises far less than the one before.

    Returns the point, and what the first and the last step promised [M]. The curvature is factorised once.
    """
    parts = [
        (part, *factored(part.fill(model.curvature(at, part.neurons, part.rows, idle[part.neurons]))))
        for part in packed(support)
    ]
    first, last = None, float("inf")
    while True:
        step = torch.zeros_like(at.gradient)  # −H_SS⁻¹ g_S
        for part, factor, d in parts:
            g = part.take(at.gradient).to(d) / d
            part.put(step, (-torch.cholesky_solve(g[:, :, None], factor)[:, :, 0] / d).to(step))
        promised = -(at.gradient * step).sum(0, dtype=torch.float64)
        first = promised if first is None else first
        at = model.move(at, step)
        total = float(promised.sum())
        if bool((promised <= settled * at.value + floor).all()) or not total < _SLOW * last:
            return at, first, promised
        last = total


def conjugate(model: Quadratic, at: Point, support: Tensor, steps: int = 20) -> Point:
    """Conjugate gradients on the support in place of factorisations: cheaper where supports are large, less exact."""
    H = model.gram.to(model.factors)
    d = H.lengths()
    at, tiny = model.at(at.weights * support), torch.finfo(d.dtype).tiny
    r = (-at.gradient.to(d) / d) * support
    V, p, size = torch.zeros_like(r), r, r.square().sum(0)
    for _ in range(steps):
        Hp = ((H @ (p / d)) / d) * support
        t = size / (p * Hp).sum(0).clamp(min=tiny)
        V, r = V + t * p, r - t * Hp
        before, size = size, r.square().sum(0)
        p = r + size / before.clamp(min=tiny) * p
    new = model.at(at.weights + (V / d).to(at.weights))
    return model.at(torch.where(new.value < at.value, new.weights, at.weights))


def factored(A: Tensor) -> tuple[Tensor, Tensor]:
    """Cholesky factors of A [c, s, s] scaled to a unit diagonal and slightly damped, and the scales [c, s].

    Raises:
        NonFinite: A holds NaN or infinity.
    """
    d = positive_or_one(A.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt())
    A = A / d[:, :, None] / d[:, None, :]
    damping = 1e-6 if A.dtype == torch.float32 else 1e-12
    while True:
        A.diagonal(dim1=1, dim2=2).add_(damping)
        factor, failed = torch.linalg.cholesky_ex(A)
        if not bool(failed.any()):
            return factor, d
        if not bool(A.isfinite().all()):
            raise NonFinite("the curvature of the loss is not finite: divide inputs and targets by the same number")
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
