"""Results that were changed: the seal names the file, and ``verify`` tells what was sealed again and does not hold."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from calls import prune_
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from convexprune import save_weights, verify
from convexprune.errors import DamagedFile
from convexprune.files.weights import save_json
from convexprune.page.page import write_page
from convexprune.pruners.uniform import Uniform
from convexprune.runs.journal import read_json
from convexprune.runs.results import read_results, sealed

Written = dict[str, Path]


def network() -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(0)
    convolution, norm = nn.Conv2d(2, 6, 3, groups=2), nn.BatchNorm2d(6)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    rest = nn.Flatten(), nn.Linear(96, 12), nn.ReLU(), nn.Linear(12, 5)
    return nn.Sequential(convolution, norm, nn.ReLU(), *rest), torch.rand(40, 2, 6, 6)


RECIPES: dict[str, dict[str, Any]] = {
    "eps": {"eps": 0.1},
    "cascade": {"eps": 0.1, "mode": "cascade"},
    "sparsity": {"sparsity": 0.5},
    "network": {"sparsity": 0.5, "scope": "network"},
    "neurons": {"sparsity": 0.5, "unit": "neurons"},
    "magnitude": {"sparsity": 0.5, "method": "magnitude", "refit": True},
    "coreset": {"sparsity": 0.5, "method": Uniform("weights")},
    "neuron coreset": {"target": "neurons 0.5", "method": "mussay"},
}
OWN = {name: recipe["method"] for name, recipe in RECIPES.items() if isinstance(recipe.get("method"), Uniform)}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """What the command line leaves in its folder, for each recipe."""
    found = {}
    for name, recipe in RECIPES.items():
        folder, (model, x) = tmp_path_factory.mktemp(name), network()
        report = prune_(model, x, run=folder, **recipe)
        save_weights(model, folder / "model.safetensors")
        save_json(sealed(folder, json.loads(report.to_json())), folder / "report.json")
        found[name] = folder
    return found


def copied(written: Written, name: str, target: Path) -> Path:
    return Path(shutil.copytree(written[name], target / name))


def reported(folder: Path, change: Callable[[dict[str, Any]], object], *, again: bool) -> None:
    """The report changed, with a seal that is right or the old one."""
    report = read_json(folder / "report.json")
    change(report)  # type: ignore[arg-type]
    save_json(sealed(folder, report) if again else report, folder / "report.json")


@pytest.mark.parametrize("name", RECIPES)
def test_results_as_written_agree_and_the_page_says_what_was_not_checked(
    written: Written, name: str, tmp_path: Path
) -> None:
    assert read_results(written[name]).fingerprints.keys() == {"model", "data", "recipe"}
    page = write_page(written[name], tmp_path / "page.html").read_text()
    assert re.search(r"Checked: all \d+ files of the run are as they were written \(SHA-256\)", page)
    assert "`convexprune verify` recomputes them" in page
    model, x = network()
    assert verify(model, x, written[name], method=OWN.get(name)).results == ()


def in_row(key: str, value: Any) -> Callable[[dict[str, Any]], object]:
    return lambda report: report["layers"][-1].update({key: value})


def everywhere(value: int) -> Callable[[dict[str, Any]], None]:
    """Nonzeros that add up."""

    def change(report: dict[str, Any]) -> None:
        report["nonzeros"] += value - report["layers"][-1]["nonzeros"]
        report["layers"][-1]["nonzeros"] = value

    return change


# What follows from the rows, and is refused whoever sealed it.
TOTALS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "nonzeros": (in_row("nonzeros", 1), "nonzeros"),
    "total": (lambda report: report.update(nonzeros=3), "nonzeros is 3"),
    "status": (in_row("status", "iteration limit"), "iteration limit"),
    "verdict": (lambda report: report.update(head=["certified: solved (9)"]), "head"),
    "certified": (lambda report: report.update(certified=not report["certified"]), "certified is"),
}
# What only the entries and the data can tell.
FIGURES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "error": (in_row("output_error", 1e-3), "output_error is 0.001"),
    "nonzeros and total": (everywhere(3), "nonzeros is 3"),
    "name": (in_row("name", "other"), "layers.other"),
    "gap": (in_row("gap", 0.5), "gap is 0.5"),
    "samples": (lambda report: report.update(samples=39), "samples is 39"),
    "network error": (lambda report: report.update(output_error=report["output_error"] / 2), "output_error is"),
    "tolerance": (lambda report: report["provenance"].update(tol=1e-9), "provenance.tol is 1e-09"),
    "target": (lambda report: report["provenance"]["target"].update(value=0.01), "provenance.target.value is 0.01"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_edited_reports_are_refused(written: Written, tmp_path: Path, name: str) -> None:
    """By the seal, and where it was made again by the rows, and by verification."""
    folder, (model, x) = copied(written, name, tmp_path), network()
    whole = (folder / "report.json").read_bytes()
    for change, _ in (*TOTALS.values(), *FIGURES.values()):
        reported(folder, change, again=False)
        with pytest.raises(DamagedFile, match=r"report\.json was changed after it was written"):
            read_results(folder)
        (folder / "report.json").write_bytes(whole)
    for change, told in TOTALS.values():
        reported(folder, change, again=True)
        with pytest.raises(DamagedFile, match=told):
            read_results(folder)
        (folder / "report.json").write_bytes(whole)
    for edit, (change, told) in FIGURES.items():
        if (name, edit) == ("network", "network error"):  # it is no more than what two forwards differ by
            continue
        reported(folder, change, again=True)
        found = verify(model, x, folder, method=OWN.get(name))
        assert not found.ok
        assert told in " ".join(found.results or ())
        (folder / "report.json").write_bytes(whole)


@pytest.mark.parametrize("file", ["model.safetensors", "run.json", "layers/6-*.json", "layers/6-*.safetensors"])
def test_the_file_that_was_changed_is_named(written: Written, tmp_path: Path, file: str) -> None:
    folder = copied(written, "eps", tmp_path)
    (path,) = folder.glob(file)
    whole, name = path.read_bytes(), path.relative_to(folder).as_posix()
    path.write_bytes(whole + b" ")
    with pytest.raises(DamagedFile, match=f"{name} was changed after it was written"):
        read_results(folder)
    path.unlink()
    with pytest.raises(DamagedFile, match=f"{name} is missing"):
        read_results(folder)
    path.write_bytes(whole)
    (folder / "layers" / "other.json").write_bytes(b"{}")
    with pytest.raises(DamagedFile, match=r"layers/other\.json was added after the results were written"):
        read_results(folder)


@pytest.mark.parametrize("name", RECIPES)
def test_other_weights_in_the_file_are_found_by_verification(written: Written, tmp_path: Path, name: str) -> None:
    """As many of them, so that no count tells."""
    folder, (model, x) = copied(written, name, tmp_path), network()
    state = {key: value.clone() for key, value in load_file(folder / "model.safetensors").items()}
    save_file({**state, "6.weight": 2 * state["6.weight"]}, folder / "model.safetensors")
    with pytest.raises(DamagedFile, match=r"model\.safetensors was changed after it was written"):
        read_results(folder)
    reported(folder, lambda report: None, again=True)
    found = verify(model, x, folder, method=OWN.get(name))
    assert found.results == ("model.safetensors: 6.weight is not what the entries say",)
    assert all(torch.equal(value, network()[0].state_dict()[key]) for key, value in model.state_dict().items())


def test_without_a_seal_all_is_as_recorded(written: Written, tmp_path: Path) -> None:
    report = read_json(written["eps"] / "report.json")
    save_json({name: value for name, value in report.items() if name != "sha256"}, tmp_path / "report.json")
    assert read_results(tmp_path).report.nonzeros == report["nonzeros"]
    page = write_page(tmp_path).read_text()
    assert "report.json has no seal" in page
    assert "there is no journal" in page
    assert "as they were written (SHA-256)" not in page


def test_of_a_run_that_was_stopped_the_results_are_read(tmp_path: Path) -> None:
    model, x = network()
    begun: list[str] = []
    report = prune_(model, x, 0.1, run=tmp_path, callback=lambda name, _: begun.append(name), stop=lambda: "4" in begun)
    assert report.provenance["stopped"] is not None
    save_json(json.loads(report.to_json()), tmp_path / "report.json")
    assert read_results(tmp_path).report.provenance["stopped"] == report.provenance["stopped"]
