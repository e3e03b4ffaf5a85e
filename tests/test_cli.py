"""The command line, as a user types it."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from convexprune.cli import app
from convexprune.coresets import METHODS
from convexprune.demo import run_demo
from convexprune.digits import load_digits, train_digits_network

FACTORY = """
from torch import nn

def build():
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder: a module with a factory, trained weights, calibration data, labelled data."""
    folder = tmp_path_factory.mktemp("user")
    data = load_digits()
    (folder / "my_digits_model.py").write_text(FACTORY)
    save_file(train_digits_network(data).state_dict(), folder / "w.safetensors")
    np.savez(folder / "x.npz", x_train=data.x_train[:300].numpy(), other=np.zeros(3))
    np.savez(folder / "y.npz", x_test=data.x_test.numpy(), y_test=data.y_test.numpy())
    return folder


def run(folder: Path, monkeypatch: pytest.MonkeyPatch, *extra: str, out: str = "out") -> tuple[int, str]:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "160")
    arguments = ["my_digits_model:build", "--weights", "w.safetensors", "--calibration", "x.npz", "--out", out]
    result = CliRunner().invoke(app, ["prune", *arguments, *extra])
    return result.exit_code, result.output


def test_prune_writes_a_model_that_plain_torch_loads(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, output = run(folder, monkeypatch, "--data", "y.npz", "--key", "x_train", "--multipliers", "--eps", "0.05")
    assert code == 0, output
    report = json.loads((folder / "out" / "report.json").read_text())
    model = train_digits_network(load_digits())
    model.load_state_dict(load_file(folder / "out" / "model.safetensors"))
    kept = [int(layer.weight.count_nonzero()) for layer in (model[0], model[2], model[4])]
    assert kept == [row["nonzeros"] for row in report["layers"]]
    assert report["certified"]
    assert report["accuracy"]["before"] > 0.97
    assert f"{report['accuracy']['after']:.2%}" in output
    assert "solved" in output
    assert load_file(folder / "out" / "multipliers.safetensors")["0.0"].shape == (300, 128)


def test_nothing_is_overwritten(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "taken").mkdir()
    (folder / "taken" / "model.safetensors").write_text("mine")
    code, output = run(folder, monkeypatch, out="taken")
    assert code == 1
    assert "not overwritten" in output
    assert (folder / "taken" / "model.safetensors").read_text() == "mine"


@pytest.mark.parametrize("out", ["a file", "a file/below"])
def test_a_file_is_no_place_for_results(folder: Path, monkeypatch: pytest.MonkeyPatch, out: str) -> None:
    """Said before anything is read."""
    (folder / "a file").write_text("mine")
    code, output = run(folder, monkeypatch, "--weights", "absent.safetensors", out=out)
    assert code == 1
    assert "a file: a file, where a folder is to be; choose another --out" in output


def test_an_open_certificate_has_its_own_exit_status(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, output = run(folder, monkeypatch, "--max-iter", "2", out="short")
    assert code == 3
    assert "certificate" in output


def test_layers_and_eps_by_pattern(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, output = run(folder, monkeypatch, "--layers", "[24]", "--eps", "4=0.3", "--eps", "0.1", out="some")
    assert code == 0, output
    report = json.loads((folder / "some" / "report.json").read_text())
    assert [(row["name"], row["eps"]) for row in report["layers"]] == [("2", 0.1), ("4", 0.3)]
    assert [skipped["name"] for skipped in report["skipped"]] == ["0"]


def coreset(
    folder: Path, monkeypatch: pytest.MonkeyPatch, method: str, *extra: str, out: Path, weights: str = "w.safetensors"
) -> tuple[int, str]:
    """A coreset, without calibration data unless ``extra`` has some."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "160")
    arguments = ["my_digits_model:build", "--weights", weights, "--out", str(out), "--method", method]
    result = CliRunner().invoke(app, ["prune", *arguments, *extra])
    return result.exit_code, result.output


def widths(folder: Path) -> list[int]:
    """Of the two hidden layers."""
    state = load_file(folder / "model.safetensors")
    assert state["0.weight"].shape == (len(state["0.bias"]), 64)
    assert state["4.weight"].shape == (10, len(state["2.bias"]))
    return [len(state["0.bias"]), len(state["2.bias"])]


@pytest.mark.parametrize("method", ["lowner", "mussay", "uniform"])
@pytest.mark.parametrize(
    ("keep", "left"),
    [
        (["--keep", "0.25"], [32, 16]),
        (["--keep", "30"], [30, 30]),
        (["--keep", "0=5", "--keep", "0.5"], [5, 32]),
        (["--keep", "1e-1", "--layers", "0"], [13, 64]),
    ],
)
def test_a_coreset_needs_no_data_and_leaves_a_smaller_model(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, method: str, keep: list[str], left: list[int]
) -> None:
    code, output = coreset(folder, monkeypatch, method, *keep, out=tmp_path)
    assert code == 0, output
    assert widths(tmp_path) == left
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["output_error"] is None
    assert report["provenance"]["method"] == method
    assert not (tmp_path / "multipliers.safetensors").exists()
    assert f"{left[0]} of 128" in output


def test_the_smaller_model_is_the_next_one_s_weights(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It has the same accuracy, and the factory that builds the whole model will do."""
    first, second = tmp_path / "first", tmp_path / "second"
    code, output = coreset(
        folder, monkeypatch, "lowner", "--keep", "0.7", "--calibration", "x.npz", "--data", "y.npz", out=first
    )
    assert code == 0, output
    weights = str(first / "model.safetensors")
    code, output = coreset(
        folder, monkeypatch, "mussay", "--keep", "20", "--data", "y.npz", out=second, weights=weights
    )
    assert code == 0, output
    before, after = (json.loads((where / "report.json").read_text())["accuracy"] for where in (first, second))
    assert before["before"] > 0.97
    assert before["after"] == after["before"] > 0.5
    assert (widths(first), widths(second)) == ([90, 45], [20, 20])
    assert "20 of 90" in output
    code, output = run(folder, monkeypatch, "--weights", weights, "--data", "y.npz", out=str(tmp_path / "third"))
    assert code == 0, output  # Net-Trim takes it, too
    assert json.loads((tmp_path / "third" / "report.json").read_text())["accuracy"]["before"] == before["after"]


def test_weights_by_magnitude_and_neurons_by_option(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    code, output = coreset(folder, monkeypatch, "magnitude", "--keep", "0.1", out=tmp_path / "weights")
    assert code == 0, output
    state = load_file(tmp_path / "weights" / "model.safetensors")
    assert [int(state[f"{name}.weight"].count_nonzero()) for name in "024"] == [819, 819, 64]
    code, output = coreset(
        folder, monkeypatch, "magnitude", "--keep", "9", "--option", "items=neurons", out=tmp_path / "neurons"
    )
    assert code == 0, output
    assert widths(tmp_path / "neurons") == [9, 9]


def test_options_scope_order_baseline_mask_and_seed_reach_the_method(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    options = ["--option", "beta=2", "--option", "sampling=draws", "--option", "construction=peeling"]
    flags = ["--scope", "network", "--order", "top-down", "--baseline", "--no-remove", "--seed", "3"]
    keep = ["--keep", "0.5", "--calibration", "x.npz"]
    code, output = coreset(folder, monkeypatch, "lowner", *keep, *options, *flags, out=tmp_path)
    assert code == 0, output
    report = json.loads((tmp_path / "report.json").read_text())
    told = report["provenance"]
    assert told["options"] == {
        "beta": 2,
        "construction": "peeling",
        "points": "outgoing",
        "sampling": "draws",
    }
    assert [told[key] for key in ("scope", "order", "removed", "seed")] == ["network", "top-down", False, 3]
    assert all(row["uniform_error"] > 0 for row in report["layers"][:2])
    model = train_digits_network(load_digits())
    model.load_state_dict(load_file(tmp_path / "model.safetensors"))  # masked: the shapes are as they were
    kept = [int(layer.weight.any(1).sum()) for layer in (model[0], model[2])]
    assert kept == [row["kept_items"] for row in report["layers"][:2]]


def test_a_guarantee_instead_of_a_size(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    code, output = coreset(
        folder, monkeypatch, "mussay", "--eps", "0=2", "--eps", "0.01", "--delta", "0.5", out=tmp_path
    )
    assert code == 0, output
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["certified"]
    assert [row["guarantee"] for row in report["layers"]] == [
        {"eps": 2, "delta": 0.5},
        {"eps": 0.01, "delta": 0.5},
        None,
    ]
    assert [row["status"] for row in report["layers"]] == ["sampled", "kept whole", "inputs only"]
    assert "kept whole" in output


def test_an_assumption_that_fails_has_the_exit_status_of_an_open_certificate(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    promise = ["--eps", "2", "--delta", "0.5", "--option", "beta=0.001"]
    code, output = coreset(folder, monkeypatch, "mussay", *promise, "--calibration", "x.npz", out=tmp_path / "a")
    assert code == 3
    assert "assumption fails" in output
    assert "does not hold" in output
    assert (tmp_path / "a" / "model.safetensors").exists()
    code, output = coreset(folder, monkeypatch, "mussay", *promise, out=tmp_path / "b")
    assert code == 0, output  # nothing says that it fails
    assert "cannot be checked" in output


@pytest.mark.parametrize(
    ("method", "extra", "says"),
    [
        ("mussay", [], "--keep: expected a ratio"),
        ("mussay", ["--keep", "0.5", "--eps", "0.1"], "either --keep, or --eps with --delta"),
        ("mussay", ["--keep", "0.5", "--eps", "0.1", "--delta", "0.1"], "either --keep, or --eps with --delta"),
        ("mussay", ["--eps", "0.1"], "either --keep, or --eps with --delta"),
        ("mussay", ["--delta", "0.1"], "either --keep, or --eps with --delta"),
        ("mussay", ["--eps", "-1", "--delta", "0.1"], "eps: expected a number > 0"),
        ("mussay", ["--eps", "1", "--delta", "2"], "delta: expected a probability"),
        ("mussay", ["--eps", "a", "--delta", "0.1"], "expected a number or PATTERN=number"),
        ("mussay", ["--keep", "half"], "expected a number or PATTERN=number"),
        ("mussay", ["--keep", "1.5"], "expected a ratio in (0, 1]"),
        ("mussay", ["--keep", "0"], "expected a count ≥ 1"),
        ("mussay", ["--keep", "nan"], "expected a number or PATTERN=number"),
        ("mussay", ["--keep", "5", "--scope", "network"], "expected one ratio"),
        ("mussay", ["--keep", "0.5", "--scope", "model"], "expected 'layer' or 'network'"),
        ("mussay", ["--keep", "0.5", "--order", "up"], "expected 'bottom-up' or 'top-down'"),
        ("mussay", ["--keep", "0.5", "--option", "beta"], "expected NAME=VALUE"),
        ("mussay", ["--keep", "0.5", "--option", "bta=1"], "did you mean 'beta'"),
        ("mussay", ["--keep", "0.5", "--option", "beta=-1"], "beta: expected a positive number"),
        ("mussay", ["--keep", "0.5", "--option", "beta=big"], "beta: expected a positive number"),
        ("mussay", ["--keep", "0.5", "--option", "seed=1"], "has no option 'seed'"),
        ("mussay", ["--keep", "0.5", "--option", "layers=0"], "has no option 'layers'"),
        ("mussay", ["--keep", "0.5", "--layers", "conv*"], "conv*"),
        ("uniform", ["--keep", "0.5", "--option", "items=filters"], "expected one of neurons, edges"),
        ("uniform", ["--eps", "0.1", "--delta", "0.1"], "proves nothing"),
        ("lownr", ["--keep", "0.5"], "did you mean 'lowner'"),
        ("net-trim", [], "give --calibration"),
        ("net-trim", ["--keep", "0.5", "--no-remove"], "--keep, --remove: for coresets only"),
        ("net-trim", ["--delta", "0.5", "--option", "beta=1"], "--delta, --option: for coresets only"),
        ("net-trim", ["--scope", "layer"], "--scope: for coresets only"),
        ("mussay", ["--keep", "0.5", "--tol", "0.1", "--fit", "ball"], "--fit, --tol: for Net-Trim only"),
        *((name, ["--keep", "0.5"], "give calibration data") for name in ("corenet", "pfp", "sipp")),
    ],
)
def test_errors_of_coresets_are_for_people(
    folder: Path, monkeypatch: pytest.MonkeyPatch, method: str, extra: list[str], says: str, tmp_path: Path
) -> None:
    code, output = coreset(folder, monkeypatch, method, *extra, out=tmp_path / "none")
    assert code == 1, output
    assert says in output
    assert "Traceback" not in output
    assert not (tmp_path / "none").exists()


def test_methods_are_listed_with_their_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    result = CliRunner().invoke(app, ["methods"])
    assert result.exit_code == 0
    for name, kind in METHODS.items():
        assert f" {name} " in result.output
        for option in dataclasses.fields(kind):  # type: ignore[arg-type]
            assert f"{option.name}={option.default}" in result.output


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        (["--eps", "-1"], "InvalidTolerance"),
        (["--eps", "a lot"], "expected a number or PATTERN=number"),
        (["--solver", "adm"], "did you mean 'admm'"),
        (["--key", "nothing"], "x_train"),
        (["--weights", "damaged.safetensors"], "DamagedFile"),
        (["--weights", "absent.safetensors"], "absent.safetensors"),
        (["--data", "y.npz", "--label-key", "absent"], "y_test"),
        (["--layers", "conv*"], "conv*"),
    ],
)
def test_errors_are_for_people(
    folder: Path, monkeypatch: pytest.MonkeyPatch, extra: list[str], says: str, tmp_path: Path
) -> None:
    (folder / "damaged.safetensors").write_bytes((folder / "w.safetensors").read_bytes()[:-9])
    code, output = run(folder, monkeypatch, *extra, out=str(tmp_path / "none"))
    assert code == 1
    assert says in output
    assert "Traceback" not in output
    assert not (tmp_path / "none").exists()


def test_the_demo_beats_magnitude_pruning_and_writes_everything(tmp_path: Path) -> None:
    result = run_demo(tmp_path / "demo", eps=(0.05, 0.2))
    assert result.dense_accuracy > 0.97
    for row in result.rows:
        assert row.report.certified
        assert row.accuracy > row.magnitude_accuracy
    assert result.rows[0].report.nonzeros > result.rows[1].report.nonzeros
    assert result.picture.read_bytes().startswith(b"\x89PNG")
    model = train_digits_network(load_digits())
    model.load_state_dict(load_file(result.model))
    sizes = {row.report.nonzeros for row in result.rows}
    assert sum(int(model[i].weight.count_nonzero()) for i in (0, 2, 4)) in sizes
    assert len(json.loads(result.json.read_text())["rows"]) == 2


def test_solvers_are_listed() -> None:
    output = CliRunner().invoke(app, ["solvers"]).output
    assert all(name in output for name in ("admm", "published", "cvxpy", "clarabel", "scs", "relaxation"))


def test_a_global_seed_is_not_disturbed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train_digits_network(load_digits())
    assert torch.equal(torch.rand(3), expected)
