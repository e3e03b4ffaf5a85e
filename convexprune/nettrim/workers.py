"""joblib's workers, given one task at a time by the thread that takes the results, with an end to every task."""

import asyncio
import sys
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, CancelledError
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from joblib import Parallel, effective_n_jobs
from joblib.parallel import ParallelBackendBase, get_active_backend

from convexprune.solvers.errors import InvalidInput

T = TypeVar("T")

_PATIENCE = 60  # seconds that a new worker may take to start, where Dask has none left


class Lost(Exception):
    """Workers died, with all tasks that were not finished; the cause is what joblib's backend raised."""


def count_workers(jobs: int) -> int:
    """Tasks that joblib's active backend can run at a time; 0 if it uses no workers and runs them here.

    Raises:
        Lost: Dask has no workers, and none came.
    """
    backend = get_active_backend()[0]
    with _losing():
        found = int(effective_n_jobs(jobs))
    return 0 if found == 1 and not _is_dask(backend) else found


class Workers(Parallel):  # type: ignore[misc] # untyped
    """``joblib.Parallel`` in other hands: ``add`` gives it a task, ``next`` waits for a result.

    joblib itself asks for more tasks in the thread in which a result arrives, and to make a task here is to run the
    model. As a context manager it lets the workers go; after an exception it stops them first.

    Args:
        jobs: Tasks at a time, at least 2.

    Raises:
        InvalidInput: The active backend cannot give results as they come.
    """

    def __init__(self, jobs: int) -> None:
        backend = get_active_backend()[0]
        chosen = {"backend": _Dask(backend)} if _is_dask(backend) else {}
        try:
            super().__init__(n_jobs=jobs, return_as="generator_unordered", batch_size=1, **chosen)
        except ValueError as error:
            raise InvalidInput(f"joblib: {error}; expected 'loky', 'threading' or 'dask' in parallel_config") from error
        self._stock = _Stock()
        self._results: Any = None

    def dispatch_next(self) -> None:
        """Called by joblib when a result arrives; nothing, for it is ``add`` that brings more."""

    def add(self, function: Callable[[int, Any], T], number: int, argument: Any) -> None:
        """Have ``function(number, argument)`` run."""
        self._stock.append((_numbered, (function, number, argument), {}))
        with _losing():
            if self._results is None:
                self._results = self(self._stock)
            else:
                super().dispatch_next()

    def next(self) -> tuple[int, Any]:
        """The number and result of the next task that ends; a ``Lost`` in place of a result if it alone was lost.

        Raises:
            Lost: All workers are gone.
        """
        with _losing():
            for number, result in self._results:
                return number, result
            raise CancelledError("joblib's workers were stopped from outside")

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """Nothing runs for us any more."""
        if self._results is None:
            return
        if error is None:
            super().dispatch_next()  # there is nothing left, so joblib ends the results
            deque(self._results, maxlen=0)
            return
        with suppress(Lost, StopIteration):
            self._results.throw(Lost())  # not closed: joblib would warn of results that nobody took


def _numbered(function: Callable[[int, Any], T], number: int, argument: Any) -> tuple[int, T]:
    return number, function(number, argument)


class _Stock(deque[Any]):
    """An iterator over what is there, to which more may come."""

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if not self:
            raise StopIteration
        return self.popleft()


class _Dask(ParallelBackendBase):  # type: ignore[misc] # untyped
    """joblib's Dask backend, but that every task ends: its own never tells of those that Dask gives up.

    Arguments are scattered: sent once, to one worker, and not kept in the scheduler's graph. They are lost with that
    worker; Dask then cancels the task.
    """

    supports_retrieve_callback = True

    def __init__(self, theirs: Any) -> None:
        super().__init__(nesting_level=0)
        self._theirs = theirs
        self._open: set[asyncio.Task[Any]] = set()

    def effective_n_jobs(self, n_jobs: int) -> int:
        """At least 2: of 1 joblib thinks that it is this process."""
        return max(2, int(self._theirs.effective_n_jobs(n_jobs)))

    def submit(self, func: Any, callback: Callable[[Any], None] | None = None) -> None:
        """Send a task, from the client's own thread."""
        self._theirs.client.loop.add_callback(self._sent, func, callback)

    async def _sent(self, batch: Any, callback: Callable[[Any], None]) -> None:
        own = asyncio.current_task()
        assert own is not None  # noqa: S101 - the loop runs it as one
        self._open.add(own)
        ((call, (function, number, argument), _),) = batch.items
        client, options = self._theirs.client, self._theirs.submit_kwargs
        out: Any
        try:
            await client.wait_for_workers(1, timeout=_PATIENCE)  # scatter itself gives up after 2 seconds
            (there,) = await client.scatter([argument], asynchronous=True, hash=False)
            out = [await client.submit(call, function, number, there, pure=False, **options)]
        except BaseException as error:  # noqa: BLE001 - raised by retrieve_result_callback
            lost = isinstance(error, _losses()) or client.status != "running"
            out = [(number, _lost(error))] if lost else error
        finally:
            self._open.discard(own)
        callback(out)

    def retrieve_result_callback(self, out: Any) -> list[Any]:
        """A task's results, or what was raised in their place."""
        if isinstance(out, BaseException):
            raise out
        return list(out)

    def abort_everything(self, ensure_ready: bool = True) -> None:  # noqa: ARG002 - joblib's interface
        """Give up all tasks; Dask drops those that no worker has begun."""
        for task in list(self._open):
            self._theirs.client.loop.add_callback(task.cancel)


def _lost(error: BaseException) -> Lost:
    lost = Lost()
    lost.__cause__ = error
    return lost


def _is_dask(backend: Any) -> bool:
    return type(backend).__name__ == "DaskDistributedBackend"


@contextmanager
def _losing() -> Iterator[None]:
    """Tells dead workers from all else that joblib raises."""
    try:
        yield
    except _losses() as error:
        raise Lost from error


def _losses() -> tuple[type[BaseException], ...]:
    found = (BrokenExecutor, CancelledError, asyncio.CancelledError, TimeoutError)
    if "distributed" not in sys.modules:
        return found
    from distributed import KilledWorker
    from distributed.comm import CommClosedError

    return (*found, KilledWorker, CommClosedError)
