"""What sparsity buys: bytes, multiplications and time, measured, and where it buys nothing.

A zero in a dense tensor is still stored and multiplied. It pays in a format or a kernel that leaves zeros out, and
there only beyond some sparsity; neurons that are gone pay everywhere.
"""

from convexprune.costs.flops import Flops, WeightFlops, flops
from convexprune.costs.latency import Latency, latency
from convexprune.costs.storage import Storage, WeightStorage, storage
from convexprune.costs.timing import LayerLatency

__all__ = [
    "Flops",
    "Latency",
    "LayerLatency",
    "Storage",
    "WeightFlops",
    "WeightStorage",
    "flops",
    "latency",
    "storage",
]
