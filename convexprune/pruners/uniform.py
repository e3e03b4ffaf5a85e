"""Uniform sampling: the baseline that every coreset is to be compared with."""

from dataclasses import dataclass

from convexprune.pruners.draws import Scheme
from convexprune.pruners.pruner import register_pruner
from convexprune.pruners.sampling import Sampling
from convexprune.pruners.views import Items, Sensitivities, View


@register_pruner("uniform")
@dataclass(frozen=True)
class Uniform(Sampling):
    """Uniform sampling of a layer's neurons, or of its weights that are not 0, reweighted: what a coreset has to beat.

    Args:
        items: "neurons" or "weights".
        sampling: See ``Scheme``.
    """

    items: Items = "neurons"
    sampling: Scheme = "fixed"

    def sensitivities(self, view: View) -> Sensitivities:
        """Every item alike."""
        return Sensitivities(view.uniform, promise="nothing: a baseline")
