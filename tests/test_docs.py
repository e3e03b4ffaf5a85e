"""Every ```python block of README.md and docs/ runs: a file's blocks in order, in one namespace."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from documentation import PAGES, blocks, forgotten, run


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ModuleType]:
    """A namespace in a folder of its own; what a page registers is forgotten afterwards."""
    module = ModuleType("documentation")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # dataclasses look their module up
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    with forgotten():
        yield module


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_blocks_run(page: Path, module: ModuleType) -> None:
    assert not run(page, module), "all extras are installed for the tests"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_blocks_keep_the_line_length(page: Path) -> None:
    long = [
        f"{page.name}:{block.line + i}"
        for block in blocks(page)
        for i, line in enumerate(block.source.splitlines(), 1)
        if len(line) > 120
    ]
    assert not long


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing


def test_blocks_of_a_page_share_a_namespace_and_other_fences_are_left_alone(module: ModuleType, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```python\na = 1\n```\n```sh\nexit 1\n```\n```toml\nb = =\n```\n```python\na += 1\n```\n")
    run(page, module)
    assert module.__dict__["a"] == 2


def test_a_failure_names_the_page_and_the_line(module: ModuleType, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Title\n\n```python\ndef half(x):\n    return 1 / x\n```\n\n```python\na = 1\nhalf(0)\n```\n")
    with pytest.raises(ZeroDivisionError) as failure:
        run(page, module)
    assert failure.value.__notes__ == ["in page.md:10"]
    assert [str(entry.path) for entry in failure.traceback][-2:] == [str(page), str(page)]
    assert [entry.lineno + 1 for entry in failure.traceback][-2:] == [10, 5]


def test_an_unclosed_fence_is_an_error(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("text\n```python\na = 1\n")
    with pytest.raises(AssertionError, match=r"page\.md:2: a fence that is never closed"):
        blocks(page)
