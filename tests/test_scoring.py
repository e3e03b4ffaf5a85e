"""Pruners that score weights: what each keeps, SynFlow's laws, and what their base does for all of them."""

import copy
import inspect
import itertools
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import JOINT
from safetensors.torch import load_file
from scored import NETWORKS, cnn, kept, mlp, network, nonzeros
from tolerances import EXACT, ROUNDING
from torch import Tensor, nn
from typer.testing import CliRunner

from convexprune import Neurons, Options, Sparsity, prune_, verify
from convexprune.cli.app import app
from convexprune.cli.reference import find_model
from convexprune.layers import gradient_matrices, weight_matrices
from convexprune.pruners import PRUNERS, Scoring, available_pruners, register_pruner
from convexprune.pruners.gradients import GradientScoring
from convexprune.pruners.scoring import KeepMask, largest
from convexprune.pruners.sparsegpt import SparseGPT
from convexprune.pruners.synflow import SynFlow
from convexprune.runs.problem import Problem
from convexprune.solvers.errors import InvalidInput, InvalidTolerance, NonFinite, ShapeMismatch, SolverRefused

METHODS = ("magnitude", "random", "sparsegpt", "synflow", "wanda")


# SynFlow's laws


def flows(model: nn.Module, *shape: int) -> tuple[float, list[Tensor]]:
    """R, and w·∂R/∂w of each layer [N + 1, M], biases or zeros in the last row, groups side by side."""
    model, pruner = copy.deepcopy(model).double(), SynFlow(shape=shape)
    with torch.no_grad():
        pruner.prepare_(model)
    R = pruner.objective(model, SimpleNamespace(data=None, forward=None))  # type: ignore[arg-type]
    R.backward()  # type: ignore[no-untyped-call]
    found = []
    for layer in (module for module in model if hasattr(module, "weight") and not hasattr(module, "running_mean")):
        groups = [W * G for W, G in zip(weight_matrices(layer), gradient_matrices(layer), strict=True)]
        found.append(
            torch.cat([S if layer.bias is not None else torch.cat([S, S.new_zeros(1, S.shape[1])]) for S in groups], 1)
        )
    return float(R.detach()), found


def plain(bias: bool) -> nn.Sequential:
    """Convolutions, pooling, linear layers, and nothing that has a shift."""
    torch.manual_seed(3)
    convolutions = (
        nn.Conv2d(3, 6, 3, bias=bias),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 5, 2, bias=bias),
        nn.LeakyReLU(),
    )
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(20, 7, bias), nn.ReLU(), nn.Linear(7, 4, bias))


@pytest.mark.parametrize("model", [plain(False), mlp(False), cnn(False)], ids=["plain", "mlp", "batch norms"])
def test_without_biases_the_scores_of_each_layer_sum_to_the_outputs(model: nn.Module) -> None:
    R, scores = flows(model, *{4: (4, 8, 8), 3: (3, 8, 8), 8: (8,)}[model[0].weight.shape[1]])
    assert [float(S.sum()) for S in scores] == pytest.approx([R] * len(scores), rel=1e-10)
    assert all(bool((S >= 0).all()) for S in scores)


def test_with_biases_the_outputs_are_a_layers_scores_and_those_of_biases_from_there_on() -> None:
    """R = S_l + Σ_{l' ≥ l} B_l'; and what goes into each hidden unit, its own bias with it, comes out again."""
    R, scores = flows(plain(True), 3, 8, 8)
    shifts = [float(S[-1].sum()) for S in scores]
    sums = [float(S[:-1].sum()) + sum(shifts[number:]) for number, S in enumerate(scores)]
    assert sums == pytest.approx([R] * len(scores), rel=1e-10)
    assert max(shifts) > 1e-4 * R
    for before, after in itertools.pairwise(scores):
        out = after[:-1].reshape(before.shape[1], -1).sum(1)
        torch.testing.assert_close(before.sum(0), out, rtol=1e-10, atol=0)


class Watched(SynFlow):
    """Remembers which weights the copy has in each round."""

    seen: ClassVar[list[Tensor]] = []

    def objective(self, model: nn.Module, run: Any) -> Tensor:
        self.seen.append(torch.cat([mask.flatten() for mask in nonzeros(model).values()]))
        return super().objective(model, run)


@pytest.mark.parametrize("schedule", ["exponential", "linear"])
def test_masks_only_shrink_and_follow_the_schedule(schedule: str) -> None:
    model, _ = network("mlp")
    Watched.seen, total = [], sum(p.numel() for p in model.parameters() if p.dim() > 1)
    prune_(model, None, Sparsity(0.9, "network"), method=Watched(rounds=10, schedule=schedule, shape=(8,)))
    final, masks = kept(model), Watched.seen
    assert final == round(0.1 * total)
    rho = final / total
    densities = [rho ** (e / 10) if schedule == "exponential" else 1 - (1 - rho) * e / 10 for e in range(10)]
    assert [int(mask.sum()) for mask in masks] == [round(total * density) for density in densities]
    assert all(bool((before | ~after).all()) for before, after in itertools.pairwise(masks))
    assert bool((masks[-1] | ~torch.cat([m.flatten() for m in nonzeros(model).values()])).all())


@pytest.mark.parametrize("scope", ["layer", "network"])
@pytest.mark.parametrize("sparsity", [0.3, 0.9, 0.99, 50])
def test_counts_are_exact_where_all_scores_tie(scope: str, sparsity: float) -> None:
    """A threshold would drop all that tie with it."""
    model = mlp(False)
    for parameter in model.parameters():
        nn.init.constant_(parameter, 0.5)
    sizes = [p.numel() for p in model.parameters()]
    prune_(model, None, Sparsity(sparsity, scope), method=SynFlow(rounds=7, shape=(8,)))
    counts = [int(mask.sum()) for mask in nonzeros(model).values()]
    wanted = [min(sparsity, n) if isinstance(sparsity, int) else max(1, round((1 - sparsity) * n)) for n in sizes]
    if scope == "layer":
        assert counts == wanted
    else:
        assert sum(counts) == (sparsity if isinstance(sparsity, int) else round((1 - sparsity) * sum(sizes)))


@pytest.mark.parametrize("name", ["mlp", "cnn", "conv1d"])
def test_masks_are_blind_to_signs_and_to_the_units_of_neurons(name: str) -> None:
    """Powers of 2, so that nothing is rounded; behind a neuron without a norm its consumers take the unit back."""
    model, _ = network(name)
    pruner = SynFlow(rounds=5, shape=NETWORKS[name][1])
    layers = [module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d)]
    changed = copy.deepcopy(model)
    others = [module for module in changed.modules() if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d)]
    with torch.no_grad():
        for layer in others:
            layer.weight *= torch.randint(0, 2, layer.weight.shape) * 2 - 1
        if name != "cnn":
            for first, second in itertools.pairwise(others):
                units = 2.0 ** torch.randint(-3, 4, (len(first.weight),))
                first.weight.copy_(
                    (first.weight.mT * units).mT if first.weight.dim() == 2 else first.weight * units[:, None, None]
                )
                if first.bias is not None:
                    first.bias *= units
                each = second.weight.flatten(1).shape[1] // len(units)
                second.weight /= units.repeat_interleave(each).view(1, *second.weight.shape[1:])
    for each in (model, changed):
        prune_(each, None, Sparsity(0.8, "network"), method=pruner)
    for one, other in zip(layers, others, strict=True):
        assert torch.equal(one.weight != 0, other.weight != 0)


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_model_is_as_before_but_for_pruned_weights(guard: Any) -> None:
    model, _ = network("cnn")
    model[4].train()
    model[0].weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    parameters, flags = list(model.parameters()), [module.training for module in model.modules()]
    with guard():
        prune_(model, None, Sparsity(0.5, "network"), method=SynFlow(rounds=5, shape=(4, 8, 8)))
    for name, value in model.state_dict().items():
        same = value == before[name]
        if name.split(".")[0] in ("0", "4", "8") and name.endswith("weight"):
            same |= value == 0
        assert value.dtype == before[name].dtype
        assert bool(same.all()), name
    assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True))
    assert [module.training for module in model.modules()] == flags
    assert all(p.grad is None and not p._backward_hooks for p in model.parameters())
    assert [p.requires_grad for p in model.parameters()] == [p is not model[0].weight for p in model.parameters()]
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())


def test_one_round_empties_a_layer_where_a_hundred_do_not() -> None:
    """Weights of a wide layer have small scores, for all layers sum to the same; in rounds they grow as others go."""
    torch.manual_seed(0)
    widths = (16, 256, 256, 16, 4)
    layers = [nn.Sequential(nn.Linear(a, b, False), nn.ReLU()) for a, b in itertools.pairwise(widths)]
    counts = {}
    for rounds in (1, 100):
        model = copy.deepcopy(nn.Sequential(*layers))
        report = prune_(model, None, Sparsity(30, "network"), method=SynFlow(rounds=rounds, shape=(16,)))
        counts[rounds] = [row.nonzeros for row in report.layers]
    assert min(counts[1]) == 0
    assert min(counts[100]) > 0
    assert sum(counts[1]) == sum(counts[100]) == 30


def test_data_give_the_shape_alone() -> None:
    """Whatever they hold, and also where batches have labels or another dtype, so that the model is fitted to them."""
    masks = []
    made = torch.rand(8, 4, 8, 8)
    for data in (None, made, -7 * made, made.double(), [(made, torch.zeros(8))]):
        model, _ = network("cnn")
        pruner = SynFlow(rounds=3, shape=(4, 8, 8) if data is None else ())
        prune_(model, data, Sparsity(0.7, "network"), method=pruner)
        masks.append(nonzeros(model))
    for mask in masks[1:]:
        assert all(torch.equal(mask[name], masks[0][name]) for name in mask)


def test_identity_leaves_batch_norms_out() -> None:
    model, _ = network("cnn")
    bare = copy.deepcopy(model)
    bare[1] = bare[5] = nn.Identity()
    options = Options(norms="leave")
    pruner = SynFlow(rounds=5, norms_as="identity", shape=(4, 8, 8))
    for each in (model, bare):
        prune_(each, None, Sparsity(0.8, "network"), method=pruner, options=options)
    for place in (0, 4, 8):
        assert torch.equal(model[place].weight != 0, bare[place].weight != 0)


class Causal(nn.Module):
    """A buffer of -inf hides positions."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 9)
        self.register_buffer("hidden", torch.full((5, 5), -torch.inf).triu(1))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        return self.head(self.mix((x @ x.mT + self.hidden).softmax(-1) @ x).relu())


def test_tokens_and_hidden_positions_are_left() -> None:
    torch.manual_seed(0)
    model = Causal()
    report = prune_(model, torch.randint(0, 9, (16, 5)), Sparsity(0.5, "network"), method=SynFlow(rounds=5))
    assert sum(row.nonzeros for row in report.layers) == (64 + 72) // 2
    assert bool(model.hidden.isneginf().any())


def test_neurons_go_by_what_flows_through_them() -> None:
    model, _ = network("mlp")
    _, scores = flows(model, 8)
    worth = scores[1][:-1].sum(1), scores[2][:-1].sum(1)
    rows = [model[0].weight.detach().clone(), model[2].weight.detach().clone()]
    prune_(model, None, Neurons(0.5), method=SynFlow(shape=(8,)))
    stay = [w.argsort(descending=True)[:6].sort().values for w in worth]
    assert torch.equal(model[0].weight, rows[0][stay[0]])
    assert torch.equal(model[2].weight, rows[1][stay[1]][:, stay[0]])


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"rounds": 0}, InvalidTolerance),
        ({"schedule": "cosine"}, InvalidInput),
        ({"norms_as": "leave"}, InvalidInput),
        ({"shape": 8}, InvalidInput),
        ({"shape": (3, "8")}, InvalidInput),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=next(iter(options))):
        SynFlow(**options)


def test_refusals() -> None:
    model, x = network("mlp")
    with pytest.raises(InvalidInput, match=r"SynFlow\(shape="):
        prune_(model, None, Sparsity(0.5), method="synflow")
    with pytest.raises(SolverRefused, match="cannot reach a target"):
        prune_(model, x, eps=0.1, method="synflow")
    for method in ("wanda", "sparsegpt"):
        with pytest.raises(InvalidInput, match="give calibration data"):
            prune_(model, None, Sparsity(0.5), method=method)
    with pytest.raises(InvalidInput, match=r"refit.*give calibration data"):
        prune_(model, None, Sparsity(0.5), method="magnitude", options=Options(refit=True))
    deep = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    for layer in deep:
        nn.init.constant_(layer.weight, 1e38)
    huge = nn.Sequential(*(copy.deepcopy(layer) for layer in deep), *deep, *(copy.deepcopy(layer) for layer in deep))
    with pytest.raises(NonFinite, match="SynFlow: R"):
        prune_(huge, None, Sparsity(0.5), method=SynFlow(shape=(8,)))


# The other methods


def test_magnitude_ranks_neurons_alike_when_a_factor_moves_on_to_the_next_layer() -> None:
    """By ‖(w_i, b_i)‖·‖outgoing_i‖, a norm on the way included: all of a model's choices, whatever is moved."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4)).eval()
    found = []
    for factor in (torch.ones(8), torch.logspace(-2, 2, 8)):
        other = copy.deepcopy(model)
        with torch.no_grad():
            other[1].weight.mul_(factor)
            other[1].bias.mul_(factor)
            other[4].weight.div_(factor.repeat_interleave(36))
        prune_(other, None, Neurons(0.5), method="magnitude", options=Options(remove=False))
        found.append(other[4].weight != 0)
    lengths = model[0].weight.square().sum((1, 2, 3)) + model[0].bias.square()
    worth = lengths * model[4].weight.square().reshape(4, 8, 36).sum((0, 2))
    assert torch.equal(found[0], found[1])
    assert set(worth.argsort()[4:].tolist()) == set(found[0].reshape(4, 8, 36).any(2).all(0).nonzero()[:, 0].tolist())


@given(seed=st.integers(0, 1000), sparsity=st.sampled_from([0.1, 0.5, 0.9, 17]))
def test_magnitude_keeps_the_largest_weights_of_layers_and_of_the_network(seed: int, sparsity: float) -> None:
    for scope in ("layer", "network"):
        model, _ = network("mlp", seed)
        before = [p.detach().abs().T.flatten() for p in model.parameters() if p.dim() > 1]
        prune_(model, None, Sparsity(sparsity, scope), method="magnitude")
        after = [p.detach().abs().T.flatten() for p in model.parameters() if p.dim() > 1]
        pools = [before, after] if scope == "layer" else [[torch.cat(before)], [torch.cat(after)]]
        for one, other in zip(*pools, strict=True):
            count = sparsity if isinstance(sparsity, int) else round((1 - sparsity) * len(one))
            assert torch.equal(other.sort(descending=True).values[:count], one.sort(descending=True).values[:count])
            assert int(other.count_nonzero()) == count


def test_random_follows_the_seed_alone() -> None:
    def masks(seed: int, sparsity: Sparsity) -> list[Tensor]:
        model, _ = network("cnn")
        prune_(model, None, sparsity, method="random", options=Options(seed=seed))
        return list(nonzeros(model).values())

    for target in (Sparsity(0.5), Sparsity(0.5, "network")):
        one, again, other = masks(1, target), masks(1, target), masks(2, target)
        assert all(map(torch.equal, one, again))
        assert not any(map(torch.equal, one, other))
        assert all(0.3 < float(mask.double().mean()) < 0.7 for mask in one)
    first, second = masks(1, Sparsity(0.5))[1].chunk(2)
    assert not torch.equal(first, second), "groups of a layer are drawn each for itself"


def test_random_neurons_are_as_many_of_wide_layers_as_of_narrow_ones() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 2)).eval()
    prune_(model, None, Neurons(0.5, "network"), method="random")  # the first take 200 weights each, the others 2
    assert all(60 < width < 140 for width in (model[0].out_features, model[2].out_features))


@pytest.mark.parametrize("sparsity", [0.5, 0.7])
def test_wanda_compares_the_weights_of_each_output(sparsity: float) -> None:
    """Section 3 of the paper: per output the largest |w_ij|·‖X_j‖."""
    model, x = network("mlp")
    sizes, W = x.double().norm(dim=0), model[0].weight.detach().clone()
    prune_(model, x, Sparsity(sparsity), method="wanda", options=Options(mode="parallel"))
    scores, count = W.double().abs() * sizes, round((1 - sparsity) * 96)
    each, more = divmod(count, 12)
    found = (model[0].weight != 0).sum(1)
    assert int(found.sum()) == count
    assert sorted(found.tolist()) == [each] * (12 - more) + [each + 1] * more
    for row, mask in zip(scores, model[0].weight != 0, strict=True):
        assert float(row[mask].min()) >= float(row[~mask].max())


def test_wanda_takes_two_of_four() -> None:
    model, x = network("mlp")
    scores = (model[0].weight.detach().double().abs() * x.double().norm(dim=0)).reshape(12, 2, 4)
    prune_(model, x, Sparsity("2:4"), method="wanda", options=Options(mode="parallel"))
    mask = (model[0].weight != 0).reshape(12, 2, 4)
    assert bool((mask.sum(2) == 2).all())
    assert float(scores.masked_fill(mask, 0).sum()) == pytest.approx(
        float(scores.sort(2).values[..., :2].sum()), rel=EXACT
    )


def published(
    W: Tensor, X: Tensor, sparsity: float, block: int, damping: float, pattern: tuple[int, int] | None
) -> Tensor:
    """Algorithm 1 of the paper for W [outputs, inputs] and X [samples, inputs], with B = B_s, or B_s = m of n:m."""
    W, H = W.clone(), X.T @ X
    dead = H.diagonal() == 0
    H[dead, dead], W[:, dead] = 1, 0
    H += damping * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype)
    C, M = torch.linalg.cholesky(torch.linalg.inv(H), upper=True), torch.ones_like(W, dtype=torch.bool)
    for i in range(0, W.shape[1], block):
        E = torch.zeros(len(W), block, dtype=W.dtype)
        for j in range(i, min(i + block, W.shape[1])):
            if pattern is None and j == i:
                scores = W[:, i : i + block].square() / C.diagonal()[i : i + block].square()
                lost = scores.T.flatten().argsort()[: round(sparsity * scores.numel())]
                part = M[:, i : i + block].T.flatten()
                part[lost] = False
                M[:, i : i + block] = part.view(scores.T.shape).T
            if pattern is not None and (j - i) % pattern[1] == 0:
                n, m = pattern
                scores = W[:, j : j + m].square() / C.diagonal()[j : j + m].square()
                M[:, j : j + m] = scores.argsort(1, descending=True).argsort(1) < n
            E[:, j - i] = torch.where(M[:, j], 0.0, W[:, j]) / C[j, j]
            W[:, j : i + block] -= E[:, j - i, None] * C[j, j : i + block]
        W[:, i + block :] -= E @ C[i : i + block, i + block :]
    return W * M


@pytest.mark.parametrize("damping", [0.01, 0.3])
@pytest.mark.parametrize(("block", "pattern"), [(4, None), (8, None), (0, None), (4, (2, 4)), (8, (2, 4)), (8, (1, 2))])
@pytest.mark.parametrize("seed", range(3))
def test_sparsegpt_is_its_first_algorithm(
    seed: int, block: int, pattern: tuple[int, int] | None, damping: float
) -> None:
    torch.manual_seed(seed)
    layer, X = nn.Linear(16, 6, bias=False).double(), torch.randn(50, 16).double() @ torch.randn(16, 16).double()
    X[:, 3] = 0
    expected = published(layer.weight.detach(), X, 0.5, block or 16, damping, pattern)
    target = Sparsity(0.5 if pattern is None else f"{pattern[0]}:{pattern[1]}")
    prune_(nn.Sequential(layer), X, target, method=SparseGPT(block, damping), options=Options(fit="ball"))
    assert torch.equal(layer.weight != 0, expected != 0)
    torch.testing.assert_close(layer.weight.detach(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("sparsity", [0.3, 0.5])
@pytest.mark.parametrize("seed", range(8))
def test_sparsegpt_in_one_block_beats_magnitude_with_as_many(seed: int, sparsity: float) -> None:
    """Of inputs that hardly correlate; of others nearly always, for a sweep that does not look back proves nothing."""
    errors = []
    for method in (SparseGPT(block=0), "magnitude"):
        torch.manual_seed(seed)
        model, X = (
            nn.Sequential(nn.Linear(24, 8)).double(),
            torch.randn(200, 24) @ (torch.eye(24) + 0.1 * torch.randn(24, 24)),
        )
        report = prune_(model, X.double(), Sparsity(sparsity), method=method, options=Options(fit="ball"))
        assert report.layers[0].nonzeros == round((1 - sparsity) * 192)
        errors.append(report.layers[0].output_error)
    assert errors[0] < errors[1]


# What the base does for all of them


def method_of(name: str, shape: tuple[int, ...] = ()) -> Any:
    return SynFlow(rounds=4, shape=shape) if name == "synflow" else name


TARGETS = {"layer": Sparsity(0.6), "network": Sparsity(0.6, "network"), "2:4": Sparsity("2:4")}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("method", METHODS)
def test_each_method_on_each_network_keeps_exact_counts_and_is_verified(
    method: str, name: str, target: str, tmp_path: Path
) -> None:
    model, x = network(name)
    trained = copy.deepcopy(model)
    report = prune_(model, x, TARGETS[target], method=method_of(method), run=tmp_path)
    rows = {row.name: row for row in report.layers}
    assert str(next(iter(rows.values())).status) == "masked"
    if target == "2:4":
        for row in rows.values():
            assert row.nonzeros == row.nonzeros_before // 2
    elif target == "layer":
        for row in rows.values():
            assert row.nonzeros == round(0.4 * row.nonzeros_before)
    else:
        assert sum(row.nonzeros for row in rows.values()) == round(
            0.4 * sum(row.nonzeros_before for row in rows.values())
        )
    assert kept(model) == kept(trained) - sum(row.nonzeros_before - row.nonzeros for row in rows.values())
    found = verify(trained, x, tmp_path)
    assert found.ok, str(found)
    assert found.complete


@pytest.mark.parametrize(("name", "refit"), [("mlp", False), ("mlp", True), ("cnn", False), ("attention", False)])
@pytest.mark.parametrize("method", METHODS)
def test_runs_go_on_and_workers_find_the_same(
    method: str, name: str, refit: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results, options = [], Options(mode="parallel", refit=refit)
    for folder, jobs in (("one", 1), ("two", 2), ("one", 1)):
        if len(results) == 2:
            monkeypatch.setattr(KeepMask, "solve", None)  # nothing is solved again
        model, x = network(name)
        jobs = jobs if name == "mlp" else 1
        report = prune_(
            *(model, x, Sparsity(0.7, "network")),
            method=method_of(method),
            options=options,
            run=tmp_path / folder,
            jobs=jobs,
        )
        results.append((model.state_dict(), report.output_error))
    for state, error in results[1:]:
        assert all(torch.equal(value, results[0][0][key]) for key, value in state.items())
        assert error == pytest.approx(results[0][1], rel=ROUNDING)
    assert verify(network(name)[0], x, tmp_path / "one").ok


@pytest.mark.parametrize("method", METHODS)
def test_zeros_stay_zeros_and_a_refit_lowers_the_error(method: str) -> None:
    errors = []
    for refit in (False, True):
        model, x = network("mlp")
        with torch.no_grad():
            model[2].weight[:, ::2] = 0
        report = prune_(
            *(model, x, Sparsity(0.6)),
            method=method_of(method),
            options=Options(keep_zeros=True, refit=refit, mode="parallel"),
        )
        row = next(row for row in report.layers if row.name == "2")
        assert not bool(model[2].weight[:, ::2].any())
        assert row.returned == 0
        assert row.nonzeros <= round(0.4 * 144)
        if method != "sparsegpt" and not refit:
            assert row.nonzeros == round(0.4 * 144)
        errors.append(row.output_error)
    assert errors[1] <= errors[0] + ROUNDING


@pytest.mark.parametrize("refit", [False, True])
@pytest.mark.parametrize("scope", ["layer", "network"])
@pytest.mark.parametrize("method", METHODS)
def test_neurons_go_by_every_method(method: str, scope: str, refit: bool) -> None:
    torch.manual_seed(0)
    model, x = JOINT["resnet"][0]().eval(), torch.randn(96, *JOINT["resnet"][1])
    before = sum(p.numel() for p in model.parameters())
    report = prune_(model, x, Neurons(0.25, scope), method=method_of(method), options=Options(refit=refit))
    assert model(x).shape == (96, 3)
    assert sum(p.numel() for p in model.parameters()) < before
    assert 0 < report.output_error < 2


def test_weights_that_stay_zero_add_nothing_to_the_worth_of_a_neuron() -> None:
    model, x = network("mlp")
    with torch.no_grad():
        model[2].weight[:, 3], model[2].weight[0] = 0, 0
    again = copy.deepcopy(model)
    for each, keep_zeros in ((model, False), (again, True)):
        prune_(each, x, Neurons(0.3), method="magnitude", options=Options(keep_zeros=keep_zeros))
    assert torch.equal(model[2].weight, again[2].weight)


def test_tables_mix_parts_and_patterns() -> None:
    model, x = network("mlp")
    table = {"0": "2:4", "2": 0.75, "4": 0.75}
    for method in METHODS:
        pruned = copy.deepcopy(model)
        report = prune_(
            pruned, x, Sparsity(table, "network"), method=method_of(method), options=Options(mode="parallel")
        )
        rows = {row.name: row.nonzeros for row in report.layers}
        assert rows["0"] == 48
        assert rows["2"] + rows["4"] == (144 + 48) // 4


@given(values=st.lists(st.integers(0, 4), min_size=1, max_size=30), count=st.integers(0, 30))
def test_the_largest_are_as_many_as_wanted_and_the_first_of_those_that_tie(values: list[int], count: int) -> None:
    scores = torch.tensor(values, dtype=torch.float64)[:, None]
    parts = {"a": (scores[: len(scores) // 2],), "b": (scores[len(scores) // 2 :],)}
    found = torch.cat([matrix for each in largest(parts, count).values() for matrix in each]).flatten()
    expected = torch.zeros(len(values), dtype=torch.bool)
    expected[scores.flatten().argsort(descending=True, stable=True)[:count]] = True
    assert torch.equal(found, expected)


class Wrong(Scoring):
    def __init__(self, scores: Callable[[Problem], Tensor]) -> None:
        self.scores = scores

    def score(self, problem: Problem, options: Options) -> Tensor:
        return self.scores(problem)


def test_scores_of_another_shape_or_without_a_value_are_refused() -> None:
    for scope in ("layer", "network"):
        model, _ = network("mlp")
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ShapeMismatch, match=r"inputs without the bias, outputs.*\(8, 12\), found \(9, 12\)"):
            prune_(model, None, Sparsity(0.5, scope), method=Wrong(lambda problem: problem.stored))
        with pytest.raises(NonFinite, match="hold NaN"):
            prune_(model, None, Sparsity(0.5, scope), method=Wrong(lambda p: p.stored[: p.rows] * torch.nan))
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


class Snip(GradientScoring):
    """|w·∂L/∂w| of a loss on data: a method of its own in a few lines."""

    def objective(self, model: nn.Module, run: Any) -> Tensor:
        (x,) = run.data
        return model(x.double()).square().mean()


def test_gradients_of_another_objective_score_as_well() -> None:
    model, x = network("mlp")
    own = copy.deepcopy(model).double()
    own(x.double()).square().mean().backward()
    scores = [(p * p.grad).abs().T.flatten() for p in own.parameters() if p.dim() > 1]
    cut = torch.cat(scores).sort(descending=True).values[: round(0.3 * 288)][-1]
    prune_(model, x, Sparsity(0.7, "network"), method=Snip())
    for mask, each in zip(nonzeros(model).values(), scores, strict=True):
        assert torch.equal(mask.T.flatten(), each >= cut)


@dataclass(frozen=True)
class Relative(Scoring):
    """Relative importance and activations (Zhang et al., Plug-and-play, ICLR 2024): a method of a user's own."""

    power: float = 0.5
    needs_data: ClassVar[bool] = True

    def score(self, problem: Problem, options: Options) -> Tensor:
        W, X = problem.stored[: problem.rows].double().abs(), problem.inputs[:, : problem.rows].double()
        return (W / W.sum(0) + W / W.sum(1, keepdim=True)) * X.norm(dim=0)[:, None] ** self.power


@pytest.fixture
def relative(monkeypatch: pytest.MonkeyPatch) -> str:
    """Known by name while a test runs."""
    monkeypatch.setattr(PRUNERS, "factories", dict(PRUNERS.factories))
    register_pruner("relative")(Relative)
    return "relative"


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["conv1d", "attention", "transposed"])
def test_a_method_of_ones_own_does_all_that_ours_do(name: str, target: str, relative: str, tmp_path: Path) -> None:
    assert len(inspect.getsource(Relative).splitlines()) < 40
    states, options = [], Options(mode="parallel")
    for folder, jobs in (("one", 1), ("one", 1), ("two", 2)):
        model, x = network(name)
        report = prune_(model, x, TARGETS[target], method=relative, options=options, run=tmp_path / folder, jobs=jobs)
        states.append(model.state_dict())
        if target == "network":
            assert report.nonzeros == round(0.4 * report.nonzeros_before)
        else:
            part = 0.5 if target == "2:4" else 0.4
            assert all(row.nonzeros == round(part * row.nonzeros_before) for row in report.layers)
        assert report.provenance["method"] == "relative"
        assert report.provenance["method_options"] == {"power": 0.5}
        assert "masked" in str(report)
    assert all(torch.equal(value, state[key]) for state in states for key, value in states[0].items())
    assert verify(network(name)[0], x, tmp_path / "one").ok
    assert prune_(network(name)[0], x, TARGETS[target], method=Relative(1.0)).output_error != report.output_error


OWN = """
from dataclasses import dataclass

import torch
from torch import nn

from convexprune.pruners import Scoring, register_pruner


@register_pruner("smallest")
@dataclass(frozen=True)
class Smallest(Scoring):
    \"\"\"The smallest weights stay.\"\"\"

    power: float = 1.0

    def score(self, problem, options):
        return -(problem.stored[: problem.rows].abs() ** self.power)


def build():
    return nn.Sequential(nn.Conv1d(4, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 4))
"""


def test_the_command_line_takes_a_method_that_lies_beside_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(PRUNERS, "factories", dict(PRUNERS.factories))
    (tmp_path / "scored_by_hand.py").write_text(OWN)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(4, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 4))
    torch.save(model.state_dict(), "trained.pt")
    np.save("x.npy", torch.randn(40, 4, 8).numpy())
    given = ["scored_by_hand:build", "--weights", "trained.pt", "--calibration", "x.npy"]
    own = ["--method", "smallest", "--method-option", "power=2.0", "--target", "sparsity 0.75 scope=network"]
    for said in ("masked", "Nothing to do"):
        result = CliRunner().invoke(app, ["prune", *given, *own, "--out", "out"])
        assert result.exit_code == 0, result.output
        assert said in result.output
    assert CliRunner().invoke(app, ["verify", "out", *given]).exit_code == 0
    assert CliRunner().invoke(app, ["report", "out"]).exit_code == 0
    pruned = load_file("out/model.safetensors")
    W = [model[0].weight, model[3].weight]
    cut = torch.cat([each.detach().abs().flatten() for each in W]).sort().values[(96 + 192) // 4 - 1]
    for key, each in (("0.weight", W[0]), ("3.weight", W[1])):
        assert torch.equal(pruned[key] != 0, each.abs() <= cut)


def test_the_command_line_runs_synflow_without_data(tmp_path: Path) -> None:
    torch.save(find_model("lenet-5").build().state_dict(), tmp_path / "fresh.pt")
    own = ["--method", "synflow", "--method-option", "shape=(1, 28, 28)", "--method-option", "rounds=3"]
    given = ["prune", "lenet-5", "--weights", str(tmp_path / "fresh.pt"), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, [*given, *own, "--target", "sparsity 0.99 scope=network"])
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["nonzeros"] == round(0.01 * report["nonzeros_before"])
    assert report["provenance"]["method_options"]["shape"] == [1, 28, 28]


def test_all_are_listed_with_their_options() -> None:
    found = available_pruners()
    assert {name for name, kind in PRUNERS.factories.items() if issubclass(kind, Scoring)} >= set(METHODS)  # type: ignore[arg-type]
    assert found["synflow"].options == {"rounds": 100, "schedule": "exponential", "norms_as": "scale", "shape": ()}
    assert found["sparsegpt"].options == {"block": 128, "damping": 0.01}
    with pytest.raises(InvalidTolerance, match="damping"):
        SparseGPT(damping=0.0)
    with pytest.raises(InvalidTolerance, match="block"):
        SparseGPT(block=-1)


def test_the_value_of_refitted_weights_is_their_own_loss() -> None:
    """½‖XU − Y‖_F² of what is stored, where nothing follows the layer."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 5)).double(), torch.randn(40, 8).double()
    with torch.no_grad():
        Y = model(x)
        [row] = prune_(model, x, Sparsity(0.5), method="magnitude", options=Options(refit=True)).layers
        loss = float((model(x) - Y).double().square().sum()) / 2
    assert row.status == "masked, refitted"
    assert row.value == pytest.approx(loss, rel=ROUNDING)
