"""Fine-tuning in which neurons go: the same however often it is ended, and verified."""

import copy
import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import Basic, PreActivation, mlp
from scored import images, joint, same
from tolerances import ROUNDING
from torch import Tensor, nn
from torch.nn import functional
from typer.testing import CliRunner

from convexprune import Data, Neurons, Options, prune_, verify
from convexprune.cli.app import app
from convexprune.errors import DamagedFile, PruningFailed
from convexprune.network.links import find_links
from convexprune.network.passes import network_outputs
from convexprune.pruners import available_pruners, finetuning
from convexprune.pruners.finetuning import crop_and_flip
from convexprune.pruners.fisher import Fisher
from convexprune.runs.journal import Journal
from convexprune.solvers.errors import InvalidInput, InvalidTolerance, ShapeMismatch, SolverRefused

TUNED = Fisher(steps=2, learning_rate=0.05, augment="crop and flip")
TARGET = Neurons(5 / 19, "network")  # 5 of the 19 neurons of ``images``, in 10 steps of which 3 are an epoch


def tuned(model: nn.Module, x: Tensor, y: Tensor, pruner: Fisher = TUNED, target: Any = TARGET, **keywords: Any) -> Any:
    return prune_(model, Data(x, labels=y, batch_size=16), target, method=pruner, **keywords)


class Stopper:
    """Says stop when it is asked for the n-th time."""

    def __init__(self, asked: int) -> None:
        self.left = asked

    def __call__(self) -> bool:
        self.left -= 1
        return self.left < 0


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Tensor], list[tuple[Any, ...]], Any]:
    """The weights, the rows, and which neurons went when, with their Δ and the losses."""
    (model, x, y), folder = images(), tmp_path_factory.mktemp("run")
    report = tuned(model, x, y, run=folder)
    return model.state_dict(), rows_of(report), removed_in(folder)


def rows_of(report: Any) -> list[tuple[Any, ...]]:
    return [(row.name, row.shape, row.nonzeros, row.neurons) for row in report.layers]


def removed_in(folder: Path) -> Any:
    """What the last state says."""
    records = Journal.existing(folder)[0].entries()
    return max(records, key=lambda record: record.data["step"]).data["removed"]


def test_two_runs_are_equal_bit_for_bit_and_the_seed_decides(uninterrupted: Any) -> None:
    states = []
    for seed in (0, 1):
        model, x, y = images()
        torch.manual_seed(17 + seed)
        assert rows_of(tuned(model, x, y, options=Options(seed=seed)))
        states.append(model.state_dict())
    assert same(states[0], uninterrupted[0])
    assert not same(states[1], uninterrupted[0])


@given(stops=st.lists(st.integers(0, 9), min_size=1, max_size=2), every=st.sampled_from([-1.0, 20.0]))
@settings(max_examples=6)
def test_stopped_at_any_step_it_goes_on_as_if_it_had_not_been(
    stops: list[int], every: float, uninterrupted: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """With dropout, momentum, batch statistics and images that are moved at random."""
    folder, trained = tmp_path_factory.mktemp("run"), images()[0].state_dict()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetuning, "_EVERY", every)
        for asked in stops:
            model, x, y = images()
            report = tuned(model, x, y, run=folder, stop=Stopper(asked))
            if report.provenance["stopped"] is not None:
                assert same(model.state_dict(), trained)
                assert not report.layers
        model, x, y = images()
        report = tuned(model, x, y, run=folder)
    assert same(model.state_dict(), uninterrupted[0])
    assert rows_of(report) == uninterrupted[1]
    assert removed_in(folder) == uninterrupted[2]
    assert report.notices == ("all weights were fine-tuned while neurons went: 10 steps, a neuron after every 2",)
    assert verify(images()[0], Data(x, labels=y, batch_size=16), folder).ok


def test_a_time_limit_ends_it_and_a_finished_run_needs_no_time(uninterrupted: Any, tmp_path: Path) -> None:
    model, x, y = images()
    trained = copy.deepcopy(model.state_dict())
    report = tuned(model, x, y, run=tmp_path, options=Options(time_limit=1e-9))
    assert report.provenance["stopped"] == "the time limit of 1e-09 s ran out"
    assert not report.certified
    assert same(model.state_dict(), trained)
    for options in (None, Options(time_limit=1e-9)):
        model, x, y = images()
        tuned(model, x, y, run=tmp_path, options=options)
        assert same(model.state_dict(), uninterrupted[0])


KILLED = """
import os, sys
import torch
from convexprune import Data, Neurons, prune_
from convexprune.pruners import finetuning
from convexprune.pruners.fisher import Fisher
from scored import images

def progress(stage, done, total):
    if stage == "fine-tuning" and done == 3:
        os._exit(9)

torch.set_num_threads(1)
finetuning._EVERY = -1.0
model, x, y = images()
pruner, target = Fisher(steps=2, learning_rate=0.05, augment="crop and flip"), Neurons(5 / 19, "network")
prune_(model, Data(x, labels=y, batch_size=16), target, method=pruner, run=sys.argv[1], progress=progress)
"""


def test_killed_it_goes_on_as_if_it_had_not_been(uninterrupted: Any, tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent)  # noqa: S603
    assert done.returncode == 9, done.stderr
    steps = [record.data["step"] for record in Journal.existing(tmp_path / "run")[0].entries()]
    assert sorted(steps) == [2, 4]
    model, x, y = images()
    seen: list[tuple[int, int]] = []

    def progress(stage: str, done: int, total: int) -> None:
        if stage == "fine-tuning":
            seen.append((done, total))

    tuned(model, x, y, run=tmp_path / "run", progress=progress)
    assert seen == [(done, 5) for done in (2, 3, 4, 5)]
    assert same(model.state_dict(), uninterrupted[0])


# What is kept, and verified


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished run that kept its last two states."""
    monkeypatch.setattr(finetuning, "_EVERY", -1.0)
    tuned(*images(), run=tmp_path / "run")
    return tmp_path / "run"


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "layers").iterdir()}


def test_a_finished_run_is_verified_and_nothing_is_written(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finetuning.FineTuning, "_step_", None)  # nothing is trained again
    model, x, y = images()
    before, trained = content(kept), copy.deepcopy(model.state_dict())
    found = verify(model, Data(x, labels=y, batch_size=16), kept)
    assert found.ok, str(found)
    assert found.complete
    assert [row.name for row in found.layers] == ["fine-tuning"]
    assert same(model.state_dict(), trained)
    tuned(model, x, y, run=kept)
    assert content(kept) == before


def test_neurons_that_went_are_zeros_in_all_that_is_kept(kept: Path) -> None:
    links, _ = find_links(images()[0])
    records = sorted(Journal.existing(kept)[0].entries(), key=lambda record: record.data["step"])
    assert [record.data["step"] for record in records] == [8, 10]
    for record in records:
        assert len(record.data["removed"]) == record.data["step"] // 2
        for link, neuron, step, delta, loss in record.data["removed"]:
            assert step % 2 == 0
            assert min(delta, loss) > 0
            assert not bool(record.tensors[f"model.{link}.weight"][neuron].any())
            assert not bool(record.tensors[f"model.{link}.bias"][neuron].any())
            [consumer], [repeat] = links[link].consumers, links[link].repeat
            columns = record.tensors[f"model.{consumer}.weight"][:, neuron * repeat : (neuron + 1) * repeat]
            assert not bool(columns.any())
            assert bool(record.tensors[f"optimiser.momentum_buffer.{link}.weight"].any())
    first, last = (record.data["removed"] for record in records)
    assert last[: len(first)] == first


@pytest.mark.parametrize("what", ["arrays", "data", "missing arrays"])
def test_a_damaged_state_is_a_difference_and_no_run_goes_on_from_it(what: str, kept: Path) -> None:
    path = sorted((kept / "layers").glob("*.json"))[0]
    if what == "missing arrays":
        path.with_suffix(".safetensors").unlink()
    else:
        path = path.with_suffix(".safetensors") if what == "arrays" else path
        bytes_ = bytearray(path.read_bytes())
        bytes_[-9] ^= 1
        path.write_bytes(bytes_)
    model, x, y = images()
    before, trained = content(kept), copy.deepcopy(model.state_dict())
    found = verify(model, Data(x, labels=y, batch_size=16), kept)
    assert not found.ok
    [row] = found.layers
    assert any("fine-tuning" in difference for difference in row.differences)
    with pytest.raises(DamagedFile, match=r"fine-tuning.*delete fine-tuning-\w+\.json"):
        tuned(model, x, y, run=kept)
    assert same(model.state_dict(), trained)
    assert content(kept) == before
    path.with_suffix(".json").unlink()
    tuned(model, x, y, run=kept)
    assert not same(model.state_dict(), trained)


def test_a_state_of_something_else_is_no_state(kept: Path) -> None:
    """Sealed as the journal would, but not what a run writes."""
    journal, described = Journal.existing(kept)
    record = max(journal.entries(), key=lambda record: record.data["step"])
    model, x, y = images()
    for data, tensors in (
        (record.data, {key: value for key, value in record.tensors.items() if key != "model.0.weight"}),
        (record.data, {**record.tensors, "model.0.weight": torch.zeros(2)}),
        ({**record.data, "removed": [["7", 99, 1, 0.0, 0.0]]}, record.tensors),
        ({**record.data, "removed": [["other", 0, 1, 0.0, 0.0]]}, record.tensors),
        ({**record.data, "number": "first"}, record.tensors),
        ({key: value for key, value in record.data.items() if key != "step"}, record.tensors),
    ):
        with Journal(kept, {key: described[key] for key in ("model", "data", "recipe")}) as writing:
            writing.put("fine-tuning", record.data["goal"], type(record)(data, tensors))
        with pytest.raises(DamagedFile, match="fine-tuning"):
            tuned(model, x, y, run=kept)
        found = verify(model, Data(x, labels=y, batch_size=16), kept)
        assert not found.ok


@pytest.mark.parametrize("asked", [0, 5])
def test_a_run_that_is_not_finished_is_verified_as_far_as_it_came(asked: int, tmp_path: Path) -> None:
    model, x, y = images()
    tuned(model, x, y, run=tmp_path, stop=Stopper(asked))
    before = content(tmp_path)
    found = verify(model, Data(x, labels=y, batch_size=16), tmp_path)
    assert found.ok, str(found)
    assert not found.complete
    assert found.missing == ("3", "7", "9")
    assert content(tmp_path) == before


def test_without_any_state_nothing_is_recorded_and_none_is_made(tmp_path: Path) -> None:
    model, x, y = images()
    tuned(model, x, y, run=tmp_path, stop=Stopper(3))
    for path in (tmp_path / "layers").iterdir():
        path.unlink()
    found = verify(model, Data(x, labels=y, batch_size=16), tmp_path)
    assert (found.ok, found.complete, found.layers) == (True, False, ())
    assert not content(tmp_path)


MODEL = """
from torch import nn

def build():
    return nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Dropout(0.2),
                         nn.Linear(6 * 4 * 3, 8), nn.ReLU(), nn.Linear(8, 3))
"""


def test_the_command_line_fine_tunes_verifies_and_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "tuned_model.py").write_text(MODEL)
    torch.manual_seed(0)
    namespace: dict[str, Any] = {}
    exec(MODEL, namespace)  # noqa: S102
    torch.save(namespace["build"]().state_dict(), "trained.pt")
    np.savez("data.npz", x=torch.randn(40, 2, 6, 5).numpy(), y=np.arange(40) % 3)
    given = ["tuned_model:build", "--weights", "trained.pt", "--calibration", "data.npz", "--key", "x"]
    own = ["--method", "fisher", "--target", "neurons 0.5 scope=network", "--out", "out", "--labels-key", "y"]
    own += [f"--method-option={each}" for each in ("steps=2", "learning_rate=0.01", "augment=crop and flip")]
    verified = ["verify", "out", *given, "--labels-key", "y"]
    result = CliRunner().invoke(app, ["prune", *given, *own, "--time-limit", "1e-9"])
    assert result.exit_code == 4, result.output
    assert CliRunner().invoke(app, verified).exit_code == 3
    assert CliRunner().invoke(app, [*verified, "--partial"]).exit_code == 0
    for said in ("all weights were fine-tuned", "Nothing to do"):
        result = CliRunner().invoke(app, ["prune", *given, *own])
        assert result.exit_code == 0, result.output
        assert said in " ".join(result.output.split())
    result = CliRunner().invoke(app, verified)
    assert result.exit_code == 0, result.output
    assert "report.json and model.safetensors say what the entries say" in " ".join(result.output.split())
    assert CliRunner().invoke(app, ["report", "out"]).exit_code == 0
    assert "All weights were fine-tuned" in (tmp_path / "out" / "report.html").read_text()
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [row["neurons"] for row in report["layers"] if row["name"] in ("0", "5")]
    assert sum(row["neurons"] for row in report["layers"] if row["name"] in ("0", "5")) == 7
    assert report["provenance"]["method_options"]["augment"] == "crop and flip"
    result = CliRunner().invoke(app, ["prune", *given, *own[:-3], "--dry-run"])
    assert result.exit_code == 0, result.output


# What comes out


def test_neurons_are_really_removed_and_zeros_in_their_place_compute_the_same() -> None:
    removed, x, y = images()
    zeros = copy.deepcopy(removed)
    trained = copy.deepcopy(removed)
    report = tuned(removed, x, y)
    assert [row.status for row in tuned(zeros, x, y, options=Options(remove=False)).layers] == ["neurons"] * 4
    sizes = [len(removed[0].weight), len(removed[3].weight), len(removed[7].weight)]
    assert sum(sizes) == 14
    assert removed[3].weight.shape[1] == removed[1].num_features == removed[0].out_channels == sizes[0]
    assert removed[9].in_features == sizes[2]
    assert [len(zeros[n].weight) for n in (0, 3, 7)] == [6, 5, 8]
    with torch.no_grad():
        torch.testing.assert_close(removed(x), zeros(x), rtol=1e-5, atol=1e-6)
        error = (removed(x) - trained(x)).norm() / trained(x).norm()
    assert report.output_error == pytest.approx(float(error), rel=1e-4)
    assert all(not torch.equal(value, trained.state_dict()[key]) for key, value in zeros.state_dict().items())
    assert report.certified
    assert report.verdict == "measured, not certified"


def test_between_removals_it_is_stochastic_gradient_descent(tmp_path: Path) -> None:
    """Against torch's own training on the same batches, with Δ by hand; three neurons go, after three steps each."""
    torch.manual_seed(0)
    model, x, y = mlp(6, 10, 7, 3).double(), torch.randn(40, 6).double(), torch.randint(0, 3, (40,))
    other, data, pruner = copy.deepcopy(model), Data(x, labels=y, batch_size=16), Fisher(3, 0.1, 0.8, 0.01)
    options = Options(seed=5, remove=False)
    prune_(model, data, Neurons(3 / 17, "network"), method=pruner, options=options, run=tmp_path)
    optimiser = torch.optim.SGD(other.parameters(), 0.1, 0.8, weight_decay=0.01)
    epochs = itertools.chain.from_iterable(data.shuffled(finetuning._mixed(5, epoch)) for epoch in range(9))
    gone: list[tuple[str, int]] = []

    def mask() -> None:
        with torch.no_grad():
            for name, neuron in gone:
                for tensor in (other[int(name)].weight, other[int(name)].bias, other[int(name) + 2].weight.T):
                    tensor[neuron] = 0

    expected = []
    for step in range(1, 10):
        if step % 3 == 1:
            sums, losses = {"0": torch.zeros(10).double(), "2": torch.zeros(7).double()}, []
        batch, labels = next(epochs)
        optimiser.zero_grad()
        one = other[1](other[0](batch))
        two = other[3](other[2](one))
        loss = functional.cross_entropy(other[4](two), labels)
        for name, a, g in zip(sums, (one, two), torch.autograd.grad(loss, (one, two), retain_graph=True), strict=True):
            sums[name] += (16 * a * g).detach().square().sum(0) / 2
        loss.backward()
        optimiser.step()
        mask()
        losses.append(float(loss.detach()))
        if step % 3 == 0:
            for name, neuron in gone:
                sums[name][neuron] = torch.inf
            name = min(sums, key=lambda name: float(sums[name].min()))
            gone.append((name, int(sums[name].argmin())))
            mask()
            expected.append([*gone[-1], step, float(sums[name].min()) / 48, sum(losses) / 3])
    found = removed_in(tmp_path)
    assert [each[:3] for each in found] == [each[:3] for each in expected]
    for one, by_hand in zip(found, expected, strict=True):
        assert one[3:] == pytest.approx(by_hand[3:], rel=ROUNDING, abs=1e-15)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, other.state_dict()[key], rtol=ROUNDING, atol=1e-12)


@pytest.mark.parametrize(
    ("target", "left"),
    [
        (Neurons(0.5), {"0": 3, "3": 2, "7": 4}),
        (Neurons(4), {"0": 4, "3": 4, "7": 4}),
        (Neurons({"0": 2, "*": 0.0}), {"0": 2, "3": 5, "7": 8}),
        (Neurons(0.0), {"0": 6, "3": 5, "7": 8}),
        (Neurons(0.9), {"0": 1, "3": 1, "7": 1}),
    ],
)
def test_each_layer_keeps_as_many_as_wanted(target: Neurons, left: dict[str, int]) -> None:
    model, x, y = images()
    tuned(model, x, y, Fisher(1), target)
    assert {name: len(model.get_submodule(name).weight) for name in left} == left


@pytest.mark.parametrize("name", ["mobilenet", "perceptron"])
def test_residual_networks_lose_neurons_of_all_layers_that_are_added(name: str) -> None:
    model, x, y = joint(name, 32)
    total = sum(len(model.get_submodule(link).weight) for link in find_links(model, residual=True)[0])
    zeros = copy.deepcopy(model)
    tuned(model, x, y, Fisher(1, 0.01), Neurons(0.3, "network"))
    tuned(zeros, x, y, Fisher(1, 0.01), Neurons(0.3, "network"), options=Options(remove=False))
    left = sum(len(model.get_submodule(link).weight) for link in find_links(model, residual=True)[0])
    assert left == round(0.7 * total)
    torch.testing.assert_close(network_outputs(model, x), network_outputs(zeros, x), rtol=1e-4, atol=1e-5)


def residual() -> tuple[nn.Module, Tensor, Tensor]:
    """Blocks behind convolutions, behind norms, and with a convolution in the shortcut; the stream keeps its width."""
    torch.manual_seed(0)
    blocks = [Basic(4, 4), Basic(4, 4), PreActivation(4), Basic(4, 5, 2)]
    ends = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3)]
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), *blocks, *ends)
    x = torch.randn(32, 2, 6, 6)
    with torch.no_grad():
        model.train()(x)
    return model.eval(), x, torch.randint(0, 3, (32,))


INNER = ("1.conv1", "2.conv1", "3.conv1", "4.conv1")


def shortcut_of(block: nn.Module, x: Tensor) -> Tensor:
    """The block without its branch."""
    if isinstance(block, PreActivation):
        return x
    return (x if block.shortcut is None else block.shortcut(x)).relu()


@pytest.mark.parametrize("part", [0.5, 0.99])
def test_a_block_that_loses_all_its_neurons_is_its_shortcut(part: float, tmp_path: Path) -> None:
    """Crowley et al., section 3: of 15 neurons of branches one stays, where nearly all are to go."""
    model, x, y = residual()
    zeros, options = copy.deepcopy(model), Options(layers=INNER)
    pruner, target = Fisher(2, 0.02), Neurons(part, "network")
    tuned(model, x, y, pruner, target, options=options, run=tmp_path, stop=Stopper(9))
    report = tuned(model, x, y, pruner, target, options=options, run=tmp_path)
    tuned(zeros, x, y, pruner, target, options=Options(layers=INNER, remove=False))
    left = {name: len(model.get_submodule(name).weight) for name in INNER}
    assert sum(left.values()) == (1 if part == 0.99 else 8)
    assert {row.name: row.neurons for row in report.layers if row.name in INNER} == left
    with torch.no_grad():
        h = x
        for number, block in enumerate(model):
            emptied = left.get(f"{number}.conv1") == 0
            after = shortcut_of(block, h) if emptied else block(h)
            assert torch.equal(after, block(h))
            h = after
        assert part == 0.5 or list(left.values()).count(0) == 3
        torch.testing.assert_close(model(x), zeros(x), rtol=1e-5, atol=1e-6)
    found = verify(residual()[0], Data(x, labels=y, batch_size=16), tmp_path)
    assert found.ok, str(found)
    assert found.complete


def test_where_outputs_would_not_depend_on_inputs_a_neuron_stays() -> None:
    """The stream of a residual network, and each layer of a chain."""
    model, x, y = residual()
    tuned(model, x, y, Fisher(1, 0.001), Neurons(0.85, "network"))
    assert len(model[0].weight) >= 1
    assert len(model[4].conv2.weight) >= 1
    with torch.no_grad():
        assert float(model(x).std(0).max()) > 0


def test_weights_that_are_zero_stay_zero_and_frozen_ones_stay_as_they_are() -> None:
    model, x, y = images()
    with torch.no_grad():
        model[3].weight[:, :, 0] = 0
    model[7].weight.requires_grad_(False)
    model[1].weight.requires_grad_(False)
    trained = copy.deepcopy(model.state_dict())
    options = Options(keep_zeros=True, remove=False)
    tuned(model, x, y, options=options)
    assert not bool(model[3].weight[:, :, 0].any())
    assert not torch.equal(model[3].weight, trained["3.weight"])
    assert bool(((model[7].weight == trained["7.weight"]) | (model[7].weight == 0)).all())
    assert torch.equal(model[1].weight, trained["1.weight"])
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    assert flags == {name: name not in ("7.weight", "1.weight") for name in flags}


@pytest.mark.parametrize("guard", ["no_grad", "inference_mode", "autocast", "jobs", "default dtype"])
def test_wherever_it_is_called_the_result_is_the_same(guard: str, uninterrupted: Any) -> None:
    guards: dict[str, Callable[[], Any]] = {
        "no_grad": torch.no_grad,
        "inference_mode": torch.inference_mode,
        "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    }
    model, x, y = images()
    with guards.get(guard, nullcontext)():
        report = tuned(model, x * 1, y * 1, jobs=2 if guard == "jobs" else 1)
    assert same(model.state_dict(), uninterrupted[0])
    assert rows_of(report) == uninterrupted[1]
    assert not any(p.is_inference() for p in model.parameters())


def test_nothing_of_the_callers_is_moved() -> None:
    model, x, y = images()
    model[4].train()
    before = (x.clone(), y.clone())
    flags = [module.training for module in model.modules()]
    state, numbers, threads = torch.get_rng_state(), np.random.get_state()[1].copy(), torch.get_num_threads()  # noqa: NPY002
    tuned(model, x, y)
    assert torch.equal(torch.get_rng_state(), state)
    assert bool((np.random.get_state()[1] == numbers).all())  # noqa: NPY002
    assert torch.get_num_threads() == threads
    assert torch.equal(x, before[0])
    assert torch.equal(y, before[1])
    assert [module.training for module in model.modules()] == flags
    assert all(p.grad is None and p.requires_grad and not p._backward_hooks for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())


def test_data_may_be_batches_of_anything_and_the_loss_ones_own() -> None:
    states = []
    torch.manual_seed(0)
    start, x = mlp(6, 10, 2), torch.randn(40, 6)
    y = torch.randn(40, 2, dtype=torch.float64)
    made: list[Any] = [
        [(x[:20], y[:20]), (x[20:], y[20:])],
        [{"input": x[:20], "target": y[:20]}, {"input": x[20:], "target": y[20:]}],
        [(x[:20].double(), y[:20]), (x[20:].numpy(), y[20:])],
    ]
    for data in (
        *(Data(each, loss=nn.MSELoss()) for each in made),
        Data([x[:20], x[20:]], labels=y, loss=nn.MSELoss()),
    ):
        model = copy.deepcopy(start)
        prune_(model, data, Neurons(0.3), method=Fisher(2, 0.01))
        states.append(model.state_dict())
    assert all(same(state, states[0]) for state in states[1:])


# Images


def shifts(image: Tensor, by: int = 4) -> list[Tensor]:
    """All crops of the image with zeros around it, and their mirror images."""
    height, width = image.shape[1:]
    padded = torch.zeros(len(image), height + 2 * by, width + 2 * by)
    padded[:, by : by + height, by : by + width] = image
    places = itertools.product(range(2 * by + 1), repeat=2)
    crops = [padded[:, i : i + height, j : j + width] for i, j in places]
    return [*crops, *(crop.flip(2) for crop in crops)]


@given(seed=st.integers(0, 10_000), height=st.integers(1, 6), width=st.integers(1, 6), channels=st.integers(1, 3))
def test_images_are_crops_and_mirror_images_of_the_padded_ones(
    seed: int, height: int, width: int, channels: int
) -> None:
    x = torch.rand(7, channels, height, width, generator=torch.Generator().manual_seed(seed)) + 0.1
    moved = crop_and_flip(x, torch.Generator().manual_seed(seed))
    assert moved.shape == x.shape
    for image, other in zip(x, moved, strict=True):
        assert any(torch.equal(other, crop) for crop in shifts(image))
    assert torch.equal(moved, crop_and_flip(x, torch.Generator().manual_seed(seed)))


def test_all_places_are_as_likely_and_half_are_mirrored() -> None:
    image = torch.arange(1.0, 13).view(1, 3, 4)
    moved = crop_and_flip(image.expand(20_000, 1, 3, 4), torch.Generator().manual_seed(0))
    counts = {}
    for crop in moved:
        counts[tuple(crop.flatten().tolist())] = counts.get(tuple(crop.flatten().tolist()), 0) + 1
    expected: dict[tuple[float, ...], int] = {}
    for crop in shifts(image):
        expected[tuple(crop.flatten().tolist())] = expected.get(tuple(crop.flatten().tolist()), 0) + 1
    assert counts.keys() == expected.keys()
    for crop, ways in expected.items():
        mean = 20_000 * ways / 162
        assert abs(counts[crop] - mean) < 5 * mean**0.5


def test_only_images_are_moved() -> None:
    x, generator = torch.rand(5, 1, 4, 4), torch.Generator()
    batch = {"pixels": x, "labels": torch.arange(5), "tokens": torch.zeros(5, 1, 4, 4, dtype=torch.int64)}
    moved = crop_and_flip(batch, generator.manual_seed(0))
    assert moved["labels"] is batch["labels"]
    assert moved["tokens"] is batch["tokens"]
    assert torch.equal(moved["pixels"], crop_and_flip(x, generator.manual_seed(0)))
    for other, says in (
        (torch.rand(5, 3), "no floating-point tensors"),
        ((x, x), "2 floating-point tensors"),
        (x.to(torch.uint8), "no floating-point tensors"),
    ):
        with pytest.raises(InvalidInput, match=f'augment: "crop and flip".*{says}'):
            crop_and_flip(other, generator)
    torch.manual_seed(0)
    model, data = mlp(6, 10, 3), Data(torch.randn(20, 6), labels=torch.randint(0, 3, (20,)))
    with pytest.raises(InvalidInput, match="augment"):
        prune_(model, data, Neurons(0.3), method=Fisher(1, augment="crop and flip"))


# What is refused


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"steps": -1}, InvalidTolerance),
        ({"steps": 1.5}, InvalidTolerance),
        ({"learning_rate": 0.0}, InvalidTolerance),
        ({"momentum": 1}, InvalidTolerance),
        ({"momentum": -0.1}, InvalidTolerance),
        ({"weight_decay": -1e-3}, InvalidTolerance),
        ({"beta": -1.0}, InvalidTolerance),
        ({"augment": "mixup"}, InvalidInput),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=next(iter(options))):
        Fisher(**options)


def frozen(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.requires_grad_(False)


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "a refit": ({"options": Options(refit=True)}, SolverRefused, "refuses: refit: .*fine-tuned.*steps=0"),
    "an eps": ({"target": "eps 0.1"}, SolverRefused, "cannot reach a target 'eps'"),
    "no labels": ({"labels": None}, InvalidInput, "expected labels, and found none"),
    "too few": ({"labels": torch.zeros(40, dtype=torch.int64)}, ShapeMismatch, "each of the 48 samples, found 40"),
    "too many": ({"labels": torch.zeros(50, dtype=torch.int64)}, ShapeMismatch, "each of the 48 samples, found 50"),
    "another class": ({"labels": torch.full((48,), 3)}, InvalidInput, "from 0 to 2 a sample"),
    "not a number": (
        {"loss": lambda outputs, y: outputs.square().mean() * torch.nan},
        PruningFailed,
        "the loss is nan after 0 steps of fine-tuning: give a smaller learning_rate",
    ),
    "a loss that grows": (
        {"pruner": Fisher(40, 1e30), "loss": lambda outputs, y: outputs.square().mean()},
        PruningFailed,
        r"the loss is (nan|inf) after [1-9]\d* steps of fine-tuning",
    ),
    "a loss of each": (
        {"loss": nn.CrossEntropyLoss(reduction="none")},
        InvalidInput,
        r"loss: expected a tensor with one number.*found \[16\]",
    ),
    "nothing to train": ({"change": frozen}, InvalidInput, "no parameter of the model requires a gradient"),
    "more than there are": (
        {"target": Neurons(0.99, "network")},
        InvalidInput,
        "neurons: 3 are the fewest that can be left, 1 were wanted",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_is_said_and_the_model_is_as_before(wrong: str) -> None:
    given, error, says = WRONG[wrong]
    model, x, y = images()
    given.get("change", lambda _: None)(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    data = Data(x, labels=given.get("labels", y), batch_size=16, loss=given.get("loss"))
    own = {"method": given.get("pruner", Fisher(1)), "options": given.get("options")}
    with pytest.raises(error, match=says):
        prune_(model, data, given.get("target", TARGET), **own)
    assert same(model.state_dict(), before)


def test_it_is_listed_with_its_options() -> None:
    own = {"steps": 100, "learning_rate": 8e-4, "momentum": 0.9, "weight_decay": 5e-4, "beta": 0.0, "augment": "none"}
    assert available_pruners()["fisher"].options == own
