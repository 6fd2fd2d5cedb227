"""A data set is downloaded, verified and encoded by one command; nothing is left of a failure."""

from __future__ import annotations

import hashlib
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
from samples import EMBEDDED

from cki_rec.cli import main


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        """Keep the test's output clean."""


@pytest.fixture(scope="module")
def server():
    handler = partial(Quiet, directory=str(EMBEDDED.parent))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()
        thread.join()


@pytest.fixture
def prepare(tmp_path):
    def run(*words: str) -> int:
        raw = tmp_path / "raw" / "ml.zip"
        places = [f"runtime.encoded={tmp_path / 'encoded'}", f"data.raw={raw}"]
        return main(["prepare", "data=movielens_small", "data.fetch=true", *places, *words])

    return run


def test_fetched_file_is_verified_and_encoded(server, prepare, tmp_path, capsys):
    md5 = hashlib.md5(EMBEDDED.read_bytes()).hexdigest()
    address = f"data.download.url={server}/{EMBEDDED.name}"
    assert prepare(address, f"data.download.md5={md5}") == 0
    assert (tmp_path / "raw" / "ml.zip").read_bytes() == EMBEDDED.read_bytes()
    assert "100,836 rows, 6 fields" in capsys.readouterr().out
    assert prepare("data.download.url=http://127.0.0.1:9/gone") == 0  # it is there


def test_wrong_checksum_leaves_nothing(server, prepare, tmp_path, capsys):
    address = f"data.download.url={server}/{EMBEDDED.name}"
    assert prepare(address, f"data.download.md5={'0' * 32}") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "0" * 32 in error
    assert not (tmp_path / "raw" / "ml.zip").exists()
    assert not (tmp_path / "encoded").exists()


def test_absent_file_names_the_address(server, prepare, capsys):
    assert prepare(f"data.download.url={server}/absent.zip") == 2
    error = capsys.readouterr().err
    assert f"{server}/absent.zip" in error
    assert "404" in error


def test_set_that_no_program_may_fetch_says_what_to_do(tmp_path, capsys):
    raw = tmp_path / "train.txt"
    assert main(["prepare", "data=criteo", "data.fetch=true", f"data.raw={raw}"]) == 2
    error = capsys.readouterr().err
    assert f"{raw}: not there, and no program may fetch it: join the Criteo" in error
    assert "then put it there or set data.raw" in error
