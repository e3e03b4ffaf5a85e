"""Programs on a Gram are those on the samples: values, bounds, optima; merging, precision, memory, what is refused."""

import itertools
import math
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tolerances import EXACT, OPTIMUM, ROUNDING, SINGLE, TIGHT
from torch import Tensor
from zoo import gaussian, layer, multipliers

from convexprune.solvers import L1, Ball, LayerProgram, NetTrimSet, ReluBall, Status, certify, solve
from convexprune.solvers.arrays import add_gram
from convexprune.solvers.errors import ConvexPruneError, EmptyInput, InvalidInput, NonFinite, ShapeMismatch
from convexprune.solvers.programs import Gram, GroupL2, NetTrimLoss, ReluLoss, SquaredLoss

SEEDS = st.integers(0, 10_000)
N, M = 8, 5


def dead_and_duplicate(X: Tensor) -> Tensor:
    X = X.clone()
    X[:, 1], X[:, 3], X[:, 5] = 0, X[:, 2], X[:, 2] - 2 * X[:, 4]
    return X


INPUTS: dict[str, Callable[[], Tensor]] = {
    "plain": lambda: layer(1, 60, N, M)[0],
    "fewer samples than inputs": lambda: layer(2, 5, N, M)[0],
    "one sample": lambda: layer(3, 1, N, M)[0],
    "dead and duplicate inputs": lambda: dead_and_duplicate(layer(4, 60, N, M)[0]),
    "inputs in very different units": lambda: layer(5, 60, N, M)[0] * torch.logspace(-6, 6, N, dtype=torch.float64),
    "all inputs dead": lambda: torch.zeros(20, N, dtype=torch.float64),
}
TARGETS = ["reached", "noisy", "one neuron zero"]
FITS: dict[str, Callable[[Any, Tensor], Any]] = {
    "ball": lambda Y, size: Ball(Y, 0.2 * float(size.norm())),
    "a ball a neuron": lambda Y, size: Ball(Y, 0.2 * size + 0.01),
    "squared loss": lambda Y, size: SquaredLoss(Y, 3.0),
}
PENALTIES: dict[str, Any] = {
    "L1": L1(),
    "free bias": L1.free_bias(N),
    "rows": GroupL2("rows"),
    "columns": GroupL2("columns", torch.arange(1, M + 1)),
    "labels": GroupL2(torch.arange(N * M).view(N, M) // 3),
}


def samples(inputs: str, targets: str = "noisy") -> tuple[Tensor, Tensor]:
    X = INPUTS[inputs]()
    Y = X @ layer(7, 3, N, M)[1]
    Y = Y if targets == "reached" else Y + 0.1 * gaussian(8, len(X), M)
    if "zero" in targets:
        Y[:, 2] = 0
    return X, Y


def pair(fit: str, penalty: str, inputs: str, targets: str = "noisy") -> tuple[LayerProgram, LayerProgram]:
    """The program on the samples and the one on their Gram."""
    X, Y = samples(inputs, targets)
    gram = Gram.of([(X, Y)], torch.float64)
    size = Y.norm(dim=0)
    return (
        LayerProgram(X, FITS[fit](Y, size), PENALTIES[penalty]),
        LayerProgram(gram, FITS[fit](gram, size), PENALTIES[penalty]),
    )


# The root


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("targets", TARGETS)
def test_the_root_has_the_grams_of_the_samples(inputs: str, targets: str) -> None:
    """X̃ᵀX̃ = XᵀX, X̃ᵀỸ = XᵀY and ‖ỹ_m‖ = ‖y_m‖, to rounding relative to the lengths of the columns."""
    X, Y = samples(inputs, targets)
    gram = Gram.of([(X, Y)], torch.float64)
    d, size = X.norm(dim=0)[:, None], Y.norm(dim=0)
    R, T = gram.inputs, gram.targets
    assert (R.shape, T.shape) == ((N + 1, N), (N + 1, M))
    assert bool(((R.T @ R - X.T @ X).abs() <= ROUNDING * d * d.T).all())
    assert bool(((R.T @ T - X.T @ Y).abs() <= ROUNDING * d * size).all())
    torch.testing.assert_close(T.norm(dim=0), size, rtol=ROUNDING, atol=0)
    assert gram.size == pytest.approx(float(Y.norm()), rel=ROUNDING)
    if targets == "reached":
        assert not T[-1].any()  # only rounding says that X does not reach them


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("targets", TARGETS)
@given(seed=SEEDS)
def test_distances_from_the_root_are_those_from_the_samples(inputs: str, targets: str, seed: int) -> None:
    """‖X̃u_m − ỹ_m‖ = ‖Xu_m − y_m‖ for each neuron and any weights: all that a linear fit sees."""
    X, Y = samples(inputs, targets)
    gram = Gram.of([(X, Y)], torch.float64)
    d = X.norm(dim=0)[:, None]
    U = gaussian(seed, N, M) / torch.where(d > 0, d, 1.0)
    squares = (X @ U - Y).square().sum(0)
    torch.testing.assert_close((gram.inputs @ U - gram.targets).square().sum(0), squares, rtol=ROUNDING, atol=0)


# The program


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("penalty", PENALTIES)
@given(seed=SEEDS)
def test_weights_are_worth_the_same(fit: str, penalty: str, seed: int) -> None:
    """Value, violation, scale, and the bound that the residual of the weights supports."""
    samples, gram = pair(fit, penalty, "plain")
    U = 0.3 * gaussian(seed, N, M)
    first, second = certify(samples, U), certify(gram, U)
    slack = ROUNDING * first.scale
    assert second.value == pytest.approx(first.value, rel=ROUNDING)
    assert second.violation == pytest.approx(first.violation, rel=ROUNDING, abs=ROUNDING)
    assert second.scale == pytest.approx(first.scale, rel=ROUNDING)
    assert second.bound == pytest.approx(first.bound, abs=slack)


@pytest.mark.parametrize("inputs", ["plain", "fewer samples than inputs", "dead and duplicate inputs"])
@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("penalty", ["L1", "free bias", "rows", "labels"])
def test_the_optimum_is_that_of_the_samples(fit: str, penalty: str, inputs: str) -> None:
    """Weights solved for on the Gram certify themselves on the samples, and its bound is one for the samples."""
    samples, gram = pair(fit, penalty, inputs)
    found = solve(gram, tol=1e-6, feas_tol=1e-7)
    direct = solve(samples, tol=1e-6, feas_tol=1e-7)
    assert found.status is direct.status is Status.SOLVED
    assert multipliers(found).shape == (N + 1, M)
    scale = direct.certificate.scale
    assert found.certificate.value == pytest.approx(direct.certificate.value, abs=3e-6 * scale)
    assert found.certificate.bound <= direct.certificate.value + OPTIMUM * scale
    judged = certify(samples, found.weights, multipliers(direct))
    assert judged.within(3e-6, 2e-7)


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("penalty", ["L1", "free bias", "columns"])
@given(seed=SEEDS, power=st.integers(-100, 100))
def test_no_multipliers_of_a_gram_bound_above_the_optimum_of_the_samples(
    fit: str, penalty: str, seed: int, power: int
) -> None:
    _, gram = pair(fit, penalty, "dead and duplicate inputs")
    best = optimum(fit, penalty)
    L = gaussian(seed, N + 1, M)
    for proposal in (L, best[1] + 0.01 * best[1].norm() * L / L.norm(), -gram.fit.Y):
        assert 0 <= certify(gram, torch.zeros(N, M), 10.0**power * proposal).bound <= best[0]
    assert certify(gram, torch.zeros(N, M), best[1]).bound >= best[0] * (1 - 1e-5)


_OPTIMA: dict[tuple[str, str], tuple[float, Tensor]] = {}


def optimum(fit: str, penalty: str) -> tuple[float, Tensor]:
    """What a (nearly) feasible point of the samples' program costs, and multipliers of the Gram's."""
    if (fit, penalty) not in _OPTIMA:
        samples, gram = pair(fit, penalty, "dead and duplicate inputs")
        direct = solve(samples, tol=TIGHT, feas_tol=TIGHT, max_iter=50_000).certificate
        found = multipliers(solve(gram, tol=1e-6, feas_tol=1e-7))
        _OPTIMA[fit, penalty] = (direct.value + OPTIMUM * direct.scale, found)
    return _OPTIMA[fit, penalty]


def test_targets_that_are_reached_exactly_are_reached_by_the_root() -> None:
    """eps = 0: the trained weights are feasible, so the program must not become infeasible by rounding."""
    X, W = layer(1, 60, N, M)
    gram = Gram.of([(X, X @ W)], torch.float64)
    found = certify(LayerProgram(gram, Ball(gram, 0.0)), W)
    assert found.violation <= TIGHT
    assert found.bound <= float(W.abs().sum()) * (1 + OPTIMUM)


# Streaming and merging


@given(seed=SEEDS, cuts=st.sets(st.integers(1, 59), max_size=6))
def test_any_split_and_order_gives_the_same_gram(seed: int, cuts: set[int]) -> None:
    X, Y = samples("plain")
    edges = [0, *sorted(cuts), 60]
    batches = [(X[a:b], Y[a:b]) for a, b in itertools.pairwise(edges)]
    order = torch.randperm(len(batches), generator=torch.Generator().manual_seed(seed)).tolist()
    whole = Gram.of([(X, Y)], torch.float64)
    streamed = Gram.of((batches[i] for i in order), torch.float64)
    merged = Gram.of([batches[order[0]]], torch.float64)
    for i in order[1:]:
        merged = merged + Gram.of([batches[i]], torch.float64)
    for gram in (streamed, merged):
        assert gram.samples == 60
        for name in ("XX", "XY", "YY"):
            torch.testing.assert_close(getattr(gram, name), getattr(whole, name), rtol=EXACT, atol=EXACT)


def test_merging_changes_neither() -> None:
    X, Y = samples("plain")
    first, second = Gram.of([(X[:20], Y[:20])]), Gram.of([(X[20:], Y[20:])])
    held = [array.clone() for gram in (first, second) for array in (gram.XX, gram.XY, gram.YY)]
    roots = first.inputs, second.targets
    both = first + second + first
    assert both.samples == 80
    for before, array in zip(held, (first.XX, first.XY, first.YY, second.XX, second.XY, second.YY), strict=True):
        assert torch.equal(before, array)
    assert first.inputs is roots[0]
    assert second.targets is roots[1]
    with pytest.raises(AttributeError):
        first.samples = 3  # type: ignore[misc]


def test_a_gram_leaves_the_samples_alone() -> None:
    X, Y = samples("plain")
    held = X.clone(), Y.clone()
    for dtype in (torch.float32, torch.float64):
        LayerProgram(gram := Gram.of([(X, Y), (X, Y)], dtype), Ball(gram, 1.0))
    assert torch.equal(X, held[0])
    assert torch.equal(Y, held[1])


def test_batches_are_let_go_before_the_next_is_asked_for() -> None:
    alive: list[int] = []
    seen: list[weakref.ref[Tensor]] = []

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for k in range(4):
            alive.append(sum(ref() is not None for ref in seen))
            batch = (gaussian(k, 6, 3), gaussian(k + 9, 6, 2))
            seen.extend(weakref.ref(array) for array in batch)
            yield batch
            del batch

    gram = Gram.of(batches())
    assert alive == [0, 0, 0, 0]
    assert gram.samples == 24
    assert sum(array.numel() for array in (gram.XX, gram.XY, gram.YY)) == 9 + 6 + 2


# Precision


@pytest.mark.parametrize("inputs", ["plain", "fewer samples than inputs", "dead and duplicate inputs"])
@given(seed=SEEDS)
def test_float32_products_are_off_by_float32_rounding(inputs: str, seed: int) -> None:
    """Squared distances to a few units of float32 rounding of what the outputs and targets are made of."""
    X, Y = samples(inputs)
    single = Gram.of([(X, Y)])
    assert single.dtype == torch.float32
    assert single.XX.dtype == torch.float64
    U = gaussian(seed, N, M) / X.norm(dim=0)[:, None].clamp(min=1e-3)
    reach = (X.norm(dim=0) @ U.abs() + Y.norm(dim=0)).square()
    apart = (single.inputs @ U - single.targets).square().sum(0) - (X @ U - Y).square().sum(0)
    assert bool((apart.abs() <= 64 * torch.finfo(torch.float32).eps * reach).all())


def test_a_dead_input_costs_float32_products_no_accuracy() -> None:
    """Many correlated inputs, one of them dead: the root must not drop directions that the others need."""
    mix = gaussian(1, 6, 400)
    X = (gaussian(0, 3000, 6) @ mix + 0.3 * gaussian(2, 3000, 400)).clamp(min=0) + 0.5
    X[:, 9] = 0
    X[:, 5] = X[:, 4]
    W = gaussian(3, 400, 4) / 20
    Y = X @ W
    gram = Gram.of([(X[:1000], Y[:1000]), (X[1000:], Y[1000:])])
    U = W + 0.1 * gaussian(4, 400, 4) / 20
    outside = float((gram.inputs @ U - gram.targets).norm())
    assert outside == pytest.approx(float((X @ U - Y).norm()), rel=SINGLE)
    assert float((gram.inputs @ W - gram.targets).norm()) <= SINGLE * float(Y.norm())


@pytest.mark.parametrize("fit", FITS)
def test_float32_and_float64_grams_have_the_same_optimum(fit: str) -> None:
    X, Y = samples("plain")
    values = []
    for dtype in (torch.float32, torch.float64):
        gram = Gram.of([(X, Y)], dtype)
        program = LayerProgram(gram, FITS[fit](gram, Y.norm(dim=0)))
        assert program.dtype == dtype
        found = solve(program, tol=1e-5)
        assert found.status is Status.SOLVED
        values.append(found.certificate.value)
    assert values[0] == pytest.approx(values[1], rel=SINGLE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int64])
def test_batches_of_any_precision(dtype: torch.dtype) -> None:
    X, Y = ((4 * array).round().to(dtype) for array in samples("plain"))
    gram = Gram.of([(X, Y), (np.asarray(X.tolist()), np.asarray(Y.tolist()))])
    torch.testing.assert_close(gram.XX, 2 * X.double().T @ X.double(), rtol=1e-6, atol=1e-4)
    torch.testing.assert_close(gram.YY, 2 * Y.double().square().sum(0), rtol=1e-6, atol=1e-4)


def test_plain_data() -> None:
    gram = Gram.of([samples("plain")])
    assert gram.to_dict() == {"samples": 60, "inputs": N, "outputs": M, "dtype": "torch.float32"}
    again = Gram(gram.XX, gram.XY, gram.YY, gram.samples, gram.dtype)  # as from a file
    assert torch.equal(again.inputs, gram.inputs)


# What is refused

ONE = torch.ones(4, 3), torch.ones(4, 2)
REFUSED: dict[str, tuple[Callable[[], object], type[ConvexPruneError], str]] = {
    "no batch": (lambda: Gram.of([]), EmptyInput, r"at least one pair \(X, Y\), found none"),
    "another dtype": (lambda: Gram.of([ONE], torch.float16), InvalidInput, "dtype: expected torch.float32 or"),
    "an array in the place of a pair": (lambda: Gram.of(ONE), InvalidInput, r"batch 0: expected a pair \(X, Y\)"),  # type: ignore[arg-type]
    "numbers in the place of pairs": (lambda: Gram.of([1.0]), InvalidInput, "batch 0: expected a pair.*found float"),  # type: ignore[list-item]
    "other inputs": (
        lambda: Gram.of([ONE, (torch.ones(4, 5), ONE[1])]),
        ShapeMismatch,
        r"batch 1: expected \[3, 2\] inputs and outputs as before, found \[5, 2\]",
    ),
    "other outputs": (lambda: Gram.of([ONE, (ONE[0], torch.ones(4, 1))]), ShapeMismatch, r"found \[3, 1\]"),
    "samples differ": (lambda: Gram.of([(ONE[0], torch.ones(3, 2))]), ShapeMismatch, "targets Y of batch 0.*samples"),
    "NaN": (lambda: Gram.of([ONE, (math.nan * ONE[0], ONE[1])]), NonFinite, "inputs X of batch 1: 12 of 12"),
    "infinite targets": (lambda: Gram.of([(ONE[0], math.inf * ONE[1])]), NonFinite, "targets Y of batch 0"),
    "an empty batch": (lambda: Gram.of([ONE, (ONE[0][:0], ONE[1][:0])]), EmptyInput, "inputs X of batch 1"),
    "a vector": (lambda: Gram.of([(ONE[0][0], ONE[1])]), ShapeMismatch, "inputs X of batch 0: expected a matrix"),
    "overflow": (lambda: Gram.of([(1e200 * ONE[0].double(), ONE[1])]), NonFinite, "Gram XX: products overflow.*divide"),
    "merging other shapes": (
        lambda: Gram.of([ONE]) + Gram.of([(torch.ones(4, 5), ONE[1])]),
        ShapeMismatch,
        r"\[3, 2\] and of \[5, 2\]",
    ),
    "products that do not fit": (
        lambda: Gram(torch.ones(3, 3), torch.ones(2, 2), torch.ones(2), 4),
        ShapeMismatch,
        r"expected products \[N, N\], \[N, M\] and \[M\], found",
    ),
    **{
        f"{fit.__name__} of a Gram": (lambda fit=fit: fit(Gram.of([ONE]), 1.0), InvalidInput, "needs the samples")
        for fit in (ReluBall, ReluLoss, NetTrimSet, NetTrimLoss)
    },
    "the fit of another Gram": (
        lambda: LayerProgram(Gram.of([ONE]), Ball(Gram.of([ONE]), 1.0)),
        InvalidInput,
        r"the same Gram as the inputs, as in LayerProgram\(gram, Ball\(gram, eps\)\)",
    ),
    "samples and a Gram": (
        lambda: LayerProgram(ONE[0][:2], Ball(Gram.of([ONE]), 1.0)),
        ShapeMismatch,
        "number of samples",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_grams_are_refused_with_a_reason(case: str) -> None:
    call, error, message = REFUSED[case]
    with pytest.raises(error, match=message) as caught:
        call()
    assert caught.type is error


def test_a_gram_and_something_else_do_not_add() -> None:
    with pytest.raises(TypeError):
        _ = Gram.of([ONE]) + 1  # type: ignore[operator]


def test_fits_of_the_same_gram_with_another_radius_or_measure_are_its_own() -> None:
    gram = Gram.of([ONE])
    fit = Ball(gram, 1.0)
    for other in (fit.with_eps(2.0), fit.as_loss(3.0), SquaredLoss(gram)):
        assert LayerProgram(gram, other).samples == 4


@given(st.integers(1, 300), st.integers(1, 20), st.integers(0, 9))
def test_products_of_inputs_are_summed_by_halves(N: int, P: int, seed: int) -> None:
    A, total = gaussian(seed, P, N), gaussian(seed + 1, N, N)
    total = total + total.T
    expected = total + A.T @ A
    found = add_gram(total, A)
    assert found is total
    size = float(expected.abs().max())
    assert torch.allclose(found, expected, rtol=EXACT, atol=EXACT * size)
