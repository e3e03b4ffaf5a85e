"""The projections of queries, keys and values in a MultiheadAttention: three products, each with inputs of its own."""

from collections.abc import Sequence

from torch import Tensor, nn

from convexprune.layers.kinds import Group, Kind
from convexprune.layers.linear import features
from convexprune.solvers.errors import ShapeMismatch


def _groups(module: nn.MultiheadAttention) -> list[Group]:
    joint, bias = module.in_proj_weight, module.in_proj_bias
    weights = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight) if joint is None else joint.chunk(3)
    biases = [None] * 3 if bias is None else bias.detach().chunk(3)
    return [(weight.detach(), shift) for weight, shift in zip(weights, biases, strict=True)]


def _inputs(module: nn.MultiheadAttention, received: Sequence[Tensor]) -> list[Tensor]:
    return _three(received, (module.embed_dim, module.kdim, module.vdim))


def _outputs(module: nn.MultiheadAttention, projected: Sequence[Tensor]) -> list[Tensor]:
    return _three(projected, (module.embed_dim,) * 3)


def _three(tensors: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
    if isinstance(tensors, Tensor) or len(tensors) != 3:
        found = f"shape {tuple(tensors.shape)}" if isinstance(tensors, Tensor) else f"{len(tensors)} tensors"
        raise ShapeMismatch(f"MultiheadAttention has three projections: expected (query, key, value); got {found}")
    return [features(tensor, size) for tensor, size in zip(tensors, sizes, strict=True)]


ATTENTION = Kind(
    nn.MultiheadAttention,
    ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias"),
    _groups,
    _inputs,
    _outputs,
)
