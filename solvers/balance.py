"""Penalty parameters that follow the residuals."""

import math
from dataclasses import dataclass, field

__all__ = ["PenaltyParameter"]

_TINY = 1e-30


@dataclass
class PenaltyParameter:
    """The penalty parameter of one constraint, and its relative residuals since it was last reviewed."""

    weight: float
    primal: float = math.inf  # ‖constraint‖ relative to the larger of its two sides
    change: float = math.inf  # weight·‖change of the splitting variable‖ relative to the multiplier
    imbalance: list[float] = field(default_factory=list)  # ½ log(primal/change)

    def measure(self, side: float, apart: float, moved: float, dual: float) -> None:
        """Norms of the constraint's larger side, of the constraint, of the change, and of the scaled dual."""
        self.primal, self.change = apart / max(side, _TINY), moved / max(dual, _TINY)
        self.imbalance.append(0.5 * math.log(max(self.primal, _TINY) / max(self.change, _TINY)))

    def rebalance(self, threshold: float, lead: float = 1.0) -> float:
        """Change the parameter if it is out of balance by more than the threshold; the factor, 1 if it stays."""
        mean = sum(self.imbalance) / len(self.imbalance) + math.log(lead)
        self.imbalance.clear()
        if abs(mean) <= threshold:
            return 1.0
        factor = min(max(math.exp(mean), 0.2), 5.0)
        self.weight *= factor
        return factor
