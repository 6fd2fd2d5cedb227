"""A trained model at rest -> its network, its vocabularies and its encoder of raw rows."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from cki_rec import checkpoints
from cki_rec.checkpoints import CHECKPOINT, DESCRIPTION, Checkpoint
from cki_rec.checkpoints.formats import is_own
from cki_rec.config import Config, UserError, nearest
from cki_rec.data.dataset import EncodedDataset
from cki_rec.data.encoding import tokens
from cki_rec.data.encoding.encoder import Encoder
from cki_rec.data.encoding.rules import encoder_of
from cki_rec.data.schema import FeatureSchema
from cki_rec.engine import distributed
from cki_rec.engine.record import RECORD, Run
from cki_rec.models import build_model
from cki_rec.pipelines import names


@dataclass(frozen=True, slots=True)
class Named:
    """The model that ``run`` names."""

    checkpoint: Path
    home: Path
    """The run directory, or the checkpoint folder itself."""
    run_id: str | None


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A trained or merged model, with all that its inputs are made of."""

    network: nn.Module
    """The network on the CPU, in evaluation mode."""
    schema: FeatureSchema
    """The fields that it reads."""
    dataset: EncodedDataset
    """The data set of its training rows; of several, the first one."""
    tokens: dict[str, list[str]]
    """Table -> its tokens; the first one has id 2."""
    encoder: Encoder
    """Raw rows -> ids and numbers."""
    config: Config


def load(config: Config, name: str | None, pipeline: str = "predict") -> LoadedModel:
    """Return the model of a run: its folder, its checkpoint folder, or its id.

    Args:
        config: Folders, and the device.
        name: The run. Of an evaluation it is the model that was evaluated.
        pipeline: The command, for messages.

    Raises:
        UserError: There is no such model, or its data sets are not encoded here.
    """
    if name is not None:
        name = _evaluated(config, name)
    source = find(replace(config, run=name), pipeline)
    distributed.start(replace(config.runtime, device="cpu"))
    saved = checkpoints.load(source.checkpoint)
    network = restore(saved, source.checkpoint)
    datasets = data_sets_of(config, saved, name)
    known = tokens_of(saved, source.home, datasets)
    encoder = encoder_of(datasets, saved.schema, known)
    return LoadedModel(network, saved.schema, datasets[0], known, encoder, config)


def data_sets_of(config: Config, saved: Checkpoint, name: str | None) -> list[EncodedDataset]:
    """Return the data sets of a model's training rows; of equal raw rows, the first one.

    Raises:
        UserError: One is not encoded here, or they are not recorded.
    """
    encoded, hashes = Path(config.runtime.encoded), saved.origin.hashes
    if not hashes:
        raise UserError(
            f"{name}: the data sets of its sources are not recorded; merge its sources again"
        )
    found = [data_set(encoded, each) for each in hashes]
    if None in found:
        which = (
            "its data set is" if len(found) == 1 else f"{found.count(None)} of its data sets are"
        )
        raise UserError(
            f"{name}: {which} not encoded in {encoded}; name the folder with"
            " runtime.encoded=FOLDER, or encode it again: cki-rec prepare data=..."
        )
    datasets = [EncodedDataset(encoded / folder) for folder in found if folder is not None]
    by_rows = {dataset.source_rows: dataset for dataset in reversed(datasets)}
    return [dataset for dataset in datasets if by_rows[dataset.source_rows] is dataset]


def find(config: Config, pipeline: str) -> Named:
    """Return the model that ``run`` names: a path, a name, or a run id under ``runtime.out``.

    Raises:
        UserError: No model is named, or the run is missing, unfinished or without a model.
    """
    if config.run is None:
        raise UserError(f"run=null: name a model, e.g. cki-rec {pipeline} run={_example(config)}")
    out = Path(config.runtime.out)
    folder = names.located(out, config.run)
    if folder is None:
        hint = nearest(config.run, names.known(out))
        raise UserError(f"run={config.run}: {hint}no such folder, and no such run in {out}")
    if (folder / DESCRIPTION).is_file():
        is_of_run = folder.name == CHECKPOINT
        home = folder.resolve().parent if is_of_run else folder
        return Named(folder, home, _run_id(home) if is_of_run else None)
    if not is_own(folder):
        raise UserError(
            f"run={config.run}: a checkpoint of another program; {pipeline} needs a model that"
            " cki-rec has trained, and its fields. Use it with the program that wrote it"
            " (docs/how_to/checkpoints.md)"
        )
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
    return Named(folder / CHECKPOINT, folder, _run_id(folder))


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


def tokens_of(
    saved: Checkpoint, home: Path, datasets: Sequence[EncodedDataset]
) -> dict[str, list[str]]:
    """Return the tokens of every table whose ids are no hashes, checked by their digests.

    They are in the data sets, beside the model, or in another encoded data set.

    Raises:
        UserError: They are missing or damaged, or numbers were scaled otherwise.
    """
    encoded = datasets[0].folder.parent
    known = {}
    elsewhere = sorted(path.parent for path in encoded.glob("*/manifest.json"))
    for table_name in dict.fromkeys(feature.table for feature in saved.schema.lookups):
        digest = saved.schema.vocabulary_hashes[table_name]
        if digest.startswith(tokens.HASHED):
            continue
        listing = [d for d in datasets if d.schema.vocabulary_hashes.get(table_name) == digest]
        if listing:
            known[table_name] = listing[0].vocabulary(table_name)
        else:
            beside = home / tokens.FOLDER
            folder = tokens.find_tokens([beside, *elsewhere], {table_name: digest})
            known[table_name] = tokens.read_tokens(folder or beside, table_name, digest)
    for feature, dataset in itertools.product(saved.schema.numbers, datasets):
        ours, theirs = (
            s.vocabulary_hashes.get(feature.name) for s in (saved.schema, dataset.schema)
        )
        if ours != theirs:
            raise UserError(
                f"{home}: numbers of {feature.name} have another scale than in {dataset.folder}"
            )
    return known


def _evaluated(config: Config, name: str) -> str:
    """Return the model of an evaluation; other runs are returned as they are.

    Raises:
        UserError: The evaluation combines several models.
    """
    out = Path(config.runtime.out)
    folder = names.located(out, name)
    record = None if folder is None else Run(folder).record
    members = [] if record is None else record["config"].get("members", [])
    if len(members) > 1:
        raise UserError(f"{name}: combines several models; load one of {', '.join(members)}")
    return members[0] if members else name


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
