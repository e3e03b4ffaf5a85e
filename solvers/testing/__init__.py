"""A conformance kit for solvers, the problem zoo that it runs on, and checks of one's own fits and penalties.

>>> from convexprune.solvers import testing
>>> report = testing.check("admm", testing.zoo.representative())  # doctest: +SKIP
>>> report.raise_if_failed()  # doctest: +SKIP
"""

from convexprune.solvers.testing import zoo
from convexprune.solvers.testing.contract import ConformanceReport, NotConforming, Result
from convexprune.solvers.testing.fits import check_fit
from convexprune.solvers.testing.kit import Candidate, Check, check, checks
from convexprune.solvers.testing.penalties import check_penalty
from convexprune.solvers.testing.zoo import Member

__all__ = [
    "Candidate",
    "Check",
    "ConformanceReport",
    "Member",
    "NotConforming",
    "Result",
    "check",
    "check_fit",
    "check_penalty",
    "checks",
    "zoo",
]
