"""What reads a layer's parameters beside the layer: such weights are for two uses, and stay as trained."""

import copy
from collections.abc import Callable

import pytest
import torch
from calls import prune_
from torch import Tensor, nn
from torch.nn import functional

from convexprune.errors import NothingToPrune
from convexprune.network.following import followed
from convexprune.network.forwards import evaluating
from convexprune.network.taps import tap
from convexprune.report.report import Report


class Net(nn.Module):
    """Three layers, and whatever ``beside`` makes of them: part of the outputs."""

    def __init__(self, beside: Callable[["Net", Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.norm, self.beside = nn.BatchNorm1d(8), beside

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.a(x).relu()
        return self.c(self.norm(self.b(hidden)).relu()), self.beside(self, hidden)


DATA = torch.randn(40, 6, generator=torch.Generator().manual_seed(1))
READS = {
    "a tied decoder": (lambda net, h: functional.linear(h, net.a.weight.t(), None), "linear"),
    "a product": (lambda net, h: h @ net.a.weight, "matmul"),
    "a part": (lambda net, h: h + net.a.weight[:, 0], "getitem, add"),
    "its size": (lambda net, h: h * net.a.weight.norm(), "norm"),
    "its data": (lambda net, h: h + net.a.weight.data.sum(), "sum"),
    "the bias": (lambda net, h: h + net.a.bias, "add"),
    "the weight itself": (lambda net, h: net.a.weight.detach(), "output"),
    "a list of them": (lambda net, h: torch.cat([h, net.a.weight.T.reshape(6, 8)]), "cat"),
}
DESCRIPTIONS: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "dtype": lambda net, h: h.to(net.a.weight.dtype),
    "device": lambda net, h: h.to(net.a.weight.device),
    "shape": lambda net, h: h.reshape(-1, net.a.weight.shape[0]),
    "a new tensor": lambda net, h: h + torch.zeros_like(net.a.bias) + net.a.weight.new_ones(8),
    "a later call": lambda net, h: h,
}


def pruned(beside: Callable[[Net, Tensor], Tensor], mode: str = "parallel") -> tuple[Net, Report]:
    net = Net(beside)
    return net, prune_(net, DATA, 0.2, mode=mode)


@pytest.mark.parametrize("mode", ["parallel", "cascade"])
@pytest.mark.parametrize("kind", READS)
def test_a_weight_that_something_else_reads_is_left_with_the_reason(kind: str, mode: str) -> None:
    beside, operation = READS[kind]
    net, report = pruned(beside, mode)
    reasons = {module.name: module.reason for module in report.skipped}
    assert f"also read by {operation} outside the layer's own call" in reasons["a"]
    assert torch.equal(net.a.weight, Net(beside).a.weight)
    assert [row.name for row in report.layers] == ["b", "c"]
    assert report.network is not None
    assert report.network.kept


@pytest.mark.parametrize("kind", DESCRIPTIONS)
def test_what_only_describes_a_weight_reads_nothing(kind: str) -> None:
    _, report = pruned(DESCRIPTIONS[kind])
    assert [row.name for row in report.layers] == ["a", "b", "c"]


@pytest.mark.parametrize("part", [slice(None), slice(0, 3)])
def test_a_view_that_was_made_beforehand_is_the_weight(part: slice) -> None:
    net = Net(lambda net, h: h[:, :6] @ net.alias.T.sum(1, keepdim=True))
    net.alias = net.a.weight.detach()[part]  # no parameter, and no buffer
    report = prune_(net, DATA, 0.2)
    assert [row.name for row in report.layers] == ["b", "c"]
    reasons = {module.name: module.reason for module in report.skipped}
    assert "outside the layer's own call" in reasons["a"]
    assert torch.equal(net.a.weight, Net(lambda net, h: h).a.weight)


def test_a_layer_reads_its_own_weight_as_often_as_it_likes() -> None:
    class Damped(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return functional.linear(x, self.weight, self.bias) + 0 * self.weight.sum()

    model = nn.Sequential(Damped(6, 8), nn.ReLU())
    with evaluating(model):
        found = followed(model, DATA, {"0": (tap(model, "0"),)})
    assert found["0"].elsewhere == ()


def test_a_hook_is_not_the_layers_own_call() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    model[0].register_forward_hook(lambda layer, args, output: output + layer.weight.mean())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(NothingToPrune, match="also read by mean"):
        prune_(model, DATA, 0.2, layers="0")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_norm_whose_shift_something_else_reads_stays_outside_the_program() -> None:
    reading, report = pruned(lambda net, h: h + net.norm.bias)
    assert torch.equal(reading.norm.bias, Net(lambda net, h: h).norm.bias)
    assert report.layers[1].norm is None
    _, alone = pruned(lambda net, h: h)
    assert alone.layers[1].norm == "norm"
