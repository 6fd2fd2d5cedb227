"""Export of a trained network to one file that serves without our code: ids in, logits out.

Shape legend: B rows, F fields, D embedding size, C fields with one id, L ids of a field with
several, K ids that are attended to, N numbers.
"""

from __future__ import annotations

import importlib.util
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor, nn

from cki_rec.config import UserError
from cki_rec.data.schema import Batch, FeatureSchema
from cki_rec.engine.servable import (
    OUTPUTS,
    Inputs,
    Servable,
    draw_batch,
    free_dims,
    inputs_of,
)
from cki_rec.models.embeddings import FieldEmbeddings

TOLERANCE = 1e-5
"""Largest difference between exported scores and scores of the network."""
LARGEST_ONNX = 2**31 - 2**26
"""Bytes of weights in one ONNX file; more are stored in a second file."""
EXAMPLE_ROWS, EXAMPLE_LENGTH = 3, 2
"""Sizes of the traced batch; torch would treat 0 and 1 as constants."""

Scores = Callable[[Inputs], Tensor]
"""Function of inputs that returns ``(B,)`` logits."""


def write_pt2(servable: Servable, example: Inputs, path: Path) -> None:
    """Write a file for ``torch.export.load(path).module()``."""
    program = _traced(servable, example)
    with path.open("wb") as file:
        forgiving = _Forgiving(file)
        torch.export.save(program, cast(IO[bytes], forgiving))
        if forgiving.error is not None:
            raise forgiving.error


def write_onnx(servable: Servable, example: Inputs, path: Path) -> None:
    """Write an ONNX file; weights above its size limit go to ``<path>.data``."""
    program = _traced(servable, example)
    num_bytes = sum(p.numel() * p.element_size() for p in servable.parameters())
    with _quiet_onnx():
        exported = torch.onnx.export(
            program,
            dynamo=True,
            verbose=False,
            input_names=list(example),
            output_names=list(OUTPUTS),
            dynamic_shapes={"inputs": {name: free_dims(name) for name in example}},
        )
        assert exported is not None
        exported.save(path, external_data=num_bytes > LARGEST_ONNX)


def read_pt2(path: Path) -> Scores:
    """Return the scoring function of an exported program."""
    module = torch.export.load(path).module()
    return lambda inputs: module(inputs)["logit"]


def read_onnx(path: Path) -> Scores:
    """Return the scoring function of an ONNX file, run by onnxruntime on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def scores(inputs: Inputs) -> Tensor:
        arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
        return torch.from_numpy(session.run(["logit"], arrays)[0])

    return scores


@dataclass(frozen=True, slots=True)
class Format:
    """A file format."""

    write: Callable[[Servable, Inputs, Path], None]
    read: Callable[[Path], Scores]
    packages: tuple[str, ...] = ()
    """Required packages besides torch."""


FORMATS = {
    "pt2": Format(write_pt2, read_pt2),
    "onnx": Format(write_onnx, read_onnx, ("onnx", "onnxscript", "onnxruntime")),
}
"""File formats by name, which is the suffix of the file too."""


def check_packages(name: str) -> None:
    """Check that the packages of a format are installed.

    Raises:
        UserError: A package is missing.
    """
    packages = FORMATS[name].packages
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise UserError(
            f"format={name}: {', '.join(missing)} missing; pip install {' '.join(packages)}"
        )


@torch.no_grad()
def largest_difference(
    network: nn.Module, schema: FeatureSchema, scores: Scores, expected: Scores | None = None
) -> float:
    """Return the largest difference between exported scores and the network on random rows.

    ``expected`` takes the place of the network's scores, for tables of int8.

    This is the maximum over probabilities and logits. Differences of logits are relative to the
    largest logit of a batch if that is above 1. Batches have several sizes, and empty, short and
    very long sets and histories. The result is NaN if a score is not finite.
    """
    sparse = network.sparse
    assert isinstance(sparse, FieldEmbeddings)
    generator = torch.Generator().manual_seed(0)
    largest = torch.zeros(())
    for num_rows, longest in ((256, sparse.length + 3), (2, 1), (1, sparse.length), (5, 0)):
        batch = draw_batch(schema, num_rows, longest, generator)
        inputs = inputs_of(batch, schema)
        right, exported = network(batch) if expected is None else expected(inputs), scores(inputs)
        of_logits = (exported - right).abs().max() / right.abs().max().clamp(min=1)
        of_probabilities = (exported.sigmoid() - right.sigmoid()).abs().max()
        largest = torch.maximum(largest, torch.maximum(of_logits, of_probabilities))
    return float(largest)


class OnBatches(nn.Module):
    """A servable network that takes batches, so that it can be evaluated as the network is."""

    def __init__(self, servable: Servable) -> None:
        super().__init__()
        self.servable = servable

    def forward(self, batch: Batch) -> Tensor:
        """Return ``(B,)`` logits."""
        logit: Tensor = self.servable(inputs_of(batch, self.servable.schema))["logit"]
        return logit


def example_inputs(schema: FeatureSchema) -> Inputs:
    """Return inputs for tracing, where only shapes matter."""
    generator = torch.Generator().manual_seed(0)
    return inputs_of(draw_batch(schema, EXAMPLE_ROWS, EXAMPLE_LENGTH, generator), schema)


class _Forgiving(io.RawIOBase):
    """A file that stores its first error, because torch's writer aborts the process on errors."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        """Write, unless a write has failed before; return the number of bytes in both cases."""
        if self.error is None:
            try:
                self.file.write(data)
            except OSError as error:
                self.error = error
        return len(data)

    def writable(self) -> bool:
        """Return True, as torch requires."""
        return True

    def seekable(self) -> bool:
        """Return True, as torch requires."""
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        """Stay at the end, although torch seeks back after writing."""
        return offset


def _traced(servable: Servable, example: Inputs) -> torch.export.ExportedProgram:
    """Return the exported program with dynamic numbers of rows and ids."""
    rows, shapes = torch.export.Dim("rows", min=1), {}
    for number, name in enumerate(example):
        lengths = torch.export.Dim(f"length_{number}", min=1)
        shapes[name] = {dim: lengths if dim else rows for dim in free_dims(name)}
    with torch.no_grad():
        return torch.export.export(servable, (example,), dynamic_shapes={"inputs": shapes})


@contextmanager
def _quiet_onnx() -> Iterator[None]:
    """Ignore warnings of torch.onnx about itself: deprecated calls, absent packages."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)  # torchvision, whose operators no model of ours has
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)
            warnings.filterwarnings("ignore", "# The axis name: rows", UserWarning)
            yield
    finally:
        logger.setLevel(level)
