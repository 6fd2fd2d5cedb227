"""Trains a model of TorchRec on several processes, and writes it as its users do: by DCP.

``torchrun --nproc-per-node 2 tests/distributed/torchrec_writer.py train FOLDER SEED [FACTOR DIM]``
``torchrun --nproc-per-node 2 tests/distributed/torchrec_writer.py score FOLDER FILE [FACTOR DIM]``

``score`` loads a checkpoint into the sharded model, and writes its scores of fixed rows. FACTOR
multiplies the rows of tables.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.sharding_plan import (
    column_wise,
    construct_module_sharding_plan,
    row_wise,
    table_wise,
)
from torchrec.distributed.types import ShardingPlan
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

SIZES = {"user": 50, "item": 30, "city": 20}
DIM = 8


class Ranker(nn.Module):
    def __init__(self, device, factor=1, dim=DIM):
        super().__init__()
        tables = [
            EmbeddingBagConfig(
                name=n, num_embeddings=factor * r, embedding_dim=dim, feature_names=[n]
            )
            for n, r in SIZES.items()
        ]
        self.tables = EmbeddingBagCollection(device=torch.device(device), tables=tables)
        self.head = nn.Linear(3 * dim, 1)

    def forward(self, ids):
        return self.head(self.tables(ids).values()).squeeze(1)


def ids_of(draw, factor=1, rows=16):
    sizes = [factor * size // 2 for size in SIZES.values()]
    values = [torch.randint(size, (rows,), generator=draw) for size in sizes]
    lengths = torch.ones(rows * len(SIZES), dtype=torch.int32)
    return KeyedJaggedTensor.from_lengths_sync(list(SIZES), torch.cat(values), lengths)


def sharded(factor, dim):
    """Return a model whose tables are divided by rows, whole, and by columns; its optimizer."""
    world, sharder = dist.get_world_size(), EmbeddingBagCollectionSharder()
    network = Ranker("meta", factor, dim)
    apply_optimizer_in_backward(RowWiseAdagrad, network.tables.parameters(), {"lr": 0.1})
    rules = {
        "user": row_wise(compute_kernel="fused"),
        "item": table_wise(1, compute_kernel="fused"),
        "city": column_wise([0, 1], compute_kernel="fused"),
    }
    plan = construct_module_sharding_plan(
        *(network.tables, rules),
        sharder=sharder,
        world_size=world,
        local_size=world,
        device_type="cpu",
    )
    model = DistributedModelParallel(
        network,
        device=torch.device("cpu"),
        plan=ShardingPlan({"tables": plan}),
        sharders=[sharder],
    )
    dense = KeyedOptimizerWrapper(
        dict(in_backward_optimizer_filter(model.named_parameters())), torch.optim.Adam
    )
    return model, CombinedOptimizer([model.fused_optimizer, dense])


def train(folder, seed, factor, dim):
    torch.manual_seed(seed)
    model, optimizer = sharded(factor, dim)
    draw = torch.Generator().manual_seed(100 * seed + dist.get_rank())
    for _ in range(3):
        optimizer.zero_grad()
        model(ids_of(draw, factor)).square().sum().backward()
        optimizer.step()
    dcp.save({"model": model.state_dict(), "optim": optimizer.state_dict()}, checkpoint_id=folder)
    write_scores(model, Path(folder) / "scores.pt", factor)


def score(folder, file, factor, dim):
    model, _ = sharded(factor, dim)
    state = model.state_dict()
    dcp.load({"model": state}, checkpoint_id=folder)
    model.load_state_dict(state)
    write_scores(model, file, factor)


def write_scores(model, file, factor):
    """Write the scores of fixed rows, what the head reads for them, and the head."""
    network, seen = model.module, []
    handle = network.head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    scores = model(ids_of(torch.Generator().manual_seed(7), factor)).detach()
    handle.remove()
    head = {name: x.detach().clone() for name, x in network.head.named_parameters()}
    if dist.get_rank() == 0:
        torch.save({"scores": scores, "inputs": seen[0].detach(), "head": head}, file)


def main(action, source, target, factor="1", dim=str(DIM)):
    dist.init_process_group("gloo")
    if action == "train":
        train(source, int(target), int(factor), int(dim))
    else:
        score(source, target, int(factor), int(dim))
    dist.barrier()  # no process leaves while another one communicates
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
