"""What is known of activations: how large they get, and which properties proofs ask for."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from convexprune.solvers.errors import InvalidInput

_MONOTONE: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "relu6": functional.relu6,
    "sigmoid": torch.sigmoid,
    "softplus": functional.softplus,
    "hardsigmoid": functional.hardsigmoid,
}  # φ ≥ 0 and non-decreasing: on [−ρ, ρ] the largest value is φ(ρ)
_BELOW = {
    *("relu", "relu6", "leaky_relu", "gelu", "silu", "tanh", "elu", "hardswish", "hardtanh", "mish", "softsign"),
    *("hardshrink", "softshrink", "tanhshrink"),
}  # |φ(z)| ≤ |z|, with their default parameters


def monotone(activation: str | None) -> bool:
    """Whether φ ≥ 0 and non-decreasing, as Mussay et al. ask."""
    return activation in _MONOTONE


def below_identity(activation: str | None) -> bool:
    """Whether |φ(z)| ≤ |z|."""
    return activation is None or activation in _BELOW


def needs_reach(activation: str | None) -> bool:
    """Whether the bound on |φ(z)| is not simply |z|, so that sizes depend on how large inputs are."""
    return not below_identity(activation)


def largest(activation: str | None, radius: Tensor) -> Tensor:
    """A bound on |φ(z)| over |z| ≤ ρ, for each ρ ≥ 0.

    Raises:
        InvalidInput: Nothing is known of this activation.
    """
    if below_identity(activation):
        return radius
    if activation in _MONOTONE:
        return _MONOTONE[activation](radius)
    known = ", ".join(sorted({*_MONOTONE, *_BELOW}))
    raise InvalidInput(
        f"activation {activation!r}: nothing is known of how large it gets; known are {known}, with their default "
        "parameters and behind all norms. Leave the layer out"
    )
