"""One command on several processes, started by torchrun: who prints, and how it ends."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cki_rec.config import Config

BY_THE_FIRST = ("inspect", "prepare", "report", "export", "predict", "runs", "clean")
"""Pipelines that write one file or print: the first process runs them alone, the others end."""
SECONDS_FOR_FIRST = 5.0
"""Time in which the first process prints a mistake that all have."""


def is_one_of_several() -> bool:
    """Return whether torchrun has started this process beside others."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_first() -> bool:
    """Return whether this process is the first one, which prints for all."""
    return os.environ.get("RANK", "0") == "0"


def run_pipeline(name: str, run: Callable[[Config], Any], config: Config) -> Any:
    """Run a pipeline on all processes that take part, and return its value.

    An error of one process ends all of them. It is printed once.
    """
    if not is_one_of_several():
        return run(config)
    if name in BY_THE_FIRST:
        os.environ["WORLD_SIZE"] = "1"
        return run(config) if is_first() else None
    from cki_rec.engine import distributed

    signal.signal(signal.SIGTERM, _end)
    if name == "train":  # where no process fails alone
        return run(config)
    distributed.start(config.runtime)
    with distributed.propagate_errors():
        return run(config)


def reports_loss() -> bool:
    """Return whether this process prints that another one has ended, for all that are left."""
    if not is_one_of_several():
        return True
    from cki_rec.engine import distributed

    return distributed.is_first_report()


def wait_for_first() -> None:
    """Give the first process the time to print a mistake that all have."""
    if not is_first():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # of torchrun, when the first has ended
        time.sleep(SECONDS_FOR_FIRST)


def leave(code: int) -> None:
    """End this process with ``code``; under torchrun, without finalizing the interpreter.

    Threads of gloo and polars may outlive the work of a process. One that needs the interpreter
    while it is finalized aborts a process whose work is done (pytorch/pytorch#179291).
    """
    if "WORLD_SIZE" not in os.environ:
        sys.exit(code)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _end(_: int, __: FrameType | None) -> None:
    """Raise the loss of a process: torchrun ends all others, which may be computing."""
    from cki_rec.config import RankLost
    from cki_rec.engine import distributed

    raise RankLost(distributed.LOST)
