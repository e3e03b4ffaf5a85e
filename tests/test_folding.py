"""A BatchNorm as part of the layer's program: exact algebra; in the model only weights and the shift change."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from calls import prune_
from hypothesis import given
from hypothesis import strategies as st
from promises import behind, promised, with_modules_of
from tolerances import EXACT, HALF
from torch import Tensor, nn
from torch.nn import functional

from convexprune.layers import input_matrices, output_matrices
from convexprune.network.taps import tap
from convexprune.runs.fits import FITS
from convexprune.runs.layer import Fold, Layer

LAYERS: dict[str, tuple[Callable[[bool], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda bias: nn.Linear(5, 6, bias=bias), (9, 5)),
    "conv1d": (lambda bias: nn.Conv1d(2, 6, 3, bias=bias), (4, 2, 7)),
    "conv2d": (lambda bias: nn.Conv2d(3, 6, (1, 3), stride=2, padding=1, bias=bias), (3, 3, 5, 5)),
    "grouped": (lambda bias: nn.Conv2d(4, 6, 3, padding="same", groups=2, bias=bias), (3, 4, 4, 4)),
    "depthwise": (lambda bias: nn.Conv2d(6, 6, 3, groups=6, bias=bias), (3, 6, 4, 4)),
    "conv3d": (lambda bias: nn.Conv3d(2, 6, 2, dilation=2, bias=bias), (2, 2, 4, 4, 3)),
}
NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


def made(kind: str, bias: bool, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[nn.Sequential, Tensor]:
    """A layer and its norm, with scales of both signs and one that is 0, and inputs."""
    torch.manual_seed(seed)
    make, shape = LAYERS[kind]
    norm = NORMS[len(shape)](6)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(6))
        norm.weight[2] = 0
        norm.bias.copy_(torch.randn(6))
        norm.running_mean.copy_(torch.randn(6))
        norm.running_var.copy_(torch.rand(6) + 0.1)
    return nn.Sequential(make(bias), norm, nn.ReLU()).to(dtype).eval(), torch.randn(shape, dtype=dtype)


def layer_of(model: nn.Sequential) -> Layer:
    return Layer("0", model[0], (tap(model, "0"),), "relu", "1", model[1], FITS["relu-ball"], 1)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_the_programs_weights_give_what_the_norm_gives(kind: str, bias: bool) -> None:
    """BN(layer(x)) = X · apply(stored), for each group, and writing back what was read changes nothing."""
    model, x = made(kind, bias)
    at, before = layer_of(model), copy.deepcopy(model.state_dict())
    stored = at.read()
    with torch.no_grad():
        Z = output_matrices(model[0], model[:2](x)) if kind != "linear" else (model[:2](x),)
    for X, W, fold, z in zip(at.inputs(input_matrices(at.module, x)), stored, at.folds, Z, strict=True):
        assert torch.allclose(X @ fold.apply(W), z, rtol=0, atol=1e3 * EXACT)
    at.write_(stored)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@given(st.integers(0, 10_000), st.integers(1, 6), st.integers(1, 6), st.booleans())
def test_undo_after_apply_is_the_identity_where_the_scale_is_not_0(seed: int, N: int, M: int, dead: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    s, c = (torch.randn(M, dtype=torch.float64, generator=generator) for _ in range(2))
    s[0] *= not dead
    stored = torch.randn(N + 1, M, dtype=torch.float64, generator=generator)
    fold = Fold(s, c)
    back = fold.undo(fold.apply(stored))
    assert torch.allclose(back[-1], stored[-1], rtol=0, atol=1e2 * EXACT)
    assert torch.allclose(back[:-1, s != 0], stored[:-1, s != 0], rtol=1e2 * EXACT)
    assert not back[:-1, s == 0].any()
    assert torch.allclose(fold.apply(back), fold.apply(stored), rtol=0, atol=1e2 * EXACT)
    zeros = torch.rand(N, M, generator=generator) < 0.5
    stored[:-1][zeros] = 0
    assert not fold.apply(stored)[:-1][zeros].any()
    assert not fold.undo(stored)[:-1][zeros].any()


def test_without_a_norm_nothing_happens() -> None:
    conv = nn.Conv2d(4, 6, 3, groups=2)
    folds, W = Layer("0", conv, (), None, None, None, FITS["ball"], 1).folds, torch.randn(4, 3)
    assert all(fold.apply(W) is W and fold.undo(W) is W for fold in folds)
    assert len(folds) == 2


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("mode", ["parallel", "cascade"])
def test_the_error_behind_the_norm_is_the_one_in_the_report(kind: str, mode: str) -> None:
    """And of the module only weights, of the norm only its shift changed; a zero weight is a zero in the module."""
    model, x = made(kind, bias=kind != "conv1d", dtype=torch.float32)
    dense = copy.deepcopy(model)
    report = prune_(model, list(x.split(2)), 0.2, mode=mode)
    (row,) = report.layers
    assert report.certified
    assert (row.fit, row.norm) == ("relu-ball", "1")
    assert "1 is part of its program" in str(report)
    promised(row, dense, model, [x], cascade=mode == "cascade")
    assert row.output_error <= 0.2 * (1 + 1.1e-4)
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, dense.state_dict()[name])]
    assert changed == ["0.weight", "1.bias"]
    assert row.nonzeros == int(model[0].weight.count_nonzero()) < model[0].weight.numel()
    assert not model[0].weight[2].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["linear", "grouped"])
def test_in_half_precision_the_report_is_of_what_is_stored(kind: str, dtype: torch.dtype) -> None:
    """Weights times the scale are rounded once, in the module's units: the error is that of the rounded weights."""
    model, x = made(kind, bias=True, dtype=dtype)
    dense = copy.deepcopy(model)
    (row,) = prune_(model, x, 0.2).layers
    assert model[0].weight.dtype == model[1].bias.dtype == dtype
    Y = behind(dense, "1", [x], relu=True)
    error = float((behind(with_modules_of(dense, model, ["0", "1"]), "1", [x], relu=True) - Y).norm() / Y.norm())
    assert error == pytest.approx(row.output_error, rel=1e-4)
    assert row.output_error <= 0.2 * (1 + HALF)
    assert row.status in ("solved", "rounded")


class Odd(nn.Module):
    """Where a norm stands such that it cannot be part of the layer's program."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Linear(4, 5), nn.Linear(4, 5), nn.Linear(5, 2)
        self.norm = nn.BatchNorm1d(5, affine=kind != "not affine", track_running_stats=kind != "no statistics")
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        z = self.one(x)
        y = functional.relu(self.norm(z))
        if self.kind == "shared":
            y = y + functional.relu(self.norm(self.two(x)))
        if self.kind == "not alone":
            y = y + z
        if self.kind == "behind an operation":
            y = functional.relu(self.norm(z * 2))
        return self.head(y)


@pytest.mark.parametrize("kind", ["shared", "not alone", "not affine", "no statistics", "behind an operation", "left"])
def test_a_norm_that_is_not_the_layers_alone_stays_outside(kind: str) -> None:
    """The layer's own outputs are kept then, by the ball, and the norm is as it was."""
    torch.manual_seed(0)
    model, x = Odd(kind), torch.randn(40, 4)
    dense = copy.deepcopy(model)
    report = prune_(model, x, 0.1, norms="leave" if kind == "left" else "fold")
    rows: dict[str, Any] = {row.name: row for row in report.layers}
    assert (rows["one"].fit, rows["one"].norm) == ("ball", None)
    assert all(torch.equal(value, dense.norm.state_dict()[name]) for name, value in model.norm.state_dict().items())
    for row in report.layers:
        promised(row, dense, model, [x], cascade=False)
    assert "is part of its program" not in str(report)


def test_a_norm_whose_shift_another_norm_shares_stays_outside() -> None:
    """Else the shift of one layer would be written over by that of the other."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 5), nn.BatchNorm1d(5), nn.ReLU())
    model[4].bias = model[1].bias
    x, dense = torch.randn(40, 4), copy.deepcopy(model)
    for row in prune_(model, x, 0.1).layers:
        assert (row.fit, row.norm) == ("ball", None)
        promised(row, dense, model, [x], cascade=False)
    assert torch.equal(model[1].bias, dense[1].bias)


def test_a_norm_alone_is_folded_whatever_follows_it() -> None:
    """Before a GELU the ball is around the norm's outputs, not the layer's."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.GELU(), nn.Linear(6, 2))
    with torch.no_grad():
        model[1].weight.copy_(torch.linspace(0.01, 3, 6))
    x, dense = torch.randn(50, 4), copy.deepcopy(model)
    row = prune_(model, x, 0.1).layers[0]
    assert (row.fit, row.norm) == ("ball", "1")
    promised(row, dense, model, [x], cascade=False)
    zeros = (model[0].weight == 0).sum(1)
    assert zeros[0] == 4  # what the norm makes small costs nothing
    assert zeros[-1] < 4


def test_a_shift_beyond_the_range_of_its_dtype_is_refused_before_anything_is_written() -> None:
    model, _ = made("linear", bias=True, dtype=torch.float16)
    before = copy.deepcopy(model.state_dict())
    stored = layer_of(model).read()[0].clone()
    stored[-1, 0] = torch.inf
    with pytest.raises(Exception, match="NaN or infinity as shift of '1'"):
        layer_of(model).write_([stored])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
