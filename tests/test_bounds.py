"""The bound holds for any weights with their exactly computed radii, is tight where it should be, and never guesses."""

import copy
import importlib
import math
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import Net
from torch import nn
from torch.nn import functional as F  # noqa: N812 - its usual name
from transformers.pytorch_utils import Conv1D

from convexprune.bounds import OutputBound, PrunedLayer, output_bound
from convexprune.solvers.errors import InvalidInput, InvalidTolerance

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))  # scripts, not a package
ResNet20 = importlib.import_module("resnet20").ResNet20

MODES = ["parallel", "cascade"]
SEEDS = st.integers(0, 2**16)


def randomised(model, seed=0):
    """All parameters and statistics drawn anew, in double precision and evaluation."""
    rng = torch.Generator().manual_seed(seed)
    model = model.double().eval()
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.is_floating_point():
                drawn = torch.randn(tensor.shape, generator=rng, dtype=torch.float64)
                fan_in = math.sqrt(max(1, tensor[0].numel() if tensor.ndim > 1 else 1))
                tensor.copy_(drawn.abs() + 0.5 if "running_var" in name else drawn / fan_in)
    return model


def pruned(model, layers, seed=1, size=0.1):
    """Copies of the layers' weights, and their norms' shifts, with noise and zeros."""
    rng = torch.Generator().manual_seed(seed)
    after = copy.deepcopy(model)
    with torch.no_grad():
        for layer in layers:
            tensors = list(after.get_submodule(layer.name).parameters())
            tensors += [] if layer.norm is None else [after.get_submodule(layer.norm).bias]
            for tensor in tensors:
                tensor += size * torch.randn(tensor.shape, generator=rng, dtype=torch.float64)
                tensor[torch.rand(tensor.shape, generator=rng) < 0.3] = 0
    return after


def received(model, names, x):
    """The inputs of each layer's calls."""
    seen = {name: [] for name in names}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, kept=seen[name]: kept.append(args[0].clone())
        )
        for name in names
    ]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return seen


def behind(model, layer, inputs):
    """What the layer, with its norm and ReLU, makes of its inputs, all in one row."""
    with torch.no_grad():
        outputs = [model.get_submodule(layer.name)(x) for x in inputs]
        outputs = outputs if layer.norm is None else [model.get_submodule(layer.norm)(z) for z in outputs]
        return torch.cat([(z.clamp(min=0) if layer.relu else z).flatten() for z in outputs])


def radii(before, after, layers, x, mode):
    names = [layer.name for layer in layers]
    trained = received(before, names, x)
    now = received(after, names, x) if mode == "cascade" else trained
    return {
        layer.name: float((behind(after, layer, now[layer.name]) - behind(before, layer, trained[layer.name])).norm())
        for layer in layers
    }


def difference(before, after, x):
    with torch.no_grad():
        pairs = zip(outputs(before, x), outputs(after, x), strict=True)
        return math.hypot(*(float((b - a).norm()) for a, b in pairs))


def outputs(model, x):
    found = model(x)
    return found if isinstance(found, tuple) else (found,)


def check(before, layers, x, mode, seed=1):
    """The bound holds; returned with the error."""
    after = pruned(before, layers, seed)
    found = output_bound(after, layers, x[:1], mode=mode)
    assert found.reason is None
    bound, error = found.at(radii(before, after, layers, x, mode)), difference(before, after, x)
    assert error <= bound * (1 + 1e-9)
    return found, bound, error


def images(seed, channels=2, size=6, samples=3):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(samples, channels, size, size, generator=rng, dtype=torch.float64)


# --- The bound holds ---


@pytest.mark.parametrize("mode", MODES)
@given(SEEDS, st.integers(1, 4), st.sampled_from([nn.ReLU(), nn.Tanh(), nn.GELU(), nn.LeakyReLU(2.0), nn.ELU(1.5)]))
def test_the_bound_holds_for_perceptrons(mode, seed, depth, activation):
    widths = [5, 7, 3, 6, 4][: depth + 1]
    steps = [step for n, m in pairwise(widths) for step in (nn.Linear(n, m), activation)]
    model = randomised(nn.Sequential(*steps[:-1]), seed)
    relu = isinstance(activation, nn.ReLU)
    layers = [PrunedLayer(str(2 * i), relu and i < depth - 1) for i in range(depth) if (seed >> i) % 4]
    check(model, layers, torch.randn(20, 5, dtype=torch.float64), mode, seed)


def convolutions(m, x):
    z = F.relu(m.bn1(m.conv1(x)))
    z = F.max_pool2d(z, 3, stride=2, padding=1)
    z = F.avg_pool2d(m.bn2(m.conv2(z)).relu(), 3, stride=1, padding=1)
    z = torch.sigmoid(m.conv3(z))
    return m.fc(F.dropout(torch.flatten(F.adaptive_avg_pool2d(z, 2), 1), training=m.training))


def conv_net():
    return Net(
        convolutions,
        conv1=nn.Conv2d(2, 4, 3, padding=1),
        bn1=nn.BatchNorm2d(4),
        conv2=nn.Conv2d(4, 4, 3, groups=2, padding=1, padding_mode="reflect", bias=False),
        bn2=nn.BatchNorm2d(4),
        conv3=nn.Conv2d(4, 6, 2, stride=2, dilation=2, padding=1),
        fc=nn.Linear(24, 3),
    )


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=10)
@given(SEEDS, st.booleans(), st.booleans())
def test_the_bound_holds_for_convolutions_with_norms_and_pools(mode, seed, folded, relu):
    layers = [
        PrunedLayer("conv1", folded and relu, "bn1" if folded else None),
        PrunedLayer("conv2", folded and relu, "bn2" if folded else None),
        PrunedLayer("conv3"),
        PrunedLayer("fc"),
    ]
    chosen = [layer for number, layer in enumerate(layers) if (seed >> number) % 4]
    check(randomised(conv_net(), seed), chosen, images(seed), mode, seed)


def residual(m, x):
    z = F.relu(m.stem(x))
    z = F.relu(m.bn(m.b(F.relu(m.a(z)))) + z)
    y = m.d(F.relu(m.c(z), inplace=True))
    y += m.short(z)
    return m.head(y.relu_().mean((2, 3)))


def residual_net():
    return Net(
        residual,
        stem=nn.Conv2d(2, 4, 3, padding=1),
        a=nn.Conv2d(4, 4, 3, padding="same"),
        b=nn.Conv2d(4, 4, 3, padding=1),
        bn=nn.BatchNorm2d(4),
        c=nn.Conv2d(4, 4, 3, stride=2, padding=1),
        d=nn.Conv2d(4, 6, 3, padding=1),
        short=nn.Conv2d(4, 6, 1, stride=2),
        head=nn.Linear(6, 3),
    )


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=10)
@given(SEEDS)
def test_the_bound_holds_for_residual_networks(mode, seed):
    layers = [PrunedLayer(name, name in ("stem", "a", "c")) for name in ("stem", "a", "d", "short", "head")]
    layers += [PrunedLayer("b", norm="bn")]
    chosen = [layer for number, layer in enumerate(layers) if (seed >> number) % 4]
    check(randomised(residual_net(), seed), chosen, images(seed), mode, seed)


@pytest.mark.parametrize("mode", MODES)
def test_resnet20_has_a_bound_through_its_sliced_and_padded_shortcuts(mode):
    model = randomised(ResNet20())
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    layers = [PrunedLayer(name, not name.endswith("2"), name.replace("conv", "bn")) for name in names]
    found, bound, error = check(model, layers, images(0, 3, 8, 2), mode)
    assert 0 < error < bound < math.inf
    if mode == "cascade":  # what lies inside a block does not count, the stream that it is added to does
        inside = [name for name in names if name.startswith("layer") and name.endswith("1")]
        assert all(found.coefficients[name] == 0 for name in inside)
        assert all(found.coefficients[name] > 0 for name in names if name not in inside)


@pytest.mark.parametrize("mode", MODES)
def test_a_layer_that_is_called_twice_and_layers_that_share_weights_count_at_each_call(mode):
    def forward(m, x):
        return m.a(m.b(m.a(x).relu()).relu())

    model = Net(forward, a=nn.Linear(4, 4), b=nn.Linear(4, 4))
    model = randomised(model)
    check(model, [PrunedLayer("a")], torch.randn(9, 4, dtype=torch.float64), mode)
    tied = Net(lambda m, x: m.b(m.a(x)), a=nn.Linear(4, 4, bias=False), b=nn.Linear(4, 4, bias=False))
    tied.b.weight = tied.a.weight
    after = output_bound(tied, [PrunedLayer("a")], torch.randn(1, 4), mode=mode)
    once = output_bound(
        nn.Sequential(tied.a, copy.deepcopy(tied.b)), [PrunedLayer("0"), PrunedLayer("1")], torch.randn(1, 4), mode=mode
    )
    assert after.coefficients["a"] == pytest.approx(sum(once.coefficients.values()))


# --- It is tight ---


@pytest.mark.parametrize("mode", MODES)
def test_the_last_layers_radius_is_the_networks_error(mode):
    model = randomised(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)))
    x = torch.randn(20, 4, dtype=torch.float64)
    found, bound, error = check(model, [PrunedLayer("2")], x, mode)
    assert found.coefficients == {"2": 1.0}
    assert bound == pytest.approx(error, rel=1e-12)


def test_orthogonal_weights_pass_an_error_on_as_it_is():
    model = randomised(nn.Sequential(*(nn.Linear(5, 5) for _ in range(4))))
    for layer in list(model)[1:]:
        nn.init.orthogonal_(layer.weight)
    _, bound, error = check(model, [PrunedLayer("0")], torch.randn(20, 5, dtype=torch.float64), "parallel")
    assert bound == pytest.approx(error, rel=1e-9)


def test_a_vector_of_greatest_gain_is_amplified_by_just_the_coefficient():
    model = randomised(nn.Sequential(nn.Linear(4, 6, bias=False), nn.Linear(6, 5)))
    left, sizes, _ = torch.linalg.svd(model[1].weight.detach().T)
    after = copy.deepcopy(model)
    with torch.no_grad():
        after[0].weight += torch.outer(left[:, 0], torch.ones(4, dtype=torch.float64))
    found = output_bound(after, [PrunedLayer("0")], torch.ones(1, 4).double())
    x = torch.randn(7, 4, dtype=torch.float64)
    assert found.coefficients["0"] == pytest.approx(float(sizes[0]))
    bound = found.at(radii(model, after, [PrunedLayer("0")], x, "parallel"))
    assert bound == pytest.approx(difference(model, after, x), rel=1e-9)


def test_in_a_cascade_layers_behind_which_all_is_pruned_do_not_count():
    model = randomised(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)))
    layers = [PrunedLayer("0"), PrunedLayer("2", relu=True)]
    found, _, _ = check(model, layers, torch.randn(9, 4, dtype=torch.float64), "cascade")
    assert found.coefficients == {
        "0": 0.0,
        "2": pytest.approx(float(torch.linalg.matrix_norm(model[4].weight.detach(), 2))),
    }


def test_outputs_count_together_and_branches_add_up():
    x = torch.randn(9, 4, dtype=torch.float64)
    two = Net(lambda m, x: (m.a(x), (m.b(x), m.a(x).argmax(1))), a=nn.Linear(4, 3), b=nn.Linear(4, 2))
    layers = [PrunedLayer("a"), PrunedLayer("b")]
    found = output_bound(two.double(), layers, x)
    assert found.coefficients == {"a": 1.0, "b": 1.0}
    same = Net(lambda m, x: (m.a(x),) * 2, a=nn.Linear(4, 3)).double()
    _, bound, error = check(same, [PrunedLayer("a")], x, "parallel")
    assert bound == pytest.approx(error)
    twice = Net(lambda m, x: torch.cat([y := m.a(x), y], 1) + torch.cat([y, y], 1), a=nn.Linear(4, 3)).double()
    _, bound, error = check(twice, [PrunedLayer("a")], x, "parallel")
    assert bound == pytest.approx(error)


def test_behind_a_norm_that_belongs_to_the_layer_its_radius_is_not_multiplied():
    model = randomised(nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.ReLU()))
    apart = output_bound(model, [PrunedLayer("0")], images(0)).coefficients["0"]
    assert apart == pytest.approx(float((model[1].weight.detach() / (model[1].running_var + 1e-5).sqrt()).abs().max()))
    for layer in (PrunedLayer("0", norm="1"), PrunedLayer("0", relu=True, norm="1")):
        found, _, _ = check(model, [layer], images(0), "parallel")
        assert found.coefficients == {"0": 1.0}


def test_what_comes_in_is_multiplied_by_the_norm_all_the_same():
    model = randomised(nn.Sequential(nn.Conv2d(2, 2, 1), nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.ReLU()))
    scale = float((model[2].weight.detach() / (model[2].running_var + 1e-5).sqrt()).abs().max())
    layers = [PrunedLayer("0"), PrunedLayer("1", True, "2")]
    now = pruned(model, layers)[1].weight.detach().flatten(1)
    found, _, _ = check(model, layers, images(0), "parallel")
    assert found.coefficients == {"0": pytest.approx(scale * float(torch.linalg.matrix_norm(now, 2))), "1": 1.0}


@pytest.mark.parametrize(
    "way",
    [
        lambda m, x: F.relu(F.max_pool2d(m.a(x), 2)),
        lambda m, x: m.a(x).flatten(1).clamp(min=0),
        lambda m, x: torch.relu_(F.dropout(m.a(x), training=False))[:, :, 1:],
    ],
)
def test_a_relu_is_found_behind_what_may_be_exchanged_with_it(way):
    found, _, _ = check(
        randomised(Net(way, a=nn.Conv2d(2, 3, 3))), [PrunedLayer("a", relu=True)], images(0), "parallel"
    )
    assert found.coefficients == {"a": 1.0}


# --- Constants of operations ---


def gain(operation, x):
    """‖A‖₂ of an affine operation on samples of x's shape."""
    units = torch.eye(x[0].numel(), dtype=torch.float64).reshape(-1, *x.shape[1:])
    with torch.no_grad():
        A = (operation(units) - operation(0 * units)).flatten(1)
    return float(torch.linalg.eigvalsh(A @ A.T)[-1].sqrt())


def constant(operation, x):
    """The coefficient of a layer that the operation follows directly; its outputs are of x's shape."""
    layer = nn.Linear(x.shape[-1], x.shape[-1])
    follows = operation if isinstance(operation, nn.Module) else Net(lambda _, v: operation(v))
    found = output_bound(nn.Sequential(layer, follows).double(), [PrunedLayer("0")], x)
    assert found.reason is None, found.reason
    return found.coefficients["0"]


LINEAR = [
    *(
        lambda x, k=k, s=s, p=p, c=c: F.avg_pool2d(x, k, s, p, count_include_pad=c)
        for k, s, p, c in [(2, 2, 0, True), (3, 1, 1, True), (3, 2, 1, False)]
    ),
    nn.AvgPool2d((3, 2), stride=2, ceil_mode=True, divisor_override=3),
    nn.AdaptiveAvgPool2d((4, 7)),
    lambda x: F.adaptive_avg_pool2d(x, 1),
    lambda x: x.mean((2, 3)),
    lambda x: x.sum(dim=1, keepdim=True),
    lambda x: x[:, ::2, 1:, :3],
    lambda x: F.pad(x[:, 0], (1, 2, 0, 1), value=3.0),
    nn.ReplicationPad2d(2),
    nn.ReflectionPad2d(1),
    lambda x: x.view(x.shape[0], -1, 2).transpose(1, 2).unsqueeze(-1).expand(-1, -1, -1, 3),
    lambda x: torch.cat([x.permute(0, 2, 3, 1).flatten(1), x.flatten(1)], 1),
    lambda x: x.chunk(2, 3)[1] + x[:, :1, :, :3] * 2,
    lambda x: 2 - x / 4 + torch.add(x, x, alpha=1),
    lambda x: x + x[:, :, :, :1],
    lambda x: -2.5 * x.flip(1),
]


@pytest.mark.parametrize("number", range(len(LINEAR)))
def test_linear_operations_have_their_norm_or_a_little_more(number):
    x = images(number, 2, 6, 1)
    norm = gain(LINEAR[number], x)
    assert norm * (1 - 1e-9) <= constant(LINEAR[number], x) <= 1.5 * norm


@pytest.mark.parametrize(
    ("forward", "shape"),
    [
        (lambda m, x: m.a(x) * m.fixed, (6,)),
        (lambda m, x: m.a(x)[:, None] / m.fixed.exp(), (3, 6)),
        (lambda m, x: m.a(x) @ m.fixed, (6, 4)),
        (lambda m, x: F.linear(m.a(x), m.fixed), (4, 6)),
    ],
)
def test_parameters_that_a_forward_uses_itself_are_constants(forward, shape):
    model = Net(forward, a=nn.Identity())
    model.fixed = nn.Parameter(torch.randn(shape, dtype=torch.float64))
    x = torch.randn(1, 6, dtype=torch.float64)
    norm = gain(model, x)
    model.a = nn.Linear(6, 6).double()
    found = output_bound(model, [PrunedLayer("a")], x).coefficients["a"]
    assert norm * (1 - 1e-9) <= found <= math.sqrt(3) * norm


SLOPED = {
    "relu": F.relu, "relu6": F.relu6, "hardtanh": F.hardtanh, "tanh": torch.tanh, "sigmoid": torch.sigmoid,
    "leaky_relu": lambda x: F.leaky_relu(x, -3.0), "elu": lambda x: F.elu(x, 2.0), "celu": nn.CELU(0.5),
    "selu": F.selu, "gelu": F.gelu, "gelu_tanh": nn.GELU("tanh"), "silu": F.silu, "mish": F.mish,
    "softplus": lambda x: F.softplus(x, 3.0), "softsign": F.softsign, "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid, "logsigmoid": F.logsigmoid, "softshrink": F.softshrink, "tanhshrink": F.tanhshrink,
    "abs": torch.abs, "clamp": lambda x: x.clamp(-1, 2), "neg": torch.neg,
}  # fmt: skip


@pytest.mark.parametrize("name", SLOPED)
def test_activations_have_their_largest_slope(name):
    x = torch.linspace(-30, 30, 120_001, dtype=torch.float64, requires_grad=True)
    (slopes,) = torch.autograd.grad(SLOPED[name](x).sum(), x)
    largest = float(slopes.abs().max())
    assert largest * (1 - 1e-12) <= constant(SLOPED[name], torch.ones(1, 3).double()) <= 1.001 * largest


@pytest.mark.parametrize(("operation", "sup"), [(lambda x: x.softmax(-1), 0.5), (nn.LogSoftmax(1), math.sqrt(4))])
def test_softmaxes_have_the_largest_norm_of_their_derivatives(operation, sup):
    assert constant(operation, torch.ones(1, 4).double()) == pytest.approx(sup)
    two = (
        torch.tensor([[30.0, 30.0, -30.0, -30.0]]).double() if sup == 0.5 else torch.tensor([[60.0, 0, 0, 0]]).double()
    )
    assert float(
        torch.linalg.matrix_norm(torch.autograd.functional.jacobian(operation, two).reshape(4, 4), 2)
    ) == pytest.approx(sup, rel=1e-6)


@given(SEEDS, st.sampled_from([(3, 1, 1, 1), (3, 2, 1, 1), (2, 2, 0, 1), (2, 1, 0, 2), (3, 2, 1, 2), 1, 2, 3, 4]))
def test_max_pools_spread_an_error_no_further_than_their_windows_overlap(seed, kind):
    pool = nn.AdaptiveMaxPool2d(kind) if isinstance(kind, int) else nn.MaxPool2d(*kind)
    x = images(seed, 1, 6, 1)
    found = constant(pool, x)
    one = torch.zeros_like(x)
    one[0, 0, seed % 6, seed // 6 % 6] = 100.0  # alone in each window that holds it
    assert float((pool(x + one) - pool(x)).norm()) <= found * 100 * (1 + 1e-9)
    y = x + images(seed + 1, 1, 6, 1)
    assert float((pool(x) - pool(y)).norm()) <= found * float((x - y).norm()) * (1 + 1e-9)
    reached = max(float((pool(e.reshape(x.shape)) - pool(0 * x)).norm()) for e in torch.eye(36, dtype=torch.float64))
    assert found <= 1.5 * reached


KERNELS = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(0, 2), st.integers(1, 2))


@settings(max_examples=40)
@given(
    SEEDS,
    st.integers(1, 3),
    KERNELS,
    st.sampled_from([1, 2]),
    st.sampled_from(["zeros", "circular", "reflect", "replicate"]),
)
def test_convolutions_have_at_least_their_norm_and_no_more_than_patches_give(seed, axes, kernel, groups, padding):
    size, stride, pad, dilation = kernel
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
    pad = min(pad, 4) if padding == "zeros" else min(pad, 2)
    conv = kind(2, 4, size, stride, pad, dilation, groups, padding_mode=padding)
    length = {1: 24, 2: 6, 3: 5}[axes]
    x = torch.zeros(1, 2, *[length] * axes, dtype=torch.float64)
    model = randomised(Net(lambda m, v: m.conv(m.first(v)), first=kind(2, 2, 1), conv=conv), seed)
    found = output_bound(model, [PrunedLayer("first")], x).coefficients["first"]
    plain = copy.deepcopy(conv)
    plain.bias = None
    exact = gain(plain, x)
    assert found >= exact * (1 - 1e-9)
    if padding == "zeros":
        overlap = (-(-size * math.gcd(stride, dilation) // stride)) ** axes
        patches = max(float(torch.linalg.matrix_norm(U.flatten(1), 2)) for U in conv.weight.detach().chunk(groups))
        assert found <= 1.1 * math.sqrt(overlap) * patches


@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (2, 2), (5, 3)])
@pytest.mark.parametrize("length", [40, 100])
def test_on_long_axes_convolutions_come_close_to_their_norm(kernel, stride, length):
    model = randomised(nn.Sequential(nn.Conv1d(2, 3, 1), nn.Conv1d(3, 3, kernel, stride)), seed=kernel)
    exact = gain(model[1], torch.zeros(1, 3, length).double())
    found = output_bound(model, [PrunedLayer("0")], torch.zeros(1, 2, length).double()).norms["1"]
    assert exact * (1 - 1e-9) <= found <= 1.03 * exact


def test_convolutions_too_large_for_frequencies_are_bounded_by_their_patches(monkeypatch):
    monkeypatch.setattr("convexprune.bounds.rules._EFFORT", 0)
    model = randomised(nn.Sequential(nn.Conv2d(2, 3, 1), nn.Conv2d(3, 4, 3, padding=1)))
    found = output_bound(model, [PrunedLayer("0")], images(0)).coefficients["0"]
    assert found == pytest.approx(3 * float(torch.linalg.matrix_norm(model[1].weight.detach().flatten(1), 2)))
    check(model, [PrunedLayer("0")], images(0), "parallel")


# --- It never guesses ---


class Stale(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x):
        y = x.view(-1, 4)
        x.add_(self.a(x))
        return y


UNKNOWN = {
    "LayerNorm": (nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), "'1' (LayerNorm) is not Lipschitz"),
    "attention": (
        Net(lambda m, x: m.attention(*[m.a(x)] * 3)[0], a=nn.Linear(4, 4), attention=nn.MultiheadAttention(4, 2)),
        "'attention' (MultiheadAttention) combines computed tensors",
    ),
    "product": (Net(lambda m, x: m.a(x) * m.a(x), a=nn.Linear(4, 4)), "mul combines computed tensors"),
    "square": (Net(lambda m, x: m.a(x) ** 2, a=nn.Linear(4, 4)), "pow is not Lipschitz"),
    "gate": (Net(lambda m, x: m.a(x) * x, a=nn.Linear(4, 4)), "mul combines computed tensors"),
    "reciprocal": (Net(lambda m, x: 1 / m.a(x), a=nn.Linear(4, 4)), "truediv is not Lipschitz"),
    "random": (Net(lambda m, x: F.dropout(m.a(x), 0.5), a=nn.Linear(4, 4)), "computes something else on the batch"),
    "batch norm": (
        nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False)),
        "'1' (BatchNorm1d) is not Lipschitz",
    ),
    "tied": (
        Net(lambda m, x: F.linear(m.b(x), m.a.weight) + m.a(x), a=nn.Linear(4, 4), b=nn.Linear(4, 4)),
        "uses parameters of pruned layers elsewhere",
    ),
    "written": (Stale(), "output uses a tensor that was changed in place"),
    "condition": (Net(lambda m, x: m.a(x) if x.sum() > 0 else x, a=nn.Linear(4, 4)), "cannot be traced by torch.fx"),
    "uncalled": (Net(lambda m, x: x, a=nn.Linear(4, 4)), "no call of a is seen"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNKNOWN)
def test_where_nothing_is_known_the_bound_is_infinite_and_says_why(name):
    model, reason = UNKNOWN[name]
    layer = "0" if isinstance(model, nn.Sequential) else "a"
    found = output_bound(model, [PrunedLayer(layer)], torch.randn(3, 4))
    assert found.coefficients == {layer: math.inf}
    assert reason in found.reason
    assert found.at({layer: 0.5}) == math.inf
    assert found.at({layer: 0.0}) == 0


def test_layers_inside_a_module_that_is_not_looked_into_have_no_bound():
    layers = [PrunedLayer("block.linear1"), PrunedLayer("a")]
    found = output_bound(
        Net(
            lambda m, x: m.block(m.a(x)), a=nn.Linear(4, 4), block=nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
        ),
        layers,
        torch.randn(2, 3, 4),
    )
    assert found.coefficients == {"block.linear1": math.inf, "a": math.inf}
    assert "'block' (TransformerEncoderLayer) uses parameters of pruned layers" in found.reason


def test_only_layers_before_the_unknown_operation_lose_their_bound():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4))
    found = output_bound(model, [PrunedLayer("0"), PrunedLayer("2")], torch.randn(3, 4))
    assert found.coefficients == {"0": math.inf, "2": 1.0}
    assert output_bound(model, [PrunedLayer("2")], torch.randn(3, 4)).reason is None


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (lambda m, x: F.relu(m.a(x) + x), "holds behind its ReLU, and its outputs reach add first"),
        (lambda m, x: F.gelu(m.a(x)), "reach gelu first"),
        (lambda m, x: m.a(x), "reach the outputs first"),
        (lambda m, x: m.a(x).mean(1).relu(), "reach mean first"),
    ],
)
def test_a_radius_is_not_used_before_the_relu_that_it_is_measured_behind(forward, reason):
    found = output_bound(Net(forward, a=nn.Linear(4, 4)), [PrunedLayer("a", relu=True)], torch.randn(3, 4))
    assert found.coefficients == {"a": math.inf}
    assert reason in found.reason


def test_a_norm_whose_shift_changed_is_not_used_elsewhere():
    def forward(m, x):
        return m.bn(m.a(x)) + m.bn(x)

    model = Net(forward, a=nn.Linear(4, 4), bn=nn.BatchNorm1d(4)).eval()
    assert output_bound(model, [PrunedLayer("a")], torch.randn(3, 4)).reason is None
    found = output_bound(model, [PrunedLayer("a", norm="bn")], torch.randn(3, 4))
    assert found.coefficients == {"a": math.inf}


def test_hooks_and_forwards_that_change_what_is_returned_are_not_trusted():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    x = torch.randn(3, 4)
    with_labels = output_bound(model, [PrunedLayer("0")], (x, x), forward=lambda m, batch: m(batch[0]))
    assert with_labels.coefficients == output_bound(model, [PrunedLayer("0")], x).coefficients
    scaled = output_bound(model, [PrunedLayer("0")], x, forward=lambda m, batch: 3 * m(batch))
    assert "does not return what one call of the model returns" in scaled.reason
    model[1].register_forward_hook(lambda _module, _args, output: 2 * output)
    assert "'1' (ReLU) has hooks" in output_bound(model, [PrunedLayer("0")], x).reason
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].register_forward_hook(lambda _module, _args, output: 2 * output)
    for mode in MODES:
        found = output_bound(model, [PrunedLayer("0"), PrunedLayer("1")], x, mode=mode)
        assert found.coefficients == {"0": math.inf, "1": math.inf}


# --- Layers of other kinds ---


class Attended(nn.Module):
    """Attention between two Linears; with ``skip`` its inputs also go past it."""

    def __init__(self, skip=False):
        super().__init__()
        self.a, self.attention, self.head = nn.Linear(4, 4), nn.MultiheadAttention(4, 2), nn.Linear(4, 3)
        self.skip = skip

    def forward(self, x):
        y = self.a(x)
        z = self.attention(x, x, x, need_weights=False)[0]
        return self.head(y + z if self.skip else z), y


ATTENTION = [PrunedLayer("attention.out_proj"), PrunedLayer("attention")]


@pytest.mark.parametrize("chosen", [ATTENTION[:1], ATTENTION[1:], ATTENTION])
def test_attentions_own_weights_have_no_bound(chosen):
    found = output_bound(Attended(), [*chosen, PrunedLayer("a")], torch.randn(5, 2, 4))
    assert found.coefficients == {**{layer.name: math.inf for layer in chosen}, "a": 1.0}
    assert found.reason == "'attention' (MultiheadAttention) has pruned weights, and attention is not Lipschitz"


@pytest.mark.parametrize("layers", [ATTENTION, ATTENTION[::-1]])
def test_in_a_cascade_a_later_layer_makes_good_what_attention_did(layers):
    layers = [*layers, PrunedLayer("a"), PrunedLayer("head")]
    before, x = randomised(Attended(skip=True)), torch.randn(5, 2, 4, dtype=torch.float64)
    after = pruned(before, layers)
    found = output_bound(after, layers, x, mode="cascade")
    assert found.coefficients == {"attention.out_proj": 0.0, "attention": 0.0, "a": 1.0, "head": 1.0}
    own = radii(before, after, layers[2:], x, "cascade")
    error = difference(before, after, x)
    assert 0 < error <= found.at({"attention.out_proj": 7.0, "attention": 7.0, **own}) < 1.5 * error


def test_attention_alone_is_a_network_without_a_bound():
    x = torch.randn(5, 2, 4)
    found = output_bound(nn.MultiheadAttention(4, 2), [PrunedLayer("")], (x, x, x))
    assert found.coefficients == {"": math.inf}
    assert "MultiheadAttention cannot be traced" in found.reason


@pytest.mark.parametrize("mode", MODES)
@given(SEEDS)
def test_a_transposed_linear_of_the_transformers_library_counts_as_a_linear(mode, seed):
    x = torch.randn(9, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    model = randomised(nn.Sequential(Conv1D(7, 5), nn.ReLU(), Conv1D(4, 7), nn.Tanh(), nn.Linear(4, 3)), seed)
    plain = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    with torch.no_grad():
        for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
            theirs.copy_(ours.mT if ours.shape != theirs.shape else ours)
    layers = [PrunedLayer("0", relu=True), PrunedLayer("4")]
    found, _, _ = check(model, layers, x, mode, seed)
    assert found.coefficients["4"] == 1.0
    unchanged = output_bound(model, layers, x[:1], mode=mode)
    same = output_bound(plain, layers, x[:1], mode=mode)
    assert unchanged.coefficients == pytest.approx(same.coefficients)
    assert unchanged.norms == pytest.approx(same.norms)
    assert "2" in unchanged.norms


def test_a_transposed_linear_with_a_forward_of_its_own_has_no_bound():
    class Scaled(Conv1D):
        def forward(self, x):
            return 2 * super().forward(x)

    found = output_bound(nn.Sequential(nn.Linear(5, 5), Scaled(4, 5)), [PrunedLayer("0")], torch.randn(3, 5))
    assert found.coefficients == {"0": math.inf}
    assert found.reason == "'1' (Scaled) has a forward of its own"


# --- What a forward creates ---


CREATED = {
    "added": (lambda m, x: m.b(m.a(x) + torch.arange(6)), 1.0),
    "scaling": (lambda m, x: m.b(m.a(x) * torch.linspace(-3.0, 1.0, 6)), 3.0),
    "one number": (lambda m, x: m.b(m.a(x) / torch.tensor(4.0)), 0.25),
    "indexing": (lambda m, x: m.b(m.a(x)[:, torch.tensor([5, 4, 3, 2, 1, 0])]), 1.0),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CREATED)
def test_tensors_that_a_forward_creates_have_no_error(name, mode):
    forward, factor = CREATED[name]
    model = randomised(Net(forward, a=nn.Linear(4, 6), b=nn.Linear(6, 2)))
    attributes = dict(vars(model))
    found, _, _ = check(model, [PrunedLayer("a")], torch.randn(7, 4, dtype=torch.float64), mode)
    norm = float(torch.linalg.matrix_norm(model.b.weight.detach(), 2))
    assert found.coefficients["a"] == pytest.approx(factor * norm, rel=1e-6)
    assert dict(vars(model)) == attributes


class Written(nn.Module):
    """Keeps what a layer gives in a tensor that is not computed from the data: its own, or one that it creates."""

    def __init__(self, created):
        super().__init__()
        self.a, self.created = nn.Linear(4, 4), created
        self.register_buffer("held", torch.zeros(4))

    def forward(self, x):
        kept = torch.zeros(4) if self.created else self.held
        kept.copy_(self.a(x)[0])
        return x + (kept if self.created else self.held)


@pytest.mark.parametrize("created", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_what_a_forward_keeps_in_a_tensor_beside_the_data_is_noticed(created, mode):
    found = output_bound(Written(created), [PrunedLayer("a")], torch.randn(3, 4), mode=mode)
    assert found.coefficients == {"a": math.inf}
    assert "uses a tensor that was changed in place" in found.reason


class Aliased(nn.Module):
    """Uses rows of the first layer's weight, which are no parameter, in place of a second layer."""

    def __init__(self, computed):
        super().__init__()
        self.a, self.computed = nn.Linear(4, 4), computed
        self.rows = self.a.weight.detach()[1:]

    def forward(self, x):
        return F.linear(torch.relu(self.a(x)), self.rows * 2 if self.computed else self.rows)


@pytest.mark.parametrize("computed", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_a_part_of_a_pruned_weight_that_is_used_elsewhere_is_noticed(computed, mode):
    found = output_bound(Aliased(computed), [PrunedLayer("a")], torch.randn(3, 4), mode=mode)
    assert found.coefficients == {"a": math.inf}
    assert ("also in a tensor that is no parameter" if computed else "uses parameters of pruned layers") in found.reason


# --- The call ---


def test_known_norms_are_not_computed_again_and_those_needed_are_returned():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 4))
    layers = [PrunedLayer("0"), PrunedLayer("2")]
    first = output_bound(model, layers, torch.randn(1, 4))
    assert set(first.norms) == {"2", "3"}
    again = output_bound(model, layers, torch.randn(1, 4), norms={"3": 2 * first.norms["3"]})
    assert again.coefficients == {name: pytest.approx(2 * c) for name, c in first.coefficients.items()}
    assert output_bound(model, layers, torch.randn(1, 4), mode="cascade").norms == {
        "3": pytest.approx(first.norms["3"])
    }


def test_in_parallel_a_coefficient_does_not_depend_on_the_weights_before_it():
    model = randomised(residual_net())
    layers = [PrunedLayer("d"), PrunedLayer("head")]
    before = output_bound(model, layers, images(0)).coefficients
    after = output_bound(pruned(model, [PrunedLayer("stem"), PrunedLayer("a")]), layers, images(0)).coefficients
    assert before == after


def test_options_keep_their_defaults_and_keywords_are_taken():
    class Optional(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x, scale=2.0, mask=None):
            y = self.a(x) * scale
            return y if mask is None else y * mask

    found = output_bound(Optional(), [PrunedLayer("a")], {"x": torch.randn(3, 4)})
    assert found.coefficients == {"a": 2.0}
    other = output_bound(Optional(), [PrunedLayer("a")], {"x": torch.randn(3, 4), "mask": torch.ones(4)})
    assert "cannot be run on the batch" in other.reason


def test_model_and_batch_are_left_as_found():
    model = Net(lambda m, x: m.bn(m.a(x.relu_())), a=nn.Linear(4, 4), bn=nn.BatchNorm1d(4)).train()
    before = copy.deepcopy(model.state_dict())
    attributes = [dict(vars(module)) for module in model.modules()]
    output_bound(model, [PrunedLayer("a")], torch.randn(3, 4))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert attributes == [dict(vars(module)) for module in model.modules()]
    assert model.training
    assert model.bn.training


def test_a_single_layer_is_a_network():
    assert output_bound(nn.Linear(4, 2), [PrunedLayer("")], torch.randn(3, 4)).coefficients == {"": 1.0}


def test_calls_that_cannot_be_meant_are_refused():
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU()), torch.randn(3, 4)
    for layers in ([PrunedLayer("7")], [PrunedLayer("1")], [PrunedLayer("0", norm="1")], [PrunedLayer("0")] * 2):
        with pytest.raises(InvalidInput):
            output_bound(model, layers, x)
    with pytest.raises(InvalidInput, match="mode: expected 'parallel' or 'cascade', found 'serial'"):
        output_bound(model, [PrunedLayer("0")], x, mode="serial")
    with pytest.raises(InvalidInput, match="the model failed on a batch"):
        output_bound(model, [PrunedLayer("0")], torch.randn(3, 5))
    found = OutputBound({"a": 2.0}, {}, None)
    with pytest.raises(InvalidInput, match=r"expected those of \['a'\], found \['b'\]"):
        found.at({"b": 1.0})
    with pytest.raises(InvalidTolerance):
        found.at({"a": -1.0})
