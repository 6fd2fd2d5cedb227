"""Export a checkpoint to one file that serves without this package."""

from __future__ import annotations

import json
import logging
import os
import platform
import shutil
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import nn

from cki_rec import checkpoints
from cki_rec.checkpoints import DESCRIPTION, Checkpoint
from cki_rec.config import Config, Model, UserError, section
from cki_rec.data.schema import FIRST_ID, OOV_ID, PADDING_ID
from cki_rec.engine import distributed
from cki_rec.engine.export import (
    FORMATS,
    TOLERANCE,
    check_packages,
    example_inputs,
    largest_difference,
)
from cki_rec.engine.servable import IDS, NUMBERS, OUTPUTS, Servable, free_dims
from cki_rec.environment import installed_version
from cki_rec.files import file_digest
from cki_rec.pipelines import deltas, serving_files
from cki_rec.pipelines.loading import data_set, find, restore
from cki_rec.pipelines.serving_files import ServingFiles

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


def run(config: Config) -> None:
    """Export the configured model; log the path, size and error of the file.

    Raises:
        UserError: The model is missing or damaged, packages are missing, or exported scores
            differ from the model; then no file is written.
    """
    if config.format == "delta":
        deltas.export(config)
        return
    check_packages(config.format)
    source = find(config, "export")
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
    try:
        files = serving_files.of_model(config, saved, source.home, network)
    except UserError as error:
        log.warning("  no encoder of raw rows: %s", error)
        files = None
    written = write(network, saved, target, config.format, about, files, config.int8)
    megabytes = sum(path.stat().st_size for path in target.parent.glob(f"{target.name}*")) / 1e6
    log.info("model: %s", target)
    log.info("  %.2f MB; inputs and ids are described in %s.json", megabytes, target.name)
    log.info("  largest difference from the model's own scores: %.1e", written["difference"])
    for rows, largest in written["int8"].items():
        log.info("  int8 tables: largest error of a score on %s: %.1e", rows, largest)
    if files is not None:
        log.info("  raw rows: encoder.py, and examples.json with ten rows and their scores")


def write(
    network: nn.Module,
    saved: Checkpoint,
    target: Path,
    name: str,
    about: dict[str, Any],
    files: ServingFiles | None = None,
    is_int8: bool = False,
) -> dict[str, Any]:
    """Write the file and its description whole or not at all.

    Args:
        network: The network of ``saved``.
        saved: The checkpoint.
        target: The file; its description is written beside it.
        name: A row of ``FORMATS``.
        about: Further entries of the description.
        files: The encoder of raw rows and examples; None: they are not at hand.
        is_int8: Store embeddings as int8.

    Returns:
        ``difference`` of the file's scores from those of its network, and ``int8``: the largest
        error of a score by rows, empty without int8.

    Raises:
        UserError: Scores of the written file differ from the network.
    """
    temporary = target.with_name(f".{target.name}.tmp-{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        path, servable = temporary / target.name, Servable(network, saved.schema, is_int8)
        FORMATS[name].write(servable, example_inputs(saved.schema), path)
        scores = FORMATS[name].read(path)
        exact = (lambda inputs: servable(inputs)["logit"]) if is_int8 else None
        difference = largest_difference(network, saved.schema, scores, exact)
        if not difference <= TOLERANCE:
            raise UserError(
                f"format={name}: exported scores differ from the model's own by {difference:.1e},"
                f" more than {TOLERANCE:.0e}; nothing is kept"
            )
        errors = serving_files.int8_errors(network, servable, files) if is_int8 else {}
        if files is not None:
            files.write(temporary, target.name, errors)
        parts = sorted(temporary.iterdir())
        description = {
            "format": FORMAT,
            "files": {part.name: file_digest(part) for part in parts},
            "largest_difference": difference,
            **({"int8": {"largest_error": errors}} if is_int8 else {}),
            **about,
            **describe_servable(servable, saved.model),
        }
        beside = temporary / f"{target.name}.json"
        beside.write_text(json.dumps(description, indent=1, allow_nan=False))
        for part in (*parts, beside):
            part.replace(target.with_name(part.name))
        data = target.with_name(f"{target.name}.data")
        if data.name not in {part.name for part in parts}:
            data.unlink(missing_ok=True)
    except OSError as error:
        error.filename = error.filename or str(target)
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        with suppress(OSError):
            target.parent.rmdir()  # if it is empty
    return {"difference": difference, "int8": errors}


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


def _versions(name: str) -> dict[str, str]:
    packages = ("cki-rec", "torch", "polars", *FORMATS[name].packages)
    versions = {package: installed_version(package) for package in packages}
    return {"python": platform.python_version(), **{p: v for p, v in versions.items() if v}}
