"""Zeros stay zeros in training, and everything else about the model stays as it was."""

import copy
import io
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from convexprune import Options, load_weights_into_, prune_, save_weights
from convexprune.errors import NothingToPrune, UnsupportedModule
from convexprune.files.weights import load_weights
from convexprune.layers import weight_matrices
from convexprune.masks import (
    Mask,
    from_torch_prune_,
    keep_masks_,
    kept_masks,
    load_masked_state_dict_,
    make_permanent_,
    to_torch_prune_,
)
from convexprune.network.links import find_links
from convexprune.network.weights import remove_neurons_
from convexprune.solvers.errors import InvalidInput


class Conv1D(nn.Module):
    """Transformers' linear layer, inputs first."""

    def __init__(self, outputs, inputs):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(torch.randn(outputs))

    def forward(self, x):
        return torch.addmm(self.bias, x, self.weight)


class Attention(nn.Module):
    """Attention to the inputs themselves: one packed projection, or three for keys and values of other sizes."""

    def __init__(self, size=None):
        super().__init__()
        self.of, self.attention = size or 4, nn.MultiheadAttention(4, 2, kdim=size, vdim=size, batch_first=True)

    def forward(self, x):
        keys = x if self.of == 4 else torch.cat([x, x], dim=-1)[..., : self.of]
        return self.attention(x, keys, keys)[0]


class Tied(nn.Module):
    """A language model's embedding and decoder share their weight."""

    def __init__(self):
        super().__init__()
        self.embedding, self.hidden, self.decoder = nn.Embedding(6, 4), nn.Linear(4, 4), nn.Linear(4, 6, bias=False)
        self.decoder.weight = self.embedding.weight

    def forward(self, x):
        return self.decoder(self.hidden(self.embedding(x)).tanh())


def mlp():
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))


def convolutions():
    first = [nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=2), nn.ReLU()]
    return nn.Sequential(*first, nn.ConvTranspose2d(4, 2, 2), nn.Flatten(2), nn.Conv1d(2, 2, 3))


MODELS = {
    "mlp": (mlp, (7, 5)),
    "convolutions": (convolutions, (3, 2, 7, 7)),
    "packed attention": (Attention, (2, 3, 4)),
    "three projections": (lambda: Attention(6), (2, 3, 4)),
    "encoder": (lambda: nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), (2, 3, 4)),
    "conv1d of transformers": (lambda: nn.Sequential(Conv1D(6, 5), nn.Tanh(), Conv1D(2, 6)), (7, 5)),
    "tied": (Tied, None),
}


def built(name, seed=0):
    """A model in eval mode with two fifths of its weights zero, and inputs."""
    build, shape = MODELS[name]
    torch.manual_seed(seed)
    model = build().double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(torch.rand_like(parameter) > 0.4)
    return model, torch.randint(6, (7,)) if shape is None else torch.randn(shape, dtype=torch.float64)


def outputs(model, x):
    with torch.no_grad():
        return model(x)


ROUNDING = 1e-8
"""Of a few steps of training in double precision; divided by tiny second moments, they enlarge the rounding."""


def same(one, other, atol=1e-12):
    """Equal up to rounding, for sums may be taken in another order where the memory is laid out otherwise."""
    return torch.allclose(one, other, rtol=0, atol=atol)


def zeros(model):
    """The pattern of every weight as the model computes with it."""
    model = copy.deepcopy(model)
    make_permanent_(model)
    return {name: weight == 0 for name, weight in model.named_parameters() if weight.dim() >= 2}


def alike(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def snapshot(model):
    """All that an error must leave alone."""
    state = {key: value.clone() for key, value in model.state_dict().items()}
    return state, [type(module) for module in model.modules()], [id(own) for own in model.parameters()]


def assert_unchanged(model, before):
    state, kinds, parameters = snapshot(model)
    assert alike(state, before[0])
    assert list(state) == list(before[0])
    assert (kinds, parameters) == before[1:]


@pytest.mark.parametrize("name", MODELS)
def test_masking_and_unmasking_change_nothing_but_what_keeps_the_zeros(name: str) -> None:
    model, x = built(name)
    expected, before = outputs(model, x), snapshot(model)
    places = {key: own.data_ptr() for key, own in model.named_parameters()}
    held = {id(own): key for key, own in model.named_parameters()}
    gradients = {key: torch.randn_like(own) for key, own in model.named_parameters()}
    for key, own in model.named_parameters():
        own.grad = gradients[key]
    masks = keep_masks_(model)
    patterns = {key: value for key, value in before[0].items() if value.dim() >= 2 and (value == 0).any()}
    assert alike({key: value != 0 for key, value in patterns.items()}, masks)
    assert same(outputs(model, x), expected)
    assert {id(own) for own in model.parameters()} == set(held)  # an optimiser's parameters are still the model's
    make_permanent_(model)
    assert_unchanged(model, before)
    assert {key: own.data_ptr() for key, own in model.named_parameters()} == places
    assert all(held[id(own)] == key and own.grad is gradients[key] for key, own in model.named_parameters())
    assert same(outputs(model, x), expected)
    assert kept_masks(model) == {}


OPTIMISERS = {
    "momentum": lambda parameters: torch.optim.SGD(parameters, 0.05, momentum=0.9, weight_decay=0.1, nesterov=True),
    "adam": lambda parameters: torch.optim.Adam(parameters, 0.01, weight_decay=0.1),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, 0.01, weight_decay=0.1),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, 0.01, momentum=0.5),
}


def train(model, x, optimiser, steps=4):
    losses = []
    for _ in range(steps):
        optimiser.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return torch.tensor(losses, dtype=torch.float64)


@settings(max_examples=16)
@given(
    st.sampled_from(sorted(set(MODELS) - {"encoder"})),
    st.sampled_from(sorted(OPTIMISERS)),
    st.booleans(),
    st.integers(0, 99),
)
def test_masked_training_is_training_of_the_nonzeros_alone(name: str, kind: str, early: bool, seed: int) -> None:
    model, x = built(name, seed)
    reference = copy.deepcopy(model)  # dense, with gradients that are zero where the weights are
    for own in reference.parameters():
        if own.dim() >= 2:
            own.register_hook(partial(torch.mul, own.detach() != 0))
    before = zeros(model)
    optimiser = OPTIMISERS[kind](model.parameters()) if early else None
    keep_masks_(model)
    optimiser = optimiser or OPTIMISERS[kind](model.parameters())
    losses, expected = train(model, x, optimiser), train(reference, x, OPTIMISERS[kind](reference.parameters()))
    assert same(losses, expected, ROUNDING)
    make_permanent_(model)
    assert alike(zeros(model), before)
    assert all(
        same(own, other, ROUNDING) for own, other in zip(model.parameters(), reference.parameters(), strict=True)
    )
    assert not alike(model.state_dict(), built(name, seed)[0].state_dict())


def test_momentum_from_before_the_pruning_does_not_bring_weights_back() -> None:
    model, x = built("mlp")
    optimiser = OPTIMISERS["momentum"](model.parameters())
    train(model, x, optimiser)
    assert model[0].weight.all()
    with torch.no_grad():
        model[0].weight[:, :2] = 0
    keep_masks_(model)
    train(model, x, optimiser)
    assert model[0].parametrizations.weight.original[:, :2].any()  # the optimiser moved them, and nothing sees it
    expected = outputs(model, x)
    make_permanent_(model)
    assert not model[0].weight[:, :2].any()
    assert same(outputs(model, x), expected)


def test_what_the_original_holds_behind_the_mask_is_never_seen() -> None:
    model, x = built("mlp")
    expected, masks = outputs(model, x), keep_masks_(model)
    original = model[0].parametrizations.weight.original
    with torch.no_grad():
        original[~masks["0.weight"]] = torch.nan
    model(x).sum().backward()
    assert same(outputs(model, x), expected)
    assert not original.grad[~masks["0.weight"]].any()
    make_permanent_(model)
    assert same(outputs(model, x), expected)


def test_called_again_masks_are_taken_anew() -> None:
    model, _ = built("mlp")
    keep_masks_(model)
    before = snapshot(model)
    keep_masks_(model)
    assert_unchanged(model, before)
    with torch.no_grad():
        model[0].parametrizations.weight.original[1] = 0
        model[2].parametrizations.weight.original.add_(1)  # behind the mask too, where it does not count
    assert not keep_masks_(model)["0.weight"][1].any()
    assert alike(
        {"2.weight": kept_masks(model)["2.weight"]}, {"2.weight": before[0]["2.parametrizations.weight.0.mask"]}
    )
    assert len(model[0].parametrizations.weight) == 1


def test_patterns_choose_modules_and_dense_weights_get_no_mask() -> None:
    model, _ = built("convolutions")
    assert list(keep_masks_(model, ["3", "0"])) == ["0.weight", "3.weight"]
    make_permanent_(model)
    with torch.no_grad():
        model[3].weight.fill_(1)
    assert list(keep_masks_(model, "[03]")) == ["0.weight"]
    make_permanent_(model)
    assert list(keep_masks_(model, "!0")) == ["5.weight", "7.weight"]
    before = snapshot(model)
    with pytest.raises(NothingToPrune, match=r"matches \['conv\*'\].*0, 3, 5, 7"):
        keep_masks_(model, ["0", "conv*"])
    with pytest.raises(NothingToPrune, match="none"):
        keep_masks_(nn.BatchNorm1d(3))
    with pytest.raises(InvalidInput, match="patterns of names"):
        keep_masks_(model, 3)
    assert_unchanged(model, before)


@pytest.mark.parametrize("name", MODELS)
def test_a_masked_state_loads_into_a_fresh_model_and_training_goes_on_as_if_never_stopped(name, tmp_path) -> None:
    model, x = built(name)
    keep_masks_(model)
    optimiser = OPTIMISERS["adam"](model.parameters())
    train(model, x, optimiser)
    file, steps = save_weights(model, tmp_path / "half.safetensors"), copy.deepcopy(optimiser.state_dict())
    fresh = MODELS[name][0]().double().eval()
    load_masked_state_dict_(fresh, load_weights(file))
    assert alike(kept_masks(fresh), kept_masks(model))
    assert same(outputs(fresh, x), outputs(model, x))
    again = OPTIMISERS["adam"](fresh.parameters())
    again.load_state_dict(steps)
    assert same(train(fresh, x, again), train(model, x, optimiser), ROUNDING)
    load_weights_into_(fresh, file)  # one that is masked already takes it as any other model does
    load_masked_state_dict_(model, load_weights(file))
    assert same(outputs(fresh, x), outputs(model, x))
    make_permanent_(fresh)
    assert list(fresh.state_dict()) == list(MODELS[name][0]().state_dict())


STATES = {
    "parametrizations.weight.original": lambda state: state.pop("0.parametrizations.weight.original"),
    "no such module": lambda state: state.update({"9.parametrizations.weight.0.mask": torch.ones(1)}),
    "does not have": lambda state: state.update({"1.parametrizations.weight.0.mask": torch.ones(1)}),
    "more": lambda state: state.update(more=torch.ones(1)),
    "size mismatch": lambda state: state.update({"2.parametrizations.weight.0.mask": torch.ones(1)}),
}


@pytest.mark.parametrize("fault", STATES)
@pytest.mark.parametrize("masked", [False, True])
def test_a_state_that_does_not_fit_leaves_the_model_unchanged(fault: str, masked: bool) -> None:
    model, _ = built("mlp")
    keep_masks_(model)
    state = model.state_dict()
    STATES[fault](state)
    other = built("mlp", seed=1)[0]
    if masked:
        keep_masks_(other)
    before = snapshot(other)
    with pytest.raises(InvalidInput, match=fault):
        load_masked_state_dict_(other, state)
    assert_unchanged(other, before)
    with pytest.raises(InvalidInput, match="make_permanent_"):
        load_masked_state_dict_(model, mlp().state_dict())


@pytest.mark.parametrize("name", ["mlp", "three projections", "tied"])
def test_deep_copies_are_masked_and_on_their_own(name: str) -> None:
    model, x = built(name)
    with torch.no_grad():
        first = next(own for own in model.parameters() if own.dim() >= 2)
        late = first.clone()
        first.fill_(1)  # masked only in a copy, once there is one
    keep_masks_(model)
    expected, before = outputs(model, x), snapshot(model)
    copies = [copy.deepcopy(model) for _ in range(3)]
    make_permanent_(copies[0])
    to_torch_prune_(copies[1])
    with torch.no_grad():
        next(own for own in copies[2].parameters() if own.shape == late.shape and own.eq(1).all()).copy_(late)
    assert len(keep_masks_(copies[2])) > len(kept_masks(model))
    assert_unchanged(model, before)
    assert all(same(outputs(twin, x), expected) for twin in (model, *copies[:2]))
    make_permanent_(model)
    assert same(outputs(copies[2], x), outputs(copy.deepcopy(copies[2]), x))
    assert len(kept_masks(copies[2])) > 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_masks_stay_masks_in_another_dtype(dtype: torch.dtype) -> None:
    model, _ = built("mlp")
    masks = {key: mask.clone() for key, mask in keep_masks_(model).items()}
    reference = copy.deepcopy(model)
    model.to(dtype)
    assert all(mask.dtype == torch.bool for mask in kept_masks(model).values())
    assert alike(kept_masks(model), masks)
    assert torch.equal(model[0].weight, reference[0].weight.to(dtype))


def test_whole_modules_are_pickled_only_once_their_masks_are_permanent() -> None:
    model, x = built("mlp")
    keep_masks_(model)
    with pytest.raises(RuntimeError, match="only supported through state_dict"):
        torch.save(model, io.BytesIO())
    make_permanent_(model)
    torch.save(model, file := io.BytesIO())
    file.seek(0)
    assert same(outputs(torch.load(file, weights_only=False), x), outputs(model, x))


class Twice(nn.Module):
    def forward(self, tensor):
        return 2 * tensor


def lazy():
    return nn.Sequential(nn.Linear(5, 6), nn.LazyLinear(3))


REFUSED = {
    "parametrized already, by _WeightNorm": lambda model: parametrizations.weight_norm(model[2]),
    "from_torch_prune_": lambda model: prune.l1_unstructured(model[2], "weight", 3),
    "no values yet": lambda model: model.append(nn.LazyLinear(3)),
    "load the weights": lambda model: model.append(nn.Linear(3, 3, device="meta")),
    "no parameter that can be": lambda model: setattr(
        model[2], "weight", nn.Parameter(model[2].weight.detach().to_sparse())
    ),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_weights_that_cannot_be_masked_are_refused_and_may_be_left_out(reason: str) -> None:
    model, x = built("mlp")
    REFUSED[reason](model)
    kinds, ids = [type(module) for module in model.modules()], [id(own) for own in model.parameters()]
    with pytest.raises(UnsupportedModule, match=rf"{reason}.*layers=.*unchanged"):
        keep_masks_(model)
    assert kinds == [type(module) for module in model.modules()]
    assert ids == [id(own) for own in model.parameters()]
    expected = outputs(model[0], x)
    assert "0.weight" in keep_masks_(model, "0")
    assert same(outputs(model[0], x), expected)


TAKING_MASKS = {
    "all": keep_masks_,
    "another layer's": lambda model: keep_masks_(model, "0"),
    "torch's": from_torch_prune_,
    "off": make_permanent_,
    "over": to_torch_prune_,
}


@pytest.mark.parametrize("taking", TAKING_MASKS)
def test_a_mask_under_another_parametrization_is_refused_before_anything_changes(taking: str) -> None:
    model, x = built("mlp")
    keep_masks_(model, "2")
    parametrize.register_parametrization(model[2], "weight", Twice())
    if taking == "torch's":
        prune.l1_unstructured(model[0], "weight", 3)
    before, expected = snapshot(model), outputs(model, x)
    with pytest.raises(UnsupportedModule, match=r"2\.weight.*on top of its mask.*remove_parametrizations"):
        TAKING_MASKS[taking](model)
    assert_unchanged(model, before)
    parametrize.remove_parametrizations(model[2], "weight")
    assert (model[2].weight == 0).any()
    assert same(outputs(model, x), expected)
    TAKING_MASKS[taking](model)
    assert same(outputs(model, x), expected)


def test_a_masked_layer_is_not_pruned_before_its_mask_is_permanent() -> None:
    model, _ = built("mlp")
    keep_masks_(model)
    with pytest.raises(UnsupportedModule, match=r"convexprune\.masks\.make_permanent_\(model\)"):
        weight_matrices(model[0])
    make_permanent_(model)
    assert torch.equal(weight_matrices(model[0])[0][:5], model[0].weight.mT)


def test_a_shared_weight_is_masked_everywhere_or_not_at_all() -> None:
    model, x = built("tied")
    before = snapshot(model)
    with pytest.raises(UnsupportedModule, match=r"decoder\.weight is shared.*unchanged"):
        keep_masks_(model, ["hidden", "decoder"])
    assert_unchanged(model, before)
    keep_masks_(model)
    assert model.embedding.parametrizations.weight.original is model.decoder.parametrizations.weight.original
    train(model, x, OPTIMISERS["adam"](model.parameters()))
    assert torch.equal(model.embedding.weight, model.decoder.weight)
    make_permanent_(model)
    assert model.embedding.weight is model.decoder.weight


def test_weights_in_one_place_of_memory_are_shared() -> None:
    model = mlp()
    model.append(nn.Linear(3, 5, bias=False))
    model[3].weight = nn.Parameter(model[0].weight.data[:5, 2:])
    with torch.no_grad():
        model[0].weight[::2] = 0
    before = snapshot(model)
    for layers in ("0", "3"):
        with pytest.raises(UnsupportedModule, match=rf"{layers}\.weight is shared.*unchanged"):
            keep_masks_(model, layers)
        assert_unchanged(model, before)
    masks = keep_masks_(model)
    assert torch.equal(masks["3.weight"], masks["0.weight"][:5, 2:])
    make_permanent_(model)
    model[0].register_buffer("view", model[0].weight.detach()[1:])
    with pytest.raises(UnsupportedModule, match=r"0\.weight is shared"):
        keep_masks_(model)


def test_a_module_of_two_names_is_loaded_with_its_mask() -> None:
    def build() -> nn.Module:
        layer = nn.Linear(4, 4)
        return nn.Sequential(layer, nn.Tanh(), layer)

    model, fresh, x = build(), build(), torch.randn(3, 4)
    with torch.no_grad():
        model[0].weight[:2] = 0
    keep_masks_(model)
    load_masked_state_dict_(fresh, model.state_dict())
    assert fresh[0] is fresh[2]
    assert same(outputs(fresh, x), outputs(model, x))
    assert alike(kept_masks(fresh), kept_masks(model))


def test_other_parametrizations_of_the_module_stay() -> None:
    model, x = built("mlp")
    parametrize.register_parametrization(model[0], "bias", Twice())
    twin = copy.deepcopy(model)
    expected, before = outputs(model, x), snapshot(model)
    keep_masks_(model)
    assert same(outputs(twin, x), expected)
    assert same(outputs(model, x), expected)
    make_permanent_(model)
    assert alike(model.state_dict(), before[0])
    assert same(outputs(model, x), expected)
    assert parametrize.is_parametrized(model[0], "bias")


@pytest.mark.parametrize("name", MODELS)
def test_masks_go_to_torch_prune_and_back(name: str) -> None:
    model, x = built(name)
    before, expected = snapshot(model), outputs(model, x)
    masks = {key: mask.clone() for key, mask in keep_masks_(model).items()}
    to_torch_prune_(model)
    assert prune.is_pruned(model)
    assert kept_masks(model) == {}
    assert {key.removesuffix("_mask") for key, _ in model.named_buffers() if key.endswith("_mask")} == set(masks)
    assert all(torch.equal(model.get_buffer(f"{key}_mask").bool(), masks[key]) for key in masks)
    assert same(outputs(model, x), expected)
    assert sorted(map(id, model.parameters())) == sorted(before[2])
    assert alike(from_torch_prune_(model), masks)
    assert not prune.is_pruned(model)
    assert same(outputs(model, x), expected)
    make_permanent_(model)
    assert_unchanged(model, before)


def test_any_mask_of_torch_prune_is_taken_over_and_trained_as_there() -> None:
    model, x = built("mlp")
    prune.l1_unstructured(model[0], "weight", 9)
    prune.random_structured(model[0], "weight", 1, dim=0)  # two masks in one container
    prune.l1_unstructured(model[0], "bias", 2)
    theirs, order = mlp().double().eval(), [key for key, _ in model.named_parameters()]
    for name in ("weight", "bias"):
        prune.custom_from_mask(theirs[0], name, model[0].get_buffer(f"{name}_mask"))
    theirs.load_state_dict(model.state_dict())
    masks = from_torch_prune_(model)
    assert set(masks) == {"0.weight", "0.bias"}
    assert int((~masks["0.bias"]).sum()) == 2
    losses = [train(network, x, OPTIMISERS["adam"](network.parameters())) for network in (model, theirs)]
    assert same(*losses, ROUNDING)
    make_permanent_(model)
    assert [key for key, _ in model.named_parameters()] == [key.removesuffix("_orig") for key in order]
    assert same(model[0].weight, theirs[0].weight_mask * theirs[0].weight_orig, ROUNDING)


def test_masks_of_torch_prune_that_cannot_be_taken_over_are_refused() -> None:
    model = mlp()
    prune.l1_unstructured(model[0], "weight", 9)
    prune.custom_from_mask(model[2], "weight", torch.full((3, 6), 0.5))
    before = snapshot(model)
    with pytest.raises(UnsupportedModule, match=r"2\.weight_mask holds other values"):
        from_torch_prune_(model)
    assert_unchanged(model, before)
    recurrent = nn.GRU(3, 3)
    prune.l1_unstructured(recurrent, "weight_hh_l0", 4)
    with pytest.raises(UnsupportedModule, match="recurrent"):
        from_torch_prune_(recurrent)
    assert prune.is_pruned(recurrent)


def test_a_model_pruned_by_net_trim_keeps_its_nonzeros_in_training() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)), torch.rand(60, 5)
    report = prune_(model, x, eps=0.1, options=Options(tol=1e-2, feas_tol=1e-2))
    masks = keep_masks_(model)
    assert [int(mask.sum()) for mask in masks.values()] == [row.nonzeros for row in report.layers]
    train(model, x, OPTIMISERS["adam"](model.parameters()))
    make_permanent_(model)
    assert [int(model[i].weight.count_nonzero()) for i in (0, 2)] == [row.nonzeros for row in report.layers]


def test_a_shrunk_model_is_masked_and_its_state_shrinks_a_fresh_one() -> None:
    model, x = built("mlp")
    remove_neurons_(model, find_links(model)[0]["0"], torch.tensor([0, 2, 5]))
    assert keep_masks_(model)["0.weight"].shape == (3, 5)
    fresh = mlp().double().eval()
    before = snapshot(fresh)
    with pytest.raises(InvalidInput, match="size mismatch"):
        load_masked_state_dict_(fresh, model.state_dict())
    assert_unchanged(fresh, before)
    load_masked_state_dict_(fresh, model.state_dict(), resize=True)
    assert same(outputs(fresh, x), outputs(model, x))
    assert fresh[0].out_features == 3


def test_a_mask_is_a_plain_module() -> None:
    mask = Mask(torch.tensor([True, False]), ("weight",))
    assert torch.equal(mask(torch.tensor([-0.0, torch.inf])), torch.zeros(2))
    assert mask(torch.ones(2, dtype=torch.float16)).dtype == torch.float16
    assert list(mask.state_dict()) == ["mask"]
