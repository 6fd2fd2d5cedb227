"""Files whose tensors have places, filled row by row, and a journal to go on with after a kill.

The files are made without values (``Stored.blank``). A block of rows is written into its place,
read back and compared; then it is a line of the journal. A program that starts again checks the
blocks of the journal, and writes the others. So the bytes of the files depend on the tensors
alone.
"""

from __future__ import annotations

import errno
import json
import os
import zlib
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from torch import Tensor

from cki_rec.checkpoints.formats import Place
from cki_rec.checkpoints.formats.stored import bytes_of
from cki_rec.engine.block_writer import SYNCED, Written, in_type
from cki_rec.files import write_atomically


class PlacedWriter:
    """Writes rows of tensors into their places; the interface is that of ``BlockWriter``.

    Args:
        places: Per tensor its places: several if it has several names.
        turned: Matrices, written whole, that are stored transposed.
        journal: The journal.
        resume: Go on after the blocks of the journal.
    """

    def __init__(
        self,
        places: Mapping[str, Sequence[Place]],
        turned: Collection[str],
        journal: Path,
        resume: bool,
    ) -> None:
        self._places, self._turned = places, turned
        self._path, self._file = Path(), -1
        self.written = _verified(journal, places) if resume else []
        write_atomically(journal, "".join(map(_line, self.written)).encode())
        self._lines, self._unsynced = journal.open("a"), 0
        self._done = {(block.key, block.start) for block in self.written}

    def __enter__(self) -> PlacedWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file >= 0:
            os.close(self._file)
        self._lines.close()

    def has(self, key: str, first: int) -> bool:
        """Return whether the block of a tensor that begins at a row is in the journal."""
        place = self._places[key][0]
        return (key, place.start + first * place.row_bytes()) in self._done

    def write(
        self, key: str, first: int, block: Tensor, shares: list[float] | None = None
    ) -> None:
        """Write rows of a tensor; rows that the journal has are left out.

        Raises:
            OSError: They cannot be written, or are not read as they were; ``filename`` is set.
            MergeError: Entries do not fit the type of the result.
        """
        if self.has(key, first):
            return
        self._put(key, first, block, shares)

    def finish(self) -> None:
        """Wait for the disk.

        Raises:
            OSError: It reports an error.
        """
        self._open(Path())

    def _put(self, key: str, first: int, block: Tensor, shares: list[float] | None) -> None:
        places = self._places[key]
        tensor = block.t() if key in self._turned else block
        content = bytes_of(in_type(key, tensor, places[0].entry.dtype))
        try:
            for place in places:
                self._fill(place, first, content)
        except OSError as error:
            error.filename = error.filename or str(self._path)
            raise
        offsets = [first, *[0] * (block.ndim - 1)] if block.ndim else []
        start = places[0].start + first * places[0].row_bytes()
        entry = Written(
            *(key, offsets, list(block.shape), start, len(content)),
            *(_checksum(content), places[0].file.name, shares),
        )
        self._lines.write(_line(entry))
        self._lines.flush()
        self.written.append(entry)

    def _fill(self, place: Place, first: int, content: memoryview) -> None:
        self._open(place.file)
        start, left = place.start + first * place.row_bytes(), content
        while len(left):
            left = left[os.pwrite(self._file, left, start + len(content) - len(left)) :]
        self._unsynced += len(content)
        if self._unsynced > SYNCED:  # else the disk begins at the end
            os.fdatasync(self._file)
            self._unsynced = 0
        if os.pread(self._file, len(content), start) != content:
            raise OSError(errno.EIO, "a block is not read as it was written")

    def _open(self, path: Path) -> None:
        """Open a file instead of the present one, which is then on disk; none for no path."""
        if path == self._path:
            return
        if self._file >= 0:
            os.fsync(self._file)
            os.close(self._file)
            self._file = -1
        if path != Path():
            self._file = os.open(path, os.O_RDWR)
        self._path = path


def _verified(journal: Path, places: Mapping[str, Sequence[Place]]) -> list[Written]:
    """Return the blocks of a journal that lie undamaged in their files, up to the first other."""
    blocks: list[Written] = []
    with suppress(OSError, ValueError, TypeError, KeyError):  # no journal, or its last line is cut
        for line in journal.read_text().splitlines():
            block = Written(**json.loads(line))
            for place in places[block.key]:
                first = block.offsets[0] if block.offsets else 0
                with place.file.open("rb") as file:
                    file.seek(place.start + first * place.row_bytes())
                    if _checksum(file.read(block.length)) != block.checksum:
                        return blocks
            blocks.append(block)
    return blocks


def _checksum(content: bytes | memoryview) -> str:
    return f"{zlib.crc32(content):08x}"


def _line(block: Written) -> str:
    return json.dumps({name: getattr(block, name) for name in Written.__slots__}) + "\n"
