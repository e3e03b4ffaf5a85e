"""Figures from outputs: what a classifier predicts, how well its confidence is calibrated, how alike two networks are.

What is averaged comes as sums, which add up over batches, so that no more than a batch of outputs is ever kept.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from convexprune.solvers.arrays import working_dtype

BINS = 15
"""Of the calibration error, as in Guo et al. 2017, section 5."""


@dataclass(frozen=True, eq=False)
class Predictions:
    """What a classifier says of n samples.

    Attributes:
        probabilities: The softmax of its outputs [n, classes].
        classes: Those with the largest outputs [n].
        confidence: The probabilities of these [n].
    """

    probabilities: Tensor
    classes: Tensor
    confidence: Tensor

    @classmethod
    def of(cls, logits: Tensor) -> "Predictions":
        """Those of outputs [n, classes], on the CPU."""
        logits = logits.detach().to("cpu", working_dtype(logits.dtype))
        probabilities, classes = logits.softmax(1), logits.argmax(1)
        return cls(probabilities, classes, probabilities.gather(1, classes[:, None])[:, 0])


def agreement(one: Predictions, other: Predictions) -> Tensor:
    """Whether both predict the same class [n] (Liebenwein et al. 2021, section 4)."""
    return one.classes == other.classes


def distance(one: Predictions, other: Predictions) -> Tensor:
    """‖p − q‖₂ of the softmax outputs p and q [n] (Liebenwein et al. 2021, section 4)."""
    return (one.probabilities - other.probabilities).square().sum(1).sqrt()


def likeness_sums(one: Predictions, other: Predictions) -> Tensor:
    """The number of samples, of those on which both agree, and the sum of the distances: [3], float64."""
    same, apart = agreement(one, other), distance(one, other)
    return torch.stack([torch.ones(len(same)).double().sum(), same.double().sum(), apart.double().sum()])


def calibration_sums(confidence: Tensor, right: Tensor, bins: int = BINS) -> Tensor:
    """Of each bin the number of samples, the sum of their confidence, and how many are right: [bins, 3], float64.

    Bin m of M holds confidences in ((m − 1)/M, m/M].
    """
    places = ((confidence.double() * bins).ceil().long() - 1).clamp(0, bins - 1)
    columns = torch.stack([torch.ones(len(right)).double(), confidence.double(), right.double()], dim=1)
    return torch.zeros(bins, 3, dtype=torch.float64).index_add_(0, places, columns)


def calibration_error(sums: Tensor) -> float:
    """The expected calibration error Σ_m (n_m/n)·|accuracy_m − confidence_m| (Guo et al. 2017, equation 3).

    Args:
        sums: As ``calibration_sums`` gives, those of several batches added up.
    """
    return float((sums[:, 2] - sums[:, 1]).abs().sum() / sums[:, 0].sum())


def class_sums(labels: Tensor, right: Tensor, classes: int) -> Tensor:
    """Of each class the number of samples, and how many are right: [2, classes], float64."""
    return torch.stack([torch.bincount(of, minlength=classes) for of in (labels, labels[right])]).double()


def mistake_sums(said: Predictions, labels: Tensor, parent: Predictions) -> Tensor:
    """Of the parent's mistakes their number, how many the other has right, and its confidence there: [3], float64."""
    missed = parent.classes != labels
    right = said.classes[missed] == labels[missed]
    return torch.stack([missed.double().sum(), right.double().sum(), said.confidence[missed].double().sum()])
