"""Every solver on every program of the zoo: they agree with one another, with known optima and with every bound."""

from collections.abc import Callable
from functools import cache

import pytest
import torch
from tolerances import AGREEMENT, FEASIBLE, KKT, ROUNDING
from zoo import (
    CLOSING,
    FITS,
    MEMBERS,
    NAMES,
    ZOO,
    badly_scaled,
    build,
    free_bias,
    gaussian,
    infeasible_ceiling,
    large_units,
    multipliers,
    no_slack,
    tight,
    weighted,
)

from convexprune.solvers import LayerProgram, Status, certify, crosscheck, solve
from convexprune.solvers.crosscheck import Crosscheck

SOLVERS = ("admm", "clarabel", "scs")
PAIRS = [name.removeprefix("relu-ball ") for name in NAMES if name.startswith("relu-ball ")]


@cache
def checked(name: str) -> Crosscheck:
    return crosscheck(build(name), SOLVERS)


def test_names_are_unique() -> None:
    assert len(MEMBERS) == len(ZOO) > 60


@pytest.mark.parametrize("name", NAMES)
def test_all_solvers_are_certified_and_agree(name: str) -> None:
    rows = checked(name).rows
    assert [row.status for row in rows] == ["solved"] * len(SOLVERS), str(checked(name))
    assert checked(name).disagreement <= AGREEMENT


@pytest.mark.parametrize("name", NAMES)
def test_no_bound_exceeds_a_value(name: str) -> None:
    """Weak duality, across solvers; FEASIBLE is what a slightly infeasible point may gain."""
    rows = checked(name).rows
    highest, lowest = max(row.bound for row in rows), min(row.value for row in rows)
    assert highest <= lowest + FEASIBLE * max(row.scale for row in rows)


@pytest.mark.parametrize("name", NAMES)
def test_random_multipliers_never_bound_above_the_optimum(name: str) -> None:
    """Weak duality on every member, for noise of any sign, for the targets with noise, and near the optimum."""
    program, lowest = build(name), min(checked(name).rows, key=lambda row: row.value)
    zero, best = torch.zeros(program.shape), solve(program, tol=1e-2, feas_tol=1e-3).multipliers
    assert best is not None
    for seed in range(8):
        noise = gaussian(seed, *program.fit.shape)
        for L in (noise, noise.abs(), noise - program.fit.Y, best * (1 + 0.1 * noise), best + best.std() * noise):
            assert certify(program, zero, L).bound <= lowest.value + FEASIBLE * lowest.scale


@pytest.mark.parametrize("name", [member.name for member in ZOO if member.optimum is not None])
def test_known_optima_are_found(name: str) -> None:
    optimum = MEMBERS[name].optimum
    assert optimum is not None
    for row in checked(name).rows:
        assert row.value == pytest.approx(optimum, abs=AGREEMENT * row.scale)
        assert row.bound <= optimum + ROUNDING * row.scale


@pytest.mark.parametrize("name", PAIRS)
def test_the_relu_ball_never_costs_more_than_net_trim(name: str) -> None:
    """It contains the Net-Trim set of the same X, Y and eps."""
    wide, narrow = checked(f"relu-ball {name}").rows[0], checked(f"net-trim {name}").rows[0]
    programs = build(f"relu-ball {name}"), build(f"net-trim {name}")
    assert torch.equal(programs[0].inputs, programs[1].inputs)
    assert torch.equal(programs[0].fit.Y, programs[1].fit.Y)
    assert wide.value <= narrow.value + AGREEMENT * narrow.scale
    assert wide.bound <= narrow.value + FEASIBLE * narrow.scale


@pytest.mark.parametrize("name", CLOSING)
def test_admm_leaves_exact_zeros(name: str) -> None:
    """Complementary slackness: no weight where the dual constraint is slack, here to the last bit."""
    solution, program = tight(name), build(name)
    A = program.inputs.T @ multipliers(solution)
    slack = A.abs() < (1 - KKT) * program.penalty.cost(program.shape)
    assert not solution.weights[slack].any()
    assert solution.nonzeros == int((solution.weights != 0).sum())
    assert solution.nonzeros < solution.weights.numel()


@pytest.mark.parametrize("fit", FITS)
def test_dead_inputs_get_no_weight(fit: str) -> None:
    assert not solve(build(f"{fit} dead_inputs")).weights[[0, 3, 7]].any()


@pytest.mark.parametrize("solver", SOLVERS)
def test_an_impossible_ceiling_is_never_solved(solver: str) -> None:
    solution = solve(infeasible_ceiling(), solver)
    assert solution.status in {Status.INFEASIBLE, Status.FAILED}
    assert (solution.status is Status.INFEASIBLE) == (solver == "admm") == solution.certificate.infeasible


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("build_", [badly_scaled, free_bias, weighted, large_units])
def test_feasible_programs_are_never_called_infeasible(
    fit: str, dtype: torch.dtype, build_: Callable[[str], LayerProgram]
) -> None:
    """Not even for weights as far off as zero: the claim is about every weight of a sensible size."""
    program = build_(fit)
    solution = solve(program)
    for weights in (0 * solution.weights, 1e-3 * solution.weights, gaussian(0, *program.shape)):
        assert not certify(program.to(dtype), weights, solution.multipliers).infeasible


@pytest.mark.parametrize("fit", ["relu-ball", "net-trim"])
def test_no_slack_at_all(fit: str) -> None:
    """eps = 0 with few active samples, a degenerate linear program: ADMM may take longer, it may not claim too much."""
    ours, *conic = crosscheck(no_slack(fit), SOLVERS).rows
    assert [row.status for row in conic] == ["solved"] * len(conic)
    assert ours.status in ("solved", "iteration limit")
    assert ours.bound <= conic[0].value * (1 + AGREEMENT)
    assert ours.value == pytest.approx(conic[0].value, rel=1e-2)


def test_a_crosscheck_names_those_that_refuse() -> None:
    check = crosscheck(build("relu-ball one_column"), ("admm", "published"))
    assert check.rows[1].status.startswith("refused: ")
    assert check.disagreement == float("inf")
    assert check.to_dict()["rows"][0]["status"] == "solved"
    assert all(name in str(check) for name in ("admm", "published", "disagreement"))
