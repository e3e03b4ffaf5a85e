"""Names of ``convexprune.network.choosing`` for packages that still import them from here."""

from convexprune.network import choosing

Ties = choosing.Ties
find_ties = choosing.find_ties
layer_uses = choosing.layer_uses
