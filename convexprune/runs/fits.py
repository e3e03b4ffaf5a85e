"""How a layer's errors are measured: the targets, the set of outputs within an error, and the loss of a budget.

A fit of a layer makes solver fits (``convexprune.solvers.programs``) of the layer's data. One's own is a class more:
derive from ``LayerFit``, give it to ``prune_`` and ``layer_program`` as it is, or register it and use its name.
"""

from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from convexprune.options import Options
from convexprune.solvers.arrays import norm
from convexprune.solvers.errors import InvalidInput
from convexprune.solvers.programs import Ball, Fit, Gram, NetTrimSet, ReluBall, ReluLoss, SquaredLoss

T = TypeVar("T", bound="type[LayerFit]")


class LayerFit:
    """Base of the fits of layers.

    Attributes:
        name: What it is called in tables and records.
        relu: Whether errors are measured behind the ReLU that follows the layer.
        linear: Whether ‖XU − Y‖ is all that it sees, so that XᵀX and XᵀY stand for X and Y.
    """

    name: ClassVar[str]
    relu: ClassVar[bool] = False
    linear: ClassVar[bool] = False

    def targets(self, Z: Tensor) -> Tensor:
        """Y [P, M] of the trained layer's outputs Z = XW, and what an error is measured between: σ(Z)."""
        return Z.clamp_(min=0) if self.relu else Z

    def within(self, Y: Tensor | Gram, radius: float) -> Fit:
        """The set of outputs that miss the targets by at most ``radius``, as an indicator."""
        raise NotImplementedError

    def loss(self, Y: Tensor | Gram) -> Fit:
        """What budgets minimise.

        Raises:
            InvalidInput: The fit has none.
        """
        raise InvalidInput(f"fit: {self.name!r} has no loss that a budget could minimise; use 'relu-ball' or 'ball'")

    def reach(self, Y: Tensor | Gram, Z: Tensor) -> float:
        """The least radius whose set holds the outputs Z [P, M]: ‖h(Z)‖_F of the set's residual h, which balls have.

        Raises:
            InvalidInput: The set has no residual.
        """
        residual = getattr(self.within(Y, 1.0), "residual", None)
        if residual is None:
            raise InvalidInput(f"fit: {self.name!r} gives no residual, which cascade needs; use mode='parallel'")
        # Not the error behind the ReLU, which is smaller where a positive target meets a negative output.
        return float(norm(residual(Z)))

    def program_fit(
        self, X: Tensor, Y: Tensor | Gram, W: Tensor, radius: float, options: Options
    ) -> tuple[Fit, float, float]:
        """The set for a layer, its radius, and what its members may miss Y by behind the activation.

        In cascade the radius is no less than √gamma times what the trained weights miss on these inputs, so that they
        are feasible (Aghasi et al. 2020, section 3).

        Args:
            X: Inputs [P, N], or a root of XᵀX.
            Y: Targets, or the Gram.
            W: Trained weights [N, M] in the program's units.
            radius: What was allowed.
            options: gamma, ceiling and the mode.
        """
        if options.cascade:
            dtype = Y.dtype if isinstance(Y, Tensor) else X.dtype
            radius = max(radius, options.gamma**0.5 * self.reach(Y, X.to(dtype) @ W.to(dtype)))
        fit = self.within(Y, radius)
        return fit, radius, radius


FITS: dict[str, LayerFit] = {}
"""Fits of layers by name."""


def register_fit(kind: T) -> T:
    """List a fit of layers under its name; to be used as a decorator of its class."""
    FITS[kind.name] = kind()
    return kind


def layer_fit(given: object, what: str = "fit") -> LayerFit:
    """The fit of layers that is meant by a name, or is given itself.

    Raises:
        InvalidInput: No such fit.
    """
    if isinstance(given, LayerFit):
        return given
    if isinstance(given, str) and given in FITS:
        return FITS[given]
    raise InvalidInput(f"{what}: expected one of {', '.join(FITS)}, or a LayerFit, found {given!r}")


@register_fit
class BehindRelu(LayerFit):
    """The outputs behind the ReLU that follows: h = Z − Y where Y > 0, Z₊ elsewhere (``ReluBall``, ``ReluLoss``)."""

    name = "relu-ball"
    relu = True

    def within(self, Y: Tensor | Gram, radius: float) -> Fit:
        """``ReluBall``."""
        return ReluBall(_samples(Y, self.name), radius)

    def loss(self, Y: Tensor | Gram) -> Fit:
        """``ReluLoss``."""
        return ReluLoss(_samples(Y, self.name))


@register_fit
class PlainOutputs(LayerFit):
    """The layer's own outputs: ‖XU − Y‖ (``Ball``, ``SquaredLoss``)."""

    name = "ball"
    linear = True

    def within(self, Y: Tensor | Gram, radius: float) -> Fit:
        """``Ball``."""
        return Ball(Y, radius)

    def loss(self, Y: Tensor | Gram) -> Fit:
        """``SquaredLoss``."""
        return SquaredLoss(Y)


@register_fit
class NetTrimOutputs(LayerFit):
    """Net-Trim's own set (Aghasi et al. 2017): ‖(Z − Y)_Ω‖ ≤ r on Ω = {Y > 0}, and Z ≤ V elsewhere."""

    name = "net-trim"
    relu = True

    def within(self, Y: Tensor | Gram, radius: float) -> Fit:
        """``NetTrimSet`` with a ceiling of 0."""
        return NetTrimSet(_samples(Y, self.name), radius, 0.0)

    def program_fit(
        self, X: Tensor, Y: Tensor | Gram, W: Tensor, radius: float, options: Options
    ) -> tuple[Fit, float, float]:
        """As in the base; in cascade the ceiling V is the larger of the trained weights' and the one that was given."""
        targets = _samples(Y, self.name)
        if not options.cascade:
            over = max(options.ceiling, 0.0) * float((targets <= 0).sum()) ** 0.5
            return NetTrimSet(targets, radius, options.ceiling), radius, (radius**2 + over**2) ** 0.5
        Z = X.to(targets.dtype) @ W
        omega = targets > 0
        radius = max(radius, options.gamma**0.5 * float(norm(torch.where(omega, Z - targets, 0.0))))
        # Half a rounding above what the trained weights give, for them to be inside in float64 too.
        V = torch.where(omega, 0.0, Z.clamp_(min=options.ceiling) + 4 * torch.finfo(targets.dtype).eps * Z.abs())
        promised = (radius**2 + float(norm(V.clamp(min=0))) ** 2) ** 0.5
        return NetTrimSet(targets, radius, V), radius, promised


def _samples(Y: Tensor | Gram, name: str) -> Tensor:
    if not isinstance(Y, Tensor):
        raise InvalidInput(f"fit: {name!r} needs samples, and only their products are known")
    return Y
