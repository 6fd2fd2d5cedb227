"""``merge`` on several processes, each with some rows of every table of every source."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from cki_rec.config import Config, Merge, UserError
from cki_rec.engine import distributed
from cki_rec.merging.registry import METHODS, Method

INSTEAD = "use merge=evidence or merge=aligned_weights, or start it without torchrun"


@contextmanager
def processes(config: Config) -> Iterator[None]:
    """Let processes, if there are several, work together on CPU; all fail if one does.

    Raises:
        UserError: Asked for what takes one process.
    """
    if distributed.world_size() > 1:
        distributed.start(replace(config.runtime, device="cpu"))
    with distributed.propagate_errors():
        if config.check_only and distributed.world_size() > 1:
            raise UserError(
                "check_only=true: takes one process; start it without torchrun (on several,"
                " integrate checks that sources fit before it reads them)"
            )
        yield


def check(options: Merge, method: Method, looks_at_rows: bool) -> None:
    """Check that an integration can be done on as many processes as there are.

    Raises:
        UserError: There are several, and it needs whole tables; which of them do not.
    """
    if distributed.world_size() == 1:
        return
    if not method.row_wise:
        apart = ", ".join(name for name, known in METHODS.items() if known.row_wise)
        raise UserError(
            f"merge.method={options.method}: needs whole models in one process; on several,"
            f" each with some rows of every table, merge.method is one of {apart}; {INSTEAD}"
        )
    whole = {
        f"align.by={options.align.by}": options.align.by == "activations",
        f"repair={options.repair}": options.repair != "none",
        "recalibrate=true": options.recalibrate,
        f"gate.train={options.gate.train}": options.gate.train != "none",
        f"control={options.control}": options.control != "none",
        "vocabularies": bool(options.vocabularies),
    }
    wrong = [f"merge.{option}" for option, is_so in whole.items() if is_so]
    if looks_at_rows and not wrong:
        wrong = [f"merge.options of {options.method} that validation rows decide (null)"]
    if wrong:
        raise UserError(f"{wrong[0]}: needs whole models in one process; {INSTEAD}")
