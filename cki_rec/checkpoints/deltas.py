"""Deltas: the rows of tables, and the other parameters, that differ from a base checkpoint.

A delta is a folder. ``delta.json`` describes the model and holds the digest of its base.
``dense.safetensors`` holds the parameters that are no tables. ``table.NAME.safetensors`` holds the
changed rows of the tables of one vocabulary: ``rows``, their ascending numbers, and under
``model.PARAMETER``, ``accumulator.PARAMETER`` and ``counts`` their values. The folder
``new_tokens`` holds the tokens that follow those of the base, if there are some.

Shape legend: R changed rows, V rows of a table.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cki_rec.checkpoints.checkpoint import Description
from cki_rec.checkpoints.formats import safetensors
from cki_rec.checkpoints.formats.stored import new_file
from cki_rec.config import UserError, model_options, section
from cki_rec.data.provenance import Provenance
from cki_rec.data.schema import FeatureSchema
from cki_rec.files import file_digest, new_folder
from cki_rec.merging.params import Params, is_finite

FORMAT = 1
FOLDER, DESCRIPTION, DENSE, ROWS = "delta", "delta.json", "dense.safetensors", "rows"
NEW_TOKENS = "new_tokens"
SHOWN = 3
"""Row numbers that a message names."""


@dataclass(frozen=True, slots=True)
class Delta:
    """A delta at rest, whose files are undamaged."""

    folder: Path
    base: str
    """``content_digest`` of the base checkpoint."""
    digest: str
    """Of the whole delta."""
    about: Description

    def dense(self) -> Params:
        """Return the parameters that are no tables.

        Raises:
            UserError: The file is damaged, or an entry is NaN or infinite.
        """
        tensors = _read(self.folder / DENSE)
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not is_finite(tensor):
                raise UserError(f"{self.folder / DENSE}: {name} has NaN or infinite entries")
        return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}

    def table(self, table: str) -> tuple[Tensor, Params]:
        """Return ``(R,)`` numbers of the changed rows of a table, ascending, and their values.

        Raises:
            UserError: Rows are repeated, outside of the table, or not finite; or the file is
                damaged.
        """
        path = self.folder / file_name(table)
        tensors = _read(path)
        rows = tensors.pop(ROWS, None)
        if rows is None or rows.dtype != torch.int64 or rows.ndim != 1:
            raise UserError(f"{path}: unreadable delta, no int64 tensor '{ROWS}' of one dimension")
        _check_rows(path, rows, self.about.schema.table_sizes[table])
        for name, values in tensors.items():
            if len(values) != len(rows):
                raise UserError(f"{path}: {name} has {len(values):,} rows, '{ROWS}' {len(rows):,}")
            if values.is_floating_point() and not is_finite(values):
                bad = (~values.isfinite()).reshape(len(values), -1).any(1).nonzero()[:, 0]
                raise UserError(
                    f"{path}: {name} has NaN or infinite entries in row {_listed(rows[bad])}; make"
                    " the delta again from a sound model"
                )
        return rows, tensors


def file_name(table: str) -> str:
    """Return the name of the file of a table in a delta."""
    return f"table.{table}.safetensors"


def locate(path: Path) -> Path:
    """Return the delta folder of a run directory; another path is returned unchanged."""
    nested = path / FOLDER
    return nested if nested.is_dir() else path


def open_delta(path: Path) -> Delta:
    """Return a delta after checking the digests of its files.

    Args:
        path: Its folder, or the run directory that holds it.

    Raises:
        UserError: There is no delta, or it is damaged or of another format.
    """
    folder = locate(path)
    file = folder / DESCRIPTION
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise UserError(f"{file}: format {content['format']}, this release reads {FORMAT}")
        about = Description(
            model_options(content["model"]),
            FeatureSchema.from_json(content["schema"]),
            Provenance.from_json(content),
            None,
        )
        base, files = str(content["base"]), dict(content["files"])
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{folder}: no delta here ({DESCRIPTION} is missing); make one with cki-rec export"
            " run=NAME format=delta merge.base=BASE"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: damaged delta ({error!r}); make it again") from None
    for name, digest in files.items():
        if not (folder / name).is_file():
            raise UserError(f"{folder / name}: damaged delta, the file is gone; copy it again")
        if file_digest(folder / name) != digest:
            raise UserError(
                f"{folder / name}: damaged delta, the file is cut or has changed; copy it again"
            )
    return Delta(folder, base, file_digest(file), about)


@contextmanager
def new_delta(target: Path, base: str, about: Description) -> Iterator[Path]:
    """Yield a folder for ``write_rows`` and ``write_dense``; it becomes the delta at the end.

    Args:
        target: The folder of the delta; it does not exist.
        base: ``content_digest`` of the base checkpoint.
        about: Description of the model.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with new_folder(target) as folder:
        yield folder
        paths = sorted([*folder.glob("*.safetensors"), *folder.glob(f"{NEW_TOKENS}/*.txt")])
        files = {str(path.relative_to(folder)): file_digest(path) for path in paths}
        content = {
            "format": FORMAT,
            "base": base,
            "model": section(about.model),
            "schema": about.schema.to_json(),
            **about.origin.to_json(),
            "files": files,
        }
        (folder / DESCRIPTION).write_text(json.dumps(content, indent=1), encoding="utf-8")


def write_dense(folder: Path, params: Params) -> None:
    """Write the parameters that are no tables."""
    _write(folder / DENSE, {f"model.{name}": tensor for name, tensor in params.items()})


def write_rows(folder: Path, table: str, rows: Tensor, values: Params) -> None:
    """Write changed rows of a table.

    Args:
        folder: The folder of ``new_delta``.
        table: Name of the table.
        rows: ``(R,)`` int64, ascending.
        values: ``model.PARAMETER``, ``accumulator.PARAMETER`` and ``counts`` -> ``(R, ...)``.
    """
    _write(folder / file_name(table), {ROWS: rows, **values})


def _write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    new_file(path, lambda temporary: safetensors.write_file(dict(tensors), temporary))


def _read(path: Path) -> Params:
    stored: Any = safetensors.Safetensors(path)
    try:
        return {name: stored.rows(name) for name in stored.entries}
    finally:
        stored.close()


def _check_rows(path: Path, rows: Tensor, size: int) -> None:
    """Check that rows are ascending, without repetition, and in the table.

    Raises:
        UserError: They are not.
    """
    outside = rows[(rows < 0) | (rows >= size)]
    if len(outside):
        raise UserError(
            f"{path}: row {_listed(outside)} is outside of the table of {size:,} rows; the delta"
            " is of another table"
        )
    steps = rows.diff()
    if bool((steps == 0).any()):
        repeated = rows[1:][steps == 0]
        raise UserError(f"{path}: row {_listed(repeated)} is there twice; make the delta again")
    if bool((steps < 0).any()):
        raise UserError(f"{path}: '{ROWS}' is not ascending; sort rows with their values")


def _listed(rows: Tensor) -> str:
    more = f" and {len(rows) - SHOWN:,} more" if len(rows) > SHOWN else ""
    return ", ".join(f"{row:,}" for row in rows[:SHOWN].tolist()) + more
