"""Produce the next items in other threads while the current one is in use."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Protocol, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class Run(Protocol):
    """Applies a function to tasks, and yields the results in the order of the tasks."""

    def __call__(self, function: Callable[[T], R], tasks: Iterable[T]) -> Iterator[R]:
        """Yield the results."""


def prefetch(items: Iterator[T]) -> Iterator[T]:
    """Yield ``items`` in order; another thread computes the next item in the meantime.

    At most one item is computed ahead. An error in ``items`` is raised in place of its item.
    """
    end = object()
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(next, items, end)
        while (item := future.result()) is not end:
            future = pool.submit(next, items, end)
            yield item  # type: ignore[misc]


def one_by_one(function: Callable[[T], R], tasks: Iterable[T]) -> Iterator[R]:
    """Apply a function to one task after the other."""
    return map(function, tasks)


@contextmanager
def threads(number: int) -> Iterator[Run]:
    """Yield a ``Run`` whose tasks are computed by threads, at most twice ``number`` ahead.

    A single one is that of the caller.
    """
    if number == 1:
        yield one_by_one
        return
    pool = ThreadPoolExecutor(number)

    def run(function: Callable[[T], R], tasks: Iterable[T]) -> Iterator[R]:
        return in_order(lambda task: pool.submit(function, task).result, tasks, 2 * number)

    try:
        yield run
    finally:
        pool.shutdown(cancel_futures=True)


def in_order(start: Callable[[T], Callable[[], R]], tasks: Iterable[T], most: int) -> Iterator[R]:
    """Yield the results of tasks in their order; an error is raised in place of its result.

    Args:
        start: Starts a task and returns a function that waits for its result.
        tasks: Taken in this thread, as results are taken.
        most: Most tasks in work.
    """
    waiting: deque[Callable[[], R]] = deque()
    source = iter(tasks)
    while True:
        try:
            task = next(source)
        except StopIteration:
            break
        except Exception:
            while waiting:  # an earlier task may have failed first
                yield waiting.popleft()()
            raise
        waiting.append(start(task))
        if len(waiting) >= most:
            yield waiting.popleft()()
    while waiting:
        yield waiting.popleft()()
