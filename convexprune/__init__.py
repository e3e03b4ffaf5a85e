"""Prune trained networks by convex optimisation, with a certificate for every layer.

``prune_(model, data, eps=0.1)`` prunes a whole model in place; ``Sparsity``, ``Neurons``, ``NetworkEps`` and
``Guarantee`` are other targets, ``Options`` says how, and ``method`` by which pruner; ``verify`` recomputes what a run
claims; ``keep_masks_`` keeps zeros through fine-tuning; ``layer_program`` does one layer by hand;
``convexprune.solvers`` is the optimisation underneath. Names are imported when they are first used, so that the command
line need not wait for torch.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from convexprune.masks import keep_masks_, make_permanent_
    from convexprune.network.weights import load_weights_into_, save_weights
    from convexprune.options import Options
    from convexprune.prune import prune_
    from convexprune.report.report import Report
    from convexprune.runs.data import Data
    from convexprune.runs.layer_program import layer_program
    from convexprune.targets import Eps, Guarantee, NetworkEps, Neurons, Sparsity
    from convexprune.verification import verify

    __version__: str

__all__ = [
    "Data",
    "Eps",
    "Guarantee",
    "NetworkEps",
    "Neurons",
    "Options",
    "Report",
    "Sparsity",
    "__version__",
    "keep_masks_",
    "layer_program",
    "load_weights_into_",
    "make_permanent_",
    "prune_",
    "save_weights",
    "verify",
]

_HERE = Path(__file__).parent
if not (_HERE / "solvers").exists() and (_HERE.parent / "solvers" / "__init__.py").exists():
    import convexprune.checkout  # noqa: F401 - it says where they are

_HOMES = {
    "Data": "runs.data",
    "Report": "report.report",
    "Options": "options",
    "keep_masks_": "masks",
    "layer_program": "runs.layer_program",
    "load_weights_into_": "network.weights",
    "make_permanent_": "masks",
    "prune_": "prune",
    "save_weights": "network.weights",
    "verify": "verification",
} | dict.fromkeys(("Eps", "Guarantee", "NetworkEps", "Neurons", "Sparsity"), "targets")


if not TYPE_CHECKING:  # type checkers are to see the names above, and to report all others

    def __getattr__(name: str) -> Any:
        if name == "__version__":
            try:
                found = version(__name__)
            except PackageNotFoundError:  # a checkout that was never installed
                found = "unknown"
        elif name in _HOMES:
            found = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = found
        return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
