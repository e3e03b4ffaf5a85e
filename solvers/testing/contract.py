"""What all checks share: reports, and of a user's own fit or penalty random points and comparisons."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.util import find_spec
from typing import Any, TypeVar

import torch
from torch import Tensor

from convexprune.solvers.errors import ConvexPruneError

ALIKE = 1e-7
"""Relative error granted to float64 numbers that should be equal."""

_CONIC = 1e-4  # and to a conic solver's

T = TypeVar("T")


class NotConforming(ConvexPruneError, AssertionError):
    """A solver, fit or penalty is not what it should be; the message says what was found and what was expected."""


@dataclass(frozen=True)
class Result:
    """One check of one solver; ``taken`` is False where the solver refused the program, which is its right."""

    name: str
    passed: bool
    detail: str
    taken: bool = True

    @property
    def word(self) -> str:
        """The outcome: passed, refused or FAILED."""
        return ("passed" if self.taken else "refused") if self.passed else "FAILED"


@dataclass(frozen=True)
class ConformanceReport:
    """All results of one solver, fit or penalty; ``str()`` gives a table."""

    solver: str
    results: tuple[Result, ...]

    @property
    def failures(self) -> tuple[Result, ...]:
        """Those that failed."""
        return tuple(result for result in self.results if not result.passed)

    @property
    def passed(self) -> bool:
        """Whether none failed."""
        return not self.failures

    def raise_if_failed(self) -> None:
        """Raise NotConforming, naming every failed check, unless all passed."""
        if self.failures:
            lines = "\n".join(f"  {result.name}: {result.detail}" for result in self.failures)
            raise NotConforming(f"{self.solver!r} failed {len(self.failures)} of {len(self.results)} checks:\n{lines}")

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {"solver": self.solver, "passed": self.passed, "results": [asdict(result) for result in self.results]}

    def __str__(self) -> str:
        width = max(len(result.name) for result in self.results)
        lines = [f"{result.name:<{width}}  {result.word:<7}  {result.detail}" for result in self.results]
        refused = sum(not result.taken for result in self.results)
        tail = f"{self.solver}: {len(self.results)} checks, {len(self.failures)} failed, {refused} refused"
        return "\n".join([*lines, tail])


@dataclass(frozen=True, eq=False)
class Draw:
    """Random points for a subject with arrays of one shape."""

    subject: Any
    shape: tuple[int, int]
    points: int
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers in float64, in the subject's own shape unless another is given."""
        return torch.randn(*(shape or self.shape), generator=self.generator, dtype=torch.float64)

    def sizes(self) -> list[float]:
        """Factors from far too small to far too large."""
        return [10.0 ** float(power) for power in torch.linspace(-2, 2, self.points)]


def expect(condition: bool, message: str) -> None:
    """Raise NotConforming with the message unless the condition holds."""
    if not condition:
        raise NotConforming(message)


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


def agrees(name: str, objective: Any, constraints: list[Any], expected: float, unit: float) -> None:
    """Raise NotConforming unless Clarabel finds the expected least value of a cvxpy objective."""
    import cvxpy as cp

    problem = cp.Problem(cp.Minimize(objective), constraints)
    expect(problem.is_dcp(), "to_cvxpy: the expression is not convex by cvxpy's rules")
    found = float(problem.solve(solver="CLARABEL"))
    near = abs(found - expected) <= _CONIC * max(abs(expected), unit)
    expect(near, f"{name}: cvxpy finds {found:.7g}, here it is {expected:.7g}")


def checked(name: str, draw: Draw, checks: dict[str, Callable[[Any, Draw], str]]) -> ConformanceReport:
    """The report of all checks, functions of the subject and the draw; that called "cvxpy" needs the package.

    Raises:
        NotConforming: Some failed; the message names them.
    """
    installed = find_spec("cvxpy") is not None and find_spec("clarabel") is not None
    results = [
        result_of(check, partial(test, draw.subject), draw)
        if installed or check != "cvxpy"
        else Result(check, True, "not checked: cvxpy or clarabel is not installed")
        for check, test in checks.items()
    ]
    report = ConformanceReport(name, tuple(results))
    report.raise_if_failed()
    return report


def result_of(name: str, test: Callable[[T], str], subject: T, raised: tuple[type[Exception], ...] = ()) -> Result:
    """The outcome of one check; whatever it raises is the finding, but for exceptions of the types ``raised``."""
    try:
        return Result(name, True, test(subject))
    except raised:
        raise
    except NotConforming as error:
        return Result(name, False, str(error))
    except Exception as error:  # noqa: BLE001
        return Result(name, False, f"raised {type(error).__name__}: {error}")
