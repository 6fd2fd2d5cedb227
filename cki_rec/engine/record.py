"""Run directories: named by content, locked while written, complete with ``record.json``."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray
from torch.backends import cpu

from cki_rec import COMMAND_VARIABLE, project_root
from cki_rec.checkpoints import CHECKPOINT
from cki_rec.checkpoints.deltas import FOLDER as DELTA
from cki_rec.config import UserError
from cki_rec.data.encoding import tokens
from cki_rec.engine import checkpoint_io, distributed
from cki_rec.engine.resume import RESUME, unfinished_checkpoints
from cki_rec.engine.steps import STEPS
from cki_rec.environment import installed_version
from cki_rec.files import write_atomically

PACKAGES = (
    *("cki-rec", "torch", "torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu"),
    *("numpy", "polars"),
)
"""Packages whose versions a record stores."""
RECORD = "record.json"
KEYS = frozenset({"run_id", "config", "data", "result", "provenance"})
"""Entries of every record."""
REMADE = "remade"
"""Folder of new runs that will replace finished ones."""

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Run:
    """One run directory and the duration of its phases."""

    path: Path
    seconds: dict[str, float] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    """Further facts for the record: sharding plan, step of resuming."""

    @property
    def record(self) -> dict[str, Any] | None:
        """Return the record; None while the run is unfinished, or if the record is damaged."""
        try:
            value: Any = json.loads((self.path / RECORD).read_text())
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return None
        return value if isinstance(value, dict) and value.keys() >= KEYS else None

    @property
    def checkpoint(self) -> Path:
        """Return the path of the run's checkpoint."""
        return self.path / CHECKPOINT

    def damage(self) -> str:
        """Return the file of a finished run that is gone or has another size; "": none."""
        files = {} if self.record is None else self.record["provenance"].get("files", {})
        for name, size in files.items():
            path = self.path / name
            if not path.is_file() or path.stat().st_size != size:
                return f"{path} is {'damaged' if path.is_file() else 'missing'}"
        return ""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the wall time of the block to ``seconds``."""
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def finish(self, config: dict[str, Any], data: dict[str, Any], result: dict[str, Any]) -> None:
        """Write the record, last and atomically.

        Args:
            config: The configuration that the run depends on.
            data: Name, hash and row counts of the data set.
            result: The results. ``fingerprint`` covers these three: equal for equal seeds.
        """
        content = {"config": config, "data": data, "result": result}
        text = json.dumps(content, sort_keys=True, allow_nan=False)
        record = {
            "run_id": self.path.name,
            **content,
            "fingerprint": hashlib.sha256(text.encode()).hexdigest(),
            "provenance": {**provenance(self.seconds), **self.facts, "files": _files(self.path)},
        }
        write_atomically(
            self.path / RECORD, json.dumps(record, indent=1, allow_nan=False).encode()
        )


@contextmanager
def open_run(out: Path, run_id: str, force: bool = False, resume: str = "never") -> Iterator[Run]:
    """Yield the run directory of ``run_id`` under a lock that excludes other programs.

    Leftovers of a killed or failed run are removed, except checkpoints to resume from if
    ``resume`` is ``auto``. A finished run stays, unless one of its files is damaged, or ``force``.
    Then a new run is made in another folder, and replaces the old one when it has its record.
    The first process holds the lock for all processes of one program.

    Raises:
        RankLost: Another process has ended.
    """
    if distributed.rank() > 0:
        with distributed.detect_lost_ranks():
            run = Run(Path(distributed.from_first("")))  # the first process holds the lock now
            yield run
            distributed.barrier()  # the record is written
        run.path = out / run_id
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
    except FileNotFoundError as error:  # /proc and the like: exists, but takes no folder
        raise UserError(f"runtime.out={out}: this folder cannot be made") from error
    locks = out / "locks"
    locks.mkdir(exist_ok=True)
    run, remade = Run(out / run_id), Run(out / REMADE / run_id)
    with FileLock(locks / f"{run_id}.lock"), distributed.detect_lost_ranks():
        _replace_if_finished(run, remade)  # of a program that was killed
        if damage := run.damage():
            log.warning("  %s; %s is made again", damage, run_id)
        begins_afresh = force and run.record is None
        if damage or (force and run.record is not None):
            run.path = remade.path
        may_resume = resume == "auto" and unfinished_checkpoints(run.path / RESUME)
        if run.record is None and (begins_afresh or not may_resume):
            shutil.rmtree(run.path, ignore_errors=True)
            run.path.mkdir(parents=True)
        checkpoint_io.tidy(run.path)
        distributed.from_first(str(run.path))
        try:
            yield run
        except UserError:  # this configuration is wrong; another one is another run
            shutil.rmtree(run.path / RESUME, ignore_errors=True)
            raise
        finally:
            if run.record is None and not unfinished_checkpoints(run.path / RESUME):
                shutil.rmtree(run.path, ignore_errors=True)
            run.path = out / run_id
            _replace_if_finished(run, remade)
        distributed.barrier()


def _replace_if_finished(run: Run, remade: Run) -> None:
    """Put a run that was made again in the place of the old one, if it has its record."""
    if remade.record is not None:
        shutil.rmtree(run.path, ignore_errors=True)
        remade.path.rename(run.path)
    with suppress(OSError):  # other runs are being made
        remade.path.parent.rmdir()


def _files(folder: Path) -> dict[str, int]:
    """Return the size of every file of a result: not of logs, nor of work in progress."""
    paths = [path for path in folder.iterdir() if path.name not in (STEPS, RECORD)]
    for name in (CHECKPOINT, tokens.FOLDER, DELTA):
        paths += (folder / name).rglob("*")
    return {str(p.relative_to(folder)): p.stat().st_size for p in sorted(paths) if p.is_file()}


def save_arrays(path: Path, arrays: dict[str, NDArray[Any]]) -> None:
    """Write arrays as one ``.npz`` file, whole or not at all."""
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    write_atomically(path, buffer.getvalue())


def load_arrays(path: Path) -> dict[str, NDArray[Any]] | None:
    """Return the arrays of an ``.npz`` file; None if it is missing, cut or damaged."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (OSError, EOFError, ValueError, TypeError, zipfile.BadZipFile, zlib.error):
        return None


def provenance(seconds: dict[str, float]) -> dict[str, Any]:
    """Return where and how the run was made; this never enters its identity."""
    versions = {name: number for name in PACKAGES if (number := installed_version(name))}
    return {
        **_commit(),
        "versions": {"python": platform.python_version(), **versions},
        "hardware": hardware(),
        "world_size": distributed.world_size(),
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "peak_memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
        "command": os.environ.get(COMMAND_VARIABLE, " ".join(sys.argv)),
    }


def hardware() -> str:
    """Return the processor, its vector instructions, its cores and the memory as text."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [
            x.split(":")[1].strip() for x in cpuinfo.read_text().splitlines() if "model name" in x
        ]
        name = models[0] if models else name
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    vectors = cpu.get_cpu_capability()
    return f"{name}, {vectors}, {os.cpu_count()} cores, {memory:.0f} GiB"


def _commit() -> dict[str, Any]:
    """Return the commit of a clone and whether files differ from it; None outside a clone."""
    git = ["git", "-C", str(project_root())]
    status = ["status", "--porcelain", "--", "cki_rec", "conf"]
    try:
        head, changes = (
            subprocess.run([*git, *words], capture_output=True, text=True, check=True).stdout
            for words in (["rev-parse", "HEAD"], status)
        )
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}
    return {"commit": head.strip(), "dirty": bool(changes.strip())}
