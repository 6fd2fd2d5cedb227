"""Sets for evaluation alone, and warnings of a training about its fields."""

import logging
from dataclasses import replace

import pytest
from samples import make_data, one_line_error

from cki_rec.config import Data, Split
from cki_rec.data.encoding.store import prepare
from cki_rec.data.encoding.summary import summary_lines
from cki_rec.pipelines import field_notes, train


@pytest.fixture
def csv(tmp_path):
    """Function (fractions, **options) -> options of a csv of 60 rows."""
    path = tmp_path / "rows.csv"
    rows = [f"{n % 2},u{n % 5},i{n % 7},{n},{1_600_000_000 + n}\n" for n in range(60)]
    path.write_text("label,user,item,price,at\n" + "".join(rows))

    def make(fractions: list, **changes) -> Data:
        split = Split(by="random", fractions=fractions, seed=0)
        options = {"raw": str(path), "split": split, "fields": ["user", "item"]}
        return make_data("csv", **(options | changes))

    return make


@pytest.mark.parametrize(
    ("fractions", "rows"), [([0, 0.1, 0.9], [0, 6, 54]), ([0, 0, 1], [0, 0, 60])]
)
def test_all_rows_of_a_new_file_may_be_test_rows(tmp_path, csv, run_config, fractions, rows):
    first = prepare(csv([0.8, 0.1, 0.1]), tmp_path / "encoded")
    data = csv(fractions, vocabularies=[str(first.folder)])
    dataset = prepare(data, tmp_path / "encoded")
    splits = dataset.manifest["splits"]
    assert [split["rows"] for split in splits.values()] == rows
    assert splits["train"]["positive_rate"] is None
    assert dataset.schema.vocabulary_hashes == first.schema.vocabulary_hashes
    assert summary_lines(dataset)
    message = one_line_error(prepare, csv(fractions), tmp_path / "encoded")
    assert "no train row of 60" in message
    assert "name the token lists of the models in data.vocabularies" in message


def test_set_without_training_rows_trains_no_model(tmp_path, csv, run_config):
    first = prepare(csv([0.8, 0.1, 0.1]), tmp_path / "encoded")
    words = [
        *("data=csv", f"data.raw={csv([1, 0, 0]).raw}", "data.fields=[user,item]"),
        *("data.split.fractions=[0,0.1,0.9]", f"data.vocabularies=[{first.folder}]"),
    ]
    config = run_config(tmp_path, *words)
    assert "no training row, so it serves evaluation only" in one_line_error(train.ensure, config)


def test_training_warns_of_unread_histories_and_of_scales_that_forbid_merges(
    tmp_path, csv, run_config
):
    numbers = {"name": "price", "kind": "numeric", "transform": "log1p"}
    data = csv([0.8, 0.1, 0.1], user="user", item="item", time="at",
               fields=["user", "item", "history", numbers])  # fmt: skip
    dataset = prepare(data, tmp_path / "encoded")
    config = replace(run_config(tmp_path), data=data)
    history, scale = field_notes.notes(config, dataset)
    assert history.startswith("field history: not read, because model.histories=false; set it to")
    assert scale.startswith("field price (log1p): scaled by the numbers of this data set")
    assert scale.endswith("use the transform ln_squared, edges or token")
    used = replace(run_config(tmp_path, "model.histories=true"), data=data)
    assert field_notes.notes(used, dataset) == [scale]
    assert logging.getLogger("torch.fx._symbolic_trace").level == logging.ERROR
