"""What all checks share: reports, and comparisons that say what was found and what was expected."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from convexprune.solvers.errors import ConvexPruneError

ALIKE = 1e-7
"""Relative error granted to float64 numbers that should be equal."""

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


def expect(condition: bool, message: str) -> None:
    """Raise NotConforming with the message unless the condition holds."""
    if not condition:
        raise NotConforming(message)


def same(name: str, found: Tensor | float, expected: Tensor | float, unit: float = 0.0, rtol: float = ALIKE) -> None:
    """Raise NotConforming unless numbers are equal up to rounding, relative to ``unit`` or to the largest of them."""
    found, expected = (torch.as_tensor(a, dtype=torch.float64) for a in (found, expected))
    expect(found.shape == expected.shape, f"{name}: found shape {list(found.shape)}, expected {list(expected.shape)}")
    largest = float(torch.where(expected.isfinite(), expected, 0.0).abs().max())
    wrong = ~torch.isclose(found, expected, rtol=0.0, atol=rtol * max(largest, unit, 1e-200))
    if bool(wrong.any()):
        raise NotConforming(f"{name}: found {float(found[wrong][0]):.9g}, expected {float(expected[wrong][0]):.9g}")


def best_of(name: str, best: float, others: list[float], unit: float) -> None:
    """Raise NotConforming if another value is lower than what should be the least."""
    lowest = min(others, default=best)
    expect(best <= lowest + ALIKE * max(unit, abs(best)), f"{name}: found {best:.9g}, yet another has {lowest:.9g}")


def result_of(name: str, test: Callable[[T], Any], subject: T, raised: tuple[type[Exception], ...] = ()) -> Result:
    """The outcome of one check, a function of what is checked: what it says that it saw, or its docstring.

    Whatever it raises is the finding, but for exceptions of the types ``raised``.
    """
    try:
        return Result(name, True, test(subject) or str(test.__doc__).partition("\n")[0])
    except raised:
        raise
    except NotConforming as error:
        return Result(name, False, str(error))
    except Exception as error:  # noqa: BLE001
        return Result(name, False, f"raised {type(error).__name__}: {error}")
