"""Records become frames and text: every number traced, undefined stays blank."""

import csv
import random

import numpy as np
import pandas as pd
import pytest

from cki_rec.evaluation.display import display_frame, number
from cki_rec.evaluation.markdown import markdown_table
from cki_rec.evaluation.records import current
from cki_rec.evaluation.tables import csv_bytes, recovered_share, runs_frame, summary_frame


def record(method="cki", seed=1, auc=0.75, suite="shards", finetuned=False, **changes):
    """A record whose numbers follow from ``auc``; ``best`` is the direct best source's AUC."""
    best, log_loss = changes.pop("best", 0.7), None if auc is None else 1.25 - auc
    is_old, sources = changes.pop("is_old", False), changes.pop("sources", ["a", "b"])
    differences = None
    if method != "best_source" and auc is not None:
        shift = auc - best
        bounds = {"low": shift - 0.01, "high": shift + 0.01}
        same = {"auc": {"estimate": shift, **bounds}, "log_loss": {"estimate": -shift, **bounds}}
        if not is_old:
            same["auc"]["delong_p"] = 0.04
            same["log_loss_recalibrated"] = {"estimate": -shift / 2, **bounds}
        differences = {"best_source": same, "output_ensemble": None}
    test = {"rows": 100, "positive_rate": 0.5, "auc": auc, "log_loss": log_loss, "gauc": None}
    test |= {"calibration_ratio": 1.02, "calibration_error": 0.01}
    test["domains"] = {"east": {"rows": 60, "auc": auc, "log_loss": 0.5}}
    if not is_old:
        test["log_loss_recalibrated"] = None if auc is None else 1.2 - auc
    name = f"evaluate-{suite}-{method}-{seed}-{int(finetuned)}"
    result = {"suite": suite, "seed": seed, "method": method, "finetuned": finetuned}
    result |= {"inference_cost": 2 if method == "output_ensemble" else 1, "parameters": 1234}
    result |= {"test": test, "valid": test, "difference": differences, "shares": None}
    provenance = {"commit": "c0ffee", "dirty": False, "versions": {}, "hardware": "2 cores"}
    provenance |= {"world_size": 1, "seconds": {"train": random.random()}, "peak_memory_mb": 1}
    provenance |= {"command": "cki-rec evaluate -m experiment=quickstart"}
    rows = {"train": 8000, "valid": 1000, "test": 100}
    data = {"name": "ml", "hash": "abc123", "rows": rows, "synthetic": False}
    evaluate = {"bootstrap": 400, "resample": "user", "confidence": 0.9}
    whole = {"run_id": name, "name": "quickstart", "result": result, "fingerprint": "f" + name}
    settings = {"evaluate": evaluate, "sources": sources}
    if changes.pop("disjoint", suite == "shards"):
        settings["disjoint"] = True
    whole |= {"data": data, "config": settings, "provenance": provenance}
    if not is_old:
        result["recalibration"] = {"scale": 0.9, "shift": 0.01, "reason": None}
    result |= changes
    return whole


def experiment():
    """Two suites, three repetitions; records and replicates of their differences."""
    records = []
    for suite in ("seeds", "shards"):
        for seed, luck in ((1, -0.01), (2, 0.0), (3, 0.01)):
            levels = {"best_source": 0.7, "cki": 0.75, "output_ensemble": 0.76, "joint": 0.8}
            for method, level in levels.items():
                records.append(record(method, seed, level + luck, suite, best=0.7 + luck))
            records.append(record("cki", seed, 0.78 + luck, suite, True, best=0.7 + luck))
    noise = np.random.default_rng(0).normal(scale=0.01, size=400)
    replicates = {}
    for one in records:
        parts = (one["result"]["difference"] or {}).items()
        replicates[one["run_id"]] = {
            baseline: part and {metric: part[metric]["estimate"] + noise for metric in part}
            for baseline, part in parts
        }
    return records, replicates


def replicates_of(shift, noise):
    """Return replicates of ``record``'s differences."""
    signs = {"auc": 1, "log_loss": -1, "log_loss_recalibrated": -0.5}
    return {metric: sign * shift + noise for metric, sign in signs.items()}


def row_of(frame, **values):
    for name, value in values.items():
        frame = frame[frame[name] == value]
    assert len(frame) == 1
    return frame.iloc[0]


def test_runs_are_sorted_whatever_the_order_of_records():
    records, _ = experiment()
    shuffled = random.Random(0).sample(records, len(records))
    tables = [csv_bytes(runs_frame(some, ["joint", "cki"])) for some in (records, shuffled)]
    assert tables[0] == tables[1]
    frame = runs_frame(shuffled, ["joint", "cki"])
    keys = list(zip(frame["method"], frame["finetuned"], frame["seed"], strict=True))
    assert keys[:7] == [
        *(("joint", False, seed) for seed in (1, 2, 3)),
        *(("cki", False, seed) for seed in (1, 2, 3)),
        ("cki", True, 1),
    ]
    assert frame["suite"].is_monotonic_increasing


def test_runs_do_not_depend_on_seconds():
    first, second = (runs_frame([record()]) for _ in "ab")  # seconds are random in each
    pd.testing.assert_frame_equal(first, second)


def test_csv_keeps_every_digit_and_leaves_undefined_blank():
    value = 0.1 + 0.2
    records = [record(auc=value), record(auc=None, seed=2, parameters=None)]
    text = csv_bytes(runs_frame(records)).decode()
    assert str(value) in text
    assert not {"nan", "None", "<NA>"} & set(text.replace("\n", ",").split(","))
    full, blank = csv.DictReader(text.splitlines())
    assert float(full["auc"]) == float(full["auc_domain_east"]) == value
    assert full["parameters"] == "1234"
    for column in ("auc", "parameters", "auc_minus_best_source_low"):
        assert blank[column] == ""


def test_two_records_of_one_cell_are_rejected():
    twin = record() | {"run_id": "evaluate-other"}
    with pytest.raises(ValueError, match="evaluate-other are both suite=shards method=cki"):
        runs_frame([record(), twin])
    with pytest.raises(ValueError, match="no records"):
        runs_frame([])


def test_summary_averages_repetitions_with_intervals():
    records, replicates = experiment()
    records[-4]["result"]["test"] |= {"calibration_ratio": 1.08}  # of shards, direct cki, seed 3
    summary = summary_frame(runs_frame(records), replicates, confidence=0.9)
    row = row_of(summary, suite="shards", method="cki", finetuned=False)
    assert (row["num_seeds"], row["seeds"]) == (3, "1 2 3")
    assert row["auc"] == pytest.approx(0.75)
    assert row["calibration_ratio"] == pytest.approx(1.04)
    # t(2) at 90 % two-sided is 2.91999; the deviation is .01
    assert row["auc_high"] - row["auc"] == pytest.approx(2.919986 * 0.01 / 3**0.5, rel=1e-5)
    assert row["auc_minus_best_source"] == pytest.approx(0.05)
    noise = next(iter(replicates["evaluate-shards-cki-1-0"].values()))["auc"]
    assert row["auc_minus_best_source_low"] == pytest.approx(np.quantile(noise, 0.05))
    assert np.isnan(row["auc_minus_output_ensemble"])


def test_summary_without_all_replicates_has_no_bootstrap_interval():
    records, replicates = experiment()
    del replicates["evaluate-seeds-cki-2-0"]
    summary = summary_frame(runs_frame(records), replicates)
    row = row_of(summary, suite="seeds", method="cki", finetuned=False)
    assert row["auc_minus_best_source"] == pytest.approx(0.05)
    assert np.isnan(row["auc_minus_best_source_low"])


def test_summary_of_an_undefined_repetition_is_undefined():
    runs = runs_frame([record(seed=1), record(seed=2, auc=None)])
    row = summary_frame(runs, {}).iloc[0]
    assert np.isnan(row["auc"])
    assert np.isnan(row["auc_minus_best_source"])
    assert row["calibration_ratio"] == pytest.approx(1.02)


def test_summary_of_mixed_data_is_rejected():
    other = record(seed=2)
    other["data"] = other["data"] | {"hash": "zzz"}
    with pytest.raises(ValueError, match=r"shards mixes data sets: \['abc123', 'zzz'\]"):
        summary_frame(runs_frame([record(), other]), {})


@pytest.mark.parametrize("is_disjoint", [True, False])
def test_recovered_share_is_of_disjoint_sources_whatever_the_suite_is_called(is_disjoint):
    levels = {"best_source": 0.7, "joint": 0.8, "cki": 0.75}
    records = [
        record(method, 1, auc, suite, disjoint=is_disjoint)
        for suite in ("shards", "my_regions")
        for method, auc in levels.items()
    ]
    share = summary_frame(runs_frame(records), {})["recovered_share"].dropna()
    assert list(share) == pytest.approx([0.5, 0.5] if is_disjoint else [])


def test_recovered_share_is_for_shards_only_and_against_direct_references():
    records, replicates = experiment()
    summary = summary_frame(runs_frame(records), replicates)
    shards = summary[summary["suite"] == "shards"].set_index(["method", "finetuned"])
    share = shards["recovered_share"]
    assert share["cki", False] == pytest.approx(0.5)
    assert share["cki", True] == pytest.approx(0.8)
    assert share[["joint", "best_source"]].isna().all()
    assert summary[summary["suite"] == "seeds"]["recovered_share"].isna().all()
    assert recovered_share(0.75, 0.8, 0.8) is None


def test_recovered_share_uses_seeds_that_all_three_have():
    records = [record("best_source", 1, 0.7), record("joint", 1, 0.8), record("cki", 1, 0.75)]
    records += [record("cki", 2, 0.9)]
    share = summary_frame(runs_frame(records), {})["recovered_share"].dropna()
    assert list(share) == pytest.approx([0.5])


@pytest.mark.parametrize(
    ("value", "options", "text"),
    [
        (0.79954, {}, ".7995"),
        (0.0056, {"sign": True}, "+.0056"),
        (-0.0056, {"sign": True}, "-.0056"),
        (-0.0, {"sign": True}, "+.0000"),
        (1.25, {"digits": 3}, "1.250"),
        (10.0, {"digits": 1}, "10.0"),
        (2, {"digits": 0}, "2"),
        (None, {}, ""),
        (float("nan"), {}, ""),
        (pd.NA, {}, ""),
    ],
)
def test_numbers_are_compact(value, options, text):
    assert number(value, **options) == text


def test_display_marks_differences_that_exclude_zero():
    runs = runs_frame([record(auc=0.75), record("worse", auc=0.6), record("same", auc=0.705)])
    noise = np.linspace(-0.01, 0.01, 401)
    replicates = {
        run: {"best_source": replicates_of(shift, noise)}
        for run, shift in zip(runs["run_id"], runs["auc_minus_best_source"], strict=True)
    }
    shown = display_frame(summary_frame(runs, replicates)).set_index("method")
    auc, loss = shown["AUC vs best source"], shown["LogLoss vs best source"]
    assert auc["cki"] == "+.0500 [+.0405, +.0595] (++)"
    assert loss["cki"] == "-.0500 [-.0595, -.0405] (++)"
    assert auc["worse"].endswith(" (--)")
    assert loss["worse"].endswith(" (--)")
    assert auc["same"] == "+.0050 [-.0045, +.0145]"
    assert "gAUC" not in shown.columns  # undefined everywhere
    assert "AUC vs output ensemble" not in shown.columns


def test_double_marks_need_significance_after_holm():
    """Ten methods at z = 2.4, p = .016: each alone is significant, ten looks together are not."""
    methods = [f"m{number}" for number in range(10)]
    runs = runs_frame([record(method, auc=0.724) for method in methods])
    noise = np.random.default_rng(0).normal(size=4000)
    noise = 0.01 * (noise - noise.mean()) / noise.std(ddof=1)
    many = {run: {"best_source": replicates_of(0.024, noise)} for run in runs["run_id"]}
    summary = summary_frame(runs, many)
    assert summary["auc_minus_best_source_p"].to_numpy() == pytest.approx(0.0164, abs=1e-4)
    assert summary["auc_minus_best_source_holm"].to_numpy() == pytest.approx(0.164, abs=1e-3)
    marks = display_frame(summary)["AUC vs best source"].str.split().str[-1]
    assert set(marks) == {"(+)"}
    one = summary_frame(runs[:1], many)
    assert display_frame(one)["AUC vs best source"][0].endswith(" (++)")


def test_holm_is_over_single_models_of_a_suite():
    records, replicates = experiment()
    summary = summary_frame(runs_frame(records), replicates)
    column = "log_loss_recalibrated_minus_best_source"
    for _, part in summary.groupby("suite"):
        family = part[(part["inference_cost"] == 1) & part[f"{column}_p"].notna()]
        assert set(family["method"]) == {"cki", "joint"}
        assert len(family) == 3  # cki direct and fine-tuned
        smallest = family[f"{column}_p"].min()
        assert family[f"{column}_holm"].min() == pytest.approx(3 * smallest)
        assert part.set_index("method")[f"{column}_holm"][["output_ensemble"]].isna().all()


def test_wins_are_counted_over_repetitions():
    records = [record("cki", seed, 0.7 + shift) for seed, shift in enumerate((0.02, 0.0, -0.05))]
    records += [record("once"), record("lost", 1, 0.8), record("lost", 2, None)]
    shown = display_frame(summary_frame(runs_frame(records), {})).set_index("method")
    wins = shown["W/T/L vs best source"]
    assert dict(wins) == {"cki": "1/1/1", "once": "", "lost": ""}


def test_recalibrated_log_loss_is_shown_with_its_difference():
    records, replicates = experiment()
    runs = runs_frame(records)
    shown = display_frame(summary_frame(runs, replicates))
    assert list(shown["LogLoss recal."][:2]) == [".5000", ".4500"]
    assert shown["LogLoss recal. vs best source"][1].startswith("-.0250 [")
    first = next(csv.DictReader(csv_bytes(runs).decode().splitlines()))
    assert (first["recalibration_scale"], first["recalibration_shift"]) == ("0.9", "0.01")
    assert set(runs["auc_minus_best_source_delong_p"].dropna()) == {0.04}


def test_records_without_the_newer_keys_are_blank_there():
    runs = runs_frame([record(seed=1, is_old=True), record(seed=2, is_old=True)])
    noise = np.linspace(-0.01, 0.01, 401)
    part = {metric: replicates_of(0.05, noise)[metric] for metric in ("auc", "log_loss")}
    summary = summary_frame(runs, {run: {"best_source": part} for run in runs["run_id"]})
    shown = display_frame(summary)
    assert shown["AUC vs best source"][0].endswith(" (++)")
    assert not [column for column in shown if "recal." in column]
    text = markdown_table(summary, runs)
    assert "DeLong" not in text
    assert "recal." not in text
    mixed = runs_frame([record(seed=1, is_old=True), record(seed=2)])
    row = summary_frame(mixed, {}).iloc[0]
    assert np.isnan(row["log_loss_recalibrated"])
    assert np.isnan(row["log_loss_recalibrated_minus_best_source"])


def test_one_source_has_no_ensemble_to_be_compared_with():
    zero = {m: {"estimate": 0.0, "low": 0.0, "high": 0.0} for m in ("auc", "log_loss")}
    both = {"best_source": None, "output_ensemble": zero}
    for sources, is_shown in ((["a"], False), (["a", "a"], False), (["a", "b"], True)):
        one = record("best_source", suite="single", sources=sources, difference=both)
        shown = display_frame(summary_frame(runs_frame([one]), {}))
        assert ("AUC vs output ensemble" in shown) == is_shown


def test_markdown_describes_the_numbers():
    records, replicates = experiment()
    runs = runs_frame(records)
    text = markdown_table(summary_frame(runs, replicates, 0.9), runs, "Quick", {"seeds": "Luck."})
    assert text.startswith("# Quick\n")
    for part in (
        *("## seeds\n\nLuck.", "## shards", "- Seeds: 1, 2, 3", "abc123", "ml (real data)"),
        *("8,000 train, 1,000 valid, 100 test", "2 cores", "cki-rec evaluate -m experiment=quick"),
        *("90 % percentile bootstrap", "400 resamples of users", "90 % Student t", "blank cell"),
        *("Holm's correction at 10 %", "W/T/L: ", "rows as independent", "LogLoss recal.: "),
        *("without fine-tuning", "| cki + fine-tuned | 3 | 1 | .7800 [", "recovered"),
        *("<details><summary>How to read", "</details>"),
    ):
        assert part in text
    assert "nan" not in text.lower()
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert len(tables) == 2 * 2 * (2 + 5)
    assert [line.count("|") for line in tables[:7]] == [7] * 7  # no ensemble to compare with
    first, fold = text.index("**seeds**\n\n- cki beats"), text.index("<details>")
    assert (
        first < text.index("## seeds") < text.index(tables[0]) < fold < text.index("Holm's corr")
    )
    aucs = [line.split("|")[4].split()[0] for line in tables[2:7]]
    assert aucs == sorted(aucs, reverse=True)


def test_markdown_names_the_assumption_that_nothing_checks():
    plain, assumed = record(), record()
    assumed["config"]["evaluate"]["disjoint_files"] = True
    shown = []
    for one in (plain, assumed):
        runs = runs_frame([one])
        shown.append("Assumed, not checked" in markdown_table(summary_frame(runs, {}), runs))
    assert shown == [False, True]


def test_markdown_marks_synthetic_data():
    one = record()
    one["data"]["synthetic"] = True
    runs = runs_frame([one])
    assert "ml (synthetic data)" in markdown_table(summary_frame(runs, {}), runs)


def test_records_of_version_0_1_0_are_read_under_the_names_of_today():
    """Before version 0.2.0, sources were parents and some methods had other labels."""
    labels = {
        "best_parent": "best_source",
        "newest_parent": "newest_source",
        "aligned_evidence": "auto",
        "control_permuted": "ablation_permuted",
        "cki": "cki",
    }
    old, new = [], []
    for before, after in labels.items():
        new.append(record(after))
        one = record(after)
        one["result"]["method"] = before
        one["config"]["parents"] = one["config"].pop("sources")
        difference = one["result"]["difference"]
        if difference:
            one["result"]["difference"] = {"best_parent": difference["best_source"]}
        old.append(one)
    pd.testing.assert_frame_equal(
        runs_frame([current(one) for one in old]), runs_frame(new), check_exact=True
    )
    assert [current(one) for one in new] == new
