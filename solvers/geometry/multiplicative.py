"""The multiplicative algorithm for optimal weights, with an exponent that adapts."""

from dataclasses import dataclass

import torch
from torch import Tensor

from convexprune.solvers.arrays import checked_positive
from convexprune.solvers.geometry.cloud import Cloud, factor
from convexprune.solvers.geometry.method import ELLIPSOIDS, EllipsoidMethod, start_weights
from convexprune.solvers.methods.interface import Start

_GROWTH = 1.5
_EACH = 1e-2  # of the total weight is spread evenly where some have none
_FIRST = 4.0


@dataclass
class _State:
    cloud: Cloud
    u: Tensor  # [n], sum 1
    g: Tensor
    log_det: float
    power: float


@ELLIPSOIDS.register("multiplicative")
@dataclass(frozen=True)
class Multiplicative(EllipsoidMethod[_State]):
    """The multiplicative algorithm: u_i ← u_i·g_i^p, scaled to sum 1, all points in every step.

    log det M(u) rises in every step with p = 1 (Titterington 1976, Silvey et al. 1978); a larger p is faster until it
    is not, so p grows while log det rises, and a step after which it falls is taken again with half of p. Two products
    with the points a step; few steps where the gap may be large or most points are in the support, slow to the end.

    Args:
        power: The largest p; 1 is the plain algorithm.
    """

    power: float = 8.0

    def __post_init__(self) -> None:
        checked_positive("power", self.power)

    def init(self, program: Cloud, start: Start | None) -> _State:
        """Uniform weights, or those given; a point of weight 0 would keep it, so that each has a little."""
        u = start_weights(program, start)
        u = u if bool(u.all()) else torch.lerp(u, torch.full_like(u, 1 / len(u)), _EACH)
        g, log_det = _judged(program, u)
        return _State(program, u, g, log_det, min(_FIRST, self.power))

    def step(self, state: _State) -> None:
        """One step that does not lower log det."""
        while True:
            u = state.u * state.g.clamp(min=0) ** state.power
            u = u / u.sum()
            g, log_det = _judged(state.cloud, u)
            if log_det >= state.log_det or state.power <= min(1.0, self.power):
                break
            state.power = max(1.0, state.power / 2)
        state.u, state.g, state.log_det = u, g, log_det
        state.power = min(self.power, _GROWTH * state.power)

    def own_gap(self, state: _State) -> float:
        """From the leverages of the last step."""
        return state.cloud.gap(float(state.g.max()))

    def weights(self, state: _State) -> Tensor:
        """u."""
        return state.u


def _judged(cloud: Cloud, u: Tensor) -> tuple[Tensor, float]:
    """g and log det M."""
    C = factor(cloud.moment(u))
    if C is None:
        return torch.full_like(u, torch.nan), -torch.inf
    return cloud.leverages(C), -2 * float(C.diagonal().log().sum())
