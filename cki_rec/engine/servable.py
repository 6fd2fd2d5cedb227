"""A trained network with plain tables: ids in, logits out, ready for ``torch.export``.

Shape legend: B rows, F fields, D embedding size, C fields with one id, L ids of a field with
several, K ids that are attended to, N numbers.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding
from torch.nn.utils.rnn import pad_sequence
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from cki_rec.data.encoding.tokens import HASHED
from cki_rec.data.schema import OOV_ID, PADDING_ID, Batch, FeatureSchema
from cki_rec.models.embeddings import Embedded, FieldEmbeddings

IDS, NUMBERS = "ids", "numbers"
"""Inputs that hold several fields, one column each."""
OUTPUTS = ("logit", "probability")
Inputs = dict[str, Tensor]


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
        is_int8: Store embeddings as int8, with one scale per row. First-order weights stay float.
    """

    def __init__(self, network: nn.Module, schema: FeatureSchema, is_int8: bool = False) -> None:
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
        self.scales = nn.ParameterDict()
        for place, table in enumerate(tables):
            if is_int8 and table.shape[1] > 1:
                tables[place], self.scales[str(place)] = _quantized(table)
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
            parts.append(_pooled(ids, self._rows(ids, self.table_of[name])))
            if name in self.first_order_of:
                weights = self._rows(ids, self.first_order_of[name])
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
            histories[name] = self._rows(ids_BK, self.table_of[name])
        emb = Embedded(fields_BFD, first_order_B, histories, masks)
        logit_B = self.network.interact(emb)  # type: ignore[operator]
        return dict(zip(OUTPUTS, (logit_B, logit_B.sigmoid()), strict=True))

    def _rows(self, ids: Tensor, place: int) -> Tensor:
        """Return the rows of a table, ``(*ids, D)`` float."""
        rows = embedding(ids, self.tables[place])
        key = str(place)
        return rows * embedding(ids, self.scales[key]) if key in self.scales else rows

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


def _quantized(table: Tensor) -> tuple[nn.Parameter, nn.Parameter]:
    """Return int8 weights and the scale of every row: the largest weight becomes 127."""
    scale = table.abs().amax(1, keepdim=True).clamp(min=torch.finfo(table.dtype).tiny) / 127
    weights = (table / scale).round().to(torch.int8)
    return nn.Parameter(weights, requires_grad=False), nn.Parameter(scale, requires_grad=False)


def _pooled(ids: Tensor, rows: Tensor) -> Tensor:
    """Return ``(B, D)``: the row of a single id, or the mean over ids without padding."""
    if ids.dim() == 1:
        return rows
    counts_B1 = (ids != PADDING_ID).sum(1, keepdim=True)
    return rows.sum(1) / counts_B1.clamp(min=1)


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
