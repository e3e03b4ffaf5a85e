"""Independent layers in several processes or on several machines, through joblib."""

import asyncio
import logging
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

from joblib import parallel_config

from convexprune.errors import PruningFailed, WorkerLost
from convexprune.nettrim.goals import Answer
from convexprune.nettrim.packing import Parcel, packed
from convexprune.nettrim.tasks import Task
from convexprune.nettrim.workers import Lost, Workers, count_workers
from convexprune.solvers.errors import InvalidInput, MissingExtra

_log = logging.getLogger(__name__)
_ATTEMPTS = 3

Maker = Callable[[], Task]


def apart(makers: Iterable[Maker], jobs: int) -> Iterator[tuple[int, tuple[Answer, ...]]]:
    """Solve up to ``jobs`` tasks at a time with the workers of joblib's active backend.

    A task is made when there is room for it, at most 2·jobs are alive at a time, and made again if its worker dies.

    Args:
        makers: Of tasks that do not depend on each other; called in this thread.
        jobs: How many to solve at a time, at least 2.

    Yields:
        (number of the task, its answers), as they come.

    Raises:
        WorkerLost: A task was lost three times with its worker, and none was finished meanwhile.
        InvalidInput: The solver cannot be pickled, or joblib's backend cannot give results as they come.
        Exception: Whatever a maker or a solve raises, as itself. No task goes on then.
    """
    queue = _Queue(makers)
    while True:
        try:
            yield from _attempt(queue, jobs)
            return
        except Lost as error:  # all workers are gone: the next attempt has new ones
            queue.lose(None, error)


@contextmanager
def cluster(address: str | None, timeout: float = 10.0) -> Iterator[int]:
    """Inside, independent layers are solved by the workers of a Dask scheduler.

    Args:
        address: Of the scheduler, "tcp://host:8786"; None: everything stays as it is.
        timeout: Seconds to wait for it.

    Yields:
        The threads of all its workers, a number for ``jobs``; 1 without an address.

    Raises:
        MissingExtra: distributed is not installed.
        InvalidInput: The scheduler does not answer.
    """
    if address is None:
        yield 1
        return
    try:
        from distributed import Client
    except ImportError as error:
        message = 'a Dask scheduler needs the package distributed: pip install "convexprune[cluster]"'
        raise MissingExtra(message) from error
    _check_scheduler(address, timeout)
    try:
        client = Client(address, timeout=timeout, set_as_default=False)
    except (OSError, ValueError) as error:  # timeouts are OSErrors
        raise _silent(address, timeout, error) from error
    with client, parallel_config("dask", client=client):
        yield sum(client.ncores().values())


def _check_scheduler(address: str, timeout: float) -> None:
    """Whether a Dask scheduler answers there: a ``Client`` that finds none leaves tracebacks, or waits for ever.

    Raises:
        InvalidInput: None does.
    """
    log = logging.getLogger("distributed")
    level = log.level
    log.setLevel(logging.CRITICAL + 1)  # what it says of each attempt is in the error
    try:
        with ThreadPoolExecutor(1) as thread:  # the caller's may have an event loop of its own
            kind = thread.submit(asyncio.run, asyncio.wait_for(_kind_of(address, timeout), timeout + 1)).result()
    except Exception as error:  # whatever listens there may answer anything
        raise _silent(address, timeout, error) from error
    finally:
        log.setLevel(level)
    if kind != "Scheduler":
        raise InvalidInput(f"scheduler: {address!r} is the address of a Dask {kind}; give that of its scheduler")


async def _kind_of(address: str, timeout: float) -> str:
    """What a Dask server calls itself: "Scheduler", "Worker", "Nanny"."""
    from distributed.comm import connect
    from distributed.security import Security

    comm = await connect(address, timeout=timeout, **Security().get_connection_args("client"))
    try:
        await comm.write({"op": "identity", "reply": True})
        return str((await comm.read())["type"])
    finally:
        comm.abort()


def _silent(address: str, timeout: float, error: Exception) -> InvalidInput:
    said = f"{type(error).__name__}: {error}".removesuffix(": ")
    return InvalidInput(
        f"scheduler: {address!r} did not answer as a Dask scheduler within {timeout:g} s ({said}); check the address, "
        "such as 'tcp://host:8786', and that 'dask scheduler' runs there"
    )


class _Queue:
    """Makers in their order; those whose tasks were lost are taken again first."""

    def __init__(self, makers: Iterable[Maker]) -> None:
        self._rest = enumerate(makers)
        self._again: deque[tuple[int, Maker]] = deque()
        self._losses: Counter[int] = Counter()  # since the last answer
        self.open: dict[int, Maker] = {}

    def take(self) -> tuple[int, Maker] | None:
        """The next one, then open; None if there is none."""
        item = self._again.popleft() if self._again else next(self._rest, None)
        if item is not None:
            self.open[item[0]] = item[1]
        return item

    def answer(self, number: int) -> None:
        """This one is done."""
        del self.open[number]
        self._losses.clear()

    def lose(self, number: int | None, error: Lost) -> None:
        """This one, or all that are open, must be taken again.

        Raises:
            WorkerLost: That happened too often.
        """
        numbers = [number] if number is not None else sorted(self.open)
        self._again.extend((lost, self.open.pop(lost)) for lost in numbers)
        self._losses.update(numbers or [-1])  # -1: there was none, for no worker could be had
        said = f"{type(error.__cause__).__name__}: {error.__cause__}".partition("\n")[0]
        _log.warning("workers died (%s); layers to be solved again: %d", said, len(numbers))
        if max(self._losses.values()) == _ATTEMPTS:
            raise WorkerLost(
                f"workers died {_ATTEMPTS} times in a row before any layer was finished ({said}). One that needs more "
                "memory than there is gets killed: give workers more, use fewer jobs, or less calibration data. Layers "
                "solved before are in the run's folder, if one was given as run=, from where the same call goes on"
            ) from error


def _attempt(queue: _Queue, jobs: int) -> Iterator[tuple[int, tuple[Answer, ...]]]:
    """Everything in the queue, until workers die."""
    workers = count_workers(jobs)
    if workers == 0:
        while (item := queue.take()) is not None:
            answers = item[1]().run()
            queue.answer(item[0])
            yield item[0], answers
        return
    room = jobs if workers > jobs else 2 * jobs  # where there are no more workers than jobs, some tasks wait for them
    with Workers(jobs) as pool:
        while True:
            while len(queue.open) < room and (item := queue.take()) is not None:
                pool.add(_solved, item[0], _sendable(item[1]()))
            if not queue.open:
                return
            number, outcome = pool.next()
            if isinstance(outcome, Lost):
                queue.lose(number, outcome)
                continue
            answers = _opened(outcome)
            queue.answer(number)
            yield number, answers


def _sendable(task: Task) -> Parcel:
    try:
        return packed(task)
    except Exception as error:
        raise InvalidInput(
            f"layer {task.name!r} cannot be sent to another process ({type(error).__name__}: {error}). The solver and "
            "its options must be picklable, so without open files, locks or connections; or use jobs=1"
        ) from error


def _solved(_number: int, parcel: Parcel) -> Parcel:
    """In a worker: the answers, or the exception. So whatever joblib itself raises is about the workers."""
    name = "?"
    try:
        task: Task = parcel.opened()
        name = task.name
        return packed(task.run())
    except Exception as error:  # noqa: BLE001 - _opened raises it
        error.add_note(f"raised in a worker, by layer {name!r}:\n{''.join(traceback.format_tb(error.__traceback__))}")
        return _told(error, name)


def _told(error: Exception, name: str) -> Parcel:
    """The exception itself, if it can travel: some are built from other arguments than they keep."""
    with suppress(Exception):
        parcel = packed(error)
        if type(parcel.opened()) is type(error):
            return parcel
    return packed(PruningFailed(f"layer {name!r}: {type(error).__name__}: {error}. The model is unchanged"))


def _opened(parcel: Parcel) -> tuple[Answer, ...]:
    content: Exception | tuple[Answer, ...] = parcel.opened()
    if isinstance(content, Exception):
        raise content
    return content
