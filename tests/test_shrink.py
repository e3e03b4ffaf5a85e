"""Removal and masking compute the same network; state dicts and failures are put right."""

import copy
import dataclasses
import io

import pytest
import tolerances
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import JOINT
from torch import nn

from convexprune.errors import UnsupportedModule
from convexprune.network.forwards import restoring
from convexprune.network.links import Link, find_links
from convexprune.network.weights import mask_neurons_, remove_neurons_, resize_
from convexprune.solvers.errors import ConvexPruneError, InvalidInput, ShapeMismatch

EXACT = {torch.float64: 1e-12, torch.float32: 1e-5}
"""Sums of at most some hundred terms of order one, with zeros among them or without: only their order differs."""


class Branches(nn.Module):
    """A stem that a convolution and, flattened, a linear layer take; norms of every kind; and a residual sum."""

    def __init__(self, norm=lambda: nn.BatchNorm2d(6), bias=True):
        super().__init__()
        self.stem, self.norm, self.pool = nn.Conv2d(3, 6, 3, bias=bias), norm(), nn.AvgPool2d(2)
        self.conv, self.fc = nn.Conv2d(6, 5, 3, padding=1), nn.Linear(24, 5)
        self.bn, self.out = nn.BatchNorm1d(5), nn.Linear(5, 2)

    def forward(self, x):
        x = self.pool(self.norm(self.stem(x)).sigmoid())
        return self.out(self.conv(x).amax((2, 3)) + self.bn(self.fc(x.flatten(1))).relu())


def mlp():
    return nn.Sequential(
        nn.Linear(8, 7), nn.Softplus(), nn.Dropout(), nn.Linear(7, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)
    )


def lenet():
    convs = [nn.Conv2d(2, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.Tanh()]
    return nn.Sequential(*convs, nn.Flatten(), nn.Linear(54, 7), nn.ReLU(inplace=True), nn.Linear(7, 3))


MODELS = {
    "mlp": (mlp, (8,)),
    "lenet": (lenet, (2, 12, 12)),
    "branches": (Branches, (3, 6, 6)),
    "no affine": (lambda: Branches(lambda: nn.BatchNorm2d(6, affine=False)), (3, 6, 6)),
    "no statistics": (lambda: Branches(lambda: nn.BatchNorm2d(6, track_running_stats=False)), (3, 6, 6)),
    "neither": (lambda: Branches(lambda: nn.BatchNorm2d(6, affine=False, track_running_stats=False)), (3, 6, 6)),
    "no norm, no bias": (lambda: Branches(nn.Identity, bias=False), (3, 6, 6)),
}


def built(name, seed=0, dtype=torch.float64):
    """The model, with norms that do something, and inputs."""
    torch.manual_seed(seed)
    build, shape = (MODELS | JOINT)[name]
    model, x = build(), torch.randn(5, *shape, dtype=dtype)
    for module in model.modules():
        for key in ("weight", "bias", "running_mean", "running_var") if hasattr(module, "num_features") else ():
            if getattr(module, key) is not None:
                nn.init.uniform_(getattr(module, key), 0.5, 1.5)
    return model.to(dtype).eval(), x


def some(neurons, seed=0):
    """Some neurons."""
    g = torch.Generator().manual_seed(seed)
    count = int(torch.randint(1, neurons + 1, (1,), generator=g))
    return torch.randperm(neurons, generator=g)[:count].sort().values


def neurons_of(model, link):
    return len(model.get_submodule(link.producer).weight)


def cases():
    return [(name, producer) for name in MODELS for producer in find_links(built(name)[0])[0]]


def test_every_kind_of_link_is_there():
    assert [producer for name, producer in cases() if name in ("mlp", "lenet")] == ["0", "3", "0", "3", "7"]
    assert [producer for name, producer in cases() if name not in ("mlp", "lenet")] == ["stem"] * 5


def state_of(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_same(model, before):
    """Bit for bit."""
    now = model.state_dict()
    assert now.keys() == before.keys()
    for key, value in before.items():
        assert torch.equal(now[key], value), key


def close(one, other, tolerance):
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", EXACT)
@pytest.mark.parametrize(("name", "producer"), cases())
def test_removal_is_masking(name, producer, dtype):
    for seed in range(3):
        model, x = built(name, seed, dtype)
        link = find_links(model)[0][producer]
        kept = some(neurons_of(model, link), seed)
        masked = copy.deepcopy(model)
        remove_neurons_(model, link, kept)
        mask_neurons_(masked, link, kept)
        with torch.no_grad():
            close(model(x), masked(x), EXACT[dtype])


def test_removal_is_the_sum_over_the_kept_neurons():
    """The definition: the outputs of the consumer are its bias and the contributions of the kept neurons."""
    model, x = built("mlp")
    kept = torch.tensor([0, 2, 5])
    hidden = model[1](model[0](x))
    expected = model[3].bias + hidden[:, kept] @ model[3].weight[:, kept].T
    remove_neurons_(model, find_links(model)[0]["0"], kept)
    close(model[:4](x), expected, EXACT[torch.float64])


def test_flattened_filters_lose_all_their_positions():
    model, x = built("lenet")
    kept = torch.tensor([1, 2, 5])
    maps, fc = model[:6](x), copy.deepcopy(model[7])
    remove_neurons_(model, find_links(model)[0]["3"], kept)
    close(model[:6](x), maps[:, kept], EXACT[torch.float64])
    zeroed = torch.zeros_like(maps)
    zeroed[:, kept] = maps[:, kept]
    close(model[7](maps[:, kept].flatten(1)), fc(zeroed.flatten(1)), EXACT[torch.float64])
    assert model[7].in_features == 27


@pytest.mark.parametrize("change_", [remove_neurons_, mask_neurons_])
@pytest.mark.parametrize(("name", "producer"), cases())
def test_keeping_all_is_the_identity(name, producer, change_):
    model, x = built(name)
    link, before, outputs = find_links(model)[0][producer], state_of(model), model(x)
    change_(model, link, torch.arange(neurons_of(model, link)))
    assert_same(model, before)
    assert torch.equal(model(x), outputs)


@pytest.mark.parametrize(("name", "producer"), cases())
def test_parameters_are_fewer_by_what_belongs_to_the_neurons(name, producer):
    model, _ = built(name)
    link, count = find_links(model)[0][producer], lambda: sum(p.numel() for p in model.parameters())
    layers = [model.get_submodule(module) for module in (producer, *link.norms)]
    owned = sum(p[0].numel() for layer in layers for p in layer.parameters())
    consumers = [model.get_submodule(module).weight for module in link.consumers]
    owned += sum(w[:, :n].numel() for w, n in zip(consumers, link.repeat, strict=True))
    before, neurons = count(), neurons_of(model, link)
    remove_neurons_(model, link, torch.tensor([0, 2]))
    assert before - count() == (neurons - 2) * owned


@pytest.mark.parametrize(("name", "producer"), cases())
def test_sizes_say_what_the_tensors_are(name, producer):
    model, _ = built(name)
    link = find_links(model)[0][producer]
    kept = some(neurons_of(model, link), 1)
    remove_neurons_(model, link, kept)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            assert module.weight.shape == (module.out_features, module.in_features)
        elif isinstance(module, nn.Conv2d):
            assert module.weight.shape[:2] == (module.out_channels, module.in_channels)
    for norm in link.norms:
        assert model.get_submodule(norm).num_features == len(kept)
    assert all(p.is_contiguous() and p.is_leaf and p.grad is None for p in model.parameters())
    assert find_links(model)[0][producer] == link


def test_new_parameters_are_as_the_old_ones_were():
    model, x = built("lenet")
    model(x).sum().backward()
    model[3].weight.requires_grad_(False)
    held = dict(model.named_parameters())
    remove_neurons_(model, find_links(model)[0]["3"], torch.tensor([0, 3]))
    changed = {"3.weight", "3.bias", "4.weight", "4.bias", "7.weight"}
    for name, parameter in model.named_parameters():
        assert (parameter is not held[name]) == (name in changed)
        assert type(parameter) is nn.Parameter
        assert (parameter.dtype, parameter.device) == (held[name].dtype, held[name].device)
        assert parameter.requires_grad == (name != "3.weight")
        assert (parameter.grad is None) == (name in changed)
    assert held["3.weight"].shape == (6, 4, 3, 3)


def test_channels_last_weights():
    model, x = built("lenet")
    model.to(memory_format=torch.channels_last)
    link, masked = find_links(model)[0]["0"], copy.deepcopy(model)
    kept = some(4, 3)
    remove_neurons_(model, link, kept)
    mask_neurons_(masked, link, kept)
    close(model(x), masked(x), EXACT[torch.float64])
    assert model[3].weight.shape == (6, len(kept), 3, 3)
    assert all(model[name].weight.is_contiguous(memory_format=torch.channels_last) for name in (0, 3))


def test_masking_keeps_the_parameters():
    model, _ = built("branches")
    held = dict(model.named_parameters())
    mask_neurons_(model, find_links(model)[0]["stem"], torch.tensor([1, 2]))
    assert all(parameter is held[name] for name, parameter in model.named_parameters())
    assert model.stem.weight[[0, 3, 4, 5]].count_nonzero() == 0
    assert model.stem.bias[[0, 3, 4, 5]].count_nonzero() == 0


def test_training_goes_on_after_removal():
    model, x = built("branches")
    remove_neurons_(model, find_links(model)[0]["stem"], torch.tensor([0, 4, 5]))
    model.train()
    optimiser, losses = torch.optim.SGD(model.parameters(), lr=0.01), []
    for _ in range(5):
        optimiser.zero_grad()
        losses.append(model(x).square().mean())
        losses[-1].backward()
        optimiser.step()
    assert losses[-1] < losses[0]
    assert all(parameter.grad is not None for parameter in model.parameters())


def removed_and_masked(model, x, links, seed, rounds):
    """Neurons go in some order from one model, and are masked in its twin: the outputs agree."""
    masked = copy.deepcopy(model)
    alive = {producer: torch.arange(neurons_of(model, link)) for producer, link in links.items()}
    for number in range(rounds):
        producer = list(links)[(seed + number) % len(links)]
        kept = some(len(alive[producer]), seed + number)
        remove_neurons_(model, links[producer], kept)
        mask_neurons_(masked, links[producer], alive[producer][kept])
        alive[producer] = alive[producer][kept]
    with torch.no_grad():
        close(model(x), masked(x), EXACT[torch.float64])


@settings(max_examples=15)
@given(seed=st.integers(0, 999), name=st.sampled_from(list(MODELS)), rounds=st.integers(1, 6))
def test_repeated_removals_and_masks_agree(seed, name, rounds):
    """Links stay true while layers shrink, in any order; masks of masks are masks."""
    model, x = built(name, seed)
    removed_and_masked(model, x, find_links(model)[0], seed, rounds)


@pytest.mark.parametrize("name", MODELS)
def test_a_fresh_model_takes_a_removed_one_s_state(name):
    model, x = built(name)
    for producer, link in find_links(model)[0].items():
        remove_neurons_(model, link, some(neurons_of(model, link), len(producer)))
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    fresh, _ = built(name, seed=1)
    resize_(fresh, state)
    fresh.load_state_dict(state)
    assert torch.equal(fresh(x), model(x))
    assert all(p.requires_grad and p.is_contiguous() for p in fresh.parameters())


def test_resizing_to_the_same_sizes_changes_nothing():
    model, _ = built("branches")
    before, held = state_of(model), dict(model.named_parameters())
    resize_(model, built("branches", seed=3)[0].state_dict())
    assert_same(model, before)
    assert all(parameter is held[key] for key, parameter in model.named_parameters())


def test_resizing_leaves_missing_keys_to_load_state_dict():
    model, _ = built("lenet")
    resize_(model, {"4.running_mean": torch.zeros(2), "3.weight": torch.zeros(2, 4, 3, 3), "else": torch.zeros(9)})
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items() if key[0] in "347"}
    norm = dict.fromkeys(["4.weight", "4.bias", "4.running_mean", "4.running_var"], (2,))
    linear = {"7.weight": (7, 18), "7.bias": (7,)}
    assert shapes == {"3.weight": (2, 4, 3, 3), "3.bias": (2,), **norm, "4.num_batches_tracked": (), **linear}
    assert (model[3].out_channels, model[4].num_features, model[7].in_features) == (2, 2, 18)


OTHER_STATES = {
    "more neurons": ({"7.weight": (8, 54), "7.bias": (8,)}, r"7.weight is \[8, 54\] .* expected \[7, 54\]; 7.bias"),
    "another kernel": ({"3.weight": (6, 2, 2, 2)}, "3.weight"),
    "another number of axes": ({"7.weight": (7, 54, 1)}, "7.weight"),
    "no axes": ({"7.weight": ()}, "7.weight"),
    "bias and weight disagree": ({"7.weight": (5, 54), "9.weight": (3, 5)}, r"7.bias is \[7\] .* expected \[5\]"),
    "statistics disagree": ({"4.running_var": (3,)}, "4.running_var"),
    "no neuron, and inputs of some": (
        {"7.weight": (0, 54), "7.bias": (0,)},
        r"9.weight is \[3, 7\] .* expected \[3, 0\]",
    ),
    "a counter of another shape": ({"4.num_batches_tracked": (2,)}, "4.num_batches_tracked"),
    "fewer outputs of the network": ({"9.weight": (2, 7), "9.bias": (2,)}, r"9.weight .* expected \[3, 7\]; 9.bias"),
    "fewer inputs of the network": ({"0.weight": (2, 1, 3, 3)}, r"0.weight .* expected \[2, 2, 3, 3\]"),
    "inputs of neurons that are gone": ({"3.weight": (6, 4, 3, 3)}, r"3.weight .* expected \[6, 2, 3, 3\]"),
    "fewer inputs than neurons": ({"7.weight": (7, 45)}, r"7.weight .* expected \[7, 54\]"),
    "a norm of neurons that are gone": (
        {"3.weight": (5, 2, 3, 3), "3.bias": (5,), "7.weight": (7, 45)},
        r"4.weight is \[6\] in the state, expected \[5\]; 4.bias .* 4.running_mean .* 4.running_var",
    ),
}


@pytest.mark.parametrize("case", OTHER_STATES)
def test_other_states_are_refused_and_nothing_changes(case):
    """Beside a layer that has lost two filters, which alone would do."""
    model, (changes, told) = lenet(), OTHER_STATES[case]
    fits = {key: value.shape for key, value in model.state_dict().items()}
    fits |= {"0.weight": (2, 2, 3, 3), "0.bias": (2,), "3.weight": (6, 2, 3, 3)}
    resize_(lenet(), {key: torch.zeros(shape) for key, shape in fits.items()})
    state = {key: torch.zeros(shape) for key, shape in (fits | changes).items()}
    before, held = state_of(model), dict(model.named_parameters())
    with pytest.raises(ShapeMismatch, match=f"^{told}.*: only neurons that find_links"):
        resize_(model, state)
    assert_same(model, before)
    assert all(parameter is held[key] for key, parameter in model.named_parameters())
    assert model[0].out_channels == 4


def test_grouped_and_other_modules_are_not_resized():
    for model, smaller in (
        (nn.Conv2d(4, 4, 3, groups=2), {"weight": torch.zeros(2, 2, 3, 3)}),
        (nn.Embedding(5, 4), {"weight": torch.zeros(5, 3)}),
        (nn.GroupNorm(2, 4), {"weight": torch.zeros(2)}),
        (nn.Linear(4, 4), {"weight": torch.zeros(2, 4), "bias": torch.zeros(2)}),
    ):
        with pytest.raises(ShapeMismatch, match="weight is"):
            resize_(model, smaller)
    resize_(nn.Sequential(nn.LazyLinear(4)), {"0.weight": torch.zeros(2, 3)})


def test_shared_parameters_and_modules_are_not_resized():
    tied, twice = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Linear(4, 4)
    tied[1].weight = tied[0].weight
    state = {"0.weight": torch.zeros(3, 3), "1.weight": torch.zeros(3, 3)}
    placed = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    placed[1].weight = nn.Parameter(placed[0].weight.data)
    for model in (tied, placed, nn.Sequential(twice, twice)):
        with pytest.raises(ShapeMismatch, match=r"0.weight .* 1.weight .* expected \[4, 4\]"):
            resize_(model, state)


def test_a_model_that_cannot_be_traced_keeps_its_sizes():
    class Untraceable(nn.Sequential):
        def forward(self, x):
            return super().forward(x if x.sum() > 0 else -x)

    model = Untraceable(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    before = everything(model)
    resize_(model, {key: value + 1 for key, value in model.state_dict().items()})
    with pytest.raises(UnsupportedModule, match=r"^0.weight is \[2, 4\] .* \[3, 4\];.* and .* cannot be traced"):
        resize_(model, {"0.weight": torch.zeros(2, 4), "2.weight": torch.zeros(2, 2)})
    assert_everything(model, before)


def everything(model):
    """Objects and values of parameters and buffers, and the sizes, of every module."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    sizes = {n: {k: v for k, v in vars(m).items() if isinstance(v, int)} for n, m in model.named_modules()}
    return tensors, {name: tensor.detach().clone() for name, tensor in tensors.items()}, sizes


def assert_everything(model, before):
    tensors, values, sizes = everything(model)
    assert tensors.keys() == before[0].keys()
    assert all(tensor is before[0][name] for name, tensor in tensors.items())
    assert all(torch.equal(value, before[1][name]) for name, value in values.items())
    assert sizes == before[2]


def removes(model, links):
    for link in links.values():
        remove_neurons_(model, link, some(neurons_of(model, link), 2))


def masks(model, links):
    for link in links.values():
        kept = some(neurons_of(model, link), 2)
        mask_neurons_(model, link, kept)


def masks_then_removes(model, links):
    masks(model, links)
    removes(model, links)


def writes(model, links):
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.add_(1)


def trains(model, links):
    model.train()
    x = built("lenet")[1]
    model(x).sum().backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()


def swaps(model, links):
    model[0] = nn.Conv2d(1, 4, 3)
    model[7].weight.data = torch.zeros(2, 2)
    del model[9].bias
    model.half()


BODIES = [removes, masks, masks_then_removes, writes, trains, swaps]


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failure_puts_everything_back(body, error):
    model, x = built("lenet")
    links, before, outputs = find_links(model)[0], everything(model), model(x)

    def fails():
        with restoring(model):
            body(model, links)
            raise error("late")

    with pytest.raises(error, match="late"):
        fails()
    assert_everything(model, before)
    assert torch.equal(model(x), outputs)


def test_without_a_failure_nothing_is_put_back():
    model, x = built("lenet")
    links, twin = find_links(model)[0], copy.deepcopy(model)
    with restoring(model):
        removes(model, links)
    removes(twin, links)
    assert torch.equal(model(x), twin(x))


def test_a_failed_removal_among_others_is_put_back():
    model, _ = built("branches")
    stem, before = find_links(model)[0]["stem"], everything(model)

    def fails():
        with restoring(model):
            for _ in range(2):
                remove_neurons_(model, stem, torch.tensor([0, 2]))

    with pytest.raises(InvalidInput, match="from 0 to 1"):
        fails()
    assert_everything(model, before)


def test_what_is_no_module_is_refused():
    with pytest.raises(InvalidInput, match=r"expected a torch\.nn\.Module, found None"), restoring(None):
        pass
    with pytest.raises(InvalidInput, match=r"expected a torch\.nn\.Module"):
        resize_("model", {})


def test_modules_without_weights_yet_do_not_disturb():
    with pytest.raises(ValueError, match="late"), restoring(nn.Sequential(nn.LazyLinear(3))):
        raise ValueError("late")


def link(**changes):
    return Link(**{"producer": "3", "norms": ("4",), "activation": None, "consumers": ("7",), "repeat": (9,)} | changes)


KEPT = torch.tensor([0, 2, 5])
BAD = {
    "no tensor": (link(), [0, 1], InvalidInput, "found list"),
    "a mask": (link(), torch.tensor([True, False]), InvalidInput, "found torch.bool"),
    "short integers": (link(), KEPT.int(), InvalidInput, "int64"),
    "two axes": (link(), KEPT[None], InvalidInput, r"found torch.int64 \[1, 3\]"),
    "none behind a pool": (link(pools=("2", "maxpool2d")), KEPT[:0], InvalidInput, "of 3 go through 2, maxpool2d, and"),
    "too large": (link(), torch.tensor([0, 6]), InvalidInput, r"from 0 to 5.*found \[0, 6\]"),
    "negative": (link(), torch.tensor([-1, 2]), InvalidInput, "from 0 to 5"),
    "twice": (link(), torch.tensor([2, 2]), InvalidInput, "each once"),
    "descending": (link(), torch.tensor([3, 2]), InvalidInput, "ascending"),
    "another repeat": (link(repeat=(4,)), KEPT, ShapeMismatch, r"are \[6, 54\], expected \[6, 24\].*find_links"),
    "another producer": (link(producer="0"), KEPT, ShapeMismatch, r"neurons of 0 and inputs of 7 are \[4, 54\]"),
}


@pytest.mark.parametrize("change_", [remove_neurons_, mask_neurons_])
@pytest.mark.parametrize("case", BAD)
def test_bad_input_changes_nothing(case, change_):
    at, kept, error, message = BAD[case]
    model, x = built("lenet", dtype=torch.float32)
    before, outputs = everything(model), model(x)
    with pytest.raises(error, match=message) as caught:
        change_(model, at, kept)
    assert isinstance(caught.value, ConvexPruneError)
    assert_everything(model, before)
    assert torch.equal(model(x), outputs)


# Layers that lose neurons together


def joint(name, seed=0):
    """The model, inputs, and all links."""
    model, x = built(name, seed)
    return model, x, find_links(model, residual=True)[0]


def joint_cases():
    return [(name, producer) for name in JOINT for producer in joint(name)[2]]


@pytest.mark.parametrize(("name", "producer"), joint_cases())
@torch.no_grad()
def test_joint_removal_is_masking(name, producer):
    changed = []
    for seed in range(2):
        model, x, links = joint(name, seed)
        link, outputs, masked = links[producer], model(x), copy.deepcopy(model)
        kept = torch.arange(seed, neurons_of(model, link), 2)
        remove_neurons_(model, link, kept)
        mask_neurons_(masked, link, kept)
        close(model(x), masked(x), EXACT[torch.float64])
        changed.append((model(x) - outputs).abs().max())
    assert max(changed) > tolerances.CHANGED  # a ReLU may silence some


@pytest.mark.parametrize("name", JOINT)
@torch.no_grad()
def test_removed_neurons_do_not_matter_to_a_masked_network(name):
    """Whatever their own weights are: nothing takes them."""
    model, x, links = joint(name)
    for link in links.values():
        kept = torch.arange(neurons_of(model, link))[1:]
        mask_neurons_(model, link, kept)
    outputs = model(x)
    for link in links.values():
        for layer in map(model.get_submodule, link.producers):
            assert layer.weight[0].count_nonzero() == 0
            layer.weight[0] = 1.0
    close(model(x), outputs, EXACT[torch.float64])


@pytest.mark.parametrize("name", JOINT)
def test_all_tensors_of_a_joint_link_shrink_together(name):
    model, x, links = joint(name)
    for link in links.values():
        remove_neurons_(model, link, torch.tensor([1]))
    for layer in (module for module in model.modules() if hasattr(module, "weight")):
        if isinstance(layer, nn.Linear):
            assert layer.weight.shape == (layer.out_features, layer.in_features)
        elif hasattr(layer, "in_channels"):
            assert layer.weight.shape[:2] == (layer.out_channels, layer.in_channels // layer.groups)
    for link in links.values():
        assert {neurons_of(model, Link(name, (), None, (), ())) for name in link.producers} == {1}
    assert all(p.is_contiguous() and p.is_leaf and p.requires_grad for p in model.parameters())
    model.train()(x).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@settings(max_examples=15)
@given(seed=st.integers(0, 999), name=st.sampled_from(list(JOINT)), rounds=st.integers(1, 5))
def test_repeated_joint_removals_and_masks_agree(seed, name, rounds):
    removed_and_masked(*joint(name, seed), seed, rounds)


@pytest.mark.parametrize("name", JOINT)
def test_a_fresh_model_takes_a_joint_one_s_state(name):
    model, x, links = joint(name)
    for number, link in enumerate(links.values()):
        remove_neurons_(model, link, torch.arange(neurons_of(model, link))[number % 2 :: 2])
    fresh, _ = built(name, seed=1)
    with pytest.raises(RuntimeError, match="size mismatch"):
        fresh.load_state_dict(model.state_dict())
    fresh, _ = built(name, seed=1)
    resize_(fresh, model.state_dict())
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(x), model(x))


def test_states_in_which_partners_differ_are_refused():
    model, _, links = joint("perceptron")
    before = everything(model)
    smaller = copy.deepcopy(model)
    remove_neurons_(smaller, links["stem"], torch.tensor([0, 1, 2]))
    state = smaller.state_dict() | {"square.weight": torch.zeros(4, 3)}
    with pytest.raises(ShapeMismatch, match=r"^square.weight is \[4, 3\] in the state, expected \[3, 3\]: only"):
        resize_(model, state)
    assert_everything(model, before)


def test_a_residual_sum_is_that_of_the_kept_neurons():
    """The definition: the stream, neuron by neuron, computed from the layers as they were."""
    model, x, links = joint("perceptron")
    kept, old = torch.tensor([0, 3]), copy.deepcopy(model)
    remove_neurons_(model, links["stem"], kept)
    stem = old.stem(x).tanh()[:, kept]
    inner = (stem - old.norm.running_mean[kept]) / (old.norm.running_var[kept] + old.norm.eps).sqrt()
    inner = inner * old.norm.weight[kept] + old.norm.bias[kept]
    square = inner @ old.square.weight[kept][:, kept].T + old.square.bias[kept]
    close(model.square(model.norm(model.stem(x).tanh())), square, EXACT[torch.float64])


@pytest.mark.parametrize("change_", [remove_neurons_, mask_neurons_])
def test_partners_of_other_sizes_change_nothing(change_):
    model, _, links = joint("perceptron")
    before = everything(model)
    with pytest.raises(ShapeMismatch, match=r"neurons of stem, gate and inputs of .* are \[5, 4,"):
        change_(model, dataclasses.replace(links["stem"], partners=("gate",)), torch.tensor([0]))
    assert_everything(model, before)


def test_a_failure_puts_joint_links_back():
    model, x, links = joint("mobilenet")
    before, outputs = everything(model), model(x)

    def fails():
        with restoring(model):
            for link in links.values():
                remove_neurons_(model, link, torch.tensor([0]))
            raise ValueError("late")

    with pytest.raises(ValueError, match="late"):
        fails()
    assert_everything(model, before)
    assert torch.equal(model(x), outputs)


def test_what_is_removed_in_inference_mode_leaves_parameters_that_can_be_trained():
    model = mlp()
    with torch.inference_mode():
        remove_neurons_(model, find_links(model)[0]["0"], torch.tensor([1, 4]))
    model(torch.randn(5, 8)).sum().backward()
    assert model[0].weight.grad.shape == (2, 8)
