"""Blocks that models share.

Shape legend: B rows, F fields, D embedding size, H hidden units.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from cki_rec.data.schema import Batch, FeatureSchema

FIRST_ORDER = "_first_order"
"""Suffix of the tables that hold first-order weights."""
NUMBERS = ("numbers", "numbers_first_order")
"""Last words of the parameters that numeric fields have instead of tables."""
FIRST_ORDER_DIM = 4
"""Columns of a first-order table. The lookup kernels need a multiple of 4; the weight is the mean
of the columns, which start equal and get equal gradients, so they act as one."""


class FieldEmbeddings(nn.Module):
    """Embeddings of every field, and first-order weights if asked, in one lookup.

    Features that share a vocabulary share a table. Several ids of one row are pooled by mean; no
    ids give zeros. A number times a vector of its own is its embedding. Fields leave in the order
    of ``fields``: by table, then as in the schema, numbers last.
    """

    def __init__(
        self,
        schema: FeatureSchema,
        embedding_dim: int,
        first_order: bool,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.features = [feature.name for feature in schema.lookups]
        numbers = [feature.name for feature in schema.numbers]
        by_table: dict[str, list[str]] = {}
        for feature in schema.lookups:
            by_table.setdefault(feature.table, []).append(feature.name)
        self.looked_up = [name for names in by_table.values() for name in names]
        self.fields = [*self.looked_up, *numbers]
        self.embedding_dim = embedding_dim
        dims = {"": embedding_dim, **({FIRST_ORDER: FIRST_ORDER_DIM} if first_order else {})}
        tables = [
            EmbeddingBagConfig(
                name=table + suffix,
                embedding_dim=dim,
                num_embeddings=schema.table_sizes[table],
                feature_names=names,
                pooling=PoolingType.MEAN,
            )
            for suffix, dim in dims.items()
            for table, names in by_table.items()
        ]
        self.collection = EmbeddingBagCollection(tables=tables, device=device)
        self.numbers: nn.Parameter | None = None
        self.numbers_first_order: nn.Parameter | None = None
        if numbers:  # F x D and F x 1: a row a field, as tables have a row an id
            self.numbers = nn.Parameter(torch.empty(len(numbers), embedding_dim))
            if first_order:
                self.numbers_first_order = nn.Parameter(torch.empty(len(numbers), 1))
        self._one_id_each: tuple[int, Tensor, Tensor] | None = None

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return embeddings ``(B, F, D)`` and the sum of first-order weights ``(B,)``."""
        pooled = self.collection(self.ids(batch)).values()
        width = len(self.looked_up) * self.embedding_dim
        emb_BFD = pooled[:, :width].unflatten(1, (len(self.looked_up), self.embedding_dim))
        first_order_B = pooled[:, width:].sum(1) / FIRST_ORDER_DIM
        if self.numbers is not None:
            assert batch.numbers is not None, "the schema has numbers, the batch has none"
            emb_BFD = torch.cat([emb_BFD, batch.numbers.unsqueeze(2) * self.numbers], dim=1)
            if self.numbers_first_order is not None:
                first_order_B = first_order_B + (batch.numbers @ self.numbers_first_order)[:, 0]
        return emb_BFD, first_order_B

    def ids(self, batch: Batch) -> KeyedJaggedTensor:
        """Return the ids as the tables take them.

        Where every feature holds one id a row, lengths and offsets are those of the last batch of
        this size: only values change.
        """
        if batch.lengths is not None:
            return KeyedJaggedTensor(
                keys=self.features,
                values=batch.values,
                lengths=batch.lengths,
                stride=len(batch),
            )
        size, device = len(batch), batch.values.device
        if (
            self._one_id_each is None
            or self._one_id_each[0] != size
            or (self._one_id_each[1].device != device)
        ):
            num = size * len(self.features)
            lengths = torch.ones(num, dtype=torch.int32, device=device)
            offsets = torch.arange(num + 1, dtype=torch.int32, device=device)
            self._one_id_each = (size, lengths, offsets)
        _, lengths, offsets = self._one_id_each
        return KeyedJaggedTensor(
            keys=self.features,
            values=batch.values,
            lengths=lengths,
            offsets=offsets,
            stride=size,
            length_per_key=[size] * len(self.features),
            offset_per_key=list(range(0, size * (len(self.features) + 1), size)),
        )


class MLP(nn.Module):
    """Linear, ReLU and dropout for every hidden width, then Linear to one output."""

    def __init__(self, width: int, hidden: Sequence[int], dropout: float) -> None:
        super().__init__()
        widths = [width, *hidden]
        self.layers = nn.ModuleList(
            nn.Linear(i, o) for i, o in zip(widths, [*hidden, 1], strict=True)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BH: Tensor) -> Tensor:
        """Return ``(B,)``, one score per row."""
        *hidden, last = self.layers
        for layer in hidden:
            x_BH = self.dropout(torch.relu(layer(x_BH)))
        score: Tensor = last(x_BH).squeeze(1)
        return score


def fm_interaction(emb_BFD: Tensor) -> Tensor:
    r"""Sum the pairwise inner products of the field embeddings.

    .. math:: \tfrac12 \sum_d \big[(\sum_f e_{fd})^2 - \sum_f e_{fd}^2\big]

    Args:
        emb_BFD: One embedding per field.

    Returns:
        ``(B,)``, one score per row.

    Reference:
        Rendle, Factorization Machines, ICDM 2010, Lemma 3.1.
    """
    return 0.5 * (emb_BFD.sum(1).square() - emb_BFD.square().sum(1)).sum(1)
