"""Answers as journal entries, and back: nothing is taken on trust that can be looked at."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from convexprune.errors import DamagedFile
from convexprune.nettrim.folding import Fold
from convexprune.nettrim.goals import GOALS, KEPT, REFITTED, Answer, Goal, as_goal
from convexprune.runs.journal import Record
from convexprune.solvers import Solution, Status
from convexprune.solvers.arrays import working_dtype
from convexprune.solvers.certificate import Certificate
from convexprune.solvers.certificate.solution import Seconds, TracePoint

T = TypeVar("T")
_ENDS = (*map(str, Status), KEPT, REFITTED, "rounded")
_DAMAGE = (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError)


def recorded(answers: Sequence[Answer]) -> Record:
    """A layer's answers: weights as stored, multipliers, and all figures."""
    tensors: dict[str, Tensor] = {}
    for number, answer in enumerate(answers):
        tensors[f"stored.{number}"] = answer.stored
        if answer.solution.multipliers is not None:
            tensors[f"multipliers.{number}"] = answer.solution.multipliers
    return Record({"groups": [answer.to_dict() for answer in answers]}, tensors)


def recalled(record: Record, folds: Sequence[Fold]) -> tuple[Answer, ...]:
    """The answers of an entry.

    Raises:
        DamagedFile: Something in it is missing or is not what it should be.
    """
    try:
        return tuple(
            _answer(data, record.tensors, number, fold)
            for number, (data, fold) in enumerate(zip(record.data["groups"], folds, strict=True))
        )
    except _DAMAGE as error:
        raise _damaged(record, error) from error


def goal_of(record: Record) -> Goal:
    """What the entry is an answer to.

    Raises:
        DamagedFile: No goal that is known.
    """
    try:
        if (kind := record.data["goal"]["kind"]) not in GOALS:
            raise ValueError(f"a goal {kind!r}, expected one of {', '.join(GOALS)}")
        return as_goal(record.data["goal"])
    except _DAMAGE as error:
        raise _damaged(record, error) from error


def _damaged(record: Record, error: Exception) -> DamagedFile:
    found = f"{type(error).__name__}: {error}"
    layer = record.data.get("layer")
    return DamagedFile(
        f"the entry of layer {layer!r} is not what was written ({found}): delete its .json to have that layer solved "
        "again"
    )


def _answer(data: Mapping[str, Any], tensors: Mapping[str, Tensor], number: int, fold: Fold) -> Answer:
    told, stored = data["solution"], tensors[f"stored.{number}"]
    multipliers = tensors.get(f"multipliers.{number}")
    _check_arrays(stored, multipliers, told["shape"], fold)
    solution = Solution(
        weights=fold.apply(stored.to(working_dtype(stored.dtype))),
        multipliers=multipliers,
        status=Status(told["status"]),
        certificate=_made(Certificate, told["certificate"]),
        trace=tuple(_made(TracePoint, point) for point in told["trace"]),
        iterations=_of_type(int, told["iterations"]),
        seconds=_made(Seconds, told["seconds"]),
        provenance=_limited(told["provenance"]),
    )
    if data["status"] not in _ENDS:
        raise ValueError(f"a status {data['status']!r}, expected one of {', '.join(_ENDS)}")
    lists = {"notes": tuple(map(str, data["notes"])), "path": tuple(map(tuple, data.get("path", ())))}
    return _made(Answer, {**data, **lists, "solution": solution, "stored": stored})


def _check_arrays(stored: Tensor, multipliers: Tensor | None, shape: Any, fold: Fold) -> None:
    width = stored.shape[-1:] if fold.scale is None else fold.scale.shape
    if not stored.is_floating_point() or list(stored.shape) != shape or stored.ndim != 2 or stored.shape[1:] != width:
        raise ValueError(f"weights {stored.dtype} {list(stored.shape)}, expected {shape}")
    if multipliers is not None and (not multipliers.is_floating_point() or multipliers.shape[1:] != stored.shape[1:]):
        raise ValueError(f"multipliers {multipliers.dtype} {list(multipliers.shape)} for weights {shape}")
    if not all(bool(array.isfinite().all()) for array in (stored, multipliers) if array is not None):
        raise ValueError("NaN or infinity in its arrays")


def _limited(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """The provenance, with the tolerances that statuses are read by as numbers."""
    limits = dict(provenance["limits"])
    limits |= {name: _of_type(float, limits[name]) for name in ("tol", "feas_tol")}
    return {**provenance, "limits": limits}


def _made(kind: type[T], data: Mapping[str, Any]) -> T:
    """A dataclass from plain data, each number of the type that it should have."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        if field.name in data:
            values[field.name] = _of_type(field.type, data[field.name])
    if "residuals" in values:
        values["residuals"] = {str(name): _of_type(float, value) for name, value in data["residuals"].items()}
    return kind(**values)


def _of_type(kind: Any, value: Any) -> Any:
    """Infinities and NaN were written as texts."""
    if kind not in (bool, int, float, str):
        return value
    if kind is float and value in ("inf", "-inf", "nan"):
        return float(value)
    if type(value) is not kind and not (kind is float and type(value) is int):
        raise TypeError(f"{value!r}, expected a {kind.__name__}")
    return kind(value)


def to_device(answers: Sequence[Answer], device: torch.device) -> tuple[Answer, ...]:
    """The same with weights and multipliers there."""
    return tuple(
        dataclasses.replace(
            answer,
            stored=answer.stored.to(device),
            solution=dataclasses.replace(
                answer.solution,
                weights=answer.solution.weights.to(device),
                multipliers=None if answer.solution.multipliers is None else answer.solution.multipliers.to(device),
            ),
        )
        for answer in answers
    )
