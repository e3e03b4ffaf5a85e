"""Pruners that score weights and keep the largest scores; all that follows from the scores is done here.

A new one is a class with ``score``. Budgets of layers or of the network, patterns n:m, neurons, an optional refit,
groups of convolutions, attention, records and rows come from this base.
"""

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from convexprune.options import Options
from convexprune.pruners.neurons import Worth, prune_neurons
from convexprune.pruners.pruner import Pruner
from convexprune.pruners.sizes import count_of, shared_counts, wanted_of
from convexprune.runs.answer import MASKED, MASKED_REFITTED, Answer, Goal, answered, unproven
from convexprune.runs.problem import Problem, Watch
from convexprune.runs.run import Run
from convexprune.solvers.certificate import Status
from convexprune.solvers.errors import InvalidInput
from convexprune.solvers.methods.refit import refit_told
from convexprune.solvers.programs import TopK
from convexprune.targets import Neurons, Sparsity, Target

Scores = tuple[Tensor, ...]
"""Of a layer's weights, a matrix [N, M] for each group, without the bias."""


class Scoring(Pruner):
    """Base of pruners that score weights; write ``score``, or ``score_network`` where layers are scored together.

    Attributes:
        per_output: Whether each output of a layer keeps as many weights as the others.
    """

    targets: ClassVar[tuple[type[Target], ...]] = (Sparsity, Neurons)
    needs_data: ClassVar[bool] = False
    per_output: ClassVar[bool] = False

    def default_mode(self, target: Target, options: Options) -> str | None:
        """Cascade pays only where weights are fitted, or scored, by what the pruned network computes."""
        return None if self.needs_data or options.refit else "parallel"

    def score(self, problem: Problem, options: Options) -> Tensor:
        """Scores [N, M] of the weights of one group, the bias left out; the largest are kept.

        Args:
            problem: Its trained weights W [N (+ 1 with a bias), M], and inputs X [P, N (+ 1)] if there are data.
            options: How the run prunes; random numbers follow ``seed``.
        """
        raise NotImplementedError

    def score_network(self, run: Run, target: Target) -> Mapping[str, Scores] | None:
        """Scores of all layers that hang together; None: each layer is scored by itself, when its turn comes."""

    def weights(
        self,
        problems: Sequence[Problem],
        keep: Sequence[Tensor],
        pattern: tuple[int, int] | None,
        options: Options,
    ) -> list[Tensor]:
        """The weights [N, M] of each group, bias included, where ``keep`` [N, M] says which stay: the trained ones."""
        return [_masked(problem.stored, mask) for problem, mask in zip(problems, keep, strict=True)]

    def prune(self, run: Run, target: Target) -> None:
        """Score, choose and write."""
        if run.options.refit and run.data is None:
            raise InvalidInput("refit: weights are fitted to what layers compute on data: give calibration data")
        found = self.score_network(run, target)
        if isinstance(target, Neurons):
            prune_neurons(run, target, lambda run: self._worth(run, found), refit=run.options.refit)
            return
        assert isinstance(target, Sparsity)  # noqa: S101 - refuses says so
        run.prune({name: goal for name, goal in self._goals(run, target, found).items() if name not in run.left})

    def _goals(self, run: Run, target: Sparsity, found: Mapping[str, Scores] | None) -> dict[str, Goal]:
        wanted = {name: wanted_of(target, name) for name in run.layers}
        counts: dict[str, int] = {}
        for names, total in (shared_counts(run.layers, target) if target.scope == "network" else {}).items():
            counts |= _split({name: self._scores(run, name, found) for name in names}, total)
        goals: dict[str, Goal] = {}
        for name, layer in run.layers.items():
            value, scores = wanted[name], None if found is None else found[name]
            if isinstance(value, tuple):
                goals[name] = Mask(self, None, value, scores)
            else:
                goals[name] = Mask(self, counts[name] if name in counts else count_of(value, layer), None, scores)
        return goals

    def _scores(self, run: Run, name: str, found: Mapping[str, Scores] | None) -> Scores:
        if found is not None:
            return found[name]
        return tuple(self.score(problem, run.options).detach().cpu() for problem in run.problems(name))

    def _worth(self, run: Run, found: Mapping[str, Scores] | None) -> dict[str, Worth]:
        """Of each neuron the sum of the scores of all weights with which it goes on."""
        worth: dict[str, Worth] = {}
        widths = run.widths()
        for name, link in run.links.items():
            each = [
                self._scores(run, user, found)[0].double().reshape(widths[name], -1).sum(1) for user in link.consumers
            ]
            worth[name] = [(float(value), 0.0) for value in torch.stack(each).sum(0)]
        return worth


@dataclass(frozen=True, eq=False)
class Mask(Goal):
    """The weights of the largest scores: at most ``count`` of a layer, or at most n of m inputs in a row.

    Attributes:
        pruner: Whose scores.
        count: How many weights stay, or None.
        pattern: (n, m), or None.
        scores: Those of the layer's weights, if they were computed with those of others.
    """

    pruner: Scoring
    count: int | None
    pattern: tuple[int, int] | None = None
    scores: Scores | None = field(default=None, repr=False)
    kind: ClassVar[str] = "mask"

    def solve(self, problems: Sequence[Problem], options: Options, watch: Watch) -> tuple[Answer, ...]:
        """Score, choose, and fit again if that was wanted."""
        began = time.perf_counter()
        scores = self.scores or tuple(self.pruner.score(problem, options) for problem in problems)
        keep = self.chosen([s.to(p.stored.device) for s, p in zip(scores, problems, strict=True)])
        weights = self.pruner.weights(problems, keep, self.pattern, options)
        each = (time.perf_counter() - began) / len(problems)
        return tuple(
            self._answer(problem, mask, stored, options, watch, each)
            for problem, mask, stored in zip(problems, keep, weights, strict=True)
        )

    def chosen(self, scores: Sequence[Tensor]) -> list[Tensor]:
        """Which weights [N, M] of each group stay, exactly as many as wanted; among equal scores the first."""
        if self.pattern is not None:
            n, m = self.pattern
            return [_of_each(s.reshape(-1, m, s.shape[1]), n, 1).reshape(s.shape) for s in scores]
        flat = torch.cat([s.flatten() for s in scores])
        if self.pruner.per_output:
            ranks = torch.cat([_ranks(s, 0).flatten() for s in scores])
            columns = sum(s.shape[1] for s in scores)
            # Every output keeps as many; what is left over goes to the largest scores among the next ones.
            each = (self.count or 0) // columns
            flat = torch.where(ranks < each, torch.inf, torch.where(ranks == each, flat, -torch.inf))
        keep = torch.zeros(len(flat), dtype=torch.bool, device=flat.device)
        keep[flat.argsort(descending=True, stable=True)[: self.count]] = True
        parts = torch.split(keep, [s.numel() for s in scores])
        return [part.reshape(s.shape) for part, s in zip(parts, scores, strict=True)]

    def _answer(
        self, problem: Problem, keep: Tensor, stored: Tensor, options: Options, watch: Watch, seconds: float
    ) -> Answer:
        method = type(self.pruner).__name__
        if not options.refit:
            return Answer.of(unproven(stored, problem, method, seconds, options), stored, problem, MASKED)
        support = torch.cat([keep, keep.new_ones(len(problem.stored) - len(keep), keep.shape[1])])
        if (allowed := problem.support(options)) is not None:
            support &= allowed
        program = problem.program(problem.loss(), TopK(max(1, int(keep.sum())), rows=problem.rows))
        fitted, effective = refit_told(program, support, watch)
        solution = unproven(
            stored, problem, method, seconds, options, program, watch.ended or Status.NO_BOUND, effective
        )
        answer = answered(program, replace(solution, weights=fitted), problem)
        return replace(answer, status=MASKED_REFITTED) if watch.ended is None else answer

    def judge(self, answers: Sequence[Answer], problems: Sequence[Problem], options: Options) -> tuple[Answer, ...]:
        """Errors and counts anew, and whether the budget, or the pattern, is kept."""
        again = [
            replace(
                Answer.of(unproven(a.stored, p, "", 0.0, options), a.stored, p, a.status, a.notes),
                solution=a.solution,
            )
            for a, p in zip(answers, problems, strict=True)
        ]
        kept = [a.stored[: p.rows] != 0 for a, p in zip(answers, problems, strict=True)]
        if self.pattern is not None:
            n, m = self.pattern
            holds = all(bool((k.reshape(-1, m, k.shape[1]).sum(1) <= n).all()) for k in kept)
        else:
            holds = self.count is not None and sum(int(k.sum()) for k in kept) <= self.count
        return tuple(a if holds else replace(a, status=f"not {a.status}") for a in again)

    def near(self, recorded: object) -> bool:
        """Scores of another machine may round otherwise, and then choose others: only the same key will do."""
        return False

    def to_dict(self) -> dict[str, object]:
        """The method, its options, and what is wanted; scores by their digest."""
        own: dict[str, object] = {"kind": self.kind, "method": type(self.pruner).__name__, **self.pruner.to_dict()}
        own |= {"count": self.count, "pattern": self.pattern}
        if self.scores is not None:
            digest = hashlib.sha256()
            for scores in self.scores:
                digest.update(scores.contiguous().cpu().numpy().tobytes())
            own["scores"] = digest.hexdigest()[:16]
        return own

    def __str__(self) -> str:
        return f"keep {self.count:,}" if self.pattern is None else "{}:{}".format(*self.pattern)


def _masked(stored: Tensor, keep: Tensor) -> Tensor:
    weights = stored.clone()
    weights[: len(keep)][~keep] = 0
    return weights


def _ranks(scores: Tensor, dim: int) -> Tensor:
    """The place of each score along an axis, the largest first; of equal ones in their order."""
    return scores.argsort(dim=dim, descending=True, stable=True).argsort(dim=dim)


def _of_each(scores: Tensor, count: int, dim: int) -> Tensor:
    """Boolean, the ``count`` largest along an axis."""
    return _ranks(scores, dim) < count


def _split(scores: Mapping[str, Scores], total: int) -> dict[str, int]:
    """How many of the ``total`` largest scores of all layers each layer has."""
    flat = {name: torch.cat([s.flatten().double() for s in each]) for name, each in scores.items()}
    owners = torch.cat([torch.full((len(s),), number) for number, s in enumerate(flat.values())])
    chosen = owners[torch.cat(list(flat.values())).argsort(descending=True, stable=True)[:total]]
    counts = torch.bincount(chosen, minlength=len(flat)).tolist()
    return dict(zip(flat, counts, strict=True))
