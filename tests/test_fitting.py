"""Batches as data loaders give them, floating-point types, and compiled models: what fits is used, and that is said."""

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from calls import coreset_prune_, preview, prune_
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from convexprune import verify
from convexprune.network.calibration import Calibration, Fitting, fitted
from convexprune.solvers.errors import InvalidInput

PART = "the model is called on the first part of each batch: of the 2 it does not take the rest"
CAST = "inputs are cast from float64 to float32, in which the model computes"


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


def samples(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(1)
    return torch.randn(40, 6, generator=rng, dtype=dtype), torch.randint(3, (40,), generator=rng)


class Two(nn.Module):
    """Two inputs, the second of which may be left out."""

    def __init__(self, optional: bool) -> None:
        super().__init__()
        self.first, self.optional = net(), optional

    def forward(self, x: Tensor, more: Tensor | None = None) -> Tensor:
        if more is None and not self.optional:
            raise ValueError("two inputs, please")
        found: Tensor = self.first(x if more is None else x + more)
        return found


class Named(nn.Module):
    """An input by name."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = net()

    def forward(self, x: Tensor) -> Any:
        return self.inner(x)


class Wrapped(nn.Module):
    """A signature that says nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = net()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


def test_a_loader_of_inputs_and_labels_is_used_for_its_inputs(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    x, y = samples()
    loader = DataLoader(TensorDataset(x, y), batch_size=16)
    model, expected = net(), net()
    trained = copy.deepcopy(model)
    with caplog.at_level(logging.INFO):
        report = prune_(model, loader, 0.1, run=tmp_path)
    prune_(expected, list(x.split(16)), 0.1)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))
    assert PART in caplog.text
    assert PART in report.head
    assert PART in str(report).replace("\n", "")[:2000] or PART in " ".join(str(report).split())
    assert verify(trained, loader, tmp_path).ok
    assert preview(trained, loader, 0.1).notices == (PART,)
    assert PART in coreset_prune_(net(), loader, "lowner", 0.5).head


BATCHES: dict[str, tuple[Callable[[], nn.Module], Callable[[Tensor, Tensor], Any], Fitting | None]] = {
    "two inputs that are needed": (lambda: Two(False), lambda x, _y: (x, x), None),
    "two inputs, one optional": (lambda: Two(True), lambda x, _y: (x, x), None),
    "labels in the place of an optional input": (
        lambda: Two(True),
        lambda x, y: (x, y),
        Fitting(1),
    ),
    "two inputs and labels": (lambda: Two(False), lambda x, y: (x, x, y), Fitting(2)),
    "a list": (net, lambda x, y: [x, y], Fitting(1)),
    "targets that are numbers": (net, lambda x, _y: (x, x), Fitting(1)),
    "a signature that says nothing": (Wrapped, lambda x, y: (x, y), Fitting(1)),
    "float64": (net, lambda x, _y: x.double(), Fitting(dtype=torch.float32)),
    "float64 with labels": (net, lambda x, y: (x.double(), y), Fitting(1, dtype=torch.float32)),
    "arrays": (net, lambda x, y: (x.double().numpy(), y.numpy()), Fitting(1, dtype=torch.float32)),
    "a mapping with labels": (Named, lambda x, y: {"x": x, "labels": y}, Fitting(left=("labels",))),
    "a mapping, and labels": (Named, lambda x, y: ({"x": x.double(), "id": y}, y), Fitting(1, ("id",), torch.float32)),
    "a mapping that fits": (Named, lambda x, _y: {"x": x}, None),
    "as it is": (net, lambda x, _y: x, None),
}


@pytest.mark.parametrize("name", BATCHES)
def test_no_more_is_done_to_a_batch_than_the_model_needs(name: str) -> None:
    make, batch, expected = BATCHES[name]
    model = make()
    found, notices = fitted(model, Calibration([batch(*samples())]), None)
    assert found == expected
    assert bool(notices) == (expected is not None)


def test_a_genuine_error_is_told_of_as_it_is() -> None:
    """Of two inputs one is wrong: it is not dropped."""
    x, _ = samples()
    model = Two(True)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InvalidInput, match=r"size of tensor a \(6\) must match"):
        prune_(model, [(x, x[:, :5])], 0.1)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with pytest.raises(InvalidInput, match="the model failed on a batch"):
        prune_(net(), DataLoader(TensorDataset(x[:, :5], x[:, 0])), 0.1)


def test_a_forward_of_the_caller_s_gets_the_batch_as_it_is() -> None:
    x, y = samples()
    seen = []

    def forward(model: nn.Module, batch: Any) -> Any:
        seen.append(len(batch))
        return model(batch[0])

    assert prune_(net(), [(x, y)], 0.1, forward=forward).notices == ()
    assert set(seen) == {2}


def test_numbers_of_double_precision_fit_a_model_of_single_precision() -> None:
    x = samples(torch.float64)[0].numpy()
    model, expected = net(), net()
    report = prune_(model, x, 0.1)
    prune_(expected, x.astype(np.float32), 0.1)
    assert report.notices == (CAST,)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))
    assert prune_(net().double(), x, 0.1).notices == ()


def test_tokens_stay_and_images_of_bytes_are_refused_in_words() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(3, 6), nn.Linear(6, 2)

        def forward(self, ids: Tensor, scale: Tensor) -> Tensor:
            found: Tensor = self.head(self.embed(ids) * scale[:, None])
            return found

    x, y = samples(torch.float64)
    assert prune_(Tokens(), [{"ids": y, "scale": x[:, 0]}], 0.1).notices == (CAST,)
    with pytest.raises(InvalidInput, match=r"holds uint8 and the model computes in float32: .* batch.float\(\) / 255"):
        prune_(net(), (255 * torch.rand(20, 6)).byte(), 0.1)


@pytest.mark.parametrize("asked", [{"eps": 0.1, "mode": "cascade"}, {"sparsity": 0.5, "unit": "neurons"}], ids=str)
def test_a_compiled_model_is_pruned_as_what_it_was_made_of(
    asked: dict[str, Any], caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """The same weights, names and bound, and not a word of the compiler's."""
    x, _ = samples()
    plain, compiled, inner = net(), torch.compile(net(), backend="eager"), net()
    inner[2] = torch.compile(inner[2], backend="eager")
    expected = prune_(plain, x, **asked)
    with caplog.at_level(logging.WARNING):
        report = prune_(compiled, x, **asked)
        other = prune_(inner, x, **asked) if "eps" in asked else None
    assert not caplog.records
    assert not "".join(capfd.readouterr())
    assert [row.name for row in report.layers] == [row.name for row in expected.layers]
    assert report.network.bound == expected.network.bound
    for model in (compiled,) if other is None else (compiled, inner):
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    if other is not None:
        assert other.network.bound == expected.network.bound
