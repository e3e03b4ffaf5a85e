"""What a run of checks finds."""

from dataclasses import asdict, dataclass
from typing import Any

from convexprune.solvers.errors import ConvexPruneError


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
class Report:
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
