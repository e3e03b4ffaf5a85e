"""Pruners that sample neurons, or single weights, by their sensitivities: coresets, with what they prove."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from convexprune.network.links import Link
from convexprune.options import Options
from convexprune.pruners.draws import Choice, Scheme, choose, largest_scale, rounded, sample
from convexprune.pruners.pruner import Pruner
from convexprune.pruners.sizes import kept_of, value_of
from convexprune.pruners.views import Items, Product, Reweight, Sensitivities, View, incoming_of, spread
from convexprune.report.report import Assumption
from convexprune.runs.answer import Answer
from convexprune.runs.run import Run
from convexprune.solvers.errors import InvalidInput
from convexprune.targets import Guarantee, Neurons, Sparsity, Target

_BASELINES = 5  # uniform samples whose errors are averaged
_WHOLE = "every layer has a guarantee that is no weaker, or is kept whole"


def _items(sizes: Sequence[Tensor]) -> int:
    return sum(int(size.sum()) for size in sizes)


class Sampling(Pruner):
    """Base of pruners that sample by sensitivities; write ``sensitivities``, or ``of_layers`` for all layers at once.

    Attributes:
        items: "neurons" or "weights": what it keeps or removes; a class variable or a field.
        sampling: Scheme; see ``Scheme``. A guarantee is met by draws all the same.
        whole_network: Whether its promise is about the network: all layers are scored, whichever are pruned.
    """

    needs_samples: ClassVar[bool] = True
    needs_data: ClassVar[bool] = False
    fit: ClassVar[str | None] = "ball"
    norms: ClassVar[str | None] = "leave"
    residual: ClassVar[bool] = False
    whole_network: ClassVar[bool] = False
    sampling: Scheme

    @property
    def items(self) -> Items:
        """What it keeps or removes."""
        raise NotImplementedError

    def by_neurons(self, target: Target) -> bool:
        """Whether its items are neurons."""
        return self.items == "neurons"

    def default_mode(self, target: Target, options: Options) -> str | None:
        """Sensitivities are those of the original network."""
        return "parallel"

    def refuses(self, target: Target, options: Options) -> str | None:
        """Targets of the other items, patterns, cascade, and what is about neurons where weights are chosen."""
        kind = Neurons if self.items == "neurons" else Sparsity
        if not isinstance(target, kind | Guarantee):
            return f"it samples {self.items}, and takes {kind.kind} or guarantee as a target, not {target.kind}"
        values = (target.table or {"": target.value}).values()
        if any(isinstance(value, str) for value in values):
            return "a sample has no pattern such as 2:4"
        if options.cascade:
            return "its sensitivities are those of the original network: leave mode out"
        if options.refit:
            return "a sample is reweighted, and not fitted again: leave refit out"
        if self.items == "weights" and (options.order != "bottom-up" or not options.remove):
            return "order and remove are about neurons, and single weights are chosen: leave them out"
        return None

    def sensitivities(self, view: View) -> Sensitivities:
        """Sensitivities of one layer's items, and what they prove.

        Raises:
            InvalidInput: The view is of other items, or does not have what the method needs to know.
        """
        raise NotImplementedError

    def of_layers(self, views: Iterable[View]) -> list[Sensitivities]:
        """Those of all layers of a network, or of some, from the input on; views are made when their turn comes."""
        return [self.sensitivities(view) for view in views]

    def sizes_at(self, layers: Sequence[Sensitivities]) -> Callable[[float], list[Tensor]]:
        """From a scale to how many items [G] of each layer stay, more as it grows; in proportion to their parts."""
        return lambda scale: [rounded(torch.minimum(scale * s.parts, s.candidates.double())) for s in layers]

    def allocate(
        self, layers: Sequence[Sensitivities], budget: int, cost: Callable[[Sequence[Tensor]], int] = _items
    ) -> list[Tensor]:
        """The sizes [G] of each layer at the largest scale at which their cost is within a budget.

        Raises:
            InvalidInput: One item a layer is too many already.
        """
        sizes = self.sizes_at(layers)
        scale = largest_scale(lambda scale: cost(sizes(scale)) <= budget)
        found = sizes(scale)
        for number, more in enumerate(sizes(scale * (1 + 1e-9))):  # layers that would all grow here grow one by one
            larger = [*found[:number], more, *found[number + 1 :]]
            found = larger if cost(larger) <= budget else found
        if cost(found) > budget:
            raise InvalidInput(f"{cost(found):,} weights are the fewest that can be left, {budget:,} were wanted")
        return found

    def prune(self, run: Run, target: Target) -> None:
        """Score, sample and write.

        Raises:
            InvalidInput: A baseline is wanted, and there are no data to measure its error on.
        """
        if run.options.baseline and run.data is None:
            raise InvalidInput("baseline: its error is one of what the network computes: give calibration data")
        sampler = Sampler(self, run, target, np.random.default_rng(run.options.seed))
        if self.items == "neurons":
            sampler.prune_neurons()
        else:
            sampler.prune_weights()


@dataclass(eq=False)
class Sampler:
    """One run of a method: a sample of each layer, written, and its row."""

    method: Sampling
    run: Run
    target: Target
    rng: np.random.Generator

    def prune_weights(self) -> None:
        """Score the weights of all layers, in the order in which the network calls them, then sample and write."""
        run, method, target = self.run, self.method, self.target
        run.ahead = [*run.layers]
        run.progress(next(iter(run.layers)), 0, len(run.layers))
        flat = iter(method.of_layers(view for name in run.layers for view in self._weight_views(name)))
        every = {name: [next(flat) for _ in range(layer.groups)] for name, layer in run.layers.items()}
        run.terms |= {name: _terms(groups) for name, groups in every.items()}
        found = {name: groups for name, groups in every.items() if name not in run.left}
        shared: Iterator[Tensor] | None = None
        if isinstance(target, Sparsity) and target.scope == "network":
            budget = kept_of(target.value, sum(run.layers[name].weights for name in found))
            shared = iter(method.allocate([s for groups in found.values() for s in groups], budget))
        goals = {}
        for name, groups in found.items():
            own = self._sizes(name, groups, run.layers[name].weights) if shared is None else islice(shared, len(groups))
            goals[name] = self._sample_weights(name, groups, list(own))
        reached = run.prune(goals)
        if method.whole_network and isinstance(target, Guarantee):
            self._check_network([*reached])

    def prune_neurons(self) -> None:
        """Link after link: a layer is scored with the inputs that are left to it, or top-down with the outputs."""
        run, chosen, target = self.run, dict[str, list[int]](), self.target
        ordered = list(run.links.values())[:: 1 if run.options.order == "bottom-up" else -1]
        run.ahead = [consumer for link in ordered for consumer in link.consumers]
        shared = self._shared(target) if isinstance(target, Neurons) and target.scope == "network" else {}
        for link in ordered:
            run.progress(link.producer, len(chosen), len(run.links))
            kept = self._sample_neurons(link, shared.get(link.producer), chosen)
            if kept is None:
                run.restore_()
                return
            chosen[link.producer] = kept
        run.progress(link.producer, len(chosen), len(run.links))
        run.kept_neurons, widths = chosen, run.widths()
        for name, link in run.links.items():
            own = {"items": "inputs", "kept_items": len(chosen[name]), "all_items": widths[name]}
            run.extra |= {consumer: own for consumer in link.consumers if consumer not in run.extra}

    def neuron_view(self, link: Link, chosen: Mapping[str, Sequence[int]]) -> View:
        """The producer's neurons with the weights as they are now; inputs as the original network computes them."""
        products, name = [], link.producer
        for consumer in link.consumers:
            [problem] = self.run.problems(consumer)
            [now] = self.run.layers[consumer].read()
            columns = _columns(chosen.get(consumer), now)
            products.append(Product.of(problem, now if columns is None else now * columns.to(now)))
        incoming, reach = incoming_of(self.run.model, link), partial(self._reach, name)
        return View(name, tuple(products), link.activation, incoming, guarantee=self._guarantee(name), measure=reach)

    def _reach(self, name: str) -> float | None:
        if self.run.data is None or name not in self.run.layers:
            return None
        [problem] = self.run.problems(name)
        longest = torch.linalg.vector_norm(problem.inputs, dim=1, dtype=torch.float64).max()
        return math.hypot(float(longest), not problem.biased)

    def _weight_views(self, name: str) -> list[View]:
        """One for each group of a layer."""
        guarantee = self._guarantee(name)
        return [
            View(
                name,
                (Product.of(problem),),
                problem.activation,
                biased=problem.biased and bool(problem.stored[-1].any()),
                guarantee=guarantee,
            )
            for problem in self.run.problems(name)
        ]

    def _guarantee(self, name: str) -> Guarantee | None:
        """What is to be proven of a layer."""
        if not isinstance(self.target, Guarantee) or name in self.run.left:
            return None
        return replace(self.target, value=value_of(self.target, name))  # type: ignore[arg-type]

    def _sizes(self, name: str, found: Sequence[Sensitivities], items: int) -> Sequence[Tensor | Guarantee]:
        """Of each group of a layer: how many items stay, or what is to be proven."""
        guarantee = self._guarantee(name)
        if guarantee is not None:
            return [guarantee] * len(found)
        return self.method.allocate(found, kept_of(value_of(self.target, name), items))

    def _shared(self, target: Neurons) -> dict[str, Tensor]:
        """One budget of weights, split over the layers by the method, from the whole network's sensitivities."""
        links = self.run.links
        names = {name for link in links.values() for name in (link.producer, *link.consumers)}
        weights = {n: m.get_parameter("weight") for n, m in self.run.model.named_modules() if n in names}
        feeding = {consumer: name for name, link in links.items() for consumer in link.consumers}

        def cost(sizes: Sequence[Tensor]) -> int:
            part = {name: int(size.sum()) / len(weights[name]) for size, name in zip(sizes, links, strict=True)}
            left = [float(w.numel() * part.get(n, 1) * part.get(feeding.get(n, ""), 1)) for n, w in weights.items()]
            return round(sum(left))

        found = self.method.of_layers(self.neuron_view(link, {}) for link in links.values())
        budget = kept_of(target.value, sum(weight.numel() for weight in weights.values()))
        return dict(zip(links, self.method.allocate(found, budget, cost), strict=True))

    def _sample_weights(
        self, name: str, found: Sequence[Sensitivities], sizes: Sequence[Tensor | Guarantee]
    ) -> Reweight:
        """The sample of a layer's weights."""
        layer = self.run.layers[name]
        weights = [W[: len(W) - layer.biased] for W in self.run.trained[name]]
        choices = [choose(s, size, self.method.sampling, self.rng) for s, size in zip(found, sizes, strict=True)]
        s, F = (
            [spread(values, U) for values, U in zip(each, weights, strict=True)]
            for each in ([one.values for one in found], [choice.factors for choice in choices])
        )
        items = [torch.cat([f[U != 0] for f, U in zip(each, weights, strict=True)]) for each in (s, F)]
        status = self._record(name, found, choices, sizes[0], items)
        kept = [int((f * U).to(U.dtype).count_nonzero()) for f, U in zip(F, weights, strict=True)]
        self.run.extra[name] |= {"kept_items": sum(kept), "all_items": layer.weights}
        if self.run.options.baseline:
            self.run.extra[name]["uniform_error"] = self._uniform_error(self._weight_views(name), kept)
        return Reweight(type(self.method).__name__.lower(), tuple(F), status)

    def _sample_neurons(self, link: Link, size: Tensor | None, chosen: Mapping[str, Sequence[int]]) -> list[int] | None:
        """The neurons of a link that stay, once its consumers are reweighted; None where the run was stopped."""
        began, run, name = time.perf_counter(), self.run, link.producer
        view = self.neuron_view(link, chosen)
        [found] = self.method.of_layers([view])
        [wanted] = self._sizes(name, [found], len(view.incoming)) if size is None else [size]
        choice = choose(found, wanted, self.method.sampling, self.rng)
        factors = choice.factors
        if not bool((factors > 0).any()):  # no neuron adds anything; a layer needs one all the same
            factors = factors.clone().index_fill_(1, torch.tensor([0], device=factors.device), 1.0)
        kept = (factors[0] > 0).nonzero()[:, 0].tolist()
        status = self._record(name, [found], [choice], wanted, (found.values[0], factors[0]))
        if run.options.baseline:
            run.extra[name]["uniform_error"] = self._uniform_error([view], [len(kept)])
        errors: list[Answer] = []
        for consumer, product in zip(link.consumers, view.products, strict=True):
            F = spread(factors, product.weights).contiguous()
            goal = Reweight(type(self.method).__name__.lower(), (F,), status, _columns(chosen.get(consumer), F))
            answers = run.answer(consumer, goal)
            if answers is None:
                return None
            run.write_(consumer, answers, goal)
            errors += answers
        error, whole = (math.hypot(*values) for values in zip(*((a.error, a.size) for a in errors), strict=True))
        samples = 0 if view.products[0].inputs is None else len(view.products[0].inputs)
        seconds = time.perf_counter() - began
        run.extra[name] |= {"output_error": error / (whole or 1.0), "samples": samples, "seconds": seconds}
        return kept

    def _record(
        self,
        name: str,
        found: Sequence[Sensitivities],
        choices: Sequence[Choice],
        size: Tensor | Guarantee,
        items: Sequence[Tensor],
    ) -> str:
        """Keep the figures of a layer's row, from its groups' choices and its items' s and factors; give its status."""
        assumptions = min((one.assumptions for one in found), key=_hold)  # of a group where one fails
        status = "largest kept" if choices[0].scheme == "top" else "sampled"
        own: dict[str, object] = {}
        if isinstance(size, Guarantee):
            own["guarantee"] = (size.eps, size.delta)
            whole = all(bool(choice.whole.all()) for choice in choices)
            status = "kept whole" if whole else status if _hold(assumptions) else "assumption fails"
        s, factors = items
        notes, gone = found[0].notes, int(((s == 0) & (factors == 0)).sum())
        if gone and not bool(((s > 0) & (factors == 0)).any()):  # there was room for them
            what = "neurons" if self.method.items == "neurons" else "nonzero weights"
            where = " on this sample" if self.method.needs_data else ""
            notes = (*notes, f"{gone:,} of {s.numel():,} {what} have no share in any output{where}, and went")
        self.run.extra[name] = own | {
            "items": self.method.items,
            "kept_items": int((factors > 0).sum()),
            "all_items": len(factors),
            "sampling": choices[0].scheme,
            "draws": sum(int(choice.draws.sum()) for choice in choices),
            "promise": found[0].promise,
            "assumptions": assumptions,
            "terms": _terms(found),
            "notes": notes,
            "status": status,
        }
        return status

    def _uniform_error(self, views: Sequence[View], kept: Sequence[int]) -> float:
        """The mean error of uniform samples of as many items of each group."""
        [rng] = self.rng.spawn(1)  # so that a baseline changes no sample
        errors = []
        for _ in range(_BASELINES):
            wrong = right = 0.0
            for view, count in zip(views, kept, strict=True):
                factors = sample(view.uniform, torch.tensor([max(1, count)]), "fixed", rng)
                for product in view.products:
                    missed, size = product.squared_errors(spread(factors, product.weights))
                    wrong, right = wrong + missed, right + size
            errors.append(math.sqrt(wrong / (right or 1.0)))
        return sum(errors) / len(errors)

    def _check_network(self, names: Sequence[str]) -> None:
        """What a promise about the network needs of all its layers; those that are not pruned are whole."""
        run, rows = self.run, {name: self.run.row(name) for name in names}
        whole = {name for name, row in rows.items() if row.nonzeros == row.nonzeros_before and row.output_error == 0}
        for name, row in rows.items():
            eps, delta = row.guarantee or (0.0, 0.0)
            weaker = (one.guarantee for other, one in rows.items() if other not in whole)
            holds = all(own is not None and own[0] <= eps and own[1] <= delta for own in weaker)
            run.extra[name]["assumptions"] = (*row.assumptions, Assumption(_WHOLE, holds))
            if not holds:
                run.extra[name]["status"] = "assumption fails"


def _hold(assumptions: Sequence[Assumption]) -> bool:
    return all(assumption.holds is not False for assumption in assumptions)


def _terms(found: Sequence[Sensitivities]) -> dict[str, float]:
    """Of a layer: those of its first group, with the sensitivities of all."""
    terms = found[0].terms
    return terms | {"S": sum(one.terms["S"] for one in found)} if "S" in terms else terms


def _columns(chosen: Sequence[int] | None, U: Tensor) -> Tensor | None:
    """Boolean [M], the outputs that stay; None where none was chosen."""
    if chosen is None:
        return None
    return torch.zeros(U.shape[1], dtype=torch.bool, device=U.device).index_fill_(
        0, torch.tensor(list(chosen), device=U.device), True
    )
