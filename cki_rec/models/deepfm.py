"""DeepFM. Shape legend: B rows, F fields, D embedding size."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cki_rec.data.schema import Batch, FeatureSchema
from cki_rec.models.layers import MLP, FieldEmbeddings, fm_interaction


class DeepFM(nn.Module):
    """First-order weights, factorization machine and MLP on one set of embeddings.

    Reference:
        Guo et al., DeepFM, IJCAI 2017, equations 1 to 3.

    Differs:
        Several ids of a field are pooled by mean; a field of histories shares the items' table.
    """

    def __init__(
        self,
        schema: FeatureSchema,
        embedding_dim: int,
        hidden: Sequence[int],
        dropout: float,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.sparse = FieldEmbeddings(schema, embedding_dim, first_order=True, device=device)
        self.mlp = MLP(len(self.sparse.fields) * embedding_dim, hidden, dropout)
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, batch: Batch) -> Tensor:
        """Return ``(B,)``, the logit of a click per row."""
        emb_BFD, first_order_B = self.sparse(batch)
        logit: Tensor = (
            self.bias + first_order_B + fm_interaction(emb_BFD) + self.mlp(emb_BFD.flatten(1))
        )
        return logit
