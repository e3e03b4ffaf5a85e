"""Which fits and penalties are ours: methods that know one by its name must not take another for it."""

from collections.abc import Hashable
from functools import cache
from inspect import getattr_static
from typing import Any

from convexprune.solvers.programs.fits import Ball, NetTrimLoss, NetTrimSet, ReluBall, ReluLoss, SquaredLoss
from convexprune.solvers.programs.penalties import L1, NM, GroupL2, TopK

SETS = (Ball, ReluBall, NetTrimSet)
LOSSES = (SquaredLoss, ReluLoss, NetTrimLoss)
FITS = (*SETS, *LOSSES)
NORMS = (L1, GroupL2)
BUDGETS = (TopK, NM)


def is_plain(instance: object, kinds: tuple[type, ...]) -> bool:
    """Whether it is of one of the kinds, and no subclass says anew what any member of that kind is."""
    cls: Any = type(instance)
    return any(isinstance(instance, kind) and not _redefined(cls, kind) for kind in kinds)


@cache
def _redefined(cls: Hashable, kind: Hashable) -> bool:
    names = (name for name in dir(kind) if not name.startswith("__") and name != "_abc_impl")
    return any(getattr_static(cls, name) is not getattr_static(kind, name) for name in names)
