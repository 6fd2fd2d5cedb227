"""Methods, networks and metrics of a user: CONTRIBUTING, *Your own package*, literally."""

from __future__ import annotations

import json
import re
import shlex

import pytest
from conftest import SMALL
from own_code import own_code

from cki_rec import cli, project_root
from cki_rec.config import UserError, with_delta
from cki_rec.data.encoding import store
from cki_rec.pipelines import merge, preflight, train

__all__ = ["own_code"]  # a fixture
GUIDE = (project_root() / "CONTRIBUTING.md").read_text()
SECTION = GUIDE.split("## Your own package\n")[1].split("\n## ")[0]


def code_of(file: str) -> str:
    """Return the code of step 1 of a recipe."""
    return re.search(rf"in a new file `\S*/{file}`:\n```python\n(.*?)```", GUIDE, re.S).group(1)


@pytest.fixture
def folder(own_code):
    for file in ("smoothed_evidence.py", "pooled_mlp.py"):
        (own_code / file).write_text(code_of(file))
    (own_code / "mine.py").write_text(re.search(r"```python\n(.*?)```", SECTION, re.S).group(1))
    return own_code


def test_the_guide_to_own_code_followed_literally(folder, raw_zip, capsys):
    commands = re.search(r"```bash\n(.*?)```", SECTION, re.S).group(1).splitlines()
    small = [f"runtime.{name}={folder / name}" for name in ("out", "reports", "encoded")]
    small += [f"data.raw={raw_zip}", *SMALL]
    for command in commands:
        assert cli.main([*shlex.split(command)[1:], *small]) == 0, capsys.readouterr().err
    table = (folder / "reports" / "own" / "table.md").read_text()
    assert "Brier" in table
    assert "| smoothed |" in table
    (path,) = (folder / "out").glob("evaluate-*/record.json")
    record = json.loads(path.read_text())
    assert 0 < record["result"]["test"]["brier"] < 0.3
    assert set(record["config"]["evaluate"]["metrics"]) == {"brier"}
    (trained, _) = (folder / "out").glob("train-*/record.json")
    assert json.loads(trained.read_text())["config"]["model"]["name"] == "PooledMLP"
    assert cli.main(["merge", "--list", "merge.plugins=[smoothed_evidence.py]"]) == 0
    assert "smoothed_evidence" in capsys.readouterr().out


def test_the_source_of_own_code_enters_identities(folder, run_config):
    own = ("model.module=pooled_mlp.py:PooledMLP", "merge.plugins=[smoothed_evidence.py]")
    config = run_config(folder, *own, "merge=average", "merge.method=smoothed_evidence")
    dataset = store.prepare(config.data, config.runtime.encoded)
    before = train.run_of(config, dataset).path, preflight.source_of(config.merge)
    same = with_delta(config, {"model.module": str(folder / "pooled_mlp.py:PooledMLP")})
    assert train.run_of(same, dataset).path == before[0]  # however the path is written
    for file in ("smoothed_evidence.py", "pooled_mlp.py"):
        (folder / file).write_text(code_of(file) + "# changed\n")
    after = train.run_of(config, dataset).path, preflight.source_of(config.merge)
    assert before[0] != after[0]
    assert before[1] != after[1]
    plain = run_config(folder, "merge=average")
    assert preflight.source_of(plain.merge) is None
    assert "module" not in train.model_identity(plain.model)


def test_a_network_without_logit_scale_is_refused_before_training(folder, run_config, monkeypatch):
    text = code_of("pooled_mlp.py").replace("def logit_scale(", "def _unused(")
    (folder / "pooled_mlp.py").write_text(text)
    monkeypatch.setattr(train, "_train", lambda *_: pytest.fail("it trained"))
    config = run_config(folder, "model.module=pooled_mlp.py:PooledMLP", "suite=seeds")
    with pytest.raises(UserError, match=r"PooledMLP: the network declares no logit_scale\(\)"):
        merge.ensure(config)
