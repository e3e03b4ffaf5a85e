"""What can be asked of a network: an error of its outputs, a number of weights, a pattern, an end in time."""

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from calls import prune_
from networks import Net, mlp
from promises import behind, network_error, promised, unchanged, with_modules_of
from torch import Tensor, nn

import convexprune
from convexprune.errors import NothingToPrune, PruningFailed
from convexprune.solvers import Status
from convexprune.solvers.errors import ConvexPruneError, InvalidInput, InvalidTolerance, SolverRefused

Made = tuple[nn.Module, Tensor]


def chain(*sizes: int, seed: int = 0, samples: int = 60) -> Made:
    """Weights as large as trained ones, inputs of both signs: a small error takes many weights."""
    torch.manual_seed(seed)
    model = nn.Sequential()
    for before, after in itertools.pairwise(sizes):
        model += nn.Sequential(nn.Linear(before, after), nn.ReLU())
        nn.init.normal_(model[-2].weight, std=(2 / before) ** 0.5)
    return model[:-1], torch.randn(samples, sizes[0])


def convolutions() -> Made:
    torch.manual_seed(0)
    first, second = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3, groups=2, bias=False)
    layers = [first, nn.BatchNorm2d(6), nn.ReLU(), second, nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)]
    return nn.Sequential(*layers).eval(), torch.randn(40, 3, 6, 6)


def twice() -> Made:
    """One layer before and behind another: its errors pass through its own pruned weights."""
    torch.manual_seed(0)
    own = {name: nn.Linear(6, width) for name, width in (("shared", 6), ("inner", 6), ("head", 3))}
    model = Net(lambda m, x: m.head(m.shared(m.inner(m.shared(x).relu()).relu()).relu()), **own)
    for layer in model.children():
        nn.init.normal_(layer.weight, std=6**-0.5)
    return model, torch.randn(40, 6)


# --- An error of the network's outputs ---


@pytest.mark.parametrize(("mode", "objective"), [("parallel", "l1"), ("cascade", "nonzeros")])
@pytest.mark.parametrize(("make", "eps"), [(lambda: chain(8, 9, 7, 4), 0.2), (convolutions, 0.4), (twice, 1.0)])
def test_the_bound_is_within_what_was_asked_and_holds(
    make: Callable[[], Made], eps: float, mode: str, objective: str
) -> None:
    model, x = make()
    dense = copy.deepcopy(model)
    report = prune_(model, x, network_eps=eps, guarantee="bound", mode=mode, objective=objective)
    assert report.certified
    assert report.network.bound <= eps
    assert network_error(dense, model, x) == pytest.approx(report.network.error, rel=1e-3)
    assert report.network.error <= report.network.bound * (1 + 1e-6)
    assert report.network.bound > 0.3 * eps  # what is allowed is used
    assert report.nonzeros < report.nonzeros_before
    for row in report.layers if make is not twice else ():
        promised(row, dense, model, [x], cascade=mode == "cascade")


@pytest.mark.parametrize("mode", ["parallel", "cascade"])
def test_fewest_nonzeros_are_clearly_fewer_where_layers_are_unequal(mode: str) -> None:
    """A wide layer of low rank has much to lose; the one behind it has nothing."""
    torch.manual_seed(0)
    wide, x = nn.Linear(16, 12), torch.randn(80, 3) @ torch.randn(3, 16)
    model = nn.Sequential(wide, nn.ReLU(), nn.Linear(12, 3), nn.Flatten())
    counts = {}
    for objective in ("l1", "nonzeros"):
        report = prune_(copy.deepcopy(model), x, network_eps=0.3, guarantee="bound", mode=mode, objective=objective)
        rows = {row.name: row.nonzeros for row in report.layers}
        counts[objective] = rows.get("0", 192) + rows.get("2", 36)
        assert report.network.bound <= 0.3
    assert counts["nonzeros"] <= (0.9 if mode == "parallel" else 1.0) * counts["l1"]


def test_an_error_too_small_for_any_layer_leaves_all_as_trained_and_says_so() -> None:
    model, x = chain(8, 9, 7, 4)
    same = unchanged(model)
    report = prune_(model, x, network_eps=1e-5, guarantee="bound")
    assert same()
    assert not report.layers
    assert {module.name for module in report.skipped} == {"0", "2", "4"}
    assert all("its share of the network's error is an eps below" in module.reason for module in report.skipped)
    assert (report.network.bound, report.network.error) == (0.0, 0.0)


def test_networks_without_a_bound_are_refused_with_the_reason() -> None:
    model = Net(lambda m, x: m.a(x) * m.b(x), a=nn.Linear(4, 3), b=nn.Linear(4, 3))
    same = unchanged(model)
    with pytest.raises(InvalidInput, match=r"no bound on this network's outputs is known: .*mul.*; give eps"):
        prune_(model, torch.randn(20, 4), network_eps=0.1, guarantee="bound")
    assert same()
    report = prune_(model, torch.randn(20, 4))
    assert math.isinf(report.network.bound)
    assert "mul" in str(report.network)


# --- A number of weights ---


@pytest.mark.parametrize(("mode", "search"), [("parallel", "budget"), ("cascade", "budget"), ("parallel", "path")])
def test_each_layer_keeps_no_more_than_its_part(search: str, mode: str) -> None:
    model, x = convolutions() if search == "budget" else chain(8, 9, 4)
    dense = copy.deepcopy(model)
    table = {"0": 0.6, "*": 0.75}
    report = prune_(model, x, sparsity=table, mode=mode, search=search)
    assert report.certified
    for row in report.layers:
        weight = model.get_submodule(row.name).weight
        allowed = round((1 - table.get(row.name, 0.75)) * weight.numel())
        assert allowed - 2 <= row.nonzeros == int(weight.count_nonzero()) <= allowed
        promised(row, dense, model, [x], cascade=mode == "cascade")
    assert 0 < report.output_error < 1


def test_a_budgets_weights_fit_best_on_their_support() -> None:
    """Where no ReLU follows it is least squares: the residual is orthogonal to the inputs that are kept."""
    model, x = chain(8, 6)
    dense = copy.deepcopy(model).double()
    prune_(model, x, sparsity=0.5)
    with torch.no_grad():
        rest = copy.deepcopy(model).double()(x.double()) - dense(x.double())
    gradient = rest.T @ torch.cat([x.double(), torch.ones(len(x), 1, dtype=torch.float64)], 1)
    kept = torch.cat([model[0].weight != 0, torch.ones(6, 1, dtype=torch.bool)], 1)
    assert float(gradient[kept].abs().max()) < 1e-4 * float(gradient.abs().max())


def test_all_layers_together_keep_no_more_than_the_part_and_the_worthless_one_loses_most() -> None:
    model, x = mlp(12, 10, 4), torch.randn(60, 12)
    with torch.no_grad():
        model[0].weight[:, 3:] *= 0.02
    report = prune_(model, x, sparsity=0.6, scope="network")
    first, second = (int(model[i].weight.count_nonzero()) for i in (0, 2))
    assert report.certified
    assert 0.3 * 160 < first + second <= 64
    assert first / 120 < 0.75 * (second / 40)


def test_of_depthwise_convolutions_each_filter_keeps_one_weight_and_the_total_holds() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5))
    x = torch.randn(30, 4, 4, 4)
    one, both = copy.deepcopy(model), copy.deepcopy(model)
    row = prune_(one, x, sparsity=0.97, layers="0").layers[0]
    assert (row.goal, row.nonzeros) == ("keep 4", 4)
    assert one[0].weight.flatten(1).count_nonzero(1).tolist() == [1, 1, 1, 1]
    prune_(both, x, sparsity=0.9, scope="network")
    assert sum(int(both[i].weight.count_nonzero()) for i in (0, 3)) <= round(0.1 * (36 + 80))


@pytest.mark.parametrize("mode", ["parallel", "cascade"])
def test_two_of_four_inputs_are_kept_at_most(mode: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 4, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5))
    report = prune_(model, torch.randn(20, 8, 4, 4), sparsity="2:4", mode=mode)
    assert report.certified
    for i in (0, 3):
        fours = model[i].weight.flatten(1).reshape(-1, 4)
        assert (fours.count_nonzero(1) <= 2).all()
        assert (fours.count_nonzero(1) == 2).float().mean() > 0.9


def test_a_layer_whose_inputs_a_pattern_does_not_divide_is_left_and_said() -> None:
    model, x = chain(8, 6, 3)
    trained = model[2].weight.clone()
    report = prune_(model, x, sparsity="2:4")
    assert [row.name for row in report.layers] == ["0"]
    assert report.nonzeros == 24
    why = "left as trained: 2:4 needs a multiple of 4 inputs, and it has 6"
    assert [(module.name, module.reason) for module in report.skipped] == [("2", why)]
    assert torch.equal(model[2].weight, trained)


def test_every_group_of_a_layer_must_take_the_pattern() -> None:
    """Queries of 8 features, keys and values of 6: three programs of one module."""
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, kdim=6, vdim=6, batch_first=True)
    model = Net(
        lambda m, x: m.head(m.attention(x, x[..., :6], x[..., :6])[0]), attention=attention, head=nn.Linear(8, 4)
    )
    report = prune_(model, torch.randn(10, 5, 8), sparsity="2:4")
    assert [row.name for row in report.layers] == ["attention.out_proj", "head"]
    assert ["and it has 6" in module.reason for module in report.skipped] == [True]


@pytest.mark.parametrize(
    "arguments",
    [
        {"sparsity": "2:4", "layers": "2"},
        {"sparsity": "2:4", "layers": ["0", "2"]},
        {"sparsity": {"2": "2:4", "*": 0.5}},
        {"sparsity": {"*": 0.5, "2": "2:4"}, "scope": "network"},
    ],
)
def test_a_layer_that_was_named_is_refused_if_it_cannot_take_its_pattern(arguments: dict[str, Any]) -> None:
    model, x = chain(8, 6, 3)
    same = unchanged(model)
    with pytest.raises(InvalidInput, match="'2' was named, and 2:4 needs a multiple of 4 inputs, and it has 6: leave"):
        prune_(model, x, **arguments)
    assert same()


def test_where_no_layer_can_take_the_pattern_nothing_is_done() -> None:
    with pytest.raises(NothingToPrune, match=r"0: left as trained: 2:4 needs .* it has 6; 2: left"):
        prune_(*chain(6, 7, 3), sparsity="2:4")


MIXED: dict[str, Any] = {"0": 0.0, "*": "2:4", "4": 0.6}


@pytest.mark.parametrize("scope", ["layer", "network"])
@pytest.mark.parametrize("mode", ["parallel", "cascade"])
def test_numbers_and_patterns_go_together_and_a_name_comes_before_a_pattern(mode: str, scope: str) -> None:
    model, x = chain(6, 8, 8, 4)
    trained = model[0].weight.clone()
    report = prune_(model, x, sparsity=MIXED, mode=mode, scope=scope)
    assert [(row.name, row.goal) for row in report.layers] == [("2", "2:4"), ("4", "keep 13")]
    assert report.certified
    assert [(module.name, module.reason) for module in report.skipped] == [("0", "left as trained: its sparsity is 0")]
    assert torch.equal(model[0].weight, trained)
    assert (model[2].weight.reshape(-1, 4).count_nonzero(1) <= 2).all()
    assert int(model[4].weight.count_nonzero()) == 13


def test_layers_of_one_number_share_it_in_the_network() -> None:
    model, x = chain(8, 8, 8, 8, 4)
    report = prune_(model, x, sparsity={"6": 0.25, "4": "2:4", "*": 0.5}, scope="network")
    kept = {row.name: row.nonzeros for row in report.layers}
    assert 60 <= kept["0"] + kept["2"] <= 64
    assert kept["0"] != kept["2"]
    assert (kept["4"], kept["6"]) == (32, 24)


@pytest.mark.parametrize("given", [0.0, 0, {"*": 0.0}])
@pytest.mark.parametrize("scope", ["layer", "network"])
def test_a_sparsity_of_zero_leaves_the_network_as_trained(given: Any, scope: str) -> None:
    model, x = chain(6, 5, 3)
    same = unchanged(model)
    report = prune_(model, x, sparsity=given, scope=scope)
    assert same()
    assert report.layers == ()
    assert {module.reason for module in report.skipped} == {"left as trained: its sparsity is 0"}
    assert report.output_error == 0
    assert "its sparsity is 0" in str(report)


@pytest.mark.parametrize("mode", ["parallel", "cascade"])
def test_a_refit_lowers_the_error_at_the_same_support(mode: str) -> None:
    """In parallel mode, where layers do not depend on each other, supports are the very same."""
    (plain, x), (again, _) = chain(8, 9, 7, 4), chain(8, 9, 7, 4)
    dense = copy.deepcopy(plain)
    one, other = (prune_(m, x, 0.2, mode=mode, refit=r) for m, r in ((plain, False), (again, True)))
    assert all(row.status == "refitted" for row in other.layers)
    assert other.certified
    for before, after in zip(one.layers, other.layers, strict=True):
        promised(after, dense, again, [x], cascade=mode == "cascade")
        if mode == "parallel" or before.name == "0":
            supports = [model.get_submodule(before.name).weight != 0 for model in (plain, again)]
            assert torch.equal(*supports)
            assert after.output_error < 0.99 * before.output_error
            assert after.value >= before.value * (1 - 1e-3)


# --- Contradictions ---

REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "refit": ({"sparsity": 0.5, "refit": True}, SolverRefused, "fitted on their support anyway: leave refit out"),
    "a method of others": (
        {"eps": 0.1, "method": "budget"},
        SolverRefused,
        "cannot reach a target .eps.",
    ),
    "objective": ({"network_eps": 0.1, "objective": "few"}, InvalidInput, "objective: expected 'l1' or 'nonzeros'"),
    "scope": ({"sparsity": 0.5, "scope": "all"}, InvalidInput, "scope: expected 'layer' or 'network', found 'all'"),
    "pattern and scope": ({"sparsity": "2:4", "scope": "network"}, InvalidInput, "each layer's own"),
    "pattern and path": ({"sparsity": "2:4", "search": "path"}, InvalidInput, "takes no pattern such as '2:4'; use"),
    "pattern of neurons": ({"sparsity": "2:4", "unit": "neurons"}, InvalidInput, "the part of neurons that goes"),
    "a share of each": (
        {"sparsity": {"*": 0.5}, "unit": "neurons", "scope": "network"},
        InvalidInput,
        "one part to share",
    ),
    "patterns for the network": ({"sparsity": {"*": "2:4"}, "scope": "network"}, InvalidInput, "each layer's own"),
    "neurons, mixed": ({"sparsity": {"0": "2:4", "*": 0.5}, "unit": "neurons"}, InvalidInput, "the part of neurons"),
    "no pattern in a table": (
        {"sparsity": {"0": "a:b", "*": 0.5}},
        InvalidInput,
        "sparsity of 0: expected a number, or",
    ),
    "no number": ({"sparsity": "half"}, InvalidInput, "or a pattern such as '2:4', found 'half'"),
    "more than there are": ({"sparsity": "5:4"}, InvalidInput, "1 ≤ n < m, found '5:4'"),
    "nothing kept": ({"sparsity": "0:4"}, InvalidInput, "1 ≤ n"),
    "all zeros": ({"sparsity": 1.0}, InvalidTolerance, "0 to below 1"),
    "negative": ({"sparsity": {"*": -0.1}}, InvalidTolerance, "sparsity of"),
    "yes": ({"sparsity": True}, InvalidTolerance, "found True"),
    "a layer without": ({"sparsity": {"0": 0.5}}, InvalidInput, "matches 2"),
    "net-trim": ({"sparsity": 0.5, "fit": "net-trim"}, InvalidInput, "use 'relu-ball'"),
    "a solver of sets": ({"sparsity": 0.5, "solver": "admm"}, SolverRefused, "not convex"),
    "network_eps": ({"network_eps": -1.0}, InvalidTolerance, "network-eps: expected"),
    "network_eps NaN": ({"network_eps": math.nan}, InvalidTolerance, "network-eps: expected"),
    "gamma": ({"gamma": 0.9, "mode": "cascade"}, InvalidTolerance, "gamma: expected a number ≥ 1"),
    "time": ({"time_limit": -1.0}, InvalidTolerance, "time_limit: expected a positive number"),
    "no time": ({"time_limit": math.nan}, InvalidTolerance, "time_limit"),
    "a word as time": ({"time_limit": "1 s"}, InvalidTolerance, "time_limit"),
    "stop": ({"stop": 3}, InvalidInput, "stop: expected a function"),
    "ceiling": ({"ceiling": "a"}, InvalidTolerance, "ceiling"),
    "callback": ({"callback": 3}, InvalidInput, "callback: expected a function"),
    "progress": ({"progress": 3}, InvalidInput, "progress: expected a function"),
    "forward": ({"forward": 3}, InvalidInput, "forward: expected a function"),
    "run": ({"run": 5}, InvalidInput, "run: expected the path of a folder, found 5"),
    "layer time": ({"layer_time_limit": 0.0}, InvalidTolerance, "time_limit"),
    "jobs": ({"jobs": 0}, InvalidTolerance, "jobs"),
    "jobs in cascade": ({"jobs": 2, "mode": "cascade"}, InvalidInput, "expected 1 in cascade"),
    "norms": ({"norms": "drop"}, InvalidInput, "norms: expected 'fold' or 'leave', found 'drop'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_contradictions_are_refused(case: str) -> None:
    arguments, error, message = REFUSED[case]
    model, x = chain(8, 8, 3)
    same = unchanged(model)
    with pytest.raises(error, match=message) as caught:
        prune_(model, x, **arguments)
    assert isinstance(caught.value, ConvexPruneError)
    assert same()


def test_two_targets_are_refused() -> None:
    model, x = chain(8, 8, 3)
    with pytest.raises(InvalidInput, match="eps and sparsity: each says how far to prune; give one of them"):
        convexprune.prune_(model, x, eps=0.1, sparsity=0.5)
    with pytest.raises(InvalidInput, match="target and eps: each"):
        convexprune.prune_(model, x, "sparsity 0.5", eps=0.1)


# --- An end in time ---


def stops_after(calls: int) -> Callable[[], bool]:
    """True once, at a call of this number; a run must not need to be told twice."""
    calls_so_far = itertools.count(1)
    return lambda: next(calls_so_far) == calls


@pytest.mark.parametrize(
    ("mode", "calls"),
    [("parallel", 1), ("parallel", 3), ("parallel", 8), ("cascade", 1), ("cascade", 2), ("cascade", 5)],
)
def test_a_run_that_is_stopped_leaves_a_valid_model(mode: str, calls: int, tmp_path: Any) -> None:
    """What was written is feasible, what was not reached is named and as trained; started again, it ends as ever."""
    (model, x), (whole, _) = chain(8, 9, 7, 4), chain(8, 9, 7, 4)
    dense = copy.deepcopy(model)
    report = prune_(model, x, 0.15, mode=mode, run=tmp_path, stop=stops_after(calls))
    written = {row.name for row in report.layers}
    missing = {module.name for module in report.skipped}
    assert report.network.kept
    assert written | missing == {"0", "2", "4"}
    assert not written & missing
    assert missing
    assert report.provenance["stopped"] == "it was interrupted"
    for name in missing:
        assert torch.equal(model.get_submodule(name).weight, dense.get_submodule(name).weight)
    for row in report.layers:
        promised(row, dense, model, [x], cascade=mode == "cascade")
        assert row.violation <= 1e-4
        assert row.status in ("solved", str(Status.STOPPED))
    again = prune_(copy.deepcopy(dense), x, 0.15, mode=mode, run=tmp_path)
    assert again.certified
    full = prune_(whole, x, 0.15, mode=mode)
    assert [(row.nonzeros, row.bound) for row in again.layers] == [(row.nonzeros, row.bound) for row in full.layers]


def test_a_layer_that_was_cut_short_keeps_its_promise_and_says_how() -> None:
    """Whatever the iteration: the best weights inside that there were, or the trained ones."""
    notes = set()
    for calls in range(3, 12):
        model, x = chain(8, 9, 4)
        dense = copy.deepcopy(model)
        report = prune_(model, x, 0.15, layers="0", stop=stops_after(calls), tol=1e-8)
        for row in report.layers:
            promised(row, dense, model, [x], cascade=False)
            assert row.output_error <= 0.15 * (1 + 1.1e-4)
            assert not report.certified
            notes |= set(row.notes)
    assert notes
    assert all(note.startswith(("ended", "no better weights were found")) for note in notes)


@pytest.mark.parametrize("target", [{}, {"sparsity": 0.5}, {"sparsity": 0.5, "scope": "network"}, {"network_eps": 0.5}])
def test_without_time_nothing_is_touched_and_everything_is_named(target: dict[str, Any]) -> None:
    model, x = chain(8, 9, 7, 4)
    same = unchanged(model)
    report = prune_(model, x, **target, time_limit=1e-9)
    assert same()
    assert not report.layers
    assert [module.name for module in report.skipped] == ["0", "2", "4"]
    assert all("not reached: the time limit of 1e-09 s ran out" in module.reason for module in report.skipped)
    assert report.network.error == 0


def test_a_run_for_the_networks_error_is_the_same_with_and_without_a_folder(tmp_path: Any) -> None:
    """In cascade a layer's answer depends on those before it, and these on how often eps was halved."""
    made = [chain(8, 9, 7, 4) for _ in range(3)]
    figures = []
    for number, (model, x) in enumerate(made):
        report = prune_(model, x, network_eps=0.05, mode="cascade", run=tmp_path if number else None)
        assert report.network.bound <= 0.05
        figures.append([(row.goal, row.nonzeros, row.bound) for row in report.layers])
    assert figures[0] == figures[1] == figures[2]
    assert len({torch.cat([p.flatten() for p in model.parameters()]).sum().item() for model, _ in made}) == 1


def test_layers_of_one_mixed_model_are_independent_in_parallel() -> None:
    """The promise of each is about the original's inputs: the others may be exchanged for the trained ones."""
    model, x = chain(8, 9, 7, 4)
    dense = copy.deepcopy(model)
    report = prune_(model, x, 0.2)
    for row in report.layers:
        mixed = with_modules_of(dense, model, [row.name])
        Y, Z = (behind(net, row.name, [x], row.fit != "ball") for net in (dense, mixed))
        assert float((Z - Y).norm() / Y.norm()) <= 0.2 * (1 + 1.1e-4)


@pytest.mark.parametrize("search", ["budget", "path"])
def test_the_groups_of_a_layer_spend_its_whole_budget(search: str) -> None:
    """10 weights over 6 groups of 9 are no 6: what is rounded off one group goes to the next."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(6, 6, 3, groups=6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 3))
    report = prune_(model, torch.randn(16, 6, 6, 6), sparsity=1 - 10 / 54, layers="0", search=search)
    assert report.nonzeros == 10 if search == "budget" else 6 <= report.nonzeros <= 10


def test_a_path_search_in_cascade_does_not_count_weights_that_keep_to_nothing() -> None:
    """Where no eps is feasible, below what the best weights miss on the pruned inputs, no count means anything."""
    model, x = chain(20, 16, 12, 4)
    dense = copy.deepcopy(model)
    report = prune_(model, x, sparsity=0.7, search="path", mode="cascade")
    for row in report.layers:
        size = dense.get_submodule(row.name).get_parameter("weight").numel()
        assert 0.2 * size < row.nonzeros <= 0.3 * size + 1


def test_a_path_search_ends_when_asked() -> None:
    model, x = chain(30, 40, 30, 5)
    calls_so_far = itertools.count()
    report = prune_(model, x, sparsity=0.9, search="path", stop=lambda: next(calls_so_far) > 3)
    assert report.provenance["stopped"]
    assert len(report.layers) <= 1


@pytest.mark.parametrize(
    ("arguments", "widths"),
    [
        ({"network_eps": 0.0005, "objective": "nonzeros"}, (8, 30, 1)),
        ({"network_eps": 0.0009}, (8, 16, 16, 1)),
        ({"network_eps": 0.02, "objective": "nonzeros"}, (8, 16, 16, 1)),
        ({"sparsity": 0.1, "scope": "network"}, (8, 30, 1)),
        ({"sparsity": 0.5, "scope": "network"}, (8, 16, 16, 1)),
        ({"eps": 0.1, "layers": "0"}, (8, 30, 1)),
    ],
)
def test_in_cascade_only_layers_that_are_pruned_make_up_for_those_before(
    arguments: dict[str, Any], widths: tuple[int, ...]
) -> None:
    """One that is left as trained passes on what reaches it: the bound counts that."""
    model, x = chain(*widths)
    dense = copy.deepcopy(model)
    report = prune_(model, x, **arguments, mode="cascade")
    assert report.network is not None
    assert report.network.kept
    error = network_error(dense, model, x)
    assert error == pytest.approx(report.network.error, rel=1e-3, abs=1e-6)
    assert error <= report.network.bound + report.network.rounding
    assert error <= arguments.get("network_eps", math.inf) + report.network.rounding


@pytest.mark.parametrize("arguments", [{"network_eps": 0.3, "objective": "nonzeros"}, {"eps": 0.2}])
def test_the_bound_holds_wherever_a_cascade_is_stopped(arguments: dict[str, Any]) -> None:
    for calls in (1, 20, 30, 45, 60, 90):
        model, x = chain(8, 20, 12, 3)
        report = prune_(model, x, **arguments, mode="cascade", stop=stops_after(calls))
        assert report.network is not None
        assert report.network.kept


def test_time_that_ran_out_is_not_called_an_interruption() -> None:
    model, x = chain(30, 200, 5)
    report = prune_(model, x, 1e-3, tol=1e-12, max_iter=10**6, time_limit=0.5, layers="0")
    assert "time limit" in report.provenance["stopped"]
    assert [row.status for row in report.layers] == [str(Status.TIME_LIMIT)]


def test_a_path_search_that_ends_before_its_first_point_spends_the_budget() -> None:
    model, x = chain(8, 12, 4)
    report = prune_(model, x, sparsity=0.7, search="path", layers="0", stop=stops_after(4))
    assert report.provenance["stopped"]
    assert [row.nonzeros for row in report.layers] == [29]
    assert "largest trained weights" in report.layers[0].notes[0]


TARGETS: dict[str, dict[str, Any]] = {
    "budget": {"sparsity": 0.6},
    "pattern": {"sparsity": "2:4"},
    "path": {"sparsity": 0.6, "search": "path"},
    "refit": {"eps": 0.2, "refit": True},
    "network": {"sparsity": 0.6, "scope": "network"},
    "mixed": {"sparsity": {"0": "2:4", "*": 0.6}, "scope": "network", "mode": "cascade"},
    "neurons": {"sparsity": 0.4, "unit": "neurons"},
}


@pytest.mark.parametrize("case", TARGETS)
def test_whatever_is_asked_a_run_that_was_stopped_anywhere_ends_as_if_it_had_not(case: str, tmp_path: Any) -> None:
    """Each time it comes one step of a kind further; nothing that was cut short is taken for an answer."""
    (whole, x), (model, _) = chain(8, 12, 4), chain(8, 12, 4)
    calls_so_far = itertools.count()
    full = prune_(whole, x, **TARGETS[case], stop=lambda: next(calls_so_far) < 0)
    steps = next(calls_so_far)
    assert steps > 30
    for number in range(1, steps, max(1, steps // 2)):
        folder = tmp_path / str(number)
        stopped = prune_(copy.deepcopy(model), x, **TARGETS[case], run=folder, stop=stops_after(number))
        assert stopped.provenance["stopped"]
        again = copy.deepcopy(model)
        report = prune_(again, x, **TARGETS[case], run=folder)
        assert [row.nonzeros for row in report.layers] == [row.nonzeros for row in full.layers]
        assert all(torch.equal(a, b) for a, b in zip(again.parameters(), whole.parameters(), strict=True))


def test_the_networks_bound_is_for_batches_of_all_lengths() -> None:
    """A sum over as many positions as there are: what an error does to the outputs depends on the length."""
    torch.manual_seed(0)
    model = Net(lambda m, x: m.h(m.a(x).sum(1)), a=nn.Linear(4, 4), h=nn.Linear(4, 2))
    dense = copy.deepcopy(model)
    batches = [torch.randn(4, 2, 4)] + [torch.rand(4, 200, 4) + 0.5] * 3
    report = prune_(model, batches, network_eps=0.1, guarantee="bound", layers="a")
    with torch.no_grad():
        wrong = math.hypot(*(float((model(x) - dense(x)).norm()) for x in batches))
        right = math.hypot(*(float(dense(x).norm()) for x in batches))
    assert wrong / right <= report.network.bound * (1 + 1e-4) <= 0.1 * (1 + 1e-4)


def test_a_measurement_that_was_cut_short_splits_nothing(tmp_path: Any) -> None:
    for options in ({"scope": "network"}, {"unit": "neurons"}):
        model, x = chain(20, 32, 16, 4)
        same = unchanged(model)
        with pytest.raises(PruningFailed, match="layer_time_limit"):
            prune_(model, x, sparsity=0.5, layer_time_limit=1e-3, run=tmp_path / str(options), **options)
        assert same()


def test_what_a_callback_stopped_is_solved_again(tmp_path: Any) -> None:
    model, x = chain(20, 32, 16, 4)
    first = prune_(copy.deepcopy(model), x, 0.1, run=tmp_path, callback=lambda name, point: True)
    assert {row.status for row in first.layers} == {str(Status.STOPPED)}
    assert prune_(model, x, 0.1, run=tmp_path).certified


def test_the_time_for_a_layer_is_that_of_all_its_groups() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(24, 24, 3, groups=24), nn.ReLU()), torch.randn(300, 24, 8, 8)
    report = prune_(model, x, 0.05, tol=1e-9, max_iter=10**6, layer_time_limit=1.0)
    assert report.layers[0].seconds < 20  # each of the 24 would take its second, on whatever machine
    assert report.layers[0].output_error <= 0.05 * (1 + 1e-3)


def test_neurons_go_from_all_layers_or_from_none_when_a_run_is_stopped() -> None:
    model, x = chain(12, 20, 20, 20, 4)
    same = unchanged(model)
    calls_so_far = itertools.count()
    counts = []
    for most in range(0, 120, 16):
        copied = copy.deepcopy(model)
        calls_so_far = itertools.count()
        report = prune_(copied, x, sparsity=0.4, unit="neurons", stop=lambda: next(calls_so_far) > most)  # noqa: B023
        if report.provenance["stopped"]:
            assert not report.layers
            assert not report.certified
            assert all(torch.equal(a, b) for a, b in zip(copied.parameters(), model.parameters(), strict=True))
        counts.append(len(report.layers))
    assert same()
    assert counts[0] == 0


def test_a_path_search_without_the_iterations_to_converge_empties_nothing() -> None:
    model, x = chain(20, 32, 16, 4, samples=200)
    report = prune_(model, x, sparsity=0.5, search="path", max_iter=4)
    assert all(row.nonzeros > 0.2 * row.nonzeros_before for row in report.layers)
    assert any("iteration limit" in note for row in report.layers for note in row.notes)


def test_of_nearly_no_weights_each_layer_keeps_one() -> None:
    model, x = chain(8, 9, 4)
    report = prune_(model, x, sparsity=0.9999, scope="network")
    assert [row.nonzeros for row in report.layers] == [1, 1]
