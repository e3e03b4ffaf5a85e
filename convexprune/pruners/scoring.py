"""Pruners that score weights and keep the largest scores; all that follows from the scores is done here.

A new one is a class with ``score``. Budgets of layers or of the network, patterns n:m, neurons, an optional refit,
groups of convolutions, attention, records and rows come from this base.
"""

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from convexprune.network.links import Link
from convexprune.options import Options
from convexprune.pruners.neurons import Worth, prune_neurons, refitted_to
from convexprune.pruners.pruner import Pruner
from convexprune.pruners.sizes import compared_counts, wanted_of
from convexprune.runs.answer import MASKED, MASKED_REFITTED, Answer, Goal, unproven
from convexprune.runs.problem import Problem, StoppingRule
from convexprune.runs.run import Run
from convexprune.solvers.errors import InvalidInput, NonFinite, ShapeMismatch
from convexprune.solvers.programs import TopK
from convexprune.targets import Neurons, Sparsity, Target

Scores = tuple[Tensor, ...]
"""Of a layer's weights, or which of them stay: a matrix [N, M] for each group, without the bias."""


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

    def score_network(self, run: Run, target: Target) -> Mapping[str, Scores]:
        """Scores of layers that depend on each other; a layer left out is scored by itself, when its turn comes."""
        return {}

    def weights(self, problem: Problem, keep: Tensor, wanted: int | tuple[int, int], options: Options) -> Tensor:
        """The weights [N, M] of a group, bias included, where ``keep`` [N, M] says which stay: the trained ones.

        ``wanted`` is how many of the layer's are to stay, or a pattern (n, m).
        """
        return masked(problem.stored, keep)

    def prune(self, run: Run, target: Target) -> None:
        """Score, choose and write."""
        if run.options.refit and run.data is None:
            raise InvalidInput("refit: weights are fitted to what layers compute on data: give calibration data")
        found = self.score_network(run, target)
        if isinstance(target, Neurons):
            prune_neurons(run, target, self.worths(run, found), refit=run.options.refit)
            return
        assert isinstance(target, Sparsity)  # noqa: S101 - refuses says so
        goals: dict[str, KeepMask] = {}
        for names, total in compared_counts(run.layers, target).items():
            counts = {names[0]: total}
            if len(names) > 1:
                keep = largest({name: self._scores(run, name, found) for name in names}, total)
                counts = {name: sum(int(mask.sum()) for mask in masks) for name, masks in keep.items()}
            goals |= {name: KeepMask(self, count) for name, count in counts.items()}
        patterns = {name: wanted_of(target, name) for name in run.layers if name not in goals}
        goals |= {name: KeepMask(self, pattern) for name, pattern in patterns.items()}  # type: ignore[arg-type]
        known = {name: tuple(goals[name].chosen(scores)) for name, scores in found.items()}
        run.prune({name: replace(goals[name], keep=known.get(name)) for name in run.layers if name not in run.left})

    def checked_scores(self, problem: Problem, options: Options) -> Tensor:
        """``score``, with −∞ for weights that are zero and stay so.

        Raises:
            ShapeMismatch, NonFinite: The scores have another shape, or hold NaN.
        """
        scores, expected = self.score(problem, options).detach(), (problem.rows, problem.stored.shape[1])
        if tuple(scores.shape) != expected:
            raise ShapeMismatch(
                f"layer {problem.name!r}: expected scores [inputs without the bias, outputs], {expected}, found "
                f"{tuple(scores.shape)}"
            )
        if bool(scores.isnan().any()):
            raise NonFinite(f"layer {problem.name!r}: its scores hold NaN")
        support = problem.support(options)
        return scores if support is None else scores.where(support[: problem.rows].to(scores.device), -torch.inf)

    def _scores(self, run: Run, name: str, found: Mapping[str, Scores]) -> Scores:
        if name in found:
            return found[name]
        return tuple(self.checked_scores(problem, run.options).cpu() for problem in run.problems(name))

    def worths(self, run: Run, found: Mapping[str, Scores]) -> dict[str, Worth]:
        """The worth of each link's neurons, from the scores of the network as far as they were found."""

        def scores(name: str) -> Tensor:
            return self._scores(run, name, found)[0].double().nan_to_num(neginf=0.0)

        each = {name: self.worth(run, link, scores) for name, link in run.links.items()}
        return {name: [(value, 0.0) for value in values.tolist()] for name, values in each.items()}

    def worth(self, run: Run, link: Link, scores: Callable[[str], Tensor]) -> Tensor:
        """The worth [n] of a link's neurons: of each the sum of the scores of all weights with which it goes on.

        Args:
            run: With the model.
            link: The layers that have the neurons, and those that take them.
            scores: Of a consumer's weights [N, M], by its name, in float64.
        """
        width = run.widths()[link.producer]
        return torch.stack([scores(name).reshape(width, -1).sum(1) for name in link.consumers]).sum(0)


@dataclass(frozen=True, eq=False)
class KeepMask(Goal):
    """The weights of the largest scores: at most so many of a layer, or at most n of m inputs in a row.

    Attributes:
        pruner: Whose scores.
        wanted: How many weights stay, or (n, m).
        keep: Which weights [N, M] of each group these are, if that was decided for several layers together.
    """

    pruner: Scoring
    wanted: int | tuple[int, int]
    keep: tuple[Tensor, ...] | None = field(default=None, repr=False)
    kind: ClassVar[str] = "mask"

    def solve(self, problems: Sequence[Problem], options: Options, watch: StoppingRule) -> tuple[Answer, ...]:
        """Score, choose, and fit again if that was wanted."""
        began = time.perf_counter()
        keep: Sequence[Tensor] = self.keep or self.chosen([self.pruner.checked_scores(p, options) for p in problems])
        each = (time.perf_counter() - began) / len(problems)
        return tuple(
            self._answer(problem, mask.to(problem.stored.device), options, watch, time.perf_counter() - each)
            for problem, mask in zip(problems, keep, strict=True)
        )

    def chosen(self, scores: Sequence[Tensor]) -> list[Tensor]:
        """Which weights [N, M] of each group stay, exactly as many as wanted; among equal scores the first."""
        if isinstance(self.wanted, tuple):
            n, m = self.wanted
            return [of_each(s.reshape(-1, m, s.shape[1]), n, 1).reshape(s.shape) for s in scores]
        if self.pruner.per_output:
            # Every output keeps as many; what is left over goes to the largest scores among the next ones.
            each = self.wanted // sum(s.shape[1] for s in scores)
            ranked = [(s, _ranks(s, 0)) for s in scores]
            scores = [torch.where(r < each, torch.inf, s.where(r == each, -torch.inf)) for s, r in ranked]
        return list(largest({"": tuple(scores)}, self.wanted)[""])

    def _answer(self, problem: Problem, keep: Tensor, options: Options, watch: StoppingRule, began: float) -> Answer:
        method = type(self.pruner).__name__
        if not options.refit:
            stored = self.pruner.weights(problem, keep, self.wanted, options)
            return unproven(stored, problem, method, time.perf_counter() - began, options, MASKED)
        support = torch.cat([keep, keep.new_ones(len(problem.stored) - len(keep), keep.shape[1])])
        if (allowed := problem.support(options)) is not None:
            support &= allowed
        program = problem.program(problem.loss(), TopK(max(1, int(keep.sum())), rows=problem.rows))
        answer = refitted_to(support, program, problem, options, watch, method, began)
        return replace(answer, status=MASKED_REFITTED) if watch.ended is None else answer

    def judge(self, answers: Sequence[Answer], problems: Sequence[Problem], options: Options) -> tuple[Answer, ...]:
        """Errors and counts anew, and whether the budget, or the pattern, is kept."""
        again = [
            replace(unproven(a.stored, p, "", 0.0, options, a.status, a.notes), solution=a.solution)
            for a, p in zip(answers, problems, strict=True)
        ]
        kept = [a.stored[: p.rows] != 0 for a, p in zip(answers, problems, strict=True)]
        if isinstance(self.wanted, tuple):
            n, m = self.wanted
            holds = all(bool((k.reshape(-1, m, k.shape[1]).sum(1) <= n).all()) for k in kept)
        else:
            holds = sum(int(k.sum()) for k in kept) <= self.wanted
        return tuple(a if holds else replace(a, status=f"not {a.status}") for a in again)

    def near(self, recorded: Mapping[str, object]) -> None:
        """Scores of another machine may round otherwise, and then choose others: only the same key will do."""

    def to_dict(self) -> dict[str, object]:
        """The method, its options, and what is wanted; a mask by its digest."""
        own: dict[str, object] = {"kind": self.kind, "method": type(self.pruner).__name__, **self.pruner.to_dict()}
        pattern = self.wanted if isinstance(self.wanted, tuple) else None
        own |= {"count": None if pattern else self.wanted, "pattern": pattern}
        if self.keep is not None:
            masks = b"".join(mask.contiguous().cpu().numpy().tobytes() for mask in self.keep)
            own["mask"] = hashlib.sha256(masks).hexdigest()[:16]
        return own

    def __str__(self) -> str:
        return "{}:{}".format(*self.wanted) if isinstance(self.wanted, tuple) else f"keep {self.wanted:,}"


def masked(stored: Tensor, keep: Tensor) -> Tensor:
    """The weights [N, M] where ``keep`` says so, and all of the bias."""
    weights = stored.clone()
    weights[: len(keep)][~keep] = 0
    return weights


def _ranks(scores: Tensor, dim: int) -> Tensor:
    """The place of each score along an axis, the largest first; of equal ones in their order."""
    return scores.argsort(dim=dim, descending=True, stable=True).argsort(dim=dim)


def of_each(scores: Tensor, count: int, dim: int = 0) -> Tensor:
    """Boolean, the ``count`` largest along an axis; among equal ones the first."""
    return _ranks(scores, dim) < count


def largest(scores: Mapping[str, Scores], count: int) -> dict[str, Scores]:
    """Boolean, the ``count`` largest scores of all layers together; among equal ones the first."""
    flat = torch.cat([matrix.flatten() for matrices in scores.values() for matrix in matrices])
    keep = torch.full_like(flat, count >= len(flat), dtype=torch.bool)
    if 0 < count < len(flat):
        least = flat.kthvalue(len(flat) - count + 1).values
        keep = flat > least
        keep[(flat == least).nonzero().flatten()[: count - int(keep.sum())]] = True
    sizes = [matrix.numel() for matrices in scores.values() for matrix in matrices]
    parts = iter(torch.split(keep, sizes))
    return {name: tuple(next(parts).view(m.shape) for m in matrices) for name, matrices in scores.items()}
