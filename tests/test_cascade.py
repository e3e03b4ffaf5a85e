"""Cascade: each layer with the inputs that the pruned network gives it, its target what the original network computes.

All promises are recomputed by plain hooks in float64.
"""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import networks
import pytest
import torch
from calls import prune_
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import Net, resnet
from promises import behind, promised, unchanged, with_modules_of
from torch import Tensor, nn

from convexprune import verify

Made = tuple[nn.Module, list[Tensor]]


def mlp(seed: int = 0) -> Made:
    torch.manual_seed(seed)
    layers = [nn.Linear(10, 14), nn.ReLU(), nn.Linear(14, 8), nn.ReLU(), nn.Linear(8, 6, bias=False), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(6, 3)), list(torch.rand(60, 10).split(25))


def with_statistics(model: nn.Module, x: list[Tensor]) -> Made:
    """Norms that have seen data, with scales of both signs and a channel that is off."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                module.weight.copy_(torch.linspace(-0.7, 1.5, module.num_features))
                module.bias.copy_(torch.linspace(0.3, -0.2, module.num_features))
                module.weight[1] = 0
        model.train()
        for batch in x * 3:
            model(batch)
    return model.eval(), x


def convolutions(seed: int = 0) -> Made:
    torch.manual_seed(seed)
    first = [nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.MaxPool2d(2)]
    second = [nn.Conv2d(6, 4, 3, groups=2, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.AvgPool2d(2)]
    third = [nn.Conv2d(4, 5, 1), nn.ReLU(), nn.Flatten(), nn.Linear(5, 3)]
    return with_statistics(nn.Sequential(*first, *second, *third), list(torch.rand(14, 2, 8, 8).split(5)))


def residual(seed: int = 0) -> Made:
    torch.manual_seed(seed)
    return with_statistics(resnet(), list(torch.rand(6, 2, 8, 8).split(4)))


NETWORKS: dict[str, Callable[[], Made]] = {"mlp": mlp, "convolutions": convolutions, "residual": residual}


def least_radius(row: Any, dense: nn.Module, pruned: nn.Module, x: list[Tensor], eps: float, gamma: float) -> float:
    """Of each group's radius the larger of eps·‖Y‖ and √γ times what the trained weights miss; of all groups together.

    What they miss of the fit's set on the pruned network's inputs, relative to ‖Y‖_F.
    """
    at, trained = row.norm or row.name, with_modules_of(pruned, dense, [row.name, row.norm])
    groups, radii = getattr(dense.get_submodule(row.name), "groups", 1), []
    for group in [(g, groups) for g in range(groups)]:
        Y, Z = behind(dense, at, x, row.fit != "ball", group), behind(trained, at, x, group=group)
        over = {"ball": Z - Y, "relu-ball": Z.clamp(min=0), "net-trim": torch.zeros_like(Z)}[row.fit]
        missed = float(torch.where(Y > 0, Z - Y, over).norm())
        radii.append(max(eps * float(Y.norm()), gamma**0.5 * missed))
    return math.hypot(*radii) / float(behind(dense, at, x, row.fit != "ball").norm())


@pytest.mark.parametrize(("name", "gamma"), [("mlp", 1.0), ("convolutions", 1.2), ("residual", 1.1)])
def test_each_layer_is_within_its_radius_of_the_original_network(name: str, gamma: float) -> None:
    """The radius is eps·‖Y‖, or √γ times what the trained weights miss, so these are always feasible."""
    model, x = NETWORKS[name]()
    dense = copy.deepcopy(model)
    report = prune_(model, x, 0.1, mode="cascade", gamma=gamma)
    assert report.certified
    assert not report.skipped
    for row in report.layers:
        promised(row, dense, model, x, cascade=True)
        assert row.eps == pytest.approx(least_radius(row, dense, model, x, 0.1, gamma), rel=1e-4)
        assert any("eps raised from 0.1" in note for note in row.notes) == (row.eps > 0.1 * (1 + 1e-6))
    assert report.nonzeros < report.nonzeros_before


@pytest.mark.parametrize("name", ["mlp", "convolutions"])
def test_net_trims_ceiling_leaves_room_for_the_trained_weights(name: str) -> None:
    model, x = NETWORKS[name]()
    dense = copy.deepcopy(model)
    last = list(dict(model.named_children()))[-1]
    report = prune_(model, x, 0.1, mode="cascade", fit={last: "ball", "*": "net-trim"}, tol=0.1, max_iter=800)
    assert [row.fit for row in report.layers[:-1]] == ["net-trim"] * (len(report.layers) - 1)
    for row in report.layers:
        promised(row, dense, model, x, cascade=True)
        assert row.violation <= 1e-4
        assert row.eps == pytest.approx(least_radius(row, dense, model, x, 0.1, 1.1), rel=1e-4)


def test_in_a_chain_what_came_before_is_made_good() -> None:
    """e_L ≤ eps_L: the error of the network is the last layer's own, not a sum, and the bound says so."""
    model, x = mlp()
    report = prune_(model, x, {"6": 0.1, "*": 0.15}, mode="cascade")
    assert report.output_error == pytest.approx(report.layers[-1].output_error, rel=1e-4)
    assert report.output_error <= report.layers[-1].promised
    assert report.network.coefficients == pytest.approx({"0": 0.0, "2": 0.0, "4": 0.0, "6": 1.0})
    assert report.network.bound == pytest.approx(report.output_error, rel=1e-4)


def test_layers_are_solved_in_the_order_of_calls_and_listed_in_the_models() -> None:
    torch.manual_seed(0)
    own = {"last": nn.Linear(6, 3), "middle": nn.Linear(8, 6), "first": nn.Linear(5, 8)}
    model = Net(lambda m, x: m.last(m.middle(m.first(x).relu()).relu()), **own)
    x, stages = [torch.rand(50, 5)], []
    dense = copy.deepcopy(model)
    report = prune_(model, x, mode="cascade", progress=lambda stage, *_: stages.append(stage))
    assert list(dict.fromkeys(stages)) == ["capture", "first", "middle", "last"]
    assert [row.name for row in report.layers] == ["last", "middle", "first"]
    assert report.layers[-1].eps == pytest.approx(0.1)
    for row in report.layers:
        promised(row, dense, model, x, cascade=True)


def test_one_layer_in_cascade_is_that_layer_in_parallel() -> None:
    (first, x), (second, _) = mlp(), mlp()
    one, other = (prune_(model, x, layers="2", mode=mode) for model, mode in ((first, "cascade"), (second, "parallel")))
    assert torch.equal(first.get_parameter("2.weight"), second.get_parameter("2.weight"))
    assert one.layers[0].bound == other.layers[0].bound


class Again(nn.Module):
    """A layer called twice, another of the same weights, and one called as often as there are samples of a kind."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.stem, self.shared, self.head = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.other = nn.Linear(6, 6)
        if tied:
            self.other.weight, self.other.bias = self.shared.weight, self.shared.bias
        self.tied = tied

    def forward(self, x: Tensor) -> Tensor:
        x = self.shared(self.stem(x).relu()).relu()
        return self.head((self.other if self.tied else self.shared)(x).relu())


@pytest.mark.parametrize("tied", [False, True])
def test_a_weight_used_twice_is_solved_once_in_parallel_and_left_alone_in_cascade(tied: bool) -> None:
    torch.manual_seed(0)
    model, x = Again(tied), [torch.rand(30, 5), torch.rand(8, 5)]
    dense, parallel = copy.deepcopy(model), copy.deepcopy(model)
    report = prune_(model, x, mode="cascade")
    assert "called 2 times" in {module.name: module.reason for module in report.skipped}["shared"]
    assert torch.equal(model.shared.weight, dense.shared.weight)
    for row in report.layers:
        promised(row, dense, model, x, cascade=True)
    row = {row.name: row for row in prune_(parallel, x).layers}["shared"]
    assert row.samples == 76
    assert (parallel.other.weight is parallel.shared.weight) == tied
    Y, Z = (uses_of_shared(dense, weights, x) for weights in (dense, parallel))
    assert float((Z - Y).norm() / Y.norm()) == pytest.approx(row.output_error, rel=1e-4)
    assert row.output_error <= 0.1 * (1 + 1.1e-4)
    assert row.nonzeros < 36


def uses_of_shared(dense: nn.Module, weights: nn.Module, x: list[Tensor]) -> Tensor:
    """ReLU of both calls' outputs with weights of one network, on the inputs of the original one."""
    layer = copy.deepcopy(weights.shared).double()
    net = copy.deepcopy(dense).double()
    with torch.no_grad():
        first = net.stem(torch.cat(x).double()).relu()
        return torch.cat([layer(first), layer(net.shared(first).relu())]).relu()


def test_layers_called_as_the_data_say_are_pruned_in_parallel_and_named_in_cascade() -> None:
    """The branch is called once for each sample whose first entry is large."""

    def routed(net: Any, x: Tensor) -> Any:
        z = net.stem(x).relu()
        rows = [net.branch(row).relu() if first > 0.5 else row for row, first in zip(z, x[:, 0], strict=True)]
        return net.head(torch.stack(rows))

    torch.manual_seed(0)
    x = torch.rand(40, 4)
    model = Net(routed, stem=nn.Linear(4, 5), branch=nn.Linear(5, 5), head=nn.Linear(5, 2))
    batches = [x[:25], x[25:]]
    parallel = copy.deepcopy(model)
    report = prune_(model, batches, mode="cascade")
    assert "differs between batches" in {module.name: module.reason for module in report.skipped}["branch"]
    rows = {row.name: row for row in prune_(parallel, batches).layers}
    assert rows["branch"].samples == int((x[:, 0] > 0.5).sum())
    assert rows["branch"].output_error <= 0.1 * (1 + 1.1e-4)
    assert rows["branch"].certified


class Experts(nn.Module):
    """A router sends each row to one expert."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.router, self.head = nn.Linear(8, 12), nn.Linear(12, 2), nn.Linear(12, 4)
        self.experts = nn.ModuleList(nn.Linear(12, 12) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x).relu()
        chosen = self.router(h).argmax(1)
        out = torch.zeros_like(h)
        for number, expert in enumerate(self.experts):
            out[chosen == number] = expert(h[chosen == number]).relu()
        return self.head(out)


@pytest.mark.parametrize("arguments", [{"eps": 0.3}, {"sparsity": 0.5}])
def test_experts_that_other_rows_reach_are_fitted_to_those_of_the_original_network(
    arguments: dict[str, float], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model, x = Experts(), list(torch.randn(200, 8).split(100))
    dense, parallel = copy.deepcopy(model), copy.deepcopy(model)
    report = prune_(model, x, **arguments, mode="cascade", run=tmp_path)
    rows = {row.name: row for row in report.layers}
    alone = {row.name: row for row in prune_(parallel, x, **arguments, mode="parallel").layers}
    for name, row in rows.items():
        expert = name.startswith("experts")
        assert any("original network's inputs" in note for note in row.notes) == expert
        promised(row, dense, model, x, cascade=not expert)
        if expert:
            assert row.samples == alone[name].samples
            assert torch.equal(model.get_submodule(name).weight, parallel.get_submodule(name).weight)
    assert report.certified
    assert "experts.0, experts.1 depends on data" in str(report)  # there is no bound on the network's error
    again = copy.deepcopy(dense)
    assert prune_(again, x, **arguments, mode="cascade", run=tmp_path).layers == report.layers
    assert torch.equal(again.head.weight, model.head.weight)
    assert verify(dense, x, tmp_path).ok


@pytest.mark.parametrize("mode", ["cascade", "parallel"])
def test_outputs_whose_number_depends_on_pruned_weights_have_no_error(mode: str) -> None:
    torch.manual_seed(0)
    own = {"stem": nn.Linear(4, 6), "head": nn.Linear(6, 2)}
    model = Net(lambda m, x: m.head((z := m.stem(x))[z[:, 0] > z[:, 1]]), **own)
    x = [torch.randn(200, 4)]
    dense = copy.deepcopy(model)
    report = prune_(model, x, 0.6, mode=mode)
    promised({row.name: row for row in report.layers}["head"], dense, model, x, cascade=False)
    assert not report.certified
    assert any("the network's error is not known" in line for line in report.head)


@pytest.mark.parametrize("layer", ["0", "4", "8", "11"])
@pytest.mark.parametrize("mode", ["cascade", "parallel"])
def test_a_failure_at_any_layer_leaves_the_model_as_it_was(layer: str, mode: str) -> None:
    model, x = convolutions()
    model.train()
    model[1].eval()
    same = unchanged(model)

    def fail(name: str, _point: Any) -> None:
        if name == layer:
            raise RuntimeError("here")

    with pytest.raises(RuntimeError, match="here"):
        prune_(model, x, mode=mode, callback=fail)
    assert same()


@settings(max_examples=8)
@given(st.integers(0, 1000), st.floats(0.02, 0.4), st.floats(1.0, 2.0))
def test_random_chains_keep_every_promise(seed: int, eps: float, gamma: float) -> None:
    model, x = networks.mlp(3, 5, 4, 2, seed=seed), [torch.randn(12, 3)]
    dense = copy.deepcopy(model)
    report = prune_(model, x, eps, mode="cascade", gamma=gamma)
    for row in report.layers:
        promised(row, dense, model, x, cascade=True)
        assert row.violation <= 1e-4
        assert row.eps == pytest.approx(least_radius(row, dense, model, x, eps, gamma), rel=1e-3, abs=1e-6)
