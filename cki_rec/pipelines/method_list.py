"""Methods, references and steps of a merge as a table: ``cki-rec merge --list``."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from cki_rec.config import Align, Merge, choices
from cki_rec.merging.methods import METHODS
from cki_rec.merging.options import in_yaml
from cki_rec.pipelines.references import REFERENCES
from cki_rec.plugins import load

NARROWEST, WIDEST = 120, 180
"""Columns of a terminal that a readable table takes."""
NEEDS = {
    "counts": "row counts",
    "fisher": "training rows",
    "moments": "training rows",
    "base": "base model",
    "score": "validation rows",
}
WHOLE = "whole tables"
STEPS = {
    "align": (
        "Move all sources into a shared basis; their scores stay (step before a merge)",
        f"merge.align.by={'|'.join(choices(Align, 'by'))}",
        "training rows (activations)",
        "a search; scores on random rows",
        "Git Re-Basin (Ainsworth et al., ICLR 2023); rotations and tables: ours",
    ),
    "repair": (
        "Fit merged layers to the sources' layers in closed form (step after a merge)",
        f"merge.repair={'|'.join(choices(Merge, 'repair'))}",
        "training rows, validation rows (project)",
        "passes over sampled rows",
        "REPAIR (Jordan et al., ICLR 2023), PLeaS (arXiv 2407.02447)",
    ),
    "refine": (
        "FIT all parameters to the sources' outputs by gradients, without labels: this trains"
        " (step after a merge)",
        f"merge.refine={'|'.join(choices(Merge, 'refine'))}",
        "training rows or row counts, validation rows",
        "scores of all sources; 400 to 1,000 training steps",
        "FedDF (Lin et al., NeurIPS 2020); routed teachers and random rows: ours",
    ),
}
"""Step -> summary, option with its values, needs, cost, reference."""


def method_table(width: int | None = None, plugins: Sequence[str] = ()) -> str:
    """Return the table of all methods, references and steps, ``width`` columns wide.

    Args:
        width: Columns; None: those of the terminal, within ``NARROWEST`` and ``WIDEST``.
        plugins: Modules with methods of the user (``merge.plugins``).
    """
    for plugin in plugins:
        load(plugin, "merge.plugins")
    if width is None:
        columns = shutil.get_terminal_size((140, 24)).columns
        width = min(max(columns, NARROWEST), WIDEST)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), expand=True)
    for title, ratio in (
        *(("method", None), ("summary, and options with their defaults", 5), ("models", None)),
        *(("needs", 2), ("cost", 2), ("reference", 3)),
    ):
        table.add_column(title, ratio=ratio, no_wrap=ratio is None, overflow="fold")
    for row in _rows():
        table.add_row(*row)
    console = Console(width=width, color_system=None, highlight=False, markup=False)
    with console.capture() as captured:
        console.print(table)
        console.print(
            "Options: merge.options.NAME=VALUE; null: chosen on validation rows. Base model:"
            f" merge.base. Methods that need no rows and no {WHOLE} also run on several processes."
            " The search merge=auto refines its best recipe and takes the best model on validation"
            " rows. With merge.effort=closed_form it trains nothing.",
            soft_wrap=False,
        )
    return "\n".join(line.rstrip() for line in captured.get().strip("\n").splitlines())


def _rows() -> Iterator[tuple[str, ...]]:
    for name, method in METHODS.items():
        options = ", ".join(f"{option}={in_yaml(v)}" for option, v in method.options.items())
        summary = method.summary + (f"\n  {options}" if options else "")
        needs = dict.fromkeys(NEEDS[need] for need in sorted(method.needs({})))
        if not method.row_wise:
            needs[WHOLE] = None
        models = "any" if method.max_models is None else str(method.max_models)
        yield name, summary, models, ", ".join(needs) or "-", method.cost, method.reference
    for name, reference in REFERENCES.items():
        needs = dict.fromkeys(NEEDS[need] for need in sorted(reference.always_needs))
        listed = ", ".join(needs) or "-"
        summary = f"{reference.summary} (reference)"
        yield name, summary, "any", listed, reference.cost, reference.reference
    for name, (summary, option, listed, cost, source) in STEPS.items():
        yield name, f"{summary}\n  {option}", "any", listed, cost, source
