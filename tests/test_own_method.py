"""A scoring method that someone else wrote and installed: one file, and the house does the rest.

It is a package of its own, found by its entry point alone; nothing in the library knows of it.
"""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from joblib.externals.loky import get_reusable_executor
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

from convexprune import Neurons, Options, Sparsity, keep_masks_, prune_, verify
from convexprune.cli.app import app
from convexprune.pruners import available_pruners

METHOD = '''"""Weights times how far their inputs are spread: what never changes can be made up for by a bias."""

from dataclasses import dataclass

from torch import Tensor

from convexprune.options import Options
from convexprune.pruners import Scoring
from convexprune.runs.problem import Problem


@dataclass(frozen=True)
class Spread(Scoring):
    """The largest |w_ij| times the mean deviation of x_i, to a power.

    Args:
        power: Of the deviation.
    """

    power: float = 1.0
    needs_data = True

    def score(self, problem: Problem, options: Options) -> Tensor:
        """|W|·E|x − E x|^power [N, M], without the bias."""
        X = problem.inputs[:, : problem.rows]
        spread = (X - X.mean(0)).abs().mean(0) ** self.power
        return problem.stored[: problem.rows].abs() * spread[:, None]
'''
MODEL = """
from torch import nn

def build():
    return nn.Sequential(nn.Conv1d(4, 8, 3, padding=1, groups=2), nn.BatchNorm1d(8), nn.ReLU(), nn.Flatten(),
                         nn.Linear(48, 16), nn.ReLU(), nn.Linear(16, 3))
"""


class Attending(nn.Module):
    """Attention between two linear layers, and a layer that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attention = nn.Linear(6, 8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.mix, self.head = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.embed(x)
        h = h + self.attention(h, h, h, need_weights=False)[0]
        return self.head(torch.relu(self.mix(torch.relu(self.mix(h)))))


@pytest.fixture(autouse=True)
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the path with the method's package, a model, its weights and data; the current one."""
    assert len(METHOD.splitlines()) < 40
    (tmp_path / "their_method.py").write_text(METHOD)
    (tmp_path / "their_model.py").write_text(MODEL)
    info = tmp_path / "their_method-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-method\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[convexprune.pruners]\nspread = their_method:Spread\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))  # of workers
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    save_file(convolving().state_dict(), tmp_path / "w.safetensors")
    np.savez(tmp_path / "x.npz", x=np.asarray(torch.randn(40, 4, 6, generator=torch.Generator().manual_seed(1))))
    return tmp_path


def convolving() -> Any:
    """The model of the factory, with statistics as training leaves them."""
    names: dict[str, Any] = {}
    exec(MODEL, names)  # noqa: S102 - as the command imports it
    torch.manual_seed(2)
    model = names["build"]()
    model(torch.randn(60, 4, 6))
    return model.eval()


def attending() -> Attending:
    torch.manual_seed(3)
    return Attending().eval()


NETWORKS = {
    "Conv1d in groups, a batch norm": (convolving, torch.randn(40, 4, 6, generator=torch.Generator().manual_seed(1))),
    "attention, a layer used twice": (attending, torch.randn(20, 5, 6, generator=torch.Generator().manual_seed(1))),
}


def test_it_is_listed_with_its_options() -> None:
    info = available_pruners()["spread"]
    assert info.options == {"power": 1.0}
    assert info.missing is None
    listed = CliRunner().invoke(app, ["methods"])
    assert "spread" in listed.output


@pytest.mark.parametrize("refit", [False, True], ids=["as trained", "refitted"])
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(
    "target", [Sparsity(0.75), Sparsity(0.75, "network"), Sparsity("2:4")], ids=["layers", "network", "2:4"]
)
def test_it_takes_every_network_and_budget(name: str, target: Sparsity, refit: bool, tmp_path: Path) -> None:
    build, x = NETWORKS[name]
    model: Any = build()
    report = prune_(model, x, target, method="spread", options=Options(refit=refit), run=tmp_path / "run")
    weights = sum(row.nonzeros_before for row in report.layers)
    kept = sum(row.nonzeros for row in report.layers)
    assert kept <= weights // 2 if target.value == "2:4" else abs(kept - weights / 4) <= len(report.layers)
    assert report.certified
    found = verify(build(), x, tmp_path / "run")
    assert found.ok
    assert found.complete


def test_neurons_are_really_removed() -> None:
    build, x = NETWORKS["Conv1d in groups, a batch norm"]
    model: Any = build()
    prune_(model, x, Neurons(0.5), method="spread", options=Options(refit=True))
    assert model[4].out_features == 8
    assert model[6].in_features == 8


@pytest.mark.parametrize("name", NETWORKS)
def test_a_run_goes_on_and_workers_find_the_same(name: str, tmp_path: Path) -> None:
    build, x = NETWORKS[name]
    whole, part, apart = build(), build(), build()
    options = Options(mode="parallel")
    prune_(whole, x, Sparsity(0.75), method="spread", options=options)
    seen: list[str] = []

    def progress(stage: str, done: int, total: int) -> None:
        seen.extend([stage] if stage != "capture" else [])

    first = prune_(
        part,
        x,
        Sparsity(0.75),
        method="spread",
        options=options,
        run=tmp_path / "r",
        stop=lambda: len(seen) > 1,
        progress=progress,
    )
    again = build()
    prune_(again, x, Sparsity(0.75), method="spread", options=options, run=tmp_path / "r")
    get_reusable_executor(max_workers=1).shutdown(kill_workers=True)  # of earlier tests, which know no such package
    prune_(apart, x, Sparsity(0.75), method="spread", options=options, jobs=2)
    assert first.layers
    expected = list(whole.state_dict().values())
    for other in (again, apart):
        assert all(map(torch.equal, other.state_dict().values(), expected))


def test_the_command_line_prunes_reports_and_verifies(installed: Path) -> None:
    given = ["their_model:build", "--weights", "w.safetensors", "--calibration", "x.npz"]
    own = ["--method", "spread", "--method-option", "power=0.5", "--target", "sparsity 0.75 scope=network"]
    result = CliRunner().invoke(app, ["prune", *given, *own, "--out", "out"])
    assert result.exit_code == 0, result.output
    told = json.loads((installed / "out" / "report.json").read_text())
    state = load_file(installed / "out" / "model.safetensors")
    assert told["nonzeros"] == sum(int(state[f"{row['name']}.weight"].count_nonzero()) for row in told["layers"])
    for command in (["report", "out"], ["verify", "out", *given]):
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, result.output
    model = convolving()
    x = torch.from_numpy(np.load("x.npz")["x"])
    from their_method import Spread

    prune_(model, x, Sparsity(0.75, "network"), method=Spread(power=0.5))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_masks_keep_its_zeros() -> None:
    build, x = NETWORKS["Conv1d in groups, a batch norm"]
    model: Any = build()
    prune_(model, x, Sparsity(0.75), method="spread")
    zeros = copy.deepcopy(model[4].weight) == 0
    keep_masks_(model)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    model(x).square().sum().backward()
    optimiser.step()
    assert bool((model[4].weight[zeros] == 0).all())
