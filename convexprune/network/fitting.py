"""Names of ``convexprune.network.calibration`` for packages that still import them from here."""

from convexprune.network import calibration

Fitting = calibration.Fitting
fitted = calibration.fitted
