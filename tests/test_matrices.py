import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

from convexprune.errors import UnsupportedModule
from convexprune.matrices import input_matrices, output_matrices, unsupported, weight_matrices, write_back_
from convexprune.solvers.errors import ConvexPruneError, NonFinite, ShapeMismatch

MODES = ["zeros", "reflect", "replicate", "circular"]
pair = st.tuples(st.integers(1, 3), st.integers(1, 3))


@st.composite
def convolutions(draw):
    """A Conv2d in float64."""
    groups = draw(st.integers(1, 3))
    depthwise = draw(st.booleans())
    channels = groups * (1 if depthwise else draw(st.integers(1, 2)))
    kernel, dilation, stride = draw(pair), draw(pair), draw(pair)
    padding = draw(st.sampled_from(["same", "valid", "pair", "int"]))
    if padding == "same":
        stride = (1, 1)
    padding = {"pair": draw(st.tuples(st.integers(0, 2), st.integers(0, 2))), "int": draw(st.integers(0, 2))}.get(
        padding, padding
    )
    torch.manual_seed(draw(st.integers(0, 99)))
    return nn.Conv2d(
        channels,
        groups * draw(st.integers(1, 2)),
        kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        bias=draw(st.booleans()),
        padding_mode=draw(st.sampled_from(MODES)),
        dtype=torch.float64,
    )


def assert_product(layer, inputs, tolerance=1e-10):
    """X U is the module's own output, group by group."""
    with torch.no_grad():
        own = output_matrices(layer, layer(inputs))
    pairs = zip(input_matrices(layer, inputs), weight_matrices(layer), own, strict=True)
    for X, U, Y in pairs:
        assert (X @ U).shape == Y.shape
        torch.testing.assert_close(X @ U, Y, rtol=0, atol=tolerance)


def bits(layer):
    return [parameter.detach().clone().view(torch.int64) for parameter in layer.parameters()]


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@settings(max_examples=150, deadline=None)
@given(layer=convolutions(), batch=st.sampled_from([None, 1, 3]), size=st.tuples(st.integers(7, 9), st.integers(7, 9)))
def test_conv2d_is_a_matrix_product_both_ways(layer, batch, size):
    inputs = torch.randn(*(() if batch is None else (batch,)), layer.in_channels, *size, dtype=torch.float64)
    assert_product(layer, inputs)
    before = bits(layer)
    write_back_(layer, weight_matrices(layer))
    assert all(torch.equal(one, other) for one, other in zip(before, bits(layer), strict=True))
    other = [torch.randn_like(U) for U in weight_matrices(layer)]
    write_back_(layer, other)
    assert all(torch.equal(one, two) for one, two in zip(other, weight_matrices(layer), strict=True))
    assert_product(layer, inputs)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("padding", [0, 2, (1, 0), (0, 3), "valid", "same"])
def test_every_padding_in_every_mode(mode, padding):
    layer = nn.Conv2d(2, 3, (3, 5), padding=padding, padding_mode=mode, dtype=torch.float64)
    assert_product(layer, torch.randn(2, 2, 6, 7, dtype=torch.float64))


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("mode", MODES)
def test_same_padding_of_an_even_kernel_puts_the_odd_pixel_right_and_below(mode):
    layer = nn.Conv2d(2, 2, (2, 4), padding="same", padding_mode=mode, groups=2, dtype=torch.float64)
    assert_product(layer, torch.randn(2, 2, 6, 7, dtype=torch.float64))


@pytest.mark.parametrize("bias", [True, False])
@given(lead=st.lists(st.integers(0, 4), max_size=3), sizes=st.tuples(st.integers(1, 5), st.integers(1, 5)))
@settings(max_examples=40, deadline=None)
def test_linear_with_any_leading_dimensions(bias, lead, sizes):
    layer = nn.Linear(*sizes, bias=bias, dtype=torch.float64)
    inputs = torch.randn(*lead, sizes[0], dtype=torch.float64)
    assert_product(layer, inputs)
    (X,) = input_matrices(layer, inputs)
    assert X.shape == (torch.Size(lead).numel(), sizes[0] + bias)
    assert not bias or bool((X[:, -1] == 1).all())


def test_rows_run_over_samples_then_height_then_width():
    layer = nn.Conv2d(4, 6, 3, stride=2, groups=2, dtype=torch.float64)
    outputs = layer(torch.randn(2, 4, 9, 7, dtype=torch.float64)).detach()
    per_group = [Y.reshape(2, 4, 3, 3).permute(0, 3, 1, 2) for Y in output_matrices(layer, outputs)]
    assert torch.equal(torch.cat(per_group, dim=1), outputs)


@pytest.mark.parametrize("layer", [nn.Linear(3, 2), nn.Conv2d(2, 4, 3, groups=2)])
def test_no_samples_make_no_rows(layer):
    empty = torch.zeros((0, 3) if isinstance(layer, nn.Linear) else (0, 2, 5, 5))
    assert [len(X) for X in input_matrices(layer, empty)] == [0] * len(weight_matrices(layer))


def test_linear_inputs_without_bias_are_a_view():
    inputs = torch.randn(4, 3)
    (X,) = input_matrices(nn.Linear(3, 2, bias=False), inputs)
    assert X.data_ptr() == inputs.data_ptr()


@pytest.mark.parametrize("bias", [True, False])
def test_weights_are_detached_copies_in_the_modules_dtype(bias):
    layer = nn.Conv2d(2, 2, 1, groups=2, bias=bias, dtype=torch.float16)
    before = copy.deepcopy(layer.state_dict())
    for U in weight_matrices(layer):
        assert U.dtype == torch.float16
        assert U.is_contiguous()
        assert not U.requires_grad
        U.zero_()
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())


def test_write_back_keeps_parameters_gradients_and_flags():
    layer = nn.Linear(3, 2)
    layer(torch.randn(4, 3)).sum().backward()
    layer.bias.requires_grad_(False)
    weight, bias, grad = layer.weight, layer.bias, layer.weight.grad.clone()
    write_back_(layer, torch.ones(4, 2, dtype=torch.float64, requires_grad=True))
    assert layer.weight is weight
    assert layer.bias is bias
    assert weight.dtype == torch.float32
    assert bool((weight == 1).all())
    assert weight.requires_grad
    assert not bias.requires_grad
    assert weight.is_leaf
    assert torch.equal(weight.grad, grad)


def test_write_back_of_views_of_the_weight_itself():
    layer = nn.Linear(3, 3, bias=False)
    expected = layer.weight.detach().T.clone()
    write_back_(layer, layer.weight.detach())
    assert torch.equal(layer.weight.detach(), expected)


def refused(layer):
    good = weight_matrices(layer)
    nan, infinite, beyond = ([*good[:-1], good[-1].double().index_fill(0, torch.tensor(0), bad)] for bad in BAD)
    yield NonFinite, nan
    yield NonFinite, infinite
    yield NonFinite, beyond
    yield ShapeMismatch, [*good, good[0]]
    yield ShapeMismatch, [*good[:-1], good[-1][:-1]]
    yield ShapeMismatch, [*good[:-1], good[-1].T]
    yield ShapeMismatch, torch.stack(good)
    yield ShapeMismatch, []


BAD = (float("nan"), float("inf"), 1e300)


@pytest.mark.parametrize("layer", [nn.Linear(3, 2), nn.Linear(3, 2, bias=False), nn.Conv2d(4, 6, 3, groups=2)])
def test_refused_weights_change_nothing(layer):
    before = copy.deepcopy(layer.state_dict())
    for error, weights in refused(layer):
        with pytest.raises(error, match=type(layer).__name__):
            write_back_(layer, weights)
        assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())


@pytest.mark.parametrize("shape", [(), (4,), (2, 4), (2, 3, 4)])
def test_linear_inputs_of_another_size_are_refused(shape):
    with pytest.raises(ShapeMismatch, match="with 3 at axis -1"):
        input_matrices(nn.Linear(3, 2), torch.zeros(shape))
    with pytest.raises(ShapeMismatch, match="with 2 at axis -1"):
        output_matrices(nn.Linear(3, 2), torch.zeros(shape))


@pytest.mark.parametrize("shape", [(), (3, 5), (2, 5, 5), (1, 2, 5, 5), (1, 1, 3, 5, 5)])
def test_conv2d_inputs_of_another_layout_are_refused(shape):
    with pytest.raises(ShapeMismatch, match="with 3 at axis -3"):
        input_matrices(nn.Conv2d(3, 4, 3), torch.zeros(shape))
    with pytest.raises(ShapeMismatch, match="with 4 at axis -3"):
        output_matrices(nn.Conv2d(3, 4, 3), torch.zeros(shape))


@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite_are_refused(name, bad):
    layer = nn.Conv2d(2, 2, 3)
    with torch.no_grad():
        getattr(layer, name).view(-1)[0] = bad
    assert unsupported(layer) is None
    with pytest.raises(NonFinite, match="Conv2d"):
        weight_matrices(layer)


class Plain(nn.Linear):
    pass


class Scaled(nn.Linear):
    def forward(self, inputs):
        return 2 * super().forward(inputs)


class Standardised(nn.Conv2d):
    def _conv_forward(self, inputs, weight, bias):
        return super()._conv_forward(inputs, weight - weight.mean(), bias)


def patched():
    layer = nn.Linear(3, 2)
    layer.forward = lambda inputs: inputs
    return layer


def with_weight(make):
    layer = nn.Linear(4, 2)
    layer.weight = make(layer.weight.detach())
    return layer


@pytest.mark.parametrize("layer", [nn.Linear(3, 2), nn.Conv2d(2, 4, 3, groups=2, padding_mode="circular"), Plain(3, 2)])
def test_supported(layer):
    assert unsupported(layer) is None


REFUSED = {
    "conv1d": (lambda: nn.Conv1d(2, 3, 3), "keeps weights in weight.*leave this module out"),
    "transposed": (lambda: nn.ConvTranspose2d(2, 3, 3), "only Linear and Conv2d"),
    "embedding": (lambda: nn.Embedding(5, 3), "only Linear and Conv2d"),
    "attention": (lambda: nn.MultiheadAttention(4, 2), "in_proj_weight"),
    "lstm": (lambda: nn.LSTM(3, 4), "weight_ih_l0, weight_hh_l0"),
    "norm": (lambda: nn.LayerNorm(3), "no weight matrix of its own"),
    "container": (lambda: nn.Sequential(nn.Linear(3, 2)), "no weight matrix of its own"),
    "lazy": (lambda: nn.LazyLinear(3), "run the model once"),
    "lazy convolution": (lambda: nn.LazyConv2d(3, 3), "run the model once"),
    "overridden": (lambda: Scaled(3, 2), "forward of its own.*plain Linear"),
    "standardised": (lambda: Standardised(3, 2, 3), "forward of its own.*plain Conv2d"),
    "patched": (patched, "forward of its own"),
    "parametrised": (lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(3, 2)), "remove_parametrizations"),
    "bias": (lambda: nn.utils.parametrize.register_parametrization(nn.Linear(3, 2), "bias", nn.ReLU()), "bias is comp"),
    "pruned": (lambda: prune.l1_unstructured(nn.Linear(3, 2), "weight", 0.5), "prune.remove"),
    "complex": (lambda: nn.Linear(3, 2, dtype=torch.complex64), "complex"),
    "meta": (lambda: nn.Linear(3, 2, device="meta"), "meta device.*load the weights"),
    "float8": (lambda: with_weight(lambda w: nn.Parameter(w.to(torch.float8_e4m3fn))), "quantised to torch.float8"),
    "int8": (lambda: with_weight(lambda w: nn.Parameter(w.to(torch.int8), requires_grad=False)), "quantised to"),
    "sparse": (lambda: with_weight(lambda w: nn.Parameter(w.to_sparse())), "not a plain dense tensor"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_unsupported_modules_are_refused_with_a_reason(case):
    make, reason = REFUSED[case]
    layer = make()
    found = unsupported(layer)
    assert found is not None
    assert type(layer).__name__ in found
    calls = [
        lambda: weight_matrices(layer),
        lambda: input_matrices(layer, torch.zeros(2, 3)),
        lambda: output_matrices(layer, torch.zeros(2, 3)),
        lambda: write_back_(layer, torch.zeros(4, 2)),
    ]
    for call in calls:
        with pytest.raises(UnsupportedModule, match=reason) as caught:
            call()
        assert isinstance(caught.value, ConvexPruneError)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_old_weight_norm_is_refused():
    assert "remove_weight_norm" in unsupported(nn.utils.weight_norm(nn.Linear(3, 2)))


@pytest.mark.filterwarnings("ignore")
def test_quantised_modules_are_refused():
    assert "quantised" in unsupported(torch.ao.nn.quantized.Linear(3, 2))


def test_a_lazy_module_is_supported_once_it_has_run():
    layer = nn.LazyLinear(2)
    layer(torch.zeros(1, 3))
    assert unsupported(layer) is None


def test_a_parametrisation_made_permanent_is_supported():
    layer = prune.l1_unstructured(nn.Linear(3, 2), "weight", 0.5)
    assert unsupported(prune.remove(layer, "weight")) is None
