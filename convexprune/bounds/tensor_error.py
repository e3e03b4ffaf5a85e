"""Bounds on the errors of single tensors, linear in the layers' radii."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class TensorError:
    """A bound Σ c_l r_l on a tensor's error.

    Between a layer and the place where its radius holds, ``share`` times this radius is to come, behind ``awaited``.
    """

    coefficients: Mapping[str, float] = field(default_factory=dict)
    reason: str | None = None
    own: str = ""
    share: float = 1.0
    awaited: tuple[Any, ...] = ()  # a norm, then "relu"

    def __bool__(self) -> bool:
        return bool(self.coefficients or self.awaited)

    def times(self, factor: float, reason: str | None = None) -> "TensorError":
        """Behind an operation with this Lipschitz constant."""
        scaled = {name: value * factor for name, value in self.coefficients.items()} if factor else {}
        return replace(self, coefficients=scaled, reason=self.reason or reason, share=self.share * factor)

    def past(self, factor: float) -> "TensorError":
        """Behind the step that it awaits first: the radius, which holds behind it, is not multiplied."""
        left = replace(self.times(factor), share=self.share, awaited=self.awaited[1:])
        return left if left.awaited else left.arrived()

    def arrived(self) -> "TensorError":
        """Where the radius holds."""
        return summed([TensorError(self.coefficients, self.reason), TensorError({self.own: self.share})])

    def stranded(self, where: str) -> "TensorError":
        """Where what it awaits cannot come any more."""
        if not self.awaited:
            return self
        step = "ReLU" if self.awaited[0] == "relu" else "norm"
        why = f"the radius of {self.own!r} holds behind its {step}, and its outputs reach {where} first"
        return summed([TensorError(self.coefficients, self.reason), lost([self.own], why)])


def lost(names: Iterable[str], reason: str) -> TensorError:
    """Nothing is known of what these layers do."""
    return TensorError(dict.fromkeys(names, math.inf), reason)


def combined(errors: Iterable[TensorError], norm: Callable[..., float]) -> TensorError:
    """Σ (norm of c_l) r_l: by Minkowski's inequality it bounds the norm of Σ c_l r_l."""
    listed = list(errors)
    names = dict.fromkeys(name for error in listed for name in error.coefficients)
    totals = {name: norm(*(error.coefficients.get(name, 0.0) for error in listed)) for name in names}
    return TensorError(totals, next((error.reason for error in listed if error.reason), None))


def summed(errors: Iterable[TensorError]) -> TensorError:
    """Of a sum of tensors."""
    return combined(errors, lambda *values: math.fsum(values))
