"""What the checks of a user's own fit or penalty share: random points, comparisons, and how a report is made."""

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from convexprune.solvers.testing.candidate import expect
from convexprune.solvers.testing.report import NotConforming, Report, Result

ALIKE = 1e-7
"""Relative error granted to float64 numbers that should be equal."""

_CONIC = 1e-4  # and to a conic solver's

Subject = TypeVar("Subject")


@dataclass(frozen=True, eq=False)
class Draw(Generic[Subject]):
    """Random points for a subject with arrays of one shape."""

    subject: Subject
    shape: tuple[int, int]
    points: int
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers in float64, in the subject's own shape unless another is given."""
        return torch.randn(*(shape or self.shape), generator=self.generator, dtype=torch.float64)

    def sizes(self) -> list[float]:
        """Factors from far too small to far too large."""
        return [10.0 ** float(power) for power in torch.linspace(-2, 2, self.points)]


def alike(name: str, found: float, expected: float, unit: float = 0.0) -> None:
    """Raise NotConforming unless two numbers are equal up to rounding, relative to them or to ``unit``."""
    slack = ALIKE * max(abs(expected), unit, 1e-200)
    expect(abs(found - expected) <= slack or found == expected, f"{name}: found {found:.9g}, expected {expected:.9g}")


def same(name: str, found: Tensor, expected: Tensor, tolerance: float = ALIKE) -> None:
    """Raise NotConforming unless two arrays are equal up to rounding of the largest entry."""
    expect(found.shape == expected.shape, f"{name}: found shape {list(found.shape)}, expected {list(expected.shape)}")
    finite = torch.isfinite(expected)
    expect(torch.equal(torch.isfinite(found), finite), f"{name}: found NaN or infinity in other places than expected")
    off, unit = (found - expected)[finite].abs(), expected[finite].abs()
    worst, size = (float(a.max()) if len(a) else 0.0 for a in (off, unit))
    expect(worst <= tolerance * max(size, 1e-300), f"{name}: off by {worst:.3g} where the largest entry is {size:.3g}")


def best_of(name: str, best: float, others: list[float], unit: float) -> None:
    """Raise NotConforming if another value is lower than what should be the least."""
    lowest = min(others, default=best)
    expect(best <= lowest + ALIKE * max(unit, abs(best)), f"{name}: found {best:.9g}, yet another has {lowest:.9g}")


def conic(objective: Any, constraints: list[Any]) -> float:
    """The least value of a cvxpy objective, by Clarabel."""
    import cvxpy as cp

    problem = cp.Problem(cp.Minimize(objective), constraints)
    expect(problem.is_dcp(), "to_cvxpy: the expression is not convex by cvxpy's rules")
    return float(problem.solve(solver="CLARABEL"))


def agrees(name: str, found: float, expected: float, unit: float) -> None:
    """Raise NotConforming unless a conic solver's value is ours."""
    expect(
        abs(found - expected) <= _CONIC * max(abs(expected), unit),
        f"{name}: cvxpy finds {found:.7g}, here it is {expected:.7g}",
    )


def checked(name: str, draw: Draw[Subject], checks: dict[str, Callable[[Draw[Subject]], str]]) -> Report:
    """The report of all checks.

    Raises:
        NotConforming: Some failed; the message names them.
    """
    report = Report(name, tuple(_result(check, test, draw) for check, test in checks.items()))
    report.raise_if_failed()
    return report


def needs_cvxpy(test: Callable[[Draw[Subject]], str]) -> Callable[[Draw[Subject]], str]:
    """A check that says so where cvxpy is not installed."""
    installed = find_spec("cvxpy") is not None and find_spec("clarabel") is not None
    return test if installed else lambda draw: "not checked: cvxpy or clarabel is not installed"  # noqa: ARG005


def _result(name: str, test: Callable[[Draw[Subject]], str], draw: Draw[Subject]) -> Result:
    try:
        return Result(name, True, test(draw))
    except NotConforming as error:
        return Result(name, False, str(error))
    except Exception as error:  # noqa: BLE001 - whatever it raises is the finding
        return Result(name, False, f"raised {type(error).__name__}: {error}")
