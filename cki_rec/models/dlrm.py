"""DLRM. Shape legend: B rows, F vectors, D embedding size, P pairs of vectors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from cki_rec.config import Model, UserError
from cki_rec.data.schema import Batch, FeatureSchema
from cki_rec.merging.symmetry import LogitScale, Slice, Symmetry
from cki_rec.models.embeddings import Embedded, FieldEmbeddings
from cki_rec.models.layers import MLP, MLP_OPTIONS
from cki_rec.models.symmetries import (
    Basis,
    bases,
    hidden_kind,
    hidden_units,
    layer_outputs,
    scale_of_sum,
)


class DLRM(nn.Module):
    """Inner products of all pairs of embeddings and a vector of the numbers; an MLP on them.

    The vector of the numbers is the output of a bottom MLP. The top MLP reads it beside the
    products. Without numbers there are products only.

    Reference:
        Naumov et al., Deep Learning Recommendation Model for Personalization and Recommendation
        Systems, 2019 (arXiv 1906.00091).

    Differs:
        The bottom MLP reads the embeddings of numbers, each a number times a learned vector.
    """

    reads = (*MLP_OPTIONS, "bottom")

    def __init__(
        self, schema: FeatureSchema, model: Model, device: torch.device | None = None
    ) -> None:
        super().__init__()
        if model.bottom is None:
            raise UserError(f"model.bottom=null: {model.name} needs the widths of its bottom MLP")
        dim = model.embedding_dim
        self.sparse = FieldEmbeddings(schema, dim, first_order=False, device=device)
        self.num_lookups = len(self.sparse.looked_up)
        numbers = len(self.sparse.fields) - self.num_lookups
        self.bottom: MLP | None = None
        if numbers:
            hidden = [*model.bottom.hidden, dim]
            self.bottom = MLP(
                numbers * dim, hidden, 0.0, model.activation, model.batch_norm, scores=0
            )
        vectors = self.num_lookups + bool(numbers)
        if vectors == 1 and not numbers:
            raise UserError(f"data.fields: {model.name} needs two fields for an inner product")
        self.pairs = [(row, column) for row in range(vectors) for column in range(row)]
        self.places = [row * vectors + column for row, column in self.pairs]
        width = len(self.places) + (dim if numbers else 0)
        self.mlp = MLP(width, model.hidden, model.dropout, model.activation, model.batch_norm)

    def forward(self, batch: Batch) -> Tensor:
        """Return ``(B,)`` logits of a click."""
        return self.interact(self.sparse(batch))

    def interact(self, emb: Embedded) -> Tensor:
        """Return ``(B,)`` logits from embeddings: the network without its lookups."""
        vectors_BFD, parts = emb.fields_BFD[:, : self.num_lookups], []
        if self.bottom is not None:
            number_BD = self.bottom(emb.fields_BFD[:, self.num_lookups :].flatten(1))
            vectors_BFD = torch.cat([number_BD.unsqueeze(1), vectors_BFD], dim=1)
            parts.append(number_BD)
        if self.places:
            products_BFF = vectors_BFD @ vectors_BFD.transpose(1, 2)
            parts.append(products_BFF.flatten(1)[:, self.places])
        logit_B: Tensor = self.mlp(torch.cat(parts, dim=1))
        return logit_B

    def symmetries(self) -> list[Symmetry]:
        """Return the symmetry of all tables, signs of each, rotations of numbers, hidden units.

        Outputs of the bottom MLP are activations, and products join them with the tables. So with
        numbers the tables admit permutations, signed ones for an odd activation. A table may
        change its sign if the MLP's weights of its products do.
        """
        dim, looked_up = self.sparse.embedding_dim, set(self.sparse.looked_up)
        numbers = self.sparse.fields[self.num_lookups :]
        tables, symmetries = [], []
        for basis in bases(self.sparse):
            if set(basis.fields) & looked_up:
                tables.append(basis.vectors)
                whole = replace(basis.vectors, width=dim)
                symmetries.append(Symmetry("signs", 1, (whole, *self._products_of(basis))))
            else:
                reader = basis.blocks("bottom.layers.0.weight", numbers, dim)
                symmetries.append(Symmetry("rotation", dim, (basis.vectors, *reader)))
        if self.bottom is None:
            symmetries.append(Symmetry("rotation", dim, tuple(tables)))
        else:
            last = len(self.bottom.layers) - 1
            kind = hidden_kind(self.bottom.activations[last])
            read = [Slice("mlp.layers.0.weight", 1)]
            slices = (*tables, *layer_outputs(self.bottom, "bottom", last), *read)
            symmetries.append(Symmetry(kind, dim, slices))
            symmetries += hidden_units(self.bottom, "bottom")
        return [*symmetries, *hidden_units(self.mlp, "mlp")]

    def _products_of(self, basis: Basis) -> Iterator[Slice]:
        """Yield the inputs of the MLP that are products of one field of a basis with another."""
        names = [*([] if self.bottom is None else [""]), *self.sparse.looked_up]
        first = 0 if self.bottom is None else self.sparse.embedding_dim
        for place, pair in enumerate(self.pairs):
            if sum(names[vector] in basis.fields for vector in pair) == 1:
                yield Slice("mlp.layers.0.weight", 1, first + place)

    def logit_scale(self) -> LogitScale:
        """Return the parameters that scale and shift the logit and nothing else."""
        return scale_of_sum(self.sparse, self.mlp, None)
