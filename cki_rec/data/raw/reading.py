"""Parts common to all readers of raw formats: files, bad rows and times.

A reader yields chunks (``chunks``) whose rows have the common form. This is a polars frame with
``LABEL`` (UInt8), ``TIME`` (Int64 seconds, if rows have times) and ``SPLIT`` (UInt8, if files
define the split). The columns of the fields are String, or a list of it (null: missing), or Int64
and Float64 for numbers.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Any

import polars as pl

from cki_rec.config import Data, Split, UserError
from cki_rec.data.raw.content import check_kind, decoded, is_zip

LABEL, TIME, SPLIT, LINE = "@label", "@time", "@split", "@line"
"""Columns of the common form that are not raw columns."""
EXAMPLES = 3
"""Most skipped rows that are shown per reason."""
LONGEST_LINE = 1 << 24
"""Most bytes of a line."""
BOM = b"\xef\xbb\xbf"
NOT_READABLE = (zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, EOFError, NotImplementedError)
TIME_FIELDS = {
    "hour": lambda time: time.dt.hour().cast(pl.String),
    "weekday": lambda time: (time.dt.weekday() % 7).cast(pl.String),
    "weekend": lambda time: (time.dt.weekday() > 5).cast(pl.Int8).cast(pl.String),
}
"""Fields of every format with times; Sunday is weekday 0, times are UTC."""


def no_progress(_: int) -> None:
    """Show nothing."""


@dataclass(slots=True)
class Reading:
    """State of one pass over raw files: options, and facts collected besides the rows."""

    on_bad_row: str
    """``error`` stops at a bad row; ``skip`` counts it and stores the first examples."""
    block_bytes: int = 1 << 24
    """Bytes of text to read at a time."""
    advance: Callable[[int], None] = no_progress
    """Callback for progress; receives the number of bytes read from disk."""
    counts: dict[str, int] = field(default_factory=dict)
    """Number of skipped rows by reason."""
    examples: dict[str, list[str]] = field(default_factory=dict)
    """First skipped rows by reason."""
    has_published: bool = True
    """Whether to compute the md5 of texts, which identifies published ones."""
    fix: str = "skip such rows with data.on_bad_row=skip"  # for rows that have no other
    line: int = 1
    """Number of the next line in the current text."""
    md5: dict[str, str] = field(default_factory=dict)
    """Name of a text without folder and ``.gz`` -> md5 of its content."""
    num_usable: int = 0
    """Number of good rows in the current file so far."""

    def fork(self) -> Reading:
        """Return the state for one chunk, which ``merge`` adds to this one."""
        return Reading(self.on_bad_row, self.block_bytes, has_published=False, fix=self.fix)

    def merge(self, other: Reading, num_usable: int) -> None:
        """Add the bad rows and the number of good rows of the next chunk."""
        self.num_usable += num_usable
        for reason, count in other.counts.items():
            self.counts[reason] = self.counts.get(reason, 0) + count
            examples = self.examples.setdefault(reason, [])
            examples += other.examples[reason][: EXAMPLES - len(examples)]

    def skip(
        self,
        reason: str,
        where: str,
        text: str,
        expected: str,
        fix: str = "",
        rows: int = 1,
        thing: str = "line",
    ) -> None:
        """Record one bad row.

        Args:
            reason: A few words.
            where: The file and the line.
            text: The row.
            expected: Description of a good row.
            fix: The option that reads such rows; empty: they can only be skipped.
            rows: Number of rows to count, more than 1 for lines after quotes that never close.
            thing: The part of the file to correct.

        Raises:
            UserError: ``on_bad_row`` is ``error``.
        """
        shown = repr(text if len(text) <= 80 else text[:77] + "...")
        if self.on_bad_row == "error":
            raise UserError(
                f"{where}: {reason}: found {shown}, expected {expected}; correct the {thing}, or "
                f"{fix or self.fix}"
            )
        self.counts[reason] = self.counts.get(reason, 0) + rows
        examples = self.examples.setdefault(reason, [])
        if len(examples) < EXAMPLES:
            examples.append(f"{where}: {shown}")

    def summary(self) -> str:
        """Return the reasons of skipped rows, with counts and first examples."""
        parts = [
            f"{count:,} rows: {reason}, e.g. {self.examples[reason][0]}"
            for reason, count in self.counts.items()
        ]
        return "; ".join(parts)


@dataclass(frozen=True, slots=True)
class Text:
    """A file of lines: plain, compressed by gzip, or a member of a zip."""

    path: Path
    member: str | None = None
    encoding: str = "utf-8"
    """Encoding of the file; blocks are UTF-8 always."""

    @property
    def name(self) -> str:
        """Return the name without folder and ``.gz``."""
        return PurePosixPath(self.member or self.path.name).name.removesuffix(".gz")

    def __str__(self) -> str:
        """Return the name for messages."""
        return f"{self.path} (member {self.member})" if self.member else str(self.path)

    def blocks(self, reading: Reading, keep_returns: bool = False) -> Iterator[bytes]:
        """Yield blocks of whole lines; every line ends with a newline.

        A byte order mark at the start is removed, and so are carriage returns before newlines
        unless ``keep_returns`` is set. The caller keeps ``reading.line`` up to date, for messages.

        Raises:
            UserError: The file is absent, unreadable, truncated, empty or without newlines.
        """
        digest, position, is_empty = hashlib.md5(usedforsecurity=False), 0, True
        reading.line = 1
        with self._open() as (file, raw):
            while block := self._read(file, reading, is_empty):
                if reading.has_published:
                    digest.update(block)
                reading.advance(max(0, raw.tell() - position))
                position = max(position, raw.tell())
                if is_empty:
                    block = block.removeprefix(BOM)
                if not block:
                    break
                is_empty = False
                if b"\r" in block and not keep_returns:
                    block = block.replace(b"\r\n", b"\n")
                yield block if block.endswith(b"\n") else block.removesuffix(b"\r") + b"\n"
        if is_empty:
            raise UserError(f"{self}: empty, expected one row per line; fetch the file again")
        if reading.has_published:
            is_new = self.name not in reading.md5
            name = self.name if is_new else f"{self.path.parent.name}/{self.name}"
            reading.md5[name] = digest.hexdigest()

    def first_line(self) -> str:
        """Return the first line without its newline."""
        block = next(self.blocks(Reading("error", block_bytes=1 << 16, has_published=False)))
        return block.split(b"\n", 1)[0].decode("utf-8", errors="replace")

    def _read(self, file: IO[bytes], reading: Reading, is_first: bool) -> bytes:
        """Return the next whole lines; an empty text at the end of the file."""
        try:
            block = file.read(max(reading.block_bytes, len(BOM)))
            if block and not block.endswith(b"\n"):
                block += file.readline(LONGEST_LINE)
        except (*NOT_READABLE, RuntimeError) as error:
            raise self._damaged(error, self._count_lines()) from None
        except UnicodeError as error:
            raise UserError(
                f"{self}: not in the encoding {self.encoding} ({error}); set data.encoding"
            ) from None
        except OSError as error:
            raise _unreadable(str(self), error) from None
        if is_first:
            check_kind(self, block)
        is_one_line = b"\n" not in block[:-1]
        if is_one_line and len(block) > LONGEST_LINE:
            raise self._without_newlines(block, reading.line)
        if is_one_line and is_first and b"\r" in block.rstrip(b"\r\n"):
            raise self._without_newlines(block, 1)
        return block

    def _without_newlines(self, text: bytes, line: int) -> UserError:
        if b"\r" in text:
            return UserError(
                f"{self}, line {line}: lines end with a carriage return alone, expected newlines; "
                "convert the file, e.g. with: tr '\\r' '\\n'"
            )
        return UserError(
            f"{self}, line {line}: longer than {LONGEST_LINE:,} bytes, expected one row per line; "
            "set data.raw to a text file"
        )

    @contextmanager
    def _open(self) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
        """Yield the content and the file on disk that contains it."""
        try:
            raw = self.path.open("rb")
        except OSError as error:
            raise _unreadable(str(self.path), error) from None
        with raw:
            try:
                file: IO[bytes] = raw
                if self.member is not None:
                    file = zipfile.ZipFile(raw).open(self.member)
                file = decoded(file, self.encoding)
            except (*NOT_READABLE, RuntimeError) as error:
                raise self._damaged(error, 0) from None
            yield file, raw

    def _count_lines(self) -> int:
        """Return the number of readable whole lines of a damaged file."""
        lines = 0
        with self._open() as (file, _):
            try:
                while piece := file.read(1 << 12):
                    lines += piece.count(b"\n")
            except (*NOT_READABLE, RuntimeError):
                return lines
        return lines

    def _damaged(self, error: BaseException, lines: int) -> UserError:
        return UserError(
            f"{self}: damaged or truncated after line {lines} ({error}); "
            "fetch it again or set data.raw"
        )


def texts(data: Data) -> list[Text]:
    """Return the texts that ``data.raw`` names; numbers in names sort as numbers.

    A zip must contain exactly one text.

    Raises:
        UserError: A path is absent, a folder, or a zip of several files.
    """
    listed_texts: list[Text] = []
    for path in paths(data):
        if path.is_dir():
            content = ", ".join(RawFiles(path).members()[:5]) or "nothing"
            raise UserError(
                f"{path}: is a folder (contains {content}), expected files; set data.raw to them, "
                f"e.g. data.raw='{path}/*'"
            )
        if is_zip(path):
            members = RawFiles(path).members()
            if len(members) != 1:
                raise UserError(
                    f"{path}: contains {len(members)} files ({', '.join(members[:5])}), expected "
                    "one; unpack it and set data.raw to the file"
                )
            listed_texts.append(Text(path, members[0], data.encoding))
        else:
            listed_texts.append(Text(path, encoding=data.encoding))
    names = [(text.path.parent, text.name) for text in listed_texts]
    twice = sorted({name for folder, name in names if names.count((folder, name)) > 1})
    if twice:
        raise UserError(
            f"data.raw={data.raw}: names {twice[0]} both plain and compressed; name one of them"
        )
    return listed_texts


def text_paths(data: Data) -> list[Path]:
    """Return the files on disk that ``texts`` reads."""
    return [text.path for text in texts(data)]


def no_column(_: Data) -> None:
    """Return None: the format has no column of users, or of items."""
    return None


def paths(data: Data) -> list[Path]:
    """Return the paths that ``data.raw`` names.

    Raises:
        UserError: A path does not exist, or a pattern matches nothing.
    """
    words = data.raw if isinstance(data.raw, list) else [data.raw]
    files: list[Path] = []
    for word in words:
        if not isinstance(word, str) or not word:
            raise UserError(f"data.raw={word!r}: expected a path, a pattern or a list of them")
        matches = [word] if Path(word).exists() else glob.glob(word)
        if not matches:
            how = f"or fetch it with: make data-{data.name}"
            if data.download.url is None:
                how = f"or {data.download.by_hand or 'get it from its owner'}"
            how = "" if data.format == "csv" and not data.published else f", {how}"
            raise UserError(
                f"{word}: no such file or folder; set data.raw to the raw data{how} (see"
                " data/README.md)"
            )
        files += sorted((Path(match) for match in matches), key=_natural)
    if len({path.resolve() for path in files}) < len(files):
        raise UserError(f"data.raw={data.raw}: names a file twice; name each file once")
    if not files:
        raise UserError("data.raw: empty; name at least one file")
    return files


def draws_validation(split: Split) -> bool:
    """Return whether validation rows are drawn from the training rows.

    This is the case where files define the split and the test share of ``fractions`` is 0.
    """
    return split.by == "files" and len(split.fractions) == 3 and split.fractions[2] == 0


def with_time_fields(frame: pl.DataFrame, names: list[str]) -> pl.DataFrame:
    """Return ``frame`` with the columns ``names`` of ``TIME_FIELDS``."""
    time = pl.from_epoch(TIME)
    return frame.with_columns(TIME_FIELDS[name](time).alias(name) for name in names)


@dataclass(frozen=True, slots=True)
class RawFiles:
    """The files of a data set in a zip or a folder.

    Raises:
        UserError: From any method: the file is absent, unreadable or damaged.
    """

    path: Path

    def find(self, name: str) -> str | None:
        """Return the member with a file name, at the top or one folder below, or None."""
        matches = [m for m in self.members() if PurePosixPath(m).name == name]
        matches.sort(key=lambda member: (member.count("/"), member))
        if len(matches) > 1 and matches[0].count("/") == matches[1].count("/"):
            raise UserError(
                f"{self.path}: contains {name} twice ({matches[0]}, {matches[1]}), expected one "
                "data set; set data.raw to the folder of one of them"
            )
        return matches[0] if matches else None

    def members(self) -> list[str]:
        """Return the names of all files at the top or one folder below, without hidden ones."""
        try:
            if self.path.is_dir():
                both = [*self.path.glob("*"), *self.path.glob("*/*")]
                names = sorted(p.relative_to(self.path).as_posix() for p in both if p.is_file())
            else:
                with zipfile.ZipFile(self.path) as archive:
                    names = archive.namelist()
        except zipfile.BadZipFile as error:
            raise self._damaged(str(error)) from None
        except OSError as error:
            raise _unreadable(str(self.path), error) from None
        return [n for n in names if not n.endswith("/") and not _is_hidden(n)]

    def text(self, member: str, encoding: str = "utf-8") -> Text:
        """Return a member as a text."""
        if self.path.is_dir():
            return Text(self.path / member, encoding=encoding)
        return Text(self.path, member, encoding)

    def read(self, member: str) -> bytes:
        """Return the content of a member."""
        try:
            if self.path.is_dir():
                return (self.path / member).read_bytes()
            with zipfile.ZipFile(self.path) as archive:
                return archive.read(member)
        except (*NOT_READABLE, RuntimeError) as e:
            raise self._damaged(str(e)) from None
        except OSError as error:
            raise _unreadable(str(self.text(member)), error) from None

    def on_disk(self, members: list[str]) -> list[Path]:
        """Return the files on disk that contain ``members``: the zip, or the files themselves."""
        return [self.path / m for m in members] if self.path.is_dir() else [self.path]

    def _damaged(self, problem: str) -> UserError:
        return UserError(
            f"{self.path}: damaged or not a zip ({problem}), expected a zip or a folder; fetch it"
            " again or set data.raw. A csv file of your own is read with data=csv"
        )


def _is_hidden(name: str) -> bool:
    """Return whether a system wrote a file for itself: ``.DS_Store``, ``._x.txt``."""
    parts = PurePosixPath(name).parts
    return parts[0] == "__MACOSX" or any(part.startswith(".") for part in parts)


def _unreadable(where: str, error: OSError) -> UserError:
    return UserError(f"{where}: cannot be read: {error.strerror or error}; set data.raw")


def _natural(path: Path) -> list[Any]:
    """Return a key that sorts ``day_2`` before ``day_10``."""
    return [
        (0, int(word), "") if word.isdigit() else (1, 0, word)
        for word in re.split(r"(\d+)", str(path))
    ]
