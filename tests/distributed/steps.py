"""What every process of ``test_world_sizes.py`` runs; also imported there, as the only process.

    python steps.py NUMBER FOLDER RAW ENCODED SOURCES [CHECKPOINT]

It forks as many processes, as torchrun would start them: packages are imported once.
Results go to the folder: checkpoints by case and plan, arrays and messages by process.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import traceback
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed import TCPStore

TESTS = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(TESTS))

import composition  # noqa: E402
import merging_cases  # noqa: E402
import row_cases  # noqa: E402
from networks import SCHEMAS, draw_batch, select  # noqa: E402
from training import options  # noqa: E402

from cki_rec.checkpoints import checkpoint  # noqa: E402
from cki_rec.config import UserError  # noqa: E402
from cki_rec.data.encoding import store  # noqa: E402
from cki_rec.data.loader import Loader  # noqa: E402
from cki_rec.data.provenance import Provenance  # noqa: E402
from cki_rec.data.schema import Batch, FeatureSchema  # noqa: E402
from cki_rec.engine import checkpoint_io, distributed  # noqa: E402
from cki_rec.engine.embeddings import build, initialize, local_tensors  # noqa: E402
from cki_rec.engine.evaluator import predict  # noqa: E402
from cki_rec.engine.optimization import Average, initialized_adam  # noqa: E402
from cki_rec.engine.resume import TrainingState  # noqa: E402
from cki_rec.engine.steps import StepLog  # noqa: E402
from cki_rec.engine.trainer import Objective, Stepper, fit  # noqa: E402
from cki_rec.processes import leave  # noqa: E402

STEPS, ROWS = 20, 23  # rows of a step: no multiple of 2 or 3
CASES = {
    "deepfm plain": ("plain", ("model=deepfm",)),
    "deepfm mixed": ("mixed", ("model=deepfm", "train.table_l2=0.01")),
    "batch norm": ("mixed", ("model=deepfm", "model.batch_norm=true")),
    "din": ("mixed", ("model=din", "model.attention.length=4", "train.table_l2=0.01")),
    "sasrec": ("short", ("model=sasrec", "model.sequence.length=4", "model.sequence.dropout=0")),
    "gru4rec": ("short", ("model=gru4rec", "model.sequence.length=4", "model.sequence.dropout=0")),
    "dlrm": ("mixed", ("model=dlrm",)),
}
CHOICES = [words[:1] for _, words in CASES.values()]
# Embeddings start at 0.1 and rates are 0.01: Adagrad's first step is the rate times the sign of
# the gradient, so where embeddings and with them gradients are near zero it would turn
# differences in rounding into differences of two rates.
COMMON = ("model.histories=true", "model.init_std=0.1", "train.learning_rate=0.01",
          "train.table_learning_rate=0.01", "train.gradient_clip=1.0")  # fmt: skip
PLANS = {
    "table_wise": ("runtime.sharding=table_wise",),
    "row_wise": ("runtime.sharding=row_wise",),
    "planner": ("runtime.sharding=planner",),
    "column_wise": ("runtime.sharding=column_wise", "train.table_optimizer=adagrad"),
    "dense": ("train.embeddings=dense",),
}
EVERY_PLAN = ("deepfm mixed", "din")
FITTING = [
    *((case, plan) for case in EVERY_PLAN for plan in PLANS),
    *((case, "table_wise") for case in ("deepfm plain", "batch norm", "dlrm")),
    *((case, "row_wise") for case in ("sasrec", "gru4rec")),
]
"""Cases and the plans that each is trained under."""
MOVED = [(case, "row_wise") for case in EVERY_PLAN]
"""Those whose checkpoints another number of processes reads under another plan."""


def share(batch: Batch) -> Batch:
    """Return this process's rows of a step, as the loader shares them."""
    num, rank = distributed.world_size(), distributed.rank()
    first, last = (len(batch) * r // num for r in (rank, rank + 1))
    own = select(batch, list(range(first, last)))
    own.step_rows, own.stride = len(batch), -(-len(batch) // num)
    return own


def start(schema: FeatureSchema, *words: str, seed: int = 1):
    config = options(*COMMON, *words)
    model = build(schema, config.model, config.train, config.runtime)
    initialize(model, seed, config.model.init_std)
    return model, config


def train(case: str, plan: str, folder: Path) -> tuple[float, Tensor]:
    """Train and keep a checkpoint; return the last loss, and logits of this process's rows."""
    key, words = CASES[case]
    model, config = start(SCHEMAS[key], *words, *PLANS[plan])
    adam = initialized_adam(model, config.train.learning_rate)
    average = Average(model, 0.5)
    with Stepper(model, adam, config.train) as step:
        for number in range(STEPS):
            loss = step(share(draw_batch(SCHEMAS[key], ROWS, seed=number)))
            average.update()
    model.module.eval()
    with torch.no_grad():
        logits = model.module(share(draw_batch(SCHEMAS[key], ROWS, seed=99)))
    state = TrainingState(model, adam, average, None)
    checkpoint_io.save(
        folder / case / plan, state.tensors(), config.model, SCHEMAS[key], Provenance("hash")
    )
    return loss, logits


def move(found: Path, folder: Path, case: str, plan: str) -> None:
    """Read a checkpoint into a model of another plan, and write it again."""
    key, words = CASES[case]
    model, _ = start(SCHEMAS[key], *words, *PLANS[plan], seed=7)
    adam = initialized_adam(model, 0.01)
    state = TrainingState(model, adam, Average(model, 0.5), None)
    saved = checkpoint.describe(found)
    checkpoint_io.load_into(state.tensors(), found)
    checkpoint_io.save(folder, state.tensors(), saved.model, saved.schema, saved.origin)


class FirstId(nn.Module):
    """Says of every row the id of its first field."""

    def forward(self, batch: Batch) -> Tensor:
        return batch.values[: len(batch)].float()


def data_of(raw: str, encoded: str):
    """Return the data set, and the schema of its first two fields."""
    config = options(f"data.raw={raw}", f"runtime.encoded={encoded}")
    dataset = store.prepare(config.data, config.runtime.encoded)
    features = tuple(f for f in dataset.schema.features if f.name in ("user", "item"))
    sizes = {f.table: dataset.schema.table_sizes[f.table] for f in features}
    return dataset, FeatureSchema(features, sizes, dict.fromkeys(sizes, "hash"))


def normalize(num: int, rank: int) -> dict[str, np.ndarray]:
    """Return what a batch norm gives and learns where processes have 2, 9 and 17 rows."""
    noise = torch.Generator().manual_seed(3)
    network = nn.Sequential(nn.BatchNorm1d(5).double())
    distributed.synchronize_batch_norms(network)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(5, generator=noise, dtype=torch.float64))
    bounds = [0, 2, 11, 28][: num + 1] if num > 1 else [0, 28]
    bounds[-1] = 28
    found = {}
    for number in range(3):
        x = 3 + 2 * torch.randn(28, 5, generator=noise, dtype=torch.float64)
        weight = torch.randn(28, 5, generator=noise, dtype=torch.float64)
        own = slice(bounds[rank], bounds[rank + 1])
        x_BH = x[own].clone().requires_grad_()
        network.zero_grad()
        y_BH = network(x_BH)
        (y_BH * weight[own]).sum().backward()
        found[f"y {number}"], found[f"gradient {number}"] = y_BH.detach(), x_BH.grad
    norm = network[0]
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        found[name] = getattr(norm, name)
    for name, parameter in norm.named_parameters():
        found[f"sum {name}"] = distributed.total(parameter.grad.clone())
    network.eval()
    found["evaluated"] = network(x[own]).detach()
    return {name: value.numpy() for name, value in found.items()}


class Seen(StepLog):
    """Keeps what this process holds after every step."""

    def __init__(self, model) -> None:
        super().__init__(None, 0, False)
        self.model, self.states = model, []

    def step(self, *_) -> None:
        self.states.append(self.now())

    def now(self) -> list[Tensor]:
        state = [*self.model.module.state_dict().values(), *self.model.accumulators().values()]
        return [tensor.clone() for value in state for tensor in local_tensors(value)]


def stop_at_a_loss_that_is_not_finite(dataset, schema: FeatureSchema) -> dict:
    """Return what is said where one process alone has a bad row, and whether weights moved."""
    model, config = start(schema, "model=deepfm", "model.histories=false", "train.batch_size=301")
    make, log = Loader._batch, Seen(model)

    def spoil(loader, first, last):
        batch = make(loader, first, last)
        if first >= 602 and distributed.rank() == distributed.world_size() - 1:
            batch.label[0] = float("nan")
        return batch

    Loader._batch = spoil
    rows = [dataset.rows(split) for split in ("train", "valid")]
    try:
        fit(model, dataset, schema, *rows, config.train, 1, None, None, "a title", None, log)
    except UserError as error:
        same = [torch.equal(*pair) for pair in zip(log.now(), log.states[-1], strict=True)]
        return {"error": str(error), "steps": len(log.states), "unchanged": all(same)}
    finally:
        Loader._batch = make
    return {}


def refine(dataset, schema: FeatureSchema) -> tuple[dict, np.ndarray]:
    """Refine a model to made-up logits; return its last epoch, and the logits of the best one."""
    words = ("model=deepfm", "model.histories=false", "train.batch_size=301", "train.epochs=2")
    model, config = start(schema, *words, *PLANS["table_wise"])
    rows, found = [dataset.rows(split) for split in ("train", "valid")], []

    def targets(numbers):
        return np.cos(dataset.column("item")[numbers]).astype(np.float32)

    def metrics(_, logits):
        found.append(logits)
        return {"monitor": -float(np.square(logits - targets(rows[1])).mean())}

    history = fit(
        *(model, dataset, schema, *rows, config.train, 1, metrics, lambda: None, "a title"),
        objective=Objective("teacher", targets, refines=True),
    )
    return history[-1], found[-1]


def refuse_columns(schema: FeatureSchema) -> str | None:
    try:
        start(schema, "model.histories=false", "runtime.sharding=column_wise")
    except UserError as error:
        return str(error)
    return None


def run(folder: Path, raw: str, encoded: str) -> None:
    """Do everything, and write what comes of it."""
    runtime = options().runtime
    distributed.start(runtime)
    num, rank = distributed.world_size(), distributed.rank()
    arrays, messages = normalize(num, rank), {"losses": {}}
    for case, plan in FITTING:
        loss, logits = train(case, plan, folder)
        messages["losses"][f"{case}/{plan}"] = loss
        arrays[f"logits {case}/{plan}"] = logits.numpy()
    dataset, schema = data_of(raw, encoded)
    rows, device = dataset.rows("valid"), torch.device("cpu")
    arrays["ids"] = predict(FirstId(), dataset, schema, rows, device)
    model, _ = start(schema, "model=deepfm", "model.histories=false", *PLANS["row_wise"])
    arrays["predictions"] = predict(model.module, dataset, schema, rows, device)
    messages["refined"], arrays["refined"] = refine(dataset, schema)
    messages["not finite"] = stop_at_a_loss_that_is_not_finite(dataset, schema)
    messages["columns"] = refuse_columns(schema)
    np.savez(folder / f"process-{rank}.npz", **arrays)
    (folder / f"process-{rank}.json").write_text(json.dumps(messages))


def main(folder: Path, raw: str, encoded: Path, sources: Path, found: Path | None = None) -> None:
    run(folder, raw, str(encoded))
    if found:
        for case, plan in MOVED:
            move(found / case / plan, folder / "moved" / case, case, "planner")
    merging_cases.run(folder / "merged", sources)
    (folder / "rows").mkdir(exist_ok=True)
    found = row_cases.run(folder / "rows", sources, raw, str(encoded), *data_of(raw, str(encoded)))
    (folder / "rows" / f"process-{distributed.rank()}.json").write_text(json.dumps(found))


def fork(num: int, *arguments: object) -> int:
    """Run ``main`` in as many processes; return 0 if all of them end well."""
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    shared = {"WORLD_SIZE": num, "LOCAL_WORLD_SIZE": num, "MASTER_ADDR": "localhost"}
    shared |= {"MASTER_PORT": store.port, "TORCHELASTIC_USE_AGENT_STORE": True}
    shared |= {"TORCHELASTIC_RESTART_COUNT": 0, "PYTHONWARNINGS": "ignore"}
    children = []
    for rank in range(num):
        if not (child := os.fork()):
            own = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0}
            os.environ.update({name: str(value) for name, value in (shared | own).items()})
            try:
                main(*arguments)
                leave(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        children.append(child)
    for _ in range(num):
        child, status = os.wait()
        children.remove(child)
        if status:
            for other in children:
                os.kill(other, signal.SIGKILL)
            return 1
    return 0


if __name__ == "__main__":
    number, first, raw_zip, *others = sys.argv[1:]
    with composition.done_once():  # once for all processes, as the imports
        for words in ((), *CHOICES, *merging_cases.WORDS, *row_cases.WORDS):
            options(*words)
        for name in ("assess", "check_only", "evaluate", "merge"):
            importlib.import_module(f"cki_rec.pipelines.{name}")
        sys.exit(fork(int(number), Path(first), raw_zip, *map(Path, others)))
