"""Raw files of a data set: fetched if absent, identified by digest, compared with published."""

from __future__ import annotations

import glob
import json
import logging
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf

from cki_rec import project_root
from cki_rec.config import Data, UserError, nearest
from cki_rec.data.raw.download import fetch
from cki_rec.data.raw.formats import FORMATS
from cki_rec.files import file_digest, write_atomically

logger = logging.getLogger(__name__)
DIGESTS = "digests.json"
"""Cache of the digests of raw files, in the folder of encoded data sets."""


def fetch_if_absent(data: Data) -> None:
    """Download the raw file, unless it exists.

    Raises:
        UserError: The file has no URL, or the download failed.
    """
    if not isinstance(data.raw, str):
        raise UserError(f"data.raw={data.raw}: several paths with data.fetch=true; set one path")
    if FORMATS[data.format].true_logits is not None or glob.glob(data.raw):
        return
    target = Path(data.raw)
    if data.download.url is None:
        raise UserError(
            f"{target}: not there, and no program may fetch it: {data.download.by_hand}; then put "
            "it there or set data.raw"
        )
    fetch(data.download.url, target, md5=data.download.md5)


def source_facts(data: Data, encoded_dir: Path) -> list[dict[str, Any]]:
    """Return name, size and sha256 of each raw file; digests of unchanged files are cached.

    Raises:
        UserError: A raw file cannot be read.
    """
    cache_path = encoded_dir / DIGESTS
    try:
        cache = json.loads(cache_path.read_text(encoding="utf-8"))
        cache = cache if isinstance(cache, dict) else {}
    except (OSError, ValueError):
        cache = {}
    source = []
    is_changed = False
    for path in FORMATS[data.format].files(data):
        try:
            facts = path.stat()
            stamp = [facts.st_size, facts.st_mtime_ns]
            entry = cache.get(str(path.resolve()))
            if not isinstance(entry, list) or entry[:2] != stamp:
                entry = [*stamp, file_digest(path)]
                cache[str(path.resolve())] = entry
                is_changed = True
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}; set data.raw") from None
        source.append({"name": path.name, "size": facts.st_size, "sha256": entry[2]})
    if is_changed:
        try:
            write_atomically(cache_path, json.dumps(cache, indent=1).encode())
        except OSError as error:  # only a cache: the folder may be read-only and complete
            logger.debug("%s not written: %s", cache_path, error)
    return source


def published_names(data: Data, digests: dict[str, str]) -> dict[str, str | None]:
    """Return raw file -> its name among published files; None: it is not published.

    Args:
        data: The data set.
        digests: Raw file -> md5 of its content.

    Raises:
        UserError: A fetched file differs from the one that ``data.published`` names.
    """
    registry, expected = published_files(data)
    names = {
        md5: f"{name}/{file}" for name, files in registry.items() for file, md5 in files.items()
    }
    for file, md5 in digests.items():
        published = expected.get(file.removesuffix(".csv"), md5)
        if md5 != published:
            problem = (
                f"{file} is not the file published as {data.published} (md5 {md5}, published "
                f"{published})"
            )
            if data.fetch:
                raise UserError(f"{data.raw}: {problem}; delete it and fetch it again")
            logger.warning("%s: results are not comparable", problem)
    return {file: names.get(md5) for file, md5 in digests.items()}


def published_files(data: Data) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """Return all published files by entry, and those of ``data.published``: file -> md5.

    Raises:
        UserError: ``data.published`` is not an entry of ``conf/published.yaml``.
    """
    registry = _registry(project_root() / "conf" / "published.yaml")
    if data.published is not None and data.published not in registry:
        raise UserError(
            f"data.published={data.published}: {nearest(data.published, registry)}"
            f"expected one of {', '.join(registry)}"
        )
    return registry, registry.get(data.published or "", {})


@lru_cache(maxsize=1)
def _registry(path: Path) -> dict[str, dict[str, str]]:
    """Return the published files by entry: file -> md5. A process reads the file once."""
    return cast(dict[str, dict[str, str]], OmegaConf.to_container(OmegaConf.load(path)))
