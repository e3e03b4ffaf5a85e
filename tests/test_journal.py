"""Runs on disk: what is kept is kept whole, whatever ends the process, and nothing else is ever taken for it."""

import ast
import copy
import json
import math
import multiprocessing
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from calls import prune_
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from convexprune.errors import DamagedFile, OtherRun
from convexprune.runs.fingerprints import data_fingerprint, model_fingerprint
from convexprune.runs.journal import Journal, Record, recipe_fingerprint
from convexprune.runs.layer import Fold
from convexprune.runs.records import recalled
from convexprune.solvers.errors import InvalidInput

RUN = {"model": "m", "data": "d", "recipe": {"eps": 0.1, "fit": {"*": "ball", "a": "relu-ball"}}}
GOAL = {"kind": "within", "eps": 0.1}
RECORD = Record(
    {"figures": [1.5, math.inf, -math.inf], "word": "gap ≤ tol"}, {"stored.0": torch.arange(6.0).view(2, 3)}
)


@pytest.fixture(scope="module")
def fork() -> Iterator[Callable[..., Any]]:
    """Starts children of a process that has imported everything: each is there in milliseconds, and may be killed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    try:
        context.Process(target=os.getpid).start()  # starts the server, with that path
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before

    started = []

    def start(target: Callable[..., None], *args: Any) -> "Child":
        here, there = context.Pipe()
        process = context.Process(target=_called, args=(target, there, *args))
        process.start()
        started.append(process)
        there.close()
        return Child(process, here)

    yield start
    for process in started:
        process.kill()
        process.join()


@dataclass
class Child:
    process: Any
    connection: Connection

    def hear(self, seconds: float = 60.0) -> Any:
        """What it says next; None once it is dead."""
        try:
            return self.connection.recv() if self.connection.poll(seconds) else None
        except EOFError:
            return None

    def end(self, kill: bool = False) -> int:
        if kill:
            os.kill(self.process.pid, signal.SIGKILL)
        self.process.join(60)
        self.connection.close()
        code: int = self.process.exitcode
        return code


def _called(target: Callable[..., None], connection: Connection, *args: Any) -> None:
    torch.set_num_threads(1)
    target(connection, *args)


# Entries


def test_an_entry_comes_back_as_it_was_put(tmp_path: Path) -> None:
    tensors = {
        str(dtype): torch.tensor([[0.0, -0.0, 1.5, -3.0]]).to(dtype) for dtype in (torch.bfloat16, torch.float64)
    }
    tensors["empty"] = torch.empty(0, 3)
    tensors["turned"] = torch.arange(6.0).view(2, 3).T
    with Journal(tmp_path, RUN) as journal:
        journal.put("a", GOAL, Record(RECORD.data, tensors))
        assert journal.get("a", {**GOAL, "eps": 0.2}) is None
        assert journal.get("b", GOAL) is None
    found = Journal(tmp_path, RUN).get("a", dict(reversed(GOAL.items())))
    assert found is not None
    assert [float(value) for value in found.data["figures"]] == RECORD.data["figures"]
    assert found.data["word"] == RECORD.data["word"]
    assert found.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found.tensors[name].dtype == tensor.dtype
        assert found.tensors[name].shape == tensor.shape
        assert np.array_equal(found.tensors[name].double().signbit(), tensor.double().signbit())
        assert torch.equal(found.tensors[name], tensor)


def test_names_that_no_file_could_have_are_entries_of_their_own(tmp_path: Path) -> None:
    names = ["", "a.b", "a/b", "a_b", "..", "A_B", "x" * 5000, "x" * 5001, "größe"]
    journal = Journal(tmp_path, RUN)
    for number, name in enumerate(names):
        journal.put(name, GOAL, Record({"number": number}, {}))
    assert [journal.get(name, GOAL).data["number"] for name in names] == list(range(len(names)))  # type: ignore[union-attr]
    assert sorted(record.data["layer"] for record in journal.entries()) == sorted(names)


@pytest.mark.skipif(sys.platform == "win32", reason="folders cannot be flushed there")
def test_the_folder_is_flushed_after_each_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a power failure could take the names of files away that were said to be on disk."""
    calls: list[str] = []
    flush, rename = os.fsync, os.replace

    def flushed(descriptor: int) -> None:
        calls.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        flush(descriptor)

    def renamed(*paths: Path) -> None:
        calls.append("rename")
        rename(*paths)

    journal = Journal(tmp_path, RUN)
    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "replace", renamed)
    journal.put("a", GOAL, RECORD)
    assert calls == ["file", "rename", "folder"] * 2


def test_what_killed_writes_left_behind_is_removed_and_nothing_else(tmp_path: Path) -> None:
    Journal(tmp_path, RUN).put("a", GOAL, RECORD)
    leftovers = [tmp_path / ".run.json.0123abcd.tmp", tmp_path / "layers" / ".a-0.safetensors.89abcdef.tmp"]
    others = [tmp_path / ".own.tmp", tmp_path / "layers" / "notes.tmp", tmp_path / ".x.json.0123abcdef.tmp"]
    for path in (*leftovers, *others):
        path.write_bytes(b"{")
    journal = Journal(tmp_path, RUN)
    assert not any(path.exists() for path in leftovers)
    assert all(path.exists() for path in others)
    assert journal.get("a", GOAL) is not None


# Other runs


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"model": "n"}, "another model"),
        ({"data": "e"}, r"other calibration data \(is it shuffled"),
        ({"recipe": {"eps": 0.2, "fit": RUN["recipe"]["fit"]}}, r"another recipe \(eps\)"),  # type: ignore[index]
        # The first pattern that matches counts, so their order does.
        ({"recipe": {"eps": 0.1, "fit": {"a": "relu-ball", "*": "ball"}}}, r"another recipe \(fit\)"),
        ({"model": "n", "recipe": None}, "another model and another recipe"),
    ],
)
def test_another_run_is_refused_and_leaves_the_folder_as_it_is(
    tmp_path: Path, change: Mapping[str, Any], told: str
) -> None:
    Journal(tmp_path, RUN).put("a", GOAL, RECORD)
    before = contents(tmp_path)
    with pytest.raises(OtherRun, match=told):
        Journal(tmp_path, {**RUN, **change})
    assert contents(tmp_path) == before
    assert Journal(tmp_path, RUN).get("a", GOAL) is not None


def test_entries_do_not_outlive_their_run_json(tmp_path: Path) -> None:
    """Were it deleted to get past a refusal, answers for another model would be taken for this one's."""
    Journal(tmp_path, RUN).put("a", GOAL, RECORD)
    (tmp_path / "run.json").unlink()
    with pytest.raises(DamagedFile, match="belongs to another run"):
        Journal(tmp_path, {**RUN, "model": "n"}).get("a", GOAL)


def test_a_file_where_the_folder_should_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InvalidInput, match="a file, where a folder"):
            Journal(folder, RUN)


def test_a_folder_without_a_run_has_no_journal_to_read(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no run\.json"):
        Journal.existing(tmp_path)
    assert not contents(tmp_path)


# One process at a time


def hold(connection: Connection, folder: Path) -> None:
    with Journal(folder, RUN):
        connection.send("open")
        connection.recv()
    connection.send("closed")
    connection.recv()


def test_a_second_process_is_refused_until_the_first_one_closes_or_dies(
    tmp_path: Path, fork: Callable[..., Child]
) -> None:
    for killed in (True, False):
        child = fork(hold, tmp_path)
        assert child.hear() == "open"
        with pytest.raises(OtherRun, match="another process"):
            Journal(tmp_path, RUN)
        journal, described = Journal.existing(tmp_path)  # to read is allowed
        assert (described["model"], list(journal.entries())) == ("m", [])
        if not killed:
            child.connection.send("close")
            assert child.hear() == "closed"
            Journal(tmp_path, RUN).close()
        assert child.end(kill=True) == -signal.SIGKILL
        Journal(tmp_path, RUN).close()


def test_a_process_shares_its_own_lock_so_a_failure_never_locks_out_the_next_run(tmp_path: Path) -> None:
    kept = []  # as a traceback would
    for _ in range(3):
        kept.append(Journal(tmp_path, RUN))
        kept[-1].put("a", GOAL, RECORD)
    for journal in kept:
        journal.close()
        journal.close()


# Damage


def contents(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """Each file: its inode, when it was last written, and what it holds."""
    return {
        str(path.relative_to(folder)): (path.stat().st_ino, path.stat().st_mtime_ns, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def entry(folder: Path) -> tuple[Path, Path]:
    """(its arrays, its JSON) of a folder's only entry."""
    Journal(folder, RUN).put("a", GOAL, RECORD)
    arrays, text = sorted((folder / "layers").iterdir(), key=lambda path: path.suffix, reverse=True)
    return arrays, text


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def written(content: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(content) and None


DAMAGE: dict[str, Callable[[Path], None]] = {
    "cut short": cut,
    "empty": written(b""),
    "zeros": written(bytes(500)),
    "a list": written(b"[]"),
    "a number": written(b"7"),
    "not text": written(b"\xff\xfe\x00{"),
    "too deep": written(b"[" * 100_000),
    "no JSON word": written(b'{"layer": NaN}'),
    "another object": written(b'{"layer": 3, "goal": []}'),
    "gone": Path.unlink,
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("which", ["arrays", "text"])
def test_a_damaged_entry_is_named_with_the_remedy_and_left_where_it_is(tmp_path: Path, which: str, damage: str) -> None:
    arrays, text = entry(tmp_path)
    DAMAGE[damage](arrays if which == "arrays" else text)
    before = contents(tmp_path)
    journal = Journal(tmp_path, RUN)
    if (which, damage) == ("text", "gone"):  # it is what says that the layer was solved
        assert journal.get("a", GOAL) is None
        return
    with pytest.raises(DamagedFile, match=rf"delete {text.name} to have that layer solved again") as raised:
        journal.get("a", GOAL)
    assert str(tmp_path) in str(raised.value)
    with pytest.raises(DamagedFile):
        list(journal.entries())
    assert contents(tmp_path) == before
    text.unlink()  # the remedy
    assert journal.get("a", GOAL) is None
    journal.put("a", GOAL, RECORD)
    assert journal.get("a", GOAL) is not None


@given(data=st.data())
def test_no_flipped_bit_passes_for_what_was_put(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("bits")
    path = data.draw(st.sampled_from(entry(folder)))
    content = bytearray(path.read_bytes())
    bit = data.draw(st.integers(0, 8 * len(content) - 1))
    content[bit // 8] ^= 1 << (bit % 8)
    before = json.loads(entry(folder)[1].read_bytes())
    path.write_bytes(content)
    try:
        found = Journal(folder, RUN).get("a", GOAL)
    except DamagedFile:
        return
    assert found is not None  # 1e-5 and 1E-5 are the same number
    assert found.data == before
    assert torch.equal(found.tensors["stored.0"], RECORD.tensors["stored.0"])


def test_an_entry_copied_under_the_name_of_another_layer_or_from_another_run_is_refused(tmp_path: Path) -> None:
    here, there = Journal(tmp_path / "here", RUN), Journal(tmp_path / "there", {**RUN, "model": "n"})
    for journal in (here, there):
        journal.put("a", GOAL, RECORD)
    for source, name, told in ((here, "b", "the entry of layer 'a'"), (there, "a", "belongs to another run")):
        for suffix in (".json", ".safetensors"):
            target = here.path(name, GOAL).with_suffix(suffix)
            shutil.copy(source.path("a", GOAL).with_suffix(suffix), target)
        with pytest.raises(DamagedFile, match=told):
            here.get(name, GOAL)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\x00", b'{"format": 2}', b'{"format": 2, "model": "m"}'])
def test_a_damaged_run_json_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "run.json").write_bytes(content)
    for opened in (lambda: Journal(tmp_path, RUN), lambda: Journal.existing(tmp_path)):
        with pytest.raises(DamagedFile, match=r"run\.json.*restore it"):
            opened()
    assert (tmp_path / "run.json").read_bytes() == content


def test_a_run_of_another_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"format": 1}')
    with pytest.raises(OtherRun, match="format 1, expected 2"):
        Journal(tmp_path, RUN)


# What an entry says, sealed as it should be


def network(seed: int = 0) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 3))
    return model, torch.rand(40, 6)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Record:
    folder = tmp_path_factory.mktemp("real")
    model, x = network()
    prune_(model, x, 0.3, layers="4", run=folder)
    return next(Journal.existing(folder)[0].entries())


def changed(record: Record, path: list[Any], value: Any) -> Record:
    data = copy.deepcopy(dict(record.data))
    place: Any = data
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return Record(data, record.tensors)


GROUP = ["groups", 0]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["groups"], 5),
        (["groups"], []),
        ([*GROUP], None),
        ([*GROUP, "status"], "certified, honestly"),
        ([*GROUP, "samples"], "many"),
        ([*GROUP, "samples"], 1.5),
        ([*GROUP, "nonzeros"], True),
        ([*GROUP, "radius"], "0.1"),
        ([*GROUP, "radius"], None),
        ([*GROUP, "notes"], 7),
        ([*GROUP, "solution", "status"], "great"),
        ([*GROUP, "solution", "iterations"], math.inf),
        ([*GROUP, "solution", "certificate"], []),
        ([*GROUP, "solution", "certificate", "gap"], [0.0]),
        ([*GROUP, "solution", "certificate", "infeasible"], "no"),
        ([*GROUP, "solution", "trace"], [{"iteration": 1}]),
        ([*GROUP, "solution", "shape"], [10**9, 10**9]),
        ([*GROUP, "solution", "provenance"], {}),
        ([*GROUP, "solution", "provenance", "limits", "tol"], "loose"),
    ],
)
def test_an_entry_that_says_what_cannot_be_is_damaged(real: Record, path: list[Any], value: Any) -> None:
    (answer,) = recalled(real, [Fold()])
    assert torch.equal(answer.stored, real.tensors["stored.0"])
    with pytest.raises(DamagedFile, match="layer '4'"):
        recalled(changed(real, path, value), [Fold()])


@pytest.mark.parametrize(
    "tensors",
    [
        {},
        {"stored.0": torch.zeros(6, 3, dtype=torch.int64)},
        {"stored.0": torch.zeros(3, 6)},
        {"stored.0": torch.full((6, 3), math.nan)},
        {"stored.0": torch.zeros(6, 3), "multipliers.0": torch.zeros(41, 4)},
        {"stored.0": torch.zeros(6, 3), "multipliers.0": torch.full((41, 3), math.inf)},
    ],
)
def test_arrays_that_cannot_be_those_of_the_layer_are_damaged(real: Record, tensors: dict[str, Tensor]) -> None:
    with pytest.raises(DamagedFile, match="layer '4'"):
        recalled(Record(real.data, tensors), [Fold()])


def test_damage_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model, x = network()
    prune_(copy.deepcopy(model), x, run=tmp_path)
    cut(sorted((tmp_path / "layers").glob("4-*.safetensors"))[0])
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(DamagedFile):
        prune_(model, x, run=tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_nothing_is_unpickled_and_nothing_in_a_file_names_code() -> None:
    package = Path(__file__).parents[1] / "convexprune"
    runs = ("journal", "fingerprints", "records", "answer", "results")
    for name in ("verification", *(f"runs/{name}" for name in runs)):
        tree = ast.parse((package / f"{name}.py").read_text())
        nodes = list(ast.walk(tree))
        imports = [node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]
        words = {node.id for node in nodes if isinstance(node, ast.Name)}
        words |= {ast.unparse(node) for node in nodes if isinstance(node, ast.Attribute)}
        words |= {alias.name for node in imports for alias in node.names}
        words |= {str(node.module) for node in imports if isinstance(node, ast.ImportFrom)}
        assert "collections.abc" in words  # they are found
        banned = {"pickle", "eval", "exec", "compile", "import_module", "__import__", "importlib", "marshal", "shelve"}
        assert not words & (banned | {"torch.load", "np.load", "make_solver", "globals"}), name


# Disks


def fill(connection: Connection, folder: Path, most: int) -> None:
    """Write entries until no more can be written."""
    if most:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    journal = Journal(folder, RUN)
    for number in range(1000):
        size = 300 if number < 3 else 300 * number
        try:
            journal.put(f"layer{number}", GOAL, Record({"number": number}, {"stored.0": torch.zeros(size)}))
        except OSError as error:
            connection.send((number, error.errno, str(error)))
            return
    connection.send(None)


@pytest.fixture
def tiny(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    with mounted(folder, "size=64k"):
        yield folder


class mounted:  # noqa: N801 - a context manager
    def __init__(self, folder: Path, options: str) -> None:
        self.folder, self.options = folder, options

    def __enter__(self) -> None:
        mount = ["mount", "-t", "tmpfs", "-o", self.options, "tmpfs", str(self.folder)]
        if shutil.which("mount") is None or subprocess.run(mount, check=False, capture_output=True).returncode:  # noqa: S603
            pytest.skip("no tmpfs can be mounted here")

    def __exit__(self, *_: object) -> None:
        subprocess.run(["umount", "-l", str(self.folder)], check=True)  # noqa: S603, S607


def kept_whole(folder: Path, outcome: Any) -> None:
    """All entries before the one that failed are there, and a run can go on."""
    number, _, message = outcome
    assert 3 < number < 1000
    assert f"layer{number}-" in message
    assert not list(folder.rglob("*.tmp"))
    journal = Journal.existing(folder)[0]
    assert sorted(record.data["number"] for record in journal.entries()) == list(range(number))
    assert journal.get(f"layer{number}", GOAL) is None


def test_a_full_disk_is_an_error_that_names_the_file_and_earlier_entries_are_whole(
    tiny: Path, fork: Callable[..., Child]
) -> None:
    child = fork(fill, tiny, 0)
    outcome = child.hear()
    assert child.end() == 0
    assert outcome[1] == 28  # ENOSPC
    kept_whole(tiny, outcome)


@pytest.mark.skipif(sys.platform == "win32", reason="no limits of that kind")
def test_a_file_that_cannot_grow_is_an_error_that_names_it_and_earlier_entries_are_whole(
    tmp_path: Path, fork: Callable[..., Child]
) -> None:
    child = fork(fill, tmp_path, 20_000)
    outcome = child.hear()
    assert child.end() == 0
    assert outcome[1] == 27  # EFBIG
    kept_whole(tmp_path, outcome)


def test_a_folder_that_cannot_be_written_to_is_an_error_that_names_it(tmp_path: Path) -> None:
    folder = tmp_path / "closed"
    folder.mkdir()
    if os.geteuid() == 0:
        with mounted(folder, "ro"), pytest.raises(OSError, match="closed"):
            Journal(folder, RUN)
        return
    folder.chmod(0o500)
    with pytest.raises(PermissionError, match="closed"):
        Journal(folder, RUN)


# Fingerprints


class Dilated(nn.Conv2d):
    """A user's own convolution."""

    def __init__(self, dilation: int) -> None:
        super().__init__(1, 2, 3, dilation=dilation)
        self.scales, self.word, self.flag, self._seen, self.training = (1.0, 2.0), "sum", True, 0, False


class Odd(nn.Module):
    """Tied weights, a buffer that no state dict holds, one of integers, several dtypes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.other = nn.Linear(3, 4), nn.Linear(3, 4, bias=False)
        self.tied = nn.Linear(3, 4)
        self.tied.weight = self.one.weight
        self.convolution = nn.Conv2d(1, 2, 3, stride=2)
        self.dilated = Dilated(2)
        self.norm = nn.BatchNorm2d(2)
        self.attention = nn.MultiheadAttention(4, 2)
        self.register_buffer("hidden", torch.arange(3.0), persistent=False)
        self.register_buffer("nothing", None)
        self.short = nn.Parameter(torch.ones(2, 2, dtype=torch.bfloat16))
        self.single = nn.Parameter(torch.tensor(2.0))


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


@pytest.mark.parametrize("name", sorted(tensors_of(Odd())))
def test_every_value_of_a_model_counts(name: str) -> None:
    before, model = model_fingerprint(Odd()), Odd()
    assert model_fingerprint(model) == before
    tensor = tensors_of(model)[name].data.view(-1)
    last = tensor[-1].clone()
    tensor[-1] = last + 1
    assert model_fingerprint(model) != before
    tensor[-1] = last
    assert model_fingerprint(model) == before


def wider(model: Odd) -> None:
    model.double()


def renamed(model: Odd) -> None:
    model.third = model._modules.pop("other")


def untied(model: Odd) -> None:
    model.tied.weight = nn.Parameter(model.one.weight.detach().clone())


def tied_by_memory(model: Odd) -> None:
    """The objects differ, and each change of one is a change of the other."""
    model.other.weight.data = model.one.weight.data


def swapped(model: Odd) -> None:
    model.one.bias, model.tied.bias = model.tied.bias, model.one.bias


def set_to(module: str, name: str, value: Any) -> Callable[[Odd], None]:
    return lambda model: setattr(model.get_submodule(module), name, value)


@pytest.mark.parametrize(
    "change",
    [
        wider,
        renamed,
        untied,
        tied_by_memory,
        swapped,
        set_to("", "single", nn.Parameter(torch.tensor([2.0]))),
        set_to("", "short", nn.Parameter(torch.ones(4, 1, dtype=torch.bfloat16))),
        set_to("", "short", nn.Parameter(torch.ones(2, 2, dtype=torch.float16))),
        set_to("one", "bias", None),
        set_to("convolution", "stride", (1, 1)),
        set_to("dilated", "dilation", (1, 1)),
        set_to("dilated", "scales", (1.0, 3.0)),
        set_to("dilated", "scales", [1.0, 2.0]),
        set_to("dilated", "word", "mean"),
        set_to("dilated", "flag", False),
        set_to("", "steps", 3),
        set_to("norm", "eps", 1e-3),
        set_to("attention", "num_heads", 4),
        set_to("", "norm", nn.Identity()),
        set_to("", "hidden", None),
    ],
)
def test_everything_else_about_a_model_counts(change: Callable[[Odd], None]) -> None:
    model = Odd()
    before = model_fingerprint(model)
    change(model)
    assert model_fingerprint(model) != before


def test_the_same_memory_counts_and_equal_values_in_others_do_not_stand_for_it() -> None:
    """Whether two objects or one hold it does not matter."""
    tied, again, untied = Odd(), Odd(), Odd()
    for model in (tied, again):
        model.other.weight.data = model.one.weight.data
    untied.other.weight.data = untied.one.weight.data.clone()
    assert model_fingerprint(tied) == model_fingerprint(again)
    assert model_fingerprint(tied) != model_fingerprint(untied)
    again.other.weight = again.one.weight
    assert model_fingerprint(tied) == model_fingerprint(again)
    rows = torch.randn(6, 3)
    apart, over = Odd(), Odd()
    for model, own in ((apart, rows.clone()), (over, rows)):
        model.one.weight.data, model.other.weight.data = rows[:4], own[2:]
    assert model_fingerprint(apart) != model_fingerprint(over)


def test_a_run_of_another_convolution_is_not_taken_for_this_one_s(tmp_path: Path) -> None:
    """All weights are the same; only a setting of a class of the user's own differs."""
    x, models = torch.rand(12, 1, 8, 8), []
    for dilation in (1, 2):
        torch.manual_seed(0)
        models.append(nn.Sequential(Dilated(dilation), nn.ReLU(), nn.AdaptiveAvgPool2d(2)))
    prune_(models[0], x, run=tmp_path)
    with pytest.raises(OtherRun, match="another model"):
        prune_(models[1], x, run=tmp_path)


def test_where_a_model_is_how_it_lies_in_memory_and_whether_it_trains_do_not_count() -> None:
    model = Odd()
    before = model_fingerprint(model)
    model.eval()
    model.convolution.weight.data = model.convolution.weight.data.to(memory_format=torch.channels_last)
    model.other.weight.data = model.other.weight.data.T.contiguous().T
    assert model_fingerprint(model) == model_fingerprint(copy.deepcopy(model)) == before
    if torch.cuda.is_available():
        assert model_fingerprint(model.cuda()) == before


@dataclass
class Batch:
    ids: Tensor
    names: tuple[str, ...] = ()


X = torch.arange(6.0).view(2, 3)
DIFFERENT: list[Any] = [
    [X],
    [X.double()],
    [X.view(3, 2)],
    [X, X],
    [-X],
    [X[:1], X[1:]],
    [(X,)],
    [[X]],
    [(X, 1)],
    [(X, 1.0)],
    [(X, True)],
    [(X, "1")],
    [(X, b"1")],
    [(X, None)],
    [(X, (1, 2), 3)],
    [(X, (1,), 2, 3)],
    [(X, (1, 2, 3))],
    [(X, [1, 2, 3])],
    [(X, "ab", "c")],
    [(X, "a", "bc")],
    [{"x": X}],
    [{"y": X}],
    [{"x": X, "n": 1}],
    [{"n": 1, "x": X}],
    [{"x": {"n": 1, "x": X}}],
    [{"x": X, 1: 2}],
    [{"x": X, "1": 2}],
    [Batch(X)],
    [Batch(X, ("a",))],
    [X.numpy()],
    [X.double().numpy()],
    [np.array(["a", None], dtype=object)],
    [np.array(["a", "b"], dtype=object)],
    [torch.complex(X, X)],
    [torch.complex(X, X).conj()],
    [X > 2],
    [X.to_sparse()],
    [X.to(torch.bfloat16)],
    [],
]


def test_different_data_have_different_fingerprints_and_equal_data_equal_ones() -> None:
    found = [data_fingerprint(batches) for batches in DIFFERENT]
    assert len(set(found)) == len(DIFFERENT)
    assert [data_fingerprint(copy.deepcopy(batches)) for batches in DIFFERENT] == found


@given(st.lists(st.floats(width=32), min_size=1, max_size=20), st.data())
def test_a_single_bit_of_the_data_counts(values: list[float], data: st.DataObject) -> None:
    tensor = torch.tensor(values)
    other = tensor.clone()
    bit = data.draw(st.integers(0, 31))
    other.view(torch.int32)[data.draw(st.integers(0, len(values) - 1))] ^= (1 << bit) - (1 << 32 if bit == 31 else 0)
    assert data_fingerprint([tensor]) != data_fingerprint([other])
    assert data_fingerprint([tensor]) == data_fingerprint([tensor.clone()])


def test_data_whose_content_is_not_known_are_refused() -> None:
    with pytest.raises(InvalidInput, match=r"batch 1 .* holds a object"):
        data_fingerprint([X, {"x": X, "what": object()}])


@pytest.mark.parametrize("other", [{"eps": 0.2}, {"eps": "0.1"}, {"eps": [0.1]}, {"eps": 0.1, "fit": None}, {}])
def test_everything_in_a_recipe_counts(other: dict[str, Any]) -> None:
    recipe = {"eps": 0.1}
    assert recipe_fingerprint(recipe) == recipe_fingerprint(json.loads(json.dumps(recipe)))
    assert recipe_fingerprint(recipe) != recipe_fingerprint(other)


def test_patterns_and_numbers_of_numpy_tell_recipes_apart(tmp_path: Path) -> None:
    model, x = network()
    prune_(copy.deepcopy(model), x, np.float32(0.1), run=tmp_path / "a", layers="4")
    with pytest.raises(OtherRun, match=r"another recipe \(target\)"):
        prune_(copy.deepcopy(model), x, np.float32(0.2), run=tmp_path / "a", layers="4")
    prune_(copy.deepcopy(model), x, {"4": 0.1, "*": 0.2}, run=tmp_path / "b", layers="4")
    with pytest.raises(OtherRun, match=r"another recipe \(target\)"):
        prune_(copy.deepcopy(model), x, {"*": 0.2, "4": 0.1}, run=tmp_path / "b", layers="4")


# Killed


_STEPS = {"open", "write", "flush", "fsync", "close", "replace", "unlink", "mkdir"}


def dies_at(step: int) -> None:
    """Kill this process just before its step-th call that files are read and written by."""
    left = [step]

    def watch(frame: Any, event: str, function: Any) -> None:
        source = frame.f_code.co_filename
        if event == "c_call" and function.__name__ in _STEPS and ("pathlib" in source or "/files/" in source):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(watch)


OTHER = Record({"figures": []}, {"stored.0": torch.ones(4, 1)})


def put_and_die(connection: Connection, folder: Path) -> None:
    """In copies 1, 2, … of the run in the folder, put two entries and die at step 1, 2, … until none is left."""
    step, code = 0, -1
    while code:
        step += 1
        copied = shutil.copytree(folder, folder.with_name(str(step)))
        if not (process := os.fork()):
            dies_at(step)
            journal = Journal(copied, RUN)
            journal.put("b", GOAL, RECORD)
            journal.put("a", GOAL, OTHER)
            sys.setprofile(None)
            os._exit(0)
        code = os.waitpid(process, 0)[1]
        connection.send((copied, code))
    connection.send(None)


def test_a_write_killed_at_any_step_leaves_each_entry_whole_or_absent(
    tmp_path: Path, fork: Callable[..., Child]
) -> None:
    Journal(tmp_path / "0", RUN).put("a", GOAL, RECORD)
    child, found = fork(put_and_die, tmp_path / "0"), []
    while told := child.hear():
        folder, code = told
        assert code in (0, signal.SIGKILL)
        journal = Journal(folder, RUN)
        found.append(tuple(which(journal.get(name, GOAL)) for name in "ba"))
        assert not list(folder.rglob("*.tmp"))
        journal.put("a", GOAL, RECORD)
        assert which(journal.get("a", GOAL)) == "first"
    assert child.end() == 0
    # In this order: nothing new, one entry, the other while it is replaced, both.
    assert list(dict.fromkeys(found)) == [("none", "first"), ("first", "first"), ("first", "none"), ("first", "other")]
    assert len(found) > 30  # four files, each opened, written, flushed, synced, closed, renamed, with its folder


def which(record: Record | None) -> str:
    if record is None:
        return "none"
    stored = record.tensors["stored.0"]
    assert len(record.data["figures"]) == (3 if torch.equal(stored, RECORD.tensors["stored.0"]) else 0)
    return "other" if torch.equal(stored, OTHER.tensors["stored.0"]) else "first"


def deep() -> tuple[nn.Module, Tensor]:
    """Six layers, each some 50 ms of work."""
    torch.manual_seed(0)
    widths = [16, 20, 20, 20, 20, 20, 12]
    pairs = pairwise(widths)
    layers = [module for a, b in pairs for module in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers).double(), torch.rand(200, 16, dtype=torch.float64)


def prune_in(connection: Connection, folder: Path, mode: str, step: int) -> None:
    """One attempt at a run: what is solved is told in a log beside the folder."""
    model, x = deep()
    log = os.open(f"{folder}.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    told = set()

    def solving(name: str, _: Any) -> None:
        if name not in told:
            told.add(name)
            os.write(log, f"{name}\n".encode())

    if step:
        dies_at(step)
    connection.send("ready")
    report = prune_(model, x, 0.1, mode=mode, run=folder, tol=1e-4, feas_tol=1e-5, callback=solving)
    weights = {name: value.numpy().tobytes() for name, value in model.state_dict().items()}
    connection.send((weights, without_seconds(json.loads(report.to_json()))))


def without_seconds(told: Any) -> Any:
    if isinstance(told, Mapping):
        return {key: without_seconds(value) for key, value in told.items() if key != "seconds"}
    return [without_seconds(value) for value in told] if isinstance(told, list | tuple) else told


def attempted(fork: Callable[..., Child], folder: Path, mode: str, delay: float | None, step: int) -> Any:
    """(weights, report) of one attempt; None if it was killed."""
    child = fork(prune_in, folder, mode, step)
    assert child.hear() == "ready"
    if delay is not None and not child.connection.poll(delay):
        child.end(kill=True)
        return None
    result = child.hear()
    assert child.end() == (-signal.SIGKILL if result is None else 0)
    return result


@pytest.mark.parametrize("mode", ["parallel", "cascade"])
def test_a_run_killed_again_and_again_ends_as_if_nothing_had_happened(
    tmp_path: Path, fork: Callable[..., Child], mode: str
) -> None:
    """Bit by bit the same weights and the same report, and no layer that was kept is solved again."""
    began = time.monotonic()
    expected = attempted(fork, tmp_path / "whole", mode, None, 0)
    seconds = time.monotonic() - began
    rng, kills, run = np.random.default_rng(0), 0, 0
    while kills < 8:
        run += 1
        folder, result = tmp_path / str(run), None
        while result is None:
            before, seen = entries_of(folder), len(solved_in(folder))
            step = int(rng.integers(1, 41)) if kills % 3 == 0 else 0
            result = attempted(fork, folder, mode, None if step else rng.uniform(0, 0.5 * seconds), step)
            after = entries_of(folder)
            assert {name: after.get(name) for name in before} == before
            assert not {json.loads(text)["layer"] for _, _, text in before.values()} & set(solved_in(folder)[seen:])
            kills += result is None
            assert kills < 200
        assert result == expected
        assert len(after) == 6
        assert not list(folder.rglob("*.tmp"))


def entries_of(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    return {name: held for name, held in contents(folder).items() if name.startswith("layers") and name[-5:] == ".json"}


def solved_in(folder: Path) -> list[str]:
    """The layers that a solver was started for, over all attempts."""
    log = Path(f"{folder}.log")
    return log.read_text().splitlines() if log.exists() else []


def test_the_arrays_of_an_entry_are_plain_safetensors(tmp_path: Path) -> None:
    arrays, _ = entry(tmp_path)
    assert arrays.read_bytes() == save_tensors(dict(RECORD.tensors))
