"""A process that applies functions to chunks: ``python -m cki_rec.data.encoding.worker``.

It reads pickled pairs (function, task) from its input and writes pickled outcomes to its output.
It ends when its input does, so no worker outlives the process that started it.
"""

from __future__ import annotations

import os
import pickle
import sys
import traceback
from collections.abc import Callable
from typing import Any

from cki_rec.config import UserError


def outcome(function: Callable[[Any], Any], task: Any) -> tuple[bool, Any]:
    """Return True and the result of a function, or False and its error.

    Errors that are neither the user's nor the system's come with their traceback as text.
    """
    try:
        return True, function(task)
    except (UserError, OSError) as error:
        return False, error
    except Exception:
        return False, RuntimeError(traceback.format_exc())


def main() -> None:
    """Serve until the input ends, or nobody reads the output."""
    tasks, results = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # prints do not disturb the results
    try:
        while True:
            function, task = pickle.load(tasks)
            pickle.dump(outcome(function, task), results, pickle.HIGHEST_PROTOCOL)
            results.flush()
    except (EOFError, BrokenPipeError):
        os._exit(0)


if __name__ == "__main__":
    main()
