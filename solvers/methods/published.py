"""The 2020 ADMM exactly as published: the baseline to beat."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from convexprune.solvers.arrays import checked_dtype, checked_positive
from convexprune.solvers.methods.interface import Start
from convexprune.solvers.methods.iterative import IterativeSolver
from convexprune.solvers.methods.normal import NormalMatrix, Operator
from convexprune.solvers.methods.registry import register
from convexprune.solvers.programs import L1, Ball, Fit, LayerProgram, NetTrimSet
from convexprune.solvers.programs.claims import is_plain


@dataclass
class _State:
    """In the paper's letters, samples first; everything divided by c0 but the W."""

    X: Tensor
    fit: Fit
    inverse: Operator  # of XᵀX + I
    c0: float
    W1: Tensor
    W2: Tensor
    W3: Tensor
    U1: Tensor
    U2: Tensor
    moved: float = float("inf")  # ‖ΔW3‖_F


@register("published")
@dataclass(frozen=True)
class Published(IterativeSolver[_State]):
    """Net-Trim's ADMM as published (Aghasi, Abdi, Romberg 2020, algorithm 1): ``NetTrimSet`` or ``Ball`` with unit ℓ1.

    Everything is divided by c0 = scaling·√max(XᵀX); one inverse of XᵀX/c0² + I; a fixed rho; the start is zero;
    it ends when ‖ΔW3‖_F < M·N·threshold and returns W2. A certificate within the tolerances of the call ends it
    sooner; ``tol=0`` leaves the published rule alone.

    Args:
        rho: The penalty parameter, 100 in the paper's experiments.
        scaling: 0.3 in the authors' code.
        threshold: 1e-8 in the paper, 5e-9 in parts of the authors' code.
        dtype: torch.float32 or torch.float64; None: the program's own.
    """

    rho: float = 100.0
    scaling: float = 0.3
    threshold: float = 1e-8
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        for name in ("rho", "scaling", "threshold"):
            checked_positive(name, getattr(self, name))
        checked_dtype(self.dtype)

    def refuses(self, program: LayerProgram) -> str | None:
        """Why this program cannot be taken, or None."""
        if not is_plain(program.fit, (NetTrimSet, Ball)):
            return f"it was published for NetTrimSet and Ball, not {type(program.fit).__name__}"
        ones, penalty = torch.ones(1, 1), program.penalty
        if not isinstance(penalty, L1) or not is_plain(penalty, (L1,)) or bool((penalty.to(ones).w != 1).any()):
            return "it was published for the unweighted L1 norm (the bias is penalised like the rest)"
        return None

    def init(self, program: LayerProgram, start: Start | None) -> _State:
        """Scale by c0 and factorise; a start, which the publication does not have, sets W2 and W3."""
        program = program.to(self.dtype or program.dtype)
        gram = NormalMatrix.of(program.inputs)
        c0 = self.scaling * float(gram.diagonal().max().sqrt()) or 1.0  # a Gram's largest entry is on its diagonal
        X, fit = program.inputs / c0, program.fit.rescaled(1 / c0)
        inverse = gram.scaled(X.new_tensor([[c0]], dtype=torch.float64)).inverse(1.0)[0].to(X)
        W = X.new_zeros(program.shape) if start is None else start.weights.to(X)
        W1 = X.new_zeros(program.fit.shape)
        return _State(X, fit, inverse, c0, W1, W.clone(), W, W1.clone(), torch.zeros_like(W))

    def step(self, s: _State) -> None:
        """One iteration, in the publication's order."""
        XW3 = s.X @ s.W3
        s.W1 = s.fit.prox(XW3 - s.U1, self.rho)
        s.W2 = L1().prox(s.W3 - s.U2, 1 / self.rho)
        W3 = s.inverse @ (s.X.T @ (s.W1 + s.U1) + s.W2 + s.U2)
        s.U1 = s.U1 + s.W1 - s.X @ W3
        s.U2 = s.U2 + s.W2 - W3
        s.moved = float(torch.dist(W3, s.W3))
        s.W3 = W3

    def done(self, s: _State) -> bool:
        """‖ΔW3‖_F < M·N·threshold."""
        return s.moved < s.W3.numel() * self.threshold

    def residuals(self, s: _State) -> Mapping[str, float]:
        """What the stopping rule looks at, and the primal residual that it does not."""
        size = max(float(s.W3.norm()), float(s.W2.norm()), 1e-30)
        return {"change W3": s.moved, "primal T": float(torch.dist(s.W2, s.W3)) / size}

    def finish(self, s: _State) -> tuple[Tensor, Tensor]:
        """W2, and the multipliers −rho·U1/c0."""
        return s.W2, s.U1 * (-self.rho / s.c0)
