"""Passes over calibration data: nothing is kept that need not be, and streamed products give the same answers."""

import copy
import gc
import math
import weakref
from collections.abc import Iterator
from typing import Any

import networks
import pytest
import torch
from calls import prune_
from networks import Net
from promises import unchanged
from tolerances import ROUNDING
from torch import Tensor, nn
from torch.nn import functional

from convexprune.errors import EmptyCalibration
from convexprune.network.passes import observe, received
from convexprune.network.taps import tap
from convexprune.solvers import L1, Ball, LayerProgram, certify, solve
from convexprune.solvers.errors import InvalidInput, NonFinite
from convexprune.solvers.methods.registry import make_solver
from convexprune.solvers.programs import Gram


def mlp() -> nn.Sequential:
    """With its ReLUs in place."""
    model = networks.mlp(6, 8, 5, 3)
    model[1].inplace = model[3].inplace = True
    return model


def figures(calibration: Any, mode: str = "parallel") -> list[tuple[Any, ...]]:
    report = prune_(mlp(), calibration, mode=mode)
    assert report.samples == 60
    return [(row.name, row.samples, row.nonzeros, round(row.output_error, 2)) for row in report.layers]


class Read:
    """A data set that is made anew at each pass, and counts how many of its batches are alive."""

    def __init__(self, x: Tensor, size: int) -> None:
        self.x, self.size, self.passes, self.most = x, size, 0, 0
        self.alive: weakref.WeakSet[Tensor] = weakref.WeakSet()

    def __iter__(self) -> Iterator[Tensor]:
        self.passes += 1
        for part in self.x.split(self.size):
            self.alive.add(batch := part.clone())
            self.most = max(self.most, len(self.alive))
            yield batch
            del batch


@pytest.mark.parametrize("mode", ["parallel", "cascade"])
def test_however_the_samples_are_cut_the_answers_are_the_same(mode: str) -> None:
    torch.manual_seed(1)
    x = torch.randn(60, 6)
    want = figures([x], mode)
    cuts = [*x[:25].split([7, 0, 1, 17]), x[:0], *x[25:].split(35)]
    for data in (x, x.numpy(), cuts, iter(cuts), (part for part in cuts), tuple(cuts), Read(x, 11)):
        assert figures(data, mode) == want


@pytest.mark.parametrize("mode", ["parallel", "cascade"])
def test_of_a_data_set_only_the_batch_in_use_and_the_next_are_alive(mode: str) -> None:
    """And it is read once a layer, not more: to look, to solve each, to measure the error."""
    torch.manual_seed(1)
    data = Read(torch.randn(60, 6), 5)
    prune_(mlp(), data, mode=mode)
    assert data.most <= 2
    assert not data.alive
    assert 4 <= data.passes <= 7


class Watching:
    """ADMM, or what suits, that remembers what earlier layers gave it, and sees whether that is still in memory."""

    def __init__(self, name: str) -> None:
        self.method = make_solver(name, {})[1]
        self.seen: list[weakref.ref[Tensor]] = []
        self.kept: list[int] = []

    def refuses(self, program: LayerProgram) -> None:
        return None

    def run(self, program: LayerProgram, limits: Any, start: Any, watch: Any) -> Any:
        gc.collect()
        self.kept.append(sum(ref() is not None for ref in self.seen))
        proposal = self.method.run(program, limits, start, watch)
        arrays = [program.inputs, program.fit.Y, proposal.multipliers]
        self.seen += [weakref.ref(array) for array in arrays if isinstance(array, Tensor)]
        return proposal


@pytest.mark.parametrize("mode", ["parallel", "cascade"])
def test_memory_is_one_layers_data(mode: str) -> None:
    """When a layer is solved, no inputs, targets or multipliers of those before it are left."""
    torch.manual_seed(1)
    solver = Watching("admm")
    report = prune_(mlp(), torch.randn(60, 6), mode=mode, solver=solver)
    assert report.certified
    assert len(solver.seen) >= 9
    assert solver.kept == [0, 0, 0]


def test_the_forward_is_left_at_the_last_call_and_nothing_stays_behind() -> None:
    torch.manual_seed(1)
    model, calls = mlp().eval(), []
    model[4].register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(9, 6)
    with torch.no_grad():
        got = received(model, x, {name: (tap(model, name),) for name in ("2", "0")}, {"2": 1, "0": 1})
        want = functional.relu(model[0](x))
    assert torch.equal(*got["2"], want)
    assert torch.equal(*got["0"], x)
    assert not calls
    assert not any(module._forward_hooks for module in model[:4])
    with torch.no_grad():
        assert torch.equal(*received(model, x, {"2": (tap(model, "2"),)}, {"2": None})["2"], want)
    assert calls
    model[4]._forward_hooks.clear()


def test_layers_ahead_are_gathered_in_as_many_passes_as_their_room_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all fit there is one pass; else several; the same weights are kept."""

    def passes(room: int) -> tuple[int, dict[str, Tensor]]:
        torch.manual_seed(1)
        model, data = mlp(), Read(torch.randn(60, 6), 20)
        monkeypatch.setattr("convexprune.runs.run._ROOM", room)
        prune_(model, data, sparsity=0.5, method="sipp")
        return data.passes, model.state_dict()

    (together, weights), (apart, alike) = passes(2**30), passes(1)
    assert apart == together + 5  # each of three layers twice, to score it and to measure its error
    assert all(torch.equal(weights[name], alike[name]) for name in weights)


def test_in_place_operations_do_not_change_what_was_received() -> None:
    def overwriting(net: Any, x: Tensor) -> Any:
        x = x * 1
        y = net.shared(x)
        x.zero_()
        return net.shared(y.relu_())

    torch.manual_seed(1)
    model, x = Net(overwriting, shared=nn.Linear(4, 4)), torch.randn(7, 4)
    with torch.no_grad():
        first, second = received(model, x, {"": (tap(model, "shared"),)}, {"": 2})[""]
        assert torch.equal(first, x)
        assert torch.equal(second, model.shared(x).relu())


def bad(x: Tensor, value: float) -> list[Tensor]:
    parts = [part.clone() for part in x.split(20)]
    parts[2][3, 4] = value
    return parts


@pytest.mark.parametrize("mode", ["parallel", "cascade"])
@pytest.mark.parametrize("kind", ["in the data", "in the model", "raised", "no samples"])
def test_what_goes_wrong_in_the_middle_of_a_pass_leaves_the_model_as_it_was(kind: str, mode: str) -> None:
    torch.manual_seed(1)
    x, model = torch.randn(60, 6), mlp()
    data, error, match = {
        "in the data": (bad(x, torch.nan), NonFinite, "batch 2 of the calibration data"),
        "in the model": (bad(x, 3e38), NonFinite, "reaches layer"),
        "raised": ([*x.split(20), torch.randn(4, 5)], InvalidInput, "the model failed on a batch"),
        "no samples": ([x[:0], x[:0]], EmptyCalibration, "no sample"),
    }[kind]
    if kind == "in the model":
        with torch.no_grad():
            model[0].weight.mul_(1e3)
    same = unchanged(model)
    with pytest.raises(error, match=match):
        prune_(model, data, mode=mode)
    assert same()


@pytest.mark.parametrize("mode", ["parallel", "cascade"])
def test_a_first_operation_in_place_changes_neither_the_data_nor_the_report(mode: str) -> None:
    torch.manual_seed(1)
    x = torch.randn(60, 6)
    plain, shifted = nn.Sequential(nn.ReLU(), mlp()), nn.Sequential(nn.ReLU(inplace=True), mlp())
    trained, data = copy.deepcopy(shifted), x.clone()
    want, found = prune_(plain, x, mode=mode), prune_(shifted, data, mode=mode)
    assert torch.equal(data, x)
    assert [row.output_error for row in found.layers] == [row.output_error for row in want.layers]
    with torch.no_grad():
        before, after = trained(x.clone()), shifted(x.clone())
    assert found.output_error == pytest.approx(float((after - before).norm() / before.norm()), rel=1e-4)


def test_a_data_set_that_fails_in_a_later_pass_leaves_the_model_as_it_was() -> None:
    class Failing(Read):
        def __iter__(self) -> Iterator[Tensor]:
            if self.passes == 3:
                raise OSError("disk")
            yield from super().__iter__()

    torch.manual_seed(1)
    model = mlp()
    same = unchanged(model)
    with pytest.raises(OSError, match="disk"):
        prune_(model, Failing(torch.randn(60, 6), 20), mode="cascade")
    assert same()


def test_one_pass_tells_order_calls_samples_and_the_outputs_norm() -> None:
    torch.manual_seed(1)
    model, x = mlp().eval(), torch.randn(23, 6)
    seen: list[str] = []
    taps = {name: (tap(model, name),) for name in ("4", "0", "2")}
    found = observe(model, x.split(10), taps, see=lambda name, _: seen.append(name))
    assert list(found.layers) == ["0", "2", "4"]
    assert seen == ["0", "2", "4"] * 3
    assert [layer.activation for layer in found.layers.values()] == ["relu", "relu", "output"]
    assert {layer.calls for layer in found.layers.values()} == {1}
    with torch.no_grad():
        assert found.size == pytest.approx(float(model(x).double().norm()), rel=1e-6)
    assert found.samples == 23


def lifted(X: Tensor, Y: Tensor, gram: Gram, multipliers: Tensor) -> Tensor:
    """Multipliers of the real samples from those of X̃ and Ỹ: Q from X = QR, and the direction of what X misses of Y."""
    R, T = gram.inputs[:-1], gram.targets[:-1]
    Q = torch.linalg.lstsq(R.T, X.T).solution.T
    rest = Y - Q @ T
    length = rest.norm(dim=0)
    return Q @ multipliers[:-1] + rest / torch.where(length > 0, length, 1.0) * multipliers[-1]


@pytest.mark.parametrize("samples", [1100, 1500])
def test_streamed_products_prove_the_same_of_the_real_samples(samples: int) -> None:
    """Beyond 1,024 samples a linear fit keeps XᵀX alone; its weights and multipliers certify on the samples."""
    torch.manual_seed(1)
    x = torch.randn(samples, 7, dtype=torch.float64)
    model = nn.Sequential(nn.Linear(7, 4)).double()
    W = torch.cat([model[0].weight.detach().T, model[0].bias.detach()[None]])
    X = torch.cat([x, x.new_ones(samples, 1)], 1)
    Y = X @ W
    report = prune_(model, x.split(300), 0.2, tol=1e-6, keep_solutions=True)
    (row,), (solution,) = report.layers, report.solutions["0"]
    assert row.certified
    assert row.samples == samples
    gram = Gram.of([(X, Y)], torch.float64)
    assert solution.multipliers.shape == (9, 4)
    program = LayerProgram(X, Ball(Y, 0.2 * float(Y.norm())), _free_bias(8))
    again = certify(program, solution.weights, lifted(X, Y, gram, solution.multipliers))
    assert again.value == pytest.approx(row.value, rel=ROUNDING)
    assert again.bound == pytest.approx(row.bound, rel=1e-6)
    assert again.gap <= 2e-6
    assert float((X @ solution.weights - Y).norm() / Y.norm()) == pytest.approx(row.output_error, rel=1e-6)


def _free_bias(inputs: int) -> Any:
    return L1.free_bias(inputs)


def test_streamed_and_kept_give_the_same_layer() -> None:
    """The same weights by all samples in memory, a row of X each, as by their products."""
    torch.manual_seed(1)
    x = torch.randn(1200, 5)
    streamed, kept = nn.Sequential(nn.Linear(5, 4)), nn.Sequential(nn.Linear(5, 4))
    kept.load_state_dict(copy.deepcopy(streamed.state_dict()))
    one = prune_(streamed, x, 0.2, tol=1e-6, feas_tol=1e-6).layers[0]
    W = torch.cat([kept[0].weight.detach().T, kept[0].bias.detach()[None]]).double()
    X = torch.cat([x, x.new_ones(1200, 1)], 1).double()
    Y = X @ W
    other = solve(LayerProgram(X, Ball(Y, 0.2 * float(Y.norm())), _free_bias(6)), tol=1e-6, feas_tol=1e-6)
    assert one.value == pytest.approx(other.certificate.value, rel=1e-4)
    assert one.bound <= other.certificate.value * (1 + 1e-5)
    assert other.certificate.bound <= one.value * (1 + 1e-5)


# --- Forwards that do not repeat, or leave traces ---


@pytest.mark.parametrize("mode", ["parallel", "cascade"])
def test_a_forward_that_does_not_repeat_is_refused_unless_it_is_made_to(mode: str) -> None:
    """Noise between two layers, in eval mode as well."""

    def noisy(net: Any, x: Tensor) -> Any:
        return net.b(functional.dropout(net.a(x).relu(), 0.5, training=True))

    model, x = Net(noisy, a=nn.Linear(6, 8), b=nn.Linear(8, 3)), torch.randn(40, 6)
    same = unchanged(model)
    with pytest.raises(InvalidInput, match="what layer 'b' receives differs from call to call for one batch"):
        prune_(model, x, 0.1, mode=mode)
    assert same()
    report = prune_(model, x, 0.1, mode=mode, forward=lambda net, batch: (torch.manual_seed(0), net(batch))[1])
    assert report.certified


class Remembers(nn.Module):
    """Counts its calls, keeps its last inputs in a buffer of their size, and a sum in place; outputs depend on it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("last", torch.zeros(0))
        self.register_buffer("total", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last = x.detach()
        hidden = self.a(x + self.total)
        self.total.add_(x.mean(0))
        return self.b(hidden.relu())


@pytest.mark.parametrize("mode", ["parallel", "cascade"])
def test_what_a_forward_remembers_is_forgotten_after_each_pass(mode: str) -> None:
    """So passes agree with each other, whether a run succeeds or not, and the model is left as found."""
    torch.manual_seed(0)
    model, x = Remembers(), torch.randn(40, 6)
    with torch.no_grad():
        model(x)
    before, buffers = copy.deepcopy(model.state_dict()), dict(model.named_buffers())
    report = prune_(model, x.split(10), 0.1, mode=mode)
    assert report.certified
    assert report.network is not None
    assert report.network.kept
    with pytest.raises(InvalidInput, match="activation"):
        prune_(model, x, 0.1, mode=mode, activations={"nothing": "relu"})
    for name, buffer in model.named_buffers():
        assert buffer is buffers[name]
        assert torch.equal(buffer, before[name])


def test_noise_beside_the_outputs_is_seen_where_a_layer_receives_it() -> None:
    def way(net: Any, x: Tensor) -> Any:
        hidden = net.a(x).relu()
        net.kept = net.aside(hidden + torch.randn_like(hidden))
        return net.b(hidden)

    model = Net(way, a=nn.Linear(6, 8), b=nn.Linear(8, 3), aside=nn.Linear(8, 2))
    with pytest.raises(InvalidInput, match="what layer 'aside' receives differs"):
        prune_(model, torch.randn(40, 6), 0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_noise_is_told_from_rounding(dtype: torch.dtype) -> None:
    """A tenth of the outputs' size is far beyond any rounding; a sum in another order is within it."""

    def nearly(noise: float) -> nn.Module:
        return Net(lambda net, x: net.a(x + noise * torch.randn_like(x)), a=nn.Linear(6, 3)).to(dtype)

    x = torch.randn(40, 6).to(dtype)
    with pytest.raises(InvalidInput, match="does not repeat"):
        prune_(nearly(0.1), x, 0.1)
    assert prune_(nearly(torch.finfo(dtype).eps / 4), x, 0.1).layers


class Streaming(nn.Module):
    """Takes from each batch what the one before left."""

    def __init__(self, way: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.way = nn.Linear(6, 8), nn.Linear(8, 3), way
        self.register_buffer("last", torch.zeros(6))
        self.plain, self.steps = torch.zeros(6), 0

    def forward(self, x: Tensor) -> Tensor:
        outputs = self.b(self.a(x - self.last - self.plain).relu())
        ways = {
            "in place": lambda: self.last.copy_(x[-1]),
            "data": lambda: self.last.data.add_(x[-1]),
            "new data": lambda: setattr(self.last, "data", x[-1].detach()),
            "numpy": lambda: self.last.numpy().__iadd__(1.0),
            "reassigned": lambda: setattr(self, "last", x[-1].detach()),
            "attribute": lambda: setattr(self, "plain", x[-1].detach()),
        }
        ways[self.way]()
        self.steps += 1
        return outputs


@pytest.mark.parametrize("mode", ["parallel", "cascade"])
@pytest.mark.parametrize("way", ["in place", "data", "new data", "numpy", "reassigned", "attribute"])
def test_each_forward_starts_from_the_model_as_it_was_given(way: str, mode: str) -> None:
    """So every pass sees the same inputs, the layers' errors are those of that model, and nothing is left in it."""
    model, x = Streaming(way), torch.randn(80, 6, generator=torch.Generator().manual_seed(1)) + 1.0
    last, plain = model.last, model.plain
    batches = x.split(10)
    dense = copy.deepcopy(model)
    report = prune_(model, batches, 0.1, mode=mode)
    assert report.certified
    assert (model.last is last, model.plain is plain, model.steps) == (True, True, 0)
    assert not model.last.any()
    assert not model.plain.any()
    with torch.no_grad():
        before, after = (torch.cat([copy.deepcopy(net)(batch) for batch in batches]) for net in (dense, model))
    assert report.output_error == pytest.approx(float((after - before).norm() / before.norm()), rel=1e-4)


def test_outputs_without_a_size_are_refused() -> None:
    for value in (math.nan, -math.inf):
        model = Net(lambda net, x: net.a(x).masked_fill(x[:, :3] > 0, value), a=nn.Linear(6, 3))  # noqa: B023
        x = torch.randn(40, 6)
        with pytest.raises(NonFinite, match="outputs on the calibration data"):
            prune_(model, x, 0.1)
        report = prune_(model, x, 0.1, forward=lambda net, batch: net(batch).nan_to_num(neginf=0.0))
        assert math.isfinite(report.output_error)


@pytest.mark.parametrize("samples", [9, 99])
def test_looking_at_what_attention_receives_is_no_use_of_its_weights(samples: int) -> None:
    """Its out_proj sees what the attention gives, for which it is run again; of large batches a part is looked at."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), nn.Linear(8, 4)).eval()
    report = prune_(model, torch.randn(samples, 5, 8), sparsity=0.5, method="magnitude")
    names = ["0.self_attn", "0.self_attn.out_proj", "0.linear1", "0.linear2", "1"]
    assert [row.name for row in report.layers] == names
