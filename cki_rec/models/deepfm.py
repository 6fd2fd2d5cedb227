"""DeepFM. Shape legend: B rows, F fields, D embedding size."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cki_rec.config import Model
from cki_rec.data.schema import Batch, FeatureSchema
from cki_rec.merging.symmetry import LogitScale, Symmetry
from cki_rec.models.embeddings import Embedded, FieldEmbeddings
from cki_rec.models.layers import MLP, fm_interaction
from cki_rec.models.symmetries import hidden_units, scale_with_products, shared_basis


class DeepFM(nn.Module):
    """First-order weights, a factorization machine and an MLP on shared embeddings.

    Reference:
        Guo et al., DeepFM, IJCAI 2017, equations 1 to 3.

    Differs:
        Several ids of a field are pooled by mean. Histories share the table of their items.
    """

    def __init__(
        self, schema: FeatureSchema, model: Model, device: torch.device | None = None
    ) -> None:
        super().__init__()
        dim = model.embedding_dim
        self.sparse = FieldEmbeddings(schema, dim, first_order=True, device=device)
        width = len(self.sparse.fields) * dim
        self.mlp = MLP(width, model.hidden, model.dropout, model.activation, model.batch_norm)
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, batch: Batch) -> Tensor:
        """Return ``(B,)`` logits of a click."""
        return self.interact(self.sparse(batch))

    def interact(self, emb: Embedded) -> Tensor:
        """Return ``(B,)`` logits from embeddings: the network without its lookups."""
        emb_BFD = emb.fields_BFD
        logit_B: Tensor = (
            self.bias + emb.first_order_B + fm_interaction(emb_BFD) + self.mlp(emb_BFD.flatten(1))
        )
        return logit_B

    def symmetries(self) -> list[Symmetry]:
        """Return one rotation of all embeddings and the permutations of hidden units."""
        basis = shared_basis(self.sparse, ["mlp.layers.0.weight"])
        return [basis, *hidden_units(self.mlp, "mlp")]

    def logit_scale(self) -> LogitScale:
        """Return the parameters that scale and shift the logit and nothing else."""
        return scale_with_products(self.sparse, self.mlp, "bias")
