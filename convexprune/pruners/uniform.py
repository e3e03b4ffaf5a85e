"""Uniform sampling: the baseline that every coreset is to be compared with."""

from dataclasses import dataclass

import torch
from torch import Tensor

from convexprune.pruners.draws import Scheme
from convexprune.pruners.pruner import register_pruner
from convexprune.pruners.sampling import Items, Sampling
from convexprune.pruners.views import Sensitivities, View, WeightView
from convexprune.solvers.errors import InvalidInput
from convexprune.targets import Guarantee


@register_pruner("uniform")
@dataclass(frozen=True)
class Uniform(Sampling):
    """Uniform sampling of a layer's neurons, or of its weights that are not 0, reweighted: what a coreset has to beat.

    Args:
        items: "neurons" or "weights".
        sampling: See ``SAMPLINGS``.
    """

    items: Items = "neurons"
    sampling: Scheme = "fixed"

    def sensitivities(self, view: View) -> Sensitivities:
        """Every item alike."""
        if isinstance(view, WeightView):
            s = (view.product.weights != 0).to(torch.float64).reshape(1, -1)
        else:
            s = torch.ones(1, len(view.incoming), dtype=torch.float64, device=view.incoming.device)
        return Sensitivities(s, _unpromised, "nothing: a baseline")


def _unpromised(guarantee: Guarantee) -> Tensor:
    raise InvalidInput(f"a baseline proves nothing, so {guarantee} means nothing to it: give a count or a part")
