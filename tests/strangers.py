"""Two checkpoints of another program in several forms, and commands that merge them."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from cki_rec.checkpoints.formats import layout, open_stored
from cki_rec.cli import main

NETWORK = """
import torch
from torch import nn

class Ranker(nn.Module):
    def __init__(self):
        super().__init__()
        self.user, self.item = nn.Embedding(40, 4), nn.Embedding(30, 4)
        self.mlp = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 1))

    def forward(self, user, item):
        return self.mlp(torch.cat([self.user(user), self.item(item)], 1)).squeeze(1)

def draw(seed, rows=400):
    place = torch.Generator().manual_seed(seed)
    user = torch.randint(40, (rows,), generator=place)
    return user, torch.randint(30, (rows,), generator=place)

def batches():
    return [draw(seed) for seed in range(3)]

def labelled():
    return [(draw(seed), (draw(seed)[0] < 20).float()) for seed in range(3)]
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Folder with a module and two models that were trained with Adam, in several forms."""
    folder = tmp_path_factory.mktemp("foreign")
    (folder / "net.py").write_text(NETWORK)
    names: dict = {}
    exec(NETWORK, names)
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        model = names["Ranker"]()
        adam = torch.optim.Adam(model.parameters(), lr=0.02)
        for step in range(30):
            user, item = names["draw"](100 * seed + step)
            user = user // 2 + 20 * (seed == 1)  # each sees one half of the users
            loss = nn.functional.binary_cross_entropy_with_logits(
                model(user, item), (user % 3 == 0).float()
            )
            adam.zero_grad()
            loss.backward()
            adam.step()
        state = model.state_dict()
        safetensors.torch.save_file(state, folder / f"{name}.safetensors")
        wrapped = {f"module.{n}": x for n, x in state.items()}
        content = {"epoch": 1, "model_state": wrapped, "optimizer": adam.state_dict()}
        torch.save(content, folder / f"{name}.pt")
        content = {"model": state, "optim": adam.state_dict()}
        dcp.save(content, checkpoint_id=folder / name, no_dist=True)
    return folder


def state_of(home, name):
    return safetensors.torch.load_file(home / f"{name}.safetensors")


class Command:
    """Runs commands in a folder, and reads the card of the last merge."""

    def __init__(self, out, capsys):
        self.out, self.capsys = out, capsys

    def merge(self, *words, sources):
        listed = ",".join(s if s.startswith("{") else f"{{path: {s}}}" for s in sources)
        options = [f"merge.sources=[{listed}]", f"runtime.out={self.out}"]
        code = main(["merge", *options, *words])
        self.shown = self.capsys.readouterr()
        return code

    def model(self, *words, sources):
        assert self.merge(*words, sources=sources) == 0, self.shown.err
        line = next(x for x in self.shown.out.splitlines() if x.startswith("model: "))
        path = Path(line.removeprefix("model: "))
        self.card = json.loads((path.parent / "merge.json").read_text())
        self.text = (path.parent / "README.md").read_text()
        return path

    def error(self, *words, sources):
        assert self.merge(*words, sources=sources) == 2, self.shown
        assert self.shown.err.startswith("cki-rec: ")
        assert not list(self.out.glob("merge-*"))
        return self.shown.err


@pytest.fixture
def command(tmp_path, capsys):
    return Command(tmp_path / "out", capsys)


def read(path):
    stored = open_stored(path)
    return {name: stored.rows(full) for name, full in layout(stored).names.items()}
