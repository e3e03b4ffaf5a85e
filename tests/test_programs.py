"""Fits and the program: proxes, conjugates, what is additive, the reference formulation, and everything refused."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tolerances import EXACT, REFERENCE, ROUNDING, TIGHT
from torch import Tensor
from zoo import FITS, SMALL, build, gaussian, tight

from convexprune.solvers import L1, Ball, LayerProgram, NetTrimSet, ReluBall, arrays, certify, solve
from convexprune.solvers.errors import (
    ConvexPruneError,
    EmptyInput,
    InvalidInput,
    InvalidTolerance,
    NonFinite,
    ShapeMismatch,
)
from convexprune.solvers.programs import NetTrimLoss, ReluLoss, SquaredLoss
from convexprune.solvers.programs.fits import Fit
from convexprune.solvers.programs.penalties import Penalty

SEEDS = st.integers(0, 10_000)
SIZES = st.sampled_from([0.0, 0.1, 1.0, 5.0, 50.0])
RHO = st.sampled_from([1e-3, 0.7, 1.0, 40.0])
GEOMETRIES = ["linear", "relu", "net-trim", "net-trim with ceilings"]
SETS = [f"{geometry}, {ball}" for geometry in GEOMETRIES for ball in ("one ball", "a ball a neuron")]
LOSSES = [f"{geometry}, loss" for geometry in GEOMETRIES]
KINDS = SETS + LOSSES
P, N, M = 7, 4, 3


def some_fit(kind: str, seed: int, size: float) -> Any:
    """Targets of which about half are inactive in front of a ReLU; ``size`` is eps, or the weight of a loss."""
    geometry, measure = kind.split(", ")
    Y = gaussian(seed, P, M)
    Y = Y if geometry == "linear" else Y.clamp(min=0)
    arguments = [gaussian(seed + 1, P, M)] if "ceilings" in kind else []
    if measure == "loss":
        losses: dict[str, Any] = {"linear": SquaredLoss, "relu": ReluLoss}
        return losses.get(geometry, NetTrimLoss)(Y, size or 0.01, *arguments)
    sets: dict[str, Any] = {"linear": Ball, "relu": ReluBall}
    eps = size if measure == "one ball" else size * gaussian(seed + 5, M).clamp(min=0)  # about half of them 0
    return sets.get(geometry, NetTrimSet)(Y, eps, *arguments)


def geometry(kind: str, fit: Any, Z: Tensor) -> tuple[Tensor, Tensor]:
    """(h, e) of the outputs, as docs/program.md defines them."""
    on, zero = fit.Y > 0, torch.zeros_like(Z)
    if "linear" in kind:
        return Z - fit.Y, zero
    if "relu" in kind:
        return torch.where(on, Z - fit.Y, Z.clamp(min=0)), zero
    return torch.where(on, Z - fit.Y, 0.0), torch.where(on, zero, (Z - fit.V).clamp(min=0))


def step(kind: str, fit: Any, direction: Tensor) -> Tensor:
    """The vector that maximises ⟨direction, h⟩ − m(h) over h: as far as the measure lets one go."""
    if "loss" in kind:
        return direction / fit.weight
    length = direction.norm() if "one ball" in kind else direction.norm(dim=0)
    return fit.eps * direction / length.clamp(min=1e-300)


def member(kind: str, fit: Any, seed: int) -> Tensor:
    """A random point of the domain, by its definition: h no longer than allowed, anything below one-sided entries."""
    draw = gaussian(seed + 2, P, M)
    h = float(torch.rand(1, generator=torch.Generator().manual_seed(seed))) * step(kind, fit, draw)
    on = torch.ones_like(draw, dtype=torch.bool) if "linear" in kind else fit.Y > 0
    below = fit.anchor - (draw > 0) * draw.abs()
    if "net-trim" in kind:
        return torch.where(on, fit.Y + h, below)
    return torch.where(on, fit.Y + h, below + h)


def distance(fit: Any, Z: Tensor) -> float:
    return float(fit.distance(fit.sums(Z)))


def value(fit: Any, Z: Tensor) -> float:
    return float(fit.value(fit.sums(Z)))


def inner(A: Tensor, B: Tensor) -> float:
    return float((A * B).sum())


def conjugate(fit: Any, L: Tensor) -> float:
    """f*(Λ)."""
    return -float(fit.dual_value(fit.dual_terms(L), torch.ones(M, dtype=torch.float64)))


# Values and proxes


@pytest.mark.parametrize("kind", KINDS)
@given(seed=SEEDS, size=SIZES, far=st.sampled_from([0.1, 1.0, 10.0]))
def test_value_and_distance_by_their_definitions(kind: str, seed: int, size: float, far: float) -> None:
    fit, Z = some_fit(kind, seed, size), far * gaussian(seed + 3, P, M)
    h, e = geometry(kind, fit, Z)
    lengths, outside = h.norm(dim=0), torch.zeros(())
    if "one ball" in kind:
        outside = (h.norm() - fit.eps).clamp(min=0)
    elif "neuron" in kind:
        outside = (lengths - fit.eps).clamp(min=0).norm()
    else:
        assert value(fit, Z) == pytest.approx(0.5 * fit.weight * float((h**2).sum()), rel=ROUNDING)
    assert distance(fit, Z) == pytest.approx(math.hypot(float(outside), float(e.norm())), rel=ROUNDING, abs=EXACT)
    assert "loss" in kind or value(fit, Z) == 0
    assert distance(fit, member(kind, fit, seed)) <= EXACT * P * M * max(1.0, size)


@pytest.mark.parametrize("kind", KINDS)
@given(seed=SEEDS, size=SIZES, far=st.sampled_from([0.1, 1.0, 10.0]), rho=RHO)
def test_prox_is_optimal(kind: str, seed: int, size: float, far: float, rho: float) -> None:
    """φ(V) = f(V) + ½rho‖V − Z‖² is strongly convex: V is its minimum iff φ(A) ≥ φ(V) + ½rho‖A − V‖² on the domain."""
    fit, Z = some_fit(kind, seed, size), far * gaussian(seed + 3, P, M)
    V = fit.prox(Z, rho)
    assert distance(fit, V) <= EXACT * P * M * max(far, 1.0)
    least = value(fit, V) + 0.5 * rho * inner(V - Z, V - Z)
    for k in range(4):
        other = member(kind, fit, k)
        for point in (other, V + 0.01 * (other - V)):
            found = value(fit, point) + 0.5 * rho * inner(point - Z, point - Z)
            grown = least + 0.5 * rho * inner(point - V, point - V)
            assert found >= grown - ROUNDING * (found + rho * (far + size) ** 2 * P * M)


@pytest.mark.parametrize("kind", SETS)
@given(seed=SEEDS, size=SIZES)
def test_the_distance_is_that_of_the_projection(kind: str, seed: int, size: float) -> None:
    fit, Z = some_fit(kind, seed, size), 3 * gaussian(seed + 3, P, M)
    V = fit.prox(Z, 1.7)
    assert distance(fit, Z) == pytest.approx(float((Z - V).norm()), rel=ROUNDING, abs=EXACT)
    torch.testing.assert_close(fit.prox(V, 1.0), V, rtol=EXACT, atol=EXACT * P * M)
    before = V.clone()
    fit.prox(V, 1.0)
    assert torch.equal(V, before)


@pytest.mark.parametrize("kind", KINDS)
@given(seed=SEEDS, size=SIZES, rho=RHO)
def test_moreaus_decomposition(kind: str, seed: int, size: float, rho: float) -> None:
    """rho(Z − prox) is a subgradient of f at the prox: f + f* = ⟨·,·⟩ there, and the conjugate is finite at it."""
    fit, Z = some_fit(kind, seed, size), 3 * gaussian(seed + 3, P, M)
    V = fit.prox(Z, rho)
    L = rho * (Z - V)
    torch.testing.assert_close(fit.project_dual(L), L, rtol=0, atol=0 if "linear" in kind else rho * EXACT)
    scale = rho * (1 + size) * P * M + size * P * M
    assert value(fit, V) + conjugate(fit, fit.project_dual(L)) == pytest.approx(inner(L, V), abs=ROUNDING * scale)


@pytest.mark.parametrize("kind", KINDS)
@given(seed=SEEDS, size=SIZES, rho=RHO)
def test_prox_is_firmly_nonexpansive(kind: str, seed: int, size: float, rho: float) -> None:
    """‖prox A − prox B‖² ≤ ⟨A − B, prox A − prox B⟩, which ADMM's convergence rests on."""
    fit, A, B = some_fit(kind, seed, size), 3 * gaussian(seed + 3, P, M), gaussian(seed + 4, P, M)
    moved = fit.prox(A, rho) - fit.prox(B, rho)
    assert inner(moved, moved) <= inner(A - B, moved) + ROUNDING


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("entries", [1, 2 * M, 2 * M + 1])
def test_prox_and_pull_by_blocks(kind: str, entries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """prox_residual = Z − prox, and rows of both depend on the other rows through the sums alone."""
    fit, Z = some_fit(kind, 0, 1.0), 3 * gaussian(3, P, M)
    whole, sums = fit.prox(Z, 0.6), fit.sums(Z)
    torch.testing.assert_close(Z - fit.prox_residual(Z, sums, 0.6), whole, rtol=EXACT, atol=EXACT)
    for row in range(P):
        part = fit.map(lambda array, row=row: array[row : row + 1])
        torch.testing.assert_close(
            Z[row : row + 1] - part.prox_residual(Z[row : row + 1], sums, 0.6), whole[row : row + 1]
        )
    monkeypatch.setattr(arrays, "_BLOCK_ENTRIES", entries)
    torch.testing.assert_close(fit.prox(Z, 0.6), whole, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("kind", KINDS)
@given(seed=SEEDS, cut=st.integers(1, P - 1))
def test_sums_over_samples_add_up_over_slices(kind: str, seed: int, cut: int) -> None:
    fit, Z, L = some_fit(kind, seed, 1.0), gaussian(seed + 3, P, M), gaussian(seed + 4, P, M)
    parts = [slice(0, cut), slice(cut, P)]
    slices = [fit.map(lambda array, part=part: array[part]) for part in parts]
    squares = sum(one.sums(Z[part]) for one, part in zip(slices, parts, strict=True))
    terms = sum(one.dual_terms(L[part]) for one, part in zip(slices, parts, strict=True))
    torch.testing.assert_close(squares, fit.sums(Z))
    torch.testing.assert_close(terms, fit.dual_terms(L))


# Conjugates


@pytest.mark.parametrize("kind", KINDS)
@given(seed=SEEDS, size=SIZES)
def test_fenchel_young(kind: str, seed: int, size: float) -> None:
    """⟨Λ, Z⟩ ≤ f(Z) + f*(Λ) on the domain, with equality at the anchor and as far along Λ as the measure lets one."""
    fit, L = some_fit(kind, seed, size), gaussian(seed + 3, P, M)
    L = fit.project_dual(L)
    for k in range(5):
        Z = member(kind, fit, k)
        assert inner(L, Z) <= value(fit, Z) + conjugate(fit, L) + ROUNDING * (1 + inner(Z, Z))
    seen = torch.where(fit.Y > 0, L, 0.0) if "net-trim" in kind else L
    best = fit.anchor + step(kind, fit, seen)
    assert distance(fit, best) <= ROUNDING
    assert inner(L, best) == pytest.approx(value(fit, best) + conjugate(fit, L), abs=ROUNDING * (1 + inner(best, best)))


@pytest.mark.parametrize("kind", KINDS)
@given(seed=SEEDS, size=SIZES)
def test_the_dual_value_of_scaled_columns_is_that_of_the_scaled_multipliers(kind: str, seed: int, size: float) -> None:
    fit, L, t = some_fit(kind, seed, size), gaussian(seed + 3, P, M), gaussian(seed + 4, M).abs()
    found = fit.dual_value(fit.dual_terms(L), t)
    assert found == pytest.approx(-conjugate(fit, t * L), rel=ROUNDING, abs=ROUNDING)


@pytest.mark.parametrize("kind", KINDS)
@given(seed=SEEDS, size=SIZES)
def test_best_scaling_is_best(kind: str, seed: int, size: float) -> None:
    """No coordinate, no common factor and no other point of the box does better."""
    fit, L, cap = some_fit(kind, seed, size), gaussian(seed + 3, P, M), gaussian(seed + 4, M).exp()
    terms = fit.dual_terms(fit.project_dual(L - fit.anchor))  # a leaning towards −Y makes some scales positive
    t = fit.best_scaling(terms, cap)
    assert bool(((t >= 0) & (t <= cap)).all())
    trials = [cap * torch.rand(M, generator=torch.Generator().manual_seed(k)).double() for k in range(20)]
    trials += [torch.where(torch.arange(M) == m, x * cap, t) for m in range(M) for x in (0.0, 0.5, 1.0)]
    trials += [(t * x).minimum(cap) for x in (0.9, 0.999, 1.001, 1.1)]
    best = fit.dual_value(terms, t)
    assert best >= max(fit.dual_value(terms, trial) for trial in trials) - ROUNDING * float(
        (terms[0].abs() * cap).sum()
    )


@pytest.mark.parametrize("kind", KINDS)
@given(seed=SEEDS)
def test_curb_is_the_projection_onto_the_conjugates_domain(kind: str, seed: int) -> None:
    """Idempotent, nothing but signs off Ω; beyond it f* is infinite: Z may go down without end where Λ < 0."""
    fit, L = some_fit(kind, seed, 1.0), gaussian(seed + 3, P, M)
    projected, free = fit.project_dual(L), fit.unrestricted()
    assert torch.equal(fit.project_dual(projected), projected)
    assert torch.equal(projected, torch.where(free, L, L.clamp(min=0)))
    assert torch.equal(free, torch.ones_like(free) if "linear" in kind else fit.Y > 0)
    far = fit.anchor - 1e6 * (~free).double()
    assert distance(fit, far) == 0


@pytest.mark.parametrize("kind", KINDS)
@given(seed=SEEDS, size=SIZES)
def test_the_residual_is_a_subgradient_direction(kind: str, seed: int, size: float) -> None:
    """h of a boundary point is normal to the set; for a loss weight·h is a subgradient."""
    fit = some_fit(kind, seed, size)
    Z = fit.prox(100 * gaussian(seed + 3, P, M), 1e-3)
    h = fit.residual(Z)
    torch.testing.assert_close(h, geometry(kind, fit, Z)[0], rtol=EXACT, atol=EXACT)
    for k in range(5):
        other = member(kind, fit, k)
        climb = (fit.weight if "loss" in kind else 1.0) * inner(h, other - Z)
        room = ROUNDING * (1 + inner(Z, Z) + inner(other, other)) * max(1.0, size)
        assert value(fit, other) >= value(fit, Z) + climb - room


# Changes of unit and of measure


@pytest.mark.parametrize("kind", KINDS)
@given(seed=SEEDS, size=SIZES, c=st.sampled_from([1e-6, 0.5, 3.0, 1e6]), rho=RHO)
def test_rescaled_is_the_same_fit_in_another_unit(kind: str, seed: int, size: float, c: float, rho: float) -> None:
    fit, Z, L = some_fit(kind, seed, size), 2 * gaussian(seed + 3, P, M), gaussian(seed + 4, P, M)
    scaled = fit.rescaled(c)
    torch.testing.assert_close(scaled.prox(c * Z, rho / c**2), c * fit.prox(Z, rho), rtol=ROUNDING, atol=c * EXACT)
    assert distance(scaled, c * Z) == pytest.approx(c * distance(fit, Z), rel=ROUNDING)
    assert value(scaled, c * Z) == pytest.approx(value(fit, Z), rel=ROUNDING)
    assert conjugate(scaled, fit.project_dual(L) / c) == pytest.approx(
        conjugate(fit, fit.project_dual(L)), rel=ROUNDING, abs=ROUNDING
    )
    assert scaled.scale == pytest.approx(c * fit.scale)
    assert scaled.size == pytest.approx(c * fit.size)


@pytest.mark.parametrize("kind", KINDS)
@given(seed=SEEDS, size=SIZES, k=st.sampled_from([1e-6, 0.5, 1e6]), rho=RHO)
def test_a_multiple_of_a_fit(kind: str, seed: int, size: float, k: float, rho: float) -> None:
    """prox of k·f with penalty k·rho is that of f with rho; (k·f)*(kΛ) = k·f*(Λ)."""
    fit, Z, L = some_fit(kind, seed, size), 2 * gaussian(seed + 3, P, M), gaussian(seed + 4, P, M)
    more, L = fit.times(k), fit.project_dual(L)
    torch.testing.assert_close(more.prox(Z, k * rho), fit.prox(Z, rho), rtol=ROUNDING, atol=EXACT)
    assert value(more, Z) == pytest.approx(k * value(fit, Z), rel=ROUNDING)
    assert conjugate(more, k * L) == pytest.approx(k * conjugate(fit, L), rel=ROUNDING, abs=k * ROUNDING)


@pytest.mark.parametrize("kind", KINDS)
@given(seed=SEEDS, weight=st.sampled_from([0.01, 1.0, 30.0]))
def test_as_loss_keeps_the_geometry(kind: str, seed: int, weight: float) -> None:
    fit, Z = some_fit(kind, seed, 1.0), 2 * gaussian(seed + 3, P, M)
    loss = fit.as_loss(weight)
    h, e = geometry(kind, fit, Z)
    assert value(loss, Z) == pytest.approx(0.5 * weight * float((h**2).sum()), rel=ROUNDING)
    assert distance(loss, Z) == pytest.approx(float(e.norm()), rel=ROUNDING, abs=EXACT)
    assert torch.equal(loss.anchor, fit.anchor)
    assert torch.equal(loss.unrestricted(), fit.unrestricted())


@pytest.mark.parametrize("kind", KINDS)
@given(seed=SEEDS, size=SIZES)
def test_a_sample_keeps_the_root_mean_square(kind: str, seed: int, size: float) -> None:
    """Of samples that are copies of the first two, these two pose the same program: distances per sample."""
    two = some_fit(kind, seed, size).map(lambda array: array[:2])
    many = two.map(lambda array: array.repeat(4, 1))
    if "loss" not in kind:
        many = many.with_eps(2 * two.eps)  # of 4 times as many samples
    part, Z = many.sample(slice(0, 2)), gaussian(seed + 3, 2, M)
    assert part.shape == (2, M)
    assert 2 * distance(part, Z) == pytest.approx(distance(many, Z.repeat(4, 1)), rel=ROUNDING, abs=EXACT)
    assert 4 * value(part.as_loss(1.0), Z) == pytest.approx(value(many.as_loss(1.0), Z.repeat(4, 1)), rel=ROUNDING)
    assert value(part, Z) == pytest.approx(value(many, Z.repeat(4, 1)), rel=ROUNDING)


@pytest.mark.parametrize("ball", ["one ball", "a ball a neuron"])
@given(seed=SEEDS, size=SIZES, far=st.sampled_from([0.1, 1.0, 10.0]))
def test_the_net_trim_set_lies_inside_the_relu_ball(ball: str, seed: int, size: float, far: float) -> None:
    """Same targets and eps, ceiling 0; and every point of the ReLU ball keeps the promised output error."""
    narrow, wide = some_fit(f"net-trim, {ball}", seed, size), some_fit(f"relu, {ball}", seed, size)
    Z = far * gaussian(seed + 3, P, M)
    assert distance(wide, narrow.prox(Z, 1.0)) <= EXACT * far * P * M
    for inside in (wide.prox(Z, 1.0), member(f"relu, {ball}", wide, seed)):
        error = inside.clamp(min=0) - wide.Y
        length = error.norm() if ball == "one ball" else error.norm(dim=0)
        assert bool((length <= torch.as_tensor(wide.eps, dtype=torch.float64) + EXACT * far * P * M).all())
    lower = torch.where(wide.Y > 0, Z, -Z.abs())
    assert distance(narrow, lower) == pytest.approx(distance(wide, lower), rel=ROUNDING, abs=EXACT * far * P)


@pytest.mark.parametrize("geometry", GEOMETRIES)
@given(seed=SEEDS, size=SIZES)
def test_balls_a_neuron_are_balls_of_layers_of_one_neuron(geometry: str, seed: int, size: float) -> None:
    fit, Z = some_fit(f"{geometry}, a ball a neuron", seed, size), 3 * gaussian(seed + 3, P, M)
    V = fit.prox(Z, 1.0)
    apart = []
    for m in range(M):
        alone = fit.map(lambda array, m=m: array[:, m : m + 1]).with_eps(float(fit.eps[m]))
        torch.testing.assert_close(alone.prox(Z[:, m : m + 1], 1.0), V[:, m : m + 1], rtol=ROUNDING, atol=EXACT)
        apart.append(distance(alone, Z[:, m : m + 1]))
    assert distance(fit, Z) == pytest.approx(float(np.linalg.norm(apart)), rel=ROUNDING, abs=EXACT)


def test_the_relu_ball_is_wider() -> None:
    """A small positive output where the trained one is inactive is in it, and not in the Net-Trim set."""
    Y, Z = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.5]])
    assert distance(ReluBall(Y, 0.5), Z) == 0
    assert distance(NetTrimSet(Y, 0.5), Z) == 0.5


def test_outputs_below_zero_mean_inactive() -> None:
    Y = torch.tensor([[-1.0, 2.0]], dtype=torch.float64)
    Z = torch.tensor([[-3.0, 2.0]], dtype=torch.float64)
    for fit in (ReluBall(Y, 0.1), NetTrimSet(Y, 0.1)):
        assert distance(fit, Z) == 0
        assert not bool(fit.unrestricted()[0, 0])


@pytest.mark.parametrize("kind", KINDS)
def test_fits_and_penalties_satisfy_their_protocols(kind: str) -> None:
    assert isinstance(some_fit(kind, 0, 1.0), Fit)
    assert isinstance(L1(), Penalty)


@pytest.mark.parametrize(("eps", "Y", "scale"), [(0.5, 3.0, 0.5), (0.0, 3.0, 3.0), (0.0, 0.0, 1.0)])
def test_the_unit_of_distances(eps: float, Y: float, scale: float) -> None:
    assert Ball(torch.tensor([[Y]]), eps).scale == scale
    assert Ball(torch.tensor([[Y]]), torch.tensor([eps])).scale == pytest.approx(scale)
    assert SquaredLoss(torch.tensor([[Y]])).scale == (Y or 1.0)


# Precision and range


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float64), (torch.float64, torch.float32)], ids=str)
def test_targets_and_outputs_of_different_precision(kind: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    fit = some_fit(kind, 0, 1.0).map(lambda array: array.to(torch.float32).double())
    Z = (3 * gaussian(3, P, M)).float().double()
    mixed, seen = fit.map(lambda array: array.to(dtypes[0])), Z.to(dtypes[1])
    torch.testing.assert_close(mixed.sums(seen), fit.sums(Z), rtol=1e-6, atol=1e-6)
    V = mixed.prox(seen, 0.6)
    assert V.dtype == dtypes[1]
    torch.testing.assert_close(V.double(), fit.prox(Z, 0.6), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_does_not_overflow(kind: str) -> None:
    """300² is infinite in float16."""
    fit, Z = some_fit(kind, 0, 1.0), torch.full((P, M), 300.0).half()
    half = fit.map(lambda array: array.half())
    assert distance(half, Z) == pytest.approx(distance(fit, Z.double()), rel=1e-3)
    assert bool(torch.isfinite(half.dual_terms(fit.project_dual(Z))).all())
    torch.testing.assert_close(half.prox(Z, 0.6).double(), fit.prox(Z.double(), 0.6), rtol=0, atol=0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", SETS)
def test_eps_0_and_outputs_that_are_exact(kind: str, dtype: torch.dtype) -> None:
    """0/0 must not become NaN."""
    fit = some_fit(kind, 0, 0.0).map(lambda array: array.to(dtype))
    Z = fit.anchor.to(dtype)
    assert float(fit.prox_residual(Z, fit.sums(Z), 1.0).abs().max()) == 0
    assert distance(fit, Z) == 0
    assert torch.equal(fit.prox(Z, 1.0), Z)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "ceilings" not in kind])
@given(seed=SEEDS, power=st.sampled_from([-140, -30, 30, 140]))
def test_the_unit_may_be_tiny_or_huge(kind: str, seed: int, power: int) -> None:
    fit, Z, unit = some_fit(kind, seed, 1.0), 3 * gaussian(seed + 3, P, M), 10.0**power
    changed = fit.map(lambda array: unit * array)
    if "loss" not in kind:
        changed = changed.with_eps(unit * fit.eps)
    torch.testing.assert_close(changed.prox(unit * Z, 1.0) / unit, fit.prox(Z, 1.0), rtol=ROUNDING, atol=EXACT)
    assert distance(changed, unit * Z) / unit == pytest.approx(distance(fit, Z), rel=ROUNDING)


@given(seed=SEEDS, power=st.integers(-150, 150))
def test_extreme_weights_of_a_loss(seed: int, power: int) -> None:
    """The prox lies between Z and the anchor, and no bound is NaN."""
    fit, Z = SquaredLoss(gaussian(seed, P, M), 10.0**power), gaussian(seed + 1, P, M)
    part = fit.weight / (1 + fit.weight)
    torch.testing.assert_close(fit.prox(Z, 1.0), Z - part * (Z - fit.Y), rtol=ROUNDING, atol=EXACT)
    terms, cap = fit.dual_terms(-fit.Y), torch.ones(M, dtype=torch.float64)
    t = fit.best_scaling(terms, cap)
    assert bool(((t >= 0) & (t <= 1)).all())
    assert fit.dual_value(terms, t) >= 0


def test_an_infinite_penalty_parameter_leaves_a_loss_alone() -> None:
    fit, Z = some_fit("relu, loss", 0, 1.0), gaussian(3, P, M)
    assert not fit.prox_residual(Z, fit.sums(Z), math.inf).any()


def test_radii_follow_the_targets_to_another_device() -> None:
    fit: Any = some_fit("relu, a ball a neuron", 0, 1.0).map(lambda array: array.to("meta"))
    assert fit.radii.device == fit.Y.device


def test_another_radius() -> None:
    fit = some_fit("net-trim with ceilings, one ball", 0, 1.0)
    other = fit.with_eps(0.25)
    assert (other.eps, fit.eps) == (0.25, 1.0)
    assert other.ceiling is fit.ceiling
    assert torch.equal(fit.with_eps([1, 2, 3]).eps, torch.tensor([1.0, 2, 3], dtype=torch.float64))
    with pytest.raises(InvalidTolerance, match="eps"):
        fit.with_eps(-1)
    with pytest.raises(ShapeMismatch, match="3 neurons"):
        fit.with_eps(torch.ones(2))


# The reference formulation


def small_program(kind: str, seed: int) -> LayerProgram:
    """Reachable targets; the last neuron is inactive everywhere (for one geometry: has small outputs)."""
    X, W = gaussian(seed, 12, 3), gaussian(seed + 1, 3, M)
    X[:, -1], W[:, -1] = 1, torch.tensor([0.0, 0.0, -1.0])
    Z = X @ W
    name, measure = kind.split(", ")
    Y = Z if name == "linear" else Z.clamp(min=0)
    arguments = [torch.where(Y > 0, 0.0, Z + 0.1)] if "ceilings" in kind else []
    if measure == "loss":
        losses: dict[str, Any] = {"linear": SquaredLoss, "relu": ReluLoss}
        return LayerProgram(X, losses.get(name, NetTrimLoss)(Y, 0.7, *arguments))
    sets: dict[str, Any] = {"linear": Ball, "relu": ReluBall}
    eps = 0.2 * Y.norm() if measure == "one ball" else 0.2 * Y.norm(dim=0) + 0.1
    return LayerProgram(X, sets.get(name, NetTrimSet)(Y, eps, *arguments))


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_formulation_of_every_fit_has_our_optimum(kind: str, seed: int) -> None:
    """Its value is ours, its multipliers certify its weights, and their opposites do not."""
    program = small_program(kind, seed)
    problem, U = program.to_cvxpy()
    reference = problem.solve(solver="CLARABEL", tol_gap_abs=TIGHT, tol_gap_rel=TIGHT, tol_feas=TIGHT)
    ours = solve(program, tol=REFERENCE / 10, feas_tol=REFERENCE / 10, max_iter=20_000)
    assert reference == pytest.approx(ours.certificate.value, rel=REFERENCE, abs=REFERENCE)
    L = -torch.as_tensor(problem.constraints[0].dual_value)
    found = certify(program, U.value, L)
    assert found.gap <= 10 * REFERENCE
    assert found.violation <= 10 * REFERENCE
    assert certify(program, U.value, -L).bound < found.bound / 2


@pytest.mark.parametrize("name", [*SMALL, "net-trim raised ceiling", "relu-ball all_active", "ball eps 1.5, U = 0"])
def test_the_reference_formulation_has_our_optimum_and_multipliers(name: str) -> None:
    """Its value is ours, and minus the dual value of its first constraint Z == XU is Λ."""
    program = build(name)
    problem, U = program.to_cvxpy()
    value = problem.solve(solver="CLARABEL")
    unit = tight(name).certificate.scale
    assert value == pytest.approx(tight(name).certificate.value, abs=REFERENCE * unit)
    L = -torch.as_tensor(problem.constraints[0].dual_value)
    found = certify(program, U.value, L)
    assert found.gap <= REFERENCE
    assert found.violation <= REFERENCE
    if "U = 0" not in name:
        assert certify(program, U.value, -L).bound < found.bound / 2


# What is refused

X, Y = torch.ones(4, 3), torch.ones(4, 2)
NAN, INF = torch.full((4, 2), math.nan), torch.full((4, 2), math.inf)


def program(X: Any, Y: Any = Y, **arguments: Any) -> LayerProgram:
    return LayerProgram(X, ReluBall(Y, 0.1), **arguments)


class Elsewhere(Ball):
    """Stands for targets on another device, which a machine without one cannot have."""

    size = scale = 1.0

    def __post_init__(self, targets: Any) -> None:
        super().__post_init__(targets)
        vars(self).update(Y=self.Y.to("meta"))

    def unrestricted(self) -> Tensor:
        return super().unrestricted().to("meta")


REFUSED: dict[str, tuple[Callable[[], object], type[ConvexPruneError], str]] = {
    "X a vector": (lambda: program(torch.ones(4)), ShapeMismatch, r"inputs X: expected a matrix.*\[4\].*reshape"),
    "X a batch": (lambda: program(torch.ones(4, 3, 1)), ShapeMismatch, r"\[4, 3, 1\]"),
    "Y a vector": (lambda: program(X, torch.ones(4)), ShapeMismatch, r"targets Y: expected a matrix"),
    "samples differ": (lambda: program(X, torch.ones(5, 2)), ShapeMismatch, r"\[4, 3\].*\[5, 2\].*number of samples"),
    "samples last": (lambda: program(X.T, Y), ShapeMismatch, "samples first: X .P, N., Y .P, M."),
    "X NaN": (lambda: program(torch.full((4, 3), math.nan)), NonFinite, "inputs X: 12 of 12 entries.*clean"),
    "X inf": (lambda: program(np.array([[1.0, np.inf]] * 4)), NonFinite, "inputs X: 4 of 8 entries"),
    "Y NaN": (lambda: ReluBall(NAN, 0.1), NonFinite, "targets Y: 8 of 8"),
    "Y inf": (lambda: Ball(INF, 0.1), NonFinite, "targets Y"),
    "no samples": (lambda: program(torch.ones(0, 3), Y), EmptyInput, r"inputs X.*\[0, 3\]"),
    "no inputs": (lambda: program(torch.ones(4, 0)), EmptyInput, r"\[4, 0\]"),
    "no outputs": (lambda: Ball(torch.ones(4, 0), 0.1), EmptyInput, r"targets Y.*\[4, 0\]"),
    "X complex": (lambda: program(X.to(torch.complex64)), InvalidInput, "inputs X.*complex64"),
    "Y complex array": (lambda: Ball(np.ones((4, 2), complex), 0.1), InvalidInput, "targets Y.*complex128"),
    "X text": (lambda: program("inputs"), InvalidInput, "inputs X.*tensor or a numeric array, found str"),
    "X nothing": (lambda: program(None), InvalidInput, "found NoneType"),
    "X objects": (lambda: program(np.array([[object()]])), InvalidInput, "numeric array, found one of object"),
    "eps < 0": (lambda: ReluBall(Y, -0.1), InvalidTolerance, "eps: expected a finite number ≥ 0, found -0.1"),
    "eps NaN": (lambda: NetTrimSet(Y, math.nan), InvalidTolerance, "eps.*nan"),
    "eps inf": (lambda: Ball(Y, math.inf), InvalidTolerance, "eps.*inf"),
    "eps text": (lambda: Ball(Y, "small"), InvalidTolerance, "eps: expected a number ≥ 0, found 'small'"),  # type: ignore[arg-type]
    "eps nothing": (lambda: Ball(Y, None), InvalidTolerance, "found None"),  # type: ignore[arg-type]
    "eps of other neurons": (lambda: Ball(Y, torch.ones(3)), ShapeMismatch, r"eps: expected.*2 neurons.*\[3\]"),
    "eps a matrix": (lambda: Ball(Y, torch.ones(1, 2)), ShapeMismatch, r"eps: expected.*\[1, 2\]"),
    "eps < 0 somewhere": (lambda: Ball(Y, torch.tensor([1.0, -2.0])), InvalidTolerance, "eps.*found -2"),
    "eps NaN somewhere": (lambda: ReluBall(Y, np.array([1.0, math.nan])), InvalidTolerance, "eps.*found nan"),
    "eps inf somewhere": (lambda: NetTrimSet(Y, [1.0, math.inf]), InvalidTolerance, "eps.*found inf"),  # type: ignore[arg-type]
    "eps complex numbers": (lambda: Ball(Y, torch.ones(2) * 1j), InvalidInput, "eps: expected real numbers"),
    "eps words": (lambda: Ball(Y, np.array(["a", "b"])), InvalidInput, "eps: expected a tensor or a numeric array"),
    "loss weight 0": (lambda: SquaredLoss(Y, 0), InvalidTolerance, "weight: expected a positive number, found 0"),
    "loss weight < 0": (lambda: ReluLoss(Y, -1), InvalidTolerance, "weight.*found -1"),
    "loss weight inf": (lambda: NetTrimLoss(Y, math.inf), InvalidTolerance, "weight.*found inf"),
    "loss weight text": (lambda: SquaredLoss(Y, "one"), InvalidTolerance, "weight.*found 'one'"),  # type: ignore[arg-type]
    "loss weight too large": (lambda: SquaredLoss(Y).rescaled(1e-200), InvalidTolerance, "weight.*found inf"),
    "loss weight too small": (lambda: SquaredLoss(Y).rescaled(1e200), InvalidTolerance, "weight.*found 0"),
    "ceiling of a loss": (lambda: NetTrimLoss(Y, 1.0, torch.ones(2, 4)), ShapeMismatch, "ceiling V"),
    "eps complex": (lambda: Ball(Y, torch.tensor(1j)), InvalidTolerance, "eps"),  # type: ignore[arg-type]
    "weight < 0": (
        lambda: L1(torch.tensor([[1.0], [-2.0]])),
        InvalidInput,
        "L1 weights: expected numbers ≥ 0, found -2",
    ),
    "weight NaN": (lambda: L1(NAN), NonFinite, "L1 weights"),
    "weights a vector": (lambda: L1(torch.ones(3)), ShapeMismatch, "L1 weights: expected a matrix"),
    "weights do not fit": (
        lambda: program(X, penalty=L1(torch.ones(2, 3))),
        ShapeMismatch,
        r"L1 weights: expected \[3, 2\], \[N, 1\].*found \[2, 3\]",
    ),
    "bias of another layer": (lambda: program(X, penalty=L1.free_bias(9)), ShapeMismatch, r"found \[9, 1\]"),
    "ceiling's shape": (lambda: NetTrimSet(Y, 0.1, torch.ones(2, 4)), ShapeMismatch, r"ceiling V.*\[4, 2\].*\[2, 4\]"),
    "ceiling a vector": (lambda: NetTrimSet(Y, 0.1, torch.ones(2)), ShapeMismatch, "ceiling V: expected a matrix"),
    "ceiling NaN": (lambda: NetTrimSet(Y, 0.1, NAN), NonFinite, "ceiling V: 8 of 8"),
    "ceiling inf": (lambda: NetTrimSet(Y, 0.1, math.inf), NonFinite, "ceiling V"),
    "ceiling text": (lambda: NetTrimSet(Y, 0.1, "low"), InvalidInput, "ceiling V"),  # type: ignore[arg-type]
    "ceiling nothing": (lambda: NetTrimSet(Y, 0.1, None), InvalidInput, "ceiling V"),  # type: ignore[arg-type]
    "fit a class": (
        lambda: LayerProgram(X, ReluBall),
        InvalidInput,
        r"fit: expected an instance such as ReluBall\(Y, eps\)",
    ),  # type: ignore[arg-type]
    "fit a tensor": (lambda: LayerProgram(X, Y), InvalidInput, "fit: expected an instance"),  # type: ignore[arg-type]
    "penalty a class": (lambda: program(X, penalty=L1), InvalidInput, r"penalty: expected an instance such as L1\(\)"),
    "penalty a number": (lambda: program(X, penalty=1.0), InvalidInput, "penalty: expected an instance"),
    "two devices": (
        lambda: LayerProgram(X, Elsewhere(Y, 0.1)),
        InvalidInput,
        "inputs X are on cpu.*move both to one device",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_with_a_reason(case: str) -> None:
    call, error, message = REFUSED[case]
    with pytest.raises(error, match=message) as caught:
        call()
    assert caught.type is error


def test_bad_input_is_also_a_value_error() -> None:
    assert issubclass(InvalidInput, ValueError)
    assert {ShapeMismatch, NonFinite, EmptyInput, InvalidTolerance} <= set(InvalidInput.__subclasses__())


# What is accepted

BASE = np.arange(12).reshape(4, 3)
FROZEN = BASE.astype(float)
FROZEN.flags.writeable = False
ACCEPTED = {
    "float64": BASE.astype(np.float64),
    "float32": BASE.astype(np.float32),
    "float16": BASE.astype(np.float16),
    "int64": BASE,
    "uint8": BASE.astype(np.uint8),
    "read-only": FROZEN,
    "Fortran order": np.asfortranarray(BASE, dtype=float),
    "big-endian": BASE.astype(">f8"),
    "big-endian integers": BASE.astype(">i4"),
    "negative strides": BASE[::-1].astype(float)[::-1],
    "every second": np.repeat(BASE, 2, axis=0)[::2],
    "nested lists": BASE.tolist(),
    "tensor of integers": torch.as_tensor(BASE),
    "transposed tensor": torch.as_tensor(BASE.T.copy(), dtype=torch.float64).T,
    "half": torch.as_tensor(BASE, dtype=torch.float16),
    "bfloat16": torch.as_tensor(BASE, dtype=torch.bfloat16),
}


@pytest.mark.parametrize("kind", ACCEPTED)
@pytest.mark.parametrize("role", ["X", "Y", "V", "w"])
def test_any_matrix_of_real_numbers_is_accepted(kind: str, role: str) -> None:
    array: Any = ACCEPTED[kind]
    ones = torch.ones(4, 3)
    taken = {
        "X": lambda: LayerProgram(array, Ball(ones, 1.0)).inputs,
        "Y": lambda: Ball(array, 1.0).Y,
        "V": lambda: NetTrimSet(ones.double(), 1.0, array).V,
        "w": lambda: L1(array).w,
    }[role]()
    assert taken.is_floating_point()
    assert torch.equal(taken.double(), torch.as_tensor(BASE, dtype=torch.float64))


@pytest.mark.parametrize("value", [1, True, np.float32(1), np.array(1.0), torch.tensor(1.0)])
def test_eps_and_ceiling_may_be_any_number(value: Any) -> None:
    fit = NetTrimSet(Y, value, value)
    assert type(fit.eps) is type(fit.ceiling) is float
    assert fit.eps == fit.ceiling == 1


def test_memory_is_shared_where_it_can_be() -> None:
    X64 = torch.ones(4, 3, dtype=torch.float64)
    array = np.ones((4, 2))
    taken = LayerProgram(X64, Ball(array, 0.1))
    assert taken.inputs.data_ptr() == X64.data_ptr()
    assert np.shares_memory(taken.fit.Y.numpy(), array)
    assert taken.to(torch.float64).inputs.data_ptr() == X64.data_ptr()
    assert taken.to(torch.float32).inputs.dtype == torch.float32


def test_a_read_only_file_is_mapped_not_copied(tmp_path: Path) -> None:
    """X may be larger than memory: solvers walk through the map, and nothing writes to it."""
    array = np.random.default_rng(0).random((50, 4), dtype=np.float32)
    np.save(tmp_path / "X.npy", array)
    X = np.load(tmp_path / "X.npy", mmap_mode="r")
    program = LayerProgram(X, Ball(array[:, :2], 0.1))
    assert np.shares_memory(program.inputs.numpy(), X)
    assert str(solve(program).status) == "solved"
    np.testing.assert_array_equal(X, array)


def test_inputs_that_require_gradients_are_detached() -> None:
    X, Y = torch.ones(4, 3, requires_grad=True), torch.ones(4, 2, requires_grad=True)
    fit = NetTrimSet(Y, 0.1, torch.ones(4, 2, requires_grad=True))
    taken = LayerProgram(X, fit, L1(torch.ones(3, 1, requires_grad=True)))
    assert taken.inputs.data_ptr() == X.data_ptr()
    assert isinstance(taken.penalty, L1)
    assert not any(array.requires_grad for array in (taken.inputs, fit.Y, fit.V, taken.penalty.w))


def test_an_eps_that_requires_gradients_is_just_a_number() -> None:
    """eps = 0.1·‖Y‖ of a model's own output, computed without torch.no_grad."""
    Y = torch.ones(4, 2, requires_grad=True)
    assert ReluBall(Y, 0.1 * Y.norm()).eps == pytest.approx(0.1 * 8**0.5)  # type: ignore[arg-type]
    assert NetTrimSet(Y, 0.1, 0.5 * Y.max()).ceiling == 0.5


def test_shapes_and_precision_of_a_program() -> None:
    taken = program(X)
    assert (taken.samples, taken.shape, taken.fit.shape) == (4, (3, 2), (4, 2))
    dtypes = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    assert [program(X.to(dtype)).dtype for dtype in dtypes] == [torch.float64] + 3 * [torch.float32]


@pytest.mark.parametrize("fit", FITS)
def test_programs_and_fits_are_frozen(fit: str) -> None:
    taken = LayerProgram(X, FITS[fit](Y, 0.1))
    with pytest.raises(AttributeError):
        taken.fit = taken.fit  # type: ignore[misc]
    with pytest.raises(AttributeError):
        taken.fit.eps = 1.0  # type: ignore[attr-defined]
