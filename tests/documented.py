"""The classes and functions that a page of the documentation defines, without running the rest of it."""

import ast
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

DOCS = Path(__file__).parents[1] / "docs"
DEFINITIONS = (ast.Import, ast.ImportFrom, ast.ClassDef, ast.FunctionDef)


@cache
def documented(page: str) -> ModuleType:
    """A module of what docs/``page`` defines."""
    module = ModuleType(f"documented_{page.partition('.')[0]}")
    sys.modules[module.__name__] = module  # dataclasses look their module up
    for block in (DOCS / page).read_text(encoding="utf-8").split("```python\n")[1:]:
        tree = ast.parse(block.partition("```")[0])
        tree.body = [node for node in tree.body if isinstance(node, DEFINITIONS)]
        exec(compile(tree, page, "exec"), module.__dict__)  # noqa: S102 - our own documentation
    return module


def lines_of(page: str, name: str) -> int:
    """How many lines the definition of a class takes in the page."""
    for block in (DOCS / page).read_text(encoding="utf-8").split("```python\n")[1:]:
        for node in ast.parse(block.partition("```")[0]).body:
            if isinstance(node, ast.ClassDef) and node.name == name:
                first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
                return int(node.end_lineno or 0) - first + 1
    raise LookupError(name)


def get(page: str, name: str) -> Any:
    """A class of the page."""
    return getattr(documented(page), name)
