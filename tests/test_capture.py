import copy
from collections import namedtuple
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from convexprune.errors import EmptyCalibration
from convexprune.layers import input_matrices, weight_matrices
from convexprune.layers.memory import tensors_in
from convexprune.network.calibration import Calibration, as_batches
from convexprune.network.passes import network_outputs, observe
from convexprune.network.taps import tap
from convexprune.solvers.errors import InvalidInput, NonFinite


@dataclass
class Seen:
    """The inputs of a layer, call after call, and what follows it."""

    inputs: list
    activation: str | None


@dataclass
class Found:
    """What a pass shows."""

    layers: dict
    outputs: torch.Tensor
    samples: int


def capture(model, batches, names, forward=None, progress=None):
    inputs = {}

    def see(name, raw):
        inputs.setdefault(name, []).append(next(tensors_in(raw)).detach().clone())

    data = list(Calibration(batches, mask=False))
    taps = {name: (tap(model, name),) for name in names}
    found = observe(model, data, taps, forward=forward, see=see, progress=progress)
    layers = {name: Seen(inputs[name], layer.activation) for name, layer in found.layers.items()}
    return Found(layers, network_outputs(model, data, forward), found.samples)


class Net(nn.Module):
    """Linear layers ``fc`` (4 to 4) and ``out`` (4 to 2) around a given function."""

    def __init__(self, between, **modules):
        super().__init__()
        self.fc, self.out, self.between = nn.Linear(4, 4), nn.Linear(4, 2), between
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.out(self.between(self, x, self.fc(x)))


def hooks(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def activation(between, batch=None, **modules):
    batch = torch.randn(3, 4) if batch is None else batch
    return capture(Net(between, **modules), [batch], ["fc"]).layers["fc"].activation


def relu_in_place(net, x, y):
    y.relu_()
    return y


def relu_of_a_view_then_the_whole(net, x, y):
    y.view(-1).relu_()
    return y + x


def added_before_relu_in_place(net, x, y):
    total = y + x
    return total + y.relu_()


def relu_in_a_custom_function(net, x, y):
    class Clip(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z):
            return z.clamp(min=0)

    return Clip.apply(y)


RELU = {
    "functional": lambda net, x, y: functional.relu(y),
    "functional in place": lambda net, x, y: functional.relu(y, inplace=True),
    "torch": lambda net, x, y: torch.relu(y),
    "method": lambda net, x, y: y.relu(),
    "in place": relu_in_place,
    "in place, used later": lambda net, x, y: y.relu_() + y,
    "in place through a view, used later": relu_of_a_view_then_the_whole,
    "clamp": lambda net, x, y: y.clamp(min=0),
    "clamp by position": lambda net, x, y: torch.clamp(y, 0.0),
    "clamp_min": lambda net, x, y: y.clamp_min_(0),
    "twice": lambda net, x, y: functional.relu(y) + torch.relu(y),
    "flattened": lambda net, x, y: functional.relu(y.flatten(0)).reshape(3, 4),
    "transposed": lambda net, x, y: functional.relu(y.T.contiguous().permute(1, 0)),
    "viewed": lambda net, x, y: y.view(3, 2, 2).relu().reshape(3, 4),
    "cloned": lambda net, x, y: y.clone().to(torch.float64).relu().float(),
    "shape read": lambda net, x, y: (
        functional.relu(y) * y.size(0) * y.shape[1] * y.dim() * len(y) * (y.grad is None) * y.is_floating_point()
    ),
    "custom function": relu_in_a_custom_function,
}


@pytest.mark.parametrize("case", RELU)
def test_only_relu_follows(case):
    assert activation(RELU[case]) == "relu"


@pytest.mark.parametrize(
    "module",
    [
        nn.ReLU(),
        nn.ReLU(inplace=True),
        nn.Sequential(nn.Identity(), nn.Dropout(0.5), nn.ReLU()),
        nn.Sequential(nn.Dropout1d(0.9), nn.AlphaDropout(0.9), nn.Flatten(), nn.ReLU(inplace=True)),
        nn.Sequential(nn.Unflatten(1, (2, 2)), nn.ReLU(), nn.Flatten()),
    ],
)
def test_only_a_relu_module_follows(module):
    assert activation(lambda net, x, y: net.act(y), act=module) == "relu"


def overwritten(net, x, y):
    y[0] = 1
    return functional.relu(y)


OTHER = {
    "gelu": lambda net, x, y: functional.gelu(y),
    "sigmoid": lambda net, x, y: y.sigmoid(),
    "tanh": lambda net, x, y: y.tanh_(),
    "softmax": lambda net, x, y: functional.softmax(y, dim=-1),
    "leaky_relu": lambda net, x, y: functional.leaky_relu(y),
    "linear": lambda net, x, y: y,
    "add": lambda net, x, y: functional.relu(y + x),
    "clamp": lambda net, x, y: y.clamp(0, 6),
    "clamp_min": lambda net, x, y: y.clamp_min(0.1),
    "layer_norm": lambda net, x, y: functional.layer_norm(y, (4,)),
    "dropout": lambda net, x, y: functional.relu(functional.dropout(y, 1.0, training=True)),
    "getitem": lambda net, x, y: functional.relu(y[:, [0, 1, 2, 3]]),
    "narrow": lambda net, x, y: functional.relu(y.narrow(1, 0, 2)).repeat(1, 2),
    "cat": lambda net, x, y: torch.cat([y, y]).relu()[:3],
    "several: relu, add": lambda net, x, y: functional.relu(y) + y,
    "several: add, relu": added_before_relu_in_place,
    "several: relu, mul": lambda net, x, y: functional.relu(y.view(-1)).view(3, 4) + 0 * (x * y),
    "several: relu, tolist": lambda net, x, y: functional.relu(y) * y.tolist()[0][0],
    "several: setitem, relu": overwritten,
}


@pytest.mark.parametrize("expected", OTHER)
def test_something_else_follows(expected):
    assert activation(OTHER[expected]) == expected


def test_batch_norm_and_pooling_between_layer_and_relu():
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 2, 3), nn.MaxPool2d(2), nn.ReLU(inplace=True)
    )
    layers = capture(model, torch.randn(2, 1, 10, 10), ["0", "3"]).layers
    assert [layer.activation for layer in layers.values()] == ["batch_norm", "max_pool2d"]


class Residual(nn.Module):
    def __init__(self, returned):
        super().__init__()
        self.fc, self.returned = nn.Linear(4, 4), returned

    def forward(self, x):
        y = self.fc(x)
        return self.returned(y)


RETURNED = {
    "output": lambda y: {"logits": y.view(2, 2, -1)},
    "several: relu, output": lambda y: (functional.relu(y), [y]),
    "relu": lambda y: y.view(-1).relu_().view(-1, 4),
}


@pytest.mark.parametrize("expected", RETURNED)
def test_the_models_output_is_a_consumer(expected):
    assert capture(Residual(RETURNED[expected]), [torch.randn(3, 4)[:2]], ["fc"]).layers["fc"].activation == expected


def test_what_forward_does_to_the_output_is_a_consumer():
    found = capture(
        nn.Linear(4, 2), [torch.randn(3, 4)], [""], forward=lambda model, batch: functional.relu(model(batch))
    )
    assert found.layers[""].activation == "relu"
    assert bool((found.outputs >= 0).all())


class Shared(nn.Module):
    """Calls the same layer once for each given function."""

    def __init__(self, *after):
        super().__init__()
        self.fc, self.after = nn.Linear(4, 4), after

    def forward(self, x):
        for after in self.after:
            x = after(self.fc(x))
        return x + 0


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        ((functional.relu, functional.relu), "relu"),
        ((functional.relu, torch.sigmoid), "several: relu, sigmoid"),
        ((functional.gelu, functional.relu), "several: gelu, relu"),
    ],
)
def test_a_shared_layer_keeps_the_inputs_of_every_call(after, expected):
    model = Shared(*after)
    batches = [torch.randn(3, 4), torch.randn(2, 4)]
    layer = capture(model, batches, ["fc"]).layers["fc"]
    assert layer.activation == expected
    with torch.no_grad():
        second = [after[0](model.fc(batch)) for batch in batches]
    wanted = [batches[0], second[0], batches[1], second[1]]
    assert len(layer.inputs) == 4
    assert all(torch.equal(one, other) for one, other in zip(layer.inputs, wanted, strict=True))


def test_inputs_survive_in_place_operations():
    def grow(net, x, y):
        x += 1
        return net.second(y).relu_().add_(y.mul_(0))

    model = Net(grow, second=nn.Linear(4, 4))
    batch = torch.randn(3, 4)
    original = batch.clone()
    layers = capture(model, [batch], ["fc", "second"], forward=lambda model, batch: model(batch.clone())).layers
    assert torch.equal(layers["fc"].inputs[0], original)
    with torch.no_grad():
        assert torch.equal(layers["second"].inputs[0], model.fc(original))


def test_sizes_may_differ_between_batches():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU())
    batches = [torch.randn(2, 1, 6, 6), torch.randn(1, 1, 5, 8)]
    found = capture(model, batches, ["0"])
    X = torch.cat([input_matrices(model[0], inputs)[0] for inputs in found.layers["0"].inputs])
    assert X.shape == (2 * 16 + 18, 10)
    (U,) = weight_matrices(model[0])
    expected = torch.cat([model(batch).detach().permute(0, 2, 3, 1).reshape(-1, 2) for batch in batches])
    torch.testing.assert_close((X @ U).relu(), expected)
    assert found.outputs.shape == (50 * 2, 1)
    assert found.samples == 3


def test_sequence_lengths_may_differ():
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 3))
    found = capture(model, (torch.ones(2, length, dtype=torch.int64) for length in (3, 5)), ["1"])
    assert [tuple(inputs.shape) for inputs in found.layers["1"].inputs] == [(2, 3, 4), (2, 5, 4)]


@pytest.mark.parametrize("inference", [False, True])
def test_the_model_is_left_as_found(inference):
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 2)).train()
    model[2].eval()
    model[3].weight.requires_grad_(False)
    model(torch.randn(3, 4)).sum().backward()
    model[0].register_forward_hook(lambda *_: None)
    state, flags = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    needs = [p.requires_grad for p in model.parameters()]
    with torch.inference_mode(inference):
        before = torch.is_grad_enabled()
        found = capture(model, [torch.randn(3, 4) + 5], ["0", "3"])
        assert torch.is_grad_enabled() == before
        assert torch.is_inference_mode_enabled() == inference
    assert not found.layers["3"].inputs[0].is_inference()
    assert not found.outputs.requires_grad
    assert hooks(model) == 1
    assert flags == [module.training for module in model.modules()] == [True, True, True, False, True]
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert needs == [p.requires_grad for p in model.parameters()]
    assert all(g is p.grad is None or torch.equal(g, p.grad) for g, p in zip(grads, model.parameters(), strict=True))


@pytest.mark.parametrize(("error", "seen"), [(RuntimeError, InvalidInput), (KeyboardInterrupt, KeyboardInterrupt)])
@pytest.mark.parametrize("fails_at", [0, 1])
def test_the_model_is_left_as_found_after_a_failure(error, seen, fails_at):
    calls = iter(range(9))

    def fail(net, x, y):
        if next(calls) == fails_at:
            raise error("stop")
        return y

    model = Net(fail).train()
    model.out.eval()
    with pytest.raises(seen, match="stop"):
        capture(model, [torch.randn(3, 4)], ["fc", "out"])
    assert hooks(model) == 0
    assert model.fc.training
    assert not model.out.training
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("error", [ValueError, IndexError, KeyError, AttributeError, ZeroDivisionError])
def test_whatever_the_model_raises_on_a_batch_is_about_the_batch(error):
    def fail(net, x, y):
        raise error("too odd")

    with pytest.raises(InvalidInput, match=rf"failed on a batch of shape \[3, 4\] \({error.__name__}: .*too odd"):
        network_outputs(Net(fail), [torch.randn(3, 4)])


def test_what_torch_itself_says_of_a_batch_is_told():
    with pytest.raises(InvalidInput, match="ValueError: expected 2D or 3D input"):
        network_outputs(nn.BatchNorm1d(4), torch.rand(1, 1, 3, 4))
    with pytest.raises(InvalidInput, match="IndexError: index out of range"):
        network_outputs(nn.Embedding(5, 4), torch.full((6,), 7))


class Shift(nn.Module):
    """Changes its input in place."""

    def forward(self, x):
        return x.sub_(0.5)


@dataclass(frozen=True)
class Weighted:
    images: torch.Tensor
    weight: float


Named = namedtuple("Named", "images label")
KINDS = {
    "tensor": (lambda x: x, None),
    "tuple": (lambda x: (x,), None),
    "mapping": (lambda x: {"input": x}, None),
    "nested": (lambda x: {"a": [(x, 3)]}, lambda model, batch: model(batch["a"][0][0])),
    "named tuple": (lambda x: Named(x, "one"), lambda model, batch: model(batch.images)),
    "dataclass": (lambda x: Weighted(x, 1.0), lambda model, batch: model(batch.images)),
    "packed": (
        lambda x: nn.utils.rnn.PackedSequence(x, torch.tensor([len(x)])),
        lambda model, batch: model(batch.data),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("first", [Shift, lambda: nn.ReLU(inplace=True)])
def test_a_model_that_changes_its_inputs_changes_copies_of_them(kind, first):
    """Else each forward would see what the one before has left, and the caller, too."""
    make, forward = KINDS[kind]
    torch.manual_seed(0)
    model, x = nn.Sequential(first(), nn.Linear(4, 3)), torch.randn(5, 4)
    with torch.no_grad():
        want = model(x.clone())
    data = [make(x.clone())]
    for _ in range(2):
        assert torch.equal(network_outputs(model, data, forward), want)
    found = capture(model, data, ["1"], forward=forward)
    assert torch.equal(found.outputs, want)
    assert torch.equal(found.layers["1"].inputs[0], model[0](x.clone()))
    assert all(torch.equal(tensor, x) for tensor in tensors_in(data) if tensor.is_floating_point())


def test_the_model_runs_in_eval_mode_without_gradients():
    modes = []
    model = Net(lambda net, x, y: modes.append((net.training, torch.is_grad_enabled())) or y)
    network_outputs(model.train(), torch.randn(3, 4))
    assert modes == [(False, False)]


@pytest.mark.parametrize("fast", [True, False])
def test_the_fused_transformer_path_is_off_only_while_the_model_runs(fast):
    mha, seen = torch.backends.mha, []
    found = mha.get_fastpath_enabled()
    model = Net(lambda net, x, y: seen.append(mha.get_fastpath_enabled()) or y)
    mha.set_fastpath_enabled(fast)
    try:
        network_outputs(model, torch.randn(3, 4))
        assert seen == [False]
        assert mha.get_fastpath_enabled() == fast
    finally:
        mha.set_fastpath_enabled(found)


def test_transformer_layers_are_seen_in_eval_mode():
    model = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True).eval()
    found = capture(model, [torch.randn(2, 3, 4)], ["linear1", "linear2"])
    assert {name: layer.activation for name, layer in found.layers.items()} == {"linear1": "relu", "linear2": "add"}


def test_a_layer_that_is_never_called_is_absent():
    model = Net(lambda net, x, y: y, unused=nn.Linear(4, 4))
    assert set(capture(model, [torch.randn(3, 4)], ["fc", "unused"]).layers) == {"fc"}


def test_layers_are_in_the_order_of_their_first_calls():
    model = Net(lambda net, x, y: net.late(y) if len(x) == 2 else y, late=nn.Linear(4, 4))
    batches = [torch.randn(3, 4), torch.randn(2, 4)]
    assert list(capture(model, batches, ["late", "out", "fc"]).layers) == ["fc", "out", "late"]


def test_what_follows_a_layer_is_seen_on_the_first_batch_that_reaches_it():
    model = Net(lambda net, x, y: net.late(y).relu() if len(x) == 2 else y, late=nn.Linear(4, 4))
    found = capture(model, [torch.randn(3, 4), torch.randn(2, 4)], ["late"]).layers["late"]
    assert found.activation == "relu"
    assert [len(inputs) for inputs in found.inputs] == [2]


def test_inputs_given_by_keyword():
    class Keyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 2)

        def forward(self, x):
            return self.fc(input=x)

    batch = torch.randn(3, 4)
    assert torch.equal(capture(Keyword(), [batch], ["fc"]).layers["fc"].inputs[0], batch)


def test_hooks_of_others_change_neither_the_inputs_nor_hide_what_follows():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    model[0].register_forward_pre_hook(lambda module, args: (2 * args[0],))
    model[0].register_forward_hook(lambda module, args, output: output + 1)
    batch = torch.randn(3, 4)
    layer = capture(model, [batch], ["0"]).layers["0"]
    assert torch.equal(layer.inputs[0], 2 * batch)
    assert layer.activation == "add"


def test_unknown_name():
    with pytest.raises(InvalidInput, match=r"'fc2'.*named_modules"):
        capture(Net(relu_in_place), [torch.randn(3, 4)], ["fc2"])


def test_not_finite_inputs_of_a_layer():
    model = Net(lambda net, x, y: y / 0)
    with pytest.raises(NonFinite, match="'out'"):
        capture(model, [torch.randn(3, 4)], ["fc", "out"])
    assert hooks(model) == 0


def test_progress_after_each_batch():
    seen = []
    capture(Net(relu_in_place), [torch.randn(3, 4)] * 3, [], progress=seen.append)
    assert seen == [1, 2, 3]


class Sum(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, a, b):
        return self.scale * (a + b)


Pair = namedtuple("Pair", "a b")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_outputs_are_exact_in_a_precision_to_compute_in(dtype: torch.dtype) -> None:
    x = torch.randn(7, 4, dtype=dtype)
    outputs = network_outputs(nn.Identity(), x)
    assert outputs.dtype == (dtype if dtype == torch.float64 else torch.float32)
    assert torch.equal(outputs, x.to(outputs.dtype))


@pytest.mark.parametrize("kind", [dict, tuple, list, Pair])
def test_batches_of_several_parts(kind):
    a, b = torch.randn(3, 4), torch.randn(3, 4)
    batch = {"a": a, "b": b} if kind is dict else Pair(a, b) if kind is Pair else kind([a, b])
    assert torch.equal(network_outputs(Sum(), [batch]), a + b)
    kinds = []
    network_outputs(Sum(), [batch], forward=lambda model, batch: kinds.append(type(batch)) or torch.ones(3))
    assert kinds == [kind]


def test_labels_are_dropped_by_forward():
    data = TensorDataset(torch.randn(5, 4), torch.arange(5))
    model = Net(relu_in_place)
    with pytest.raises(InvalidInput, match=r"forward=lambda model, batch: model\(batch\[0\]\)"):
        capture(model, DataLoader(data, batch_size=2), ["fc"])
    found = capture(model, DataLoader(data, batch_size=2), ["fc"], forward=lambda model, batch: model(batch[0]))
    assert torch.equal(torch.cat(found.layers["fc"].inputs), data.tensors[0])
    assert found.samples == 5
    assert found.outputs.shape == (5, 2)


def test_type_errors_of_the_model_itself_are_not_hidden():
    with pytest.raises(InvalidInput, match="missing 1 required"):
        network_outputs(Sum(), [(torch.randn(3, 4),)])


def test_a_tensor_is_seen_in_batches():
    model, data = Net(relu_in_place), torch.randn(600, 4)
    found = capture(model, data, ["fc", "out"])
    assert [len(inputs) for inputs in found.layers["fc"].inputs] == [256, 256, 88]
    with torch.no_grad():
        torch.testing.assert_close(found.outputs, model(data))


@dataclass
class Answer:
    logits: torch.Tensor
    ids: torch.Tensor
    hidden: tuple


class Returns(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.make = make

    def forward(self, x):
        return self.make(x)


SHAPES = {
    "tensor": (lambda x: x.view(-1, 2, 2), (5, 4)),
    "tuple": (lambda x: (x, x[:, :1], len(x)), (5, 5)),
    "mapping": (lambda x: {"a": x, "b": None}, (5, 4)),
    "dataclass": (lambda x: Answer(x, x.argmax(1), (x, x.view(-1, 2, 2))), (5, 12)),
    "a value for each sample": (lambda x: x.sum(1), (5, 1)),
    "a value for each batch": (lambda x: x.sum(), (2, 1)),
    "nothing": (lambda x: x[:0], (2, 0)),
    "another first dimension": (lambda x: (x, x[:1]), (5 * 4 + 2 * 4, 1)),
}


@pytest.mark.parametrize("case", SHAPES)
def test_outputs_are_flattened(case):
    make, shape = SHAPES[case]
    data = torch.randn(5, 4)
    outputs = network_outputs(Returns(make), as_batches(data, 3))
    assert outputs.shape == shape
    if shape == (5, 4):
        assert torch.equal(outputs, data)


def test_outputs_without_numbers():
    with pytest.raises(InvalidInput, match="no floating-point tensor"):
        network_outputs(Returns(lambda x: x.argmax(1)), torch.randn(3, 4))


def test_tensors_and_arrays_are_cut_into_batches():
    data = torch.arange(10.0).view(5, 2)
    read_only = data.numpy().copy()
    read_only.flags.writeable = False
    for calibration in (data, read_only):
        batches = as_batches(calibration, batch_size=2)
        assert [len(batch) for batch in batches] == [2, 2, 1]
        assert torch.equal(torch.cat(batches), data)


def test_iterables_of_batches_are_listed():
    data = torch.ones(2, 3)
    assert len(as_batches(data for _ in range(3))) == 3
    assert as_batches([(data, data)]) == [(data, data)]
    (array,) = as_batches([np.ones((2, 3))])
    assert isinstance(array, torch.Tensor)
    batch = {"a": data, "note": "text"}
    assert as_batches(batch) == [batch]
    assert as_batches([data[:0], data])[0] is data


EMPTY = [torch.zeros(0, 3), np.zeros((0, 3)), [], iter([]), [torch.zeros(0, 3)], {"a": torch.zeros(0, 3)}]


@pytest.mark.parametrize("calibration", EMPTY)
def test_empty_calibration(calibration):
    with pytest.raises(EmptyCalibration, match="no sample"):
        as_batches(calibration)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_batches_that_are_not_finite(bad):
    good, poor = torch.ones(2, 3), torch.full((2, 3), bad)
    for calibration in ([good, poor], [(good,), (good, {"x": poor})], torch.cat([good, poor])):
        with pytest.raises(NonFinite, match="batch 1 "):
            as_batches(calibration, batch_size=2)


@pytest.mark.parametrize("calibration", [None, 3, "data", torch.tensor(1.0)])
def test_calibration_of_another_type(calibration):
    with pytest.raises(InvalidInput, match="or batches"):
        as_batches(calibration)


@pytest.mark.parametrize("size", [0, 2.5, "3", None])
def test_batch_sizes_are_whole_numbers_from_one(size):
    with pytest.raises(InvalidInput, match=f"batch_size: .* found {size!r}"):
        as_batches(torch.ones(2, 3), batch_size=size)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (torch.empty(3, 2, device="meta"), "batch 0 .* on the device 'meta'"),
        ([torch.ones(3, 2), torch.empty(3, 2, device="meta")], "batch 1 .* on the device 'meta'"),
        (np.array([object(), None]), "expected an array of numbers, found one of object"),
    ],
)
def test_data_without_values_are_refused(data, message):
    with pytest.raises(InvalidInput, match=message):
        as_batches(data)
