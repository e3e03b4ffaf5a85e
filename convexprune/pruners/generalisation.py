"""What the size of a pruned network says of its errors on data that nobody has seen.

Two bounds, side by side. The published one for networks that CoreNet can compress (Baykal et al., ICLR 2019, corollary;
recalled, its constants and logarithms unknown) is given factor by factor, with the term that they make up, for what it
grows with; it bounds nothing as it stands. The description length of the pruned network bounds its error with every
constant (Occam's razor: Blumer, Ehrenfeucht, Haussler and Warmuth 1987, with Hoeffding's inequality): a network of b
bits in a prefix code that was fixed before the data errs with probability at most R̂ + √((b·ln 2 + ln(1/δ))/(2n)), for
all networks at once, with probability 1 − δ over n independent training samples on which R̂ of its answers are wrong.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from convexprune.solvers.arrays import as_matrix, checked_count, checked_positive
from convexprune.solvers.errors import InvalidInput, ShapeMismatch
from convexprune.targets import Guarantee

_EXACT = 4096  # up to here binomials are computed as whole numbers


@dataclass(frozen=True)
class CodedLayer:
    """A pruned layer, and what CoreNet's theory says of it.

    Attributes:
        weights: How many it had.
        kept: How many of them it keeps.
        others: Its biases, and whatever else is stored with it.
        S: The sum of its weights' sensitivities, in all groups.
        Delta: Δ̂^ℓ of the layer alone.
    """

    weights: int
    kept: int
    others: int
    S: float
    Delta: float

    def bits(self, per_value: int = 32) -> int:
        """Of its code, which says where it ends: how many weights are kept, which, and every value.

        Which, by ⌈log₂ (weights choose kept)⌉; of a large layer perhaps a bit more, for what logarithms are rounded by.
        """
        n, k = self.weights, self.kept
        if n <= _EXACT:
            which = (math.comb(n, k) - 1).bit_length()
        else:
            whole = math.lgamma(n + 1) * (1 + 1e-14)
            which = math.ceil((whole - math.lgamma(k + 1) - math.lgamma(n - k + 1)) / math.log(2))
        return n.bit_length() + which + per_value * (k + self.others)


@dataclass(frozen=True)
class GeneralisationBound:
    """Both bounds, with all that enters into them.

    Attributes:
        samples: n, of the training data.
        layers: L, the network's layers of neurons, the inputs among them.
        margin: γ.
        margin_loss: The part of the samples that the original network does not get right by more than γ.
        largest_output: max ‖f(x)‖₂ of the original network.
        onwards: Δ̂^{ℓ→} for each layer of weights.
        sensitivities: Σ S for each layer of weights.
        complexity: √(max ‖f‖²·L²·Σ(Δ̂^{ℓ→})²S^ℓ/(γ²n)); the published bound is margin_loss + Õ(complexity).
        training_error: The part of the samples that the pruned network gets wrong.
        bits: Of the pruned network's code.
        delta: The probability with which the bound may fail.
        bound: Of the pruned network's error on new data: with all constants.
    """

    samples: int
    layers: int
    margin: float
    margin_loss: float
    largest_output: float
    onwards: tuple[float, ...]
    sensitivities: tuple[float, ...]
    complexity: float
    training_error: float
    bits: int
    delta: float
    bound: float

    @property
    def kept(self) -> bool:
        """Nothing was promised that might not hold."""
        return True

    @property
    def vacuous(self) -> bool:
        """Whether the bound says nothing: every network errs with probability at most 1."""
        return self.bound >= 1

    def to_dict(self) -> dict[str, object]:
        """Plain data, for JSON."""
        return asdict(self) | {"vacuous": self.vacuous}

    def __str__(self) -> str:
        reach = "vacuous: it is no less than 1" if self.vacuous else f"with probability {1 - self.delta:g}"
        onwards, sums = (", ".join(f"{value:.3g}" for value in values) for values in (self.onwards, self.sensitivities))
        return (
            f"description length: error ≤ {self.training_error:.4g} + {self.bound - self.training_error:.4g} = "
            f"{self.bound:.4g} ({reach}), from {self.bits:,} bits and {self.samples:,} samples\n"
            f"CoreNet, recalled, without constants and logarithms: error ≤ {self.margin_loss:.4g} + "
            f"Õ({self.complexity:.3g}), from γ = {self.margin:g}, max ‖f‖ = {self.largest_output:.4g}, "
            f"L = {self.layers}, Δ̂→ = [{onwards}], S = [{sums}]"
        )


def generalisation_terms(
    original: Tensor,
    pruned: Tensor,
    labels: Tensor,
    layers: Sequence[CodedLayer],
    margin: float,
    delta: float = 0.05,
    bits_per_value: int = 32,
) -> GeneralisationBound:
    """Both bounds for a classifier, from its outputs on the training data.

    Args:
        original: [n, classes], outputs of the network before it was pruned.
        pruned: [n, classes], of the pruned one.
        labels: [n] whole numbers.
        layers: All layers of weights, from the input on, unpruned ones with kept = weights.
        margin: γ > 0, chosen before looking.
        delta: The probability with which the bound may fail.
        bits_per_value: Of each value that is stored.

    Raises:
        ShapeMismatch: Outputs or labels that do not fit together.
        InvalidInput, InvalidTolerance: A label that is no class, or numbers out of their range.
    """
    Guarantee(checked_positive("margin", margin), delta).checked()  # looks at delta
    onwards = tuple(math.prod(layer.Delta for layer in layers[first:]) for first in range(len(layers)))
    largest = float(torch.linalg.vector_norm(as_matrix("original", original), dim=1, dtype=torch.float64).max())
    error, n = margin_loss(pruned, labels, 0.0), len(labels)
    bits = sum(layer.bits(checked_count("bits_per_value", bits_per_value)) for layer in layers)
    terms = sum(reach * reach * layer.S for reach, layer in zip(onwards, layers, strict=True))
    return GeneralisationBound(
        samples=n,
        layers=len(layers) + 1,
        margin=float(margin),
        margin_loss=margin_loss(original, labels, margin),
        largest_output=largest,
        onwards=onwards,
        sensitivities=tuple(layer.S for layer in layers),
        complexity=largest * (len(layers) + 1) / margin * math.sqrt(terms / n),
        training_error=error,
        bits=bits,
        delta=delta,
        bound=error + math.sqrt((bits * math.log(2) + math.log(1 / delta)) / (2 * n)),
    )


def margin_loss(outputs: Tensor, labels: Tensor, margin: float) -> float:
    """The part of the samples of which the true class's output is not above all others by more than the margin.

    Raises:
        ShapeMismatch: Not one label for each row of outputs [n, classes], or a single class.
        InvalidInput: A label that is no class.
    """
    scores = as_matrix("outputs", outputs).detach().to(torch.float64)
    n, classes = scores.shape
    if tuple(labels.shape) != (n,) or classes < 2:
        raise ShapeMismatch(
            f"expected [n, classes] outputs of two classes or more and [n] labels, found {list(scores.shape)} and "
            f"{list(labels.shape)}"
        )
    if labels.is_floating_point() or bool(((labels < 0) | (labels >= classes)).any()):
        raise InvalidInput(f"labels: expected whole numbers from 0 to {classes - 1}")
    index = labels.to(scores.device, torch.int64)[:, None]
    others = scores.scatter(1, index, -math.inf).amax(1)
    return float((scores.gather(1, index)[:, 0] <= others + margin).to(torch.float64).mean())
