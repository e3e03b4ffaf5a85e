"""``convexprune evaluate`` as a user types it: files in, figures out, and what it makes of pixels."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from typer.testing import CliRunner, Result

from convexprune import Neurons, Sparsity, prune_, save_weights
from convexprune.cli.app import app
from convexprune.cli.source import pixel_scale
from convexprune.evaluation import CORRUPTIONS, Evaluation, Series, evaluate, load_evaluation

Array = np.ndarray[Any, Any]
COUNT = 24
LENET = ["lenet-300-100", "--data", "grey.npz"]
ONE = [*LENET, "--weights", "w50.safetensors"]
PARENT = ["--parent", "whole.safetensors"]
PLAIN = ["--no-corruptions", "--no-noise"]
SERIES = [*ONE, "--weights", "w90.safetensors", *PARENT]
OWN = """
import numpy as np
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 5), nn.ReLU(), nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(36, 3)]
    return nn.Sequential(*layers)

def pixels(images):
    x = torch.from_numpy(np.ascontiguousarray(images)).float() / (255 if images.dtype == np.uint8 else 1)
    return x.movedim(3, 1) if x.shape[3] == 3 else x

def normalised(images):
    mean, std = torch.tensor([[0.4, 0.5, 0.6], [0.2, 0.3, 0.4]])[:, :, None, None]
    return (pixels(images) - mean) / std

build.prepare = normalised

def gamma():
    return build()

gamma.prepare = lambda images: pixels(images) ** 2.2

class Words(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(20, 6), nn.Linear(6, 3)

    def forward(self, input_ids, attention_mask):
        return self.head((self.embed(input_ids) * attention_mask[..., None]).sum(1))
"""


def lenet() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder: networks, images of several kinds with labels, and a module."""
    place = tmp_path_factory.mktemp("user")
    (place / "my_seeing_model.py").write_text(OWN)
    rng = np.random.default_rng(0)
    grey, colour = (rng.integers(0, 256, (COUNT, 28, 28, *end), dtype=np.uint8) for end in ((), (3,)))
    with torch.no_grad():
        labels = lenet()(torch.from_numpy(grey).flatten(1) / 255).argmax(1).numpy()
    np.savez(place / "grey.npz", x_test=grey, y_test=labels, few=labels[:5], other=grey / 255)
    np.savez(place / "inputs.npz", x=grey)
    for name, images in {"bytes": colour, "front": colour.transpose(0, 3, 1, 2), "floats": colour / 255}.items():
        np.savez(place / f"{name}.npz", x=images, y=np.arange(COUNT) % 3)
    ids = rng.integers(1, 20, (COUNT, 6))
    np.savez(place / "words.npz", input_ids=ids, attention_mask=(ids > 4).astype(np.int64), labels=np.arange(COUNT) % 3)
    save_weights(lenet(), place / "whole.safetensors")
    for sparsity in (0.5, 0.9):
        model = lenet()
        prune_(model, target=Sparsity(sparsity, "network"), method="magnitude")
        save_weights(model, place / f"w{100 * sparsity:.0f}.safetensors")
    smaller = lenet()
    prune_(smaller, target=Neurons(0.5), method="magnitude")
    save_weights(smaller, place / "small.safetensors")
    names: dict[str, Any] = {}
    exec(OWN, names)  # noqa: S102 - as the command imports it
    save_weights(names["build"](), place / "own.safetensors")
    save_weights(names["Words"](), place / "words.safetensors")
    return place


@pytest.fixture(autouse=True)
def at_home(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "160")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["evaluate", *arguments])


def told(*arguments: str) -> Any:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def rows_of(answer: Any) -> list[str]:
    """What the distributions of one network are called."""
    return [f"{row['name']} {row['severity']}" for row in answer["evaluation"]["rows"]]


def test_one_network_is_evaluated_under_all_corruptions_of_its_images() -> None:
    answer = told(*ONE)
    found = Evaluation.from_dict(answer["evaluation"])
    assert (answer["status"], answer["kind"], answer["files"]) == ("evaluated", "evaluation", {})
    assert {row.name for row in found.rows} == {"nominal", *CORRUPTIONS} - {"frost", "saturate"}
    assert found.provenance["shape"] == [1, 28, 28]
    assert (found.provenance["mean"], found.provenance["std"]) == ([pytest.approx(0, abs=1e-6)], [pytest.approx(1)])
    assert (found.parent, found.noise) == (None, ())


def test_figures_are_those_of_the_library(folder: Path) -> None:
    model = lenet()
    prune_(model, target=Sparsity(0.5, "network"), method="magnitude")
    with np.load(folder / "grey.npz") as arrays:
        x, y = torch.from_numpy(arrays["x_test"]).flatten(1) / 255, torch.from_numpy(arrays["y_test"])
    own = evaluate(model, (x, y), parent=lenet(), shape=(1, 28, 28), corruptions=["fog"])
    found = Evaluation.from_dict(told(*ONE, *PARENT, "--corruption", "fog")["evaluation"])
    assert found.nominal == own.nominal
    assert found.rows[1].outcomes == own.rows[1].outcomes
    assert found.parent is not None
    assert found.parent.nominal.score == 1
    assert found.noise[0].agreement == found.nominal.agreement
    assert len(found.noise) == 15


def test_several_networks_are_a_series_with_their_potential() -> None:
    answer = told(*SERIES, "--control", "w90.safetensors", "--corruption", "fog", "--name", "by size", "--no-noise")
    found = Series.from_dict(answer["evaluation"])
    assert (answer["kind"], found.name) == ("series", "by size")
    assert found.ratios == pytest.approx((0.5, 0.9), abs=1e-3)
    assert found.control is not None
    assert found.control.rows == found.evaluations[1].rows
    assert answer["prune_potential"] == json.loads(json.dumps(found.prune_potential().to_dict()))
    text = " ".join(run(*SERIES, "--corruption", "fog", "--no-noise").output.split())
    assert text.startswith(f"w50: {COUNT} samples")  # called as the first file
    assert "prune potential: mean" in text


def test_smaller_networks_are_read_and_their_missing_weights_counted() -> None:
    answer = told(*SERIES, "--weights", "small.safetensors", *PLAIN)
    kept = (784 * 150 + 150 * 50 + 50 * 10) / (784 * 300 + 300 * 100 + 100 * 10)
    assert answer["evaluation"]["ratios"][2] == pytest.approx(1 - kept)


def test_corruptions_severities_noise_and_samples_are_chosen() -> None:
    chosen = ["--corruption", "fog", "--corruption", "contrast", "--severity", "1", "--severity", "5"]
    titles = ["nominal None", "fog 1", "fog 5", "contrast 1", "contrast 5"]
    assert rows_of(told(*ONE, *chosen)) == titles
    assert rows_of(told(*ONE, "--no-corruptions")) == ["nominal None"]
    assert told(*ONE, *PARENT, *PLAIN)["evaluation"]["noise"] == []
    first, again = (told(*ONE, *PLAIN, "--samples", "10")["evaluation"]["rows"][0] for _ in range(2))
    assert first == again
    assert first["samples"] == 10
    one, other = (told(*ONE, "--corruption", "gaussian_noise", "--seed", str(seed)) for seed in (0, 1))
    assert one["evaluation"]["provenance"]["seed"] == 0
    assert one["evaluation"]["rows"][0] == other["evaluation"]["rows"][0]
    assert one["evaluation"]["rows"][1] != other["evaluation"]["rows"][1]


def test_samples_have_their_share_of_each_label(folder: Path) -> None:
    sizes = np.repeat([0, 1, 2], [12, 6, 6])
    with np.load(folder / "bytes.npz") as arrays:
        np.savez(folder / "sorted.npz", x=arrays["x"], y=sizes)
    own = ["my_seeing_model:build", "--weights", "own.safetensors", "--data", "sorted.npz", "--no-corruptions"]
    (row,) = told(*own, "--samples", "8")["evaluation"]["rows"]
    assert row["samples"] == 8
    assert all(value is not None for value in row["classes"])


def test_files_are_written_and_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    for arguments, kind in ((ONE, Evaluation), (SERIES, Series)):
        out = tmp_path / kind.kind
        answer = told(*arguments, *PLAIN, "--out", str(out))
        assert answer["files"] == {
            "evaluation": str(out / "evaluation.json"),
            "figures": str(out / "evaluation.parquet"),
        }
        found = load_evaluation(out / "evaluation.json")
        assert isinstance(found, kind)
        assert parquet.read_table(out / "evaluation.parquet").to_pylist() == found.records()
    assert str(tmp_path) in run(*ONE, *PLAIN, "--out", str(tmp_path)).output.replace("\n", "")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    answer = told(*ONE, *PLAIN, "--out", str(tmp_path / "alone"))
    assert list(answer["files"]) == ["evaluation"]
    assert "pip install" in answer["notes"][0]
    assert load_evaluation(tmp_path / "alone" / "evaluation.json") is not None


def test_the_page_of_a_run_shows_what_is_written_into_its_folder(tmp_path: Path) -> None:
    source = ["lenet-300-100", "--weights", "whole.safetensors"]
    pruned = ["prune", *source, "--method", "magnitude", "--sparsity", "0.5", "--out", str(tmp_path)]
    assert CliRunner().invoke(app, pruned).exit_code == 0
    page = tmp_path / "report.html"
    assert CliRunner().invoke(app, ["report", str(tmp_path)]).exit_code == 0
    assert "Beyond accuracy" not in page.read_text(encoding="utf-8")
    own = [*LENET, "--weights", str(tmp_path / "model.safetensors"), *PARENT, *PLAIN, "--out", str(tmp_path)]
    assert run(*own).exit_code == 0
    assert CliRunner().invoke(app, ["report", str(tmp_path)]).exit_code == 0
    assert "Beyond accuracy" in page.read_text(encoding="utf-8")
    assert "finished" in CliRunner().invoke(app, pruned).output  # the run is what it was
    assert CliRunner().invoke(app, ["verify", str(tmp_path), *source]).exit_code == 0


WRONG = {
    "several without a parent": ([*ONE, "--weights", "w90.safetensors"], "give --parent"),
    "no such corruption": ([*ONE, "--corruption", "rain"], "found 'rain', expected some of gaussian_noise"),
    "one of colours": ([*ONE, "--corruption", "saturate"], "saturate: expected images of 3 channels, found 1"),
    "severity 6": ([*ONE, "--severity", "6"], "severities: expected whole numbers from 1 to 5"),
    "noise without a parent": ([*ONE, "--noise"], "noise: networks are compared with their parent"),
    "a control without a parent": ([*ONE, "--control", "w90.safetensors"], "control: networks are compared"),
    "no labels": (["lenet-300-100", "--weights", "w50.safetensors", "--data", "inputs.npz"], "expected"),
    "no such key": ([*ONE, "--data-key", "images"], "not images; name one of them as the key"),
    "no such labels": ([*ONE, "--label-key", "y"], "not y; name one of them as the key"),
    "fewer labels": ([*ONE, "--label-key", "few"], f"its arrays have [{COUNT}, 5] samples"),
    "images as labels": ([*ONE, "--label-key", "x_test"], "labels that are whole numbers, one a sample"),
    "a network of another kind": ([*LENET, "--weights", "own.safetensors"], "own.safetensors"),
    "no file": ([*LENET, "--weights", "none.safetensors"], "none.safetensors"),
    "a file for a folder": ([*ONE, "--out", "grey.npz/out"], "a file, where a folder is to be"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_evaluated_ends_in_one_error(case: str) -> None:
    arguments, says = WRONG[case]
    result = run(*arguments, "--json")
    assert result.exit_code == 1
    assert says in json.loads(result.stdout)["error"]["message"]
    assert run(*arguments).exit_code == 1


OF_OWN = ["--weights", "own.safetensors", "--data"]


@pytest.mark.parametrize("kind", ["bytes", "front", "floats"])
def test_how_an_own_model_normalises_is_found_out(kind: str) -> None:
    answer = told("my_seeing_model:build", *OF_OWN, f"{kind}.npz", "--corruption", "saturate")
    known = answer["evaluation"]["provenance"]
    assert (known["mean"], known["std"]) == (pytest.approx([0.4, 0.5, 0.6]), pytest.approx([0.2, 0.3, 0.4]))
    assert known["shape"] == []
    assert rows_of(answer) == ["nominal None", "saturate 3"]


def test_corruptions_of_inputs_that_are_no_scaled_pixels_are_left_out_and_that_is_said() -> None:
    answer = told("my_seeing_model:gamma", *OF_OWN, "bytes.npz")
    assert rows_of(answer) == ["nominal None"]
    (notice,) = answer["evaluation"]["notices"]
    assert notice.startswith("corruptions are left out: inputs are not (pixels − mean)/std of images")
    several = [*OF_OWN, "bytes.npz", "--weights", "own.safetensors", "--parent", "own.safetensors", "--no-noise"]
    assert told("my_seeing_model:gamma", *several)["evaluation"]["parent"]["notices"] == [notice]
    assert notice in " ".join(run("my_seeing_model:gamma", *several).output.split())
    result = run("my_seeing_model:gamma", *OF_OWN, "bytes.npz", "--corruption", "fog", "--json")
    assert "--corruption: inputs are not" in json.loads(result.stdout)["error"]["message"]
    assert told("my_seeing_model:gamma", *OF_OWN, "bytes.npz", "--no-corruptions")["evaluation"]["notices"] == []


def test_several_arrays_by_name_are_evaluated_without_noise_unless_it_is_asked_for() -> None:
    words = ["my_seeing_model:Words", "--weights", "words.safetensors", "--data", "words.npz"]
    words += ["--parent", "words.safetensors"]
    answer = told(*words)
    (row,) = answer["evaluation"]["rows"]
    assert (row["samples"], row["agreement"]) == (COUNT, 1)
    assert answer["evaluation"]["noise"] == []
    result = run(*words, "--noise", "--json")
    assert "noise: expected inputs of floating-point numbers" in json.loads(result.stdout)["error"]["message"]


# How pixels became inputs.

LAYOUTS = ("grey", "behind", "before")


@st.composite
def images(draw: st.DrawFn) -> tuple[Array, Tensor]:
    """Arrays of images of any kind, and their pixels [n, channels, height, width] from 0 to 1."""
    layout, channels = draw(st.sampled_from(LAYOUTS)), draw(st.sampled_from([1, 3]))
    n, height, width = draw(st.integers(1, 9)), draw(st.integers(4, 9)), draw(st.integers(4, 9))
    values = np.random.default_rng(draw(st.integers(0, 99))).integers(
        0, 256, (n, 1 if layout == "grey" else channels, height, width), dtype=np.uint8
    )
    shown = {"grey": values[:, 0], "behind": values.transpose(0, 2, 3, 1), "before": values}[layout]
    kind = draw(st.sampled_from(["bytes", "whole numbers", "floats", "floats to 255"]))
    made = {"bytes": shown, "whole numbers": shown.astype(np.int64), "floats to 255": shown.astype(np.float32)}
    return made.get(kind, shown / 255), torch.from_numpy(values / 255)


@given(images(), st.lists(st.tuples(st.floats(-3, 3), st.floats(0.01, 300)), min_size=3, max_size=3), st.booleans())
def test_mean_and_std_of_any_normalisation_are_recovered(given_images, scales, flat: bool) -> None:
    array, pixels = given_images
    mean, std = torch.tensor(scales[: pixels.shape[1]], dtype=torch.float64)[:, :, None, None].unbind(1)
    inputs = ((pixels - mean) / std).float()
    found = pixel_scale(inputs.flatten(1) if flat else inputs, array)
    assert found is not None
    assert found["mean"] == pytest.approx(mean.flatten().tolist(), abs=1e-4)
    assert found["std"] == pytest.approx(std.flatten().tolist(), rel=1e-4)
    assert found["shape"] == (tuple(pixels.shape[1:]) if flat else None)


OTHERWISE = {
    "gamma": lambda p: p**1.5,
    "each pixel its own": lambda p: p * torch.linspace(1, 2, p.shape[3]),
    "each image its own": lambda p: (p - p.mean((1, 2, 3), keepdim=True)) / p.std((1, 2, 3), keepdim=True),
    "another size": lambda p: nn.functional.interpolate(p, (5, 5)),
    "as many pixels of another shape": lambda p: p.reshape(len(p), p.shape[1], 1, -1),
    "turned": lambda p: p.flip(2),
    "inverted": lambda p: 1 - p,
    "constant": torch.zeros_like,
    "whole numbers": lambda p: (255 * p).long(),
    "channels behind": lambda p: p.movedim(1, 3),
    "no tensor": lambda p: [p],
}


@pytest.mark.parametrize("how", OTHERWISE)
@given(seed=st.integers(0, 99))
def test_inputs_that_are_made_otherwise_are_told_apart(how: str, seed: int) -> None:
    array = np.random.default_rng(seed).random((6, 3, 7, 8), np.float32)
    assert pixel_scale(OTHERWISE[how](torch.from_numpy(array)), array) is None


@pytest.mark.parametrize("shape", [(6,), (6, 4), (6, 2, 3, 3, 3), (6, 4, 8, 8)])
def test_arrays_that_are_no_images_have_no_scale(shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).random(shape, np.float32)
    assert pixel_scale(torch.from_numpy(array), array) is None
    assert pixel_scale(torch.from_numpy(array), array.astype(np.complex64)) is None


def test_flattened_arrays_become_images() -> None:
    array = np.random.default_rng(0).integers(0, 256, (6, 49), dtype=np.uint8)
    found = pixel_scale(torch.from_numpy(array).reshape(6, 1, 7, 7) / 127.5 - 1, array)
    assert found == {"mean": pytest.approx([0.5]), "std": pytest.approx([0.5]), "shape": None}
