"""Files and folders that are written whole or not at all, and digests."""

import hashlib

import pytest

from cki_rec.files import file_digest, new_folder, write_atomically


def test_write_creates_parents_and_replaces_a_file(tmp_path):
    path = tmp_path / "a" / "b"
    write_atomically(path, b"old")
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert [entry.name for entry in path.parent.iterdir()] == ["b"]


def test_folder_appears_when_the_block_ends(tmp_path):
    with new_folder(tmp_path / "set") as temporary:
        (temporary / "x").write_bytes(b"1")
        assert not (tmp_path / "set").exists()
    assert [entry.name for entry in tmp_path.iterdir()] == ["set"]
    assert (tmp_path / "set" / "x").read_bytes() == b"1"


def test_folder_does_not_appear_after_an_error(tmp_path):
    with pytest.raises(KeyError), new_folder(tmp_path / "set"):
        raise KeyError
    assert not list(tmp_path.iterdir())


def test_leftovers_of_the_same_name_are_removed(tmp_path):
    for name in ("set.tmp-1", "settings.tmp-1"):
        (tmp_path / name).mkdir()
    with new_folder(tmp_path / "set"):
        pass
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["set", "settings.tmp-1"]


@pytest.mark.parametrize("algorithm", ["sha256", "md5"])
def test_digest_of_several_blocks(tmp_path, algorithm):
    content = bytes(range(256)) * 9000  # more than two blocks
    (tmp_path / "x").write_bytes(content)
    digest = hashlib.new(algorithm, content).hexdigest()
    assert file_digest(tmp_path / "x", algorithm) == digest
