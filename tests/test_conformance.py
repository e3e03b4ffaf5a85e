"""The conformance kit: our solvers keep the protocol, and solvers that do not are found out."""

import json
import time
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch

from convexprune.solvers import LayerProgram, available, testing
from convexprune.solvers.errors import SolverRefused
from convexprune.solvers.methods import Proposal, Start
from convexprune.solvers.methods.admm import ADMM
from convexprune.solvers.methods.interface import Limits, Watch
from convexprune.solvers.testing import Candidate, NotConforming, kit, zoo

SOLVERS = [name for name, info in available().items() if info.missing is None]
CHECKS = testing.checks(zoo.representative())
PUBLISHED = {"tol": 1e-3, "feas_tol": 1e-4}
"""Its own rule ends it at a gap just above 1e-4."""


@cache
def candidate(solver: str) -> Candidate:
    return Candidate(solver, **(PUBLISHED if solver == "published" else {}))


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("check", CHECKS, ids=str)
def test_our_solvers_conform(solver: str, check: testing.Check) -> None:
    check(candidate(solver))


# Solvers that do not keep the protocol


@dataclass(frozen=True)
class Behaves:
    """ADMM behind the protocol's two methods: the conforming solver that the others below spoil."""

    def refuses(self, program: LayerProgram) -> Any:
        return ADMM().refuses(program)

    def run(self, program: LayerProgram, limits: Limits, start: Start | None, watch: Watch) -> Proposal:
        return ADMM().run(program, limits, start, watch)


class Reasonless(Behaves):
    def refuses(self, program: LayerProgram) -> Any:
        return super().refuses(program) is not None or None


class RaisesItsReason(Behaves):
    def refuses(self, program: LayerProgram) -> Any:
        if not program.penalty.convex:
            raise SolverRefused("not convex")


class RefusesAll(Behaves):
    def refuses(self, program: LayerProgram) -> Any:
        return "too hard"


class Crashes(Behaves):
    def run(self, program: LayerProgram, limits: Limits, start: Start | None, watch: Watch) -> Proposal:
        raise ZeroDivisionError("division by zero")


class Unlimited(Behaves):
    def run(self, program: LayerProgram, limits: Limits, start: Start | None, watch: Watch) -> Proposal:
        return super().run(program, replace(limits, max_iter=50), start, watch)


class Late(Behaves):
    def run(self, program: LayerProgram, limits: Limits, start: Start | None, watch: Watch) -> Proposal:
        if limits.max_iter == 100_000:
            time.sleep(0.5)
        return super().run(program, limits, start, watch)


class Random(Behaves):
    def run(self, program: LayerProgram, limits: Limits, start: Start | None, watch: Watch) -> Proposal:
        start = start or Start(torch.randn(program.shape))
        return super().run(program, limits, start, watch)


class WritesOnInputs(Behaves):
    def run(self, program: LayerProgram, limits: Limits, start: Start | None, watch: Watch) -> Proposal:
        program.inputs.mul_(1 + 1e-12)
        return super().run(program, limits, start, watch)


class HandsBackTheStart(Behaves):
    def run(self, program: LayerProgram, limits: Limits, start: Start | None, watch: Watch) -> Proposal:
        proposal = super().run(program, limits, start, watch)
        return proposal if start is None else replace(proposal, weights=start.weights)


class FloatOnly(Behaves):
    def run(self, program: LayerProgram, limits: Limits, start: Start | None, watch: Watch) -> Proposal:
        program.inputs.numpy()
        return super().run(program, limits, start, watch)


class HalfPrecise(Behaves):
    def run(self, program: LayerProgram, limits: Limits, start: Start | None, watch: Watch) -> Proposal:
        proposal = super().run(program, limits, start, watch)
        assert proposal.weights is not None
        return replace(proposal, weights=proposal.weights.half())


class StartBlind(Behaves):
    def run(self, program: LayerProgram, limits: Limits, start: Start | None, watch: Watch) -> Proposal:
        if start is not None and start.multipliers is None:
            raise AttributeError("'NoneType' object has no attribute 'clone'")
        return super().run(program, limits, start, watch)


@dataclass(frozen=True)
class Multiplies(Behaves):
    """Its multipliers are in other units, or of another sign, wherever they are judged."""

    by: float = -1.0

    def run(self, program: LayerProgram, limits: Limits, start: Start | None, watch: Watch) -> Proposal:
        def turned(proposal: Proposal) -> Proposal:
            assert proposal.multipliers is not None
            return replace(proposal, multipliers=self.by * proposal.multipliers)

        proposal = super().run(program, limits, start, lambda k, propose, r: watch(k, lambda: turned(propose()), r))
        return turned(proposal)


class GivesZeros(Behaves):
    """Honest, and of no use."""

    def run(self, program: LayerProgram, limits: Limits, start: Start | None, watch: Watch) -> Proposal:
        return Proposal(torch.zeros(program.shape), None, "iteration limit", 1, 0.0)


class GivesNaN(Behaves):
    def run(self, program: LayerProgram, limits: Limits, start: Start | None, watch: Watch) -> Proposal:
        return Proposal(torch.full(program.shape, torch.nan), None, "own rule", 1, 0.0)


class BreaksBudgets(Behaves):
    def refuses(self, program: LayerProgram) -> Any:
        return None

    def run(self, program: LayerProgram, limits: Limits, start: Start | None, watch: Watch) -> Proposal:
        if program.penalty.convex:
            return super().run(program, limits, start, watch)
        return Proposal(torch.linalg.pinv(program.inputs) @ program.fit.anchor, None, "own rule", 1, 0.0)


class KeepsTheFirst(BreaksBudgets):
    """Within the budget, but the wrong support."""

    def run(self, program: LayerProgram, limits: Limits, start: Start | None, watch: Watch) -> Proposal:
        proposal = super().run(program, limits, start, watch)
        assert proposal.weights is not None
        if program.penalty.convex:
            return proposal
        order = 1.0 / torch.arange(1, proposal.weights.numel() + 1, dtype=torch.float64).view(program.shape)
        kept = program.penalty.prox(order, 1.0) != 0
        return replace(proposal, weights=torch.where(kept, proposal.weights, 0.0))


FAULTS: dict[str, tuple[Any, str, str]] = {
    "no reason": (Reasonless(), "refuses with a reason", "found True"),
    "raises its reason": (RaisesItsReason(), "refuses with a reason", "raised its reason"),
    "refuses all": (RefusesAll(), "refuses with a reason", "refuses the whole zoo"),
    "crashes": (Crashes(), "ball plain 20x8x5", "raised ZeroDivisionError: division by zero"),
    "no iteration limit": (Unlimited(), "iteration limit", "max_iter=1: found 50 iterations"),
    "no time limit": (Late(), "time limit", "came back after"),
    "random": (Random(), "determinism", "weights differ"),
    "writes on inputs": (WritesOnInputs(), "inputs unchanged", "were changed"),
    "hands back the start": (HandsBackTheStart(), "inputs unchanged", "shares memory"),
    "no bfloat16": (FloatOnly(), "precisions", "raised TypeError.*BFloat16"),
    "half precision": (HalfPrecise(), "ball plain 20x8x5", "expected float32 or float64, found torch.float16"),
    "no multipliers to start from": (StartBlind(), "starts", "raised AttributeError"),
    "sign of multipliers": (Multiplies(), "ball plain 20x8x5", "plain members are to be solved"),
    "units of multipliers": (Multiplies(100.0), "multipliers", "dual norm of XᵀΛ 100, expected 1"),
    "zeros": (GivesZeros(), "relu-ball plain 20x8x5", "plain members are to be solved: iteration limit"),
    "NaN": (GivesNaN(), "ball backwards", "diverged, but it has a solution"),
    "breaks budgets": (BreaksBudgets(), "all supports tried", "budget is broken"),
    "wrong support": (KeepsTheFirst(), "orthonormal top-k a neuron", "inputs are independent"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_found(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kit, "_GRACE", 0.2)
    solver, name, message = FAULTS[fault]
    check = next(check for check in CHECKS if check.name == name)
    with pytest.raises(NotConforming, match=f"(?s){name}: .*{message}"):
        check(Candidate(solver, time_limit=1.0))


def test_a_conforming_solver_passes() -> None:
    """What the faults above are measured against; a solver that refuses budgets has no fault."""
    report = testing.check(Behaves(), zoo.representative()[:2])
    report.raise_if_failed()
    assert report.passed
    assert report.solver == "Behaves"
    assert {result.name for result in report.results if not result.taken} == {m.name for m in zoo.budgets()}


def test_a_report_tells_what_failed() -> None:
    report = testing.check(GivesZeros(), zoo.representative()[:3])
    assert not report.passed
    with pytest.raises(NotConforming, match=f"'GivesZeros' failed {len(report.failures)} of {len(report.results)}"):
        report.raise_if_failed()
    lines = str(report).splitlines()
    assert len(lines) == len(report.results) + 1
    assert sum("FAILED" in line for line in lines) == len(report.failures)
    assert json.loads(json.dumps(report.to_dict()))["passed"] is False


def test_a_zero_where_zero_is_optimal_conforms() -> None:
    """Judged by what it hands back, whatever it is."""
    check = next(check for check in CHECKS if check.name == "squared-loss eps 1.5, U = 0")
    assert check(GivesZeros()).startswith("solved")


def test_each_check_has_a_name_of_its_own() -> None:
    names = [str(check) for check in testing.checks()]
    assert len(set(names)) == len(names) > len(zoo.members())
