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
FIRST_ORDER_DIM = 4
"""Columns of a first-order table. The lookup kernels need a multiple of 4; the weight is the mean
of the columns, which start equal and get equal gradients, so they act as one."""


class FieldEmbeddings(nn.Module):
    """Embeddings of every field, and first-order weights if asked, in one lookup.

    Features that share a vocabulary share a table. Several ids of one row are pooled by mean; no
    ids give zeros. Fields leave in the order of ``fields``: by table, then as in the schema.
    """

    def __init__(
        self,
        schema: FeatureSchema,
        embedding_dim: int,
        first_order: bool,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.features = [feature.name for feature in schema.features]
        by_table: dict[str, list[str]] = {}
        for feature in schema.features:
            by_table.setdefault(feature.table, []).append(feature.name)
        self.fields = [name for names in by_table.values() for name in names]
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

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return embeddings ``(B, F, D)`` and the sum of first-order weights ``(B,)``."""
        ids = KeyedJaggedTensor(
            keys=self.features, values=batch.values, lengths=batch.lengths, stride=len(batch)
        )
        pooled = self.collection(ids).values()
        width = len(self.fields) * self.embedding_dim
        emb_BFD = pooled[:, :width].unflatten(1, (len(self.fields), self.embedding_dim))
        return emb_BFD, pooled[:, width:].sum(1) / FIRST_ORDER_DIM


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
