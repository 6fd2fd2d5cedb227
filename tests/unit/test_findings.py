"""Facts of a data set that make models worse are named once: numbers, constants, unseen ids."""

import logging

import numpy as np
import pytest
from samples import make_data

from cki_rec.config import Data, Split
from cki_rec.data.encoding.store import prepare
from cki_rec.data.encoding.summary import summary_lines
from cki_rec.engine.trainer import remedy

SPLIT = Split(by="random", fractions=[0.8, 0.1, 0.1], seed=0)


@pytest.fixture
def csv(tmp_path):
    """Function (values of a column x, transform, **options) -> options of a csv of these rows."""

    def make(values: list, transform: str | None, **changes) -> Data:
        path = tmp_path / "rows.csv"
        rows = [f"{n % 2},u{n % 5},{value}\n" for n, value in enumerate(values)]
        path.write_text("label,user,x\n" + "".join(rows))
        numeric = {"name": "x", "kind": "numeric", "transform": transform}
        fields = ["user", numeric if transform else "x"]
        return make_data("csv", **({"raw": str(path), "split": SPLIT, "fields": fields} | changes))

    return make


def warnings_of(caplog) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


@pytest.mark.parametrize("first", [1_700_000_000, 16_777_216])
def test_large_numbers_keep_their_differences(tmp_path, csv, first):
    values = [first + k for k in range(300)]
    dataset = prepare(csv(values, "log1p"), tmp_path / "encoded")
    result = dataset.column("x")
    raw = np.log1p(np.array(values, dtype=np.float64))
    train = raw[np.array(dataset.split) == 0]
    want = (raw - train.mean()) / train.std()
    assert result.dtype == np.float32
    assert len(np.unique(result)) == 300
    assert result == pytest.approx(want, abs=1e-5)
    assert [result.min(), result.max()] == pytest.approx([want.min(), want.max()], abs=1e-5)
    assert -1.8 < result.min() < -1.6 < 1.6 < result.max() < 1.8


@pytest.mark.parametrize("largest", [1_700_000_299, 3e38])
def test_large_numbers_as_they_are_name_field_and_range(tmp_path, csv, caplog, largest):
    data = csv([*range(40), largest], "as_is")
    dataset = prepare(data, tmp_path / "encoded")
    (warning,) = warnings_of(caplog)
    assert f"field 'x' has numbers from 0 to {largest:.10g}, which enter the network" in warning
    assert "set transform: log1p" in warning
    assert f"field 'x' has numbers from 0 to {largest:.10g}: scale them" in remedy(dataset)
    prepare(data, tmp_path / "encoded")
    assert len(warnings_of(caplog)) == 1


@pytest.mark.parametrize("value", [5, ""])
@pytest.mark.parametrize("transform", ["log1p", "as_is", "ln_squared", "quantile", "token"])
def test_constant_or_empty_numbers_are_warned_of_once(tmp_path, csv, caplog, transform, value):
    prepare(csv([value] * 40, transform), tmp_path / "encoded")
    (warning,) = warnings_of(caplog)
    assert "field 'x': all training rows have one value or none" in warning


def test_usual_numbers_and_ids_are_not_warned_of(tmp_path, csv, caplog):
    for transform in ("log1p", "as_is", "ln_squared", "quantile", None):
        prepare(csv([n % 7 for n in range(400)], transform), tmp_path / "encoded")
    assert warnings_of(caplog) == []


def test_unseen_ids_of_training_and_test_rows_are_printed_and_warned_of(tmp_path, csv, caplog):
    data = csv([f"x{n}" for n in range(100)], None, min_count=2)
    with caplog.at_level(logging.INFO):
        dataset = prepare(data, tmp_path / "encoded")
    line = "ids out of vocabulary (train / valid / test): x 100.0% / 100.0% / 100.0%"
    assert line in caplog.text
    (warning,) = warnings_of(caplog)
    assert line in warning
    assert "user" not in warning
    assert "lower data.min_count" in warning
    assert any("100.00%  100.00%  100.00%" in line for line in summary_lines(dataset))


def test_vocabularies_of_another_set_are_warned_of(tmp_path, csv, caplog):
    """As in a daily chain with a frozen vocabulary."""
    first = prepare(csv([f"a{n % 4}" for n in range(100)], None), tmp_path / "encoded")
    assert warnings_of(caplog) == []
    days = [f"a{n % 4}" if n % 5 else f"new{n}" for n in range(100)]
    prepare(csv(days, None, vocabularies=[str(first.folder)]), tmp_path / "encoded")
    (warning,) = warnings_of(caplog)
    assert "ids out of vocabulary (train / valid / test): x 18.8% / 30.0% / 20.0%; " in warning
    assert "add newer token lists to data.vocabularies" in warning
