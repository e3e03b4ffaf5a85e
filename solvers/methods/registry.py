"""Solvers by name: ours, a researcher's own, and those of installed packages."""

import dataclasses
import difflib
from collections.abc import Callable, Collection
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from convexprune.solvers.errors import InvalidInput, MissingExtra, UnknownOption, UnknownSolver
from convexprune.solvers.methods.interface import Solver, options_of

T = TypeVar("T")
S = TypeVar("S", bound=Callable[..., Any])


@dataclass(frozen=True)
class SolverInfo:
    """A line of ``available()``: a solver's name, its docstring's first paragraph, its options with their defaults."""

    name: str
    summary: str
    options: dict[str, Any]
    missing: str | None  # what to install before it can run


class Registry(Generic[T]):
    """The solvers, or whatever else T is, of one kind by name, with those of installed packages' entry points.

    ``group`` is that of the entry points, ``what`` the word for one of them in messages, ``kind`` their class.
    """

    def __init__(self, group: str, what: str = "solver", kind: type[Any] = Solver) -> None:
        self.group, self.what, self.kind = group, what, kind
        self.factories: dict[str, Callable[..., T]] = {}

    def register(self, name: str, *, replace: bool = False) -> Callable[[S], S]:
        """Class decorator: make a solver known under ``name``, what to pass to ``solve``.

        Raises:
            InvalidInput: The name is taken by another solver, and ``replace`` is false.
        """

        def add(solver: S) -> S:
            known = self.factories.get(name)
            # The same class defined again (a notebook cell run twice) is no clash.
            if known is not None and not replace and _address(known) != _address(solver):
                raise InvalidInput(
                    f"a {self.what} named {name!r} is registered already; choose another name or pass replace=True"
                )
            self.factories[name] = solver
            return solver

        return add

    def available(self) -> dict[str, SolverInfo]:
        """Every registered solver, including those that lack a package, by name."""
        found = {name: _info(name, factory) for name, factory in self.factories.items()}
        for name, point in self._installed().items():
            try:
                found[name] = _info(name, _loaded(name, point))
            except MissingExtra as error:
                found[name] = SolverInfo(name, f"{point.value}, which cannot be imported", {}, str(error))
        return dict(sorted(found.items()))

    def make(self, solver: str | T, options: dict[str, Any]) -> tuple[str, T]:
        """The name and the instance that a solver's name, or the instance itself, and options mean.

        Raises:
            UnknownSolver: No solver of that name.
            UnknownOption: The solver has no such option.
            InvalidInput: Neither a name nor a solver.
        """
        if isinstance(solver, str):
            return solver, self._named(solver, options)
        if isinstance(solver, type) or not isinstance(solver, self.kind):
            expected = "an instance with `refuses` and `run`" if self.kind is Solver else f"a {self.kind.__name__}"
            raise InvalidInput(f"{self.what}: expected a name or {expected}, found {solver!r}")
        name = type(solver).__name__
        self._check_options(name, options_of(solver), options)
        return name, dataclasses.replace(solver, **options) if options else solver  # type: ignore[type-var]

    def _named(self, name: str, options: dict[str, Any]) -> T:
        installed = self._installed()
        names = {*self.factories, *installed}
        if name not in names:
            raise UnknownSolver(f"no {self.what} named {name!r}{_hint(name, names)} Known: {', '.join(sorted(names))}")
        factory = self.factories.get(name) or _loaded(name, installed[name])
        self._check_options(name, _options(factory), options)
        return factory(**options)

    def _check_options(self, name: str, known: dict[str, Any], options: dict[str, Any]) -> None:
        for option in options:
            if option not in known:
                has = f"It has: {', '.join(known) or 'none'}"
                raise UnknownOption(f"{self.what} {name!r} has no option {option!r}{_hint(option, known)} {has}")

    def _installed(self) -> dict[str, EntryPoint]:
        """Solvers of installed packages that no registered one hides, not imported yet."""
        return {point.name: point for point in entry_points(group=self.group) if point.name not in self.factories}


PROGRAMS: Registry[Solver] = Registry("convexprune.solvers")
"""Solvers of layer programs."""

register, available, make_solver = PROGRAMS.register, PROGRAMS.available, PROGRAMS.make


def _hint(name: str, known: Collection[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else "."


def _address(factory: object) -> tuple[object, object]:
    return getattr(factory, "__module__", None), getattr(factory, "__qualname__", factory)


def _loaded(name: str, point: EntryPoint) -> Callable[..., Any]:
    try:
        factory: Callable[..., Any] = point.load()
    except Exception as error:
        raise MissingExtra(f"solver {name!r} is installed as {point.value} and cannot be imported: {error}") from error
    return factory


def _options(factory: Callable[..., Any]) -> dict[str, Any]:
    fields = dataclasses.fields(factory) if dataclasses.is_dataclass(factory) else ()
    return {f.name: None if f.default is dataclasses.MISSING else f.default for f in fields if f.init}


def _info(name: str, factory: Callable[..., Any]) -> SolverInfo:
    summary = " ".join((factory.__doc__ or "").strip().split("\n\n")[0].split())
    return SolverInfo(name, summary, _options(factory), getattr(factory, "missing", lambda: None)())
