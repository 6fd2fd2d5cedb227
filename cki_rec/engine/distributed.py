"""Processes and devices: the same code for one process and for many started by torchrun.

Shape legend: R rows, P processes.
"""

from __future__ import annotations

import atexit
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch._C._distributed_c10d import FakeProcessGroup
from torch.distributed.nn.functional import all_reduce as differentiable_all_reduce

from cki_rec.config import RankLost, ReportedElsewhere, Runtime, UserError

Value = TypeVar("Value")

logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)  # of torchrec
warnings.filterwarnings("ignore", r"torch\.distributed\.nn\.functional\.all_reduce is deprecated")

SINGLE = "single"
"""Name of the backend of a single process."""
PATIENCE = timedelta(minutes=10)
"""Longest wait for another process, apart from encoding a data set."""

REPORTS = "cki_rec/reports"
"""Key of the number of reports about lost processes."""
LOST = (
    "another process has ended; run the same command again: it resumes from the last"
    " checkpoint, if there is one"
)
LOST_MESSAGES = (
    *("Connection closed by peer", "Connection reset by peer", "Connection refused"),
    *("Broken pipe", "Timed out waiting", "Socket Timeout"),
)
"""Parts of error messages of gloo and torch's store after another process has ended."""


def start(runtime: Runtime) -> torch.device:
    """Start the process group, set threads and kernels, and return the device.

    A single process opens no port and reads no environment variable: its store is in memory and
    its process group moves no data. (Gloo would listen on a port of the loopback interface.)
    Several processes are started by torchrun. Tensors on CPU are exchanged by gloo, those on CUDA
    by nccl, if there is a device for each process.

    Raises:
        UserError: There is no CUDA device although one is required, or fewer than processes.
    """
    has_cuda = torch.cuda.is_available()
    if runtime.device == "cuda" and not has_cuda:
        raise UserError("runtime.device=cuda: torch sees no CUDA device; use runtime.device=cpu")
    device = torch.device("cuda" if has_cuda and runtime.device != "cpu" else "cpu")
    local_rank, on_this_machine = local_position()
    if device.type == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"{on_this_machine} processes for {torch.cuda.device_count()} CUDA devices on this"
                " machine; start fewer, or use runtime.device=cpu"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    cores = max(1, (os.cpu_count() or 1) // on_this_machine)
    torch.set_num_threads(runtime.threads or cores)
    torch.use_deterministic_algorithms(True, warn_only=device.type == "cuda")
    deterministic: Any = torch.utils.deterministic
    deterministic.fill_uninitialized_memory = False  # we always write before reading
    if not dist.is_initialized():
        _start_group()
        atexit.register(_stop)
    return device


def _start_group() -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        has_each = torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and has_each else "gloo"
        dist.init_process_group(backend, timeout=PATIENCE)
        return
    if SINGLE not in dist.Backend.backend_list:
        dist.Backend.register_backend(
            SINGLE, _single_process_group, extended_api=True, devices=["cpu", "cuda"]
        )
    dist.init_process_group(SINGLE, rank=0, world_size=1, store=dist.HashStore())


def local_position() -> tuple[int, int]:
    """Return the rank of this process on its machine, and the number of processes there."""
    if world_size() == 1:
        return 0, 1
    return int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def rank() -> int:
    """Return the rank of this process; 0 for a single process."""
    if world_size() == 1:
        return 0
    return dist.get_rank() if dist.is_initialized() else int(os.environ["RANK"])


def world_size() -> int:
    """Return the number of processes."""
    if dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1"))


def share() -> tuple[int, int]:
    """Return ``(first, step)``: this process works on every ``step``-th item of a list."""
    return rank(), world_size()


def barrier() -> None:
    """Wait until all processes have called this function.

    Raises:
        ReportedElsewhere: Another process has failed (``propagate_errors``).
    """
    exchange(None)


def exchange(value: Value) -> list[Value]:
    """Return the values of all processes by rank; plain Python values and small tensors.

    Raises:
        ReportedElsewhere: Another process has failed (``propagate_errors``).
    """
    if world_size() == 1:
        return [value]
    values = _gather(value)
    if any(isinstance(item, _Failed) for item in values):
        raise ReportedElsewhere("another process has failed")
    return values


@contextmanager
def propagate_errors() -> Iterator[None]:
    """Propagate an exception on one rank to all ranks, at their next exchange.

    Inside the block, processes may wait for each other only in ``exchange`` and ``barrier``, or
    where no process can fail alone. After a failure, processes leave the block together.

    Raises:
        ReportedElsewhere: Another process has failed and reports the error.
    """
    if world_size() == 1:
        yield
        return
    with detect_lost_ranks():
        try:
            yield
            barrier()
        except ReportedElsewhere:
            _gather(None)
            raise
        except Exception:
            failed = [isinstance(item, _Failed) for item in _gather(_Failed())]
            _gather(None)
            if any(failed[: rank()]):
                raise ReportedElsewhere("another process has failed, too") from None
            raise


def total(values: Tensor) -> Tensor:
    """Sum a tensor over processes, in place, and return it."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def from_first(value: Value) -> Value:
    """Return the value of the first process, on all processes; plain Python values.

    Raises:
        ReportedElsewhere: Another process has failed (``propagate_errors``).
    """
    barrier()
    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def is_first_report() -> bool:
    """Return whether no other process has called this function; true if that is unknown.

    It reads the store of the launcher, so it works after another process has ended.
    """
    if not dist.is_initialized() or world_size() == 1:
        return True
    try:
        return int(dist.distributed_c10d._get_default_store().add(REPORTS, 1)) == 1
    except RuntimeError:  # of DistStoreError: the launcher has ended too
        return True


class _Failed:
    """Sent by a failed process instead of a value."""


def _gather(value: Any) -> list[Any]:
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


@contextmanager
def detect_lost_ranks() -> Iterator[None]:
    """Convert communication errors after the end of another process into ``RankLost``.

    Raises:
        RankLost: Another process has ended.
    """
    try:
        yield
    except RuntimeError as error:
        is_loss = isinstance(error, dist.DistBackendError) or any(
            words in str(error) for words in LOST_MESSAGES
        )
        if world_size() == 1 or not is_loss:
            raise
        raise RankLost(LOST) from None


def gather(values: NDArray[np.float32], places: list[NDArray[np.int64]]) -> NDArray[np.float32]:
    """Return the ``(R,)`` values of all processes, on all processes.

    Args:
        values: Values of this process.
        places: Positions of the values of each process in the result; a partition of 0 to R - 1.
    """
    if world_size() == 1:
        return values
    largest = max(len(of_process) for of_process in places)
    padded = np.zeros(largest, dtype=np.float32)
    padded[: len(values)] = values
    local = torch.from_numpy(padded)
    parts = [torch.empty_like(local) for _ in places]
    dist.all_gather(parts, local)
    result = np.empty(sum(len(of_process) for of_process in places), dtype=np.float32)
    for of_process, part in zip(places, parts, strict=True):
        result[of_process] = part[: len(of_process)].numpy()
    return result


class SyncedBatchNorm(nn.BatchNorm1d):
    """Batch norm over the rows of all processes, on any device (torch's needs CUDA).

    Processes may have different numbers of rows.
    """

    def forward(self, x_BH: Tensor) -> Tensor:
        """Return normalized rows; in training also update the running statistics."""
        if not self.training:
            return super().forward(x_BH)
        num_rows = x_BH.new_full((1,), float(x_BH.shape[0]))
        sums = torch.cat([num_rows, x_BH.sum(0)])
        sums = differentiable_all_reduce(sums)
        num_rows, mean_H = sums[0], sums[1:] / sums[0]
        centered_BH = x_BH - mean_H
        variance_H = differentiable_all_reduce(centered_BH.square().sum(0)) / num_rows
        with torch.no_grad():
            assert self.momentum is not None
            assert self.running_mean is not None
            assert self.running_var is not None
            unbiased_H = variance_H * num_rows / (num_rows - 1).clamp(min=1)
            self.running_mean.lerp_(mean_H, self.momentum)
            self.running_var.lerp_(unbiased_H, self.momentum)
            if self.num_batches_tracked is not None:
                self.num_batches_tracked.add_(1)
        normal_BH = centered_BH * (variance_H + self.eps).rsqrt()
        output_BH: Tensor = normal_BH * self.weight + self.bias if self.affine else normal_BH
        return output_BH


def synchronize_batch_norms(network: nn.Module) -> None:
    """Make every batch norm of ``network`` use the rows of all processes."""
    if world_size() == 1:
        return
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.__class__ = SyncedBatchNorm


def _single_process_group(common: Any, backend: Any) -> Any:
    """Return the process group of a single process.

    It has a name of its own, because torchrec treats torch's name ``fake`` specially.
    """
    assert common.group_size == 1
    create: Any = FakeProcessGroup._create_internal
    return create(common.group_rank, common.group_size, backend)


def _stop() -> None:
    if dist.is_initialized():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dist.destroy_process_group()
