"""Options as typed: every mistake is one line that names the fix; no text gives a traceback."""

import shlex

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from cki_rec import cli
from cki_rec.config import UserError, parse
from cki_rec.overrides import unprintable


def outcome(words) -> str:
    """Return the mistake of a command line; "": it is a configuration."""
    if mistake := unprintable(words):
        return mistake
    try:
        parse(cli.compose_config(list(words)))
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("data.raw", v) for v in ("~/x.csv", "a[1].csv", "a#b.csv", "größe.csv", "(a)", "x{1}")),
        *(
            ("name", v)
            for v in ("a=b", "it's", 'say "a"', "a 'b' \"c\"", "a\\'b=", "日本", "a&b;c=")
        ),
    ],
)
def test_the_quoted_form_that_a_message_shows_works(option, value):
    message = outcome([f"{option}={value}"])
    (shown,) = shlex.split(message.partition("needs quotes: ")[2])
    parsed = cli.parse_options([shown])[0]
    assert (parsed.key_or_group, parsed.value()) == (option, value)


def test_special_characters_inside_a_list_are_quoted_there():
    message = outcome(["merge.sources=[{path: runs/a=b},{path: runs/c}]"])
    (shown,) = shlex.split(message.partition("need quotes: ")[2])
    assert shown == 'merge.sources=[{path: "runs/a=b"},{path: runs/c}]'
    assert cli.parse_options([shown])[0].value() == [{"path": "runs/a=b"}, {"path": "runs/c"}]


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["data.raw=my", "file.csv", "seed=2"], "'data.raw=my file.csv'"),
        (["merge.sources=[{path:", "a},{path:", "b}]"], "'merge.sources=[{path: a},{path: b}]'"),
    ],
)
def test_an_option_that_the_shell_has_split(words, shown):
    assert shown in outcome(words)


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["train", "seed=1\r"], "'seed=1' ends with a carriage return"),
        (["train\r"], "'train' ends with a carriage return"),
        (["train", "name=a\x07b"], "'name=a\\x07b': has a control character"),
        (["train", "name=a\udcffb"], "no UTF-8"),
    ],
)
def test_control_characters(capsys, words, part):
    assert cli.main(words) == 2
    error = capsys.readouterr().err
    assert part in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["merge=ties", "merge.options.density=0.2", "model.hiden=[8]"],
            "no option 'model.hiden': did you mean 'model.hidden'?",
        ),
        (
            ["merge.method=ties", "merge.options.density=0.2", "model.hiden=[8]"],
            "no option 'model.hiden': did you mean 'model.hidden'?",
        ),
        (
            ["merge=task_arithmetic", "merge.options.scal=2"],
            "no option 'merge.options.scal': did you mean 'scale'? task_arithmetic takes scale",
        ),
        (["merge.method=ties", "merge.options.density=0.2"], ""),
        (["merge.method=ties", "merge.options={density: 0.2}"], ""),
        (["merge=cki", "merge.options.gate=identity"], ""),
        (
            ["seed=1,2"],
            "seed=1,2: several values are a sweep, which needs -m; a list is 'seed=[1,2]'",
        ),
        (["merge=ties,average"], "needs -m; without a sweep, name one choice"),
        (["seed="], "seed=: must be a whole number"),
        (["model=null"], "model=null: one of dcn, "),
        (["~merge"], "merge.method=None: one of"),
        (["merge.sources=[{seed: 1}"], "brackets or quotes do not match"),
        (["größe=3"], "no option 'größe'"),
        (["model..x=3"], "model..x=3: cannot be read"),
        (["-x"], "'-x': options are written key=value"),
    ],
)
def test_the_mistake_is_named(words, message):
    found = outcome(words)
    assert message in found
    assert bool(message) == bool(found)


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


def check_line(words):
    found = outcome(words)
    assert "\n" not in found
    assert "Traceback" not in found


@example(["hydra=null"])
@example(["hydra.searchpath=3"])
@example(["name=${"])
@example(["[" * 900 + "=1"])
@example(["seed=" + "[" * 900])
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(words=LINES)
def test_no_command_line_gives_a_traceback(words):
    check_line(words)


@pytest.mark.slow
@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(words=LINES)
def test_hundreds_of_command_lines_give_no_traceback(words):
    check_line(words)
