"""Options as typed: every mistake is one line that names the fix."""

import shlex

import pytest

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
        (["merge.sources=[1,2]"], "merge.sources[0]=1: must be a path, or options as {seed: 1}"),
        (["suite.sources=[{seed: 1},2]"], "suite.sources[1]=2: must be a path, or options"),
        (["größe=3"], "no option 'größe'"),
        (["model..x=3"], "model..x=3: cannot be read"),
        (["-x"], "'-x': options are written key=value"),
    ],
)
def test_the_mistake_is_named(words, message):
    found = outcome(words)
    assert message in found
    assert bool(message) == bool(found)
