"""Names of ``convexprune.network.taps`` for packages that still import them from here."""

from convexprune.network import taps

Trial = taps.Trial
generator = taps.generator
read_beyond_relu = taps.read_beyond_relu
rounding = taps.rounding
