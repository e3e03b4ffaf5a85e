"""Exact budgets: refits, exchanges and the continuation, against normal equations, brute force and planted answers."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from tolerances import EXACT, OPTIMUM, REFERENCE, ROUNDING
from torch import Tensor

from convexprune.solvers import L1, Ball, LayerProgram, ReluBall, Status, TopK, solve
from convexprune.solvers.errors import InvalidInput, InvalidTolerance, ShapeMismatch, SolverRefused
from convexprune.solvers.methods.continuation import Continuation, improve
from convexprune.solvers.methods.curvature import OneSided, model_of
from convexprune.solvers.methods.refit import descend, refit
from convexprune.solvers.programs import NM, Gram, NetTrimLoss, ReluLoss, SquaredLoss

LOSSES = [SquaredLoss, ReluLoss]


def layer(seed: int, P: int = 60, N: int = 12, M: int = 5) -> tuple[Tensor, Tensor]:
    """Correlated inputs and dense trained weights, so that supports matter and are not obvious."""
    g = torch.Generator().manual_seed(seed)
    X = torch.randn(P, N, generator=g, dtype=torch.float64) @ torch.randn(N, N, generator=g, dtype=torch.float64)
    return X, torch.randn(N, M, generator=g, dtype=torch.float64)


def target(kind: Any, X: Tensor, W: Tensor) -> Any:
    return kind(X @ W if kind in (SquaredLoss, Ball) else (X @ W).relu())


def loss(program: LayerProgram, U: Tensor) -> Tensor:
    """½‖h(XU)‖² neuron by neuron, from its definition."""
    Z, Y = program.inputs @ U, program.fit.Y
    h = Z - Y if isinstance(program.fit, SquaredLoss | Ball) else torch.where(Y > 0, Z - Y, Z.clamp(min=0))
    return h.square().sum(0) / 2


def some_support(program: LayerProgram, seed: int, density: float = 0.4) -> Tensor:
    return torch.rand(program.shape, generator=torch.Generator().manual_seed(seed)) < density


def slope(program: LayerProgram, U: Tensor) -> Tensor:
    return program.inputs.T @ program.fit.as_loss().residual(program.inputs @ U)  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", LOSSES)
def test_refit_is_stationary_on_the_support_and_zero_off_it(kind: Any) -> None:
    """The problem is convex on a support: Xᵀh = 0 there is optimality."""
    X, W = layer(0)
    program = LayerProgram(X, target(kind, X, W))
    support = some_support(program, 1)
    support[:, 0] = False  # a neuron that may keep nothing
    U = refit(program, support)
    assert not U[~support].any()
    assert slope(program, U)[support].abs().max() <= ROUNDING * slope(program, torch.zeros_like(U)).abs().max()


def test_squared_refit_is_least_squares() -> None:
    X, W = layer(2)
    program = LayerProgram(X, target(SquaredLoss, X, W))
    support = some_support(program, 3)
    U = refit(program, support)
    for m in range(U.shape[1]):
        S = support[:, m]
        best = torch.linalg.lstsq(X[:, S], program.fit.Y[:, m : m + 1]).solution[:, 0]
        torch.testing.assert_close(U[S, m], best, rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize("kind", LOSSES)
def test_refit_of_dependent_inputs_still_minimises(kind: Any) -> None:
    """A repeated and a dead input leave the outputs, and so the loss, as they were without them."""
    X, W = layer(4)
    wide = torch.cat([X, X[:, :1], torch.zeros_like(X[:, :1])], 1)
    fit = target(kind, X, W)
    support = some_support(LayerProgram(X, fit), 5)
    more = torch.cat([support, support[:1], torch.ones_like(support[:1])])
    plain, dependent = LayerProgram(X, fit), LayerProgram(wide, fit)
    a, b = loss(plain, refit(plain, support)), loss(dependent, refit(dependent, more))
    torch.testing.assert_close(a, b, rtol=OPTIMUM, atol=ROUNDING)


def test_relu_refit_is_never_worse_than_the_squared_one() -> None:
    for seed in range(5):
        X, W = layer(seed)
        program, linear = (LayerProgram(X, kind((X @ W).relu())) for kind in LOSSES)
        support = some_support(program, seed)
        assert (loss(program, refit(program, support)) <= loss(program, refit(linear, support)) * (1 + EXACT)).all()


@pytest.mark.parametrize(("fit", "kind"), [(Ball, SquaredLoss), (ReluBall, ReluLoss)])
def test_a_set_is_refitted_by_the_loss_of_its_geometry(fit: Any, kind: Any) -> None:
    X, W = layer(6)
    Y = target(kind, X, W).Y
    support = some_support(LayerProgram(X, kind(Y)), 7)
    assert torch.equal(refit(LayerProgram(X, fit(Y, 1.0)), support), refit(LayerProgram(X, kind(Y)), support))


def test_a_gram_is_refitted_as_its_samples_are() -> None:
    X, W = layer(8)
    gram = Gram.of([(X[:20], X[:20] @ W), (X[20:], X[20:] @ W)], dtype=torch.float64)
    support = some_support(LayerProgram(X, SquaredLoss(X @ W)), 9)
    a = refit(LayerProgram(gram, SquaredLoss(gram)), support)
    b = refit(LayerProgram(X, SquaredLoss(X @ W)), support)
    torch.testing.assert_close(a, b, rtol=OPTIMUM, atol=OPTIMUM)


def test_refit_refuses_what_it_cannot_do() -> None:
    X, W = layer(0)
    program = LayerProgram(X, SquaredLoss(X @ W))
    with pytest.raises(InvalidInput, match="boolean"):
        refit(program, torch.ones(program.shape))
    with pytest.raises(ShapeMismatch):
        refit(program, torch.ones(3, 3, dtype=torch.bool))
    with pytest.raises(SolverRefused, match="ceiling"):
        refit(LayerProgram(X, NetTrimLoss((X @ W).relu())), torch.ones(program.shape, dtype=torch.bool))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), exact=st.booleans())
def test_the_majoriser_touches_the_relu_loss_and_is_never_below_it(seed: int, exact: bool) -> None:
    X, W = layer(seed)
    model = model_of(LayerProgram(X, ReluLoss((X @ W).relu())), exact)
    assert isinstance(model, OneSided)
    g = torch.Generator().manual_seed(seed)
    U, step = (torch.randn(W.shape, generator=g, dtype=torch.float64) for _ in range(2))
    at = model.at(U)
    torch.testing.assert_close(model.majorised(U), X.T @ X @ U - at.gradient, rtol=ROUNDING, atol=ROUNDING)
    bound = at.value + (at.gradient * step).sum(0) + (X @ step).square().sum(0) / 2
    assert (model.at(U + step).value <= bound * (1 + EXACT)).all()


def test_exact_weights_are_stationary_and_no_worse_after_the_relu_than_where_they_began() -> None:
    X, W = layer(15)
    program = LayerProgram(X, ReluLoss((X @ W).relu()), TopK(17))

    def error(U: Tensor) -> Tensor:
        return ((X @ U).relu() - program.fit.Y).square().sum(0) / 2  # type: ignore[attr-defined]

    support = some_support(program, 16)
    U, model = refit(program, support), model_of(program, exact=True)
    at = descend(model, model.at(U), support)
    torch.testing.assert_close(at.value, error(at.weights), rtol=ROUNDING, atol=ROUNDING)
    assert (at.value <= error(U) * (1 + EXACT)).all()
    assert at.value.sum() < error(U).sum()

    V = solve(program, "continuation", exact=True).weights
    g = X.T @ (((X @ V) - program.fit.Y) * (X @ V > 0))
    assert V.count_nonzero() == 17
    assert g[V != 0].abs().max() <= OPTIMUM * (X.T @ program.fit.Y).abs().max()


BUDGETS = [TopK(17), TopK(4, per="neuron"), NM(2, 4), TopK(13, rows=8), NM(1, 4, rows=8)]


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_budgets_are_kept_exactly_and_spent(budget: TopK | NM, kind: Any) -> None:
    X, W = layer(10)
    program = LayerProgram(X, target(kind, X, W), budget)
    solution = solve(program, "continuation", steps=60)
    U, rows = solution.weights, budget.budgeted(program.shape[0])
    assert solution.status is Status.NO_BOUND
    assert float(budget.value(U)) == 0
    assert U[rows:].count_nonzero() == U[rows:].numel()  # free weights are used
    spent = U[:rows].count_nonzero()
    if isinstance(budget, NM):
        assert spent == U[:rows].numel() * budget.n // budget.m
    else:
        assert spent == budget.k * (1 if budget.per == "layer" else U.shape[1])
    assert slope(program, U)[U != 0].abs().max() <= OPTIMUM * slope(program, torch.zeros_like(U)).abs().max()


@pytest.mark.parametrize("kind", LOSSES)
def test_a_planted_sparse_layer_is_found(kind: Any) -> None:
    """Zero loss is optimal, and generic inputs give it to the planted weights alone."""
    g = torch.Generator().manual_seed(11)
    X = torch.randn(200, 30, generator=g, dtype=torch.float64)
    W = torch.randn(30, 8, generator=g, dtype=torch.float64) * (torch.rand(30, 8, generator=g) < 0.2)
    program = LayerProgram(X, target(kind, X, W), TopK(int(W.count_nonzero())))
    U = solve(program, "continuation").weights
    torch.testing.assert_close(U, W, rtol=OPTIMUM, atol=OPTIMUM)


def best_of_all(program: LayerProgram, sizes: int) -> Tensor:
    """[M]: the smallest loss of each neuron over all supports of this size, each refitted as a neuron of its own."""
    (N, M), chosen = program.shape, torch.tensor(list(itertools.combinations(range(program.shape[0]), sizes)))
    supports = torch.zeros(len(chosen), N, dtype=torch.bool).scatter_(1, chosen, True).T
    Y = program.fit.Y.repeat_interleave(len(chosen), 1)
    every = LayerProgram(program.inputs, type(program.fit)(Y))  # type: ignore[call-arg]
    return loss(every, refit(every, supports.repeat(1, M))).view(M, -1).amin(1)


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("seed", range(3))
def test_the_best_of_all_supports_is_never_beaten_and_often_reached(kind: Any, seed: int) -> None:
    """No support of k weights a neuron does better than brute force; most neurons' local optima are no worse."""
    X, W = layer(seed, P=40, N=8, M=4)
    program = LayerProgram(X, target(kind, X, W), TopK(3, per="neuron"))
    best = best_of_all(program, 3)
    found = loss(program, solve(program, "continuation", ridge=0.0).weights)
    assert (found >= best * (1 - OPTIMUM)).all()
    assert (found <= best * (1 + OPTIMUM)).sum() >= 3  # of 4 neurons


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), kind=st.sampled_from(LOSSES), budget=st.sampled_from(BUDGETS), exact=st.booleans())
def test_exchanges_never_raise_the_loss_and_keep_the_budget(
    seed: int, kind: Any, budget: TopK | NM, exact: bool
) -> None:
    X, W = layer(seed)
    program = LayerProgram(X, target(kind, X, W), budget)
    support = budget.support(torch.rand(program.shape, generator=torch.Generator().manual_seed(seed)) + 1)
    model = model_of(program, exact)
    at = descend(model, model.at(W), support)
    new, exchanged = improve(model, at, support, budget, rounds=3, pool=8)
    assert new.value.sum() <= at.value.sum() * (1 + EXACT)
    assert not new.weights[~exchanged].any()
    assert torch.equal(budget.support(exchanged.to(W)), exchanged)
    assert exchanged.sum() == support.sum()
    if isinstance(budget, NM) or budget.per == "neuron":
        assert (new.value <= at.value * (1 + EXACT)).all()


def test_no_single_exchange_improves_a_squared_layer() -> None:
    """With all inputs in the pool and rounds to spare the end is optimal among the neighbours of its support."""
    X, W = layer(12, N=8, M=3)
    program = LayerProgram(X, target(SquaredLoss, X, W), TopK(9))
    model = model_of(program)
    support = TopK(9).support(torch.rand(8, 3, generator=torch.Generator().manual_seed(0)))
    at, support = improve(model, descend(model, model.at(W), support), support, TopK(9), rounds=50, pool=16)
    total = loss(program, at.weights).sum()
    for out, into in itertools.product(support.nonzero().tolist(), (~support).nonzero().tolist()):
        neighbour = support.clone()
        neighbour[tuple(out)], neighbour[tuple(into)] = False, True
        assert loss(program, refit(program, neighbour)).sum() >= total * (1 - OPTIMUM)


@pytest.mark.parametrize("kind", LOSSES)
def test_the_same_call_gives_the_same_weights(kind: Any) -> None:
    X, W = layer(13)
    program = LayerProgram(X.float(), target(kind, X.float(), W.float()), TopK(20))
    first, second = (solve(program, "continuation", steps=50) for _ in range(2))
    assert torch.equal(first.weights, second.weights)
    assert first.weights.dtype == torch.float32


def test_limits_are_kept() -> None:
    X, W = layer(14)
    program = LayerProgram(X, target(SquaredLoss, X, W), TopK(20))
    assert solve(program, "continuation", max_iter=7).iterations == 7
    late = solve(program, "continuation", time_limit=1e-9)
    assert late.iterations == 0
    assert float(program.penalty.value(late.weights)) == 0


def test_refusals_say_why() -> None:
    X, W = layer(0)
    for fit, penalty, why in (
        (SquaredLoss(X @ W), L1(), "budgets"),
        (Ball(X @ W, 1.0), TopK(5), "SquaredLoss and ReluLoss"),
        (NetTrimLoss((X @ W).relu()), TopK(5), "ceiling"),
    ):
        with pytest.raises(SolverRefused, match=why):
            solve(LayerProgram(X, fit, penalty), "continuation")


@pytest.mark.parametrize(
    "options", [{"steps": 0}, {"batches": 0}, {"rounds": -1}, {"pool": 1}, {"penalty": (2.0, 1.0)}, {"damping": -1.0}]
)
def test_options_outside_their_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidTolerance):
        Continuation(**options)


def test_exchanges_keep_the_budget_where_neurons_have_died() -> None:
    """A neuron that no sample activates has no curvature: its Schur complements are rounding, of either sign."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(12, 16)
    X = torch.cat([torch.rand(90, 12), torch.ones(90, 1)], 1)
    W = torch.cat([layer.weight.T, layer.bias[None]]).detach()
    Y = (X @ W).relu()
    assert bool((Y == 0).all(0).any())
    for k in (40, 77, 96, 150):
        solution = solve(LayerProgram(X, ReluLoss(Y), TopK(k, rows=12)), "continuation", start=W, rounds=5)
        assert int(solution.weights[:12].count_nonzero()) <= k
        assert solution.status is Status.NO_BOUND


# --- An end in time ---


class After:
    """True at one call, and False before and after it; ``calls`` counts them."""

    def __init__(self, number: int) -> None:
        self.number, self.calls = number, 0

    def __call__(self) -> bool:
        self.calls += 1
        return self.calls == self.number


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", LOSSES)
def test_a_budget_is_asked_all_along_and_what_comes_back_keeps_it(kind: Any, dtype: torch.dtype) -> None:
    X, W = layer(3)
    program = LayerProgram(X.to(dtype), target(kind, X.to(dtype), W.to(dtype)), TopK(20))
    never = After(0)
    whole = solve(program, start=W, stop=never)
    assert whole.status is Status.NO_BOUND
    assert never.calls > 300  # each step of the continuation, each round of exchanges, each curvature
    for number in (1, 150, 300, 301, *range(302, never.calls + 1)):
        stop = After(number)
        solution = solve(program, start=W, stop=stop)
        assert solution.status is Status.STOPPED
        assert stop.calls == number
        assert solution.nonzeros <= 20
        assert solution.certificate.value < float("inf")
    assert solution.certificate.value <= whole.certificate.value * (1 + 1e-3)  # all but the last look was done
    assert torch.equal(solve(program, start=W).weights, whole.weights)


@pytest.mark.parametrize("kind", LOSSES)
def test_a_refit_that_is_stopped_is_on_the_support_and_no_worse_than_what_it_had(kind: Any) -> None:
    X, W = layer(4)
    program = LayerProgram(X, target(kind, X, W), TopK(30))
    support = some_support(program, 4)
    losses = []
    for number in range(1, 5):
        U = refit(program, support, After(number))
        assert not bool(U[~support].any())
        losses.append(float(loss(program, U).sum()))
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] >= float(loss(program, refit(program, support)).sum())
    assert losses[0] < float(loss(program, torch.zeros_like(W)).sum())


def uneven(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs [P, N] whose samples differ in size by orders of magnitude, targets [P, 1] with few active, a support."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=rng, dtype=torch.float64)

    P, N = int(torch.randint(3, 60, (), generator=rng)), int(torch.randint(2, 30, (), generator=rng))
    X = normal(P, N)
    X = (X, X.clamp(min=0), X * 10 ** normal(P, 1), X.exp())[seed % 4]
    W = normal(N, 1)
    Y = X @ W if (seed // 4) % 4 < 2 else normal(P, 1) * float((X @ W).norm()) / P**0.5
    if (seed // 4) % 2:
        Y = Y - Y.abs().mean()
    return X, Y.clamp(min=0), torch.rand(N, 1, generator=rng, dtype=torch.float64) < 0.9


def best_known(X: torch.Tensor, Y: torch.Tensor, support: torch.Tensor, U: torch.Tensor) -> float:
    """The least loss that a quasi-Newton method finds from U and from 0."""
    A, y = X[:, support[:, 0]].numpy(), Y[:, 0].numpy()

    def loss_and_gradient(u: Any) -> tuple[float, Any]:
        z = A @ u
        h = np.where(y > 0, z - y, np.maximum(z, 0))
        return 0.5 * float(h @ h), A.T @ h

    limits = {"maxiter": 5_000, "maxfun": 10_000, "ftol": 1e-15, "gtol": 1e-12}
    starts = (U[support[:, 0], 0].numpy(), np.zeros(A.shape[1]))
    return min(float(minimize(loss_and_gradient, u, jac=True, method="L-BFGS-B", options=limits).fun) for u in starts)


_HARD = [6, 606, 710, 1006, 1746, 1842, 2122, 2148, 3326, 3838]


@pytest.mark.parametrize("seeds", [range(48), _HARD], ids=["random", "hard"])
def test_refit_finds_the_minimum_of_each_neuron_or_says_that_it_did_not(seeds: Any, caplog: Any) -> None:
    """Newton's steps alone cycle where fewer samples respond than the support has inputs."""
    for seed in seeds:
        X, Y, support = uneven(seed)
        if not support.any():
            continue
        program = LayerProgram(X, ReluLoss(Y))
        caplog.clear()
        U = refit(program, support)
        if not caplog.records:
            rounding = EXACT * float(Y.square().sum())
            assert float(loss(program, U).sum()) <= best_known(X, Y, support, U) * (1 + REFERENCE) + rounding
