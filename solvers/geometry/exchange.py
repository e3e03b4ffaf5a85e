"""One point at a time: the ascent methods of Khachiyan and of Wolfe and Atwood.

With u ← (u + λe_j)/(1 + λ) the leverages and M⁻¹ change by a rank-one update, O(nD + D²) a step; the λ that makes
log det largest is (g_j − D)/((D − 1)g_j).

Source: L. G. Khachiyan, Rounding of polytopes in the real number model of computation, 1996; M. J. Todd and E. A.
Yıldırım, On Khachiyan's algorithm for the computation of minimum-volume enclosing ellipsoids, 2007.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from convexprune.solvers.geometry.cloud import Cloud, factor
from convexprune.solvers.geometry.method import ELLIPSOIDS, EllipsoidMethod, start_weights
from convexprune.solvers.methods.interface import Start

_DRIFT = 1e-8  # of a leverage from its own recomputation, relative: the updates start afresh beyond it
_EVERY = 50  # steps between two looks at the drift


@dataclass
class _State:
    cloud: Cloud
    u: Tensor  # [n], sum 1
    g: Tensor
    inverse: Tensor  # M⁻¹ [D, D]
    steps: int = 0


@ELLIPSOIDS.register("khachiyan")
@dataclass(frozen=True)
class Khachiyan(EllipsoidMethod[_State]):
    """Khachiyan's barycentric ascent: in each step the farthest point gains weight. O(nD) a step, O(D/ε) steps.

    Weights only grow towards points, so those that do not belong to the support lose theirs slowly.
    """

    default_max_iter: ClassVar[int] = 1_000_000

    def init(self, program: Cloud, start: Start | None) -> _State:
        """Uniform weights, or those given."""
        state = _State(program, start_weights(program, start), torch.empty(0), torch.empty(0))
        _refactor(state)
        return state

    def step(self, state: _State) -> None:
        """Move weight to, or from, one point."""
        j = self._point(state)
        D, g = state.cloud.size, float(state.g[j])
        if D == 1:
            self._only(state)
            return
        share = float(state.u[j])
        step = max((g - D) / ((D - 1) * g), -share) if g > 0 else -share
        q = state.cloud.rows(slice(j, j + 1))[0]
        state.steps += 1
        if state.steps % _EVERY == 0 and abs(float(q @ state.inverse @ q) - g) > _DRIFT * g:
            _refactor(state)
            return
        _shift(state, j, q @ state.inverse, step)

    def own_gap(self, state: _State) -> float:
        """From the updated leverages."""
        return state.cloud.gap(float(state.g.max()))

    def weights(self, state: _State) -> Tensor:
        """u."""
        return state.u

    def _point(self, state: _State) -> int:
        return int(state.g.argmax())

    def _only(self, state: _State) -> None:
        """In one dimension the farthest point is the answer."""
        farthest = int(state.g.argmax())
        state.u = torch.zeros_like(state.u)
        state.u[farthest] = 1
        _refactor(state)


@ELLIPSOIDS.register("wolfe-atwood")
@dataclass(frozen=True)
class WolfeAtwood(Khachiyan):
    """Khachiyan's ascent with away steps (Wolfe, Atwood, Todd and Yıldırım): linear convergence in the end.

    The point of the support that is nearest loses weight where that is farther from optimal than the farthest point.
    """

    def _point(self, state: _State) -> int:
        far = int(state.g.argmax())
        near = int(torch.where(state.u > 0, state.g, torch.inf).argmin())
        return far if float(state.g[far] + state.g[near]) > 2 * state.cloud.size else near


def _refactor(state: _State) -> None:
    """M⁻¹ and the leverages, afresh from u."""
    C = factor(state.cloud.moment(state.u))
    if C is None:
        C = torch.full((state.cloud.size,) * 2, torch.nan, dtype=torch.float64, device=state.u.device)
    state.inverse, state.g = C @ C.T, state.cloud.leverages(C)


def _shift(state: _State, j: int, v: Tensor, step: float) -> None:
    """u ← (u + step·e_j)/(1 + step), with v = M⁻¹q_j."""
    shrink = step / (1 + step * float(state.g[j]))
    for block, z in state.cloud.mapped(v[:, None]):
        state.g[block] -= shrink * z[:, 0].square_()
    state.g *= 1 + step
    state.inverse = (1 + step) * (state.inverse - shrink * torch.outer(v, v))
    state.u[j] += step
    state.u.clamp_(min=0).div_(1 + step)
