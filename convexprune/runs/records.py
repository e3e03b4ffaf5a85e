"""Answers as journal entries, back, and judged again: nothing is taken on trust that can be looked at."""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from itertools import repeat
from typing import cast, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from convexprune.errors import DamagedFile, PruningFailed
from convexprune.files.texts import Json
from convexprune.options import Options
from convexprune.report.report import LayerReport
from convexprune.runs.answer import ENDS, KEPT, Answer, Goal, agreement, layer_row
from convexprune.runs.journal import Record
from convexprune.runs.layer import Fold, Layer
from convexprune.runs.problem import Problem
from convexprune.solvers.arrays import working_dtype
from convexprune.solvers.certificate import Status
from convexprune.solvers.errors import ConvexPruneError, Infeasible

_log = logging.getLogger(__name__)
_DAMAGE = (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError)


def recorded(goal: Goal, answers: Sequence[Answer]) -> Record:
    """A layer's answers: weights as stored, multipliers, all figures, and the goal in words."""
    tensors, groups = dict[str, Tensor](), list[Json]()
    for number, answer in enumerate(answers):
        tensors[f"stored.{number}"] = answer.stored
        if answer.solution.multipliers is not None:
            tensors[f"multipliers.{number}"] = answer.solution.multipliers
        own = {field.name: getattr(answer, field.name) for field in fields(answer) if field.name != "stored"}
        groups.append(own | {"solution": answer.solution.to_dict()})
    data = {"wanted": str(goal), "allowed": goal.allowed, "measured": goal.measured, "groups": groups}
    return Record(data, tensors)


def recalled(record: Record, folds: Sequence[Fold], device: torch.device | None = None) -> tuple[Answer, ...]:
    """The answers of an entry, on a device; None: the CPU.

    Raises:
        DamagedFile: Something in it is missing or is not what it should be.
    """
    try:
        tensors = {name: tensor.to(device or "cpu") for name, tensor in record.tensors.items()}
        groups = enumerate(zip(record.data["groups"], folds, strict=True))
        return tuple(
            _answer(data, tensors[f"stored.{number}"], tensors.get(f"multipliers.{number}"), fold)
            for number, (data, fold) in groups
        )
    except _DAMAGE as error:
        found, layer = f"{type(error).__name__}: {error}", record.data.get("layer")
        raise DamagedFile(
            f"the entry of layer {layer!r} is not what was written ({found}): delete its .json to have that layer "
            "solved again"
        ) from error


def _answer(data: Json, stored: Tensor, multipliers: Tensor | None, fold: Fold) -> Answer:
    solved, limits = data["solution"], data["solution"]["provenance"]["limits"]
    width = stored.shape[-1:] if fold.scale is None else fold.scale.shape
    if list(stored.shape) != solved["shape"] or stored.ndim != 2 or stored.shape[1:] != width:
        raise ValueError(f"weights {list(stored.shape)}, expected {solved['shape']}")
    if multipliers is not None and multipliers.shape[1:] != stored.shape[1:]:
        raise ValueError(f"multipliers {list(multipliers.shape)} for weights {list(stored.shape)}")
    arrays = [stored] if multipliers is None else [stored, multipliers]
    if not all(array.is_floating_point() and bool(array.isfinite().all()) for array in arrays):
        raise ValueError("NaN, infinity or whole numbers in its arrays")
    if data["status"] not in ENDS:
        raise ValueError(f"a status {data['status']!r}, expected one of {', '.join(ENDS)}")
    _read(float, limits["tol"]), _read(float, limits["feas_tol"])
    weights = fold.apply(stored.to(working_dtype(stored.dtype)))
    solution = {**solved, "weights": weights, "multipliers": multipliers}
    return cast(Answer, _read(Answer, {**data, "solution": solution, "stored": stored}))


def _read(kind: object, value: object) -> object:
    """What a field of this kind holds, from plain data, in which infinities and NaN were written as texts."""
    inner = get_args(kind)
    if isinstance(kind, type) and is_dataclass(kind):
        given, kinds = cast(Json, value), get_type_hints(kind)
        return kind(**{f.name: _read(kinds[f.name], given[f.name]) for f in fields(kind) if f.name in given})
    if get_origin(kind) is tuple:
        items = cast(Sequence[object], value)
        return tuple(map(_read, repeat(inner[0]) if inner[-1] is Ellipsis else inner, items))
    if kind == Mapping[str, float]:
        return {name: _read(float, item) for name, item in cast(Json, value).items()}
    if kind is Status:
        return Status(value)
    if kind is float and (value in ("inf", "-inf", "nan") or type(value) is int):
        return float(value)
    if kind in (bool, int, float, str) and type(value) is not kind:
        raise TypeError(f"{value!r}, expected a {kind}")
    return value


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
    answers = recalled(record, layer.folds, trained[0].device)

    def found(again: Sequence[Answer] | None, *differences: str) -> tuple[tuple[Answer, ...], Judged]:
        row, recomputed = (None if each is None else layer_row(layer, goal, each) for each in (answers, again))
        return answers, Judged(layer.name, str(goal), row, recomputed, differences)

    claims = [(answer.stored.dtype, list(answer.stored.shape)) for answer in answers]
    expected = [(stored.dtype, list(stored.shape)) for stored in trained]
    if claims != expected:
        return found(None, f"its weights are {claims}, those of the layer {expected}")
    try:
        again = goal.judge(answers, problems(), options)
    except ConvexPruneError as error:  # multipliers of another program, a budget that this layer cannot have
        return found(None, str(error))
    return found(again, *_differences(answers, again, goal.measured))


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


def _differences(recorded: Sequence[Answer], again: Sequence[Answer], measured: bool) -> Iterator[str]:
    """What is recorded otherwise than recomputed, by more than rounding; of measurements but for bound and gap."""
    for number, (claim, known) in enumerate(zip(recorded, again, strict=True)):
        where = f" (group {number})" if len(recorded) > 1 else ""
        allowed, facts = slack(known), _figures(known)
        for name, value in _figures(claim).items():
            fact, left_out = facts[name], measured and name in ("bound", "gap")
            near = (
                isinstance(value, float)
                and isinstance(fact, float)
                and (abs(value - fact) <= allowed.get(name, 0.0) or (math.isnan(value) and math.isnan(fact)))
            )
            if not (value == fact or near or left_out):
                yield f"{name}{where}: recorded {value}, recomputed {fact}"


def _figures(answer: Answer) -> dict[str, object]:
    names = ("radius", "promised", "size", "error", "samples", "before", "nonzeros", "returned", "status", "original")
    return answer.solution.certificate.to_dict() | {name: getattr(answer, name) for name in names}


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
