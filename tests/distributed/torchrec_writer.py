"""Trains a model of TorchRec on several processes, and writes it as its users do: by DCP.

``torchrun --nproc-per-node 2 tests/distributed/torchrec_writer.py FOLDER SEED``
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


class Ranker(nn.Module):
    def __init__(self, device):
        super().__init__()
        tables = [
            EmbeddingBagConfig(name=n, num_embeddings=r, embedding_dim=8, feature_names=[n])
            for n, r in SIZES.items()
        ]
        self.tables = EmbeddingBagCollection(device=torch.device(device), tables=tables)
        self.head = nn.Linear(24, 1)

    def forward(self, ids):
        return self.head(self.tables(ids).values()).squeeze(1)


def ids_of(draw, rows=16):
    values = [torch.randint(size // 2, (rows,), generator=draw) for size in SIZES.values()]
    lengths = torch.ones(rows * len(SIZES), dtype=torch.int32)
    return KeyedJaggedTensor.from_lengths_sync(list(SIZES), torch.cat(values), lengths)


def main(folder, seed):
    dist.init_process_group("gloo")
    torch.manual_seed(seed)
    world, sharder = dist.get_world_size(), EmbeddingBagCollectionSharder()
    network = Ranker("meta")
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
    optimizer = CombinedOptimizer([model.fused_optimizer, dense])
    draw = torch.Generator().manual_seed(100 * seed + dist.get_rank())
    for _ in range(3):
        optimizer.zero_grad()
        model(ids_of(draw)).square().sum().backward()
        optimizer.step()
    dcp.save({"model": model.state_dict(), "optim": optimizer.state_dict()}, checkpoint_id=folder)
    scores = model(ids_of(torch.Generator().manual_seed(7))).detach()
    if dist.get_rank() == 0:
        torch.save(scores, Path(folder) / "scores.pt")
    dist.barrier()  # no process leaves while another one communicates
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
