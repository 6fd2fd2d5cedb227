"""Compositions of tests are those of Hydra: ``composition`` keeps parts of them."""

import pytest
from composition import LIST, LOAD, MERGE, hydra_with
from omegaconf import OmegaConf

from cki_rec.cli import compose_config

WORDS = [
    ["model=dcnv2", "merge=ties", "seed=3", "train.start={seed: 2}"],
    ["seed=4", "merge=ties", "model=dcnv2", "merge.options.scale=0.5"],
    ["model=dcnv2", "merge=ties"],
    ["experiment=quickstart", "data=frappe_x1", "data.min_count=3"],
    ["data=frappe_x1", "~data.fields", "+data.fields=[a]"],
]


@pytest.mark.parametrize("words", WORDS)
def test_what_is_kept_changes_nothing(words):
    for _ in range(2):
        kept = compose_config(words)
        kept.train.epochs = 77  # is nobody else's
    with hydra_with(LOAD, LIST, MERGE):
        fresh = compose_config(words)
    fresh.train.epochs = 77
    assert OmegaConf.to_yaml(kept) == OmegaConf.to_yaml(fresh)
    assert OmegaConf.is_struct(kept) == OmegaConf.is_struct(fresh)


def test_files_of_a_test_may_change(tmp_path):
    (tmp_path / "merge").mkdir()
    words = ["merge=mine", f"hydra.searchpath=[file://{tmp_path}]"]
    for label in ("one", "two"):
        text = f"defaults: [default, _self_]\nlabel: {label}\n"
        (tmp_path / "merge" / "mine.yaml").write_text(text)
        assert compose_config(words).merge.label == label
