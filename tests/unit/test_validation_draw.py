"""Validation rows are drawn from training rows whatever the size of a block."""

from __future__ import annotations

from functools import partial

import numpy as np

from cki_rec.config.data_options import Split
from cki_rec.data.columns import ColumnFile, blocks
from cki_rec.data.encoding import split as splits


def test_drawn_validation_rows_do_not_depend_on_blocks(tmp_path, monkeypatch):
    split = Split(by="files", fractions=[0.75, 0.25, 0.0], seed=3)
    drawn = []
    for size in (7, 1000):
        monkeypatch.setattr(splits, "blocks", partial(blocks, size=size))
        codes = ColumnFile(tmp_path / str(size), np.uint8)
        codes.append(np.where(np.arange(100) % 5 == 4, 2, 0).astype(np.uint8))
        splits.draw_validation(split, codes)
        drawn.append(codes.read(0, 100))
        codes.delete()
    assert np.bincount(drawn[0]).tolist() == [60, 20, 20]
    np.testing.assert_array_equal(*drawn)
