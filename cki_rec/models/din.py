"""DIN. Shape legend: B rows, F fields, D embedding size, L ids of a history."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cki_rec.config import Model
from cki_rec.data.schema import Batch, FeatureSchema
from cki_rec.merging.symmetry import Kind, LogitScale, Symmetry
from cki_rec.models.attention import ActivationUnit
from cki_rec.models.embeddings import Embedded, FieldEmbeddings
from cki_rec.models.layers import MLP, MLP_OPTIONS
from cki_rec.models.pairs import history_pairs
from cki_rec.models.symmetries import bases, hidden_units, scale_of_sum


class DIN(nn.Module):
    """Attention of targets over histories instead of mean pooling; then an MLP on all fields.

    Reference:
        Zhou et al., Deep Interest Network, KDD 2018.

    Differs:
        Histories outside all pairs are pooled by mean.
    """

    reads = (*MLP_OPTIONS, "attention")

    def __init__(
        self, schema: FeatureSchema, model: Model, device: torch.device | None = None
    ) -> None:
        super().__init__()
        options, dim = model.attention, model.embedding_dim
        self.pairs = history_pairs(schema, model, "model.attention.pairs", options.pairs)
        self.attended = [name for pair in self.pairs for name in pair.histories]
        self.sparse = FieldEmbeddings(
            schema,
            dim,
            first_order=False,
            attended=list(dict.fromkeys(self.attended)),
            length=options.length,
            device=device,
        )
        self.places = [[self.sparse.fields.index(t) for t in pair.targets] for pair in self.pairs]
        self.attention = nn.ModuleList(
            ActivationUnit(
                dim * len(pair.targets),
                options.hidden,
                options.activation,
                options.dropout,
                options.softmax,
            )
            for pair in self.pairs
        )
        width = (len(self.sparse.fields) + len(self.attended)) * dim
        self.mlp = MLP(width, model.hidden, model.dropout, model.activation, model.batch_norm)

    def forward(self, batch: Batch) -> Tensor:
        """Return ``(B,)`` logits of a click."""
        return self.interact(self.sparse(batch))

    def interact(self, emb: Embedded) -> Tensor:
        """Return ``(B,)`` logits from embeddings: the network without its lookups."""
        parts = [emb.fields_BFD.flatten(1)]
        for pair, places, unit in zip(self.pairs, self.places, self.attention, strict=True):
            query = torch.cat([emb.fields_BFD[:, place] for place in places], dim=1)
            keys = torch.cat([emb.histories[name] for name in pair.histories], dim=2)
            parts.append(unit(query, keys, emb.masks[pair.histories[0]]))
        logit_B: Tensor = self.mlp(torch.cat(parts, dim=1))
        return logit_B

    def symmetries(self) -> list[Symmetry]:
        """Return the symmetries of each table and number, then of hidden units.

        Tables of targets admit signed permutations only: their coordinates are multiplied.
        """
        dim, order = self.sparse.embedding_dim, [*self.sparse.fields, *self.attended]
        targets = {name for pair in self.pairs for name in pair.targets}
        symmetries = []
        for basis in bases(self.sparse):
            slices = [basis.vectors, *basis.blocks("mlp.layers.0.weight", order, dim)]
            for number, pair in enumerate(self.pairs):
                reader, width = f"attention.{number}.mlp.layers.0.weight", len(pair.targets) * dim
                slices += basis.blocks(reader, pair.targets, dim)
                slices += basis.blocks(reader, pair.histories, dim, start=width)
                slices += basis.blocks(reader, pair.histories, dim, start=2 * width)
                slices += basis.blocks(reader, pair.histories, dim, start=3 * width, signed=False)
            is_target = bool(targets & set(basis.fields))
            kind: Kind = "signed_permutation" if is_target else "rotation"
            symmetries.append(Symmetry(kind, dim, tuple(slices)))
        symmetries += hidden_units(self.mlp, "mlp")
        for number, unit in enumerate(self.attention):
            assert isinstance(unit, ActivationUnit)
            symmetries += hidden_units(unit.mlp, f"attention.{number}.mlp")
        return symmetries

    def logit_scale(self) -> LogitScale:
        """Return the parameters that scale and shift the logit and nothing else."""
        return scale_of_sum(self.sparse, self.mlp, None)
