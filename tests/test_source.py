"""Data on the command line: several arrays by name, masks among them, and samples chosen at random."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from convexprune.cli.app import app
from convexprune.cli.source import read_source
from convexprune.files.weights import save_json
from convexprune.runs.results import sealed
from convexprune.solvers.errors import InvalidInput, ShapeMismatch

Array = np.ndarray[Any, Any]
MODEL = """
import torch
from torch import nn

class Pooled(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.layer, self.head = nn.Embedding(30, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, input_ids, attention_mask, labels=None):
        h = torch.relu(self.layer(self.embed(input_ids)))
        mask = attention_mask[..., None].to(h)
        return self.head((h * mask).sum(1) / mask.sum(1))

def sevens():
    return nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 2))
"""
WRITERS: dict[str, Callable[[dict[str, Array], Path], object]] = {
    ".npz": lambda arrays, path: np.savez(path, **arrays),
    ".safetensors": lambda arrays, path: save_file({k: torch.from_numpy(a) for k, a in arrays.items()}, path),
    ".pt": lambda arrays, path: torch.save({k: torch.from_numpy(a) for k, a in arrays.items()}, path),
}


SAMPLES = 60


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder: a module, the weights of its text model, and padded texts with labels."""
    (tmp_path / "my_text_model.py").write_text(MODEL)
    names: dict[str, Any] = {}
    exec(MODEL, names)  # noqa: S102 - as the command imports it
    torch.manual_seed(1)
    save_file(names["Pooled"]().state_dict(), tmp_path / "w.safetensors")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    return tmp_path


def texts() -> dict[str, Array]:
    """Tokens, the shorter samples filled up, their mask, and labels."""
    rng = np.random.default_rng(0)
    mask = np.arange(12)[None] < rng.integers(3, 6, (SAMPLES, 1))
    ids = np.where(mask, rng.integers(1, 30, (SAMPLES, 12)), 0)
    return {"input_ids": ids, "attention_mask": mask.astype(np.int64), "labels": np.arange(SAMPLES) % 3}


def pruned(folder: Path, *extra: str, out: str = "out", data: str = "x.npz") -> Any:
    source = ["my_text_model:Pooled", "--weights", "w.safetensors", "--calibration", data]
    result = CliRunner().invoke(app, ["prune", *source, "--out", str(folder / out), "--json", *extra])
    return result.exit_code, json.loads(result.stdout)


@pytest.mark.parametrize("suffix", WRITERS)
def test_padded_text_is_pruned_with_its_mask(folder: Path, suffix: str) -> None:
    arrays, name = texts(), f"x{suffix}"
    WRITERS[suffix](arrays, folder / name)
    visible = int(arrays["attention_mask"].sum())
    labelled = ("--data", name, "--label-key", "labels")
    status, told = pruned(folder, "--eps", "0.1", *labelled, data=name)
    assert status == 0, told
    rows = {row["name"]: row["samples"] for row in told["report"]["layers"]}
    assert rows == {"layer": visible, "head": SAMPLES}
    assert any("attention_mask hides" in line for line in told["report"]["head"])
    assert 0 <= told["report"]["accuracy"]["before"] <= 1
    assert told["notes"] == []  # what sparsity buys was measured on a batch
    assert pruned(folder, "--eps", "0.1", *labelled, data=name)[1]["status"] == "finished before"
    source = ["my_text_model:Pooled", "--weights", "w.safetensors", "--calibration", name]
    assert CliRunner().invoke(app, ["verify", "out", *source]).exit_code == 0
    assert CliRunner().invoke(app, ["report", "out"]).exit_code == 0
    _, told = pruned(folder, "--eps", "0.1", "--no-mask", out="all", data=name)
    assert told["report"]["mask"] is None
    assert told["report"]["layers"][0]["samples"] == arrays["input_ids"].size
    assert CliRunner().invoke(app, ["verify", "all", *source]).exit_code == 0


@pytest.mark.parametrize("method", ["net-trim", "sipp"])
def test_a_mask_goes_by_any_name(folder: Path, method: str) -> None:
    """One that the model does not take decides which rows count all the same, and in a verification, too."""
    arrays = texts()
    np.savez(folder / "x.npz", **arrays, keep=arrays["attention_mask"] > 0, other=np.full((SAMPLES, 2), 3))
    asked = ["--eps", "0.1"] if method == "net-trim" else ["--method", method, "--sparsity", "0.5"]
    _, told = pruned(folder, "--mask", "keep", "--layers", "layer", *asked)
    assert told["report"]["layers"][0]["samples"] == int(arrays["attention_mask"].sum())
    assert told["report"]["mask"]["name"] == "keep"
    source = ["my_text_model:Pooled", "--weights", "w.safetensors", "--calibration", "x.npz"]
    assert CliRunner().invoke(app, ["verify", "out", *source]).exit_code == 0
    report = json.loads((folder / "out" / "report.json").read_text())
    report["mask"]["rows_left_out"]["layer"] += 1
    save_json(sealed(folder / "out", report), folder / "out" / "report.json")
    assert "mask.rows_left_out.layer is" in CliRunner().invoke(app, ["verify", "out", *source]).output
    for wrong in (["--mask", "absent"], ["--mask", "keep", "--no-mask"], ["--mask", "other"]):
        status, told = pruned(folder, *wrong, *asked, out="wrong")
        assert status == 1
        assert "mask" in told["error"]["message"]


def test_a_key_names_the_array_for_the_first_argument(folder: Path) -> None:
    arrays = texts()
    np.savez(folder / "x.npz", tokens=arrays["input_ids"], attention_mask=arrays["attention_mask"])
    read = read_source("my_text_model:Pooled", folder / "w.safetensors", folder / "x.npz", "tokens")
    assert list(read.inputs[0]) == ["input_ids", "attention_mask"]
    assert torch.equal(read.inputs[0]["input_ids"], torch.from_numpy(arrays["input_ids"]))
    np.savez(folder / "x.npz", input_ids=arrays["input_ids"], attention_mask=arrays["attention_mask"][1:])
    with pytest.raises(ShapeMismatch, match=r"\[59, 60\] samples"):
        read_source("my_text_model:Pooled", folder / "w.safetensors", folder / "x.npz")


def test_one_array_stays_one_tensor(folder: Path) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.ReLU(), torch.nn.Linear(5, 2))
    save_file(model.state_dict(), folder / "s.safetensors")
    x = np.random.default_rng(0).random((30, 7), dtype=np.float32)
    np.savez(folder / "x.npz", x=x, y=np.arange(30))
    read = read_source("my_text_model:sevens", folder / "s.safetensors", folder / "x.npz")
    assert torch.equal(read.inputs, torch.from_numpy(x))
    assert torch.equal(read.batch, torch.from_numpy(x))
    with pytest.raises(InvalidInput, match="no array 'm'"):
        read_source("my_text_model:sevens", folder / "s.safetensors", folder / "x.npz", mask="m")


@pytest.mark.parametrize("by", ["order", "labels"])
def test_samples_are_of_all_parts_of_the_data_and_the_same_each_time(folder: Path, by: str) -> None:
    """The first ones of data that are sorted by class are of one class; labels in any order have their share."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.ReLU(), torch.nn.Linear(5, 2))
    save_file(model.state_dict(), folder / "s.safetensors")
    classes = np.repeat(np.arange(10), 30)
    if by == "labels":
        classes = np.random.default_rng(1).permutation(classes)
    x = np.repeat(classes[:, None], 7, axis=1).astype(np.float32)
    np.savez(folder / "x.npz", x=x, y=classes)
    files = (folder / "s.safetensors", folder / "x.npz")
    key = "y" if by == "labels" else None
    read = read_source("my_text_model:sevens", *files, samples=50, holdout=20, labels_key=key)
    both = torch.cat([read.inputs, read.holdout])[:, 0]
    assert len(read.inputs) == 30
    assert torch.equal(both.long().bincount(), torch.full((10,), 5))
    assert read.labels is None or torch.equal(read.labels, read.inputs[:, 0].long())
    assert torch.equal(
        read_source("my_text_model:sevens", *files, samples=50, holdout=20, labels_key=key).inputs, read.inputs
    )
    assert "fitted to 50 of 300 samples: a random choice" in read.notices[0]
    arguments = ["my_text_model:sevens", "--weights", "s.safetensors", "--calibration", "x.npz", "--samples", "50"]
    result = CliRunner().invoke(app, ["prune", *arguments, "--out", "out", "--json"])
    told = json.loads(result.stdout)["report"]
    assert told["samples"] == 50
    assert any("fitted to 50 of 300 samples" in line for line in told["head"])
    assert CliRunner().invoke(app, ["verify", "out", *arguments]).exit_code == 0
    balanced = [*arguments, "--labels-key", "y"]  # of any method: each label has its share of the samples
    result = CliRunner().invoke(
        app, ["prune", *balanced, "--out", "balanced", "--method", "wanda", "--sparsity", "0.5"]
    )
    assert result.exit_code == 0, result.output
    assert "of each label its share" in " ".join(result.output.split())
    assert CliRunner().invoke(app, ["verify", "balanced", *balanced]).exit_code == 0
