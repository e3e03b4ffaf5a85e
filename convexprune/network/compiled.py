"""Names of ``convexprune.network.forwards`` for packages that still import them from here."""

from convexprune.network import forwards

uncompiled = forwards.uncompiled
