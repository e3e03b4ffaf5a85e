"""Every tolerance of the solver layer's tests, with its reason. All are relative unless they say otherwise."""

ROUNDING = 1e-9
"""Two float64 computations of the same number in another order."""

EXACT = 1e-12
"""One float64 formula against another, no sums longer than a few hundred terms."""

ITERATES = 1e-10
"""The published iterates against another transcription, after 20 iterations."""

AGREEMENT = 1e-4
"""Certified values of different solvers, each solved to the default gap of 1e-4."""

FEASIBLE = 1e-5
"""The default violation that solve accepts; a point outside by this much may undercut the bound by as much."""

TIGHT = 1e-8
"""Gap and violation that reference solutions are solved to."""

OPTIMUM = 1e-7
"""What a bound may exceed a tight solution's value by: the violation of that solution, priced by its multipliers."""

KKT = 1e-3
"""Optimality conditions at a gap of 1e-8: they hold to a few times the square root of the gap."""

REFERENCE = 1e-6
"""A conic solver's optimal value and its multipliers, at that solver's own tight settings."""

SINGLE = 1e-3
"""float32 iterations against float64 ones at the default gap, and data rounded to half precision."""
