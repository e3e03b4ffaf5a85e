"""What a pruned model's zeros buy on this machine: bytes by format, and latency of its largest layer.

python benchmarks/storage.py DENSE.safetensors PRUNED.safetensors
"""

import gzip
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from safetensors.torch import load_file

REPEATS = 50


def milliseconds(work: Callable[[], object]) -> float:
    """Median of repeated calls."""
    work()
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return 1e3 * median(times)


def main() -> None:
    dense, pruned = Path(sys.argv[1]), Path(sys.argv[2])
    matrices = [tensor.flatten(1) for tensor in load_file(pruned).values() if tensor.ndim >= 2]
    warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
    csr = sum(8 * int(A.count_nonzero()) + 4 * (len(A) + 1) for A in matrices)
    print(f"weights                 {sum(A.numel() for A in matrices):>12,}")
    print(f"nonzeros                {sum(int(A.count_nonzero()) for A in matrices):>12,}")
    print(f"file, dense model       {dense.stat().st_size:>12,} bytes")
    print(f"file, pruned model      {pruned.stat().st_size:>12,} bytes")
    print(f"gzip, dense model       {len(gzip.compress(dense.read_bytes())):>12,} bytes")
    print(f"gzip, pruned model      {len(gzip.compress(pruned.read_bytes())):>12,} bytes")
    print(f"CSR, 32-bit indices     {csr:>12,} bytes")
    A = max(matrices, key=torch.numel)
    sparse = A.to_sparse_csr()
    for batch in (1, 256):
        x = torch.rand(A.shape[1], batch)
        fast, slow = milliseconds(lambda x=x: A @ x), milliseconds(lambda x=x: sparse @ x)
        print(f"largest layer {list(A.shape)}, batch {batch}: dense {fast:.3f} ms, CSR {slow:.3f} ms")


if __name__ == "__main__":
    main()
