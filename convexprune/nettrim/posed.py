"""One group of a layer as data: what a program is built from, on this machine or on another."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from convexprune.nettrim.folding import Fold
from convexprune.solvers import L1, Ball, Gram, LayerProgram, NetTrimSet, ReluBall
from convexprune.solvers.arrays import norm, stratified, working_dtype
from convexprune.solvers.certificate.solution import TracePoint
from convexprune.solvers.errors import InvalidInput
from convexprune.solvers.methods.interface import Solver
from convexprune.solvers.programs import ReluLoss, Restricted, SquaredLoss
from convexprune.solvers.programs.fits import Fit
from convexprune.solvers.programs.penalties import Penalty

FITS = {"relu-ball": ReluBall, "net-trim": NetTrimSet, "ball": Ball}
"""Fits by name."""


@dataclass(frozen=True, eq=False)
class How:
    """How the programs of a run are posed and solved, the same for each layer.

    Attributes:
        solver, options: Of ``solve``, limits included; None: the one of ours that suits the program.
        ceiling: V of ``NetTrimSet``; in cascade the least that V may be.
        gamma: In cascade the squared radius is at least gamma times what the trained weights miss.
        penalise_bias: Whether the bias counts in the penalty.
        cascade: Whether inputs are those of the pruned network.
        refit: Whether weights are fitted again on the support that was found.
        keep_zeros: Whether trained weights that are zero stay zero: every program is restricted to the others.
        seed: Of random samples.
        callback: Called with each trace point; a true answer stops.
        stop: Asked between iterations; a true answer stops.
    """

    solver: str | Solver | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    ceiling: float = 0.0
    gamma: float = 1.1
    penalise_bias: bool = False
    cascade: bool = False
    refit: bool = False
    keep_zeros: bool = False
    seed: int = 0
    callback: Callable[[TracePoint], bool | None] | None = None
    stop: Callable[[], bool] | None = None


@dataclass(frozen=True, eq=False)
class Posed:
    """A group's inputs, targets and trained weights, in the program's units.

    Attributes:
        X: Inputs [P, N]; with targets known through their products alone a ``Gram`` of both.
        Y: Targets [P, M], None with a ``Gram``.
        stored: Trained weights [N, M] as the module stores them, in its dtype.
        fold: From stored weights to the program's.
        biased: Whether the last row is a bias.
        fit: Name of the fit.
        samples: P.
        part: Where the group's weights begin and end among those of the layer, from 0 to 1.
        original: Whether inputs are the original network's although the mode is cascade: others reach the layer now.
    """

    X: Tensor | Gram
    Y: Tensor | None
    stored: Tensor
    fold: Fold
    biased: bool
    fit: str
    samples: int
    part: tuple[float, float] = (0.0, 1.0)
    original: bool = False

    @property
    def W(self) -> Tensor:
        """The trained weights [N, M] of the program."""
        return self.fold.apply(self.stored.to(self.dtype))

    @property
    def dtype(self) -> torch.dtype:
        """What weights are computed in."""
        return working_dtype(self.stored.dtype)

    @property
    def rows(self) -> int:
        """N without the bias."""
        return len(self.stored) - self.biased

    @property
    def size(self) -> float:
        """‖Y‖_F."""
        return self.X.size if isinstance(self.X, Gram) else float(norm(self.targets))

    @property
    def inputs(self) -> Tensor:
        """[P, N], or a root of XᵀX."""
        return self.X.inputs if isinstance(self.X, Gram) else self.X

    @property
    def targets(self) -> Tensor:
        """[P, M], or what belongs to that root."""
        if isinstance(self.X, Gram):
            return self.X.targets
        assert self.Y is not None  # noqa: S101 - only a Gram goes without
        return self.Y

    def portion(self, count: int) -> int:
        """The group's part of a count for the layer; those of all groups add up to it."""
        before, after = (math.floor(count * end + 1e-9) for end in self.part)
        return max(1, after - before)

    def thinned(self, most: int, seed: int) -> "Posed":
        """At most ``most`` of the rows, chosen at random from all parts of the data; a ``Gram`` as it is."""
        if self.Y is None or isinstance(self.X, Gram) or len(self.X) <= most:
            return self
        rows = stratified(len(self.X), most, seed)
        return replace(self, X=self.X[rows], Y=self.Y[rows], samples=most)

    def missed(self, U: Tensor) -> float:
        """‖σ(XU) − Y‖_F, σ the ReLU where the fit stands before one."""
        Y = self.targets
        Z = self.inputs.to(Y.dtype) @ U.to(Y.dtype)
        return float(norm((Z if self.fit == "ball" else Z.clamp_(min=0)).sub_(Y)))

    def program(self, fit: Fit, penalty: Penalty) -> LayerProgram:
        """Any program on these data."""
        return LayerProgram(self.X, fit, penalty)

    def loss(self) -> ReluLoss | SquaredLoss:
        """What a budget minimises."""
        if self.fit == "net-trim":
            raise InvalidInput("fit: 'net-trim' has a ceiling that a budget may not be able to keep; use 'relu-ball'")
        given = self.X if isinstance(self.X, Gram) else self.targets
        return SquaredLoss(given) if self.fit == "ball" else ReluLoss(given)

    def penalty(self, how: How) -> Penalty:
        """ℓ1, with a free bias unless asked otherwise; where zeros are kept, on the others alone."""
        plain = L1.free_bias(len(self.stored)) if self.biased and not how.penalise_bias else L1()
        return self.restricted(plain, how)

    def restricted(self, penalty: Penalty, how: How) -> Penalty:
        """The penalty; where zeros are kept, on the other weights alone."""
        support = self.support(how)
        return penalty if support is None else Restricted(penalty, support)

    def support(self, how: How) -> Tensor | None:
        """Boolean [N, M], the trained weights that are not zero, and the bias; None where zeros need not stay."""
        if not how.keep_zeros:
            return None
        support = self.stored != 0
        support[self.rows :] = True
        return support

    def within(self, eps: float, how: How) -> tuple[NetTrimSet | ReluBall | Ball, float]:
        """The set with a radius of eps·‖Y‖_F, and what its members may miss Y by behind the ReLU.

        In cascade the radius is no less than √gamma times what the trained weights miss on these inputs, so that they
        are feasible; a ceiling V is the larger of theirs and the one asked for (Aghasi et al. 2020, section 3).
        """
        radius = eps * self.size
        if self.fit == "net-trim":
            return self._net_trim(radius, how)
        given = self.X if isinstance(self.X, Gram) else self.targets
        fit = FITS[self.fit](given, radius)
        if how.cascade:
            # h and not the error behind the ReLU, which is smaller where a positive target meets a negative output.
            reach = float(norm(fit.residual(self.inputs.to(fit.Y.dtype) @ self.W.to(fit.Y.dtype))))
            radius = max(radius, how.gamma**0.5 * reach)
            fit = fit.with_eps(radius)
        return fit, radius

    def _net_trim(self, radius: float, how: How) -> tuple[NetTrimSet, float]:
        Y = self.targets
        if not how.cascade:
            over = max(how.ceiling, 0.0) * float((Y <= 0).sum()) ** 0.5
            return NetTrimSet(Y, radius, how.ceiling), (radius**2 + over**2) ** 0.5
        Z = self.inputs.to(Y.dtype) @ self.W
        omega = Y > 0
        radius = max(radius, how.gamma**0.5 * float(norm(torch.where(omega, Z - Y, 0.0))))
        # Half a rounding above what the trained weights give, for them to be inside in float64 too.
        V = torch.where(omega, 0.0, Z.clamp_(min=how.ceiling) + 4 * torch.finfo(Y.dtype).eps * Z.abs())
        return NetTrimSet(Y, radius, V), (radius**2 + float(norm(V.clamp(min=0))) ** 2) ** 0.5


class Pile:
    """Batches of (X, Y) of one group, kept as they are; of linear fits only their products once they exceed N rows.

    Args:
        linear: Whether ‖XU − Y‖ is all that the fit sees.
    """

    def __init__(self, linear: bool) -> None:
        self._linear = linear
        self._parts: list[tuple[Tensor, Tensor]] = []
        self._gram: Gram | None = None
        self.samples = 0

    def add(self, X: Tensor, Y: Tensor) -> None:
        """Take one batch; one without rows says nothing."""
        if not len(X):
            return
        self.samples += len(X)
        self._parts.append((X, Y))
        if self._linear and sum(len(part) for part, _ in self._parts) > max(1024, X.shape[1]):
            self._fold()

    def _fold(self) -> None:
        gram = Gram.of(self._parts, torch.float64)
        self._gram = gram if self._gram is None else self._gram + gram
        self._parts = []

    def joined(self) -> tuple[Tensor | Gram, Tensor | None]:
        """Everything taken: (X, Y), or (Gram, None)."""
        if self._gram is not None:
            if self._parts:
                self._fold()
            return self._gram, None
        X, Y = (torch.cat(list(parts)) for parts in zip(*self._parts, strict=True))
        self._parts = []
        return X, Y
