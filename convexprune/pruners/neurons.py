"""Whole neurons: which of a layer's inputs are worth least, and the best weights on those that stay.

An input of a layer is a neuron of the layer before: all its rows of U, the positions of a kernel or of a flattened
map. The group penalty Σ_c ‖X_c‖_F ‖U_c‖_F lets whole neurons vanish as eps grows; its weights ‖X_c‖_F make it blind to
a rescaling of neurons. Neurons are chosen where their outputs are used: the largest worth among the layers that take a
neuron counts.
"""

import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import ClassVar

import torch
from torch import Tensor

from convexprune.options import Options
from convexprune.pruners.budget import BudgetGoal, kept_or_not
from convexprune.pruners.measuring import Measurement, measured
from convexprune.pruners.sizes import kept_of, value_of
from convexprune.runs.answer import MASKED, Answer, answered, judged, unproven
from convexprune.runs.problem import Problem, StoppingRule
from convexprune.runs.run import Run
from convexprune.solvers.arrays import norm
from convexprune.solvers.certificate import Solution, Status, certify
from convexprune.solvers.certificate.solution import Seconds
from convexprune.solvers.methods import EpsPath
from convexprune.solvers.methods.refit import refit_with_record
from convexprune.solvers.methods.solve import environment
from convexprune.solvers.programs import GroupL2, LayerProgram, Penalty, TopK
from convexprune.targets import Neurons

Worth = Sequence[tuple[float, float]]
"""Of each neuron, to be compared in this order."""


def prune_neurons(run: Run, target: Neurons, worth: Mapping[str, Worth], *, refit: bool = True) -> None:
    """Choose, and answer for the layers that take the neurons; nothing is removed yet.

    Args:
        run: With the links that can lose neurons.
        target: How many go.
        worth: Of each link's neurons.
        refit: Whether the layers that take neurons are fitted to what stays.
    """
    chosen, widths = chosen_neurons(target, worth), run.widths()
    goals = dict[str, KeepInputs]()
    for name, link in run.links.items():
        goals |= {user: KeepInputs(widths[name], tuple(chosen[name]), refit) for user in link.consumers}
    run.prune({name: goals[name] for name in run.layers if name in goals})
    if run.stopped is not None:  # neurons go from all layers that take them, or from none
        run.restore_()
        return
    run.kept_neurons = chosen


def chosen_neurons(target: Neurons, worth: Mapping[str, Worth]) -> dict[str, list[int]]:
    """The neurons that stay, ascending; at least one of each link."""
    if target.scope == "network":
        every = [(value, name) for name, values in worth.items() for value in values]
        every.sort(key=itemgetter(0), reverse=True)
        counts = Counter(name for _, name in every[: round((1 - float(target.value)) * len(every))])  # type: ignore[arg-type]
        kept = {name: max(1, counts[name]) for name in worth}
    else:
        kept = {name: kept_of(value_of(target, name), len(values)) for name, values in worth.items()}
    ranked = {name: sorted(range(len(values)), key=values.__getitem__, reverse=True) for name, values in worth.items()}
    return {name: sorted(order[: kept[name]]) for name, order in ranked.items()}


def ranked_by_paths(run: Run) -> dict[str, Worth]:
    """The last relative eps at which each neuron is there along the paths of the layers that take it, the largest."""
    links, widths = run.links, run.widths()
    goals = {user: RankInputs(widths[name]) for name, link in links.items() for user in link.consumers}
    found = measured(run, {name: goals[name] for name in run.layers if name in goals})
    ranks = {user: [(eps, share) for eps, share, _ in answers[0].path] for user, answers in found.items()}
    return {
        name: [max(values) for values in zip(*(ranks[user] for user in link.consumers), strict=True)]
        for name, link in links.items()
    }


@dataclass(frozen=True)
class RankInputs(Measurement):
    """For each neuron that feeds the layer the relative eps at which it vanishes along the path.

    ``path`` of the answer has a point (eps, share, neuron) for each: the last eps of the grid at which it is there, and
    its part of what the neurons that are last there add to the outputs, to tell them apart.
    """

    neurons: int
    eps: tuple[float, ...] = (0.03, 0.06, 0.1, 0.15, 0.2, 0.27, 0.35, 0.45, 0.55, 0.7, 0.85)
    rows: int = 4
    kind: ClassVar[str] = "rank-inputs"

    def penalty(self, problem: Problem, options: Options) -> Penalty:
        """Σ_c ‖X_c‖_F ‖U_c‖_F over neurons c, the bias free."""
        X = problem.inputs[:, : problem.rows]
        squares = X.double().square().sum(0).reshape(self.neurons, -1).sum(1)
        weights = squares.sqrt()
        labels = torch.arange(problem.rows, device=problem.stored.device) // (problem.rows // self.neurons)
        if problem.biased:  # the bias is a group of its own, and free
            weights = torch.cat([weights, weights.new_zeros(1)])
            labels = torch.cat([labels, labels.new_full((1,), self.neurons)])
        # A neuron that never speaks costs nothing; it must not be free, for its weights would be arbitrary.
        weights[: self.neurons].clamp_(min=float(weights.max()) * 1e-6 or 1.0)
        labels = labels[:, None].expand(-1, problem.stored.shape[1]).contiguous()
        return problem.restricted(GroupL2(labels, weights.to(problem.dtype)), options)

    def read(self, problem: Problem, path: EpsPath) -> tuple[tuple[float, float, int], ...]:
        """The last eps of each neuron, and its part of what those that are last there add."""
        last, size = torch.full((self.neurons,), -1), torch.zeros(self.neurons, dtype=torch.float64)
        for number, point in enumerate(path):
            added = self._added(problem, point.solution.weights)
            last[added > 0], size = number, torch.where(added > 0, added, size)
        return tuple((0.0 if last[c] < 0 else self.eps[int(last[c])], float(size[c]), c) for c in range(self.neurons))

    def _added(self, problem: Problem, U: Tensor) -> Tensor:
        """‖X_c U_c‖_F of each neuron [neurons], on the CPU."""
        X = problem.inputs[:, : problem.rows].to(U).reshape(len(problem.inputs), self.neurons, -1)
        rows = U[: problem.rows].reshape(self.neurons, -1, U.shape[1])
        alive = rows.abs().sum((1, 2)) > 0
        added = [float(norm(X[:, c] @ rows[c])) if alive[c] else 0.0 for c in range(self.neurons)]
        return torch.tensor(added, dtype=torch.float64)

    def __str__(self) -> str:
        return f"rank {self.neurons} inputs"


def refitted_to(
    support: Tensor | None,
    program: LayerProgram,
    problem: Problem,
    options: Options,
    watch: StoppingRule,
    method: str,
    began: float,
) -> Answer:
    """The weights that fit best on a support; None: the trained ones. Of their loss no bound is known."""
    weights, effective = (problem.W, {}) if support is None else refit_with_record(program, support, watch)
    solved = time.perf_counter() - began
    provenance = {"solver": method, "message": "", "effective": effective} | environment(weights)
    provenance["limits"] = {"tol": options.tol, "feas_tol": options.feas_tol}
    certificate = certify(program, weights)
    seconds = Seconds(0.0, solved, time.perf_counter() - began - solved)
    status = watch.ended or Status.NO_BOUND
    solution = Solution(weights, None, status, certificate, (), 0, seconds, provenance)
    return answered(program, solution, problem)


@dataclass(frozen=True)
class KeepInputs(BudgetGoal):
    """Weights on the rows of the neurons that stay: the best ones, or with ``refit`` False the trained ones."""

    neurons: int
    kept: tuple[int, ...]
    refit: bool = True
    kind: ClassVar[str] = "keep-inputs"

    def penalty(self, problem: Problem, options: Options) -> Penalty:
        """As many weights as stay."""
        count = len(self.kept) * (problem.rows // self.neurons) * problem.stored.shape[1]
        return TopK(count, rows=problem.rows, within=problem.support(options))

    def support(self, problem: Problem, options: Options) -> Tensor:
        """Boolean [N, M]; inputs that are nothing but rounding get no weights, which would have to be huge."""
        rows = torch.zeros(self.neurons, dtype=torch.bool, device=problem.stored.device)
        rows[list(self.kept)] = True
        rows = rows.repeat_interleave(problem.rows // self.neurons)
        if self.refit:
            sizes = problem.inputs[:, : problem.rows].double().norm(dim=0)
            rows = rows & (sizes > 16 * torch.finfo(problem.dtype).eps * sizes.max())
        if problem.biased:
            rows = torch.cat([rows, rows.new_ones(1)])
        support, allowed = rows[:, None].expand_as(problem.stored).contiguous(), problem.support(options)
        return support if allowed is None else support & allowed

    def solve_group(self, problem: Problem, options: Options, watch: StoppingRule) -> Answer:
        """A refit, unless there is none; where every neuron stays, the trained weights."""
        began = time.perf_counter()
        if not self.refit:
            stored = problem.stored.masked_fill(~self.support(problem, options), 0)
            seconds = time.perf_counter() - began
            return unproven(stored, problem, "mask", seconds, options, MASKED)
        every = len(self.kept) == self.neurons and not options.cascade
        support = None if every else self.support(problem, options)
        return refitted_to(support, self.program(problem, options), problem, options, watch, "refit", began)

    def judge_group(self, answer: Answer, problem: Problem, options: Options) -> Answer:
        """Whether only the neurons that stay have weights."""
        if not self.refit:
            again = unproven(answer.stored, problem, "mask", 0.0, options, answer.status, answer.notes)
            same = torch.equal(answer.stored, problem.stored.masked_fill(~self.support(problem, options), 0))
            return again if same else replace(again, status=f"not {answer.status}")
        again = judged(answer, problem, self.program(problem, options))
        inside = not bool(answer.stored[~self.support(problem, options)].any())
        return kept_or_not(again, problem, options, inside and math.isfinite(again.solution.certificate.value))

    def __str__(self) -> str:
        return f"{len(self.kept)} of {self.neurons} inputs"
