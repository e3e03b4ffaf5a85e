"""Unbiased samples: inclusion probabilities as the definition has them, exact sizes, factors of mean 1."""

import math
from decimal import Decimal, localcontext
from typing import get_args

import numpy as np
import pytest
import tolerances
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from convexprune.pruners.draws import Scheme, draws_for, expected_distinct, inclusion, sample

SEEDS = 2000
SIGMAS = 4.5
"""Standard errors that a mean over the seeds may be away from its expectation: 7e-6 a comparison."""

sizes_of_items = st.lists(st.one_of(st.just(0.0), st.floats(-12, 12).map(lambda e: 10**e)), min_size=1, max_size=12)


def row(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float64)


def whole(*values: int) -> Tensor:
    return torch.tensor(values)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def ranges(groups: int, n: int, decades: float, seed: int = 0) -> Tensor:
    """[groups, n] numbers of 10^±decades, log-uniform."""
    g = torch.Generator().manual_seed(seed)
    return 10 ** (decades * (2 * torch.rand(groups, n, generator=g, dtype=torch.float64) - 1))


def bisected(s: list[float], size: int) -> list[float]:
    """π = min(1, c·s) with Σπ = size, c found by halving; 1 for every s > 0 where these are no more than size."""
    if sum(x > 0 for x in s) <= size:
        return [float(x > 0) for x in s]
    low, high = -30.0, 30.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(min(1.0, 10**middle * x) for x in s) < size else (low, middle)
    return [min(1.0, 10**low * x) if size else 0.0 for x in s]


def within(counts: Tensor, probabilities: Tensor, trials: int) -> bool:
    """Whether counts [n] of trials are as binomial ones of these probabilities are."""
    spread = (trials * probabilities * (1 - probabilities)).sqrt()
    return bool(((counts - trials * probabilities).abs() <= SIGMAS * spread + trials * tolerances.EXACT).all())


# Inclusion probabilities


@given(sizes_of_items, st.integers(0, 14))
def test_inclusion_is_the_definition(s: list[float], size: int) -> None:
    pi = inclusion(row(*s), whole(size))[0]
    assert pi.tolist() == pytest.approx(bisected(s, size), abs=tolerances.BISECTED)
    if sum(x > 0 for x in s) <= size:
        assert (pi == (torch.tensor(s) > 0)).all()  # exactly
    assert float(pi.sum()) == pytest.approx(min(size, sum(x > 0 for x in s)), abs=tolerances.EXACT * len(s))
    assert ((pi >= 0) & (pi <= 1)).all()
    assert (pi[torch.tensor(s) == 0] == 0).all()


@given(sizes_of_items, st.integers(0, 14))
def test_larger_sensitivities_are_no_less_likely_and_open_ones_in_proportion(s: list[float], size: int) -> None:
    values, pi = torch.tensor(s, dtype=torch.float64), inclusion(row(*s), whole(size))[0]
    order = values.argsort()
    assert (pi[order].diff() >= 0).all()
    open_ = (pi > 0) & (pi < 1)
    ratios = pi[open_] / values[open_]
    if len(ratios):
        assert float(ratios.max() / ratios.min()) == pytest.approx(1, rel=tolerances.EXACT)
        assert (
            values[pi == 1] * ratios.max() >= 1 - tolerances.EXACT
        ).all()  # no item is kept for certain without need


@given(sizes_of_items, st.integers(0, 14), st.floats(-100, 100))
def test_only_ratios_matter(s: list[float], size: int, decades: float) -> None:
    scaled = inclusion(row(*s) * 10**decades, whole(size))
    torch.testing.assert_close(scaled, inclusion(row(*s), whole(size)), rtol=tolerances.EXACT, atol=tolerances.EXACT)


def test_groups_do_not_see_each_other() -> None:
    s, sizes = ranges(500, 20, 12), torch.arange(500) % 23
    s[::7] = 0
    s[torch.rand(s.shape, generator=torch.Generator().manual_seed(1)) < 0.3] = 0
    together = inclusion(s, sizes)
    for i in range(0, 500, 9):
        assert torch.equal(together[i], inclusion(s[i : i + 1], sizes[i : i + 1])[0])
    torch.testing.assert_close(together.sum(1), torch.minimum(sizes, (s > 0).sum(1)).double(), rtol=0, atol=1e-10)


def test_by_hand() -> None:
    """5 + 3 + 1 + 1: two of them are 5/10·2 = 1 and 6/10, 2/10, 2/10; three are 1, 1 and a half each."""
    s = row(5, 1, 3, 1)
    assert inclusion(s, whole(2))[0].tolist() == pytest.approx([1, 0.2, 0.6, 0.2])
    assert inclusion(s, whole(3))[0].tolist() == pytest.approx([1, 0.5, 1, 0.5])
    assert inclusion(s, whole(1))[0].tolist() == pytest.approx([0.5, 0.1, 0.3, 0.1])


# Exactly so many


@pytest.mark.parametrize("decades", [0, 1, 12])
def test_fixed_keeps_exactly_the_size_whatever_the_range(decades: float) -> None:
    s, sizes = ranges(4000, 30, decades), torch.arange(4000) % 34
    found = sample(s, sizes, "fixed", rng())
    kept = found > 0
    assert torch.equal(kept.sum(1), sizes.clamp(max=30))
    pi = inclusion(s, sizes)
    assert kept[pi == 1].all()
    assert not kept[pi == 0].any()
    torch.testing.assert_close(found[kept] * pi[kept], torch.ones(int(kept.sum())).double())


def test_fixed_keeps_each_item_with_its_probability_over_seeds() -> None:
    s, size = row(8, 0, 1, 1, 2, 0.5, 0.01, 3, 1, 1), whole(4)
    pi = inclusion(s, size)[0]
    kept = torch.stack([sample(s, size, "fixed", rng(seed))[0] > 0 for seed in range(SEEDS)])
    assert (kept.sum(1) == 4).all()
    assert within(kept.sum(0), pi, SEEDS)
    assert (pi == 1).any()
    assert kept[:, pi == 1].all()
    assert not kept[:, 1].any()


def test_groups_of_one_call_are_as_independent_as_calls() -> None:
    """The same, with a group for each seed; and two groups keep the same item as often as chance has it."""
    s = row(8, 0, 1, 1, 2, 0.5, 0.01, 3, 1, 1)
    pi = inclusion(s, whole(4))[0]
    kept = sample(s.expand(SEEDS, -1), torch.full((SEEDS,), 4), "fixed", rng(1)) > 0
    assert within(kept.sum(0), pi, SEEDS)
    assert within((kept[::2] & kept[1::2]).sum(0), pi**2, SEEDS // 2)


def test_equal_items_are_a_simple_random_sample() -> None:
    """Every pair is kept with probability m(m − 1)/(n(n − 1)): the order of the items decides nothing."""
    n, m, trials = 6, 3, 20 * SEEDS
    kept = (sample(torch.ones(trials, n), torch.full((trials,), m), "fixed", rng()) > 0).double()
    pairs = (kept.T @ kept)[~torch.eye(n, dtype=torch.bool)]
    assert within(pairs, torch.full_like(pairs, m * (m - 1) / (n * (n - 1))), trials)


@pytest.mark.parametrize("scheme", ["fixed", "draws"])
def test_factors_have_mean_1(scheme: Scheme) -> None:
    s = ranges(1, 12, 1.5, seed=3)
    s[0, 4] = 0
    F = sample(s.expand(SEEDS, -1), torch.full((SEEDS,), 5), scheme, rng())
    error = F.std(0) / math.sqrt(SEEDS)
    live = s[0] > 0
    assert ((F.mean(0) - 1).abs() <= SIGMAS * error + tolerances.EXACT)[live].all()
    assert not F[:, ~live].any()


# Independent draws


def test_factors_of_draws_are_counts_over_their_expectations() -> None:
    s, sizes = ranges(200, 15, 2), torch.arange(200) * 3
    found = sample(s, sizes, "draws", rng())
    q = s / s.sum(1, keepdim=True)
    counts = found * q * sizes[:, None]
    torch.testing.assert_close(counts, counts.round(), rtol=0, atol=1e-9)
    assert torch.equal(counts.round().sum(1).long(), sizes)


def test_counts_of_draws_are_multinomial() -> None:
    s = row(5, 1, 0, 3, 1)
    counts = sample(s.expand(SEEDS, -1), torch.full((SEEDS,), 1), "draws", rng()) > 0
    assert (counts.sum(1) == 1).all()
    assert within(counts.sum(0), s[0] / 10, SEEDS)


@given(sizes_of_items, st.integers(1, 10**7))
def test_expected_distinct_is_one_minus_the_chance_of_never(s: list[float], draws: int) -> None:
    q = row(*s) / (sum(s) or 1.0)
    with localcontext(prec=50):
        expected = float(sum(1 - (1 - Decimal(p)) ** draws for p in q[0].tolist()))
    assert float(expected_distinct(q, whole(draws))[0]) == pytest.approx(expected, rel=tolerances.EXACT)
    assert float(expected_distinct(q, whole(0))[0]) == 0


def test_expected_distinct_is_what_samples_show() -> None:
    s = ranges(1, 20, 1)
    kept = (sample(s.expand(SEEDS, -1), torch.full((SEEDS,), 15), "draws", rng()) > 0).sum(1).double()
    expected = float(expected_distinct(s / s.sum(), whole(15))[0])
    assert abs(float(kept.mean()) - expected) <= SIGMAS * float(kept.std()) / math.sqrt(SEEDS)


@given(st.lists(st.floats(-3, 3).map(lambda e: 10**e), min_size=1, max_size=12), st.data())
def test_draws_for_is_the_least_number_that_is_enough(s: list[float], data: st.DataObject) -> None:
    values = row(*s)
    wanted = whole(data.draw(st.integers(0, len(s))))
    draws = draws_for(values, wanted)
    q = values / values.sum()
    assert float(expected_distinct(q, draws)) >= int(wanted) - 2e-9
    if int(draws) > 0:
        assert float(expected_distinct(q, draws - 1)) < int(wanted)
    assert int(draws) >= int(wanted)


@given(st.lists(st.floats(-3, 3).map(lambda e: 10**e), min_size=1, max_size=12), st.integers(1, 5))
def test_draws_for_undoes_expected_distinct(s: list[float], draws: int) -> None:
    values = row(*s)
    q = values / values.sum()
    distinct = expected_distinct(q, whole(draws))
    needed = draws_for(values, distinct)
    assert int(needed) <= draws
    assert float(expected_distinct(q, needed)) == pytest.approx(float(distinct), abs=2e-9)


def test_draws_for_more_than_there_are_is_the_most() -> None:
    assert draws_for(row(1, 2, 0), whole(3)).tolist() == [2**40]
    assert draws_for(row(1, 2, 0), whole(3), most=100).tolist() == [100]
    assert draws_for(row(0, 0), whole(0)).tolist() == [0]
    assert draws_for(row(1, 0), whole(1)).tolist() == [1]


# The largest


def test_top_is_the_largest_and_the_first_of_equals() -> None:
    found = sample(row(1, 3, 3, 0, 2, 3), whole(2), "top", rng())
    assert found[0].tolist() == [0, 1, 1, 0, 0, 0]
    assert sample(row(1, 3, 3, 0, 2, 3), whole(9), "top", rng())[0].tolist() == [1, 1, 1, 0, 1, 1]


@given(st.integers(0, 10**6))
def test_no_item_that_top_leaves_out_is_larger_than_one_it_keeps(seed: int) -> None:
    s, sizes = ranges(5, 9, 12, seed), torch.arange(5) * 2
    kept = sample(s, sizes, "top", rng()) > 0
    assert torch.equal(kept.sum(1), sizes)
    least = s.masked_fill(~kept, math.inf).amin(1)
    assert (s.masked_fill(kept, 0).amax(1) <= least).all()


# All ways


@pytest.mark.parametrize("scheme", get_args(Scheme))
def test_the_seed_decides(scheme: Scheme) -> None:
    s, sizes = ranges(3, 40, 1), whole(5, 10, 20)
    first, again, other = (sample(s, sizes, scheme, rng(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert torch.equal(first, other) == (scheme == "top")


@pytest.mark.parametrize("scheme", get_args(Scheme))
def test_groups_of_nothing_and_items_of_no_sensitivity_are_never_kept(scheme: Scheme) -> None:
    s = torch.zeros(3, 5, dtype=torch.float64)
    s[1, 3] = 1e-12
    found = sample(s, whole(2, 2, 0), scheme, rng())
    assert found.nonzero().tolist() == [[1, 3]]
    assert found[1, 3] == 1
    assert found.isfinite().all()


@pytest.mark.parametrize("scheme", get_args(Scheme))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_and_gradients_do_not_matter(scheme: Scheme, dtype: torch.dtype) -> None:
    s = ranges(2, 9, 1).to(dtype)
    before, learned = s.clone(), s.clone().requires_grad_()
    exact = sample(s.double(), whole(3, 4), scheme, rng())
    assert torch.equal(sample(learned, whole(3, 4), scheme, rng()), exact)
    assert not exact.requires_grad
    assert torch.equal(s, before)
