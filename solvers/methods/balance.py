"""Penalty parameters that follow the residuals."""

import math
from dataclasses import dataclass, field

_TINY = 1e-30


@dataclass
class PenaltyParameter:
    """The penalty parameter of one constraint, and its relative residuals since it was last reviewed."""

    weight: float
    precision: float = 2.0**-52  # what arithmetic rounds to, relative
    primal: float = math.inf  # ‖constraint‖ relative to the larger of its two sides
    change: float = math.inf  # weight·‖change of the splitting variable‖ relative to the multiplier
    imbalance: list[float] = field(default_factory=list)  # ½ log(primal/change)
    share: float = 1.0  # the scaled dual relative to the larger side
    bounded: bool = False  # whether the last review asked for more than the precision allows

    def measure(self, side: float, apart: float, moved: float, dual: float) -> None:
        """Norms of the constraint's larger side, of the constraint, of the change, and of the scaled dual."""
        self.share = dual / max(side, _TINY)
        self.primal, self.change = apart / max(side, _TINY), moved / max(dual, _TINY)
        primal, change = (math.log(min(max(value, _TINY), 1 / _TINY)) for value in (self.primal, self.change))
        self.imbalance.append(0.5 * (primal - change))

    def rebalance(self, threshold: float, lead: float = 1.0) -> float:
        """Change the parameter if it is out of balance by more than the threshold; the factor, 1 if it stays.

        The scaled dual, which shrinks by that factor, and the side of the constraint that it is added to are kept
        within a factor of 1/√precision of each other: the sum holds half of the digits of either.
        """
        mean = sum(self.imbalance) / len(self.imbalance) + math.log(lead)
        self.imbalance.clear()
        self.bounded = False
        if abs(mean) <= threshold:
            return 1.0
        half = math.sqrt(self.precision)
        wanted = math.exp(min(max(mean, math.log(0.2)), math.log(5.0)))
        factor = min(max(wanted, min(1.0, self.share * half)), max(1.0, self.share / half))
        self.bounded = factor != wanted
        self.weight *= factor
        return factor
