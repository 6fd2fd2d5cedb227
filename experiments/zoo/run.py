"""Send model definitions of other packages through the library: find, verify, align, merge.

Run in the environment of ``make bench-zoo``:
``python experiments/zoo/run.py RESULTS.jsonl TABLE.md [NAME ...]``. Each entry replaces its line
of the results; names select entries. The table is written from all lines.
"""

from __future__ import annotations

import copy
import json
import math
import platform
import sys
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
from entries import ENTRIES, Entry
from table import table

import cki_rec
from cki_rec import align
from cki_rec.files import write_atomically
from cki_rec.merging.calling import evaluating, outputs_of
from cki_rec.merging.params import Params, generator
from cki_rec.merging.symmetry import Symmetry, random_element, transform


def measure(entry: Entry) -> dict[str, Any]:
    """Return the line of one entry; a failure is a result as well."""
    line: dict[str, Any] = {
        "name": entry.name,
        "package": entry.package,
        "kind": entry.kind,
        "version": version(entry.package),
        "versions": {"python": platform.python_version(), "torch": version("torch")},
    }
    step = "build"
    try:
        module, inputs = built(entry, 0)
        step = "find_symmetries"
        start = time.process_time()
        symmetries = cki_rec.find_symmetries(module, inputs)
        line["seconds"] = round(time.process_time() - start, 2)
        line |= found(module, symmetries)
        step = "verify"
        errors = cki_rec.verify(module, symmetries, inputs, seed=1)
        line["error"] = max([*symmetries.errors, *errors], default=0.0)
        step = "align and merge a moved copy"
        line |= planted(module, symmetries, inputs)
        step = "merge two models"
        line |= merged(module, built(entry, 1)[0], symmetries, inputs)
    except Exception as error:
        line["failed"] = f"{step}: {type(error).__name__}: {str(error).splitlines()[0]}"
    return line


def built(entry: Entry, seed: int) -> tuple[nn.Module, Any]:
    """Return a module with random weights, and inputs."""
    torch.manual_seed(seed)
    module, inputs = entry.build()
    return module.eval(), inputs


def tensors_of(module: nn.Module) -> Params:
    """Return the floating parameters and buffers of a module, tied ones once."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return {name: tensor.detach() for name, tensor in tensors if tensor.is_floating_point()}


def found(module: nn.Module, symmetries: Any) -> dict[str, Any]:
    """Return the groups of a module, the number of axes that move, and those that do not."""
    groups = Counter((symmetry.kind, symmetry.size) for symmetry in symmetries)
    moved = {(part.parameter, part.axis) for symmetry in symmetries for part in symmetry.slices}
    axes = [
        (name, axis)
        for name, tensor in module.named_parameters()
        for axis, size in enumerate(tensor.shape)
        if size > 1
    ]
    return {
        "groups": [[kind, size, count] for (kind, size), count in groups.items()],
        "frozen": list(symmetries.frozen),
        "runs": symmetries.runs,
        "axes": len(axes),
        "fixed": [f"{name} axis {axis}" for name, axis in axes if (name, axis) not in moved],
    }


def planted(module: nn.Module, symmetries: Sequence[Symmetry], inputs: Any) -> dict[str, float]:
    """Return how well a copy, moved by random elements, is brought back and merged."""
    draw = generator(0, "zoo")
    elements = [random_element(symmetry, draw) for symmetry in symmetries]
    source, moved = tensors_of(module), copy.deepcopy(module)
    changed = transform(source, symmetries, elements)
    for name, tensor in tensors_of(moved).items():
        tensor.copy_(changed[name])
    names = {part.parameter for symmetry in symmetries for part in symmetry.slices}
    aligned = align([module, moved], symmetries, module=module, batches=[inputs], anchor=0)
    options = {"symmetries": symmetries, "module": module, "batches": [inputs]}
    plain = cki_rec.merge([module, moved]).params
    together = cki_rec.merge([module, moved], align="weights", **options).params
    return {
        "copy_change": change_of(module, moved.state_dict(), inputs),
        "distance_before": distance(source, changed, names),
        "distance": distance(source, aligned.models[1], names),
        "agreement_before": aligned.agreement_before,
        "agreement": aligned.agreement,
        "average_change_before": change_of(module, plain, inputs),
        "average_change": change_of(module, together, inputs),
    }


def merged(
    first: nn.Module, second: nn.Module, symmetries: Sequence[Symmetry], inputs: Any
) -> dict[str, Any]:
    """Return whether the aligned average of two models loads and predicts finite values."""
    a, b = tensors_of(first), tensors_of(second)
    assert any(not torch.equal(a[name], b[name]) for name in a), "two models with equal weights"
    result = cki_rec.merge(
        [first, second],
        align="weights",
        symmetries=symmetries,
        module=first,
        batches=[inputs],
    )
    receiver = copy.deepcopy(first)
    receiver.load_state_dict(result.params)
    with torch.no_grad():
        finite = bool(outputs_of(receiver.eval(), inputs).isfinite().all())
    return {"finite": finite}


def distance(a: Params, b: Params, names: set[str]) -> float:
    """Return the distance of two models, relative to the norm of the first."""
    pairs: list[tuple[Tensor, Tensor]] = [(a[name].double(), b[name].double()) for name in names]
    gap = sum(float((x - y).square().sum()) for x, y in pairs)
    norm = sum(float(x.square().sum()) for x, _ in pairs)
    return math.sqrt(gap / norm) if norm else 0.0


def change_of(module: nn.Module, params: Params, inputs: Any) -> float:
    """Return the largest change of an output with other parameters, relative to the largest."""
    receiver = copy.deepcopy(module)
    receiver.load_state_dict(params)
    with torch.no_grad(), evaluating(module), evaluating(receiver):
        before, after = outputs_of(module, inputs), outputs_of(receiver, inputs)
    return float((after - before).abs().max() / before.abs().max().clamp(min=1e-12))


def warm_up() -> None:
    """Import the parts of PyTorch that a search needs, so that no entry is charged for it."""
    cki_rec.find_symmetries(nn.GRU(2, 2), torch.randn(3, 2, 2))


def main(results: Path, target: Path, names: Sequence[str]) -> None:
    """Measure entries and write the table.

    Raises:
        SystemExit: A name that no entry has.
    """
    if unknown := set(names) - {entry.name for entry in ENTRIES}:
        raise SystemExit(f"no entry {unknown.pop()!r}: {', '.join(e.name for e in ENTRIES)}")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # those of foreign packages
    warm_up()
    texts = results.read_text().splitlines() if results.exists() else []
    lines = {line["name"]: line for line in map(json.loads, texts)}
    for entry in ENTRIES:
        if names and entry.name not in names:
            continue
        line = lines[entry.name] = measure(entry)
        print(f"{entry.package} {entry.name}: {line.get('failed', 'done')}", flush=True)
        ordered = [lines[e.name] for e in ENTRIES if e.name in lines]
        write_atomically(results, "".join(f"{json.dumps(x)}\n" for x in ordered).encode())
    ordered = [lines[e.name] for e in ENTRIES if e.name in lines]
    write_atomically(target, table(ordered).encode())


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
