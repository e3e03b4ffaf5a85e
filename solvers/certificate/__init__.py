"""Certificates: what weights and multipliers prove about a program, whatever solver proposed them."""

from convexprune.solvers.certificate.certificate import Certificate, certify
from convexprune.solvers.certificate.guarantees import make_feasible, proven_zeros, support_bounds
from convexprune.solvers.certificate.solution import Solution, Status

__all__ = [
    "Certificate",
    "Solution",
    "Status",
    "certify",
    "make_feasible",
    "proven_zeros",
    "support_bounds",
]
