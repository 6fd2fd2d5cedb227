"""Measurements of training: DeepFM on 39 fields, whole steps with loading, as ratios of one run.

Rows are synthetic ones in Criteo's format. Tables of other sizes are made by spreading their ids,
``id * stretch``, so a batch looks up equally many different rows of tables of any size, or, where
they are to be smaller, by joining neighbours.

Shape legend: B rows, F fields, D embedding size.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from data_layer import encoded_folder
from omegaconf import OmegaConf
from rounds import Figure, ratio, take_turns
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from cki_rec.config import Config, Model, Train, parse, section
from cki_rec.data.dataset import EncodedDataset
from cki_rec.data.loader import Loader
from cki_rec.data.schema import Batch, FeatureSchema
from cki_rec.engine import distributed
from cki_rec.engine.embeddings import build, initialize
from cki_rec.engine.optimization import initialized_adam
from cki_rec.engine.trainer import Stepper
from cki_rec.models import build_model
from cki_rec.models.embeddings import Embedded

BATCH_SIZE = 4096
WARM, STEPS = 4, 12
"""Steps that are not counted, and steps of one round."""
Step = Callable[[Batch], Any]


def train_vs_dense_bound(config: Config) -> Figure:
    """Return the time of the network alone, on constant embeddings, as a share of a whole step."""
    schema, batches = _data(1)
    step, network = _ours(config, schema)
    emb = network.sparse(next(batches()))
    bound = {gradient: _dense_step(config, network, emb, gradient) for gradient in (True, False)}
    whole, with_gradient, without = take_turns(
        _timed(step, batches()), _timed(bound[True], batches()), _timed(bound[False], batches())
    )
    detail = (
        f"step {_ms(whole)}; the network on constant embeddings {_ms(with_gradient)} with the"
        f" gradient of its input, {_ms(without)} without; {torch.get_num_threads()} threads"
    )
    return ratio(detail, with_gradient, whole, without)


def train_vs_plain_500k(config: Config) -> Figure:
    """Return how many times faster a step is than with nn.Embedding and Adam, small tables."""
    return _versus_plain(config, 500_000)


def train_vs_plain_10m(config: Config) -> Figure:
    """Return how many times faster a step is than with nn.Embedding and Adam, large tables."""
    return _versus_plain(config, 10_000_000)


def train_vs_fbgemm(config: Config) -> Figure:
    """Return how many times faster a step is than with FBGEMM's CPU kernels."""
    schema, batches = _data(_stretch(1_000_000))
    works = []
    for kernels in ("torch", "fbgemm"):
        changed = replace(config, runtime=replace(config.runtime, kernels=kernels))
        works.append(_timed(_ours(changed, schema)[0], batches()))
    ours, theirs = take_turns(*works)
    return ratio(f"1M rows: ours {_ms(ours)}, FBGEMM's kernels {_ms(theirs)}", theirs, ours)


def train_flatness(config: Config) -> Figure:
    """Return the time of a step with tables of 50M rows relative to one with 1M rows."""
    works = []
    for rows in (1_000_000, 50_000_000):
        schema, batches = _data(_stretch(rows))
        works.append(_timed(_ours(config, schema)[0], batches()))
    small, large = take_turns(*works)
    return ratio(f"1M rows {_ms(small)}, 50M rows {_ms(large)}", large, small)


def train_two_processes(config: Config) -> Figure:
    """Return the throughput of two processes of one thread relative to one process of two."""
    one, two = take_turns(lambda: _rate_of(config, 1, 2), lambda: _rate_of(config, 2, 1))
    detail = f"rows/s: one process {np.median(one):,.0f}, two {np.median(two):,.0f}"
    return ratio(detail, two, one)


def train_bf16(config: Config) -> Figure:
    """Return how many times faster a step is with the dense network in bf16."""
    return _versus_option(config, replace(config.train, precision="bf16"))


def train_compiled(config: Config) -> Figure:
    """Return how many times faster a step is with the dense network compiled."""
    return _versus_option(config, replace(config.train, compile=True))


def _versus_option(config: Config, schedule: Train) -> Figure:
    schema, batches = _data(1)
    plain, _ = _ours(config, schema)
    changed, _ = _ours(replace(config, train=schedule), schema)
    before, after = take_turns(_timed(plain, batches()), _timed(changed, batches()))
    return ratio(f"{_ms(before)} before, {_ms(after)} after", before, after)


def _versus_plain(config: Config, rows: int) -> Figure:
    schema, batches = _data(_stretch(rows))
    works = []
    for precision in ("fp32", "bf16"):
        train = replace(config.train, precision=precision)
        step, _ = _ours(replace(config, train=train), schema)
        works.append(_timed(step, batches()))
    plain = Plain(schema, model_of(config))
    adam = torch.optim.Adam(plain.parameters(), lr=config.train.learning_rate, fused=True)

    def plain_step(batch: Batch) -> None:
        adam.zero_grad()
        binary_cross_entropy_with_logits(plain(batch), batch.label).backward()
        adam.step()

    ours, in_bf16, theirs = take_turns(*works, _timed(plain_step, batches()))
    total = sum(schema.table_sizes.values())
    detail = (
        f"{total:,} rows: ours {_ms(ours)}, nn.Embedding with fused Adam and the same dropout"
        f" {_ms(theirs)}; ours with a network in bf16 {_ms(in_bf16)}"
    )
    return ratio(detail, theirs, ours, in_bf16)


class Plain(nn.Module):
    """DeepFM as users write it by hand: an nn.Embedding per field, all dense."""

    def __init__(self, schema: FeatureSchema, model: Model) -> None:
        super().__init__()
        sizes = [schema.table_sizes[feature.table] for feature in schema.features]
        self.tables = nn.ModuleList(nn.Embedding(size, model.embedding_dim) for size in sizes)
        self.first_order = nn.ModuleList(nn.Embedding(size, 1) for size in sizes)
        network = build_model(schema, model, torch.device("meta"))
        network.sparse = nn.Identity()
        self.network = network.to_empty(device="cpu")

    def forward(self, batch: Batch) -> Tensor:
        """Return logits ``(B,)``."""
        ids_FB = batch.values.view(len(self.tables), -1)
        emb = [table(ids) for table, ids in zip(self.tables, ids_FB, strict=True)]
        first = [table(ids) for table, ids in zip(self.first_order, ids_FB, strict=True)]
        embedded = Embedded(torch.stack(emb, dim=1), torch.cat(first, dim=1).sum(1))
        interact: Any = self.network.interact
        logit_B: Tensor = interact(embedded)
        return logit_B


def model_of(config: Config) -> Model:
    """Return the network that is measured."""
    return replace(
        config.model, name="deepfm", embedding_dim=16, hidden=[400] * 3, histories=False
    )


def _ours(config: Config, schema: FeatureSchema) -> tuple[Step, Any]:
    """Return a function that takes our training step, and the network it trains."""
    model = build(schema, model_of(config), config.train, config.runtime)
    initialize(model, 1, config.model.init_std)
    adam = initialized_adam(model, config.train.learning_rate)
    model.module.train()
    return Stepper(model, adam, config.train), model.network


def _dense_step(config: Config, network: Any, emb: Embedded, has_gradient: bool) -> Step:
    """Return a step of all but the lookups: constant embeddings go in."""
    parameters = [p for name, p in network.named_parameters() if not name.startswith("sparse.")]
    adam = torch.optim.Adam(parameters, lr=config.train.learning_rate, fused=True)
    fields_BFD = emb.fields_BFD.detach().clone().requires_grad_(has_gradient)
    first_order_B = emb.first_order_B.detach().clone()

    def step(batch: Batch) -> None:
        adam.zero_grad()
        fields_BFD.grad = None
        logit_B = network.interact(Embedded(fields_BFD, first_order_B))
        binary_cross_entropy_with_logits(logit_B, batch.label).backward()
        adam.step()

    return step


def _timed(step: Step, batches: Iterator[Batch]) -> Callable[[], float]:
    """Return a function that measures one round: the median seconds of a step with its batch."""

    def measure() -> float:
        times = []
        for number in range(STEPS + WARM):
            start = time.perf_counter()
            step(next(batches))
            if number >= WARM:
                times.append(time.perf_counter() - start)
        return float(np.median(times))

    return measure


def _data(stretch: float) -> tuple[FeatureSchema, Callable[[], Iterator[Batch]]]:
    """Return the schema with tables ``stretch`` times as large, and what makes endless batches."""
    dataset = EncodedDataset(encoded_folder())
    sizes = {name: math.ceil(size * stretch) for name, size in dataset.schema.table_sizes.items()}
    schema = replace(dataset.schema, table_sizes=sizes)
    return schema, lambda: _batches(dataset, stretch)


def _batches(dataset: EncodedDataset, stretch: float) -> Iterator[Batch]:
    loader = Loader(
        dataset, dataset.schema, dataset.rows("train"), BATCH_SIZE, seed=1,
        rank=distributed.rank(), world_size=distributed.world_size(),
    )  # fmt: skip
    while True:
        for batch in loader:
            if batch.step_rows == BATCH_SIZE:
                if stretch != 1:
                    batch.values = batch.values.double().mul_(stretch).long()
                yield batch


def _stretch(rows: int) -> float:
    """Return how often the tables of the encoded set must be enlarged to have ``rows`` rows."""
    sizes = EncodedDataset(encoded_folder()).schema.table_sizes
    return rows / sum(sizes.values())


def _rate_of(config: Config, processes: int, threads: int) -> float:
    """Return rows per second of training in new processes."""
    options = replace(config, runtime=replace(config.runtime, threads=threads))
    command = [str(Path(sys.executable).with_name("torchrun")), "--standalone"]
    command += ["--nproc-per-node", str(processes), __file__]
    words = [str(encoded_folder()), json.dumps(section(options))]
    done = subprocess.run([*command, *words], check=True, capture_output=True, text=True)
    return float(json.loads(done.stdout.splitlines()[-1])["rows_per_second"])


def _ms(seconds: Sequence[float]) -> str:
    return f"{1000 * float(np.median(seconds)):.1f} ms"


def main(folder: str, options: str) -> None:
    """Print the rate of this group of processes, for ``train_two_processes``."""
    config = parse(OmegaConf.create(json.loads(options)))
    dataset = EncodedDataset(Path(folder))
    step, _ = _ours(config, dataset.schema)
    batches = _batches(dataset, 1)
    for _number in range(WARM):
        step(next(batches))
    start = time.perf_counter()
    for _number in range(STEPS * 4):
        step(next(batches))
    rate = STEPS * 4 * BATCH_SIZE / (time.perf_counter() - start)
    if distributed.rank() == 0:
        print(json.dumps({"rows_per_second": rate}))


if __name__ == "__main__":
    main(*sys.argv[1:])
