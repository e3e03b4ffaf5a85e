"""Options: all that decides how a run prunes, beside its target and its method; the command line reads them from here.

Nothing here imports torch, so that the command line can show its help at once.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from convexprune.solvers.methods.interface import Solver

T = TypeVar("T")

OWN = "(an object)"
"""What a record says of an object or a function of the caller's, which no file can hold."""


def _option(default: T, help: str, *, words: tuple[str, ...] = (), record: bool = True) -> T:  # noqa: A002 - typer's word
    """A field with its help for the command line; ``record``: whether it decides what comes out."""
    return field(default=default, compare=record, metadata={"help": help, "words": words})


@dataclass(frozen=True)
class Options:
    """How a run prunes. Two runs whose options are equal prune alike; what only limits a run does not count.

    Attributes:
        layers: Patterns ("features.*", "fc?") of qualified names, and of those to leave out ("!stem"); None: every
            layer that can be pruned. With neurons they choose the layers that lose these.
        mode: "parallel": every layer from the original network's inputs. "cascade": from those of the network pruned so
            far, layer after layer. None: "parallel" with an eps for each layer, which is then kept as it was given;
            else "cascade", but "parallel" with several jobs, or where a layer is called more than once in a forward,
            and the report says so. A run that goes on keeps the mode that it began with.
        fit: How a layer's errors are measured: a name ("relu-ball", "net-trim", "ball", or one that was registered), a
            ``LayerFit``, or a table of these; None: "relu-ball" where only ReLU follows, "ball" elsewhere.
        penalty: What "sparse" means to convex programs: "l1", or a function of (N, M, biased) that returns a
            ``Penalty`` of weights U [N, M] whose last row is a bias if ``biased``.
        norms: "fold": a BatchNorm that alone follows a layer is part of the layer's program, so that errors count
            behind it; its shift takes the program's bias. "leave": errors count before it.
        activations: What follows a layer, by name pattern, where watching the model is not enough: {"fc1": "relu"}.
        refit: Fit the weights again on the support that was found.
        keep_zeros: Weights that are zero stay zero, as in a model that was pruned before.
        solver: As in ``solve``; None: "quadratic" for fits that see products of the data alone, "continuation" for
            budgets, else "admm".
        solver_options: The solver's own.
        tol, feas_tol, max_iter: As in ``solve``, for each layer (each group of a convolution).
        layer_time_limit: Seconds for a layer at most.
        ceiling: V of ``NetTrimSet``; in cascade the least ceiling.
        gamma: In cascade the squared radius is at least gamma ≥ 1 times what the trained weights miss on the pruned
            network's inputs, so that they are feasible.
        penalise_bias: Whether the bias counts in the penalty.
        order: In which a coreset's neurons are removed: "bottom-up", from the input on, or "top-down".
        remove: Whether neurons that go are really removed; otherwise they are zeros, and shapes stay.
        baseline: Whether coresets report the error of uniform sampling at the same size, too.
        seed: Of everything random, ≥ 0.
        time_limit: Seconds for everything: the layer that is being solved then ends with the best feasible weights so
            far, the others stay as they are, and the report says so.
        keep_solutions: Whether the report keeps each layer's solutions, multipliers included.
    """

    layers: str | Iterable[str] | None = _option(None, "Name pattern of layers to prune, or '!stem' for all but it.")
    mode: str | None = _option(
        None, "parallel or cascade; if not given parallel with an eps and with --jobs.", words=("parallel", "cascade")
    )
    fit: object = _option(None, "relu-ball, net-trim or ball for every layer.")
    penalty: object = _option("l1", "What the programs minimise.")
    norms: str = _option(
        "fold", "A BatchNorm is part of its layer's program, or not: fold or leave.", words=("fold", "leave")
    )
    activations: Mapping[str, str] | None = _option(None, "What follows a layer.")
    refit: bool = _option(False, "Fit again on the support found.")
    keep_zeros: bool = _option(False, "Weights that are zero stay zero.")
    solver: "str | Solver | None" = _option(None, "See `convexprune solvers`; else the one that suits.")
    solver_options: Mapping[str, object] | None = _option(None, "The solver's own.")
    tol: float = _option(1e-3, "Certified relative gap to reach.")
    feas_tol: float = _option(1e-4, "Violation to reach, relative to eps.")
    max_iter: int | None = _option(None, "Iterations a layer at most.")
    layer_time_limit: float | None = _option(None, "Seconds a layer at most.")
    ceiling: float = _option(0.0, "V of net-trim's set.")
    gamma: float = _option(1.1, "In cascade: room for the trained weights, at least 1.")
    penalise_bias: bool = _option(False, "The bias counts in the penalty.")
    order: str = _option("bottom-up", "Of coresets: bottom-up or top-down.", words=("bottom-up", "top-down"))
    remove: bool = _option(True, "Neurons that go are really removed, or left as zeros.")
    baseline: bool = _option(False, "Of coresets: report uniform sampling at the same size, too.")
    seed: int = _option(0, "Of random samples.")
    time_limit: float | None = _option(None, "Seconds for everything; the same command then goes on.", record=False)
    keep_solutions: bool = _option(False, "The report keeps all solutions.", record=False)

    def checked(self) -> "Options":
        """The same options with patterns as tuples, tables as mappings, and every value looked at.

        Raises:
            InvalidInput: An unknown word, or patterns or tables that are none.
            InvalidTolerance: A number out of its range.
            UnknownSolver, UnknownOption: As in ``solve``.
        """
        from convexprune.network.choosing import name_patterns
        from convexprune.solvers.arrays import as_number, checked_count, checked_positive, checked_radius
        from convexprune.solvers.errors import InvalidInput, InvalidTolerance
        from convexprune.solvers.methods.interface import Limits
        from convexprune.solvers.methods.registry import make_solver

        for each in dataclasses.fields(self):
            value, words = getattr(self, each.name), each.metadata["words"]
            if words and value not in words and (value is not None or each.default is not None):
                raise InvalidInput(f"{each.name}: expected {' or '.join(map(repr, words))}, found {value!r}")
            if isinstance(each.default, bool) and not isinstance(value, bool):
                raise InvalidInput(f"{each.name}: expected True or False, found {value!r}")
        for name, kind, what in (
            ("activations", str, "{'fc1': 'relu'}, names to names"),
            ("solver_options", object, "{'rho': 2.0}, names to values"),
        ):
            if not _is_table(getattr(self, name) or {}, kind):
                raise InvalidInput(f"{name}: expected a mapping as {what}, found {getattr(self, name)!r}")
        fits = self.fit if isinstance(self.fit, Mapping) else {}
        if not _is_table(fits, object) or any(fit is None for fit in fits.values()):
            raise InvalidInput(
                f"fit: expected a name, a LayerFit, or a mapping from patterns to these, found {self.fit!r}"
            )
        Limits(self.tol, self.feas_tol, self.max_iter, self.layer_time_limit)
        if self.time_limit is not None:
            checked_positive("time_limit", self.time_limit)
        checked_count("seed", self.seed, least=0)
        as_number("ceiling", self.ceiling)
        if checked_radius("gamma", self.gamma) < 1:
            raise InvalidTolerance(
                f"gamma: expected a number ≥ 1, for the trained weights to be feasible; found {self.gamma}"
            )
        if self.solver is not None:
            make_solver(self.solver, dict(self.solver_options or {}))
        elif self.solver_options:
            raise InvalidInput("solver_options: they are a solver's own, and none was named; give solver, too")
        layers = None if self.layers is None else tuple(name_patterns(self.layers))
        return dataclasses.replace(
            self, layers=layers, activations=self.activations or {}, solver_options=self.solver_options or {}
        )

    @property
    def limits(self) -> dict[str, object]:
        """Those of a layer's solve, by their names in ``solve``."""
        return {name: getattr(self, name) for name in ("tol", "feas_tol", "max_iter")} | {
            "time_limit": self.layer_time_limit
        }

    @property
    def cascade(self) -> bool:
        """Whether the mode is "cascade"."""
        return self.mode == "cascade"

    def to_dict(self) -> dict[str, object]:
        """What decides the results, as plain data; an object of the caller's is named by its class."""
        recorded = [each.name for each in dataclasses.fields(self) if each.compare]
        own = {name: plain(getattr(self, name)) for name in recorded}
        if self.solver is not None and not isinstance(self.solver, str):
            from convexprune.solvers.methods.interface import options_of

            own["solver_options"] = plain(options_of(self.solver))
        return own


def plain(value: object) -> object:
    """Plain data; what is no number, text, table or sequence is named by its class."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, str) or value is None or isinstance(value, bool | int | float):
        return value
    if hasattr(value, "item") and hasattr(value, "dtype") and getattr(value, "ndim", 1) == 0:  # numpy's numbers
        return value.item()
    if isinstance(value, set | frozenset):  # in an order that does not depend on the process
        return sorted((plain(item) for item in value), key=str)
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {"class": type(value).__name__} | {
            each.name: plain(getattr(value, each.name)) for each in dataclasses.fields(value)
        }
    name = str(value)
    return name if name.startswith("torch.") else f"{OWN[:-1]}: {getattr(value, '__name__', type(value).__name__)})"


def options_from_dict(data: Mapping[str, object], given: Options | None) -> Options:
    """The options that ``to_dict`` described, to judge answers by: without the solver, for nothing in a file is run.

    Args:
        data: From a file.
        given: Objects of the caller's that the record could only name are taken from here.

    Raises:
        InvalidInput, InvalidTolerance: The data are no options, or an object is needed that was not given.
    """
    from convexprune.solvers.errors import InvalidInput

    names = [each.name for each in dataclasses.fields(Options) if each.compare]
    if missing := [name for name in names if name not in data]:
        raise InvalidInput(f"options: expected all fields of Options, found none for {', '.join(missing)}")
    values = {name: math.inf if data[name] == "inf" else data[name] for name in names}
    for name in ("fit", "penalty"):
        if is_own(values[name]):
            own = None if given is None else getattr(given, name)
            if plain(own) != values[name]:
                raise InvalidInput(
                    f"{name}: the run was given an object of its caller's, {values[name]!r}; give the same, as "
                    f"options=Options({name}=…)"
                )
            values[name] = own
    return Options(**values | {"solver": None, "solver_options": None}).checked()  # type: ignore[arg-type]


def is_own(value: object) -> bool:
    """Whether recorded plain data stand for an object of the caller's."""
    if isinstance(value, Mapping):
        return "class" in value or any(is_own(item) for item in value.values())
    return isinstance(value, str) and value.startswith(OWN[:-1])


def _is_table(value: object, kind: type) -> bool:
    return isinstance(value, Mapping) and all(isinstance(k, str) and isinstance(v, kind) for k, v in value.items())
