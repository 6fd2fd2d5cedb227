"""The content of a raw file as UTF-8: decompressed and recoded, by its first bytes; its name."""

from __future__ import annotations

import codecs
import gzip
import io
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, cast

from cki_rec.config import UserError

GZIP = b"\x1f\x8b"
ZIP = b"PK\x03\x04"
MAGIC = {
    b"PAR1": "Parquet",
    b"ARROW1": "Arrow",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\xfd7zXZ": "xz",
    ZIP: "zip",
}
"""First bytes of files that are no text."""
COLUMNAR = ("Parquet", "Arrow")
"""Kinds that the format ``parquet`` reads."""
UTF_16 = (b"\xff\xfe", b"\xfe\xff")


def decoded(file: IO[bytes], encoding: str) -> IO[bytes]:
    """Return the content of an open file, without compression and in UTF-8.

    Raises:
        UserError: The encoding is unknown.
    """
    if cast(io.BufferedReader, file).peek(len(GZIP))[: len(GZIP)] == GZIP:
        file = cast(IO[bytes], gzip.GzipFile(fileobj=file))
    try:
        is_recoded = codecs.lookup(encoding).name != "utf-8"
        return cast(IO[bytes], io.BufferedReader(_Recoded(file, encoding))) if is_recoded else file
    except LookupError:
        raise UserError(
            f"data.encoding={encoding}: unknown; expected the name of an encoding, "
            "e.g. utf-8, latin-1, cp1252, utf-16"
        ) from None


def check_kind(where: object, start: bytes) -> None:
    """Check that a file is text.

    Args:
        where: Name of the file.
        start: The first bytes of its content.

    Raises:
        UserError: They are those of another kind of file.
    """
    if start.startswith(UTF_16):
        raise UserError(
            f"{where}, line 1: text in UTF-16, expected UTF-8; convert the file, or for format "
            "csv set data.encoding=utf-16"
        )
    kind = next((kind for magic, kind in MAGIC.items() if start.startswith(magic)), None)
    if kind in COLUMNAR:
        raise UserError(
            f"{where}: a file of kind {kind}, expected text; read it with data=parquet"
            " (data.format=parquet)"
        )
    if kind is not None:
        raise UserError(
            f"{where}: a file of kind {kind}, expected text, plain or compressed by gzip; convert "
            "the file"
        )


def is_zip(path: Path) -> bool:
    """Return whether a file is a zip, by its name or its content."""
    try:
        with path.open("rb") as file:
            return path.suffix == ".zip" or file.read(len(ZIP)) == ZIP
    except OSError:
        return path.suffix == ".zip"  # the error is reported when the file is read


class _Recoded(io.RawIOBase):
    """The content of a file in another encoding, as UTF-8."""

    def __init__(self, file: IO[bytes], encoding: str) -> None:
        self._file, self._rest = file, b""
        self._decoder = codecs.getincrementaldecoder(encoding)()

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer with the next bytes; return their number."""
        while not self._rest:
            piece = self._file.read(1 << 16)
            self._rest = self._decoder.decode(piece, final=not piece).encode()
            if not piece:
                break
        size = min(len(buffer), len(self._rest))
        buffer[:size], self._rest = self._rest[:size], self._rest[size:]
        return size


def file_names(files: Sequence[Path]) -> dict[Path, str]:
    """Return the names of files without folder and suffix; with the folder if two are equal."""
    stems = {path: Path(path.name.removesuffix(".gz")).stem for path in files}
    if len(set(stems.values())) == len(stems):
        return stems
    return {path: f"{path.parent.name}/{stem}" for path, stem in stems.items()}
