"""Symmetries of the blocks that several models contain (``merging.symmetry`` defines them)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from cki_rec.merging.symmetry import Kind, LogitScale, Slice, Symmetry
from cki_rec.models.embeddings import FIRST_ORDER, FieldEmbeddings
from cki_rec.models.layers import MLP, Dice


@dataclass(frozen=True, slots=True)
class Basis:
    """Fields with a common basis of their embeddings: the fields of a table, or one number."""

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
        """Return the slices of ``parameter`` that read the fields of this basis.

        Args:
            parameter: A parameter that reads a concatenation of embeddings.
            order: The fields of the concatenation.
            dim: Width of one embedding.
            axis: The axis of the concatenation.
            start: The first entry of the concatenation on this axis.
            signed: Whether the blocks change sign with the embeddings.
        """
        return [
            Slice(parameter, axis, start + place * dim, signed=signed)
            for place, name in enumerate(order)
            if name in self.fields
        ]


def bases(sparse: FieldEmbeddings) -> list[Basis]:
    """Return one basis per table and one per numeric field."""
    fields: dict[str, list[str]] = {}
    for field, parameter in sparse.sources.items():
        fields.setdefault(parameter, []).append(field)
    result = []
    for parameter, of_table in fields.items():
        if parameter == "numbers":
            result += [
                Basis(Slice("sparse.numbers", 1, within=((0, row, row + 1),)), (field,))
                for row, field in enumerate(of_table)
            ]
        else:
            result.append(Basis(Slice(f"sparse.{parameter}", 1), tuple(of_table)))
    return result


def shared_basis(sparse: FieldEmbeddings, readers: Iterable[str] = ()) -> Symmetry:
    """Return one rotation of all embeddings and of the parameters ``readers`` that read them."""
    dim = sparse.embedding_dim
    parts = bases(sparse)
    slices = [basis.vectors for basis in parts]
    slices += [s for r in readers for basis in parts for s in basis.blocks(r, sparse.fields, dim)]
    return Symmetry("rotation", dim, tuple(slices))


def separate_bases(sparse: FieldEmbeddings, readers: Iterable[str]) -> list[Symmetry]:
    """Return one rotation per basis; ``readers`` are linear maps of all embeddings."""
    dim, readers = sparse.embedding_dim, list(readers)
    return [
        Symmetry(
            "rotation",
            dim,
            (basis.vectors, *(s for r in readers for s in basis.blocks(r, sparse.fields, dim))),
        )
        for basis in bases(sparse)
    ]


def hidden_units(mlp: MLP, name: str, readers: Sequence[Slice] = ()) -> list[Symmetry]:
    """Return the permutations of every hidden layer of an MLP.

    Args:
        mlp: The MLP.
        name: The prefix of its parameter names.
        readers: The slices that read its output, if the last hidden layer is the output. Without
            them that layer is left out.
    """
    symmetries = []
    for layer, activation in enumerate(mlp.activations):
        is_last = layer + 1 == len(mlp.layers)
        if is_last and not readers:
            continue
        after = readers if is_last else [Slice(f"{name}.layers.{layer + 1}.weight", 1)]
        slices = (*layer_outputs(mlp, name, layer), *after)
        symmetries.append(Symmetry(hidden_kind(activation), mlp.hidden[layer], slices))
    return symmetries


def layer_outputs(
    mlp: MLP, name: str, layer: int, start: int = 0, width: int = 1
) -> Iterator[Slice]:
    """Yield the slices that compute the outputs of a hidden layer, from unit ``start`` on."""
    signed = [f"{name}.layers.{layer}.weight", f"{name}.layers.{layer}.bias"]
    unsigned: list[str] = []
    if mlp.norms:
        signed += [f"{name}.norms.{layer}.{key}" for key in ("bias", "running_mean")]
        unsigned += [f"{name}.norms.{layer}.{key}" for key in ("weight", "running_var")]
    activation = mlp.activations[layer]
    if isinstance(activation, Dice):
        keys = ("alpha", "norm.running_mean", "norm.running_var")
        unsigned += [f"{name}.activations.{layer}.{key}" for key in keys]
    elif isinstance(activation, nn.PReLU):
        unsigned.append(f"{name}.activations.{layer}.weight")
    for parameter in signed:
        yield Slice(parameter, 0, start, width)
    for parameter in unsigned:
        yield Slice(parameter, 0, start, width, signed=False)


def hidden_kind(activation: nn.Module) -> Kind:
    """Return the symmetry of units before ``activation``: odd functions admit sign changes."""
    return "signed_permutation" if isinstance(activation, nn.Tanh) else "permutation"


def scale_of_sum(sparse: FieldEmbeddings, mlp: MLP | None, shift: str | None) -> LogitScale:
    """Return the logit scale of a sum of first-order weights and the output of an MLP.

    Args:
        sparse: Embeddings, with or without first-order weights.
        mlp: The submodule ``mlp`` of the network; None: the network has none.
        shift: A parameter that is added to the logit; None: the last bias of the MLP.
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
    """Return the logit scale of a sum as above, plus inner products of all embeddings."""
    scale = scale_of_sum(sparse, mlp, shift)
    degrees = dict.fromkeys((f"sparse.{name}" for name in sparse.sources.values()), 0.5)
    degrees |= scale.degrees
    if mlp is not None:  # keeps the inputs of its first layer unchanged
        reader = "mlp.layers.0.weight"
        degrees[reader] = degrees.get(reader, 0.0) - 0.5
    return LogitScale(degrees, scale.shift)
