"""Pruning whole models: the promise on each layer's output, the report, and a model that is never half pruned."""

import copy
import json
import sys
from collections.abc import Callable
from typing import Any

import networks
import numpy as np
import pytest
import torch
from calls import prune_
from torch import Tensor, nn
from torch.nn import functional

from convexprune import Options, layer_program
from convexprune.errors import EmptyCalibration, NothingToPrune, PruningFailed, UnsupportedModule
from convexprune.layers import input_matrices, output_matrices, weight_matrices, write_back_
from convexprune.solvers import Status, certify, solve
from convexprune.solvers.errors import (
    ConvexPruneError,
    Infeasible,
    InvalidInput,
    InvalidTolerance,
    MissingExtra,
    NonFinite,
    UnknownOption,
    UnknownSolver,
)
from convexprune.solvers.methods import Proposal

Made = tuple[nn.Module, Tensor]


def mlp(seed: int = 0) -> Made:
    return networks.mlp(12, 16, 8, 4, seed=seed), torch.rand(90, 12)


def convolutions(seed: int = 0) -> Made:
    torch.manual_seed(seed)
    first = nn.Conv2d(2, 6, 3, stride=2, padding=1)
    second = nn.Conv2d(6, 4, 3, padding="same", groups=2, bias=False)
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)), torch.rand(12, 2, 8, 8)


def layer_inputs(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """What reaches each layer, by a hook written here."""
    seen: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0].clone()}))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    ]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("make", [mlp, convolutions])
@pytest.mark.parametrize("fit", [None, "net-trim", "ball"])
def test_every_layer_keeps_its_promise_on_the_original_inputs(make: Callable[[], Made], fit: str | None) -> None:
    """‖σ(layer_pruned(x)) − σ(layer(x))‖ ≤ eps·‖σ(layer(x))‖ with the modules themselves, σ the ReLU or nothing."""
    model, x = make()
    dense = copy.deepcopy(model)
    report = prune_(model, x, 0.1, fit=fit)
    assert report.certified
    assert [row.fit for row in report.layers] == ([fit] * 3 if fit else ["relu-ball", "relu-ball", "ball"])
    for row in report.layers:
        inputs = layer_inputs(dense, x)[row.name]
        act: Callable[[Tensor], Tensor] = functional.relu if row.fit != "ball" else nn.Identity()
        with torch.no_grad():
            Y = act(dense.get_submodule(row.name)(inputs)).double()
            size = float(Y.norm()) or 1.0
            error = float((act(model.get_submodule(row.name)(inputs)).double() - Y).norm()) / size
        assert error <= 0.1 * (1 + 2e-4)
        assert error == pytest.approx(row.output_error, rel=1e-3)
        weight = model.get_submodule(row.name).get_parameter("weight")
        assert row.nonzeros == int(weight.count_nonzero()) < row.nonzeros_before == weight.numel()
        assert row.gap <= 1e-3
        assert row.violation <= 1e-4


def test_the_network_error_is_that_of_the_model_as_written() -> None:
    model, x = mlp()
    with torch.no_grad():
        before = model(x)
        report = prune_(model, x, 0.2)
        after = model(x)
    assert report.output_error == pytest.approx(float((after - before).norm() / before.norm()), rel=1e-5)


def test_parallel_layers_do_not_depend_on_each_other() -> None:
    together, x = mlp()
    alone = copy.deepcopy(together)
    prune_(together, x)
    report = prune_(alone, x, layers="2")
    assert torch.equal(together.get_parameter("2.weight"), alone.get_parameter("2.weight"))
    assert [skipped.name for skipped in report.skipped] == ["0", "4"]
    assert all("not chosen" in skipped.reason for skipped in report.skipped)


def test_the_same_call_gives_the_same_bits() -> None:
    first, x = convolutions()
    second = copy.deepcopy(first)
    prune_(first, x)
    prune_(second, x)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_solvers_can_be_swapped_and_agree() -> None:
    pytest.importorskip("cvxpy")
    values = []
    for solver in ("admm", "clarabel"):
        model, x = mlp()
        values.append([row.value for row in prune_(model, x, solver=solver, tol=1e-4, feas_tol=1e-5).layers])
    assert values[0] == pytest.approx(values[1], rel=1e-4, abs=1e-5)


def test_kept_solutions_certify_again() -> None:
    model, x = convolutions()
    dense = copy.deepcopy(model)
    report = prune_(model, x, keep_solutions=True)
    assert [len(report.solutions[row.name]) for row in report.layers] == [1, 2, 1]
    for group, solution in enumerate(report.solutions["2"]):
        program = layer_program(dense.get_submodule("2"), layer_inputs(dense, x)["2"], group=group)
        assert certify(program, solution.weights, solution.multipliers) == solution.certificate


@pytest.mark.parametrize("eps", [[0.1, 0.2, 0.3], {"0": 0.1, "[24]": 0.2}, {"4": 0.5, "*": 0.1}])
def test_eps_can_differ_by_layer(eps: Any) -> None:
    model, x = mlp()
    used = [row.eps for row in prune_(model, x, eps).layers]
    assert used == (
        eps if isinstance(eps, list) else [eps.get("0", 0.1), 0.2 if "0" in eps else 0.1, eps.get("4", 0.2)]
    )


def test_calibration_may_be_an_array_a_generator_or_labelled_batches() -> None:
    model, x = mlp()
    want = prune_(copy.deepcopy(model), x).to_dict()["layers"]
    labels = torch.zeros(90)
    for calibration, options in (
        (x.numpy(), {}),
        ((part for part in x.split(40)), {}),
        (list(zip(x.split(40), labels.split(40), strict=True)), {"forward": lambda net, batch: net(batch[0])}),
    ):
        got = prune_(copy.deepcopy(model), calibration, **options).to_dict()["layers"]
        assert [row["nonzeros"] for row in got] == [row["nonzeros"] for row in want]


class Residual(nn.Module):
    """A functional ReLU, a residual connection, a layer that is never called, an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.unused, self.embedding = nn.Linear(3, 3), nn.Embedding(4, 6)
        self.norm = nn.LayerNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.first(x + self.embedding(torch.zeros(len(x), dtype=torch.long))))
        z = self.second(x)
        return self.third(torch.sigmoid(self.norm(functional.relu(z) + z)))


def test_fits_follow_what_the_model_does_and_nothing_is_skipped_in_silence() -> None:
    torch.manual_seed(1)
    model = Residual()
    report = prune_(model, torch.randn(60, 6))
    assert {row.name: row.fit for row in report.layers} == {"first": "relu-ball", "second": "ball", "third": "ball"}
    reasons = {skipped.name: skipped.reason for skipped in report.skipped}
    assert set(reasons) == {"unused", "embedding"}
    assert "not called" in reasons["unused"]
    assert "Embedding" in str(report)
    assert "unused" in str(report)


class OwnRelu(nn.Module):
    """A ReLU that does not look like one."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(x.numpy().clip(0))


@pytest.mark.parametrize(("follows", "fit"), [(OwnRelu(), "relu-ball"), (nn.Softplus(), "ball")])
def test_an_activation_can_be_given_by_name_and_is_believed_if_it_is_true(follows: nn.Module, fit: str) -> None:
    model = nn.Sequential(nn.Linear(5, 4), follows, nn.Linear(4, 2))
    report = prune_(model, torch.rand(30, 5), activations={"0": "relu"})
    assert [row.fit for row in report.layers] == [fit, "ball"]
    assert bool(report.layers[0].notes) == (fit == "ball")


def test_tied_weights_are_left_alone_and_reported() -> None:
    model = networks.mlp(6, 6, 6, 2)
    model[2].weight = model[0].weight
    report = prune_(model, torch.rand(40, 6))
    assert [row.name for row in report.layers] == ["4"]
    assert all("shares a parameter" in skipped.reason for skipped in report.skipped)
    assert len(report.skipped) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions_are_judged_after_the_cast(dtype: torch.dtype) -> None:
    model, x = mlp()
    model, x = model.to(dtype), x.to(dtype)
    dense = copy.deepcopy(model)
    report = prune_(model, x, layers="0", keep_solutions=True)
    program = layer_program(dense.get_submodule("0"), x)
    written = weight_matrices(model.get_submodule("0"))[0]
    assert written.dtype == dtype
    again = certify(program, written, report.solutions["0"][0].multipliers)
    assert report.layers[0].violation == pytest.approx(again.violation, rel=1e-6, abs=1e-12)


def test_weights_beyond_the_range_of_the_dtype_are_not_written() -> None:
    """Inputs that float16 holds with a bit or two are fitted by weights that it cannot hold."""
    model = networks.mlp(12, 24, 4, seed=1).eval().half()
    x = (1e-6 * torch.randn(40, 12)).half()
    dense = copy.deepcopy(model)
    report = prune_(model, x, eps=1e-9)
    assert {row.status for row in report.layers} <= {"solved", "as trained"}
    assert any("not as rounded to float16" in note for row in report.layers for note in row.notes)
    torch.testing.assert_close(model(x), dense(x), rtol=1e-3, atol=0)


def test_rounding_can_cost_the_certificate_and_the_status_says_so() -> None:
    model, x = mlp()
    report = prune_(model.to(torch.bfloat16), x.to(torch.bfloat16), layers="0", tol=1e-5, feas_tol=1e-6)
    row = report.layers[0]
    assert row.violation > 1e-6 or row.gap > 1e-5
    assert row.status == "rounded"
    assert not report.certified


def test_report_is_data() -> None:
    model, x = mlp()
    report = prune_(model, x)
    loaded = json.loads(report.to_json())
    assert loaded["nonzeros"] == sum(row["nonzeros"] for row in loaded["layers"])
    assert set(loaded["layers"][0]) >= {"name", "shape", "nonzeros_before", "nonzeros", "value", "bound", "gap"}
    assert loaded["provenance"]["versions"]["torch"] == torch.__version__
    assert all(row.name in str(report) for row in report.layers)
    assert "solved" in str(report)


def test_one_layer_by_hand() -> None:
    """layer_program, solve, write_back_: the layer then computes X U."""
    layer = nn.Conv2d(3, 5, 3, padding=1)
    x = torch.rand(4, 3, 6, 6)
    program = layer_program(layer, x, eps=0.2)
    solution = solve(program)
    assert solution.status is Status.SOLVED
    write_back_(layer, solution.weights)
    (X,), (Z,) = input_matrices(layer, x), output_matrices(layer, layer(x))
    assert torch.allclose(X @ solution.weights, Z, atol=1e-5)


def test_the_bias_is_free_unless_asked() -> None:
    layer, x = nn.Linear(5, 3), torch.rand(40, 5)
    free, penalised = layer_program(layer, x), layer_program(layer, x, options=Options(penalise_bias=True))
    W = weight_matrices(layer)[0]
    assert float(free.penalty.value(W)) == pytest.approx(float(W[:-1].abs().sum()))
    assert float(penalised.penalty.value(W)) == pytest.approx(float(W.abs().sum()))


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"options": Options(fit="circle")}, InvalidInput),
        ({"eps": -0.1}, InvalidTolerance),
        ({"eps": float("nan")}, InvalidTolerance),
        ({"group": 1}, InvalidInput),
        ({"inputs": torch.rand(4, 7)}, ConvexPruneError),
        ({"inputs": torch.full((4, 5), torch.nan)}, NonFinite),
        ({"inputs": []}, ConvexPruneError),
        ({"layer": nn.Tanh()}, UnsupportedModule),
    ],
)
def test_layer_program_refuses(arguments: dict[str, Any], error: type[Exception]) -> None:
    good: dict[str, Any] = {"layer": nn.Linear(5, 3), "inputs": torch.rand(4, 5)}
    with pytest.raises(error):
        layer_program(**(good | arguments))


def test_a_grouped_convolution_needs_a_group() -> None:
    with pytest.raises(InvalidInput, match="2 groups"):
        layer_program(nn.Conv2d(4, 4, 3, groups=2), torch.rand(2, 4, 5, 5))


class Gives:
    """A solver that has one good answer, then something else."""

    def __init__(self, then: Callable[[], Proposal]) -> None:
        self.calls, self.then = 0, then

    def refuses(self, program: Any) -> None:
        return None

    def run(self, program: Any, limits: Any, start: Any, watch: Any) -> Proposal:
        self.calls += 1
        return Proposal(torch.zeros(program.shape), None, "own rule", 1, 0.0) if self.calls == 1 else self.then()


def interrupted() -> Proposal:
    raise KeyboardInterrupt


def stop_after_first(layer: str, point: Any) -> None:
    if layer != "0":
        raise RuntimeError("stop")


def nothing() -> Proposal:
    return Proposal(None, None, "failed", 1, 0.0, "no")


def not_a_number() -> Proposal:
    return Proposal(torch.full((17, 8), torch.nan), None, "own rule", 1, 0.0)


def all_zero() -> Proposal:
    return Proposal(torch.zeros(17, 8), None, "own rule", 1, 0.0)


def dear() -> Proposal:
    return Proposal(torch.full((17, 8), 1e9), None, "iteration limit", 1, 0.0)


BAD_CALLS: dict[str, tuple[dict[str, Any], type[BaseException]]] = {
    "wrong shapes": ({"data": torch.rand(5, 7)}, InvalidInput),
    "NaN inputs": ({"data": torch.full((5, 12), torch.nan)}, NonFinite),
    "infinite inputs": ({"data": np.full((5, 12), np.inf)}, NonFinite),
    "empty tensor": ({"data": torch.rand(0, 12)}, EmptyCalibration),
    "no batches": ({"data": []}, EmptyCalibration),
    "negative eps": ({"eps": -1.0}, InvalidTolerance),
    "NaN eps": ({"eps": float("nan")}, InvalidTolerance),
    "one eps too few": ({"eps": [0.1, 0.1]}, InvalidInput),
    "eps without a match": ({"eps": {"nothing": 0.1}}, InvalidInput),
    "infeasible ceiling": ({"fit": "net-trim", "ceiling": -1e4, "penalise_bias": True}, Infeasible),
    "unknown solver": ({"solver": "adm"}, UnknownSolver),
    "unknown option": ({"solver": "admm", "rhoo": 1.0}, UnknownOption),
    "unknown fit": ({"fit": "circle"}, InvalidInput),
    "unknown mode": ({"mode": "sideways"}, InvalidInput),
    "pattern without a match": ({"layers": "conv*"}, NothingToPrune),
    "bad tolerance": ({"tol": -1.0}, InvalidTolerance),
    "failing callback": ({"callback": stop_after_first}, RuntimeError),
    "solver with nothing": ({"solver": Gives(nothing), "sparsity": 0.5}, PruningFailed),
    "solver with NaN": ({"solver": Gives(not_a_number), "sparsity": 0.5}, PruningFailed),
    "Ctrl-C": ({"solver": Gives(interrupted)}, KeyboardInterrupt),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_after_an_error_the_model_is_as_it_was(case: str) -> None:
    arguments, error = BAD_CALLS[case]
    model, x = mlp()
    model[1].eval()
    before, flags = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    with pytest.raises(error) as caught:
        prune_(model, **({"data": x} | arguments))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == flags
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert str(caught.value) or error is KeyboardInterrupt


@pytest.mark.parametrize("proposal", [nothing, not_a_number, all_zero, dear])
def test_where_nothing_better_is_found_the_trained_weights_stay(proposal: Callable[[], Proposal]) -> None:
    """They keep the promise, whatever became of the solve: no layer fails a model that has feasible weights."""
    model, x = mlp()
    before = copy.deepcopy(model.state_dict())
    report = prune_(model, x, eps=0.1, layers=["0"], solver=Gives(proposal))
    row = report.layers[0]
    assert row.status == "as trained"
    assert row.certified
    assert row.output_error <= row.promised <= 0.1 * (1 + 1e-12)
    assert "the trained ones stay" in row.notes[-1]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("mode", "eps"), [("parallel", 0.0), ("cascade", 1e-9), ("parallel", 1e-7), ("cascade", 1e-7), ("parallel", 1e-6)]
)
def test_a_small_eps_has_a_status_for_each_layer(mode: str, eps: float) -> None:
    """Few samples in float32: rounding alone moves outputs by more than the smaller of these allow."""
    model, x = mlp()
    report = prune_(model, x[:6], eps=eps, mode=mode)
    for row in report.layers:
        assert row.status in ("solved", "rounded", "as trained")
        assert row.output_error <= row.promised + 1e-6  # measured in float32


def test_rounding_is_made_room_for() -> None:
    """The conic answer in float64, once rounded to float32, would miss so small an eps; a smaller set does not."""
    model, x = mlp()
    report = prune_(model, x[:6], eps=1e-5, layers=["0"], solver="clarabel")
    assert report.layers[0].status == "solved"


def test_nan_weights_are_found_before_anything_is_solved() -> None:
    model, x = mlp()
    with torch.no_grad():
        model[4].weight[0, 0] = torch.nan
    solver = Gives(interrupted)
    with pytest.raises(NonFinite):
        prune_(model, x, solver=solver)
    assert solver.calls == 0


def test_a_failure_while_writing_restores_every_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = mlp()
    before = copy.deepcopy(model.state_dict())

    def fail(*_: Any) -> Tensor:
        raise MemoryError

    monkeypatch.setattr("convexprune.prune.network_promise", fail)
    with pytest.raises(MemoryError):
        prune_(model, x)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_cvxpy_missing_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cvxpy", None)
    monkeypatch.setattr("convexprune.solvers.methods.direct.find_spec", lambda name: None)
    model, x = mlp()
    with pytest.raises(MissingExtra, match=r'pip install "convexprune\[reference\]"'):
        prune_(model, x, solver="cvxpy")


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(NothingToPrune, match="no layer that can be pruned"):
        prune_(nn.Sequential(nn.Embedding(3, 3), nn.ReLU()), torch.zeros(3, dtype=torch.long))


def test_limits_that_run_out_are_reported_not_hidden(caplog: pytest.LogCaptureFixture) -> None:
    """The trained weights stay, or weights that keep the promise, of which the bound is not yet close."""
    model, x = mlp()
    dense = copy.deepcopy(model)
    report = prune_(model, x, max_iter=3)
    assert not any(row.proven for row in report.layers)
    assert {row.status for row in report.layers} <= {"as trained", "iteration limit"}
    kept = [row.status == "as trained" for row in report.layers]  # rounding decides about the last layer
    assert kept[:2] == [True, True]
    for row, number, as_trained in zip(report.layers, (0, 2, 4), kept, strict=True):
        assert torch.equal(model[number].weight, dense[number].weight) is as_trained
        assert "ended iteration limit" in row.notes[-1] if as_trained else row.violation <= 1e-4
    assert "raise max_iter" in caplog.text


def test_a_callers_autocast_does_not_hide_what_was_written() -> None:
    """Its cache of rounded weights would make every measured error 0, and cascade the same as parallel."""
    model, x = mlp()
    dense = copy.deepcopy(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        report = prune_(model, x, 0.3, mode="cascade")
    with torch.no_grad():
        error = float((model(x) - dense(x)).norm() / dense(x).norm())
    assert error > 0.01
    assert report.output_error == pytest.approx(error, rel=1e-3)
