"""A network's figures on one distribution, from batches that come one after the other."""

import torch
from torch import Tensor

from convexprune.evaluation.distributions import Distribution
from convexprune.evaluation.measures import (
    Predictions,
    calibration_error,
    calibration_sums,
    class_sums,
    likeness_sums,
    mistake_sums,
)
from convexprune.evaluation.networks import Answer
from convexprune.evaluation.outcomes import Outcomes
from convexprune.evaluation.rows import DistributionRow, NoiseRow


class Tally:
    """Sums over samples, and an outcome for each: outputs are not kept."""

    def __init__(self) -> None:
        self._samples = 0
        self._outcomes: list[Tensor] = []
        self._sums: dict[str, Tensor] = {}

    def add(self, answer: Answer, labels: Tensor | None, parent: Predictions | None) -> None:
        """A batch: what the network answers, its true labels, if they are known, and what the parent says."""
        self._samples += answer.shape[0]
        said, truth = answer.said, None if labels is None else labels.cpu().long()
        right = said.classes == truth if said is not None and truth is not None else None
        if answer.scores is not None:
            self._outcomes.append(answer.scores)
        elif right is not None:
            self._outcomes.append(right)
        if said is not None and right is not None and truth is not None:
            self._add("calibration", calibration_sums(said.confidence, right))
            self._add("classes", class_sums(truth, right, answer.shape[1]))
            if parent is not None:
                self._add("mistakes", mistake_sums(said, truth, parent))
        if said is not None and parent is not None:
            self._add("likeness", likeness_sums(said, parent))

    def row(self, distribution: Distribution) -> DistributionRow:
        """The figures of all batches."""
        sums, outcomes = self._sums, torch.cat(self._outcomes) if self._outcomes else None
        counts, right = sums.get("classes", torch.zeros(2, 0))
        _, same, apart = _means(sums.get("likeness"))
        mistakes, right_on_mistakes, confidence = _means(sums.get("mistakes"))
        return DistributionRow(
            distribution.name,
            distribution.severity,
            distribution.category,
            self._samples,
            score=None if outcomes is None else float(outcomes.double().mean()),
            classes=tuple(r / n if n else None for n, r in zip(counts.tolist(), right.tolist(), strict=True)) or None,
            calibration_error=calibration_error(sums["calibration"]) if "calibration" in sums else None,
            agreement=same,
            distance=apart,
            mistakes=None if mistakes is None else int(mistakes),
            accuracy_on_mistakes=right_on_mistakes,
            confidence_on_mistakes=confidence,
            outcomes=None if outcomes is None else Outcomes.of(outcomes),
        )

    def noise_row(self, radius: float) -> NoiseRow:
        """How like the parent the network is in all batches, and how good."""
        _, same, apart = self._sums["likeness"].tolist()
        outcomes = torch.cat(self._outcomes) if self._outcomes else None
        score = None if outcomes is None else float(outcomes.double().mean())
        kept = None if outcomes is None else Outcomes.of(outcomes)
        return NoiseRow(radius, self._samples, same / self._samples, apart / self._samples, score, kept)

    def _add(self, name: str, sums: Tensor) -> None:
        self._sums[name] = self._sums[name] + sums if name in self._sums else sums


def _means(sums: Tensor | None) -> tuple[float | None, ...]:
    """A number of samples, and the means over these of what was summed; None where there are none."""
    if sums is None:
        return None, None, None
    count, *totals = sums.tolist()
    return (count, *(total / count if count else None for total in totals))
