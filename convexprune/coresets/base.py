"""What the coreset methods share: what they see of a layer, what they say of its items, how sizes become samples."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from convexprune.coresets.allocation import Allowed, proportional
from convexprune.coresets.sampling import Sampling, whole_draws
from convexprune.report.report import Assumption
from convexprune.solvers.arrays import as_number
from convexprune.solvers.errors import InvalidInput, InvalidTolerance

Items = Literal["neurons", "edges"]


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
class Neurons:
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
class Edges:
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


@dataclass(frozen=True)
class Guarantee:
    """A size asked for by what is to be proved: error eps with probability at least 1 − delta.

    Raises:
        InvalidTolerance: eps is not between 1e-100 and 1e100, or delta not between 1e-200 and 1: beyond, formulas for
            draws would leave float64.
    """

    eps: float
    delta: float

    def __post_init__(self) -> None:
        if not 1e-100 <= as_number("eps", self.eps) <= 1e100:
            raise InvalidTolerance(f"eps: expected a number > 0, from 1e-100 to 1e100, found {self.eps}")
        if not 1e-200 <= as_number("delta", self.delta) < 1:
            raise InvalidTolerance(f"delta: expected a probability between 0 and 1, from 1e-200 on, found {self.delta}")


@dataclass(frozen=True, eq=False)
class Scores:
    """What a method says of a layer's items, in groups that are sampled apart from each other.

    Attributes:
        sensitivities: s [G, n] ≥ 0; an item of sensitivity 0 may go. Neurons are one group; a layer's weights are one,
            [1, N·M], or those of each output and sign apart, as ``by_sign`` has them.
        draws: (eps, delta) ↦ how many draws [G] the guarantee asks for.
        promise: The guarantee in words, for any eps and delta.
        assumptions: What it rests on: for the guarantee, or without one (None), where a method's own delta stands in.
        notes: What else a reader should know, such as that here the method is uniform sampling.
        kept: [n] items that are kept for certain where they are fewer than the size; None for none.
        top: Sizes [G] ↦ the groups [G] that keep so many of their largest items, whatever the sampling; None: none do.
        shares: [G] > 0, how a budget is to be split over groups; None: evenly by items.
        terms: Figures of the theory by name, for the report.
    """

    sensitivities: Tensor
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
        return (self.sensitivities > 0).sum(1)


def expect_neurons(layer: Neurons | Edges, method: str) -> Neurons:
    """The layer, if it is one.

    Raises:
        InvalidInput: The method was given single weights.
    """
    if not isinstance(layer, Neurons):
        raise InvalidInput(f"{method} chooses neurons, and was given the single weights of {layer.name!r}")
    return layer


def expect_edges(layer: Neurons | Edges, method: str) -> Edges:
    """The layer, if it is one, with inputs.

    Raises:
        InvalidInput: The method was given neurons, or no inputs.
    """
    if not isinstance(layer, Edges):
        raise InvalidInput(f"{method} chooses single weights, and was given the neurons of {layer.name!r}")
    if layer.product.inputs is None:
        raise InvalidInput(
            f"{method} needs a sample of the inputs of {layer.name!r}: give calibration data that reach it"
        )
    return layer


def by_sign(U: Tensor) -> Tensor:
    """|U| [2M, N] of weights U [N, M]: the positive ones of each output, then the negative ones; 0 elsewhere."""
    return torch.cat([U.T.clamp(min=0), (-U.T).clamp(min=0)])


def of_edges(factors: Tensor, U: Tensor) -> Tensor:
    """[N, M] of factors of U's entries: [1, N·M], or [2M, N] in groups as those of ``by_sign``."""
    if len(factors) == 1:
        return factors.reshape(U.shape)
    positive, negative = factors.T.chunk(2, dim=1)
    return torch.where(U > 0, positive, torch.where(U < 0, negative, 0.0))


class Method:
    """Base of the pruners, frozen dataclasses whose fields are their options.

    Write ``scores``, or ``score`` where layers hang together.
    """

    needs_inputs: ClassVar[bool] = False
    """Whether it has nothing to say without data."""

    whole_network: ClassVar[bool] = False
    """Whether its promise is about the network: all layers are scored, whichever are pruned."""

    @property
    def items(self) -> Items:
        """Whether it keeps or removes neurons, or single weights."""
        raise NotImplementedError

    @property
    def sampling(self) -> Sampling:
        """How; see ``SAMPLINGS``. A guarantee is met by draws all the same."""
        raise NotImplementedError

    def scores(self, layer: Neurons | Edges) -> Scores:
        """Sensitivities of one layer's items, and what they prove."""
        raise NotImplementedError

    def score(self, layers: Sequence[Neurons | Edges]) -> list[Scores]:
        """The scores of all layers of a network, or of some, from the input on."""
        return [self.scores(layer) for layer in layers]

    def allocate(self, layers: Sequence[Scores], allowed: Allowed) -> list[Tensor]:
        """How many items [G] of each layer to keep, as many as are allowed; in proportion to their shares."""
        return proportional(layers, allowed)


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
