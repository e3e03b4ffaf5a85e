"""The layers, held by reading the source: solvers know nothing of models, and optional packages stay optional."""

import ast
import subprocess
import sys
from collections.abc import Collection, Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOLVERS = sorted((ROOT / "solvers").rglob("*.py"))
ADAPTER = sorted((ROOT / "convexprune").rglob("*.py"))
SOLVING, SHOWING = {"cvxpy", "clarabel", "scs", "osqp", "scipy"}, {"jinja2", "matplotlib"}
OPTIONAL = SOLVING | SHOWING | {"dask", "distributed", "sklearn", "transformers"}


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def path_name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imports(tree: ast.AST) -> Iterator[str]:
    """Dotted names of everything imported below ``tree``: ``from a import b`` is a and a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the layer that they reach"
            yield from [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]


def at_import_time(tree: ast.Module) -> Iterator[ast.stmt]:
    """Statements that run on import: not those inside functions or under TYPE_CHECKING."""
    waiting: list[ast.stmt] = list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            waiting.extend(node.orelse)
            continue
        inner = [child for child in ast.walk(node) if isinstance(child, ast.stmt) and child is not node]
        direct = [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]
        waiting.extend(direct or inner)
        yield node


def imported_at_import_time(path: Path) -> set[str]:
    nodes = [node for node in at_import_time(parsed(path)) if isinstance(node, ast.Import | ast.ImportFrom)]
    return {name for node in nodes for name in imports(node)}


def test_solvers_import_nothing_of_the_adapter_and_no_layers() -> None:
    for path in SOLVERS:
        for name in imports(parsed(path)):
            assert name.split(".")[0] != "convexprune" or name.startswith("convexprune.solvers"), (
                path_name(path),
                name,
            )
            assert not name.startswith("torch.nn"), (path_name(path), name)


def module_name(path: Path) -> str:
    folder, *parts = path.relative_to(ROOT).with_suffix("").parts
    names = ["convexprune", *(["solvers"] if folder == "solvers" else []), *parts]
    return ".".join(names[: -1 if names[-1] == "__init__" else None])


def modules_reached(tree: ast.AST, known: Collection[str]) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in known else str(node.module) for name in names)


def test_no_imports_go_in_a_circle() -> None:
    """Those inside functions and for type checkers count, too; in the adapter whole rooms form none either."""
    paths = {module_name(path): path for path in SOLVERS + ADAPTER}
    graph = {name: {*modules_reached(parsed(path), paths)} & paths.keys() - {name} for name, path in paths.items()}
    TopologicalSorter(graph).prepare()
    adapter = {module_name(path) for path in ADAPTER}
    room = {name: ".".join(name.split(".")[:2]) for name in adapter - {"convexprune"}}
    rooms: dict[str, set[str]] = {own: set() for own in room.values()}
    for name, own in room.items():
        rooms[own] |= {room[other] for other in graph[name] if other in room} - {own}
    assert len(rooms) > 10
    TopologicalSorter(rooms).prepare()


def test_optional_packages_are_imported_only_where_they_are_used() -> None:
    for path in SOLVERS + ADAPTER:
        assert not {name.split(".")[0] for name in imported_at_import_time(path)} & OPTIONAL, path_name(path)


def test_libraries_do_not_print() -> None:
    for path in SOLVERS + [p for p in ADAPTER if p.name != "cli.py"]:
        calls = [node.func for node in ast.walk(parsed(path)) if isinstance(node, ast.Call)]
        names = {ast.unparse(function) for function in calls}
        written = names & {"print", "pprint", "sys.stdout.write", "sys.stderr.write", "breakpoint"}
        assert not written, (path_name(path), written)


def test_packages_say_what_is_public() -> None:
    """Every module has a docstring; __all__ stands in the packages' faces, and nowhere else."""
    for path in SOLVERS + ADAPTER:
        tree = parsed(path)
        assert ast.get_docstring(tree), path_name(path)
        lists = [
            node.value for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets) == "__all__"
        ]
        imports_names = any(isinstance(node, ast.ImportFrom) for node in tree.body)
        assert len(lists) == (path.name == "__init__.py" and imports_names), path_name(path)
        for names in map(ast.literal_eval, lists):
            assert len(set(names)) == len(names), path_name(path)
            assert not [name for name in names if name.startswith("_") and name != "__version__"], path_name(path)


def test_every_public_name_exists() -> None:
    code = """
import importlib, pkgutil, convexprune, convexprune.solvers
walks = [pkgutil.walk_packages(p.__path__, p.__name__ + ".") for p in (convexprune, convexprune.solvers)]
names = [module.name for walk in walks for module in walk]
for name in names:
    module = importlib.import_module(name)
    missing = [n for n in getattr(module, "__all__", []) if not hasattr(module, n)]
    assert not missing, (name, missing)
"""
    run(code)


def test_the_solver_layer_loads_no_optional_package() -> None:
    wanted = sorted(OPTIONAL - {"scipy"})
    code = f"""
import sys
before = set(sys.modules)
import convexprune.solvers
loaded = {{name.split(".")[0] for name in set(sys.modules) - before}} & set({wanted!r})
assert not loaded, loaded
"""
    run(code)


def run(code: str) -> None:
    """In a fresh interpreter, warnings as errors."""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)  # noqa: S603
    assert done.returncode == 0, done.stderr
