"""Rows divided by what they are: models of two regions are measured on the rows of both."""

from __future__ import annotations

import numpy as np
import pytest
from regions import SAID, call, opened, record_of, train_regions

BY_HASH = "data.split.by=hash"


@pytest.fixture(scope="module")
def regions(tmp_path_factory):
    home = tmp_path_factory.mktemp("hash")
    found = train_regions(home, BY_HASH)
    lists = [opened(home / "encoded", name).folder for name in found]
    return home, found, f"data.vocabularies=[{','.join(map(str, lists))}]"


def rows_of(dataset):
    """Return (user, item, time) -> split."""
    columns = [dataset.column(name) for name in ("user", "item")]
    lists = [[None, None, *dataset.vocabulary(name)] for name in ("user", "item")]
    tokens = [[own[i] for i in column] for own, column in zip(lists, columns, strict=True)]
    return dict(zip(zip(*tokens, dataset.timestamp, strict=True), dataset.split, strict=True))


def test_a_row_is_in_the_same_split_in_every_file(regions, tmp_path):
    home, found, union = regions
    assert call(regions, tmp_path, "prepare", union, BY_HASH, region="whole") == 0
    whole = opened(home / "encoded", "both_whole")
    shares = np.bincount(whole.split) / len(whole)
    np.testing.assert_allclose(shares, [0.8, 0.1, 0.1], atol=0.03)
    wanted = rows_of(whole)
    for name in found:
        own = rows_of(opened(home / "encoded", name))
        known = [key for key in own if None not in key]
        assert len(known) > 0.9 * len(own)
        assert all(own[key] == wanted[key] for key in known)


def test_rows_of_both_regions_need_no_word(regions, tmp_path):
    both = [regions[2], BY_HASH, "merge=evidence"]
    for more in ([], ["finetune=one_epoch"]):
        assert (
            call(regions, tmp_path / str(len(more)), "evaluate", *both, *more, region="whole") == 0
        )
        record = record_of(tmp_path / str(len(more)), "evaluate")
        assert "disjoint_files" not in record["config"]["evaluate"]
        assert record["result"]["difference"]["output_ensemble"]["auc"]["estimate"] is not None


@pytest.mark.parametrize("other", ["data.split.seed=1", "data.split.by=random"])
def test_another_division_is_another_matter(regions, tmp_path, capsys, other):
    words = [regions[2], BY_HASH, "merge=evidence", other]
    assert call(regions, tmp_path, "evaluate", *words, region="whole") == 2
    assert SAID in capsys.readouterr().err
    assert call(regions, tmp_path, "evaluate", *words, SAID, region="north") == 2
    assert "split otherwise" in capsys.readouterr().err
