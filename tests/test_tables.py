"""Reports, previews and verifications as tables: a line a layer, and first what a reader should know first."""

import copy
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from calls import prune_
from torch import Tensor, nn

from convexprune import Eps, verify
from convexprune.files.weights import save_json
from convexprune.page.page import write_page
from convexprune.preview import preview
from convexprune.report.tables import short_names

NAMES = [f"bert.encoder.layer.{i}.{part}" for i in range(12) for part in ("attention.self.query", "output.dense")]


def encoder() -> nn.Module:
    """Layers with the long names of a transformer."""
    torch.manual_seed(0)
    block = nn.ModuleDict({"attention": nn.ModuleDict({"projection": nn.Linear(6, 6)}), "output": nn.Linear(6, 6)})

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.transformer_encoder = nn.ModuleDict({"layers": nn.ModuleList(copy.deepcopy(block) for _ in range(3))})
            self.classifier = nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.transformer_encoder["layers"]:
                x = x + layer["output"](torch.tanh(layer["attention"]["projection"](x)))
            return self.classifier(x)

    return Encoder().eval()


def lines_of(text: str) -> list[str]:
    """Of the body of a table: behind the rule."""
    lines = text.splitlines()
    rule = next(number for number, line in enumerate(lines) if line.startswith("─"))
    return lines[rule + 1 :]


@pytest.mark.parametrize("room", [16, 20, 24, 30])
def test_short_names_fit_and_stay_apart(room: int) -> None:
    names, prefix = short_names([*NAMES, "bert.pooler.dense", "classifier"], room)
    assert prefix == "bert.encoder.layer."
    assert len(set(names)) == len(names)
    assert names[-1] == "classifier"
    assert max(map(len, names)) <= room or room < 20  # names that would be alike stay whole
    assert short_names(NAMES, 80) == (NAMES, "")
    assert short_names([], 10) == ([], "")


def test_a_layer_takes_one_line_of_80_characters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    model, x = encoder(), torch.randn(50, 6)
    trained = copy.deepcopy(model)
    shown = [preview(model, x, Eps(0.1)), prune_(model, x, 0.1, run=tmp_path), verify(trained, x, tmp_path)]
    for table in shown:
        lines = lines_of(str(table))
        assert max(map(len, str(table).splitlines())) <= 80
        assert [line.split()[0] for line in lines[:7]] == [
            *(f"…{i}.{part}" for i in range(3) for part in ("attention.projection", "output")),
            "classifier",
        ]
        assert "… at the start of a name stands for transformer_encoder.layers." in str(table)
    assert {row["name"] for row in shown[1].to_dict()["layers"]} >= {"transformer_encoder.layers.0.output"}


def test_the_head_says_where_cascade_raised_an_eps(tmp_path: Path) -> None:
    """Beside "certified": in how many layers, what was asked for, and the largest that is kept."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    report = prune_(model, torch.randn(100, 8), {"0": 0.2, "*": 0.02}, mode="cascade")
    raised = [row for row in report.layers if row.raised]
    largest = max(raised, key=lambda row: row.eps)
    assert raised
    assert report.certified
    assert all(row.eps_allowed == 0.02 and math.isclose(row.raised[1], row.eps) for row in raised)
    first, second = report.head[:2]
    assert first == "certified: solved (3)"
    assert f"{len(raised)} layer" in second
    assert f"to {largest.eps:.4g}" in second
    assert "0.02 allowed" in second
    assert str(report).startswith(f"{first} ")
    data = json.loads(report.to_json())
    assert data["head"] == list(report.head)
    save_json(report.to_dict(), tmp_path / "report.json")
    page = write_page(tmp_path).read_text()
    assert page.index("Eps was raised") < page.index("Layer by layer")


def test_the_head_says_where_an_activation_that_was_named_does_not_hold() -> None:
    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            z = self.layer(x)
            return torch.relu(z) + 0.1 * z

    report = prune_(Beside(), torch.randn(50, 6), 0.1, activations={"layer": "relu"})
    assert report.layers[0].fit == "ball"
    assert "activations: more than the ReLU reads layer: errors count before it there" in report.head


def test_the_head_says_nothing_of_eps_that_are_kept() -> None:
    report = prune_(encoder(), torch.randn(50, 6), 0.1)
    assert report.head == ("certified: solved (7)", *report.notices)
    first, *others = report.layers
    open_ = replace(report, layers=(replace(first, status="iteration limit"), *others))
    assert open_.head[0] == "not certified: solved (6), iteration limit (1)"
    assert replace(report, provenance={**report.provenance, "stopped": "time limit"}).head[0].startswith("not finished")
    report = prune_(encoder(), torch.randn(50, 6), sparsity=0.5)
    assert report.head == ("measured, not certified: no bound (7)", *report.notices)
    assert not any("eps was raised" in line for line in report.notices)


def test_a_layer_that_lost_inputs_alone_is_not_said_to_be_left(tmp_path: Path) -> None:
    """With neurons a layer is in the table or among those that are left, and the page says what the table says."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 3))
    report = prune_(model, torch.randn(50, 8), sparsity=0.5, unit="neurons")
    assert [row.name for row in report.layers] == ["0", "2"]
    assert report.skipped == ()
    [note] = report.layers[1].remarks()
    assert note.startswith("keeps its neurons: its outputs are the network's outputs")
    assert "not pruned" not in str(report)
    save_json(report.to_dict(), tmp_path / "report.json")
    page = write_page(tmp_path).read_text()
    assert "Not certified" not in page
    assert "6 of 12" in page
    assert "keeps its neurons" in page
