"""Backends on conic forms of our own: the form's optimality conditions, agreement with cvxpy, limits, warm starts."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from tolerances import AGREEMENT, EXACT, KKT, OPTIMUM, REFERENCE, ROUNDING
from torch import Tensor
from zoo import gaussian, multipliers

from convexprune.solvers import (
    L1,
    Ball,
    LayerProgram,
    NetTrimSet,
    ReluBall,
    Solution,
    Status,
    TopK,
    certify,
    solve,
)
from convexprune.solvers.errors import InvalidInput, SolverRefused, UnknownOption
from convexprune.solvers.methods import Start, conic, direct
from convexprune.solvers.methods.conic import ConicForm, conic_forms, separable
from convexprune.solvers.methods.direct import Direct, Root
from convexprune.solvers.methods.packages import OSQP, SCS, Clarabel
from convexprune.solvers.methods.registry import make_solver
from convexprune.solvers.programs import Gram, GroupL2, NetTrimLoss, ReluLoss, SquaredLoss
from convexprune.solvers.testing import zoo

P, N, M = 30, 7, 4
X = gaussian(0, P, N).clamp(min=0)
X[:, -1] = 1
Z = X @ gaussian(1, N, M)
Z[:, 0] = -Z[:, 0].abs()  # a neuron that is never active
Y = Z.clamp(min=0)
CEILING = Z.clamp(max=0) + 0.1
RADII = 0.2 * Y.norm(dim=0)
W = gaussian(2, N, M).abs()
W[W < 0.4] = 0
LABELS = torch.arange(N)[:, None] // 3 + 3 * torch.arange(M)  # blocks of inputs of a neuron
ACROSS = torch.arange(N * M).reshape(N, M) % 5  # every block spans all neurons

FITS: dict[str, Callable[[], Any]] = {
    "ball": lambda: Ball(Z, 0.2 * float(Z.norm())),
    "balls": lambda: Ball(Z, 0.2 * Z.norm(dim=0)),
    "loss": lambda: SquaredLoss(Z, 0.4),
    "relu ball": lambda: ReluBall(Y, 0.2 * float(Y.norm())),
    "relu balls, none for the first": lambda: ReluBall(Y, RADII),
    "relu loss": lambda: ReluLoss(Y, 0.4),
    "net-trim": lambda: NetTrimSet(Y, 0.2 * float(Y.norm())),
    "net-trim balls, a ceiling": lambda: NetTrimSet(Y, RADII, CEILING),
    "net-trim loss, a ceiling": lambda: NetTrimLoss(Y, 0.4, CEILING),
    "net-trim, eps 0": lambda: NetTrimSet(Y, 0.0),
}
PENALTIES: dict[str, Callable[[], Any]] = {
    "l1": L1,
    "l1 with zeros": lambda: L1(W),
    "rows": GroupL2,
    "weighted columns": lambda: GroupL2("columns", torch.tensor([1.0, 0.5, 2.0, 0.0])),
    "labels": lambda: GroupL2(LABELS, torch.rand(12, generator=torch.Generator().manual_seed(0)) + 0.1),
    "labels across": lambda: GroupL2(ACROSS),
}
PAIRS = [(fit, penalty) for fit in FITS for penalty in PENALTIES]
LOSSES = [fit for fit in FITS if "loss" in fit]
TIGHT = {"tol": 1e-7, "feas_tol": 1e-7}


@cache
def build(fit: str, penalty: str = "l1") -> LayerProgram:
    return LayerProgram(X, FITS[fit](), PENALTIES[penalty]())


@cache
def reference(fit: str, penalty: str = "l1") -> Solution:
    """cvxpy's own formulation, solved as far as its interior point method gets."""
    settings = dict.fromkeys(("tol_gap_abs", "tol_gap_rel", "tol_feas"), 1e-11)
    return solve(build(fit, penalty), "cvxpy", backend="CLARABEL", settings=settings)


# Agreement


@pytest.mark.parametrize(("fit", "penalty"), PAIRS)
def test_clarabel_and_the_reference_agree(fit: str, penalty: str) -> None:
    """Certified alike to seven digits: with multipliers of the wrong sign or scale the gap could not close."""
    solution = solve(build(fit, penalty), "clarabel", **TIGHT)
    assert solution.status is Status.SOLVED
    expected = reference(fit, penalty).certificate
    assert solution.certificate.value == pytest.approx(expected.value, rel=REFERENCE)
    assert solution.certificate.bound <= expected.value * (1 + OPTIMUM)


@pytest.mark.parametrize(("fit", "penalty"), PAIRS)
def test_scs_and_the_reference_agree(fit: str, penalty: str) -> None:
    solution = solve(build(fit, penalty), "scs")
    assert solution.status is Status.SOLVED
    assert solution.certificate.value == pytest.approx(reference(fit, penalty).certificate.value, rel=AGREEMENT)


@pytest.mark.parametrize("fit", LOSSES)
@pytest.mark.parametrize("penalty", ["l1", "l1 with zeros"])
def test_osqp_and_the_reference_agree(fit: str, penalty: str) -> None:
    solution = solve(build(fit, penalty), "osqp", **TIGHT)
    assert solution.status is Status.SOLVED
    assert solution.certificate.value == pytest.approx(reference(fit, penalty).certificate.value, rel=REFERENCE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("solver", "fit"),
    [("clarabel", "ball"), ("scs", "relu balls, none for the first"), ("osqp", "net-trim loss, a ceiling")],
)
def test_low_precision_data_are_solved_in_double(solver: str, fit: str, dtype: torch.dtype) -> None:
    solution = solve(build(fit).to(dtype), solver)
    assert solution.status is Status.SOLVED
    assert solution.weights.dtype == torch.float64


@pytest.mark.parametrize("solver", ["clarabel", "scs"])
def test_a_gram_is_a_program_like_any_other(solver: str) -> None:
    gram = Gram.of([(X[:17], Z[:17]), (X[17:], Z[17:])], torch.float64)
    solution = solve(LayerProgram(gram, Ball(gram, 0.2 * float(Z.norm()))), solver)
    assert solution.status is Status.SOLVED
    assert solution.certificate.value == pytest.approx(reference("ball").certificate.value, rel=AGREEMENT)


# The conic form


def violations(form: ConicForm, x: Any, y: Any, s: Any) -> dict[str, float]:
    """How far x, y and s are from each optimality condition of the conic program."""

    def outside(v: Any, dual: bool) -> float:
        ends = np.cumsum([form.zero, form.nonneg, *form.cones])[:-1]
        zero, nonneg, *cones = np.split(v, ends)
        far = [0.0 if dual else np.abs(zero).max(initial=0.0), -nonneg.min(initial=0.0)]
        return float(max(far + [np.linalg.norm(cone[1:]) - cone[0] for cone in cones]))

    return {
        "equations": float(np.abs(form.A @ x + s - form.b).max()),
        "s in the cone": outside(s, dual=False),
        "y in the dual cone": outside(y, dual=True),
        "stationarity": float(np.abs(form.P @ x + form.q + form.A.T @ y).max()),
        "complementarity": abs(float(s @ y)),
    }


@pytest.mark.parametrize(("fit", "penalty"), PAIRS)
def test_the_optimum_of_the_program_is_that_of_its_conic_form(fit: str, penalty: str) -> None:
    """The table in conic.py, from weights and multipliers to x, y and s, meets every optimality condition."""
    program, known = build(fit, penalty), reference(fit, penalty)
    L = program.fit.project_dual(multipliers(known))
    for part, form in conic_forms(program):
        point = form.start(known.weights[:, part].numpy(), L[:, part].numpy())
        assert max(violations(form, *point).values()) <= KKT * (1 + known.certificate.value)


@pytest.mark.parametrize(("fit", "penalty"), PAIRS)
@pytest.mark.parametrize("seed", range(3))
def test_the_conic_form_has_the_values_and_the_set_of_the_program(fit: str, penalty: str, seed: int) -> None:
    """For any U: the objective is the value up to the loss's constant, and s is in the cone where XU is in the set."""
    program = build(fit, penalty)
    U = gaussian(seed, N, M) if seed else reference(fit, penalty).weights
    objective, far = 0.0, 0.0
    for part, form in conic_forms(program):
        x, _, s = form.start(U[:, part].numpy(), None)
        o = form.outputs
        objective += x @ (form.P @ x) / 2 + form.q @ x + o.weight * float((o.two_sided * o.anchor**2).sum()) / 2
        far = max(far, violations(form, x, 0 * s, s)["s in the cone"])
    certificate = certify(program, U)
    assert objective == pytest.approx(certificate.value, rel=ROUNDING)
    assert (far <= 1e-6) == (certificate.violation <= 1e-6)


@pytest.mark.parametrize(("fit", "penalty"), PAIRS)
def test_weights_and_multipliers_come_back_as_they_were_put_in(fit: str, penalty: str) -> None:
    program, U = build(fit, penalty), gaussian(0, N, M)
    L = program.fit.project_dual(gaussian(1, P, M))
    for part, form in conic_forms(program):
        x, y, _ = form.start(U[:, part].numpy(), L[:, part].numpy())
        o = form.outputs
        expected = L[:, part].numpy()
        if o.weight:  # a loss has no rows for two-sided outputs: their multipliers are its gradient
            expected = np.where(o.two_sided, o.weight * (o.X @ form.weights(x) - o.anchor), expected)
        assert np.array_equal(form.weights(x), U[:, part].numpy())
        assert np.allclose(form.multipliers(y), expected, atol=EXACT)


def test_programs_separate_where_nothing_spans_neurons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conic, "_ENTRIES", 1)
    for fit, penalty in PAIRS:
        whole = fit in ("ball", "relu ball", "net-trim", "net-trim, eps 0")
        expected = not whole and penalty not in ("rows", "labels across")
        assert separable(build(fit, penalty)) == expected
        assert len(conic_forms(build(fit, penalty))) == (M if expected else 1)


@pytest.mark.parametrize("solver", ["clarabel", "scs", "osqp"])
@pytest.mark.parametrize("together", [1, 2, M])
def test_neurons_may_be_solved_one_by_one_or_together(
    solver: str, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conic, "_ENTRIES", together * P * N)
    solution = solve(build("net-trim loss, a ceiling"), solver, **TIGHT)
    assert solution.provenance["effective"]["programs"] == -(-M // together)
    expected = reference("net-trim loss, a ceiling").certificate.value
    assert solution.certificate.value == pytest.approx(expected, rel=REFERENCE)


# Transformations before it


@pytest.mark.parametrize("fit", ["ball", "balls", "loss"])
def test_a_linear_layer_needs_no_more_samples_than_inputs(fit: str) -> None:
    """The root's certificate is the program's, for any weights and multipliers, and for those that came back."""
    noisy = LayerProgram(X, build(fit).fit.map(lambda A: A + gaussian(5, P, M)))
    root = Root.of(noisy)
    assert root is not None
    assert root.program.samples == N + 1
    U, L = gaussian(3, N, M), gaussian(4, N + 1, M)
    back = root.undo_multipliers(L)
    assert torch.allclose(root.apply_multipliers(back), L, atol=EXACT)
    for small, large in ((L, back), (L * 1e-3, back * 1e-3)):
        one, other = certify(root.program, U, small), certify(noisy, U, large)
        assert one.value == pytest.approx(other.value, rel=ROUNDING)
        assert one.bound == pytest.approx(other.bound, rel=ROUNDING)
        assert one.violation == pytest.approx(other.violation, rel=1e-6, abs=1e-9)


def test_other_programs_and_short_ones_keep_their_samples() -> None:
    assert Root.of(build("relu ball")) is None
    assert Root.of(LayerProgram(X[: N + 1], Ball(Z[: N + 1], 0.1))) is None


def test_targets_in_the_span_of_the_inputs_leave_no_rest() -> None:
    root = Root.of(build("ball"))
    assert root is not None
    assert not root.rest.any()


@pytest.mark.parametrize("fit", ["loss", "relu loss"])
def test_weights_that_cannot_be_in_the_optimum_are_not_in_the_references(fit: str) -> None:
    prices = 10 ** (3 * gaussian(7, N, M))
    program = LayerProgram(X, FITS[fit](), L1(prices))
    cheaper, left = direct._affordable(program)
    assert left is not None
    assert 0 < int((~left).sum()) < N * M
    before, after = (solve(p, "cvxpy", tol=1e-8, feas_tol=1e-8) for p in (program, cheaper))
    assert after.certificate.value == pytest.approx(before.certificate.value, rel=REFERENCE)
    assert float(before.weights[~left].abs().max()) <= 1e-6
    for solver in ("clarabel", "scs", "osqp"):
        solution = solve(program, solver)
        assert solution.status is Status.SOLVED
        assert not solution.weights[~left].any()


# What has no solution, exact zeros, many digits


@pytest.mark.parametrize("weight", [1.0, 100.0])
@pytest.mark.parametrize("solver", ["clarabel", "scs", None])
def test_ceilings_that_no_weights_keep_are_proven_so_for_a_loss(solver: str | None, weight: float) -> None:
    """Its ray has no part in the outputs that the loss looks at."""
    rng = torch.Generator().manual_seed(4)
    X, Y = (torch.randn(20, n, generator=rng, dtype=torch.float64) for n in (5, 3))
    program = LayerProgram(X, NetTrimSet(Y.clamp(min=0), 1.0, ceiling=-1.0).as_loss(weight))
    solution = solve(program, solver)
    assert solution.status is Status.INFEASIBLE
    if solver == "clarabel":
        assert solution.iterations < 20


@pytest.mark.parametrize(
    "name", ["relu-ball plain 60x30x40", "net-trim weighted", "squared-loss columns", "ball blocks"]
)
def test_many_digits_and_exact_zeros(name: str) -> None:
    program = zoo.program(name)
    solution = solve(program, "clarabel", tol=1e-7, feas_tol=1e-8)
    assert solution.status is Status.SOLVED
    assert solution.iterations <= 30
    first_order = solve(program, tol=1e-5)
    assert solution.nonzeros <= 1.05 * first_order.nonzeros
    assert solution.certificate.value == pytest.approx(first_order.certificate.value, rel=1e-4)


@pytest.mark.parametrize("share", [1e-5, 1e-9, 1e-11])
def test_losses_with_next_to_no_penalty(share: float) -> None:
    """More inputs than samples: multipliers are no small difference times a large weight."""
    rng = torch.Generator().manual_seed(0)
    X, Y = (torch.randn(20, n, generator=rng, dtype=torch.float64) for n in (40, 3))
    program = LayerProgram(X, SquaredLoss(Y, 1 / (share * float((X.T @ Y).abs().max()))))
    solution = solve(program, "clarabel", tol=1e-6)
    assert solution.status is Status.SOLVED
    exact = solve(LayerProgram(X, Ball(Y, 0.0)), "clarabel", tol=1e-6).certificate.value
    assert solution.certificate.value == pytest.approx(exact, rel=1e-4)


# Warm starts


@pytest.mark.parametrize(("solver", "fit"), [("scs", fit) for fit in FITS] + [("osqp", fit) for fit in LOSSES])
def test_a_warm_start_saves_iterations(solver: str, fit: str) -> None:
    program, known = build(fit), reference(fit)
    # No tighter than the reference itself is known: beyond that, a start from it is as far off as any other.
    settings = {"eps_abs": 1e-6, "eps_rel": 1e-6} | ({"check_termination": 5} if solver == "osqp" else {})
    start = Start(known.weights, program.fit.project_dual(multipliers(known)))
    cold, warm = (solve(program, solver, start=origin, settings=settings) for origin in (None, start))
    assert warm.iterations < cold.iterations
    assert cold.provenance["effective"]["start"] == "none given"
    assert warm.provenance["effective"]["start"] == "weights and multipliers"
    only = solve(program, solver, start=known.weights).provenance["effective"]["start"]
    assert only == "weights"


def test_a_backend_without_warm_starts_says_so() -> None:
    told = solve(build("ball"), "clarabel", start=reference("ball")).provenance["effective"]
    assert told["start"] == "not used: Clarabel has no warm start"
    assert solve(build("ball"), "clarabel").provenance["effective"]["start"] == "none given"


# Limits, settings, rounds


@pytest.mark.parametrize("solver", ["clarabel", "scs", "osqp"])
@pytest.mark.parametrize("max_iter", [1, 3])
def test_the_iteration_limit_holds_over_all_neurons(solver: str, max_iter: int) -> None:
    solution = solve(build("relu loss"), solver, max_iter=max_iter)
    assert solution.status is Status.ITERATION_LIMIT
    assert solution.iterations <= max_iter
    assert solution.certificate.bound >= 0


def test_rounds_go_on_until_the_certificate_closes() -> None:
    """Each ten times as accurate, from where the last one ended; the iteration limit is for all of them together."""
    solver, name = "scs", "net-trim badly_scaled"
    solution = solve(zoo.program(name), solver)
    rounds = solution.provenance["effective"]["rounds"]
    assert solution.status is Status.SOLVED
    assert rounds > 1
    *others, last = [point.gap > 1e-4 or point.violation > 1e-5 for point in solution.trace]
    assert all(others)
    assert not last
    assert len({point.iteration for point in solution.trace}) == rounds  # some rounds show two multipliers
    limit = solution.iterations - 1
    limited = solve(zoo.program(name), solver, max_iter=limit)
    assert limited.iterations <= limit
    stopped = solve(zoo.program(name), solver, callback=lambda point: True)
    assert (stopped.status, len(stopped.trace)) == (Status.STOPPED, 1)


@pytest.mark.parametrize("solver", ["clarabel", "scs", "osqp"])
def test_the_time_limit_ends_it(solver: str) -> None:
    solution = solve(build("relu loss"), solver, time_limit=1e-6)
    assert solution.status is Status.TIME_LIMIT
    assert solution.weights.shape == (N, M)


@pytest.mark.parametrize("wanted", [0.0, 1e-12, 1e-5, 1.0])
def test_clarabel_begins_anew_with_less_regularisation(wanted: float) -> None:
    """First as accurate as is asked for and usual; then as far as arithmetic goes."""
    first, *others = Clarabel().rounds(wanted)
    assert 1e-10 <= first["tol_feas"] <= max(wanted, 1e-10)
    assert "static_regularization_constant" not in first
    shifts = [step["static_regularization_constant"] for step in others]
    assert shifts == sorted(shifts, reverse=True)
    assert all(step["tol_feas"] < 1e-10 for step in others)


@pytest.mark.parametrize("solver", ["scs", "osqp"])
@pytest.mark.parametrize("wanted", [0.0, 1e-12, 1e-5, 1.0])
def test_accuracies_grow_by_tens_within_reach_of_double_precision(solver: str, wanted: float) -> None:
    method = make_solver(solver, {})[1]
    assert isinstance(method, Direct)
    steps = [step["eps_abs"] for step in method.rounds(wanted)]
    assert steps[-1] >= 1e-10
    assert steps[0] <= max(wanted, 1e-10)
    assert all(fine == pytest.approx(coarse / 10) for coarse, fine in pairwise(steps))


@pytest.mark.parametrize("solver", ["clarabel", "scs", "osqp"])
def test_an_accuracy_of_the_callers_is_final(solver: str) -> None:
    settings: dict[str, Any] = dict.fromkeys(("eps_abs", "eps_rel", "tol_gap_abs", "tol_gap_rel", "tol_feas"), 1e-2)
    settings |= {"polishing": False, "linear_solver": "qdldl"}
    known = make_solver(solver, {})[1].known()  # type: ignore[attr-defined]
    settings = {name: value for name, value in settings.items() if name in known}
    solution = solve(build("relu loss"), solver, settings=settings)
    assert solution.provenance["effective"]["settings"] == settings
    assert solution.provenance["effective"]["rounds"] == 1
    assert json.dumps(solution.to_dict()["provenance"])


NAMES = {"clarabel": "tol_gap_abs", "scs": "eps_abs", "osqp": "polishing"}
BAD = {"clarabel": {"max_iter": "many"}, "scs": {"eps_abs": -1.0}, "osqp": {"alpha": 7.0}}


@pytest.mark.parametrize("solver", NAMES)
def test_unknown_settings_are_named_with_the_known_ones(solver: str) -> None:
    with pytest.raises(UnknownOption, match=f"{solver} has no 'digits'. It has: .*{NAMES[solver]}"):
        solve(build("relu loss"), solver, settings={"digits": 9})


@pytest.mark.parametrize("solver", NAMES)
def test_every_setting_in_use_is_known(solver: str) -> None:
    method = make_solver(solver, {})[1]
    assert isinstance(method, Direct)
    used = {name for step in method.rounds(1e-5) for name in step} | set(method.limits)
    assert used <= set(method.known())


def test_scs_takes_every_setting_that_is_said_to_be_known() -> None:
    """A value of no sensible kind is refused for what it is, not for its name."""
    import scs
    from scipy import sparse

    data = {"A": sparse.csc_matrix([[1.0]]), "b": np.ones(1), "c": np.ones(1)}
    for name in SCS().known():
        with pytest.raises((TypeError, ValueError, KeyError)) as caught:
            scs.SCS(data, {"l": 1}, **{name: complex(1)})
        assert "invalid keyword" not in str(caught.value), name


@pytest.mark.parametrize("solver", BAD)
def test_bad_values_of_settings_are_refused(solver: str) -> None:
    with pytest.raises(InvalidInput, match=f"{solver} does not take them"):
        solve(build("relu loss"), solver, settings=BAD[solver])


@pytest.mark.parametrize("solver", NAMES)
def test_versions_and_set_up_are_recorded(solver: str) -> None:
    solution = solve(build("relu loss"), solver)
    assert {solver, "scipy"} <= solution.provenance["versions"].keys()
    assert 0 < solution.seconds.setup < solution.seconds.total


# Refusals


class Wider(ReluBall):
    """A stranger's set in the clothes of one of ours."""

    def distance(self, sums: Tensor) -> float:
        return 0.5 * super().distance(sums)


@dataclass(frozen=True, eq=False)
class Doubled(L1):
    """A stranger's penalty that has inherited from one of ours."""

    def value(self, U: Tensor) -> Tensor:
        return 2 * super().value(U)


REFUSED: dict[str, tuple[str, Callable[[], LayerProgram], str]] = {
    "fit": (
        "clarabel",
        lambda: LayerProgram(X, Wider(Y, 1.0)),
        "fits of this library, not for Wider; the solver 'cvxpy' takes any",
    ),
    "penalty": ("scs", lambda: LayerProgram(X, Ball(Z, 1.0), Doubled()), "for L1 and GroupL2, not for Doubled"),
    "budget": ("clarabel", lambda: LayerProgram(X, Ball(Z, 1.0), TopK(5)), "TopK is not convex"),
    "ball": ("osqp", lambda: build("relu ball"), "the ball of ReluBall is a second-order cone; it takes SquaredLoss"),
    "group": ("osqp", lambda: build("loss", "rows"), "GroupL2 needs cones; it takes L1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_have_reasons(case: str) -> None:
    solver, program, reason = REFUSED[case]
    with pytest.raises(SolverRefused, match=reason):
        solve(program(), solver)


@pytest.mark.parametrize("method", [SCS(), OSQP()])
def test_a_backend_gives_exact_multipliers_of_one_sided_outputs(method: Direct) -> None:
    """Λ ≥ 0 there up to the backend's accuracy, and Λ is not zero: the bound is not the trivial one."""
    program = build("relu loss")
    solution = solve(program, method)
    L = multipliers(solution)
    assert float(L[~program.fit.unrestricted()].min()) >= -AGREEMENT * float(L.abs().max())
    assert solution.certificate.bound > 0.9 * solution.certificate.value
