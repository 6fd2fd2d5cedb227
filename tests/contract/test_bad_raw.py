"""Every damage of every format gives one line with file and line; the good set stays."""

import errno
import gc
import gzip
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import Mock

import pytest
from samples import GOLDEN, LATEST, make_data, read_rows

from cki_rec import cli
from cki_rec.config import Data, Split, UserError
from cki_rec.data.columns import ColumnFile
from cki_rec.data.encoding.store import EncodedDataset, prepare
from cki_rec.data.raw.formats import avazu, criteo
from cki_rec.data.raw.reading import LINE

SPLIT = Split(by="random", fractions=[0.6, 0.2, 0.2], seed=0)


@dataclass(frozen=True)
class Sample:
    """Good rows of one format, and how to make them bad."""

    choice: str
    file: str
    header: str | None
    rows: list[str]
    separator: str
    number: int | None
    """LoopState of a field that is a number; None: there is none."""
    label: int | None
    """LoopState of the label; None: it is not a field."""
    fields: list
    beside: Path | None = None
    """A folder of files that belong to it; ``data.raw`` is the folder then."""

    def write(self, folder: Path, change: Callable[[list[bytes]], bytes] | None = None) -> Path:
        """Write the sample, its lines changed; return the file."""
        if self.beside is not None:
            shutil.copytree(self.beside, folder)
        folder.mkdir(exist_ok=True)
        lines = [line.encode() for line in [*([self.header] if self.header else []), *self.rows]]
        (folder / self.file).write_bytes((change or joined)(lines))
        return folder / self.file

    def data(self, file: Path, **changes) -> Data:
        raw = file if self.beside is None else file.parent
        defaults = {"published": None, "name": "sample", "min_count": 1}
        return make_data(
            self.choice, raw=str(raw), fields=self.fields, split=SPLIT, **(defaults | changes)
        )

    @property
    def bad_line(self) -> int:
        """Return the number that a line after three rows gets."""
        return 4 + (self.header is not None)


def joined(lines: list[bytes], end: bytes = b"\n") -> bytes:
    return b"".join(line + end for line in lines)


def golden(path: Path) -> list[str]:
    return path.read_text().splitlines()


CRITEO = ["\t".join([str(n % 2), *map(str, range(n, n + 13)), *"abcdefghijklmnopqrstuvwxyz"])
          for n in range(20)]  # fmt: skip
AVAZU = [f"{n},{n % 2},141021{n:02}," + ",".join(f"x{n % 3}" for _ in avazu.CATEGORIES)
         for n in range(20)]  # fmt: skip
SHOP = [f"{n % 2},u{n % 4},i{n % 5},{n / 2}" for n in range(20)]
SEQUENCES = [f"u{n} " + " ".join(f"i{(n + k) % 9}" for k in range(5)) for n in range(20)]
PAIR, OF_1M, OF_BOOKS = ["user", "item"], GOLDEN / "movielens_1m", GOLDEN / "douban_book"
RATINGS, DAT = "ratings.csv", golden(OF_1M / "ratings.dat")
CSV, BOOKS = golden(LATEST / RATINGS), golden(OF_BOOKS / "user_book.dat")
SAMPLES = {
    "criteo": Sample("criteo", "train.txt", None, CRITEO, "\t", 3, 0, ["I1", "C1"]),
    "avazu": Sample("avazu", "train.csv", avazu.HEADER, AVAZU, ",", 2, 1, ["hour", "C1"]),
    "csv": Sample("frappe_x1", "a.csv", "label,user,item,price", SHOP, ",", 3, 0,
                   ["user", {"name": "price", "kind": "numeric"}]),
    "ratings_csv": Sample("movielens_small", RATINGS, CSV[0], CSV[1:], ",", 3, None, PAIR, LATEST),
    "dat": Sample("movielens_1m", "ratings.dat", None, DAT, "::", 3, None, PAIR, OF_1M),
    "hin": Sample("douban_book", "user_book.dat", None, BOOKS, "\t", 2, None, PAIR, OF_BOOKS),
    "sequences": Sample("amazon_beauty", "Beauty.txt", None, SEQUENCES, " ", None, None, PAIR),
}  # fmt: skip


def fewer(sample: Sample) -> bytes:
    fields = sample.rows[5].split(sample.separator)
    return sample.separator.join(fields[:1] if sample.choice == "amazon_beauty" else fields[:-1])


def more(sample: Sample) -> str | None:
    is_open = sample.choice == "amazon_beauty"
    return None if is_open else sample.rows[5] + sample.separator + "1"


def replaced(position: int | None, sample: Sample, word: str) -> str | None:
    if position is None:
        return None
    fields = sample.rows[5].split(sample.separator)
    return sample.separator.join([*fields[:position], word, *fields[position + 1 :]])


ROW_FAULTS = {
    "fewer fields": ("missing field", fewer),
    "more fields": ("extra field", more),
    "word for a number": ("not a number", lambda s: replaced(s.number, s, "many")),
    "word for a label": ("not a number", lambda s: replaced(s.label, s, "yes")),
    "label 2": ("not a label", lambda s: replaced(s.label, s, "2")),
    "no label": ("missing field", lambda s: replaced(s.label, s, "")),
    "NUL": ("NUL byte", lambda s: "\0" + s.rows[5][1:]),
    "return": ("carriage return", lambda s: f"{s.rows[5]}\r{s.rows[6]}"),
    "invalid UTF-8": ("not UTF-8", lambda s: "\udcff" + s.rows[5][1:]),
    "header again": ("repeated header", lambda s: s.header),
}
ROW_CASES = [
    (form, fault)
    for form, sample in SAMPLES.items()
    for fault, (_, make) in ROW_FAULTS.items()
    if make(sample) is not None
]


def with_line(sample: Sample, line: str) -> Callable[[list[bytes]], bytes]:
    content, place = line.encode(errors="surrogateescape"), sample.bad_line - 1
    return lambda lines: joined([*lines[:place], content, *lines[place:]])


def cut_gz(lines: list[bytes]) -> bytes:
    content = gzip.compress(joined(lines))
    return content[: len(content) // 2]


def flipped_gz(lines: list[bytes]) -> bytes:
    content = bytearray(gzip.compress(joined(lines)))
    content[-6] ^= 0xFF  # of the checksum
    return bytes(content)


FILE_FAULTS = {
    "empty": lambda lines: b"",
    "mark alone": lambda lines: b"\xef\xbb\xbf",
    "blank": lambda lines: b" \n\n  \n",
    "newlines": lambda lines: b"\n\n\n",
    "returns": lambda lines: joined(lines, b"\r"),
    "zeros": lambda lines: bytes(1000),
    "UTF-16": lambda lines: joined(lines).decode().encode("utf-16"),
    "header alone": lambda lines: joined(lines[:1]),
    "cut gz": cut_gz,
    "garbage gz": lambda lines: b"\x1f\x8b" + bytes(range(256)),
    "flipped gz": flipped_gz,
}
EXPECTED = {
    "empty": "empty, expected one row per line",
    "mark alone": "empty, expected one row per line",
    "returns": "line 1: lines end with a carriage return alone, expected newlines; ",
    "header alone": "no usable row, expected rows of ",
    "cut gz": "damaged or truncated after line ",
    "garbage gz": "damaged or truncated after line 0 ",
    "flipped gz": "damaged or truncated after line ",
    "absent": "no ",
}
FILE_CASES = [
    (form, fault)
    for form, sample in SAMPLES.items()
    for fault in [*FILE_FAULTS, "directory", "absent"]
    if not (fault.endswith("gz") and sample.beside)
    and not (fault == "header alone" and not sample.header)
]


def damaged(sample: Sample, folder: Path, fault: str) -> Path:
    """Write the sample with a damaged file; return it."""
    if fault in FILE_FAULTS:
        file = sample.write(folder, FILE_FAULTS[fault])
        return file.rename(f"{file}.gz") if fault.endswith("gz") else file
    file = sample.write(folder)
    file.unlink()
    if fault == "directory":
        file.mkdir()
    return file


def error_of(data: Data, encoded: Path) -> str:
    with pytest.raises(UserError) as caught:
        prepare(data, encoded)
    message = str(caught.value)
    assert not {"\n", "\0"} & set(message)
    assert len(message) < 1000
    return message


@pytest.fixture(params=list(SAMPLES))
def form(request) -> str:
    return request.param


@pytest.fixture
def good(tmp_path, tmp_path_factory):
    """Function (sample) -> check that the good data set of its name is whole and alone."""

    def make(sample: Sample, encodes: bool = False) -> Callable[..., None]:
        data = sample.data(sample.write(tmp_path / "good"), verify="full")
        if not encodes:  # it is encoded for all tests once
            if not (home := tmp_path_factory.getbasetemp() / f"encoded-{sample.choice}").exists():
                prepare(data, home)
            shutil.copytree(home, tmp_path / "encoded")
        first = prepare(data, tmp_path / "encoded")

        def check(is_alone: bool = True) -> None:
            folders = [path for path in (tmp_path / "encoded").iterdir() if path.is_dir()]
            assert folders == [first.folder] or not is_alone
            assert all(len(EncodedDataset(path, "full")) for path in folders)  # whole, every one
            again = prepare(data, tmp_path / "encoded")
            assert (again.folder, again.hash) == (first.folder, first.hash)
            assert len(again.rows("train")) == first.manifest["splits"]["train"]["rows"]

        return check

    return make


@pytest.mark.parametrize(("form", "fault"), ROW_CASES)
def test_bad_row_is_named_or_skipped(tmp_path, good, form, fault):
    sample, (reason, make) = SAMPLES[form], ROW_FAULTS[fault]
    check = good(sample)
    file = sample.write(tmp_path / "bad", with_line(sample, make(sample)))
    message = error_of(sample.data(file), tmp_path / "encoded")
    assert message.startswith(f"{file}, line {sample.bad_line}: {reason}: found ")
    assert ", expected " in message
    assert "; correct the line, or " in message
    is_csv_label = form == "csv" and "label" in fault and fault != "no label"
    end = "data.labels={" if is_csv_label else "skip such rows with data.on_bad_row=skip"
    assert (end in message) if is_csv_label else message.endswith(end)
    check()
    frame, reading = read_rows(sample.data(file, on_bad_row="skip"))
    want, _ = read_rows(sample.data(tmp_path / "good" / sample.file))
    assert reading.counts == {reason: 1}
    assert len(reading.examples[reason]) == 1
    if form != "sequences":  # what is drawn beside depends on the line
        assert frame.drop(LINE).equals(want.drop(LINE))
    skipped = prepare(sample.data(file, on_bad_row="skip", name="other"), tmp_path / "encoded")
    assert skipped.manifest["skipped"][reason]["count"] == 1
    assert len(skipped) == len(want)


@pytest.mark.parametrize(("form", "fault"), FILE_CASES)
def test_damaged_file_is_named(tmp_path, good, form, fault):
    sample = SAMPLES[form]
    check = good(sample)
    file = damaged(sample, tmp_path / "bad", fault)
    for on_bad_row in ("error", "skip"):
        message = error_of(sample.data(file, on_bad_row=on_bad_row), tmp_path / "encoded")
        assert str(file) in message or str(file.parent) in message
        assert file.name in message
        assert EXPECTED.get(fault, "expected") in message
        assert "; " in message  # what to do comes after what is wrong
        check()


@pytest.mark.parametrize("is_packed", [True, False])
def test_compression_is_read_by_content(tmp_path, form, is_packed):
    """Gzip bytes in a file without ``.gz``, and plain text in a file with it."""
    sample = SAMPLES[form]
    if sample.beside:
        pytest.skip("the file has a fixed name")
    want, _ = read_rows(sample.data(sample.write(tmp_path / "good")))
    file = sample.write(tmp_path / "other")
    if is_packed:
        file.write_bytes(gzip.compress(file.read_bytes()))
    else:
        file = file.rename(f"{file}.gz")
    assert read_rows(sample.data(file))[0].equals(want)


@pytest.mark.parametrize("end", ["crlf", "mark", "mark and crlf", "no newline", "blank lines"])
def test_harmless_differences_are_accepted(tmp_path, form, end):
    sample = SAMPLES[form]
    change = {
        "crlf": lambda lines: joined(lines, b"\r\n"),
        "mark": lambda lines: b"\xef\xbb\xbf" + joined(lines),
        "mark and crlf": lambda lines: b"\xef\xbb\xbf" + joined(lines, b"\r\n"),
        "no newline": lambda lines: joined(lines)[:-1],
        "blank lines": lambda lines: joined(lines) + b"\n \n",
    }[end]
    want, _ = read_rows(sample.data(sample.write(tmp_path / "good")))
    result, _ = read_rows(sample.data(sample.write(tmp_path / "other", change)))
    assert result.equals(want)


@pytest.mark.parametrize(
    "form", [form for form, sample in SAMPLES.items() if sample.label is not None]
)
@pytest.mark.parametrize("label", ["0", "1"])
def test_one_class_is_refused(tmp_path, good, form, label):
    sample = SAMPLES[form]
    check = good(sample)

    def change(lines: list[bytes]) -> bytes:
        rows = [line.decode().split(sample.separator) for line in lines]
        for row in rows[sample.header is not None :]:
            row[sample.label] = label
        return joined([sample.separator.join(row).encode() for row in rows])

    file = sample.write(tmp_path / "bad", change)
    message = error_of(sample.data(file), tmp_path / "encoded")
    assert message.startswith(f"{file}: all training rows have label {label}; ")
    check()


@pytest.mark.parametrize("name", ["ratings_csv", "dat"])
def test_threshold_that_leaves_one_class_is_refused(tmp_path, good, name):
    sample = SAMPLES[name]
    check = good(sample)
    data = sample.data(sample.write(tmp_path / "bad"), label_threshold=0.0)
    message = error_of(data, tmp_path / "encoded")
    assert message.startswith("data.label_threshold=0.0: all training rows have label 1; ")
    check()


@pytest.mark.parametrize("place", [0, 1, -1])
def test_full_disk_leaves_the_good_set(tmp_path, good, form, monkeypatch, place):
    sample, append, calls, full = SAMPLES[form], ColumnFile.append, [], [10**9]

    def fail(self, array):
        calls.append(array)
        if len(calls) == full[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        append(self, array)

    monkeypatch.setattr(ColumnFile, "append", fail)
    check = good(sample, encodes=True)
    full[0] = range(1, len(calls) + 1)[place]
    calls.clear()
    file = sample.write(tmp_path / "bad", with_line(sample, sample.rows[7].replace("u7", "u99")))
    message = error_of(sample.data(file), tmp_path / "encoded")
    gc.collect()
    assert message.startswith(f"{tmp_path}/encoded/sample-")
    assert "cannot be written: No space left on device; free space" in message
    full[0] = 10**9
    check(is_alone=place != -1)  # the last writes count parts: the set itself is whole by then
    assert len(prepare(sample.data(file), tmp_path / "encoded")) > 0


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """Function (*words) -> exit code and standard error of ``cki-rec prepare``."""
    monkeypatch.setenv("CKI_REC_COMMAND", "cki-rec")
    monkeypatch.setenv(cli.SWEEP_VARIABLE, "0 0")
    ours = logging.getLogger("cki_rec")
    monkeypatch.setattr(ours, "handlers", [])
    monkeypatch.setattr(ours, "propagate", True)
    level = ours.level

    def run(*words: str) -> tuple[int, str]:
        folders = [f"runtime.{name}={tmp_path / name}" for name in ("out", "reports", "encoded")]
        code = cli.main(["prepare", "data.split.by=random", "data.min_count=1", *words, *folders])
        out, error = capsys.readouterr()
        assert "Traceback" not in out + error
        return code, error

    yield run
    ours.setLevel(level)


COMMAND_FILES = [*FILE_FAULTS, "directory", "absent"]


@pytest.mark.parametrize("fault", [*ROW_FAULTS, *COMMAND_FILES, "one class"])
def test_command_ends_with_2_and_one_line(tmp_path, command, fault):
    needs_header = fault.startswith("header")
    sample = SAMPLES["avazu" if needs_header else "criteo"]
    if fault in ROW_FAULTS:
        line = ROW_FAULTS[fault][1](sample)
        file = sample.write(tmp_path / "bad", with_line(sample, line))
    elif fault == "one class":
        file = sample.write(
            tmp_path / "bad", lambda lines: joined(lines).replace(b"\n1\t", b"\n0\t")
        )
    else:
        file = damaged(sample, tmp_path / "bad", fault)
    code, error = command(f"data={sample.choice}", f"data.raw={file}")
    assert code == 2
    assert len(error.splitlines()) == 1
    assert error.startswith("cki-rec: ")
    assert str(file) in error
    if fault in ROW_FAULTS:
        assert f"{file}, line {sample.bad_line}: {ROW_FAULTS[fault][0]}: " in error
        code, error = command(f"data={sample.choice}", f"data.raw={file}", "data.on_bad_row=skip")
        assert (code, error) == (0, "")


def test_command_with_a_file_without_labels(tmp_path, command):
    rows = [row.split("\t", 1)[1] for row in CRITEO]
    file = SAMPLES["criteo"].write(tmp_path / "bad", lambda _: joined([r.encode() for r in rows]))
    for mode in ("error", "skip"):
        code, error = command("data=criteo", f"data.raw={file}", f"data.on_bad_row={mode}")
        assert code == 2
        assert f"cki-rec: {file}, line 1: {len(criteo.LAYOUT.columns) - 1} columns" in error


def test_command_with_a_full_disk(tmp_path, command, monkeypatch):
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(ColumnFile, "append", Mock(side_effect=full))
    file = SAMPLES["criteo"].write(tmp_path / "good")
    code, error = command("data=criteo", f"data.raw={file}")
    assert code == 2
    assert error.startswith(f"cki-rec: {tmp_path}/encoded/criteo-")
    assert "cannot be written: No space left on device; free space" in error
    assert [path for path in (tmp_path / "encoded").iterdir() if path.is_dir()] == []
