"""A disk that is really full: a small file system of our own, filled at many places."""

import subprocess
import sys

import pytest
from samples import ROOT

CHILD = """
import sys
sys.path.insert(0, {tests!r})
from samples import EMBEDDED, FIELDS, make_data
from cki_rec.config import Partition, Split, UserError
from cki_rec.data.encoding.store import prepare
split = Split(by={by!r}, fractions=[0.8, 0.1, 0.1], seed=0)
partition = Partition(by="user", parts=2, seed=0)
data = make_data(raw=str(EMBEDDED), fields=FIELDS, split=split, partition=partition)
try:
    print(len(prepare(data, {disk!r}, workers={workers})))
except UserError as error:
    print(error)
"""


def on_disk_of(size: str, disk: str, command: list[str]) -> subprocess.CompletedProcess:
    """Run a command that sees an empty disk of this size at ``disk``."""
    script = (
        f'mount -t tmpfs -o size={size} tmpfs "{disk}" && "$@"; code=$?; ls "{disk}"; exit $code'
    )
    return subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, "sh", *command],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
    )


@pytest.fixture
def disk(tmp_path) -> str:
    """Return a folder that small disks can be mounted on."""
    path = str(tmp_path / "disk")
    (tmp_path / "disk").mkdir()
    try:
        if on_disk_of("1m", path, ["true"]).returncode == 0:
            return path
    except OSError:
        pass
    return pytest.skip("this machine lets no user mount a file system")


@pytest.mark.dist
@pytest.mark.parametrize(
    ("by", "size", "workers"),
    [
        ("leave_last_out", "5m", 1),
        pytest.param("random", "9m", 1, marks=pytest.mark.slow),
        pytest.param("random", "3m", 2, marks=pytest.mark.slow),
    ],
)
def test_full_disk_is_one_line_and_leaves_nothing(disk, by, size, workers):
    child = CHILD.format(tests=str(ROOT / "tests"), by=by, disk=disk, workers=workers)
    done = on_disk_of(size, disk, [sys.executable, "-c", child])
    assert (done.returncode, done.stderr) == (0, "")
    message, *left = done.stdout.splitlines()
    assert message.startswith(f"{disk}/sample-")
    assert "cannot be written: " in message
    assert "free space or set runtime.encoded" in message
    assert not [name for name in left if ".tmp-" in name]
