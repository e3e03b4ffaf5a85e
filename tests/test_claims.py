"""What a plan says of its layers is tested on the model: by numbers, whatever the calls look like."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from calls import preview, prune_
from networks import Net, mlp
from promises import promised, unchanged
from torch import Tensor, nn
from torch.nn import functional

from convexprune.errors import NothingToPrune
from convexprune.network.taps import attention_of
from convexprune.report.report import LayerReport, Report


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rows_of(report: Report) -> dict[str, LayerReport]:
    return {row.name: row for row in report.layers}


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        found = copy.deepcopy(model).eval()(x)
    return found if isinstance(found, Tensor) else torch.cat([part.flatten() for part in found.values()])


def moved(dense: nn.Module, pruned: nn.Module, x: Tensor) -> float:
    before = outputs(dense, x)
    return float((outputs(pruned, x) - before).norm() / before.norm())


# --- Norms ---


def trained(norm: nn.Module) -> nn.Module:
    """A norm with scales, shifts and statistics that differ from channel to channel."""
    torch.manual_seed(3)
    with torch.no_grad():
        for name, tensor in (*norm.named_parameters(), *norm.named_buffers()):
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape) + 0.2 if name != "bias" else torch.randn(tensor.shape))
    return norm


class Turned(nn.BatchNorm1d):
    """A BatchNorm of the last axis."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


SCRIPTS = torch.jit.CompilationUnit("""
def negative_part(z: Tensor) -> Tensor:
    return torch.clamp(-z, min=0.0)

def summed(t: Tensor) -> Tensor:
    return t.sum()

def scripted_relu(z: Tensor) -> Tensor:
    return torch.clamp(z, min=0.0)
""")
negative_part, summed, scripted_relu = SCRIPTS.negative_part, SCRIPTS.summed, SCRIPTS.scripted_relu


def plainly(net: Any, x: Tensor) -> Tensor:
    return net.bn(net.fc(x)).relu()


def in_training(net: Any, x: Tensor) -> Tensor:
    net.bn.train()
    return plainly(net, x)


LINEAR, CONV = nn.Linear(6, 8), nn.Conv1d(4, 8, 3, padding=1)
ASIDE: dict[str, tuple[Callable[[Any, Tensor], Any], nn.Module, nn.Module, tuple[int, ...]]] = {
    "tokens": (plainly, LINEAR, nn.BatchNorm1d(8), (60, 8, 6)),
    "other number of tokens": (plainly, LINEAR, nn.BatchNorm1d(5), (60, 5, 6)),
    "positions": (lambda net, x: net.bn(net.fc(x).transpose(1, 2)).relu(), CONV, nn.BatchNorm1d(8), (60, 4, 8)),
    "all entries": (lambda net, x: net.bn(net.fc(x).flatten(1)).relu(), CONV, nn.BatchNorm1d(40), (60, 4, 5)),
    "maps turned": (
        lambda net, x: net.bn(net.fc(x).permute(0, 2, 3, 1)).relu(),
        nn.Conv2d(2, 4, 1),
        nn.BatchNorm2d(4),
        (30, 2, 4, 3),
    ),
    "in train mode": (in_training, LINEAR, nn.BatchNorm1d(8), (60, 6)),
    "something else reads the outputs": (
        lambda net, x: plainly(net, x) - negative_part(net.kept[0]),
        LINEAR,
        nn.BatchNorm1d(8),
        (60, 6),
    ),
    "something else reads the shift": (
        lambda net, x: plainly(net, x) + summed(net.bn.bias),
        LINEAR,
        nn.BatchNorm1d(8),
        (60, 6),
    ),
}


def keeping(net: nn.Module) -> nn.Module:
    """With a hook that puts the layer's outputs where the forward finds them."""
    net.get_submodule("fc").register_forward_hook(lambda _module, _args, z: net.__dict__.update(kept=[z]))
    return net


@pytest.mark.parametrize("new", [False, True], ids=["trained", "new"])
@pytest.mark.parametrize("kind", ASIDE)
def test_a_norm_that_does_not_go_output_by_output_stays_outside_with_the_reason(kind: str, new: bool) -> None:
    """Also one as new, which scales by 1 and shifts by 0 along whatever axis: the program would change its shift."""
    way, layer, norm, shape = ASIDE[kind]
    model = keeping(Net(way, fc=copy.deepcopy(layer), bn=copy.deepcopy(norm) if new else trained(copy.deepcopy(norm))))
    x = noise(*shape) * torch.arange(1.0, shape[1] + 1).reshape(-1, *[1] * (len(shape) - 2))
    state = copy.deepcopy(model.state_dict())
    report = prune_(model, x, 0.05)
    (row,) = report.layers
    assert (row.fit, row.norm) == ("ball", None)
    assert any("bn is no part of its program" in note for note in row.notes)
    assert torch.equal(model.get_parameter("bn.bias"), state["bn.bias"])
    assert row.certified
    z, expected = (functional_layer(layer, x, values) for values in (model.state_dict(), state))
    assert float((z - expected).norm() / expected.norm()) == pytest.approx(row.output_error, rel=1e-3)


def functional_layer(layer: nn.Module, x: Tensor, values: dict[str, Any]) -> Tensor:
    own = {name.removeprefix("fc."): value for name, value in values.items() if name.startswith("fc.")}
    with torch.no_grad():
        found: Tensor = torch.func.functional_call(layer, own, (x,))
    return found


FOLDED: dict[str, tuple[Callable[[Any, Tensor], Any], nn.Module, nn.Module, tuple[int, ...]]] = {
    "plain": (plainly, LINEAR, nn.BatchNorm1d(8), (60, 6)),
    "tokens as samples": (
        lambda net, x: net.bn(net.fc(x).flatten(0, 1)).relu().reshape(len(x), -1, 8),
        LINEAR,
        nn.BatchNorm1d(8),
        (20, 8, 6),
    ),
    "features turned in the forward": (
        lambda net, x: net.bn(net.fc(x).transpose(1, 2)).transpose(1, 2).relu(),
        LINEAR,
        nn.BatchNorm1d(8),
        (20, 8, 6),
    ),
    "features turned in the norm": (plainly, LINEAR, Turned(8), (20, 8, 6)),
    "convolution": (plainly, CONV, nn.BatchNorm1d(8), (20, 4, 8)),
    "grouped": (plainly, nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6), (9, 4, 6, 6)),
    "one output": (plainly, nn.Linear(6, 1), nn.BatchNorm1d(1), (60, 6)),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", FOLDED)
def test_a_norm_that_goes_output_by_output_is_folded_however_it_is_called(kind: str, dtype: torch.dtype) -> None:
    way, layer, norm, shape = FOLDED[kind]
    model = Net(way, fc=copy.deepcopy(layer), bn=trained(copy.deepcopy(norm))).to(dtype).eval()
    dense, x = copy.deepcopy(model), noise(*shape).to(dtype)
    row = rows_of(prune_(model, x, 0.1))["fc"]
    assert (row.fit, row.norm, row.notes) == ("relu-ball", "bn", ())
    if dtype != torch.bfloat16:
        assert moved(dense, model, x) == pytest.approx(row.output_error, rel=1e-3)


# --- What reads more than the ReLU ---


class Negative(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: Any, z: Tensor) -> Tensor:
        return torch.from_numpy((-z.numpy()).clip(0))


class Reader(nn.Module):
    """Reads an attribute that a hook on another module wrote."""

    def forward(self, x: Tensor) -> Tensor:
        return x - (-self.__dict__["z"].numpy()).clip(0).sum() / 100


def hooked() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), Reader())
    model[0].register_forward_hook(lambda _module, _args, z: model[2].__dict__.update(z=z.clone()))
    return model


def called_twice(net: Any, x: Tensor) -> Tensor:
    first = net.fc(x).relu()
    z = net.fc(x + 1)
    return first + z.relu() - negative_part(z)


def tied() -> nn.Module:
    def way(net: Any, x: Tensor) -> Tensor:
        z = net.other(x + 1)
        y: Tensor = net.fc(x).relu() + z.relu()
        return y - negative_part(z)

    model = Net(way, fc=nn.Linear(6, 8), other=nn.Linear(6, 8))
    model.other.weight, model.other.bias = model.fc.weight, model.fc.bias
    return model


def beside(read: Callable[[Tensor], Tensor]) -> Callable[[], nn.Module]:
    def way(net: Any, x: Tensor) -> Tensor:
        z = net.fc(x)
        y: Tensor = z.relu()
        return y - read(z)

    return lambda: Net(way, fc=nn.Linear(6, 8))


def unseen(read: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """As an extension in another language: without a word to whatever watches torch's functions."""

    def reading(z: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():
            return read(z)

    return reading


READS: dict[str, Callable[[Tensor], Tensor]] = {
    "TorchScript": negative_part,
    "an autograd function": lambda z: Negative.apply(z),  # type: ignore[no-untyped-call]
    "numpy": lambda z: torch.from_numpy((-z.numpy()).clip(0)),
    "its data": lambda z: (-z.data).clamp(min=0),
    "torch.func": torch.func.vmap(lambda row: (-row).clamp(min=0)),
    "a Python number": lambda z: torch.tensor(float(z.min())),
    "only what is far below": lambda z: torch.from_numpy((-z.numpy() - 5).clip(0)),
    "whether it is 0": lambda z: torch.tensor((z.numpy() != 0).mean(1, keepdims=True), dtype=z.dtype),
}
READERS: dict[str, Callable[[], nn.Module]] = {
    **{kind: beside(read) for kind, read in READS.items()},
    **{f"{kind}, unseen": beside(unseen(read)) for kind, read in READS.items()},
    "a hook": hooked,
    "one of two calls": lambda: Net(called_twice, fc=nn.Linear(6, 8)),
    "one of two tied layers": tied,
}


@pytest.mark.parametrize("mode", ["parallel", "cascade"])
@pytest.mark.parametrize("kind", READERS)
def test_where_more_than_the_relu_is_read_the_layers_own_outputs_are_kept(kind: str, mode: str) -> None:
    torch.manual_seed(0)
    model, x = READERS[kind]().eval(), noise(80, 6)
    if kind.startswith("one of two") and mode == "cascade":  # such layers are left there
        return
    report = prune_(model, x, 0.05, mode=mode)
    (row,) = report.layers
    assert row.fit == "ball"
    assert row.certified
    if "unseen" in kind or kind.startswith(("TorchScript", "one of two")):  # by what the watch sees a ReLU follows
        (note,) = row.notes
        assert "errors count on its own outputs, before any ReLU" in note
        assert note in " ".join(str(report).split())


def test_what_is_read_and_reaches_no_output_does_not_count() -> None:
    def way(net: Any, x: Tensor) -> Tensor:
        z = net.fc(x)
        net.__dict__["seen"] = negative_part(z)
        return z.relu()

    row = rows_of(prune_(Net(way, fc=nn.Linear(6, 8)), noise(80, 6), 0.1))["fc"]
    assert (row.fit, row.notes) == ("relu-ball", ())


def test_one_such_layer_among_many_is_found_and_the_others_stay() -> None:
    def way(net: Any, x: Tensor) -> dict[str, Tensor]:
        aside = x.new_zeros(())
        for number in range(7):
            z = net.get_submodule(f"fc{number}")(x)
            x = z.relu() + 0.1
            aside = aside + summed(negative_part(z)) if number in (2, 5) else aside
        return {"logits": net.head(x), "aside": aside}

    torch.manual_seed(0)
    layers = {f"fc{number}": nn.Linear(6, 6) for number in range(7)}
    report = prune_(Net(way, **layers, head=nn.Linear(6, 2)), noise(40, 6), 0.2)
    fits = {row.name: row.fit for row in rows_of(report).values()}
    assert [name for name, fit in fits.items() if fit == "ball"] == ["fc2", "fc5", "head"]
    assert report.provenance["plan_tests"]["forwards"] <= 30


@pytest.mark.parametrize("way", [scripted_relu, lambda z: torch.from_numpy(z.numpy().clip(0))])
def test_an_activation_that_is_given_is_believed_where_numbers_agree(way: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    x, models = noise(60, 6), [Net(lambda net, x: way(net.fc(x)), fc=nn.Linear(6, 8)) for _ in range(2)]
    assert rows_of(prune_(models[0], x, 0.1))["fc"].fit == "ball"
    dense = copy.deepcopy(models[1])
    row = rows_of(prune_(models[1], x, 0.1, activations={"fc": "relu"}))["fc"]
    assert (row.fit, row.notes) == ("relu-ball", ())
    assert moved(dense, models[1], x) == pytest.approx(row.output_error, rel=1e-3)


def test_a_fit_that_was_chosen_is_kept_and_the_row_says_what_it_leaves_out() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Softplus())
    row = rows_of(prune_(model, noise(60, 6), 0.1, fit="relu-ball"))["0"]
    assert row.fit == "relu-ball"
    assert "the fit 'relu-ball' was chosen, which counts errors behind a ReLU" in row.notes[0]


# --- Weights that something else reads, outputs that are no product ---


@pytest.mark.parametrize("part", ["weight", "bias"])
@pytest.mark.parametrize("read", [summed, lambda t: torch.tensor(float(t.detach().numpy().sum()))])
def test_weights_that_anything_else_reads_are_left(part: str, read: Callable[[Tensor], Tensor]) -> None:
    def way(net: Any, x: Tensor) -> Tensor:
        y: Tensor = net.b(net.a(x).relu())
        return y * read(net.a.get_parameter(part))

    torch.manual_seed(0)
    model = Net(way, a=nn.Linear(6, 8), b=nn.Linear(8, 3))
    before = copy.deepcopy(model.state_dict())
    report = prune_(model, noise(40, 6), 0.2)
    assert [row.name for row in report.layers] == ["b"]
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in ("a.weight", "a.bias"))
    assert "a" in {module.name for module in report.skipped}


def test_a_layer_that_does_not_give_its_product_is_left() -> None:
    model = mlp(6, 8, 3)
    weight = model[0].weight.detach().clone()

    def doubled(module: nn.Module, _args: Any, z: Any) -> Any:
        return 2 * z if module is model[0] else None

    handle = nn.modules.module.register_module_forward_hook(doubled)
    try:
        report = prune_(model, noise(40, 6), 0.2)
    finally:
        handle.remove()
    assert [row.name for row in report.layers] == ["2"]
    assert "its outputs are not its inputs times its weights (they differ by 1" in report.skipped[0].reason
    assert torch.equal(model[0].weight, weight)


@pytest.mark.parametrize(
    "options", [{}, {"bias": False}, {"add_bias_kv": True}, {"kdim": 3, "vdim": 5}, {"batch_first": True}], ids=str
)
def test_attention_of_its_own_projections_is_what_it_returns(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    owner = nn.MultiheadAttention(4, 2, dtype=torch.float64, **options).eval()
    sizes = (4, options.get("kdim", 4), options.get("vdim", 4))
    given = [noise(3, 3, size, seed=seed).double() for seed, size in enumerate(sizes)]
    packed = owner.in_proj_weight
    weights = (owner.q_proj_weight, owner.k_proj_weight, owner.v_proj_weight) if packed is None else packed.chunk(3)
    biases = [None] * 3 if owner.in_proj_bias is None else owner.in_proj_bias.chunk(3)
    mask = {"attn_mask": torch.ones(3, 3, dtype=torch.bool).triu(1)}
    with torch.no_grad():
        projections = [functional.linear(x, w, b) for x, w, b in zip(given, weights, biases, strict=True)]
        found, expected = attention_of(owner, projections, given, mask), owner(*given, **mask)[0]
        assert torch.allclose(found, expected, rtol=0, atol=1e-12)
        assert not torch.allclose(attention_of(owner, projections[::-1], given, mask), expected, atol=1e-3)


# --- Layers that some batches do not reach ---


def routed(net: Any, i: Tensor) -> Any:
    x = net.e(i)
    flat = x.reshape(-1, 8)
    here, out = i.reshape(-1) >= 5, torch.zeros_like(flat)
    out[here], out[~here] = net.a(flat[here]).relu(), net.b(flat[~here]).relu()
    idle = flat[:, 0] > 99
    out[idle] = net.idle(flat[idle])
    return net.head(out)


def experts() -> nn.Module:
    torch.manual_seed(0)
    own = {name: nn.Linear(8, 8) for name in ("a", "b", "idle")}
    return Net(routed, e=nn.Embedding(9, 8), **own, head=nn.Linear(8, 9))


@pytest.mark.parametrize("mode", ["parallel", "cascade"])
def test_a_layer_without_rows_is_left_and_one_with_few_is_pruned_by_these(mode: str) -> None:
    model, dense = experts(), experts()
    batches = [torch.randint(low, high, (12, 4)) for low, high in ((5, 9), (0, 9), (0, 5), (0, 9))]
    report = prune_(model, batches, 0.1, mode=mode)
    assert [(row.name, row.fit) for row in report.layers] == [
        ("a", "relu-ball"),
        ("b", "relu-ball"),
        ("head", "ball"),
    ]
    reasons = {module.name: module.reason for module in report.skipped}
    assert "called with no rows" in reasons["idle"]
    assert torch.equal(model.get_parameter("idle.weight"), dense.get_parameter("idle.weight"))
    rows = {row.name: row.samples for row in report.layers}
    assert rows["a"] + rows["b"] == rows["head"] == 4 * 12 * 4
    assert rows["a"] == sum(int((batch >= 5).sum()) for batch in batches)
    for row in report.layers:
        promised(row, dense, model, batches, cascade=mode == "cascade")


def test_what_follows_a_layer_is_seen_in_the_first_batch_that_reaches_it() -> None:
    def way(net: Any, x: Tensor) -> Any:
        if x[0, 0] < 0:
            return net.a(x)
        z = net.c(x)
        return net.b(x).relu() + z.relu() - negative_part(z)

    torch.manual_seed(0)
    model = Net(way, a=nn.Linear(4, 3), b=nn.Linear(4, 3), c=nn.Linear(4, 3))
    first = noise(20, 4)
    first[0, 0] = -1.0
    report = prune_(model, [first, first.flip(0).abs(), first[:0], noise(1, 4).abs()], 0.1)
    assert {row.name: row.fit for row in rows_of(report).values()} == {"a": "ball", "b": "relu-ball", "c": "ball"}
    assert rows_of(report)["c"].notes


def test_where_no_layer_has_rows_nothing_is_pruned() -> None:
    model = Net(lambda net, x: x.sum() + net.fc(x[:0]).sum(), fc=nn.Linear(4, 3))
    with pytest.raises(NothingToPrune, match="called with no rows"):
        prune_(model, noise(20, 4), 0.1)


# --- Samples that see each other ---


def attending(net: Any, x: Tensor) -> Tensor:
    z = net.fc(x)
    return torch.softmax(z @ z.T, 1) @ z


def whole_batches_only(net: Any, x: Tensor) -> Tensor:
    y: Tensor = net.fc(x.reshape(40, 6))
    return y


MIXING: dict[str, Callable[[], nn.Module]] = {
    "no running statistics": lambda: nn.Sequential(
        nn.Linear(6, 6), nn.BatchNorm1d(6, track_running_stats=False), nn.ReLU()
    ),
    "train mode": lambda: Net(in_training, fc=nn.Linear(6, 6), bn=nn.BatchNorm1d(6)),
    "attention over samples": lambda: Net(attending, fc=nn.Linear(6, 6)),
    "the batch's mean": lambda: Net(lambda net, x: net.fc(x - x.mean(0)), fc=nn.Linear(6, 6)),
    "those before": lambda: Net(lambda net, x: net.fc(x).cumsum(0), fc=nn.Linear(6, 6)),
    "those behind": lambda: Net(lambda net, x: net.fc(x).flip(0).cumsum(0).flip(0), fc=nn.Linear(6, 6)),
    "whole batches only": lambda: Net(whole_batches_only, fc=nn.Linear(6, 6)),
}
APART: dict[str, Callable[[], nn.Module]] = {
    "running statistics": lambda: nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2)),
    "of a sample": lambda: nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 2)),
    "squeezed": lambda: Net(lambda net, x: net.fc(x).squeeze(), fc=nn.Linear(6, 1)),
    "one number for all": lambda: Net(lambda net, x: net.fc(x).square().mean(), fc=nn.Linear(6, 1)),
}


@pytest.mark.parametrize("mode", ["parallel", "cascade"])
@pytest.mark.parametrize("kind", MIXING)
def test_where_samples_see_each_other_the_head_says_what_the_promise_holds_for(kind: str, mode: str) -> None:
    torch.manual_seed(0)
    model, x = MIXING[kind](), noise(40, 6)
    report = prune_(model, x, 0.2, mode=mode)
    (notice,) = report.notices
    assert "holds for the batches as they were given" in notice
    assert notice in report.head
    assert notice in " ".join(str(report).split())
    assert list(report.to_dict()["notices"]) == [notice]


@pytest.mark.parametrize("samples", [1, 2, 3, 40])
@pytest.mark.parametrize("kind", APART)
def test_where_they_do_not_nothing_is_said(kind: str, samples: int) -> None:
    torch.manual_seed(0)
    notices = prune_(APART[kind](), noise(samples, 6), 0.2).notices
    assert not any("batches" in notice for notice in notices)


def test_the_bound_on_such_a_network_is_that_of_batches_of_all_lengths() -> None:
    """A sum over samples multiplies a common error by their number, so that a small first batch says too little."""
    torch.manual_seed(0)
    model = Net(lambda net, x: net.fc(x).sum(0, keepdim=True) + 0 * x, fc=nn.Linear(6, 6, bias=False))
    x = 1 + noise(300, 6) / 10
    network = prune_(model, [x[:3], x[3:]], 0.2).network
    assert network is not None
    assert network.kept
    assert network.error <= network.bound


# --- The error in a row is the network's ---


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.up, self.down, self.norm = nn.Linear(8, 12), nn.Linear(12, 8), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x, x, x, need_weights=False)[0]
        y: Tensor = x + self.down(functional.gelu(self.up(self.norm(x))))
        return y


def branches(net: Any, x: Tensor) -> Tensor:
    z = net.stem(x)
    return net.head((net.left(z.relu()).relu() + net.right(z)).relu())


def three_ways(net: Any, x: Tensor) -> Tensor:
    z = net.fc(x)
    return net.head(torch.cat([z.relu(), -negative_part(z)], 1))


ARCHITECTURES: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "mlp": lambda: (
        mlp(6, 9, 7, 2),
        noise(70, 6),
    ),
    "smooth": lambda: (nn.Sequential(nn.Linear(6, 9), nn.SiLU(), nn.Linear(9, 2)), noise(70, 6)),
    "norms": lambda: (
        nn.Sequential(nn.Linear(6, 9), trained(nn.BatchNorm1d(9)), nn.ReLU(), nn.Linear(9, 2)),
        noise(70, 6),
    ),
    "norm before gelu": lambda: (
        nn.Sequential(nn.Linear(6, 9), trained(nn.BatchNorm1d(9)), nn.GELU(), nn.Linear(9, 2)),
        noise(70, 6),
    ),
    "cnn": lambda: (
        nn.Sequential(
            *(nn.Conv2d(2, 4, 3, padding=1), trained(nn.BatchNorm2d(4)), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(4, 4, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)),
        ),
        noise(12, 2, 8, 8),
    ),
    "group norm": lambda: (
        nn.Sequential(nn.Conv2d(2, 4, 3), trained(nn.GroupNorm(2, 4)), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2)),
        noise(12, 2, 6, 6),
    ),
    "instance norm": lambda: (
        nn.Sequential(nn.Conv1d(2, 4, 3), nn.InstanceNorm1d(4, affine=True), nn.ReLU(), nn.Conv1d(4, 2, 1)),
        noise(30, 2, 8),
    ),
    "norm over tokens": lambda: (Net(plainly, fc=nn.Linear(6, 8), bn=trained(nn.BatchNorm1d(8))), noise(20, 8, 6)),
    "norm used twice": lambda: (
        Net(
            lambda net, x: net.bn(net.fc(x)).relu() + net.bn(net.two(x)).relu(),
            fc=nn.Linear(6, 5),
            two=nn.Linear(6, 5),
            bn=trained(nn.BatchNorm1d(5)),
        ),
        noise(60, 6),
    ),
    "residual": lambda: (
        Net(branches, stem=nn.Linear(6, 7), left=nn.Linear(7, 7), right=nn.Linear(7, 7), head=nn.Linear(7, 3)),
        noise(60, 6),
    ),
    "leaky by script": lambda: (Net(three_ways, fc=nn.Linear(6, 7), head=nn.Linear(14, 3)), noise(60, 6)),
    "transformer block": lambda: (Block(), noise(12, 5, 8)),
    "dict": lambda: (
        Net(lambda net, x: {"a": net.fc(x).relu(), "b": net.b(x)}, fc=nn.Linear(6, 7), b=nn.Linear(6, 3)),
        noise(60, 6),
    ),
}


@pytest.mark.parametrize("mode", ["parallel", "cascade"])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_the_error_in_each_row_is_that_of_the_modules_where_it_is_said_to_be_measured(kind: str, mode: str) -> None:
    torch.manual_seed(0)
    model, x = ARCHITECTURES[kind]()
    dense = copy.deepcopy(model)
    report = prune_(model.eval(), list(x.split(25)), 0.1, mode=mode)
    assert report.certified
    for row in report.layers:
        if not isinstance(dense.get_submodule(row.name), nn.MultiheadAttention) and "out_proj" not in row.name:
            promised(row, dense, model, list(x.split(25)), cascade=mode == "cascade")


def test_the_error_of_a_layer_that_is_called_twice_is_that_of_both_calls() -> None:
    torch.manual_seed(0)
    model = Net(lambda net, x: net.fc(net.fc(x).relu()).relu(), fc=nn.Linear(6, 6)).double()
    dense, x = copy.deepcopy(model), noise(60, 6).double()
    row = rows_of(prune_(model, x, 0.1))["fc"]
    with torch.no_grad():
        received = [x, dense.get_submodule("fc")(x).relu()]
        now, before = (torch.cat([net.get_submodule("fc")(X).relu() for X in received]) for net in (model, dense))
    assert row.fit == "relu-ball"
    assert float((now - before).norm() / before.norm()) == pytest.approx(row.output_error, rel=1e-6)


# --- The tests themselves ---


@pytest.mark.parametrize("kind", ["norm over tokens", "leaky by script", "cnn"])
def test_a_preview_says_what_the_run_says(kind: str) -> None:
    model, x = ARCHITECTURES[kind]()
    model.eval()
    same = unchanged(model)
    shown = preview(model, x, 0.1)
    assert same()
    report = prune_(model, x, 0.1)
    rows = rows_of(report).values()
    assert [(row.fit, row.norm, row.notes) for row in shown.layers] == [(row.fit, row.norm, row.notes) for row in rows]
    assert shown.notices == report.notices
    assert report.provenance["plan_tests"]["forwards"] <= (7 if kind == "cnn" else 16)


def test_a_preview_says_what_the_promise_holds_for() -> None:
    model = MIXING["no running statistics"]()
    assert preview(model, noise(40, 6)).notices == prune_(model, noise(40, 6)).notices != ()


@pytest.mark.parametrize("call", range(3, 14))
def test_whatever_stops_the_tests_the_model_is_as_it_was(call: int) -> None:
    """An interrupt in any of the forwards, most of which see other weights."""
    calls: list[Tensor] = []

    def way(net: Any, x: Tensor) -> Tensor:
        calls.append(net.fc.weight.clone())
        if len(calls) == call:
            raise KeyboardInterrupt
        y: Tensor = net.head(net.bn(net.fc(x)).relu())
        return y

    torch.manual_seed(0)
    model = Net(way, fc=nn.Linear(6, 8), bn=nn.BatchNorm1d(8), head=nn.Linear(8, 3)).eval()
    same = unchanged(model)
    with pytest.raises(KeyboardInterrupt):
        prune_(model, noise(20, 6))
    assert same()
    assert call < 9 or any(not torch.equal(seen, model.get_parameter("fc.weight")) for seen in calls)


def test_where_interventions_say_nothing_the_layers_own_outputs_are_kept() -> None:
    """Here the model's outputs are others as soon as the layer's are another tensor, with whatever values."""
    given: list[Tensor] = []

    def way(net: Any, x: Tensor) -> Tensor:
        z = net.fc(x)
        y: Tensor = z.relu()
        return y if z is given[-1] else 2 * y

    torch.manual_seed(0)
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, _args, z: given.append(z) if isinstance(module, nn.Linear) else None
    )
    try:
        row = rows_of(prune_(Net(way, fc=nn.Linear(6, 8)), noise(30, 6), 0.1))["fc"]
    finally:
        handle.remove()
    assert row.fit == "ball"
    assert "as soon as the layer's are looked at" in row.notes[0]


def test_large_batches_are_tested_by_their_first_samples() -> None:
    seen: list[int] = []

    def way(net: Any, x: Tensor) -> Tensor:
        seen.append(len(x))
        y: Tensor = net.fc(x).relu()
        return y

    report = prune_(Net(way, fc=nn.Linear(6, 8)), noise(500, 6), 0.2, batch_size=500)
    assert report.provenance["plan_tests"]["samples"] == 64
    assert seen.count(64) >= report.provenance["plan_tests"]["forwards"] - 1
