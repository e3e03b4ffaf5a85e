"""Independent layers in processes and on clusters: the answers of one process, bit by bit, whoever dies on the way."""

import copy
import gc
import importlib.util
import logging
import os
import signal
import socket
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, Executor, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pytest
import torch
from calls import prune_
from joblib.externals.loky import get_reusable_executor
from torch import Tensor, nn

from convexprune.errors import PruningFailed, WorkerLost
from convexprune.options import Options
from convexprune.pruners.tolerance import Within
from convexprune.runs import executors
from convexprune.runs.executors import LayerTask, cluster, serially, solver_for
from convexprune.runs.fits import FITS
from convexprune.runs.layer import Fold
from convexprune.runs.problem import Problem, StoppingRule
from convexprune.solvers.errors import InvalidInput, InvalidTolerance, MissingExtra, NonFinite
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


def assert_same(one: Made, other: Made, jobs: Any = 2, **options: Any) -> None:
    """That these jobs give ``other`` what one process gives ``one``."""
    want = prune_(*one, mode="parallel", **{name: value for name, value in options.items() if name != "run"})
    got = prune_(*other, mode="parallel", jobs=jobs, **options)
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


def tasks(count: int, made: list[Any]) -> Iterator[Callable[[], LayerTask]]:
    """Makers that note a reference to what they make."""

    def make(number: int) -> LayerTask:
        X = np.random.default_rng(number).random((30, 5))
        made.append(weakref.ref(X))
        W = torch.ones(5, 2, dtype=torch.float64)
        data = torch.from_numpy(X)
        problem = Problem(str(number), data, data @ W, W, Fold(), False, FITS["ball"], 30)
        return LayerTask(str(number), Within(0.1), (problem,), Options(mode="parallel").checked(), 1)

    for number in range(count):
        yield lambda number=number: make(number)


def watching(_: LayerTask) -> StoppingRule:
    return StoppingRule()


@pytest.mark.parametrize(("make", "threads"), [(mlp, 1), (convolutions, 2), (half, 1)])
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


def test_any_executor_of_the_standard_library_gives_the_same() -> None:
    with ThreadPoolExecutor(2) as threads:
        assert_same(mlp(), mlp(), threads, sparsity=0.7)


@pytest.mark.parametrize("backend", ["loky", "threads"])
def test_tasks_are_made_when_there_is_room_and_let_go_when_answered(backend: str) -> None:
    made: list[Any] = []
    want = dict(serially(tasks(12, []), watching))
    answered = 0
    with ThreadPoolExecutor(2) as threads:
        for number, (answer,) in solver_for(2 if backend == "loky" else threads)(tasks(12, made), watching):
            assert torch.equal(answer.stored, want[number][0].stored)
            answered += 1
            assert len(made) - answered <= 4
            assert not any(reference() is not None for reference in made)  # they travel as bytes
    assert answered == 12
    assert not any(reference() is not None for reference in made)


def test_layers_of_a_worker_that_died_are_solved_again(tmp_path: Path) -> None:
    marker = tmp_path / "killed"
    deadly = solver(killer((17, 8), once(marker), os.getpid()))
    assert_same(mlp(), mlp(), solver=deadly, run=tmp_path / "run")
    assert marker.exists()


def test_workers_that_die_always_end_the_run_and_what_was_solved_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executors, "_ATTEMPTS", 2)  # each takes seconds to start processes
    entries = tmp_path / "layers"

    def kept() -> bool:
        while len(list(entries.glob("*.json"))) < 2:
            time.sleep(0.01)
        return False

    model, x = mlp()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(WorkerLost, match=r"2 times in a row.*memory"):
        prune_(model, x, solver=solver(killer((9, 4), kept, os.getpid())), run=tmp_path, jobs=2)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert sorted(path.name[0] for path in entries.glob("*.json")) == ["0", "2"]


def test_an_executor_whose_workers_died_is_said_to_have_lost_them() -> None:
    class Broken(Executor):
        def submit(self, *_: Any, **__: Any) -> Any:
            raise BrokenExecutor("a process died")

    with pytest.raises(WorkerLost, match="a process died"):
        prune_(*mlp(), jobs=Broken())


def test_an_interrupt_of_the_terminal_is_for_the_parent_alone() -> None:
    """From when processes are started on, for importing torch takes them seconds."""
    handler = signal.getsignal(signal.SIGINT)
    workers = executors._Processes(None, 4)
    workers.submit(b"")
    assert signal.getsignal(signal.SIGINT) is handler
    assert workers.executor is not None
    assert workers.executor.submit(signal.getsignal, signal.SIGINT).result() is signal.SIG_IGN


@needs_dask
def test_a_cluster_gives_the_same_though_a_worker_is_killed(scheduler: str, tmp_path: Path) -> None:
    deadly = solver(killer((17, 8), once(tmp_path / "killed"), os.getpid()))
    with cluster(scheduler) as client:
        assert_same(mlp(), mlp(), client, solver=deadly)
        assert (tmp_path / "killed").exists()
        assert_same(convolutions(), convolutions(), client)


@needs_dask
def test_a_cluster_is_sent_each_layer_once(scheduler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with cluster(scheduler) as client:
        sent, scatter = [], client.scatter
        monkeypatch.setattr(client, "scatter", lambda data, **how: sent.append(len(data)) or scatter(data, **how))
        model, x = mlp()
        prune_(model, torch.cat([x] * 20), jobs=client)
        assert len(sent) == 3
        assert max(sent) < 1.1 * 4 * len(x) * 20 * (17 + 16) + 20_000  # inputs and targets of the widest layer


@needs_dask
def test_what_a_solve_raises_on_a_cluster_comes_out_as_itself(scheduler: str) -> None:
    def act(program: Any) -> None:
        raise NonFinite("as itself")

    with cluster(scheduler) as client, pytest.raises(NonFinite, match="as itself"):
        prune_(*mlp(), solver=solver(act), jobs=client)


@needs_dask
def test_a_scheduler_that_does_not_answer_is_named() -> None:
    with pytest.raises(InvalidInput, match=r"tcp://127\.0\.0\.1:9"), cluster("tcp://127.0.0.1:9", timeout=0.3):
        pass


@contextmanager
def answering(content: bytes | None) -> Iterator[str]:
    """The address of something that listens, and says this, or nothing, to whoever connects."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            with suppress(OSError), ExitStack() as held:
                while True:
                    connection = held.enter_context(server.accept()[0])
                    if content is not None:
                        connection.sendall(content)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"tcp://127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)  # closing alone would not end accept
        thread.join()


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
    with pytest.raises(MissingExtra, match=r"convexprune\[cluster\]"), cluster("tcp://127.0.0.1:9"):
        pass


def test_an_exception_of_a_maker_comes_out_as_itself() -> None:
    def bad() -> LayerTask:
        raise error

    error, made = TimeoutError("of the data, not of a worker"), []
    with ThreadPoolExecutor(2) as threads, pytest.raises(TimeoutError) as raised:
        list(solver_for(threads)([*tasks(3, made), bad, *tasks(3, made)], watching))
    assert raised.value is error
    assert len(made) == 3


def test_whoever_asks_for_no_more_ends_it_in_silence() -> None:
    made: list[Any] = []
    with ThreadPoolExecutor(2) as threads:
        answers = solver_for(threads)(tasks(12, made), watching)
        next(answers)
        answers.close()
        assert len(made) == 4
        assert len(list(solver_for(threads)(tasks(3, made), watching))) == 3


@pytest.mark.parametrize("kind", [NonFinite, TimeoutError])
def test_an_exception_of_a_solve_comes_out_as_itself_and_says_where(kind: type[Exception]) -> None:
    def act(program: Any) -> None:
        raise kind("as itself")

    model, x = mlp()
    before = copy.deepcopy(model.state_dict())
    with ThreadPoolExecutor(2) as threads, pytest.raises(kind, match="as itself") as raised:
        prune_(model, x, solver=solver(act), jobs=threads)
    assert "in act" in "".join(raised.value.__notes__)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_an_exception_that_cannot_travel_is_told() -> None:
    def act(program: Any) -> None:
        raise Stuck("here")

    with ThreadPoolExecutor(2) as threads, pytest.raises(PruningFailed, match="Stuck: here"):
        prune_(*mlp(), solver=solver(act), jobs=threads)


def test_a_solver_that_cannot_travel_is_refused() -> None:
    lock = threading.Lock()
    with ThreadPoolExecutor(2) as threads, pytest.raises(InvalidInput, match=r"layer '0' cannot be sent.*jobs=1"):
        prune_(*mlp(), solver=solver(lambda program: lock.acquire()), jobs=threads)


def test_jobs_are_for_layers_that_do_not_wait() -> None:
    assert solver_for(1) is serially
    with pytest.raises(InvalidInput, match="jobs: expected 1 in cascade"):
        prune_(*mlp(), mode="cascade", jobs=2)
    with pytest.raises(InvalidTolerance, match="jobs"):
        prune_(*mlp(), jobs=0)
    with pytest.raises(InvalidInput, match="an Executor of concurrent"):
        prune_(*mlp(), jobs="two")


def test_tensors_arrive_as_they_lay() -> None:
    """Else sums would be added up in another order there."""
    X = torch.rand(7, 6).mT[::2]
    here = Problem("a", X, X @ torch.ones(7, 2), torch.ones(2, 7).to(torch.bfloat16).mT, Fold(), False, FITS["ball"], 3)
    there = cloudpickle.loads(cloudpickle.dumps(here))
    for name in ("X", "Y", "stored"):
        one, other = getattr(here, name), getattr(there, name)
        assert torch.equal(one, other)
        assert (one.dtype, one.stride()) == (other.dtype, other.stride())
