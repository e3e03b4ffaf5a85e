"""What a pruner is, and pruners by name: ours, a researcher's own, and those of installed packages.

There are three kinds, each with a base class: those that solve a program for each layer (``Solving``), those that score
weights or neurons and keep the largest scores (``Scoring``), and those that sample weights or neurons by their
sensitivities (``Sampling``). All else is the same for all: which layers there are, their matrices, the journal,
workers and the report.
"""

from collections.abc import Mapping, Sequence
from dataclasses import Field, fields, is_dataclass
from typing import ClassVar, Literal, get_args, get_origin

from torch import Tensor

from convexprune.options import Options, plain
from convexprune.report.report import Promise
from convexprune.runs.run import Run
from convexprune.solvers.errors import InvalidInput
from convexprune.solvers.methods.registry import Registry
from convexprune.targets import Eps, Guarantee, NetworkEps, Neurons, Target


class Pruner:
    """Base of the pruners, frozen dataclasses whose fields are their options; of a ``Literal`` words are checked.

    Attributes:
        targets: The kinds of target that it can reach.
        needs_data: Whether it has nothing to say without calibration data.
        needs_labels: Whether it looks at the loss of labelled data.
        needs_samples: Whether it needs inputs sample by sample, rather than their products XᵀX.
        proves: Whether what its layers' errors mean for the network's outputs is reported as a bound.
        fit: The name of the fit of layers for which none is chosen; None: by what follows them.
        norms: "leave" if a BatchNorm behind a layer is never part of its matrix; None: as the options say.
        residual: Whether layers whose outputs are added to each other can lose neurons together.
        whole_network: Whether it looks at all layers, whichever of them are pruned.
        generalises: Whether it has a bound on errors on new data, for which labels may be given (``generalisation``).
    """

    targets: ClassVar[tuple[type[Target], ...]] = ()
    needs_data: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = False
    needs_samples: ClassVar[bool] = False
    proves: ClassVar[bool] = False
    fit: ClassVar[str | None] = None
    norms: ClassVar[str | None] = None
    residual: ClassVar[bool] = True
    whole_network: ClassVar[bool] = False
    generalises: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check the options that are words.

        Raises:
            InvalidInput: One is none of those that its type names.
        """
        for field in self._options():
            value, words = getattr(self, field.name), get_args(field.type)
            if get_origin(field.type) is Literal and value not in words:
                raise InvalidInput(f"{field.name}: expected one of {', '.join(words)}, found {value!r}")

    def _options(self) -> Sequence[Field[object]]:
        return fields(self) if is_dataclass(self) else ()

    def by_neurons(self, target: Target) -> bool:
        """Whether the target is about whole neurons, which links between layers say how to remove."""
        return isinstance(target, Neurons)

    def default_mode(self, target: Target, options: Options) -> str | None:
        """The mode where none was chosen; None: what suits the target."""
        return None

    def generalisation(self, run: Run, before: Tensor, after: Tensor, labels: Tensor) -> Promise:
        """What can be said of errors on new data, from the outputs [n, classes] before and after, and labels [n]."""
        raise NotImplementedError

    def refuses(self, target: Target, options: Options) -> str | None:
        """Why it cannot reach the target with these options; None if it can."""
        if isinstance(target, self.targets):
            return None
        kinds = ", ".join(kind.kind for kind in self.targets)
        return f"it cannot reach a target {target.kind!r}; it takes {kinds}"

    def prune(self, run: Run, target: Target) -> None:
        """Choose, solve and write: the run's layers are pruned when this returns, unless it was stopped."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, object]:
        """Its options as plain data."""
        return {field.name: plain(getattr(self, field.name)) for field in self._options()}


PRUNERS: Registry[Pruner] = Registry("convexprune.pruners", "method", Pruner)
"""Pruners by name."""


register_pruner = PRUNERS.register
"""Class decorator: make a pruner known under a name, which another pruner has only with ``replace=True``."""

available_pruners = PRUNERS.available
"""Every pruner by name: what it is, its options, and what is missing."""


def make_pruner(
    method: str | Pruner | None, target: Target, options: Mapping[str, object] | None = None
) -> tuple[str, Pruner]:
    """The name and the instance that a name, or an instance, and options mean; None: what suits the target.

    Raises:
        UnknownSolver: No pruner of that name. UnknownOption: It has no such option. InvalidInput: No pruner at all.
    """
    if method is None:
        solving = isinstance(target, Eps | NetworkEps | Neurons)
        method = "net-trim" if solving else "lowner" if isinstance(target, Guarantee) else "budget"
    name, pruner = PRUNERS.make(method, dict(options or {}))
    names = [known for known, kind in PRUNERS.factories.items() if kind is type(pruner)]
    return (names[0] if names else name.lower()), pruner
