"""CoreNet, SiPP and PFP: shares as published, exact allocations, unbiased samples, a guarantee that holds."""

import math
from dataclasses import replace
from itertools import pairwise

import cvxpy as cp
import numpy as np
import pytest
import tolerances
import torch
from hypothesis import given
from hypothesis import strategies as st

from convexprune.pruners.corenet import CoreNet, Place
from convexprune.pruners.draws import choose, draws_for, expected_distinct, largest_scale, sample
from convexprune.pruners.pfp import PFP
from convexprune.pruners.sensitivities import cancellation, edge_sensitivities, neuron_sensitivities
from convexprune.pruners.sipp import SiPP, least_error_sizes, relative_error
from convexprune.pruners.views import Product, View, by_sign, spread
from convexprune.solvers.errors import InvalidInput, InvalidTolerance, ShapeMismatch
from convexprune.targets import Guarantee


def problem(seed=0, samples=5, N=6, M=3, patches=1, negative=False):
    """Weights with zeros, and inputs with zeros: of both signs if ``negative``; the last input is always 0."""
    rng = np.random.default_rng(seed)
    U = rng.standard_normal((N, M)) * (rng.random((N, M)) < 0.8)
    X = rng.standard_normal((samples * patches, N))
    X = X * (rng.random(X.shape) < 0.8) if negative else np.maximum(X, 0)
    X[:, -1] = 0
    return torch.from_numpy(U), torch.from_numpy(X)


def edges(U, X, name="layer", activation="relu", **of_product):
    return View(name, (Product(U, X, **of_product),), activation)


def neurons(n, *products):
    return View("layer", products, "relu", torch.ones(n, 2))


def brute_shares(U, X, patches, mean):
    """The definition, number by number: s [2M, N]."""
    N, M = U.shape
    s = np.zeros((2 * M, N))
    inputs = [np.maximum(X, 0), np.maximum(-X, 0)]
    for j in range(2 * M):
        w = np.maximum(U[:, j], 0) if j < M else np.maximum(-U[:, j - M], 0)
        for a in inputs:
            for first in range(0, len(a), patches):
                shares = np.zeros((patches, N))
                for p in range(patches):
                    z = sum(w[k] * a[first + p, k] for k in range(N))
                    for k in range(N):
                        shares[p, k] = w[k] * a[first + p, k] / z if z > 0 else 0.0
                s[j] = np.maximum(s[j], shares.mean(0) if mean else shares.max(0))
    return s


class TestSensitivities:
    @pytest.mark.parametrize("negative", [False, True])
    @pytest.mark.parametrize("mean", [False, True])
    @pytest.mark.parametrize("patches", [1, 4])
    def test_they_are_the_largest_shares(self, negative, mean, patches):
        for seed in range(5):
            U, X = problem(seed, patches=patches, negative=negative)
            s = edge_sensitivities(U, X, patches, mean)
            assert s.dtype == torch.float64
            assert torch.allclose(
                s, torch.from_numpy(brute_shares(U.numpy(), X.numpy(), patches, mean)), atol=tolerances.EXACT
            )

    @pytest.mark.parametrize("mean", [False, True])
    def test_blocks_of_rows_change_nothing(self, mean, monkeypatch):
        U, X = problem(samples=40, patches=3, negative=True)
        whole = edge_sensitivities(U, X, 3, mean), neuron_sensitivities(U, X, 3, "sum"), cancellation(U, X)
        monkeypatch.setattr("convexprune.solvers.arrays._BLOCK_ENTRIES", 400)
        parts = edge_sensitivities(U, X, 3, mean), neuron_sensitivities(U, X, 3, "sum"), cancellation(U, X)
        assert torch.allclose(whole[0], parts[0], atol=tolerances.EXACT)
        assert torch.allclose(whole[1], parts[1], atol=tolerances.EXACT)
        assert whole[2] == pytest.approx(parts[2])

    @given(st.integers(0, 10**6), st.booleans())
    def test_the_shares_of_a_live_output_add_up_to_1_at_least_and_n_at_most(self, seed, negative):
        U, X = problem(seed, negative=negative)
        s, W = edge_sensitivities(U, X), by_sign(U)
        live = ((X.clamp(min=0) @ W.T > 0) | ((-X).clamp(min=0) @ W.T > 0)).any(0)
        assert (s.sum(1)[live] >= 1 - tolerances.EXACT).all()
        assert (s.sum(1) <= (W > 0).sum(1)).all()
        assert (s.sum(1)[~live] == 0).all()

    @given(st.integers(0, 10**6), st.sampled_from([1e-30, 3.0, 1e20]))
    def test_no_scale_of_an_input_or_of_an_output_changes_them(self, seed, scale):
        U, X = problem(seed, negative=True)
        rows = scale ** torch.linspace(-1, 1, len(X), dtype=X.dtype)[:, None]
        outputs = scale ** torch.linspace(1, -1, U.shape[1], dtype=U.dtype)
        assert torch.allclose(
            edge_sensitivities(U * outputs, X * rows), edge_sensitivities(U, X), atol=tolerances.EXACT
        )

    def test_permutations_of_samples_inputs_and_outputs(self):
        U, X = problem(negative=True)
        rows, k, j = (torch.randperm(size, generator=torch.manual_seed(1)) for size in (len(X), *U.shape))
        s = edge_sensitivities(U, X)
        both = torch.cat([j, j + len(j)])
        assert torch.allclose(edge_sensitivities(U[k][:, j], X[rows][:, k]), s[both][:, k], atol=tolerances.EXACT)

    def test_a_dead_input_has_none(self):
        U, X = problem()
        assert (edge_sensitivities(U, X)[:, -1] == 0).all()
        assert neuron_sensitivities(U, X, 6, "sum")[-1] == 0

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_lower_precision_is_converted_not_computed_with(self, dtype):
        U, X = (value.to(dtype) for value in problem(negative=True))
        assert torch.equal(edge_sensitivities(U, X), edge_sensitivities(U.double(), X.double()))

    @pytest.mark.parametrize("share", ["largest", "sum"])
    def test_a_neuron_has_the_largest_share_of_its_weights_or_that_of_their_sum(self, share):
        U, X = problem(3, negative=True)
        expected = torch.zeros(3, dtype=torch.float64)
        for a in (X.clamp(min=0), (-X).clamp(min=0)):
            for w in by_sign(U):
                terms, z = a * w, (a @ w)[:, None]
                shares = torch.where(z > 0, terms / z, 0.0).reshape(-1, 3, 2)
                shares = shares.amax(2) if share == "largest" else shares.sum(2)
                expected = torch.maximum(expected, shares.amax(0))
        assert torch.allclose(neuron_sensitivities(U, X, 3, share), expected, atol=tolerances.EXACT)

    def test_cancellation_by_hand(self):
        U = torch.tensor([[1.0, 1.0], [-1.0, 1.0]])
        X = torch.tensor([[3.0, 1.0], [1.0, 1.0], [0.0, 0.0], [1.0, 3.0]])
        # first output: 4/2, undefined, nothing, 4/2; second: always 1
        assert cancellation(U, X) == (2.0, 1)

    def test_what_does_not_fit_is_refused(self):
        U, X = problem()
        for call in (
            lambda: edge_sensitivities(U[1:], X),
            lambda: edge_sensitivities(U, X[:0]),
            lambda: edge_sensitivities(U, X, patches=2),
            lambda: neuron_sensitivities(U, X, 4, "sum"),
            lambda: cancellation(U, X[0]),
        ):
            with pytest.raises(ShapeMismatch):
                call()


METHODS = {
    "corenet": lambda sampling: CoreNet(sampling=sampling),
    "sipp": lambda sampling: SiPP("random", sampling=sampling),
    "pfp": lambda sampling: PFP(sampling=sampling),
}


class TestUnbiased:
    @pytest.mark.parametrize("sampling", ["fixed", "draws"])
    @pytest.mark.parametrize("name", METHODS)
    def test_outputs_of_reweighted_layers_are_right_on_average(self, name, sampling):
        """2,000 seeds in one call: each group of items once for each seed. Four standard errors of each output."""
        seeds, method = 2000, METHODS[name](sampling)
        U, X = problem(1, samples=4, N=12, M=3)
        layer = edges(U, X) if method.items == "weights" else neurons(12, Product(U, X))
        scores = method.sensitivities(layer)
        [sizes] = method.allocate([scores], int(scores.candidates.sum()) // 2)
        s = scores.values
        asked = draws_for(s, sizes) if sampling == "draws" else sizes
        found = sample(s.repeat(seeds, 1), asked.repeat(seeds), sampling, np.random.default_rng(0))
        factors = found.reshape(seeds, *s.shape)
        outputs = torch.stack([X @ (spread(f, U) * U) for f in factors])
        deviation = outputs.std(0) / math.sqrt(seeds)
        assert (deviation > 0).any()
        assert ((outputs.mean(0) - X @ U).abs() <= 4 * deviation + tolerances.EXACT).all()


class TestCoreNet:
    def test_the_formulas_by_hand(self):
        place = Place(neurons=410, widest=300, layers=3, ratios=(2.0, 3.0))
        K, delta, S = math.log(410 * 300), 0.1, torch.tensor([2.0, 0.0], dtype=torch.float64)
        log = math.log(8 * 410 * 300 / delta)
        kappa = math.sqrt(K) * (1 + math.sqrt(K) * log)
        eps = 0.5 / (2 * 3 * (3 + kappa))
        assert place.spread == K
        assert place.samples(delta) == math.ceil(log * K)
        assert place.kappa(delta) == pytest.approx(kappa)
        assert place.onwards(delta) == pytest.approx((2 + kappa) * (3 + kappa))
        expected = 8 * 2 * K * math.log(8 * 410 / delta) / eps**2
        draws = replace(place, ratios=(3.0,)).draws(S, Guarantee(0.5, delta))
        assert draws[0] == pytest.approx(expected, rel=1e-9)  # rounded up, of 1e10
        assert draws[1] == 0

    def test_draws_that_no_integer_holds_are_cut(self):
        place = Place(10, 10, 200, (1e5,) * 200)
        assert place.draws(torch.tensor([1.0, 0.0], dtype=torch.float64), Guarantee(0.1, 0.1)).tolist() == [2**40, 0]

    def test_a_network_tells_its_layers_what_comes_behind_and_groups_are_one_layer(self):
        method = CoreNet(delta=0.1)
        (U, X), (V, Y) = problem(1, M=3), problem(2, M=2)
        guarantee = Guarantee(0.3, 0.2)
        layers = [edges(U, X, "1"), edges(U, Y, "2"), edges(V, Y, "2")]
        found = method.of_layers([replace(layer, guarantee=guarantee) for layer in layers])
        ratios = [cancellation(*pair)[0] for pair in ((U, X), (U, Y), (V, Y))]
        last = Place(8, 5, 2, (max(ratios[1:]),))
        first = Place(8, 5, 2, (ratios[0], *last.ratios))
        for scores, place in zip(found, (first, last, last), strict=True):
            assert torch.equal(scores.draws, place.draws(scores.values.sum(1), guarantee))
            assert scores.terms["Delta_onwards"] == pytest.approx(place.onwards(0.1))
        alone = method.sensitivities(replace(layers[0], guarantee=guarantee))
        assert torch.equal(alone.values, found[0].values)
        assert torch.equal(alone.draws, Place(3, 3, 1, (ratios[0],)).draws(alone.shares, guarantee))

    def test_assumptions_are_looked_at(self):
        U, X = problem(samples=300)
        found = CoreNet().sensitivities(edges(U, X)).assumptions
        assert [a.holds for a in found] == [True, True, True, True, True, True, None]
        U, X = torch.tensor([[1.0], [-1.0]]), torch.tensor([[1.0, 1.0], [-1.0, 2.0]])
        found = CoreNet().sensitivities(replace(edges(U, X, activation="tanh", positions=2), biased=True)).assumptions
        assert [a.holds for a in found] == [False, False, False, False, False, False, None]
        assert "1 exceptions in 2 outputs" in found[4].text

    def test_a_bias_anywhere_is_one_of_the_network(self):
        layers = [edges(*problem(), "1"), replace(edges(*problem(), "2"), biased=True)]
        for scores in CoreNet().of_layers(layers):
            assert [a.holds for a in scores.assumptions if "bias" in a.text] == [False]

    def test_the_guarantee_holds_on_a_layer_where_the_draws_can_be_made(self):
        """Positive weights with one reachable eps: each output within 1 ± eps in all but delta of 200 samples."""
        rng = np.random.default_rng(0)
        U, X = torch.from_numpy(rng.random((20, 2))), torch.from_numpy(rng.random((50, 20)))
        guarantee = Guarantee(0.5, 0.2)
        scores = CoreNet().sensitivities(replace(edges(U, X), guarantee=guarantee))
        draws = scores.draws
        assert draws.max() < 2**31
        assert (draws[:2] > 0).all()
        right, failures = X @ U, 0
        for _ in range(200):
            factors = sample(scores.values, draws, "draws", rng)
            failures += bool(((X @ (spread(factors, U) * U) / right - 1).abs() > guarantee.eps).any())
        assert failures <= guarantee.delta * 200

    def test_the_error_of_a_part_falls_as_the_draws_say(self):
        """With the m of ε_ℓ = ε but the constant 2 of Bernstein's inequality, on the sample itself (no K, no Δ̂)."""
        rng = np.random.default_rng(1)
        U, X = torch.from_numpy(rng.standard_normal((30, 1))), torch.from_numpy(rng.random((20, 30)))
        s, W = edge_sensitivities(U, X), by_sign(U)
        eps, delta, right = 0.3, 0.1, X @ W.T
        m = (2 * s.sum(1) * (1 + 2 * eps / 3) / eps**2 * math.log(2 * right.numel() / delta)).ceil()
        found = sample(s.repeat(300, 1), m.repeat(300), "draws", rng).reshape(300, *s.shape)
        worst = ((torch.einsum("pk,rgk->rpg", X, found * W) / right) - 1).abs().amax((1, 2))
        assert (worst > eps).double().mean() <= delta
        assert worst.mean() > eps / 10  # and not because so many were drawn that nothing could go wrong

    def test_a_budget_is_shared_by_the_sums_of_sensitivities(self):
        U, X = problem(N=40, samples=30)
        scores = CoreNet().sensitivities(edges(U, X))
        [sizes] = CoreNet().allocate([scores], 20)
        share = scores.shares / scores.shares.sum()
        assert sizes.sum() == 20
        assert ((sizes - 20 * share).abs() <= 1).all()


class TestSiPP:
    @given(st.integers(0, 10**6), st.floats(-20, 20))
    def test_sizes_satisfy_the_optimality_conditions(self, seed, power):
        """c·ε'(x) = −1/scale inside; at the limit the error would still fall faster. x tells ε, and ε tells x."""
        rng = np.random.default_rng(seed)
        alpha, weights = (torch.from_numpy(10 ** rng.uniform(-3, 3, 8)) for _ in range(2))
        most, scale = torch.from_numpy(rng.integers(1, 1000, 8)).double(), 10.0**power
        x = least_error_sizes(alpha, weights, most, scale).requires_grad_()
        eps = relative_error(alpha, x)
        [slope] = torch.autograd.grad((weights * eps).sum(), x)
        limited = x.detach() >= most
        assert ((x > 0) & (x <= most)).all()
        assert torch.allclose(alpha * (3 + 2 * eps) / (6 * eps**2), x, rtol=1e-9)
        assert torch.allclose(slope[~limited], torch.tensor(-1 / scale, dtype=slope.dtype), rtol=1e-9)
        assert (slope[limited] <= -1 / scale * (1 - 1e-9)).all()

    @pytest.mark.parametrize("seed", range(3))
    @pytest.mark.parametrize("part", [0.1, 0.6])
    def test_they_are_the_solution_of_the_published_program(self, seed, part):
        rng = np.random.default_rng(seed)
        alpha, weights = rng.uniform(1, 300, 7), 1 / rng.integers(2, 40, 7)
        most = rng.integers(1, 60, 7).astype(float)
        budget = part * most.sum()
        x = cp.Variable(7)
        rooted = cp.multiply(np.sqrt(2 * alpha), cp.inv_pos(cp.sqrt(x)))
        straight = cp.multiply(alpha / 3, cp.inv_pos(x))
        error = (cp.norm(cp.vstack([straight, rooted]), axis=0) + straight) / 2
        cp.Problem(cp.Minimize(weights @ error), [x >= 0, x <= most, cp.sum(x) <= budget]).solve("CLARABEL")
        parts = [torch.from_numpy(value) for value in (alpha, weights, most)]
        scale = largest_scale(lambda scale: float(least_error_sizes(*parts, scale).sum()) <= budget)
        mine = least_error_sizes(*parts, scale)
        assert float(mine.sum()) == pytest.approx(budget, rel=1e-9)
        assert np.abs(mine.numpy() - x.value).max() <= tolerances.ALLOCATION * most.max()

    def test_no_budget_is_nothing_to_keep(self):
        parts = [torch.tensor(values, dtype=torch.float64) for values in ([300.0, 0.0], [0.5, 0.1], [7.0, 3.0])]
        for scale in (1e-200, 1e-300, 0.0):
            assert least_error_sizes(*parts, scale) == pytest.approx([0, 0], abs=1e-30)

    def test_allocation_spends_the_budget_and_never_more_than_there_is(self):
        method = SiPP()
        layers = [method.sensitivities(edges(*problem(seed, N=30, samples=9))) for seed in range(3)]
        most = sum(int(scores.candidates.sum()) for scores in layers)
        before = [torch.zeros(6, dtype=torch.int64)] * 3
        for budget in (10, 40, most // 2, most - 1, most, 10 * most):
            sizes = method.allocate(layers, budget)
            assert all((size <= scores.candidates).all() for size, scores in zip(sizes, layers, strict=True))
            assert sum(int(size.sum()) for size in sizes) == pytest.approx(min(budget, most), abs=2)
            assert all((size >= old - 1).all() for size, old in zip(sizes, before, strict=True))  # up to rounding
            before = sizes
        assert all(torch.equal(size, scores.candidates) for size, scores in zip(before, layers, strict=True))

    def test_a_wide_layers_groups_weigh_less(self):
        """1/η^ℓ: twice the same outputs, in one layer and half of them in another."""
        U, X = problem(N=30, samples=9)
        layers = [SiPP().sensitivities(edges(U, X)), SiPP().sensitivities(edges(torch.cat([U, U], 1), X))]
        narrow, wide = SiPP().allocate(layers, 90)
        assert narrow.double().mean() > wide.double().mean()

    def test_draws_are_those_whose_error_is_eps(self):
        U, X = problem(samples=20, patches=4, N=18)
        view = replace(edges(U, X, positions=4, kernel=9), guarantee=Guarantee(0.2, 0.05))
        scores = SiPP().sensitivities(view)
        alpha = 6 * scores.values.sum(1) * math.log(8 * 5 * 9 / 0.05)
        draws = scores.draws
        assert torch.equal(draws, (alpha * (3 + 0.4) / 0.24).ceil().to(torch.int64))
        assert (relative_error(alpha, draws.double()) <= 0.2).all()
        assert (relative_error(alpha, draws.double() - 1) > 0.2).all()
        assert torch.allclose(scores.shares, alpha * math.log(360 / 1e-16) / math.log(360 / 0.05))

    def test_the_deterministic_variant_keeps_the_largest_of_all(self):
        method = SiPP("deterministic")
        layers = [
            method.sensitivities(edges(*problem(seed, N=20, samples=9, patches=2), positions=2)) for seed in range(3)
        ]
        flat = torch.cat([scores.values.flatten() for scores in layers])
        assert method.sampling == "top"
        for k in (1, 17, 60):
            sizes = method.allocate(layers, k)
            kept = [
                sample(scores.values, size, "top", np.random.default_rng(0))
                for scores, size in zip(layers, sizes, strict=True)
            ]
            threshold = flat.sort(descending=True).values[k - 1]
            assert torch.equal(torch.cat([F.flatten() for F in kept]), (flat >= threshold).double())
        with pytest.raises(InvalidInput, match="proves nothing"):
            choose(layers[0], Guarantee(0.1, 0.1), "draws", np.random.default_rng(0))

    def test_the_deterministic_variant_takes_means_over_positions(self):
        U, X = problem(samples=6, patches=5)
        layer = edges(U, X, positions=5)
        assert torch.equal(SiPP("deterministic").sensitivities(layer).values, edge_sensitivities(U, X, 5, True))
        assert torch.equal(SiPP("hybrid").sensitivities(layer).values, edge_sensitivities(U, X))

    def test_the_hybrid_keeps_the_largest_where_little_is_left(self):
        U, X = problem(N=30, samples=9)
        scores = SiPP("hybrid").sensitivities(edges(U, X))
        s, alpha = scores.values, scores.shares
        for budget in (5, 25, 60):
            [sizes] = SiPP("hybrid").allocate([scores], budget)
            expected = [
                float(relative_error(a, x.double())) >= 3 * float(row.sort(descending=True).values[int(x) :].sum())
                for a, x, row in zip(alpha, sizes, s, strict=True)
            ]
            assert scores.top(sizes).tolist() == expected
        assert scores.top(scores.candidates).all()
        assert SiPP().sensitivities(edges(U, X)).top is None


class TestPFP:
    def test_the_draws_by_hand(self):
        U, X = problem(samples=20, patches=4, N=18)
        view = replace(neurons(2, Product(U, X, positions=4, kernel=9)), guarantee=Guarantee(0.2, 0.05))
        scores = PFP().sensitivities(view)
        S = float(scores.values.sum())
        tilde = 6 * S * math.log(8 * 5 * 9 / 0.05)
        assert scores.draws.tolist() == [math.ceil(3 * 6.4 * tilde / 0.04)]
        assert float(scores.shares) == pytest.approx(6 * S * math.log(8 * 5 * 9 / 1e-16))

    @pytest.mark.parametrize("share", ["sum", "largest"])
    def test_several_consumers_and_a_flattened_map(self, share):
        (U, X), (V, Y) = problem(1), problem(2, N=24)
        scores = PFP(share=share).sensitivities(neurons(6, Product(U, X), Product(V, Y)))
        expected = torch.maximum(neuron_sensitivities(U, X, 6, share), neuron_sensitivities(V, Y, 6, share))
        assert torch.equal(scores.values, expected[None])
        assert scores.assumptions[1].holds is (share == "sum")

    def test_permuted_neurons_have_permuted_scores_and_scales_change_none(self):
        U, X = problem(4, N=24, M=5)
        order = torch.randperm(12, generator=torch.manual_seed(0))
        rows = (2 * order[:, None] + torch.arange(2)).flatten()
        s = PFP().sensitivities(neurons(12, Product(U, X))).values
        assert torch.allclose(PFP().sensitivities(neurons(12, Product(U[rows], X[:, rows]))).values, s[:, order])
        assert torch.allclose(PFP().sensitivities(neurons(12, Product(7 * U, X / 3))).values, s)

    def test_a_budget_buys_what_draws_of_one_eps_find(self):
        layers = [PFP().sensitivities(neurons(20, Product(*problem(seed, N=20, M=4)))) for seed in range(3)]
        before = 0
        for budget in (6, 20, 40, 1000):
            sizes = PFP().allocate(layers, budget)
            total = sum(int(size) for size in sizes)
            scale = largest_scale(lambda scale, most=total: self.found(layers, scale).sum() <= most)
            assert before <= total <= budget
            assert (torch.cat(sizes) - self.found(layers, scale)).abs().max() <= 1
            before = total
        assert sizes == [scores.candidates for scores in layers]

    @staticmethod
    def found(layers, scale):
        q = [scores.values / scores.values.sum() for scores in layers]
        return torch.cat([expected_distinct(p, scale * s.shares) for p, s in zip(q, layers, strict=True)])

    def test_top_keeps_the_largest(self):
        U, X = problem(N=10, M=4)
        scores = PFP(sampling="top").sensitivities(neurons(10, Product(U, X)))
        [size] = PFP().allocate([scores], 4)
        factors = sample(scores.values, size, "top", np.random.default_rng(0))[0]
        s = scores.values[0]
        assert set(factors.tolist()) == {0.0, 1.0}
        assert s[factors > 0].min() >= s[factors == 0].max()
        assert (factors > 0).sum() == 4

    def test_fixed_keeps_for_certain_what_is_all_but_sure_to_be_drawn(self):
        s = torch.tensor([[8.0, 4.0, 0.1, 0.1, 0.1, 0.1]], dtype=torch.float64)
        found = sample(s, torch.tensor([4]), "fixed", np.random.default_rng(0))
        assert (found[0, :2] == 1).all()
        assert (found[0, 2:] > 0).sum() == 2


@pytest.mark.parametrize("method", [CoreNet(), SiPP(), SiPP("hybrid"), SiPP("deterministic"), PFP()], ids=str)
class TestEveryMethod:
    def layer(self, method, X):
        U = problem(samples=400, N=12, M=2)[0]
        return edges(U, X) if method.items == "weights" else neurons(12, Product(U, X))

    def test_it_needs_inputs_and_its_own_kind_of_item(self, method):
        X = problem(N=12)[1]
        other = neurons(12, Product(X.T, X)) if method.items == "weights" else edges(X.T, X)
        with pytest.raises(InvalidInput, match="give calibration data"):
            method.sensitivities(self.layer(method, None))
        with pytest.raises(InvalidInput, match="was given"):
            method.sensitivities(other)

    def test_a_dead_layer_keeps_its_place(self, method):
        """All inputs 0: no sensitivities, no draws, no division by zero."""
        view = replace(self.layer(method, torch.zeros(7, 12)), guarantee=Guarantee(0.5, 0.1))
        scores = method.sensitivities(view)
        assert not scores.values.any()
        assert scores.values.isfinite().all()
        assert all(math.isfinite(value) for value in scores.terms.values())
        if method.sampling != "top":
            assert not scores.draws.any()

    def test_more_is_asked_for_more(self, method):
        view = self.layer(method, problem(samples=400, N=12)[1])
        if method.sampling == "top":
            return
        guarantees = [Guarantee(*pair) for pair in ((0.5, 0.1), (0.25, 0.1), (0.25, 0.01))]
        asked = [method.sensitivities(replace(view, guarantee=each)).draws for each in guarantees]
        assert all((more > less)[less > 0].all() for less, more in pairwise(asked))
        assert all(draws.dtype == torch.int64 for draws in asked)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: CoreNet(delta=1.0), InvalidTolerance, "delta"),
        (lambda: SiPP(delta=0.0), InvalidTolerance, "delta"),
        (lambda: PFP(delta=-1.0), InvalidTolerance, "delta"),
        (lambda: SiPP("best"), InvalidInput, "variant"),
        (lambda: SiPP("random", sampling="top"), InvalidInput, "deterministic"),
        (lambda: SiPP("hybrid", sampling="top"), InvalidInput, "deterministic"),
        (lambda: PFP(share="mean"), InvalidInput, "share"),
    ],
)
def test_options_are_checked(call, error, words):
    with pytest.raises(error, match=words):
        call()
