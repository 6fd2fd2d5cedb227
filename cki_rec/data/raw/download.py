"""Download one file: resume it after a broken connection, and verify it before it appears.

Until then, ``<target>.part`` holds the received bytes, and ``<target>.part.json`` identifies the
file on the server that they belong to.
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
"""Most bytes in memory."""
TIMEOUT = 60.0
"""Seconds without a byte after which a connection counts as broken."""
RETRIES = 5
"""Most retries without progress in between."""
PAUSE = 1.0
"""Seconds before the first retry; before retry n, n times as many."""
_RANGE = re.compile(r"bytes (?:(\d+)-\d+|\*)/(?:(\d+)|\*)")

log = logging.getLogger(__name__)


class _Unavailable(Exception):
    """The server does not provide the file; the message is the reason."""


class _Cut(_Unavailable):
    """The connection broke; the part holds the received bytes."""


def fetch(url: str, target: Path, *, md5: str | None = None, sha256: str | None = None) -> None:
    """Download ``url`` to ``target``; an existing file is only verified.

    An interrupted download leaves the part, and the next call resumes it. A part with a wrong
    digest is deleted. ``target`` appears by one rename.

    Args:
        url: An http or https URL.
        target: Path of the file; its folder is created.
        md5: Expected md5 in hexadecimal digits.
        sha256: Expected sha256 in hexadecimal digits.

    Raises:
        UserError: The file is unreachable, interrupted too often, not the expected one, or not
            writable.
    """
    part = target.with_name(f"{target.name}.part")
    try:
        if target.exists():
            if problem := _problem(target, md5, sha256):
                raise UserError(f"{target}: {problem}; delete it and run the command again")
            log.info("%s: exists already, not fetched again", target)
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        _download(url, part)
        if problem := _problem(part, md5, sha256):
            part.unlink()
            _facts_path(part).unlink(missing_ok=True)
            raise UserError(
                f"{url}: {problem}; the download is deleted, run the same command again. If that "
                "does not help, the file has changed at its source: report it"
            )
        if md5 is None and sha256 is None:
            log.info("%s: no published checksum; sha256 %s", target, file_digest(part, "sha256"))
        part.replace(target)
        _facts_path(part).unlink(missing_ok=True)
    except _Unavailable as error:
        resume = f"{_size(part):,} bytes are in {part}, run the same command again to resume"
        fix = resume if _size(part) else "check the URL and the connection and run it again"
        by_hand = f"fetch the file by hand and put it at {target}"
        raise UserError(f"{url}: {error}; {fix}, or {by_hand}") from None
    except OSError as error:
        raise UserError(
            f"{error.filename or part}: {error.strerror or error}; free space or choose a "
            "writable folder, and run the same command again, which resumes the download"
        ) from None


def _download(url: str, part: Path) -> None:
    """Download the part until it is complete, over several connections if necessary."""
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
            log.info("%s: interrupted after %s bytes (%s), resuming", url, f"{size:,}", cut)
        reached = size
        time.sleep(PAUSE * retry)


def _attempt(url: str, part: Path) -> bool:
    """Fetch the missing bytes over one connection.

    Returns:
        Whether the part fits the file on the server; if not, it is deleted.
    """
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
                log.info("%s: the %s received bytes do not fit, starting anew", url, f"{start:,}")
                part.unlink()
                return False
            size = max(sizes, default=None)
        else:
            reason = getattr(response, "reason", "")  # none after a redirect to ftp
            raise _Unavailable(_text(f"the server returned {response.status} {reason}"))
        _receive(response, part, None if size is None else size - start)
    return True


def _open(url: str, headers: dict[str, str]) -> Any:
    """Return the response, whatever its status is."""
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
    """Append received bytes, block by block: ``left`` of them, or up to the end if None."""
    title = f"fetching {part.stem}"
    with part.open("ab") as file, progress(title, left or 0, unit="bytes") as advance:
        while left is None or left > 0:
            try:  # read1 returns the available bytes, so a broken connection loses none
                block = response.read1(BLOCK if left is None else min(BLOCK, left))
            except (OSError, HTTPException) as error:
                raise _Cut(_text(error)) from None
            if not block and left is None:
                return
            if not block:
                raise _Cut(f"the connection ended {left:,} bytes before the end")
            file.write(block)
            advance(len(block))
            left = None if left is None else left - len(block)


def _read_facts(url: str, part: Path) -> dict[str, Any]:
    """Return the facts that ``_attempt`` wrote; empty if the part cannot be resumed."""
    try:
        facts = json.loads(_facts_path(part).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    is_usable = isinstance(facts, dict) and {"url", "size", "name", "validator"} == facts.keys()
    return facts if is_usable and facts["url"] == url and facts["validator"] else {}


def _problem(path: Path, md5: str | None, sha256: str | None) -> str:
    for name, expected in (("md5", md5), ("sha256", sha256)):
        if expected is None:
            continue
        actual = file_digest(path, name)
        if actual != expected.strip().lower():
            return f"expected {name} {expected}, found {actual}"
    return ""


def _facts_path(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _text(error: object) -> str:
    """Return the reason in one line: the system's text, the message, or the type of the error."""
    return " ".join((getattr(error, "strerror", "") or str(error) or repr(error)).split())


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
