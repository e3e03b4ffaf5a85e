"""Times on this machine: each layer's product, dense and sparse, and the whole model before and after."""

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn import functional

from convexprune.costs.counts import Costs, density, permanent
from convexprune.layers import input_matrices, unsupported, weight_matrices
from convexprune.layers.memory import samples_of, tensors_in
from convexprune.network.calibration import as_batches
from convexprune.network.forwards import Forward, call_model, copy_for, evaluating, run_model
from convexprune.network.taps import Received, check_received, tap, tapped
from convexprune.report.report import SkippedModule
from convexprune.solvers.arrays import checked_count
from convexprune.solvers.methods.solve import environment

_SCATTER = 0.1  # what such medians differ by from one measurement to the next


@dataclass(frozen=True)
class LayerLatency:
    """Median seconds of one layer's product with the batch that reaches it, dense and as ``torch.sparse_csr``."""

    name: str  # of the module
    density: float  # the part of the matrix's entries that are not zero; a bias is part of it
    dense: float  # in the faster of the two layouts of the batch
    csr: float


@dataclass(frozen=True)
class Latency(Costs):
    """Median seconds on this machine: a row for each Linear or convolution, and one forward of the model, dense.

    Of a convolution it is the im2col product, without the unfolding; ``dense`` and ``csr`` are of all layers' products.
    ``skipped`` are modules with weights whose products were not compared, each with the reason; ``provenance`` has
    dtype, device, threads and versions.
    """

    layers: tuple[LayerLatency, ...]
    skipped: tuple[SkippedModule, ...]
    model: float
    before: float | None  # of the model before it was pruned
    samples: int
    repeats: int  # timed runs of each
    provenance: Mapping[str, object] = field(default_factory=dict)
    dense: float = field(init=False)
    csr: float = field(init=False)

    def __post_init__(self) -> None:
        vars(self).update(dense=sum(row.dense for row in self.layers), csr=sum(row.csr for row in self.layers))

    def verdict(self) -> str:
        """Whether anything is faster, a sentence a comparison; differences below a tenth count as none."""
        lines = []
        for row in self.layers:
            at = f"the dense one at {100 * row.density:.0f} % density"
            lines.append(_pace(row.name or "The layer", "the CSR product", row.csr, row.dense, at))
        if self.before is not None:
            lines.append(_pace("The model", "its forward", self.model, self.before, "that of the model before"))
        return " ".join(lines) or "Nothing was compared: there is no CSR product of a layer, and no model before."


def latency(
    model: nn.Module,
    batch: object,
    *,
    before: nn.Module | None = None,
    repeats: int = 20,
    forward: Forward | None = None,
) -> Latency:
    """Time each layer's dense product against its CSR product, and the whole model, in eval mode; models stay as found.

    Runs of what is compared take turns, after one that is not counted; on CUDA each is waited for.

    Args:
        model: The network, masked or not; masks are made permanent in a copy.
        batch: As in ``flops``.
        before: The network before it was pruned.
        repeats: Timed runs.
        forward: As in ``flops``.

    Raises:
        InvalidTolerance: ``repeats`` is not a whole number above 0.
        InvalidInput, UnsupportedModule, EmptyCalibration, NonFinite: As in ``flops``; weights must be finite, too.
    """
    runs, checked = checked_count("repeats", repeats), as_batches([batch])[0]
    models = [permanent(one) for one in (model, before) if one is not None]
    layers, skipped = _layers(models[0], checked, runs, forward)
    data = next(models[0].parameters(), torch.empty(0))
    with evaluating(models[0]), evaluating(models[-1]):
        calls = [partial(call_model, one, copy_for(one, checked), forward) for one in models]
        now, *then = _seconds(calls, runs, data.device)
    old = then[0] if then else None
    return Latency(tuple(layers), tuple(skipped), now, old, samples_of(checked), runs, environment(data))


def _layers(
    model: nn.Module, batch: object, repeats: int, forward: Forward | None
) -> tuple[list[LayerLatency], list[SkippedModule]]:
    """The times of each layer that can be compared, and the other modules with weights, each with the reason."""
    weighted = {
        name: one for name, one in model.named_modules() if any(own.dim() >= 2 for own in one.parameters(recurse=False))
    }
    uncalled = "its forward was not called on the batch, so its inputs are not known"
    found: dict[str, LayerLatency | str] = {name: _not_compared(one) or uncalled for name, one in weighted.items()}
    inputs: dict[str, Tensor] = {}

    def keep(name: str, received: Received) -> None:
        check_received(name, received)
        if name not in inputs:  # a copy, for later operations may work in place
            inputs[name] = next(tensors_in(received)).detach().clone()

    with evaluating(model), tapped({name: [tap(model, name)] for name, why in found.items() if why == uncalled}, keep):
        run_model(model, batch, forward)
    found |= {name: _layer_latency(name, weighted[name], received, repeats) for name, received in inputs.items()}
    skipped = [
        SkippedModule(name, type(weighted[name]).__name__, why) for name, why in found.items() if isinstance(why, str)
    ]
    return [row for row in found.values() if isinstance(row, LayerLatency)], skipped


def _not_compared(module: nn.Module) -> str | None:
    """Why the module's product is not compared; None if it can be."""
    if reason := unsupported(module):
        return reason
    if not isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return "its product is compared for Linear and convolutions only"
    return "a grouped convolution is many small products" if getattr(module, "groups", 1) != 1 else None


def _layer_latency(name: str, layer: nn.Module, inputs: Tensor, repeats: int) -> LayerLatency | str:
    """The layer's times on its inputs, or why torch has no CSR product for it."""
    (X,), (U,) = input_matrices(layer, inputs), weight_matrices(layer)
    A, X = U.mT.contiguous(), X.to(U).contiguous()
    right = X.mT.contiguous()  # what suits the CSR product
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
            sparse = A.to_sparse_csr()
        # A gain must be one over the faster of the dense layouts.
        layouts = [partial(functional.linear, X, A), partial(torch.matmul, A, right)]
        *dense, csr = _seconds([*layouts, partial(torch.matmul, sparse, right)], repeats, A.device)
    except torch.cuda.OutOfMemoryError:
        raise
    except RuntimeError as error:
        return f"torch has no CSR product for {A.dtype} on {A.device.type} ({str(error).splitlines()[0]})"
    return LayerLatency(name, density(A), min(dense), csr)


def _seconds(works: Sequence[Callable[[], object]], repeats: int, device: torch.device) -> list[float]:
    """Median time of each; they take turns, so that what else the machine does hits all alike."""
    wait: Callable[[], None] = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None

    def timed(work: Callable[[], object]) -> float:
        wait()
        began = time.perf_counter()
        work()
        wait()
        return time.perf_counter() - began

    turns = [[timed(work) for work in works] for _ in range(repeats + 1)]
    return [median(taken) for taken in zip(*turns[1:], strict=True)]  # the first turn warms up


def _pace(what: str, product: str, now: float, before: float, than: str) -> str:
    ratio = now / before
    outcome = "no faster" if ratio > 1 - _SCATTER else "faster"
    return f"{what}: {outcome}, {product} takes {ratio:.2f} times {than} ({1e3 * now:.3f} ms, {1e3 * before:.3f} ms)."
