"""The command line, as a user types it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from convexprune.cli import app
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
