"""Export a checkpoint to one file that serves without this package."""

from __future__ import annotations

import json
import logging
import os
import platform
import shutil
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cki_rec import checkpoints
from cki_rec.checkpoints import CHECKPOINT, DESCRIPTION, Checkpoint
from cki_rec.config import Config, Model, UserError, nearest, section
from cki_rec.data.schema import FIRST_ID, OOV_ID, PADDING_ID
from cki_rec.engine import distributed
from cki_rec.engine.export import (
    FORMATS,
    IDS,
    NUMBERS,
    OUTPUTS,
    TOLERANCE,
    Servable,
    check_packages,
    example_inputs,
    free_dims,
    largest_difference,
)
from cki_rec.engine.record import RECORD, Run
from cki_rec.environment import installed_version
from cki_rec.files import file_digest
from cki_rec.models import build_model

FORMAT = 1
"""Format of the description."""
FOLDER = "export"
"""Folder of exports in a run directory."""
LOADING = {
    "pt2": "torch.export.load(FILE).module()(INPUTS), a dict of tensors by input name; returns a"
    " dict of tensors",
    "onnx": "onnxruntime.InferenceSession(FILE).run(None, INPUTS), a dict of arrays by input name;"
    " returns a list in the order of outputs",
}
IDS_OF_TOKENS = (
    "Line n (from 0) of vocabulary.TABLE.txt in the encoded data set is the token of id first_id"
    " + n. Any other token has unseen_id. The vocabulary_hash is the sha256 of that file. For"
    " fields made from numbers it also covers their learned scale and edges. If it is 'crc32"
    " modulo M', the id of a token is first_id + CRC-32 of its UTF-8 bytes modulo M. The"
    " padding_id fills up rows of fields with several ids, on either side. Ids outside of a table"
    " are scored as unseen_id. If a field has repeats: ignored, an id counts once per row. If it"
    " has repeats: counted, send the id of each distinct token once. The entries options, numbers"
    " and quantile_edges of manifest.json describe how raw values become tokens and numbers."
)
"""Explanation of ids for users of the file."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ExportSource:
    """The model that ``run`` names."""

    checkpoint: Path
    home: Path
    """The run directory, or the checkpoint folder itself."""
    run_id: str | None


def run(config: Config) -> None:
    """Export the configured model; log the path, size and error of the file.

    Raises:
        UserError: The model is missing or damaged, packages are missing, or exported scores
            differ from the model; then no file is written.
    """
    check_packages(config.format)
    source = find(config)
    distributed.start(replace(config.runtime, device="cpu"))
    saved = checkpoints.load(source.checkpoint)
    network = restore(saved, source.checkpoint)
    target = source.home / FOLDER / f"model.{config.format}"
    about = {
        "source": {
            "run_id": source.run_id,
            "checkpoint_sha256": file_digest(source.checkpoint / DESCRIPTION),
            "data_hash": saved.origin.data_hash,
            "data_set": data_set(Path(config.runtime.encoded), saved.origin.data_hash),
        },
        "ids": IDS_OF_TOKENS,
        "loading": LOADING[config.format],
        "versions": _versions(config.format),
    }
    difference = write(network, saved, target, config.format, about)
    megabytes = sum(path.stat().st_size for path in target.parent.glob(f"{target.name}*")) / 1e6
    log.info("model: %s", target)
    log.info("  %.2f MB; inputs and ids are described in %s.json", megabytes, target.name)
    log.info("  largest difference from the model's own scores: %.1e", difference)


def find(config: Config) -> ExportSource:
    """Return the model that ``run`` names: a path, or a run id under ``runtime.out``.

    Raises:
        UserError: No model is named, or the run is missing, unfinished or without a model.
    """
    if config.run is None:
        raise UserError(f"run=null: name a model, e.g. cki-rec export run={_example(config)}")
    out = Path(config.runtime.out)
    folder = next((f for f in (Path(config.run), out / config.run) if f.exists()), None)
    if folder is None:
        known = [path.parent.name for path in out.glob(f"*/{RECORD}")]
        hint = nearest(config.run, known)
        raise UserError(f"run={config.run}: {hint}no such folder, and no such run in {out}")
    if (folder / DESCRIPTION).is_file():
        is_of_run = folder.name == CHECKPOINT
        home = folder.resolve().parent if is_of_run else folder
        return ExportSource(folder, home, _run_id(home) if is_of_run else None)
    if not (folder / RECORD).is_file():
        if (folder / CHECKPOINT).is_dir():
            raise UserError(
                f"run={config.run}: unfinished, {RECORD} is missing; run its command again, or"
                f" name its checkpoint as it is: run={folder / CHECKPOINT}"
            )
        raise UserError(f"run={config.run}: no run and no checkpoint in {folder}")
    if not (folder / CHECKPOINT).is_dir():
        record = Run(folder).record or {}
        chosen = (record.get("result") or {}).get("chosen") or []
        others = f"; its result is another run: run={', run='.join(chosen)}" if chosen else ""
        raise UserError(f"run={config.run}: this run made no model{others}")
    return ExportSource(folder / CHECKPOINT, folder, _run_id(folder))


def restore(saved: Checkpoint, folder: Path) -> nn.Module:
    """Return the network of a checkpoint on the CPU, with unsharded tables.

    Raises:
        UserError: The tensors do not match the network.
    """
    network = build_model(saved.schema, saved.model, torch.device("meta"))
    try:
        network.load_state_dict(saved.params, assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{folder}: its tensors do not fit its network ({reason})") from None
    return network.eval()


def write(
    network: nn.Module,
    saved: Checkpoint,
    target: Path,
    name: str,
    about: dict[str, Any],
) -> float:
    """Write the file and its description whole or not at all; return the difference of scores.

    Args:
        network: The network of ``saved``.
        saved: The checkpoint.
        target: The file; its description is written beside it.
        name: A row of ``FORMATS``.
        about: Further entries of the description.

    Raises:
        UserError: Scores of the written file differ from the network.
    """
    temporary = target.with_name(f".{target.name}.tmp-{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        path, servable = temporary / target.name, Servable(network, saved.schema)
        FORMATS[name].write(servable, example_inputs(saved.schema), path)
        difference = largest_difference(network, saved.schema, FORMATS[name].read(path))
        if not difference <= TOLERANCE:
            raise UserError(
                f"format={name}: exported scores differ from the model's own by {difference:.1e},"
                f" more than {TOLERANCE:.0e}; nothing is kept"
            )
        parts = sorted(temporary.iterdir())
        description = {
            "format": FORMAT,
            "files": {part.name: file_digest(part) for part in parts},
            "largest_difference": difference,
            **about,
            **describe_servable(servable, saved.model),
        }
        beside = temporary / f"{target.name}.json"
        beside.write_text(json.dumps(description, indent=1, allow_nan=False))
        for part in (*parts, beside):
            part.replace(target.with_name(part.name))
        if len(parts) == 1:
            target.with_name(f"{target.name}.data").unlink(missing_ok=True)
    except OSError as error:
        error.filename = error.filename or str(target)
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        with suppress(OSError):
            target.parent.rmdir()  # if it is empty
    return difference


def describe_servable(servable: Servable, model: Model) -> dict[str, Any]:
    """Return a description of the file for serving programs, as plain JSON values."""
    schema, names = servable.schema, servable.inputs
    attended = {"attends_to_latest": servable.length}
    repeats = {name: "ignored" if name in servable.sets else "counted" for name in names}
    inputs = []
    for name in dict.fromkeys(names.values()):
        fields = [field for field, of in names.items() if of == name]
        second = len(fields) if name in (IDS, NUMBERS) else free_dims(name)[1]
        dtype = "float32" if name == NUMBERS else "int64"
        inputs.append({"name": name, "dtype": dtype, "shape": ["rows", second], "fields": fields})
    return {
        "inputs": inputs,
        "outputs": [{"name": name, "dtype": "float32", "shape": ["rows"]} for name in OUTPUTS],
        "fields": [
            {
                **asdict(feature),
                "input": names[feature.name],
                **({"repeats": repeats[feature.name]} if feature.kind == "multi" else {}),
                **(attended if feature.name in servable.attended else {}),
            }
            for feature in schema.features
        ],
        "tables": {
            table: {"rows": rows, "vocabulary_hash": schema.vocabulary_hashes[table]}
            for table, rows in schema.table_sizes.items()
            if table in {f.table for f in schema.lookups}
        },
        "numbers": {f.name: schema.vocabulary_hashes.get(f.name) for f in schema.numbers},
        "padding_id": PADDING_ID,
        "unseen_id": OOV_ID,
        "ids_outside_tables": "scored as unseen_id",
        "first_id": FIRST_ID,
        "model": section(model),
    }


def _run_id(home: Path) -> str | None:
    """Return the run id in the record of a run; None without a record."""
    record = Run(home).record
    return None if record is None else str(record.get("run_id"))


def _example(config: Config) -> str:
    """Return the latest run with a model, for a message."""
    runs = Path(config.runtime.out).glob(f"*/{CHECKPOINT}/{DESCRIPTION}")
    latest = max(runs, key=lambda path: path.stat().st_mtime, default=None)
    return latest.parent.parent.name if latest else "experiments/runs/train-0123456789abcdef"


def data_set(encoded: Path, data_hash: str) -> str | None:
    """Return the name of the encoded data set with this hash; None if it is not here."""
    for path in sorted(encoded.glob("*/manifest.json")):
        try:
            if json.loads(path.read_text())["hash"] == data_hash:
                return path.parent.name
        except (OSError, ValueError, KeyError, TypeError):
            continue  # damaged or incomplete
    return None


def _versions(name: str) -> dict[str, str]:
    packages = ("cki-rec", "torch", *FORMATS[name].packages)
    versions = {package: installed_version(package) for package in packages}
    return {"python": platform.python_version(), **{p: v for p, v in versions.items() if v}}
