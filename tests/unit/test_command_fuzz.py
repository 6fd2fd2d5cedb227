"""Any command line: a configuration, or exit code 2 and one line; never a traceback."""

import contextlib
import io
from dataclasses import fields, is_dataclass
from typing import get_type_hints
from unittest.mock import patch

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from cki_rec import cli
from cki_rec.config import Config

PROFILE = dict(deadline=None, suppress_health_check=list(HealthCheck))
KEYS = (
    *("seed", "name", "data", "model", "merge", "experiment", "suite", "train", "hydra"),
    *("data.raw", "data.fields", "data.part", "data.split.by", "model.hidden", "model.dropout"),
    *("train.epochs", "train.start", "merge.sources", "merge.base", "merge.options"),
    *("merge.options.density", "merge.method", "merge.recipes", "merge.vocabularies"),
    *("runtime.out", "evaluate.confidence", "hydra.searchpath", "hydra/launcher", "run"),
)
ODD = st.text(st.sampled_from("ab1.,:=[]{}()'\"\\$#~%&*!?|/@ \t\r\né日-+"), max_size=12)
VALUES = st.one_of(
    ODD,
    st.sampled_from(
        ["", "null", "true", "1", "-1", "1e400", "nan", "a,b", "[1,2]", "{a: 1}", "???"]
    ),
    st.sampled_from(
        ["[{seed: 1}]", "[{path: a}]", "[a,b]", "${seed}", "${x}", "range(1,3)", "ties"]
    ),
    st.integers().map(str),
    st.floats().map(str),
)
WORDS = st.one_of(
    ODD,
    st.builds(
        "{}{}={}".format,
        st.sampled_from(["", "", "", "+", "++", "~"]),
        st.one_of(st.sampled_from(KEYS), ODD),
        VALUES,
    ),
)
LINES = st.lists(WORDS, min_size=1, max_size=3)


NUMBERS = (
    *("seed", "train.epochs", "train.batch_size", "train.learning_rate", "model.embedding_dim"),
    *("model.dropout", "evaluate.bootstrap", "runtime.threads", "merge.sample", "data.part"),
)
NOT_NUMBERS = st.one_of(
    st.sampled_from(["", "x", "[1]", "{a: 1}", "1x", "'1 2'", "--", "nan", "-5", "'é'"]),
    st.text("abcé", min_size=1, max_size=6),
)


def options(kind=Config, prefix="") -> list[str]:
    """Return every option, by dotted path."""
    found = []
    for field in fields(kind):
        part = get_type_hints(kind)[field.name]
        key = f"{prefix}{field.name}"
        found += options(part, f"{key}.") if is_dataclass(part) else [key]
    return found


UNKNOWN = st.builds("{}{}={}".format, st.sampled_from(options()), st.text("xyz", min_size=2),
                    st.sampled_from(["", "1", "a", "[1]", "null"]))  # fmt: skip
WRONG = st.builds("{}={}".format, st.sampled_from(NUMBERS), NOT_NUMBERS)


def outcome(words) -> tuple[int, list[str]]:
    """Return the exit code and the error lines of a training that would begin."""
    error = io.StringIO()
    with (
        patch("cki_rec.pipelines.train.run", lambda config: None),
        contextlib.redirect_stderr(error),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        code = cli.main(["train", *words])
    return code, error.getvalue().splitlines()


def check_any(words):
    code, lines = outcome(words)
    assert code in (0, 2)
    assert len(lines) == (code == 2)


def check_mistake(words):
    code, lines = outcome(words)
    assert (code, len(lines)) == (2, 1)
    assert lines[0].startswith("cki-rec: ")
    assert any(word.partition("=")[0] in lines[0] for word in words)


@example(["hydra=null"])
@example(["hydra.searchpath=3"])
@example(["name=${"])
@example(["[" * 900 + "=1"])
@example(["seed=" + "[" * 900])
@settings(max_examples=4, **PROFILE)
@given(words=LINES)
def test_any_command_line_is_a_configuration_or_one_line(words):
    check_any(words)


@settings(max_examples=3, **PROFILE)
@given(word=st.one_of(UNKNOWN, WRONG))
def test_unknown_keys_and_wrong_types_are_one_line(word):
    check_mistake([word])


@pytest.mark.slow
@settings(max_examples=400, **PROFILE)
@given(words=LINES)
def test_hundreds_of_command_lines_are_configurations_or_one_line(words):
    check_any(words)


@pytest.mark.slow
@settings(max_examples=300, **PROFILE)
@given(word=st.one_of(UNKNOWN, WRONG))
def test_hundreds_of_unknown_keys_and_wrong_types_are_one_line(word):
    check_mistake([word])
