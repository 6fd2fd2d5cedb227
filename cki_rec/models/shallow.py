"""LR, FM, DNN, Wide & Deep. Shape legend: B rows, F fields, D embedding size."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cki_rec.config import Model
from cki_rec.data.schema import Batch, FeatureSchema
from cki_rec.merging.symmetry import LogitScale, Symmetry
from cki_rec.models.embeddings import Embedded, FieldEmbeddings
from cki_rec.models.layers import MLP, fm_interaction
from cki_rec.models.symmetries import (
    hidden_units,
    scale_of_sum,
    scale_with_products,
    separate_bases,
    shared_basis,
)


class LR(nn.Module):
    """Logistic regression: one weight per id and one per number.

    Reference:
        Richardson et al., Predicting Clicks, WWW 2007.

    Differs:
        Weights are embeddings of size one, initialized like embeddings; ``embedding_dim`` is
        ignored. Weights of several ids of a field are averaged.
    """

    reads: tuple[str, ...] = ()

    def __init__(
        self, schema: FeatureSchema, model: Model, device: torch.device | None = None
    ) -> None:
        super().__init__()
        self.sparse = FieldEmbeddings(schema, 1, first_order=False, device=device)
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, batch: Batch) -> Tensor:
        """Return ``(B,)`` logits of a click."""
        return self.interact(self.sparse(batch))

    def interact(self, emb: Embedded) -> Tensor:
        """Return ``(B,)`` logits from embeddings: the network without its lookups."""
        return self.bias + emb.fields_BFD.flatten(1).sum(1)

    def symmetries(self) -> list[Symmetry]:
        """Return an empty list: no change of the weights preserves all outputs."""
        return []

    def logit_scale(self) -> LogitScale:
        """Return the parameters that scale and shift the logit and nothing else."""
        weights = {f"sparse.{name}": 1.0 for name in self.sparse.sources.values()}
        return LogitScale({**weights, "bias": 1.0}, "bias")


class FM(nn.Module):
    """First-order weights and all pairwise inner products of embeddings.

    Reference:
        Rendle, Factorization Machines, ICDM 2010, equation 1.

    Differs:
        Several ids of a field are pooled by mean, without interactions among them.
    """

    reads: tuple[str, ...] = ()

    def __init__(
        self, schema: FeatureSchema, model: Model, device: torch.device | None = None
    ) -> None:
        super().__init__()
        dim = model.embedding_dim
        self.sparse = FieldEmbeddings(schema, dim, first_order=True, device=device)
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, batch: Batch) -> Tensor:
        """Return ``(B,)`` logits of a click."""
        return self.interact(self.sparse(batch))

    def interact(self, emb: Embedded) -> Tensor:
        """Return ``(B,)`` logits from embeddings: the network without its lookups."""
        return self.bias + emb.first_order_B + fm_interaction(emb.fields_BFD)

    def symmetries(self) -> list[Symmetry]:
        """Return one rotation of all embeddings."""
        return [shared_basis(self.sparse)]

    def logit_scale(self) -> LogitScale:
        """Return the parameters that scale and shift the logit and nothing else."""
        return scale_with_products(self.sparse, None, "bias")


class DNN(nn.Module):
    """An MLP on the concatenated embeddings.

    Reference:
        Covington et al., Deep Neural Networks for YouTube Recommendations, RecSys 2016, its
        ranking network.
    """

    first_order = False

    def __init__(
        self, schema: FeatureSchema, model: Model, device: torch.device | None = None
    ) -> None:
        super().__init__()
        dim = model.embedding_dim
        self.sparse = FieldEmbeddings(schema, dim, self.first_order, device=device)
        width = len(self.sparse.fields) * dim
        self.mlp = MLP(width, model.hidden, model.dropout, model.activation, model.batch_norm)

    def forward(self, batch: Batch) -> Tensor:
        """Return ``(B,)`` logits of a click."""
        return self.interact(self.sparse(batch))

    def interact(self, emb: Embedded) -> Tensor:
        """Return ``(B,)`` logits from embeddings: the network without its lookups."""
        logit_B: Tensor = self.mlp(emb.fields_BFD.flatten(1))
        return logit_B

    def symmetries(self) -> list[Symmetry]:
        """Return one rotation per table and number, and the permutations of hidden units."""
        tables = separate_bases(self.sparse, ["mlp.layers.0.weight"])
        return [*tables, *hidden_units(self.mlp, "mlp")]

    def logit_scale(self) -> LogitScale:
        """Return the parameters that scale and shift the logit and nothing else."""
        return scale_of_sum(self.sparse, self.mlp, None)


class WideDeep(DNN):
    """An MLP plus first-order weights.

    Reference:
        Cheng et al., Wide & Deep Learning, DLRS 2016, equation 3.

    Differs:
        The wide part has no hand-made crosses, and is trained by the same optimizers.
    """

    first_order = True

    def interact(self, emb: Embedded) -> Tensor:
        """Return ``(B,)`` logits from embeddings: the network without its lookups."""
        return emb.first_order_B + super().interact(emb)
