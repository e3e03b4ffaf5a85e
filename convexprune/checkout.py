"""``convexprune.solvers`` in a checkout, where solvers/ lies beside convexprune/ and not in it.

Python that is run in a checkout finds this convexprune/ before any installed package, so it has to find the checkout's
own solvers/, too, whether convexprune is installed as a copy, as a link (editable) or not at all.
"""

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

_ROOT = str(Path(__file__).parents[1])


class _Checkout(PathFinder):
    """Knows one name, and comes first: another checkout, installed as a link, would offer its own solvers."""

    @classmethod
    def find_spec(
        cls,
        fullname: str,
        path: Sequence[str] | None = None,  # noqa: ARG003 - the interface of sys.meta_path
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        """Of ``convexprune.solvers`` alone; what is below it is then found in its folder."""
        return super().find_spec(fullname, [_ROOT], target) if fullname == "convexprune.solvers" else None


sys.meta_path.insert(0, _Checkout)
