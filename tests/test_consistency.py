"""Results that were edited by hand: what they say is compared with all that lies beside them."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from calls import prune_
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from convexprune import save_weights
from convexprune.errors import DamagedFile
from convexprune.files.weights import save_json
from convexprune.page.consistency import check_results, read_results, seal
from convexprune.pruners.uniform import Uniform
from convexprune.runs.journal import Journal, Record, read_json

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


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """What the command line leaves in its folder, for each recipe."""
    found = {}
    for name, recipe in RECIPES.items():
        folder, (model, x) = tmp_path_factory.mktemp(name), network()
        report = prune_(model, x, run=folder, **recipe)
        save_weights(model, folder / "model.safetensors")
        data = json.loads(report.to_json())
        save_json(data | {"sha256": seal(data, folder / "model.safetensors")}, folder / "report.json")
        found[name] = folder
    return found


def copied(written: Written, name: str, target: Path) -> Path:
    return Path(shutil.copytree(written[name], target / name))


def reported(folder: Path, change: Callable[[dict[str, Any]], object], *, sealed: bool) -> None:
    """The report changed, with a SHA-256 that is right or the old one."""
    report = read_json(folder / "report.json")
    change(report)
    told = {"sha256": seal(report, folder / "model.safetensors")} if sealed else {}
    save_json(report | told, folder / "report.json")


@pytest.mark.parametrize("name", RECIPES)
def test_results_as_written_agree_and_the_page_says_what_was_not_checked(written: Written, name: str) -> None:
    checks = read_results(written[name]).checks
    assert any("SHA-256" in text for text in checks.done)
    assert any("nonzeros were counted in model.safetensors" in text for text in checks.done)
    assert ("which holds the weights of the journal" in " ".join(checks.done)) == ("neuron" not in name)
    assert any("as recorded" in text for text in checks.open)


def in_row(key: str, value: Any) -> Callable[[dict[str, Any]], object]:
    return lambda report: report["layers"][-1].update({key: value})


def everywhere(value: int) -> Callable[[dict[str, Any]], None]:
    """Nonzeros that add up."""

    def change(report: dict[str, Any]) -> None:
        report["nonzeros"] += value - report["layers"][-1]["nonzeros"]
        report["layers"][-1]["nonzeros"] = value

    return change


EDITS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "error": (in_row("output_error", 1e-3), "output_error"),
    "nonzeros": (in_row("nonzeros", 1), "nonzeros"),
    "nonzeros and total": (everywhere(3), "nonzeros"),
    "total": (lambda report: report.update(nonzeros=3), "nonzeros is 3"),
    "status": (in_row("status", "iteration limit"), "iteration limit"),
    "name": (in_row("name", "other"), "'other'"),
    "seconds": (in_row("seconds", 1e-3), "seconds"),
    "verdict": (lambda report: report.update(head=["certified: solved (9)"]), "head"),
    "certified": (lambda report: report.update(certified=not report["certified"]), "certified is"),
    "network error": (lambda report: report.update(output_error=1e-3), "network.error"),
}
ASKED = {
    "eps": lambda report: report["provenance"]["target"].update(value=0.01),
    "sparsity": lambda report: report["provenance"]["target"].update(value=0.9),
    "cascade": lambda report: report["provenance"].update(tol=1e-9),
    "coreset": lambda report: report["provenance"].update(method="lowner"),
}


PROVEN = ("eps", "sparsity", "network", "neurons")
CASES = [(name, edit) for name in RECIPES for edit in EDITS if name in PROVEN or edit != "network error"]


@pytest.mark.parametrize(("name", "edit"), CASES)
def test_edited_reports_are_refused(written: Written, tmp_path: Path, name: str, edit: str) -> None:
    """By their SHA-256, and without it by what lies beside them."""
    folder, (change, told) = copied(written, name, tmp_path), EDITS[edit]
    reported(folder, change, sealed=False)
    with pytest.raises(DamagedFile, match="changed after they were written"):
        read_results(folder)
    reported(folder, lambda report: None, sealed=True)
    with pytest.raises(DamagedFile, match=told):
        read_results(folder)


@pytest.mark.parametrize("name", ASKED)
def test_what_was_asked_is_compared_with_the_run(written: Written, tmp_path: Path, name: str) -> None:
    folder = copied(written, name, tmp_path)
    reported(folder, ASKED[name], sealed=True)
    with pytest.raises(DamagedFile, match=r"provenance\."):
        read_results(folder)


def test_without_a_journal_a_status_needs_its_figures(written: Written, tmp_path: Path) -> None:
    report = read_json(written["eps"] / "report.json")
    del report["sha256"]
    assert "no checksum" in " ".join(check_results(tmp_path, report).open)
    for key in ("gap", "violation"):
        edited = copy.deepcopy(report)
        edited["layers"][0][key] = 0.5
        with pytest.raises(DamagedFile, match=f"status 'solved' with a {key} of 0.5"):
            check_results(tmp_path, edited)


@pytest.mark.parametrize("name", ["eps", "cascade", "sparsity", "coreset"])
def test_other_weights_in_the_file_or_in_an_entry_are_found(written: Written, tmp_path: Path, name: str) -> None:
    """As many of them, so that no count tells."""
    folder = copied(written, name, tmp_path)
    state = {key: value.clone() for key, value in load_file(folder / "model.safetensors").items()}
    save_file({**state, "6.weight": 2 * state["6.weight"]}, folder / "model.safetensors")
    reported(folder, lambda report: None, sealed=True)
    with pytest.raises(DamagedFile, match=r"'6': model\.safetensors holds other weights than the journal"):
        read_results(folder)

    folder = copied(written, name, tmp_path / "entry")
    journal, described = Journal.existing(folder)
    (record,) = [record for record in journal.entries() if record.data["layer"] == "6"]
    tensors = {**record.tensors, "stored.0": 2 * record.tensors["stored.0"]}
    with Journal(folder, {key: described[key] for key in ("model", "data", "recipe")}) as writing:
        writing.put("6", record.data["goal"], Record(record.data, tensors))
    with pytest.raises(DamagedFile, match=r"'6': model\.safetensors holds other weights than the journal"):
        read_results(folder)


def test_a_layer_without_an_entry_is_told_of(written: Written, tmp_path: Path) -> None:
    folder = copied(written, "eps", tmp_path)
    for path in (folder / "layers").glob("6-*"):
        path.unlink()
    with pytest.raises(DamagedFile, match="layer '6' has no entry in the journal"):
        read_results(folder)


def test_of_a_run_that_was_stopped_the_layer_that_was_cut_short_has_no_entry(tmp_path: Path) -> None:
    model, x = network()
    begun: list[str] = []
    report = prune_(model, x, 0.1, run=tmp_path, callback=lambda name, _: begun.append(name), stop=lambda: "4" in begun)
    assert report.provenance["stopped"] is not None
    save_json(json.loads(report.to_json()), tmp_path / "report.json")
    assert read_results(tmp_path).checks.done
