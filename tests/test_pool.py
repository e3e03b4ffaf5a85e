"""Independent layers in processes and on clusters: the answers of one process, bit by bit, whoever dies on the way."""

import copy
import gc
import importlib.util
import logging
import os
import pickle
import signal
import socket
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from joblib import parallel_config
from joblib.externals.loky import get_reusable_executor
from torch import Tensor, nn

from convexprune import prune_
from convexprune.errors import PruningFailed, WorkerLost
from convexprune.nettrim.folding import Fold
from convexprune.nettrim.goals import Within
from convexprune.nettrim.packing import packed
from convexprune.nettrim.pool import apart, cluster
from convexprune.nettrim.posed import How, Posed
from convexprune.nettrim.tasks import Task, executor, serially
from convexprune.solvers.errors import ConvexPruneError, InvalidInput, MissingExtra, NonFinite
from convexprune.solvers.methods.registry import make_solver

Made = tuple[nn.Module, Tensor]

needs_dask = pytest.mark.skipif(importlib.util.find_spec("distributed") is None, reason="distributed is not installed")


def mlp() -> Made:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
    return model, torch.rand(90, 12)


def convolutions() -> Made:
    torch.manual_seed(0)
    grouped = nn.Conv2d(6, 4, 3, padding="same", groups=2, bias=False)
    first = nn.Conv2d(2, 6, 3, stride=2, padding=1)
    return nn.Sequential(first, nn.ReLU(), grouped, nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)), torch.rand(12, 2, 8, 8)


def half() -> Made:
    model, x = mlp()
    return model.bfloat16(), x.bfloat16()


@pytest.fixture(scope="module", autouse=True)
def processes() -> Iterator[None]:
    """joblib keeps its processes for the next call; the last test lets them go."""
    yield
    get_reusable_executor().shutdown(wait=True, kill_workers=True)


@pytest.fixture(scope="module")
def scheduler() -> Iterator[str]:
    """The address of a cluster of two processes on this machine."""
    distributed = pytest.importorskip("distributed")
    own = {"processes": True, "n_workers": 2, "threads_per_worker": 1, "host": "127.0.0.1"}
    with distributed.LocalCluster(dashboard_address=None, silence_logs=logging.CRITICAL, **own) as made:
        yield made.scheduler_address


def untimed(value: Any) -> Any:
    """Plain data without the seconds."""
    if isinstance(value, dict):
        return {key: untimed(item) for key, item in value.items() if key != "seconds"}
    return [untimed(item) for item in value] if isinstance(value, list) else value


def assert_same(one: Made, other: Made, **options: Any) -> None:
    """That ``jobs=2`` gives ``other`` what one process gives ``one``."""
    want = prune_(*one, mode="parallel", **{name: value for name, value in options.items() if name != "run"})
    got = prune_(*other, mode="parallel", jobs=2, **options)
    assert untimed(got.to_dict()) == untimed(want.to_dict())
    assert want.nonzeros < sum(p.numel() for p in one[0].parameters())
    for a, b in zip(one[0].parameters(), other[0].parameters(), strict=True):
        assert torch.equal(a, b)


class Stuck(Exception):
    """An exception that cannot be pickled."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.lock = threading.Lock()


def solver(act: Callable[[Any], None]) -> Any:
    """ADMM that does something else first; a class of this test's own, as a user's in a notebook."""

    @dataclass(frozen=True)
    class Acts:
        def refuses(self, program: Any) -> None:
            return None

        def run(self, program: Any, *rest: Any) -> Any:
            act(program)
            return make_solver("admm", {})[1].run(program, *rest)

    return Acts()


def killer(shape: tuple[int, int], until: Callable[[], bool], parent: int) -> Callable[[Any], None]:
    """Kills its process at programs of this shape, as the kernel does when memory runs out, until told otherwise."""

    def act(program: Any) -> None:
        if tuple(program.shape) == shape and os.getpid() != parent and not until():
            os.kill(os.getpid(), signal.SIGKILL)

    return act


def once(marker: Path) -> Callable[[], bool]:
    def until() -> bool:
        known = marker.exists()
        marker.touch()
        return known

    return until


def tasks(count: int, made: list[Any]) -> Iterator[Callable[[], Task]]:
    """Makers that note a reference to what they make."""

    def make(number: int) -> Task:
        X = np.random.default_rng(number).random((30, 5))
        made.append(weakref.ref(X))
        W = torch.ones(5, 2, dtype=torch.float64)
        data = torch.from_numpy(X)
        posed = Posed(data, data @ W, W, Fold(), False, "ball", 30)
        return Task(str(number), Within(0.1), (posed,), How(), 1)

    for number in range(count):
        yield lambda number=number: make(number)


def alive(made: list[Any]) -> int:
    return sum(ref() is not None for ref in made)


@pytest.mark.parametrize(("make", "threads"), [(mlp, 2), (convolutions, 1), (half, 1)])
def test_two_processes_give_what_one_gives(make: Callable[[], Made], threads: int) -> None:
    torch.set_num_threads(threads)
    try:
        assert_same(make(), make())
    finally:
        torch.set_num_threads(1)


def test_two_processes_keep_a_run_that_one_process_goes_on_with(tmp_path: Path) -> None:
    assert_same(mlp(), mlp(), run=tmp_path)
    again, seen = mlp(), []
    report = prune_(*again, run=tmp_path, callback=lambda name, point: seen.append(name))
    assert not seen  # everything was in the folder
    assert [row.name for row in report.layers] == ["0", "2", "4"]


@pytest.mark.parametrize("backend", ["threading", "sequential"])
def test_joblibs_other_backends_give_the_same(backend: str) -> None:
    with parallel_config(backend):
        assert_same(mlp(), mlp(), sparsity=0.7)


def test_a_backend_that_cannot_tell_of_dead_workers_is_refused() -> None:
    with parallel_config("multiprocessing"), pytest.raises(InvalidInput, match="expected 'loky'"):
        prune_(*mlp(), jobs=2)


@pytest.mark.parametrize("backend", ["loky", "threading"])
def test_tasks_are_made_when_there_is_room_and_let_go_when_answered(backend: str) -> None:
    made: list[Any] = []
    want = dict(serially(tasks(12, [])))
    answered = most = 0
    with parallel_config(backend):
        for number, (answer,) in apart(tasks(12, made), jobs=2):
            assert torch.equal(answer.stored, want[number][0].stored)
            answered += 1
            most = max(most, alive(made))
            assert len(made) - answered <= 4
    assert answered == 12
    assert 2 <= most <= 5  # those just answered may still be on their way out
    end = time.monotonic() + 30
    while alive(made) and time.monotonic() < end:  # nobody waits for a thread that has answered to let go of its task
        time.sleep(0.01)
    assert alive(made) == 0


def test_layers_of_a_worker_that_died_are_solved_again(tmp_path: Path) -> None:
    marker = tmp_path / "killed"
    deadly = solver(killer((17, 8), once(marker), os.getpid()))
    assert_same(mlp(), mlp(), solver=deadly, run=tmp_path / "run")
    assert marker.exists()


def test_workers_that_die_always_end_the_run_and_what_was_solved_is_kept(tmp_path: Path) -> None:
    entries = tmp_path / "layers"

    def kept() -> bool:
        while len(list(entries.glob("*.json"))) < 2:
            time.sleep(0.01)
        return False

    model, x = mlp()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(WorkerLost, match=r"3 times in a row.*memory"):
        prune_(model, x, solver=solver(killer((9, 4), kept, os.getpid())), run=tmp_path, jobs=2)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert sorted(path.name[0] for path in entries.glob("*.json")) == ["0", "2"]


@needs_dask
def test_a_cluster_gives_the_same_though_a_worker_is_killed(scheduler: str, tmp_path: Path) -> None:
    deadly = solver(killer((17, 8), once(tmp_path / "killed"), os.getpid()))
    with cluster(scheduler) as cores:
        assert cores == 2
        assert_same(mlp(), mlp(), solver=deadly)
        assert (tmp_path / "killed").exists()
        assert_same(convolutions(), convolutions())


@needs_dask
def test_what_a_solve_raises_on_a_cluster_comes_out_as_itself(scheduler: str) -> None:
    def act(program: Any) -> None:
        raise NonFinite("as itself")

    with cluster(scheduler), pytest.raises(NonFinite, match="as itself"):
        prune_(*mlp(), solver=solver(act), jobs=2)


@needs_dask
def test_a_scheduler_that_does_not_answer_is_named() -> None:
    with pytest.raises(InvalidInput, match=r"tcp://127\.0\.0\.1:9"), cluster("tcp://127.0.0.1:9", timeout=0.3):
        pass


@contextmanager
def answering(content: bytes | None) -> Iterator[str]:
    """The address of something that listens, and says this, or nothing, to whoever connects."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            with suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    if content is not None:
                        connection.sendall(content)

        threading.Thread(target=serve, daemon=True).start()
        yield f"tcp://127.0.0.1:{server.getsockname()[1]}"


@needs_dask
@pytest.mark.parametrize("content", [None, b"SSH-2.0-OpenSSH_9.6\r\n" * 9, b"HTTP/1.1 400 Bad Request\r\n\r\n"])
def test_something_else_that_listens_is_one_error(content: bytes | None, capfd: pytest.CaptureFixture[str]) -> None:
    refused = pytest.raises(InvalidInput, match="did not answer as a Dask scheduler")
    with answering(content) as address, refused, cluster(address, timeout=0.5):
        pass
    gc.collect()
    assert capfd.readouterr() == ("", "")


@needs_dask
@pytest.mark.parametrize(
    "address", ["", "nonsense", "tcp://127.0.0.1", "foo://127.0.0.1:1", "tls://127.0.0.1:1", "tcp://127.0.0.1:99999999"]
)
def test_an_address_that_is_none_is_one_error(address: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InvalidInput, match="did not answer as a Dask scheduler"), cluster(address, timeout=0.3):
        pass
    gc.collect()  # a client that was made in vain says so when it goes
    assert capfd.readouterr() == ("", "")


def test_a_cluster_needs_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with cluster(None) as cores:
        assert cores == 1
    with pytest.raises(MissingExtra, match=r"convexprune\[cluster\]"), cluster("tcp://127.0.0.1:9"):
        pass


def test_an_exception_of_a_maker_comes_out_as_itself() -> None:
    def bad() -> Task:
        raise error

    error, made = TimeoutError("of the data, not of a worker"), []
    with parallel_config("threading"), pytest.raises(TimeoutError) as raised:
        list(apart([*tasks(3, made), bad, *tasks(3, made)], jobs=2))
    assert raised.value is error
    assert len(made) == 3


def test_whoever_asks_for_no_more_ends_it_in_silence() -> None:
    made: list[Any] = []
    with parallel_config("threading"):
        answers = apart(tasks(12, made), jobs=2)
        next(answers)
        answers.close()
        assert len(made) == 4
        assert len(list(apart(tasks(3, made), jobs=2))) == 3


def test_an_exception_of_a_solve_comes_out_as_itself_and_says_where() -> None:
    def act(program: Any) -> None:
        raise NonFinite("as itself")

    model, x = mlp()
    before = copy.deepcopy(model.state_dict())
    with parallel_config("threading"), pytest.raises(NonFinite, match="as itself") as raised:
        prune_(model, x, solver=solver(act), jobs=2)
    assert "in act" in "".join(raised.value.__notes__)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_an_exception_that_cannot_travel_is_told() -> None:
    def act(program: Any) -> None:
        raise Stuck("here")

    with parallel_config("threading"), pytest.raises(PruningFailed, match="Stuck: here"):
        prune_(*mlp(), solver=solver(act), jobs=2)


def test_a_solver_that_cannot_travel_is_refused() -> None:
    lock = threading.Lock()
    with parallel_config("threading"), pytest.raises(InvalidInput, match=r"layer '0' cannot be sent.*jobs=1"):
        prune_(*mlp(), solver=solver(lambda program: lock.acquire()), jobs=2)


def test_jobs_are_for_layers_that_do_not_wait() -> None:
    assert executor(1, cascade=True) is serially
    with pytest.raises(InvalidInput, match="cascade"):
        executor(2, cascade=True)
    with pytest.raises(ConvexPruneError, match="jobs"):
        executor(0, cascade=False)


@given(
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool]),
    st.lists(st.integers(0, 4), max_size=3),
    st.booleans(),
    st.integers(1, 3),
)
def test_tensors_arrive_as_they_lay(dtype: torch.dtype, shape: list[int], turned: bool, step: int) -> None:
    tensor = (torch.rand(shape) * 8).to(dtype)
    tensor = tensor.mT if turned and tensor.dim() > 1 else tensor
    tensor = tensor[::step] if tensor.dim() else tensor
    sent = pickle.loads(pickle.dumps(packed({"one": tensor, "same": tensor, "other": [3, "x"]})))  # noqa: S301 - ours
    there = sent.opened()
    assert torch.equal(there["one"], tensor)
    assert (there["one"].dtype, there["one"].stride()) == (dtype, tensor.stride())
    assert there["same"] is there["one"]
    assert there["other"] == [3, "x"]
    assert sys.getsizeof(sent) >= tensor.numel() * tensor.element_size()
