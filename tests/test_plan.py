"""Which layers are pruned: by name, by kind, and once for all the modules that share a weight."""

import copy
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from calls import preview, prune_
from hypothesis import given
from hypothesis import strategies as st
from networks import mlp
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from convexprune.errors import NothingToPrune
from convexprune.layers import weight_matrices, write_back_
from convexprune.layers.memory import Holders, overlaps_itself
from convexprune.network.choosing import choose_layers, find_ties, looked_up
from convexprune.solvers.errors import InvalidInput


def reasons(model, *args, **kwargs):
    return {module.name: module.reason for module in choose_layers(model, *args, **kwargs)[1]}


@pytest.mark.parametrize("patterns", [5, [5], [None], {"0": 1, 2: 3}])
def test_patterns_are_texts(patterns):
    with pytest.raises(InvalidInput, match="layers: expected patterns of names"):
        choose_layers(nn.Sequential(nn.Linear(4, 4)), patterns)


@pytest.mark.parametrize(
    "given",
    [
        {"activations": {"typo": "relu"}},
        {"fit": {"typo": "ball", "*": "ball"}},
        {"eps": {"typo": 0.1, "*": 0.2}},
        {"sparsity": {"*": 0.2, "typo": 0.5}},
    ],
)
def test_a_pattern_that_matches_no_layer_is_named(given):
    model = mlp(5, 6, 4, 3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(
        InvalidInput, match=rf"{next(iter(given))}: no layer matches \['typo'\]; the layers are 0, 2, 4"
    ):
        prune_(model, torch.rand(20, 5), **given)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_table_may_speak_of_layers_that_are_not_chosen():
    report = prune_(mlp(5, 6, 4, 3), torch.rand(20, 5), {"2": 0.3, "0": 0.1}, layers="0", fit={"4": "ball"})
    assert [(row.name, row.eps) for row in report.layers] == [("0", 0.1)]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"activations": ["relu"]}, "activations: expected a mapping"),
        ({"activations": "relu"}, "activations: expected a mapping"),
        ({"activations": {"0": 1}}, "activations: expected a mapping"),
        ({"fit": 3}, "fit: expected one of relu-ball, ball, net-trim, or a LayerFit"),
        ({"fit": {"0": None}}, "fit: expected a name"),
        ({"eps": {0: 0.1}}, "eps: expected patterns of names"),
        ({"sparsity": {0: 0.1}}, "sparsity: expected patterns of names"),
        ({"eps": [0.1, "x", 0.1]}, "eps of layer 2: expected a number"),
        ({"sparsity": True}, "sparsity: expected the part"),
        ({"sparsity": np.float32(1)}, "sparsity: expected the part"),
    ],
)
def test_what_is_no_table_is_refused(given, says):
    with pytest.raises(InvalidInput, match=says):
        prune_(mlp(5, 6, 4, 3), torch.rand(20, 5), **given)


@pytest.mark.parametrize("number", [np.float32(0.5), np.float64(0.5), np.float16(0.5), 0.5])
def test_a_part_is_a_number_of_any_type(number):
    report = prune_(mlp(5, 6, 4, 3), torch.rand(20, 5), sparsity=number)
    assert [row.nonzeros for row in report.layers] == [15, 12, 6]
    assert report.provenance["target"]["value"] == 0.5
    assert [row.nonzeros for row in prune_(mlp(5, 6, 4, 3), torch.rand(20, 5), sparsity={"*": number}).layers] == [
        15,
        12,
        6,
    ]


def test_patterns_may_come_one_by_one():
    chosen, skipped = choose_layers(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), (name for name in "1"))
    assert list(chosen) == ["1"]
    assert [module.name for module in skipped] == ["0"]


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        ("!stem", ["a.0", "a.1", "head"]),
        (["!stem", "*"], ["a.0", "a.1", "head"]),
        (["a.*", "!a.0"], ["a.1"]),
        (["!a.0", "!head"], ["stem", "a.1"]),
        (["head", "!a.*"], ["head"]),
        ({"head", "a.1"}, ["a.1", "head"]),
    ],
)
def test_names_are_left_out_by_an_exclamation_mark(patterns, names):
    model = nn.ModuleDict({"stem": nn.Linear(4, 4), "a": nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])})
    model["head"] = nn.Linear(4, 4)
    chosen, skipped = choose_layers(model, patterns)
    assert list(chosen) == names
    left = [pattern for pattern in patterns if pattern.startswith("!")] if isinstance(patterns, list) else [patterns]
    for module in skipped:
        exactly = f"left out by the name pattern '!{module.name}'"
        assert module.reason == exactly or f"!{module.name}" not in left


@pytest.mark.parametrize("patterns", ["!nothing", ["stem", "!nothing"], ["stem", "!stem"], []])
def test_patterns_that_leave_out_or_choose_nothing_are_named(patterns):
    with pytest.raises(NothingToPrune, match=r"nothing|stem|no layer"):
        choose_layers(nn.ModuleDict({"stem": nn.Linear(4, 4), "head": nn.Linear(4, 4)}), patterns)


def test_a_tied_layer_is_left_out_by_any_of_its_names():
    model = nn.ModuleDict({name: nn.Linear(4, 4) for name in "abc"})
    model["b"].weight, model["b"].bias = model["a"].weight, model["a"].bias
    chosen, skipped = choose_layers(model, "!b")
    assert list(chosen) == ["c"]
    assert {module.reason for module in skipped} == {"left out by the name pattern '!b'"}


@pytest.mark.parametrize(
    ("table", "value"),
    [
        ({"*": 1, "fc1": 2}, 2),
        ({"fc*": 1, "*": 2}, 1),
        ({"*": 2, "fc*": 1}, 2),
        ({"conv*": 1}, None),
        ({"f[c]1": 1, "fc1": 0.0}, 0.0),
    ],
)
def test_an_exact_name_counts_first_then_the_first_pattern(table, value):
    assert looked_up(table, "fc1") == value


@pytest.mark.parametrize("model", [None, "model:build", nn.Linear])
def test_what_is_no_module_is_refused(model):
    with pytest.raises(InvalidInput, match=r"model: expected a torch\.nn\.Module, found"):
        choose_layers(model)


def some_of_each():
    linears = {"linear": nn.Linear(4, 4), "transposed": Conv1D(4, 4), "embedding": nn.Embedding(4, 4)}
    convs = {f"conv{axes}": kind(2, 2, 3) for axes, kind in enumerate((nn.Conv1d, nn.Conv2d, nn.Conv3d), start=1)}
    return nn.ModuleDict(linears | convs | {"attention": nn.MultiheadAttention(4, 2), "norm": nn.BatchNorm1d(4)})


def test_every_kind_of_product_is_chosen_and_every_other_weight_named():
    chosen, skipped = choose_layers(some_of_each())
    products = ["linear", "transposed", "conv1", "conv2", "conv3", "attention", "attention.out_proj"]
    assert list(chosen) == products
    assert [(module.name, module.kind) for module in skipped] == [("embedding", "Embedding")]


def tied(make, bias=True):
    """Three layers of one weight, and one bias if any: the second by the same Parameters, the third by new ones."""
    torch.manual_seed(0)
    model = nn.ModuleDict({name: make() for name in ("a", "b", "c", "alone")})
    for name in ("weight", "bias"):
        if getattr(model["a"], name) is not None:
            setattr(model["b"], name, getattr(model["a"], name))
            setattr(model["c"], name, nn.Parameter(getattr(model["a"], name).detach()))
    return model


SAME = {
    "linear": lambda: nn.Linear(3, 4),
    "linear without bias": lambda: nn.Linear(3, 4, bias=False),
    "grouped convolution": lambda: nn.Conv2d(4, 6, 3, groups=2, stride=2),
    "convolution along one axis": lambda: nn.Conv1d(4, 6, 3, padding="same"),
    "Conv1D": lambda: Conv1D(3, 4),
}


@pytest.mark.parametrize("case", SAME)
def test_layers_of_one_weight_and_bias_are_one_layer(case):
    model = tied(SAME[case])
    chosen, skipped = choose_layers(model)
    assert chosen == {"a": model["a"], "alone": model["alone"]}
    assert {module.name: module.reason for module in skipped} == dict.fromkeys(
        "bc", "its weight is that of 'a': solved there for all"
    )
    assert all(find_ties(model).uses_of(name) == ("a", "b", "c") for name in "abc")
    assert find_ties(model).uses_of("alone") == ("alone",)
    write_back_(model["a"], [torch.randn_like(U) for U in weight_matrices(model["a"])])
    for name in find_ties(model).uses_of("a"):
        pairs = zip(weight_matrices(model["a"]), weight_matrices(model[name]), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize("pattern", ["a", "b", ["c"], ["nothing", "b"]])
def test_a_pattern_of_any_use_chooses_the_first(pattern):
    model = tied(SAME["linear"])
    if "nothing" in pattern:
        with pytest.raises(NothingToPrune, match=r"matches \['nothing'\]"):
            choose_layers(model, pattern)
        return
    chosen, _ = choose_layers(model, pattern)
    assert list(chosen) == ["a"]
    found = reasons(model, pattern)
    assert found["alone"] == "not chosen by the name patterns"
    assert "solved there" in found["b"]


def test_two_attentions_of_one_weight_are_two_layers_with_two_uses_each():
    one, two = nn.MultiheadAttention(4, 2), nn.MultiheadAttention(4, 2)
    two.in_proj_weight, two.in_proj_bias = one.in_proj_weight, one.in_proj_bias
    two.out_proj = one.out_proj
    model = nn.ModuleDict({"one": one, "two": two})
    assert list(choose_layers(model)[0]) == ["one", "one.out_proj"]
    assert find_ties(model).uses_of("two") == ("one", "two")
    assert find_ties(model).uses_of("one.out_proj") == ("one.out_proj", "two.out_proj")
    assert reasons(model)["two.out_proj"] == "its weight is that of 'one.out_proj': solved there for both"


def test_one_module_under_two_names_is_called_twice_and_stands_once():
    layer = nn.Linear(3, 3)
    model = nn.ModuleDict({"a": layer, "b": layer, "block": nn.Sequential(layer)})
    assert choose_layers(model) == ({"a": layer}, [])
    assert find_ties(model).uses_of("a") == ("a",)


def share(first, second, weight, bias=None):
    """Two layers, the second with tensors that the function makes of the first one's."""
    model = nn.ModuleDict({"first": first, "second": second})
    second.weight = nn.Parameter(weight(first.weight.detach()))
    if bias is not None:
        second.bias = nn.Parameter(bias(first.bias.detach()))
    return model


class Scaled(nn.Linear):
    def forward(self, inputs):
        return 2 * super().forward(inputs)


def same(tensor):
    return tensor


def linear(n=4, m=4):
    return nn.Linear(n, m, bias=False)


CLASHES = {
    "embedding and head": lambda: share(nn.Embedding(4, 4), linear(), same),
    "other biases": lambda: share(nn.Linear(4, 4), nn.Linear(4, 4), same),
    "only one biased": lambda: share(nn.Linear(4, 4), linear(), same),
    "only the bias": lambda: share(nn.Linear(4, 4), nn.Linear(4, 4), torch.clone, same),
    "transposed": lambda: share(linear(), linear(), torch.t),
    "rows of another": lambda: share(linear(4, 6), linear(4, 3), lambda w: w[2:5]),
    "columns of another": lambda: share(linear(6, 4), linear(3, 4), lambda w: w[:, 2:5]),
    "linear and convolution": lambda: share(linear(), nn.Conv1d(4, 4, 1, bias=False), lambda w: w[..., None]),
    "other strides": lambda: share(nn.Conv1d(4, 4, 3), nn.Conv1d(4, 4, 3, stride=2), same, same),
    "other groups": lambda: share(nn.Conv1d(2, 4, 3), nn.Conv1d(4, 4, 3, groups=2), same, same),
    "Linear and Conv1D": lambda: share(nn.Linear(4, 4), Conv1D(4, 4), torch.t, same),
    "a forward of its own": lambda: share(nn.Linear(4, 4), Scaled(4, 4), same, same),
    "a norm's bias": lambda: share(nn.LayerNorm(4), nn.Linear(4, 4), lambda w: torch.eye(4), same),
}


@pytest.mark.parametrize("case", CLASHES)
def test_weights_shared_in_another_way_are_refused_by_name(case):
    model = nn.ModuleDict({"tied": CLASHES[case](), "other": nn.Linear(3, 3)})
    chosen, _ = choose_layers(model)
    assert list(chosen) == ["other"]
    found = reasons(model)
    supported = [name for name in ("tied.first", "tied.second") if "shares a parameter" in found.get(name, "")]
    for name in supported:
        other = {"tied.first": "tied.second", "tied.second": "tied.first"}[name]
        assert f"shares a parameter with '{other}'" in found[name]
        assert "untie them" in found[name]
    assert len(supported) == (1 if case in ("embedding and head", "a forward of its own", "a norm's bias") else 2)


def test_the_model_itself_may_share_and_buffers_count():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    model.alias = model[0].weight
    model[2].register_buffer("view", model[1].weight.detach()[1:])
    found = reasons(nn.ModuleList([model, nn.Linear(2, 2)]))
    assert "shares a parameter with '0'," in found["0.0"]
    assert "shares a parameter with '0.2'," in found["0.1"]
    with pytest.raises(NothingToPrune, match="shares a parameter with the model itself"):
        choose_layers(model, "0")


def test_buffers_that_only_buffers_share_tie_nothing():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    for layer in model:
        layer.register_buffer("table", torch.zeros(3) if layer is model[0] else model[0].table)
    assert list(choose_layers(model)[0]) == ["0", "1"]


def test_neighbours_in_one_flat_storage_are_not_tied():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3), nn.Conv1d(2, 3, 2))
    parameters = [(layer, name) for layer in model for name in ("weight", "bias")]
    flat = torch.randn(sum(getattr(layer, name).numel() for layer, name in parameters))
    parts = flat.split([getattr(layer, name).numel() for layer, name in parameters])
    for (layer, name), part in zip(parameters, parts, strict=True):
        setattr(layer, name, nn.Parameter(part.view(getattr(layer, name).shape)))
    assert len({layer.weight.untyped_storage().data_ptr() for layer in model}) == 1
    ties = find_ties(model)
    assert (dict(ties.uses), dict(ties.refused)) == ({}, {})
    assert list(choose_layers(model)[0]) == ["0", "1", "2"]


def test_columns_of_one_matrix_are_tied_only_where_they_overlap():
    matrix, model = torch.randn(4, 9), nn.Sequential(*[nn.Linear(3, 4, bias=False) for _ in range(3)])
    for layer, first in zip(model, (0, 3, 5), strict=True):
        layer.weight = nn.Parameter(matrix[:, first : first + 3])
    ties = find_ties(model)
    assert ties.refused.keys() == {"1", "2"}
    assert [ties.uses_of(name) for name in "012"] == [("0",), ("1",), ("2",)]
    assert list(choose_layers(model)[0]) == ["0"]


FLAT = torch.zeros(8, dtype=torch.float64)


@st.composite
def views(draw):
    """A view of some entries of one storage in some type, and the bytes in which each of its entries lies."""
    flat = FLAT.view(draw(st.sampled_from([torch.float64, torch.float32, torch.int16])))
    shape = draw(st.lists(st.integers(0, 3), max_size=2))
    most = len(flat) // 4
    strides, first = [draw(st.integers(0, most)) for _ in shape], draw(st.integers(0, most - 1))
    places = [
        first + sum(i * step for i, step in zip(index, strides, strict=True))
        for index in itertools.product(*map(range, shape))
    ]
    size = flat.element_size()
    return flat.as_strided(shape, strides, first), [{size * place + k for k in range(size)} for place in places]


@given(views(), views())
def test_memory_is_shared_where_entries_lie_in_the_same_bytes(one, other):
    (a, mine), (b, theirs) = one, other
    shared = bool(set().union(*mine) & set().union(*theirs))
    assert Holders([(a, "a")]).of(b) == (["a"] if shared else [])
    several = Holders([(b, "b"), (a, "a"), (a, "a"), (torch.zeros(1), "c")])
    assert sorted(several.of(a)) == ["a"] * bool(mine) + ["b"] * shared
    assert overlaps_itself(a) == (len({min(place) for place in mine}) < len(mine))


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_empty_weights_and_weights_without_a_place_are_not_tied_by_that():
    empty = nn.Sequential(nn.Linear(0, 3, bias=False), nn.Linear(0, 3, bias=False))
    assert not find_ties(empty).uses
    assert not find_ties(empty).refused
    placeless = nn.Sequential(nn.Linear(3, 3, device="meta"), nn.Linear(3, 3, device="meta"), nn.LazyLinear(3))
    assert not find_ties(placeless).refused
    placeless[1].weight = placeless[0].weight
    assert set(find_ties(placeless).refused) == {"0", "1"}


class TwoNames(nn.Module):
    """One weight under two names, between layers of their own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.enc, self.dec, self.head = (nn.Linear(8, 8) for _ in range(4))
        self.dec.weight, self.dec.bias = self.enc.weight, self.enc.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dec(self.enc(self.stem(x).relu()).relu()).relu())


TABLES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"eps": {"dec": 0.3, "*": 0.1}}, {"eps": {"enc": 0.3, "*": 0.1}}),
    ({"eps": {"d*": 0.3, "*": 0.1}}, {"eps": {"enc": 0.3, "*": 0.1}}),
    ({"sparsity": {"dec": 0.8, "enc*": 0.1, "*": 0.5}}, {"sparsity": {"enc": 0.8, "*": 0.5}}),
    ({"sparsity": {"dec": "2:4", "*": 0.0}}, {"sparsity": {"enc": "2:4", "*": 0.0}}),
    ({"eps": 0.1, "fit": {"dec": "ball", "*": "relu-ball"}}, {"eps": 0.1, "fit": {"enc": "ball", "*": "relu-ball"}}),
]


@pytest.mark.parametrize(("arguments", "same"), TABLES, ids=str)
def test_a_table_may_name_a_layer_by_any_of_its_names(arguments: dict[str, Any], same: dict[str, Any]) -> None:
    x = torch.rand(60, 8)
    model, expected = TwoNames(), TwoNames()
    report = prune_(model, x, mode="parallel", **arguments)
    again = prune_(expected, x, mode="parallel", **same)
    rows = [(row.name, row.nonzeros, row.output_error) for row in report.layers]
    assert rows == [(row.name, row.nonzeros, row.output_error) for row in again.layers]
    assert "enc" in {row.name for row in report.layers}
    assert torch.equal(model.dec.weight, expected.enc.weight)
    shown = [preview(TwoNames(), x, mode="parallel", **given).layers[0].goal for given in (arguments, same)]
    assert shown[0] == shown[1]


@pytest.mark.parametrize("argument", ["eps", "sparsity"])
def test_names_of_one_layer_may_not_ask_for_different_things(argument: str) -> None:
    model = TwoNames()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InvalidInput, match=rf"{argument}: these are names of one layer.*'enc': 0.1, 'dec': 0.2"):
        prune_(model, torch.rand(20, 8), **{argument: {"enc": 0.1, "dec": 0.2, "*": 0.3}})
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    prune_(model, torch.rand(20, 8), **{argument: {"enc": 0.1, "dec": 0.1, "*": 0.3}})


def test_a_layer_is_left_as_trained_beside_a_table_of_eps() -> None:
    model, x = TwoNames(), torch.rand(60, 8)
    trained = model.head.weight.detach().clone()
    report = prune_(model, x, {"stem": 0.1, "dec": 0.2}, layers="!head")
    assert [row.name for row in report.layers] == ["stem", "enc"]
    assert torch.equal(model.head.weight, trained)
    with pytest.raises(InvalidInput, match="layers='!stem'"):
        prune_(model, x, {"stem": None, "*": 0.1})
    with pytest.raises(InvalidInput, match="leave it as trained with layers='!enc'"):
        prune_(model, x, {"stem": 0.1})
