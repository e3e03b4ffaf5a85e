"""What a method for the optimal weights of points is, and the names that they are known by."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from convexprune.solvers.geometry.cloud import Cloud
from convexprune.solvers.methods.interface import Limits, Proposal, Start, Watch
from convexprune.solvers.methods.iterative import Iterative
from convexprune.solvers.methods.registry import Registry

State = TypeVar("State")

_SINGULAR = 1e-12  # a least eigenvalue relative to the largest: below it inverses have too few digits


class EllipsoidSolver(Protocol):
    """Anything that proposes weights u [n] for points: as ``Solver``, with a ``Cloud`` in the program's place."""

    def refuses(self, program: Cloud) -> str | None:
        """Why these points cannot be taken, or None."""

    def run(self, program: Cloud, limits: Limits, start: Start | None, watch: Watch) -> Proposal:
        """Find weights as good as the limits allow; ``Proposal.weights`` are u."""


ELLIPSOIDS: Registry[EllipsoidSolver] = Registry("convexprune.ellipsoid_solvers")
"""Solvers of ``lowner_ellipsoid``."""


@dataclass(frozen=True)
class EllipsoidMethod(Iterative[Cloud, State]):
    """Base of methods that seek weights u [n], with Σu = 1, of largest log det Σ u_i q_i q_iᵀ.

    Write ``init``, ``step``, ``own_gap`` and ``weights``.
    """

    def refuses(self, program: Cloud) -> str | None:  # noqa: ARG002 - most take any points
        """Why these points cannot be taken, or None."""
        return None

    def own_gap(self, state: State) -> float:
        """The gap as the method sees it."""
        raise NotImplementedError

    def weights(self, state: State) -> Tensor:
        """u [n]."""
        raise NotImplementedError

    def residuals(self, state: State) -> Mapping[str, float]:
        """The gap as the method sees it."""
        return {"gap": self.own_gap(state)}

    def finish(self, state: State) -> tuple[Tensor, None]:
        """u [n], and nothing else: the ellipsoid follows from them."""
        return self.weights(state), None

    def ready(self, state: State, limits: Limits) -> bool:
        """The certificate should close where the method's own gap is small enough."""
        return self.own_gap(state) <= limits.tol


def start_weights(cloud: Cloud, start: Start | None) -> Tensor:
    """The weights to start from, scaled to sum 1: uniform ones where none are given, half of each if M is singular."""
    uniform = torch.full((len(cloud),), 1 / len(cloud), dtype=torch.float64, device=cloud.points.device)
    if start is None:
        return uniform
    u = start.weights / start.weights.sum()
    values = torch.linalg.eigvalsh(cloud.moment(u))
    return u if float(values[0]) > _SINGULAR * float(values[-1]) else (u + uniform) / 2
