"""Integration on one process, two and three: the same models, and one word of what is wrong."""

from __future__ import annotations

import json
import subprocess
from functools import lru_cache
from pathlib import Path

import merging_cases
import pytest
import torch
from merging_cases import EXACT, MISTAKES, SIZES, merged
from test_world_sizes import torchrun

from cki_rec.checkpoints import checkpoint, read_tensors
from cki_rec.engine.embeddings import table_of

pytestmark = pytest.mark.dist
several = pytest.mark.parametrize("num", [2, pytest.param(3, marks=pytest.mark.slow)])
FAILURES = {
    "larger": "item.weight: float32 (101, 8), in",
    "bad": "entries are NaN or infinite",
    "damaged": "damaged checkpoint, the file has changed",
    "missing": "no checkpoint here",
    "untrained": "not trained yet; make it: cki-rec train",
    "full": "No space left on device; free space there",
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """Folder of what one process, this one, merges; sources lie beside it."""
    path = tmp_path_factory.mktemp("merging_cases")
    merging_cases.write_all(path / "sources")
    (path / "1").mkdir()
    merging_cases.run(path / "1", path / "sources")
    return path / "1"


@pytest.fixture(scope="module")
def together(alone):
    """Function (number of processes) -> folder of what so many merge; each number once."""

    @lru_cache
    def run(num: int) -> Path:
        path = alone.with_name(str(num))
        path.mkdir()
        command = torchrun(num, merging_cases.__file__, path, alone.with_name("sources"))
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == 0, done.stderr[-4000:]
        return path

    return run


def record_of(folder: Path) -> dict:
    return json.loads((folder / "record.json").read_text())


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return read_tensors(folder / "checkpoint" / checkpoint.TENSORS)


def said(folder: Path, case: str) -> tuple[set[int], list[str]]:
    """Return exit codes of all processes and the lines they said."""
    found = [json.loads(p.read_text())[case] for p in sorted(folder.glob("process-*.json"))]
    return {code for code, _ in found}, [x for _, text in found for x in text.splitlines()]


@several
@pytest.mark.parametrize("case", [*EXACT, "again"])
def test_a_model_merged_by_several_is_that_of_one_bit_for_bit(alone, together, case, num):
    assert said(together(num), case) == ({0}, [])
    one, many = merged(alone, case), merged(together(num), case)
    expected, found = tensors_of(one), tensors_of(many)
    assert set(found) == set(expected)
    assert {f"counts.{table}" for table in SIZES} <= set(found)
    assert sum(name.startswith("accumulator") for name in found) == 2 * len(SIZES)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    whole = checkpoint.load(many / "checkpoint")
    assert whole.schema == merging_cases.SCHEMA
    shares = record_of(many)["result"]["shares"]
    for name, each in (record_of(one)["result"]["shares"] or {}).items():
        assert shares[name] == pytest.approx(each, abs=1e-12)
    if case != "again":
        assert one.name == many.name
    assert record_of(many)["provenance"]["world_size"] == num


@several
def test_an_aligned_model_is_that_of_one_up_to_rounding(alone, together, num):
    assert said(together(num), "aligned") == ({0}, [])
    one, many = merged(alone, "aligned"), merged(together(num), "aligned")
    expected, found = tensors_of(one), tensors_of(many)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-5, msg=name)
    plain = tensors_of(merged(alone, "evidence"))
    moved = [n for n, tensor in expected.items() if not torch.equal(tensor, plain[n])]
    assert {table_of(name.removeprefix("model.")) for name in moved} >= set(SIZES)
    facts = [record_of(run)["result"]["alignment"] for run in (one, many)]
    assert facts[1]["agreement"] == pytest.approx(facts[0]["agreement"], abs=1e-6)
    assert facts[1]["agreement"] > facts[1]["agreement_before"]


@several
def test_every_process_writes_its_share(together, num):
    tensors = merged(together(num), "evidence") / "checkpoint" / checkpoint.TENSORS
    sizes = [path.stat().st_size for path in tensors.glob("*.distcp")]
    assert len(sizes) == num
    assert max(sizes) < 2 * min(sizes)


@pytest.mark.parametrize("case", [*MISTAKES, *FAILURES])
def test_what_is_wrong_is_said_once_and_leaves_nothing(together, case):
    codes, lines = said(together(2), case)
    assert codes == {2}
    (line,) = lines
    assert (FAILURES[case] if case in FAILURES else MISTAKES[case][0]) in line
    assert not [*together(2).glob(f"{case}/merge-*")]


def test_processes_that_failed_together_go_on_together(together):
    assert said(together(2), "after") == ({0}, [])
