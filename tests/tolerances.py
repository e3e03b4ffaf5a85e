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

HULL_TOTAL = 1e-12
"""The total weight, relative."""

HULL_MEAN = 1e-10
"""Means, coordinate by coordinate: of the largest distance from the mean among the points that carry weight."""

HULL_TARGET = 1e-11
"""Targets reached, in half-widths of the points: inside is decided at 1e-12·√d, d ≤ 12."""

HULL_STORED = 1e-14
"""And of the target's own size: stored in float64 it may be outside of a flat hull by a few times 2⁻⁵³·√d of it."""

HULL_OUTSIDE = 1e-10
"""Targets this far outside, in half-widths, are refused: the others are inside, within rounding of the hull."""

HULL_MARGIN = 1e-2
"""How much less than the distance to the hull a margin may be: the search stops there."""

ELLIPSOID = 1e-8
"""The gap that tight ellipsoids are solved to; what is far away has no more digits."""

FAR = 1e-8
"""Coordinates of 1e7 are rounded to 1e-9 of the points' spread; a norm adds up a few of them."""

ELLIPSOID_CONDITION = 1e-7
"""The same gap from the points' own coordinates, with condition numbers up to 1e9, and from orthonormal ones."""

ELLIPSOID_VOLUME = 1e-7
"""The log-volumes of two tight ellipsoids, of a gap of 1e-8 each."""

ELLIPSOID_SHAPE = 1e-4
"""Axes, shapes and centres: the square root of the gap that they are solved to."""

ELLIPSOID_CONIC = 5e-7
"""Log-volumes of a conic solver at its own tolerance of 1e-9, and of gaps of 1e-8: each is within 1e-7."""

RANK_ONE = 1e-9
"""Leverages after thousands of rank-one updates, relative; they start afresh beyond 1e-8."""

INTERIOR = 1e-9
"""The gap that the interior-point method reaches on any set."""

FAR_RATIO = 1e-7
"""Ratios of points at 1e7 times their spread: products are rounded to 1e-9 of it, the span to a few times that."""

SINGLE_RATIO = 1e-5
"""Ratios of float32 points of low rank: rounding makes points leave the span that they are judged in by 1e-7."""

MAX_NORM = 1e-6
"""The default tolerance of the ellipsoid: what factors of the same points may differ by."""

DRAWN_IN = 2e-9
"""The ends of axes are drawn in by 1e-9, for which the factor pays."""

LEWIS_FIXED = 1e-8
"""τ_i = w_i and Σw = r: ten times what the iteration stops at by default."""

LEWIS_FAR = 1e-6
"""Leverages of points at 1e7 times their spread, relative: coordinates have 1e-9 of it, their squares twice, powers."""

LEWIS_SINGLE = 1e-4
"""Leverages of float32 points, relative: the least of a cloud with an outlier are known to its rounding of 1e-7."""

CHANGED = 1e-6
"""What a neuron's random new weights change at least in the outputs while it is connected."""

HALF = 2e-2
"""The same in bfloat16, whose numbers have three digits."""

BISECTED = 1e-9
"""A probability min(1, c·s) whose c was found here by 200 halvings of a range of 60 decades."""

LINEAR_PROGRAM = 1e-6
"""A linear program's value, at that solver's own tolerance."""

OUTPUTS = 1e-10
"""Outputs of two float64 networks whose sums differ by zeros only, or in their order; relative to the largest."""

HAND = 1e-9
"""An error computed here from a masked float64 layer."""

ALLOCATION = 1e-4
"""An interior-point solver's sizes against the optimality conditions', relative to the largest."""
