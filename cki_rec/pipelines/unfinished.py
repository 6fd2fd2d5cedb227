"""Merges from disk to disk that are not finished: their folders, and when these are removed."""

from __future__ import annotations

import errno
import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from cki_rec.config import UserError
from cki_rec.engine import distributed
from cki_rec.files import write_atomically
from cki_rec.merging.params import MergeError
from cki_rec.pipelines.stream_plan import Plan

PARTIAL = "partial"
"""Folder of merges that are not finished, beside the runs."""
PLAN = "plan.json"
FULL = (errno.ENOSPC, errno.EDQUOT)
"""Errors of the operating system about a full disk."""

log = logging.getLogger(__name__)


def begin(folder: Path, inside: str, plan: Plan, reads: dict[str, Any]) -> tuple[Plan, bool]:
    """Return the plan, and whether an earlier program began this merge; make its folder.

    Blocks of a merge that goes on are as large as they were.

    Args:
        folder: Folder of the unfinished merge.
        inside: Folder in it that takes tensors.
        plan: Plan of the merge if it begins now.
        reads: Everything that the bytes of the tensors depend on.
    """
    if distributed.rank() == 0:
        try:
            known = json.loads((folder / PLAN).read_text())
        except (OSError, ValueError):
            known = None
        is_resumed = known is not None and known["reads"] == json.loads(json.dumps(reads))
        is_resumed = is_resumed and known["rows"] <= plan.rows  # else blocks exceed the budget
        if not is_resumed:
            shutil.rmtree(folder, ignore_errors=True)
            (folder / inside).mkdir(parents=True)
            content = {"reads": reads, "rows": plan.rows}
            write_atomically(folder / PLAN, json.dumps(content).encode())
        rows = known["rows"] if is_resumed else plan.rows
    else:
        is_resumed, rows = False, plan.rows
    is_resumed, rows = distributed.from_first((is_resumed, rows))
    if is_resumed and distributed.rank() == 0:
        log.info("  an earlier program began this merge; it goes on after its last block")
    return replace(plan, rows=rows), is_resumed


@contextmanager
def kept_or_forgotten(folder: Path, method: str) -> Iterator[None]:
    """Remove the files of an unfinished merge after a mistake; keep them after any other failure.

    Args:
        folder: Folder of the unfinished merge.
        method: Name of the method, for messages.

    Raises:
        UserError: The mistake; or blocks cannot be written, and how to go on.
    """
    try:
        yield
    except MergeError as error:
        forget(folder)
        raise UserError(f"merge.method={method}: {error}") from error
    except UserError:
        forget(folder)
        raise
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise UserError(
            f"cannot write {error.filename or folder}: {error.strerror}; free space there, then"
            " run the same command again: it goes on after the last block (or remove"
            f" {folder} to give up)"
        ) from error


def forget(folder: Path) -> None:
    """Remove the files of an unfinished merge."""
    shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):  # other merges are not finished
        folder.parent.rmdir()
