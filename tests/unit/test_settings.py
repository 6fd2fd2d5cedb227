"""Runs of one report name: options that differ are named, methods, suites and seeds may differ."""

import copy

import pytest
from test_tables import experiment, record

from cki_rec.evaluation.settings import check_settings, common, flat

SETTINGS = {
    "sources": {"train.epochs": 2, "model.hidden": [16, 8], "model.embedding_dim": 8},
    "method": {"merge.options.density": 0.2, "merge.refinement.steps": 400},
}


def with_settings(one, *changes):
    """Return a record with the settings above and changes ``(section, option, value)``."""
    one = copy.deepcopy(one)
    one["config"]["settings"] = copy.deepcopy(SETTINGS)
    one["config"]["partition"] = {"by": "user", "parts": 2, "seed": one["result"]["seed"]}
    for part, option, value in changes:
        one["config"]["settings"].setdefault(part, {})[option] = value
    return one


@pytest.mark.parametrize(
    ("option", "value"),
    [("train.epochs", 0), ("model.hidden", [16]), ("model.embedding_dim", [8, 16])],
)
@pytest.mark.parametrize(("method", "seed"), [("cki", 2), ("slerp", 1)])
def test_another_training_or_network_is_named(option, value, method, seed):
    """An untrained average with seed 2 beside a trained one, or another network per method."""
    one = with_settings(record("cki", seed=1))
    other = with_settings(record(method, seed=seed), ("sources", option, value))
    before = SETTINGS["sources"][option]
    with pytest.raises(ValueError, match="suite shards: ") as caught:
        check_settings([one, other])
    line = f"{option} is {before} in cki, seed 1 and {value} in {method}, seed {seed}"
    assert line in str(caught.value)


def test_methods_suites_and_seeds_may_differ():
    plain, _ = experiment()
    records = [with_settings(one) for one in plain]
    check_settings(records)
    check_settings(plain)  # of earlier releases: nothing is known
    other = ("method", "merge.options.density", 0.5)
    check_settings([*records, with_settings(record("another", seed=1), other)])
    change = ("sources", "train.epochs", 9)
    check_settings([*records, with_settings(record("cki", suite="third"), change)])


def test_options_of_a_method_may_not_differ_over_its_seeds():
    other = ("method", "merge.options.density", 0.5)
    records = [with_settings(record(seed=1)), with_settings(record(seed=2), other)]
    with pytest.raises(ValueError, match=r"merge.options.density is 0.2 in cki, seed 1 and 0.5"):
        check_settings(records)


def test_other_sources_and_other_partitions_are_named():
    records = [with_settings(record("cki")), with_settings(record("slerp", sources=["a", "c"]))]
    with pytest.raises(ValueError, match=r"suite.sources is \['a', 'b'\] in cki, seed 1 and"):
        check_settings(records)
    records = [with_settings(record("cki")), with_settings(record("slerp"))]
    records[1]["config"]["partition"]["by"] = "item"
    with pytest.raises(ValueError, match=r"data.partition.by is user in cki, seed 1 and item in"):
        check_settings(records)


def test_schedules_of_fine_tuning_are_compared_among_fine_tuned_runs():
    def tuned(method, epochs):
        return with_settings(
            record(method, finetuned=epochs > 0), ("finetune", "finetune.epochs", epochs)
        )

    check_settings([with_settings(record("cki")), tuned("cki", 1), tuned("slerp", 1)])
    with pytest.raises(ValueError, match=r"finetune.epochs is 1 in cki, fine-tuned, seed 1 and 2"):
        check_settings([tuned("cki", 1), tuned("slerp", 2)])


def test_sections_become_dotted_names_and_equal_values_one():
    assert flat({"a": {"b": {"c": 1}}, "d": []}, "x.") == {"x.a.b.c": 1, "x.d": []}
    assert common([{"a": 1, "b": 2, "c": 3}, {"a": 1, "b": 3}]) == {"a": 1, "b": [2, 3]}
