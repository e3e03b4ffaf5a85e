"""Sensitivities that bound what they say, samples without bias, and promises that hold as often as they should."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tolerances
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from torch import Tensor, nn
from torch.nn import functional

from convexprune.layers import input_matrices
from convexprune.options import Options
from convexprune.prune import Request
from convexprune.pruners.draws import Choice, bernstein, choose, hoeffding, inclusion
from convexprune.pruners.lowner import Lowner, peeled
from convexprune.pruners.mussay import MONOTONE, Mussay, below_identity, largest
from convexprune.pruners.pruner import PRUNERS
from convexprune.pruners.sampling import Sampler, Sampling
from convexprune.pruners.sizes import kept_of
from convexprune.pruners.uniform import Uniform
from convexprune.pruners.views import Product, Sensitivities, View
from convexprune.runs.run import Run
from convexprune.solvers.errors import InvalidInput, InvalidTolerance, UnknownOption, UnknownSolver
from convexprune.solvers.geometry import lewis_weights, max_norm_coreset
from convexprune.targets import Guarantee

SEEDS = 2000
ERRORS = 4.0
"""Standard errors that a mean over the seeds may be away from its expectation: 6e-5 a comparison."""

PHI: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda z: z,
    **{
        name: getattr(functional, name, None) or getattr(torch, name)
        for name in (
            *("relu", "relu6", "sigmoid", "softplus", "hardsigmoid", "leaky_relu", "gelu", "silu", "tanh", "elu"),
            *("hardswish", "hardtanh", "mish", "softsign", "hardshrink", "softshrink", "tanhshrink"),
        )
    },
}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_one(x: Tensor) -> Tensor:
    return torch.cat([x, torch.ones_like(x[:, :1])], dim=1)


def layer(incoming: Tensor, W: Tensor, activation: str | None = "relu", x: Tensor | None = None) -> View:
    """View φ(p_iᵀ(x, 1)) of which one linear layer W [n, M] takes the outputs."""
    if x is None:
        return View("layer", (Product(W, None),), activation, incoming)
    hidden = PHI[activation](with_one(x) @ incoming.T)
    reach = float(with_one(x).norm(dim=1).max())
    return View("layer", (Product(W, hidden),), activation, incoming, measure=lambda: reach)


def some_layer(n: int = 40, d: int = 5, M: int = 3, activation: str | None = "relu", seed: int = 0) -> View:
    """View of all sizes, with 60 inputs."""
    sizes = torch.logspace(-1, 1, n, dtype=torch.float64)[:, None]
    return layer(normal(n, d + 1, seed=seed), sizes * normal(n, M, seed=seed + 1), activation, normal(60, d, seed=7))


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def many(method: Sampling, of: View, size: int | Guarantee, seeds: int = SEEDS) -> Choice:
    """A choice for each of so many seeds: scores of the layer once, and a group of the same items for each."""
    [scores] = method.of_layers([replace(of, guarantee=size if isinstance(size, Guarantee) else None)])
    draws = None if scores.draws is None else scores.draws.expand(seeds)
    repeated = replace(scores, values=scores.values.expand(seeds, -1), draws=draws)
    wanted = size if isinstance(size, Guarantee) else torch.full((seeds,), size)
    return choose(repeated, wanted, method.sampling, rng())


def sampled(method: Sampling, scores: Sensitivities, count: int) -> Tensor:
    """Factors of a sample of so many neurons."""
    [size] = method.allocate([scores], count)
    return choose(scores, size, method.sampling, rng()).factors


def outputs(of: View, factors: Tensor) -> Tensor:
    """[seeds, samples, M]: what the next layer makes of the reweighted neurons, without its bias."""
    [product] = of.products
    assert product.inputs is not None
    return torch.einsum("sn,pn,nm->spm", factors, product.inputs, product.weights)


def ones(of: View) -> Tensor:
    return torch.ones(1, len(of.incoming), dtype=torch.float64)


METHODS_OF_NEURONS: dict[str, Sampling] = {
    "lowner": Lowner(),
    "lowner, incoming": Lowner(points="incoming"),
    "lowner, peeling": Lowner(construction="peeling"),
    "lowner, peeling, incoming": Lowner(construction="peeling", points="incoming"),
    "mussay": Mussay(),
    "uniform": Uniform(),
}


# Without bias


@pytest.mark.parametrize("sampling", ["fixed", "draws"])
@pytest.mark.parametrize("name", METHODS_OF_NEURONS)
def test_the_mean_layer_is_the_layer(name: str, sampling: Any) -> None:
    of = some_layer()
    method = replace(METHODS_OF_NEURONS[name], sampling=sampling)  # type: ignore[type-var]
    factors = many(method, of, 12).factors
    found, true = outputs(of, factors), outputs(of, ones(of))[0]
    error = found.std(0) / math.sqrt(SEEDS)
    assert ((found.mean(0) - true).abs() <= ERRORS * error + tolerances.EXACT).all()
    assert (error > 0).all()
    distinct = (factors > 0).sum(1)
    if sampling == "fixed":
        assert (distinct == 12).all()
    else:
        assert abs(float(distinct.double().mean()) - 12) < 1


@pytest.mark.parametrize("name", METHODS_OF_NEURONS)
def test_all_neurons_with_a_sensitivity_are_the_layer_itself(name: str) -> None:
    of = some_layer()
    for sampling in ("fixed", "draws"):
        method = replace(METHODS_OF_NEURONS[name], sampling=sampling)  # type: ignore[type-var]
        for size in (40, 41):
            assert (sampled(method, method.of_layers([of])[0], size) == 1).all()


def test_contact_points_are_kept_for_certain_where_they_fit() -> None:
    of = some_layer()
    c = of.incoming.norm(dim=1, keepdim=True)
    support = max_norm_coreset(c * of.products[0].weights).indices
    assert 3 <= len(support) <= 12
    assert (many(Lowner(), of, 12).factors[:, support] == 1).all()
    few = many(Lowner(), of, len(support) - 1).factors > 0
    assert (few.sum(1) == len(support) - 1).all()
    assert not few[:, support].all()


def test_all_contact_points_and_nothing_else_would_be_biased() -> None:
    """Where they are as many as are asked for, they are sampled like all others."""
    of = some_layer()
    [scores] = Lowner().of_layers([of])
    assert scores.kept is not None
    factors = many(Lowner(), of, int(scores.kept.sum())).factors
    found, true = outputs(of, factors), outputs(of, ones(of))[0]
    assert ((found.mean(0) - true).abs() <= ERRORS * found.std(0) / math.sqrt(SEEDS) + tolerances.EXACT).all()
    alone = replace(scores, values=scores.values.masked_fill(~scores.kept, 0))
    assert torch.equal(
        sampled(Lowner(), alone, int(scores.kept.sum()))[0], scores.kept.double()
    )  # the others add nothing


# Promises


def crowd(activation: str | None, M: int = 2, n: int = 2000) -> tuple[View, Tensor]:
    """A layer of near-copies of a few neurons, and inputs: far more neurons than the draws that a promise takes."""
    kinds = torch.arange(n) % 7
    incoming = normal(7, 4, seed=1)[kinds] + 1e-2 * normal(n, 4, seed=2)
    W = normal(7, M, seed=3)[kinds] + 1e-2 * normal(n, M, seed=4)
    x = normal(25, 3, seed=5)
    return layer(incoming, W, activation, x), x


def scale_of(method: Sampling, of: View, x: Tensor) -> Tensor:
    """What eps is relative to, [samples, M], as the promise has it."""
    [product] = of.products
    W, length = product.weights.abs(), with_one(x).norm(dim=1, keepdim=True)
    if isinstance(method, Lowner) and method.points == "incoming":
        return (with_one(x) @ of.incoming.T).abs() @ W
    beta = getattr(method, "beta", None) or (1.0 if of.activation in ("relu", None) else of.reach)
    c = largest(of.activation, beta * of.incoming.norm(dim=1))
    whole = (c[:, None] * W).amax(1).sum() if isinstance(method, Mussay) else c @ W
    return whole * (length if beta == 1.0 else torch.ones_like(length)) * torch.ones(1, W.shape[1])


PROMISES: dict[str, tuple[Sampling, str | None, Guarantee]] = {
    "mussay": (Mussay(), "relu", Guarantee(0.1, 0.1)),
    "mussay, sigmoid": (Mussay(), "sigmoid", Guarantee(0.1, 0.1)),
    "mussay, softplus, beta": (Mussay(beta=8.0), "softplus", Guarantee(0.1, 0.1)),
    "lowner": (Lowner(), "relu", Guarantee(0.2, 0.1)),
    "lowner, tanh": (Lowner(), "tanh", Guarantee(0.2, 0.1)),
    "lowner, no activation": (Lowner(), None, Guarantee(0.2, 0.2)),
    "lowner, incoming": (Lowner(points="incoming"), "relu", Guarantee(0.4, 0.1)),
    "lowner, incoming, gelu": (Lowner(points="incoming"), "gelu", Guarantee(0.4, 0.1)),
}


@pytest.mark.parametrize("case", PROMISES)
def test_a_promise_fails_no_more_often_than_it_may(case: str) -> None:
    """For every one input: all outputs within eps of their scale, in all but a part delta of the samples."""
    method, activation, guarantee = PROMISES[case]
    of, x = crowd(activation)
    choice = many(method, of, guarantee, 400)
    assert not choice.whole.any()
    assert int(choice.draws[0]) < 2000
    assert all(a.holds for a in method.of_layers([of])[0].assumptions)
    wrong = (outputs(of, choice.factors) - outputs(of, ones(of))).abs()
    fails = (wrong > guarantee.eps * scale_of(method, of, x)).any(2)
    assert float(fails.double().mean(0).max()) <= guarantee.delta
    assert (wrong.amax(0) > 0).all()
    assert float((choice.factors > 0).double().mean()) < 0.75


def test_the_published_promise_holds_too() -> None:
    """Rank 1, where peeling proves something at all: Σs grows with log n."""
    of, x = crowd("relu", M=1, n=200)
    method, guarantee = Lowner(construction="peeling"), Guarantee(1.5, 0.1)
    choice = many(method, of, guarantee, 400)
    assert not choice.whole.any()
    wrong = (outputs(of, choice.factors) - outputs(of, ones(of))).abs()
    fails = (wrong > guarantee.eps * scale_of(method, of, x)).any(2)
    assert float(fails.double().mean(0).max()) <= guarantee.delta


@settings(max_examples=16)
@given(st.sampled_from(sorted(METHODS_OF_NEURONS)[:4]), st.integers(0, 10**6))
def test_no_neuron_makes_up_more_than_its_sensitivity(name: str, seed: int) -> None:
    """|f_i| ≤ s_i·F for the terms of every output: all that Bernstein's and Hoeffding's inequalities are given."""
    method = METHODS_OF_NEURONS[name]
    of = some_layer(n=30, d=3, M=2, seed=seed)
    x = 10 * normal(50, 3, seed=seed + 5)
    of = layer(of.incoming, of.products[0].weights, "relu", x)
    assert of.products[0].inputs is not None
    terms = of.products[0].inputs[:, :, None] * of.products[0].weights
    s = method.of_layers([of])[0].values[0]
    scale = scale_of(method, of, x)
    if isinstance(method, Mussay):
        scale = scale / s.sum()
    assert (terms.abs() <= s[:, None] * scale[:, None] * (1 + tolerances.LEWIS_FIXED)).all()


def test_draws_by_hand() -> None:
    """2·3·(1 + 1/3)/0.25·log 40 = 118.04…; 2·log 40/0.25 = 29.5…"""
    guarantee = Guarantee(0.5, 0.1)
    assert bernstein(torch.tensor([3.0, 0.0]), guarantee, 2).tolist() == [119, 0]
    assert hoeffding(guarantee, 2).tolist() == [30]


@pytest.mark.parametrize("method", [Mussay(), Lowner(), Lowner(points="incoming")])
def test_where_draws_would_be_no_fewer_than_neurons_all_are_kept(method: Sampling) -> None:
    of, _ = crowd("relu", n=300)
    [scores] = method.of_layers([replace(of, guarantee=Guarantee(0.01, 0.1))])
    choice = choose(scores, Guarantee(0.01, 0.1), method.sampling, rng())
    assert choice.whole.all()
    assert int(choice.draws[0]) >= 300
    assert (choice.factors == 1).all()
    for draws in (299, 300):
        asked = replace(scores, draws=torch.tensor([draws]))
        assert bool(choose(asked, Guarantee(0.01, 0.1), method.sampling, rng()).whole) == (draws == 300)


@pytest.mark.parametrize("kind", [Mussay, Lowner])
def test_the_largest_guarantee_nothing(kind: type[Sampling]) -> None:
    method = kind(sampling="top")  # type: ignore[call-arg]
    with pytest.raises(InvalidInput, match="guarantees nothing"):
        choose(method.of_layers([some_layer()])[0], Guarantee(0.1, 0.1), method.sampling, rng())


@pytest.mark.parametrize("method", [Uniform()])
def test_baselines_promise_nothing(method: Sampling) -> None:
    with pytest.raises(InvalidInput, match="proves nothing"):
        choose(method.of_layers([some_layer()])[0], Guarantee(0.1, 0.1), method.sampling, rng())


@pytest.mark.parametrize(
    ("eps", "delta"),
    [
        *((eps, 0.1) for eps in (0, -1, 1e-200, 1e300, math.inf, math.nan)),
        *((0.1, delta) for delta in (0, 5e-324, 1, math.nan)),
    ],
)
def test_a_guarantee_is_of_an_error_and_a_probability(eps: float, delta: float) -> None:
    with pytest.raises(InvalidTolerance, match=r"eps|delta"):
        Guarantee(eps, delta).checked()


# Sensitivities of the ellipsoid


def true_sensitivities(A: Tensor) -> list[float]:
    """max |a_iᵀx|/Σ|a_jᵀx| of each point: 1 over the least Σt with −t ≤ Ax ≤ t, a_iᵀx = 1, a linear program."""
    P = A.numpy()
    n, d = P.shape
    cost, bounds = np.r_[np.zeros(d), np.ones(n)], [(None, None)] * d + [(0, None)] * n
    below = np.block([[P, -np.eye(n)], [-P, -np.eye(n)]])
    found = [
        linprog(cost, A_ub=below, b_ub=np.zeros(2 * n), A_eq=[np.r_[p, np.zeros(n)]], b_eq=[1], bounds=bounds)
        for p in P
    ]
    return [1 / solution.fun for solution in found]


CLOUDS = {
    "gaussian": normal(60, 4),
    "of all sizes": normal(60, 4) * torch.logspace(-2, 2, 60, dtype=torch.float64)[:, None],
    "clusters": normal(5, 4)[torch.arange(60) % 5] + 1e-3 * normal(60, 4, seed=1),
    "one apart": torch.cat([normal(59, 4) * torch.tensor([1.0, 1, 1, 0]), torch.eye(4, dtype=torch.float64)[3:]]),
}


@pytest.mark.parametrize("name", CLOUDS)
def test_sensitivities_bound_every_share(name: str) -> None:
    """Over 10,000 random directions, and over the worst one of each point; Lewis weights within √r of the truth.

    For x = Q⁻¹a_i, Q = AᵀW⁻¹A: |a_iᵀx| = w_i², and Σ|a_jᵀx| ≤ √r·‖x‖_Q = √r·w_i.
    """
    A = CLOUDS[name]
    of = layer(torch.eye(60, dtype=torch.float64), A)
    lewis, peeling = (
        Lowner(construction=kind).of_layers([of])[0].values[0]  # type: ignore[arg-type]
        for kind in ("lewis", "peeling")
    )
    values = (normal(10_000, 4, seed=3) @ A.T).abs()
    shares = (values / values.sum(1, keepdim=True)).amax(0)
    true = torch.tensor(true_sensitivities(A), dtype=torch.float64)
    assert (shares <= true * (1 + tolerances.LINEAR_PROGRAM)).all()
    assert (true <= lewis * (1 + tolerances.LINEAR_PROGRAM)).all()
    assert (lewis <= 2 * true * (1 + tolerances.LINEAR_PROGRAM)).all()  # √4
    assert (true <= peeling).all()


@pytest.mark.parametrize("name", CLOUDS)
def test_lewis_sensitivities_add_up_to_the_rank(name: str) -> None:
    of = layer(torch.eye(60, dtype=torch.float64), CLOUDS[name])
    [scores] = Lowner().of_layers([of])
    assert float(scores.values.sum()) == pytest.approx(4, rel=tolerances.LEWIS_FIXED)
    assert scores.terms == pytest.approx({"t": 4, "rank": 4}, rel=tolerances.LEWIS_FIXED)
    flat = layer(torch.eye(60, dtype=torch.float64), CLOUDS[name] @ normal(4, 2) @ normal(2, 9))
    assert float(Lowner().of_layers([flat])[0].values.sum()) == pytest.approx(2, rel=tolerances.LEWIS_FIXED)


def test_a_point_alone_in_its_direction_has_sensitivity_1() -> None:
    of = layer(torch.eye(60, dtype=torch.float64), CLOUDS["one apart"])
    assert float(Lowner().of_layers([of])[0].values[0, -1]) == pytest.approx(1, rel=tolerances.LEWIS_FIXED)


@pytest.mark.parametrize("points", ["outgoing", "incoming"])
@pytest.mark.parametrize("dead", [0, 2])
def test_independent_points_are_all_alike_and_the_note_says_so(points: Any, dead: int) -> None:
    incoming, W = normal(6, 9), normal(6, 8, seed=1)
    W[:dead] = 0
    [scores] = Lowner(points=points).of_layers([layer(incoming, W)])
    assert scores.values[0, dead:].tolist() == pytest.approx([1] * (6 - dead), rel=tolerances.LEWIS_FIXED)
    assert (scores.values[0, :dead] == 0).all()
    assert any("linearly independent" in note and "uniform" in note for note in scores.notes)
    assert scores.kept is None


def test_dependent_points_have_no_such_note() -> None:
    assert Lowner().of_layers([some_layer()])[0].notes == ()


def brute_peeling(A: Tensor) -> Tensor:
    """Round by round, with lists."""
    r = int(torch.linalg.matrix_rank(A))
    s, left, i = [0.0] * len(A), list(range(len(A))), 1
    while len(left) >= 2 * r * r:
        chosen = {left[k] for k in max_norm_coreset(A[left], "caratheodory").indices.tolist()}
        for k in chosen:
            s[k] = 2 * r * math.sqrt(r) / i
        left, i = [k for k in left if k not in chosen], i + 1
    for k in left:
        s[k] = 2 * r * math.sqrt(r) / i
    return torch.tensor(s, dtype=torch.float64)


@pytest.mark.parametrize(("n", "d"), [(50, 3), (40, 2), (20, 1)])
def test_peeling_is_as_published(n: int, d: int) -> None:
    A = normal(n, d) @ normal(d, d + 2, seed=1)
    s, rank = peeled(A)
    assert rank == d
    torch.testing.assert_close(s, brute_peeling(A), rtol=tolerances.EXACT, atol=0)
    assert len(s.unique()) > 2
    assert Lowner(construction="peeling").of_layers([layer(torch.eye(n, dtype=torch.float64), A)])[0].notes == ()


def test_peeling_few_points_is_uniform_and_the_note_says_so() -> None:
    """31 < 2·4²."""
    A = normal(31, 4)
    s, rank = peeled(A)
    assert (s == s[0]).all()
    [scores] = Lowner(construction="peeling").of_layers([layer(torch.eye(31, dtype=torch.float64), A)])
    assert any("fewer than 2r² = 32" in note and "uniform" in note for note in scores.notes)
    assert inclusion(scores.values, torch.tensor([10]))[0].tolist() == pytest.approx([10 / 31] * 31)
    assert rank == 4
    assert len(peeled(normal(32, 4))[0].unique()) > 1


@pytest.mark.parametrize("seed", range(3))
def test_no_invertible_map_of_the_points_changes_lewis_sensitivities(seed: int) -> None:
    """Of the outgoing weights, or of the inputs: both are only a choice of coordinates."""
    of = some_layer(n=25, d=3, M=3, seed=seed)
    [product] = of.products
    mixed = replace(of, products=(Product(product.weights @ normal(3, 3, seed=seed + 9), None),))
    moved = replace(of, incoming=of.incoming @ normal(4, 4, seed=seed + 9))
    for method, other in ((Lowner(), mixed), (Lowner(points="incoming"), moved)):
        one, two = (method.of_layers([view])[0] for view in (of, other))
        torch.testing.assert_close(one.values, two.values, rtol=tolerances.LEWIS_FIXED, atol=tolerances.LEWIS_FIXED)
    assert torch.equal(Lowner().of_layers([of])[0].kept, Lowner().of_layers([mixed])[0].kept)  # type: ignore[arg-type]


def test_incoming_points_are_weighted_by_each_output_and_the_worst_one_counts() -> None:
    of = some_layer(n=25, d=3, M=3)
    W = of.products[0].weights
    each = [lewis_weights(W[:, j, None].abs() * of.incoming) for j in range(3)]
    expected = torch.stack(each).amax(0)
    torch.testing.assert_close(
        Lowner(points="incoming").of_layers([of])[0].values[0],
        expected,
        rtol=tolerances.LEWIS_FIXED,
        atol=tolerances.LEWIS_FIXED,
    )


def test_two_consumers_are_one_cloud_of_longer_points() -> None:
    of = some_layer(n=25, M=4)
    W = of.products[0].weights
    split = replace(of, products=(Product(W[:, :1], None), Product(W[:, 1:], None)))
    for method in METHODS_OF_NEURONS.values():
        torch.testing.assert_close(
            method.of_layers([of])[0].values,
            method.of_layers([split])[0].values,
            rtol=tolerances.LEWIS_FIXED,
            atol=tolerances.LEWIS_FIXED,
        )


@pytest.mark.parametrize("method", METHODS_OF_NEURONS.values(), ids=METHODS_OF_NEURONS)
def test_a_neuron_that_goes_nowhere_has_no_sensitivity_and_all_of_them_no_error(method: Sampling) -> None:
    of = some_layer()
    for dead in (torch.arange(40) % 3 == 0, torch.ones(40, dtype=torch.bool)):
        W = of.products[0].weights.masked_fill(dead[:, None], 0)
        [scores] = method.of_layers([replace(of, products=(Product(W, of.products[0].inputs),))])
        assert scores.values.isfinite().all()
        if not isinstance(method, Uniform):
            assert (scores.values[0, dead] == 0).all()
            assert (scores.values[0, ~dead] > 0).all()


# Mussay


@pytest.mark.parametrize(
    ("activation", "phi"),
    [
        ("relu", lambda z: z),
        ("sigmoid", lambda z: 1 / (1 + math.exp(-z))),
        ("softplus", lambda z: math.log(1 + math.exp(z))),
        ("tanh", lambda z: z),
        ("relu6", lambda z: min(6, z)),
    ],
)
def test_mussay_by_hand(activation: str, phi: Callable[[float], float]) -> None:
    """s = max(|1|, |−2|)·φ(β·5), max(|−0.5|, |0.25|)·φ(β·13) for p = (3, 4) and (5, 12)."""
    of = layer(torch.tensor([[3.0, 4], [5, 12]]), torch.tensor([[1.0, -2], [-0.5, 0.25]]), activation)
    [scores] = Mussay(beta=0.3).of_layers([of])
    expected = [2 * phi(1.5), 0.5 * phi(3.9)]
    assert scores.values[0].tolist() == pytest.approx(expected, rel=1e-6)
    assert scores.terms == pytest.approx({"t": sum(expected), "beta": 0.3}, rel=1e-6)


@pytest.mark.parametrize("kind", [Mussay, Lowner])
@pytest.mark.parametrize("activation", ["relu", "leaky_relu", None])
def test_beta_cancels_where_the_activation_scales(kind: Any, activation: str | None) -> None:
    of, size = some_layer(activation=activation), torch.tensor([11])
    free = inclusion(kind().of_layers([replace(of, measure=lambda: None)])[0].values, size)
    for beta in (0.1, 7.0):
        given_ = inclusion(kind(beta=beta).of_layers([of])[0].values, size)
        torch.testing.assert_close(given_, free, rtol=tolerances.LEWIS_FIXED, atol=tolerances.LEWIS_FIXED)


def test_beta_matters_for_a_sigmoid() -> None:
    of, size = some_layer(activation="sigmoid"), torch.tensor([11])
    small, large = (inclusion(Mussay(beta=beta).of_layers([of])[0].values, size) for beta in (0.1, 5.0))
    assert float((small - large).abs().max()) > 0.02


@pytest.mark.parametrize("kind", [Mussay, Lowner])
@pytest.mark.parametrize("activation", ["sigmoid", "softplus", "hardsigmoid"])
def test_where_beta_is_needed_it_is_asked_for_or_measured(kind: Any, activation: str) -> None:
    of = some_layer(activation=activation)
    with pytest.raises(InvalidInput, match="give beta, or data"):
        kind().of_layers([replace(of, measure=lambda: None)])
    measured, given_ = kind().of_layers([of])[0], kind(beta=of.reach).of_layers([of])[0]
    assert torch.equal(measured.values, given_.values)
    assert [a.holds for a in measured.assumptions if "β" in a.text] == [True]


@pytest.mark.parametrize("kind", [Mussay, Lowner])
def test_a_given_beta_is_checked_against_the_data(kind: Any) -> None:
    of = some_layer()
    assert of.reach is not None
    for beta, reach, holds in (
        (of.reach * 1.01, of.reach, True),
        (of.reach / 1.01, of.reach, False),
        (1.0, None, None),
    ):
        [scores] = kind(beta=beta).of_layers([replace(of, measure=lambda reach=reach: reach)])
        assert [a.holds for a in scores.assumptions if "β" in a.text] == [holds]


@pytest.mark.parametrize("beta", [0.0, -1.0, math.inf, math.nan, "large"])
@pytest.mark.parametrize("name", ["mussay", "lowner"])
def test_beta_is_a_positive_number(name: str, beta: Any) -> None:
    with pytest.raises(InvalidTolerance, match="beta"):
        PRUNERS.make(name, {"beta": beta})


@pytest.mark.parametrize("activation", PHI)
def test_what_is_known_of_activations_is_so(activation: str | None) -> None:
    """Monotone, below |z|, and bounded over |z| ≤ ρ: on a grid, with torch's own functions."""
    z = torch.linspace(-12, 12, 24001, dtype=torch.float64)
    values = PHI[activation](z)
    if activation in MONOTONE:
        assert (values >= 0).all()
        assert (values.diff() >= 0).all()
    if below_identity(activation):
        assert (values.abs() <= z.abs() * (1 + tolerances.EXACT)).all()
    for radius in (1e-3, 0.5, 3.0, 12.0):
        bound = float(largest(activation, torch.tensor(radius, dtype=torch.float64)))
        assert float(values[z.abs() <= radius].abs().max()) <= bound + 1e-9


def test_mussay_s_assumption_is_of_the_activation() -> None:
    assert [a.holds for a in Mussay().of_layers([some_layer()])[0].assumptions] == [True]
    assert not Mussay().of_layers([some_layer(activation="leaky_relu")])[0].assumptions[0].holds
    assert not Lowner(points="incoming").of_layers([some_layer(activation="sigmoid")])[0].assumptions[0].holds


@pytest.mark.parametrize("kind", [Mussay, Lowner])
def test_of_an_unknown_activation_nothing_is_claimed(kind: Any) -> None:
    of = replace(some_layer(), activation="several: relu, tanh")
    with pytest.raises(InvalidInput, match="several: relu, tanh"):
        kind(beta=1.0).of_layers([of])


# Layers of a network


class Maps(nn.Module):
    """Convolution, norm, convolution, norm, flattened linear layer, norm, output: with and without biases."""

    def __init__(self, bias: bool = True, **norm: Any) -> None:
        super().__init__()
        self.a, self.na = nn.Conv2d(2, 6, 3, bias=bias, stride=2, padding=1), nn.BatchNorm2d(6, **norm)
        self.b, self.nb = nn.Conv2d(6, 5, 3, bias=bias, dilation=2, padding="same"), nn.BatchNorm2d(5, **norm)
        self.c, self.nc = nn.Linear(5 * 4, 7, bias=bias), nn.BatchNorm1d(7, **norm)
        self.d = nn.Linear(7, 3, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.na(self.a(x)))
        x = functional.max_pool2d(functional.relu(self.nb(self.b(x))), 2)
        return self.d(functional.relu(self.nc(self.c(x.flatten(1)))))


NORMS: dict[str, dict[str, Any]] = {
    "affine": {},
    "no bias": {"bias": False},
    "plain": {"affine": False},
    "eps": {"eps": 0.5},
}


def maps(name: str = "affine", seed: int = 0) -> tuple[nn.Module, Tensor]:
    """The model, with norms that do something, and images."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Maps(**NORMS[name]).double()
        for norm in (model.na, model.nb, model.nc):
            for key in ("weight", "bias", "running_mean", "running_var"):
                if getattr(norm, key) is not None:
                    nn.init.uniform_(getattr(norm, key), 0.5, 1.5)
    return model.eval(), normal(8, 2, 8, 8)


def views(model: nn.Module, x: Tensor | None) -> dict[str, View]:
    """As a run makes them, before anything is pruned."""
    request = Request.of(model, x, Guarantee(0.5), "mussay", Options(), None, 1)
    _, run = request.prepared(Run, lambda *_: None)
    sampler = Sampler(request.pruner, run, request.target, rng())
    return {name: sampler.neuron_view(link, {}) for name, link in run.links.items()}


def outputs_of(model: nn.Module, x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Inputs and outputs of each module, by hooks written here."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    hooks = [
        module.register_forward_hook(lambda _, args, out, name=name: seen.update({name: (args[0], out)}))
        for name, module in model.named_modules()
    ]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("case", NORMS)
def test_incoming_weights_are_those_of_layer_and_norm_together(case: str) -> None:
    """(patch, 1)·p is what the norm gives out, position by position."""
    model, x = maps(case)
    seen = outputs_of(model, x)
    for name, of in views(model, None).items():
        module, norm = model.get_submodule(name), f"n{name}"
        [X] = input_matrices(module, seen[name][0])
        X = X if module.bias is not None else with_one(X)
        Z = seen[norm][1] if seen[norm][1].ndim == 2 else seen[norm][1].movedim(1, 3).flatten(0, 2)
        torch.testing.assert_close(X @ of.incoming.T, Z, rtol=tolerances.EXACT, atol=tolerances.EXACT)


def test_products_are_what_the_consumers_compute() -> None:
    """Σ_i of the neurons' rows, at every position, is the consumer without its bias; and rows are those of neurons."""
    model, x = maps()
    seen = outputs_of(model, x)
    for (name, of), consumer in zip(views(model, x).items(), "bcd", strict=True):
        [product] = of.products
        assert product.inputs is not None
        module, Z = model.get_submodule(consumer), seen[consumer][1]
        Z = Z if Z.ndim == 2 else Z.movedim(1, 3).flatten(0, 2)
        torch.testing.assert_close(
            product.inputs @ product.weights + module.bias, Z, rtol=tolerances.EXACT, atol=tolerances.EXACT
        )
        weight = module.get_parameter("weight").detach()
        each = weight.reshape(len(weight), len(of.incoming), -1).movedim(0, 2)  # neuron, kernel position, output
        assert torch.equal(of.outgoing, each.flatten(1)), name
        assert torch.equal(of.loads, each.abs().sum(1)), name


def test_mussay_sums_over_kernel_positions_and_takes_the_largest_output() -> None:
    model, _ = maps()
    of = views(model, None)["a"]
    weight = model.get_submodule("b").get_parameter("weight").detach()
    loads = [max(float(weight[j, i].abs().sum()) for j in range(5)) for i in range(6)]
    expected = [load * float(p.norm()) for load, p in zip(loads, of.incoming, strict=True)]
    assert Mussay().of_layers([of])[0].values[0].tolist() == pytest.approx(expected, rel=tolerances.EXACT)


@pytest.mark.parametrize("name", sorted(METHODS_OF_NEURONS)[:4])
def test_no_filter_makes_up_more_than_its_sensitivity(name: str) -> None:
    """|f_i| ≤ s_i·F at every output of the next layer, its terms found by leaving all other filters out."""
    method = METHODS_OF_NEURONS[name]
    model, x = maps()
    seen = outputs_of(model, x)
    for (producer, of), consumer in zip(views(model, x).items(), "bcd", strict=True):
        s, [product] = method.of_layers([of])[0].values[0], of.products
        assert product.inputs is not None
        rows = product.inputs.reshape(len(product.inputs), len(s), -1)
        terms = torch.einsum("pnk,nkm->pnm", rows, product.weights.reshape(len(s), -1, product.weights.shape[1]))
        if isinstance(method, Lowner) and method.points == "incoming":
            # F = Σ_l |W_jl p_lᵀ(x, 1)| with the largest |p_lᵀ(x, 1)| of each pool, and its sum over the kernel.
            Z = seen[f"n{producer}"][1].abs()
            Z = functional.max_pool2d(Z, 2).flatten(1) if consumer == "c" else Z
            module = model.get_submodule(consumer)
            with torch.no_grad():
                F = input_matrices(module, Z)[0][:, :-1] @ product.weights.abs()
        else:
            assert of.reach is not None
            c = of.incoming.norm(dim=1) * of.reach
            F = (c @ of.loads)[None] if isinstance(method, Lowner) else torch.full((1, 1), of.reach)
        assert (terms.abs() <= s[:, None] * F[:, None] * (1 + tolerances.LEWIS_FIXED)).all(), producer


def test_promises_are_about_outputs_not_about_weights() -> None:
    """5 filters, 9 kernel positions each: a union over 5 outputs, not over 45 weights."""
    of = views(maps()[0], None)["a"]
    for method in (Mussay(), Lowner(), Lowner(points="incoming")):
        [scores] = method.of_layers([of])
        assert "each of 5 outputs" in scores.promise
    guarantee = Guarantee(0.5, 0.1)
    [scores] = Lowner().of_layers([replace(of, guarantee=guarantee)])
    assert scores.draws is not None
    assert torch.equal(scores.draws, bernstein(torch.tensor([scores.terms["t"]]), guarantee, 5))


@pytest.mark.parametrize("case", NORMS)
def test_reach_is_the_longest_input_with_its_one(case: str) -> None:
    model, x = maps(case)
    seen = outputs_of(model, x)
    patches = functional.unfold(x, 3, padding=1, stride=2).movedim(1, 2).reshape(-1, 18)
    assert views(model, x)["a"].reach == pytest.approx(math.sqrt(float(patches.square().sum(1).max()) + 1))
    flat = seen["c"][0]
    assert views(model, x)["c"].reach == pytest.approx(math.sqrt(float(flat.square().sum(1).max()) + 1))


def test_reach_is_not_lost_in_half_precision() -> None:
    """300² is more than float16 holds, and (3e-4)² less."""
    for size in (300.0, 3e-4):
        x = torch.full((2, 10), size, dtype=torch.float16)
        model = nn.Sequential(nn.Linear(10, 2, bias=False), nn.ReLU(), nn.Linear(2, 1)).half()
        found = views(model, x)["0"].reach
        assert found == pytest.approx(math.sqrt(10 * float(x[0, 0]) ** 2 + 1), rel=1e-6)


# Errors of products


def error_of(product: Product, f: Tensor) -> float:
    wrong, right = product.squared_errors(f)
    return math.sqrt(wrong / (right or 1.0))


def test_the_error_is_that_of_the_product() -> None:
    X, U = normal(30, 6), normal(6, 3, seed=2)
    f = torch.tensor([0.0, 2, 1, 0, 1.5, 1], dtype=torch.float64)[:, None]
    expected = float((X @ (f * U - U)).norm()) / float((X @ U).norm())
    assert error_of(Product(U, X), f) == pytest.approx(expected, rel=tolerances.EXACT)
    assert math.isnan(error_of(Product(U, None), f))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [1e3, 1e-4])
def test_the_error_is_not_computed_in_half_precision(dtype: torch.dtype, size: float) -> None:
    X, U = (size * normal(40, 6)).to(dtype), normal(6, 3, seed=1).to(dtype)
    f = torch.tensor([0.0, 2, 1, 0, 1.5, 1])[:, None]
    exact = error_of(Product(U.double(), X.double()), f)
    assert error_of(Product(U, X), f) == pytest.approx(exact, rel=1e-5)


def test_an_error_where_nothing_was_is_not_hidden() -> None:
    """Two neurons that cancel, one of which goes."""
    X = normal(30, 1).expand(-1, 2)
    assert error_of(Product(torch.tensor([[1.0], [-1.0]]).double(), X), torch.tensor([[1.0], [0.0]])) > 0


# Sizes


def test_counts_and_parts() -> None:
    assert [kept_of(value, 10) for value in (3, 30, 0.75, 0.99, 0.0)] == [3, 10, 2, 1, 10]


@given(
    st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=4), min_size=1, max_size=5),
    st.integers(0, 60),
)
def test_a_budget_is_used_up_and_never_exceeded(candidates: list[list[int]], more: int) -> None:
    """Groups and layers of so many items each: all of a budget, one a layer at least, that there are items for."""
    budget = len(candidates) + more
    layers = []
    for groups in candidates:
        s = (torch.arange(9) < torch.tensor(groups)[:, None]).double()
        layers.append(Sensitivities(s))
    sizes = Uniform().allocate(layers, budget)
    for size, groups in zip(sizes, candidates, strict=True):
        assert (size <= torch.tensor(groups).clamp(min=int(sum(groups) == 0))).all()
        assert int(size.sum()) >= 1
    items = sum(max(1, sum(groups)) for groups in candidates)
    assert sum(int(size.sum()) for size in sizes) == min(budget, items)


def test_layers_of_a_budget_keep_the_same_part() -> None:
    layers = [Sensitivities(torch.ones(1, n)) for n in (1000, 200, 10)]
    assert [int(size) for size in Uniform().allocate(layers, 121)] == [100, 20, 1]


def test_uniform_sampling_is_of_weights_that_are_not_0() -> None:
    view = View("layer", (Product(torch.tensor([[1.0, 0.0], [-3.0, 2.0]]), None),), None)
    assert Uniform("weights").sensitivities(view).values.tolist() == [[1, 0, 1, 1]]


@pytest.mark.parametrize("method", [Lowner(), Mussay()])
def test_methods_of_neurons_refuse_weights(method: Sampling) -> None:
    edges = View("fc", (Product(torch.ones(3, 2), None),), None)
    with pytest.raises(InvalidInput, match=r"chooses neurons.*'fc'"):
        method.of_layers([edges])


@pytest.mark.parametrize(
    ("method", "options", "error", "says"),
    [
        ("lownr", {}, UnknownSolver, "did you mean 'lowner'"),
        ("lowner", {"bta": 1.0}, UnknownOption, "did you mean 'beta'"),
        (Lowner(), {"bta": 1.0}, UnknownOption, "did you mean 'beta'"),
        ("lowner", {"construction": "mvee"}, InvalidInput, "construction: expected one of lewis, peeling"),
        ("lowner", {"points": "both"}, InvalidInput, "points: expected one of outgoing, incoming"),
        ("uniform", {"items": "filters"}, InvalidInput, "items: expected one of neurons, weights"),
        ("mussay", {"sampling": "best"}, InvalidInput, "sampling: expected one of fixed, draws, top"),
        ("pfp", {"sampling": ["top"]}, InvalidInput, "sampling: expected one of fixed, draws, top"),
        (3, {}, InvalidInput, "expected a name or a Pruner"),
        (Lowner, {}, InvalidInput, "expected a name or a Pruner"),
    ],
)
def test_names_and_options_that_are_not(
    method: Any, options: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        PRUNERS.make(method, options)[1].refuses(Guarantee(0.5), Options())
