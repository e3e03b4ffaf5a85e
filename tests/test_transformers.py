"""Whole networks of today: encoders with attention, GPT-2, a residual network; every layer's promise by plain hooks."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from calls import prune_
from networks import Net
from promises import promised, unchanged, with_modules_of
from torch import Tensor, nn
from torch.nn import functional


def encoder(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.1, activation="gelu", batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    for p in model.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    return model.to(dtype), [torch.randn(5, 6, 8, dtype=dtype), torch.randn(4, 3, 8, dtype=dtype)]


def projections(model: nn.Module, at: str, x: list[Tensor], inputs: nn.Module) -> dict[str, Tensor]:
    """q, k, v and the attention's output, by the formulas, for this model's weights and another's inputs."""
    attention = copy.deepcopy(model.get_submodule(at)).double()
    whole, queries = copy.deepcopy(inputs).double().eval(), []
    handle = whole.get_submodule(at).register_forward_pre_hook(lambda _m, args: queries.append(args[0].detach()))
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    with torch.no_grad():
        for batch in x:
            whole(batch.double())
        handle.remove()
        own = whole.get_submodule(at)  # what out_proj receives is decided by the other's own projections
        qkv = [functional.linear(q, attention.in_proj_weight, attention.in_proj_bias) for q in queries]
        out = []
        for q in queries:
            parts = functional.linear(q, own.in_proj_weight, own.in_proj_bias).chunk(3, -1)
            heads = [p.unflatten(-1, (2, 4)).transpose(1, 2) for p in parts]
            mixed = functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(-2)
            out.append(functional.linear(mixed, attention.out_proj.weight, attention.out_proj.bias).flatten())
    torch.backends.mha.set_fastpath_enabled(fast)
    return {"qkv": torch.cat([p.flatten() for p in qkv]), "out": torch.cat(out)}


@pytest.mark.parametrize(("mode", "dtype"), [("parallel", torch.float32), ("cascade", torch.float64)])
def test_an_encoder_goes_through_whole(mode: str, dtype: torch.dtype) -> None:
    """q, k and v as three programs, out_proj, and both layers behind: each within its promise."""
    model, x = encoder(dtype)
    dense = copy.deepcopy(model)
    report = prune_(model, x, 0.15, mode=mode)
    assert report.certified
    names = [f"layers.{i}.{name}" for i in (0, 1) for name in ("self_attn", "self_attn.out_proj", "linear1", "linear2")]
    assert [row.name for row in report.layers] == names
    for row in report.layers:
        assert row.fit == "ball"
        assert row.nonzeros < row.nonzeros_before
        if "self_attn" not in row.name:
            promised(row, dense, model, x, cascade=mode == "cascade")
            continue
        at, part = row.name.removesuffix(".out_proj"), "out" if "out_proj" in row.name else "qkv"
        # In cascade out_proj's inputs are those of the pruned projections, and its target the original's.
        Y = projections(dense, at, x, dense)[part]
        Z = projections(model, at, x, model if mode == "cascade" else dense)[part]
        error = float((Z - Y).norm() / Y.norm())
        assert error == pytest.approx(row.output_error, rel=1e-3)
        assert error <= row.promised * (1 + 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_errors_in_half_precision_are_those_after_the_cast(dtype: torch.dtype) -> None:
    model, x = encoder(dtype)
    dense = copy.deepcopy(model)
    report = prune_(model, x[:1], 0.2, layers="*.linear2")
    for row in report.layers:
        layer, seen = dense.get_submodule(row.name), []
        handle = layer.register_forward_pre_hook(lambda _m, args, seen=seen: seen.append(args[0].double()))
        fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        with torch.no_grad():
            dense.eval()(x[0])
            torch.backends.mha.set_fastpath_enabled(fast)
            handle.remove()
            now = copy.deepcopy(model.get_submodule(row.name)).double()
            Y, Z = copy.deepcopy(layer).double()(seen[0]), now(seen[0])
        assert model.get_submodule(row.name).weight.dtype == dtype
        assert float((Z - Y).norm() / Y.norm()) == pytest.approx(row.output_error, rel=1e-3)
        assert row.status in ("solved", "rounded")
        assert row.output_error <= row.promised * (1 + 1e-4)


class Logits(nn.Module):
    """GPT-2 as tokens to logits, for hooks that know nothing of its outputs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(tokens, use_cache=False).logits


@pytest.mark.parametrize("mode", ["parallel", "cascade"])
def test_gpt2_goes_through_whole_and_its_tied_head_stays(mode: str) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=40, n_positions=12, n_embd=8, n_layer=2, n_head=2, n_inner=12)
    config.initializer_range = 0.4
    model = Logits(transformers.GPT2LMHeadModel(config)).eval()
    x, dense = [torch.randint(40, (6, 8)), torch.randint(40, (3, 5))], copy.deepcopy(model)
    report = prune_(model, x, 0.15, mode=mode)
    assert report.certified
    assert {row.name.rpartition("h.")[2] for row in report.layers} == {
        f"{i}.{name}" for i in (0, 1) for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    for row in report.layers:
        promised(row, dense, model, x, cascade=mode == "cascade")
        assert row.nonzeros < row.nonzeros_before
    reasons = {module.name: module.reason for module in report.skipped}
    assert "shares a parameter with 'model.transformer.wte'" in reasons["model.lm_head"]
    assert model.model.lm_head.weight is model.model.transformer.wte.weight
    assert torch.equal(model.model.lm_head.weight, dense.model.lm_head.weight)


def test_a_tied_embedding_alone_is_refused_with_the_reason() -> None:
    model = Net(
        lambda m, x: m.head(m.embedding(x).tanh()), embedding=nn.Embedding(9, 4), head=nn.Linear(4, 9, bias=False)
    )
    model.head.weight = model.embedding.weight
    same = unchanged(model)
    with pytest.raises(Exception, match="shares a parameter with 'embedding'"):
        prune_(model, torch.randint(9, (20, 3)))
    assert same()


DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.mark.parametrize("mode", ["parallel", "cascade"])
def test_resnet20_goes_through_whole(mode: str) -> None:
    """Norms folded, residual sums outside, every layer within its promise on trained weights and real images."""
    weights, images = DATA / "resnet20_cifar10.safetensors", DATA / "cifar10_calib.npz"
    if not (weights.exists() and images.exists()):
        pytest.skip(f"no trained ResNet-20 or CIFAR-10 images in {DATA}")
    np = pytest.importorskip("numpy")
    resnet20: Any = pytest.importorskip("benchmarks.resnet20")
    from convexprune.network.weights import load_weights_into_

    model = resnet20.build().eval()
    load_weights_into_(model, weights)
    with np.load(images) as stored:
        x = [resnet20.prepare(stored[stored.files[0]][:4])[:, :, ::2, ::2].contiguous()]
    dense = copy.deepcopy(model)
    report = prune_(model, x, 0.2, mode=mode, tol=0.1, feas_tol=1e-3, max_iter=40)
    assert len(report.layers) == 20
    assert sum(row.norm is not None for row in report.layers) == 19
    assert sum(row.fit == "relu-ball" for row in report.layers) == 10
    for row in report.layers:
        promised(row, dense, model, x, mode == "cascade", feas_tol=1e-3)
        if mode == "parallel" and row.certified:
            assert row.output_error <= 0.2 * (1 + 1.1e-3)
    assert report.nonzeros < 0.9 * report.nonzeros_before
    trained = with_modules_of(dense, model, [row.norm for row in report.layers])
    assert torch.equal(trained.bn1.running_var, dense.bn1.running_var)
