"""The reference architectures, models by name, and the demo's digits."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from convexprune.cli.demo import load_digits, train_digits_network
from convexprune.cli.reference import REFERENCE_MODELS, find_model
from convexprune.costs import accuracy
from convexprune.files.arrays import load_array
from convexprune.network.weights import load_weights_into_
from convexprune.solvers.errors import EmptyInput, InvalidInput, MissingExtra, NonFinite, ShapeMismatch

DATA = Path(__file__).resolve().parents[1].parent / "shared" / "data"
MODULE = """
import numpy as np
import torch
from torch import nn

number = 3
class Net(nn.Module):
    pass
class Needy(nn.Module):
    def __init__(self, width):
        super().__init__()
def linear():
    return nn.Linear(4, 2)
def scaled():
    return nn.Linear(4, 2)
scaled.prepare = lambda array: torch.from_numpy(array.astype(np.float32)) / 255
def odd():
    return nn.Linear(4, 2)
odd.prepare = 7
def wrong():
    return {"a": 1}
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "own_models.py").write_text(MODULE)
    (tmp_path / "own_unmet.py").write_text("import a_package_that_is_not_there\n")
    (tmp_path / "own_broken.py").write_text("def f(:\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("own_models", "own_unmet", "own_broken"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return "own_models"


# The built-in models


@pytest.mark.parametrize(
    ("name", "weights", "parameters", "correct"),
    [
        ("lenet-300-100", "lenet300_mnist.safetensors", 266_610, 9840),
        ("lenet-5", "lenet5_mnist.safetensors", 431_080, 9936),
    ],
)
def test_the_trained_lenets_reach_their_recorded_accuracy(
    name: str, weights: str, parameters: int, correct: int
) -> None:
    if not (DATA / weights).exists():
        pytest.skip(f"needs {weights} and mnist.npz in the folder shared/data beside the repository")
    model = find_model(name).build()
    load_weights_into_(model, DATA / weights)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    x = find_model(name).prepare(load_array(DATA / "mnist.npz", "x_test"))
    y = torch.from_numpy(load_array(DATA / "mnist.npz", "y_test"))
    # Rounding differs between machines; a wrong architecture or scaling costs far more than two images.
    assert accuracy(model, x, y) * 10_000 == pytest.approx(correct, abs=2)


@pytest.mark.parametrize(("name", "shape"), [("lenet-300-100", (784,)), ("lenet-5", (1, 28, 28))])
@pytest.mark.parametrize("raw_shape", [(784,), (28, 28), (1, 28, 28)])
def test_images_of_every_accepted_shape_give_the_same_input(
    name: str, shape: tuple[int, ...], raw_shape: tuple[int, ...]
) -> None:
    reference = REFERENCE_MODELS[name]
    raw = np.random.default_rng(0).integers(0, 256, (3, 784), dtype=np.uint8)
    raw[0, :2] = 0, 255
    expected = (torch.from_numpy(raw).float() / 255).reshape(3, *shape)
    for images in (raw, raw.astype(np.float64) / 255):
        x = reference.prepare(images.reshape(3, *raw_shape))
        assert x.dtype == torch.float32
        torch.testing.assert_close(x, expected, rtol=1e-6, atol=0)
        assert reference.build()(x).shape == (3, 10)
    assert float(reference.prepare(raw).max()) == 1.0


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (np.full((2, 784), 255.0), InvalidInput, r"\[255, 255\], expected \[0, 1\]; divide pixels by 255"),
        (np.full((2, 784), -0.9), InvalidInput, r"expected \[0, 1\]"),
        (np.zeros((2, 784), dtype=np.int64), InvalidInput, "int64; expected uint8"),
        (np.full((2, 784), np.nan), NonFinite, "NaN"),
        (np.zeros((2, 28, 28, 1)), ShapeMismatch, r"\(2, 28, 28, 1\); expected \(n, 784\)"),
        (np.zeros(784), ShapeMismatch, r"\(784,\)"),
        (np.zeros((0, 28, 28)), EmptyInput, "at least one"),
    ],
)
def test_images_that_are_no_use(images: np.ndarray[Any, Any], error: type[Exception], message: str) -> None:
    for reference in REFERENCE_MODELS.values():
        with pytest.raises(error, match=message):
            reference.prepare(images)


def test_prepared_images_are_a_copy() -> None:
    images = np.full((1, 784), 0.5, dtype=np.float32)
    images.flags.writeable = False
    find_model("lenet-5").prepare(images).zero_()
    assert images.min() == 0.5


# The user's own models


def test_own_factories_and_classes_are_built_on_demand(own: str) -> None:
    reference = find_model(f"{own}:linear")
    assert reference.name == "own_models:linear"
    assert isinstance(reference.build(), nn.Linear)
    assert reference.build() is not reference.build()
    assert type(find_model(f"{own}:Net").build()).__name__ == "Net"


def test_own_inputs_are_floats_unless_the_factory_prepares_them(own: str) -> None:
    floats, pixels = np.array([[300.0, -2.0]]), np.array([[255, 51]], dtype=np.uint8)
    assert torch.equal(find_model(f"{own}:linear").prepare(floats), torch.tensor([[300.0, -2.0]]))
    assert torch.equal(find_model(f"{own}:scaled").prepare(pixels), torch.tensor([[1.0, 0.2]]))
    with pytest.raises(InvalidInput, match="uint8, expected floats; scale it"):
        find_model(f"{own}:linear").prepare(pixels)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("lenet5", r"called 'lenet5' \(did you mean lenet-5"),
        ("something", "built in: lenet-300-100, lenet-5; your own: package.module:factory"),
        (":linear", "names no model"),
        ("own_models:", "names no model"),
        ("no_such_package.models:net", "no module 'no_such_package'.*'no_such_package.models'"),
        ("own_models.py:net", "no module 'own_models.py'.*without .py"),
        ("own_unmet:net", "Importing 'own_unmet' failed.*a_package_that_is_not_there"),
        ("own_broken:net", "Importing 'own_broken' failed: SyntaxError"),
        (".own_models:net", "Importing '.own_models' failed"),
        ("own_models:liner", r"has no 'liner' \(did you mean linear"),
        ("own_models:number", "is a int; expected a function or class"),
        ("own_models:odd", "prepare that is a int"),
    ],
)
def test_models_that_cannot_be_found(own: str, spec: str, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        find_model(spec)


@pytest.mark.parametrize(
    ("factory", "message"), [("wrong", "returned a dict; expected a torch.nn.Module"), ("Needy", "TypeError.*width")]
)
def test_factories_that_make_no_model(own: str, factory: str, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        find_model(f"{own}:{factory}").build()


# The digits


def test_the_digits_are_split_without_overlap_and_scaled() -> None:
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn (the demo extra)")
    data, again = load_digits(), load_digits()
    assert (data.x_train.shape, data.x_test.shape) == ((1300, 64), (497, 64))
    assert data.x_train.dtype == torch.float32
    assert (float(data.x_train.min()), float(data.x_train.max())) == (0.0, 1.0)
    assert len(np.unique(torch.cat([data.x_train, data.x_test]).numpy(), axis=0)) == 1797
    assert set(data.y_test.tolist()) == set(range(10))
    assert torch.equal(data.x_test, again.x_test)
    assert torch.equal(data.y_train, again.y_train)


def test_the_digits_network_learns_repeatably_and_leaves_the_random_state_alone() -> None:
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn (the demo extra)")
    data, seen = load_digits(), []
    state = torch.random.get_rng_state()
    with torch.no_grad():
        first = train_digits_network(data, progress=lambda done, total: seen.append((done, total)))
    torch.rand(3)
    moved = torch.random.get_rng_state()
    second, other = train_digits_network(data), train_digits_network(data, seed=1)
    assert torch.equal(moved, torch.random.get_rng_state())
    torch.random.set_rng_state(state)
    assert [done for done, _ in seen] == list(range(1, seen[0][1] + 1))
    assert accuracy(first, data.x_test, data.y_test) >= 0.97
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.get_parameter("0.weight"), other.get_parameter("0.weight"))


def test_without_scikit_learn_the_install_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MissingExtra, match=r'pip install "convexprune\[demo\]"'):
        load_digits()


def test_accuracy_is_the_fraction_in_eval_mode_and_restores_the_flags() -> None:
    model = nn.Sequential(nn.Dropout(0.9), nn.Sequential(nn.Dropout(0.9)), nn.BatchNorm1d(3))
    model[1].eval()
    before = [module.training for module in model.modules()]
    x = torch.eye(3).repeat(5, 1)
    y = torch.arange(3).repeat(5)
    y[:3] = 0  # two of fifteen labels are now wrong
    assert accuracy(model, x, y, batch_size=4) == pytest.approx(13 / 15)
    assert [module.training for module in model.modules()] == before
    assert torch.equal(model.get_buffer("2.running_mean"), torch.zeros(3))


def test_accuracy_refuses_what_it_cannot_count() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(ShapeMismatch, match="one label a sample"):
        accuracy(model, torch.ones(3, 2), torch.ones(4))
    with pytest.raises(EmptyInput):
        accuracy(model, torch.ones(0, 2), torch.ones(0))
    with pytest.raises(InvalidInput, match=r"batch of shape \[3, 5\]"):
        accuracy(model, torch.ones(3, 5), torch.ones(3))
    assert model.training
