"""The sentences that open a report: which model they are about, and words by significance."""

import numpy as np
import pytest
from test_tables import experiment, record, replicates_of

from cki_rec.evaluation.display import display_frame
from cki_rec.evaluation.tables import runs_frame, summary_frame
from cki_rec.evaluation.verdict import verdicts

NOISE = np.linspace(-0.01, 0.01, 401)


def sentences(*records, replicates=None):
    runs = runs_frame(records)
    (shown,) = verdicts(summary_frame(runs, replicates or {}), runs).values()
    return shown


def compared(shift, noise=NOISE):
    """Return the first sentence on one model, by its difference to the best source."""
    one = record("cki", auc=0.7 + shift)
    replicates = {one["run_id"]: {"best_source": replicates_of(shift, noise)}}
    return sentences(record("best_source", auc=0.7), one, replicates=replicates)[0]


@pytest.mark.parametrize(
    ("shift", "words"),
    [
        (0.05, "cki beats the best source: +.0500 [+.0405, +.0595] in AUC, over one seed."),
        (-0.05, "cki is below the best source: -.0500 [-.0595, -.0405] in AUC, over one seed."),
        (0.001, "cki does not differ significantly from the best source: +.0010 [-.0085, +.0105]"),
    ],
)
def test_words_depend_on_the_interval(shift, words):
    assert compared(shift).startswith(words)


def test_an_interval_that_holm_does_not_confirm_is_no_win():
    """Ten models at p = .016 each: the interval excludes 0, Holm's correction does not."""
    noise = np.random.default_rng(0).normal(size=4000)
    noise = 0.01 * (noise - noise.mean()) / noise.std(ddof=1)
    records = [record(f"m{number}", auc=0.724) for number in range(10)]
    replicates = {r["run_id"]: {"best_source": replicates_of(0.024, noise)} for r in records}
    (first,) = sentences(*records, replicates=replicates)
    assert "is above the best source, but not after Holm's correction: +.0240 [" in first


def test_the_model_is_chosen_on_validation_rows():
    """Test AUC prefers "lucky", validation AUC prefers "sound"."""
    lucky, sound = record("lucky", auc=0.9), record("sound", auc=0.8)
    lucky["result"]["valid"] = {**lucky["result"]["test"], "auc": 0.7}
    assert sentences(lucky, sound)[0].startswith(
        "sound, the merged model with the best validation AUC,"
    )


def test_references_and_fine_tuned_models_are_not_the_merged_model():
    records = [record(name, auc=0.9) for name in ("joint", "output_ensemble", "newest_source")]
    records += [record("cki", auc=0.7), record("cki", auc=0.95, finetuned=True)]
    assert sentences(*records)[0].startswith("cki differs from the best source")


def test_sentences_without_their_reference_are_left_out():
    alone = record("cki", difference=None)
    assert sentences(alone) == ["cki has AUC .7500, over one seed."]
    assert sentences(record("best_source", auc=0.7)) == [
        "No merged model was evaluated.",
        "The best source has AUC .7000.",
    ]
    undefined = sentences(record("cki", auc=None))
    assert undefined == ["cki has no defined AUC, over one seed."]
    unknown = [record("a"), record("b")]
    for one in unknown:
        one["result"].pop("valid")
    assert sentences(*unknown)[0].startswith("2 merged models; none has a validation AUC")


def test_the_ensemble_and_the_recovered_share_have_intervals():
    records, replicates = experiment()
    for one in records:
        if one["result"]["method"] == "cki":
            shift = one["result"]["test"]["auc"] - 0.76
            bounds = {"estimate": shift, "low": shift - 0.01, "high": shift + 0.01}
            one["result"]["difference"]["output_ensemble"] = {"auc": bounds}
            replicates[one["run_id"]]["output_ensemble"] = {"auc": shift + 2 * NOISE[:400]}
    runs = runs_frame(records)
    summary = summary_frame(runs, replicates)
    shown = verdicts(summary, runs)
    assert list(shown) == ["seeds", "shards"]
    assert shown["seeds"][0].startswith("cki beats the best source: +.0500 [")
    assert shown["seeds"][1].startswith(
        "It does not differ significantly from the output ensemble, which runs 2 models per "
        "prediction: -.0100 ["
    )
    assert len(shown["seeds"]) == 2  # its sources saw the same rows
    assert shown["shards"][2].startswith("It recovers 50 % [")
    row = summary[(summary["suite"] == "shards") & (summary["method"] == "cki")].iloc[0]
    noise = next(iter(replicates["evaluate-shards-cki-1-0"].values()))["auc"] - 0.05
    wanted = np.quantile((0.05 + noise) / (0.1 + noise), [0.025, 0.975])
    assert row[["recovered_share_low", "recovered_share_high"]].to_list() == pytest.approx(wanted)
    assert display_frame(summary)["recovered"].str.startswith(".50 [.").any()


def test_the_share_of_a_joint_model_that_may_be_worse_has_no_interval():
    """In some resamples joint is below the best source: the ratio has no bounds there."""
    records = [
        record("best_source", auc=0.7),
        record("joint", auc=0.705),
        record("cki", auc=0.7025),
    ]
    replicates = {
        r["run_id"]: {"best_source": replicates_of(r["result"]["test"]["auc"] - 0.7, NOISE)}
        for r in records[1:]
    }
    row = summary_frame(runs_frame(records), replicates).set_index("method").loc["cki"]
    assert row["recovered_share"] == pytest.approx(0.5)
    assert np.isnan(row["recovered_share_low"])
    (only,) = sentences(*records, replicates=replicates)  # the gain of joint training may be 0
    assert "does not differ significantly from the best source" in only
