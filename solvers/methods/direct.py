"""What backends that take conic forms share: building, scaling, warm starts, limits, rounds, the way back."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from convexprune.solvers.errors import MissingExtra, UnknownOption
from convexprune.solvers.methods.conic import Array, ConicForm, conic_forms, refusal
from convexprune.solvers.methods.interface import Deadline, Limits, Proposal, Start, Watch
from convexprune.solvers.methods.iterative import Best
from convexprune.solvers.methods.normal import positive_or_one
from convexprune.solvers.programs import L1, Ball, LayerProgram, ReluLoss, SquaredLoss
from convexprune.solvers.programs.program import Scaling

PIP = 'pip install "convexprune[reference]"'
_ROUNDING = 1e-13
_SLACK = 0.2  # of the violation that the call tolerates: so much larger is the set that is solved for
_CORRECTIONS = 8
_LARGE = 2**20  # P·N·M above which least squares, neuron by neuron, would take longer than what they are for
_DEARER = 0.1  # of the tolerated gap: what zeros may cost
_WORST = ("failed", "stopped", "time limit", "iteration limit")

Point = tuple[Array, Array, Array]
"""x, y and s of a conic form."""


@dataclass(frozen=True, eq=False)
class RawSolution:
    """What a backend says of one conic form: where it ended, or None, and as in ``Proposal``."""

    point: Point | None
    ended: str = "own rule"
    iterations: int = 0
    setup: float = 0.0
    message: str = ""
    hints: Mapping[str, Any] = field(default_factory=dict)  # settings that it should start the next round with
    ray: bool = False  # whether y proves that there is no solution: Aᵀy ≈ 0 and bᵀy < 0


@dataclass(frozen=True)
class PackageSolver:
    """Base of the solvers of other packages, which may not be installed."""

    package: ClassVar[str]
    packages: ClassVar[tuple[str, ...]]  # whose versions are part of the provenance

    @classmethod
    def missing(cls) -> str | None:
        """What to install before this solver can run, or None."""
        return None if find_spec(cls.package) else PIP

    def check_installed(self) -> None:
        """Raise MissingExtra where the package is not installed."""
        if self.missing():
            raise MissingExtra(f"solver {self.package!r} needs {self.package}, which is not installed: {PIP}")


@dataclass(frozen=True)
class Direct(PackageSolver):
    """Base of the backends: they write ``known``, ``rounds`` and ``answer``.

    ``settings`` are the package's options by its own names; they win over what the call's limits imply.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    no_start: ClassVar[str | None] = None
    limits: ClassVar[tuple[str, str]] = ("max_iter", "time_limit")  # the package's names of the settings for these
    most: ClassVar[int | None] = 200_000  # iterations where the call sets no limit

    def refuses(self, program: LayerProgram) -> str | None:
        """Why this program cannot be taken, or None. A missing package and unknown settings raise."""
        self.check_installed()
        unknown, known = sorted(set(self.settings) - set(self.known())), ", ".join(self.known())
        if unknown:
            raise UnknownOption(f"settings: {self.package} has no {', '.join(map(repr, unknown))}. It has: {known}")
        return refusal(program)

    def known(self) -> tuple[str, ...]:
        """Names of the backend's settings."""
        raise NotImplementedError

    def rounds(self, wanted: float) -> list[dict[str, Any]]:
        """Settings for the accuracy wanted, and finer ones to go on with until the certificate closes."""
        raise NotImplementedError

    def answer(self, form: ConicForm, settings: Mapping[str, Any], start: Point | None) -> RawSolution:
        """Solve one conic form; InvalidInput where the backend does not take a setting's value."""
        raise NotImplementedError

    def run(self, program: LayerProgram, limits: Limits, start: Start | None, watch: Watch) -> Proposal:
        """Build the conic forms and solve them, in rounds of growing accuracy where the backend can go on."""
        task, best = ConicTask(program, limits, None if self.no_start else start), Best(watch)
        rounds, use = self.rounds(wanted_accuracy(program, limits)), "none given"
        if start is not None:
            given = "weights" if start.multipliers is None else "weights and multipliers"
            use = f"not used: {self.no_start}" if self.no_start else given
        if set(rounds[0]) <= set(self.settings):  # the accuracy is the caller's
            rounds = rounds[:1]
        for number, accuracy in enumerate(rounds, 1):
            for i in range(len(task.forms)):
                task.answers[i] = self._next(task, i, accuracy)
            effective = {"settings": accuracy | dict(self.settings), "rounds": number, "programs": len(task.forms)}
            latest = task.proposal(effective | {"start": use, "iterate dtype": "torch.float64"})
            if task.impossible and start is not None:
                latest = replace(latest, weights=start.weights)
            shown = [latest] if task.missed is None else [latest, replace(latest, multipliers=task.missed)]
            for one in shown:
                if max(best(one.iterations, lambda one=one: one, {})) <= 1:  # type: ignore[misc]
                    return replace(one, ended="watch")
            if latest.ended != "own rule":
                break
        return best.of(latest)

    def _next(self, task: "ConicTask", i: int, accuracy: dict[str, Any]) -> RawSolution:
        """The answer to one of the forms, from where its last one ended, within what is left of the limits."""
        last, form, limits, late = task.answers[i], task.forms[i][1], task.limits, Deadline(task.limits, task.began)
        if late() or (limits.max_iter is not None and last.iterations >= limits.max_iter):
            origin = (np.zeros(len(form.q)), np.zeros(len(form.b)), form.b)
            return replace(last, point=last.point or origin, ended=late.reason or "iteration limit")
        left = limits.left(last.iterations, time.perf_counter() - task.began)
        pairs = zip(self.limits, (left.max_iter or self.most, left.time_limit), strict=True)
        limited = {name: value for name, value in pairs if value is not None}
        settings = accuracy | limited | dict(last.hints) | dict(self.settings)
        new = self.answer(form, settings, None if last.ray else last.point)
        return replace(new, iterations=last.iterations + new.iterations, setup=last.setup + new.setup)


@dataclass(frozen=True, eq=False)
class Root:
    """X = QR and Y = QQᵀY + rest give ‖XU − Y‖² = ‖RU − QᵀY‖² + ‖rest‖² for each neuron.

    So the N + 1 samples (R; 0), (QᵀY; ‖rest_m‖) make the same program, and Λ = QΛ̃ + rest/‖rest‖·λ̃ is as long as Λ̃, with
    the same XᵀΛ and the same ⟨Λ, Y⟩.
    """

    Q: Tensor  # [P, N], orthonormal columns
    rest: Tensor  # [P, M], columns of length 1 or, where Y is in the span of X up to rounding, 0
    program: LayerProgram  # with N + 1 samples

    @classmethod
    def of(cls, program: LayerProgram) -> Self | None:
        """That of a ``Ball`` or ``SquaredLoss`` with more samples than it would have; None for other programs."""
        N, fit = program.shape[0], program.fit
        if type(fit) not in (Ball, SquaredLoss) or program.samples <= N + 1:
            return None
        Q, R = torch.linalg.qr(program.inputs)
        rest = fit.Y - Q @ (Q.T @ fit.Y)
        rest = rest - Q @ (Q.T @ rest)
        length = torch.linalg.vector_norm(rest, dim=0)
        length = torch.where(length > _ROUNDING * torch.linalg.vector_norm(fit.Y, dim=0), length, 0.0)
        rest = torch.where(length > 0, rest / length, 0.0)
        targets = torch.cat([Q.T @ fit.Y, length[None]])
        small = LayerProgram(torch.cat([R, R.new_zeros(1, N)]), fit.map(lambda _: targets), program.penalty)
        return cls(Q, rest, small)

    def apply_multipliers(self, L: Tensor) -> Tensor:
        """Λ̃ [N + 1, M] of Λ [P, M]: its part that matters."""
        return torch.cat([self.Q.T @ L, (self.rest * L).sum(0, keepdim=True)])

    def undo_multipliers(self, L: Tensor) -> Tensor:
        """Λ [P, M] of Λ̃ [N + 1, M]."""
        return self.Q @ L[:-1] + self.rest * L[-1]


class ConicTask:
    """A program in the making: scaled, with fewer samples where it is linear, in one conic form or several.

    Its set is larger by a fifth of the violation that is tolerated, so that even eps = 0 has an interior.
    """

    def __init__(self, program: LayerProgram, limits: Limits, start: Start | None) -> None:
        self.began, self.limits = time.perf_counter(), limits
        wide, self.room = program.to(torch.float64), _SLACK * limits.feas_tol * program.fit.scale
        fit: Any = wide.fit  # one of ours, as refuses saw to
        self.program = replace(wide, fit=fit.relaxed(self.room))
        affordable, self.left = _affordable(self.program)  # the weights that may be in the optimum, if some cannot
        self.scaling, scaled = _scaled(affordable)
        self.root = Root.of(scaled)
        self.forms = conic_forms(scaled if self.root is None else self.root.program)
        self.answers = [RawSolution(point) for point in self._points(start)]  # where a backend can go on from
        self.small = program.samples * program.shape[0] * program.shape[1] <= _LARGE
        # What outputs lack where no weights bring them nearer: orthogonal to the inputs, so that it proves just that.
        self.missed: Tensor | None = None
        self.built = time.perf_counter() - self.began

    @property
    def impossible(self) -> bool:
        """Whether one of the forms has no solution, as its multipliers prove."""
        return any(answer.ray for answer in self.answers)

    def _points(self, start: Start | None) -> list[Point | None]:
        if start is None:
            return [None] * len(self.forms)
        U, L = self.scaling.c * self.scaling.d * start.weights, start.multipliers
        if L is not None:
            L = self.scaling.b * L.to(torch.float64)
            L = L if self.root is None else self.root.apply_multipliers(L)
        pairs = [(form, U[:, part].cpu().numpy(), None if L is None else L[:, part]) for part, form in self.forms]
        return [form.start(u, None if part is None else part.cpu().numpy()) for form, u, part in pairs]

    def proposal(self, effective: Mapping[str, Any]) -> Proposal:
        """What the answers to all forms say together, in the caller's units."""
        answers, device = self.answers, self.program.inputs.device
        ended = next((a.ended for e in _WORST for a in answers if a.ended == e), "own rule")
        iterations, setup = max(a.iterations for a in answers), self.built + sum(a.setup for a in answers)
        message = "; ".join(sorted({a.message for a in answers if a.ended == ended}))
        if ended == "failed":
            return Proposal(None, None, ended, iterations, setup, message, effective)
        pairs = [(form, answer.point) for (_, form), answer in zip(self.forms, answers, strict=True) if answer.point]
        parts = [(form.weights(x), form.multipliers(y), form.zeros(y, s)) for form, (x, y, s) in pairs]
        U, L, zero = (torch.as_tensor(np.hstack(arrays), device=device) for arrays in zip(*parts, strict=True))
        L = L if self.root is None else self.root.undo_multipliers(L)
        U = self.scaling.undo_weights(U if self.left is None else torch.where(self.left, U, 0.0))
        self.missed = None
        if ended == "own rule":
            found = self._sparse(U, zero)
            U = U if self.impossible else found
        return Proposal(U, self.scaling.undo_multipliers(L), ended, iterations, setup, message, effective)

    def _sparse(self, U: Tensor, zero: Tensor) -> Tensor:
        """U without the weights that complementarity says are 0; whole, if that is nearer to the set or costs less.

        Where not even that is in the set, what its outputs lack is ``missed``.
        """
        everything = torch.ones_like(zero)
        sparse, distance = self._corrected(torch.where(zero, 0.0, U), ~zero)
        whole, least = self._corrected(U, everything)
        if max(distance, least) <= self.room:
            return sparse if self._cost(sparse) <= (1 + _DEARER * self.limits.tol) * self._cost(whole) else whole
        if least > self.room and self.small:
            outside = self._outside(whole)[0]
            left = outside - self.program.inputs @ self._moves(outside, everything)
            self.missed = torch.where(outside != 0, left, 0.0)
        return whole if least < distance else sparse

    def _cost(self, U: Tensor) -> float:
        fit = self.program.fit
        return float(self.program.penalty.to(U).value(U)) + fit.value(fit.sums(self.program.inputs @ U))

    def _outside(self, U: Tensor) -> tuple[Tensor, float]:
        """[P, M], the outputs less the nearest in the set; and the distance."""
        Z, fit = self.program.inputs @ U, self.program.fit
        sums = fit.sums(Z)
        return fit.prox_residual(Z, sums, math.inf), fit.distance(sums)

    def _corrected(self, U: Tensor, support: Tensor) -> tuple[Tensor, float]:
        """U moved by least squares, along a support, to where the outputs are in the set; how far they still are."""
        best, least = U, math.inf
        for _ in range(1 + (_CORRECTIONS if self.small else 0)):
            outside, distance = self._outside(U)
            if not distance < least:
                break
            best, least = U, distance
            if distance <= self.room:
                break
            U = U - self._moves(outside, support)
        return best, least

    def _moves(self, outside: Tensor, support: Tensor) -> Tensor:
        """[N, M], the weights on the support whose outputs are nearest to these [P, M], where these are not 0."""
        X, moves = self.program.inputs, outside.new_zeros(support.shape)
        length = positive_or_one(torch.linalg.vector_norm(X, dim=0))
        for m in outside.any(0).nonzero()[:, 0].tolist():
            rows, inputs = outside[:, m] != 0, support[:, m]
            inverse = torch.linalg.pinv((X / length)[rows][:, inputs], rtol=1e-10)
            moves[inputs, m] = inverse @ outside[rows, m] / length[inputs]
        return moves


def _affordable(program: LayerProgram) -> tuple[LayerProgram, Tensor | None]:
    """The same program with lower prices on weights that are too expensive to be in its optimum, and what is left.

    At the optimum of a loss that sees all outputs, ‖Λ‖² = 2·weight·f(XU) and f(XU) ≤ f(0), so |(XᵀΛ)_i| is at most
    b_i = ‖x_i‖·√(2·weight·f(0)). A weight that costs more than b_i is 0 there: at a price of 2b_i as at any other.
    """
    fit, penalty = program.fit, program.penalty
    if not isinstance(fit, SquaredLoss | ReluLoss) or not isinstance(penalty, L1):
        return program, None
    length = torch.linalg.vector_norm(program.inputs, dim=0)[:, None]
    most = 2 * length * (2 * fit.weight * fit.value(fit.sums(torch.zeros_like(fit.Y)))) ** 0.5
    prices = penalty.to(length).cost(program.shape)
    left = (prices <= most) | (most == 0)
    return LayerProgram(program.inputs, fit, L1(torch.where(left, prices, most))), left


def _scaled(program: LayerProgram) -> tuple[Scaling, LayerProgram]:
    """The program in units of its own; a loss costs 1 a neuron at U = 0, or more, however cheap the best weights."""
    scaling = Scaling.of(program)
    scaled = scaling.apply(program)
    worst = scaled.fit.value(scaled.fit.sums(torch.zeros_like(scaled.fit.Y)))
    if 0 < worst < program.shape[1]:
        scaling = replace(scaling, b=scaling.b * program.shape[1] / worst)
        scaled = scaling.apply(program)
    return scaling, scaled


def wanted_accuracy(program: LayerProgram, limits: Limits) -> float:
    """What a backend's tolerances on scaled data should be of the order of."""
    # A violation relative to a small eps is a small one relative to the outputs, which is what solvers look at.
    radius = min(1.0, 10 * program.fit.scale / max(program.fit.size, program.fit.scale))
    return min(limits.tol, limits.feas_tol * radius)


def by_tens(first: float, **others: Any) -> list[dict[str, Any]]:
    """Rounds whose ``eps_abs`` and ``eps_rel`` fall from the first by tens, six at most, none below 1e-10."""
    steps = [step for step in (first * 10.0**-k for k in range(6)) if step > 1e-10] or [1e-10]
    return [others | {"eps_abs": step, "eps_rel": step} for step in steps]
