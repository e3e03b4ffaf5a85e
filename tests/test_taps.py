"""Where layers receive their inputs: with what a tap sees, X U is what the layer gives."""

import copy

import pytest
import torch
from calls import prune_
from torch import nn
from torch.nn import functional

from convexprune.errors import UnsupportedModule
from convexprune.layers import input_matrices, weight_matrices
from convexprune.network.taps import tap
from convexprune.solvers.errors import InvalidInput


def seen(model, name, *args, **kwargs):
    """What the tap of the layer sees in one call of the model, once for each call of the module, and the output."""
    found, spot = [], tap(model, name)
    hook = spot.module.register_forward_hook(
        lambda _module, given, named, output: found.append(spot.received(given, named, output)), with_kwargs=True
    )
    try:
        return found, model(*args, **kwargs)
    finally:
        hook.remove()


def attention(**options):
    torch.manual_seed(0)
    module = nn.MultiheadAttention(4, 2, dropout=0.5, dtype=torch.float64, **options).eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


def given(batch_first=False, batch=3, kdim=4, vdim=4):
    """Query [5, batch, 4], key and value of 6 positions; batch first, or without a batch."""
    shapes = [(5, 4), (6, kdim), (6, vdim)]
    tensors = [torch.randn(length, *([batch] if batch else []), d, dtype=torch.float64) for length, d in shapes]
    return [tensor.transpose(0, 1) for tensor in tensors] if batch_first and batch else tensors


def close(found, expected):
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def product_of(layer, received):
    [X], [U] = input_matrices(layer, received), weight_matrices(layer)
    return (X @ U).reshape(*received.shape[:-1], -1)


OPTIONS = [{}, {"bias": False}, {"add_bias_kv": True}, {"add_zero_attn": True}, {"kdim": 3, "vdim": 7}]
MASKS = {
    "no mask": {},
    "padding": {"key_padding_mask": torch.tensor([[False] * 4 + [True] * 2] * 3)},
    "attention": {"attn_mask": torch.ones(5, 6, dtype=torch.bool).triu(1)},
    "each head": {"attn_mask": torch.ones(6, 5, 6, dtype=torch.float64).tril()},
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_what_out_proj_receives_gives_the_attentions_output(options, batch_first, mask):
    module = attention(batch_first=batch_first, **options)
    tensors = given(batch_first, kdim=module.kdim, vdim=module.vdim)
    for need_weights in (True, False):
        [received], (output, _) = seen(module, "out_proj", *tensors, need_weights=need_weights, **MASKS[mask])
        close(product_of(module.out_proj, received), output.detach())


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_the_fast_path_gives_the_same(fast, padded):
    module, (x, *_) = attention(batch_first=True), given(batch_first=True)
    mask = torch.tensor([[False] * 3 + [True] * 2] * 3) if padded else None
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(fast)
    try:
        with torch.no_grad():
            [received], (output, _) = seen(module, "out_proj", x, x, x, key_padding_mask=mask, need_weights=False)
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
    close(product_of(module.out_proj, received), output)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_unbatched_inputs_as_keywords(options):
    module = attention(batch_first=True, **options)
    query, key, value = given(batch=0, kdim=module.kdim, vdim=module.vdim)
    [received], (output, _) = seen(module, "out_proj", query, value=value, key=key)
    close(product_of(module.out_proj, received), output.detach())
    [tensors], _ = seen(module, "", query, value=value, key=key)
    assert all(one is other for one, other in zip(tensors, (query, key, value), strict=True))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"kdim": 3, "vdim": 7}], ids=str)
def test_the_three_projections_make_the_attention(options, batch_first):
    """Softmax attention of X_q U_q, X_k U_k, X_v U_v, written out, is what out_proj receives."""
    module = attention(batch_first=batch_first, **options)
    tensors = given(batch_first, kdim=module.kdim, vdim=module.vdim)
    [received], _ = seen(module, "", *tensors)
    groups = zip(input_matrices(module, received), weight_matrices(module), received, strict=True)
    projected = [(X @ U).reshape(*tensor.shape[:-1], 4) for X, U, tensor in groups]
    samples = [tensor if batch_first else tensor.transpose(0, 1) for tensor in projected]
    q, k, v = (tensor.unflatten(-1, (2, 2)).transpose(1, 2) for tensor in samples)  # [samples, heads, positions, 2]
    attended = ((q @ k.mT / 2**0.5).softmax(-1) @ v).transpose(1, 2).flatten(-2)
    [inner], _ = seen(module, "out_proj", *tensors)
    close(inner, attended if batch_first else attended.transpose(0, 1))


def test_a_transformer_layer_is_seen_through_and_left_as_it_was():
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, dtype=torch.float64).eval()
    before = copy.deepcopy(model.state_dict())
    parameters, x = dict(model.named_parameters()), torch.randn(3, 5, 4, dtype=torch.float64)
    calls = []
    model.self_attn.register_forward_hook(lambda *_: calls.append(1))
    [received], _ = seen(model, "self_attn.out_proj", x)
    assert calls == [1]  # running the module once more calls no hook
    assert not received.requires_grad
    close(product_of(model.self_attn.out_proj, received), model.self_attn(x, x, x)[0].detach())
    assert all(parameters[name] is parameter for name, parameter in model.named_parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_weight_that_is_out_projs_too_keeps_its_value():
    module = attention(kdim=3)
    module.v_proj_weight = module.out_proj.weight
    tensors = given(kdim=3)
    [received], (output, _) = seen(module, "out_proj", *tensors)
    close(product_of(module.out_proj, received), output.detach())


class Own(nn.MultiheadAttention):
    """Calls its out_proj, which torch's own does not."""

    def forward(self, query, key, value):
        return self.out_proj(input=functional.relu(query)), None


def test_an_attention_with_a_forward_of_its_own_is_not_run_twice():
    module = Own(4, 2, dtype=torch.float64)
    assert tap(module, "out_proj").module is module.out_proj
    x = torch.randn(3, 4, dtype=torch.float64)
    [received], (output, _) = seen(module, "out_proj", x, x, x)
    assert torch.equal(received, x.relu())
    close(product_of(module.out_proj, received), output.detach())


class Calls(nn.Module):
    """A layer called twice, by position and by keyword, and one called out_proj that is no attention's."""

    def __init__(self):
        super().__init__()
        self.layer, self.conv, self.out_proj = nn.Linear(4, 4), nn.Conv1d(1, 2, 3), nn.Linear(4, 2)

    def forward(self, x):
        x = self.layer(input=self.layer(x))
        return self.out_proj(x), self.conv(x[:, None])


def test_ordinary_layers_are_seen_where_they_are():
    model, x = Calls().double(), torch.randn(3, 4, dtype=torch.float64)
    found, (output, maps) = seen(model, "layer", x)
    assert torch.equal(found[0], x)
    assert torch.equal(found[1], model.layer(x))
    [received], _ = seen(model, "out_proj", x)
    close(product_of(model.out_proj, received.detach()), output.detach())
    [received], _ = seen(model, "conv", x)
    [X], [U] = input_matrices(model.conv, received), weight_matrices(model.conv)
    torch.testing.assert_close((X @ U).reshape(3, 2, 2).transpose(1, 2), maps.detach())
    assert tap(model, "").module is model


def test_a_tap_says_whether_its_module_gives_the_layers_output():
    model = nn.TransformerEncoderLayer(4, 2, 8)
    plain = {name: tap(model, name).plain for name in ("linear1", "self_attn", "self_attn.out_proj")}
    assert plain == {"linear1": True, "self_attn": False, "self_attn.out_proj": False}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_model_is_refused_in_words():
    compiled = torch.jit.trace(nn.Sequential(nn.Linear(3, 3)), torch.zeros(1, 3))
    with pytest.raises(UnsupportedModule, match=r"compiled by torch\.jit: prune the Python module, then script it"):
        tap(compiled, "0")


class PerSample(nn.Module):
    """Its first layer sees one sample at a time, all of them at once."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.outer(torch.vmap(lambda row: functional.relu(self.inner(row)))(x))


def test_a_layer_inside_a_transform_is_refused_in_words_and_can_be_left_out():
    torch.manual_seed(0)
    model, x = PerSample().eval(), torch.randn(20, 3)
    with pytest.raises(UnsupportedModule, match=r"'inner' is called inside torch\.vmap .* layers='!inner'"):
        prune_(model, x, eps=0.1)
    report = prune_(model, x, eps=0.1, layers="!inner")
    assert report.certified
    assert [row.name for row in report.layers] == ["outer"]


@pytest.mark.parametrize("name", ["nothing", "layer.weight", "conv.deeper", "out_proj.out_proj"])
def test_names_of_no_module_are_refused(name):
    with pytest.raises(InvalidInput, match="the model has no module"):
        tap(Calls(), name)
