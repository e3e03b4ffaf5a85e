"""Every certificate of a run directory once more, in float64, from the trained model, the data and what was recorded.

The run is gone through again as its recipe says, with answers from the journal alone: no solver takes part. So each
layer meets the inputs that it met then, in cascade those of the network with the recorded weights before it.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from convexprune.errors import DamagedFile
from convexprune.files.texts import Json
from convexprune.files.weights import StrPath, load_weights
from convexprune.network.forwards import state_of
from convexprune.options import Options, is_own, options_from_dict
from convexprune.prune import Request
from convexprune.pruners.pruner import PRUNERS, Pruner
from convexprune.report.tables import as_text, layer_table
from convexprune.runs.answer import Answer, Goal, agreement
from convexprune.runs.checkpoints import Checkpoints
from convexprune.runs.data import as_data
from convexprune.runs.executors import Maker, Solved
from convexprune.runs.journal import Journal, Record, check_same
from convexprune.runs.outcome import dtype_of, network_errors, network_promise
from convexprune.runs.records import Judged
from convexprune.runs.removal import Sizes, finished_rows, weight_sizes
from convexprune.runs.results import read_results
from convexprune.runs.run import Run, silent
from convexprune.solvers.errors import InvalidInput
from convexprune.targets import target_from_dict

if TYPE_CHECKING:
    from rich.table import Table

_COLUMNS = ("layer", "goal", "status", "ℓ1 value", "bound", "gap", "violation", "error", "verdict")
_NARROW = ("layer", "gap", "violation", "error", "verdict")
_WIDE = 120
_NOT_COMPARED = {"seconds": None, "notes": None}  # of a row: what cannot be recomputed, and what is said of it


@dataclass(frozen=True)
class Verification:
    """What was recomputed of a run directory.

    Attributes:
        layers: A row for each entry that the recipe leads to, in that order.
        missing: Layers that the recipe leads to and the run has not come to.
        unreached: Files of entries that the recipe does not lead to, and that say nothing about this run; or that come
            after one that cannot be used.
        results: What report.json and model.safetensors in the folder say otherwise; None where there are none, or
            where the entries themselves do not hold or are not complete.
        samples: Calibration samples.
        provenance: The fingerprints and the recipe that the run recorded.
    """

    layers: tuple[Judged, ...]
    missing: tuple[str, ...]
    unreached: tuple[str, ...]
    results: tuple[str, ...] | None
    samples: int
    provenance: Mapping[str, object]

    @property
    def ok(self) -> bool:
        """Whether everything that is recorded holds; a run that is not complete may well be in order."""
        return not self.unreached and not self.results and all(row.ok for row in self.layers)

    @property
    def complete(self) -> bool:
        """Whether no layer is missing."""
        return not self.missing

    def to_dict(self) -> dict[str, object]:
        """Plain data."""
        layers = [asdict(row) | {"ok": row.ok} for row in self.layers]
        return {"ok": self.ok, "complete": self.complete} | asdict(self) | {"layers": layers}

    def table(self, width: int = 140) -> "Table":
        """A rich table, a row an entry; figures as recomputed, and below it all that differs."""
        columns = _COLUMNS if width >= _WIDE else _NARROW
        rows = [[cells[name] for name in columns] for cells in map(_cells, self.layers)]
        return layer_table([], columns, rows, self._caption(), width)

    def _caption(self) -> list[str]:
        wrong = [row for row in self.layers if not row.ok]
        lines = [f"{len(self.layers) - len(wrong)} of {len(self.layers)} entries are as recorded"]
        lines += [f"{row.name}: {difference}" for row in wrong for difference in row.differences]
        lines += [f"not complete, nothing is recorded of: {', '.join(self.missing)}"] if self.missing else []
        if self.results is not None:
            lines += self.results or ["report.json and model.safetensors say what the entries say"]
        return lines + [f"not looked at, for the recipe does not lead there: {name}" for name in self.unreached]

    def __str__(self) -> str:
        return as_text(self.table)


def _cells(row: Judged) -> dict[str, str]:
    """Texts by column; figures are those recomputed."""
    texts = dict.fromkeys(_COLUMNS, "–") | {"layer": row.name, "goal": row.goal}
    if row.recorded is not None:
        texts["status"] = row.recorded.status
    if (found := row.recomputed) is not None:
        texts["error"] = f"{found.output_error:.4f}"
        if found.gap < math.inf:
            texts |= {"ℓ1 value": f"{found.value:.6g}", "bound": f"{found.bound:.6g}"}
            texts |= {"violation": f"{found.violation:.1e}", "gap": f"{found.gap:.1e}"}
    return texts | {"verdict": "as recorded" if row.ok else "[red]differs[/red]"}


def verify(
    model: nn.Module,
    data: object,
    run: StrPath,
    *,
    method: Pruner | None = None,
    options: Options | None = None,
) -> Verification:
    """Judge all that a run directory says, without solving anything; the model is left as it is.

    Recomputed are, for each recorded layer, the certificate of its stored weights with its stored multipliers (value,
    bound, gap, violation), the radius and the output error; whether its status follows from them; and whether budgets
    and patterns are kept. Scores and samples are made again, and lead to the same entries. Of paths that were measured
    to allocate by, the weights that are kept are judged, without bound and gap. Where all entries of a complete run
    hold, report.json and model.safetensors in the folder are compared with them, and the error and the bound of the
    network are recomputed. Figures must agree to 1e-9 for float64 models, 1e-5 for float32 ones, 1e-3 below, relative
    to what they are differences of.

    Args:
        model: The trained model, as it was before pruning.
        data: The data that the run was given, with the same mask, forward and held-out samples.
        run: The directory.
        method: The pruner itself, if the run was given one that is not registered under its name.
        options: Objects of the caller's (fit, penalty) that the run was given, and no file can hold.

    Returns:
        A row an entry. A run that is not complete is verified as far as it goes, and ``missing`` says what lacks.

    Raises:
        FileNotFoundError: The folder holds no run.
        OtherRun: The model or the data are not those of the run.
        DamagedFile: Its run.json cannot be used; damaged entries are differences in their rows.
        Infeasible, InvalidInput, UnknownSolver: As in ``prune_``, where the recipe itself cannot be followed.
    """
    journal, described = Journal.existing(run)
    recipe = described["recipe"]
    request = _recorded_request(model, data, run, recipe, method, options)
    check_same(run, described, request.described() | {"recipe": recipe})
    request, replay = request.prepared(_Replay, partial(silent, "verify"))
    replay.journal, replay.solver = journal, replay.nothing_more
    before = weight_sizes(replay.model) if replay.links else {}
    undo = state_of(replay.model, parameters=True) if replay.links else replay.versions.restore_
    try:
        request.pruner.prune(replay, request.target)
        reached = {*replay.written, *replay.left, *(replay.plan.order if replay.tuned else ())} - replay.lacking
        consumers = {name for link in replay.links.values() for name in link.consumers}
        expected = [name for name in replay.plan.order if not replay.links or name in consumers]
        missing = tuple(name for name in expected if name not in reached)
        sound = not missing and all(row.ok for row in replay.judgements)
        complete = sound and (Path(run) / "report.json").is_file()
        results = _results(replay, request, recipe, before) if complete else None
    finally:
        undo()
    return Verification(
        layers=tuple(replay.judgements),
        missing=missing,
        unreached=tuple(path.name for path in journal.paths() if path not in replay.seen),
        results=results,
        samples=replay.plan.samples,
        provenance={key: described[key] for key in ("model", "data", "recipe")},
    )


def _recorded_request(
    model: nn.Module, data: object, run: StrPath, recipe: Json, method: Pruner | None, options: Options | None
) -> Request:
    """What was wanted of a run, from the recipe in its run.json.

    Raises:
        DamagedFile: The file holds no such thing. InvalidInput: Something is needed that no file can hold.
    """
    how = as_data(data)
    if how is not None and is_own(recipe.get("mask")) != callable(how.mask):
        raise InvalidInput(f"mask: the run was given {recipe.get('mask')!r}; give the same, as Data(…, mask=…)")
    if how is not None and recipe.get("loss") != how.to_dict().get("loss"):
        raise InvalidInput(f"loss: the run was given {recipe.get('loss')!r}; give the same, as Data(…, loss=…)")
    with _taken_from(run):
        target, name, own = target_from_dict(recipe["target"]), recipe["method"], recipe["method_options"]
        if any(is_own(value) for value in own.values()) and method is None:
            raise InvalidInput(f"method: {name!r} was given objects that no file can hold; give the same, as method=")
        own = {key: tuple(value) if isinstance(value, list) else value for key, value in own.items()}
        pruner = method or PRUNERS.make(name, own)[1]
    if how is not None and pruner.needs_labels:
        next(how.labelled())  # what is wrong with the caller's labels is not the file's fault
    with _taken_from(run):
        chosen = replace(options_from_dict(recipe, options), mode=recipe["mode"])
        if how is not None and not callable(how.mask):
            how = replace(how, mask=recipe["mask"], batch_size=recipe["batch_size"])
        if how is not None and not (pruner.needs_labels or pruner.generalises):
            how = replace(how, labels=None)
        return Request.of(model, how, target, pruner, chosen, None, 1)


@contextmanager
def _taken_from(run: StrPath) -> Iterator[None]:
    """Inside, errors are those of the run.json of a run, but where the caller is to give the same as then."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, InvalidInput) and "give the same" in str(error):
            raise
        raise DamagedFile(f"{run}: its run.json holds no recipe of prune_ ({error}); restore it") from error


def _results(replay: "_Replay", request: Request, recipe: Json, before: Sizes) -> tuple[str, ...]:
    """What report.json and model.safetensors say otherwise than the entries, all of which hold and are in the model."""
    folder = replay.entries.folder
    try:
        found = _result_differences(replay, request, recipe, before, read_results(folder).data)
        return (*found, *_weight_differences(replay.model, folder / "model.safetensors"))
    except DamagedFile as error:
        return (str(error),)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        return (f"report.json is not as convexprune writes it ({error!r}); prune again with the same arguments",)


def _result_differences(
    replay: "_Replay", request: Request, recipe: Json, before: Sizes, report: Json
) -> Iterator[str]:
    """Of the report; neurons that go are gone afterwards."""
    differences = partial(_differences, relative=agreement(dtype_of(replay)))
    yield from differences("provenance", {name: report["provenance"][name] for name in recipe}, recipe)
    yield from differences("samples", report["samples"], replay.plan.samples)
    yield from differences("mask", report["mask"], replay.plan.counted.to_dict())
    if request.pruner.proves:
        promise, claims = network_promise(replay, request.target), dict(report["network"])
        figures = promise.to_dict()
        for name in ("coefficients", "radii"):
            yield from differences(f"network.{name}", claims.pop(name), figures.pop(name))
        yield from differences("network", claims, figures, least=promise.rounding)
        yield from differences("output_error", report["output_error"], promise.error, least=promise.rounding)
    else:
        yield from differences("output_error", report["output_error"], network_errors(replay)[0])
    rows = {row.name: asdict(row) | _NOT_COMPARED for row in finished_rows(replay, before, request.options.remove)}
    yield from differences("layers", {row["name"]: row | _NOT_COMPARED for row in report["layers"]}, rows)


def _differences(name: str, claimed: object, found: object, relative: float, least: float = 1e-12) -> Iterator[str]:
    """What is claimed otherwise than found, but for rounding; null stands for infinity and NaN."""
    own = partial(_differences, relative=relative, least=least)
    if isinstance(claimed, Mapping) and isinstance(found, Mapping):
        for key in dict.fromkeys((*claimed, *found)):
            yield from own(f"{name}.{key}", claimed.get(key), found.get(key))
    elif isinstance(claimed, list) and isinstance(found, list | tuple) and len(claimed) == len(found):
        for number, (one, other) in enumerate(zip(claimed, found, strict=True)):
            yield from own(f"{name}.{number}", one, other)
    elif str(found) in ("inf", "-inf", "nan"):
        if claimed is not None:
            yield f"report.json: {name} is {claimed}, recomputed {found}"
    elif isinstance(claimed, int | float) and isinstance(found, float):
        if not math.isclose(claimed, found, rel_tol=relative, abs_tol=least):
            yield f"report.json: {name} is {claimed}, recomputed {found}"
    elif claimed != found:
        yield f"report.json: {name} is {claimed!r}, recomputed {found!r}"


def _weight_differences(model: nn.Module, path: Path) -> Iterator[str]:
    """What the file of weights, where there is one, holds otherwise than the model with the recorded answers."""
    if path.is_file():
        shipped, state = load_weights(path), model.state_dict()
        for name in dict.fromkeys((*shipped, *state)):
            if name not in shipped or name not in state or not torch.equal(shipped[name], state[name].cpu()):
                yield f"{path.name}: {name} is not what the entries say"


@dataclass(frozen=True, eq=False)
class _Recorded(Checkpoints):
    """The states of a training, of which none is added.

    Attributes:
        judgements: Gets a row if there is any, with what is wrong with it.
    """

    judgements: list[Judged]

    def restored(self, put: Callable[[Record], None]) -> bool:
        """As ``Checkpoints.restored``, but a damaged state is a difference."""
        faults = tuple[str, ...]()
        try:
            if not super().restored(put):
                return False
        except DamagedFile as error:
            faults = (str(error),)
        self.judgements.append(Judged(self.name, "", None, None, faults))
        return not faults

    def keep(self, number: int, data: Json, tensors: Mapping[str, Tensor]) -> None:
        """Nothing is written."""


@dataclass(eq=False)
class _Replay(Run):
    """A run that takes what is recorded, says what is wrong with it, and solves nothing.

    Attributes:
        judgements: A row for each entry that was wanted.
        seen: Their files.
        lacking: Layers of which something is wanted that is not recorded.
    """

    judgements: list[Judged] = field(default_factory=list)
    seen: set[Path] = field(default_factory=set)
    lacking: set[str] = field(default_factory=set)

    def nothing_more(self, makers: Iterable[Maker], _watch: object) -> Solved:
        """No layer is solved: the run ends where something is not recorded."""
        if any(True for _ in makers):
            self.stopped = "nothing more is recorded"
        return iter(())

    def known(self, name: str, goal: Goal) -> tuple[Answer, ...] | None:
        """The entry, once it is judged; None if its weights are not such as could be written."""
        key = self.key(goal)
        try:
            record, goal = self._recorded(name, goal)
            if record is None:
                self.lacking.add(name)
                return None
            key = record.data["goal"]
            answers, row = self.judged(name, goal, record)
        except DamagedFile as error:
            self.judgements.append(Judged(name, str(goal), None, None, (str(error),)))
            return None
        finally:
            self.seen.add(self.entries.path(name, key))
        self.judgements.append(row)
        return answers if row.recomputed is not None else None

    @property
    def entries(self) -> Journal:
        """The journal, which is there."""
        assert self.journal is not None  # noqa: S101 - there is nothing else to take answers from
        return self.journal

    def checkpoints(self, name: str) -> Checkpoints:
        """Those of the journal, which are judged as they are read."""
        found = _Recorded(self.journal, name, self.judgements)
        self.seen.update(self.entries.path(name, goal) for goal in found.goals())
        return found

    def ended(self) -> bool:
        """Always: nothing is trained."""
        self.stopped = "nothing more is recorded"
        return True

    def _recorded(self, name: str, goal: Goal) -> tuple[Record | None, Goal]:
        """The entry of a goal, or of one that is the same up to rounding, as on another machine; and its goal."""
        key = self.key(goal)
        if record := self.entries.get(name, key):
            return record, goal
        for path, data in self._entries:
            known = {name: value for name, value in data["goal"].items() if name != "after"}
            after = data["goal"].get("after")
            if data["layer"] == name and after == key.get("after") and (near := goal.near(known)):
                return self.entries.read(path), near
        return None, goal

    @cached_property
    def _entries(self) -> list[tuple[Path, Json]]:
        found = []
        for path in self.entries.paths():
            with suppress(DamagedFile):  # said where it is wanted, or among those that are not
                found.append((path, self.entries.read(path).data))
        return found
