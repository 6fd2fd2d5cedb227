"""The methods of integration as a table for the terminal."""

from __future__ import annotations

import shutil

from rich import box
from rich.console import Console
from rich.table import Table

from cki_rec.merging.options import defaults, in_yaml
from cki_rec.merging.registry import METHODS, needs_of

NARROWEST, WIDEST = 120, 180
"""Columns of a terminal that a readable table takes."""
NEEDS = {
    "counts": "row counts",
    "fisher": "training rows",
    "moments": "training rows",
    "training": "training rows",
    "base": "common start",
    "labels": "validation rows",
}
WHOLE = "whole tables"


def method_table(width: int | None = None) -> str:
    """Return what every row of ``METHODS`` does, takes and costs, ``width`` columns wide.

    Args:
        width: None: that of the terminal, within ``NARROWEST`` and ``WIDEST``.
    """
    if width is None:
        columns = shutil.get_terminal_size((140, 24)).columns
        width = min(max(columns, NARROWEST), WIDEST)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for title, ratio in (
        *(("method", None), ("idea, and options with their defaults", 5), ("models", None)),
        *(("needs", 2), ("cost", 2), ("reference", 3)),
    ):
        table.add_column(title, ratio=ratio, no_wrap=ratio is None, overflow="fold")
    table.expand = True
    for name, method in METHODS.items():
        known = defaults(method.options)
        options = ", ".join(f"{option}={in_yaml(value)}" for option, value in known.items())
        idea = method.idea + (f"\n  {options}" if options else "")
        needs = dict.fromkeys(NEEDS[need] for need in sorted(needs_of(name, {})))
        if method.merges_parameters and not method.row_wise:
            needs[WHOLE] = None
        table.add_row(
            *(name, idea, method.models, ", ".join(needs) or "-", method.cost, method.reference)
        )
    console = Console(width=width, color_system=None, highlight=False, markup=False)
    with console.capture() as captured:
        console.print(table)
        console.print(
            "Options: merge.options.NAME=VALUE; null: chosen on validation rows. Common start:"
            f" merge.base. What needs no rows and no {WHOLE} runs on several processes, too.",
            soft_wrap=False,
        )
    return "\n".join(line.rstrip() for line in captured.get().strip("\n").splitlines())
