"""Downloads: a file is complete and verified, or absent, and the next call resumes it."""

import errno
import hashlib
import io
import json
import os
import random
import socket
import threading
from contextlib import nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest.mock import Mock

import pytest

from cki_rec.config import UserError
from cki_rec.data.raw import download
from cki_rec.data.raw.download import fetch

CONTENT = random.Random(0).randbytes(300_000)
CUT = 100_000


class Handler(BaseHTTPRequestHandler):
    """Serves ``server.content`` with the faults that the server's attributes ask for."""

    def do_GET(self):
        server, asked = self.server, self.headers["Range"]
        server.requests.append(asked)
        server.conditions.append(self.headers["If-Range"])
        size = len(server.content)
        validators = {"ETag": server.etag, "Last-Modified": server.modified}
        is_range = asked and server.has_ranges
        if server.heeds_if_range:
            is_range = is_range and self.headers["If-Range"] in validators.values()
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if is_range else 0
        status = server.status or (416 if start and start >= size else 206 if is_range else 200)
        self.send_response(status, server.reason)
        body = server.content[start:] if status in (200, 206) else b"sorry"
        headers = {**validators, "Content-Range": f"bytes */{size}" if server.says_size else None}
        if status == 206:
            headers["Content-Range"] = f"bytes {start + server.shift}-{size - 1}/{size}"
        if server.framing == "length":
            headers["Content-Length"] = str(len(body) + server.extra_length)
        elif server.framing == "chunked":
            headers["Transfer-Encoding"] = "chunked"
        for name in filter(headers.get, headers):
            self.send_header(name, headers[name])
        self.end_headers()
        self.send_body(body)

    def send_body(self, body):
        server, is_cut = self.server, self.server.cuts > 0
        server.cuts -= is_cut
        if server.framing == "chunked":
            body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
        try:
            self.wfile.write(body[: server.cut_at] if is_cut else body)
        except ConnectionError:  # the client has gone
            return
        if is_cut and server.fault == "stall" and not server.stopping.wait(4):
            server.failures.append("the client has waited")
        if is_cut and server.fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            os.close(self.connection.detach())

    def log_message(self, *_):
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = False

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/data.bin"
        self.requests, self.conditions, self.failures = [], [], []
        self.stopping = threading.Event()
        self.content, self.etag, self.modified = CONTENT, '"one"', None
        self.has_ranges = self.heeds_if_range = self.says_size = True
        self.status = self.reason = None
        self.shift = self.extra_length = self.cuts = 0
        self.cut_at, self.fault, self.framing = CUT, "end", "length"

    def handle_error(self, request, address):
        self.failures.append(address)


@pytest.fixture(autouse=True)
def direct_and_quick(monkeypatch):
    monkeypatch.setattr(download, "PAUSE", 0.0)
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture
def server():
    before = set(threading.enumerate())
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.005})
    thread.start()
    yield server
    server.stopping.set()
    server.shutdown()
    server.server_close()
    thread.join()
    assert not server.failures
    assert set(threading.enumerate()) == before


@pytest.fixture
def target(tmp_path) -> Path:
    return tmp_path / "raw" / "data.bin"


def digest(name: str, content: bytes = CONTENT) -> str:
    return hashlib.new(name, content).hexdigest()


def part_of(target: Path) -> Path:
    return target.with_name(f"{target.name}.part")


def facts_of(target: Path) -> Path:
    return target.with_name(f"{target.name}.part.json")


def leave_part(server: Server, target: Path, **changes) -> None:
    """Write what a stopped call leaves."""
    target.parent.mkdir()
    part_of(target).write_bytes(CONTENT[:CUT])
    facts = {"url": server.url, "size": len(CONTENT), "name": "ETag", "validator": server.etag}
    facts_of(target).write_text(json.dumps(facts | changes))


def error_of(url: str, target: Path, **digests: str) -> str:
    with pytest.raises(UserError) as caught:
        fetch(url, target, **digests)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def assert_whole(target: Path, content: bytes = CONTENT) -> None:
    assert target.read_bytes() == content
    assert [path.name for path in target.parent.iterdir()] == [target.name]


def assert_goes_on(server: Server, target: Path) -> None:
    """Check that the first call has left a part and the second fetches the rest only."""
    assert not target.exists()
    remaining = part_of(target).read_bytes()
    assert 0 < len(remaining) < len(CONTENT)
    assert remaining == CONTENT[: len(remaining)]
    server.requests.clear()
    fetch(server.url, target)
    assert_whole(target)
    assert server.requests == [f"bytes={len(remaining)}-"]


def test_plain_fetch(server, target):
    fetch(server.url, target)
    assert_whole(target)
    assert server.requests == [None]


def test_only_a_missing_checksum_is_logged(server, target, monkeypatch):
    lines = []
    monkeypatch.setattr(download.log, "info", lambda text, *values: lines.append(text % values))
    fetch(server.url, target)
    assert lines == [f"{target}: no published checksum; sha256 {digest('sha256')}"]
    target.unlink()
    lines.clear()
    fetch(server.url, target, md5=digest("md5").upper(), sha256=digest("sha256"))
    assert_whole(target)
    assert lines == []


def test_empty_file(server, target):
    server.content = b""
    fetch(server.url, target)
    assert_whole(target, b"")


@pytest.mark.parametrize("framing", ["chunked", "close"])
def test_unknown_length(server, target, framing):
    server.framing = framing
    fetch(server.url, target, sha256=digest("sha256"))
    assert_whole(target)


@pytest.mark.parametrize("fault", ["end", "reset", "stall"])
def test_broken_connection_is_resumed(server, target, fault, monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT", 0.2)
    server.cuts, server.fault = 2, fault
    fetch(server.url, target)
    assert_whole(target)
    assert server.requests == [None, f"bytes={CUT}-", f"bytes={2 * CUT}-"]
    assert server.conditions == [None, '"one"', '"one"']


def test_broken_chunk_is_resumed(server, target):
    server.framing, server.cuts = "chunked", 1
    fetch(server.url, target)
    assert_whole(target)
    assert len(server.requests) == 2
    assert server.requests[1] is not None


@pytest.mark.parametrize("etag", [None, 'W/"weak"'])
def test_last_modified_where_there_is_no_strong_etag(server, target, etag):
    server.etag, server.modified, server.cuts = etag, "Mon, 01 Jan 2024 00:00:00 GMT", 1
    fetch(server.url, target)
    assert_whole(target)
    assert server.requests == [None, f"bytes={CUT}-"]
    assert server.conditions == [None, server.modified]


def test_without_validator_every_connection_starts_anew(server, target):
    server.etag, server.cuts = None, 1
    fetch(server.url, target)
    assert_whole(target)
    assert server.requests == [None, None]


def test_repeated_interruption_leaves_the_part_and_the_next_call_finishes(server, target):
    server.cut_at, server.cuts = 20_000, 99
    message = error_of(server.url, target)
    assert server.url in message
    assert f"120,000 bytes are in {part_of(target)}" in message
    assert "run the same command again to resume" in message
    assert len(server.requests) == 1 + download.RETRIES
    server.cuts = 0
    assert_goes_on(server, target)


@pytest.mark.parametrize("cut_at", [0, CUT])
def test_interruption_without_progress_is_not_retried(server, target, cut_at):
    server.has_ranges, server.cuts, server.cut_at = False, 99, cut_at
    message = error_of(server.url, target)
    assert ("100,000 bytes are" if cut_at else "check the URL and the connection") in message
    assert len(server.requests) == (2 if cut_at else 1)


def test_pause_grows(server, target, monkeypatch):
    pauses = []
    monkeypatch.setattr(download, "PAUSE", 2.0)
    monkeypatch.setattr(download.time, "sleep", pauses.append)
    server.cuts = 2
    fetch(server.url, target)
    assert pauses == [2.0, 4.0]


def test_leftover_part_is_resumed(server, target):
    leave_part(server, target)
    fetch(server.url, target, md5=digest("md5"))
    assert_whole(target)
    assert server.requests == [f"bytes={CUT}-"]


@pytest.mark.parametrize("heeds_if_range", [True, False])
def test_changed_file_starts_anew(server, target, heeds_if_range):
    leave_part(server, target)
    server.content, server.etag = CONTENT[::-1], '"two"'
    server.heeds_if_range = heeds_if_range
    fetch(server.url, target)
    assert_whole(target, CONTENT[::-1])
    assert server.requests == [f"bytes={CUT}-"] + [None] * (not heeds_if_range)


ANOTHER = '{"url": "http://x/y", "size": 300000, "name": "ETag", "validator": "\\"one\\""}'


@pytest.mark.parametrize("facts", ["", "{", "[]", "{}", ANOTHER, None])
def test_part_of_another_or_unknown_file_starts_anew(server, target, facts):
    leave_part(server, target)
    facts_of(target).unlink() if facts is None else facts_of(target).write_text(facts)
    fetch(server.url, target)
    assert_whole(target)
    assert server.requests == [None]


def test_server_without_ranges_starts_anew(server, target):
    server.has_ranges, server.cuts = False, 1
    fetch(server.url, target)
    assert_whole(target)
    assert server.requests == [None, f"bytes={CUT}-"]


@pytest.mark.parametrize(("shift", "facts"), [(5, {}), (0, {"size": 400_000})])
def test_range_that_does_not_fit_starts_anew(server, target, shift, facts):
    leave_part(server, target, **facts)
    server.shift = shift
    fetch(server.url, target)
    assert_whole(target)
    assert server.requests == [f"bytes={CUT}-", None]


@pytest.mark.parametrize(
    ("says_size", "surplus"), [(True, b""), (False, b""), (True, b"more"), (False, b"more")]
)
def test_whole_part_is_used_but_not_a_longer_one(server, target, says_size, surplus):
    server.says_size = says_size
    leave_part(server, target)
    part_of(target).write_bytes(CONTENT + surplus)
    fetch(server.url, target, sha256=digest("sha256"))
    assert_whole(target)
    asked = f"bytes={len(CONTENT + surplus)}-"
    assert server.requests == ([asked, None] if surplus else [asked])


def test_length_that_is_too_large_is_a_cut(server, target):
    server.extra_length = 7
    assert "the connection ended 7 bytes before the end" in error_of(server.url, target)


@pytest.mark.parametrize("name", ["md5", "sha256"])
def test_wrong_digest_deletes_the_part(server, target, name):
    wrong = digest(name, b"other")
    message = error_of(server.url, target, **{name: wrong})
    assert f"{server.url}: expected {name} {wrong}, found {digest(name)}" in message
    assert "run the same command again" in message
    assert "changed at its source" in message
    assert not list(target.parent.iterdir())


def test_existing_target_is_only_checked(server, target):
    fetch(server.url, target)
    server.content = b"other"
    fetch(server.url, target)
    fetch(server.url, target, md5=digest("md5"), sha256=digest("sha256"))
    message = error_of(server.url, target, md5=digest("md5"), sha256="0" * 64)
    assert message.startswith(f"{target}: expected sha256 {'0' * 64}, found {digest('sha256')}")
    assert "delete it" in message
    assert_whole(target)
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("status", "reason"),
    [(404, "Not Found"), (403, "Forbidden"), (500, "Oops"), (416, "Range"), (204, ""), (302, "")],
)
def test_answer_that_is_no_file(server, target, status, reason):
    server.status, server.reason = status, reason
    message = error_of(server.url, target)
    assert message.startswith(f"{server.url}: the server returned {status} {reason}".strip() + ";")
    assert f"fetch the file by hand and put it at {target}" in message
    assert not target.exists()


def test_failing_server_keeps_the_part(server, target):
    leave_part(server, target)
    server.status = 503
    assert f"100,000 bytes are in {part_of(target)}" in error_of(server.url, target)
    server.status = None
    assert_goes_on(server, target)


def test_refused_connection(target):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/x"
    message = error_of(url, target)
    assert f"{url}: cannot be reached: Connection refused" in message
    assert f"put it at {target}" in message


def test_unknown_host(target, monkeypatch):
    lookup = Mock(side_effect=socket.gaierror(socket.EAI_NONAME, "Name or service not known"))
    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    url = "http://no-such-host.invalid/x"
    assert f"{url}: cannot be reached: Name or service not known" in error_of(url, target)


def test_server_that_speaks_no_http(server, target, monkeypatch):
    monkeypatch.setattr(Handler, "do_GET", lambda self: self.wfile.write(b"220 mail\r\n"))
    assert "cannot be reached: 220 mail" in error_of(server.url, target)


@pytest.mark.parametrize("url", ["file:///etc/hostname", "ftp://127.0.0.1/x", "data.zip", ""])
def test_other_schemes_are_refused(target, url):
    assert "expected a URL that starts with http:// or https://" in error_of(url, target)


@pytest.mark.parametrize("url", ["http://[x/y", "http:///x", "http://a:b/x", "http://h/a b"])
def test_malformed_urls(target, url):
    assert error_of(url, target).startswith(f"{url}: cannot be reached: ")


def test_full_disk_keeps_the_part(server, target, monkeypatch):
    class Full(io.BufferedWriter):
        def write(self, block):
            if self.tell() + len(block) > 200_000:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(block)

    def open_full(path, mode="r", **options):
        return Full(io.FileIO(path, "a")) if mode == "ab" else open(path, mode, **options)

    monkeypatch.setattr(download, "BLOCK", 50_000)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", open_full)
        message = error_of(server.url, target)
    assert message.startswith(f"{part_of(target)}: No space left on device")
    assert_goes_on(server, target)


def test_folder_that_cannot_be_created(tmp_path):
    (tmp_path / "file").write_text("")
    message = error_of("http://127.0.0.1:1/x", tmp_path / "file" / "raw" / "x.zip")
    assert message.startswith(f"{tmp_path / 'file'}")


def test_interrupt_keeps_the_part(server, target, monkeypatch):
    advance = Mock(side_effect=[None] * 4 + [KeyboardInterrupt])
    monkeypatch.setattr(download, "BLOCK", 30_000)
    with monkeypatch.context() as patch:
        patch.setattr(download, "progress", lambda *_, **__: nullcontext(advance))
        with pytest.raises(KeyboardInterrupt):
            fetch(server.url, target)
    assert_goes_on(server, target)
