"""Links that lose all their neurons: the network computes what it does with zeros there, and all goes on with it."""

import copy
import pickle

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from networks import JOINT, Net, mlp
from torch import nn
from torch.nn import functional

from convexprune import Data, NetworkEps, Neurons, Sparsity, load_weights_into_, prune_, save_weights, verify
from convexprune.bounds import PrunedLayer, output_bound
from convexprune.costs import flops, latency, storage
from convexprune.files.weights import save_json
from convexprune.layers.emptied import EmptiedBatchNorm2d, EmptiedConv1d, EmptiedConv2d, EmptiedConv3d
from convexprune.masks import keep_masks_, load_masked_state_dict_, make_permanent_
from convexprune.network.forwards import restoring
from convexprune.network.links import find_links
from convexprune.network.weights import mask_neurons_, remove_neurons_, resize_, resize_links_
from convexprune.page.extras import read_extras, save_extras
from convexprune.page.page import write_page
from convexprune.pruners.fisher import Fisher
from convexprune.solvers.errors import InvalidInput, ShapeMismatch

NONE = torch.empty(0, dtype=torch.int64)
EXACT = 1e-12


def built(name="resnet", seed=0):
    """In float64, with norms that do something; and inputs."""
    torch.manual_seed(seed)
    build, shape = JOINT[name]
    model, x = build(), torch.randn(6, *shape, dtype=torch.float64)
    for norm in (module for module in model.modules() if hasattr(module, "running_var")):
        for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            nn.init.uniform_(tensor, 0.5, 1.5)
    return model.double().eval(), x


def links_of(model):
    return find_links(model, residual=True)[0]


def emptied(*names):
    """A residual network some of whose blocks are their shortcuts, and inputs."""
    model, x = built()
    for name in names or ("4.conv1", "6.conv1"):
        remove_neurons_(model, links_of(model)[name], NONE)
    return model, x


def close(one, other):
    torch.testing.assert_close(one, other, rtol=EXACT, atol=EXACT)


CASES = [(name, producer) for name in JOINT for producer, link in links_of(built(name)[0]).items() if not link.pools]


@pytest.mark.parametrize(("name", "producer"), CASES)
def test_removing_all_neurons_is_masking_them(name, producer):
    model, x = built(name)
    link, masked = links_of(model)[producer], copy.deepcopy(model)
    remove_neurons_(model, link, NONE)
    mask_neurons_(masked, link, NONE)
    close(model(x), masked(x))
    assert {len(model.get_submodule(each).weight) for each in link.producers} == {0}
    assert all(model.get_submodule(each).weight.shape[1] == 0 for each in link.consumers)


@pytest.mark.parametrize(("name", "producer"), CASES)
def test_training_goes_on_and_every_parameter_has_a_gradient(name, producer):
    model, x = built(name)
    masked, link = copy.deepcopy(model), links_of(model)[producer]
    remove_neurons_(model, link, NONE)
    mask_neurons_(masked, link, NONE)
    for each in (model, masked):
        torch.manual_seed(0)  # of dropout, which draws for neurons that are gone, too
        each.train()(x).square().sum().backward()
    assert all(parameter.grad.shape == parameter.shape for parameter in model.parameters())
    if not any(isinstance(module, nn.Dropout) for module in model.modules()):
        consumer = link.consumers[-1]  # the first may be one of the producers
        close(model.get_submodule(consumer).bias.grad, masked.get_submodule(consumer).bias.grad)
    torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9).step()
    assert model.eval()(x).isfinite().all()


def test_an_emptied_block_is_its_shortcut_and_what_its_norm_makes_of_zeros():
    model, x = emptied("5.conv1")
    stream, block = model[:5](x), model[5]
    shift = block.bn2(torch.zeros_like(stream))
    close(block(x=stream), (stream + shift).relu())
    text = repr(block)
    assert "EmptiedConv2d(4, 0, kernel_size=(3, 3)" in text
    assert "EmptiedBatchNorm2d(0, " in text


@given(seed=st.integers(0, 999), name=st.sampled_from(list(JOINT)), rounds=st.integers(1, 5))
def test_links_lose_neurons_in_any_order_and_all_of_them_at_any_time(seed, name, rounds):
    model, x = built(name)
    links, masked = links_of(model), copy.deepcopy(model)
    alive = {producer: torch.arange(len(model.get_submodule(producer).weight)) for producer in links}
    draw = torch.Generator().manual_seed(seed)
    for _ in range(rounds):
        producer = list(links)[int(torch.randint(len(links), (), generator=draw))]
        count, least = len(alive[producer]), int(bool(links[producer].pools))
        size = int(torch.randint(least, count + 1, (), generator=draw))
        kept = torch.randperm(count, generator=draw)[:size].sort().values
        remove_neurons_(model, links[producer], kept)
        mask_neurons_(masked, links[producer], alive[producer][kept])
        alive[producer] = alive[producer][kept]
    close(model(x), masked(x))


def test_the_other_links_are_found_as_before():
    model, _ = built()
    before = links_of(model)
    remove_neurons_(model, before["5.conv1"], NONE)
    found, skipped = find_links(model, residual=True)
    assert list(found) == list(before)
    assert [module.name for module in skipped] == ["12"]
    for name, link in before.items():
        assert found[name].producers == link.producers
        assert {*found[name].consumers, *found[name].emptied} == set(link.consumers)
    assert found["0"].emptied == ("5.conv1",)
    assert found["5.conv1"] == before["5.conv1"]


def test_a_pool_needs_a_neuron():
    model, _ = built("one axis")
    link, before = links_of(model)["stem"], copy.deepcopy(model.state_dict())
    for change_ in (remove_neurons_, mask_neurons_):
        with pytest.raises(InvalidInput, match=r"filters of stem go through pool, and torch .* keep one of them"):
            change_(model, link, NONE)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    net = Net(lambda net, x: net.b(functional.adaptive_avg_pool2d(functional.max_pool2d(net.a(x), 2), 2)))
    net.a, net.b = nn.Conv2d(1, 2, 3), nn.Conv2d(2, 1, 1)
    assert find_links(net)[0]["a"].pools == ("maxpool2d",)


def test_a_buffer_that_norms_share_stays_one():
    net = Net(lambda net, x: net.c(net.p(net.a(x)) + net.q(net.b(x))))
    net.a, net.b, net.c, net.p, net.q = *(nn.Linear(3, 4) for _ in "ab"), nn.Linear(4, 2), *map(nn.BatchNorm1d, (4, 4))
    net.q.running_mean = net.p.running_mean
    remove_neurons_(net, links_of(net)["a"], torch.tensor([1, 3]))
    assert net.q.running_mean is net.p.running_mean
    assert net.q.running_mean.shape == (2,)


# The modules


CONVOLUTIONS = {1: (nn.Conv1d, EmptiedConv1d), 2: (nn.Conv2d, EmptiedConv2d), 3: (nn.Conv3d, EmptiedConv3d)}


@given(st.data())
def test_outputs_are_those_of_a_convolution_of_zeros(data):
    """With any settings, of batches and of samples alone."""
    axes = data.draw(st.integers(1, 3))
    plain, kind = CONVOLUTIONS[axes]
    settings = {name: data.draw(st.integers(1, 3)) for name in ("kernel_size", "stride", "dilation")}
    settings |= {"padding": data.draw(st.sampled_from([0, 1, 2, "same", "valid"])), "bias": data.draw(st.booleans())}
    settings["padding_mode"] = data.draw(st.sampled_from(["zeros", "circular"]))
    assume(settings["padding"] != "same" or settings["stride"] == 1)
    x = torch.randn(*[2] * data.draw(st.integers(0, 1)), 1, *range(7, 7 + axes))
    model = nn.Sequential(plain(1, 3, 1), plain(3, 2, **settings), plain(2, 1, 1))
    for producer in ("0", "1"):
        smaller, masked, link = copy.deepcopy(model), copy.deepcopy(model), links_of(model)[producer]
        remove_neurons_(smaller, link, NONE)
        mask_neurons_(masked, link, NONE)
        assert isinstance(smaller[1], kind)
        found, expected = smaller[:2](x), masked[:2](x)
        torch.testing.assert_close(found, expected if producer == "0" else expected.narrow(-axes - 1, 0, 0))


def test_gradients_are_those_of_a_convolution_of_zeros():
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.ReLU(), nn.Conv2d(3, 4, 3, padding=1))
    masked, x = copy.deepcopy(model), torch.randn(2, 2, 5, 5, requires_grad=True)
    mask_neurons_(masked, links_of(model)["0"], NONE)
    masked(x).square().sum().backward()
    expected, x.grad = masked[2].bias.grad, None
    remove_neurons_(model, links_of(model)["0"], NONE)
    outputs = model(x)
    outputs.mul_(1)  # they are no view of one number
    outputs.square().sum().backward()
    torch.testing.assert_close(model[2].bias.grad, expected)
    assert torch.equal(x.grad, torch.zeros_like(x))
    assert [parameter.grad.shape for parameter in model.parameters()] == [(0, 2, 1, 1), (0,), (4, 0, 3, 3), (4,)]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("settings", [{}, {"affine": False}, {"track_running_stats": False}])
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_norms_without_channels_return_what_they_take(axes, settings, training):
    conv, norm = CONVOLUTIONS[axes][0], (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[axes - 1]
    model = nn.Sequential(conv(2, 3, 1), norm(3, **settings), conv(3, 4, 1)).train(training)
    x = torch.randn(2, 2, *[3] * axes)
    remove_neurons_(model, links_of(model)["0"], NONE)
    torch.testing.assert_close(model(x), model[2].bias[(..., *[None] * axes)].expand(2, 4, *[3] * axes))
    assert model[1].num_features == 0


def test_other_channels_are_refused():
    model, _ = emptied("4.conv1")
    assert isinstance(model[4].bn1, EmptiedBatchNorm2d)
    for module, channels in ((model[4].conv1, 4), (model[4].conv2, 0), (model[4].bn1, 0)):
        with pytest.raises(
            ShapeMismatch, match=rf"expected {channels} channels at axis -?\d; got shape \[2, 3, 5, 5\]"
        ):
            module(torch.zeros(2, 3, 5, 5))


# Copies and files


def test_copies_pickles_and_graphs_compute_the_same():
    model, x = emptied()
    graph = torch.fx.symbolic_trace(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), graph):  # noqa: S301
        assert torch.equal(other(x), model(x))


def test_a_fresh_network_takes_the_file(tmp_path):
    model, x = emptied()
    path = save_weights(model, tmp_path / "small.safetensors")
    fresh, _ = built(seed=1)
    load_weights_into_(fresh, path, resize=True)
    assert torch.equal(fresh(x), model(x))
    assert fresh[4].conv1.weight.shape == (0, 4, 3, 3)
    assert (fresh[4].conv1.out_channels, fresh[4].conv2.in_channels, fresh[4].bn1.num_features) == (0, 0, 0)


def test_masks_and_their_states():
    model, x = emptied()
    masked = copy.deepcopy(model)
    keep_masks_(masked)
    fresh, _ = built(seed=1)
    load_masked_state_dict_(fresh, masked.state_dict(), resize=True)
    make_permanent_(fresh)
    assert torch.equal(fresh(x), model(x))


def test_a_failure_puts_classes_back():
    model, x = built()
    outputs = model(x)

    def fails():
        with restoring(model):
            remove_neurons_(model, links_of(model)["4.conv1"], NONE)
            raise ValueError("late")

    with pytest.raises(ValueError, match="late"):
        fails()
    assert type(model[4].conv1) is nn.Conv2d
    assert torch.equal(model(x), outputs)
    smaller, _ = emptied("4.conv1")
    state = smaller.state_dict() | {"12.weight": torch.zeros(2, 5)}
    with pytest.raises(ShapeMismatch, match=r"12\.weight"):
        resize_(model, state)
    assert torch.equal(model(x), outputs)


def test_what_is_gone_does_not_grow_again():
    model, _ = emptied("4.conv1")
    with pytest.raises(ShapeMismatch, match=r"4\.conv1 has no neurons, so what belongs to one is unknown"):
        resize_links_(model, links_of(model), dict.fromkeys(links_of(model), 2))


# Pruning and measuring


def test_costs_count_what_is_left():
    model, x = emptied()
    masked, _ = built()
    for name in ("4.conv1", "6.conv1"):
        mask_neurons_(masked, links_of(masked)[name], NONE)
    assert flops(model, x).dense == flops(masked, x).remaining
    assert storage(model).nonzeros == storage(masked).nonzeros
    found = latency(model, x, repeats=1)
    assert {module.name for module in found.skipped} == {"4.conv1", "4.conv2", "6.conv1", "6.conv2"}
    assert all("has no entries" in module.reason for module in found.skipped)


def test_the_bound_is_that_of_the_masked_network():
    model, x = emptied("4.conv1")
    masked, _ = built()
    mask_neurons_(masked, links_of(masked)["4.conv1"], NONE)
    one, other = (output_bound(each, [PrunedLayer("0"), PrunedLayer("5.conv1")], x) for each in (model, masked))
    assert one.coefficients == pytest.approx(other.coefficients)


TARGETS = {
    "sparsity": (Sparsity(0.5, "network"), "magnitude"),
    "refit": (Sparsity(0.5), "wanda"),
    "eps": (NetworkEps(0.5), None),
    "neurons": (Neurons(0.5), None),
    "neurons by scores": (Neurons(0.5, "network"), "magnitude"),
    "neurons by samples": (Neurons(0.5), "mussay"),
}


@pytest.mark.parametrize("case", TARGETS)
def test_pruning_leaves_out_what_is_empty_and_says_so(case, tmp_path):
    target, method = TARGETS[case]
    model, x = emptied()
    before, given = copy.deepcopy(model), {} if method is None else {"method": method}
    report = prune_(model, x, target, run=tmp_path, **given)
    reasons = {module.name: module.reason for module in report.skipped}
    said = "it has no neurons left" if isinstance(target, Neurons) else "has no entries"
    assert said in reasons["4.conv1"]
    assert said in reasons["6.conv1"]
    assert report.nonzeros < report.nonzeros_before
    assert "4.conv1" not in {row.name for row in report.layers}
    assert model(x).isfinite().all()
    save_json(report.to_dict(), tmp_path / "report.json")
    assert verify(before, x, tmp_path).ok
    save_extras(tmp_path, before, model, x, report)
    assert write_page(tmp_path).exists()


def test_a_chain_behind_a_layer_without_neurons_is_left_out():
    model, x = mlp(4, 6, 5, 3), torch.randn(9, 4)
    remove_neurons_(model, links_of(model)["2"], NONE)
    report = prune_(copy.deepcopy(model), x, Sparsity(0.5), method="magnitude")
    assert [row.name for row in report.layers] == ["0"]
    with pytest.raises(
        InvalidInput, match=r"0: only layers without neurons use its outputs; 2: it has no neurons left"
    ):
        prune_(model, x, Neurons(0.5), method="magnitude")


def test_pictures_of_a_layer_that_lost_all(tmp_path):
    model, x = emptied()
    dense, _ = built()
    save_extras(tmp_path, dense, model, x)
    data, maps = read_extras(tmp_path)
    number = [row["name"] for row in data["maps"]].index("4.conv1.weight")
    assert data["maps"][number]["after"] == [0, 4, 3, 3]
    assert maps[f"before.{number}"].any()
    assert not maps[f"after.{number}"].any()


def test_fisher_pruning_empties_a_block_that_does_nothing():
    torch.manual_seed(0)
    model, _ = built("preactivation")
    model, x = model.float(), torch.randn(8, 2, 8, 8)
    nn.init.zeros_(model[1].conv2.weight)
    data = Data(x, labels=torch.arange(8) % 3)
    report = prune_(model, data, Neurons(0.3, "network"), method=Fisher(steps=1, weight_decay=0.0))
    kept = {row.name: row.neurons for row in report.layers}
    assert kept["1.conv1"] == 0
    assert isinstance(model[1].conv1, EmptiedConv2d)
    assert any("no weight is left in" in line for line in report.head)
    assert model(x).isfinite().all()
