"""Measurements of training: DeepFM on 39 fields, whole steps with loading, as ratios of one run.

Rows are synthetic ones in Criteo's format. Tables of other sizes are made by spreading their ids,
``id * stretch``, so a batch looks up equally many different rows of tables of any size, or, where
they are to be smaller, by joining neighbours.

Shape legend: B rows, F fields, D embedding size.
"""

from __future__ import annotations

import gc
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
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
from cki_rec.pipelines.bench_data import encoded_folder

BATCH_SIZE = 4096
WARM, STEPS, ROUNDS = 4, 12, 4
"""Steps that are not counted, steps of one measurement, and measurements, taken in turn."""
Step = Callable[[Batch], Any]


def train_vs_dense_bound(config: Config) -> tuple[float, str]:
    """Return the time of the network alone, on constant embeddings, as a share of a whole step."""
    schema, batches = _data(1)
    step, network = _ours(config, schema)
    emb = network.sparse(next(batches()))
    bound = {gradient: _dense_step(config, network, emb, gradient) for gradient in (True, False)}
    whole, with_gradient, without = _in_turn(
        *((step, batches()), (bound[True], batches()), (bound[False], batches()))
    )
    detail = (
        f"step {_ms(whole)}; the network on constant embeddings {_ms(with_gradient)} with the"
        f" gradient of its input, {_ms(without)} ({without / whole:.2f}) without;"
        f" {torch.get_num_threads()} threads"
    )
    return with_gradient / whole, detail


def train_vs_plain_500k(config: Config) -> tuple[float, str]:
    """Return how many times faster a step is than with nn.Embedding and Adam, small tables."""
    return _versus_plain(config, 500_000)


def train_vs_plain_10m(config: Config) -> tuple[float, str]:
    """Return how many times faster a step is than with nn.Embedding and Adam, large tables."""
    return _versus_plain(config, 10_000_000)


def train_flatness(config: Config) -> tuple[float, str]:
    """Return the time of a step with tables of 50M rows in terms of one with 1M rows."""
    times = []
    for rows in (1_000_000, 50_000_000):
        schema, batches = _data(_stretch(rows))
        step, _ = _ours(config, schema)
        times.append(_in_turn((step, batches()))[0])
        del step, _
        gc.collect()
    detail = f"1M rows {_ms(times[0])}, 50M rows {_ms(times[1])}"
    return times[1] / times[0], detail


def train_two_processes(config: Config) -> tuple[float, str]:
    """Return the throughput of two processes of one thread in terms of one process of two."""
    one, two = [], []
    for _attempt in range(2):
        one.append(_rate_of(config, 1, 2))
        two.append(_rate_of(config, 2, 1))
    detail = f"rows/s: one process {max(one):,.0f}, two {max(two):,.0f} (best of 2 each, in turn)"
    return max(two) / max(one), detail


def train_bf16(config: Config) -> tuple[float, str]:
    """Return how many times faster a step is with the dense network in bf16."""
    return _versus_option(config, replace(config.train, precision="bf16"))


def train_compiled(config: Config) -> tuple[float, str]:
    """Return how many times faster a step is with the dense network compiled."""
    return _versus_option(config, replace(config.train, compile=True))


def _versus_option(config: Config, schedule: Train) -> tuple[float, str]:
    schema, batches = _data(1)
    plain, _ = _ours(config, schema)
    changed, _ = _ours(replace(config, train=schedule), schema)
    before, after = _in_turn((plain, batches()), (changed, batches()))
    return before / after, f"{_ms(before)} before, {_ms(after)} after"


def _versus_plain(config: Config, rows: int) -> tuple[float, str]:
    schema, batches = _data(_stretch(rows))
    times = []
    for precision in ("fp32", "bf16"):
        train = replace(config.train, precision=precision)
        step, _ = _ours(replace(config, train=train), schema)
        times.append(_in_turn((step, batches()))[0])
        del step, _
        gc.collect()
    ours, in_bf16 = times
    plain = Plain(schema, model_of(config))
    adam = torch.optim.Adam(plain.parameters(), lr=config.train.learning_rate)

    def plain_step(batch: Batch) -> None:
        adam.zero_grad()
        binary_cross_entropy_with_logits(plain(batch), batch.label).backward()
        adam.step()

    (theirs,) = _in_turn((plain_step, batches()), rounds=1)
    total = sum(schema.table_sizes.values())
    detail = (
        f"{total:,} rows: ours {_ms(ours)}, plain {_ms(theirs)}; ours with a network in bf16"
        f" {_ms(in_bf16)} ({theirs / in_bf16:.2f} times)"
    )
    return theirs / ours, detail


class Plain(nn.Module):
    """DeepFM as it is written by hand: an nn.Embedding per field, all dense."""

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


def _in_turn(*works: tuple[Step, Iterator[Batch]], rounds: int = ROUNDS) -> list[float]:
    """Return the median seconds of a step with loading its batch, of works measured in turn."""
    times: list[list[float]] = [[] for _ in works]
    for _turn in range(rounds):
        for place, (step, batches) in enumerate(works):
            for number in range(STEPS + WARM):
                start = time.perf_counter()
                step(next(batches))
                if number >= WARM:
                    times[place].append(time.perf_counter() - start)
    return [float(np.median(of_work)) for of_work in times]


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
    command += ["--nproc-per-node", str(processes), "-m", __spec__.name]
    words = [str(encoded_folder()), json.dumps(section(options))]
    done = subprocess.run([*command, *words], check=True, capture_output=True, text=True)
    return float(json.loads(done.stdout.splitlines()[-1])["rows_per_second"])


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms"


def main(folder: str, options: str) -> None:
    """Print the rate of this group of processes, for ``train_two_processes``."""
    config = parse(OmegaConf.create(json.loads(options)))
    dataset = EncodedDataset(Path(folder))
    step, _ = _ours(config, dataset.schema)
    batches = _batches(dataset, 1)
    for _number in range(WARM):
        step(next(batches))
    start = time.perf_counter()
    for _number in range(STEPS * ROUNDS):
        step(next(batches))
    rate = STEPS * ROUNDS * BATCH_SIZE / (time.perf_counter() - start)
    if distributed.rank() == 0:
        print(json.dumps({"rows_per_second": rate}))


if __name__ == "__main__":
    main(*sys.argv[1:])
