"""The baselines that every coreset is to be compared with: uniform sampling, and the largest magnitudes."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from convexprune.coresets.allocation import Allowed, largest_of_all, proportional
from convexprune.coresets.base import Edges, Guarantee, Items, Method, Neurons, Scores
from convexprune.coresets.sampling import Sampling
from convexprune.solvers.errors import InvalidInput


@dataclass(frozen=True)
class Uniform(Method):
    """Uniform sampling of a layer's neurons, or of its weights that are not 0, reweighted: what a coreset has to beat.

    Args:
        items: "neurons" or "edges".
        sampling: See ``SAMPLINGS``.
    """

    items: Items = "neurons"
    sampling: Sampling = "fixed"

    def scores(self, layer: Neurons | Edges) -> Scores:
        """Every item alike."""
        s = (_magnitudes(layer) > 0).to(torch.float64) if isinstance(layer, Edges) else _ones(layer)
        return Scores(s, _unpromised, "nothing: a baseline")


@dataclass(frozen=True)
class Magnitude(Method):
    """The largest weights of the whole layer, or the neurons with the longest incoming weights times outgoing ones.

    Args:
        items: "neurons" or "edges".
        sampling: "top", as is usual; see ``SAMPLINGS``.
    """

    items: Items = "edges"
    sampling: Sampling = "top"

    def scores(self, layer: Neurons | Edges) -> Scores:
        """|U|; ‖p_i‖·‖outgoing_i‖ of a neuron, which no rescaling between the two layers changes."""
        if isinstance(layer, Edges):
            s = _magnitudes(layer)
        else:
            s = (_lengths(layer.incoming) * _lengths(layer.outgoing))[None]
        return Scores(s, _unpromised, "nothing: a baseline")

    def allocate(self, layers: Sequence[Scores], allowed: Allowed) -> list[Tensor]:
        """The largest weights of the whole network; neurons, whose sizes differ between layers, in proportion."""
        return (largest_of_all if self.items == "edges" else proportional)(layers, allowed)


def _ones(layer: Neurons) -> Tensor:
    return torch.ones(1, len(layer.incoming), dtype=torch.float64, device=layer.incoming.device)


def _lengths(rows: Tensor) -> Tensor:
    lengths: Tensor = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
    return lengths


def _magnitudes(layer: Edges) -> Tensor:
    """[1, N·M]: the layer's weights in one group."""
    return layer.product.weights.abs().to(torch.float64).reshape(1, -1)


def _unpromised(guarantee: Guarantee) -> Tensor:
    raise InvalidInput(f"a baseline proves nothing, so {guarantee} means nothing to it: give a count or a ratio")
