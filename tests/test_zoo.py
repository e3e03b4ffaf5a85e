"""Every solver on every program of the zoo: they agree with one another, with known optima and with every bound."""

from collections.abc import Callable
from functools import cache

import pytest
import torch
from tolerances import AGREEMENT, FEASIBLE, ROUNDING
from zoo import FITS, MEMBERS, NAMES, badly_scaled, build, free_bias, gaussian, large_units, no_slack, weighted

from convexprune.solvers import LayerProgram, Status, certify, crosscheck, solve
from convexprune.solvers.errors import InvalidInput
from convexprune.solvers.methods.solve import Crosscheck
from convexprune.solvers.testing import zoo

CONIC = ("clarabel", "scs")
PAIRS = [name.removeprefix("relu-ball ") for name in NAMES if f"net-trim {name.removeprefix('relu-ball ')}" in MEMBERS]


@cache
def checked(name: str) -> Crosscheck:
    """ADMM's answer first, then that of a conic solver: Clarabel, for every third member SCS."""
    return crosscheck(build(name), ("admm", CONIC[NAMES.index(name) % 3 == 0]))


def test_names_are_unique_and_every_member_has_a_reference() -> None:
    names = [member.name for member in (*zoo.members(), *zoo.infeasible(), *zoo.budgets())]
    assert len(set(names)) == len(names) > 190
    assert all(member.reference is not None for member in zoo.members())


def test_kinds_divide_the_members() -> None:
    assert sorted(m.name for kind in zoo.KINDS for m in zoo.members(kind)) == sorted(NAMES)
    assert {m.name for m in zoo.representative()} < set(NAMES)


@pytest.mark.parametrize("call", [lambda: zoo.members("plane"), lambda: zoo.member("relu-ball plane")])
def test_what_the_zoo_does_not_have_is_refused(call: Callable[[], object]) -> None:
    with pytest.raises(InvalidInput, match=r"found 'plane'|no member 'relu-ball plane'"):
        call()


@pytest.mark.parametrize("name", NAMES)
def test_all_solvers_are_certified_and_agree_with_the_reference(name: str) -> None:
    """The reference is a closed form, or was computed once by another method; a known optimum is hit more exactly."""
    reference, optimum = MEMBERS[name].reference, MEMBERS[name].optimum
    assert reference is not None
    for row in checked(name).rows:
        assert row.status == "solved", str(checked(name))
        assert row.value == pytest.approx(reference, abs=2 * AGREEMENT * row.scale)
        assert row.bound <= reference + FEASIBLE * row.scale
        if optimum is not None:
            assert row.value == pytest.approx(optimum, abs=AGREEMENT * row.scale)
            assert row.bound <= optimum + ROUNDING * row.scale


@pytest.mark.parametrize("name", NAMES)
def test_random_multipliers_never_bound_above_the_optimum(name: str) -> None:
    """Weak duality on every member, for noise of any sign, for the targets with noise, and near the optimum."""
    program, reference = build(name), MEMBERS[name].reference
    assert reference is not None
    zero, best = torch.zeros(program.shape), solve(program, max_iter=30).multipliers
    assert best is not None
    unit = certify(program, zero).scale
    noise = gaussian(0, *program.fit.shape)
    for L in (noise, noise.abs(), noise - program.fit.Y, best * (1 + 0.1 * noise), best + best.std() * noise):
        assert certify(program, zero, L).bound <= reference + FEASIBLE * max(reference, unit)


@pytest.mark.parametrize("name", PAIRS)
def test_the_relu_ball_never_costs_more_than_net_trim(name: str) -> None:
    """It contains the Net-Trim set of the same X, Y and eps."""
    wide, narrow = checked(f"relu-ball {name}").rows[0], checked(f"net-trim {name}").rows[0]
    programs = build(f"relu-ball {name}"), build(f"net-trim {name}")
    torch.testing.assert_close(programs[0].inputs, programs[1].inputs, rtol=ROUNDING, atol=ROUNDING)
    torch.testing.assert_close(programs[0].fit.Y, programs[1].fit.Y, rtol=ROUNDING, atol=ROUNDING)
    assert wide.value <= narrow.value + AGREEMENT * narrow.scale
    assert wide.bound <= narrow.value + FEASIBLE * narrow.scale


@pytest.mark.parametrize("fit", FITS)
def test_dead_inputs_get_no_weight(fit: str) -> None:
    assert not solve(build(f"{fit} dead_inputs")).weights[[0, 3, 7]].any()


@pytest.mark.parametrize("name", [member.name for member in zoo.infeasible()])
def test_impossible_programs_are_proven_so(name: str) -> None:
    """By the multipliers of our own ADMM that grow without end, and by the rays that conic solvers find."""
    for solver in ("admm", *CONIC):
        solution = solve(zoo.program(name), solver)
        assert solution.status is Status.INFEASIBLE
        assert solution.certificate.infeasible


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("build_", [badly_scaled, free_bias, weighted, large_units])
def test_feasible_programs_are_never_called_infeasible(fit: str, build_: Callable[[str], LayerProgram]) -> None:
    """Not even for weights as far off as zero: the claim is about every weight of a sensible size."""
    program = build_(fit)
    solution = solve(program)
    for dtype in (torch.float32, torch.float64):
        for weights in (0 * solution.weights, 1e-3 * solution.weights, gaussian(0, *program.shape)):
            assert not certify(program.to(dtype), weights, solution.multipliers).infeasible


def test_no_slack_at_all() -> None:
    """eps = 0 with few active samples, a degenerate linear program: ADMM may take longer, it may not claim too much."""
    program = no_slack("relu-ball")
    ours, conic = solve(program, max_iter=3000).certificate, crosscheck(program, CONIC).rows
    assert [row.status for row in conic] == ["solved"] * len(conic)
    assert ours.bound <= conic[0].value * (1 + AGREEMENT)
    assert ours.value == pytest.approx(conic[0].value, rel=1e-2)


def test_a_crosscheck_names_those_that_refuse() -> None:
    check = crosscheck(build("relu-ball one_column"), ("admm", "published"))
    assert check.rows[1].status.startswith("refused: ")
    assert check.disagreement == float("inf")
    assert check.to_dict()["rows"][0]["status"] == "solved"
    assert all(name in str(check) for name in ("admm", "published", "disagreement"))


def test_a_crosscheck_without_the_extra_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Solvers that are not installed have no figures in the table, and the command that installs them below it."""
    monkeypatch.setattr("convexprune.solvers.methods.direct.find_spec", lambda _name: None)
    for solvers in (("admm", "clarabel", "scs"), ("clarabel",)):
        check = crosscheck(build("relu-ball one_column"), solvers)
        assert [row.status.split(":")[0] for row in check.rows[-1:]] == ["missing"]
        lines = str(check).splitlines()
        assert not any("inf" in line.split() for line in lines)
        assert sum('pip install "convexprune[reference]"' in line for line in lines) == len(solvers) - (
            "admm" in solvers
        )
