"""Names of ``convexprune.network.memory`` for packages that still import them from here."""

from convexprune.network import memory

tensors_in = memory.tensors_in
