"""What methods that sample see of a network, what they say of it, and the weights that a sample makes of a layer's."""

import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import ClassVar, Literal

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

Items = Literal["neurons", "weights"]

_ROWS = 65536  # of X that a product is computed with at a time
_NO_NEURONS = torch.empty(0, 0)


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
class View:
    """A layer's n neurons (or filters) and the layers that take their outputs; or its own weights, one by one.

    Attributes:
        name: Of the layer.
        products: Of neurons one for each consumer; rows i·repeat to (i + 1)·repeat − 1 of U belong to neuron i. Of
            weights their own, U [N, M] with a column for each output; the bias is kept as it is.
        activation: φ, what follows the layer, by name; None for none.
        incoming: p_i = (w_i, b_i) [n, d + 1], a batch norm on the way folded in: neuron i computes φ(p_iᵀ(x, 1)).
            Without rows where single weights are chosen.
        biased: Whether a layer whose weights are chosen has a bias that is not all 0.
        guarantee: What is to be proven of a sample; None where nothing is.
        measure: Gives ``reach``.
    """

    name: str
    products: tuple[Product, ...]
    activation: str | None
    incoming: Tensor = _NO_NEURONS
    biased: bool = False
    guarantee: Guarantee | None = None
    measure: Callable[[], float | None] = lambda: None

    def check(self, items: Items) -> None:
        """Look whether it is of these items.

        Raises:
            InvalidInput: A method was given the other ones.
        """
        own: Items = "neurons" if len(self.incoming) else "weights"
        if own != items:
            raise InvalidInput(f"a method that chooses {items} was given the {own} of {self.name!r}")

    @property
    def inputs(self) -> list[Tensor]:
        """X [P, N] of each product.

        Raises:
            InvalidInput: There are none.
        """
        inputs = [product.inputs for product in self.products if product.inputs is not None]
        if len(inputs) < len(self.products):
            raise InvalidInput(
                f"layer {self.name!r}: shares of an output need a sample of inputs: give calibration data that reach it"
            )
        return inputs

    @cached_property
    def reach(self) -> float | None:
        """The largest √(‖x‖² + 1) over the layer's inputs x, by a pass over the data; None if there are none."""
        return self.measure()

    @property
    def uniform(self) -> Tensor:
        """Sensitivities that are alike for all neurons [1, n], or for all weights [1, N·M] that are not 0."""
        if len(self.incoming):
            return torch.ones(1, len(self.incoming), dtype=torch.float64, device=self.incoming.device)
        return (self.products[0].weights != 0).to(torch.float64).reshape(1, -1)

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
class Sensitivities:
    """What a method says of a layer's items, in groups that are sampled apart from each other.

    Attributes:
        values: s [G, n] ≥ 0; an item of sensitivity 0 may go. Neurons are one group; a layer's weights are one,
            [1, N·M], or those of each output and sign apart, as ``by_sign`` has them.
        draws: How many [G] the view's guarantee needs; None where there is no guarantee, or the method proves nothing.
        promise: The guarantee in words, for any eps and delta.
        assumptions: What it rests on; without a guarantee a method's own delta stands in.
        notes: What else a reader should know, such as that here the method is uniform sampling.
        kept: [n] items that are kept for certain where they are fewer than the size; None for none.
        top: Sizes [G] ↦ the groups [G] that keep so many of their largest items, whatever the sampling; None: none do.
        shares: [G] > 0, how a budget is to be split over groups; None: evenly by items.
        terms: Figures of the theory by name, for the report.
    """

    values: Tensor
    draws: Tensor | None = None
    promise: str = "nothing"
    assumptions: tuple[Assumption, ...] = ()
    notes: tuple[str, ...] = ()
    kept: Tensor | None = None
    top: Callable[[Tensor], Tensor] | None = None
    shares: Tensor | None = None
    terms: dict[str, float] = field(default_factory=dict)

    @cached_property
    def candidates(self) -> Tensor:
        """How many items [G] have a sensitivity, on the CPU."""
        return (self.values > 0).sum(1).cpu()

    @cached_property
    def parts(self) -> Tensor:
        """How a budget is split over groups [G], in float64 on the CPU."""
        parts = self.candidates if self.shares is None else self.shares
        return parts.detach().to("cpu", torch.float64)


def by_sign(U: Tensor) -> Tensor:
    """|U| [2M, N] of weights U [N, M]: the positive ones of each output, then the negative ones; 0 elsewhere."""
    return torch.cat([U.T.clamp(min=0), (-U.T).clamp(min=0)])


def spread(factors: Tensor, U: Tensor) -> Tensor:
    """Factors of U's entries [N, M], of weights [1, N·M] or [2M, N] as ``by_sign`` has them, or of neurons [1, n]."""
    if factors.numel() == 2 * U.numel():
        positive, negative = factors.T.chunk(2, dim=1)
        return torch.where(U > 0, positive, torch.where(U < 0, negative, 0.0))
    if factors.numel() == U.numel():
        return factors.reshape(U.shape)
    return factors[0].repeat_interleave(len(U) // factors.shape[1])[:, None].expand_as(U)


def incoming_of(model: nn.Module, link: Link) -> Tensor:
    """(w_i, b_i) [n, d + 1], in float64, as batch norms on the way scale and shift them.

    Of layers whose outputs are combined, those of all side by side, and norms, which may be one layer's, do not count.

    Raises:
        NonFinite: What a norm makes of a weight is NaN or infinite.
    """
    parts = []
    for layer in map(model.get_submodule, link.producers):
        weight = layer.get_parameter("weight")
        # What takes a link without neurons has no weights.
        inner = weight_matrices(layer)[0][: weight[0].numel()].mT if weight.numel() else weight.detach().flatten(1)
        bias = layer.get_parameter("bias").detach() if has_bias(layer) else weight.new_zeros(len(weight))
        parts.append(torch.cat([inner, bias[:, None]], 1).to(torch.float64))
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
        answers = []
        for problem, factors in zip(problems, self.factors, strict=True):
            began, product, F = time.perf_counter(), Product.of(problem), factors.to(problem.stored.device)
            stored = torch.cat([(product.weights * F).to(problem.stored), problem.stored[problem.rows :]])
            if self.columns is not None:
                product, F = replace(product, weights=product.weights[:, self.columns]), F[:, self.columns]
            wrong, right = map(math.sqrt, product.squared_errors(F))
            own = self.method, time.perf_counter() - began, options, self.status
            answers.append(unproven(stored, problem, *own, error=wrong, size=right))
        return tuple(answers)

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
