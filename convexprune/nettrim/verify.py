"""Every certificate of a run directory once more, in float64, from the trained model, the data and what was recorded.

The run is gone through again as its recipe says, with answers from the journal alone: no solver takes part. So each
layer meets the inputs that it met then, in cascade those of the network with the recorded weights before it.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from torch import nn

from convexprune.errors import DamagedFile
from convexprune.files.weights import StrPath
from convexprune.nettrim.goals import Answer, Goal
from convexprune.nettrim.judging import agreement
from convexprune.nettrim.outcome import dtype_of, network_promise
from convexprune.nettrim.planning import Plan
from convexprune.nettrim.recipe import A_FUNCTION, Recipe, recipe_from_dict
from convexprune.nettrim.records import goal_of
from convexprune.nettrim.request import planned
from convexprune.nettrim.run import Run
from convexprune.nettrim.tasks import Task
from convexprune.nettrim.verification import Verification, VerifiedLayer
from convexprune.network.calibration import Calibration
from convexprune.network.choosing import check_module
from convexprune.network.compiled import uncompiled
from convexprune.network.fitting import fitted
from convexprune.network.forwards import Forward
from convexprune.network.padding import Mask
from convexprune.progress import silent
from convexprune.runs.consistency import check_results
from convexprune.runs.journal import Journal, Record, check_same, described_run, read_json
from convexprune.solvers.errors import InvalidInput


def verify(
    model: nn.Module,
    calibration: Any,
    run: StrPath,
    *,
    holdout: Any = None,
    forward: Forward | None = None,
    batch_size: int | None = None,
    mask: Mask = None,
) -> Verification:
    """Judge all that a run directory says, without solving anything; the model is left as it is.

    Recomputed are, for each recorded layer, the certificate of its stored weights with its stored multipliers (value,
    bound, gap, violation), the radius and the output error; whether its status follows from them; and whether budgets
    and patterns are kept. Of paths that were measured to allocate by, the weights that are kept are judged, without
    bound and gap. Where all entries of a complete run hold, report.json and model.safetensors in the folder are
    compared with them, and the error and the bound of the network are recomputed. Figures must agree to 1e-9 for
    float64 models, 1e-5 for float32 ones, 1e-3 below, relative to what they are differences of.

    Args:
        model: The trained model, as it was before pruning.
        calibration: The data that the run was given.
        run: The directory.
        holdout: What was held out, if anything was.
        forward: As for ``prune_``; it cannot be compared with that of the run, so give the same.
        batch_size: None: as recorded.
        mask: The function, if the run was given one; a key, or none, is as recorded.

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
    if recipe.mask == A_FUNCTION and not callable(mask):
        raise InvalidInput(f"mask: the run was given a function of the batch; give the same, found {mask!r}")
    hides = mask if recipe.mask == A_FUNCTION else recipe.mask
    data = Calibration(calibration, recipe.batch_size if batch_size is None else batch_size, hides)
    model = uncompiled(check_module(model))
    held_out = None if holdout is None else Calibration(holdout, recipe.batch_size, hides)
    check_same(run, described, described_run(model, data, described["recipe"], held_out))
    forward, _ = fitted(model, data, forward)
    plan, target, _ = planned(model, data, recipe, forward, partial(silent, "verify"))
    replay = _Replay.planned(model, data, forward, plan, recipe.how(), journal=journal, holdout=held_out)
    try:
        target.pursue(replay)
        reached = {*replay.written, *replay.left} - replay.lacking
        missing = tuple(name for name in plan.order if name not in reached)
        sound = not missing and all(row.ok for row in replay.rows)
        results = (
            _results(replay, plan, described["recipe"]) if sound and (Path(run) / "report.json").is_file() else None
        )
    finally:
        replay.versions.restore_()
    return Verification(
        layers=tuple(replay.rows),
        missing=missing,
        unreached=tuple(path.name for path in journal.paths() if path not in replay.seen),
        results=results,
        samples=plan.samples,
        provenance={key: described[key] for key in ("model", "data", "recipe")},
    )


def recorded_mask(run: StrPath) -> str | bool | None:
    """The mask that the run was given: a name, None for the usual one, or False.

    Raises:
        FileNotFoundError, DamagedFile: As ``verify``.
    """
    return _recipe(run, Journal.existing(run)[1]).mask


def _results(replay: "_Replay", plan: Plan, recipe: Mapping[str, Any]) -> tuple[str, ...] | None:
    """What report.json and model.safetensors say otherwise than the entries, all of which hold; None without them."""
    folder = replay.entries.folder
    if not (folder / "report.json").is_file():
        return None
    try:
        report = read_json(folder / "report.json", "prune again with the same arguments to have it written anew")
        check_results(folder, report, replay.entries, recipe)
        mask = plan.counted.to_dict()
        masks = [] if report.get("mask") == mask else [f"report.json: mask is {report.get('mask')}, recomputed {mask}"]
        return (*masks, *_network_differences(replay, plan, recipe, report["network"]))
    except DamagedFile as error:
        return (str(error),)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        return (f"report.json is not as convexprune writes it ({error!r}); prune again with the same arguments",)


def _network_differences(
    replay: "_Replay", plan: Plan, recipe: Mapping[str, Any], told: Mapping[str, Any]
) -> Iterator[str]:
    promise = network_promise(replay, plan.size, recipe["network_eps"], recipe["guarantee"])
    relative = agreement(dtype_of(replay))
    for name in ("error", "bound", *(["holdout_error"] if replay.holdout is not None else [])):
        claim, found = math.inf if told[name] is None else float(told[name]), getattr(promise, name)
        if claim != found and not math.isclose(claim, found, rel_tol=relative, abs_tol=promise.rounding):
            yield f"report.json: network.{name} is {claim}, recomputed {found}"
    for name in ("coefficients", "radii"):
        claims, figures = told[name], getattr(promise, name)
        known = {layer: None if math.isinf(value) else value for layer, value in figures.items()}
        if claims.keys() != known.keys() or not all(_close(claims[layer], known[layer], relative) for layer in known):
            yield f"report.json: network.{name} are {claims}, recomputed {known}"


def _close(one: float | None, other: float | None, relative: float) -> bool:
    return one is other if one is None or other is None else math.isclose(one, other, rel_tol=relative, abs_tol=1e-12)


def _recipe(run: StrPath, described: Mapping[str, Any]) -> Recipe:
    try:
        return recipe_from_dict(described["recipe"])
    except (InvalidInput, TypeError, ValueError, AttributeError) as error:
        raise DamagedFile(f"{run}: its run.json holds no recipe of prune_ ({error}); restore it") from error


@dataclass(eq=False)
class _Replay(Run):
    """A run that takes what is recorded, tells of what is wrong with it, and solves nothing.

    Attributes:
        rows: A row for each entry that was asked for.
        seen: Their files.
        lacking: Layers of which something is asked for that is not recorded.
    """

    rows: list[VerifiedLayer] = field(default_factory=list)
    seen: set[Path] = field(default_factory=set)
    lacking: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.execute = self._end

    def _end(self, makers: Iterable[Callable[[], Task]]) -> Iterator[tuple[int, tuple[Answer, ...]]]:
        """In the place of solving what is not recorded."""
        if next(iter(makers), None) is not None:
            self.stopped = "nothing more is recorded"
        return iter(())

    def known(self, name: str, goal: Goal) -> tuple[Answer, ...] | None:
        """The entry, once it is judged; None if its weights are not such as could be written."""
        key = self.key(goal)
        try:
            record = self.entries.get(name, key) or self._near(name, key)
            if record is None:
                self.lacking.add(name)
                return None
            key = record.data["goal"]
            answers, row = self.judged(name, goal_of(record), record)
        except DamagedFile as error:
            self.rows.append(VerifiedLayer(name, str(goal), None, None, (str(error),)))
            return None
        finally:
            self.seen.add(self.entries.path(name, key))
        self.rows.append(row)
        return answers if row.recomputed is not None else None

    @property
    def entries(self) -> Journal:
        """The journal, which is there."""
        assert self.journal is not None  # noqa: S101 - there is nothing else to take answers from
        return self.journal

    def _near(self, name: str, goal: Mapping[str, Any]) -> Record | None:
        """An entry whose goal is the same up to rounding, which differs on another machine where eps is allocated."""
        for path, layer, known in self._goals:
            if layer == name and _same_up_to_rounding(known, goal):
                return self.entries.read(path)
        return None

    @cached_property
    def _goals(self) -> list[tuple[Path, str, Mapping[str, Any]]]:
        found = []
        for path in self.entries.paths():
            with suppress(DamagedFile):  # told of where it is asked for, or among those that are not
                record = self.entries.read(path)
                found.append((path, record.data["layer"], record.data["goal"]))
        return found


def _same_up_to_rounding(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    def same(a: Any, b: Any) -> bool:
        if isinstance(a, float) and isinstance(b, float):
            return math.isclose(a, b, rel_tol=1e-5)
        return bool((list(a) if isinstance(a, tuple) else a) == (list(b) if isinstance(b, tuple) else b))

    return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
