"""The list of the zoo's members."""

from collections.abc import Iterator
from functools import cache, partial

import torch

from convexprune.solvers.programs.program import LayerProgram
from convexprune.solvers.testing import awkward, exotic, known, structured
from convexprune.solvers.testing.layers import FITS, SETS, layer, pose
from convexprune.solvers.testing.member import Member, known_member


@cache
def feasible() -> tuple[Member, ...]:
    """Convex programs that have a solution."""
    return (*_general(), *_with_known_optimum(), *_special())


@cache
def infeasible() -> tuple[Member, ...]:
    """Programs that no weights satisfy."""
    return tuple(Member(name, build, kind="infeasible") for name, build in exotic.IMPOSSIBLE.items())


@cache
def budgets() -> tuple[Member, ...]:
    """Exact budgets with a loss; ``optimum`` is that of the best support."""
    kind = "budget"
    return (
        *(
            known_member(f"orthonormal {name}", partial(exotic.orthonormal_budget, name), kind)
            for name in exotic.BUDGETS
        ),
        known_member("all supports tried", exotic.small_budget, kind),
        *(
            known_member(f"{fit} planted", partial(exotic.planted_budget, fit), kind)
            for fit in ("squared-loss", "relu-loss")
        ),
    )


_SHAPES = [(1, 20, 8, 5), (2, 500, 20, 10), (3, 200, 40, 12), (4, 60, 30, 40)]
_AWKWARD = (
    awkward.free_bias,
    awkward.dead_inputs,
    awkward.duplicate_columns,
    awkward.badly_scaled,
    awkward.some_inactive,
    awkward.all_active,
    awkward.weighted,
    awkward.wide,
    awkward.large_units,
    awkward.small_units,
    awkward.low_rank,
    awkward.nearly_collinear,
    awkward.tall,
)


def _general() -> Iterator[Member]:
    """What every fit has."""
    for fit in FITS:
        for shape in _SHAPES:
            _, P, N, M = shape
            yield Member(f"{fit} plain {P}x{N}x{M}", partial(_plain, fit, shape, 0.1))
        for eps in (1e-4, 0.5, 0.98):
            yield Member(f"{fit} eps {eps:g}", partial(_plain, fit, (5, 80, 12, 8), eps), kind="eps")
        for build in _AWKWARD:
            yield Member(f"{fit} {build.__name__}", partial(build, fit), kind="awkward")
        yield Member(f"{fit} one_sample", partial(awkward.one_sample, fit), kind="degenerate")


def _plain(fit: str, shape: tuple[int, int, int, int], eps: float) -> LayerProgram:
    return pose(*layer(*shape), fit, eps)


def _with_known_optimum() -> Iterator[Member]:
    """Known optima."""
    for fit in FITS:
        yield known_member(f"{fit} eps 1.5, U = 0", partial(known.zero, fit), "degenerate")
        yield known_member(f"{fit} one_column", partial(known.one_column, fit), "degenerate")
        yield known_member(f"{fit} backwards", partial(known.backwards, fit), "known")
        if fit not in ("ball", "squared-loss"):
            yield known_member(f"{fit} all inactive, U = 0", partial(known.all_inactive, fit), "degenerate")
    for fit in SETS:
        yield known_member(f"{fit} exact", partial(known.exact, fit), "degenerate")
        yield known_member(f"{fit} neurons one_column", partial(known.one_column_a_neuron, fit), "neurons")
    for kind in known.ORTHONORMAL:
        yield known_member(f"squared-loss orthonormal {kind}", partial(known.orthonormal, kind), "known")
    for fit in ("relu-ball", "net-trim-loss"):
        yield known_member(f"{fit} backwards rows", partial(known.backwards, fit, structured.GROUPS["rows"]()), "known")


_GROUPS = [(fit, "rows") for fit in FITS] + [
    ("relu-ball", "columns"),
    ("squared-loss", "columns"),
    ("ball", "blocks"),
    ("net-trim", "blocks"),
    ("relu-loss", "blocks"),
    ("relu-ball", "weighted rows"),
    ("squared-loss", "weighted rows"),
    ("ball", "weighted columns"),
    ("net-trim-loss", "weighted blocks"),
    ("relu-ball", "weighted blocks"),
]


def _special() -> Iterator[Member]:
    """What only some fits have."""
    yield Member("net-trim raised ceiling", awkward.raised_ceiling, kind="awkward")
    for fit in SETS:
        for exact in (0, 1):
            name = f"{fit} neurons" + (", one eps 0" if exact else "")
            yield Member(name, partial(structured.neurons, fit, exact), kind="neurons")
    for fit, groups in _GROUPS:
        yield Member(f"{fit} {groups}", partial(structured.groups, fit, groups), kind="groups")
    for inputs in ("ball", "ball a neuron", "squared-loss", "rows"):
        yield Member(f"gram {inputs}", partial(structured.grams, inputs), kind="gram")
    yield Member("gram ball, float32", partial(structured.grams, "ball", torch.float32), kind="gram")
    for fit, dtype in (("relu-ball", torch.float16), ("ball", torch.bfloat16), ("net-trim-loss", torch.float16)):
        name = f"{fit} {str(dtype).removeprefix('torch.')}"
        yield Member(name, partial(awkward.rounded, fit, dtype), kind="low precision")
