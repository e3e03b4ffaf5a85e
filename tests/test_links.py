"""Links are true: a neuron reaches the rest of the network through its columns in the link's consumers alone."""

import copy

import pytest
import tolerances
import torch
from networks import JOINT, Axes, Perceptron, resnet
from torch import fx, nn
from torch.nn import functional

from convexprune.errors import UnsupportedModule
from convexprune.network.links import Link, find_links
from convexprune.solvers.errors import InvalidInput


class Net(nn.Module):
    """``first`` (3 to 4), something between, ``second`` (4 to 2): linear layers or convolutions."""

    def __init__(self, between, *, conv=False, second=None, **modules):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1) if conv else nn.Linear(3, 4)
        self.second = second or (nn.Conv2d(4, 2, 3) if conv else nn.Linear(4, 2))
        self.between = between
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.second(self.between(self, self.first(x)))


def images(*shape):
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def prepared(model):
    """In float64 and eval mode, with norms that do something."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            for tensor in [*module.parameters(), module.running_mean, module.running_var]:
                if tensor is not None:
                    nn.init.uniform_(tensor, 0.5, 1.5)
    return model.double().eval()


def columns(model, link, neuron):
    """The consumers' weights that belong to the neuron."""
    for name, repeat in zip(link.consumers, link.repeat, strict=True):
        yield model.get_submodule(name).weight[:, neuron * repeat : (neuron + 1) * repeat]


@torch.no_grad()
def assert_true(model, link, x, joined=lambda outputs: outputs):
    """Without its columns a neuron's weights do not matter; with them they do."""
    producer, matters = model.get_submodule(link.producer), False
    for neuron in sorted({0, 1, len(producer.weight) - 1}):
        found = copy.deepcopy(model.state_dict())
        outputs = joined(model(x))
        producer.weight[neuron] += torch.randn_like(producer.weight[neuron])
        matters |= bool((joined(model(x)) - outputs).abs().max() > tolerances.CHANGED)  # a ReLU may silence some
        for weights in columns(model, link, neuron):
            weights.zero_()
        cut = joined(model(x))
        producer.weight[neuron] += torch.randn_like(producer.weight[neuron])
        torch.testing.assert_close(joined(model(x)), cut, rtol=0, atol=tolerances.EXACT)
        model.load_state_dict(found)
    assert matters


def found(model, x):
    """The links, each of them true, and the reasons by the names of the skipped modules."""
    torch.manual_seed(0)
    prepared(model)
    links, skipped = find_links(model)
    for name, link in links.items():
        assert name == link.producer
        assert_true(model, link, x)
    return links, {module.name: module.reason for module in skipped}


def between(step, /, x=None, **options):
    """The link of ``first`` where ``step`` stands behind it."""
    x = x if x is not None else images(3, 6, 6) if options.get("conv") else images(3)
    links, reasons = found(Net(step, **options), x)
    assert "the network's outputs" in reasons["second"]
    assert links.keys() == {"first"}, reasons
    return links["first"]


def reason(step, /, **options):
    """Why ``first`` cannot be shrunk where ``step`` stands behind it."""
    links, skipped = find_links(Net(step, **options))
    assert not links
    return next(module.reason for module in skipped if module.name == "first")


ELEMENTWISE = {
    "relu": lambda net, x: functional.relu(x),
    "relu in place": lambda net, x: functional.relu(x, inplace=True),
    "relu of torch": lambda net, x: torch.relu(x),
    "relu of torch in place": lambda net, x: torch.relu_(x),
    "relu as a method": lambda net, x: x.relu(),
    "relu as a method in place": lambda net, x: x.relu_(),
    "sigmoid": lambda net, x: x.sigmoid(),
    "tanh": lambda net, x: torch.tanh(x),
    "gelu": lambda net, x: functional.gelu(x),
    "softplus": lambda net, x: functional.softplus(x),
    "silu": lambda net, x: functional.silu(x),
    "leaky_relu": lambda net, x: functional.leaky_relu(x, 0.2),
    "logsigmoid": lambda net, x: functional.logsigmoid(x),
    "elu": lambda net, x: functional.elu(x, 0.5),
    "hardtanh": lambda net, x: functional.hardtanh(x, -1.0, 2.0),
}
MODULES = [nn.ReLU(), nn.ReLU(inplace=True), nn.Sigmoid(), nn.Softplus(), nn.Tanh(), nn.GELU(), nn.LeakyReLU()]
MODULES += [nn.ELU(), nn.SiLU(), nn.Mish(), nn.ReLU6(), nn.Hardswish(), nn.PReLU(), nn.SELU(), nn.LogSigmoid()]


@pytest.mark.parametrize("case", ELEMENTWISE)
@pytest.mark.parametrize("conv", [False, True])
def test_functions_and_methods_are_activations(case, conv):
    own = "own " if case in ("leaky_relu", "elu", "hardtanh") else ""  # with parameters of its own
    assert between(ELEMENTWISE[case], conv=conv).activation == own + case.split()[0]


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_modules_are_activations(module):
    name = between(lambda net, x: net.act(x), act=module).activation
    assert name.replace("own ", "").replace("_", "") == type(module).__name__.lower()
    assert name.startswith("own ") == isinstance(module, nn.PReLU)  # its slope is learned


def test_no_activation():
    assert between(lambda net, x: x).activation is None
    assert between(lambda net, x: net.drop(net.same(x)), drop=nn.Dropout(), same=nn.Identity()).activation is None


def test_two_activations_are_several():
    assert between(lambda net, x: x.tanh().relu()).activation == "several: tanh then relu"


@pytest.mark.parametrize(
    ("options", "activation"),
    [
        ({}, "relu"),
        ({"affine": False}, "relu"),
        ({"track_running_stats": False}, "several: norm by the batch then relu"),
    ],
)
def test_norms_on_the_way(options, activation):
    link = between(lambda net, x: net.norm(x).relu(), norm=nn.BatchNorm1d(4, **options))
    assert (link.norms, link.activation) == (("norm",), activation)


FLATTENED = {
    "function": lambda net, x: torch.flatten(x, 1),
    "function with names": lambda net, x: torch.flatten(input=x, start_dim=1),
    "method": lambda net, x: x.flatten(1),
    "method with a name": lambda net, x: x.flatten(start_dim=1),
    "to the last axis": lambda net, x: x.flatten(1, 3),
    "view": lambda net, x: x.view(x.size(0), -1),
    "view of a shape": lambda net, x: x.view(x.shape[0], -1),
    "reshape to a tuple": lambda net, x: x.reshape((x.size()[0], -1)),
    "reshape of torch": lambda net, x: torch.reshape(x, (x.shape[0], -1)),
    "after relu": lambda net, x: x.relu().flatten(1),
    "before relu": lambda net, x: functional.relu(x.flatten(1), inplace=True),
    "twice": lambda net, x: x.flatten(1).view(x.size(0), -1),
}


@pytest.mark.parametrize("case", FLATTENED)
def test_a_flattened_map_repeats_its_positions(case):
    assert between(FLATTENED[case], conv=True, second=nn.Linear(4 * 36, 2)).repeat == (36,)


@pytest.mark.parametrize("between_", [nn.Flatten(), nn.Sequential(nn.Dropout2d(), nn.Flatten(1, -1), nn.Dropout())])
def test_flatten_modules(between_):
    assert between(lambda net, x: net.step(x), conv=True, second=nn.Linear(144, 2), step=between_).repeat == (36,)


POOLED = {
    "average": lambda net, x: functional.avg_pool2d(x, x.size()[3]).view(x.size(0), -1),
    "average by shape": lambda net, x: functional.avg_pool2d(x, x.shape[-1]).flatten(1),
    "adaptive average": lambda net, x: functional.adaptive_avg_pool2d(x, 1).flatten(1),
    "adaptive maximum": lambda net, x: functional.adaptive_max_pool2d(x, 1).flatten(1),
    "maximum": lambda net, x: functional.max_pool2d(x, 6).flatten(1),
    "maximum of torch": lambda net, x: torch.max_pool2d(x, 6).flatten(1),
}


@pytest.mark.parametrize("case", POOLED)
def test_pools(case):
    assert between(POOLED[case], conv=True, second=nn.Linear(4, 2)).repeat == (1,)


@pytest.mark.parametrize("pool", [nn.MaxPool2d(2), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(3), nn.AdaptiveMaxPool2d(3)])
def test_pool_modules(pool):
    link = between(lambda net, x: net.pool(net.norm(x).sigmoid()), conv=True, norm=nn.BatchNorm2d(4), pool=pool)
    pools = () if isinstance(pool, nn.AdaptiveAvgPool2d) else ("pool",)  # torch has the mean without channels, too
    assert link == Link("first", ("norm",), "sigmoid", ("second",), (1,), pools=pools)


def test_a_flattened_point_may_be_normalised():
    norm, second = nn.BatchNorm1d(4), nn.Linear(4, 2)
    link = between(lambda net, x: net.norm(functional.max_pool2d(x, 6).flatten(1)), conv=True, second=second, norm=norm)
    assert (link.norms, link.repeat) == (("norm",), (1,))


def test_more_axes_of_a_linear():
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    assert between(lambda net, x: x.relu(), x).repeat == (1,)


def test_other_lengths_may_be_read():
    def step(net, x):
        samples, _channels, height, width = x.shape
        return functional.avg_pool2d(x, (height, width)).view(samples, -1)

    assert between(step, conv=True, second=nn.Linear(4, 2)).activation is None


class Branches(nn.Module):
    def __init__(self, one, other):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)
        self.left, self.right, self.one, self.other = nn.Conv2d(5, 2, 1), nn.Linear(80, 2), one, other

    def forward(self, x):
        x = self.norm(self.stem(x))
        return self.left(self.one(x)), self.right(self.other(x).flatten(1))


def test_two_consumers():
    def joined(outputs):
        return torch.cat([part.flatten(1) for part in outputs], 1)

    for one, other, name in (
        (nn.ReLU(), nn.ReLU(), "relu"),
        (nn.ReLU(), nn.Identity(), "several: relu, identity"),
        (nn.Identity(), nn.Identity(), None),
    ):
        model = prepared(Branches(one, other))
        links, _ = find_links(model)
        assert links == {"stem": Link("stem", ("norm",), name, ("left", "right"), (1, 16))}
        assert_true(model, links["stem"], images(3, 6, 6), joined)


def test_lenets():
    net = [nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)]
    links, reasons = found(nn.Sequential(*net), images(784))
    assert list(links.values()) == [Link("0", (), "relu", ("2",), (1,)), Link("2", (), "relu", ("4",), (1,))]
    assert reasons.keys() == {"4"}
    net = [nn.Conv2d(1, 20, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(20, 50, 5), nn.ReLU(), nn.MaxPool2d(2)]
    net += [nn.Flatten(), nn.Linear(800, 500), nn.ReLU(), nn.Linear(500, 10)]
    links, reasons = found(nn.Sequential(*net), images(1, 28, 28))
    assert {name: (link.consumers, link.repeat) for name, link in links.items()} == {
        "0": (("3",), (1,)),
        "3": (("7",), (16,)),
        "7": (("9",), (1,)),
    }
    assert reasons.keys() == {"9"}


class Block(nn.Module):
    """Of a ResNet for CIFAR; its shortcut takes every other pixel and adds channels of zeros."""

    def __init__(self, before, channels, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(before, channels, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1, self.bn2, self.more = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels), (channels - before) // 2

    def shortcut(self, x):
        return functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.more, self.more)) if self.more else x

    def forward(self, x):
        out = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        out += self.shortcut(x)
        return functional.relu(out)


class ResNet20(nn.Module):
    """With the names of shared/data's checkpoint."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(Block(16, 16, 1), Block(16, 16, 1), Block(16, 16, 1))
        self.layer2 = nn.Sequential(Block(16, 32, 2), Block(32, 32, 1), Block(32, 32, 1))
        self.layer3 = nn.Sequential(Block(32, 64, 2), Block(64, 64, 1), Block(64, 64, 1))
        self.linear = nn.Linear(64, 10)

    def forward(self, x):
        out = functional.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        out = functional.avg_pool2d(out, out.size()[3])
        return self.linear(out.view(out.size(0), -1))


def test_resnet20():
    model = ResNet20()
    assert sum(parameter.numel() for parameter in model.parameters()) == 269_722
    links, reasons = found(model, images(3, 8, 8))
    blocks = [f"layer{stage}.{block}" for stage in (1, 2, 3) for block in range(3)]
    assert list(links.values()) == [
        Link(f"{block}.conv1", (f"{block}.bn1",), "relu", (f"{block}.conv2",), (1,)) for block in blocks
    ]
    residual = "its outputs are added to others (residual connection), so its filters cannot be removed alone"
    assert reasons.pop("linear").startswith("its outputs are the network's outputs")
    assert reasons == dict.fromkeys(["conv1", *[f"{block}.conv2" for block in blocks]], residual)


def concatenated(net, x):
    return torch.cat([x, x], 1)[:, :4]


def in_place_and_elsewhere(net, x):
    x.relu_()
    return x


def through_a_wrapped_function(net, x):
    return mixes(x)


@fx.wrap
def mixes(x):
    return x.flip(-1)


mixes.__name__ = "relu"  # only its name is torch's

REFUSED = {
    "added": (lambda net, x: x + 1, "added to others"),
    "added by torch": (lambda net, x: torch.add(x, 1), "added to others"),
    "added in place": (lambda net, x: x.add_(1), "added to others"),
    "multiplied": (lambda net, x: 2 * x, "multiplied"),
    "concatenated": (concatenated, "concatenated"),
    "chunked": (lambda net, x: x.chunk(2, 0)[0], "taken apart"),
    "sliced": (lambda net, x: x[:, :4], "taken apart"),
    "softmax": (lambda net, x: x.softmax(-1), "softmax"),
    "reshaped": (lambda net, x: x.view(-1, 4), "flatten(x, 1)"),
    "reshaped by a number of channels": (lambda net, x: x.view(x.size(0), x.size(1)), "are counted"),
    "channels counted": (lambda net, x: functional.layer_norm(x, (x.shape[-1],)), "are counted"),
    "in place and elsewhere": (in_place_and_elsewhere, "changed in place by relu while others use them"),
    "a function of one's own": (through_a_wrapped_function, "may mix them"),
    "slopes for each": (lambda net, x: functional.prelu(x, torch.ones(4)), "prelu, which may mix them"),
    "mean": (lambda net, x: x - x.mean(), "mean, which may mix them"),
    "matrix product": (lambda net, x: x @ net.first.weight.T, "also used outside its own forward"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_mixes_neurons_is_refused_in_words(case):
    step, why = REFUSED[case]
    assert why in reason(step)


REFUSED_MODULES = {
    "layer norm": (nn.LayerNorm(4), "normalised with each other"),
    "softmax": (nn.Softmax(-1), "mixed with each other by a softmax"),
    "slopes": (nn.PReLU(4), "reach 'step' (PReLU), which may mix them"),
    "recurrent": (nn.GRU(4, 4), "reach 'step' (GRU), which may mix them"),
    "pool over neurons": (nn.MaxPool1d(1), "MaxPool1d"),
    "2-d pool of a linear": (nn.MaxPool2d(1), "MaxPool2d"),
    "parametrised norm": (
        nn.utils.parametrizations.weight_norm(nn.BatchNorm1d(4), dim=None),
        "its weight or bias is computed",
    ),
}


@pytest.mark.parametrize("case", REFUSED_MODULES)
def test_modules_that_mix_neurons_are_refused_in_words(case):
    module, why = REFUSED_MODULES[case]
    assert why in reason(lambda net, x: net.step(x), step=module)


REFUSED_MAPS = {
    "group norm": (nn.GroupNorm(2, 4), None, "normalised with each other"),
    "depthwise": (nn.Conv2d(4, 4, 3, groups=4), None, "'step', which cannot lose inputs (it is a grouped convolution"),
    "transposed": (nn.ConvTranspose2d(4, 4, 3), None, "ConvTranspose2d"),
    "shuffled": (nn.PixelShuffle(2), nn.Conv2d(1, 2, 3), "PixelShuffle"),
    "not flattened": (nn.Identity(), nn.Linear(4, 2), "along another axis"),
    "flattened from the third axis": (nn.Flatten(2), nn.Linear(4, 2), "flatten(x, 1)"),
    "normalised when flat": (nn.Sequential(nn.Flatten(), nn.BatchNorm1d(16)), nn.Linear(16, 2), "'step.1', which"),
}


MISSHAPEN = {
    "height and width": (lambda net, x: x.flatten(1, 2), "otherwise than by flatten(x, 1)"),
    "with the samples": (lambda net, x: x.flatten(), "otherwise than by flatten(x, 1)"),
    "by another length": (lambda net, x: x.view(x.size(2), -1), "otherwise than by flatten(x, 1)"),
    "to a fixed number of samples": (lambda net, x: x.view(2, -1), "otherwise than by flatten(x, 1)"),
    "to a fixed width": (lambda net, x: x.view(-1, 144), "otherwise than by flatten(x, 1)"),
    "by the number of filters": (lambda net, x: functional.avg_pool2d(x, x.size(1)), "are counted"),
    "by its whole shape": (lambda net, x: x.reshape(x.shape), "are counted"),
}


@pytest.mark.parametrize("case", MISSHAPEN)
def test_maps_of_an_unknown_shape_are_refused_in_words(case):
    step, why = MISSHAPEN[case]
    assert why in reason(step, conv=True, second=nn.Linear(144, 2))


@pytest.mark.parametrize("case", REFUSED_MAPS)
def test_what_mixes_filters_is_refused_in_words(case):
    module, second, why = REFUSED_MAPS[case]
    assert why in reason(lambda net, x: net.step(x), conv=True, second=second, step=module)


def test_a_grouped_convolution_is_refused():
    step = nn.Conv2d(4, 4, 1, groups=2)
    _, skipped = find_links(Net(lambda net, x: net.step(x), conv=True, step=step))
    assert "grouped convolution (2 groups)" in next(module.reason for module in skipped if module.name == "step")


def test_a_linear_flattened_with_its_other_axes_is_refused():
    assert "another axis" in reason(lambda net, x: x.flatten(1), second=nn.Linear(20, 2))


def test_modules_called_twice_are_refused():
    twice = nn.Linear(4, 4)
    links, reasons = found(nn.Sequential(nn.Linear(4, 4), twice, twice, nn.Linear(4, 2)), images(4))
    assert not links
    assert reasons["1"].startswith("it is called 2 times")
    assert "'1', which cannot lose inputs (it is called 2 times" in reasons["0"]


def test_shared_parameters_are_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    model[2].weight = model[0].weight
    links, reasons = found(model, images(4))
    assert not links
    assert "shares a parameter" in reasons["0"]
    assert "shares a parameter" in reasons["2"]


TIED = {
    "the same memory": lambda weight: nn.Parameter(weight.data),
    "some of its rows": lambda weight: nn.Parameter(weight.data[:2]),
}


@pytest.mark.parametrize("case", TIED)
def test_parameters_in_one_place_of_memory_are_shared(case):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    model[2].weight = TIED[case](model[0].weight)
    links, reasons = together(model)
    assert not links
    assert "shares a parameter with '2'" in reasons["0"]
    assert "shares a parameter with '0'" in reasons["2"]


def test_a_weight_that_is_read_under_another_name_is_refused():
    model = Net(lambda net, x: x + (x @ net.alias).mean())
    model.alias = model.first.weight.detach()[:, :1]
    links, reasons = together(model)
    assert not links
    assert "its parameters are also used outside its own forward" in reasons["first"]


HOOKED = {
    "first": "it has hooks",
    "second": "reach 'second', which cannot lose inputs (it has hooks",
    "norm": "reach 'norm', which cannot lose inputs (it has hooks",
    "act": "reach 'act', which has hooks",
}


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("name", HOOKED)
def test_modules_with_hooks_of_their_own_lose_no_neurons(name, before):
    model = Net(lambda net, x: net.act(net.norm(x)), norm=nn.BatchNorm1d(4), act=nn.ReLU())
    assert find_links(model)[0].keys() == {"first"}
    module = model.get_submodule(name)
    scales = torch.rand(2 if name == "second" and not before else 3 if name == "first" and before else 4)
    if before:
        hook = module.register_forward_pre_hook(lambda _module, args: (args[0] * scales,))
    else:
        hook = module.register_forward_hook(lambda _module, _args, output: output * scales)
    links, skipped = find_links(model)
    assert not links
    assert HOOKED[name] in {module.name: module.reason for module in skipped}["first"]
    hook.remove()
    assert find_links(model)[0].keys() == {"first"}


class Modes(nn.Module):
    """Two layers, and what becomes of the first one's outputs in train mode."""

    def __init__(self, training):
        super().__init__()
        self.first, self.second, self.aux = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(4, 2)
        self.other, self.training_step = nn.Linear(3, 4), training
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x):
        hidden = self.first(x).relu()
        return self.training_step(self, x, hidden) if self.training else self.second(hidden)


DIVERTED = {
    "a second classifier": (lambda net, x, h: (net.second(h), net.aux(h)), "'aux'"),
    "another classifier": (lambda net, x, h: net.aux(h), "'aux'"),
    "features returned": (lambda net, x, h: (net.second(h), h), "the network's outputs"),
    "another layer's outputs": (lambda net, x, h: net.second(net.other(x).relu()), "'second'"),
    "added to another layer's": (lambda net, x, h: net.second(h + net.other(x)), "'second'"),
    "a buffer": (lambda net, x, h: net.second(h - net.mean), "'second'"),
    "twice": (lambda net, x, h: net.second(h) + net.second(net.other(x)), "'second'"),
}


def test_a_weight_that_train_mode_reads_is_refused():
    _, reasons = together(Modes(lambda net, x, h: (net.second(h), x @ net.first.weight.T @ torch.ones(4))))
    assert reasons["first"] == "its parameters are also used outside its own forward"


@pytest.mark.parametrize("case", DIVERTED)
def test_layers_whose_outputs_go_elsewhere_in_train_mode_have_no_link(case):
    step, target = DIVERTED[case]
    links, reasons = together(Modes(step))
    assert not links
    assert reasons["first"].startswith("its outputs do not go the same way in train mode, to ")
    assert target in reasons["first"]


SAME_WAY = {
    "noise": lambda net, x, h: net.second(h + torch.randn_like(h)),
    "dropped samples": lambda net, x, h: net.second(h * h.new_empty(h.shape[0], 1).bernoulli_(0.5)),
    "random": lambda net, x, h: net.second(h * float(torch.rand(()))),
    "dropout": lambda net, x, h: net.second(functional.dropout(h)),
    "statistics kept": lambda net, x, h: (net.mean.mul_(0.9).add_(1), net.second(h))[1],
}


@pytest.mark.parametrize("case", SAME_WAY)
def test_train_mode_may_have_operations_of_its_own_and_changes_nothing_in_the_trace(case):
    model = Modes(SAME_WAY[case])
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    assert find_links(model)[0].keys() == {"first"}
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training


def test_a_forward_that_cannot_be_traced_in_train_mode_is_refused():
    def step(net, x, hidden):
        return net.second(hidden if x.sum() > 0 else -hidden)

    with pytest.raises(UnsupportedModule, match=r"Modes cannot be traced by torch\.fx in train mode \(.*control flow"):
        find_links(Modes(step))


def test_every_module_with_weights_is_accounted_for():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.lstm = nn.Embedding(5, 4), nn.LSTM(4, 4)
            self.first, self.second, self.unused = nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(2, 2)

        def forward(self, x, last=False):
            y, (_, _) = self.lstm(self.words(x))
            return self.second(self.first(y if not last else y[-1]).relu())

    links, skipped = find_links(Model())
    assert links == {"first": Link("first", (), "relu", ("second",), (1,))}
    assert [module.name for module in skipped] == ["words", "lstm", "second", "unused"]
    assert "no call of it is seen" in skipped[-1].reason


def test_unprunable_layers_say_why():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.ReLU(), nn.Linear(4, 2))
    _, skipped = find_links(model)
    assert "remove_parametrizations" in skipped[0].reason
    _, skipped = find_links(nn.Linear(4, 2))
    assert "it is the whole model" in skipped[0].reason
    _, skipped = find_links(Net(lambda net, x: torch.ones(2, 4)))
    assert skipped[0].reason == "nothing uses its outputs"
    assert find_links(nn.ReLU()) == ({}, [])
    links, skipped = find_links(nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(2)))
    assert not links
    assert all("LazyLinear has no weights yet" in module.reason for module in skipped)
    with pytest.raises(InvalidInput, match=r"expected a torch\.nn\.Module, found <class"):
        find_links(nn.Linear)


def test_links_and_reasons_are_in_the_order_of_execution():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.unused, self.out = nn.Linear(2, 2), nn.Linear(3, 2)
            self.second, self.first, self.stem = nn.Linear(4, 3), nn.Linear(5, 4), nn.Linear(5, 5)

        def forward(self, x):
            return self.out(self.second(self.first(self.stem(x) + x).relu()).relu())

    links, skipped = find_links(Backwards())
    assert list(links) == ["first", "second"]
    assert [module.name for module in skipped] == ["stem", "out", "unused"]


def test_an_untraceable_model_says_why():
    def step(net, x):
        return x if x.sum() > 0 else -x

    with pytest.raises(UnsupportedModule, match=r"Net cannot be traced by torch\.fx \(.*control flow"):
        find_links(Net(step))


def test_what_happens_in_eval_mode_counts():
    model = Net(lambda net, x: x + 1 if net.training else x.relu()).train()
    assert find_links(model)[0]["first"].activation == "relu"
    assert model.training


def test_the_model_is_left_as_it_was():
    def step(net, x):
        net.seen, net.number = x, 7
        return x + torch.ones(4)

    model = Net(step, norm=nn.BatchNorm1d(4)).train()
    model.norm.eval()
    before = [(module, dict(vars(module))) for module in model.modules()]
    find_links(model)
    with pytest.raises(UnsupportedModule):
        find_links(Net(lambda net, x: net.missing))
    assert [(module, vars(module)) for module in model.modules()] == before


@pytest.mark.parametrize(
    ("between", "activation"),
    [
        ((nn.BatchNorm1d(30), nn.ReLU()), "relu"),
        ((nn.ReLU(), nn.BatchNorm1d(30)), "several: relu then norm"),
        ((nn.BatchNorm1d(30), nn.ReLU(), nn.BatchNorm1d(30)), "several: norm then relu then norm"),
        ((nn.LeakyReLU(),), "leaky_relu"),
        ((nn.LeakyReLU(3.0, inplace=True),), "own leaky_relu"),
        ((nn.Softplus(beta=0.01),), "own softplus"),
        ((nn.PReLU(),), "own prelu"),
        ((nn.GELU(approximate="tanh"),), "own gelu"),
    ],
)
def test_an_activation_is_named_only_if_it_is_all_that_stands_behind_the_norms(between, activation):
    model = nn.Sequential(nn.Linear(5, 30), *between, nn.Linear(30, 2))
    assert find_links(model)[0]["0"].activation == activation


def test_an_activation_called_as_a_function_may_have_its_own_parameters_too():
    class Called(nn.Module):
        def __init__(self, activation):
            super().__init__()
            self.first, self.second, self.activation = nn.Linear(5, 30), nn.Linear(30, 2), activation

        def forward(self, x):
            return self.second(self.activation(self.first(x)))

    calls = {
        "relu": lambda x: torch.nn.functional.relu(x, True),
        "softplus": torch.nn.functional.softplus,
        "own softplus": lambda x: torch.nn.functional.softplus(x, 2.0),
        "leaky_relu": torch.nn.functional.leaky_relu,
        "own leaky_relu": lambda x: torch.nn.functional.leaky_relu(x, negative_slope=0.3),
        "elu": lambda x: torch.nn.functional.elu(x, 1.0),
        "hardtanh": lambda x: torch.nn.functional.hardtanh(x, max_val=1),
        "own hardtanh": lambda x: torch.nn.functional.hardtanh(x, max_val=2),
        "rrelu": torch.nn.functional.rrelu,
        "own rrelu": lambda x: torch.nn.functional.rrelu(x, training=True),
        "sigmoid": lambda x: x.sigmoid(),
    }
    for name, call in calls.items():
        assert find_links(Called(call))[0]["first"].activation == name


def test_norms_on_some_ways_only_are_told():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.norm = nn.Linear(5, 30), nn.BatchNorm1d(30)
            self.one, self.two = nn.Linear(30, 2), nn.Linear(30, 3)

        def forward(self, x):
            x = self.stem(x)
            return self.one(self.norm(x).relu()), self.two(x.relu())

    assert find_links(Two())[0]["stem"].activation == "several: norm then relu, relu"


# Layers that lose neurons together


def together(model):
    """The links, and the reasons by the names of the skipped modules."""
    links, skipped = find_links(model, residual=True)
    assert all(name == link.producer for name, link in links.items())
    return links, {module.name: module.reason for module in skipped}


@pytest.mark.parametrize("name", JOINT)
@torch.no_grad()
def test_a_joint_neuron_reaches_the_rest_through_its_columns_alone(name):
    """All producers' weights of the neuron matter, until its columns are gone."""
    torch.manual_seed(0)
    build, shape = JOINT[name]
    model, x = prepared(build()), images(*shape)
    for link in together(model)[0].values():
        producers = [model.get_submodule(producer) for producer in link.producers]
        found, outputs = copy.deepcopy(model.state_dict()), model(x)
        for layer in producers:
            layer.weight += torch.randn_like(layer.weight)
            assert (model(x) - outputs).abs().max() > tolerances.CHANGED
            model.load_state_dict(found)
        neuron = 1
        for weights in columns(model, link, neuron):
            weights.zero_()
        cut = model(x)
        carriers = [model.get_submodule(module) for module in (*link.norms, *link.along)]
        for layer in (*producers, *carriers):
            rows = layer.weight.unflatten(0, (len(producers[0].weight), -1))[neuron]
            rows += torch.rand_like(rows)
        for weights in columns(model, link, neuron):  # of layers that are producers too
            weights.zero_()
        torch.testing.assert_close(model(x), cut, rtol=0, atol=tolerances.EXACT)
        model.load_state_dict(found)


def test_each_stage_of_a_residual_network_is_one_link():
    links, reasons = together(resnet())
    streams = {name: (link.producers, link.norms, link.consumers) for name, link in links.items() if link.partners}
    assert streams == {
        "0": (
            ("0", "4.conv2", "5.conv2"),
            ("1", "4.bn2", "5.bn2"),
            ("4.conv1", "5.conv1", "6.conv1", "6.shortcut.0"),
        ),
        "6.conv2": (
            ("6.conv2", "6.shortcut.0", "7.conv2"),
            ("6.bn2", "6.shortcut.1", "7.bn2"),
            ("7.conv1", "8.conv1", "8.shortcut.0"),
        ),
        "8.conv2": (("8.conv2", "8.shortcut.0"), ("8.bn2", "8.shortcut.1"), ("12",)),
    }
    blocks = ["4", "5", "6", "7", "8"]
    alone = {
        f"{block}.conv1": Link(f"{block}.conv1", (f"{block}.bn1",), "relu", (f"{block}.conv2",), (1,))
        for block in blocks
    }
    assert {name: link for name, link in links.items() if name not in streams} == alone
    assert reasons.keys() == {"12"}


def test_a_layer_may_take_what_it_is_added_to():
    links, _ = together(Perceptron())
    stem = links["stem"]
    assert stem.producers == ("stem", "square", "down")
    assert stem.consumers == ("square", "gate", "up", "one", "two")
    assert (links["gate"].producers, links["gate"].consumers) == (("gate", "up"), ("down",))


@pytest.mark.parametrize("axes", [1, 3])
def test_depthwise_filters_and_slopes_are_along(axes):
    links, _ = together(Axes(axes))
    expected = (("stem", "conv"), ("norm",), ("slopes", "depthwise"), (1, 2**axes))
    assert [(link.producers, link.norms, link.along, link.repeat) for link in links.values()] == [expected]


@pytest.mark.parametrize("name", JOINT)
def test_by_default_only_what_can_shrink_alone_is_linked(name):
    model = JOINT[name][0]()
    links, skipped = find_links(model)
    wide = together(model)[0]
    assert links.items() <= wide.items()
    assert not any(link.partners or link.along for link in links.values())
    assert {module.name for module in skipped} >= {partner for link in wide.values() for partner in link.producers[1:]}


def test_every_layer_is_linked_or_skipped():
    for build, _ in JOINT.values():
        model = build()
        links, reasons = together(model)
        linked = [name for link in links.values() for name in (*link.producers, *link.along)]
        assert len(linked) == len(set(linked))
        layers = {name for name, module in model.named_modules() if hasattr(module, "weight")}
        norms = {name for link in links.values() for name in link.norms}
        assert layers == {*linked, *reasons, *norms}


def test_shortcuts_of_slices_and_zeros_are_refused_in_words():
    links, reasons = together(ResNet20())
    inner = [f"layer{stage}.{block}.conv1" for stage in (1, 2, 3) for block in range(3)]
    assert list(links) == inner
    sliced = (
        "its outputs are taken apart, or reshaped otherwise than by flatten(x, 1), so its filters cannot be removed"
    )
    padded = "its outputs are added to others (residual connection), and what pad gives is no layer's neurons"
    for stage, why in ((1, sliced), (2, padded), (3, padded)):
        for block in range(3):
            assert reasons[f"layer{stage}.{block}.conv2"].startswith(why), (stage, block)
    assert reasons["conv1"] == sliced


class Sum(nn.Module):
    """Two linear layers of 4 neurons, what becomes of their outputs, and a third of 2."""

    def __init__(self, step, **modules):
        super().__init__()
        self.a, self.b, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.step = step
        self.scale, self.number = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(()))
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.out(self.step(self, x))


REFUSED_SUMS = {
    "the input": (lambda net, x: x + net.a(x), {"a": "and the network's input 'x' is no layer's neurons"}),
    "what comes of the input": (lambda net, x: net.a(x) - x.relu() / 2, {"a": "and the network's input 'x' is no"}),
    "a parameter": (lambda net, x: net.a(x) * net.scale, {"a": "scaled, and 'scale' is no layer's neurons"}),
    "a constant": (lambda net, x: net.a(x) + torch.ones(4), {"a": "'_tensor_constant0' is no layer's neurons"}),
    "what is mixed": (
        lambda net, x: net.a(x).relu() + net.b(x).flip(1),
        {"a": "and what flip gives is no layer's neurons", "b": "reach flip, which may mix them"},
    ),
    "a concatenation": (
        lambda net, x: net.a(x) + torch.cat([net.b(x), x], 1)[:, :4],
        {"a": "what getitem gives is no layer's", "b": "are concatenated with others"},
    ),
    "another number": (
        lambda net, x: net.a(x) + net.one(x),
        {"a": "and those of 'a' and 'one' differ in number or layout", "one": "'a' and 'one' differ in number"},
    ),
    "a layer called twice": (
        lambda net, x: net.a(net.b(net.b(x))) + net.b(x),
        {"a": "and 'b' cannot lose any (it is called 3 times", "b": "it is called 3 times"},
    ),
    "one of them is mixed too": (
        lambda net, x: (lambda y: (y + net.b(x)) * y.softmax(1).sum())(net.a(x)),
        {"a": "are mixed with each other by a softmax", "b": "multiplied with others or scaled, and what sum gives"},
    ),
    "one of them is normalised too": (
        lambda net, x: (lambda y: net.one(y + net.b(x)) + net.norm(y))(net.a(x)),
        {"a": "are normalised with each other", "b": "are combined with those of 'a', which are normalised with each"},
    ),
    "a sum that others use is changed in place": (
        lambda net, x: (lambda y: y.mul_(net.b(x)) + y)(net.a(x)),
        {"a": "are changed in place by mul while others use them", "b": "are changed in place by mul"},
    ),
    "an outer sum of means": (lambda net, x: net.a(x) - net.a.bias.mean(), {"a": "also used outside its own forward"}),
}


@pytest.mark.parametrize("case", REFUSED_SUMS)
def test_sums_that_do_not_keep_neurons_apart_are_refused_in_words(case):
    step, whys = REFUSED_SUMS[case]
    links, reasons = together(Sum(step, one=nn.Linear(4, 1), norm=nn.LayerNorm(4)))
    for name, why in whys.items():
        assert why in reasons[name]
        assert name not in {producer for link in links.values() for producer in link.producers}


SUMS = {
    "of two": lambda net, x: net.a(x) + net.b(x),
    "by torch": lambda net, x: torch.add(net.a(x), net.b(x), alpha=2),
    "in place": lambda net, x: net.a(x).add_(net.b(x)),
    "difference": lambda net, x: net.a(x).sub(net.b(x).relu()),
    "quotient": lambda net, x: net.a(x) / net.b(x).sigmoid(),
    "scaled": lambda net, x: 1 - net.a(x).tanh() + net.number * net.b(x) / 3,
    "built-in": lambda net, x: sum([net.a(x), net.b(x)]),
}


@pytest.mark.parametrize("case", SUMS)
def test_sums_of_layers_are_one_link(case):
    links, reasons = together(Sum(SUMS[case]))
    assert [(link.producers, link.consumers) for link in links.values()] == [(("a", "b"), ("out",))]
    assert links["a"].activation not in (None, *ELEMENTWISE)
    assert reasons.keys() == {"out"}


MIXED_MAPS = {
    "group norm": (nn.GroupNorm(2, 4), "normalised with each other"),
    "layer norm": (nn.LayerNorm([4, 6, 6]), "normalised with each other"),
    "groups": (nn.Conv2d(4, 4, 1, groups=2), "it is a grouped convolution (2 groups)"),
    "transposed": (nn.ConvTranspose2d(4, 4, 1), "ConvTranspose2d"),
    "along another axis": (nn.PReLU(3), "it takes 3 inputs along another axis"),
    "shared filters": (nn.Sequential(*[nn.Conv2d(4, 4, 1, groups=4)] * 2), "it is called 2 times"),
}


@pytest.mark.parametrize("case", MIXED_MAPS)
def test_modules_that_mix_filters_are_refused_with_residuals_too(case):
    module, why = MIXED_MAPS[case]
    _, reasons = together(Net(lambda net, x: net.step(x), conv=True, step=module))
    assert why in reasons["first"]


MEANS = {
    "rows and columns": (lambda net, x: x.mean((2, 3)), nn.Linear(4, 2)),
    "one after another": (lambda net, x: x.amax(3).sum(-1), nn.Linear(4, 2)),
    "kept axes": (lambda net, x: torch.mean(x, dim=[-1, -2], keepdim=True), nn.Conv2d(4, 2, 1)),
    "one of them": (lambda net, x: x.mean(3), nn.Conv1d(4, 2, 3)),
}


@pytest.mark.parametrize("case", MEANS)
def test_means_over_positions_keep_filters_apart(case):
    step, second = MEANS[case]
    model = prepared(Net(step, conv=True, second=second))
    links, _ = together(model)
    assert links.keys() == {"first"}
    assert_true(model, links["first"], images(3, 6, 6))


@pytest.mark.parametrize("dims", [(1,), (0, 2), (1, 2), (), -3, None])
def test_means_over_other_axes_are_refused(dims):
    links, reasons = together(Net(lambda net, x: x.mean(dims), conv=True))
    assert not links
    assert "reach mean, which may mix them" in reasons["first"]
