"""Pruners that sample neurons, or single weights, by their sensitivities: coresets, with what they prove."""

import hashlib
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from convexprune.layers import weight_matrices
from convexprune.network.links import Link
from convexprune.options import Options
from convexprune.pruners.draws import SAMPLINGS, Allowed, How, draws_for, proportional, sample, whole_draws
from convexprune.pruners.pruner import Pruner
from convexprune.pruners.sizes import value_of
from convexprune.report.report import Assumption
from convexprune.runs.answer import Answer, Goal, unproven
from convexprune.runs.layer import has_bias
from convexprune.runs.problem import Problem, Watch
from convexprune.runs.run import Run
from convexprune.solvers.arrays import norm, working_dtype
from convexprune.solvers.errors import InvalidInput, NonFinite
from convexprune.targets import Guarantee, Neurons, Sparsity, Target

Items = Literal["neurons", "weights"]

_BASELINES = 5  # uniform samples whose errors are averaged
_ROWS = 65536  # of X that a product is computed with at a time


# What methods see


@dataclass(frozen=True, eq=False)
class Product:
    """A matrix product XU of the network, without its bias.

    Attributes:
        weights: U [N, M].
        inputs: X [P, N], a sample of what the network computes there; None if there are no data.
        positions: Rows of X that one sample has, one after another: where a convolution is applied to it.
        kernel: Rows of U that one channel has, one after another: the positions of a convolution's kernel.
    """

    weights: Tensor
    inputs: Tensor | None
    positions: int = 1
    kernel: int = 1


@dataclass(frozen=True, eq=False)
class NeuronView:
    """A layer's n neurons (or filters) and the layers that take their outputs.

    Attributes:
        name: Of the layer.
        incoming: p_i = (w_i, b_i) [n, d + 1], a batch norm on the way folded in: neuron i computes φ(p_iᵀ(x, 1)).
        activation: φ by name; None for none.
        products: One for each consumer; rows i·repeat to (i + 1)·repeat − 1 of U belong to neuron i.
        reach: A bound β on √(‖x‖² + 1) over the layer's inputs x, as measured; None if there are no data.
    """

    name: str
    incoming: Tensor
    activation: str | None
    products: tuple[Product, ...]
    reach: float | None

    @property
    def outgoing(self) -> Tensor:
        """[n, K]: all the weights with which neuron i goes on."""
        return torch.cat([p.weights.reshape(len(self.incoming), -1) for p in self.products], dim=1)

    @property
    def loads(self) -> Tensor:
        """[n, M]: Σ|W| over the weights (a kernel's, or those of a map) with which neuron i goes on to output j."""
        n = len(self.incoming)
        return torch.cat([p.weights.abs().reshape(n, -1, p.weights.shape[1]).sum(1) for p in self.products], dim=1)

    @property
    def outputs(self) -> int:
        """K, how many outputs take anything from the layer; at least 1."""
        return max(1, int(self.loads.any(0).sum()))


@dataclass(frozen=True, eq=False)
class WeightView:
    """A layer's own weights, one by one.

    Attributes:
        name: Of the layer.
        product: XU, U [N, M] with a column for each output; the bias is kept as it is.
        activation: What follows the layer.
        biased: Whether the layer has a bias that is not all 0.
    """

    name: str
    product: Product
    activation: str | None
    biased: bool = False


View = NeuronView | WeightView


@dataclass(frozen=True, eq=False)
class Sensitivities:
    """What a method says of a layer's items, in groups that are sampled apart from each other.

    Attributes:
        values: s [G, n] ≥ 0; an item of sensitivity 0 may go. Neurons are one group; a layer's weights are one,
            [1, N·M], or those of each output and sign apart, as ``by_sign`` has them.
        draws: (eps, delta) ↦ how many draws [G] the guarantee needs.
        promise: The guarantee in words, for any eps and delta.
        assumptions: What it rests on: for the guarantee, or without one (None), where a method's own delta stands in.
        notes: What else a reader should know, such as that here the method is uniform sampling.
        kept: [n] items that are kept for certain where they are fewer than the size; None for none.
        top: Sizes [G] ↦ the groups [G] that keep so many of their largest items, whatever the sampling; None: none do.
        shares: [G] > 0, how a budget is to be split over groups; None: evenly by items.
        terms: Figures of the theory by name, for the report.
    """

    values: Tensor
    draws: Callable[[Guarantee], Tensor]
    promise: str
    assumptions: Callable[[Guarantee | None], tuple[Assumption, ...]] = lambda _: ()
    notes: tuple[str, ...] = ()
    kept: Tensor | None = None
    top: Callable[[Tensor], Tensor] | None = None
    shares: Tensor | None = None
    terms: dict[str, float] = field(default_factory=dict)

    @property
    def candidates(self) -> Tensor:
        """How many items [G] have a sensitivity."""
        return (self.values > 0).sum(1)


def by_sign(U: Tensor) -> Tensor:
    """|U| [2M, N] of weights U [N, M]: the positive ones of each output, then the negative ones; 0 elsewhere."""
    return torch.cat([U.T.clamp(min=0), (-U.T).clamp(min=0)])


def of_weights(factors: Tensor, U: Tensor) -> Tensor:
    """[N, M] of factors of U's entries: [1, N·M], or [2M, N] in groups as those of ``by_sign``."""
    if len(factors) == 1:
        return factors.reshape(U.shape)
    positive, negative = factors.T.chunk(2, dim=1)
    return torch.where(U > 0, positive, torch.where(U < 0, negative, 0.0))


def bernstein(total: Tensor, guarantee: Guarantee, queries: int) -> Tensor:
    """Draws for errors of at most eps·F in so many fixed sums, all at once: ⌈2t(1 + 2ε/3)/ε²·log(2K/δ)⌉.

    For a sum of terms with |f_i| ≤ s_iF, drawn with probabilities s_i/t, a reweighted term is at most tF and its second
    moment at most tF² (Bernstein's inequality, and a union over the K queries).
    """
    eps = guarantee.eps
    factor = 2 * (1 + 2 * eps / 3) / eps**2 * math.log(2 * queries / guarantee.delta)
    return whole_draws(factor * total)


def hoeffding(guarantee: Guarantee, queries: int) -> Tensor:
    """[1] draws for errors of at most eps·t in so many fixed sums of terms |f_i| ≤ s_i, t = Σs: ⌈2·log(2K/δ)/ε²⌉."""
    m = 2 * math.log(2 * queries / guarantee.delta) / guarantee.eps**2
    return whole_draws(torch.tensor([m], dtype=torch.float64))


# The contract


class Sampling(Pruner):
    """Base of pruners that sample by sensitivities; write ``sensitivities``, or ``of_layers`` for all layers at once.

    Attributes:
        items: Whether it keeps or removes neurons, or single weights; a class variable or a field.
        sampling: How; see ``SAMPLINGS``. A guarantee is met by draws all the same.
        whole_network: Whether its promise is about the network: all layers are scored, whichever are pruned.
    """

    needs_samples: ClassVar[bool] = True
    needs_data: ClassVar[bool] = False
    fit: ClassVar[str | None] = "ball"
    norms: ClassVar[str | None] = "leave"
    residual: ClassVar[bool] = False
    whole_network: ClassVar[bool] = False
    items: Items
    sampling: How

    def by_neurons(self, target: Target) -> bool:
        """Whether its items are neurons."""
        return self.items == "neurons"

    def default_mode(self, target: Target, options: Options) -> str | None:
        """Sensitivities are those of the original network."""
        return "parallel"

    def refuses(self, target: Target, options: Options) -> str | None:
        """Targets of the other items, patterns, cascade, and what is about neurons where weights are chosen."""
        for name, value, known in (
            ("sampling", self.sampling, SAMPLINGS),
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
        """Score, sample and write."""
        rng = np.random.default_rng(run.options.seed)
        (_Neurons if self.items == "neurons" else _Weights)(self, run, target, rng).prune()


def neurons_of(view: View, method: str) -> NeuronView:
    """The view, if it is one of neurons.

    Raises:
        InvalidInput: The method was given single weights.
    """
    if not isinstance(view, NeuronView):
        raise InvalidInput(f"{method} chooses neurons, and was given the single weights of {view.name!r}")
    return view


def weights_of(view: View, method: str) -> WeightView:
    """The view, if it is one of weights, with inputs.

    Raises:
        InvalidInput: The method was given neurons, or no inputs.
    """
    if not isinstance(view, WeightView):
        raise InvalidInput(f"{method} chooses single weights, and was given the neurons of {view.name!r}")
    if view.product.inputs is None:
        raise InvalidInput(
            f"{method} needs a sample of the inputs of {view.name!r}: give calibration data that reach it"
        )
    return view


# Sizes


@dataclass(frozen=True, eq=False)
class Choice:
    """What became of a layer's items.

    Attributes:
        factors: [G, n], 0 for those that go.
        sampling: How they were chosen.
        draws: [G] draws, or items, that were wanted.
        whole: [G] groups that are kept as they are, because a guarantee would need at least as many draws.
    """

    factors: Tensor
    sampling: str
    draws: Tensor
    whole: Tensor


def items_kept(value: object, items: int) -> int:
    """How many of so many items stay: a whole number of them, or all but a part; at least 1, at most all."""
    if isinstance(value, int):
        return min(items, value)
    return max(1, round((1 - float(value)) * items))  # type: ignore[arg-type]


def choose(method: Sampling, found: Sensitivities, size: int | Guarantee | Tensor, rng: np.random.Generator) -> Choice:
    """Sample a layer's items.

    Args:
        method: Its ``sampling``, and how it splits a number of items over groups.
        found: Of the layer's items.
        size: How many to keep, of all groups or [G] of each, or what is to be proven.
        rng: Where randomness comes from.

    Raises:
        InvalidInput: A guarantee of a method that proves nothing, or of one that keeps the largest.
    """
    if isinstance(size, Guarantee):
        return _guaranteed(method, found, size, rng)
    if not isinstance(size, Tensor):
        budget = size
        [size] = method.allocate([found], lambda sizes: int(sizes[0].sum()) <= budget)
    s, draws = found.values, size
    if method.sampling == "draws":
        every = size >= found.candidates.cpu()  # no number of draws is sure to find them all
        draws = torch.where(every, size, draws_for(s, torch.minimum(size, found.candidates.cpu())))
        factors = torch.where(every.to(s.device)[:, None], (s > 0).double(), sample(s, draws, "draws", rng).factors)
    else:
        factors = _fixed(found, size, method.sampling, rng)
    if found.top is not None:
        top = found.top(size)
        factors = torch.where(top.to(s.device)[:, None], sample(s, size, "top", rng).factors, factors)
        draws = torch.where(top, size, draws)
    return Choice(factors, method.sampling, draws, torch.zeros(len(size), dtype=torch.bool))


def _fixed(found: Sensitivities, size: Tensor, how: How, rng: np.random.Generator) -> Tensor:
    s, kept = found.values, found.kept
    if kept is None or how != "fixed" or int(kept.sum()) >= int(size[0]):  # nothing left for the rest
        return sample(s, size, how, rng).factors
    rest = sample(s.masked_fill(kept, 0), size - int(kept.sum()), how, rng).factors
    return torch.where(kept, 1.0, rest)


def _guaranteed(method: Sampling, found: Sensitivities, guarantee: Guarantee, rng: np.random.Generator) -> Choice:
    if method.sampling == "top":
        raise InvalidInput("keeping the largest guarantees nothing: give a count or a part, or sampling='draws'")
    draws = found.draws(guarantee).to("cpu", torch.int64)
    whole = draws >= found.candidates.cpu()
    factors = sample(found.values, draws, "draws", rng).factors
    return Choice(torch.where(whole.to(factors.device)[:, None], 1.0, factors), "draws", draws, whole)


def shared_sizes(
    method: Sampling, layers: Sequence[Sensitivities], cost: Callable[[Sequence[Tensor]], int], budget: int
) -> list[Tensor]:
    """Sizes [G] of each layer whose cost in weights is within a budget of the whole network.

    Raises:
        InvalidInput: One item a layer is too many already.
    """
    sizes = method.allocate(layers, lambda sizes: cost(sizes) <= budget)
    if cost(sizes) > budget:
        raise InvalidInput(f"{cost(sizes):,} weights are the fewest that can be left, {budget:,} were wanted")
    return sizes


# Drivers


@dataclass(frozen=True, eq=False)
class Reweight(Goal):
    """Trained weights times factors, group by group; what a factor of 0 belongs to goes.

    Attributes:
        method: Whose sample it is.
        factors: [N, M] of each group, the bias left out.
        columns: Boolean [M] of each group, the outputs of which errors count; None: all.
        status: "sampled", "largest kept", "kept whole" or "assumption fails".
    """

    method: str
    factors: tuple[Tensor, ...]
    status: str
    columns: tuple[Tensor, ...] | None = None
    kind: ClassVar[str] = "reweight"

    def solve(self, problems: Sequence[Problem], options: Options, watch: Watch) -> tuple[Answer, ...]:
        """The products, and what they miss."""
        return tuple(self._answer(problem, group, options) for group, problem in enumerate(problems))

    def _answer(self, problem: Problem, group: int, options: Options) -> Answer:
        began, rows = time.perf_counter(), problem.rows
        F, U = self.factors[group].to(problem.stored.device), problem.stored[:rows]
        stored = torch.cat([(U * F).to(U.dtype), problem.stored[rows:]])
        wrong, right = self._errors(problem, group)
        solution = unproven(stored, problem, self.method, time.perf_counter() - began, options)
        answer = Answer.of(solution, stored, problem, self.status)
        return replace(answer, error=math.sqrt(wrong), size=math.sqrt(right))

    def _errors(self, problem: Problem, group: int) -> tuple[float, float]:
        if problem.X is None:
            return math.nan, math.nan
        F, U = self.factors[group].to(problem.stored.device), problem.stored[: problem.rows]
        if self.columns is not None:
            F, U = F[:, self.columns[group]], U[:, self.columns[group]]
        return squared_errors(problem.inputs[:, : problem.rows], U, F)

    def judge(self, answers: Sequence[Answer], problems: Sequence[Problem], options: Options) -> tuple[Answer, ...]:
        """The products and their errors anew; other weights than these have a status that says so."""
        again = self.solve(problems, options, Watch())
        return tuple(
            replace(new, status=old.status if torch.equal(new.stored, old.stored) else f"not {old.status}")
            for new, old in zip(again, answers, strict=True)
        )

    def near(self, recorded: object) -> bool:
        """Only the same factors will do."""
        return False

    def to_dict(self) -> dict[str, object]:
        """The method, and the factors by their digest."""
        digest = hashlib.sha256()
        for factors in self.factors:
            digest.update(factors.double().contiguous().cpu().numpy().tobytes())
        return {"kind": self.kind, "method": self.method, "factors": digest.hexdigest()[:16]}

    def __str__(self) -> str:
        return f"sample of {self.method}"


def squared_errors(X: Tensor, U: Tensor, F: Tensor) -> tuple[float, float]:
    """‖X(F∘U) − XU‖² and ‖XU‖²; half precision is computed with in single."""
    dtype, wrong, right = working_dtype(X.dtype), 0.0, 0.0
    before, change = U.to(dtype), ((F - 1) * U).to(dtype)
    for first in range(0, len(X), _ROWS):
        block = X[first : first + _ROWS].to(dtype)
        wrong += float(norm(block @ change)) ** 2
        right += float(norm(block @ before)) ** 2
    return wrong, right


@dataclass(eq=False)
class _Driver:
    """What neurons and weights have in common."""

    method: Sampling
    run: Run
    target: Target
    rng: np.random.Generator

    @property
    def name(self) -> str:
        """The method's, in small letters."""
        return type(self.method).__name__.lower()

    def guarantee(self, name: str) -> Guarantee | None:
        """What is to be proven of a layer; None if its size is given."""
        if not isinstance(self.target, Guarantee):
            return None
        return replace(self.target, value=value_of(self.target, name))  # type: ignore[arg-type]

    def figures(
        self,
        found: Sequence[Sensitivities],
        choices: Sequence[Choice],
        guarantee: Guarantee | None,
        kept: int,
        total: int,
        notes: Sequence[str],
    ) -> dict[str, object]:
        """Of a row."""
        assumptions = found[0].assumptions(guarantee)
        own: dict[str, object] = {"items": self.method.items, "kept_items": kept, "all_items": total}
        own |= {"sampling": choices[0].sampling, "draws": sum(int(choice.draws.sum()) for choice in choices)}
        own |= {"promise": found[0].promise, "assumptions": assumptions, "terms": _terms(found)}
        if guarantee is not None:
            own["guarantee"] = (guarantee.eps, guarantee.delta)
        return own | {"notes": (*found[0].notes, *notes) if guarantee is None else tuple(notes)}

    def status(self, found: Sensitivities, choices: Sequence[Choice], guarantee: Guarantee | None) -> str:
        """Of a row."""
        if guarantee is None:
            return "sampled" if choices[0].sampling != "top" else "largest kept"
        if all(bool(choice.whole.all()) for choice in choices):
            return "kept whole"
        fails = any(assumption.holds is False for assumption in found.assumptions(guarantee))
        return "assumption fails" if fails else "sampled"

    def uniform_error(
        self, views: Sequence[View], counts: Sequence[int], products: Sequence[Sequence[Product]]
    ) -> float:
        """The mean error of uniform samples of so many items of each view; NaN if it was not wanted."""
        if not self.run.options.baseline or any(p.inputs is None for group in products for p in group):
            return math.nan
        from convexprune.pruners.uniform import Uniform

        uniform = Uniform(self.method.items)
        found = [uniform.sensitivities(view) for view in views]
        [rng] = self.rng.spawn(1)  # so that a baseline changes no sample
        errors = []
        for _ in range(_BASELINES):
            wrong = right = 0.0
            for s, count, group in zip(found, counts, products, strict=True):
                factors = choose(uniform, s, count, rng).factors
                for product in group:
                    F = _spread(factors, product)
                    assert product.inputs is not None  # noqa: S101 - looked at above
                    missed, size = squared_errors(product.inputs, product.weights, F)
                    wrong, right = wrong + missed, right + size
            errors.append(math.sqrt(wrong / (right or 1.0)))
        return sum(errors) / len(errors)


def _spread(factors: Tensor, product: Product) -> Tensor:
    """The factors of a product's weights: a weight's own, or a neuron's for all its rows."""
    if factors.numel() == product.weights.numel():
        return factors.reshape(product.weights.shape)
    return factors[0].repeat_interleave(len(product.weights) // factors.shape[1])[:, None]


def _terms(found: Sequence[Sensitivities]) -> dict[str, float]:
    """Of a layer: those of its first group, with the sensitivities of all."""
    terms = found[0].terms
    return terms | {"S": sum(one.terms["S"] for one in found)} if "S" in terms else terms


def without_share(items: str, s: Tensor, factors: Tensor, sampled: bool) -> tuple[str, ...]:
    """That items of sensitivity 0 went where every other one stays, so that there was room for them."""
    gone = int(((s == 0) & (factors == 0)).sum())
    if not gone or bool(((s > 0) & (factors == 0)).any()):
        return ()
    where = " on this sample" if sampled else ""
    return (f"{gone:,} of {s.numel():,} {items} have no share in any output{where}, and went",)


class _Weights(_Driver):
    """Single weights of every layer, rescaled; biases stay."""

    def prune(self) -> None:
        """Score all layers, in the order in which the network calls them, then sample and write one by one."""
        run = self.run
        groups = {name: layer.groups for name, layer in run.layers.items()}
        flat = iter(self.method.of_layers(view for name in groups for view in self._views(name)))
        found = {name: [next(flat) for _ in range(count)] for name, count in groups.items()}
        chosen = [name for name in run.layers if name not in run.left]
        sizes = self._sizes(found, chosen)
        goals: dict[str, Goal] = {}
        for name in chosen:
            guarantee = self.guarantee(name)
            choices = [choose(self.method, s, size, self.rng) for s, size in zip(found[name], sizes[name], strict=True)]
            biased = has_bias(run.layers[name].module)
            weights = [W[: len(W) - biased] for W in run.trained[name]]
            F = tuple(of_weights(c.factors, U) for c, U in zip(choices, weights, strict=True))
            status = self.status(found[name][0], choices, guarantee)
            goals[name] = Reweight(self.name, F, status)
            live = [
                torch.cat([of_weights(v, U)[U != 0] for v, U in zip(values, weights, strict=True)])
                for values in ([s.values for s in found[name]], [c.factors for c in choices])
            ]
            notes = without_share("nonzero weights", live[0], live[1], self.method.needs_data)
            kept = [int((f * U).to(U.dtype).count_nonzero()) for f, U in zip(F, weights, strict=True)]
            total = sum(U.numel() for U in weights)
            own = self.figures(found[name], choices, guarantee, sum(kept), total, notes)
            if run.options.baseline:
                views = list(self._views(name))
                own["uniform_error"] = self.uniform_error(views, kept, [[view.product] for view in views])
            run.extra[name] = own
        run.prune(goals)
        self._check_network(found)

    def _views(self, name: str) -> Iterable[WeightView]:
        """One for each group of a convolution, with its inputs; without the ones that carry the bias."""
        for problem in self.run.problems(name):
            biased, rows = problem.biased, problem.rows
            X = None if problem.X is None else problem.inputs[:, :rows]
            product = Product(problem.stored[:rows], X, problem.positions, problem.kernel)
            yield WeightView(name, product, problem.activation, biased and bool(problem.stored[rows:].any()))

    def _sizes(
        self, found: Mapping[str, Sequence[Sensitivities]], chosen: Sequence[str]
    ) -> Mapping[str, Sequence[Tensor | Guarantee]]:
        layers, target = self.run.layers, self.target
        if isinstance(target, Guarantee):
            return {name: [self.guarantee(name) or target] * layers[name].groups for name in chosen}
        if isinstance(target, Sparsity) and target.scope == "network":
            budget = items_kept(target.value, sum(layers[name].weights for name in chosen))
            shared = iter(shared_sizes(self.method, [s for name in chosen for s in found[name]], _total, budget))
            return {name: [next(shared) for _ in found[name]] for name in chosen}
        return {
            name: shared_sizes(
                self.method, found[name], _total, items_kept(value_of(target, name), layers[name].weights)
            )
            for name in chosen
        }

    def _check_network(self, found: Mapping[str, Sequence[Sensitivities]]) -> None:
        """What a promise about the network needs of all its layers; those that are not pruned are whole."""
        run = self.run
        run.terms |= {name: _terms(groups) for name, groups in found.items()}
        if not self.method.whole_network or not isinstance(self.target, Guarantee):
            return
        rows = {name: run.row(name) for name in run.written}
        for name, row in rows.items():
            assert row.guarantee is not None  # noqa: S101 - all have one
            holds = all(_no_weaker(other.guarantee, row.guarantee) or _is_whole(other) for other in rows.values())
            text = "every layer has a guarantee that is no weaker, or is kept whole"
            run.extra[name]["assumptions"] = (*row.assumptions, Assumption(text, holds))
            if not holds:
                run.extra[name]["status"] = "assumption fails"


def _no_weaker(one: tuple[float, float] | None, other: tuple[float, float]) -> bool:
    return one is not None and one[0] <= other[0] and one[1] <= other[1]


def _is_whole(row: object) -> bool:
    return row.nonzeros == row.nonzeros_before and row.output_error == 0  # type: ignore[attr-defined, no-any-return]


def _total(sizes: Sequence[Tensor]) -> int:
    return sum(int(size.sum()) for size in sizes)


class _Neurons(_Driver):
    """Neurons of every link; those that stay are rescaled where their outputs are used."""

    def prune(self) -> None:
        """Link after link: a layer is scored with the inputs that are left to it, or top-down with the outputs."""
        run, sizes = self.run, self._sizes()
        ordered = list(run.links.values())
        chosen: dict[str, list[int]] = {}
        for link in ordered if run.options.order == "bottom-up" else ordered[::-1]:
            kept = self._sample(link, sizes, chosen)
            if kept is None:
                run.restore_()
                return
            chosen[link.producer] = kept
        run.kept_neurons = chosen

    def _sizes(self) -> Mapping[str, Tensor | int | Guarantee]:
        run, target = self.run, self.target
        if isinstance(target, Guarantee):
            return {name: self.guarantee(name) or target for name in run.links}
        if isinstance(target, Neurons) and target.scope == "network":
            return self._shared(target)
        return {name: items_kept(value_of(target, name), width) for name, width in run.widths().items()}

    def _shared(self, target: Neurons) -> dict[str, Tensor | int | Guarantee]:
        """One budget of weights, split over the layers by the method, from the whole network's sensitivities."""
        run = self.run
        links = list(run.links.values())
        names = {name for link in links for name in (link.producer, *link.consumers)}
        weights = {n: m.get_parameter("weight") for n, m in run.model.named_modules() if n in names}
        feeding = {consumer: number for number, link in enumerate(links) for consumer in link.consumers}
        numbers = {link.producer: number for number, link in enumerate(links)}

        def cost(sizes: Sequence[Tensor]) -> int:
            part = [int(size.sum()) / len(weights[link.producer]) for size, link in zip(sizes, links, strict=True)]
            return round(
                sum(
                    w.numel()
                    * (part[numbers[name]] if name in numbers else 1)
                    * (part[feeding[name]] if name in feeding else 1)
                    for name, w in weights.items()
                )
            )

        found = self.method.of_layers(self._view(link) for link in links)
        budget = items_kept(target.value, sum(weight.numel() for weight in weights.values()))
        return dict(zip(run.links, shared_sizes(self.method, found, cost, budget), strict=True))

    def _sample(
        self, link: Link, sizes: Mapping[str, Tensor | int | Guarantee], chosen: Mapping[str, Sequence[int]]
    ) -> list[int] | None:
        """The neurons of a link that stay, once its consumers are reweighted; None where the run was stopped."""
        began, run, size = time.perf_counter(), self.run, sizes[link.producer]
        run.progress(link.producer, len(chosen), len(run.links))
        view = self._view(link)
        [found] = self.method.of_layers([view])
        choice = choose(self.method, found, size, self.rng)
        factors = choice.factors
        if not bool((factors > 0).any()):  # no neuron adds anything; a layer needs one all the same
            factors = factors.clone().index_fill_(1, torch.tensor([0], device=factors.device), 1.0)
        kept = (factors[0] > 0).nonzero()[:, 0].tolist()
        guarantee = size if isinstance(size, Guarantee) else None
        notes = without_share("neurons", found.values, factors, self.method.needs_data)
        own = self.figures([found], [choice], guarantee, len(kept), len(view.incoming), notes)
        own |= {"uniform_error": self.uniform_error([view], [len(kept)], [view.products])}
        wrong = right = 0.0
        status = self.status(found, [choice], guarantee)
        for name, product in zip(link.consumers, view.products, strict=True):
            F = _spread(factors, product).expand_as(product.weights)
            columns = torch.ones(F.shape[1], dtype=torch.bool)
            if name in chosen:
                columns[:] = False
                columns[list(chosen[name])] = True
            answers = run.answer(name, Reweight(self.name, (F.contiguous(),), status, (columns,)))
            if answers is None:
                return None
            run.write_(name, answers, Reweight(self.name, (F,), status))
            wrong, right = wrong + answers[0].error ** 2, right + answers[0].size ** 2
        own |= {"output_error": math.sqrt(wrong / (right or 1.0)), "status": status}
        samples = view.products[0].inputs
        own |= {"seconds": time.perf_counter() - began, "samples": 0 if samples is None else len(samples)}
        run.extra[link.producer] = own
        return kept

    def _view(self, link: Link) -> NeuronView:
        """The producer's neurons with the weights as they are now; inputs as the original network computes them."""
        products = []
        for name in link.consumers:
            [problem] = self.run.problems(name)
            now = self.run.layers[name].read()[0][: problem.rows]
            X = None if problem.X is None else problem.inputs[:, : problem.rows]
            products.append(Product(now, X, problem.positions, problem.kernel))
        incoming = _incoming(self.run.model, link)
        return NeuronView(link.producer, incoming, link.activation, tuple(products), self._reach(link.producer))

    def _reach(self, name: str) -> float | None:
        """The largest √(‖x‖² + 1) over a layer's inputs; None if there are none."""
        if self.run.data is None or name not in self.run.layers:
            return None
        [problem] = self.run.problems(name)
        longest = torch.linalg.vector_norm(problem.inputs, dim=1, dtype=torch.float64).max()
        return math.hypot(float(longest), not problem.biased)


def _incoming(model: nn.Module, link: Link) -> Tensor:
    """(w_i, b_i) [n, d + 1], in float64, as batch norms on the way scale and shift them.

    Raises:
        NonFinite: What a norm makes of a weight is NaN or infinite.
    """
    layer = model.get_submodule(link.producer)
    [U] = weight_matrices(layer)
    W = U.T.to(torch.float64)
    W = W if has_bias(layer) else torch.cat([W, W.new_zeros(len(W), 1)], dim=1)
    for name in link.norms:
        norm_ = model.get_submodule(name)
        tensors = dict(norm_.named_parameters(recurse=False)) | dict(norm_.named_buffers(recurse=False))
        found = {key: tensor.detach().to(W) for key, tensor in tensors.items()}
        ones = W.new_ones(len(W))
        gain = (found.get("running_var", ones) + float(norm_.eps)).rsqrt() * found.get("weight", ones)  # type: ignore[arg-type]
        shift = found.get("bias", 0 * ones) - gain * found.get("running_mean", 0 * ones)
        if not (gain.isfinite() & shift.isfinite()).all():
            raise NonFinite(f"{name}: its statistics, weight or bias make NaN or infinity: load or train it again")
        W = W * gain[:, None]
        W[:, -1] += shift
    return W
