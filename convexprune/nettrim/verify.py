"""Every certificate of a run directory once more, in float64, from the trained model, the data and what was recorded.

The run is gone through again as its recipe says, with answers from the journal alone: no solver takes part. So each
layer meets the inputs that it met then, in cascade those of the network with the recorded weights before it.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from convexprune.calibration import Calibration
from convexprune.errors import DamagedFile
from convexprune.files import StrPath
from convexprune.forwards import Forward
from convexprune.journal import Journal, Record, check_same, data_fingerprint, model_fingerprint
from convexprune.nettrim.asked import planned
from convexprune.nettrim.goals import REFITTED, Answer, Goal, KeepInputs, Measurement, Within
from convexprune.nettrim.posed import How, Posed
from convexprune.nettrim.recipe import Recipe, recipe_from_dict
from convexprune.nettrim.records import goal_of, recalled, to_device
from convexprune.nettrim.rows import layer_row
from convexprune.nettrim.run import Run
from convexprune.nettrim.sites import Versions
from convexprune.nettrim.stopping import Stop
from convexprune.nettrim.tasks import Task
from convexprune.nettrim.verification import Verification, VerifiedLayer
from convexprune.progress import silent
from convexprune.solvers import Certificate, Gram, LayerProgram, Status, certify
from convexprune.solvers.errors import ConvexPruneError, InvalidInput

__all__ = ["verify"]

# Certificates are sums in float64. What they are made of is not: a layer's inputs come from a forward in the model's
# dtype, and another device or number of threads adds these up in another order. So figures agree to many roundings of
# that dtype, and exactly where nothing was different.
_AGREEMENT = {torch.float64: 1e-9, torch.float32: 1e-5}
_HALF = 1e-3


def verify(
    model: nn.Module,
    calibration: Any,
    run: StrPath,
    *,
    forward: Forward | None = None,
    batch_size: int | None = None,
) -> Verification:
    """Judge all that a run directory says, without solving anything; the model is left as it is.

    Recomputed are, for each recorded layer, the certificate of its stored weights with its stored multipliers (value,
    bound, gap, violation), the radius and the output error; whether its status follows from them; and whether budgets
    and patterns are kept. Of paths that were measured to allocate by, the weights that are kept are judged, without
    bound and gap. Figures must agree to 1e-9 for float64 models, 1e-5 for float32 ones, 1e-3 below, relative to
    what they are differences of.

    Args:
        model: The trained model, as it was before pruning.
        calibration: The data that the run was given.
        run: The directory.
        forward: As for ``prune_``; it cannot be compared with that of the run, so give the same.
        batch_size: None: as recorded.

    Returns:
        A row an entry. A run that is not complete is verified as far as it goes, and ``missing`` says what lacks.

    Raises:
        FileNotFoundError: The folder holds no run.
        OtherRun: The model or the data are not those of the run.
        DamagedFile: Its run.json cannot be used; damaged entries are differences in their rows.
        Infeasible, InvalidInput: As in ``prune_``, where the recipe itself cannot be followed.
    """
    journal, described = Journal.existing(run)
    recipe = _recipe(run, described)
    data = Calibration(calibration, recipe.batch_size if batch_size is None else batch_size)
    given = {"model": model_fingerprint(model), "data": data_fingerprint(data), "recipe": described["recipe"]}
    check_same(run, described, given)
    plan, target, _ = planned(model, data, recipe, forward, partial(silent, "verify"))
    versions = Versions(plan.sites)
    replay = _Replay(journal)
    work = Run(model, data, forward, plan.sites, versions, recipe.how(), replay, Stop(), replay.end, silent, None)
    replay.run = work
    try:
        target.pursue(work)
    finally:
        versions.restore_()
    return Verification(
        layers=tuple(replay.rows),
        missing=tuple(name for name in plan.order if name not in work.written and name not in work.left),
        unreached=tuple(path.name for path in journal.paths() if path not in replay.seen),
        samples=plan.samples,
        provenance={key: described[key] for key in ("model", "data", "recipe")},
    )


def _recipe(run: StrPath, described: Mapping[str, Any]) -> Recipe:
    try:
        return recipe_from_dict(described["recipe"])
    except (InvalidInput, TypeError, ValueError, AttributeError) as error:
        raise DamagedFile(f"{run}: its run.json holds no recipe of prune_ ({error}); restore it") from error


class _Replay(Journal):
    """A journal that judges each entry when it is asked for, while the model is as it was when it was written."""

    run: Run

    def __init__(self, journal: Journal) -> None:
        self.journal, self.folder = journal, journal.folder
        self.rows: list[VerifiedLayer] = []
        self.seen: set[Path] = set()
        self._unlock = None  # nothing is written

    def end(self, makers: Iterable[Callable[[], Task]]) -> Iterator[tuple[int, tuple[Answer, ...]]]:
        """In the place of solving what is not recorded."""
        if next(iter(makers), None) is not None:
            self.run.stopped = "nothing more is recorded"
        return iter(())

    def get(self, name: str, goal: Mapping[str, Any]) -> Record | None:
        """The entry, once it is judged; None if its weights are not such as could be written."""
        try:
            record = self.journal.get(name, goal) or self._near(name, goal)
            if record is None:
                return None
            answers = recalled(record, self.run.sites[name].folds)
            asked = goal_of(record)
        except DamagedFile as error:
            self._look_at(name, goal)
            self.rows.append(VerifiedLayer(name, str(goal.get("kind")), None, None, (str(error),)))
            return None
        self._look_at(name, record.data["goal"])
        row = _judged(self.run, name, asked, answers)
        self.rows.append(row)
        return record if row.recomputed is not None else None

    def _look_at(self, name: str, goal: Mapping[str, Any]) -> None:
        self.seen.add(self.journal.path(name, goal))

    def _near(self, name: str, goal: Mapping[str, Any]) -> Record | None:
        """An entry whose goal is the same up to rounding, which differs on another machine where eps is allocated."""
        for path, layer, known in self._goals:
            if layer == name and _same_up_to_rounding(known, goal):
                return self.journal.read(path)
        return None

    @cached_property
    def _goals(self) -> list[tuple[Path, str, Mapping[str, Any]]]:
        found = []
        for path in self.journal.paths():
            with suppress(DamagedFile):  # told of where it is asked for, or among those that are not
                record = self.journal.read(path)
                found.append((path, record.data["layer"], record.data["goal"]))
        return found


def _same_up_to_rounding(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    def same(a: Any, b: Any) -> bool:
        if isinstance(a, float) and isinstance(b, float):
            return math.isclose(a, b, rel_tol=1e-5)
        return bool((list(a) if isinstance(a, tuple) else a) == (list(b) if isinstance(b, tuple) else b))

    return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)


def _judged(run: Run, name: str, goal: Goal, answers: tuple[Answer, ...]) -> VerifiedLayer:
    site, posed = run.sites[name], run.pose(name)
    answers = to_device(answers, posed[0].stored.device)
    recorded = layer_row(site, goal, answers)
    if reason := _misfit(answers, posed):
        return VerifiedLayer(name, str(goal), recorded, None, (reason,))
    try:
        again = [_again(answer, goal, group, run.how) for answer, group in zip(answers, posed, strict=True)]
    except ConvexPruneError as error:  # multipliers of another program, a budget that this layer cannot have
        return VerifiedLayer(name, str(goal), recorded, None, (str(error),))
    # Of a measured path no multipliers are kept, so what proved its bound is gone; nothing is promised of it.
    left_out = ("bound", "gap") if isinstance(goal, Measurement) else ()
    return VerifiedLayer(
        name, str(goal), recorded, layer_row(site, goal, again), _differences(answers, again, left_out)
    )


def _misfit(answers: Sequence[Answer], posed: Sequence[Posed]) -> str | None:
    found = [(answer.stored.dtype, list(answer.stored.shape)) for answer in answers]
    expected = [(group.stored.dtype, list(group.stored.shape)) for group in posed]
    return None if found == expected else f"its weights are {found}, those of the layer {expected}"


def _again(answer: Answer, goal: Goal, posed: Posed, how: How) -> Answer:
    """The answer with everything that can be recomputed."""
    if isinstance(goal, Measurement):
        posed = goal.sample(posed, how)
    program = goal.programs(posed, how)
    U = posed.fold.apply(answer.stored.to(posed.dtype))
    certificate = _certificate(program, posed, U, answer)
    radius, promised = math.inf, math.inf
    if isinstance(goal, Within):
        fit, promised = posed.within(goal.eps, how)
        radius = float(fit.eps)
    status = _status(answer, goal, posed, how, certificate)
    judged = replace(answer.solution, weights=U, certificate=certificate)
    return replace(Answer.of(judged, answer.stored, posed, radius, promised, status, answer.notes), path=answer.path)


def _certificate(program: LayerProgram, posed: Posed, U: Tensor, answer: Answer) -> Certificate:
    found, claim = certify(program, U, answer.solution.multipliers), answer.solution.certificate
    if isinstance(posed.X, Gram) and found.bound < claim.bound:
        # Multipliers of a Gram belong to a root of XᵀX, which other roundings may turn; the residual turns with it.
        own = certify(program, U)
        bound = min(own.bound, claim.bound)  # what is below a proven bound is proven
        if bound > found.bound:
            gap = max(0.0, own.value - bound) / own.scale if own.scale > 0 else 0.0
            return replace(own, bound=bound, gap=gap)
    return found


def _status(answer: Answer, goal: Goal, posed: Posed, how: How, certificate: Certificate) -> str:
    """The recorded status where it promises nothing, or what it promises is found to hold."""
    slack = _slack(answer, certificate)
    tol, feas_tol = float(how.options["tol"]), float(how.options["feas_tol"])
    inside = certificate.violation <= feas_tol + slack["violation"]
    holds = {
        str(Status.SOLVED): isinstance(goal, Within) and inside and certificate.gap <= tol + slack["gap"],
        REFITTED: isinstance(goal, Within) and how.refit and inside,
        str(Status.NO_BOUND): not isinstance(goal, Within) and inside and _kept(goal, posed, answer, certificate),
    }
    if isinstance(goal, Measurement) or holds.get(answer.status, True):
        return answer.status
    return f"not {answer.status}"


def _kept(goal: Goal, posed: Posed, answer: Answer, certificate: Certificate) -> bool:
    """Whether a budget is; a broken one has an infinite value."""
    inside = not isinstance(goal, KeepInputs) or not bool(answer.stored[~goal.support(posed)].any())
    return inside and math.isfinite(certificate.value)


def _slack(answer: Answer, certificate: Certificate) -> dict[str, float]:
    """How far each recorded figure may be from the one recomputed."""
    r = _AGREEMENT.get(answer.stored.dtype, _HALF)
    size, radius, c = answer.size, answer.radius, certificate
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


def _differences(recorded: Sequence[Answer], again: Sequence[Answer], left_out: Sequence[str] = ()) -> tuple[str, ...]:
    found = []
    for number, (told, known) in enumerate(zip(recorded, again, strict=True)):
        where = f" (group {number})" if len(recorded) > 1 else ""
        slack, claims, facts = _slack(known, known.solution.certificate), _figures(told), _figures(known)
        for name, claim in claims.items():
            if name not in left_out and not _agree(claim, facts[name], slack.get(name, 0.0)):
                found.append(f"{name}{where}: recorded {claim}, recomputed {facts[name]}")
    return tuple(found)


def _figures(answer: Answer) -> dict[str, Any]:
    names = ("radius", "promised", "size", "error", "samples", "before", "nonzeros", "status")
    return answer.solution.certificate.to_dict() | {name: getattr(answer, name) for name in names}


def _agree(one: Any, other: Any, slack: float) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return one == other or abs(one - other) <= slack
    return bool(one == other)
