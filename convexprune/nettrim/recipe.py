"""What is asked of a run, checked, and as plain data."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any

import numpy as np
import torch

from convexprune.nettrim.posed import How
from convexprune.network.padding import check_mask
from convexprune.network.patterns import name_patterns
from convexprune.solvers.arrays import as_number, checked_count, checked_radius
from convexprune.solvers.errors import InvalidInput, InvalidTolerance
from convexprune.solvers.methods.interface import Limits, Solver, options_of
from convexprune.solvers.methods.judge import checked_limits
from convexprune.solvers.methods.registry import make_solver
from convexprune.solvers.programs import NM

_WORDS = {
    "mode": ("parallel", "cascade", None),
    "guarantee": ("measured", "bound"),
    "objective": ("l1", "nonzeros"),
    "scope": ("layer", "network"),
    "search": ("budget", "path"),
    "unit": ("weights", "neurons"),
    "norms": ("fold", "leave"),
}


A_FUNCTION = "(a function)"
"""What a recipe says of a mask that is a function of the batch; its values are told by the data's fingerprint."""


@dataclass(frozen=True)
class Recipe:
    """The arguments of ``prune_`` that decide what comes out."""

    eps: Any
    sparsity: Any
    network_eps: float | None
    mode: str | None
    guarantee: str
    objective: str
    scope: str
    search: str
    unit: str
    refit: bool
    keep_zeros: bool
    fit: str | Mapping[str, str] | None
    norms: str
    solver: str | Solver | None
    layers: list[str] | None
    activations: Mapping[str, str]
    ceiling: float
    gamma: float
    penalise_bias: bool
    limits: Mapping[str, Any]
    batch_size: int
    mask: str | bool | None
    seed: int
    options: Mapping[str, Any]

    def how(self) -> How:
        """How each layer is posed and solved."""
        return How(
            solver=self.solver,
            options={**self.limits, **self.options},
            ceiling=self.ceiling,
            gamma=self.gamma,
            penalise_bias=self.penalise_bias,
            cascade=self.mode == "cascade",
            refit=self.refit,
            keep_zeros=self.keep_zeros,
            seed=self.seed,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data; a solver's own options are told by their values."""
        own = {name: _told(value) for name, value in vars(self).items()}
        if not isinstance(self.solver, str) and self.solver is not None:
            own["options"] = {name: _told(value) for name, value in options_of(self.solver).items()}
        return own


def checked_recipe(**arguments: Any) -> Recipe:
    """The recipe, with what ``prune_`` promises to check before anything is computed.

    Raises:
        InvalidInput: An unknown word, arguments that contradict each other, or patterns that are no texts.
        InvalidTolerance: A number out of its range.
        UnknownSolver, UnknownOption: As in ``solve``.
    """
    for name, words in _WORDS.items():
        if arguments[name] not in words:
            expected = " or ".join(map(repr, words))
            raise InvalidInput(f"{name}: expected {expected}, found {arguments[name]!r}")
    if not isinstance(arguments["keep_zeros"], bool):
        raise InvalidInput(f"keep_zeros: expected True or False, found {arguments['keep_zeros']!r}")
    recipe = Recipe(**_defaults(arguments))
    _check_target(recipe)
    _check_tables(recipe)
    checked_limits(Limits(**recipe.limits))
    checked_count("batch_size", recipe.batch_size)
    checked_count("seed", recipe.seed, least=0)
    as_number("ceiling", recipe.ceiling)
    gamma = checked_radius("gamma", recipe.gamma)
    if gamma < 1:
        raise InvalidTolerance(f"gamma: expected a number ≥ 1, for the trained weights to be feasible; found {gamma}")
    if recipe.solver is not None:
        make_solver(recipe.solver, dict(recipe.options))
    return recipe


def recipe_of_call(given: Mapping[str, Any]) -> Recipe:
    """The recipe of ``prune_`` with these arguments, all of them by name; as ``checked_recipe``."""
    own = {field.name: given[field.name] for field in fields(Recipe) if field.name != "limits"}
    limits = {name: given[name] for name in ("tol", "feas_tol", "max_iter")}
    return checked_recipe(**own, limits=limits | {"time_limit": given["layer_time_limit"]})


def recipe_from_dict(data: Mapping[str, Any]) -> Recipe:
    """The recipe that ``to_dict`` described, to judge answers by: without its solver, for nothing in a file is run.

    Raises:
        InvalidInput, InvalidTolerance: It is none.
    """
    names = [field.name for field in fields(Recipe)]
    if missing := [name for name in names if name not in data]:
        raise InvalidInput(f"recipe: expected all arguments of prune_, found none for {', '.join(missing)}")
    own = {name: data[name] for name in names} | {"solver": None, "options": {}}
    if wrong := [name for name in ("refit", "keep_zeros", "penalise_bias") if not isinstance(own[name], bool)]:
        raise InvalidInput(f"recipe: {', '.join(wrong)}: expected true or false, found {[own[name] for name in wrong]}")
    own["ceiling"] = float(own["ceiling"])  # infinity was written as a text, here as well as of limits
    own["limits"] = {name: math.inf if value == "inf" else value for name, value in dict(own["limits"]).items()}
    return checked_recipe(**own)


def _defaults(arguments: Mapping[str, Any]) -> dict[str, Any]:
    asked = [name for name in ("eps", "sparsity", "network_eps") if arguments[name] is not None]
    if len(asked) > 1:
        raise InvalidInput(f"{' and '.join(asked)}: each says how far to prune; give one of them")
    layers = arguments["layers"]
    own = dict(arguments) | {"activations": {} if arguments["activations"] is None else arguments["activations"]}
    own["mask"] = A_FUNCTION if callable(arguments["mask"]) else check_mask(arguments["mask"])
    own["sparsity"] = _numbers(arguments["sparsity"])
    own["layers"] = None if layers is None else name_patterns(layers)
    if not asked:
        own["eps"] = 0.1
    return own


def _numbers(given: Any) -> Any:
    """Numbers of any type, alone or in a table, as Python's own."""
    if isinstance(given, Mapping):
        return {name: _numbers(value) for name, value in given.items()}
    return float(given) if isinstance(given, Real) and not isinstance(given, bool | int) else given


def _check_tables(recipe: Recipe) -> None:
    """Types of what goes by name patterns, and of eps whatever it goes by."""
    if not _is_table(recipe.activations, str):
        found = recipe.activations
        raise InvalidInput(f"activations: expected a mapping as {{'fc1': 'relu'}}, names to names, found {found!r}")
    if not (recipe.fit is None or isinstance(recipe.fit, str) or _is_table(recipe.fit, str)):
        raise InvalidInput(f"fit: expected a name, or a mapping from patterns to names, found {recipe.fit!r}")
    for argument, table in (("eps", recipe.eps), ("sparsity", recipe.sparsity)):
        if isinstance(table, Mapping) and not _is_table(table, object):
            raise InvalidInput(f"{argument}: expected patterns of names ('features.*'), found {list(table)}")
    for name, value in _entries(recipe.eps):
        if name and value is None:
            raise InvalidInput(f"eps of {name}: found None; to leave a layer as trained give layers='!{name}'")
        checked_radius(f"eps{name and f' of {name}'}", value)


def _entries(eps: Any) -> Iterable[tuple[Any, Any]]:
    if isinstance(eps, Mapping):
        return eps.items()
    if isinstance(eps, Sequence) and not isinstance(eps, str):
        return enumerate(eps, start=1)
    return [("", eps)] if eps is not None else []


def _is_table(value: object, kind: type) -> bool:
    return isinstance(value, Mapping) and all(isinstance(k, str) and isinstance(v, kind) for k, v in value.items())


def _check_target(recipe: Recipe) -> None:
    """Options of one target are not ignored by another."""
    misplaced = {
        "guarantee": recipe.guarantee != "measured" and recipe.network_eps is None,
        "objective": recipe.objective != "l1" and recipe.network_eps is None,
        "scope": recipe.scope != "layer" and recipe.sparsity is None,
        "search": recipe.search != "budget" and recipe.sparsity is None,
        "unit": recipe.unit != "weights" and recipe.sparsity is None,
        "refit": recipe.refit and recipe.sparsity is not None,
    }
    needed = dict.fromkeys(misplaced, "sparsity") | {
        "guarantee": "network_eps",
        "objective": "network_eps",
        "refit": "eps or network_eps",
    }
    for name, wrong in misplaced.items():
        if wrong:
            raise InvalidInput(f"{name}: it goes with {needed[name]}, which is not given; leave it out")
    if recipe.network_eps is not None:
        checked_radius("network_eps", recipe.network_eps)
    if recipe.sparsity is not None:
        _check_sparsity(recipe)


def _check_sparsity(recipe: Recipe) -> None:
    given = recipe.sparsity
    table = given if isinstance(given, Mapping) else {"": given}
    for name, value in table.items():
        _check_part(f"sparsity{name and f' of {name}'}", value)
    if recipe.unit == "neurons" and (recipe.search != "budget" or not isinstance(given, int | float)):
        raise InvalidInput(
            "unit: neurons are found along the path, one part for all layers: give sparsity a number alone"
        )
    if all(isinstance(value, str) for value in table.values()) and (recipe.scope, recipe.search) != ("layer", "budget"):
        found = next(iter(table.values()), given)
        raise InvalidInput(f"sparsity: a pattern such as {found!r} is each layer's own; leave scope, search out")


def _check_part(name: str, value: object) -> None:
    """A part from 0 to below 1, or a pattern such as "2:4"."""
    if isinstance(value, str):
        found = re.fullmatch(r"(\d+):(\d+)", value)
        if not found:
            raise InvalidInput(f"{name}: expected a number, or a pattern such as '2:4', found {value!r}")
        NM(int(found[1]), int(found[2]))  # refuses what is none
    elif isinstance(value, bool) or not isinstance(value, int | float) or not (math.isfinite(value) and 0 <= value < 1):
        raise InvalidTolerance(f"{name}: expected the part of weights to be zero, 0 to below 1, found {value!r}")


def _told(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {str(key): _told(item) for key, item in value.items()}
    if isinstance(value, str) or value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, set | frozenset):  # in an order that does not depend on the process
        return sorted((_told(item) for item in value), key=str)
    if isinstance(value, Sequence) or (isinstance(value, Iterable) and not isinstance(value, torch.Tensor)):
        return [_told(item) for item in value]
    return str(value) if isinstance(value, torch.dtype) else type(value).__name__
