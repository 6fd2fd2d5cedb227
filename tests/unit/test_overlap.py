"""Low overlap of joined vocabularies is named, with the form that keeps ids apart."""

import pytest

from cki_rec.checkpoints import Checkpoint
from cki_rec.data.encoding import tokens
from cki_rec.data.schema import Feature, FeatureSchema
from cki_rec.pipelines import vocabularies
from cki_rec.pipelines.overlap import low_overlap

IDS = [str(n) for n in range(100_000, 100_040)]
FORMS = {
    "a trailing .0": [f"{token}.0" for token in IDS],
    "an exponent": [f"{int(token) / 1e5:.5f}E+05" for token in IDS],
    "outer spaces": [f"{token} " for token in IDS],
}


@pytest.mark.parametrize("form", FORMS)
def test_form_that_keeps_equal_ids_apart_is_suspected(form):
    warning = low_overlap("user", [IDS, FORMS[form]], 0)
    assert warning == (
        f"table 'user': the sources share 0 of 40 tokens; ids seem to differ by {form}: encode all"
        " data sets with data.normalize_ids=true"
    )


def test_letters_of_two_unicode_forms_are_suspected():
    composed, split = [[f"caf{e}{n}" for n in range(9)] for e in ("\u00e9", "e\u0301")]
    assert "differ by NFC and NFD letters" in (low_overlap("city", [composed, split], 0) or "")


def test_other_ids_are_not_suspected_and_a_common_share_is_no_warning():
    other = [f"x{token}" for token in IDS]
    assert "are the ids of all sources from one system?" in (
        low_overlap("u", [IDS, other], 0) or ""
    )
    assert low_overlap("u", [IDS, [*IDS[:4], *other]], 4) is None
    assert low_overlap("u", [IDS], 40) is None


def test_joined_vocabularies_log_their_overlap(tmp_path, caplog):
    checkpoints = []
    for name, listed in (("a", IDS), ("b", FORMS["a trailing .0"])):
        tokens.write_tokens(tmp_path / name, "user", listed)
        schema = FeatureSchema(
            features=(Feature("user", "user", "categorical"),),
            table_sizes={"user": 42},
            vocabulary_hashes={"user": tokens.hash_of(listed)},
        )
        checkpoints.append(
            Checkpoint(
                params={}, accumulators={}, counts={}, model=None, schema=schema, origin=None
            )
        )
    joined = vocabularies.joined(checkpoints, [tmp_path / "a", tmp_path / "b"], 2)
    with caplog.at_level("INFO"):
        vocabularies.log_overlap(joined)
    assert "table user: 40 and 40 tokens, 0 shared by all" in caplog.text
    assert "ids seem to differ by a trailing .0" in caplog.text
    assert joined.rows["user"] == {"tokens": 80, "of_each": [40, 40], "of_all": 0}
