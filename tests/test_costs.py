"""Bytes and operations agree with torch's own tensors and with counting by hand; times are only there."""

import copy
import gzip
import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import prune
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

from convexprune.costs import Latency, LayerLatency, flops, latency, storage
from convexprune.errors import UnsupportedModule
from convexprune.masks import keep_masks_, kept_masks, make_permanent_
from convexprune.network.links import find_links
from convexprune.network.weights import remove_neurons_
from convexprune.report.report import SkippedModule
from convexprune.solvers.errors import InvalidInput, InvalidTolerance, NonFinite


def sparse(*shape, density=0.3, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(shape, generator=generator) + 0.5
    return (values * (torch.rand(shape, generator=generator) < density)).to(dtype)


def mlp(density=0.3):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 4))
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight.mul_(sparse(*layer.weight.shape, density=density) != 0)
    return model


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.decoder = nn.Embedding(6, 4), nn.Linear(4, 6)
        self.decoder.weight = self.embedding.weight

    def forward(self, x):
        return self.decoder(self.embedding(x))


# Bytes.


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@given(
    st.integers(1, 9),
    st.integers(1, 9),
    st.floats(0, 1),
    st.sampled_from([torch.float16, torch.float32, torch.float64]),
    st.sampled_from([torch.int32, torch.int64]),
)
def test_csr_takes_what_its_three_tensors_take(rows: int, columns: int, density: float, dtype, index_dtype) -> None:
    weight = sparse(rows, columns, density=density, dtype=dtype)
    csr = weight.to_sparse_csr()
    counted = storage({"weight": weight}, index_dtype=index_dtype, compress=False)
    indices = [csr.crow_indices().to(index_dtype), csr.col_indices().to(index_dtype)]
    assert counted.csr == csr.values().nbytes + sum(tensor.nbytes for tensor in indices)
    assert counted.dense == weight.nbytes
    assert counted.nonzeros == csr.values().numel()
    assert counted.index_bits == torch.iinfo(index_dtype).bits


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_two_four_takes_what_torchs_semi_structured_tensor_takes(dtype: torch.dtype) -> None:
    weight = sparse(32, 64, density=1, dtype=dtype)
    weight.view(32, 16, 4)[..., [0, 3]] = 0
    values, places = sparse_semi_structured_from_dense_cutlass(weight)
    assert storage({"weight": weight}).two_four == values.nbytes + places.nbytes
    weight[5, 8] = 1  # a third one among its four
    assert storage({"weight": weight}).two_four is None


def test_two_four_is_along_the_inputs_and_dense_weights_count_as_such_in_the_total() -> None:
    conv, odd = sparse(3, 8, 2, 2, density=1), sparse(3, 6, density=1)
    conv[:, [0, 1, 4, 7]] = 0
    counted = storage({"conv": conv, "odd": odd})
    assert [row.two_four for row in counted.weights] == [conv.nbytes // 2 + 12, None]
    assert counted.two_four == conv.nbytes // 2 + 12 + odd.nbytes
    assert storage({"conv": conv.transpose(1, 2).contiguous()}).two_four is None


def test_the_parts_are_the_state_dict_and_the_file_is_what_safetensors_writes(tmp_path) -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(3))
    model(torch.rand(2, 2, 5, 5))
    counted, state = storage(model), model.state_dict()
    assert counted.dense + counted.other == sum(tensor.nbytes for tensor in state.values())
    assert [row.name for row in counted.weights] == ["0.weight", "3.weight"]
    assert counted.entries == 4 * 2 * 9 + 3 * 36
    save_file(state, tmp_path / "model.safetensors")
    content = (tmp_path / "model.safetensors").read_bytes()
    assert (counted.file, counted.gzip) == (len(content), len(gzip.compress(content)))
    assert storage(state) == counted == storage(model)
    assert storage(model, compress=False) == replace(counted, gzip=None)


def test_zeros_shrink_csr_and_gzip_and_leave_the_file() -> None:
    before, after = storage(mlp(density=1)), storage(mlp(density=0.1))
    assert after.file == before.file
    assert after.gzip < before.gzip
    assert before.csr > before.dense == after.dense > after.csr
    text = after.verdict(before)
    assert f"{after.nonzeros:,} of {320:,} weights" in text
    assert f"the file takes {after.file:,} bytes (the same)" in text
    assert f"CSR with 32-bit indices takes {before.csr:,} bytes" in before.verdict()
    assert f"{round(100 * (before.csr / before.dense - 1))} % more" in before.verdict()


def test_a_shared_weight_is_stored_once() -> None:
    assert [row.name for row in storage(Tied()).weights] == ["embedding.weight"]
    assert [row.name for row in flops(Tied(), torch.tensor([[1, 2]])).weights] == ["embedding.weight"]


@pytest.mark.parametrize("measure", [storage, lambda model: flops(model, torch.ones(3, 12))], ids=["storage", "flops"])
def test_masked_weights_count_as_what_is_left_of_them(measure) -> None:
    model = mlp()
    expected = measure(model)
    keep_masks_(model)
    with torch.no_grad():
        for own in model.parameters():
            own += 1  # behind the masks too
    state = copy.deepcopy(model.state_dict())
    found = measure(model)
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert len(kept_masks(model)) == 2
    make_permanent_(model)
    assert found == measure(model)
    assert [row.name for row in found.weights] == [row.name for row in expected.weights]


# Operations.


@given(st.integers(1, 5), st.floats(0, 1))
def test_a_linear_layer_takes_two_operations_an_entry_and_a_sample(samples: int, density: float) -> None:
    model = mlp(density)
    counted = flops(model, torch.ones(samples, 12))
    assert counted.dense == 2 * samples * (12 * 20 + 20 * 4)
    nonzeros = [int(model[i].weight.count_nonzero()) for i in (0, 2)]
    assert [row.remaining for row in counted.weights] == [2 * samples * count for count in nonzeros]
    assert [row.density for row in counted.weights] == [nonzeros[0] / 240, nonzeros[1] / 80]
    assert (counted.samples, counted.other) == (samples, 0)


@pytest.mark.parametrize("groups", [1, 2])
def test_a_convolution_takes_two_operations_an_entry_and_a_position(groups: int) -> None:
    conv = nn.Conv2d(4, 6, 3, padding=1, groups=groups)
    with torch.no_grad():
        conv.weight.mul_(sparse(*conv.weight.shape) != 0)
    counted = flops(conv, torch.ones(2, 4, 5, 7))
    assert counted.dense == 2 * (2 * 5 * 7) * conv.weight.numel()
    assert counted.remaining == 2 * (2 * 5 * 7) * int(conv.weight.count_nonzero())


def test_the_projections_of_attention_are_told_from_its_products_without_weights() -> None:
    model, tokens = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 3 * 5
    with torch.no_grad():
        model.self_attn.in_proj_weight[:8] = 0  # the queries' part
    counted = flops(model, torch.ones(3, 5, 8))
    rows = {row.name: (row.dense, row.remaining) for row in counted.weights}
    assert rows["self_attn.in_proj_weight"] == (2 * tokens * 3 * 64, 2 * tokens * 2 * 64)
    assert rows["self_attn.out_proj.weight"] == (2 * tokens * 64,) * 2
    assert rows["linear1.weight"] == (2 * tokens * 128,) * 2
    assert counted.other == 2 * (2 * 3 * 5 * 5 * 8)  # queries by keys, and attention by values
    cross = nn.MultiheadAttention(8, 2, batch_first=True)
    with torch.no_grad():
        cross.in_proj_weight[8:] = 0  # what projects the 7 keys, not the 5 queries
    counted = flops(cross, (torch.ones(1, 5, 8), torch.ones(1, 7, 8), torch.ones(1, 7, 8)))
    rows = {row.name: (row.dense, row.remaining) for row in counted.weights}
    assert rows["in_proj_weight"] == (2 * (5 + 7 + 7) * 64, 2 * 5 * 64)


def test_a_weight_counts_at_each_of_its_uses() -> None:
    layer = nn.Linear(6, 6)
    twice = flops(nn.Sequential(layer, nn.ReLU(), layer), torch.ones(2, 6))
    assert [(row.name, row.dense) for row in twice.weights] == [("0.weight", 2 * 2 * 2 * 36)]
    assert flops(layer, {"input": torch.ones(2, 6)}).dense == twice.dense // 2
    apart = flops(
        layer, torch.ones(2, 6), forward=lambda model, x: nn.functional.linear(x, model.weight) @ model.weight
    )
    assert apart.dense == twice.dense


def test_weights_in_one_flat_storage_are_told_apart() -> None:
    model = mlp(0.5)
    flat = torch.cat([model[i].weight.detach().flatten() for i in (0, 2)])
    before = flops(model, torch.ones(3, 12))
    for i, part in ((0, flat[:240].view(20, 12)), (2, flat[240:].view(4, 20))):
        model[i].weight = nn.Parameter(part)
    assert flops(model, torch.ones(3, 12)) == before


def test_removed_neurons_are_no_longer_computed() -> None:
    before, model = flops(mlp(1), torch.ones(3, 12)), mlp(1)
    remove_neurons_(model, find_links(model)[0]["0"], torch.arange(5))
    after = flops(model, torch.ones(3, 12))
    assert 4 * after.dense == before.dense == before.remaining
    assert after.verdict(before).endswith(
        "there are no zeros to skip. Against the model before, it takes 480 operations (75 % fewer)."
    )
    assert "plain torch does them all" in flops(mlp(), torch.ones(3, 12)).verdict()


# Time.


def test_each_layer_and_the_model_are_timed_and_left_as_found() -> None:
    model = mlp().train()
    keep_masks_(model)
    state = copy.deepcopy(model.state_dict())
    found = latency(model, torch.rand(3, 12), before=mlp(1), repeats=2)
    assert [row.name for row in found.layers] == ["0", "2"]
    times = [time for row in found.layers for time in (row.dense, row.csr)]
    assert all(time > 0 for time in (*times, found.model, found.before))
    assert (found.samples, found.repeats, found.skipped) == (3, 2, ())
    assert found.dense == found.layers[0].dense + found.layers[1].dense
    assert all(module.training for module in model.modules())
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert json.loads(json.dumps(found.to_dict()))["layers"][1]["name"] == "2"
    assert found.verdict().count("times") == 3
    assert latency(nn.ReLU(), torch.rand(2), repeats=1).verdict().startswith("Nothing was compared")


def test_what_is_not_compared_is_named_with_the_reason() -> None:
    model = nn.Sequential(nn.Embedding(9, 4), nn.Conv1d(4, 4, 1, groups=2), nn.Linear(6, 6), nn.Linear(6, 6).half())
    model.register_module("idle", nn.Linear(2, 2))
    found = latency(model, torch.zeros(2, 6, dtype=torch.int64), repeats=1, forward=_forward)
    reasons = {module.name: module.reason for module in found.skipped}
    assert found.layers[0].name == "2"
    assert {row.name for row in found.layers} | set(reasons) == {"0", "1", "2", "3", "idle"}
    assert "not called on the batch" in reasons["idle"]
    assert "3" not in reasons or "no CSR product for torch.float16 on cpu" in reasons["3"]


def _forward(model, x):
    x = model[1](model[0](x).mT)
    return model[3](model[2](x).half())


def test_the_verdict_says_plainly_where_there_is_no_gain() -> None:
    layers = (LayerLatency("fc1", 0.28, 1e-3, 1.4e-3), LayerLatency("fc2", 0.02, 1e-3, 0.25e-3))
    found = Latency(layers, (SkippedModule("e", "Embedding", "none"),), 2e-3, 2.1e-3, samples=8, repeats=5)
    assert found.verdict().split(". ") == [
        "fc1: no faster, the CSR product takes 1.40 times the dense one at 28 % density (1.400 ms, 1.000 ms)",
        "fc2: faster, the CSR product takes 0.25 times the dense one at 2 % density (0.250 ms, 1.000 ms)",
        "The model: no faster, its forward takes 0.95 times that of the model before (2.000 ms, 2.100 ms).",
    ]
    assert found.to_dict()["csr"] == pytest.approx(1.65e-3)


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(InvalidInput, match=r"torch\.int32 or torch\.int64, found torch\.int16"):
        storage(mlp(), index_dtype=torch.int16)
    with pytest.raises(InvalidInput, match="'a' is not a dense tensor"):
        storage({"a": [1.0]})
    with pytest.raises(InvalidInput, match=r"'weight' is not a dense tensor"):
        storage(nn.Linear(2, 2, device="meta"))
    for measure in (
        storage,
        lambda model: flops(model, torch.ones(2, 2)),
        lambda model: latency(model, torch.ones(2, 2)),
    ):
        lazy = nn.Sequential(nn.LazyLinear(2))
        with pytest.raises(InvalidInput, match=r"'0.weight' is not a dense tensor with values"):
            measure(lazy)
        assert nn.parameter.is_lazy(lazy[0].weight)  # a forward would have made it
    with pytest.raises(InvalidInput, match=r"'weight' is not a dense tensor"):
        latency(nn.Linear(2, 2, device="meta"), torch.ones(2, 2))
    compressed = nn.Linear(2, 2)
    compressed.weight = nn.Parameter(compressed.weight.detach().to_sparse())
    with pytest.raises(InvalidInput, match=r"'weight' is not a dense tensor"):
        flops(compressed, torch.ones(2, 2))
    with pytest.raises(InvalidTolerance, match="repeats"):
        latency(mlp(), torch.ones(2, 12), repeats=0)
    with pytest.raises(InvalidInput, match="failed on a batch"):
        flops(mlp(), torch.ones(2, 11))
    with pytest.raises(NonFinite):
        flops(mlp(), torch.full((2, 12), torch.nan))
    pruned = mlp()
    prune.l1_unstructured(pruned[0], "weight", 3)
    for measure in (storage, lambda model: flops(model, torch.ones(2, 12))):
        with pytest.raises(UnsupportedModule, match="from_torch_prune_"):
            measure(pruned)
