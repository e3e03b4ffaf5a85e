"""The coreset methods by name."""

import dataclasses
import difflib
from typing import Any

from convexprune.coresets.base import Method
from convexprune.coresets.baseline import Magnitude, Uniform
from convexprune.coresets.corenet import CoreNet
from convexprune.coresets.lowner import Lowner
from convexprune.coresets.mussay import Mussay
from convexprune.coresets.pfp import PFP
from convexprune.coresets.sampling import SAMPLINGS
from convexprune.coresets.sipp import SiPP
from convexprune.solvers.errors import InvalidInput, UnknownOption

METHODS: dict[str, type[Method]] = {
    "corenet": CoreNet,
    "lowner": Lowner,
    "magnitude": Magnitude,
    "mussay": Mussay,
    "pfp": PFP,
    "sipp": SiPP,
    "uniform": Uniform,
}
"""Pruners by name; their fields are their options."""


def make_method(method: str | Method, options: dict[str, Any]) -> tuple[str, Method]:
    """The name and the instance that a name, or an instance, and options mean.

    Raises:
        InvalidInput: No method of that name, nothing like a method, or an unknown way of sampling or kind of items.
        UnknownOption: The method has no such option.
    """
    if isinstance(method, str):
        if method not in METHODS:
            close = difflib.get_close_matches(method, METHODS, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else "."
            raise InvalidInput(f"no coreset method named {method!r}{hint} Known: {', '.join(METHODS)}")
        kind = METHODS[method]
        _check_options(method, kind, options)
        return method, _checked(kind(**options))
    if not isinstance(method, Method) or not dataclasses.is_dataclass(method):
        raise InvalidInput(f"method: expected a name or an instance of a Method, found {method!r}")
    name = type(method).__name__.lower()
    _check_options(name, type(method), options)
    return name, _checked(dataclasses.replace(method, **options) if options else method)


def _checked(method: Method) -> Method:
    for name, value, known in (
        ("sampling", method.sampling, list(SAMPLINGS)),
        ("items", method.items, ["neurons", "edges"]),
    ):
        if value not in known:
            raise InvalidInput(f"{name}: expected one of {', '.join(known)}, found {value!r}")
    return method


def _check_options(name: str, kind: type[Method], options: dict[str, Any]) -> None:
    known = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for option in options:
        if option not in known:
            close = difflib.get_close_matches(option, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else "."
            raise UnknownOption(f"method {name!r} has no option {option!r}{hint} It has: {', '.join(known) or 'none'}")
