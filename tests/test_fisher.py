"""Fisher pruning: what is measured of neurons and weights, what they cost, and fine-tuning in which they go."""

import copy
import gc
import weakref
from collections.abc import Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from networks import JOINT, mlp
from scored import images, joint
from tolerances import ROUNDING
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from convexprune import Data, Neurons, Options, Sparsity, prune_
from convexprune.costs import flops
from convexprune.network.graph import inputs_of
from convexprune.network.links import Link, find_links
from convexprune.network.weights import remove_neurons_
from convexprune.pruners.fisher import Fisher
from convexprune.pruners.information import Information, OperationCosts

AT_ONCE = Fisher(steps=0)


def widths(model: nn.Module, links: Mapping[str, Link]) -> dict[str, int]:
    return {name: inputs_of(model.get_submodule(link.consumers[0])) // link.repeat[0] for name, link in links.items()}


# Δ


def measured(model: nn.Module, data: Data, pruner: Fisher = AT_ONCE) -> dict[str, Tensor]:
    """Δ − beta·C of each link's neurons, by one pass."""
    found: dict[str, Tensor] = {}

    class Kept(type(pruner)):  # type: ignore[misc]
        def worths(self, run: Any, scores: Any) -> Any:
            each = super().worths(run, scores)
            found.update(
                {
                    name: torch.tensor([value for value, _ in values], dtype=torch.float64)
                    for name, values in each.items()
                }
            )
            return each

    prune_(copy.deepcopy(model), data, Neurons(0.3), method=Kept(**vars(pruner)))
    return found


def by_gates(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """½·mean_n (∂L_n/∂z_nk)² at z = 1, a factor of all entries of neuron k of sample n where layers take them."""
    model = copy.deepcopy(model).double()
    links, _ = find_links(model, residual=True)
    sizes = widths(model, links)
    gates = {name: torch.ones(len(x), n, dtype=torch.float64, requires_grad=True) for name, n in sizes.items()}
    for name, link in links.items():
        for consumer, repeat in zip(link.consumers, link.repeat, strict=True):

            def hook(layer: nn.Module, args: Any, gate: Tensor) -> Any:
                behind = [1] * (args[0].dim() - 2)
                shape = (len(gate), *behind, -1) if isinstance(layer, nn.Linear) else (len(gate), -1, *behind)
                return args[0] * gate.view(shape)

            gate = gates[name].repeat_interleave(repeat, 1)
            model.get_submodule(consumer).register_forward_pre_hook(partial(hook, gate=gate))
    functional.cross_entropy(model(x.double()), y, reduction="sum").backward()
    return {name: gate.grad.square().mean(0) / 2 for name, gate in gates.items()}


@pytest.mark.parametrize("name", ["images", *JOINT])
def test_deltas_are_those_of_factors_of_the_neurons(name: str) -> None:
    """Convolutions, linear layers, flattened maps, and sums whose neurons several layers take."""
    model, x, y = images() if name == "images" else joint(name)
    found = measured(model, Data(x, labels=y, batch_size=13))
    expected = by_gates(model, x, y)
    assert found.keys() == expected.keys()
    for link, delta in found.items():
        torch.testing.assert_close(delta, expected[link], rtol=1e-9, atol=1e-12)
    pruned = copy.deepcopy(model)
    prune_(pruned, Data(x, labels=y), Neurons(0.4, "network"), method=AT_ONCE, options=Options(remove=False))
    total = sum(map(len, expected.values()))
    order = torch.cat(list(expected.values())).sort(descending=True).values
    cut = order[round(0.6 * total) - 1]
    links, _ = find_links(model, residual=True)
    for link, delta in expected.items():
        weight = pruned.get_submodule(links[link].consumers[0]).weight
        there = weight.reshape(len(weight), len(delta), -1).abs().sum((0, 2)) > 0
        stay = delta >= cut
        stay[delta.argmax()] = True
        assert torch.equal(there, stay)


def test_single_weights_go_by_the_diagonal_of_the_fisher_information() -> None:
    """½w²·mean_n (∂L_n/∂w)², sample by sample, against torch.func."""
    model, x, y = images()
    own = {name: p.detach().double() for name, p in model.named_parameters()}

    def loss(weights: dict[str, Tensor], sample: Tensor, label: Tensor) -> Tensor:
        outputs = functional_call(copy_, (weights, buffers), (sample[None],))
        return functional.cross_entropy(outputs, label[None])

    copy_ = copy.deepcopy(model).double()
    buffers = {name: b.detach() for name, b in copy_.named_buffers()}
    each = torch.vmap(torch.func.grad(loss), (None, 0, 0))(own, x.double(), y)
    scores = {name: p.square() * each[name].square().mean(0) / 2 for name, p in own.items() if p.dim() > 1}
    total = sum(p.numel() for p in scores.values())
    cut = torch.cat([s.flatten() for s in scores.values()]).sort(descending=True).values[round(0.3 * total) - 1]
    for batch_size in (48, 7):
        pruned = copy.deepcopy(model)
        prune_(pruned, Data(x, labels=y, batch_size=batch_size), Sparsity(0.7, "network"), method="fisher")
        for name, score in scores.items():
            assert torch.equal(pruned.get_parameter(name) != 0, score >= cut)


def test_of_a_model_that_was_trained_to_the_end_a_weights_score_is_what_the_loss_gains_without_it() -> None:
    """Logistic regression, fitted by Newton's method to labels that such a model made."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 2, bias=False)).double(), torch.randn(40_000, 6).double()
    true = 0.2 * torch.randn(2, 6).double()
    y = torch.distributions.Categorical(logits=x @ true.T).sample()
    w = (true[1] - true[0]).clone()
    for _ in range(8):
        p = (x @ w).sigmoid()
        w -= torch.linalg.solve((x * (p * (1 - p))[:, None]).T @ x, x.T @ (p - y))
    with torch.no_grad():
        model[0].weight.copy_(torch.stack([-w / 2, w / 2]))

        def loss(weight: Tensor) -> float:
            return float(functional.cross_entropy(x @ weight.T, y))

        gains = torch.zeros(2, 6)
        for place in ((i, j) for i in range(2) for j in range(6)):
            weight = model[0].weight.clone()
            weight[place] = 0
            gains[place] = loss(weight) - loss(model[0].weight)
    found: dict[str, Tensor] = {}

    class Kept(Fisher):
        def score_network(self, run: Any, target: Any) -> Any:
            scores = super().score_network(run, target)
            found.update({name: matrices[0].T for name, matrices in scores.items()})
            return scores

    prune_(model, Data(x[:4000], labels=y[:4000]), Sparsity(0.5), method=Kept())
    torch.testing.assert_close(found["0"].float(), gains, rtol=0.1, atol=1e-5)


def test_deltas_are_what_the_loss_gains_where_labels_are_the_models_own() -> None:
    """The expectation of the loss over labels that the model draws grows by KL(p ‖ p without the neuron)."""
    torch.manual_seed(0)
    model, x = mlp(6, 10, 3).double(), torch.randn(6000, 6).double()
    with torch.no_grad():
        model[2].weight *= 0.5
        logp = model(x).log_softmax(1)
        y = torch.distributions.Categorical(logits=logp).sample()
        gains = []
        for k in range(10):
            without = copy.deepcopy(model)
            without[2].weight[:, k] = 0
            gains.append(float((logp.exp() * (logp - without(x).log_softmax(1))).sum(1).mean()))
    delta = measured(model, Data(x, labels=y, batch_size=1000))["0"]
    torch.testing.assert_close(delta, torch.tensor(gains, dtype=torch.float64), rtol=0.15, atol=1e-5)


def test_deltas_are_the_same_with_frozen_weights_and_in_whatever_batches() -> None:
    model, x, y = images()
    expected = measured(model, Data(x, labels=y))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for data in (Data(x, labels=y, batch_size=7), [(x[:40], y[:40]), (x[40:], y[40:])]):
        found = measured(model, data)
        for name, delta in expected.items():
            torch.testing.assert_close(found[name], delta, rtol=ROUNDING, atol=0)


def test_the_loss_may_be_ones_own() -> None:
    """Of ½(ŷ − y)² with y = ŷ − 1 the gradient is 1, so that Δ = ½·mean (w_k a_k)²."""
    torch.manual_seed(0)
    model, x = mlp(4, 7, 1), torch.randn(50, 4)
    with torch.no_grad():
        y = model(x)[:, 0].double() - 1
        expected = (model[1](model[0](x)) * model[2].weight[0]).double().square().mean(0) / 2
    data = Data(x, labels=y, loss=lambda outputs, y: (outputs[:, 0] - y).square().mean() / 2)
    torch.testing.assert_close(measured(model, data)["0"], expected, rtol=1e-5, atol=0)


def test_what_was_listened_to_is_freed() -> None:
    model, x, y = images()
    links, _ = find_links(model)
    information, taken = Information(model, links, widths(model, links)), list[weakref.ref[Tensor]]()
    model[3].register_forward_hook(lambda _module, args, _output: taken.append(weakref.ref(args[0])))
    for _ in range(2):
        with information.gathered():
            functional.cross_entropy(model(x), y).backward()
            information.add()
    gc.collect()
    assert [reference() for reference in taken] == [None, None]
    assert information.samples == 2 * len(x)


# Operations


@pytest.mark.parametrize("name", ["images", *JOINT])
def test_costs_are_the_operations_that_really_go_with_a_neuron(name: str) -> None:
    model, x, _ = images() if name == "images" else joint(name, 3)
    links, _ = find_links(model, residual=True)
    sizes = widths(model, links)
    run = SimpleNamespace(model=model, data=[x], forward=None, links=links, widths=lambda: sizes)
    costs = OperationCosts.of(run)  # type: ignore[arg-type]

    def smaller(stays: Mapping[str, Tensor]) -> nn.Module:
        own = copy.deepcopy(model)
        for link, kept in stays.items():
            remove_neurons_(own, links[link], kept.nonzero()[:, 0])
        return own

    torch.manual_seed(1)
    some = {}
    for link, n in sizes.items():
        some[link] = torch.zeros(n, dtype=torch.bool)
        some[link][torch.randperm(n)[: max(2, n - 2)]] = True
    without_one = {name: kept if links[name].pools else torch.zeros_like(kept) for name, kept in [*some.items()][1:2]}
    for stays in ({}, some, some | without_one):
        found, before = costs.of_neurons(stays), flops(smaller(stays), x).dense
        for link, n in sizes.items():
            kept = stays.get(link, torch.ones(n, dtype=torch.bool)).clone()
            if not bool(kept.any()):
                continue
            kept[kept.nonzero()[0]] = False
            after = flops(smaller({**stays, link: kept}), x).dense
            assert found[link] == pytest.approx((before - after) / len(x), rel=1e-9)


@pytest.mark.parametrize("steps", [0, 1])
def test_with_a_large_beta_the_neurons_of_the_costliest_layer_go_first(steps: int) -> None:
    """Of the first convolution: its outputs at 30 positions cost 36·30 and 90·12 multiplications more; of 8, 60 + 3."""
    model, x, y = images()
    for beta, expected in ((0.0, None), (1e6, {"0": 1, "3": 5, "7": 8})):
        pruned = copy.deepcopy(model)
        prune_(pruned, Data(x, labels=y, batch_size=16), Neurons(5 / 19, "network"), method=Fisher(steps, beta=beta))
        left = {"0": len(pruned[0].weight), "3": len(pruned[3].weight), "7": len(pruned[7].weight)}
        assert sum(left.values()) == 14
        assert expected in (None, left)
        if expected is None:
            assert left != {"0": 1, "3": 5, "7": 8}
