"""Fits, penalties and the program: projections, conjugates, proxes, and everything that is refused."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tolerances import EXACT, REFERENCE, ROUNDING
from torch import Tensor
from zoo import FITS, SMALL, build, gaussian, tight

from convexprune.solvers import L1, Ball, LayerProgram, NetTrimSet, ReluBall, arrays, certify
from convexprune.solvers.errors import (
    ConvexPruneError,
    EmptyInput,
    InvalidInput,
    InvalidTolerance,
    NonFinite,
    ShapeMismatch,
)
from convexprune.solvers.fits import Fit
from convexprune.solvers.penalties import Penalty

SEEDS = st.integers(0, 10_000)
RADII = st.sampled_from([0.0, 0.1, 1.0, 5.0, 50.0])
KINDS = ["ball", "relu-ball", "net-trim", "net-trim with ceilings"]
P, N, M = 7, 4, 3


def some_fit(kind: str, seed: int, eps: float) -> Any:
    """Targets of which about half are inactive in front of a ReLU."""
    Y = gaussian(seed, P, M)
    if kind == "ball":
        return Ball(Y, eps)
    if kind == "relu-ball":
        return ReluBall(Y.clamp(min=0), eps)
    return NetTrimSet(Y.clamp(min=0), eps, gaussian(seed + 1, P, M) if "ceilings" in kind else 0.0)


def feasible(fit: Any, seed: int) -> Tensor:
    """A random member, by the set's definition: within eps on Ω, below the ceiling (or 0) elsewhere."""
    step = gaussian(seed + 2, P, M)
    ball = fit.eps * float(torch.rand(1, generator=torch.Generator().manual_seed(seed))) * step / step.norm()
    if isinstance(fit, Ball):
        return fit.Y + ball
    if isinstance(fit, ReluBall):
        return torch.where(fit.Y > 0, fit.Y + ball, ball - (step > 0) * step.abs())
    return torch.where(fit.Y > 0, fit.Y + ball, fit.V - step.abs())


def distance(fit: Any, Z: Tensor) -> float:
    return float(fit.distance(fit.sums(Z)))


def inner(A: Tensor, B: Tensor) -> float:
    return float((A * B).sum())


def support(fit: Any, L: Tensor) -> float:
    """f*(Λ)."""
    return -float(fit.dual_value(fit.dual_terms(L), torch.ones(M, dtype=torch.float64)))


# Fits


@pytest.mark.parametrize("kind", KINDS)
@given(seed=SEEDS, eps=RADII, size=st.sampled_from([0.1, 1.0, 10.0]))
def test_prox_is_the_projection(kind: str, seed: int, eps: float, size: float) -> None:
    """ΠZ is in the set, and ⟨Z − ΠZ, V − ΠZ⟩ ≤ 0 for every V in the set: the variational inequality defines Π."""
    fit, Z = some_fit(kind, seed, eps), size * gaussian(seed + 3, P, M)
    projected = fit.prox(Z, 1.7)
    assert distance(fit, projected) <= EXACT * size * P * M
    assert distance(fit, Z) == pytest.approx(float((Z - projected).norm()), rel=ROUNDING, abs=EXACT * size)
    for k in range(5):
        assert inner(Z - projected, feasible(fit, k) - projected) <= ROUNDING * size**2 * P * M
    torch.testing.assert_close(fit.prox(projected, 1.0), projected, rtol=EXACT, atol=EXACT * size)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("entries", [1, 2 * M, 2 * M + 1])
def test_the_projection_by_blocks_is_the_projection(kind: str, entries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    fit, Z = some_fit(kind, 0, 1.0), 3 * gaussian(3, P, M)
    whole = fit.prox(Z, 1.0)
    monkeypatch.setattr(arrays, "_BLOCK_ENTRIES", entries)
    torch.testing.assert_close(fit.prox(Z, 1.0), whole, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("kind", KINDS)
@given(seed=SEEDS, eps=RADII)
def test_prox_is_firmly_nonexpansive(kind: str, seed: int, eps: float) -> None:
    """‖ΠA − ΠB‖² ≤ ⟨A − B, ΠA − ΠB⟩, which ADMM's convergence rests on."""
    fit, A, B = some_fit(kind, seed, eps), 3 * gaussian(seed + 3, P, M), gaussian(seed + 4, P, M)
    moved = fit.prox(A, 1.0) - fit.prox(B, 1.0)
    assert inner(moved, moved) <= inner(A - B, moved) + ROUNDING


@pytest.mark.parametrize("kind", KINDS)
@given(seed=SEEDS, eps=RADII)
def test_members_are_left_alone(kind: str, seed: int, eps: float) -> None:
    fit = some_fit(kind, seed, eps)
    Z = feasible(fit, seed)
    assert distance(fit, Z) <= EXACT * P * M
    torch.testing.assert_close(fit.prox(Z, 1.0), Z, rtol=0, atol=EXACT * P * M)
    before = Z.clone()
    fit.prox(Z, 1.0)
    assert torch.equal(Z, before)


@pytest.mark.parametrize("kind", KINDS)
@given(seed=SEEDS, eps=RADII)
def test_fenchel_young(kind: str, seed: int, eps: float) -> None:
    """⟨Λ, Z⟩ ≤ f*(Λ) for every Z in the set, with equality at anchor + eps·Λ/‖Λ‖ (Λ on the ball's entries)."""
    fit, L = some_fit(kind, seed, eps), gaussian(seed + 3, P, M)
    L = fit.curb(L)
    for k in range(5):
        assert inner(L, feasible(fit, k)) <= support(fit, L) + ROUNDING
    ball = torch.where(fit.Y > 0, L, 0.0) if isinstance(fit, NetTrimSet) else L
    best = fit.anchor + eps * ball / max(float(ball.norm()), 1e-300)
    assert distance(fit, best) <= ROUNDING
    assert inner(L, best) == pytest.approx(support(fit, L), abs=ROUNDING)


@pytest.mark.parametrize("kind", KINDS)
@given(seed=SEEDS)
def test_curb_is_the_projection_onto_the_conjugates_domain(kind: str, seed: int) -> None:
    """Idempotent, nothing but signs off Ω; beyond it f* is infinite: Z may go down without end where Λ < 0."""
    fit, L = some_fit(kind, seed, 1.0), gaussian(seed + 3, P, M)
    curbed, free = fit.curb(L), fit.unrestricted()
    assert torch.equal(fit.curb(curbed), curbed)
    assert torch.equal(curbed, torch.where(free, L, L.clamp(min=0)))
    assert torch.equal(free, torch.ones_like(free) if kind == "ball" else fit.Y > 0)
    far = fit.anchor - 1e6 * (~free).double()
    assert distance(fit, far) == 0


@pytest.mark.parametrize("kind", KINDS)
@given(seed=SEEDS, eps=RADII, c=st.sampled_from([1e-6, 0.5, 3.0, 1e6]))
def test_rescaled_is_the_same_set_in_another_unit(kind: str, seed: int, eps: float, c: float) -> None:
    fit, Z = some_fit(kind, seed, eps), 2 * gaussian(seed + 3, P, M)
    scaled = fit.rescaled(c)
    torch.testing.assert_close(scaled.prox(c * Z, 1.0), c * fit.prox(Z, 1.0), rtol=ROUNDING, atol=c * EXACT)
    assert distance(scaled, c * Z) == pytest.approx(c * distance(fit, Z), rel=ROUNDING)
    assert scaled.scale == pytest.approx(c * fit.scale)
    assert scaled.size == pytest.approx(c * fit.size)


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


@given(seed=SEEDS, eps=RADII, size=st.sampled_from([0.1, 1.0, 10.0]))
def test_the_net_trim_set_lies_inside_the_relu_ball(seed: int, eps: float, size: float) -> None:
    """Same targets and eps, ceiling 0; and every point of the ReLU ball keeps the promised output error."""
    narrow, wide = some_fit("net-trim", seed, eps), some_fit("relu-ball", seed, eps)
    Z = size * gaussian(seed + 3, P, M)
    assert distance(wide, narrow.prox(Z, 1.0)) <= EXACT * size * P * M
    for inside in (wide.prox(Z, 1.0), feasible(wide, seed)):
        assert float((inside.clamp(min=0) - wide.Y).norm()) <= eps + EXACT * size * P * M
    lower = torch.where(wide.Y > 0, Z, -Z.abs())
    assert distance(narrow, lower) == pytest.approx(distance(wide, lower), rel=ROUNDING)


def test_the_relu_ball_is_wider() -> None:
    """A small positive output where the trained one is inactive is in it, and not in the Net-Trim set."""
    Y, Z = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.5]])
    assert distance(ReluBall(Y, 0.5), Z) == 0
    assert distance(NetTrimSet(Y, 0.5), Z) == 0.5


@pytest.mark.parametrize("kind", ["ball", "relu-ball"])
@given(seed=SEEDS)
def test_the_residual_of_a_boundary_point_is_normal_to_the_set(kind: str, seed: int) -> None:
    fit = some_fit(kind, seed, 0.5)
    Z = fit.prox(10 * gaussian(seed + 3, P, M), 1.0)
    h = fit.residual(Z)
    assert float(h.norm()) == pytest.approx(0.5)
    assert all(inner(h, feasible(fit, k) - Z) <= ROUNDING for k in range(5))


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


# The penalty


def weights(seed: int) -> Tensor:
    """Random weights ≥ 0, about a third of them 0."""
    return gaussian(seed, N, M).add(0.4).clamp(min=0)


@given(seed=SEEDS, step=st.sampled_from([0.01, 1.0, 10.0]))
def test_the_soft_threshold_is_optimal(seed: int, step: float) -> None:
    """V − T ∈ step·∂g(T): at most step·w, exactly step·w·sign(t) where t ≠ 0, so zeros are exact zeros."""
    w, V = weights(seed), 2 * gaussian(seed + 1, N, M)
    T = L1(w).prox(V, step)
    gap, bound = V - T, step * w
    assert bool((gap.abs() <= bound * (1 + EXACT)).all())
    torch.testing.assert_close(gap[T != 0], (bound * T.sign())[T != 0], rtol=ROUNDING, atol=EXACT)
    assert not T[V.abs() <= bound].any()
    torch.testing.assert_close(T[w == 0], V[w == 0])


@given(seed=SEEDS)
def test_moreaus_decomposition(seed: int) -> None:
    """V = prox_g(V) + projection onto {|a| ≤ w}, and g(prox) = ⟨prox, that projection⟩."""
    w, V = weights(seed), 2 * gaussian(seed + 1, N, M)
    T = L1(w).prox(V, 1.0)
    torch.testing.assert_close(V - T, V.clamp(-w, w), rtol=ROUNDING, atol=EXACT)
    assert inner(T, V - T) == pytest.approx(float(L1(w).value(T)), abs=ROUNDING)


@given(seed=SEEDS)
def test_the_dual_norm_is_the_polar(seed: int) -> None:
    """⟨a, u⟩ ≤ s(a)·g(u) for every u that is 0 on free entries, with equality for one of them."""
    w, A, U = weights(seed) + 0.01, gaussian(seed + 1, N, M), gaussian(seed + 2, N, M)
    w[0] = 0
    U[0] = 0
    s, g = L1(w).dual_norm(A), (w * U.abs()).sum(0)
    assert bool(((A * U).sum(0) <= s * g + ROUNDING).all())
    best = (A.abs() / w).masked_fill(w == 0, -1).argmax(0)
    torch.testing.assert_close(s, A.abs()[best, range(M)] / w[best, range(M)])


@given(seed=SEEDS)
def test_rescaled_penalties_charge_the_same(seed: int) -> None:
    """g of U is the rescaled penalty of V = diag(d) U, and both have the same dual norm."""
    g, d = L1(weights(seed)), gaussian(seed + 1, N, 1).exp()
    U, A = gaussian(seed + 2, N, M), gaussian(seed + 3, N, M)
    assert float(g.rescaled(d).value(d * U)) == pytest.approx(float(g.value(U)))
    torch.testing.assert_close(g.rescaled(d).dual_norm(A / d), g.dual_norm(A))
    torch.testing.assert_close(g.rescaled(d).cost((N, M)) * d, g.cost((N, M)))


@pytest.mark.parametrize("shape", [(1, 1), (N, 1), (1, M), (N, M)])
def test_weights_broadcast(shape: tuple[int, int]) -> None:
    g, U = L1(gaussian(0, *shape).abs()), gaussian(1, N, M)
    full = L1(g.w.expand(N, M).clone())
    g.check((N, M))
    assert float(g.value(U)) == pytest.approx(float(full.value(U)))
    assert torch.equal(g.prox(U, 0.3), full.prox(U, 0.3))
    assert torch.equal(g.dual_norm(U), full.dual_norm(U))
    assert torch.equal(g.cost((N, M)), full.w)


def test_a_free_bias_costs_nothing() -> None:
    g, U = L1.free_bias(N), gaussian(0, N, M)
    assert float(g.value(U)) == pytest.approx(float(U[:-1].abs().sum()))
    torch.testing.assert_close(g.prox(U, 100.0)[-1], U[-1])
    assert g.cost((N, M))[-1].count_nonzero() == 0


# The reference formulation


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

    @property
    def Y(self) -> Tensor:
        return super().Y.to("meta")

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
    "X objects": (lambda: program(np.array([[object()]])), InvalidInput, "numeric array, found ndarray"),
    "eps < 0": (lambda: ReluBall(Y, -0.1), InvalidTolerance, "eps: expected a finite number ≥ 0, found -0.1"),
    "eps NaN": (lambda: NetTrimSet(Y, math.nan), InvalidTolerance, "eps.*nan"),
    "eps inf": (lambda: Ball(Y, math.inf), InvalidTolerance, "eps.*inf"),
    "eps text": (lambda: Ball(Y, "small"), InvalidTolerance, "eps: expected a number ≥ 0, found 'small'"),  # type: ignore[arg-type]
    "eps nothing": (lambda: Ball(Y, None), InvalidTolerance, "found None"),  # type: ignore[arg-type]
    "eps a vector": (lambda: Ball(Y, torch.ones(2)), InvalidTolerance, "eps"),  # type: ignore[arg-type]
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
