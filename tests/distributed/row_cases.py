"""Everything that looks at rows, on every process of ``steps.py``.

Networks look their rows up in divided tables. Arrays go to the folder, one file per process; the
results of commands are compared by their records and checkpoints.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from merging_cases import of, run_command
from networks import CASES, SCHEMAS, WITH_HISTORIES, draw_batch
from networks import options as network_options
from torch import Tensor
from training import options

from cki_rec.checkpoints import Checkpoint
from cki_rec.data.provenance import Provenance
from cki_rec.engine import checkpoint_io, distributed, sharded
from cki_rec.engine.embeddings import table_of
from cki_rec.engine.fisher import fisher_diagonal
from cki_rec.engine.gating import train_gates
from cki_rec.engine.joining import on_union
from cki_rec.engine.lookups import WithParams, merging_module, shuffle_divided
from cki_rec.engine.mapping import fit_maps
from cki_rec.evaluation.metrics import auc
from cki_rec.merging.mixing import soften
from cki_rec.merging.params import Params
from cki_rec.models import build_model

NETWORKS = [
    *(("deepfm", "mixed"), ("din", "mixed"), ("dcnv2", "plain")),
    *(("sasrec", "short"), ("gru4rec", "short")),
]
COMMANDS = {
    "activations": ("merge", "merge=evidence", "merge.align.by=activations"),
    "rescale": ("merge", "merge=evidence", "merge.align.by=weights", "merge.repair=rescale"),
    "select": ("merge", "merge=evidence", "merge.align.by=activations",
               "merge.repair=select_units", "merge.recalibrate=true"),
    "labels": ("merge", "merge=weighted_average"),
    "shuffled": ("merge", "merge=evidence", "merge.ablation=shuffled"),
    "search": ("merge", "merge=auto", "merge.effort=closed_form", "merge.refine=none",
               "merge.recipes=[{}, {align.by: activations, repair: select_units}]"),
    "ensemble": ("evaluate", "merge=output_ensemble", "evaluate.bootstrap=100"),
    "fisher": ("merge", "merge=evidence", "merge.method=fisher"),
    "assess": ("assess", "merge=evidence", "assess.align=none", "assess.barrier=3"),
    "found": ("merge", "merge=evidence", "check_only=true"),
}  # fmt: skip
"""Commands that read rows; all but the last one write a record."""
WORDS = [words for _, *words in COMMANDS.values()]


def random_params(schema, model, seed: int) -> Params:
    network = build_model(schema, model, torch.device("meta"))
    draw = torch.Generator().manual_seed(seed)
    return {
        name: 0.3 * torch.randn(tensor.shape, generator=draw).abs()
        if name.endswith("running_var")
        else 0.3 * torch.randn(tensor.shape, generator=draw)
        if tensor.is_floating_point()
        else tensor.new_zeros(tensor.shape, device="cpu")
        for name, tensor in network.state_dict().items()
    }


def held(params: Params, schema) -> Params:
    """Return the parameters of this process."""
    sizes = {
        n: schema.table_sizes[t] for n in params if (t := table_of(n) or n) in schema.table_sizes
    }
    return {n: t[sharded.rows_of(sizes[n])] if n in sizes else t for n, t in params.items()}


def whole(params: Params, schema) -> dict[str, np.ndarray]:
    """Return the parameters of all processes, joined."""
    result = {}
    for name, parts in _gathered(params).items():
        table = table_of(name) or name
        is_divided = table in schema.table_sizes and sharded.is_divided(schema.table_sizes[table])
        result[name] = (torch.cat(parts) if is_divided else parts[0]).numpy()
    return result


def _gathered(params: Params) -> dict[str, list[Tensor]]:
    parts = distributed.exchange({n: t.detach().clone() for n, t in params.items()})
    return {name: [part[name] for part in parts] for name in params}


def look_up(case: str, key: str) -> dict[str, np.ndarray]:
    """Return logits and Fisher information of a network with divided tables."""
    name, changes = CASES[case]
    schema, model = SCHEMAS[key], network_options(name, **changes)
    if key not in WITH_HISTORIES:
        model.histories = False
    params = held(random_params(schema, model, 1), schema)
    network, batch = merging_module(schema, model), draw_batch(schema, 40, seed=3)
    with torch.no_grad():
        logits = WithParams(network, params)(batch)
    fisher = whole(fisher_diagonal(network, params, [batch]), schema)
    return {"logits": logits.numpy(), **{f"fisher {n}": value for n, value in fisher.items()}}


def learn(dataset, schema) -> dict[str, np.ndarray]:
    """Return gates that are learned at lookup, and tables of a trunk that is trained beside."""
    model = options("model=deepfm", "model.histories=false").model
    sources = [held(random_params(schema, model, seed), schema) for seed in (1, 2)]
    network = build_model(schema, model, torch.device("meta"))
    trunk = [name for name in sources[0] if name.endswith("_first_order.weight")]
    gates = {n: torch.zeros(2, *[1] * t.ndim) for n, t in sources[0].items() if n not in trunk}

    def weigh(models, _, gates):
        return {name: soften(gates[name].expand(2, *models[0][name].shape)) for name in models[0]}

    learned = train_gates(
        *(network, sources, gates, weigh, trunk, dataset, schema),
        *(dataset.rows("train")[:400], dataset.rows("valid"), 2, 0.05, 100, 1, auc, "gates"),
    )
    found = {f"gate {n}": g.numpy() for n, g in learned.gates.items() if g is not None}
    return found | {f"trunk {n}": t for n, t in whole(learned.trunk, schema).items()}


def map_tables(dataset, schema) -> dict[str, np.ndarray]:
    """Return tables that are fitted to a teacher by maps of two sources' tables."""
    model = options("model=deepfm", "model.histories=false").model
    sources = [
        Checkpoint(
            held(random_params(schema, model, s), schema), {}, {}, model, schema, Provenance("h")
        )
        for s in (1, 2)
    ]

    def targets(numbers):
        return np.cos(dataset.column("item")[numbers]).astype(np.float32)

    fitted = fit_maps(
        *(sources, 1, dataset, dataset.rows("train")[:300], targets, 5, 100, 0.01, 1, "maps"),
        torch.device("cpu"),
    )
    return whole(fitted, schema)


def join(schema) -> dict[str, np.ndarray]:
    """Return a model and its counts on a vocabulary with more tokens, in another order."""
    model = options("model=deepfm", "model.histories=false").model
    params = held(random_params(schema, model, 1), schema)
    size = schema.table_sizes["item"]
    draw = torch.Generator().manual_seed(1)
    rows = torch.cat([torch.arange(2), 2 + torch.randperm(size + 7, generator=draw)[: size - 2]])
    tables = {name: table_of(name) or name for name in params}
    larger = replace(schema, table_sizes={**schema.table_sizes, "item": size + 9})
    sizes = schema.table_sizes, larger.table_sizes
    moved = on_union(params, tables, {"item": rows}, *sizes, 1)
    count = held({"item": torch.arange(size)}, schema)
    counts = on_union(count, {"item": "item"}, {"item": rows}, *sizes, None)
    return {**whole(moved, larger), **{f"count {n}": t for n, t in whole(counts, larger).items()}}


def write_sources(folder: Path, dataset, schema) -> None:
    """Write random sources of a data set as one process does."""
    model = options("model=deepfm", "model.histories=false").model
    for seed, name in enumerate(("a", "b")):
        params, draw = random_params(schema, model, seed), torch.Generator().manual_seed(seed)
        counts = {
            t: torch.randint(0, 5, (n,), generator=draw) for t, n in schema.table_sizes.items()
        }
        tensors = {"model": params, "accumulator": {}, "counts": counts}
        checkpoint_io.save(folder / name, tensors, model, schema, dataset.origin)


def run(folder: Path, sources: Path, raw: str, encoded: str, dataset, schema) -> dict:
    """Look at rows in every way; return exit codes and messages of commands."""
    arrays = {}
    for case, key in NETWORKS:
        arrays |= {f"{case} {name}": value for name, value in look_up(case, key).items()}
    for title, found in (
        ("learned", learn(dataset, schema)),
        ("mapped", map_tables(dataset, schema)),
        ("joined", join(schema)),
        ("shuffled", shuffled(schema)),
    ):
        arrays |= {f"{title} {name}": value for name, value in found.items()}
    np.savez(folder / f"rows-{distributed.rank()}.npz", **arrays)
    places = (f"data.raw={raw}", f"runtime.encoded={encoded}", "merge.sample=400")
    both = of(str(sources / "of_rows" / "a"), str(sources / "of_rows" / "b"))
    more = (both, both.replace("merge.", "suite."), *places, "model.histories=false")
    return {
        case: run_command(folder, case, pipeline, *more, *words)
        for case, (pipeline, *words) in COMMANDS.items()
    }


def shuffled(schema) -> dict[str, np.ndarray]:
    model = options("model=deepfm", "model.histories=false").model
    params = held(random_params(schema, model, 1), schema)
    return whole(shuffle_divided(params, schema, 3), schema)
