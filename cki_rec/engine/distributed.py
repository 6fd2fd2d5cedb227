"""Processes and devices."""

from __future__ import annotations

import atexit
import logging
import os
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FakeProcessGroup

from cki_rec.config import Runtime, UserError

SINGLE = "single"
"""Name of the backend of one process."""


def start(runtime: Runtime) -> torch.device:
    """Return the device to run on, with a process group ready and threads and kernels set.

    A single process opens no port and reads no environment variable: its store is in memory and
    its process group moves nothing, which is all that a group of one has to do. (Gloo would listen
    on a port of the loopback interface.)

    Raises:
        UserError: No CUDA device where one is asked for, or several processes.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("several processes (torchrun) are not supported yet; start one process")
    has_cuda = torch.cuda.is_available()
    if runtime.device == "cuda" and not has_cuda:
        raise UserError("runtime.device=cuda: torch sees no CUDA device; use runtime.device=cpu")
    device = torch.device("cuda" if has_cuda and runtime.device != "cpu" else "cpu")
    torch.set_num_threads(runtime.threads or os.cpu_count() or 1)
    torch.use_deterministic_algorithms(True, warn_only=device.type == "cuda")
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)  # torchrec's own use
    if not dist.is_initialized():
        if SINGLE not in dist.Backend.backend_list:
            dist.Backend.register_backend(
                SINGLE, _single_process_group, extended_api=True, devices=["cpu", "cuda"]
            )
        dist.init_process_group(SINGLE, rank=0, world_size=1, store=dist.HashStore())
        atexit.register(_stop)
    return device


def _single_process_group(common: Any, backend: Any) -> Any:
    """Return the group of one process; torchrec treats torch's own name for it specially."""
    assert common.group_size == 1
    create: Any = FakeProcessGroup._create_internal
    return create(common.group_rank, common.group_size, backend)


def _stop() -> None:
    if dist.is_initialized():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dist.destroy_process_group()
