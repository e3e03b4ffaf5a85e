"""Whole neurons: which go, that the network without them is the masked one, and that the files fit."""

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import networks
import pytest
import torch
from calls import prune_
from promises import unchanged
from safetensors.torch import save_file
from tolerances import OUTPUTS
from torch import Tensor, nn

from convexprune.errors import NothingToPrune, UnsupportedModule
from convexprune.network.weights import load_weights_into_

Made = tuple[nn.Module, Tensor]


def mlp() -> Made:
    torch.manual_seed(0)
    layers = [nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 3)]
    return nn.Sequential(*layers).double(), torch.randn(50, 6, dtype=torch.float64)


def convolutions() -> Made:
    torch.manual_seed(0)
    first = [nn.Conv2d(2, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.MaxPool2d(2)]
    second = [nn.Conv2d(6, 5, 2), nn.ReLU(), nn.Flatten(), nn.Linear(20, 3)]
    return nn.Sequential(*first, *second).double().eval(), torch.randn(12, 2, 8, 8, dtype=torch.float64)


def residual() -> Made:
    torch.manual_seed(0)
    model = networks.resnet().double()
    x = torch.randn(6, 2, 8, 8, dtype=torch.float64)
    for _ in range(3):
        model(x)
    return model.eval(), x


NETWORKS: dict[str, Callable[[], Made]] = {"mlp": mlp, "convolutions": convolutions, "residual": residual}
FAST: dict[str, Any] = {"unit": "neurons", "max_iter": 60}


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(x)


CASCADE = {"mode": "cascade", "scope": "network"}


def test_neurons_of_layers_that_are_left_out_stay() -> None:
    model = networks.mlp(6, 8, 8, 3)
    report = prune_(model, torch.randn(40, 6), sparsity=0.5, layers="!0", **FAST)
    assert (len(model[0].weight), len(model[2].weight)) == (8, 4)
    assert ("0", "not chosen by the name patterns") in [(module.name, module.reason) for module in report.skipped]


@pytest.mark.parametrize(
    ("name", "options"), [("mlp", {}), ("mlp", CASCADE), ("convolutions", {}), ("residual", CASCADE | {"max_iter": 8})]
)
def test_removed_is_masked_and_smaller(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    """The same outputs; every row says the shapes that are there; a fresh network takes the file."""
    dense, x = NETWORKS[name]()
    removed, masked = copy.deepcopy(dense), copy.deepcopy(dense)
    report = prune_(removed, x, sparsity=0.4, **FAST | options)
    other = prune_(masked, x, sparsity=0.4, remove=False, **FAST | options)
    Y = outputs(removed, x)
    assert float((Y - outputs(masked, x)).norm()) <= OUTPUTS * float(Y.norm())
    assert all(p.shape == q.shape for p, q in zip(masked.parameters(), dense.parameters(), strict=True))
    count = sum(p.numel() for p in dense.parameters())
    assert sum(p.numel() for p in removed.parameters()) < 0.8 * count
    for row, hidden in zip(report.layers, other.layers, strict=True):
        before, weight = dense.get_submodule(row.name).weight, removed.get_submodule(row.name).weight
        assert (row.shape, row.before) == (tuple(weight.shape), tuple(before.shape))
        assert (row.neurons, row.nonzeros) == (len(weight), int(weight.count_nonzero()))
        assert hidden.nonzeros <= row.nonzeros  # zeros of a norm's channel that stays are weights that are there
    error = float((Y - outputs(dense, x)).norm() / outputs(dense, x).norm())
    assert report.output_error == pytest.approx(error, rel=1e-6)
    assert report.certified
    fresh = copy.deepcopy(dense)
    save_file({key: value.contiguous() for key, value in removed.state_dict().items()}, tmp_path / "small.safetensors")
    load_weights_into_(fresh, tmp_path / "small.safetensors", resize=True)
    assert torch.equal(outputs(fresh, x), Y)


def test_each_link_loses_its_part_and_the_outputs_stay() -> None:
    model, x = mlp()
    report = prune_(model, x, sparsity=0.5, **FAST)
    assert [tuple(model[i].weight.shape) for i in (0, 2, 4)] == [(5, 6), (4, 5), (3, 4)]
    assert [row.status for row in report.layers] == ["neurons", "inputs and neurons", "inputs"]
    assert outputs(model, x).shape == (50, 3)


def test_layers_may_lose_different_parts() -> None:
    model, x = mlp()
    prune_(model, x, sparsity={"2": 3, "*": 0.2}, **FAST)
    assert [tuple(model[i].weight.shape) for i in (0, 2, 4)] == [(8, 6), (3, 8), (3, 3)]


def test_only_the_layers_that_were_chosen_lose_neurons() -> None:
    model, x = mlp()
    report = prune_(model, x, sparsity=0.5, layers="2", **FAST)
    assert [tuple(model[i].weight.shape) for i in (0, 2, 4)] == [(10, 6), (4, 10), (3, 4)]
    assert {module.name: module.reason for module in report.skipped}["0"] == "not chosen by the name patterns"


def test_neurons_that_add_nothing_go_first() -> None:
    """A dead one, one that nothing takes, and one that is the same for all samples, which the bias takes over."""
    model, x = mlp()
    with torch.no_grad():
        model[0].bias[1] = -100  # dead
        model[2].weight[:, 4] = 0  # not taken
        model[0].weight[7] = 0  # constant
        model[0].bias[7] = 0.5
        before = outputs(model, x)
        original = model[0].weight.clone()
    prune_(model, x, sparsity=0.3, layers="0", **FAST)
    stay = [c for c in range(10) if c not in (1, 4, 7)]
    assert torch.equal(model[0].weight, original[stay])
    assert float((outputs(model, x) - before).norm()) <= 1e-8 * float(before.norm())


def test_of_two_equal_neurons_one_can_go_for_nothing() -> None:
    model, x = mlp()
    with torch.no_grad():
        model[0].weight[3], model[0].bias[3] = model[0].weight[5].clone(), model[0].bias[5].clone()
        before = outputs(model, x)
    prune_(model, x, sparsity=0.1, layers="0", **FAST)
    assert len(model[0].weight) == 9
    error = float((outputs(model, x) - before).norm() / before.norm())
    others = []
    for c in (0, 1, 2):  # what any other neuron would cost
        rest = [i for i in range(10) if i not in (c, 3)]
        fresh, _ = mlp()
        hidden = fresh[:2](x)[:, rest].detach()
        others.append(float((hidden - hidden.mean(0)).norm()))
    assert min(others) > 0
    assert error < 0.15


@pytest.mark.parametrize("seed", range(3))
def test_which_neurons_go_does_not_depend_on_their_units(seed: int) -> None:
    """Rows of the producer times a, columns of the consumer divided by it: the same network, the same choice."""
    one, x = mlp()
    other = copy.deepcopy(one)
    torch.manual_seed(seed)
    a = 10 ** (4 * torch.rand(10, dtype=torch.float64) - 2)
    with torch.no_grad():
        other[0].weight.mul_(a[:, None])
        other[0].bias.mul_(a)
        other[2].weight.div_(a)
    assert float((outputs(one, x) - outputs(other, x)).norm()) <= OUTPUTS * float(outputs(one, x).norm())
    firsts = [model[0].weight.detach().clone() for model in (one, other)]
    for model in (one, other):
        prune_(model, x, sparsity=0.4, layers="0", **FAST)
    kept = [
        [int((first == row).all(1).nonzero()) for row in model[0].weight.detach()]
        for model, first in zip((one, other), firsts, strict=True)
    ]
    assert kept[0] == kept[1]
    assert len(kept[0]) == 6
    assert float((outputs(one, x) - outputs(other, x)).norm()) <= 1e-6 * float(outputs(one, x).norm())


def test_what_stays_is_fitted_again() -> None:
    """The consumer's weights are least squares on the neurons that stay: no worse than the trained columns."""
    model, x = mlp()
    dense = copy.deepcopy(model)
    (row,) = [row for row in prune_(model, x, sparsity=0.5, layers="2", **FAST).layers if row.name == "4"]
    with torch.no_grad():
        kept = [int((dense[2].weight == r).all(1).nonzero()) for r in model[2].weight]
        hidden, Y = dense[:4](x), dense(x)
        X = torch.cat([hidden[:, kept], torch.ones(50, 1, dtype=torch.float64)], 1)
        best = torch.linalg.lstsq(X, Y).solution
        trained = hidden[:, kept] @ dense[4].weight[:, kept].T + dense[4].bias
    error = float((X @ best - Y).norm() / Y.norm())
    assert row.output_error == pytest.approx(error, rel=1e-5)
    assert row.output_error < 0.9 * float((trained - Y).norm() / Y.norm())


def test_a_failure_leaves_all_shapes_and_values() -> None:
    class Failing(Exception):
        pass

    model, x = convolutions()
    same = unchanged(model)
    stages = []

    def fail(stage: str, done: int, total: int) -> None:
        stages.append(stage)
        if stages.count("7") == 2:  # ranked, and now fitted: the first link's consumer is written
            raise Failing

    with pytest.raises(Failing):
        prune_(model, x, sparsity=0.5, progress=fail, **FAST)
    assert same()


@pytest.mark.parametrize("limit", [{"time_limit": 1e-9}, {"stop": lambda: True}])
def test_without_time_no_neuron_goes(limit: dict[str, Any]) -> None:
    model, x = mlp()
    same = unchanged(model)
    report = prune_(model, x, sparsity=0.5, **limit, **FAST)
    assert same()
    reasons = {module.name: module.reason for module in report.skipped if "not reached" in module.reason}
    assert set(reasons) == {"2", "4"}
    assert report.output_error == 0


def test_what_cannot_lose_neurons_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    with pytest.raises(NothingToPrune, match="match no layer of which neurons can be removed"):
        prune_(model, torch.randn(9, 4), sparsity=0.5, **FAST)

    own = {"one": nn.Linear(4, 3), "two": nn.Linear(3, 2)}
    model = networks.Net(lambda m, x: m.two(m.one(x)) if x.sum() > 0 else m.two(m.one(-x)), **own)
    with pytest.raises(UnsupportedModule):
        prune_(model, torch.randn(9, 4), sparsity=0.5, **FAST)


def test_neurons_that_zeros_hold_down_are_worth_nothing_where_zeros_stay() -> None:
    """The second neuron is the sum of the others, and could stand for both, had it any weights."""
    model = networks.mlp(4, 3, 6)
    with torch.no_grad():
        model[0].weight.copy_(torch.rand(3, 4)), model[0].bias.zero_()
        model[0].weight[1] = model[0].weight[0] + model[0].weight[2]
        model[2].weight[:, 1] = 0
        model[2].weight[:, 2] = model[2].weight[:, 0]
    x = torch.rand(80, 4)
    dense, other = copy.deepcopy(model), copy.deepcopy(model)
    prune_(model, x, sparsity=1 / 3, unit="neurons", keep_zeros=True)
    assert torch.equal(model[0].weight, dense[0].weight[[0, 2]])
    assert torch.allclose(model(x), dense(x), atol=1e-5)
    prune_(other, x, sparsity=1 / 3, unit="neurons")
    assert any(torch.equal(row, dense[0].weight[1]) for row in other[0].weight)


CASES: list[dict[str, Any]] = [{"unit": "neurons", "sparsity": 0.5}, {"sparsity": 0.5}, {"eps": 0.2, "refit": True}]


@pytest.mark.parametrize("arguments", CASES)
def test_a_row_says_how_many_neurons_are_short_of_their_minimum(
    arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a single curvature most are; after as many as it takes none is."""
    model = networks.mlp(6, 10, 8, 3).double()
    x = torch.randn(50, 6, dtype=torch.float64)
    rows = prune_(copy.deepcopy(model), x, **arguments).layers
    assert not any("short of the minimum" in note for row in rows for note in row.notes)
    module = sys.modules["convexprune.solvers.methods.refit"]  # its name in the package is the function's
    monkeypatch.setattr(module, "_CURVATURES", 1)
    monkeypatch.setattr(module, "_SLOW", 0.0)
    rows = prune_(model, x, **arguments).layers
    assert any("short of the minimum" in note for row in rows for note in row.notes)
