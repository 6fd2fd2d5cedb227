"""Merge two TorchRec checkpoints of several GB, and the same as safetensors, from disk to disk.

``python experiments/foreign/run.py FOLDER [GB]`` trains and writes both in FOLDER with TorchRec on
two processes (``tests/distributed/torchrec_writer.py``). It merges them at ``merge.memory_gb=1.5``
and scores the results in plain TorchRec on two processes and in plain PyTorch. Expected scores
come from what the sources looked up. It prints times, peaks and the largest error, as JSON.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

T = TypeVar("T")
ROOT = Path(__file__).resolve().parents[2]
WRITER = ROOT / "tests" / "distributed" / "torchrec_writer.py"
DIM, BUDGET, INDEX = 64, 1.5, "model.safetensors.index.json"


def torchrun(*words: object) -> None:
    """Run the writer on two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(WRITER), *map(str, words)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def apart(function: Callable[..., T], *arguments: object) -> T:
    """Return the result of a function that needs much memory, in a process of its own.

    Linux counts the memory of a parent as that of the processes that it starts.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def merged(out: Path, sources: list[Path], *words: str) -> dict:
    """Merge in a process of its own; return the model's place, seconds and peak memory."""
    listed = f"merge.sources=[{','.join(map(str, sources))}]"
    command = [sys.executable, "-m", "cki_rec", "merge", f"merge.memory_gb={BUDGET}", *words]
    command += [listed, f"runtime.out={out}"]
    begun = time.monotonic()
    with open(os.devnull, "w") as null:
        process = subprocess.Popen(command, stdout=null)
        _, process.returncode, usage = os.wait4(process.pid, 0)
    assert process.returncode == 0, command
    (path,) = [*out.glob(f"merge-*/{INDEX}"), *out.glob("merge-*/model")]
    seconds, peak = time.monotonic() - begun, usage.ru_maxrss * 1024 / 1e9
    return {
        "words": " ".join(words),
        "form": "safetensors" if sources[0].name.endswith("-safetensors") else "dcp",
        "seconds": round(seconds, 1),
        "peak_gb": round(peak, 3),
        "model": path,
    }


def as_safetensors(folder: Path) -> Path:
    """Write the model of a DCP folder as sharded safetensors, one tensor a file."""
    target = folder.with_name(f"{folder.name}-safetensors")
    target.mkdir()
    weight_map = {}
    entries = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    for number, (key, entry) in enumerate(entries.items()):
        if not key.startswith("model."):
            continue
        tensor = torch.empty(entry.size, dtype=entry.properties.dtype)
        dcp.load({key: tensor}, checkpoint_id=folder, no_dist=True)
        file = f"model-{number:05}-of-00004.safetensors"
        save_file({key.removeprefix("model."): tensor}, target / file)
        weight_map[key.removeprefix("model.")] = file
    (target / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return target


def in_pytorch(path: Path, ids: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the scores of a merged model with tables of plain PyTorch."""
    tensors = {}
    if path.is_dir():
        entries = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
        keys = {key: entry for key, entry in entries.items() if key.startswith("model.")}
        loaded = {k: torch.empty(e.size, dtype=e.properties.dtype) for k, e in keys.items()}
        dcp.load(loaded, checkpoint_id=path, no_dist=True)
        tensors = {key.removeprefix("model."): tensor for key, tensor in loaded.items()}
    else:
        for name, file in json.loads(path.read_text())["weight_map"].items():
            with safe_open(path.parent / file, "pt") as opened:
                tensors[name] = opened.get_tensor(name)
    looked_up = []
    for table, rows in ids.items():
        weight = tensors[f"tables.embedding_bags.{table}.weight"]
        module = nn.EmbeddingBag.from_pretrained(weight, mode="sum")
        looked_up.append(module(rows[:, None]))
    weight, bias = tensors["head.weight"], tensors["head.bias"]
    return nn.functional.linear(torch.cat(looked_up, 1), weight, bias).squeeze(1)


def main(home: Path, gigabytes: float) -> None:
    """Run all steps; remove the large files."""
    sys.path.insert(0, str(WRITER.parent))
    import torchrec_writer

    factor = round(gigabytes * 1e9 / (4 * DIM * sum(torchrec_writer.SIZES.values())))
    home.mkdir(parents=True)
    try:
        sources = [home / "1", home / "2"]
        for seed, folder in enumerate(sources, 1):
            torchrun("train", folder, seed, factor, DIM)
        known = [torch.load(folder / "scores.pt", weights_only=True) for folder in sources]
        mean = {n: (known[0]["head"][n] + known[1]["head"][n]) / 2 for n in known[0]["head"]}
        inputs = (known[0]["inputs"] + known[1]["inputs"]) / 2
        expected = nn.functional.linear(inputs, mean["weight"], mean["bias"]).squeeze(1)
        rows = torchrec_writer.ids_of(torch.Generator().manual_seed(7), factor)
        ids = {key: rows[key].values() for key in rows.keys()}
        size = sum(file.stat().st_size for file in sources[0].glob("*.distcp"))
        results = []
        for form in ("dcp", "safetensors"):
            if form == "safetensors":
                originals, sources = sources, [apart(as_safetensors, f) for f in sources]
                for folder in originals:
                    shutil.rmtree(folder)
            done = merged(home / f"out-{form}", sources, "merge=average")
            scores = {"pytorch": apart(in_pytorch, done["model"], ids)}
            if form == "dcp":
                torchrun("score", done["model"], home / "scores.pt", factor, DIM)
                file = torch.load(home / "scores.pt", weights_only=True)
                scores["torchrec"] = file["scores"]
            errors = {n: float((x - expected).abs().max()) for n, x in scores.items()}
            results.append({**done, "model": "", "largest_error": errors})
            shutil.rmtree(home / f"out-{form}")
            if form == "dcp":
                results.append(merged(home / "out-evidence", sources, "merge=evidence"))
                results[-1]["model"] = ""
                shutil.rmtree(home / "out-evidence")
        facts = {"source_gb": size / 1e9, "budget_gb": BUDGET, "merges": results}
        sys.stdout.write(json.dumps(facts, indent=1) + "\n")
    finally:
        shutil.rmtree(home, ignore_errors=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else 4.0)
