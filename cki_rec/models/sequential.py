"""Scores of targets from encoded histories: the part that SASRec and GRU4Rec share.

Shape legend: B rows, F fields, D embedding size, L ids of a history, W width of a pair, P pairs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from cki_rec.config import Model, UserError
from cki_rec.data.schema import Batch, FeatureSchema
from cki_rec.merging.symmetry import Kind, LogitScale, Slice, Symmetry
from cki_rec.models.embeddings import Embedded, FieldEmbeddings
from cki_rec.models.layers import MLP, MLP_OPTIONS
from cki_rec.models.pairs import history_pairs
from cki_rec.models.symmetries import Basis, bases, hidden_units, scale_of_sum


class Factors(nn.Module):
    """A weighted sum; weights are initially 1.

    Args:
        width: Number of terms.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x_BP: Tensor) -> Tensor:
        """Return ``(B,)``."""
        sum_B: Tensor = x_BP @ self.weight
        return sum_B


class SequentialNetwork(nn.Module):
    r"""Inner products of targets and states of their histories, and an MLP on fields and states.

    .. math:: \sum_p w_p \langle h_p, t_p \rangle + MLP([fields,\; h_1,\; ...,\; h_P])

    The state h of a history is computed from its ids by an encoder, which never sees the target.
    Targets and ids of histories share a table. Without hidden layers the MLP is a linear map: then
    the first term is the published score of such models.

    Subclasses set ``encoder`` and ``kind``, and ``slices_of`` for the parameters of an encoder
    that read or write embeddings.
    """

    reads = (*MLP_OPTIONS, "sequence")
    encoder: ClassVar[type[nn.Module]]
    """A class that takes ``(width, options)``. Its modules map embedded ids ``(B, L, W)`` and
    their mask ``(B, L)`` to states ``(B, W)``."""
    kind: ClassVar[Kind]
    """The symmetry of the tables that encoders read."""

    def __init__(
        self, schema: FeatureSchema, model: Model, device: torch.device | None = None
    ) -> None:
        super().__init__()
        if model.sequence is None:
            raise UserError(f"model.sequence=null: {model.name} needs the options of its encoder")
        options, dim = model.sequence, model.embedding_dim
        self.pairs = history_pairs(schema, model, "model.sequence.pairs", options.pairs)
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
        self.encoders = nn.ModuleList(
            self.encoder(dim * len(pair.targets), options) for pair in self.pairs
        )
        self.products = Factors(len(self.pairs))
        width = (len(self.sparse.fields) + len(self.attended)) * dim
        self.mlp = MLP(width, model.hidden, model.dropout, model.activation, model.batch_norm)

    def forward(self, batch: Batch) -> Tensor:
        """Return ``(B,)`` logits of a click."""
        return self.interact(self.sparse(batch))

    def interact(self, emb: Embedded) -> Tensor:
        """Return ``(B,)`` logits from embeddings: the network without its lookups."""
        return self.score(emb, self.encode(emb))

    def encode(self, emb: Embedded) -> list[Tensor]:
        """Return per pair ``(B, W)`` the state of the history, which depends on no other field."""
        states = []
        for pair, encoder in zip(self.pairs, self.encoders, strict=True):
            ids_BLW = torch.cat([emb.histories[name] for name in pair.histories], dim=2)
            states.append(encoder(ids_BLW, emb.masks[pair.histories[0]]))
        return states

    def score(self, emb: Embedded, states: Sequence[Tensor]) -> Tensor:
        """Return ``(B,)`` logits from embeddings and the states of histories."""
        products = []
        for places, state_BW in zip(self.places, states, strict=True):
            target_BW = torch.cat([emb.fields_BFD[:, place] for place in places], dim=1)
            products.append((state_BW * target_BW).sum(1))
        product_B = self.products(torch.stack(products, dim=1))
        parts_BW = torch.cat([emb.fields_BFD.flatten(1), *states], dim=1)
        logit_B: Tensor = product_B + self.mlp(parts_BW)
        return logit_B

    def slices_of(self, number: int, basis: Basis, dim: int) -> Iterator[Slice]:
        """Yield the slices of encoder ``number`` that a basis moves."""
        raise NotImplementedError

    def inner_symmetries(self, number: int) -> list[Symmetry]:
        """Return the symmetries inside encoder ``number``."""
        raise NotImplementedError

    def symmetries(self) -> list[Symmetry]:
        """Return the symmetries of tables and numbers, of encoders, then of hidden units."""
        dim, order = self.sparse.embedding_dim, [*self.sparse.fields, *self.attended]
        symmetries = []
        for basis in bases(self.sparse):
            slices = [basis.vectors, *basis.blocks("mlp.layers.0.weight", order, dim)]
            is_read = bool(set(self.attended) & set(basis.fields))
            for number in range(len(self.pairs)):
                slices += self.slices_of(number, basis, dim)
            symmetries.append(Symmetry(self.kind if is_read else "rotation", dim, tuple(slices)))
        for number in range(len(self.pairs)):
            symmetries += self.inner_symmetries(number)
        return [*symmetries, *hidden_units(self.mlp, "mlp")]

    def logit_scale(self) -> LogitScale:
        """Return the parameters that scale and shift the logit and nothing else."""
        scale = scale_of_sum(self.sparse, self.mlp, None)
        return LogitScale({**scale.degrees, "products.weight": 1.0}, scale.shift)


def latest(states_BLW: Tensor, mask_BL: Tensor) -> Tensor:
    """Return ``(B, W)``: the states of the latest ids; zeros for an empty history."""
    is_latest_BL = mask_BL & (ids_to_come(mask_BL) == 0)
    return (states_BLW * is_latest_BL.unsqueeze(2)).sum(1)


def ids_to_come(mask_BL: Tensor) -> Tensor:
    """Return ``(B, L)``: how many ids follow each position in its history."""
    return mask_BL.sum(1, keepdim=True) - mask_BL.cumsum(1)
