"""Embeddings of every field of a batch, looked up with TorchRec.

Shape legend: B rows, F fields, D embedding size, L ids of a history, S bags of a lookup.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from cki_rec.data.schema import Batch, Feature, FeatureSchema

FIRST_ORDER = "_first_order"
"""Suffix of the tables that hold first-order weights."""
NUMBERS = ("numbers", "numbers_first_order")
"""Last words of the parameter names of numeric fields, which have no tables."""
POSITIONS = "positions"
"""Last word of the names of embeddings of positions, which have no tables."""
LANES = 4
"""The lookup kernels need widths that are multiples of this. Columns beyond the embedding size are
zero and unused; they get no gradient, so they stay zero."""


@dataclass(slots=True)
class Embedded:
    """The embeddings of a batch."""

    fields_BFD: Tensor
    """In the order of ``FieldEmbeddings.fields``."""
    first_order_B: Tensor
    """Sum of first-order weights; zeros if the model has none."""
    histories: dict[str, Tensor] = field(default_factory=dict)
    """Attended histories, ``(B, L, D)``; zeros at empty positions."""
    masks: dict[str, Tensor] = field(default_factory=dict)
    """``(B, L)`` bool: the valid positions of ``histories``."""


class FieldEmbeddings(nn.Module):
    """Embeddings of every field, with optional first-order weights.

    Features with a common vocabulary share a table. Several ids of one row are pooled by mean, and
    a row without ids has zeros. The embedding of a number is the number times a learned vector.
    The output has the order of ``fields``: by table, then as in the schema, numbers last.

    An attended history has one embedding per id. It is looked up like the rest, with one bag per
    id, because sharded sequence lookups are wrong on CPU.

    Args:
        schema: Fields and table sizes.
        embedding_dim: D.
        first_order: Whether fields have first-order weights too.
        attended: Features of kind ``history`` that are not pooled.
        length: L; a longer history is cut to its latest ids.
        device: Device of the tables; ``meta`` before sharding.
    """

    def __init__(
        self,
        schema: FeatureSchema,
        embedding_dim: int,
        first_order: bool,
        attended: Sequence[str] = (),
        length: int = 1,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.embedding_dim = embedding_dim
        self.attended, self.length = tuple(attended), length
        names = [feature.name for feature in schema.lookups]
        numbers = [feature.name for feature in schema.numbers]
        by_table: dict[str, list[Feature]] = {}
        for feature in schema.lookups:
            by_table.setdefault(feature.table, []).append(feature)
        is_unpooled = {f.table for f in schema.lookups if f.name in self.attended}
        pooled = {t: fs for t, fs in by_table.items() if t not in is_unpooled}
        unpooled = {t: fs for t, fs in by_table.items() if t in is_unpooled}

        def config(table: str, suffix: str, dim: int, keys: list[str]) -> EmbeddingBagConfig:
            return EmbeddingBagConfig(
                name=table + suffix,
                embedding_dim=-(-dim // LANES) * LANES,
                num_embeddings=schema.table_sizes[table],
                feature_names=keys,
                pooling=PoolingType.MEAN,
            )

        tables = [
            config(table, "", embedding_dim, [f.name for f in features])
            for table, features in pooled.items()
        ]
        if first_order:
            weighted = {
                t: [f.name for f in fs if f.name not in attended] for t, fs in by_table.items()
            }
            tables += [config(t, FIRST_ORDER, 1, keys) for t, keys in weighted.items() if keys]
        self.first_order = [
            key for t in tables if t.name.endswith(FIRST_ORDER) for key in t.feature_names
        ]
        uses = [(key, table.name) for table in tables for key in table.feature_names]
        keys = [key for key, _ in uses]
        self.keys = [f"{k}@{table}" if keys.count(k) > 1 else k for k, table in uses]
        self.collection = EmbeddingBagCollection(tables=tables, device=device) if tables else None
        self.to_bags = Bags(names, [name for name in names if name in keys])
        self.sequences = nn.ModuleDict()
        self.names = names
        self.bags: dict[str, dict[str, int]] = {}
        """Bags per row, by table with attended histories and feature."""
        for table, features in unpooled.items():
            self.sequences[table] = EmbeddingBagCollection(
                tables=[config(table, "", embedding_dim, [table])], device=device
            )
            widths = {f.name: length if f.name in self.attended else 1 for f in features}
            self.bags[table] = widths
            bags = SequenceBags(table, names, widths, attended, length)
            # not in a ModuleDict: torchrec's pipelines trace into containers
            self.add_module(f"to_bags_of_{table}", bags)
        self.pooled_fields = [f.name for features in pooled.values() for f in features]
        self.looked_up = [
            *self.pooled_fields,
            *(f.name for fs in unpooled.values() for f in fs if f.name not in self.attended),
        ]
        self.fields = [*self.looked_up, *numbers]
        self.sources = {
            **{
                f.name: f"sequences.{table}.embedding_bags.{table}.weight"
                if table in unpooled
                else f"collection.embedding_bags.{table}.weight"
                for table, features in by_table.items()
                for f in features
            },
            **dict.fromkeys(numbers, NUMBERS[0]),
        }
        """The parameter of the embeddings of each field, attended ones included."""
        self.numbers: nn.Parameter | None = None
        self.numbers_first_order: nn.Parameter | None = None
        if numbers:  # F x D and F x 1: one row per field, as tables have one per id
            self.numbers = nn.Parameter(torch.empty(len(numbers), embedding_dim))
            if first_order:
                self.numbers_first_order = nn.Parameter(torch.empty(len(numbers), 1))

    def forward(self, batch: Batch) -> Embedded:
        """Return the embeddings of ``batch``."""
        num_rows, dim = batch.label.shape[0], self.embedding_dim
        parts: list[Tensor] = []
        first_order_B = batch.label.new_zeros(()).expand(num_rows)
        if self.collection is not None:
            pooled = in_order(self.collection(self.to_bags(batch)), self.keys)
            if is_padded(batch):
                pooled = pooled[:num_rows]
            lanes = -(-dim // LANES) * LANES
            width = len(self.pooled_fields) * lanes
            emb, first_order = pooled.split([width, len(self.first_order) * LANES], dim=1)
            if self.pooled_fields:
                emb_BFD = emb.unflatten(1, (-1, lanes))
                parts.append(emb_BFD if lanes == dim else emb_BFD[:, :, :dim])
            if self.first_order:
                first_order_B = first_order[:, ::LANES].sum(1)
        histories, masks = {}, {}
        for table, collection in self.sequences.items():
            to_bags = self.get_submodule(f"to_bags_of_{table}")
            bags_SD = collection(to_bags(batch)).values()[:, :dim]
            for name, emb in split_bags(bags_SD, self.bags[table], num_rows).items():
                if name in self.attended:
                    lengths_B = _lengths(batch, len(self.names))[self.names.index(name)]
                    histories[name], masks[name] = emb, mask_of(lengths_B, self.length)
                else:
                    parts.append(emb)
        if self.numbers is not None:
            assert batch.numbers is not None, "the schema has numbers, the batch has none"
            parts.append(batch.numbers.unsqueeze(2) * self.numbers)
            if self.numbers_first_order is not None:
                first_order_B = first_order_B + (batch.numbers @ self.numbers_first_order)[:, 0]
        fields_BFD = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        return Embedded(fields_BFD, first_order_B, histories, masks)


def is_padded(batch: Batch) -> bool:
    """Return whether the lookup has more rows than the batch; true while tracing."""
    if type(batch) is not Batch:
        return True
    return batch.stride is not None and batch.stride > len(batch)


@torch.fx.wrap
def in_order(embeddings: KeyedTensor, keys: list[str]) -> Tensor:
    """Return ``(B, all columns)`` in the order of ``keys``, whatever the order of the plan."""
    if list(embeddings.keys()) == keys:
        values: Tensor = embeddings.values()
        return values
    (grouped,) = KeyedTensor.regroup([embeddings], [keys])
    assert isinstance(grouped, Tensor)
    return grouped


class Bags(nn.Module):
    """The ids of a batch in the format of one lookup: one bag per feature and row.

    If every feature has one id per row, lengths and offsets of the last batch of the same size are
    reused. Empty bags fill up to ``batch.stride`` rows, so that all processes look up the same
    number of bags.

    Args:
        features: All looked up features, in the order of the batch.
        keys: The features of this lookup, in the same order.
    """

    def __init__(self, features: Sequence[str], keys: Sequence[str]) -> None:
        super().__init__()
        self.features, self.keys = list(features), list(keys)
        self.places = [self.features.index(key) for key in self.keys]
        self._one_id_each: tuple[tuple[int, int, torch.device], Tensor, Tensor] | None = None

    def forward(self, batch: Batch) -> KeyedJaggedTensor:
        """Return the ids of ``keys``."""
        stride, has_all = batch.stride or len(batch), self.keys == self.features
        if batch.lengths is None and has_all and stride == len(batch):
            return self._of_one_id_each(batch)
        lengths_FB = _lengths(batch, len(self.features))
        values = batch.values
        if not has_all:
            pieces = _pieces(batch, lengths_FB)
            values = torch.cat([pieces[place] for place in self.places])
            lengths_FB = lengths_FB[self.places]
        if stride > len(batch):
            lengths_FB = nn.functional.pad(lengths_FB, (0, stride - len(batch)))
        return KeyedJaggedTensor(
            keys=self.keys, values=values, lengths=lengths_FB.reshape(-1), stride=stride
        )

    def _of_one_id_each(self, batch: Batch) -> KeyedJaggedTensor:
        size, device = len(batch), batch.values.device
        key = (size, len(self.keys), device)
        if self._one_id_each is None or self._one_id_each[0] != key:
            num = size * len(self.keys)
            lengths = torch.ones(num, dtype=torch.int32, device=device)
            offsets = torch.arange(num + 1, dtype=torch.int32, device=device)
            self._one_id_each = (key, lengths, offsets)
        _, lengths, offsets = self._one_id_each
        return KeyedJaggedTensor(
            keys=self.keys,
            values=batch.values,
            lengths=lengths,
            offsets=offsets,
            stride=size,
            length_per_key=[size] * len(self.keys),
            offset_per_key=list(range(0, size * (len(self.keys) + 1), size)),
        )


class SequenceBags(nn.Module):
    """The ids of one table: one bag per id of attended histories, one bag per row of the rest.

    Bags are ordered by feature, then row, then position in the history.

    Args:
        table: Name of the table, the key of the lookup.
        names: All looked up features, in the order of the batch.
        widths: Bags per row for each feature of the table.
        attended: Features with one bag per id.
        length: L, bags per row of an attended feature.
    """

    def __init__(
        self,
        table: str,
        names: Sequence[str],
        widths: dict[str, int],
        attended: Sequence[str],
        length: int,
    ) -> None:
        super().__init__()
        self.table, self.num_features, self.length = table, len(names), length
        self.places = {name: list(names).index(name) for name in widths}
        self.widths, self.attended = widths, tuple(attended)

    def forward(self, batch: Batch) -> KeyedJaggedTensor:
        """Return the ids of all bags."""
        lengths_FB = _lengths(batch, self.num_features)
        pieces = _pieces(batch, lengths_FB)
        missing = (batch.stride or len(batch)) - len(batch)
        values, lengths = [], []
        for name, place in self.places.items():
            ids, lengths_B = pieces[place], lengths_FB[place]
            if name in self.attended:
                ids = _latest(ids, lengths_B, self.length)
                lengths_B = mask_of(lengths_B, self.length).to(lengths_B.dtype).flatten()
            values.append(ids)
            lengths.append(nn.functional.pad(lengths_B, (0, missing * self.widths[name])))
        lengths_S = torch.cat(lengths)
        return KeyedJaggedTensor(
            keys=[self.table],
            values=torch.cat(values),
            lengths=lengths_S,
            stride=lengths_S.shape[0],
        )


def mask_of(lengths_B: Tensor, length: int) -> Tensor:
    """Return ``(B, L)`` bool: the bags of each row that hold an id."""
    places_L = torch.arange(length, device=lengths_B.device)
    return places_L < lengths_B.unsqueeze(1)


def split_bags(bags_SD: Tensor, widths: dict[str, int], num_rows: int) -> dict[str, Tensor]:
    """Return ``(B, bags per row, D)`` for each feature of ``widths`` (its bags per row)."""
    stride = bags_SD.shape[0] // sum(widths.values())
    emb, start = {}, 0
    for name, width in widths.items():
        block = bags_SD[stride * start : stride * (start + width)]
        emb[name] = block.unflatten(0, (-1, width))[:num_rows]
        start += width
    return emb


def _lengths(batch: Batch, num_features: int) -> Tensor:
    """Return ``(F, B)`` ids per feature and row."""
    if batch.lengths is None:
        size = (num_features, batch.label.shape[0])
        return torch.ones(size, dtype=torch.int32, device=batch.values.device)
    return batch.lengths.view(num_features, -1)


def _pieces(batch: Batch, lengths_FB: Tensor) -> list[Tensor]:
    """Return the ids of each feature."""
    return list(batch.values.split(lengths_FB.sum(1).tolist()))


def _latest(ids: Tensor, lengths_B: Tensor, length: int) -> Tensor:
    """Return the last ``length`` ids of every row."""
    if not len(lengths_B) or int(lengths_B.max()) <= length:
        return ids
    ends = lengths_B.cumsum(0).repeat_interleave(lengths_B)
    from_end = ends - torch.arange(len(ids), device=ids.device)
    return ids[from_end <= length]
