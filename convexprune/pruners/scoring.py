"""Pruners that score weights and keep the largest scores; all that follows from the scores is done here.

A new one is a class with ``score``. Budgets of layers or of the network, patterns n:m, neurons, an optional refit,
groups of convolutions, attention, records and rows come from this base.
"""

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from convexprune.layers import gradient_matrices, weight_matrices, write_back_
from convexprune.network.forwards import evaluating
from convexprune.network.links import Link
from convexprune.options import Options
from convexprune.pruners.neurons import Worth, prune_neurons, refitted_to
from convexprune.pruners.pruner import Pruner
from convexprune.pruners.sizes import compared_counts, wanted_of
from convexprune.runs.answer import MASKED, MASKED_REFITTED, Answer, Goal, unproven
from convexprune.runs.problem import Problem, StoppingRule
from convexprune.runs.run import Run
from convexprune.solvers.arrays import checked_count
from convexprune.solvers.errors import InvalidInput, NonFinite, ShapeMismatch
from convexprune.solvers.programs import TopK
from convexprune.targets import Neurons, Sparsity, Target

Schedule = Literal["exponential", "linear"]
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
            prune_neurons(run, target, self._worth(run, found), refit=run.options.refit)
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

    def _worth(self, run: Run, found: Mapping[str, Scores]) -> dict[str, Worth]:
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


class GradientScoring(Scoring):
    """Base of pruners that score weights by |w·∂R/∂w| in float64, R any function of the whole network.

    In each of the rounds the weights of the smallest scores go from a copy of the model, and those that stay are scored
    anew. Neurons and patterns are chosen by the scores of the whole network, in one round.

    Attributes:
        rounds: How often weights are scored.
        schedule: Of the density ρ over rounds e of n: "exponential", ρ^(e/n), or "linear", 1 − (1 − ρ)e/n.
    """

    rounds: int = 1
    schedule: Schedule = "exponential"

    def __post_init__(self) -> None:
        super().__post_init__()
        checked_count("rounds", self.rounds)

    def prepare_(self, model: nn.Module) -> None:
        """Change the copy of the model that is scored."""

    def objective(self, model: nn.Module, run: Run) -> Tensor:
        """R, a number; gradients are taken of it."""
        raise NotImplementedError

    def score_network(self, run: Run, target: Target) -> Mapping[str, Scores]:
        """Scores of the last round; −1 for weights that went before."""
        counts, fan_in = compared_counts(run.layers, target), {name: layer.fan_in for name, layer in run.layers.items()}
        with evaluating(run.model):
            model = deepcopy(run.model).double()
            self.prepare_(model)
            for parameter in model.parameters():
                parameter.requires_grad_(parameter.is_floating_point())
            scores = self._scored(model, run, fan_in)
            for e in range(1, self.rounds if counts else 1):
                keep = dict[str, Scores]()
                for names, count in counts.items():
                    keep |= largest(pool := {name: scores[name] for name in names}, self._count(pool, count, e))
                for name, masks in keep.items():
                    layer = model.get_submodule(name)
                    write_back_(layer, [masked(W, mask) for W, mask in zip(weight_matrices(layer), masks, strict=True)])
                scores = self._scored(model, run, fan_in)
                for name, masks in keep.items():
                    scores[name] = tuple(S.where(mask, -1.0) for S, mask in zip(scores[name], masks, strict=True))
        return scores

    def _scored(self, model: nn.Module, run: Run, fan_in: Mapping[str, Sequence[int]]) -> dict[str, Scores]:
        model.zero_grad()
        with torch.enable_grad():
            R = self.objective(model, run)
            if not bool(R.isfinite()):
                raise NonFinite(f"{type(self).__name__}: R, whose gradients score weights, is {float(R.detach())}")
            R.backward()  # type: ignore[no-untyped-call]
        found = dict[str, Scores]()
        for name, inputs in fan_in.items():
            layer = model.get_submodule(name)
            groups = zip(weight_matrices(layer), gradient_matrices(layer), inputs, strict=True)
            found[name] = tuple((W[:rows] * G[:rows]).abs().cpu() for W, G, rows in groups)
        return found

    def _count(self, pool: Mapping[str, Scores], final: int, e: int) -> int:
        """How many weights stay after round e."""
        total = sum(S.numel() for scores in pool.values() for S in scores)
        rho, part = final / total, e / self.rounds
        return max(final, round(total * (rho**part if self.schedule == "exponential" else 1 - (1 - rho) * part)))


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
