"""Prune trained networks by convex optimisation, with a certificate for every layer.

``prune_(model, calibration, eps=0.1)`` prunes a whole model in place, ``coreset_prune_(model, calibration, "mussay",
0.5)`` removes neurons or weights by a coreset; ``keep_masks_`` keeps zeros through fine-tuning; ``verify`` recomputes
what a run claims; ``layer_program`` and ``write_back_`` do one layer by hand; ``convexprune.solvers`` is the
optimisation underneath. Names are imported when they are first used, so that the command line need not wait for torch.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from convexprune.coresets import coreset_prune_
    from convexprune.layers import write_back_
    from convexprune.masks import keep_masks_, make_permanent_
    from convexprune.nettrim import layer_program, prune_
    from convexprune.nettrim.verify import verify
    from convexprune.network.weights import load_weights_into_, save_weights
    from convexprune.report.report import Report

    __version__: str

__all__ = [
    "Report",
    "__version__",
    "coreset_prune_",
    "keep_masks_",
    "layer_program",
    "load_weights_into_",
    "make_permanent_",
    "prune_",
    "save_weights",
    "verify",
    "write_back_",
]

_HERE = Path(__file__).parent
if not (_HERE / "solvers").exists() and (_HERE.parent / "solvers" / "__init__.py").exists():
    from convexprune.checkout import find_solvers_in

    find_solvers_in(_HERE.parent / "solvers")

_HOMES = {
    "Report": "report.report",
    "coreset_prune_": "coresets",
    "keep_masks_": "masks",
    "layer_program": "nettrim",
    "load_weights_into_": "network.weights",
    "make_permanent_": "masks",
    "prune_": "nettrim",
    "save_weights": "network.weights",
    "verify": "nettrim.verify",
    "write_back_": "layers",
}


if not TYPE_CHECKING:  # type checkers are to see the names above, and to report all others

    def __getattr__(name: str) -> Any:
        if name == "__version__":
            found = _version()
        elif name in _HOMES:
            found = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = found
        return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _version() -> str:
    """Of the installed package; "unknown" in a checkout that was never installed."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(__name__)
    except PackageNotFoundError:
        return "unknown"
