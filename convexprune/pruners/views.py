"""What methods that sample see of a network, what they say of it, and the weights that a sample makes of a layer's."""

import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import ClassVar, TypeVar

import torch
from torch import Tensor, nn

from convexprune.layers import weight_matrices
from convexprune.network.links import Link
from convexprune.options import Options
from convexprune.report.report import Assumption
from convexprune.runs.answer import Answer, Goal, unproven
from convexprune.runs.layer import has_bias
from convexprune.runs.problem import Problem, StoppingRule
from convexprune.solvers.arrays import norm, working_dtype
from convexprune.solvers.errors import InvalidInput, NonFinite
from convexprune.targets import Guarantee

_ROWS = 65536  # of X that a product is computed with at a time
MOST_DRAWS = 2**40  # draws of a group: totals fit an int64, and no layer has so many items


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

    @classmethod
    def of(cls, problem: Problem, weights: Tensor | None = None) -> "Product":
        """That of these or the trained weights, without the row and the column of the bias."""
        X = None if problem.X is None else problem.inputs[:, : problem.rows]
        U = problem.stored if weights is None else weights
        return cls(U[: problem.rows], X, problem.positions, problem.kernel)

    def squared_errors(self, F: Tensor) -> tuple[float, float]:
        """‖X(F∘U) − XU‖² and ‖XU‖² for factors F [N, M] or [N, 1], in single precision at least; NaN without inputs."""
        if self.inputs is None:
            return math.nan, math.nan
        dtype, wrong, right = working_dtype(self.inputs.dtype), 0.0, 0.0
        before, change = self.weights.to(dtype), ((F - 1) * self.weights).to(dtype)
        for X in torch.split(self.inputs, _ROWS):
            wrong += float(norm(X.to(dtype) @ change)) ** 2
            right += float(norm(X.to(dtype) @ before)) ** 2
        return wrong, right


@dataclass(frozen=True, eq=False)
class NeuronView:
    """A layer's n neurons (or filters) and the layers that take their outputs.

    Attributes:
        name: Of the layer.
        incoming: p_i = (w_i, b_i) [n, d + 1], a batch norm on the way folded in: neuron i computes φ(p_iᵀ(x, 1)).
        activation: φ by name; None for none.
        products: One for each consumer; rows i·repeat to (i + 1)·repeat − 1 of U belong to neuron i.
        measure: Gives ``reach``.
    """

    name: str
    incoming: Tensor
    activation: str | None
    products: tuple[Product, ...]
    measure: Callable[[], float | None] = lambda: None
    items: ClassVar[str] = "neurons"

    @cached_property
    def reach(self) -> float | None:
        """The largest √(‖x‖² + 1) over the layer's inputs x, by a pass over the data; None if there are none."""
        return self.measure()

    def uniform(self) -> Tensor:
        """Sensitivities [1, n] that are all alike."""
        return torch.ones(1, len(self.incoming), dtype=torch.float64, device=self.incoming.device)

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
    items: ClassVar[str] = "single weights"

    @property
    def products(self) -> tuple[Product, ...]:
        """The only one."""
        return (self.product,)

    def uniform(self) -> Tensor:
        """Sensitivities [1, N·M] that are alike for all weights that are not 0."""
        return (self.product.weights != 0).to(torch.float64).reshape(1, -1)


View = NeuronView | WeightView
V = TypeVar("V", NeuronView, WeightView)


def view_of(kind: type[V], view: View, method: str) -> V:
    """The view, if it is of this kind.

    Raises:
        InvalidInput: The method was given the other items.
    """
    if not isinstance(view, kind):
        raise InvalidInput(f"{method} chooses {kind.items}, and was given the {view.items} of {view.name!r}")
    return view


def proves_nothing(guarantee: Guarantee) -> Tensor:
    """The draws of a method without a theorem.

    Raises:
        InvalidInput: Always.
    """
    raise InvalidInput(f"the method proves nothing, so {guarantee} means nothing to it: give a count or a part")


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
    draws: Callable[[Guarantee], Tensor] = proves_nothing
    promise: str = "nothing"
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


def whole_draws(m: Tensor) -> Tensor:
    """⌈m⌉ [G], but no more than 2^40 each."""
    return m.ceil().clamp(max=MOST_DRAWS).to("cpu", torch.int64)


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


def incoming_of(model: nn.Module, link: Link) -> Tensor:
    """(w_i, b_i) [n, d + 1], in float64, as batch norms on the way scale and shift them.

    Of layers whose outputs are combined, those of all side by side, and norms, which may be one layer's, do not count.

    Raises:
        NonFinite: What a norm makes of a weight is NaN or infinite.
    """
    parts = []
    for layer in map(model.get_submodule, link.producers):
        [U] = weight_matrices(layer)
        parts += [U.T.to(torch.float64)] + ([] if has_bias(layer) else [U.new_zeros(U.shape[1], 1).to(torch.float64)])
    W = torch.cat(parts, dim=1)
    for name in () if link.partners or link.along else link.norms:
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


@dataclass(frozen=True, eq=False)
class Reweight(Goal):
    """Trained weights times factors, group by group; what a factor of 0 belongs to goes.

    Attributes:
        method: Whose sample it is.
        factors: [N, M] of each group, the bias left out.
        status: "sampled", "largest kept", "kept whole" or "assumption fails".
        columns: Boolean [M], the outputs of which errors count; None: all.
    """

    method: str
    factors: tuple[Tensor, ...]
    status: str
    columns: Tensor | None = None
    kind: ClassVar[str] = "reweight"

    def solve(self, problems: Sequence[Problem], options: Options, watch: StoppingRule) -> tuple[Answer, ...]:
        """The products, and what they miss."""
        return tuple(self._answer(*pair, options) for pair in zip(problems, self.factors, strict=True))

    def _answer(self, problem: Problem, F: Tensor, options: Options) -> Answer:
        began, F = time.perf_counter(), F.to(problem.stored.device)
        product = Product.of(problem)
        stored = torch.cat([(product.weights * F).to(problem.stored), problem.stored[problem.rows :]])
        if self.columns is not None:
            product, F = replace(product, weights=product.weights[:, self.columns]), F[:, self.columns]
        wrong, right = map(math.sqrt, product.squared_errors(F))
        seconds = time.perf_counter() - began
        return unproven(stored, problem, self.method, seconds, options, self.status, error=wrong, size=right)

    def judge(self, answers: Sequence[Answer], problems: Sequence[Problem], options: Options) -> tuple[Answer, ...]:
        """The products and their errors anew; other weights than these have a status that says so."""
        again = self.solve(problems, options, StoppingRule())
        return tuple(
            replace(new, status=old.status if torch.equal(new.stored, old.stored) else f"not {old.status}")
            for new, old in zip(again, answers, strict=True)
        )

    def near(self, recorded: Mapping[str, object]) -> None:
        """Only the same factors will do."""

    def to_dict(self) -> dict[str, object]:
        """The method, and the factors by their digest."""
        digest = hashlib.sha256()
        for factors in self.factors:
            digest.update(factors.double().contiguous().cpu().numpy().tobytes())
        return {"kind": self.kind, "method": self.method, "factors": digest.hexdigest()[:16]}

    def __str__(self) -> str:
        return f"sample of {self.method}"
