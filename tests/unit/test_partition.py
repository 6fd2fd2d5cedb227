"""Parts of the data are equal in size, disjoint and determined by the seed."""

import numpy as np
import pytest

from cki_rec.config import PARTITIONS, Partition, UserError
from cki_rec.data.encoding.partition import part_of_rows

GENERATOR = np.random.default_rng(0)
GROUP = GENERATOR.permutation(np.repeat(np.arange(11), 10)).astype(np.int32)
ITEM = GENERATOR.permutation(np.arange(110) % 23).astype(np.int32)
TIME = GENERATOR.integers(0, 50, 110)


def parts_of(by: str, parts: int, seed: int = 0) -> np.ndarray:
    partition = Partition(by=by, parts=parts, seed=seed)
    return np.concatenate(
        list(part_of_rows(partition, 110, group=GROUP, item_index=ITEM, timestamp=TIME))
    )


@pytest.mark.parametrize("by", PARTITIONS[:-1])
@pytest.mark.parametrize("parts", [1, 2, 3, 10])
def test_every_part_is_there_and_repeats(by, parts):
    part = parts_of(by, parts)
    assert part.shape == (110,)
    assert set(part.tolist()) == (set(range(parts)) if by != "none" else {0})
    assert np.array_equal(part, parts_of(by, parts))


@pytest.mark.parametrize(("by", "entities"), [("user", GROUP), ("item", ITEM)])
@pytest.mark.parametrize("parts", [2, 3, 5])
def test_entities_stay_whole_in_groups_of_equal_size(by, entities, parts):
    part = parts_of(by, parts)
    part_of = {}
    for entity, number in zip(entities.tolist(), part.tolist(), strict=True):
        assert part_of.setdefault(entity, number) == number
    sizes = np.bincount(list(part_of.values()), minlength=parts)
    assert sizes.max() - sizes.min() <= 1


@pytest.mark.parametrize("parts", [2, 4, 7])
def test_time_windows_are_consecutive_and_equal(parts):
    part = parts_of("time", parts)
    order = np.lexsort((np.arange(110), TIME))
    assert (np.diff(part[order]) >= 0).all()
    sizes = np.bincount(part)
    assert sizes.max() - sizes.min() <= 1


@pytest.mark.parametrize("by", ["user", "item", "random"])
def test_seed_changes_the_parts(by):
    assert (parts_of(by, 3, seed=0) != parts_of(by, 3, seed=1)).any()


@pytest.mark.parametrize("by", ["time", "none"])
def test_seed_does_not_matter(by):
    assert (parts_of(by, 3, seed=0) == parts_of(by, 3, seed=1)).all()


@pytest.mark.parametrize(
    ("by", "parts", "message"),
    [
        ("user", 12, "data.partition.parts=12: more parts than users (11)"),
        ("item", 24, "data.partition.parts=24: more parts than items (23)"),
        ("time", 111, "data.partition.parts=111: more parts than rows (110)"),
        ("random", 111, "data.partition.parts=111: more parts than rows (110)"),
    ],
)
def test_impossible_partition_is_named(by, parts, message):
    with pytest.raises(UserError) as caught:
        parts_of(by, parts)
    assert str(caught.value).startswith(message)
