"""Positions that a mask hides count in no program, error or bound: whatever lies there, and however it is laid out."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from calls import coreset_prune_, preview, prune_
from torch import Tensor, nn

from convexprune import Data, verify
from convexprune.errors import EmptyCalibration
from convexprune.network.padding import Layout, layouts
from convexprune.runs.layer_program import layer_program
from convexprune.solvers.errors import InvalidInput

SAMPLES, POSITIONS, WIDTH = 60, 12, 8


def data(positions: int = POSITIONS, filler: int = 0, seed: int = 0) -> dict[str, Tensor]:
    """Tokens, the shorter samples filled up, and their mask."""
    rng = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 30, (SAMPLES, POSITIONS), generator=rng)
    lengths = torch.randint(3, POSITIONS // 2, (SAMPLES, 1), generator=rng)
    mask = torch.arange(positions)[None] < lengths
    longer = torch.zeros(SAMPLES, positions, dtype=torch.long)
    longer[:, : min(positions, POSITIONS)] = ids[:, :positions]
    longer[~mask] = filler
    return {"input_ids": longer, "attention_mask": mask.long()}


class Pooled(nn.Module):
    """A layer per position between an embedding and the mean of the positions that count."""

    def __init__(self, layer: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embed, self.layer, self.head = (
            nn.Embedding(30, WIDTH),
            layer or nn.Linear(WIDTH, WIDTH),
            nn.Linear(WIDTH, 3),
        )
        with torch.no_grad():
            self.embed.weight[0] *= 20  # what fills up is loud

    def apply_layer(self, x: Tensor) -> Tensor:
        found: Tensor = self.layer(x)
        return found

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        h = torch.relu(self.apply_layer(self.embed(input_ids)))
        mask = attention_mask[..., None].to(h)
        found: Tensor = self.head((h * mask).sum(1) / mask.sum(1))
        return found


class Flat(Pooled):
    def apply_layer(self, x: Tensor) -> Tensor:
        found: Tensor = self.layer(x.reshape(-1, WIDTH)).reshape(x.shape)
        return found


class Transposed(Pooled):
    def apply_layer(self, x: Tensor) -> Tensor:
        found: Tensor = self.layer(x.transpose(0, 1)).transpose(0, 1)
        return found


class FlatTransposed(Pooled):
    def apply_layer(self, x: Tensor) -> Tensor:
        found: Tensor = self.layer(x.transpose(0, 1).reshape(-1, WIDTH))
        return found.reshape(x.shape[1], x.shape[0], WIDTH).transpose(0, 1)


class Convolved(Pooled):
    """Of three positions, the middle one of which is that of the output."""

    def __init__(self) -> None:
        super().__init__(nn.Conv1d(WIDTH, WIDTH, 3, padding=1))

    def apply_layer(self, x: Tensor) -> Tensor:
        found: Tensor = self.layer(x.transpose(1, 2)).transpose(1, 2)
        return found


def error_at(model: nn.Module, dense: nn.Module, batch: dict[str, Tensor], name: str = "layer") -> float:
    """Of the layer behind its ReLU, on the original inputs, at the positions that count: by the outputs themselves."""
    assert isinstance(dense, Pooled)
    h = dense.embed(batch["input_ids"])
    other = copy.deepcopy(dense)
    other.load_state_dict(model.state_dict())
    visible = batch["attention_mask"] > 0
    with torch.no_grad():
        now, before = (torch.relu(one.apply_layer(h))[visible] for one in (other, dense))
    return float((now - before).norm() / before.norm())


LAYOUTS: dict[str, Callable[[], Pooled]] = {
    "plain": Pooled,
    "flat": Flat,
    "transposed": Transposed,
    "flat transposed": FlatTransposed,
    "convolution": Convolved,
}


@pytest.mark.parametrize("asked", [{"eps": 0.1}, {"sparsity": 0.5}, {"eps": 0.1, "mode": "cascade"}], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_error_in_a_row_is_that_of_positions_that_count(layout: str, asked: dict[str, Any]) -> None:
    model, batch = LAYOUTS[layout](), data()
    dense = copy.deepcopy(model)
    report = prune_(model, [batch], layers="layer", **asked)
    [row] = report.layers
    assert row.output_error == pytest.approx(error_at(model, dense, batch), rel=1e-4)
    assert row.samples == int(batch["attention_mask"].sum())
    assert report.mask is not None
    assert report.mask["rows_left_out"] == {"layer": int((batch["attention_mask"] == 0).sum())}
    assert "attention_mask hides" in "; ".join(report.head)
    if "eps" in asked:
        assert row.output_error <= 0.1001


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "convolution"])  # it sees what is behind
def test_neither_what_fills_up_nor_how_much_of_it_matters(layout: str) -> None:
    """The same weights, up to rounding, whatever is hidden, and the same bound on the network's error."""
    found = []
    for batch in (data(), data(filler=7), data(positions=POSITIONS // 2), data(positions=40)):
        model = LAYOUTS[layout]()
        report = prune_(model, [batch], 0.1, tol=1e-5, feas_tol=1e-6)
        found.append((model.layer.weight.detach(), report.layers[0].value, report.network.bound))
    for weight, value, bound in found[1:]:
        assert value == pytest.approx(found[0][1], rel=1e-4)
        assert float((weight - found[0][0]).norm()) <= 1e-2 * float(found[0][0].norm())
        assert bound == pytest.approx(found[0][2], rel=1e-2) or math.isinf(bound)


MASKS: dict[str, tuple[Any, Any]] = {
    "Boolean": (lambda batch: batch | {"attention_mask": batch["attention_mask"].bool()}, None),
    "float": (lambda batch: batch | {"attention_mask": batch["attention_mask"].float()}, None),
    "by a key": (lambda batch: batch, "attention_mask"),
    "that the model does not take": (lambda batch: batch | {"keep": batch["attention_mask"] == 1}, "keep"),
    "by a function": (lambda batch: batch, lambda batch: batch["input_ids"] != 0),
    "of a tuple": (lambda batch: tuple(batch.values()), lambda batch: batch[1]),
}


@pytest.mark.parametrize("kind", MASKS)
def test_a_mask_may_be_named_or_computed(kind: str) -> None:
    change, mask = MASKS[kind]
    batch, expected = data(), Pooled()
    model = Pooled()
    report = prune_(model, [change(batch)], 0.1, mask=mask)
    again = prune_(expected, [batch], 0.1)
    assert torch.equal(model.layer.weight, expected.layer.weight)
    assert report.layers[0].samples == again.layers[0].samples == int(batch["attention_mask"].sum())


def test_without_a_mask_all_positions_count() -> None:
    batch = data()
    report = prune_(Pooled(), [batch], 0.1, mask=False)
    assert report.layers[0].samples == SAMPLES * POSITIONS
    assert report.mask is None
    assert not any("attention_mask" in line for line in report.head)


def test_a_mask_that_cannot_be_read_is_said_first_or_refused() -> None:
    batch = data()
    wrong = {
        "shape": batch | {"attention_mask": batch["attention_mask"][:, 0]},
        "values": batch | {"attention_mask": 3 * batch["attention_mask"]},
        "is one that is added": batch | {"attention_mask": batch["attention_mask"].float().log().clamp(min=-1e4)},
    }

    class Blind(Pooled):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return super().forward(input_ids, torch.ones_like(input_ids) + 0 * attention_mask.sum())

    for found, other in wrong.items():
        report = prune_(Blind(), [other], 0.1)
        assert report.layers[0].samples == SAMPLES * POSITIONS
        assert "it cannot be used, and all rows count" in "; ".join(report.head)
        assert found in "; ".join(report.head)
        with pytest.raises(InvalidInput, match="expected 1 where a position counts"):
            prune_(Blind(), [other], 0.1, mask="attention_mask")
    for mask in ("other", lambda _batch: 3, 7):
        model = Pooled()
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(InvalidInput, match="mask"):
            prune_(model, [batch], 0.1, mask=mask)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with pytest.raises(EmptyCalibration, match="every position"):
        prune_(Pooled(), [batch], 0.1, mask=lambda batch: 0 * batch["input_ids"])


def test_a_mask_that_one_batch_has_otherwise_is_used_in_none() -> None:
    """The head says that all rows count, and so they do."""
    batch = data()

    class Either(Pooled):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return super().forward(input_ids, attention_mask > 0)

    report = prune_(Either(), [batch, batch | {"attention_mask": 3 * batch["attention_mask"]}], 0.1)
    assert report.layers[0].samples == 2 * SAMPLES * POSITIONS
    assert "it cannot be used, and all rows count" in "; ".join(report.head)


HEADS: dict[str, Callable[[Tensor], Tensor]] = {
    "of heads and queries": lambda mask: mask[:, None, None, :],
    "of each query": lambda mask: mask[:, None, None, :].expand(-1, 2, POSITIONS, -1),
    "causal": lambda mask: mask[:, None, None, :] * torch.ones(POSITIONS, POSITIONS).tril(),
}


@pytest.mark.parametrize("kind", HEADS)
def test_a_mask_with_axes_between_shows_what_any_query_sees(kind: str) -> None:
    class Four(Pooled):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return super().forward(input_ids, attention_mask.flatten(1, 2).amax(1))

    batch = data()
    model, expected = Four(), Pooled()
    report = prune_(model, [batch | {"attention_mask": HEADS[kind](batch["attention_mask"])}], 0.1)
    prune_(expected, [batch], 0.1)
    assert report.layers[0].samples == int(batch["attention_mask"].sum())
    assert torch.equal(model.layer.weight, expected.layer.weight)


@pytest.mark.parametrize("kind", ["Boolean", "added"])
@pytest.mark.parametrize("named", [True, False])
def test_masks_of_torch_s_own_say_what_is_hidden(kind: str, named: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval()
    mask = data()["attention_mask"] > 0
    hidden = ~mask if kind == "Boolean" else torch.zeros(SAMPLES, POSITIONS).masked_fill(~mask, -math.inf)
    batch = {"src": torch.randn(SAMPLES, POSITIONS, WIDTH), "src_key_padding_mask": hidden}
    report = prune_(model, [batch], 0.2, mask="src_key_padding_mask" if named else None)
    assert {row.samples for row in report.layers} == {int(mask.sum())}
    assert report.mask is not None
    assert report.mask["unused"] == {}


def test_a_mask_the_other_way_round_is_said_first_and_not_used() -> None:
    """The positions that it calls hidden are those that matter: none of the layers is fitted to the others alone."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval()
    mask = data()["attention_mask"] > 0
    batch = {"src": torch.randn(SAMPLES, POSITIONS, WIDTH), "src_key_padding_mask": ~mask}
    report = prune_(model, [batch], 0.2, mask=lambda batch: batch["src_key_padding_mask"])
    assert {row.samples for row in report.layers} == {SAMPLES * POSITIONS}
    assert "the mask function cannot be used" in "; ".join(report.head)
    assert "1 is where a position counts" in "; ".join(report.head)


def test_positions_that_the_outputs_depend_on_count() -> None:
    """A model that reads what its mask hides: the head says so, and the promise holds of all it computes."""

    class Unmasked(Pooled):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return super().forward(input_ids, torch.ones_like(attention_mask))

    report = prune_(Unmasked(), [data()], 0.1)
    assert report.layers[0].samples == SAMPLES * POSITIONS
    assert "attention_mask cannot be used in layer" in "; ".join(report.head)
    assert report.network.error <= report.network.bound


def test_a_mask_of_another_length_is_said_first() -> None:
    batch = data()
    longer = torch.cat([torch.ones(SAMPLES, 3, dtype=torch.long), batch["attention_mask"]], dim=1)

    class Cached(Pooled):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return super().forward(input_ids, attention_mask[:, 3:])

    report = prune_(Cached(), [batch | {"attention_mask": longer}], 0.1)
    assert report.layers[0].samples == SAMPLES * POSITIONS
    assert f"it sees rows of [{SAMPLES}, {POSITIONS}], where the mask is [{SAMPLES}, {POSITIONS + 3}]" in "; ".join(
        report.head
    )


@pytest.mark.parametrize("positions", [SAMPLES, WIDTH, 3])
def test_lengths_that_are_equal_are_told_apart_by_what_depends_on_them(positions: int) -> None:
    """As many positions as samples, as features, as outputs: pooled rows and outputs count whole."""
    mask = torch.arange(positions)[None] < torch.randint(1, 3, (SAMPLES, 1), generator=torch.Generator().manual_seed(3))
    ids = torch.randint(1, 30, (SAMPLES, positions), generator=torch.Generator().manual_seed(4)) * mask
    batch = {"input_ids": ids, "attention_mask": mask.long()}
    for layout in LAYOUTS.values():
        model = layout()
        dense = copy.deepcopy(model)
        report = prune_(model, [batch], 0.1)
        rows = {row.name: row for row in report.layers}
        assert rows["layer"].samples == int(mask.sum())
        assert rows["layer"].output_error == pytest.approx(error_at(model, dense, batch), rel=1e-4)
        assert rows["head"].samples == SAMPLES
        with torch.no_grad():
            now, before = model(**batch), dense(**batch)
        assert report.output_error == pytest.approx(float((now - before).norm() / before.norm()), rel=1e-4)


def test_a_decoder_s_positions_are_not_those_that_the_encoder_s_mask_hides() -> None:
    """They may be as many, and masked causally: the rows count, and the head says so."""

    class EncoderDecoder(Pooled):
        def __init__(self) -> None:
            super().__init__()
            self.decoder = nn.Linear(WIDTH, WIDTH)

        def forward(self, input_ids: Tensor, attention_mask: Tensor, decoder_input_ids: Tensor) -> Tensor:
            h, mask = torch.relu(self.layer(self.embed(input_ids))), attention_mask[..., None].float()
            context = (h * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True)
            found: Tensor = self.head(torch.relu(self.decoder(self.embed(decoder_input_ids) + context)).cumsum(1))
            return found

    batch = data()
    model = EncoderDecoder()
    dense = copy.deepcopy(model)
    report = prune_(model, [batch | {"decoder_input_ids": batch["input_ids"].flip(0)}], 0.1)
    rows = {row.name: row.samples for row in report.layers}
    assert rows == {"layer": int(batch["attention_mask"].sum())} | dict.fromkeys(
        ("head", "decoder"), SAMPLES * POSITIONS
    )
    assert "cannot be used in decoder, head, where all rows count" in "; ".join(report.head)
    with torch.no_grad():
        now, before = (one(**batch, decoder_input_ids=batch["input_ids"].flip(0)) for one in (model, dense))
    assert report.output_error == pytest.approx(float((now - before).norm() / before.norm()), rel=1e-4)


@pytest.mark.parametrize("longer", [0, 3])
def test_an_encoder_and_a_decoder_have_a_mask_each(longer: int) -> None:
    """As many positions as the encoder has, or more: each layer's rows are hidden by the mask of its own sequence."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 1, "num_heads": 2, "vocab_size": 30}
    model = transformers.T5Model(transformers.T5Config(**sizes, initializer_factor=2.0, dropout_rate=0.0)).eval()
    dense, batch = copy.deepcopy(model), data()
    other = data(positions=POSITIONS + longer, seed=1)
    both = batch | {f"decoder_{key}": value for key, value in other.items()}
    visible, decoders = (int(part["attention_mask"].sum()) for part in (batch, other))
    assert visible != decoders
    report = prune_(model, [both], 0.2)
    assert report.mask is not None
    assert report.mask["unused"] == {}
    assert "attention_mask and decoder_attention_mask hide" in "; ".join(report.head)
    for row in report.layers:
        cross = "EncDecAttention" in row.name and row.name.endswith((".k", ".v"))
        assert row.samples == (visible if cross or row.name.startswith("encoder") else decoders), row.name
    wrong = right = 0.0
    with torch.no_grad():
        for sample in zip(*both.values(), strict=True):
            ids, mask, decoder_ids, decoder_mask = sample
            alone = {"input_ids": ids[mask > 0][None], "decoder_input_ids": decoder_ids[decoder_mask > 0][None]}
            for key in ("last_hidden_state", "encoder_last_hidden_state"):
                now, before = model(**alone)[key], dense(**alone)[key]
                wrong, right = wrong + float((now - before).norm() ** 2), right + float(before.norm() ** 2)
    assert report.output_error == pytest.approx(math.sqrt(wrong / right), rel=1e-3)


def test_torch_s_own_transformer_has_a_mask_for_each_sequence() -> None:
    """Queries of the decoder's attention to the encoder are of one sequence, keys and values of the other."""
    torch.manual_seed(0)
    model = nn.Transformer(WIDTH, 2, 1, 1, 12, dropout=0.0, batch_first=True).eval()
    model.encoder.enable_nested_tensor = False
    masks = [data(seed=seed)["attention_mask"] > 0 for seed in (0, 1)]
    visible, decoders = (int(mask.sum()) for mask in masks)
    batch = {
        "src": torch.randn(SAMPLES, POSITIONS, WIDTH),
        "tgt": torch.randn(SAMPLES, POSITIONS, WIDTH),
        "src_key_padding_mask": ~masks[0],
        "memory_key_padding_mask": ~masks[0],
        "tgt_key_padding_mask": ~masks[1],
        "tgt_mask": nn.Transformer.generate_square_subsequent_mask(POSITIONS).isinf(),
    }
    report = prune_(model, [batch], 0.2)
    assert report.mask is not None
    assert report.mask["unused"] == {}
    rows = {row.name: row.samples for row in report.layers}
    assert {n for name, n in rows.items() if name.startswith("encoder")} == {visible}
    assert {n for name, n in rows.items() if name.startswith("decoder") and "multihead_attn" not in name} == {decoders}
    dense = prune_(nn.Transformer(WIDTH, 2, 1, 1, 12, dropout=0.0, batch_first=True).eval(), [batch], 0.2, mask=False)
    assert dense.mask is None


@pytest.mark.parametrize("layer", [nn.Linear(WIDTH, 4), nn.Conv1d(WIDTH, 4, 3, padding=1)], ids=["linear", "conv1d"])
def test_a_program_by_hand_is_of_rows_that_count(layer: nn.Module) -> None:
    mask, x = data()["attention_mask"], torch.randn(SAMPLES, POSITIONS, WIDTH)
    x = x if isinstance(layer, nn.Linear) else x.transpose(1, 2)
    whole, program = (layer_program(layer, [x, x], 0.1, mask=given) for given in (None, [mask, mask]))
    visible = mask.flatten() > 0
    assert torch.equal(program.X, whole.X[torch.cat([visible, visible])])
    assert program.fit.eps < whole.fit.eps
    for wrong in (mask[:, :3], mask[None], [mask], 2 * mask):
        with pytest.raises(InvalidInput, match="mask"):
            layer_program(layer, [x, x], 0.1, mask=wrong)


def test_all_layouts_of_a_mask() -> None:
    """Of axes: in any order, along one, and none where lengths do not fit; spread they hold the mask's values."""
    mask = torch.arange(6).reshape(2, 3)
    for axes, expected in (
        ((2, 3), [Layout(0, 1)]),
        ((3, 2), [Layout(1, 0)]),
        ((2, 4, 3), [Layout(0, 2)]),
        ((6,), [Layout(0, 0), Layout(0, 0, turned=True)]),
        ((2,), []),
        ((4, 3), []),
    ):
        assert list(layouts(axes, (2, 3))) == expected
        for layout in expected:
            spread = layout.spread(mask, axes)
            assert spread.shape == axes
            assert sorted(spread.flatten().unique().tolist()) == list(range(6))
    assert Layout(0, 0, turned=True).spread(mask, (6,)).tolist() == [0, 3, 1, 4, 2, 5]
    assert len(list(layouts((3, 3), (3, 3)))) == 2
    assert list(layouts((5,), (1, 5))) == [Layout(0, 0)]


ENCODERS = [
    ("BertModel", {"eps": 0.15}),
    ("BertModel", {"sparsity": 0.5, "mode": "cascade"}),
    ("BertForSequenceClassification", {"eps": 0.15, "mode": "cascade"}),
    ("BertForTokenClassification", {"sparsity": 0.5}),
]


@pytest.mark.parametrize(("kind", "asked"), ENCODERS, ids=str)
def test_an_encoder_is_pruned_as_without_padding(kind: str, asked: dict[str, Any]) -> None:
    """Rows, errors and the network's error are those of the samples one by one, which need no padding."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=30,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=12,
        max_position_embeddings=64,
        initializer_range=0.4,
        num_labels=3,
    )
    model = getattr(transformers, kind)(config).eval()
    dense, batch = copy.deepcopy(model), data()
    report = prune_(model, [transformers.BatchEncoding(batch)], **asked)
    visible = int(batch["attention_mask"].sum())
    rows = {row.name: row.samples for row in report.layers}
    assert {samples for name, samples in rows.items() if "encoder" in name} == {visible}
    assert {samples for name, samples in rows.items() if "pooler" in name} <= {SAMPLES}
    wrong = right = 0.0

    def outputs(one: nn.Module, ids: Tensor) -> Tensor:
        found = one(input_ids=ids).values()
        return torch.cat([tensor.flatten() for tensor in found if isinstance(tensor, Tensor)])

    with torch.no_grad():
        for ids, mask in zip(*batch.values(), strict=True):
            alone = ids[mask > 0][None]
            now, before = outputs(model, alone), outputs(dense, alone)
            wrong, right = wrong + float((now - before).norm() ** 2), right + float(before.norm() ** 2)
    assert report.output_error == pytest.approx(math.sqrt(wrong / right), rel=1e-3)
    assert report.mask is not None
    assert report.mask["unused"] == {}


def test_a_run_goes_on_and_is_verified_with_its_mask(tmp_path: Path) -> None:
    model, batch = Pooled(), data()
    trained = copy.deepcopy(model)
    report = prune_(model, [batch], 0.1, run=tmp_path / "key")
    again = prune_(copy.deepcopy(trained), [batch], 0.1, run=tmp_path / "key")
    assert [row.value for row in again.layers] == [row.value for row in report.layers]
    found = verify(trained, [batch], tmp_path / "key")
    assert found.ok
    assert [row.recomputed.samples for row in found.layers] == [row.samples for row in report.layers]

    def function(batch: dict[str, Tensor]) -> Tensor:
        return batch["input_ids"] != 0

    prune_(copy.deepcopy(trained), [batch], 0.1, run=tmp_path / "function", mask=function)
    assert verify(trained, Data([batch], mask=function), tmp_path / "function").ok
    with pytest.raises(InvalidInput, match="mask: the run was given"):
        verify(trained, [batch], tmp_path / "function")
    with pytest.raises(InvalidInput, match="data"):
        verify(trained, Data([batch], mask=lambda batch: batch["input_ids"] != 1), tmp_path / "function")


def test_a_preview_counts_the_same_rows() -> None:
    batch = data()
    told = preview(Pooled(), [batch], 0.1)
    report = prune_(Pooled(), [batch], 0.1)
    assert [row.matrices[0][0] for row in told.layers] == [row.samples for row in report.layers]
    assert told.notices == report.notices


@pytest.mark.parametrize("method", ["sipp", "magnitude"])
def test_a_coreset_is_taken_of_positions_that_count(method: str) -> None:
    """The error in a row is theirs, and what fills up changes nothing."""
    found = []
    for batch in (data(), data(filler=7), data(positions=40)):
        model = Pooled()
        dense = copy.deepcopy(model)
        report = coreset_prune_(model, [batch], method, 0.5, layers="layer", fit="ball")
        with torch.no_grad():
            h = dense.embed(batch["input_ids"])[batch["attention_mask"] > 0]
            W, U = dense.layer.weight, model.layer.weight
            whole = dense.layer(h) if method == "magnitude" else h @ W.T  # the bias is a fixed input to samplers
            error = float((h @ (U - W).T).norm() / whole.norm())
            outputs = [one(**batch) for one in (model, dense)]
        assert report.layers[0].output_error == pytest.approx(error, rel=1e-4)
        assert report.layers[0].samples == int(batch["attention_mask"].sum())
        assert report.output_error == pytest.approx(
            float((outputs[0] - outputs[1]).norm() / outputs[1].norm()), rel=1e-4
        )
        assert "attention_mask hides" in "; ".join(report.head)
        found.append(model.layer.weight.detach())
    assert all(torch.allclose(weight, found[0], atol=1e-5) for weight in found[1:])


@pytest.mark.parametrize("batch_first", [True, False])
def test_an_encoder_of_torch_s_own_leaves_out_what_its_mask_hides(batch_first: bool) -> None:
    """Queries, keys and values as well, whichever axis comes first; hidden positions of the outputs do not count."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=batch_first)
    model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval()
    dense, batch = copy.deepcopy(model), data()
    mask, x = batch["attention_mask"] > 0, torch.randn(SAMPLES, POSITIONS, WIDTH)
    x[~mask] *= 20

    def forward(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Any:
        x, mask = batch
        return model(x if batch_first else x.transpose(0, 1), src_key_padding_mask=~mask)

    report = prune_(model, [(x, mask)], 0.2, forward=forward, mask=lambda batch: batch[1])
    assert {row.samples for row in report.layers} == {int(mask.sum())}
    assert report.mask is not None
    assert report.mask["unused"] == {}
    with torch.no_grad():
        now, before = (forward(one, (x, mask)) for one in (model, dense))
        now, before = (y if batch_first else y.transpose(0, 1) for y in (now, before))
        now, before = now[mask], before[mask]
    assert report.output_error == pytest.approx(float((now - before).norm() / before.norm()), rel=1e-3)


def test_the_bound_on_the_network_holds_at_positions_that_count() -> None:
    """A network position by position, whose outputs are hidden with what they come from."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, 16), nn.ReLU(), nn.Linear(16, 5)).eval()
    dense, mask = copy.deepcopy(model), data()["attention_mask"] > 0
    x = torch.randn(SAMPLES, POSITIONS, WIDTH)
    x[~mask] *= 30
    report = prune_(model, [(x, mask)], network_eps=0.2, guarantee="bound", mask=lambda batch: batch[1], tol=1e-2)
    with torch.no_grad():
        now, before = model(x)[mask], dense(x)[mask]
    error = float((now - before).norm() / before.norm())
    assert report.network.error == pytest.approx(error, rel=1e-4)
    assert error <= report.network.bound + report.network.rounding
    assert report.network.bound <= 0.2
