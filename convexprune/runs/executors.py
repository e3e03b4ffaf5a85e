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
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, CancelledError, Executor, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Protocol, cast

import cloudpickle
import torch

from convexprune.errors import PruningFailed, WorkerLost
from convexprune.options import Options
from convexprune.runs.answer import Answer, Goal
from convexprune.runs.problem import Problem, StoppingRule
from convexprune.solvers.arrays import checked_count
from convexprune.solvers.errors import InvalidInput, MissingExtra

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


class TaskSolver(Protocol):
    """Takes makers of tasks and gives (number of the task, answers) as they come."""

    def __call__(self, makers: Iterable[Maker], watch: Callable[[LayerTask], StoppingRule], /) -> Solved:
        """Solve."""
        ...


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
    if not isinstance(jobs, int | Executor) and not _is_client(jobs):
        raise InvalidInput(
            f"jobs: expected a number, an Executor of concurrent.futures or a Dask Client, found {jobs!r}"
        )
    return partial(_apart, jobs)


class _Gone(Exception):
    """All workers are; the cause says why."""


@contextmanager
def _about_workers() -> Iterator[None]:
    """What is raised in here is about workers; of makers and solves the same exceptions come out as themselves."""
    try:
        yield
    except _losses() as error:
        raise _Gone from error


def _apart(jobs: object, makers: Iterable[Maker], _watch: Callable[[LayerTask], StoppingRule]) -> Solved:
    """Solve tasks on workers: one is made when there is room for it, and made again, before others, if its worker dies.

    Yields:
        (number of the task, its answers), as they come.

    Raises:
        WorkerLost: A task was lost three times with its worker, and none was finished meanwhile.
        InvalidInput: A task cannot be pickled.
        Exception: Whatever a maker or a solve raises, as itself. No task goes on then.
    """
    rest, again, losses = enumerate(makers), deque[tuple[int, Maker]](), Counter[int]()
    while True:  # each time with new workers
        workers, running, item = None, dict[Future[bytes], tuple[int, Maker]](), None
        try:
            with _about_workers():
                workers = _workers(jobs)
            while True:
                while len(running) < workers.room and (item := again.popleft() if again else next(rest, None)):
                    packed = _packed(item[1]())
                    with _about_workers():
                        running[workers.executor.submit(_solve, cast(bytes, workers.send(packed)))] = item
                if not running:
                    return
                for future in wait(list(running), return_when=FIRST_COMPLETED).done:
                    item = running.pop(future)
                    try:
                        result = cloudpickle.loads(future.result())
                    except BrokenExecutor as error:
                        raise _Gone from error
                    except _losses() as error:
                        again.append(item)
                        _count_losses(losses, [item[0]], error)
                        continue
                    if isinstance(result, Exception):
                        raise result
                    losses.clear()
                    number, item = item[0], None
                    yield number, result
        except BaseException as error:
            for future in running:
                future.cancel()
            if workers is not None and workers.stop is not None:
                workers.stop()
            if not isinstance(error, _Gone):
                raise
            lost = dict(running.values()) | ({} if item is None else {item[0]: item[1]})
            again.extend((number, lost[number]) for number in sorted(lost))
            _count_losses(losses, list(lost) or [-1], error.__cause__)  # -1: no worker could be had


def _count_losses(losses: Counter[int], numbers: Sequence[int], error: BaseException | None) -> None:
    """Tasks that were lost with their workers, by number, since one was last finished.

    Raises:
        WorkerLost: That happened too often.
    """
    losses.update(numbers)
    found = f"{type(error).__name__}: {error}".partition("\n")[0]
    _log.warning("workers died (%s); layers to be solved again: %d", found, len([n for n in numbers if n >= 0]))
    if max(losses.values()) == _ATTEMPTS:
        raise WorkerLost(
            f"workers died {_ATTEMPTS} times in a row before any layer was finished ({found}). One that needs more "
            "memory than there is gets killed: give workers more, use fewer jobs, or less calibration data. Layers "
            "solved before are in the run's folder, if one was given as run=, from where the same call goes on"
        ) from error


@dataclass(frozen=True, eq=False)
class _Workers:
    """Workers behind one executor, with room for so many tasks; ``send`` ships a task's bytes, ``stop`` ends all."""

    executor: Executor
    room: int
    send: Callable[[bytes], object] = bytes
    stop: Callable[[], object] | None = None


class _Client(Protocol):
    """What is used of ``distributed.Client``."""

    def wait_for_workers(self, n_workers: int, timeout: float) -> object: ...
    def ncores(self) -> dict[str, int]: ...
    def scatter(self, data: bytes, hash: bool) -> object: ...  # noqa: A002 - Dask's word
    def get_executor(self, **options: object) -> Executor: ...


def _is_client(jobs: object) -> bool:
    return all(hasattr(jobs, name) for name in ("wait_for_workers", "ncores", "scatter", "get_executor"))


def _workers(jobs: object) -> _Workers:
    if isinstance(jobs, int):
        executor = _started(jobs)
        shutdown = cast(Callable[..., object], executor.shutdown)  # loky's takes more than the standard library's
        return _Workers(executor, 2 * jobs, stop=partial(shutdown, wait=True, kill_workers=True))
    if isinstance(jobs, Executor):
        return _Workers(jobs, 2 * int(getattr(jobs, "_max_workers", 2)))
    client = cast(_Client, jobs)
    client.wait_for_workers(1, timeout=_PATIENCE)
    room = 2 * max(2, sum(client.ncores().values()))
    # Scattered: sent once, to one worker, and not kept in the scheduler's graph.
    return _Workers(client.get_executor(pure=False), room, partial(client.scatter, hash=False))


def _started(jobs: int) -> Executor:
    """Processes of loky's, for which a terminal's Ctrl-C, which is for the parent, is nothing even while they start."""
    from joblib.externals.loky import get_reusable_executor

    executor: Executor = get_reusable_executor(jobs, timeout=300, initializer=_ignore_interrupts)
    handled = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT)
    try:
        if handled:  # who is started meanwhile ignores it, too
            _ignore_interrupts()
        executor.submit(int)
    finally:
        if handled:
            signal.signal(signal.SIGINT, handled)
    return executor


def _ignore_interrupts() -> None:
    """A terminal's Ctrl-C is for the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


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
    name = "?"
    try:
        try:
            task: LayerTask = cloudpickle.loads(packed)
        except (RuntimeError, AssertionError) as error:  # a device that is not here
            raise InvalidInput(
                f"a layer's data cannot be loaded by a worker ({error}): use workers that have the same devices, or "
                "move the model to the CPU"
            ) from error
        name = task.name
        return cast(bytes, cloudpickle.dumps(task.run()))
    except Exception as error:  # noqa: BLE001 - the caller raises it
        error.add_note(f"raised in a worker, by layer {name!r}:\n{''.join(traceback.format_tb(error.__traceback__))}")
        with contextlib.suppress(Exception):  # some are built from other arguments than they keep
            packed = cloudpickle.dumps(error)
            if type(cloudpickle.loads(packed)) is type(error):
                return packed
        failed = PruningFailed(f"layer {name!r}: {type(error).__name__}: {error}. The model is unchanged")
        return cast(bytes, cloudpickle.dumps(failed))


def _losses() -> tuple[type[BaseException], ...]:
    """What tells of dead workers."""
    found = (BrokenExecutor, CancelledError, asyncio.CancelledError, TimeoutError)
    if "distributed" not in sys.modules:
        return found
    from distributed import KilledWorker
    from distributed.comm import CommClosedError

    return (*found, KilledWorker, CommClosedError)


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
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(1) as thread:  # the caller's may have an event loop of its own
            found = thread.submit(asyncio.run, asyncio.wait_for(kind(), timeout + 1)).result()
        if found == "Scheduler":
            client = Client(address, timeout=timeout, set_as_default=False)
    except Exception as error:  # whatever listens there may answer anything
        reason = f"{type(error).__name__}: {error}".removesuffix(": ")
        raise InvalidInput(
            f"scheduler: {address!r} did not answer as a Dask scheduler within {timeout:g} s ({reason}); check the "
            "address, such as 'tcp://host:8786', and that 'dask scheduler' runs there"
        ) from error
    finally:
        log.setLevel(level)
    if found != "Scheduler":
        raise InvalidInput(f"scheduler: {address!r} is the address of a Dask {found}; give that of its scheduler")
    with client:
        yield client
