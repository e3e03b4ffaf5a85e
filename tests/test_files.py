"""Files: nothing is unpickled, damage is named, and a failed write never costs the old file."""

import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from convexprune.errors import DamagedFile
from convexprune.files.arrays import LABEL_NAMES, load_array
from convexprune.files.weights import load_weights, save_json
from convexprune.network.links import find_links
from convexprune.network.weights import load_weights_into_, remove_neurons_, save_weights
from convexprune.solvers.errors import EmptyInput, InvalidInput, NonFinite, ShapeMismatch

WEIGHT_SUFFIXES = [".safetensors", ".pt", ".pth", ".bin"]


def network(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3, bias=False)
        self.second = nn.Linear(3, 3, bias=False)
        self.second.weight = self.first.weight
        self.register_buffer("row", self.first.weight.detach()[1])  # a view into the same storage
        self.register_buffer("short", torch.ones(2, dtype=torch.float16))
        self.register_buffer("turned", torch.arange(6.0).reshape(2, 3).t())  # not contiguous


class Trap:
    """Unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.mkdir, (str(self.path),)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(state: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return list(state) == list(other) and all(
        state[key].dtype == other[key].dtype and torch.equal(state[key], other[key]) for key in state
    )


# Weights in


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".PT"])
def test_torch_files_load(tmp_path: Path, suffix: str) -> None:
    state = network().state_dict()
    torch.save(state, tmp_path / f"w{suffix}")
    assert same(load_weights(tmp_path / f"w{suffix}"), state)


def test_safetensors_of_other_programs_load(tmp_path: Path) -> None:
    state = network().state_dict()
    save_file(state, tmp_path / "w.safetensors", {"keys": "not JSON", "format": "pt"})
    found = load_weights(str(tmp_path / "w.safetensors"))
    assert same({key: found[key] for key in state}, state)


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("suffix", WEIGHT_SUFFIXES)
def test_a_plain_pickle_with_code_is_refused_and_not_run(tmp_path: Path, suffix: str, protocol: int) -> None:
    path, ran = tmp_path / f"w{suffix}", tmp_path / "ran"
    path.write_bytes(pickle.dumps(Trap(ran), protocol))
    with pytest.raises(DamagedFile, match=r"safetensors\.torch\.save_file"):
        load_weights(path)
    assert not ran.exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_code_inside_a_torch_file_is_refused_and_not_run(tmp_path: Path, zipped: bool) -> None:
    path, ran = tmp_path / "w.pt", tmp_path / "ran"
    torch.save({"0.weight": torch.ones(2), "trap": Trap(ran)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(DamagedFile, match="unpickling"):
        load_weights(path)
    assert not ran.exists()


def test_the_trap_is_armed(tmp_path: Path) -> None:
    """Otherwise the two tests above could not fail."""
    pickle.loads(pickle.dumps(Trap(tmp_path / "ran")))  # noqa: S301
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("suffix", WEIGHT_SUFFIXES)
def test_files_cut_anywhere_are_damaged(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"w{suffix}"
    if suffix == ".safetensors":
        save_weights(network(), path)
    else:
        torch.save(network().state_dict(), path)
    whole = path.read_bytes()
    for length in (0, 1, 8, 9, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(DamagedFile, match="found an empty file" if length == 0 else f"found {length:,} bytes"):
            load_weights(path)


@pytest.mark.parametrize("suffix", WEIGHT_SUFFIXES)
def test_random_bytes_are_damaged(tmp_path: Path, suffix: str) -> None:
    path, rng = tmp_path / f"w{suffix}", np.random.default_rng(0)
    for size in (1, 2, 7, 8, 64, 1000):
        for _ in range(20):
            path.write_bytes(rng.bytes(size))
            with pytest.raises(DamagedFile):
                load_weights(path)


def test_a_header_that_lies_about_its_length_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(struct.pack("<Q", 2**63) + b"{}")
    with pytest.raises(DamagedFile, match="damaged"):
        load_weights(path)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({"state_dict": {"0.weight": torch.ones(1)}, "epoch": 3}, "'state_dict': dict, 'epoch': int"),
        ([torch.ones(1)], "holds a list"),
        (torch.ones(1), "holds a Tensor"),
        ({0: torch.ones(1)}, "holds 0"),
    ],
)
def test_what_is_not_a_state_dict_is_named(tmp_path: Path, content: object, named: str) -> None:
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(DamagedFile, match=named):
        load_weights(tmp_path / "w.pt")


@pytest.mark.parametrize("load", [load_weights, load_array])
def test_missing_files_folders_and_other_suffixes(tmp_path: Path, load: Callable[[Path], object]) -> None:
    with pytest.raises(FileNotFoundError, match=r"gone\.npz"):
        load(tmp_path / "gone.npz")
    with pytest.raises(InvalidInput, match="is a folder"):
        load(tmp_path)
    (tmp_path / "w.csv").touch()
    with pytest.raises(InvalidInput, match=r"\.csv.*expected a file ending in \.(npz|safetensors)"):
        load(tmp_path / "w.csv")


# Weights into a model


def test_weights_reach_the_model_in_place(tmp_path: Path) -> None:
    source, model = network(1), network(2)
    weight = model[0].weight
    load_weights_into_(model, save_weights(source, tmp_path / "w.safetensors"))
    assert same(model.state_dict(), source.state_dict())
    assert model[0].weight is weight


def broken(**changes: Tensor | None) -> dict[str, Tensor]:
    state = dict(network(1).state_dict())
    for key, value in changes.items():
        name = key.replace("__", ".")
        state.pop(name) if value is None else state.update({name: value})
    return state


def with_value(value: float) -> Tensor:
    weight = torch.ones(2, 3)
    weight[1, 2] = value
    return weight


@pytest.mark.parametrize(
    ("state", "error", "message"),
    [
        (broken(**{"2__bias": None}), InvalidInput, r"missing: 2\.bias"),
        (broken(more=torch.ones(1)), InvalidInput, "unexpected: more"),
        (broken(**{"2__weight": torch.ones(2, 4)}), ShapeMismatch, r"2\.weight \(file \[2, 4\], model \[2, 3\]\)"),
        (broken(**{"2__weight": with_value(np.nan)}), NonFinite, r"'2\.weight'"),
        (broken(**{"2__weight": with_value(-np.inf)}), NonFinite, r"'2\.weight'"),
        (broken(**{"2__weight": with_value(1.0).double() * 1e300}), NonFinite, r"'2\.weight'.*float32"),
    ],
)
def test_what_does_not_fit_is_named_and_changes_nothing(
    tmp_path: Path, state: dict[str, Tensor], error: type[Exception], message: str
) -> None:
    save_file(state, tmp_path / "w.safetensors")
    model = network(2)
    before = snapshot(model)
    with pytest.raises(error, match=message):
        load_weights_into_(model, tmp_path / "w.safetensors")
    assert same(model.state_dict(), before)


def test_many_faults_are_all_told_and_long_lists_cut(tmp_path: Path) -> None:
    save_file({f"layer{i}": torch.ones(1) for i in range(20)}, tmp_path / "w.safetensors")
    with pytest.raises(InvalidInput, match=r"missing: 0\.weight.*unexpected: .*and 12 more"):
        load_weights_into_(network(), tmp_path / "w.safetensors")


def test_missing_batch_counters_are_accepted(tmp_path: Path) -> None:
    save_file(broken(**{"1__num_batches_tracked": None}), tmp_path / "w.safetensors")
    model = network(2)
    load_weights_into_(model, tmp_path / "w.safetensors")
    assert same(model.state_dict(), network(1).state_dict())


# Weights of a network that has lost neurons


def shrunk(seed: int = 1) -> nn.Sequential:
    """The network with 2 of its 3 hidden neurons."""
    model = network(seed)
    [link] = find_links(model)[0].values()
    remove_neurons_(model, link, torch.tensor([0, 2]))
    return model


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_smaller_weights_make_the_model_smaller_if_asked(tmp_path: Path, suffix: str) -> None:
    source, model, path = shrunk(), network(2), tmp_path / f"w{suffix}"
    save_weights(source, path) if suffix == ".safetensors" else torch.save(source.state_dict(), path)
    with pytest.raises(ShapeMismatch, match=r"0\.weight \(file \[2, 4\], model \[3, 4\]\)"):
        load_weights_into_(model, path)
    load_weights_into_(model, path, resize=True)
    assert same(model.state_dict(), source.state_dict())
    assert [(model[0].out_features, model[1].num_features, model[2].in_features)] == [(2, 2, 2)]
    x = torch.rand(5, 4)
    assert torch.equal(model.eval()(x), source.eval()(x))
    load_weights_into_(model, path)  # it is the model of these weights now
    model.train()(x).sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())


def test_weights_of_the_same_size_are_loaded_in_place_whether_or_not_others_would_do(tmp_path: Path) -> None:
    model = network(2)
    parameters = list(model.parameters())
    load_weights_into_(model, save_weights(network(1), tmp_path / "w.safetensors"), resize=True)
    assert same(model.state_dict(), network(1).state_dict())
    assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True))


def smaller(**changes: Tensor | None) -> dict[str, Tensor]:
    state = dict(shrunk().state_dict())
    for key, value in changes.items():
        name = key.replace("__", ".")
        state.pop(name) if value is None else state.update({name: value})
    return state


@pytest.mark.parametrize(
    ("state", "error", "message"),
    [
        (smaller(**{"2__bias": None}), InvalidInput, r"missing: 2\.bias"),
        (smaller(more=torch.ones(1)), InvalidInput, "unexpected: more"),
        (smaller(**{"2__weight": torch.full((2, 2), torch.nan)}), NonFinite, r"'2\.weight'"),
        (smaller(**{"2__weight": torch.ones(2, 2).double() * 1e300}), NonFinite, r"'2\.weight'.*float32"),
        (smaller(**{"0__weight": torch.ones(2, 5)}), ShapeMismatch, r"0\.weight"),  # more inputs than the model
        (smaller(**{"0__bias": torch.ones(3)}), ShapeMismatch, r"0\.(weight|bias)"),  # not of one size
        (smaller(**{"2__weight": torch.ones(2, 2, 1)}), ShapeMismatch, r"2\.weight"),
        (smaller(**{"2__weight": torch.ones(1, 2), "2__bias": torch.ones(1)}), ShapeMismatch, r"expected \[2, 2\]"),
    ],
)
def test_smaller_weights_that_do_not_fit_change_nothing(
    tmp_path: Path, state: dict[str, Tensor], error: type[Exception], message: str
) -> None:
    save_file(state, tmp_path / "w.safetensors")
    model = network(2)
    before, parameters = snapshot(model), list(model.parameters())
    with pytest.raises(error, match=message):
        load_weights_into_(model, tmp_path / "w.safetensors", resize=True)
    assert same(model.state_dict(), before)
    assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True))
    assert [(model[0].out_features, model[1].num_features, model[2].in_features)] == [(3, 3, 3)]


# Weights out


def test_tied_views_and_other_dtypes_round_trip_through_plain_torch(tmp_path: Path) -> None:
    source, model = Tied(), Tied()
    path = save_weights(source, tmp_path / "w.safetensors")
    assert same(load_weights(path), dict(source.state_dict()))  # in the model's order
    model.load_state_dict(load_file(path))
    assert same(model.state_dict(), source.state_dict())
    assert model.first.weight is model.second.weight


def test_saving_leaves_the_model_alone_and_makes_folders(tmp_path: Path) -> None:
    model = network()
    before = snapshot(model)
    assert save_weights(model, str(tmp_path / "a" / "b" / "w.safetensors")) == tmp_path / "a" / "b" / "w.safetensors"
    assert same(model.state_dict(), before)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_weights_that_safetensors_cannot_hold(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"\.safetensors"):
        save_weights(network(), tmp_path / "w.pt")
    with pytest.raises(InvalidInput, match="'weight' is not a dense tensor"):
        save_weights(nn.Linear(2, 2, device="meta"), tmp_path / "w.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("crash", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("name", ["w.safetensors", "report.json"])
def test_a_crash_while_saving_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, call: str, crash: BaseException
) -> None:
    def fail(*arguments: object) -> None:
        assert len(list(tmp_path.iterdir())) == 2  # the temporary file lies beside the old one
        raise crash

    def write() -> None:
        save_weights(network(), tmp_path / name) if name.startswith("w") else save_json([1], tmp_path / name)

    (tmp_path / name).write_bytes(b"old")
    monkeypatch.setattr(os, call, fail)
    with pytest.raises(type(crash)):
        write()
    monkeypatch.undo()
    assert (tmp_path / name).read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == [name]
    write()
    assert (tmp_path / name).read_bytes() != b"old"


def test_the_flush_comes_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def recorded(name: str) -> Callable[..., None]:
        original = getattr(os, name)

        def record(*arguments: object) -> None:
            calls.append(name)
            original(*arguments)

        return record

    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, recorded(name))
    path = save_weights(network(), tmp_path / "w.safetensors")
    assert calls == ["fsync", "replace", "fsync"]  # the file, its name, and the folder that holds the name
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode  # readable by whom other files are


# Arrays


def test_arrays_are_found_by_key_alone_or_by_convention(tmp_path: Path) -> None:
    x, y, z = np.arange(6.0).reshape(2, 3), np.arange(2), np.ones(3)
    np.save(tmp_path / "a.npy", x)
    np.savez(tmp_path / "one.npz", odd_name=z)
    np.savez_compressed(tmp_path / "many.npz", z=z, y=y, x=x, x_train=x + 1)
    assert np.array_equal(load_array(tmp_path / "a.npy"), x)
    assert np.array_equal(load_array(tmp_path / "one.npz"), z)
    assert np.array_equal(load_array(tmp_path / "many.npz"), x + 1)
    assert np.array_equal(load_array(tmp_path / "many.npz", names=LABEL_NAMES), y)
    assert np.array_equal(load_array(tmp_path / "many.npz", "z"), z)


def test_keys_that_are_not_there(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.ones(2))
    np.savez(tmp_path / "many.npz", first=np.ones(2), second=np.ones(2))
    np.savez(tmp_path / "none.npz")
    with pytest.raises(InvalidInput, match="holds first, second, not x_train or x"):
        load_array(tmp_path / "many.npz")
    with pytest.raises(InvalidInput, match="holds first, second, not third"):
        load_array(tmp_path / "many.npz", "third")
    with pytest.raises(InvalidInput, match="leave the key out"):
        load_array(tmp_path / "a.npy", "x")
    with pytest.raises(EmptyInput, match="no array"):
        load_array(tmp_path / "none.npz")


def test_object_arrays_are_refused_and_not_run(tmp_path: Path) -> None:
    objects = np.array([Trap(tmp_path / "ran")], dtype=object)
    np.savez(tmp_path / "x.npz", x=objects)
    np.save(tmp_path / "x.npy", objects)
    (tmp_path / "p.npy").write_bytes(pickle.dumps(Trap(tmp_path / "ran")))
    for name in ("x.npz", "x.npy", "p.npy"):
        with pytest.raises(DamagedFile, match="unpickling"):
            load_array(tmp_path / name)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("suffix", [".npz", ".npy"])
def test_damaged_arrays(tmp_path: Path, suffix: str) -> None:
    path, rng = tmp_path / f"x{suffix}", np.random.default_rng(0)
    x = rng.normal(size=(30, 30))
    np.savez_compressed(path, x=x) if suffix == ".npz" else np.save(path, x)
    whole = path.read_bytes()
    middle = len(whole) // 2
    cuts = [whole[:length] for length in (0, 1, 5, 20, middle, len(whole) - 1)]
    flipped = [whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :]] if suffix == ".npz" else []
    for damaged in [*cuts, *flipped, rng.bytes(500)]:
        path.write_bytes(damaged)
        with pytest.raises(DamagedFile, match="damaged"):
            load_array(path)


@pytest.mark.parametrize(
    ("array", "error"),
    [
        (np.zeros((0, 784)), EmptyInput),
        (np.array([1.0, np.nan]), NonFinite),
        (np.array([1.0, np.inf], dtype=np.float16), NonFinite),
        (np.array(["a", "b"]), InvalidInput),
    ],
)
def test_arrays_that_are_no_use(tmp_path: Path, array: np.ndarray[Any, Any], error: type[Exception]) -> None:
    np.save(tmp_path / "x.npy", array)
    with pytest.raises(error, match=r"x\.npy"):
        load_array(tmp_path / "x.npy")


def test_foreign_byte_order_becomes_native(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.arange(3, dtype=">f4"))
    assert torch.equal(torch.from_numpy(load_array(tmp_path / "x.npy")), torch.arange(3.0))


# JSON


def test_json_is_valid_whatever_the_numbers(tmp_path: Path) -> None:
    data = {
        "gap": float("inf"),
        "layers": ({"nan": float("nan"), "kept": 0.5}, torch.tensor([1.0, np.nan])),
        "numpy": [np.float32(0.25), np.int64(3), np.arange(2), np.float64("-inf")],
        "name": "Löwner",
        "none": None,
        "yes": True,
    }
    path = save_json(data, tmp_path / "report.json")
    expected = {
        "gap": None,
        "layers": [{"nan": None, "kept": 0.5}, [1.0, None]],
        "numpy": [0.25, 3, [0, 1], None],
        "name": "Löwner",
        "none": None,
        "yes": True,
    }
    text = path.read_text(encoding="utf-8")
    assert json.loads(text) == expected
    assert "Löwner" in text
    assert data["gap"] == float("inf")


@pytest.mark.parametrize("data", [{"a": object()}, [1j], {(1, 2): 3}])
def test_data_without_a_json_form_is_refused_before_writing(tmp_path: Path, data: object) -> None:
    (tmp_path / "report.json").write_text("old")
    with pytest.raises(InvalidInput, match=r"report\.json"):
        save_json(data, tmp_path / "report.json")
    assert (tmp_path / "report.json").read_text() == "old"


def test_a_pipe_or_a_device_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.json"
    os.mkfifo(pipe)
    with pytest.raises(InvalidInput, match="a device or a pipe"):
        save_json({}, pipe)
    assert pipe.is_fifo()
    with pytest.raises(IsADirectoryError, match="a folder, where a file is to be written"):
        save_json({}, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["pipe.json"]


def test_a_single_number_is_no_array_of_samples(tmp_path: Path) -> None:
    np.save(tmp_path / "one.npy", np.float32(3))
    with pytest.raises(InvalidInput, match="a single number"):
        load_array(tmp_path / "one.npy")
