"""``convexprune.solvers`` in a checkout, where solvers/ lies beside convexprune/ and not in it.

Python that is run in a checkout finds this convexprune/ before any installed package, so it has to find the checkout's
own solvers/, too, whether convexprune is installed as a copy, as a link (editable) or not at all.
"""

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType


class _Finder:
    """Knows one name, and comes first: another checkout, installed as a link, would offer its own solvers."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def find_spec(
        self,
        name: str,
        path: Sequence[str] | None = None,  # noqa: ARG002 - the interface of sys.meta_path
        target: ModuleType | None = None,  # noqa: ARG002
    ) -> ModuleSpec | None:
        """Of ``convexprune.solvers`` alone; what is below it is then found in the folder."""
        if name != "convexprune.solvers":
            return None
        return spec_from_file_location(
            name, self._folder / "__init__.py", submodule_search_locations=[str(self._folder)]
        )


def find_solvers_in(folder: Path) -> None:
    """Have ``import convexprune.solvers`` find that folder."""
    sys.meta_path.insert(0, _Finder(folder))
