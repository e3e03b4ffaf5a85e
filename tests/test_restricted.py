"""Zeros that stay zero: penalties and budgets on a given support, and models that are pruned again."""

import copy
import itertools
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from calls import preview, prune_
from networks import mlp
from tolerances import REFERENCE
from torch import Tensor, nn

from convexprune import verify
from convexprune.page.page import write_page
from convexprune.runs.journal import Journal, Record
from convexprune.solvers import L1, Ball, LayerProgram, ReluBall, TopK, solve
from convexprune.solvers.errors import InvalidInput, ShapeMismatch, SolverRefused
from convexprune.solvers.programs import NM, GroupL2, Restricted, SquaredLoss
from convexprune.solvers.testing import check_penalty

N, M = 7, 4


def draws(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    X = torch.randn(40, N, generator=g, dtype=torch.float64) @ torch.randn(N, N, generator=g, dtype=torch.float64)
    support = torch.rand(N, M, generator=g) < 0.6
    W = torch.where(support, torch.randn(N, M, generator=g, dtype=torch.float64), 0.0)
    return X, W, support


PENALTIES: dict[str, Any] = {
    "l1": L1(torch.linspace(0.5, 2, N)[:, None]),
    "rows": GroupL2("rows"),
    "columns": GroupL2("columns"),
    "free bias": L1.free_bias(N),
}


@pytest.mark.parametrize(("name", "seed"), [(name, 0) for name in PENALTIES] + [("l1", 1)])
def test_it_is_a_penalty_that_keeps_its_contract(name: str, seed: int) -> None:
    """Prox against its definition, Fenchel–Young, dual norms, units, cvxpy; the second support has an empty column."""
    _, _, support = draws(seed)
    check_penalty(Restricted(PENALTIES[name], support), N, M)
    V = torch.randn(N, M, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    assert torch.equal(Restricted(PENALTIES[name].to(V), support).prox(V, 0.0), torch.where(support, V, 0.0))


@pytest.mark.parametrize("make", [partial(TopK, 5), partial(TopK, 2, "neuron"), partial(NM, 1, 7)])
def test_budgets_within_a_support_are_budgets(make: Any) -> None:
    check_penalty(make(within=draws(1)[2]), N, M)


@pytest.mark.parametrize("name", PENALTIES)
@pytest.mark.parametrize("fit", [ReluBall, Ball])
def test_restricted_programs_are_certified_and_agree_with_the_reference(name: str, fit: Any) -> None:
    X, W, support = draws(1)
    Y = X @ W if fit is Ball else (X @ W).relu()
    program = LayerProgram(X, fit(Y, 0.2 * float(Y.norm())), Restricted(PENALTIES[name], support))
    problem, _ = program.to_cvxpy()
    optimum = problem.solve(solver="CLARABEL")
    for solver in ["admm", "quadratic"] if fit is Ball else ["admm"]:
        solution = solve(program, solver, tol=1e-6, feas_tol=1e-6)
        assert str(solution.status) == "solved"
        assert not bool(solution.weights[~support].any())
        assert solution.certificate.bound <= optimum * (1 + REFERENCE)
        assert solution.certificate.value == pytest.approx(optimum, rel=2e-6)  # a gap and a violation of 1e-6


@pytest.mark.parametrize("seed", range(3))
def test_one_neuron_is_the_program_with_fewer_inputs(seed: int) -> None:
    """An independent way to the same optimum: columns of X left out."""
    X, W, support = draws(seed)
    few = support[:, 0] | (torch.arange(N) == 0)
    y = X @ W[:, :1]
    eps = 0.3 * float(y.norm())
    whole = solve(LayerProgram(X, Ball(y, eps), Restricted(L1(), few[:, None])), tol=1e-7, feas_tol=1e-8)
    part = solve(LayerProgram(X[:, few], Ball(y, eps), L1()), tol=1e-7, feas_tol=1e-8)
    assert whole.certificate.value == pytest.approx(part.certificate.value, rel=1e-6)
    assert whole.certificate.bound == pytest.approx(part.certificate.bound, rel=1e-6)


@pytest.mark.parametrize("budget", [TopK(6), TopK(2, "neuron"), NM(1, 3), TopK(20)])
@pytest.mark.parametrize("seed", range(3))
def test_budgets_stay_within(budget: Any, seed: int) -> None:
    X, _, support = draws(seed)
    rows = N - 1
    full = torch.randn(N, M, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    kind: Any = type(budget)
    options = {name: getattr(budget, name) for name in ("k", "per", "n", "m") if hasattr(budget, name)}
    restricted = kind(**options, rows=rows, within=support)
    solution = solve(LayerProgram(X, SquaredLoss(X @ full), restricted), "continuation", start=full)
    U = solution.weights
    assert not bool(U[~support].any())
    assert bool(U[:rows].any())
    plain = kind(**options, rows=rows)
    assert float(plain.value(U)) == float(restricted.value(U)) == 0
    filled = torch.where(support, 0.0, 1.0) * torch.eye(N, M, dtype=torch.float64)
    assert not bool(filled.any()) or bool(restricted.value(filled).isinf())


def test_the_best_support_of_one_neuron_within_others_is_found() -> None:
    """Against every subset of the support, by least squares."""
    X, _, _ = draws(5)
    within = torch.tensor([1, 1, 0, 1, 0, 1, 1], dtype=torch.bool)
    y = torch.randn(40, 1, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    least = min(
        float((y - X[:, list(few)] @ torch.linalg.lstsq(X[:, list(few)], y).solution).square().sum()) / 2
        for few in itertools.combinations(within.nonzero()[:, 0].tolist(), 2)
    )
    program = LayerProgram(X, SquaredLoss(y), TopK(2, within=within[:, None]))
    found = solve(program, "continuation")
    assert float((X @ found.weights - y).square().sum()) / 2 == pytest.approx(least, rel=1e-6)


def test_what_is_no_support_is_refused() -> None:
    X, W, support = draws(0)
    fit = Ball(X @ W, 1.0)
    with pytest.raises(InvalidInput, match="support: expected a boolean tensor"):
        Restricted(L1(), support.double())
    with pytest.raises(InvalidInput, match="give it within=support instead"):
        Restricted(TopK(3), support)
    for penalty in (Restricted(L1(), support[:-1]), TopK(3, within=support[:-1])):
        with pytest.raises(ShapeMismatch):
            LayerProgram(X, fit, penalty)
    with pytest.raises(InvalidInput, match="within: expected a boolean tensor"):
        LayerProgram(X, fit, NM(1, 7, within=support.long()))
    with pytest.raises(SolverRefused, match="Restricted"):
        solve(LayerProgram(X, fit, Restricted(L1(), support)), "clarabel")


# Models


def sparse_network() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 8, 3, groups=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(16, 6)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter *= torch.rand_like(parameter) < 0.5
    return model.eval(), torch.randn(20, 2, 6, 6)


def zeros_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p == 0 for name, p in model.named_parameters() if p.ndim > 1}


CASES: dict[str, dict[str, Any]] = {
    "eps": {"eps": 0.02},
    "cascade": {"eps": 0.05, "mode": "cascade"},
    "net-trim": {"eps": 0.05, "fit": {"5": "ball", "*": "net-trim"}, "activations": {"3": "relu"}, "norms": "leave"},
    "refit": {"eps": 0.05, "refit": True},
    "cvxpy": {"eps": 0.05, "solver": "cvxpy", "layers": "5"},
    "budget": {"sparsity": 0.6},
    "pattern": {"sparsity": {"0": 0.6, "*": "2:4"}},
    "path": {"sparsity": 0.6, "search": "path"},
    "network": {"sparsity": 0.6, "scope": "network"},
    "network eps": {"network_eps": 0.5, "objective": "nonzeros"},
}


@pytest.mark.parametrize("case", CASES)
def test_zeros_are_kept_and_what_is_certified_is_the_restricted_program(case: str, tmp_path: Path) -> None:
    dense, x = sparse_network()
    model, again = copy.deepcopy(dense), copy.deepcopy(dense)
    report = prune_(model, x, keep_zeros=True, run=tmp_path, **CASES[case])
    assert report.certified
    assert report.nonzeros <= report.nonzeros_before
    assert not any(bool(model.get_parameter(name)[zero].any()) for name, zero in zeros_of(dense).items())
    assert sum(row.returned for row in report.layers) == 0
    prune_(again, x, keep_zeros=True, run=tmp_path, **CASES[case])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    found = verify(dense, x, tmp_path)
    assert [row.differences for row in found.layers if not row.ok] == []
    assert found.complete


def test_zeros_that_come_back_are_counted_and_said(tmp_path: Path) -> None:
    dense, x = sparse_network()
    model = copy.deepcopy(dense)
    report = prune_(model, x, 0.02)
    back = {
        name.removesuffix(".weight"): int((model.get_parameter(name)[zero] != 0).sum())
        for name, zero in zeros_of(dense).items()
    }
    assert {row.name: row.returned for row in report.layers} == back
    assert sum(back.values()) > 0
    line = f"{sum(back.values())} weights that were zero came back"
    assert any(text.startswith(line) and "--keep-zeros" in text for text in report.head)
    assert line in str(report)
    (tmp_path / "report.json").write_text(report.to_json())
    page = write_page(tmp_path).read_text()
    assert line in page
    assert "came back</button>" in page


def test_neurons_are_fitted_without_filling_zeros() -> None:
    model, x = mlp(8, 12, 5), torch.randn(60, 8)
    with torch.no_grad():
        model[2].weight *= torch.rand(5, 12) < 0.5
    before, other = model[2].weight != 0, copy.deepcopy(model)
    prune_(model, x, sparsity=0.25, unit="neurons", remove=False, keep_zeros=True)
    assert not bool(model[2].weight[~before].any())
    report = prune_(other, x, sparsity=0.25, unit="neurons", remove=False)
    assert sum(row.returned for row in report.layers) == int((other[2].weight[~before] != 0).sum()) > 0


@pytest.mark.parametrize("keep", [True, False])
def test_a_network_that_is_sparser_than_asked_for_stays_as_it_is(keep: bool) -> None:
    """Its own weights are a point of each layer's path, at no error."""
    model, x = mlp(12, 16, 6), torch.randn(60, 12)
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight *= torch.rand_like(layer.weight) < 0.3
    before = copy.deepcopy(model.state_dict())
    report = prune_(model, x, sparsity=0.5, scope="network", keep_zeros=keep)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert report.head[0].startswith("nothing was pruned")


def test_pruning_again_keeps_a_subset() -> None:
    model, x = mlp(12, 16, 6), torch.randn(120, 12)
    supports = []
    for part in (0.5, 0.8):
        prune_(model, x, sparsity=part, keep_zeros=True)
        supports.append([~zero for zero in zeros_of(model).values()])
        assert [int(kept.sum()) for kept in supports[-1]] == [round((1 - part) * kept.numel()) for kept in supports[-1]]
    assert all(bool((new <= old).all()) for old, new in zip(*supports, strict=True))


@pytest.mark.parametrize("arguments", [{"eps": 0.05}, {"sparsity": 0.6}])
def test_an_entry_that_fills_zeros_is_found_whatever_its_seal(arguments: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    dense, x = nn.Sequential(nn.Linear(8, 6)), torch.randn(50, 8)
    with torch.no_grad():
        dense[0].weight *= torch.rand(6, 8) < 0.5
    prune_(copy.deepcopy(dense), x, keep_zeros=True, run=tmp_path, **arguments)
    journal, described = Journal.existing(tmp_path)
    [entry] = journal.entries()
    stored = entry.tensors["stored.0"].clone()
    row, column = (dense[0].weight.T == 0).nonzero()[0].tolist()
    stored[row, column] = 1e-7  # within every tolerance
    with Journal(tmp_path, {key: described[key] for key in ("model", "data", "recipe")}) as forged:
        forged.put("0", entry.data["goal"], Record(entry.data, {**entry.tensors, "stored.0": stored}))
    assert not verify(dense, x, tmp_path).ok


# Nothing left


def test_where_eps_allows_no_weights_at_all_the_report_begins_with_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dense, x = mlp(6, 5, 3), torch.randn(40, 6)
    report = prune_(copy.deepcopy(dense), x, {"0": 1.5, "*": 0.05})
    line = "no weight is left in 1 of 2 layers (0): outputs there depend on no input; from eps 1 on zero weights keep"
    assert any(text.startswith(line) for text in report.head)
    assert line in caplog.text
    assert line[:40] in str(report)
    (tmp_path / "report.json").write_text(report.to_json())
    assert line[1:60] in write_page(tmp_path).read_text()
    assert any("eps is 1 or more for 0" in text for text in preview(dense, x, {"0": 1.5, "*": 0.05}).notices)
    assert "eps is 1" not in str(preview(dense, x, 0.5))


def test_a_layer_without_weights_is_said_whatever_emptied_it() -> None:
    """A constant output: the free bias alone keeps any eps."""
    model, x = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)), torch.randn(30, 4)
    with torch.no_grad():
        model[0].weight *= 1e-6
    report = prune_(model, x, 0.1)
    assert report.layers[0].nonzeros == 0
    [line] = [text for text in report.head if "no weight is left" in text]
    assert "(0" in line
    assert "from eps 1 on" not in line
