"""SNIP, GraSP, and the labels and losses that methods look at."""

import copy
import itertools
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import JOINT, Net
from scored import NETWORKS, kept, network, nonzeros, same
from tolerances import ROUNDING
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, TensorDataset
from typer.testing import CliRunner

from convexprune import Data, Neurons, Options, Sparsity, prune_, verify
from convexprune.cli.app import app
from convexprune.cli.reference import find_model
from convexprune.errors import OtherRun
from convexprune.layers.kinds import NORMS
from convexprune.pruners import available_pruners
from convexprune.pruners.grasp import GraSP
from convexprune.pruners.scoring import KeepMask
from convexprune.pruners.snip import Snip
from convexprune.runs.data import cross_entropy, logits_of
from convexprune.solvers.errors import InvalidInput, InvalidTolerance, NonFinite, ShapeMismatch, SolverRefused

ALL = Snip(per_class=0)


def labelled(name: str, seed: int = 0) -> tuple[nn.Module, Tensor, Tensor]:
    """A network of ``scored``, 96 samples, and a label of each from 0 to 3."""
    model, x = network(name, seed)
    return model, x, torch.randint(0, 4, (96,))


def losses(model: nn.Module, weights: Mapping[str, Tensor], x: Tensor, y: Tensor, loss: Any, batch: bool) -> Tensor:
    """Of the network with other weights in float64, its batch norms by the batch or as they are."""
    model = copy.deepcopy(model).double().eval()
    for norm in (module for module in model.modules() if isinstance(module, NORMS)):
        norm.train(batch)
    parts = functional_call(model, dict(weights), (x.double(),))
    return loss(parts, y)


def sensitivities(
    model: nn.Module, x: Tensor, y: Tensor, loss: Any = functional.cross_entropy, batch: bool = False
) -> dict[str, Tensor]:
    """|∂L/∂c| at c = 1 of a factor c of each weight: equation 5 of the paper, in which no weight is mentioned."""
    own = {name: p.detach().double() for name, p in model.named_parameters()}
    factors = {name: torch.ones_like(p, requires_grad=True) for name, p in own.items() if p.dim() > 1}
    L = losses(model, {name: p * factors.get(name, 1) for name, p in own.items()}, x, y, loss, batch)
    return {n: g.abs() for n, g in zip(factors, torch.autograd.grad(L, list(factors.values())), strict=True)}


def of_largest(scores: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """Masks of the largest scores of all together."""
    flat = torch.cat([each.flatten() for each in scores.values()])
    cut = flat.sort(descending=True).values[count - 1]
    return {name: each >= cut for name, each in scores.items()}


# SNIP


@pytest.mark.parametrize("batch", [False, True], ids=["running", "batch"])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_weights_that_stay_are_those_to_whose_factors_the_loss_is_most_sensitive(name: str, batch: bool) -> None:
    model, x, y = labelled(name)
    scores = sensitivities(model, x, y, batch=batch)
    before, count = kept(model), round(0.3 * kept(model))
    buffers = {key: value.clone() for key, value in model.named_buffers()}
    pruner = Snip(per_class=0, statistics="batch" if batch else "running")
    report = prune_(model, Data(x, labels=y), Sparsity(0.7, "network"), method=pruner)
    assert same(nonzeros(model), of_largest(scores, count))
    assert (report.nonzeros, report.nonzeros_before) == (count, before)
    assert same(dict(model.named_buffers()), buffers)


def test_at_initialisation_statistics_of_the_batch_are_others_than_those_that_run() -> None:
    masks = []
    for statistics in ("running", "batch"):
        model, x, y = labelled("cnn")
        for norm in (model[1], model[5]):
            norm.reset_parameters()
        prune_(model, Data(x, labels=y), Sparsity(0.7, "network"), method=Snip(0, statistics))
        masks.append(nonzeros(model))
    assert not same(*masks)


@pytest.mark.parametrize("batch", [False, True], ids=["running", "batch"])
@pytest.mark.parametrize("name", NETWORKS)
def test_by_layers_and_by_patterns_each_layer_keeps_its_own(name: str, batch: bool) -> None:
    model, x, y = labelled(name)
    pruner, scores = Snip(0, "batch" if batch else "running"), sensitivities(model, x, y, batch=batch)
    by_layers, by_patterns = model, copy.deepcopy(model)
    rows = prune_(by_layers, Data(x, labels=y), Sparsity(0.6), method=pruner).layers
    assert all(row.nonzeros == round(0.4 * row.nonzeros_before) for row in rows)
    for key, score in scores.items():
        mask = by_layers.get_parameter(key) != 0
        assert float(score[mask].min()) > float(score[~mask].max())
    rows = prune_(by_patterns, Data(x, labels=y), Sparsity("2:4"), method=pruner).layers
    assert len(rows) == len(scores)
    for key, score in scores.items():
        weight = by_patterns.get_parameter(key)
        transposed = type(by_patterns.get_submodule(key.rpartition(".")[0])).__name__ == "Conv1D"
        score, mask = (t.T if transposed else t.flatten(1) for t in (score, weight != 0))
        score, mask = score.reshape(-1, 4), mask.reshape(-1, 4)
        assert bool((mask.sum(1) == 2).all())
        assert bool((score.where(mask, torch.inf).amin(1) >= score.where(~mask, 0).amax(1)).all())


@pytest.mark.parametrize("scope", ["layer", "network"])
@pytest.mark.parametrize("schedule", ["exponential", "linear"])
@pytest.mark.parametrize("kind", [Snip, GraSP])
def test_in_rounds_no_weight_comes_back_and_counts_are_exact(kind: Any, schedule: str, scope: str) -> None:
    """Of GraSP most scores may be negative, and that of a weight that went is 0."""
    seen = list[Tensor]()

    class Watched(kind):
        def differentiate_(self, model: nn.Module, run: Any) -> None:
            seen.append(torch.cat([mask.flatten() for mask in nonzeros(model).values()]))
            super().differentiate_(model, run)

    model, x, y = labelled("mlp")
    pruner = Watched(per_class=0, rounds=5, schedule=schedule)
    prune_(model, Data(x, labels=y), Sparsity(0.9, scope), method=pruner)
    sizes = [96, 144, 48] if scope == "layer" else [288]
    finals = [round(0.1 * n) for n in sizes]
    masks = [*seen, torch.cat([mask.flatten() for mask in nonzeros(model).values()])]
    for e, mask in enumerate(masks):
        part = e / 5
        rhos = [n / N for n, N in zip(finals, sizes, strict=True)]
        densities = [rho**part if schedule == "exponential" else 1 - (1 - rho) * part for rho in rhos]
        assert int(mask.sum()) == sum(round(N * rho) for N, rho in zip(sizes, densities, strict=True))
    assert len(masks) == 6
    assert all(bool((before | ~after).all()) for before, after in itertools.pairwise(masks))


def test_zeros_stay_zeros_and_count_among_those_that_go() -> None:
    for kind in (Snip, GraSP):
        model, x, y = labelled("mlp")
        with torch.no_grad():
            model[2].weight[:, ::2] = 0
        options = Options(keep_zeros=True)
        report = prune_(model, Data(x, labels=y), Sparsity(0.6, "network"), method=kind(rounds=3), options=options)
        assert not bool(model[2].weight[:, ::2].any())
        assert report.nonzeros == round(0.4 * 288)


def test_a_refit_lowers_the_error_on_the_same_mask() -> None:
    errors, masks = [], []
    for refit in (False, True):
        model, x, y = labelled("cnn")
        how = {"method": ALL, "options": Options(refit=refit, mode="parallel")}
        report = prune_(model, Data(x, labels=y), Sparsity(0.5, "network"), **how)
        errors.append([row.output_error for row in report.layers])
        masks.append(nonzeros(model))
    assert all(after <= before + ROUNDING for before, after in zip(*errors, strict=True))
    assert sum(errors[1]) < 0.9 * sum(errors[0])
    assert same(*masks)


def test_neurons_go_by_the_sum_of_the_scores_of_the_weights_with_which_they_go_on() -> None:
    model, x, y = labelled("mlp")
    scores, rows = sensitivities(model, x, y), model[0].weight.detach().clone()
    prune_(model, Data(x, labels=y), Neurons(0.5), method=ALL)
    stay = scores["2.weight"].sum(0).argsort(descending=True)[:6].sort().values
    assert torch.equal(model[0].weight, rows[stay])


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("kind", [Snip, GraSP])
def test_the_model_is_as_before_but_for_pruned_weights(kind: Any, guard: Any) -> None:
    model, x, _ = labelled("cnn")
    model[4].train()
    model[0].weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [module.training for module in model.modules()]
    with guard():
        data = Data(x * 1.0, labels=torch.randint(0, 4, (96,)), batch_size=40)
        report = prune_(model, data, Sparsity(0.5, "network"), method=kind(per_class=0, statistics="batch"))
    assert report.nonzeros == round(0.5 * report.nonzeros_before)
    for name, value in model.state_dict().items():
        same = value == before[name]
        assert bool((same | (value == 0) if value.dim() > 1 else same).all()), name
    assert [module.training for module in model.modules()] == flags
    assert all(p.grad is None and not p._backward_hooks for p in model.parameters())
    assert [p.requires_grad for p in model.parameters()] == [p is not model[0].weight for p in model.parameters()]


# GraSP


@contextmanager
def unfused() -> Iterator[None]:
    """Attention by plain products, which can be differentiated twice."""
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def preserved(model: nn.Module, names: list[str], x: Tensor, y: Tensor, temperature: float) -> Callable[..., float]:
    """gᵀg, g the gradient of Σ L by these weights, as a function of weights that differ from the model's."""
    own = {name: p.detach().double() for name, p in model.named_parameters()}

    def loss(outputs: Tensor, y: Tensor) -> Tensor:
        return functional.cross_entropy(outputs / temperature, y, reduction="sum")

    def size(**changed: Tensor) -> float:
        weights = own | {name.replace("_", "."): p for name, p in changed.items()}
        for name in names:
            weights[name] = weights[name].clone().requires_grad_()
        L = losses(model, weights, x, y, loss, False)
        g = torch.autograd.grad(L, [weights[name] for name in names])
        return float(sum((each * each).sum() for each in g))

    return size


def scores_of(pruner: Any, model: nn.Module, data: Data) -> dict[str, Tensor]:
    """Those of the network by layer, [N, M], of a single group each."""
    found: dict[str, Tensor] = {}

    class Kept(type(pruner)):
        def score_network(self, run: Any, target: Any) -> Any:
            scores = super().score_network(run, target)
            found.update({name: matrices[0] for name, matrices in scores.items()})
            return scores

    prune_(copy.deepcopy(model), data, Sparsity(0.5, "network"), method=Kept(**vars(pruner)))
    return found


def smooth() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3), nn.Softplus(), nn.Linear(3, 3)).double()
    return model, torch.randn(20, 3).double(), torch.randint(0, 3, (20,))


@pytest.mark.parametrize("temperature", [0.7, 200.0])
def test_grasp_is_half_of_what_the_flow_of_gradients_loses_as_a_weight_goes(temperature: float) -> None:
    """d/dt gᵀg(w − t·w_i e_i) = −2·w_i(Hg)_i, by central differences: nothing of the Hessian is computed here."""
    model, x, y = smooth()
    scores = scores_of(GraSP(0, temperature), model, Data(x, labels=y, batch_size=7))
    names = [f"{name}.weight" for name in scores]
    size, h = preserved(model, names, x, y, temperature), 1e-4
    for name, S in scores.items():
        W = model.get_submodule(name).weight.detach()
        for place in itertools.product(*map(range, W.shape)):
            step = torch.zeros_like(W)
            step[place] = h * W[place]
            key = f"{name}_weight"
            slope = (size(**{key: W - step}) - size(**{key: W + step})) / (2 * h)
            assert slope == pytest.approx(-2 * float(S.T[place]), rel=1e-5, abs=1e-7 * size())


@pytest.mark.parametrize("name", NETWORKS)
def test_grasp_keeps_the_largest_products_with_the_hessian_signs_included(name: str) -> None:
    """Against the gradient of ½gᵀg by all weights at once, from one batch."""
    model, x, y = labelled(name)
    own = {key: p.detach().double().requires_grad_(p.dim() > 1) for key, p in model.named_parameters()}
    weights = {key: p for key, p in own.items() if p.dim() > 1}
    with unfused():
        L = losses(model, own, x, y, lambda outputs, y: functional.cross_entropy(outputs / 200, y), False)
        g = torch.autograd.grad(L, list(weights.values()), create_graph=True)
        Hg = torch.autograd.grad(torch.stack([each.square().sum() for each in g]).sum() / 2, list(weights.values()))
    products = {key: (p * each).detach() for (key, p), each in zip(weights.items(), Hg, strict=True)}
    count = round(0.3 * kept(model))
    data = Data(x, labels=y, batch_size=50)
    prune_(model, data, Sparsity(0.7, "network"), method=GraSP(per_class=0))
    assert same(nonzeros(model), of_largest(products, count))
    assert not same(nonzeros(model), of_largest({key: each.abs() for key, each in products.items()}, count))


def test_a_weight_goes_that_holds_the_gradient_down_however_large_its_score() -> None:
    """By hand: w = (1, −3), x = (1, 1), L = ½(w·x + 4)²: g = 2x, H = xxᵀ, w∘Hg = (4, −12); without −3 g is 5x."""
    model = nn.Sequential(nn.Linear(2, 1, bias=False))
    data = Data(torch.ones(1, 2), labels=[-4.0], loss=lambda outputs, y: (outputs[:, 0] - y).square().mean() / 2)
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, -3.0]]))
    assert scores_of(GraSP(0, 1.0), model, data)["0"].flatten().tolist() == pytest.approx([4, -12])
    assert scores_of(ALL, model, data)["0"].flatten().tolist() == pytest.approx([2, 6])
    other = copy.deepcopy(model)
    prune_(model, data, Sparsity(0.5), method=GraSP(0, 1.0))
    prune_(other, data, Sparsity(0.5), method=ALL)
    assert (model[0].weight.tolist(), other[0].weight.tolist()) == ([[1, 0]], [[0, -3]])


@pytest.mark.parametrize("kind", [Snip, GraSP])
def test_layers_on_which_no_loss_depends_are_worth_nothing(kind: Any) -> None:
    """A second head, which the loss does not look at."""
    torch.manual_seed(0)
    ways = {"body": nn.Linear(6, 8), "one": nn.Linear(8, 3), "two": nn.Linear(8, 5)}
    model = Net(lambda m, x: (m.one(m.body(x).relu()), m.two(m.body(x).relu())), **ways)
    data = Data(torch.randn(30, 6), labels=torch.randint(0, 3, (30,)))
    found = scores_of(kind(per_class=0), model, data)
    assert not bool(found["two"].any())
    assert bool(found["one"].any())
    assert bool(found["body"].any())


# Labels and losses


def as_loader(x: Tensor, y: Tensor) -> Data:
    return Data(DataLoader(TensorDataset(x, y), batch_size=23))


GIVEN: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "a tensor": lambda x, y: Data(x, labels=y),
    "a list": lambda x, y: Data(x, labels=y.tolist()),
    "an array": lambda x, y: Data(x.numpy(), labels=y.numpy(), batch_size=31),
    "another dtype": lambda x, y: Data(x.double(), labels=y.to(torch.uint8)),
    "unequal batches": lambda x, y: Data([x[:7], x[7:70], x[70:]], labels=y),
    "a loader": as_loader,
    "pairs": lambda x, y: [(x[:50], y[:50]), (x[50:], y[50:])],
    "an iterator": lambda x, y: iter([(x[:50], y[:50]), (x[50:], y[50:])]),
    "mappings": lambda x, y: [{"input": x[:10], "labels": y[:10]}, {"input": x[10:], "labels": y[10:]}],
    "target": lambda x, y: [{"input": x, "target": y}],
    "a forward": lambda x, y: Data([(y, x)], labels=y, forward=lambda model, batch: model(batch[1])),
    "a loss": lambda x, y: Data(x, labels=y, loss=lambda outputs, y: functional.cross_entropy(outputs, y)),
    "logits": lambda x, y: Data(x, labels=y, forward=lambda m, x: {"hidden": -m(x), "logits": m(x)}),
    "the first": lambda x, y: Data(x, labels=y, forward=lambda m, x: (x.argmax(1), m(x), -m(x))),
}


@pytest.mark.parametrize("kind", [Snip, GraSP])
@pytest.mark.parametrize("given", GIVEN)
def test_however_data_and_labels_are_given_the_weights_are_the_same(given: str, kind: Any) -> None:
    masks = []
    for way in ("a tensor", given):
        model, x, y = labelled("mlp")
        prune_(model, GIVEN[way](x, y), Sparsity(0.8, "network"), method=kind(per_class=0))
        masks.append(nonzeros(model))
    assert same(*masks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_with_a_loss_of_ones_own_labels_are_any_numbers(dtype: torch.dtype) -> None:
    model, x, _ = labelled("mlp")
    y = torch.randn(96, 4, dtype=dtype)
    scores, count = sensitivities(model, x, y.double(), functional.mse_loss), round(0.3 * kept(model))
    prune_(model, Data(x, labels=y, loss=nn.MSELoss()), Sparsity(0.7, "network"), method=Snip(per_class=0))
    assert same(nonzeros(model), of_largest(scores, count))


@given(
    labels=st.lists(st.integers(0, 3), min_size=1, max_size=40),
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    per_class=st.integers(1, 5),
)
def test_the_first_samples_of_each_class_are_looked_at_however_batches_are_cut(
    labels: list[int], sizes: list[int], per_class: int
) -> None:
    x, cuts = torch.arange(len(labels))[:, None], itertools.accumulate(itertools.cycle(sizes))
    ends = [0, *itertools.takewhile(lambda end: end < len(labels), cuts), len(labels)]
    batches = [{"number": x[a:b], "labels": torch.tensor(labels[a:b])} for a, b in itertools.pairwise(ends)]
    looked_at = list(Snip(per_class).samples(SimpleNamespace(source=Data(batches))))  # type: ignore[arg-type]
    expected = [n for n, label in enumerate(labels) if labels[:n].count(label) < per_class]
    assert [n for batch, _ in looked_at for n in batch["number"].flatten().tolist()] == expected
    assert [label for _, own in looked_at for label in own.tolist()] == [labels[n] for n in expected]
    assert all(torch.equal(batch["labels"], own) for batch, own in looked_at)


@pytest.mark.parametrize("kind", [Snip, GraSP])
def test_the_first_ten_of_each_class_decide(kind: Any) -> None:
    masks = []
    for alone in (False, True):
        model, x, y = labelled("mlp")
        first = torch.tensor([int((y[:n] == label).sum()) < 10 for n, label in enumerate(y)])
        data, pruner = (Data(x[first], labels=y[first]), kind(per_class=0)) if alone else (Data(x, labels=y), kind())
        prune_(model, data, Sparsity(0.8, "network"), method=pruner)
        masks.append(nonzeros(model))
    assert same(*masks)


def test_logits_and_classes_of_all_shapes() -> None:
    outputs, labels = torch.randn(4, 3, 5, 5), torch.randint(0, 3, (4, 5, 5))
    assert float(cross_entropy(outputs, labels)) == float(functional.cross_entropy(outputs, labels))
    named = SimpleNamespace(logits=outputs)
    assert logits_of(named) is outputs
    assert logits_of([labels, {"a": outputs}]) is outputs
    with pytest.raises(InvalidInput, match="no floating-point tensor"):
        logits_of({"logits": labels})


WRONG: dict[str, tuple[Callable[[Tensor, Tensor], Any], type[Exception], str]] = {
    "no labels": (lambda x, y: x, InvalidInput, r"expected labels, and found none: give Data\(inputs, labels=…\)"),
    "no labels in batches": (lambda x, y: [x[:50], x[50:]], InvalidInput, "expected labels, and found none"),
    "a number in their place": (lambda x, y: [(x, 3)], InvalidInput, "expected labels, and found none"),
    "too few": (lambda x, y: Data(x, labels=y[:90]), ShapeMismatch, "each of the 96 samples, found 90"),
    "too few for the last batch": (
        *(lambda x, y: Data(x, labels=y[:90], batch_size=30), ShapeMismatch),
        "each of the 96 samples, found 90",
    ),
    "too many": (lambda x, y: Data(x, labels=y.repeat(2)), ShapeMismatch, "each of the 96 samples, found 192"),
    "too few in a batch": (lambda x, y: [(x, y[:90])], ShapeMismatch, "each of the 96 samples, found 90"),
    "too many for all batches": (
        *(lambda x, y: Data([x[:50], x[50:]], labels=y.repeat(2)), ShapeMismatch),
        "each of the 96 samples, found 192",
    ),
    "one for all": (lambda x, y: Data(x, labels=3), ShapeMismatch, "each of the 96 samples, found a number"),
    "words": (lambda x, y: Data(x, labels=["cat"] * 96), InvalidInput, "expected whole numbers.*found list"),
    "fractions": (
        *(lambda x, y: Data(x, labels=y.float()), InvalidInput),
        r"whole number from 0 to 3 a sample.*\[96, 4\]; found torch.float32 \[96\], from 0.0 to 3.0. For another loss",
    ),
    "a class too many": (lambda x, y: Data(x, labels=y + 1), InvalidInput, "from 0 to 3 a sample.*from 1 to 4"),
    "a class below 0": (lambda x, y: Data(x, labels=y - 1), InvalidInput, "from 0 to 3 a sample.*from -1 to 2"),
    "one-hot": (lambda x, y: Data(x, labels=functional.one_hot(y)), InvalidInput, r"found torch.int64 \[96, 4\]"),
    "not a number": (lambda x, y: Data(x, labels=y / 0), NonFinite, "labels: they hold NaN or infinity"),
    "not a number in the last batch": (
        *(
            lambda x, y: Data(x, labels=torch.cat([y[:95] / 1, y[95:] / 0]), batch_size=30),
            NonFinite,
        ),
        "labels: they hold NaN or infinity",
    ),
    "no loss": (lambda x, y: Data(x, labels=y, loss="mse"), InvalidInput, "loss: expected a function, found 'mse'"),
    "a loss of each": (
        *(lambda x, y: Data(x, labels=y, loss=nn.CrossEntropyLoss(reduction="none")), InvalidInput),
        r"loss: expected a tensor with one number, the mean over the samples, found \[96\]",
    ),
    "a loss that is no tensor": (lambda x, y: Data(x, labels=y, loss=lambda o, y: 1.0), InvalidInput, "found float"),
    "a loss without gradients": (
        *(lambda x, y: Data(x, labels=y, loss=lambda o, y: o.detach().sum()), InvalidInput),
        "loss: expected a function of the model's outputs.*no gradient",
    ),
    "a loss that is not a number": (
        *(lambda x, y: Data(x, labels=y, loss=lambda o, y: o.sum() * torch.nan), NonFinite),
        "R, whose gradients score weights, is nan",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_with_labels_and_losses_is_said_and_nothing_changes(wrong: str) -> None:
    make, error, says = WRONG[wrong]
    model, x, y = labelled("mlp")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=says):
        prune_(model, make(x, y), Sparsity(0.5), method=ALL)
    assert same(model.state_dict(), before)


def test_classes_are_wanted_of_a_few_of_each() -> None:
    model, x, _ = labelled("mlp")
    data = Data(x, labels=torch.randn(96, 4), loss=nn.MSELoss())
    with pytest.raises(InvalidInput, match=r"per_class: expected a class.*float32 \[96, 4\]; give per_class=0"):
        prune_(model, data, Sparsity(0.5), method="snip")


def test_labels_are_for_methods_that_look_at_a_loss() -> None:
    model, x, y = labelled("mlp")
    with pytest.raises(InvalidInput, match=r"labels: method 'wanda' looks at no loss.*leave them out"):
        prune_(model, Data(x, labels=y), Sparsity(0.5), method="wanda")
    with pytest.raises(InvalidInput, match="data: method 'snip' looks at a loss: give calibration data with labels"):
        prune_(model, None, Sparsity(0.5), method="snip")


@pytest.mark.parametrize(
    ("kind", "options", "error"),
    [
        (Snip, {"per_class": -1}, InvalidTolerance),
        (Snip, {"statistics": "own"}, InvalidInput),
        (Snip, {"rounds": 0}, InvalidTolerance),
        (Snip, {"schedule": "cosine"}, InvalidInput),
        (GraSP, {"temperature": 0.0}, InvalidTolerance),
        (GraSP, {"temperature": torch.inf}, InvalidTolerance),
    ],
)
def test_options_out_of_range_are_refused(kind: Any, options: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=next(iter(options))):
        kind(**options)


def test_they_are_listed_with_their_options() -> None:
    found = available_pruners()
    own = {"per_class": 10, "statistics": "running", "rounds": 1, "schedule": "exponential"}
    assert found["snip"].options == own
    assert found["grasp"].options == own | {"temperature": 200.0}
    with pytest.raises(SolverRefused, match="cannot reach a target"):
        prune_(*labelled("mlp")[:2], eps=0.1, method="snip")


# Runs


TARGETS = {"network": Sparsity(0.6, "network"), "2:4": Sparsity("2:4"), "neurons": Neurons(0.5)}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", [Snip, GraSP])
def test_runs_go_on_are_verified_and_workers_find_the_same(
    kind: Any, target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = []
    for folder, jobs in (("one", 1), ("two", 2), ("one", 1)):
        if len(states) == 2:
            monkeypatch.setattr(KeepMask, "solve", None)  # nothing is solved again
        model, x, y = labelled("mlp")
        prune_(model, Data(x, labels=y), TARGETS[target], method=kind(), run=tmp_path / folder, jobs=jobs)
        states.append(model.state_dict())
    assert all(same(state, states[0]) for state in states[1:])
    model, x, y = labelled("mlp")
    found = verify(model, Data(x, labels=y), tmp_path / "one")
    assert found.ok, str(found)
    assert found.complete
    with pytest.raises(OtherRun, match="other calibration data"):
        verify(model, Data(x, labels=y.flip(0)), tmp_path / "one")
    with pytest.raises(InvalidInput, match="expected labels"):
        verify(model, x, tmp_path / "one")


def test_a_run_is_of_its_labels_and_of_what_a_mask_hides(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x, y, seen = torch.randn(20, 5, 8), torch.randint(0, 4, (20, 5)), torch.ones(20, 5, dtype=torch.int64)
    hidden = seen.clone()
    hidden[:, 3:] = 0

    def run(labels: Tensor, mask: Tensor, folder: str) -> Any:
        data = Data(x, labels=labels, mask=lambda _: mask, loss=lambda o, y: functional.cross_entropy(o.mT, y))
        return prune_(network("mlp")[0], data, Sparsity(0.5), method=ALL, run=tmp_path / folder)

    run(y, seen, "run")
    run(y, seen, "run")
    for labels, mask in ((y, hidden), (y.flip(0), seen)):
        with pytest.raises(OtherRun, match="other calibration data"):
            run(labels, mask, "run")
        run(labels, mask, "other")
        shutil.rmtree(tmp_path / "other")


def test_the_loss_of_a_run_is_given_again_to_verify_it(tmp_path: Path) -> None:
    model, x, y = labelled("mlp")
    trained, loss = copy.deepcopy(model), nn.MultiMarginLoss()
    prune_(model, Data(x, labels=y, loss=loss), Sparsity(0.6), method=ALL, run=tmp_path)
    assert verify(trained, Data(x, labels=y, loss=loss), tmp_path).ok
    with pytest.raises(
        InvalidInput, match=r"loss: the run was given .*MultiMarginLoss.*give the same, as Data\(…, loss=…\)"
    ):
        verify(trained, Data(x, labels=y), tmp_path)
    with pytest.raises(OtherRun, match=r"another recipe \(loss\)"):
        prune_(copy.deepcopy(trained), Data(x, labels=y), Sparsity(0.6), method=ALL, run=tmp_path)


def test_the_command_line_reads_labels_and_verifies_with_them(tmp_path: Path) -> None:
    reference, generator = find_model("lenet-300-100"), torch.Generator().manual_seed(0)
    torch.save(reference.build().state_dict(), tmp_path / "fresh.pt")
    images = torch.rand((60, 28, 28), generator=generator).numpy()
    np.savez(tmp_path / "data.npz", x=images, y=np.arange(60) % 10)
    given = ["lenet-300-100", "--weights", str(tmp_path / "fresh.pt"), "--calibration", str(tmp_path / "data.npz")]
    labels, out = ["--key", "x", "--labels-key", "y"], str(tmp_path / "out")
    own = ["--method", "snip", "--method-option", "per_class=2", "--target", "sparsity 0.9 scope=network"]
    for said in ("masked", "Nothing to do"):
        result = CliRunner().invoke(app, ["prune", *given, *labels, *own, "--out", out])
        assert result.exit_code == 0, result.output
        assert said in result.output
    assert CliRunner().invoke(app, ["verify", out, *given, *labels]).exit_code == 0
    result = CliRunner().invoke(app, ["verify", out, *given, "--key", "x"])
    assert result.exit_code == 1
    assert "labels" in result.output
    result = CliRunner().invoke(app, ["prune", *given, "--key", "x", *own, "--out", str(tmp_path / "other")])
    assert result.exit_code == 1
    assert "--labels-key" in result.output
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["nonzeros"] == round(0.1 * report["nonzeros_before"])
    result = CliRunner().invoke(app, ["prune", *given, *labels, *own, "--dry-run"])
    assert result.exit_code == 0, result.output


def test_residual_networks_and_their_neurons() -> None:
    torch.manual_seed(0)
    model, x = JOINT["resnet"][0]().eval(), torch.randn(20, *JOINT["resnet"][1])
    data = Data(x, labels=torch.randint(0, 3, (20,)))
    for kind in (Snip, GraSP):
        for target in (Sparsity(0.8, "network"), Neurons(0.25), Neurons(0.25, "network")):
            pruned = copy.deepcopy(model)
            report = prune_(pruned, data, target, method=kind())
            assert report.nonzeros < report.nonzeros_before
            assert pruned(x).shape == (20, 3)
