"""Pruners that sample neurons, or single weights, by their sensitivities: coresets, with what they prove."""

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from convexprune.network.links import Link
from convexprune.options import Options
from convexprune.pruners.draws import SAMPLINGS, Allowed, Choice, Scheme, choose, proportional, shared_sizes
from convexprune.pruners.pruner import Pruner
from convexprune.pruners.sizes import kept_of, value_of
from convexprune.pruners.views import (
    NeuronView,
    Product,
    Reweight,
    Sensitivities,
    View,
    WeightView,
    incoming_of,
    of_weights,
    uniform,
)
from convexprune.report.report import Assumption
from convexprune.runs.answer import Answer
from convexprune.runs.run import Run
from convexprune.solvers.errors import InvalidInput
from convexprune.targets import Guarantee, Neurons, Sparsity, Target

Items = Literal["neurons", "weights"]

_BASELINES = 5  # uniform samples whose errors are averaged
_WHOLE = "every layer has a guarantee that is no weaker, or is kept whole"


class Sampling(Pruner):
    """Base of pruners that sample by sensitivities; write ``sensitivities``, or ``of_layers`` for all layers at once.

    Attributes:
        items: "neurons" or "weights": what it keeps or removes; a class variable or a field.
        sampling: Scheme; see ``SAMPLINGS``. A guarantee is met by draws all the same.
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
        for name, value, known in (
            ("sampling", self.sampling, tuple(SAMPLINGS)),
            ("items", self.items, ("neurons", "weights")),
        ):
            if value not in known:
                raise InvalidInput(f"{name}: expected one of {', '.join(known)}, found {value!r}")
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
        """Sensitivities of one layer's items, and what they prove."""
        raise NotImplementedError

    def of_layers(self, views: Iterable[View]) -> list[Sensitivities]:
        """Those of all layers of a network, or of some, from the input on; views are made when their turn comes."""
        return [self.sensitivities(view) for view in views]

    def allocate(self, layers: Sequence[Sensitivities], allowed: Allowed) -> list[Tensor]:
        """How many items [G] of each layer to keep, as many as are allowed; in proportion to their shares."""
        return proportional(layers, allowed)

    def prune(self, run: Run, target: Target) -> None:
        """Score, sample and write.

        Raises:
            InvalidInput: A baseline is wanted, and there are no data to measure its error on.
        """
        if run.options.baseline and run.data is None:
            raise InvalidInput("baseline: its error is one of what the network computes: give calibration data")
        kind = NeuronSampler if self.items == "neurons" else WeightSampler
        kind(self, run, target, np.random.default_rng(run.options.seed)).prune()


@dataclass(eq=False)
class Sampler:
    """What neurons and weights have in common: a sample of each layer, and its row."""

    method: Sampling
    run: Run
    target: Target
    rng: np.random.Generator

    def size(self, name: str, items: int) -> int | Guarantee:
        """How many of a layer's items stay, or what is to be proven of it."""
        value = value_of(self.target, name)
        if isinstance(self.target, Guarantee):
            return replace(self.target, value=value)  # type: ignore[arg-type]
        return kept_of(value, items)

    def choices(self, found: Sequence[Sensitivities], sizes: Sequence[Tensor | Guarantee]) -> list[Choice]:
        """A sample of each group."""
        return [choose(s, size, self.method.sampling, self.rng) for s, size in zip(found, sizes, strict=True)]

    def record(
        self,
        name: str,
        found: Sequence[Sensitivities],
        choices: Sequence[Choice],
        size: Tensor | Guarantee,
        kept: Sequence[int],
        chosen: Sequence[tuple[Tensor, Tensor]],
        views: Callable[[], Sequence[tuple[View, Sequence[Product]]]],
    ) -> str:
        """Keep the figures of a layer's row, and give its status.

        Args:
            name: Of the layer.
            found: Of each group.
            choices: Of each group.
            size: What was wanted of the first.
            kept: How many items of each group stay.
            chosen: Sensitivities and factors of the items that there are.
            views: Each group's view, and its products, for a baseline.
        """
        guarantee = size if isinstance(size, Guarantee) else None
        assumptions = min((one.assumptions(guarantee) for one in found), key=_hold)  # of a group where one fails
        s, factors = (torch.cat(values) for values in zip(*chosen, strict=True))
        notes = self._without_share(s, factors)
        own: dict[str, object] = {"items": self.method.items, "kept_items": sum(kept), "all_items": len(factors)}
        own |= {"sampling": choices[0].scheme, "draws": sum(int(choice.draws.sum()) for choice in choices)}
        own |= {"promise": found[0].promise, "assumptions": assumptions, "terms": _terms(found)}
        status = "largest kept" if choices[0].scheme == "top" else "sampled"
        if guarantee is not None:
            own["guarantee"] = (guarantee.eps, guarantee.delta)
            if all(bool(choice.whole.all()) for choice in choices):
                status = "kept whole"
            elif not _hold(assumptions):
                status = "assumption fails"
        if self.run.options.baseline:
            own["uniform_error"] = self._uniform_error(kept, views())
        self.run.extra[name] = own | {"notes": (*found[0].notes, *notes), "status": status}
        return status

    def _without_share(self, s: Tensor, factors: Tensor) -> tuple[str, ...]:
        """That items of sensitivity 0 went where every other one stays, so that there was room for them."""
        gone = int(((s == 0) & (factors == 0)).sum())
        if not gone or bool(((s > 0) & (factors == 0)).any()):
            return ()
        items = "neurons" if self.method.items == "neurons" else "nonzero weights"
        where = " on this sample" if self.method.needs_data else ""
        return (f"{gone:,} of {s.numel():,} {items} have no share in any output{where}, and went",)

    def _uniform_error(self, kept: Sequence[int], views: Sequence[tuple[View, Sequence[Product]]]) -> float:
        """The mean error of uniform samples of as many items of each group."""
        [rng] = self.rng.spawn(1)  # so that a baseline changes no sample
        found = [Sensitivities(uniform(view), lambda _: torch.zeros(1), "") for view, _ in views]
        errors = []
        for _ in range(_BASELINES):
            wrong = right = 0.0
            for s, count, (_, products) in zip(found, kept, views, strict=True):
                factors = choose(s, torch.tensor([max(1, count)]), "fixed", rng).factors
                for product in products:
                    missed, size = product.squared_errors(_spread(factors, product))
                    wrong, right = wrong + missed, right + size
            errors.append(math.sqrt(wrong / (right or 1.0)))
        return sum(errors) / len(errors)


def _hold(assumptions: Sequence[Assumption]) -> bool:
    return all(assumption.holds is not False for assumption in assumptions)


def _spread(factors: Tensor, product: Product) -> Tensor:
    """The factors of a product's weights: a weight's own, or a neuron's for all its rows."""
    if factors.numel() == product.weights.numel():
        return factors.reshape(product.weights.shape)
    return factors[0].repeat_interleave(len(product.weights) // factors.shape[1])[:, None]


def _terms(found: Sequence[Sensitivities]) -> dict[str, float]:
    """Of a layer: those of its first group, with the sensitivities of all."""
    terms = found[0].terms
    return terms | {"S": sum(one.terms["S"] for one in found)} if "S" in terms else terms


class WeightSampler(Sampler):
    """Single weights of every layer, rescaled; biases stay."""

    def prune(self) -> None:
        """Score all layers, in the order in which the network calls them, then sample and write."""
        run = self.run
        run.progress(next(iter(run.layers)), 0, len(run.layers))
        flat = iter(self.method.of_layers(view for name in run.layers for view in self.views(name)))
        found = {name: [next(flat) for _ in range(layer.groups)] for name, layer in run.layers.items()}
        chosen = {name: found[name] for name in run.layers if name not in run.left}
        run.terms |= {name: _terms(groups) for name, groups in found.items()}
        reached = run.prune({name: self._goal(name, found[name], size) for name, size in self._sizes(chosen).items()})
        if self.method.whole_network and isinstance(self.target, Guarantee):
            self._check_network([*reached])

    def views(self, name: str) -> list[WeightView]:
        """One for each group of a layer."""
        return [
            WeightView(name, Product.of(problem), problem.activation, problem.biased and bool(problem.stored[-1].any()))
            for problem in self.run.problems(name, hold=True)
        ]

    def _sizes(self, found: Mapping[str, Sequence[Sensitivities]]) -> dict[str, Sequence[Tensor | Guarantee]]:
        """Of each layer's groups."""
        weights, allocate = {name: self.run.layers[name].weights for name in found}, self.method.allocate
        if isinstance(self.target, Sparsity) and self.target.scope == "network":
            budget = kept_of(self.target.value, sum(weights.values()))
            shared = iter(shared_sizes(allocate, [s for groups in found.values() for s in groups], budget))
            return {name: [next(shared) for _ in groups] for name, groups in found.items()}
        sizes = {name: self.size(name, count) for name, count in weights.items()}
        return {
            name: [size] * len(found[name])
            if isinstance(size, Guarantee)
            else shared_sizes(allocate, found[name], size)
            for name, size in sizes.items()
        }

    def _goal(self, name: str, found: Sequence[Sensitivities], sizes: Sequence[Tensor | Guarantee]) -> Reweight:
        """The sample of a layer."""
        layer, trained = self.run.layers[name], self.run.trained[name]
        weights = [W[: len(W) - layer.biased] for W in trained]
        choices = self.choices(found, sizes)
        s, F = (
            [of_weights(v, U) for v, U in zip(values, weights, strict=True)]
            for values in ([s.values for s in found], [choice.factors for choice in choices])
        )
        kept = [int((f * U).to(U.dtype).count_nonzero()) for f, U in zip(F, weights, strict=True)]
        live = [(a[U != 0], f[U != 0]) for a, f, U in zip(s, F, weights, strict=True)]
        status = self.record(
            name, found, choices, sizes[0], kept, live, lambda: [(view, [view.product]) for view in self.views(name)]
        )
        self.run.extra[name]["all_items"] = layer.weights
        return Reweight(type(self.method).__name__.lower(), tuple(F), status)

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


class NeuronSampler(Sampler):
    """Neurons of every link; those that stay are rescaled where their outputs are used."""

    def prune(self) -> None:
        """Link after link: a layer is scored with the inputs that are left to it, or top-down with the outputs."""
        run, sizes, chosen = self.run, self._sizes(), dict[str, list[int]]()
        ordered = list(run.links.values())
        for link in ordered if run.options.order == "bottom-up" else ordered[::-1]:
            run.progress(link.producer, len(chosen), len(run.links))
            kept = self._sample(link, sizes[link.producer], chosen)
            if kept is None:
                run.restore_()
                return
            chosen[link.producer] = kept
        run.progress(link.producer, len(chosen), len(run.links))
        run.kept_neurons, widths = chosen, run.widths()
        for name, link in run.links.items():
            own = {"items": "inputs", "kept_items": len(chosen[name]), "all_items": widths[name]}
            run.extra |= {consumer: own for consumer in link.consumers if consumer not in run.extra}

    def _sizes(self) -> Mapping[str, Tensor | int | Guarantee]:
        if isinstance(self.target, Neurons) and self.target.scope == "network":
            return self._shared(self.target)
        return {name: self.size(name, width) for name, width in self.run.widths().items()}

    def _shared(self, target: Neurons) -> dict[str, Tensor | int | Guarantee]:
        """One budget of weights, split over the layers by the method, from the whole network's sensitivities."""
        links = self.run.links
        names = {name for link in links.values() for name in (link.producer, *link.consumers)}
        weights = {n: m.get_parameter("weight") for n, m in self.run.model.named_modules() if n in names}
        feeding = {consumer: name for name, link in links.items() for consumer in link.consumers}

        def cost(sizes: Sequence[Tensor]) -> int:
            part = {name: int(size.sum()) / len(weights[name]) for size, name in zip(sizes, links, strict=True)}
            left: list[float] = [
                w.numel() * part.get(n, 1) * part.get(feeding.get(n, ""), 1) for n, w in weights.items()
            ]
            return round(sum(left))

        found = self.method.of_layers(self.view(link, {}) for link in links.values())
        budget = kept_of(target.value, sum(weight.numel() for weight in weights.values()))
        return dict(zip(links, shared_sizes(self.method.allocate, found, budget, cost), strict=True))

    def _sample(
        self, link: Link, size: Tensor | int | Guarantee, chosen: Mapping[str, Sequence[int]]
    ) -> list[int] | None:
        """The neurons of a link that stay, once its consumers are reweighted; None where the run was stopped."""
        began, run, name = time.perf_counter(), self.run, link.producer
        view = self.view(link, chosen)
        found = self.method.of_layers([view])
        if isinstance(size, int):
            [size] = shared_sizes(self.method.allocate, found, size)
        choices = self.choices(found, [size])
        factors = choices[0].factors
        if not bool((factors > 0).any()):  # no neuron adds anything; a layer needs one all the same
            factors = factors.clone().index_fill_(1, torch.tensor([0], device=factors.device), 1.0)
        kept = (factors[0] > 0).nonzero()[:, 0].tolist()
        items = [(found[0].values[0], factors[0])]
        status = self.record(name, found, choices, size, [len(kept)], items, lambda: [(view, view.products)])
        errors: list[Answer] = []
        for consumer, product in zip(link.consumers, view.products, strict=True):
            F = _spread(factors, product).expand_as(product.weights).contiguous()
            goal = Reweight(type(self.method).__name__.lower(), (F,), status, _columns(chosen.get(consumer), F))
            answers = run.answer(consumer, goal)
            if answers is None:
                return None
            run.write_(consumer, answers, goal)
            errors += answers
        error, whole = (math.hypot(*values) for values in zip(*((a.error, a.size) for a in errors), strict=True))
        samples = 0 if view.products[0].inputs is None else len(view.products[0].inputs)
        run.extra[name] |= {"output_error": error / (whole or 1.0), "samples": samples}
        run.extra[name]["seconds"] = time.perf_counter() - began
        return kept

    def view(self, link: Link, chosen: Mapping[str, Sequence[int]]) -> NeuronView:
        """The producer's neurons with the weights as they are now; inputs as the original network computes them."""
        products = []
        for name in link.consumers:
            [problem] = self.run.problems(name, hold=True)
            [now] = self.run.layers[name].read()
            columns = _columns(chosen.get(name), now)
            products.append(Product.of(problem, now if columns is None else now * columns.to(now)))
        reach = partial(self._reach, link.producer)
        return NeuronView(link.producer, incoming_of(self.run.model, link), link.activation, tuple(products), reach)

    def _reach(self, name: str) -> float | None:
        if self.run.data is None or name not in self.run.layers:
            return None
        [problem] = self.run.problems(name)
        longest = torch.linalg.vector_norm(problem.inputs, dim=1, dtype=torch.float64).max()
        return math.hypot(float(longest), not problem.biased)


def _columns(chosen: Sequence[int] | None, U: Tensor) -> Tensor | None:
    """Boolean [M], the outputs that stay; None where none was chosen."""
    if chosen is None:
        return None
    columns = torch.zeros(U.shape[1], dtype=torch.bool, device=U.device)
    columns[list(chosen)] = True
    return columns
