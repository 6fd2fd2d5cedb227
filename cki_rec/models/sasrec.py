"""SASRec. Shape legend: B rows, L ids of a history, W width, H heads, C width of a head."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from cki_rec.config import SequenceOptions, UserError
from cki_rec.merging.symmetry import Slice, Symmetry
from cki_rec.models.attention import NOWHERE
from cki_rec.models.layers import Dropout
from cki_rec.models.sequential import SequentialNetwork, ids_to_come, latest
from cki_rec.models.symmetries import Basis


class Attention(nn.Module):
    """Multi-head attention of the positions of a history to each other.

    Args:
        width: W.
        heads: H; divides W.

    Differs:
        Queries, keys and values have no biases: those of keys do nothing, and those of values
        equal the bias of the output.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.output = nn.Linear(width, width)

    def forward(self, x_BLW: Tensor, is_read_BLL: Tensor) -> Tensor:
        """Return ``(B, L, W)``; ``is_read_BLL`` is true where a position reads another."""
        q_BHLC, k_BHLC, v_BHLC = (
            project(x_BLW).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        score_BHLL = q_BHLC @ k_BHLC.transpose(2, 3) * self.scale
        score_BHLL = score_BHLL.masked_fill(~is_read_BLL.unsqueeze(1), NOWHERE)
        mixed_BHLC = score_BHLL.softmax(3) @ v_BHLC
        y_BLW: Tensor = self.output(mixed_BHLC.transpose(1, 2).flatten(2))
        return y_BLW


class Block(nn.Module):
    """Attention, then a feed-forward layer, each on normalized inputs and added to them."""

    def __init__(self, width: int, options: SequenceOptions) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, options.heads)
        self.norm = nn.LayerNorm(width)
        self.inner = nn.Linear(width, options.hidden)
        self.outer = nn.Linear(options.hidden, width)
        self.dropout = Dropout(options.dropout)

    def forward(self, x_BLW: Tensor, is_read_BLL: Tensor) -> Tensor:
        """Return ``(B, L, W)``; ``is_read_BLL`` is true where a position reads another."""
        read = self.attention(self.attention_norm(x_BLW), is_read_BLL)
        x_BLW = x_BLW + self.dropout(read)
        hidden = self.dropout(self.inner(self.norm(x_BLW)).relu())
        y_BLW: Tensor = x_BLW + self.dropout(self.outer(hidden))
        return y_BLW


class SelfAttentionEncoder(nn.Module):
    """Causal self-attention over a history; the output at its latest id is the state.

    Positions count from the latest id. An empty history has a learned state.
    """

    multiplies_coordinates = True
    """Layer norms do, so it cannot read projected embeddings (``cki_rec.merging.traits``)."""

    def __init__(self, width: int, options: SequenceOptions) -> None:
        super().__init__()
        if width % options.heads:
            raise UserError(
                f"model.sequence.heads={options.heads}: must divide the width of a history,"
                f" {width}"
            )
        self.scale = width**0.5
        self.positions = nn.Parameter(torch.zeros(options.length, width))
        self.dropout = Dropout(options.dropout)
        self.blocks = nn.ModuleList(Block(width, options) for _ in range(options.layers))
        self.norm = nn.LayerNorm(width)

    def valid_positions(self, ids_BLW: Tensor, mask_BL: Tensor) -> Tensor:
        """Return ``(B * L,)``: the rows of the inputs of Linear layers that hold an id."""
        return mask_BL.flatten()

    def forward(self, ids_BLW: Tensor, mask_BL: Tensor) -> Tensor:
        """Return ``(B, W)``; ``mask_BL`` is true at valid positions."""
        state_BW: Tensor = self.norm(latest(self.states(ids_BLW, mask_BL), mask_BL))
        return state_BW

    def states(self, ids_BLW: Tensor, mask_BL: Tensor) -> Tensor:
        """Return ``(B, L, W)``; each state depends on its id and earlier ones."""
        place_BL = ids_to_come(mask_BL)
        x_BLW = self.dropout(ids_BLW * self.scale + embedding(place_BL, self.positions))
        is_earlier_BLL = place_BL.unsqueeze(1) >= place_BL.unsqueeze(2)
        is_read_BLL = mask_BL.unsqueeze(1) & is_earlier_BLL
        for block in self.blocks:
            x_BLW = block(x_BLW, is_read_BLL)
        states_BLW: Tensor = x_BLW
        return states_BLW


class SASRec(SequentialNetwork):
    """Causal self-attention over histories; inner products with targets, and an MLP.

    Reference:
        Kang and McAuley, Self-Attentive Sequential Recommendation, ICDM 2018.

    Differs:
        The paper has no MLP. It trains all positions at once on sampled items; here a row is one
        target. Attention weights have no dropout.
    """

    encoder = SelfAttentionEncoder
    kind = "permutation"

    def slices_of(self, number: int, basis: Basis, dim: int) -> Iterator[Slice]:
        """Yield the slices of encoder ``number`` that a basis moves.

        Layer norms subtract means of coordinates, so there are no signs and no rotations.
        """
        name, order = f"encoders.{number}", self.pairs[number].histories
        yield from basis.blocks(f"{name}.positions", order, dim)
        for layer in range(len(self.encoders[number].blocks)):  # type: ignore[arg-type]
            block = f"{name}.blocks.{layer}"
            for reader in ("attention.query", "attention.key", "attention.value", "inner"):
                yield from basis.blocks(f"{block}.{reader}.weight", order, dim)
            for writer in ("attention_norm", "attention.output", "norm", "outer"):
                for key in ("weight", "bias"):
                    yield from basis.blocks(f"{block}.{writer}.{key}", order, dim, axis=0)
        for key in ("weight", "bias"):
            yield from basis.blocks(f"{name}.norm.{key}", order, dim, axis=0)

    def inner_symmetries(self, number: int) -> list[Symmetry]:
        """Return rotations inside heads, permutations of heads, and of hidden units, per block."""
        symmetries = []
        encoder = self.encoders[number]
        assert isinstance(encoder, SelfAttentionEncoder)
        for layer, block in enumerate(encoder.blocks):
            assert isinstance(block, Block)
            name = f"encoders.{number}.blocks.{layer}"
            heads, width = block.attention.heads, block.attention.output.in_features
            size = width // heads
            query, key, value, output = (
                (f"{name}.attention.{part}.weight", axis)
                for part, axis in (("query", 0), ("key", 0), ("value", 0), ("output", 1))
            )
            for pair in ((query, key), (value, output)):
                for head in range(heads):
                    slices = tuple(Slice(*place, head * size) for place in pair)
                    symmetries.append(Symmetry("rotation", size, slices))
            if heads > 1:
                whole = tuple(Slice(*place, width=size) for place in (query, key, value, output))
                symmetries.append(Symmetry("permutation", heads, whole))
            inner = [Slice(f"{name}.inner.{word}", 0) for word in ("weight", "bias")]
            slices = (*inner, Slice(f"{name}.outer.weight", 1))
            symmetries.append(Symmetry("permutation", block.inner.out_features, slices))
        return symmetries
