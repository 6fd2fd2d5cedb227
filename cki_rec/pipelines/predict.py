"""Score the raw rows of a file with a trained or merged model."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from cki_rec.config import Config, UserError
from cki_rec.data.encoding.encoder import OWN_TIMES
from cki_rec.data.encoding.frames import FrameRows, encode_frame
from cki_rec.data.encoding.rules import reader_of
from cki_rec.data.raw.served import PARQUET, served_rows
from cki_rec.data.schema import OOV_ID
from cki_rec.engine import evaluator
from cki_rec.pipelines import loading
from cki_rec.pipelines.loading import LoadedModel
from cki_rec.progress import progress

SUFFIXES = (".csv", PARQUET)
"""Forms of the written scores."""
MOST_MB = 4
"""Text of a block, in MiB; narrow rows take a hundred times as much while they are scored."""
CPU = torch.device("cpu")

log = logging.getLogger(__name__)


def run(config: Config) -> None:
    """Score the rows of ``input`` and write ``output``, whole or not at all.

    The output has a line per row of the input, in its order: ``row``, counted from 1, and
    ``score``, the click probability. A block of rows is in memory at a time.

    Raises:
        UserError: The model, the input or the output is not usable.
    """
    source, target = _paths(config)
    model = loading.load(config, config.run)
    num_rows, total, unseen = 0, 0.0, np.zeros(0, np.int64)
    with _writer(target) as write, progress("score", 0) as advance:
        for frame in _frames(source, model, min(config.runtime.chunk_mb, MOST_MB) << 20):
            rows = encode_frame(frame, model.encoder, model.schema, str(source), num_rows + 1)
            scores = score(model, rows)
            write(num_rows, scores)
            num_rows, total = num_rows + len(rows), total + float(scores.sum(dtype=np.float64))
            unseen = _unseen(rows) + (unseen if num_rows > len(rows) else 0)
            advance(len(rows))
    log.info("scores: %s", target)
    log.info("  %s rows, mean score %.4f", f"{num_rows:,}", total / num_rows)
    shares = dict(zip(rows.id_columns, unseen / num_rows, strict=True))
    listed = [f"{name} {share:.1%}" for name, share in shares.items() if share >= 0.001]
    if listed:
        log.info("  values out of vocabulary: %s", ", ".join(listed))


def score(model: LoadedModel, rows: FrameRows) -> NDArray[np.float32]:
    """Return the click probability of every row."""
    places = np.arange(len(rows))
    logits = evaluator.predict(model.network, rows, model.schema, places, CPU)
    return torch.from_numpy(logits).sigmoid().numpy()


def _unseen(rows: FrameRows) -> NDArray[np.int64]:
    counts: NDArray[np.int64] = (rows.ids == OOV_ID).sum(0)
    return counts


def _paths(config: Config) -> tuple[Path, Path]:
    """Return the files to read and to write.

    Raises:
        UserError: One is not named, or the second one cannot be written.
    """
    if config.input is None or config.output is None:
        missing = "input" if config.input is None else "output"
        example = "cki-rec predict run=RUN input=rows.csv output=scores.csv"
        raise UserError(f"{missing}=null: name a .csv or .parquet file, e.g. {example}")
    source, target = Path(config.input), Path(config.output)
    if target.suffix not in SUFFIXES:
        raise UserError(f"output={target}: expected a name that ends with .csv or .parquet")
    if target.is_dir():
        raise UserError(f"output={target}: a folder, expected a file")
    if source.resolve() == target.resolve():
        raise UserError(f"output={target}: is the input; name another file")
    return source, target


def _frames(source: Path, model: LoadedModel, block_bytes: int) -> Iterator[pl.DataFrame]:
    """Yield the rows of a file, as the format of the model's data set describes it."""
    options, encoder = model.dataset.manifest["options"], model.encoder
    names = {*encoder.columns, *OWN_TIMES, *(f"@{f.name}" for f in model.schema.features)}
    return served_rows(
        source,
        encoder.missing,
        names.__contains__,
        block_bytes,
        separator=options.get("separator", "comma"),
        encoding=options.get("encoding", "utf-8"),
        columns=reader_of(model.dataset).columns,
    )


@contextmanager
def _writer(target: Path) -> Iterator[Callable[[int, NDArray[np.float32]], None]]:
    """Yield a function that adds scores to a file, which appears when the block ends.

    Raises:
        UserError: The file cannot be written.
    """
    temporary = target.with_name(f".{target.name}.tmp-{os.getpid()}")
    whole = temporary.with_name(f"{temporary.name}{target.suffix}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(b"row,score\n")

            def write(num_before: int, scores: NDArray[np.float32]) -> None:
                rows = np.arange(num_before + 1, num_before + len(scores) + 1)
                frame = pl.DataFrame({"row": rows, "score": scores})
                frame.write_csv(file, include_header=False)

            yield write
        if target.suffix == PARQUET:
            schema = {"row": pl.Int64, "score": pl.Float32}
            pl.scan_csv(temporary, schema=schema).sink_parquet(whole)
            whole.replace(target)
        else:
            temporary.replace(target)
    except OSError as error:
        raise UserError(
            f"output={target}: cannot be written: {error.strerror or error}; free space or name"
            " another file"
        ) from None
    finally:
        temporary.unlink(missing_ok=True)
        whole.unlink(missing_ok=True)
