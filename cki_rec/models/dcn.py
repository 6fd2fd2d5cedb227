"""DCN and DCNv2. Shape legend: B rows, F fields, D embedding size, W = F * D."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from cki_rec.config import Model
from cki_rec.data.schema import Batch, FeatureSchema
from cki_rec.merging.symmetry import Kind, LogitScale, Slice, Symmetry
from cki_rec.models.cross_network import CrossNet, CrossNetMix, CrossNetV2
from cki_rec.models.embeddings import Embedded, FieldEmbeddings
from cki_rec.models.layers import MLP, MLP_OPTIONS
from cki_rec.models.symmetries import Basis, bases, hidden_units


class DCN(nn.Module):
    """A cross network and an MLP on shared embeddings, and a linear map of both outputs.

    Without hidden layers only the cross network remains.

    Reference:
        Wang et al., Deep & Cross Network for Ad Click Predictions, ADKDD 2017.

    Differs:
        Numbers have embeddings too; the paper concatenates their values.
    """

    basis_kind: Kind = "rotation"
    reads = (*MLP_OPTIONS, "cross")

    def __init__(
        self, schema: FeatureSchema, model: Model, device: torch.device | None = None
    ) -> None:
        super().__init__()
        dim = model.embedding_dim
        self.sparse = FieldEmbeddings(schema, dim, first_order=False, device=device)
        width = len(self.sparse.fields) * dim
        self.is_stacked, self.num_layers = self.stacks(model), model.cross.layers
        self.cross = self.make_cross(width, model)
        self.mlp = MLP(
            width, model.hidden, model.dropout, model.activation, model.batch_norm, scores=0
        )
        self.is_deep = bool(model.hidden)
        both = width + self.mlp.width if self.is_deep else width
        self.score = nn.Linear(self.mlp.width if self.is_stacked else both, 1)

    def stacks(self, model: Model) -> bool:
        """Return whether the MLP reads the output of the cross network, not the embeddings."""
        return False

    def make_cross(self, width: int, model: Model) -> nn.Module:
        """Return the cross network."""
        return CrossNet(width, model.cross.layers)

    def forward(self, batch: Batch) -> Tensor:
        """Return ``(B,)`` logits of a click."""
        return self.interact(self.sparse(batch))

    def interact(self, emb: Embedded) -> Tensor:
        """Return ``(B,)`` logits from embeddings: the network without its lookups."""
        x_BW = emb.fields_BFD.flatten(1)
        crossed_BW = self.cross(x_BW)
        if self.is_stacked:
            top = self.mlp(crossed_BW)
        elif self.is_deep:
            top = torch.cat([crossed_BW, self.mlp(x_BW)], dim=1)
        else:
            top = crossed_BW
        logit_B: Tensor = self.score(top).squeeze(1)
        return logit_B

    def symmetries(self) -> list[Symmetry]:
        """Return the symmetries of each table and number, then of hidden units."""
        dim, order = self.sparse.embedding_dim, self.sparse.fields
        readers = ["mlp.layers.0.weight"] if self.is_deep else []
        readers += ["score.weight"] if not (self.is_stacked and self.is_deep) else []
        symmetries = []
        for basis in bases(self.sparse):
            read = [s for reader in readers for s in basis.blocks(reader, order, dim)]
            slices = (basis.vectors, *self.cross_slices(basis), *read)
            symmetries.append(Symmetry(self.basis_kind, dim, slices))
        start = 0 if self.is_stacked else len(order) * dim
        return [*symmetries, *hidden_units(self.mlp, "mlp", [Slice("score.weight", 1, start)])]

    def logit_scale(self) -> LogitScale:
        """Return the parameters that scale and shift the logit and nothing else."""
        return LogitScale({"score.weight": 1.0, "score.bias": 1.0}, "score.bias")

    def cross_slices(self, basis: Basis) -> Iterator[Slice]:
        """Yield the slices of the cross network for the coordinates of ``basis``."""
        dim, order = self.sparse.embedding_dim, self.sparse.fields
        for layer in range(self.num_layers):
            yield from basis.blocks(f"cross.layers.{layer}.map.weight", order, dim)
            yield from basis.blocks(f"cross.layers.{layer}.bias", order, dim, axis=0)


class DCNv2(DCN):
    """A cross network of full or low-rank matrices, parallel to the MLP or below it.

    It multiplies coordinates, so the symmetries of embeddings are signed permutations.

    Reference:
        Wang et al., DCN V2, WWW 2021.

    Differs:
        As DCN.
    """

    basis_kind: Kind = "signed_permutation"

    def stacks(self, model: Model) -> bool:
        """Return whether the MLP reads the output of the cross network, not the embeddings."""
        return model.cross.structure == "stacked"

    def make_cross(self, width: int, model: Model) -> nn.Module:
        """Return the cross network."""
        cross = model.cross
        if cross.rank is None:
            return CrossNetV2(width, cross.layers)
        return CrossNetMix(width, cross.layers, cross.rank, cross.experts)

    def cross_slices(self, basis: Basis) -> Iterator[Slice]:
        """Yield the slices of the cross network for the coordinates of ``basis``.

        Factors of the input follow its order but not its signs.
        """
        dim, order = self.sparse.embedding_dim, self.sparse.fields
        for layer in range(self.num_layers):
            name = f"cross.layers.{layer}"
            if isinstance(self.cross, CrossNetMix):
                yield from basis.blocks(f"{name}.down", order, dim)
                yield from basis.blocks(f"{name}.up", order, dim, signed=False)
            else:
                yield from basis.blocks(f"{name}.weight", order, dim)
                yield from basis.blocks(f"{name}.weight", order, dim, axis=0, signed=False)
            yield from basis.blocks(f"{name}.bias", order, dim, axis=0, signed=False)
        if isinstance(self.cross, CrossNetMix) and self.cross.gate is not None:
            yield from basis.blocks("cross.gate.weight", order, dim)

    def symmetries(self) -> list[Symmetry]:
        """Return the symmetries of tables, hidden units, experts and the units of experts."""
        if not isinstance(self.cross, CrossNetMix):
            return super().symmetries()
        experts, rank = self.cross.experts, self.cross.rank
        names = [f"cross.layers.{layer}" for layer in range(self.num_layers)]
        of_experts = []
        for name in names:
            for expert in range(experts):
                only = ((0, expert, expert + 1),)
                down, up = (Slice(f"{name}.{key}", 2, within=only) for key in ("down", "up"))
                inner, outer = (Slice(f"{name}.core", axis, within=only) for axis in (2, 1))
                of_experts.append(Symmetry("signed_permutation", rank, (down, inner)))
                of_experts.append(Symmetry("signed_permutation", rank, (outer, up)))
        if experts > 1:
            keys = [f"{name}.{key}" for name in names for key in ("down", "core", "up")]
            slices = (*(Slice(key, 0) for key in keys), Slice("cross.gate.weight", 0))
            of_experts.append(Symmetry("permutation", experts, slices))
        return [*super().symmetries(), *of_experts]
