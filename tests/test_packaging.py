"""What pyproject.toml says agrees with the folders, the pins and the installed package."""

import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import convexprune

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
CONSTRAINTS = [
    line
    for line in (ROOT / ".ci" / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if line and not line.startswith("#")
]


def plain(name: str) -> str:
    """A distribution's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


PINS = {plain(name): pin for name, _, pin in (line.partition("==") for line in CONSTRAINTS)}


def requirements() -> list[str]:
    """Every dependency and every extra's, without those of the project on itself."""
    metadata = PROJECT["project"]
    named = [
        *metadata["dependencies"],
        *(line for extra in metadata["optional-dependencies"].values() for line in extra),
    ]
    return sorted({line for line in named if plain(Requirement(line).name) != metadata["name"]})


def packages_on_disk() -> list[str]:
    """Import names of all folders with an __init__.py, by the mapping of the top-level folders."""
    folders = PROJECT["tool"]["setuptools"]["package-dir"]
    found = set()
    for name, folder in folders.items():
        for init in (ROOT / folder).rglob("__init__.py"):
            found.add(".".join([name, *init.parent.relative_to(ROOT / folder).parts]))
    return sorted(found)


def test_every_package_on_disk_is_listed() -> None:
    assert sorted(PROJECT["tool"]["setuptools"]["packages"]) == packages_on_disk()


def test_every_folder_of_modules_is_a_package() -> None:
    folders = {path.parent for name in ("convexprune", "solvers") for path in (ROOT / name).rglob("*.py")}
    assert not [folder for folder in sorted(folders) if not (folder / "__init__.py").exists()]


def test_package_data_exists() -> None:
    folders, data = (PROJECT["tool"]["setuptools"][key] for key in ("package-dir", "package-data"))
    assert not [
        f"{name}: {pattern}"
        for name, patterns in data.items()
        for pattern in patterns
        if not list((ROOT / folders[name]).glob(pattern))
    ]


@pytest.mark.parametrize("line", requirements())
def test_each_requirement_has_a_pin_that_it_allows(line: str) -> None:
    requirement = Requirement(line)
    assert plain(requirement.name) in PINS
    assert requirement.specifier.contains(PINS[plain(requirement.name)])


@pytest.mark.parametrize("line", requirements())
def test_each_requirement_has_a_lowest_version(line: str) -> None:
    assert any(part.operator == ">=" for part in Requirement(line).specifier)


def test_pins_are_exact_sorted_and_named_once() -> None:
    names = [line.partition("==")[0] for line in CONSTRAINTS]
    assert names == sorted(names, key=str.lower)
    assert len(PINS) == len(names)
    # A local suffix such as +cpu would refuse the other builds of the same version.
    assert not [line for line in CONSTRAINTS if not re.fullmatch(r"[\w.-]+==[\w.]+", line)]
    assert plain(PROJECT["project"]["name"]) not in PINS


def test_the_installed_version_is_that_of_the_project() -> None:
    assert version(PROJECT["project"]["name"]) == PROJECT["project"]["version"]


def test_the_changelog_begins_with_this_version() -> None:
    headings = re.findall(r"^## (\S+)", (ROOT / "docs" / "changelog.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert headings[0] == PROJECT["project"]["version"]


def python(*arguments: str, folder: Path) -> str:
    return subprocess.run(  # noqa: S603
        [sys.executable, *arguments], cwd=folder, check=True, capture_output=True, text=True
    ).stdout


def test_the_version_is_told_by_the_package_and_by_the_command(tmp_path: Path) -> None:
    expected = PROJECT["project"]["version"]
    assert convexprune.__version__ == expected
    assert python("-m", "convexprune", "--version", folder=tmp_path) == f"convexprune {expected}\n"


def test_a_checkout_s_own_solvers_are_found_beside_it(tmp_path: Path) -> None:
    """Python run in a checkout finds its convexprune/ before any installed package, and needs its solvers/ there."""
    for name in ("convexprune", "solvers"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    code = "import convexprune.solvers as s, convexprune.solvers.programs as f; print(s.__file__, f.__file__)"
    found = python("-c", code, folder=tmp_path).split()
    assert found == [
        str(tmp_path / "solvers" / "__init__.py"),
        str(tmp_path / "solvers" / "programs" / "__init__.py"),
    ]


def test_help_does_not_wait_for_torch(tmp_path: Path) -> None:
    """Which takes seconds to import."""
    code = "import sys; from convexprune.cli.app import app; app(sys.argv[1:], standalone_mode=False)"
    for arguments in (["--help"], ["--version"], ["prune", "--help"]):
        shown = python(
            "-c", f"{code}; print(sorted({{'torch', 'numpy'}} & {{*sys.modules}}))", *arguments, folder=tmp_path
        )
        assert shown.endswith("[]\n")


def test_every_public_name_is_found_and_no_other() -> None:
    assert all(hasattr(convexprune, name) for name in convexprune.__all__)
    assert set(convexprune.__all__) <= set(dir(convexprune))
    with pytest.raises(AttributeError, match="no attribute 'prune_model'"):
        _ = convexprune.prune_model  # type: ignore[attr-defined]


def test_all_holds_every_extra_that_users_may_need() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    (line,) = extras["all"]
    assert Requirement(line).extras == set(extras) - {"all", "bench", "test", "dev"}


def test_links_are_those_of_one_repository() -> None:
    home = PROJECT["project"]["urls"]["Repository"]
    assert all(url.startswith(home) for url in PROJECT["project"]["urls"].values())
    for url in PROJECT["project"]["urls"].values():
        path = url.removeprefix(home).partition("/blob/main/")[2]
        assert (ROOT / path).exists()
