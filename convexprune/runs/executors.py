"""A layer to be solved with all that it takes, and who solves it: this process, other processes, or a Dask cluster.

Tasks travel as bytes that cloudpickle makes, so that classes of a script's own go along, and a tensor has the same
values and strides wherever it arrives. Results come back as they are finished.
"""

import asyncio
import contextlib
import logging
import signal
import sys
import threading
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import BrokenExecutor, CancelledError, Executor, Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, cast

import cloudpickle
import torch

from convexprune.errors import PruningFailed, WorkerLost
from convexprune.options import Options
from convexprune.runs.answer import Answer, Goal
from convexprune.runs.problem import Problem, StoppingRule
from convexprune.solvers.arrays import checked_count
from convexprune.solvers.errors import InvalidInput, MissingExtra

if TYPE_CHECKING:
    from distributed import Client

_log = logging.getLogger(__name__)
_ATTEMPTS = 3
_PATIENCE = 60  # seconds that a new worker of a cluster may take to start, where it has none left


@dataclass(frozen=True, eq=False)
class LayerTask:
    """One layer's groups, and what is wanted of them.

    Attributes:
        name: Of the layer.
        goal: What is wanted.
        problems: A group each.
        options: As for all layers.
        threads: torch's threads for it: sums are rounded in their order, so answers depend on the number.
        seconds: For all groups together, from when it is run; None: no limit.
    """

    name: str
    goal: Goal
    problems: tuple[Problem, ...]
    options: Options
    threads: int
    seconds: float | None = None

    def run(self, watch: StoppingRule | None = None) -> tuple[Answer, ...]:
        """The answers, wherever this is called; ``watch`` if it is the process that made it."""
        before = torch.get_num_threads()
        if before != self.threads:
            torch.set_num_threads(self.threads)
        try:
            return self.goal.solve(self.problems, self.options, watch or StoppingRule(self.seconds))
        finally:
            if before != self.threads:
                torch.set_num_threads(before)


Maker = Callable[[], LayerTask]
Solved = Iterator[tuple[int, tuple[Answer, ...]]]
TaskSolver = Callable[[Iterable[Maker], Callable[[LayerTask], StoppingRule]], Solved]
"""Takes makers of tasks, and who watches them; gives (number of the task, answers) as they come."""


def serially(makers: Iterable[Maker], watch: Callable[[LayerTask], StoppingRule]) -> Solved:
    """One after the other, here; each task is made when its turn comes, and let go before the next is made."""
    for number, make in enumerate(makers):
        task = make()
        yield number, task.run(watch(task))
        del task


def several(jobs: object) -> bool:
    """Whether layers are solved somewhere else than in this process.

    Raises:
        InvalidTolerance: A number that is no whole one ≥ 1.
    """
    return not isinstance(jobs, int) or checked_count("jobs", jobs) > 1


def solver_for(jobs: object) -> TaskSolver:
    """Who solves independent layers.

    Args:
        jobs: 1: this process. A larger number: so many processes, by loky. An ``Executor`` of concurrent.futures, or a
            ``distributed.Client``: its workers.

    Raises:
        InvalidTolerance, InvalidInput: It is none of these.
    """
    if not several(jobs):
        return serially
    if isinstance(jobs, int):
        return partial(_apart, _Processes(None, 2 * jobs))
    if isinstance(jobs, Executor):
        return partial(_apart, _Workers(jobs, 2 * int(getattr(jobs, "_max_workers", 2))))
    if hasattr(jobs, "get_executor"):
        return partial(_apart, _Cluster(jobs))
    raise InvalidInput(f"jobs: expected a number, an Executor of concurrent.futures or a Dask Client, found {jobs!r}")


class _Workers:
    """Those of an executor, with room for so many tasks at a time."""

    def __init__(self, executor: Executor | None, room: int) -> None:
        self.executor, self.room = executor, room

    def submit(self, packed: bytes) -> Future[bytes]:
        """Have a task solved."""
        assert self.executor is not None  # noqa: S101 - processes are started by then
        return self.executor.submit(_solve, packed)

    def stop(self) -> None:
        """End what goes on, where that is possible."""


class _Processes(_Workers):
    """Loky's, which are started when they are needed, and anew when one died."""

    def submit(self, packed: bytes) -> Future[bytes]:
        """To processes for which a terminal's Ctrl-C, which is for the parent, is nothing even while they start."""
        from joblib.externals.loky import get_reusable_executor

        handled = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT)
        self.executor = get_reusable_executor(self.room // 2, timeout=300, initializer=_ignore_interrupts)
        try:
            if handled:  # who is started meanwhile ignores it, too
                _ignore_interrupts()
            return super().submit(packed)
        finally:
            if handled:
                signal.signal(signal.SIGINT, handled)

    def stop(self) -> None:
        """Kill them."""
        if self.executor is not None:
            self.executor.shutdown(wait=True, kill_workers=True)  # type: ignore[call-arg]  # loky's own


def _ignore_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class _Cluster(_Workers):
    """Those of a Dask cluster, which may come and go."""

    def __init__(self, client: "Client") -> None:
        super().__init__(client.get_executor(pure=False), room=1)
        self.client = client

    def submit(self, packed: bytes) -> Future[bytes]:
        """Sent once, to one worker, and not kept in the scheduler's graph."""
        self.client.wait_for_workers(1, timeout=_PATIENCE)
        self.room = 2 * max(2, sum(self.client.ncores().values()))
        return super().submit(self.client.scatter(packed, hash=False))


def _apart(workers: _Workers, makers: Iterable[Maker], _watch: Callable[[LayerTask], StoppingRule]) -> Solved:
    """Solve tasks on workers: one is made when there is room for it, and made again, before others, if its worker dies.

    Yields:
        (number of the task, its answers), as they come.

    Raises:
        WorkerLost: A task was lost three times with its worker, and none was finished meanwhile.
        InvalidInput: A task cannot be pickled.
        Exception: Whatever a maker or a solve raises, as itself. No task goes on then.
    """
    rest, again, losses = enumerate(makers), deque[tuple[int, Maker]](), Counter[int]()
    running: dict[Future[bytes], tuple[int, Maker]] = {}

    def solve_again(item: tuple[int, Maker], error: BaseException) -> None:
        again.append(item)
        losses[item[0]] += 1
        found = f"{type(error).__name__}: {error}".partition("\n")[0]
        _log.warning("a worker died (%s): its layer is solved again", found)
        if losses[item[0]] == _ATTEMPTS:
            raise WorkerLost(
                f"workers died {_ATTEMPTS} times in a row before any layer was finished ({found}). One that needs more "
                "memory than there is gets killed: give workers more, use fewer jobs, or less calibration data. Layers "
                "solved before are in the run's folder, if one was given as run=, from where the same call goes on"
            ) from error

    try:
        while True:
            while len(running) < workers.room and (item := again.popleft() if again else next(rest, None)):
                packed = _packed(item[1]())
                try:
                    running[workers.submit(packed)] = item
                except _losses() as error:
                    solve_again(item, error)
            if not running:
                return
            future = next(as_completed(running))
            item = running.pop(future)
            try:
                packed = future.result()
            except _losses() as error:
                solve_again(item, error)
                continue
            result = cloudpickle.loads(packed)
            if isinstance(result, Exception):
                raise result
            losses.clear()
            yield item[0], result
    except BaseException:
        for future in running:
            future.cancel()
        workers.stop()
        raise


def _packed(task: LayerTask) -> bytes:
    try:
        return cast(bytes, cloudpickle.dumps(task))
    except Exception as error:
        raise InvalidInput(
            f"layer {task.name!r} cannot be sent to another process ({type(error).__name__}: {error}). The solver, the "
            "method and their options must be picklable, so without open files, locks or connections; or use jobs=1"
        ) from error


def _solve(packed: bytes) -> bytes:
    """In a worker: the answers, or the exception. So whatever the executor itself raises is about the workers."""
    name = None
    try:
        task: LayerTask = cloudpickle.loads(packed)
        name = task.name
        return cast(bytes, cloudpickle.dumps(task.run()))
    except Exception as raised:  # noqa: BLE001 - the caller raises it
        error: Exception = raised
        if name is None and isinstance(raised, RuntimeError | AssertionError):  # a device that is not here
            error = InvalidInput(
                f"a layer's data cannot be loaded by a worker ({raised}): use workers that have the same devices, or "
                "move the model to the CPU"
            )
        error.add_note(f"raised in a worker, by layer {name!r}:\n{traceback.format_exc()}")
    with contextlib.suppress(Exception):  # some are built from other arguments than they keep
        packed = cloudpickle.dumps(error)
        if type(cloudpickle.loads(packed)) is type(error):
            return packed
    failed = PruningFailed(f"layer {name!r}: {type(error).__name__}: {error}. The model is unchanged")
    return cast(bytes, cloudpickle.dumps(failed))


def _losses() -> tuple[type[BaseException], ...]:
    """What tells of dead workers."""
    killed = [sys.modules["distributed"].KilledWorker] if "distributed" in sys.modules else []
    return (BrokenExecutor, CancelledError, asyncio.CancelledError, OSError, *killed)  # OSError: lost connections


@contextmanager
def cluster(address: str, timeout: float = 10.0) -> Iterator[object]:
    """A client of the Dask scheduler at an address such as "tcp://host:8786", for ``jobs``.

    Raises:
        MissingExtra: distributed is not installed.
        InvalidInput: The scheduler does not answer.
    """
    try:
        from distributed import Client
        from distributed.comm import connect
        from distributed.security import Security
    except ImportError as error:
        message = 'a Dask scheduler needs the package distributed: pip install "convexprune[cluster]"'
        raise MissingExtra(message) from error

    async def kind() -> str:
        """What the server there calls itself; a ``Client`` that finds none leaves tracebacks, or waits for ever."""
        comm = await connect(address, timeout=timeout, **Security().get_connection_args("client"))
        try:
            await comm.write({"op": "identity", "reply": True})
            return str((await comm.read())["type"])
        finally:
            comm.abort()

    log = logging.getLogger("distributed")
    level = log.level
    log.setLevel(logging.CRITICAL + 1)  # what it says of each attempt is in the error
    try:
        with ThreadPoolExecutor(1) as thread:  # the caller's may have an event loop of its own
            found = thread.submit(asyncio.run, asyncio.wait_for(kind(), timeout + 1)).result()
        if found != "Scheduler":
            raise ValueError(f"it is the address of a Dask {found}")
        client = Client(address, timeout=timeout, set_as_default=False)
    except Exception as error:  # whatever listens there may answer anything
        reason = f"{type(error).__name__}: {error}".removesuffix(": ")
        raise InvalidInput(
            f"scheduler: {address!r} did not answer as a Dask scheduler within {timeout:g} s ({reason}); check the "
            "address, such as 'tcp://host:8786', and that 'dask scheduler' runs there"
        ) from error
    finally:
        log.setLevel(level)
    with client:
        yield client
