"""What a run would do, told beforehand, against what it then does."""

import json
from typing import Any

import pytest
import torch
from calls import preview, prune_
from torch import Tensor, nn

import convexprune.preview
from convexprune import Eps
from convexprune.errors import NothingToPrune
from convexprune.prune import Request
from convexprune.runs.run import Run
from convexprune.solvers.errors import ConvexPruneError, InvalidInput, SolverRefused


def make_network() -> nn.Sequential:
    torch.manual_seed(0)
    convolutions = [nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3, groups=2), nn.ReLU()]
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(24, 5))


def images(count: int = 40) -> Tensor:
    return torch.rand(count, 2, 6, 6, generator=torch.Generator().manual_seed(1))


def test_sizes_are_those_of_the_matrices_and_the_model_is_left() -> None:
    model, x = make_network(), images()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = preview(model, x, batch_size=16)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.training
    _, run = Request.of(model, x, Eps(), None, None, None, 1).prepared(Run, lambda done, total: None)
    for row in found.layers:
        problems = run.problems(row.name)
        assert row.matrices == tuple((*each.inputs.shape, each.W.shape[1]) for each in problems)
        assert row.data_bytes == sum(each.inputs.nbytes + each.targets.nbytes for each in problems)
        assert not row.gram
    assert [len(row.matrices) for row in found.layers] == [1, 2, 1]
    assert [(row.fit, row.norm) for row in found.layers] == [("relu-ball", "1"), ("relu-ball", None), ("ball", None)]


@pytest.mark.parametrize(
    "arguments",
    [
        {"eps": {"0": 0.3, "*": 0.2}, "norms": "leave"},
        {"eps": 0.3, "layers": ["0", "6"]},
        {"sparsity": 0.8},
        {"sparsity": {"3": 0.0, "*": "2:4"}},
        {"sparsity": 0.8, "layers": "!3"},
        {"network_eps": 0.5},
        {"eps": 0.3, "mode": "cascade"},
    ],
)
def test_the_run_does_what_was_told(arguments: dict[str, Any]) -> None:
    model = make_network()
    told = preview(model, images(), **arguments)
    report = prune_(model, images(), **arguments, tol=1e-2, feas_tol=1e-2)
    assert [row.name for row in told.layers] == [row.name for row in report.layers]
    assert told.skipped == report.skipped
    assert told.samples == report.samples
    assert told.weights == report.nonzeros_before
    for row, done in zip(told.layers, report.layers, strict=True):
        assert (row.shape, row.fit, row.norm) == (done.shape, done.fit, done.norm)
        assert row.matrices[0][0] == done.samples
        if "network_eps" not in arguments:
            assert row.goal == done.goal


def test_layers_that_lose_inputs_are_told_where_neurons_go() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    arguments = {"sparsity": 0.5, "unit": "neurons", "layers": "0"}
    told = preview(model, torch.rand(30, 8), **arguments)
    report = prune_(model, torch.rand(30, 8), **arguments)
    assert [row.name for row in told.layers] == ["2"]
    assert told.skipped == report.skipped


class Halves(nn.Module):
    """Two networks side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(5, 6), nn.Linear(6, 4), nn.Linear(5, 6), nn.Linear(6, 4)

    def one(self, x: Tensor) -> Tensor:
        found: Tensor = self.b(torch.relu(self.a(x)))
        return found

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.one(x) + self.d(torch.relu(self.c(x)))
        return found


def test_neurons_whose_users_the_data_do_not_reach_are_left_by_the_run_as_was_told() -> None:
    torch.manual_seed(0)
    model, x = Halves(), torch.rand(30, 5)
    arguments: dict[str, Any] = {"sparsity": 0.5, "unit": "neurons", "forward": Halves.one}
    told = preview(model, x, **arguments)
    report = prune_(model, x, **arguments)
    assert [row.name for row in told.layers] == ["b"]
    assert (model.a.weight.shape, model.c.weight.shape) == ((3, 5), (6, 5))
    assert told.skipped == report.skipped
    assert "its outputs go to d, which cannot be fitted in this run" in [module.reason for module in told.skipped]


def test_a_linear_fit_of_many_samples_streams_and_its_memory_does_not_grow() -> None:
    model = nn.Sequential(nn.Linear(7, 9), nn.ReLU(), nn.Linear(9, 3))
    small, large = (preview(model, torch.rand(count, 7)) for count in (1500, 6000))
    assert [row.gram for row in large.layers] == [False, True]
    assert small.layers[1].data_bytes == large.layers[1].data_bytes == 8 * 10 * (10 + 3)
    assert large.layers[0].data_bytes == 4 * small.layers[0].data_bytes
    assert large.memory_bytes > 3 * small.memory_bytes
    assert not preview(model, torch.rand(1000, 7)).layers[1].gram


def test_limits_bound_the_time() -> None:
    model = make_network()
    assert 0 < preview(model, images(), layer_time_limit=1e-6, time_limit=1e-3).seconds <= 1e-3
    assert preview(model, images(), sparsity=0.5).seconds > preview(model, images(), sparsity=0.5, max_iter=1).seconds


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "lowner", "sipp"])
@pytest.mark.parametrize("target", ["sparsity 0.5", "neurons 0.5"])
def test_other_methods_are_told_as_well(method: str, target: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    x = torch.rand(30, 8)
    if (method, target.split()[0]) in (("lowner", "sparsity"), ("sipp", "neurons")):
        with pytest.raises(SolverRefused, match="takes"):
            preview(model, x, target, method=method)
        return
    told = preview(model, x, target, method=method)
    report = prune_(model, x, target, method=method)
    assert told.skipped == report.skipped
    goals = {row.name: row.goal for row in told.layers}
    if target.startswith("sparsity"):
        assert goals == {"0": "keep 24", "2": "keep 15", "4": "keep 5"}
    else:
        assert (goals["2"], goals["4"]) == ("3 of 6 inputs", "2 of 5 inputs")


def test_methods_without_data_are_told_without_any() -> None:
    found = preview(make_network(), method="magnitude", sparsity=0.5)
    assert (found.samples, [row.matrices[0][0] for row in found.layers]) == (0, [0, 0, 0])
    assert "keep 36" in str(found)


@pytest.mark.parametrize(
    "arguments",
    [
        {"eps": -1},
        {"mode": "series"},
        {"mode": "cascade", "jobs": 2},
        {"jobs": 0},
        {"solver": "adm"},
        {"fit": "cone"},
        {"sparsity": "2of4"},
        {"sparsity": {"0": 0.5}},
        {"layers": "conv*"},
        {"sparsity": {"typo": 0.5, "*": 0.8}},
        {"fit": {"typo": "ball"}},
        {"solver": "quadratic"},
        {"solver": "published", "fit": "ball"},
        {"solver": "admm", "sparsity": 0.5},
        {"solver": "continuation", "sparsity": 0.5, "scope": "network"},
        {"solver": "quadratic", "sparsity": 0.5, "search": "path"},
        {"sparsity": 0.5, "fit": {"6": "net-trim"}},
        {"sparsity": 0.5, "fit": "net-trim", "search": "path"},
        {"sparsity": "0:2", "layers": "6"},
        {"tol": -1},
        {"layer_time_limit": 0},
        {"time_limit": 0},
    ],
)
def test_what_a_run_refuses_is_refused_in_the_same_words(arguments: dict[str, Any]) -> None:
    with pytest.raises(ConvexPruneError) as told:
        preview(make_network(), images(), **arguments)
    with pytest.raises(type(told.value)) as refused:
        prune_(make_network(), images(), **arguments)
    assert str(told.value) == str(refused.value)


def test_two_targets_are_refused_in_the_same_words() -> None:
    for call in (convexprune.preview.preview, convexprune.prune_):
        with pytest.raises(InvalidInput, match="eps and sparsity: each says how far to prune"):
            call(make_network(), images(), eps=0.1, sparsity=0.5)


def test_a_network_without_a_known_bound_is_refused_in_the_same_words() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    with pytest.raises(InvalidInput, match="network_eps: no bound on this network's outputs is known") as told:
        preview(model, torch.rand(20, 6), network_eps=0.3, guarantee="bound", mode="parallel")
    with pytest.raises(InvalidInput) as refused:
        prune_(model, torch.rand(20, 6), network_eps=0.3, guarantee="bound", mode="parallel")
    assert str(told.value) == str(refused.value)
    preview(model, torch.rand(20, 6), eps=0.3)


@pytest.mark.parametrize(
    "arguments",
    [
        {"solver": "quadratic", "fit": "ball"},
        {"solver": "continuation", "sparsity": 0.8},
        {"solver": "admm", "sparsity": 0.8, "search": "path", "max_iter": 30},
        {"sparsity": 0.8, "scope": "network", "max_iter": 30},
        {"sparsity": "1:2", "layers": ["3", "6"]},
        {"fit": "net-trim", "mode": "cascade"},
    ],
)
def test_nothing_is_refused_that_a_run_takes(arguments: dict[str, Any]) -> None:
    told = preview(make_network(), images(), **arguments)
    report = prune_(make_network(), images(), **arguments)
    assert {row.name for row in report.layers} <= {row.name for row in told.layers}


def test_of_many_samples_a_solver_for_products_alone_is_asked_about_these() -> None:
    """What is kept as XᵀX has no samples for the programs of "published"."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 3)), torch.rand(1100, 4)
    assert preview(model, x, solver="quadratic").layers[0].gram
    assert prune_(model, x, solver="quadratic").certified


def test_data_that_cannot_be_used_is_refused() -> None:
    with pytest.raises(InvalidInput, match="the model failed on a batch"):
        preview(make_network(), torch.rand(4, 3, 6, 6))
    with pytest.raises(NothingToPrune):
        preview(nn.Tanh(), images())


def test_it_is_data_and_a_table() -> None:
    found = preview(make_network(), images(), layers=["0", "3"])
    data = json.loads(json.dumps(found.to_dict()))
    assert [len(row["matrices"]) for row in data["layers"]] == [1, 2]
    text = str(found)
    assert "640" in text  # 40 samples times 4 by 4 positions
    assert "not pruned: 6 (Linear): not chosen by the name patterns" in text
