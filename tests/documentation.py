"""The ```python blocks of README.md and docs/, run as a reader runs them.

``python tests/documentation.py`` runs all of them with that interpreter in the current folder, which they write to. A
block that begins with ``# pip install "convexprune[NAME]"`` is left out where that extra is not installed; every other
block has to run.
"""

import re
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(path for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")) if path.exists())


@dataclass(frozen=True)
class Block:
    line: int  # of the fence, from 1
    source: str

    @property
    def extra(self) -> str | None:
        """What it says that it needs."""
        found = re.match(r'# pip install "convexprune\[(\w+)\]"', self.source)
        return found and found[1]


def blocks(page: Path) -> list[Block]:
    """The ```python blocks of a page."""
    found: list[Block] = []
    opened: tuple[int, str] | None = None
    body: list[str] = []
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if opened is None and line.startswith("```"):
            opened, body = (number, line[3:].strip()), []
        elif opened is not None and line.rstrip() == "```":
            if opened[1] == "python":
                found.append(Block(opened[0], "\n".join(body) + "\n"))
            opened = None
        else:
            body.append(line)
    assert opened is None, f"{page}:{opened and opened[0]}: a fence that is never closed"
    return found


def run(page: Path, module: ModuleType) -> Counter[str]:
    """Run a page's blocks in order in one namespace; a failure's traceback shows the page itself, line by line.

    Returns:
        How many blocks were left out, by the extra that is not installed.
    """
    left_out = Counter[str]()
    for block in blocks(page):
        if block.extra is not None and not installed(block.extra):
            left_out[block.extra] += 1
            continue
        code = compile("\n" * block.line + block.source, str(page), "exec")
        try:
            exec(code, module.__dict__)  # noqa: S102 - our own documentation
        except Exception as error:
            error.add_note(f"in {page.name}:{_line(error, page) or block.line}")
            raise
    return left_out


@contextmanager
def forgotten() -> Iterator[None]:
    """What a page registers is forgotten afterwards."""
    from convexprune.evaluation import CORRUPTIONS
    from convexprune.pruners import PRUNERS
    from convexprune.runs.fits import FITS
    from convexprune.solvers.methods.registry import PROGRAMS
    from convexprune.targets import TARGETS

    tables: tuple[dict[str, Any], ...] = (PROGRAMS.factories, PRUNERS.factories, FITS, TARGETS, CORRUPTIONS)
    before = [dict(table) for table in tables]
    try:
        yield
    finally:
        for table, known in zip(tables, before, strict=True):
            table.clear()
            table.update(known)


def installed(extra: str) -> bool:
    """Whether all that an extra asks for is."""
    lines = [line for line in requires("convexprune") or () if re.search(rf"extra == ['\"]{extra}['\"]", line)]
    assert lines, f"convexprune has no extra {extra!r}"
    try:
        return all(version(re.split(r"[^\w.-]", line)[0]) for line in lines)
    except PackageNotFoundError:
        return False


def _line(error: BaseException, page: Path) -> int | None:
    """Where in the page it was raised."""
    trace, lines = error.__traceback__, []
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == str(page):
            lines.append(trace.tb_lineno)
        trace = trace.tb_next
    return lines[0] if lines else None


def main() -> None:
    sys.path[0] = ""  # as where code is pasted: the current folder comes before what is installed
    import torch

    import convexprune.solvers

    print(f"{convexprune.__file__}, {convexprune.solvers.__file__}, in {Path.cwd()}", flush=True)
    for page in PAGES:
        sys.modules["documentation"] = module = ModuleType("documentation")  # dataclasses look their module up
        torch.manual_seed(0)
        with forgotten():
            left_out = run(page, module)
        rest = "".join(f"; {count} need convexprune[{extra}]" for extra, count in left_out.items())
        print(f"{page.name}: {len(blocks(page)) - left_out.total()} blocks ran{rest}", flush=True)


if __name__ == "__main__":
    main()
