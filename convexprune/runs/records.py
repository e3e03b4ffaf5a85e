"""Answers as journal entries, back, and judged again: nothing is taken on trust that can be looked at."""

import dataclasses
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar, cast, get_type_hints

from torch import Tensor

from convexprune.errors import DamagedFile, PruningFailed
from convexprune.options import Options
from convexprune.report.report import LayerReport
from convexprune.runs.answer import (
    KEPT,
    MASKED,
    MASKED_REFITTED,
    REFITTED,
    ROUNDED,
    SAMPLED,
    Answer,
    Goal,
    agreement,
    layer_row,
)
from convexprune.runs.journal import Record
from convexprune.runs.layer import Fold, Layer
from convexprune.runs.problem import Problem
from convexprune.solvers.arrays import working_dtype
from convexprune.solvers.certificate import Certificate, Solution, Status
from convexprune.solvers.certificate.solution import Seconds, TracePoint
from convexprune.solvers.errors import ConvexPruneError, Infeasible

_log = logging.getLogger(__name__)
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


# Judged again


@dataclass(frozen=True)
class Judged:
    """A recorded entry of a layer, judged on its data without a solver.

    Attributes:
        name: Of the layer.
        goal: What was wanted of it.
        recorded: The row that the entry makes; None where it cannot be read.
        recomputed: The same from the recorded weights and multipliers, the model and the data; None likewise.
        differences: What is not as recorded, by more than rounding; empty if all is.
    """

    name: str
    goal: str
    recorded: LayerReport | None
    recomputed: LayerReport | None
    differences: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether all that is recorded holds."""
        return not self.differences


def judged_record(
    layer: Layer,
    goal: Goal,
    record: Record,
    trained: Sequence[Tensor],
    problems: Callable[[], tuple[Problem, ...]],
    options: Options,
) -> tuple[tuple[Answer, ...], Judged]:
    """The answers of an entry, and what is found of them on the layer's data.

    Raises:
        DamagedFile: The entry is not such as is written.
    """
    answers = tuple(answer.to(trained[0].device) for answer in recalled(record, layer.folds))
    row = layer_row(layer, goal, answers)
    claims = [(answer.stored.dtype, list(answer.stored.shape)) for answer in answers]
    expected = [(stored.dtype, list(stored.shape)) for stored in trained]
    if claims != expected:
        wrong = f"its weights are {claims}, those of the layer {expected}"
        return answers, Judged(layer.name, str(goal), row, None, (wrong,))
    try:
        again = goal.judge(answers, problems(), options)
    except ConvexPruneError as error:  # multipliers of another program, a budget that this layer cannot have
        return answers, Judged(layer.name, str(goal), row, None, (str(error),))
    found = _differences(answers, again, goal.measured)
    return answers, Judged(layer.name, str(goal), row, layer_row(layer, goal, again), found)


def slack(answer: Answer) -> dict[str, float]:
    """How far each recorded figure may be from the one of this recomputed answer."""
    c, r = answer.solution.certificate, agreement(answer.stored.dtype)
    size, radius = answer.size, answer.radius
    relative = size / radius if 0 < radius < math.inf else 1.0
    # A loss is a square: its rounding goes with the outputs and not with what little they miss by.
    loss = size * max(answer.error, r * size) if math.isinf(radius) else 0.0
    value = r * (abs(c.value) + 4 * loss) if math.isfinite(c.value) else 0.0
    bound = 4 * r * max(abs(c.value), abs(c.bound)) if math.isfinite(c.bound) else 0.0
    return {
        "value": value,
        "bound": bound,
        "scale": value + r * c.scale,
        "gap": (value + bound) * (1 + c.gap) / c.scale if c.scale > 0 and math.isfinite(c.gap) else 0.0,
        "violation": 2 * r * (1 + relative),
        "size": r * size,
        "error": 2 * r * size,
        "radius": 2 * r * size,
        "promised": 4 * r * size,
    }


def _differences(recorded: Sequence[Answer], again: Sequence[Answer], measured: bool) -> tuple[str, ...]:
    """What is recorded otherwise than recomputed, by more than rounding; of measurements but for bound and gap."""
    found = []
    for number, (claim, known) in enumerate(zip(recorded, again, strict=True)):
        where = f" (group {number})" if len(recorded) > 1 else ""
        allowed, claims, facts = slack(known), _figures(claim), _figures(known)
        for name, value in claims.items():
            left_out = measured and name in ("bound", "gap")
            if not left_out and not _agree(value, facts[name], allowed.get(name, 0.0)):
                found.append(f"{name}{where}: recorded {value}, recomputed {facts[name]}")
    return tuple(found)


def _figures(answer: Answer) -> dict[str, object]:
    names = ("radius", "promised", "size", "error", "samples", "before", "nonzeros", "returned", "status", "original")
    return answer.solution.certificate.to_dict() | {name: getattr(answer, name) for name in names}


def _agree(one: object, other: object, allowed: float) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return one == other or abs(one - other) <= allowed or (math.isnan(one) and math.isnan(other))
    return bool(one == other)


def check_answer(name: str, answer: Answer) -> None:
    """Whether an answer can be written and kept; what its layer's user should know is logged.

    Raises:
        Infeasible, PruningFailed: It holds no usable weights.
    """
    status = answer.solution.status
    if answer.status == KEPT:
        advice = "" if status is Status.SOLVED else f". {status.advice}"
        _log.warning("layer %r: %s%s", name, answer.notes[-1], advice)
        return
    if status is Status.INFEASIBLE:
        raise Infeasible(f"layer {name!r}: {status.advice} The model is unchanged")
    if not bool(answer.stored.isfinite().all()):
        message = answer.solution.provenance["message"] or status.advice
        raise PruningFailed(f"layer {name!r}: the solver ended {status}: {message} The model is unchanged")
    if status not in (Status.SOLVED, Status.NO_BOUND):
        _log.warning("layer %r ended %s: %s", name, status, status.advice)
