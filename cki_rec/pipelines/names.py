"""Names of runs: ``name=monday`` names a trained or merged model, and options take the name.

A name is a symbolic link ``<runtime.out>/names/NAME`` to a run directory. Evaluations are reported
under their name instead (``engine.sweeps``), so they leave these links alone.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cki_rec.config import Config, UserError, nearest
from cki_rec.config.texts import is_name

if TYPE_CHECKING:
    from cki_rec.engine.record import Run

NAMES = "names"
"""Folder of names, under ``runtime.out``."""
UNNAMED = "adhoc"
"""The value of ``name`` that names nothing."""

log = logging.getLogger(__name__)


def give(config: Config, run: Run, chosen: Sequence[str] | None = None) -> Run:
    """Let ``name`` name a finished run, whichever run had it before; return the run.

    Args:
        config: Name and folders.
        run: The run.
        chosen: Run ids of the models that are its result; None: it has its own. Several models
            get no name.
    """
    is_first = os.environ.get("RANK", "0") == "0"
    if config.name == UNNAMED or not is_first or (chosen and len(chosen) > 1):
        return run
    out, run_id = Path(config.runtime.out), chosen[0] if chosen else run.path.name
    link = out / NAMES / config.name
    before = os.readlink(link) if link.is_symlink() else ""
    target = str(Path("..") / run_id)
    if target == before:
        return run
    link.parent.mkdir(parents=True, exist_ok=True)
    temporary = link.with_name(f".{link.name}.tmp-{os.getpid()}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    temporary.replace(link)
    was = f", before it was that of {Path(before).name}" if before else ""
    log.info("  %s is the name of %s%s", config.name, run_id, was)
    return run


def names_of(out: Path) -> dict[str, str]:
    """Return name -> run id, for all names whose run exists."""
    links = sorted((out / NAMES).glob("*"))
    return {p.name: Path(os.readlink(p)).name for p in links if p.is_symlink() and p.exists()}


def located(out: Path, word: str) -> Path | None:
    """Return the folder that a word means: a path, a run id, or a name; None: it means nothing."""
    if Path(word).exists() or not is_name(word):
        return Path(word) if Path(word).exists() else None
    if (out / word).exists():
        return out / word
    run_id = names_of(out).get(word)
    return None if run_id is None else out / run_id


def known(out: Path) -> list[str]:
    """Return all names and run ids, for messages."""
    return [*names_of(out), *(path.parent.name for path in out.glob("*/record.json"))]


def resolved(config: Config) -> Config:
    """Return the configuration with paths in place of names.

    They are those of sources, bases, starts and folders of vocabularies.

    Raises:
        UserError: A source is neither a path nor a run nor a name.
    """
    out, merge, suite = Path(config.runtime.out), config.merge, config.suite

    def of_name(source: Any, option: str) -> Any:
        if not isinstance(source, Mapping):
            return source
        if isinstance(source.get("train.start"), Mapping | str):
            start = source["train.start"]
            start = {"path": start} if isinstance(start, str) else start
            return {**source, "train.start": of_name(start, f"{option}, train.start")}
        word = source.get("path")
        if not isinstance(word, str) or Path(word).exists() or not is_name(word):
            return source
        if located(out, word) is None:
            raise UserError(
                f"{option}: {word}: {nearest(word, known(out))}no such file or folder, run or"
                f" name; cki-rec runs lists the runs of {out}"
            )
        link = out / NAMES / word
        return {**source, "path": str(link if link.exists() else out / word)}

    def of_folder(folder: str | None) -> str | None:
        """Return the run that a name means; other folders are returned unchanged."""
        is_word = folder is not None and not Path(folder).exists() and is_name(folder)
        place = located(out, folder) if folder is not None and is_word else None
        return folder if place is None else str(place)

    data = config.data
    return replace(
        config,
        data=replace(
            data,
            vocabularies=[of_folder(folder) or folder for folder in data.vocabularies],
            numbers_from=of_folder(data.numbers_from),
        ),
        merge=replace(
            merge,
            sources=[of_name(source, "merge.sources") for source in merge.sources],
            base=of_name(merge.base, "merge.base"),
            deltas=[of_folder(folder) or folder for folder in merge.deltas],
        ),
        suite=replace(
            suite,
            sources=[of_name(source, "suite.sources") for source in suite.sources],
            base=of_name(suite.base, "suite.base"),
        ),
        train=replace(config.train, start=of_name(config.train.start, "train.start")),
    )
