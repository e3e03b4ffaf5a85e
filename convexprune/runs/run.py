"""A run over a model's layers: capture → problem → answer → certify → write back, from a journal where it knows."""

import hashlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain

import torch
from torch import Tensor, nn

from convexprune.errors import DamagedFile
from convexprune.files.texts import visible
from convexprune.layers.memory import tensors_in
from convexprune.network.calibration import Calibration
from convexprune.network.forwards import Forward
from convexprune.network.graph import inputs_of
from convexprune.network.links import Link
from convexprune.network.padding import Masks
from convexprune.network.passes import observe
from convexprune.network.taps import Received
from convexprune.options import Options
from convexprune.report.report import LayerReport
from convexprune.runs.answer import Answer, Goal, layer_row, with_extras
from convexprune.runs.capture import Capture
from convexprune.runs.checkpoints import Checkpoints
from convexprune.runs.data import Data
from convexprune.runs.executors import LayerTask, TaskSolver, serially
from convexprune.runs.journal import Journal, Record
from convexprune.runs.layer import Layer, Versions
from convexprune.runs.plan import Plan
from convexprune.runs.problem import Problem, StoppingRule, TraceCallback, reducible
from convexprune.runs.records import Judged, check_answer, judged_record, recorded
from convexprune.solvers.arrays import norm, working_dtype
from convexprune.solvers.certificate import Solution, Status
from convexprune.solvers.certificate.solution import TracePoint

_log = logging.getLogger(__name__)
_NONE = (None, math.inf)  # what a time limit may be where there is none
_ROOM = 2**31  # bytes of the data of layers that are gathered together
_STOPPED, _TIMED_OUT = str(Status.STOPPED), str(Status.TIME_LIMIT)

LayerCallback = Callable[[str, TracePoint], bool | None]
Progress = Callable[[str, int, int], None]


def silent(stage: str, done: int, total: int) -> None:
    """No progress is shown."""


@dataclass(eq=False)
class Run:
    """A model being pruned, with all that every layer needs.

    Attributes:
        model: Changed in place by ``write_``.
        data: Gone through once for each layer; None without any.
        forward: As in ``Data``.
        plan: The layers, and which rows count.
        options: With the mode of the plan.
        journal: Where answers are kept, or None.
        watch: When to end early.
        solver: Who solves independent layers.
        progress: Called as ``progress(stage, done, total)``.
        callback: Called as ``callback(layer, trace_point)``.
        holdout: Data that nothing is fitted to and errors are measured on, or None.
        source: The data as they were given, with labels and a loss if there are such.
        samples_needed: Whether problems keep all samples even where their products would do.
        ahead: Layers whose data are wanted in this order, time and again; of others data are gathered one by one.
        links: Of layers that lose neurons, by name of the first producer.
        kept_neurons: By link the neurons that stay, once they were chosen.
        stopped: Why the run ended early; None if it did not.
        left: Why layers were left as trained, by name.
        written: The answers that are in the model.
        goals: What they are answers to.
        extra: Further figures for the rows of layers, by name.
        terms: Figures of a theory by layer, whether it was pruned or not.
        notices: What a reader of the report should know.
        tuned: Whether all weights are those of a training, of which there are no answers layer by layer.
        trained: The trained weights as stored.
    """

    model: nn.Module
    data: Calibration | None
    forward: Forward | None
    plan: Plan
    options: Options
    journal: Journal | None = None
    watch: StoppingRule = field(default_factory=StoppingRule)
    solver: TaskSolver = serially
    progress: Progress = silent
    callback: LayerCallback | None = None
    holdout: Calibration | None = None
    source: Data | None = None
    samples_needed: bool = False
    ahead: Sequence[str] = ()
    links: Mapping[str, Link] = field(default_factory=dict)
    kept_neurons: dict[str, list[int]] = field(default_factory=dict)
    stopped: str | None = None
    left: dict[str, str] = field(default_factory=dict)
    written: dict[str, tuple[Answer, ...]] = field(default_factory=dict)
    goals: dict[str, Goal] = field(default_factory=dict)
    extra: dict[str, dict[str, object]] = field(default_factory=dict)
    terms: dict[str, Mapping[str, float]] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)
    tuned: bool = False
    trained: dict[str, tuple[Tensor, ...]] = field(init=False)
    versions: Versions = field(init=False)
    capture: Capture = field(init=False)
    _held: dict[str, tuple[Problem, ...]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.trained = {name: layer.read() for name, layer in self.layers.items()}
        self.versions = Versions(self.layers)
        how = (self.trained, self.versions, self.samples_needed)
        self.capture = Capture(self.model, self.data, self.forward, self.plan, *how)

    @property
    def layers(self) -> Mapping[str, Layer]:
        """By name, in the order of first calls."""
        return self.plan.layers

    @property
    def cascade(self) -> bool:
        """Whether inputs are those of the network pruned so far."""
        return self.options.cascade

    # Solving

    def prune(self, goals: Mapping[str, Goal]) -> dict[str, Goal]:
        """Solve and write: in cascade one layer after the other, else in any order; the goals that were reached."""
        if not self.cascade:
            for name, answers in self.solve(goals):
                self.write_(name, answers, goals[name])
        for number, (name, goal) in enumerate(goals.items() if self.cascade else ()):
            self.progress(name, number, len(goals))
            found = self.answer(name, goal)
            if found is None:
                break
            self.write_(name, found, goal)
        return {name: goal for name, goal in goals.items() if name in self.written}

    def solve(self, goals: Mapping[str, Goal]) -> Iterator[tuple[str, tuple[Answer, ...]]]:
        """Solve layers that do not depend on each other, in any order; those in the journal come first."""
        waiting, done = [], 0
        for name, goal in goals.items():
            if self.watch.stopped():  # a time limit is for solving: what is known has to be judged in any case
                self.stopped = self.watch.reason()
                return
            known = self.known(name, goal)
            if known is None:
                waiting.append(name)
                continue
            done += 1
            self.progress(name, done, len(goals))
            yield name, self._lean(known)
        makers = (partial(self._task, name, goals[name]) for name in self._until_stopped(waiting))
        for number, answers in self.solver(makers, self._watch):
            name = waiting[number]
            answers = self._lean(
                self._keep(name, goals[name], answers)
            )  # let go of the others while the next is solved
            done += 1
            self.progress(name, done, len(goals))
            yield name, answers

    def answer(self, name: str, goal: Goal) -> tuple[Answer, ...] | None:
        """Solve one layer; None where the run has ended."""
        return next((answers for _, answers in self.solve({name: goal})), None)

    def write_(self, name: str, answers: tuple[Answer, ...], goal: Goal) -> None:
        """Put the answers into the model."""
        self.layers[name].write_([answer.stored for answer in answers])
        self.written[name], self.goals[name] = answers, goal

    def widths(self) -> dict[str, int]:
        """How many neurons each link has."""
        return {
            name: inputs_of(self.model.get_submodule(link.consumers[0])) // link.repeat[0]
            for name, link in self.links.items()
        }

    def checkpoints(self, name: str) -> Checkpoints:
        """Where a method that trains keeps what it was at."""
        return Checkpoints(self.journal, name)

    def ended(self) -> bool:
        """Whether the run is to end early; ``stopped`` then says why."""
        self.stopped = self.stopped or self.watch.reason()
        return self.stopped is not None

    def tune_(self, state: Mapping[str, Tensor]) -> None:
        """Put the state of a training into the model: all parameters and buffers."""
        self.versions.watch(chain(self.model.parameters(), self.model.buffers()))
        self.model.load_state_dict(state)
        self.tuned = True

    def restore_(self) -> None:
        """Everything as trained, and nothing written."""
        self.versions.restore_()
        self.written.clear()
        self.goals.clear()
        self.tuned = False

    def rows(self) -> tuple[LayerReport, ...]:
        """Those of the layers that were written, in the model's order."""
        return tuple(self.row(name) for name in self.plan.order if name in self.written)

    def row(self, name: str) -> LayerReport:
        """That of one layer."""
        row = layer_row(self.layers[name], self.goals[name], self.written[name])
        return with_extras(row, self.extra.get(name, {}))

    def solutions(self) -> dict[str, tuple[Solution, ...]]:
        """Those of all layers that were written."""
        return {name: tuple(answer.solution for answer in answers) for name, answers in self.written.items()}

    # Problems

    def problems(self, name: str) -> tuple[Problem, ...]:
        """The data of a layer's groups, from a pass over the calibration data.

        Of layers ``ahead`` the same pass gathers the next ones too, from this one on and round, as many as there is
        room for, and all are kept until others need it. In cascade data depend on what is written, and none are kept.
        """
        if self.cascade or name not in self.ahead:
            return self._captured([name])[name]
        if name not in self._held:
            begin, room = self.ahead.index(name), _ROOM
            several = [name]
            for other in (*self.ahead[begin + 1 :], *self.ahead[:begin]):
                if sum(map(self.nbytes, (*several, other))) > room:
                    break
                several.append(other)
            self._held = {each: self._held[each] for each in several if each in self._held}
            self._held |= self._captured([each for each in several if each not in self._held])
        return self._held[name]

    def _captured(self, names: Sequence[str]) -> dict[str, tuple[Problem, ...]]:
        return self.capture.problems(names, cascade=self.cascade and bool(self.written))

    def matrices(self, name: str) -> list[tuple[int, int, int]]:
        """(P, N, M) of a layer's groups; P is 0 without data."""
        trained = self.trained[name]
        return [(P, *W.shape) for P, W in zip(self.plan.rows.get(name, [0] * len(trained)), trained, strict=True)]

    def reduced(self, name: str) -> bool:
        """Whether products of X and Y stand for them."""
        linear = self.layers[name].fit.linear and not self.samples_needed
        return linear and any(reducible(P, N) for P, N, _ in self.matrices(name))

    def nbytes(self, name: str) -> int:
        """About what the data of a layer's groups take."""
        width = working_dtype(self.trained[name][0].dtype).itemsize
        rows = [(8 * N if self.reduced(name) else width * P, N + M) for P, N, M in self.matrices(name)]
        return sum(height * columns for height, columns in rows)

    def shapes(self) -> Iterator[object]:
        """A batch of each shape that there is, the number of samples aside unless these see each other."""
        seen = set()
        for batch in self.data or ():
            shape = tuple((tensor.dtype, tensor.shape[not self.plan.mixing :]) for tensor in tensors_in(batch))
            if shape not in seen:
                seen.add(shape)
                yield batch

    def sizes(self) -> dict[str, float]:
        """‖Y‖_F of each layer's targets, from one pass."""
        squares, masks = dict.fromkeys(self.layers, 0.0), list[Masks]()

        def batches() -> Iterator[object]:
            for batch in self.data or ():
                masks[:] = [self.capture.masks(batch)]
                yield batch

        def add(name: str, raw: Received) -> None:
            layer = self.layers[name]
            inputs = self.capture.matrices(layer, raw, masks[0])
            for X, stored, fold in zip(inputs, self.trained[name], layer.folds, strict=True):
                W = fold.apply(stored.to(working_dtype(stored.dtype)))
                squares[name] += float(norm(layer.fit.targets(X.to(W) @ W))) ** 2

        with self.versions.as_trained():
            taps = {name: layer.taps for name, layer in self.layers.items()}
            observe(self.model, batches(), taps, forward=self.forward, see=add)
        return {name: square**0.5 for name, square in squares.items()}

    # Tasks

    def _task(self, name: str, goal: Goal) -> LayerTask:
        _log.info("%s: %s", visible(name), goal)
        limits = [seconds for seconds in (self.watch.left(), self.options.layer_time_limit) if seconds not in _NONE]
        threads, seconds = torch.get_num_threads(), min(limits, default=None)
        return LayerTask(name, goal, self.problems(name), self.options, threads, seconds)

    def _watch(self, task: LayerTask) -> StoppingRule:
        """Of a task that is solved in this process; others cannot ask back."""
        callback: TraceCallback | None = None if self.callback is None else partial(self.callback, task.name)
        return StoppingRule(task.seconds, self.watch.stopped, callback)

    def _until_stopped(self, names: Sequence[str]) -> Iterator[str]:
        for name in names:
            self.stopped = self.stopped or self.watch.reason()
            if self.stopped:
                return
            yield name

    # Records

    def known(self, name: str, goal: Goal) -> tuple[Answer, ...] | None:
        """The answers in the journal, once they are found to be what they claim; None if there are none.

        Raises:
            DamagedFile: An entry was damaged, or claims what does not hold on these data.
        """
        record = None if self.journal is None else self.journal.get(name, self.key(goal))
        if record is None or self.journal is None:
            return None
        answers, found = self.judged(name, goal, record)
        if not found.ok:
            path = self.journal.path(name, self.key(goal))
            raise DamagedFile(
                f"{path}: the entry of layer {name!r} does not hold for this model and these data: "
                f"{'; '.join(found.differences)}. Delete {path.name} to have that layer solved again"
            )
        _log.info("%s: %s: taken from %s, and found to hold", visible(name), goal, self.journal.folder)
        return answers

    def judged(self, name: str, goal: Goal, record: Record) -> tuple[tuple[Answer, ...], Judged]:
        """The answers of an entry, and what is found of them on the calibration data, of which this takes one pass.

        Raises:
            DamagedFile: The entry is not such as is written.
        """
        return judged_record(
            self.layers[name], goal, record, self.trained[name], lambda: self.problems(name), self.options
        )

    def _keep(self, name: str, goal: Goal, answers: tuple[Answer, ...]) -> tuple[Answer, ...]:
        """Check, and keep what the run's own end did not cut short; what it did has the status that says so."""
        for answer in answers:
            check_answer(name, answer)
        statuses = {str(answer.solution.status) for answer in answers}
        if statuses & {_STOPPED, _TIMED_OUT}:
            self.stopped = self.stopped or self.watch.reason()
        # What was stopped may get further another time; a layer's own time limit is a part of the options.
        final = _STOPPED not in statuses and not (_TIMED_OUT in statuses and self.stopped)
        if self.journal is not None and final:
            self.journal.put(name, self.key(goal), recorded(goal, answers))
        return answers if final else tuple(map(_cut_short, answers))

    def _lean(self, answers: tuple[Answer, ...]) -> tuple[Answer, ...]:
        """Without what is as large as a layer's outputs, unless that is to be kept."""
        if self.options.keep_solutions:
            return answers
        return tuple(replace(answer, solution=replace(answer.solution, multipliers=None)) for answer in answers)

    def key(self, goal: Goal) -> dict[str, object]:
        """What an answer is kept by: the goal, and in cascade the weights before it, which decided its inputs."""
        if not self.cascade:
            return goal.to_dict()
        digest = hashlib.sha256()
        for name, answers in self.written.items():
            digest.update(name.encode("utf-8", "surrogatepass"))
            for answer in answers:
                digest.update(answer.stored.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return goal.to_dict() | {"after": digest.hexdigest()[:16]}


def _cut_short(answer: Answer) -> Answer:
    ended = str(answer.solution.status)
    return replace(answer, status=ended) if ended in (_STOPPED, _TIMED_OUT) else answer
