"""Pruners: what is wanted of layers, and the methods that answer, one a file.

Those that solve: ``net_trim``, ``budget``. Those that score: ``random_``, ``magnitude``, ``wanda``, ``sparsegpt``; by
gradients ``synflow``, ``snip``, ``grasp``, ``fisher``. Those that sample: ``lowner``, ``mussay``, ``pfp``, ``corenet``,
``sipp``, ``uniform``.
"""

from importlib import import_module
from pkgutil import iter_modules

from convexprune.pruners.gradients import GradientScoring, LossScoring
from convexprune.pruners.pruner import PRUNERS, Pruner, available_pruners, make_pruner, register_pruner
from convexprune.pruners.sampling import Sampling
from convexprune.pruners.scoring import Scoring
from convexprune.pruners.solving import Solving

__all__ = [
    "PRUNERS",
    "GradientScoring",
    "LossScoring",
    "Pruner",
    "Sampling",
    "Scoring",
    "Solving",
    "available_pruners",
    "make_pruner",
    "register_pruner",
]

for _module in iter_modules(__path__):  # each registers what it holds
    import_module(f"{__name__}.{_module.name}")
