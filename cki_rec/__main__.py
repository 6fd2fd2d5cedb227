"""``python -m cki_rec`` is ``cki-rec``; torchrun starts this module."""

import atexit
import os
import sys

from cki_rec.cli import main


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


leave(main())
