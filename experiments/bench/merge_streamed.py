"""Measurements of merging from disk to disk: peak memory, and time against plain copying."""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from rounds import Figure

from cki_rec.checkpoints import DESCRIPTION, FORMAT, TENSORS, file_digests
from cki_rec.cli import compose_config
from cki_rec.config import Config, parse, section
from cki_rec.data.provenance import Provenance
from cki_rec.data.schema import Feature, FeatureSchema
from cki_rec.engine.block_writer import BlockWriter, write_metadata
from cki_rec.engine.embeddings import table_of
from cki_rec.merging.params import generator
from cki_rec.models import build_model

GB = 16_000_000
"""Rows of 16 columns in float32 that take about one GB."""
BLOCK, READ = 1 << 16, 1 << 24
METHODS = ("merge=cki_dual_soft", "merge=aligned_weights")
TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node", "2")
ROUNDS = 3
MEMORY_GB = 1.5


def merge_streamed_time(config: Config, gigabytes: int = 1) -> Figure:
    """Return the time of a streamed merge over that of reading both sources and writing one."""
    measured = _measured(gigabytes)
    slowest = max(measured, key=lambda entry: entry["ratio"])
    return Figure(slowest["ratio"], _detail(measured))


def merge_streamed_memory(config: Config, gigabytes: int = 1) -> Figure:
    """Return the peak memory of a streamed merge in GB."""
    measured = _measured(gigabytes)
    return Figure(max(entry["peak"] for entry in measured) / 1e9, _detail(measured))


def merge_streamed_processes(config: Config, gigabytes: int = 4) -> Figure:
    """Return the time of one process with one thread over that of two processes of one each."""
    rounds = _measured(gigabytes, "processes")
    alone, both = ([each[key] for each in rounds] for key in ("alone", "both"))
    ratios = [one / two for one, two in zip(alone, both, strict=True)]
    each = "; ".join(f"{one:.1f} and {two:.1f} s" for one, two in zip(alone, both, strict=True))
    return Figure(statistics.median(ratios), f"{METHODS[0]}, {gigabytes} GB, whole commands: {each}")


def _detail(measured: list[dict[str, float | str]]) -> str:
    return "; ".join(
        f"{m['method']}, sources of {m['bytes'] / 1e9:.1f} GB: {m['seconds']:.1f} s"
        f" ({m['processor']:.1f} s of processor time), plain reading and"
        f" writing {m['plain']:.1f} s, peak {m['peak'] / 1e9:.2f} GB"
        for m in measured
    )


def _measured(gigabytes: int, what: str = "plain") -> list[dict]:
    command = [sys.executable, __file__, str(gigabytes), what]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    figures: list[dict] = json.loads(done.stdout.splitlines()[-1])
    return figures


def sources_of(gigabytes: float, folder: Path) -> list[Path]:
    """Write two sources of this size."""
    sources = [folder / "a", folder / "b"]
    for seed, source in enumerate(sources):
        write_source(source, seed, int(GB * gigabytes))
    return sources


def merge(method: str, sources: list[Path], folder: Path, *launch: str, threads: int = 0) -> None:
    """Run a merge command."""
    paths = ",".join(f"{{path: {source}}}" for source in sources)
    words = [method, f"merge.sources=[{paths}]", f"merge.memory_gb={MEMORY_GB}"]
    words += [f"runtime.out={folder}/out", f"runtime.threads={threads}"]
    command = [sys.executable, *launch, "-m", "cki_rec", "merge", *words]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def measure_processes(gigabytes: float, folder: Path) -> list[dict]:
    """Return the time of one process and of two processes in each round."""
    sources, rounds = sources_of(gigabytes, folder), []
    for _ in range(ROUNDS):
        rounds.append({})
        for name, launch in (("alone", ()), ("both", TORCHRUN)):
            start = time.perf_counter()
            merge(METHODS[0], sources, folder, *launch, threads=1)
            rounds[-1][name] = time.perf_counter() - start
            subprocess.run(["rm", "-r", str(folder / "out")], check=True)
    return rounds


def measure(gigabytes: float, folder: Path) -> list[dict]:
    """Return time and memory of merges of two sources of this size."""
    sources, results = sources_of(gigabytes, folder), []
    for method in METHODS:
        before = plain_seconds(sources, folder)
        start, used = time.perf_counter(), _processor_seconds()
        merge(method, sources, folder)
        seconds, used = time.perf_counter() - start, _processor_seconds() - used
        after = plain_seconds(sources, folder)
        size = sum(path.stat().st_size for path in (sources[0] / TENSORS).iterdir())
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        plain = (before + after) / 2
        results.append(
            {
                "method": method,
                "seconds": seconds,
                "processor": used,
                "plain": plain,
                "ratio": seconds / plain,
                "peak": peak,
                "bytes": size,
            }
        )
        print(results[-1], file=sys.stderr, flush=True)
        subprocess.run(["rm", "-r", str(folder / "out")], check=True)
    return results


def _processor_seconds() -> float:
    """Return the processor time of all processes that were started and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def plain_seconds(sources: list[Path], folder: Path) -> float:
    """Return the time to read both sources and to write one of their size to the disk."""
    start = time.perf_counter()
    for place, source in enumerate(sources):
        with (folder / "copy").open("wb") as copy:
            for path in sorted((source / TENSORS).iterdir()):
                with path.open("rb") as file:
                    while piece := file.read(READ):
                        if place == 0:
                            copy.write(piece)
            copy.flush()
            os.fsync(copy.fileno())
    seconds = time.perf_counter() - start
    (folder / "copy").unlink()
    return seconds


def write_source(folder: Path, seed: int, rows: int) -> None:
    """Write a random DNN with one large table, block by block."""
    config = parse(compose_config(["model=dnn", "model.histories=false"]))
    schema = FeatureSchema(
        (Feature("item", "item", "categorical"),), {"item": rows}, {"item": "hash"}
    )
    network = build_model(schema, config.model, torch.device("meta"))
    tensors = folder / TENSORS
    tensors.mkdir(parents=True)
    shapes = {f"model.{n}": (t.shape, t.dtype) for n, t in network.state_dict().items()}
    with BlockWriter(tensors, 0, resume=False) as writer:
        for name, tensor in network.state_dict().items():
            draw = generator(seed, name)
            if not table_of(name):
                writer.write(f"model.{name}", 0, torch.randn(tensor.shape, generator=draw))
                continue
            shapes[f"accumulator.{name}"] = ((rows, 1), torch.float32)
            shapes["counts.item"] = ((rows,), torch.int64)
            for first in range(0, rows, BLOCK):
                num = min(BLOCK, rows - first)
                state = torch.rand(num, 1, generator=draw)
                counts = torch.randint(0, 9, (num,), generator=draw)
                block = torch.randn(num, tensor.shape[1], generator=draw)
                writer.write(f"accumulator.{name}", first, state)
                writer.write("counts.item", first, counts)
                writer.write(f"model.{name}", first, block)
        writer.finish()
        blocks = writer.written
    (folder / "journal-0.jsonl").unlink(missing_ok=True)
    write_metadata(tensors, blocks, shapes)
    content = {
        "format": FORMAT,
        "model": section(config.model),
        "schema": schema.to_json(),
        **Provenance("hash").to_json(),
        "position": None,
        "files": file_digests(tensors),
    }
    (folder / DESCRIPTION).write_text(json.dumps(content))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        form = measure_processes if sys.argv[2:] == ["processes"] else measure
        print(json.dumps(form(float(sys.argv[1]), Path(name))))
