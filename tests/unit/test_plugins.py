"""Code of users: imports, digests, and one line for every mistake."""

from __future__ import annotations

import pytest
from own_code import own_code

from cki_rec import plugins
from cki_rec.config import UserError, model_options, section
from cki_rec.evaluation.metrics import METRICS, SHOWN, metric
from cki_rec.models import build_model
from cki_rec.models.comparison import decides, differences

__all__ = ["own_code"]  # a fixture


@pytest.mark.parametrize(
    ("name", "text", "part"),
    [
        ("gone.py", None, "merge.plugins=gone.py: no such file"),
        ("gone_module", None, "no module gone_module is installed or in "),
        ("bad.py", "x = (\n", r"SyntaxError: .*bad.py, line 1"),
        ("raises.py", "x = 1\nx.y\n", r"AttributeError: .*raises.py, line 2"),
        ("needs.py", "import absent_package\n", "No module named 'absent_package'.*line 1"),
        (
            "twice.py",
            "import cki_rec\n@cki_rec.method()\ndef average(models) -> cki_rec.Params:\n  ...\n",
            r"ValueError: a method named average is registered already .*twice.py, line 2",
        ),
    ],
)
def test_a_module_that_cannot_be_loaded_is_one_line(own_code, name, text, part):
    if text is not None:
        (own_code / name).write_text(text)
    with pytest.raises(UserError, match=part) as caught:
        plugins.load(name, "merge.plugins")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("nets.py", "expected package.module:Class"),
        ("nets.py:", "expected package.module:Class"),
        ("nets.py:Nett", "did you mean 'Net'.*has no class Nett; its classes are Net"),
    ],
)
def test_a_class_that_is_not_there_is_one_line(own_code, name, part):
    (own_code / "nets.py").write_text("class Net:\n    pass\n")
    with pytest.raises(UserError, match=part):
        plugins.load_class(name)


def test_a_changed_file_is_loaded_again(own_code):
    file = own_code / "nets.py"
    file.write_text("class Net:\n    size = 1\n")
    one = plugins.load_class("nets.py:Net")
    assert plugins.load_class("nets.py:Net") is one
    file.write_text("class Net:\n    size = 2\n")
    other = plugins.load_class("nets.py:Net")
    assert (one.size, other.size) == (1, 2)
    assert plugins.source_digest(other) is not None
    assert plugins.source_digest(UserError) is None  # of this package


def test_a_package_of_the_working_folder_is_covered_whole(own_code, monkeypatch):
    folder = own_code / "pack_of_mine"
    folder.mkdir()
    (folder / "__init__.py").write_text("from pack_of_mine.nets import Net\n")
    (folder / "nets.py").write_text("class Net:\n    pass\n")
    monkeypatch.setattr("sys.path", [p for p in plugins.sys.path if p != str(own_code)])
    net = plugins.load_class("pack_of_mine:Net")
    assert net.__module__ == "pack_of_mine.nets"
    files = sorted(folder.glob("*.py"))
    assert plugins.source_digest(net) == plugins._joined_digest(files)


def test_a_checkpoint_does_not_choose_the_code_that_runs(own_code, compose, schema):
    (own_code / "nets.py").write_text("raise SystemExit('it ran')\n")
    saved = {**section(compose_model(compose)), "module": "nets.py:Net"}
    with pytest.raises(UserError, match="to run that code, add this option"):
        build_model(schema, model_options(saved))


def test_a_network_is_compared_by_its_class_not_by_its_path(compose):
    plain = section(compose_model(compose))
    one, other = (model_options({**plain, "module": f"{f}:Net"}) for f in ("a.py", "/x/a.py"))
    assert one.name == "Net"
    assert set(differences(one, other)) == {"module"}
    assert not decides("module", one)
    assert "module" not in plain  # so identities are those of earlier releases


def compose_model(compose):
    from cki_rec.config import parse

    return parse(compose()).model


def test_a_metric_is_registered_once_and_undefined_numbers_are_none(own_code):
    @metric(title="Share", better="near 1")
    def share(label, logit):
        return float("nan")

    assert METRICS["share"] in SHOWN
    assert METRICS["share"]([1.0], [0.0]) is None
    metric(title="Share of clicks", better="near 1")(share)  # a cell that runs again
    assert [m.title for m in SHOWN if m.name == "share"] == ["Share of clicks"]

    def auc(label, logit):
        return 0.0

    with pytest.raises(ValueError, match="a metric named auc is registered already"):
        metric(title="x", better="higher")(auc)
