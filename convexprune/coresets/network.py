"""A network's layers as the coreset methods see them, and what they chose put back into the network."""

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from convexprune.coresets.base import Edges, Neurons, Product
from convexprune.layers import weight_matrices
from convexprune.network.capture import LayerCapture
from convexprune.network.links import Link
from convexprune.solvers.arrays import norm, working_dtype
from convexprune.solvers.errors import NonFinite

Seen = Mapping[str, LayerCapture]
"""What each layer saw; empty if there are no data."""


def neurons_of(model: nn.Module, link: Link, seen: Seen, reach: float | None) -> Neurons:
    """The producer's neurons with the weights as they are now; inputs as they were captured.

    Raises:
        NonFinite: A weight, or what a norm on the way makes of it, is NaN or infinite.
    """
    products = tuple(_product(model.get_submodule(name), seen.get(name)) for name in link.consumers)
    return Neurons(link.producer, _incoming(model, link), link.activation, products, reach)


def reach_of_inputs(layer: nn.Module, seen: LayerCapture | None) -> float | None:
    """The largest √(‖x‖² + 1) over a layer's inputs; None if there are none."""
    if seen is None:
        return None
    found = (matrices[0] for matrices in seen.matrices(layer))
    lengths = [torch.linalg.vector_norm(X, dim=1, dtype=torch.float64).max() for X in found if len(X)]
    return math.hypot(float(torch.stack(lengths).max()), layer.bias is None)


def edges_of(name: str, layer: nn.Module, seen: LayerCapture | None) -> list[Edges]:
    """The layer's weights: one for each group of a convolution."""
    inputs = None if seen is None else _inputs(layer, seen)
    weights = [_without_bias(layer, U) for U in weight_matrices(layer)]
    activation = None if seen is None else seen.activation
    biased = layer.bias is not None and bool(layer.get_parameter("bias").any())
    return [
        Edges(name, _as_product(layer, U, None if inputs is None else inputs[group], seen), activation, biased)
        for group, U in enumerate(weights)
    ]


def product_error(products: Iterable[Product], factors: Sequence[Tensor]) -> float:
    """‖X(F∘U) − XU‖_F/‖XU‖_F over all products, F the factors of each [N, M]; NaN without inputs.

    Half precision is computed with in single. Where XU is 0, the error is not relative to it.
    """
    wrong, right = 0.0, 0.0
    for product, F in zip(products, factors, strict=True):
        X, U = product.inputs, product.weights
        if X is None:
            return math.nan
        dtype = working_dtype(X.dtype)
        before, change = U.to(dtype), ((F - 1) * U).to(dtype)
        for first in range(0, len(X), _ROWS):
            block = X[first : first + _ROWS].to(dtype)
            wrong += float(norm(block @ change)) ** 2
            right += float(norm(block @ before)) ** 2
    return math.sqrt(wrong / (right or 1.0))


_ROWS = 65536


def _product(layer: nn.Module, seen: LayerCapture | None) -> Product:
    [U] = weight_matrices(layer)
    return _as_product(layer, _without_bias(layer, U), None if seen is None else _inputs(layer, seen)[0], seen)


def _as_product(layer: nn.Module, U: Tensor, X: Tensor | None, seen: LayerCapture | None) -> Product:
    """XU with the positions of a sample (1 where samples differ in size) and of a channel's kernel."""
    kernel = layer.get_parameter("weight")[0, 0].numel()
    if X is None or seen is None or isinstance(layer, nn.Linear):
        return Product(U, X, 1, kernel)
    samples = sum(len(tensor) if tensor.ndim == 4 else 1 for tensor in seen.inputs)
    same = len({tensor.shape[-2:] for tensor in seen.inputs}) == 1 and not any(
        rows is not None for counts in seen.counts for rows in counts
    )
    return Product(U, X, len(X) // samples if same else 1, kernel)


def _without_bias(layer: nn.Module, U: Tensor) -> Tensor:
    return U if layer.bias is None else U[:-1]


def _inputs(layer: nn.Module, seen: LayerCapture) -> list[Tensor]:
    """X of each group, without the ones that carry the bias."""
    parts = seen.matrices(layer)
    joined = [torch.cat(group) for group in zip(*parts, strict=True)]
    return joined if layer.bias is None else [X[:, :-1] for X in joined]


def _incoming(model: nn.Module, link: Link) -> Tensor:
    """(w_i, b_i) [n, d + 1], in float64, as batch norms on the way scale and shift them."""
    layer = model.get_submodule(link.producer)
    [U] = weight_matrices(layer)
    W = U.T.to(torch.float64)
    W = W if layer.bias is not None else torch.cat([W, W.new_zeros(len(W), 1)], dim=1)
    for name in link.norms:
        gain, shift = _affine(model.get_submodule(name), W)
        if not (gain.isfinite() & shift.isfinite()).all():
            raise NonFinite(f"{name}: its statistics, weight or bias make NaN or infinity: load or train it again")
        W = W * gain[:, None]
        W[:, -1] += shift
    return W


def _affine(norm: nn.Module, W: Tensor) -> tuple[Tensor, Tensor]:
    """A batch norm in eval mode as z ↦ gain·z + shift, [n] each; without running statistics, what is known of it."""
    tensors = dict(norm.named_parameters(recurse=False)) | dict(norm.named_buffers(recurse=False))
    found = {key: tensor.detach().to(W) for key, tensor in tensors.items()}
    ones = W.new_ones(len(W))
    variance = found.get("running_var", ones)
    gain = (variance + float(norm.eps)).rsqrt() * found.get("weight", ones)  # type: ignore[arg-type]
    return gain, found.get("bias", 0 * ones) - gain * found.get("running_mean", 0 * ones)
