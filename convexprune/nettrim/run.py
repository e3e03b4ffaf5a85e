"""A run over a model's layers: capture → program → solve → certify → write back, from a journal where it knows."""

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate, pairwise
from typing import Any, Self

import torch
from torch import Tensor, nn

from convexprune.errors import DamagedFile, PruningFailed
from convexprune.files.texts import visible
from convexprune.nettrim.goals import KEPT, Answer, Goal
from convexprune.nettrim.judging import judged
from convexprune.nettrim.planning import Plan
from convexprune.nettrim.posed import How, Pile, Posed
from convexprune.nettrim.records import recalled, recorded, to_device
from convexprune.nettrim.sites import Site, Versions
from convexprune.nettrim.stopping import Stop
from convexprune.nettrim.tasks import Executor, Task, serially
from convexprune.nettrim.verification import VerifiedLayer
from convexprune.network.calibration import Calibration
from convexprune.network.forwards import Forward, evaluating
from convexprune.network.padding import Counted, Masks
from convexprune.network.passes import observe, received
from convexprune.network.taps import Received
from convexprune.network.watch import tensors_in
from convexprune.progress import silent
from convexprune.runs.journal import Journal, Record
from convexprune.solvers import Solution, Status
from convexprune.solvers.arrays import norm, working_dtype
from convexprune.solvers.certificate.solution import TracePoint
from convexprune.solvers.errors import Infeasible

_log = logging.getLogger(__name__)
_STOPPED, _TIMED_OUT = str(Status.STOPPED), str(Status.TIME_LIMIT)


@dataclass(eq=False)
class Run:
    """A model being pruned, with all that every layer needs.

    Attributes:
        model: Changed in place by ``write_``.
        calibration: Gone through once for each layer.
        forward: As for ``capture``.
        sites: By name, in the order of first calls.
        versions: The sites' parameters as trained.
        counted: Which rows count.
        mixing: Whether samples of a batch see each other.
        how: How programs are solved.
        journal: Where answers are kept, or None.
        stop: When to end early.
        execute: Who solves independent layers.
        tell: Called as ``tell(stage, done, total)``.
        callback: Called as ``callback(layer, trace_point)``.
        multipliers: Whether those of layers that are done are kept in memory.
        holdout: Data that nothing is fitted to and errors are measured on, or None.
        stopped: Why the run ended early; None if it did not.
        left: Why layers were left as trained, by name.
        written: The answers that are in the model.
        trained: The trained weights as stored.
    """

    model: nn.Module
    calibration: Calibration
    forward: Forward | None
    sites: Mapping[str, Site]
    versions: Versions
    counted: Counted
    mixing: bool
    how: How
    journal: Journal | None = None
    stop: Stop = field(default_factory=Stop)
    execute: Executor = serially
    tell: Callable[[str, int, int], None] = silent
    callback: Callable[[str, TracePoint], bool | None] | None = None
    multipliers: bool = False
    holdout: Calibration | None = None
    stopped: str | None = None
    left: dict[str, str] = field(default_factory=dict)
    written: dict[str, tuple[Answer, ...]] = field(default_factory=dict)
    trained: dict[str, tuple[Tensor, ...]] = field(init=False)

    @classmethod
    def planned(
        cls, model: nn.Module, calibration: Calibration, forward: Forward | None, plan: Plan, how: How, **own: Any
    ) -> Self:
        """Of a plan, before anything is solved."""
        sites = plan.sites
        return cls(model, calibration, forward, sites, Versions(sites), plan.counted, plan.mixing, how, **own)

    def __post_init__(self) -> None:
        self.trained = {name: site.read() for name, site in self.sites.items()}

    def answers(self, goals: Mapping[str, Goal]) -> Iterator[tuple[str, tuple[Answer, ...]]]:
        """Solve layers that do not depend on each other, in any order; those in the journal come first."""
        waiting, done = [], 0
        for name, goal in goals.items():
            if self.stop.interrupted():  # a time limit is for solving: what is known has to be judged in any case
                self.stopped = self.stop.reason()
                return
            known = self.known(name, goal)
            if known is None:
                waiting.append(name)
                continue
            done += 1
            self.tell(name, done, len(goals))
            yield name, self._lean(known)
        makers = (partial(self._task, name, goals[name]) for name in self._until_stopped(waiting))
        for number, answers in self.execute(makers):
            name = waiting[number]
            answers = self._lean(
                self._keep(name, goals[name], answers)
            )  # no name for the others while the next layer is solved
            done += 1
            self.tell(name, done, len(goals))
            yield name, answers

    def answer(self, name: str, goal: Goal) -> tuple[Answer, ...] | None:
        """Solve one layer; None where the run has ended."""
        return next((answers for _, answers in self.answers({name: goal})), None)

    def write_(self, name: str, answers: tuple[Answer, ...]) -> None:
        """Put the answers into the model."""
        self.sites[name].write_([answer.stored for answer in answers])
        self.written[name] = answers

    def solutions(self) -> dict[str, tuple[Solution, ...]]:
        """Those of all layers that were written."""
        return {name: tuple(answer.solution for answer in answers) for name, answers in self.written.items()}

    def pose(self, name: str) -> tuple[Posed, ...]:
        """The data of a layer's groups, from one pass over the calibration data."""
        site, trained, original = self.sites[name], self.trained[name], False
        try:
            piles = self._piles(site, cascade=self.how.cascade and bool(self.written))
        except _OtherRows:
            piles, original = self._piles(site, cascade=False), True
        ends = list(accumulate((W.numel() for W in trained), initial=0))
        parts = [(start / ends[-1], end / ends[-1]) for start, end in pairwise(ends)]
        return tuple(
            Posed(*pile.joined(), stored, fold, site.biased, site.fit, pile.samples, part, original)
            for pile, stored, fold, part in zip(piles, trained, site.folds, parts, strict=True)
        )

    def _piles(self, site: Site, *, cascade: bool) -> list[Pile]:
        """(X, Y) of each group: inputs in cascade of the network as it is now, else of the trained one."""
        trained = self.trained[site.name]
        weights = [fold.apply(W.to(working_dtype(W.dtype))) for W, fold in zip(trained, site.folds, strict=True)]
        piles = [Pile(site.fit == "ball") for _ in trained]
        with evaluating(self.model), nullcontext() if cascade else self.versions.as_trained():
            for batch in self.calibration:
                for now, before in self._pairs(site, batch, cascade=cascade):
                    for pile, X, X0, W in zip(piles, now, before, weights, strict=True):
                        Y = X0.to(W) @ W
                        pile.add(X, Y if site.fit == "ball" else Y.clamp_(min=0))
        return piles

    def shapes(self) -> Iterator[Any]:
        """A batch of each shape that there is, the number of samples aside unless these see each other."""
        seen = set()
        for batch in self.calibration:
            shape = tuple((tensor.dtype, tensor.shape[not self.mixing :]) for tensor in tensors_in(batch))
            if shape not in seen:
                seen.add(shape)
                yield batch

    def sizes(self) -> dict[str, float]:
        """‖Y‖_F of each layer's targets, from one pass."""
        squares = dict.fromkeys(self.sites, 0.0)

        masks: Masks = ()

        def batches() -> Iterator[Any]:
            nonlocal masks
            for batch in self.calibration:
                masks = self.calibration.masks_of(batch)
                yield batch

        def add(name: str, raw: Received) -> None:
            site = self.sites[name]
            for X, stored, fold in zip(self._matrices(site, raw, masks), self.trained[name], site.folds, strict=True):
                W = fold.apply(stored.to(working_dtype(stored.dtype)))
                Y = X.to(W) @ W
                squares[name] += float(norm(Y if site.fit == "ball" else Y.clamp_(min=0))) ** 2

        with self.versions.as_trained():
            taps = {name: site.taps for name, site in self.sites.items()}
            observe(self.model, batches(), taps, forward=self.forward, see=add)
        return {name: square**0.5 for name, square in squares.items()}

    def _pairs(
        self, site: Site, batch: Any, *, cascade: bool
    ) -> Iterator[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]:
        """For each call the inputs now, and those of the trained network: the same unless in cascade."""
        take = partial(received, self.model, batch, site.taps, site.calls, self.forward)
        masks = self.calibration.masks_of(batch)
        now = [self._matrices(site, raw, masks) for raw in take()]
        if not cascade:
            yield from ((matrices, matrices) for matrices in now)
            return
        with self.versions.as_trained():
            before = [self._matrices(site, raw, masks) for raw in take()]
        shapes = [[[X.shape for X in matrices] for matrices in calls] for calls in (now, before)]
        if shapes[0] != shapes[1]:
            raise _OtherRows
        yield from zip(now, before, strict=True)

    def _matrices(self, site: Site, raw: Received, masks: Masks) -> tuple[Tensor, ...]:
        """X of each group, of rows that count alone."""
        return site.inputs(raw, self.counted.rows(site.name, site.layer, raw, masks))

    def _task(self, name: str, goal: Goal) -> Task:
        _log.info("%s: %s", visible(name), goal)
        posed = self.pose(name)
        limits = [seconds for seconds in (self.stop.left(), self.how.options.get("time_limit")) if seconds is not None]
        how = self.how
        if self.execute is serially:  # other processes cannot ask back
            callback = None if self.callback is None else partial(self.callback, name)
            how = replace(how, callback=callback, stop=self.stop.interrupted)
        return Task(name, goal, posed, how, torch.get_num_threads(), min(limits, default=None))

    def _until_stopped(self, names: list[str]) -> Iterator[str]:
        for name in names:
            self.stopped = self.stopped or self.stop.reason()
            if self.stopped:
                return
            yield name

    def known(self, name: str, goal: Goal) -> tuple[Answer, ...] | None:
        """The answers in the journal, once they are found to be what they claim; None if there are none.

        Raises:
            DamagedFile: An entry was damaged, or claims what does not hold on these data.
        """
        record = None if self.journal is None else self.journal.get(name, self.key(goal))
        if record is None:
            return None
        answers, found = self.judged(name, goal, record)
        if not found.ok:
            path = self.journal.path(name, self.key(goal))  # type: ignore[union-attr]
            raise DamagedFile(
                f"{path}: the entry of layer {name!r} does not hold for this model and these data: "
                f"{'; '.join(found.differences)}. Delete {path.name} to have that layer solved again"
            )
        _log.info("%s: %s: taken from %s, and found to hold", visible(name), goal, self.journal.folder)  # type: ignore[union-attr]
        return answers

    def judged(self, name: str, goal: Goal, record: Record) -> tuple[tuple[Answer, ...], VerifiedLayer]:
        """The answers of an entry, and what is found of them on the calibration data, of which this takes one pass.

        Raises:
            DamagedFile: The entry is not such as is written.
        """
        site = self.sites[name]
        answers = to_device(recalled(record, site.folds), self.trained[name][0].device)
        return answers, judged(site, self.pose(name), self.how, goal, answers)

    def _keep(self, name: str, goal: Goal, answers: tuple[Answer, ...]) -> tuple[Answer, ...]:
        """Check, and keep what the run's own end did not cut short; what it did has the status that says so."""
        for answer in answers:
            _check(name, answer)
        statuses = {str(answer.solution.status) for answer in answers}
        if statuses & {_STOPPED, _TIMED_OUT}:
            self.stopped = self.stopped or self.stop.reason()
        # What was stopped may get further another time; a layer's own time limit is a part of the recipe.
        final = _STOPPED not in statuses and not (_TIMED_OUT in statuses and self.stopped)
        if self.journal is not None and final:
            self.journal.put(name, self.key(goal), recorded(answers))
        return answers if final else tuple(map(_cut_short, answers))

    def _lean(self, answers: tuple[Answer, ...]) -> tuple[Answer, ...]:
        """Without what is as large as a layer's outputs, unless that was asked for."""
        if self.multipliers:
            return answers
        return tuple(replace(answer, solution=replace(answer.solution, multipliers=None)) for answer in answers)

    def key(self, goal: Goal) -> dict[str, Any]:
        """What an answer is kept by: the goal, and in cascade the weights before it, which decided its inputs."""
        if not self.how.cascade:
            return goal.to_dict()
        digest = hashlib.sha256()
        for name, answers in self.written.items():
            digest.update(name.encode("utf-8", "surrogatepass"))
            for answer in answers:
                digest.update(answer.stored.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return goal.to_dict() | {"after": digest.hexdigest()[:16]}


class _OtherRows(Exception):
    """A layer receives other rows in the pruned network than in the trained one, such as an expert behind a router."""


def _cut_short(answer: Answer) -> Answer:
    ended = str(answer.solution.status)
    return replace(answer, status=ended) if ended in (_STOPPED, _TIMED_OUT) else answer


def _check(name: str, answer: Answer) -> None:
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
