"""Names of ``convexprune.network.weights`` for packages that still import them from here."""

from convexprune.network import weights

mask_neurons_ = weights.mask_neurons_
remove_neurons_ = weights.remove_neurons_
resize_ = weights.resize_
restoring = weights.restoring
