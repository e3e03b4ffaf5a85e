"""Penalties: proxes, polars and bounds of the convex ones, nearest points and budgets of the others."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import cvxpy as cp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tolerances import EXACT, REFERENCE, ROUNDING
from torch import Tensor
from zoo import gaussian

from convexprune.solvers import L1, Ball, LayerProgram, TopK
from convexprune.solvers.errors import ConvexPruneError, InvalidInput, NonFinite, ShapeMismatch, SolverRefused
from convexprune.solvers.programs import NM, GroupL2
from convexprune.solvers.programs.penalties import Penalty

SEEDS = st.integers(0, 10_000)
STEPS = st.sampled_from([0.01, 0.3, 1.0, 10.0])
N, M = 6, 4
GROUPS = ["rows", "columns", "labels", "skipping labels"]
KINDS = ["L1", *GROUPS]
SCALED = [f"{kind}{change}" for kind in KINDS for change in ("", ", rescaled")]


def labels(kind: str, seed: int) -> Any:
    """As GroupL2 takes them; labels are drawn among 5, or among the even ones below 10."""
    drawn = torch.randint(0, 5, (N, M), generator=torch.Generator().manual_seed(seed))
    return {"labels": drawn, "skipping labels": 2 * drawn}.get(kind, kind)


def groups_of(kind: str, seed: int) -> list[Tensor]:
    """Each group as a boolean mask [N, M], by its definition; for L1 each entry is one."""
    if kind == "L1":
        owner = torch.arange(N * M).view(N, M)
    elif kind == "rows":
        owner = torch.arange(N)[:, None].expand(N, M)
    elif kind == "columns":
        owner = torch.arange(M).expand(N, M)
    else:
        owner = labels(kind, seed)
    count = {"L1": N * M, "rows": N, "columns": M}.get(kind, int(owner.max()) + 1)
    return [owner == g for g in range(count)]


class Case:
    """A penalty, and what it is made of: groups, their weights (about a third of them 0), and lengths a [N, 1]."""

    def __init__(self, name: str, seed: int, spread: float = 1.0, free: bool = True) -> None:
        kind, _, change = name.partition(", ")
        self.groups = groups_of(kind, seed)
        self.w = gaussian(seed + 1, len(self.groups)).add(0.4).clamp(min=0 if free else 0.05)
        d = (spread * gaussian(seed + 2, N, 1)).exp() if change else torch.ones(N, 1, dtype=torch.float64)
        self.a = 1 / d
        plain = L1(self.w.view(N, M)) if kind == "L1" else GroupL2(labels(kind, seed), self.w)
        self.penalty: Any = plain.rescaled(d) if change else plain

    def value(self, U: Tensor) -> float:
        return sum(float(w) * float((self.a * U)[g].norm()) for g, w in zip(self.groups, self.w, strict=True))


def inner(A: Tensor, B: Tensor) -> float:
    return float((A * B).sum())


# Convex penalties


@pytest.mark.parametrize("name", SCALED)
@given(seed=SEEDS)
def test_value_and_cost_by_their_definitions(name: str, seed: int) -> None:
    """cost is g of one entry alone at 1; g is even and positively homogeneous."""
    case, U = Case(name, seed), gaussian(seed + 3, N, M)
    g = case.penalty
    assert float(g.value(U)) == pytest.approx(case.value(U), rel=ROUNDING)
    assert float(g.value(-2.5 * U)) == pytest.approx(2.5 * case.value(U), rel=ROUNDING)
    assert float(g.value(torch.zeros_like(U))) == 0
    cost = g.cost((N, M))
    assert cost.shape == (N, M)
    for i, j in itertools.product(range(N), range(M)):
        alone = torch.zeros_like(U)
        alone[i, j] = 1
        assert float(cost[i, j]) == pytest.approx(case.value(alone), rel=ROUNDING)


@pytest.mark.parametrize("name", SCALED)
@given(seed=SEEDS, step=STEPS)
def test_prox_is_optimal(name: str, seed: int, step: float) -> None:
    """V − T ∈ step·∂g(T), group by group: w a²t/‖a∘t‖ where t ≠ 0, any s with ‖s/a‖ ≤ w where t = 0."""
    case, V = Case(name, seed), 2 * gaussian(seed + 3, N, M)
    T = case.penalty.prox(V, step)
    for g, w in zip(case.groups, case.w, strict=True):
        t, s, a = T[g], (V - T)[g] / step, case.a.expand(N, M)[g]
        if not len(t):
            continue
        if t.any():
            torch.testing.assert_close(s, w * a**2 * t / (a * t).norm(), rtol=ROUNDING, atol=ROUNDING / step)
        else:
            assert float((s / a).norm()) <= float(w) * (1 + ROUNDING)
        if w == 0:
            assert torch.equal(t, V[g])
    assert torch.equal(case.penalty.prox(T, 0.0), T)


@pytest.mark.parametrize("name", SCALED)
@given(seed=SEEDS, step=STEPS)
def test_moreaus_decomposition(name: str, seed: int, step: float) -> None:
    """(V − prox)/step is dual feasible and ⟨prox, it⟩ = g(prox); moving V by d moves the prox no further."""
    case, V = Case(name, seed), 2 * gaussian(seed + 3, N, M)
    g = case.penalty
    T = g.prox(V, step)
    S = (V - T) / step
    assert float(g.dual_norm(S).max()) <= 1 + ROUNDING
    assert float(S[g.cost((N, M)) == 0].abs().sum()) == 0
    assert inner(T, S) == pytest.approx(float(g.value(T)), rel=ROUNDING, abs=ROUNDING / step)
    other = V + gaussian(seed + 4, N, M)
    moved = g.prox(other, step) - T
    assert inner(moved, moved) <= inner(other - V, moved) + ROUNDING


@pytest.mark.parametrize("name", SCALED)
@given(seed=SEEDS)
def test_the_dual_norm_bounds_inner_products(name: str, seed: int) -> None:
    """⟨A diag(t), U⟩ ≤ g(U) for 0 ≤ t ≤ 1/s and every U that is 0 on free entries."""
    case, A = Case(name, seed), gaussian(seed + 3, N, M)
    g = case.penalty
    s, free = g.dual_norm(A), g.cost((N, M)) == 0
    assert s.shape == (M,)
    for k in range(5):
        t = torch.rand(M, generator=torch.Generator().manual_seed(k), dtype=torch.float64) / s.clamp(min=1e-300)
        U = gaussian(seed + 5 + k, N, M).masked_fill(free, 0.0) * 10.0 ** gaussian(k, N, 1)
        assert inner(A * t, U) <= float(g.value(U)) * (1 + ROUNDING)
        assert inner(A / s.clamp(min=1e-300), U) <= float(g.value(U)) * (1 + ROUNDING)


@pytest.mark.parametrize("name", [name for name in SCALED if "L1" in name or "columns" in name])
@given(seed=SEEDS)
def test_the_dual_norm_is_the_polar_where_columns_are_apart(name: str, seed: int) -> None:
    """Some U of one column attains it: the entry, or the direction A/a², of the largest ratio."""
    case, A = Case(name, seed, free=False), gaussian(seed + 3, N, M)
    s = case.penalty.dual_norm(A)
    for m in range(M):
        U = torch.zeros_like(A)
        if "L1" in name:
            best = int((A / case.penalty.cost((N, M))).abs()[:, m].argmax())
            U[best, m] = A[best, m].sign()
        else:
            U[:, m] = A[:, m] / case.a[:, 0] ** 2
        assert inner(A, U) == pytest.approx(float(s[m]) * case.value(U), rel=ROUNDING)


@pytest.mark.parametrize("name", SCALED)
@given(seed=SEEDS)
def test_slack_bounds_single_entries(name: str, seed: int) -> None:
    """g(U) + ⟨A, U⟩ ≥ c_ij|u_ij| for every entry and every U, if dual_norm(−A) ≤ 1 and A = 0 on free entries."""
    case, A = Case(name, seed), gaussian(seed + 3, N, M)
    g = case.penalty
    A = A.masked_fill(g.cost((N, M)) == 0, 0.0)
    A = A / g.dual_norm(-A).max().clamp(min=1e-300)
    c = g.slack(A)
    assert bool((c >= 0).all())
    for k in range(5):
        U = gaussian(seed + 5 + k, N, M) * 10.0 ** gaussian(k, N, 1)
        if k == 4:
            U = -A  # where the left side is as small as it gets
        left = float(g.value(U)) + inner(A, U)
        assert left >= float((c * U.abs()).max()) - ROUNDING * float(g.value(U))


@pytest.mark.parametrize("name", SCALED)
@given(seed=SEEDS)
def test_rescaled_penalties_charge_the_same(name: str, seed: int) -> None:
    """g of U is the rescaled penalty of V = diag(d) U; so are dual norms, costs and slacks of A, whose unit is 1/d."""
    g, d = Case(name, seed).penalty, gaussian(seed + 6, N, 1).exp()
    U, A = gaussian(seed + 3, N, M), gaussian(seed + 4, N, M)
    scaled = g.rescaled(d)
    assert float(scaled.value(d * U)) == pytest.approx(float(g.value(U)), rel=ROUNDING)
    torch.testing.assert_close(scaled.dual_norm(A / d), g.dual_norm(A))
    torch.testing.assert_close(scaled.cost((N, M)) * d, g.cost((N, M)))
    torch.testing.assert_close(scaled.slack(A / d) * d, g.slack(A))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", SCALED)
def test_cvxpy_agrees(name: str, seed: int) -> None:
    """The same value, and the same prox, found by a conic solver."""
    case, V = Case(name, seed), 2 * gaussian(seed + 3, N, M)
    U = cp.Variable((N, M))
    U.value = V.numpy()
    assert float(case.penalty.to_cvxpy(U).value) == pytest.approx(case.value(V), rel=ROUNDING)
    problem = cp.Problem(cp.Minimize(0.3 * case.penalty.to_cvxpy(U) + cp.sum_squares(U - V.numpy()) / 2))
    reference = problem.solve(solver="CLARABEL")
    T = case.penalty.prox(V, 0.3)
    assert 0.3 * case.value(T) + 0.5 * inner(T - V, T - V) == pytest.approx(reference, rel=REFERENCE)


@pytest.mark.parametrize("name", SCALED)
def test_a_penalty_in_another_precision(name: str) -> None:
    case, V = Case(name, 3), 2 * gaussian(3, N, M)
    low = case.penalty.to(V.float())
    assert low.cost((N, M)).dtype == low.prox(V.float(), 0.3).dtype == torch.float32
    torch.testing.assert_close(low.prox(V.float(), 0.3).double(), case.penalty.prox(V, 0.3), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(low.dual_norm(V.float()).double(), case.penalty.dual_norm(V), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("groups", ["rows", "columns"])
def test_groups_follow_the_device_of_the_weights(groups: Any) -> None:
    """On an accelerator a penalty without weights of its own must not answer from the CPU."""
    like = torch.empty(N, M, device="meta", dtype=torch.float64)
    cost = GroupL2(groups).to(like).cost((N, M))
    assert (cost.device, cost.dtype) == (like.device, like.dtype)


# Groups of entries of very different lengths


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["rows", "columns", "labels"])
@given(seed=SEEDS, step=st.sampled_from([1e-12, 1e-6, 1e-2, 1.0, 1e3, 1e8]))
def test_the_group_prox_converges_where_lengths_differ_by_12_orders(
    kind: str, dtype: torch.dtype, seed: int, step: float
) -> None:
    """The optimality condition to the rounding of dtype, entry by entry relative to V."""
    V, a = gaussian(seed, N, M), 10.0 ** (gaussian(seed + 1, N, 1).clamp(-3, 3) * 2)
    g = GroupL2(labels(kind, seed)).rescaled((1 / a).to(dtype))
    a, V = (1 / (1 / a).to(dtype).double()), V.to(dtype).double()
    T = g.prox(V.to(dtype), step).double()
    assert bool(torch.isfinite(T).all())
    for mask in groups_of(kind, seed):
        t, v, b = T[mask], V[mask], a.expand(N, M)[mask]
        if not len(t):
            continue
        if t.any():
            shift = step * b**2 / (b * t).norm()
            torch.testing.assert_close(t, v / (1 + shift), rtol=200 * torch.finfo(dtype).eps, atol=0)
        else:
            assert float((v / b).norm()) <= step * (1 + 1e-5)


@pytest.mark.parametrize("kind", ["rows", "columns", "labels"])
def test_the_block_soft_threshold(kind: str) -> None:
    """Without lengths: (1 − step·w/‖V_g‖)₊ V_g; groups at the threshold, of zeros, or alone in a label."""
    V = gaussian(0, N, M)
    V[2], V[:, 1] = 0, 0
    T = GroupL2(labels(kind, 0)).prox(V, 0.8)
    for mask in groups_of(kind, 0):
        size = float(V[mask].norm()) if mask.any() else 0.0
        torch.testing.assert_close(T[mask], V[mask] * (max(0.0, 1 - 0.8 / size) if size else 0.0))
    at_threshold = GroupL2(labels(kind, 0)).prox(torch.ones(1, 1, dtype=torch.float64).expand(N, M) * 0, 1.0)
    assert not at_threshold.any()


@pytest.mark.parametrize("groups", ["rows", "columns"])
def test_groups_of_one_entry_are_the_l1_norm(groups: Any) -> None:
    shape = (N, 1) if groups == "rows" else (1, M)
    w, V = gaussian(1, *shape).abs(), gaussian(2, *shape)
    group, l1 = GroupL2(groups, w.flatten()), L1(w)
    torch.testing.assert_close(group.prox(V, 0.4), l1.prox(V, 0.4))
    torch.testing.assert_close(group.value(V), l1.value(V))
    torch.testing.assert_close(group.dual_norm(V), l1.dual_norm(V))
    torch.testing.assert_close(group.slack(V), l1.slack(V))


# L1 alone


@pytest.mark.parametrize("shape", [(1, 1), (N, 1), (1, M), (N, M)])
def test_weights_broadcast(shape: tuple[int, int]) -> None:
    g, U = L1(gaussian(0, *shape).abs()), gaussian(1, N, M)
    full = L1(g.w.expand(N, M).clone())
    g.check((N, M))
    assert float(g.value(U)) == pytest.approx(float(full.value(U)))
    assert torch.equal(g.prox(U, 0.3), full.prox(U, 0.3))
    assert torch.equal(g.dual_norm(U), full.dual_norm(U))
    assert torch.equal(g.cost((N, M)), full.w)


def test_the_soft_threshold_has_exact_zeros() -> None:
    V = gaussian(0, N, M)
    assert torch.equal(L1().prox(V, 0.5) == 0, V.abs() <= 0.5)


def test_a_free_bias_costs_nothing() -> None:
    g, U = L1.free_bias(N), gaussian(0, N, M)
    assert float(g.value(U)) == pytest.approx(float(U[:-1].abs().sum()))
    torch.testing.assert_close(g.prox(U, 100.0)[-1], U[-1])
    assert g.cost((N, M))[-1].count_nonzero() == 0


# Budgets


BUDGETS: dict[str, tuple[Any, tuple[int, int]]] = {
    "top 5 of a layer": (TopK(5), (4, 3)),
    "top 1 of a layer": (TopK(1), (4, 3)),
    "all of a layer": (TopK(12), (4, 3)),
    "top 2 of a neuron": (TopK(2, "neuron"), (4, 3)),
    "top 3 of a layer, free bias": (TopK(3, rows=3), (4, 3)),
    "top 2 of a neuron, free bias": (TopK(2, "neuron", rows=3), (4, 3)),
    "2:4": (NM(), (4, 3)),
    "1:2": (NM(1, 2), (4, 3)),
    "2:3 with a free bias": (NM(2, 3, rows=3), (4, 3)),
    "4:4": (NM(4, 4), (4, 2)),
}


def allowed(budget: Any, support: Tensor) -> bool:
    """Whether a boolean support keeps the budget, by its definition."""
    bound = support[: budget.rows or len(support)].long()
    if isinstance(budget, NM):
        return bool((bound.reshape(-1, budget.m, bound.shape[1]).sum(1) <= budget.n).all())
    return bool((bound.sum() if budget.per == "layer" else bound.sum(0).max()) <= budget.k)


@pytest.mark.parametrize("name", BUDGETS)
@pytest.mark.parametrize(("draw", "seed"), [("distinct", 0), ("distinct", 1), ("ties", 2)])
def test_projections_are_nearest_points(name: str, draw: str, seed: int) -> None:
    """Of all supports that keep the budget none leaves less behind; ties, zeros and signs included."""
    budget, shape = BUDGETS[name]
    V = gaussian(seed, *shape)
    V = V.round() if draw == "ties" else V
    budget.check(shape)
    T = budget.prox(V, 1.0)
    assert bool(((T == V) | (T == 0)).all())
    assert allowed(budget, T != 0)
    assert float(budget.value(T)) == 0
    masks = (torch.tensor(bits).view(shape) for bits in itertools.product([False, True], repeat=V.numel()))
    best = min(float(V[~mask].square().sum()) for mask in masks if allowed(budget, mask))
    assert float((V - T).square().sum()) == pytest.approx(best, abs=EXACT)
    kept = budget.support(V)
    assert torch.equal(T, torch.where(kept, V, 0.0))
    assert not bool((kept & (V == 0)).any())


@given(seed=SEEDS, k=st.integers(1, 60), levels=st.sampled_from([1, 2, 5, 1000]))
def test_equals_are_kept_in_order(seed: int, k: int, levels: int) -> None:
    """The largest first, the first of equals: what a stable sort would keep."""
    size = torch.randint(0, levels, (12, 5), generator=torch.Generator().manual_seed(seed)).double()

    def first(column: Tensor, k: int) -> Tensor:
        order = column.sort(descending=True, stable=True).indices[:k]
        return torch.zeros_like(column, dtype=torch.bool).scatter(0, order, True)

    assert torch.equal(TopK(k).best(size), first(size.flatten(), k).view(12, 5))
    each = torch.stack([first(size[:, m], min(k, 12)) for m in range(5)], dim=1)
    assert torch.equal(TopK(min(k, 12), "neuron").best(size), each)
    m = 4 if k % 2 else 12
    n = 1 + k % m
    parts = [torch.stack([first(size[i : i + m, c], n) for c in range(5)], dim=1) for i in range(0, 12, m)]
    assert torch.equal(NM(n, m).best(size), torch.cat(parts))


@pytest.mark.parametrize("name", BUDGETS)
def test_a_broken_budget_costs_infinity(name: str) -> None:
    budget, shape = BUDGETS[name]
    U = torch.ones(shape, dtype=torch.float64)
    full = allowed(budget, U != 0)
    assert float(budget.value(U)) == (0 if full else math.inf)
    assert float(budget.value(0 * U)) == 0
    assert float(budget.value(-3 * budget.prox(U, 1.0))) == 0


@pytest.mark.parametrize("name", [name for name, (budget, _) in BUDGETS.items() if budget.rows])
def test_rows_beyond_the_budget_are_free(name: str) -> None:
    budget, shape = BUDGETS[name]
    V = gaussian(0, *shape)
    assert torch.equal(budget.prox(V, 1.0)[budget.rows :], V[budget.rows :])
    U = torch.zeros(shape)
    U[budget.rows :] = 1
    assert float(budget.value(U)) == 0


@pytest.mark.parametrize("name", BUDGETS)
def test_a_budget_bounds_nothing(name: str) -> None:
    """Its only dual point is 0; it is the same in every unit and precision, and has no convex formulation."""
    budget, shape = BUDGETS[name]
    V = gaussian(0, *shape)
    assert not budget.convex
    assert isinstance(budget, Penalty)
    assert bool(torch.isinf(budget.dual_norm(V)).all())
    assert not budget.slack(V).any()
    assert not budget.cost(shape).any()
    assert budget.rescaled(V[:, :1].exp()) is budget is budget.to(V.float())
    with pytest.raises(SolverRefused, match="not convex"):
        budget.to_cvxpy(None)


# What is refused

W = torch.ones(3)
REFUSED: dict[str, tuple[Callable[[], object], type[ConvexPruneError], str]] = {
    "groups of another kind": (lambda: GroupL2("blocks"), InvalidInput, 'expected "rows", "columns" or labels'),  # type: ignore[arg-type]
    "labels that are not whole": (lambda: GroupL2(torch.rand(3, 2)), InvalidInput, "whole numbers as labels.*float32"),
    "labels that are flags": (lambda: GroupL2(torch.ones(3, 2) > 0), InvalidInput, "whole numbers.*bool"),
    "labels below 0": (lambda: GroupL2(torch.tensor([[0, -1]])), InvalidInput, "labels ≥ 0"),
    "labels in a row": (lambda: GroupL2(torch.tensor([0, 1])), InvalidInput, r"of \[N, M\], found shape \[2\]"),
    "labels beyond the entries": (lambda: GroupL2(np.array([[0, 9]])), InvalidInput, "below 2.*found 9.*from 0"),
    "labels in words": (lambda: GroupL2([["a", "b"]]), InvalidInput, "whole numbers, found list"),  # type: ignore[arg-type]
    "labels of another layer": (
        lambda: GroupL2(torch.zeros(2, 3, dtype=torch.int64)).check((3, 2)),
        ShapeMismatch,
        r"labels \[3, 2\], found \[2, 3\]",
    ),
    "group weight < 0": (lambda: GroupL2("rows", -W), InvalidInput, "GroupL2 weights: expected numbers ≥ 0, found -1"),
    "group weight NaN": (lambda: GroupL2("rows", math.nan * W), NonFinite, "GroupL2 weights: 3 of 3"),
    "group weights in words": (lambda: GroupL2("rows", "heavy"), InvalidInput, "GroupL2 weights.*found str"),  # type: ignore[arg-type]
    "too few group weights": (lambda: GroupL2("rows", W).check((4, 2)), ShapeMismatch, "expected 4, one a group"),
    "weights of skipped labels": (
        lambda: GroupL2(torch.tensor([[0, 3], [3, 0]]), torch.ones(2)).check((2, 2)),
        ShapeMismatch,
        "expected 4, one a group, found 2",
    ),
    "lengths of 0": (lambda: GroupL2().rescaled(torch.zeros(3, 1)), NonFinite, "rescaled lengths"),
    "weight < 0": (lambda: L1(torch.tensor([[1.0], [-2.0]])), InvalidInput, "L1 weights: expected numbers ≥ 0"),
    "weight NaN": (lambda: L1(torch.full((4, 2), math.nan)), NonFinite, "L1 weights"),
    "k 0": (lambda: TopK(0), InvalidInput, "k: expected a whole number ≥ 1, found 0"),
    "k a fraction": (lambda: TopK(2.5), InvalidInput, "k: expected a whole number ≥ 1, found 2.5"),  # type: ignore[arg-type]
    "k a flag": (lambda: TopK(True), InvalidInput, "k: .*found True"),
    "k of another kind": (lambda: TopK(1, "input"), InvalidInput, 'per: expected "layer" or "neuron"'),  # type: ignore[arg-type]
    "k too large": (lambda: TopK(7).check((3, 2)), InvalidInput, "k ≤ 6, the weights of a layer, found 7"),
    "k too large for a neuron": (lambda: TopK(3, "neuron", 2).check((3, 2)), InvalidInput, "k ≤ 2.*of a neuron"),
    "rows beyond the inputs": (lambda: TopK(1, rows=4).check((3, 2)), InvalidInput, "rows: expected at most the 3"),
    "rows 0": (lambda: NM(rows=0), InvalidInput, "rows: expected a whole number ≥ 1, found 0"),
    "n beyond m": (lambda: NM(3, 2), InvalidInput, "n ≤ m, found 3 of 2"),
    "inputs no multiple of m": (lambda: NM().check((5, 2)), InvalidInput, "multiple of 4 inputs, found 5; set rows"),
    "a program checks": (
        lambda: LayerProgram(torch.ones(4, 3), Ball(torch.ones(4, 2), 1.0), NM()),
        InvalidInput,
        "multiple of 4",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_penalties_are_refused_with_a_reason(case: str) -> None:
    call, error, message = REFUSED[case]
    with pytest.raises(error, match=message) as caught:
        call()
    assert caught.type is error


def test_counts_and_labels_may_be_numpys() -> None:
    assert TopK(np.int64(3)) == TopK(3)  # type: ignore[arg-type]
    flipped = np.array([[1, 1], [0, 0]], dtype=np.int32)[::-1]
    assert torch.equal(torch.as_tensor(GroupL2(flipped).groups), torch.tensor([[0, 0], [1, 1]]))
    assert float(GroupL2("rows", [1, 2]).value(torch.ones(2, 1))) == 3  # type: ignore[arg-type]
