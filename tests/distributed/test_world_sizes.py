"""One process, two and three: the same trainings, predictions, merges and messages."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import merging_cases
import numpy as np
import pytest
import row_cases
import steps
import torch
from merging_cases import EXACT, MISTAKES, SIZES, STREAMED, SUMS, merged

from cki_rec.checkpoints import checkpoint, read_tensors
from cki_rec.engine.embeddings import table_of

pytestmark = pytest.mark.dist
SCRIPT = Path(steps.__file__)
WORLDS = (2, pytest.param(3, marks=pytest.mark.slow))
several = pytest.mark.parametrize("num", WORLDS)
pairs = pytest.mark.parametrize(("case", "plan"), steps.FITTING)
FAILURES = {
    "larger": "item.weight: float32 (101, 8), in",
    "bad": "entries are NaN or infinite",
    "damaged": "damaged checkpoint, the file has changed",
    "missing": "no checkpoint here",
    "full": "No space left on device; free space there",
}


def is_noise(case: str, name: str) -> bool:
    """Return whether rounding alone moves a parameter.

    A batch norm takes the bias before it away, so the gradient of that bias is zero but for
    rounding, and Adam makes whole steps of it. Nothing else in training depends on it.
    """
    return case == "batch norm" and ("mlp.layers.0.bias" in name or "running_mean" in name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("worlds")


@pytest.fixture(scope="module")
def alone(folder, raw_zip) -> Path:
    """Folder of what one process, this one, finds."""
    merging_cases.write_all(folder / "sources")
    dataset, schema = steps.data_of(str(raw_zip), str(folder / "encoded"))
    row_cases.write_sources(folder / "sources" / "of_rows", dataset, schema)
    (folder / "1" / "merged").mkdir(parents=True)
    torch.set_num_threads(1)
    steps.main(folder / "1", str(raw_zip), folder / "encoded", folder / "sources")
    return folder / "1"


class Worlds(dict):
    """World size -> folder of the results of its processes, which run once, when first read."""

    def __init__(self, folder: Path, raw: Path) -> None:
        super().__init__()
        self.folder, self.raw = folder, raw

    def __missing__(self, num: int) -> Path:
        path = self.folder / str(num)
        words = [path, self.raw, self.folder / "encoded", self.folder / "sources"]
        words += [self[2]] if num == 3 else []
        (path / "merged").mkdir(parents=True)
        command = [sys.executable, "-W", "ignore", str(SCRIPT), str(num), *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == 0, done.stderr[:3000] + done.stderr[-2000:]
        self[num] = path
        return path


@pytest.fixture(scope="module")
def worlds(folder, raw_zip, alone) -> Worlds:
    return Worlds(folder, raw_zip)


def arrays_of(folder: Path) -> list[dict[str, np.ndarray]]:
    return [dict(np.load(path)) for path in sorted(folder.glob("process-*.npz"))]


def messages_of(folder: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("process-*.json"))]


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return read_tensors(folder / checkpoint.TENSORS)


@several
@pairs
def test_weights_after_twenty_steps_are_those_of_one_process(alone, worlds, case, plan, num):
    one, many = tensors_of(alone / case / plan), tensors_of(worlds[num] / case / plan)
    assert set(one) == set(many)
    for name, tensor in one.items():
        if not is_noise(case, name):
            torch.testing.assert_close(many[name], tensor, rtol=1e-5, atol=1e-5, msg=name)
        if name.startswith("model.") and tensor.dtype == torch.float32 and tensor.ndim == 2:
            assert tensor.any(), name


@several
@pairs
def test_losses_and_logits_are_those_of_one_process(alone, worlds, case, plan, num):
    (want,) = messages_of(alone)
    key = f"{case}/{plan}"
    losses = [found["losses"][key] for found in messages_of(worlds[num])]
    assert len(losses) == num
    assert len(set(losses)) == 1  # every process knows the loss of all rows
    assert losses[0] == pytest.approx(want["losses"][key], abs=1e-5)
    if case == "batch norm":  # evaluated with a running mean that lags behind the bias
        return
    logits = [found[f"logits {key}"] for found in arrays_of(worlds[num])]
    assert len({len(part) for part in logits}) == 2  # shares are uneven
    (expected,) = arrays_of(alone)
    np.testing.assert_allclose(np.concatenate(logits), expected[f"logits {key}"], atol=1e-4)


def test_plans_of_one_process_agree(alone):
    for case, _ in steps.MOVED:
        found = [tensors_of(alone / case / p) for p in ("table_wise", "row_wise", "planner")]
        for name, tensor in found[0].items():
            for other in found[1:]:
                torch.testing.assert_close(other[name], tensor, rtol=1e-5, atol=1e-5)


@several
def test_predictions_are_gathered_in_the_order_of_rows(alone, worlds, num, raw_zip, folder):
    (want,) = arrays_of(alone)
    dataset, _ = steps.data_of(str(raw_zip), str(folder / "encoded"))
    ids = dataset.ids[dataset.rows("valid"), dataset.id_columns.index("user")]
    for found in arrays_of(worlds[num]):
        assert np.array_equal(found["ids"], ids)
        np.testing.assert_allclose(found["predictions"], want["predictions"], atol=1e-6)
        assert len(np.unique(found["predictions"])) > 100


@several
def test_batch_norm_sees_the_rows_of_all_processes(alone, worlds, num):
    (want,), found = arrays_of(alone), arrays_of(worlds[num])
    for name in [n for n in want if n.split()[0] in ("y", "gradient", "evaluated")]:
        parts = [process[name] for process in found]
        assert len({len(part) for part in parts}) == num
        np.testing.assert_allclose(np.concatenate(parts), want[name], rtol=0, atol=1e-10)
    for name in [n for n in want if n.startswith(("running", "num_batches", "sum"))]:
        for process in found:
            np.testing.assert_allclose(process[name], want[name], rtol=0, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize(("case", "plan"), steps.MOVED)
@pytest.mark.slow
def test_checkpoint_of_two_processes_fits_one_and_three(worlds, folder, case, plan):
    """Weights, accumulators, moments and average: bit for bit, under another plan."""
    written = tensors_of(worlds[2] / case / plan)
    groups = {name.split(".")[0] for name in written}
    assert groups == {"model", "accumulator", "adam", "average"}
    steps.move(worlds[2] / case / plan, folder / "1" / "moved" / case, case, "table_wise")
    for other in (folder / "1", worlds[3]):
        found = tensors_of(other / "moved" / case)
        assert set(found) == set(written)
        assert all(torch.equal(found[name], tensor) for name, tensor in written.items())


@several
def test_a_bad_row_of_one_process_stops_all_before_any_update(worlds, num):
    found = [messages["not finite"] for messages in messages_of(worlds[num])]
    assert len(found) == num
    for each in found:
        assert each["error"].startswith("a title: the loss is nan in epoch 1; lower train.learn")
        assert each["steps"] == 2
        assert each["unchanged"]


@several
def test_a_refinement_by_several_is_that_of_one(alone, worlds, num):
    (expected,), found = messages_of(alone), messages_of(worlds[num])
    assert expected["refined"]["is_best"]
    for each in found:
        assert each["refined"] == pytest.approx(expected["refined"], abs=1e-5)
    (logits,), several_logits = arrays_of(alone), arrays_of(worlds[num])
    for each in several_logits:
        np.testing.assert_allclose(each["refined"], logits["refined"], atol=1e-4)


def test_columns_apart_need_an_optimizer_that_allows_it(alone, worlds):
    (message,) = (messages["columns"] for messages in messages_of(alone))
    assert message is None  # alone, columns stay together
    for num in (2,):
        for messages in messages_of(worlds[num]):
            assert "column_wise: row-wise Adagrad needs whole rows" in messages["columns"]


def record_of(folder: Path) -> dict:
    return json.loads((folder / "record.json").read_text())


def said(folder: Path, case: str) -> tuple[set[int], list[str]]:
    """Return exit codes of all processes and the lines they said."""
    found = [json.loads(p.read_text())[case] for p in sorted(folder.glob("process-*.json"))]
    return {code for code, _ in found}, [x for _, text in found for x in text.splitlines()]


def model_of(run: Path) -> dict[str, torch.Tensor]:
    return tensors_of(run / "checkpoint")


@several
@pytest.mark.parametrize("case", [*EXACT, "again"])
def test_a_model_merged_by_several_is_that_of_one_bit_for_bit(alone, worlds, case, num):
    assert said(worlds[num] / "merged", case) == ({0}, [])
    one, many = merged(alone / "merged", case), merged(worlds[num] / "merged", case)
    expected, found = model_of(one), model_of(many)
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
@pytest.mark.parametrize("case", SUMS)
def test_sums_over_processes_change_rounding_alone(alone, worlds, case, num):
    assert said(worlds[num] / "merged", case) == ({0}, [])
    one, many = (model_of(merged(w / "merged", case)) for w in (alone, worlds[num]))
    assert set(one) == set(many)
    for name, tensor in one.items():
        torch.testing.assert_close(many[name], tensor, rtol=1e-6, atol=1e-6, msg=name)


@several
@pytest.mark.parametrize("case", STREAMED)
def test_several_stream_the_model_of_one_in_memory(alone, worlds, case, num):
    assert said(worlds[num] / "merged", case) == ({0}, [])
    many = merged(worlds[num] / "merged", case)
    one = merged(alone / "merged", case.removeprefix("streamed "))
    expected, found = model_of(one), model_of(many)
    assert set(found) == set(expected)
    slack = 1e-5 if "aligned" in case else 1e-6
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=slack, atol=slack, msg=name)
    shares = record_of(many)["result"]["shares"]
    for name, each in (record_of(one)["result"]["shares"] or {}).items():
        assert shares[name] == pytest.approx(each, abs=1e-6)
    files = {path.name for path in (many / "checkpoint" / checkpoint.TENSORS).glob("*.distcp")}
    assert files == {f"__{number}_0.distcp" for number in range(num)}
    assert checkpoint.load(many / "checkpoint").schema == merging_cases.SCHEMA
    assert not (many.parent / "partial").exists()


@several
def test_an_aligned_model_is_that_of_one_up_to_rounding(alone, worlds, num):
    assert said(worlds[num] / "merged", "aligned") == ({0}, [])
    one, many = merged(alone / "merged", "aligned"), merged(worlds[num] / "merged", "aligned")
    expected, found = model_of(one), model_of(many)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-5, msg=name)
    plain = model_of(merged(alone / "merged", "evidence"))
    moved = [n for n, tensor in expected.items() if not torch.equal(tensor, plain[n])]
    assert {table_of(name.removeprefix("model.")) for name in moved} >= set(SIZES)
    facts = [record_of(run)["result"]["alignment"] for run in (one, many)]
    assert facts[1]["agreement"] == pytest.approx(facts[0]["agreement"], abs=1e-6)
    assert facts[1]["agreement"] > facts[1]["agreement_before"]


@several
def test_every_process_writes_its_share(worlds, num):
    tensors = merged(worlds[num] / "merged", "evidence") / "checkpoint" / checkpoint.TENSORS
    sizes = [path.stat().st_size for path in tensors.glob("*.distcp")]
    assert len(sizes) == num
    assert max(sizes) < 2 * min(sizes)


@pytest.mark.parametrize("case", [*MISTAKES, *FAILURES])
def test_what_is_wrong_is_said_once_and_leaves_nothing(worlds, case):
    codes, lines = said(worlds[2] / "merged", case)
    assert codes == {2}
    (line,) = lines
    assert (FAILURES[case] if case in FAILURES else MISTAKES[case][0]) in line
    assert not [*(worlds[2] / "merged").glob(f"{case}/merge-*")]


def test_processes_that_failed_together_go_on_together(worlds):
    assert said(worlds[2] / "merged", "after") == ({0}, [])


def rows_of(folder: Path) -> list[dict[str, np.ndarray]]:
    return [dict(np.load(path)) for path in sorted(folder.glob("rows/rows-*.npz"))]


@several
def test_networks_look_up_divided_tables_bit_for_bit(alone, worlds, num):
    """Logits, Fisher information, gates, maps, joined and shuffled tables: on every process."""
    (expected,), found = rows_of(alone), rows_of(worlds[num])
    assert len(found) == num
    for each in found:
        assert set(each) == set(expected)
        for name, array in expected.items():
            if "learned" in name:  # processes score rows in other batches, and choose an epoch
                np.testing.assert_allclose(each[name], array, rtol=0, atol=1e-6, err_msg=name)
            else:
                np.testing.assert_array_equal(each[name], array, err_msg=name)
    for kind in ("logits", "fisher", "learned gate", "learned trunk", "mapped", "joined"):
        assert any(kind in name and array.any() for name, array in expected.items()), kind


@several
@pytest.mark.parametrize("case", row_cases.COMMANDS)
def test_commands_that_read_rows_give_the_results_of_one_process(alone, worlds, case, num):
    assert said(alone / "rows", case) == ({0}, [])
    assert said(worlds[num] / "rows", case) == ({0}, [])
    one, many = (folder / "rows" / case for folder in (alone, worlds[num]))
    records = {path.parent.name: path for path in sorted(one.glob("*/record.json"))}
    assert bool(records) == (case != "found")
    for name, path in records.items():
        expected, found = record_of(path.parent)["result"], record_of(many / name)["result"]
        assert_close(found, expected, name)
        if (path.parent / "checkpoint").exists():
            params = model_of(path.parent)
            for key, tensor in model_of(many / name).items():
                torch.testing.assert_close(tensor, params[key], rtol=1e-5, atol=1e-5, msg=key)


def assert_close(found, expected, place: str) -> None:
    """Check that two values of records are equal, numbers up to rounding."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), place
        for key, value in expected.items():
            assert_close(found[key], value, f"{place}.{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), place
        for number, value in enumerate(expected):
            assert_close(found[number], value, f"{place}[{number}]")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, abs=1e-5), place
    else:
        assert found == expected, place
