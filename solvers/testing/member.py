"""What the zoo is made of."""

from collections.abc import Callable
from dataclasses import dataclass

from convexprune.solvers.programs.program import LayerProgram
from convexprune.solvers.testing.references import REFERENCES

KINDS = ("plain", "eps", "awkward", "degenerate", "known", "neurons", "groups", "gram", "low precision")
"""The kinds of convex feasible members."""


@dataclass(frozen=True)
class Member:
    """One program of the zoo.

    Attributes:
        name: The fit first, then what is special.
        build: Makes the program anew.
        optimum: Its optimal value where it is known in closed form, else None. For a budget: of the best support.
        kind: One of ``KINDS``, "infeasible" or "budget".
    """

    name: str
    build: Callable[[], LayerProgram]
    optimum: float | None = None
    kind: str = "plain"

    @property
    def reference(self) -> float | None:
        """The optimum, or the value of a solution with a certified gap below 1e-7 that was computed once and stored."""
        return REFERENCES.get(self.name) if self.optimum is None else self.optimum


def known_member(name: str, recipe: Callable[[], tuple[LayerProgram, float]], kind: str) -> Member:
    """A member whose recipe gives the optimum too."""
    return Member(name, lambda: recipe()[0], recipe()[1], kind)
