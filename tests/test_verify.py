"""Verifying a run: what is recorded is found to hold, and whatever was changed is found."""

import copy
import importlib.util
import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from calls import prune_
from torch import Tensor, nn

import convexprune
from convexprune import Data, Report, verify
from convexprune.errors import DamagedFile, OtherRun
from convexprune.files.weights import save_json
from convexprune.network.weights import save_weights
from convexprune.runs.executors import LayerTask
from convexprune.runs.journal import Journal, Record
from convexprune.runs.records import Judged
from convexprune.solvers.errors import UnknownSolver
from convexprune.solvers.methods import registry
from convexprune.verification import Verification

Made = tuple[nn.Module, Tensor]


def mlp() -> Made:
    """Outputs that depend on the inputs, so that no layer's answer is its bias alone."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 4))
    with torch.no_grad():
        for layer in (model[0], model[2], model[4]):
            layer.weight *= 3
    return model, torch.rand(60, 8)


def double() -> Made:
    model, x = mlp()
    return model.double(), x.double()


def half() -> Made:
    model, x = mlp()
    return model.bfloat16(), x.bfloat16()


def grouped() -> Made:
    torch.manual_seed(0)
    first, norm = nn.Conv2d(2, 4, 3, stride=2), nn.BatchNorm2d(4)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    second = nn.Conv2d(4, 6, 2, groups=2, bias=False)
    return nn.Sequential(first, norm, nn.ReLU(), second, nn.Flatten(), nn.Linear(24, 3)), torch.rand(30, 2, 7, 7)


def many() -> Made:
    """So many samples that a linear fit sees their products alone."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)), torch.rand(1500, 6)


RUNS: list[tuple[Callable[[], Made], dict[str, Any]]] = [
    (mlp, {}),
    (mlp, {"mode": "cascade"}),
    (mlp, {"fit": "net-trim", "mode": "cascade"}),
    (mlp, {"refit": True}),
    (mlp, {"max_iter": 2}),
    (mlp, {"sparsity": 0.6}),
    (mlp, {"sparsity": "2:4", "mode": "cascade"}),
    (mlp, {"sparsity": 0.6, "search": "path"}),
    (mlp, {"sparsity": 0.6, "scope": "network"}),
    (mlp, {"sparsity": {"2": "2:4", "0": 0.0, "*": 0.6}, "scope": "network"}),
    (mlp, {"sparsity": 0.5, "unit": "neurons"}),
    (mlp, {"network_eps": 0.2, "objective": "nonzeros"}),
    (mlp, {"network_eps": 0.2, "guarantee": "bound", "mode": "cascade"}),
    (mlp, {"network_eps": 0.2, "guarantee": "bound"}),
    (mlp, {"eps": {"4": 0.2, "*": 0.1}, "layers": ["2", "4"], "ceiling": 0.0}),
    (double, {"eps": 0.05}),
    (half, {}),
    (grouped, {}),
    (grouped, {"mode": "cascade", "norms": "leave", "penalise_bias": True}),
    (many, {}),
    (many, {"mode": "cascade", "refit": True}),
]


@dataclass(frozen=True)
class Run:
    """One that was done: the model before and after, what was asked and told, and the folder, for reading alone."""

    model: nn.Module
    x: Tensor
    pruned: nn.Module
    report: Report
    recipe: dict[str, Any]
    folder: Path


@pytest.fixture(scope="module", params=RUNS, ids=lambda run: f"{run[0].__name__}-{run[1]}")
def done(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    make, recipe = request.param
    (model, x), folder = make(), tmp_path_factory.mktemp("done")
    pruned = copy.deepcopy(model)
    return Run(model, x, pruned, prune_(pruned, x, run=folder, **recipe), recipe, folder)


def test_a_run_is_found_to_be_as_recorded_and_the_model_stays_as_it_is(done: Run, tmp_path: Path) -> None:
    model, x, report, recipe, folder = done.model, done.x, done.report, done.recipe, copy_of(done.folder, tmp_path)
    save_json(report.to_dict(), folder / "report.json")
    save_weights(done.pruned, folder / "model.safetensors")
    before = copy.deepcopy(model.state_dict())
    found = verify(model, x, folder)
    assert found.results == ()
    assert [row.differences for row in found.layers if not row.ok] == []
    assert found.ok
    assert found.complete
    assert found.samples == report.samples
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    if recipe.get("unit") == "neurons":
        return  # the report has rows of links
    final = {row.name: row for row in found.layers}  # the last entry of a layer is what was written
    for row in report.layers:
        assert repr(final[row.name].recorded) == repr(row)  # equal, and NaN where it is NaN
        again = final[row.name].recomputed
        assert again is not None
        assert again.value == pytest.approx(row.value, rel=1e-6)
        assert again.status == row.status


def test_figures_are_those_of_the_weights_as_pruned(tmp_path: Path) -> None:
    model, x = double()
    pruned = copy.deepcopy(model)
    prune_(pruned, x, 0.1, run=tmp_path)
    found = {row.name: row.recomputed for row in verify(model, x, tmp_path).layers}
    inputs = x
    for name in ("0", "2", "4"):
        layer, dense, row = pruned.get_submodule(name), model.get_submodule(name), found[name]
        act = torch.relu if name != "4" else nn.Identity()
        with torch.no_grad():
            Y, Z = act(dense(inputs)), act(layer(inputs))
            inputs = Y
        assert row is not None
        assert row.value == pytest.approx(float(layer.get_parameter("weight").detach().abs().sum()), rel=1e-12)
        assert row.output_error == pytest.approx(float((Z - Y).norm() / Y.norm()), rel=1e-9)
        assert row.bound <= row.value * (1 + 1e-6)
        assert 0 < row.value
        assert row.gap == pytest.approx((row.value - row.bound) / row.value, rel=1e-6)


def test_no_solver_takes_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = mlp()
    prune_(copy.deepcopy(model), x, solver="admm", run=tmp_path)
    monkeypatch.setattr(registry.PROGRAMS, "factories", {})
    with pytest.raises(UnknownSolver):
        prune_(copy.deepcopy(model), x)
    assert verify(model, x, tmp_path).ok


# Tampered with: sealed again as a journal would


def changed(folder: Path, layer: str, change: Callable[[dict[str, Any], dict[str, Tensor]], None]) -> None:
    """All entries of a layer, each sealed again."""
    journal, described = Journal.existing(folder)
    with Journal(folder, {key: described[key] for key in ("model", "data", "recipe")}) as writing:
        for record in list(journal.entries()):
            if record.data["layer"] == layer:
                data = copy.deepcopy(dict(record.data))
                tensors = {key: value.clone() for key, value in record.tensors.items()}
                change(data["groups"][0], tensors)
                writing.put(layer, data["goal"], Record(data, tensors))


def only_wrong(found: Verification, name: str) -> Judged:
    assert not found.ok
    (row,) = [row for row in found.layers if not row.ok]
    assert row.name == name
    return row


def smaller_weights(_: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    tensors["stored.0"] *= 0.9


def one_weight(_: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    weights = tensors["stored.0"][:-1]
    weights[weights == weights.max()] *= 1.001


def other_multipliers(_: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    tensors["multipliers.0"] *= -1


def multipliers_of_another_program(group: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    tensors["multipliers.0"] = torch.zeros(7, 8)


def without_bias(group: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    tensors["stored.0"] = tensors["stored.0"][:-1].clone()
    group["solution"]["shape"] = list(tensors["stored.0"].shape)


def other_dtype(_: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    tensors["stored.0"] = tensors["stored.0"].double()


@pytest.mark.parametrize(
    "done", [(mlp, {"mode": "parallel"}), (mlp, {"mode": "cascade"})], indirect=True, ids=["parallel", "cascade"]
)
@pytest.mark.parametrize(
    ("change", "told"),
    [
        (smaller_weights, "violation: recorded"),
        (one_weight, "value: recorded"),
        (other_multipliers, "bound: recorded"),
        (multipliers_of_another_program, "multipliers"),
        (without_bias, r"its weights are .*\[12, 8\].*\[13, 8\]"),
        (other_dtype, "its weights are .*float64"),
    ],
)
def test_changed_arrays_are_found(
    tmp_path: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], None], told: str, done: Run
) -> None:
    model, folder = done.model, copy_of(done.folder, tmp_path)
    changed(folder, "2", change)
    before = copy.deepcopy(model.state_dict())
    found = verify(model, done.x, folder)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    row = next(row for row in found.layers if row.name == "2")
    assert not found.ok
    assert any(re.search(told, difference) for difference in row.differences), row.differences
    first = next(row for row in found.layers if row.name == "0")
    assert first.ok


def test_a_run_that_goes_on_takes_what_holds_and_refuses_changed_weights(
    done: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x, folder = done.model, done.x, copy_of(done.folder, tmp_path)
    monkeypatch.setattr(LayerTask, "run", None)  # nothing may be solved
    again = copy.deepcopy(model)
    prune_(again, x, run=folder, **done.recipe)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in done.pruned.state_dict().items())
    layer = next(Journal.existing(folder)[0].entries()).data["layer"]
    changed(folder, layer, smaller_weights)
    before = copy.deepcopy(model.state_dict())
    entries = {path: path.read_bytes() for path in (folder / "layers").iterdir()}
    with pytest.raises(DamagedFile, match=rf"layer '{layer}' does not hold .*recorded .*Delete {layer}-\w+\.json"):
        prune_(model, x, run=folder, **done.recipe)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert {path: path.read_bytes() for path in (folder / "layers").iterdir()} == entries


def test_a_deleted_entry_is_solved_again_and_the_run_is_as_it_was(tmp_path: Path) -> None:
    model, x = mlp()
    pruned = copy.deepcopy(model)
    prune_(pruned, x, mode="cascade", run=tmp_path)
    changed(tmp_path, "2", other_multipliers)
    with pytest.raises(DamagedFile, match="bound: recorded") as refusal:
        prune_(copy.deepcopy(model), x, mode="cascade", run=tmp_path)
    (named,) = re.findall(r"Delete (\S+) to", str(refusal.value))
    (tmp_path / "layers" / named).unlink()
    prune_(model, x, mode="cascade", run=tmp_path)
    assert all(torch.equal(value, pruned.state_dict()[key]) for key, value in model.state_dict().items())


def test_a_false_status_is_not_resumed(tmp_path: Path) -> None:
    """An unfinished solve whose entry says that it was certified."""
    model, x = mlp()
    prune_(copy.deepcopy(model), x, max_iter=3, run=tmp_path)
    changed(tmp_path, "0", lambda group, _: group.update(status="solved"))
    with pytest.raises(DamagedFile, match="status: recorded solved, recomputed not solved"):
        prune_(model, x, max_iter=3, run=tmp_path)


def test_an_interrupt_ends_the_judging_of_what_is_known_and_nothing_is_lost(tmp_path: Path) -> None:
    model, x = mlp()
    prune_(copy.deepcopy(model), x, run=tmp_path)
    judged: list[str] = []
    part = prune_(
        copy.deepcopy(model),
        x,
        run=tmp_path,
        progress=lambda stage, done, total: judged.append(stage) if stage != "capture" else None,
        stop=lambda: bool(judged),
    )
    assert [row.name for row in part.layers] == judged == ["0"]
    assert not part.certified
    assert prune_(model, x, run=tmp_path, time_limit=1e-9).certified  # a time limit is for solving


KINDS = {
    "magnitude": {"target": "sparsity 0.6 scope=network", "refit": True},
    "wanda": {"target": "sparsity 2:4"},
    "corenet": {"target": "sparsity 0.5"},
    "lowner": {"target": "neurons 0.5"},
}


@pytest.mark.parametrize("method", KINDS)
def test_runs_of_pruners_of_every_kind_go_on_where_they_stopped_and_are_verified(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = mlp()
    whole, again, folder = copy.deepcopy(model), copy.deepcopy(model), tmp_path / "run"
    prune_(whole, x, method=method, **KINDS[method])
    part = prune_(copy.deepcopy(model), x, method=method, run=folder, stop=lambda: kept(folder), **KINDS[method])
    assert part.provenance["stopped"] is not None
    found = verify(model, x, folder)
    assert (found.ok, found.complete, len(found.layers)) == (True, False, 1)

    first, solved, solve = kept(folder), list[str](), LayerTask.run
    monkeypatch.setattr(LayerTask, "run", lambda self, *rest: solved.append(self.name) or solve(self, *rest))
    report = prune_(again, x, method=method, run=folder, **KINDS[method])
    assert sorted([*first, *solved]) == kept(folder)
    for one, other in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
    save_json(report.to_dict(), folder / "report.json")
    save_weights(again, folder / "model.safetensors")
    found = verify(model, x, folder)
    assert (found.ok, found.complete, found.results) == (True, True, ())

    changed(folder, solved[-1], smaller_weights)
    assert only_wrong(verify(model, x, folder), solved[-1]).differences
    with pytest.raises(DamagedFile, match=f"layer '{solved[-1]}' does not hold"):
        prune_(copy.deepcopy(model), x, method=method, run=folder, **KINDS[method])


def kept(folder: Path) -> list[str]:
    """The layers that have an entry."""
    return sorted(path.name.partition("-")[0] for path in (folder / "layers").glob("*.json"))


CLAIMS = ["value", "bound", "gap", "violation", "scale", "radius", "promised", "size", "error", "samples", "before"]


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Tensor, Path]:
    model, x = mlp()
    folder = tmp_path_factory.mktemp("kept")
    prune_(copy.deepcopy(model), x, max_iter=10, run=folder)
    return model, x, folder


@pytest.mark.parametrize("claim", [*CLAIMS, "nonzeros", "infeasible"])
def test_every_changed_figure_is_found(known: tuple[nn.Module, Tensor, Path], claim: str, tmp_path: Path) -> None:
    model, x, folder = known
    copied = copy_of(folder, tmp_path)

    def change(group: dict[str, Any], _: dict[str, Tensor]) -> None:
        place = group["solution"]["certificate"] if claim in group["solution"]["certificate"] else group
        told = place[claim]
        place[claim] = not told if isinstance(told, bool) else told - 1 if isinstance(told, int) else told * 0.98 - 1e-3

    changed(copied, "2", change)
    (difference,) = only_wrong(verify(model, x, copied), "2").differences
    assert difference.startswith(f"{claim}: recorded ")


def test_a_status_that_does_not_follow_is_found(known: tuple[nn.Module, Tensor, Path], tmp_path: Path) -> None:
    model, x, folder = known
    for number, status in enumerate(("solved", "refitted", "no bound")):
        copied = copy_of(folder, tmp_path / str(number))
        changed(copied, "0", lambda group, _, status=status: group.update(status=status))  # type: ignore[misc]
        row = only_wrong(verify(model, x, copied), "0")
        assert row.differences == (f"status: recorded {status}, recomputed not {status}",)


@pytest.mark.parametrize("recipe", [{"sparsity": 0.6, "search": "path"}, {"sparsity": "2:4"}])
def test_a_budget_that_is_not_kept_is_found(tmp_path: Path, recipe: dict[str, Any]) -> None:
    model, x = mlp()
    report = prune_(copy.deepcopy(model), x, layers="4", run=tmp_path, **recipe)
    assert report.layers[0].status == "no bound"

    def one_more(group: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        tensors["stored.0"][:4, 0] = 1e-6  # four of the first four inputs, each hardly there
        group["nonzeros"] = int(tensors["stored.0"][:-1].count_nonzero())

    changed(tmp_path, "4", one_more)
    row = only_wrong(verify(model, x, tmp_path), "4")
    assert "status: recorded no bound, recomputed not no bound" in row.differences


def copy_of(folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder, target / "copied"))


# What is there


def test_a_damaged_entry_is_told_of_in_its_row_and_the_others_are_verified(
    known: tuple[nn.Module, Tensor, Path], tmp_path: Path
) -> None:
    model, x, folder = known
    copied = copy_of(folder, tmp_path)
    damaged = next((copied / "layers").glob("2-*.safetensors"))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    found = verify(model, x, copied)
    row = only_wrong(found, "2")
    assert row.recorded is row.recomputed is None
    assert "cut short" in row.differences[0]
    assert (len(found.layers), found.missing, found.unreached) == (3, ("2",), ())


@pytest.mark.parametrize("mode", ["parallel", "cascade"])
def test_a_run_that_is_not_complete_is_verified_as_far_as_it_goes(tmp_path: Path, mode: str) -> None:
    model, x = mlp()
    done: list[str] = []
    report = prune_(
        copy.deepcopy(model),
        x,
        mode=mode,
        run=tmp_path,
        callback=lambda name, _: done.append(name),
        stop=lambda: "2" in done,
    )
    assert [row.name for row in report.layers] == ["0", "2"]
    found = verify(model, x, tmp_path)
    assert found.ok
    assert not found.complete
    assert [row.name for row in found.layers] == ["0"]  # the second was cut short, and is not kept
    assert found.missing == ("2", "4")
    assert "not complete, nothing is recorded of: 2, 4" in str(found)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda report: report.update(nonzeros=3), "nonzeros is 3"),
        (lambda report: report["layers"][0].update(output_error=0.01), "output_error is 0.01"),
        (lambda report: report["network"].update(bound=0.01), "network.bound is 0.01, recomputed"),
        (lambda report: report["network"]["radii"].update({"2": 0.01}), "network.radii.2 is 0.01, recomputed"),
        (lambda report: report.pop("network"), "not as convexprune writes it"),
    ],
)
def test_a_report_beside_the_entries_is_verified_by_them(
    known: tuple[nn.Module, Tensor, Path], tmp_path: Path, change: Callable[[dict[str, Any]], object], told: str
) -> None:
    model, x, folder = known
    copied = copy_of(folder, tmp_path)
    assert verify(model, x, copied).results is None
    report = prune_(copy.deepcopy(model), x, max_iter=10, run=copied).to_dict()
    save_json(report, copied / "report.json")
    found = verify(model, x, copied)
    assert (found.ok, found.results) == (True, ())
    edited = json.loads((copied / "report.json").read_text())
    change(edited)
    save_json(edited, copied / "report.json")
    found = verify(model, x, copied)
    assert all(row.ok for row in found.layers)
    assert not found.ok
    assert told in "".join(found.results or ())
    assert told in " ".join(str(found).split())


def test_an_entry_that_the_recipe_does_not_lead_to_is_told_of(
    known: tuple[nn.Module, Tensor, Path], tmp_path: Path
) -> None:
    model, x, folder = known
    copied = copy_of(folder, tmp_path)
    journal, described = Journal.existing(copied)
    record = next(journal.entries())
    with Journal(copied, {key: described[key] for key in ("model", "data", "recipe")}) as writing:
        writing.put(record.data["layer"], {"kind": "within", "eps": 0.7}, record)
    found = verify(model, x, copied)
    assert not found.ok
    assert all(row.ok for row in found.layers)
    assert len(found.unreached) == 1
    assert "does not lead there" in str(found)


def test_goals_that_differ_by_rounding_are_the_same_goals(tmp_path: Path) -> None:
    """On another machine the eps that the network's share comes to has another last digit."""
    model, x = mlp()
    prune_(copy.deepcopy(model), x, network_eps=0.2, guarantee="bound", mode="parallel", run=tmp_path)
    journal, described = Journal.existing(tmp_path)
    for record in list(journal.entries()):
        path = journal.path(record.data["layer"], record.data["goal"])
        path.unlink()
        path.with_suffix(".safetensors").unlink()
        goal = {**record.data["goal"], "eps": record.data["goal"]["eps"] * (1 + 1e-9)}
        with Journal(tmp_path, {key: described[key] for key in ("model", "data", "recipe")}) as writing:
            writing.put(record.data["layer"], goal, record)
    found = verify(model, x, tmp_path)
    assert found.ok
    assert found.complete
    assert len(found.layers) == 3


def test_multipliers_in_a_basis_that_rounding_turned_do_not_count_against_a_bound_that_holds(tmp_path: Path) -> None:
    model, x = many()
    prune_(copy.deepcopy(model), x, tol=1e-7, feas_tol=1e-8, run=tmp_path)
    changed(tmp_path, "0", other_multipliers)
    assert verify(model, x, tmp_path).ok

    def too_good(group: dict[str, Any], _: dict[str, Tensor]) -> None:
        group["solution"]["certificate"]["bound"] *= 1.01

    changed(tmp_path, "0", too_good)
    assert any("bound" in difference for difference in only_wrong(verify(model, x, tmp_path), "0").differences)


def test_another_model_other_data_and_the_pruned_model_are_refused(known: tuple[nn.Module, Tensor, Path]) -> None:
    model, x, folder = known
    pruned = copy.deepcopy(model)
    prune_(pruned, x)
    for given, data, told in (
        (pruned, x, "another model"),
        (model, x[:-1], "other calibration data"),
        (model, x.flip(0), "other calibration data"),
    ):
        with pytest.raises(OtherRun, match=told):
            verify(given, data, folder)


def test_a_recipe_changed_afterwards_is_found(known: tuple[nn.Module, Tensor, Path], tmp_path: Path) -> None:
    model, x, folder = known
    copied = copy_of(folder, tmp_path)
    described = json.loads((copied / "run.json").read_text())
    described["recipe"]["tol"] = 10.0
    (copied / "run.json").write_text(json.dumps(described))
    found = verify(model, x, copied)
    assert not found.ok
    assert all("belongs to another run" in row.differences[0] for row in found.layers)
    described["recipe"]["tol"] = 1e-3
    for recipe in (None, [], {}, 5, "limits", *({**described["recipe"], **change} for change in WRONG)):
        (copied / "run.json").write_text(json.dumps({**described, "recipe": recipe}))
        with pytest.raises(DamagedFile, match=r"run\.json"):
            verify(model, x, copied)
    (copied / "run.json").write_text(
        json.dumps({**described, "recipe": {**described["recipe"], "method": "os.system"}})
    )
    with pytest.raises(UnknownSolver, match=r"no method named 'os\.system'"):
        verify(model, x, copied)


WRONG: list[dict[str, Any]] = [
    {"mode": "os.system"},
    {"mode": [1]},
    {"ceiling": "x"},
    {"ceiling": None},
    {"gamma": "x"},
    {"batch_size": "x"},
    {"batch_size": 0},
    {"tol": "x"},
    {"feas_tol": None},
    {"max_iter": [1]},
    {"layer_time_limit": "x"},
    {"fit": [1]},
    {"fit": {"*": [1]}},
    {"activations": 5},
    {"activations": ["relu"]},
    {"activations": {"*": 5}},
    {"layers": 5},
    {"target": None},
    {"target": {"kind": "os.system", "value": 0.1}},
    {"target": {"kind": "eps"}},
    {"target": {"kind": "eps", "value": "x"}},
    {"target": {"kind": "eps", "value": {"*": {"0": 1}}}},
    {"target": {"kind": "eps", "value": [0.1, "x", 0.1]}},
    {"target": {"kind": "eps", "value": 0.1, "scope": "layer"}},
    {"target": {"kind": "sparsity", "value": [0.5]}},
    {"target": {"kind": "sparsity", "value": {"*": "x"}}},
    {"target": {"kind": "network-eps", "value": "x"}},
    {"method_options": [1]},
    {"method_options": {"size": 1}},
    {"refit": "x"},
    {"penalise_bias": "x"},
]


def test_a_run_without_a_time_limit_is_read_as_one(tmp_path: Path) -> None:
    """Infinity has no number in JSON."""
    model, x = mlp()
    prune_(copy.deepcopy(model), x, layers="4", layer_time_limit=math.inf, run=tmp_path)
    assert verify(model, x, tmp_path).ok


def test_a_folder_without_a_run_is_none_to_verify(tmp_path: Path) -> None:
    model, x = mlp()
    with pytest.raises(FileNotFoundError, match=r"no run\.json"):
        verify(model, x, tmp_path)


def test_a_forward_of_ones_own_and_batches_are_used_as_in_the_run(tmp_path: Path) -> None:
    model, x = mlp()
    data = [{"images": x[:30], "label": 1}, {"images": x[30:], "label": 2}]

    def forward(net: nn.Module, batch: dict[str, Any]) -> Tensor:
        result: Tensor = net(batch["images"])
        return result

    prune_(copy.deepcopy(model), iter(data), forward=forward, run=tmp_path)
    assert verify(model, Data(data, forward=forward), tmp_path).ok
    with pytest.raises(OtherRun, match="other calibration data"):
        verify(model, Data([data[0], {**data[1], "label": 3}], forward=forward), tmp_path)


def test_the_result_is_plain_data_and_a_table(known: tuple[nn.Module, Tensor, Path], tmp_path: Path) -> None:
    model, x, folder = known
    found = verify(model, x, folder)
    told = json.loads(json.dumps(found.to_dict()))
    assert told["ok"] is told["complete"] is True
    assert [row["name"] for row in told["layers"]] == ["0", "2", "4"]
    assert math.isclose(told["layers"][0]["recomputed"]["value"], asdict(found.layers[0].recomputed)["value"])  # type: ignore[arg-type]
    assert told["provenance"]["recipe"]["target"] == {"kind": "eps", "value": 0.1}
    assert len(found.table(140).columns) > len(found.table(80).columns)
    assert "3 of 3 entries are as recorded" in str(found)
    copied = copy_of(folder, tmp_path)
    changed(copied, "2", smaller_weights)
    text = str(verify(model, x, copied))
    assert "2 of 3 entries are as recorded" in text
    assert "differs" in text


def test_the_function_is_not_hidden_by_a_module_of_its_name() -> None:
    """Importing a submodule sets its name in the package, over what is looked up there when it is first used."""
    for name in convexprune.__all__:
        assert importlib.util.find_spec(f"convexprune.{name}") is None
