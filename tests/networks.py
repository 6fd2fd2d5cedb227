"""Networks, schemas and batches that several tests use, and the action of symmetries."""

from __future__ import annotations

from functools import reduce

import pytest
import torch
from samples import slow_but
from torch import Tensor, nn

from cki_rec.config import Attention, Bottom, Cross, Model, SequenceOptions, Streams
from cki_rec.data.schema import Batch, Feature, FeatureSchema
from cki_rec.merging.symmetry import Symmetry
from cki_rec.models import build_model, model_schema
from cki_rec.models.embeddings import Embedded


def options(name: str = "deepfm", **changes) -> Model:
    """Return options of a small network; ``cross__rank=2`` changes ``cross.rank``."""
    model = Model(
        name=name,
        module=None,
        embedding_dim=8,
        hidden=[16, 8],
        activation="relu",
        batch_norm=False,
        dropout=0.0,
        init_std=0.1,
        matrix_std=None,
        histories=True,
        cross=Cross(layers=2, structure="parallel", rank=None, experts=1),
        attention=Attention(
            pairs=[], length=4, hidden=[6], activation="dice", dropout=0.0, softmax=False
        ),
        streams=Streams(
            hidden=[12],
            dropout=0.0,
            batch_norm=False,
            heads=2,
            selection=True,
            gate_hidden=[5],
            contexts=[[], []],
        ),
        sequence=SequenceOptions(pairs=[], length=4, layers=1, hidden=6, heads=2, dropout=0.0),
        bottom=Bottom(hidden=[5]),
    )
    for key, value in changes.items():
        *path, last = key.split("__")
        setattr(reduce(getattr, path, model), last, value)
    return model


def make_schema(*features: tuple[str, str, str]) -> FeatureSchema:
    """Return a schema of (name, table, kind), tables of different small sizes."""
    tables = dict.fromkeys(table for _, table, _ in features if table)
    return FeatureSchema(
        features=tuple(Feature(*feature) for feature in features),
        table_sizes={table: 9 + 3 * place for place, table in enumerate(tables)},
        vocabulary_hashes={table: f"hash of {table}" for table in tables},
    )


MIXED = make_schema(
    ("user", "user", "categorical"),
    ("age", "", "numeric"),
    ("item", "item", "categorical"),
    ("brand", "brand", "categorical"),
    ("genres", "genres", "multi"),
    ("clicked", "item", "history"),
    ("price", "", "numeric"),
    ("clicked_brands", "brand", "history"),
    ("friend", "user", "categorical"),
    ("skipped", "item", "history"),
)
"""Every kind of field, neighbours or not; a number between lookups, three histories."""
SCHEMAS = {
    "mixed": MIXED,
    "short": make_schema(("item", "item", "categorical"), ("clicked", "item", "history")),
    "plain": make_schema(("site", "site", "categorical"), ("hour", "hour", "categorical")),
    "numbers": make_schema(("age", "", "numeric"), ("price", "", "numeric")),
    "one": make_schema(("site", "site", "categorical")),
}
WITH_HISTORIES = ("mixed", "short")
OF_HISTORIES = ("din", "sasrec", "gru4rec")
"""Models that require histories."""
CASES = {
    "lr": ("lr", {}),
    "fm": ("fm", {}),
    "dnn": ("dnn", {"activation": "tanh", "batch_norm": True}),
    "wide_deep": ("wide_deep", {"activation": "prelu"}),
    "deepfm": ("deepfm", {"batch_norm": True}),
    "dcn": ("dcn", {"cross__layers": 3}),
    "dcn without MLP": ("dcn", {"hidden": []}),
    "dcnv2": ("dcnv2", {"activation": "dice"}),
    "dcnv2 stacked": ("dcnv2", {"cross__structure": "stacked"}),
    "dcnv2 of low rank": ("dcnv2", {"cross__rank": 3}),
    "dcnv2 mixture": ("dcnv2", {"cross__rank": 3, "cross__experts": 2, "hidden": [6]}),
    "din": ("din", {"activation": "dice", "batch_norm": True}),
    "din softmax": ("din", {"attention__softmax": True, "attention__activation": "prelu"}),
    "final_mlp": ("final_mlp", {}),
    "final_mlp plain": (
        "final_mlp",
        {"streams__selection": False, "activation": "tanh", "streams__heads": 1},
    ),
    "final_mlp batch norm": (
        "final_mlp",
        {"batch_norm": True, "streams__batch_norm": True, "activation": "dice"},
    ),
    "dlrm": ("dlrm", {}),
    "dlrm tanh": ("dlrm", {"activation": "tanh", "batch_norm": True, "bottom__hidden": []}),
    "sasrec": ("sasrec", {}),
    "sasrec of two blocks": ("sasrec", {"sequence__layers": 2, "sequence__heads": 1}),
    "gru4rec": ("gru4rec", {"activation": "dice", "batch_norm": True}),
    "gru4rec of two layers": ("gru4rec", {"sequence__layers": 2, "hidden": []}),
}
"""Title -> name in MODELS and options: every block and switch at least once, for any schema."""
ON_MIXED = {
    "din pairs": (
        "din",
        {
            "attention__pairs": [
                [["item", "brand"], ["clicked", "clicked_brands"]],
                ["item", "skipped"],
            ]
        },
    ),
    "din linear unit": (
        "din",
        {"attention__hidden": [], "attention__pairs": [["item", "clicked"]]},
    ),
    "sasrec pairs": (
        "sasrec",
        {
            "sequence__pairs": [
                [["item", "brand"], ["clicked", "clicked_brands"]],
                ["item", "skipped"],
            ]
        },
    ),
    "gru4rec pairs": (
        "gru4rec",
        {"sequence__pairs": [[["item", "brand"], ["skipped", "clicked_brands"]]]},
    ),
    "final_mlp contexts": (
        "final_mlp",
        {"streams__contexts": [["user", "age"], ["clicked"]], "streams__heads": 4},
    ),
    "final_mlp bare gates": (
        "final_mlp",
        {"streams__contexts": [["item"], []], "streams__gate_hidden": []},
    ),
}
"""The same, with names of the fields of MIXED."""
FITTING = [
    (title, key)
    for title in CASES
    for key in SCHEMAS
    if (CASES[title][0] not in OF_HISTORIES or key in WITH_HISTORIES)
    and (CASES[title][0] != "dlrm" or key != "one")
] + [(title, "mixed") for title in ON_MIXED]
"""Titles and schemas that go together."""
SLOW = (
    *("dlrm tanh", "sasrec of two blocks", "sasrec pairs"),
    *("gru4rec of two layers", "gru4rec pairs"),
)
"""Titles that ``make test-all`` alone runs."""
titles = pytest.mark.parametrize(
    "title", slow_but([t for t in (*CASES, *ON_MIXED) if t not in SLOW], [*CASES, *ON_MIXED])
)


def fitting(pairs: list[tuple[str, str]] = FITTING) -> pytest.MarkDecorator:
    """Return the decorator of a test that runs for these titles and schemas."""
    params = [
        pytest.param(title, key, marks=[pytest.mark.slow] if title in SLOW else [])
        for title, key in pairs
    ]
    return pytest.mark.parametrize(("title", "key"), params)


def build(schema: FeatureSchema, seed: int = 0, name: str = "deepfm", **changes) -> nn.Module:
    """Return a network on the CPU; nothing in it is left as memory was."""
    torch.manual_seed(seed)
    network = build_model(schema, options(name, **changes), torch.device("cpu"))
    for key, parameter in network.named_parameters():
        if "numbers" in key:
            nn.init.normal_(parameter, std=0.3)
    return network


def make_case(title: str, key: str) -> tuple[nn.Module, FeatureSchema]:
    """Return a random network and the schema that its batches have."""
    name, changes = {**CASES, **ON_MIXED}[title]
    network = randomize(build(SCHEMAS[key], name=name, **changes))
    return network, model_schema(SCHEMAS[key], options(name, **changes))


@torch.no_grad()
def randomize(network: nn.Module, seed: int = 0) -> nn.Module:
    """Set everything to random numbers, biases and running statistics too."""
    draw = torch.Generator().manual_seed(seed)
    for key, tensor in network.state_dict().items():
        if not tensor.is_floating_point():
            continue
        drawn = torch.randn(tensor.shape, generator=draw, dtype=torch.float64)
        tensor.copy_(drawn.abs() + 0.5 if key.endswith("running_var") else 0.5 * drawn)
    return network


def draw_batch(schema: FeatureSchema, num_rows: int, seed: int = 0, longest: int = 6) -> Batch:
    """Draw rows; sets hold 1 to 3 ids, histories 0 to ``longest``, those of row 0 none.

    Histories of a row are equally long.
    """
    draw = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, size: int) -> Tensor:
        return torch.randint(low, high + 1, (size,), generator=draw)

    in_history = integers(0, longest, num_rows)
    in_history[0] = 0
    values, lengths = [], []
    for feature in schema.lookups:
        sizes = {
            "categorical": torch.ones(num_rows, dtype=torch.int64),
            "multi": integers(1, 3, num_rows),
            "history": in_history,
        }[feature.kind]
        lengths.append(sizes)
        values.append(integers(1, schema.table_sizes[feature.table] - 1, int(sizes.sum())))
    return Batch(
        values=torch.cat(values) if values else torch.empty(0, dtype=torch.int64),
        lengths=torch.cat(lengths).int() if values else None,
        label=integers(0, 1, num_rows).float(),
        numbers=torch.randn(num_rows, len(schema.numbers), generator=draw)
        if schema.numbers
        else None,
    )


def select(batch: Batch, rows: list[int]) -> Batch:
    """Return the rows of a batch, in the order of ``rows``."""
    values, lengths = batch.values, batch.lengths
    if lengths is not None:
        bags = batch.values.split(lengths.tolist())
        kept = [f * len(batch) + row for f in range(len(lengths) // len(batch)) for row in rows]
        values = torch.cat([values[:0], *(bags[bag] for bag in kept)])
        lengths = lengths[kept]
    numbers = None if batch.numbers is None else batch.numbers[rows]
    return Batch(values, lengths, batch.label[rows], numbers)


def bags_of(batch: Batch, schema: FeatureSchema) -> dict[str, list[Tensor]]:
    """Return feature name -> ids of each row."""
    if batch.lengths is None:
        lengths = [1] * (len(schema.lookups) * len(batch))
    else:
        lengths = batch.lengths.tolist()
    bags = batch.values.split(lengths)
    return {
        feature.name: list(bags[place * len(batch) : (place + 1) * len(batch)])
        for place, feature in enumerate(schema.lookups)
    }


def embed(network: nn.Module, schema: FeatureSchema, batch: Batch, state=None) -> Embedded:
    """Return what ``network.sparse`` should, in float64 with plain torch (TorchRec's: float32)."""
    sparse, dim = network.sparse, network.sparse.embedding_dim
    state = {k: v.double() for k, v in (state or network.state_dict()).items()}
    bags, tables = bags_of(batch, schema), {f.name: f.table for f in schema.lookups}

    def table(name: str, suffix: str = "") -> Tensor:
        (found,) = [v for k, v in state.items() if k.endswith(f"bags.{name}{suffix}.weight")]
        return found

    def mean(rows: list[Tensor], weight: Tensor) -> Tensor:
        starts = torch.tensor([0, *(len(ids) for ids in rows[:-1])]).cumsum(0)
        return nn.functional.embedding_bag(torch.cat(rows), weight, starts, mode="mean")

    numbers = [f.name for f in schema.numbers]
    fields, first = [], torch.zeros(len(batch), dtype=torch.float64)
    for name in sparse.fields:
        if name in numbers:
            number = batch.numbers[:, numbers.index(name)].double()
            fields.append(number[:, None] * state["sparse.numbers"][numbers.index(name)])
            if "sparse.numbers_first_order" in state:
                weight = state["sparse.numbers_first_order"][numbers.index(name)]
                first = first + number * weight
        else:
            weight = table(tables[name])[:, :dim]
            fields.append(mean(bags[name], weight))
            if any(key.endswith("_first_order.weight") for key in state):
                weight = table(tables[name], "_first_order")[:, :1]
                first = first + mean(bags[name], weight)[:, 0]
    histories, masks = {}, {}
    for name in sparse.attended:
        ids = torch.full((len(batch), sparse.length), -1)
        for row, of_row in enumerate(bags[name]):
            latest = of_row[-sparse.length :]
            ids[row, : len(latest)] = latest
        masks[name] = ids >= 0
        found = table(tables[name])[ids.clamp(min=0), :dim]
        histories[name] = found * masks[name].unsqueeze(2)
    return Embedded(torch.stack(fields, dim=1), first, histories, masks)


def random_element(symmetry: Symmetry, draw: torch.Generator) -> Tensor:
    """Return a matrix of the group in float64, never the identity where there is another."""
    size, eye = symmetry.size, torch.eye(symmetry.size, dtype=torch.float64)
    if symmetry.kind == "rotation":
        normal = torch.randn(size, size, generator=draw, dtype=torch.float64)
        return torch.linalg.qr(normal)[0]
    if symmetry.kind == "signs":
        return -eye
    shift = 1 + int(torch.randint(max(size - 1, 1), (), generator=draw))  # moves every unit
    element = eye[torch.randperm(size, generator=draw)]
    element = element @ eye.roll(shift, 0) @ element.T
    if symmetry.kind == "signed_permutation":
        signs = 1 - 2 * torch.randint(2, (size,), generator=draw).double()
        signs[0] = -1
        element = element * signs
    return element


@torch.no_grad()
def act(state: dict[str, Tensor], symmetry: Symmetry, element: Tensor) -> dict[str, Tensor]:
    """Return parameters on which ``element`` has acted, as ``models.symmetries`` says."""
    state = {key: tensor.clone() for key, tensor in state.items()}
    for part in symmetry.slices:
        region = state[part.parameter]
        for axis, start, stop in part.within:
            region = region.narrow(axis, start, stop - start)
        region = region.narrow(part.axis, part.start, symmetry.size * part.width)
        units = region.movedim(part.axis, -1).unflatten(-1, (symmetry.size, part.width))
        matrix = element if part.signed else element.abs()
        moved = torch.einsum("...iw,ij->...jw", units, matrix)
        region.copy_(moved.flatten(-2).movedim(-1, part.axis))
    return state
