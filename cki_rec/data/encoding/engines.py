"""Run functions of chunks: in threads, in worker processes of this machine, or as Ray tasks.

Functions and tasks are pickled for the last two. Results come in the order of the tasks, so no
result depends on the engine or on the number of workers.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from queue import SimpleQueue
from typing import Any, TypeVar

import polars as pl

from cki_rec.config import UserError
from cki_rec.data.encoding.worker import outcome
from cki_rec.data.prefetch import Run, in_order, threads

T = TypeVar("T")
R = TypeVar("R")
NUM_THREADS = min(4, pl.thread_pool_size())
"""Chunks that are in work at a time in one process; polars uses all cores within each."""
WORKER = [sys.executable, "-m", "cki_rec.data.encoding.worker"]


def engine(name: str, workers: int) -> AbstractContextManager[Run]:
    """Return an engine: ``processes`` or ``ray``; one worker is this process with its threads.

    Args:
        name: Value of ``runtime.engine``.
        workers: Number of processes. With Ray, the number of tasks in work; if no cluster runs,
            one of so many processors starts.
    """
    if name == "ray":
        return ray_tasks(workers)
    return threads(NUM_THREADS) if is_local(name, workers) else processes(workers)


def is_local(name: str, workers: int) -> bool:
    """Return whether an engine runs functions in this process."""
    return name == "processes" and workers == 1


@contextmanager
def processes(number: int) -> Iterator[Run]:
    """Yield a ``Run`` whose tasks are computed by new processes, which end with the block."""
    idle: SimpleQueue[_Worker] = SimpleQueue()
    with threads(number) as run:
        workers = [_Worker(number) for _ in range(number)]
        for worker in workers:
            idle.put(worker)

        def call(function: Callable[[T], R], task: T) -> R:
            worker = idle.get()
            try:
                result: R = _result(*worker.outcome(function, task))
                return result
            finally:
                idle.put(worker)

        try:
            yield lambda function, tasks: run(partial(call, function), tasks)
        finally:  # first the workers, so that no thread waits for one
            for worker in workers:
                worker.end()


@contextmanager
def ray_tasks(number: int) -> Iterator[Run]:
    """Yield a ``Run`` whose tasks are computed by a Ray cluster.

    The cluster is that of ``RAY_ADDRESS``, or a new one of ``number`` processors on this machine.

    Raises:
        UserError: Ray is not installed or no cluster answers; when it runs, a worker is lost.
    """
    try:
        import ray
    except ImportError:
        raise UserError(
            "runtime.engine=ray: ray is not installed; install the extra with pip install "
            "'cki-rec[ray]', or set runtime.engine=processes"
        ) from None
    is_ours = not ray.is_initialized()
    if is_ours:
        own = {} if os.environ.get("RAY_ADDRESS") else {"address": "local", "num_cpus": number}
        try:
            ray.init(**own, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise UserError(f"runtime.engine=ray: no cluster: {_first_line(error)}") from None
    # a task that writes in place must not run twice
    remote = ray.remote(max_retries=0)(outcome)

    def wait(reference: Any) -> Any:
        try:
            return _result(*ray.get(reference))
        except ray.exceptions.RayError as error:
            raise UserError(
                f"runtime.engine=ray: a task was lost: {_first_line(error)}; start the command "
                "again, with a smaller runtime.chunk_mb if memory was short"
            ) from None

    def run(function: Callable[[T], R], tasks: Iterable[T]) -> Iterator[R]:
        shared = ray.put(function)
        return in_order(lambda task: partial(wait, remote.remote(shared, task)), tasks, 2 * number)

    try:
        yield run
    finally:
        if is_ours:
            ray.shutdown()


class _Worker:
    """A worker process, one of ``number`` that share the cores.

    It has a session of its own: an interrupt from the keyboard reaches this process alone, which
    then ends its workers.
    """

    def __init__(self, number: int) -> None:
        share = str(max(1, pl.thread_pool_size() // number))
        paths = os.pathsep.join(path for path in sys.path if path)
        environment = {"PYTHONPATH": paths, "POLARS_MAX_THREADS": share, "OMP_NUM_THREADS": share}
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            WORKER,
            stdin=pipe,
            stdout=pipe,
            env={**os.environ, **environment},
            start_new_session=True,
        )

    def outcome(self, function: Callable[[T], R], task: T) -> tuple[bool, Any]:
        """Return the result of ``worker.outcome`` there.

        Raises:
            UserError: The process ended.
        """
        tasks, results = self._process.stdin, self._process.stdout
        assert tasks is not None
        assert results is not None
        content = pickle.dumps((function, task), pickle.HIGHEST_PROTOCOL)
        try:
            tasks.write(content)
            tasks.flush()
            is_good, result = pickle.load(results)
        except (EOFError, OSError, ValueError, pickle.UnpicklingError):
            code = self._process.wait()
            how = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
            raise UserError(
                f"a worker process of the encoding ended ({how}); start the command again, with "
                "fewer runtime.workers or a smaller runtime.chunk_mb if memory was short"
            ) from None
        return is_good, result

    def end(self) -> None:
        """Kill the process, and wait for its end."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            try:
                pipe.close()
            except BrokenPipeError:
                pass


def _result(is_good: bool, result: Any) -> Any:
    if is_good:
        return result
    raise result


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0]
