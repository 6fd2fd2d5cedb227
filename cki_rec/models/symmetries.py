"""Symmetries of the blocks that models share; ``merging.symmetry`` defines a symmetry."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from cki_rec.merging.symmetry import Kind, LogitScale, Slice, Symmetry
from cki_rec.models.embeddings import FIRST_ORDER, FieldEmbeddings
from cki_rec.models.layers import MLP, Dice


@dataclass(frozen=True, slots=True)
class Frame:
    """Fields whose embeddings have common coordinates: those of a table, or one number."""

    vectors: Slice
    fields: tuple[str, ...]

    def blocks(
        self,
        parameter: str,
        order: Sequence[str],
        dim: int,
        axis: int = 1,
        start: int = 0,
        signed: bool = True,
    ) -> list[Slice]:
        """Return the slices of ``parameter`` that meet the fields of this frame.

        Args:
            parameter: What reads a concatenation of embeddings.
            order: The fields of the concatenation.
            dim: Width of one embedding.
            axis: That runs over the concatenation.
            start: Where the concatenation begins on it.
            signed: Whether the blocks change sign with the embeddings.
        """
        return [
            Slice(parameter, axis, start + place * dim, signed=signed)
            for place, name in enumerate(order)
            if name in self.fields
        ]


def frames(sparse: FieldEmbeddings) -> list[Frame]:
    """Return the frames of all fields: one per table, one per numeric field."""
    fields: dict[str, list[str]] = {}
    for field, parameter in sparse.sources.items():
        fields.setdefault(parameter, []).append(field)
    found = []
    for parameter, of_table in fields.items():
        if parameter == "numbers":
            found += [
                Frame(Slice("sparse.numbers", 1, within=((0, row, row + 1),)), (field,))
                for row, field in enumerate(of_table)
            ]
        else:
            found.append(Frame(Slice(f"sparse.{parameter}", 1), tuple(of_table)))
    return found


def common_frame(sparse: FieldEmbeddings, readers: Iterable[str] = ()) -> Symmetry:
    """Return the one rotation of all embeddings, and of parameters that read all of them."""
    dim = sparse.embedding_dim
    parts = frames(sparse)
    slices = [part.vectors for part in parts]
    slices += [s for r in readers for part in parts for s in part.blocks(r, sparse.fields, dim)]
    return Symmetry("rotation", dim, tuple(slices))


def own_frames(sparse: FieldEmbeddings, readers: Iterable[str]) -> list[Symmetry]:
    """Return a rotation of each frame, and of ``readers``: linear maps of all embeddings."""
    dim, readers = sparse.embedding_dim, list(readers)
    return [
        Symmetry(
            "rotation",
            dim,
            (part.vectors, *(s for r in readers for s in part.blocks(r, sparse.fields, dim))),
        )
        for part in frames(sparse)
    ]


def hidden_units(mlp: MLP, name: str, readers: Sequence[Slice] = ()) -> list[Symmetry]:
    """Return the permutations of each hidden layer of an MLP that is called ``name``.

    Args:
        mlp: The network.
        name: Its own, before those of its parameters.
        readers: What reads its last hidden layer where that is its output; none: that layer's
            units are left out.
    """
    found = []
    for layer, activation in enumerate(mlp.activations):
        is_last = layer + 1 == len(mlp.layers)
        if is_last and not readers:
            continue
        after = readers if is_last else [Slice(f"{name}.layers.{layer + 1}.weight", 1)]
        slices = (*layer_outputs(mlp, name, layer), *after)
        found.append(Symmetry(hidden_kind(activation), mlp.hidden[layer], slices))
    return found


def layer_outputs(
    mlp: MLP, name: str, layer: int, start: int = 0, width: int = 1
) -> Iterator[Slice]:
    """Yield what makes the outputs of a hidden layer, from unit ``start`` on."""
    whole = [f"{name}.layers.{layer}.weight", f"{name}.layers.{layer}.bias"]
    scales: list[str] = []
    if mlp.norms:
        whole += [f"{name}.norms.{layer}.{key}" for key in ("bias", "running_mean")]
        scales += [f"{name}.norms.{layer}.{key}" for key in ("weight", "running_var")]
    activation = mlp.activations[layer]
    if isinstance(activation, Dice):
        keys = ("alpha", "norm.running_mean", "norm.running_var")
        scales += [f"{name}.activations.{layer}.{key}" for key in keys]
    elif isinstance(activation, nn.PReLU):
        scales.append(f"{name}.activations.{layer}.weight")
    for parameter in whole:
        yield Slice(parameter, 0, start, width)
    for parameter in scales:
        yield Slice(parameter, 0, start, width, signed=False)


def hidden_kind(activation: nn.Module) -> Kind:
    """Return what permutes units behind ``activation``: odd functions let signs pass."""
    return "signed_permutation" if isinstance(activation, nn.Tanh) else "permutation"


def scale_of_sum(sparse: FieldEmbeddings, mlp: MLP | None, shift: str | None) -> LogitScale:
    """Return how to scale first-order weights plus, if there is one, the score of an MLP.

    Args:
        sparse: Whose first-order weights are added; they may be none.
        mlp: Called ``mlp``, read by nothing.
        shift: A parameter that is added; None: the last bias of the MLP.
    """
    degrees = {
        f"sparse.{name}": 1.0 for name, _ in sparse.named_parameters() if FIRST_ORDER in name
    }
    if mlp is not None:
        last = f"mlp.layers.{len(mlp.layers) - 1}"
        degrees |= {f"{last}.weight": 1.0, f"{last}.bias": 1.0}
        shift = shift or f"{last}.bias"
    assert shift is not None
    return LogitScale({**degrees, shift: 1.0}, shift)


def scale_with_products(sparse: FieldEmbeddings, mlp: MLP | None, shift: str | None) -> LogitScale:
    """Return ``scale_of_sum`` of what also adds inner products of all embeddings."""
    found = scale_of_sum(sparse, mlp, shift)
    degrees = dict.fromkeys((f"sparse.{name}" for name in sparse.sources.values()), 0.5)
    degrees |= found.degrees
    if mlp is not None:  # it shall see what it saw before
        reader = "mlp.layers.0.weight"
        degrees[reader] = degrees.get(reader, 0.0) - 0.5
    return LogitScale(degrees, found.shift)
