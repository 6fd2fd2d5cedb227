"""One store of trained tiny models for all integration tests of a session."""

from __future__ import annotations

import shutil
from pathlib import Path
from unittest.mock import patch

import pytest
from filelock import FileLock

from cki_rec.checkpoints import load
from cki_rec.engine import checkpoint_io
from cki_rec.engine.record import RECORD
from cki_rec.pipelines import train

TRAIN = train._train
TRAIN_THEMSELVES = ("test_resume", "test_drift", "test_fetch", "test_union", "test_growing")
"""Modules that test training or the raw files of models: they get no model from the store."""


@pytest.fixture(scope="session")
def trained_models(tmp_path_factory) -> Path:
    """Folder of finished trainings by run id, shared by all workers of a session.

    A run id covers everything that a training depends on, so equal ids have equal models. (It
    covers the rows, not the raw file that holds them, so ``test_union`` trains itself.)
    """
    base = tmp_path_factory.getbasetemp()
    is_worker = base.name.startswith("popen-")
    folder = (base.parent if is_worker else base) / "trained_models"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(autouse=True, scope="module")
def train_once(request, trained_models):
    """Take each training from the store, or train and put it there."""
    path = Path(request.module.__file__)
    if path.parent.name != "integration" or path.stem in TRAIN_THEMSELVES:
        yield
        return

    def train_or_copy(config, dataset, run, reads) -> None:
        stored = trained_models / run.path.name
        with FileLock(f"{stored}.lock"):
            if (stored / RECORD).exists():
                shutil.copytree(stored, run.path, dirs_exist_ok=True)
            else:
                TRAIN(config, dataset, run, reads)
                shutil.copytree(run.path, stored)

    with patch.object(train, "_train", train_or_copy):
        yield


def twin(run: Path, target: Path) -> Path:
    """Write a model with equal parameters and other accumulators; return its folder."""
    saved = load(run / "checkpoint")
    accumulators = {name: values + 1 for name, values in saved.accumulators.items()}
    groups = {"model": saved.params, "accumulator": accumulators, "counts": saved.counts}
    checkpoint_io.save(target, groups, saved.model, saved.schema, saved.origin)
    return target


@pytest.fixture
def without_store():
    """Let one test train itself."""
    with patch.object(train, "_train", TRAIN):
        yield
