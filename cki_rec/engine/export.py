"""Export of a trained network to one file that serves without our code: ids in, logits out.

Shape legend: B rows, F fields, D embedding size, C fields with one id, L ids of a field with
several, K ids that are attended to, N numbers.
"""

from __future__ import annotations

import copy
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
from torch.nn.functional import embedding
from torch.nn.utils.rnn import pad_sequence
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from cki_rec.config import UserError
from cki_rec.data.encoding.tokens import HASHED
from cki_rec.data.schema import OOV_ID, PADDING_ID, Batch, FeatureSchema
from cki_rec.models.embeddings import Embedded, FieldEmbeddings

IDS, NUMBERS = "ids", "numbers"
"""Inputs that hold several fields, one column each."""
OUTPUTS = ("logit", "probability")
TOLERANCE = 1e-5
"""Largest difference between exported scores and scores of the network."""
LARGEST_ONNX = 2**31 - 2**26
"""Bytes of weights in one ONNX file; more are stored in a second file."""
EXAMPLE_ROWS, EXAMPLE_LENGTH = 3, 2
"""Sizes of the traced batch; torch would treat 0 and 1 as constants."""

Inputs = dict[str, Tensor]
Scores = Callable[[Inputs], Tensor]
"""Function of inputs that returns ``(B,)`` logits."""


class Servable(nn.Module):
    """A network with plain tables, ready for ``torch.export``.

    ``forward`` takes a dictionary of tensors and returns ``{"logit": (B,), "probability": (B,)}``.

    - ``ids`` ``(B, C)`` int64: the fields with one id, in the order of the schema.
    - ``ids.NAME`` ``(B, L)`` int64: the ids of a field with several ids, a history by time.
      ``PADDING_ID`` fills up rows on either side and is ignored. L is free for every field.
      Repeats in a set of ids are ignored, as by the encoding of raw rows.
    - ``numbers`` ``(B, N)`` float32: the fields of kind ``numeric``, in the order of the schema.

    Ids outside of a table are scored as ``OOV_ID``. Inputs without fields are left out. The
    network is not changed: tables are copied without unused columns, and their row ``PADDING_ID``
    is set to zero.

    Args:
        network: A network with ``interact(sparse(batch))`` and unsharded tables on the CPU.
        schema: The features that ``network`` reads.
    """

    def __init__(self, network: nn.Module, schema: FeatureSchema) -> None:
        super().__init__()
        sparse = network.sparse
        assert isinstance(sparse, FieldEmbeddings)
        self.schema, self.inputs = schema, input_names(schema)
        self.looked_up, self.length = list(sparse.looked_up), sparse.length
        self.attended = [f.name for f in schema.lookups if f.name in sparse.attended]
        one_id = [f.name for f in schema.lookups if f.kind == "categorical"]
        self.columns = {name: column for column, name in enumerate(one_id)}
        tables: list[nn.Parameter] = []
        place_of: dict[str, int] = {}
        self.first_order_of: dict[str, int] = {}
        for module in sparse.modules():
            if isinstance(module, EmbeddingBagCollection):
                for config in module.embedding_bag_configs():
                    if config.name in schema.table_sizes:
                        place_of[config.name], dim = len(tables), sparse.embedding_dim
                    else:
                        keys, dim = config.feature_names, 1
                        self.first_order_of.update(dict.fromkeys(keys, len(tables)))
                    tables.append(_table(module.embedding_bags[config.name].weight, dim))
        self.tables = nn.ParameterList(tables)
        self.table_of = {f.name: place_of[f.table] for f in schema.lookups}
        self.sets = sets_of(schema)
        self.number_vectors = copy.deepcopy(sparse.numbers)
        self.number_weights = copy.deepcopy(sparse.numbers_first_order)
        self.network = _without_lookups(network)
        self.eval().requires_grad_(False)

    def forward(self, inputs: Inputs) -> dict[str, Tensor]:
        """Return ``logit`` and ``probability`` of every row."""
        parts: list[Tensor] = []
        first_order: list[Tensor] = []
        for name in self.looked_up:
            ids = self._ids(inputs, name)
            parts.append(_pooled(ids, self.tables[self.table_of[name]]))
            if name in self.first_order_of:
                weights = self.tables[self.first_order_of[name]]
                first_order.append(_pooled(ids, weights)[:, 0])
        fields = [torch.stack(parts, dim=1)] if parts else []
        if self.number_vectors is not None:
            fields.append(inputs[NUMBERS].unsqueeze(2) * self.number_vectors)
            if self.number_weights is not None:
                first_order.append((inputs[NUMBERS] @ self.number_weights)[:, 0])
        fields_BFD = torch.cat(fields, dim=1)
        num_rows = fields_BFD.shape[0]
        first_order_B = fields_BFD.new_zeros(num_rows)
        for term in first_order:
            first_order_B = first_order_B + term
        histories, masks = {}, {}
        for name in self.attended:
            ids_BK, masks[name] = _latest(self._ids(inputs, name), self.length)
            histories[name] = embedding(ids_BK, self.tables[self.table_of[name]])
        emb = Embedded(fields_BFD, first_order_B, histories, masks)
        logit_B = self.network.interact(emb)  # type: ignore[operator]
        return dict(zip(OUTPUTS, (logit_B, logit_B.sigmoid()), strict=True))

    def _ids(self, inputs: Inputs, name: str) -> Tensor:
        """Return ``(B,)`` ids of a field with one id, ``(B, L)`` ids of other fields."""
        is_one = name in self.columns
        ids = inputs[IDS][:, self.columns[name]] if is_one else inputs[self.inputs[name]]
        num_ids = self.tables[self.table_of[name]].shape[0]
        ids = ids.masked_fill((ids < 0) | (ids >= num_ids), OOV_ID)
        return _distinct(ids) if name in self.sets else ids


def input_names(schema: FeatureSchema) -> dict[str, str]:
    """Return the input name of every field, in the order of inputs."""
    lookups = sorted(schema.lookups, key=lambda feature: feature.kind != "categorical")
    names = {f.name: IDS if f.kind == "categorical" else f"{IDS}.{f.name}" for f in lookups}
    return {**names, **{f.name: NUMBERS for f in schema.numbers}}


def sets_of(schema: FeatureSchema) -> list[str]:
    """Return the fields whose ids are distinct in every row, because distinct tokens have them.

    Hashes of distinct tokens may be equal, so repeats count in fields of hashed ids.
    """
    return [
        f.name
        for f in schema.lookups
        if f.kind == "multi" and not schema.vocabulary_hashes[f.table].startswith(HASHED)
    ]


def free_dims(name: str) -> dict[int, str]:
    """Return the names of the dynamic dimensions of an input."""
    rows = {0: "rows"}
    return rows if name in (IDS, NUMBERS) else {**rows, 1: f"length_of_{name}"}


def inputs_of(batch: Batch, schema: FeatureSchema) -> Inputs:
    """Return the inputs of a ``Servable`` for a batch."""
    lookups = schema.lookups
    size = (len(lookups), len(batch))
    lengths_FB = torch.ones(size).int() if batch.lengths is None else batch.lengths.view(size)
    names, columns, inputs = input_names(schema), [], {}
    pieces = batch.values.split(lengths_FB.sum(1).tolist()) if lookups else []
    for feature, ids, lengths_B in zip(lookups, pieces, lengths_FB, strict=True):
        if feature.kind == "categorical":
            columns.append(ids)
        else:
            rows = list(ids.split(lengths_B.tolist()))
            inputs[names[feature.name]] = pad_sequence(rows, True, PADDING_ID)
    if columns:
        inputs = {IDS: torch.stack(columns, dim=1), **inputs}
    if batch.numbers is not None:
        inputs[NUMBERS] = batch.numbers
    return inputs


def draw_batch(
    schema: FeatureSchema, num_rows: int, longest: int, generator: torch.Generator
) -> Batch:
    """Return random rows; fields with several ids have 0 to ``longest`` of them, both included.

    Sets hold consecutive ids, which are distinct, and at most all ids of their table.
    """
    values, lengths, sets = [torch.empty(0, dtype=torch.int64)], [], sets_of(schema)
    for feature in schema.lookups:
        sizes = torch.ones(num_rows, dtype=torch.int64)
        if feature.kind != "categorical":
            sizes = torch.randint(0, longest + 1, (num_rows,), generator=generator)
            sizes[0] = 0
            sizes[-1] = longest
        table_size = schema.table_sizes[feature.table]
        num_ids = table_size - OOV_ID
        sizes = sizes.clamp(max=num_ids) if feature.name in sets else sizes
        lengths.append(sizes)
        if feature.name in sets:
            starts = torch.randint(0, num_ids, (num_rows,), generator=generator)
            places = torch.cat([torch.arange(int(size)) for size in sizes])
            values.append(OOV_ID + (starts.repeat_interleave(sizes) + places) % num_ids)
            continue
        size = (int(sizes.sum()),)
        values.append(torch.randint(OOV_ID, table_size, size, generator=generator))
    num = len(schema.numbers)
    return Batch(
        torch.cat(values),
        torch.cat(lengths).int() if lengths else None,
        torch.zeros(num_rows),
        torch.randn(num_rows, num, generator=generator) if num else None,
    )


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
def largest_difference(network: nn.Module, schema: FeatureSchema, scores: Scores) -> float:
    """Return the largest difference between exported scores and the network on random rows.

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
        expected, exported = network(batch), scores(inputs_of(batch, schema))
        of_logits = (exported - expected).abs().max() / expected.abs().max().clamp(min=1)
        of_probabilities = (exported.sigmoid() - expected.sigmoid()).abs().max()
        largest = torch.maximum(largest, torch.maximum(of_logits, of_probabilities))
    return float(largest)


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


def _table(weight: Tensor, dim: int) -> nn.Parameter:
    """Return the used columns ``(rows, dim)`` of a table, with zeros in the padding row."""
    table = weight.detach()[:, :dim].clone(memory_format=torch.contiguous_format)
    table[PADDING_ID] = 0
    return nn.Parameter(table, requires_grad=False)


def _without_lookups(network: nn.Module) -> nn.Module:
    """Return a deep copy of a network without its tables."""
    body, sparse = copy.copy(network), copy.copy(network.sparse)
    assert isinstance(sparse, nn.Module)
    sparse._modules, sparse._parameters = {}, {}
    body._modules = {**network._modules, "sparse": sparse}
    return copy.deepcopy(body)


def _pooled(ids: Tensor, table: Tensor) -> Tensor:
    """Return ``(B, D)``: the row of a single id, or the mean over ids without padding."""
    if ids.dim() == 1:
        return embedding(ids, table)
    counts_B1 = (ids != PADDING_ID).sum(1, keepdim=True)
    return embedding(ids, table).sum(1) / counts_B1.clamp(min=1)


def _distinct(ids_BL: Tensor) -> Tensor:
    """Return the ids in ascending order, with padding in place of repeats."""
    sorted_BL = ids_BL.sort(dim=1).values
    places_L = torch.arange(ids_BL.shape[1], device=ids_BL.device)
    before_BL = sorted_BL[:, (places_L - 1).clamp(min=0)]
    return sorted_BL.masked_fill((sorted_BL == before_BL) & (places_L > 0), PADDING_ID)


def _latest(ids_BL: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Return the latest ids ``(B, K)``, oldest first, padded at the end, and their mask."""
    is_id_BL = ids_BL != PADDING_ID
    counts_B1 = is_id_BL.sum(1, keepdim=True)
    dropped_B1 = (counts_B1 - length).clamp(min=0)
    target_BL = is_id_BL.cumsum(1) - 1 - dropped_B1
    places_K1 = torch.arange(length, device=ids_BL.device).unsqueeze(1)
    moves_BKL = (target_BL.unsqueeze(1) == places_K1) & is_id_BL.unsqueeze(1)
    ids_BK = (moves_BKL * ids_BL.unsqueeze(1)).sum(2)
    return ids_BK, ids_BK != PADDING_ID


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
