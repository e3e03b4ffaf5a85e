"""The problem zoo: small layer programs, built to be awkward, each small enough for a general conic solver.

>>> from convexprune.solvers.testing import zoo
>>> [member.name for member in zoo.members("groups")]  # doctest: +SKIP
>>> program = zoo.program("relu-ball badly_scaled")
"""

from functools import cache

from convexprune.solvers.errors import InvalidInput
from convexprune.solvers.programs.program import LayerProgram
from convexprune.solvers.testing.catalogue import budgets, feasible, infeasible
from convexprune.solvers.testing.member import KINDS, Member

_REPRESENTATIVE = (
    "relu-ball plain 20x8x5",
    "net-trim plain 20x8x5",
    "ball plain 20x8x5",
    "relu-loss plain 20x8x5",
    "net-trim-loss plain 20x8x5",
    "squared-loss plain 20x8x5",
    "relu-ball free_bias",
    "net-trim weighted",
    "ball backwards",
    "squared-loss orthonormal L1",
    "squared-loss eps 1.5, U = 0",
    "relu-ball neurons",
    "relu-ball rows",
    "squared-loss columns",
    "ball blocks",
    "gram ball",
    "relu-ball float16",
)


def members(*kinds: str) -> tuple[Member, ...]:
    """All feasible convex members, or those of these kinds.

    Raises:
        InvalidInput: A kind that is not in ``KINDS``.
    """
    for kind in kinds:
        if kind not in KINDS:
            raise InvalidInput(f"kind: expected one of {', '.join(KINDS)}, found {kind!r}")
    return tuple(member for member in feasible() if not kinds or member.kind in kinds)


def representative() -> tuple[Member, ...]:
    """A few for slow solvers: each fit, each penalty, each kind of input once."""
    return tuple(member(name) for name in _REPRESENTATIVE)


def member(name: str) -> Member:
    """The member of this name, of any kind.

    Raises:
        InvalidInput: There is none.
    """
    if name not in _by_name():
        raise InvalidInput(f"the zoo has no member {name!r}; `members()`, `infeasible()` and `budgets()` list them")
    return _by_name()[name]


@cache
def program(name: str) -> LayerProgram:
    """The program of the member of this name, built once."""
    return member(name).build()


@cache
def _by_name() -> dict[str, Member]:
    return {member.name: member for member in (*feasible(), *infeasible(), *budgets())}
