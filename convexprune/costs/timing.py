"""Times of works that take turns, and of a layer's dense product against its CSR product."""

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn import functional

from convexprune.costs.shared import density
from convexprune.layers import input_matrices, unsupported, weight_matrices


@dataclass(frozen=True)
class LayerLatency:
    """Seconds of one layer's product with the batch that reaches it, alone; medians.

    Attributes:
        name: Qualified module name.
        density: The part of the matrix's entries that are not zero; a bias is part of it.
        dense: Dense product, in the faster of the two layouts of the batch.
        csr: Product with the matrix as ``torch.sparse_csr``.
    """

    name: str
    density: float
    dense: float
    csr: float


def not_compared(module: nn.Module) -> str | None:
    """Why the module's product is not compared; None if it can be."""
    if reason := unsupported(module):
        return reason
    if not isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return "its product is compared for Linear and convolutions only"
    return "a grouped convolution is many small products" if getattr(module, "groups", 1) != 1 else None


def layer_latency(name: str, layer: nn.Module, inputs: Tensor, repeats: int) -> LayerLatency | str:
    """The layer's times on its inputs, or why torch has no CSR product for it."""
    (X,), (U,) = input_matrices(layer, inputs), weight_matrices(layer)
    A, X = U.mT.contiguous(), X.to(U).contiguous()
    right = X.mT.contiguous()  # what suits the CSR product
    try:
        sparse = _as_csr(A)
        # A gain must be one over the faster of the dense layouts.
        layouts = [partial(functional.linear, X, A), partial(torch.matmul, A, right)]
        *dense, csr = seconds([*layouts, partial(torch.matmul, sparse, right)], repeats, A.device)
    except torch.cuda.OutOfMemoryError:
        raise
    except RuntimeError as error:
        return f"torch has no CSR product for {A.dtype} on {A.device.type} ({str(error).splitlines()[0]})"
    return LayerLatency(name, density(A), min(dense), csr)


def seconds(works: Sequence[Callable[[], object]], repeats: int, device: torch.device) -> list[float]:
    """Median time of each; they take turns, so that what else the machine does hits all alike."""
    times: list[list[float]] = [[] for _ in works]
    for turn in range(repeats + 1):
        for work, taken in zip(works, times, strict=True):
            _wait(device)
            began = time.perf_counter()
            work()
            _wait(device)
            if turn:  # the first one warms up
                taken.append(time.perf_counter() - began)
    return [median(taken) for taken in times]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _as_csr(A: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        return A.to_sparse_csr()
