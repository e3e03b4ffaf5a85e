"""Answers as journal entries, and back."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from convexprune.errors import DamagedFile
from convexprune.journal import Record
from convexprune.nettrim.folding import Fold
from convexprune.nettrim.goals import Answer
from convexprune.solvers import Certificate, Solution, Status
from convexprune.solvers.arrays import working_dtype
from convexprune.solvers.solution import Seconds, TracePoint

__all__ = ["recalled", "recorded"]

T = TypeVar("T")


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
    except (KeyError, TypeError, ValueError) as error:
        layer = record.data.get("layer")
        raise DamagedFile(
            f"the entry of layer {layer!r} lacks something ({error!r}); delete it and solve again"
        ) from error


def _answer(data: Mapping[str, Any], tensors: Mapping[str, Tensor], number: int, fold: Fold) -> Answer:
    told, stored = data["solution"], tensors[f"stored.{number}"]
    solution = Solution(
        weights=fold.apply(stored.to(working_dtype(stored.dtype))),
        multipliers=tensors.get(f"multipliers.{number}"),
        status=Status(told["status"]),
        certificate=_made(Certificate, told["certificate"]),
        trace=tuple(_made(TracePoint, point) for point in told["trace"]),
        iterations=int(told["iterations"]),
        seconds=_made(Seconds, told["seconds"]),
        provenance=dict(told["provenance"]),
    )
    return _made(Answer, data | {"solution": solution, "stored": stored, "notes": tuple(data["notes"])})  # type: ignore[operator]


def _made(kind: type[T], data: Mapping[str, Any]) -> T:
    """A dataclass from plain data, whose infinities were written as texts."""
    fields = {field.name: field.type for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    values = {name: float(data[name]) if fields[name] is float else data[name] for name in fields if name in data}
    if "residuals" in values:
        values["residuals"] = {name: float(value) for name, value in data["residuals"].items()}
    return kind(**values)


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
