"""The command line, as a user types it."""

import dataclasses
import fcntl
import json
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from convexprune.cli.app import app
from convexprune.cli.demo import load_digits, run_demo, train_digits_network
from convexprune.files.weights import save_json
from convexprune.options import Options
from convexprune.pruners import available_pruners
from convexprune.runs.results import sealed

FACTORY = """
from torch import nn

def build():
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
"""

SOURCE = ["my_digits_model:build", "--weights", "w.safetensors", "--calibration", "x.npz"]


def factory() -> Any:
    """A new network of the user's, not trained."""
    names: dict[str, Any] = {}
    exec(FACTORY, names)  # noqa: S102 - as the command imports it
    return names["build"]()


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


@pytest.fixture(autouse=True)
def at_home(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "160")


def invoked(*extra: str, out: Path | str | None = "out") -> Any:
    target = [] if out is None else ["--out", str(out)]
    return CliRunner().invoke(app, ["prune", *SOURCE, *target, *extra])


def run(*extra: str, out: str = "out") -> tuple[int, str]:
    result = invoked(*extra, out=out)
    return result.exit_code, result.output


def test_prune_writes_a_model_that_plain_torch_loads(folder: Path) -> None:
    code, output = run("--data", "y.npz", "--key", "x_train", "--eps", "0.05")
    assert code == 0, output
    report = json.loads((folder / "out" / "report.json").read_text())
    model = factory()
    model.load_state_dict(load_file(folder / "out" / "model.safetensors"))
    kept = [int(layer.weight.count_nonzero()) for layer in (model[0], model[2], model[4])]
    assert kept == [row["nonzeros"] for row in report["layers"]]
    assert report["certified"]
    assert report["accuracy"]["before"] > 0.97
    assert f"{report['accuracy']['after']:.2%}" in output
    assert "solved" in output
    entries = [json.loads(path.read_text()) for path in (folder / "out" / "layers").glob("*.json")]
    assert sorted(entry["layer"] for entry in entries) == ["0", "2", "4"]
    assert json.loads((folder / "out" / "extras.json").read_text())["latency"]["model"] > 0


def test_the_working_folder_is_on_the_path_for_own_models_alone_and_last(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file in it must not take the place of a package that is imported later."""
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place not in ("", str(folder))])
    before = list(sys.path)
    CliRunner().invoke(app, ["prune", "lenet-5", "--weights", "absent.pt", "--out", "none"])
    CliRunner().invoke(app, ["verify", "none", "lenet-5", "--weights", "absent.pt", "--calibration", "x.npz"])
    assert sys.path == before
    invoked("--dry-run", "--key", "nothing", out=None)
    assert sys.path == [*before, str(folder)]


def test_names_are_left_out_and_patterns_go_with_numbers() -> None:
    options = ["--sparsity", "0=0", "--sparsity", "2:4", "--layers", "!4", "--keep-zeros", "--samples", "80", "--json"]
    result = invoked(*options, out="mixed")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)["report"]
    assert [(row["name"], row["goal"]) for row in report["layers"]] == [("2", "2:4")]
    assert {module["name"]: module["reason"] for module in report["skipped"]} == {
        "0": "left as trained: its sparsity is 0",
        "4": "left out by the name pattern '!4'",
    }
    told = report["provenance"]
    assert told["target"] == {"kind": "sparsity", "value": {"0": 0.0, "*": "2:4"}, "scope": "layer"}
    assert (told["layers"], told["keep_zeros"]) == (["!4"], True)


def test_an_eps_that_allows_everything_is_said() -> None:
    code, output = run("--eps", "1.5", "--samples", "80", out="nothing")
    assert code == 0, output
    assert "no weight is left in 3 of 3 layers (0, 2, 4)" in " ".join(output.split())
    assert "from eps 1 on" in output


def test_nothing_is_overwritten(folder: Path) -> None:
    (folder / "taken").mkdir()
    (folder / "taken" / "model.safetensors").write_text("mine")
    code, output = run(out="taken")
    assert code == 1
    assert "not overwritten" in output
    assert (folder / "taken" / "model.safetensors").read_text() == "mine"


@pytest.mark.parametrize("out", ["a file", "a file/below"])
def test_a_file_is_no_place_for_results(folder: Path, out: str) -> None:
    """Said before anything is read."""
    (folder / "a file").write_text("mine")
    code, output = run("--weights", "absent.safetensors", out=out)
    assert code == 1
    assert "a file: a file, where a folder is to be; choose another" in output


def test_an_open_certificate_has_its_own_exit_status() -> None:
    code, output = run("--max-iter", "40", "--tol", "1e-9", out="short")
    assert code == 3
    assert "certificate" in output


def test_layers_and_eps_by_pattern(folder: Path) -> None:
    code, output = run("--layers", "[24]", "--eps", "4=0.3", "--eps", "0.1", out="some")
    assert code == 0, output
    report = json.loads((folder / "some" / "report.json").read_text())
    assert [(row["name"], row["eps"]) for row in report["layers"]] == [("2", 0.1), ("4", 0.3)]
    assert [skipped["name"] for skipped in report["skipped"]] == ["0"]


def by_method(method: str, *extra: str, out: Path, weights: str = "w.safetensors") -> tuple[int, str]:
    """Another method than Net-Trim, without calibration data unless ``extra`` has some."""
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
    ("target", "left"),
    [(["neurons 0.75"], [32, 16]), (["neurons 0=5 0.5"], [5, 32]), (["neurons 9e-1", "--layers", "0"], [13, 64])],
)
def test_a_coreset_needs_no_data_and_leaves_a_smaller_model(
    tmp_path: Path, method: str, target: list[str], left: list[int]
) -> None:
    code, output = by_method(method, "--target", *target, out=tmp_path)
    assert code == 0, output
    assert widths(tmp_path) == left
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["output_error"] is None
    assert report["provenance"]["method"] == method
    assert f"{left[0]} of 128" in output
    code, output = by_method(method, "--target", *target, out=tmp_path)
    assert code == 0, output
    assert "Nothing to do" in output
    given = [str(tmp_path), "my_digits_model:build", "--weights", "w.safetensors"]
    assert CliRunner().invoke(app, ["verify", *given]).exit_code == 0
    assert CliRunner().invoke(app, ["report", str(tmp_path)]).exit_code == 0
    code, output = by_method(method, "--target", *target, "--dry-run", "--seed", "1", out=tmp_path)
    assert code == 0, output
    assert f"{left[0]} of 128 inputs" in output


def test_the_smaller_model_is_the_next_one_s_weights(tmp_path: Path) -> None:
    """It has the same accuracy, and the factory that builds the whole model will do."""
    first, second = tmp_path / "first", tmp_path / "second"
    target = ("--target", "neurons 0.3", "--calibration", "x.npz", "--data", "y.npz")
    code, output = by_method("lowner", *target, out=first)
    assert code == 0, output
    weights = str(first / "model.safetensors")
    target = ("--target", "neurons 20", "--data", "y.npz")
    code, output = by_method("mussay", *target, out=second, weights=weights)
    assert code == 0, output
    before, after = (json.loads((where / "report.json").read_text())["accuracy"] for where in (first, second))
    assert before["before"] > 0.97
    assert before["after"] == after["before"] > 0.5
    assert (widths(first), widths(second)) == ([90, 45], [20, 20])
    assert "20 of 90" in output
    code, output = run("--weights", weights, "--data", "y.npz", out=str(tmp_path / "third"))
    assert code == 0, output  # Net-Trim takes it, too
    assert json.loads((tmp_path / "third" / "report.json").read_text())["accuracy"]["before"] == before["after"]


def test_a_method_takes_weights_or_neurons_by_the_target(tmp_path: Path) -> None:
    code, output = by_method("magnitude", "--sparsity", "0.9", out=tmp_path / "weights")
    assert code == 0, output
    state = load_file(tmp_path / "weights" / "model.safetensors")
    assert [int(state[f"{name}.weight"].count_nonzero()) for name in "024"] == [819, 819, 64]
    code, output = by_method("magnitude", "--target", "neurons 9", out=tmp_path / "neurons")
    assert code == 0, output
    assert widths(tmp_path / "neurons") == [9, 9]


def test_options_scope_order_baseline_mask_and_seed_reach_the_method(tmp_path: Path) -> None:
    own = ["beta=2", "sampling=draws", "construction=peeling"]
    flags = ["--order", "top-down", "--baseline", "--no-remove", "--seed", "3", "--calibration", "x.npz"]
    target = [
        "--target",
        "neurons 0.5 scope=network",
        *(word for option in own for word in ("--method-option", option)),
    ]
    code, output = by_method("lowner", *target, *flags, out=tmp_path)
    assert code == 0, output
    report = json.loads((tmp_path / "report.json").read_text())
    told = report["provenance"]
    assert told["method_options"].items() >= {"beta": 2, "construction": "peeling", "sampling": "draws"}.items()
    assert [told[key] for key in ("order", "remove", "seed", "baseline")] == ["top-down", False, 3, True]
    assert told["target"] == {"kind": "neurons", "value": 0.5, "scope": "network"}
    assert all(row["uniform_error"] > 0 for row in report["layers"][:2])
    model = factory()
    model.load_state_dict(load_file(tmp_path / "model.safetensors"))  # masked: the shapes are as they were
    kept = [int(layer.weight.any(1).sum()) for layer in (model[0], model[2])]
    assert kept == [row["kept_items"] for row in report["layers"][:2]]


def test_every_option_is_a_flag_with_its_own_help_and_default() -> None:
    parameters = {each.name: each for each in typer.main.get_command(app).commands["prune"].params}  # type: ignore[attr-defined]
    for field in dataclasses.fields(Options):
        if field.name == "keep_solutions":
            assert field.name not in parameters
            continue
        flag = parameters[field.name]
        assert (flag.default or None) == (field.default or None), field.name
        assert flag.help.startswith(field.metadata["help"].removesuffix("."))
        assert bool(flag.secondary_opts) == (field.default is True)


def test_tables_of_activations_and_of_the_solver_are_read(tmp_path: Path) -> None:
    options = ["--solver", "admm", "--solver-option", "relaxation=1.5", "--activation", "4=relu", "--penalise-bias"]
    result = invoked(*options, *SMALL, "--json", out=tmp_path)
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)["report"]["provenance"]
    assert (told["solver_options"], told["activations"]) == ({"relaxation": 1.5}, {"4": "relu"})
    assert told["penalise_bias"] is True
    again = invoked(*options, *SMALL, "--json", out=tmp_path)
    assert json.loads(again.stdout)["status"] == "finished before"


def test_a_guarantee_instead_of_a_size(tmp_path: Path) -> None:
    target = ["--target", "guarantee 0=2 0.01 delta=0.5"]
    code, output = by_method("mussay", *target, out=tmp_path)
    assert code == 0, output
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["certified"]
    assert [row["guarantee"] for row in report["layers"]] == [[2, 0.5], [0.01, 0.5], None]
    assert [row["status"] for row in report["layers"]] == ["sampled", "kept whole", "inputs"]
    assert "kept whole" in output


def test_an_assumption_that_fails_has_the_exit_status_of_an_open_certificate(tmp_path: Path) -> None:
    promise = ["--target", "guarantee 2 delta=0.5", "--method-option", "beta=0.001"]
    code, output = by_method("mussay", *promise, "--calibration", "x.npz", out=tmp_path / "a")
    assert code == 3
    assert "assumption fails" in output
    assert "does not hold" in " ".join(output.split())  # lines break where the terminal is narrow
    assert (tmp_path / "a" / "model.safetensors").exists()
    code, output = by_method("mussay", *promise, out=tmp_path / "b")
    assert code == 0, output  # nothing says that it fails
    assert "cannot be checked" in output


HALF = ["--target", "neurons 0.5"]


@pytest.mark.parametrize(
    ("method", "extra", "says"),
    [
        ("mussay", ["--target", "half"], "target: expected one of eps, network-eps"),
        ("mussay", [*HALF, "--eps", "0.1"], "target and eps: each says how far to prune"),
        ("mussay", ["--eps", "0.1"], "not eps"),
        ("mussay", ["--target", "guarantee -1"], "eps: expected a number > 0"),
        ("mussay", ["--target", "guarantee 1 delta=2"], "delta: expected a probability"),
        ("mussay", ["--target", "neurons half"], "expected a number or PATTERN=number"),
        ("mussay", ["--target", "neurons 1.5"], "expected the part of neurons to be zero"),
        ("mussay", ["--target", "neurons nan"], "expected a number or PATTERN=number"),
        ("mussay", ["--target", "neurons 5 scope=network"], "expected one part to share out"),
        ("mussay", ["--target", "neurons 0.5 scope=model"], "expected 'layer' or 'network'"),
        ("mussay", [*HALF, "--order", "up"], "expected 'bottom-up' or 'top-down'"),
        ("mussay", [*HALF, "--method-option", "beta"], "--method-option: expected NAME=VALUE"),
        ("mussay", [*HALF, "--method-option", "bta=1"], "did you mean 'beta'"),
        ("mussay", [*HALF, "--method-option", "beta=-1"], "beta: expected a positive number"),
        ("mussay", [*HALF, "--method-option", "beta=big"], "beta: expected a positive number"),
        ("mussay", [*HALF, "--method-option", "seed=1"], "has no option 'seed'"),
        ("mussay", [*HALF, "--layers", "conv*"], "conv*"),
        ("mussay", ["--sparsity", "0.5"], "not sparsity"),
        ("uniform", [*HALF, "--method-option", "items=filters"], "expected one of neurons, weights"),
        ("uniform", ["--target", "guarantee 0.1"], "proves nothing"),
        ("lownr", HALF, "did you mean 'lowner'"),
        ("net-trim", [], "give calibration data"),
        ("magnitude", ["--sparsity", "0.5", "--labels-key", "y"], "give --calibration, too"),
        *((name, ["--sparsity", "0.5"], "give calibration data") for name in ("corenet", "sipp")),
        ("pfp", HALF, "give calibration data"),
    ],
)
def test_errors_of_other_methods_are_for_people(method: str, extra: list[str], says: str, tmp_path: Path) -> None:
    code, output = by_method(method, *extra, out=tmp_path / "none")
    assert code == 1, output
    assert says in output
    assert "Traceback" not in output
    assert not (tmp_path / "none" / "report.json").exists()


def test_methods_are_listed_with_their_options() -> None:
    result = CliRunner().invoke(app, ["methods"])
    assert result.exit_code == 0
    for name, info in available_pruners().items():
        assert f" {name} " in result.output
        assert all(f"{option}={default}" in result.output for option, default in info.options.items())


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        (["--eps", "-1"], "InvalidTolerance"),
        (["--eps", "a lot"], "expected a number or PATTERN=number"),
        (["--max-ratio", "0.5"], "max_ratio: expected a number ≥ 1"),
        (["--solver", "adm"], "did you mean 'admm'"),
        (["--eps", "0.1", "--sparsity", "0.5"], "eps and sparsity: each says how far to prune"),
        (["--sparsity", "2:4", "--sparsity", "0.5"], "--sparsity: a second value for '*', '0.5'"),
        (["--sparsity", "9=2:4", "--sparsity", "0.5"], "sparsity: no layer matches ['9']"),
        (["--layers", "!conv"], "matches ['!conv']"),
        (["--sparsity", "half"], "--sparsity: expected a number or PATTERN=number"),
        (["--sparsity", "1.5"], "InvalidTolerance"),
        (["--mode", "series"], "expected 'parallel' or 'cascade'"),
        (["--mode", "cascade", "--jobs", "2"], "expected 1 in cascade"),
        (["--gamma", "0.5"], "gamma: expected a number ≥ 1"),
        (["--key", "nothing"], "x_train"),
        (["--weights", "damaged.safetensors"], "DamagedFile"),
        (["--weights", "absent.safetensors"], "absent.safetensors"),
        (["--data", "y.npz", "--label-key", "absent"], "y_test"),
        (["--layers", "conv*"], "conv*"),
        (["--eps", ".1", "--eps", ".3"], "--eps: a second value for '*', '.3'"),
        (["--eps", "0=.1", "--eps", "*=.2", "--eps", "0=.3"], "--eps: a second value for '0', '0=.3'"),
        (["--sparsity", ".1", "--sparsity", ".3"], "--sparsity: a second value for '*'"),
        (["--eps", "typo=.1", "--eps", ".3"], "eps: no layer matches ['typo']"),
        (["--scheduler", "tcp://127.0.0.1:1", "--jobs", "1"], "--jobs: a cluster solves"),
        (["--scheduler", "tcp://127.0.0.1:1", "--mode", "cascade", "--dry-run"], "expected 1 in cascade"),
        (["--solver", "quadratic", "--dry-run"], "SolverRefused"),
    ],
)
def test_errors_are_for_people(folder: Path, extra: list[str], says: str, tmp_path: Path) -> None:
    (folder / "damaged.safetensors").write_bytes((folder / "w.safetensors").read_bytes()[:-9])
    code, output = run(*extra, out=str(tmp_path / "none"))
    assert code == 1
    assert says in output
    assert "Traceback" not in output
    assert not (tmp_path / "none").exists()


def test_the_demo_beats_magnitude_pruning_and_writes_everything(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    dense, rows = run_demo(folder, eps=(0.05, 0.2))
    assert dense > 0.97
    for row in rows:
        assert row.report.certified
        assert row.accuracy > row.magnitude_accuracy
    assert rows[0].report.nonzeros > rows[1].report.nonzeros
    assert (folder / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    model = factory()
    model.load_state_dict(load_file(folder / "model.safetensors"))
    sizes = {row.report.nonzeros for row in rows}
    assert sum(int(model[i].weight.count_nonzero()) for i in (0, 2, 4)) in sizes
    assert len(json.loads((folder / "demo.json").read_text())["rows"]) == 2


def test_solvers_are_listed() -> None:
    output = CliRunner().invoke(app, ["solvers"]).output
    assert all(name in output for name in ("admm", "published", "cvxpy", "clarabel", "scs", "relaxation"))


def test_a_global_seed_is_not_disturbed() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train_digits_network(load_digits())
    assert torch.equal(torch.rand(3), expected)


def test_a_run_goes_on_where_its_time_ran_out_and_ends_only_once(folder: Path, tmp_path: Path) -> None:
    """The unfinished results are its own, and do not stand in its way."""
    out = str(tmp_path / "run")
    code, output = run("--time-limit", "1e-9", out=out)
    assert code == 4, output
    assert "not reached, and as trained: 0, 2, 4. The same command goes on" in output
    dense = load_file(folder / "w.safetensors")
    unfinished = load_file(tmp_path / "run" / "model.safetensors")
    assert all(torch.equal(dense[key], unfinished[key]) for key in dense)
    assert json.loads((tmp_path / "run" / "report.json").read_text())["provenance"]["stopped"] is not None

    code, output = run(out=out)
    assert code == 0, output
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.suffix}
    assert not all(torch.equal(dense[key], value) for key, value in load_file(Path(out) / "model.safetensors").items())

    code, output = run(out=out)
    assert code == 0
    assert "holds this very run, finished" in output
    assert written == {path: path.stat().st_mtime_ns for path in written}

    (tmp_path / "run" / "report.json").unlink()  # as if it had been killed in between: nothing is solved again
    code, output = run("--jobs", "1", out=out)
    assert code == 0, output
    assert all(path.stat().st_mtime_ns == then for path, then in written.items() if path.parent.name == "layers")


SMALL = ["--samples", "80", "--layers", "4"]


@pytest.mark.parametrize("name", ["model.safetensors", "report.json", "extras.json", "maps.safetensors"])
@pytest.mark.parametrize("damage", [lambda content: content[:-9], lambda content: content.replace(b"0", b"1", 20)])
def test_results_that_were_damaged_are_written_again_from_the_layers(
    tmp_path: Path, name: str, damage: Callable[[bytes], bytes]
) -> None:
    code, output = run(*SMALL, out=str(tmp_path))
    assert code == 0, output
    whole = {key: value.clone() for key, value in load_file(tmp_path / "model.safetensors").items()}  # it is mapped
    layers = {path: path.stat().st_mtime_ns for path in (tmp_path / "layers").iterdir()}
    (tmp_path / name).write_bytes(damage((tmp_path / name).read_bytes()))
    again = invoked(*SMALL, "--json", out=tmp_path)
    assert again.exit_code == 0, again.output
    told = json.loads(again.stdout)
    assert told["status"] == "finished"
    assert "are not as they were written: written again from its layers" in " ".join(told["notes"])
    found = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(found[key], value) for key, value in whole.items())
    assert layers == {path: path.stat().st_mtime_ns for path in (tmp_path / "layers").iterdir()}
    code, output = run(*SMALL, out=str(tmp_path))
    assert code == 0
    assert "Nothing to do" in output


def test_results_that_were_edited_and_sealed_again_are_not_taken_for_finished(tmp_path: Path) -> None:
    run(*SMALL, out=str(tmp_path))
    path = tmp_path / "report.json"
    whole = json.loads(path.read_text())
    edited = json.loads(path.read_text())
    edited["layers"][0]["output_error"] = 1e-6
    save_json(sealed(tmp_path, edited), path)
    result = invoked(*SMALL, "--json", out=tmp_path)
    assert result.exit_code == 0
    assert "written again from its layers" in " ".join(json.loads(result.stdout)["notes"])
    assert json.loads(path.read_text())["layers"] == whole["layers"]


@pytest.mark.parametrize("how", [[], ["--target", "neurons 0.5", "--layers", "2"]])
def test_accuracies_asked_for_later_are_those_of_the_written_model(tmp_path: Path, how: list[str]) -> None:
    options = how or SMALL
    options = [*options, "--samples", "80"]
    run(*options, "--data", "y.npz", out=str(tmp_path / "measured"))
    want = json.loads((tmp_path / "measured" / "report.json").read_text())["accuracy"]
    run(*options, out=str(tmp_path / "later"))
    code, output = run(*options, "--data", "y.npz", out=str(tmp_path / "later"))
    assert code == 0, output
    assert "Nothing to do" in output
    assert f"accuracy {want['before']:.2%} before, {want['after']:.2%} after" in output
    told = invoked(*options, "--data", "y.npz", "--json", out=tmp_path / "later")
    assert json.loads(told.stdout)["report"]["accuracy"] == want


def test_a_dry_run_may_name_the_folder_of_its_own_run(tmp_path: Path) -> None:
    run(*SMALL, out=str(tmp_path))
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    code, output = run(*SMALL, "--dry-run", out=str(tmp_path))
    assert code == 0, output
    assert "1 layers with 640 weights" in output
    assert written == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}


def test_what_a_model_says_of_a_batch_is_one_json_object(folder: Path, tmp_path: Path) -> None:
    (folder / "picky.py").write_text(PICKY)
    given = ["--weights", "w.safetensors", "--calibration", "x.npz", "--out", str(tmp_path / "none"), "--json"]
    result = CliRunner().invoke(app, ["prune", "picky:build", *given])
    assert result.exit_code == 1
    error = json.loads(result.stdout)["error"]
    assert error["type"] == "InvalidInput"
    assert "IndexError: no such row" in error["message"]


PICKY = """
from torch import nn

class Picky(nn.Sequential):
    def forward(self, x):
        raise IndexError("no such row")

def build():
    return Picky(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
"""


@pytest.mark.parametrize(
    ("extra", "says"),
    [(["--eps", "0.3"], "another recipe (target)"), (["--samples", "200"], "other calibration data")],
)
def test_the_folder_of_another_run_is_refused(folder: Path, extra: list[str], says: str) -> None:
    run(out="one")
    before = (folder / "one" / "report.json").read_bytes()
    code, output = run(*extra, out="one")
    assert code == 1
    assert "OtherRun" in output
    assert says in output
    assert (folder / "one" / "report.json").read_bytes() == before


def test_another_method_does_not_go_into_the_folder_of_a_run(folder: Path) -> None:
    run(out="one")
    code, output = by_method("lowner", *HALF, "--calibration", "x.npz", out=folder / "one")
    assert code == 1
    assert "another recipe (method, " in output


@pytest.mark.parametrize(
    ("options", "holds"),
    [
        (["--sparsity", "0=0.9", "--sparsity", "0.85"], lambda kept: kept == [819, 1229, 96]),
        (["--method", "net-trim", "--target", "sparsity 0.75 scope=network"], lambda kept: sum(kept) <= 4256),
        (["--target", "network-eps 0.3"], lambda kept: sum(kept) < 16000),
        (["--target", "network-eps 0.9 guarantee=bound"], lambda kept: sum(kept) < 17000),
        (["--mode", "cascade", "--gamma", "1.2", "--refit", "--norms", "leave"], lambda kept: sum(kept) < 16000),
    ],
)
def test_targets_of_whole_networks_reach_the_pruner(
    tmp_path: Path, options: list[str], holds: Callable[[list[int]], bool]
) -> None:
    result = invoked(*options, "--samples", "80", "--tol", "1e-2", "--json", out=tmp_path)
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    state = load_file(tmp_path / "model.safetensors")
    kept = [int(state[f"{name}.weight"].count_nonzero()) for name in "024"]
    assert holds(kept), kept
    network = told["report"]["network"]
    assert network["error"] <= network["bound"] * (1 + 1e-6)  # of float32
    within = network["bound" if "guarantee=bound" in str(options) else "error"]
    assert network["allowed"] is None or within <= network["allowed"]
    for option, given in zip(options[::2], options[1::2], strict=False):
        if option in ("--mode", "--method", "--norms"):
            assert told["report"]["provenance"][option[2:]] == given


@pytest.mark.parametrize(("flag", "shape"), [("--remove", [64, 64]), ("--no-remove", [128, 64])])
def test_neurons_are_removed_or_left_as_zeros(tmp_path: Path, flag: str, shape: list[int]) -> None:
    options = ["--target", "neurons 0.5", "--layers", "0", "--samples", "80", flag]
    code, output = run(*options, out=str(tmp_path))
    assert code == 0, output
    weight = load_file(tmp_path / "model.safetensors")["0.weight"]
    assert list(weight.shape) == shape
    assert int(weight.any(1).sum()) == 64


def test_with_json_there_is_one_object_on_standard_output(tmp_path: Path) -> None:
    result = invoked("--data", "y.npz", "--json", out=tmp_path / "run")
    told = json.loads(result.stdout)
    assert (result.exit_code, told["exit_status"], told["status"]) == (0, 0, "finished")
    assert sorted(told["files"]) == ["extras", "model", "report"]
    assert all(Path(path).exists() for path in told["files"].values())
    assert told["report"] == json.loads(Path(told["files"]["report"]).read_text())
    again = json.loads(invoked("--json", out=tmp_path / "run").stdout)
    assert again["status"] == "finished before"
    assert {key: again[key] for key in ("files", "report")} == {key: told[key] for key in ("files", "report")}
    failed = invoked("--json", "--eps", "-1", out=tmp_path / "none")
    assert failed.exit_code == 1
    assert json.loads(failed.stdout)["error"]["type"] == "InvalidTolerance"
    assert not failed.stderr


def test_a_dry_run_shows_the_plan_and_writes_nothing(folder: Path, tmp_path: Path) -> None:
    result = invoked("--dry-run", "--layers", "[02]", "--eps", "0.2", out=tmp_path / "none")
    assert result.exit_code == 0, result.output
    assert "65×128" in result.stdout
    assert "not pruned: 4 (Linear): not chosen by the name patterns" in result.stdout
    told = json.loads(invoked("--dry-run", "--json", out=None).stdout)["plan"]
    assert [row["matrices"] for row in told["layers"]] == [[[300, 65, 128]], [[300, 129, 64]], [[300, 65, 10]]]
    assert told["seconds"] > 0
    assert not (tmp_path / "none").exists()
    missing = invoked(out=None)
    assert missing.exit_code == 1
    assert "--out: expected a folder" in missing.output


def test_workers_give_what_one_process_gives(tmp_path: Path) -> None:
    options = ["--layers", "[24]", "--samples", "80", "--mode", "parallel"]
    code, output = run(*options, "--jobs", "2", out=str(tmp_path / "two"))
    assert code == 0, output
    run(*options, out=str(tmp_path / "one"))
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_verify_tells_a_sound_run_from_a_changed_one(tmp_path: Path) -> None:
    run("--samples", "80", out=str(tmp_path))
    given = [str(tmp_path), *SOURCE]
    result = CliRunner().invoke(app, ["verify", *given, "--samples", "80"])
    assert result.exit_code == 0, result.output
    assert result.stdout.count("as recorded") == 4
    other = CliRunner().invoke(app, ["verify", *given, "--samples", "70", "--json"])
    assert other.exit_code == 1
    assert json.loads(other.stdout)["error"]["type"] == "OtherRun"
    entry = next((tmp_path / "layers").glob("2-*.json"))
    entry.write_text(entry.read_text().replace('"bound"', '"bond"'))
    changed = CliRunner().invoke(app, ["verify", *given, "--samples", "80", "--json"])
    assert changed.exit_code == 3
    told = json.loads(changed.stdout)["verification"]
    assert [row["ok"] for row in told["layers"]].count(False) == 1


def test_verify_of_a_run_that_is_not_complete_fails_unless_asked_to(tmp_path: Path) -> None:
    run("--samples", "80", out=str(tmp_path))
    for path in (tmp_path / "layers").glob("4-*"):
        path.unlink()
    given = [str(tmp_path), *SOURCE]
    given += ["--samples", "80", "--json"]
    for extra, status in (([], 3), (["--partial"], 0)):
        result = CliRunner().invoke(app, ["verify", *given, *extra])
        told = json.loads(result.stdout)
        assert result.exit_code == told["exit_status"] == status
        assert told["verification"]["missing"] == ["4"]
        assert told["verification"]["ok"]
    entry = next((tmp_path / "layers").glob("2-*.json"))
    entry.write_text(entry.read_text().replace('"bound"', '"bond"'))
    assert CliRunner().invoke(app, ["verify", *given, "--partial"]).exit_code == 3


def test_report_writes_a_page_and_prints_its_path(tmp_path: Path) -> None:
    pytest.importorskip("jinja2")
    run("--samples", "80", out=str(tmp_path / "run"))
    result = CliRunner().invoke(app, ["report", str(tmp_path / "run"), "--out", str(tmp_path / "page.html")])
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == str(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text().lstrip().startswith("<!")
    assert "Not checked: errors, bounds" in (tmp_path / "page.html").read_text()
    report = tmp_path / "run" / "report.json"
    report.write_text(report.read_text().replace('"status": "solved"', '"status": "certified"'))
    edited = CliRunner().invoke(app, ["report", str(tmp_path / "run")])
    assert edited.exit_code == 1
    assert "DamagedFile" in edited.output
    assert not (tmp_path / "run" / "report.html").exists()
    nothing = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert nothing.exit_code == 1
    assert "no report.json" in nothing.output


NEVER_DONE = ["--tol", "1e-15", "--eps", "0.01"]


def test_ctrl_c_on_a_terminal_ends_a_run_in_order(folder: Path, tmp_path: Path) -> None:
    """A real process with a terminal: its bars show the running solve, and the signal comes while they do."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 160, 0, 0))
    arguments = ["prune", *SOURCE]
    script = "from convexprune.cli.app import app; app()"
    command = [sys.executable, "-c", script, *arguments, "--out", str(tmp_path), "--json", *NEVER_DONE]
    environment = os.environ | {"TERM": "xterm", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=theirs, env=environment)  # noqa: S603
    os.close(theirs)
    shown, asked = "", False
    try:
        while select.select([ours], [], [], 60)[0]:
            try:
                shown += os.read(ours, 65536).decode(errors="replace")
            except OSError:  # the process has ended
                break
            if not asked and "iteration" in shown:
                asked = True
                process.send_signal(signal.SIGINT)
        told = json.loads(process.communicate(timeout=60)[0])
    finally:
        process.kill()
        os.close(ours)
    assert process.returncode == told["exit_status"] == 130
    assert "gap" in shown
    assert "stopping in order" in shown
    assert told["status"] == "stopped"
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["provenance"]["stopped"] == "it was interrupted"
    assert [row["status"] for row in report["layers"]] == ["stopped"]
    assert report["layers"][0]["violation"] <= 1e-4  # what is written keeps the promise
    assert [row["name"] for row in report["skipped"]] == ["2", "4"]
    assert not list(tmp_path.glob("layers/*"))


def test_a_second_signal_aborts_at_once(folder: Path, tmp_path: Path) -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    (folder / "impatient.py").write_text(IMPATIENT)
    given = ["--weights", "w.safetensors", "--calibration", "x.npz", "--out", str(tmp_path), "--json"]
    result = CliRunner().invoke(app, ["prune", "impatient:build", *given])
    assert result.exit_code == 130
    assert json.loads(result.stdout)["error"]["type"] == "KeyboardInterrupt"
    assert not (tmp_path / "model.safetensors").exists()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


IMPATIENT = """
import signal
from torch import nn

class Impatient(nn.Sequential):
    calls = 0

    def forward(self, x):
        Impatient.calls += 1
        if Impatient.calls == 4:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGINT)
        return super().forward(x)

def build():
    return Impatient(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
"""


def test_samples_are_held_out_and_counted() -> None:
    """Errors on them count in what is measured, and ``verify`` needs to know of them."""
    asked = ("--layers", "4", "--target", "network-eps 0.2", "--holdout", "60", "--json")
    status, output = run(*asked, out="held")
    assert status == 0, output
    report = json.loads(output)["report"]
    assert report["samples"] == 240
    assert report["network"]["guarantee"] == "measured"
    assert 0 < report["network"]["holdout_error"] <= 0.2
    status, output = run(*asked, out="held")
    assert json.loads(output)["status"] == "finished before"
    assert CliRunner().invoke(app, ["verify", "held", *SOURCE, "--holdout", "60"]).exit_code == 0
    other = CliRunner().invoke(app, ["verify", "held", *SOURCE])
    assert other.exit_code == 1
    assert "other held-out data" in " ".join(other.output.split())
    status, output = run("--holdout", "300", out="none")
    assert status == 1
    assert "--holdout: expected fewer than the 300 samples" in " ".join(output.split())


@pytest.mark.parametrize(
    ("asked", "why"), [(("--target", "network-eps 1e-6"), "smaller eps"), (("--sparsity", "0"), "as trained")]
)
def test_where_nothing_could_be_pruned_that_comes_first(folder: Path, asked: tuple[str, str], why: str) -> None:
    name = f"nothing{asked[0]}"
    status, output = run("--layers", "4", *asked, out=name)
    assert status == 5
    assert output.lstrip().startswith("nothing was pruned: ")
    assert why in output
    status, output = run("--layers", "4", *asked, "--json", out=name)
    assert status == 5
    assert json.loads(output)["exit_status"] == 5
    assert json.loads(output)["report"]["head"][0].startswith("nothing was pruned: ")
    page = CliRunner().invoke(app, ["report", name])
    assert page.exit_code == 0, page.output
    assert "Nothing was pruned: " in (folder / name / "report.html").read_text()


@pytest.mark.parametrize("command", [[], ["prune"], ["verify"], ["report"], ["demo"], ["methods"], ["solvers"]])
def test_help_waits_for_nothing_that_it_does_not_need(command: list[str]) -> None:
    """Each of these packages takes longer to import than the whole of --help may take."""
    code = f"""
import contextlib, io, sys
from convexprune.cli.app import app
with contextlib.redirect_stdout(io.StringIO()) as shown, contextlib.suppress(SystemExit):
    app([*{command!r}, "--help"])
assert "Usage:" in shown.getvalue()
loaded = {{"torch", "numpy", "pydantic", "scipy"}} & set(sys.modules)
assert not loaded, loaded
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)  # noqa: S603
    assert done.returncode == 0, done.stderr
