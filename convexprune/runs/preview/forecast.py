"""How long a layer's programs take, and how much memory: operation counts at a measured speed.

Iterations are typical ones (benchmarks/README.md, docs/quadratic.md); how many a program takes is known only once it
is solved.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from convexprune.nettrim.recipe import Recipe
from convexprune.runs.preview.pace import Pace
from convexprune.solvers.arrays import working_dtype

Kinds = Sequence[tuple[str, float]]
"""The kinds of goals that a layer is solved for, each with its eps; NaN where it has none."""

_SOLVERS = (None, "admm", "quadratic", "continuation")  # those whose iterations are known
_FOLDED = 1024  # rows from which on a linear fit's data is kept as products, as in nettrim.posed

# Iterations on the samples: of ADMM to a gap of 1e-3 at an eps of 0.1, or what the rest comes to in such ones.
_ITERATIONS = {
    "within": 100,
    "keep": 600,
    "pattern": 1000,
    "keep-by-path": 800,
    "measure": 400,
    "rank-inputs": 440,
    "keep-inputs": 1,
}
_THINNED = {"measure", "rank-inputs"}  # paths, solved on at most 4N samples


@dataclass(frozen=True)
class Cost:
    """Of a layer: as in ``LayerPreview``."""

    gram: bool
    data_bytes: int
    solver_bytes: int
    seconds: float | None


def forecast(
    matrices: Sequence[tuple[int, int, int]],
    kinds: Kinds,
    linear: bool,
    recipe: Recipe,
    pace: Pace,
    dtype: torch.dtype,
) -> Cost:
    """What a layer takes.

    On the samples an iteration is 4PNM operations, and every tenth is judged by as many in float64; before it, XᵀX
    takes 2PN². With a Gram the products are 2PN(N + M), an eigendecomposition 10N³ and an iteration 4N²M, all in
    float64.

    Args:
        matrices: (P, N, M) of each group.
        kinds: What it is solved for.
        linear: Whether ‖XU − Y‖ is all that the fit sees.
        recipe: What is asked.
        pace: Of this machine.
        dtype: Of the weights.
    """
    gram = linear and any(P > max(_FOLDED, N) for P, N, _ in matrices)
    width = working_dtype(dtype).itemsize
    sizes = [_gram_bytes(N, M) if gram else _sample_bytes(P, N, M, width) for P, N, M in matrices]
    seconds = None
    if recipe.solver in _SOLVERS:
        works = [_seconds(P, N, M, kind, eps, gram, recipe, pace) for P, N, M in matrices for kind, eps in kinds]
        limit = recipe.limits["time_limit"]
        passes = (2 if recipe.mode == "cascade" else 1) * len(kinds)
        seconds = passes * pace.reading + min(sum(works), math.inf if limit is None else limit * len(works))
    return Cost(gram, sum(data for data, _ in sizes), max(own for _, own in sizes), seconds)


def _sample_bytes(P: int, N: int, M: int, width: int) -> tuple[int, int]:
    """X and Y; and 4.4 arrays of the size of Y, three N×N matrices in float64, eight of the size of the weights."""
    return width * P * (N + M), round(4.4 * width * P * M) + 24 * N * N + 64 * N * M


def _gram_bytes(N: int, M: int) -> tuple[int, int]:
    """XᵀX and XᵀY in float64; and four N×N matrices, a root of XᵀX, six N×M arrays."""
    return 8 * N * (N + M), 40 * N * N + 56 * N * M


def _seconds(P: int, N: int, M: int, kind: str, eps: float, gram: bool, recipe: Recipe, pace: Pace) -> float:
    count = _iterations(kind, eps, recipe)
    own = count * pace.iteration
    if gram:
        count *= 0.4  # "quadratic" takes fewer
        return own + (2 * P * N * (N + M) + 10 * N**3 + count * 4 * N * N * M) / pace.double
    P = min(P, 4 * N) if kind in _THINNED else P
    return own + count * 4 * P * N * M * (1 / pace.single + 0.1 / pace.double) + 2 * P * N * N / pace.double


def _iterations(kind: str, eps: float, recipe: Recipe) -> float:
    count = float(_ITERATIONS[kind])
    if kind == "within":
        digits = math.log10(1 / min(max(recipe.limits["tol"], 1e-12), 0.1)) / 3
        count *= max(1 / 3, digits) * math.sqrt(0.1 / min(max(eps, 1e-3), 1.0))
    most = recipe.limits["max_iter"]
    return count if most is None else min(count, 10 * most if kind in _THINNED else most)
