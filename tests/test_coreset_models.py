"""Coresets of whole models: removal is masking, sizes are as asked, reports are true, failures change nothing."""

import copy
import json
import math
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import tolerances
import torch
from calls import coreset_prune_
from torch import Tensor, nn
from torch.nn import functional

from convexprune import Report
from convexprune.errors import EmptyCalibration, NothingToPrune, UnsupportedModule
from convexprune.layers import input_matrices
from convexprune.network.links import find_links
from convexprune.pruners.draws import Scheme
from convexprune.pruners.sampling import Sampling
from convexprune.pruners.views import Items, Sensitivities, View
from convexprune.report.report import Assumption, LayerReport
from convexprune.solvers.errors import (
    InvalidInput,
    InvalidTolerance,
    NonFinite,
    SolverRefused,
    UnknownOption,
    UnknownSolver,
)
from convexprune.targets import Guarantee

Made = tuple[nn.Module, Tensor]


def mlp() -> Made:
    model = nn.Sequential(nn.Linear(12, 30), nn.ReLU(), nn.Linear(30, 20), nn.ReLU(), nn.Linear(20, 4))
    return model, torch.rand(90, 12)


def lenet() -> Made:
    model = nn.Sequential(
        *(nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 3), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 10)),
    )
    return model, torch.rand(20, 1, 12, 12)


def normed() -> Made:
    model = nn.Sequential(
        *(nn.Conv2d(2, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 9, 3, stride=2)),
        *(nn.BatchNorm2d(9), nn.ReLU(), nn.Flatten(), nn.Linear(81, 12), nn.BatchNorm1d(12), nn.ReLU()),
        nn.Linear(12, 3),
    )
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            for key in ("weight", "bias", "running_mean", "running_var"):
                nn.init.uniform_(getattr(module, key), 0.5, 1.5)
    return model, torch.randn(15, 2, 9, 9)


class Fork(nn.Module):
    """A stem that a convolution and, flattened, a linear layer take, each with a tail."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.pool = nn.Conv2d(3, 8, 3), nn.MaxPool2d(2)
        self.conv, self.fc = nn.Conv2d(8, 5, 3, padding=1), nn.Linear(72, 5)
        self.hidden, self.out = nn.Linear(5, 12), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(functional.relu(self.stem(x)))
        return self.out(functional.relu(self.hidden(self.conv(x).amax((2, 3)) + self.fc(x.flatten(1)))))


def fork() -> Made:
    return Fork(), torch.randn(15, 3, 8, 8)


MODELS: dict[str, Callable[[], Made]] = {"mlp": mlp, "lenet": lenet, "normed": normed, "fork": fork}


def built(name: str = "mlp", seed: int = 0, dtype: torch.dtype = torch.float64) -> Made:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, x = MODELS[name]()
    return model.to(dtype).eval(), x.to(dtype)


def grouped() -> Made:
    """Layers of 2·27, 32·3 and 3·27 weights; the first in two groups, the last without a bias."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            *(nn.Conv2d(6, 6, 3, groups=2), nn.ReLU(), nn.Conv2d(6, 2, 1), nn.Flatten(), nn.Linear(32, 3)),
            *(nn.ReLU(), nn.Linear(3, 27, bias=False)),
        )
        return model.double().eval(), torch.rand(20, 6, 6, 6).double()


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


def layer_inputs(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """What reaches each layer, by a hook written here."""
    seen: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0].clone()}))
        for name, module in model.named_modules()
    ]
    outputs(model, x)
    for hook in hooks:
        hook.remove()
    return seen


def weight(model: nn.Module, name: str) -> Tensor:
    return model.get_submodule(name).get_parameter("weight").detach()


def rows(report: Report, items: str = "neurons") -> dict[str, LayerReport]:
    return {row.name: row for row in report.layers if row.items == items}


def close(one: Tensor, other: Tensor, tolerance: float = tolerances.OUTPUTS) -> None:
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * max(1.0, float(other.abs().max())))


NEURONS: dict[str, dict[str, Any]] = {
    "lowner": {},
    "lowner, peeling": {"construction": "peeling"},
    "lowner, incoming": {"points": "incoming"},
    "mussay": {},
    "uniform": {},
}


# Removal


ORDERS = ["bottom-up", "top-down"]
IN_TURN = [
    (name, method, ORDERS[(i + j) % 2]) for i, name in enumerate(MODELS) for j, method in enumerate(NEURONS)
]  # each model and each method in either order


@pytest.mark.parametrize(("name", "method", "order"), IN_TURN)
def test_removal_computes_what_masking_does(name: str, method: str, order: Any) -> None:
    model, x = built(name)
    masked, dense = copy.deepcopy(model), copy.deepcopy(model)
    arguments = {"method": method.split(",")[0], "size": 0.5, "order": order, **NEURONS[method]}
    removed, zeroed = coreset_prune_(model, x, **arguments), coreset_prune_(masked, x, remove=False, **arguments)
    close(outputs(model, x), outputs(masked, x))
    assert removed.output_error == pytest.approx(zeroed.output_error, rel=tolerances.HAND)
    for row, other in zip(removed.layers, zeroed.layers, strict=True):
        assert row.nonzeros == other.nonzeros == int(weight(masked, row.name).count_nonzero())
        assert weight(masked, row.name).shape == weight(dense, row.name).shape
        assert row.output_error == pytest.approx(other.output_error, rel=tolerances.HAND, nan_ok=True)
        assert weight(model, row.name).numel() == row.nonzeros  # no zero is left, and none was there
    size = float(outputs(dense, x).norm())
    assert removed.output_error == pytest.approx(
        float((outputs(model, x) - outputs(dense, x)).norm()) / size, rel=tolerances.HAND
    )


@pytest.mark.parametrize(("method", "eps"), [("mussay", 2.0), ("lowner", 2.0), ("pfp", 100.0)])
def test_outputs_that_are_masked_count_as_if_they_were_gone(method: str, eps: float) -> None:
    """From the output back, a union over the outputs that are left."""
    model, x = built()
    masked = copy.deepcopy(model)
    arguments = {"method": method, "size": Guarantee(eps, 0.5), "order": "top-down"}
    removed, zeroed = coreset_prune_(model, x, **arguments), coreset_prune_(masked, x, remove=False, **arguments)
    close(outputs(model, x), outputs(masked, x))
    one, two = rows(removed), rows(zeroed)
    assert one["2"].kept_items < 20
    for name in "02":
        assert (one[name].draws, one[name].promise) == (two[name].draws, two[name].promise)
        assert one[name].assumptions == two[name].assumptions


@pytest.mark.parametrize("name", MODELS)
def test_a_ratio_and_a_count_are_kept_in_every_layer(name: str) -> None:
    for size in (0.4, 3):
        model, _ = built(name)
        widths = {link: len(weight(model, link)) for link in find_links(model)[0]}
        report = coreset_prune_(model, None, "mussay", size)
        for link, width in widths.items():
            row = rows(report)[link]
            kept = len(weight(model, link))
            assert kept == row.kept_items == (round(0.4 * width) if size == 0.4 else 3)
            assert row.all_items == width
        assert set(rows(report)) == set(widths)


def test_sizes_and_layers_by_pattern() -> None:
    model, x = built()
    before = weight(model, "2").clone()
    report = coreset_prune_(model, x, "uniform", {"0": 7, "*": 0.25})
    assert {name: row.kept_items for name, row in rows(report).items()} == {"0": 7, "2": 5}
    model, x = built()
    report = coreset_prune_(model, x, "uniform", 0.5, layers="2")
    assert {row.name: (row.items, row.kept_items) for row in report.layers} == {
        "2": ("neurons", 10),
        "4": ("inputs", 10),
    }
    assert "not chosen" in {skipped.name: skipped.reason for skipped in report.skipped}["0"]
    kept = (weight(model, "2")[:, None] == before).all(2).any(1)
    assert kept.all()  # rows of the weights as they were
    model, x = built()
    report = coreset_prune_(model, x, "uniform", 0.5, layers="!2")
    assert (len(weight(model, "0")), len(weight(model, "2"))) == (15, 20)
    assert {row.name for row in report.layers} == {"0", "2"}  # of which the second lost inputs alone


def test_what_stays_of_a_layer_is_unchanged_and_what_takes_it_is_rescaled() -> None:
    dense, x = built()
    model = copy.deepcopy(dense)
    coreset_prune_(model, x, "lowner", 10, layers="0", remove=False, sampling="fixed")
    kept = weight(model, "0").abs().sum(1) > 0
    assert int(kept.sum()) == 10
    assert torch.equal(weight(model, "0")[kept], weight(dense, "0")[kept])
    factors = weight(model, "2")[:, kept] / weight(dense, "2")[:, kept]
    close(factors, factors[:1].expand_as(factors))
    assert (factors >= 1 - tolerances.OUTPUTS).all()  # 1/probability
    assert torch.equal(model[2].bias, dense[2].bias)


@pytest.mark.parametrize(("order", "ratio"), [("bottom-up", 0.6), ("top-down", 0.15)])
@pytest.mark.parametrize("method", ["lowner", "mussay", "uniform"])
@pytest.mark.parametrize("name", ["mlp", "lenet", "fork"])
def test_the_network_s_budget_is_kept_and_used(name: str, method: str, order: Any, ratio: float) -> None:
    model, x = built(name)
    report = coreset_prune_(model, x, method, ratio, scope="network", order=order)
    whole = sum(row.nonzeros_before for row in report.layers)
    left = sum(weight(model, row.name).numel() for row in report.layers)
    assert left <= round(ratio * whole)
    # One neuron more of any layer would be too much: the widest one costs at most so many weights.
    widest = max(weight(built(name)[0], row.name).numel() / row.all_items for row in rows(report).values())
    assert left >= ratio * whole - 4 * widest


def test_a_network_s_budget_can_be_too_small() -> None:
    model, x = built()
    with pytest.raises(InvalidInput, match="17 weights are the fewest that can be left, 10 were wanted"):
        coreset_prune_(model, x, "uniform", 0.01, scope="network")  # 12 + 1 + 4 weights are a path; there are 1,040


@pytest.mark.parametrize("order", ["bottom-up", "top-down"])
def test_the_order_decides_which_weights_are_seen(order: Any) -> None:
    """Bottom-up, a layer is scored with the inputs left to it; top-down, with the outputs."""
    seen: list[tuple[str, int, int]] = []

    @dataclass(frozen=True)
    class Spy(Sampling):
        items: ClassVar[Items] = "neurons"
        sampling: Scheme = "top"

        def sensitivities(self, layer: View) -> Sensitivities:
            seen.append((layer.name, int(layer.incoming[:, :-1].any(0).sum()), int(layer.outgoing.any(0).sum())))
            return Sensitivities(torch.ones(1, len(layer.incoming)).double())

    coreset_prune_(built()[0], None, Spy(), 3, order=order)
    assert seen == {"bottom-up": [("0", 12, 20), ("2", 3, 4)], "top-down": [("2", 30, 4), ("0", 12, 3)]}[order]


@pytest.mark.parametrize(("name", "sampling"), [("mlp", "fixed"), ("mlp", "draws"), ("mlp", "top"), ("fork", "fixed")])
@pytest.mark.parametrize("method", NEURONS)
def test_size_1_is_the_identity(name: str, method: str, sampling: str) -> None:
    model, x = built(name)
    before = copy.deepcopy(model.state_dict())
    arguments = {"method": method.split(",")[0], "sampling": sampling, **NEURONS[method]}
    report = coreset_prune_(model, x, size=1.0, **arguments)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert report.output_error == 0
    assert all(row.output_error == 0 for row in rows(report).values())


@pytest.mark.parametrize("method", NEURONS)
def test_a_dead_layer_leaves_one_neuron_and_the_outputs(method: str) -> None:
    model, x = built()
    with torch.no_grad():
        model[2].weight.zero_()
    before = outputs(model, x)
    arguments = {"method": method.split(",")[0], "layers": "0", **NEURONS[method]}
    report = coreset_prune_(model, x, size=0.5, **arguments)
    close(outputs(model, x), before)
    assert rows(report)["0"].kept_items == (15 if method == "uniform" else 1) == len(weight(model, "0"))
    gone = ("29 of 30 neurons have no share in any output, and went",)
    assert rows(report)["0"].notes[-1:] == (() if method == "uniform" else gone)
    assert rows(report)["0"].output_error == report.output_error == 0


def test_dead_neurons_go_first() -> None:
    for method, options in NEURONS.items():
        model, x = built()
        with torch.no_grad():
            model[2].weight[:, ::2] = 0
        before = outputs(model, x)
        report = coreset_prune_(model, x, method.split(",")[0], 15, layers="0", **options)
        assert rows(report)["0"].kept_items == 15
        if method != "uniform":
            close(outputs(model, x), before)


def test_a_smaller_network_can_be_trained_on() -> None:
    model, x = built("normed")
    coreset_prune_(model, x, "lowner", 0.5)
    optimiser, target = torch.optim.SGD(model.parameters(), lr=1e-2), torch.zeros(15, 3, dtype=torch.float64)
    losses = []
    for _ in range(5):
        loss = (model(x) - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("name", "layer"), [("mlp", "0"), ("lenet", "3")])
def test_half_precision(name: str, layer: str, dtype: torch.dtype) -> None:
    """The choice is made in float64, and weights are rounded once: the errors are those of the float64 model."""
    model, x = built(name, dtype=dtype)
    exact, same = copy.deepcopy(model).double(), x.double()
    report, other = (
        coreset_prune_(net, data, "lowner", 0.5, layers=layer) for net, data in ((model, x), (exact, same))
    )
    assert all(p.dtype == dtype for p in model.parameters())
    for key, value in exact.state_dict().items():
        assert torch.equal(model.state_dict()[key], value.to(dtype)), key
    close(outputs(model, x).double(), outputs(exact, same), tolerances.HALF)
    for one, two in zip(report.layers, other.layers, strict=True):
        assert one.output_error == pytest.approx(two.output_error, rel=tolerances.HALF, nan_ok=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_in_half_precision_are_rounded_once(dtype: torch.dtype) -> None:
    """The one of 90,000 that is left counts 90,000 times: its product fits into float16, that factor does not."""
    layer = nn.Linear(300, 300)
    nn.init.uniform_(layer.weight, 1e-3, 2e-3)
    model = nn.Sequential(layer.to(dtype))
    before = layer.weight.detach().double()
    coreset_prune_(model, None, "uniform", 1, items="weights")
    [kept] = layer.weight.nonzero()
    assert torch.equal(layer.weight[tuple(kept)], (90_000 * before[tuple(kept)]).to(dtype))


# Weights


@pytest.mark.parametrize("size", [7, 20, 0.3, 1000])
def test_counts_of_weights_are_exact_and_biases_stay(size: Any) -> None:
    model, x = grouped()
    before = copy.deepcopy(model.state_dict())
    report = coreset_prune_(model, x, "uniform", size, items="weights")
    assert [row.name for row in report.layers] == ["0", "2", "4", "6"]
    for name, row in rows(report, "weights").items():
        count = min(row.all_items, round(size * row.all_items) if isinstance(size, float) else size)
        assert row.kept_items == row.nonzeros == int(weight(model, name).count_nonzero()) == count
        kept = weight(model, name) != 0
        factors = weight(model, name)[kept] / before[f"{name}.weight"][kept]
        assert (factors >= 1 - tolerances.OUTPUTS).all()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items() if "bias" in key)


def test_a_budget_of_weights_for_the_whole_network() -> None:
    model, x = grouped()
    report = coreset_prune_(model, x, "uniform", 0.3, items="weights", scope="network")
    assert report.nonzeros == round(0.3 * sum(row.nonzeros_before for row in report.layers))
    assert all(abs(row.nonzeros - 0.3 * row.nonzeros_before) <= 1 for row in report.layers)


def test_weights_that_are_zero_stay_zero() -> None:
    model, x = built()
    with torch.no_grad():
        model[0].weight[:, ::2] = 0
    report = coreset_prune_(model, x, "uniform", 0.5, items="weights", layers="0")
    assert not weight(model, "0")[:, ::2].any()
    assert rows(report, "weights")["0"].nonzeros == 180 == report.layers[0].nonzeros_before
    assert rows(report, "weights")["0"].notes == ()


@pytest.mark.parametrize("method", ["corenet", "sipp", "pfp"])
@pytest.mark.parametrize("size", [0.5, 1000])
def test_what_the_sample_never_uses_goes_and_the_row_says_so(method: str, size: float) -> None:
    """Ten of twelve inputs are 0; of the hidden neurons, those that never fire."""
    model, x = built()
    x = x * (torch.arange(12) < 2)
    before = outputs(model, x)
    report = coreset_prune_(model, x, method, size)
    row = report.layers[0]
    if method == "pfp":
        hidden = layer_inputs(built()[0], x)["2"]
        gone, told = int((hidden == 0).all(0).sum()), [c for c in row.notes if "neurons" in c]
        assert 0 < gone < 15
        assert told == ([f"{gone} of 30 neurons have no share in any output on this sample, and went"] * (size == 1000))
    else:
        assert weight(model, "0").count_nonzero() == 60 == row.kept_items  # of 180, or 360, that were asked for
        assert row.notes == ("300 of 360 nonzero weights have no share in any output on this sample, and went",)
    if size == 1000:
        close(outputs(model, x), before)


# The report


@pytest.mark.parametrize("baseline", [False, True])
@pytest.mark.parametrize(
    ("name", "layer"), [("mlp", "0"), ("lenet", "0"), ("lenet", "3"), ("normed", "3"), ("fork", "stem")]
)
def test_a_row_s_error_is_that_of_what_takes_the_neurons(name: str, layer: str, baseline: bool) -> None:
    """‖XÛ − XU‖/‖XU‖ over all consumers, X as the whole network computes it, Û from the masked model."""
    dense, x = built(name)
    model, X = copy.deepcopy(dense), layer_inputs(dense, x)
    report = coreset_prune_(model, x, "mussay", 0.5, layers=layer, remove=False, baseline=baseline)
    wrong = right = 0.0
    for consumer in find_links(dense)[0][layer].consumers:
        module = copy.deepcopy(dense.get_submodule(consumer))
        module.bias = None
        [inputs] = input_matrices(module, X[consumer])
        U, V = (weight(net, consumer).flatten(1).T for net in (dense, model))
        wrong, right = wrong + float((inputs @ (V - U)).square().sum()), right + float((inputs @ U).square().sum())
    row = rows(report)[layer]
    assert row.output_error == pytest.approx(math.sqrt(wrong / right), rel=tolerances.HAND)
    assert row.samples == len(inputs) or name == "fork"
    assert math.isnan(row.uniform_error) != baseline


def test_a_row_s_error_of_weights_is_over_all_groups() -> None:
    dense, x = grouped()
    model, X = copy.deepcopy(dense), layer_inputs(dense, x)["0"]
    row = rows(coreset_prune_(model, x, "uniform", 0.5, items="weights", layers="0", baseline=True), "weights")["0"]
    change, whole = copy.deepcopy(dense[0]), dense[0]
    with torch.no_grad():
        change.weight.sub_(model[0].weight)
        zero = torch.zeros_like(whole.bias)
        wrong, right = (functional.conv2d(X, w, zero, groups=2) for w in (change.weight, whole.weight))
    assert row.output_error == pytest.approx(float(wrong.norm() / right.norm()), rel=tolerances.HAND)
    assert 0.3 < row.uniform_error < 3


def test_the_baseline_is_the_mean_error_of_uniform_samples() -> None:
    """Against 30 runs of the method "uniform", within four standard errors of the five that are averaged."""
    found = []
    for seed in range(30):
        model, x = built()
        found.append(rows(coreset_prune_(model, x, "uniform", 12, layers="0", seed=seed))["0"].output_error)
    model, x = built()
    row = rows(coreset_prune_(model, x, "lowner", 12, layers="0", baseline=True))["0"]
    assert abs(row.uniform_error - np.mean(found)) <= 4 * np.std(found) / math.sqrt(5)
    assert "uniform" in str(coreset_prune_(built()[0], x, "lowner", 0.5, baseline=True))


@pytest.mark.parametrize("items", ["neurons", "weights"])
def test_asking_for_a_baseline_changes_no_sample(items: str) -> None:
    models = []
    for baseline in (False, True):
        model, x = built()
        coreset_prune_(model, x, "uniform", 0.5, items=items, baseline=baseline)
        models.append(model)
    assert all(torch.equal(a, b) for a, b in zip(*(model.parameters() for model in models), strict=True))


def test_the_seed_decides() -> None:
    found = []
    for seed in (3, 3, 4):
        model, x = built()
        coreset_prune_(model, x, "mussay", 0.5, seed=seed)
        found.append(torch.cat([p.flatten() for p in model.parameters()]))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_the_global_seed_is_not_disturbed() -> None:
    for module, state in ((torch.random, torch.random.get_rng_state),):
        before = state()
        coreset_prune_(*built(), "lowner", 0.5, baseline=True)
        assert torch.equal(before, state()), module
    numbers = np.random.get_state()[1].copy()  # noqa: NPY002
    coreset_prune_(*built(), "lowner", 0.5)
    assert (np.random.get_state()[1] == numbers).all()  # noqa: NPY002


@pytest.mark.parametrize("width", [80, 160])
@pytest.mark.parametrize("name", MODELS)
def test_the_text_of_a_report_fits(name: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    model, x = built(name)
    report = coreset_prune_(model, x, "lowner", 0.5, baseline=True)
    text = str(report)
    assert max(map(len, text.splitlines())) <= width
    for name_, row in rows(report).items():
        line = next(line for line in text.splitlines() if line.split()[:1] == [name_])
        assert f"{row.kept_items} of {row.all_items}" in line
        assert f"{row.output_error:.4f}" in line
        assert f"{row.uniform_error:.4f}" in line
        assert "sampled" in line
        assert (f"{row.nonzeros:,}" in line) or width == 80
    assert "…" not in text
    assert f"network output error {report.output_error:.4f} on {len(x)} samples" in " ".join(text.split())


def test_long_names_are_shortened_and_figures_never_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    torch.manual_seed(0)
    first, second = nn.Conv2d(3, 128, 3), nn.Conv2d(128, 256, 3)
    layers = {"convolution_of_block_1": first, "relu": nn.ReLU(), "convolution_of_block_2": second}
    features = nn.Sequential(OrderedDict(layers | {"pool": nn.AdaptiveAvgPool2d(1), "flat": nn.Flatten()}))
    model = nn.Sequential(OrderedDict(features_of_images=features, classifier=nn.Linear(256, 10)))
    report = coreset_prune_(model, torch.rand(2, 3, 8, 8), "mussay", Guarantee(1.0, 0.5), baseline=True, beta=1e-3)
    lines = str(report).splitlines()
    for row in rows(report).values():
        cells = (f"{row.kept_items} of {row.all_items}", row.kept, f"{row.output_error:.4f}", "assumption fails")
        assert sum(all(f" {cell}" in line for cell in cells) for line in lines) >= 1, row.name
    assert "… at the start of a name stands for features_of_images." in str(report)


@pytest.mark.parametrize("method", ["corenet", "sipp", "pfp"])
@pytest.mark.parametrize("size", [0.5, Guarantee(0.5, 1e-200)])
def test_a_guarantee_s_own_delta_says_how_many_samples_it_takes(method: str, size: Any) -> None:
    delta = 1e-200 if isinstance(size, Guarantee) else 0.1
    model, x = built()
    report = coreset_prune_(model, x, method, size, delta=0.1)
    [sample] = [a for a in report.layers[0].assumptions if "samples" in a.text]
    assert f"for delta = {delta:g}; 90 were given" in sample.text
    assert sample.holds is (delta == 0.1)


@pytest.mark.parametrize("method", ["corenet", "sipp"])
def test_a_layer_that_no_data_reach_is_left_and_named(method: str) -> None:
    model, x = mlp()
    model[0].unused = nn.Linear(3, 4)  # type: ignore[union-attr]
    report = coreset_prune_(model, x, method, 0.5)
    assert {module.name: module.reason for module in report.skipped}.keys() == {"0.unused"}


def test_json_says_everything_and_has_no_nan() -> None:
    model, x = built()
    report = coreset_prune_(model, x, "lowner", {"0": Guarantee(1e-3, 0.5), "*": Guarantee(2.0, 0.5)})
    assert "NaN" not in report.to_json()
    assert "Infinity" not in report.to_json()
    loaded = json.loads(report.to_json())
    assert [row["name"] for row in loaded["layers"]] == ["0", "2", "4"]
    assert [row["guarantee"] for row in loaded["layers"]] == [[1e-3, 0.5], [2.0, 0.5], None]
    assert loaded["nonzeros"] == sum(row["nonzeros"] for row in loaded["layers"]) == report.nonzeros
    assert loaded["output_error"] == report.output_error
    assert loaded["layers"][0]["terms"]["t"] == pytest.approx(20)


def test_provenance_is_complete() -> None:
    model, x = built()
    report = coreset_prune_(model, x, "mussay", 0.5, order="top-down", seed=7, beta=2.0, sampling="draws")
    told = report.provenance
    assert set(told["versions"]) >= {"convexprune", "torch", "numpy"}
    assert {
        "method": "mussay",
        "method_options": {"beta": 2.0, "sampling": "draws"},
        "target": {"kind": "neurons", "value": 0.5, "scope": "layer"},
        "order": "top-down",
        "remove": True,
        "baseline": False,
        "seed": 7,
        "dtype": "torch.float64",
        "device": "cpu",
        "threads": torch.get_num_threads(),
    }.items() <= told.items()
    again = built()[0]
    options = told["method_options"] | {"order": told["order"], "seed": told["seed"]}
    coreset_prune_(again, x, told["method"], 0.5, **options)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


def test_without_data_no_error_is_claimed() -> None:
    with_data, x = built()
    model = copy.deepcopy(with_data)
    report = coreset_prune_(model, None, "lowner", 0.5)
    coreset_prune_(with_data, x, "lowner", 0.5)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), with_data.parameters(), strict=True))
    assert math.isnan(report.output_error)
    assert all(math.isnan(row.output_error) and math.isnan(row.uniform_error) for row in rows(report).values())
    loaded = json.loads(report.to_json())
    assert loaded["output_error"] is None
    assert loaded["samples"] == 0
    text = str(report)
    assert "output error" not in text
    assert "nan" not in text.lower()
    assert "370 of 1,040 weights kept" in " ".join(text.split())  # 12·15 + 15·10 + 10·4


def test_progress_goes_from_nothing_to_all() -> None:
    told: list[tuple[str, int, int]] = []

    def tell(*stage: Any) -> None:
        told.append(stage)

    for items, last in (("neurons", 2), ("weights", 3)):
        told.clear()
        coreset_prune_(*built(), "uniform", 0.5, items=items, batch_size=30, progress=tell)
        assert told[:3] == [("capture", done, done) for done in (1, 2, 3)]
        layers = [stage for stage in told[3:] if stage[2] == last]
        assert [stage[1:] for stage in layers] == [(done, last) for done in range(last + 1)]


def test_calibration_may_be_an_array_batches_or_labelled() -> None:
    _, x = built()
    want = coreset_prune_(built()[0], x, "mussay", 0.5).output_error
    labels = torch.zeros(90)
    for calibration, options in (
        (x.numpy(), {}),
        ((part for part in x.split(40)), {}),
        (list(zip(x.split(40), labels.split(40), strict=True)), {"forward": lambda net, batch: net(batch[0])}),
    ):
        got = coreset_prune_(built()[0], calibration, "mussay", 0.5, **options)  # type: ignore[arg-type]
        assert got.output_error == pytest.approx(want, rel=tolerances.HAND)
        assert got.samples == 90


# Guarantees of models


def test_a_guarantee_that_asks_for_all_keeps_all() -> None:
    model, x = built()
    before = outputs(model, x)
    report = coreset_prune_(model, x, "mussay", Guarantee(0.01, 0.1))
    assert torch.equal(outputs(model, x), before)
    assert report.certified
    for row in rows(report).values():
        assert row.status == "kept whole"
        assert row.draws >= row.all_items == row.kept_items
        assert row.output_error == 0
    assert "eps = 0.01, delta = 0.1" in " ".join(str(report).split())


def test_a_guarantee_that_asks_for_less_is_sampled_and_told() -> None:
    """ReLU is fine for Mussay; a given β that the inputs exceed is not, and the row says so."""
    model, x = built()
    report = coreset_prune_(model, x, "mussay", Guarantee(2.0, 0.5))
    assert report.certified
    assert {row.status for row in rows(report).values()} == {"sampled"}
    model, x = built()
    report = coreset_prune_(model, x, "mussay", Guarantee(2.0, 0.5), beta=1e-3)
    assert not report.certified
    row = rows(report)["0"]
    assert row.status == "assumption fails"
    assert [a.holds for a in row.assumptions] == [True, False]
    assert "does not hold" in " ".join(str(report).split())  # wrapped at the terminal's width
    assert [row["certified"] for row in [json.loads(report.to_json())]] == [False]


def test_an_assumption_that_fails_in_one_group_fails_in_the_layer() -> None:
    @dataclass(frozen=True)
    class Doubtful(Sampling):
        items: ClassVar[Items] = "weights"
        sampling: Scheme = "fixed"
        seen: list[int] = field(default_factory=list)

        def sensitivities(self, layer: View) -> Sensitivities:
            self.seen.append(1)
            s = torch.ones(1, layer.products[0].weights.numel()).double()
            draws = 1 if len(self.seen) == 2 else 10**6
            first = Assumption("the first", len(self.seen) != 2)
            return Sensitivities(s, torch.tensor([draws]), "", (first,))

    model, x = grouped()
    row = rows(coreset_prune_(model, x, Doubtful(), Guarantee(0.1, 0.1), layers="0"), "weights")["0"]
    assert not row.certified
    assert row.status == "assumption fails"


@pytest.mark.parametrize("method", ["lowner", "mussay", "corenet", "sipp", "pfp"])
def test_the_extremes_of_a_guarantee(method: str) -> None:
    model, x = built()
    for guarantee in (Guarantee(1e-9, 0.1), Guarantee(1e-100, 1e-200)):
        report = coreset_prune_(model, x, method, guarantee)
        assert {row.status for row in report.layers} <= {"kept whole", "inputs"}
        assert report.nonzeros == report.nonzeros_before
    report = coreset_prune_(model, x, method, Guarantee(1e100, 0.999))
    assert 0 < report.nonzeros < report.nonzeros_before


def unbiased() -> Made:
    """Without biases; every hidden neuron fires."""
    model, x = built()
    with torch.no_grad():
        for layer in model[::2]:
            layer.bias.zero_()
            layer.weight.abs_()
    return model, x


STRICT, WEAK = Guarantee(1e10, 0.1), Guarantee(1e11, 0.1)


@pytest.mark.parametrize(
    ("size", "layers", "held"),
    [
        (STRICT, None, "024"),
        ({"0": STRICT, "*": WEAK}, None, "24"),
        ({"0": STRICT, "*": Guarantee(1e-9, 0.1)}, None, "0"),
        (STRICT, ["0", "2"], "02"),
    ],
)
def test_a_promise_about_the_network_asks_for_all_its_layers(size: Any, layers: Any, held: str) -> None:
    """A guarantee is met where every other layer has one that is no weaker, or loses nothing."""
    model, x = unbiased()
    found = rows(coreset_prune_(model, x, "corenet", size, layers=layers), "weights")
    for name, row in found.items():
        told = [a.holds for a in row.assumptions if a.text.startswith("every layer")]
        assert told == ([] if row.guarantee is None else [name in held])
        assert row.certified is (row.guarantee is None or name in held)
    assert found["0"].kept_items < 360


def test_a_bias_anywhere_fails_the_promise() -> None:
    model, x = unbiased()
    with torch.no_grad():
        model[4].bias[0] = 1
    report = coreset_prune_(model, x, "corenet", STRICT, layers="0")
    assert not report.certified
    assert [a.holds for a in rows(report, "weights")["0"].assumptions if "bias" in a.text] == [False]


class Backwards(nn.Module):
    """The layers of ``mlp``, made from the last to the first."""

    def __init__(self, model: nn.Sequential) -> None:
        super().__init__()
        self.c, self.b, self.a = model[4], model[2], model[0]

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x).relu()).relu())


def test_the_theory_is_about_the_whole_network_from_its_input_on() -> None:
    """Whichever layers are pruned, and in whatever order the model holds them."""
    model, x = built()
    labels = outputs(model, x).argmax(1).tolist()
    other, part = copy.deepcopy(Backwards(model)), copy.deepcopy(model)
    whole = coreset_prune_(model, x, "corenet", 0.5, labels=labels)
    backwards = coreset_prune_(other, x, "corenet", 0.5, labels=np.array(labels))
    some = coreset_prune_(part, x, "corenet", 0.5, labels=labels, layers=["2"])
    assert whole.generalisation is not None
    for report in (backwards, some):
        bound = report.generalisation
        assert bound is not None
        assert (bound.layers, bound.largest_output) == (4, whole.generalisation.largest_output)
        assert bound.onwards == pytest.approx(whole.generalisation.onwards)
        assert bound.complexity == pytest.approx(whole.generalisation.complexity)
    assert [row.name for row in backwards.layers] == ["c", "b", "a"]
    close(outputs(other, x), outputs(model, x))  # the same sample
    assert rows(some, "weights")["2"].terms == rows(whole, "weights")["2"].terms
    assert torch.equal(weight(part, "0"), weight(built()[0], "0"))


def test_labels_are_refused_before_anything_is_pruned_where_no_bound_is_known() -> None:
    model, x = mlp()
    seen: list[object] = []
    model.register_forward_hook(lambda *_: seen.append(0))
    with pytest.raises(InvalidInput, match="looks at no loss and has no bound on errors"):
        coreset_prune_(model, x, "lowner", 0.5, labels=[0] * 90)
    assert not seen


@pytest.mark.parametrize("method", ["mussay", "pfp", "lowner"])
def test_a_guarantee_is_said_once(method: str) -> None:
    model, x = mlp()
    report = coreset_prune_(model, x, method, Guarantee(0.5, 0.1))
    for row in report.layers:
        remarks = row.remarks()
        assert len(remarks) == len(set(remarks))
        assert sum(row.promise in text for text in remarks if row.promise) == bool(row.guarantee)


def test_a_code_stores_every_value_in_the_network_s_own_precision() -> None:
    """Norms' statistics, too: 36, beside 144 weights that are kept and 24 + 24 biases and gains."""
    bits = []
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(0)
        layers = (nn.Linear(8, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 16, bias=False))
        x = torch.rand(30, 8)
        model = nn.Sequential(*layers).to(dtype)
        report = coreset_prune_(model, x.to(dtype), "corenet", 0.5, labels=torch.zeros(30, dtype=torch.int64))
        assert report.generalisation is not None
        assert report.nonzeros == 144
        bits.append(report.generalisation.bits)
    assert bits[1] - bits[0] == 32 * (144 + 12 + 2 * 12 + 2 * 12)


# Failures


def refuse(*_: Any) -> None:
    raise RuntimeError("stop")


def refuse_later(stage: str, done: int, total: int) -> None:
    if stage == "2":
        raise KeyboardInterrupt


class Conditional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()[0]

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) if x.sum() > 0 else x


WEIGHTS: dict[str, Any] = {"method": "uniform", "items": "weights"}
BAD_CALLS: dict[str, tuple[dict[str, Any], type[BaseException]]] = {
    "a size for some layers only": ({"size": {"0": 0.5}}, InvalidInput),
    "a size for no layer": ({"size": {"conv*": 0.5, "*": 0.5}}, InvalidInput),
    "network count": ({"size": 5, "scope": "network"}, InvalidInput),
    "network too small": ({"size": 1e-9, "scope": "network"}, InvalidInput),
    "network too small, weights": ({"size": 1e-9, "scope": "network", **WEIGHTS}, InvalidInput),
    "a baseline without data": ({"data": None, "baseline": True}, InvalidInput),
    "labels that are none": ({"method": "corenet", "labels": ["cat", "dog"]}, InvalidInput),
    "labels of a method without a bound": ({"labels": [0] * 90}, InvalidInput),
    "an order of weights": ({**WEIGHTS, "order": "top-down"}, SolverRefused),
    "weights left in place": ({**WEIGHTS, "remove": False}, SolverRefused),
    "unknown method": ({"method": "lownr"}, UnknownSolver),
    "unknown option": ({"bta": 1.0}, UnknownOption),
    "bad option": ({"beta": -1.0}, InvalidTolerance),
    "unknown sampling, guaranteed": ({"sampling": "best", "size": Guarantee(0.1, 0.1)}, InvalidInput),
    "the largest, guaranteed": ({"sampling": "top", "size": Guarantee(0.1, 0.1)}, InvalidInput),
    "a baseline, guaranteed": ({"method": "uniform", "size": Guarantee(0.1, 0.1)}, InvalidInput),
    "NaN inputs": ({"data": torch.full((5, 12), torch.nan, dtype=torch.float64)}, NonFinite),
    "inputs of another shape": ({"data": torch.rand(5, 7, dtype=torch.float64)}, InvalidInput),
    "no samples": ({"data": torch.rand(0, 12, dtype=torch.float64)}, EmptyCalibration),
    "one pattern without a match": ({"layers": ["0", "conv*"]}, NothingToPrune),
    "no pattern": ({"layers": []}, NothingToPrune),
    "no pattern, weights": ({"layers": [], **WEIGHTS}, NothingToPrune),
    "the output layer": ({"layers": "4"}, NothingToPrune),
    "failing progress": ({"progress": refuse}, RuntimeError),
    "Ctrl-C at the second layer": ({"progress": refuse_later}, KeyboardInterrupt),
    "Ctrl-C at the second layer of weights": ({"progress": refuse_later, "method": "sipp"}, KeyboardInterrupt),
    **{f"no data for {name}": ({"method": name, "data": None}, InvalidInput) for name in ("pfp", "sipp", "corenet")},
}


def assert_unchanged(model: nn.Module, before: dict[str, Tensor], objects: list[nn.Parameter]) -> None:
    now = model.state_dict()
    assert list(now) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in now.items())
    assert all(one is other for one, other in zip(model.parameters(), objects, strict=True))
    assert [(layer.in_features, layer.out_features) for layer in model.modules() if isinstance(layer, nn.Linear)] == [
        tuple(reversed(layer.weight.shape)) for layer in model.modules() if isinstance(layer, nn.Linear)
    ]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("case", BAD_CALLS)
def test_after_an_error_the_model_is_as_it_was(case: str) -> None:
    arguments, error = BAD_CALLS[case]
    model, x = built()
    model.train()
    model[1].eval()
    flags = [module.training for module in model.modules()]
    before, objects = copy.deepcopy(model.state_dict()), list(model.parameters())
    with pytest.raises(error) as caught:
        coreset_prune_(model, **({"data": x, "method": "mussay"} | arguments))
    assert_unchanged(model, before, objects)
    assert [module.training for module in model.modules()] == flags
    assert str(caught.value) or error is KeyboardInterrupt


@pytest.mark.parametrize("items", ["neurons", "weights"])
def test_a_failure_at_the_very_end_restores_every_layer(items: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = built()
    before, objects = copy.deepcopy(model.state_dict()), list(model.parameters())

    def fail(*_: Any) -> Tensor:
        raise MemoryError

    monkeypatch.setattr("convexprune.prune.network_errors", fail)
    with pytest.raises(MemoryError):
        coreset_prune_(model, x, "uniform", 0.5, items=items)
    assert_unchanged(model, before, objects)


def test_models_of_which_neurons_cannot_be_removed() -> None:
    torch.manual_seed(0)
    for model, error in (
        (Conditional(), UnsupportedModule),
        (nn.Sequential(nn.Linear(4, 3)), NothingToPrune),
        (nn.Sequential(nn.ReLU()), NothingToPrune),
    ):
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(error):
            coreset_prune_(model, None, "lowner", 0.5)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    report = coreset_prune_(Conditional(), None, "uniform", 0.5, items="weights")  # weights need no trace
    assert report.nonzeros == sum(round(0.5 * n) for n in (360, 600, 80))


def test_nan_weights_are_found() -> None:
    model, _ = built()
    with torch.no_grad():
        model[2].weight[0, 0] = torch.nan
    for method in ("lowner", "magnitude"):
        with pytest.raises(NonFinite):
            coreset_prune_(model, None, method, 0.5)


@pytest.mark.parametrize("method", ["lowner", "mussay"])
def test_a_sigmoid_needs_beta_or_data(method: str) -> None:
    def sigmoid() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 30), nn.Sigmoid(), nn.Linear(30, 2)).double()

    x = torch.rand(20, 5).double()
    with pytest.raises(InvalidInput, match=r"layer '0'.*beta"):
        coreset_prune_(sigmoid(), None, method, 0.5)
    beta = math.sqrt(float(x.square().sum(1).max()) + 1)
    found = []
    for calibration, options in ((x, {}), (None, {"beta": beta})):
        model = sigmoid()
        coreset_prune_(model, calibration, method, 0.5, **options)
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    close(found[0], found[1])


def test_training_mode_and_gradients_are_left_as_found() -> None:
    model, x = built("normed")
    model.train()
    model[2].eval()
    model[0].weight.requires_grad_(False)
    flags = [module.training for module in model.modules()]
    statistics = model[1].running_mean.clone()
    coreset_prune_(model, x, "mussay", 0.5)
    assert [module.training for module in model.modules()] == flags
    assert [p.requires_grad for p in model.parameters()][:2] == [False, True]
    assert (model[1].running_mean[:, None] == statistics).any(1).all()  # those of the kept channels, not moved on


class Attending(nn.Module):
    """Two layers with one weight, attention, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)
        self.two.weight, self.two.bias = self.one.weight, self.one.bias
        self.attend, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.two(self.one(x).relu()).relu()
        return self.head(self.attend(x, x, x, need_weights=False)[0]).mean(1)


def transposed() -> nn.Module:
    kind = pytest.importorskip("transformers.pytorch_utils").Conv1D
    return nn.Sequential(kind(12, 8), nn.ReLU(), kind(4, 12))


def along(axes: int) -> nn.Module:
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
    layers = (kind(2, 6, 3), nn.ReLU(), kind(6, 5, 2, padding=1), nn.ReLU(), nn.Flatten())
    return nn.Sequential(*layers, nn.LazyLinear(3))


KINDS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "Conv1d": (lambda: along(1), (2, 6)),
    "Conv3d": (lambda: along(3), (2, 4, 4, 4)),
    "attention, one weight in two layers": (Attending, (3, 8)),
    "weights kept transposed": (transposed, (8,)),
}


def made(kind: str) -> Made:
    make, shape = KINDS[kind]
    torch.manual_seed(0)
    model, x = make().eval(), torch.rand(20, *shape)
    outputs(model, x)  # lazy layers find out their sizes
    return model.double(), x.double()


@pytest.mark.parametrize("method", ["corenet", "sipp", "uniform"])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_all_kinds_of_layers_are_sampled(kind: str, method: str) -> None:
    model, x = made(kind)
    options = {"items": "weights"} if method == "uniform" else {}
    before = outputs(model, x)
    report = coreset_prune_(model, x, method, 0.5, **options)
    assert not [module for module in report.skipped if "solved there for both" not in module.reason]
    for row in report.layers:
        few = any("have no share" in note for note in row.notes)
        assert row.nonzeros == row.kept_items == round(0.5 * row.all_items) or few, row.name
        assert row.all_items == row.nonzeros_before
    moved = float((outputs(model, x) - before).norm() / before.norm())
    assert report.output_error == pytest.approx(moved, rel=tolerances.HAND)


@pytest.mark.parametrize("method", ["lowner", "mussay", "pfp"])
@pytest.mark.parametrize("kind", ["Conv1d", "Conv3d"])
def test_filters_along_one_and_three_axes_are_removed(kind: str, method: str) -> None:
    model, x = made(kind)
    masked = copy.deepcopy(model)
    coreset_prune_(model, x, method, 0.5)
    coreset_prune_(masked, x, method, 0.5, remove=False)
    assert [len(weight(model, name)) for name in "02"] == [3, 2]
    close(outputs(model, x), outputs(masked, x))


@pytest.mark.parametrize(("method", "options"), [("sipp", {}), ("pfp", {}), ("mussay", {"order": "top-down"})])
def test_a_run_goes_on_and_jobs_change_nothing(method: str, options: dict[str, Any], tmp_path: Path) -> None:
    models = [built()[0] for _ in range(3)]
    _, x = built()
    coreset_prune_(models[0], x, method, 0.5, **options)

    def stop() -> bool:
        return any(tmp_path.glob("layers/*.json"))

    assert coreset_prune_(copy.deepcopy(models[1]), x, method, 0.5, run=tmp_path, stop=stop, **options).provenance[
        "stopped"
    ]
    coreset_prune_(models[1], x, method, 0.5, run=tmp_path, **options)
    with ThreadPoolExecutor(2) as pool:
        coreset_prune_(models[2], x, method, 0.5, jobs=pool, **options)
    for other in models[1:]:
        for one, two in zip(models[0].parameters(), other.parameters(), strict=True):
            assert torch.equal(one, two)


@pytest.mark.parametrize("name", ["lowner", "mussay", "pfp", "corenet", "sipp", "uniform", "magnitude"])
def test_every_method_prunes_a_model_with_its_defaults(name: str) -> None:
    model, x = built(dtype=torch.float32)
    report = coreset_prune_(model, x, name, 0.5)
    assert report.nonzeros < report.nonzeros_before
    assert outputs(model, x).isfinite().all()
    assert report.provenance["method"] == name
    assert "NaN" not in report.to_json()
