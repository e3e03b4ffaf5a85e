"""Profiles say how wide networks are, scale them to budgets, and networks built from them have exactly those widths."""

import copy
import json
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import JOINT, Net, mlp
from torch import nn

from benchmarks.resnet20 import build as resnet20
from convexprune.costs import flops
from convexprune.errors import DamagedFile, NothingToPrune, UnsupportedModule
from convexprune.layers.emptied import EmptiedConv2d
from convexprune.masks import keep_masks_
from convexprune.network.links import find_links
from convexprune.network.weights import load_weights_into_, remove_neurons_, save_weights
from convexprune.profiles import Profile, build_from_profile
from convexprune.solvers.errors import InvalidInput, InvalidTolerance, NonFinite, ShapeMismatch


def lenet():
    convs = [nn.Conv2d(1, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 10, 5), nn.Tanh(), nn.MaxPool2d(2)]
    return nn.Sequential(*convs, nn.Flatten(), nn.Linear(160, 12), nn.ReLU(), nn.Linear(12, 3))


def vgg():
    layers = [
        module
        for inputs, outputs in ((3, 8), (8, 12), (12, 16))
        for module in (nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2))
    ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(), nn.Linear(16, 4))


MODELS = {"lenet": (lenet, (1, 28, 28)), "vgg": (vgg, (3, 16, 16)), "resnet20": (resnet20, (3, 32, 32)), **JOINT}


def made(name):
    build, shape = MODELS[name]
    torch.manual_seed(0)
    return build(), torch.randn(4, *shape)


def pruned(model, seed=0, empty=False):
    """A copy with some of the neurons of each link; with ``empty`` the first that needs none, for a pool, has none."""
    small, draw = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    for name, link in find_links(small, residual=True)[0].items():
        count = len(small.get_submodule(name).weight)
        kept = torch.randperm(count, generator=draw)[: int(torch.randint(1, count + 1, (1,), generator=draw))]
        empty, gone = empty and bool(link.pools), empty and not link.pools
        remove_neurons_(small, link, kept[: 0 if gone else None].sort().values)
    return small


def shapes(model):
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}


def weights(model):
    return sum(parameter.numel() for parameter in model.parameters() if parameter.dim() >= 2)


# What a profile is


@pytest.mark.parametrize("name", MODELS)
def test_widths_are_those_of_the_links(name, tmp_path):
    model, _ = made(name)
    small = pruned(model, empty=True)
    profile = Profile.of(small)
    found = {link: len(small.get_submodule(link).weight) for link in find_links(model, residual=True)[0]}
    assert {link: profile.widths[link] for link in found} == found
    assert Profile.load(profile.save(tmp_path / "profile.json")) == profile
    assert Profile.of(MODELS[name][0]) == Profile.of(model)


def test_it_is_text_and_plain_data(tmp_path):
    profile = Profile({"block.conv1": 0, "block.conv2": 1234})
    assert profile.to_dict() == {"widths": {"block.conv1": 0, "block.conv2": 1234}}
    assert re.search(r"block\.conv2 +1,234\n.*1,234 neurons; 1 layers have none", str(profile), re.S)
    file = profile.save(tmp_path / "new" / "p.json")
    assert json.loads(file.read_text()) == {"format": 1, **profile.to_dict()}
    assert list(Profile.load(file).widths) == ["block.conv1", "block.conv2"]


@given(st.dictionaries(st.text(), st.integers(0, 999)), st.floats(0, 9), st.floats(0, 9))
def test_widths_grow_with_the_factor(widths, one, other):
    profile = Profile(widths)
    less, more = (profile.times(factor).widths for factor in sorted((one, other)))
    for name, width in widths.items():
        assert less[name] <= more[name]
        assert abs(more[name] - max(one, other) * width) <= 0.5 or more[name] == 1
        assert (more[name] == 0) == (width == 0)
    assert profile.times(1) == profile


FILES = {
    "no JSON": ("{", DamagedFile, "is no JSON"),
    "a list": ("[1]", DamagedFile, "holds a list, expected an object"),
    "something else": ("{}", DamagedFile, "no format number; write it again"),
    "another format": ('{"format": 2, "widths": {}}', InvalidInput, "of format 2, expected 1"),
    "no widths": ('{"format": 1}', DamagedFile, "holds no widths of layers"),
    "widths of nothing": ('{"format": 1, "widths": [3]}', DamagedFile, r"found \[3\]"),
    "half a neuron": ('{"format": 1, "widths": {"a": 1.5}}', DamagedFile, "width of a: expected a whole number"),
}


@pytest.mark.parametrize("case", FILES)
def test_other_files_are_refused(case, tmp_path):
    text, error, message = FILES[case]
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(error, match=message):
        Profile.load(tmp_path / "p.json")


def test_other_arguments_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="No file at"):
        Profile.load(tmp_path / "none.json")
    with pytest.raises(InvalidInput, match=r"give a path ending in \.json"):
        Profile({"a": 1}).save(tmp_path / "p.txt")
    with pytest.raises(InvalidTolerance, match="width of a: expected a whole number ≥ 0, found -1"):
        Profile({"a": -1})
    with pytest.raises(InvalidInput, match="expected numbers of neurons by the names of layers, found 3"):
        Profile(3)
    with pytest.raises(InvalidTolerance, match="factor"):
        Profile({"a": 1}).times(-1)
    with pytest.raises(NothingToPrune, match="another width: 0: its outputs are the network's outputs"):
        Profile.of(nn.Sequential(nn.Linear(3, 2)))
    with pytest.raises(InvalidInput, match=r"expected a torch\.nn\.Module, found 3"):
        Profile.of(3)


# Budgets


def assert_largest(profile, found, size, limit):
    """The found widths are the profile's times a factor, within the limit, and the next larger ones are not."""
    assert size(found) <= limit
    least = max((n - 0.5) / profile.widths[name] for name, n in found.widths.items() if n > 1)  # of the factor
    steps = [(n + 0.5) / profile.widths[name] for name, n in found.widths.items() if n]
    assert least <= min(steps)
    larger = profile.times(min(steps) * (1 + 1e-9))
    assert larger != found
    assert size(larger) > limit
    # Those with the next factor differ by one neuron at most.
    assert all(n - found.widths[name] in (0, 1) for name, n in larger.widths.items())


@pytest.mark.parametrize("budget", [0.3, 1.0, 2.5, 5000])
@pytest.mark.parametrize("name", ["lenet", "vgg", "mobilenet"])
def test_a_budget_of_weights_is_kept_and_used(name, budget):
    model, _ = made(name)
    profile = Profile({link: Profile.of(pruned(model, 1)).widths[link] for link in Profile.of(model).widths})
    limit = budget if isinstance(budget, int) else budget * weights(model)

    def size(scaled):
        return weights(build_from_profile(model, scaled))

    assert_largest(profile, profile.scaled(model, weights=budget), size, limit)


@pytest.mark.parametrize("name", ["resnet20", "preactivation"])
def test_a_budget_of_operations_is_kept_and_used(name):
    model, x = made(name)
    profile = Profile.of(pruned(model, 2, empty=True))
    assert 0 in profile.widths.values()
    whole, batch = flops(model, x[:1]).dense, x[:1]
    for budget in (0.5, whole // 2):
        found = profile.scaled(model, flops=budget, batch=batch)
        assert [name for name, n in found.widths.items() if not n] == [n for n, k in profile.widths.items() if not k]
        assert_largest(profile, found, lambda p: flops(build_from_profile(model, p), batch).dense, 0.5 * whole)


def test_the_whole_budget_gives_the_network_itself():
    model, _ = made("resnet20")
    dense = Profile.of(model)
    assert dense.scaled(model, weights=1.0) == Profile.of(model)
    assert Profile.of(model).times(0.5).scaled(resnet20, weights=weights(model)) == dense
    assert set(Profile.of(model).times(0.5).widths.values()) == {8, 16, 32}


def test_budgets_that_cannot_be_used():
    model, x = made("lenet")
    profile = Profile.of(model)
    for given_ in ({}, {"weights": 0.5, "flops": 0.5}, {"flops": 0.5}):
        with pytest.raises(InvalidInput, match="give one of the two budgets"):
            profile.scaled(model, **given_)
    with pytest.raises(InvalidInput, match="weights: one neuron a layer takes 69, more than the 68 allowed"):
        profile.scaled(model, weights=68)
    assert set(profile.scaled(model, weights=69).widths.values()) == {1}
    for budget in (0, -1, True, 0.0, float("nan"), float("inf"), "many"):
        with pytest.raises(InvalidTolerance, match="flops: expected a"):
            profile.scaled(model, flops=budget, batch=x)
    with pytest.raises(InvalidInput, match="no layer of the profile has neurons"):
        Profile(dict.fromkeys(profile.widths, 0)).scaled(model, weights=0.5)


# Networks


@pytest.mark.parametrize("factor", [1.0, 1.6])
@pytest.mark.parametrize("name", [name for name in MODELS if name != "scaled"])
def test_a_built_network_has_the_widths_and_trains(name, factor):
    """With the shapes of the pruned network itself, and wider."""
    model, x = made(name)
    small, before = pruned(model, 3, empty=True), copy.deepcopy(model.state_dict())
    profile = Profile({link: len(small.get_submodule(link).weight) for link in Profile.of(model).widths}).times(factor)
    network = build_from_profile(model, profile, batch=x)
    assert {link: len(network.get_submodule(link).weight) for link in profile.widths} == profile.widths
    if factor == 1:
        assert shapes(network) == shapes(small)
        assert [type(module) for module in network.modules()] == [type(module) for module in small.modules()]
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    network(x).square().mean().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    torch.optim.SGD(network.parameters(), lr=1e-3).step()
    assert network.eval()(x).isfinite().all()


def test_widths_beyond_the_models_reach_every_layer():
    """A map that is flattened, a norm, a depthwise convolution that doubles channels, and slopes."""
    model, _ = made("lenet")
    network = build_from_profile(model, Profile({"0": 9, "3": 11, "7": 20}))
    assert shapes(network)["7.weight"] == (20, 11 * 16)
    assert (network[7].in_features, network[3].in_channels, network[9].in_features) == (176, 9, 20)
    model, _ = made("mobilenet")
    network = build_from_profile(model, Profile.of(model).times(2))
    assert (network[1].in_channels, network[1].groups, network[1].out_channels) == (6, 6, 12)
    assert (network[2].num_parameters, network[5].bn2.num_features) == (12, 20)
    assert (network[2].weight == 0.25).all()


def test_weights_are_those_of_a_network_that_is_made_so():
    """One dense layer after the other, from the same random numbers."""
    model = mlp(6, 8, 5, 3)
    network = build_from_profile(model, Profile({"0": 4, "2": 7}), seed=11)
    torch.manual_seed(11)
    expected = mlp(6, 4, 7, 3, seed=None)
    assert all(torch.equal(one, other) for one, other in zip(network.parameters(), expected.parameters(), strict=True))


def test_the_seed_says_all_and_random_numbers_go_on():
    model, _ = made("vgg")
    model[1].running_mean.fill_(7)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    nets = [
        build_from_profile(source, Profile.of(vgg).times(0.5), seed=seed) for source, seed in ((model, 1), (vgg, 1))
    ]
    other = build_from_profile(vgg, Profile.of(vgg).times(0.5), seed=2)
    assert torch.equal(torch.rand(3), expected)
    one, two = (network.state_dict() for network in nets)
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert not torch.equal(other[0].weight, nets[0][0].weight)
    assert (one["1.running_mean"] == 0).all()
    assert (one["1.running_var"] == 1).all()


def test_buffers_that_a_function_draws_follow_from_the_seed_too():
    def build():
        model = mlp(3, 4, 2, seed=None)
        model.register_buffer("drawn", torch.rand(5))
        return model

    one, two, other = (build_from_profile(build, Profile({"0": 3}), seed=seed).drawn for seed in (1, 1, 2))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_initialise_has_the_last_word():
    model, _ = made("resnet20")
    small = pruned(model, 2, empty=True)
    called = []

    def initialise(module):
        called.append(module)
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out")

    networks = [build_from_profile(model, Profile.of(small), initialise=how) for how in (initialise, None)]
    assert called[-1] is networks[0]
    assert any(isinstance(module, EmptiedConv2d) for module in networks[0].modules())
    assert not any(isinstance(module, EmptiedConv2d) for module in called)  # torch would warn of nothing to draw
    assert torch.equal(networks[0].linear.weight, networks[1].linear.weight)
    assert not torch.equal(networks[0].conv1.weight, networks[1].conv1.weight)


def test_what_else_belongs_to_the_network_stays():
    model, _ = made("vgg")
    model.double().train()
    model[1].eval()
    model[3].requires_grad_(False)
    model[4].weight.requires_grad_(False)
    model.register_buffer("constant", torch.arange(3.0))
    network = build_from_profile(model, Profile.of(model).times(0.5))
    assert (network.training, network[1].training) == (True, False)
    assert [p.requires_grad for p in network.parameters()] == [p.requires_grad for p in model.parameters()]
    assert {p.dtype for p in network.parameters()} == {torch.float64}
    assert torch.equal(network.constant, model.constant)


def test_biases_of_layers_without_inputs_are_zero():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    network = build_from_profile(model, Profile({"0": 0}))
    assert torch.equal(network(torch.randn(5, 3)), torch.zeros(5, 2))


def test_layers_that_were_left_one_channel():
    """A depthwise convolution is one like any other then, and links are smaller; the architecture is the same."""
    for name, producer, other in (("mobilenet", "5.expand", "5.depthwise"), ("one axis", "stem", "conv")):
        model, x = made(name)
        small = copy.deepcopy(model)
        remove_neurons_(small, find_links(small, residual=True)[0][producer], torch.tensor([2]))
        profile = Profile.of(small)
        assert {producer, other} <= profile.widths.keys()
        assert other not in Profile.of(model).widths
        assert shapes(build_from_profile(model, profile, batch=x)) == shapes(small)
        assert other not in profile.scaled(model, weights=0.9).widths
        with pytest.raises(ShapeMismatch, match=rf"widths that the model's layers cannot have: {other} \(7\)\."):
            build_from_profile(model, Profile({**profile.widths, other: 7}))


def test_a_file_of_a_smaller_network_is_taken_by_the_model(tmp_path):
    model, x = made("resnet20")
    network = build_from_profile(model, Profile.of(model).times(0.5)).eval()
    load_weights_into_(model.eval(), save_weights(network, tmp_path / "w.safetensors"), resize=True)
    assert torch.equal(model(x), network(x))


def scale():
    net = Net(lambda net, x: net.b(net.a(x)) * net.scale, a=nn.Linear(3, 4), b=nn.Linear(4, 2))
    net.scale = nn.Parameter(torch.ones(2))
    return net


def test_parameters_that_nothing_resets_are_named():
    half = Profile({"a": 2})
    with pytest.raises(UnsupportedModule, match="nothing resets scale: their modules have no reset_parameters"):
        build_from_profile(scale, half)
    with pytest.raises(UnsupportedModule, match="nothing resets scale: initialise leaves them without values"):
        build_from_profile(scale, half, initialise=lambda module: None)
    network = build_from_profile(
        scale, half, initialise=lambda module: nn.init.ones_(module.scale) if hasattr(module, "scale") else None
    )
    assert network.scale.tolist() == [1, 1]
    normed = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    nn.utils.parametrizations.weight_norm(normed[4])
    with pytest.raises(UnsupportedModule, match=r"nothing resets 4\.parametrizations"):
        build_from_profile(normed, Profile.of(normed))


def test_profiles_of_other_networks_are_refused():
    model, x = made("lenet")
    wrong = Profile({"0": 3, "3": 4, "stem": 1})
    for use in (lambda: build_from_profile(model, wrong), lambda: wrong.scaled(model, weights=0.5)):
        with pytest.raises(ShapeMismatch, match=r"says nothing of 7; it has widths .* cannot have: stem \(1\)\."):
            use()
    with pytest.raises(InvalidInput, match=r"the filters of 0 go through 2, .* keep one of them"):
        build_from_profile(model, Profile({"0": 0, "3": 4, "7": 2}))
    with pytest.raises(InvalidInput, match="the model failed on a batch of shape"):
        build_from_profile(model, Profile.of(model), batch=x[:, :, :20])
    with pytest.raises(InvalidTolerance, match="seed"):
        build_from_profile(model, Profile.of(model), seed=-1)
    with pytest.raises(NonFinite, match="give another initialise="):
        build_from_profile(
            model,
            Profile.of(model),
            batch=x,
            initialise=lambda module: nn.init.constant_(module.weight, 1e38) if hasattr(module, "weight") else None,
        )


def test_masks_and_emptied_networks_are_no_architecture():
    model = mlp(6, 8, 5, 3)
    profile, masked = Profile.of(model), copy.deepcopy(model)
    nn.init.zeros_(masked[0].weight)
    keep_masks_(masked)
    with pytest.raises(ShapeMismatch, match=r"cannot have: 0 \(8\)"):
        build_from_profile(masked, profile)
    remove_neurons_(model, find_links(model)[0]["2"], torch.empty(0, dtype=torch.int64))
    with pytest.raises(ShapeMismatch, match="2 has no neurons, so what belongs to one is unknown"):
        build_from_profile(model, profile)
    assert Profile.of(build_from_profile(model, Profile.of(model))).widths == {"0": 8, "2": 0}


def test_shapes_of_outputs_are_compared():
    """Here they depend on a width, which the graph does not show."""
    net = Net(lambda net, x: net.b(net.a(x))[:, : net.a.out_features // 2], a=nn.Linear(3, 4), b=nn.Linear(4, 2))
    build_from_profile(net, Profile({"a": 2}))
    with pytest.raises(ShapeMismatch, match=r"returns \[\[5, 1\]\], and the model \[\[5, 2\]\]: a shape was not"):
        build_from_profile(net, Profile({"a": 2}), batch=torch.zeros(5, 3))
