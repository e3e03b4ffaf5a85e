import copy
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from convexprune.errors import UnsupportedModule
from convexprune.layers import input_matrices, output_matrices, unsupported, weight_matrices, write_back_
from convexprune.solvers.errors import ConvexPruneError, NonFinite, ShapeMismatch

MODES = ["zeros", "reflect", "replicate", "circular"]
CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


@st.composite
def convolutions(draw):
    """A convolution of one to three axes in float64, and inputs for it."""
    axes = draw(st.sampled_from([1, 2, 2, 3]))
    each = st.tuples(*[st.integers(1, 3)] * axes) if axes < 3 else st.tuples(*[st.integers(1, 2)] * axes)
    groups = draw(st.integers(1, 3))
    depthwise = draw(st.booleans())
    channels = groups * (1 if depthwise else draw(st.integers(1, 2)))
    kernel, dilation, stride = draw(each), draw(each), draw(each)
    padding = draw(st.sampled_from(["same", "valid", "tuple", "int"]))
    if padding == "same":
        stride = (1,) * axes
    numbers = {"tuple": draw(st.tuples(*[st.integers(0, 2)] * axes)), "int": draw(st.integers(0, 2))}
    torch.manual_seed(draw(st.integers(0, 99)))
    layer = CONVOLUTIONS[axes](
        channels,
        groups * draw(st.integers(1, 2)),
        kernel,
        stride=stride,
        padding=numbers.get(padding, padding),
        dilation=dilation,
        groups=groups,
        bias=draw(st.booleans()),
        padding_mode=draw(st.sampled_from(MODES)),
        dtype=torch.float64,
    )
    samples = draw(st.sampled_from([(), (1,), (3,)]))
    longest = 7 if axes < 3 else 4
    sizes = draw(st.tuples(*[st.integers(longest, longest + 2)] * axes))
    return layer, torch.randn(*samples, channels, *sizes, dtype=torch.float64)


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
@settings(max_examples=200, deadline=None)
@given(drawn=convolutions(), last=st.booleans())
def test_a_convolution_is_a_matrix_product_both_ways(drawn, last):
    layer, inputs = drawn
    if last and inputs.dim() == 4 and isinstance(layer, nn.Conv2d):
        layer, inputs = layer.to(memory_format=torch.channels_last), inputs.to(memory_format=torch.channels_last)
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
    yield ShapeMismatch, good[0][None]
    yield ShapeMismatch, []


BAD = (float("nan"), float("inf"), 1e300)


REWRITTEN = [nn.Linear(3, 2), nn.Linear(3, 2, bias=False), nn.Conv2d(4, 6, 3, groups=2)]
REWRITTEN += [nn.Conv3d(4, 6, 2, groups=2), Conv1D(2, 3), nn.MultiheadAttention(4, 2, kdim=6)]


@pytest.mark.parametrize("layer", REWRITTEN)
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


class Standardised1d(nn.Conv1d):
    def _conv_forward(self, inputs, weight, bias):
        return super()._conv_forward(inputs, weight - weight.mean(), bias)


class Doubled(nn.MultiheadAttention):
    def __init__(self):
        super().__init__(4, 2)

    def forward(self, *args, **kwargs):
        return 2 * super().forward(*args, **kwargs)[0], None


def with_queries_as_keys():
    layer = nn.MultiheadAttention(4, 2, vdim=3)
    layer.k_proj_weight = layer.q_proj_weight
    return layer


def patched():
    layer = nn.Linear(3, 2)
    layer.forward = lambda inputs: inputs
    return layer


def with_weight(make):
    layer = nn.Linear(4, 2)
    layer.weight = make(layer.weight.detach())
    return layer


def every_kind():
    """A small module of each kind that can be pruned, in float64."""
    return [
        *(Plain(3, 2), nn.Conv1d(4, 6, 3, groups=2), nn.Conv2d(2, 4, 3, groups=2), nn.Conv3d(2, 3, 2)),
        *(Conv1D(3, 2), nn.MultiheadAttention(4, 2), nn.MultiheadAttention(4, 2, kdim=3, vdim=5, bias=False)),
    ]


@pytest.mark.parametrize("layer", [nn.Linear(3, 2), nn.Conv2d(2, 4, 3, groups=2, padding_mode="circular"), Plain(3, 2)])
def test_supported(layer):
    assert unsupported(layer) is None


@pytest.mark.parametrize("layer", every_kind(), ids=repr)
def test_what_is_written_is_what_is_read_and_nothing_else_changes(layer):
    torch.manual_seed(0)
    before, others = bits32(layer), {name: value.clone() for name, value in layer.named_buffers()}
    write_back_(layer, weight_matrices(layer))
    assert all(torch.equal(before[name], value) for name, value in bits32(layer).items())
    new = [torch.randn_like(U) for U in weight_matrices(layer)]
    write_back_(layer, new)
    assert all(torch.equal(one, two) for one, two in zip(new, weight_matrices(layer), strict=True))
    changed = {name for name, value in bits32(layer).items() if not torch.equal(before[name], value)}
    own = {name for name, _ in layer.named_parameters(recurse=False)}
    assert changed == own
    assert all(torch.equal(others[name], value) for name, value in layer.named_buffers())


def bits32(layer):
    return {name: parameter.detach().clone().view(torch.int32) for name, parameter in layer.named_parameters()}


def test_the_conv1d_of_transformers_is_a_linear_with_a_transposed_weight():
    torch.manual_seed(0)
    layer = Conv1D(5, 3).double()
    nn.init.normal_(layer.bias)
    linear = nn.Linear(3, 5, dtype=torch.float64)
    write_back_(linear, weight_matrices(layer))
    assert torch.equal(linear.weight, layer.weight.T)
    inputs = torch.randn(2, 4, 3, dtype=torch.float64)
    torch.testing.assert_close(linear(inputs), layer(inputs), rtol=0, atol=1e-12)
    assert_product(layer, inputs)
    with pytest.raises(ShapeMismatch, match="with 3 at axis -1"):
        input_matrices(layer, torch.zeros(2, 5))


def test_transformers_is_not_imported_to_look_for_its_conv1d():
    code = "import sys, torch, convexprune.layers as m; m.unsupported(torch.nn.ReLU()); assert 'transformers' not in"
    done = subprocess.run([sys.executable, "-c", f"{code} sys.modules"], capture_output=True, text=True, check=False)  # noqa: S603
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("sizes", [{}, {"kdim": 3}, {"kdim": 3, "vdim": 5}, {"bias": False}, {"add_bias_kv": True}])
def test_attention_projects_queries_keys_and_values(sizes):
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(4, 2, dtype=torch.float64, **sizes)
    if layer.in_proj_bias is not None:
        nn.init.normal_(layer.in_proj_bias)
    leads, widths = [(3, 2), (5, 2), (5, 2)], (4, layer.kdim, layer.vdim)
    received = [torch.randn(*lead, d, dtype=torch.float64) for lead, d in zip(leads, widths, strict=True)]
    joint = layer.in_proj_weight
    weights = [layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight] if joint is None else joint.chunk(3)
    biases = [None] * 3 if layer.in_proj_bias is None else layer.in_proj_bias.chunk(3)
    projected = [functional.linear(*three).detach() for three in zip(received, weights, biases, strict=True)]
    groups = zip(
        input_matrices(layer, received), weight_matrices(layer), output_matrices(layer, projected), strict=True
    )
    for X, U, Y in groups:
        torch.testing.assert_close(X @ U, Y, rtol=0, atol=1e-12)
    assert [len(Y) for Y in output_matrices(layer, projected)] == [6, 10, 10]


@pytest.mark.parametrize("inputs", [torch.zeros(3, 4), (), (torch.zeros(3, 4),) * 2, (torch.zeros(3, 5),) * 3])
def test_attention_takes_three_inputs_of_its_sizes(inputs):
    for matrices in (input_matrices, output_matrices):
        with pytest.raises(ShapeMismatch, match=r"query, key, value|with 4 at axis -1"):
            matrices(nn.MultiheadAttention(4, 2), inputs)


@pytest.mark.parametrize("axes", [1, 3])
def test_inputs_of_other_axes_are_refused(axes):
    layer = CONVOLUTIONS[axes](3, 4, 3)
    for shape in [(), (3,), (1, 1, 3, *[5] * axes), (2, *[5] * axes)]:
        with pytest.raises(ShapeMismatch, match=f"with 3 at axis -{axes + 1}"):
            input_matrices(layer, torch.zeros(shape))


def test_inputs_that_the_kernel_does_not_fit_into_are_refused():
    with pytest.raises(ShapeMismatch, match=r"reaches over 5 positions.*got 4 with padding"):
        input_matrices(nn.Conv1d(1, 1, 3, dilation=2), torch.zeros(1, 1, 4))


def test_a_convolution_is_unfolded_once_for_all_groups():
    layer = nn.Conv1d(64, 64, 3, groups=64, bias=False)
    inputs = torch.randn(1, 64, 20)
    with CountCopies() as copies:
        groups = input_matrices(layer, inputs)
    assert sum(X.numel() for X in groups) == 64 * 18 * 3
    assert copies.entries <= 64 * 18 * 3 + inputs.numel()


class CountCopies(TorchDispatchMode):
    """Counts the entries of new tensors."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        known = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in known:
            self.entries += result.numel()
        return result


def with_keys_in_the_place_of_queries():
    layer = nn.MultiheadAttention(4, 2, kdim=4, vdim=3)
    layer.k_proj_weight = nn.Parameter(layer.q_proj_weight.data)
    return layer


@torch.inference_mode()
def in_inference_mode():
    return nn.Linear(3, 2)


REFUSED = {
    "transposed": (lambda: nn.ConvTranspose2d(2, 3, 3), "keeps weights in weight.*only Linear.*leave this module out"),
    "embedding": (lambda: nn.Embedding(5, 3), "only Linear, Conv1d, Conv2d, Conv3d, MultiheadAttention and the Trans"),
    "attention": (Doubled, "forward of its own.*plain MultiheadAttention"),
    "parametrised attention": (
        lambda: nn.utils.parametrize.register_parametrization(nn.MultiheadAttention(4, 2), "in_proj_weight", nn.ReLU()),
        "in_proj_weight is computed",
    ),
    "attention with one weight for two": (with_queries_as_keys, "k_proj_weight is another of its parameters too"),
    "attention with one memory for two": (with_keys_in_the_place_of_queries, "q_proj_weight shares memory with its k_"),
    "inference": (in_inference_mode, "weight was made in torch.inference_mode.*clone it"),
    "expanded": (lambda: with_weight(lambda w: nn.Parameter(w[:, :1].expand(2, 3))), "several entries in one place"),
    "windows": (lambda: with_weight(lambda w: nn.Parameter(w.as_strided((2, 3), (2, 1)))), "several entries in one"),
    "no inputs": (lambda: with_weight(lambda w: nn.Parameter(w[:, :0])), r"no entries \(its shape is \[2, 0\]\)"),
    "no outputs": (lambda: with_weight(lambda w: nn.Parameter(w[:0])), r"no entries.*leave this module out"),
    "meta attention": (lambda: nn.MultiheadAttention(4, 2, device="meta"), "in_proj_weight is on the meta device"),
    "standardised along one axis": (lambda: Standardised1d(3, 2, 3), "forward of its own.*plain Conv1d"),
    "pruned Conv1D": (lambda: prune.l1_unstructured(Conv1D(3, 2), "weight", 0.5), "prune.remove"),
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


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_modules_are_refused():
    compiled = torch.jit.trace(nn.Linear(3, 2), torch.zeros(1, 3))
    assert "prune the Python module, then script it" in unsupported(compiled)


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
