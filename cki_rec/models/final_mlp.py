"""FinalMLP. Shape legend: B rows, F fields, D embedding size, W = F * D, K heads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from cki_rec.config import Model, UserError, nearest
from cki_rec.data.schema import Batch, FeatureSchema
from cki_rec.merging.symmetry import Kind, LogitScale, Slice, Symmetry
from cki_rec.models.embeddings import Embedded, FieldEmbeddings
from cki_rec.models.layers import MLP, MLP_OPTIONS
from cki_rec.models.symmetries import Basis, bases, hidden_kind, hidden_units, layer_outputs

STREAMS = ("mlp", "second")


class FeatureGate(nn.Module):
    r"""Factors in (0, 2) for every entry of the embeddings, computed from a context.

    .. math:: 2\,\sigma(MLP(context))

    Args:
        context: Width of the context.
        hidden: Widths of the MLP.
        width: W, number of factors.
        is_learned: Whether the context is a learned vector instead of embeddings.

    Reference:
        Mao et al., FinalMLP, AAAI 2023, stream-specific feature selection.
    """

    multiplies_coordinates = True
    """It cannot read projected embeddings (``cki_rec.merging.traits``)."""

    def __init__(self, context: int, hidden: Sequence[int], width: int, is_learned: bool) -> None:
        super().__init__()
        self.context = (
            nn.Parameter(nn.init.xavier_uniform_(torch.empty(1, context))) if is_learned else None
        )
        self.mlp = MLP(context, hidden, dropout=0.0, scores=0)
        self.factors = nn.Linear(self.mlp.width, width)

    def forward(self, context_BC: Tensor | None) -> Tensor:
        """Return ``(B, W)``, or ``(1, W)`` for a learned context."""
        context_BC = self.context if context_BC is None else context_BC
        gate_BW: Tensor = self.factors(self.mlp(context_BC))
        return 2 * gate_BW.sigmoid()


class BilinearFusion(nn.Module):
    r"""Sum of a linear map of each of two vectors and a bilinear form per head.

    .. math:: b + w_1^T o_1 + w_2^T o_2 + \sum_k o_{1,k}^T W_k\, o_{2,k}

    Args:
        first: Width of the first vector.
        second: Width of the second vector.
        heads: K, number of parts of each vector.

    Reference:
        Mao et al., FinalMLP, AAAI 2023, stream-level interaction aggregation.
    """

    def __init__(self, first: int, second: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.first = nn.Linear(first, 1)
        self.second = nn.Linear(second, 1, bias=False)
        forms = [torch.empty(first // heads, second // heads) for _ in range(heads)]
        self.forms = nn.Parameter(torch.stack([nn.init.xavier_uniform_(form) for form in forms]))

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Return ``(B,)``."""
        linear_B = (self.first(first) + self.second(second)).squeeze(1)
        first_BKI = first.unflatten(1, (self.heads, -1))
        second_BKJ = second.unflatten(1, (self.heads, -1))
        form_BKJ = torch.einsum("bki,kij->bkj", first_BKI, self.forms)
        joined_B: Tensor = linear_B + (form_BKJ * second_BKJ).flatten(1).sum(1)
        return joined_B


class FinalMLP(nn.Module):
    """Two gated MLPs on shared embeddings, joined by a bilinear form.

    Reference:
        Mao et al., FinalMLP: An Enhanced Two-Stream MLP Model for CTR Prediction, AAAI 2023.

    Differs:
        Gates read the embeddings of the streams instead of separate embeddings.
    """

    reads = (*MLP_OPTIONS, "streams")

    def __init__(
        self, schema: FeatureSchema, model: Model, device: torch.device | None = None
    ) -> None:
        super().__init__()
        _check_widths(model)
        options, dim = model.streams, model.embedding_dim
        self.gate_hidden = list(options.gate_hidden)
        self.sparse = FieldEmbeddings(schema, dim, first_order=False, device=device)
        self.contexts = _contexts(model, self.sparse.fields) if options.selection else []
        width = len(self.sparse.fields) * dim
        self.gates = nn.ModuleList(
            FeatureGate(max(len(names), 1) * dim, options.gate_hidden, width, not names)
            for names in self.contexts
        )
        self.places = [[self.sparse.fields.index(n) for n in names] for names in self.contexts]
        self.mlp = MLP(
            width, model.hidden, model.dropout, model.activation, model.batch_norm, scores=0
        )
        self.second = MLP(
            width, options.hidden, options.dropout, model.activation, options.batch_norm, scores=0
        )
        self.fusion = BilinearFusion(self.mlp.width, self.second.width, options.heads)

    def forward(self, batch: Batch) -> Tensor:
        """Return ``(B,)`` logits of a click."""
        return self.interact(self.sparse(batch))

    def interact(self, emb: Embedded) -> Tensor:
        """Return ``(B,)`` logits from embeddings: the network without its lookups."""
        x_BW = emb.fields_BFD.flatten(1)
        inputs = [x_BW, x_BW]
        for stream, gate in enumerate(self.gates):
            parts = [emb.fields_BFD[:, place] for place in self.places[stream]]
            inputs[stream] = x_BW * gate(torch.cat(parts, dim=1) if parts else None)
        logit_B: Tensor = self.fusion(self.mlp(inputs[0]), self.second(inputs[1]))
        return logit_B

    def symmetries(self) -> list[Symmetry]:
        """Return the symmetries of tables and numbers, hidden units, heads and units of heads.

        With gates, embeddings admit signed permutations only: factors are per coordinate.
        """
        dim, order = self.sparse.embedding_dim, self.sparse.fields
        symmetries = []
        for basis in bases(self.sparse):
            read = [
                s for name in STREAMS for s in basis.blocks(f"{name}.layers.0.weight", order, dim)
            ]
            slices = (basis.vectors, *read, *self._gate_slices(basis))
            kind: Kind = "signed_permutation" if self.contexts else "rotation"
            symmetries.append(Symmetry(kind, dim, slices))
        for number, gate in enumerate(self.gates):
            assert isinstance(gate, FeatureGate)
            name = f"gates.{number}"
            if gate.context is not None:
                slices = (Slice(f"{name}.context", 1), Slice(self._context_reader(number), 1))
                symmetries.append(Symmetry("rotation", dim, slices))
            symmetries += hidden_units(
                gate.mlp, f"{name}.mlp", [Slice(f"{name}.factors.weight", 1)]
            )
        return [*symmetries, *self._stream_symmetries()]

    def logit_scale(self) -> LogitScale:
        """Return the parameters that scale and shift the logit and nothing else."""
        names = ("first.weight", "first.bias", "second.weight", "forms")
        return LogitScale({f"fusion.{name}": 1.0 for name in names}, "fusion.first.bias")

    def _context_reader(self, number: int) -> str:
        return f"gates.{number}.{'mlp.layers.0' if self.gate_hidden else 'factors'}.weight"

    def _gate_slices(self, basis: Basis) -> Iterator[Slice]:
        dim, order = self.sparse.embedding_dim, self.sparse.fields
        for number, names in enumerate(self.contexts):
            yield from basis.blocks(self._context_reader(number), names, dim)
            for key in ("weight", "bias"):
                factors = f"gates.{number}.factors.{key}"
                yield from basis.blocks(factors, order, dim, axis=0, signed=False)

    def _stream_symmetries(self) -> list[Symmetry]:
        """Return the symmetries of hidden units, of the units of each head, and of heads."""
        symmetries, of_heads, heads = [], [], self.fusion.heads
        for axis, (name, mlp, reader) in enumerate(
            zip(STREAMS, (self.mlp, self.second), ("first", "second"), strict=True), start=1
        ):
            symmetries += hidden_units(mlp, name)
            last, size = len(mlp.layers) - 1, mlp.width // heads
            kind = hidden_kind(mlp.activations[last])
            linear = f"fusion.{reader}.weight"
            for head in range(heads):
                slices = (
                    *layer_outputs(mlp, name, last, head * size),
                    Slice(linear, 1, head * size),
                    Slice("fusion.forms", axis, within=((0, head, head + 1),)),
                )
                symmetries.append(Symmetry(kind, size, slices))
            of_heads += [*layer_outputs(mlp, name, last, width=size), Slice(linear, 1, width=size)]
        if heads > 1:
            slices = (*of_heads, Slice("fusion.forms", 0))
            symmetries.append(Symmetry("permutation", heads, slices))
        return symmetries


def _contexts(model: Model, fields: Sequence[str]) -> list[list[str]]:
    contexts = model.streams.contexts
    if len(contexts) != len(STREAMS):
        raise UserError(f"model.streams.contexts={contexts}: use one list of fields per stream")
    for name in (name for names in contexts for name in names):
        if name not in fields:
            hint = nearest(name, fields)
            known = ", ".join(fields)
            raise UserError(f"model.streams.contexts: no field {name}; {hint}one of {known}")
    return [list(names) for names in contexts]


def _check_widths(model: Model) -> None:
    heads = model.streams.heads
    for key, hidden in (("hidden", model.hidden), ("streams.hidden", model.streams.hidden)):
        if not hidden:
            raise UserError(f"model.{key}=[]: FinalMLP needs hidden layers in both streams")
        if hidden[-1] % heads:
            raise UserError(
                f"model.streams.heads={heads}: must divide the last width of model.{key}={hidden}"
            )
