"""Answers as journal entries, and back: nothing is taken on trust that can be looked at."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TypeVar, cast, get_type_hints

from torch import Tensor

from convexprune.errors import DamagedFile
from convexprune.runs.answer import KEPT, MASKED, MASKED_REFITTED, REFITTED, ROUNDED, SAMPLED, Answer, Goal
from convexprune.runs.journal import Record
from convexprune.runs.layer import Fold
from convexprune.solvers.arrays import working_dtype
from convexprune.solvers.certificate import Certificate, Solution, Status
from convexprune.solvers.certificate.solution import Seconds, TracePoint

T = TypeVar("T")
Plain = Mapping[str, object]
_ENDS = (*map(str, Status), KEPT, REFITTED, ROUNDED, MASKED, MASKED_REFITTED, *SAMPLED)
_DAMAGE = (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError)


def recorded(goal: Goal, answers: Sequence[Answer]) -> Record:
    """A layer's answers: weights as stored, multipliers, all figures, and the goal in words."""
    tensors: dict[str, Tensor] = {}
    for number, answer in enumerate(answers):
        tensors[f"stored.{number}"] = answer.stored
        if answer.solution.multipliers is not None:
            tensors[f"multipliers.{number}"] = answer.solution.multipliers
    data = {"wanted": str(goal), "allowed": goal.allowed, "measured": goal.measured}
    return Record(data | {"groups": [answer.to_dict() for answer in answers]}, tensors)


def recalled(record: Record, folds: Sequence[Fold]) -> tuple[Answer, ...]:
    """The answers of an entry.

    Raises:
        DamagedFile: Something in it is missing or is not what it should be.
    """
    try:
        groups = cast(Sequence[Plain], record.data["groups"])
        return tuple(
            _answer(data, record.tensors, number, fold)
            for number, (data, fold) in enumerate(zip(groups, folds, strict=True))
        )
    except _DAMAGE as error:
        found, layer = f"{type(error).__name__}: {error}", record.data.get("layer")
        raise DamagedFile(
            f"the entry of layer {layer!r} is not what was written ({found}): delete its .json to have that layer "
            "solved again"
        ) from error


def _answer(data: Plain, tensors: Mapping[str, Tensor], number: int, fold: Fold) -> Answer:
    solved, stored = cast(Plain, data["solution"]), tensors[f"stored.{number}"]
    multipliers = tensors.get(f"multipliers.{number}")
    _check_arrays(stored, multipliers, solved["shape"], fold)
    solution = Solution(
        weights=fold.apply(stored.to(working_dtype(stored.dtype))),
        multipliers=multipliers,
        status=Status(solved["status"]),
        certificate=_made(Certificate, solved["certificate"]),
        trace=tuple(_made(TracePoint, point) for point in cast(Sequence[object], solved["trace"])),
        iterations=cast(int, _of_type(int, solved["iterations"])),
        seconds=_made(Seconds, solved["seconds"]),
        provenance=_limited(cast(Plain, solved["provenance"])),
    )
    if data["status"] not in _ENDS:
        raise ValueError(f"a status {data['status']!r}, expected one of {', '.join(_ENDS)}")
    lists = {"notes": tuple(map(str, cast(Sequence[object], data["notes"])))}
    path = tuple(map(tuple, cast(Sequence[Sequence[object]], data.get("path", ()))))
    return _made(Answer, {**data, **lists, "path": path, "solution": solution, "stored": stored})


def _check_arrays(stored: Tensor, multipliers: Tensor | None, shape: object, fold: Fold) -> None:
    width = stored.shape[-1:] if fold.scale is None else fold.scale.shape
    if not stored.is_floating_point() or list(stored.shape) != shape or stored.ndim != 2 or stored.shape[1:] != width:
        raise ValueError(f"weights {stored.dtype} {list(stored.shape)}, expected {shape}")
    if multipliers is not None and (not multipliers.is_floating_point() or multipliers.shape[1:] != stored.shape[1:]):
        raise ValueError(f"multipliers {multipliers.dtype} {list(multipliers.shape)} for weights {shape}")
    if not all(bool(array.isfinite().all()) for array in (stored, multipliers) if array is not None):
        raise ValueError("NaN or infinity in its arrays")


def _limited(provenance: Plain) -> dict[str, object]:
    """The provenance, with the tolerances that statuses are read by as numbers."""
    limits = dict(cast(Plain, provenance["limits"]))
    limits |= {name: _of_type(float, limits[name]) for name in ("tol", "feas_tol")}
    return {**provenance, "limits": limits}


def _made(kind: type[T], data: object) -> T:
    """A dataclass from plain data, each number of the type that it should have."""
    given, hints = cast(Plain, data), get_type_hints(kind)
    values = {
        field.name: _of_type(hints[field.name], given[field.name])
        for field in dataclasses.fields(kind)  # type: ignore[arg-type]
        if field.name in given
    }
    if "residuals" in values:
        residuals = cast(Plain, given["residuals"])
        values["residuals"] = {str(name): _of_type(float, value) for name, value in residuals.items()}
    return kind(**values)


def _of_type(kind: object, value: object) -> object:
    """The value, if it is of the kind; infinities and NaN were written as texts."""
    if kind not in (bool, int, float, str):
        return value
    if kind is float and value in ("inf", "-inf", "nan"):
        return float(value)
    if type(value) is not kind and not (kind is float and type(value) is int):
        raise TypeError(f"{value!r}, expected a {kind.__name__}")
    return kind(value)
