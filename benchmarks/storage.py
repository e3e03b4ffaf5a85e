"""What a pruned model's zeros buy on this machine: bytes by format, and latency of its largest layer.

python benchmarks/storage.py DENSE.safetensors PRUNED.safetensors
"""

import sys

import torch
from torch import Tensor, nn

from convexprune.costs import latency, storage
from convexprune.files.weights import load_weights

REPEATS = 50


def linear(A: Tensor) -> nn.Linear:
    """The layer whose weights are A."""
    layer = nn.Linear(A.shape[1], len(A), bias=False)
    layer.weight = nn.Parameter(A)
    return layer


def main() -> None:
    weights = load_weights(sys.argv[2])
    dense, pruned = storage(load_weights(sys.argv[1])), storage(weights)
    print(f"weights                 {pruned.entries:>12,}")
    print(f"nonzeros                {pruned.nonzeros:>12,}")
    print(f"file, dense model       {dense.file:>12,} bytes")
    print(f"file, pruned model      {pruned.file:>12,} bytes")
    print(f"gzip, dense model       {dense.gzip:>12,} bytes")
    print(f"gzip, pruned model      {pruned.gzip:>12,} bytes")
    print(f"CSR, 32-bit indices     {pruned.csr:>12,} bytes")
    if pruned.two_four is not None:
        print(f"2:4 where it holds      {pruned.two_four:>12,} bytes")
    A = max((tensor.flatten(1) for tensor in weights.values() if tensor.ndim >= 2), key=torch.numel)
    for batch in (1, 256):
        row = latency(linear(A), torch.rand(batch, A.shape[1]), repeats=REPEATS).layers[0]
        times = f"dense {1e3 * row.dense:.3f} ms, CSR {1e3 * row.csr:.3f} ms"
        print(f"largest layer {list(A.shape)}, batch {batch}: {times}")


if __name__ == "__main__":
    main()
