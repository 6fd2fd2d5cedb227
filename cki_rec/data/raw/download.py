"""One file from the web: resumed when it is cut, checked before it appears under its name.

Until then ``<target>.part`` holds what has arrived, and ``<target>.part.json`` to which file on
the server those bytes belong.
"""

from __future__ import annotations

import json
import logging
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import Any

from cki_rec.config import UserError
from cki_rec.files import file_digest
from cki_rec.progress import progress

BLOCK = 1 << 20
"""Most bytes held in memory."""
TIMEOUT = 60.0
"""Seconds without a byte after which a connection counts as cut."""
RETRIES = 5
PAUSE = 1.0
"""Seconds before the first retry, twice as many before the second, and so on."""
_RANGE = re.compile(r"bytes (?:(\d+)-\d+|\*)/(?:(\d+)|\*)")

log = logging.getLogger(__name__)


class _Unavailable(Exception):
    """The server does not give the file; says why."""


class _Cut(_Unavailable):
    """The connection broke; what had arrived is in the part."""


def fetch(url: str, target: Path, *, md5: str | None = None, sha256: str | None = None) -> None:
    """Download ``url`` to ``target``; a file that is there already is only checked.

    Whatever stops it, the part stays and the next call goes on from there, unless its digest is
    wrong. ``target`` appears by one rename.

    Args:
        url: http or https.
        target: Its folder is made.
        md5: Expected digest in hexadecimal.
        sha256: The same.

    Raises:
        UserError: Not reachable, cut too often, not the expected file, or not writable.
    """
    part = target.with_name(f"{target.name}.part")
    try:
        if target.exists():
            if problem := _problem(target, md5, sha256):
                raise UserError(f"{target}: {problem}; delete it, then it is fetched again")
            log.info("%s: already there, not fetched again", target)
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        _download(url, part)
        if problem := _problem(part, md5, sha256):
            part.unlink()
            _facts_path(part).unlink(missing_ok=True)
            raise UserError(
                f"{url}: {problem}; what arrived is deleted, run the same command again, and if "
                "that does not help report that the file has changed at its source"
            )
        if md5 is None and sha256 is None:
            log.info("%s: no published checksum; sha256 %s", target, file_digest(part, "sha256"))
        part.replace(target)
        _facts_path(part).unlink(missing_ok=True)
    except _Unavailable as error:
        kept = f"{_size(part):,} bytes are kept in {part}, run the same command again to go on"
        mend = kept if _size(part) else "check the URL and the connection and run it again"
        by_hand = f"fetch the file by hand and put it at {target}"
        raise UserError(f"{url}: {error}; {mend}, or {by_hand}") from None
    except OSError as error:
        raise UserError(
            f"{error.filename or part}: {error.strerror or error}; free space or choose a place "
            "that can be read and written, and run the same command again: what arrived is kept"
        ) from None


def _download(url: str, part: Path) -> None:
    """Fetch the part until it is whole, over as many connections as it takes."""
    reached = 0
    for retry in range(1, RETRIES + 2):
        try:
            if not _attempt(url, part):
                _attempt(url, part)
            return
        except _Cut as cut:
            size = _size(part)
            if size <= reached or retry > RETRIES:
                raise
            log.info("%s: cut after %s bytes (%s), going on", url, f"{size:,}", cut)
        reached = size
        time.sleep(PAUSE * retry)


def _attempt(url: str, part: Path) -> bool:
    """Fetch what is missing over one connection; False: the part did not fit and is deleted."""
    facts = _read_facts(url, part)
    start = _size(part) if facts else 0
    headers = {"User-Agent": "cki-rec"}  # some servers refuse the default of urllib
    if start:
        headers |= {"Range": f"bytes={start}-", "If-Range": facts["validator"]}
    with _open(url, headers) as response:
        if response.status == 200:
            start, size = 0, response.length
            part.write_bytes(b"")  # first: old bytes must never meet the facts of a new file
            is_strong = response.headers.get("ETag", "").startswith('"')
            name = "ETag" if is_strong else "Last-Modified"
            facts = {"url": url, "size": size, "name": name, "validator": response.headers[name]}
            _facts_path(part).write_text(json.dumps(facts), encoding="utf-8")
        elif start and response.status in (206, 416):
            match = _RANGE.fullmatch(response.headers.get("Content-Range", ""))
            first, total = match.groups() if match else (None, None)
            sizes = {facts["size"], int(total) if total else None} - {None}
            is_same = response.headers[facts["name"]] in (None, facts["validator"])
            if response.status == 416 and is_same and sizes == {start}:
                return True
            if first != str(start) or not is_same or len(sizes) > 1:
                log.info("%s: %s bytes kept earlier do not fit, starting anew", url, f"{start:,}")
                part.unlink()
                return False
            size = max(sizes, default=None)
        else:
            reason = getattr(response, "reason", "")  # none after a redirect to ftp
            raise _Unavailable(_text(f"the server answers {response.status} {reason}"))
        _receive(response, part, None if size is None else size - start)
    return True


def _open(url: str, headers: dict[str, str]) -> Any:
    """Return the response, whatever its status."""
    try:
        if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
            raise _Unavailable("expected a URL that starts with http:// or https://")
        request = urllib.request.Request(url, headers=headers)
        return urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        return error
    except (OSError, HTTPException, ValueError) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        is_refused = isinstance(reason, ConnectionRefusedError)
        if isinstance(reason, TimeoutError | ConnectionError) and not is_refused:
            raise _Cut(_text(reason)) from None
        raise _Unavailable(f"cannot be reached: {_text(reason)}") from None


def _receive(response: HTTPResponse, part: Path, left: int | None) -> None:
    """Append what arrives, block by block, until ``left`` bytes or, if None, the end."""
    title = f"fetching {part.stem}"
    with part.open("ab") as file, progress(title, left or 0, unit="bytes") as advance:
        while left is None or left > 0:
            try:  # read1 hands over what is there: a cut loses none of it
                block = response.read1(BLOCK if left is None else min(BLOCK, left))
            except (OSError, HTTPException) as error:
                raise _Cut(_text(error)) from None
            if not block and left is None:
                return
            if not block:
                raise _Cut(f"cut {left:,} bytes before the end")
            file.write(block)
            advance(len(block))
            left = None if left is None else left - len(block)


def _read_facts(url: str, part: Path) -> dict[str, Any]:
    """Return what ``_attempt`` wrote; empty if the part cannot be resumed."""
    try:
        facts = json.loads(_facts_path(part).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    is_usable = isinstance(facts, dict) and {"url", "size", "name", "validator"} == facts.keys()
    return facts if is_usable and facts["url"] == url and facts["validator"] else {}


def _problem(path: Path, md5: str | None, sha256: str | None) -> str:
    for name, expected in (("md5", md5), ("sha256", sha256)):
        if expected is not None and (found := file_digest(path, name)) != expected.strip().lower():
            return f"expected {name} {expected}, found {found}"
    return ""


def _facts_path(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _text(error: object) -> str:
    """Return the reason in one line: the system's words, the message, or the kind of error."""
    return " ".join((getattr(error, "strerror", "") or str(error) or repr(error)).split())


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
