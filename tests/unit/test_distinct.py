"""Distinct codes of a chunk, in a table of all codes or by sorting those that are there."""

from __future__ import annotations

import numpy as np
import pytest

from cki_rec.data.encoding.staging import distinct


@pytest.mark.parametrize("largest", [3, 40, 2_000_000])
@pytest.mark.parametrize("sizes", [(50,), (50, 0, 7)])
def test_places_lead_back_to_the_codes(largest, sizes):
    rng = np.random.default_rng(largest)
    arrays = [rng.integers(0, largest, size, dtype=np.int32) for size in sizes]
    arrays[0][0] = largest
    found, places = distinct(arrays)
    np.testing.assert_array_equal(found, np.unique(np.concatenate(arrays)))
    assert found.dtype == np.int32
    for array, place in zip(arrays, places, strict=True):
        np.testing.assert_array_equal(found[place], array)


def test_no_codes():
    found, places = distinct([np.zeros(0, dtype=np.int32)])
    assert len(found) == len(places[0]) == 0
