"""What sparsity buys: bytes, multiplications and time, measured, and where it buys nothing.

A zero in a dense tensor is still stored and multiplied. It pays in a format or a kernel that leaves zeros out, and
there only beyond some sparsity; neurons that are gone pay everywhere.
"""

from convexprune.costs.counts import Flops, Storage, WeightFlops, WeightStorage, accuracy, flops, storage
from convexprune.costs.latency import Latency, LayerLatency, latency

__all__ = [
    "Flops",
    "Latency",
    "LayerLatency",
    "Storage",
    "WeightFlops",
    "WeightStorage",
    "accuracy",
    "flops",
    "latency",
    "storage",
]
